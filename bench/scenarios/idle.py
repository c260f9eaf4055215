"""Silent streams: what it costs to hold them.

Knows: how many are held and for how long, and what of the server, the kernel and the streams is
looked at meanwhile. Must never know what is inside a server.

Each size has a process of its own. It has served a handful of streams before anything is read, so
that what is imported late is not counted; nothing else has warmed it up, and nothing was freed
before that the streams could use. A stream has one event, then silence. Memory is read when all
have been silent for a second, and is what the process holds more than before the first of them.
"""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import trio

from bench.holding import WINDOW, holding, room
from bench.measuring import cpu_seconds, kernel_socket_memory, memory
from bench.rounds import Size, load
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table, Target
from bench.servers import OURS, Running, Server, Work, chosen, counter, serving

STREAMS, FEW = (1_000, 5_000, 9_000), (200,)
HANDFUL = Size(streams=5, events=1, opened=False, seconds=10)  # served before
SETTLING = 1.0  # seconds of silence before memory is read
PAUSE = 0.2  # seconds after which a server is done with the question about its tasks
HOLD, LONG_HOLD, SMOKE_HOLD = 4.0, 12.0, 1.0  # seconds in which processor time is read
WATCHED_LONG = frozenset({OURS.name, "sse-starlette"})  # they say something while nothing happens
AGES = 600  # seconds that a stream would stay silent; nobody waits for it
PATIENCE = 90.0  # seconds for opening all
WORK = Work(events=1, hold=AGES)
# What there is in the kernel for each connection and each end of it, by its name in /proc/slabinfo.
KERNEL = frozenset({"TCP", "sock_inode_cache", "filp", "eventpoll_epi"})

JUDGED = 5_000  # streams
MOST_KIB, AIM_KIB = 30.0, 20.0
MOST_TASKS, AIM_TASKS = 4.0, 2.0

COLUMNS = (
    Column("server", ""),
    Column("streams", "streams", 0),
    Column("opened", "opened s", 2),
    Column("rss", "RSS KiB/stream"),
    Column("total", "MiB"),
    Column("kernel", "kernel KiB/stream"),
    Column("tasks", "tasks/stream", 2),
    Column("beats", "beats/stream", 2),
    Column("bytes", "B/stream"),
    Column("held", "held s"),
    Column("cpu", "CPU ms/s", 2),
    Column("failed", "failed"),
)


@attrs.frozen
class Look:
    """What is seen of a server at one time; MiB.

    Attributes:
        objects: What the kernel holds for connections and files, on the whole machine.
        buffers: What it holds of what was sent and not read, on the whole machine.
    """

    rss: float | None
    objects: float | None
    buffers: float | None
    tasks: int | None

    @classmethod
    async def at(cls, running: Running) -> "Look":
        # Asked first: the answer may leave something behind, and that is not the streams'.
        tasks = (await counter(running))["tasks"]
        return cls(memory(running.pid).get("now"), kernel_objects(), kernel_socket_memory(), tasks)

    @property
    def kernel(self) -> float | None:
        if self.objects is None or self.buffers is None:
            return None
        return self.objects + self.buffers


def kernel_objects() -> float | None:
    """MiB; None where the system does not tell, which it tells nobody but root."""
    try:
        lines = Path("/proc/slabinfo").read_text().splitlines()
    except OSError:
        return None
    kinds = [line.split() for line in lines[2:]]  # behind its version and its heads
    used = sum(int(kind[1]) * int(kind[3]) for kind in kinds if kind[0] in KERNEL)
    return used / 2**20


async def measure(bench: Bench) -> Result:
    sizes = FEW if bench.quick else STREAMS
    fitting = tuple(sorted({min(streams, room()) for streams in sizes}))
    rows: list[dict[str, Any]] = []
    for server in chosen(bench, "idle"):
        for streams in fitting:
            row = await _measure_one(bench, server, streams)
            bench.progress(_line(row))
            rows.append(row)
    return Result(
        tables=[Table("silent streams", COLUMNS, rows)],
        targets=[] if bench.quick else list(_targets(rows)),
        plots=list(_plots(rows)),
        notes=list(_notes(sizes, fitting)),
        problems=[
            f"{OURS.name}, {row['streams']:,} streams: {row['failed']}"
            for row in rows
            if row["server"] == OURS.name and row["failed"] != "none"
        ],
        facts={"rows": rows},
    )


async def _measure_one(bench: Bench, server: Server, streams: int) -> dict[str, Any]:
    """Measure one server with so many streams; a peer that fails has a row that says so."""
    row = {column.key: None for column in COLUMNS} | {"server": server.name, "streams": streams}
    hold = SMOKE_HOLD if bench.quick else _hold(server, streams)
    try:
        async with AsyncExitStack() as stack:
            running = await stack.enter_async_context(serving(bench, server))
            stack.callback(os.kill, running.pid, signal.SIGKILL)  # nothing here ends by itself
            row |= await _hold_streams(bench, running, streams, hold)
    except* (RuntimeError, OSError) as group:
        row |= {"failed": f"gave up: {group.exceptions[0]}"}
    return row


async def _hold_streams(
    bench: Bench, running: Running, streams: int, hold: float
) -> dict[str, Any]:
    request = running.server.dialect.run(WORK)
    await load(bench, running, HANDFUL)
    async with holding(bench, running, [request], streams=streams, seconds=PATIENCE) as client:
        before = await Look.at(running)
        opened = await client.do("open", window=WINDOW)
        await trio.sleep(SETTLING)
        silent = await Look.at(running)
        await trio.sleep(PAUSE)
        count, cpu = await client.do("count"), cpu_seconds(running.pid)
        began = trio.current_time()
        await trio.sleep(hold)
        later, cpu_later = await client.do("count"), cpu_seconds(running.pid)
        held = trio.current_time() - began
    if lost := streams - later["open"]:
        return {"failed": f"{lost} of {streams}: {'; '.join(opened['failures']) or 'ended'}"}
    return {
        "opened": opened["seconds"],
        "rss": _each(silent.rss, before.rss, streams / 1024),
        "total": silent.rss,
        "kernel": _each(silent.kernel, before.kernel, 2 * streams / 1024),  # both ends are here
        "tasks": _each(silent.tasks, before.tasks, streams),
        "beats": (later["comments"] - count["comments"]) / streams,
        "bytes": (later["bytes"] - count["bytes"]) / streams,
        "held": held,
        "cpu": _each(cpu_later, cpu, held / 1e3),
        "failed": "none",
        "before": attrs.asdict(before),
        "silent": attrs.asdict(silent),
    }


def _hold(server: Server, streams: int) -> float:
    """Say for how long to look: at the most streams long enough to see what they say meanwhile."""
    return LONG_HOLD if server.name in WATCHED_LONG and streams == max(STREAMS) else HOLD


def _each(after: float | None, before: float | None, parts: float) -> float | None:
    return None if after is None or before is None else (after - before) / parts


def _line(row: Mapping[str, Any]) -> str:
    begin = f"{row['streams']:,} streams  {row['server']:14}"
    if row["failed"] != "none":
        return f"{begin} {row['failed']}"
    kib = "-" if row["rss"] is None else f"{row['rss']:.1f}"
    return f"{begin} {kib:>7} KiB/stream  opened in {row['opened']:.1f} s"


def _targets(rows: Sequence[Mapping[str, Any]]) -> Iterator[Target]:
    ours = [row for row in rows if row["server"] == OURS.name and row["streams"] == JUDGED]
    for row in ours:
        what = f"{JUDGED:,} silent streams, each"
        yield Target(f"{what}: memory", row["rss"], MOST_KIB, AIM_KIB, " KiB")
        yield Target(f"{what}: tasks", row["tasks"], MOST_TASKS, AIM_TASKS)


def _plots(rows: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    series: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        if row["rss"] is not None:
            series.setdefault(row["server"], []).append((row["streams"], row["rss"]))
    yield Plot(
        "idle",
        "memory that a silent stream takes",
        "streams",
        "KiB of the server's process per stream",
        series,
        limit=(MOST_KIB, "the target"),
    )


def _notes(sizes: Sequence[int], fitting: Sequence[int]) -> Iterator[str]:
    if max(fitting) < max(sizes):
        yield (
            f"expected room for {max(sizes):,} streams, got {room():,}: raise the limit of open "
            "files (ulimit -n)"
        )
    yield (
        f"kernel: what {', '.join(sorted(KERNEL))} (/proc/slabinfo, which only root may read) and "
        "TCP's buffers (/proc/net/sockstat) have grown by, on the whole machine, halved: both ends "
        "of each connection are here"
    )
    yield (
        "beats: comments that a stream got while it was held, and bytes all that it got; whoever "
        "sends one every 10 or 15 s may have sent none meanwhile, which is cheap, or all of them"
    )


SCENARIO = Scenario(
    name="idle",
    summary="1,000, 5,000 and 9,000 silent streams: memory, tasks, heartbeats and core of each.",
    measure=measure,
    cap=600,
)
