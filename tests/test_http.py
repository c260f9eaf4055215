"""The HTTP client: what is read when, what is told of failures, and what is left behind: nothing.

Where time matters streams are in memory and the clock is virtual; where a kernel, TLS or a proxy
does, the sockets are real, on loopback, and bounded by `fail_after`.
"""

import itertools
import math
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress

import attrs
import h11
import httpcore2
import pytest
import trio
import trio.testing
import trustme
from hypothesis import given, strategies as st
from proxy import open_proxy
from raw import Footprint, wait_until
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from agentsse import http
from agentsse.errors import ProviderError
from agentsse.http import READ, ChunkedBody, Pace, PacedStream, open_http, proxy_of, shared_tls

SECONDS = 20  # generous: only a test that hangs ever sees it
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
STREAM = OK + b"transfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
PROXIES = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")]


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain(body, *, status=b"200 OK", headers=b""):
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n%b\r\n%b" % (status, len(body), headers, body)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    """Have no proxy but those that a test names."""
    for name in [*PROXIES, *map(str.upper, PROXIES)]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def ca():
    return trustme.CA()


@pytest.fixture
def tls(ca, monkeypatch, tmp_path):
    """A server's certificate, for localhost; clients trust who has signed it."""
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    shared_tls.cache_clear()
    yield certified(ca)
    shared_tls.cache_clear()


def certified(ca, *names):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(*(names or ("localhost", "127.0.0.1"))).configure_cert(context)
    return context


# A server that does what a test says


@attrs.define(eq=False)
class Visit:
    """One connection, as a server sees it."""

    stream: trio.abc.Stream
    received: bytes = b""

    async def read(self):
        """The next request's head and body; None where there is none."""
        while b"\r\n\r\n" not in self.received:
            if not await self.receive():
                return None
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        fields = [line.lower().partition(b": ") for line in head.split(b"\r\n")[1:]]
        length = next((int(value) for name, _, value in fields if name == b"content-length"), 0)
        while len(self.received) < length:
            await self.receive()
        body, self.received = self.received[:length], self.received[length:]
        return head, body

    async def receive(self):
        """Some more bytes; False at the end."""
        data = await self.stream.receive_some()
        self.received += data
        return bool(data)

    async def send(self, data):
        """Say this."""
        await self.stream.send_all(data)

    async def wait_gone(self):
        """Wait until the client has left, in whichever way."""
        with suppress(trio.BrokenResourceError):
            while await self.receive():
                self.received = b""

    def reset(self):
        """Leave with RST."""
        sock = self.stream.socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


@attrs.define(eq=False)
class Listening:
    """A server on loopback; made by `listening`."""

    port: int
    scheme: str
    answer: object
    visits: int = 0
    inside: int = 0

    @property
    def url(self):
        """Where to post."""
        return f"{self.scheme}://127.0.0.1:{self.port}/v1?a=b"

    async def serve(self, stream):
        """Serve one connection."""
        self.visits += 1
        self.inside += 1
        try:
            async with stream:
                with suppress(trio.BrokenResourceError):
                    await self.answer(Visit(stream))
        finally:
            self.inside -= 1

    async def wait_empty(self):
        """Wait until nobody is connected."""
        await wait_until(lambda: not self.inside)


@asynccontextmanager
async def listening(answer, *, tls=None):
    """Serve each connection with `answer`; leaving the context closes all of it."""
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            server = Listening(port, "http" if tls is None else "https", answer)
            if tls is not None:
                listeners = [trio.SSLListener(one, tls, https_compatible=True) for one in listeners]
            await nursery.start(trio.serve_listeners, server.serve, listeners)
            yield server
            nursery.cancel_scope.cancel()


def saying(*answers):
    """Answer request after request of a connection, then close it."""

    async def answer(visit):
        for data in answers:
            if await visit.read() is None:
                return
            await visit.send(data)

    return answer


@attrs.define(eq=False)
class Watched(trio.abc.Stream):
    """A stream that notes what is read, and when, and that it was closed."""

    inner: trio.abc.Stream
    reads: list = attrs.field(factory=list)
    is_closed: bool = False

    @property
    def socket(self):
        """What is below, where it is a socket."""
        return getattr(self.inner, "socket", None)

    async def receive_some(self, max_bytes=None):
        """Read, and note it."""
        data = await self.inner.receive_some(max_bytes)
        self.reads.append((trio.current_time(), bytes(data)))
        return data

    async def send_all(self, data):
        """Write."""
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self):
        """Wait until there is room."""
        await self.inner.wait_send_all_might_not_block()

    async def aclose(self):
        """Close, and note it."""
        self.is_closed = True
        await self.inner.aclose()


def reaching(*streams):
    """An `open_tcp` that hands out these streams, one after the other."""
    left = iter(streams)

    async def open_tcp(host, port):
        await trio.lowlevel.checkpoint()
        return next(left)

    return open_tcp


async def post(client, url, *, headers=None, body=b"{}"):
    """Post, and read all of it: the status and the body."""
    async with client.post(url, headers=headers or {}, body=body) as response:
        return response.status, b"".join([data async for data in response.chunks])


async def failure(url, **options):
    """How a post fails, reading included."""
    with pytest.raises(ProviderError) as caught:
        async with open_http(**options) as client:
            await post(client, url)
    return caught.value


# A request and its answer


async def test_a_request_is_sent_as_it_is_given():
    """The path, the headers in lower case, the body; nothing is asked to be packed."""
    seen = []

    async def answer(visit):
        seen.append(await visit.read())
        await visit.send(plain(b"hi", headers=b"X-A: 1\r\nX-A: 2\r\n"))

    async with listening(answer) as server, open_http() as client:
        headers = {"Authorization": "Bearer k", "User-Agent": "mine"}
        async with client.post(server.url, headers=headers, body=b"\x00\xff") as response:
            assert 200 == response.status
            assert {"content-length": "2", "x-a": "2"} == response.headers
            assert [b"hi"] == [data async for data in response.chunks]
        [(head, body)] = seen
        assert b"\x00\xff" == body
        assert [
            b"POST /v1?a=b HTTP/1.1",
            b"host: 127.0.0.1:%d" % server.port,
            b"accept-encoding: identity",
            b"user-agent: mine",
            b"authorization: Bearer k",
            b"content-length: 2",
        ] == head.split(b"\r\n")


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_a_request_may_have_no_body(method):
    """Then nothing is said of its length; the answer streams like any other."""
    heads = []

    async def answer(visit):
        for _ in range(2):
            head, _body = await visit.read()
            heads.append(head.split(b"\r\n"))
            await visit.send(STREAM + chunk(b"a") + chunk(b"b") + END)

    async with listening(answer) as server, open_http() as client:
        for _ in range(2):
            async with client.request(method, server.url, headers={"X-A": "1"}) as response:
                assert b"ab" == b"".join([data async for data in response.chunks])
        assert 1 == server.visits
        expected = [
            b"%b /v1?a=b HTTP/1.1" % method.encode(),
            b"host: 127.0.0.1:%d" % server.port,
            b"accept-encoding: identity",
            b"user-agent: agentsse",
            b"x-a: 1",
        ]
        assert [expected] * 2 == heads


async def test_a_request_of_any_method_may_have_a_body():
    """PUT what is to be there: it goes with its length, as a post does."""
    seen = []

    async def answer(visit):
        seen.append(await visit.read())
        await visit.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with listening(answer) as server, open_http() as client:
        async with client.request("PUT", server.url, headers={}, body=b"{}") as response:
            assert 204 == response.status
            assert [] == [data async for data in response.chunks]
        [(head, body)] = seen
        assert (b"PUT /v1?a=b HTTP/1.1", b"{}") == (head.split(b"\r\n")[0], body)
        assert b"content-length: 2" in head


async def read_with_patience(response, *, seconds):
    """Read a body in steps that are cancelled after so long; what came, and how often it was."""
    data, cancelled = b"", 0
    while True:
        with trio.move_on_after(seconds) as scope:
            piece = await anext(response.chunks, None)
            if piece is None:
                return data, cancelled
            data += piece
        cancelled += scope.cancelled_caught


async def test_a_read_of_chunks_that_is_cancelled_loses_nothing(autojump_clock):
    """The next one goes on, wherever the bytes were cut."""
    ours, theirs = memory_stream_pair()
    body = STREAM + chunk(b"a" * 20) + chunk(b"b" * 20) + END
    async with open_http(open_tcp=reaching(ours)) as client, trio.open_nursery() as nursery:

        async def answer():
            await theirs.receive_some()
            for at in range(len(STREAM), len(body) - len(END)):
                await theirs.send_all(body[at : at + 1] if at > len(STREAM) else body[: at + 1])
                await trio.sleep(1)
            await theirs.send_all(END)

        nursery.start_soon(answer)
        async with client.request("GET", "http://there/", headers={}) as response:
            data, cancelled = await read_with_patience(response, seconds=0.7)
    assert b"a" * 20 + b"b" * 20 == data
    assert cancelled > 10


async def test_a_read_of_any_other_body_that_is_cancelled_ends_it(autojump_clock):
    """What follows is an error, and not an end: nobody takes half a body for a whole one."""
    ours, theirs = memory_stream_pair()
    async with open_http(open_tcp=reaching(ours)) as client:
        await theirs.send_all(OK + b"\r\nhalf")
        async with client.request("GET", "http://there/", headers={}) as response:
            assert b"half" == await anext(response.chunks)
            with trio.move_on_after(1):
                await anext(response.chunks)
            for _ in range(2):
                with pytest.raises(ProviderError, match="a read of this body was cancelled") as c:
                    await anext(response.chunks)
                assert "incomplete" == c.value.code


async def test_an_address_of_ipv6_stands_in_brackets():
    """As RFC 9110 has it in Host; and it is reached without them."""
    ours, theirs = memory_stream_pair()
    reached = []

    async def open_tcp(host, port):
        await trio.lowlevel.checkpoint()
        reached.append((host, port))
        return ours

    await theirs.send_all(plain(b""))
    async with open_http(open_tcp=open_tcp) as client:
        assert (200, b"") == await post(client, "http://user:pass@[::1]:8000/v1")
    assert [("::1", 8000)] == reached
    head, _ = await Visit(theirs).read()
    assert b"\r\nhost: [::1]:8000\r\n" in head
    assert b"pass" not in head


async def test_interim_answers_are_passed_over():
    """A 100 and a 103 stand before the answer, and are none."""
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    async with listening(saying(early + plain(b"hi"))) as server, open_http() as client:
        assert (200, b"hi") == await post(client, server.url)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_not_followed(status):
    """A key goes where it was meant to go: a redirect is an answer like any other."""
    head = plain(b"there", status=b"%d Go" % status, headers=b"location: http://127.0.0.1:1/\r\n")
    async with listening(saying(head)) as server, open_http() as client:
        assert (status, b"there") == await post(client, server.url)
        assert 1 == server.visits


async def test_a_body_may_end_with_the_connection():
    """As HTTP/1.0 has it, and servers that know neither length nor chunks."""
    async with listening(saying(OK + b"\r\ndata: a\n\n")) as server, open_http() as client:
        assert (200, b"data: a\n\n") == await post(client, server.url)
        assert (200, b"data: a\n\n") == await post(client, server.url)
        assert 2 == server.visits


# Packed bodies, and those of errors


@pytest.mark.parametrize("coding", ["gzip", "br", "Identity, gzip"])
async def test_a_packed_stream_is_refused_and_not_unpacked(coding):
    """Identity was asked for: what comes packed cannot be understood, and no bomb goes off."""
    packed = plain(b"\x1f\x8b", headers=b"content-encoding: %b\r\n" % coding.encode())
    async with listening(saying(packed)) as server:
        error = await failure(server.url)
    assert "malformed" == error.code
    assert f"127.0.0.1:{server.port}: expected a body as it is" in error.message
    assert coding in error.message


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (plain(b"abc", status=b"500 No"), b"abc"),
        (plain(b"x" * 200_000, status=b"500 No"), b"x" * 1000),
        (plain(b"abc", status=b"500 No", headers=b"content-encoding: identity\r\n"), b"abc"),
        (plain(b"abc", status=b"500 No", headers=b"content-encoding: gzip\r\n"), b""),
        (plain(b"", status=b"500 No"), b""),
        (b"HTTP/1.1 500 No\r\ncontent-length: 9\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n", b"abc"),
    ],
    ids=["short", "long", "identity", "packed", "empty", "cut off", "broken"],
)
async def test_of_an_error_body_a_bounded_part_is_read(answer, expected):
    """Packed it says nothing; broken off it counts as far as it came."""
    async with (
        listening(saying(answer)) as server,
        open_http() as client,
        client.post(server.url, headers={}, body=b"") as response,
    ):
        assert 500 == response.status
        assert expected == await response.read_some(1000)


# Reading seldom


async def write_at(visit, head, times):
    """Answer with `head`, then one letter at each time."""
    await visit.read()
    await visit.send(head)
    for letter, time in enumerate(times, ord("a")):
        await trio.sleep_until(time)
        await visit.send(bytes([letter]))


async def test_later_reads_wait_for_the_window_and_take_everything(autojump_clock):
    """The start is never delayed; from then on there is one read per window, with all of it."""
    ours, theirs = memory_stream_pair()
    lulls, got = [], []
    times = [5 + 0.03 * n for n in range(1, 27)]

    def lull():
        lulls.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        head = OK + b"content-length: 27\r\n\r\n"
        nursery.start_soon(write_at, Visit(theirs), head + b"!", times)
        async with (
            open_http(window=0.1, lull=lull, open_tcp=reaching(ours)) as client,
            client.post("http://x/", headers={}, body=b"") as response,
        ):
            assert 0 == trio.current_time()
            assert [] == lulls
            got += [(trio.current_time(), data) async for data in response.chunks]

    assert (0, b"!") == got[0]
    assert (times[0], b"a") == got[1]  # it was waited for, but not put off
    for (before, _), (time, data) in itertools.pairwise(got[1:]):
        assert math.isclose(time, before + 0.1)
        assert data == bytes(
            97 + n for n, at in enumerate(times) if before < at <= time
        )  # all that has come meanwhile
    assert b"!abcdefghijklmnopqrstuvwxyz" == b"".join(data for _, data in got)
    assert [time for time, _ in got[:-1]] == lulls


async def test_the_next_answer_is_not_put_off_by_the_last_one(autojump_clock):
    """The window of one response says nothing about another on the same connection."""
    ours, theirs = memory_stream_pair()
    visit, url = Visit(theirs), "http://x/"

    async def answer():
        for _ in range(2):
            await visit.read()
            await visit.send(STREAM)
            await trio.sleep(1)
            await visit.send(chunk(b"a") + END)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        async with open_http(window=100, open_tcp=reaching(ours)) as client:
            for time in (1, 2):
                assert (200, b"a") == await post(client, url)
                assert time == trio.current_time()


async def test_where_a_read_is_full_there_is_more_and_nothing_is_waited_for(autojump_clock):
    """A window is for what has not come yet."""
    ours, theirs = memory_stream_pair()
    body = b"x" * (3 * READ)
    watched = Watched(ours)
    await theirs.send_all(plain(body))
    async with open_http(window=100, open_tcp=reaching(watched)) as client:
        assert (200, body) == await post(client, "http://x/")
    assert 0 == trio.current_time()
    assert [READ, READ, READ] == [len(data) for _, data in watched.reads[:3]]


async def test_a_window_of_nothing_is_no_window(autojump_clock):
    """Whatever comes is read as it comes."""
    ours, theirs = memory_stream_pair()
    times = [0.01 * n for n in range(1, 6)]
    got = []
    async with trio.open_nursery() as nursery:
        head = OK + b"content-length: 5\r\n\r\n"
        nursery.start_soon(write_at, Visit(theirs), head, times)
        async with (
            open_http(open_tcp=reaching(ours)) as client,
            client.post("http://x/", headers={}, body=b"") as response,
        ):
            got += [trio.current_time() async for _ in response.chunks]
    assert times == got


async def test_a_paced_stream_is_a_stream():
    """It passes on what it is asked for, and no more bytes than that."""
    one, other = memory_stream_pair()
    paced = PacedStream(one, Pace(0, list, trio.sleep_until), is_paced=True)
    await other.send_all(b"abc")
    assert b"ab" == await paced.receive_some(2)
    assert b"c" == await paced.receive_some()
    await paced.wait_send_all_might_not_block()
    await paced.send_all(b"hi")
    assert b"hi" == await other.receive_some()
    await paced.aclose()
    assert b"" == await other.receive_some()


async def test_one_read_takes_many_records_of_tls(tls):
    """The pacing is below TLS: what has come is read at once, however it was sealed."""
    everything, streams, lulls = trio.Event(), [], []

    async def answer(visit):
        await visit.read()
        await visit.send(STREAM + chunk(b"first"))
        for n in range(100):
            await visit.send(chunk(b"%02d" % n))  # a record each
        await visit.send(END)
        everything.set()
        await visit.wait_gone()

    async def open_tcp(host, port):
        streams.append(Watched(await trio.open_tcp_stream(host, port)))
        return streams[0]

    async with (
        listening(answer, tls=tls) as server,
        open_http(lull=lambda: lulls.append(1), open_tcp=open_tcp) as client,
        client.post(server.url, headers={}, body=b"") as response,
    ):
        await everything.wait()
        before = len(streams[0].reads)
        body = b"".join([data async for data in response.chunks])
        assert b"first" + b"".join(b"%02d" % n for n in range(100)) == body
        assert len(streams[0].reads) - before == len(lulls) <= 2


async def test_who_does_not_read_holds_up_the_server(autojump_clock):
    """An endless body that nobody reads fills nothing but the buffers below."""
    ours, theirs = lockstep_stream_pair()
    visit, sent = Visit(theirs), []

    async def flood():
        await visit.read()
        await visit.send(STREAM)
        with suppress(trio.BrokenResourceError):
            while True:
                await visit.send(chunk(b"x" * 1000))
                sent.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        async with (
            open_http(open_tcp=reaching(ours)) as client,
            client.post("http://x/", headers={}, body=b"") as response,
        ):
            await wait_all_tasks_blocked()
            assert [] == sent
            for n in range(1, 4):
                assert b"x" * 1000 == await anext(response.chunks)
                await wait_all_tasks_blocked()
                assert n == len(sent)


# Connections


async def test_a_connection_is_used_again():
    """After an answer that was read to its end, of whatever status."""
    bad = plain(b"no", status=b"500 No")
    async with listening(saying(*[plain(b"a"), bad, STREAM + END] * 2)) as server:
        async with open_http() as client:
            got = [await post(client, server.url) for _ in range(6)]
            assert [(200, b"a"), (500, b"no"), (200, b"")] * 2 == got
            assert 1 == server.visits
        await server.wait_empty()


async def test_a_connection_that_was_not_read_to_its_end_is_closed():
    """At once, when the context is left; the next request gets a new one."""
    answer = saying(STREAM + chunk(b"a") + chunk(b"b"))
    async with listening(answer) as server, open_http() as client:
        async with client.post(server.url, headers={}, body=b"") as response:
            assert b"ab" == await anext(response.chunks)
        await server.wait_empty()
        async with client.post(server.url, headers={}, body=b"") as response:
            pass
        await server.wait_empty()
        assert 2 == server.visits
        assert [] == [data async for data in response.chunks]


async def test_requests_side_by_side_have_a_connection_each():
    """And each is kept for the next one."""
    both = trio.testing.Sequencer()

    async def answer(visit):
        while await visit.read():
            await visit.send(STREAM + chunk(b"a"))
            await visit.send(END)

    async def ask(client, url, first):
        async with client.post(url, headers={}, body=b"") as response:
            async with both(first):
                pass
            async with both(first + 2):
                assert b"a" == b"".join([data async for data in response.chunks])

    async with listening(answer) as server, open_http() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, client, server.url, 0)
            nursery.start_soon(ask, client, server.url, 1)
        assert 2 == server.visits
        await post(client, server.url)
        await post(client, server.url)
        assert 2 == server.visits


@pytest.mark.parametrize("is_secured", [False, True])
async def test_a_connection_that_the_server_has_closed_meanwhile_is_not_used(is_secured, tls):
    """It is seen before a byte is sent, so nothing can be lost."""
    asked, closed = [], []

    async def answer(visit):
        asked.append(await visit.read())
        await visit.send(plain(b"a"))
        await visit.stream.aclose()
        closed.append(visit)

    async with listening(answer, tls=tls if is_secured else None) as server, open_http() as client:
        for n in range(1, 4):
            assert (200, b"a") == await post(client, server.url)
            await wait_until(lambda n=n: n == len(closed))
        assert 3 == server.visits == len(asked)


@pytest.mark.parametrize("is_reset", [False, True])
async def test_nothing_is_sent_twice(is_reset):
    """A server that takes a request and goes away has perhaps done what it was asked."""
    asked = []

    async def answer(visit):
        asked.append(await visit.read())
        await visit.send(plain(b"a"))
        asked.append(await visit.read())
        if is_reset:
            visit.reset()

    async with listening(answer) as server, open_http() as client:
        await post(client, server.url)
        with pytest.raises(ProviderError, match="the connection broke") as caught:
            await post(client, server.url)
        assert "incomplete" == caught.value.code
        assert 2 == len(asked)
        assert 1 == server.visits


async def test_what_follows_a_body_is_no_part_of_it():
    """Bytes beyond the length are not read as body; whoever sends them breaks the protocol."""
    too_much = plain(b"abc") + b"defgh\r\n\r\n"
    async with listening(saying(too_much, plain(b"b"))) as server, open_http() as client:
        assert (200, b"abc") == await post(client, server.url)
        with pytest.raises(ProviderError) as caught:
            await post(client, server.url)
        assert "malformed" == caught.value.code
        assert (200, b"abc") == await post(client, server.url)
        assert 2 == server.visits


async def test_connections_are_closed_with_the_client():
    """Also those of requests that failed, and of one that a caller broke off."""
    async with listening(saying(plain(b"a"), STREAM)) as server:
        with pytest.raises(ValueError, match="mine"):  # noqa: PT012 - where it is raised matters
            async with open_http() as client:
                await post(client, server.url)
                async with client.post(server.url, headers={}, body=b""):
                    raise ValueError("mine")
        await server.wait_empty()


# What goes wrong


async def test_a_refused_connection_says_so():
    """The reason of the system, and not that of the layers above it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        error = await failure(f"http://127.0.0.1:{port}/")
    assert "unreachable" == error.code
    assert error.is_transient
    assert error.message.startswith(f"127.0.0.1:{port}: expected to reach it, got: [Errno ")
    assert error.message.endswith("Connection refused")


async def test_where_several_addresses_fail_each_reason_is_told_once():
    """A name may stand for many addresses, and each may fail in its own way."""

    async def open_tcp(host, port):
        await trio.lowlevel.checkpoint()
        errors = [OSError("refused"), OSError("no route"), OSError("refused")]
        raise OSError("all attempts failed") from ExceptionGroup("all", errors)

    error = await failure("http://x/", open_tcp=open_tcp)
    assert "x: expected to reach it, got: refused; no route" == error.message


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "a" * 64 + ".example"])
async def test_a_name_that_nobody_has_is_unreachable(host):
    """Also one that nobody could have."""
    error = await failure(f"http://{host}/")
    assert "unreachable" == error.code
    assert error.message.startswith(f"{host}: expected to reach it, got: ")


async def test_an_error_without_words_is_told_by_its_name():
    """Something has to be said."""

    async def open_tcp(host, port):
        await trio.lowlevel.checkpoint()
        raise ConnectionResetError

    error = await failure("http://x/", open_tcp=open_tcp)
    assert "x: expected to reach it, got: ConnectionResetError" == error.message


async def test_connecting_takes_no_longer_than_it_may(autojump_clock):
    """A host that is silent is given up; what comes after the head has no limit here."""

    async def open_tcp(host, port):
        await trio.sleep_forever()

    error = await failure("http://x/", open_tcp=open_tcp)
    assert 10 == trio.current_time()
    assert "timeout" == error.code
    assert "x: expected a connection within 10 s, got no answer" == error.message


async def test_a_handshake_takes_no_longer_than_it_may(tls, autojump_clock):
    """And the connection is closed, though nobody has a handle of it."""
    watched = Watched(memory_stream_pair()[0])
    error = await failure("https://x/", open_tcp=reaching(watched))
    assert 10 == trio.current_time()
    assert "timeout" == error.code
    assert "x: expected a TLS handshake within 10 s, got no answer" == error.message
    assert watched.is_closed


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://x/", "'ftp://x/'"),
        ("api.example.com/v1", "'api.example.com/v1'"),
        ("", "''"),
        ("http:///v1", "'http:///v1'"),
        ("http://x:99999/", "'http://x:99999/'"),
        ("http://x:0/", "'http://x:0/'"),
        ("http://[::1/", "'http://[::1/'"),
        ("http://x/a b", "'http://x/a b'"),
        ("http://x/a\n", "'http://x/a\\n'"),
        ("http://xä/", "'http://xä/'"),
        ("http:/user:hidden@x/", "'http:/user:hidden@x/'"),
        ("ftp://user:hidden@x/?key=hidden", "'ftp://user:[redacted]@x/?key=[redacted]'"),
    ],
)
async def test_what_is_no_url_is_refused(url, shown):
    """Nothing is tried; a password in it is not told."""
    error = await failure(url)
    assert "bad_request" == error.code
    assert (
        f"expected an http or https URL in ASCII, got {shown}; is base_url right?" == error.message
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer canary\n"),
        ("authorization", "Bearer canary "),
        ("authorization", " canary"),
        ("authorization", "canary\x00"),
        ("authorization", "canary\x7f"),
        ("authorization", "canary\N{EN DASH}1"),
        ("authorization", "canary\r\nx: y"),
        ("x y", "canary"),
        ("", "canary"),
        ("ü", "canary"),
    ],
)
async def test_a_header_that_cannot_be_sent_is_named_but_not_told(name, value):
    """Its value may be a key that was copied badly; no layer below gets to quote it."""
    async with open_http() as client:
        with pytest.raises(ProviderError) as caught:
            await post(client, "http://x/", headers={name: value})
    error = caught.value
    assert "bad_request" == error.code
    assert f"x: expected a header of printable ASCII, got something else in {name!r}" in str(error)
    assert "canary" not in f"{error.message}{error.__cause__}{error.__context__}"


@pytest.mark.parametrize("value", ["", "a", "a\tb c", "!~"])
async def test_what_can_be_sent_is_sent(value):
    """The bounds of what a header may hold: RFC 9110, section 5.5, without obs-text."""
    ours, theirs = memory_stream_pair()
    await theirs.send_all(plain(b""))
    async with open_http(open_tcp=reaching(ours)) as client:
        assert (200, b"") == await post(client, "http://x/", headers={"x": value})
    head, _ = await Visit(theirs).read()
    assert b"\r\nx: %b\r\n" % value.encode() in head


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (b"", "incomplete", "Server disconnected without sending a response"),
        (b"HTTP/1.1 200 O", "incomplete", "Server disconnected"),
        (OK, "incomplete", "Server disconnected"),
        (
            b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
            "malformed",
            "expected HTTP/1.1, got: illegal status line",
        ),
        (b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n", "malformed", "illegal status line"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "malformed", "illegal header line"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "malformed", "_SWITCH_UPGRADE"),
        (OK + b"x: " + b"y" * 200_000, "malformed", "too long"),
        (STREAM, "incomplete", "peer closed connection without sending complete message body"),
        (STREAM + chunk(b"a"), "incomplete", "peer closed connection"),
        (STREAM + b"5\r\nab", "incomplete", "peer closed connection"),
        (STREAM + b"zz\r\n", "malformed", "illegal chunk header"),
        (OK + b"content-length: 5\r\n\r\nabc", "incomplete", "received 3 bytes, expected 5"),
        (OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", "malformed", "Content-Length"),
    ],
)
async def test_a_server_that_breaks_the_protocol_is_told_from_one_that_leaves(answer, code, words):
    """Who leaves may be asked again; who speaks something else will go on doing so."""

    async def say(visit):
        await visit.read()
        await visit.send(answer)
        if code == "malformed":  # it stays
            await visit.wait_gone()

    async with listening(say) as server:
        error = await failure(server.url)
        assert code == error.code
        assert words in error.message
        assert error.message.startswith(f"127.0.0.1:{server.port}: ")
        assert len(error.message) < 500
        await server.wait_empty()


@pytest.mark.parametrize("data", [b"", STREAM, STREAM + chunk(b"a")])
async def test_a_reset_is_an_incomplete_answer(data):
    """Before the head or after it."""

    async def reset(visit):
        await visit.read()
        if data:
            await visit.send(data)
            await wait_all_tasks_blocked()
        visit.reset()

    async with listening(reset) as server:
        error = await failure(server.url)
    assert "incomplete" == error.code
    assert "the connection broke: " in error.message
    assert "reset by peer" in error.message


async def test_a_failure_is_a_provider_error_where_it_happens():
    """Whoever reads in a nursery, or catches around the loop, sees it as whoever posts does."""
    async with (
        listening(saying(STREAM + chunk(b"a"))) as server,
        open_http() as client,
        client.post(server.url, headers={}, body=b"") as response,
    ):
        assert b"a" == await anext(response.chunks)
        with pytest.raises(ProviderError, match="the connection broke"):
            await anext(response.chunks)


async def test_an_answer_may_come_before_the_request_was_taken():
    """A server that refuses a body need not read it."""

    async def refuse(visit):
        await visit.receive()
        await visit.send(plain(b"too large", status=b"413 No", headers=b"connection: close\r\n"))
        await visit.stream.send_eof()
        await visit.wait_gone()

    async with listening(refuse) as server, open_http() as client:
        body = b"x" * 20_000_000
        assert (413, b"too large") == await post(client, server.url, body=body)


async def test_a_server_that_leaves_while_it_is_sent_to_may_have_answered():
    """The answer is looked for, though the request could not be sent in full."""
    ours, theirs = memory_stream_pair()

    async def break_off():
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError

    ours.send_stream.send_all_hook = break_off
    await theirs.send_all(plain(b"busy", status=b"503 No", headers=b"connection: close\r\n"))
    async with open_http(open_tcp=reaching(ours)) as client:
        assert (503, b"busy") == await post(client, "http://x/")


# TLS


async def test_tls_is_spoken_and_checked(tls):
    """To the name in the URL, with the certificates that the system, or SSL_CERT_FILE, trusts."""
    async with listening(saying(plain(b"a"), plain(b"b")), tls=tls) as server:
        async with open_http() as client:
            assert (200, b"a") == await post(client, server.url)
            assert (200, b"b") == await post(client, server.url)
            assert 1 == server.visits
        await server.wait_empty()


@pytest.mark.parametrize(
    ("names", "is_known", "words"),
    [
        (["example.org"], True, "IP address mismatch"),
        (["127.0.0.1"], False, "unable to get local issuer certificate"),
    ],
)
async def test_a_certificate_that_does_not_verify_ends_it(tls, ca, names, is_known, words):
    """Nothing is sent; the reason is that of TLS."""
    asked = []

    async def answer(visit):
        asked.append(await visit.read())

    signer = ca if is_known else trustme.CA()
    async with listening(answer, tls=certified(signer, *names)) as server:
        error = await failure(server.url)
        assert "unreachable" == error.code
        assert f"127.0.0.1:{server.port}: expected to reach it, got: TLS: " in error.message
        assert "certificate verify failed" in error.message
        assert words in error.message
        await server.wait_empty()
    assert [None] == asked


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"HTTP/1.1 400 No\r\n\r\n", "TLS: [SSL"), (b"", "TLS: ")],
    ids=["plain", "leaves"],
)
async def test_a_server_without_tls_is_unreachable_with_it(tls, answer, words):
    """It says something else, or leaves."""

    async def no_tls(visit):
        await visit.receive()
        if answer:
            await visit.send(answer)

    async with listening(no_tls) as server:
        error = await failure(server.url.replace("http:", "https:"))
        assert "unreachable" == error.code
        assert words in error.message
        await server.wait_empty()


async def test_a_name_that_tls_cannot_check_is_unreachable(tls):
    """Such as one that begins with a dot; whoever might be there is not asked."""
    watched = Watched(memory_stream_pair()[0])
    error = await failure("https://.example/", open_tcp=reaching(watched))
    assert "unreachable" == error.code
    assert ".example: expected to reach it, got: TLS: server_hostname" in error.message
    assert watched.is_closed


async def test_certificates_that_are_not_there_are_missed(tls, monkeypatch):
    """The variable that names them is told."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    shared_tls.cache_clear()
    error = await failure("https://127.0.0.1:1/")
    assert "bad_request" == error.code
    assert "expected certificates where SSL_CERT_FILE or SSL_CERT_DIR says, got: " in error.message


async def test_tls_is_set_up_once(tls):
    """Reading the certificates costs more than a handshake: all clients share them."""
    answer = saying(plain(b"a"))
    async with listening(answer, tls=tls) as server, open_http() as one, open_http() as other:
        await post(one, server.url)
        await post(other, server.url)
    assert 1 == shared_tls.cache_info().currsize
    assert 1 == shared_tls.cache_info().misses


# Proxies


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({}, "http://x/", None),
        ({"http_proxy": "http://p:1"}, "http://x/", "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, "https://x/", "http://p:1"),
        ({"http_proxy": "http://p:1"}, "https://x/", None),
        ({"http_proxy": ""}, "http://x/", None),
        ({"all_proxy": "socks5://p:1"}, "http://x/", "socks5://p:1"),
        ({"all_proxy": "http://p:1", "https_proxy": "http://q:2"}, "https://x/", "http://q:2"),
        ({"http_proxy": "p:3128"}, "http://x/", "http://p:3128"),
        ({"http_proxy": "http://p:1", "no_proxy": "x"}, "http://x/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "example"}, "http://a.example/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "example"}, "http://anexample/", "http://p:1"),
        ({"http_proxy": "http://p:1", "no_proxy": "a, x:80"}, "http://u:s@x:80/", None),
        ({"http_proxy": "http://p:1", "no_proxy": "x:80"}, "http://x:81/", "http://p:1"),
        ({"http_proxy": "http://p:1", "no_proxy": "::1"}, "http://[::1]:81/", None),
        ({"http_proxy": "http://p:1", "NO_PROXY": "*"}, "http://x/", None),
    ],
)
def test_the_environment_names_the_proxy(variables, url, expected, monkeypatch):
    """As it does for every program: by scheme, for all, and for whom not."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert expected == proxy_of(url)


async def test_http_is_forwarded_by_a_proxy(monkeypatch):
    """It is given the whole URL, and its credentials, which do not go on to the server."""
    heads = []

    async def answer(visit):
        while (asked := await visit.read()) is not None:
            heads.append(asked[0])
            await visit.send(plain(b"a"))

    async with listening(answer) as server, open_proxy(credentials="u:p@ss/ü") as proxy:
        monkeypatch.setenv("http_proxy", f"http://u:p%40ss%2F%C3%BC@127.0.0.1:{proxy.port}/")
        async with open_http() as client:
            assert (200, b"a") == await post(client, server.url)
            assert "u:p" not in repr(client)
        assert [f"POST {server.url} HTTP/1.1".encode()] == proxy.lines
        assert b"proxy" not in heads[0].lower()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with open_http() as client:
            assert (200, b"a") == await post(client, server.url)
        assert 1 == len(proxy.heads)


@pytest.mark.parametrize("is_secured", [False, True])
async def test_https_is_tunnelled_by_a_proxy(is_secured, tls, monkeypatch):
    """TLS is with the server, not with the proxy, which hears of its name and no more."""
    heads = []

    async def answer(visit):
        while (asked := await visit.read()) is not None:
            heads.append(asked[0])
            await visit.send(plain(b"a"))

    async with (
        listening(answer, tls=tls) as server,
        open_proxy(credentials="u:p", tls=tls if is_secured else None) as proxy,
    ):
        scheme = "https" if is_secured else "http"
        monkeypatch.setenv("https_proxy", f"{scheme}://u:p@127.0.0.1:{proxy.port}")
        async with open_http(window=0.001) as client:
            headers = {"authorization": "Bearer k"}
            assert (200, b"a") == await post(client, server.url, headers=headers)
            assert (200, b"a") == await post(client, server.url, headers=headers)
        assert [f"CONNECT 127.0.0.1:{server.port} HTTP/1.1".encode()] == proxy.lines
        assert b"Bearer" not in proxy.heads[0]
        assert 2 == len(heads)
        await server.wait_empty()


async def test_a_proxy_may_refuse_a_tunnel(tls, monkeypatch):
    """It is named, without what stands before it in the URL."""
    async with open_proxy(credentials="u:right") as proxy:
        monkeypatch.setenv("https_proxy", f"http://canary:canary@127.0.0.1:{proxy.port}")
        error = await failure("https://api.example/v1")
        assert "unreachable" == error.code
        assert (
            f"api.example: expected to reach it through the proxy 127.0.0.1:{proxy.port}, "
            "got: 407 Proxy Authentication Required"
        ) == error.message
        assert "canary" not in repr(error)


async def test_a_proxy_answers_for_a_server_that_it_forwards_to(monkeypatch):
    """That is an answer like any other."""
    async with open_proxy(status="502 Bad Gateway") as proxy:
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
        async with open_http() as client:
            assert (502, b"") == await post(client, "http://api.example/v1")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there_is_named(scheme, monkeypatch, tls):
    """So that nobody looks for the fault at the API."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        monkeypatch.setenv(f"{scheme}_proxy", f"http://canary:canary@127.0.0.1:{port}")
        error = await failure(f"{scheme}://api.example/v1")
    assert "unreachable" == error.code
    assert f"api.example: expected to reach it through the proxy 127.0.0.1:{port}" in str(error)
    assert error.message.endswith("Connection refused")
    assert "canary" not in repr(error)


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://canary:canary@p:1080", "got the SOCKS proxy p, which needs the package socksio"),
        ("socks5h://p", "socksio"),
        ("socks4://canary:canary@p", "expected a proxy such as http://host:3128"),
        ("ftp://p", "got one that cannot be used"),
        ("http://", "got one that cannot be used"),
        ("http://canary:can/ary@p:80", "got one that cannot be used"),
        ("http://u:80/canary@p:80", "got one that cannot be used"),
        ("http://p:canary", "got one that cannot be used"),
        ("http://pä:80", "got one that cannot be used"),
        ("http://[canary", "got one that cannot be used"),
    ],
)
async def test_a_proxy_that_cannot_be_used_is_not_told(proxy, words, monkeypatch):
    """A password may be anywhere in it."""
    monkeypatch.setenv("http_proxy", proxy)
    error = await failure("http://x/")
    assert "bad_request" == error.code
    assert words in error.message
    assert "canary" not in f"{error!r}{error.__cause__!r}"


def test_a_socks_proxy_is_used_where_its_package_is_there(monkeypatch, tmp_path):
    """What speaks to it is httpcore's; here it is seen that it is told of it."""
    (tmp_path / "socksio.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    made = http._proxy("socks5://u:p@host:1")
    assert (b"socks5", b"host", 1) == (made.url.scheme, made.url.host, made.url.port)
    assert (b"u", b"p") == made.auth
    assert made.ssl_context is None
    assert (b"u", b"") == http._proxy("http://u@host").auth


# Leaving


def hanging_after(data):
    """Answer with this, and no more."""

    async def answer(visit):
        await visit.read()
        await visit.send(data)
        await visit.wait_gone()

    return answer


@pytest.mark.parametrize("is_secured", [False, True])
@pytest.mark.parametrize(
    ("data", "window", "phase"),
    [
        (b"", 0, "head"),
        (b"HTTP/1.1 200", 0, "half a head"),
        (STREAM, 0, "body"),
        (STREAM + chunk(b"a") + b"5\r\nhe", 0, "half a chunk"),
        (STREAM + chunk(b"a"), 1000, "window"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 9\r\n\r\nabc", 0, "error body"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_who_is_cancelled_leaves_at_once(is_secured, data, window, phase, tls):
    """Wherever it waits: the server sees it, and nothing is left."""
    async with listening(hanging_after(data), tls=tls if is_secured else None) as server:
        before = Footprint.now()
        async with open_http(window=window) as client:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def ask():
                        async with client.post(server.url, headers={}, body=b"{}") as response:
                            if response.status == 500:
                                await response.read_some(1000)
                            async for _ in response.chunks:
                                pass

                    nursery.start_soon(ask)
                    await wait_until(lambda: server.inside)
                    await wait_all_tasks_blocked(0.02)
                    scope.cancel()
            assert scope.cancelled_caught
            await server.wait_empty()  # before the client is closed
        await wait_all_tasks_blocked()
        assert before == Footprint.now()


async def test_who_is_cancelled_in_a_handshake_leaves_at_once(tls):
    """No handle of the connection is left with anybody."""
    async with listening(Visit.wait_gone) as server, open_http() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post, client, server.url.replace("http:", "https:"))
            await wait_until(lambda: server.inside)
            await wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
        await server.wait_empty()


async def test_who_is_cancelled_while_sending_leaves_at_once():
    """A server that does not read holds up a large request, but not its sender's end."""
    is_full, is_left = trio.Event(), trio.Event()

    async def read_little(visit):
        await visit.receive()
        is_full.set()
        await is_left.wait()
        await visit.wait_gone()

    async with listening(read_little) as server, open_http() as client:
        async with trio.open_nursery() as nursery:

            async def send():
                await post(client, server.url, body=b"x" * 50_000_000)

            nursery.start_soon(send)
            await is_full.wait()
            await wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
        is_left.set()
        await server.wait_empty()


@attrs.define(eq=False)
class Blow(trio.abc.Instrument):
    """Cancels one task when it has come to wait for the n-th time; or when it is to go on then.

    The former finds it waiting. The latter finds it with what it waited for, and so it is cancelled
    where it waits next, which need not be where it closes what it has.
    """

    step: int
    is_late: bool
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    task: object = None
    count: int = 0

    def after_task_step(self, task):
        """Strike a task that waits."""
        if task is self.task and not self.is_late:
            self.fall()

    def task_scheduled(self, task):
        """Strike a task that is to go on."""
        if task is self.task and self.is_late:
            self.fall()

    def fall(self):
        """Count, and cancel."""
        self.count += 1
        if self.count == self.step:
            self.scope.cancel()


async def set_later(event):
    await trio.sleep(0.01)
    event.set()


async def serve_in_memory(stream, tls, *, is_tunnelled):
    """Two answers, the second an error; slowly, so that the client has to wait everywhere."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        visit = Visit(stream)
        if is_tunnelled:
            await visit.read()
            await visit.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        if tls is not None:
            visit = Visit(trio.SSLStream(stream, tls, server_side=True, https_compatible=True))
        for pieces in (
            [STREAM, chunk(b"a"), chunk(b"b") + chunk(b"c"), END],
            [b"HTTP/1.1 500 No\r\ncontent-length: 3\r\n\r\n", b"abc"],
        ):
            if await visit.read() is None:
                return
            for piece in pieces:
                await visit.send(piece)
                await trio.sleep(0.01)


def play(blow, tls, *, url, is_tunnelled):
    """Post twice, and see that nothing is left; whether both were answered in full."""
    opened, completed = [], []

    async def everything():
        living = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as servers:

            async def open_tcp(host, port):
                is_there = trio.Event()
                servers.start_soon(set_later, is_there)
                await is_there.wait()  # and then no more: a cancel does not keep it from being made
                ours, theirs = memory_stream_pair()
                opened.append(Watched(ours))
                servers.start_soon(lambda: serve_in_memory(theirs, tls, is_tunnelled=is_tunnelled))
                return opened[-1]

            async with open_http(window=0.015, open_tcp=open_tcp) as client:
                with blow.scope:
                    blow.task = trio.lowlevel.current_task()
                    async with client.post(url, headers={}, body=b"x" * 1000) as response:
                        assert [b"a", b"bc"] == [data async for data in response.chunks]
                        completed.append(response.status)
                    async with client.post(url, headers={}, body=b"") as response:
                        assert b"abc" == await response.read_some(1000)
                        completed.append(response.status)
                blow.task = None
                # What is open now was read to its end, and is kept for the next request.
                kept = [stream for stream in opened if not stream.is_closed]
                at_rest = [line for lines in client._idle.values() for line in lines]
                held = [c for line in at_rest for c in line.pool.connections if not c.is_closed()]
                assert len(kept) == len(held)
                assert all(connection.is_idle() for connection in held)
                assert not kept or completed
            assert all(stream.is_closed for stream in opened)
            generators = trio._core._run.GLOBAL_RUN_CONTEXT.runner.asyncgens.alive
            assert [] == [one for one in generators if one.ag_frame]
            servers.cancel_scope.cancel()
        assert living == trio.lowlevel.current_statistics().tasks_living

    trio.run(everything, clock=MockClock(autojump_threshold=0), instruments=[blow])
    return completed


@pytest.mark.parametrize("is_late", [False, True], ids=["waiting", "going on"])
@pytest.mark.parametrize("way", ["http", "https", "tunnel"])
def test_a_cancel_at_any_step_leaves_nothing(way, is_late, tls, monkeypatch):
    """Connecting, shaking hands, sending, waiting, reading, closing: struck at each step of it."""
    if way == "tunnel":
        monkeypatch.setenv("https_proxy", "http://proxy:3128")
    scheme = "http" if way == "http" else "https"
    reached = []
    for step in itertools.count(1):
        blow = Blow(step, is_late)
        reached.append(
            play(
                blow,
                None if way == "http" else tls,
                url=f"{scheme}://localhost/",
                is_tunnelled=way == "tunnel",
            )
        )
        if not blow.scope.cancel_called:
            break
    assert [200, 500] == reached[-1]
    assert [] == reached[0]
    assert len(reached) > 20


def test_the_failures_of_httpcore_are_all_known():
    """It has no common base; a new one would pass through."""
    told = {
        thing
        for name in httpcore2.__all__
        if isinstance(thing := getattr(httpcore2, name), type) and issubclass(thing, Exception)
    }
    # The first is dealt with by httpcore itself, the second cannot come: the URL was looked at.
    never = {httpcore2.ConnectionNotAvailable, httpcore2.UnsupportedProtocol}
    assert {kind for kind in told if not issubclass(kind, http._FAILURES)} == never


# Chunks that came together


def chunks_of(*sizes, last=END):
    return b"".join(chunk(b"x" * size) for size in sizes) + last


def judged(data):
    """What a parser makes of a body: its data, and whether it ends or is refused."""
    connection, got = h11.Connection(h11.CLIENT), b""
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(STREAM)
    assert isinstance(connection.next_event(), h11.Response)
    connection.receive_data(data)
    try:
        while isinstance(event := connection.next_event(), h11.Data):
            got += bytes(event.data)
    except h11.RemoteProtocolError:
        return got, "refused"
    return got, "ended" if isinstance(event, h11.EndOfMessage) else "waits"


def taken_apart(pieces):
    """The same, of a body that comes in these pieces, where the parser sees only the rest."""
    body, got, behind = ChunkedBody(), b"", b""
    for piece in pieces:
        if body.is_over:
            behind += piece
        else:
            got += body.feed(piece)
    rest, verdict = judged(body.rest + behind)
    assert b"" == rest or verdict == "refused"
    return got, verdict


def every_cut(body):
    step = max(1, len(body) // 500)
    yield from ([body[:cut], body[cut:]] for cut in range(0, len(body), step))
    if len(body) < 1_000:
        yield [body[n : n + 1] for n in range(len(body))]


@pytest.mark.parametrize(
    "body",
    [
        chunks_of(1, 2, 3),
        chunks_of(300, 70_000, 1),
        b"5;name=value\r\nhello\r\n0003  \r\nabc\r\nA\r\n"
        + b"\r\n" * 5
        + b"\r\n0\r\nTrailer: x\r\n\r\n",
        END,
    ],
)
def test_a_chunked_body_holds_the_same_however_it_is_cut(body):
    """What a parser would have found in it; its end is left to the parser."""
    assert "ended" == judged(body)[1]
    for pieces in every_cut(body):
        assert judged(body) == taken_apart(pieces)


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nhello\r\n",
        b"5\r\nhelloXX0\r\n\r\n",
        b"5\r\nhello\rX",
        b"-5\r\nhello\r\n",
        b"\r\n",
        b"5" * 300 + b"\r\n",
        b"5;" + b"x" * 300 + b"\x00\r\n",
    ],
)
def test_what_does_not_look_like_chunks_is_the_parser_s_to_refuse(body):
    """What was whole before it is handed on."""
    body += b"\r\n" * 20
    assert "refused" == judged(body)[1]
    for pieces in every_cut(body):
        assert "refused" == taken_apart(pieces)[1]


@given(st.lists(st.binary(max_size=20), max_size=8), st.lists(st.integers(0, 200), max_size=8))
def test_any_body_in_any_pieces_is_the_same_body(pieces, cuts):
    """Also one whose data looks like chunks."""
    body = b"".join(chunk(piece) for piece in pieces if piece) + END
    places = sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})
    cut = [body[a:b] for a, b in itertools.pairwise(places)]
    assert (b"".join(pieces), "ended") == taken_apart(cut)


async def test_a_head_may_come_in_pieces_and_with_the_body():
    """Wherever it is cut, and with interim answers before it."""
    whole = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + STREAM + chunks_of(1, 2) + END
    for cut in range(1, len(whole) - len(END)):

        async def answer(visit, cut=cut):
            await visit.read()
            await visit.send(whole[:cut])
            await trio.testing.wait_all_tasks_blocked()
            await visit.send(whole[cut:])

        async with (
            listening(answer) as server,
            open_http() as client,
            client.post(server.url, headers={}, body=b"") as response,
        ):
            assert b"xxx" == b"".join([data async for data in response.chunks])


@pytest.mark.parametrize("ending", ["more", "late", "fin", "rst"])
async def test_what_a_socket_has_after_the_window_is_taken_at_once(ending):
    """It may have something, nothing as yet, its end, or an error: each is what it is."""
    opened, goes_on = trio.Event(), trio.Event()

    async def answer(visit):
        await visit.read()
        await visit.send(STREAM)
        await opened.wait()
        await visit.send(chunk(b"a"))
        await goes_on.wait()
        match ending:
            case "more" | "late":
                await trio.sleep(0.2 if ending == "late" else 0)
                await visit.send(chunk(b"b") + chunk(b"c") + END)
                await visit.read()
            case "rst":
                reset(visit.stream)
            case _:
                pass

    async with (
        listening(answer) as server,
        open_http(window=0.1) as client,
        client.post(server.url, headers={}, body=b"") as response,
    ):
        opened.set()
        assert b"a" == await anext(response.chunks)
        goes_on.set()
        if ending in ("more", "late"):
            assert b"bc" == b"".join([data async for data in response.chunks])
        else:
            with pytest.raises(ProviderError) as broken:
                await anext(response.chunks)
            assert "incomplete" == broken.value.code


def reset(stream):
    linger = struct.pack("ii", 1, 0)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    stream.socket.close()


async def test_a_socket_that_is_closed_under_a_paced_stream_says_so():
    """Nobody reads a descriptor that may be somebody else's by now."""
    async with listening(saying(STREAM)) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        paced = PacedStream(stream, Pace(0.01, list, trio.sleep_until), is_paced=True)
        paced._not_before = trio.current_time() + 0.01
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.aclose)
            with pytest.raises(trio.ClosedResourceError):
                await paced.receive_some()
