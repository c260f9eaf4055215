"""Where finished runs are kept: in memory, within three bounds.

Knows: ids, sizes and ages. Must never know what it keeps. Nothing here awaits: keeping a run is a
dictionary entry, and a reader that still holds an evicted one simply reads on.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

import attrs

T = TypeVar("T")


@attrs.frozen
class _Kept(Generic[T]):
    record: T
    size: int
    since: float


@attrs.define
class MemoryStore(Generic[T]):
    """Finished runs, the oldest out first.

    Attributes:
        max_runs: How many are kept.
        max_bytes: How many bytes they may hold together; the newest is kept whatever its size.
        max_age: Seconds that each is kept.
        size: Bytes held now.
    """

    max_runs: int
    max_bytes: int
    max_age: float
    size: int = 0
    _kept: OrderedDict[str, _Kept[T]] = attrs.field(factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[T]:
        """The newest first."""
        return (kept.record for kept in reversed(self._kept.values()))

    def find(self, run_id: str) -> T | None:
        """What is kept under that id."""
        kept = self._kept.get(run_id)
        return None if kept is None else kept.record

    def keep(self, run_id: str, record: T, *, size: int, now: float) -> list[T]:
        """Keep a record, and give back those that had to make room for it."""
        self._kept[run_id] = _Kept(record, size, now)
        self.size += size
        evicted = []
        while len(self._kept) > 1 and (
            len(self._kept) > self.max_runs or self.size > self.max_bytes
        ):
            evicted.append(self._evict())
        return evicted + self.expire(now)

    def expire(self, now: float) -> list[T]:
        """Give back those whose time is over."""
        evicted = []
        while self._kept and next(iter(self._kept.values())).since + self.max_age <= now:
            evicted.append(self._evict())
        return evicted

    def next_expiry(self) -> float | None:
        """When the oldest one's time is over."""
        return next((kept.since + self.max_age for kept in self._kept.values()), None)

    def drop(self, run_id: str) -> T | None:
        """Give back what is kept under that id, and keep it no longer."""
        kept = self._kept.pop(run_id, None)
        if kept is None:
            return None
        self.size -= kept.size
        return kept.record

    def _evict(self) -> T:
        _, kept = self._kept.popitem(last=False)
        self.size -= kept.size
        return kept.record
