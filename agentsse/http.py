"""The one HTTP client: it sends a request and hands over the bytes of the answer as they come.

Knows: connections, TLS, proxies, and when it is worth reading. Must never know what the bytes mean,
whose API it is, or who is served with it.

Two things make a relay of tokens cheap, and both are here. Whoever reads seldom takes all: between
two reads of a stream a window passes, in which the kernel gathers what comes; the wake-up is what
costs, not the bytes. The pacing is below TLS, so that one read takes all records that are there.
And whoever calls a model often must not search all connections of everybody for a free one: each
client has its own, each request has one for itself, and they share nothing but the TLS context.
Whoever wants each byte as it comes asks for no window, and has no pace.

What goes wrong on the way is a `ProviderError`. There is no time limit here but for connecting:
callers have scopes for that. Nothing is sent twice: what may be tried again is for callers to say.
"""

import functools
import importlib.util
import math
import os
import re
import ssl
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any, Final
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

import attrs
import httpcore2
import trio

from .errors import ProviderError, redact

CONNECT_SECONDS: Final = 10.0  # for a TCP connection, and for each TLS handshake
READ: Final = 64 * 1024  # bytes that one read takes: what a socket buffer holds anyway
MAX_REASON: Final = 300  # characters of what others say went wrong

OpenTcp = Callable[[str, int], Awaitable[trio.abc.Stream]]

# What may go wrong, as httpcore tells it; it has no common base.
_FAILURES: Final = (
    httpcore2.TimeoutException,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
)
MAX_SIZE_LINE: Final = 256  # bytes before a chunk; more are no size
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")
_BLANK_LINE = re.compile(rb"\n\r?\n")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"(?:[!-~](?:[\t -~]*[!-~])?)?")


@functools.cache
def shared_tls() -> ssl.SSLContext:
    """The context of all connections: what this system trusts, or SSL_CERT_FILE, SSL_CERT_DIR."""
    return httpcore2.default_ssl_context()


def _nothing() -> None:
    """Tell nobody."""


@attrs.frozen(eq=False)
class Pace:
    """When it is worth reading; see `open_http`."""

    window: float
    lull: Callable[[], None]
    sleep_until: Callable[[float], Awaitable[None]]


@attrs.define(eq=False)
class PacedStream(trio.abc.Stream):
    """A stream that is read at most once per window, while it is paced.

    Attributes:
        inner: The stream below; closed with this one.
        pace: How often it is read.
        is_paced: Off until the head of a response is here, so that nothing waits for its start.
        has_ended: Whether the peer has said that nothing more will come.
    """

    inner: trio.abc.Stream
    pace: "Pace"
    is_paced: bool = False
    has_ended: bool = False
    _not_before: float = -math.inf

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Read what there is, once the window has passed."""
        if not self.is_paced:
            self._not_before = -math.inf  # another response begins
            return await self.inner.receive_some(max_bytes)
        self.pace.lull()
        wanted = READ if max_bytes is None else max_bytes
        data: bytes | bytearray | None = None
        if trio.current_time() < self._not_before:
            await self.pace.sleep_until(self._not_before)
            data = self._read_now(wanted)  # that was a checkpoint, another would double the cost
        if data is None:
            data = await self.inner.receive_some(wanted)
        if len(data) < wanted:  # else more is there already
            self._not_before = trio.current_time() + self.pace.window
        return data

    def _read_now(self, wanted: int) -> bytes | None:
        """What a socket has, without waiting; None where it has nothing, or is none."""
        socket = getattr(self.inner, "socket", None)
        if socket is None or (descriptor := socket.fileno()) < 0:
            return None
        try:
            return os.read(descriptor, wanted)
        except BlockingIOError:
            return None
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write."""
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room."""
        await self.inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the stream below."""
        await self.inner.aclose()


@attrs.define(eq=False)
class ChunkedBody:
    """Takes a chunked body apart (RFC 9112 section 7.1), up to its last chunk. Pure.

    A model server makes a chunk of each token, and for the HTTP parser each is as much work as a
    large one. So it only gets to see the last chunk, and what does not look like chunks: that is
    for it to judge.

    Attributes:
        rest: What the parser is to see, once it is over.
        is_over: Whether what comes from here on is the parser's.
    """

    rest: bytes = b""
    is_over: bool = False
    _left: int = 0  # bytes of the chunk's data that are still to come
    _owed: bytes = b""  # what must follow them
    _line: bytes = b""  # the next chunk's size, as far as it has come

    def feed(self, data: bytes) -> bytes:
        """Take what came, and return what it holds of the body; empty where it holds nothing."""
        data, self._line = self._line + data, b""
        pieces, at, end = [], 0, len(data)
        while at < end:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                self._left -= len(piece)
                at += len(piece)
            elif self._owed:
                if data[at] != self._owed[0]:
                    self._leave(data[at:])
                    break
                self._owed = self._owed[1:]
                at += 1
            elif (found := _CHUNK_SIZE.match(data, at)) and (size := int(found[1], 16)):
                self._left, self._owed, at = size, b"\r\n", found.end()
            else:
                if found or end - at > MAX_SIZE_LINE or data.find(b"\n", at) >= 0:
                    self._leave(data[at:])  # the last chunk, or none
                else:
                    self._line = data[at:]
                break
        return b"".join(pieces)

    def _leave(self, rest: bytes) -> None:
        self.rest, self.is_over = rest, True


class _NetworkStream(httpcore2.AsyncNetworkStream):
    """A Trio stream as httpcore wants it; its timeouts are not used, scopes are."""

    def __init__(self, stream: trio.abc.Stream, paced: PacedStream) -> None:
        self.stream = stream
        self.paced = paced
        self._before = b""  # the last bytes of a head that has not ended
        self._beyond = b""  # what came together with a head, and follows it

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002, ASYNC109
        if self._beyond:
            await trio.lowlevel.checkpoint()
            data, self._beyond = self._beyond, b""
        else:
            try:
                data = bytes(await self.stream.receive_some(max_bytes))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise httpcore2.ReadError(_reason(error)) from error
        if not data:
            self.paced.has_ended = True
        return data if self.paced.is_paced else self._cut_behind_head(data)

    async def read_chunked(self, body: ChunkedBody) -> bytes:
        """Read more of a body; empty where the rest of it is the parser's to read."""
        while not body.is_over:
            if not (data := await self.read(READ)):
                body.is_over = True
            elif payload := body.feed(data):
                self._beyond = body.rest
                return payload
            else:
                self._beyond = body.rest
        return b""

    def _cut_behind_head(self, data: bytes) -> bytes:
        """A head by itself, so that what follows is known to be the body."""
        before = self._before
        end = _BLANK_LINE.search(before + data)
        if end is None:
            self._before = (before + data)[-2:]
            return data
        place = end.end() - len(before)
        self._before, self._beyond = b"", data[place:]
        return data[:place]

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109
        try:
            await self.stream.send_all(buffer)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore2.WriteError(_reason(error)) from error

    async def aclose(self) -> None:
        # Without the farewell of TLS: whoever leaves waits for nobody, so this may be shielded.
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self.stream)

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109  # as httpcore calls it
    ) -> httpcore2.AsyncNetworkStream:
        try:
            secured = trio.SSLStream(
                self.stream, ssl_context, server_hostname=server_hostname, https_compatible=True
            )
            with trio.fail_after(CONNECT_SECONDS):
                await secured.do_handshake()
        except trio.TooSlowError as error:
            await self.aclose()
            raise httpcore2.ConnectTimeout("a TLS handshake") from error
        except (trio.BrokenResourceError, ValueError) as error:  # or a name that TLS cannot check
            await self.aclose()
            raise httpcore2.ConnectError(f"TLS: {_reason(error)}") from error
        except BaseException:
            await self.aclose()
            raise
        return _NetworkStream(secured, self.paced)

    def get_extra_info(self, info: str) -> Any:
        # What can be read from a connection at rest is its end; of a socket we can tell.
        socket = getattr(self.paced.inner, "socket", None)
        if info == "is_readable" and socket is not None:
            return socket.fileno() < 0 or socket.is_readable()
        return None


@attrs.define(eq=False)
class _Network(httpcore2.AsyncNetworkBackend):
    """How connections are made: by name, to whichever address answers first.

    Attributes:
        stream: The last that was made.
    """

    open_tcp: OpenTcp
    pace: Pace
    stream: PacedStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109  # as httpcore calls it
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore2.AsyncNetworkStream:
        try:
            with trio.fail_after(CONNECT_SECONDS):
                stream = await self.open_tcp(host, port)
        except trio.TooSlowError as error:
            raise httpcore2.ConnectTimeout("a connection") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: no DNS name looks like this
            raise httpcore2.ConnectError(_reason(error)) from error
        self.stream = PacedStream(stream, self.pace)
        return _NetworkStream(self.stream, self.stream)


@attrs.frozen
class _Peer:
    """Who is talked to, as messages may name it: without any credentials.

    Attributes:
        origin: Its scheme, host and port.
        host: Its host and port.
        proxy: The proxy's URL; holds credentials.
    """

    origin: str
    host: str
    proxy: str | None = attrs.field(repr=False)

    def failed(self, error: Exception, paced: PacedStream | None) -> ProviderError:
        """Say what a failure of httpcore's means; where a stream was made, it may tell more."""
        through = ""
        if self.proxy is not None:
            through = f" through the proxy {urlsplit(self.proxy).netloc.rpartition('@')[2]}"
        reason = redact(str(error))[:MAX_REASON]
        match error:
            case httpcore2.TimeoutException():
                return ProviderError(
                    f"{self.host}: expected {reason}{through} within {CONNECT_SECONDS:g} s, "
                    "got no answer",
                    code="timeout",
                )
            case httpcore2.ConnectError() | httpcore2.ProxyError():
                return ProviderError(
                    f"{self.host}: expected to reach it{through}, got: {reason}",
                    code="unreachable",
                )
            case httpcore2.RemoteProtocolError() if paced is not None and not paced.has_ended:
                return ProviderError(
                    f"{self.host}: expected HTTP/1.1{through}, got: {reason}", code="malformed"
                )
            case _:
                return ProviderError(
                    f"{self.host}: the connection broke{through}: {reason}", code="incomplete"
                )


@attrs.define(eq=False)
class _Line:
    """One connection, or none as yet, that serves one request at a time."""

    network: _Network
    pool: httpcore2.AsyncConnectionPool

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is half done on it: then it can be used again."""
        return all(connection.is_idle() for connection in self.pool.connections)


@attrs.define(eq=False)
class _Body:
    """The bytes of a body. An iterator, and no generator: nobody has to close it."""

    chunks: AsyncIterator[bytes]
    peer: _Peer
    network: _NetworkStream
    chunked: ChunkedBody | None
    is_torn: bool = False

    def __aiter__(self) -> "_Body":
        return self

    async def __anext__(self) -> bytes:
        try:
            body = self.chunked
            if body is not None and (data := await self.network.read_chunked(body)):
                return data
            return await self._rest()
        except _FAILURES as error:
            raise self.peer.failed(error, self.network.paced) from error

    async def _rest(self) -> bytes:
        """Read what the parser is to read: a generator, which a cancel ends as if all had come."""
        if self.is_torn:
            raise httpcore2.ReadError("a read of this body was cancelled")
        try:
            return await anext(self.chunks)
        except trio.Cancelled:
            self.is_torn = True
            raise


@attrs.frozen(eq=False)
class Response:
    """An answer whose head is here, and whose body comes.

    Attributes:
        status: Of HTTP; redirects are not followed.
        headers: By lower-case name; of several of one name the last.
        chunks: The body, cut anywhere; it raises `ProviderError` where it breaks off. It may be
            read once, and only before the context is left. Who does not read holds up the server.
            A read that is cancelled loses nothing of a chunked body, and the next one goes on; any
            other body cannot be read on, and says so.
    """

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]

    async def read_some(self, limit: int) -> bytes:
        """Read a body that is no stream: its first `limit` bytes; nothing where it is packed.

        One that breaks off counts as far as it came: the status is worth more than its rest.
        """
        await trio.lowlevel.checkpoint()
        if _is_packed(self.headers):
            return b""
        body = bytearray()
        with suppress(ProviderError):
            async for chunk in self.chunks:
                body += chunk
                if len(body) >= limit:
                    break
        return bytes(body[:limit])


@attrs.define(eq=False)
class HttpClient:
    """A client with connections of its own; made by `open_http`, which closes them."""

    pace: Pace
    open_tcp: OpenTcp
    _idle: dict[_Peer, list[_Line]] = attrs.field(factory=dict)

    def post(
        self, url: str, *, headers: Mapping[str, str], body: bytes
    ) -> AbstractAsyncContextManager[Response]:
        """Post; see `request`."""
        return self.request("POST", url, headers=headers, body=body)

    @asynccontextmanager
    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[Response]:
        """Send a request, and open the answer; leaving the context closes it, and its stream.

        Args:
            method: GET, POST, PUT, DELETE, or whatever the server knows; not CONNECT.
            url: http or https. Proxies are taken from the environment, as every program does.
            headers: Beside those that HTTP itself needs.
            body: All of it; None where there is none.

        Raises:
            ProviderError: The server could not be reached, went away, broke the protocol, or has
                packed the body though it was asked not to; or the request cannot be written.

        A connection whose answer was read to its end is used again; any other is closed at once,
        and so it is when the caller is cancelled.
        """
        parts = _split(url)
        host = parts.netloc.rpartition("@")[2]
        peer = _Peer(f"{parts.scheme}://{host}", host, proxy_of(url))
        sent = {"host": host, "accept-encoding": "identity", "user-agent": "agentsse"}
        sent |= {name.lower(): value for name, value in headers.items()}
        if body is not None:
            sent["content-length"] = str(len(body))
        _see_that_they_can_be_sent(peer, sent)
        request = httpcore2.Request(method, url, headers=list(sent.items()), content=body)
        async with self._line(peer) as line:
            try:
                answer = await line.pool.handle_async_request(request)
            except _FAILURES as error:
                raise peer.failed(error, line.network.stream) from error
            paced = line.network.stream
            assert paced is not None
            stream: Any = answer.stream  # makes async generators: closed here, not by the collector
            async with aclosing(answer), aclosing(aiter(stream)) as chunks:
                received = {
                    name.decode("ascii").lower(): value.decode("latin-1")
                    for name, value in answer.headers
                }
                if answer.status == 200 and _is_packed(received):
                    raise ProviderError(
                        f"{peer.host}: expected a body as it is, got content-encoding "
                        f"{received['content-encoding'][:40]!r}, though identity was asked for",
                        code="malformed",
                    )
                network: _NetworkStream = answer.extensions["network_stream"]
                is_chunked = received.get("transfer-encoding", "").lower() == "chunked"
                body_of = _Body(chunks, peer, network, ChunkedBody() if is_chunked else None)
                paced.is_paced = True
                try:
                    yield Response(answer.status, received, body_of)
                finally:
                    paced.is_paced = False
                    body_of.chunked = None  # it is not this answer's connection any more

    @asynccontextmanager
    async def _line(self, peer: _Peer) -> AsyncIterator[_Line]:
        """A connection that nobody else uses meanwhile; one that is not at rest is closed after."""
        idle = self._idle.setdefault(peer, [])
        line = idle.pop() if idle else self._new_line(peer)
        try:
            yield line
        finally:
            if line.is_at_rest:
                idle.append(line)
            else:
                with trio.CancelScope(shield=True):  # bounded: closing sends nothing
                    await line.pool.aclose()

    def _new_line(self, peer: _Peer) -> _Line:
        network = _Network(self.open_tcp, self.pace)
        try:
            tls = shared_tls() if peer.origin.startswith("https:") else None
            proxy = None if peer.proxy is None else _proxy(peer.proxy)
        except OSError as error:
            raise ProviderError(
                f"expected certificates where SSL_CERT_FILE or SSL_CERT_DIR says, got: {error}",
                code="bad_request",
            ) from error
        return _Line(
            network,
            httpcore2.AsyncConnectionPool(
                ssl_context=tls, proxy=proxy, max_connections=1, network_backend=network
            ),
        )

    async def aclose(self) -> None:
        """Close every connection at rest; sends nothing, waits for nobody."""
        await trio.lowlevel.checkpoint()
        for lines in self._idle.values():
            for line in lines:
                await line.pool.aclose()
        self._idle.clear()


@asynccontextmanager
async def open_http(
    *,
    window: float = 0.0,
    lull: Callable[[], None] = _nothing,
    sleep_until: Callable[[float], Awaitable[None]] = trio.sleep_until,
    open_tcp: OpenTcp = trio.open_tcp_stream,
) -> AsyncIterator[HttpClient]:
    """Open a client; leaving the context closes its connections.

    Args:
        window: Seconds between two reads of a body; 0 to read whatever comes as it comes.
        lull: Called when all that has come was handed on.
        sleep_until: How to wait out the window; whoever serves many streams knows a cheaper way.
        open_tcp: How to reach a host's port; a stream of any kind will do.
    """
    client = HttpClient(Pace(window, lull, sleep_until), open_tcp)
    try:
        yield client
    finally:
        with trio.CancelScope(shield=True):  # bounded: closing sends nothing
            await client.aclose()


# What is asked for --------------------------------------------------------------------------------


def _split(url: str) -> SplitResult:
    parts, is_fit = urlsplit(""), False
    with suppress(ValueError):
        parts = urlsplit(url)
        is_fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    if not is_fit or not url.isascii() or not url.isprintable() or " " in url:
        raise ProviderError(
            f"expected an http or https URL in ASCII, got {redact(url)[:MAX_REASON]!r}; "
            "is base_url right?",
            code="bad_request",
        )
    return parts


def _see_that_they_can_be_sent(peer: _Peer, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ProviderError(  # without the value: it may be the key
                f"{peer.host}: expected a header of printable ASCII, got something else in "
                f"{name[:40]!r}; is there a space, a line end or a typographic sign in the key?",
                code="bad_request",
            )


def _is_packed(headers: Mapping[str, str]) -> bool:
    return headers.get("content-encoding", "").strip().lower() not in ("", "identity")


# Proxies ------------------------------------------------------------------------------------------


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL, if any: http_proxy, all_proxy, no_proxy."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or any(
        urllib.request.proxy_bypass(host)
        for host in (parts.hostname or "", parts.netloc.rpartition("@")[2])
    ):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy(url: str) -> httpcore2.Proxy:
    """Read a proxy's URL. No error quotes it: a password may be anywhere in it."""
    parts, port, is_fit = urlsplit(""), None, False
    with suppress(ValueError):
        parts = urlsplit(url)
        port = parts.port
        is_fit = bool(parts.hostname) and "@" not in parts.path
    host = parts.hostname or ""
    is_socks = parts.scheme in ("socks5", "socks5h")
    if not (is_fit and host.isascii() and (is_socks or parts.scheme in ("http", "https"))):
        raise ProviderError(
            "expected a proxy such as http://host:3128 in the environment (http_proxy, "
            "https_proxy, all_proxy), got one that cannot be used; in its password "
            "/ is written %2F, and @ is written %40",
            code="bad_request",
        )
    if is_socks and importlib.util.find_spec("socksio") is None:
        raise ProviderError(
            f"expected an HTTP proxy in the environment, got the SOCKS proxy {host}, which needs "
            "the package socksio; install it, or add the API's host to no_proxy",
            code="bad_request",
        )
    auth = None
    if parts.username is not None:
        auth = unquote_to_bytes(parts.username), unquote_to_bytes(parts.password or "")
    return httpcore2.Proxy(
        httpcore2.URL(scheme=parts.scheme, host=host, port=port, target="/"),
        auth=auth,
        ssl_context=shared_tls() if parts.scheme == "https" else None,
    )


def _reason(error: BaseException) -> str:
    """What an error's innermost causes say: the layers above only repeat that it failed."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(_reason(one) for one in error.exceptions))
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    inner = "" if cause is None else _reason(cause)
    return inner or " ".join(str(error).split()) or type(error).__name__
