"""SIGTERM while streams are open: how long a server takes to go, and what its clients see of it.

Knows: what is asked for, when the signal comes, and what a proper end is. Must never know how a
server drains.

Each server is asked twice, in a process of its own: for work that would go on for a minute, then
for work that ends by itself soon after the signal: it takes the same few seconds of each server,
and as long as that took to open all streams before. A stream has its proper end when its last chunk
has come; without it, a client cannot tell the end from a broken line.
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import trio

from bench.holding import WINDOW, Lines, holding, started
from bench.measuring import Address
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table
from bench.servers import OURS, Running, Server, Work, chosen

GAP = 0.5  # seconds between two events
LONG = 60.0  # seconds that work takes which does not end in time
MOST_SHORT = 20.0  # seconds; ours cancels what still runs 25 s after the signal
AT_ONCE = 0.2  # seconds within which a process goes that waits for nothing
ENDS, GOES_ON = "ends", "goes on"


@attrs.frozen
class Size:
    """How much is open, and for how long one waits; seconds.

    Attributes:
        short: What work takes that ends by itself, beside the time for opening all.
        drain: What ours may take where work does not end.
        most: What a server may take until it is killed.
    """

    streams: int
    short: float
    drain: float
    most: float


FULL_SIZE = Size(streams=1_000, short=3.0, drain=5.0, most=40.0)
SMOKE = Size(streams=50, short=1.0, drain=1.0, most=5.0)
PATIENCE = 30.0  # seconds for opening all, and for the streams' ends when the process is gone

COMPLETE = "complete"
COLUMNS = (
    Column("server", ""),
    Column("work", "work"),
    Column("takes", "takes s"),
    Column("open", "open", 0),
    Column("gone", "gone after s", 2),
    Column("exit", "exit"),
    Column("complete", "proper end", 0),
    Column("cut", "cut", 0),
    Column("reset", "reset", 0),
    Column("end_p50", "end p50 s", 2),
    Column("end_max", "max", 2),
    Column("said", "last event"),
    Column("failed", "failed"),
)


async def measure(bench: Bench) -> Result:
    size = SMOKE if bench.quick else FULL_SIZE
    rows: list[dict[str, Any]] = []
    for server in chosen(bench, "drain"):
        seconds = LONG
        for name in (GOES_ON, ENDS):
            row = {"server": server.name, "work": name, "takes": seconds}
            row |= await _measure_one(bench, _drained(server, size, name), seconds, size)
            bench.progress(_line(row))
            rows.append(row)
            seconds = min(size.short + (row["opened"] or 0.0), MOST_SHORT)
    return Result(
        tables=[Table(f"SIGTERM while {size.streams:,} streams are open", COLUMNS, rows)],
        plots=[
            Plot(
                "drain",
                f"from SIGTERM until the process is gone, {size.streams:,} streams open",
                "server",
                "seconds",
                {
                    f"work that {name}": [
                        (row["server"], row["gone"])
                        for row in rows
                        if row["work"] == name and isinstance(row["gone"], float)
                    ]
                    for name in (ENDS, GOES_ON)
                },
                kind="bars",
            )
        ],
        notes=[
            f"where work goes on, {OURS.name} is told to drain for {size.drain:g} s, not for 30 s",
            "cut: the connection ended without the last chunk; reset: it was torn down",
            *_notes(rows),
        ],
        problems=list(_problems(rows)),
        facts={"rows": rows},
    )


def _drained(server: Server, size: Size, work: str) -> Server:
    """Let ours have its usual drain for work that ends, and a shorter one for what does not."""
    if server is not OURS or work == ENDS:
        return server
    return attrs.evolve(server, command=(*server.command, "--drain", str(size.drain)))


async def _measure_one(bench: Bench, server: Server, seconds: float, size: Size) -> dict[str, Any]:
    """Measure one server; a peer that fails has a row that says so."""
    work = Work(events=round(seconds / GAP), gap=GAP, hold=GAP)
    row: dict[str, Any] = {column.key: None for column in COLUMNS[3:]} | {"opened": None}
    command = server.command if server.build is None else server.build()
    try:
        # What peers say of streams that they cut, a line for each, is not asked for.
        stderr = None if server.name == OURS.name else subprocess.DEVNULL
        async with started(command, bench.cores.server, stderr=stderr) as process:
            assert process.stdout is not None
            with trio.fail_after(PATIENCE):
                found = json.loads(await Lines(process.stdout).receive())
            running = Running(server, Address(process.pid, **found))
            row |= await _end_while_open(bench, running, process, work, size)
    except* (RuntimeError, OSError, trio.TooSlowError) as group:
        row |= {"failed": f"gave up: {group.exceptions[0]}"}
    return row


async def _end_while_open(
    bench: Bench, running: Running, process: trio.Process, work: Work, size: Size
) -> dict[str, Any]:
    request = running.server.dialect.run(work)
    limit = size.most + PATIENCE
    async with holding(bench, running, [request], streams=size.streams, seconds=limit) as client:
        opened = await client.do("open", window=WINDOW)
        began, since = trio.current_time(), time.monotonic_ns()
        process.send_signal(signal.SIGTERM)
        await client.tell(do="end", since=since)
        with trio.move_on_after(size.most) as scope:
            await process.wait()
        seconds = trio.current_time() - began
        if scope.cancelled_caught:
            process.kill()
        ended = await client.answer()
    return _seen(ended, size.streams) | {
        "opened": opened["seconds"],
        "gone": f"not in {size.most:g}" if scope.cancelled_caught else seconds,
        "exit": _exit(await process.wait()),
        "failed": "; ".join(opened["failures"]) or "none",
    }


def _seen(ended: Mapping[str, Any], streams: int) -> dict[str, Any]:
    """Sort what the client saw of the streams that were open at the signal."""
    hows: dict[str, int] = {}
    words: dict[str, int] = {}
    for how, word, number in ended["endings"]:
        hows[how or "open"] = hows.get(how or "open", 0) + number
        words[word] = words.get(word, 0) + number
    reset = sum(number for how, number in hows.items() if how.startswith("a reset"))
    complete, before = hows.get(COMPLETE, 0), ended["before"]
    late = ended["end_ms"] or {}
    return {
        "open": streams - before,
        "complete": max(complete - before, 0),
        "cut": streams - complete - reset,
        "reset": reset,
        "end_p50": late["p50"] / 1e3 if late else None,
        "end_max": late["max"] / 1e3 if late else None,
        "said": "; ".join(f"{number:,} {word}" for word, number in words.items()),
        "endings": ended["endings"],
    }


def _exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else str(code)


def _line(row: Mapping[str, Any]) -> str:
    begin = f"work {row['work']:8} {row['server']:14}"
    if row["failed"] != "none":
        return f"{begin} {row['failed']}"
    gone = row["gone"] if isinstance(row["gone"], str) else f"{row['gone']:.2f}"
    return f"{begin} gone after {gone} s ({row['exit']}), {row['complete']:,} proper ends"


def _notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    at_once = [
        row["server"]
        for row in rows
        if row["work"] == ENDS
        and isinstance(row["gone"], float)
        and row["gone"] < AT_ONCE
        and not row["complete"]
    ]
    if at_once:
        yield (
            f"{', '.join(at_once)}: the program ends at the signal; what its platform offers for a "
            "drain, if anything, is not in it"
        )


def _problems(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["server"] != OURS.name:
            continue
        where = f"{OURS.name}, work that {row['work']}"
        if row["failed"] != "none":
            yield f"{where}: {row['failed']}"
        elif row["complete"] != row["open"]:
            yield f"{where}: expected {row['open']:,} proper ends, got {row['complete']:,}"
        elif row["exit"] != "0":
            yield f"{where}: expected exit code 0, got {row['exit']}"


SCENARIO = Scenario(
    name="drain",
    summary="SIGTERM with 1,000 streams open: seconds until it is gone, and what clients see.",
    measure=measure,
    cap=900,
)
