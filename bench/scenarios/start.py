"""The start: from the exec of a process to its first answer, and what it holds when idle.

Knows: how each server is started, and how it says where it listens. Must never know what a server
does until then. `agentsse serve` is what people start, with the built-in guide; it is asked for its
health, which is what their supervisors ask for. Its peers are the programs of this benchmark, which
are asked for their counter. Servers are started in turns, with their code compiled already: by the
first start of each, whatever PYTHONDONTWRITEBYTECODE says here.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import trio

from bench.measuring import CHECKOUT, Address, cpu_seconds, memory, settled
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table, Target
from bench.servers import OURS, Ask, Server, chosen

ROUNDS, FEW = 9, 2
SETTLING = 0.5  # seconds of silence before memory is read
PATIENCE = 20.0  # seconds for one start

SERVE = attrs.evolve(
    OURS,
    name="agentsse serve",
    command=(sys.executable, "-m", "agentsse", "serve", "--port", "0"),
)
HEALTH, COUNTER = Ask("GET", "/health/live"), Ask("GET", "/counter")
ADDRESS = re.compile(rb'http://([^:]+):(\d+)\n|"host": ?"([^"]+)", ?"port": ?(\d+)')

MOST_MS, AIM_MS = 500.0, 300.0
MOST_MIB, AIM_MIB = 50.0, 40.0

COLUMNS = (
    Column("server", ""),
    Column("median", "first answer, ms", 0),
    Column("best", "best", 0),
    Column("worst", "worst", 0),
    Column("cpu", "CPU ms", 0),
    Column("rss", "RSS MiB"),
    Column("failed", "failed"),
)


@attrs.frozen
class Start:
    """One start; seconds and MiB, None for what the system does not tell."""

    took: float
    cpu: float | None
    rss: float | None


async def measure(bench: Bench) -> Result:
    with TemporaryDirectory() as compiled:
        return await _measure_all(bench, compiled)


async def _measure_all(bench: Bench, compiled: str) -> Result:
    servers = [SERVE, *(server for server in chosen(bench, "start") if server is not OURS)]
    starts: dict[str, list[Start]] = {server.name: [] for server in servers}
    failures: dict[str, str] = {}
    for number in range(-1, FEW if bench.quick else ROUNDS):  # the first one compiles, and warms
        for server in servers:
            try:
                start = await _start(bench, server, compiled)
            except* (OSError, RuntimeError, trio.TooSlowError) as group:
                failures[server.name] = repr(group.exceptions[0])
            else:
                if number >= 0:
                    starts[server.name].append(start)
                    bench.progress(f"{server.name:14} {start.took * 1e3:6.0f} ms")
    rows = [_row(name, done, failures.get(name)) for name, done in starts.items()]
    return Result(
        tables=[Table("from exec to the first answer", COLUMNS, rows)],
        targets=[] if bench.quick else list(_targets(rows[0])),
        plots=[
            Plot(
                "start", "from exec to the first answer", "", "ms",
                {row["server"]: [(row["server"], row["median"])] for row in rows if row["median"]},
                kind="bars",
                limit=(MOST_MS, "the target"),
            )
        ],
        problems=[f"{SERVE.name}: {failures[SERVE.name]}"] if SERVE.name in failures else [],
        facts={"rows": rows},
    )  # fmt: skip


async def _start(bench: Bench, server: Server, compiled: str) -> Start:
    """Start a server, ask it once, look at it when it is idle, and end it."""
    ask = HEALTH if server is SERVE else COUNTER
    command = server.command if server.build is None else server.build()
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        start = partial(
            trio.run_process,
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=CHECKOUT,
            env=environment,
            check=False,
            preexec_fn=settled(bench.cores.server),
        )
        process: trio.Process = await nursery.start(start)
        with trio.fail_after(PATIENCE):
            host, port = await _address(process)
            answer = await _answer(Address(process.pid, host, port), ask)
            took = time.perf_counter() - began
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"expected status 200, got {answer[:80]!r}")
        cpu = cpu_seconds(process.pid)
        await trio.sleep(SETTLING)
        rss = memory(process.pid).get("now")
        nursery.cancel_scope.cancel()
    return Start(took, cpu, rss)


async def _address(process: trio.Process) -> tuple[str, int]:
    assert process.stdout is not None
    said = b""
    while (found := ADDRESS.search(said)) is None:
        more = await process.stdout.receive_some()
        if not more:
            raise RuntimeError(f"expected an address, got the end after {said[-80:]!r}")
        said += more
    host, port = (found[1], found[2]) if found[1] else (found[3], found[4])
    return host.decode(), int(port)


async def _answer(at: Address, ask: Ask) -> bytes:
    stream = await trio.open_tcp_stream(at.host, at.port)
    async with stream:
        await stream.send_all(ask.raw(at).replace("text/event-stream", "*/*").encode())
        return bytes(await stream.receive_some())


def _row(name: str, starts: Sequence[Start], failure: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {column.key: None for column in COLUMNS}
    row |= {"server": name, "failed": failure or "none", "starts": list(map(attrs.asdict, starts))}
    if starts:
        times = [start.took * 1e3 for start in starts]
        row |= {"median": median(times), "best": min(times), "worst": max(times)}
        known = [start.cpu * 1e3 for start in starts if start.cpu is not None]
        held = [start.rss for start in starts if start.rss is not None]
        row |= {
            "cpu": median(known) if known else None,
            "rss": median(held) if held else None,
        }
    return row


def _targets(row: Mapping[str, Any]) -> Iterator[Target]:
    yield Target(f"{SERVE.name}, first answer", row["median"], MOST_MS, AIM_MS, " ms")
    yield Target(f"{SERVE.name}, idle RSS", row["rss"], MOST_MIB, AIM_MIB, " MiB")


SCENARIO = Scenario(
    name="start",
    summary="From exec to the first answer, and what the process holds when idle.",
    measure=measure,
    cap=300,
)
