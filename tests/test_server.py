"""The server as a process: start, signals, drain, and the order in which everything ends.

Rules: what a signal does is tested on a real process, driven over its pipes and sockets; what can
be seen from inside is tested inside. Nothing is asserted of elapsed time but by what has, or has
not, happened: a drain that came too late would have left its marks.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
from raw import RawClient, connect, request, stream_run, wait_until
from trio.testing import wait_all_tasks_blocked

from agentsse import Agent, RunContext, agent, server as server_module
from agentsse.config import (
    AgentSettings,
    DialectSettings,
    LimitSettings,
    ProviderSettings,
    ServerSettings,
    Settings,
)
from agentsse.dialects import Start
from agentsse.errors import ConfigError
from agentsse.events import Custom, RunFinished, RunStarted
from agentsse.listener import ListenerOptions
from agentsse.providers import HttpProvider
from agentsse.providers.codex import CodexProvider
from agentsse.providers.embedded import EmbeddedProvider
from agentsse.providers.offline import OfflineProvider
from agentsse.providers.openai_chat import OpenAIChatApi
from agentsse.server import (
    is_loopback,
    make_agents,
    make_provider,
    open_server,
    raise_descriptor_limit,
)

PATIENCE = 30  # seconds for a whole test
SPARE = 1.5  # seconds for a process to end and to be seen to
LOCAL = Settings(server=ServerSettings(port=0))

# What the process serves. It says on its standard output where it listens, and then every report,
# each as a line of JSON. `flood` says more than sockets hold; `tidy` needs 0.5 s to clean up and
# leaves a mark when it is done; `gated` waits until a file appears; `stubborn` shields itself;
# `large` returns more than sockets hold.
PROGRAM = """
import json, pathlib, sys, trio
from agentsse import agent
from agentsse.config import ServerSettings, Settings
from agentsse.server import serve

folder = pathlib.Path(sys.argv[2])

def say(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)

@agent(on_disconnect="continue")
async def flood(run, input):
    for _ in range(160):
        run.emit("flood", said="x" * 64_000)
        await trio.lowlevel.checkpoint()
    run.emit("said")
    await trio.sleep_forever()

@agent
async def large(run, input):
    return "x" * 16 * 1024 * 1024

@agent
async def tidy(run, input):
    run.emit("working")
    try:
        await trio.sleep_forever()
    finally:
        with run.cleanup():
            await trio.sleep(0.5)
            (folder / f"tidied-{run.id}").touch()

@agent
async def gated(run, input):
    run.emit("working")
    while not (folder / "gate").exists():
        await trio.sleep(0.02)
    run.emit("done")

@agent
async def stubborn(run, input):
    with trio.CancelScope(shield=True):
        run.emit("shielded")
        await trio.sleep_forever()

settings = Settings(server=ServerSettings(port=0, drain=float(sys.argv[1])))
agents = [flood, large, tidy, gated, stubborn]
announce = lambda server: say("listening", url=server.urls[0])
sys.exit(trio.run(lambda: serve(agents, settings, report=say, announce=announce)))
"""


@attrs.define(eq=False)
class Process:
    """A server process, and what it has said so far."""

    process: trio.Process
    folder: Path
    said: list[dict[str, Any]] = attrs.field(factory=list)
    _rest: bytes = b""

    async def hear(self, event: str) -> dict[str, Any]:
        """Read its reports up to the next one of that name."""
        stdout = self.process.stdout
        assert stdout is not None
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if newline:
                self._rest = rest
                self.said.append(json.loads(line))
                if self.said[-1]["event"] == event:
                    return self.said[-1]
                continue
            more = await stdout.receive_some()
            assert more, f"expected {event!r}, got the end after {self.said}"
            self._rest += more

    async def wait(self) -> int:
        """Read what it still has to say, and wait for its end; the exit code."""
        stdout = self.process.stdout
        assert stdout is not None
        async for more in stdout:
            self._rest += more
        self.said += [json.loads(line) for line in self._rest.splitlines()]
        return await self.process.wait()


@asynccontextmanager
async def process(folder: Path, *, drain: float) -> AsyncIterator[tuple[Process, str]]:
    """Start a server process; leaving kills it if it is still there."""
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            command = [sys.executable, "-c", PROGRAM, str(drain), str(folder)]
            started: trio.Process = await nursery.start(
                partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
            )
            try:
                server = Process(started, folder)
                yield server, (await server.hear("listening"))["url"]
            finally:
                started.kill()


def marks(folder: Path) -> set[str]:
    """What the agents have left in the folder."""
    return {path.name for path in folder.iterdir()}


async def streaming(client: RawClient, name: str, kind: str = "working") -> str:
    """Start an agent and read up to its first custom event; the run's id."""
    await client.send(stream_run(name))
    event = await client.wait_for(Custom)
    assert isinstance(event, Custom)
    assert kind == event.name
    return event.run_id


async def end_of(client: RawClient) -> RunFinished:
    """Read to the end of a stream; its last event, which must be the run's end."""
    end = await client.wait_for(RunFinished)
    await client.finish()
    assert client.complete
    assert isinstance(end, RunFinished)
    return end


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_gives_every_stream_its_end(number: int, tmp_path: Path) -> None:
    """A stalled reader, an agent that must clean up, an idle connection, a fresh stream: exit 0.

    Every live stream gets its `run_finished`, and the agents' cleanup is done before the exit. The
    stalled reader is not waited for beyond the drain: 2 s, where its write may take 10 s.
    """
    async with process(tmp_path, drain=2.0) as (server, url), AsyncExitStack() as stack:
        stalled = await stack.enter_async_context(connect(url, receive_buffer=4096))
        idle, running, fresh = [await stack.enter_async_context(connect(url)) for _ in range(3)]
        await stalled.send(stream_run("flood"))
        await idle.send(request("GET", "/health/live"))
        await idle.finish()
        await streaming(running, "tidy")
        await fresh.send(stream_run("tidy"))
        await fresh.wait_for(RunStarted)
        server.process.send_signal(number)
        draining = await server.hear("draining")
        drained = trio.current_time() + 2.0 + SPARE
        ends = [await end_of(running), await end_of(fresh)]
        assert b"" == await idle.stream.receive_some()
        with trio.fail_at(drained):
            code = await server.wait()

        assert 0 == code
        assert (signal.Signals(number).name, 2.0) == (draining["signal"], draining["seconds"])
        assert [("cancelled", "shutdown")] * 2 == [(e.outcome, e.receipt.cause) for e in ends]
        assert {f"tidied-{end.run_id}" for end in ends} == marks(tmp_path)
        assert "stopped" == server.said[-1]["event"]
        assert [] == [said for said in server.said if "crash" in said["event"]]


async def test_run_may_end_by_itself_while_the_server_drains(tmp_path: Path) -> None:
    """In a drain nothing is cancelled before it must be, and who comes to watch is served.

    Only new runs are refused, and readiness is.
    """
    async with (
        process(tmp_path, drain=20.0) as (server, url),
        connect(url) as client,
        connect(url) as watcher,
    ):
        async with httpx2.AsyncClient(base_url=url) as http:
            ready = (await http.get("/health/ready")).status_code
            run_id = await streaming(client, "gated")
            server.process.send_signal(signal.SIGTERM)
            await server.hear("draining")
            stopping = await http.get("/health/ready")
            live = await http.get("/health/live")
            starts = [
                await http.post("/agents/tidy/runs", json={}, headers={"Accept": accept})
                for accept in ("application/json", "text/event-stream")
            ]
            shown = await http.get(f"/runs/{run_id}")
        await watcher.send(request("GET", f"/runs/{run_id}/events"))
        await watcher.wait_for(Custom)
        (tmp_path / "gate").touch()
        end = await end_of(client)
        watched = await end_of(watcher)
        code = await server.wait()

        assert (200, 503, 200) == (ready, stopping.status_code, live.status_code)
        for answer in (stopping, *starts):
            assert (503, "5") == (answer.status_code, answer.headers["retry-after"])
            assert "about to stop" in answer.json()["detail"]
        assert "running" == shown.json()["state"]
        assert ("success", None) == (end.outcome, end.receipt.cause)
        assert end == watched
        assert 0 == code


async def test_run_that_outlives_the_drain_is_named(tmp_path: Path) -> None:
    """What shields itself for longer than there is time: its name in the log, exit code 1."""
    async with process(tmp_path, drain=0.4) as (server, url), connect(url) as client:
        run_id = await streaming(client, "stubborn", "shielded")
        server.process.send_signal(signal.SIGTERM)
        code = await server.wait()

        assert 1 == code
        assert {"event": "run_outlived_drain", "run_id": run_id, "agent": "stubborn"} in server.said
        assert "stopped" not in [said["event"] for said in server.said]


async def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Whoever asks twice means it: no drain, no cleanup, and a code that tells the signal."""
    async with process(tmp_path, drain=600.0) as (server, url), connect(url) as client:
        await streaming(client, "stubborn", "shielded")
        server.process.send_signal(signal.SIGTERM)
        await server.hear("draining")
        server.process.send_signal(signal.SIGINT)
        code = await server.wait()

        assert 128 + signal.SIGINT == code
        assert ["draining"] == [s["event"] for s in server.said if s["event"] != "listening"]


async def test_second_signal_ends_at_once_though_the_drain_is_over(tmp_path: Path) -> None:
    """A client that does not take its JSON answer holds the exit up, but not against a signal."""
    async with (
        process(tmp_path, drain=600.0) as (server, url),
        connect(url, receive_buffer=4096) as stalled,
        connect(url) as idle,
    ):
        await stalled.send(request("POST", "/agents/large/runs", b"{}"))
        await server.hear("run_finished")
        await idle.send(request("GET", "/health/live"))
        await idle.finish()
        server.process.send_signal(signal.SIGTERM)
        assert b"" == await idle.stream.receive_some()  # the drain is over: only now is it let go
        server.process.send_signal(signal.SIGTERM)
        code = await server.wait()

        assert 128 + signal.SIGTERM == code
        assert "stopped" not in [said["event"] for said in server.said]


async def test_nothing_to_end_is_ended_at_once(tmp_path: Path) -> None:
    """Without runs a drain of ten minutes takes no time, whatever idle clients are connected."""
    async with process(tmp_path, drain=600.0) as (server, url), connect(url) as idle:
        await idle.send(request("GET", "/health/live"))
        await idle.finish()
        server.process.send_signal(signal.SIGTERM)

        assert 0 == await server.wait()
        assert b"" == await idle.stream.receive_some()


# The same, from inside


@attrs.define(eq=False)
class Served:
    """What `serve` has announced, reported and returned."""

    announced: list[server_module.Server] = attrs.field(factory=list)
    reports: list[tuple[str, dict[str, Any]]] = attrs.field(factory=list)
    code: int | None = None

    def report(self, event: str, /, **facts: Any) -> None:
        """Keep a report."""
        self.reports.append((event, facts))


async def serve_and_stop(
    agents: Sequence[Agent], *, then: Sequence[int], flush: Callable[[], None] = lambda: None
) -> Served:
    """Serve here, send this process signals once it listens, and wait for the end."""
    served = Served()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        def announce(server: server_module.Server) -> None:
            served.announced.append(server)
            task_status.started()

        settings = Settings(server=ServerSettings(port=0, drain=1.0))
        served.code = await server_module.serve(
            agents, settings, report=served.report, announce=announce, flush=flush
        )

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            [server] = served.announced
            for one in agents:
                server.runs.start(
                    Start(agent=one.name, input=None, delivery="background"), default="continue"
                )
            for number in then:
                signal.raise_signal(number)
                await wait_until(lambda: "draining" in dict(served.reports))
    return served


async def test_serve_returns_its_exit_code() -> None:
    """It announces itself once, drains at the signal, and says how that went."""

    @agent
    async def waits(_run: RunContext, _input: object) -> None:
        await trio.sleep_forever()

    served = await serve_and_stop([waits], then=[signal.SIGTERM])
    [run] = served.announced[0].runs

    assert 0 == served.code
    assert ["draining", "run_finished", "stopped"] == [event for event, _ in served.reports]
    assert run.end is not None
    assert ("cancelled", "shutdown") == (run.end.outcome, run.end.receipt.cause)


class _Left(BaseException):
    """What stands for the end of this process, in a test that has to outlive it."""


@pytest.mark.parametrize(
    ("signals", "code"), [([signal.SIGTERM], 1), ([signal.SIGTERM, signal.SIGINT], 130)]
)
async def test_serve_leaves_without_waiting(
    signals: list[int], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For a run that outlives the drain, and at a second signal: nobody is waited for.

    What was reported is written before; that there is nowhere to print to does not matter.
    """
    gate, left = trio.Event(), list[object]()
    closed = (tmp_path / "out").open("w")
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)

    def leave(code: int) -> None:
        left.append(code)
        gate.set()
        raise _Left

    monkeypatch.setattr(os, "_exit", leave)

    @agent
    async def stubborn(_run: RunContext, _input: object) -> None:
        with trio.CancelScope(shield=True):
            await gate.wait()

    with pytest.RaisesGroup(_Left, flatten_subgroups=True, allow_unwrapped=True):
        await serve_and_stop([stubborn], then=signals, flush=lambda: left.append("flush"))

    assert ["flush", code] == left


async def test_drain_cancels_only_what_has_not_ended_by_itself() -> None:
    """The last part of a drain is for cleanup; it returns what is still there then."""
    gate = trio.Event()

    @agent
    async def waits(_run: RunContext, _input: object) -> None:
        await trio.sleep_forever()

    @agent
    async def ends(_run: RunContext, _input: object) -> None:
        await gate.wait()

    @agent
    async def stubborn(_run: RunContext, _input: object) -> None:
        with trio.CancelScope(shield=True):
            await gate.wait()
            await trio.sleep(0.3)

    with trio.fail_after(PATIENCE):
        async with open_server([waits, ends, stubborn], LOCAL) as server:
            runs = {
                name: server.runs.start(
                    Start(agent=name, input=None, delivery="background"), default="continue"
                )[0]
                for name in ("waits", "ends", "stubborn")
            }
            await wait_all_tasks_blocked()
            gate.set()
            unfinished = await server.drain(0.2)
            assert [runs["stubborn"]] == unfinished
            assert "cancelling" == runs["stubborn"].state

    assert {"waits": "cancelled", "ends": "success", "stubborn": "success"} == {
        name: run.end.outcome for name, run in runs.items() if run.end is not None
    } | {"stubborn": "success"}


async def test_leaving_the_context_ends_runs_then_connections_then_sockets() -> None:
    """Streams get their end before their connection goes, and the port is free at last."""
    order: list[str] = []

    @agent
    async def waits(run: RunContext, _input: object) -> None:
        run.emit("working")
        try:
            await trio.sleep_forever()
        finally:
            order.append("agent")

    async def read(url: str, ready: trio.Event) -> None:
        async with connect(url) as client:
            await streaming(client, "waits")
            ready.set()
            end = await end_of(client)
            order.append(f"end of stream: {end.receipt.cause}")
            assert b"" == await client.stream.receive_some()
            order.append("end of connection")

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            async with open_server([waits], LOCAL) as server:
                url, ready = server.urls[0], trio.Event()
                nursery.start_soon(read, url, ready)
                await ready.wait()
            assert 0 == server.connections.open
            assert 0 == server.app.streams.open
        with pytest.raises(OSError, match="refused"):
            async with connect(url):
                pass

    assert ["agent", "end of stream: shutdown", "end of connection"] == order


async def test_streams_get_their_end_however_long_cleanup_takes() -> None:
    """Cleanup that takes longer than connections have to end is not cut: they end after it."""
    longer = ListenerOptions().graceful_timeout + 0.5

    @agent
    async def thorough(run: RunContext, _input: object) -> None:
        run.emit("working")
        try:
            await trio.sleep_forever()
        finally:
            with run.cleanup():
                await trio.sleep(longer)  # noqa: ASYNC102  # that is what cleanup is for
                run.emit("cleaned")

    ends: list[RunFinished] = []

    async def read(url: str, task_status: trio.TaskStatus[None]) -> None:
        async with connect(url) as client:
            await streaming(client, "thorough")
            task_status.started()
            await client.wait_for(Custom)
            ends.append(await end_of(client))

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery, open_server([thorough], LOCAL) as server:
            await nursery.start(read, server.urls[0])

    assert [("cancelled", "shutdown")] == [(end.outcome, end.receipt.cause) for end in ends]
    assert {"finished": 1} == server.app.streams.closed


async def test_report_that_raises_harms_nobody() -> None:
    """What cannot be told is not told; requests, runs and the end of the server go on."""

    def report(event: str, /, **_facts: Any) -> None:
        raise OSError(event)

    with trio.fail_after(PATIENCE):
        async with (
            open_server([idle], LOCAL, report=report) as server,
            httpx2.AsyncClient(base_url=server.urls[0]) as http,
        ):
            answers = [await http.post("/agents/idle/runs") for _ in range(2)]

    assert [200, 200] == [answer.status_code for answer in answers]
    assert 0 == server.connections.crashed


async def test_cancelling_a_server_ends_everything() -> None:
    """Cancelled from outside there is no drain, but every run has its end all the same."""
    ended = trio.Event()

    @agent
    async def waits(run: RunContext, _input: object) -> None:
        run.emit("working")
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    with trio.fail_after(PATIENCE):
        with trio.CancelScope() as scope:
            async with open_server([waits], LOCAL) as server, connect(server.urls[0]) as client:
                run_id = await streaming(client, "waits")
                run = server.runs.find(run_id)
                scope.cancel()
                await trio.sleep_forever()

    assert scope.cancelled_caught
    assert ended.is_set()
    assert run.end is not None
    assert ("cancelled", "shutdown") == (run.end.outcome, run.end.receipt.cause)
    assert 0 == server.app.streams.open
    assert 0 == server.connections.open


# What it refuses to start with


async def refused(agents: Sequence[Agent], settings: Settings = LOCAL, **others: Any) -> str:
    """Try to open a server that must not open; what it says."""
    with pytest.raises(ConfigError) as caught:
        async with open_server(agents, settings, **others):
            pass
    return caught.value.message


@agent
async def idle(_run: RunContext, _input: object) -> None:
    """Do nothing."""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid"])
async def test_address_that_is_not_loopback_is_refused(host: str) -> None:
    """There is no authentication, so nobody else may connect; it says what to do instead."""
    said = await refused([idle], Settings(server=ServerSettings(host=host, port=0)))

    assert f"expected an address of loopback, got {host!r}" in said
    assert "put a proxy that authenticates before it" in said


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("8.8.8.8", False),
        ("fe80::1%lo", False),
        ("", False),
        ("no.such.host.invalid", False),
        ("no..host", False),
        ("x" * 64 + ".example", False),
    ],
)
def test_loopback_is_known_by_its_addresses(host: str, *, expected: bool) -> None:
    """A name counts if all of its addresses do; one that has none does not."""
    assert expected == is_loopback(host)


async def test_port_in_use_is_refused() -> None:
    """It names the address, and says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = await refused([idle], Settings(server=ServerSettings(port=port)))

    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "stop the server that has it, or choose another port" in said


async def test_agents_of_one_name_are_refused() -> None:
    """A client could not say which one it means."""
    twin = Agent("idle", idle.function)
    said = await refused([idle, twin, Agent("other", idle.function)])

    assert "expected agents of different names, got two of idle" == said


async def test_model_of_an_unknown_provider_is_refused() -> None:
    """Better now than in the first run; providers that are given, and an agent's own, are known."""
    lost = Agent.of_model("lost", "nowhere:model")
    said = await refused([lost], providers={"mine": OfflineProvider()})

    assert "agent 'lost'" in said
    assert "one of the providers anthropic, codex, gemini, llama_stack, mine, offline" in said
    assert "got 'nowhere'" in said
    with trio.fail_after(PATIENCE):
        own = Agent.of_model("own", "nowhere:model", provider=OfflineProvider())
        given = Agent.of_model("given", "mine:model")
        async with open_server([own, given], LOCAL, providers={"mine": OfflineProvider()}):
            pass


async def test_settings_of_an_unknown_dialect_are_refused() -> None:
    """A misspelt dialect would silently stay where it was."""
    said = await refused(
        [idle], attrs.evolve(LOCAL, dialects={"nativ": DialectSettings()}, source="my.toml")
    )

    assert said.startswith("my.toml: dialects: expected some of native, ")
    assert said.endswith(", got nativ")


@pytest.mark.parametrize(("mount", "prefix"), [("/v0", "/v0"), ("/", ""), (None, "")])
async def test_mount_moves_a_dialect(mount: str | None, prefix: str) -> None:
    """All of its routes, and where it says that a run is; what operators ask for stays."""
    settings = attrs.evolve(LOCAL, dialects={"native": DialectSettings(mount=mount)})
    with trio.fail_after(PATIENCE):
        async with (
            open_server([idle], settings) as server,
            httpx2.AsyncClient(base_url=server.urls[0]) as http,
        ):
            answer = await http.post(f"{prefix}/agents/idle/runs")
            again = await http.get(answer.headers["location"])
            health = await http.get("/health/live")
            root = await http.get("/agents")

    assert answer.headers["location"].startswith(f"{prefix}/runs/")
    assert [200, 200, 200] == [answer.status_code, again.status_code, health.status_code]
    assert (404 if prefix else 200) == root.status_code


async def test_localhost_listens_on_both_loopbacks() -> None:
    """A browser may take either; where there is no IPv6 the other one will do."""
    settings = Settings(server=ServerSettings(host="localhost", port=0))
    with trio.fail_after(PATIENCE):
        async with open_server([idle], settings) as server:
            for url in server.urls:
                async with connect(url) as client:
                    await client.send(request("GET", "/health/live"))
                    assert b'{"status":"ok"}' == await client.finish()

    assert 1 <= len(server.urls) <= 2


async def test_settings_reach_what_they_are_about() -> None:
    """Each section goes to its part; milliseconds become seconds."""
    settings = Settings(
        server=ServerSettings(
            port=0, heartbeat=1.0, rotation=2.0, max_body=3, allowed_hosts=("A.Example",)
        ),
        limits=LimitSettings(coalesce_ms=250, grace=5.0, max_running=6),
    )
    async with open_server([idle], settings) as server:
        options, limits = server.app.options, server.runs.limits

    assert (1.0, 2.0, 3, ("a.example",)) == (
        options.heartbeat,
        options.rotation,
        options.max_body,
        options.allowed_hosts,
    )
    assert (0.25, 5.0, 6) == (limits.coalesce, limits.grace, limits.max_running)


# What is served

MODULE = """
from agentsse import agent, tool

@agent
async def one(run, input): ...
@agent
async def two(run, input): ...
@tool
def look(): ...
@tool
def leap(): ...
again = one
several = [two, one]
@tool
def hop(): ...
class Box:
    def tools(self):
        return [leap]
box, hops = Box(), [hop]
nothing, text = [], "one"
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    """A file with agents and tools, of a name that no other test imports."""
    path = tmp_path / f"served_{tmp_path.name}.py"
    path.write_text(MODULE)
    return str(path)


@pytest.mark.parametrize(
    ("attribute", "names"),
    [("", ["one", "two"]), (":two", ["two"]), (":several", ["two", "one"])],
)
def test_agents_are_found_where_they_are_said_to_be(
    module: str, attribute: str, names: list[str]
) -> None:
    """A module gives all that it holds, each once; an attribute one or several."""
    assert names == [found.name for found in make_agents(Settings(), module + attribute)]


@pytest.mark.parametrize("attribute", [":nothing", ":text", ":look"])
def test_what_holds_no_agents_is_refused(module: str, attribute: str) -> None:
    """It says how an agent is made."""
    with pytest.raises(ConfigError, match="decorate an async function of"):
        make_agents(Settings(), module + attribute)


def test_agents_of_the_settings_follow_those_of_the_code(module: str) -> None:
    """With all that is set; the guide is added where a folder was named for it."""
    chosen = AgentSettings(
        model="mine:fast",
        instructions="Be brief.",
        description="Answers.",
        tools=(f"{module}:look", f"{module}:box", f"{module}:hops"),
        on_disconnect="grace:5",
        max_running=1,
        timeout=7.0,
    )
    settings = Settings(
        server=ServerSettings(folder=str(Path(module).parent)), agents={"answers": chosen}
    )
    one, made, guide = make_agents(settings, f"{module}:one")

    assert ["one", "answers", "guide"] == [one.name, made.name, guide.name]
    assert ("mine:fast", "Answers.", "grace:5", 1, 7.0) == (
        made.model,
        made.description,
        made.on_disconnect,
        made.max_running,
        made.timeout,
    )
    assert ["look", "leap", "hop"] == [tool.name for tool in made.tools]


def test_where_nothing_is_named_there_is_the_guide() -> None:
    """It needs no model and no network."""
    assert ["guide"] == [found.name for found in make_agents(Settings(), None)]


@pytest.mark.parametrize("attribute", ["one", "several", "nothing", "text", "Box"])
def test_what_is_no_tool_is_refused(module: str, attribute: str) -> None:
    """It names the agent and the place, and says how a tool is made."""
    chosen = AgentSettings(model="offline:x", tools=(f"{module}:{attribute}",))
    with pytest.raises(ConfigError, match=rf"agents.a: tools: .*{attribute}.* @tool"):
        make_agents(Settings(agents={"a": chosen}), None)


def test_model_without_a_provider_is_refused() -> None:
    """It says what a model's name looks like."""
    with pytest.raises(ConfigError, match="expected a model as PROVIDER:MODEL, got 'fast'"):
        make_agents(Settings(agents={"a": AgentSettings(model="fast")}), None)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\n", "\N{SNOWMAN}", "x" * 65])
def test_agent_of_the_settings_needs_a_name_that_fits_into_a_path(name: str) -> None:
    """A bad one is refused at the start, like everything else in a configuration."""
    with pytest.raises(ConfigError, match="agents: expected an agent's name of 1 to 64 letters"):
        make_agents(Settings(agents={name: AgentSettings(model="offline:x")}), None)


def test_tools_of_one_name_are_refused(module: str) -> None:
    """A model could not tell them apart."""
    chosen = AgentSettings(model="offline:x", tools=(f"{module}:leap", f"{module}:box"))
    with pytest.raises(ConfigError, match=r"agents: .*got two of leap"):
        make_agents(Settings(agents={"a": chosen}), None)


async def test_providers_of_the_settings_are_known_by_their_names() -> None:
    """A kind that there is not is refused, with those that there are."""
    named = attrs.evolve(LOCAL, providers={"mine": ProviderSettings(kind="offline")})
    async with open_server([Agent.of_model("a", "mine:x")], named) as server:
        assert ["mine", "offline"] == sorted(server.runs.providers)
    wrong = attrs.evolve(LOCAL, providers={"mine": ProviderSettings(kind="psychic")})

    assert (
        "providers.mine.kind: expected one of offline, openai_chat, openai_responses, anthropic, "
        "gemini, llama_stack, codex, got 'psychic'"
    ) in (await refused([idle], wrong))


KEY = "sk-canary-0123456789"
OF_VENDORS = {
    "openai_chat": "OPENAI_API_KEY",
    "openai_responses": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
}


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without the keys of vendors."""
    for variable in OF_VENDORS.values():
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("kind", "variable"), OF_VENDORS.items())
async def test_every_kind_stands_for_itself_at_its_vendor(
    no_keys: pytest.MonkeyPatch, kind: str, variable: str
) -> None:
    """`kind:model` needs no table, only the vendor's own variable; without it nothing starts."""
    chat = Agent.of_model("chat", f"{kind}:m")
    said = await refused([chat])
    assert f"the provider {kind!r}: expected a key in the environment variable {variable}" in said

    no_keys.setenv(variable, KEY)
    async with open_server([chat], LOCAL) as server:
        provider = server.runs.providers[kind]
        assert isinstance(provider, HttpProvider)
        assert KEY == provider.key
        assert KEY not in repr(provider)
        assert (kind, kind) == (provider.name, provider.api.kind)
    async with open_server([idle], LOCAL) as server:
        assert ["offline"] == list(server.runs.providers)


def test_a_key_goes_only_where_it_belongs(no_keys: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The vendor's own variable is not sent to any other address, unless that is asked for."""
    no_keys.setenv("OPENAI_API_KEY", KEY)
    local = {"base_url": "http://127.0.0.1:1/v1/"}
    at = make_provider("openai_chat", **local)
    assert isinstance(at, HttpProvider)
    assert at.key is None
    assert isinstance(at.api, OpenAIChatApi)
    assert "http://127.0.0.1:1/v1" == at.api.base_url
    named = make_provider("openai_chat", **local, key_env="OPENAI_API_KEY", name="mine")
    assert isinstance(named, HttpProvider)
    assert ("mine", KEY) == (named.name, named.key)
    (tmp_path / "key").write_text(f"{KEY}\n")
    filed = make_provider("anthropic", key_file=str(tmp_path / "key"))
    assert isinstance(filed, HttpProvider)
    assert KEY == filed.key


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"key_env": "NOT_SET_AT_ALL"}, "environment variable NOT_SET_AT_ALL, got none"),
        ({"key_env": "UNFIT"}, "environment variable UNFIT, got one that no header can carry"),
        ({"key_file": "/nowhere"}, "at '/nowhere', got No such file or directory"),
        ({"key_file": "BINARY"}, "got no text"),
    ],
)
def test_a_key_that_is_not_there_is_named_and_never_shown(
    no_keys: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    """Where it was looked for, and what was found."""
    no_keys.setenv("UNFIT", f"{KEY}\u00e9")
    no_keys.chdir(tmp_path)
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe" + KEY.encode())
    with pytest.raises(ConfigError) as refused:
        make_provider("anthropic", **settings)  # type: ignore[arg-type]
    assert expected in str(refused.value)
    assert KEY not in str(refused.value)


def test_calls_in_the_text_are_an_option_of_any_provider() -> None:
    """Recognised, or taught as well; codex, which has no other way, is always taught."""
    local = "http://127.0.0.1:1/v1"
    made = [
        make_provider("openai_chat", base_url=local, tool_calls="text"),
        make_provider("openai_chat", base_url=local, tool_calls="taught"),
        make_provider("codex"),
    ]
    assert [False, True, True] == [p.teach for p in made if isinstance(p, EmbeddedProvider)]
    assert ["openai_chat", "openai_chat", "codex"] == [provider.name for provider in made]


def test_a_codex_of_ones_own_may_be_named() -> None:
    """Its program, and arguments."""
    made = make_provider("codex", command=["./codex", "app-server", "-c", "x=1"])
    assert isinstance(made, EmbeddedProvider)
    assert isinstance(made.inner, CodexProvider)
    assert ("./codex", "app-server", "-c", "x=1") == made.inner.command


# Descriptors


@asynccontextmanager
async def descriptor_limit(soft: int, hard: int | None = None) -> AsyncIterator[None]:
    """Let this process have fewer descriptors for a while."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1] if hard is None else hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_connections_are_bounded_by_the_descriptors_there_are() -> None:
    """One that would take a reserved descriptor is told to come back; those there are go on."""
    with trio.fail_after(PATIENCE):
        async with (
            descriptor_limit(server_module.RESERVED_DESCRIPTORS + 2),
            open_server([idle], LOCAL) as server,
            connect(server.urls[0]) as first,
            connect(server.urls[0]) as second,
            connect(server.urls[0]) as third,
        ):
            for client, status in ((first, 200), (second, 200), (third, 503), (first, 200)):
                await client.send(request("GET", "/health/live"))
                await client.finish()
                assert status == client.status
            assert "1" == third.header("retry-after")
            assert (2, 1) == (server.connections.accepted, server.connections.refused)


@pytest.mark.parametrize(
    ("most", "soft", "expected"),
    [(7, 1_000, 7), (None, 1_000, 936), (None, 10, 1), (None, resource.RLIM_INFINITY, None)],
)
def test_number_of_connections(
    most: int | None, soft: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is set counts; else what the system allows, less what is kept for other things."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    options = server_module._listener_options(Settings(server=ServerSettings(max_connections=most)))

    assert expected == options.max_connections


async def test_descriptor_limit_is_raised_to_what_is_allowed() -> None:
    """And again is nothing to do."""
    reports: list[object] = []
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with descriptor_limit(256):
        for _ in range(2):
            raise_descriptor_limit(lambda *said, **_facts: reports.append(said))
            assert (hard, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)

    assert [] == reports


def test_descriptor_limit_that_cannot_be_raised_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It serves with what it has."""
    reports: list[tuple[str, dict[str, Any]]] = []

    def refuse(*_: object) -> None:
        raise ValueError("not allowed here")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 20))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit(lambda event, **facts: reports.append((event, facts)))

    assert [("descriptor_limit", {"soft": 10, "hard": 20, "error": "not allowed here"})] == reports


async def test_socket_options_that_are_lacking_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A platform without one of them is served, and told."""
    reports: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    async with open_server(
        [idle], LOCAL, report=lambda event, **facts: reports.append((event, facts))
    ):
        pass

    assert [("socket_options_lacking", {"options": ["TCP_USER_TIMEOUT"]})] == reports
