"""The client: so many streams at once, read as fast as they come, and each one checked.

Knows: chunked HTTP bodies as far as their last chunk, and what a tick looks like. Must never know
who serves, nor parse what it only has to count: it must not be the bottleneck, and it says what
share of a processor it took. Needs nothing but the standard library.

All streams are due at one instant, and every time counts from it: whatever a request has to wait
for, the client included, is part of how late its answer is. Nothing that goes out waits for
anything that comes in. With `--opened` the connections are there before that instant; else opening
them is part of the time.

Run as `python -m bench.clients.batch ...`; prints one JSON object.
"""

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .links import Links, spread

GOOD = b"HTTP/1.1 200 "
TICK = b'"name":"tick"'  # once per event, in every server's frames; never cut by a chunk's head
SPAN = len(TICK) - 1  # bytes that a tick may have on one side of a cut
LAST_CHUNK = b"\r\n0\r\n\r\n"  # behind the end of the chunk before it (RFC 9112 section 7.1)
TAIL = 1024  # bytes in which the last event of a stream has room
SHOWN = 120  # bytes of a wrong answer that are worth showing
BURST = 32  # requests that go out between two looks at what has come


@dataclass(slots=True)
class Stream:
    """What came on one connection; a machine without sockets.

    Attributes:
        began_at: When its first byte came, in nanoseconds; None for never.
        ended_at: When its last chunk came.
        lost: Why it could not go on; None where it could.
    """

    ticks: int = 0
    received: int = 0
    head: bytes = b""
    tail: bytes = b""
    began_at: int | None = None
    ended_at: int | None = None
    lost: str | None = None

    def feed(self, buffer: bytearray, size: int, now: int) -> bool:
        """Take the first `size` bytes of `buffer`; tell whether more may come."""
        if self.began_at is None:
            self.began_at = now
        across = self.tail[-SPAN:] + buffer[: min(size, SPAN)]
        self.ticks += buffer.count(TICK, 0, size) + across.count(TICK)
        is_good = True
        if self.received < SHOWN:
            self.head += buffer[: min(size, SHOWN)]
            is_good = self.head.startswith(GOOD[: len(self.head)])
        self.received += size
        self.tail = (self.tail + buffer[max(0, size - TAIL) : size])[-TAIL:]
        if self.tail.endswith(LAST_CHUNK):
            self.ended_at = now
        return is_good and self.ended_at is None

    def lose(self, why: str, _now: int) -> None:
        """Note why it cannot go on; the first reason stands."""
        self.lost = self.lost or why

    def failure(self, expected: int, end: bytes) -> str | None:
        """Say what is wrong with the response, if anything is."""
        came = "its end" if self.ended_at is not None else self.lost or "no end in time"
        if not self.head:
            return f"expected a response, got {came}"
        if not self.head.startswith(GOOD):
            return f"expected status 200, got {self.head!r}"
        if self.ticks != expected or self.ended_at is None:
            return f"expected {expected} events and the last chunk, got {self.ticks} and {came}"
        if end not in self.tail:
            return f"expected {end!r} before the last chunk, got none"
        return None


def load(
    links: Links,
    requests: Sequence[bytes],
    streams: Sequence[Stream],
    *,
    opened: bool,
    seconds: float,
) -> dict[str, object]:
    """Send all requests at once, and read the responses to their end.

    Streams that are not complete after `seconds` have failed.
    """
    sockets = links.connect(len(requests), seconds) if opened else [None] * len(requests)
    due, cpu = time.monotonic_ns(), time.process_time()
    for number, (request, stream, sock) in enumerate(zip(requests, streams, sockets, strict=True)):
        links.open(request, stream, sock)
        if number % BURST == BURST - 1:
            links.look(0)
    asked = time.monotonic_ns()
    while not links.is_idle and (left := seconds - (time.monotonic_ns() - due) / 1e9) > 0:
        links.look(left)
    return {
        "seconds": (time.monotonic_ns() - due) / 1e9,
        "asked_seconds": (asked - due) / 1e9,
        "client_cpu_seconds": time.process_time() - cpu,
        "first_ms": spread([(s.began_at - due) / 1e6 for s in streams if s.began_at is not None]),
        "end_ms": spread([(s.ended_at - due) / 1e6 for s in streams if s.ended_at is not None]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--request", required=True, help="all of it; KEY is the stream's number")
    parser.add_argument("--end", default="", help="what the last event has")
    parser.add_argument("--streams", required=True, type=int)
    parser.add_argument("--events", required=True, type=int, help="of each stream")
    parser.add_argument("--seconds", required=True, type=float, help="for all of it")
    parser.add_argument("--opened", action="store_true", help="connecting is not part of the time")
    given = parser.parse_args()
    end, streams = given.end.encode(), [Stream() for _ in range(given.streams)]
    requests = [given.request.replace("KEY", f"{n:06d}").encode() for n in range(given.streams)]
    gc.disable()  # nothing here is a cycle
    links = Links((given.host, given.port))
    answer = load(links, requests, streams, opened=given.opened, seconds=given.seconds)
    links.close()
    failures = [why for s in streams if (why := s.failure(given.events, end)) is not None]
    answer |= {
        "events": sum(stream.ticks for stream in streams),
        "bytes": sum(stream.received for stream in streams),
        "failed": len(failures),
        "failures": failures[:3],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
