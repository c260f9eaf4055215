"""Rounds of bench/clients/batch.py, through several servers in turns.

Knows: how a round is asked for, whose processor time is whose, and what a round came to. Must never
know what the figures are for.
"""

import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any

import attrs
import trio

from .measuring import answer_of, cpu_seconds
from .scenario import Bench, Target
from .servers import OURS, Running, Work, chosen, serving

FULL = 0.9  # share of a core above which the client may be the bottleneck
SETTLING = 0.2  # seconds in which a server sees that the connections were closed


@attrs.frozen
class Size:
    """What is asked for at once.

    Attributes:
        streams: How many.
        events: Of each.
        opened: Whether the connections are there before.
        seconds: What it may take.
    """

    streams: int
    events: int
    opened: bool
    seconds: float


@attrs.frozen
class Round:
    """What one round of one server came to; seconds, and None for what could not be measured.

    Attributes:
        asked: Until all requests had been sent.
        first_ms: Until a stream's first byte: p50, p99, max.
        end_ms: Until its end.
    """

    streams: int
    seconds: float
    asked: float
    events: int
    bytes: int
    failed: int
    failures: Sequence[str]
    client_cpu: float
    server_cpu: float | None
    first_ms: Mapping[str, float] | None
    end_ms: Mapping[str, float] | None

    @property
    def client_share(self) -> float:
        """What share of a core the client took."""
        return self.client_cpu / self.seconds

    @property
    def event_rate(self) -> float:
        return self.events / self.seconds

    @property
    def stream_rate(self) -> float | None:
        """Streams per second; None where not all of them came."""
        return None if self.failed else self.streams / self.seconds


@attrs.define
class LineUp:
    """The servers that are measured; those that did not start, and why."""

    running: list[Running] = attrs.field(factory=list)
    absent: dict[str, str] = attrs.field(factory=dict)


@asynccontextmanager
async def side_by_side(bench: Bench, scenario: str) -> AsyncIterator[LineUp]:
    """Start all servers that take part. A peer that does not start is absent; ours has to."""
    line_up = LineUp()
    async with AsyncExitStack() as stack:
        for server in chosen(bench, scenario):
            try:
                line_up.running.append(await stack.enter_async_context(serving(bench, server)))
            except* (RuntimeError, OSError) as group:
                if server is OURS:
                    raise
                line_up.absent[server.name] = f"did not start: {group.exceptions[0]}"
        yield line_up


async def load(bench: Bench, running: Running, size: Size) -> Round:
    """Ask a server for so many streams at once, and read them."""
    request = running.server.dialect.run(Work(events=size.events)).raw(running.at)
    command = [
        sys.executable, "-m", "bench.clients.batch",
        "--host", running.at.host, "--port", str(running.at.port),
        "--request", request, "--end", running.server.end,
        "--streams", str(size.streams), "--events", str(size.events),
        "--seconds", str(size.seconds),
        *(["--opened"] if size.opened else []),
    ]  # fmt: skip
    before = cpu_seconds(running.pid)
    answer = await answer_of(command, bench.cores.client)
    await trio.sleep(SETTLING)
    after = cpu_seconds(running.pid)
    return Round(
        streams=size.streams,
        seconds=answer["seconds"],
        asked=answer["asked_seconds"],
        events=answer["events"],
        bytes=answer["bytes"],
        failed=answer["failed"],
        failures=answer["failures"],
        client_cpu=answer["client_cpu_seconds"],
        server_cpu=None if before is None or after is None else after - before,
        first_ms=answer["first_ms"],
        end_ms=answer["end_ms"],
    )


async def in_turns(
    bench: Bench,
    servers: Sequence[Running],
    size: Size,
    rounds: int,
    line: Callable[[Round], str],
) -> dict[str, list[Round]]:
    """Load each server, so many times; `line` is what is said of a round.

    One whose streams failed is not asked again: it would fail again, and take its time for it.
    """
    done: dict[str, list[Round]] = {running.name: [] for running in servers}
    for number in range(1, rounds + 1):
        for running in servers:
            if failure_of(done[running.name]):
                continue
            found = await load(bench, running, size)
            done[running.name].append(found)
            said = failure_of([found]) or line(found)
            bench.progress(
                f"{size.streams:,} streams  round {number}  {running.name:14} {said}  "
                f"client {found.client_share:4.0%} of a core"
            )
    return done


def failure_of(rounds: Sequence[Round]) -> str | None:
    """Say how many streams have failed, and why the first one did; None for none."""
    failed = sum(done.failed for done in rounds)
    why = next((done.failures[0] for done in rounds if done.failures), None)
    return why and f"{failed} of {sum(done.streams for done in rounds)}: {why}"


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def cpu_us(rounds: Sequence[Round], units: int) -> float | None:
    """Microseconds of the server's processor time per unit of work."""
    known = [done.server_cpu for done in rounds if done.server_cpu is not None]
    return sum(known) / units * 1e6 if len(known) == len(rounds) and units else None


def at_least(
    what: str,
    figures: Mapping[str, float | None],
    theirs: str,
    floor: float,
    aim: float | None = None,
) -> Target:
    """Ask for so many times a peer's figure."""
    ours, other = figures.get(OURS.name), figures.get(theirs)
    ratio = ours / other if ours is not None and other else None
    return Target(f"{what}, {OURS.name} / {theirs}", ratio, floor, aim, " x", is_ceiling=False)


def busy_client(rounds: Mapping[str, Sequence[Round]]) -> Iterable[str]:
    """Name the servers whose client may have been the bottleneck."""
    for name, done in rounds.items():
        if max(found.client_share for found in done) > FULL:
            yield f"the client was busy while {name} served: it may have been the bottleneck"


def facts_of(rounds: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    """Everything, for the JSON."""
    return {name: [attrs.asdict(found) for found in done] for name, done in rounds.items()}
