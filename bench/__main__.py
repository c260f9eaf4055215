"""`python -m bench`: lists what can be measured; `python -m bench SCENARIO...` measures it.

Knows: the command line, which scenarios there are, the order of things, what becomes of an error
and of an interruption. Must never know what a scenario measures.

Progress goes to stderr, a line per measurement; what was found goes to stdout, when a scenario has
ended, and to the files asked for. Exit codes: 1 for a problem (with --check also for a missed
target), 2 for a bad command line, 130 for an interruption.
"""

import difflib
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import attrs
import click
import trio

from . import measuring, servers
from .report import Outcome, facts, summed_up, told
from .scenario import Bench, Result, Scenario

BUSY = 0.2  # share of the cores that others may have before a note says so
SAMPLE = 0.25  # seconds for which that is looked at
INTERRUPTED = 128 + signal.SIGINT  # what a shell says of a program that SIGINT ended
VERSIONS = (("node", "--version"), ("go", "version"))  # of what peers are written in


@attrs.frozen
class Entry:
    """A scenario that can be asked for.

    Attributes:
        load: Imports it.
        typical: Seconds that it takes at full size, with all servers, on a machine of two cores.
    """

    load: Callable[[], Scenario]
    typical: float


Catalogue = Mapping[str, Entry]


def _load(name: str) -> Scenario:
    return importlib.import_module(f"bench.scenarios.{name}").SCENARIO


CATALOGUE: Catalogue = {
    name: Entry(partial(_load, name), typical)
    for name, typical in (
        ("start", 60),
        ("saturate", 60),
        ("fanout", 120),
        ("relay", 300),
        ("cadence", 120),
        ("idle", 120),
        ("connect", 60),
        ("disconnect", 120),
        ("leak", 120),
        ("drain", 60),
        ("reconnect", 60),
        ("stalled", 120),
    )
}


@attrs.define(eq=False)
class Progress:
    """What is said while a scenario runs: a line whenever something was measured.

    On a terminal a last line shows how long it has taken so far; it is rewritten, and wiped in the
    end. A file never sees it.
    """

    name: str
    typical: float | None
    stream: TextIO
    lines: list[str] = attrs.field(factory=list)
    _started: float = attrs.field(factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self.wipe()
        print(f"{self.name} {self.seconds:6.1f} s  {line}".rstrip(), file=self.stream, flush=True)

    def wipe(self) -> None:
        """Take the status away."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")  # erase to the end of the line
            self.stream.flush()

    async def keep_status(self) -> None:
        """Show the status once per second, until cancelled."""
        while self.stream.isatty():
            usual = f", typically {_duration(self.typical)}" if self.typical else ""
            text = f"{self.name} {self.seconds:6.0f} s{usual} ..."
            self.wipe()
            self.stream.write(text[: shutil.get_terminal_size().columns - 1])
            self.stream.flush()
            await trio.sleep(1)  # noqa: ASYNC110 -- a clock's hand, no condition
        await trio.lowlevel.checkpoint()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[SCENARIO]...")
@click.option("--quick", is_flag=True, help="See that it works: seconds each; judges no figures.")
@click.option(
    "--only", multiple=True, metavar="SERVER", help="Measure this server; may be repeated."
)
@click.option("--check", is_flag=True, help="Exit code 1 for a missed target, too.")
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Where to write all figures.",
)
@click.option(
    "--plots",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to draw them, as SVG and PNG.",
)
@click.pass_context
def main(
    context: click.Context,
    *,
    names: tuple[str, ...],
    quick: bool,
    only: tuple[str, ...],
    check: bool,
    file: Path | None,
    folder: Path | None,
) -> None:
    """Measure agentsse beside others, in one run on one machine.

    Without arguments it lists the scenarios; `all` stands for each of them.
    """
    catalogue: Catalogue = context.obj or CATALOGUE  # a test brings its own
    if not names:
        if quick or only or check or file or folder:
            raise click.UsageError(f"expected a scenario: {', '.join(catalogue)}, or all")
        raise SystemExit(_list(catalogue))
    wanted = _wanted(names, catalogue)
    _check_servers(only)
    _check_files(file, folder)
    bench = Bench(quick, tuple(dict.fromkeys(only)), measuring.Cores.choose(), lambda _line: None)
    document = _opening(bench, wanted, check=check)
    for note in document["notes"]:
        _show(f"note: {note}")
    outcomes: list[Outcome] = []
    for name in wanted:
        outcome = _measured(name, catalogue[name], bench)
        if folder is not None:
            outcome = _drawn(outcome, folder)
        outcomes.append(outcome)
        document["scenarios"][name] = facts(outcome)
        if file is not None:  # now, for what comes next may take its time or fail
            file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        for line in told(outcome):
            _show(line)
        if outcome.is_interrupted:
            break
    if len(wanted) > 1:
        print()
        for line in summed_up(outcomes):
            _show(line)
    raise SystemExit(_exit_code(outcomes, check=check))


def _exit_code(outcomes: Sequence[Outcome], *, check: bool) -> int:
    if any(outcome.is_interrupted for outcome in outcomes):
        return INTERRUPTED
    return int(any(outcome.problems or (check and outcome.missed) for outcome in outcomes))


def _show(line: str) -> None:
    """Print a line; red, on a terminal, if it says that something is wrong."""
    is_wrong = "FAILED: " in line or "MISSED" in line
    click.echo(click.style(line, fg="red") if is_wrong else line)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# -- what is asked for -----------------------------------------------------------------------------


def _list(catalogue: Catalogue) -> int:
    """Print which scenarios and servers there are; 1 if one of them cannot be loaded."""
    code = 0
    width = max(map(len, catalogue))
    print("Scenarios, and how long they take (with --quick: seconds):\n")
    for name, entry in catalogue.items():
        try:
            summary = entry.load().summary
        except Exception as error:  # noqa: BLE001 -- whatever its module does wrong
            summary = f"FAILED: cannot be loaded: {_brief(error)}"
            code = 1
        _show(f"  {name:{width}}  {_duration(entry.typical):>6}  {summary}")
    print("\nServers:\n")
    width = max(len(server.name) for server in servers.SERVERS)
    for server in servers.SERVERS:
        reason = servers.why_not(server)
        print(f"  {server.name:{width}}  {f'left out: {reason}' if reason else 'can run'}")
    print(
        "\npython -m bench SCENARIO... [--quick] [--json FILE] [--plots DIR]; all for each of them"
    )
    return code


def _wanted(names: Sequence[str], catalogue: Catalogue) -> list[str]:
    """The scenarios that are asked for, each once."""
    wanted: dict[str, None] = {}
    for name in names:
        if name != "all" and name not in catalogue:
            _refuse("scenario", name, [*catalogue, "all"])
        wanted |= dict.fromkeys(catalogue if name == "all" else [name])
    return list(wanted)


def _check_servers(only: Sequence[str]) -> None:
    by_name = {server.name: server for server in servers.SERVERS}
    for name in only:
        if name not in by_name:
            _refuse("server", name, list(by_name))
    reasons = [servers.why_not(by_name[name]) for name in only]
    if only and None not in reasons:
        raise click.UsageError(
            f"expected a server that can run here, got {', '.join(map(str, reasons))}"
        )


def _refuse(what: str, name: str, known: Sequence[str]) -> NoReturn:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise click.UsageError(f"no {what} {name!r}; there are: {', '.join(known)}.{hint}")


def _check_files(file: Path | None, folder: Path | None) -> None:
    """Find out now what would be a pity to find out in the end."""
    if file is not None and not file.absolute().parent.is_dir():
        raise click.UsageError(f"--json: expected a file in a folder, got no folder {file.parent}")
    if folder is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise click.UsageError("--plots needs matplotlib: install agentsse[bench]")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.UsageError(f"--plots: expected a folder: {error}") from None


# -- what is measured on ---------------------------------------------------------------------------


def _opening(bench: Bench, wanted: Sequence[str], *, check: bool) -> dict[str, Any]:
    """The document before anything was measured: when, where, what for."""
    busy = _busy(SAMPLE)
    notes = []
    if busy is not None and busy > BUSY:
        notes.append(
            f"others had {busy:.0%} of the cores before the start: "
            "figures are worse and less steady than on a quiet machine"
        )
    if bench.cores.server is None:
        notes.append("servers and clients share their cores: figures include the client's work")
    modules = {name.partition(".")[0] for one in servers.SERVERS for name in one.modules}
    return {
        "what": "python -m bench",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": {
            "scenarios": list(wanted),
            "quick": bench.quick,
            "only": list(bench.only),
            "check": check,
        },
        "machine": measuring.machine(*sorted(modules))
        | {
            "processor": _processor(),
            "runtimes": {" ".join(command): _printed(*command) for command in VERSIONS},
            "commit": _printed("git", "describe", "--always", "--dirty"),
            "cores_used": attrs.asdict(bench.cores),
            "descriptors": measuring.raise_descriptors(),
            "busy_before": busy,
        },
        "servers": {one.name: servers.why_not(one) or "can run" for one in servers.SERVERS},
        "notes": notes,
        "scenarios": {},
    }


def _printed(*command: str) -> str | None:
    """What a program prints; None where it cannot be run."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, cwd=measuring.CHECKOUT, check=True, timeout=10
        )
        return done.stdout.decode(errors="replace").strip()
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def _busy(seconds: float) -> float | None:
    """The share of all cores that was not idle for some seconds; None where nobody counts."""
    before = _ticks()
    if before is None:
        with suppress(AttributeError, OSError):
            return os.getloadavg()[0] / (os.cpu_count() or 1)
        return None
    time.sleep(seconds)
    idle, total = (now - then for now, then in zip(_ticks() or before, before, strict=True))
    return round(1 - idle / total, 3) if total else None


def _ticks() -> tuple[int, int] | None:
    """Idle and all time of all cores so far, as in the first line of /proc/stat; see proc(5)."""
    with suppress(OSError):
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
        waited = idle + iowait
        return waited, waited + user + nice + system + irq + softirq + steal
    return None


# -- measuring -------------------------------------------------------------------------------------


def _measured(name: str, entry: Entry, bench: Bench) -> Outcome:
    """Run a scenario to its end, whatever that is."""
    is_usual = not (bench.quick or bench.only)
    progress = Progress(name, entry.typical if is_usual else None, sys.stderr)
    summary, result, is_interrupted = "", None, False
    try:
        scenario = entry.load()
        summary = scenario.summary
        print(f"\n{name}: {summary}", file=sys.stderr, flush=True)
        result, failure, is_interrupted = trio.run(_supervise, scenario, bench, progress)
    except Exception as error:  # noqa: BLE001 -- told below; the others still have their turn
        failure = _brief(error)
        traceback.print_exception(error)
    if result is not None and bench.quick:
        result = attrs.evolve(result, targets=())
    return Outcome(
        name,
        summary,
        progress.seconds,
        result,
        failure=failure,
        is_interrupted=is_interrupted,
        progress=tuple(progress.lines),
    )


async def _supervise(
    scenario: Scenario, bench: Bench, progress: Progress
) -> tuple[Result | None, str | None, bool]:
    """Measure until that has an end, its time is up, or somebody interrupts.

    Returns:
        What was found; why nothing was; whether somebody interrupted.
    """
    result = failure = None
    interruption = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_signal, signals, interruption, progress)
            nursery.start_soon(progress.keep_status)
            try:
                with interruption, trio.move_on_after(scenario.cap) as cap:
                    result = await scenario.measure(attrs.evolve(bench, progress=progress))
                if cap.cancelled_caught:
                    failure = f"expected an end within {scenario.cap:g} s"
            except Exception as error:  # noqa: BLE001 -- told; the others still have their turn
                # A client that got the signal too may fail before it is cancelled: no news.
                if not interruption.cancel_called:
                    failure = _brief(error)
                    progress.wipe()
                    traceback.print_exception(error)
            nursery.cancel_scope.cancel()
    progress.wipe()
    return result, failure, interruption.cancel_called


async def _cancel_at_signal(
    signals: AsyncIterator[int], scope: trio.CancelScope, progress: Progress
) -> None:
    """Cancel when the process is told to end; all further signals wait until that is done."""
    async for _ in signals:
        if not scope.cancel_called:
            progress("interrupted: ends what was started")
            scope.cancel()


def _brief(error: BaseException) -> str:
    """An error, or those of a group, in a line."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_brief, error.exceptions))
    return f"{type(error).__name__}: {error}"


# -- pictures --------------------------------------------------------------------------------------


def _drawn(outcome: Outcome, folder: Path) -> Outcome:
    """Draw a scenario's plots, each as two files; what cannot be drawn is a problem of it."""
    from . import plots  # noqa: PLC0415 -- matplotlib takes a second, and is not always there

    if outcome.result is None:
        return outcome
    names = [server.name for server in servers.SERVERS]
    problems = list(outcome.result.problems)
    for plot in outcome.result.plots:
        try:
            for path in plots.draw(plot, folder, names):
                print(f"drawn: {path}", file=sys.stderr)
        except Exception as error:  # noqa: BLE001 -- the figures are worth more than a picture
            problems.append(f"expected a picture of {plot.name}, got {_brief(error)}")
            traceback.print_exception(error)
    return attrs.evolve(outcome, result=attrs.evolve(outcome.result, problems=problems))


if __name__ == "__main__":
    main(prog_name="python -m bench")
