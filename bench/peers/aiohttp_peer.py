"""The contract on aiohttp, as its documentation shows: a StreamResponse, a write per event.

A client that leaves cancels its handler (`handler_cancellation`, which the documentation recommends
where many clients matter). Run as `python -m bench.peers.aiohttp_peer`.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from .contract import Counter, Events, Order, announce

COUNTER = Counter()


async def agent(order: Order, events: Events, write: Callable[[bytes], Awaitable[None]]) -> None:
    COUNTER.start()
    upstream = None
    try:
        if order.upstream is not None:
            _, upstream = await asyncio.open_connection("127.0.0.1", order.upstream)
            upstream.write(order.greeting)
            await upstream.drain()
        clock = asyncio.get_running_loop().time
        start = clock()
        for n in range(1, order.events + 1):
            delay = start + (n - 1) * order.gap - clock()
            if delay > 0:
                await asyncio.sleep(delay)
            await write(events.frame(n))
        if order.hold:
            await asyncio.sleep(order.hold)
    finally:
        COUNTER.enter(order.key)
        if upstream is not None:
            upstream.close()
            await upstream.wait_closed()
        COUNTER.leave(order.key)


async def begin(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
    )
    await response.prepare(request)
    return response


async def run(request: web.Request) -> web.StreamResponse:
    order = Order.of(request.query)
    response = await begin(request)
    await agent(order, Events(order), response.write)
    await response.write_eof()
    return response


class Fan:
    """One producer, and a queue for each of those who read what it makes."""

    def __init__(self) -> None:
        self.readers: set[asyncio.Queue[bytes | None]] = set()
        self.producer: asyncio.Task[None] | None = None

    async def produce(self, order: Order, events: Events) -> None:
        try:
            await agent(order, events, self.tell)
        finally:
            self.producer = None
            await self.tell(None)

    async def tell(self, frame: bytes | None) -> None:
        for queue in self.readers:
            queue.put_nowait(frame)

    async def start(self, request: web.Request) -> web.Response:
        order = Order.of({**request.query, "stamp": 1})
        events = Events(order)
        self.producer = asyncio.create_task(self.produce(order, events))
        return web.json_response({"id": events.run_id}, status=202)

    async def watch(self, request: web.Request) -> web.StreamResponse:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        if self.producer is None:
            queue.put_nowait(None)
        self.readers.add(queue)
        try:
            response = await begin(request)
            while (frame := await queue.get()) is not None:
                await response.write(frame)
            await response.write_eof()
        finally:
            self.readers.remove(queue)
        return response


async def counter(request: web.Request) -> web.Response:  # noqa: ASYNC124  # as aiohttp asks
    tasks = len(asyncio.all_tasks())
    return web.json_response(COUNTER.shown(tasks=tasks, times="times" in request.query))


async def main() -> None:
    app, fan = web.Application(), Fan()
    app.add_routes(
        [
            web.post("/run", run),
            web.post("/fan", fan.start),
            web.get("/fan", fan.watch),
            web.get("/counter", counter),
        ]
    )
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    announce(*runner.addresses[0][:2])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
