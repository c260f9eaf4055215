"""The command line: `agentsse serve`, `run`, `check` and `version`.

Knows: words for people, exit codes, and where agents come from. Must never know how anything is
done. What is heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    import trio

    from .agents import Agent
    from .config import Settings
    from .events import AnyEvent, InputRequested, RunFinished
    from .runs import Run
    from .server import Server

EXIT_CODES = {"success": 0, "error": 1, "cancelled": 3, "interrupted": 4}
EXIT_CONFIG = 2  # as click has it for usage
EXIT_SIGINT = 130  # what shells expect of a program that ^C has ended
SHOWN = 300  # characters of a tool's arguments or result that a terminal is shown

# Reports that somebody should look at; all others are news.
_ERRORS = {"crash", "connection_crashed", "app_crashed", "run_outlived_drain"}
_WARNINGS = {"run_overdue", "descriptor_limit", "socket_options_lacking", "lifespan_unsupported"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agentsse", message="agentsse %(version)s")
def main() -> None:
    """Run AI agents, and stream what they do over Server-Sent Events."""


_source = click.argument("agents", required=False)
_config = click.option(
    "--config", type=click.Path(path_type=Path), help="A TOML file with settings and agents."
)
_folder = click.option(
    "--folder", type=click.Path(path_type=Path),
    help="What the built-in guide reads: a folder of text files, or one. [default: our README]",
)  # fmt: skip


@main.command()
@_source
@_config
@click.option("--host", help="Address of loopback to listen on. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 for a free one. [default: 8080]")
@_folder
@click.option("--drain", type=float, help="Seconds from SIGTERM to the end. [default: 30]")
def serve(agents: str | None, **options: Any) -> None:
    """Serve AGENTS: a file such as agents.py, or module:object. Without any, the built-in guide.

    SIGTERM or Ctrl-C lets runs end within --drain seconds; a second one ends at once.
    """
    import trio

    from .errors import ConfigError
    from .server import serve as serve_until_signal

    try:
        settings, served = _load(agents, **options)
        writer = LogWriter()
        report = _reporter(settings.server.log, writer)
        try:
            code = trio.run(
                lambda: serve_until_signal(
                    served, settings, report=report, announce=_announce, flush=writer.close
                )
            )
        finally:
            writer.close()
    except* ConfigError as group:
        _refuse(group)
    sys.exit(code)


@main.command()
@click.argument("agent")
@click.argument("input")
@click.option("--agents", help="Where the agent is: a file such as agents.py, or module:object.")
@_config
@_folder
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON.")
def run(agent: str, input: str, agents: str | None, *, as_json: bool, **options: Any) -> None:
    """Run AGENT on INPUT here, without a server, and print what it does.

    INPUT is text; where it begins with { or [ it is JSON, and - reads it from standard input. The
    exit code is 0 for success, 1 for an error, 3 if cancelled, 4 if a question stayed open, and 130
    after Ctrl-C, which cancels the run and prints its receipt.
    """
    import trio

    from .errors import AgentsseError

    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  # until the process ends
    if sys.stdout is None:  # closed by whoever started this; the run is what counts
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # until the process ends
    try:
        settings, known = _load(agents, **options)
        code = trio.run(_run, known, settings, agent, _read_input(input), as_json)
    except* AgentsseError as group:
        _refuse(group)
    sys.exit(code)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--agents", "source", metavar="SOURCE", help="What is to be served with it.")
def check(file: Path, source: str | None) -> None:
    """Check a configuration FILE, and the agents and tools that it names, without starting."""
    from .errors import ConfigError

    try:
        settings, agents = _load(source, config=file)
    except* ConfigError as group:
        _refuse(group)
    names = ", ".join(agent.name for agent in agents)
    click.echo(f"ok: {file}: http://{settings.server.host}:{settings.server.port}, agents: {names}")


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"agentsse {_version()}")


def _version() -> str:
    from importlib.metadata import version as installed

    return installed("agentsse")


def _load(
    agents: str | None, *, config: Path | None = None, **overrides: Any
) -> "tuple[Settings, list[Agent]]":
    from .config import load
    from .server import check_settings, make_agents

    folder = overrides.pop("folder", None)
    settings = load(config, os.environ, folder=None if folder is None else str(folder), **overrides)
    found = make_agents(settings, agents)
    check_settings(settings, found)
    return settings, found


def _read_input(text: str) -> Any:
    from .errors import BadRequest

    if text == "-":
        text = sys.stdin.read()
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRequest(f"INPUT: expected JSON behind {text[:1]!r}: {error}") from error


def _refuse(group: BaseExceptionGroup[Any]) -> NoReturn:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            _refuse(error)
        click.echo(f"agentsse: {error}", err=True)
    sys.exit(EXIT_CONFIG)


def _announce(server: "Server") -> None:
    url, names = server.urls[0], list(server.runs.agents)
    shipped = names == ["guide"] and "README.md" in server.runs.agents["guide"].description
    question = "How do I resume a stream?" if shipped else "..."
    body = json.dumps({"input": question})
    with suppress(OSError):  # a full disk, a closed pipe: no reason not to serve
        click.echo(f"agentsse {_version()} listens on {', '.join(server.urls)}")
        click.echo(f"agents: {', '.join(names)}")
        click.echo(
            f"try: curl -N -H 'Accept: text/event-stream' -d '{body}' {url}/agents/{names[0]}/runs"
        )


class LogWriter:
    """Writes lines to standard error from a thread: a log that nobody reads holds nobody up.

    At most 10,000 lines wait; those beyond are dropped, and counted in the next one that is not.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(10_000)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Hand over a line; never blocks."""
        if self._dropped and not self._lines.full():
            line, self._dropped = f"{line}\n({self._dropped} lines were dropped)", 0
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, for a second at most."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(1.0)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if sys.stderr is not None:  # else `print` would take standard output for it
                with suppress(OSError, ValueError):  # closed, or full
                    print(line, file=sys.stderr, flush=True)


def _reporter(form: str | None, writer: LogWriter) -> Callable[..., None]:
    """Make what writes the log: a line per report, on the console or as JSON."""
    import structlog

    colors = sys.stderr is not None and sys.stderr.isatty()
    render: Any = structlog.processors.JSONRenderer()
    if form == "console" or (form is None and colors):
        render = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)

    def report(event: str, **facts: Any) -> None:
        is_warning = event in _WARNINGS or facts.get("outcome") == "error"
        level = "error" if event in _ERRORS else "warning" if is_warning else "info"
        writer.put(
            render(None, level, stamp(None, level, {"level": level, "event": event} | facts))
        )

    return report


# agentsse run


async def _run(
    agents: "list[Agent]",
    settings: "Settings",
    name: str,
    input: Any,
    as_json: bool,  # noqa: FBT001
) -> int:
    import signal

    import trio

    from .dialects import Start
    from .runs import open_runs
    from .server import make_limits, make_providers

    def report(event: str, **facts: Any) -> None:
        if event in _ERRORS | _WARNINGS:
            click.echo(f"{event}: {facts.pop('traceback', '') or facts}", err=True)

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_runs(
            {agent.name: agent for agent in agents},
            limits=make_limits(settings),
            providers=make_providers(
                settings, {wanted for agent in agents for wanted in agent.wanted_providers}
            ),
            report=report,
        ) as runs:
            run, _ = runs.start(Start(agent=name, input=input, delivery="stream"), default="cancel")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_signal, run, signals)
                try:
                    await _print(run, nursery, as_json=as_json)
                except OSError as error:  # `| head`: the reader has left; or the disk is full
                    if not isinstance(error, BrokenPipeError):
                        click.echo(f"agentsse: cannot print: {error.strerror}", err=True)
                    run.cancel("disconnect")
                    await run.done.wait()
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                nursery.cancel_scope.cancel()
    assert run.end is not None
    if run.end.receipt.cause == "client_cancel":
        return EXIT_SIGINT
    return EXIT_CODES[run.end.outcome]


async def _cancel_on_signal(run: "Run", signals: AsyncIterator[int]) -> None:
    await anext(signals)
    run.cancel("client_cancel")
    await anext(signals)
    os._exit(EXIT_SIGINT)


async def _print(run: "Run", nursery: "trio.Nursery", *, as_json: bool) -> None:
    """Print a run until its end; what it asks is answered by lines of standard input."""
    from .log import START

    encoder = JsonLines() if as_json else Transcript(colors=sys.stdout.isatty())
    reader = run.attach("terminal", lambda: encoder, START)
    asked: set[str] = set()
    while not reader.is_finished:
        sys.stdout.buffer.write(reader.take())
        sys.stdout.buffer.flush()
        for request_id, request in run.context.asked.items():
            if request_id not in asked:
                asked.add(request_id)
                nursery.start_soon(_answer, run, request.event)
        if not reader.is_behind and not reader.is_finished:
            await reader.wait()


async def _answer(run: "Run", request: "InputRequested") -> None:
    import trio

    from .errors import AgentsseError

    while request.request_id in run.context.asked:
        answers: dict[str, Any] = {}
        for question in request.questions:
            click.echo("> ", nl=False, err=True)
            line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
            if not line and sys.stdin.isatty():  # Ctrl-D: whoever sits there does not want to
                run.cancel("client_cancel")
                return
            if not line:
                click.echo("nobody can answer: standard input has ended", err=True)
                run.cancel("input_timeout")
                return
            agreed = line.strip().lower() in ("y", "yes")
            answers[question.id] = agreed if question.kind == "confirm" else line.strip()
        try:
            run.context.answer(request.request_id, answers)
        except AgentsseError as error:
            click.echo(error.message, err=True)
        else:
            return


class JsonLines:
    """Events as lines of JSON."""

    def feed(self, event: "AnyEvent") -> tuple[bytes, ...]:
        """Make the one line of an event."""
        from .events import encode_event

        return (encode_event(event) + b"\n",)


class Transcript:
    """Events as a person likes to read them: text as it comes, all else a line each."""

    def __init__(self, *, colors: bool) -> None:
        self._colors = colors
        self._in_text = self._has_text = False

    def feed(self, event: "AnyEvent") -> tuple[bytes, ...]:
        """Make what an event adds."""
        return (self._told(event).encode(),)

    def _told(self, event: "AnyEvent") -> str:
        from msgspec import UNSET

        from . import events

        match event:
            case events.PartDelta(kind="text" | "refusal"):
                self._in_text, self._has_text = not event.delta.endswith("\n"), True
                return event.delta
            case events.RunStarted():
                return self._line(f"run {event.run_id} of {event.agent}", fg="bright_black")
            case events.StepStarted():
                return self._line(f"step {event.name}", fg="bright_black")
            case events.StepFinished() if event.error is not None:
                return self._line(f"step {event.name}: {event.error.message}", fg="red")
            case events.PartFinished(kind="reasoning"):
                return self._line(f"  {event.text}", fg="bright_black")
            case events.ToolStarted():
                return self._line(f"  {event.name} {_short(event.arguments)}", fg="cyan")
            case events.ToolFinished():
                mark, color = ("failed", "red") if event.is_error else ("gave", "green")
                return self._line(f"  {event.name} {mark} {_short(event.result)}", fg=color)
            case events.AgentStarted():
                own = "" if event.child_run_id is None else f" as run {event.child_run_id}"
                return self._line(f"  agent {event.agent}{own}", fg="cyan")
            case events.Custom():
                return self._line(f"  {event.name} {_short(event.value)}", fg="bright_black")
            case events.InputRequested():
                lines = [self._line(f"? {_asked(question)}", fg="yellow") for question in
                         event.questions]  # fmt: skip
                return "".join(lines)
            case events.Retry():
                return self._line(f"  again in {event.delay_s:g} s: {event.error.message}")
            case events.RunFinished():
                # Who has said nothing has its result to show.
                said = "" if self._has_text or event.result in (UNSET, events.NULL) else (
                    self._line(events.text_of_json(event.result))
                )  # fmt: skip
                return said + self._line(_receipt(event), fg="green" if event.outcome == "success"
                                  else "red")  # fmt: skip
            case _:
                return ""

    def _line(self, text: str, fg: str | None = None) -> str:
        lead = "\n" if self._in_text else ""
        self._in_text = False
        return lead + (click.style(text, fg=fg) if self._colors else text) + "\n"


def _short(value: Any) -> str:
    text = bytes(value).decode()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _asked(question: Any) -> str:
    match question.kind:
        case "confirm":
            return f"{question.prompt} (yes or no)"
        case "choice":
            return f"{question.prompt} ({', '.join(option.id for option in question.options)})"
        case _:
            return str(question.prompt)


def _receipt(end: "RunFinished") -> str:
    receipt = end.receipt
    told: list[str] = [end.outcome]
    if end.error is not None:
        told.append(end.error.message)
    if receipt.cause is not None:
        told.append(
            f"cause {receipt.cause}, gone in {receipt.seconds:.3f} s, tasks joined: {receipt.tasks}"
        )
    if receipt.threads_abandoned:
        told.append(f"{receipt.threads_abandoned} threads abandoned")
    return ": ".join(told)
