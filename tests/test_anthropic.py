"""Anthropic's Messages API: what is asked, and what its frames mean, however they are cut."""

import copy
import json
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st
from normalizing import however_cut, play

from agentsse.errors import ProviderError
from agentsse.events import (
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    ToolFinished,
    ToolStarted,
    Usage,
    decode_event,
    encode_event,
)
from agentsse.messages import (
    AssistantMessage,
    Echo,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.providers import Finish, HttpProvider, Prompt
from agentsse.providers.anthropic import MAX_TOKENS, AnthropicApi, AnthropicNormalizer

API = AnthropicApi(key="k-123")
ASKED = UserMessage("Which one is open?")
LOOK = ToolCall("toolu_1", "look", '{"at": "door"}')
LOOK_BLOCK = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "door"}}
THOUGHT = {"type": "thinking", "thinking": "Doors first.", "signature": "c2ln"}
HIDDEN = {"type": "redacted_thinking", "data": "ZW5jcnlwdGVk"}


# What is asked ------------------------------------------------------------------------------------


def asked(*messages, api=API, tools=()):
    return api.request(Prompt("claude-x", messages, tools)).body


def turns(*messages):
    return [(turn["role"], turn["content"]) for turn in asked(*messages)["messages"]]


def text(said):
    return {"type": "text", "text": said}


def test_a_request_says_who_asks_in_which_version():
    """A POST to /v1/messages, with the key and the version in headers of their own."""
    request = AnthropicApi(base_url="http://127.0.0.1:9/", key="k").request(Prompt("m", (ASKED,)))

    assert "http://127.0.0.1:9/v1/messages" == request.url
    assert {"x-api-key": "k", "anthropic-version": "2023-06-01"} == request.headers
    assert {
        "model": "m",
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "messages": [{"role": "user", "content": [text("Which one is open?")]}],
    } == request.body


def test_without_a_key_none_is_sent():
    """A server that asks for no key is sent none; the public one is the default."""
    request = AnthropicApi().request(Prompt("m", (ASKED,)))

    assert "https://api.anthropic.com/v1/messages" == request.url
    assert {"anthropic-version": "2023-06-01"} == request.headers


def test_the_key_is_not_shown():
    """Whoever prints the API does not print its key."""
    assert "k-123" not in repr(API)


def test_options_count_over_what_is_ours():
    """Options are fields of the body; also of those that would be there anyway."""
    api = AnthropicApi(options={"max_tokens": 9, "thinking": {"type": "adaptive"}})

    body = asked(ASKED, api=api)

    assert (9, {"type": "adaptive"}) == (body["max_tokens"], body["thinking"])


def test_a_whole_conversation_is_written():
    """Instructions stand beside the turns, calls in the assistant's, results in the user's."""
    body = asked(
        SystemMessage("Be brief."),
        ASKED,
        AssistantMessage("I look.", (LOOK, ToolCall("toolu_2", "knock", ""))),
        ToolMessage("toolu_1", "look", '{"open": true}'),
        ToolMessage("toolu_2", "knock", "nobody there", is_error=True),
        AssistantMessage("The door."),
        SystemMessage("Be kind."),
        UserMessage("Thanks."),
        tools=(ToolSpec("look", "Looks.", {"type": "object", "properties": {}}),),
    )

    assert "Be brief.\n\nBe kind." == body["system"]
    assert [
        {
            "name": "look",
            "description": "Looks.",
            "input_schema": {"type": "object", "properties": {}},
        }
    ] == body["tools"]
    assert [
        {"role": "user", "content": [text("Which one is open?")]},
        {
            "role": "assistant",
            "content": [
                text("I look."),
                LOOK_BLOCK,
                {"type": "tool_use", "id": "toolu_2", "name": "knock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": '{"open": true}'},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "content": "nobody there",
                    "is_error": True,
                },
            ],
        },
        {"role": "assistant", "content": [text("The door.")]},
        {"role": "user", "content": [text("Thanks.")]},
    ] == body["messages"]


def test_results_stand_before_what_was_said_with_them():
    """All that one side says in a row is one message, and results come first in it."""
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "1"}

    assert [
        ("user", [text("a"), text("b")]),
        ("assistant", [text("c"), LOOK_BLOCK]),
        ("user", [result, text("d"), text("e")]),
    ] == turns(
        UserMessage("a"),
        UserMessage("b"),
        AssistantMessage("c"),
        AssistantMessage("", (LOOK,)),
        UserMessage("d"),
        ToolMessage("toolu_1", "look", "1"),
        UserMessage("e"),
    )


def test_what_is_empty_is_left_out():
    """The API refuses text that shows nothing, and messages without content."""
    body = asked(SystemMessage(" \n"), UserMessage("a"), AssistantMessage("\n"), UserMessage(" "))

    assert [{"role": "user", "content": [text("a")]}] == body["messages"]
    assert "system" not in body


def test_a_result_may_be_empty():
    """A tool that said nothing has answered all the same."""
    assert [("user", [{"type": "tool_result", "tool_use_id": "toolu_1"}])] == turns(
        ToolMessage("toolu_1", "look", "")
    )


@pytest.mark.parametrize("written", ['{"at": "do', "[1]", '"door"'])
def test_arguments_that_are_no_object_go_back_as_they_were(written):
    """The API takes objects only; the model shall see what it wrote."""
    [(_, [block])] = turns(AssistantMessage("", (ToolCall("t", "look", written),)))

    assert {"_raw": written} == block["input"]


def test_call_ids_of_other_providers_are_made_to_fit():
    """The API refuses most punctuation in ids; a call and its result keep the same one."""
    calls = (ToolCall("look:0", "look", "{}"), ToolCall("look.0", "look", "{}"))

    [(_, said), (_, results)] = turns(
        AssistantMessage("", calls), *(ToolMessage(c.call_id, c.name, "1") for c in calls)
    )

    assert ["look_3a0", "look_2e0"] == [block["id"] for block in said]
    assert ["look_3a0", "look_2e0"] == [block["tool_use_id"] for block in results]


def test_long_call_ids_are_cut_alike():
    """A call and its result still belong together; ids that differ only at their end differ."""
    long = ["*" * 1_000_000 + end for end in ("1", "2", "1")]
    made = [ToolCall(call_id, "look", "{}") for call_id in long]

    [(_, said), (_, results)] = turns(
        AssistantMessage("", tuple(made)), *(ToolMessage(i, "look", "") for i in long)
    )

    ids = [block["id"] for block in said]
    assert ids == [block["tool_use_id"] for block in results]
    assert ids[0] == ids[2] != ids[1]
    assert 1000 > max(map(len, ids))


def test_many_results_in_a_row_are_one_turn():
    """However many they are, results stand before what was said among them."""
    count = 20_000
    talk = [m for n in range(count) for m in (UserMessage("Hi."), ToolMessage(f"t{n}", "look", ""))]

    [(_, content)] = turns(*talk)

    results = [{"type": "tool_result", "tool_use_id": f"t{n}"} for n in range(count)]
    assert [*results, *[text("Hi.")] * count] == content


def test_an_echo_goes_back_verbatim():
    """Signed reasoning is sent back unchanged, in front of the call that came of it."""
    blocks = [THOUGHT, HIDDEN, text("I look."), LOOK_BLOCK]
    said = AssistantMessage("I look.", (LOOK,), Echo("anthropic", blocks))

    assert [("user", [text("a")]), ("assistant", blocks)] == turns(UserMessage("a"), said)


def test_the_echo_of_another_provider_is_none():
    """What another provider wants back is nothing to this one."""
    said = AssistantMessage("I look.", (LOOK,), Echo("openai_responses", [{"type": "reasoning"}]))

    assert [("assistant", [text("I look."), LOOK_BLOCK])] == turns(said)


def test_an_echo_that_is_no_list_is_none():
    """What is nested too deeply to be read back is text; the message is built anew."""
    assert [("assistant", [text("a")])] == turns(AssistantMessage("a", (), Echo("anthropic", "[[")))


def test_an_echo_loses_what_the_api_would_refuse():
    """Answers may hold empty text, and end in the middle of a thought; requests may not."""
    cut = Echo("anthropic", [text(""), THOUGHT, text("a"), text(" "), HIDDEN, THOUGHT])
    thought = Echo("anthropic", [THOUGHT])

    assert [("assistant", [THOUGHT, text("a")])] == turns(AssistantMessage("a", (), cut))
    assert [("user", [text("a"), text("b")])] == turns(
        UserMessage("a"), AssistantMessage("", (), thought), UserMessage("b")
    )


# What is answered ---------------------------------------------------------------------------------


def sse(*frames):
    return b"".join(
        f"event: {frame['type']}\ndata: {json.dumps(frame)}\n\n".encode() for frame in frames
    )


def block(index, start, *deltas, is_stopped=True):
    """A content block's frames."""
    stop = [{"type": "content_block_stop", "index": index}] if is_stopped else []
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *(delta(index, **fields) for fields in deltas),
        *stop,
    ]


def delta(index, **fields):
    return {"type": "content_block_delta", "index": index, "delta": fields}


def words(*pieces):
    return [{"type": "text_delta", "text": piece} for piece in pieces]


def thoughts(*pieces, signature="c2ln"):
    signed = [{"type": "signature_delta", "signature": signature}] if signature else []
    return [{"type": "thinking_delta", "thinking": piece} for piece in pieces] + signed


def pieces(*written):
    return [{"type": "input_json_delta", "partial_json": piece} for piece in written]


START = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 20, "output_tokens": 1},
    },
}
PING = {"type": "ping"}
STOP = {"type": "message_stop"}
TEXT = {"type": "text", "text": ""}
THINKING = {"type": "thinking", "thinking": "", "signature": ""}
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


def ended(reason="end_turn", **usage):
    return {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": None},
        "usage": {"output_tokens": 7, **usage},
    }


def tool_use(call_id="toolu_1", name="look", **more):
    return {"type": "tool_use", "id": call_id, "name": name, "input": {}, **more}


make = partial(AnthropicNormalizer, "m1")
USAGE = Usage(input_tokens=20, output_tokens=7)


def read(*frames, every=1):
    """What whole frames produce, however they are cut; they must not be an error."""
    produced, error = however_cut(make, sse(*frames), every=every)
    assert error is None
    return produced


def failed(*frames):
    produced, error = however_cut(make, sse(*frames))
    assert error is not None
    return produced, error


def part(number, kind, *said, **call):
    """The events of a part that was said in these pieces."""
    part_id = f"m1p{number}"
    return [
        PartStarted(part_id=part_id, kind=kind, **call),
        *(PartDelta(part_id=part_id, kind=kind, delta=piece) for piece in said),
        PartFinished(part_id=part_id, kind=kind, text="".join(said), **call),
    ]


def called(number, *said, call_id="toolu_1", name="look"):
    return part(number, "tool_call", *said, name=name, call_id=call_id)


def plain(events):
    """Provider events as plain values: what was handed on."""
    return [json.loads(bytes(e.raw)) for e in events if isinstance(e, ProviderEvent)]


def tools(events):
    """Tool events as plain values."""
    told = []
    for event in events:
        match event:
            case ToolStarted(call_id=call_id, name=name, arguments=arguments):
                told.append(("started", call_id, name, json.loads(bytes(arguments))))
            case ToolFinished(call_id=call_id, name=name, result=result):
                value = json.loads(bytes(result))
                told.append(("finished", call_id, name, value, event.is_error, event.source))
            case _:
                pass
    return told


def test_text_comes_in_pieces():
    """Each delta is an increment; pings show nothing."""
    produced = read(START, *block(0, TEXT, *words("Hel", "lo")), PING, ended(), STOP)

    assert [*part(1, "text", "Hel", "lo"), Finish("stop", USAGE)] == produced


def test_a_block_may_begin_with_text():
    """What a block's start holds was said as well."""
    produced = read(START, *block(0, text("Hel"), *words("lo")), ended(), STOP)

    assert [*part(1, "text", "Hel", "lo"), Finish("stop", USAGE)] == produced


def test_reasoning_is_shown_and_echoed_with_its_signature():
    """Thinking becomes a reasoning part, and all blocks go into the echo, complete."""
    produced = read(
        START,
        *block(0, THINKING, *thoughts("Doors ", "first.")),
        *block(1, TEXT, *words("I look.")),
        *block(2, tool_use(caller={"type": "direct"}), *pieces("", '{"at": ', '"door"}')),
        ended("tool_use"),
        STOP,
    )

    echo = Echo(
        "anthropic", [THOUGHT, text("I look."), LOOK_BLOCK | {"caller": {"type": "direct"}}]
    )
    assert [
        *part(1, "reasoning", "Doors ", "first."),
        *part(2, "text", "I look."),
        *called(3, '{"at": ', '"door"}'),
        Finish("tool_calls", USAGE, echo),
    ] == produced


def test_an_echo_that_was_made_is_sent_back():
    """What comes out of one call goes into the next one, block by block."""
    blocks = [THOUGHT, HIDDEN, text("I look."), LOOK_BLOCK]
    produced, error = play(
        make,
        [
            sse(
                *block(0, THOUGHT | {"thinking": "Doors "}, *thoughts("first.", signature="")),
                *block(1, HIDDEN),
                *block(2, TEXT, *words("I look.")),
                *block(3, tool_use(), *pieces('{"at": "door"}')),
                ended("tool_use"),
            )
        ],
    )

    assert error is None
    said = AssistantMessage("I look.", (LOOK,), produced[-1].echo)
    assert [("assistant", blocks)] == turns(said)


def test_redacted_reasoning_is_only_echoed():
    """Nothing of what is encrypted is shown; it goes back as it came."""
    produced = read(START, *block(0, HIDDEN), *block(1, TEXT, *words("Yes.")), ended(), STOP)

    echo = Echo("anthropic", [HIDDEN, text("Yes.")])
    assert [*part(1, "text", "Yes."), Finish("stop", USAGE, echo)] == produced


def test_reasoning_that_is_not_shown_is_echoed():
    """A thought of which the API shows the signature only is a thought."""
    produced = read(*block(0, THINKING, *thoughts()), *block(1, TEXT, *words("Yes.")), ended())

    assert part(1, "text", "Yes.") == produced[:-1]
    assert [THOUGHT | {"thinking": ""}, text("Yes.")] == produced[-1].echo.value


def test_without_reasoning_there_is_no_echo():
    """Text and calls can be written anew by anyone."""
    produced = read(START, *block(0, TEXT, *words("a")), *block(1, tool_use()), ended(), STOP)

    assert produced[-1].echo is None


def test_calls_side_by_side():
    """Two calls in one answer are two parts with arguments of their own."""
    produced = read(
        START,
        *block(0, tool_use(), *pieces('{"at":', '"door"}')),
        *block(1, tool_use("toolu_2", "knock"), *pieces('{"times":2}')),
        ended("tool_use"),
        STOP,
    )

    assert [
        *called(1, '{"at":', '"door"}'),
        *called(2, '{"times":2}', call_id="toolu_2", name="knock"),
        Finish("tool_calls", USAGE),
    ] == produced


def test_blocks_are_told_apart_by_their_index():
    """Frames of several blocks may be interleaved, and stop in any order."""
    first, second = tool_use(), tool_use("toolu_2", "knock")
    produced = read(
        *block(1, first, is_stopped=False),
        *block(2, second, is_stopped=False),
        *block(0, TEXT, is_stopped=False),
        delta(2, **pieces('{"times"')[0]),
        delta(1, **pieces('{"at":')[0]),
        delta(0, **words("a")[0]),
        delta(2, **pieces(":2}")[0]),
        delta(1, **pieces('"door"}')[0]),
        {"type": "content_block_stop", "index": 2},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_stop", "index": 1},
        ended("tool_use"),
    )

    finished = [e for e in produced if isinstance(e, PartFinished)]
    assert [('{"times":2}', "toolu_2"), ("a", None), ('{"at":"door"}', "toolu_1")] == [
        (e.text, e.call_id) for e in finished
    ]


@pytest.mark.parametrize(
    ("given", "deltas", "expected"),
    [
        ({"at": "door"}, [], '{"at":"door"}'),
        ({}, [], "{}"),
        (None, [], "{}"),
        ({}, [""], "{}"),
        (None, ['{"at":', '"door"}'], '{"at":"door"}'),
        ({}, ['{"at":', '"door"}'], '{"at":"door"}'),
        ({"at": "wall"}, ['{"at":', '"door"}'], '{"at":"door"}'),
        ({"at": "door"}, ["", ',"or":"wall"}'], ',"or":"wall"}'),
    ],
)
def test_deltas_of_arguments_win_over_the_start(given, deltas, expected):
    """What the start holds counts only if no delta came; nothing is joined, nothing repaired."""
    produced = read(*block(0, tool_use(input=given), *pieces(*deltas)), ended("tool_use"), STOP)

    said = [piece for piece in deltas if piece] or [expected]
    usage = Usage(output_tokens=7)
    assert [*called(1, *said), Finish("tool_calls", usage)] == produced


def test_arguments_without_input_at_the_start():
    """A start that does not mention the input is as good as one with an empty one."""
    start = {"type": "tool_use", "id": "toolu_1", "name": "look"}
    produced = read(*block(0, start, *pieces('{"a":1}')), ended("tool_use"))

    assert called(1, '{"a":1}') == produced[:-1]


def test_broken_arguments_are_echoed_as_an_object():
    """The API takes back objects only; what was no JSON is kept as text in one."""
    produced = read(*block(0, HIDDEN), *block(1, tool_use(), *pieces('{"at"')), ended("tool_use"))

    assert LOOK_BLOCK | {"input": {"_raw": '{"at"'}} == produced[-1].echo.value[1]


def test_call_ids_that_come_twice_are_made_unique():
    """Each call has an id of its own, in the events and in the echo."""
    produced = read(
        *block(0, HIDDEN), *block(1, tool_use()), *block(2, tool_use()), ended("tool_use")
    )

    assert [*called(1, "{}"), *called(2, "{}", call_id="toolu_1-2")] == produced[:-1]
    ids = [value["id"] for value in produced[-1].echo.value[1:]]
    assert ["toolu_1", "toolu_1-2"] == ids


def test_call_ids_that_are_missing_are_made():
    """A call without id and name gets both; the echo agrees with what its result will name."""
    produced = read(*block(0, HIDDEN), *block(1, {"type": "tool_use"}), ended("tool_use"))

    assert called(1, "{}", call_id="m1c1", name="unnamed") == produced[:-1]
    expected = {"type": "tool_use", "id": "m1c1", "name": "unnamed", "input": {}}
    assert expected == produced[-1].echo.value[1]


def test_long_call_ids_are_cut():
    """An id comes from outside: one without measure goes into no event."""
    start = tool_use("c" * 1_000_000)

    events, error = play(make, [sse(*block(0, start), ended("tool_use"), STOP)])

    assert error is None
    assert {200} == {len(e.call_id) for e in events if isinstance(e, PartStarted | PartFinished)}


def test_calls_without_names_are_counted():
    """Too many calls are an error, also where none of them can be told yet."""
    frames = [block(n, tool_use("c", ""), is_stopped=False) for n in range(50_000)]

    produced, error = play(make, [sse(*(one for several in frames for one in several))])

    assert [] == produced
    assert error is not None
    assert "malformed" == error.code
    assert "at most 128 tool calls" in error.message


def test_call_ids_of_compatible_servers_fit_into_an_echo():
    """Results name calls by ids that were made to fit; so does the echo."""
    produced = read(*block(0, HIDDEN), *block(1, tool_use("look:0")), ended("tool_use"))

    [(_, said), (_, results)] = turns(
        AssistantMessage("", (ToolCall("look:0", "look", "{}"),), produced[-1].echo),
        ToolMessage("look:0", "look", "1"),
    )
    assert said[1]["id"] == results[0]["tool_use_id"]


# Reasons and tokens


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("pause_turn", "other"),
        ("compaction", "other"),
    ],
)
def test_reasons(reason, expected):
    """Why the model stopped stands under `delta`; at the top it counts as well."""
    at_top = {"type": "message_delta", "stop_reason": reason, "usage": {"output_tokens": 7}}
    usage = Usage(output_tokens=7)

    assert [Finish(expected, usage)] == read(ended(reason), STOP)
    assert [Finish(expected, usage)] == read(at_top, STOP)


def test_a_call_that_was_cut_off_is_complete_with_what_it_has():
    """At the limit of tokens a call ends where it stands; the reason says so."""
    produced = read(
        START, *block(0, tool_use(), *pieces('{"at":'), is_stopped=False), ended("max_tokens"), STOP
    )

    assert [*called(1, '{"at":'), Finish("length", USAGE)] == produced


def test_a_refusal_is_explained():
    """What the API says about a refusal is handed on, not put into the model's mouth."""
    end = ended("refusal")
    end["delta"]["stop_details"] = {"type": "refusal", "explanation": "No."}

    produced = read(START, *block(0, TEXT, *words("I")), end, STOP)

    assert [end] == plain(produced)
    assert Finish("content_filter", USAGE) == produced[-1]


def test_tokens_are_cumulative():
    """The last word counts; what is not told again stands, and the cache is part of the input."""
    start = copy.deepcopy(START)
    start["message"]["usage"] |= {"cache_creation_input_tokens": 5, "cache_read_input_tokens": 100}
    end = ended(
        output_tokens=70,
        cache_read_input_tokens=300,
        input_tokens=None,
        output_tokens_details={"thinking_tokens": 30},
    )

    assert [
        Finish(
            "stop",
            Usage(
                input_tokens=325,
                output_tokens=70,
                reasoning_tokens=30,
                cache_read_tokens=300,
                cache_write_tokens=5,
            ),
        )
    ] == read(start, ended(None), end, STOP)


def test_an_answer_is_over_at_its_stop():
    """After `message_stop` nothing but an error could follow."""
    machine = make()

    assert [] == list(machine.feed(sse(START, ended())))
    assert not machine.is_over
    assert [] == list(machine.feed(sse(STOP)))
    assert machine.is_over


def test_a_stop_without_reason_is_a_stop():
    """`message_stop` says that the answer is complete, whatever else was left out."""
    produced = read(START, *block(0, TEXT, *words("a")), STOP)

    usage = Usage(input_tokens=20, output_tokens=1)
    assert [*part(1, "text", "a"), Finish("stop", usage)] == produced
    assert "tool_calls" == read(*block(0, tool_use()), STOP)[-1].reason


def test_a_reason_without_stop_is_an_end():
    """Some servers close the connection after the reason; a block may lack its stop too."""
    produced = read(START, *block(0, TEXT, *words("a"), is_stopped=False), ended())

    assert [*part(1, "text", "a"), Finish("stop", USAGE)] == produced


def test_the_last_frame_may_lack_its_blank_line():
    """A stream that was cut behind its last frame has said all."""
    data = sse(START, *block(0, HIDDEN), ended())
    produced, error = however_cut(make, data.rstrip(b"\n"))

    assert error is None
    assert [Finish("stop", USAGE, Echo("anthropic", [HIDDEN]))] == produced


@pytest.mark.parametrize("frames", [[], [START], [START, PING, ended(None)]])
def test_an_end_with_neither_is_an_error(frames):
    """Without reason and stop the answer was cut off."""
    produced, error = failed(*frames)

    assert [] == produced
    assert "incomplete" == error.code


def test_a_cut_in_the_middle_leaves_what_was_said():
    """Text that came before the cut was shown; half a frame adds nothing to it, nor ends it."""
    data = sse(START, *block(0, TEXT, *words("Hel", "lo")))
    produced, error = however_cut(make, data[: data.index(b'"lo"')])

    assert part(1, "text", "Hel")[:2] == [e for e in produced if not isinstance(e, ProviderEvent)]
    assert "incomplete" == error.code


# Errors


def test_an_error_may_come_first():
    """An overloaded API says so in its first frame."""
    produced, error = failed(OVERLOADED)

    assert [] == produced
    assert "overloaded" == error.code
    assert "anthropic answered (overloaded_error): Overloaded" == error.message


def test_an_error_may_come_in_the_middle():
    """What came before it was said; the part stays open for whoever ends the run."""
    produced, error = failed(START, *block(0, TEXT, *words("Hel")), OVERLOADED, ended(), STOP)

    assert part(1, "text", "Hel") == produced
    assert "overloaded" == error.code


@pytest.mark.parametrize("frames", [[ended()], [ended(), STOP]])
def test_an_error_beats_the_end_before_it(frames):
    """There is no finish until the stream has ended; so an error is still an error."""
    produced, error = failed(START, *frames, OVERLOADED)

    assert [] == produced
    assert "overloaded" == error.code


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (
            b'event: error\ndata: {"error": {"type": "rate_limit_error", "message": "Slow."}}\n\n',
            "rate_limit",
            "anthropic answered (rate_limit_error): Slow.",
        ),
        (
            b'event: error\ndata: {"type": "api_error", "message": "Oh."}\n\n',
            "server_error",
            "anthropic answered (api_error): Oh.",
        ),
        (
            b'data: {"type": "error", "error": "gone"}\n\n',
            "provider_error",
            "anthropic answered: gone",
        ),
        (
            b'data: {"error": {"message": "upstream timed out"}}\n\n',
            "timeout",
            "anthropic answered: upstream timed out",
        ),
    ],
)
def test_errors_of_other_shapes_are_errors(data, code, message):
    """Gateways leave out the type, or the error around it, or the event's name."""
    produced, error = however_cut(make, data)

    assert [] == produced
    assert (code, message) == (error.code, error.message)


# Tools that run at the provider

SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}
FOUND = [{"type": "web_search_result", "url": "https://example.org", "encrypted_content": "eA=="}]


def test_a_search_at_the_provider_is_a_tool():
    """It starts when its arguments are complete, and finishes with what was found."""
    result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": FOUND}
    produced = read(
        START,
        *block(0, SEARCH, *pieces("", '{"query":', ' "doors"}')),
        *block(1, result),
        *block(2, TEXT, *words("Open.")),
        ended(),
        STOP,
    )

    assert [
        ("started", "srvtoolu_1", "web_search", {"query": "doors"}),
        ("finished", "srvtoolu_1", "web_search", FOUND, False, "provider"),
    ] == tools(produced)
    assert [*part(1, "text", "Open."), Finish("stop", USAGE)] == produced[2:]


def test_a_search_beside_reasoning_is_echoed():
    """What a tool of the provider found goes back with the reasoning around it."""
    result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": FOUND}
    produced = read(
        *block(0, THINKING, *thoughts("a")),
        *block(1, SEARCH, *pieces('{"query": "doors"}')),
        *block(2, result),
        ended(),
    )

    searched = SEARCH | {"input": {"query": "doors"}}
    assert [THOUGHT | {"thinking": "a"}, searched, result] == produced[-1].echo.value


@pytest.mark.parametrize(
    ("content", "is_error"),
    [
        ({"type": "code_execution_result", "stdout": "2\n", "return_code": 0}, False),
        ({"type": "code_execution_tool_result_error", "error_code": "unavailable"}, True),
        (None, False),
        ("text", False),
    ],
)
def test_results_say_whether_they_are_errors(content, is_error):
    """An error of a provider's tool is a result of its own type."""
    used = SEARCH | {"name": "code_execution", "input": {"code": "1+1"}}
    result = {"type": "code_execution_tool_result", "tool_use_id": "srvtoolu_1", "content": content}
    produced = read(*block(0, used), *block(1, result), ended(), STOP)

    assert [
        ("started", "srvtoolu_1", "code_execution", {"code": "1+1"}),
        ("finished", "srvtoolu_1", "code_execution", content, is_error, "provider"),
    ] == tools(produced)


@pytest.mark.parametrize("is_error", [False, True])
def test_a_tool_of_an_mcp_server_is_a_tool(is_error):
    """The provider may call MCP servers itself; their results say so."""
    used = {
        "type": "mcp_tool_use",
        "id": "mcptoolu_1",
        "name": "echo",
        "server_name": "example",
        "input": {"value": 1},
    }
    result = {
        "type": "mcp_tool_result",
        "tool_use_id": "mcptoolu_1",
        "is_error": is_error,
        "content": [text("1")],
    }
    produced = read(*block(0, used), *block(1, result), ended(), STOP)

    assert [
        ("started", "mcptoolu_1", "echo", {"value": 1}),
        ("finished", "mcptoolu_1", "echo", [text("1")], is_error, "mcp"),
    ] == tools(produced)


def test_a_result_without_its_call_is_a_tool():
    """After a pause the result comes in the next answer: the tool is named for its type."""
    result = {"type": "web_fetch_tool_result", "tool_use_id": "srvtoolu_0", "content": []}
    produced = read(*block(0, result), ended(), STOP)

    assert [
        ("started", "srvtoolu_0", "web_fetch", {}),
        ("finished", "srvtoolu_0", "web_fetch", [], False, "provider"),
    ] == tools(produced)


def test_tools_of_the_provider_without_ids_are_told_apart():
    """What has no id gets one, each its own; arguments that are no object are shown as they are."""
    nameless = {"type": "server_tool_use"}
    produced = read(
        *block(0, nameless, *pieces("[1]"), is_stopped=False),
        *block(1, nameless, *pieces('{"a"'), is_stopped=False),
        *block(2, {"type": "bash_code_execution_tool_result"}),
        ended("pause_turn"),
        STOP,
    )

    assert [
        ("started", "m1b3", "bash_code_execution", {}),
        ("finished", "m1b3", "bash_code_execution", None, False, "provider"),
        ("started", "m1b1", "unnamed", [1]),
        ("started", "m1b2", "unnamed", '{"a"'),
    ] == tools(produced)


# What is unknown, or broken


CITED = {"type": "web_search_result_location", "url": "https://example.org", "cited_text": "a"}


def test_tools_of_the_provider_without_ids_may_be_many():
    """Each of them gets an id of its own, however many there are."""
    count = 50_000
    frames = [block(0, {"type": "server_tool_use"}) for _ in range(count)]
    data = sse(*(one for several in frames for one in several), ended(), STOP)

    produced, error = play(make, [data])

    assert error is None
    ids = [event.call_id for event in produced if isinstance(event, ToolStarted)]
    assert [f"m1b{n}" for n in range(1, count + 1)] == ids


def test_many_citations_are_echoed():
    """All citations of a block go back with it, in their order."""
    count = 50_000
    cites = [delta(1, type="citations_delta", citation={"n": n}) for n in range(count)]
    frames = [*block(0, THOUGHT), *block(1, TEXT, is_stopped=False), *cites, ended(), STOP]

    produced, error = play(make, [sse(*frames)])

    assert error is None
    assert [{"n": n} for n in range(count)] == produced[-1].echo.value[1]["citations"]


def test_citations_are_handed_on_and_echoed():
    """Nobody here shows them, but the API wants them back with the text."""
    cited = {"type": "citations_delta", "citation": CITED}
    produced = read(*block(0, HIDDEN), *block(1, TEXT, cited, *words("a"), cited), ended(), STOP)

    assert [delta(1, **cited)] * 2 == plain(produced)
    assert [HIDDEN, text("a") | {"citations": [CITED, CITED]}] == produced[-1].echo.value


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "vendor_note", "n": 1},
        {"type": 5},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "container_upload"}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": ""}},
        {"type": "content_block_start", "index": 0},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "vendor_delta"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 5}},
        {"type": "content_block_delta", "index": 0},
    ],
)
def test_what_is_unknown_is_handed_on_once(frame):
    """Frames, blocks and deltas that nobody here knows are never dropped, and never fatal."""
    assert [frame] == plain(read(frame, ended(), STOP))


def test_deltas_that_do_not_fit_their_block_are_handed_on():
    """A block is of one type; what is of another one is nothing of it."""
    strange = [
        delta(0, **words("a")[0]),
        delta(0, **thoughts("a")[0]),
        delta(0, **thoughts()[0]),
        delta(0, type="citations_delta", citation=CITED),
        delta(1, **pieces("{}")[0]),
    ]
    produced = read(
        *block(0, tool_use(), is_stopped=False),
        *block(1, TEXT, is_stopped=False),
        *strange,
        ended(),
        every=7,
    )

    assert strange == plain(produced)


def test_frames_that_are_no_objects_are_handed_on():
    """Text that is no JSON, and JSON that is no object, is for whoever watches."""
    data = b"data: hello\n\ndata: [1]\n\n" + sse(ended(), STOP)
    produced, error = however_cut(make, data)

    assert error is None
    assert ["hello", [1]] == plain(produced)


def test_a_block_may_lack_its_start():
    """The first delta says what it is."""
    produced = read(
        delta(0, **thoughts("a")[0]),
        delta(0, **thoughts()[0]),
        delta(1, **words("b")[0]),
        delta(2, **pieces('{"c":1}')[0]),
        ended(),
    )

    assert [
        *part(1, "reasoning", "a")[:2],
        *part(2, "text", "b")[:2],
        part(1, "reasoning", "a")[2],
        part(2, "text", "b")[2],
        *called(3, '{"c":1}', call_id="m1c3", name="unnamed"),
    ] == produced[:-1]
    call = {"type": "tool_use", "id": "m1c3", "name": "unnamed", "input": {"c": 1}}
    assert [THOUGHT | {"thinking": "a"}, text("b"), call] == produced[-1].echo.value


def test_a_block_may_lack_its_stop():
    """A block ends where another one takes its index; a stop of none is none."""
    produced = read(
        *block(0, TEXT, *words("a"), is_stopped=False),
        *block(0, TEXT, *words("b")),
        {"type": "content_block_stop", "index": 0},
        ended(),
    )

    assert [*part(1, "text", "a"), *part(2, "text", "b")] == produced[:-1]


def test_the_name_of_an_event_stands_in_for_its_type():
    """Some servers leave the type to SSE."""
    data = b'event: message_delta\ndata: {"delta": {"stop_reason": "end_turn"}}\n\n'
    produced, error = however_cut(make, data)

    assert error is None
    assert [Finish("stop")] == produced


def test_bytes_that_are_no_utf8_are_replaced():
    """A broken byte costs a character, not the run."""
    data = sse(*block(0, TEXT, *words("a?b")), ended()).replace(b"a?b", b"a\xffb")
    produced, error = however_cut(make, data)

    assert error is None
    assert part(1, "text", "a\ufffdb") == produced[:-1]


def test_halves_of_a_surrogate_pair_are_joined():
    """A server that cuts between UTF-16 units splits characters; the events hold whole ones."""
    produced = read(
        *block(0, THINKING, *thoughts("a\ud83d", "\ude00b")),
        *block(1, TEXT, *words("\ud83d", "\ude00", "c\ud83d")),
        *block(2, tool_use("t\ud83d", "n\ude00"), *pieces('"\ud83d', '\ude00"')),
        ended(),
    )

    assert [
        *part(1, "reasoning", "a", "\U0001f600b"),
        *part(2, "text", "\U0001f600", "c", "\ufffd"),
        *called(3, '"', '\U0001f600"', call_id="t\ufffd", name="n\ufffd"),
    ] == produced[:-1]
    assert ["a\U0001f600b", "\U0001f600c\ufffd"] == [
        produced[-1].echo.value[0]["thinking"],
        produced[-1].echo.value[1]["text"],
    ]


def test_an_echo_can_always_be_sent():
    """What JSON cannot carry is mended before it is kept."""
    odd = {"type": "redacted_thinking", "data": "\ud83d", "n": float("inf")}
    produced = read(*block(0, odd), *block(1, TEXT, *words("a")), ended())

    expected = {"type": "redacted_thinking", "data": "\ufffd", "n": "inf"}
    assert expected == produced[-1].echo.value[0]


# Anything at all

KNOWN = [
    "message_start", "content_block_start", "content_block_delta", "content_block_stop",
    "message_delta", "message_stop", "ping", "error", "text", "thinking", "redacted_thinking",
    "tool_use", "server_tool_use", "mcp_tool_use", "web_search_tool_result", "mcp_tool_result",
    "text_delta", "input_json_delta", "thinking_delta", "signature_delta", "citations_delta",
    "end_turn", "tool_use",
]  # fmt: skip
FIELDS = [
    "type", "index", "content_block", "delta", "message", "usage", "error", "text", "thinking",
    "signature", "data", "id", "name", "input", "partial_json", "citation", "citations", "content",
    "tool_use_id", "is_error", "stop_reason", "stop_details", "input_tokens", "output_tokens",
    "cache_read_input_tokens", "output_tokens_details",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["\ud83d", "\ude00", "{}", '{"a"', *KNOWN])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=8,
)
INDEX = st.sampled_from([0, 1, 2]) | JSON
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(KNOWN[8:16]) | JSON},
    optional=dict.fromkeys(FIELDS[7:19], JSON),
)
DELTA = st.fixed_dictionaries(
    {"type": st.sampled_from(KNOWN[16:21]) | JSON},
    optional={
        "text": st.text(max_size=3) | JSON,
        "thinking": st.text(max_size=3) | JSON,
        "partial_json": st.text(max_size=3) | JSON,
        "signature": JSON,
        "citation": JSON,
        "stop_reason": st.sampled_from(["end_turn", "tool_use"]) | JSON,
    },
)
FRAME = st.fixed_dictionaries(
    {"type": st.sampled_from(KNOWN[:7]) | st.sampled_from(KNOWN[1:4]) | JSON},
    optional={
        "index": INDEX,
        "content_block": BLOCK | JSON,
        "delta": DELTA | JSON,
        "message": st.fixed_dictionaries({"usage": JSON}) | JSON,
        "usage": JSON,
        "stop_reason": JSON,
    },
)


def unnamed(frames):
    return b"".join(b"data: %b\n\n" % json.dumps(frame).encode() for frame in frames)


def check(produced, error):
    """Parts and tools begin and end once, in order; there is a finish, or an error that says so."""
    started, finished, running, done = {}, set(), set(), set()
    for one in produced[:-1] if error is None else produced:
        assert one == decode_event(encode_event(one))
        match one:
            case PartStarted(part_id=part_id):
                assert part_id not in started
                started[part_id] = ""
            case PartDelta(part_id=part_id, delta=more):
                assert part_id not in finished
                assert more
                started[part_id] += more
            case PartFinished(part_id=part_id, text=said):
                assert part_id not in finished
                assert started[part_id] == said
                finished.add(part_id)
            case ToolStarted(call_id=call_id):
                assert call_id not in running
                running.add(call_id)
            case ToolFinished(call_id=call_id):
                assert call_id in running - done
                done.add(call_id)
            case _:
                assert isinstance(one, ProviderEvent)
    if error is None:
        assert isinstance(produced[-1], Finish)
        assert set(started) == finished
    else:
        assert isinstance(error, ProviderError)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FRAME, max_size=8), st.booleans())
def test_no_frame_breaks_the_machine(frames, is_ended):
    """Whatever stands in whatever field: normal events, or a `ProviderError`; once each."""
    data = unnamed([*frames, ended(), STOP] if is_ended else frames)
    produced, error = play(make, [data])

    check(produced, error)
    half = len(data) // 2
    again = play(make, [data[:half], data[half:]])
    assert (produced, error and error.message) == (again[0], again[1] and again[1].message)
    if error is None:
        said = AssistantMessage("a", (), produced[-1].echo)
        assert encode_event(asked(UserMessage("b"), said))


REAL = [
    START,
    *block(0, THINKING, *thoughts("a", "b")),
    *block(1, HIDDEN),
    *block(2, TEXT, *words("c"), {"type": "citations_delta", "citation": CITED}),
    *block(3, SEARCH, *pieces('{"query":', "1}")),
    *block(4, {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": FOUND}),
    *block(5, tool_use(), *pieces('{"a":', "1}")),
    ended("tool_use"),
    STOP,
]


def places(value, path=()):
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_field_breaks_the_machine(data):
    """A real answer in which any field is replaced by anything, or missing, or moved."""
    frames = copy.deepcopy(REAL)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(list(places(frames))))
        holder: Any = frames
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(JSON)
        else:
            del holder[last]

    check(*play(make, [unnamed(frames)]))


def test_deep_arguments_do_not_break_the_machine():
    """Arguments nested deeper than can be read back are kept as text."""
    deep = "[" * 5_000 + "]" * 5_000
    produced, error = play(
        make,
        [
            sse(
                *block(0, HIDDEN),
                *block(1, tool_use(), *pieces(deep)),
                *block(2, SEARCH, *pieces(deep)),
                ended(),
            )
        ],
    )

    assert error is None
    assert [{"_raw": deep}] * 2 == [value["input"] for value in produced[-1].echo.value[1:]]


# Over a socket


@attrs.frozen
class Listener:
    """The least that a provider may know of a run."""

    window: float = 0.0

    async def sleep_until(self, when):
        """Wait."""
        await trio.sleep_until(when)

    def lull(self):
        """Do nothing."""


@asynccontextmanager
async def answering(answer):
    """A server that answers one request, whatever it is."""
    heard: list[bytes] = []

    async def serve(stream):
        async with stream:
            received = b""
            while b"\r\n\r\n" not in received or not received.endswith(b"}"):
                received += await stream.receive_some()
            heard.append(received)
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, serve, 0, host="127.0.0.1", handler_nursery=nursery)
        )
        yield listeners[0].socket.getsockname()[1], heard
        nursery.cancel_scope.cancel()


async def test_a_call_over_a_socket():
    """The request is HTTP that a server understands, and the bytes of its answer are read."""
    data = sse(START, *block(0, TEXT, *words("Open.")), ended(), STOP)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    with trio.fail_after(5):
        async with answering(head + data) as (port, heard):
            api = AnthropicApi(base_url=f"http://127.0.0.1:{port}", key="k-123")
            provider = HttpProvider("claude", api, key="k-123")
            produced = []
            async with provider.open(Listener()) as connection:
                machine = connection.normalizer("m1")
                async with connection.stream(Prompt("claude-x", (ASKED,))) as chunks:
                    async for chunk in chunks:
                        produced += machine.feed(chunk)
                produced += machine.close()

    assert [*part(1, "text", "Open."), Finish("stop", USAGE)] == produced
    head, _, body = heard[0].partition(b"\r\n\r\n")
    assert b"POST /v1/messages HTTP/1.1" == head.split(b"\r\n")[0]
    assert b"x-api-key: k-123" in head.lower()
    assert asked(ASKED) == json.loads(body)


async def test_a_refused_call_over_a_socket():
    """An error before the stream is the same error, with what the status says."""
    body = json.dumps(
        {"type": "error", "error": {"type": "authentication_error", "message": "k-123 is no key"}}
    ).encode()
    head = b"HTTP/1.1 401 No\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with trio.fail_after(5):
        async with answering(head % len(body) + body) as (port, _):
            api = AnthropicApi(base_url=f"http://127.0.0.1:{port}", key="k-123")
            async with HttpProvider("claude", api, key="k-123").open(Listener()) as connection:
                with pytest.raises(ProviderError) as caught:
                    async with connection.stream(Prompt("claude-x", (ASKED,))):
                        pass

    assert "auth" == caught.value.code
    assert "[redacted] is no key" in caught.value.message
