"""The clients that people have for JavaScript, in a process that a test talks to.

A driver in `clients/` is a script that reads commands as lines of JSON and writes what its client
has seen as lines of JSON. The packages are those of `clients/package-lock.json`; they are installed
when tests are collected that need them. Where there is no Node, or it is too old, these tests are
skipped, unless `AGENTSSE_CLIENTS=required` says that they must not be.
"""

import fcntl
import functools
import json
import os
import shutil
import subprocess
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

CLIENTS = Path(__file__).parent / "clients"
OLDEST = 20  # of Node, as the clients want it
MAX_LINE = 64 * 1024 * 1024


def need(*programs: str) -> None:
    """Skip the test where one of these is not there."""
    missing = [each for each in programs if shutil.which(each) is None]
    if missing:
        _do_without(f"{', '.join(missing)}: not found")


def _do_without(reason: str) -> None:
    if os.environ.get("AGENTSSE_CLIENTS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _installed() -> str | None:
    """Install the packages, once and for all; what is in the way, if anything is."""
    if shutil.which("node") is None:
        return "node: not found"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.removeprefix("v").partition(".")[0]) < OLDEST:
        return f"node: expected version {OLDEST} or newer, got {version.stdout.strip()}"
    with (CLIENTS / "package-lock.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may begin at once
        if _is_up_to_date(json.load(lock)["packages"]):
            return None
        if shutil.which("npm") is None:
            return "npm: not found"
        command = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", "--prefer-offline"]
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        done = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, check=False)
        return f"npm ci: {done.stderr[-500:]}" if done.returncode else None


def _is_up_to_date(wanted: dict[str, Any]) -> bool:
    """Whether what is installed is what the lock says; npm writes it down when it is done."""
    try:
        found = json.loads((CLIENTS / "node_modules/.package-lock.json").read_text())["packages"]
    except FileNotFoundError:
        return False
    needed = {path for path, package in wanted.items() if path and not package.get("optional")}
    return needed <= found.keys() and all(
        path in wanted and package.get("version") == wanted[path].get("version")
        for path, package in found.items()
    )


_installed()  # now: within a test it would count against the test's time, of which it may take all


@attrs.define(eq=False)
class Driver:
    """A driver that runs.

    Attributes:
        process: Its process.
    """

    process: trio.Process
    _lines: deque[bytes] = attrs.field(factory=deque)
    _rest: bytearray = attrs.field(factory=bytearray)
    _turn: trio.Lock = attrs.field(factory=trio.Lock)

    async def tell(self, **command: Any) -> None:
        """Give it a command."""
        assert self.process.stdin is not None
        async with self._turn:
            await self.process.stdin.send_all(json.dumps(command).encode() + b"\n")

    async def hear(self) -> Any:
        """What it says next; None once it has ended."""
        assert self.process.stdout is not None
        while not self._lines:
            data = await self.process.stdout.receive_some()
            if not data:
                return None
            self._rest += data
            assert len(self._rest) < MAX_LINE
            *whole, rest = self._rest.split(b"\n")
            self._lines += whole
            self._rest = bytearray(rest)
        return json.loads(self._lines.popleft())

    async def ask(self, **command: Any) -> Any:
        """Give it a command; what it says next."""
        await self.tell(**command)
        return await self.hear()


@asynccontextmanager
async def node(script: str, *arguments: str) -> AsyncIterator[Driver]:
    """Run a driver of `clients/`; leaving the context ends it.

    What it writes to stderr is shown where the test fails.
    """
    if (reason := _installed()) is not None:
        _do_without(reason)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            functools.partial(
                trio.run_process,
                ["node", str(CLIENTS / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                check=False,
            )
        )
        try:
            yield Driver(process)
        finally:
            process.kill()
