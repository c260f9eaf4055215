"""What is printed and written of what scenarios found: tables, targets, one JSON document.

Knows: how figures look. Must never know how they came about; it does no I/O and reads no clock.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence, Set as AbstractSet
from typing import Any

import attrs

from .scenario import Column, Plot, Result, Table, Target

WIDTH = 110  # letters, from which on the heads of a table are wrapped
Rows = Sequence[Mapping[str, Any]]
GAP = "  "  # between the columns of a table


@attrs.frozen
class Outcome:
    """What became of a scenario.

    Attributes:
        name: The scenario's.
        summary: What it measures.
        seconds: How long it took.
        result: What it found; None where it came to no end.
        failure: Why it came to no end; None where it did, or was interrupted.
        is_interrupted: Whether somebody would not wait; there may be a result all the same.
        progress: What it said on the way.
    """

    name: str
    summary: str
    seconds: float
    result: Result | None = None
    failure: str | None = None
    is_interrupted: bool = False
    progress: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What was wrong, in any way but a missed target."""
        failure = () if self.failure is None else (self.failure,)
        return (*failure, *(self.result.problems if self.result else ()))

    @property
    def targets(self) -> Sequence[Target]:
        return self.result.targets if self.result else ()

    @property
    def missed(self) -> tuple[Target, ...]:
        """Targets whose floor does not hold; what was not measured is not missed."""
        return tuple(target for target in self.targets if target.reaches(target.floor) is False)

    @property
    def state(self) -> str:
        """`finished` (with problems or without), `failed` or `interrupted`."""
        if self.result is not None:
            return "finished"
        return "interrupted" if self.is_interrupted else "failed"


def rendered(table: Table, width: int = WIDTH) -> str:
    """A table as text: words to the left, numbers to the right, heads as high as the width asks."""
    if not table.rows:
        return f"{table.title}\n(nothing was measured)"
    lines = []
    for column, head in zip(table.columns, _heads(table, width), strict=True):
        cells = _cells(column, table.rows)
        most = max(map(len, [*head, *cells]))
        align = str.ljust if _is_text(column, table.rows) else str.rjust
        lines.append([align(cell, most) for cell in [*head, "-" * most, *cells]])
    return "\n".join([table.title, *(GAP.join(line).rstrip() for line in zip(*lines, strict=True))])


def _heads(table: Table, width: int) -> list[list[str]]:
    """The lines of the heads, equally many for all; several only where the table is too wide."""
    least = [max(map(len, _cells(one, table.rows))) for one in table.columns]
    heads: list[list[str]] = []
    for height in range(1, 1 + max([1, *(len(one.head.split()) for one in table.columns)])):
        heads = [
            _wrapped(one.head, height, figures)
            for one, figures in zip(table.columns, least, strict=True)
        ]
        each = (max(figures, *map(len, head)) for head, figures in zip(heads, least, strict=True))
        if sum(each) + len(GAP) * (len(heads) - 1) <= width:
            break
    high = max(map(len, heads))
    return [[""] * (high - len(head)) + head for head in heads]


def _wrapped(head: str, height: int, least: int) -> list[str]:
    """A head in so many lines at most, as narrow as it can be; but for figures of some width."""
    for width in range(max(1, least), len(head) + 1):
        lines = textwrap.wrap(head, width, break_long_words=False)
        if len(lines) <= height and max(map(len, lines)) <= width:
            return lines
    return [head]


def _is_text(column: Column, rows: Rows) -> bool:
    return {type(row.get(column.key)) for row in rows} - {type(None)} == {str}


def _cells(column: Column, rows: Rows) -> list[str]:
    """A column's figures as text; whole numbers have no digits where all are whole."""
    values = [row.get(column.key) for row in rows]
    is_whole = not any(isinstance(value, float) for value in values)
    return [_cell(value, 0 if is_whole else column.digits) for value in values]


def _cell(value: Any, digits: int) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return f"{value:,.{digits}f}" if math.isfinite(value) else "-"
    return str(value)


def told(outcome: Outcome) -> Iterator[str]:
    """What a scenario found, as lines; those of its problems begin with `FAILED: `."""
    if outcome.result is None:
        yield from ("", f"{outcome.name}: {outcome.state} after {outcome.seconds:.0f} s")
        yield from _failures(outcome)
        return
    yield from ("", f"{outcome.name}, {outcome.seconds:.0f} s")
    for table in outcome.result.tables:
        yield from ("", *rendered(table).splitlines())
    said = [
        *(
            textwrap.fill(f"note: {note}", WIDTH, subsequent_indent="      ")
            for note in outcome.result.notes
        ),
        *map(str, outcome.targets),
        *_failures(outcome),
    ]
    yield from ("", *said) if said else ()


def _failures(outcome: Outcome) -> Iterator[str]:
    return (f"FAILED: {problem}" for problem in outcome.problems)


def summed_up(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What remains to be said of several scenarios: what was missed, and what was wrong."""
    for outcome in outcomes:
        for text in (*map(str, outcome.missed), *_failures(outcome)):
            yield f"{outcome.name}: {text}"
    judged = [target for outcome in outcomes for target in outcome.targets]
    missed = sum(len(outcome.missed) for outcome in outcomes)
    unknown = sum(target.value is None for target in judged)
    counts = [
        _count(len(outcomes), "scenario") + f" in {sum(one.seconds for one in outcomes):.0f} s",
        f"{_count(len(judged) - missed - unknown, 'target')} met" if judged else "",
        f"{missed} MISSED" if missed else "",
        f"{unknown} not measured" if unknown else "",
        _count(sum(len(outcome.problems) for outcome in outcomes), "problem"),
    ]
    yield ", ".join(filter(None, counts))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def facts(outcome: Outcome) -> dict[str, Any]:
    """All that a scenario found, for the JSON."""
    result = outcome.result or Result(())
    return plain(
        {
            "summary": outcome.summary,
            "state": outcome.state,
            "seconds": round(outcome.seconds, 3),
            "tables": result.tables,
            "targets": [_judged(target) for target in result.targets],
            "plots": [_drawn(plot) for plot in result.plots],
            "notes": result.notes,
            "problems": outcome.problems,
            "facts": result.facts,
            "progress": outcome.progress,
        }
    )


def _judged(target: Target) -> dict[str, Any]:
    reached = {"met": target.reaches(target.floor), "aim_reached": target.reaches(target.aim)}
    return attrs.asdict(target) | reached


def _drawn(plot: Plot) -> dict[str, Any]:
    limit = plot.limit and dict(zip(("value", "meaning"), plot.limit, strict=True))
    return attrs.asdict(plot, recurse=False) | {"limit": limit}


def plain(value: Any) -> Any:
    """The same in what JSON has: a figure that is no number is null, keys are text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(member) for key, member in value.items()}
        case AbstractSet():
            return sorted(map(plain, value))
        case Sequence():
            return [plain(member) for member in value]
    if attrs.has(type(value)):
        return plain(attrs.asdict(value, recurse=False))
    return str(value)
