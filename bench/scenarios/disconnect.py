"""Everybody leaves at once: when does the server see it, and what is left of it then?

Thousands of streams, each with an agent that holds a connection to an upstream, are left at the
same time. What is measured, and how, is told by `bench/clients/leaving.py`, definition by
definition. Here is what is measured of whom:

    N = 100      every server: FIN (behind 20 streams that do not count)
    N = 1,000    every server: FIN, RST, half-close
    N = 8,000    every server: FIN, and the three mixed by number; ours: RST and half-close too
    N = 9,000    ours: FIN
    stalled      every server, 40 readers each, all servers at the same time: what is asked is only
                 whether a reader that stops reading is dropped within 50 s, and that is waiting

The events of a stream are slow, so that a storm meets a server that is not busy: one per second,
and with more than 2,000 streams 2,000 per second in all. Streams open no faster than that, so that
their events are spread evenly, and no more than 100 of them wait for their first event. A server
that sees only by writing that nobody reads any more needs two events (the first is answered with a
reset, which the second meets), so up to 8 s with 8,000 streams; that is its way, and the figures
tell it. The bound is 20 s; for a half-close 10 s, since whoever serves a half-closed client does so
to the end. Stalled readers get 50 events per second each, and 50 s: ours drops a reader after 10 s,
but lets its run live for 30 s more, should the client come back.

One process of a server goes through all storms but the last, one after another. If agents of a
storm are still there 10 s after it, the next one gets a new process.

Knows: storms, and how their figures are shown and judged. Must never know how one is measured.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import trio

from bench import servers
from bench.clients.leaving import FIN, HALF, RST, STAGES, STALLED
from bench.measuring import Address, answer_of, cpu_clock, listening, raise_descriptors, shown
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table, Target

MOST_EVENTS = 2_000  # per second, of all streams
SLOWEST = 1.0  # seconds between two events of a stream, at least
MANY = 10**6  # events: more than a storm can wait for
STALLED_GAP = 0.02  # seconds between two events of a stalled stream
TOKEN_GAP = 0.01  # seconds between two tokens of the stream that stays
SETTLE, QUICK_SETTLE = 1.0, 0.3  # seconds between the last first event and the tokens
CALM = 0.5  # seconds of tokens before a storm
BOUNDS = {FIN: 20.0, RST: 20.0, HALF: 10.0, STALLED: 50.0}  # seconds until never
QUICK_BOUNDS = {FIN: 5.0, RST: 5.0, HALF: 3.0, STALLED: 5.0}
SPARE = 500  # descriptors for whatever is not a stream or its upstream
RECOVERY = 10.0  # seconds for what is left of a storm
PAUSE = 0.2  # seconds between two looks whether it is over
CAP = 900.0  # seconds for everything
DISTURBED = 0.1  # share of a storm that a server waited for its core

MIXED = (FIN, RST, HALF)
GOAL = 8_000  # streams, of which the targets speak
COMPARED = 1_000  # streams, with which all leave in every way
STALLED_STREAMS = 40
HEADS = {
    "entered": "finally entered",
    "gone": "agent gone",
    "closed": "socket closed",
    "upstream": "upstream closed",
}
PERCENTILES = ("p50", "p99", "max")


# What a server or a client that fails looks like from here.
EXPECTED = (OSError, RuntimeError, ValueError, subprocess.CalledProcessError)


def first_of(error: BaseException) -> str:
    """What went wrong, of a group its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or repr(error)


@attrs.frozen
class Storm:
    """So many streams, which leave in these ways."""

    streams: int
    ways: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.ways[0] if len(self.ways) == 1 else "mixed"

    @property
    def gap(self) -> float:
        """Seconds between two events of a stream."""
        if self.ways == (STALLED,):
            return STALLED_GAP
        return max(SLOWEST, self.streams / MOST_EVENTS)


WARM_UP = Storm(20, MIXED)
QUICK = (Storm(100, (FIN,)), Storm(100, (RST,)), Storm(100, MIXED))
EVERY = (
    Storm(100, (FIN,)),
    Storm(1_000, (FIN,)),
    Storm(1_000, (RST,)),
    Storm(1_000, (HALF,)),
    Storm(GOAL, (FIN,)),
    Storm(GOAL, MIXED),
)
OURS_TOO = (Storm(GOAL, (RST,)), Storm(GOAL, (HALF,)), Storm(9_000, (FIN,)))
STALLING = Storm(STALLED_STREAMS, (STALLED,))


@attrs.frozen
class Found:
    """What a storm came to; `answer` is the client's."""

    server: str
    storm: Storm
    answer: Mapping[str, Any] | None
    failure: str | None = None

    @property
    def what(self) -> str:
        return f"{self.server}, {self.storm.streams:,} streams, {self.storm.name}"

    @property
    def waited(self) -> float | None:
        """The share of the storm for which the server could have run, and did not."""
        if self.answer is None or self.storm == STALLING:
            return None
        waited, span = self.answer["waited_ms"], self.answer["last_end_ms"]
        return min(1.0, waited / span) if waited is not None and span else None

    @property
    def problems(self) -> Sequence[str]:
        """What keeps the figures from being those of all streams."""
        if self.answer is None:
            return [self.failure or "no answer"]
        found = list(self.answer["problems"])
        if self.answer["failed"]:
            found.append(f"{self.answer['failed']} streams never had an event")
        if self.answer["ended_early"]:
            found.append(f"{self.answer['ended_early']} streams ended before they were left")
        return found


async def measure(bench: Bench) -> Result:
    """Measure every server, and judge ours."""
    found: list[Found] = []
    command = [sys.executable, "-m", "bench.peers.upstream"]
    chosen = list(servers.chosen(bench, "disconnect"))
    async with listening(command, bench.cores.client) as upstream:
        for server in chosen:
            await _measure_one(bench, server, upstream, found)
    if not bench.quick:
        async with trio.open_nursery() as nursery:
            for server in chosen:
                nursery.start_soon(_stall, bench, server, found)
    return Result(
        tables=list(_tables(found)),
        targets=[] if bench.quick else list(_targets(found)),
        plots=list(_plots(found)),
        notes=list(_notes(found)),
        problems=list(_problems(found)),
        facts={"storms": [_facts(done) for done in found]},
    )


async def _measure_one(
    bench: Bench, server: servers.Server, upstream: Address, found: list[Found]
) -> None:
    """All storms of a server but the stalled one."""
    storms = QUICK if bench.quick else EVERY
    if server is servers.OURS and not bench.quick:
        storms += OURS_TOO
    left = [_fitting(storm) for storm in storms]
    while left:
        storm = left[0]
        try:
            async with servers.serving(bench, server) as running:
                await _client(bench, running, upstream, WARM_UP)
                while left:
                    storm = left.pop(0)
                    found.append(await _client(bench, running, upstream, storm))
                    bench.progress(_line(found[-1]))
                    if not await _is_over(running):
                        break
        except* EXPECTED as failed:
            found.append(Found(server.name, storm, None, first_of(failed)))
            bench.progress(_line(found[-1]))
            left = [other for other in left if other != storm]


async def _stall(bench: Bench, server: servers.Server, found: list[Found]) -> None:
    command = [sys.executable, "-m", "bench.peers.upstream"]
    try:
        async with (
            listening(command, bench.cores.client) as upstream,
            servers.serving(bench, server) as running,
        ):
            found.append(await _client(bench, running, upstream, STALLING))
    except* EXPECTED as failed:
        found.append(Found(server.name, STALLING, None, first_of(failed)))
    bench.progress(_line(next(done for done in reversed(found) if done.server == server.name)))


async def _client(bench: Bench, running: servers.Running, upstream: Address, storm: Storm) -> Found:
    """Run a storm."""
    dialect, at = running.server.dialect, running.at
    key = f"{storm.name}-KEY"
    work = servers.Work(events=MANY, gap=storm.gap, key=key, upstream=upstream.port)
    probe = servers.Work(events=MANY, gap=TOKEN_GAP, stamp=True)
    counter, path = dialect.counter(times=True)
    is_brief = bench.quick or storm in {STALLING, WARM_UP}
    plan = {
        "host": at.host,
        "port": at.port,
        "pid": at.pid,
        "clock": cpu_clock(at.pid),
        "streams": storm.streams,
        "request": dialect.run(work).raw(at),
        "key": key,
        "ways": storm.ways,
        "pace": MOST_EVENTS if is_brief else storm.streams / storm.gap,
        "settle": QUICK_SETTLE if is_brief else SETTLE,
        "bounds": QUICK_BOUNDS if bench.quick else BOUNDS,
        "counter": {
            "method": counter.method,
            "target": counter.target,
            "body": counter.body,
            "path": path,
        },
        "upstream": upstream.port,
        "probe": None if storm in {STALLING, WARM_UP} else dialect.run(probe).raw(at),
        "gap": TOKEN_GAP,
        "calm": QUICK_SETTLE if is_brief else CALM,
    }
    command = [sys.executable, "-m", "bench.clients.leaving", "storm", json.dumps(plan)]
    try:
        return Found(running.name, storm, await answer_of(command, bench.cores.client))
    except subprocess.CalledProcessError as error:
        return Found(running.name, storm, None, f"the client failed, status {error.returncode}")


async def _is_over(running: servers.Running) -> bool:
    """Wait until no agent is left; tell whether that came to be."""
    for _ in range(round(RECOVERY / PAUSE)):
        try:
            seen = await servers.counter(running)
        except (OSError, RuntimeError, ValueError):
            return False
        if seen["gone"] == seen["started"]:
            return True
        await trio.sleep(PAUSE)
    return False


def _fitting(storm: Storm) -> Storm:
    """As many streams as there may be descriptors, each with its upstream."""
    return attrs.evolve(storm, streams=min(storm.streams, _most_streams()))


def _most_streams() -> int:
    return (raise_descriptors() - SPARE) // 2


# What is shown


def _line(done: Found) -> str:
    begin = f"{done.server:14} {done.storm.streams:>5,} {done.storm.name:10}"
    if done.answer is None:
        return f"{begin} {done.failure}"
    row = done.answer["all"]
    text = "  ".join(f"{HEADS[stage]} {_cell(row, stage)}" for stage in ("entered", "gone"))
    stall = done.answer["stall"] and done.answer["stall"]["ms"]
    return (
        f"{begin} {text}  never {_never(row)}  stall {shown(stall, 0)} ms  "
        f"CPU {shown(done.answer['cpu_seconds'], 2)} s"
    )


def _figures(row: Mapping[str, Any], stage: str) -> list[str]:
    """p50, p99 and max; `never` where so many did not come."""
    if (figures := row[stage]) is None:
        return ["-"]
    return [
        "never" if figures[name] is None and figures["never"] else shown(figures[name], 0)
        for name in PERCENTILES
    ]


def _cell(row: Mapping[str, Any], stage: str) -> str:
    if row["serves_on"]:
        return "serves on" if row["serves_on"] == row["streams"] else "in part serves on"
    cell = _figures(row, stage)
    return cell[0] if set(cell) <= {"never"} or set(cell) <= {"-"} else " / ".join(cell)


def _never(row: Mapping[str, Any]) -> str:
    """How many never came to each point; one figure if that is the same of all."""
    if row["serves_on"]:
        return "-"
    counts = [str(row[stage]["never"]) if row[stage] else "-" for stage in STAGES]
    known = set(counts) - {"-"}
    return known.pop() if len(known) == 1 else " / ".join(counts)


def _rows(done: Found) -> Iterator[dict[str, Any]]:
    """A row of all streams, and if they left in several ways one of each."""
    begin = {"server": done.server, "way": done.storm.name, "streams": done.storm.streams}
    answer = done.answer
    if answer is None:
        yield begin | dict.fromkeys(column.key for column in COLUMNS[3:])
        return
    yield begin | {
        **{stage: _cell(answer["all"], stage) for stage in STAGES},
        "streams": answer["left"],
        "never": _never(answer["all"]),
        "not_measured": answer["failed"] + answer["ended_early"],
        "stall_ms": answer["stall"] and answer["stall"]["ms"],
        "cpu_seconds": answer["cpu_seconds"],
        "waited": None if done.waited is None else done.waited * 100,
    }
    for way, row in answer["ways"].items() if len(answer["ways"]) > 1 else ():
        yield begin | {
            **dict.fromkeys(column.key for column in COLUMNS[3:]),
            **{stage: _cell(row, stage) for stage in STAGES},
            "way": f"  {way}",
            "streams": row["streams"],
            "never": _never(row),
        }


COLUMNS = (
    Column("server", "server"),
    Column("way", "way"),
    Column("streams", "left", 0),
    *(Column(stage, head) for stage, head in HEADS.items()),
    Column("never", "never", 0),
    Column("not_measured", "failed before", 0),
    Column("stall_ms", "stall ms", 0),
    Column("cpu_seconds", "CPU s", 2),
    Column("waited", "no core %", 0),
)


def _tables(found: Sequence[Found]) -> Iterator[Table]:
    """A table of each storm; ms, p50 / p99 / max."""
    kinds = sorted({done.storm for done in found}, key=_order)
    for storm in kinds:
        rows = [row for done in found if done.storm == storm for row in _rows(done)]
        what = f"{storm.streams:,} streams leave at once: {storm.name}; ms: p50 / p99 / max"
        yield Table(what, COLUMNS, rows)


def _order(storm: Storm) -> tuple[bool, int, int]:
    places = (FIN, RST, HALF, "mixed", STALLED)
    return storm.name == STALLED, storm.streams, places.index(storm.name)


def _plots(found: Sequence[Found]) -> Iterator[Plot]:
    """Bars of the storms that all take part in; lines of the largest of them that is FIN."""
    answered = [done for done in found if done.answer is not None]
    streams = min((done.storm.streams for done in answered), default=0)
    if any(done.storm.streams == COMPARED for done in answered):
        streams = COMPARED
    bars: dict[str, list[tuple[str, float]]] = {}
    for done in answered:
        row = done.answer["all"]
        p99 = row["gone"] and row["gone"]["p99"]
        if done.storm.streams == streams and p99 is not None and not row["serves_on"]:
            bars.setdefault(done.server, []).append((done.storm.name, p99))
    yield Plot(
        name="disconnect-ways",
        title=f"{streams:,} streams leave at once: 99 % of the agents are gone after",
        x="way of leaving",
        y="ms",
        series=bars,
        kind="bars",
        logarithmic=frozenset({"y"}),
    )
    fins = [done for done in answered if done.storm.name == FIN]
    streams = max((d.storm.streams for d in fins if d.storm.streams <= GOAL), default=0)
    yield Plot(
        name="disconnect-gone",
        title=f"{streams:,} streams leave at once, by FIN: agents that are gone",
        x="ms since the client left",
        y="share of the agents",
        series={
            done.server: [point for point in done.answer["lines"]["gone"] if point[0] > 0]
            for done in fins
            if done.storm.streams == streams
        },
        logarithmic=frozenset({"x"}),
    )


# What is judged


def _targets(found: Sequence[Found]) -> Iterator[Target]:
    """Of ours, at the goal, by FIN."""
    ours = [done for done in found if done.server == servers.OURS.name]
    answer = next(
        (d.answer for d in ours if d.storm == _fitting(Storm(GOAL, (FIN,)))),
        None,
    )
    row = answer["all"] if answer else dict.fromkeys(STAGES)
    what = f"{GOAL:,} streams, FIN, {servers.OURS.name}"
    for stage, floor, aim in (("entered", 2_000, 1_000), ("gone", 3_000, 2_000)):
        figures = row[stage]
        yield Target(f"{what}, {HEADS[stage]}, max", figures and figures["max"], floor, aim, " ms")
        yield Target(f"{what}, {HEADS[stage]}, never", figures and figures["never"], 0)
    stall = answer and answer["stall"] and answer["stall"]["ms"]
    yield Target(f"{what}, longest stall of the loop", stall, 500, 250, " ms")


def _problems(found: Sequence[Found]) -> Iterator[str]:
    """What was wrong with ours."""
    for done in found:
        if done.server != servers.OURS.name:
            continue
        for problem in done.problems:
            yield f"{done.what}: {problem}"
        row = done.answer["all"] if done.answer else dict.fromkeys(STAGES)
        for stage in STAGES:
            if row[stage] and (never := row[stage]["never"]):
                yield f"{done.what}: {never} times no {HEADS[stage]!r} within the bound"


def _notes(found: Sequence[Found]) -> Iterator[str]:
    """What to think of before believing a figure."""
    looks = [done.answer["look_ms"] for done in found if done.answer]
    if known := [look["max"] for look in looks if look["max"] is not None]:
        yield (
            f"a socket's closing is seen up to {max(known):.0f} ms late (the longest distance of "
            "two looks at the server's descriptors), and never early"
        )
    if _most_streams() < OURS_TOO[-1].streams:
        yield f"no more than {_most_streams():,} streams, for want of descriptors: see `ulimit -n`"
    for done in found:
        if done.server != servers.OURS.name:
            for problem in done.problems:
                yield f"{done.what}: {problem}"
        if done.answer and done.answer["all"]["closed"] is None:
            yield f"{done.what}: its descriptors could not be matched with streams"
    disturbed = [done.what for done in found if (done.waited or 0) > DISTURBED]
    if disturbed:
        yield (
            f"in {len(disturbed)} of {len(found)} storms the server waited for its core, which "
            f"somebody else had, for more than {DISTURBED:.0%} of the time (column 'no core %'): "
            "these figures are too high"
        )


def _facts(done: Found) -> dict[str, Any]:
    return {
        "server": done.server,
        "streams": done.storm.streams,
        "way": done.storm.name,
        "gap": done.storm.gap,
        "answer": done.answer,
        "failure": done.failure,
    }


SCENARIO = Scenario(
    name="disconnect",
    summary="All clients leave at once, in every way there is: when does the server see it?",
    measure=measure,
    cap=CAP,
)
