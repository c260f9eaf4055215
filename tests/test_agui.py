"""AG-UI: what a request asks for, what events become, and both over real sockets.

Decoder, encoder and answers are pure: they are fed requests and events. The clients that people
have are in test_agui_clients.py.
"""

import json
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import pytest
import trio
from msgspec import Raw
from msgspec.structs import replace
from raw import connect, request, wait_until

from agentsse import Agent, AgentError, tool
from agentsse.dialects import MAX_HISTORY, MAX_MESSAGES, Cancel, Request, Start, Watch
from agentsse.dialects.agui import (
    AGUI,
    NO_PARAMETERS,
    REFUSAL,
    View,
    decode_cancel,
    decode_run,
    decode_watch,
    refuse,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import BadRequest
from agentsse.events import (
    NULL,
    UNSET,
    AgentFinished,
    AgentStarted,
    Custom,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    Liveness,
    MessageReceived,
    Moderation,
    Option,
    PartDelta,
    PartFinished,
    PartStarted,
    Problem,
    ProviderEvent,
    Question,
    Receipt,
    Retry,
    RunFinished,
    RunSnapshot,
    RunStarted,
    StepFinished,
    StepStarted,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    Usage,
    ValuesChanged,
)
from agentsse.messages import (
    AssistantMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.testing import ScriptedProvider, ask_for, open_server, say

PATIENCE = 20  # seconds; nothing here takes one
NOON = "2026-11-20T12:00:00.000Z"
USAGE = Usage(input_tokens=120, output_tokens=40, reasoning_tokens=9, cache_read_tokens=100)
WIRE_USAGE = {
    "inputTokens": 120,
    "outputTokens": 40,
    "totalTokens": 160,
    "reasoningTokens": 9,
    "cachedInputTokens": 100,
}
EARLY = View(is_early=True)
OOPS = Problem(code="oops", message="no luck", status=502)


# Events, and what becomes of them


def started(**more):
    known = {"agent": "main", "input": NULL, "on_disconnect": "grace:30", "thread_id": "t1"}
    return RunStarted(**(known | more))


def finished(result=None, *, outcome="success", error=None, cause=None, usage=None, pending=()):
    return RunFinished(
        outcome=outcome,
        usage=usage or Usage(),
        receipt=Receipt(cause=cause),
        result=UNSET if result is None else Raw(result),
        error=error,
        pending=pending,
    )


def part(part_id, kind, *deltas, name=None, call_id=None):
    """All events of a part."""
    known = {"part_id": part_id, "kind": kind}
    named = {"name": name, "call_id": call_id}
    return [
        PartStarted(**known, **named),
        *(PartDelta(**known, delta=delta) for delta in deltas),
        PartFinished(**known, **named, text="".join(deltas)),
    ]


def call(call_id, name="look", arguments='{"a":1}'):
    """All events of a call that a model writes."""
    return part(f"p-{call_id}", "tool_call", arguments, name=name, call_id=call_id)


def tool_started(call_id, name="look", arguments=b'{"a":1}'):
    return ToolStarted(call_id=call_id, name=name, arguments=Raw(arguments))


def tool_finished(call_id, result=b'"ok"', *, name="look", is_error=False, source="local"):
    return ToolFinished(
        call_id=call_id, name=name, result=Raw(result), is_error=is_error, source=source
    )


def model_step(step_id, *events, name="openai:gpt", **more):
    """A model call, with what comes of it."""
    known = {"step_id": step_id, "kind": "model", "name": name}
    return [StepStarted(**known), *events, StepFinished(**known, **more)]


def node_step(step_id, name):
    """The two events of a step of a function agent's."""
    known = {"step_id": step_id, "kind": "node", "name": name}
    return StepStarted(**known), StepFinished(**known)


def asked(request_id="q1", *questions):
    question = Question(id="answer", kind="text", prompt="Which one?")
    return InputRequested(request_id=request_id, questions=questions or (question,))


def received(request_id="q1"):
    return InputReceived(request_id=request_id, answers=Raw(b"{}"))


def numbered(*events):
    """Events of one run, as a log has them."""
    return [
        replace(event, run_id="r1", seq=seq, ts=NOON)
        for seq, event in enumerate((started(), *events), 1)
    ]


def encoded(*events, view=None):
    """The bytes of a run's stream; `events` may begin with another `RunStarted`."""
    if events and isinstance(events[0], RunStarted):
        begin, *events = events
    else:
        begin = started()
    encoder = AGUI.encoder(view)
    told = [replace(begin, run_id="r1", seq=1, ts=NOON), *numbered(*events)[1:]]
    return b"".join(frame for event in told for frame in encoder.feed(event))


def framed(*events, view=None):
    """The same, frame by frame: the id, and the event."""
    frames = encoded(*events, view=view).decode().split("\n\n")
    assert "" == frames.pop()
    found = []
    for frame in frames:
        place, *data = frame.split("\n")
        assert place.startswith("id: ")
        assert all(line.startswith("data: ") for line in data)
        joined = "\n".join(line.removeprefix("data: ") for line in data)
        found.append((place.removeprefix("id: "), json.loads(joined)))
    return found


def read(*events, view=None):
    """The events alone, behind the one that begins the run."""
    return [event for _, event in framed(*events, view=view)][1:]


def kinds(events):
    return [event["type"] for event in events]


def happenings():
    """Everything that can happen in a run, in an order in which it may."""
    outer, outer_end = node_step("s1", "outer")
    again, again_end = node_step("s2", "outer")
    more = {"step_id": "s9", "kind": "model", "name": "openai:gpt"}
    child = {"agent": "worker", "child_run_id": "r2"}
    failed = {"step_id": "s3", "kind": "flow", "name": "flow"}
    return [
        outer,
        again,
        ValuesChanged(values=Raw(b'{"a":{"b":[1,null]},"c/d~":"x"}')),
        ValuesChanged(values=Raw(b'{"a":2,"c/d~":null,"e":null}')),
        Custom(name="tick", value=Raw(b'{"n":1}')),
        ProviderEvent(provider="openai", raw=Raw(b'{"x":null}')),
        Liveness(elapsed_s=10, events=3, since_last_output_s=2),
        Retry(attempt=1, max=6, delay_s=2, error=OOPS),
        MessageReceived(message_id="m1", text="and Köln?", mode="steer"),
        *model_step(
            "s4",
            *part("p1", "reasoning", "Let me ", "see."),
            *part("p2", "text", "It is ", "sunny 😀"),
            *call("c1"),
            *call("c2", "shout", ""),
            tool_started("w1", "web_search"),
            tool_finished("w1", name="web_search", source="provider"),
            usage=USAGE,
            finish_reason="tool_calls",
        ),
        StepStarted(step_id="s5", kind="tool_round", name="tools"),
        tool_started("c1"),
        tool_started("c2", "shout", b"{}"),
        ToolOutputDelta(call_id="c2", delta="half"),
        tool_finished("c2", b'{"error":"no"}', name="shout", is_error=True),
        tool_finished("c1"),
        StepFinished(step_id="s5", kind="tool_round", name="tools"),
        AgentStarted(**child),
        AgentStarted(agent="inner"),
        PartStarted(part_id="p3", kind="text"),
        PartDelta(part_id="p3", kind="text", delta="So "),
        asked("q1", Question(id="go", kind="confirm", prompt="Sure?")),
        received(),
        PartDelta(part_id="p3", kind="text", delta="be it"),
        PartFinished(part_id="p3", kind="text", text="So be it"),
        AgentFinished(agent="inner", report=Raw(b'{"done":true}')),
        AgentFinished(**child, error=OOPS),
        again_end,
        StepStarted(**failed),
        StepFinished(**failed, error=OOPS),
        Moderation(violation=True, message="not that"),
        *part("p4", "refusal", "No."),
        tool_started("t1"),
        tool_finished("t1", b"[1]"),
        outer_end,
        StepStarted(**more),
        *part("p5", "tool_call", name="pick", call_id="c3"),
        StepFinished(**more, usage=USAGE),
        finished(b'{"n":3}', usage=USAGE + USAGE + Usage(input_tokens=1), pending=("c3",)),
    ]


def test_a_stream_is_these_bytes():
    """Each event with its place, nothing between them but a blank line."""
    expected = (
        'id: 1\ndata: {"type":"RUN_STARTED","threadId":"t1","runId":"r1","protocolVersion":"1.0"}'
        '\n\nid: 2\ndata: {"type":"TEXT_MESSAGE_START","messageId":"r1-2","role":"assistant"}'
        '\n\nid: 3\ndata: {"type":"TEXT_MESSAGE_CONTENT","messageId":"r1-2","delta":"Köln\\n"}'
        '\n\nid: 4\ndata: {"type":"TEXT_MESSAGE_END","messageId":"r1-2"}'
        '\n\nid: 5\ndata: {"type":"RUN_FINISHED","threadId":"t1","runId":"r1",'
        '"result":"Köln\\n","outcome":{"type":"success"}}\n\n'
    )
    assert expected.encode() == encoded(
        *part("p1", "text", "Köln\n"), finished('"Köln\\n"'.encode())
    )


def test_a_client_from_before_1_0_is_told_of_no_version_no_outcome_and_no_usage():
    """Its schema for an outcome allows nothing that it does not know."""
    events = framed(*model_step("s1", usage=USAGE), finished(pending=("c1",)), view=EARLY)
    assert {"type": "RUN_STARTED", "threadId": "t1", "runId": "r1"} == events[0][1]
    assert {"type": "RUN_FINISHED", "threadId": "t1", "runId": "r1"} == events[-1][1]


def test_frames_of_one_event_have_places_of_their_own():
    """Whoever has the last of them has the event."""
    places = [place for place, _ in framed(tool_started("t1"), finished())]
    assert ["1", "2.1", "2.2", "2", "3"] == places


def test_json_that_somebody_has_formatted_stands_in_several_lines():
    """They are one line of data each, which the clients join."""
    (custom,) = [
        event for event in read(Custom(name="x", value=Raw(b'{\r\n "a": 1}'))) if event["name"]
    ]
    assert {"a": 1} == custom["value"]
    assert b"\r" not in encoded(Custom(name="x", value=Raw(b'{\r"a":1}')))


def test_a_run_that_belongs_to_no_thread_is_its_own():
    """A client of this protocol may look at any run; a run below another names it."""
    begin = started(thread_id=None, parent_run_id="r0")
    expected = {"threadId": "r1", "runId": "r1", "protocolVersion": "1.0", "parentRunId": "r0"}
    assert {"type": "RUN_STARTED", **expected} == framed(begin)[0][1]


def test_a_response_may_have_a_run_id_of_the_clients_own():
    """Then it says which run it is."""
    events = framed(finished(), view=View(run_id="B"))
    begin, end = (event for _, event in events)
    assert ("B", {"agentsse": {"runId": "r1"}}) == (begin["runId"], begin["metadata"])
    assert "B" == end["runId"]


def test_reasoning_is_a_span_with_a_message_in_it():
    """Both of one id."""
    expected = [
        ("REASONING_START", {}),
        ("REASONING_MESSAGE_START", {"role": "reasoning"}),
        ("REASONING_MESSAGE_CONTENT", {"delta": "Hm."}),
        ("REASONING_MESSAGE_END", {}),
        ("REASONING_END", {}),
    ]
    events = read(*part("p1", "reasoning", "Hm."))
    assert [{"type": kind, "messageId": "r1-2", **more} for kind, more in expected] == events


def test_calls_belong_to_the_message_that_they_were_asked_for_in():
    """Whether its text came before them or behind; the next model call has another message."""
    events = read(
        *model_step("s1", *call("c1"), *part("p1", "text", "a"), *part("p2", "text", "b")),
        *model_step("s2", *part("p3", "text", "c"), *call("c2")),
    )
    ids = [event.get("parentMessageId", event.get("messageId")) for event in events]
    starts = ("TEXT_MESSAGE_START", "TOOL_CALL_START")
    found = [each for each, kind in zip(ids, kinds(events), strict=True) if kind in starts]
    assert ["r1-3", "r1-3", "r1-9", "r1-14", "r1-14"] == found


def test_a_models_call_is_told_as_it_is_written():
    """That it is carried out is told by its answer alone."""
    events = read(*call("c1"), tool_started("c1"), tool_finished("c1"))
    name = {"toolCallName": "look", "parentMessageId": "r1-2"}
    answer = {"messageId": "r1-6", "content": "ok", "role": "tool"}
    expected = [
        ("TOOL_CALL_START", name),
        ("TOOL_CALL_ARGS", {"delta": '{"a":1}'}),
        ("TOOL_CALL_END", {}),
        ("TOOL_CALL_RESULT", answer),
    ]
    assert [(kind, {"toolCallId": "c1"} | more) for kind, more in expected] == [
        (event.pop("type"), event) for event in events
    ]


def test_another_call_is_told_when_it_is_carried_out():
    """Its id here is one that no other run has, for others count anew."""
    events = read(tool_started("t1"), tool_finished("t1"), tool_started("t2", arguments=b'"x"'))
    assert ["r1-2"] * 4 + ["r1-4"] * 3 == [event["toolCallId"] for event in events]
    assert ['{"a":1}', '"x"'] == [event["delta"] for event in events if "delta" in event]
    parents = [event["parentMessageId"] for event in events if "parentMessageId" in event]
    assert ["r1-2", "r1-4"] == parents


def test_what_is_said_behind_an_answer_is_another_message():
    """Or it would stand before the answer, in the message with the call."""
    events = read(tool_started("t1"), tool_finished("t1"), *part("p1", "text", "a"))
    ids = [event["messageId"] for event in events if event["type"].startswith("TEXT_MESSAGE")]
    assert {"r1-4"} == set(ids)


@pytest.mark.parametrize(
    ("result", "content"),
    [(b'"K\\u00f6ln"', "Köln"), (b'{"a": 1}', '{"a": 1}'), (b"null", "null"), (b"2", "2")],
)
def test_an_answer_is_text(result, content):
    """A string's own, of anything else its JSON."""
    (event,) = read(tool_finished("c1", result))
    assert (content, False) == (event["content"], "metadata" in event)


def test_an_answer_says_whose_it_is_and_whether_it_is_an_error():
    """In the metadata, which the client keeps and posts back."""
    (event,) = read(tool_finished("c1", is_error=True, source="mcp"))
    assert {"agentsse": {"isError": True, "source": "mcp"}} == event["metadata"]


def test_what_a_tool_prints_names_the_call_as_the_client_knows_it():
    """There is no word for it but a custom one."""
    printed = ToolOutputDelta(call_id="t1", delta="half")
    expected = {"toolCallId": "r1-2", "delta": "half"}
    *_, event = read(tool_started("t1"), printed)
    assert ("agentsse.tool_output", expected) == (event["name"], event["value"])
    assert "t1" == read(printed)[0]["value"]["toolCallId"]


def test_a_part_that_came_in_no_pieces_is_told_at_its_end():
    """A call without arguments has an empty object of them; a delta of nothing is not told."""
    whole = [
        PartStarted(part_id="p1", kind="text"),
        PartDelta(part_id="p1", kind="text", delta=""),
        PartFinished(part_id="p1", kind="text", text="all"),
    ]
    assert ["all"] == [event["delta"] for event in read(*whole) if "delta" in event]
    assert ["{}"] == [event["delta"] for event in read(*call("c1", "look", "")) if "delta" in event]
    assert ["TEXT_MESSAGE_START", "TEXT_MESSAGE_END"] == kinds(read(*part("p1", "text")))


def test_parts_and_steps_that_have_not_begun_are_overlooked():
    """They would be fatal."""
    delta, end = part("p1", "text", "a")[1:]
    assert [] == read(delta, end, node_step("s1", "x")[1], AgentFinished(agent="x"))


def test_steps_of_one_name_are_told_apart():
    """Two that are open under one name are fatal."""
    (one, one_end), (two, two_end) = node_step("s1", "draw"), node_step("s2", "draw")
    names = [event["stepName"] for event in read(one, two, one_end, two_end, one)]
    assert ["draw", "draw (s2)", "draw", "draw (s2)", "draw"] == names


def test_a_step_that_has_failed_says_so():
    """In its metadata; it does not end the run."""
    *_, end = read(*model_step("s1", error=OOPS))
    expected = {"agentsse": {"error": {"code": "oops", "message": "no luck", "status": 502}}}
    assert ("STEP_FINISHED", expected) == (end["type"], end["metadata"])


def test_agents_below_are_subagents():
    """One that has a run of its own by that run's id, another by its place."""
    child = {"agent": "worker", "child_run_id": "r2"}
    events = read(
        AgentStarted(**child),
        AgentStarted(agent="inner"),
        AgentFinished(agent="inner", report=Raw(b'"done"')),
        AgentFinished(**child, report=NULL),
        AgentStarted(agent="inner"),
        AgentFinished(agent="inner", error=OOPS),
    )
    assert [
        ("SUBAGENT_STARTED", "r2", {"name": "worker"}),
        ("SUBAGENT_STARTED", "r1-3", {"name": "inner"}),
        ("SUBAGENT_FINISHED", "r1-3", {"result": "done"}),
        ("SUBAGENT_FINISHED", "r2", {}),
        ("SUBAGENT_STARTED", "r1-6", {"name": "inner"}),
        ("SUBAGENT_ERROR", "r1-6", {"message": "no luck", "code": "oops"}),
    ] == [(event.pop("type"), event.pop("subagentRunId"), event) for event in events]


def test_a_client_from_before_1_0_hears_of_agents_below_as_of_anything_else():
    """Most of them know no subagents."""
    events = read(AgentStarted(agent="inner"), AgentFinished(agent="inner"), view=EARLY)
    names = [event["name"] for event in events]
    assert ["agentsse.agent_started", "agentsse.agent_finished"] == names


def test_what_has_no_word_here_is_told_as_it_is():
    """What an agent emits has its own name, what a provider says is raw."""
    custom, raw, told = read(
        Custom(name="tick", value=NULL),
        ProviderEvent(provider="openai", raw=Raw(b"[1]")),
        Liveness(elapsed_s=10, events=3, since_last_output_s=2),
    )
    assert {"type": "CUSTOM", "name": "tick", "value": None} == custom
    assert {"type": "RAW", "event": [1], "source": "openai"} == raw
    assert ("agentsse.liveness", 3) == (told["name"], told["value"]["events"])


def test_what_somebody_says_to_the_run_is_a_message_of_the_user():
    """What is said behind it is another message of the assistant."""
    events = read(
        tool_started("t1"),
        MessageReceived(message_id="m1", text="and Köln?", mode="steer"),
        *part("p1", "text", "a"),
    )
    said = [(event["messageId"], event["role"]) for event in events if "role" in event]
    assert [("r1-3", "user"), ("r1-4", "assistant")] == said
    assert "and Köln?" == events[4]["delta"]


# State


def states(*events, view=None):
    return [event.get("snapshot", event.get("delta")) for event in read(*events, view=view)]


def values(text):
    return ValuesChanged(values=Raw(text.encode()))


def test_values_are_a_snapshot_and_then_patches():
    """Names are escaped as JSON pointers are; null takes a value out."""
    expected = [
        {"a": 1, "b/c~d": [2]},
        [
            {"op": "remove", "path": "/b~1c~0d"},
            {"op": "add", "path": "/a", "value": {"x": None}},
        ],
    ]
    assert expected == states(
        values('{"a":1,"b/c~d":[2]}'), values('{"b/c~d":null,"a":{"x":null}}')
    )


def test_a_value_that_was_never_there_is_not_taken_out():
    """The client would refuse the whole patch."""
    assert [{}] == states(values('{"a":null}'), values('{"a":null}'))


def test_values_lie_over_the_state_that_the_client_has_sent():
    """What the run says nothing of stays as it is."""
    view = View(state=b'{"mine":1,"ours":2}')
    expected = [{"mine": 1, "ours": 3}, [{"op": "remove", "path": "/mine"}]]
    assert expected == states(values('{"ours":3}'), values('{"mine":null}'), view=view)


def test_a_response_behind_a_question_shows_the_state_anew():
    """Its client may have another one by now."""
    events = read(values('{"a":1}'), asked(), received(), values('{"b":2}'))
    assert {"a": 1, "b": 2} == events[-1]["snapshot"]


# Questions


def test_a_question_ends_the_response_with_an_interrupt():
    """Its id leads back to the run."""
    (end,) = read(asked("q1"))
    interrupt = {
        "id": "r1:q1",
        "reason": "input_required",
        "message": "Which one?",
        "responseSchema": {
            "type": "object",
            "properties": {"answer": {"type": "string", "title": "Which one?"}},
            "required": ["answer"],
        },
    }
    outcome = {"type": "interrupt", "interrupts": [interrupt]}
    assert {"type": "RUN_FINISHED", "threadId": "t1", "runId": "r1", "outcome": outcome} == end


def test_an_interrupt_says_what_its_answers_look_like():
    """Options by their ids, with their labels as titles."""
    options = (Option(id="a", label="The first"), Option(id="b"))
    questions = (
        Question(id="one", kind="choice", prompt="One?", options=options),
        Question(id="some", kind="choices", prompt="Some?", options=options),
        Question(id="sure", kind="confirm", prompt="Sure?"),
    )
    (end,) = read(asked("q1", *questions))
    (interrupt,) = end["outcome"]["interrupts"]
    one = {
        "type": "string",
        "oneOf": [{"const": "a", "title": "The first"}, {"const": "b", "title": "b"}],
    }
    some = {"type": "array", "items": one, "uniqueItems": True}
    assert {
        "one": one | {"title": "One?"},
        "some": some | {"title": "Some?"},
        "sure": {"type": "boolean", "title": "Sure?"},
    } == interrupt["responseSchema"]["properties"]
    assert ("input_required", "One?\nSome?\nSure?") == (interrupt["reason"], interrupt["message"])
    (end,) = read(asked("q1", questions[2]))
    assert "confirmation" == end["outcome"]["interrupts"][0]["reason"]


def test_what_is_open_at_a_question_is_closed_and_opened_again():
    """In the next response, which begins with whatever comes next, and is whole by itself."""
    step, step_end = node_step("s1", "draw")
    begin, delta, end = part("p1", "text", "more")
    child = {"agent": "worker", "child_run_id": "r2"}
    events = read(
        step, AgentStarted(**child), begin, asked(), received(), delta, end,
        AgentFinished(**child), step_end, finished(),
    )  # fmt: skip
    assert [
        "STEP_STARTED", "SUBAGENT_STARTED", "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_END", "SUBAGENT_FINISHED", "STEP_FINISHED", "RUN_FINISHED",
        "RUN_STARTED", "STEP_STARTED", "SUBAGENT_STARTED", "TEXT_MESSAGE_START", "CUSTOM",
        "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END", "SUBAGENT_FINISHED", "STEP_FINISHED",
        "RUN_FINISHED",
    ] == kinds(events)  # fmt: skip
    suspended, over = (event for event in events if event["type"] == "SUBAGENT_FINISHED")
    assert ({"type": "suspended"}, None) == (suspended["outcome"], over.get("outcome"))


def test_questions_side_by_side_are_asked_one_after_the_other():
    """Each response ends at one."""
    events = read(asked("q1"), asked("q2"), InputWithdrawn(request_id="q1"), finished())
    ends = [event["outcome"] for event in events if event["type"] == "RUN_FINISHED"]
    assert ["r1:q1", "r1:q2"] == [each["interrupts"][0]["id"] for each in ends[:2]]
    assert {"type": "success"} == ends[2]


def test_each_response_tells_its_own_usage():
    """What the models' counts leave of the run's total has no name."""
    total = USAGE + USAGE + Usage(input_tokens=5, cache_write_tokens=2)
    events = read(
        *model_step("s1", usage=USAGE),
        asked(),
        received(),
        *model_step("s2", usage=USAGE, name="anthropic:opus"),
        *model_step("s3", usage=Usage()),
        finished(usage=total),
    )
    first, second = (event["usage"] for event in events if event["type"] == "RUN_FINISHED")
    assert [{"provider": "openai", "model": "gpt", **WIRE_USAGE}] == first
    rest = {"inputTokens": 5, "outputTokens": 0, "totalTokens": 5, "cacheWriteInputTokens": 2}
    assert [{"provider": "anthropic", "model": "opus", **WIRE_USAGE}, rest] == second


# Ends


def test_what_is_open_at_the_end_is_closed():
    """Whatever the end is."""
    step, _ = node_step("s1", "draw")
    open_ones = [
        step,
        AgentStarted(agent="worker"),
        PartStarted(part_id="p1", kind="reasoning"),
        PartStarted(part_id="p2", kind="tool_call", name="look", call_id="c1"),
    ]
    expected = [
        "TOOL_CALL_END", "REASONING_MESSAGE_END", "REASONING_END", "SUBAGENT_ERROR",
        "STEP_FINISHED",
    ]  # fmt: skip
    for outcome, end in (("cancelled", "RUN_FINISHED"), ("error", "RUN_ERROR")):
        events = read(*open_ones, finished(outcome=outcome))
        assert [*expected, end] == kinds(events)[-6:]


def test_success_names_the_calls_that_the_client_is_to_make():
    """They are those of its tools."""
    *_, end = read(*call("c1"), finished(pending=("c1",)))
    assert {"type": "success", "pendingToolCallIds": ["c1"]} == end["outcome"]


def test_a_cancelled_run_has_an_outcome_and_a_receipt():
    """So has one that ended because nobody answered."""
    for outcome, cause in (("cancelled", "disconnect"), ("interrupted", "input_timeout")):
        (end,) = read(finished(outcome=outcome, cause=cause))
        assert ("RUN_FINISHED", {"type": "cancelled"}) == (end["type"], end["outcome"])
        assert cause == end["metadata"]["agentsse"]["receipt"]["cause"]


@pytest.mark.parametrize(
    ("cause", "message"),
    [("disconnect", "the run was cancelled (disconnect)"), (None, "the run was cancelled")],
)
def test_a_client_from_before_1_0_hears_of_a_cancel_as_of_an_error(cause, message):
    """It would break on the outcome, and without one take it for success."""
    (end,) = read(finished(outcome="cancelled", cause=cause), view=EARLY)
    assert ("RUN_ERROR", "cancelled", message) == (end["type"], end["code"], end["message"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(OOPS, "oops", "no luck"), (None, "internal", "the run has failed")],
)
def test_an_error_ends_the_run_with_what_it_has_cost(error, code, message):
    """An event of its own."""
    *_, end = read(finished(outcome="error", error=error, usage=USAGE))
    expected = {"message": message, "code": code, "usage": [WIRE_USAGE]}
    assert {"type": "RUN_ERROR", **expected} == end


@pytest.mark.parametrize("result", [b'{"n":3}', b"0", b"[]", b'""'])
def test_a_result_that_is_no_text_is_told_at_the_end_alone(result):
    """What a page shows of it is the page's own affair."""
    (end,) = read(finished(result))
    assert json.loads(result) == end["result"]


def test_who_says_nothing_has_a_text_that_it_returns_as_its_message():
    """Thoughts say nothing; what was said is not said again."""
    *_, start, content, stop, end = read(*part("p1", "reasoning", "Hm."), finished(b'"Hello"'))
    assert ("Hello", "Hello") == (content["delta"], end["result"])
    assert {"r1-5"} == {event["messageId"] for event in (start, content, stop)}
    events = read(*part("p1", "text", "Hello"), finished(b'"Hello"'))
    assert 1 == kinds(events).count("TEXT_MESSAGE_CONTENT")


@pytest.mark.parametrize("result", [None, b"null"])
def test_no_result_is_none(result):
    """Null is no result: a client may refuse it."""
    (end,) = read(finished(result))
    assert "result" not in end


@pytest.mark.parametrize(("message", "expected"), [("Not here.", "Not here."), (None, REFUSAL)])
def test_a_shield_refuses_in_its_own_words(message, expected):
    """Or in ours, where it has none; where its words were said it has nothing to add."""
    blocked = Moderation(violation=True, message=message)
    said = [event["delta"] for event in read(blocked, finished(b'"x"')) if "delta" in event]
    assert [expected] == said
    events = read(blocked, *part("p1", "refusal", "Sorry."), finished())
    assert ["Sorry."] == [event["delta"] for event in events if "delta" in event]
    assert ["CUSTOM", "RUN_FINISHED"] == kinds(read(Moderation(violation=False), finished()))


@pytest.mark.parametrize("view", [None, EARLY])
def test_whatever_happens_opens_and_closes_in_order(view):
    """What a client's verifier would throw at, this one does."""
    verify(event for _, event in framed(*happenings(), view=view))


def verify(events):
    """See that what is open is closed, that nothing is opened twice, and where a run ends."""
    opens = {
        "TEXT_MESSAGE_START": ("text", "messageId"),
        "REASONING_START": ("span", "messageId"),
        "REASONING_MESSAGE_START": ("reasoning", "messageId"),
        "TOOL_CALL_START": ("call", "toolCallId"),
        "STEP_STARTED": ("step", "stepName"),
        "SUBAGENT_STARTED": ("agent", "subagentRunId"),
    }
    closes = {
        "TEXT_MESSAGE_END": opens["TEXT_MESSAGE_START"],
        "REASONING_END": opens["REASONING_START"],
        "REASONING_MESSAGE_END": opens["REASONING_MESSAGE_START"],
        "TOOL_CALL_END": opens["TOOL_CALL_START"],
        "STEP_FINISHED": opens["STEP_STARTED"],
        "SUBAGENT_FINISHED": opens["SUBAGENT_STARTED"],
        "SUBAGENT_ERROR": opens["SUBAGENT_STARTED"],
    }
    continues = {
        "TEXT_MESSAGE_CONTENT": opens["TEXT_MESSAGE_START"],
        "REASONING_MESSAGE_CONTENT": opens["REASONING_MESSAGE_START"],
        "TOOL_CALL_ARGS": opens["TOOL_CALL_START"],
    }
    goes_on, is_open = False, set()
    for event in events:
        kind = event["type"]
        assert goes_on != (kind == "RUN_STARTED"), kind
        goes_on = True
        if kind in opens:
            what, name = opens[kind]
            assert (what, event[name]) not in is_open, event
            is_open.add((what, event[name]))
        elif kind in continues or kind in closes:
            what, name = continues.get(kind) or closes[kind]
            assert (what, event[name]) in is_open, event
            if kind in closes:
                is_open.remove((what, event[name]))
        elif kind in ("RUN_FINISHED", "RUN_ERROR"):
            assert not is_open
            goes_on = False
    assert not goes_on


# Requests


HELLO = {"id": "u1", "role": "user", "content": "Hello"}
ROBOT = {"id": "a1", "role": "assistant", "content": "Hi"}


def asked_for(body, *, decode=decode_run, query=None, headers=None, **parameters):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode(
        Request(
            method="POST",
            parameters={"agent": "main"} | parameters,
            query=query or {},
            headers=headers or {},
            body=data,
        )
    )


def decoded(*messages, **body):
    """What a request asks for."""
    known = {"threadId": "t1", "runId": "r1", "protocolVersion": "1.0"}
    return asked_for(known | {"messages": list(messages or (HELLO,))} | body)


def calling(message_id, *calls, content=None):
    """An assistant's message with calls: pairs of an id and a name."""
    wanted = [
        {"id": each, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for each, name in calls
    ]
    return {"id": message_id, "role": "assistant", "content": content, "toolCalls": wanted}


def answering(call_id, content, **more):
    return {"id": f"m-{call_id}", "role": "tool", "toolCallId": call_id, "content": content, **more}


def test_a_request_asks_for_a_run():
    """The last message is its input; who posts it again comes back to it."""
    expected = Start(
        agent="main",
        input="Hello",
        delivery="stream",
        run_id="r1",
        rejoins=True,
        thread_id="t1",
        history=(),
        if_busy="supersede",
    )
    assert expected == decoded()
    neutral = {"tools": [], "context": [], "forwardedProps": {}, "state": {}, "resume": []}
    assert expected == decoded(**neutral, parentRunId="r0", extensions=[1])
    assert expected == decoded(tools=None, context=None, state=None, resume=None)


@pytest.mark.parametrize(
    ("version", "view"),
    [(None, EARLY), ("", EARLY), ("0.9", EARLY), ("1", None), ("1.0", None), ("2.7", None),
     ("soon", None)],
)  # fmt: skip
def test_a_client_that_declares_no_version_is_an_early_one(version, view):
    """What is no version at all is newer than we know."""
    assert view == decoded(protocolVersion=version).options


def test_the_conversation_is_the_clients_to_tell():
    """All that came before the last message of the user; a page's own messages are not told."""
    messages = [
        {"id": "s1", "role": "system", "content": "Be brief."},
        {"id": "d1", "role": "developer", "content": "Be kind."},
        HELLO,
        {"id": "n1", "role": "reasoning", "content": "Hm."},
        calling("a1", ("c1", "look"), content="Hi"),
        answering("c1", "Köln"),
        {"id": "n2", "role": "activity", "activityType": "x", "content": {"a": 1}},
        {"id": "n3", "role": "hologram", "shape": [1]},
        {"id": "a2", "role": "assistant", "content": ""},
        {"id": "u2", "role": "user", "content": [{"type": "text", "text": "And"}]},
    ]
    start = decoded(*messages)
    assert (
        SystemMessage("Be brief."),
        SystemMessage("Be kind."),
        UserMessage("Hello"),
        AssistantMessage("Hi", (ToolCall("c1", "look", "{}"),)),
        ToolMessage("c1", "look", '"Köln"'),
    ) == start.history
    assert ("And", None) == (start.input, start.said)


def test_of_a_message_in_parts_the_text_is_taken():
    """What cannot be used is dropped, known or not."""
    image = {"type": "image", "source": {"type": "url", "value": "x"}}
    parts = [
        {"type": "text", "text": "See"},
        image,
        {"type": "new"},
        {"type": "text", "text": "it"},
    ]
    message = HELLO | {"content": parts}
    assert "See\nit" == decoded(message).input
    only = decoded(HELLO | {"content": [image]}, HELLO, {**HELLO, "role": "system", "content": ""})
    assert ("Hello", ()) == (only.input, only.history)


def test_answers_of_the_clients_tools_go_on_with_the_conversation():
    """They are what the model is told now; the input shows them."""
    messages = [HELLO, calling("a1", ("c1", "pick"), ("c2", "draw"), ("c3", "draw"))]
    answers = [
        answering("c1", '{"a": 1}'),
        answering("c2", "[not JSON"),
        answering("c3", "", error="no pen"),
    ]
    start = decoded(*messages, *answers)
    assert (
        ToolMessage("c1", "pick", '{"a": 1}'),
        ToolMessage("c2", "draw", '"[not JSON"'),
        ToolMessage("c3", "draw", '"no pen"', is_error=True),
    ) == start.said
    assert 2 == len(start.history)
    assert [
        {"toolCallId": "c1", "name": "pick", "content": {"a": 1}},
        {"toolCallId": "c2", "name": "draw", "content": "[not JSON"},
        {"toolCallId": "c3", "name": "draw", "content": "no pen"},
    ] == start.input


def test_what_was_said_behind_the_users_last_message_is_gone_on_with():
    """As after a stop; without any message of the user as well."""
    start = decoded(ROBOT, HELLO, ROBOT | {"id": "a2"})
    assert "Hello" == start.input
    assert (UserMessage("Hello"), AssistantMessage("Hi")) == start.said
    assert (AssistantMessage("Hi"),) == start.history
    start = decoded(ROBOT)
    assert ("", (), (AssistantMessage("Hi"),)) == (start.input, start.history, start.said)
    start = asked_for({"threadId": "t1", "runId": "r1", "messages": []})
    assert ("", (), None) == (start.input, start.history, start.said)


def test_calls_that_a_provider_has_carried_out_are_not_told():
    """They are none that a model can be reminded of; our own note says so, others do not."""
    ours = {"metadata": {"agentsse": {"source": "provider"}}}
    foreign = {"metadata": {"agentsse": "x", "other": 1}}
    start = decoded(
        calling("a1", ("w1", "web_search")),
        answering("w1", "found", **ours),
        calling("a2", ("w2", "web_search"), ("c1", "look"), content="So"),
        answering("w2", "found", **ours),
        answering("c1", "ok", **foreign),
        HELLO,
    )
    assert (
        AssistantMessage("So", (ToolCall("c1", "look", "{}"),)),
        ToolMessage("c1", "look", '"ok"'),
    ) == start.history
    noted = answering("c1", "no", metadata={"agentsse": {"isError": True}})
    assert decoded(calling("a1", ("c1", "look")), noted).said[0].is_error


def test_what_stands_beside_the_conversation_is_metadata():
    """A model is told the context first of all."""
    context = [{"description": "The page", "value": "Settings"}]
    known = {"state": {"a": [1]}, "context": context, "forwardedProps": {"x": 1}}
    start = decoded(ROBOT, HELLO, **known)
    assert known == start.metadata
    assert (SystemMessage("The page:\nSettings"), AssistantMessage("Hi")) == start.history
    assert View(state=b'{"a":[1]}') == start.options
    assert None is decoded(state=[1]).options


def test_the_clients_tools_are_for_a_model():
    """One without a schema has no arguments."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [
        {"name": "pick", "description": "Pick", "parameters": schema, "metadata": {}},
        {"name": "draw", "description": "Draw"},
        {"name": "sing", "parameters": True},
    ]
    assert (
        ToolSpec("pick", "Pick", schema),
        ToolSpec("draw", "Draw", NO_PARAMETERS),
        ToolSpec("sing", "", NO_PARAMETERS),
    ) == decoded(tools=tools).tools


def test_answers_to_interrupts_go_to_the_run_that_has_asked():
    """The response goes on with it, under the client's new run id; who declines says nothing."""
    resume = [
        {"interruptId": "r0:q1", "status": "resolved", "payload": {"go": True}},
        {"interruptId": "r0:q2", "status": "cancelled", "payload": 1},
        {"interruptId": "r0:q3", "status": "resolved"},
    ]
    start = decoded(resume=resume, state={"a": 1})
    assert {"q1": {"go": True}, "q2": None, "q3": None} == start.answers
    assert ("r0", "r0", True) == (start.continues, start.run_id, start.rejoins)
    assert View(run_id="r1", state=b'{"a":1}') == start.options


def test_who_answers_and_comes_back_has_the_run_that_has_asked_emptied():
    """It is seen only where the stream begins with the run: behind a question nothing is undone."""
    half = {"id": "r0-3", "role": "assistant", "content": "Well."}
    start = decoded(HELLO, half, resume=[{"interruptId": "r0:q1", "status": "cancelled"}])
    events = framed(asked(), received(), finished(), view=start.options)
    assert [HELLO, half | {"content": ""}] == events[1][1]["messages"]
    assert 1 == kinds([event for _, event in events]).count("MESSAGES_SNAPSHOT")


@pytest.mark.parametrize("ids", [["q1"], [":q1"], ["r0:q1", "r2:q1"]])
def test_answers_to_what_nobody_has_asked_are_refused(ids):
    """They name their run, and all of them the same."""
    resume = [{"interruptId": each, "status": "resolved"} for each in ids]
    with pytest.raises(BadRequest, match="resume: expected answers to the interrupts of one run"):
        decoded(resume=resume)


@pytest.mark.parametrize("run_id", ["", "a/b", "a\n"])
def test_a_run_id_that_fits_into_no_path_is_only_echoed(run_id):
    """The run has one of its own, and nobody can come back to it by this one."""
    start = decoded(runId=run_id)
    assert (None, False, View(run_id=run_id)) == (start.run_id, start.rejoins, start.options)


def test_who_comes_back_gets_what_it_has_of_the_run_emptied():
    """In its place; answers of tools, which come anew, are left out, and the rest stays."""
    body = {
        "threadId": "t1",
        "runId": "r-1",
        "protocolVersion": "1.0",
        "messages": [
            {"id": "r-1", "role": "user", "content": "Köln", "mine": [1.0]},
            {"id": "r-2-7", "role": "assistant", "content": "of another run"},
            {"id": "r-1-3", "role": "reasoning", "content": "Hm"},
            calling("r-1-9", ("c1", "look"), content="So"),
            {"id": "r-1-12", "role": "tool", "toolCallId": "c1", "content": "ok"},
            {"id": "r-1-x", "role": "assistant", "content": "no place"},
        ],
    }
    start = asked_for(json.dumps(body, ensure_ascii=False).encode())
    snapshot = (
        '{"type":"MESSAGES_SNAPSHOT","messages":['
        '{"id": "r-1", "role": "user", "content": "Köln", "mine": [1.0]},'
        '{"id": "r-2-7", "role": "assistant", "content": "of another run"},'
        '{"id":"r-1-3","role":"reasoning","content":""},'
        '{"id":"r-1-9","role":"assistant","content":""},'
        '{"id": "r-1-x", "role": "assistant", "content": "no place"}]}'
    )
    assert View(snapshot=snapshot.encode()) == start.options
    told = (UserMessage("Köln"), AssistantMessage("of another run"), AssistantMessage("no place"))
    assert told == start.said
    frames = framed(finished(), view=start.options)
    expected = [("1.1", "RUN_STARTED"), ("1", "MESSAGES_SNAPSHOT"), ("2", "RUN_FINISHED")]
    assert expected == [(place, event["type"]) for place, event in frames]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "expected JSON to run an agent with"),
        ({"threadId": "t1", "runId": "r1"}, "missing required field `messages`"),
        ({"threadId": "a/b", "runId": "r1", "messages": []}, "threadId: expected 1 to 200"),
        ({"threadId": "t", "runId": 1, "messages": []}, "Expected `str`, got `int`"),
        ({"threadId": "t", "runId": "r", "messages": [1]}, r"messages\[0\]: expected a message"),
        ({"threadId": "t", "runId": "r", "messages": [HELLO, {"role": "user"}]},
         r"messages\[1\]: expected a message: .*`id`"),
        ({"threadId": "t", "runId": "r", "messages": [HELLO | {"content": 1}]},
         r"messages\[0\]: expected a message: .*content"),
        ({"threadId": "t", "runId": "r", "messages": [HELLO | {"content": [{"type": "text"}]}]},
         "expected a text in each part"),
        ({"threadId": "t", "runId": "r", "messages": [], "tools": [{}]}, r"`\$.tools\[0\]`"),
        ({"threadId": "t", "runId": "r", "messages": [], "resume": [
            {"interruptId": "r:q", "status": "maybe"}]}, "Invalid enum value 'maybe'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_there_is_a_stream(body, message):
    """What is known and malformed; what is unknown is overlooked."""
    with pytest.raises(BadRequest, match=message):
        asked_for(body)


def test_a_conversation_has_an_end():
    """Neither more messages nor more parts of one are read than do no harm to other requests."""
    said = MAX_MESSAGES * [HELLO]
    assert MAX_MESSAGES - 1 == len(decoded(*said).history)
    parts = [{"type": "text", "text": "a"}] * (MAX_MESSAGES + 1)
    for too_many in ([*said, HELLO], [HELLO | {"content": parts}]):
        with pytest.raises(BadRequest, match=f"expected a .* length <= {MAX_MESSAGES}"):
            decoded(*too_many)


def test_a_run_can_be_read_from_a_place_on():
    """Behind the id of a frame; past questions that have been answered."""
    watch = asked_for(b"", decode=decode_watch, run_id="r1")
    assert (Watch(run_id="r1").after, True, None) == (watch.after, watch.goes_on, watch.options)
    assert watch.framing.farewell(500) == b"retry: 500\n\n"
    watch = asked_for(b"", decode=decode_watch, run_id="r1", query={"after": "7.1"})
    assert (7, 1) == watch.after
    headers = {"last-event-id": "9"}
    early = {"after": "7", "protocolVersion": "0"}
    watch = asked_for(b"", decode=decode_watch, run_id="r1", query=early, headers=headers)
    assert ((9, 0), EARLY) == (watch.after, watch.options)
    for query in ({"after": "x"}, {"before": "7"}):
        with pytest.raises(BadRequest):
            asked_for(b"", decode=decode_watch, run_id="r1", query=query)


def test_a_run_can_be_cancelled():
    """With a reason, or none."""
    assert Cancel(run_id="r1") == asked_for(b"", decode=decode_cancel, run_id="r1")
    with_reason = asked_for({"reason": "enough"}, decode=decode_cancel, run_id="r1")
    assert Cancel(run_id="r1", reason="enough") == with_reason


def test_a_run_by_itself_is_plain():
    """In this protocol's spelling."""
    snapshot = RunSnapshot(
        id="r1", agent="main", state="finished", on_disconnect="cancel", created=NOON, started=NOON,
        finished=NOON, thread_id="t1", parent_run_id=None, outcome="cancelled", result=NULL,
        error=None, usage=USAGE, receipt=Receipt(cause="disconnect"), events=3, questions=(),
    )  # fmt: skip
    receipt = {"cause": "disconnect", "seconds": 0.0, "tasks": 0, "threads_abandoned": 0}
    assert {
        "threadId": "t1",
        "runId": "r1",
        "agent": "main",
        "state": "finished",
        "outcome": "cancelled",
        "result": None,
        "error": None,
        "receipt": receipt,
    } == json.loads(AGUI.present(snapshot))


@pytest.mark.parametrize(("status", "answered_with"), [(404, 404), (503, 503), (200, 500)])
def test_a_refusal_is_worded_like_a_runs_error(status, answered_with):
    """The client hands it to whoever has asked."""
    reply = refuse(Problem(code="x", message="y", status=status))
    assert (answered_with, "application/json") == (reply.status, reply.media_type)
    assert {"message": "y", "code": "x"} == json.loads(reply.body)


# Real sockets


@attrs.frozen
class Site:
    """A server, and how to talk to it in this protocol."""

    server: object

    @asynccontextmanager
    async def ask(self, agent, body, **headers):
        """Post a request; the connection, with what comes of it."""
        known = {"threadId": "t1", "runId": "R", "messages": [HELLO], "protocolVersion": "1.0"}
        data = json.dumps(known | body).encode()
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(request("POST", f"/agui/{agent}", data, **headers))
            yield raw

    async def run(self, agent="main", **body):
        """Post a request; the events of the whole response."""
        async with self.ask(agent, body) as raw:
            await raw.finish()
            assert (200, "text/event-stream; charset=utf-8") == (
                raw.status,
                raw.header("content-type"),
            )
            return shown(raw)

    async def fetch(self, method, path, body=b"", **headers):
        """Send another request; the response."""
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(request(method, path, body, **headers))
            await raw.finish()
            return raw


def shown(raw):
    return [json.loads(frame.data) for frame in raw.frames]


@asynccontextmanager
async def site(*agents, **settings):
    with trio.fail_after(PATIENCE):
        async with open_server(*agents, dialects=(NATIVE, AGUI), **settings) as server:
            yield Site(server)


def model(*script, name="main", **settings):
    provider = ScriptedProvider(script)
    return provider, Agent.of_model(name, "scripted:m", provider=provider, **settings)


@attrs.frozen(eq=False)
class Gated:
    """An agent that says something, waits to be let on, and says more."""

    gate: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, run, _input):
        """Say."""
        run.text("one ")
        await self.gate.wait()
        run.text("two")
        return "one two"


async def asker(run, _input):
    """Ask, and say what was answered."""
    run.text(f"You said {await run.ask('Which one?')}.")


async def wait_for(raw, kind):
    """Read on to the first event of that kind."""
    while kind not in [event["type"] for event in shown(raw)]:
        assert await raw.receive()


async def test_a_run_over_a_socket():
    """The first byte comes at once, the headers say what it is."""
    _, agent = model(say("Hello 😀"))
    async with site(agent) as one, one.ask("main", {}) as raw:
        await raw.finish()
        assert raw.body.startswith(b":\n\n")
        assert "no-store, no-transform" == raw.header("cache-control")
        events = shown(raw)
        verify(events)
        assert "Hello 😀" == events[-1]["result"]
        (run,) = one.server.runs
        assert ("R", "t1") == (run.id, run.thread_id)
        assert str(run.policy).startswith("grace:")


async def test_the_same_run_id_finds_the_run_again():
    """As long as it is kept, and nothing runs twice."""
    provider, agent = model(say("Hello"))
    async with site(agent) as one:
        first = await one.run()
        again = await one.run()
    assert first == again
    assert 1 == len(provider.prompts)


async def test_who_leaves_under_grace_comes_back_to_the_whole_run():
    """What it has of it is emptied first."""
    gated = Gated()
    async with site(Agent("main", gated)) as one:
        async with one.ask("main", {}) as raw:
            await wait_for(raw, "TEXT_MESSAGE_CONTENT")
        (run,) = one.server.runs
        await wait_until(lambda: not run.is_held)
        assert "running" == run.state
        gated.gate.set()
        half = {"id": "R-2", "role": "assistant", "content": "one "}
        events = await one.run(messages=[HELLO, half])
    assert ["RUN_STARTED", "MESSAGES_SNAPSHOT"] == kinds(events)[:2]
    assert [HELLO, half | {"content": ""}] == events[1]["messages"]
    assert "one two" == "".join(event.get("delta", "") for event in events)


async def test_who_leaves_where_leaving_cancels_has_cancelled_the_run():
    """The agent says what leaving means."""
    async with site(Agent("main", Gated(), on_disconnect="cancel")) as one:
        async with one.ask("main", {}) as raw:
            await wait_for(raw, "TEXT_MESSAGE_CONTENT")
        (run,) = one.server.runs
        await run.done.wait()
    assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)


async def test_a_new_run_takes_the_place_of_one_that_was_left():
    """Stop is all that a page can do before it posts the next message."""
    async with site(Agent("main", Gated()), Agent("quick", quick)) as one:
        async with one.ask("main", {}) as raw:
            await wait_for(raw, "TEXT_MESSAGE_CONTENT")
        (left,) = one.server.runs
        await wait_until(lambda: not left.is_held)
        events = await one.run("quick", runId="S")
        await left.done.wait()
    assert "quick" == events[-1]["result"]
    assert "cancelled" == left.end.outcome


async def quick(_run, _input):
    """Say nothing, and return a word."""
    await trio.lowlevel.checkpoint()
    return "quick"


async def test_a_run_that_somebody_watches_is_in_the_way():
    """The refusal comes before there is a stream."""
    async with site(Agent("main", Gated())) as one, one.ask("main", {}) as first:
        await wait_for(first, "TEXT_MESSAGE_CONTENT")
        async with one.ask("main", {"runId": "S"}) as second:
            await second.finish()
            assert (409, "conflict") == (second.status, json.loads(second.body)["code"])


async def test_an_unknown_agent_is_refused_before_there_is_a_stream():
    """With the status, and words that the client raises."""
    async with site(Agent("main", quick)) as one, one.ask("other", {}) as raw:
        await raw.finish()
    assert (404, "not_found") == (raw.status, json.loads(raw.body)["code"])


async def test_an_error_in_the_middle_ends_the_stream():
    """What was said stays said."""

    async def failing(run, _input):
        await trio.lowlevel.checkpoint()
        run.text("half")
        raise AgentError("no luck", code="oops")

    async with site(Agent("main", failing)) as one:
        events = await one.run()
    verify(events)
    assert ["half"] == [event["delta"] for event in events if "delta" in event]
    assert ("RUN_ERROR", "oops") == (events[-1]["type"], events[-1]["code"])


async def test_an_explicit_cancel():
    """Waits until the run is gone; the stream ends like any other."""
    async with site(Agent("main", Gated())) as one, one.ask("main", {}) as raw:
        await wait_for(raw, "TEXT_MESSAGE_CONTENT")
        answer = await one.fetch("POST", "/agui/main/runs/R/cancel", b'{"reason":"enough"}')
        await raw.finish()
    body = json.loads(answer.body)
    assert (200, "R", "cancelled") == (answer.status, body["runId"], body["outcome"])
    assert {"type": "cancelled"} == shown(raw)[-1]["outcome"]


async def test_a_server_that_stops_ends_its_streams_truthfully():
    """Its runs are cancelled, and their streams say so."""
    async with AsyncExitStack() as stack:
        async with site(Agent("main", Gated())) as one:
            raw = await stack.enter_async_context(one.ask("main", {}))
            await wait_for(raw, "TEXT_MESSAGE_CONTENT")
        await raw.finish()
    assert {"type": "cancelled"} == shown(raw)[-1]["outcome"]


async def test_an_interrupt_is_answered_by_the_next_request():
    """Its response goes on with the same run, under another id."""
    async with site(Agent("main", asker)) as one:
        first = await one.run()
        (interrupt,) = first[-1]["outcome"]["interrupts"]
        answer = {"interruptId": interrupt["id"], "status": "resolved", "payload": "this one"}
        second = await one.run(runId="S", resume=[answer])
        assert 1 == len([*one.server.runs])
    verify(first)
    verify(second)
    assert ("S", "S") == (second[0]["runId"], second[-1]["runId"])
    assert ["You said this one."] == [event["delta"] for event in second if "delta" in event]


@pytest.mark.parametrize("kind", ["text", "confirm"])
async def test_an_interrupt_that_is_declined(kind):
    """A confirmation that is declined is a no, anything else is an error to the agent."""

    async def careful(run, _input):
        said = await run.ask(Question(id="go", kind=kind, prompt="Go?"))
        run.text(f"You said {said}.")

    async with site(Agent("main", careful)) as one:
        (interrupt,) = (await one.run())[-1]["outcome"]["interrupts"]
        declined = [{"interruptId": interrupt["id"], "status": "cancelled"}]
        events = await one.run(runId="S", resume=declined)
    if kind == "confirm":
        assert ["You said False."] == [event["delta"] for event in events if "delta" in event]
    else:
        assert ("RUN_ERROR", "declined") == (events[-1]["type"], events[-1]["code"])


async def test_a_run_that_was_asked_is_read_past_its_question():
    """By whoever comes back to it, and by whoever looks on in another protocol's place."""
    async with site(Agent("main", asker)) as one:
        (interrupt,) = (await one.run())[-1]["outcome"]["interrupts"]
        waiting = await one.run()
        answer = {"interruptId": interrupt["id"], "status": "resolved", "payload": {"answer": "b"}}
        await one.run(runId="S", resume=[answer])
        again = await one.run()
        looked_on = await one.fetch("GET", "/runs/R/events?dialect=agui")
    assert "interrupt" == waiting[-1]["outcome"]["type"]
    verify(again)
    assert ["interrupt", "success"] == [
        event["outcome"]["type"] for event in again if event["type"] == "RUN_FINISHED"
    ]
    assert again == shown(looked_on)


async def test_a_model_agent_hears_the_conversation_and_calls_the_clients_tools():
    """The run is over with the call; the next one brings its answer."""
    provider, agent = model(ask_for(("pick", '{"n":1}')), say("Picked."), instructions="Be brief.")
    tools = [{"name": "pick", "description": "Pick one"}]
    context = [{"description": "The page", "value": "Settings"}]
    async with site(agent) as one:
        first = await one.run(tools=tools, context=context)
        assert ["call1"] == first[-1]["outcome"]["pendingToolCallIds"]
        calls = calling("R-3", ("call1", "pick"))
        messages = [HELLO, calls, answering("call1", "the red one")]
        second = await one.run(runId="S", tools=tools, messages=messages)
    assert "Picked." == second[-1]["result"]
    begin = (SystemMessage("Be brief."), SystemMessage("The page:\nSettings"), UserMessage("Hello"))
    assert begin == provider.prompts[0].messages
    assert ["pick"] == [spec.name for spec in provider.prompts[0].tools]
    assert ToolMessage("call1", "pick", '"the red one"') == provider.prompts[1].messages[-1]


async def test_a_function_agent_finds_what_the_client_has_sent():
    """The state, the context and what was passed on are the run's metadata."""

    async def looking(run, input):
        await trio.lowlevel.checkpoint()
        run.set_values(seen=run.metadata["state"]["a"])
        return {"input": input, "history": len(run.history), **run.metadata}

    context = [{"description": "The page", "value": "Settings"}]
    known = {"state": {"a": 1}, "context": context, "forwardedProps": {"x": 1}}
    async with site(Agent("main", looking)) as one:
        events = await one.run(messages=[ROBOT, HELLO], **known)
    assert known | {"input": "Hello", "history": 2} == events[-1]["result"]
    assert {"a": 1, "seen": 1} == next(e["snapshot"] for e in events if "snapshot" in e)


@pytest.mark.parametrize("where", ["early", "in an event", "late"])
async def test_a_stream_that_was_cut_goes_on_behind_the_last_id(where):
    """With the ids that every frame has; together both are the whole."""
    _, agent = model([*say("Hello 😀")[:-1], *say("there", part_id="t2")])
    async with site(agent) as one:
        async with one.ask("main", {}) as raw:
            await raw.finish()
        frames = raw.frames
        kept = {"early": 1, "in an event": 4, "late": len(frames) - 1}[where]
        rest = await one.fetch("GET", "/agui/main/runs/R", last_event_id=frames[kept - 1].id)
        over = await one.fetch("GET", f"/agui/main/runs/R?after={frames[-1].id}")
    assert frames == frames[:kept] + rest.frames
    assert 204 == over.status


async def test_a_stream_that_is_read_again_is_there_for_early_clients_too():
    """In the form that they know."""
    async with site(Agent("main", Gated())) as one:
        async with one.ask("main", {}) as raw:
            await wait_for(raw, "TEXT_MESSAGE_CONTENT")
            await one.fetch("POST", "/agui/main/runs/R/cancel")
        early = await one.fetch("GET", "/agui/main/runs/R?protocolVersion=0")
    assert ("RUN_ERROR", "cancelled") == (shown(early)[-1]["type"], shown(early)[-1]["code"])


async def test_a_long_conversation_is_more_than_other_requests_may_bring():
    """It comes back whole with each request."""

    @tool
    async def fetch() -> str:
        """Fetch a lot."""
        await trio.lowlevel.checkpoint()
        return "Köln 😀 " * 100_000

    provider, agent = model(ask_for(("fetch", "{}")), say("Fetched."), say("Again."), tools=[fetch])
    async with site(agent) as one:
        events = await one.run()
        (result,) = (event for event in events if event["type"] == "TOOL_CALL_RESULT")
        calls = calling("R-3", ("call1", "fetch"))
        messages = [HELLO, calls, answering("call1", result["content"]), HELLO]
        assert 1024 * 1024 < len(json.dumps(messages)) < MAX_HISTORY
        await one.run(runId="S", messages=messages)
    sent = json.loads(provider.prompts[1].messages[-1].content)
    assert "Köln 😀 " * 100_000 == sent
    assert provider.prompts[1].messages[-1] == provider.prompts[2].messages[-2]


def test_a_run_id_has_an_end():
    """What cannot be the id of a run here is the client's all the same, but not without bounds."""
    with pytest.raises(BadRequest, match="runId: expected at most 200 characters, got 201"):
        decoded(runId="x" * 201)
