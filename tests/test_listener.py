"""The listener against real sockets on loopback, and against Hypercorn's own ways.

Rules: port 0; every wait under `fail_after`; applications are plain ASGI. A test named `stock_*`
shows that Hypercorn by itself still misbehaves: when one fails, upstream has changed, and the code
that works around it may go. No bytes known to crash a server are kept here; handlers raise instead.
"""

import errno
import random
import socket
import ssl
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import h11
import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve
from hypercorn.utils import LifespanFailureError
from trio.testing import wait_all_tasks_blocked

from agentsse import listener
from agentsse.listener import Counts, ListenerOptions, SlowClient, Wire, open_sockets, serve

App = Callable[..., Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
GET_10 = b"GET / HTTP/1.0\r\nhost: a\r\n\r\n"
GET_CLOSE = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
NOT_SEEN = 0.5  # s; how long something is given to happen that must not


# --- the other end -----------------------------------------------------------------------------


@attrs.define
class Server:
    """A running server, ours or Hypercorn's, and what can be seen of it."""

    port: int = 0
    counts: Counts = attrs.Factory(Counts)
    logged: list[tuple[str, dict[str, Any]]] = attrs.Factory(list)
    stop: trio.Event = attrs.Factory(trio.Event)
    ended: trio.Event = attrs.Factory(trio.Event)
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)

    def log(self, event: str, **facts: Any) -> None:
        """Keep what the server logs."""
        self.logged.append((event, facts))


@asynccontextmanager
async def ours(app: App, **options: Any) -> AsyncIterator[Server]:
    """Serve an application with agentsse's listener."""
    server = Server()
    told = ListenerOptions(port=0, **options)
    sockets, _ = open_sockets(told)
    server.port = sockets[0].getsockname()[1]
    run = partial(
        serve,
        app,
        sockets,
        told,
        shutdown_trigger=server.stop.wait,
        log=server.log,
        counts=server.counts,
    )
    async with _running(server, run):
        yield server


@asynccontextmanager
async def stock(app: App, **options: Any) -> AsyncIterator[Server]:
    """Serve an application with Hypercorn as it comes."""
    server = Server()
    config = Config()
    config.errorlog = None
    for name, value in options.items():
        setattr(config, name, value)
    sock = socket.create_server(("127.0.0.1", 0))
    server.port = sock.getsockname()[1]
    run = partial(
        worker_serve,
        ASGIWrapper(app),
        config,
        sockets=Sockets([], [sock], []),
        shutdown_trigger=server.stop.wait,
    )
    async with _running(server, run):
        yield server


@asynccontextmanager
async def _running(server: Server, run: Callable[..., Awaitable[None]]) -> AsyncIterator[Server]:
    async def task() -> None:
        try:
            with server.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(run)
                    ready.set()
        finally:
            server.ended.set()

    ready = trio.Event()
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            await ready.wait()
            yield server
            server.scope.cancel()


@attrs.define
class Client:
    """A raw TCP client."""

    stream: trio.SocketStream
    held: bytes = b""

    async def send(self, data: bytes) -> None:
        """Send all of `data`."""
        await self.stream.send_all(data)

    async def read_until(self, mark: bytes) -> bytes:
        """Read through `mark`; what comes after it is kept for the next read."""
        with trio.fail_after(20):
            while mark not in self.held:
                more = await self.stream.receive_some()
                assert more, f"expected {mark!r}, got the end after {self.held!r}"
                self.held += more
        at = self.held.index(mark) + len(mark)
        taken, self.held = self.held[:at], self.held[at:]
        return taken

    async def read_all(self) -> bytes:
        """Read through the server's FIN."""
        with trio.fail_after(20):
            while more := await self.stream.receive_some():
                self.held += more
        taken, self.held = self.held, b""
        return taken

    async def request(self, raw: bytes) -> bytes:
        """Send a request to `answer`; return the response."""
        await self.send(raw)
        return await self.read_until(b"0\r\n\r\n")

    def reset(self) -> None:
        """Leave with RST."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    def half_close(self) -> None:
        """Send FIN, and go on reading."""
        self.stream.socket.shutdown(socket.SHUT_WR)


@asynccontextmanager
async def connected(server: Server, *, receive_buffer: int | None = None) -> AsyncIterator[Client]:
    """Connect to a server; the connection is closed at the end."""
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    with sock:
        await sock.connect(("127.0.0.1", server.port))
        yield Client(trio.SocketStream(sock))


# --- applications ------------------------------------------------------------------------------


async def read_body(receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message["body"]
        if not message["more_body"]:
            return body


async def wait_left(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def start(send, *, status: int = 200, headers=()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def finish(send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def answer(scope, receive, send) -> None:
    """Answer with method, path and body, through the wire, in two chunks."""
    assert scope["type"] == "http"
    body = await read_body(receive)
    await start(send)
    await scope["state"]["wire"].write(f"{scope['method']} {scope['path']} ".encode())
    await scope["state"]["wire"].write(body)
    await finish(send)


async def answer_plain(scope, receive, send) -> None:
    """Answer through `send` alone, so that Hypercorn by itself can serve it too."""
    assert scope["type"] == "http"
    body = await read_body(receive)
    await start(send, headers=[(b"content-length", b"%d" % (4 + len(body)))])
    await send({"type": "http.response.body", "body": b"got " + body, "more_body": False})


@attrs.define
class Held:
    """An application that starts a response and holds it until the client leaves or `go` is set."""

    held: trio.Event = attrs.Factory(trio.Event)
    left: trio.Event = attrs.Factory(trio.Event)
    go: trio.Event = attrs.Factory(trio.Event)

    async def __call__(self, scope, receive, send) -> None:
        """Be the ASGI application."""
        if scope["type"] != "http" or scope["path"] != "/":
            await answer_plain(scope, receive, send)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch, receive, nursery.cancel_scope)
            await start(send)
            await send({"type": "http.response.body", "body": b"held", "more_body": True})
            self.held.set()
            await self.go.wait()
            nursery.cancel_scope.cancel()
        if not self.left.is_set():
            await finish(send)

    async def watch(self, receive, scope: trio.CancelScope) -> None:
        """Note that the client has left, and end the response."""
        await wait_left(receive)
        self.left.set()
        scope.cancel()


@attrs.define
class Flood:
    """An application that writes through the wire without end, and keeps what ended it."""

    parked: trio.Event = attrs.Factory(trio.Event)
    done: trio.Event = attrs.Factory(trio.Event)
    error: BaseException | None = None

    async def __call__(self, scope, receive, send) -> None:  # noqa: ARG002 - ASGI's signature
        """Be the ASGI application."""
        assert scope["type"] == "http"
        await start(send)
        try:
            while True:
                await scope["state"]["wire"].write(bytes(65536))
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.done.set()


async def flood_plain(scope, receive, send) -> None:
    assert scope["type"] == "http"
    await start(send)
    while True:  # more at once than two kernel buffers hold, which may grow while it waits
        await send({"type": "http.response.body", "body": bytes(1 << 25), "more_body": True})


async def illegal(scope, receive, send) -> None:
    """Hold `/`; elsewhere switch protocols unasked, which raises in Hypercorn's own cleanup too."""
    assert scope["type"] == "http"
    if scope["path"] == "/":
        await start(send)
        await send({"type": "http.response.body", "body": b"held", "more_body": True})
        await wait_left(receive)
    else:
        await start(send, status=101, headers=[(b"x", b"secret")])


# --- open_sockets ------------------------------------------------------------------------------


def test_accepted_sockets_inherit_the_options() -> None:
    """Nagle is off, and the kernel gives up on a vanished peer, for each accepted connection."""
    (sock,), missing = open_sockets(ListenerOptions(port=0, tcp_user_timeout=7.5))
    with sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            got = {
                name: accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_NODELAY", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            }
            kept_alive = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if sys.platform == "linux":
                got["TCP_USER_TIMEOUT"] = accepted.getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
                )
                got["TCP_KEEPIDLE"] = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)

    assert bool(got.pop("TCP_NODELAY"))
    assert bool(kept_alive)
    wanted = {"TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    if sys.platform == "linux":
        wanted |= {"TCP_USER_TIMEOUT": 7500, "TCP_KEEPIDLE": 10}
        assert [] == missing

    assert wanted == got


def test_options_that_the_platform_lacks_are_named(monkeypatch) -> None:
    """An option that is not there is skipped and named, and the socket listens all the same."""
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    (sock,), missing = open_sockets(ListenerOptions(port=0))
    with sock, socket.create_connection(sock.getsockname()):
        pass

    assert ["TCP_USER_TIMEOUT"] == missing


def test_localhost_is_both_loopbacks_on_one_port() -> None:
    """'localhost' listens on 127.0.0.1, and on ::1 where there is one, with the same port."""
    sockets, _ = open_sockets(ListenerOptions(host="localhost", port=0))
    names = [sock.getsockname()[:2] for sock in sockets]
    for sock in sockets:
        sock.close()

    assert "127.0.0.1" == names[0][0]
    assert {"127.0.0.1", "::1"} >= {address for address, _ in names}
    assert 1 == len({port for _, port in names})


def test_an_address_in_use_is_explained() -> None:
    """The error names address and port and says what to do; nothing is left open."""
    (sock,), _ = open_sockets(ListenerOptions(port=0))
    port = sock.getsockname()[1]
    with sock, pytest.raises(OSError, match=f"127.0.0.1:{port}.*in use.*another port") as caught:
        open_sockets(ListenerOptions(port=port))

    assert errno.EADDRINUSE == caught.value.errno


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_here_is_explained(host) -> None:
    """A name that does not resolve and an address of another machine are both refused in words."""
    with pytest.raises(OSError, match=host.replace(".", r"\.")) as caught:
        open_sockets(ListenerOptions(host=host, port=0))

    assert errno.EADDRNOTAVAIL == caught.value.errno


def test_the_ports_of_a_name_agree_even_if_the_first_choice_is_taken(monkeypatch) -> None:
    """With port 0 another port is tried when the kernel's choice is taken on the other address."""
    real, calls = listener._open_all, []

    def taken_once(addresses, options):
        calls.append(addresses)
        if len(calls) == 1:
            raise OSError(errno.EADDRINUSE, "taken")
        return real(addresses, options)

    monkeypatch.setattr(listener, "_open_all", taken_once)
    sockets, _ = open_sockets(ListenerOptions(host="localhost", port=0))
    for sock in sockets:
        sock.close()

    assert len(calls) == (2 if len(calls[0]) > 1 else 1)


# --- the wire on the wire ----------------------------------------------------------------------


async def test_chunks_of_http_1_1_are_exact() -> None:
    """Each write is one chunk, an empty one is nothing, and Hypercorn's terminator ends it."""
    async with ours(answer) as server, connected(server) as client:
        await client.send(b"POST /p HTTP/1.1\r\nhost: a\r\ncontent-length: 17\r\n\r\n" + b"x" * 17)
        head = await client.read_until(b"\r\n\r\n")
        body = await client.read_until(b"0\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200")
    assert b"\r\ntransfer-encoding: chunked\r\n" in head.lower()
    assert b"\r\nserver:" not in head.lower()
    assert b"8\r\nPOST /p \r\n11\r\n" + b"x" * 17 + b"\r\n0\r\n\r\n" == body


async def test_http_1_0_gets_bare_bytes_and_the_end() -> None:
    """No chunks before HTTP/1.1: the close is the end of the body."""
    async with ours(answer) as server, connected(server) as client:
        await client.send(b"POST /p HTTP/1.0\r\ncontent-length: 2\r\n\r\nxy")
        response = await client.read_all()

    head, _, body = response.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"POST /p xy" == body


async def test_a_late_reader_gets_everything() -> None:
    """What the kernel does not take at once follows, whole and in order."""
    pieces = [random.Random(n).randbytes(60_000) for n in range(64)]
    written = trio.Event()

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send)
        for piece in pieces:
            await scope["state"]["wire"].write(piece)
        written.set()
        await finish(send)

    async with ours(app) as server, connected(server, receive_buffer=4096) as client:
        await client.send(GET_CLOSE)
        await wait_all_tasks_blocked()
        assert not written.is_set()  # the writer is parked with part of a chunk out
        received = await client.read_all()

    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(received)
    body = bytearray()
    while not isinstance(event := parser.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Data):
            body += event.data

    assert b"".join(pieces) == bytes(body)


@pytest.mark.parametrize(
    ("request_bytes", "headers", "status"),
    [
        (GET, [(b"content-length", b"3")], 200),
        (GET.replace(b"GET", b"HEAD"), [], 200),
        (GET, [], 204),
    ],
    ids=["content-length", "HEAD", "204"],
)
async def test_the_wire_is_lent_only_for_open_ended_bodies(request_bytes, headers, status) -> None:
    """A write that would break a response's framing is refused, as is one too early or late."""
    errors = []

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        wire = scope["state"]["wire"]

        async def attempt() -> None:
            try:
                await wire.write(b"no")
            except RuntimeError as error:
                errors.append(error)

        await attempt()
        await start(send, status=status, headers=headers)
        await attempt()
        await send({"type": "http.response.body", "body": b"yes" if headers else b""})
        await attempt()

    async with ours(app) as server, connected(server) as client:
        await client.send(request_bytes.replace(b"host: a", b"host: a\r\nconnection: close"))
        response = await client.read_all()

    assert 3 == len(errors)
    assert response.endswith(b"yes" if headers else b"\r\n\r\n")


async def test_a_stalled_reader_is_aborted_at_the_write_deadline() -> None:
    """Writing fails with SlowClient, the peer gets a reset, nothing is kept for it."""
    app = Flood()
    async with ours(app, write_deadline=0.3) as server, connected(server) as client:
        await client.send(GET)
        await app.done.wait()
        with pytest.raises(trio.BrokenResourceError):
            await client.read_all()

    assert isinstance(app.error, SlowClient)
    assert 1 == server.counts.slow
    assert 0 == server.counts.crashed


async def test_a_writer_notices_a_dead_peer() -> None:
    """A write to a peer that has reset the connection fails, parked or not."""
    app = Flood()
    async with ours(app) as server, connected(server) as client:
        await client.send(GET)
        await wait_all_tasks_blocked()
        client.reset()
        with trio.fail_after(20):
            await app.done.wait()

    assert isinstance(app.error, trio.BrokenResourceError)


# --- the wire by itself ------------------------------------------------------------------------


@asynccontextmanager
async def wire_pair(
    *, write_deadline: float = 20.0
) -> AsyncIterator[tuple[Wire, trio.SocketStream]]:
    left, right = trio.socket.socketpair()
    with left, right:
        wire = Wire(trio.SocketStream(left), write_deadline=write_deadline, counts=Counts())
        wire._begin(chunked=True)
        yield wire, trio.SocketStream(right)


async def fill(wire: Wire) -> None:
    while True:
        await wire.write(bytes(65536))


async def test_a_parked_writer_never_writes_to_the_next_owner_of_its_descriptor() -> None:
    """Aborted while it waits, the writer fails; the descriptor's next owner gets nothing."""
    async with wire_pair() as (wire, _), trio.open_nursery() as nursery:
        outcome = []

        async def writer() -> None:
            try:
                await fill(wire)
            except trio.ClosedResourceError as error:
                outcome.append(error)

        nursery.start_soon(writer)
        await wait_all_tasks_blocked()
        number = wire._socket.fileno()
        wire.abort()
        owner, peer = socket.socketpair()  # the kernel hands out the lowest number: the one freed
        with owner, peer:
            assert number in {owner.fileno(), peer.fileno()}
            owner.setblocking(False)
            peer.setblocking(False)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.ClosedResourceError):
                await wire.write(b"x")
            for end in (owner, peer):
                with pytest.raises(BlockingIOError):
                    end.recv(1)

    assert 1 == len(outcome)


async def test_a_write_cancelled_before_it_began_leaves_the_connection_whole() -> None:
    """Cancelled at its first step a write has sent nothing, and the next one goes out."""
    async with wire_pair() as (wire, peer):
        with trio.CancelScope() as scope:
            scope.cancel()
            await wire.write(b"lost")
        await wire.write(b"kept")
        received = await peer.receive_some()

    assert scope.cancelled_caught
    assert b"4\r\nkept\r\n" == received


async def test_a_write_cancelled_halfway_aborts_the_connection() -> None:
    """A torn chunk is never followed by another."""
    async with wire_pair() as (wire, _):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill, wire)
                await wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            await wire.write(b"more")


async def test_an_empty_write_is_a_checkpoint() -> None:
    """Empty data writes nothing, yields, and can be cancelled."""
    async with wire_pair() as (wire, peer):
        with trio.testing.assert_checkpoints():
            await wire.write(b"")
        await wire.write(b"x")

        assert b"1\r\nx\r\n" == await peer.receive_some()


async def test_small_writes_let_others_run() -> None:
    """Whoever writes without waiting for anything yields at least once per FAIR_SHARE bytes."""
    async with wire_pair() as (wire, peer), trio.open_nursery() as nursery:
        turns = []

        async def other() -> None:
            while True:
                turns.append(1)
                await trio.lowlevel.checkpoint()

        async def drain() -> None:
            while await peer.receive_some():
                pass

        nursery.start_soon(other)
        nursery.start_soon(drain)
        for _ in range(10 * listener.FAIR_SHARE // 100):
            await wire.write(bytes(100))
        nursery.cancel_scope.cancel()

    assert len(turns) >= 9


async def test_a_second_writer_is_told() -> None:
    """Two tasks cannot interleave their chunks: the second one fails, and the first goes on."""
    async with wire_pair() as (wire, _), trio.open_nursery() as nursery:
        nursery.start_soon(fill, wire)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await wire.write(b"x")
        nursery.cancel_scope.cancel()


async def test_a_wire_over_tls_encrypts() -> None:
    """Over TLS the wire goes through the stream, not past it to the socket."""

    def context(protocol: int) -> ssl.SSLContext:
        made = ssl.SSLContext(protocol)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        made.set_ciphers("aNULL:@SECLEVEL=0")  # anonymous: a test of the path needs no certificate
        return made

    left, right = trio.socket.socketpair()
    server = trio.SSLStream(
        trio.SocketStream(left), context(ssl.PROTOCOL_TLS_SERVER), server_side=True
    )
    client = trio.SSLStream(trio.SocketStream(right), context(ssl.PROTOCOL_TLS_CLIENT))
    with left, right, trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.do_handshake)
            nursery.start_soon(client.do_handshake)
        wire = Wire(server, write_deadline=20.0, counts=Counts())
        wire._begin(chunked=True)
        await wire.write(b"sealed")

        assert b"6\r\nsealed\r\n" == await client.receive_some()


# --- containment -------------------------------------------------------------------------------


async def test_a_crash_ends_its_connection_alone() -> None:
    """The crash is logged without anything that was sent; a bystander's stream goes on."""
    async with ours(illegal) as server, connected(server) as bystander:
        await bystander.send(GET)
        await bystander.read_until(b"held")
        async with connected(server) as client:
            await client.send(b"GET /crash?token=canary HTTP/1.1\r\nhost: canary\r\n\r\n")
            with suppress(trio.BrokenResourceError):
                await client.read_all()
        async with connected(server) as client:
            await client.send(GET)
            await client.read_until(b"held")
        with trio.move_on_after(NOT_SEEN) as unbroken:
            await bystander.stream.receive_some()
        crashes = [facts for event, facts in server.logged if event == "connection_crashed"]

    assert unbroken.cancelled_caught
    assert 1 == server.counts.crashed
    assert ["LocalProtocolError"] == [facts["error"] for facts in crashes]
    assert "hypercorn.protocol.h11" in crashes[0]["where"]
    assert "canary" not in str(server.logged)
    assert "secret" not in str(server.logged)


async def test_stock_a_crash_ends_every_connection() -> None:
    """Hypercorn: one connection's exception ends the server."""
    with pytest.RaisesGroup(h11.LocalProtocolError, allow_unwrapped=True, flatten_subgroups=True):
        async with stock(illegal) as server, connected(server) as client:
            await client.send(b"GET /crash HTTP/1.1\r\nhost: a\r\n\r\n")
            with trio.fail_after(20):
                await server.ended.wait()


@pytest.mark.parametrize("error", [OSError, SystemExit, ExceptionGroup])
async def test_whatever_a_connection_raises_is_contained(monkeypatch, error) -> None:
    """Also an OSError, a group, and argparse's way out."""
    raised = ExceptionGroup("g", [ValueError(), OSError()]) if error is ExceptionGroup else error()

    async def boom(self, request) -> None:
        await trio.lowlevel.checkpoint()
        raise raised

    monkeypatch.setattr(listener._Http11, "_create_stream", boom)
    async with ours(answer) as server:
        for _ in range(2):
            async with connected(server) as client:
                await client.send(GET)

                assert b"" == await client.read_all()
        names = [f["error"] for event, f in server.logged if event == "connection_crashed"]

    assert 2 * (["ValueError", "OSError"] if error is ExceptionGroup else [error.__name__]) == names


async def test_a_real_error_beside_cancellation_is_logged(monkeypatch) -> None:
    """When the server is cancelled a connection's own error is not lost, nor the end held up."""
    real = listener._Http11._create_stream

    async def fail_at_the_end(self, request) -> None:
        await real(self, request)
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError

    monkeypatch.setattr(listener._Http11, "_create_stream", fail_at_the_end)
    async with ours(Held()) as server, connected(server) as client:
        await client.send(GET)
        await client.read_until(b"held")
        server.scope.cancel()
        await server.ended.wait()

    assert server.scope.cancelled_caught
    crashes = [facts["error"] for event, facts in server.logged if event == "connection_crashed"]
    assert ["ValueError"] == crashes


async def test_an_application_error_is_logged_by_place() -> None:
    """An exception of the application is answered with 500 and logged without its message."""

    async def app(scope, receive, send) -> None:
        await trio.lowlevel.checkpoint()
        assert scope["type"] == "http"
        raise KeyError(scope["path"])

    async with ours(app) as server, connected(server) as client:
        await client.send(b"GET /canary HTTP/1.1\r\nhost: a\r\n\r\n")
        response = await client.read_all()
    logged = [facts for event, facts in server.logged if event == "app_crashed"]

    assert response.startswith(b"HTTP/1.1 500")
    assert ["KeyError"] == [facts["error"] for facts in logged]
    assert "test_listener" in logged[0]["where"]
    assert "canary" not in str(logged)


# --- the shielded send -------------------------------------------------------------------------


async def test_a_send_to_a_stalled_reader_ends_at_the_write_deadline() -> None:
    """What goes through Hypercorn's own path is bounded too; the application is told to stop."""
    left = trio.Event()

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood_plain, scope, receive, send)
            await wait_left(receive)
            left.set()
            nursery.cancel_scope.cancel()

    async with ours(app, write_deadline=0.3) as server, connected(server) as client:
        await client.send(GET)
        with trio.fail_after(20):
            await left.wait()
        with pytest.raises(trio.BrokenResourceError):
            await client.read_all()

    assert 1 == server.counts.slow


async def test_a_steady_slow_reader_gets_a_large_answer_whole() -> None:
    """Each slice of an answer has its write deadline: all together may take longer than one."""
    deadline, pause = 0.6, 0.03  # s; at 128 KiB a pause it takes 2 s, most of it past the deadline
    size = 8 * 1024 * 1024
    sent = trio.Event()

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await read_body(receive)
        await start(send, headers=[(b"content-length", b"%d" % size)])
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": False})
        sent.set()

    async with (
        ours(app, write_deadline=deadline) as server,
        connected(server, receive_buffer=65536) as client,
    ):
        with trio.fail_after(60):
            await client.send(GET)
            await client.read_until(b"\r\n\r\n")
            taken = len(client.held)
            while taken < size:
                await trio.sleep(pause)  # the reader's slowness, which is what is tested
                until = min(taken + 128 * 1024, size)
                while taken < until:
                    more = await client.stream.receive_some(until - taken)
                    assert more, f"expected {size} bytes, got the end after {taken}"
                    taken += len(more)
            await sent.wait()

    assert 0 == server.counts.slow


async def test_the_end_is_not_held_up_by_a_stalled_reader() -> None:
    """A write under a shield gives way to the end of the server, whatever its own deadline."""
    async with (
        ours(flood_plain, write_deadline=1000, graceful_timeout=0.1) as server,
        connected(server) as client,
    ):
        await client.send(GET)
        await wait_all_tasks_blocked()
        server.stop.set()
        with trio.fail_after(20):
            await server.ended.wait()


async def test_stock_the_end_is_held_up_by_a_stalled_reader() -> None:
    """Hypercorn: a client that has stopped reading makes the server unstoppable."""
    async with stock(flood_plain, graceful_timeout=0.1) as server:
        async with connected(server) as client:
            await client.send(GET)
            await wait_all_tasks_blocked()
            server.stop.set()
            with trio.move_on_after(NOT_SEEN) as unstoppable:
                await server.ended.wait()
            client.reset()
        await server.ended.wait()

    assert unstoppable.cancelled_caught


async def finish_cancelled(scope, receive, send) -> None:
    """Answer, with the last send in a scope that is cancelled already."""
    assert scope["type"] == "http"
    await start(send)
    with trio.CancelScope() as cancelled:
        cancelled.cancel()
        await finish(send)


async def test_a_connection_is_closed_after_a_cancelled_send() -> None:
    """A response whose end was cancelled is torn, and never followed by another one."""
    async with ours(finish_cancelled) as server, connected(server) as client:
        await client.send(GET)

        # The head had been waiting for the end; who gets none at all might ask again.
        head = await client.read_all()
        assert head.lower().endswith(b"\r\ntransfer-encoding: chunked\r\n\r\n")


async def test_stock_a_connection_stays_open_after_a_cancelled_send() -> None:
    """Hypercorn: the body never ends, and the next response would be taken for a chunk of it."""
    async with stock(finish_cancelled) as server, connected(server) as client:
        await client.send(GET)
        await client.read_until(b"\r\n\r\n")
        with trio.move_on_after(NOT_SEEN) as open_still:
            await client.read_all()

    assert open_still.cancelled_caught


async def test_sending_to_nobody_is_a_checkpoint() -> None:
    """An application that sends on after its client has left lets others run, and is cancelled."""
    others = trio.Event()

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send)
        scope["state"]["wire"].abort()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def other() -> None:
                await trio.lowlevel.checkpoint()
                others.set()
                nursery.cancel_scope.cancel()

            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async with ours(app) as server, connected(server) as client:
        await client.send(GET)
        with trio.fail_after(20):
            await others.wait()
        with suppress(trio.BrokenResourceError):
            await client.read_all()


# --- leaving -----------------------------------------------------------------------------------

LEAVE = {
    "FIN": lambda client: client.stream.socket.close(),
    "RST": Client.reset,
    "half-close": Client.half_close,
}
BEHIND = {
    "nothing": b"",
    "a pipelined request": b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n",
    "a CRLF": b"\r\n",
}


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
async def test_leaving_is_seen_on_a_silent_stream(leave, behind, together) -> None:
    """However a client leaves and whatever it sent before, the application is told at once."""
    app = Held()
    async with ours(app) as server, connected(server) as client:
        await client.send(GET + BEHIND[behind] * together)
        await client.read_until(b"held")
        if BEHIND[behind] and not together:
            await client.send(BEHIND[behind])
            await wait_all_tasks_blocked()
        LEAVE[leave](client)
        with trio.fail_after(20):
            await app.left.wait()


@pytest.mark.parametrize("proposal", [b"upgrade: h2c\r\n", b"upgrade: websocket\r\n"])
async def test_leaving_is_seen_after_an_upgrade_was_proposed(proposal) -> None:
    """Nor does a proposal to switch protocols, which pauses h11 by itself, blind the reader."""
    app = Held()
    async with ours(app) as server, connected(server) as client:
        await client.send(GET[:-2] + b"connection: upgrade\r\n" + proposal + b"\r\n")
        await client.read_until(b"held")
        client.half_close()
        with trio.fail_after(20):
            await app.left.wait()


@pytest.mark.parametrize("behind", ["a pipelined request", "a CRLF"])
async def test_stock_leaving_is_not_seen_behind_more_bytes(behind) -> None:
    """Hypercorn: bytes behind a request park the reader, and nobody sees the client leave."""
    app = Held()
    async with stock(app) as server, connected(server) as client:
        await client.send(GET + BEHIND[behind])
        await client.read_until(b"held")
        client.half_close()
        with trio.move_on_after(NOT_SEEN) as unseen:
            await app.left.wait()

    assert unseen.cancelled_caught


async def test_a_client_that_leaves_while_idle_is_let_go_at_once() -> None:
    """A closed connection does not wait for the keep-alive time to give its descriptor back."""
    async with ours(answer, keep_alive=1000) as server:
        async with connected(server) as client:
            await client.request(GET)
            client.half_close()
            await client.read_all()
        await wait_all_tasks_blocked()

        assert 0 == server.counts.open


async def test_stock_a_client_that_leaves_while_idle_is_kept() -> None:
    """Hypercorn: a connection closed by its client stays open until the keep-alive time is over."""
    async with stock(answer_plain, keep_alive_timeout=1000) as server, connected(server) as client:
        await client.send(GET)
        await client.read_until(b"got ")
        await wait_all_tasks_blocked()
        client.half_close()
        with trio.move_on_after(NOT_SEEN) as kept:
            await client.read_all()

    assert kept.cancelled_caught


# --- several requests on one connection --------------------------------------------------------


async def test_pipelined_requests_are_served_in_order() -> None:
    """Requests sent behind one another, bodies and all, are each answered."""
    requests = b"".join(
        b"POST /%d HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nb%02d" % (n, n)
        for n in range(20)
    )
    async with ours(answer) as server, connected(server) as client:
        await client.send(requests)
        answers = [await client.read_until(b"0\r\n\r\n") for _ in range(20)]

    for n, got in enumerate(answers):
        assert got.endswith(b"POST /%d \r\n3\r\nb%02d\r\n0\r\n\r\n" % (n, n))


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_request_pipelined_behind_a_stream_is_served_after_it(at_once) -> None:
    """It waits for the stream's end, not longer, whether it came with the first or later."""
    app = Held()
    behind = b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n"
    async with ours(app) as server, connected(server) as client:
        await client.send(GET + behind if at_once else GET)
        await client.read_until(b"held")
        if not at_once:
            for byte in behind:
                await client.send(bytes([byte]))
        await wait_all_tasks_blocked()
        app.go.set()
        await client.read_until(b"0\r\n\r\n")

        assert (await client.read_until(b"got ")).startswith(b"HTTP/1.1 200")


async def test_a_client_that_fills_the_buffer_behind_a_stream_is_aborted(monkeypatch) -> None:
    """What is held for later is bounded; past the bound the reader is not blind but done."""
    monkeypatch.setattr(listener, "AHEAD_PATIENCE", 0.1)
    app = Held()
    async with ours(app) as server, connected(server) as client:
        await client.send(GET)
        await client.read_until(b"held")
        with suppress(trio.BrokenResourceError):
            await client.send(b"x" * (8 * listener.MAX_AHEAD))
        with trio.fail_after(20):
            await app.left.wait()


async def test_a_long_request_early_by_a_moment_is_served() -> None:
    """A body above the bound, sent behind a response that then ends, is not lost."""
    app = Held()
    body = random.Random(1).randbytes(3 * listener.MAX_AHEAD)
    async with ours(app) as server, connected(server) as client, trio.open_nursery() as nursery:
        await client.send(GET)
        await client.read_until(b"held")
        head = b"POST /next HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
        nursery.start_soon(client.send, head + body)
        await wait_all_tasks_blocked()
        app.go.set()
        await client.read_until(b"0\r\n\r\n")
        await client.read_until(b"got ")
        while len(client.held) < len(body):
            client.held += await client.stream.receive_some()

    assert body == client.held


@pytest.mark.parametrize("blank", [b"\r\n", b"\n", b"\r\n\r\n", b"\r\n" * 4000])
@pytest.mark.parametrize("bytewise", [True, False])
async def test_empty_lines_before_a_request_are_ignored(blank, bytewise) -> None:
    """RFC 9112 2.2; first on the connection, or after the body of the request before."""
    post = b"POST /%d HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx"
    together = blank + post % 1 + blank + post % 2 + blank
    async with ours(answer) as server, connected(server) as client:
        if bytewise and len(blank) < 10:
            for byte in together:
                await client.send(bytes([byte]))
                await trio.lowlevel.checkpoint()
        else:
            await client.send(together)
        answers = [await client.read_until(b"0\r\n\r\n") for _ in range(2)]
        assert b"GET / " in await client.request(GET)

    assert [True, True] == [b"POST /%d " % n in got for n, got in enumerate(answers, start=1)]


async def test_stock_empty_lines_before_a_request_are_an_error() -> None:
    """Hypercorn: a CRLF before a request line is answered with 400."""
    async with stock(answer_plain) as server, connected(server) as client:
        await client.send(b"\r\n" + GET)

        assert (await client.read_all()).startswith(b"HTTP/1.1 400")


# --- the end of a connection -------------------------------------------------------------------


async def answer_and_cancel(scope, receive, send) -> None:
    """Answer, and cancel whoever still sends when told http.disconnect, as quart-trio does."""
    assert scope["type"] == "http"
    async with trio.open_nursery() as nursery:

        async def respond() -> None:
            await start(send)
            await send({"type": "http.response.body", "body": b"x", "more_body": False})

        nursery.start_soon(respond)
        await wait_left(receive)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("request_bytes", [GET_CLOSE, GET_10])
@pytest.mark.parametrize("app", [answer, answer_and_cancel])
async def test_a_connection_to_be_closed_gets_its_end(request_bytes, app) -> None:
    """`Connection: close` and HTTP/1.0 see EOF at once, though the application cancels itself."""
    async with ours(app) as server, connected(server) as client:
        await client.send(request_bytes)

        assert (await client.read_all()).startswith(b"HTTP/1.1 200")


async def test_stock_a_connection_to_be_closed_is_left_open() -> None:
    """Hypercorn: an application that cancels itself on http.disconnect also cancels the close."""
    async with stock(answer_and_cancel) as server, connected(server) as client:
        await client.send(GET_CLOSE)
        await client.read_until(b"0\r\n\r\n")
        with trio.move_on_after(NOT_SEEN) as open_still:
            await client.read_all()

    assert open_still.cancelled_caught


async def test_stock_an_idle_connection_is_kept() -> None:
    """Hypercorn: such an application also cancels the keep-alive time before it has begun."""
    told = {"keep_alive_timeout": 0.1}
    async with stock(answer_and_cancel, **told) as server, connected(server) as client:
        await client.request(GET)
        with trio.move_on_after(NOT_SEEN) as open_still:
            await client.read_all()

    assert open_still.cancelled_caught


@pytest.mark.parametrize("app", [answer, answer_and_cancel])
async def test_an_idle_connection_is_closed_at_keep_alive(app) -> None:
    """Keep-alive serves another request, and ends when none comes, in the application's way too."""
    async with ours(app, keep_alive=0.3) as server, connected(server) as client:
        await client.request(GET)
        await client.request(GET)

        assert b"" == await client.read_all()


async def dribble(client: Client) -> None:
    """Send a byte of a head again and again, until the connection is gone."""
    while True:
        await client.send(b"x")
        await trio.sleep(0.02)


async def test_a_head_must_come_within_keep_alive() -> None:
    """A client that sends its head byte by byte is not given more time for each byte."""
    async with ours(answer, keep_alive=0.3) as server, connected(server) as client:
        with pytest.raises(trio.BrokenResourceError):
            await dribble(client)


async def test_a_silent_stream_outlives_keep_alive() -> None:
    """No read timeout: a client that only listens is never idle."""
    app = Held()
    async with ours(app, keep_alive=0.1) as server, connected(server) as client:
        await client.send(GET)
        await client.read_until(b"held")
        with trio.move_on_after(NOT_SEEN) as open_still:
            await client.read_all()

    assert open_still.cancelled_caught
    assert Config().read_timeout is None


async def test_expect_100_continue() -> None:
    """A client that asks before it sends its body is told to go on."""
    async with ours(answer) as server, connected(server) as client:
        await client.send(
            b"POST /p HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        )

        assert (await client.read_until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await client.send(b"xy")
        assert b"2\r\nxy\r\n" in await client.read_until(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("garbage", "status"),
    [
        (b"garbage\r\n\r\n", b"400"),
        (b"\x16\x03\x01 not for this port", b"400"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 1_000_000, b"431"),
        (b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", b"505"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", b"501"),
    ],
    ids=["no request", "TLS", "endless head", "HTTP/2", "HTTP/2 preface", "tunnel"],
)
async def test_what_is_not_served_is_answered_and_closed(garbage, status) -> None:
    """The client gets the status and the end, even if it is still sending: no RST overtakes it."""
    async with ours(answer) as server, connected(server) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send, garbage)
        response = await client.read_all()

        assert b"HTTP/1.1 " + status == response[:12]


async def test_an_answer_before_the_body_is_read_arrives() -> None:
    """A request refused early gets its answer though it is still being sent."""

    async def refuse(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send, status=413, headers=[(b"content-length", b"0")])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_left, receive)
            await finish(send)

    async with ours(refuse) as server, connected(server) as client, trio.open_nursery() as nursery:
        head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2000000\r\n\r\n"
        nursery.start_soon(client.send, head + bytes(1_900_000))
        response = await client.read_all()

        assert response.startswith(b"HTTP/1.1 413")


POST_10 = b"POST / HTTP/1.0\r\ncontent-length: 2\r\n\r\n1"


@pytest.mark.parametrize("request_bytes", [GET, GET_10, POST_10])
async def test_a_torn_body_does_not_look_whole(request_bytes) -> None:
    """An application that fails inside a body: no terminator in HTTP/1.1, a reset before it."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        await start(send)
        await scope["state"]["wire"].write(b"half")
        raise ValueError

    async with ours(app) as server, connected(server) as client:
        await client.send(request_bytes)
        if request_bytes is GET:
            assert (await client.read_all()).endswith(b"\r\n\r\n4\r\nhalf\r\n")
        else:
            with pytest.raises(trio.BrokenResourceError):
                await client.read_all()


UPGRADES = {
    "h2c": b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: \r\n",
    "websocket": b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
}


@pytest.mark.parametrize("upgrade", UPGRADES)
async def test_an_upgrade_is_answered_as_a_plain_request(upgrade) -> None:
    """Neither HTTP/2 nor WebSocket happens here; the connection stays usable."""
    async with ours(answer) as server, connected(server) as client:
        first = await client.request(GET[:-2] + UPGRADES[upgrade] + b"\r\n")
        second = await client.request(GET)

    assert first.startswith(b"HTTP/1.1 200")
    assert second.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("upgrade", UPGRADES)
async def test_stock_upgrades_happen(upgrade) -> None:
    """Hypercorn: h2c is always on, and a WebSocket handshake reaches the application."""

    async def accept(scope, receive, send) -> None:
        assert scope["type"] != "lifespan"
        await send({"type": "websocket.accept"})

    async with stock(accept) as server, connected(server) as client:
        await client.send(GET[:-2] + UPGRADES[upgrade] + b"\r\n")

        assert (await client.read_until(b"\r\n")).startswith(b"HTTP/1.1 101")


def test_stock_defaults_are_not_ours() -> None:
    """Hypercorn: a backlog of 100, a `server` header, HTTP/2 offered in TLS."""
    config = Config()

    assert (100, True, ["h2", "http/1.1"]) == (
        config.backlog,
        config.include_server_header,
        config.alpn_protocols,
    )


# --- bounds and the end ------------------------------------------------------------------------


async def test_connections_above_the_limit_are_refused_in_http() -> None:
    """Above max_connections the answer is 503 with Retry-After, and the place is freed later."""
    app = Held()
    async with ours(app, max_connections=1) as server:
        async with connected(server) as first:
            await first.send(GET)
            await first.read_until(b"held")
            async with connected(server) as second:
                await second.send(GET)
                refusal = await second.read_all()
        await app.left.wait()
        await wait_all_tasks_blocked()
        async with connected(server) as third:
            await third.send(b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n")
            served = await third.read_until(b"got ")

    assert refusal.startswith(b"HTTP/1.1 503")
    assert b"\r\nretry-after: 1\r\n" in refusal
    assert b"\r\ncontent-type: application/problem+json\r\n" in refusal
    assert served.startswith(b"HTTP/1.1 200")
    assert (1, 2) == (server.counts.refused, server.counts.accepted)


async def test_refusals_do_not_pile_up(monkeypatch) -> None:
    """Refused connections that linger are bounded; the acceptor is never held up by them."""
    monkeypatch.setattr(listener, "MAX_REFUSALS", 2)
    async with ours(answer, max_connections=0) as server, trio.open_nursery() as nursery:
        resets = []

        async def lingerer() -> None:
            async with connected(server) as client:
                try:
                    await client.read_all()
                except trio.BrokenResourceError as error:
                    resets.append(error)
                await trio.sleep_forever()

        for _ in range(5):
            nursery.start_soon(lingerer)
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert 3 == len(resets)
    assert 5 == server.counts.refused


async def test_a_graceful_end_lets_streams_finish() -> None:
    """Idle connections close at once, a stream gets its terminator, nobody is accepted."""
    app = Held()
    async with (
        ours(app, keep_alive=1000, graceful_timeout=1000) as server,
        connected(server) as idle,
        connected(server) as streaming,
        connected(server) as fresh,
    ):
        await idle.send(b"GET /next HTTP/1.1\r\nhost: a\r\n\r\n")
        await idle.read_until(b"got ")
        await streaming.send(GET)
        await streaming.read_until(b"held")
        server.stop.set()
        assert b"" == await idle.read_all()
        assert b"" == await fresh.read_all()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", server.port)
        app.go.set()
        assert b"\r\n0\r\n\r\n" == await streaming.read_all()
        with trio.fail_after(20):
            await server.ended.wait()


@pytest.mark.parametrize("cancelled", [True, False])
async def test_what_does_not_end_is_reset(cancelled) -> None:
    """A stream that outlives the graceful time, or a server that is cancelled, ends in a reset."""
    async with ours(Held(), graceful_timeout=0.1) as server, connected(server) as client:
        await client.send(GET)
        await client.read_until(b"held")
        if cancelled:
            server.scope.cancel()
        else:
            server.stop.set()
        with pytest.raises(trio.BrokenResourceError):
            await client.read_all()
        with trio.fail_after(20):
            await server.ended.wait()

    assert 0 == server.counts.open


async def test_the_lifespan_is_run() -> None:
    """Startup comes before the first request, its state is the requests', shutdown comes last."""
    heard = []

    async def app(scope, receive, send) -> None:
        if scope["type"] == "http":
            heard.append(scope["state"]["started"])
            await answer(scope, receive, send)
            return
        for word in ("startup", "shutdown"):
            heard.append((await receive())["type"])
            scope["state"]["started"] = True
            await send({"type": f"lifespan.{word}.complete"})

    async with ours(app) as server, connected(server) as client:
        await client.request(GET)
        server.stop.set()
        await server.ended.wait()

    assert ["lifespan.startup", True, "lifespan.shutdown"] == heard


async def test_an_application_may_ignore_the_lifespan() -> None:
    """One that returns without a word has no lifespan, and is served."""

    async def app(scope, receive, send) -> None:
        if scope["type"] == "http":
            await answer(scope, receive, send)

    async with ours(app) as server, connected(server) as client:
        await client.request(GET)
        server.stop.set()
        await server.ended.wait()


async def test_a_lifespan_that_fails_closes_the_sockets() -> None:
    """`serve` owns the sockets from the first moment: a failed start leaves none behind."""

    async def app(scope, receive, send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    options = ListenerOptions(port=0)
    sockets, _ = open_sockets(options)
    with pytest.RaisesGroup(LifespanFailureError):
        await serve(app, sockets, options, shutdown_trigger=trio.sleep_forever)

    assert [-1] == [sock.fileno() for sock in sockets]


def descriptors() -> int:
    """Count what this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
async def test_no_descriptor_is_left_behind() -> None:
    """After clients came and went in every manner the process holds what it held before."""
    before = descriptors()
    async with ours(Held()) as server:
        for leave in LEAVE.values():
            for sent in (b"", b"GET", GET, GET + GET, b"garbage\r\n\r\n"):
                async with connected(server) as client:
                    await client.send(sent)
                    await trio.lowlevel.checkpoint()
                    leave(client)
        await wait_all_tasks_blocked()
        server.stop.set()
        await server.ended.wait()

    assert before == descriptors()


# --- fuzz --------------------------------------------------------------------------------------

SEEDS = [
    GET,
    GET_10,
    GET_CLOSE,
    GET * 3,
    GET[:-2] + UPGRADES["h2c"] + b"\r\n",
    GET[:-2] + UPGRADES["websocket"] + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
    b"HEAD /a%20b?c=d#e HTTP/1.1\r\nhost: a\r\naccept: text/event-stream\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello\r\n" + GET,
    b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\na: b\r\n\r\n",
    b"GET http://a/b HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 20_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\ncookie: a=b; c=d\r\nlast-event-id: 7\r\nx:\r\n y\r\n\r\n",
]


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Make requests, most of them spoilt in one to four places; the same for the same seed."""
    dice = random.Random(seed)
    for _ in range(count):
        if dice.random() < 0.1:
            yield dice.randbytes(dice.randrange(200))
            continue
        made = bytearray(dice.choice(SEEDS))
        for _ in range(dice.randrange(5)):
            at, length = dice.randrange(len(made) + 1), dice.choice((1, 1, 2, 8, 64))
            match dice.randrange(5):
                case 0:
                    made[at : at + length] = dice.randbytes(length)
                case 1:
                    del made[at : at + length]
                case 2:
                    made[at:at] = made[at : at + length] * dice.choice((1, 2, 50))
                case 3:
                    made[at:at] = dice.choice(
                        (b"\r\n", b"\n", b"\x00", b":", b" ", b"\xff", b"%", b"0")
                    )
                case _:
                    made[at:at] = dice.choice(SEEDS)[: dice.randrange(200)]
        yield bytes(made)


async def fuzz(count: int, clients: int) -> Server:
    ticked = 0

    async def app(scope, receive, send) -> None:
        nonlocal ticked
        assert scope["type"] == "http"
        if scope["path"] != "/bystander":
            await answer(scope, receive, send)
            return
        await start(send)
        while True:
            await scope["state"]["wire"].write(b"%08d" % ticked)
            ticked += 1
            await trio.sleep(0.005)

    async def attack(seed: int) -> None:
        dice = random.Random(seed)
        for raw in mutations(seed, count // clients):
            async with connected(server) as client:
                with suppress(trio.BrokenResourceError, OSError):
                    await client.send(raw)
                    if dice.random() < 0.2:
                        client.reset()
                    else:
                        client.half_close()
                        await client.read_all()

    async with ours(app) as server, connected(server) as bystander:
        await bystander.send(b"GET /bystander HTTP/1.1\r\nhost: a\r\n\r\n")
        await bystander.read_until(b"\r\n\r\n")
        with trio.CancelScope() as watching:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def watch() -> None:
                    seen = 0
                    while True:
                        assert b"8\r\n%08d\r\n" % seen == await bystander.read_until(
                            b"%08d\r\n" % seen
                        )
                        seen += 1

                async with trio.open_nursery() as attackers:
                    for seed in range(clients):
                        attackers.start_soon(attack, seed)
                await wait_all_tasks_blocked(0.001)
                assert 1 == server.counts.open
                assert not server.ended.is_set()
                watching.cancel()
    assert ticked > 0
    return server


async def test_fuzz_a_bystander_is_unharmed() -> None:
    """2,000 random and mutated requests: every connection ends, another's stream is unbroken."""
    await fuzz(2_000, 8)


@pytest.mark.slow
async def test_fuzz_a_bystander_is_unharmed_at_length() -> None:
    """The same with 200,000."""
    await fuzz(200_000, 16)


# --- many at once ------------------------------------------------------------------------------


async def test_only_so_many_leave_in_one_pass_of_the_loop() -> None:
    """In their order; whoever comes when there is room goes on at once."""
    turnstile, passes, gone = listener._Turnstile(3), 0, []

    async def leave(number: int) -> None:
        await turnstile.pass_through()
        gone.append((number, passes))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turnstile.run)
            for _ in range(2):  # it opens anew once nobody waits
                gone.clear()
                async with trio.open_nursery() as leaving:
                    for number in range(20):
                        leaving.start_soon(leave, number)
                    while len(gone) < 20:
                        passes += 1
                        await trio.lowlevel.checkpoint()
                shares = Counter(at for _, at in gone)

                assert list(range(20)) == sorted(number for number, _ in gone)
                assert max(shares.values()) <= 6  # a pass is counted in the middle of one
                assert len(shares) >= 4
            nursery.cancel_scope.cancel()


async def test_who_waits_to_leave_can_be_cancelled() -> None:
    """The others are not held up by that."""
    turnstile = listener._Turnstile(1)
    with trio.fail_after(20):
        await turnstile.pass_through()
        with trio.move_on_after(0.01) as waited:
            await turnstile.pass_through()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turnstile.run)
            await turnstile.pass_through()
            nursery.cancel_scope.cancel()

    assert waited.cancelled_caught


async def test_accepting_goes_on_when_there_is_room_again(monkeypatch) -> None:
    """Out of descriptors, it says so and tries again; other errors end the server."""
    accept, failures = trio.SocketListener.accept, [errno.EMFILE, errno.ENFILE]

    async def scarce(self: trio.SocketListener) -> trio.SocketStream:
        stream = await accept(self)
        if failures:
            stream.socket.close()
            raise OSError(failures.pop(), "none left")
        return stream

    monkeypatch.setattr(trio.SocketListener, "accept", scarce)
    async with ours(answer) as server:
        for _ in range(2):
            async with connected(server) as client:
                with suppress(trio.BrokenResourceError):
                    assert b"" == await client.read_all()
        async with connected(server) as client:
            assert (await client.request(GET)).startswith(b"HTTP/1.1 200")
        failed = [facts["error"] for event, facts in server.logged if event == "accept_failed"]

    assert ["OSError", "OSError"] == failed
