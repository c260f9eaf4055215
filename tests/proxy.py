"""A proxy on loopback to test clients with: it forwards http, tunnels by CONNECT, and can refuse.

It is written from RFC 9110, section 9.3.6, and RFC 9112, section 3.2: it reads one head per
connection, does what it says, and from then on passes bytes, both ways.
"""

import ssl
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import attrs
import trio


@attrs.define(eq=False)
class Proxy:
    """What a proxy was asked for; made by `open_proxy`.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        credentials: `user:password` that it wants to see, if any.
        status: What it answers to whatever it is asked, instead of doing it; None to do it.
        heads: The head of each connection's first request, in order.
    """

    port: int
    credentials: str | None
    status: str | None
    heads: list[bytes] = attrs.field(factory=list)

    @property
    def lines(self) -> list[bytes]:
        """The request lines."""
        return [head.split(b"\r\n")[0] for head in self.heads]

    async def serve(self, client: trio.abc.Stream) -> None:
        """Serve one connection."""
        received = b""
        async with client:
            while b"\r\n\r\n" not in received:
                more = await client.receive_some()
                if not more:
                    return
                received += more
            head, _, rest = received.partition(b"\r\n\r\n")
            self.heads.append(head)
            if (refusal := self._refusal(head)) is not None:
                await client.send_all(b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n" % refusal)
                return
            method, target, version = head.split(b"\r\n")[0].split(b" ")
            if method == b"CONNECT":
                host, _, port = target.decode().rpartition(":")
                greeting, first = b"HTTP/1.1 200 Connected\r\n\r\n", rest
            else:
                url = urlsplit(target.decode())
                host, port = url.hostname or "", str(url.port or 80)
                fields = [
                    line
                    for line in head.split(b"\r\n")[1:]
                    if not line.lower().startswith(b"proxy-")
                ]
                path = f"{url.path or '/'}{'?' if url.query else ''}{url.query}".encode()
                line = b" ".join([method, path, version])
                greeting, first = b"", b"\r\n".join([line, *fields]) + b"\r\n\r\n" + rest
            async with await trio.open_tcp_stream(host, int(port)) as server:
                await client.send_all(greeting)
                await server.send_all(first)
                await _pass_both_ways(client, server)

    def _refusal(self, head: bytes) -> bytes | None:
        if self.status is not None:
            return self.status.encode()
        if self.credentials is not None:
            wanted = b"proxy-authorization: basic " + b64encode(self.credentials.encode()).lower()
            if wanted not in head.lower():
                return b"407 Proxy Authentication Required"
        return None


async def _pass_both_ways(one: trio.abc.Stream, other: trio.abc.Stream) -> None:
    """Pass bytes until either side has ended."""
    async with trio.open_nursery() as nursery:

        async def pass_on(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            try:
                while data := await source.receive_some():
                    await sink.send_all(data)
            except trio.BrokenResourceError:
                pass  # whoever has reset the connection wants nothing more
            nursery.cancel_scope.cancel()

        nursery.start_soon(pass_on, one, other)
        await pass_on(other, one)


@asynccontextmanager
async def open_proxy(
    *,
    credentials: str | None = None,
    status: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Proxy]:
    """Open a proxy on a free port of loopback; leaving the context closes it and all it serves.

    Args:
        credentials: See `Proxy`.
        status: See `Proxy`; for instance `502 Bad Gateway`.
        tls: Talk TLS to clients, with this certificate.
    """
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = Proxy(listeners[0].socket.getsockname()[1], credentials, status)
        secured = [
            listener if tls is None else trio.SSLListener(listener, tls, https_compatible=True)
            for listener in listeners
        ]
        await nursery.start(trio.serve_listeners, proxy.serve, secured)
        yield proxy
        nursery.cancel_scope.cancel()
