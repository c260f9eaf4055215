"""Many clients at once: half of them vanish, and nobody else notices; ten thousand leave nothing.

Rules: as everywhere, real sockets and events. The clients live in this process too, so each stream
costs two descriptors; they are plain sockets, for what is measured is the server.
"""

import json
import random
import resource
import socket
import struct
from contextlib import suppress
from functools import partial

import attrs
import pytest
import trio
from raw import Footprint, connect, request, stream_run, wait_quiet, wait_until

from agentsse import Agent, RunContext
from agentsse.config import LimitSettings, Settings
from agentsse.events import RunFinished
from agentsse.server import raise_descriptor_limit
from agentsse.testing import open_server

STREAMS = 1_000
CYCLES = 10_000
EVENTS = 20  # that each agent emits once it may go on
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST
END = b"0\r\n\r\n"  # of a chunked body


@attrs.define(eq=False)
class Crowd:
    """The agents of a test: who has started, who has ended and how, and when they may go on."""

    go: trio.Event = attrs.field(factory=trio.Event)
    all_started: trio.Event = attrs.field(factory=trio.Event)
    started: int = 0
    finished: set[int] = attrs.field(factory=set)
    cancelled: set[int] = attrs.field(factory=set)
    wanted: int = STREAMS

    async def agent(self, run: RunContext, number: int) -> None:
        """Say hello, wait for the word, and count."""
        run.emit("hello")
        self.started += 1
        if self.started == self.wanted:
            self.all_started.set()
        try:
            await self.go.wait()
            for n in range(EVENTS):
                run.emit("tick", n=n)
                await trio.lowlevel.checkpoint()
            self.finished.add(number)
        except trio.Cancelled:
            self.cancelled.add(number)
            raise


async def open_stream(url: str, number: int) -> trio.SocketStream:
    """Start a run by a plain socket, and stream it; the caller closes it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    await stream.send_all(stream_run("member", json.dumps({"input": number}).encode()))
    return stream


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """Read a chunked response to its end."""
    taken = bytearray()
    while not taken.endswith(END):
        more = await stream.receive_some()
        assert more, f"expected the end of the body, got the end of the connection: {taken!r}"
        taken += more
    return bytes(taken)


async def test_half_of_a_thousand_vanish_and_the_others_notice_nothing() -> None:
    """Reset all at once: their agents are gone; every other stream comes whole, in order."""
    crowd = Crowd()
    raise_descriptor_limit(lambda *_, **__: None)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * STREAMS + 200:
        pytest.skip("expected two descriptors for each stream, got too low a limit")
    with trio.fail_after(120):
        async with open_server(Agent("member", crowd.agent)) as server:
            async with connect(server.urls[0]) as client:  # what is made at first use, now
                await client.send(request("POST", "/agents/nobody/runs"))
                await client.finish()
            before = await wait_quiet(server)
            streams: dict[int, trio.SocketStream] = {}

            async def join(numbers: range) -> None:
                for number in numbers:
                    streams[number] = await open_stream(server.urls[0], number)

            async with trio.open_nursery() as nursery:
                for first in range(20):
                    nursery.start_soon(join, range(first, STREAMS, 20))
            await crowd.all_started.wait()
            assert STREAMS == server.app.streams.open

            leavers = set(range(0, STREAMS, 2))
            for number in leavers:
                streams[number].socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                streams[number].socket.close()
            await wait_until(lambda: len(crowd.cancelled) == len(leavers))
            assert leavers == crowd.cancelled
            assert STREAMS - len(leavers) == len(server.runs.unfinished())

            crowd.go.set()
            bodies: dict[int, bytes] = {}

            async def read(number: int) -> None:
                bodies[number] = await read_to_end(streams[number])
                await streams[number].aclose()

            async with trio.open_nursery() as nursery:
                for number in set(streams) - leavers:
                    nursery.start_soon(read, number)
            after = await wait_quiet(server)

    stayers = set(range(1, STREAMS, 2))
    assert stayers == crowd.finished
    for body in bodies.values():
        places = [body.index(b"\nid: %d\n" % n) for n in range(1, EVENTS + 4)]
        assert sorted(places) == places
        assert 1 == body.count(b"event: run_finished\n")
        assert b'"outcome":"success"' in body
    assert {"client_left": len(leavers), "finished": len(stayers)} == server.app.streams.closed
    assert {"cancelled": len(leavers), "success": len(stayers)} == server.runs._finished
    assert before == after


async def _cycle(url: str, number: int) -> None:
    """Open a stream, see its first bytes or not, and drop it in one of three ways."""
    stream = await open_stream(url, number)
    if number % 2:
        assert await stream.receive_some()
    match number % 3:
        case 0:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            stream.socket.close()
        case 1:
            await stream.send_eof()
            await stream.aclose()
        case _:
            await stream.aclose()


@attrs.define(eq=False)
class Chaos:
    """Clients, and an agent, that do anything at all; what they do follows from a seed."""

    random: random.Random
    ids: list[str] = attrs.field(factory=list)
    started: int = 0
    ended: int = 0

    async def agent(self, run: RunContext, _input: object) -> None:
        """Talk for a while, much or little; then perhaps crash, ask or answer."""
        self.started += 1
        self.ids.append(run.id)
        try:
            for _ in range(self.random.randrange(30)):
                run.emit("said", words="x" * self.random.choice([1, 100, 100_000]))
                await trio.sleep(self.random.choice([0, 0.001, 0.01]))
            if self.random.random() < 0.2:
                raise ValueError("no luck")
            if self.random.random() < 0.2:
                await run.ask("Well?")
        finally:
            self.ended += 1

    def request(self) -> bytes:
        """Something that a client may send, whole or not."""
        pick = self.random.choice
        body = {
            "on_disconnect": pick(["cancel", "continue", "grace:0", "grace:1"]),
            "thread_id": pick([None, "a", "b"]),
            "if_busy": pick(["reject", "enqueue"]),
            "timeout_s": pick([None, 0, 0.05]),
        }
        run_id = pick(self.ids[-20:] or ["nobody"])
        sent = pick(
            [
                stream_run("wild", json.dumps(body).encode(), version=pick(["1.0", "1.1"])),
                stream_run("wild", json.dumps(body).encode()),
                request("POST", "/agents/wild/runs", b"{}"),
                request("GET", f"/runs/{run_id}/events?after=1"),
                request("POST", f"/runs/{run_id}/cancel", pick([b"", b'{"mode": "after_step"}'])),
                request("GET", pick(["/runs", "/agents", "/metrics", "/nothing"])),
                pick([b"\r\n", b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\n"]),
            ]
        )
        cut = self.random.random() < 0.2
        return sent[: self.random.randrange(len(sent))] if cut else sent

    async def be_a_client(self, url: str) -> None:
        """Connect, send this and that, read some of it or nothing, and leave in some way."""
        buffer = self.random.choice([None, 4096])
        with (
            trio.move_on_after(self.random.random() * 0.5),
            suppress(trio.BrokenResourceError, OSError),
        ):
            async with connect(url, receive_buffer=buffer) as client:
                for _ in range(self.random.randrange(1, 6)):
                    await client.stream.send_all(self.request())
                    if self.random.random() < 0.5:
                        with trio.move_on_after(self.random.random() * 0.1):
                            while await client.stream.receive_some():
                                pass
                match self.random.randrange(3):
                    case 0:
                        client.leave_by_rst()
                    case 1:
                        await client.leave_by_half_close()
                    case _:
                        pass


async def _do_anything(seed: int, *, clients: int, times: int) -> None:
    chaos = Chaos(random.Random(seed))
    reported: list[str] = []
    limits = LimitSettings(
        max_running=chaos.random.choice([5, 1_000]), retain_runs=50, grace=0.1, input_timeout=0.2
    )
    with trio.fail_after(120):
        async with open_server(
            Agent("wild", chaos.agent),
            settings=Settings(limits=limits),
            report=lambda event, **_facts: reported.append(event),
            write_deadline=0.2,
            rotation=0.3,
            heartbeat=0.05,
            keep_alive=0.5,
        ) as server:
            async with connect(server.urls[0]) as client:
                await client.send(request("GET", "/metrics"))
                await client.finish()
            before = await wait_quiet(server)

            async def come_and_go() -> None:
                for _ in range(times):
                    await chaos.be_a_client(server.urls[0])

            async with trio.open_nursery() as nursery:
                for _ in range(clients):
                    nursery.start_soon(come_and_go)
            await wait_until(lambda: server.connections.open == 0)
            for run in server.runs.unfinished():  # those that were cut wait for their reader
                run.cancel("client_cancel")
            after = await wait_quiet(server)

            assert before == after
            assert chaos.started == chaos.ended
            assert {"request", "crash", "run_finished"} >= set(reported)
            assert server.runs._finished.total() == reported.count("run_finished")
            assert 0 == server.connections.crashed
            assert 0 == server.runs._running.total()
            assert not [t for t in server.runs.threads.values() if t.active or t.holders]
            for run in server.runs:
                assert {} == run._holders
                assert {} == run.log._renderings
                assert 1 == sum(isinstance(event, RunFinished) for event in run.log.events)


@pytest.mark.parametrize("seed", range(3))
async def test_clients_that_do_anything_leave_nothing(seed: int) -> None:
    """Half requests, pipelined ones, garbage; stalled, reset, gone: nothing crashes or is left."""
    await _do_anything(seed, clients=30, times=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
async def test_many_clients_that_do_anything_leave_nothing(seed: int) -> None:
    """The same, for what happens rarely."""
    await _do_anything(seed, clients=60, times=12)


@pytest.mark.slow
async def test_ten_thousand_cycles_leave_nothing() -> None:
    """Tasks, descriptors, readers, timers: exactly what was there before, and no run goes on."""
    crowd = Crowd(wanted=CYCLES + 1)
    limits = LimitSettings(retain_runs=100)
    with trio.fail_after(1_200):
        async with open_server(
            Agent("member", crowd.agent), settings=Settings(limits=limits)
        ) as server:

            async def cycles(numbers: range) -> None:
                for number in numbers:
                    await _cycle(server.urls[0], number)

            await cycles(range(100))
            footprints: list[Footprint] = [await wait_quiet(server)]
            for start in range(0, CYCLES, 2_000):
                async with trio.open_nursery() as nursery:
                    for first in range(8):
                        nursery.start_soon(partial(cycles, range(start + first, start + 2_000, 8)))
                footprints.append(await wait_quiet(server))

            assert {footprints[0]} == set(footprints)
            assert 100 == len(list(server.runs))
            assert {"cancelled"} == set(server.runs._finished)
            assert {"client_left"} == set(server.app.streams.closed)
            assert crowd.started == server.runs._finished.total()
            assert len(server.runs.timer._heap) < 1_000
            for run in server.runs:
                assert {} == run._holders
                assert {} == run.log._renderings
