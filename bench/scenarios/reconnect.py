"""All readers lose their connections at once, and all come back for what they have missed.

Knows: how many readers of how many runs, where they are cut, and what they must have then. Must
never know how a log is kept or read.

A reader that comes back says which event it had last (Last-Event-ID); it has caught up when it has
the newest one. All of them come at one instant, from which every time counts. Whether each event
came exactly once is checked by the ids, for each reader. One process serves all of it.
"""

import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import attrs
import trio

from bench.holding import WINDOW, holding
from bench.measuring import cpu_seconds
from bench.rounds import middle
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table
from bench.servers import OURS, Ask, Native, Running, Work, ask, chosen, serving

AGES = 600.0  # seconds that a run is silent after its events; nobody waits for it
FIRST = 1  # event of a run: that it has started; then come those of the work
PATIENCE = 30.0  # seconds that an order may take
AT_ONCE = 20  # runs that are being started at the same time


@attrs.frozen
class Storm:
    """Readers, what they read, and where they are cut; seconds.

    Attributes:
        after: The last event that each of them has had.
        away: Between the cut and the return.
    """

    readers: int
    runs: int
    work: Work
    after: int
    away: float = 0.0
    rounds: int = 3

    @property
    def is_live(self) -> bool:
        """Whether events are made while the readers are away, and after that."""
        return self.work.gap > 0

    @property
    def until(self) -> int:
        """The event with which a reader has caught up."""
        if self.is_live:
            return self.after + int(self.away / self.work.gap)
        return self.work.events + FIRST

    def __str__(self) -> str:
        if self.runs == 1:
            return "one run, going on" if self.is_live else "one run"
        return f"{self.runs:,} runs"


LOGGED = Work(events=200, hold=AGES)
STORMS = (  # runs of those before are still there: silent, and nobody reads them
    Storm(1_000, 1, Work(events=150, gap=0.1), after=40, away=2.0, rounds=1),
    Storm(1_000, 1, LOGGED, after=100),
    Storm(1_000, 100, LOGGED, after=100),
    Storm(1_000, 1_000, LOGGED, after=100),
)
SMOKES = (
    Storm(100, 1, Work(events=30, gap=0.05), after=10, away=0.5, rounds=1),
    Storm(100, 10, LOGGED, after=100, rounds=1),
)

COLUMNS = (
    Column("readers", "readers", 0),
    Column("of", "of"),
    Column("events", "missed events", 0),
    Column("rate", "readers/s", 0),
    Column("first_p50", "first byte p50 ms", 0),
    Column("first_p99", "p99", 0),
    Column("there_p50", "caught up p50 ms", 0),
    Column("there_p99", "p99", 0),
    Column("there_max", "max", 0),
    Column("us", "us/reader", 0),
    Column("client", "client %", 0),
    Column("once", "each once"),
    Column("failed", "failed"),
)


async def measure(bench: Bench) -> Result:
    rows: list[dict[str, Any]] = []
    for server in chosen(bench, "reconnect"):
        if not isinstance(server.dialect, Native):
            continue
        async with AsyncExitStack() as stack:
            running = await stack.enter_async_context(serving(bench, server))
            stack.callback(os.kill, running.pid, signal.SIGKILL)  # its runs do not end
            for storm in SMOKES if bench.quick else STORMS:
                row = await _measure_storm(bench, running, storm)
                rows.append(row)
                bench.progress(_line(row))
    return Result(
        tables=[Table("all readers are cut at once, and come back at once", COLUMNS, rows)],
        plots=[
            Plot(
                "reconnect",
                "from the return of all readers until each has what it missed",
                "readers of",
                "milliseconds",
                {
                    name: [(row["of"], row[key]) for row in rows if row[key] is not None]
                    for name, key in (("p50", "there_p50"), ("p99", "there_p99"))
                },
                kind="bars",
            )
        ],
        notes=[
            f"only {OURS.name}: the peers keep no events, and have nothing to go on with",
            "one run, going on: it makes events while its readers are away, and then to its end",
        ],
        problems=list(_problems(rows)),
        facts={"rows": rows},
    )


async def _measure_storm(bench: Bench, running: Running, storm: Storm) -> dict[str, Any]:
    requests = await _start(running, storm)
    rounds: list[dict[str, Any]] = []
    ended: dict[str, Any] | None = None
    async with holding(bench, running, requests, streams=storm.readers, seconds=PATIENCE) as client:
        opened = await client.do("open", window=WINDOW)
        reached = await client.do("reach", id=storm.after if storm.is_live else storm.until)
        for _ in range(0 if opened["failed"] or reached["failed"] else storm.rounds):
            before = cpu_seconds(running.pid)
            await client.do("cut")
            await trio.sleep(storm.away)
            came = await client.do("return", after=storm.after, until=storm.until)
            after = cpu_seconds(running.pid)
            cpu = None if before is None or after is None else after - before
            rounds.append(came | {"server_cpu_seconds": cpu})
        if storm.is_live and rounds:
            ended = await client.do("end", since=0)
    return _row(storm, [opened, reached], rounds, ended)


async def _start(running: Running, storm: Storm) -> list[Ask]:
    """Start the runs, which go on whoever reads them, and return how they are read."""
    dialect = running.server.dialect
    order = dialect.run(storm.work)
    order = attrs.evolve(order, body=json.dumps(json.loads(order.body) | {"background": True}))
    requests: list[Ask] = []
    limit = trio.CapacityLimiter(AT_ONCE)

    async def start() -> None:
        async with limit:
            answer = await ask(running, order)
        requests.append(dialect.fan_watch(answer))

    async with trio.open_nursery() as nursery:
        for _ in range(storm.runs):
            nursery.start_soon(start)
    return requests


def _row(
    storm: Storm,
    before: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
    ended: Mapping[str, Any] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "readers": storm.readers,
        "of": str(storm),
        "events": storm.until - storm.after,
        "rate": middle(storm.readers / came["seconds"] for came in rounds if not came["failed"]),
        "us": middle(_us(came["server_cpu_seconds"], storm.readers) for came in rounds),
        "client": max((_share(came) * 100 for came in rounds), default=None),
        "once": "yes" if _came_once(storm, [*before, *rounds], ended) else "NO",
        "failed": _failure([*before, *rounds]) or "none",
        "rounds": rounds,
        "ended": ended,
    }
    for what in ("first", "there"):
        times = [found for came in rounds if (found := came[f"{what}_ms"])]
        row[f"{what}_p50"] = middle(each["p50"] for each in times)
        row[f"{what}_p99"] = middle(each["p99"] for each in times)
        row[f"{what}_max"] = max((each["max"] for each in times), default=None)
    return row


def _us(seconds: float | None, parts: int) -> float | None:
    return None if seconds is None else seconds / parts * 1e6


def _share(came: Mapping[str, Any]) -> float:
    return came["client_cpu_seconds"] / came["seconds"]


def _came_once(
    storm: Storm, steps: Sequence[Mapping[str, Any]], ended: Mapping[str, Any] | None
) -> bool:
    """Tell whether every reader had each event exactly once, and the run's end where it came."""
    if any(step["gaps"] for step in steps):
        return False
    if not storm.is_live:
        missed = (storm.until - storm.after) * storm.readers
        return all(step["events"] == missed for step in steps if "events" in step)
    good = ["complete", "run_finished success", storm.readers]
    return ended is not None and ended["endings"] == [good] and not ended["gaps"]


def _failure(steps: Sequence[Mapping[str, Any]]) -> str | None:
    return next((step["failures"][0] for step in steps if step["failed"]), None)


def _line(row: Mapping[str, Any]) -> str:
    begin = f"{row['readers']:,} readers of {row['of']:18}"
    if row["failed"] != "none":
        return f"{begin} {row['failed']}"
    return f"{begin} caught up p99 {row['there_p99']:6,.0f} ms, each event once: {row['once']}"


def _problems(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        where = f"{row['readers']:,} readers of {row['of']}"
        if row["failed"] != "none":
            yield f"{where}: {row['failed']}"
        elif row["once"] != "yes":
            yield f"{where}: expected each event exactly once, got some again or not at all"


SCENARIO = Scenario(
    name="reconnect",
    summary="1,000 readers are cut at once and come back at once: how soon they have caught up.",
    measure=measure,
    cap=420,
)
