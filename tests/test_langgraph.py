"""LangGraph Server's protocol, as the bytes that it is, and over sockets without its clients.

Decoders, encoder and answers are pure: they are fed requests and events. LangGraph's own clients
are in test_langgraph_clients.py; LangChain itself reads the messages here.
"""

import json
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx2
import msgspec
import pytest
import trio
import trio.testing
from langchain_core.load import dumpd
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage as LangChainSystemMessage,
    ToolMessage as LangChainToolMessage,
    convert_to_messages,
)
from msgspec import UNSET, Raw
from msgspec.structs import replace
from raw import wait_until

from agentsse import Agent, Question
from agentsse.dialects import (
    MAX_MESSAGES,
    AgentCard,
    Cancel,
    OpenThread,
    ReplyWithHistory,
    Request,
    Show,
    Start,
    Watch,
)
from agentsse.dialects.langgraph import (
    ALL_MODES,
    COMMENT,
    LANGGRAPH,
    MODES,
    Graph,
    LangGraphEncoder,
    _has,
    from_now_on,
    locate,
    make_encoder,
    read_messages,
    read_modes,
    refuse,
    show_accepted,
    show_cancelled,
    show_history,
    show_run,
    show_state,
    show_thread,
    show_values,
    show_whole_thread,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import BadRequest, NotSupported
from agentsse.events import (
    NULL,
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
    Receipt,
    RunFinished,
    RunSnapshot,
    RunStarted,
    StepFinished,
    StepStarted,
    ThreadSnapshot,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    Usage,
    ValuesChanged,
)
from agentsse.messages import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage
from agentsse.sse import Decoder
from agentsse.testing import ScriptedProvider, open_server, say

PATIENCE = 20  # seconds; nothing here takes one
NOON = "2026-11-20T12:00:00.000Z"
USAGE = Usage(input_tokens=120, output_tokens=40, reasoning_tokens=9, cache_read_tokens=100)
WIRE_USAGE = {
    "input_tokens": 120,
    "output_tokens": 40,
    "total_tokens": 160,
    "input_token_details": {"cache_read": 100, "cache_creation": 0},
    "output_token_details": {"reasoning": 9},
}
TEXT = "It is sunny in Köln 😀."
STATED = {"response_metadata": {}, "tool_calls": [], "invalid_tool_calls": []}
NAMES = {letter: name for name, letter in MODES.items()}


# Events, and what becomes of them -----------------------------------------------------------------


def started(input='"Hello"', agent="main"):
    return RunStarted(agent=agent, input=Raw(input.encode()), on_disconnect="continue",
                      thread_id="t1")  # fmt: skip


def step(kind="model", name="scripted:m", step_id="s1"):
    return StepStarted(step_id=step_id, kind=kind, name=name)


def ended(kind="model", name="scripted:m", step_id="s1", **more):
    return StepFinished(step_id=step_id, kind=kind, name=name, **more)


def part(*deltas, kind="text", part_id="p1", whole=None, **more):
    """A whole part, delta by delta."""
    text = "".join(deltas) if whole is None else whole
    return [
        PartStarted(part_id=part_id, kind=kind, **more),
        *(PartDelta(part_id=part_id, kind=kind, delta=delta) for delta in deltas),
        PartFinished(part_id=part_id, kind=kind, text=text, **more),
    ]


def called(name="look", *deltas, call_id="c1", part_id="k1", whole=None):
    return part(*deltas, kind="tool_call", part_id=part_id, whole=whole, name=name, call_id=call_id)


def tool_started(name="look", arguments=b'{"where":"K\xc3\xb6ln"}', call_id="c1"):
    return ToolStarted(call_id=call_id, name=name, arguments=Raw(arguments))


def tool_finished(result=b'"sunny"', name="look", call_id="c1", *, is_error=False, source="local"):
    return ToolFinished(
        call_id=call_id, name=name, result=Raw(result), is_error=is_error, source=source
    )


def finished(result=b"null", *, outcome="success", error=None, cause=None):
    return RunFinished(
        outcome=outcome,
        usage=USAGE,
        receipt=Receipt(cause=cause),
        result=UNSET if result is None else Raw(result),
        error=error,
    )


def asked(request_id="q1", **more):
    question = Question(id="go", kind="confirm", prompt="Go on?", **more)
    return InputRequested(request_id=request_id, questions=(question,))


def numbered(*events):
    """Events as a log has them."""
    flat = [each for event in events for each in (event if isinstance(event, list) else [event])]
    for seq, event in enumerate(flat, 1):
        msgspec.structs.force_setattr(event, "run_id", "r1")
        msgspec.structs.force_setattr(event, "seq", seq)
        msgspec.structs.force_setattr(event, "ts", NOON)
    return flat


def encoded(*events, modes="v", said=()):
    """The bytes of a run's stream."""
    encoder = LangGraphEncoder(modes)
    encoder.recall(said)
    return b"".join(frame for event in numbered(*events) for frame in encoder.feed(event))


def frames(*events, **more):
    """The same, frame by frame."""
    return Decoder().feed(encoded(*events, **more))


def read(*events, **more):
    """What each frame says, with its event."""
    return [(frame.event, json.loads(frame.data)) for frame in frames(*events, **more)]


def of(name, seen):
    """The data of the frames of one event."""
    return [data for event, data in seen if event == name]


def anonymous(messages):
    """Some messages, without the ids of those that earlier runs have made."""
    return [
        {name: each[name] for name in each if name != "id" or not each["id"].startswith("said-")}
        for each in messages
    ]


def human(content, number=1):
    return {"content": content, "type": "human", "id": f"r1-{number}"}


def ai(content, number=2, calls=(), **more):
    """A whole message of the agent."""
    message = {"content": content, "additional_kwargs": {}, "type": "ai", "id": f"r1-{number}"}
    tool_calls = [
        {"name": name, "args": args, "id": call_id, "type": "tool_call"}
        for name, args, call_id in calls
    ]
    return {**message, **STATED, "tool_calls": tool_calls, **more}


def answer_of(content, number, name="look", call_id="c1", status="success"):
    return {
        "content": content, "type": "tool", "name": name, "id": f"r1-{number}",
        "tool_call_id": call_id, "status": status,
    }  # fmt: skip


def known(**more):
    return {"response_metadata": {"model_provider": "scripted", "model_name": "m", **more}}


def test_a_stream_is_these_bytes():
    """Every frame has an id, which says in which modes it was; behind the end stands a comment."""
    place = (
        b'{"langgraph_node":"model","langgraph_step":1,"run_id":"r1","thread_id":"t1",'
        b'"graph_id":"main","assistant_id":"main"}'
    )
    hello = b'{"content":"Hello","type":"human","id":"r1-1"}'
    said = (
        '{"content":"Köln\\n","additional_kwargs":{},"response_metadata":{"model_provider":'
        '"scripted","model_name":"m","finish_reason":"stop"},"type":"ai","id":"r1-2",'
        '"tool_calls":[],"invalid_tool_calls":[]}'
    ).encode()
    expected = [
        b'id: 1.1-tv\nevent: metadata\ndata: {"run_id":"r1","thread_id":"t1","attempt":1}\n\n',
        b'id: 1-tv\nevent: values\ndata: {"messages":[%b]}\n\n' % hello,
        b'id: 4-tv\nevent: messages\ndata: [{"content":"K\xc3\xb6ln\\n","type":"AIMessageChunk",'
        b'"id":"r1-2"},%b]\n\n' % place,
        b'id: 6.1-tv\nevent: messages\ndata: [{"content":"","type":"AIMessageChunk","id":"r1-2",'
        b'"response_metadata":{"model_provider":"scripted","model_name":"m","finish_reason":"stop"}'
        b',"chunk_position":"last"},%b]\n\n' % place,
        b'id: 6-tv\nevent: values\ndata: {"messages":[%b,%b]}\n\n' % (hello, said),
        b'id: 7.1-tv\nevent: end\ndata: {"run_id":"r1","status":"success"}\n\n',
        b":\n",
    ]
    events = (started(), step(), part("Köln\n"), ended(finish_reason="stop"), finished())
    assert b"".join(expected) == encoded(*events, modes="tv")


def test_who_does_not_say_gets_all_that_says_something_of_its_own():
    """The mode that only says again what another one says must be asked for."""
    assert (ALL_MODES, "m") == (make_encoder(None).modes, make_encoder("m").modes)
    assert set(ALL_MODES) == set(MODES.values()) - {"m"}


def test_values_are_the_whole_state_at_the_end_of_each_step():
    """Those of the thread's earlier messages that the encoder was told of are part of it."""
    events = (
        started(), step(), called("look", '{"where": ', '"Köln"}'), ended(), step("tool_round",
        "tools", "s2"), tool_started(), ToolOutputDelta(call_id="c1", delta="..."), tool_finished(),
        ended("tool_round", "tools", "s2"), step(), part(TEXT), ended(usage=USAGE), finished(),
    )  # fmt: skip
    said = (UserMessage("Hi"), AssistantMessage("Yes?"))
    seen = read(*events, said=said)
    before = [
        {"content": "Hi", "type": "human"},
        {"content": "Yes?", "additional_kwargs": {}, "type": "ai", **STATED},
    ]
    messages = [
        human("Hello"),
        ai("", calls=[("look", {"where": "Köln"}, "c1")], **known()),
        answer_of("sunny", 3),
        ai(TEXT, 4, **known(), usage_metadata=WIRE_USAGE),
    ]
    expected = [{"messages": [*before, *messages[:end]]} for end in (1, 2, 3, 4)]
    assert expected == [{"messages": anonymous(each["messages"])} for each in of("values", seen)]
    assert ["metadata", *["values"] * 4, "end"] == [event for event, _ in seen]


def test_what_was_said_before_has_ids_of_its_own():
    """The same in each later run, though much was forgotten meanwhile; none of them comes twice."""
    said = (UserMessage("Hi"), AssistantMessage("Yes?"), UserMessage("Well"), UserMessage("Well"))
    before, later, forgotten = (
        [each["id"] for each in of("values", read(started(), said=told))[0]["messages"]]
        for told in (said, (*said, UserMessage("Hi")), said[1:])
    )
    assert (5, 6) == (len(set(before)), len(set(later)))
    assert ([*before[:4], "r1-1"], before[1:]) == ([*later[:4], later[-1]], forgotten)
    assert before == [
        each["id"]
        for each in json.loads(show_values(snapshot(), numbered(started()), said).body)["messages"]
    ]


def test_updates_are_what_each_node_has_done():
    """A model's are called `model` and `tools`; those of a function have the names of its steps."""
    events = (
        started(), step("flow", "plan", "s0"), step(), called("look", "{}"),
        called("look", "{}", call_id="c2", part_id="k2"), ended(),
        step("tool_round", "tools", "s2"), tool_started(), tool_started(call_id="c2"),
        tool_finished(call_id="c2"), tool_finished(), ended("tool_round", "tools", "s2"),
        part("So."), ended("flow", "plan", "s0", result=Raw(b'{"n":\n1}')),
        step("node", "rest", "s3"), ended("node", "rest", "s3"), part("Done."), finished(),
    )  # fmt: skip
    calls = [("look", {}, "c1"), ("look", {}, "c2")]
    expected = [
        {"model": {"messages": [ai("", calls=calls, **known())]}},
        {"tools": {"messages": [answer_of("sunny", 3, call_id="c2"), answer_of("sunny", 4)]}},
        {"plan": {"messages": [ai("So.", 5)]}},
        {"plan": {"n": 1}},
        {"rest": None},
        {"main": {"messages": [ai("Done.", 6)]}},
    ]
    assert expected == of("updates", read(*events, modes="u"))


def chunks(*events):
    """The chunks of the agent's messages, as LangChain puts them together, by id."""
    whole = {}
    for chunk, _place in of("messages", read(*events, modes="t")):
        if chunk["type"] == "tool":
            message = LangChainToolMessage(**chunk)
        else:
            message = AIMessageChunk(**chunk)
            if message.id in whole:
                message = whole[message.id] + message
        whole[message.id] = message
    return list(whole.values())


def test_chunks_add_up_to_the_message():
    """Text, what was thought, calls with their arguments, and what it has cost."""
    (message,) = chunks(
        started(), step(), part("Let me ", "see.", kind="reasoning", part_id="p0"),
        part("It is ", "sunny."), called("look", '{"a":', "1}"),
        called("find", call_id="c2", part_id="k2", whole='{"b":2}'),
        called("rest", call_id="c3", part_id="k3"), ended(usage=USAGE, finish_reason="tool_calls"),
    )  # fmt: skip
    assert ("It is sunny.", "Let me see.") == (
        message.content,
        message.additional_kwargs["reasoning_content"],
    )
    assert [("look", {"a": 1}, "c1"), ("find", {"b": 2}, "c2"), ("rest", {}, "c3")] == [
        (call["name"], call["args"], call["id"]) for call in message.tool_calls
    ]
    assert (160, 9) == (
        message.usage_metadata["total_tokens"],
        message.usage_metadata["output_token_details"]["reasoning"],
    )
    assert ("last", "tool_calls") == (
        message.chunk_position,
        message.response_metadata["finish_reason"],
    )
    assert ["reasoning", "text", "tool_call", "tool_call", "tool_call"] == [
        block["type"] for block in message.content_blocks
    ]


def test_a_refusal_is_text_and_says_what_it_is():
    """In pieces as well as in whole."""
    events = (started(), step(), part("I ", "won't.", kind="refusal"), ended(), finished())
    (message,) = chunks(*events)
    assert ("I won't.", {"refusal": "I won't."}) == (message.content, message.additional_kwargs)
    *_, last = of("values", read(*events))
    expected = ai("I won't.", additional_kwargs={"refusal": "I won't."}, **known())
    assert expected == last["messages"][1]


def test_arguments_that_are_no_object_are_told_as_such():
    """LangChain has a list for them."""
    events = (started(), step(), called("look", '{"a": '), ended(), finished())
    *_, last = of("values", read(*events))
    bad = {
        "name": "look", "args": '{"a": ', "id": "c1", "error": "expected a JSON object",
        "type": "invalid_tool_call",
    }  # fmt: skip
    assert ([], [bad]) == (
        last["messages"][1]["tool_calls"],
        last["messages"][1]["invalid_tool_calls"],
    )


def test_a_tools_answer_is_a_message_of_its_own():
    """Its content is text: a string's own, of anything else its JSON."""
    events = (
        started(), step(), called("look", "{}"), ended(), step("tool_round", "tools", "s2"),
        tool_started(), tool_finished(b'{"a":\n [1]}', is_error=True),
        ended("tool_round", "tools", "s2"), finished(),
    )  # fmt: skip
    *_, (message, place) = of("messages", read(*events, modes="t"))
    assert answer_of('{"a":[1]}', 3, status="error") == message
    assert ("tools", 2) == (place["langgraph_node"], place["langgraph_step"])


def test_what_the_provider_calls_itself_stands_in_the_message_too():
    """Its answers follow that message."""
    events = (
        started(), step(), tool_started("search", b"{}", "c9"),
        tool_finished(b'"found"', "search", "c9", source="provider"), part("So."), ended(),
        finished(),
    )  # fmt: skip
    *_, last = of("values", read(*events))
    assert [
        human("Hello"),
        ai("So.", calls=[("search", {}, "c9")], **known()),
        answer_of("found", 3, "search", "c9"),
    ] == last["messages"]
    names = [next(iter(update)) for update in of("updates", read(*events, modes="u"))]
    assert ["model", "tools"] == names


def test_a_tool_that_a_function_calls_has_a_message_that_calls_it():
    """With what the function has said before."""
    events = (started(), part("Wait."), tool_started(), tool_finished(), finished())
    *_, last = of("values", read(*events))
    assert [
        human("Hello"),
        ai("Wait.", calls=[("look", {"where": "Köln"}, "c1")]),
        answer_of("sunny", 3),
    ] == last["messages"]
    assert 3 == len(of("values", read(*events)))  # with the input, the call and the answer
    call, answer = chunks(started(), tool_started(), tool_finished(), finished())
    assert ([("look", {"where": "Köln"})], "sunny") == (
        [(each["name"], each["args"]) for each in call.tool_calls],
        answer.content,
    )


def test_models_that_speak_side_by_side_are_told_apart():
    """Each part is a message then, for nobody knows whose it is."""
    events = (
        started(), step(), step(step_id="s2"),
        PartStarted(part_id="a", kind="text"), PartStarted(part_id="b", kind="text"),
        PartDelta(part_id="a", kind="text", delta="One."),
        PartDelta(part_id="b", kind="text", delta="Two."),
        PartFinished(part_id="b", kind="text", text="Two."),
        PartFinished(part_id="a", kind="text", text="One."),
        ended(step_id="s2"), part("Three."), ended(), finished(),
    )  # fmt: skip
    *_, last = of("values", read(*events))
    assert ["Hello", "Two.", "One.", "Three."] == [each["content"] for each in last["messages"]]


def test_a_model_that_says_nothing_has_no_message():
    """Nor is there anything new in the state."""
    events = (started(), step(), PartStarted(part_id="p", kind="text"),
              PartFinished(part_id="p", kind="text", text=""), ended(), finished())  # fmt: skip
    assert [{"messages": [human("Hello")]}] == of("values", read(*events))


def test_the_older_mode_shows_messages_as_far_as_they_have_come():
    """First what is known of one, then the whole of it again and again, in the end for good."""
    events = (
        started(), step(), part("It is ", "sunny."), called("look", "{}"), ended(),
        step("tool_round", "tools", "s2"), tool_started(), tool_finished(),
        ended("tool_round", "tools", "s2"), finished(),
    )  # fmt: skip
    seen = read(*events, modes="m")
    call = [("look", {}, "c1")]
    expected = [
        ("metadata", None),
        ("messages/metadata", None),
        ("messages/partial", [ai("It is ")]),
        ("messages/partial", [ai("It is sunny.")]),
        ("messages/partial", [ai("It is sunny.", calls=call)]),
        ("messages/complete", [ai("It is sunny.", calls=call, **known())]),
        ("messages/metadata", None),
        ("messages/complete", [answer_of("sunny", 3)]),
        ("end", None),
    ]
    assert expected == [(event, data if isinstance(data, list) else None) for event, data in seen]
    first, second = of("messages/metadata", seen)
    assert ("model", "tools") == (
        first["r1-2"]["metadata"]["langgraph_node"],
        second["r1-3"]["metadata"]["langgraph_node"],
    )


def test_a_long_message_is_not_shown_again_for_every_letter():
    """Or a megabyte would take terabytes."""
    deltas = ["x" * 1_000, *"y" * 20, "z"]
    events = (started(), step(), part(*deltas), ended(), finished())
    partial = of("messages/partial", read(*events, modes="m"))
    assert [1_000, 1_007, 1_014, 1_021] == [len(each["content"]) for (each,) in partial]


def test_what_an_agent_reports_is_custom():
    """Under its name."""
    events = (started(), Custom(name="tick", value=Raw(b'{"n":\r\n1}')), finished())
    assert [{"name": "tick", "value": {"n": 1}}] == of("custom", read(*events, modes="c"))
    assert [] == of("custom", read(*events, modes="v"))


def test_values_that_a_run_sets_are_fields_of_the_state():
    """Null takes one away; within a step they are shown at its end."""
    events = (
        started(), ValuesChanged(values=Raw(b'{"n":1,"messages":[],"m":{"a":\n2}}')),
        step("node", "count", "s1"), ValuesChanged(values=Raw(b'{"n":2,"m":null}')),
        ended("node", "count", "s1"), finished(),
    )  # fmt: skip
    hello = {"messages": [human("Hello")]}
    assert [hello, {**hello, "n": 1, "m": {"a": 2}}, {**hello, "n": 2}] == of(
        "values", read(*events)
    )
    updates = of("updates", read(*events, modes="u"))
    assert [("main", 1), ("count", 2)] == [
        (name, value["n"]) for update in updates[:2] for name, value in update.items()
    ]


@pytest.mark.parametrize(
    ("input", "expected"),
    [
        ('{"topic":"sun","messages":5}',
         {"messages": [human('{"topic":"sun","messages":5}')], "topic": "sun"}),
        ("[1]", {"messages": [human("[1]")]}),
        ("null", {"messages": []}),
    ],
)  # fmt: skip
def test_the_input_is_the_first_state(input, expected):
    """An object's fields are the state's; what the agent is told is a message."""
    assert [expected] == of("values", read(started(input), finished()))


@pytest.mark.parametrize(
    ("said", "result", "messages", "fields"),
    [
        (part("Hi."), b'"Hi."', [ai("Hi.")], {}),
        (part("Hi."), b"null", [ai("Hi.")], {}),
        (part("Hi."), None, [ai("Hi.")], {}),
        (part("Hi."), b"[1,\n2]", [ai("Hi.")], {"result": [1, 2]}),
        (part("Hi."), b'{"n":1}', [ai("Hi.")], {"n": 1}),
        ([], b'{"n":1}', [ai('{"n":1}')], {"n": 1}),
        ([], b'"Hi."', [ai("Hi.")], {}),
        ([], b'""', [], {}),
    ],
)
def test_the_result_is_part_of_the_last_state(said, result, messages, fields):
    """An object's fields are the state's; who has said nothing has said the result."""
    *_, last = of("values", read(started(), said, finished(result)))
    assert {"messages": [human("Hello"), *messages], **fields} == last


def test_what_a_shield_says_is_said_in_the_agents_place():
    """Unless the agent has said something after it."""
    blocked = Moderation(violation=True, message="No.")
    *_, last = of("values", read(started(), blocked, finished()))
    assert [human("Hello"), ai("No.")] == last["messages"]
    *_, last = of("values", read(started(), Moderation(violation=True), finished()))
    assert "This request was refused." == last["messages"][1]["content"]
    *_, last = of("values", read(started(), blocked, part("Well."), finished()))
    assert [human("Hello"), ai("Well.")] == last["messages"]
    assert [{"messages": [human("Hello")]}] == of(
        "values", read(started(), Moderation(violation=False), finished())
    )


def test_what_is_said_to_a_run_is_shown_where_the_agent_takes_it_up():
    """What it was begun by is its input already, and what it never heard is not shown."""

    def heard(text):
        return MessageReceived(message_id="m", text=text, mode="steer")

    events = (
        started(), heard("Hello"), step(), called("look", "{}"), ended(),
        step("tool_round", "tools", "s2"), heard("Hurry!"), tool_started(), tool_finished(),
        ended("tool_round", "tools", "s2"), step(), part("Yes."), ended(), heard("Late."),
        finished(),
    )  # fmt: skip
    *_, last = of("values", read(*events))
    assert ["Hello", "", "sunny", "Hurry!", "Yes."] == [m["content"] for m in last["messages"]]


def test_a_child_run_is_a_node():
    """What an agent does within the run has nodes of its own."""
    events = (
        started(), AgentStarted(agent="worker", child_run_id="r2"),
        AgentFinished(agent="worker", child_run_id="r2", report=Raw(b'"done"')),
        AgentFinished(agent="other", child_run_id="r3"), AgentFinished(agent="inner"),
        Liveness(elapsed_s=1, events=1, since_last_output_s=1), finished(),
    )  # fmt: skip
    assert [{"worker": "done"}, {"other": None}] == of("updates", read(*events, modes="u"))


# Ends ---------------------------------------------------------------------------------------------

QUESTIONS = {"questions": [{"id": "go", "kind": "confirm", "prompt": "Go on?"}]}
INTERRUPT = {"id": "r1:q1", "value": QUESTIONS}


def test_a_response_ends_at_a_question():
    """With the interrupt in the state; who answers gets another response of the same run."""
    events = (
        started(), part("Well."), asked(), Liveness(elapsed_s=1, events=1, since_last_output_s=1),
        InputReceived(request_id="q1", answers=Raw(b'{"go":true}')), part("Good."), finished(),
    )  # fmt: skip
    seen = read(*events, modes="uv")
    messages = [human("Hello"), ai("Well."), ai("Good.", 3)]
    expected = [
        ("metadata", {"run_id": "r1", "thread_id": "t1", "attempt": 1}),
        ("values", {"messages": messages[:1]}),
        ("updates", {"main": {"messages": [messages[1]]}}),
        ("updates", {"__interrupt__": [INTERRUPT]}),
        ("values", {"messages": messages[:2], "__interrupt__": [INTERRUPT]}),
        ("end", {"run_id": "r1", "status": "interrupted"}),
        ("metadata", {"run_id": "r1", "thread_id": "t1", "attempt": 1}),
        ("values", {"messages": messages[:2]}),
        ("updates", {"main": {"messages": [messages[2]]}}),
        ("values", {"messages": messages}),
        ("end", {"run_id": "r1", "status": "success"}),
    ]
    assert expected == seen
    assert 2 == encoded(*events).count(b"\n\n:\n")
    last = InputWithdrawn(request_id="q1")
    *_, values = read(started(), asked(), last)
    assert ("values", {"messages": messages[:1]}) == values


def test_a_question_shows_its_options():
    """With what they are called."""
    options = (Option(id="a", label="A"), Option(id="b"))
    events = (started(), asked(options=options), finished())
    *_, last = (each for each in of("values", read(*events)) if "__interrupt__" in each)
    assert [{"id": "a", "label": "A"}, {"id": "b"}] == (
        last["__interrupt__"][0]["value"]["questions"][0]["options"]
    )


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (finished(None, outcome="error", error=Problem(code="bad", message="It broke.")),
         {"error": "bad", "message": "It broke."}),
        (finished(None, outcome="error"), {"error": "internal", "message": "the run has failed"}),
        (finished(None, outcome="cancelled", cause="disconnect"),
         {"error": "cancelled", "message": "the run was cancelled (disconnect)"}),
        (finished(None, outcome="cancelled", error=Problem(code="x", message="y")),
         {"error": "cancelled", "message": "the run was cancelled"}),
        (finished(None, outcome="interrupted", cause="input_timeout"),
         {"error": "interrupted", "message": "the run was interrupted (input_timeout)"}),
    ],
)  # fmt: skip
def test_a_run_that_comes_to_nothing_ends_with_an_error(end, error):
    """What was said stands in the state before it; there is no other end."""
    expected = [
        ("metadata", {"run_id": "r1", "thread_id": "t1", "attempt": 1}),
        ("values", {"messages": [human("Hello")]}),
        ("values", {"messages": [human("Hello"), ai("Well.")]}),
        ("error", error),
    ]
    assert expected == read(started(), part("Well."), end)


def test_who_has_seen_the_end_may_come_back():
    """Behind its id there is only a comment: a stream all the same."""
    events = numbered(started(), finished())
    encoder = make_encoder("v")
    *_, last = (list(encoder.feed(event)) for event in events)
    assert COMMENT == last[-1]
    *_, end = frames(started(), finished())
    assert ("2.1-v", 2) == (end.id, len(last))


@pytest.mark.parametrize(
    ("events", "place"),
    [
        ([], (0, 0)),
        ([started(), step()], (2, 0)),
        ([started(), step(), finished()], (2, 0)),
        ([started(), asked(), step()], (1, 0)),
        ([started(), asked(), asked("q2"), InputWithdrawn(request_id="q1")], (2, 0)),
        ([started(), asked(), InputReceived(request_id="q1", answers=NULL)], (3, 0)),
    ],
)
def test_from_now_on_begins_at_what_comes_or_at_the_end(events, place):
    """Who comes after an end is told of it, and so is who comes while a person is waited for."""
    assert place == from_now_on(numbered(*events))


# Answers ------------------------------------------------------------------------------------------


def snapshot(state="finished", outcome="success", *, cause=None, questions=(), **more):
    return RunSnapshot(
        id="r1", agent="main", state=state, on_disconnect="continue", created=NOON,
        **{"started": NOON, "finished": None, "thread_id": "t1", "parent_run_id": None,
           "outcome": outcome, "result": NULL, "error": None, "usage": USAGE,
           "receipt": Receipt(cause=cause) if outcome else None, "events": 0,
           "questions": tuple(numbered(*questions)), **more},
    )  # fmt: skip


def thread_of(run=None, state="idle", metadata=NULL, **more):
    return ThreadSnapshot(
        id="t1", agent="main", created=NOON, state=state, run=run,
        **{"runs": (), "workers": (), "tools": (), "triggers": (), "last_event_id": None,
           "last_event_at": None, "is_open": True, "metadata": metadata, **more},
    )  # fmt: skip


def shown(reply, status=200):
    assert (status, "application/json") == (reply.status, reply.media_type)
    return json.loads(reply.body)


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (snapshot("queued", None, started=None), "pending"),
        (snapshot("running", None), "running"),
        (snapshot("paused", None), "running"),
        (snapshot("cancelling", None), "running"),
        (snapshot("waiting", None), "interrupted"),
        (snapshot(), "success"),
        (snapshot(outcome="error"), "error"),
        (snapshot(outcome="cancelled", cause="client_cancel"), "interrupted"),
        (snapshot(outcome="cancelled", cause="deadline"), "timeout"),
        (snapshot(outcome="interrupted", cause="input_timeout"), "timeout"),
        (snapshot("finished", None), "interrupted"),
    ],
)
def test_a_run_has_a_status(run, status):
    """It never looks like success where it is none."""
    expected = {
        "run_id": "r1", "thread_id": "t1", "assistant_id": "main", "created_at": NOON,
        "updated_at": NOON, "status": status, "metadata": {}, "multitask_strategy": "enqueue",
    }  # fmt: skip
    assert expected == shown(show_run(run, []))
    assert expected == json.loads(LANGGRAPH.present(run))


def test_a_run_shows_its_metadata():
    """As it came."""
    assert {"a": 1} == shown(show_run(snapshot(metadata=Raw(b'{"a":1}')), []))["metadata"]


def test_who_waits_gets_the_state():
    """With what is asked, or what went wrong, under names of their own."""
    events = numbered(started(), part("Hi."), finished(b'"Hi."'))
    expected = {"messages": [human("Hello"), ai("Hi.")]}
    assert expected == shown(show_values(snapshot(), events, ()))
    said = (UserMessage("Before."),)
    before = [{"content": "Before.", "type": "human"}, *expected["messages"]]
    reply = show_values(snapshot(), events, said)
    assert before == anonymous(shown(reply)["messages"])
    assert {"Location": "/threads/t1/runs/r1/join"} == reply.headers
    waiting = snapshot("waiting", None, questions=[asked()])
    events = numbered(started(), asked())
    assert {"messages": [human("Hello")], "__interrupt__": [INTERRUPT]} == shown(
        show_values(waiting, events, ())
    )
    events = numbered(started(), finished(None, outcome="cancelled", cause="client_cancel"))
    error = {"error": "cancelled", "message": "the run was cancelled (client_cancel)"}
    cancelled = snapshot(outcome="cancelled", cause="client_cancel")
    assert {"messages": [human("Hello")], "__error__": error} == shown(
        show_cancelled(cancelled, events, ())
    )
    assert {"messages": [human("Hello")]} == shown(
        show_cancelled(snapshot("cancelling", None), numbered(started()), ()), 202
    )
    assert {} == shown(show_accepted(cancelled, events), 202)


@pytest.mark.parametrize(
    ("thread", "status"),
    [
        (thread_of(), "idle"),
        (thread_of(snapshot()), "idle"),
        (thread_of(snapshot(outcome="cancelled")), "idle"),
        (thread_of(snapshot(outcome="error")), "error"),
        (thread_of(snapshot("waiting", None), "waiting"), "interrupted"),
        (thread_of(snapshot("queued", None), "queued"), "busy"),
        (thread_of(snapshot("running", None), "running"), "busy"),
        (thread_of(snapshot("paused", None), "paused"), "busy"),
        (thread_of(snapshot("cancelling", None), "cancelling"), "busy"),
    ],
)
def test_a_thread_has_a_status(thread, status):
    """That of its last run, while that means anything."""
    expected = {
        "thread_id": "t1", "created_at": NOON, "updated_at": NOON, "state_updated_at": NOON,
        "metadata": {}, "status": status, "config": {}, "values": None, "interrupts": {},
        "error": None,
    }  # fmt: skip
    assert expected == shown(show_thread(thread, []))


def test_a_thread_shows_what_it_is():
    """Its state, what its run asks, and how it has failed."""
    later = "2026-11-20T13:00:00.000Z"
    waiting = snapshot("waiting", None, questions=[asked()])
    thread = thread_of(waiting, "waiting", Raw(b'{"a":1}'), last_event_at=later)
    seen = shown(show_whole_thread(thread, waiting, numbered(started(), asked()), []))
    assert ({"a": 1}, later, {"r1": [INTERRUPT]}) == (
        seen["metadata"],
        seen["updated_at"],
        seen["interrupts"],
    )
    assert {"messages": [human("Hello")]} == seen["values"]
    failed = snapshot(outcome="error", error=Problem(code="bad", message="It broke."))
    error = {"error": "bad", "message": "It broke."}
    assert error == shown(show_thread(thread_of(failed), []))["error"]


CHECKPOINT = {
    "thread_id": "t1", "checkpoint_ns": "", "checkpoint_id": "r1", "checkpoint_map": None,
}  # fmt: skip


def test_the_state_of_a_thread_is_what_was_said_in_it():
    """In earlier runs and in the last one; a checkpoint names that."""
    said = [
        SystemMessage("Be brief."),
        UserMessage("Look!"),
        AssistantMessage("", (ToolCall("c1", "look", '{"a":\n1}'), ToolCall("c2", "rest", ""))),
        ToolMessage("c1", "look", '"sunny"'),
        ToolMessage("c2", "rest", '{"b":2}'),
        ToolMessage("c3", "fail", '"no" is no number', is_error=True),
        AssistantMessage("Sunny."),
    ]
    events = numbered(started(), part("Hi."), finished(b'"Hi."'))
    state = shown(show_state(thread_of(snapshot()), snapshot(finished=NOON), events, said))
    calls = [
        {"name": "look", "args": {"a": 1}, "id": "c1", "type": "tool_call"},
        {"name": "rest", "args": {}, "id": "c2", "type": "tool_call"},
    ]
    bare = {"additional_kwargs": {}, **STATED, "type": "ai"}
    answers = [("sunny", "look", "c1", "success"), ('{"b":2}', "rest", "c2", "success"),
               ('"no" is no number', "fail", "c3", "error")]  # fmt: skip
    expected = [
        {"content": "Be brief.", "type": "system"},
        {"content": "Look!", "type": "human"},
        {**bare, "content": "", "tool_calls": calls},
        *(
            {"content": content, "type": "tool", "name": name, "tool_call_id": call_id,
             "status": status}
            for content, name, call_id, status in answers
        ),
        {**bare, "content": "Sunny."},
        human("Hello"),
        ai("Hi."),
    ]  # fmt: skip
    assert expected == anonymous(state["values"]["messages"])
    assert (CHECKPOINT, [], [], []) == (
        state["checkpoint"],
        state["next"],
        state["tasks"],
        state["interrupts"],
    )
    answers = [LangChainToolMessage] * 3
    kinds = [LangChainSystemMessage, HumanMessage, AIMessage, *answers, AIMessage]
    assert [*kinds, HumanMessage, AIMessage] == [
        type(each) for each in convert_to_messages(state["values"]["messages"])
    ]
    history = shown(show_history(thread_of(snapshot()), snapshot(finished=NOON), events, said))
    assert [state] == history


def test_a_thread_without_a_run_has_no_state():
    """Nor a history."""
    state = shown(show_state(thread_of(), None, [], []))
    assert ({}, None, []) == (state["values"], state["checkpoint"], state["next"])
    assert [] == shown(show_history(thread_of(), None, [], []))


@pytest.mark.parametrize(
    ("run", "error", "interrupts"),
    [
        (snapshot("waiting", None, questions=[asked()]), None, [INTERRUPT]),
        (snapshot("running", None), None, []),
        (
            snapshot(outcome="error", error=Problem(code="bad", message="It broke.")),
            "It broke.",
            [],
        ),
    ],
)
def test_what_waits_or_has_failed_is_a_task(run, error, interrupts):
    """With what it asks, or with its error."""
    state = shown(show_state(thread_of(run), run, numbered(started()), []))
    (task,) = state["tasks"]
    assert ("main", error, interrupts) == (task["name"], task["error"], task["interrupts"])
    assert ([] if run.state == "finished" else ["main"], interrupts) == (
        state["next"],
        state["interrupts"],
    )


CARDS = [
    AgentCard(name=name, description=name.title(), model=None, on_disconnect=None, tools=())
    for name in ("main", "other")
]


def ask(method, path, body=None, *, query=None, headers=None, **parameters):
    """What a request asks for."""
    (route,) = (r for r in LANGGRAPH.routes if (r.method, r.path) == (method, path))
    data = b"" if body is None else msgspec.json.encode(body)
    fields, pairs = query or {}, tuple((query or {}).items())
    return route.decode(Request(method, parameters, fields, headers or {}, data, pairs))


def search(path, cards_or_threads, **wish):
    """What a search finds."""
    return shown(ask("POST", path, wish).reply(cards_or_threads))


def test_assistants_are_agents():
    """They are found by their names, which are their ids, and page by page."""
    found = search("/assistants/search", CARDS)
    assert [("main", "main", "Main"), ("other", "other", "Other")] == [
        (each["assistant_id"], each["graph_id"], each["description"]) for each in found
    ]
    assert found[1:] == search("/assistants/search", CARDS, offset=1, limit=5)
    assert found[:1] == search("/assistants/search", CARDS, graph_id="main", name="main")
    assert [] == search("/assistants/search", CARDS, graph_id="main", name="other")
    assert found == search("/assistants/search", CARDS, metadata={"created_by": "system"})
    assert [] == search("/assistants/search", CARDS, metadata={"a": 1})
    one = ask("GET", "/assistants/<assistant_id>", assistant_id="other").reply(CARDS)
    assert found[1] == shown(one)
    none = ask("GET", "/assistants/<assistant_id>", assistant_id="x").reply(CARDS)
    assert 404 == none.status
    assert "expected one of the assistants main, other, got 'x'" in json.loads(none.body)["detail"]
    nobody = ask("GET", "/assistants/<assistant_id>", assistant_id="x").reply([])
    assert "assistants (none), got" in json.loads(nobody.body)["detail"]


def test_threads_are_found_by_what_is_known_of_them():
    """And put in order."""
    threads = [
        thread_of(snapshot("running", None), "running", Raw(b'{"a":1,"b":2}')),
        attrs_like(thread_of(metadata=Raw(b"[1]")), id="t2", created="2026-11-20T11:00:00.000Z"),
        attrs_like(thread_of(), id="t3", created="2026-11-20T13:00:00.000Z"),
    ]

    def found(**wish):
        return [each["thread_id"] for each in search("/threads/search", threads, **wish)]

    assert ["t1", "t2", "t3"] == found()
    assert ["t2"] == found(limit=1, offset=1)
    assert ["t1"] == found(status="busy")
    assert ["t3"] == found(ids=["t3", "t9"])
    assert (["t1"], []) == (found(metadata={"a": 1}), found(metadata={"a": 2}))
    assert ["t3", "t1", "t2"] == found(sort_by="created_at")
    assert ["t2", "t1", "t3"] == found(sort_by="created_at", sort_order="asc")


def attrs_like(struct, **changes):
    return msgspec.structs.replace(struct, **changes)


def test_the_server_says_that_it_is_there():
    """And what of LangGraph's is not."""
    assert {"ok": True} == shown(ask("GET", "/ok").reply(CARDS))
    assert {"flags": {"assistants": True, "crons": False, "langsmith": False}} == shown(
        ask("GET", "/info").reply(CARDS)
    )


def test_runs_of_a_thread_are_listed_page_by_page():
    """All of them, or those with a status."""
    runs = [snapshot(), snapshot("running", None), snapshot(outcome="error")]
    wish = ask("GET", "/threads/<thread_id>/runs", thread_id="t1")
    assert ("t1", 1_000) == (wish.thread_id, wish.limit)
    assert ["success", "running", "error"] == [each["status"] for each in shown(wish.reply(runs))]

    def listed(**query):
        wish = ask("GET", "/threads/<thread_id>/runs", query=query, thread_id="t1")
        return [each["status"] for each in shown(wish.reply(runs))]

    assert (["running"], ["error"]) == (listed(limit="1", offset="1"), listed(status="error"))
    with pytest.raises(BadRequest, match="limit: expected a whole number"):
        listed(limit="x")


def test_refusals_say_what_is_wrong():
    """What is not supported has a status that no client tries again."""
    reply = refuse(Problem(code="not_supported", message="no", status=501))
    assert (422, "application/problem+json") == (reply.status, reply.media_type)
    assert 404 == refuse(Problem(code="not_found", message="no", status=404)).status


# Requests -----------------------------------------------------------------------------------------

IN_THREAD = "/threads/<thread_id>/runs"


def run_in(thread_id="t1", path=IN_THREAD, **body):
    return ask("POST", path, {"assistant_id": "main", **body}, thread_id=thread_id)


def test_a_request_asks_for_a_run():
    """In a thread that is there, or without one; streamed, waited for, or left to itself."""
    expected = Start(
        agent="main", input=None, delivery="background", thread_id="t1", must_exist=True,
        if_busy="enqueue", resumes=True, options="v", reply=show_run,
    )  # fmt: skip
    assert expected == run_in()
    stream = replace(expected, delivery="stream", reply=None)
    assert stream == run_in(path=f"{IN_THREAD}/stream")
    wait = replace(expected, delivery="wait", reply=ReplyWithHistory(show_values))
    assert wait == run_in(path=f"{IN_THREAD}/wait")
    alone = ask("POST", "/runs/stream", {"assistant_id": "main"})
    assert (
        replace(stream, thread_id=None, must_exist=False, makes_thread=True, resumes=False) == alone
    )


def test_what_the_client_wants_is_passed_on():
    """What means nothing here is overlooked."""
    start = run_in(
        input={"topic": "sun"}, stream_mode=["messages-tuple", "values", "values"],
        metadata={"a": 1}, on_disconnect="cancel", multitask_strategy="reject",
        if_not_exists="create", config={"tags": []}, context={}, durability="sync",
        checkpoint={"checkpoint_id": "r0"}, stream_resumable=True, stream_subgraphs=True,
        on_completion="delete", strict_resume=True, command=None, feedback_keys=[], webhook=None,
    )  # fmt: skip
    assert ({"topic": "sun"}, "tv", {"a": 1}, "cancel", "reject", False) == (
        start.input,
        start.options,
        start.metadata,
        start.on_disconnect,
        start.if_busy,
        start.must_exist,
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"command": {"update": {"a": 1}}}, "command.update: not available here: a state is what"),
        ({"command": {"goto": "end"}}, "command.goto: not available"),
        ({"webhook": "http://localhost"}, "webhook: not available here: nobody would call it"),
        ({"after_seconds": 5}, "after_seconds: not available"),
        ({"feedback_keys": ["a"]}, "feedback_keys: not available"),
        ({"interrupt_before": "*"}, "interrupt_before: not available"),
        ({"interrupt_after": ["a"]}, "interrupt_after: not available"),
        ({"multitask_strategy": "interrupt"}, "multitask_strategy: .* use 'enqueue' or 'reject'"),
        ({"multitask_strategy": "rollback"}, "multitask_strategy: not available"),
        ({"stream_mode": "events"}, "stream_mode: expected some of values, updates, .* 'events'"),
        ({"stream_mode": ["values", "debug"]}, "got 'debug'"),
        (
            {"input": {"messages": [{"type": "remove", "id": "a"}]}},
            r"\[0\]: .* what was said stays",
        ),
    ],
)
def test_what_would_be_a_promise_not_kept_is_refused(body, said):
    """With a reason."""
    with pytest.raises(NotSupported, match=said):
        run_in(**body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"assistant_id": None}, "expected a JSON object to start a run with"),
        ({"on_disconnect": "grace"}, "on_disconnect"),
        ({"input": {"messages": []}}, "the last one to be a person's, .* got none"),
        ({"input": {"messages": [{"role": "ai", "content": "a"}]}}, "got one of another role"),
        ({"input": {"messages": [{"role": "system", "content": "a"}]}}, "got none"),
        ({"input": {"messages": [5]}}, r"messages\[0\]: expected a message, got '5'"),
        ({"input": {"messages": [{"content": "a"}]}}, "one of the roles human, user, .* ''"),
        ({"input": {"messages": [{"role": "human", "content": 5}]}}, r"messages\[0\]: .* `int`"),
        ({"input": {"messages": [{"role": "human", "content": [{"type": "image_url"}]}]}},
         r"messages\[0\]\.content\[0\]: expected a block of text, got '{\"type\":\"image_url\"}'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(body, said):
    """And the place is named."""
    with pytest.raises(BadRequest, match=said):
        run_in(**body)


def test_an_input_has_an_end():
    """Neither more messages nor more blocks of one are read than do no harm to other requests."""
    said = MAX_MESSAGES * ["Hello"]
    assert MAX_MESSAGES == len(run_in(input={"messages": said}).said)
    with pytest.raises(BadRequest, match=f"at most {MAX_MESSAGES}, got {MAX_MESSAGES + 1}; leave"):
        run_in(input={"messages": [*said, "Hello"]})
    with pytest.raises(BadRequest, match=rf"messages\[0\]: .* length <= {MAX_MESSAGES}"):
        run_in(input={"messages": [{"role": "user", "content": [*said, "a"]}]})


def test_a_message_is_the_input():
    """In whatever form; function agents get its text, and no more."""
    for messages in (
        "Hello",
        ["Hello"],
        [["user", "Hello"]],
        {"role": "user", "content": "Hello"},
        [{"type": "human", "content": [{"type": "text", "text": "Hello"}], "id": "x"}],
        [HumanMessage("Hello").model_dump()],
        [dumpd(HumanMessage("Hello"))],
    ):
        start = run_in(input={"messages": messages})
        assert ("Hello", None, None) == (start.input, start.said, start.instructions)


def test_what_was_said_before_a_model_is_told_as_well():
    """Tools' answers as text; what the system says are the instructions."""
    call = {"name": "look", "args": {"a": 1}, "id": "c1"}
    messages = [
        LangChainSystemMessage("Be brief.").model_dump(),
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": ["One", {"type": "text", "text": "two"}]},
        AIMessage("Well.", tool_calls=[call]).model_dump(),
        LangChainToolMessage("sunny", tool_call_id="c1", name="look", status="error").model_dump(),
        {"type": "tool", "content": None},
        {"type": "AIMessageChunk", "tool_calls": [{"name": "rest"}],
         "content": [{"type": "thinking"}, {"type": "text", "text": "So."}]},
        HumanMessage("Go on.").model_dump(),
    ]  # fmt: skip
    start = run_in(input={"messages": messages})
    expected = (
        UserMessage("One\ntwo"),
        AssistantMessage("Well.", (ToolCall("c1", "look", '{"a":1}'),)),
        ToolMessage("c1", "look", '"sunny"', is_error=True),
        ToolMessage("", "", '""'),
        AssistantMessage("So.", (ToolCall("", "rest", "{}"),)),
        UserMessage("Go on."),
    )
    assert ("Be brief.\n\nBe kind.", "Go on.", expected) == (
        start.instructions,
        start.input,
        start.said,
    )


def test_an_answer_is_given_by_the_ids_of_interrupts():
    """Which say of which run they are."""
    start = run_in(command={"resume": {"r7:q1": True, "r7:q12": None}})
    assert ("r7", {"q1": True, "q12": None}) == (start.continues, start.answers)
    with pytest.raises(BadRequest, match="for one run, got some for r7, r8"):
        run_in(command={"resume": {"r7:q1": True, "r8:q1": True}})


@pytest.mark.parametrize("value", ["yes", True, None, {}, {"go": True}, {"r7:q1": 1, "go": 2}, [1]])
def test_any_other_answer_is_for_the_only_question(value):
    """Where nothing is asked that is a conflict."""
    start = run_in(command={"resume": value}, input={"messages": "overlooked"})
    assert ({"": value}, False, None) == (start.answers, start.resumes, start.continues)


def test_an_answer_wants_a_thread():
    """A command that says nothing is none."""
    with pytest.raises(BadRequest, match="expected a thread whose run waits"):
        ask("POST", "/runs/wait", {"assistant_id": "main", "command": {"resume": 1}})
    assert "main" == run_in(command={}).agent


def watched(query=None, path=f"{IN_THREAD}/<run_id>/stream", **headers):
    parameters = {"run_id": "r1"} | ({"thread_id": "t1"} if "thread_id" in path else {})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return ask("GET", path, query=query, headers=named, **parameters)


@pytest.mark.parametrize(
    ("query", "last", "after", "modes"),
    [
        ({}, None, from_now_on, ALL_MODES),
        ({}, "", from_now_on, ALL_MODES),
        ({}, "-1", (0, 0), ALL_MODES),
        ({"last_event_id": "-1"}, None, (0, 0), ALL_MODES),
        ({"last_event_id": "-1"}, "7.1-tv", (7, 1), "tv"),
        ({}, "7", (7, 0), ALL_MODES),
        ({"stream_mode": "", "cancel_on_disconnect": "false"}, "-1", (0, 0), ALL_MODES),
        ({"stream_mode": "values"}, "-1", (0, 0), "v"),
        ({"stream_mode": "values"}, None, from_now_on, "v"),
        ({"stream_mode": '["values","updates"]'}, "7.1-uv", (7, 1), "uv"),
        ({"stream_mode": "values,updates"}, "7.1-v", (6, 0), "uv"),
        ({"stream_mode": "values,updates"}, "7-v", (7, 0), "uv"),
        ({"stream_mode": "values"}, "7.1", (7, 1), "v"),
    ],
)
def test_who_comes_back_says_what_was_seen(query, last, after, modes):
    """And in which modes, unless it wants others; then an event may be shown again."""
    headers = {} if last is None else {"last_event_id": last}
    watch = watched(query, **headers)
    assert (after, modes, True, None) == (
        watch.after,
        watch.options,
        watch.goes_on,
        watch.on_disconnect,
    )


def test_who_watches_is_told_where_to_come_back():
    """To the same run, in the same modes, with the same wish."""
    watch = watched({"stream_mode": "values", "cancel_on_disconnect": "true"})
    assert "cancel" == watch.on_disconnect
    place = "/threads/t1/runs/r1"
    assert {
        "Content-Location": place,
        "Location": f"{place}/stream?last_event_id=-1&stream_mode=values&cancel_on_disconnect=1",
    } == dict(watch.framing.headers)
    assert "Location" in watched().framing.headers
    alone = watched({}, "/runs/<run_id>/stream")
    assert (None, {}) == (alone.thread_id, dict(alone.framing.headers))
    expected = {"Content-Location": place, "Location": f"{place}/stream?last_event_id=-1"}
    assert expected == locate("/langgraph", "r1", "t1")


@pytest.mark.parametrize("last", ["x", "-2", "7.0", "1700000000000-0", "7-vt", "7-x", "7.1.1-v"])
def test_an_id_that_is_none_of_ours_is_refused(last):
    """Also one of another server."""
    with pytest.raises(BadRequest, match="Last-Event-ID: expected an id of one of the run's"):
        watched({}, last_event_id=last)


def test_the_other_requests_about_a_run():
    """Show it, wait for it, cancel it, and keep nothing of it."""
    named = {"thread_id": "t1", "run_id": "r1"}
    path = f"{IN_THREAD}/<run_id>"
    assert Show(**named, reply=show_run) == ask("GET", path, **named)
    join = Show(**named, waits=True, reply=ReplyWithHistory(show_values))
    assert join == ask("GET", f"{path}/join", **named)
    query = {"cancel_on_disconnect": "1"}
    assert "cancel" == ask("GET", f"{path}/join", query=query, **named).on_disconnect

    def cancelled(**query):
        return ask("POST", f"{path}/cancel", query=query, **named)

    assert Cancel(**named, waits=False, reply=show_accepted) == cancelled()
    cancel = Cancel(**named, reply=ReplyWithHistory(show_cancelled))
    assert cancel == cancelled(wait="1", action="interrupt")
    forget = Cancel(**named, forgets=True, reply=show_accepted)
    assert forget == cancelled(wait="0", action="rollback")
    with pytest.raises(BadRequest, match="action: expected 'interrupt' or 'rollback', got 'x'"):
        cancelled(action="x")


def test_the_requests_about_threads():
    """They make room for others when nothing goes on in them."""
    expected = OpenThread(
        thread_id="t1", metadata={"a": 1}, is_shared=True, lasts=False, reply=show_thread
    )
    body = {"thread_id": "t1", "metadata": {"a": 1}, "if_exists": "do_nothing", "ttl": 5}
    assert expected == ask("POST", "/threads", body)
    assert not ask("POST", "/threads", {"if_exists": "raise"}).is_shared
    with pytest.raises(NotSupported, match="supersteps: not available here: a thread begins empty"):
        ask("POST", "/threads", {"supersteps": [{}]})
    for method, path, reply in (
        ("GET", "/threads/<thread_id>", show_whole_thread),
        ("GET", "/threads/<thread_id>/state", show_state),
        ("POST", "/threads/<thread_id>/history", show_history),
    ):
        assert reply == ask(method, path, thread_id="t1").conversation_reply
    closed = ask("DELETE", "/threads/<thread_id>", thread_id="t1")
    assert (204, b"") == ((reply := closed.reply(thread_of(), [])).status, reply.body)


def test_modes_and_messages_are_read_by_themselves():
    """What others may build on."""
    assert ("v", "v", "c") == (read_modes(None), read_modes([]), read_modes("custom"))
    assert (None, (), "Hi") == read_messages("Hi")
    assert isinstance(watched(), Watch)
    assert {"messages": []} == json.loads(Graph().state())


# Over sockets -------------------------------------------------------------------------------------


@asynccontextmanager
async def site(*agents):
    """A server, and what speaks to it below its mount, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, LANGGRAPH)) as server,
            httpx2.AsyncClient(base_url=server.urls[0]) as http,
        ):
            yield server, http


def model(*script, **settings):
    """A provider that says what a script says, and an agent of it."""
    provider = ScriptedProvider(script)
    return provider, Agent.of_model("main", "scripted:m", provider=provider, **settings)


def wish(**body):
    return {"assistant_id": "main", "input": {"messages": "Hello"}, **body}


async def ask_for_colour(run, _input):
    """An agent that asks, and says what it was told."""
    run.text(f"It is {await run.ask('Which one?')}.")


async def ask_for_two(run, _input):
    """An agent that asks two things side by side, and says what it was told."""
    told = {}

    async def ask(name, question):
        told[name] = await run.ask(question)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "color", "Which one?")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask, "number", "How many?")
    run.text(f"{told['number']} of {told['color']}.")


def seen_in(response):
    """The events of a stream."""
    assert (200, "text/event-stream; charset=utf-8") == (
        response.status_code,
        response.headers["content-type"],
    )
    return [(f.event, json.loads(f.data), f.id) for f in Decoder().feed(response.content)]


async def test_a_run_is_streamed():
    """The response says where the run is, below the address that the client was given."""
    _, agent = model(say(TEXT))
    async with site(agent) as (server, http):
        response = await http.post("/langgraph/runs/stream", json=wish(stream_mode="values"))
        (run,) = server.runs
        place = f"/threads/{run.id}/runs/{run.id}"
        assert place == response.headers["content-location"]
        again = await http.get(f"/langgraph{response.headers['location']}&stream_mode=values")
        assert place == again.headers["content-location"]
    seen = seen_in(response)
    assert ["metadata", "values", "values", "end"] == [event for event, _data, _id in seen]
    assert seen == seen_in(again)
    assert TEXT == seen[-2][1]["messages"][-1]["content"]


async def test_who_comes_back_to_an_end_finds_a_stream():
    """For the Python client makes nothing of any other answer."""
    async with site(Agent("main", ask_for_colour)) as (_server, http):
        first = await http.post("/langgraph/runs/stream", json=wish(stream_mode="values"))
        place = f"/langgraph{first.headers['content-location']}"
        *_, (event, data, last_id) = seen_in(first)
        assert ("end", "interrupted") == (event, data["status"])
        for status in ("interrupted", "success"):
            headers = {"Last-Event-ID": last_id}
            assert [] == seen_in(await http.get(f"{place}/stream", headers=headers))
            *_, (event, data, _id) = seen_in(await http.get(f"{place}/stream"))
            assert ("end", status) == (event, data["status"])
            if status == "interrupted":
                body = wish(command={"resume": "blue"}, stream_mode="values")
                thread = place.partition("/runs/")[0]
                second = await http.post(f"{thread}/runs/stream", json=body)
                *_, (_event, _data, last_id) = seen_in(second)
        whole = await http.get(
            f"{place}/stream?stream_mode=values", headers={"Last-Event-ID": "-1"}
        )
    assert seen_in(first) + seen_in(second) == seen_in(whole)


async def test_an_answer_begins_nothing():
    """Where nothing is asked; the native protocol sees one run, all of it."""
    async with site(Agent("main", ask_for_colour)) as (server, http):
        asked = await http.post("/langgraph/runs/wait", json=wish())
        (interrupt,) = asked.json()["__interrupt__"]
        (run,) = server.runs
        path = f"/langgraph/threads/{run.id}/runs/wait"
        for resume, status in [
            ({f"{'0' * 32}:q1": "x"}, 404),
            ({interrupt["id"]: "blue"}, 200),
            ({interrupt["id"]: "red"}, 409),
            ("red", 409),
        ]:
            response = await http.post(path, json=wish(command={"resume": resume}))
            assert (resume, status) == (resume, response.status_code)
        assert [run] == list(server.runs)
        native = await http.get(f"/runs/{run.id}/events?dialect=langgraph")
    ends = [data["status"] for event, data, _id in seen_in(native) if event == "end"]
    assert ["interrupted", "success"] == ends


async def test_a_conversation_may_be_large():
    """More than a request of other protocols may bring."""
    provider, agent = model(say(TEXT))
    large = "ö" * 1_000_000
    messages = [["user", large], ["ai", "I see."], ["user", "Well?"]]
    async with site(agent) as (_server, http):
        response = await http.post("/langgraph/runs/wait", json=wish(input={"messages": messages}))
    assert TEXT == response.json()["messages"][-1]["content"]
    assert [large, "I see.", "Well?"] == [each.text for each in provider.prompts[0].messages]


async def test_a_second_turn_has_the_first_one_in_its_state():
    """In a stream, behind a place in it, and where it was waited for; in order, and once."""
    _, agent = model(say("One."), say("Two."))
    path = "/langgraph/threads/t1"
    expected = [
        ("human", "Hello"), ("ai", "One."), ("ai", "Well."), ("human", "More!"), ("ai", "Two."),
    ]  # fmt: skip
    async with site(agent) as (_server, http):
        await http.post(f"{path}/runs/wait", json=wish(if_not_exists="create"))
        more = {"messages": [["ai", "Well."], ["user", "More!"]]}
        body = wish(input=more, stream_mode=["values", "messages-tuple"])
        second = await http.post(f"{path}/runs/stream", json=body)
        seen = seen_in(second)
        states = [data for event, data, _id in seen if event == "values"]
        assert [expected[:4], expected] == [
            [(each["type"], each["content"]) for each in state["messages"]] for state in states
        ]
        assert 5 == len({each["id"] for each in states[1]["messages"]})
        (_, _, first_id), *rest = seen
        place = f"/langgraph{second.headers['location']}"
        again = await http.get(place, headers={"Last-Event-ID": first_id})
        assert rest == seen_in(again)
        for known in (
            (await http.get(f"/langgraph{second.headers['content-location']}/join")).json(),
            (await http.get(f"{path}/state")).json()["values"],
            (await http.get(path)).json()["values"],
        ):
            assert states[1] == known


async def test_who_is_cut_off_while_it_waits_finds_the_answer_again():
    """Where the response says, below the address that the client was given."""
    _, agent = model(say(TEXT))
    async with site(agent) as (_server, http):
        waited = await http.post("/langgraph/runs/wait", json=wish())
        joined = await http.get(f"/langgraph{waited.headers['location']}")
    assert (200, waited.json()) == (joined.status_code, joined.json())
    assert waited.headers["location"] == joined.headers["location"]


async def test_two_questions_are_answered_at_once():
    """A stream ends at the first one; the state has both, and so has whoever waits."""
    async with site(Agent("main", ask_for_two)) as (server, http):
        first = await http.post("/langgraph/runs/stream", json=wish(stream_mode="values"))
        *_, (_event, state, _id), _end = seen_in(first)
        assert ["Which one?"] == [asked_in(each) for each in state["__interrupt__"]]
        (run,) = server.runs
        await wait_until(lambda: len(run.context.asked) == 2)
        path = f"/langgraph/threads/{run.id}"
        both = (await http.get(f"{path}/state")).json()["interrupts"]
        assert ["Which one?", "How many?"] == [asked_in(each) for each in both]
        ids = [each["id"] for each in both]
        path = f"{path}/runs/stream"
        for resume, said in (("blue", b"by request id"), ({ids[0]: "a", "x": 1}, b"by request id")):
            refused = await http.post(path, json=wish(command={"resume": resume}))
            assert (400, True) == (refused.status_code, said in refused.content)
        answers = dict(zip(ids, ("blue", "3"), strict=True))
        last = await http.post(path, json=wish(command={"resume": answers}, stream_mode="values"))
    names = [event for event, _data, _id in seen_in(last)]
    assert ("metadata", ["end"]) == (names[0], [name for name in names if name == "end"])
    assert "3 of blue." == seen_in(last)[-2][1]["messages"][-1]["content"]


def asked_in(interrupt):
    (question,) = interrupt["value"]["questions"]
    return question["prompt"]


async def test_a_thread_may_be_called_anything_that_fits_into_a_path():
    """What the headers say leads back to its run all the same."""
    _, agent = model(say(TEXT))
    async with site(agent) as (_server, http):
        path = f"/langgraph/threads/{quote('ü ?%#', safe='')}/runs"
        body = wish(if_not_exists="create", stream_mode="values")
        seen = await http.post(f"{path}/stream", json=body)
        again = await http.get(f"/langgraph{seen.headers['location']}")
        joined = await http.get(f"/langgraph{seen.headers['content-location']}/join")
        assert seen_in(seen) == seen_in(again)
        assert TEXT == joined.json()["messages"][-1]["content"]
        assert joined.json() == (await http.get(f"/langgraph{joined.headers['location']}")).json()


async def test_a_run_is_of_its_thread():
    """In another one there is no such run."""
    async with site(Agent("main", ask_for_colour)) as (server, http):
        await http.post("/langgraph/runs/wait", json=wish())
        (run,) = server.runs
        await http.post("/langgraph/threads", json={"thread_id": "other"})
        for method, path in (
            ("GET", ""),
            ("GET", "/stream"),
            ("GET", "/join"),
            ("POST", "/cancel"),
        ):
            other = f"/langgraph/threads/other/runs/{run.id}{path}"
            assert 404 == (await http.request(method, other)).status_code
        assert "waiting" == run.state


async def test_a_cancelled_run_is_gone_or_forgotten():
    """At once, or when the answer comes; what is forgotten was never there."""
    async with site(Agent("main", ask_for_colour)) as (server, http):
        await http.post("/langgraph/runs/wait", json=wish())
        (run,) = server.runs
        cancel = f"/langgraph/threads/{run.id}/runs/{run.id}/cancel"
        gone = await http.post(f"{cancel}?wait=1")
        assert (200, "cancelled") == (gone.status_code, gone.json()["__error__"]["error"])
        assert (202, {}) == ((again := await http.post(cancel)).status_code, again.json())
        assert 202 == (await http.post(f"{cancel}?action=rollback")).status_code
        assert 404 == (await http.post(cancel)).status_code
    assert [] == list(server.runs)


async def test_a_thread_that_nobody_has_opened_may_be_begun():
    """Where the request says so; a deleted one is gone with its runs."""
    _, agent = model(say("One."), say("Two."))
    path = "/langgraph/threads/t1"
    async with site(agent) as (_server, http):
        assert 404 == (await http.post(f"{path}/runs", json=wish())).status_code
        response = await http.post(f"{path}/runs/wait", json=wish(if_not_exists="create"))
        assert "One." == response.json()["messages"][-1]["content"]
        assert 200 == (await http.post(f"{path}/runs/wait", json=wish())).status_code
        state = (await http.get(f"{path}/state")).json()
        said = [message["content"] for message in state["values"]["messages"]]
        assert ["Hello", "One.", "Hello", "Two."] == said
        assert (204, b"") == ((gone := await http.delete(path)).status_code, gone.content)
        assert 404 == (await http.get(path)).status_code


def test_metadata_that_nobody_can_compare_are_not_equal():
    """Nested too deeply for Python to say."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    other: list[Any] = []
    for _ in range(100_000):
        other = [other]
    assert not _has({"x": deep}, {"x": other})
    while deep or other:  # or taking them apart would be too deep as well
        deep, other = deep[0] if deep else [], other[0] if other else []


def test_a_thread_s_id_fits_into_a_path():
    """As everywhere."""
    with pytest.raises(BadRequest, match="thread_id: expected 1 to 200 printable characters"):
        ask("POST", IN_THREAD, {"assistant_id": "main"}, thread_id="x" * 201)
