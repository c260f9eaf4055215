"""A client leaves, in every way and at every moment, and its agent is gone.

Rules: a real server and real sockets; what an agent does is signalled by events that the test
holds; what must be gone is counted, against what was there before the client came.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import attrs
import h11
import httpx2
import pytest
import trio
from raw import (
    Footprint,
    RawClient,
    connect,
    request,
    stream_run,
    wait_quiet,
    wait_until,
)
from trio.testing import wait_all_tasks_blocked

from agentsse import Agent, RunContext, agent, runs as runs_module
from agentsse.config import LimitSettings, Settings
from agentsse.dialects import Start
from agentsse.events import Custom, InputRequested, Receipt, RunFinished, RunStarted
from agentsse.runs import Run
from agentsse.server import Server
from agentsse.testing import open_server, read_events

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds


@attrs.define(eq=False)
class Witness:
    """What the test gets to see of its agent, and how it tells it to go on."""

    started: trio.Event = attrs.field(factory=trio.Event)
    ended: trio.Event = attrs.field(factory=trio.Event)
    go: trio.Event = attrs.field(factory=trio.Event)
    starts: int = 0
    ends: int = 0


async def watched(run: RunContext, _input: object, *, witness: Witness) -> None:
    """Speak if asked to, with three tasks below, and wait for the word to go."""
    witness.started.set()
    witness.starts += 1
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(trio.sleep_forever)
            for word in run.input or ():
                run.emit(word)
            await witness.go.wait()
            nursery.cancel_scope.cancel()
    finally:
        witness.ends += 1
        witness.ended.set()


@asynccontextmanager
async def serving(
    witness: Witness,
    *,
    patience: float = PATIENCE,
    limits: LimitSettings | None = None,
    **server: Any,
) -> AsyncIterator[Server]:
    """Serve the watched agent and one that holds a place, within the time of a test."""

    @agent
    async def holder(_run: RunContext, _input: object) -> None:
        await trio.sleep_forever()

    subject = Agent("subject", partial(watched, witness=witness))
    settings = Settings(limits=limits or LimitSettings())
    with trio.fail_after(patience):
        async with open_server(subject, holder, settings=settings, **server) as opened:
            async with connect(opened.urls[0]) as client:  # what is made at first use, now
                await client.send(stream_run("nobody"))
                await client.finish()
            await wait_quiet(opened)
            yield opened


def subjects(server: Server) -> list[Run]:
    """The runs of the watched agent, the newest first."""
    return [run for run in server.runs if run.agent.name == "subject"]


def assert_left(server: Server, run: Run, *, tasks: int) -> None:
    """The run was torn down because its reader left, and nobody holds it."""
    assert run.end is not None
    assert ("cancelled", "disconnect", tasks, 0) == (
        run.end.outcome,
        run.end.receipt.cause,
        run.end.receipt.tasks,
        run.end.receipt.threads_abandoned,
    )
    assert_let_go(server, run)


def assert_let_go(server: Server, run: Run) -> None:
    """Nothing of a reader is left: not with the run, not in its log, not in the app."""
    assert run.done.is_set()
    assert {} == run._holders
    assert {} == run.log._renderings
    assert set() == run.log._waiting
    assert 0 == server.app.streams.open
    assert 1 == sum(isinstance(event, RunFinished) for event in run.log.events)


# The ways to leave, each in the two halves of before and at the last moment

WAYS = ("fin", "rst", "half_close", "pipelined", "crlf", "http10", "connection_close")


def ask(way: str, *, stream: bool, words: tuple[str, ...] = ()) -> bytes:
    """The request of a client that will leave in that way."""
    version = "1.0" if way == "http10" else "1.1"
    headers = {"connection": "close"} if way == "connection_close" else {}
    if stream:
        headers["accept"] = "text/event-stream"
    body = json.dumps({"input": words}).encode()
    return request("POST", "/agents/subject/runs", body, version=version, **headers)


async def prepare_to_leave(client: RawClient, way: str) -> None:
    """Send what blinds a server that does not read on while it answers."""
    match way:
        case "pipelined":
            await client.send(request("GET", "/agents"))
        case "crlf":
            await client.send(b"\r\n")
        case _:
            await trio.lowlevel.checkpoint()


async def leave(client: RawClient, way: str) -> None:
    """Leave."""
    match way:
        case "rst":
            client.leave_by_rst()
            await trio.lowlevel.checkpoint()
        case "half_close":
            await client.leave_by_half_close()
        case _:
            await client.leave_by_fin()


# The moments to leave at


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
async def test_leave_while_queued(way: str, *, stream: bool) -> None:
    """A run that nobody waits for any more leaves the queue, and its agent never starts."""
    witness = Witness()
    async with serving(witness, limits=LimitSettings(max_running=1)) as server:
        server.runs.start(
            Start(agent="holder", input=None, delivery="background"), default="continue"
        )
        await wait_all_tasks_blocked()
        before = Footprint.now()
        async with connect(server.urls[0]) as client:
            await client.send(ask(way, stream=stream))
            await wait_until(lambda: server.runs.statistics().queued == 1)
            [run] = subjects(server)
            assert "queued" == run.state
            await prepare_to_leave(client, way)
            await leave(client, way)
            await run.done.wait()
        await wait_until(lambda: server.connections.open == 0)
        await wait_all_tasks_blocked()

        assert before == Footprint.now()
        assert_left(server, run, tasks=0)
        assert not witness.started.is_set()
        assert 0 == server.runs.statistics().queued
        assert ({"client_left": 1} if stream else {}) == server.app.streams.closed


@pytest.mark.parametrize("way", WAYS)
async def test_leave_before_the_agent_has_said_anything(way: str) -> None:
    """An agent that is silent is gone as soon as its reader is."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.send(ask(way, stream=True))
            await witness.started.wait()
            [run] = subjects(server)
            await prepare_to_leave(client, way)
            await leave(client, way)
            await witness.ended.wait()
            await run.done.wait()
        after = await wait_quiet(server)

        assert_left(server, run, tasks=4)
        assert before == after
        assert {"client_left": 1} == server.app.streams.closed


@pytest.mark.parametrize("way", WAYS)
async def test_leave_while_streaming(way: str) -> None:
    """A reader that leaves in the middle takes the agent with it."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.send(ask(way, stream=True, words=("one", "two")))
            await client.wait_for(Custom)
            await client.wait_for(Custom)
            [run] = subjects(server)
            await prepare_to_leave(client, way)
            await leave(client, way)
            await run.done.wait()
        after = await wait_quiet(server)

        assert witness.ended.is_set()
        assert_left(server, run, tasks=4)
        assert before == after
        assert {"client_left": 1} == server.app.streams.closed


@pytest.mark.parametrize("way", WAYS)
async def test_leave_while_waiting_for_json(way: str) -> None:
    """A client that waits for a JSON answer and leaves cancels the run like one that streams."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.send(ask(way, stream=False))
            await witness.started.wait()
            [run] = subjects(server)
            await prepare_to_leave(client, way)
            await leave(client, way)
            await witness.ended.wait()
            await run.done.wait()
        after = await wait_quiet(server)

        assert_left(server, run, tasks=4)
        assert before == after
        assert {} == server.app.streams.closed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("agent_first", [True, False])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
async def test_leave_at_the_very_end(way: str, *, agent_first: bool, stream: bool) -> None:
    """Whoever is first, client or agent, the run has one end and nothing is left of either."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.send(ask(way, stream=stream))
            await witness.started.wait()
            [run] = subjects(server)
            await prepare_to_leave(client, way)
            if agent_first:
                witness.go.set()
            await leave(client, way)
            witness.go.set()
            await run.done.wait()
        after = await wait_quiet(server)

        assert witness.ended.is_set()
        assert run.end is not None
        assert (run.end.outcome, run.end.receipt.cause) in {
            ("success", None),
            ("success", "disconnect"),
            ("cancelled", "disconnect"),
        }
        assert_let_go(server, run)
        assert before == after
        assert (1 if stream else 0) == server.app.streams.closed.total()


async def _open_and_drop(times: int, *, patience: float = PATIENCE) -> None:
    witness = Witness()
    async with serving(witness, patience=patience) as server:
        before = await wait_quiet(server)
        for number in range(times):
            async with connect(server.urls[0]) as client:
                await client.send(ask("fin", stream=number % 5 != 0))
                for _ in range(number % 17):  # so that it happens at every step of the way
                    await trio.lowlevel.checkpoint()
                await leave(client, ("fin", "rst", "half_close")[number % 3])
                if number % 3 == 2:
                    await client.leave_by_fin()
            if number % 50 == 49:
                await wait_quiet(server)
        after = await wait_quiet(server)

        assert before == after
        assert witness.starts == witness.ends
        assert {"cancelled"} == set(server.runs._finished)
        for run in subjects(server):
            assert run.end is not None
            assert "disconnect" == run.end.receipt.cause
            assert_let_go(server, run)
        assert {"client_left"} == set(server.app.streams.closed)


async def test_leave_between_start_and_first_byte() -> None:
    """Opened and dropped at once, time and again, at every step of the way: nothing is left."""
    await _open_and_drop(150)


@pytest.mark.slow
async def test_leave_between_start_and_first_byte_three_thousand_times() -> None:
    """What happens once in a thousand times does not happen either."""
    await _open_and_drop(3_000, patience=600)


# Each way for itself


async def test_half_close_cuts_the_stream() -> None:
    """A client that half-closes has left, though it reads on: it sees a stream that broke off."""
    witness = Witness()
    async with serving(witness) as server, connect(server.urls[0]) as client:
        await client.send(ask("half_close", stream=True, words=("one",)))
        await client.wait_for(Custom)
        await client.leave_by_half_close()
        with pytest.raises(h11.RemoteProtocolError, match="without sending complete message body"):
            await client.finish()
        await witness.ended.wait()


async def test_crlf_after_the_body_harms_nobody() -> None:
    """Old clients send a CRLF after a body: the stream goes on to its end, then it serves more."""
    witness = Witness()
    async with serving(witness) as server, connect(server.urls[0]) as client:
        await client.send(ask("crlf", stream=True, words=("one",)))
        await client.wait_for(Custom)
        await client.send(b"\r\n")
        await wait_all_tasks_blocked(0.01)
        witness.go.set()
        await client.wait_for(RunFinished)
        await client.finish()
        assert client.complete
        await client.send(request("GET", "/health/live"))

        assert b'{"status":"ok"}' == await client.finish()


@pytest.mark.parametrize("way", ["http10", "connection_close"])
@pytest.mark.parametrize("late", [True, False])
async def test_crlf_of_a_client_that_wants_no_more_harms_nobody(way: str, *, late: bool) -> None:
    """Those that send a CRLF after a body are the old ones: it is dropped, whenever it comes."""
    witness = Witness()
    async with serving(witness) as server, connect(server.urls[0]) as client:
        asked = ask(way, stream=True, words=("one",))
        await client.send(asked if late else asked + b"\r\n")
        await client.wait_for(Custom)
        if late:
            await client.stream.send_all(b"\r\n")
            await wait_all_tasks_blocked(0.01)
        witness.go.set()
        await client.wait_for(RunFinished)
        await client.finish()

        assert client.complete
        assert b"" == await client.stream.receive_some()


async def test_pipelined_request_is_served_after_the_stream() -> None:
    """A request sent while a stream is under way waits for its end, and is then answered."""
    witness = Witness()
    async with serving(witness) as server, connect(server.urls[0]) as client:
        await client.send(ask("fin", stream=True, words=("one",)))
        await client.wait_for(Custom)
        await client.stream.send_all(request("GET", "/health/live"))
        await wait_all_tasks_blocked(0.01)
        witness.go.set()
        await client.wait_for(RunFinished)
        await client.finish()
        assert client.complete
        client.turn_to_next("GET")

        assert b'{"status":"ok"}' == await client.finish()


@pytest.mark.parametrize("way", ["http10", "connection_close"])
async def test_stream_of_a_client_that_wants_no_more_ends_with_the_connection(way: str) -> None:
    """Before HTTP/1.1, or told to close, the end of a whole stream is also that of the line."""
    witness = Witness()
    async with serving(witness) as server, connect(server.urls[0]) as client:
        await client.send(ask(way, stream=True, words=("one",)))
        await client.wait_for(Custom)
        witness.go.set()
        await client.wait_for(RunFinished)
        await client.finish()
        assert client.complete
        assert b"" == await client.stream.receive_some()
        await wait_quiet(server)

        [run] = subjects(server)
        assert run.end is not None
        assert "success" == run.end.outcome
        assert {"finished": 1} == server.app.streams.closed
        assert_let_go(server, run)


async def test_http10_client_can_tell_a_broken_stream() -> None:
    """Without chunks an orderly FIN means a whole body: a stream that breaks off ends with RST."""
    witness = Witness()
    async with serving(witness) as server, connect(server.urls[0]) as client:
        await client.send(ask("http10", stream=True, words=("one",)))
        await client.wait_for(Custom)
        await client.leave_by_half_close()
        with pytest.raises(trio.BrokenResourceError):
            await client.finish()


async def test_head_starts_and_holds_nothing() -> None:
    """HEAD of a stream answers with its headers; of a start, that there is no such thing."""
    witness = Witness()
    async with serving(witness) as server, httpx2.AsyncClient(base_url=server.urls[0]) as http:
        run, _ = server.runs.start(
            Start(agent="subject", input=["one"], delivery="background"), default="continue"
        )
        await witness.started.wait()
        answer = await http.head(f"/runs/{run.id}/events")
        refused = await http.head("/agents/subject/runs")

        assert 200 == answer.status_code
        assert "text/event-stream; charset=utf-8" == answer.headers["content-type"]
        assert b"" == answer.content
        assert 405 == refused.status_code
        assert 1 == len(subjects(server))
        assert "running" == run.state
        assert {} == run._holders
        assert 0 == server.app.streams.open


@pytest.mark.parametrize("way", ["fin", "rst"])
@pytest.mark.parametrize("framing", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
async def test_leave_in_the_middle_of_the_body(way: str, framing: bytes) -> None:
    """A request that never came whole starts nothing, and leaves nothing."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            head = request("POST", "/agents/subject/runs").removesuffix(b"\r\n")
            await client.send(head + framing + b"\r\n\r\n10\r\n{")
            await wait_until(lambda: server.connections.open == 1)
            await leave(client, way)
            await wait_until(lambda: server.connections.open == 0)
        after = await wait_quiet(server)

        assert [] == subjects(server)
        assert before == after


@pytest.mark.parametrize("way", ["fin", "rst", "half_close"])
@pytest.mark.parametrize("chunked", [True, False])
async def test_leave_a_stream_that_was_asked_for_with_a_body(way: str, *, chunked: bool) -> None:
    """A GET with a body is odd, but no less watched than any other."""
    witness = Witness()
    async with serving(witness, max_body=1_000) as server:
        before = await wait_quiet(server)
        run, _ = server.runs.start(
            Start(agent="subject", input=["one"], delivery="background"), default="cancel"
        )
        path = f"/runs/{run.id}/events"
        asked = request("GET", path, b"x" * 1_000)
        if chunked:
            asked = request("GET", path, transfer_encoding="chunked") + b"1\r\nx\r\n0\r\n\r\n"
        async with connect(server.urls[0]) as client:
            await client.send(asked)
            await client.wait_for(Custom)
            await leave(client, way)
            await run.done.wait()
        after = await wait_quiet(server)

        assert_left(server, run, tasks=4)
        assert before == after


@pytest.mark.parametrize("way", ["fin", "rst"])
@pytest.mark.parametrize("path", ["/nothing", "/agents", "/agents/subject/runs", "/health/live"])
async def test_leave_in_the_middle_of_a_body_that_nobody_wants(way: str, path: str) -> None:
    """Larger than allowed, or for no route at all, and never whole: it ends with its client."""
    witness = Witness()
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    async with serving(witness, max_body=1_000) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.stream.send_all(request("POST", path, transfer_encoding="chunked"))
            with suppress(trio.BrokenResourceError):
                for _ in range(4):
                    await client.stream.send_all(chunk)
            await leave(client, way)
        after = await wait_quiet(server)

        assert [] == subjects(server)
        assert 0 == server.connections.crashed
        assert before == after


async def test_what_was_pipelined_behind_a_stream_never_starts_once_the_client_has_left() -> None:
    """The second of two starts waits for the first one's stream, and goes with it."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.send(ask("pipelined", stream=True) * 2)
            await witness.started.wait()
            await client.leave_by_fin()
            await witness.ended.wait()
        after = await wait_quiet(server)

        [run] = subjects(server)
        assert_left(server, run, tasks=4)
        assert before == after


# Readers that stall

TALK = 16 * 1024 * 1024  # bytes; more than the kernel holds for both ends together


async def flood(run: RunContext, _input: object, *, witness: Witness) -> None:
    """Say more than sockets hold, and wait for the word to go."""
    try:
        for _ in range(TALK // 64_000):
            run.emit("flood", said="x" * 64_000)
            await trio.lowlevel.checkpoint()
        witness.started.set()
        await witness.go.wait()
    finally:
        witness.ended.set()


async def _stall(url: str, path: str, wait: Callable[[], bool], body: bytes = b"") -> None:
    """Ask for a stream and read nothing of it, until something has happened at the server."""
    method = "POST" if body else "GET"
    async with connect(url, receive_buffer=4096) as client:
        await client.send(request(method, path, body, accept="text/event-stream"))
        await wait_until(wait)


async def test_stalled_reader_is_cut_and_its_run_goes_on() -> None:
    """Who does not read is cut after the write deadline; the run is unharmed, and can be resumed.

    Nobody waits for a slow reader: the agent has said everything long before.
    """
    witness = Witness()
    talker = Agent("talker", partial(flood, witness=witness))
    with trio.fail_after(PATIENCE):
        async with open_server(talker, write_deadline=0.2) as server:
            before = await wait_quiet(server)
            await _stall(
                server.urls[0],
                "/agents/talker/runs",
                lambda: server.app.streams.closed["slow_client"] == 1,
                body=b"{}",
            )
            [run] = server.runs
            assert witness.started.is_set()
            assert not witness.ended.is_set()
            assert "running" == run.state
            assert 1 == server.connections.slow
            assert 0 == server.app.streams.open

            async with (
                httpx2.AsyncClient(base_url=server.urls[0]) as http,
                http.stream(
                    "GET", f"/runs/{run.id}/events", headers={"Last-Event-ID": "2"}
                ) as again,
            ):
                witness.go.set()
                seen = [event.seq async for event in read_events(again.aiter_bytes())]
            after = await wait_quiet(server)

            assert list(range(3, run.log.end + 1)) == seen
            assert run.end is not None
            assert "success" == run.end.outcome
            assert before == after


async def test_run_of_a_stalled_reader_is_cancelled_if_nobody_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cut reader gets a second chance; when that is over the run is cancelled like any other."""
    monkeypatch.setattr(runs_module, "SECOND_CHANCE", 0.05)
    witness = Witness()
    talker = Agent("talker", partial(flood, witness=witness))
    with trio.fail_after(PATIENCE):
        async with open_server(talker, write_deadline=0.2) as server:
            before = await wait_quiet(server)
            await _stall(server.urls[0], "/agents/talker/runs", witness.ended.is_set, body=b"{}")
            after = await wait_quiet(server)

            [run] = server.runs
            assert_left(server, run, tasks=1)
            assert {"slow_client": 1} == server.app.streams.closed
            assert before == after


async def test_stalled_reader_that_resets_has_left() -> None:
    """A client that leaves while a write to it hangs is seen to leave, before any deadline."""
    witness = Witness()
    talker = Agent("talker", partial(flood, witness=witness))
    with trio.fail_after(PATIENCE):
        async with open_server(talker, write_deadline=600.0) as server:
            before = await wait_quiet(server)
            async with connect(server.urls[0], receive_buffer=4096) as client:
                await client.send(stream_run("talker"))
                await witness.started.wait()
                client.leave_by_rst()
                await witness.ended.wait()
            after = await wait_quiet(server)

            [run] = server.runs
            assert_left(server, run, tasks=1)
            assert {"client_left": 1} == server.app.streams.closed
            assert before == after


async def test_stalled_reader_of_a_json_answer_is_cut() -> None:
    """An answer that nobody takes holds its connection no longer than a write may take."""

    @agent
    async def large(_run: RunContext, _input: object) -> str:
        return "x" * TALK

    with trio.fail_after(PATIENCE):
        async with open_server(large, write_deadline=0.2) as server:
            before = await wait_quiet(server)
            async with connect(server.urls[0], receive_buffer=4096) as client:
                await client.send(request("POST", "/agents/large/runs", b"{}"))
                await wait_until(lambda: server.connections.slow == 1)
                await wait_until(lambda: server.connections.open == 0)
            after = await wait_quiet(server)

            [run] = server.runs
            assert run.end is not None
            assert "success" == run.end.outcome
            assert 1 == server.connections.slow
            assert_let_go(server, run)
            assert before == after


# Policies


async def test_with_policy_continue_leaving_means_nothing() -> None:
    """A run with policy `continue` ends by itself, and who comes back by id misses nothing."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.send(
                stream_run("subject", b'{"input": ["one", "two"], "on_disconnect": "continue"}')
            )
            await client.wait_for(Custom)
            run_id, last_id = client.events[0].run_id, "2"
            client.leave_by_rst()
        await wait_until(lambda: server.app.streams.closed["client_left"] == 1)
        run = server.runs.find(run_id)
        assert "running" == run.state

        async with (
            httpx2.AsyncClient(base_url=server.urls[0]) as http,
            http.stream(
                "GET", f"/runs/{run_id}/events", headers={"Last-Event-ID": last_id}
            ) as again,
        ):
            witness.go.set()
            events = [event async for event in read_events(again.aiter_bytes())]
        after = await wait_quiet(server)

        assert list(range(3, run.log.end + 1)) == [event.seq for event in events]
        assert isinstance(events[-1], RunFinished)
        assert ("success", Receipt()) == (events[-1].outcome, events[-1].receipt)
        assert {"client_left": 1, "finished": 1} == server.app.streams.closed
        assert before == after


async def test_with_policy_grace_coming_back_in_time_saves_the_run() -> None:
    """Within the grace a run waits for its reader, and goes on with it as if nothing had been."""
    witness = Witness()
    async with serving(witness) as server:
        async with connect(server.urls[0]) as client:
            await client.send(
                stream_run("subject", b'{"input": ["one"], "on_disconnect": "grace:3600"}')
            )
            await client.wait_for(Custom)
            run = server.runs.find(client.events[0].run_id)
            await client.leave_by_fin()
        await wait_until(lambda: server.app.streams.open == 0)
        assert run._grace is not None
        assert run._grace.function is not None

        async with connect(server.urls[0]) as client:
            await client.send(request("GET", f"/runs/{run.id}/events", last_event_id="2"))
            await wait_until(lambda: server.app.streams.open == 1)
            assert run._grace.function is None
            witness.go.set()
            end = await client.wait_for(RunFinished)

        assert isinstance(end, RunFinished)
        assert "success" == end.outcome
        assert "grace:3600" == str(run.policy)


@pytest.mark.parametrize("grace", ["grace", "grace:0"])
async def test_with_policy_grace_the_run_is_cancelled_when_its_time_is_over(grace: str) -> None:
    """Nobody has come back in time: cancelled, because of the disconnect."""
    witness = Witness()
    async with serving(witness, limits=LimitSettings(grace=0.05)) as server:
        before = await wait_quiet(server)
        async with connect(server.urls[0]) as client:
            await client.send(
                stream_run("subject", json.dumps({"on_disconnect": grace, "input": []}).encode())
            )
            await client.wait_for(RunStarted)
            await client.leave_by_fin()
        await witness.ended.wait()
        after = await wait_quiet(server)

        [run] = subjects(server)
        assert_left(server, run, tasks=4)
        assert before == after


async def test_the_last_reader_decides() -> None:
    """As long as one of several readers is there, the run goes on; the last one takes it along."""
    witness = Witness()
    async with serving(witness) as server:
        before = await wait_quiet(server)
        async with (
            connect(server.urls[0]) as starter,
            connect(server.urls[0]) as second,
            connect(server.urls[0]) as third,
        ):
            await starter.send(ask("fin", stream=True, words=("one",)))
            await starter.wait_for(Custom)
            [run] = subjects(server)
            for client in (second, third):
                await client.send(request("GET", f"/runs/{run.id}/events"))
                await client.wait_for(Custom)
            starter.leave_by_rst()
            await wait_until(lambda: server.app.streams.open == 2)
            await third.leave_by_half_close()
            await wait_until(lambda: server.app.streams.open == 1)
            assert "running" == run.state
            await second.leave_by_fin()
            await witness.ended.wait()
        after = await wait_quiet(server)

        assert_left(server, run, tasks=4)
        assert {"client_left": 3} == server.app.streams.closed
        assert before == after


async def test_background_run_can_be_left_only_after_its_first_reader() -> None:
    """202 and nobody there is no leaving; the first reader that comes and goes is."""
    witness = Witness()
    async with serving(witness) as server, httpx2.AsyncClient(base_url=server.urls[0]) as http:
        answer = await http.post(
            "/agents/subject/runs", json={"background": True, "on_disconnect": "cancel"}
        )
        assert 202 == answer.status_code
        await witness.started.wait()
        run = server.runs.find(answer.json()["id"])
        assert "running" == run.state
        async with connect(server.urls[0]) as client:
            await client.send(request("GET", f"/runs/{run.id}/events"))
            await client.wait_for(RunStarted)
            client.leave_by_rst()
            await witness.ended.wait()
            await run.done.wait()

        assert_left(server, run, tasks=4)


async def test_leaving_a_run_that_asks_a_person_does_not_cancel_it() -> None:
    """Somebody may be thinking about the answer: it can be given later, by whoever comes."""

    @agent
    async def asks(run: RunContext, _input: object) -> None:
        run.emit("answered", answer=await run.ask("Well?"))

    with trio.fail_after(PATIENCE):
        async with open_server(asks) as server:
            async with connect(server.urls[0]) as client:
                await client.send(stream_run("asks"))
                asked = await client.wait_for(InputRequested)
                client.leave_by_rst()
            await wait_until(lambda: server.app.streams.open == 0)
            [run] = server.runs
            assert "waiting" == run.state
            async with httpx2.AsyncClient(base_url=server.urls[0]) as http:
                answer = await http.post(
                    f"/runs/{asked.run_id}/input", json={"answers": {"answer": "yes"}}
                )
                await run.done.wait()

            assert 200 == answer.status_code
            assert run.end is not None
            assert "success" == run.end.outcome
