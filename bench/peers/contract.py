"""What all servers in Python share: what they are asked for, their frames, and their counter.

Knows the contract (bench/README.md). Must never know how a server waits, writes, or learns that a
client has left: that is what is compared, and each does it as its own documentation shows.
"""

import json
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import attrs

TEXT = "The quick brown fox jumps over the dog"  # makes an event of about 209 bytes


@attrs.frozen
class Order:
    """What an agent is to do: events, their distance, silence behind them; seconds.

    Attributes:
        key: Its name for the counter.
        upstream: A port of 127.0.0.1 that it holds a connection to as long as it lives.
        stamp: Whether its events are tokens that hold the time at which they were made.
    """

    events: int
    gap: float = 0
    hold: float = 0
    key: str | None = None
    upstream: int | None = None
    stamp: bool = False

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> "Order":
        """Read the query of a request."""
        return cls(
            events=int(asked["events"]),
            gap=float(asked.get("gap", 0)),
            hold=float(asked.get("hold", 0)),
            key=asked.get("key"),
            upstream=int(asked["upstream"]) if "upstream" in asked else None,
            stamp=bool(int(asked.get("stamp", 0))),
        )

    @property
    def greeting(self) -> bytes:
        """What its upstream is told."""
        return f"{self.key or ''}\n".encode()


@lru_cache(maxsize=1)
def _moment(millisecond: int) -> str:
    """Format a time once per millisecond, as agentsse does: that is not what is compared."""
    whole = datetime.fromtimestamp(millisecond // 1000, UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{millisecond % 1000:03d}Z"


class Events:
    """The events of one run."""

    def __init__(self, order: Order) -> None:
        self.run_id = secrets.token_urlsafe(16)
        self._is_stamped = order.stamp

    def data(self, n: int) -> tuple[str, str]:
        """Make the n-th event, now: its type and its JSON."""
        kind = "part_delta" if self._is_stamped else "custom"
        event: dict[str, Any] = {
            "type": kind,
            "run_id": self.run_id,
            "seq": n,
            "ts": _moment(time.time_ns() // 1_000_000),
        }
        if self._is_stamped:
            event |= {"part_id": "p1", "delta": f"{time.monotonic_ns()};"}
        else:
            event |= {"name": "tick", "value": {"n": n, "text": TEXT}}
        return kind, json.dumps(event, separators=(",", ":"))

    def frame(self, n: int) -> bytes:
        """Make the n-th event, now, as it is sent."""
        kind, data = self.data(n)
        return f"id: {n}\nevent: {kind}\ndata: {data}\n\n".encode()


class Counter:
    """What has become of the agents."""

    def __init__(self) -> None:
        self.started = self.entered = self.gone = 0
        self.times: dict[str, list[int | None]] = {}

    def start(self) -> None:
        """Count an agent that begins."""
        self.started += 1

    def enter(self, key: str | None) -> None:
        """Count an agent that begins to clean up."""
        self.entered += 1
        if key is not None:
            self.times[key] = [time.monotonic_ns(), None]

    def leave(self, key: str | None) -> None:
        """Count an agent that has cleaned up."""
        self.gone += 1
        if key is not None:
            self.times[key][1] = time.monotonic_ns()

    def shown(self, *, tasks: int | None, times: bool) -> dict[str, Any]:
        """Answer a request for the counter; complete times are shown once."""
        shown: dict[str, Any] = {
            "started": self.started,
            "entered": self.entered,
            "gone": self.gone,
            "tasks": tasks,
        }
        if times:
            shown["times"] = self.times
            self.times = {key: both for key, both in self.times.items() if both[1] is None}
        return shown


def announce(host: str, port: int) -> None:
    """Print the address, for whoever has started this server."""
    print(json.dumps({"host": host, "port": port}), flush=True)
