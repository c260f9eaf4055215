"""Streams as fast as possible, through agentsse and through aiohttp, in turns.

Knows: how to start servers and the client, whose processor time is whose, and how to compare. Must
never know what is inside a server: agentsse is measured from outside, over a socket, like its peer.

Each server has one process for all rounds, on one core; the client has the other core. Processes
are ended by the nursery that started them.
"""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import trio

from agentsse import agent, emit

from .measuring import (
    Address,
    Cores,
    answer_of,
    cpu_seconds,
    listening,
    machine,
    memory,
    serve_quietly,
    shown,
)

TEXT = "The quick brown fox jumps over the dog"  # as in the peers: about 180 bytes of data in all
STRIDE = 50  # events between two checkpoints of the agent
HARD_CAP = 120.0  # seconds for everything
LOAD_CAP = 30.0  # seconds for one round of one server
WARM_UP = (5, 50)  # streams, events: imports, code paths, the allocator
FULL = 0.9  # share of a core above which the client may be the bottleneck
SAME_SIZE = 0.1  # how far bytes per event may lie apart


@agent
async def ticks(_run, input):
    """Emit so many events, so many seconds apart."""
    gap = input.get("gap", 0)
    for n in range(1, input["events"] + 1):
        emit("tick", n=n, text=TEXT)
        if gap:
            await trio.sleep(gap)
        elif n % STRIDE == 0:
            await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()


def serve_ticks() -> None:
    """Serve `ticks` with default settings until SIGTERM; print the address as a JSON line."""
    serve_quietly(ticks)


@attrs.frozen
class Size:
    """How much is streamed."""

    streams: int
    events: int
    rounds: int


@attrs.frozen
class Subject:
    """A server to be measured, and how it is asked for events."""

    name: str
    command: tuple[str, ...]
    target: str
    body: str

    def order(self, events: int) -> tuple[str, str]:
        """The request's target and body."""
        return self.target.replace("EVENTS", str(events)), self.body.replace("EVENTS", str(events))


OURS = Subject(
    "agentsse", ("bench", "serve"), "/agents/ticks/runs", '{"input":{"events":EVENTS,"gap":0}}'
)
AIOHTTP = Subject("aiohttp", ("bench.peers.aiohttp_peer",), "/run?events=EVENTS&gap=0", "")


@attrs.frozen
class Round:
    """What one round of one server came to; seconds, bytes, and None where the system is mute."""

    seconds: float
    events: int
    bytes: int
    client_cpu: float
    server_cpu: float | None
    failures: Sequence[str]

    @property
    def rate(self) -> float:
        return self.events / self.seconds


@attrs.frozen
class Running:
    """A server that listens."""

    subject: Subject
    at: Address


def measure(size: Size, *, floor: float | None, file: Path | None) -> int:
    """Measure, print a table, and return the exit code: 1 for a failed stream or a low ratio."""
    try:
        rounds, held = trio.run(_measure, size)
    except trio.TooSlowError:
        print(f"FAILED: expected an end within {HARD_CAP:g} s in all")
        return 1
    results = {subject.name: _summary(rounds[subject], held[subject]) for subject in rounds}
    ours, theirs = results[OURS.name], results[AIOHTTP.name]
    ratio = ours["median_events_per_second"] / theirs["median_events_per_second"]
    cpu_ratio = None
    if ours["cpu_us_per_event"] and theirs["cpu_us_per_event"]:
        cpu_ratio = theirs["cpu_us_per_event"] / ours["cpu_us_per_event"]
    _print_table(results, ratio, cpu_ratio)
    problems = list(_problems(results, ratio, floor))
    for problem in problems:
        print(f"FAILED: {problem}")
    if file is not None:
        facts = {
            "what": "saturate",
            "machine": machine("aiohttp"),
            "size": attrs.asdict(size),
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "results": results,
            "failed": problems,
        }
        file.write_text(json.dumps(facts, indent=2) + "\n")
    return 1 if problems else 0


async def _measure(size: Size) -> tuple[dict[Subject, list[Round]], dict[Subject, Any]]:
    cores = Cores.choose()
    rounds: dict[Subject, list[Round]] = {OURS: [], AIOHTTP: []}
    with trio.fail_after(HARD_CAP):
        async with _serving(OURS, cores) as ours, _serving(AIOHTTP, cores) as theirs:
            for server in (ours, theirs):
                await _load(server, *WARM_UP, cores)
            for number in range(1, size.rounds + 1):
                for server in (ours, theirs):
                    done = await _load(server, size.streams, size.events, cores)
                    rounds[server.subject].append(done)
                    print(
                        f"round {number}  {server.subject.name:9} {done.rate:9,.0f} events/s  "
                        f"client {done.client_cpu / done.seconds:4.0%} of a core",
                        flush=True,
                    )
            held = {server.subject: memory(server.at.pid) for server in (ours, theirs)}
    return rounds, held


@asynccontextmanager
async def _serving(subject: Subject, cores: Cores) -> AsyncIterator[Running]:
    async with listening([sys.executable, "-m", *subject.command], cores.server) as address:
        yield Running(subject, address)


async def _load(server: Running, streams: int, events: int, cores: Cores) -> Round:
    target, body = server.subject.order(events)
    command = [
        sys.executable, "-m", "bench.load",
        "--host", server.at.host, "--port", str(server.at.port), "--target", target, "--body", body,
        "--streams", str(streams), "--events", str(events), "--seconds", str(LOAD_CAP),
    ]  # fmt: skip
    before = cpu_seconds(server.at.pid)
    answer = await answer_of(command, cores.client)
    after = cpu_seconds(server.at.pid)
    return Round(
        seconds=answer["seconds"],
        events=answer["events"],
        bytes=answer["bytes"],
        client_cpu=answer["client_cpu_seconds"],
        server_cpu=None if before is None or after is None else after - before,
        failures=[f"{answer['failed']} of {streams} streams: {f}" for f in answer["failures"][:1]],
    )


def _summary(rounds: Sequence[Round], held: dict[str, float]) -> dict[str, Any]:
    rates = [done.rate for done in rounds]
    events = sum(done.events for done in rounds)
    known = [done.server_cpu for done in rounds if done.server_cpu is not None]
    return {
        "median_events_per_second": median(rates),
        "best_events_per_second": max(rates),
        "server_cpu_seconds": median(known) if known else None,
        "cpu_us_per_event": sum(known) / events * 1e6 if known and events else None,
        "bytes_per_event": sum(done.bytes for done in rounds) / max(events, 1),
        "memory_mib": held,
        "client_share": max(done.client_cpu / done.seconds for done in rounds),
        "failures": [failure for done in rounds for failure in done.failures],
        "rounds": [attrs.asdict(done) for done in rounds],
    }


def _print_table(results: dict[str, Any], ratio: float, cpu_ratio: float | None) -> None:
    print(
        f"\n{'':10}{'median/s':>10}{'best/s':>10}{'CPU s':>8}{'us/event':>10}"
        f"{'B/event':>9}{'MiB':>7}{'peak':>7}"
    )
    for name, found in results.items():
        held = found["memory_mib"]
        print(
            f"{name:10}{found['median_events_per_second']:>10,.0f}"
            f"{found['best_events_per_second']:>10,.0f}"
            f"{shown(found['server_cpu_seconds'], 2):>8}{shown(found['cpu_us_per_event'], 2):>10}"
            f"{found['bytes_per_event']:>9.1f}"
            f"{shown(held.get('now'), 1):>7}{shown(held.get('peak'), 1):>7}"
        )
    by_cpu = "" if cpu_ratio is None else f", {cpu_ratio:.2f} by processor time"
    print(f"\nagentsse / aiohttp: {ratio:.2f}{by_cpu}")
    for name, found in results.items():
        if found["client_share"] > FULL:
            print(f"note: the client was busy while {name} served; it may have been the bottleneck")


def _problems(results: dict[str, Any], ratio: float, floor: float | None) -> list[str]:
    found = [f"{name}: {text}" for name, result in results.items() for text in result["failures"]]
    sizes = [result["bytes_per_event"] for result in results.values()]
    if max(sizes) > min(sizes) * (1 + SAME_SIZE):
        found.append(f"expected events of one size, got {sizes} bytes: the figures do not compare")
    if floor is not None and ratio < floor:
        found.append(f"expected a ratio of at least {floor:g}, got {ratio:.2f}")
    return found
