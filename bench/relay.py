"""Tokens of a model, relayed by agentsse, by aiohttp and by Node, in turns.

Knows: how the model API, the relays and the client are started, and how to compare. Must never know
what is inside a relay: agentsse is measured from outside, over a socket, like its peers.

Each relay has one process for all rounds, on one core; the model API and the client share the
other. Processes are ended by the nursery that started them.
"""

import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import trio

from agentsse import Agent

from .measuring import (
    CHECKOUT,
    Address,
    Cores,
    answer_of,
    cpu_clock,
    listening,
    machine,
    memory,
    serve_quietly,
    shown,
)

RATE = 40  # tokens per second and stream, as the model API sends them
HARD_CAP = 900.0  # seconds for everything
PATIENCE = 30.0  # seconds that a round may take beyond its own length
WARM_UP = (10, 1.0)  # streams, seconds; for code paths, the allocator, a just-in-time compiler
FULL = 0.9  # share of a core above which what runs there may be the bottleneck
CALM = 0.1  # share of the time for which others may have a relay's core in a round that counts
EXTRA = 3  # rounds more at most, for those in which others had it for longer, ...
EXTRA_UNTIL = 500.0  # ... and only up to so many seconds after the start
UNSTEADY = (
    "expected a part with all streams open, got none: the relay opens them too slowly, or the "
    "machine is busy; let streams last longer"
)

MOST_CPU = {50: 1.5, 100: 1.1}  # by window: processor time per token, in that of aiohttp
MOST_GROWTH = 1.15  # processor time per token with the most streams, in that with the fewest
MOST_LATE = 20.0  # milliseconds that 99 of 100 tokens may be late beyond the window


@attrs.frozen
class Size:
    """How much is relayed: so many streams at once, of so many seconds."""

    streams: tuple[int, ...]
    seconds: float
    rounds: int
    is_smoke: bool = False  # too short for figures that mean anything


@attrs.frozen(eq=False)
class Server:
    """A process to be started; `URL` in its command is that of the model API."""

    name: str
    command: tuple[str, ...]


@attrs.frozen(eq=False)
class Subject:
    """A way through a server: how it is asked, and where the text is in what it answers."""

    name: str
    server: Server
    target: str
    body: Mapping[str, Any]
    field: str
    end: str
    window: int | None = None  # milliseconds


UPSTREAM = Server("upstream", (sys.executable, "-m", "bench.peers.relay_upstream"))
AGENTSSE = Server("agentsse", (sys.executable, "-m", "bench", "serve-relay", "URL"))
AIOHTTP = Server("aiohttp", (sys.executable, "-m", "bench.peers.relay_aiohttp", "URL"))

DIRECT = Subject(
    "(direct)",
    UPSTREAM,
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": "tokens=TOKENS"}], "stream": True},
    field="content",
    end="data: [DONE]",
)
OURS = tuple(
    Subject(
        f"agentsse {window} ms",
        AGENTSSE,
        "/agents/relay/runs",
        {"input": "tokens=TOKENS"} | more,
        field="delta",
        end='"outcome":"success"',
        window=window,
    )
    for window, more in ((50, {}), (100, {"coalesce_ms": 100}))
)


def _peer(server: Server) -> Subject:
    body = {"input": "tokens=TOKENS"}
    return Subject(server.name, server, "/run", body, field="delta", end='{"type":"end"}')


THEIRS = _peer(AIOHTTP)
NODE = _peer(
    Server("node", ("node", str(CHECKOUT / "bench" / "peers" / "relay_node.mjs"), "URL")),
)


@attrs.frozen
class Running:
    """Where every server is, and how the processes share the machine."""

    at: Mapping[Server, Address]
    cores: Cores


Rounds = dict[int, dict[Subject, list[dict[str, Any]]]]  # by the number of streams
Results = dict[int, dict[Subject, dict[str, Any]]]


def serve_relay(url: str) -> None:
    """Serve an agent that relays what the model API at `url` says."""
    # Late: what no other measured server needs shall not weigh on it.
    from agentsse.providers import HttpProvider  # noqa: PLC0415
    from agentsse.providers.openai_chat import OpenAIChatApi  # noqa: PLC0415

    os.environ["no_proxy"] = "*"  # everything is on loopback
    provider = HttpProvider("up", OpenAIChatApi(base_url=url))
    serve_quietly(Agent.of_model("relay", "up:m", provider=provider))


def measure(size: Size, *, check: bool, file: Path | None) -> int:
    """Measure, print a table, and return the exit code: 1 for a failed stream or a missed target.

    Args:
        size: How much.
        check: Whether a missed target counts.
        file: Where to write all figures.
    """
    try:
        rounds = trio.run(_measure, size)
    except trio.TooSlowError:
        print(f"FAILED: expected an end within {HARD_CAP:g} s in all")
        return 1
    results: Results = {
        streams: {subject: _summary(done) for subject, done in by_subject.items()}
        for streams, by_subject in rounds.items()
    }
    _print_table(results)
    problems = list(_problems(results, size))
    targets: list[Target] = []
    if not (problems or size.is_smoke):
        for note in _notes(results, size):
            print(f"note: {note}")
        targets = list(_targets(results))
        print("", *targets, sep="\n")
    if check:
        problems += [str(target) for target in targets if not target.is_met]
    for problem in problems:
        print(f"FAILED: {problem}")
    if file is not None:
        facts = {
            "what": "relay",
            "machine": machine("httpcore2", "aiohttp"),
            "size": attrs.asdict(size),
            "targets": [attrs.asdict(target) | {"met": target.is_met} for target in targets],
            "results": {
                streams: {subject.name: result for subject, result in by_subject.items()}
                for streams, by_subject in results.items()
            },
            "failed": problems,
        }
        file.write_text(json.dumps(facts, indent=2) + "\n")
    return 1 if problems else 0


async def _measure(size: Size) -> Rounds:
    rounds: Rounds = {}
    started = trio.current_time()
    with trio.fail_after(HARD_CAP):
        async with _running() as running:
            subjects = [
                subject for subject in (*OURS, THEIRS, NODE) if subject.server in running.at
            ]
            for subject in () if size.is_smoke else subjects:
                await _relay(running, subject, *WARM_UP)
            for streams in size.streams:
                found = rounds[streams] = {subject: [] for subject in (DIRECT, *subjects)}
                # Nothing lies between client and model API: what is late then is their own.
                turns = [DIRECT, *subjects]
                for number in range(1, size.rounds + (0 if size.is_smoke else EXTRA) + 1):
                    for subject in turns:
                        done = await _relay(running, subject, streams, size.seconds)
                        found[subject].append(done)
                        print(_line(streams, number, subject, done), flush=True)
                    turns = [s for s in subjects if len(_calm(found[s])) < size.rounds]
                    if number >= size.rounds and trio.current_time() > started + EXTRA_UNTIL:
                        break
    return rounds


@asynccontextmanager
async def _running() -> AsyncIterator[Running]:
    """Start the model API and the relays; leaving the context ends them."""
    cores = Cores.choose()
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(listening(UPSTREAM.command, cores.client))
        url = f"http://{upstream.host}:{upstream.port}/v1"
        at = {UPSTREAM: upstream}
        for server in (AGENTSSE, AIOHTTP, NODE.server):
            if shutil.which(server.command[0]) is None:
                print(f"note: no {server.command[0]!r} on this machine: {server.name} is left out")
                continue
            command = [url if word == "URL" else word for word in server.command]
            at[server] = await stack.enter_async_context(listening(command, cores.server))
        yield Running(at, cores)


async def _relay(
    running: Running, subject: Subject, streams: int, seconds: float
) -> dict[str, Any]:
    """One round of one relay; what the client found, and the memory that the server then has."""
    server, upstream = running.at[subject.server], running.at[UPSTREAM]
    tokens = round(seconds * RATE)
    clocks = {"server": cpu_clock(server.pid), "upstream": cpu_clock(upstream.pid)}
    command = [
        sys.executable, "-m", "bench.peers.relay_client",
        "--host", server.host, "--port", str(server.port), "--target", subject.target,
        "--body", json.dumps(subject.body).replace("TOKENS", str(tokens)),
        "--field", subject.field, "--end", subject.end,
        "--streams", str(streams), "--tokens", str(tokens), "--rate", str(RATE),
        "--seconds", str(seconds + PATIENCE),
        "--clocks", json.dumps({name: clock for name, clock in clocks.items() if clock}),
        "--schedstat", f"/proc/{server.pid}/schedstat",
    ]  # fmt: skip
    answer = await answer_of(command, running.cores.client)
    return answer | {"memory_mib": memory(server.pid)}


def _is_calm(steady: dict[str, Any]) -> bool:
    """Whether a relay had its core for itself."""
    return steady["waited_seconds"] <= steady["seconds"] * CALM


def _calm(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steady parts of the rounds in which a relay had its core for itself."""
    return [done["steady"] for done in rounds if done["steady"] and _is_calm(done["steady"])]


def _us_per_token(steady: dict[str, Any], process: str) -> float | None:
    cpu = steady["cpu_seconds"].get(process)
    return None if cpu is None else cpu / steady["tokens"] * 1e6


def _median_us(steadies: Sequence[dict[str, Any]], process: str) -> float | None:
    known = [us for steady in steadies if (us := _us_per_token(steady, process)) is not None]
    return median(known) if known else None


def _share(steady: dict[str, Any], *processes: str) -> float:
    """What share of a core some processes took."""
    return sum(steady["cpu_seconds"].get(name, 0.0) for name in processes) / steady["seconds"]


def _line(streams: int, number: int, subject: Subject, done: dict[str, Any]) -> str:
    begin = f"{streams} streams  round {number}  {subject.name:15}"
    if done["failed"]:
        return f"{begin} {done['failed']} streams failed: {done['failures'][0]}"
    if (steady := done["steady"]) is None:
        return f"{begin} {UNSTEADY}"
    late = steady["late_ms"]
    waited = steady["waited_seconds"] / steady["seconds"]
    return (
        f"{begin}{shown(_us_per_token(steady, 'server'), 1):>7} us/token  "
        f"late p50{late['p50']:6.1f} p99{late['p99']:6.1f} max{late['max']:6.1f} ms  "
        f"core{_share(steady, 'server'):5.0%}, others' {waited:4.0%}  "
        f"beside it{_share(steady, 'client', 'upstream'):5.0%}"
        f"{'' if _is_calm(steady) else '  (disturbed)'}"
    )


def _summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a relay: of its calm rounds, where there is one, else of all."""
    calm = _calm(rounds)
    used = calm or [done["steady"] for done in rounds if done["steady"]]
    summary: dict[str, Any] = {
        "failures": [failure for done in rounds for failure in done["failures"][:1]],
        "memory_mib": rounds[-1]["memory_mib"],
        "upstream_slip_ms": max(done["upstream_slip_ms"] for done in rounds),
        "calm": len(calm),
        "steady": None,
        "rounds": rounds,
    }
    if used:
        late = {name: [steady["late_ms"][name] for steady in used] for name in ("p50", "p99")}
        summary["steady"] = {
            "cpu_us_per_token": _median_us(used, "server"),
            "late_ms": {name: median(values) for name, values in late.items()}
            | {"max": max(steady["late_ms"]["max"] for steady in used)},
            "upstream_us_per_token": _median_us(used, "upstream"),
            "client_us_per_token": _median_us(used, "client"),
            "server_share": max(_share(steady, "server") for steady in used),
            "client_share": max(_share(steady, "client", "upstream") for steady in used),
        }
    return summary


def _print_table(results: Results) -> None:
    print(
        f"\n{'streams':>7}  {'relay':15}{'us/token':>9}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}"
        f"{'MiB':>7}{'peak':>7}   beside it, us/token: upstream, client"
    )
    for streams, by_subject in results.items():
        for subject, found in by_subject.items():
            if (steady := found["steady"]) is None:
                continue
            late, held = steady["late_ms"], found["memory_mib"]
            is_relay = subject is not DIRECT
            print(
                f"{streams:>7}  {subject.name:15}"
                f"{shown(steady['cpu_us_per_token'] if is_relay else None, 1):>9}"
                f"{late['p50']:>8.1f}{late['p99']:>8.1f}{late['max']:>8.1f}"
                f"{shown(held.get('now') if is_relay else None, 1):>7}"
                f"{shown(held.get('peak') if is_relay else None, 1):>7}"
                f"{shown(steady['upstream_us_per_token'], 1):>25}"
                f"{shown(steady['client_us_per_token'], 1):>8}"
            )


def _problems(results: Results, size: Size) -> Iterator[str]:
    for streams, by_subject in results.items():
        for subject, found in by_subject.items():
            for failure in found["failures"]:
                yield f"{streams} streams, {subject.name}: {failure}"
            if not (found["steady"] or found["failures"] or size.is_smoke):
                yield f"{streams} streams, {subject.name}: {UNSTEADY}"


def _notes(results: Results, size: Size) -> Iterator[str]:
    """What to think of before believing a figure."""
    for streams, by_subject in results.items():
        for subject, found in by_subject.items():
            where, steady = f"{streams} streams, {subject.name}", found["steady"]
            if steady is None or subject is DIRECT:
                continue
            unsteady = sum(done["steady"] is None for done in found["rounds"])
            if unsteady:
                yield f"{where}: no figures of {unsteady} rounds, where not all streams got going"
            if found["calm"] < size.rounds:
                yield (
                    f"{where}: in only {found['calm']} rounds the relay had its core for itself; "
                    "who waits finds more at once, and looks cheaper where every token is a write"
                )
            if steady["server_share"] > FULL:
                yield f"{where}: the relay's core was full; it could not do more"
            if steady["client_share"] > FULL:
                yield f"{where}: the core beside it was full; some of what is late waited there"


@attrs.frozen
class Target:
    """A figure that must not be above another."""

    what: str
    value: float
    most: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        return self.value <= self.most

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        return (
            f"{self.what}: {self.value:.2f}{self.unit}, at most {self.most:g}{self.unit}: {verdict}"
        )


def _targets(results: Results) -> Iterator[Target]:
    cpu = {
        (streams, subject): found["steady"]["cpu_us_per_token"]
        for streams, by_subject in results.items()
        for subject, found in by_subject.items()
    }
    for streams in results:
        for ours in OURS:
            what = f"{streams} streams, {ours.name} / aiohttp, CPU per token"
            if (theirs := cpu[streams, THEIRS]) and (value := cpu[streams, ours]):
                yield Target(what, value / theirs, MOST_CPU[ours.window])
    fewest, most = min(results), max(results)
    for ours in OURS if fewest < most else ():
        what = f"{ours.name}, CPU per token, {most} streams / {fewest}"
        if (few := cpu[fewest, ours]) and (many := cpu[most, ours]):
            yield Target(what, many / few, MOST_GROWTH)
    for streams, found in results.items():
        for ours in OURS:
            what = f"{streams} streams, {ours.name}, p99 late"
            late = found[ours]["steady"]["late_ms"]["p99"]
            yield Target(what, late, ours.window + MOST_LATE, " ms")
