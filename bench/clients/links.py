"""Connections that never wait: a request goes out on each, and a machine takes what comes.

Knows: sockets and epoll. Must never know what is asked, nor what an answer means. Needs nothing but
the standard library.
"""

import errno
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

RECEIVE = 256 * 1024  # bytes taken at once; one system call for several writes of the server
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time; closing sends a reset


class Machine(Protocol):
    """What takes the bytes of one connection; it has no socket. Times are nanoseconds."""

    def feed(self, buffer: bytearray, size: int, now: int) -> bool:
        """Take the first `size` bytes of `buffer`; tell whether more may come."""

    def lose(self, why: str, now: int) -> None:
        """See that nothing more will come."""


class Link:
    """One connection."""

    __slots__ = ("_links", "_machine", "_request", "sock")

    def __init__(
        self, links: "Links", sock: socket.socket, request: bytes, machine: Machine
    ) -> None:
        self._links, self.sock, self._request, self._machine = links, sock, request, machine

    def send(self) -> bool:
        """Send the request; tell whether that need not be tried again."""
        try:
            self.sock.sendall(self._request)  # a new connection takes as little as this whole
        except BlockingIOError:
            return False  # it is not connected yet
        except OSError as error:
            self._machine.lose(f"no connection: {error.strerror}", time.monotonic_ns())
        return True

    def ready(self, events: int) -> None:
        """Go on; called when the socket can."""
        if events & selectors.EVENT_WRITE and self.send():
            self._links.selector.modify(self.sock, selectors.EVENT_READ, self)
        if events & selectors.EVENT_READ and not self._read():
            self._links.selector.unregister(self.sock)

    def _read(self) -> bool:
        buffer = self._links.buffer
        try:
            size = self.sock.recv_into(buffer)
        except BlockingIOError:
            return True
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "an error")
            self._machine.lose(f"a reset ({name})", time.monotonic_ns())
            return False
        if size:
            return self._machine.feed(buffer, size, time.monotonic_ns())
        self._machine.lose("the connection's end", time.monotonic_ns())
        return False


class Links:
    """All connections to one server.

    Attributes:
        address: Where it is.
    """

    def __init__(self, address: tuple[str, int] = ("", 0)) -> None:
        self.selector = selectors.DefaultSelector()
        self.buffer = bytearray(RECEIVE)
        self.address = address
        self._sockets: list[socket.socket] = []

    def connect(self, number: int, seconds: float) -> list[socket.socket]:
        """Make connections, and wait until each is there, so long at most."""
        sockets = [self._new() for _ in range(number)]
        for sock in sockets:
            sock.settimeout(seconds)
            with suppress(OSError):  # seen when something is sent
                sock.connect(self.address)
            sock.setblocking(False)
        return sockets

    def open(self, request: bytes, machine: Machine, sock: socket.socket | None = None) -> None:
        """Send a request, on a connection that is there or on a new one; wait for nothing."""
        if sock is None:
            sock = self._new()
            sock.connect_ex(self.address)  # how that goes is seen when something is sent
        link = Link(self, sock, request, machine)
        is_sent = link.send()
        events = selectors.EVENT_READ if is_sent else selectors.EVENT_READ | selectors.EVENT_WRITE
        self.selector.register(sock, events, link)

    def _new(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        self._sockets.append(sock)
        return sock

    @property
    def is_idle(self) -> bool:
        """Whether nothing can come any more."""
        return not self.selector.get_map()

    def look(self, seconds: float | None) -> None:
        """Let all take what has come, and wait for it so long at most."""
        for key, events in self.selector.select(seconds):
            key.data.ready(events)

    def close(self, *, by_reset: bool = False) -> None:
        """Close all connections."""
        known = self.selector.get_map()
        for sock in self._sockets:
            if sock in known:
                self.selector.unregister(sock)
            if by_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
        self._sockets.clear()


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """The middle of some values, their 99th percentile and the highest; None of no values."""
    if not values:
        return None
    ranked = sorted(values)
    return {
        "p50": ranked[len(ranked) // 2],
        "p99": ranked[len(ranked) * 99 // 100],
        "max": ranked[-1],
    }
