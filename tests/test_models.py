"""A model's turn: what is tried again, where else, what is remembered, and when it is given up."""

import gc
import math
import weakref

import attrs
import msgspec
import pytest
import trio
import trio.testing
from test_agents import Hesitant, begin, chat, double, end, fail, opened, told

from agentsse.agents import Agent
from agentsse.dialects import Start
from agentsse.errors import ProviderError
from agentsse.events import (
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    Question,
    Raw,
    ToolFinished,
    ToolStarted,
    Usage,
)
from agentsse.messages import (
    AssistantMessage,
    Echo,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from agentsse.models import (
    ENOUGH,
    Answered,
    Gauge,
    LoopGuard,
    size_of,
    well_ended,
)
from agentsse.providers import Finish
from agentsse.testing import ScriptedProvider, ask_for, say
from agentsse.tools import tool

BUSY = ProviderError("busy", code="overloaded")


async def play(agent, *providers, input="Hi.", **limits):
    """Run one agent to its end."""
    async with opened(agent, providers=providers, **limits) as runs:
        run = begin(runs, agent.name, input)
        await run.done.wait()
    return run


def named(name, *script):
    return ScriptedProvider(script, name=name)


def types(run):
    return [event["type"] for event in told(run)]


# Trying again


async def test_a_call_that_failed_before_it_showed_anything_is_tried_again(autojump_clock):
    """Each try is told, with the error and the seconds until the next; they double, with jitter."""
    model, provider = chat([[BUSY], [BUSY], [BUSY], say("here")])
    run = await play(model, provider, liveness=1_000)
    assert ("success", "here") == end(run)[:2]
    retries = told(run, "retry")
    assert [1, 2, 3] == [event["attempt"] for event in retries]
    assert {6} == {event["max"] for event in retries}
    assert {("overloaded", "busy", 503)} == {
        (e["error"]["code"], e["error"]["message"], e["error"]["status"]) for e in retries
    }
    for event, base in zip(retries, (2, 4, 8), strict=True):
        assert 0.5 * base <= event["delay_s"] <= 1.5 * base
    assert math.isclose(
        trio.current_time(), sum(event["delay_s"] for event in retries), abs_tol=0.01
    )
    assert ["step_started", "retry", "retry", "retry", "part_started"] == types(run)[:5]
    assert 4 == len(provider.prompts)


async def test_it_is_given_up_after_so_many_tries(autojump_clock):
    """The last error is the run's; the step tells it too."""
    model, provider = chat([[BUSY]] * 9)
    run = await play(model, provider, max_tries=3, retry_delay=0)
    assert ("error", None, "overloaded", "busy") == end(run)
    assert 3 == len(provider.prompts)
    (step,) = told(run, "step_finished")
    assert "overloaded" == step["error"]["code"]


@pytest.mark.parametrize("seconds", [0.0, 7.0, 120.0])
async def test_the_provider_may_say_how_long_to_wait(autojump_clock, seconds):
    """Exactly so long is waited."""
    model, provider = chat(
        [[ProviderError("slow down", code="rate_limit", retry_after=seconds)], say("x")]
    )
    run = await play(model, provider)
    assert ("success", "x") == end(run)[:2]
    assert [seconds] == [event["delay_s"] for event in told(run, "retry")]
    assert math.isclose(seconds, trio.current_time(), abs_tol=0.01)


async def test_who_wants_more_time_than_anybody_has_is_not_waited_for(autojump_clock):
    """An hour is as good as never."""
    model, provider = chat([[ProviderError("later", code="rate_limit", retry_after=3600)]])
    run = await play(model, provider)
    assert ("error", None, "rate_limit", "later") == end(run)
    assert 0 == trio.current_time()


@pytest.mark.parametrize(
    "code",
    ["auth", "bad_request", "content_filter", "context_length", "not_found", "quota", "malformed"],
)
async def test_what_would_fail_again_is_not_tried_again(autojump_clock, code):
    """One call, and its error."""
    model, provider = chat([[ProviderError("no", code=code)]] * 2)
    run = await play(model, provider)
    assert ("error", None, code, "no") == end(run)
    assert 1 == len(provider.prompts)


@pytest.mark.parametrize(
    "shown",
    [
        [PartStarted(part_id="p", kind="reasoning")],
        [PartDelta(part_id="p", kind="text", delta="H")],
        [PartFinished(part_id="p", kind="text", text="")],
        [ToolStarted(call_id="c", name="search", arguments=Raw(b"{}"))],
        [ToolFinished(call_id="c", name="s", result=Raw(b"1"), is_error=False, source="mcp")],
    ],
)
async def test_nothing_is_tried_again_or_elsewhere_once_anything_was_shown(autojump_clock, shown):
    """Whoever reads has seen it; it cannot be taken back."""
    first, second = named("a", [*shown, BUSY], say("twice")), named("b", say("other"))
    agent = Agent.of_model("chat", "a:x", fallbacks=["b:y"])
    run = await play(agent, first, second)
    assert ("error", None, "overloaded", "busy") == end(run)
    assert (1, 0) == (len(first.prompts), len(second.prompts))


async def test_what_nobody_understands_is_not_an_answer(autojump_clock):
    """Frames that are handed on as they are do not keep a call from being tried again."""
    strange = ProviderEvent(provider="scripted", raw=Raw(b'{"type":"queue.position"}'))
    model, provider = chat([[strange, BUSY], say("here")])
    run = await play(model, provider)
    assert ("success", "here") == end(run)[:2]
    assert 1 == len(told(run, "provider_event"))


async def test_a_stream_that_ends_too_early_is_tried_again_while_it_was_silent(autojump_clock):
    """No finish and nothing shown: the connection was cut."""
    model, provider = chat([[], say("here")])
    assert "here" == (await play(model, provider)).result
    assert 2 == len(provider.prompts)


# Elsewhere


async def test_another_listed_model_takes_over_and_stays(autojump_clock):
    """It is told, each model has a step of its own, and the next call asks who answered last."""
    first = named("a", *[[BUSY]] * 2)
    second = named("b", ask_for(("double", '{"n":1}')), say("2"))
    agent = Agent.of_model("chat", "a:x", fallbacks=["b:y", "c:z"], tools=[double])
    run = await play(agent, first, second, max_tries=2)
    assert ("success", "2") == end(run)[:2]
    assert [{"type": "failover", "from": "a:x", "to": "b:y", "reason": "busy"}] == told(
        run, "failover"
    )
    steps = told(run, "step_finished")
    assert ["a:x", "b:y", "tools", "b:y"] == [step["name"] for step in steps]
    assert ["overloaded", None, None, None] == [step.get("error", {}).get("code") for step in steps]
    assert (2, 2) == (len(first.prompts), len(second.prompts))
    assert {"x"} == {prompt.model for prompt in first.prompts}
    assert {"y"} == {prompt.model for prompt in second.prompts}


@pytest.mark.parametrize("code", ["quota", "malformed", "stalled", "server_error"])
async def test_what_another_model_may_do_better_is_asked_of_it(autojump_clock, code):
    """Also what is not worth a second try at the first."""
    first, second = named("a", [ProviderError("no", code=code)]), named("b", say("yes"))
    agent = Agent.of_model("chat", "a:x", fallbacks=["b:y"])
    assert "yes" == (await play(agent, first, second, max_tries=1)).result


@pytest.mark.parametrize(
    "code", ["auth", "bad_request", "content_filter", "context_length", "not_found"]
)
async def test_what_is_wrong_everywhere_fails_where_it_stands(autojump_clock, code):
    """The request is at fault, or the configuration: no other model is bothered."""
    first, second = named("a", [ProviderError("no", code=code)]), named("b", say("yes"))
    agent = Agent.of_model("chat", "a:x", fallbacks=["b:y"])
    assert ("error", None, code) == end(await play(agent, first, second))[:3]
    assert [] == second.prompts


async def test_the_last_model_s_error_is_the_run_s(autojump_clock):
    """Also where the models are of one provider, and the first error was another."""
    provider = named(
        "a", [ProviderError("q", code="quota")], [ProviderError("m", code="malformed")]
    )
    agent = Agent.of_model("chat", "a:x", fallbacks=["a:y"])
    run = await play(agent, provider)
    assert ("error", None, "malformed", "m") == end(run)
    assert ["x", "y"] == [prompt.model for prompt in provider.prompts]


async def test_an_agent_s_own_provider_stands_only_for_its_own_name(autojump_clock):
    """The others are the server's."""
    own, other = named("any", [ProviderError("q", code="quota")]), named("b", say("b"))
    agent = Agent.of_model("chat", "own:x", provider=own, fallbacks=["b:y"])
    assert "b" == (await play(agent, other)).result


# Silence


async def test_a_step_that_goes_on_says_so_now_and_then(autojump_clock):
    """Every `liveness` seconds, with the seconds since anything else came."""
    model, provider = chat([[12.0, *say("x")[:2], 15.0, *say("x")[2:]]])
    run = await play(model, provider)
    beats = told(run, "liveness")
    assert [10, 20] == [round(beat["elapsed_s"]) for beat in beats]
    assert [10, 0] == [round(beat["since_last_output_s"]) for beat in beats]
    assert [2, 4] == [beat["events"] for beat in beats]
    assert ("success", "x") == end(run)[:2]


async def test_any_step_says_so_and_nothing_does_outside_of_one(autojump_clock):
    """Also a step of a function; once the last is over it is still."""

    async def main(run, input):
        await trio.sleep(35)
        with run.step("a"), run.step("b"):
            await trio.sleep(25)
        await trio.sleep(35)

    run = await play(Agent("main", main))
    assert ["step_started"] * 2 + ["liveness"] * 2 + ["step_finished"] * 2 == types(run)


async def test_a_stream_that_stops_for_ever_is_given_up(autojump_clock):
    """`stalled` tells it; liveness is no progress. What was said stays."""
    model, provider = chat([[*say("Hel")[:2], math.inf]])
    run = await play(model, provider)
    assert ("error", None, "stalled") == end(run)[:3]
    assert 504 == run.end.error.status
    (stalled,) = told(run, "stalled")
    assert 600 == stalled["limit_s"]
    assert 600 <= stalled["idle_s"] <= 620
    assert 600 <= trio.current_time() <= 620
    assert ["Hel"] == [event["text"] for event in told(run, "part_finished")]
    assert 0 == provider.open_streams


async def test_a_model_that_says_nothing_is_not_tried_again_but_another_is(autojump_clock):
    """It took long enough."""
    first, second = named("a", [math.inf]), named("b", say("here"))
    agent = Agent.of_model("chat", "a:x", fallbacks=["b:y"])
    run = await play(agent, first, second, stall=3.0)
    assert ("success", "here") == end(run)[:2]
    assert 1 == len(first.prompts)
    assert [] == told(run, "liveness")


async def test_a_model_that_says_little_is_not_stalled(autojump_clock):
    """Each event is progress, however small."""
    lines = [*say("x")[:1], *[5.0, PartDelta(part_id="t1", kind="text", delta=".")] * 9]
    model, provider = chat([[*lines, Finish("stop")]])
    run = await play(model, provider, stall=6.0)
    assert "success" == end(run)[0]
    assert [] == told(run, "stalled")


async def test_a_tool_that_never_answers_is_given_up_with_its_run(autojump_clock):
    """The watch is over the whole turn; the tool is cancelled and joined."""

    @tool(seconds=None)
    async def wait() -> None:
        """Wait."""
        await trio.sleep_forever()

    model, provider = chat([ask_for(("wait", "")), say("x")], tools=[wait])
    run = await play(model, provider)
    assert ("error", None, "stalled") == end(run)[:3]
    assert [True] == [event["is_error"] for event in told(run, "tool_finished")]


async def test_a_person_may_take_their_time(autojump_clock):
    """While somebody is asked, nothing is stalled, and nothing says that it is alive."""

    @tool(seconds=None)
    async def consult() -> str:
        """Ask."""
        return await running[0].ask(Question(id="q", kind="text", prompt="Well?"))

    running = []
    agent = Agent.of_model("chat", "scripted:m", tools=[consult])
    provider = ScriptedProvider([ask_for(("consult", "")), say("x")])
    async with opened(agent, providers=[provider]) as runs:
        run = begin(runs, "chat", "Hi.")
        running.append(run.context)
        await trio.sleep(1_505)
        (request_id,) = run.context.asked
        run.context.answer(request_id, {"q": "yes"})
        await run.done.wait()
    assert ("success", "x") == end(run)[:2]
    assert [] == told(run, "liveness", "stalled")


@attrs.define
class Lingering(ScriptedProvider):
    """A provider whose streams do not end when they are over."""

    def normalizer(self, prefix):
        """Make a machine that knows when it is over."""
        machine = super().normalizer(prefix)
        feed = machine.feed

        def feed_and_see(line):
            machine.is_over = machine.is_over or isinstance(line, PartFinished)
            return feed(line)

        return _Seeing(machine, feed_and_see)


@attrs.define
class _Seeing:
    machine: object
    feed: object

    @property
    def is_over(self):
        """Whether the part was finished."""
        return self.machine.is_over

    def close(self):
        """Finish."""
        return (Finish("stop"),)


async def test_a_stream_that_is_over_but_does_not_end_is_left(autojump_clock):
    """Two seconds are enough for an error that comes late."""
    provider = Lingering([[*say("x")[:3], math.inf]])
    run = await play(Agent.of_model("chat", "scripted:m", provider=provider))
    assert ("success", "x") == end(run)[:2]
    assert 2 == trio.current_time()


async def test_an_error_behind_the_end_still_counts(autojump_clock):
    """An error beats any finish, before or after it."""
    provider = Lingering([[*say("x")[:3], 1.0, ProviderError("after all")]])
    run = await play(Agent.of_model("chat", "scripted:m", provider=provider))
    assert ("error", None, "provider_error", "after all") == end(run)


# Circles


async def test_the_same_calls_again_and_again_are_told_to_the_stream_and_the_model(autojump_clock):
    """After ten rounds in a row; whatever the order of the keys. It may go on, differently."""
    rounds = [ask_for(("add", '{"a":1,"b":2}')), ask_for(("add", '{ "b": 2, "a": 1 }'))] * 5

    @tool
    async def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    model, provider = chat([*rounds, say("3")], tools=[add])
    run = await play(model, provider)
    assert ("success", "3") == end(run)[:2]
    (circle,) = told(run, "loop_detected")
    assert 10 == circle["repeats"]
    assert circle["fingerprint"].startswith("add:")
    assert UserMessage(ENOUGH.format(repeats=10)) == provider.prompts[-1].messages[-1]
    assert all(
        UserMessage(ENOUGH.format(repeats=10)) not in p.messages for p in provider.prompts[:-1]
    )


@pytest.mark.parametrize("arguments", ['{"n":', '{"m":1}', "[]"])
async def test_the_same_malformed_arguments_three_times_end_the_run(autojump_clock, arguments):
    """The model has been told twice what would fit."""
    model, provider = chat([ask_for(("double", arguments), ("fail", ""))] * 9, tools=[double, fail])
    run = await play(model, provider)
    assert ("error", None, "loop_detected") == end(run)[:3]
    assert 3 == len(provider.prompts)
    assert [3] == [event["repeats"] for event in told(run, "loop_detected")]


async def test_the_same_round_that_fails_three_times_ends_the_run(autojump_clock):
    """Its calls are well formed, and none of them does what it should."""
    model, provider = chat([ask_for(("fail", "{}"), ("fail", "{}"))] * 9, tools=[fail])
    run = await play(model, provider)
    assert ("error", None, "loop_detected") == end(run)[:3]
    assert 3 == len(provider.prompts)
    assert [3] == [event["repeats"] for event in told(run, "loop_detected")]


async def test_an_unknown_tool_is_for_the_model_to_correct(autojump_clock):
    """It reads which ones there are, and may do better."""
    model, provider = chat([ask_for(("gone", "{}")), say("ok")], tools=[double])
    run = await play(model, provider)
    assert ("success", "ok") == end(run)[:2]
    (answer,) = [m for m in provider.prompts[1].messages if isinstance(m, ToolMessage)]
    assert (True, "expected one of the tools double, got 'gone'") == (
        answer.is_error,
        answer.content,
    )


def test_a_guard_counts_only_what_is_the_same_in_a_row():
    """Another call, or a success, begins anew."""
    guard = LoopGuard()
    same, other = [ToolCall("1", "a", "{}")], [ToolCall("2", "b", "{}")]
    bad = [Answered(ToolMessage("1", "a", "no", is_error=True))]
    good = [Answered(ToolMessage("1", "a", "1"))]
    for _ in range(3):
        assert guard.note(same, bad) is None
        assert guard.note(same, bad) is None
        assert guard.note(same, good) is None
    assert guard.note(other, bad) is None
    for _ in range(9):
        assert guard.note(same, good) is None
    circle = guard.note(same, good)
    assert (False, 10) == (circle.is_hopeless, circle.event.repeats)
    assert all(guard.note(same, good) is None for _ in range(9))
    assert 20 == guard.note(same, good).event.repeats
    malformed = [good[0], Answered(bad[0].message, is_malformed=True)]
    assert [None, None, True] == [
        (circle := guard.note(other, malformed)) and circle.is_hopeless for _ in range(3)
    ]


# The context window


async def test_a_context_window_that_fills_up_is_told_once(autojump_clock):
    """At 85 %, by the provider's own count."""
    usages = [Usage(input_tokens=n, output_tokens=1) for n in (80, 84, 90, 95)]
    rounds = [
        [*ask_for(("double", f'{{"n":{u.input_tokens}}}'))[:-1], Finish("stop", u)] for u in usages
    ]
    model, provider = chat([*rounds, say("x")], tools=[double], context_window=100)
    run = await play(model, provider)
    assert [{"type": "context_usage", "ratio": 0.85, "tokens": 85, "limit": 100}] == told(
        run, "context_usage"
    )
    assert Usage(input_tokens=349, output_tokens=4) == run.end.usage


def test_a_gauge_estimates_where_nobody_counts():
    """Four characters a token; it tells again after there was room."""
    gauge, finish = Gauge(10), Finish("stop")
    call = ToolCall("c", "f", "x" * 8)
    much = [
        SystemMessage("x" * 8),
        UserMessage("x" * 8),
        AssistantMessage("x" * 8, (call,)),
        ToolMessage("c", "f", "x" * 8),
    ]
    assert 40 == size_of(much)
    assert 10 == gauge.read(finish, much).tokens
    assert gauge.read(finish, much) is None
    assert gauge.read(finish, much[:1]) is None
    assert 1.0 == gauge.read(finish, much).ratio
    assert Gauge(0).read(finish, much) is None


# What is remembered


async def converse(runs, agent, *inputs):
    """Play several runs of one thread, one after the other."""
    done = []
    for said in inputs:
        order = Start(agent=agent, input=said, delivery="stream", thread_id="t")
        run, _ = runs.start(order, default="continue")
        await run.done.wait()
        done.append(run)
    return done


async def test_a_model_sees_what_was_said_before_in_its_thread(autojump_clock):
    """Calls and their results too; the instructions come first, and once."""
    model, provider = chat(
        [ask_for(("double", '{"n":2}')), say("4"), say("It was 4.")],
        tools=[double],
        instructions="Compute.",
    )
    async with opened(model, providers=[provider]) as runs:
        first, _second = await converse(runs, "chat", "Twice 2?", "What was it?")
        call = ToolCall("call1", "double", '{"n":2}')
        before = (
            UserMessage("Twice 2?"),
            AssistantMessage("", (call,)),
            ToolMessage("call1", "double", "4"),
            AssistantMessage("4"),
        )
        assert before == first.conversation
        assert (
            SystemMessage("Compute."),
            *before,
            UserMessage("What was it?"),
        ) == provider.prompts[2].messages
        alone = begin(runs, "chat", "Hello?")
        await alone.done.wait()
        assert (SystemMessage("Compute."), UserMessage("Hello?")) == provider.prompts[3].messages


async def test_a_thread_remembers_functions_by_what_went_in_and_came_out(autojump_clock):
    """The text that was said, else the result, as text or as JSON, if there is one."""

    async def main(run, input):
        if input == "speak":
            run.text("spoken")
        return {"speak": 1, "string": "text", "nothing": None}.get(str(input), {"n": 1})

    async with opened(Agent("main", main), providers=[]) as runs:
        done = await converse(runs, "main", "speak", "string", "nothing", {"a": "b"})
        alone = begin(runs, "main", "speak")
        await alone.done.wait()
    assert [
        (UserMessage("speak"), AssistantMessage("spoken")),
        (UserMessage("string"), AssistantMessage("text")),
        (UserMessage("nothing"),),
        (UserMessage('{"a":"b"}'), AssistantMessage('{"n":1}')),
    ] == [run.conversation for run in done]
    assert () == alone.conversation


async def test_what_a_cancel_cut_short_is_remembered_as_far_as_it_came(autojump_clock):
    """The question, half an answer, what tools have done; a call without an answer says so."""

    @tool
    async def wait() -> None:
        """Wait."""
        await trio.sleep_forever()

    model, provider = chat(
        [
            [*say("Let me ")[:2], math.inf],
            [*say("I see. ")[:-1], *ask_for(("double", '{"n":1}'), ("wait", ""))],
            say("x"),
        ],
        tools=[double, wait],
    )
    async with opened(model, providers=[provider]) as runs:
        for said in ("one", "two"):
            order = Start(agent="chat", input=said, delivery="stream", thread_id="t")
            run, _ = runs.start(order, default="continue")
            await trio.sleep(20)
            run.cancel("client_cancel")
            await run.done.wait()
        await converse(runs, "chat", "three")
    *_, last = provider.prompts
    calls = (ToolCall("call1", "double", '{"n":1}'), ToolCall("call2", "wait", "{}"))
    assert (
        UserMessage("one"),
        AssistantMessage("Let me "),
        UserMessage("two"),
        AssistantMessage("I see. ", (calls[0], attrs.evolve(calls[1], arguments=""))),
        UserMessage("three"),
    ) == tuple(m for m in last.messages if not isinstance(m, ToolMessage))
    answers = [m for m in last.messages if isinstance(m, ToolMessage)]
    assert ["call1", "call2"] == [m.call_id for m in answers]
    assert ("2", False) == (answers[0].content, answers[0].is_error)  # that one was done
    assert "has not answered" in answers[1].content
    assert answers[1].is_error


async def test_a_thread_is_remembered_as_long_as_its_runs_are_kept(autojump_clock):
    """What is no longer retained was never said."""
    model, provider = chat([say(str(number)) for number in range(1, 6)])
    async with opened(model, providers=[provider], retain_runs=1) as runs:
        await converse(runs, "chat", "a", "b", "c")
        await begin(runs, "chat", "d").done.wait()  # of no thread: and it is all that is kept
        await converse(runs, "chat", "e")
    assert (
        UserMessage("b"),
        AssistantMessage("2"),
        UserMessage("c"),
    ) == provider.prompts[2].messages
    assert (UserMessage("e"),) == provider.prompts[4].messages


def test_a_conversation_ends_well_where_every_call_has_its_result():
    """Results that are missing are put behind those that are there."""
    calls = (ToolCall("1", "a", "{}"), ToolCall("2", "b", "{}"))
    answer = ToolMessage("1", "a", "x")
    whole = [UserMessage("q"), AssistantMessage("", calls), answer]
    ended = well_ended([*whole, UserMessage("r"), AssistantMessage("", calls[:1]), answer])
    assert tuple(whole) == ended[:3]
    assert ("2", "b", True) == (ended[3].call_id, ended[3].name, ended[3].is_error)
    assert (UserMessage("r"), AssistantMessage("", calls[:1]), answer) == ended[4:]
    assert "2" == well_ended(whole)[-1].call_id
    assert () == well_ended([])


# Names of calls


async def test_call_ids_are_the_run_s_own_where_a_provider_counts_anew(autojump_clock):
    """`tool_finished` comes once per call id; what goes back to the model has the same names."""
    echo = Echo("scripted", ["in its own form"])
    again = [*ask_for(("double", '{"n":2}'))[:-1], Finish("tool_calls", echo=echo)]
    model, provider = chat([[*again], [*again], say("x"), [*again], say("y")], tools=[double])
    async with opened(model, providers=[provider]) as runs:
        first, second = await converse(runs, "chat", "one", "two")
    ids = ["call1", "call1-2"]
    for kind in ("part_finished", "tool_started", "tool_finished"):
        assert ids == [e["call_id"] for e in told(first, kind) if "call_id" in e]
    assert ["call1-3"] == [e["call_id"] for e in told(second, "tool_started")]
    said = [m for m in provider.prompts[2].messages if isinstance(m, AssistantMessage)]
    assert [echo, None] == [m.echo for m in said]  # it names the call as it was
    assert {"scripted"} == {m.provider for m in said}
    assert ids == [m.call_id for m in provider.prompts[2].messages if isinstance(m, ToolMessage)]


async def test_a_provider_s_own_tool_is_finished_whatever_happens(autojump_clock):
    """Where its stream breaks off, the tool says so."""
    started = ToolStarted(call_id="c", name="search", arguments=Raw(b"{}"))
    done = ToolFinished(
        call_id="d", name="fetch", result=Raw(b"1"), is_error=False, source="provider"
    )
    model, provider = chat([[done, started, BUSY]])
    run = await play(model, provider)
    assert [("d", False), ("c", True)] == [
        (event["call_id"], event["is_error"]) for event in told(run, "tool_finished")
    ]


async def test_only_so_many_calls_may_stand_in_one_answer(autojump_clock):
    """All of them would run at once; what comes behind is not even read."""
    many = ask_for(*[("double", '{"n":1}')] * 200)
    model, provider = chat([many], tools=[double])
    run = await play(model, provider)
    assert ("error", None, "malformed") == end(run)[:3]
    assert 128 == len(told(run, "part_finished"))


# In the run of another


async def test_a_model_agent_that_is_called_within_a_run_has_a_conversation_of_its_own(
    autojump_clock,
):
    """Its own tools, too; what is said in it is not what the outer one is told."""

    @tool
    async def consult() -> str:
        """Ask the other one."""
        return await inner(running[0], "And you?")

    running = []
    inner = Agent.of_model(
        "inner",
        "b:x",
        provider=named("b", ask_for(("double", '{"n":2}')), say("4")),
        tools=[double],
    )
    outer, provider = chat([ask_for(("consult", "")), say("It says 4.")], tools=[consult])
    async with opened(outer, providers=[provider]) as runs:
        order = Start(agent="chat", input="Hi.", delivery="stream", thread_id="t")
        run, _ = runs.start(order, default="continue")
        running.append(run.context)
        await run.done.wait()
    asked = inner.function.provider.prompts
    assert ["double"] == [spec.name for spec in asked[0].tools]
    assert (UserMessage("And you?"),) == asked[0].messages
    assert ["consult"] == [spec.name for spec in provider.prompts[0].tools]
    assert ["Hi.", "", '"4"', "It says 4."] == [
        m.content if isinstance(m, ToolMessage) else m.text for m in run.conversation
    ]


async def test_each_model_within_a_run_is_watched(autojump_clock):
    """One that ends does not leave the others unwatched."""
    quick = Agent.of_model("quick", "a:x", provider=named("a", [1.0, *say("x")]))
    stuck = Agent.of_model("stuck", "b:x", provider=named("b", [math.inf]))

    async def main(run, input):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stuck, run, "a")
            nursery.start_soon(quick, run, "b")

    run = await play(Agent("main", main))
    assert ("error", None, "stalled") == end(run)[:3]
    assert trio.current_time() < 700


async def test_a_child_run_has_a_watch_of_its_own(autojump_clock):
    """Whoever waits for one that speaks is not stalled, however long it takes."""

    async def child(run, input):
        for _ in range(20):
            with run.step("think"):
                await trio.sleep(60)
        return "at last"

    @tool(seconds=None)
    async def delegate() -> str:
        """Delegate."""
        return await running[0].delegate("child", None)

    running = []
    model, provider = chat([ask_for(("delegate", "")), say("x")], tools=[delegate])
    async with opened(model, Agent("child", child), providers=[provider]) as runs:
        run = begin(runs, "chat", "Hi.")
        running.append(run.context)
        await run.done.wait()
    assert ("success", "x") == end(run)[:2]
    assert [] == told(run, "stalled")


async def test_the_wait_before_a_try_is_not_counted_against_it(autojump_clock):
    """Each try has all of the time."""
    model, provider = chat(
        [[ProviderError("busy", code="overloaded", retry_after=25)], [25.0, *say("here")]]
    )
    run = await play(model, provider, stall=30.0)
    assert ("success", "here") == end(run)[:2]


# What is not remembered


@pytest.mark.parametrize("code", ["context_length", "content_filter", "bad_request"])
async def test_what_a_model_cannot_take_is_not_told_to_it_again(autojump_clock, code):
    """Else it would fail for ever."""
    model, provider = chat([[ProviderError("no", code=code)], say("fine")])
    async with opened(model, providers=[provider]) as runs:
        bad, good = await converse(runs, "chat", "too much", "Hi.")
    assert () == bad.conversation
    assert (UserMessage("Hi."),) == provider.prompts[1].messages
    assert ("success", "fine") == end(good)[:2]


async def test_a_run_that_never_began_was_never_heard(autojump_clock):
    """Cancelled in the queue, behind another one of its thread."""
    model, provider = chat([[5.0, *say("1")], say("2")])
    async with opened(model, providers=[provider]) as runs:
        orders = [
            Start(agent="chat", input=said, delivery="stream", thread_id="t", if_busy="enqueue")
            for said in ("a", "b")
        ]
        first, second = [runs.start(order, default="continue")[0] for order in orders]
        second.cancel("client_cancel")
        await first.done.wait()
        await converse(runs, "chat", "c")
    assert ["a", "1", "c"] == [message.text for message in provider.prompts[1].messages]


async def test_an_empty_answer_is_no_message(autojump_clock):
    """Some servers refuse one."""
    model, provider = chat([[Finish("stop")], say("x")])
    async with opened(model, providers=[provider]) as runs:
        await converse(runs, "chat", "a", "b")
    assert ["a", "b"] == [message.text for message in provider.prompts[1].messages]


async def test_a_conversation_that_cannot_be_remembered_harms_nobody(autojump_clock):
    """An agent may have put anything into it; the run ends as it did, and the log has the rest."""

    async def main(run, input):
        run.conversation.append(AssistantMessage(None))
        return "fine"

    async with opened(Agent("main", main)) as runs:
        (run,) = await converse(runs, "main", "a")
    assert ("success", "fine") == end(run)[:2]
    assert () == run.conversation
    assert ["crash"] == [event for event, _ in runs.report.seen if event == "crash"]


def test_a_conversation_is_as_large_as_what_it_holds():
    """Bytes of text, arguments, results, and of what a provider wants back."""
    call = ToolCall("c", "f", "{}")
    assert 2 == size_of([UserMessage("é")])
    assert 13 == size_of([AssistantMessage("é", (call,), Echo("x", {"a": "b"}))])


async def test_ids_that_are_made_here_differ_between_the_runs_of_a_thread(autojump_clock):
    """So that what a provider wants back needs no new names."""
    prefixes = []

    class Naming(ScriptedProvider):
        def normalizer(self, prefix):
            prefixes.append(prefix)
            return super().normalizer(prefix)

    model = Agent.of_model("chat", "a:x", provider=Naming([say("1"), say("2"), say("3")]))
    async with opened(model) as runs:
        await converse(runs, "chat", "a", "b", "c")
    assert 3 == len(set(prefixes))


# What is let go


@pytest.mark.parametrize("code", ["overloaded", "not_found"])
async def test_a_failed_call_does_not_keep_its_run(autojump_clock, code):
    """No circle of references waits for the collector."""

    def fail_anew(prompt):  # a traceback that somebody keeps is not the engine's affair
        return [ProviderError("no", code=code)]

    model, provider = chat([fail_anew] * 2)
    gc.collect()
    gc.disable()
    try:
        next_one = Agent.of_model("next", "c:x", provider=named("c", say("x")))
        async with opened(
            model, next_one, providers=[provider], retain_runs=1, max_tries=2
        ) as runs:
            run = begin(runs, "chat", "Hi.")
            context = weakref.ref(run.context)
            await run.done.wait()
            del run
            await begin(runs, "next", "Hi.").done.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert context() is None
    finally:
        gc.enable()


async def test_what_a_provider_wants_back_is_given_to_no_other(autojump_clock):
    """After a failover, or from another agent of the thread: it is signed, or sealed."""
    echo = Echo("scripted", ["signed"])
    first = named(
        "a", [*say("1")[:-1], Finish("stop", echo=echo)], [ProviderError("q", code="quota")]
    )
    second = named("b", say("2"))
    agent = Agent.of_model("chat", "a:x", fallbacks=["b:y"])
    async with opened(agent, providers=[first, second]) as runs:
        await converse(runs, "chat", "one", "two")
    assert [echo] == [m.echo for m in first.prompts[1].messages if isinstance(m, AssistantMessage)]
    assert [None] == [m.echo for m in second.prompts[0].messages if isinstance(m, AssistantMessage)]


async def test_an_answer_of_very_many_events_lets_others_have_their_turn(autojump_clock):
    """And where the log is full, the rest of it is not even read."""
    many = [ProviderEvent(provider="x", raw=Raw(b"1"))] * 100_000
    fed = []

    @attrs.define
    class Machine:
        is_over: bool = False

        def feed(self, _chunk):
            for event in many:
                fed.append(1)
                yield msgspec.structs.replace(event)

        def close(self):
            return (Finish("stop"),)

    class Gushing(ScriptedProvider):
        def normalizer(self, _prefix):
            return Machine()

    provider = Gushing([[0.0, *say("x")[:1]]])
    run = await play(Agent.of_model("chat", "a:x", provider=provider), max_events=2_000)
    assert ("error", None, "limit") == end(run)[:3]
    assert len(fed) < 3_000


# What people say meanwhile


def said(messages):
    """What was said, without who said it."""
    return [m.content if isinstance(m, ToolMessage) else m.text for m in messages]


async def test_steering_is_heard_after_the_round_and_a_follow_up_at_the_end(autojump_clock):
    """In the order in which they were said, each once; later runs of the thread know of them."""
    model, provider = chat(
        [ask_for(("double", '{"n":1}')), [5.0, *say("One.")], say("Two.")], tools=[double]
    )
    async with opened(model, providers=[provider]) as runs:
        order = Start(agent="chat", input="Hi.", delivery="stream", thread_id="t")
        run, _ = runs.start(order, default="continue")
        await trio.sleep(1)  # the tool is at work
        for word, mode in (("f1", "follow_up"), ("s1", "steer"), ("f2", "follow_up")):
            run.context.hear(word, mode)
        run.context.hear("s2", "steer")
        await trio.sleep(10)  # the second call is under way
        run.context.hear("s3", "steer")
        run.context.hear("f3", "follow_up")
        await run.done.wait()
    before = ["Hi.", "", "2", "s1", "s2"]
    assert [
        ["Hi."],
        before,
        [*before, "One.", "f1", "f2", "s3", "f3"],
    ] == [said(prompt.messages) for prompt in provider.prompts]
    assert ("success", "Two.") == end(run)[:2]
    assert [*before, "One.", "f1", "f2", "s3", "f3", "Two."] == said(run.conversation)
    assert {UserMessage} == {type(m) for m in provider.prompts[2].messages[-4:]}


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ([[5.0, *say("Done.")]], ("success", "Done.", None)),
        ([[5.0, *ask_for(("double", '{"n":1}'))]], ("error", None, "too_many_steps")),
    ],
)
async def test_what_comes_too_late_for_the_last_call_is_left_for_others(
    script, outcome, autojump_clock
):
    """It is neither lost nor answered by an error."""
    unheard = []
    model, provider = chat(script, tools=[double])
    async with opened(model, providers=[provider], max_steps=1) as runs:
        runs.unheard = lambda run, messages: unheard.append((run, messages))
        run = begin(runs, "chat", "Hi.")
        await trio.sleep(1)
        run.context.hear("a", "steer")
        run.context.hear("b", "follow_up")
        await run.done.wait()
    assert outcome == end(run)[:3]
    assert [(run, ["a", "b"])] == unheard


async def test_who_went_round_in_circles_hears_both(autojump_clock):
    """What the guard says, then what people said."""
    model, provider = chat([ask_for(("double", '{"n":1}'))] * 10 + [say("x")], tools=[double])
    async with opened(model, providers=[provider]) as runs:
        run = begin(runs, "chat", "Hi.")
        await trio.sleep(85)  # the tenth round
        run.context.hear("Stop it.", "steer")
        await run.done.wait()
    assert [ENOUGH.format(repeats=10), "Stop it."] == said(provider.prompts[-1].messages)[-2:]
    assert "x" == run.result


async def test_a_model_within_the_run_of_a_function_hears_what_is_said_to_it(autojump_clock):
    """It is the one that listens."""
    inner, provider = chat([[5.0, *say("One.")], say("Two.")])

    async def main(run, input):
        return await inner(run, input)

    async with opened(Agent("main", main), providers=[provider]) as runs:
        run = begin(runs, input="Hi.")
        await trio.sleep(1)
        run.context.hear("And?", "follow_up")
        await run.done.wait()
    assert ["Hi.", "One.", "And?"] == said(provider.prompts[1].messages)
    assert ("success", "Two.") == end(run)[:2]


# Rest


async def test_a_model_rests_before_its_next_call(autojump_clock):
    """The round of tools that it is in goes on; what is said to it at rest it hears after that."""
    model, provider = chat([ask_for(("double", '{"n":1}')), say("x"), say("y")], tools=[double])
    async with opened(model, providers=[provider]) as runs:
        run = begin(runs, "chat", "Hi.")
        await trio.sleep(1)
        run.pause("lunch")
        await trio.sleep(3_000)
        assert ("paused", 1) == (run.state, len(provider.prompts))
        run.context.hear("Go on.", "steer")
        run.context.hear("And then?", "follow_up")
        await trio.sleep(10)
        assert ("paused", 1) == (run.state, len(provider.prompts))
        run.context.resume()
        await trio.sleep(0.5)
        assert ["Hi.", "", "2", "Go on."] == said(provider.prompts[1].messages)
        await run.done.wait()
    heard = [e for e in types(run) if e in ("tool_finished", "paused", "resumed", "part_started")]
    assert ["part_started", "tool_finished", "paused", "resumed", "part_started"] == heard[:5]
    assert ["Hi.", "", "2", "Go on.", "x", "And then?"] == said(provider.prompts[2].messages)
    assert "y" == run.result


async def test_the_time_at_rest_is_not_counted_against_anybody(autojump_clock):
    """Also within a step, beside one that could be stalled: nothing says that it is alive."""
    model, provider = chat([say("x")])

    async def main(run, input):
        with run.step("think", kind="flow"), run.watched() as scope:
            await model(run, input)
        return scope.cancelled_caught

    async with opened(Agent("main", main), providers=[provider], stall=50) as runs:
        run = begin(runs)
        run.pause()
        await trio.sleep(3_005)
        run.context.resume()
        await run.done.wait()
    assert run.result is False
    assert [] == told(run, "liveness", "stalled")


async def test_a_model_may_be_told_to_rest_before_it_has_begun(autojump_clock):
    """Also while its run waits for its turn."""
    model, provider = chat([say("a"), say("b")])
    async with opened(model, providers=[provider], max_running=1) as runs:
        first, second = begin(runs, "chat", "one"), begin(runs, "chat", "two")
        second.pause()
        assert "queued" == second.state
        await first.done.wait()
        await trio.sleep(5)
        assert ("paused", 1) == (second.state, len(provider.prompts))
        second.context.resume()
        await second.done.wait()
    assert ["paused", "resumed", "step_started"] == types(second)[:3]
    assert "b" == second.result


async def test_a_model_that_is_cancelled_at_rest_makes_no_further_call(autojump_clock):
    """It ends at once, and is not told to go on."""
    model, provider = chat([ask_for(("double", '{"n":9}')), say("x")], tools=[double])
    async with opened(model, providers=[provider]) as runs:
        run = begin(runs, "chat", "Hi.")
        run.context.hear("unheard", "steer")
        await trio.sleep(0.5)
        run.pause()
        await trio.sleep(10)
        run.cancel("client_cancel")
        await run.done.wait()
        assert 10.5 == trio.current_time()
    assert ("cancelled", None) == end(run)[:2]
    assert "paused" == types(run)[-1]
    assert 1 == len(provider.prompts)


# Workers and the watch


async def test_a_worker_does_not_keep_its_model_from_being_watched(autojump_clock):
    """Nobody waits for it: a stream that has stopped is given up while it works on."""

    async def last(run, input):
        await trio.sleep_forever()

    @tool
    async def start() -> str:
        """Start a worker."""
        return running[0].spawn("last", None)

    running = []
    model, provider = chat([ask_for(("start", "")), [math.inf]], tools=[start])
    async with opened(model, Agent("last", last), providers=[provider]) as runs:
        run = begin(runs, "chat", "Hi.")
        running.append(run.context)
        await run.done.wait()
        assert 600 <= trio.current_time() <= 620
    assert ("error", None, "stalled") == end(run)[:3]
    assert 1 == len(told(run, "agent_finished"))


# Bounds


@pytest.mark.parametrize("is_late", [True, False])
async def test_a_provider_s_own_tool_has_its_end_at_the_bound(is_late, autojump_clock):
    """Its own answer where there is one, else that there is none; it stays the provider's."""
    started = ToolStarted(call_id="c", name="search", arguments=Raw(b"{}"))
    finished = ToolFinished(
        call_id="c", name="search", result=Raw(b"[1]"), is_error=False, source="mcp"
    )
    agent = Agent.of_model("own", "any:m", provider=Hesitant([[started, finished, Finish("stop")]]))
    if is_late:
        agent, provider = chat([[started, 1.0, finished, Finish("stop")]])
    run = await play(agent, *([provider] if is_late else []), max_events=3)
    assert ("error", None, "limit") == end(run)[:3]
    assert ["step_started", "tool_started", "tool_finished", "step_finished"] == types(run)
    (last,) = told(run, "tool_finished")
    assert ("provider", True) if is_late else ("mcp", False) == (last["source"], last["is_error"])
    assert is_late or [1] == last["result"]
