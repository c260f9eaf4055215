"""Streams that are held by a process of their own, and what it is told to do with them.

Knows: how that process is started, told and asked (bench/clients/holding.py). Must never know why.
"""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import trio

from .measuring import CHECKOUT, raise_descriptors
from .scenario import Bench
from .servers import Ask, Running

CLIENT = (sys.executable, "-m", "bench.clients.holding")
WINDOW = 200  # streams at once that have had no event, while they are being opened
SPARE = 512  # descriptors that are not streams


@attrs.frozen(eq=False)
class Held:
    """The client that holds streams."""

    _stdin: trio.abc.SendStream
    _lines: "Lines"

    async def do(self, what: str, **how: Any) -> dict[str, Any]:
        """Have something done, and return what the client says of it, once it is done.

        Raises:
            RuntimeError: The client has ended.
        """
        await self.tell(do=what, **how)
        return await self.answer()

    async def tell(self, **order: Any) -> None:
        """Tell it something; an order is answered."""
        await self._stdin.send_all(json.dumps(order).encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        """Return the answer to an order, once it has been carried out.

        Raises:
            RuntimeError: The client has ended.
        """
        return json.loads(await self._lines.receive())


@attrs.define(eq=False)
class Lines:
    """Lines that a process prints."""

    _stdout: trio.abc.ReceiveStream
    _rest: bytes = b""

    async def receive(self) -> bytes:
        """Return the next one.

        Raises:
            RuntimeError: There will be none.
        """
        while b"\n" not in self._rest:
            more = await self._stdout.receive_some()
            if not more:
                raise RuntimeError("expected a line from a process, got the end")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line


@asynccontextmanager
async def holding(
    bench: Bench, running: Running, requests: Sequence[Ask], *, streams: int, seconds: float
) -> AsyncIterator[Held]:
    """Start the client; leaving the context ends it, and all its connections.

    Args:
        bench: Where it runs.
        running: The server.
        requests: What it asks for; stream n for the n-th, modulo their number.
        streams: How many.
        seconds: What an order may take at most.
    """
    async with started(CLIENT, bench.cores.client, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        held = Held(process.stdin, Lines(process.stdout))
        await held.tell(
            host=running.at.host,
            port=running.at.port,
            requests=[request.raw(running.at) for request in requests],
            streams=streams,
            seconds=seconds,
        )
        yield held


@asynccontextmanager
async def started(
    command: Sequence[str],
    core: int | None,
    *,
    stdin: int | None = None,
    stderr: int | None = None,
) -> AsyncIterator[trio.Process]:
    """Start a process on a core; leaving the context kills it, if it is still there."""
    process = await trio.lowlevel.open_process(
        list(command),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=CHECKOUT,
        preexec_fn=partial(_settle, core),  # threads that it starts inherit it
    )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await stream.aclose()


def _settle(core: int | None) -> None:
    """In a new process: go to its core, and may open as many descriptors as the system lets it."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    raise_descriptors()


def room() -> int:
    """How many streams a process can hold."""
    return raise_descriptors() - SPARE
