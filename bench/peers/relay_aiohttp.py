"""The same relay with aiohttp, as its documentation shows: one session, a write per token.

`POST /run` with `{"input": ...}` asks the model API, whose base URL is the argument, and streams
what it says: an event of JSON per token, and one at the end. Prints its address as a JSON line.
Run as `python -m bench.peers.relay_aiohttp URL`.
"""

import asyncio
import json
import sys

import aiohttp
from aiohttp import web

URL = web.AppKey("url", str)
SESSION = web.AppKey("session", aiohttp.ClientSession)


async def run(request: web.Request) -> web.StreamResponse:
    try:
        return await relay(request)
    except ConnectionResetError:  # the client has left
        return web.Response()


async def relay(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
    )
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": asked["input"]}],
        "stream": True,
    }
    app = request.app
    async with app[SESSION].post(app[URL] + "/chat/completions", json=body) as upstream:
        upstream.raise_for_status()
        await response.prepare(request)
        seq, reason = 0, None
        rest = b""
        async for received in upstream.content.iter_any():
            *frames, rest = (rest + received).split(b"\n\n")
            for frame in frames:
                if not frame.startswith(b"data: ") or frame == b"data: [DONE]":
                    continue
                choice = json.loads(frame[6:])["choices"][0]
                reason = choice["finish_reason"] or reason
                if delta := choice["delta"].get("content"):
                    seq += 1
                    data = json.dumps({"type": "delta", "seq": seq, "delta": delta})
                    await response.write(f"data: {data}\n\n".encode())
        if reason is None:
            raise web.HTTPBadGateway
    await response.write(b'data: {"type":"end"}\n\n')
    await response.write_eof()
    return response


async def main() -> None:
    app = web.Application()
    app[URL] = sys.argv[1]
    app.router.add_post("/run", run)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        app[SESSION] = session
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        host, port = runner.addresses[0][:2]
        print(json.dumps({"host": host, "port": port}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
