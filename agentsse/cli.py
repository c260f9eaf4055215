"""The command line: `agentsse serve`, `run`, `watch`, `cancel`, `check` and `version`.

Knows: words for people, exit codes, and where agents come from. Must never know how anything is
done. What is heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

import gc
import json
import os
import queue
import re
import shlex
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from . import __version__

if TYPE_CHECKING:
    import trio

    from .agents import Agent
    from .client import Client
    from .config import Settings
    from .events import AnyEvent, InputRequested, Question, RunFinished, RunSnapshot
    from .runs import Run
    from .server import Server

EXIT_CODES = {"success": 0, "error": 1, "cancelled": 3, "interrupted": 4}
EXIT_CONFIG = 2  # as click has it for usage
EXIT_SIGINT = 130  # what shells expect of a program that ^C has ended
EXIT_SIGPIPE = 141  # and of one whose reader has left
SHOWN = 300  # characters of a tool's arguments or result that a terminal is shown

# Reports that somebody should look at; all others are news.
_ERRORS = {"crash", "connection_crashed", "app_crashed", "run_outlived_drain"}
_WARNINGS = {"run_overdue", "descriptor_limit", "socket_options_lacking", "lifespan_unsupported"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="agentsse %(version)s")
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
    gc.disable()  # what is imported stays: to look for garbage in it takes a tenth of the start
    import trio

    from .errors import ConfigError
    from .server import serve as serve_until_signal

    gc.freeze()
    gc.enable()
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

    _have_streams()
    try:
        settings, known = _load(agents, **options)
        code = trio.run(_run, known, settings, agent, _read_input(input), as_json)
    except* AgentsseError as group:
        _refuse(group)
    sys.exit(code)


@main.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON.")
def watch(url: str, *, as_json: bool) -> None:
    """Print what happens at URL, as it happens: of a run, a thread, or a whole server.

    URL is http://HOST:PORT/runs/ID, /threads/ID or /events; ?after=ID begins behind an event,
    ?types= chooses, ?watch=* shows a thread's workers, too. A stream that breaks is resumed.

    The exit code is the run's: 0 for success, 1 for an error, 3 if cancelled, 4 if a question
    stayed open; 2 if it cannot be watched, and 130 after Ctrl-C. Leaving counts as leaving: a run
    whose policy is `cancel` and that nobody else reads is cancelled then.
    """
    import trio

    from .errors import AgentsseError

    _have_streams()
    try:
        code = trio.run(_watch, Place.of(url), as_json)
    except* AgentsseError as group:
        _refuse(group)
    sys.exit(code)


@main.command()
@click.argument("url")
@click.option("--reason", help="Words for whoever reads how it ended.")
def cancel(url: str, reason: str | None) -> None:
    """Cancel the run at URL, http://HOST:PORT/runs/ID, and print its receipt once it is gone.

    The exit code is 0 if it is gone, by this or before; 1 if it was not after 6 seconds; 2 if it
    cannot be cancelled.
    """
    import trio

    from .errors import AgentsseError, BadRequest

    _have_streams()
    try:
        place = Place.of(url)
        if place.run_id is None:
            raise BadRequest(f"expected the URL of a run, such as {EXAMPLE}, got {url[:200]!r}")
        run = trio.run(_cancel, place.server, place.run_id, reason)
    except* AgentsseError as group:
        _refuse(group)
    with suppress(OSError):  # nobody wants to know
        click.echo(_ended(run))
    sys.exit(0 if run.outcome is not None else 1)


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
    click.echo(f"agentsse {__version__}")


def _have_streams() -> None:
    """Have standard streams, where whoever has started this had closed them."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  # until the process ends
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # until the process ends


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
        click.echo(f"agentsse {__version__} listens on {', '.join(server.urls)}")
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
    colors = sys.stderr is not None and sys.stderr.isatty()
    is_for_people = form == "console" or (form is None and colors)
    render = _console(colors=colors) if is_for_people else json.JSONEncoder(default=repr).encode

    def report(event: str, **facts: Any) -> None:
        is_warning = event in _WARNINGS or facts.get("outcome") == "error"
        level = "error" if event in _ERRORS else "warning" if is_warning else "info"
        stamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        writer.put(render({"level": level, "event": event} | facts | {"timestamp": stamp}))

    return report


def _console(*, colors: bool) -> Callable[[dict[str, Any]], str]:
    """Make what shows a report to people: 40 ms and 3 MB, which a service need not pay."""
    import structlog

    show = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)
    return lambda facts: show(None, facts["level"], facts)


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
                except OSError as error:
                    _stop_printing(error)
                    run.cancel("disconnect")
                    await run.done.wait()
                nursery.cancel_scope.cancel()
    assert run.end is not None
    if run.end.receipt.cause == "client_cancel":
        return EXIT_SIGINT
    return EXIT_CODES[run.end.outcome]


def _stop_printing(error: OSError) -> int:
    """Print no more: the reader has left, as `| head` does, or the disk is full; the exit code."""
    if not isinstance(error, BrokenPipeError):
        click.echo(f"agentsse: cannot print: {error.strerror}", err=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_SIGPIPE if isinstance(error, BrokenPipeError) else 1


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
    """Events as a person likes to read them: text as it comes, all else a line each.

    Args:
        colors: It is read at a terminal: with colours, and without what a terminal would obey.
        server: Where what a run asks is answered, and a run's input is worth a line: whoever looks
            on has not given it. None for whoever is asked in person.
    """

    def __init__(self, *, colors: bool, server: str | None = None) -> None:
        self._colors, self._server = colors, server
        self._in_text = False
        self._speaker = ""  # the run whose lines come
        self._said: dict[str, set[str]] = {}  # parts of which there was a delta, by run

    def feed(self, event: "AnyEvent") -> tuple[bytes, ...]:
        """Make what an event adds."""
        return (self._told(event).encode(),)

    def _told(self, event: "AnyEvent") -> str:
        from . import events

        lead = ""
        if event.run_id and event.run_id != self._speaker:
            if self._speaker and not isinstance(event, events.RunStarted):
                lead = self._line(f"run {event.run_id}", fg="bright_black")
            self._speaker = event.run_id
        return lead + self._added(event)

    def _added(self, event: "AnyEvent") -> str:
        from . import events

        match event:
            case events.PartDelta(kind="text" | "refusal"):
                self._said.setdefault(event.run_id, set()).add(event.part_id)
                return self._text(event.delta)
            case events.PartFinished(kind="text" | "refusal"):
                parts = self._said.setdefault(event.run_id, set())
                if event.part_id in parts:
                    return ""
                parts.add(event.part_id)
                return self._text(event.text)
            case events.PartFinished(kind="reasoning"):
                return self._line(f"  {event.text}", fg="bright_black")
            case events.RunStarted():
                line = self._line(f"run {event.run_id} of {event.agent}", fg="bright_black")
                if self._server is not None:
                    line += self._line(f"> {_short(event.input)}", fg="bright_black")
                return line
            case events.RunFinished():
                return self._end(event)
            case events.StepStarted():
                return self._line(f"step {event.name}", fg="bright_black")
            case events.StepFinished() if event.error is not None:
                return self._line(f"step {event.name}: {event.error.message}", fg="red")
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
                lines = [self._line(f"? {_asked(each)}", fg="yellow") for each in event.questions]
                if self._server is not None:
                    command = _answering(self._server, event)
                    lines.append(self._line(f"  {command}", fg="bright_black"))
                return "".join(lines)
            case events.InputReceived():
                return self._line(f"  answered {_short(event.answers)}", fg="yellow")
            case events.MessageReceived():
                return self._line(f"> {event.text}", fg="yellow")
            case events.Retry():
                return self._line(f"  again in {event.delay_s:g} s: {event.error.message}")
            case events.TriggerChanged():
                return self._line(f"  trigger {event.name} {event.change}", fg="cyan")
            case events.Gap():
                return self._line(
                    f"  what was between {event.from_id} and {event.to_id} is not held any more",
                    fg="red",
                )
            case _:
                return ""

    def _end(self, end: "RunFinished") -> str:
        from msgspec import UNSET

        from .events import NULL, text_of_json

        shown = ""
        if not self._said.pop(end.run_id, None) and end.result not in (UNSET, NULL):
            shown = self._line(text_of_json(end.result))  # who has said nothing has that to show
        fg = "green" if end.outcome == "success" else "red"
        return shown + self._line(_ended(end), fg=fg)

    def _text(self, text: str) -> str:
        self._in_text = not text.endswith("\n")
        return self._safe(text)

    def _line(self, text: str, fg: str | None = None) -> str:
        lead = "\n" if self._in_text else ""
        self._in_text = False
        return lead + (click.style(self._safe(text), fg=fg) if self._colors else text) + "\n"

    def _safe(self, text: str) -> str:
        return text.translate(_PICTURES) if self._colors else text


# What a terminal would obey is shown as a picture of it; others may have chosen the words.
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


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


def _ended(end: "RunFinished | RunSnapshot") -> str:
    """How a run has ended, or that it has not."""
    receipt = end.receipt
    if receipt is None:
        return "not gone yet: something in it shields itself; look again"
    told: list[str] = [end.outcome or ""]
    if end.error is not None:
        told.append(end.error.message)
    if receipt.cause is not None:
        told.append(
            f"cause {receipt.cause}, gone in {receipt.seconds:.3f} s, tasks joined: {receipt.tasks}"
        )
    if receipt.threads_abandoned:
        told.append(f"{receipt.threads_abandoned} threads abandoned")
    return ": ".join(told)


# agentsse watch, agentsse cancel

EXAMPLE = "http://127.0.0.1:8080/runs/ID"
_PLACE = re.compile(
    r"(?P<server>.*?)(?:/runs/(?P<run>[^/]+)(?:/events)?|/threads/(?P<thread>[^/]+)(?:/events)?"
    r"|/events)/?"
)


class Place(NamedTuple):
    """What a URL names: a run, a thread, or all that happens on a server.

    Attributes:
        server: Its own URL.
        after: The id behind which to begin.
        types: See `Client.feed`.
        watch: See `Client.feed`.
    """

    server: str
    run_id: str | None = None
    thread_id: str | None = None
    after: str = ""
    types: tuple[str, ...] = ()
    watch: tuple[str, ...] = ()

    @classmethod
    def of(cls, url: str) -> "Place":
        """Read a URL; raises `BadRequest`."""
        from urllib.parse import parse_qsl, unquote

        from .errors import BadRequest

        path, _, query = url.partition("?")
        found = _PLACE.fullmatch(path if "://" in path else f"http://{path}")
        asked = dict(parse_qsl(query))
        unknown = asked.keys() - {"after", "types", "watch"}
        if found is None or unknown:
            came = f"{min(unknown)!r} in its query" if unknown else repr(url[:200])
            raise BadRequest(
                f"expected the URL of a run, such as {EXAMPLE}, of a thread, /threads/ID, or of "
                f"all that happens, /events, with after, types and watch in its query; got {came}"
            )
        run_id, thread_id = found["run"], found["thread"]
        return cls(
            server=found["server"],
            run_id=None if run_id is None else unquote(run_id),
            thread_id=None if thread_id is None else unquote(thread_id),
            after=asked.get("after", ""),
            types=_listed(asked.get("types", "")),
            watch=_listed(asked.get("watch", "")),
        )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


async def _watch(place: Place, as_json: bool) -> int:  # noqa: FBT001
    import signal

    import trio

    from .client import open_client

    def report(_event: str, **facts: Any) -> None:
        with suppress(OSError):
            click.echo(f"agentsse: {facts['reason']}; back in {facts['seconds']:.1f} s", err=True)

    code = EXIT_SIGINT
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with (
            open_client(place.server, report=report) as client,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_leave_on_signal, signals, nursery.cancel_scope)
            try:
                code = await _follow(client, place, as_json=as_json)
            except OSError as error:
                code = _stop_printing(error)
            nursery.cancel_scope.cancel()
    return code


async def _leave_on_signal(signals: AsyncIterator[int], scope: "trio.CancelScope") -> None:
    await anext(signals)
    scope.cancel()


async def _follow(client: "Client", place: Place, *, as_json: bool) -> int:
    """Print a stream until its end; the exit code."""
    from .client import RunStream

    colors = sys.stdout.isatty()
    encoder = JsonLines() if as_json else Transcript(colors=colors, server=client.url)
    if place.run_id is None:
        stream = client.feed(
            place.thread_id, after=place.after, types=place.types, watch=place.watch
        )
    else:
        stream = client.stream(place.run_id, after=place.after or 0, types=place.types)
    async with stream:
        async for event in stream:
            sys.stdout.buffer.writelines(encoder.feed(event))
            sys.stdout.buffer.flush()
    if isinstance(stream, RunStream) and stream.end is not None:
        return EXIT_CODES[stream.end.outcome]
    return 0


async def _cancel(server: str, run_id: str, reason: str | None) -> "RunSnapshot":
    from .client import open_client

    async with open_client(server) as client:
        return await client.cancel(run_id, reason=reason)


def _answering(server: str, request: "InputRequested") -> str:
    """What to type to answer a request, with an answer of the right kind in each place."""
    answers = {question.id: _example(question) for question in request.questions}
    body = json.dumps({"request_id": request.request_id, "answers": answers}, ensure_ascii=False)
    url = f"{server}/runs/{request.run_id}/input"
    return f"curl -d {shlex.quote(body)} {shlex.quote(url)}"


def _example(question: "Question") -> Any:
    ids = [option.id for option in question.options]
    match question.kind:
        case "confirm":
            return True
        case "choice":
            return next(iter(ids), "...")
        case "choices":
            return ids
        case _:
            return "..."
