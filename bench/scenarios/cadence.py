"""How many streams a server keeps in time: more and more of them, 30 tokens per second each.

Knows: how many streams open, when tokens are late, and what is compared. Must never know how a
server keeps time.

A number of streams holds if 99 of 100 tokens come within a quarter of a second of when they were
due, nearly all of them come, and no stream breaks. The number grows until one does not hold; then
the middle between that one and the last that held is tried. Streams have a schedule of their own,
which goes on while the server is behind: so what it does not make in time is late, too.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import attrs
import trio

from bench.pacing import (
    COLUMNS,
    KEPT_UP,
    SAID_OF,
    Found,
    Load,
    Row,
    attempt,
    calm,
    doubts,
    figures,
    line,
    paced,
)
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table, Target
from bench.servers import OURS, Running, Server, Work, chosen, serving

RATE = 30.0  # tokens per second and stream
LIMIT = 250.0  # milliseconds that 99 of 100 tokens may be late
OPENING = 0.002  # seconds between two streams that open, ...
OPENED_IN = 3.0  # ... unless all of them would take longer
PATIENCE = 6.0  # seconds that opening may take beyond that
BREATH = 0.5  # seconds in which a server gets over the streams that have been left
WARM_UP = 20  # streams
IDLE = 40  # % of the server's core, below which a step is left out
ROUND = 10  # streams: what is tried between two numbers is a multiple


@attrs.frozen
class Size:
    """How many streams are tried, and for how many seconds."""

    streams: Sequence[int]
    settle: float
    steady: float


FULL_SIZE = Size(
    (100, 200, 400, 600, 800, 1_000, 1_300, 1_600, 2_000, 2_500, 3_000),
    settle=1.0,
    steady=2.0,
)
QUICK_SIZE = Size((30, 60), settle=0.2, steady=0.6)


async def _stream(bench: Bench, running: Running, size: Size, streams: int) -> Found:
    """So many streams, for a while."""
    opening = min(OPENING, OPENED_IN / streams)
    seconds = streams * opening + size.settle + size.steady + PATIENCE
    work = Work(events=round((seconds + PATIENCE) * RATE), gap=1 / RATE, stamp=True)
    load = Load(
        request=running.server.dialect.run(work).raw(running.at),
        streams=streams,
        rate=RATE,
        opening=opening,
        settle=size.settle,
        steady=size.steady,
        leave=True,
        seconds=seconds,
    )
    found = await paced(load, running.at, bench.cores.client)
    await trio.sleep(0 if bench.quick else BREATH)
    return found


def why_not(found: Found) -> str:
    """Say why a number of streams does not hold; empty if it does."""
    if (steady := found.steady) is None or found.failed:
        return found.failure or ""
    if steady.late_due_ms["p99"] > LIMIT:
        return "late"
    return "" if steady.delivered >= KEPT_UP else "behind"


async def _measure_server(bench: Bench, server: Server, size: Size) -> list[Row]:
    """Try one number after the other; in quick, nothing else."""
    rows: list[Row] = []
    async with serving(bench, server) as running:

        async def attempt_with(streams: int) -> Row:
            measured = partial(_stream, bench, running, size, streams)
            found = await calm(bench, f"{server.name}, {streams} streams", measured, why_not)
            row = {"server": server.name, "streams": streams, **figures(found)}
            rows.append(row | {"remark": why_not(found)})
            bench.progress(line(rows[-1], "streams"))
            return rows[-1]

        if not bench.quick:
            await _stream(bench, running, QUICK_SIZE, WARM_UP)
        held, steps = 0, list(size.streams)
        while steps:
            row = await attempt_with(streams := steps.pop(0))
            if row["remark"]:
                middle = (held + streams) // 2 // ROUND * ROUND
                if held < middle < streams and not bench.quick:
                    await attempt_with(middle)
                break
            held = streams
            if (row["share"] or IDLE) < IDLE and len(steps) > 1 and not bench.quick:
                steps.pop(0)
    return rows


async def measure(bench: Bench) -> Result:
    """Find the most streams that every server keeps in time."""
    size = QUICK_SIZE if bench.quick else FULL_SIZE
    rows: list[Row] = []
    for server in chosen(bench, "cadence"):
        found = await attempt(partial(_measure_server, bench, server, size))
        rows += [{"server": server.name, "remark": found}] if isinstance(found, str) else found
    most = [_most(name, tried) for name, tried in _by_server(rows).items()]
    return Result(
        tables=[
            Table(f"Most streams with p99 within {LIMIT:g} ms", MOST, most),
            Table("Streams", (*HEADS, *COLUMNS, Column("remark", "")), rows),
        ],
        targets=() if bench.quick else list(_targets(most)),
        plots=[_plot(rows)],
        notes=[SAID_OF, *(() if bench.quick else doubts(_held(rows), "streams"))],
        problems=list(_problems(rows, size)),
        facts={"most": most, "rows": rows},
    )


MOST = (
    Column("server", "server"),
    Column("streams", "streams", 0),
    Column("beyond", "too many", 0),
    Column("us", "us/token", 2),
    Column("share", "core %", 0),
    Column("client", "client %", 0),
    Column("remark", ""),
)
HEADS = (Column("server", "server"), Column("streams", "streams", 0))


def _by_server(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["server"], []).append(row)
    return found


def _held(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("streams") and not row["remark"]]


def _most(name: str, tried: Sequence[Row]) -> Row:
    """The most streams that held, with their figures; and the fewest that did not."""
    held = max(_held(tried), key=lambda row: row["streams"], default=None)
    broke = min(
        (row for row in tried if row["remark"]), key=lambda row: row.get("streams", 0), default=None
    )
    best = {column.key: held and held.get(column.key) for column in MOST}
    return best | {
        "server": name,
        "streams": held["streams"] if held else 0,
        "beyond": broke and broke.get("streams"),
        "remark": broke["remark"] if broke else "no more was tried",
    }


def _targets(most: Iterable[Row]) -> Iterator[Target]:
    held = {row["server"]: row["streams"] for row in most}
    floor, aim = held.get("sse-starlette"), held.get("aiohttp")
    if held.get(OURS.name) is not None and floor is not None:
        what = (
            "streams that agentsse keeps in time; the floor is sse-starlette's, the aim aiohttp's"
        )
        yield Target(what, held[OURS.name], floor, aim, is_ceiling=False)


def _problems(rows: Iterable[Row], size: Size) -> Iterator[str]:
    """What was wrong with ours; that more than the fewest streams do not hold is no fault."""
    for row in rows:
        is_least = row.get("streams", 0) <= size.streams[0]
        if row["server"] == OURS.name and row["remark"] and is_least:
            yield f"{row['server']}, {row.get('streams', '-')} streams: {row['remark']}"


def _plot(rows: Iterable[Row]) -> Plot:
    return Plot(
        "cadence",
        "How late tokens are, by number of streams",
        f"streams of {RATE:g} tokens per second",
        "p99 of lateness, ms",
        {
            name: sorted((row["streams"], row["p99"]) for row in tried if row.get("p99"))
            for name, tried in _by_server(rows).items()
        },
        logarithmic=frozenset({"y"}),
        limit=(LIMIT, "late"),
    )


SCENARIO = Scenario(
    "cadence",
    "How many streams of 30 tokens per second come in time: p99 within 250 ms of when due.",
    measure,
    cap=600,
)
