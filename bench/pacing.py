"""What all measurements of paced streams share: how their client is run, and what it found.

Knows: the command line of `bench.clients.paced`, its answer, what makes a figure doubtful, and how
it is shown. Must never know what is asked of a server.
"""

import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import Any, TypeVar

import attrs

from .measuring import Address, answer_of, cpu_clock, memory, shown
from .scenario import Bench, Column
from .servers import OURS

FULL = 0.9  # share of a core above which what runs there may be the bottleneck
CALM = 0.1  # share of the time for which others may have a server's core where a figure counts
KEPT_UP = 0.95  # share of the tokens due that a server delivers if it is not behind for good
UNSTEADY = "expected tokens on all streams in time, got them too late"
DISTURBED = (
    f"others had the server's core for more than {CALM:.0%} of the time; who waits finds more at "
    "once, and looks cheaper where every token is a write"
)
AT_ITS_END = "the server's core was full; it could not do more"
BUSY_BESIDE = "the core beside the server's was full; some of what is late waited there"

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Load:
    """What the client does; see its command line."""

    request: str
    streams: int
    rate: float
    seconds: float
    field: str = "delta"
    end: str = ""
    sample: int = 128
    stalled: int = 0
    tokens: int | None = None
    opening: float
    settle: float
    steady: float | None = None
    lasts: float | None = None
    ends: float | None = None
    least: float | None = None
    leave: bool = False

    def flags(self) -> Iterator[str]:
        """What is given, as arguments."""
        for name, value in attrs.asdict(self).items():
            if value is True:
                yield f"--{name}"
            elif value is not None and value is not False:
                yield f"--{name}={value}"


@attrs.frozen
class Steady:
    """What was found in the part in which nothing opens and nothing ends.

    Attributes:
        tokens: Delivered; of those that do not stall.
        tokens_due: What their rate would come to.
        waited_seconds: For so long the server was ready to run, and others had its core.
        cpu_seconds: By process.
        memory_mib: Of the server, at the begin and at the end.
        sampled: How many streams and tokens the following is about.
        late_ms: p50, p99 and max, from when a token was made.
        late_due_ms: From when it was due.
    """

    seconds: float
    tokens: int
    tokens_due: float
    waited_seconds: float
    cpu_seconds: Mapping[str, float]
    memory_mib: Sequence[float | None]
    sampled: Mapping[str, int]
    late_ms: Mapping[str, float]
    late_due_ms: Mapping[str, float]

    def us_per_token(self, process: str = "server") -> float | None:
        """Processor time; None where the system is mute."""
        cpu = self.cpu_seconds.get(process)
        return None if cpu is None else cpu / self.tokens * 1e6

    def share(self, *processes: str) -> float | None:
        """What share of a core some processes took; None where the system is mute."""
        known = [self.cpu_seconds[name] for name in processes if name in self.cpu_seconds]
        return sum(known) / self.seconds if known else None

    @property
    def waited_share(self) -> float:
        return self.waited_seconds / self.seconds

    @property
    def is_calm(self) -> bool:
        """Whether the server had its core for itself."""
        return self.waited_share <= CALM

    @property
    def delivered(self) -> float:
        """The share of what was due that was delivered."""
        return self.tokens / self.tokens_due

    @property
    def growth(self) -> float | None:
        """MiB that the server has more at the end."""
        begin, end = self.memory_mib
        return None if begin is None or end is None else end - begin

    def doubts(self) -> Iterator[str]:
        """What to think of before believing the figures."""
        if not self.is_calm:
            yield DISTURBED
        if (self.share("server") or 0) > FULL:
            yield AT_ITS_END
        if (self.share("client", "upstream") or 0) > FULL:
            yield BUSY_BESIDE


@attrs.frozen
class Found:
    """What the client found.

    Attributes:
        failed: How many streams were not as they should be.
        failures: What was wrong with the first ones.
        stalled: By what became of them, as far as the client's system knows: open, closed.
        waited_share: Of all the time: when the server was ready to run, and others had its core.
        slip_ms: How far the maker of tokens was behind its own first one.
        steady: None where not all streams got going in time.
    """

    failed: int
    failures: Sequence[str]
    bytes: int
    stalled: Mapping[str, int]
    waited_share: float
    slip_ms: float
    steady: Steady | None
    memory_mib: Mapping[str, float]

    @property
    def is_calm(self) -> bool:
        """Whether the server had its core for itself."""
        return self.steady.is_calm if self.steady else self.waited_share <= CALM

    @property
    def failure(self) -> str | None:
        """What is wrong, if anything is."""
        if self.failed:
            return f"{self.failed} streams failed: {self.failures[0]}"
        return None if self.steady else UNSTEADY


async def paced(
    load: Load, at: Address, core: int | None, *, beside: Mapping[str, int] | None = None
) -> Found:
    """Run the client.

    Args:
        load: What it does.
        at: Where the server listens.
        core: The client's.
        beside: Process ids, by name, of those whose processor time is of interest, too.
    """
    pids = {"server": at.pid, **(beside or {})}
    clocks = {name: clock for name, pid in pids.items() if (clock := cpu_clock(pid)) is not None}
    command = [
        sys.executable, "-m", "bench.clients.paced",
        f"--host={at.host}", f"--port={at.port}", f"--server={at.pid}",
        f"--clocks={json.dumps(clocks)}",
        *load.flags(),
    ]  # fmt: skip
    answer = await answer_of(command, core)
    steady = answer.pop("steady")
    return Found(
        **answer,
        steady=None if steady is None else Steady(**steady),
        memory_mib=memory(at.pid),
    )


async def calm(
    bench: Bench,
    what: str,
    measure: Callable[[], Awaitable[Found]],
    is_doubtful: Callable[[Found], object] = bool,
) -> Found:
    """Measure; if others had the server's core, and so the figures are doubtful, once more."""
    found = await measure()
    if is_doubtful(found) and not (found.is_calm or bench.quick):
        bench.progress(f"{what}: disturbed; once more")
        found = await measure()
    return found


async def attempt(measure: Callable[[], Awaitable[T]]) -> T | str:
    """Measure a server; if it does not start, breaks or answers wrongly, say so."""
    failure: Any = None
    try:
        return await measure()
    except* (OSError, RuntimeError, ValueError, HTTPException) as group:
        failure = group
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return f"{type(failure).__name__}: {failure}"


# What is shown of it ------------------------------------------------------------------------------

SAID_OF = (
    "lateness counts from when a token was due, of 128 streams spread evenly over all; of the "
    "others tokens are only counted"
)
COLUMNS = (
    Column("us", "us/token", 2),
    Column("p50", "p50 ms"),
    Column("p99", "p99 ms"),
    Column("max", "max ms"),
    Column("share", "core %", 0),
    Column("client", "client %", 0),
    Column("delivered", "came %", 0),
)

Row = dict[str, Any]


def figures(found: Found) -> Row:
    """What was found, for a row with `COLUMNS`, with what was wrong as `remark`."""
    row: Row = dict.fromkeys(column.key for column in COLUMNS)
    row |= {"remark": found.failure or "", "doubts": [], "found": attrs.asdict(found)}
    if (steady := found.steady) is None:
        return row
    shares = {"share": steady.share("server"), "client": steady.share("client")}
    return row | {
        "us": steady.us_per_token(),
        **steady.late_due_ms,
        **{name: share and share * 100 for name, share in shares.items()},
        "delivered": steady.delivered * 100,
        "doubts": list(steady.doubts()),
    }


def line(row: Mapping[str, Any], unit: str) -> str:
    """A row in a line, while others are to come."""
    begin = f"{row['server']:15} {row[unit]:>5} {unit}"
    if row["p99"] is None:
        return f"{begin}  {row['remark']}"
    return (
        f"{begin}{shown(row['us'], 2):>7} us/token  late p50{row['p50']:7.1f} "
        f"p99{row['p99']:7.1f} ms  core{shown(row['share'], 0):>4} %, "
        f"client{shown(row['client'], 0):>4} %  {row['remark']}"
    )


def doubts(rows: Iterable[Row], unit: str) -> Iterator[str]:
    """What to think of before believing the figures of some rows."""
    by_doubt: dict[str, list[str]] = {}
    for row in rows:
        for doubt in row.get("doubts", ()):
            by_doubt.setdefault(doubt, []).append(f"{row['server']} ({row[unit]:,} {unit})")
    for doubt, names in by_doubt.items():
        yield f"{doubt}: {', '.join(names)}"


def problems(rows: Iterable[Row], unit: str) -> Iterator[str]:
    """What was wrong with ours, and was not tried again with less."""
    for row in rows:
        is_ours = row["server"].startswith(OURS.name)
        if is_ours and row["remark"] and row.get("is_last_word", True):
            yield f"{row['server']}, {row.get(unit, '-')} {unit}: {row['remark']}"
