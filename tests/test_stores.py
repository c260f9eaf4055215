"""Stores: what is kept of runs that are over, and for how long, held against a simple model."""

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from agentsse.stores.memory import MemoryStore

MAX_RUNS, MAX_BYTES, MAX_AGE = 4, 100, 10.0


def store(**bounds) -> MemoryStore[str]:
    return MemoryStore(
        **{"max_runs": MAX_RUNS, "max_bytes": MAX_BYTES, "max_age": MAX_AGE} | bounds
    )


def fill(store: MemoryStore[str], names: str, *, size: int = 1, now: float = 0.0) -> list[str]:
    """Keep one record per letter, under the letter, and return all that had to go."""
    evicted = []
    for name in names:
        evicted += store.keep(name, name.upper(), size=size, now=now)
    return evicted


def test_an_empty_store_holds_nothing():
    """It finds nothing, expires nothing, and nothing in it is ever due."""
    empty = store()

    assert (0, 0, []) == (len(empty), empty.size, list(empty))
    assert None is empty.find("a")
    assert [] == empty.expire(1e9)
    assert None is empty.next_expiry()


def test_what_is_kept_is_found():
    """By its id, and the newest first."""
    full = store()
    assert [] == fill(full, "abc", size=5)

    assert "B" == full.find("b")
    assert None is full.find("B")
    assert ["C", "B", "A"] == list(full)
    assert (3, 15) == (len(full), full.size)


@pytest.mark.parametrize(
    ("bounds", "size", "evicted", "kept"),
    [
        ({"max_runs": 3}, 1, "AB", "EDC"),
        ({"max_runs": 0}, 1, "ABCD", "E"),
        ({"max_bytes": 30}, 10, "AB", "EDC"),
        ({"max_bytes": 29}, 10, "ABC", "ED"),
        ({"max_bytes": 9}, 10, "ABCD", "E"),
        ({"max_runs": 2, "max_bytes": 30}, 10, "ABC", "ED"),
        ({"max_age": 0.0}, 1, "ABCDE", ""),
        ({"max_runs": 5}, 1, "", "EDCBA"),
    ],
)
def test_the_oldest_make_room(bounds, size, evicted, kept):
    """By count and by bytes; the newest stays whatever its size, unless nothing may stay."""
    full = store(**bounds)

    assert list(evicted) == fill(full, "abcde", size=size)
    assert list(kept) == list(full)
    assert size * len(kept) == full.size


def test_what_is_too_old_goes():
    """At its age, not before; what is asked for next is the oldest of the rest."""
    full = store()
    for now, name in enumerate("abc"):
        fill(full, name, now=float(now))
    assert 10.0 == full.next_expiry()

    assert [] == full.expire(9.9)
    assert ["A"] == full.expire(10.0)
    assert None is full.find("a")
    assert 11.0 == full.next_expiry()
    assert ["B", "C"] == fill(full, "d", now=12.0)
    assert 22.0 == full.next_expiry()


@attrs.define
class Model:
    """The same in the words of its contract: a list, oldest first, looked through every time."""

    kept: list[tuple[str, int, float]] = attrs.field(factory=list)

    def keep(self, run_id: str, size: int, now: float) -> list[str]:
        """Take one in, and let those go that are too many, too large or too old."""
        self.kept.append((run_id, size, now))
        fits = next(
            first
            for first in range(len(self.kept))
            if first == len(self.kept) - 1
            or (
                len(self.kept) - first <= MAX_RUNS
                and sum(size for _, size, _ in self.kept[first:]) <= MAX_BYTES
            )
        )
        out, self.kept = self.kept[:fits], self.kept[fits:]
        return [run_id for run_id, *_ in out] + self.expire(now)

    def expire(self, now: float) -> list[str]:
        """Let go of the old."""
        out = [run_id for run_id, _, since in self.kept if since + MAX_AGE <= now]
        self.kept = [kept for kept in self.kept if kept[0] not in out]
        return out


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(min_value=0, max_value=12),  # seconds until then
            st.one_of(st.none(), st.integers(min_value=0, max_value=120)),  # bytes, or only look
        ),
        max_size=30,
    )
)
def test_the_store_does_what_its_contract_says(steps):
    """Whatever is kept, whenever: the same is evicted, in the same order, and the same is left."""
    real, model, now = store(), Model(), 0.0
    for number, (seconds, size) in enumerate(steps):
        now += seconds
        if size is None:
            assert model.expire(now) == real.expire(now)
        else:
            run_id = str(number)
            assert model.keep(run_id, size, now) == real.keep(run_id, run_id, size=size, now=now)
        ids = [run_id for run_id, *_ in model.kept]
        assert list(reversed(ids)) == list(real)
        assert sum(size for _, size, _ in model.kept) == real.size
        assert len(ids) == len(real)
        assert ids == [real.find(run_id) for run_id in ids]
        assert (model.kept[0][2] + MAX_AGE if model.kept else None) == real.next_expiry()


def test_what_is_dropped_is_gone():
    """It is given back once, and its bytes count no more."""
    full = store()
    fill(full, "abc", size=5)

    assert ("B", None, None) == (full.drop("b"), full.drop("b"), full.find("b"))
    assert (["C", "A"], 10) == (list(full), full.size)
