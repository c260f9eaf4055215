"""What an agent depends on: a server that holds connections, and notes when each one ends.

An agent connects, says its name in a line, and holds the connection for as long as it lives;
nothing is ever sent to it. When the connection ends, the time is noted, right after recv(2) has
told: by CLOCK_MONOTONIC, which all processes share. Whether the end was orderly (`eof`) or a reset
is noted as well. Who asks with the line `?` is told what is held and what has ended since it was
asked last, as JSON, and that is forgotten.

Knows: lines and ends. Must never know who connects, nor why it leaves.

It shares a core with the client, and takes some 10 us per end. Prints its address as a JSON line.
Needs nothing but the standard library. Run as `python -m bench.peers.upstream`.
"""

import gc
import json
import selectors
import socket
import sys
import time
from typing import Any

BACKLOG = 4096
ASK = b"?"
LONGEST = 1024  # bytes of a name
PATIENCE = 10.0  # seconds for whoever asks


def ask(port: int) -> dict[str, Any]:
    """Ask an upstream what it saw.

    Returns:
        `open`: how many connections it holds. `ended`: by name, the time and `eof` or `reset`, of
        those that ended since this was asked last.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(ASK + b"\n")
        answer = bytearray()
        while data := sock.recv(1 << 16):
            answer += data
    return json.loads(answer)


class Upstream:
    """All connections, and when they ended."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.listener.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.lines: dict[socket.socket, bytes] = {}
        self.ended: dict[str, tuple[int, str]] = {}

    def serve(self) -> None:
        """Serve until a signal ends the process."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    self.read(key.fileobj)

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ)
            self.lines[sock] = b""

    def read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(LONGEST)
        except OSError:
            self.end(sock, "reset")
            return
        if not data:
            self.end(sock, "eof")
            return
        line = self.lines[sock] = (self.lines[sock] + data)[:LONGEST]
        if line == ASK + b"\n":
            self.answer(sock)

    def end(self, sock: socket.socket, how: str) -> None:
        now = time.monotonic_ns()
        name = self.lines[sock].partition(b"\n")[0].decode(errors="replace")
        self.ended[name] = now, how
        self.close(sock)

    def answer(self, sock: socket.socket) -> None:
        seen = {"open": len(self.lines) - 1, "ended": self.ended}  # but for who asks
        self.ended = {}
        try:
            sock.settimeout(PATIENCE)
            sock.sendall(json.dumps(seen).encode())
        except OSError:
            pass  # who asked has left; nobody else wants to know
        self.close(sock)

    def close(self, sock: socket.socket) -> None:
        del self.lines[sock]
        self.selector.unregister(sock)
        sock.close()


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
