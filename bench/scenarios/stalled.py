"""One run and a thousand readers, of which some stop reading: what the others notice of it.

Knows: how many stall, and what is compared. Must never know what a server does about them.

Those who stall keep their connection and take nothing more, once all have joined; the kernels of
both sides hold some ten KiB for them. What is not taken then is the server's to hold, to drop or to
wait for. A server that does not keep up even without them is started again and asked for a fifth.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import attrs

from bench.pacing import COLUMNS, SAID_OF, Found, Row, attempt, doubts, figures, line, problems
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table
from bench.servers import Server, chosen, serving

from .fanout import PACES, SLOWER, WARM_UP, Pace, fan


@attrs.frozen
class Size:
    """How many read, and the rounds: how many of them stall, and the steady seconds.

    Attributes:
        spare: As in fan-out.
    """

    readers: int
    rounds: Sequence[tuple[int, float]]
    spare: float


# First buffers fill, which takes ours 7 s; then it gives a client 10 s.
FULL_SIZE = Size(1_000, ((0, 3.0), (10, 20.0)), spare=1.0)
QUICK_SIZE = Size(100, ((1, 0.8),), spare=0.5)


async def _measure_server(bench: Bench, server: Server, size: Size) -> list[Row]:
    rows: list[Row] = []
    for pace in PACES:
        rows += await _rounds(bench, server, size, pace)
        if not rows[-1]["remark"] or rows[-1]["stalled"]:
            break
    return rows


async def _rounds(bench: Bench, server: Server, size: Size, pace: Pace) -> list[Row]:
    rows: list[Row] = []
    async with serving(bench, server) as running:
        if not bench.quick:
            await fan(bench, running, *WARM_UP, pace, spare=0.5)
        for stalled, seconds in size.rounds:
            found = await fan(
                bench, running, size.readers, seconds, pace, spare=size.spare, stalled=stalled
            )
            row = {
                "server": server.name,
                "stalled": stalled,
                "rate": pace.rate(size.readers),
            }
            row |= figures(found) | _held(found) | {"fate": _fate(found) if stalled else ""}
            rows.append(row | {"is_last_word": pace is SLOWER or stalled})
            bench.progress(line(rows[-1], "stalled"))
            if found.failure:
                break
    return rows


def _held(found: Found) -> Row:
    """What the server has in memory, and how much more that is than when the steady part began."""
    steady = found.steady
    return {
        "memory": steady and steady.memory_mib[-1],
        "growth": steady and steady.growth,
    }


def _fate(found: Found) -> str:
    """What became of those that stalled."""
    fates = [f"{count} {name}" for name, count in found.stalled.items() if count]
    return ", ".join(fates) or "unknown"


HEADS = (Column("server", "server"), Column("stalled", "stalled", 0), Column("rate", "tokens/s", 0))
TAILS = (
    Column("memory", "MiB"),
    Column("growth", "growth"),
    Column("fate", "those stalled"),
    Column("remark", ""),
)


async def measure(bench: Bench) -> Result:
    """Fan one run out, without readers that stall and with some."""
    size = QUICK_SIZE if bench.quick else FULL_SIZE
    rows: list[Row] = []
    for server in chosen(bench, "stalled"):
        found = await attempt(partial(_measure_server, bench, server, size))
        rows += [{"server": server.name, "remark": found}] if isinstance(found, str) else found
    return Result(
        tables=[Table(f"{size.readers:,} readers of one run", (*HEADS, *COLUMNS, *TAILS), rows)],
        plots=[_plot(rows)],
        notes=[SAID_OF, *(() if bench.quick else _notes(rows, size))],
        problems=list(problems(rows, "stalled")),
        facts={"rows": rows},
    )


def _notes(rows: Iterable[Row], size: Size) -> Iterator[str]:
    lengths = " and ".join(f"{seconds:g} s with {stalled}" for stalled, seconds in size.rounds)
    yield (
        f"steady for {lengths} that stall; the growth is that of so long, and a server that keeps "
        "its runs grows by what it keeps, too"
    )
    yield (
        "a connection that its server has ended in order, behind bytes that are not taken, is "
        "open for who does not take them"
    )
    yield from doubts(rows, "stalled")


def _plot(rows: Iterable[Row]) -> Plot:
    series: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row.get("p99") is not None:
            name = f"{row['stalled']} stalled" if row["stalled"] else "none stalled"
            series.setdefault(name, []).append((row["server"], row["p99"]))
    return Plot(
        "stalled",
        "How late tokens are for those who read",
        "server",
        "p99 of lateness, ms",
        series,
        kind="bars",
    )


SCENARIO = Scenario(
    "stalled",
    "One run, 1,000 readers, of which 1 % stop reading: what the others notice, and what it costs.",
    measure,
    cap=600,
)
