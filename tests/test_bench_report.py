"""`python -m bench`: what it prints, writes and draws, and how it ends.

Rules: scenarios of a few lines stand for the real ones; files and processes are real.
"""

import io
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from click.testing import CliRunner, Result as Done

sys.path.append(str(Path(__file__).parent.parent))  # last: what is installed is what is tested

from bench.__main__ import CATALOGUE, Entry, Progress, main
from bench.measuring import listening
from bench.report import Outcome, facts, plain, rendered, summed_up, told
from bench.scenario import (
    Bench,
    Column,
    Plot,
    Result,
    Scenario,
    Table,
    Target,
)

Measure = Callable[[Bench], Awaitable[Result]]
SERVERS = ("agentsse", "aiohttp", "quart-trio", "trio", "node")
TABLE = Table(
    "100 streams",
    (Column("server", "server"), Column("rate", "events/s", 0), Column("cpu", "CPU s", 2)),
    (
        {"server": "agentsse", "rate": 123456.7, "cpu": 1},
        {"server": "aiohttp", "rate": None, "cpu": 2.5, "more": "only in the JSON"},
    ),
)
LINES = Plot(
    "late",
    "How late a token is",
    "readers",
    "ms",
    {"agentsse": [(10, 1.0), (100, 2.0)], "aiohttp": [(10, 0.0), (100, 70.0)]},
    logarithmic=frozenset({"x", "y"}),
    limit=(50.0, "what is promised: 50 ms"),
)
MET = Target("ratio", 1.5, 2.0, aim=1.0, unit="x")
MISSED = Target("p99", 71.0, 70.0, unit=" ms")
UNKNOWN = Target("memory", None, 20.0)


def scenario_of(found: Result, *, cap: float = 10.0) -> Entry:
    """A scenario that finds this."""

    async def measure(bench: Bench) -> Result:
        bench.progress("measured once")
        await trio.lowlevel.checkpoint()
        return found

    return entry(measure, cap=cap)


def entry(measure: Measure, *, cap: float = 10.0) -> Entry:
    return Entry(lambda: Scenario("toy", "A toy.", measure, cap), 5)


def run(catalogue: dict[str, Entry], *arguments: str) -> Done:
    """`python -m bench` with other scenarios."""
    return CliRunner().invoke(main, arguments, obj=catalogue, prog_name="python -m bench")


# -- tables, targets, facts ------------------------------------------------------------------------


def test_a_table_has_words_to_the_left_and_numbers_to_the_right() -> None:
    """Heads, a rule, a `-` for what is not known, the digits that a column wants."""
    expected = """\
100 streams
server    events/s  CPU s
--------  --------  -----
agentsse   123,457   1.00
aiohttp          -   2.50"""

    assert expected == rendered(TABLE)


def test_whole_numbers_have_no_digits_where_all_are_whole() -> None:
    """A text stands as it is; so does a truth; what is no number is not known."""
    columns = (Column("who", "who"), Column("count", "n"), Column("is_ok", "ok"), Column("x", "x"))
    rows = (
        {"who": "a", "count": 1200, "is_ok": True, "x": float("nan")},
        {"who": "b", "count": 7, "is_ok": False, "x": "failed: 3 of 9"},
    )
    expected = """\
t
who      n   ok               x
---  -----  ---  --------------
a    1,200  yes               -
b        7   no  failed: 3 of 9"""

    assert expected == rendered(Table("t", columns, rows))


def test_the_heads_of_a_wide_table_wrap() -> None:
    """As often as the width asks, and never so that a word or a figure is cut."""
    columns = (Column("who", "server"), Column("late", "p99 of what is late in ms", 1))
    table = Table("t", columns, [{"who": "a", "late": 1234.5}])
    once = """\
t
          p99 of what
server  is late in ms
------  -------------
a             1,234.5"""
    narrow = """\
t
         p99 of
        what is
        late in
server       ms
------  -------
a       1,234.5"""

    assert "server  p99 of what is late in ms" == rendered(table, 33).splitlines()[1]
    assert once == rendered(table, 32)
    assert once == rendered(table, 21)
    assert narrow == rendered(table, 15)
    assert narrow == rendered(table, 1)


def test_a_remark_needs_no_head() -> None:
    """It stands to the left, and where there is none, nothing does."""
    columns = (Column("who", "server"), Column("remark", ""))
    rows = [{"who": "a", "remark": ""}, {"who": "b", "remark": "never ended"}]

    assert ["server", "------  -----------", "a", "b       never ended"] == rendered(
        Table("t", columns, rows), 10
    ).splitlines()[1:]
    assert ["server", "------", "a"] == rendered(Table("t", columns, rows[:1])).splitlines()[1:]


def test_a_table_without_rows_says_so() -> None:
    """It has a title all the same."""
    assert "t\n(nothing was measured)" == rendered(Table("t", (Column("a", "a"),), ()))


def test_what_was_found_is_told_in_order() -> None:
    """Tables, notes, targets with their verdicts, problems."""
    found = Result((TABLE,), (MET, MISSED, UNKNOWN), notes=("busy",), problems=("3 streams",))
    expected = [
        "",
        "toy, 2 s",
        "",
        *rendered(TABLE).splitlines(),
        "",
        "note: busy",
        "ratio: 1.50x, at most 2x: met (aim 1x: not reached)",
        "p99: 71.00 ms, at most 70 ms: MISSED",
        "memory: not measured",
        "FAILED: 3 streams",
    ]

    assert expected == list(told(Outcome("toy", "A toy.", 1.6, found)))


def test_a_scenario_without_an_end_is_told_as_such() -> None:
    """It has failed, with a reason; or somebody interrupted it."""
    failed = Outcome("toy", "", 3.2, failure="expected an end within 3 s")
    interrupted = Outcome("toy", "", 0.6, is_interrupted=True)

    assert [
        "",
        "toy: failed after 3 s",
        "FAILED: expected an end within 3 s",
    ] == list(told(failed))
    assert ["", "toy: interrupted after 1 s"] == list(told(interrupted))


def test_the_sum_names_what_was_missed_and_what_was_wrong() -> None:
    """What was not measured is neither met nor missed."""
    outcomes = (
        Outcome("a", "", 60, Result((), (MET, MISSED, UNKNOWN))),
        Outcome("b", "", 3, failure="no end"),
    )

    assert [
        "a: p99: 71.00 ms, at most 70 ms: MISSED",
        "b: FAILED: no end",
        "2 scenarios in 63 s, 1 target met, 1 MISSED, 1 not measured, 1 problem",
    ] == list(summed_up(outcomes))
    assert ["1 scenario in 1 s, 1 target met, 0 problems"] == list(
        summed_up([Outcome("a", "", 1, Result((), (MET,)))])
    )


def test_all_figures_become_plain_json() -> None:
    """Values of classes, sets, tuples, keys that are numbers; no NaN, which JSON does not have."""
    given = {1: (1.5, float("inf")), "s": {"b", "a"}, "p": Path("/x"), "t": Column("k", "h")}

    assert {
        "1": [1.5, None],
        "s": ["a", "b"],
        "p": "/x",
        "t": {"key": "k", "head": "h", "digits": 1},
    } == plain(given)


def test_the_facts_of_a_scenario_survive_json() -> None:
    """Rows whole, verdicts beside the targets, a limit with its meaning, the points."""
    found = Result((TABLE,), (MET, MISSED, UNKNOWN), (LINES,), facts={"deep": {100: [None, 1]}})
    there = facts(Outcome("toy", "A toy.", 1.23456, found, progress=("one",)))
    back = json.loads(json.dumps(there, allow_nan=False))

    assert there == back
    assert ("A toy.", "finished", 1.235) == (back["summary"], back["state"], back["seconds"])
    assert "only in the JSON" == back["tables"][0]["rows"][1]["more"]
    assert [True, False, None] == [target["met"] for target in back["targets"]]
    assert [False, None, None] == [target["aim_reached"] for target in back["targets"]]
    assert {"value": 50.0, "meaning": "what is promised: 50 ms"} == back["plots"][0]["limit"]
    assert [[10, 1.0], [100, 2.0]] == back["plots"][0]["series"]["agentsse"]
    assert ["x", "y"] == back["plots"][0]["logarithmic"]
    assert {"deep": {"100": [None, 1]}} == back["facts"]
    assert ["one"] == back["progress"]


# -- the command -----------------------------------------------------------------------------------


def test_without_arguments_it_lists() -> None:
    """Each scenario with its sentence, each server and whether it can run here."""
    done = run({"toy": scenario_of(Result(()))})

    assert 0 == done.exit_code
    assert "  toy     5 s  A toy.\n" in done.output
    assert "  agentsse       can run\n" in done.output


def test_every_scenario_has_a_name_and_a_sentence() -> None:
    """What the list says is what the modules say; each has an end."""
    for name, one in CATALOGUE.items():
        scenario = one.load()
        assert name == scenario.name
        assert scenario.summary.endswith((".", "?"))
        assert one.typical < scenario.cap


def test_a_scenario_that_cannot_be_loaded_is_an_error() -> None:
    """In the list, and where it is asked for; the others are there all the same."""

    def load() -> Scenario:
        raise ImportError("no such thing")

    catalogue = {"broken": Entry(load, 5), "toy": scenario_of(Result(()))}
    listed = run(catalogue)
    done = run(catalogue, "all")

    assert 1 == listed.exit_code
    assert "FAILED: cannot be loaded: ImportError: no such thing\n" in listed.output
    assert "A toy." in listed.output
    assert 1 == done.exit_code
    assert "broken: FAILED: ImportError: no such thing\n" in done.stdout
    assert "2 scenarios in 0 s, 1 problem\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tyo"], "no scenario 'tyo'; there are: toy, other, all. Did you mean 'toy'?"),
        (["zzz"], "no scenario 'zzz'; there are: toy, other, all.\n"),
        (["--quick"], "expected a scenario: toy, other, or all"),
        (["toy", "--only", "agentse"], "no server 'agentse'; there are: agentsse,"),
        (["toy", "--json", "/nowhere/at/all.json"], "got no folder /nowhere/at"),
        (["toy", "--plots", "/dev/null/x"], "--plots: expected a folder"),
    ],
)
def test_a_bad_command_line_says_what_is_expected(arguments: list[str], expected: str) -> None:
    """Exit code 2, before anything is measured."""
    if "--plots" in arguments:
        pytest.importorskip("matplotlib")
    toy = scenario_of(Result(()))
    done = run({"toy": toy, "other": toy}, *arguments)

    assert 2 == done.exit_code
    assert expected in done.stderr
    assert "measured once" not in done.stderr


@pytest.mark.parametrize(
    ("targets", "problems", "arguments", "expected"),
    [
        ([MET], [], ["--check"], 0),
        ([MISSED], [], [], 0),
        ([MISSED], [], ["--check"], 1),
        ([UNKNOWN], [], ["--check"], 0),
        ([MET], ["3 streams failed"], [], 1),
        ([MISSED], [], ["--check", "--quick"], 0),
    ],
)
def test_the_exit_code_is_1_for_problems_and_where_asked_for_missed_targets(
    targets: list[Target], problems: list[str], arguments: list[str], expected: int
) -> None:
    """What was not measured is not missed; a smoke judges no figures."""
    found = Result((TABLE,), targets, problems=problems)
    done = run({"toy": scenario_of(found)}, "toy", *arguments)

    assert expected == done.exit_code, done.output
    assert rendered(TABLE) in done.stdout
    assert ("MISSED" in done.stdout) == (targets == [MISSED] and "--quick" not in arguments)


def test_progress_goes_to_stderr_and_figures_to_stdout() -> None:
    """A line per measurement, with the time; no control characters in what is no terminal."""
    done = run({"toy": scenario_of(Result((TABLE,)))}, "toy")

    assert "toy    0.0 s  measured once\n" in done.stderr
    assert "measured once" not in done.stdout
    assert "\x1b" not in done.output
    assert "\r" not in done.output


def test_a_later_scenario_that_fails_does_not_take_the_others_along(tmp_path: Path) -> None:
    """The document holds what was found before, what went wrong, and what came after."""

    async def fail(_bench: Bench) -> Result:
        async with trio.open_nursery():
            raise RuntimeError("expected an address, got the end")

    file = tmp_path / "found.json"
    catalogue = {
        "first": scenario_of(Result((TABLE,), facts={"n": 1})),
        "second": entry(fail),
        "third": scenario_of(Result((TABLE,), facts={"n": 3})),
    }
    done = run(catalogue, "all", "first", "--json", str(file))
    document = json.loads(file.read_text())

    assert 1 == done.exit_code
    assert "FAILED: RuntimeError: expected an address, got the end\n" in done.stdout
    assert "Traceback" in done.stderr
    assert "Traceback" not in done.stdout
    assert ["first", "second", "third"] == list(document["scenarios"])
    assert "failed" == document["scenarios"]["second"]["state"]
    assert ["RuntimeError: expected an address, got the end"] == document["scenarios"]["second"][
        "problems"
    ]
    assert 3 == document["scenarios"]["third"]["facts"]["n"]


def test_the_document_says_what_was_measured_on_and_with(tmp_path: Path) -> None:
    """Machine, versions, date, arguments, servers."""
    file = tmp_path / "found.json"
    run(
        {"toy": scenario_of(Result(()))},
        *("toy", "--quick", "--only", "agentsse", "--json", str(file)),
    )
    document = json.loads(file.read_text())

    assert {
        "scenarios": ["toy"],
        "quick": True,
        "only": ["agentsse"],
        "check": False,
    } == document["arguments"]
    assert document["date"].endswith("+00:00")
    assert document["machine"]["versions"]["trio"]
    assert {"node --version", "go version"} == set(document["machine"]["runtimes"])
    assert "can run" == document["servers"]["agentsse"]
    assert ["measured once"] == document["scenarios"]["toy"]["progress"]


def test_a_scenario_that_does_not_end_is_a_problem() -> None:
    """At its cap; the next one has its turn."""

    async def last(_bench: Bench) -> Result:
        await trio.sleep_forever()
        raise AssertionError

    catalogue = {"long": entry(last, cap=0.05), "toy": scenario_of(Result((TABLE,)))}
    done = run(catalogue, "long", "toy")

    assert 1 == done.exit_code
    assert "FAILED: expected an end within 0.05 s" in done.stdout
    assert rendered(TABLE) in done.stdout


def test_what_a_scenario_waits_for_too_long_by_itself_is_not_its_cap() -> None:
    """An inner deadline is told as what it is."""

    async def wait(_bench: Bench) -> Result:
        with trio.fail_after(0.01):
            await trio.sleep_forever()
        raise AssertionError

    done = run({"toy": entry(wait)}, "toy")

    assert 1 == done.exit_code
    assert "FAILED: TooSlowError" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_servers_and_shows_what_there_is(
    tmp_path: Path, number: signal.Signals
) -> None:
    """What was found before stands, the document is written, nothing goes on running."""
    pids = []

    async def hold(bench: Bench) -> Result:
        program = (
            'import signal; print(\'{"host": "127.0.0.1", "port": 1}\', flush=True); signal.pause()'
        )
        async with listening([sys.executable, "-c", program], None) as address:
            pids.append(address.pid)
            bench.progress("a server runs")
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        raise AssertionError

    file = tmp_path / "found.json"
    catalogue = {
        "first": scenario_of(Result((TABLE,))),
        "second": entry(hold),
        "third": scenario_of(Result((TABLE,))),
    }
    done = run(catalogue, "all", "--json", str(file))
    document = json.loads(file.read_text())

    assert 130 == done.exit_code
    assert rendered(TABLE) in done.stdout
    assert "second: interrupted after 0 s\n" in done.stdout
    assert ["first", "second"] == list(document["scenarios"])
    assert "interrupted" == document["scenarios"]["second"]["state"]
    assert "a server runs" == document["scenarios"]["second"]["progress"][0]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interruption_at_the_very_end_keeps_what_was_found() -> None:
    """The figures are there; what would come next does not."""

    async def measure(_bench: Bench) -> Result:
        os.kill(os.getpid(), signal.SIGINT)
        with trio.CancelScope(shield=True):  # as if the last figure came at that moment
            await trio.sleep(0.05)
        return Result((TABLE,))

    toy = scenario_of(Result((), notes=("next",)))
    done = run({"toy": entry(measure), "next": toy}, "toy", "next")

    assert 130 == done.exit_code
    assert rendered(TABLE) in done.stdout
    assert "note: next" not in done.stdout


async def test_a_terminal_has_a_status_that_goes_away() -> None:
    """A line that is rewritten while something is awaited, and wiped before what stays."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    progress = Progress("toy", 60, terminal)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(progress.keep_status)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    progress("measured once")
    wiped = "\r\x1b[K"

    assert (
        f"{wiped}toy      0 s, typically 60 s ...{wiped}toy    0.0 s  measured once\n"
        == terminal.getvalue()
    )


def test_the_real_command_lists_and_refuses() -> None:
    """As it is started: in a process of its own, from the checkout."""
    command = [sys.executable, "-m", "bench", "satuarte"]
    done = subprocess.run(
        command, capture_output=True, cwd=Path(__file__).parent.parent, check=False, timeout=60
    )

    assert 2 == done.returncode
    assert b"Did you mean 'saturate'?" in done.stderr


# -- pictures --------------------------------------------------------------------------------------

BY_SERVER = {name: [("1,000 streams", n + 4.5)] for n, name in enumerate(SERVERS)}
BY_WAY = {
    name: [("FIN", n + 1.0), ("RST", n * 10.0), ("half-close", 0.0)]
    for n, name in enumerate(SERVERS)
}
PLOTS = [
    LINES,
    Plot("smooth", "A line", "x", "y", {"(direct)": [(n, 60 + n % 3) for n in range(100)]}),
    Plot("bars", "Memory", "server", "KiB", BY_SERVER, "bars", limit=(6.0, "at most 6 KiB")),
    Plot("turned", "Memory", "server", "KiB", {"KiB": [("agentsse", 1), ("node", 2)]}, "bars"),
    Plot("ways", "Leaving", "how", "ms", BY_WAY, "bars", frozenset({"y"}), (5.0, "5 ms")),
    Plot(
        "gap", "A gap", "how", "ms", {"agentsse": [("a", 1), ("b", 2)], "x": [("b", None)]}, "bars"
    ),
]


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG; see its specification, 5.2 and 11.2.2."""
    assert b"\x89PNG\r\n\x1a\n" == png[:8]
    assert b"IHDR" == png[12:16]
    return struct.unpack(">II", png[16:24])


def drawn(plot: Plot, folder: Path) -> list[Path]:
    pytest.importorskip("matplotlib")
    from bench.plots import draw

    folder.mkdir(exist_ok=True)
    return draw(plot, folder, SERVERS)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_a_plot_of_each_kind_is_drawn(tmp_path: Path, plot: Plot) -> None:
    """As SVG and as PNG, of a size for a README."""
    svg, png = drawn(plot, tmp_path)
    width, height = size_of(png.read_bytes())

    assert [f"{plot.name}.svg", f"{plot.name}.png"] == [svg.name, png.name]
    assert 1000 < width < 1400
    assert 200 < height < 800
    assert "<svg" in svg.read_text()
    assert "<dc:date>" not in svg.read_text()


def test_the_same_plot_gives_the_same_svg(tmp_path: Path) -> None:
    """Byte for byte, so that a repository changes only where figures do."""
    one, _ = drawn(LINES, tmp_path / "one")
    two, _ = drawn(LINES, tmp_path / "two")

    assert one.read_bytes() == two.read_bytes()


def test_a_plot_without_points_is_not_drawn(tmp_path: Path) -> None:
    """Nor is what has no place on a logarithmic axis."""
    plot = Plot(*("none", "t", "x", "y"), {"agentsse": [(1, 0.0)]}, logarithmic=frozenset({"y"}))

    assert [] == drawn(plot, tmp_path)
    assert [] == drawn(Plot("none", "t", "x", "y", {"agentsse": []}), tmp_path)
    assert [] == list(tmp_path.iterdir())


def test_a_server_has_one_colour_and_marker_in_all_pictures() -> None:
    """Whatever else is drawn; a window of ours is still ours, and no part of a name is a name."""
    pytest.importorskip("matplotlib")
    from bench.plots import OURS, _looks

    few = _looks(["node", "agentsse"], SERVERS)
    many = _looks(["agentsse 50 ms", "agentsse 100 ms", "quart-trio", "trio", "node"], SERVERS)
    colours = [look.colour for look in _looks(SERVERS, SERVERS).values()]
    alone = _looks(["p50", "p99"], SERVERS)
    beside = _looks(["(direct)", "node"], SERVERS)

    assert few["node"] == many["node"]
    assert few["agentsse"] == many["agentsse 50 ms"]
    assert OURS == many["agentsse 100 ms"].colour
    assert many["agentsse 50 ms"].dashes != many["agentsse 100 ms"].dashes
    assert many["quart-trio"].colour != many["trio"].colour
    assert len(colours) == len(set(colours))
    assert {OURS} == {look.colour for look in alone.values()}
    assert beside["(direct)"].colour not in colours


def test_the_command_draws_what_a_scenario_found(tmp_path: Path) -> None:
    """Into a folder that it makes."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "plots"
    done = run({"toy": scenario_of(Result((), plots=(LINES,)))}, "toy", "--plots", str(folder))

    assert 0 == done.exit_code, done.output
    assert {"late.svg", "late.png"} == {path.name for path in folder.iterdir()}


def test_a_picture_that_cannot_be_drawn_takes_no_figures_along(tmp_path: Path) -> None:
    """It is a problem of its scenario, whose figures are told and written."""
    pytest.importorskip("matplotlib")
    bad = Plot("bad", "Words for numbers", "x", "y", {"agentsse": [(1, 1.0), ("a", 2.0)]})
    file = tmp_path / "found.json"
    done = run(
        {"toy": scenario_of(Result((TABLE,), plots=(bad, LINES)))},
        *("toy", "--plots", str(tmp_path), "--json", str(file)),
    )

    assert 1 == done.exit_code
    assert rendered(TABLE) in done.stdout
    assert "FAILED: expected a picture of bad, got " in done.stdout
    assert 1 == len(json.loads(file.read_text())["scenarios"]["toy"]["problems"])
    assert (tmp_path / "late.png").exists()
