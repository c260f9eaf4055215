"""What a flow does: its steps in order, what is decided between them, and what is tried again.

The engine is the real one, without HTTP, and time is virtual.
"""

import functools
import itertools
import re

import attrs
import pytest
import trio
import trio.testing
from test_agents import a_part, begin, crashes, end, opened, play, told
from test_cancel_everywhere import Blow

from agentsse.agents import Agent, agent
from agentsse.dialects import Start
from agentsse.errors import AgentError, ProviderError, ToolError
from agentsse.events import AgentFinished, AgentStarted, RunFinished, StepFinished, StepStarted
from agentsse.flows import FlowStep, flow
from agentsse.messages import UserMessage
from agentsse.models import ModelLoop
from agentsse.providers import Finish
from agentsse.runs import open_runs
from agentsse.testing import ScriptedProvider, ask_for, say
from agentsse.tools import tool


async def give_back(run, input):
    """Return what comes in."""
    await trio.lowlevel.checkpoint()
    return input


async def add_one(run, input):
    """Count."""
    await trio.lowlevel.checkpoint()
    return input + 1


EARLY = AgentError("not yet", code="early", status=409)


def failing(times, result="done", *, error=EARLY):
    """A step's function that fails so many times before it gives a result."""
    left = [error] * times

    async def function(run, input):
        await trio.lowlevel.checkpoint()
        if left:
            raise left.pop()
        return result

    return function


def steps_of(run):
    """The names of the steps that were begun."""
    return [event["name"] for event in told(run, "step_started")]


def model(name, *script, **settings):
    provider = ScriptedProvider(script, name=name)
    return Agent.of_model(name, f"{name}:m", provider=provider, **settings), provider


# Order


async def test_steps_follow_one_another_and_hand_on_their_results(autojump_clock):
    """The first is given the run's input, a later one what came before; the last has the result."""
    run = await play(
        flow(
            "main",
            FlowStep("one", add_one, "two"),
            FlowStep("two", add_one, "three"),
            FlowStep("three", lambda_of("so {}")),
        ),
        input=1,
    )
    assert ("success", "so 3", None, None) == end(run)
    of = [
        {"step_id": f"s{n}", "kind": "flow", "name": name}
        for n, name in enumerate(("one", "two", "three"), 1)
    ]
    assert [
        {"type": "step_started", **of[0]},
        {"type": "step_finished", **of[0], "result": 2},
        {"type": "step_started", **of[1]},
        {"type": "step_finished", **of[1], "result": 3},
        {"type": "step_started", **of[2]},
        {"type": "step_finished", **of[2], "result": "so 3"},
    ] == told(run)


def lambda_of(words):
    async def function(run, input):
        await trio.lowlevel.checkpoint()
        return words.format(input)

    return function


async def test_any_step_may_be_the_first(autojump_clock):
    """`start` names it; the others stand in any order."""
    steps = FlowStep("end", give_back), FlowStep("begin", give_back, "end")
    run = await play(flow("main", *steps, start="begin"), input="x")
    assert ("success", "x") == end(run)[:2]
    assert ["begin", "end"] == steps_of(run)
    assert ["end"] == steps_of(await play(flow("main", *steps)))


@pytest.mark.parametrize(
    ("then", "result", "following"),
    [
        ({"DNS": "a", "WLAN": "b"}, "DNS", ["a"]),
        ({"DNS": "a", "WLAN": "b"}, "WLAN", ["b"]),
        ({"DNS": "a", "WLAN": None}, "WLAN", []),
        ({True: "a", False: "b"}, False, ["b"]),
        ({None: "a"}, None, ["a"]),
        (lambda result: "a" if result > 3 else "b", 4, ["a"]),
        (lambda result: "a" if result > 3 else "b", 3, ["b"]),
        (lambda _result: None, 3, []),
        (None, 3, []),
        ("b", 3, ["b"]),
    ],
)
async def test_code_decides_what_comes_next(then, result, following, autojump_clock):
    """A name, a mapping from the result, or a function of it; None ends the flow."""
    main = flow(
        "main",
        FlowStep("decide", failing(0, result), then),
        FlowStep("a", give_back),
        FlowStep("b", give_back),
    )
    run = await play(main)
    assert ("success", result) == end(run)[:2]
    assert ["decide", *following] == steps_of(run)


@pytest.mark.parametrize(
    ("then", "result", "words"),
    [
        (
            {"DNS": "decide", 4: None},
            "Mail",
            (
                "expected the step 'decide' to have one of the results 'DNS', 4, got 'Mail': add "
                "it to its 'then', or make that a function"
            ),
        ),
        (
            {"DNS": "decide"},
            ["DNS"],
            (
                "expected the step 'decide' to have one of the results 'DNS', got ['DNS']: add "
                "it to its 'then', or make that a function"
            ),
        ),
        (
            lambda result: result,
            "nowhere",
            (
                "expected one of the steps decide, or None, after 'decide', got 'nowhere': see "
                "what its 'then' returns"
            ),
        ),
        (
            lambda result: [result],
            "decide",
            (
                "expected one of the steps decide, or None, after 'decide', got ['decide']: see "
                "what its 'then' returns"
            ),
        ),
    ],
)
async def test_a_step_that_there_is_not_ends_the_run(then, result, words, autojump_clock):
    """The step itself has succeeded; the run says what was expected and what came."""
    run = await play(flow("main", FlowStep("decide", failing(0, result), then)))
    assert ("error", None, "unknown_step", words) == end(run)
    (step,) = told(run, "step_finished")
    assert "error" not in step


async def test_a_condition_that_raises_ends_the_run_and_not_the_step(autojump_clock):
    """Its words are for the server's log, as those of any other code."""
    run = await play(flow("main", FlowStep("decide", give_back, lambda result: result["kind"])))
    assert ("error", "crashed") == (run.end.outcome, run.end.error.code)
    (step,) = told(run, "step_finished")
    assert "error" not in step
    assert 1 == len(crashes(run))


async def test_a_flow_that_goes_in_a_circle_is_ended(autojump_clock):
    """After 25 steps, or as many as it may have; it is not tried again."""
    circle = FlowStep("again", give_back, "again", tries=3)
    run = await play(flow("main", circle, tries=3))
    words = (
        "expected the flow 'main' to end within 25 steps, got to 'again' after them: end the "
        "circle in a 'then', or raise max_steps"
    )
    assert ("error", None, "too_many_steps", words) == end(run)
    assert 25 == len(steps_of(run))
    assert [] == told(run, "retry")

    count = FlowStep("count", add_one, lambda n: "count" if n < 7 else None)
    assert ("success", 7) == end(await play(flow("main", count, max_steps=7), input=0))[:2]
    assert "too_many_steps" == end(await play(flow("main", count, max_steps=6), input=0))[2]


async def test_each_step_has_a_copy_of_its_input(autojump_clock):
    """What it does to it changes neither the run's input nor what another try is given."""

    async def spoil(run, input):
        await trio.lowlevel.checkpoint()
        input["seen"].append(len(run.input["seen"]))
        if len(tries) < 2:
            tries.append(input)
            raise ValueError
        return (input["seen"], run.input["seen"])

    tries = []
    run = await play(flow("main", FlowStep("spoil", spoil, tries=3)), input={"seen": []})
    assert [{"seen": [0]}, {"seen": [0]}] == tries
    assert ("success", [[0], []]) == end(run)[:2]


async def test_a_result_that_json_cannot_hold_is_an_error_of_its_step(autojump_clock):
    """No step comes after it."""
    run = await play(
        flow("main", FlowStep("one", failing(0, object()), "two"), FlowStep("two", give_back))
    )
    assert "unencodable" == end(run)[2]
    assert ["one"] == steps_of(run)
    (step,) = told(run, "step_finished")
    assert "unencodable" == step["error"]["code"]


# Agents as steps


@agent
async def greet(run, input):
    """Say hello."""
    run.text("Hello ")
    await trio.lowlevel.checkpoint()
    run.text(input)
    return {"greeted": input}


async def test_an_agent_does_a_step_within_the_same_run(autojump_clock):
    """It is told to begin and to end, with what it was given and what it returned."""
    run = await play(flow("main", FlowStep("welcome", greet)), input="you")
    of = {"step_id": "s1", "kind": "flow", "name": "welcome"}
    assert [
        {"type": "step_started", **of},
        {"type": "agent_started", "agent": "greet", "input": "you"},
        *a_part("p2", "text", "Hello ", "you"),
        {"type": "agent_finished", "agent": "greet", "report": {"greeted": "you"}},
        {"type": "step_finished", **of, "result": {"greeted": "you"}},
    ] == told(run)
    assert {"greeted": "you"} == run.result


async def test_an_agent_that_fails_is_told_to_have_ended_so(autojump_clock):
    """Its end, the step's and the run's have the error; of one that is not ours, the type."""
    no = AgentError("no such city", code="city", status=404)
    run = await play(flow("main", FlowStep("look", Agent("finder", failing(1, error=no)))))
    problem = {"code": "city", "message": "no such city", "status": 404}
    assert [problem, problem] == [e["error"] for e in told(run, "agent_finished", "step_finished")]
    assert ("error", None, "city", "no such city") == end(run)

    run = await play(flow("main", FlowStep("look", Agent("finder", failing(1, error=KeyError())))))
    assert [
        "the agent 'finder' raised KeyError; the server's log has the details",
        "the step 'look' raised KeyError; the server's log has the details",
    ] == [e["error"]["message"] for e in told(run, "agent_finished", "step_finished")]
    assert 1 == len(crashes(run))


async def test_a_model_does_a_step_with_its_own_tools(autojump_clock):
    """What it is told is the step's input, and nothing of the thread; its answer is the result."""

    @tool
    async def look_up(word: str) -> str:
        """Look up."""
        await trio.lowlevel.checkpoint()
        return f"what {word} means"

    script = [ask_for(("look_up", '{"word": "a"}')), [*say("DNS")[:-1], Finish("stop")]]
    triager, provider = model("m", *script, tools=[look_up], instructions="Triage.")
    main = flow(
        "main", FlowStep("triage", triager, {"DNS": "fix"}), FlowStep("fix", lambda_of("{} fixed"))
    )
    run = await play(main, input={"q": 1})
    assert ("success", "DNS fixed") == end(run)[:2]
    assert UserMessage('{"q":1}') == provider.prompts[0].messages[1]
    assert ["triage", "m:m", "tools", "m:m", "fix"] == steps_of(run)
    assert ["what a means"] == [event["result"] for event in told(run, "tool_finished")]
    assert [] == run.context.conversation


async def test_in_a_thread_the_flow_is_remembered_and_not_its_steps(autojump_clock):
    """A later run is told the input and what was said; a step's model is told neither."""
    triager, provider = model("m", say("DNS"), say("WLAN"))
    main = flow("main", FlowStep("triage", triager))
    async with opened(main) as runs:
        for message in ("first", "second"):
            order = Start(agent="main", input=message, delivery="stream", thread_id="t")
            run, _ = runs.start(order, default="continue")
            await run.done.wait()
        assert 2 == len(run.conversation)
    assert [(UserMessage("first"),), (UserMessage("second"),)] == [
        prompt.messages for prompt in provider.prompts
    ]


async def test_a_function_finds_the_tools_of_its_agent_by_name(autojump_clock):
    """So do the flow's other functions; and those that the flow itself was given."""

    @tool
    async def double(n: int) -> int:
        """Double."""
        await trio.lowlevel.checkpoint()
        return 2 * n

    @tool
    async def negate(n: int) -> int:
        """Negate."""
        await trio.lowlevel.checkpoint()
        return -n

    async def use(run, input):
        return await run.call("negate", {"n": await run.call("double", {"n": input})})

    using = Agent("using", use, tools=[double])
    run = await play(
        flow(
            "main",
            FlowStep("agent", using, "function"),
            FlowStep("function", use, "inner"),
            FlowStep("inner", flow("inner", FlowStep("more", using), tools=[double])),
            tools=[negate, double],
        ),
        input=3,
    )
    assert ("success", -24) == end(run)[:2]
    assert ["negate", "double"] == [one.name for one in run.agent.tools]


async def test_the_tools_of_a_model_are_for_the_model_alone(autojump_clock):
    """So two models may each have a `search`."""

    def search_of(words):
        @tool
        async def search() -> str:
            """Search."""
            await trio.lowlevel.checkpoint()
            return words

        return search

    async def use(run, input):
        with pytest.raises(ToolError, match=r"one of the tools \(none\), got 'search'"):
            await run.call("search", {})

    one, _ = model("a", ask_for(("search", "{}")), say("1"), tools=[search_of("first")])
    two, _ = model("b", ask_for(("search", "{}")), say("2"), tools=[search_of("second")])
    run = await play(
        flow("main", FlowStep("1", one, "2"), FlowStep("2", two, "3"), FlowStep("3", use))
    )
    assert ("success", None) == end(run)[:2]
    assert [{"first"}, {"second"}, {"expected"}] == [
        {str(e["result"]).split()[0]} if isinstance(e["result"], str) else {"expected"}
        for e in told(run, "tool_finished")
    ]
    with pytest.raises(ValueError, match="different names, got two of search"):
        flow(
            "main",
            FlowStep("1", Agent("a", use, tools=[search_of("first")])),
            FlowStep("2", Agent("b", use, tools=[search_of("second")])),
        )


def test_a_flow_wants_the_providers_of_its_models():
    """The server sees to them before anything is started."""
    own, _ = model("own")
    one = Agent.of_model("one", "openai:x", fallbacks=["gemini:y"])
    inner = flow("inner", FlowStep("deep", Agent.of_model("two", "local:z")), FlowStep("own", own))
    main = flow("main", FlowStep("1", one, "2"), FlowStep("2", inner), FlowStep("3", give_back))
    assert {"openai", "gemini", "local"} == main.wanted_providers
    assert not isinstance(main.function, ModelLoop)
    assert (main.name, main.description) == ("main", "")
    assert ("grace", "Told.") == attrs.astuple(
        flow("f", FlowStep("s", one), on_disconnect="grace", description="Told."),
        filter=lambda field, _value: field.name in ("on_disconnect", "description"),
    )[::-1]


async def test_a_flow_can_be_a_step_of_another_one(autojump_clock):
    """It is an agent like any other, and its steps are within the step."""
    inner = flow("inner", FlowStep("deep", add_one, "deeper"), FlowStep("deeper", add_one))
    run = await play(flow("main", FlowStep("outer", inner)), input=1)
    assert ("success", 3) == end(run)[:2]
    assert [
        ("step_started", "outer"),
        ("agent_started", "inner"),
        *(("step_started", "deep"), ("step_finished", "deep")),
        *(("step_started", "deeper"), ("step_finished", "deeper")),
        ("agent_finished", "inner"),
        ("step_finished", "outer"),
    ] == [(event["type"], event.get("name") or event["agent"]) for event in told(run)]


async def test_a_flow_can_be_delegated_to(autojump_clock):
    """As a child run it has a log of its own."""

    async def main(run, input):
        return await run.delegate("inner", input)

    run = await play(Agent("main", main), flow("inner", FlowStep("deep", add_one)), input=1)
    assert ("success", 2) == end(run)[:2]
    assert ["agent_started", "agent_finished"] == [event["type"] for event in told(run)]


# People


async def test_a_step_can_ask_a_person(autojump_clock):
    """The flow waits there, and goes on with the answer."""

    async def ask(run, input):
        return await run.ask(f"Is it {input}?")

    main = flow("main", FlowStep("ask", ask, {"yes": "act"}), FlowStep("act", lambda_of("{}!")))
    async with opened(main) as runs:
        run = begin(runs, input="DNS")
        await trio.testing.wait_all_tasks_blocked()
        assert ("waiting", ["ask"]) == (run.state, steps_of(run))
        run.context.answer(*run.context.asked, {"answer": "yes"})
        await run.done.wait()
    assert ("success", "yes!") == end(run)[:2]
    assert ["step_started", "input_requested", "input_received", "step_finished"] == [
        event["type"] for event in told(run)
    ][:4]


async def test_a_paused_flow_rests_before_its_next_step(autojump_clock):
    """The step that is under way is finished first."""

    async def pause(run, input):
        await trio.lowlevel.checkpoint()
        run.pause("lunch")

    main = flow("main", FlowStep("one", pause, "two"), FlowStep("two", give_back))
    async with opened(main) as runs:
        run = begin(runs)
        await trio.sleep(1_000)
        assert ["one"] == steps_of(run)
        run.context.resume()
        await run.done.wait()
    assert [
        *("step_started", "step_finished"),
        *("paused", "resumed"),
        *("step_started", "step_finished"),
    ] == [event["type"] for event in told(run)]


# Trying again


async def test_a_step_that_failed_is_tried_again_as_often_as_it_may(autojump_clock):
    """Each time that is told, within the one step."""
    run = await play(flow("main", FlowStep("try", failing(2), tries=3)))
    assert ("success", "done") == end(run)[:2]
    problem = {"code": "early", "message": "not yet", "status": 409}
    retry = {"type": "retry", "max": 3, "delay_s": 0.0, "error": problem}
    of = {"step_id": "s1", "kind": "flow", "name": "try"}
    assert [
        {"type": "step_started", **of},
        retry | {"attempt": 1},
        retry | {"attempt": 2},
        {"type": "step_finished", **of, "result": "done"},
    ] == told(run)


async def test_the_last_error_is_that_of_the_step_and_of_the_run(autojump_clock):
    """Without `tries` the first one is the last."""
    for tries in (1, 2):
        run = await play(flow("main", FlowStep("try", failing(9), tries=tries)))
        assert ("error", None, "early", "not yet") == end(run)
        assert tries - 1 == len(told(run, "retry"))
        (step,) = told(run, "step_finished")
        assert "early" == step["error"]["code"]


async def test_what_a_failed_try_has_shown_stays(autojump_clock):
    """An agent that is tried again begins and ends twice, and the retry stands between."""
    left = [ValueError("secret")]

    async def speak(run, input):
        await trio.lowlevel.checkpoint()
        run.text("So")
        if left:
            raise left.pop()
        return input

    run = await play(flow("main", FlowStep("try", Agent("speaker", speak), tries=2)), input=1)
    part = ["part_started", "part_delta", "part_finished"]
    assert [
        *("step_started", "agent_started", *part, "agent_finished"),
        "retry",
        *("agent_started", *part, "agent_finished", "step_finished"),
    ] == [event["type"] for event in told(run)]
    (retry,) = told(run, "retry")
    assert {
        "code": "crashed",
        "message": "the step 'try' raised ValueError; the server's log has the details",
        "status": 500,
    } == retry["error"]
    assert ["the step 'try'"] == [facts["where"] for facts in crashes(run)]
    assert ("success", 1) == end(run)[:2]


async def test_a_whole_flow_is_tried_again_from_its_start(autojump_clock):
    """With the run's input once more; each try may have as many steps as the first."""
    main = flow(
        "main",
        FlowStep("one", add_one, "two"),
        FlowStep("two", add_one, "three"),
        FlowStep("three", failing(2, error=ValueError("secret")), lambda _result: "end"),
        FlowStep("end", give_back),
        tries=3,
        max_steps=4,
    )
    run = await play(main, input=1)
    assert ("success", "done") == end(run)[:2]
    assert [*["one", "two", "three"] * 3, "end"] == steps_of(run)
    assert {2} == {e["result"] for e in told(run, "step_finished") if e["name"] == "one"}
    retries = told(run, "retry")
    assert [(1, 3), (2, 3)] == [(event["attempt"], event["max"]) for event in retries]
    assert {"the flow 'main' raised ValueError; the server's log has the details"} == {
        event["error"]["message"] for event in retries
    }
    assert ["the flow 'main'"] * 2 == [facts["where"] for facts in crashes(run)]


async def test_a_wrong_turn_may_be_right_the_next_time(autojump_clock):
    """A result that leads nowhere is a reason to try the whole again: a model may say another."""
    triager, provider = model("m", say("Mail"), say("DNS"))
    main = flow("main", FlowStep("triage", triager, {"DNS": None}), tries=2)
    run = await play(main, input="?")
    assert ("success", "DNS") == end(run)[:2]
    assert ["unknown_step"] == [event["error"]["code"] for event in told(run, "retry")]
    assert 2 == len(provider.prompts)


@pytest.mark.parametrize(
    "error",
    [
        ProviderError("no", code="auth"),
        ProviderError("no", code="context_length"),
        AgentError("no", code="loop_detected"),
        AgentError("no", code="too_many_steps"),
        ExceptionGroup("of one", [ProviderError("no", code="auth")]),
    ],
    ids=repr,
)
async def test_what_would_fail_again_is_not_tried_again(error, autojump_clock):
    """One try, and its error, however many there may be."""
    run = await play(flow("main", FlowStep("try", failing(9, error=error), tries=3), tries=3))
    assert ("error", None, "no") == (*end(run)[:2], end(run)[3])
    assert [] == told(run, "retry")


@pytest.mark.parametrize(
    "error",
    [
        ProviderError("no", code="quota"),
        ToolError("no"),
        ExceptionGroup("of two", [ValueError(), KeyError()]),
    ],
    ids=repr,
)
async def test_anything_else_is_tried_again(error, autojump_clock):
    """A group of errors is an error."""
    run = await play(flow("main", FlowStep("try", failing(1, error=error), tries=2)))
    assert ("success", "done") == end(run)[:2]
    assert 1 == len(told(run, "retry"))


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit("x")], ids=repr)
async def test_what_is_no_exception_is_not_tried_again(error, autojump_clock):
    """A tool that wants to end the process, for instance."""
    run = await play(flow("main", FlowStep("try", failing(1, error=error), tries=3), tries=3))
    assert "error" == run.end.outcome
    assert [] == told(run, "retry")


async def test_a_cancelled_step_is_not_tried_again(autojump_clock):
    """It ends as cancelled, and with it everything; the log has an end for each beginning."""

    async def hang(run, input):
        run.text("hm")
        await trio.sleep_forever()

    main = flow("main", FlowStep("hang", Agent("hanging", hang), tries=3), tries=3)
    async with opened(main) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel("client_cancel")
        await run.done.wait()
    assert ("cancelled", None, None, None) == end(run)
    assert [
        *("step_started", "agent_started", "part_started", "part_delta", "part_finished"),
        *("agent_finished", "step_finished"),
    ] == [event["type"] for event in told(run)]
    assert ["cancelled", "cancelled"] == [
        event["error"]["code"] for event in told(run, "agent_finished", "step_finished")
    ]


@pytest.mark.parametrize("from_outside", [False, True])
async def test_what_fails_in_its_cleanup_is_not_tried_again(from_outside, autojump_clock):
    """The error came of the cancel: nothing is begun any more, and it stands beside the end."""

    async def hang(run, input):
        try:
            await trio.sleep_forever()
        finally:
            raise AgentError("not tidied up", code="untidy")

    main = flow("main", FlowStep("hang", hang, tries=3), tries=3)
    async with opened(main) as runs:
        run = begin(runs)
        await trio.testing.wait_all_tasks_blocked()
        if from_outside:
            runs.nursery.cancel_scope.cancel()
        else:
            run.cancel("client_cancel")
        with trio.CancelScope(shield=True):
            await run.done.wait()
    assert [] == told(run, "retry")
    assert ["untidy"] == [event["error"]["code"] for event in told(run, "step_finished")]
    assert "untidy" == end(run)[2]


async def test_a_cancel_between_two_tries_is_heeded(autojump_clock):
    """Also where the step itself never waits."""
    tries = []

    async def fail(run, input):  # noqa: ASYNC124  # that is what the test is about
        tries.append(input)
        if len(tries) == 2:
            cancel()
        raise ValueError

    async with opened(flow("main", FlowStep("try", fail, tries=9), tries=9)) as runs:
        run = begin(runs)
        cancel = functools.partial(run.cancel, "client_cancel")
        await run.done.wait()
    assert "cancelled" == run.end.outcome
    assert 2 == len(tries)
    assert 1 == len(told(run, "retry"))


# Definitions


@pytest.mark.parametrize(
    ("define", "words"),
    [
        (lambda: flow("main"), "flow 'main': expected at least one step, got none"),
        (
            lambda: flow("main", FlowStep("a", give_back), FlowStep("a", give_back)),
            "flow 'main': expected steps of different names, got two of a",
        ),
        (
            lambda: flow("main", *[FlowStep("a", give_back)] * 2),
            "flow 'main': expected steps of different names, got two of a",
        ),
        (
            lambda: flow("main", FlowStep("a", give_back), start="b"),
            "flow 'main': start: expected one of a, got 'b'",
        ),
        (
            lambda: flow("main", FlowStep("a", give_back, "b")),
            "flow 'main': step 'a': then: expected one of a, got 'b'",
        ),
        (
            lambda: flow("main", FlowStep("a", give_back, {1: "c", 2: "a", 3: None, 4: "b"})),
            "flow 'main': step 'a': then: expected one of a, got 'b', 'c'",
        ),
        (
            lambda: flow("main", FlowStep("a", give_back), max_steps=0),
            "max_steps: expected a number from 1 on, got 0",
        ),
        (
            lambda: flow("main", FlowStep("a", give_back), tries=0),
            "tries: expected a number from 1 on, got 0",
        ),
        (
            lambda: FlowStep("a", give_back, tries="2"),
            "tries: expected a number from 1 on, got '2'",
        ),
        (
            lambda: FlowStep("", give_back),
            "name: expected a step's name of printable characters, got ''",
        ),
        (
            lambda: FlowStep("a\n", give_back),
            "name: expected a step's name of printable characters, got 'a\\n'",
        ),
        (
            lambda: flow("no name", FlowStep("a", give_back)),
            "expected an agent's name of 1 to 64 letters, digits, '-', '_' and '.', got 'no name'",
        ),
    ],
)
def test_a_flow_that_makes_no_sense_is_refused(define, words):
    """Where it is defined, in words that say what was expected."""
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        define()


@pytest.mark.parametrize(
    ("define", "words"),
    [
        (lambda: FlowStep("a", print), "an agent or an async function .* write 'async def'"),
        (lambda: FlowStep("a", None), "an agent or an async function .* got None"),
        (lambda: FlowStep("a", give_back, give_back), "a sync function .* a step of its own"),
        (lambda: FlowStep("a", give_back, 3), "a step's name, .* got 3"),
        (lambda: FlowStep("a", give_back, {"x": ["b"]}), r"a step's name, .* got \{'x'"),
    ],
)
def test_a_step_is_what_it_should_be(define, words):
    """What is neither agent nor async function does nothing, and only sync code decides."""
    with pytest.raises(TypeError, match=words):
        define()


async def test_a_mapping_is_kept_as_it_was(autojump_clock):
    """Whoever has it may change it; the flow does not."""
    then = {1: None}
    main = flow("main", FlowStep("one", give_back, then))
    then[1] = "nowhere"
    assert ("success", 1) == end(await play(main, input=1))[:2]


# Cancelled everywhere


@attrs.define
class Scenario:
    """A flow of everything: agents, a model, tools, a child run, tries that fail, another flow."""

    left: list = attrs.field(factory=lambda: [ValueError(), AgentError("no", code="early")])

    def agents(self):
        """The flow, and what it delegates to."""

        @tool
        async def look_up(word: str) -> str:
            """Look a word up."""
            await trio.sleep(0.01)
            return word

        script = [ask_for(("look_up", '{"word":"a"}')), say("DNS")]
        triager, _ = model("m", *script, tools=[look_up])
        inner = flow(
            "inner",
            FlowStep("talk", Agent("talking", self.talk), "fail"),
            FlowStep("fail", self.fail, tries=2),
            tries=2,
        )
        main = flow(
            "main",
            FlowStep("triage", triager, {"DNS": "branch"}),
            FlowStep("branch", Agent("branching", self.branch), "inner"),
            FlowStep("inner", inner, "delegate"),
            FlowStep("delegate", self.delegate),
        )
        return {"main": main, "child": Agent("child", self.talk)}

    @staticmethod
    async def talk(run, input):
        """Say something, slowly."""
        run.text("So ")
        await trio.sleep(0.01)
        run.text("what?")
        return input

    async def fail(self, _run, input):
        """Fail as long as there is something to fail with."""
        await trio.lowlevel.checkpoint()
        if self.left:
            raise self.left.pop()
        return input

    @staticmethod
    async def branch(_run, input):
        """Do two things at once."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0.01)
            nursery.start_soon(trio.sleep, 0.02)
        return input

    @staticmethod
    async def delegate(run, input):
        """Have a child run do it."""
        return await run.delegate("child", input)


def strike_at(step):
    """Play the scenario, and cancel it after so many steps; the run, and whether it was struck."""
    blow = Blow(step)

    async def everything():
        async with open_runs(Scenario().agents()) as runs:
            order = Start(agent="main", input="x", delivery="stream")
            run, _ = runs.start(order, default="continue")
            blow.strike = [functools.partial(run.cancel, "client_cancel")]
            if step == 0:
                blow.fall()
            await run.done.wait()
            assert set() == runs.nursery.child_tasks
        return run

    clock = trio.testing.MockClock(autojump_threshold=0)
    run = trio.run(everything, clock=clock, instruments=[blow])
    assert [] == blow.errors
    assert set() == blow.alive
    return run, not blow.strike


def see_that_it_nests(events):
    """Each step and each agent has one end, in the reverse order of their beginnings."""
    begun = []
    for event in events:
        match event:
            case StepStarted():
                begun.append(event.step_id)
            case StepFinished():
                assert event.step_id == begun.pop()
            case AgentStarted():
                begun.append((event.agent, event.child_run_id))
            case AgentFinished():
                assert (event.agent, event.child_run_id) == begun.pop()
            case _:
                pass
    assert [] == begun
    assert isinstance(events[-1], RunFinished)


def test_a_cancel_at_any_step_of_a_flow_leaves_a_truthful_log():
    """Whatever was begun has its end in the log, and no step begins, or goes again, after it."""
    runs = []
    for step in itertools.count():
        run, was_struck = strike_at(step)
        see_that_it_nests(run.log.events)
        if not was_struck:
            break
        runs.append(run)
    assert ("success", "DNS") == end(run)[:2]
    assert ["early", "crashed"] == [event["error"]["code"] for event in told(run, "retry")]
    whole = told(run, "step_started", "retry")
    for struck in runs:
        begun = told(struck, "step_started", "retry")
        assert whole[: len(begun)] == begun
        codes = [e["error"]["code"] for e in told(struck, "step_finished") if "error" in e]
        assert codes == sorted(codes, key="cancelled".__eq__)  # nothing but cancels at the end
    outcomes = [struck.end.outcome for struck in runs]
    assert ["cancelled", "success"] == [outcome for outcome, _ in itertools.groupby(outcomes)]
    assert len(outcomes) > 20
