"""What an agent can say and do, and how each becomes events.

The engine is the real one, without HTTP. Time is virtual; where a test needs a real thread, it runs
on real time and waits for events.
"""

import contextvars
import math
import sys
import threading
from contextlib import asynccontextmanager, suppress

import attrs
import msgspec
import pytest
import trio
import trio.testing
from msgspec import UNSET, Raw
from raw import wait_until

from agentsse.agents import Agent, agent
from agentsse.context import ask_user, current_run, emit
from agentsse.dialects import Start
from agentsse.dialects.native import NativeEncoder
from agentsse.errors import (
    AgentError,
    BadRequest,
    Conflict,
    NotFound,
    ProviderError,
    ToolError,
    Unencodable,
)
from agentsse.events import (
    EVENT_TYPES,
    AgentFinished,
    AgentStarted,
    Compacted,
    ContextUsage,
    Custom,
    Failover,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    Liveness,
    LoopDetected,
    MessageReceived,
    Moderation,
    Option,
    PartDelta,
    PartFinished,
    PartStarted,
    Paused,
    Problem,
    ProviderEvent,
    Question,
    Resumed,
    Retry,
    Stalled,
    StepFinished,
    StepStarted,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    Usage,
    ValuesChanged,
    decode_json,
    encode_event,
)
from agentsse.log import START
from agentsse.messages import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage
from agentsse.providers import Finish
from agentsse.runs import Limits, open_runs
from agentsse.sse import Decoder
from agentsse.testing import ScriptedProvider, ask_for, say
from agentsse.tools import run_program, tool, write_output

SECONDS = 10  # generous: only a test that hangs ever sees it

colour = contextvars.ContextVar("colour", default="none")


@attrs.define
class Reports:
    """What operators would be told."""

    seen: list = attrs.field(factory=list)

    def __call__(self, event, **facts):
        """Take note."""
        self.seen.append((event, facts))


@asynccontextmanager
async def opened(*agents, providers=(), **limits):
    """Open a place for runs of these agents; deltas are not joined unless a test wants it."""
    async with open_runs(
        {one.name: one for one in agents},
        limits=Limits(**{"coalesce": 0} | limits),
        providers={one.name: one for one in providers},
        report=(report := Reports()),
    ) as runs:
        runs.report.seen = report.seen  # what contains a report is a function, and takes a note
        yield runs


def begin(runs, name="main", input=None):
    return runs.start(Start(agent=name, input=input, delivery="stream"), default="continue")[0]


async def play(function, *others, input=None, tools=(), providers=(), **limits):
    """Run one agent to its end."""
    main = function if isinstance(function, Agent) else Agent("main", function, tools=tools)
    async with opened(main, *others, providers=providers, **limits) as runs:
        run = begin(runs, main.name, input)
        await run.done.wait()
    return run


def told(run, *types):
    """The events of a run as plain data, without the envelope; of these types, or all but two."""
    events = [decode_json(encode_event(event)) for event in run.log.events]
    return [
        {key: value for key, value in event.items() if key not in ("run_id", "seq", "ts")}
        for event in events
        if (event["type"] in types if types else event["type"] not in ("run_started", ENDS))
    ]


ENDS = "run_finished"


def end(run):
    """How a run ended: its outcome, its result, and the code and words of its error."""
    error = run.end.error
    return run.end.outcome, run.result, error and error.code, error and error.message


def crashes(run):
    return [facts for event, facts in run.owner.report.seen if event == "crash"]


def a_part(part_id, kind, *deltas):
    yield {"type": "part_started", "part_id": part_id, "kind": kind}
    for delta in deltas:
        yield {"type": "part_delta", "part_id": part_id, "kind": kind, "delta": delta}
    yield {"type": "part_finished", "part_id": part_id, "kind": kind, "text": "".join(deltas)}


# Agents


async def test_a_decorated_function_is_an_agent_with_its_name_and_docstring():
    """`@agent` takes the name and the description from the function; it can still be called."""

    @agent
    async def greet(run, input):
        """Say hello."""
        await trio.lowlevel.checkpoint()
        return f"hello {input}"

    @agent(name="other", on_disconnect="continue", description="Told.")
    async def _named(run, input): ...

    assert ("greet", "Say hello.") == (greet.name, greet.description)
    assert ("other", "Told.", "continue") == (_named.name, _named.description, _named.on_disconnect)
    assert await greet(None, "you") == "hello you"


def test_only_an_async_function_can_be_an_agent():
    """The decorator says what to write."""
    with pytest.raises(TypeError, match=r"async function .* write 'async def'"):

        @agent
        def greet(run, input): ...


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "_x", "9", "x" * 64])
def test_an_agent_has_a_name_that_fits_into_a_path(name):
    """Letters, digits, and three signs between them."""
    assert name == Agent(name, ask_how).name == agent(name=name)(ask_how).name


@pytest.mark.parametrize("name", [*("", ".", "..", ".a", "-a", "a/b", "a b", "é", "a\n"), "x" * 65])
def test_an_agent_has_no_other_name(name):
    """What could be read as another path, or as an option, is refused where it is made."""
    with pytest.raises(ValueError, match=r"1 to 64 letters, digits, .* got") as refused:
        Agent(name, ask_how)
    assert repr(name) in str(refused.value)
    with pytest.raises(ValueError, match="an agent's name"):
        Agent.of_model(name, "offline:x")


def test_a_model_is_named_with_its_provider():
    """`provider:model`, or a `ValueError` that says so."""
    with pytest.raises(ValueError, match=r"agent 'chat': .* as PROVIDER:MODEL, got 'gpt'"):
        Agent.of_model("chat", "gpt")
    with pytest.raises(ValueError, match=r"agent 'chat': .* as PROVIDER:MODEL, got 'gpt'"):
        Agent.of_model("chat", "offline:x", fallbacks=["gpt"])


def test_an_agent_says_which_providers_the_server_must_know():
    """Those of its model and of what takes over; not the one that it brings along."""
    own = ScriptedProvider([])
    models = {"model": "a:x", "fallbacks": ["b:x", "a:y"]}
    assert {"a", "b"} == Agent.of_model("chat", **models).wanted_providers
    assert {"b"} == Agent.of_model("chat", **models, provider=own).wanted_providers
    assert set() == Agent("ask", ask_how).wanted_providers


# emit


async def test_emit_tells_a_name_and_values(autojump_clock):
    """A custom event has the name, and the values as JSON."""

    async def main(run, input):
        run.emit("progress", done=1, of=[2, None])
        emit("from_anywhere", place={"city": "Brno"})
        await trio.lowlevel.checkpoint()

    assert [
        {"type": "custom", "name": "progress", "value": {"done": 1, "of": [2, None]}},
        {"type": "custom", "name": "from_anywhere", "value": {"place": {"city": "Brno"}}},
    ] == told(await play(main))


async def test_emit_names_the_place_of_what_json_cannot_hold(autojump_clock):
    """It does not raise: the event says what was wrong, and where."""

    async def main(run, input):
        run.emit("loss", epochs=[1.0, {"loss": math.nan}])
        run.emit("thing", thing=object())
        run.emit("key", **{"half \ud800": object()})
        emit("elsewhere", thing=object())
        await trio.lowlevel.checkpoint()
        return "fine"

    run = await play(main)
    problems = [(event["name"], event["value"]["message"]) for event in told(run)]
    assert ("success", "fine", None, None) == end(run)
    assert ["agentsse.error"] * 4 == [name for name, _ in problems]
    assert "loss: expected finite numbers, got nan at $.epochs[1].loss" in problems[0][1]
    assert "thing: expected what JSON can hold, got object at $.thing" in problems[1][1]
    assert "object at $.half " in problems[2][1]
    assert problems[3][1].startswith("elsewhere: expected what JSON can hold, got object at $")
    assert "unencodable" == told(run)[0]["value"]["code"]


@pytest.mark.parametrize("name", ["", "a\rb", "a\nb", "a\0b", "half \ud800", 5])
async def test_a_custom_name_is_printable(name, autojump_clock):
    """What could break a frame, or cannot be shown, becomes an error event with its escape."""

    async def main(run, input):
        run.emit(name)
        await trio.lowlevel.checkpoint()

    (event,) = told(await play(main))
    assert "agentsse.error" == event["name"]
    assert f"got {name!a}" in event["value"]["message"]


async def test_an_event_does_not_change_with_the_object_it_was_made_of(autojump_clock):
    """Values are encoded at once."""

    async def main(run, input):
        places = ["Brno"]
        run.emit("places", places=places)
        places.append("Praha")
        await trio.lowlevel.checkpoint()

    (event,) = told(await play(main))
    assert {"places": ["Brno"]} == event["value"]


def test_outside_of_a_run_emit_does_nothing():
    """Neither without Trio nor in a task of its own."""

    async def main():
        emit("unheard")
        await trio.lowlevel.checkpoint()
        return current_run()

    emit("unheard")
    assert current_run() is None
    assert trio.run(main) is None


async def test_emit_works_from_threads():
    """A blocking tool, and any thread that has the run's context, can report."""

    def work(word: str) -> str:
        emit("working", word=word, id=current_run().id)
        return word

    async def main(run, input):
        await trio.to_thread.run_sync(work, "plain")
        return await run.call(tool(work), {"word": "tool"})

    with trio.fail_after(SECONDS):
        run = await play(main)
    assert ("success", "tool", None, None) == end(run)
    assert [{"word": "plain", "id": run.id}, {"word": "tool", "id": run.id}] == [
        event["value"] for event in told(run, "custom")
    ]


async def test_emit_works_from_a_thread_that_runs_its_own_trio():
    """It does not wait for the run's loop, and takes no other loop for it."""
    heard = threading.Event()

    async def inner():
        emit("working", there=trio.current_time() is not None)
        await trio.lowlevel.checkpoint()
        heard.set()

    def work():
        trio.run(inner)

    async def main(run, input):
        await trio.to_thread.run_sync(work)
        await trio.lowlevel.checkpoint()

    with trio.fail_after(SECONDS):
        run = await play(main)
    assert heard.is_set()
    assert [{"there": True}] == [event["value"] for event in told(run, "custom")]


async def test_emit_from_a_thread_waits_for_nobody():
    """The loop may be busy: what is told is encoded by the thread, and heard later."""
    told_all = threading.Event()

    def work():
        values = ["a"]
        emit("first", values=values)
        values.append("b")
        emit("second", values=values)
        emit("third", thing=object())
        told_all.set()

    async def main(run, input):
        thread = threading.Thread(target=contextvars.copy_context().run, args=[work])
        thread.start()
        told_all.wait(SECONDS)  # the whole loop waits with it
        run.emit("none of it was heard", events=len(run.writer.log.events))
        thread.join(SECONDS)
        await trio.testing.wait_all_tasks_blocked()

    with trio.fail_after(2 * SECONDS):
        run = await play(main)
    assert told_all.is_set()
    assert {"events": 1} == told(run)[0]["value"]
    assert [{"values": ["a"]}, {"values": ["a", "b"]}] == [e["value"] for e in told(run)[1:3]]
    assert told(run)[3]["value"]["message"].startswith("third: expected what JSON can hold")


async def test_what_an_abandoned_thread_reports_after_the_end_is_dropped():
    """The last event stays the last one, and the thread notices nothing."""
    go, gone = threading.Event(), threading.Event()
    started, errors = trio.Event(), []

    def work():
        trio.from_thread.run_sync(started.set)
        go.wait(SECONDS)
        try:
            emit("late")
        except BaseException as error:  # noqa: BLE001 - the point is that there is none
            errors.append(error)
        gone.set()

    async def main(run, input):
        await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    with trio.fail_after(SECONDS):
        async with opened(Agent("main", main)) as runs:
            run = begin(runs)
            await started.wait()
            run.cancel("client_cancel")
            await run.done.wait()
            go.set()
            await trio.to_thread.run_sync(gone.wait, SECONDS)
    assert gone.is_set()
    assert [] == errors
    assert ["run_started", "run_finished"] == [
        event["type"] for event in told(run, "custom", "run_started", "run_finished")
    ]


def test_a_thread_that_outlives_the_event_loop_reports_to_nobody():
    """`emit` returns, as it always does."""
    go, errors, threads = threading.Event(), [], []

    def work():
        go.wait(SECONDS)
        try:
            emit("late")
        except BaseException as error:  # noqa: BLE001 - the point is that there is none
            errors.append(error)

    async def main(run, input):
        threads.append(threading.Thread(target=contextvars.copy_context().run, args=[work]))
        threads[0].start()
        await trio.lowlevel.checkpoint()

    trio.run(play, main)
    go.set()
    threads[0].join(SECONDS)
    assert (False, []) == (threads[0].is_alive(), errors)


async def test_the_current_run_is_that_of_the_task(autojump_clock):
    """Tasks of a run know it, a child run is its own, and afterwards there is none."""
    seen = {}

    async def note(name):
        seen[name] = current_run()
        await trio.lowlevel.checkpoint()

    async def child(run, input):
        seen["child itself"] = run
        await note("child")

    async def main(run, input):
        run.nursery.start_soon(note, "task")
        await run.delegate("child", None)
        await note("main")

    run = await play(main, Agent("child", child))
    assert [run.context] * 2 == [seen["main"], seen["task"]]
    assert seen["child"] is seen["child itself"] is not run.context
    assert current_run() is None


@pytest.mark.parametrize("way", ["call", "ask", "delegate"])
async def test_a_run_that_is_over_refuses_to_act(way, autojump_clock):
    """Who has kept it is told so; nothing is added to its log."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()

    run = await play(main)
    act = {
        "call": lambda: run.context.call("look", {}),
        "ask": lambda: run.context.ask("How?"),
        "delegate": lambda: run.context.delegate("main", None),
    }[way]
    events = list(run.log.events)
    with pytest.raises(AgentError, match=f"expected a run that goes on, got {run.id}, which is"):
        await act()
    assert events == run.log.events


# Text


async def test_text_and_reasoning_are_parts_that_take_turns(autojump_clock):
    """A part is opened by the first word of its kind and finished, whole, by the other's."""

    async def main(run, input):
        run.reasoning("let me ")
        run.reasoning("see")
        run.text("")
        run.text("It is ")
        run.text("four.")
        run.reasoning("done")
        await trio.lowlevel.checkpoint()

    assert [
        *a_part("p1", "reasoning", "let me ", "see"),
        *a_part("p2", "text", "It is ", "four."),
        *a_part("p3", "reasoning", "done"),
    ] == told(await play(main))


async def test_whatever_an_agent_does_next_finishes_what_it_says(autojump_clock):
    """A step, a tool, a question and a child run each begin after the part; emit may be within."""

    async def child(run, input):
        await trio.lowlevel.checkpoint()

    async def nothing(): ...

    async def main(run, input):
        run.text("a")
        run.emit("within")
        with run.step("step"):
            run.text("b")
        run.text("c")
        await run.call(tool(nothing), {})
        run.text("d")
        await run.delegate("child", None)
        run.text("e")
        await run.ask("how?")

    async with opened(Agent("main", main), Agent("child", child)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        run.context.answer(*run.context.asked, {"answer": "so"})
        await run.done.wait()
    part = ["part_started", "part_delta", "part_finished"]
    assert [
        *("part_started", "part_delta", "custom", "part_finished"),
        *("step_started", *part, "step_finished"),
        *(*part, "tool_started", "tool_finished"),
        *(*part, "agent_started", "agent_finished"),
        *(*part, "input_requested", "input_received"),
    ] == [event["type"] for event in told(run)]


async def test_deltas_are_joined_within_a_window(autojump_clock):
    """The first goes out at once, later ones together, and the whole is what was said."""

    async def main(run, input):
        for delta in "abc":
            run.text(delta)
        await trio.sleep(0.06)
        run.text("d")

    assert [*a_part("p1", "text", "a", "bc", "d")] == told(await play(main, coalesce=0.05))


async def test_halves_of_surrogate_pairs_are_joined_or_replaced(autojump_clock):
    """UTF-8 can carry whatever an agent says."""

    async def main(run, input):
        run.text("\ud83d\ude00")
        run.text("\ud83d")
        run.text("é")
        await trio.lowlevel.checkpoint()

    assert [*a_part("p1", "text", "😀", "\ufffd", "é")] == told(await play(main))


async def test_after_the_end_nothing_is_said(autojump_clock):
    """Whoever kept the run's context speaks to nobody."""

    async def main(run, input):
        run.text("a")
        await trio.lowlevel.checkpoint()

    run = await play(main)
    before = told(run)
    run.context.text("b")
    run.context.emit("late")
    with run.context.step("late"):
        run.context.reasoning("c")
        run.cancel_after_step()
    assert before == told(run) == [*a_part("p1", "text", "a")]


# Steps


async def test_a_step_tells_its_result_usage_and_reason(autojump_clock):
    """What is set on it stands in its end; steps nest."""

    async def main(run, input):
        with run.step("outer", kind="flow"), run.step("inner") as step:
            await trio.lowlevel.checkpoint()
            step.result = {"n": 1}
            step.usage = Usage(input_tokens=3)
            step.finish_reason = "length"

    outer = {"step_id": "s1", "kind": "flow", "name": "outer"}
    inner = {"step_id": "s2", "kind": "node", "name": "inner"}
    usage = msgspec.to_builtins(Usage(input_tokens=3))
    assert [
        {"type": "step_started", **outer},
        {"type": "step_started", **inner},
        {
            "type": "step_finished",
            **inner,
            "result": {"n": 1},
            "usage": usage,
            "finish_reason": "length",
        },
        {"type": "step_finished", **outer},
    ] == told(await play(main))


async def fail_with(error):
    await trio.lowlevel.checkpoint()
    raise error


async def test_an_error_in_a_step_stands_in_its_end_and_goes_on(autojump_clock):
    """Of our errors the words are shown, of others only the type; the run may survive them."""

    async def main(run, input):
        for error in (
            AgentError("no such city \ud800", code="city", status=404),
            ValueError("secret"),
            ExceptionGroup("secret", [ExceptionGroup("secret", [KeyError("secret")])]),
            ExceptionGroup("secret", [KeyError("secret"), ValueError("secret")]),
            SystemExit("secret"),
        ):
            with pytest.raises(type(error)) as caught, run.step("look"):
                await fail_with(error)
            assert error is caught.value
        return "survived"

    run = await play(main)
    crashed = {
        "code": "crashed",
        "message": "the step 'look' raised {}; the server's log has the details",
        "status": 500,
    }
    assert ("success", "survived", None, None) == end(run)
    assert [
        {"code": "city", "message": "no such city \ufffd", "status": 404},
        crashed | {"message": crashed["message"].format("ValueError")},
        crashed | {"message": crashed["message"].format("KeyError")},
        crashed | {"message": crashed["message"].format("ExceptionGroup")},
        {
            "code": "system_exit",
            "message": "the step 'look' tried to end the process; raise an error instead",
            "status": 500,
        },
    ] == [event["error"] for event in told(run, "step_finished")]


async def test_a_cancelled_step_is_finished_as_such(autojump_clock):
    """Also where it is an agent that cancels a part of itself."""

    async def main(run, input):
        with trio.move_on_after(1), run.step("wait"):
            await trio.sleep_forever()

    run = await play(main)
    (event,) = told(run, "step_finished")
    assert ("cancelled", "the step 'wait' was cancelled") == (
        event["error"]["code"],
        event["error"]["message"],
    )
    assert "success" == run.end.outcome


async def test_a_step_result_that_json_cannot_hold_is_an_error_of_the_step(autojump_clock):
    """It is raised where the step ends, and shown there."""

    async def main(run, input):
        step = run.step("sum")
        step.__enter__().result = {"x": math.inf}
        await trio.lowlevel.checkpoint()
        with pytest.raises(Unencodable, match=r"step\.result: .* inf at \$\.x"):
            step.__exit__(None, None, None)

    run = await play(main)
    (event,) = told(run, "step_finished")
    assert "unencodable" == event["error"]["code"]
    assert "success" == run.end.outcome


# Tools


@tool
async def double(n: int) -> int:
    """Double a number, the later the smaller it is."""
    await trio.sleep(10 - n)
    return 2 * n


@tool
async def fail(how: str) -> object:
    """Fail in one of many ways."""
    await trio.lowlevel.checkpoint()
    match how:
        case "no":
            raise ToolError("there is no such place")
        case "crash":
            raise ValueError("secret")
        case "exit":
            raise SystemExit(2)
        case _:
            return {"x": math.nan}


@tool(seconds=2)
async def dawdle() -> None:
    """Take too long."""
    await trio.sleep_forever()


async def test_a_call_is_shown_with_its_arguments_and_its_result(autojump_clock):
    """Arguments may be a mapping or JSON text; the tool one of the agent's, or any other."""

    async def main(run, input):
        return [
            await run.call("double", {"n": 2}),
            await run.call("double", '{"n": 3}', call_id="mine"),
            await run.call(double, {"n": 4}),
        ]

    def shown(call_id, n):
        of = {"call_id": call_id, "name": "double"}
        yield {"type": "tool_started", **of, "arguments": {"n": n}}
        yield {
            "type": "tool_finished",
            **of,
            "result": 2 * n,
            "is_error": False,
            "source": "local",
        }

    run = await play(main, tools=[double])
    assert [4, 6, 8] == run.result
    assert [*shown("c1", 2), *shown("mine", 3), *shown("c2", 4)] == told(run)


@pytest.mark.parametrize(
    ("name", "arguments", "shown", "words"),
    [
        ("treble", {"n": 1}, {"n": 1}, "expected one of the tools double, fail, dawdle, got 'tre"),
        ("double", {"n": "x"}, {"n": "x"}, "expected a JSON object with n"),
        ("double", "{n:", "{n:", "expected a JSON object with n"),
        ("double", "", {}, "expected a JSON object with n"),
        ("double", {"n": math.nan}, "{'n': nan}", "expected a JSON object with n"),
        ("double", "\ud83d\ude00", "😀", "expected a JSON object with n"),
        ("fail", {"how": "no"}, {"how": "no"}, "there is no such place"),
        ("fail", {"how": "crash"}, {"how": "crash"}, "the tool 'fail' raised ValueError; the serv"),
        ("fail", {"how": "exit"}, {"how": "exit"}, "tool fail wanted to exit, with 2"),
        ("fail", {"how": "nan"}, {"how": "nan"}, "the result of fail: expected finite numbers"),
        ("dawdle", {}, {}, "tool dawdle took longer than 2 s"),
    ],
)
async def test_a_call_that_fails_is_a_tool_error_with_words(
    name, arguments, shown, words, autojump_clock
):
    """The agent gets what the stream shows; of a crash that is the type alone."""
    caught = []

    async def main(run, input):
        try:
            await run.call(name, arguments)
        except ToolError as error:
            caught.append(error.message)

    run = await play(main, tools=[double, fail, dawdle])
    started, finished = told(run)
    assert "success" == run.end.outcome
    assert shown == started["arguments"]
    assert [finished["result"]] == [{"error": message} for message in caught]
    assert finished["is_error"]
    assert words in caught[0]
    assert "secret" not in caught[0]
    assert (1 if "raised ValueError" in words else 0) == len(crashes(run))


async def test_without_tools_a_call_by_name_says_so(autojump_clock):
    """The list of what could have been called is empty."""

    async def main(run, input):
        with pytest.raises(ToolError, match=r"one of the tools \(none\), got 'x'"):
            await run.call("x", {})

    assert "success" == (await play(main)).end.outcome


async def test_a_crash_is_reported_with_its_traceback(autojump_clock):
    """Operators see what clients do not, but for what looks like a credential."""

    async def main(run, input):
        with pytest.raises(ToolError):
            await run.call("fail", {"how": "crash"})
        raise ValueError("api_key=hunter2")

    run = await play(main, tools=[fail])
    in_tool, in_agent = crashes(run)
    assert (
        "error",
        None,
        "crashed",
        "the agent 'main' raised ValueError; the server's log has the details",
    ) == end(run)
    assert ("the tool 'fail'", "ValueError", run.id) == (
        in_tool["where"],
        in_tool["error"],
        in_tool["run_id"],
    )
    assert "ValueError: secret" in in_tool["traceback"]
    assert ("the agent 'main'", "main") == (in_agent["where"], in_agent["agent"])
    assert "hunter2" not in in_agent["traceback"]


async def test_a_cancelled_call_is_finished_as_an_error(autojump_clock):
    """Its result says that it was cancelled."""

    async def main(run, input):
        with trio.move_on_after(1):
            await run.call("double", {"n": 1})

    _, finished = told(await play(main, tools=[double]))
    assert ({"error": "the tool 'double' was cancelled"}, True) == (
        finished["result"],
        finished["is_error"],
    )


async def test_a_group_with_cancelled_beside_an_error_goes_through_a_call(autojump_clock):
    """The call is finished, and both reach the scopes that they are for."""

    @tool
    async def both() -> None:
        async def complain():
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("secret")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(complain)
            await trio.sleep_forever()

    async def main(run, input):
        with pytest.RaisesGroup(ValueError), trio.move_on_after(1), run.step("both"):
            await run.call(both, {})
        return "survived"

    run = await play(main)
    (finished,) = told(run, "tool_finished")
    assert "survived" == run.result
    assert (None, True) == (finished["result"], finished["is_error"])
    assert "'both' raised ValueError;" in told(run, "step_finished")[0]["error"]["message"]


# Values


async def test_values_are_told_as_they_change_and_shown_whenever_somebody_asks(autojump_clock):
    """None takes one out; what the agent gets is a copy."""

    async def main(run, input):
        run.set_values(city="Brno", n=1)
        run.set_values({"is open?": [True], "n": 0}, n=2)
        run.set_values(city=None, unknown=None)
        await trio.lowlevel.checkpoint()
        run.values["is open?"].append("spoilt")
        return run.values

    run = await play(main)
    assert [
        {"city": "Brno", "n": 1},
        {"is open?": [True], "n": 2},
        {"city": None, "unknown": None},
    ] == [event["values"] for event in told(run, "values_changed")]
    assert {"is open?": [True], "n": 2} == run.result == decode_json(run.snapshot().values)
    assert run.snapshot(brief=True).values is UNSET


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n": 2, "loss": math.nan}, "loss: expected finite numbers, got nan"),
        ({"n": 2, "thing": object()}, "thing: expected what JSON can hold, got object"),
        ({"n": 2, "half \ud800": 1}, "the names of values: expected what JSON can hold"),
    ],
)
async def test_a_value_that_json_cannot_hold_changes_nothing(values, words, autojump_clock):
    """Neither by its own name nor those beside it; and nothing is told."""

    async def main(run, input):
        run.set_values(n=1)
        await trio.lowlevel.checkpoint()
        with pytest.raises(Unencodable, match=words):
            run.set_values(values)
        return run.values

    run = await play(main)
    assert {"n": 1} == run.result
    assert 1 == len(told(run, "values_changed"))


async def test_values_that_are_not_told_have_not_changed(autojump_clock):
    """At the bounds of a run, and behind its end."""

    async def main(run, input):
        run.set_values(n=1)
        run.set_values(n=2)
        await trio.sleep_forever()

    run = await play(main, max_events=2)
    run.context.set_values(n=3)
    assert {"n": 1} == decode_json(run.snapshot().values)
    assert [{"n": 1}] == [event["values"] for event in told(run)]


# Messages


async def test_a_message_waits_until_the_agent_listens(autojump_clock):
    """All that was said, in order; of one mode where that is wanted, and each only once."""

    async def main(run, input):
        await trio.sleep(1)
        return [
            run.take_messages("follow_up"),
            run.take_messages("follow_up"),
            run.take_messages(),
            run.take_messages(),
        ]

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        run.context.hear("a", "follow_up")
        run.context.hear("b", "steer")
        run.context.hear("half \ud800", "follow_up", shown="half \udfff")
        run.context.hear("d", "steer", shown="")
        await run.done.wait()
    assert [["a", "half \ufffd"], [], ["b", "d"], []] == run.result
    assert [
        ("u1", "a", "follow_up"),
        ("u2", "b", "steer"),
        ("u3", "half \ufffd", "follow_up"),
        ("u4", "", "steer"),
    ] == [(e["message_id"], e["text"], e["mode"]) for e in told(run, "message_received")]


async def test_an_agent_may_wait_for_what_is_said_next(autojump_clock):
    """Whichever its mode; who gave up waiting has lost nothing, and each message is one task's."""

    async def main(run, input):
        heard = []

        async def listen():
            heard.append(await run.next_message())

        with trio.move_on_after(1):
            await run.next_message()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(listen)
        return heard

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        await trio.sleep(2)
        for word, mode in (("a", "steer"), ("b", "follow_up")):
            run.context.hear(word, mode)
            await trio.testing.wait_all_tasks_blocked()
        run.context.hear("c", "steer")
        await run.done.wait()
    assert ["a", "b", "c"] == run.result


async def test_a_message_that_was_there_before_is_not_waited_for(autojump_clock):
    """The oldest comes first."""

    async def main(run, input):
        return [await run.next_message(), await run.next_message()]

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        run.context.hear("a", "follow_up")
        run.context.hear("b", "steer")
        await run.done.wait()
    assert ["a", "b"] == run.result


async def test_only_a_run_that_goes_on_can_be_told_something(autojump_clock):
    """Not one that waits for its turn, whose first event is yet to come, nor one that is over."""
    async with opened(Agent("main", ask_how), max_running=1) as runs:
        run, queued = begin(runs), begin(runs)
        with pytest.raises(Conflict, match=f"got {queued.id}, which still waits for its turn"):
            queued.context.hear("a", "steer")
        await trio.testing.wait_all_tasks_blocked()
        run.context.answer("q1", {"answer": ""})
        await run.done.wait()
        with pytest.raises(Conflict, match=f"got {run.id}, which is over"):
            run.context.hear("a", "steer")
        await trio.testing.wait_all_tasks_blocked()
        queued.context.hear("a", "steer")
        queued.cancel("client_cancel")
    assert [] == told(run, "message_received")
    assert "run_started" == everything_of(queued)[0]["type"]


# Rest


async def resting(run, input):
    """Take steps, as models and flows do."""
    for number in range(input):
        rested = await run.rest_while_paused()
        with run.step(f"{number}{'!' * rested}"):
            await trio.sleep(1)


def steps_and_rests(run):
    return [
        event.get("name") or event.get("reason") or event["type"]
        for event in told(run, "step_started", "paused", "resumed")
    ]


async def test_a_run_rests_before_its_next_step_until_it_may_go_on(autojump_clock):
    """What it is in goes on; its state says so, and the time at rest is nobody's fault."""
    async with opened(Agent("main", resting), stall=30) as runs:
        run = begin(runs, input=3)
        await trio.sleep(0.5)
        run.pause("half \ud800")
        run.pause("too late")
        assert ("running", True, False) == (
            run.state,
            run.context.is_paused,
            run.context.is_resting,
        )
        await trio.sleep(1_000)
        assert ("paused", True, True) == (
            run.state,
            run.context.is_paused,
            run.context.is_resting,
        )
        run.context.resume()
        run.context.resume()
        assert ("running", False, False) == (
            run.state,
            run.context.is_paused,
            run.context.is_resting,
        )
        await run.done.wait()
        with pytest.raises(Conflict, match="which is over"):
            run.pause()
        run.context.resume()
    assert ["0", "half \ufffd", "resumed", "1!", "2"] == steps_and_rests(run)
    assert ("success", []) == (run.end.outcome, told(run, "liveness", "stalled"))


async def test_a_run_that_may_go_on_before_it_rests_tells_nothing(autojump_clock):
    """Nobody has noticed."""
    async with opened(Agent("main", resting)) as runs:
        run = begin(runs, input=2)
        await trio.sleep(0.5)
        run.pause()
        run.context.resume()
        await run.done.wait()
    assert ["0", "1"] == steps_and_rests(run)


async def test_a_rest_is_told_once_however_many_tasks_rest(autojump_clock):
    """And its end before anything that comes of it."""

    async def main(run, input):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(resting, run, 2)

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        await trio.sleep(0.5)
        run.pause()
        await trio.sleep(5)
        run.context.resume()
        await run.done.wait()
    assert ["0"] * 3 + ["paused", "resumed"] + ["1!"] * 3 == steps_and_rests(run)


async def test_each_rest_is_told_however_soon_the_next_one_comes(autojump_clock):
    """Also where nobody has gone on between the two."""
    async with opened(Agent("main", resting)) as runs:
        run = begin(runs, input=1)
        run.pause("one")
        await trio.testing.wait_all_tasks_blocked()
        run.context.resume()
        run.pause("two")
        await trio.testing.wait_all_tasks_blocked()
        assert "paused" == run.state
        run.context.resume()
        await run.done.wait()
    assert ["one", "resumed", "two", "resumed", "0!"] == steps_and_rests(run)


async def test_a_cancel_ends_a_rest_at_once(autojump_clock):
    """And it does not go on by that: nothing is told but the end."""
    async with opened(Agent("main", resting)) as runs:
        run = begin(runs, input=1)
        run.pause()
        await trio.sleep(5)
        run.cancel("client_cancel")
        await run.done.wait()
        assert 5 == trio.current_time()
    assert ("cancelled", "client_cancel") == (run.end.outcome, run.end.receipt.cause)
    assert [{"type": "paused"}] == told(run)


@pytest.mark.parametrize("goes_on", [True, False])
async def test_an_agent_that_gives_up_on_its_rest_is_still_to_rest(goes_on, autojump_clock):
    """It does so at its next step, without another word, until it may go on."""

    async def main(run, input):
        with trio.move_on_after(3):
            await resting(run, 1)
        states.append(run.is_resting)
        await trio.sleep(3)
        await resting(run, 1)

    states = []
    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        run.pause()
        await trio.sleep(4)
        states.append(run.state)
        if goes_on:
            run.context.resume()
        await trio.sleep(10)
        assert ("finished" if goes_on else "paused") == run.state
        run.context.resume()
        await run.done.wait()
    assert [False, "running"] == states
    assert ["paused", "resumed", "0" if goes_on else "0!"] == steps_and_rests(run)


async def test_a_child_that_rests_goes_with_the_run_above(autojump_clock):
    """However its parent was ended: nothing is told but the end."""

    async def child(run, input):
        run.pause()
        await resting(run, 1)

    async def main(run, input):
        with trio.move_on_after(3):
            await run.delegate("child", None)

    async with opened(Agent("main", main), Agent("child", child)) as runs:
        run = begin(runs)
        await run.done.wait()
        child = runs.find(told(run, "agent_started")[0]["child_run_id"])
    assert "success" == run.end.outcome
    assert ["paused"] == [event["type"] for event in told(child)]
    assert "parent" == child.end.receipt.cause


# Questions


CHOICE = Question(
    id="colour",
    kind="choice",
    prompt="Which?",
    options=(Option(id="red"), Option(id="blue", label="Blue")),
)
CONFIRM = Question(id="sure", kind="confirm", prompt="Sure?")
TEXT = Question(id="why", kind="text", prompt="Why?")


@asynccontextmanager
async def asking(questions, **limits):
    """Open a run that asks, and returns what it was answered."""

    async def main(run, input):
        return await run.ask(questions)

    async with opened(Agent("main", main), **limits) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        yield run
        await run.done.wait()


async def test_a_prompt_is_answered_with_a_string(autojump_clock):
    """One question, one answer; both can be seen in the stream, and in the snapshot till then."""
    async with asking("How much?") as run:
        (asked,) = run.snapshot().questions
        assert ("waiting", "q1") == (run.state, asked.request_id)
        run.context.answer("q1", {"answer": "much"})
        assert ("running", ()) == (run.state, run.snapshot().questions)
    question = {"id": "answer", "kind": "text", "prompt": "How much?"}
    assert "much" == run.result
    assert () == run.snapshot().questions
    assert [
        {"type": "input_requested", "request_id": "q1", "questions": [question]},
        {"type": "input_received", "request_id": "q1", "answers": {"answer": "much"}},
    ] == told(run)


async def test_one_question_has_one_answer_and_several_have_answers_by_id(autojump_clock):
    """What comes back has the shape of what was asked."""
    async with asking(CONFIRM) as run:
        run.context.answer("q1", {"sure": False})
    assert run.result is False
    answers = {"colour": "blue", "sure": True, "why": ""}
    async with asking([CHOICE, CONFIRM, TEXT]) as run:
        run.context.answer("q1", answers)
    assert answers == run.result


@pytest.mark.parametrize(
    ("questions", "answers", "words"),
    [
        (TEXT, {"why": 5}, "expected a string for 'why', got 5"),
        (CONFIRM, {"sure": "yes"}, "expected true or false for 'sure', got 'yes'"),
        (CHOICE, {"colour": "green"}, "expected one of red, blue for 'colour', got 'green'"),
        (CHOICE, {"colour": ["red"]}, "expected one of red, blue for 'colour', got ['red']"),
        ([TEXT, CONFIRM], {"why": ""}, "answers: expected the keys why, sure, got why"),
        (TEXT, {}, "answers: expected the keys why, got none"),
        (TEXT, {"why": "", "more": ""}, "answers: expected the keys why, got why, more"),
    ],
)
async def test_an_answer_that_does_not_fit_is_refused(questions, answers, words, autojump_clock):
    """The run goes on waiting, and nothing is told."""
    async with asking(questions) as run:
        with pytest.raises(BadRequest) as caught:
            run.context.answer("q1", answers)
        assert words == caught.value.message
        assert "waiting" == run.state
        run.cancel("client_cancel")
    assert [] == told(run, "input_received")


async def test_an_answer_must_name_an_open_request_and_the_first_one_wins(autojump_clock):
    """A stranger is not found, a second answer is a conflict, whenever it comes."""
    async with asking("How?") as run:
        with pytest.raises(NotFound, match=r"open request \(q1\), got 'q9'"):
            run.context.answer("q9", {})
        run.context.answer("q1", {"answer": "so"})
        with pytest.raises(Conflict, match="'q1' has been answered already"):
            run.context.answer("q1", {"answer": "not so"})
        with pytest.raises(NotFound, match=r"open request \(there is none\), got 'q9'"):
            run.context.answer("q9", {})
    with pytest.raises(Conflict, match="'q1' has been answered already"):
        run.context.answer("q1", {"answer": "late"})
    assert "so" == run.result


async def test_a_cancel_ends_the_waiting(autojump_clock):
    """A stop by the user is `cancelled`, whatever was being asked."""
    async with asking("How?") as run:
        run.cancel("client_cancel")
    assert ("cancelled", None, None, None) == end(run)
    assert {} == run.context.asked


async def test_a_run_that_nobody_answers_is_interrupted(autojump_clock):
    """The input timeout ends it; the question stays open in its log."""
    async with asking("How?", input_timeout=60) as run:
        pass
    assert ("interrupted", None, None, None) == end(run)
    assert "input_timeout" == run.end.receipt.cause
    assert 60 <= trio.current_time() < 61


async def test_questions_can_be_asked_side_by_side(autojump_clock):
    """Each waits for its own answer."""

    async def main(run, input):
        answers = {}

        async def ask(name):
            answers[name] = await run.ask(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "a")
            nursery.start_soon(ask, "b")
        return answers

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        for request in reversed(run.snapshot().questions):
            answer = request.questions[0].prompt.upper()
            run.context.answer(request.request_id, {"answer": answer})
            await trio.sleep(40)
        await run.done.wait()
    assert {"a": "A", "b": "B"} == run.result


async def test_the_oldest_open_question_has_the_deadline(autojump_clock):
    """A younger one does not put it off; when it is answered, the next oldest counts."""

    async def main(run, input):
        async with trio.open_nursery() as nursery:
            for name in ("a", "b", "c"):
                nursery.start_soon(run.ask, name)
                await trio.sleep(30)

    async with opened(Agent("main", main), input_timeout=100) as runs:
        run = begin(runs)
        await trio.sleep(95)
        run.context.answer("q1", {"answer": ""})
        await run.done.wait()
        assert 130 <= trio.current_time() < 131
    assert ("interrupted", "input_timeout") == (run.end.outcome, run.end.receipt.cause)
    assert ["q1"] == [event["request_id"] for event in told(run, "input_received")]


@pytest.mark.parametrize("is_first", [True, False])
async def test_an_answer_and_the_deadline_may_come_in_one_tick(is_first, autojump_clock):
    """Whoever is first wins: once answered, a question cannot time out any more."""

    def answer(run):
        with suppress(NotFound):
            run.context.answer("q1", {"answer": "so"})

    async with opened(Agent("main", ask_how), input_timeout=60) as runs:
        timer = runs.timer
        at = trio.current_time() + 60
        if is_first:
            timer.call_at(at, lambda: answer(run))
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        if not is_first:
            timer.call_at(at, lambda: answer(run))
        await run.done.wait()
        assert 60 <= trio.current_time() < 61
    shown = ("success", "so") if is_first else ("interrupted", None)
    assert shown == (run.end.outcome, run.result)
    assert 1 == len(told(run, "input_received"))


async def ask_how(run, input):
    return await run.ask("How?")


async def test_an_answer_stands_beside_a_cancel_in_the_same_tick(autojump_clock):
    """The run is cancelled all the same, and what was received stays received."""

    async def main(run, input):
        answer = await run.ask("How?")
        run.emit("got", answer=answer)
        await trio.sleep_forever()

    for is_first in (True, False):
        async with opened(Agent("main", main)) as runs:
            run = begin(runs)
            await trio.testing.wait_all_tasks_blocked()
            if is_first:
                run.context.answer("q1", {"answer": "so"})
            run.cancel("client_cancel")
            if not is_first:
                run.context.answer("q1", {"answer": "so"})
            with pytest.raises(Conflict):
                run.context.answer("q1", {"answer": "not so"})
            await run.done.wait()
        assert ("cancelled", None, None, None) == end(run)
        assert 1 == len(told(run, "input_received"))
        assert ([{"answer": "so"}] if is_first else []) == [
            event["value"] for event in told(run, "custom")
        ]


async def test_an_answer_that_json_cannot_hold_answers_nothing(autojump_clock):
    """The request stays open, and the next answer is the first."""
    async with asking("How?") as run:
        with pytest.raises(Unencodable):
            run.context.answer("q1", {"answer": "half \ud800"})
        assert "waiting" == run.state
        run.context.answer("q1", {"answer": "whole"})
    assert "whole" == run.result


async def test_who_does_not_want_to_wait_withdraws_the_question(autojump_clock):
    """That is told, and a later answer finds nothing; the run is left to whoever watches it."""

    async def main(run, input):
        with trio.move_on_after(5):
            await run.ask("How?")
        return await run.ask("Really?")

    async with opened(Agent("main", main), input_timeout=60) as runs:
        run = begin(runs)
        await trio.sleep(6)
        with pytest.raises(NotFound, match=r"open request \(q2\), got 'q1'"):
            run.context.answer("q1", {"answer": "so"})
        await trio.sleep(58)
        run.context.answer("q2", {"answer": "yes"})
        await run.done.wait()
    assert "yes" == run.result
    assert [("input_requested", "q1"), ("input_withdrawn", "q1"), ("input_requested", "q2")] == [
        (event["type"], event["request_id"]) for event in told(run)
    ][:3]


async def test_an_answer_in_the_tick_in_which_a_question_is_given_up_is_an_answer(autojump_clock):
    """It was received, so it is not withdrawn, although nobody has heard it."""

    async def main(run, input):
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await run.ask("How?")
        return scope.cancelled_caught

    scopes = []
    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        run.context.answer("q1", {"answer": "so"})
        await run.done.wait()
    assert run.result is True
    assert ["input_requested", "input_received"] == [event["type"] for event in told(run)]


async def test_a_cancel_ends_all_that_is_asked(autojump_clock):
    """Nothing is withdrawn: the run's end says it all."""

    async def main(run, input):
        async with trio.open_nursery() as nursery:
            for name in ("a", "b", "c"):
                nursery.start_soon(run.ask, name)

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        assert 3 == len(run.snapshot().questions)
        run.cancel("client_cancel")
        await run.done.wait()
    assert ("cancelled", None, None, None) == end(run)
    assert ["input_requested"] * 3 == [event["type"] for event in told(run)]
    assert () == run.snapshot().questions


CHOICES = Question(
    id="colours",
    kind="choices",
    prompt="Which?",
    options=(
        Option(id="red"),
        Option(id="blue", label="Dark Blue"),
        Option(id="other", label="Other, or none"),
    ),
)


@pytest.mark.parametrize("answer", [[], ["red"], ["blue", "red"]])
async def test_some_of_several_options_can_be_chosen(answer, autojump_clock):
    """Also none of them."""
    async with asking(CHOICES) as run:
        run.context.answer("q1", {"colours": answer})
    assert answer == run.result


@pytest.mark.parametrize("answer", ["red", ["green"], [["red"]], {"red": True}, None, [1]])
async def test_other_choices_are_refused(answer, autojump_clock):
    """The words say what there is."""
    async with asking(CHOICES) as run:
        with pytest.raises(BadRequest) as caught:
            run.context.answer("q1", {"colours": answer})
        run.cancel("client_cancel")
    words = f"expected a list of some of red, blue, other for 'colours', got {answer!r}"
    assert words == caught.value.message


CROSSED = Question(
    id="letter", kind="choice", prompt="Which?", options=(Option(id="a", label="b"), Option(id="b"))
)


@pytest.mark.parametrize(
    ("question", "answer", "meant"),
    [
        *((CONFIRM, word, True) for word in (True, "yes", " YES\n", "y", "true", "ok", "1")),
        *((CONFIRM, word, False) for word in (False, "no", "N", "False ", "0")),
        *((CHOICE, word, "blue") for word in ("blue", "Blue", " BLUE ")),
        (CHOICE, "Red", "red"),
        (TEXT, "because", "because"),
        (TEXT, "", ""),
        (TEXT, 5, "5"),
        (TEXT, {"a": [None]}, '{"a":[null]}'),
        (CHOICES, [], []),
        (CHOICES, ["red", "dark blue"], ["red", "blue"]),
        (CHOICES, "Red , dark blue", ["red", "blue"]),
        (CHOICES, "BLUE", ["blue"]),
        (CROSSED, "b", "b"),
        (CROSSED, "B", "a"),
        (CHOICES, "other, OR none", ["other"]),
    ],
)
@pytest.mark.parametrize("by_id", [True, False])
async def test_what_is_clear_is_understood(question, answer, meant, by_id, autojump_clock):
    """Words for yes and no, labels for ids, lists in one string, anything for text."""
    async with asking(question) as run:
        key = question.id if by_id else ""
        run.context.answer("q1", {key: answer}, is_loose=True)
    assert meant == run.result
    assert [{question.id: meant}] == [event["answers"] for event in told(run, "input_received")]


@pytest.mark.parametrize(
    ("questions", "answers", "words"),
    [
        (CONFIRM, {"sure": "maybe"}, "expected true or false for 'sure', got 'maybe'"),
        (CONFIRM, {"sure": 1}, "expected true or false for 'sure', got 1"),
        (CHOICE, {"": "green"}, "expected one of red, blue for 'colour', got 'green'"),
        (CHOICE, {"": ["red"]}, "expected one of red, blue for 'colour', got ['red']"),
        (TEXT, {"": None}, "expected a string for 'why', got None"),
        (
            CHOICES,
            {"": "red, green"},
            "expected a list of some of red, blue, other for 'colours', got ['red', ' green']",
        ),
        (
            CHOICES,
            {"": 5},
            "expected a list of some of red, blue, other for 'colours', got 5",
        ),
        (TEXT, {"because": "x"}, "answers: expected some of the keys why, got because"),
        (TEXT, {"": "x", "why": "y"}, "answers: expected some of the keys why, got none"),
        (TEXT, {}, "answers: expected some of the keys why, got none"),
        ([TEXT, CONFIRM], {"": "x"}, "answers: expected some of the keys why, sure, got none"),
        (
            [TEXT, CONFIRM],
            {"b": 1, "a": 2},
            "answers: expected some of the keys why, sure, got a, b",
        ),
    ],
)
async def test_what_is_not_clear_is_refused(questions, answers, words, autojump_clock):
    """The words say what would do; the run goes on waiting, and nothing is told."""
    async with asking(questions) as run:
        with pytest.raises(BadRequest) as caught:
            run.context.answer("q1", answers, is_loose=True)
        assert words == caught.value.message
        assert "waiting" == run.state
        run.cancel("client_cancel")
    assert [] == told(run, "input_received")


async def test_what_is_missing_may_come_later(autojump_clock):
    """One event when all is there; until then a later word counts, and the rest is still asked."""
    async with asking([CHOICE, CONFIRM, TEXT]) as run:
        run.context.answer("q1", {"sure": "no"}, is_loose=True)
        run.context.answer("q1", {"colour": "Blue"}, is_loose=True)
        assert ("waiting", [("why",)]) == (
            run.state,
            [tuple(q.id for q in asked.questions) for asked in run.snapshot().questions],
        )
        with pytest.raises(BadRequest):
            run.context.answer("q1", {"why": None}, is_loose=True)
        run.context.answer("q1", {"sure": "yes"}, is_loose=True)
        run.context.answer("q1", {"why": "so"}, is_loose=True)
        with pytest.raises(Conflict):
            run.context.answer("q1", {"why": "not so"}, is_loose=True)
    answers = {"sure": True, "colour": "blue", "why": "so"}
    assert answers == run.result
    assert [answers] == [event["answers"] for event in told(run, "input_received")]


async def test_a_whole_answer_replaces_what_was_there_of_it(autojump_clock):
    """Whoever answers all of it need not know of others."""
    answers = {"colour": "red", "sure": False}
    async with asking([CHOICE, CONFIRM]) as run:
        run.context.answer("q1", {"sure": "yes"}, is_loose=True)
        run.context.answer("q1", answers)
    assert answers == run.result


async def test_a_part_that_json_cannot_hold_spoils_nothing(autojump_clock):
    """It is refused where it comes, and what comes later is not blamed for it."""
    async with asking([CONFIRM, TEXT]) as run:
        with pytest.raises(Unencodable, match="the answers: expected what JSON can hold"):
            run.context.answer("q1", {"why": "half \ud800"}, is_loose=True)
        run.context.answer("q1", {"sure": "yes"}, is_loose=True)
        assert "waiting" == run.state
        run.context.answer("q1", {"why": "so"}, is_loose=True)
    assert {"sure": True, "why": "so"} == run.result


async def test_questions_of_one_id_have_one_answer(autojump_clock):
    """There is no other way to tell them apart."""
    async with asking([TEXT, msgspec.structs.replace(TEXT, prompt="Why not?")]) as run:
        run.context.answer("q1", {"why": "so"}, is_loose=True)
    assert {"why": "so"} == run.result


async def test_what_somebody_says_is_the_answer_to_the_oldest_question(autojump_clock):
    """Text for the only question of a request, or answers by id."""

    async def main(run, input):
        answers = {}

        async def ask(number, questions):
            answers[number] = await run.ask(questions)

        async with trio.open_nursery() as nursery:
            for number, questions in enumerate((CONFIRM, [CHOICE, CONFIRM], TEXT, TEXT)):
                nursery.start_soon(ask, number, questions)
                await trio.sleep(1)
        return [answers[number] for number in range(4)]

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        with pytest.raises(Conflict, match=f"waits for a person, got {run.id}, which does not"):
            run.context.answer_next("yes")
        await trio.sleep(5)
        run.context.answer_next("yes")
        with pytest.raises(BadRequest, match=r"expected answers to colour, sure, as .* got 'yes'"):
            run.context.answer_next("yes")
        with pytest.raises(BadRequest, match="expected answers to colour, sure, as an object"):
            run.context.answer_next("sure: no\nother: Red")
        with pytest.raises(BadRequest, match="answers: expected colour as well, got none"):
            run.context.answer_next({"sure": "no"}, is_whole=True)
        run.context.answer_next("[sure]: no\n")
        run.context.answer_next({"colour": "Red"})
        run.context.answer_next({"why": "so"})
        run.context.answer_next({"why not": "so"})
        await run.done.wait()
    assert [
        True,
        {"sure": False, "colour": "red"},
        "so",
        '{"why not":"so"}',
    ] == run.result
    assert ["q1", "q2", "q3", "q4"] == [e["request_id"] for e in told(run, "input_received")]


# What a model may ask


async def test_a_model_may_ask_the_person_it_works_for(autojump_clock):
    """Free text, or one of several options; what they answer is the tool's result."""
    first, second = '{"question":"How many?"}', '{"question":"Which?","options":["a","b"]}'
    model, provider = chat(
        [ask_for(("ask_user", first)), ask_for(("ask_user", second)), say("Thanks.")],
        tools=[ask_user],
    )
    assert ["ask_user"] == [one.name for one in model.tools]
    async with opened(model, providers=[provider], input_timeout=math.inf) as runs:
        run = begin(runs, "chat", "Help me.")
        await trio.sleep(3_005)  # no time limit of the tool, and no watch over the turn
        assert "waiting" == run.state
        run.context.answer_next("two")
        await trio.sleep(505)
        (asked,) = run.snapshot().questions
        assert (
            Question(
                id="answer",
                kind="choice",
                prompt="Which?",
                options=(Option(id="a"), Option(id="b")),
            ),
        ) == asked.questions
        with pytest.raises(BadRequest, match="one of a, b"):
            run.context.answer_next("c")
        run.context.answer_next("B")
        await run.done.wait()
    assert ("success", "Thanks.", None, None) == end(run)
    assert ["two", "b"] == [event["result"] for event in told(run, "tool_finished")]
    assert [] == told(run, "liveness", "stalled")
    assert ["question", "options"] == list(provider.prompts[0].tools[0].parameters["properties"])
    assert ToolMessage("call1", "ask_user", '"two"') == provider.prompts[1].messages[2]


async def test_a_model_may_ask_several_things_at_once(autojump_clock):
    """Each call has its own question; answered in any order, the results stand in theirs."""
    calls = [("ask_user", f'{{"question":"{word}?"}}') for word in ("a", "b", "c")]
    model, provider = chat([ask_for(*calls), say("x")], tools=[ask_user])
    async with opened(model, providers=[provider]) as runs:
        run = begin(runs, "chat", "Help me.")
        await trio.testing.wait_all_tasks_blocked()
        asked = {one.questions[0].prompt: one.request_id for one in run.snapshot().questions}
        for word in ("b?", "c?", "a?"):
            run.context.answer(asked[word], {"answer": word.upper()})
            await trio.sleep(1)
        await run.done.wait()
    answers = [m.content for m in provider.prompts[1].messages if isinstance(m, ToolMessage)]
    assert ['"A?"', '"B?"', '"C?"'] == answers


async def test_nobody_is_asked_outside_of_a_run():
    """There is nobody who would hear it."""
    with pytest.raises(AgentError, match="ask_user: expected to be called within a run"):
        await ask_user.function("How?")


# Cleanup


async def test_cleanup_is_shielded_for_five_seconds_in_all(autojump_clock):
    """The first after the cancel starts the clock, the rest share it; it is left silently."""
    times = []

    async def main(run, input):
        try:
            await trio.sleep_forever()
        finally:
            for seconds in (3, 3, 3):
                with run.cleanup() as scope:
                    await trio.sleep(seconds)
                times.append((trio.current_time(), scope.cancelled_caught))

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        await trio.sleep(1)
        run.cancel("client_cancel")
        await run.done.wait()
    assert [(4, False), (6, True), (6, True)] == times
    assert ("cancelled", None, None, None) == end(run)
    assert 5 == run.end.receipt.seconds


async def test_cleanup_without_a_cancel_is_bounded_each_time_anew(autojump_clock):
    """Nothing is used up as long as nobody wants the run to end; being late is an error then."""
    times = []

    async def main(run, input):
        for seconds in (1, 9, 9):
            try:
                with run.cleanup():
                    await trio.sleep(seconds)
            except trio.TooSlowError as error:
                times.append((trio.current_time(), str(error)))

    run = await play(main, cleanup=2)
    assert [(at, "the cleanup took longer than 2 s") for at in (3, 5)] == times
    assert "success" == run.end.outcome


async def test_a_cleanup_that_is_cancelled_meanwhile_is_left_silently(autojump_clock):
    """Its time goes on from where it began; what the agent does next is cancelled."""
    times = []

    async def main(run, input):
        with run.cleanup() as scope:
            await trio.sleep(9)
        times.append((trio.current_time(), scope.cancelled_caught))
        await trio.sleep_forever()

    async with opened(Agent("main", main), cleanup=5) as runs:
        run = begin(runs)
        await trio.sleep(3)
        run.cancel("client_cancel")
        await run.done.wait()
    assert [(5, True)] == times
    assert ("cancelled", None, None, None) == end(run)


async def test_an_error_from_cleanup_stands_beside_the_cancel(autojump_clock):
    """The run is cancelled, and its end tells what went wrong besides."""

    async def main(run, input):
        try:
            await trio.sleep_forever()
        finally:
            with run.cleanup():
                await trio.sleep(1)
                raise ValueError("secret")

    async with opened(Agent("main", main)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel("client_cancel")
        await run.done.wait()
    assert ("cancelled", None, "crashed") == end(run)[:3]
    assert ["the agent 'main'"] == [crash["where"] for crash in crashes(run)]


# Child runs


async def test_a_child_run_has_a_log_of_its_own(autojump_clock):
    """The parent's holds its beginning and its end: what it was given, the result, the cost."""

    async def child(run, input):
        run.text(f"I am {input}")
        run.usage += Usage(input_tokens=3)
        await trio.sleep(2)
        return [input]

    async def main(run, input):
        return await run.delegate("child", "a child")

    async with opened(Agent("main", main), Agent("child", child)) as runs:
        run = begin(runs)
        await run.done.wait()
        (below,) = (other for other in runs if other is not run)
    of = {"agent": "child", "child_run_id": below.id}
    assert ["a child"] == run.result
    assert [
        {"type": "agent_started", **of, "input": "a child"},
        {
            "type": "agent_finished",
            **of,
            "report": ["a child"],
            "usage": msgspec.to_builtins(Usage(input_tokens=3)),
            "seconds": 2.0,
        },
    ] == told(run)
    path = {"path": ["child:1"]}
    assert [part | path for part in a_part("p1", "text", "I am a child")] == told(below)
    assert run.id == below.log.events[0].parent_run_id == below.snapshot().parent_run_id
    assert ("success", ["a child"], None, None) == end(below)


async def test_a_crash_in_a_child_is_an_agent_error_that_a_parent_may_survive(autojump_clock):
    """The words say which run, and no more than a client may read."""
    caught = []

    async def child(run, input):
        await trio.lowlevel.checkpoint()
        raise ValueError("secret")

    async def main(run, input):
        try:
            await run.delegate(Agent("other", child), None)
        except AgentError as error:
            caught.append(error.message)
        return "survived"

    run = await play(main)
    started, finished = told(run)
    words = (
        f"the child run {started['child_run_id']} of 'other': "
        "the agent 'other' raised ValueError; the server's log has the details"
    )
    assert "survived" == run.result
    assert [words] == caught == [finished["error"]["message"]]
    assert "agent_error" == finished["error"]["code"]
    assert 1 == len(crashes(run))


async def test_a_parent_that_does_not_catch_ends_with_the_words_of_its_child(autojump_clock):
    """No second crash is reported: the words are ours."""

    async def child(run, input):
        await trio.lowlevel.checkpoint()
        raise AgentError("too much", code="much", status=400)

    async def main(run, input):
        await run.delegate(Agent("other", child), None)

    run = await play(main)
    assert ("error", None, "agent_error") == end(run)[:3]
    assert run.end.error.message.endswith("of 'other': too much")
    assert [] == crashes(run)


async def test_an_unknown_child_was_never_started(autojump_clock):
    """Nothing is told of it."""

    async def main(run, input):
        with pytest.raises(NotFound, match="expected one of the agents main, got 'nobody'"):
            await run.delegate("nobody", None)

    assert [] == told(await play(main))


async def test_a_child_that_is_cancelled_alone_is_an_agent_error(autojump_clock):
    """The parent goes on."""

    async def child(run, input):
        await trio.sleep_forever()

    async def main(run, input):
        with pytest.raises(AgentError, match="of 'child': it was cancelled"):
            await run.delegate("child", None)
        return "survived"

    async with opened(Agent("main", main), Agent("child", child)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        (below,) = run.children
        below.cancel("client_cancel")
        await run.done.wait()
    assert "survived" == run.result
    assert ("cancelled", "client_cancel") == (below.end.outcome, below.end.receipt.cause)


async def test_the_cancel_of_a_parent_goes_down_to_its_children(autojump_clock):
    """Their cause is `parent`, and each counts the tasks below it, not those beside it."""

    async def leaf(run, input):
        run.nursery.start_soon(trio.sleep_forever)
        await trio.sleep_forever()

    async def child(run, input):
        await run.delegate("leaf", None)

    async def main(run, input):
        run.nursery.start_soon(trio.sleep_forever)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await run.delegate("child", None)

    async with opened(Agent("main", main), Agent("child", child), Agent("leaf", leaf)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel("client_cancel")
        await run.done.wait()
        ended = {one.agent.name: one.end for one in runs}
    assert {"main": "client_cancel", "child": "parent", "leaf": "parent"} == {
        name: one.receipt.cause for name, one in ended.items()
    }
    assert {"main": 4, "child": 2, "leaf": 2} == {
        name: one.receipt.tasks for name, one in ended.items()
    }
    assert {"cancelled"} == {one.outcome for one in ended.values()}
    assert "the child run was cancelled" == told(run, "agent_finished")[0]["error"]["message"]


async def test_a_child_that_is_already_being_cancelled_keeps_its_cause(autojump_clock):
    """The first cause stands, here too."""

    async def child(run, input):
        try:
            await trio.sleep_forever()
        finally:
            with run.cleanup():
                await trio.sleep(1)

    async def main(run, input):
        await run.delegate("child", None)

    async with opened(Agent("main", main), Agent("child", child)) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        (below,) = run.children
        below.cancel("client_cancel")
        run.cancel("deadline")
        await run.done.wait()
    assert "client_cancel" == below.end.receipt.cause
    assert "deadline" == run.end.receipt.cause


async def test_a_parent_that_gives_up_on_a_child_cancels_it(autojump_clock):
    """A scope of the agent's own is as good as any: the child's cause is `parent`."""

    async def child(run, input):
        await trio.sleep_forever()

    async def main(run, input):
        with trio.move_on_after(3):
            await run.delegate("child", None)
        return "moved on"

    async with opened(Agent("main", main), Agent("child", child)) as runs:
        run = begin(runs)
        await run.done.wait()
        below = runs.find(told(run, "agent_started")[0]["child_run_id"])
    assert ("success", "moved on", None, None) == end(run)
    assert ("cancelled", "parent") == (below.end.outcome, below.end.receipt.cause)


async def test_a_child_that_swallows_its_cancel_does_not_keep_its_parent_from_it(autojump_clock):
    """What it returns is its own; the parent is cancelled where it waited."""

    async def child(run, input):
        try:
            await trio.sleep_forever()
        except BaseException:  # noqa: BLE001 - as bad agents do
            return "got away"

    async def main(run, input):
        with trio.move_on_after(3) as scope:
            await run.delegate(Agent("child", child), None)
        return scope.cancelled_caught

    assert (await play(main)).result is True


# Workers


async def test_a_worker_runs_beside_the_agent_and_is_joined_with_it(autojump_clock):
    """Its run's id is known at once; how it went is told when it is over."""

    async def worker(run, input):
        await trio.sleep(input)
        run.usage += Usage(output_tokens=input)
        return f"{input} s"

    async def main(run, input):
        ids = [run.spawn("worker", 3), run.spawn("worker", 1)]
        await trio.sleep(2)
        return ids

    async with opened(Agent("main", main), Agent("worker", worker)) as runs:
        run = begin(runs)
        await trio.sleep(1.5)
        assert {"running", "finished"} == {runs.find(i).state for i in begun_in(run)}
        await run.done.wait()
        assert 3 == trio.current_time()
    assert ("success", begun_in(run)) == (run.end.outcome, run.result)
    assert [("1 s", 1.0, 1), ("3 s", 3.0, 3)] == [
        (event["report"], event["seconds"], event["usage"]["output_tokens"])
        for event in told(run, "agent_finished")
    ]
    for number, one in enumerate(run.result, 1):
        events = runs.find(one).log.events
        assert {(f"worker:{number}",)} == {event.path for event in events}
        assert run.id == runs.find(one).parent_id


def begun_in(run):
    return [event["child_run_id"] for event in told(run, "agent_started")]


async def fail_with_words(run, input):
    await trio.lowlevel.checkpoint()
    raise AgentError("too much", code="much")


async def crash(run, input):
    await trio.lowlevel.checkpoint()
    raise ValueError("secret")


async def succeed(run, input):
    await trio.lowlevel.checkpoint()
    return "well"


async def last(run, input):
    await trio.sleep_forever()


async def cancel_itself(run, input):
    run.nursery.cancel_scope.cancel()
    await trio.sleep_forever()


async def get_lost(run, input):
    await trio.lowlevel.checkpoint()
    return object()


WORKERS = (fail_with_words, crash, succeed, last, cancel_itself, get_lost)


def reports(run):
    """How each child went, by its agent's name; that there is one report for each."""
    finished = told(run, "agent_finished")
    assert sorted(begun_in(run)) == sorted(event["child_run_id"] for event in finished)
    return {event["agent"]: event.get("report") or event["error"]["message"] for event in finished}


async def test_what_becomes_of_a_worker_stands_in_its_report_alone(autojump_clock):
    """In every way of ending; the run above goes on, and succeeds."""

    async def main(run, input):
        for worker in WORKERS:
            run.spawn(Agent(worker.__name__, worker), None)
        await trio.sleep(1)
        (lasting,) = run.host.children
        lasting.cancel("client_cancel")
        await trio.sleep(1)
        return "fine"

    run = await play(main)
    words = reports(run)
    assert ("success", "fine", None, None) == end(run)
    assert "well" == words.pop("succeed")
    assert {
        "fail_with_words": "too much",
        "crash": "the agent 'crash' raised ValueError; the server's log has the details",
        "last": "it was cancelled",
        "cancel_itself": "expected the agent to return, or to raise, but it cancelled itself",
        "get_lost": "the result of get_lost: expected what JSON can hold, got object at $; "
        "turn it into strings, finite numbers, booleans, lists and dicts",
    } == {name: said.partition(": ")[2] for name, said in words.items()}
    assert ["the agent 'crash'"] == [facts["where"] for facts in crashes(run)]


@pytest.mark.parametrize("ends", ["cancel", "crash", "shutdown", "limit"])
async def test_a_worker_ends_with_the_run_that_started_it(ends, autojump_clock):
    """Whatever ends that, and its report is told all the same."""

    async def main(run, input):
        run.spawn("last", None)
        run.spawn("last", None)
        await trio.sleep(1)
        if ends == "limit":
            for _ in range(50):
                run.emit("more")
        elif ends == "crash":
            raise ValueError
        await trio.sleep_forever()

    async with opened(Agent("main", main), Agent("last", last), max_events=20) as runs:
        run = begin(runs)
        await trio.sleep(2)
        if ends == "cancel":
            run.cancel("client_cancel")
            await run.done.wait()
        elif ends == "shutdown":
            runs.close()
            await runs.wait_idle()
        workers = [one for one in runs if one.parent_id]
    assert {"last": "the child run was cancelled"} == reports(run)
    assert [("cancelled", "parent")] * 2 == [
        (one.end.outcome, one.end.receipt.cause) for one in workers
    ]
    assert ("error" if ends in ("crash", "limit") else "cancelled") == run.end.outcome
    assert "run_finished" == everything_of(run)[-1]["type"]


@pytest.mark.parametrize("who", ["parent", "worker"])
async def test_a_worker_that_is_cancelled_before_its_first_step_has_its_report(who, autojump_clock):
    """It has begun when it is made, and its end is told like any other."""

    async def main(run, input):
        child = runs.find(run.spawn("last", None))
        (child if who == "worker" else run.host).cancel("client_cancel")
        steps.append(child.state)
        await trio.sleep(1)
        return "fine"

    steps = []
    async with opened(Agent("main", main), Agent("last", last)) as runs:
        run = begin(runs)
        await run.done.wait()
        (child,) = (one for one in runs if one.parent_id)
    cause = "client_cancel" if who == "worker" else "parent"
    assert ["cancelling"] == steps
    assert ("success" if who == "worker" else "cancelled") == run.end.outcome
    assert ("cancelled", cause) == (child.end.outcome, child.end.receipt.cause)
    assert 1 == len(reports(run))
    assert [] == told(child)


async def test_a_worker_that_had_succeeded_is_reported_so(autojump_clock):
    """Also where the run above is cancelled before it could take note."""

    async def main(run, input):
        run.spawn("quick", None)
        await trio.sleep_forever()

    async def quick(run, input):
        await trio.sleep(1)
        above[0].nursery.cancel_scope.cancel()
        return "well"

    above = []
    async with opened(Agent("main", main), Agent("quick", quick)) as runs:
        run = begin(runs)
        above.append(run.context)
        await run.done.wait()
    (report,) = told(run, "agent_finished")
    assert ("well", None) == (report["report"], report.get("error"))
    assert ("error", None, "no_result") == end(run)[:3]


async def test_nobody_is_sent_to_work_who_is_not_there(autojump_clock):
    """Neither an agent that nobody knows, nor by a run that is over; nothing is told of it."""

    async def main(run, input):
        with pytest.raises(NotFound, match="got 'nobody'"):
            run.spawn("nobody", None)
        with pytest.raises(BadRequest, match="the input: expected what JSON can hold"):
            run.spawn("last", object())
        await trio.lowlevel.checkpoint()

    async with opened(Agent("main", main), Agent("last", last)) as runs:
        run = begin(runs)
        await run.done.wait()
        with pytest.raises(AgentError, match="which is over"):
            run.context.spawn("last", None)
        assert [run] == list(runs)
    assert [] == told(run)
    assert "success" == run.end.outcome


async def test_nothing_that_was_told_to_begin_stays_open_at_the_bound(autojump_clock):
    """Steps, tools and child runs have their ends; what begins behind the bound is not told."""

    async def main(run, input):
        run.append(ToolStarted(call_id="by hand", name="search", arguments=Raw(b"{}")))
        run.append(AgentStarted(agent="inner"))
        with run.step("outer"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.delegate, "last", None)
                nursery.start_soon(run.call, dawdle, {})
                await trio.testing.wait_all_tasks_blocked()
                while not run.is_full:
                    run.emit("more")
                with run.step("untold"):
                    run.append(AgentFinished(agent="inner"))
                    run.append(AgentFinished(agent="inner"))
                    run.append(AgentStarted(agent="other"))
                    run.append(AgentFinished(agent="other"))
                    run.spawn("last", None)
                    nursery.start_soon(run.call, dawdle, {})
                    await trio.sleep_forever()

    run = await play(main, Agent("last", last), max_events=10, tools=[dawdle])
    assert ("error", None, "limit") == end(run)[:3]
    assert "10 events" in run.end.error.message
    for begins, ends, key in (
        ("step_started", "step_finished", "step_id"),
        ("tool_started", "tool_finished", "call_id"),
        ("agent_started", "agent_finished", "agent"),
    ):
        assert sorted(e[key] for e in told(run, begins)) == sorted(e[key] for e in told(run, ends))
    assert ["inner", "last"] == [event["agent"] for event in told(run, "agent_finished")]
    results = {event["call_id"]: event["result"] for event in told(run, "tool_finished")}
    assert {"error": "the run ended before the tool had answered"} == results.pop("by hand")
    assert [{"error": "the tool 'dawdle' was cancelled"}] == list(results.values())
    assert {} == run.context.open_tools


# Models


def chat(script, **settings):
    provider = ScriptedProvider(script)
    return Agent.of_model("chat", "scripted:m1", **settings), provider


async def test_a_model_agent_answers_with_what_the_model_says(autojump_clock):
    """One step per model call, with its usage; the text is the result, and streamed."""
    usage = Usage(input_tokens=5, output_tokens=2)
    model, provider = chat([[*say("Hello.")[:-1], Finish("stop", usage)]], instructions="Be kind.")
    run = await play(model, providers=[provider], input={"q": 1})
    (prompt,) = provider.prompts
    assert ("success", "Hello.", None, None) == end(run)
    assert usage == run.end.usage
    assert ("m1", ()) == (prompt.model, prompt.tools)
    assert (SystemMessage("Be kind."), UserMessage('{"q":1}')) == prompt.messages
    of = {"step_id": "s1", "kind": "model", "name": "scripted:m1"}
    assert [
        {"type": "step_started", **of},
        *a_part("t1", "text", "Hello."),
        {
            "type": "step_finished",
            **of,
            "usage": msgspec.to_builtins(usage),
            "finish_reason": "stop",
        },
    ] == told(run)


async def test_tools_are_called_side_by_side_and_their_results_stand_in_order(autojump_clock):
    """The second call ends first, and stays the second; errors are for the model to read."""
    calls = (
        ("double", '{"n":1}'),
        ("double", '{"n":9}'),
        ("fail", '{"how":"no"}'),
        ("fail", '{"how":"crash"}'),
        ("gone", ""),
    )
    model, provider = chat([ask_for(*calls), say("18")], tools=[double, fail])
    run = await play(model, providers=[provider], input="Compute.")
    first, second = provider.prompts
    asked = tuple(ToolCall(f"call{n}", *call) for n, call in enumerate(calls, 1))
    assert ["double", "fail"] == [spec.name for spec in first.tools]
    assert double.parameters == first.tools[0].parameters
    assert (
        UserMessage("Compute."),
        AssistantMessage("", asked),
        ToolMessage("call1", "double", "2"),
        ToolMessage("call2", "double", "18"),
        ToolMessage("call3", "fail", "there is no such place", is_error=True),
        ToolMessage(
            "call4",
            "fail",
            "the tool 'fail' raised ValueError; the server's log has the details",
            is_error=True,
        ),
        ToolMessage(
            "call5", "gone", "expected one of the tools double, fail, got 'gone'", is_error=True
        ),
    ) == second.messages
    assert "18" == run.result
    assert {"call1", "call2", "call3", "call4", "call5"} == {
        event["call_id"] for event in told(run, "tool_finished")
    }
    assert "call1" == told(run, "tool_finished")[-1]["call_id"]
    assert ["model", "tool_round", "model"] == [e["kind"] for e in told(run, "step_started")]
    assert 9 == trio.current_time()


async def test_a_model_that_only_calls_tools_is_stopped(autojump_clock):
    """The bound on model calls is an error with a code of its own."""
    model, provider = chat([ask_for(("double", '{"n":1}'))] * 3, tools=[double])
    run = await play(model, providers=[provider], max_steps=3)
    assert (
        "error",
        None,
        "too_many_steps",
        "expected an answer within 3 model calls, got only tool calls",
    ) == end(run)
    assert 3 == len(provider.prompts)


async def test_a_stream_that_ends_without_a_finish_is_an_error(autojump_clock):
    """What was said stays; the step and the run say what was missing."""
    model, provider = chat([say("Hel")[:2]])
    run = await play(model, providers=[provider])
    assert ("error", None, "incomplete") == end(run)[:3]
    assert "got no finish" in run.end.error.message
    assert "got no finish" in told(run, "step_finished")[0]["error"]["message"]
    assert "Hel" == run.snapshot().output
    assert ["Hel"] == [event["text"] for event in told(run, "part_finished")]
    assert 0 == provider.open_streams


async def test_a_provider_that_fails_in_the_middle_leaves_nothing_open(autojump_clock):
    """Parts are finished with what they hold; the provider's words reach the client."""
    lines = [*ask_for(("double", '{"n"'))[:2], *say("Hel")[:2], ProviderError("out of tokens")]
    model, provider = chat([lines])
    run = await play(model, providers=[provider])
    assert ("error", None, "provider_error", "out of tokens") == end(run)
    assert [("k1", "double", '{"n"'), ("t1", None, "Hel")] == [
        (event["part_id"], event.get("name"), event["text"]) for event in told(run, "part_finished")
    ]
    assert "provider_error" == told(run, "step_finished")[0]["error"]["code"]
    assert 0 == provider.open_streams


async def test_a_model_call_too_many_is_the_provider_s_to_refuse(autojump_clock):
    """The scripted one counts them."""
    model, provider = chat([])
    run = await play(model, providers=[provider])
    assert ("error", None, "provider_error", "expected 0 model calls, got one more") == end(run)


async def test_a_model_needs_a_provider_that_somebody_knows(autojump_clock):
    """It comes from the server, or with the agent."""
    model, provider = chat([say("x")])
    run = await play(model)
    assert "expected a provider that the server knows, got 'scripted'" == end(run)[3]
    own = Agent.of_model("own", "any:m", provider=provider)
    assert "x" == (await play(own)).result


async def test_half_a_surrogate_pair_from_a_provider_is_a_crash_of_the_run_alone(autojump_clock):
    """Held back or not, it is refused at once, and the run ends in order."""
    half = PartDelta(part_id="t1", kind="text", delta="\ud800")
    for window in (0, 0.05):
        model, provider = chat([[say("Hel")[0], *[say("Hel")[1], half] * 2, Finish("stop")]])
        run = await play(model, providers=[provider], coalesce=window)
        assert ("error", None, "crashed") == end(run)[:3]
        assert ["Hel"] == [event["text"] for event in told(run, "part_finished")]


async def test_a_delta_without_a_part_is_handed_on(autojump_clock):
    """What a provider makes of its stream is the provider's affair."""
    delta = PartDelta(part_id="stray", kind="text", delta="?")
    model, provider = chat([[delta, Finish("stop")]])
    run = await play(model, providers=[provider])
    assert ("success", "", None, None) == end(run)
    assert ["step_started", "part_delta", "step_finished"] == [e["type"] for e in told(run)]


@attrs.define
class LastWord:
    """A normalizer that holds everything back until the stream has ended."""

    prefix: str
    held: list = attrs.field(factory=list)
    is_over: bool = False

    def feed(self, line):
        """Hold one line."""
        self.held.append(line)
        return ()

    def close(self):
        """Hand on what was held."""
        return self.held


class Hesitant(ScriptedProvider):
    """A provider whose events come with the end of the stream."""

    def normalizer(self, prefix):
        """Make a machine that holds everything back."""
        return LastWord(prefix)


async def test_a_normalizer_may_have_the_last_word(autojump_clock):
    """What it makes of the end of the stream counts like everything before."""
    own = Agent.of_model("own", "any:m", provider=Hesitant([say("late")]))
    assert "late" == (await play(own)).result


RAW = Raw(b'{"x":1}')
STEP = {"step_id": "x", "kind": "node", "name": "n"}
EVERYTHING = (
    StepStarted(**STEP),
    StepFinished(**STEP, result=RAW, finish_reason="other", usage=Usage(input_tokens=1)),
    PartStarted(part_id="a", kind="refusal"),
    PartDelta(part_id="a", kind="refusal", delta="no"),
    PartFinished(part_id="a", kind="refusal", text="no"),
    ToolStarted(call_id="b", name="n", arguments=RAW),
    ToolOutputDelta(call_id="b", delta="..."),
    ToolFinished(call_id="b", name="n", result=RAW, is_error=False, source="provider"),
    AgentStarted(agent="n"),
    AgentFinished(agent="n", report=RAW),
    InputRequested(request_id="c", questions=(CHOICE,)),
    InputReceived(request_id="c", answers=Raw(b'{"colour":"red"}')),
    InputWithdrawn(request_id="d"),
    MessageReceived(message_id="e", text="Go on.", mode="steer"),
    Paused(reason="lunch"),
    Resumed(),
    ValuesChanged(values=RAW),
    Retry(attempt=1, max=6, delay_s=2.0, error=Problem(code="busy", message="busy")),
    Failover(from_model="a:a", to_model="b:b", reason="busy"),
    Liveness(elapsed_s=10.0, events=3, since_last_output_s=1.5),
    Stalled(idle_s=600.0, limit_s=600.0),
    LoopDetected(fingerprint="f", repeats=10),
    ContextUsage(ratio=0.9, tokens=9, limit=10),
    Compacted(ratio_before=0.9, ratio_after=0.1),
    Moderation(violation=True, message="no", metadata=RAW),
    Custom(name="n", value=RAW),
    ProviderEvent(provider="scripted", raw=RAW, path=("worker:3",)),
)


async def test_a_script_can_make_every_event_happen(autojump_clock):
    """Each arrives as it was said, but for the envelope; a run's ends and feeds are their own."""
    not_said = ("gap", "trigger_changed", "run_started", "run_finished")
    assert {type(event) for event in EVERYTHING} == set(EVENT_TYPES.values()) - {
        EVENT_TYPES[name] for name in not_said
    }
    plain = [decode_json(encode_event(event)) for event in EVERYTHING]
    model, provider = chat([[*EVERYTHING, 0.1, Finish("stop")]])
    run = await play(model, providers=[provider], coalesce=0.05)
    assert ("success", "no", None, None) == end(run)
    assert plain == told(run)[1:-1]
    assert plain == [decode_json(encode_event(event)) for event in EVERYTHING]


async def test_what_somebody_else_has_formatted_arrives_whole(autojump_clock):
    """JSON from upstream may hold line ends; in a frame each is a line of data."""
    pretty = msgspec.json.format(b'{"x":[1,"a\\r\\n"]}', indent=2)
    lines = [Raw(pretty), Raw(pretty.replace(b"\n", b"\r\n")), Raw(pretty.replace(b"\n", b"\r"))]
    events = [ProviderEvent(provider="scripted", raw=raw) for raw in lines]
    model, provider = chat([[*events, Finish("stop")]])
    run = await play(model, providers=[provider])
    reader = run.attach("native", lambda: NativeEncoder(None), START)
    frames = Decoder().feed(reader.take())
    assert [(str(n), e["type"]) for n, e in enumerate(everything_of(run), 1)] == [
        (frame.id, frame.event) for frame in frames
    ]
    assert everything_of(run) == [decode_json(frame.data) for frame in frames]
    assert [{"x": [1, "a\r\n"]}] * 3 == [event["raw"] for event in told(run, "provider_event")]


def everything_of(run):
    return [decode_json(encode_event(event)) for event in run.log.events]


async def test_what_an_agent_returns_must_be_json(autojump_clock):
    """Else the run is an error that says where."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        return {"x": [object()]}

    run = await play(main)
    assert ("error", None, "unencodable") == end(run)[:3]
    assert "the result of main: expected what JSON can hold, got object at $.x[0]" in end(run)[3]


async def test_an_input_is_the_run_s_own_copy(autojump_clock):
    """What the caller changes afterwards does not reach the agent, nor the log."""
    given = {"places": ["Brno"]}

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        return input

    async def spoil(run, input):
        await trio.lowlevel.checkpoint()
        assert input is run.input
        input["places"].clear()

    async with opened(Agent("main", main), Agent("spoil", spoil)) as runs:
        both = [begin(runs, name, given) for name in ("main", "spoil")]
        given["places"].clear()
        await runs.wait_idle()
    assert {"places": ["Brno"]} == both[0].result
    for run in both:
        assert {"places": ["Brno"]} == msgspec.json.decode(run.snapshot().input)
        assert run.context.input is None


# What tools print


async def test_what_a_tool_prints_is_streamed_while_it_works(autojump_clock):
    """Each call has its own output, before its end."""

    @tool
    async def count(n: int) -> int:
        """Count."""
        for number in range(n):
            write_output(f"{number}\n")
            await trio.sleep(1)
        return n

    async def main(run, input):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.call, count, {"n": 2})
            nursery.start_soon(run.call, count, {"n": 3})
        write_output("nobody is called")

    run = await play(main)
    printed = {}
    for event in told(run, "tool_output_delta"):
        printed[event["call_id"]] = printed.get(event["call_id"], "") + event["delta"]
    results = {e["call_id"]: e["result"] for e in told(run, "tool_finished")}
    assert {2: "0\n1\n", 3: "0\n1\n2\n"} == {results[one]: text for one, text in printed.items()}
    assert "tool_finished" == told(run)[-1]["type"]


async def test_what_a_blocking_tool_prints_is_streamed_from_its_thread():
    """As with `emit`; what comes when the call is over is dropped."""
    go, gone = threading.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    @tool
    def work() -> str:
        """Work."""
        write_output("half \ud83d")
        go.wait(SECONDS)
        write_output("too late")
        token.run_sync_soon(gone.set)
        return "done"

    async def main(run, input):
        with trio.move_on_after(0.05):
            await run.call(work, {})

    run = await play(main, cleanup=0)
    go.set()
    with trio.fail_after(SECONDS):
        await gone.wait()
    assert ["half \ufffd"] == [event["delta"] for event in told(run, "tool_output_delta")]
    assert [True] == [event["is_error"] for event in told(run, "tool_finished")]


async def test_a_program_is_a_tool_that_is_killed_with_its_run():
    """What it prints is streamed; the cancel waits until it is gone."""

    @tool
    async def shout() -> str:
        """Shout."""
        return await run_program(
            [sys.executable, "-uc", "import time; print('here'); time.sleep(1000)"]
        )

    async def main(run, input):
        await run.call(shout, {})

    with trio.fail_after(SECONDS):
        async with opened(Agent("main", main)) as runs:
            run = begin(runs)
            await wait_until(lambda: told(run, "tool_output_delta"))
            run.cancel("client_cancel")
            await run.done.wait()
    printed = [event["delta"] for event in told(run, "tool_output_delta")]
    assert "here" == "".join(printed).strip()
    assert "cancelled" == run.end.outcome


async def test_what_a_thread_hands_in_may_be_wrong_and_ends_nothing():
    """Whoever writes what is no text hears of it; an event that cannot be encoded is reported."""
    told_of, token = [], trio.lowlevel.current_trio_token()
    done = trio.Event()

    @tool
    def work(to: str) -> str:
        """Work."""
        try:
            write_output(b"bytes")
        except TypeError as error:
            told_of.append(str(error))
        running[0].hand_in(PartDelta(part_id="p", kind="text", delta=5))
        token.run_sync_soon(done.set)
        return to

    async def main(run, input):
        running.append(run)
        result = await run.call(work, {"to": "end"})
        await done.wait()
        return result

    running = []
    with trio.fail_after(SECONDS):
        run = await play(main)
    assert ("success", "end") == end(run)[:2]
    assert ["write_output: expected a str, got bytes; decode it"] == told_of
    assert ["an event of a thread"] == [crash["where"] for crash in crashes(run)]


async def test_nothing_is_watched_outside_of_a_step(autojump_clock):
    """There is nothing that could be stalled."""

    async def main(run, input):
        with run.watched():
            await trio.sleep(3_000)
        return run.window

    run = await play(main, coalesce=0.5)
    assert ("success", 0.5) == end(run)[:2]


async def test_a_provider_waits_with_others_and_lets_out_what_has_come(autojump_clock):
    """What came together is joined, and seen as soon as more is waited for."""

    async def main(run, input):
        run.text("a")
        await run.sleep_until(trio.current_time() + 20)
        run.lull()
        run.text("b")
        run.text("c")
        seen = [run.writer.log.end]
        run.lull()
        return [*seen, run.writer.log.end]

    run = await play(main, coalesce=10)
    assert [3, 4] == run.result
    assert ["a", "bc"] == [event["delta"] for event in told(run, "part_delta")]
    assert 20 <= trio.current_time() < 20.1
