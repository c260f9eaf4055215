"""A model API that has no model: OpenAI's chat completions as a stream, each token with its time.

`POST /v1/chat/completions`, streamed, and in the body, anywhere, `tokens=N`: N tokens, 40 per
second, each in a chunk of its own and about 260 bytes, as real servers send them. The text of a
token is the time at which it was sent, in nanoseconds of CLOCK_MONOTONIC, and a semicolon. Streams
are out of phase with one another.

It must be cheap, for it shares a core with the client. So: one thread, a heap of due times, a send
per token, no parsing beyond what is asked here. A relay that lets a socket fill up is cut off.

Prints its address as a JSON line. Needs nothing but the standard library. Run as
`python -m bench.peers.relay_upstream`.
"""

import gc
import heapq
import json
import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field

GAP = 1_000_000_000 // 40  # nanoseconds between two tokens of a stream
GOLDEN = 0.6180339887  # its multiples, modulo 1, are spread evenly however many there are
POLL = 2_000_000  # nanoseconds; so often requests are looked for while tokens are due
BACKLOG = 4096
RECEIVE = 64 * 1024

TOKENS = re.compile(rb"tokens=(\d{1,6})")
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(slots=True, eq=False)
class Stream:
    """A connection, and the answer that is under way on it."""

    sock: socket.socket
    received: bytes = b""
    left: int = 0
    before: bytes = b""
    after: bytes = b""
    sizes: dict[int, bytes] = field(default_factory=dict)  # heads of chunks, by length of the text
    wants_usage: bool = False

    def begin(self, number: int, request: bytes) -> None:
        """Say who is speaking."""
        found = TOKENS.search(request)
        self.left = int(found[1]) if found else 1
        self.wants_usage = b'"include_usage"' in request
        self.before = (
            b'data: {"id":"chatcmpl-%020d","object":"chat.completion.chunk","created":1763740800,'
            b'"model":"fake-1","service_tier":"default","system_fingerprint":"fp_%010d",'
            b'"choices":[{"index":0,"delta":{' % (number, number)
        )
        self.after = b'"},"logprobs":null,"finish_reason":null}]}\n\n'
        role = b'"role":"assistant","content":"","refusal":null'
        self.sock.send(HEAD + chunk(self.before + role + self.after[1:]))
        self.before += b'"content":"'
        length = len(self.before) + len(self.after)
        self.sizes = {size: b"%x\r\n" % (length + size) for size in range(2, 25)}
        self.after += b"\r\n"

    def token(self) -> None:
        """Send one more, and after the last one the end."""
        text = b"%d;" % time.monotonic_ns()
        data = b"".join((self.sizes[len(text)], self.before, text, self.after))
        if self.sock.send(data) < len(data):
            raise BlockingIOError
        self.left -= 1
        if not self.left:
            self.sock.send(self.ending())

    def ending(self) -> bytes:
        common, _, _ = self.before.partition(b'"choices"')
        choices = b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
        frames = [common + choices]
        if self.wants_usage:
            usage = b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\n'
            frames.append(common + b'"choices":[],' + usage)
        frames.append(b"data: [DONE]\n\n")
        return b"".join(map(chunk, frames)) + b"0\r\n\r\n"


class Upstream:
    """All connections, and the heap of what is due."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.listener.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.heap: list[tuple[int, int, Stream]] = []
        self.begun = 0

    def serve(self) -> None:
        """Serve until a signal ends the process."""
        heap, polled = self.heap, 0
        while True:
            now = time.monotonic_ns()
            while heap and heap[0][0] <= now:
                due, number, stream = heap[0]
                try:
                    if stream.left:  # else it is closed
                        stream.token()
                except OSError:
                    self.close(stream)
                if stream.left:
                    heapq.heapreplace(heap, (due + GAP, number, stream))
                else:
                    heapq.heappop(heap)
            now = time.monotonic_ns()
            wait = heap[0][0] - now if heap else None
            if wait is None or now - polled > POLL:
                self.poll(None if wait is None else 0)
                polled = now
            elif wait > 0:
                time.sleep(min(wait, POLL) / 1e9)

    def poll(self, seconds: float | None) -> None:
        """See who connects, asks, and leaves."""
        for key, _ in self.selector.select(seconds):
            if key.data is None:
                self.accept()
                continue
            try:
                self.read(key.data)
            except OSError:
                self.close(key.data)

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(sock, selectors.EVENT_READ, Stream(sock))

    def read(self, stream: Stream) -> None:
        data = stream.sock.recv(RECEIVE)
        if not data:
            self.close(stream)
            return
        stream.received += data
        head, separator, body = stream.received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        expected = int(length[1]) if length else 0
        if not separator or len(body) < expected:
            return
        stream.received = body[expected:]
        if not head.startswith(b"POST /v1/chat/completions "):
            stream.sock.send(NOT_FOUND)
            return
        self.begun += 1
        stream.begin(self.begun, body)
        phase = int(GAP * (self.begun * GOLDEN % 1))
        heapq.heappush(self.heap, (time.monotonic_ns() + phase, self.begun, stream))

    def close(self, stream: Stream) -> None:
        stream.left = 0
        if stream.sock.fileno() >= 0:
            self.selector.unregister(stream.sock)
            stream.sock.close()


def main() -> None:
    upstream = Upstream()
    gc.disable()  # nothing here is a cycle
    host, port = upstream.listener.getsockname()
    print(json.dumps({"host": host, "port": port}), flush=True)
    try:
        upstream.serve()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
