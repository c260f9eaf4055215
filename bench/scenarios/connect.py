"""A storm: many clients that connect and ask at the same instant, through all servers in turns.

Knows: how many come, and what is made of the rounds. Must never know what is inside a server.

Whoever comes back after a restart comes with all the others. All streams are due at one instant:
connecting, the request, ten events and the end are part of every time, and so is whatever a stream
waits for in between, in the kernel or in the client. Each server has one process for all rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from bench.holding import room
from bench.measuring import memory
from bench.rounds import (
    Round,
    Size,
    at_least,
    busy_client,
    cpu_us,
    facts_of,
    failure_of,
    in_turns,
    load,
    middle,
    side_by_side,
)
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table, Target
from bench.servers import OURS

EVENTS = 10
STREAMS, ROUNDS = (1_000, 5_000), 3
FEW, ONCE = (100,), 1  # of a smoke
PATIENCE = 30.0  # seconds for one round of one server
BACKLOG = 4_096  # connections that the system keeps until a server accepts them
PEER, FLOOR, AIM = "sse-starlette", 1.0, 1.3

COLUMNS = (
    Column("server", ""),
    Column("streams", "streams", 0),
    Column("rate", "streams/s", 0),
    Column("best", "best", 0),
    Column("us", "us/stream", 0),
    Column("first_p50", "first byte p50 ms", 0),
    Column("first_p99", "p99", 0),
    Column("first_max", "max", 0),
    Column("end_p50", "end p50 ms", 0),
    Column("end_p99", "p99", 0),
    Column("end_max", "max", 0),
    Column("client", "client %", 0),
    Column("failed", "failed"),
)

Rounds = Mapping[str, Sequence[Round]]


async def measure(bench: Bench) -> Result:
    sizes, number = (FEW, ONCE) if bench.quick else (STREAMS, ROUNDS)
    sizes = tuple(sorted({min(streams, room()) for streams in sizes}))
    found: dict[int, Rounds] = {}
    async with side_by_side(bench, "connect") as line_up:
        warm_up = Size(streams=20, events=EVENTS, opened=False, seconds=PATIENCE)
        for running in line_up.running:
            await load(bench, running, warm_up)
        for streams in sizes:
            size = attrs.evolve(warm_up, streams=streams)
            found[streams] = await in_turns(bench, line_up.running, size, number, _line)
        held = {running.name: memory(running.pid) for running in line_up.running}
    rows = [_row(name, streams, done) for streams in sizes for name, done in found[streams].items()]
    return Result(
        tables=[
            Table(
                f"streams of {EVENTS} events, all asked for at once",
                COLUMNS,
                rows + [_absent(name, why) for name, why in line_up.absent.items()],
            )
        ],
        targets=[] if bench.quick else list(_targets(rows, sizes)),
        plots=list(_plots(rows, sizes)),
        notes=list(_notes(found)),
        problems=[
            f"{OURS.name}, {row['streams']:,} streams: {row['failed']}"
            for row in rows
            if row["server"] == OURS.name and row["failed"] != "none"
        ],
        facts={
            "rounds": {streams: facts_of(rounds) for streams, rounds in found.items()},
            "memory_mib": held,
            "absent": line_up.absent,
        },
    )


def _line(done: Round) -> str:
    end = done.end_ms or {}
    return f"{done.stream_rate or 0:7,.0f} streams/s  end p99 {end.get('p99', 0):6,.0f} ms"


def _row(name: str, streams: int, rounds: Sequence[Round]) -> dict[str, Any]:
    rates = [rate for done in rounds if (rate := done.stream_rate) is not None]
    row: dict[str, Any] = {
        "server": name,
        "streams": streams,
        "rate": middle(rates),
        "best": max(rates, default=None),
        "us": cpu_us(rounds, sum(done.streams - done.failed for done in rounds)),
        "client": max(done.client_share for done in rounds) * 100,
        "failed": failure_of(rounds) or "none",
    }
    for what, times in (
        ("first", [done.first_ms for done in rounds if done.first_ms]),
        ("end", [done.end_ms for done in rounds if done.end_ms]),
    ):
        row[f"{what}_p50"] = middle(each["p50"] for each in times)
        row[f"{what}_p99"] = middle(each["p99"] for each in times)
        row[f"{what}_max"] = max((each["max"] for each in times), default=None)
    return row


def _absent(name: str, why: str) -> dict[str, Any]:
    return {column.key: None for column in COLUMNS} | {"server": name, "failed": why}


def _targets(rows: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> Iterator[Target]:
    for streams in sizes:
        rates = {row["server"]: row["rate"] for row in rows if row["streams"] == streams}
        yield at_least(f"{streams:,} at once, streams/s", rates, PEER, FLOOR, AIM)


def _plots(rows: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> Iterator[Plot]:
    for name, key, title in (
        ("connect", "rate", "streams per second"),
        ("connect-late", "end_p99", "milliseconds to the end, p99"),
    ):
        yield Plot(
            name,
            f"streams of {EVENTS} events, all asked for at once",
            "server",
            title,
            {
                f"{streams:,} at once": [
                    (row["server"], row[key])
                    for row in rows
                    if row["streams"] == streams and row[key] is not None
                ]
                for streams in sizes
            },
            kind="bars",
        )


def _notes(found: Mapping[int, Rounds]) -> Iterator[str]:
    for streams, rounds in found.items():
        for note in busy_client(rounds):
            yield f"{streams:,} at once: {note}"
        asked = max(done.asked for each in rounds.values() for done in each)
        yield f"{streams:,} at once: all had been asked for within {asked * 1e3:,.0f} ms"
        if streams > BACKLOG:
            yield (
                f"{streams:,} at once are more than the {BACKLOG:,} that the system keeps for a "
                "server: whoever finds that full tries again after 1 s, and again after 3 s"
            )


SCENARIO = Scenario(
    name="connect",
    summary="1,000 and 5,000 new streams at one instant: streams per second, and how late.",
    measure=measure,
    cap=600,
)
