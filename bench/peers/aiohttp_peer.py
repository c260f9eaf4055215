"""The same stream from aiohttp, as its documentation shows: a StreamResponse, a write per event.

`POST /run?events=N&gap=S` streams N events, S seconds apart. Prints its address as a JSON line.
Run as `python -m bench.peers.aiohttp_peer`.
"""

import asyncio
import json
import secrets
import time
from datetime import UTC, datetime
from functools import lru_cache

from aiohttp import web

TEXT = "The quick brown fox jumps over the dog"


@lru_cache(maxsize=1)
def stamp(millisecond: int) -> str:
    """Format a time once per millisecond, as agentsse does: that is not what is compared."""
    whole = datetime.fromtimestamp(millisecond // 1000, UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{millisecond % 1000:03d}Z"


async def run(request: web.Request) -> web.StreamResponse:
    events, gap = int(request.query["events"]), float(request.query.get("gap", "0"))
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
    )
    await response.prepare(request)
    run_id = secrets.token_urlsafe(16)
    for n in range(1, events + 1):
        event = {
            "type": "custom",
            "run_id": run_id,
            "seq": n,
            "ts": stamp(time.time_ns() // 1_000_000),
            "name": "tick",
            "value": {"n": n, "text": TEXT},
        }
        data = json.dumps(event, separators=(",", ":"))
        await response.write(f"id: {n}\nevent: custom\ndata: {data}\n\n".encode())
        if gap:
            await asyncio.sleep(gap)
    await response.write_eof()
    return response


async def main() -> None:
    app = web.Application()
    app.router.add_post("/run", run)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    host, port = runner.addresses[0][:2]
    print(json.dumps({"host": host, "port": port}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
