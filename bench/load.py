"""The client: so many streams at once, read as fast as they come, and each one checked.

Knows: sockets, chunked HTTP bodies as far as their last chunk, and what a tick looks like. Must
never know who serves, nor parse what it only has to count: it must not be the bottleneck, and it
says what share of a processor it took. Needs nothing but the standard library.

Run as `python -m bench.load ...`; prints one JSON object.
"""

import argparse
import json
import selectors
import socket
import time
from dataclasses import dataclass

TICK = b'"name":"tick"'  # once per event, in every server's frames; never cut by a chunk's head
END = b"\r\n0\r\n\r\n"  # the end of a frame's chunk, then the last chunk (RFC 9112 section 7.1)
SPAN = len(TICK) - 1  # bytes that a tick may have on one side of a cut
RECEIVE = 256 * 1024  # bytes taken at once; one system call for several writes of the server
SHOWN = 120  # bytes of a wrong answer that are worth showing


@dataclass(slots=True)
class Stream:
    """What came on one connection; a machine without sockets."""

    ticks: int = 0
    received: int = 0
    tail: bytes = b""
    head: bytes = b""

    def feed(self, buffer: bytearray, size: int) -> bool:
        """Take the first `size` bytes of `buffer`, and tell whether the response is complete."""
        across = self.tail[-SPAN:] + buffer[: min(size, SPAN)]
        self.ticks += buffer.count(TICK, 0, size) + across.count(TICK)
        self.tail = (self.tail + buffer[max(0, size - SPAN) : size])[-SPAN:]
        if self.received < SHOWN:
            self.head += buffer[: min(size, SHOWN)]
        self.received += size
        return self.tail.endswith(END)

    def failure(self, expected: int, *, is_complete: bool) -> str | None:
        """Say what is wrong with the response, if anything is."""
        if not self.head.startswith(b"HTTP/1.1 200 "):
            return f"expected status 200, got {self.head!r}"
        if self.ticks != expected or not is_complete:
            end = "its end" if is_complete else "no end"
            return f"expected {expected} events and the last chunk, got {self.ticks} and {end}"
        return None


def load(
    address: tuple[str, int], request: bytes, *, streams: int, events: int, seconds: float
) -> dict[str, object]:
    """Send `request` on every connection, and read all responses to their end.

    Connecting is not part of the time; from the first request to the last byte is. Streams that are
    not complete after `seconds` have failed.
    """
    buffer = bytearray(RECEIVE)
    opened = {socket.create_connection(address): Stream() for _ in range(streams)}
    failures: list[str] = []
    with selectors.DefaultSelector() as selector:
        for sock, stream in opened.items():
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, stream)
        started, cpu = time.perf_counter(), time.process_time()
        for sock in opened:
            sock.sendall(request)
        while selector.get_map() and (left := started + seconds - time.perf_counter()) > 0:
            for key, _ in selector.select(left):
                try:
                    size = key.fileobj.recv_into(buffer)
                except OSError:
                    size = 0  # a reset: the stream has no end
                is_complete = key.data.feed(buffer, size)
                if is_complete or not size:
                    selector.unregister(key.fileobj)
                    failures.append(key.data.failure(events, is_complete=is_complete))
        took, cpu = time.perf_counter() - started, time.process_time() - cpu
        failures += [
            key.data.failure(events, is_complete=False) for key in selector.get_map().values()
        ]
    for sock in opened:
        sock.close()
    failures = [failure for failure in failures if failure is not None]
    return {
        "seconds": took,
        "client_cpu_seconds": cpu,
        "events": sum(stream.ticks for stream in opened.values()),
        "bytes": sum(stream.received for stream in opened.values()),
        "failed": len(failures),
        "failures": failures[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--target", required=True)
    parser.add_argument("--body", required=True)
    parser.add_argument("--streams", required=True, type=int)
    parser.add_argument("--events", required=True, type=int)
    parser.add_argument("--seconds", required=True, type=float)
    given = parser.parse_args()
    body = given.body.encode()
    request = (
        f"POST {given.target} HTTP/1.1\r\nHost: {given.host}:{given.port}\r\n"
        "Accept: text/event-stream\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    answer = load(
        (given.host, given.port), request,
        streams=given.streams, events=given.events, seconds=given.seconds,
    )  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
