"""The contract on Quart-Trio and Hypercorn: an async generator for a body, its timeout off.

That is what Quart's documentation shows for server-sent events. A client that leaves cancels the
request's nursery; what awaits in a `finally` is shielded, as Trio's documentation says. Run as
`python -m bench.peers.quart_trio_peer`.
"""

from collections.abc import AsyncIterator
from math import inf
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import Response, make_response, request
from quart_trio import QuartTrio

from .contract import Counter, Events, Order, announce

PATIENCE = 5  # seconds for what must still be done

COUNTER = Counter()

app = QuartTrio(__name__)


async def agent(order: Order, events: Events) -> AsyncIterator[bytes]:
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
            yield events.frame(n)
        if order.hold:
            await trio.sleep(order.hold)
    finally:
        COUNTER.enter(order.key)
        if upstream is not None:
            with trio.move_on_after(PATIENCE, shield=True):
                await upstream.aclose()
        COUNTER.leave(order.key)


async def stream(frames: AsyncIterator[bytes]) -> Response:
    response = await make_response(
        frames, {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
    )
    response.timeout = None
    return response


@app.post("/run")
async def run() -> Response:
    order = Order.of(request.args)
    return await stream(agent(order, Events(order)))


class Fan:
    """One producer, and a channel for each of those who read what it makes."""

    def __init__(self) -> None:
        self.readers: set[trio.MemorySendChannel[bytes]] = set()
        self.is_producing = False

    async def produce(self, order: Order, events: Events) -> None:
        try:
            async for frame in agent(order, events):
                for reader in self.readers:
                    reader.send_nowait(frame)
        finally:
            self.is_producing = False
            for reader in self.readers:
                reader.close()

    async def listen(self) -> AsyncIterator[bytes]:
        if not self.is_producing:
            return
        sender, receiver = trio.open_memory_channel[bytes](inf)
        self.readers.add(sender)
        try:
            async for frame in receiver:
                yield frame
        finally:
            self.readers.remove(sender)


FAN = Fan()


@app.post("/fan")
async def start_fan() -> tuple[dict[str, Any], int]:  # noqa: ASYNC124  # else it gets a thread
    order = Order.of({**request.args, "stamp": 1})
    events = Events(order)
    FAN.is_producing = True
    app.add_background_task(FAN.produce, order, events)
    return {"id": events.run_id}, 202


@app.get("/fan")
async def watch_fan() -> Response:
    return await stream(FAN.listen())


@app.get("/counter")
async def counter() -> dict[str, Any]:  # noqa: ASYNC124  # the same
    tasks = trio.lowlevel.current_statistics().tasks_living
    return COUNTER.shown(tasks=tasks, times="times" in request.args)


async def main() -> None:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.backlog = 4096
    config.errorlog = None
    async with trio.open_nursery() as nursery:
        urls = await nursery.start(serve, app, config)
        host, _, port = urls[0].removeprefix("http://").rpartition(":")
        announce(host, int(port))


if __name__ == "__main__":
    trio.run(main)
