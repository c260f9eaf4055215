"""The client: so many streams that stay open, while whoever started it looks at the server.

Knows: chunked HTTP bodies, frames of SSE as far as their ids, and how a stream can end. Must never
know who serves, nor when something is to happen: it is told. Needs nothing but the standard
library.

Run as `python -m bench.clients.holding`. The first line of stdin is the plan, a JSON object:

    {"host": ..., "port": ..., "requests": [...], "streams": N, "seconds": S}

Stream n sends request n modulo their number; KEY in it is n. Each further line is an order, a JSON
object as well, and each order is answered by one line of JSON. Streams are read all the while.

    {"do": "open", "window": W}     opens the streams; at most W at once that have had no event yet
    {"do": "count"}                 what has come so far, of all streams together
    {"do": "reach", "id": K}        waits until every stream has had event K
    {"do": "cut"}                   cuts all connections, each with a reset
    {"do": "return", "after": K, "until": M}
                                    all come back at once, with the id K, and read until event M
    {"do": "end", "since": T}       waits until every stream has ended, and says how, and how long
                                    after T (CLOCK_MONOTONIC, nanoseconds)

`seconds` bounds each order: what is not there by then is missing from the answer. The end of stdin
ends everything.
"""

import gc
import json
import os
import re
import selectors
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .links import Links, spread

GOOD = b"HTTP/1.1 200 "
HEAD_END = b"\r\n\r\n"
# The head of a chunk, behind the line end of the chunk before it (RFC 9112 section 7.1).
CHUNK = re.compile(rb"(?:\r\n)?([0-9A-Fa-f]+)(?:;[^\r\n]*)?\r\n")
ID = re.compile(rb"(?m)^id: ?(\d+)$")
DATA = re.compile(rb"(?m)^data: ?(.*)$")
COMPLETE = "complete"
SHOWN = 120  # bytes of a wrong answer that are worth showing
BURST = 32  # requests that go out between two looks at what has come
CONTROL = 64 * 1024  # bytes of orders taken at once


@dataclass(slots=True)
class Body:
    """A chunked body; a machine without sockets."""

    left: int = 0  # bytes of a chunk that are still to come
    rest: bytes = b""  # the beginning of the next chunk's head
    is_complete: bool = False

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of a connection, and return what of the body is in them."""
        data, at, pieces = self.rest + data, 0, []
        while not self.is_complete:
            if self.left:
                pieces.append(data[at : at + self.left])
                at += len(pieces[-1])
                self.left -= len(pieces[-1])
            head = CHUNK.match(data, at)
            if self.left or head is None:
                break
            self.left, at = int(head[1], 16), head.end()
            self.is_complete = not self.left
        self.rest = data[at:]
        return b"".join(pieces)


@dataclass(slots=True, eq=False)
class Stream:
    """What came on one connection; a machine without sockets. Times are nanoseconds.

    Attributes:
        last: The id of the last event; before the first, that of the event to go on behind.
        events: How many came.
        comments: How many lines came that say nothing.
        is_gapless: Whether each event's id was one more than that of the event before.
        ending: How it ended; None while it goes on.
    """

    last: int = 0
    events: int = 0
    comments: int = 0
    received: int = 0
    is_gapless: bool = True
    began_at: int | None = None
    ending: str | None = None
    ended_at: int | None = None
    data: bytes = b""  # of the last event
    head: bytes = b""
    body: Body | None = None
    rest: bytes = b""  # the beginning of the next frame

    def feed(self, data: bytes, now: int) -> None:
        """Take the next bytes."""
        self.began_at = self.began_at or now
        self.received += len(data)
        if self.body is None:
            self.head, end, data = (self.head + data).partition(HEAD_END)
            if not self.head.startswith(GOOD[: len(self.head)]):
                self.lose(f"expected status 200, got {self.head[:SHOWN]!r}", now)
            if not end:
                return
            self.body = Body()
        self._take(self.body.feed(data))
        if self.body.is_complete:
            self.lose(COMPLETE, now)

    def lose(self, how: str, now: int) -> None:
        """Note how it ended; the first time stands."""
        if self.ending is None:
            self.ending, self.ended_at = how, now

    def _take(self, body: bytes) -> None:
        body = (self.rest + body).replace(b"\r\n", b"\n")
        end = body.rfind(b"\n\n") + 2 if b"\n\n" in body else 0
        frames, self.rest = body[:end], body[end:]
        self.comments += frames.startswith(b":") + frames.count(b"\n:")
        if ids := [int(found) for found in ID.findall(frames)]:
            expected = list(range(self.last + 1, self.last + 1 + len(ids)))
            self.is_gapless = self.is_gapless and ids == expected
            self.events += len(ids)
            self.last = ids[-1]
            self.data = DATA.findall(frames)[-1]

    @property
    def last_word(self) -> str:
        """What its last event was: of a run's end, with what came of it and why."""
        if not self.data:
            return "nothing"
        event = json.loads(self.data)
        cause = event.get("receipt", {}).get("cause")
        words = (event.get("type"), event.get("outcome"), cause and f"({cause})")
        return " ".join(word for word in words if word)


@dataclass(slots=True, eq=False)
class Reader:
    """A stream, and who wants to know of it."""

    stream: Stream
    see: Callable[[Stream, int], None]

    def feed(self, buffer: bytearray, size: int, now: int) -> bool:
        self.stream.feed(bytes(buffer[:size]), now)
        self.see(self.stream, now)
        return self.stream.ending is None

    def lose(self, why: str, now: int) -> None:
        self.stream.lose(why, now)
        self.see(self.stream, now)


@dataclass(slots=True)
class Orders:
    """What is to be done, line by line, as it comes on stdin."""

    lines: deque[bytes] = field(default_factory=deque)
    rest: bytes = b""

    def ready(self, _events: int) -> None:
        """Take what has come; called when something has."""
        data = os.read(sys.stdin.fileno(), CONTROL)
        if not data:
            sys.exit()
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.lines += lines


class Client:
    """All streams, and what is waited for."""

    def __init__(self) -> None:
        self._orders = Orders()
        self._links = Links()
        self._links.selector.register(sys.stdin, selectors.EVENT_READ, self._orders)
        self._streams: list[Stream] = []
        self._waiting: set[Stream] = set()
        self._there: dict[Stream, int] = {}
        self._is_there: Callable[[Stream], bool] = _has_ended
        plan = self._next_order()
        self._links.address = (plan["host"], plan["port"])
        self._seconds: float = plan["seconds"]
        texts: Sequence[str] = plan["requests"]
        self._requests = [
            texts[number % len(texts)].replace("KEY", f"{number:06d}").encode()
            for number in range(plan["streams"])
        ]

    def run(self) -> None:
        """Do what one is told, until stdin ends."""
        does = {
            "open": self._open,
            "count": self._count,
            "reach": self._reach,
            "cut": self._cut,
            "return": self._return,
            "end": self._end,
        }
        while True:
            order = self._next_order()
            print(json.dumps(does[order.pop("do")](**order)), flush=True)

    # Orders

    def _open(self, window: int) -> dict[str, Any]:
        began = self._expect([], _has_event)
        for request in self._requests:
            self._wait(began, window - 1)
            self._start(request, Stream())
        self._wait(began)
        return {"seconds": _since(began), "open": self._number_open, **self._failures()}

    def _count(self) -> dict[str, Any]:
        return {
            "events": sum(stream.events for stream in self._streams),
            "comments": sum(stream.comments for stream in self._streams),
            "bytes": sum(stream.received for stream in self._streams),
            "open": self._number_open,
        }

    def _reach(self, id: int) -> dict[str, Any]:
        began = self._expect(self._streams, lambda stream: stream.last >= id)
        self._wait(began)
        return {"seconds": _since(began), "there": len(self._there), **self._failures()}

    def _cut(self) -> dict[str, Any]:
        self._links.close(by_reset=True)
        return {}

    def _return(self, after: int, until: int) -> dict[str, Any]:
        cpu = time.process_time()
        header = b"\r\nLast-Event-ID: %d\r\n\r\n" % after
        began = self._expect([], lambda stream: stream.last >= until)
        self._streams = []
        for number, request in enumerate(self._requests):
            self._start(request.replace(b"\r\n\r\n", header, 1), Stream(last=after))
            if number % BURST == BURST - 1:
                self._links.look(0)
        asked = _since(began)
        self._wait(began)
        return {
            "seconds": _since(began),
            "asked_seconds": asked,
            "client_cpu_seconds": time.process_time() - cpu,
            "first_ms": self._late(began, [stream.began_at for stream in self._streams]),
            "there_ms": self._late(began, list(self._there.values())),
            "there": len(self._there),
            **self._failures(),
            **self._count(),
        }

    def _end(self, since: int) -> dict[str, Any]:
        self._wait(self._expect(self._streams, _has_ended))
        endings = Counter((stream.ending, stream.last_word) for stream in self._streams)
        ended = [at for stream in self._streams if (at := stream.ended_at) is not None]
        return {
            "endings": [[how, word, number] for (how, word), number in endings.most_common()],
            "end_ms": self._late(since, [at for at in ended if at >= since]),
            "before": sum(at < since for at in ended),
            **self._failures(),
        }

    # Below

    def _next_order(self) -> dict[str, Any]:
        while not self._orders.lines:
            self._links.look(None)
        return json.loads(self._orders.lines.popleft())

    def _start(self, request: bytes, stream: Stream) -> None:
        self._streams.append(stream)
        self._waiting.add(stream)
        self._links.open(request, Reader(stream, self._see))

    def _expect(self, streams: Sequence[Stream], is_there: Callable[[Stream], bool]) -> int:
        """Say what is waited for from now on, and return when that was."""
        self._is_there, self._there, self._waiting = is_there, {}, set(streams)
        now = time.monotonic_ns()
        for stream in streams:
            self._see(stream, now)
        return now

    def _see(self, stream: Stream, now: int) -> None:
        """See whether what is waited for has come true of a stream, or never will."""
        if stream in self._waiting:
            is_there = self._is_there(stream)
            if is_there:
                self._there[stream] = now
            if is_there or stream.ending is not None:
                self._waiting.discard(stream)

    def _wait(self, began: int, most: int = 0) -> None:
        """Wait until only so many streams are waited for, or the time is over."""
        while len(self._waiting) > most and (left := self._seconds - _since(began)) > 0:
            self._links.look(left)

    @property
    def _number_open(self) -> int:
        return sum(stream.ending is None and stream.events > 0 for stream in self._streams)

    def _late(self, began: int, times: Sequence[int | None]) -> dict[str, float] | None:
        return spread([(at - began) / 1e6 for at in times if at is not None])

    def _failures(self) -> dict[str, Any]:
        """Say of how many streams what was waited for has not come true, and why."""
        whys = Counter(
            stream.ending or "too late" for stream in self._streams if stream not in self._there
        )
        return {
            "failed": sum(whys.values()),
            "failures": [f"{number} streams: {why}" for why, number in whys.most_common(3)],
            "gaps": sum(not stream.is_gapless for stream in self._streams),
        }


def _has_event(stream: Stream) -> bool:
    return stream.events > 0


def _has_ended(stream: Stream) -> bool:
    return stream.ending is not None


def _since(began: int) -> float:
    return (time.monotonic_ns() - began) / 1e9


if __name__ == "__main__":
    gc.disable()  # nothing here is a cycle
    Client().run()
