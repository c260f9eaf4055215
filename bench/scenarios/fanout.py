"""One run, and more and more readers of it: what a delivered token costs, and how late it is.

Knows: how many read, how fast, and what is compared. Must never know how a server tells them.

The tokens of one producer go to every reader. Where all of them together would be more than the
client can take in well under a core, the producer is slower; the table says so. A server that does
not keep up is started again and asked for a fifth. Readers join while the run is under way; what is
replayed to them does not count.
"""

import time
from collections.abc import Iterator, Mapping
from functools import partial

import attrs

from bench.pacing import (
    COLUMNS,
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
    problems,
)
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table, Target
from bench.servers import OURS, Native, Running, Server, Work, ask, chosen, serving

RATE = 50.0  # tokens per second, unless that comes to too many deliveries
SETTLE = 0.5  # seconds from the first token of the last reader to the steady part
SLOW = 1.5  # times its schedule: what opening may take
PATIENCE = 6.0  # seconds that readers may get their tokens later than the run should end
JUDGED = 1_000  # readers
AT = (JUDGED, RATE)  # where figures are compared
WARM_UP = (20, 0.5)  # readers, seconds; for code paths, the allocator, a just-in-time compiler
WINDOW = 100  # milliseconds that ours may gather text, where it is asked to
GATHERING = f"{OURS.name} {WINDOW} ms"


@attrs.frozen
class Pace:
    """How much is asked of a server.

    Attributes:
        most: Deliveries per second.
        opening: Seconds between two readers that join.
    """

    most: int
    opening: float

    def rate(self, readers: int) -> float:
        """Tokens per second."""
        return min(RATE, self.most / readers)


USUAL, SLOWER = PACES = (Pace(50_000, 0.002), Pace(10_000, 0.003))


@attrs.frozen
class Size:
    """Steady seconds by number of readers.

    Attributes:
        spare: Seconds that a run lasts beyond the steady part and what the opening should take.
    """

    seconds: Mapping[int, float]
    spare: float


FULL_SIZE = Size({10: 2.0, 100: 2.0, JUDGED: 4.0, 5_000: 4.0}, spare=1.2)
QUICK_SIZE = Size({100: 0.8}, spare=0.7)


def subjects(bench: Bench) -> Iterator[Server]:
    """The servers; ours also with a larger window."""
    for server in chosen(bench, "fanout"):
        yield server
        if server is OURS and not bench.quick:
            yield attrs.evolve(server, name=GATHERING, dialect=Native({"coalesce_ms": WINDOW}))


async def fan(
    bench: Bench,
    running: Running,
    readers: int,
    seconds: float,
    pace: Pace,
    *,
    spare: float,
    stalled: int = 0,
) -> Found:
    """One run and its readers.

    Args:
        bench: Where to run.
        running: The server.
        readers: How many.
        seconds: Of the steady part, at least.
        pace: How many tokens, and how fast readers join.
        spare: See `Size`.
        stalled: So many of the readers stop reading.
    """
    rate = pace.rate(readers)
    lasts = readers * pace.opening * SLOW + SETTLE + seconds + spare
    work = Work(events=round(lasts * rate), gap=1 / rate, stamp=True)
    dialect = running.server.dialect
    started = time.monotonic()
    answer = await ask(running, dialect.fan_start(work))
    load = Load(
        request=dialect.fan_watch(answer).raw(running.at),
        end=running.server.end,
        streams=readers,
        rate=rate,
        stalled=stalled,
        opening=pace.opening,
        settle=SETTLE,
        ends=started + lasts,
        least=seconds / 2,
        seconds=lasts + PATIENCE,
    )
    return await paced(load, running.at, bench.cores.client)


async def _measure_server(bench: Bench, server: Server, size: Size) -> list[Row]:
    rows: list[Row] = []
    left = list(size.seconds.items())
    for pace in PACES:
        async with serving(bench, server) as running:
            if not bench.quick:
                await fan(bench, running, *WARM_UP, pace, spare=0.5)
            while left:
                readers, seconds = left[0]
                measured = partial(fan, bench, running, readers, seconds, pace, spare=size.spare)
                found = await calm(bench, f"{server.name}, {readers} readers", measured, keeps_up)
                row = {"server": server.name, "readers": readers, "rate": pace.rate(readers)}
                rows.append(row | figures(found) | {"is_last_word": pace is SLOWER})
                bench.progress(line(rows[-1], "readers"))
                if not keeps_up(found):
                    del left[1:]  # more readers would do no better, but take their time
                    break
                left.pop(0)
        if not left:
            break
    return rows


def keeps_up(found: Found) -> bool:
    """Whether the server does what it is asked for."""
    return not found.failure


HEADS = (Column("server", "server"), Column("readers", "readers", 0), Column("rate", "tokens/s", 0))


async def measure(bench: Bench) -> Result:
    """Fan one run out, from every server, to each number of readers."""
    size = QUICK_SIZE if bench.quick else FULL_SIZE
    rows: list[Row] = []
    for server in subjects(bench):
        found = await attempt(partial(_measure_server, bench, server, size))
        rows += [{"server": server.name, "remark": found}] if isinstance(found, str) else found
    return Result(
        tables=[Table("Readers of one run", (*HEADS, *COLUMNS, Column("remark", "")), rows)],
        targets=() if bench.quick else list(_targets(rows)),
        plots=[_plot(rows)],
        notes=[SAID_OF, *(() if bench.quick else doubts(rows, "readers"))],
        problems=list(problems(rows, "readers")),
        facts={"rows": rows},
    )


def _targets(rows: list[Row]) -> Iterator[Target]:
    us = {row["server"]: row["us"] for row in rows if (row.get("readers"), row.get("rate")) == AT}
    for name, aim in ((OURS.name, None), (GATHERING, 0.5)):
        if name in us and us.get("node"):
            what = f"{name} / node, CPU per token, {JUDGED:,} readers"
            yield Target(what, us[name] and us[name] / us["node"], 1.0, aim)


def _plot(rows: list[Row]) -> Plot:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        # What was asked for at the slower pace lies on no line with the others.
        if row.get("us") and not row["remark"] and row["rate"] == USUAL.rate(row["readers"]):
            series.setdefault(row["server"], []).append((row["readers"], row["us"]))
    return Plot(
        "fanout",
        "What a delivered token costs its server",
        "readers of one run",
        "us of processor time per delivered token",
        series,
        logarithmic=frozenset({"x", "y"}),
    )


SCENARIO = Scenario(
    "fanout",
    "One run with 10 to 5,000 readers: processor time per delivered token, and how late it is.",
    measure,
    cap=900,
)
