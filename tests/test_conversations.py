"""What clients hand in: conversations, tools of their own, answers; and who makes room for whom.

The engine's part is tested without a network; the rest over real sockets, by a dialect that has no
more than what it takes to ask for things.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx2
import msgspec
import pytest
import trio
from raw import connect, request, wait_until
from trio.testing import wait_all_tasks_blocked

from agentsse import Agent, Question, RunContext, agent, tool
from agentsse.context import Limits
from agentsse.dialects import (
    MAX_HISTORY,
    AgentCard,
    Cancel,
    Dialect,
    Framing,
    ListAgents,
    ListRuns,
    Reply,
    ReplyWithHistory,
    Request,
    Route,
    Show,
    ShowThread,
    Start,
    Watch,
    read_body,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import AgentError, BadRequest, Conflict, NotAsked, NotFound
from agentsse.events import InputRequested, RunFinished, RunStarted
from agentsse.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.models import well_ended
from agentsse.runs import Policy, Run, Runs, open_runs
from agentsse.server import Server
from agentsse.sse import Decoder
from agentsse.testing import ScriptedProvider, ask_for, open_server, read_events, say

PATIENCE = 30.0
LOOK = ToolSpec("look", "Look around.", {"type": "object", "properties": {}})
NAP = ToolSpec("nap", "Sleep.", {"type": "object", "properties": {}})


@tool
async def lookup(name: str) -> str:
    """Look a name up."""
    await trio.lowlevel.checkpoint()
    return f"{name} is here"


@agent
async def forever(_run: RunContext, _input: Any) -> None:
    """Run until cancelled."""
    await trio.sleep_forever()


@agent
async def echo(run: RunContext, input: Any) -> Any:
    """Say what comes in."""
    await trio.lowlevel.checkpoint()
    run.text(str(input))
    return input


def chat(*script: Any, **settings: Any) -> tuple[Agent, ScriptedProvider]:
    provider = ScriptedProvider(script)
    return Agent.of_model("chat", "scripted:x", provider=provider, **settings), provider


@asynccontextmanager
async def opened(*agents: Agent) -> AsyncIterator[Runs]:
    async with open_runs({one.name: one for one in agents}, limits=Limits(coalesce=0)) as runs:
        yield runs


def begin(runs: Runs, name: str, input: Any = None, **order: Any) -> Run:
    wanted = Start(agent=name, input=input, delivery="background", **order)
    return runs.start(wanted, default="continue")[0]


async def played(runs: Runs, name: str, input: Any = None, **order: Any) -> Run:
    run = begin(runs, name, input, **order)
    await run.done.wait()
    assert "success" == run.end.outcome
    return run


# Conversations that the client keeps


async def test_a_history_from_the_client_is_what_the_model_is_told(autojump_clock):
    """It counts instead of what the thread knows; calls in it that have no answer are given one."""
    model, provider = chat(say("one"), say("two"), say("three"))
    earlier = (
        UserMessage("Hi."),
        AssistantMessage("Let me see.", (ToolCall("c1", "look", "{}"),)),
    )
    async with opened(model) as runs:
        await played(runs, "chat", "first", thread_id="t")
        await played(runs, "chat", "second", thread_id="t", history=earlier)
        await played(runs, "chat", "third", thread_id="t", history=())
    unanswered = ToolMessage("c1", "look", '{"error":"the tool has not answered"}', is_error=True)
    assert (*earlier, unanswered, UserMessage("second")) == provider.prompts[1].messages
    assert (UserMessage("third"),) == provider.prompts[2].messages


async def test_a_thread_remembers_only_what_was_new(autojump_clock):
    """What the client has told once is not told twice to whoever comes by the thread."""
    model, provider = chat(say("one"), say("two"))
    async with opened(model) as runs:
        history = (SystemMessage("Be kind."), UserMessage("Hi."), AssistantMessage("Hello."))
        await played(runs, "chat", "first", thread_id="t", history=history)
        await played(runs, "chat", "second", thread_id="t")
    assert (
        UserMessage("first"),
        AssistantMessage("one"),
        UserMessage("second"),
    ) == provider.prompts[1].messages


async def test_a_run_continues_one_of_several_branches(autojump_clock):
    """It is told what was said up to that run, and not what others have said since."""
    model, provider = chat(*(say(word) for word in "abcd"))
    async with opened(model) as runs:
        root = await played(runs, "chat", "0", makes_thread=True)
        left = await played(runs, "chat", "1", continues=root.id)
        right = await played(runs, "chat", "2", continues=root.id)
        await played(runs, "chat", "3", continues=left.id)
        assert {root.id} == {run.thread_id for run in (root, left, right)}
    said = [
        [m.text for m in prompt.messages if isinstance(m, UserMessage | AssistantMessage)]
        for prompt in provider.prompts
    ]
    assert [["0"], ["0", "a", "1"], ["0", "a", "2"], ["0", "a", "1", "b", "3"]] == said


async def test_only_what_is_over_and_kept_can_be_continued(autojump_clock):
    """A run that goes on is a conflict; one that was forgotten is not found."""
    async with opened(forever, echo) as runs:
        going_on = begin(runs, "forever", makes_thread=True)
        with pytest.raises(Conflict, match=r"expected a run that is over, got \w+, which goes on"):
            begin(runs, "echo", continues=going_on.id)
        over = await played(runs, "echo", "x", makes_thread=True)
        runs.forget(over)
        runs.forget(over)
        with pytest.raises(NotFound, match="goes on or is still kept"):
            begin(runs, "echo", continues=over.id)
        assert [going_on] == list(runs)


async def test_what_an_ancestor_said_is_told_as_long_as_it_is_kept(autojump_clock):
    """A conversation whose beginning is gone goes on with the rest of it."""
    model, provider = chat(*(say(word) for word in "abc"))
    async with opened(model) as runs:
        root = await played(runs, "chat", "0", makes_thread=True)
        child = await played(runs, "chat", "1", continues=root.id)
        runs.forget(root)
        await played(runs, "chat", "2", continues=child.id)
    assert (
        UserMessage("1"),
        AssistantMessage("b"),
        UserMessage("2"),
    ) == provider.prompts[2].messages


async def test_what_a_run_was_told_is_told_to_whoever_continues_it(autojump_clock):
    """By the client, or by the thread it was in."""
    model, provider = chat(*(say(word) for word in "abcde"))
    before = (UserMessage("I am Ada."), AssistantMessage("Hello."))
    async with opened(model) as runs:
        root = await played(runs, "chat", "0", makes_thread=True, history=before)
        child = await played(runs, "chat", "1", continues=root.id)
        await played(runs, "chat", "2", continues=child.id)
        await played(runs, "chat", "3", thread_id="t")
        second = await played(runs, "chat", "4", thread_id="t")
        assert (*before, UserMessage("0"), AssistantMessage("a")) == runs.said_before(child)
        assert (UserMessage("3"), AssistantMessage("d")) == runs.said_before(second)
    said = [[m.text for m in prompt.messages] for prompt in provider.prompts]
    assert ["I am Ada.", "Hello.", "0", "a", "1", "b", "2"] == said[2]
    assert ["3", "d", "4"] == said[4]


async def test_what_a_function_was_told_is_remembered_as_it_was_said(autojump_clock):
    """All of it: what stood before the input as well; also while the next run waits its turn."""
    async with opened(echo, forever) as runs:
        said = (UserMessage("Well."), AssistantMessage("Yes?"), UserMessage("Hello"))
        run = await played(runs, "echo", "Hello", thread_id="t", said=said)
        assert (*said, AssistantMessage("Hello")) == run.conversation
        assert said[:-1] == runs.said_before(run)
        begin(runs, "forever", thread_id="t")
        queued = begin(runs, "echo", "x", thread_id="t", if_busy="enqueue")
        assert run.conversation == runs.said_before(queued)


async def test_who_continues_a_thread_s_run_is_told_what_the_thread_knew(autojump_clock):
    """And not what came later in it."""
    model, provider = chat(*(say(word) for word in "abcd"))
    async with opened(model) as runs:
        await played(runs, "chat", "0", thread_id="t")
        second = await played(runs, "chat", "1", thread_id="t")
        await played(runs, "chat", "2", thread_id="t")
        await played(runs, "chat", "3", continues=second.id)
    assert ["0", "a", "1", "b", "3"] == [m.text for m in provider.prompts[3].messages]


async def test_a_run_of_no_thread_cannot_be_continued(autojump_clock):
    """Nobody remembers what was said in it."""
    async with opened(echo) as runs:
        alone = await played(runs, "echo", "x")
        with pytest.raises(BadRequest, match=f"a run of a thread to be continued, got {alone.id}"):
            begin(runs, "echo", continues=alone.id)
        assert () == runs.said_before(alone)


async def test_an_id_that_comes_again_is_another_run(autojump_clock):
    """What a forgotten run said is not replaced by what somebody else says under its id."""
    model, provider = chat(*(say(word) for word in "abcd"))
    async with opened(model) as runs:
        root = await played(runs, "chat", "0", makes_thread=True, run_id="r1")
        child = await played(runs, "chat", "1", continues="r1")
        runs.forget(root)
        other = await played(runs, "chat", "mine", thread_id="u", run_id="r1")
        await played(runs, "chat", "2", continues=child.id)
        assert other is runs.find("r1")
        del root
    assert ["1", "b", "2"] == [m.text for m in provider.prompts[-1].messages]


async def test_a_run_that_never_began_keeps_nothing_of_what_it_was_to_be_told(autojump_clock):
    """Neither the history, nor instructions."""
    async with opened(forever, echo) as runs:
        begin(runs, "forever", thread_id="t")
        history = (UserMessage("x" * 1_000),)
        queued = begin(
            runs, "echo", thread_id="t", if_busy="enqueue", history=history, instructions="y"
        )
        assert history == queued.told == runs.said_before(queued)
        queued.cancel("client_cancel")
        assert (None, None) == (queued.told, queued.context.instructions)


async def test_a_retry_finds_its_run_though_what_it_continues_is_gone(autojump_clock):
    """The idempotency key counts first."""
    async with opened(echo) as runs:
        root = await played(runs, "echo", "x", makes_thread=True)
        order = {"continues": root.id, "idempotency_key": "k"}
        run = await played(runs, "echo", "y", **order)
        runs.forget(root)
        assert run is begin(runs, "echo", "y", **order)


async def test_a_result_of_a_call_that_nobody_made_is_refused(autojump_clock):
    """Nothing of what a client says is lost in silence."""
    async with opened(echo) as runs:
        with pytest.raises(BadRequest, match="got one of 'c9', which is none of its calls"):
            begin(runs, "echo", history=(), said=(ToolMessage("c9", "look", "1"), UserMessage("x")))


# Tools that the client has


async def test_a_call_of_a_client_s_tool_ends_the_run_for_the_client_to_go_on(autojump_clock):
    """The agent's own tools are called before; the next run begins with what the client's said."""
    both = ask_for(("lookup", '{"name":"ada"}'), ("look", "{}"), ("nap", "{}"))
    model, provider = chat(both, say("All there."), tools=[lookup])
    async with opened(model) as runs:
        asked = await played(runs, "chat", "Where?", makes_thread=True, tools=(LOOK, NAP))
        answers = (ToolMessage("call2", "look", '"a room"'), ToolMessage("call3", "nap", '"ok"'))
        over = await played(
            runs, "chat", [{"call_id": "call2"}], continues=asked.id, said=answers, tools=(LOOK,)
        )
    began, end = asked.log.events[0], asked.log.events[-1]
    assert isinstance(began, RunStarted)
    assert isinstance(end, RunFinished)
    assert ("look", "nap") == began.client_tools
    assert ("call2", "call3") == end.pending
    assert [("tools", "tool_round")] == [
        (e.name, e.kind) for e in asked.log.events if getattr(e, "kind", "") == "tool_round"
    ][:1]
    assert ["lookup", "look", "nap"] == [spec.name for spec in provider.prompts[0].tools]
    calls = (
        ToolCall("call1", "lookup", '{"name":"ada"}'),
        ToolCall("call2", "look", "{}"),
        ToolCall("call3", "nap", "{}"),
    )
    assert (
        UserMessage("Where?"),
        AssistantMessage("", calls),
        ToolMessage("call1", "lookup", '"ada is here"'),
        *answers,
    ) == provider.prompts[1].messages
    assert ("All there.", ()) == (over.result, over.end.pending)


async def test_a_client_s_tool_that_is_not_answered_is_said_to_be(autojump_clock):
    """The person has moved on: the model is told that nothing came of it."""
    model, provider = chat(ask_for(("look", "{}")), say("Well."))
    async with opened(model) as runs:
        asked = await played(runs, "chat", "Where?", makes_thread=True, tools=(LOOK,))
        assert [] == [e for e in asked.log.events if getattr(e, "kind", "") == "tool_round"]
        await played(runs, "chat", "Never mind.", continues=asked.id)
    assert (
        UserMessage("Where?"),
        AssistantMessage("", (ToolCall("call1", "look", "{}"),)),
        ToolMessage("call1", "look", '{"error":"the tool has not answered"}', is_error=True),
        UserMessage("Never mind."),
    ) == provider.prompts[1].messages


async def test_an_agent_s_own_tool_beats_the_client_s_of_that_name(autojump_clock):
    """Nobody can put another one in its place; of two with one name the last counts."""
    own = attrs.evolve(LOOK, name="lookup", description="Mine.")
    other = attrs.evolve(LOOK, description="Other.")
    model, provider = chat(ask_for(("lookup", '{"name":"ada"}')), say("x"), tools=[lookup])
    async with opened(model) as runs:
        run = await played(runs, "chat", "Where?", tools=(own, LOOK, other))
    assert ["Look a name up.", "Other."] == [spec.description for spec in provider.prompts[0].tools]
    assert (("look",), ()) == (run.log.events[0].client_tools, run.end.pending)


async def test_who_wants_no_tools_gets_none(autojump_clock):
    """Neither the agent's nor the client's."""
    model, provider = chat(say("x"), tools=[lookup])
    async with opened(model) as runs:
        await played(runs, "chat", "Where?", tools=(LOOK,), uses_tools=False)
    assert () == provider.prompts[0].tools


async def test_a_model_within_another_s_run_has_nothing_of_the_client(autojump_clock):
    """The tools, and what was said, are for the run's own model."""
    model, provider = chat(say("x"))

    @agent
    async def outer(run: RunContext, input: Any) -> Any:
        return await model(run, input)

    async with opened(outer) as runs:
        answers = (ToolMessage("c", "look", "1"),)
        await played(runs, "outer", "Hi.", tools=(LOOK,), said=answers)
    assert ((), (UserMessage("Hi."),)) == (provider.prompts[0].tools, provider.prompts[0].messages)


def test_calls_that_are_awaited_stay_open():
    """All others have their answer."""
    calls = (ToolCall("a", "look", "{}"), ToolCall("b", "nap", "{}"))
    conversation: list[Message] = [UserMessage("Hi."), AssistantMessage("", calls)]
    assert tuple(conversation) == well_ended(conversation, awaited=["a", "b"])
    assert ["a"] == [
        m.call_id for m in well_ended(conversation, awaited=["b"]) if isinstance(m, ToolMessage)
    ]


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ("a? A! u", "a? A! u"),
        ("A! a? u", "a? A- u"),  # a result before its call is of none
        ("a? u A!", "a? A! u"),  # a person was quicker than the tool
        ("a? A! A! u", "a? A! u"),
        ("u B! u", "u u"),
        ("a? b? B! A!", "a? A! b? B!"),
        ("a? A! a? u", "a? A! a? A- u"),  # some models count anew
        ("ab? B! u", "ab? A- B! u"),
    ],
)
def test_a_conversation_is_put_in_the_order_that_models_take(conversation, expected):
    """Each call is followed by its one result, and there is no other result."""

    def read(words: str) -> list[Message]:
        messages: list[Message] = []
        for word in words.split():
            match word[-1]:
                case "?":
                    calls = tuple(ToolCall(name, f"name {name}", "{}") for name in word[:-1])
                    messages.append(AssistantMessage("", calls))
                case "!":
                    messages.append(ToolMessage(word[0].lower(), f"name {word[0].lower()}", "1"))
                case "-":
                    said = '{"error":"the tool has not answered"}'
                    name = word[0].lower()
                    messages.append(ToolMessage(name, f"name {name}", said, is_error=True))
                case _:
                    messages.append(UserMessage(word))
        return messages

    assert tuple(read(expected)) == well_ended(read(conversation))


def test_a_result_has_the_name_of_its_call():
    """Some protocols do not say it again."""
    call = AssistantMessage("", (ToolCall("a", "look", "{}"),))
    assert (call, ToolMessage("a", "look", "1")) == well_ended([call, ToolMessage("a", "", "1")])


async def test_only_models_call_what_the_client_has(autojump_clock):
    """A function's own tools are nobody else's, whatever they are called."""

    @agent
    async def looking(run: RunContext, _input: Any) -> Any:
        return await run.call(lookup, {"name": "ada"})

    async with opened(looking) as runs:
        run = await played(runs, "looking", tools=(attrs.evolve(LOOK, name="lookup"),))
    assert ((), ()) == (run.log.events[0].client_tools, run.end.pending)


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([attrs.evolve(LOOK, name="")], "a tool's name of 1 to 128 characters, got ''"),
        ([attrs.evolve(LOOK, name="x" * 129)], "a tool's name of 1 to 128 characters, got 'xxx"),
        ([attrs.evolve(LOOK, name="half \ud800")], "the names of tools: .* half of a surrogate"),
        ([attrs.evolve(LOOK, name=f"t{n}") for n in range(129)], "at most 128 tools"),
    ],
)
async def test_tools_that_are_none_start_nothing(tools, says, autojump_clock):
    """Nor do they end what goes on in the thread."""
    model, _ = chat(say("x"))
    async with opened(model, forever) as runs:
        old = begin(runs, "forever", thread_id="t", on_disconnect="grace")
        with pytest.raises(BadRequest, match=says):
            begin(runs, "chat", thread_id="t", tools=tuple(tools), if_busy="supersede")
        assert ("running", [old]) == (old.state, list(runs))


async def test_what_is_said_while_the_client_s_tools_are_called_for_is_told_afterwards(
    autojump_clock,
):
    """Behind what they answer, and without a run of its own."""
    gate = trio.Event()

    @tool
    async def wait() -> str:
        await gate.wait()
        return "done"

    model, provider = chat(ask_for(("look", "{}"), ("wait", "{}")), say("x"), tools=[wait])
    async with opened(model) as runs:
        run = begin(runs, "chat", "Go.", makes_thread=True, tools=(LOOK,))
        await wait_all_tasks_blocked()
        run.context.hear("Hurry.", "steer")
        gate.set()
        await run.done.wait()
        assert [run] == list(runs)
        answer = ToolMessage("call1", "look", "1")
        await played(runs, "chat", continues=run.id, said=(answer,))
    calls = (ToolCall("call1", "look", "{}"), ToolCall("call2", "wait", "{}"))
    assert (
        UserMessage("Go."),
        AssistantMessage("", calls),
        answer,
        ToolMessage("call2", "wait", '"done"'),
        UserMessage("Hurry."),
    ) == provider.prompts[1].messages


# Room for the next run


async def test_those_that_make_room_do_not_take_it(autojump_clock):
    """A full queue does not refuse whoever comes in place of one in it."""
    agents = {"forever": forever, "echo": echo}
    async with open_runs(agents, limits=Limits(max_running=1, max_queued=1)) as runs:
        order = {"thread_id": "t", "on_disconnect": "grace"}
        first = begin(runs, "forever", **order)
        begin(runs, "echo", **order, if_busy="enqueue")
        new = begin(runs, "echo", 2, **order, if_busy="supersede")
        await new.done.wait()
        assert ("cancelled", "success") == (first.end.outcome, new.end.outcome)


async def test_a_run_that_nobody_watches_makes_room(autojump_clock):
    """The next one begins when it is gone; so do those that were waiting behind it."""
    async with opened(forever, echo) as runs:
        old = begin(runs, "forever", thread_id="t", on_disconnect="grace")
        queued = begin(runs, "echo", 1, thread_id="t", on_disconnect="grace", if_busy="enqueue")
        new = begin(runs, "echo", 2, thread_id="t", if_busy="supersede")
        assert ["cancelling", "finished", "queued"] == [r.state for r in (old, queued, new)]
        newest = begin(runs, "echo", 3, thread_id="t", on_disconnect="grace", if_busy="enqueue")
        await newest.done.wait()
    assert ["client_cancel"] * 2 == [run.end.receipt.cause for run in (old, queued)]
    assert ["success"] * 2 == [run.end.outcome for run in (new, newest)]


@pytest.mark.parametrize("policy", ["continue", "grace"])
async def test_a_run_that_somebody_watches_or_that_is_to_go_on_does_not(policy, autojump_clock):
    """It is a conflict, and nothing is cancelled."""
    async with opened(forever, echo) as runs:
        old = begin(runs, "forever", thread_id="t", on_disconnect=policy)
        holder = object()
        if policy == "grace":
            old.hold(holder)
        with pytest.raises(Conflict, match="is busy with the run"):
            begin(runs, "echo", thread_id="t", if_busy="supersede")
        assert ("running", [old]) == (old.state, list(runs))
        old.cancel("client_cancel")
        new = begin(runs, "echo", thread_id="t", if_busy="supersede")
        assert "queued" == new.state
        await new.done.wait()


async def test_who_waits_for_a_person_is_in_nobody_s_way(autojump_clock):
    """Its place is lent to others; answered, it goes on, and its place is its own again."""
    alone = Agent("alone", asking.function, max_running=1)
    async with open_runs({"alone": alone}, limits=Limits(max_running=1)) as runs:
        waiting = [begin(runs, "alone", [["text"]]) for _ in range(3)]
        await wait_all_tasks_blocked()
        assert ["waiting", "waiting", "queued"] == [run.state for run in waiting]
        waiting[0].context.answer_several({"": "ada"})
        await waiting[0].done.wait()
        await wait_all_tasks_blocked()
        assert ["finished", "waiting", "waiting"] == [run.state for run in waiting]
        waiting[1].cancel("client_cancel")
        waiting[2].context.answer_several({"": "ada"})
        await runs.wait_idle()
        assert (0, 0) == (runs._lent, runs._running.total())
        last = [begin(runs, "alone", []) for _ in range(2)]
        assert ["running", "queued"] == [run.state for run in last]


# Answers


def questions(*kinds: str) -> list[Question]:
    return [Question(id=f"{kind}{n}", kind=kind, prompt="?") for n, kind in enumerate(kinds)]


@agent
async def asking(run: RunContext, input: Any) -> Any:
    """Ask for as many things at once as the input says; the answers, or why there is none."""
    answers: dict[int, Any] = {}

    async def ask(number: int, kinds: list[str]) -> None:
        try:
            answers[number] = await run.ask(questions(*kinds))
        except AgentError as error:
            answers[number] = error.code

    async with trio.open_nursery() as nursery:
        for number, kinds in enumerate(input):
            nursery.start_soon(ask, number, kinds)
    return [answers[number] for number in sorted(answers)]


async def until_asked(run: Run, count: int) -> list[str]:
    """The ids of the requests, in the order of the input."""
    await wait_until(lambda: len(run.context.asked) == count)
    by_kinds = {tuple(q.id for q in a.questions): i for i, a in run.context.asked.items()}
    kinds = [tuple(q.id for q in questions(*each)) for each in run.context.input]
    return [by_kinds[each] for each in kinds]


async def test_several_requests_are_answered_at_once_or_not_at_all(autojump_clock):
    """By request id; one that does not fit leaves all of them open."""
    async with opened(asking) as runs:
        run = begin(runs, "asking", [["text"], ["confirm", "text"]])
        first, second = await until_asked(run, 2)
        with pytest.raises(BadRequest, match="expected answers to confirm0, text1"):
            run.context.answer_several({first: "ada", second: "yes"})
        with pytest.raises(NotFound, match="open request"):
            run.context.answer_several({first: "ada", "nothing": "yes"})
        with pytest.raises(BadRequest, match="expected text1 as well, got none"):
            run.context.answer_several({first: "ada", second: {"confirm0": True}})
        for nothing in ({}, {"": "ada"}, {"": "ada", first: "ada"}):
            with pytest.raises(BadRequest, match=f"by request id .{', '.join(run.context.asked)}."):
                run.context.answer_several(nothing)
        assert 2 == len(run.context.asked)
        run.context.answer_several({first: "ada", second: {"confirm0": "yes", "text1": "so"}})
        with pytest.raises(NotAsked, match="answered already"):
            run.context.answer_several({first: "bob"})
        await run.done.wait()
    assert [{"text0": "ada"}, {"confirm0": True, "text1": "so"}] == run.result


async def test_a_person_may_decline(autojump_clock):
    """A confirmation is then a no; anything else is withdrawn, and the agent hears why."""
    async with opened(asking) as runs:
        run = begin(runs, "asking", [["text"], ["confirm"]])
        first, second = await until_asked(run, 2)
        run.context.answer_several({first: None, second: None})
        assert {} == run.context.asked
        await run.done.wait()
    assert ["declined", {"confirm0": False}] == run.result
    told = [type(event).__name__ for event in run.log.events]
    assert (1, 1) == (told.count("InputWithdrawn"), told.count("InputReceived"))


async def test_the_only_request_needs_no_id(autojump_clock):
    """What is said is for it."""
    async with opened(asking) as runs:
        run = begin(runs, "asking", [["confirm"]])
        await until_asked(run, 1)
        run.context.answer_several({"": None})
        await run.done.wait()
    assert [{"confirm0": False}] == run.result


# Over a socket


# What a request to `/probe/…` wants, as its body or its query says.


def decode_start(request: Request) -> Start:
    body = json.loads(request.body)
    reply = ReplyWithHistory(show_history) if body.get("delivery") == "wait" else None
    return Start(**{"agent": None, "input": None, "delivery": "stream"} | body, reply=reply)


def decode_watch(request: Request) -> Watch:
    after = request.query.get("after")
    return Watch(
        run_id=request.query.get("run"),
        thread_id=request.query.get("thread"),
        after=(lambda events: (len(events), 0)) if after == "now" else (0, 0),
        goes_on="goes_on" in request.query,
        on_disconnect=request.query.get("on_disconnect"),
    )


def show_history(_run: Any, _events: Any, said: Any) -> Reply:
    return Reply(json.dumps([message.text for message in said]).encode())


def decode_query(request: Request) -> ListAgents:
    return ListAgents(reply=lambda _cards: Reply(json.dumps(request.pairs).encode()))


def decode_show(request: Request) -> Show:
    return Show(
        run_id=request.query["run"],
        reply=ReplyWithHistory(show_history) if "history" in request.query else None,
        thread_id=request.query.get("thread"),
        waits="waits" in request.query,
        on_disconnect=request.query.get("on_disconnect"),
    )


def decode_cancel(request: Request) -> Cancel:
    return Cancel(run_id=request.query["run"], forgets=True)


def decode_stop(request: Request) -> Cancel:
    return Cancel(
        thread_id=request.query["thread"],
        reply_if_idle=Reply(b"", 204),
        must_exist="must_exist" in request.query,
    )


def decode_runs(request: Request) -> ListRuns:
    return ListRuns(thread_id=request.query["thread"])


def decode_thread(request: Request) -> ShowThread:
    def reply(thread, run, events, said):
        shown = {
            "thread": thread.id,
            "run": run and run.id,
            "events": len(events),
            "said": [message.text for message in said],
        }
        return Reply(json.dumps(shown).encode())

    return ShowThread(thread_id=request.query["thread"], conversation_reply=reply)


def decode_agents(_request: Request) -> ListAgents:
    def reply(cards: list[AgentCard]) -> Reply:
        return Reply(json.dumps([[c.name, [t.name for t in c.tools]] for c in cards]).encode())

    return ListAgents(reply=reply)


PROBE = Dialect(
    name="probe",
    mount="/probe",
    routes=(
        Route("POST", "/start", decode_start),
        Route("GET", "/watch", decode_watch),
        Route("GET", "/show", decode_show),
        Route("POST", "/cancel", decode_cancel),
        Route("POST", "/stop", decode_stop),
        Route("GET", "/runs", decode_runs),
        Route("GET", "/thread", decode_thread),
        Route("GET", "/agents", decode_agents),
        Route("GET", "/query", decode_query),
    ),
    encoder=NATIVE.encoder,
    present=NATIVE.present,
    framing=Framing(ends_at=frozenset({InputRequested}), headers={"X-Probe": "yes"}),
    locate=lambda mount, run, thread, _options: {"Content-Location": f"{mount}/{thread}/{run}"},
    max_body=MAX_HISTORY,
)


@attrs.define
class Recalling:
    """An encoder that begins with what was said before."""

    encoder: Any
    said: list[str] = attrs.field(factory=list)

    def recall(self, said: Any) -> None:
        """Take it."""
        self.said = [message.text for message in said]

    def feed(self, event: Any) -> list[bytes]:
        """The native frames, behind one of its own."""
        said = b"event: recalled\ndata: %b\n\n" % json.dumps(self.said).encode()
        frames = list(self.encoder.feed(event))
        return [said, *frames] if isinstance(event, RunStarted) else frames


RECALL = attrs.evolve(
    PROBE,
    name="recall",
    mount="/recall",
    routes=PROBE.routes[:1],
    encoder=lambda options: Recalling(NATIVE.encoder(options)),
)


def break_down(_options: Any) -> Any:
    """Make no encoder."""
    raise RuntimeError


def be_deep(_options: Any) -> Any:
    """Find that what was asked for is too deep."""
    raise RecursionError


DEEP = attrs.evolve(RECALL, name="deep", mount="/deep", encoder=be_deep)
BROKEN = attrs.evolve(RECALL, name="broken", mount="/broken", encoder=break_down)


@attrs.frozen
class Site:
    """A server, and a client that behaves."""

    server: Server
    http: httpx2.AsyncClient

    async def start(self, *, status: int = 200, **body: Any) -> list[Any]:
        """What a run that is started says in its response, or the problem that it has."""
        answer = await self.http.post("/probe/start", json=body)
        assert status == answer.status_code, answer.text
        return types(answer) if status == 200 else answer.json()

    async def get(self, path: str, *, status: int = 200, **query: str) -> Any:
        """The answer, which must have that status."""
        answer = await self.http.get(f"/probe/{path}", params=query)
        assert status == answer.status_code, answer.text
        return answer


def types(answer: httpx2.Response) -> list[str]:
    return [frame.event for frame in Decoder().feed(answer.content)]


@asynccontextmanager
async def site(*agents: Agent, **server: Any) -> AsyncIterator[Site]:
    with trio.fail_after(PATIENCE):
        async with (
            open_server(
                *agents, dialects=(NATIVE, PROBE, RECALL, BROKEN, DEEP), **server
            ) as opened_,
            httpx2.AsyncClient(base_url=opened_.urls[0], timeout=None) as http,
        ):
            yield Site(opened_, http)


BEGUN = ["run_started", "input_requested"]
ENDED = ["input_received", "run_finished"]


async def test_the_next_request_answers_by_request_id():
    """Its response goes on where the last one ended; what is asked no longer is a conflict."""
    async with site(asking) as s:
        assert BEGUN == await s.start(input=[["confirm"]], thread_id="t", run_id="r1")
        (request_id,) = s.server.runs.find("r1").context.asked
        wrong = await s.start(status=400, thread_id="t", answers={request_id: "perhaps"})
        assert "expected true or false for 'confirm0', got 'perhaps'" == wrong["detail"]
        assert ENDED == await s.start(thread_id="t", answers={request_id: "yes"})
        again = await s.start(status=409, thread_id="t", answers={request_id: "ada"})
        assert "nothing is asked (any more) in the thread 't'" in again["detail"]
        known = await s.start(status=409, continues="r1", answers={request_id: "ada"})
        assert "nothing is asked (any more) in the run r1" in known["detail"]
        assert [{"confirm0": True}] == s.server.runs.find("r1").result


async def test_a_run_that_is_continued_may_wait_for_the_answer():
    """Whatever comes then is the answer, streamed or not."""
    async with site(asking) as s:
        for delivery in ("stream", "wait", "background"):
            run_id = f"r-{delivery}"
            await s.start(input=[["text"]], makes_thread=True, run_id=run_id)
            body = {"input": "ada", "continues": run_id, "delivery": delivery}
            answer = await s.http.post("/probe/start", json=body)
            run = s.server.runs.find(run_id)
            await run.done.wait()
            assert answer.status_code == (202 if delivery == "background" else 200)
            assert [{"text0": "ada"}] == run.result


async def test_a_run_is_rejoined_by_its_id():
    """From its beginning, past questions that have been answered, to the next one or the end."""
    async with site(asking) as s:
        order = {"input": [["text"]], "run_id": "r1", "rejoins": True, "thread_id": "t"}
        assert BEGUN == await s.start(**order)
        assert BEGUN == await s.start(**order)
        (request_id,) = s.server.runs.find("r1").context.asked
        await s.start(thread_id="t", answers={request_id: "ada"})
        assert [*BEGUN, *ENDED] == await s.start(**order)
        assert 1 == len(list(s.server.runs))


async def test_who_comes_back_has_answered_before():
    """What was answered is not answered again; what is asked now is. Nobody else's run is shown."""

    @agent
    async def twice(run: RunContext, _input: Any) -> Any:
        return [await run.ask("One?"), await run.ask("Two?")]

    async with site(twice) as s:
        order = {"run_id": "r1", "rejoins": True, "thread_id": "t"}
        answered = ["input_received", "input_requested"]
        assert BEGUN == await s.start(**order)
        (one,) = s.server.runs.find("r1").context.asked
        assert answered == await s.start(**order, answers={one: "1"})
        assert [*BEGUN, *answered] == await s.start(**order, answers={one: "1"})
        (two,) = s.server.runs.find("r1").context.asked
        assert ENDED == await s.start(**order, answers={two: "2"})
        assert [*BEGUN, *answered, *ENDED] == await s.start(**order, answers={two: "2"})
        assert ["1", "2"] == s.server.runs.find("r1").result
        other = await s.start(status=409, run_id="r1", rejoins=True, thread_id="other")
        assert "expected the id of a new run, got 'r1'" in other["detail"]


@pytest.mark.parametrize("answered", [[0, 1], [1], [0]])
async def test_a_response_goes_on_behind_the_last_question_it_answers(answered):
    """Also where two are open at once: it ends at one that was not answered with it."""
    async with site(asking) as s:
        await s.start(input=[["text"], ["confirm"]], thread_id="t", run_id="r1")
        run = s.server.runs.find("r1")
        ids = await until_asked(run, 2)
        in_order = sorted(ids, key=lambda each: run.context.asked[each].event.seq)
        order = {in_order[n]: None for n in answered}

        async def answer_rest() -> None:
            await wait_until(lambda: len(run.context.asked) == 2 - len(answered))
            run.context.answer_several(dict.fromkeys(run.context.asked))

        async with trio.open_nursery() as nursery:
            if answered == [1]:
                nursery.start_soon(answer_rest)
            seen = await s.start(thread_id="t", answers=order)
        assert ("input_requested" if answered == [0] else "run_finished") == seen[-1]
        assert (answered == [0]) == ("input_requested" in seen)


async def test_an_answer_that_does_not_fit_is_nobody_who_has_left():
    """A run that was never watched goes on once it is answered."""
    async with site(asking) as s:
        body = {"delivery": "background", "input": [["confirm"]]}
        await s.http.post("/probe/start", json=body | {"run_id": "r1", "thread_id": "t"})
        run = s.server.runs.find("r1")
        await run.wait_done_or_asking()
        for delivery in ("stream", "wait", "background"):
            await s.start(status=400, thread_id="t", delivery=delivery, answers={"": "perhaps"})
        assert (None, {}, 0) == (run._left, run._holders, s.server.app.streams.open)
        assert 0 == sum(s.server.app.streams.closed.values())


async def test_who_continues_a_run_has_its_agent():
    """Unless they name another one."""
    async with site(forever, echo) as s:
        await s.start(agent="echo", input="1", makes_thread=True, run_id="r1")
        await s.start(input="2", continues="r1", run_id="r2")
        assert "echo" == s.server.runs.find("r2").agent.name


async def test_what_is_continued_must_be_there():
    """The error has a code of its own, for it is no agent and no run that was asked for."""
    async with site(echo, asking) as s:
        assert "previous_not_found" == (await s.start(status=404, continues="r1"))["code"]
        await s.start(agent="asking", input=[["text"]], thread_id="t", run_id="r1")
        for more in ({"answers": {"": "x"}}, {"input": "x"}):
            order = {"continues": "r1", "thread_id": "other", **more}
            wrong = await s.start(status=404, **order)
            assert "still kept in the thread 'other', got 'r1'" in wrong["detail"]
        assert BEGUN == await s.start(agent="asking", run_id="r1", thread_id="t", rejoins=True)
        wrong = await s.start(status=409, agent="echo", run_id="r1", thread_id="t", rejoins=True)
        assert "the thread 't' is busy" in wrong["detail"]


async def test_a_run_that_nobody_could_be_shown_is_not_left_to_itself():
    """Where its encoder cannot be made, it is cancelled."""
    async with site(forever) as s:
        answer = await s.http.post("/broken/start", json={"run_id": "r1"})
        assert 500 == answer.status_code
        run = s.server.runs.find("r1")
        await run.done.wait()
        assert "cancelled" == run.end.outcome
        order = {"run_id": "r2", "delivery": "background"}
        await s.http.post("/probe/start", json=order)
        again = {"run_id": "r2", "rejoins": True}
        deep = await s.http.post("/deep/start", json=again)
        assert (400, "expected JSON that is less deeply nested") == (
            deep.status_code,
            deep.json()["detail"],
        )
        assert 500 == (await s.http.post("/broken/start", json=again)).status_code
        assert "running" == s.server.runs.find("r2").state


async def test_a_large_body_is_large_for_what_is_said_in_it():
    """Not for a million values, each of which takes its time; text is free."""
    whole = b'{"input": "%b"}' % (b"x" * 3_000_000)
    for body in (b"[" * 600_000, b'"a":' * 600_000, b"," * 2_100_000):
        with pytest.raises(BadRequest, match="expected at most 500000 arrays and objects"):
            read_body(Request("POST", {}, {}, {}, body + whole), _Body, what="try")
    assert 3_000_000 == len(read_body(Request("POST", {}, {}, {}, whole), _Body, what="try").input)


class _Body(msgspec.Struct):
    input: Any = None


async def test_a_thread_s_run_is_watched_or_there_is_nothing():
    """204 where nothing goes on, or what does is about to end."""
    async with site(asking, forever) as s:
        await s.get("watch", status=204, thread="t")
        await s.start(agent="asking", input=[["text"]], thread_id="t", run_id="r1")
        assert BEGUN == types(await s.get("watch", thread="t", goes_on=""))
        run = s.server.runs.find("r1")
        (request_id,) = run.context.asked
        await s.start(thread_id="t", answers={request_id: "ada"})
        await s.get("watch", status=204, thread="t")
        assert [*BEGUN, *ENDED] == types(await s.get("watch", run="r1", goes_on=""))
        assert BEGUN == types(await s.get("watch", run="r1", thread="t"))
        await s.get("watch", status=404, run="r1", thread="other")
        await s.get("watch", status=204, run="r1", after="now")


async def test_a_run_that_nobody_has_read_to_its_end_is_still_to_be_read():
    """By whoever comes to its thread; then there is nothing more."""
    async with site(echo) as s:
        order = {"delivery": "background", "run_id": "r1", "thread_id": "t"}
        await s.http.post("/probe/start", json=order)
        await s.server.runs.find("r1").done.wait()
        assert "run_finished" == types(await s.get("watch", thread="t"))[-1]
        await s.get("watch", status=204, thread="t")


@pytest.mark.parametrize("must_exist", [False, True])
async def test_stopping_what_there_is_not_may_do_no_harm(must_exist):
    """A thread that nobody knows is an idle one, or not there."""
    async with site(echo) as s:
        idle = await s.http.post(f"/probe/stop?thread=t{'&must_exist=' if must_exist else ''}")
        assert idle.status_code == (404 if must_exist else 204)


async def test_how_large_a_conversation_may_be_is_the_operator_s_to_say():
    """But never less than any other request."""
    async with site(echo, max_body=1_000, max_history=2_000) as s:
        assert 2_000 == s.server.app.max_body("POST", s.server.app.dialects["probe"])
        await s.start(input="x" * 1_900)
        refused = await s.http.post("/probe/start", json={"input": "x" * 2_000})
        assert (413, "expected a body of at most 2000 bytes, got more") == (
            refused.status_code,
            refused.json()["detail"],
        )
    async with site(echo, max_body=1_000, max_history=500) as s:
        assert 1_000 == s.server.app.max_body("POST", s.server.app.dialects["probe"])


@pytest.mark.parametrize("rotates", [False, True])
async def test_only_streams_whose_clients_come_back_are_rotated(rotates):
    """Others last as long as the run."""
    gate = trio.Event()

    async with site(gated(gate), rotation=0.001) as s:
        await s.http.post("/probe/start", json={"delivery": "background", "run_id": "r1"})
        path = "/runs/r1/events" if rotates else "/probe/watch?run=r1"
        async with s.http.stream("GET", path) as answer:
            if not rotates:
                await trio.sleep(0.02)
                gate.set()
            body = b"".join([piece async for piece in answer.aiter_bytes()])
        assert (b"run_finished" in body) is not rotates
        gate.set()


def gated(gate: trio.Event) -> Agent:
    """An agent that says something, and goes on when the gate opens."""

    async def function(run: RunContext, _input: Any) -> None:
        run.emit("before")
        await gate.wait()
        run.emit("after")

    return Agent("gated", function)


async def test_who_begins_with_what_comes_misses_what_was():
    """A place may be found in the events so far."""
    gate = trio.Event()
    async with site(gated(gate)) as s:
        await s.http.post("/probe/start", json={"delivery": "background", "run_id": "r1"})
        run = s.server.runs.find("r1")
        await wait_until(lambda: run.log.end == 2)
        async with s.http.stream("GET", "/probe/watch?run=r1&after=now") as answer:
            gate.set()
            names = [getattr(e, "name", "") async for e in read_events(answer.aiter_bytes())]
        assert ["after", ""] == names


@pytest.mark.parametrize("path", ["watch?run=r1", "show?run=r1&waits="])
async def test_whoever_watches_or_waits_may_change_what_leaving_means(path):
    """A run that was to go on is cancelled when they leave; waiting holds it like a stream."""
    async with site(forever) as s:
        order = {"delivery": "background", "run_id": "r1", "on_disconnect": "continue"}
        await s.http.post("/probe/start", json=order)
        run = s.server.runs.find("r1")
        async with connect(s.server.urls[0]) as client:
            await client.send(request("GET", f"/probe/{path}&on_disconnect=cancel"))
            await wait_until(lambda: Policy("cancel") in run._holders.values())
            async with connect(s.server.urls[0]) as other:  # as long as somebody else is there
                await other.send(request("GET", "/runs/r1/events"))
                await wait_until(lambda: len(run._holders) == 2)
            await wait_until(lambda: len(run._holders) == 1)
            assert "running" == run.state
        await run.done.wait()
        assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)
        wrong = await s.get("show", status=400, run="r1", waits="", on_disconnect="perhaps")
        assert "on_disconnect" in wrong.text


async def test_whoever_waits_is_told_when_it_is_over_or_asks():
    """The same without waiting, at once."""
    async with site(asking, echo, forever) as s:
        start = {"delivery": "background"}
        await s.http.post("/probe/start", json=start | {"agent": "echo", "run_id": "r1"})
        assert "finished" == (await s.get("show", run="r1", waits="")).json()["state"]
        asks = start | {"agent": "asking", "run_id": "r2", "input": [["text"]]}
        await s.http.post("/probe/start", json=asks)
        assert "waiting" == (await s.get("show", run="r2", waits="")).json()["state"]
        await s.http.post("/probe/start", json=start | {"agent": "forever", "run_id": "r3"})
        assert "running" == (await s.get("show", run="r3")).json()["state"]


async def test_what_is_cancelled_may_be_forgotten():
    """Nothing is kept of it once it is gone."""
    async with site(forever, echo) as s:
        await s.http.post("/probe/start", json={"delivery": "background", "run_id": "r1"})
        cancelled = await s.http.post("/probe/cancel?run=r1")
        assert (200, "cancelled") == (cancelled.status_code, cancelled.json()["outcome"])
        await s.get("show", status=404, run="r1")
        assert 404 == (await s.http.post("/probe/cancel?run=r1")).status_code


@pytest.mark.parametrize("leaves", [False, True])
async def test_what_is_forgotten_is_so_when_it_is_gone_with_all_below_it(leaves):
    """Whoever has asked for it need not be there any more."""

    @agent
    async def parent(run: RunContext, _input: Any) -> Any:
        await run.delegate("echo", "x")
        try:
            await run.delegate("forever", None)
        finally:
            with run.cleanup():
                await trio.sleep(0.05)

    async with site(parent, forever, echo) as s:
        order = {"delivery": "background", "agent": "parent", "run_id": "r1"}
        await s.http.post("/probe/start", json=order)
        await wait_until(lambda: len(list(s.server.runs)) == 3)
        run = s.server.runs.find("r1")
        async with connect(s.server.urls[0], is_native=False) as client:
            await client.send(request("POST", "/probe/cancel?run=r1"))
            if not leaves:
                await client.finish()
            else:
                await wait_until(lambda: run.state == "cancelling")
        await run.done.wait()
        assert [] == list(s.server.runs)


async def test_who_waits_is_told_what_was_said_before():
    """Where the dialect's answer wants to know."""
    async with site(echo) as s:
        await s.start(input="1", thread_id="t")
        body = {"input": "2", "thread_id": "t", "delivery": "wait", "run_id": "r2"}
        assert ["1", "1"] == (await s.http.post("/probe/start", json=body)).json()
        assert ["1", "1"] == (await s.get("show", run="r2", history="")).json()


async def test_an_encoder_may_recall_what_was_said_before():
    """Also of a run that waited for its turn while that was said."""
    async with site(gated(gate := trio.Event()), echo) as s:
        path = "/recall/start"
        async with trio.open_nursery() as nursery:
            order = {"agent": "gated", "thread_id": "t", "input": "1", "delivery": "background"}
            await s.http.post("/probe/start", json=order)
            answers: list[httpx2.Response] = []

            async def start() -> None:
                body = {"agent": "echo", "thread_id": "t", "input": "2", "if_busy": "enqueue"}
                answers.append(await s.http.post(path, json=body))

            nursery.start_soon(start)
            await wait_until(lambda: s.server.app.streams.open == 1)
            gate.set()
        assert ["recalled", "run_started"] == types(answers[0])[:2]
        (recalled, *_) = Decoder().feed(answers[0].content)
        assert ["1"] == json.loads(recalled.data)


async def test_repeated_fields_of_a_query_are_there():
    """Beside those by name, as they came."""
    async with site(echo) as s:
        answer = await s.http.get("/probe/query?a=1&b=2&a=3")
        assert [["a", "1"], ["b", "2"], ["a", "3"]] == answer.json()


async def test_many_large_bodies_at_once_are_refused():
    """Those that come when there is no room for more; nothing is left of them."""
    body = b'{"input": "' + b"x" * 2_000_000
    async with site(echo, max_bodies=2 * len(body)) as s:  # so that the last bytes are too many
        async with connect(s.server.urls[0]) as slow:
            head = request("POST", "/probe/start", content_length=str(len(body) + 2))
            await slow.send(head)
            await slow.stream.send_all(body)
            await wait_until(lambda: s.server.app.bodies._total >= len(body))
            for _ in range(3):
                answer = await s.http.post("/probe/start", content=body + b'"}')
                assert (503, "overloaded") == (answer.status_code, answer.json()["code"])
            await slow.stream.send_all(b'"}')
            await wait_until(lambda: s.server.app.bodies._total == 0)
        await wait_until(lambda: not s.server.app.bodies._held)
        assert "run_finished" == (await s.start(input="x" * 2_000_000))[-1]


async def test_a_body_that_there_is_no_room_for_is_refused_before_it_is_whole():
    """Also if only its first bytes have come, and though there may be room again."""
    async with site(echo, max_bodies=1_000) as s:
        async with connect(s.server.urls[0]) as slow, connect(s.server.urls[0]) as refused:
            await slow.send(request("POST", "/probe/start", content_length="2000"))
            await slow.stream.send_all(b"x" * 1_000)
            await wait_until(lambda: s.server.app.bodies._total == 1_000)
            await refused.send(request("POST", "/probe/start", content_length="2000"))
            await refused.stream.send_all(b"y")
            problem = json.loads(await refused.finish())
            assert (503, "overloaded") == (refused.status, problem["code"])
            await wait_until(lambda: s.server.app.bodies._total == 1_000)
        await wait_until(lambda: not s.server.app.bodies._held)


async def test_a_thread_s_runs_and_words_are_shown():
    """Its current run with its events, and what was said before it."""
    async with site(echo) as s:
        await s.get("thread", status=404, thread="t")
        await s.get("runs", status=404, thread="t")
        for number in ("1", "2"):
            await s.start(input=number, thread_id="t", run_id=f"r{number}")
        await s.start(input="x", thread_id="u")
        listed = (await s.get("runs", thread="t")).json()["runs"]
        assert ["r2", "r1"] == [run["id"] for run in listed]
        assert {
            "thread": "t",
            "run": "r2",
            "events": 5,
            "said": ["1", "1"],
        } == (await s.get("thread", thread="t")).json()
        await s.http.post("/threads", json={"id": "new"})
        shown = (await s.get("thread", thread="new")).json()
        assert {"thread": "new", "run": None, "events": 0, "said": []} == shown


async def test_agents_are_shown_as_a_dialect_wants():
    """With their tools."""
    model, _ = chat(tools=[lookup])
    async with site(echo, model) as s:
        assert [["echo", []], ["chat", ["lookup"]]] == (await s.get("agents")).json()


async def test_a_dialect_adds_its_headers():
    """To a stream's own, and where the run is."""
    async with site(echo) as s:
        answer = await s.http.post("/probe/start", json={"run_id": "r1", "thread_id": "t"})
        assert ("yes", "/probe/t/r1", "no") == (
            answer.headers["x-probe"],
            answer.headers["content-location"],
            answer.headers["x-accel-buffering"],
        )


async def test_a_conversation_may_be_larger_than_other_requests():
    """Each path has its own limit; over it the answer is 413, however the body comes."""
    async with site(echo, max_body=10_000) as s:
        large = "x" * 2_000_000
        assert "run_finished" == (await s.start(input=large, thread_id="t"))[-1]
        body = json.dumps({"input": large}).encode()

        async def in_pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 50_000):
                yield body[start : start + 50_000]

        for content in (body, in_pieces()):
            refused = await s.http.post("/agents/echo/runs", content=content)
            assert 413 == refused.status_code
            assert "at most 10000 bytes" in refused.json()["detail"]
        dialects = s.server.app.dialects
        assert (10_000, MAX_HISTORY, 10_000) == (
            s.server.app.max_body("POST", dialects["native"]),
            s.server.app.max_body("POST", dialects["probe"]),
            s.server.app.max_body("GET", dialects["probe"]),
        )
