"""A client that is nothing but a socket: it can leave in every way there is, and see what is left.

httpx2 is what the tests use where a client should behave; this is for where it should not.
"""

import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import h11
import trio
from trio.testing import wait_all_tasks_blocked

from agentsse.events import AnyEvent, decode_event
from agentsse.server import Server
from agentsse.sse import Decoder, Frame


def request(
    method: str, path: str, body: bytes = b"", *, version: str = "1.1", **headers: str
) -> bytes:
    """The bytes of a request; `accept="…"` and the like are headers, `_` stands for `-`."""
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def stream_run(agent: str, body: bytes = b"{}", *, version: str = "1.1", **headers: str) -> bytes:
    """The bytes of a request that starts a run and streams it."""
    return request(
        "POST", f"/agents/{agent}/runs", body, version=version,
        accept="text/event-stream", **headers,
    )  # fmt: skip


@attrs.define(eq=False)
class RawClient:
    """One connection; responses are parsed by h11, frames by our decoder.

    Attributes:
        frames: Of a stream, in whatever dialect.
        events: The same as events, where it is the native one.
    """

    stream: trio.SocketStream
    http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT))
    decoder: Decoder = attrs.field(factory=Decoder)
    response: h11.Response | None = None
    body: bytes = b""
    complete: bool = False
    is_native: bool = True
    frames: list[Frame] = attrs.field(factory=list)
    events: list[AnyEvent] = attrs.field(factory=list)
    _taken: int = 0

    async def send(self, data: bytes) -> None:
        """Send bytes as they are, and let h11 know that a request went out."""
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.turn_to_next()
        if self.http.our_state is h11.IDLE:
            self._expect(data.split(b" ", 1)[0].decode())
        await self.stream.send_all(data)

    def turn_to_next(self, method: str | None = None) -> None:
        """Be ready for the next response; with a method, of a request sent before its turn."""
        self.http.start_next_cycle()
        self.response, self.complete, self.body = None, False, b""
        if method is not None:
            self._expect(method)

    def _expect(self, method: str) -> None:
        self.http.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        self.http.send(h11.EndOfMessage())

    async def receive(self) -> bool:
        """Take in what has come; False once the response is complete or the peer has closed.

        Raises:
            h11.RemoteProtocolError: The peer closed in the middle of a response.
            trio.BrokenResourceError: The connection was reset.
        """
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                self.http.receive_data(await self.stream.receive_some(65536))
            elif isinstance(event, h11.InformationalResponse):
                continue
            elif isinstance(event, h11.Response):
                self.response = event
                return True
            elif isinstance(event, h11.Data):
                self.body += bytes(event.data)
                for frame in self.decoder.feed(bytes(event.data)):
                    self.frames.append(frame)
                    if self.is_native:
                        self.events.append(decode_event(frame.data))
                return True
            else:
                self.complete = isinstance(event, h11.EndOfMessage)
                return False

    async def finish(self) -> bytes:
        """Read the response to its end; its body."""
        while await self.receive():
            pass
        return self.body

    async def next_event(self) -> AnyEvent:
        """The next event of a stream."""
        while self._taken == len(self.events):
            if not await self.receive():
                raise EOFError(f"expected an event, got the end after {len(self.events)}")
        self._taken += 1
        return self.events[self._taken - 1]

    async def wait_for(self, kind: type[AnyEvent]) -> AnyEvent:
        """Read on to the next event of that kind."""
        while True:
            event = await self.next_event()
            if isinstance(event, kind):
                return event

    @property
    def status(self) -> int:
        """The response's status, once its head has come."""
        assert self.response is not None
        return self.response.status_code

    def header(self, name: str) -> str | None:
        """A header of the response."""
        assert self.response is not None
        found = [value for key, value in self.response.headers if key == name.lower().encode()]
        return found[0].decode() if found else None

    # Ways to leave

    async def leave_by_fin(self) -> None:
        """Close: the kernel sends FIN."""
        await self.stream.aclose()

    def leave_by_rst(self) -> None:
        """Reset: the kernel sends RST and forgets."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def leave_by_half_close(self) -> None:
        """Say that nothing more will come, and go on reading."""
        await self.stream.send_eof()


@asynccontextmanager
async def connect(
    url: str, *, receive_buffer: int | None = None, is_native: bool = True
) -> AsyncIterator[RawClient]:
    """Connect to a server's URL; `receive_buffer` bytes make a reader that stalls early."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    sock = trio.socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await sock.connect((host.strip("[]"), int(port)))
        yield RawClient(trio.SocketStream(sock), is_native=is_native)
    finally:
        if sock.fileno() != -1:
            sock.close()


# What is left behind


@attrs.frozen
class Footprint:
    """What this process holds: tasks of the event loop, and file descriptors."""

    tasks: int
    descriptors: int

    @classmethod
    def now(cls) -> "Footprint":
        """Count."""
        return cls(
            trio.lowlevel.current_statistics().tasks_living,
            len(list(Path("/proc/self/fd").iterdir())),
        )


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what the server is about to do by itself: it looks each time all tasks block."""
    await wait_all_tasks_blocked()
    while not condition():
        await wait_all_tasks_blocked(0.002)  # seconds: loopback needs no more


async def wait_quiet(server: Server) -> Footprint:
    """Wait until nobody is connected and nothing runs; what the server holds then."""
    await wait_until(
        lambda: not (server.connections.open or server.app.streams.open or server.runs.unfinished())
    )
    await wait_all_tasks_blocked()
    return Footprint.now()
