"""Streams as fast as possible, through all servers in turns.

Knows: how much is streamed, and what is made of the rounds. Must never know what is inside a
server: each is measured from outside, over a socket.

Each server has one process for all rounds, on one core; the client has the other core. The time
runs from the first request to the last byte; connecting is no part of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
from bench.scenario import Bench, Column, Plot, Result, Scenario, Table
from bench.servers import OURS

FULL_SIZE, ROUNDS = Size(streams=100, events=1_000, opened=True, seconds=45), 3
SMOKE = Size(streams=20, events=200, opened=True, seconds=5)
WARM_UP = Size(streams=5, events=50, opened=True, seconds=5)  # imports, code paths, the allocator
SAME_SIZE = 0.1  # how far bytes per event may lie apart

COLUMNS = (
    Column("server", ""),
    Column("rate", "events/s", 0),
    Column("best", "best", 0),
    Column("cpu", "CPU s", 2),
    Column("us", "us/event", 2),
    Column("bytes", "B/event"),
    Column("now", "MiB"),
    Column("peak", "peak"),
    Column("client", "client %", 0),
    Column("failed", "failed"),
)


async def measure(bench: Bench) -> Result:
    size, number = (SMOKE, 1) if bench.quick else (FULL_SIZE, ROUNDS)
    async with side_by_side(bench, "saturate") as line_up:
        for running in line_up.running:
            await load(bench, running, WARM_UP)
        rounds = await in_turns(
            bench, line_up.running, size, number, lambda done: f"{done.event_rate:9,.0f} events/s"
        )
        held = {running.name: memory(running.pid) for running in line_up.running}
    rows = [_row(name, done, held[name]) for name, done in rounds.items()]
    rates = {row["server"]: row["rate"] for row in rows}
    return Result(
        tables=[
            Table(
                f"{size.streams} streams of {size.events:,} events, as fast as possible",
                COLUMNS,
                rows + [_absent(name, why) for name, why in line_up.absent.items()],
            )
        ],
        targets=[]
        if bench.quick
        else [
            at_least("events/s", rates, "node", 0.6, 1.0),
            at_least("events/s", rates, "go", 2.0),
            at_least("events/s", rates, "sse-starlette", 4.0),
        ],
        plots=[
            Plot(
                "saturate",
                f"{size.streams} streams of {size.events:,} events, as fast as possible",
                "server",
                "events per second",
                {"median": [(name, rate) for name, rate in rates.items() if rate is not None]},
                kind="bars",
            )
        ],
        notes=list(_notes(rounds, rows)),
        problems=[f"{OURS.name}: {row['failed']}" for row in rows if _is_bad(row)],
        facts={"rounds": facts_of(rounds), "memory_mib": held, "absent": line_up.absent},
    )


def _row(name: str, rounds: Sequence[Round], held: Mapping[str, float]) -> dict[str, Any]:
    rates = [done.event_rate for done in rounds if not done.failed]
    events = sum(done.events for done in rounds)
    return {
        "server": name,
        "rate": middle(rates),
        "best": max(rates, default=None),
        "cpu": middle(done.server_cpu for done in rounds),
        "us": cpu_us(rounds, events),
        "bytes": sum(done.bytes for done in rounds) / events if events else None,
        "now": held.get("now"),
        "peak": held.get("peak"),
        "client": max(done.client_share for done in rounds) * 100,
        "failed": failure_of(rounds) or "none",
    }


def _absent(name: str, why: str) -> dict[str, Any]:
    return {column.key: None for column in COLUMNS} | {"server": name, "failed": why}


def _is_bad(row: Mapping[str, Any]) -> bool:
    return row["server"] == OURS.name and row["failed"] != "none"


def _notes(
    rounds: Mapping[str, Sequence[Round]], rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    yield from busy_client(rounds)
    sizes = {row["server"]: row["bytes"] for row in rows if row["bytes"] is not None}
    if sizes and max(sizes.values()) > min(sizes.values()) * (1 + SAME_SIZE):
        least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        yield (
            f"events are not of one size: {sizes[least]:.0f} bytes from {least}, "
            f"{sizes[most]:.0f} from {most}; their rates do not quite compare"
        )


SCENARIO = Scenario(
    name="saturate",
    summary="100 streams of 1,000 events each, as fast as possible: events per second and core.",
    measure=measure,
    cap=420,
)
