"""Tools: schemas from signatures, arguments from models, and calls that leave nothing behind.

Threads here are real and wait for events; only tests without threads use the autojump clock.
"""

import contextvars
import dataclasses
import datetime as dt
import functools
import json
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import trio
import trio.testing

from agentsse.errors import ToolError
from agentsse.tools import (
    PIECE,
    Tool,
    Toolset,
    Workers,
    gather,
    is_cancelled,
    output_to,
    run_program,
    tool,
    write_output,
)

SECONDS = 10  # generous: only a test that hangs ever sees it

colour = contextvars.ContextVar("colour", default="none")


@dataclasses.dataclass
class Place:
    """A nested parameter."""

    city: str
    country: str = "CZ"


class Tree(msgspec.Struct):
    """A parameter that contains itself."""

    leaf: int
    branches: "list[Tree]" = []


def patient():
    return trio.CancelScope(shield=True, relative_deadline=SECONDS)


def impatient():
    return trio.CancelScope(shield=True, relative_deadline=0)


@pytest.fixture
def workers():
    return Workers(trio.CapacityLimiter(1), patient)


def listen():
    """Block until somebody wants this thread to stop."""
    while not is_cancelled():
        threading.Event().wait(0.001)


# Schemas


def nothing(): ...


def plain(*, a: str, b: int, c: float, d: bool, e: list[str], f: dict[str, int]): ...


def defaults(a: str, b: int = 3, *, c: str | None = None, d: tuple[int, ...] = ()): ...


def constrained(
    n: Annotated[int, msgspec.Meta(ge=0, description="How many.")],
    how: Literal["fast", "slow"] = "fast",
): ...


def nested(place: Place): ...


def recursive(tree: Tree): ...


def spelled_out(when: "dt.date", n: "Annotated[int, msgspec.Meta(le=9)]" = 1): ...


def documented(  # noqa: D417 - one parameter is left out
    a: str,
    b: Annotated[int, msgspec.Meta(description="From Meta.")],
    c: int = 0,
    d: int = 0,
):
    """Do a thing,
    told in two lines.

    More than a model needs.

    Args:
        a: The first one,
            in two lines: really.
        b: From the docstring.
        c (int, optional): The third.
        stranger: Not a parameter.

    Returns:
        d: not a parameter's description.
    """  # noqa: D205 - a paragraph of two lines


def an_object(properties, *required, **more):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


SCHEMAS = {
    nothing: an_object({}),
    plain: an_object(
        {
            "a": {"type": "string"},
            "b": {"type": "integer"},
            "c": {"type": "number"},
            "d": {"type": "boolean"},
            "e": {"type": "array", "items": {"type": "string"}},
            "f": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        *"abcdef",
    ),
    defaults: an_object(
        {
            "a": {"type": "string"},
            "b": {"type": "integer", "default": 3},
            "c": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "d": {"type": "array", "items": {"type": "integer"}, "default": []},
        },
        "a",
    ),
    constrained: an_object(
        {
            "n": {"type": "integer", "minimum": 0, "description": "How many."},
            "how": {"enum": ["fast", "slow"], "default": "fast"},
        },
        "n",
    ),
    nested: an_object(
        {"place": {"$ref": "#/$defs/Place"}},
        "place",
        **{
            "$defs": {
                "Place": {
                    "title": "Place",
                    "description": "A nested parameter.",
                    "type": "object",
                    "properties": {
                        "city": {"type": "string"},
                        "country": {"type": "string", "default": "CZ"},
                    },
                    "required": ["city"],
                }
            }
        },
    ),
    recursive: an_object(
        {"tree": {"$ref": "#/$defs/Tree"}},
        "tree",
        **{
            "$defs": {
                "Tree": {
                    "title": "Tree",
                    "description": "A parameter that contains itself.",
                    "type": "object",
                    "properties": {
                        "leaf": {"type": "integer"},
                        "branches": {
                            "type": "array",
                            "items": {"$ref": "#/$defs/Tree"},
                            "default": [],
                        },
                    },
                    "required": ["leaf"],
                }
            }
        },
    ),
    spelled_out: an_object(
        {
            "when": {"type": "string", "format": "date"},
            "n": {"type": "integer", "maximum": 9, "default": 1},
        },
        "when",
    ),
    documented: an_object(
        {
            "a": {"type": "string", "description": "The first one, in two lines: really."},
            "b": {"type": "integer", "description": "From Meta."},
            "c": {"type": "integer", "default": 0, "description": "The third."},
            "d": {"type": "integer", "default": 0},
        },
        "a",
        "b",
    ),
}


@pytest.mark.parametrize("function", SCHEMAS, ids=lambda function: function.__name__)
def test_schema(function):
    """A signature becomes one JSON Schema that stands alone."""
    schema = json.loads(msgspec.json.encode(tool(function).parameters))

    assert SCHEMAS[function] == schema


def test_description():
    """The docstring's first paragraph is the description, in one line, unless one is given."""
    assert tool(documented).description == "Do a thing, told in two lines."
    assert tool(documented, description="Else.").description == "Else."
    assert tool(nothing).description == ""


def test_decorator_forms():
    """The decorator works with and without arguments, and the function stays callable."""

    @tool
    def bare(n: int) -> int:
        return n + 1

    @tool(name="other-name", seconds=None)
    async def configured() -> None: ...

    assert (bare(2), bare.name, bare.seconds, bare.is_async) == (3, "bare", 60.0, False)
    assert (configured.name, configured.seconds, configured.is_async) == ("other-name", None, True)


def test_bound_method():
    """A bound method is a tool like any other; self is no parameter."""

    class Shelf:
        def lookup(self, title: str) -> str:
            return title.upper()

        def tools(self) -> list[Tool]:
            return [tool(self.lookup)]

    shelf: Toolset = Shelf()
    (lookup,) = gather([shelf])

    assert list(lookup.parameters["properties"]) == ["title"]
    assert lookup("x") == "X"


def test_tools_of_one_name_are_refused():
    """A model, and a reader of the stream, could not tell them apart."""

    @tool
    async def lookup(title: str) -> str:
        return title

    with pytest.raises(ValueError, match="got two of lookup"):
        gather([lookup, lookup])


def unannotated(a): ...


def variadic(*a: int): ...


def open_ended(**a: int): ...


def positional(a: int, /): ...


def opaque(lock: threading.Event): ...


def bad_default(n: int = object()): ...


def shared_default(n: list[int] = [1]): ...  # noqa: B006 - what is refused


def misspelt(n: "Nowhere"): ...  # noqa: F821 - what is refused


def generator():
    yield


async def async_generator():
    await trio.lowlevel.checkpoint()
    yield


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unannotated, "@tool unannotated: parameter a has no annotation; write a: str, for"),
        (variadic, r"parameter \*a: int: a model must know each name; write them out"),
        (open_ended, r"parameter \*\*a: int: a model must know each name; write them out"),
        (positional, "parameter a: int is positional-only: a model gives names; remove the /"),
        (opaque, "parameter lock: threading.Event: JSON has no form for its type or its default"),
        (bad_default, "parameter n: int = <object .*>: JSON has no form"),
        (shared_default, r"parameter n: list\[int\] = \[1\]: .*None as the default"),
        (misspelt, "@tool misspelt: name 'Nowhere' is not defined; annotate with names of its"),
        (generator, "@tool generator: expected a function that returns, got a generator"),
        (async_generator, "expected a function that returns, got a generator"),
        (lambda: None, "expected a tool name of .*, got '<lambda>'; give it one: @tool"),
    ],
)
def test_unusable_function(function, message):
    """What no model could call is refused where it is decorated, with what to write instead."""
    with pytest.raises(TypeError, match=message):
        tool(function)


@pytest.mark.parametrize("name", ["", "a b", "ü", "a" * 65, "a\n"])
def test_unusable_name(name):
    """A name that model APIs refuse is refused at once."""
    with pytest.raises(TypeError, match="expected a tool name of 1 to 64 ASCII letters"):
        tool(nothing, name=name)


# Arguments


def everything(
    when: dt.date,
    n: Annotated[int, msgspec.Meta(ge=0)] = 1,
    place: Place | None = None,
    rest: Any = None,
): ...


@pytest.mark.parametrize(
    "wrap",
    [str, str.encode, lambda text: msgspec.Raw(text.encode()), json.loads],
    ids=["str", "bytes", "Raw", "Mapping"],
)
def test_decode(wrap):
    """Arguments in any form become values of the annotated types, defaults included."""
    text = '{"when": "2026-01-02", "place": {"city": "Brno"}, "rest": [1]}'

    arguments = tool(everything).decode(wrap(text))

    assert {
        "when": dt.date(2026, 1, 2),
        "n": 1,
        "place": Place("Brno"),
        "rest": [1],
    } == arguments


@pytest.mark.parametrize("empty", ["", b"", msgspec.Raw(b""), {}, "{}"])
def test_decode_nothing(empty):
    """Nothing at all counts as an object without members."""
    assert tool(nothing).decode(empty) == {}


TAKES = "expected a JSON object with when, n (optional), place (optional), rest (optional)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"n": 1}', "Object missing required field `when` - at `$`; got '{\"n\": 1}'; " + TAKES),
        (b"[]", "Expected `object`, got `array` - at `$`; got b'[]'; " + TAKES),
        ({"when": 3}, "Expected `date`, got `int` - at `$.when`; got {'when': 3}; " + TAKES),
        (
            {"when": "2026-01-02", "x": 1},
            "Object contains unknown field `x` - at `$`; got {'when': '2026-01-02', 'x': 1}; "
            + TAKES,
        ),
        (
            '{"when": "2026-01-02", "n": "1"}',
            "Expected `int`, got `str` - at `$.n`; "
            'got \'{"when": "2026-01-02", "n": "1"}\'; ' + TAKES,
        ),
        (
            '{"when": "2026-01-02", "n": -1}',
            'Expected `int` >= 0 - at `$.n`; got \'{"when": "2026-01-02", "n": -1}\'; ' + TAKES,
        ),
        (
            '{"when": "2026-01-02", "place": {"city": 1}}',
            "Expected `str`, got `int` - at `$.place.city`; "
            'got \'{"when": "2026-01-02", "place": {"city": 1}}\'; ' + TAKES,
        ),
        ('{"when"', "Input data was truncated - at `$`; got '{\"when\"'; " + TAKES),
        (
            "when=1",
            "JSON is malformed: invalid character (byte 0) - at `$`; got 'when=1'; " + TAKES,
        ),
    ],
)
def test_bad_arguments(arguments, message):
    """What does not fit is answered with the tool, the place, what came and what would fit."""
    with pytest.raises(ToolError) as raised:
        tool(everything).decode(arguments)

    assert "tool everything: " + message == raised.value.message


@pytest.mark.parametrize(
    "arguments",
    [
        '{"rest": ' + "[" * 100_000,
        '{"rest": ' + "9" * 5_000 + "}",
        '{"rest": 1e999}',
        '{"rest": "\ud800"}',
        b'{"rest": "\xff"}',
        {"\ud800": 1},
    ],
    ids=["deep", "long number", "infinity", "surrogate", "no UTF-8", "surrogate name"],
)
def test_hostile_arguments(arguments):
    """Bombs and broken text are bad arguments too, and the message is short and can be sent on."""
    with pytest.raises(ToolError) as raised:
        tool(everything).decode(arguments)

    assert len(raised.value.message.encode()) < 700


def test_bad_arguments_for_nothing():
    """A tool without parameters says that it takes none."""
    with pytest.raises(ToolError, match="expected a JSON object with nothing in it"):
        tool(nothing).decode('{"x": 1}')


# Calls


async def test_call_async(workers):
    """An async tool runs in the caller's task."""

    @tool
    async def whoami(greeting: str) -> tuple[str, trio.lowlevel.Task]:
        await trio.lowlevel.checkpoint()
        return greeting, trio.lowlevel.current_task()

    expected = ("hi", trio.lowlevel.current_task())

    assert expected == await whoami.call(whoami.decode('{"greeting": "hi"}'), workers)


async def test_call_in_thread(workers):
    """A blocking tool runs in a thread that sees the caller's context variables."""

    @tool
    def look(self: int, function: int) -> tuple[int, str, bool, bool]:
        here = threading.current_thread() is threading.main_thread()
        return self + function, colour.get(), here, is_cancelled()

    colour.set("green")
    with trio.fail_after(SECONDS):
        result = await look.call({"self": 1, "function": 2}, workers)

    assert result == (3, "green", False, False)
    assert not is_cancelled()
    assert workers.limiter.borrowed_tokens == 0


async def test_workers_pass_arguments_and_errors(workers):
    """Workers hand over positional and keyword arguments, results and errors."""
    with trio.fail_after(SECONDS):
        assert await workers.run(int, "111", base=2) == 7
        with pytest.raises(ZeroDivisionError):
            await workers.run(divmod, 1, 0)

    assert workers.abandoned == 0


class Loud(Exception):
    """An error of nobody else's."""


async def cancelled_once_started(workers, body):
    """Call `body` in a thread and cancel the call as soon as the thread has started."""
    started = trio.Event()
    results = []

    def work():
        trio.from_thread.run_sync(started.set)
        return body()

    async def call():
        results.append(await workers.run(work))

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await started.wait()
            nursery.cancel_scope.cancel()
    return results, nursery.cancel_scope.cancelled_caught


async def test_cancel_joins_thread_that_listens(workers):
    """A cancelled call is over when the thread that was told to stop has ended, not before."""
    ended = threading.Event()

    def body():
        listen()
        ended.set()
        return "too late"

    results, was_cancelled = await cancelled_once_started(workers, body)

    assert ended.is_set()
    assert (results, was_cancelled) == ([], True)
    assert (workers.abandoned, workers.limiter.borrowed_tokens) == (0, 0)


async def test_cancel_joins_thread_that_asks_trio(workers):
    """A thread may also stop by Trio's own check."""

    def body():
        listen()
        trio.from_thread.check_cancelled()

    results, was_cancelled = await cancelled_once_started(workers, body)

    assert (results, was_cancelled) == ([], True)
    assert (workers.abandoned, workers.limiter.borrowed_tokens) == (0, 0)


async def test_cancel_abandons_stubborn_thread():
    """A thread that outlives its grace is counted and keeps its place until it ends."""
    workers = Workers(trio.CapacityLimiter(1), impatient)
    release = threading.Event()
    try:
        results, was_cancelled = await cancelled_once_started(workers, release.wait)
        assert (results, was_cancelled) == ([], True)
        assert (workers.abandoned, workers.limiter.borrowed_tokens) == (1, 1)
    finally:
        release.set()
    with trio.fail_after(SECONDS):
        async with workers.limiter:
            assert workers.abandoned == 1


async def test_cancel_while_waiting_for_a_thread(workers):
    """A call that has no thread yet ends at once, uncounted, and never starts one."""
    calls = []
    async with workers.limiter, trio.open_nursery() as nursery:
        nursery.start_soon(workers.run, functools.partial(calls.append, 1))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert (calls, workers.abandoned, workers.limiter.borrowed_tokens) == ([], 0, 0)


@pytest.mark.parametrize("steps", range(5))
async def test_cancel_at_every_step(workers, steps):
    """However early the cancel comes, a thread that has begun has ended, and none begins later."""
    trace = []

    def work():
        trace.append("began")
        listen()
        trace.append("ended")

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.run, work)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        before = list(trace)
        async with workers.limiter:
            assert before == trace

    assert trace in ([], ["began", "ended"])
    assert workers.abandoned == 0


async def test_error_within_grace(workers):
    """An error on the way out stands in the place of Cancelled, which comes back at once."""
    started = trio.Event()
    seen = []

    def work():
        trio.from_thread.run_sync(started.set)
        listen()
        raise Loud

    async def call():
        try:
            await workers.run(work)
        except Loud as error:
            seen.append(type(error.__context__))
        await trio.lowlevel.checkpoint()
        seen.append("went on")

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await started.wait()
            nursery.cancel_scope.cancel()

    assert [trio.Cancelled] == seen
    assert workers.abandoned == 0


async def test_time_limit_async(workers, autojump_clock):
    """An async tool that takes too long is cancelled, and the model is told."""

    @tool(seconds=5)
    async def slow() -> None:
        await trio.sleep_forever()

    with pytest.raises(
        ToolError, match=r"^tool slow took longer than 5 s; ask it for less at once"
    ):
        await slow.call({}, workers)


async def test_time_limit_thread(workers):
    """A blocking tool that takes too long is told to stop, and the model is told."""

    @tool(seconds=0.05)
    def slow() -> None:
        listen()

    with (
        trio.fail_after(SECONDS),
        pytest.raises(ToolError, match=r"^tool slow took longer than 0\.05 s"),
    ):
        await slow.call({}, workers)

    assert (workers.abandoned, workers.limiter.borrowed_tokens) == (0, 0)


async def test_no_time_limit(workers, autojump_clock):
    """A tool without a limit may take as long as its run."""

    @tool(seconds=None)
    async def slow() -> str:
        await trio.sleep(3_600)
        return "done"

    assert await slow.call({}, workers) == "done"


async def test_own_timeout_is_not_the_limit(workers, autojump_clock):
    """A tool's own TooSlowError is its own error."""

    @tool
    async def slow() -> None:
        with trio.fail_after(1):
            await trio.sleep_forever()

    with pytest.raises(trio.TooSlowError):
        await slow.call({}, workers)


# Errors


@tool
async def fails_async(error: Any) -> None:
    raise error


@tool
def fails_in_thread(error: Any) -> None:
    raise error


@tool
async def fails_in_nursery(error: Any) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        nursery.start_soon(fails_async.function, error)


@pytest.mark.parametrize("fails", [fails_async, fails_in_thread])
async def test_errors_go_through(workers, fails):
    """A tool's error reaches the caller as it is."""
    for error in (ToolError("no such city"), ValueError("bug")):
        with trio.fail_after(SECONDS), pytest.raises(type(error)) as raised:
            await fails.call({"error": error}, workers)

        assert error is raised.value


@pytest.mark.parametrize("fails", [fails_async, fails_in_thread, fails_in_nursery])
async def test_exit_is_an_error(workers, fails):
    """A tool that wants to exit the process, as argparse does, only fails."""
    with trio.fail_after(SECONDS), pytest.raises(ToolError) as raised:
        await fails.call({"error": SystemExit(2)}, workers)

    expected = f"tool {fails.name} wanted to exit, with 2; check its input"
    assert expected == raised.value.message
    assert isinstance(raised.value.__cause__, SystemExit | BaseExceptionGroup)


async def test_lone_tool_error_leaves_its_nursery(workers):
    """A ToolError that is alone in its group stands for it; any other group goes through."""
    error = ToolError("no such city")
    with pytest.raises(ToolError) as raised:
        await fails_in_nursery.call({"error": error}, workers)
    assert error is raised.value

    with pytest.RaisesGroup(ValueError):
        await fails_in_nursery.call({"error": ValueError("bug")}, workers)


async def test_exit_beside_another_error(workers):
    """An exit in a group becomes a ToolError there, and what is beside it stays."""

    @tool
    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_async.function, SystemExit(1))
            nursery.start_soon(fails_async.function, ValueError("bug"))

    with pytest.RaisesGroup(ToolError, ValueError):
        await both.call({}, workers)


@tool(seconds=1)
async def cleans_up_badly() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("bug")


async def test_error_beside_the_time_limit(workers, autojump_clock):
    """When the time is up, an error from the tool's cleanup is not lost."""
    with pytest.RaisesGroup(ValueError):
        await cleans_up_badly.call({}, workers)


async def test_error_beside_cancelled(workers):
    """When the run is cancelled, Cancelled and a real error beside it both go on."""
    seen = []

    async def call():
        try:
            await cleans_up_badly.call({}, workers)
        except BaseExceptionGroup as error:
            seen.extend(type(inner) for inner in error.exceptions)
            raise

    async def cancelled():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    with pytest.RaisesGroup(pytest.RaisesGroup(ValueError)):
        await cancelled()
    assert {trio.Cancelled, ValueError} == set(seen)


# Checkpoints


@tool
async def at_once() -> str:
    return "done"


@tool
def at_once_in_thread() -> str:
    return "done"


@pytest.mark.parametrize("quick", [at_once, at_once_in_thread])
async def test_checkpoint_on_success(workers, quick):
    """A call is a checkpoint, whatever the function does."""
    with trio.fail_after(SECONDS), trio.testing.assert_checkpoints():
        assert await quick.call({}, workers) == "done"


@pytest.mark.parametrize("fails", [fails_async, fails_in_thread, fails_in_nursery])
async def test_checkpoint_on_error(workers, fails):
    """A call that fails is a checkpoint too."""
    with (
        trio.fail_after(SECONDS),
        pytest.raises(ToolError),
        trio.testing.assert_checkpoints(),
    ):
        await fails.call({"error": ToolError("no")}, workers)


@pytest.mark.parametrize("quick", [at_once, at_once_in_thread])
async def test_cancelled_before_the_call(workers, quick):
    """A call under a cancelled scope does nothing."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await quick.call({}, workers)

    assert scope.cancelled_caught
    assert workers.abandoned == 0


# Output


async def test_output_of_a_tool_goes_where_it_should(workers):
    """What a tool writes goes to whoever calls it, from its task and from its thread."""
    written = []

    @tool
    async def speaks() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, write_output, "1")
        write_output("2")
        write_output("")

    @tool
    def speaks_in_thread() -> None:
        write_output("3")

    with trio.fail_after(SECONDS), output_to(written.append):
        await speaks.call({}, workers)
        await speaks_in_thread.call({}, workers)

    assert ["1", "2", "3"] == written


def test_output_of_nobody():
    """Outside of tools nothing comes of it."""
    written = []
    with output_to(written.append):
        pass
    write_output("unheard")
    assert [] == written


def test_output_of_tools_within_tools():
    """The innermost listener hears it, and the outer one again when that is gone."""
    outer, inner = [], []
    with output_to(outer.append):
        with output_to(inner.append):
            write_output("1")
        write_output("2")
    assert (["2"], ["1"]) == (outer, inner)


# Programs

PYTHON = (sys.executable, "-S", "-E", "-c")


async def printed_by(code, **options):
    """Run a Python program; return what it printed, and what was shown of it as it came."""
    shown = []
    with trio.fail_after(SECONDS), output_to(shown.append):
        text = await run_program([*PYTHON, code], **options)
    return text, shown


async def test_program():
    """What a program prints is returned, and shown."""
    text, shown = await printed_by("print('hello')")
    assert text == "hello\n"
    assert text == "".join(shown)


@pytest.mark.parametrize("stdin", ["žluť", "žluť".encode()])
async def test_program_reads(stdin, tmp_path):
    """A program reads what it is given, where it is told to, with the environment it gets."""
    code = "import os, sys; print(sys.stdin.buffer.read(), os.getcwd(), os.environ['COLOUR'])"
    text, _ = await printed_by(code, stdin=stdin, cwd=tmp_path, env={"COLOUR": "green"})
    assert f"{'žluť'.encode()} {tmp_path} green\n" == text


async def test_program_does_not_read():
    """A program need not read what it is given."""
    text, _ = await printed_by("print('done')", stdin=b"x" * 1_000_000)
    assert text == "done\n"


async def test_program_shows_whole_characters():
    """Characters are not cut, however they come, and no piece is too long."""
    code = (
        "import os\n"
        "for byte in '\\u017elu\\u0165 \\U0001f600'.encode(): os.write(1, bytes([byte]))\n"
        "os.write(1, ('\\u017e' * 10_000).encode() + bytes([0xff, 0xc5]))"
    )
    text, shown = await printed_by(code)
    assert "žluť 😀" + "ž" * 10_000 + "\ufffd\ufffd" == text
    assert text == "".join(shown)
    assert max(map(len, shown)) <= PIECE


async def test_program_shows_as_it_comes(tmp_path):
    """What a program prints is shown while it runs: here it waits to be told to go on."""
    code = "import sys\nprint('first', flush=True)\nopen(sys.argv[1]).read()\nprint('last')"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    shown = []

    def show(text):
        if not shown:
            os.close(os.open(pipe, os.O_WRONLY))  # returns when the program has opened it
        shown.append(text)

    with trio.fail_after(SECONDS), output_to(show):
        assert await run_program([*PYTHON, code, pipe]) == "first\nlast\n"
    assert ["first\n", "last\n"] == shown


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (9, "12345678\n[1 more bytes were printed, which are not shown]"),
        (10, "12345678ž"),
        (4, "1234\n[6 more bytes were printed, which are not shown]"),
        (0, "\n[10 more bytes were printed, which are not shown]"),
    ],
)
async def test_program_prints_too_much(limit, expected):
    """What is beyond the limit is dropped, and how much it was is said; no character is cut."""
    text, shown = await printed_by("print('12345678\\u017e', end='')", max_output=limit)
    assert expected == text
    assert expected.partition("\n")[0] == "".join(shown)


async def test_program_prints_far_too_much():
    """A program that prints without measure comes to its end all the same."""
    text, _ = await printed_by("print('x' * 5_000_000)", max_output=3)
    assert text == "xxx\n[4999998 more bytes were printed, which are not shown]"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys; print('out'); sys.exit('no such city')",
            f"{sys.executable} has ended with exit code 1: no such city",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            f"{sys.executable} has ended with signal 9: it has said nothing to stderr",
        ),
        (
            "import sys; sys.exit('token=abcdefgh is wrong')",
            f"{sys.executable} has ended with exit code 1: token=[redacted] is wrong",
        ),
        (
            "import sys; sys.exit('x' * 5_000 + 'end')",
            f"{sys.executable} has ended with exit code 1: {'x' * 997}end",
        ),
    ],
)
async def test_program_fails(code, message):
    """The model is told how a program has failed, and what it said to stderr, without secrets."""
    with pytest.raises(ToolError) as raised:
        await printed_by(code)
    assert message == raised.value.message


async def test_program_that_is_not_there():
    """The model is told, too, when there is no such program."""
    with trio.fail_after(SECONDS), pytest.raises(ToolError, match="got no-such-program: No such"):
        await run_program(["no-such-program"])


LEAVES_A_CHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\n"
)


def runs(pid):
    """Whether a process is there, and not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_program_leaves_a_child_behind():
    """The call is over when the program has exited, and takes with it what that has started."""
    text, _ = await printed_by(LEAVES_A_CHILD)
    assert not runs(int(text))


async def test_program_is_cancelled(workers):
    """A cancelled call is over when nothing of its program runs any longer."""
    pids = []

    @tool
    async def runs_program() -> str:
        return await run_program([*PYTHON, LEAVES_A_CHILD + "time.sleep(600)"])

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:

            def show(text):
                pids.append(int(text))
                assert runs(pids[0])
                nursery.cancel_scope.cancel()

            with output_to(show):
                await runs_program.call({}, workers)

    assert nursery.cancel_scope.cancelled_caught
    assert not runs(pids[0])


async def test_program_takes_too_long(workers):
    """A program is ended when its tool's time is up."""

    @tool(seconds=0.2)
    async def runs_program() -> str:
        return await run_program([*PYTHON, LEAVES_A_CHILD + "time.sleep(600)"])

    shown = []
    with (
        trio.fail_after(SECONDS),
        output_to(shown.append),
        pytest.raises(ToolError, match="longer"),
    ):
        await runs_program.call({}, workers)
    assert [] == [pid for pid in shown if runs(int(pid))]
