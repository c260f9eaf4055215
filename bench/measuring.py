"""What every measurement needs: processes on chosen cores, their addresses, their time and memory.

Knows: how a server is started, pinned and ended, and what the system says about it. Must never know
what is measured.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from agentsse import Agent
from agentsse.config import ServerSettings, Settings
from agentsse.server import Server, serve

CHECKOUT = Path(__file__).parent.parent


@attrs.frozen
class Cores:
    """Where the server and the client run; None where there is no choice."""

    server: int | None
    client: int | None

    @classmethod
    def choose(cls) -> "Cores":
        if not hasattr(os, "sched_setaffinity"):
            return cls(None, None)
        cores = sorted(os.sched_getaffinity(0))
        return cls(cores[0], cores[1]) if len(cores) > 1 else cls(None, None)


@attrs.frozen
class Address:
    """Where a process listens."""

    pid: int
    host: str
    port: int


def serve_quietly(agent: Agent) -> None:
    """Serve an agent with default settings until SIGTERM; print the address as a JSON line."""

    def announce(server: Server) -> None:
        host, _, port = server.urls[0].removeprefix("http://").rpartition(":")
        print(json.dumps({"host": host, "port": int(port)}), flush=True)

    def ignore(*_args: object, **_facts: object) -> None:
        """Log nothing, as the peers do."""

    settings = Settings(server=ServerSettings(port=0))
    sys.exit(trio.run(partial(serve, [agent], settings, report=ignore, announce=announce)))


@asynccontextmanager
async def listening(command: Sequence[str], core: int | None) -> AsyncIterator[Address]:
    """Run a process that prints its address as a JSON line; leaving the context ends it."""
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                list(command),
                stdout=subprocess.PIPE,
                cwd=CHECKOUT,
                check=False,
                preexec_fn=partial(pin, 0, core),  # threads that it starts inherit it
            )
        )
        try:
            yield Address(process.pid, **json.loads(await _first_line(process)))
        finally:
            nursery.cancel_scope.cancel()  # SIGTERM, and SIGKILL after 5 s


async def _first_line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    while b"\n" not in line:
        more = await process.stdout.receive_some()
        if not more:
            raise RuntimeError(f"expected an address from {process.args}, got the end")
        line += more
    return line


async def answer_of(command: Sequence[str], core: int | None) -> Any:
    """Run a process to its end, and return the JSON that it prints."""
    done = await trio.run_process(
        list(command), capture_stdout=True, cwd=CHECKOUT, preexec_fn=partial(pin, 0, core)
    )
    return json.loads(done.stdout)


def pin(pid: int, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(pid, {core})


def cpu_clock(pid: int) -> int | None:
    """The clock that counts the processor time of a process and its threads, to the nanosecond.

    It is what clock_getcpuclockid(3) makes on Linux; Python does not offer it.
    """
    return ~pid << 3 | 2 if sys.platform == "linux" else None


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process and its threads."""
    clock = cpu_clock(pid)
    try:
        return None if clock is None else time.clock_gettime(clock)
    except OSError:
        return None


def memory(pid: int) -> dict[str, float]:
    """MiB that a process holds, and held at most."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {
        name: round(int(fields[field].split()[0]) / 1024, 1)
        for name, field in (("now", "VmRSS"), ("peak", "VmHWM"))
    }


def machine(*packages: str) -> dict[str, Any]:
    """What was measured on, with the versions of our own packages and of these."""
    versions = {}
    for name in ("agentsse", "trio", "hypercorn", "quart-trio", "msgspec", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def shown(value: float | None, digits: int) -> str:
    """A figure for a table."""
    return "-" if value is None else f"{value:.{digits}f}"
