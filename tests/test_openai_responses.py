"""The Responses API: the words of a call, and every way in which a stream tells its items."""

import itertools
import json

import pytest
from hypothesis import given, settings, strategies as st
from normalizing import however_cut, play

from agentsse.errors import ProviderError
from agentsse.events import (
    AnyEvent,
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    ToolFinished,
    ToolStarted,
    Usage,
    decode_json,
    encode_event,
    encode_json,
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
from agentsse.providers import Api, Finish, Prompt
from agentsse.providers.openai_responses import OpenAIResponsesApi

RS = "response."


# Streams ------------------------------------------------------------------------------------------


def frame(type_, **fields):
    """One event as the API sends it; `response.` is put before names with a dot."""
    name = RS + type_ if "." in type_ or type_ in TERMINAL else type_
    value = {"type": name, "sequence_number": next(NUMBERS), **fields}
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


TERMINAL = ("completed", "failed", "incomplete", "created", "in_progress", "queued")
NUMBERS = itertools.count()
USED = {
    "input_tokens": 37,
    "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 4},
    "output_tokens": 11,
    "output_tokens_details": {"reasoning_tokens": 7},
    "total_tokens": 48,
}
USAGE = Usage(
    input_tokens=37,
    output_tokens=11,
    reasoning_tokens=7,
    cache_read_tokens=16,
    cache_write_tokens=4,
)


def response(*output, status="completed", **fields):
    """A response in full."""
    return {
        "id": "resp_1",
        "object": "response",
        "status": status,
        "error": None,
        "incomplete_details": None,
        "output": list(output),
        "usage": None,
        **fields,
    }


def begun():
    """How every stream begins."""
    start = response(status="in_progress")
    return frame("created", response=start) + frame("in_progress", response=start)


def completed(*output, **fields):
    return frame("completed", response=response(*output, usage=USED, **fields))


def text_part(text, annotations=()):
    return {"type": "output_text", "text": text, "annotations": list(annotations), "logprobs": []}


def message(*parts, id_="msg_1", status="completed"):
    parts = [text_part(part) if isinstance(part, str) else part for part in parts]
    return {
        "id": id_,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": parts,
    }


def reasoning(*summary, id_="rs_1", sealed="gAAAAA=="):
    return {
        "id": id_,
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": text} for text in summary],
        "encrypted_content": sealed,
    }


def call(arguments="{}", *, id_="fc_1", call_id="call_1", name="look", status="completed"):
    return {
        "id": id_,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def added(item, at=0):
    return frame("output_item.added", output_index=at, item=item)


def done(item, at=0):
    return frame("output_item.done", output_index=at, item=item)


def text_events(*deltas, text=None, id_="msg_1", at=0, part=None):
    """A message as it is streamed; `text` is what all of its aggregates say."""
    whole = "".join(deltas) if text is None else text
    where = {"item_id": id_, "output_index": at, "content_index": 0}
    return b"".join(
        (
            added(message(id_=id_, status="in_progress"), at),
            frame("content_part.added", **where, part=text_part("")),
            *(frame("output_text.delta", **where, delta=delta, logprobs=[]) for delta in deltas),
            frame("output_text.done", **where, text=whole, logprobs=[]),
            frame("content_part.done", **where, part=part or text_part(whole)),
            done(message(part or whole, id_=id_), at),
        )
    )


# What comes out -----------------------------------------------------------------------------------


CUTS = 60  # of each stream here; those below are cut at every byte


def api():
    return OpenAIResponsesApi()


def machine():
    return api().normalizer("m1-")


def heard(*frames, cut=True):
    """What a stream says, however it is cut: the events, and the `Finish`."""
    data = b"".join(frames)
    if cut:
        produced, error = however_cut(machine, data, every=len(data) // CUTS + 1)
    else:
        produced, error = play(machine, [data])
    assert error is None
    *events, finish = produced
    assert isinstance(finish, Finish)
    follows_the_rules(events)
    return events, finish


def failed(*frames):
    """What came before the error that ends a stream, and the error."""
    data = b"".join(frames)
    produced, error = however_cut(machine, data, every=len(data) // CUTS + 1)
    assert error is not None
    assert not [one for one in produced if isinstance(one, Finish)]
    follows_the_rules(produced, is_whole=False)
    return produced, error


def follows_the_rules(events, *, is_whole=True):
    """Each part begins and ends once, and is what its deltas are; each tool ends once."""
    parts, ended, tools, over = {}, set(), set(), set()
    call_ids = set()
    for event in events:
        assert isinstance(event, AnyEvent)
        encode_event(event)
        match event:
            case PartStarted():
                assert event.part_id not in parts
                assert event.part_id.startswith("m1-p")
                parts[event.part_id] = (event.kind, event.name, event.call_id, [])
                if event.kind == "tool_call":
                    assert event.name
                    assert event.call_id not in call_ids
                    call_ids.add(event.call_id)
            case PartDelta():
                assert event.part_id not in ended
                assert event.delta
                assert parts[event.part_id][0] == event.kind
                parts[event.part_id][3].append(event.delta)
            case PartFinished():
                assert event.part_id not in ended
                ended.add(event.part_id)
                kind, name, call_id, deltas = parts[event.part_id]
                assert (kind, name, call_id) == (event.kind, event.name, event.call_id)
                assert event.text in ("".join(deltas), deltas[-1])
            case ToolStarted():
                assert event.call_id not in tools
                tools.add(event.call_id)
            case ToolFinished():
                assert event.call_id in tools
                assert event.call_id not in over
                over.add(event.call_id)
            case _:
                assert isinstance(event, ProviderEvent)
    if is_whole:
        assert ended == set(parts)
        assert over == tools


def told(events):
    """Every part, as it ended: its kind and its text."""
    return [(e.kind, e.text) for e in events if isinstance(e, PartFinished)]


def deltas(events):
    return [e.delta for e in events if isinstance(e, PartDelta)]


def calls(events):
    """Every call of ours, as it ended: its id, its name, its arguments."""
    return [
        (e.call_id, e.name, e.text)
        for e in events
        if isinstance(e, PartFinished) and e.kind == "tool_call"
    ]


def tools(events):
    """Every tool of the provider's, as it began and as it ended."""
    return [
        (e.call_id, e.name, decode_json(e.arguments))
        if isinstance(e, ToolStarted)
        else (e.call_id, e.name, decode_json(e.result), e.is_error, e.source)
        for e in events
        if isinstance(e, ToolStarted | ToolFinished)
    ]


def handed_on(events):
    return [decode_json(e.raw) for e in events if isinstance(e, ProviderEvent)]


# A call -------------------------------------------------------------------------------------------

TOOL = ToolSpec("look", "Looks.", {"type": "object", "properties": {}})


def test_it_is_an_api():
    """It has what `HttpProvider` needs, and a name."""
    words: Api = api()
    assert words.kind == "openai_responses"


def test_a_call_is_a_stream_of_which_nothing_is_stored():
    """The least that a call consists of: sealed reasoning is asked for, the rest is left out."""
    request = api().request(Prompt("gpt-5", (UserMessage("Hello"),)))

    assert request.url == "https://api.openai.com/v1/responses"
    assert dict(request.headers) == {}
    assert {
        "model": "gpt-5",
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "input": [{"type": "message", "role": "user", "content": "Hello"}],
    } == request.body


def test_the_key_is_a_bearer_token_and_nowhere_else():
    """It stands in the header, and not in what is printed."""
    words = OpenAIResponsesApi(base_url="http://localhost:9/v1/", key="sk-secret")
    request = words.request(Prompt("m", ()))

    assert request.url == "http://localhost:9/v1/responses"
    assert dict(request.headers) == {"authorization": "Bearer sk-secret"}
    assert "secret" not in repr(words)
    assert "secret" not in str(request.body)


def test_options_replace_what_is_written():
    """They are the last word about the body."""
    words = OpenAIResponsesApi(options={"store": True, "reasoning": {"effort": "low"}})
    body = words.request(Prompt("m", ())).body

    assert body["store"] is True
    assert body["reasoning"] == {"effort": "low"}


CONVERSATION = (
    SystemMessage("Be kind."),
    UserMessage("What is in a.txt?"),
    AssistantMessage(
        "I look.",
        (ToolCall("call_1", "look", '{"file":"a.txt"}'), ToolCall("call_2", "look", "")),
    ),
    ToolMessage("call_1", "look", '"text"'),
    ToolMessage("call_2", "look", '"no file"', is_error=True),
    SystemMessage("Be brief."),
    AssistantMessage("It says: text."),
    AssistantMessage(""),
    UserMessage("Thanks"),
)


def test_a_conversation_is_written_as_items():
    """Messages, calls and their outputs stand in order; what the agent is told stands apart."""
    body = api().request(Prompt("m", CONVERSATION, (TOOL,))).body

    assert body["instructions"] == "Be kind.\n\nBe brief."
    assert body["input"] == [
        {"type": "message", "role": "user", "content": "What is in a.txt?"},
        {"type": "message", "role": "assistant", "content": "I look."},
        {
            "type": "function_call",
            "call_id": "call_1",
            "name": "look",
            "arguments": '{"file":"a.txt"}',
        },
        {"type": "function_call", "call_id": "call_2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": '"text"'},
        {"type": "function_call_output", "call_id": "call_2", "output": '"no file"'},
        {"type": "message", "role": "assistant", "content": "It says: text."},
        {"type": "message", "role": "user", "content": "Thanks"},
    ]
    assert body["tools"] == [
        {
            "type": "function",
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {}},
            "strict": False,
        }
    ]


def test_what_was_echoed_goes_back_as_it_came():
    """Its own items stand in place of text and calls."""
    items = [reasoning("Hm."), call()]
    said = AssistantMessage(
        "other", (ToolCall("x", "y", "{}"),), echo=Echo("openai_responses", items)
    )
    body = api().request(Prompt("m", (UserMessage("?"), said))).body

    assert body["input"][1:] == items


@pytest.mark.parametrize(
    "echo", [Echo("anthropic", [{"type": "thinking"}]), Echo("openai_responses", "no items")]
)
def test_what_others_echo_is_not_sent(echo):
    """Another provider's echo, or a broken one, means nothing here: the text counts."""
    body = api().request(Prompt("m", (AssistantMessage("Hi", echo=echo),))).body

    assert body["input"] == [{"type": "message", "role": "assistant", "content": "Hi"}]


def test_an_answer_goes_back_with_the_next_call():
    """The echo of a whole round is what the next request begins with."""
    events, finish = heard(
        begun(),
        added(reasoning(sealed=None)),
        done(reasoning("Hm.")),
        added(call("", status="in_progress"), 1),
        done(call('{"a":1}'), 1),
        completed(reasoning("Hm."), call('{"a":1}')),
    )
    said = AssistantMessage("", tuple(ToolCall(*one) for one in calls(events)), echo=finish.echo)
    body = api().request(Prompt("m", (said, ToolMessage("call_1", "look", "1")))).body

    assert body["input"] == [
        reasoning("Hm."),
        call('{"a":1}'),
        {"type": "function_call_output", "call_id": "call_1", "output": "1"},
    ]


# Text ---------------------------------------------------------------------------------------------


def test_text_is_told_as_it_comes_and_once():
    """Five tellings of one text are one part."""
    events, finish = heard(
        begun(), text_events("Hel", "lo", " there"), completed(message("Hello there"))
    )
    assert events == [
        PartStarted(part_id="m1-p1", kind="text"),
        PartDelta(part_id="m1-p1", kind="text", delta="Hel"),
        PartDelta(part_id="m1-p1", kind="text", delta="lo"),
        PartDelta(part_id="m1-p1", kind="text", delta=" there"),
        PartFinished(part_id="m1-p1", kind="text", text="Hello there"),
    ]
    assert finish == Finish("stop", USAGE, Echo("openai_responses", [message("Hello there")]))


def test_done_is_welcome_after_the_end():
    """`[DONE]`, a comment, a ping and a frame without its blank line change nothing."""
    expected = heard(begun(), text_events("Hi"), completed(message("Hi")))
    got = heard(
        b": open\n\n",
        begun(),
        frame("keepalive"),
        text_events("Hi"),
        completed(message("Hi")),
        frame("ping"),
        b"data: [DONE]\n",
    )
    assert expected == got


def test_the_end_is_known_at_once():
    """After its last event nobody has to wait for the connection to close."""
    reader = machine()
    assert not reader.is_over
    list(reader.feed(begun() + text_events("Hi")))
    assert not reader.is_over
    list(reader.feed(completed(message("Hi"))))
    assert reader.is_over


@pytest.mark.parametrize(
    ("text", "expected", "whole"),
    [
        ("Hello", ["Hel", "lo"], "Hello"),
        ("Hello you", ["Hel", "lo", " you"], "Hello you"),
        ("Goodbye", ["Hel", "lo", "Goodbye"], "Goodbye"),
        ("", ["Hel", "lo"], "Hello"),
    ],
    ids=["equal", "extends", "contradicts", "empty"],
)
def test_one_delta_reconciles_the_whole_with_its_pieces(text, expected, whole):
    """Equal: nothing. More: the rest. Something else: all of it, and that is what counts."""
    events, _ = heard(begun(), text_events("Hel", "lo", text=text), completed())

    assert expected == deltas(events)
    assert [("text", whole)] == told(events)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Hello", []), ("Hello you", [" you"]), ("Goodbye", ["Goodbye"])],
    ids=["equal", "extends", "contradicts"],
)
def test_the_response_beats_what_was_accumulated(text, expected):
    """What is new in it is still said, in a part of its own: the first has ended."""
    events, finish = heard(begun(), text_events("Hel", "lo"), completed(message(text)))

    assert ["Hel", "lo", *expected] == deltas(events)
    assert finish.echo == Echo("openai_responses", [message(text)])


@pytest.mark.parametrize("status", ["completed", None])
def test_a_response_alone_is_an_answer(status):
    """Nothing was streamed, and everything is told."""
    output = [reasoning("Hm.", "So."), message("Hello", "you"), call('{"a":1}')]
    events, finish = heard(
        frame("completed", response=response(*output, status=status, usage=USED))
    )
    assert told(events) == [
        ("reasoning", "Hm."),
        ("reasoning", "So."),
        ("text", "Hello"),
        ("text", "you"),
        ("tool_call", '{"a":1}'),
    ]
    assert finish == Finish("tool_calls", USAGE, Echo("openai_responses", output))


def test_text_that_stands_as_a_string_is_text():
    """Some servers write content as it may stand in an input."""
    events, _ = heard(completed({**message(), "content": "Hello"}))
    assert [("text", "Hello")] == told(events)


@pytest.mark.parametrize("end", [completed(), completed(message("Hello")), frame("completed")])
def test_pieces_without_any_id_are_one_text(end):
    """A server that sends little is understood: deltas, and an end."""
    events, finish = heard(
        frame("output_text.delta", delta="Hel"), frame("output_text.delta", text="lo"), end
    )
    assert ["Hel", "lo"] == deltas(events)
    assert [("text", "Hello")] == told(events)
    assert "stop" == finish.reason


def test_pieces_without_any_id_after_an_end_are_another_text():
    """Two texts, each with its end, are two parts."""
    events, _ = heard(
        frame("output_text.delta", delta="A"),
        frame("output_text.done", text="A"),
        frame("output_text.delta", delta="AB"),
        frame("output_text.done", text="AB"),
        completed(),
    )
    assert [("text", "A"), ("text", "AB")] == told(events)


def test_an_item_without_an_id_ends_the_pieces_without_one():
    """It is what they were pieces of; the one after it is another."""
    item = {**message("Hi"), "id": None}
    events, finish = heard(
        frame("output_text.delta", delta="Hi"),
        frame("output_item.done", item=item),
        frame("output_item.done", item=message("Hi", id_="msg_2")),
        completed(),
    )
    assert [("text", "Hi"), ("text", "Hi")] == told(events)
    assert finish.echo == Echo("openai_responses", [item, message("Hi", id_="msg_2")])


def test_ids_that_change_from_event_to_event_are_one_item():
    """GitHub's servers seal each id anew; the place in the output holds."""
    where = {"output_index": 0, "content_index": 0}
    events, finish = heard(
        begun(),
        added(message(id_="a")),
        frame("output_text.delta", item_id="b", **where, delta="Hi"),
        frame("output_text.done", item_id="c", **where, text="Hi"),
        done(message("Hi", id_="d")),
        completed(message("Hi", id_="e")),
    )
    assert [("text", "Hi")] == told(events)
    assert finish.echo == Echo("openai_responses", [message("Hi", id_="e")])


def test_a_place_that_never_changes_does_not_mix_items():
    """Some servers count nothing; then the ids hold."""
    events, _ = heard(
        begun(),
        text_events("A", id_="msg_1", at=0),
        text_events("B", id_="msg_2", at=0),
        done(message("C", id_="msg_3"), 0),
        completed(),
    )
    assert [("text", "A"), ("text", "B"), ("text", "C")] == told(events)


def test_a_piece_after_the_end_of_its_text_is_still_said():
    """It makes a part of its own, and the whole that has it says nothing more."""
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events, _ = heard(
        added(message()),
        frame("output_text.delta", **where, delta="A"),
        frame("output_text.done", **where, text="A"),
        frame("output_text.delta", **where, delta="B"),
        completed(message("AB")),
    )
    assert [("text", "A"), ("text", "B")] == told(events)


def test_several_parts_of_a_message_are_several_parts():
    """They are told apart by their index, also when they come interleaved."""
    where = {"item_id": "msg_1", "output_index": 0}
    events, _ = heard(
        added(message()),
        frame("output_text.delta", **where, content_index=0, delta="A"),
        frame("output_text.delta", **where, content_index=1, delta="C"),
        frame("output_text.delta", **where, content_index=0, delta="B"),
        done(message("AB", "C")),
        completed(message("AB", "C")),
    )
    assert [("text", "AB"), ("text", "C")] == told(events)


def test_halves_of_surrogate_pairs_are_joined():
    """An emoji cut in two by escapes is one emoji, and half of one is replaced."""
    events, finish = heard(
        begun(), text_events("\ud83d", "\ude00", "\ud800", text="\U0001f600"), completed()
    )
    assert [("text", "\U0001f600\ufffd")] == told(
        heard(text_events("\ud83d", "\ude00", "\ud800", text=""), frame("completed"))[0]
    )
    assert ["\U0001f600"] == deltas(events)
    assert finish.echo == Echo("openai_responses", [message("\U0001f600")])


def test_an_echo_can_be_sent():
    """What JSON cannot carry is mended before it goes back."""
    _, finish = heard(completed(message("\ud800")))
    assert finish.echo == Echo("openai_responses", [message("\ufffd")])
    encode_json(finish.echo.value)


def test_a_refusal_is_a_part_of_its_own_kind():
    """The model says no, in pieces and in full, once."""
    part = {"type": "refusal", "refusal": "I cannot."}
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events, finish = heard(
        begun(),
        added(message(status="in_progress")),
        frame("content_part.added", **where, part={"type": "refusal", "refusal": ""}),
        frame("refusal.delta", **where, delta="I can"),
        frame("refusal.delta", **where, delta="not."),
        frame("refusal.done", **where, refusal="I cannot."),
        frame("content_part.done", **where, part=part),
        done(message(part)),
        completed(message(part)),
    )
    assert ["I can", "not."] == deltas(events)
    assert [("refusal", "I cannot.")] == told(events)
    assert "stop" == finish.reason


def test_annotations_are_handed_on_once():
    """As they come; those that only an aggregate has, with it."""
    seen, unseen = {"type": "url_citation", "url": "a"}, {"type": "url_citation", "url": "b"}
    part = text_part("Hi", [seen, unseen])
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events, _ = heard(
        begun(),
        added(message()),
        frame("output_text.delta", **where, delta="Hi"),
        frame("output_text.annotation.added", **where, annotation_index=0, annotation=seen),
        frame("output_text.done", **where, text="Hi"),
        frame("content_part.done", **where, part=part),
        done(message(part)),
        completed(message(part)),
    )
    first, second = handed_on(events)
    assert seen == first["annotation"]
    assert unseen == second


def test_parts_that_are_no_text_are_handed_on_once():
    """An API grows; what it brings is seen."""
    part = {"type": "output_audio", "data": "AAAA"}
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    events, _ = heard(
        added(message()),
        frame("content_part.done", **where, part=part),
        done(message(part, "Hi", {"type": "hologram"})),
        completed(message(part, "Hi", {"type": "hologram"})),
    )
    first, second = handed_on(events)
    assert part == first["part"]
    assert {"type": "hologram"} == second
    assert [("text", "Hi")] == told(events)


# Reasoning ----------------------------------------------------------------------------------------


def summary_events(*texts, id_="rs_1"):
    """The summary of reasoning as it is streamed, word by word."""
    for index, text in enumerate(texts):
        where = {"item_id": id_, "output_index": 0, "summary_index": index}
        part = {"type": "summary_text", "text": text}
        yield frame("reasoning_summary_part.added", **where, part={**part, "text": ""})
        for word in text.split(" "):
            yield frame("reasoning_summary_text.delta", **where, delta=word)
        yield frame("reasoning_summary_text.done", **where, text=text.replace(" ", ""))
        yield frame("reasoning_summary_part.done", **where, part={**part, "text": text})


def test_each_part_of_a_summary_is_a_part():
    """Reasoning comes first, its parts stay apart, and it goes back sealed."""
    output = [reasoning("One", "Two"), message("Hi")]
    events, finish = heard(
        begun(),
        added(reasoning(sealed="early")),
        *summary_events("One", "Two"),
        done(reasoning("One", "Two")),
        text_events("Hi", at=1),
        completed(*output),
    )
    assert [("reasoning", "One"), ("reasoning", "Two"), ("text", "Hi")] == told(events)
    assert [("m1-p1", "reasoning"), ("m1-p2", "reasoning"), ("m1-p3", "text")] == [
        (e.part_id, e.kind) for e in events if isinstance(e, PartStarted)
    ]
    assert finish == Finish("stop", USAGE, Echo("openai_responses", output))


def test_reasoning_in_full_is_told_as_it_comes():
    """Open models show what they think, and their servers make content parts of it."""
    part = {"type": "reasoning_text", "text": "Hmm"}
    item = {"id": "rs_1", "type": "reasoning", "summary": [], "content": [part]}
    where = {"item_id": "rs_1", "output_index": 0, "content_index": 0}
    events, finish = heard(
        begun(),
        added({**item, "content": []}),
        frame("content_part.added", **where, part={**part, "text": ""}),
        frame("reasoning_text.delta", **where, delta="Hm"),
        frame("reasoning_text.delta", **where, delta="m"),
        frame("reasoning_text.done", **where, text="Hmm"),
        frame("content_part.done", **where, part=part),
        done(item),
        text_events("Hi", at=1),
        completed(item, message("Hi")),
    )
    assert ["Hm", "m", "Hi"] == deltas(events)
    assert [("reasoning", "Hmm"), ("text", "Hi")] == told(events)
    assert finish.echo == Echo("openai_responses", [message("Hi")])


@pytest.mark.parametrize(
    ("output", "kept"),
    [
        ([reasoning(sealed=None), message("Hi")], [message("Hi")]),
        ([reasoning(sealed="")], None),
        ([reasoning("Hm."), message()], None),
        ([message("Hi"), reasoning()], [message("Hi")]),
        ([], None),
        ([{"type": "web_search_call", "id": "ws_1", "status": "completed"}], None),
    ],
    ids=["not sealed", "nothing", "nothing follows", "last", "empty", "not ours"],
)
def test_only_what_the_api_takes_back_is_echoed(output, kept):
    """Reasoning must be sealed, and must have something after it."""
    _, finish = heard(completed(*output))
    assert (kept and Echo("openai_responses", kept)) == finish.echo


def test_an_echo_is_made_of_items_where_the_response_has_none():
    """Some servers end with an empty output; the order is that of the items' places."""
    _, finish = heard(
        begun(),
        done(call(id_="fc_2", call_id="call_2"), 2),
        done(reasoning(), 0),
        done(message("Hi"), 1),
        completed(),
    )
    assert finish.echo == Echo(
        "openai_responses",
        [reasoning(), message("Hi"), call(id_="fc_2", call_id="call_2")],
    )


@pytest.mark.parametrize(
    "piece",
    [
        frame("output_text.delta", item_id="msg_1", delta="Hi"),
        frame("function_call_arguments.delta", item_id="fc_1", name="look", delta="{}"),
    ],
)
def test_without_all_items_there_is_no_echo(piece):
    """Half of a message would be worse than none: it is written from what was said."""
    _, finish = heard(done(reasoning()), piece, completed())
    assert finish.echo is None


# Calls --------------------------------------------------------------------------------------------


def arguments(delta, id_="fc_1", at=0):
    return frame("function_call_arguments.delta", item_id=id_, output_index=at, delta=delta)


def arguments_done(text, id_="fc_1", at=0):
    return frame("function_call_arguments.done", item_id=id_, output_index=at, arguments=text)


def test_parallel_calls_may_be_interleaved():
    """Each has its name and id from the start, its own pieces, and one end."""
    first = call('{"a":1}')
    second = call('{"b":2}', id_="fc_2", call_id="call_2", name="hear")
    events, finish = heard(
        begun(),
        added({**first, "arguments": "", "status": "in_progress"}, 0),
        added({**second, "arguments": "", "status": "in_progress"}, 1),
        arguments('{"a"', "fc_1", 0),
        arguments('{"b"', "fc_2", 1),
        arguments(":1}", "fc_1", 0),
        arguments(":2}", "fc_2", 1),
        arguments_done('{"a":1}', "fc_1", 0),
        arguments_done('{"b":2}', "fc_2", 1),
        done(first, 0),
        done(second, 1),
        completed(first, second),
    )
    assert [
        PartStarted(part_id="m1-p1", kind="tool_call", name="look", call_id="call_1"),
        PartStarted(part_id="m1-p2", kind="tool_call", name="hear", call_id="call_2"),
        PartDelta(part_id="m1-p1", kind="tool_call", delta='{"a"'),
        PartDelta(part_id="m1-p2", kind="tool_call", delta='{"b"'),
    ] == events[:4]
    assert [("call_1", "look", '{"a":1}'), ("call_2", "hear", '{"b":2}')] == calls(events)
    assert finish == Finish("tool_calls", USAGE, Echo("openai_responses", [first, second]))


@pytest.mark.parametrize("has_items", [True, False])
def test_calls_that_never_streamed_are_still_told(has_items):
    """Those that only the response has are calls as well."""
    first, second = call('{"a":1}'), call("", id_="fc_2", call_id="call_2", name="hear")
    items = done(first, 0) + done(second, 1) if has_items else b""
    events, finish = heard(begun(), items, completed(first, second))

    assert [("call_1", "look", '{"a":1}'), ("call_2", "hear", "{}")] == calls(events)
    assert "tool_calls" == finish.reason
    assert finish.echo == Echo("openai_responses", [first, {**second, "arguments": "{}"}])


@pytest.mark.parametrize(
    ("start", "pieces", "end", "expected"),
    [
        ("", ['{"a":', "1}"], '{"a":1}', '{"a":1}'),
        ("", ['{"a":', "1}"], "", '{"a":1}'),
        ("", ['{"a":', "1}"], '{"b":2}', '{"a":1}'),
        ("", [], '{"b":2}', '{"b":2}'),
        ('{"a":1}', [], "", '{"a":1}'),
        ('{"a":1}', [], '{"b":2}', '{"b":2}'),
        ('{"a":1}', ['{"b":2}'], "", '{"b":2}'),
        ("", [], "", "{}"),
        ({}, [], {"b": 2}, '{"b":2}'),
    ],
)
def test_arguments_count_once(start, pieces, end, expected):
    """Those at the start and at the end count only if no piece came."""
    events, finish = heard(
        begun(),
        added(call(start)),
        *map(arguments, pieces),
        arguments_done(end),
        done(call(end)),
        completed(call(end)),
    )
    assert [("call_1", "look", expected)] == calls(events)
    assert finish.echo == Echo("openai_responses", [call(expected)])


@pytest.mark.parametrize("by", ["call_id", "item_id", "id"])
def test_pieces_of_a_call_find_each_other(by):
    """No item was added: a call is told apart by its call id, else its item's, else its own."""
    first, second = ("call_1", "call_2") if by == "call_id" else ("fc_1", "fc_2")
    name = "function_call_arguments."
    events, finish = heard(
        frame(name + "delta", **{by: first}, delta='{"a"'),
        frame(name + "delta", **{by: second}, delta='{"b"'),
        frame(name + "delta", **{by: first}, delta=":1}"),
        frame(name + "delta", **{by: second}, delta=":2}"),
        frame(name + "done", **{by: first}, arguments='{"a":1}'),
        frame("output_item.done", item=call('{"a":1}')),
        frame("output_item.done", item=call('{"b":2}', id_="fc_2", call_id="call_2")),
        completed(),
    )
    assert [("call_1", "look", '{"a":1}'), ("call_2", "look", '{"b":2}')] == calls(events)
    assert "tool_calls" == finish.reason


def test_pieces_of_a_call_without_any_id_are_one_call():
    """What has no end by itself ends with the response; ids and names are made."""
    events, _ = heard(
        frame("function_call_arguments.delta", delta="{"),
        frame("function_call_arguments.delta", delta="}"),
        frame("function_call_arguments.done", arguments="{}"),
        frame("function_call_arguments.delta", name="hear", delta="[]"),
        frame("completed"),
    )
    assert [("m1-c1", "unnamed", "{}"), ("m1-c2", "hear", "[]")] == sorted(calls(events))


def test_a_name_may_come_late():
    """A call is shown once its name is known, with all that was held back."""
    events, _ = heard(
        arguments("{}"),
        frame("function_call_arguments.done", item_id="fc_1", name="look", arguments="{}"),
        completed(),
    )
    assert [("m1-c1", "look", "{}")] == calls(events)


def test_ids_that_are_the_same_are_made_different():
    """Two calls with one id would get one answer; the echo has the ids that were told."""
    first, second = call('{"a":1}'), call('{"b":2}', id_="fc_2")
    events, finish = heard(
        begun(),
        added({**first, "arguments": ""}, 0),
        added({**second, "arguments": ""}, 1),
        arguments('{"a":1}', "fc_1", 0),
        arguments('{"b":2}', "fc_2", 1),
        done(first, 0),
        done(second, 1),
        completed(first, second),
    )
    assert [("call_1", "look", '{"a":1}'), ("call_1-2", "look", '{"b":2}')] == calls(events)
    assert finish.echo == Echo("openai_responses", [first, {**second, "call_id": "call_1-2"}])


def test_ids_that_are_missing_are_made():
    """They begin with the prefix, and the echo has them."""
    item = {"type": "function_call", "name": "look", "arguments": "{}"}
    events, finish = heard(completed(item, item))

    assert [("m1-c1", "look", "{}"), ("m1-c2", "look", "{}")] == calls(events)
    assert [one["call_id"] for one in finish.echo.value] == ["m1-c1", "m1-c2"]


def test_an_item_that_is_added_twice_is_one():
    """So is one that ends twice; pieces after its end are handed on."""
    events, _ = heard(
        added(call("")), added(call("")), done(call()), added(call("")), done(call()),
        arguments("late"), arguments_done("late"), completed(call()),
    )  # fmt: skip
    assert [("call_1", "look", "{}")] == calls(events)
    assert ["late"] == [raw["delta"] for raw in handed_on(events)]


def test_text_and_a_call_end_in_tool_calls():
    """The reason says what the agent has to do."""
    events, finish = heard(
        begun(), text_events("I look."), added(call(""), 1), arguments("{}", at=1),
        done(call(), 1), completed(message("I look."), call()),
    )  # fmt: skip
    assert [("text", "I look."), ("tool_call", "{}")] == told(events)
    assert "tool_calls" == finish.reason


# Tools that the provider runs ---------------------------------------------------------------------


def mcp(**fields):
    return {
        "id": "mcp_1",
        "type": "mcp_call",
        "server_label": "docs",
        "name": "ask",
        "arguments": "",
        "output": None,
        "error": None,
        "status": "in_progress",
        **fields,
    }


def mcp_events(*deltas, end, stem="mcp_call_arguments.", status="completed"):
    where = {"item_id": "mcp_1", "output_index": 0}
    return b"".join(
        (
            begun(),
            added(mcp()),
            frame("mcp_call.in_progress", **where),
            *(frame(f"{stem}delta", **where, delta=delta) for delta in deltas),
            frame(f"{stem}done", **where, arguments="".join(deltas)),
            frame(f"mcp_call.{status}", **where),
            done(end),
        )
    )


@pytest.mark.parametrize(
    "stem", ["mcp_call_arguments.", "mcp_call.arguments.", "mcp_call.arguments_"]
)
def test_a_call_of_an_mcp_server_is_told_with_its_output(stem):
    """It is shown when its arguments are known, and ends once."""
    end = mcp(arguments='{"q":"x"}', output="found", status="completed")
    events, finish = heard(mcp_events('{"q"', ':"x"}', end=end, stem=stem), completed(end))

    assert tools(events) == [
        ("mcp_1", "ask", {"q": "x"}),
        ("mcp_1", "ask", "found", False, "mcp"),
    ]
    assert [] == handed_on(events)
    assert "stop" == finish.reason


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"error": "no such thing", "status": "failed"}, "no such thing"),
        ({"error": {"type": "http_error", "code": 500}}, {"type": "http_error", "code": 500}),
        ({"status": "failed"}, None),
        ({}, None),
    ],
)
def test_a_call_of_an_mcp_server_may_fail(fields, result):
    """What went wrong is its result."""
    end = mcp(arguments="{}", **fields)
    events, _ = heard(mcp_events("{}", end=end, status="failed"), completed(end))

    assert tools(events) == [("mcp_1", "ask", {}), ("mcp_1", "ask", result, True, "mcp")]


def test_a_call_of_an_mcp_server_may_come_at_once():
    """Only its end, only with the response, or with pieces and without a name: it is told."""
    end = mcp(arguments='{"q":"x"}', output="found", status="completed")
    expected = [("mcp_1", "ask", {"q": "x"}), ("mcp_1", "ask", "found", False, "mcp")]
    pieces = frame("mcp_call_arguments.done", item_id="mcp_1", arguments='{"q":"x"}')

    assert expected == tools(heard(done(end), completed(end))[0])
    assert expected == tools(heard(completed(end))[0])
    assert expected == tools(heard(pieces, completed(end))[0])
    named = frame("mcp_call_arguments.done", item_id="mcp_1", name="ask", arguments='{"q":"x"}')
    assert expected == tools(heard(named, completed(end))[0])


def test_arguments_that_are_no_json_are_text():
    """What the provider's model writes is shown as it is."""
    end = mcp(arguments="{broken", output="")
    events, _ = heard(mcp_events("{broken", end=end), completed(end))
    assert tools(events) == [
        ("mcp_1", "ask", "{broken"),
        ("mcp_1", "ask", "", False, "mcp"),
    ]


@pytest.mark.parametrize("type_", ["mcp_list_tools", "mcp_approval_request"])
def test_what_mcp_says_beside_calls_is_handed_on_once(type_):
    """The list of its tools, and that it wants to be allowed."""
    item = {"id": "mcp_9", "type": type_, "server_label": "docs"}
    events, _ = heard(
        begun(),
        added(item),
        frame("mcp_list_tools.in_progress", item_id="mcp_9", output_index=0),
        frame("mcp_list_tools.completed", item_id="mcp_9", output_index=0),
        done(item),
        completed(item),
    )
    (raw,) = handed_on(events)
    assert item == raw["item"]
    assert item == handed_on(heard(completed(item))[0])[0]


def search(**fields):
    return {"id": "ws_1", "type": "web_search_call", "status": "completed", **fields}


def test_a_search_of_the_web_is_shown_while_it_goes_on():
    """What it was for comes at its end, and is all that is known of it."""
    where = {"item_id": "ws_1", "output_index": 0}
    end = search(action={"type": "search", "query": "trio"})
    events, finish = heard(
        begun(),
        added(search(status="in_progress")),
        frame("web_search_call.in_progress", **where),
        frame("web_search_call.searching", **where),
        frame("web_search_call.completed", **where),
        done(end),
        text_events("Found.", at=1),
        completed(end, message("Found.")),
    )
    assert tools(events) == [
        ("ws_1", "web_search", {}),
        ("ws_1", "web_search", {"type": "search", "query": "trio"}, False, "provider"),
    ]
    assert [] == handed_on(events)
    assert finish.echo == Echo("openai_responses", [message("Found.")])


@pytest.mark.parametrize(
    ("item", "name", "arguments", "result"),
    [
        (search(action={"type": "search"}), "web_search", {"type": "search"}, None),
        (
            {"type": "file_search_call", "queries": ["a"], "results": [{"file_id": "f"}]},
            "file_search",
            {"queries": ["a"]},
            [{"file_id": "f"}],
        ),
        (
            {"type": "image_generation_call", "revised_prompt": "a cat", "result": "AAAA"},
            "image_generation",
            {"revised_prompt": "a cat"},
            "AAAA",
        ),
        ({"type": "dream_call", "outputs": []}, "dream", {}, []),
    ],
)
def test_a_tool_of_the_provider_is_told_from_its_item(item, name, arguments, result):
    """Whatever it is called: what it was given, and what it brought."""
    events, _ = heard(completed({"id": "x_1", **item}))
    started, finished = tools(events)
    assert (name, arguments) == started[1:]
    assert (name, result, False, "provider") == finished[1:]


def test_code_is_what_an_interpreter_is_given():
    """It is told once, when it is whole, not as output."""
    where = {"item_id": "ci_1", "output_index": 0}
    item = {"id": "ci_1", "type": "code_interpreter_call", "code": "", "outputs": None}
    end = {**item, "code": "1+1", "outputs": [{"type": "logs", "logs": "2"}]}
    events, _ = heard(
        begun(),
        added(item),
        frame("code_interpreter_call.in_progress", **where),
        frame("code_interpreter_call_code.delta", **where, delta="1"),
        frame("code_interpreter_call_code.delta", **where, delta="+1"),
        frame("code_interpreter_call_code.done", **where, code="1+1"),
        frame("code_interpreter_call.interpreting", **where),
        frame("code_interpreter_call.completed", **where),
        done(end),
        completed(end),
    )
    assert tools(events) == [
        ("ci_1", "code_interpreter", {"code": "1+1"}),
        ("ci_1", "code_interpreter", [{"type": "logs", "logs": "2"}], False, "provider"),
    ]


def shell(**fields):
    action = {"commands": ["ls"]}
    return {"id": "sh_1", "type": "shell_call", "call_id": "call_9", "action": action, **fields}


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_the_output_of_a_tool_may_be_an_item_of_its_own(status):
    """It ends the tool that has its call id."""
    output = {"id": "so_1", "type": "shell_call_output", "call_id": "call_9", "status": status}
    output |= {"output": [{"stdout": "a"}]}
    events, _ = heard(
        begun(), added(shell()), done(shell()), added(output, 1), done(output, 1),
        completed(shell(), output),
    )  # fmt: skip
    assert tools(events) == [
        ("sh_1", "shell", {"commands": ["ls"]}),
        ("sh_1", "shell", [{"stdout": "a"}], status == "incomplete", "provider"),
    ]
    assert [] == handed_on(events)


def test_a_tool_that_has_failed_has_no_output_to_wait_for():
    """It ends with its own item; an output that comes all the same is handed on."""
    output = {"id": "so_1", "type": "shell_call_output", "call_id": "call_9"}
    failure = shell(status="incomplete")
    events, _ = heard(done(failure), done(output, 1), completed(failure, output))

    assert [
        ("sh_1", "shell", {"commands": ["ls"]}),
        ("sh_1", "shell", None, True, "provider"),
    ] == tools(events)
    assert 1 == len(handed_on(events))


@pytest.mark.parametrize(
    ("end", "is_error"),
    [
        (completed(), False),
        (frame("incomplete", response=response(status="incomplete")), True),
    ],
)
def test_a_tool_without_an_end_ends_with_the_response(end, is_error):
    """Nobody waits for it: no result; an error, if the response was cut short."""
    events, _ = heard(added(search(action={"query": "x"})), end)
    assert tools(events) == [
        ("ws_1", "web_search", {"query": "x"}),
        ("ws_1", "web_search", None, is_error, "provider"),
    ]


@pytest.mark.parametrize("type_", ["computer_call", "custom_tool_call", "program", "compaction"])
def test_items_that_nobody_here_runs_are_handed_on(type_):
    """No tool is shown that would never end."""
    item = {"id": "x_1", "type": type_, "call_id": "call_9"}
    events, finish = heard(added(item), done(item), done(item), completed(item))
    assert 1 == len(events)
    assert item == handed_on(events)[0]["item"]
    assert "stop" == finish.reason


EVERYWHERE = {
    "text": begun()
    + text_events("Hel", "l\u00f6", "\U0001f600")
    + completed(message("Hell\u00f6")),
    "reasoning": b"".join(summary_events("A b", "C")) + done(reasoning("Ab", "C")) + completed(),
    "calls": b"".join(
        (
            added(call(""), 0),
            added(call("", id_="fc_2", call_id="call_2"), 1),
            arguments('{"a"', "fc_1", 0),
            arguments("{}", "fc_2", 1),
            arguments(":1}", "fc_1", 0),
            completed(call(), call(id_="fc_2", call_id="call_2")),
        )
    ),
    "mcp": mcp_events("{", "}", end=mcp(output="x")) + completed(),
    "search": added(search()) + done(search(action={"query": "x"})) + completed(),
    "escaped halves": text_events("\ud83d", "\ude00") + completed(),
    "broken": b"data: \xff{\n\n:x\r\n\r\ndata: [DONE]\r\r" + completed(message("Hi")),
    "failed": begun() + text_events("Hi") + frame("failed", response={"error": {"code": "x"}}),
    "error": text_events("Hi") + frame("error", message="x") + completed(),
    "late error": completed(message("Hi")) + frame("error", message="x"),
    "incomplete": text_events("Hi") + frame("incomplete", response={"output": []}),
    "no end": begun() + text_events("Hi") + added(call("")) + arguments("{"),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_stream_may_be_cut_anywhere(name):
    """Whole, byte by byte, and in two at every byte: the same events."""
    produced, error = however_cut(machine, EVERYWHERE[name])
    assert produced or error
    follows_the_rules(
        [one for one in produced if not isinstance(one, Finish)], is_whole=error is None
    )


# The unknown, the broken, the end -----------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        frame("image_generation_call.partial_image", item_id="ig_1", partial_image_b64="AA"),
        frame("custom_tool_call_input.delta", item_id="ct_1", delta="x"),
        frame("function_call.completed", item_id="fc_1"),
        frame("compaction.compacting", item_id="c_1"),
        frame("output_text.delta", item_id="msg_1", delta=None),
        frame("output_text.polished", item_id="msg_1", delta="x"),
        frame("mcp_call_arguments.delta", item_id="mcp_1", delta={"a": 1}),
        frame("function_call_arguments.delta", item_id="fc_1", delta=["x"]),
        frame("content_part.done", item_id="msg_1", part="x"),
        frame("output_item.added", item=None),
        frame("output_item.done", item={"type": 7}),
        frame("codex.rate_limits", limit=1),
        b"data: {}\n\n",
        b"data: [1]\n\n",
        b"data: no json\n\n",
        b'data: {"type": 1}\n\n',
        b'data: "\xff\xfe"\n\n',
        b'data: {"type":"response.output_te\n\n',
    ],
)
def test_what_nobody_understands_is_handed_on_once(data):
    """Unknown, broken, or not UTF-8: it is seen, and the stream goes on."""
    events, finish = heard(begun(), data, text_events("Hi"), completed(message("Hi")))
    assert 1 == len(handed_on(events))
    assert [("text", "Hi")] == told(events)
    assert "stop" == finish.reason


def test_what_comes_after_the_end_is_handed_on():
    """It changes nothing any more."""
    events, finish = heard(
        completed(message("Hi")), text_events("Ho", id_="msg_2"), completed(message("Ho"))
    )
    assert [("text", "Hi")] == told(events)
    assert finish.echo == Echo("openai_responses", [message("Hi")])
    assert 6 == len(handed_on(events))


def test_the_name_of_an_event_may_stand_in_its_frame_alone():
    """`event` is as good as `type`."""
    events, _ = heard(
        b'event: response.output_text.delta\ndata: {"delta":"Hi"}\n\n',
        b"event: response.completed\ndata: {}\n\n",
    )
    assert [("text", "Hi")] == told(events)


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ({"reason": "max_output_tokens"}, "length"),
        ({"reason": "content_filter"}, "content_filter"),
        ({"reason": "steered"}, "other"),
        ({"reason": ["x"]}, "other"),
        (None, "other"),
    ],
)
@pytest.mark.parametrize("type_", ["incomplete", "completed"])
def test_an_incomplete_response_says_why(type_, why, reason):
    """What was said counts; the reason is not that the model was done, nor that it called."""
    item = message("Hel", status="incomplete")
    events, finish = heard(
        begun(),
        text_events("Hel"),
        added(call(""), 1),
        arguments('{"a', at=1),
        frame(
            type_,
            response=response(item, status="incomplete", incomplete_details=why, usage=USED),
        ),
    )
    assert [("text", "Hel"), ("tool_call", '{"a')] == told(events)
    assert reason == finish.reason
    assert USAGE == finish.usage


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (
            frame(
                "failed",
                response=response(
                    status="failed", error={"code": "rate_limit_exceeded", "message": "Slow down"}
                ),
            ),
            "rate_limit",
            "Slow down",
        ),
        (
            frame("failed", response=response(status="failed", error="too many tokens")),
            "context_length",
            "too many tokens",
        ),
        (frame("failed", response=None), "provider_error", "no message"),
        (
            frame("completed", response=response(status="failed")),
            "provider_error",
            "no message",
        ),
        (
            frame("completed", response=response(error={"message": "The server had an error"})),
            "provider_error",
            "had an error",
        ),
        (
            frame("error", code="server_error", message="It broke", param=None),
            "server_error",
            "(server_error): It broke",
        ),
        (
            frame("error", error={"type": "tokens", "code": "insufficient_quota", "message": "No"}),
            "quota",
            "(insufficient_quota, tokens): No",
        ),
        (frame("error", status=529, message="Busy"), "overloaded", "Busy"),
        (frame("error", error="context_length_exceeded"), "context_length", "exceeded"),
        (frame("error"), "provider_error", "no message"),
        (b'data: {"error":{"message":"Bad","code":"invalid_api_key"}}\n\n', "auth", "Bad"),
        (b'event: error\ndata: {"message":"Bad"}\n\n', "provider_error", "Bad"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_in_mid_stream_is_an_error(data, code, words):
    """However it is said; what was told before it was told."""
    events, error = failed(begun(), frame("output_text.delta", item_id="m", delta="Hel"), data)

    assert ["Hel"] == deltas(events)
    assert code == error.code
    assert words in error.message
    assert error.message.startswith("openai_responses answered")


@pytest.mark.parametrize("second", [frame("error", message="x"), frame("failed")])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_error_beats_a_finish(second, is_first):
    """Before or after it: there is no finish, and there is an error."""
    finish = completed(message("Hi"))
    _, error = failed(begun(), *([second, finish] if is_first else [finish, second]))
    assert "provider_error" == error.code


@pytest.mark.parametrize(
    "data",
    [
        b"",
        begun(),
        begun() + text_events("Hi"),
        begun() + text_events("Hi") + b"data: [DONE]\n\n",
        begun() + added(call("")) + arguments("{"),
        begun() + completed(message("Hi"))[:-40],
    ],
    ids=["nothing", "begun", "text", "done", "call", "truncated"],
)
def test_a_stream_without_an_end_is_an_error(data):
    """The connection was cut: nothing is taken for complete."""
    _, error = failed(data)
    assert "incomplete" == error.code
    assert error.is_transient


def test_usage_that_is_none_counts_as_zero():
    """Numbers of the wrong type are no numbers."""
    used = {"input_tokens": "7", "output_tokens": -1, "input_tokens_details": [], "x": 1}
    _, finish = heard(frame("completed", response=response(usage=used)))
    assert Usage() == finish.usage


def test_nothing_is_too_deep():
    """A frame nested beyond all reason is handed on, or told, and harms nobody."""
    deep = b"[" * 900 + b"]" * 900
    heard(
        b'data: {"type":"response.output_item.done","item":{"type":"x","y":%b}}\n\n' % deep,
        b'data: {"type":"response.output_item.done","item":{"type":"message","id":"m","content":'
        b'[{"type":"output_text","text":"Hi","y":%b}]}}\n\n' % deep,
        completed(),
        cut=False,
    )


# Anything -----------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["fc_1", "call_1", "msg_1", "completed", "failed", "text", "{}", "\ud83d"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "id", "name", "text", "x", "\ud800"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
IDS = st.sampled_from(["a_1", "a_2", "a_3"]) | JSON
TYPES = (
    st.sampled_from(
        [
            "message",
            "reasoning",
            "function_call",
            "mcp_call",
            "web_search_call",
            "code_interpreter_call",
            "shell_call",
            "shell_call_output",
            "mcp_list_tools",
            "custom_tool_call",
        ]
    )
    | JSON
)
PARTS = (
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["output_text", "refusal", "reasoning_text", "summary_text"]),
            "text": st.text("ab", max_size=3) | JSON,
        },
        optional={"refusal": JSON, "annotations": st.lists(JSON, max_size=2) | JSON},
    )
    | JSON
)
ITEMS = (
    st.fixed_dictionaries(
        {"type": TYPES},
        optional={
            "id": IDS,
            "call_id": IDS,
            "name": JSON,
            "arguments": JSON,
            "status": JSON,
            "content": st.lists(PARTS, max_size=3) | JSON,
            "summary": st.lists(PARTS, max_size=3) | JSON,
            "encrypted_content": JSON,
            "output": JSON,
            "error": JSON,
            "action": JSON,
            "code": JSON,
        },
    )
    | JSON
)
RESPONSES = (
    st.fixed_dictionaries(
        {"output": st.lists(ITEMS, max_size=4) | JSON},
        optional={
            "status": JSON,
            "error": JSON,
            "usage": JSON | st.just(USED),
            "incomplete_details": JSON,
        },
    )
    | JSON
)
NAMES = st.sampled_from(
    [
        "completed",
        "incomplete",
        "failed",
        "created",
        "queued",
        "output_item.added",
        "output_item.added",
        "output_item.done",
        "output_item.done",
        "content_part.added",
        "content_part.done",
        "output_text.delta",
        "output_text.done",
        "output_text.annotation.added",
        "refusal.delta",
        "refusal.done",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "reasoning_summary_part.added",
        "reasoning_summary_part.done",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_text.delta",
        "reasoning_text.done",
        "mcp_call_arguments.delta",
        "mcp_call_arguments.done",
        "mcp_call.in_progress",
        "mcp_call.failed",
        "mcp_list_tools.failed",
        "web_search_call.searching",
        "web_search_call.completed",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "custom_tool_call_input.delta",
        "error",
    ]
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "item_id": IDS,
        "id": IDS,
        "call_id": IDS,
        "output_index": st.integers(0, 2) | JSON,
        "content_index": st.integers(0, 2) | JSON,
        "summary_index": st.integers(0, 2) | JSON,
        "delta": st.text("ab", max_size=3) | JSON,
        "text": st.text("ab", max_size=3) | JSON,
        "refusal": JSON,
        "arguments": JSON,
        "code": JSON,
        "name": JSON,
        "part": PARTS,
        "item": ITEMS,
        "response": RESPONSES,
        "error": JSON,
        "message": JSON,
        "status": JSON,
        "annotation": JSON,
    },
)
STREAMS = st.lists(
    st.builds(lambda name, fields: frame(name, **fields), NAMES, FIELDS), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(STREAMS, st.booleans())
def test_nothing_of_the_wrong_type_does_any_harm(frames, is_ended):
    """Whatever stands in whichever field: events that keep the rules, or a `ProviderError`."""
    data = b"".join([*frames, frame("completed")] if is_ended else frames)
    produced, error = play(machine, [data])
    assert error is None or isinstance(error, ProviderError)
    if error is None:
        *produced, finish = produced
        assert isinstance(finish, Finish)
        if finish.echo is not None:
            said = AssistantMessage("", echo=finish.echo)
            encode_json(api().request(Prompt("m", (said,))).body)
    follows_the_rules(produced, is_whole=error is None)


def test_an_item_that_ends_often_ends_its_parts_once():
    """Parts that are finished cost nothing any more, however many there are."""
    count = 20_000
    parts = [
        frame("output_text.delta", item_id="m", content_index=n, delta="a") for n in range(count)
    ]
    ends = [frame("output_item.done", item={"type": "message", "id": "m"})] * count

    events, _ = heard(*parts, *ends, completed(), cut=False)

    assert [("text", "a")] * count == told(events)


def test_a_part_that_ends_often_grows():
    """A text whose end is told again and again is not said twice."""
    where = {"item_id": "m", "content_index": 0}
    long = "x" * 1_000_000
    more = frame("output_text.delta", **where, delta="a") + frame("output_text.done", **where)
    again = frame("output_text.done", **where, text=long + "a" * 20_000)

    events, _ = heard(
        frame("output_text.delta", **where, delta=long),
        more * 20_000,
        again,
        completed(),
        cut=False,
    )

    assert long + "a" * 20_000 == "".join(deltas(events))


def test_calls_without_names_are_counted():
    """Too many calls are an error, also where none of them can be told yet."""
    frames = [added(call("", id_=f"fc_{n}", call_id="c", name="")) for n in range(50_000)]

    produced, error = play(machine, [b"".join(frames)])

    assert [] == produced
    assert error is not None
    assert "malformed" == error.code
    assert "at most 128 tool calls" in error.message


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=6), max_size=5),
    st.lists(st.tuples(st.text(max_size=4), st.lists(st.text(max_size=4), max_size=4)), max_size=3),
)
def test_a_stream_and_its_response_say_the_same(texts, asked):
    """Streamed or only at the end, in pieces or not: the same parts."""
    texts = [text for text in texts if text]
    pieces = [[piece for piece in pieces if piece] for _, pieces in asked]
    items = [message(text, id_=f"msg_{n}") for n, text in enumerate(texts)]
    items += [
        call("".join(parts), id_=f"fc_{n}", call_id=f"call_{n}", name=name or "f")
        for n, ((name, _), parts) in enumerate(zip(asked, pieces, strict=True))
    ]
    streamed = [text_events(*text, id_=f"msg_{n}", at=n) for n, text in enumerate(texts)]
    for n, parts in enumerate(pieces):
        at = len(texts) + n
        streamed.append(added({**items[at], "arguments": ""}, at))
        streamed += [arguments(piece, f"fc_{n}", at) for piece in parts]
        streamed += [arguments_done("".join(parts), f"fc_{n}", at), done(items[at], at)]
    short, finish = heard(completed(*items), cut=False)
    long, same = heard(begun(), *streamed, completed(*items), cut=False)

    assert told(short) == told(long)
    assert calls(short) == calls(long)
    assert finish == same
