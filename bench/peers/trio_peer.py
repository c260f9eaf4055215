"""The contract on Trio and nothing else: a socket, a loop, a write per event. The floor.

What a framework on Trio can come to is here: no parser, no router, no bounds, no deadlines. One
request per connection. While an agent works, another task reads, to see the client leave: then the
nursery of both is cancelled. Run as `python -m bench.peers.trio_peer`.
"""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import trio

from .contract import Counter, Events, Order, announce

PATIENCE = 5  # seconds for what must still be done
RECEIVE = 64 * 1024

COUNTER = Counter()

STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
END = b"0\r\n\r\n"


async def agent(order: Order, events: Events, write: Callable[[bytes], Awaitable[None]]) -> None:
    COUNTER.start()
    upstream = None
    try:
        if order.upstream is not None:
            upstream = await trio.open_tcp_stream("127.0.0.1", order.upstream)
            await upstream.send_all(order.greeting)
        start = trio.current_time()
        for n in range(1, order.events + 1):
            if order.gap:
                await trio.sleep_until(start + (n - 1) * order.gap)
            await write(events.frame(n))
        if order.hold:
            await trio.sleep(order.hold)
    finally:
        COUNTER.enter(order.key)
        if upstream is not None:
            with trio.move_on_after(PATIENCE, shield=True):
                await upstream.aclose()
        COUNTER.leave(order.key)


async def stream(
    client: trio.SocketStream, produce: Callable[[Callable[[bytes], Awaitable[None]]], Any]
) -> None:
    """Send what is produced, until it ends or the client leaves."""
    await client.send_all(STREAM)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_leaving, client, nursery.cancel_scope)
        await produce(partial(write_chunk, client))
        await client.send_all(END)
        nursery.cancel_scope.cancel()


async def watch_leaving(client: trio.SocketStream, scope: trio.CancelScope) -> None:
    while await client.receive_some(RECEIVE):
        pass
    scope.cancel()


async def write_chunk(client: trio.SocketStream, data: bytes) -> None:
    await client.send_all(b"%x\r\n%b\r\n" % (len(data), data))


async def answer(client: trio.SocketStream, status: str, value: Any) -> None:
    body = json.dumps(value).encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    await client.send_all(head.encode() + body)


class Fan:
    """One producer, and a channel for each of those who read what it makes."""

    def __init__(self) -> None:
        self.readers: set[trio.MemorySendChannel[bytes]] = set()
        self.is_producing = False

    async def produce(self, order: Order, events: Events) -> None:
        try:
            await agent(order, events, self.tell)
        finally:
            self.is_producing = False
            for reader in self.readers:
                reader.close()

    async def tell(self, frame: bytes) -> None:
        for reader in self.readers:
            reader.send_nowait(frame)
        await trio.lowlevel.checkpoint()

    async def listen(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        if not self.is_producing:
            return
        sender, receiver = trio.open_memory_channel[bytes](inf)
        self.readers.add(sender)
        try:
            async for frame in receiver:
                await write(frame)
        finally:
            self.readers.remove(sender)


FAN = Fan()


async def receive_head(client: trio.SocketStream) -> tuple[str, str, dict[str, str]]:
    """Read a request: its method, its path and its query; the contract has no bodies."""
    received = b""
    while b"\r\n\r\n" not in received:
        more = await client.receive_some(RECEIVE)
        if not more:
            raise trio.BrokenResourceError
        received += more
    method, target, _ = received.split(b"\r\n", 1)[0].decode().split(" ")
    parts = urlsplit(target)
    return method, parts.path, dict(parse_qsl(parts.query))


async def serve(background: trio.Nursery, client: trio.SocketStream) -> None:
    try:
        method, path, query = await receive_head(client)
        match method, path:
            case "POST", "/run":
                order = Order.of(query)
                await stream(client, partial(agent, order, Events(order)))
            case "POST", "/fan":
                order = Order.of({**query, "stamp": 1})
                events = Events(order)
                FAN.is_producing = True
                background.start_soon(FAN.produce, order, events)
                await answer(client, "202 Accepted", {"id": events.run_id})
            case "GET", "/fan":
                await stream(client, FAN.listen)
            case "GET", "/counter":
                tasks = trio.lowlevel.current_statistics().tasks_living
                shown = COUNTER.shown(tasks=tasks, times="times" in query)
                await answer(client, "200 OK", shown)
            case _:
                await answer(client, "404 Not Found", None)
    except* (trio.BrokenResourceError, OSError):
        pass  # the client, or the agent's upstream, has left


async def main() -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, partial(serve, nursery), 0, host="127.0.0.1", backlog=4096)
        )
        announce(*listeners[0].socket.getsockname())


if __name__ == "__main__":
    trio.run(main)
