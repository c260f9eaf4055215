"""The client of paced streams: what it reads, what it only counts, and what it says of both.

Rules: its machines get bytes and times; over real sockets, a server of a few lines says what is
asked of it, and no test depends on how fast that goes.
"""

import math
import os
import re
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

sys.path.append(str(Path(__file__).parent.parent))  # last: what is installed is what is tested

from bench.clients.paced import (
    MARGIN,
    Counted,
    Parsed,
    Span,
    lateness,
    numbered,
    sampled,
    slip,
    spread,
    spread_evenly,
)
from bench.measuring import Address
from bench.pacing import UNSTEADY, Load, attempt, paced

TEXT = re.compile(rb'"delta": ?"([0-9;]+)"')
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
LAST = b"0\r\n\r\n"
END = b'"outcome":"success"'
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST
MS = 1_000_000  # nanoseconds


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(*made: int) -> bytes:
    """A chunk with one frame, of one token or of several that were joined."""
    texts = b"".join(b"%d;" % at for at in made)
    return chunk(b'id: 1\nevent: part_delta\ndata: {"type":"part_delta","delta":"%b"}\n\n' % texts)


def stream_of(*made: int, end: bytes = END) -> bytes:
    """A whole response."""
    ending = chunk(b"event: end\ndata: {%b}\n\n" % end)
    return HEAD + b"".join(map(token, made)) + ending + LAST


def parsed(end: bytes = END) -> Parsed:
    return Parsed(text=TEXT, end=end)


def whole(data: bytes) -> list[bytes]:
    return [data]


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def in_threes(data: bytes) -> list[bytes]:
    return [data[at : at + 3] for at in range(0, len(data), 3)]


@pytest.mark.parametrize("cut", [whole, bytewise, in_threes])
@pytest.mark.parametrize("make", [Counted, parsed])
def test_tokens_are_found_however_the_bytes_are_cut(
    make: Callable[[], Counted], cut: Callable[[bytes], list[bytes]]
) -> None:
    """Each token once, a semicolon in the head is none, and the last chunk is the end."""
    stream = make()
    sent = HEAD + token(10) + token(20, 30) + chunk(b"event: end\ndata: {%b}\n\n" % END) + LAST
    for data in cut(sent[:-1]):
        stream.feed(data, 40)

    assert not stream.is_complete
    stream.feed(sent[-1:], 40)
    assert stream.is_complete
    assert 3 == stream.tokens
    assert len(sent) == stream.received
    assert stream.failure(3, leaves=False) is None


def test_what_is_read_in_full_has_its_times() -> None:
    """A token that comes joined to others came when they did; text that is told again is none."""
    stream = parsed()
    stream.feed(HEAD + token(10), 11)
    stream.feed(token(20, 30), 35)
    stream.feed(chunk(b'event: part_finished\ndata: {"text":"10;20;30;"}\n\n'), 40)

    assert [10, 20, 30] == list(stream.made)
    assert [11, 35, 35] == list(stream.came)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "expected status 200, got b'HTTP/1.1 503"),
        (b"", "expected status 200, got b''"),
        (HEAD + LAST, "expected tokens, got none"),
        (HEAD + token(1) + token(2), "expected an end in time, got none, and 2 tokens"),
        (stream_of(1), "expected 2 tokens, got 1"),
    ],
)
@pytest.mark.parametrize("make", [Counted, parsed])
def test_a_response_that_is_wrong_is_told(
    make: Callable[[], Counted], response: bytes, expected: str
) -> None:
    """Another status, no token, no end, or too few of them."""
    stream = make()
    stream.feed(response, 5)

    assert (stream.failure(2, leaves=False) or "").startswith(expected)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (stream_of(1, 2, 3), "expected 2 tokens, got 3"),
        (stream_of(2, 1), "expected each token once and in order, got one again or late"),
        (stream_of(1, 1), "expected each token once and in order, got one again or late"),
        (stream_of(1, 2, end=b"error"), 'expected b\'"outcome":"success"\' before the last chunk'),
    ],
)
def test_who_reads_in_full_sees_more(response: bytes, expected: str) -> None:
    """Tokens too many, out of order or doubled, or another last event."""
    stream = parsed()
    stream.feed(response, 5)

    assert (stream.failure(2, leaves=False) or "").startswith(expected)


def test_where_nothing_tells_the_end_the_last_chunk_does() -> None:
    """A server may say nothing at its end; and who reads along need not know how much will come."""
    stream = parsed(end=b"")
    stream.feed(HEAD + token(1) + LAST, 5)

    assert stream.failure(None, leaves=False) is None


@pytest.mark.parametrize("make", [Counted, parsed])
def test_a_stream_that_is_left_must_not_have_ended_before(make: Callable[[], Counted]) -> None:
    """Who leaves has seen tokens and no end; an end before that is a failure."""
    stream = make()
    stream.feed(HEAD + token(1), 5)

    assert stream.failure(1_000, leaves=True) is None
    stream.is_over = True
    expected = "expected a stream that goes on, got its end after 1 tokens"
    assert expected == stream.failure(1_000, leaves=True)


def test_a_server_that_is_behind_is_late_even_if_it_is_quick_then() -> None:
    """Tokens that are made late and delivered at once are late since they were due."""
    stream = parsed()
    for made in (100, 110, 145, 146, 147, 150):  # due 10 apart; nothing was made for a while
        stream.feed((HEAD if made == 100 else b"") + token(made), made + 1)

    assert [1, 1, 26, 17, 8, 1] == stream.behind(10)
    assert ([1] * 6, [1, 1, 1, 8, 17, 26]) == lateness([stream], 0, 1_000, 10)
    assert pytest.approx(25 / 1e6) == slip([stream], 10)


def test_the_schedule_is_that_of_the_token_that_was_earliest() -> None:
    """If the first token was late itself, later ones show when it was due."""
    stream = parsed()
    stream.feed(HEAD + token(107) + token(110) + token(120), 125)

    assert [25, 15, 5] == stream.behind(10)
    assert [] == parsed().behind(10)


def test_only_what_comes_in_the_steady_part_is_late() -> None:
    """What is replayed to a reader who joins, and what comes while others end, does not count."""
    stream = parsed()
    stream.feed(HEAD + token(100, 110, 120), 500)
    stream.feed(token(130), 501)
    stream.feed(token(140), 999)
    stream.feed(token(150), 1_000)

    assert ([371, 859], [371, 859]) == lateness([stream, parsed()], 501, 1_000, 10)


def test_lateness_is_told_by_its_middle_its_hundredth_and_its_last() -> None:
    """Of a hundred tokens, the last is the hundredth from above; milliseconds."""
    late = [n * MS for n in range(1, 201)]

    assert {"p50": 101.0, "p99": 199.0, "max": 200.0} == spread(late)
    assert {"p50": 1.0, "p99": 1.0, "max": 1.0} == spread(late[:1])


def test_streams_that_are_read_in_full_are_spread_over_all() -> None:
    """As far apart as can be, none of those that stall, and never more than there are."""
    assert [1, 4, 7] == spread_evenly(range(9), 3)
    assert [] == spread_evenly(range(9), 0)
    assert [0, 1, 2] == spread_evenly(range(3), 100)
    assert frozenset({0, 2}) == sampled(4, 2, frozenset({1, 3}))


def test_each_stream_has_its_number_in_its_request() -> None:
    """KEY is replaced, always by as many digits."""
    assert b"/run?key=000007 000007" == numbered(b"/run?key=KEY KEY", 7)


def test_the_steady_part_begins_when_all_have_begun_and_settled() -> None:
    """It is as long as is asked for, and ends before the first stream does."""
    span = Span(settle=1.0, steady=2.0)
    span.note_first_token(10.0)
    assert math.inf == span.begin
    span.note_first_token(12.0)
    span.note_all_begun(12.0)
    assert (13.0, 15.0) == (span.begin, span.end)

    span = Span(settle=1.0, lasts=6.0)
    span.note_first_token(10.0)
    span.note_first_token(12.0)
    span.note_all_begun(12.0)
    assert (13.0, 16.0 - MARGIN) == (span.begin, span.end)

    span = Span(settle=1.0, steady=5.0, ends=15.0)
    span.note_first_token(10.0)
    span.note_all_begun(10.0)
    assert (11.0, 15.0 - MARGIN) == (span.begin, span.end)


# Over sockets -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Toy:
    """A server that says a token every so often to whoever connects.

    Attributes:
        requests: As they came.
        tokens: To each.
        gap: Seconds between two.
        answer: What it says instead, if anything.
        resets: Whether it cuts off who does not read.
    """

    requests: list[bytes] = attrs.field(factory=list)
    tokens: int = 1_000_000
    gap: float = 0.005
    answer: bytes = b""
    resets: bool = False
    padding: bytes = b""

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer one request."""
        try:
            async with stream:
                self.requests.append(await stream.receive_some())
                await stream.send_all(self.answer or HEAD)
                if self.answer:
                    return
                for _ in range(self.tokens):
                    with trio.move_on_after(0.5 if self.resets else math.inf) as patience:
                        await stream.send_all(token(time.monotonic_ns()) + self.padding)
                    if patience.cancelled_caught:
                        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        return
                    await trio.sleep(self.gap)
                await stream.send_all(chunk(b"event: end\ndata: {%b}\n\n" % END) + LAST)
        except trio.BrokenResourceError:
            pass  # the client has left


@asynccontextmanager
async def serving(toy: Toy) -> AsyncIterator[Address]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, toy.serve, 0, host="127.0.0.1"))
        host, port = listeners[0].socket.getsockname()
        yield Address(os.getpid(), host, port)
        nursery.cancel_scope.cancel()


def load(at: Address, **more: object) -> Load:
    usual = {
        "request": f"GET /fan?key=KEY HTTP/1.1\r\nHost: {at.host}\r\n\r\n",
        "end": END.decode(),
        "streams": 6,
        "sample": 2,
        "rate": 200.0,
        "opening": 0.001,
        "settle": 0.05,
        "seconds": 20.0,
    }
    return Load(**(usual | more))


async def test_streams_are_opened_read_and_left() -> None:
    """All of them open, each with its number; tokens and processor time are those of a part."""
    toy = Toy()
    with trio.fail_after(30):
        async with serving(toy) as at:
            found = await paced(load(at, steady=0.4, leave=True), at, None, beside={"us": at.pid})

    assert found.failure is None
    assert {b"GET /fan?key=%06d HTTP/1.1" % n for n in range(6)} == {
        request.partition(b"\r\n")[0] for request in toy.requests
    }
    assert found.steady is not None
    assert found.steady.tokens > found.steady.sampled["tokens"] > 0
    assert 2 == found.steady.sampled["streams"]
    assert found.steady.seconds >= 0.3
    assert 0 < found.steady.late_ms["p50"] <= found.steady.late_ms["max"]
    assert found.steady.late_ms["p50"] <= found.steady.late_due_ms["max"]
    assert {"client", "server", "us"} == set(found.steady.cpu_seconds)


async def test_streams_are_read_to_their_end() -> None:
    """Each has all its tokens, its last event and its last chunk, whether it is read or counted."""
    with trio.fail_after(30):
        async with serving(Toy(tokens=200)) as at:
            found = await paced(load(at, tokens=200, lasts=1.0), at, None)
            assert found.failure is None
            wrong = await paced(load(at, tokens=201, lasts=1.0), at, None)

    assert 6 == wrong.failed
    assert "6 streams failed: expected 201 tokens, got 200" == wrong.failure


async def test_a_server_that_refuses_is_told() -> None:
    """No stream began, so there is no steady part; and what came is shown."""
    with trio.fail_after(30):
        async with serving(Toy(answer=b"HTTP/1.1 503 Busy\r\n\r\n")) as at:
            found = await paced(load(at, steady=0.4, leave=True), at, None)

    assert found.steady is None
    assert (found.failure or "").startswith(
        "6 streams failed: expected status 200, got b'HTTP/1.1 5"
    )


async def test_streams_that_are_too_short_have_no_steady_part() -> None:
    """They have not failed, but there is nothing to say of them."""
    with trio.fail_after(30):
        async with serving(Toy(tokens=2)) as at:
            found = await paced(load(at, tokens=2, lasts=0.01), at, None)

    assert (0, None, UNSTEADY) == (found.failed, found.steady, found.failure)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="expected Linux")
@pytest.mark.parametrize("resets", [False, True])
async def test_streams_that_stall_are_not_judged(*, resets: bool) -> None:
    """They stop reading when all have begun; what their server does about them is told."""
    toy = Toy(resets=resets, padding=chunk(b": %b\n\n" % (b"x" * 200_000)), gap=0.02)
    with trio.fail_after(60):
        async with serving(toy) as at:
            found = await paced(load(at, rate=50, stalled=2, steady=3.0, leave=True), at, None)

    assert found.failure is None
    assert {"open": 0 if resets else 2, "closed": 2 if resets else 0} == dict(found.stalled)
    assert found.steady is not None
    assert found.steady.tokens_due == pytest.approx(4 * 50 * found.steady.seconds)


async def test_a_server_that_breaks_is_a_word() -> None:
    """What a peer does wrong is told; it ends no scenario."""

    async def break_down() -> Load:
        await trio.lowlevel.checkpoint()
        raise ExceptionGroup("of a nursery", [RuntimeError("expected an address")])

    async def succeed() -> int:
        await trio.lowlevel.checkpoint()
        return 5

    assert "RuntimeError: expected an address" == await attempt(break_down)
    assert 5 == await attempt(succeed)
