"""The client: streams that are held open, then left all at once; and when the server sees it.

Each stream has an agent, and the agent holds a connection to an upstream for as long as it lives.

**The ways of leaving.** Before a stream leaves it has read all that came, for bytes that nobody
read turn a FIN into a reset. Nothing is sent: HTTP has no farewell.

- `fin`: close(2). The kernel sends FIN, and answers what still comes with a reset.
- `rst`: close(2) with SO_LINGER at 0. The kernel sends RST.
- `half-close`: shutdown(2) of the sending half. The client goes on reading until the server closes.
  Whether that is leaving is for the server to say; one that goes on sending *serves on*.
- `stalled`: reading ends, and nothing else happens. The receive buffer is set to 4 KiB, and the
  segments to what an Ethernet has (with loopback's own the kernel would buffer 2.6 MB for the
  server), so that buffers are full soon.
- Several: stream n leaves by the n-th of them, over and over. A stalled reader is not mixed with
  others: at their pace its buffers do not fill, and there is nothing to be seen.

**The storm.** When every stream had its first event, and the upstream holds a connection of each,
all are read for a while; then all leave, one behind the other, as fast as this process can.

**The times**, each from the leaving of the stream that it belongs to, which is CLOCK_MONOTONIC
right before the system call (at the last reading, for a stalled one). All processes share this
clock.

- `entered`: the first statement of the agent's `finally`; the server notes it.
- `gone`: the last one of it, behind the closing of its upstream; the server notes it.
- `closed`: the server's socket of the stream. A reset takes a socket from the kernel's tables
  (/proc/net/tcp, SOCK_DIAG) at once, though the server still holds it, so only the server's
  descriptors tell. Before the storm each descriptor is matched with its stream: /proc/PID/fd has
  the inode, and /proc/net/tcp has the port at the other end of that. In the storm the numbers in
  /proc/PID/fd are looked at again and again; one that is no longer there has been closed. Nothing
  opens a descriptor of the server meanwhile, so no number comes back, and each close belongs to
  its own stream, whatever the order. A time is the end of the look that missed the number: late
  by at most `look_ms`, the distance of two looks, and never early. A look costs the kernel 1 us per
  descriptor, so the pause behind it is as long as itself, and 5 ms at least.
- `upstream`: the upstream process read the end of the agent's connection; it notes it.

Nearest-rank percentiles, of all streams that left: one that did not come to that point within the
bound (`never`) is later than all others, so p99 is None where more than a hundredth never came.
`max` is the latest that did come. The bound runs from the leaving.

**The stall.** One stream more stays: its agent makes a token each 10 ms, which holds the time of
its making. The longest time between two tokens, less these 10 ms, is for how long the server did
nothing for an agent that was due. It is the server's own clock: neither the batching of a server
nor this process, which is busy leaving, is part of it. Counted from the first leaving to the last
end. (How long a reader saw none of these tokens is in `arrival_ms`; that has both in it.)

Processor time is the server's, of all its threads, between the same instants, to the next look. It
includes the slow events of those who have not left yet, and the tokens.

Knows: sockets, what a first event looks like, and /proc. Must never know who serves. Needs nothing
but the standard library. Run as `python -m bench.clients.leaving storm PLAN`, where PLAN is a
`Plan` in JSON, or `cycles PLAN` with a `Cycles`; prints one JSON object.
"""

import argparse
import gc
import http.client
import json
import math
import os
import re
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.peers import upstream

FIN, RST, HALF, STALLED = WAYS = ("fin", "rst", "half-close", "stalled")
STAGES = ("entered", "gone", "closed", "upstream")
PERCENTS = (*range(100), 99.5, 100)  # of a line

FIRST = b'"name":"tick"'  # of an event that the agent has made, in every server's frames
TOKEN = re.compile(rb'"delta": ?"((?:\d+;)+)"')
RECEIVE = 256 * 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time
SEGMENT = 1448  # bytes; of TCP in an Ethernet frame
SMALL = 4096  # bytes; the kernel doubles it
SHOWN = 120  # bytes of a wrong answer that are worth showing

AT_ONCE = 100  # streams that wait for their first event; far below any backlog
CONNECTING = 5.0  # seconds for one connection
OPENING = 60.0  # seconds for all streams
HOLDING = 10.0  # seconds for the upstream to have heard of all
TICK = 0.002  # seconds between two looks for what came while streams open
RECOVERING = 5.0  # seconds that the probe may have no token after the last end
LOOK = 0.005  # seconds between two looks at the server's descriptors, at least
ASKING = 0.1  # seconds until the counter is asked again; it doubles
LONGEST_ASKING = 2.0
CONTROL_PATIENCE = 30.0  # seconds for an answer to what is not measured
MS = 1_000_000  # nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done.

    Attributes:
        pid: The server's process.
        clock: Of its processor time; None where there is none.
        request: Of a stream; KEY in it is the stream's number.
        key: The name of a stream's agent, likewise.
        ways: How they leave, in turns.
        pace: Streams per second that are opened at most.
        settle: Seconds between the last first event and the storm.
        bounds: Seconds until never, by way.
        counter: How the server's counter is asked: method, target, body, and path to the answer.
        probe: The request of the stream that stays; None for none.
        gap: Seconds between two tokens of it.
        calm: Seconds of tokens before the storm.
    """

    host: str
    port: int
    pid: int
    clock: int | None
    streams: int
    request: str
    key: str
    ways: Sequence[str]
    pace: float
    settle: float
    bounds: Mapping[str, float]
    counter: Mapping[str, Any]
    upstream: int
    probe: str | None = None
    gap: float = 0.01
    calm: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycles:
    """Streams that come, have an event, and go, by FIN and RST in turns.

    Attributes:
        streams: How many in all.
        at_once: How many of them side by side.
        seconds: For everything; what is not done then is left out.
    """

    host: str
    port: int
    streams: int
    at_once: int
    request: str
    seconds: float


def numbered(text: str, number: int) -> str:
    """Put the number of a stream where KEY is."""
    return text.replace("KEY", f"{number:06d}")


def quantile(ordered: Sequence[float], percent: float, total: int) -> float | None:
    """The nearest-rank percentile of `total` times, of which only `ordered` have come."""
    rank = max(1, math.ceil(round(percent * total / 100, 6)))
    return ordered[rank - 1] if rank <= len(ordered) else None


def summary(left: Mapping[int, int], came: Mapping[int, int]) -> dict[str, Any]:
    """Times in ms from leaving to what came, by stream; of those that left."""
    times = sorted((came[number] - at) / MS for number, at in left.items() if number in came)
    return {
        "never": len(left) - len(times),
        "p50": quantile(times, 50, len(left)),
        "p99": quantile(times, 99, len(left)),
        "max": times[-1] if times else None,
    }


def line(left: Mapping[int, int], came: Mapping[int, int]) -> list[tuple[float, float]]:
    """The distribution of these times: ms, and the share of all streams that came by then."""
    times = sorted((came[number] - at) / MS for number, at in left.items() if number in came)
    points = ((quantile(times, percent, len(left)), percent / 100) for percent in PERCENTS)
    return [(time_, share) for time_, share in points if time_ is not None]


def longest_stall(tokens: Sequence[int], gap: float, begin: int, end: int) -> float | None:
    """The longest time between two tokens that overlaps the span, in ms, less the gap."""
    waits = [b - a for a, b in pairwise(tokens) if b > begin and a < end]
    return max(0.0, max(waits) / MS - gap * 1e3) if waits else None


def accepted(table: str, port: int) -> dict[str, int]:
    """Who is connected to a port, by /proc/net/tcp: the other end's port, by inode."""
    found = {}
    for row in table.splitlines()[1:]:
        fields = row.split()
        local, remote, state, inode = fields[1], fields[2], fields[3], fields[9]
        if state == "01" and int(local.partition(":")[2], 16) == port:
            found[inode] = int(remote.partition(":")[2], 16)
    return found


def matched(links: Mapping[str, str], peers: Mapping[str, int]) -> dict[str, int]:
    """The port at the other end, by descriptor; of descriptors that lead to such a socket."""
    found = {}
    for descriptor, link in links.items():
        kind, _, inode = link.partition(":")
        if kind == "socket" and (port := peers.get(inode.strip("[]"))) is not None:
            found[descriptor] = port
    return found


def at(times: Sequence[tuple[int, float]], when: int) -> float | None:
    """The first figure noted at an instant or after it."""
    return next((figure for noted, figure in times if noted >= when), None)


class Descriptors:
    """The server's sockets: which are still open. Without /proc there are none."""

    def __init__(self, pid: int, port: int) -> None:
        self.folder = Path(f"/proc/{pid}/fd")
        self.open: dict[str, int] = {}
        self.closed: dict[int, int] = {}
        self.pauses: list[float] = []
        self.looked = self.due = 0.0
        self._pid = pid
        self._port = port
        self._count = 0

    def match(self, streams: Mapping[int, int]) -> None:
        """Find the descriptors of streams, given by their ports."""
        try:
            peers = accepted(Path(f"/proc/{self._pid}/net/tcp").read_text(), self._port)
            links = {entry.name: self._link(entry) for entry in self.folder.iterdir()}
        except OSError:
            return
        found = matched(links, peers)
        self.open = {name: streams[port] for name, port in found.items() if port in streams}

    @staticmethod
    def _link(entry: Path) -> str:
        try:
            return os.fspath(entry.readlink())
        except OSError:
            return ""  # closed since it was listed

    def look(self) -> None:
        """See what has been closed; says when to look again in `due`."""
        began, were_open = time.monotonic(), bool(self.open)
        try:
            # Since Linux 6.2 the size says how many there are; before it is 0.
            count = self.folder.stat().st_size
            # Names, not paths: a look must be cheap.
            there = None if count and count == self._count else {*os.listdir(self.folder)}  # noqa: PTH208
        except OSError:
            count, there = 0, set()  # the process is over, and its sockets with it
        ended = time.monotonic()
        if there is not None:
            now = time.monotonic_ns()
            for name in self.open.keys() - there:
                self.closed[self.open.pop(name)] = now
        self._count = count
        if self.looked and were_open:
            self.pauses.append((ended - self.looked) * 1e3)
        self.looked = ended
        self.due = ended + max(LOOK, ended - began)


@dataclass(slots=True, eq=False)
class Stream:
    """One connection: how it is to be left, and what has become of it (ns; 0 for not yet)."""

    number: int
    sock: socket.socket
    way: str
    head: bytes = b""
    tail: bytes = b""
    is_open: bool = False
    heard: int = 0
    ended: int = 0
    left: int = 0

    def feed(self, data: bytes) -> None:
        """Take what came; `is_open` from the first event on."""
        if not self.is_open:
            self.head = (self.head + data)[:SHOWN]
            seen = self.tail + data
            self.is_open = FIRST in seen
            self.tail = seen[-len(FIRST) :]

    @property
    def failure(self) -> str:
        return f"expected an event of a stream that stays, got {self.head!r} and " + (
            "the end" if self.ended else "no more"
        )


@dataclass(slots=True, eq=False)
class Probe:
    """The stream that stays: when its tokens were made, and when they came."""

    sock: socket.socket
    tail: bytes = b""
    made: list[int] = field(default_factory=list)
    came: list[int] = field(default_factory=list)

    def feed(self, data: bytes, now: int) -> None:
        seen = self.tail + data
        end = 0
        for match in TOKEN.finditer(seen):
            times = [int(token) for token in match[1].split(b";")[:-1]]
            self.made += times
            self.came += [now] * len(times)
            end = match.end()
        self.tail = seen[end:]


class Client:
    """All streams."""

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)
        self.selector = selectors.DefaultSelector()
        self.buffer = memoryview(bytearray(RECEIVE))
        self.streams: list[Stream] = []
        self.pending = 0

    def connect(self, request: str, *, way: str = FIN) -> socket.socket:
        """Open a connection and send a request."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if way == STALLED:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
            if way == RST:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.settimeout(CONNECTING)
            sock.connect(self.address)
            sock.sendall(request.encode())
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        return sock

    def begin(self, number: int, request: str, way: str) -> None:
        """Open a stream."""
        stream = Stream(number, self.connect(numbered(request, number), way=way), way)
        self.selector.register(stream.sock, selectors.EVENT_READ, stream)
        self.streams.append(stream)
        self.pending += 1

    def take(self, stream: Stream) -> bool:
        """Read once; tell whether there was something. At the end it says when that was."""
        try:
            size = stream.sock.recv_into(self.buffer)
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        now = time.monotonic_ns()
        if not size:
            stream.ended = now
            return False
        stream.heard = now
        if not stream.is_open:
            stream.feed(bytes(self.buffer[:size]))
            self.pending -= stream.is_open
        return True

    def poll(self, seconds: float) -> Iterable[Stream]:
        """Read what comes, waiting for it for so long; the streams that had something, or ended."""
        for key, _ in self.selector.select(seconds):
            stream = key.data
            if isinstance(stream, Probe):
                self.hear(stream)
                continue
            was_open = stream.is_open
            self.take(stream)
            if stream.ended:
                self.pending -= not was_open
                self.selector.unregister(stream.sock)
            yield stream

    def hear(self, probe: Probe) -> None:
        """Read tokens, until there are none or they are over."""
        try:
            data = probe.sock.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        probe.feed(data, time.monotonic_ns())
        if not data:
            self.selector.unregister(probe.sock)

    def read_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for _ in self.poll(left):
                pass

    def close(self) -> None:
        self.selector.close()
        for stream in self.streams:
            stream.sock.close()


class Storm(Client):
    """Streams that open, settle, leave, and are watched."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.host, plan.port)
        self.plan = plan
        self.descriptors = Descriptors(plan.pid, plan.port)
        self.probe: Probe | None = None
        self.leaving: list[Stream] = []
        self.came: dict[str, dict[int, int]] = {stage: {} for stage in STAGES}
        self.came["closed"] = self.descriptors.closed
        self.names = {numbered(plan.key, n): n for n in range(plan.streams)}
        self.cpu: list[tuple[int, float]] = []
        self.waited: list[tuple[int, float]] = []
        self.problems: list[str] = []
        self.began = self.last_left = 0

    def run(self) -> dict[str, Any]:
        opened = time.monotonic()
        self.open()
        opened = time.monotonic() - opened
        self.wait_until_held()
        self.read_for(self.plan.settle)
        self.begin_probe()
        self.leaving = [stream for stream in self.streams if stream.is_open and not stream.ended]
        ports = {stream.sock.getsockname()[1]: stream.number for stream in self.leaving}
        self.descriptors.match(ports)
        is_watched = len(self.descriptors.open) == len(self.leaving)
        if not is_watched:
            self.descriptors.open.clear()
        own, began = time.process_time(), time.monotonic()
        self.leave()
        self.watch()
        self.wait_until_calm()
        own, took = time.process_time() - own, time.monotonic() - began
        answer = self.answer(is_watched=is_watched)
        self.finish()
        return answer | {"open_seconds": opened, "client_share": own / took}

    # Before the storm

    def open(self) -> None:
        plan, ways = self.plan, self.plan.ways
        began = time.monotonic()
        while len(self.streams) < plan.streams or self.pending:
            now = time.monotonic()
            if now > began + OPENING:
                return  # those that have not even an event by the storm have failed
            due = min(plan.streams, math.ceil((now - began) * plan.pace))
            while len(self.streams) < due and self.pending < AT_ONCE:
                number = len(self.streams)
                try:
                    self.begin(number, plan.request, ways[number % len(ways)])
                except OSError as error:
                    self.problems.append(f"connection {number}: {error}")
                    return
            for _ in self.poll(TICK):
                pass

    def wait_until_held(self) -> None:
        """The first event is behind the agent's greeting, but the upstream may not have read it."""
        expected = sum(stream.is_open and not stream.ended for stream in self.streams)
        end = time.monotonic() + HOLDING
        while (held := upstream.ask(self.plan.upstream)["open"]) < expected:
            if time.monotonic() > end:
                self.problems.append(f"expected {expected} upstream connections, got {held}")
                return
            self.read_for(ASKING)

    def begin_probe(self) -> None:
        if self.plan.probe is None:
            return
        try:
            self.probe = Probe(self.connect(self.plan.probe))
        except OSError as error:
            self.problems.append(f"connection of the stream that stays: {error}")
            return
        self.selector.register(self.probe.sock, selectors.EVENT_READ, self.probe)
        self.read_for(self.plan.calm)

    # The storm

    def leave(self) -> None:
        self.selector.close()
        self.selector = selectors.DefaultSelector()
        if self.probe is not None:
            self.selector.register(self.probe.sock, selectors.EVENT_READ, self.probe)
        for stream in self.leaving:
            if stream.way == HALF:
                self.selector.register(stream.sock, selectors.EVENT_READ, stream)
        self.look()
        self.began = time.monotonic_ns()
        for stream in self.leaving:
            self.leave_one(stream)
            if time.monotonic() >= self.descriptors.due:
                self.look()
        self.last_left = time.monotonic_ns()

    def leave_one(self, stream: Stream) -> None:
        while self.take(stream):
            pass
        if stream.ended:
            return  # the server was first
        stream.left = time.monotonic_ns()
        if stream.way in (FIN, RST):
            stream.sock.close()
        elif stream.way == HALF:
            stream.sock.shutdown(socket.SHUT_WR)

    def look(self) -> None:
        """Note what the server has closed and what it took."""
        self.descriptors.look()
        now = time.monotonic_ns()
        if self.plan.clock is not None:
            try:
                self.cpu.append((now, time.clock_gettime(self.plan.clock)))
            except OSError:
                return  # the process is over
        try:
            fields = Path(f"/proc/{self.plan.pid}/schedstat").read_text().split()
            self.waited.append((now, int(fields[1]) / MS))
        except (OSError, IndexError):
            return

    # After it

    def watch(self) -> None:
        """Look until all have come to their end, or to their bound.

        The counter is asked once the server has closed all that can be seen to be closed: to ask is
        work for it. Then it is asked again, less and less often, until all agents are gone.
        """
        asking, ask_at, judge_at = ASKING, 0.0, 0.0
        while True:
            now = time.monotonic()
            if not self.descriptors.open and now >= ask_at:
                self.ask()
                asking, ask_at = min(asking * 2, LONGEST_ASKING), time.monotonic() + asking
                judge_at = 0.0
            if now >= judge_at:
                if not (late := self.unfinished()):
                    return
                if now * 1e9 > max(s.left + self.plan.bounds[s.way] * 1e9 for s in late):
                    break
                judge_at = now + ASKING
            for _ in self.poll(max(0.0, self.descriptors.due - now)):
                pass
            self.look()
        self.ask()

    def wait_until_calm(self) -> None:
        """Read tokens until one was made after the last end: only then the last stall is known."""
        last = self.last_end()
        end = time.monotonic() + RECOVERING
        while (
            self.probe is not None
            and (not self.probe.made or self.probe.made[-1] <= last)
            and time.monotonic() < end
        ):
            self.read_for(self.plan.gap)
        self.look()

    def last_end(self) -> int:
        """When the last of all that came, came; 0 if nothing did."""
        left = {stream.number for stream in self.leaving if stream.left}
        ends = (when for came in self.came.values() for n, when in came.items() if n in left)
        return max(ends, default=0)

    def unfinished(self) -> list[Stream]:
        """Those of which something is still to come."""
        still = set(self.descriptors.open.values())
        gone, freed = self.came["gone"], self.came["upstream"]
        return [
            stream
            for stream in self.leaving
            if stream.left
            and (stream.number in still or stream.number not in gone or stream.number not in freed)
        ]

    def ask(self) -> None:
        """Ask the upstream, and the server's counter, what they have seen."""
        for name, (when, _) in upstream.ask(self.plan.upstream)["ended"].items():
            if (number := self.names.get(name)) is not None:
                self.came["upstream"][number] = when
        try:
            times = self.count()
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.problems.append(f"expected an answer from the counter, got {error!r}")
            return
        for name, (entered, gone) in times.items():
            if (number := self.names.get(name)) is None:
                continue
            self.came["entered"][number] = entered
            if gone is not None:
                self.came["gone"][number] = gone

    def count(self) -> Mapping[str, tuple[int, int | None]]:
        how = self.plan.counter
        connection = http.client.HTTPConnection(*self.address, timeout=CONTROL_PATIENCE)
        try:
            headers = {
                "Accept": "application/json",
                "Content-Type": "application/json",
                "Connection": "close",
            }
            connection.request(how["method"], how["target"], how["body"] or None, headers)
            found = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        for name in (*how["path"], "times"):
            found = found.get(name, {})
        return found

    def finish(self) -> None:
        """Leave what is still there, with a reset, so that the next storm finds no trace of it."""
        socks = [stream.sock for stream in self.streams]
        if self.probe is not None:
            socks.append(self.probe.sock)
        for sock in socks:
            if sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.close()
        self.selector.close()

    def answer(self, *, is_watched: bool) -> dict[str, Any]:
        left = {stream.number: stream.left for stream in self.leaving if stream.left}
        # Who was gone before leaving had not stayed.
        early = {n for n, when in left.items() if self.came["entered"].get(n, when) < when}
        left = {n: when for n, when in left.items() if n not in early}
        stages = STAGES if is_watched else tuple(name for name in STAGES if name != "closed")
        last = self.last_end()
        failed = [stream.failure for stream in self.streams if not stream.is_open]
        ended = sum(s.is_open and not s.left for s in self.streams) + len(early)
        pauses = sorted(self.descriptors.pauses)
        return {
            "streams": self.plan.streams,
            "left": len(left),
            "failed": len(failed) + self.plan.streams - len(self.streams),
            "ended_early": ended,
            "problems": [*self.problems, *failed][:3],
            "storm_ms": (self.last_left - self.began) / MS,
            "last_end_ms": (last - self.began) / MS if last else None,
            "cpu_seconds": self.spent(self.cpu, last),
            "waited_ms": self.spent(self.waited, last),
            "look_ms": {
                "p50": quantile(pauses, 50, len(pauses)),
                "max": pauses[-1] if pauses else None,
            },
            "stall": self.stalls(last),
            "all": self.row(left, stages),
            "ways": {way: self.row(self.of(way, left), stages) for way in self.plan.ways},
            "lines": {stage: line(left, self.came[stage]) for stage in stages},
        }

    def spent(self, noted: Sequence[tuple[int, float]], last: int) -> float | None:
        """What was spent from the last look before the storm to the first one after its end."""
        end = at(noted, last)
        return end - noted[0][1] if noted and end is not None else None

    def of(self, way: str, left: Mapping[int, int]) -> dict[int, int]:
        numbers = {stream.number for stream in self.leaving if stream.way == way}
        return {number: when for number, when in left.items() if number in numbers}

    def row(self, left: Mapping[int, int], stages: Iterable[str]) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(STAGES)
        found |= {stage: summary(left, self.came[stage]) for stage in stages}
        found["streams"] = len(left)
        found["serves_on"] = sum(
            stream.way == HALF
            and stream.number in left
            and stream.number not in self.came["entered"]
            and not stream.ended
            and stream.heard - stream.left > self.plan.bounds[HALF] * 1e9 / 2
            for stream in self.leaving
        )
        return found

    def stalls(self, last: int) -> dict[str, Any] | None:
        if self.probe is None:
            return None
        made, came = self.probe.made, self.probe.came
        gap, began = self.plan.gap, self.began
        last = last or time.monotonic_ns()
        return {
            "ms": longest_stall(made, gap, began, last),
            "calm_ms": longest_stall(made, gap, 0, began),
            "arrival_ms": longest_stall(came, gap, began, last),
            "tokens": sum(began <= token <= last for token in made),
        }


class Coming(Client):
    """Streams that come and go."""

    def __init__(self, cycles: Cycles) -> None:
        super().__init__(cycles.host, cycles.port)
        self.cycles = cycles
        self.done = self.living = 0
        self.failures: list[str] = []

    def run(self) -> dict[str, Any]:
        began, given = time.monotonic(), self.cycles
        begun = 0
        while time.monotonic() < began + given.seconds:
            while begun < given.streams and self.living < given.at_once:
                try:
                    self.begin(begun, given.request, (FIN, RST)[begun % 2])
                    self.living += 1
                except OSError as error:
                    self.failures.append(f"connection {begun}: {error}")
                begun += 1
            if not self.living:
                break
            for stream in self.poll(0.1):
                if stream.is_open or stream.ended:
                    self.end(stream)
        self.failures += [stream.failure for stream in self.streams if not stream.is_open]
        self.close()
        return {
            "done": self.done,
            "failed": len(self.failures),
            "failures": self.failures[:3],
            "seconds": time.monotonic() - began,
        }

    def end(self, stream: Stream) -> None:
        """Leave it: it has had its event, or has failed."""
        while not stream.ended and self.take(stream):
            pass  # bytes that nobody read turn a FIN into a reset
        if stream.ended:
            self.failures.append(stream.failure)
        else:
            self.selector.unregister(stream.sock)
            self.done += 1
        self.living -= 1
        self.streams.remove(stream)
        stream.sock.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("storm", "cycles"))
    parser.add_argument("plan", type=json.loads)
    given = parser.parse_args()
    gc.disable()  # nothing here is a cycle
    job = Storm(Plan(**given.plan)) if given.what == "storm" else Coming(Cycles(**given.plan))
    print(json.dumps(job.run()))


if __name__ == "__main__":
    main()
