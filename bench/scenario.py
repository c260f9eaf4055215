"""What a scenario is and what it finds: figures, tables, plots, targets.

Knows: how figures are shown and judged. Must never know how one is measured.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from .measuring import Cores


@attrs.frozen
class Bench:
    """What a scenario is given.

    Attributes:
        quick: Only see that it works: seconds, few servers, no targets judged.
        only: Names of the servers asked for; empty for all.
        cores: Where servers and clients run.
        progress: Called with a line whenever something has been measured.
    """

    quick: bool
    only: tuple[str, ...]
    cores: Cores
    progress: Callable[[str], object]


@attrs.frozen
class Column:
    """A column of a table: the key in its rows, its head, and how many digits a number has."""

    key: str
    head: str
    digits: int = 1


@attrs.frozen
class Table:
    """Rows of figures; None is a figure that could not be had, a str stands as it is.

    A row holds at least what the columns name; it may hold more, which only the JSON shows.
    """

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]]


@attrs.frozen
class Plot:
    """A picture: lines over numbers, or bars over names.

    Attributes:
        name: Of its file, without suffix.
        series: By name: points (x, y), where x is a number for lines and a name for bars.
        logarithmic: Axes with a logarithmic scale.
        limit: A horizontal line that means something, and what it means.
    """

    name: str
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[Any, float]]]
    kind: Literal["lines", "bars"] = "lines"
    logarithmic: frozenset[Literal["x", "y"]] = frozenset()
    limit: tuple[float, str] | None = None


@attrs.frozen
class Target:
    """A figure, and what it must not be above (or below), and what it should not.

    Attributes:
        floor: What must hold.
        aim: What we would like.
        is_ceiling: Whether both are ceilings; else the figure must not be below them.
    """

    what: str
    value: float | None
    floor: float
    aim: float | None = None
    unit: str = ""
    is_ceiling: bool = True

    def reaches(self, bound: float | None) -> bool | None:
        """Whether a bound is kept; None where there is no bound or no figure."""
        if bound is None or self.value is None:
            return None
        return self.value <= bound if self.is_ceiling else self.value >= bound

    @property
    def is_met(self) -> bool:
        return bool(self.reaches(self.floor))

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.what}: not measured"
        word = "at most" if self.is_ceiling else "at least"
        verdict = "met" if self.is_met else "MISSED"
        text = (
            f"{self.what}: {self.value:.2f}{self.unit}, {word} {self.floor:g}{self.unit}: {verdict}"
        )
        if self.aim is not None:
            reached = "reached" if self.reaches(self.aim) else "not reached"
            text += f" (aim {self.aim:g}{self.unit}: {reached})"
        return text


@attrs.frozen
class Result:
    """What a scenario found.

    Attributes:
        notes: What to think of before believing a figure.
        problems: What was wrong with ours, or with the measurement: exit code 1.
        facts: All figures, for the JSON.
    """

    tables: Sequence[Table]
    targets: Sequence[Target] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()
    facts: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Scenario:
    """One thing that is measured, of every server that can do it.

    Attributes:
        name: As it is asked for.
        summary: A sentence for the list.
        measure: Does it.
        cap: Seconds for everything.
    """

    name: str
    summary: str
    measure: Callable[[Bench], Awaitable[Result]]
    cap: float
