"""The contract on sse-starlette, uvicorn and uvloop: an async generator that yields events.

A client that leaves cancels the task that is in the generator, as sse-starlette's documentation
says. What awaits in its `finally` is shielded, as AnyIO's says: otherwise it would be cancelled,
and what stands behind it would never be done. Pings stay on, as they are by default; the separator
is set to LF, so that all servers send the same bytes. uvicorn parses with httptools where that is
installed, as it does by itself. Run as `python -m bench.peers.sse_starlette_peer`.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import anyio
import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from .contract import Counter, Events, Order, announce

PATIENCE = 5  # seconds for what must still be done

COUNTER = Counter()


async def agent(order: Order, events: Events) -> AsyncIterator[dict[str, Any]]:
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
            kind, data = events.data(n)
            yield {"id": str(n), "event": kind, "data": data}
        if order.hold:
            await asyncio.sleep(order.hold)
    finally:
        COUNTER.enter(order.key)
        if upstream is not None:
            with anyio.move_on_after(PATIENCE, shield=True):
                upstream.close()
                await upstream.wait_closed()
        COUNTER.leave(order.key)


async def run(request: Request) -> EventSourceResponse:  # noqa: ASYNC124  # as the framework asks
    order = Order.of(request.query_params)
    return EventSourceResponse(agent(order, Events(order)), sep="\n")


class Fan:
    """One producer, and a queue for each of those who read what it makes."""

    def __init__(self) -> None:
        self.readers: set[asyncio.Queue[dict[str, Any] | None]] = set()
        self.producer: asyncio.Task[None] | None = None

    async def produce(self, order: Order, events: Events) -> None:
        try:
            async for event in agent(order, events):
                self.tell(event)
        finally:
            self.producer = None
            self.tell(None)

    def tell(self, event: dict[str, Any] | None) -> None:
        for queue in self.readers:
            queue.put_nowait(event)

    async def start(self, request: Request) -> JSONResponse:
        order = Order.of({**request.query_params, "stamp": 1})
        events = Events(order)
        self.producer = asyncio.create_task(self.produce(order, events))
        return JSONResponse({"id": events.run_id}, status_code=202)

    async def listen(self) -> AsyncIterator[dict[str, Any]]:
        if self.producer is None:
            return
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.readers.add(queue)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self.readers.remove(queue)

    async def watch(self, _request: Request) -> EventSourceResponse:
        return EventSourceResponse(self.listen(), sep="\n")


async def counter(request: Request) -> JSONResponse:  # noqa: ASYNC124  # the same
    tasks = len(asyncio.all_tasks())
    return JSONResponse(COUNTER.shown(tasks=tasks, times="times" in request.query_params))


def main() -> None:
    fan = Fan()
    app = Starlette(
        routes=[
            Route("/run", run, methods=["POST"]),
            Route("/fan", fan.start, methods=["POST"]),
            Route("/fan", fan.watch, methods=["GET"]),
            Route("/counter", counter),
        ]
    )
    config = uvicorn.Config(app, loop="uvloop", backlog=4096, access_log=False, log_config=None)
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    announce(*sock.getsockname())
    uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main()
