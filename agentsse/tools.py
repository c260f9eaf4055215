"""Tools: a Python function, the JSON Schema that a model reads, and how to call it.

Knows: signatures, JSON arguments, worker threads and their cancel tokens. Must never know runs,
logs, HTTP or dialects: what belongs to a run (its thread limiter, the time it grants for cleaning
up) comes in through `Workers`.

The rule to keep: a call ends when nothing of it is left. An async tool is plain structured
concurrency in the caller's task; the program that it runs is a child, which ends with it. A
blocking one cannot be cancelled, only asked to stop through its cancel token and waited for; a
thread that does not listen is counted, never forgotten.
"""

import codecs
import contextvars
import functools
import inspect
import math
import re
import reprlib
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

import attrs
import msgspec
import trio

from .errors import BadArguments, ToolError, redact
from .process import Argument, CannotStart, Process, open_process, open_service_nursery

P = ParamSpec("P")
T = TypeVar("T")

SECONDS = 60.0  # for one call: longer than a slow web request, shorter than a user's patience
MAX_OUTPUT: Final = 1024 * 1024  # bytes of what a program prints; more than a model can read
PIECE: Final = 4_000  # characters of output in one event: a screenful, and a small frame
MAX_TAIL: Final = 1_000  # characters of stderr in an error: the end of a traceback

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what OpenAI and Anthropic accept; Gemini takes it too

# One entry of a Google-style "Args:" section; lines indented deeper than its name continue it.
_ARGUMENT = re.compile(r"^( +)(\w+)(?: \(.*?\))?: *(.*(?:\n\1 +\S.*)*)", re.MULTILINE)

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200  # characters; enough to recognise a call by

_cancel_token: contextvars.ContextVar[threading.Event] = contextvars.ContextVar("cancel_token")


_output: contextvars.ContextVar[Callable[[str], None]] = contextvars.ContextVar("output")


def is_cancelled() -> bool:
    """Tell a blocking tool whether it should stop.

    Returns:
        True once the run that called the tool is being cancelled, or the tool's time is up. False
        as long as nobody wants it to stop, in async tools and outside of tools. It costs next to
        nothing; ask once per piece of work, and return or raise (what is returned is dropped).
    """
    token = _cancel_token.get(None)
    return token is not None and token.is_set()


def write_output(delta: str) -> None:
    """Show more of what the tool that is being called prints, while it works. Sync.

    It can be called from async tools and from blocking ones, in any task and thread that was
    started with the context of the call. Outside of tools it does nothing.

    Args:
        delta: What comes behind all that was written before.

    Raises:
        TypeError: It is no text.
    """
    if not isinstance(delta, str):
        raise TypeError(f"write_output: expected a str, got {type(delta).__name__}; decode it")
    if delta and (write := _output.get(None)) is not None:
        write(delta)


@contextmanager
def output_to(function: Callable[[str], None]) -> Iterator[None]:
    """Let `write_output` call a function, in this context and all that are copied from it.

    Args:
        function: Called with text that is not empty, in whichever thread writes; it must not block.
    """
    token = _output.set(function)
    try:
        yield
    finally:
        _output.reset(token)


@attrs.define(eq=False)
class _Place:
    """A call's place under the limiter.

    Trio takes it and gives it back (`trio.to_thread.run_sync` accepts anything with these two
    methods). So it learns two things that a cancelled `run_sync` does not tell: whether a thread
    was started at all, which happens in the same step as taking, and when that thread has ended.
    """

    limiter: trio.CapacityLimiter
    taken: bool = False
    ended: trio.Event = attrs.field(factory=trio.Event)
    stop: threading.Event = attrs.field(factory=threading.Event)
    error: BaseException | None = None

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self.limiter.acquire_on_behalf_of(borrower)
        self.taken = True

    def release_on_behalf_of(self, borrower: object) -> None:
        self.limiter.release_on_behalf_of(borrower)
        self.ended.set()


@attrs.define(eq=False)
class Workers:
    """How the blocking calls of one run live in threads.

    Args:
        limiter: Bounds the threads. One that outlives its call keeps its place until it ends.
        grace: Makes a shielded scope with a deadline: how long a cancelled call waits for its
            thread. What the thread does later is its own affair.

    Attributes:
        abandoned: Threads that outlived their grace.
    """

    limiter: trio.CapacityLimiter
    grace: Callable[[], AbstractContextManager[trio.CancelScope]]
    abandoned: int = attrs.field(default=0, init=False)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function in a thread, with the caller's context variables.

        Returns:
            What the function returns.

        Raises:
            BaseException: Whatever the function raises.

        Cancellation: before the thread has started, this ends at once. Afterwards `is_cancelled`
        is true in the thread, and this waits for it as long as the grace lasts; then the thread is
        counted in `abandoned` and left alone. `Cancelled` goes on in either case, and a result
        that comes this late is dropped. An error that comes within the grace is raised in the
        place of `Cancelled`, as from the `finally` of an async function: it is not lost, and
        cancellation is a level, so the next checkpoint raises `Cancelled` again.
        """
        place = _Place(self.limiter)

        def work() -> T:
            _cancel_token.set(place.stop)  # in the thread's copy of the context
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                place.error = error
                raise

        try:
            return await trio.to_thread.run_sync(
                work,
                abandon_on_cancel=True,
                limiter=place,  # type: ignore[arg-type]  # Trio's docs: any object like a limiter
            )
        except trio.Cancelled:
            place.stop.set()
            if place.taken:
                with trio.CancelScope(shield=True):  # bounded by the grace, inside
                    await self._part(place)
            raise

    async def _part(self, place: _Place) -> None:
        """Wait for a thread that was told to stop; raise its error, or count it."""
        # In a run that goes on, as behind a tool's own time limit, a grace that is over is an error
        # of its own; here it is the count that tells it.
        with suppress(trio.TooSlowError), self.grace():
            await place.ended.wait()
        if not place.ended.is_set():
            self.abandoned += 1
        # A Cancelled of its own, from `trio.from_thread.check_cancelled`, is how it obeyed.
        elif place.error is not None and not isinstance(place.error, trio.Cancelled):
            raise place.error


def _valid_name(_: object, __: object, name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise TypeError(
            f"expected a tool name of 1 to 64 ASCII letters, digits, _ and -, got {name!r}; "
            'give it one: @tool(name="...")'
        )


@attrs.frozen(eq=False)
class Tool:
    """A function that a model may call; `tool` makes it. Calling it calls the function.

    Attributes:
        name: What the model calls it.
        description: What the model is told about it.
        parameters: JSON Schema of the arguments: one object, complete in itself.
        seconds: How long one call may take; None for as long as the run.
        function: The function itself.
        is_async: Whether it runs in the caller's task, not in a thread.
        accepts: The Struct that arguments are decoded to: the function's parameters.
    """

    name: str = attrs.field(validator=_valid_name)
    description: str
    parameters: dict[str, Any] = attrs.field(repr=False)
    seconds: float | None
    function: Callable[..., Any]
    is_async: bool
    accepts: type[msgspec.Struct] = attrs.field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself: no check, no thread, no limit."""
        return self.function(*args, **kwargs)

    def decode(self, arguments: str | bytes | msgspec.Raw | Mapping[str, Any]) -> dict[str, Any]:
        """Check what a model wants to call the tool with.

        Args:
            arguments: A JSON object, as text or decoded. Nothing at all, as models send where no
                argument is needed, counts as an empty one.

        Returns:
            A value of the annotated type for every parameter, defaults included.

        Raises:
            BadArguments: They do not fit; the message tells the model why, where, and what would.
        """
        try:
            if isinstance(arguments, Mapping):
                decoded = msgspec.convert(arguments, self.accepts)
            else:
                arguments = arguments if isinstance(arguments, str) else bytes(arguments)
                decoded = msgspec.json.decode(arguments or "{}", type=self.accepts)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            place = "" if " - at " in str(error) else " - at `$`"
            required = self.parameters["required"]
            takes = [
                f"{parameter}" if parameter in required else f"{parameter} (optional)"
                for parameter in self.parameters["properties"]
            ]
            raise BadArguments(
                f"tool {self.name}: {error}{place}; got {_brief.repr(arguments)}; "
                f"expected a JSON object with {', '.join(takes) or 'nothing in it'}"
            ) from error
        return msgspec.structs.asdict(decoded)

    async def call(self, arguments: dict[str, Any], workers: Workers) -> Any:
        """Call the function: an async one in this task, any other in a thread of `workers`.

        Args:
            arguments: What `decode` returned.
            workers: The run's.

        Returns:
            What the function returns.

        Raises:
            ToolError: The function raised it, wanted to exit the process, or took longer than
                `seconds`.
            BaseException: Anything else it raises, unchanged. In a group from a nursery, a lone
                ToolError stands for the group; what is beside `Cancelled` stays there.

        Cancellation: is the function's to handle if it is async, else see `Workers.run`.
        """
        await trio.lowlevel.checkpoint()  # an async tool need not have one
        with trio.move_on_after(math.inf if self.seconds is None else self.seconds):
            try:
                if self.is_async:
                    return await self.function(**arguments)
                return await workers.run(self.function, **arguments)
            except (SystemExit, BaseExceptionGroup) as error:
                told = _told(error, self.name)
                if told is error:
                    raise
                raise told from error
        raise ToolError(
            f"tool {self.name} took longer than {self.seconds:g} s; ask it for less at once"
        )


def _told(error: BaseException, name: str) -> BaseException:
    """Find the ToolErrors in `error`: an exit is one, and a group of just one is that one."""
    match error:
        case SystemExit():
            return ToolError(f"tool {name} wanted to exit, with {error.code!r}; check its input")
        case BaseExceptionGroup(exceptions=before):
            after = [_told(inner, name) for inner in before]
            if len(after) == 1 and isinstance(after[0], ToolError):
                return after[0]
            if after != list(before):
                return error.derive(after)
    return error


# Programs -----------------------------------------------------------------------------------------


async def run_program(
    argv: Sequence[Argument],
    *,
    stdin: bytes | str = b"",
    cwd: Argument | None = None,
    env: Mapping[str, str] | None = None,
    max_output: int = MAX_OUTPUT,
) -> str:
    """Run a program to its end, in an async tool: what it prints is shown as it comes.

    Args:
        argv: The program and its arguments. There is no shell.
        stdin: What it reads.
        cwd: Where it runs.
        env: Its whole environment; that of this process where there is none.
        max_output: Bytes of stdout that are shown and returned. What is beyond is read, so that
            the program can go on, and dropped.

    Returns:
        What it has printed to stdout; where some of that was dropped, a note says how much.

    Raises:
        ToolError: It could not be started, or has failed: says how, and what it said to stderr.

    The call is over when the program has exited. What it has started by then is killed, as all of
    it is when the call is cancelled; nothing is left of it in either case, see `open_process`.
    """
    printed = _Printed(max_output)
    try:
        async with open_process(argv, cwd=cwd, env=env) as process:
            async with open_service_nursery() as nursery:
                nursery.start_soon(_write_all, process, stdin)
                with trio.CancelScope() as reading:
                    # Who has exited may have left a child behind that holds the pipe open.
                    nursery.start_soon(_when_exited, process, reading.cancel)
                    while data := await process.stdout.receive_some():
                        printed.take(data)
                code = await process.wait()
            printed.take(process.rest_of_stdout())
            said = process.stderr_tail()
    except CannotStart as error:
        raise ToolError(error.message) from error
    text = printed.close()
    if code:
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        why = redact(said)[-MAX_TAIL:] or "it has said nothing to stderr"
        raise ToolError(f"{argv[0]!s} has ended with {how}: {why}")
    return text


async def _write_all(process: Process, text: bytes | str) -> None:
    try:
        await process.stdin.send_all(text.encode() if isinstance(text, str) else text)
    except trio.BrokenResourceError:  # it does not want to read it
        pass
    finally:
        await trio.aclose_forcefully(process.stdin)


async def _when_exited(process: Process, function: Callable[[], object]) -> None:
    await process.wait()
    function()


@attrs.define(eq=False)
class _Printed:
    """What a program has printed, as text: cut anywhere, within a character too. Sync."""

    limit: int
    _size: int = 0
    _pieces: list[str] = attrs.field(factory=list)
    _decoder: codecs.IncrementalDecoder = attrs.field(
        factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def take(self, data: bytes) -> None:
        """Take more, and show it."""
        room = max(0, self.limit - self._size)
        self._size += len(data)
        self._show(self._decoder.decode(data[:room]))

    def close(self) -> str:
        """Take note of the end; return all of it."""
        dropped = self._size - self.limit
        if dropped <= 0:
            self._show(self._decoder.decode(b"", final=True))
            return "".join(self._pieces)
        note = f"\n[{dropped} more bytes were printed, which are not shown]"
        return "".join([*self._pieces, note])

    def _show(self, text: str) -> None:
        if text:
            self._pieces.append(text)
        for start in range(0, len(text), PIECE):
            write_output(text[start : start + PIECE])


# Toolsets -----------------------------------------------------------------------------------------


@runtime_checkable
class Toolset(Protocol):
    """Tools from one source: a folder, an MCP server, whatever knows its tools itself."""

    def tools(self) -> Sequence[Tool]:
        """Return the tools that there are when an agent is made."""
        ...


def gather(given: Iterable[Tool | Toolset]) -> tuple[Tool, ...]:
    """Put single tools and those of sources into one row.

    Raises:
        ValueError: Two of them have one name, and a model could not tell them apart.
    """
    tools: list[Tool] = []
    for each in given:
        tools += [each] if isinstance(each, Tool) else each.tools()
    names = [tool.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected tools of different names, got two of {', '.join(twice)}")
    return tuple(tools)


@overload
def tool(
    function: Callable[..., Any],
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    seconds: float | None = SECONDS,
) -> Tool: ...


@overload
def tool(
    function: None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    seconds: float | None = SECONDS,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    seconds: float | None = SECONDS,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of a function: `@tool`, `@tool(seconds=5)` or `tool(function)`.

    Args:
        function: Async, or blocking (it runs in a thread and should ask `is_cancelled`). Every
            parameter has a name and an annotation that JSON has a form for; constraints and
            descriptions stand in `Annotated[int, msgspec.Meta(ge=0, description="...")]`, or
            descriptions in the docstring's "Args:" section.
        name: What the model calls it; the function's name unless given.
        description: What the model is told; the docstring's first paragraph unless given.
        seconds: How long one call may take; None for as long as the run.

    Raises:
        TypeError: The name or the signature cannot be used; says what to write instead.
    """
    if function is None:
        return functools.partial(tool, name=name, description=description, seconds=seconds)
    if name is None:
        name = getattr(function, "__name__", "")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"@tool {name}: expected a function that returns, got a generator")
    docs = inspect.getdoc(function) or ""
    accepts = _struct(function, name)
    return Tool(
        name=name,
        description=" ".join(docs.partition("\n\n")[0].split())
        if description is None
        else description,
        parameters=_schema(accepts, docs),
        seconds=seconds,
        function=function,
        is_async=inspect.iscoroutinefunction(function),
        accepts=accepts,
    )


def _struct(function: Callable[..., Any], name: str) -> type[msgspec.Struct]:
    """Make a Struct with the parameters of a function as its fields."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(f"@tool {name}: {error}; annotate with names of its module") from error
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        where = f"@tool {name}: parameter {parameter}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{where}: a model must know each name; write them out")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{where} is positional-only: a model gives names; remove the /")
        if parameter.name not in hints:
            raise TypeError(f"{where} has no annotation; write {parameter.name}: str, for instance")
        field = (parameter.name, hints[parameter.name])
        fields.append(
            field if parameter.default is parameter.empty else (*field, parameter.default)
        )
        try:
            msgspec.json.schema(msgspec.defstruct("arguments", fields[-1:]))
        except (TypeError, NameError) as error:
            raise TypeError(
                f"{where}: JSON has no form for its type or its default ({error}); use str, int, "
                "float, bool, list, dict, dates, a dataclass or a Struct, and None as the default"
            ) from error
    return msgspec.defstruct("arguments", fields, kw_only=True, forbid_unknown_fields=True)


def _schema(accepts: type[msgspec.Struct], docs: str) -> dict[str, Any]:
    """Make the JSON Schema of a function's parameters: an object, with `$defs` if it needs any."""
    whole = msgspec.json.schema(accepts)
    schema: dict[str, Any] = whole["$defs"].pop(whole["$ref"].removeprefix("#/$defs/"))
    del schema["title"]
    if whole["$defs"]:
        schema["$defs"] = whole["$defs"]
    section = re.split(r"\n(?=\S)", docs.partition("\nArgs:\n")[2])[0]
    for _, name, text in _ARGUMENT.findall(section):
        if name in schema["properties"]:
            schema["properties"][name].setdefault("description", " ".join(text.split()))
    return schema
