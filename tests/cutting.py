"""A proxy on loopback that cuts: how much of a response a client gets, and how it breaks off.

It passes bytes both ways and knows nothing of what they mean, but for one thing: a connection
counts from its first request on, since browsers open some that they never use.
"""

import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import attrs
import trio

CHUNK = 64 * 1024  # bytes passed on at once
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: on, and no time for it


@attrs.frozen
class Cut:
    """Where a connection's responses break off, and how.

    Attributes:
        after: How many bytes of them reach the client; or what is the last that does, where it
            first occurs.
        way: `fin` closes, `rst` resets; `stall` passes nothing more until `Cutter.resume`.
    """

    after: int | bytes
    way: Literal["fin", "rst", "stall"] = "fin"

    def find(self, passed: bytes | bytearray, begin: int) -> int | None:
        """The place in what has passed, looked for from `begin` on; None while it is to come."""
        if isinstance(self.after, int):
            return self.after if len(passed) >= self.after else None
        found = passed.find(self.after, max(0, begin - len(self.after)))
        return None if found < 0 else found + len(self.after)


@attrs.define(eq=False)
class Cutter:
    """What a cutting proxy has still to do, and what it was asked for; made by `open_cutters`.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        target: The port that it passes everything to.
        cuts: For the connections to come, one each; behind the last, nothing is cut.
        asked: What each connection was asked for, head upon head.
        open: How many connections there are now.
        resume: Set to let what is stalled pass.
    """

    port: int
    target: int
    cuts: deque[Cut]
    asked: list[bytearray] = attrs.field(factory=list)
    open: int = 0
    resume: trio.Event = attrs.field(factory=trio.Event)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[str]:
        """The request lines, connection by connection."""
        found = re.findall(rb"(?m)^([A-Z]+ \S+) HTTP/1\.1\r$", b"".join(self.asked))
        return [line.decode() for line in found]

    @property
    def last_ids(self) -> list[str]:
        """What came as Last-Event-ID, connection by connection."""
        found = re.findall(rb"(?im)^last-event-id: *(\S*)\r$", b"".join(self.asked))
        return [each.decode() for each in found]

    def turn_to(self, url: str) -> None:
        """Pass what comes from now on to another server."""
        self.target = _port_of(url)

    async def serve(self, client: trio.SocketStream) -> None:
        """Serve one connection."""
        async with client:
            try:
                first = await client.receive_some(CHUNK)
            except trio.BrokenResourceError:
                return
            if not first:
                return
            cut = self.cuts.popleft() if self.cuts else None
            asked = bytearray()
            self.asked.append(asked)
            self.open += 1
            try:
                async with await trio.open_tcp_stream("127.0.0.1", self.target) as server:
                    is_reset = await self._pass_both_ways(client, server, first, asked, cut)
            finally:
                self.open -= 1
            if is_reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)

    async def _pass_both_ways(
        self,
        client: trio.SocketStream,
        server: trio.SocketStream,
        data: bytes | bytearray,
        asked: bytearray,
        cut: Cut | None,
    ) -> bool:
        """Pass bytes until either side has ended, or the cut; whether the client is to be reset."""
        is_reset = False
        async with trio.open_nursery() as nursery:

            async def pass_back() -> None:
                nonlocal is_reset
                try:
                    is_reset = await self._pass_back(server, client, cut)
                except trio.BrokenResourceError:  # by the server, or the client is gone anyway
                    is_reset = True
                nursery.cancel_scope.cancel()

            nursery.start_soon(pass_back)
            try:
                while data:
                    asked += data
                    await server.send_all(data)
                    data = await client.receive_some(CHUNK)
            except trio.BrokenResourceError:
                pass  # whoever has reset a connection wants nothing more
            nursery.cancel_scope.cancel()
        return is_reset

    async def _pass_back(
        self, server: trio.SocketStream, client: trio.SocketStream, cut: Cut | None
    ) -> bool:
        passed = bytearray()  # kept while there is something to look for
        while data := await server.receive_some(CHUNK):
            if cut is not None:
                before = len(passed)
                passed += data
                if (end := cut.find(passed, before)) is not None:
                    await client.send_all(passed[before:end])
                    if cut.way != "stall":
                        return cut.way == "rst"
                    await self.resume.wait()
                    data, cut = passed[end:], None
            await client.send_all(data)
        return False


def _port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@asynccontextmanager
async def open_cutters(url: str, *plans: Sequence[Cut]) -> AsyncIterator[list[Cutter]]:
    """Open cutting proxies before a server; leaving the context closes them and all they serve.

    Args:
        url: The server's, `http://127.0.0.1:PORT`.
        plans: For each proxy its cuts: see `Cutter`.
    """
    async with trio.open_nursery() as nursery:
        cutters = []
        for cuts in plans:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            cutter = Cutter(listeners[0].socket.getsockname()[1], _port_of(url), deque(cuts))
            await nursery.start(trio.serve_listeners, cutter.serve, listeners)
            cutters.append(cutter)
        yield cutters
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_cutter(url: str, *cuts: Cut) -> AsyncIterator[Cutter]:
    """Open one of them."""
    async with open_cutters(url, cuts) as (cutter,):
        yield cutter
