"""One request, from its head to the end of its response: what listener and exchange promise.

Rules: as in test_listener.py, from which the plain servers come; where runs count, a real server of
ours; and a request by hand only where no socket can be made to fail at the right moment.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from raw import connect, request, stream_run, wait_quiet, wait_until
from test_app import ByHand, make_app
from test_listener import (
    GET,
    GET_10,
    GET_CLOSE,
    Server,
    answer_plain,
    connected,
    finish,
    ours,
    read_body,
    start,
    wait_left,
)
from trio.testing import wait_all_tasks_blocked

from agentsse import RunContext, agent, listener
from agentsse.config import ServerSettings, Settings
from agentsse.dialects.native import NATIVE
from agentsse.listener import Wire
from agentsse.paths import Paths
from agentsse.runs import open_runs
from agentsse.testing import open_server

PATIENCE = 30  # seconds for a whole test
HEAD = b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
EXPECTING = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n"


@agent
async def quick(run: RunContext, _input: Any) -> None:
    """Say a word, and be done."""
    await trio.lowlevel.checkpoint()
    run.emit("word")


@agent
async def silent(_run: RunContext, _input: Any) -> None:
    """Say nothing, for ever."""
    await trio.sleep_forever()


def crashes(server: Server) -> list[str]:
    """What was logged, but for the lifespan that no application here has."""
    return [event for event, _ in server.logged if event != "lifespan_unsupported"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was given to the kernel, call by call."""
    calls: list[bytes] = []
    send = Wire._send_nowait

    def spy(wire: Wire, raw: bytes | memoryview) -> int:
        calls.append(bytes(raw))
        return send(wire, raw)

    monkeypatch.setattr(Wire, "_send_nowait", spy)
    return calls


# --- the head that waits -----------------------------------------------------------------------


async def end_at_once(scope, receive, send) -> None:
    assert scope["type"] == "http"
    await start(send)
    scope["state"]["wire"].write_with_end(b"first ")
    scope["state"]["wire"].write_with_end(b"")
    scope["state"]["wire"].write_with_end(b"last")
    await finish(send)


@pytest.mark.parametrize(
    ("asked", "body"),
    [(GET, b"6\r\nfirst \r\n4\r\nlast\r\n0\r\n\r\n"), (GET_10, b"\r\n\r\nfirst last")],
)
async def test_head_last_chunks_and_end_are_one_call(asked, body, sent) -> None:
    """Nothing is lost of what waits for the end, and the connection serves the next request."""
    async with ours(end_at_once) as server, connected(server) as client:
        for _ in range(2 if asked is GET else 1):
            await client.send(asked)
            assert (await client.read_until(body)).startswith(b"HTTP/1.1 200")
            assert 1 == len(sent)
            sent.clear()


@pytest.mark.parametrize(("asked", "status"), [(HEAD, 200), (GET, 204), (GET, 304)])
async def test_head_without_a_body_does_not_wait(asked, status, sent) -> None:
    """It goes out with an end that has no bytes, and the connection serves the next request."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send, status=status)
        with pytest.raises(RuntimeError, match="expected a response that has started"):
            scope["state"]["wire"].write_with_end(b"x")
        await finish(send)

    async with ours(app) as server, connected(server) as client:
        for _ in range(3):
            await client.send(asked)
            head = await client.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d" % status)
        assert 3 == len(sent)
        assert [] == crashes(server)


async def test_pipelined_answers_are_not_mixed_up() -> None:
    """Each head comes before its own body, whichever way the responses are made."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await (end_at_once if scope["path"] == "/" else answer_plain)(scope, receive, send)

    plain = b"POST /plain HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nword"
    async with ours(app) as server, connected(server) as client:
        await client.send((GET + plain) * 3 + GET_CLOSE)
        told = await client.read_all()

    assert 7 == told.count(b"HTTP/1.1 200")
    pieces = told.split(b"HTTP/1.1 200")[1:]
    assert [b"last\r\n0\r\n\r\n", b"got word"] * 3 + [b"last\r\n0\r\n\r\n"] == [
        piece[-len(b"got word") :]
        if piece.endswith(b"word")
        else piece[-len(b"last\r\n0\r\n\r\n") :]
        for piece in pieces
    ]


async def test_an_empty_first_body_sends_the_head() -> None:
    """As ASGI has it: an application may begin a response long before it has something to say."""
    go = trio.Event()

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await go.wait()
        await finish(send)

    async with ours(app) as server, connected(server) as client:
        await client.send(GET)
        assert (await client.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        go.set()
        assert b"0\r\n\r\n" == await client.read_until(b"0\r\n\r\n")


@pytest.mark.parametrize("headers", [(), [(b"content-length", b"9")]])
async def test_a_response_that_is_cut_has_its_head(headers) -> None:
    """Clients ask again for what had no answer at all: a request must not start twice."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        scope["state"]["wire"].when_left(lambda: told.append("left"))
        await start(send, headers=headers)
        raise ValueError

    told: list[str] = []
    async with ours(app) as server, connected(server) as client:
        await client.send(GET)
        head = await client.read_all()
        await wait_until(lambda: server.counts.open == 0)

        assert head.startswith(b"HTTP/1.1 200")
        assert head.endswith(b"\r\n\r\n")
        assert ["app_crashed"] == crashes(server)
        assert [] == told  # nobody has


@pytest.mark.parametrize("flushed", [True, False])
async def test_an_end_that_is_cancelled_leaves_the_body_torn(flushed) -> None:
    """Before HTTP/1.1 a close would call whole what lacks its last bytes: it is a reset."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send)
        if flushed:
            await scope["state"]["wire"].write(b"half")
        scope["state"]["wire"].write_with_end(b"rest")
        with trio.CancelScope() as scope_:
            scope_.cancel()
            await finish(send)

    async with ours(app) as server, connected(server) as client:
        await client.send(GET_10)
        with pytest.raises(trio.BrokenResourceError):
            await client.read_all()


async def test_a_stream_does_not_meet_a_100_on_its_way(monkeypatch) -> None:
    """An application that answers before a slow peer has taken the 100 waits for it."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send)
        await scope["state"]["wire"].write(b"x")
        await finish(send)

    monkeypatch.setattr(Wire, "_send_nowait", lambda _wire, _raw: 0)  # nothing goes without waiting
    async with ours(app) as server:
        for _ in range(20):  # who is first is chance
            async with connected(server) as client:
                await client.send(EXPECTING)
                await client.read_until(b"HTTP/1.1 100 \r\n")
                assert (await client.read_until(b"0\r\n\r\n")).endswith(b"1\r\nx\r\n0\r\n\r\n")
        assert [] == crashes(server)


async def test_bodies_sent_in_small_pieces_let_others_run() -> None:
    """Whoever sends to a peer that takes everything yields at least once per FAIR_SHARE bytes."""
    times, turns = 10, []

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send)
        async with trio.open_nursery() as nursery:

            async def other() -> None:
                while True:
                    turns.append(1)
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(other)
            for _ in range(times * listener.FAIR_SHARE // 1024):
                await send({"type": "http.response.body", "body": bytes(1024), "more_body": True})
            nursery.cancel_scope.cancel()
        await finish(send)

    async with ours(app) as server, connected(server) as client:
        await client.send(GET_CLOSE)
        assert (await client.read_all()).endswith(b"0\r\n\r\n")

    assert len(turns) >= times - 1


# --- clients that leave ------------------------------------------------------------------------


async def test_who_asks_too_late_is_told_at_once() -> None:
    """The client has left before the application says that it wants to know."""
    told = trio.Event()

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await wait_left(receive)
        scope["state"]["wire"].when_left(told.set)
        assert told.is_set()
        await start(send)  # to nobody

    async with ours(app) as server:
        async with connected(server) as client:
            await client.send(GET)
        await wait_until(lambda: server.counts.open == 0)

    assert told.is_set()
    assert [] == crashes(server)


async def test_who_asked_for_one_request_is_not_told_of_the_next() -> None:
    """A response that is complete has been left by nobody, and the next request asks anew."""
    told: list[str] = []

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/":
            scope["state"]["wire"].when_left(lambda: told.append("first"))
            await end_at_once(scope, receive, send)
        else:
            scope["state"]["wire"].when_left(lambda: told.append("second"))
            await start(send)
            await scope["state"]["wire"].write(b"x")
            await trio.sleep_forever()

    async with ours(app) as server:
        async with connected(server) as client:
            await client.send(GET)
            await client.read_until(b"0\r\n\r\n")
            await client.send(b"GET /second HTTP/1.1\r\nhost: a\r\n\r\n")
            await client.read_until(b"x\r\n")
        await wait_until(lambda: server.counts.open == 0)

    assert ["second"] == told


@pytest.mark.parametrize(
    "asked",
    [
        stream_run("silent"),
        stream_run("silent", version="1.0"),
        request("POST", "/agents/silent/runs", b"{}"),
        request("GET", "/events", accept="text/event-stream"),
        request("POST", "/nowhere", b"{}"),
        request("POST", "/agents/silent/runs", b"{}").replace(b"Length: 2", b"Length: 3"),
    ],
)
async def test_request_and_fin_together_leave_nothing(asked: bytes) -> None:
    """Whichever of both is seen first, no run goes on and no count is off."""
    with trio.fail_after(PATIENCE):
        async with open_server(silent) as server:
            for _ in range(40):
                async with connect(server.urls[0]) as client:
                    await client.stream.send_all(asked)
                    await client.stream.send_eof()
            await wait_quiet(server)

            assert {} == server.app.bodies._held
            assert 0 == server.app.bodies._total == server.app.streams.open
            assert {"cancelled"} >= {run.end and run.end.outcome for run in server.runs}
            assert all({} == run._holders for run in server.runs)
            assert {"client_left"} >= set(server.app.streams.closed)
            assert 0 == server.connections.crashed


@attrs.define(eq=False)
class Leaving(ByHand):
    """A client that leaves while the end of its response is on the way."""

    leave: Callable[[], object] | None = None

    def when_left(self, call: Callable[[], object], /) -> None:
        """Remember whom to tell."""
        self.leave = call

    async def send(self, message: dict[str, Any]) -> None:
        """Take all but the end."""
        if message["type"] == "http.response.body":
            assert self.leave is not None
            self.leave()
            self.scope.cancel()
        await ByHand.send(self, message)


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_a_run_was_not_read_if_the_client_left_before_the_end(accept: str) -> None:
    """What was held for the end has not gone out: who comes back may want to have it."""
    with trio.fail_after(PATIENCE):
        async with open_runs({"quick": quick}) as runs:
            app, hand = make_app(runs), Leaving()
            await hand.ask(app, "POST", "/agents/quick/runs", accept=accept)
            [run] = runs

            assert hand.scope.cancelled_caught
            assert ({"client_left": 1} if "stream" in accept else {}) == app.streams.closed
            assert not run.was_read
            assert {} == run._holders


# --- bodies that are refused -------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 413])
async def test_a_refusal_reaches_who_is_still_sending(status) -> None:
    """The rest is read and dropped, though the application is cancelled: a reset loses answers."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        scope["state"]["wire"].when_left(lambda: told.append("left"))
        asked.set()
        if status == 400:
            await read_body(receive)
        await start(send, status=413, headers=[(b"content-length", b"0")])
        await finish(send)

    told, asked = list[str](), trio.Event()
    garbage = b"no chunk\r\n" if status == 400 else b"100000\r\n"
    async with ours(app) as server, connected(server) as client:
        await client.send(CHUNKED)
        await asked.wait()
        await client.send(garbage + bytes(1 << 20))
        assert (await client.read_all()).startswith(b"HTTP/1.1 %d" % status)
        assert (status == 400) == bool(told)
        for _ in range(3):  # a reset would be met by now
            await client.send(b"more")
            await wait_all_tasks_blocked(0.01)
    assert [] == crashes(server)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_who_lingers_does_not_hold_up_the_end_of_the_server(cancelled, monkeypatch) -> None:
    """A refused connection that is still being read is closed under its reader."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        scope["state"]["wire"].when_left(asked.set)
        await trio.sleep_forever()

    asked = trio.Event()
    monkeypatch.setattr(listener, "LINGER", 10 * PATIENCE)
    with trio.fail_after(PATIENCE):
        async with ours(app, graceful_timeout=0.1) as server, connected(server) as client:
            await client.send(CHUNKED)
            await wait_all_tasks_blocked()
            await client.send(b"no chunk\r\n")
            await client.read_until(b"HTTP/1.1 400")
            assert asked.is_set()
            if cancelled:
                server.scope.cancel()
            else:
                server.stop.set()
            await server.ended.wait()

    assert 0 == server.counts.open


async def test_bodies_that_are_too_many_are_refused_and_counted_no_more() -> None:
    """503, whole, while the peer sends on; then there is room again."""
    settings = Settings(server=ServerSettings(max_bodies=1_000))
    with trio.fail_after(PATIENCE):
        async with open_server(quick, settings=settings) as server:
            async with connect(server.urls[0]) as client:
                head = request(
                    "POST", "/agents/quick/runs", transfer_encoding="chunked", accept="*/*"
                )
                await client.send(head + b"10000\r\n" + bytes(0x10000) + b"\r\n10000\r\n")
                await client.finish()
                assert (503, True) == (client.status, client.complete)
                await client.stream.send_all(bytes(0x1000))
                assert b"" == await client.stream.receive_some()
            await wait_quiet(server)
            assert 0 == server.app.bodies._total

            async with connect(server.urls[0]) as client:
                await client.send(request("POST", "/agents/quick/runs", b"{}"))
                await client.finish()
                assert 200 == client.status


async def test_a_body_that_is_too_large_leaves_no_garbage() -> None:
    """What refuses it does not refer to itself by its traceback."""
    big = partial(request, "POST", "/agents/quick/runs", content_length=str(1 << 30))
    with trio.fail_after(PATIENCE):
        async with open_server(quick) as server:
            for _ in range(2):
                async with connect(server.urls[0]) as client:
                    gc.collect()
                    gc.disable()
                    try:
                        await client.send(big())
                        await client.finish()
                        await wait_until(lambda: server.app.bodies._total == 0)
                    finally:
                        gc.enable()
                    assert 413 == client.status
                await wait_quiet(server)
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                gc.garbage.clear()
                async with connect(server.urls[0]) as client:
                    gc.disable()
                    await client.send(big())
                    await client.finish()
                await wait_quiet(server)
                gc.collect()
                left = [type(each).__name__ for each in gc.garbage]
            finally:
                gc.set_debug(0)
                gc.enable()
                gc.garbage.clear()
            assert "TooLarge" not in left


# --- paths -------------------------------------------------------------------------------------


def test_a_named_segment_that_leads_nowhere_is_gone_back_on() -> None:
    """Also where it is the method that it lacks; and an empty segment is never anything."""
    routes = [
        attrs.evolve(NATIVE.routes[0], path=path, method=method)
        for method, path in (
            ("POST", "/a/b"),
            ("GET", "/a/<x>"),
            ("GET", "/a/b/c/d"),
            ("GET", "/a/<x>/c/<y>/e"),
        )
    ]
    paths = Paths.claimed_by([attrs.evolve(NATIVE, routes=tuple(routes))])
    found = paths.find("HEAD", "/a/b")
    assert found is not None
    assert ("/a/<x>", {"x": "b"}) == (found.route.path, found.parameters)
    found = paths.find("GET", "/a/b/c/d/e")
    assert found is not None
    assert ("/a/<x>/c/<y>/e", {"x": "b", "y": "d"}) == (found.route.path, found.parameters)
    for path in ("", "/", "*", "/a", "/a/", "//b", "/a/b/", "/a//c/d/e", "/a/b/c/d/e/f"):
        assert paths.find("GET", path) is None
        assert () == paths.methods(path)
    assert paths.find("DELETE", "/a/b") is None
    assert ("GET", "HEAD", "OPTIONS", "POST") == paths.methods("/a/b")
