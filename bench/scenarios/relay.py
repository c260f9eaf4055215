"""Tokens of a model, relayed by agentsse, by aiohttp and by Node, in turns.

Knows: how the model API, the relays and the client are started, and how to compare. Must never know
what is inside a relay: agentsse is measured from outside, over a socket, like its peers.

Each relay has one process for all rounds, on one core; the model API and the client share the
other. Processes are ended by the nursery that started them.
"""

import json
import shutil
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from statistics import median
from typing import Any

import attrs
import trio

from bench.measuring import CHECKOUT, Address, Cores, listening, shown
from bench.pacing import (
    AT_ITS_END,
    BUSY_BESIDE,
    DISTURBED,
    FULL,
    UNSTEADY,
    Found,
    Load,
    Row,
    Steady,
    attempt,
    doubts,
    paced,
)
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table, Target
from bench.servers import QUICK

RATE = 40  # tokens per second and stream, as the model API sends them
CAP = 900.0  # seconds for everything
PATIENCE = 30.0  # seconds that a round may take beyond its own length
OPENING = 0.01  # seconds between two streams that open: how fast it can be is not asked here
SETTLING = 1 / 8  # of a stream, from the first token of the last one on; then all is steady
WARM_UP = (10, 1.0)  # streams, seconds; for code paths, the allocator, a just-in-time compiler
EXTRA = 3  # rounds more at most, for those in which others had the core, ...
EXTRA_UNTIL = 500.0  # ... and only up to so many seconds after the start

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


FULL_SIZE = Size((150, 400), 10.0, 3)
QUICK_SIZE = Size((20,), 1.5, 1, is_smoke=True)


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

    def request(self, at: Address, tokens: int) -> str:
        """Ask for so many tokens."""
        body = json.dumps(self.body).replace("TOKENS", str(tokens))
        return (
            f"POST {self.target} HTTP/1.1\r\nHost: {at.host}:{at.port}\r\n"
            "Accept: text/event-stream\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )


UPSTREAM = Server("upstream", (sys.executable, "-m", "bench.peers.relay_upstream"))
AGENTSSE = Server("agentsse", (sys.executable, "-m", "bench.peers.relay_ours", "URL"))
AIOHTTP = Server("aiohttp", (sys.executable, "-m", "bench.peers.relay_aiohttp", "URL"))
NODE = Server("node", ("node", str(CHECKOUT / "bench" / "peers" / "relay_node.mjs"), "URL"))
RELAYS = (AGENTSSE, AIOHTTP, NODE)

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
THEIRS = tuple(
    Subject(
        server.name,
        server,
        "/run",
        {"input": "tokens=TOKENS"},
        field="delta",
        end='{"type":"end"}',
    )
    for server in (AIOHTTP, NODE)
)
RELAYED = (*OURS, *THEIRS)


@attrs.frozen
class Running:
    """Where every server is, and how the processes share the machine."""

    at: Mapping[Server, Address]
    cores: Cores


Rounds = dict[int, dict[Subject, list[Found]]]  # by the number of streams


async def measure(bench: Bench) -> Result:
    """Relay tokens through everyone, in turns."""
    size = QUICK_SIZE if bench.quick else FULL_SIZE
    rounds = await _rounds(bench, size)
    rows = [
        _summary(subject, streams, done)
        for streams, by_subject in rounds.items()
        for subject, done in by_subject.items()
    ]
    return Result(
        tables=[Table("Tokens of a model, relayed", COLUMNS, rows)],
        targets=[] if size.is_smoke else list(_targets(rows, size)),
        plots=[_plot(rows)],
        notes=[] if size.is_smoke else list(_notes(rows, size)),
        problems=list(_problems(rows)),
        facts={"size": attrs.asdict(size), "rows": rows},
    )


async def _rounds(bench: Bench, size: Size) -> Rounds:
    rounds: Rounds = {}
    started = trio.current_time()
    async with _running(bench) as running:
        subjects = [subject for subject in RELAYED if subject.server in running.at]
        for subject in () if size.is_smoke else subjects:
            await _relay(running, subject, *WARM_UP)
        for streams in size.streams:
            # Nothing lies between client and model API: what is late then is their own.
            turns = [*(() if size.is_smoke else (DIRECT,)), *subjects]
            found = rounds[streams] = {subject: [] for subject in turns}
            for number in range(1, size.rounds + (0 if size.is_smoke else EXTRA) + 1):
                for subject in turns:
                    done = await _relay(running, subject, streams, size.seconds)
                    found[subject].append(done)
                    bench.progress(_line(streams, number, subject, done))
                turns = [s for s in subjects if len(_calm(found[s])) < size.rounds]
                if number >= size.rounds and trio.current_time() > started + EXTRA_UNTIL:
                    break
    return rounds


def _chosen(bench: Bench) -> Iterator[Server]:
    """The relays that take part; who does not, and why, goes to the progress."""
    wanted = bench.only or (QUICK if bench.quick else [server.name for server in RELAYS])
    for server in RELAYS:
        if server.name not in wanted:
            continue
        if shutil.which(server.command[0]) is None:
            bench.progress(f"{server.name} is left out: no {server.command[0]!r} on this machine")
        else:
            yield server


@asynccontextmanager
async def _running(bench: Bench) -> AsyncIterator[Running]:
    """Start the model API and the relays; leaving the context ends them."""
    async with AsyncExitStack() as stack:
        start = stack.enter_async_context
        upstream = await start(listening(UPSTREAM.command, bench.cores.client))
        url = f"http://{upstream.host}:{upstream.port}/v1"
        at = {UPSTREAM: upstream}
        for server in _chosen(bench):
            command = [url if word == "URL" else word for word in server.command]
            began = await attempt(partial(start, listening(command, bench.cores.server)))
            if isinstance(began, Address):
                at[server] = began
            elif server is AGENTSSE:
                raise RuntimeError(began)
            else:
                bench.progress(f"{server.name} is left out: {began}")
        yield Running(at, bench.cores)


async def _relay(running: Running, subject: Subject, streams: int, seconds: float) -> Found:
    """One round of one relay."""
    server, tokens = running.at[subject.server], round(seconds * RATE)
    load = Load(
        request=subject.request(server, tokens),
        field=subject.field,
        end=subject.end,
        streams=streams,
        sample=streams,
        tokens=tokens,
        rate=RATE,
        opening=OPENING,
        settle=seconds * SETTLING,
        lasts=seconds,
        seconds=seconds + PATIENCE,
    )
    upstream = running.at[UPSTREAM].pid
    return await paced(load, server, running.cores.client, beside={"upstream": upstream})


def _calm(rounds: Sequence[Found]) -> list[Steady]:
    """The steady parts of the rounds in which a relay had its core for itself."""
    return [done.steady for done in rounds if done.steady and done.steady.is_calm]


def _median_us(steadies: Sequence[Steady], process: str) -> float | None:
    known = [us for steady in steadies if (us := steady.us_per_token(process)) is not None]
    return median(known) if known else None


def _line(streams: int, number: int, subject: Subject, done: Found) -> str:
    begin = f"{streams} streams  round {number}  {subject.name:15}"
    if (steady := done.steady) is None or done.failed:
        return f"{begin} {done.failure}"
    late = steady.late_ms
    return (
        f"{begin}{shown(steady.us_per_token(), 1):>7} us/token  "
        f"late p50{late['p50']:6.1f} p99{late['p99']:6.1f} max{late['max']:6.1f} ms  "
        f"core{steady.share('server') or 0:5.0%}, others' {steady.waited_share:4.0%}  "
        f"beside it{steady.share('client', 'upstream') or 0:5.0%}"
        f"{'' if steady.is_calm else '  (disturbed)'}"
    )


COLUMNS = (
    Column("streams", "streams", 0),
    Column("server", "relay"),
    Column("us", "us/token"),
    Column("p50", "p50 ms"),
    Column("p99", "p99 ms"),
    Column("max", "max ms"),
    Column("now", "MiB"),
    Column("peak", "peak"),
    Column("upstream_us", "upstream us"),
    Column("client_us", "client us"),
    Column("remark", ""),
)


def _summary(subject: Subject, streams: int, rounds: Sequence[Found]) -> Row:
    """The figures of a relay: of its calm rounds, where there is one, else of all."""
    calm = _calm(rounds)
    used = calm or [done.steady for done in rounds if done.steady]
    failures = [
        f"{done.failed} streams failed: {done.failures[0]}" for done in rounds if done.failed
    ]
    is_relay = subject is not DIRECT
    row = dict.fromkeys(column.key for column in COLUMNS)
    row |= {
        "streams": streams,
        "server": subject.name,
        "subject": subject.name,
        "remark": failures[0] if failures else "" if used else UNSTEADY,
        "slip_ms": max(done.slip_ms for done in rounds),
        "calm": len(calm),
        "unsteady": sum(done.steady is None for done in rounds),
        "rounds": [attrs.asdict(done) for done in rounds],
    }
    if is_relay:
        row |= rounds[-1].memory_mib
    if used:
        late = {name: median(steady.late_ms[name] for steady in used) for name in ("p50", "p99")}
        row |= late | {
            "max": max(steady.late_ms["max"] for steady in used),
            "us": _median_us(used, "server") if is_relay else None,
            "upstream_us": _median_us(used, "upstream"),
            "client_us": _median_us(used, "client"),
            "share": max(steady.share("server") or 0 for steady in used),
            "share_beside": max(steady.share("client", "upstream") or 0 for steady in used),
        }
    return row


def _problems(rows: Sequence[Row]) -> Iterator[str]:
    """What was wrong with ours, and with what all depend on."""
    for row in rows:
        if row["remark"] and row["server"] not in {subject.name for subject in THEIRS}:
            yield f"{row['streams']} streams, {row['server']}: {row['remark']}"


def _notes(rows: Sequence[Row], size: Size) -> Iterator[str]:
    """What to think of before believing a figure."""
    for row in rows:
        if row["unsteady"]:
            where = f"{row['streams']} streams, {row['server']}"
            yield f"{where}: not all streams got going in {row['unsteady']} rounds"
        if row["server"] != DIRECT.name and row["p99"] is not None:
            row["doubts"] = list(_doubts(row, size))
    yield from doubts(rows, "streams")


def _doubts(row: Row, size: Size) -> Iterator[str]:
    if row["calm"] < size.rounds:
        yield f"not enough calm rounds: {DISTURBED}"
    if row["share"] > FULL:
        yield AT_ITS_END
    if row["share_beside"] > FULL:
        yield BUSY_BESIDE


def _targets(rows: Sequence[Row], size: Size) -> Iterator[Target]:
    cpu = {(row["streams"], row["server"]): row["us"] for row in rows}
    for streams in size.streams:
        theirs, node = (cpu.get((streams, subject.name)) for subject in THEIRS)
        for ours in OURS:
            if theirs and (us := cpu.get((streams, ours.name))):
                what = f"{streams} streams, {ours.name} / aiohttp, CPU per token"
                aim = None if node is None else round(node / theirs, 2)
                what += "" if aim is None else "; the aim is node's"
                yield Target(what, us / theirs, MOST_CPU[ours.window], aim)
    fewest, most = min(size.streams), max(size.streams)
    for ours in OURS if fewest < most else ():
        few, many = cpu.get((fewest, ours.name)), cpu.get((most, ours.name))
        if few and many:
            what = f"{ours.name}, CPU per token, {most} streams / {fewest}"
            yield Target(what, many / few, MOST_GROWTH)
    for row in rows:
        for ours in OURS:
            if row["server"] == ours.name:
                what = f"{row['streams']} streams, {ours.name}, p99 late"
                yield Target(what, row["p99"], ours.window + MOST_LATE, unit=" ms")


def _plot(rows: Sequence[Row]) -> Plot:
    series: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row["us"] is not None:
            name = f"{row['streams']} streams"
            series.setdefault(name, []).append((row["server"], row["us"]))
    return Plot(
        "relay",
        "What a relayed token costs",
        "relay",
        "us of processor time per token",
        series,
        kind="bars",
    )


SCENARIO = Scenario(
    "relay",
    "150 and 400 streams of a model's tokens, relayed: processor time per token, and how late.",
    measure,
    cap=CAP,
)
