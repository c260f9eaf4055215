"""What every measurement needs: processes on chosen cores, their addresses, their time and memory.

Knows: how a server is started, pinned and ended, and what the system says about it. Must never know
what is measured.
"""

import importlib.metadata
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

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


@asynccontextmanager
async def listening(
    command: Sequence[str], core: int | None, *, env: Mapping[str, str] | None = None
) -> AsyncIterator[Address]:
    """Run a process that prints its address as a JSON line; leaving the context ends it.

    Args:
        command: The program and its arguments.
        core: Where it runs; None for anywhere.
        env: Variables beside those that we have.
    """
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                list(command),
                stdout=subprocess.PIPE,
                cwd=CHECKOUT,
                check=False,
                env=None if env is None else {**os.environ, **env},
                preexec_fn=settled(core),  # threads that it starts inherit it
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
        list(command), capture_stdout=True, cwd=CHECKOUT, preexec_fn=settled(core)
    )
    return json.loads(done.stdout)


def settled(core: int | None) -> Callable[[], None]:
    """What a new process does first."""
    return partial(_settle, core)


def _settle(core: int | None) -> None:
    """In a new process: go to its core, and may open as many descriptors as the system lets it."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    raise_descriptors()


def raise_descriptors() -> int:
    """Let this process open as many descriptors as it may; returns how many that is."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


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


def descriptors(pid: int) -> int | None:
    """How many descriptors a process has open."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None


def kernel_socket_memory() -> float | None:
    """MiB that the kernel holds for TCP sockets of the whole machine."""
    try:
        lines = Path("/proc/net/sockstat").read_text().splitlines()
    except OSError:
        return None
    words = next(line.split() for line in lines if line.startswith("TCP:"))
    pages = int(words[words.index("mem") + 1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
