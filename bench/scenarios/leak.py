"""Ten thousand clients come and go: what is left of them in the server?

A cycle is a stream that is opened, has its first event, and is left, by FIN and RST in turns; its
agent holds a connection to an upstream as long as it lives. 50 cycles are under way at the same
time, 500 make a batch. Behind a batch, when the counter says that every agent is gone, and half a
second later, the server's tasks, descriptors and resident memory are noted. The beginning is behind
200 cycles that do not count, in which imports and code paths get warm.

What memory grows by is the slope of a straight line (least squares) through the second half of the
notes, per 1,000 cycles. Ours keeps finished runs by design, 1,000 of them and at most 256 MiB; with
10,000 cycles that is full long before the second half.

A server gets 30 s; one that is slow does fewer cycles, and the table tells how many.

Knows: cycles, and how what is left of them is judged. Must never know how they are made.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import trio

from bench import servers
from bench.measuring import Address, answer_of, descriptors, listening, memory
from bench.peers import upstream as upstreams
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table
from bench.scenarios.disconnect import EXPECTED, first_of

CYCLES, QUICK_CYCLES = 10_000, 300
BATCH, QUICK_BATCH = 500, 150  # cycles between two notes
WARM_UP, QUICK_WARM_UP = 200, 50
AT_ONCE = 50
MOST = 30.0  # seconds for a server
BATCH_CAP = 15.0  # seconds for a batch
QUIET = 0.5  # seconds between the last agent's end and a note
PATIENCE = 10.0  # seconds for agents that are still there
PAUSE = 0.05  # seconds between two looks whether they are
HOLD = 60.0  # seconds that an agent would stay
CAP = 400.0  # seconds for everything


@attrs.frozen
class Note:
    """What the server held, behind so many cycles; None for what it does not tell."""

    cycles: int
    tasks: int | None
    descriptors: int | None
    mib: float | None
    living: int
    upstream: int


@attrs.frozen
class Found:
    """What became of a server's clients."""

    server: str
    notes: Sequence[Note]
    seconds: float
    failures: Sequence[str]

    @property
    def cycles(self) -> int:
        return self.notes[-1].cycles if self.notes else 0

    @property
    def growth(self) -> float | None:
        """KiB per 1,000 cycles, in the second half."""
        half = [note for note in self.notes if note.cycles >= self.cycles / 2]
        points = [(note.cycles / 1_000, note.mib * 1024) for note in half if note.mib is not None]
        return slope(points)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of the straight line that is nearest to points, by least squares."""
    if len(points) < 3:
        return None
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else None


async def measure(bench: Bench) -> Result:
    """Let clients come to every server, and go."""
    found = []
    command = [sys.executable, "-m", "bench.peers.upstream"]
    async with listening(command, bench.cores.client) as upstream:
        for server in servers.chosen(bench, "leak"):
            found.append(await _measure_one(bench, server, upstream))
            bench.progress(_line(found[-1]))
    return Result(
        tables=[Table("Streams that come and go, and what is left of them", COLUMNS, _rows(found))],
        plots=[
            Plot(
                name="leak",
                title="Resident memory, while clients come and go",
                x="cycles",
                y="MiB",
                series={
                    done.server: [(n.cycles, n.mib) for n in done.notes if n.mib is not None]
                    for done in found
                },
            )
        ],
        notes=list(_notes(found)),
        problems=list(_problems(found)),
        facts={"servers": [attrs.asdict(done) | {"growth": done.growth} for done in found]},
    )


async def _measure_one(bench: Bench, server: servers.Server, upstream: Address) -> Found:
    notes: list[Note] = []
    failures: list[str] = []
    began = time.monotonic()
    try:
        async with servers.serving(bench, server) as running:
            await _cycle(bench, running, upstream, QUICK_WARM_UP if bench.quick else WARM_UP)
            notes.append(await _note(running, upstream, 0))
            wanted, batch = (QUICK_CYCLES, QUICK_BATCH) if bench.quick else (CYCLES, BATCH)
            began = time.monotonic()
            while notes[-1].cycles < wanted and time.monotonic() < began + MOST and not failures:
                done = await _cycle(bench, running, upstream, batch)
                notes.append(await _note(running, upstream, notes[-1].cycles + done["done"]))
                failures += done["failures"]
    except* EXPECTED as failed:
        failures.append(first_of(failed))
    return Found(server.name, notes, time.monotonic() - began, failures)


async def _cycle(
    bench: Bench, running: servers.Running, upstream: Address, cycles: int
) -> Mapping[str, Any]:
    """Let so many come and go."""
    work = servers.Work(events=1, hold=HOLD, upstream=upstream.port)
    plan = {
        "host": running.at.host,
        "port": running.at.port,
        "streams": cycles,
        "at_once": AT_ONCE,
        "request": running.server.dialect.run(work).raw(running.at),
        "seconds": BATCH_CAP,
    }
    command = [sys.executable, "-m", "bench.clients.leaving", "cycles", json.dumps(plan)]
    return await answer_of(command, bench.cores.client)


async def _note(running: servers.Running, upstream: Address, cycles: int) -> Note:
    """Wait until the agents are gone, and a little more, and see what is left."""
    for _ in range(round(PATIENCE / PAUSE)):
        seen = await servers.counter(running)
        if seen["gone"] == seen["started"]:
            break
        await trio.sleep(PAUSE)
    await trio.sleep(QUIET)
    seen = await servers.counter(running)
    held = await trio.to_thread.run_sync(upstreams.ask, upstream.port)
    return Note(
        cycles=cycles,
        tasks=seen["tasks"],
        descriptors=descriptors(running.pid),
        mib=memory(running.pid).get("now"),
        living=seen["started"] - seen["gone"],
        upstream=held["open"],
    )


COLUMNS = (
    Column("server", "server"),
    Column("cycles", "cycles", 0),
    Column("rate", "cycles/s", 0),
    Column("tasks", "tasks"),
    Column("descriptors", "descriptors"),
    Column("living", "agents left", 0),
    Column("upstream", "upstreams left", 0),
    Column("begin_mib", "MiB before"),
    Column("end_mib", "MiB after"),
    Column("growth", "KiB per 1,000, 2nd half", 1),
)


def _rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    return [_row(done) for done in found]


def _row(done: Found) -> dict[str, Any]:
    row: dict[str, Any] = {column.key: None for column in COLUMNS} | {"server": done.server}
    if len(done.notes) < 2:
        return row
    begin, end = done.notes[0], done.notes[-1]
    return row | {
        "cycles": done.cycles,
        "rate": done.cycles / done.seconds,
        "tasks": _change(begin.tasks, end.tasks),
        "descriptors": _change(begin.descriptors, end.descriptors),
        "living": end.living,
        "upstream": end.upstream,
        "begin_mib": begin.mib,
        "end_mib": end.mib,
        "growth": done.growth,
    }


def _change(before: int | None, after: int | None) -> str | None:
    return None if before is None or after is None else f"{before} -> {after}"


def _line(done: Found) -> str:
    row = _row(done)
    failure = f"  {done.failures[0]}" if done.failures else ""
    growth = "-" if row["growth"] is None else f"{row['growth']:.1f}"
    return (
        f"{done.server:14} {done.cycles:>6,} cycles  tasks {row['tasks'] or '-'}  "
        f"descriptors {row['descriptors'] or '-'}  {growth} KiB per 1,000{failure}"
    )


def _notes(found: Sequence[Found]) -> Iterator[str]:
    yield "cycles/s are of the whole procedure, with half a second of quiet behind each batch"
    for done in found:
        if done.server != servers.OURS.name:
            for failure in done.failures[:1]:
                yield f"{done.server}: {failure}"


def _problems(found: Sequence[Found]) -> Iterator[str]:
    """What of ours is left that was not there before."""
    for done in found:
        if done.server != servers.OURS.name:
            continue
        for failure in done.failures:
            yield f"{done.server}: {failure}"
        if len(done.notes) < 2:
            continue
        begin, end = done.notes[0], done.notes[-1]
        for what, before, after in (
            ("tasks", begin.tasks, end.tasks),
            ("descriptors", begin.descriptors, end.descriptors),
            ("agents", 0, end.living),
            ("upstream connections", 0, end.upstream),
        ):
            if before is not None and after is not None and after > before:
                yield (
                    f"{done.server}: expected no more than {before} {what} after {done.cycles:,} "
                    f"cycles, got {after}"
                )


SCENARIO = Scenario(
    name="leak",
    summary="10,000 clients come and go: tasks, descriptors and memory that stay behind.",
    measure=measure,
    cap=CAP,
)
