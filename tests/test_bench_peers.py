"""The servers that the bench compares, against their contract and over real sockets.

Rules: each server is a process, as the bench starts it; what cannot run here is skipped, with its
reason. What a server is asked for is what bench/servers.py asks of it. No figure is judged.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from raw import RawClient, connect

sys.path.append(str(Path(__file__).parent.parent))  # last: what is installed is what is tested

from bench.measuring import CHECKOUT, Address, Cores
from bench.peers.building import BuildError, build_go
from bench.peers.contract import TEXT
from bench.scenario import Bench
from bench.servers import (
    KEY_FORMAT,
    OURS,
    PEERS,
    QUICK,
    SERVERS,
    Ask,
    Running,
    Server,
    Work,
    ask,
    chosen,
    counter,
    serving,
    why_not,
)

PATIENCE = 30.0  # seconds for anything at all
WHILE = 0.01  # seconds between two looks at what a server does by itself
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
COMMON = {"type", "run_id", "seq", "ts"}
LONG = 600.0  # seconds that an agent would go on if nobody left


@contextmanager
def started(server: Server) -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """Run a server, in a process of its own."""
    if (reason := why_not(server)) is not None:
        pytest.skip(reason)
    command = server.command if server.build is None else server.build()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=CHECKOUT, text=True) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], PATIENCE)[0]
            yield process, Address(process.pid, **json.loads(process.stdout.readline()))
        finally:
            process.kill()


@pytest.fixture(scope="module", params=SERVERS, ids=lambda server: server.name)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Each server, one after another, for all tests."""
    with started(request.param) as (_, address):
        yield Running(request.param, address)


@asynccontextmanager
async def asked(running: Running, request: Ask) -> AsyncIterator[RawClient]:
    """A connection on which something was asked for."""
    async with connect(f"http://{running.at.host}:{running.at.port}", is_native=False) as client:
        await client.send(request.raw(running.at).encode())
        yield client


async def read(running: Running, request: Ask) -> list[tuple[str, dict[str, Any]]]:
    """A stream to its end, which must be a proper one: ids and JSON of its frames."""
    async with asked(running, request) as client:
        await client.finish()
        assert client.status == 200
        assert (client.header("content-type") or "").startswith("text/event-stream")
        assert client.complete
        assert running.server.end in client.body.decode()
        for frame in client.frames:
            assert json.loads(frame.data)["type"] == frame.event
        return [(frame.id, json.loads(frame.data)) for frame in client.frames]


def tokens(frames: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """The times that the tokens of a stream hold; ours may have several in one event."""
    said = "".join(event["delta"] for _, event in frames if event["type"] == "part_delta")
    return [int(token) for token in said.split(";")[:-1]]


async def settled(running: Running) -> dict[str, Any]:
    """The counter, with its times, once all agents are gone."""
    while not await _is_quiet(running):  # noqa: ASYNC110  # it happens in another process
        await trio.sleep(WHILE)
    return await counter(running, times=True)


async def _is_quiet(running: Running) -> bool:
    found = await counter(running)
    return found["gone"] == found["started"]


# What a stream is


async def test_a_stream_has_its_events_and_a_proper_end(running):
    """N events come, numbered one after another, and then the end that HTTP has for a stream."""
    with trio.fail_after(PATIENCE):
        frames = await read(running, running.server.dialect.run(Work(events=120)))

    ticks = [event for _, event in frames if event["type"] == "custom"]
    assert [str(n) for n in range(1, len(frames) + 1)] == [number for number, _ in frames]
    assert [{"n": n, "text": TEXT} for n in range(1, 121)] == [tick["value"] for tick in ticks]


async def test_frames_have_the_same_fields_everywhere(running):
    """An event has the fields of the contract, and no others; so all send the same bytes."""
    with trio.fail_after(PATIENCE):
        frames = await read(running, running.server.dialect.run(Work(events=3)))

    ticks = [(number, event) for number, event in frames if event["type"] == "custom"]
    assert 3 == len(ticks)
    assert 1 == len({tick["run_id"] for _, tick in ticks})
    for number, tick in ticks:
        assert {*COMMON, "name", "value"} == tick.keys()
        assert int(number) == tick["seq"]
        assert MOMENT.fullmatch(tick["ts"])
        assert tick["name"] == "tick"


async def test_a_stamped_stream_is_tokens_that_hold_the_time(running):
    """Each token holds CLOCK_MONOTONIC, read when it was made, whatever the language."""
    with trio.fail_after(PATIENCE):
        before = time.monotonic_ns()
        frames = await read(running, running.server.dialect.run(Work(events=5, stamp=True)))
        after = time.monotonic_ns()

    deltas = [event for _, event in frames if event["type"] == "part_delta"]
    times = tokens(frames)
    assert 5 == len(times)
    assert [before, *sorted(times), after] == sorted([before, *times, after])
    kind = {"kind"} if running.server is OURS else set()  # ours tells text from reasoning
    assert all(
        {*COMMON, *kind, "part_id", "delta"} == delta.keys() and delta["part_id"] == "p1"
        for delta in deltas
    )


async def test_events_and_silence_may_take_their_time(running):
    """Events that lie apart all come, and the stream still ends properly behind the silence."""
    with trio.fail_after(PATIENCE):
        work = Work(events=4, gap=0.02, hold=0.05, stamp=True)
        frames = await read(running, running.server.dialect.run(work))

    assert len(tokens(frames)) == 4


# What becomes of an agent


async def test_an_agent_that_ends_is_counted(running):
    """An agent that came to its end has cleaned up; its times are shown once."""
    with trio.fail_after(PATIENCE):
        before = await settled(running)
        asked_at = time.monotonic_ns()
        await read(running, running.server.dialect.run(Work(events=1, key="000007")))
        after = await settled(running)
        again = await counter(running, times=True)

    for name in ("started", "entered", "gone"):
        assert before[name] + 1 == after[name]
    assert ["000007"] == list(after["times"])
    entered, gone = after["times"]["000007"]
    assert asked_at < entered <= gone < time.monotonic_ns()
    assert {} == again["times"]
    assert after["tasks"] is None if running.name == "node" else after["tasks"] > 0


@pytest.mark.parametrize("way", ["fin", "rst"])
@pytest.mark.parametrize("gap", [0.02, LONG], ids=["while it speaks", "while it is silent"])
async def test_leaving_ends_the_agent_and_closes_its_upstream(running, way, gap):
    """A client that leaves, by FIN or RST, is noticed: the `finally` runs to its last statement."""
    with trio.fail_after(PATIENCE):
        before = await settled(running)
        (upstream,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with upstream:
            key, port = KEY_FORMAT % 42, upstream.socket.getsockname()[1]
            work = Work(events=100_000, gap=gap, key="KEY", upstream=port)
            request = running.server.dialect.run(work)
            url = f"http://{running.at.host}:{running.at.port}"
            async with connect(url, is_native=False) as client:
                await client.send(request.raw(running.at).replace("KEY", key).encode())
                held = await upstream.accept()
                assert f"{key}\n".encode() == await held.receive_some()
                while '"tick"' not in client.body.decode():
                    assert await client.receive()
                during = await counter(running)
                left_at = time.monotonic_ns()
                if way == "rst":
                    client.leave_by_rst()
                else:
                    await client.leave_by_fin()
            assert b"" == await held.receive_some()
            await held.aclose()
        after = await settled(running)

    assert before["started"] + 1 == during["started"] == after["started"]
    assert before["entered"] == during["entered"]
    assert before["gone"] == during["gone"]
    assert after["started"] == after["entered"] == after["gone"]
    entered, gone = after["times"][key]
    assert left_at < entered <= gone


# One producer, several readers


async def test_readers_of_a_fan_get_the_same_tokens_to_the_end(running):
    """Whoever watches a producer gets what it makes from then on; the last token, and the end."""
    dialect = running.server.dialect
    found: list[list[int]] = []

    async def watch(request: Ask) -> None:
        found.append(tokens(await read(running, request)))

    with trio.fail_after(PATIENCE):
        answer = await ask(running, dialect.fan_start(Work(events=20, gap=0.05)))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(watch, dialect.fan_watch(answer))
        after = await settled(running)

    longest = max(found, key=len)
    assert 3 == len(found)
    assert longest == sorted(longest)
    for each in found:
        assert each
        assert longest[-len(each) :] == each
    assert after["started"] == after["gone"]


async def test_a_fan_without_a_producer_ends_at_once(running):
    """Before and after a producer there is nothing to see: a stream without events, that ends."""
    if running.server is OURS:
        pytest.skip("what is watched is a run, which is kept: it is read again from its beginning")
    with trio.fail_after(PATIENCE):
        assert [] == await read(running, running.server.dialect.fan_watch(None))


async def test_a_reader_who_leaves_a_fan_leaves_it_to_the_others(running):
    """The producer and its other readers do not care who comes and goes."""
    dialect = running.server.dialect
    with trio.fail_after(PATIENCE):
        answer = await ask(running, dialect.fan_start(Work(events=15, gap=0.05)))
        async with asked(running, dialect.fan_watch(answer)) as client:
            while b"part_delta" not in client.body:
                assert await client.receive()
            client.leave_by_rst()
        times = tokens(await read(running, dialect.fan_watch(answer)))

    assert times


# How it begins and ends


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_sigterm_ends_a_server(server):
    """A server with nothing to do ends on SIGTERM by itself; ours with its own exit code."""
    with started(server) as (process, _):
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)

    assert code == 0 if server is OURS else code in {0, -signal.SIGTERM}


def _bench(**more: Any) -> Bench:
    given = {"quick": True, "only": (), "cores": Cores(None, None), "progress": lambda _line: None}
    return Bench(**given | more)


async def test_the_bench_starts_and_ends_a_server():
    """Within its context a server answers; behind it there is none."""
    with trio.fail_after(PATIENCE):
        async with serving(_bench(), OURS) as running:
            assert 0 == (await counter(running))["started"]
        with pytest.raises(ProcessLookupError):
            os.kill(running.pid, 0)


async def test_what_a_server_refuses_is_told():
    """An answer that is no 2xx is an error that says what was asked for, and what came."""
    with trio.fail_after(PATIENCE):
        async with serving(_bench(), OURS) as running:
            with pytest.raises(RuntimeError, match=r"expected a 2xx to /nowhere, got 404"):
                await ask(running, Ask("GET", "/nowhere"))


# Who takes part


def _told(bench: Bench, scenario: str = "x") -> tuple[list[str], list[str]]:
    lines: list[str] = []
    found = chosen(attrs.evolve(bench, progress=lines.append), scenario)
    return [server.name for server in found], lines


def test_a_smoke_takes_few_servers_unless_told_otherwise():
    """`--quick` starts ours and one peer; named servers are the ones that are named."""
    assert OURS.name in QUICK
    assert len(QUICK) == 2
    assert (["trio"], []) == _told(_bench(only=("trio",)))


def test_a_peer_that_cannot_run_here_is_named_with_its_reason(monkeypatch):
    """A program or a module that is missing is said; so is what a server cannot do at all."""
    monkeypatch.setenv("PATH", "/nonexistent")
    absent = attrs.evolve(PEERS[0], command=(sys.executable,), modules=("no_such_module",))

    assert "no module no_such_module: install agentsse[bench]" == why_not(absent)
    assert ([], ["node is left out: no 'node' on this machine"]) == _told(_bench(only=("node",)))
    names, lines = _told(_bench(only=("trio",)), "reconnect")
    assert ([], ["trio is left out: it keeps nothing that could be resumed"]) == (names, lines)


def test_a_request_has_the_length_that_it_has_with_its_number():
    """KEY becomes a number of six digits, which the length of the body counts already."""
    request = OURS.dialect.run(Work(events=1, key="KEY")).raw(Address(1, "127.0.0.1", 80))
    head, body = request.replace("KEY", KEY_FORMAT % 7).split("\r\n\r\n")

    assert f"Content-Length: {len(body)}" in head
    assert {"events": 1, "key": "000007"} == json.loads(body)["input"]


# Building


def test_a_program_that_does_not_compile_is_told(tmp_path, monkeypatch):
    """What the compiler says is the reason why a peer is left out."""
    _need_go(tmp_path, monkeypatch)
    folder = _program(tmp_path, "func main() { nonsense }")
    broken = Server("broken", ("go",), build=lambda: build_go(folder))

    reason = why_not(broken)

    assert reason is not None
    assert "go build: expected success, got: " in reason
    assert "nonsense" in reason


def test_a_program_is_built_once_for_each_version_of_its_source(tmp_path, monkeypatch):
    """The same source is the same program, which is there already; other source is another one."""
    _need_go(tmp_path, monkeypatch)
    folder = _program(tmp_path, "func main() { println(1) }")

    (first,) = build_go(folder)
    made = Path(first).stat().st_mtime_ns
    build_go.cache_clear()
    (again,) = build_go(folder)
    _program(tmp_path, "func main() { println(2) }")
    build_go.cache_clear()
    (other,) = build_go(folder)

    assert first == again
    assert made == Path(again).stat().st_mtime_ns
    assert first != other
    assert b"2\n" == subprocess.run([other], capture_output=True, check=True).stderr


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    """Where there is no place for the program the reason says so, and what to do."""
    _need_go(tmp_path, monkeypatch)
    (tmp_path / "cache").write_text("in the way")

    with pytest.raises(BuildError, match=r"a folder that can be written at .*XDG_CACHE_HOME"):
        build_go(_program(tmp_path, "func main() {}"))


def test_a_build_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    """A compiler that does not come back is a reason, too."""
    slow = tmp_path / "go"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("bench.peers.building.PATIENCE", 0.05)

    with pytest.raises(BuildError, match=r"go version: expected an end within 0\.05 s"):
        build_go(_program(tmp_path, "func main() {}"))


def _need_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip without Go; programs go elsewhere, what was compiled of the standard library stays."""
    if shutil.which("go") is None:
        pytest.skip("no 'go' on this machine")
    known = subprocess.run(["go", "env", "GOCACHE"], capture_output=True, text=True, check=True)
    monkeypatch.setenv("GOCACHE", known.stdout.strip())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _program(tmp_path: Path, main: str) -> Path:
    folder = tmp_path / "program"
    folder.mkdir(exist_ok=True)
    (folder / "go.mod").write_text("module program\n\ngo 1.19\n")
    (folder / "main.go").write_text(f"package main\n\n{main}\n")
    return folder
