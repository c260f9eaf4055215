"""The client of what is paced: so many streams of tokens, and of every token how late it came.

Knows: sockets, where in a frame the text of a token stands, and the clock that its maker put there.
Must never know who serves, nor parse what it only has to count: it must not be the bottleneck, and
it says what share of a processor it took. Needs nothing but the standard library.

Streams open one after the other, by a schedule, whatever the server does. When all of them have
had a token and some time has passed, the steady part begins. At its two ends the clocks of the
processes are read and the tokens counted, so connecting, what is replayed to who joins late, and
ending are no part of it.

Of some streams, spread evenly over all, every token is read: when it was made, and when it came.
Of the others only the semicolons are counted, one per token. How late tokens are is said of the
former, and twice: since a token was made, and since it was due by its stream's own schedule. A
server that is behind makes tokens late, and only the second figure shows that.

Streams that stall stop reading for good when all have begun; they are neither counted nor judged.

Run as `python -m bench.clients.paced ...`; prints one JSON object.
"""

import argparse
import gc
import json
import math
import os
import re
import selectors
import socket
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"  # RFC 9112 section 7.1, behind the end of the chunk before it
FRAME_END = b"\n\n"  # chunks have whole frames here: none of their heads is within one
TOKEN_END = b";"  # once per token, and nowhere else in a frame that is counted
RECEIVE = 64 * 1024  # bytes taken at once
SHOWN = 120  # bytes of a wrong answer that are worth showing
PAUSE = 0.001  # seconds between two looks at all streams: a wake-up per token would cost a core
LOOK = 0.01  # seconds to wait for news at most
OPENED_AT_ONCE = 20  # streams between two looks at most, where the opening is behind
MARGIN = 0.25  # seconds between the steady part and the end of the first stream
STALLED_BUFFER = 4096  # bytes that the kernel takes for one that does not read; it doubles them
STALLED_SEGMENT = (
    256  # bytes; with small segments the server's kernel holds 32 KiB for it, which on
)
# loopback would be 2.8 MB: no stalled reader would be noticed within minutes
ESTABLISHED = 1  # the state of a connection, the first byte of TCP_INFO


@dataclass(slots=True)
class Counted:
    """What came on one connection, of which tokens are only counted; a machine without sockets."""

    tokens: int = 0
    received: int = 0
    head: bytes = b""
    tail: bytes = b""
    has_head: bool = False
    is_complete: bool = False
    is_over: bool = False  # nothing more can come

    def feed(self, data: bytes, _now: int) -> None:
        """Take the next bytes."""
        self.received += len(data)
        if not self.has_head:
            data = self._past_head(data)
        self.tokens += data.count(TOKEN_END)
        self.tail = (self.tail + data)[-len(LAST_CHUNK) :]
        self.is_complete = self.tail == LAST_CHUNK

    def _past_head(self, data: bytes) -> bytes:
        """Return what is behind the head of the response, with the line end before it."""
        self.head += data
        head, end, data = self.head.partition(HEAD_END)
        if not end:
            return b""
        self.has_head = True
        self.head = head[:SHOWN]
        return b"\r\n" + data

    def failure(self, expected: int | None, *, leaves: bool) -> str | None:
        """Say what is wrong with the response, if anything is.

        Args:
            expected: Tokens in all; None where nobody can say.
            leaves: Whether the stream was left before its end.
        """
        if not self.head.startswith(b"HTTP/1.1 200 "):
            return f"expected status 200, got {self.head[:SHOWN]!r}"
        if not self.tokens:
            return "expected tokens, got none"
        if leaves:
            over = f"expected a stream that goes on, got its end after {self.tokens} tokens"
            return over if self.is_over else None
        if not self.is_complete:
            return f"expected an end in time, got none, and {self.tokens} tokens"
        if expected is not None and self.tokens < expected:
            return f"expected {expected} tokens, got {self.tokens}"
        return None


@dataclass(slots=True)
class Parsed(Counted):
    """What came on one connection, of which every token is read."""

    text: re.Pattern[bytes] = re.compile(b"")
    end: bytes = b""
    rest: bytes = b""
    has_end: bool = False
    made: array = field(default_factory=lambda: array("q"))  # by token: when
    came: array = field(default_factory=lambda: array("q"))

    def feed(self, data: bytes, now: int) -> None:
        """Take the next bytes, which came at `now` (nanoseconds)."""
        self.received += len(data)
        if not self.has_head:
            data = self._past_head(data)
        data = self.rest + data
        whole = data.rfind(FRAME_END) + len(FRAME_END)
        if whole >= len(FRAME_END):
            frames, data = data[:whole], data[whole:]
            for texts in self.text.findall(frames):
                for text in texts.split(TOKEN_END)[:-1]:
                    self.made.append(int(text))
                    self.came.append(now)
            self.tokens = len(self.made)
            self.has_end = self.has_end or self.end in frames
        self.rest = data
        self.is_complete = data.endswith(LAST_CHUNK)

    def failure(self, expected: int | None, *, leaves: bool) -> str | None:
        """Say what is wrong with the response, if anything is; see `Counted`."""
        made = self.made
        if (failure := Counted.failure(self, expected, leaves=leaves)) is not None:
            return failure
        if expected is not None and len(made) != expected and not leaves:
            return f"expected {expected} tokens, got {len(made)}"
        if any(later <= earlier for earlier, later in pairwise(made)):
            return "expected each token once and in order, got one again or late"
        if not (self.has_end or leaves):
            return f"expected {self.end!r} before the last chunk, got none"
        return None

    def behind(self, gap: float) -> list[float]:
        """By token: nanoseconds from when it was due to when it came.

        Due times are `gap` (nanoseconds) apart. The token that was made earliest, as they go, says
        where they lie.
        """
        begin = min((at - n * gap for n, at in enumerate(self.made)), default=0)
        return [at - begin - n * gap for n, at in enumerate(self.came)]


@dataclass(slots=True)
class Span:
    """When the steady part begins and ends; seconds.

    Attributes:
        settle: From when all have begun to where it begins.
        steady: How long it is, unless something below ends it before.
        lasts: How long a stream goes on after its first token.
        ends: When all streams end.
        least: If it cannot be as long as that, there is none.
    """

    settle: float
    steady: float = math.inf
    lasts: float = math.inf
    ends: float = math.inf
    least: float = 0.3
    begin: float = math.inf
    end: float = math.inf

    def note_first_token(self, now: float) -> None:
        """One more stream has begun."""
        self.end = min(self.end, now + self.lasts - MARGIN, self.ends - MARGIN)

    def note_all_begun(self, now: float) -> None:
        """No stream is to be waited for."""
        self.begin = now + self.settle
        self.end = min(self.end, self.begin + self.steady)


@dataclass(slots=True)
class Sample:
    """The clocks, at one instant."""

    at: int
    cpu: dict[str, float]
    waited: int  # nanoseconds that the server was ready to run, and others had its core
    memory: float | None  # MiB
    tokens: int


class Client:
    """All streams, and the steady part.

    Attributes:
        stalled: Numbers of the streams that stop reading.
        clocks: Of processes, by name.
        server: Process id of who serves.
    """

    def __init__(
        self,
        streams: Sequence[Counted],
        span: Span,
        *,
        stalled: Iterable[int] = (),
        clocks: Mapping[str, int],
        server: int,
    ) -> None:
        self.streams = streams
        self.span = span
        self.stalled = frozenset(stalled)
        self.clocks = clocks
        self.server = server
        self.silent = len(streams)
        self.opened: list[socket.socket] = []
        self.samples: list[Sample] = []
        self.fates: list[bool | None] = []
        self.waited_share = 0.0
        self.selector = selectors.DefaultSelector()

    def run(
        self,
        address: tuple[str, int],
        request: bytes,
        *,
        opening: float,
        seconds: float,
        leaves: bool,
    ) -> None:
        """Open all streams, and read them to their end or leave after the steady part.

        Args:
            address: Where to.
            request: With KEY where the number of the stream shall be.
            opening: Seconds between two streams that open.
            seconds: For everything, at most.
            leaves: Whether to leave.
        """
        began, waited_before = time.monotonic(), waited(self.server)
        with self.selector:
            while len(self.opened) < len(self.streams) or self.selector.get_map():
                now = time.monotonic()
                if now > began + seconds or (leaves and len(self.samples) > 1):
                    break
                due = min(len(self.streams), int((now - began) / opening) + 1)
                for number in range(len(self.opened), due)[:OPENED_AT_ONCE]:
                    self.open(address, numbered(request, number))
                self.note_steadiness(now)
                for key, events in self.selector.select(LOOK):
                    if events & selectors.EVENT_WRITE:
                        self.send(key.fileobj, *key.data)
                    elif not self.read(key.fileobj, key.data):
                        self.selector.unregister(key.fileobj)
                time.sleep(PAUSE)
        waited_for = (waited(self.server) - waited_before) / 1e9
        self.waited_share = max(0.0, waited_for) / (time.monotonic() - began)
        self.fates = [is_open(self.opened[number]) for number in self.stalled_now]
        for sock in self.opened:
            sock.close()

    @property
    def stalled_now(self) -> list[int]:
        return [] if self.silent else sorted(self.stalled)

    def open(self, address: tuple[str, int], request: bytes) -> None:
        """Begin to connect; what comes of it will be seen."""
        sock = socket.socket()
        sock.setblocking(False)
        stream = self.streams[len(self.opened)]
        if len(self.opened) in self.stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STALLED_BUFFER)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, STALLED_SEGMENT)
        sock.connect_ex(address)
        self.opened.append(sock)
        self.selector.register(sock, selectors.EVENT_WRITE, (stream, request))

    def send(self, sock: socket.socket, stream: Counted, request: bytes) -> None:
        """Send the whole request, which no buffer is too small for."""
        with suppress(OSError):  # it could not connect: reading will tell
            sock.send(request)
        self.selector.modify(sock, selectors.EVENT_READ, stream)

    def read(self, sock: socket.socket, stream: Counted) -> bool:
        """Take what came; tell whether more will."""
        try:
            data = sock.recv(RECEIVE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""  # a reset: the stream has no end
        now = time.monotonic_ns()
        was_silent = not stream.tokens
        if data:
            stream.feed(data, now)
        stream.is_over = not data or stream.is_complete
        if was_silent and (stream.tokens or stream.is_over):
            self.note_begun(time.monotonic())
        return not stream.is_over

    def note_begun(self, now: float) -> None:
        """A stream has its first token, or has ended without one."""
        self.silent -= 1
        self.span.note_first_token(now)
        if self.silent:
            return
        self.span.note_all_begun(now)
        for number in self.stalled:
            with suppress(KeyError):  # it has ended already
                self.selector.unregister(self.opened[number])

    def note_steadiness(self, now: float) -> None:
        """Look at the clocks where the steady part begins, and where it ends."""
        span = self.span
        due = (span.begin <= now < span.end - span.least, now >= span.end)
        if len(self.samples) < len(due) and due[len(self.samples)]:
            self.samples.append(self.sample())

    def sample(self) -> Sample:
        cpu = {"client": time.process_time()}
        for name, clock in self.clocks.items():
            with suppress(OSError):  # it has ended
                cpu[name] = time.clock_gettime(clock)
        tokens = sum(stream.tokens for stream in self.judged())
        return Sample(time.monotonic_ns(), cpu, waited(self.server), resident(self.server), tokens)

    def judged(self) -> list[Counted]:
        """The streams that do not stall."""
        return [s for number, s in enumerate(self.streams) if number not in self.stalled]

    def answer(self, *, tokens: int | None, rate: float, leaves: bool) -> dict[str, object]:
        failures = [
            failure
            for stream in self.judged()
            if (failure := stream.failure(tokens, leaves=leaves)) is not None
        ]
        return {
            "failed": len(failures),
            "failures": failures[:3],
            "bytes": sum(stream.received for stream in self.streams),
            "stalled": {
                "open": self.fates.count(True),
                "closed": self.fates.count(False),
            },
            "waited_share": self.waited_share,
            "slip_ms": slip(self.parsed(), 1e9 / rate),
            "steady": self.steady(rate) if len(self.samples) > 1 else None,
        }

    def parsed(self) -> list[Parsed]:
        return [stream for stream in self.judged() if isinstance(stream, Parsed)]

    def steady(self, rate: float) -> dict[str, object] | None:
        begin, end = self.samples
        since_made, since_due = lateness(self.parsed(), begin.at, end.at, 1e9 / rate)
        tokens, seconds = end.tokens - begin.tokens, (end.at - begin.at) / 1e9
        if not (since_made and tokens):
            return None
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_due": len(self.judged()) * rate * seconds,
            "waited_seconds": max(0, end.waited - begin.waited) / 1e9,
            "cpu_seconds": {name: cpu - begin.cpu[name] for name, cpu in end.cpu.items()},
            "memory_mib": [begin.memory, end.memory],
            "sampled": {"streams": len(self.parsed()), "tokens": len(since_made)},
            "late_ms": spread(since_made),
            "late_due_ms": spread(since_due),
        }


def lateness(
    streams: Iterable[Parsed], begin: int, end: int, gap: float
) -> tuple[list[float], list[float]]:
    """How late tokens came that came between two instants; all in nanoseconds.

    Returns:
        From when they were made, and from when they were due, each from the least to the most.
    """
    since_made: list[float] = []
    since_due: list[float] = []
    for stream in streams:
        for made, came, behind in zip(stream.made, stream.came, stream.behind(gap), strict=True):
            if begin <= came < end:
                since_made.append(came - made)
                since_due.append(behind)
    return sorted(since_made), sorted(since_due)


def spread(late: Sequence[float]) -> dict[str, float]:
    """The middle, the hundredth from above and the last of sorted nanoseconds, as milliseconds."""
    at = {"p50": len(late) // 2, "p99": len(late) * 99 // 100, "max": -1}
    return {name: late[index] / 1e6 for name, index in at.items()}


def slip(streams: Iterable[Parsed], gap: float) -> float:
    """How far the maker of tokens was behind its schedule at most, in milliseconds."""
    slips = (
        (made - stream.made[0] - n * gap) / 1e6
        for stream in streams
        for n, made in enumerate(stream.made)
    )
    return max(slips, default=0.0)


def sampled(streams: int, wanted: int, stalled: frozenset[int]) -> frozenset[int]:
    """Numbers of so many streams, spread evenly over those that do not stall."""
    eligible = [number for number in range(streams) if number not in stalled]
    return frozenset(spread_evenly(eligible, wanted))


def spread_evenly(numbers: Sequence[int], wanted: int) -> list[int]:
    """So many of these numbers, or all, as far apart as can be."""
    wanted = min(wanted, len(numbers))
    return [numbers[(2 * n + 1) * len(numbers) // (2 * wanted)] for n in range(wanted)]


def numbered(request: bytes, number: int) -> bytes:
    """Put a number, always of one length, for each KEY."""
    return request.replace(b"KEY", b"%06d" % number)


def waited(pid: int) -> int:
    """Nanoseconds that the threads of a process were ready to run and did not; 0 if unknown."""
    total = 0
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, IndexError):
                total += int((thread / "schedstat").read_text().split()[1])
    return total


def resident(pid: int) -> float | None:
    """MiB that a process has in memory."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def is_open(sock: socket.socket) -> bool | None:
    """Whether the other side keeps a connection, as far as came through; None if unknown."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--request", required=True, help="whole; KEY is put for a stream's number")
    parser.add_argument("--field", default="delta", help="of a frame's JSON that holds the text")
    parser.add_argument("--end", default="", help="what the last frame has, if it can be told")
    parser.add_argument("--streams", required=True, type=int)
    parser.add_argument("--sample", type=int, default=128, help="streams that are read in full")
    parser.add_argument("--stalled", type=int, default=0, help="streams that stop reading")
    parser.add_argument("--tokens", type=int, help="of each stream, where that is known")
    parser.add_argument("--rate", required=True, type=float, help="tokens per second and stream")
    parser.add_argument("--opening", type=float, default=0.01, help="seconds between two streams")
    parser.add_argument("--settle", type=float, default=0.5, help="seconds till all is steady")
    parser.add_argument("--steady", type=float, default=math.inf, help="seconds, at most")
    parser.add_argument("--lasts", type=float, default=math.inf, help="seconds of a stream")
    parser.add_argument("--ends", type=float, default=math.inf, help="when, on CLOCK_MONOTONIC")
    parser.add_argument("--least", type=float, default=0.3, help="seconds of a steady part")
    parser.add_argument("--leave", action="store_true", help="after the steady part")
    parser.add_argument("--seconds", required=True, type=float, help="for everything, at most")
    parser.add_argument("--clocks", default={}, type=json.loads, help="of processes, by name")
    parser.add_argument("--server", required=True, type=int, help="process id")
    given = parser.parse_args()
    text = re.compile(rb'"%b": ?"([0-9;]+)"' % given.field.encode())
    end = given.end.encode()
    stalled = frozenset(spread_evenly(range(given.streams), given.stalled))
    read = sampled(given.streams, given.sample, stalled)
    streams = [
        Parsed(text=text, end=end) if number in read else Counted()
        for number in range(given.streams)
    ]
    span = Span(given.settle, given.steady, given.lasts, given.ends, given.least)
    client = Client(streams, span, stalled=stalled, clocks=given.clocks, server=given.server)
    gc.disable()  # nothing here is a cycle
    client.run(
        (given.host, given.port),
        given.request.encode(),
        opening=given.opening,
        seconds=given.seconds,
        leaves=given.leave,
    )
    answer = client.answer(tokens=given.tokens, rate=given.rate, leaves=given.leave)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
