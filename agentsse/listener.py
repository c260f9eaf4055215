"""Listening sockets, connections and the wire: Hypercorn made safe for streams that last for hours.

Knows sockets, Hypercorn's HTTP/1.1 machinery and ASGI scopes; it is the only importer of hypercorn.
Must never know runs, logs, dialects or Quart.

Theory of operation. Hypercorn parses requests, calls the ASGI application and frames the head and
the end of a response (`H11Protocol`, `HTTPStream`). Its own way of holding a connection
(`hypercorn.trio.tcp_server.TCPServer`) lets one connection's exception end the process, waits for
ever for a peer that has stopped reading, and goes blind when a second request is pipelined behind
a stream. So the connection here is ours; nothing of Hypercorn is patched, only used or subclassed:

- One task per connection reads and parses. It goes on reading while a response is under way: a FIN
  or RST that nobody reads is a client that never left. Its receive carries the idle deadline.
- What a connection raises ends that connection, is logged without a byte of the request, and goes
  no further. Only cancellation and KeyboardInterrupt pass.
- Between the start and the end of a response the application writes through the `Wire`, found at
  `scope["state"]["wire"]`: to the socket, in one system call, past Hypercorn and h11. The head goes
  out with the first of these writes, and the end may take the last one along.
- A client that leaves is told by a call, `Wire.when_left`: to wait for `http.disconnect` would take
  a task for every stream.
- HTTP/1.1 and 1.0 only. An upgrade (h2c, WebSocket) is answered as a plain request, which RFC 9110
  7.8 allows; a proxy terminates HTTP/2.

Whatever waits for a peer has a deadline, and past it the socket is aborted.
"""

import errno
import json
import os
import socket
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from math import inf
from typing import Any, Final, Never, final
from urllib.parse import unquote

import attrs
import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.logging import Logger
from hypercorn.protocol.events import (
    Body,
    EndBody,
    Event as StreamEvent,
    Response,
    StreamClosed,
)
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import (
    ASGIFramework,
    ConnectionState,
    H11SendableEvent,
    HTTPScope,
    LifespanState,
)
from hypercorn.utils import (
    build_and_validate_headers,
    parse_socket_addr,
    repr_socket_addr,
    suppress_body,
)

Log = Callable[..., None]  # log(event, **facts), as a bound structlog method

MAX_RECEIVE: Final = 64 * 1024  # bytes; one read of a request body, Hypercorn's own figure
MAX_AHEAD: Final = 64 * 1024  # bytes of pipelined requests held while a response is under way
MAX_UNREAD: Final = 256 * 1024  # bytes of a body that the application has not received yet
AHEAD_PATIENCE: Final = 1.0  # s for the response to end once MAX_AHEAD is full; see _wait_for_turn
LINGER: Final = 2.0  # s to read on after an early FIN, so that the peer gets the answer and no RST
MAX_REFUSALS: Final = 64  # refused connections that may linger at once; those above get an RST
FAIR_SHARE: Final = 16 * 1024  # bytes written between two yields: about 1 ms of small writes
FULL_ERRORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
FULL_PAUSE: Final = 0.1  # s to the next try to accept, when the system has no room for a connection
LEAVE_TOGETHER: Final = 100  # clients in one pass of the loop; 20 to 30 ms for all that it takes
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST, drops buffers


class SlowClient(Exception):
    """A peer that took too little within the write deadline; its connection has been aborted."""


@attrs.frozen
class ListenerOptions:
    """What a listener is told; every bound has a default."""

    host: str = "127.0.0.1"
    """A name or an address of this machine; loopback because nothing here authenticates."""

    port: int = 8080
    """TCP port; 0 lets the kernel choose."""

    backlog: int = 4096
    """Connections the kernel holds before accept; a deploy brings every client back at once."""

    write_deadline: float = 10.0
    """Seconds for one write; a live peer on a bad mobile link takes 64 KiB in less."""

    tcp_user_timeout: float = 20.0
    """Seconds sent bytes may stay unacknowledged; above the write deadline, which comes first."""

    keep_alive: float = 5.0
    """Seconds a connection may be idle, and seconds from accept to a whole request head."""

    max_header_bytes: int = 16 * 1024
    """Bytes of an incomplete request head before 431; what node, nginx and h11 settle on."""

    max_connections: int | None = None
    """Open connections, refused with 503 above; None leaves it to the descriptor limit."""

    graceful_timeout: float = 3.0
    """Seconds between the shutdown trigger and the abort of what is still open."""


@attrs.define
class Counts:
    """Numbers for operators, kept by `serve` in the value it is given."""

    open: int = 0
    accepted: int = 0
    refused: int = 0
    crashed: int = 0
    slow: int = 0


# --- sockets -----------------------------------------------------------------------------------


def open_sockets(options: ListenerOptions) -> tuple[list[socket.socket], list[str]]:
    """Listen on every address of `options.host`, with one port for all of them.

    Accepted sockets inherit the options set here, so a peer that has vanished is given up by the
    kernel within `tcp_user_timeout` even when nothing above looks at it.

    Returns:
        The listening sockets, which the caller owns until it hands them to `serve`, and the names
        of the socket options that this platform lacks.

    Raises:
        OSError: An address cannot be had; the message names it and says what to do. Nothing is
            left open.
    """
    addresses = _resolve(options.host)
    attempts = 8 if options.port == 0 and len(addresses) > 1 else 1
    while True:
        try:
            return _open_all(addresses, options)
        except OSError as error:
            # With port 0 the kernel's choice for the first address may be taken on the second.
            attempts -= 1
            if attempts == 0 or error.errno != errno.EADDRINUSE:
                raise


def _resolve(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Find the addresses of a host; 'localhost' is both loopbacks, whatever /etc/hosts says."""
    names = ["127.0.0.1", "::1"] if host == "localhost" else [host]
    found: dict[tuple[socket.AddressFamily, str], None] = {}
    for name in names:
        try:
            answers = socket.getaddrinfo(
                name, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except socket.gaierror as error:
            message = f"expected a host name or an address of this machine, got {host!r}"
            raise OSError(errno.EADDRNOTAVAIL, f"{message}: {error.strerror}") from error
        for family, _, _, _, address in answers:
            found[family, str(address[0])] = None
    return list(found)


def _open_all(
    addresses: list[tuple[socket.AddressFamily, str]], options: ListenerOptions
) -> tuple[list[socket.socket], list[str]]:
    port = options.port
    missing: dict[str, None] = {}
    opened: list[socket.socket] = []
    absent: OSError | None = None
    with ExitStack() as undo:
        for family, address in addresses:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
                undo.callback(sock.close)
                missing.update(dict.fromkeys(_set_options(sock, options)))
                sock.bind((address, port))
                # Listen here and now: on Linux a bind is exclusive only once somebody listens.
                sock.listen(options.backlog)
            except OSError as error:
                told = OSError(error.errno, _explain(error, address, port))
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise told from error
                absent = told  # a machine without IPv6 has no ::1; the other address will do
            else:
                port = sock.getsockname()[1]
                opened.append(sock)
        if not opened and absent is not None:
            raise absent
        undo.pop_all()
    return opened, list(missing)


def _set_options(sock: socket.socket, options: ListenerOptions) -> Iterator[str]:
    """Set what accepted sockets shall inherit; yield the names of what this platform lacks."""
    if os.name == "posix":  # elsewhere the option lets another process steal the port
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # or it takes IPv4's place
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_USER_TIMEOUT", round(options.tcp_user_timeout * 1000)),  # ms
        (idle, 10),  # s of silence before the first probe: a silent stream's peer may be unplugged
        ("TCP_KEEPINTVL", 5),  # s between probes
        ("TCP_KEEPCNT", 3),  # probes: 25 s from the last byte to the end
    ):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        except (AttributeError, OSError):
            yield name


def _explain(error: OSError, address: str, port: int) -> str:
    advice = {
        errno.EADDRINUSE: "stop the server that has it, or choose another port",
        errno.EACCES: "choose a port above 1023, or run with the privilege to bind this one",
        errno.EADDRNOTAVAIL: "choose an address of this machine",
    }.get(error.errno or 0, "choose another address or port")
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return f"cannot listen on {where}: {error.strerror}; {advice}"


# --- the wire ----------------------------------------------------------------------------------


@final
class Wire:
    """A connection's way out, for a response that streams.

    `write` is the application's, between `http.response.start` (without content-length) and the
    last `http.response.body`. It needs no lock against Hypercorn: in that span Hypercorn writes
    only what the application sends, and the reader's own answers (100, 4xx) are sent only before a
    response has started. One task writes at a time; a second is told BusyResourceError.
    """

    def __init__(
        self,
        stream: "trio.SocketStream | trio.SSLStream[trio.SocketStream]",
        *,
        write_deadline: float,
        counts: Counts,
    ) -> None:
        self._stream = stream
        transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
        self._socket = transport.socket
        self._direct = transport is stream and os.name == "posix"  # os.write takes no TLS
        self._write_deadline = write_deadline
        self._counts = counts
        self._chunked: bool | None = None  # None: no response body is under way
        self._busy = False
        self._unyielded = 0  # bytes since the last yield
        self._held: list[bytes] = []  # goes out with the next bytes
        self._leave: Callable[[], bool] | None = None
        self._is_left = False

    def when_left(self, call: Callable[[], bool]) -> None:
        """End with the client: if it leaves before the response ends, `call` is called, once.

        It is sync, and says whether the response will now end by itself; if not, everything that
        serves the connection is cancelled. Who asks too late is called at once, and has nothing
        more to do. To leave is to close, to reset, or to send FIN behind the request: who only
        half-closes is not told from who is gone. The next request asks anew; who does not ask is
        told `http.disconnect`, as in ASGI.
        """
        if self._is_left:
            call()
        else:
            self._leave = call

    async def write(self, data: bytes | memoryview) -> None:
        """Send one chunk of the response body, framed as the request's HTTP version asks.

        A checkpoint on every path: always a point of cancellation, and a yield at least once per
        FAIR_SHARE bytes. A yield after every write would cost more than the write (3.6 us); the
        writers of small chunks wait for news between two of them and yield there.

        Args:
            data: Bytes of the body, better not above 64 KiB: one write deadline is for all of it.
                Empty data writes no chunk (an empty one would end the body), but what is held: the
                head.

        Raises:
            SlowClient: The peer took too little within the write deadline; connection aborted.
            trio.BrokenResourceError: The peer is gone.
            trio.ClosedResourceError: The connection was closed or aborted on our side.
            RuntimeError: No response body of unknown length is under way.
            trio.Cancelled: Before a byte was taken by the kernel the connection is as it was;
                after that it is torn inside a chunk, so it is aborted.
        """
        if self._chunked is None:
            raise RuntimeError(
                "expected a response that has started, not ended, with a body and without"
                " content-length; send http.response.start first",
            )
        if data:
            await self._send(self._framed(data))
        elif self._held:
            await self._send(b"")
        else:
            await trio.lowlevel.checkpoint()

    def write_with_end(self, data: bytes) -> None:
        """Have the end of the body take a last chunk along: one system call for both.

        Like `write` otherwise; nothing is said of a peer that is gone by then.
        """
        if self._chunked is None:
            raise RuntimeError("expected a response that has started, not ended, with a body")
        if data:
            self._held.append(bytes(self._framed(data)))

    def _framed(self, data: bytes | memoryview) -> bytes | memoryview:
        return b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if self._chunked else data

    def abort(self) -> None:
        """Reset the connection at once; what the kernel still held for the peer is dropped.

        Idempotent. Tasks that read from or write to the connection are woken with
        trio.ClosedResourceError, and the application is told http.disconnect.
        """
        if self._socket.fileno() != -1:
            with suppress(OSError):  # the peer was faster
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self._socket.close()

    def _close(self, *, half: bool = False) -> None:
        """Send FIN, after what was written; but RST where FIN would call a torn body whole.

        With `half` the peer may still be read from. Idempotent.
        """
        if self._chunked is False:
            self.abort()  # before HTTP/1.1 the body has no other end than FIN
        elif half:
            with suppress(OSError):  # it is gone, and the reader will see that too
                self._socket.shutdown(socket.SHUT_WR)
        else:
            self._socket.close()

    def _begin(self, *, chunked: bool) -> None:
        self._chunked = chunked

    def _end(self) -> None:
        self._chunked = None

    def _hold(self, head: bytes) -> None:
        """Keep the head of a response for the first bytes behind it."""
        self._held.append(head)

    def _settle(self) -> None:
        """Know nobody who wants to hear that the client leaves: the response is complete."""
        self._leave = None

    async def _cut(self) -> None:
        """Send what is held of a response that gets no end, and tell nobody that they were left.

        Clients may send a request again that has had no answer at all, and start it twice.
        """
        self._settle()
        if self._held:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, SlowClient):
                await self._send(b"")

    def _tell_left(self) -> bool:
        """Tell who wants to end with the client, if somebody does; and whether that takes force."""
        self._is_left = True
        leave, self._leave = self._leave, None
        return leave is not None and not leave()

    async def _send(self, raw: bytes | memoryview) -> None:
        """Send bytes as they are; all that `write` says of errors and cancellation holds."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if rest := self._send_at_once(raw):
            await self._send_rest(rest)
        else:
            await self._yield_if_due()

    async def _yield_if_due(self) -> None:
        """Let others run, once in FAIR_SHARE bytes that went out without waiting."""
        if self._unyielded >= FAIR_SHARE:
            self._unyielded = 0
            # Not cancellable: all was sent, and an exception would say that it was not.
            await trio.lowlevel.cancel_shielded_checkpoint()

    def _send_at_once(self, raw: bytes | memoryview) -> memoryview | None:
        """Send what is held, and these bytes, as far as the kernel takes them; return the rest."""
        if self._busy:
            raise trio.BusyResourceError("another task is writing to this connection")
        if self._held:
            raw = b"".join((*self._held, raw))
            self._held.clear()
        sent = self._send_nowait(raw) if self._direct and raw else 0
        self._unyielded += sent
        return memoryview(raw)[sent:] if sent < len(raw) else None

    def _send_nowait(self, raw: bytes | memoryview) -> int:
        """Give the kernel what it takes without waiting; return how many bytes that was."""
        # Asked for here, in the step that writes: a number kept from before may by now be the
        # descriptor of somebody else's connection.
        descriptor = self._socket.fileno()
        if descriptor == -1:
            raise trio.ClosedResourceError("this connection was closed on our side")
        try:
            return os.write(descriptor, raw)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(f"the peer is gone: {error.strerror}") from error

    async def _send_rest(self, rest: memoryview) -> None:
        self._busy = True
        self._unyielded = 0
        try:
            with trio.move_on_after(self._write_deadline) as scope:
                await self._stream.send_all(rest)
        except BaseException:
            self.abort()  # how much of the chunk went out is unknown
            raise
        finally:
            self._busy = False
        if scope.cancelled_caught:
            self.abort()
            self._counts.slow += 1
            raise SlowClient(
                f"expected the peer to take {len(rest)} bytes within {self._write_deadline} s;"
                " connection aborted",
            )


# --- HTTP/1.1 ----------------------------------------------------------------------------------


_NO_TASKS: Final = TaskGroup()  # Hypercorn's way to open a nursery: it starts no task of ours


@final
class _Http11(H11Protocol):
    """Hypercorn's HTTP/1.1 without upgrades, and with a reader that is never parked."""

    connection: h11.Connection

    def __init__(
        self,
        listener: "_Listener",
        nursery: trio.Nursery,
        state: ConnectionState,
        *,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
        send_lock: trio.Lock,
        wire: Wire,
        wake_reader: Callable[[], None],
    ) -> None:
        super().__init__(
            listener.app,
            listener.config,
            listener.context,
            _NO_TASKS,
            state,
            False,
            client,
            server,
            send,
        )
        self._method = "GET"
        self._send_lock = send_lock
        self._wire = wire
        self._wake_reader = wake_reader
        self._listener = listener
        self._nursery = nursery

    def is_peer_sending(self) -> bool:
        """Tell whether more of the request, or anything at all after an error, may come."""
        return self.connection.their_state in {h11.SEND_BODY, h11.ERROR}

    def is_answering(self) -> bool:
        """Tell whether a whole request is being answered."""
        return self.stream is not None and self.connection.their_state is not h11.SEND_BODY

    async def handle(self, event: Event) -> None:
        """Take what the reader got: bytes, b"" for the peer's FIN, or the end of the connection."""
        match event:
            case RawData() if self._is_last_request():
                await trio.lowlevel.checkpoint()  # what comes behind it is for nobody
            case RawData(data=data):
                fresh = self.connection.their_state is h11.IDLE
                if data and fresh and not self.connection.trailing_data[0]:
                    data = data.lstrip(b"\r\n")  # RFC 9112 2.2: empty lines before a request
                    if not data:
                        await trio.lowlevel.checkpoint()
                        return
                self.connection.receive_data(data)
                await self.handle_buffered()
            case _:
                await super().handle(event)

    async def handle_buffered(self) -> None:
        """Act on what h11 makes of the bytes it holds, until it needs more or our answer first.

        Only the reader calls this, so requests and bodies cannot overtake one another.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # the read before it has yielded
        while not self._is_last_request():
            if self.connection.they_are_waiting_for_100_continue:
                headers = self.config.response_headers("h11")
                await self._send_h11_event(
                    h11.InformationalResponse(status_code=100, headers=headers)
                )
            try:
                event = self.connection.next_event()
            except h11.RemoteProtocolError as error:
                await self._refuse(error.error_status_hint)
                return
            match event:
                case h11.Request():
                    await self.send(Updated(idle=False))
                    if not event.http_version.startswith(b"1."):
                        await self._refuse(505)
                        return
                    if event.method == b"CONNECT":  # a 2xx to it would turn h11 into a tunnel
                        await self._refuse(501)
                        return
                    await self._create_stream(event)
                case h11.Data() if self.stream is not None:
                    await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
                case h11.EndOfMessage() if self.stream is not None:
                    await self.stream.handle(EndBody(stream_id=STREAM_ID))
                case h11.PAUSED:
                    # The next request waits for the end of this response; the reader does not.
                    if not await self._wait_for_turn():
                        return
                case _:  # NEED_DATA, ConnectionClosed, or a body nobody is there for
                    return

    def _is_last_request(self) -> bool:
        """Tell whether the request is whole, and its peer has said that no other will follow.

        Old clients send a CRLF behind a body all the same, and h11 takes that for an error.
        """
        return self.connection.their_state in {h11.MUST_CLOSE, h11.CLOSED}

    async def stream_send(self, event: StreamEvent) -> None:
        """Send what the application's side made, and lend the wire while a body is under way."""
        if isinstance(event, EndBody):
            await trio.lowlevel.checkpoint_if_cancelled()  # a body without its end stays torn
            self._wire._end()  # noqa: SLF001 - one class in two halves; the public half is the app's
        await super().stream_send(event)
        if isinstance(event, EndBody):
            self._wire._settle()  # noqa: SLF001 - as above
        if isinstance(event, Response) and self._is_open_ended(event):
            # Not lent if h11 refused the head, because the reader has just answered with an error.
            # h11 frames by the same rule: chunks from 1.1 on, before that the close is the end.
            version = self.connection.their_http_version or b"1.0"
            self._wire._begin(chunked=version >= b"1.1")  # noqa: SLF001 - as above

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        """Send an event or, if cancelled, have h11 not know of it; past this it goes out whole.

        A response's head waits for what is behind it, which is its end at the latest; but not where
        a 100 is still on its way to a slow peer, for the wire would be lent while it is in use.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not isinstance(event, h11.Response):
            await super()._send_h11_event(event)
            return
        try:
            head = self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
        else:
            assert head is not None
            if self._send_lock.locked():
                await self.send(RawData(data=head))
            else:
                self._wire._hold(head)  # noqa: SLF001 - as above

    def _is_open_ended(self, response: Response) -> bool:
        return (
            self.connection.our_state is h11.SEND_BODY
            and not suppress_body(self._method, response.status_code)
            and all(name.lower() != b"content-length" for name, _ in response.headers)
        )

    async def _refuse(self, status: int) -> None:
        if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            await self._send_error_response(status)
        await self.send(Closed())

    async def _wait_for_turn(self) -> bool:
        """Tell whether to parse on, given that a request is buffered behind a running response.

        Up to MAX_AHEAD the answer is no, and the reader goes on to read, so that it sees the peer
        leave. Above it the reader must stop. A client that sends a long request the moment it has
        the whole response may be a scheduler's turn ahead of us, so it is given AHEAD_PATIENCE;
        one that fills the buffer behind a stream that goes on is aborted.
        """
        if len(self.connection.trailing_data[0]) <= MAX_AHEAD:
            await trio.lowlevel.checkpoint_if_cancelled()
            return False
        await self.can_read.clear()
        with trio.move_on_after(AHEAD_PATIENCE):
            await self.can_read.wait()
            return True
        self._wire.abort()
        return False

    async def _create_stream(self, request: h11.Request) -> None:
        """Start the application for a request, whatever upgrade it proposes."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._method = request.method.decode("ascii").upper()
        path, _, query = request.target.partition(b"?")
        scope: HTTPScope = {
            "type": "http",
            "http_version": request.http_version.decode("ascii"),
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": self._method,
            "scheme": "https" if self.ssl else "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": self.client,
            "server": self.server,
            "state": self.connection_state.copy(),  # type: ignore[typeddict-item]  # as Hypercorn does
            "extensions": {},
        }
        exchange = _Exchange(
            self._listener.application,
            scope,
            self.stream_send,
            self._wire,
            cancel=self._nursery.cancel_scope.cancel,
            report=self._listener.report,
        )
        self.stream = exchange  # type: ignore[assignment]  # in the place of Hypercorn's HTTPStream
        self._nursery.start_soon(exchange.run)
        self.keep_alive_requests += 1

    async def _maybe_recycle(self) -> None:
        """End the response: make the connection ready for the next request, or close it."""
        await self._close_stream()
        both = (self.connection.our_state, self.connection.their_state)
        if self.context.terminated.is_set() or both != (h11.DONE, h11.DONE):
            await self.can_read.set()
            await self.send(Closed())
            return
        # A new h11 machine instead of start_next_cycle: what came after the body may begin with the
        # CRLF of an old client, which h11 would take for a request line.
        ahead = self.connection.trailing_data[0].lstrip(b"\r\n")
        self.connection = h11.Connection(
            h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size
        )
        if ahead:
            self.connection.receive_data(ahead)
            self._wake_reader()
        await self.can_read.set()
        await self.send(Updated(idle=True))


@final
class _Exchange:
    """One request and its response: the application's ASGI on one side, Hypercorn's events on ours.

    It is what Hypercorn's HTTPStream is for, without a channel, and without a task that waits for
    the client to leave.
    """

    idle = False  # H11Protocol asks

    def __init__(
        self,
        app: ASGIFramework,
        scope: HTTPScope,
        send: Callable[[StreamEvent], Awaitable[None]],
        wire: Wire,
        *,
        cancel: Callable[[], None],
        report: Callable[[str, BaseException | None], None],
    ) -> None:
        self._app = app
        self._scope = scope
        self._send = send
        self._wire = wire
        self._cancel = cancel
        self._report = report
        self._body: list[bytes] = []
        self._unread = 0
        self._is_whole = False  # the request has come to its end, ...
        self._is_told = False  # ... and the application knows
        self._is_closed = False
        self._status: int | None = None
        self._is_complete = False  # the response
        self._news: trio.Event | None = None  # for the application, while it waits
        self._room: trio.Event | None = None  # for the reader, while it does

    async def run(self) -> None:
        """Run the application to its end, and the response to its own."""
        try:
            await self._app(self._scope, self._receive, self._respond)  # type: ignore[arg-type]
        except* (Exception, SystemExit) as crash:  # noqa: BLE001 - the connection outlives it
            self._report("app_crashed", crash)
        if self._is_closed:
            return
        if self._status is None:
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            await self._respond({"type": "http.response.start", "status": 500, "headers": headers})
            await self._respond({"type": "http.response.body"})
        elif not self._is_complete:  # no last chunk shall call it whole
            await self._wire._cut()  # noqa: SLF001 - as above
            await self._send(StreamClosed(stream_id=STREAM_ID))

    async def handle(self, event: StreamEvent) -> None:
        """Take what the reader has parsed; waits while the application has too much unread."""
        await trio.lowlevel.checkpoint_if_cancelled()
        match event:
            case Body(data=data) if not self._is_closed:
                self._body.append(bytes(data))
                self._unread += len(data)
                self._tell_application()
                while self._unread > MAX_UNREAD:
                    self._room = trio.Event()
                    await self._room.wait()
            case EndBody():
                self._is_whole = True
                self._tell_application()
            case StreamClosed():
                self._is_closed = True
                self._drop_body()
                self._tell_application()
                if not self._is_complete and self._wire._tell_left():  # noqa: SLF001 - as above
                    self._cancel()
            case _:
                pass

    def _tell_application(self) -> None:
        if self._news is not None:
            self._news.set()

    def _drop_body(self) -> None:
        self._body.clear()
        self._unread = 0
        if self._room is not None:
            self._room.set()

    async def _receive(self) -> dict[str, Any]:
        """ASGI's receive: the body as it comes, then the disconnect when there is one."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._is_closed:
            if self._body or (self._is_whole and not self._is_told):
                body = b"".join(self._body)
                self._drop_body()
                self._is_told = self._is_whole
                return {"type": "http.request", "body": body, "more_body": not self._is_whole}
            self._news = trio.Event()
            await self._news.wait()
            self._news = None
        return {"type": "http.disconnect"}

    async def _respond(self, message: dict[str, Any]) -> None:
        """ASGI's send: for a client that has left, it only lets others run."""
        if self._is_closed:
            await trio.lowlevel.checkpoint()
            return
        match message["type"]:
            case "http.response.start" if self._status is None:
                headers = build_and_validate_headers(message.get("headers", ()))
                status = int(message["status"])
                await self._send(Response(stream_id=STREAM_ID, headers=headers, status_code=status))
                self._status = status
            case "http.response.body" if self._status is not None and not self._is_complete:
                body = bytes(message.get("body", b""))
                more = message.get("more_body", False)
                # An empty one takes the head along: as ASGI has it, what is first sends that.
                if (body or more) and not suppress_body(self._scope["method"], self._status):
                    await self._send(Body(stream_id=STREAM_ID, data=body))
                if not more:
                    await self._send(EndBody(stream_id=STREAM_ID))
                    self._is_complete = True
                    await self._send(StreamClosed(stream_id=STREAM_ID))
            case kind:
                raise RuntimeError(
                    "expected http.response.start, then http.response.body until one has no "
                    f"more_body, got {kind!r}"
                )


# --- connections -------------------------------------------------------------------------------


@final
class _Connection:
    """One client, from accept to close; what Hypercorn's TCPServer is for, see the theory above."""

    def __init__(self, listener: "_Listener", stream: trio.SocketStream) -> None:
        self.wire = Wire(
            stream, write_deadline=listener.options.write_deadline, counts=listener.counts
        )
        self._listener = listener
        self._stream = stream
        self._protocol: _Http11
        self._send_lock = trio.Lock()  # the reader may send a 100 while a response begins
        self._deadline = inf  # when the reader gives up: idle, or lingering
        self._reading = trio.CancelScope()
        self._is_idle = False
        self._is_lingering = False
        self._is_woken = False

    async def run(self) -> None:
        """Serve the connection until it ends; the caller closes the socket.

        Raises:
            BaseExceptionGroup: What the connection's tasks raised; the caller contains it.
        """
        peer = self._stream.socket
        try:
            client = parse_socket_addr(peer.family, peer.getpeername())
        except OSError:  # it left while it was in the backlog
            await trio.lowlevel.checkpoint()
            return
        state = {**self._listener.state, "wire": self.wire}
        try:
            async with trio.open_nursery() as nursery:
                self._protocol = _Http11(
                    self._listener,
                    nursery,
                    ConnectionState(state),
                    client=client,
                    server=parse_socket_addr(peer.family, peer.getsockname()),
                    send=self._send,
                    send_lock=self._send_lock,
                    wire=self.wire,
                    wake_reader=self._wake_reader,
                )
                self._set_idle(True)
                await self._read()
        finally:
            # They refer to this connection: thousands that end leave no garbage.
            del self._protocol
            self.wire._settle()  # noqa: SLF001 - as in _send_bytes

    def close_if_idle(self) -> None:
        """Let go of a peer that has no request under way."""
        if self._is_idle:
            self._set_deadline(-inf)

    async def _read(self) -> None:
        data: bytes | None
        while True:
            self._is_woken = False
            # Who lingers is cut short by nobody but the end of the server, which closes the socket:
            # the refused request's own task may have been cancelled, and all of us with it.
            with trio.CancelScope(
                deadline=self._deadline, shield=self._is_lingering
            ) as self._reading:
                try:
                    data = await self._stream.receive_some(MAX_RECEIVE)
                except trio.BrokenResourceError:
                    data = None  # reset by the peer
                except trio.ClosedResourceError:
                    break
            if self._reading.cancelled_caught:
                if not self._is_woken:
                    break
                await self._protocol.handle_buffered()
                continue
            if not data and self._protocol.is_answering():
                # It leaves: what h11 would say to that, nobody would hear.
                await self._listener.leaving.pass_through()
                break
            if data is None:
                break
            if not self._is_lingering:
                await self._protocol.handle(RawData(data))
            if not data:
                break
        await self._protocol.handle(Closed())

    def _wake_reader(self) -> None:
        """Have the reader look at what is buffered; if it is not reading it will do so anyway."""
        self._is_woken = True
        self._reading.cancel()

    async def _send(self, event: Event) -> None:
        """Do what the protocol asks for: send bytes, close, or note that the peer is idle."""
        match event:
            case RawData(data=data):
                if not await self._send_bytes(data):
                    await self._protocol.handle(Closed())
            case Closed():
                self._hang_up()
                await self._protocol.handle(Closed())
            case Updated(idle=idle):
                self._set_idle(idle)
                await trio.lowlevel.checkpoint()
            case _:
                raise AssertionError(f"expected RawData, Closed or Updated, got {event!r}")

    async def _send_bytes(self, data: bytes) -> bool:
        """Send what h11 made, whole, though cancelled meanwhile; tell whether the peer took it."""
        wire = self.wire
        try:
            # The shield is around the lock too: h11 has counted these bytes as sent, and would take
            # a connection whose last chunk was never written for one that is ready for the next
            # request. It is bounded: the wire gives up at the write deadline, and at the end of the
            # server the socket is aborted under it. The lock, because the reader may send a 100.
            # Most often neither is needed: the kernel takes everything at once.
            rest: bytes | memoryview | None = data
            if not self._send_lock.locked():
                rest = wire._send_at_once(data)  # noqa: SLF001 - the public half frames a body
            if rest is None:
                await wire._yield_if_due()  # noqa: SLF001 - as above
            else:
                with trio.CancelScope(shield=True):
                    async with self._send_lock:
                        # Each slice has its deadline; an empty one takes along what is held.
                        for start in range(0, len(rest) or 1, MAX_RECEIVE):
                            slice_ = memoryview(rest)[start : start + MAX_RECEIVE]
                            await wire._send(slice_)  # noqa: SLF001 - as above
        except (trio.BrokenResourceError, trio.ClosedResourceError, SlowClient):
            return False
        return True

    def _hang_up(self) -> None:
        """Send FIN, and close unless the peer is still sending.

        Closing with bytes unread makes the kernel send RST, which can destroy the answer before
        the peer has read it; so read on for a while and drop what comes (RFC 9112 9.6).
        """
        self._is_lingering = self._protocol.is_peer_sending()
        self.wire._close(half=self._is_lingering)  # noqa: SLF001 - as in _send_bytes
        if self._is_lingering:
            self._set_deadline(trio.current_time() + LINGER)

    def _set_idle(self, idle: bool) -> None:  # noqa: FBT001 - mirrors Updated(idle)
        self._is_idle = idle
        keep_alive = self._listener.options.keep_alive
        self._set_deadline(trio.current_time() + keep_alive if idle else inf)

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline
        self._reading.deadline = deadline


@final
class _Turnstile:
    """Lets a number of tasks go on in each pass of the loop; the others wait for a later one.

    In a pass Trio runs whoever can run, and nobody else until it is over. When thousands of clients
    leave at once, everything that their leaving takes would be done in two or three passes of a
    second each, in which the streams of those who stay stand still.
    """

    def __init__(self, each: int) -> None:
        self._each = self._free = each
        self._waiting = trio.lowlevel.ParkingLot()
        self._used = trio.Event()

    async def pass_through(self) -> None:
        """Go on, in this pass or a later one, in order."""
        if self._free:
            self._free -= 1
            self._used.set()
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._waiting.park()

    async def run(self) -> Never:
        """Open it anew for each pass; serve until cancelled."""
        while True:
            await self._used.wait()
            await trio.lowlevel.checkpoint()
            if released := self._waiting.unpark(count=self._each):
                self._free = self._each - len(released)
            else:
                self._free, self._used = self._each, trio.Event()


# --- the listener ------------------------------------------------------------------------------


@final
class _HypercornLog(Logger):
    """Hypercorn's log, led into ours: what failed and where, never what was said."""

    def __init__(self, config: Config, report: Callable[[str, BaseException | None], None]) -> None:
        super().__init__(config)
        self._report = report

    async def exception(self, message: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Report what escaped from the application."""
        self._report("app_crashed", sys.exception())
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def warning(self, message: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Report an application without lifespan, which is all that Hypercorn warns of."""
        self._report("lifespan_unsupported", sys.exception())
        await trio.lowlevel.cancel_shielded_checkpoint()


def _refusal() -> bytes:
    detail = "expected fewer connections than the server's limit; try again in a second"
    body = json.dumps({"title": "Service Unavailable", "status": 503, "detail": detail}).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
        b"content-type: application/problem+json\r\ncontent-length: %d\r\n\r\n%b"
    ) % (len(body), body)


_REFUSAL: Final = _refusal()


@final
class _Listener:
    """What all connections of one `serve` share."""

    def __init__(
        self, app: ASGIFramework, options: ListenerOptions, *, log: Log | None, counts: Counts
    ) -> None:
        self.application = app
        self.app = ASGIWrapper(app)  # as Hypercorn wants it
        self.options = options
        self.counts = counts
        self.state: LifespanState = {}
        self.context = WorkerContext(None)
        self.config = Config()
        self.config.alpn_protocols = ["http/1.1"]
        self.config.accesslog = self.config.errorlog = None
        self.config.include_server_header = False
        self.config.h11_max_incomplete_size = options.max_header_bytes
        self.config._log = _HypercornLog(self.config, self.report)  # noqa: SLF001 - no public place
        self._log = log
        self.leaving = _Turnstile(LEAVE_TOGETHER)
        self._open: set[_Connection] = set()
        self._refusing = 0
        self._all_gone = trio.Event()

    def report(self, event: str, error: BaseException | None) -> None:
        """Log each exception in `error` by type and place; messages may hold the peer's bytes."""
        if self._log is not None:
            for leaf in _leaves(error):
                self._log(event, error=type(leaf).__qualname__, where=_where(leaf))

    async def serve_stream(self, stream: trio.SocketStream) -> None:
        """Serve one accepted connection; let nothing out but cancellation."""
        limit = self.options.max_connections
        if limit is not None and len(self._open) >= limit:
            self.counts.refused += 1
            await self._refuse(stream)
            return
        connection = _Connection(self, stream)
        self._open.add(connection)
        self.counts.accepted += 1
        self.counts.open += 1
        try:
            await connection.run()
        except* (Exception, SystemExit) as crash:  # noqa: BLE001 - containment; SystemExit: argparse
            self.counts.crashed += 1
            self.report("connection_crashed", crash)
        except* trio.Cancelled:
            connection.wire.abort()
            raise
        finally:
            connection.wire._close()  # noqa: SLF001 - the public half is the application's
            self.counts.open -= 1
            self._open.discard(connection)
            if not self._open and self.context.terminated.is_set():
                self._all_gone.set()

    async def _refuse(self, stream: trio.SocketStream) -> None:
        wire = Wire(stream, write_deadline=LINGER, counts=self.counts)
        if self._refusing >= MAX_REFUSALS:
            wire.abort()
            await trio.lowlevel.checkpoint()
            return
        self._refusing += 1
        try:
            with trio.move_on_after(LINGER), suppress(trio.BrokenResourceError):
                await wire._send(_REFUSAL)  # noqa: SLF001 - a whole response, head and all
                await stream.send_eof()
                while await stream.receive_some(MAX_RECEIVE):  # as in _hang_up
                    pass
        finally:
            self._refusing -= 1
            stream.socket.close()

    async def serve_until(
        self, shutdown_trigger: Callable[[], Awaitable[None]], sockets: list[socket.socket]
    ) -> None:
        """Accept until the trigger returns, then give what is open its graceful time."""
        async with trio.open_nursery() as connections:
            try:
                connections.start_soon(self.leaving.run)
                async with trio.open_nursery() as acceptors:
                    for sock in sockets:
                        acceptors.start_soon(self._accept, sock, connections)
                    await shutdown_trigger()
                    acceptors.cancel_scope.cancel()
                with trio.move_on_after(self.options.graceful_timeout):
                    await self._end()
            finally:
                # A reset also frees whoever is writing under a shield.
                for connection in tuple(self._open):
                    connection.wire.abort()
                connections.cancel_scope.cancel()

    async def _accept(self, sock: socket.socket, connections: trio.Nursery) -> None:
        """Start a task for each connection, until cancelled; it closes its socket itself.

        trio.serve_listeners would close each one once more, by a scope that it cancels.
        """
        async with trio.SocketListener(trio.socket.from_stdlib_socket(sock)) as listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in FULL_ERRORS:
                        raise
                    self.report("accept_failed", error)  # there is no room until somebody leaves
                    await trio.sleep(FULL_PAUSE)
                else:
                    connections.start_soon(self.serve_stream, stream)

    async def _end(self) -> None:
        """Close idle connections, and wait until the others have ended by themselves."""
        await self.context.terminated.set()
        for connection in self._open:
            connection.close_if_idle()
        if self._open:
            await self._all_gone.wait()
        else:
            await trio.lowlevel.checkpoint()


def _leaves(error: BaseException | None) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    elif error is not None:
        yield error


def _where(error: BaseException) -> str:
    """Say where an exception came from: the innermost six frames, outermost first."""
    frames = list(traceback.walk_tb(error.__traceback__))[-6:]
    return " > ".join(
        f"{frame.f_globals.get('__name__', '?')}:{line} {frame.f_code.co_name}"
        for frame, line in frames
    )


async def serve(
    app: ASGIFramework,
    sockets: list[socket.socket],
    options: ListenerOptions,
    *,
    shutdown_trigger: Callable[[], Awaitable[None]],
    log: Log | None = None,
    counts: Counts | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application on listening sockets until told to stop.

    Args:
        app: ASGI 3. Each HTTP scope's `state` holds the connection's `Wire` as "wire". Its lifespan
            is run if it has one.
        sockets: Listening TCP sockets, as `open_sockets` makes them. Owned and closed by this call,
            whatever happens.
        options: See ListenerOptions; host, port and backlog are `open_sockets`' concern.
        shutdown_trigger: Returns when serving is to end. By then the application should have ended
            its streams: what is open `graceful_timeout` seconds later is reset.
        log: Called as log(event, error=..., where=...) with event "connection_crashed",
            "app_crashed" or "lifespan_unsupported"; never with anything that a client sent.
        counts: Kept up to date while serving, for metrics.
        task_status: Started with the URLs served, once the lifespan has started.

    Raises:
        ExceptionGroup: The application's lifespan failed to start or stop, the shutdown trigger
            raised, or accepting failed for a reason that waiting does not cure.

    On cancellation every connection is reset at once and the lifespan is not told.
    """
    listener = _Listener(app, options, log=log, counts=Counts() if counts is None else counts)
    lifespan = Lifespan(listener.app, listener.config, listener.state)
    with ExitStack() as sockets_closed:
        for sock in sockets:
            sockets_closed.callback(sock.close)
        async with trio.open_nursery() as lifespan_nursery:
            await lifespan_nursery.start(lifespan.handle_lifespan)
            with suppress(trio.ClosedResourceError):  # the application returned: it has no lifespan
                await lifespan.wait_for_startup()
            task_status.started(
                [f"http://{repr_socket_addr(sock.family, sock.getsockname())}" for sock in sockets]
            )
            await listener.serve_until(shutdown_trigger, sockets)
            with suppress(trio.ClosedResourceError):
                await lifespan.wait_for_shutdown()
            lifespan_nursery.cancel_scope.cancel()
