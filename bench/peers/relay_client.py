"""The client of a relay: so many streams, and of every token how late it came.

Knows: sockets, where in a frame the text of a token stands, and the clock that the model API put
there. Must never know who relays, nor parse what it only has to find: it shares a core with the
model API. Needs nothing but the standard library.

Streams open one after the other. When all of them have begun and some time has passed, the steady
part begins; it ends shortly before the first stream does. Within it, processor time is read from
the clocks of the processes, and tokens are counted. So connecting and ending are no part of it.

Run as `python -m bench.peers.relay_client ...`; prints one JSON object.
"""

import argparse
import gc
import json
import math
import re
import selectors
import socket
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LAST_CHUNK = b"\r\n0\r\n\r\n"  # RFC 9112 section 7.1, behind the end of the chunk before it
FRAME_END = b"\n\n"  # chunks have whole frames here: none of their heads is within one
RECEIVE = 256 * 1024  # bytes taken at once
SHOWN = 120  # bytes of a wrong answer that are worth showing
OPENING = 0.01  # seconds between two streams that open: how fast it can be is not asked here
PAUSE = 0.001  # seconds between two looks at all streams: a wake-up per token would cost a core
SETTLING = 1 / 8  # of a stream, from the first token of the last one on; then all is steady
MARGIN = 0.25  # seconds between the steady part and the end of the first stream


@dataclass(slots=True)
class Stream:
    """What came on one connection; a machine without sockets."""

    text: re.Pattern[bytes]
    end: bytes
    rest: bytes = b""
    received: int = 0
    head: bytes = b""
    has_end: bool = False
    is_complete: bool = False
    sent: array = field(default_factory=lambda: array("q"))  # by token: when it was sent
    came: array = field(default_factory=lambda: array("q"))

    def feed(self, data: bytes, now: int) -> None:
        """Take the next bytes, which came at `now` (nanoseconds)."""
        if self.received < SHOWN:
            self.head += data[:SHOWN]
        self.received += len(data)
        data = self.rest + data
        whole = data.rfind(FRAME_END) + len(FRAME_END)
        if whole >= len(FRAME_END):
            frames, data = data[:whole], data[whole:]
            for texts in self.text.findall(frames):
                for text in texts.split(b";")[:-1]:
                    self.sent.append(int(text))
                    self.came.append(now)
            self.has_end = self.has_end or self.end in frames
        self.rest = data
        self.is_complete = data.endswith(LAST_CHUNK)

    def failure(self, expected: int) -> str | None:
        """Say what is wrong with the response, if anything is."""
        if not self.head.startswith(b"HTTP/1.1 200 "):
            return f"expected status 200, got {self.head!r}"
        if not self.is_complete:
            return f"expected an end in time, got none, and {len(self.sent)} of {expected} tokens"
        if len(self.sent) != expected:
            return f"expected {expected} tokens, got {len(self.sent)}"
        if any(later <= earlier for earlier, later in zip(self.sent, self.sent[1:], strict=False)):
            return "expected each token once and in order, got one again or late"
        if not self.has_end:
            return f"expected {self.end!r} before the last chunk, got none"
        return None


@dataclass(slots=True)
class Sample:
    """The clocks, at one instant."""

    at: int
    cpu: dict[str, float]
    waited: int  # nanoseconds that the relay was ready to run, and others had its core


class Client:
    """All streams, and the steady part."""

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        seconds: float,
        clocks: Mapping[str, int],
        schedstat: str,
    ) -> None:
        self.streams = streams
        self.lasts = seconds
        self.clocks = clocks
        self.schedstat = schedstat
        self.silent = len(streams)
        self.steady_from = self.steady_until = math.inf
        self.samples: list[Sample] = []
        self.buffer = memoryview(bytearray(RECEIVE))

    def run(self, address: tuple[str, int], request: bytes, seconds: float) -> None:
        """Open all streams, and read them to their end, for so many seconds at most."""
        opened: list[socket.socket] = []
        with selectors.DefaultSelector() as selector:
            began = time.monotonic()
            while len(opened) < len(self.streams) or selector.get_map():
                now = time.monotonic()
                if now > began + seconds:
                    break
                if len(opened) < len(self.streams) and now >= began + len(opened) * OPENING:
                    sock = socket.create_connection(address)
                    selector.register(sock, selectors.EVENT_READ, self.streams[len(opened)])
                    sock.sendall(request)
                    sock.setblocking(False)
                    opened.append(sock)
                self.note_steadiness(now)
                for key, _ in selector.select(OPENING):
                    if not self.read(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                time.sleep(PAUSE)
        for sock in opened:
            sock.close()

    def read(self, sock: socket.socket, stream: Stream) -> bool:
        """Take what came; tell whether more will."""
        try:
            size = sock.recv_into(self.buffer)
        except OSError:
            size = 0  # a reset: the stream has no end
        now = time.monotonic_ns()
        was_silent = not stream.sent
        stream.feed(bytes(self.buffer[:size]), now)
        if was_silent and stream.sent:
            now = time.monotonic()
            self.silent -= 1
            self.steady_until = min(self.steady_until, now + self.lasts - MARGIN)
            if not self.silent:
                self.steady_from = now + self.lasts * SETTLING
        return size > 0 and not stream.is_complete

    def note_steadiness(self, now: float) -> None:
        if now >= self.steady_until:
            if len(self.samples) == 1:
                self.sample()
        elif now >= self.steady_from and not self.samples:
            self.sample()

    def sample(self) -> None:
        cpu = {name: time.clock_gettime(clock) for name, clock in self.clocks.items()}
        cpu["client"] = time.process_time()
        self.samples.append(Sample(time.monotonic_ns(), cpu, self.waited()))

    def waited(self) -> int:
        try:
            return int(Path(self.schedstat).read_text().split()[1])
        except (OSError, IndexError):
            return 0

    def answer(self, tokens: int, rate: float) -> dict[str, object]:
        failures = [failure for s in self.streams if (failure := s.failure(tokens)) is not None]
        slips = (
            (sent - stream.sent[0]) / 1e6 - n * 1e3 / rate
            for stream in self.streams
            for n, sent in enumerate(stream.sent)
        )
        return {
            "failed": len(failures),
            "failures": failures[:3],
            "bytes": sum(stream.received for stream in self.streams),
            "upstream_slip_ms": max(slips, default=0.0),  # behind its schedule
            "steady": self.steady() if len(self.samples) > 1 else None,
        }

    def steady(self) -> dict[str, object] | None:
        begin, end = self.samples
        late = sorted(
            (came - sent) / 1e6
            for stream in self.streams
            for sent, came in zip(stream.sent, stream.came, strict=True)
            if begin.at <= came < end.at
        )
        if not late:
            return None
        return {
            "seconds": (end.at - begin.at) / 1e9,
            "tokens": len(late),
            "waited_seconds": (end.waited - begin.waited) / 1e9,
            "cpu_seconds": {name: end.cpu[name] - begin.cpu[name] for name in end.cpu},
            "late_ms": {
                "p50": late[len(late) // 2],
                "p99": late[len(late) * 99 // 100],
                "max": late[-1],
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--target", required=True)
    parser.add_argument("--body", required=True)
    parser.add_argument("--field", required=True, help="of a frame's JSON that holds the text")
    parser.add_argument("--end", required=True, help="what the last frame has")
    parser.add_argument("--streams", required=True, type=int)
    parser.add_argument("--tokens", required=True, type=int)
    parser.add_argument("--rate", required=True, type=float, help="tokens per second and stream")
    parser.add_argument("--seconds", required=True, type=float)
    parser.add_argument("--clocks", required=True, type=json.loads, help="by process")
    parser.add_argument("--schedstat", required=True, help="the relay's, below /proc")
    given = parser.parse_args()
    body = given.body.encode()
    request = (
        f"POST {given.target} HTTP/1.1\r\nHost: {given.host}:{given.port}\r\n"
        "Accept: text/event-stream\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    text = re.compile(rb'"%b": ?"([0-9;]+)"' % given.field.encode())
    end = given.end.encode()
    streams = [Stream(text, end) for _ in range(given.streams)]
    client = Client(
        streams,
        seconds=given.tokens / given.rate,
        clocks=given.clocks,
        schedstat=given.schedstat,
    )
    gc.disable()  # nothing here is a cycle
    client.run((given.host, given.port), request, given.seconds)
    print(json.dumps(client.answer(given.tokens, given.rate)))


if __name__ == "__main__":
    main()
