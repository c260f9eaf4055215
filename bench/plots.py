"""Pictures of plots, as SVG and PNG, for a README on white or on dark.

Knows: colours, markers, axes. Must never know what a figure means. It imports matplotlib: import it
only where pictures are asked for.

A server has the same colour and marker in all pictures, ours the one that is seen first. The same
plot gives the same SVG, byte for byte. Nothing is written over a line: names stand below the axes,
the meaning of a limit beside them.
"""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .scenario import Plot

WIDE, HIGH = 8.0, 4.6  # inches
BAR = 0.42  # inches for each of the bars that lie
DOTS = 144  # per inch of the PNG
INK, FAINT = "#222222", "#d9d9d9"  # text; the grid
# After Okabe and Ito, "Color Universal Design" (2008), less the yellow, which is lost on white.
OURS = "#d55e00"
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7a4a1f")
OTHERS = ("#7f7f7f", "#3f3f3f", "#b0b0b0")  # what is no server, as the model that is relayed
MARKERS = "os^DvPX*"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # of variants of a server
HATCHES = ("", "///", "...", "xxx")
SPARSE = 12  # markers on a line with more points than that
FEW = 8  # places on an axis that all get a number, ...
ROOMY = 0.07  # ... if they are so far apart, as a share of the axis
NARROW = 20  # letters in a line beside the axes
ROOM = 14  # bars beside each other whose figures can stand upright

HALO = withStroke(linewidth=2.5, foreground="white")  # around what may cross something

SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.color": "white",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # the same everywhere, whatever fonts there are
    "svg.hashsalt": "agentsse",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@attrs.frozen
class Look:
    """How a series is drawn; `variant` counts the series of one server."""

    colour: str
    marker: str
    is_ours: bool
    variant: int

    @property
    def dashes(self) -> Any:
        return DASHES[self.variant % len(DASHES)]

    @property
    def hatch(self) -> str:
        return HATCHES[self.variant % len(HATCHES)]

    @property
    def weight(self) -> str:
        return "bold" if self.is_ours else "normal"


def draw(plot: Plot, folder: Path, servers: Sequence[str]) -> list[Path]:
    """Write a plot as `NAME.svg` and `NAME.png`.

    Args:
        plot: What to draw; one without a point is not drawn.
        folder: Where to.
        servers: All that there are, always in the same order; the first is ours.

    Returns:
        What was written.
    """
    series = {name: _drawable(plot, points) for name, points in plot.series.items()}
    plot = attrs.evolve(plot, series={name: points for name, points in series.items() if points})
    if not plot.series:
        return []
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own settings are
        mpl.rcParams.update(SETTINGS)
        figure = Figure((WIDE, HIGH), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        axes = figure.subplots()
        axes.set_title(plot.title[:1].upper() + plot.title[1:], wrap=True)
        if plot.kind == "lines":
            _draw_lines(axes, plot, servers)
        else:
            _draw_bars(axes, plot, servers)
        return list(_written(figure, folder / plot.name))


def _written(figure: Figure, stem: Path) -> Iterator[Path]:
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        path = stem.with_name(stem.name + suffix)
        figure.savefig(path, dpi=DOTS, metadata=metadata)
        yield path


def _drawable(plot: Plot, points: Sequence[tuple[Any, float]]) -> list[tuple[Any, float]]:
    """The points that have a place on the axes: there is no zero on a logarithmic one."""
    return [
        (x, y)
        for x, y in points
        if y is not None
        and math.isfinite(y)
        and (y > 0 or "y" not in plot.logarithmic)
        and (plot.kind == "bars" or x > 0 or "x" not in plot.logarithmic)
    ]


# -- who is who ------------------------------------------------------------------------------------


def _server_of(name: str, servers: Sequence[str]) -> int | None:
    """Which server a name speaks of, as in `agentsse 50 ms`; no part of a word is a name."""
    found = [
        server for server in servers if re.search(rf"(?<![\w-]){re.escape(server)}(?![\w-])", name)
    ]
    return servers.index(max(found, key=len)) if found else None


def _looks(names: Sequence[str], servers: Sequence[str]) -> dict[str, Look]:
    """The look of each series; where no server is named, all are figures of ours."""
    counts: Counter[int | None] = Counter()
    looks = {}
    found = [_server_of(name, servers) for name in names]
    if set(found) == {None}:
        found = [0] * len(names)
    for name, which in zip(names, found, strict=True):
        variant = counts[which]
        counts[which] += 1
        if which is None:
            colour, marker = OTHERS[variant % len(OTHERS)], MARKERS[-1 - variant % len(MARKERS)]
        else:
            colour = OURS if which == 0 else COLOURS[(which - 1) % len(COLOURS)]
            marker = MARKERS[which % len(MARKERS)]
        looks[name] = Look(colour, marker, which == 0, variant)
    return looks


# -- lines -----------------------------------------------------------------------------------------


def _draw_lines(axes: Axes, plot: Plot, servers: Sequence[str]) -> None:
    for name, look in _looks(list(plot.series), servers).items():
        xs, ys = zip(*plot.series[name], strict=True)
        axes.plot(
            xs,
            ys,
            label=name,
            color=look.colour,
            linestyle=look.dashes,
            linewidth=3.0 if look.is_ours else 1.6,
            marker=look.marker,
            markersize=9 if look.is_ours else 7,
            markeredgecolor="white",
            markeredgewidth=0.8,
            markevery=1 if len(xs) <= SPARSE else 1 / SPARSE,
            zorder=4 if look.is_ours else 3,
        )
    axes.set_xlabel(_label(plot.x))
    axes.set_ylabel(_label(plot.y))
    axes.grid(visible=True)
    axes.margins(x=0.03)
    widths = [x for points in plot.series.values() for x, _ in points]
    heights = _heights(plot)
    _scale(axes.xaxis, widths, is_logarithmic="x" in plot.logarithmic, is_sampled=True)
    _scale(axes.yaxis, heights, is_logarithmic="y" in plot.logarithmic)
    if plot.limit is not None:
        _draw_limit(axes, *plot.limit)
    if "y" in plot.logarithmic:
        axes.set_ylim(_step(min(heights) * 0.85, -1), _step(max(heights) * 1.1, 1))
    elif min(heights) >= 0:
        axes.set_ylim(0, max(heights) * 1.06 or 1.0)
    _draw_legend(axes)


def _heights(plot: Plot) -> list[float]:
    """All y, and the limit."""
    heights = [y for points in plot.series.values() for _, y in points]
    return heights if plot.limit is None else [*heights, plot.limit[0]]


def _scale(
    axis: Axis, values: Sequence[float], *, is_logarithmic: bool, is_sampled: bool = False
) -> None:
    """Give an axis its scale, and numbers as people write them.

    Args:
        axis: To be scaled.
        values: All that are on it.
        is_logarithmic: What its scale is.
        is_sampled: Whether somebody chose the values; then they are the numbers to show.
    """
    if is_logarithmic:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    places = sorted(set(values))
    if is_sampled and _have_room(places, is_logarithmic=is_logarithmic):
        axis.set_major_locator(FixedLocator(places))
    elif is_logarithmic:
        decades = math.log10(places[-1] / places[0])
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=15))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _have_room(places: Sequence[float], *, is_logarithmic: bool) -> bool:
    """Whether each of these can have its number on the axis."""
    if len(places) > FEW:
        return False
    if is_logarithmic:
        places = [math.log(place) for place in places]
    least = ROOMY * (places[-1] - places[0])
    return all(after - before >= least for before, after in pairwise(places))


def _step(value: float, way: int) -> float:
    """The next of 1, 2, 5, 10 ... below or above a figure."""
    decade = 10.0 ** math.floor(math.log10(value))
    steps = [decade * step for step in (0.5, 1, 2, 5, 10, 20)]
    return next(step for step in steps[::way] if (step - value) * way > 0)


def _draw_limit(axes: Axes, value: float, meaning: str, *, is_upright: bool = False) -> None:
    """A line that means something, with what it means beside the axes."""
    style: dict[str, Any] = {
        "color": INK,
        "linestyle": (0, (6, 3)),
        "linewidth": 1.3,
        "zorder": 2,
        "path_effects": [HALO],
    }
    if is_upright:
        axes.axvline(value, **style)
        place: dict[str, Any] = {
            "xy": (value, 1),
            "xycoords": axes.get_xaxis_transform(),
            "xytext": (0, 3),
            "ha": "center",
            "va": "bottom",
        }
    else:
        axes.axhline(value, **style)
        place = {
            "xy": (1, value),
            "xycoords": axes.get_yaxis_transform(),
            "xytext": (6, 0),
            "ha": "left",
            "va": "center",
        }
        meaning = _wrapped(meaning)
    axes.annotate(meaning, textcoords="offset points", fontsize=9, annotation_clip=False, **place)


def _draw_legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), 90 // (longest + 8)))
    axes.figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        handlelength=3,
        borderaxespad=0.2,
        borderpad=0.2,
    )


# -- bars ------------------------------------------------------------------------------------------


def _draw_bars(axes: Axes, plot: Plot, servers: Sequence[str]) -> None:
    """Bars by server: lying, if there is one each; else beside each other, by name."""
    table = {name: {str(x): y for x, y in points} for name, points in plot.series.items()}
    names = list(dict.fromkeys(x for points in table.values() for x in points))
    is_by_server = any(_server_of(name, servers) is not None for name in table)
    if not is_by_server and all(_server_of(name, servers) is not None for name in names):
        table = {
            name: {x: points[name] for x, points in table.items() if name in points}
            for name in names
        }
        names = list(plot.series)
        plot = attrs.evolve(plot, x="")  # its axis would have been the servers
    if len(names) == 1:
        _draw_lying(axes, plot, {name: of_one[names[0]] for name, of_one in table.items()}, servers)
    else:
        _draw_standing(axes, plot, table, names, servers)


def _draw_lying(
    axes: Axes, plot: Plot, values: Mapping[str, float], servers: Sequence[str]
) -> None:
    looks = _looks(list(values), servers)
    axes.figure.set_figheight(min(HIGH, 1.5 + BAR * len(values)))
    for place, (name, value) in enumerate(values.items()):
        look = looks[name]
        axes.barh(place, value, 0.72, color=look.colour, hatch=look.hatch, linewidth=0)
        _write(axes, (value, place), (4, 0), value, look, ha="left", va="center")
    axes.set_yticks(range(len(values)), list(map(_wrapped, values)))
    for label, look in zip(axes.get_yticklabels(), looks.values(), strict=True):
        label.set_fontweight(look.weight)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()  # the first on top
    axes.set_xlabel(_label(plot.y))
    axes.grid(visible=True, axis="x")
    _scale_bars(axes, plot, is_lying=True)
    if plot.limit is not None:
        _draw_limit(axes, *plot.limit, is_upright=True)
        axes.set_title(axes.get_title(loc="left"), pad=22)


def _draw_standing(
    axes: Axes,
    plot: Plot,
    table: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    servers: Sequence[str],
) -> None:
    width = 0.84 / len(table)
    turned = 0 if len(table) * len(names) <= ROOM else 90
    for nth, (series, look) in enumerate(_looks(list(table), servers).items()):
        shift = (nth - (len(table) - 1) / 2) * width
        values = {place: table[series].get(name) for place, name in enumerate(names)}
        known = {place + shift: value for place, value in values.items() if value is not None}
        axes.bar(
            list(known),
            list(known.values()),
            width * 0.92,
            label=series,
            color=look.colour,
            hatch=look.hatch,
            linewidth=0,
        )
        for place, value in known.items():
            _write(
                axes, (place, value), (0, 3), value, look, ha="center", va="bottom", rotation=turned
            )
    axes.set_xticks(range(len(names)), list(map(_wrapped, names)))
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel(_label(plot.x))
    axes.set_ylabel(_label(plot.y))
    axes.grid(visible=True, axis="y")
    _scale_bars(axes, plot, is_lying=False)
    if plot.limit is not None:
        _draw_limit(axes, *plot.limit)
    _draw_legend(axes)


def _scale_bars(axes: Axes, plot: Plot, *, is_lying: bool) -> None:
    """A bar begins at zero, or where the decade of the smallest does; figures need some room."""
    heights = _heights(plot)
    axis = axes.xaxis if is_lying else axes.yaxis
    is_logarithmic = "y" in plot.logarithmic
    _scale(axis, heights, is_logarithmic=is_logarithmic)
    most = max(heights)
    if is_logarithmic:
        least = 10.0 ** math.floor(math.log10(min(heights) * 0.999))
        bounds = (least, most * (most / least) ** 0.12)
    else:
        bounds = (min(0.0, *heights), most * 1.12 or 1.0)
    axes.set(**{f"{axis.axis_name}lim": bounds})


def _write(
    axes: Axes,
    at: tuple[float, float],
    shift: tuple[float, float],
    value: float,
    look: Look,
    **how: Any,
) -> None:
    """A bar's figure, at its end."""
    axes.annotate(
        _short(value),
        at,
        shift,
        textcoords="offset points",
        fontsize=8.5,
        fontweight=look.weight,
        path_effects=[HALO],
        **how,
    )


def _short(value: float) -> str:
    """About three digits that matter."""
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def _wrapped(text: str) -> str:
    """Words in narrow lines; a figure stays with its unit."""
    return textwrap.fill(re.sub(r"(?<=\d) (?=\w)", "\N{NO-BREAK SPACE}", text), NARROW)


def _label(text: str) -> str:
    return re.sub(r"\bus\b", "\N{MICRO SIGN}s", text)
