"""What all providers share: parts and their ends, foreign JSON, errors, and calls over HTTP.

The errors are those that the APIs were seen to answer with. Sockets are real, and bounded by
`fail_after`; all else is pure.
"""

import itertools
import json
from contextlib import asynccontextmanager, suppress
from email.utils import format_datetime
from functools import partial
from typing import ClassVar

import attrs
import pytest
import trio
from hypothesis import given, strategies as st
from normalizing import however_cut, play
from raw import wait_until

from agentsse import providers
from agentsse.errors import ProviderError
from agentsse.events import (
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    Usage,
)
from agentsse.http import open_http
from agentsse.messages import Echo, ToolCall, UserMessage
from agentsse.providers import (
    MAX_ERROR_BODY,
    MAX_FRAME,
    Accumulator,
    Finish,
    HttpProvider,
    HttpRequest,
    Prompt,
    SseNormalizer,
    decode_foreign,
    encode_raw,
    number,
    retry_after,
    text_of,
    upstream_error,
)

SECONDS = 20  # generous: only a test that hangs ever sees it
HIGH, LOW = "\ud83d", "\ude00"  # the halves of one character


def begun(part_id, kind="text", **more):
    return PartStarted(part_id=part_id, kind=kind, **more)


def more_of(part_id, delta, kind="text"):
    return PartDelta(part_id=part_id, kind=kind, delta=delta)


def ended(part_id, text, kind="text", **more):
    return PartFinished(part_id=part_id, kind=kind, text=text, **more)


def a_call(part_id, call_id, name, *pieces):
    """The events of a tool call."""
    known = {"kind": "tool_call", "name": name, "call_id": call_id}
    return [
        PartStarted(part_id=part_id, **known),
        *(more_of(part_id, piece, "tool_call") for piece in pieces),
        PartFinished(part_id=part_id, text="".join(pieces), **known),
    ]


@pytest.fixture
def said():
    return Accumulator("x", "m1.")


# What a model has said


def test_deltas_are_increments_of_a_part_that_begins_with_the_first(said):
    """An empty one begins nothing, and is none."""
    assert [] == said.delta("text", "")
    assert [begun("m1.p1"), more_of("m1.p1", "Hel")] == said.delta("text", "Hel")
    assert [] == said.delta("text", "")
    assert [more_of("m1.p1", "lo")] == said.delta("text", "lo")
    assert [ended("m1.p1", "Hello")] == said.finish("text")
    assert [] == said.finish("text")


def test_parts_are_told_apart_by_kind_and_key(said):
    """They may be interleaved; one that ended makes room for another of its key."""
    assert [begun("m1.p1"), more_of("m1.p1", "a")] == said.delta("text", "a", "0")
    assert [begun("m1.p2"), more_of("m1.p2", "b")] == said.delta("text", "b", "1")
    thought = [begun("m1.p3", "reasoning"), more_of("m1.p3", "c", "reasoning")]
    assert thought == said.delta("reasoning", "c", "0")
    assert [more_of("m1.p1", "d")] == said.delta("text", "d", "0")
    assert [ended("m1.p1", "ad")] == said.finish("text", "0")
    assert [begun("m1.p4"), more_of("m1.p4", "e")] == said.delta("text", "e", "0")
    assert [ended("m1.p2", "b"), ended("m1.p4", "e")] == said.finish_all("text")
    assert [ended("m1.p3", "c", "reasoning")] == said.finish_all()
    assert [] == said.finish_all()


@pytest.mark.parametrize(
    ("streamed", "whole", "delta", "text"),
    [
        (["Hel", "lo"], "Hello", None, "Hello"),
        (["Hel"], "Hello", "lo", "Hello"),
        (["Hello"], "Hallo", "Hallo", "Hallo"),
        (["Hello"], "Hel", "Hel", "Hel"),
        (["Hello"], "", None, "Hello"),
        ([], "Hello", "Hello", "Hello"),
        (["a" + HIGH], "a" + HIGH + LOW, "\U0001f600", "a\U0001f600"),
        (["a" + HIGH], "a", None, "a"),
        (["a" + HIGH], "", "\ufffd", "a\ufffd"),
        ([], HIGH, "\ufffd", "\ufffd"),
    ],
)
def test_an_aggregate_repeats_goes_on_or_reconciles(said, streamed, whole, delta, text):
    """Equal, it is dropped; longer, its rest is said; otherwise it alone counts. It is an end."""
    for piece in streamed:
        said.delta("text", piece)
    expected = [] if streamed else [begun("m1.p1")]
    expected += [] if delta is None else [more_of("m1.p1", delta)]
    assert [*expected, ended("m1.p1", text)] == said.whole("text", whole)
    assert [] == said.finish_all()


def test_an_empty_aggregate_of_nothing_is_nothing(said):
    """A part that never began is none."""
    assert [] == said.whole("text", "")


def test_halves_of_a_character_are_joined_or_replaced(said):
    """The first half waits for the next delta, or for the end."""
    assert [] == said.delta("text", HIGH)
    assert [begun("m1.p1"), more_of("m1.p1", "\U0001f600!")] == said.delta("text", LOW + "!")
    assert [more_of("m1.p1", "a")] == said.delta("text", "a" + HIGH)
    assert [more_of("m1.p1", "\ufffdb")] == said.delta("text", "b")
    assert [more_of("m1.p1", "\ufffd")] == said.delta("text", LOW)
    assert [] == said.delta("text", HIGH)
    text = "\U0001f600!a\ufffdb\ufffd\ufffd"
    assert [more_of("m1.p1", "\ufffd"), ended("m1.p1", text)] == said.finish("text")


def test_a_part_may_be_half_a_character(said):
    """It is a part all the same."""
    assert [] == said.delta("text", HIGH)
    only = [begun("m1.p1"), more_of("m1.p1", "\ufffd"), ended("m1.p1", "\ufffd")]
    assert only == said.finish_all()


# Tool calls


def test_arguments_of_a_call_are_streamed(said):
    """Those at its start and at its end are dropped, as deltas came: nothing is doubled."""
    events = said.start_call("0", name="look", call_id="c1", arguments="{}")
    assert said.has_call("0")
    events += said.call_delta("0", '{"a":')
    events += said.call_delta("0", "1}")
    events += said.finish_call("0", arguments='{"a":1}')
    assert a_call("m1.p1", "c1", "look", '{"a":', "1}") == events
    assert not said.has_call("0")
    assert [] == said.finish_call("0")


@pytest.mark.parametrize(
    ("at_start", "at_end", "expected"),
    [
        ('{"a":1}', "", '{"a":1}'),
        ("", '{"a":1}', '{"a":1}'),
        ('{"a":1}', '{"a":2}', '{"a":2}'),
        ("", "", "{}"),
        ("", HIGH, "\ufffd"),
    ],
)
@pytest.mark.parametrize("delta", ["", HIGH])
def test_arguments_without_deltas_are_those_of_the_end_or_the_start(
    said, at_start, at_end, expected, delta
):
    """A delta without a whole character in it is none."""
    events = said.start_call("0", name="look", call_id="c1", arguments=at_start)
    events += said.call_delta("0", delta)
    events += (
        said.finish("tool_call", "0") if not at_end else said.finish_call("0", arguments=at_end)
    )
    assert a_call("m1.p1", "c1", "look", expected) == events


def test_a_call_is_shown_once_it_has_a_name(said):
    """What comes before is held; half a character in it is joined."""
    assert [] == said.call_delta("0", "")
    assert [] == said.call_delta("0", '{"a":')
    assert [] == said.start_call("0", call_id="c1")
    assert [] == said.call_delta("0", '"' + HIGH)
    events = said.start_call("0", name="look")
    events += said.start_call("0", name="other", call_id="c2")
    events += said.call_delta("0", LOW + '"}')
    events += said.finish_call("0")
    assert a_call("m1.p1", "c1", "look", '{"a":"', '\U0001f600"}') == events


def test_a_call_that_held_nothing_whole_is_shown_without_a_delta(said):
    """It begins; the half that is held waits on."""
    assert [] == said.call_delta("0", HIGH)
    shown = said.start_call("0", name="look", call_id="c1")
    assert [begun("m1.p1", "tool_call", name="look", call_id="c1")] == shown


def test_a_call_without_a_name_or_an_id_gets_them(said):
    """Nameless calls are shown at the end; each id is the only one of its kind."""
    assert not said.has_calls
    assert [] == said.start_call("0")
    assert [] == said.call_delta("1", "[]")
    events = said.start_call("2", name="look")
    events += said.finish_all()
    assert [
        *a_call("m1.p3", "m1.c3", "look", "{}")[:1],
        *a_call("m1.p1", "m1.c1", "unnamed", "{}"),
        *a_call("m1.p2", "m1.c2", "unnamed", "[]"),
        *a_call("m1.p3", "m1.c3", "look", "{}")[1:],
    ] == events
    assert said.has_calls  # noqa: PGH005 - it is no mock


def test_call_ids_are_unique(said):
    """Some servers number the calls of each message from the same id on, or all with one."""
    ids = [
        said.start_call(str(n), name="a", call_id=call_id)[0].call_id
        for n, call_id in enumerate(["c", "c", "c-2", "c", "m1.c6", None, ""])
    ]
    assert ["c", "c-2", "c-2-2", "c-3", "m1.c6", "m1.c6-2", "m1.c7"] == ids


# The end


def test_the_end_completes_what_is_open_and_finishes(said):
    """In the order in which it began; with the usage and the echo that were told."""
    said.delta("text", "Hi")
    said.start_call("0", name="look", call_id="c1")
    said.reason, said.usage, said.echo = "stop", Usage(input_tokens=1), Echo("x", [1])
    assert [
        ended("m1.p1", "Hi"),
        *a_call("m1.p2", "c1", "look", "{}")[1:],
        Finish("tool_calls", Usage(input_tokens=1), Echo("x", [1])),
    ] == said.close()


@pytest.mark.parametrize(
    ("reason", "has_call", "expected"),
    [
        ("stop", False, "stop"),
        ("stop", True, "tool_calls"),
        ("tool_calls", False, "tool_calls"),
        ("length", True, "length"),
        ("content_filter", True, "content_filter"),
    ],
)
def test_a_stop_with_calls_is_no_stop(said, reason, has_call, expected):
    """Servers say it of both; any other reason stands."""
    if has_call:
        said.call_delta("0", "{}")
    said.reason = reason
    assert Finish(expected) == said.close()[-1]


def test_an_end_without_a_reason_is_none(said):
    """Whatever was said, it is not all."""
    said.delta("text", "Hi")
    with pytest.raises(ProviderError, match="x: expected the stream to say why") as caught:
        said.close()
    assert "incomplete" == caught.value.code


# Tools that the provider runs


def tool_started(arguments=b"{}", name="shell"):
    return ToolStarted(call_id="c", name=name, arguments=encode_raw(json.loads(arguments)))


def tool_output(delta):
    return ToolOutputDelta(call_id="c", delta=delta)


def tool_finished(result, *, is_error=False, name="shell", source="provider"):
    return ToolFinished(
        call_id="c", name=name, result=encode_raw(result), is_error=is_error, source=source
    )


def test_each_step_of_a_tools_life_is_told_once(said):
    """However often the provider says it; the first name stays."""
    events = said.tool_started("c", "shell", {"cmd": "ls"})
    events += said.tool_started("c", "bash", {})
    events += said.tool_output("c", "a", "bash")
    events += said.tool_output("c", "")
    events += said.tool_finished("c", "bash", "a", is_error=True)
    events += said.tool_finished("c", "shell", "b", is_error=False)
    events += said.tool_output("c", "late")
    assert [
        tool_started(b'{"cmd":"ls"}'),
        tool_output("a"),
        tool_finished("a", is_error=True),
    ] == events
    assert not said.has_calls


def test_a_life_that_is_told_from_its_middle_or_its_end_has_a_beginning(said):
    """What is missing is made."""
    assert [tool_started(name="tool"), tool_output("a")] == said.tool_output("c", "a")
    other = Accumulator("x", "x")
    assert [tool_started(), tool_finished({"a": 1}, source="mcp")] == other.tool_finished(
        "c", "shell", {"a": 1}, is_error=False, source="mcp"
    )


@pytest.mark.parametrize(
    ("streamed", "result", "delta", "told"),
    [
        (["alpha\n", "beta\n"], "alpha\nbeta\n", None, "alpha\nbeta\n"),
        (["alpha\n"], "alpha\nbeta\n", "beta\n", "alpha\nbeta\n"),
        (["alpha\n"], "gamma", "gamma", "gamma"),
        (["alpha\n"], "", None, "alpha\n"),
        (["alpha\n"], None, None, None),
        (["alpha\n"], {"a": [1]}, None, {"a": [1]}),
        ([], "alpha", None, "alpha"),
        ([], "", None, ""),
        (["a" + HIGH, LOW], "a\U0001f600", None, "a\U0001f600"),
        (["a" + HIGH], "a" + HIGH + LOW, "\U0001f600", "a\U0001f600"),
        (["a" + HIGH], "a", None, "a"),
        (["a" + HIGH], "", "\ufffd", "a\ufffd"),
        (["a" + HIGH], 7, "\ufffd", 7),
        ([], HIGH, None, "\ufffd"),
    ],
)
def test_the_aggregate_of_output_repeats_goes_on_or_reconciles(said, streamed, result, delta, told):
    """As that of a part; where nothing was streamed, it stands with the end and nowhere else."""
    for piece in streamed:
        said.tool_output("c", piece, "shell")
    expected = [] if streamed else [tool_started()]
    expected += [] if delta is None else [tool_output(delta)]
    assert [*expected, tool_finished(told)] == said.tool_finished(
        "c", "shell", result, is_error=False
    )


# Whatever is said, in whichever order

TEXTS = st.sampled_from(["", "a", "bc", HIGH, LOW, "x" + HIGH, LOW + "y", "\x00", "\u2028"])
KEYS = st.sampled_from(["", "0", "1"])
PARTS = st.sampled_from(["text", "reasoning", "refusal", "tool_call"])
STEPS = st.one_of(
    st.tuples(st.just("delta"), PARTS.filter(lambda kind: kind != "tool_call"), TEXTS, KEYS),
    st.tuples(st.just("whole"), PARTS.filter(lambda kind: kind != "tool_call"), TEXTS, KEYS),
    st.tuples(st.just("finish"), PARTS, KEYS),
    st.tuples(st.just("finish_all"), PARTS),
    st.tuples(st.just("call_delta"), KEYS, TEXTS),
    st.tuples(st.just("finish_call"), KEYS),
    st.builds(
        lambda key, name, call_id: ("start", key, name, call_id),
        KEYS,
        st.sampled_from(["", "look"]),
        st.sampled_from([None, "", "c", "p.c1"]),
    ),
)


@given(st.lists(STEPS, max_size=30))
def test_every_part_begins_once_and_ends_once(steps):
    """Its deltas stand between, and only whole characters; all ids are unique."""
    said, events = Accumulator("x", "p."), []
    for name, *arguments in steps:
        if name == "start":
            key, call, call_id = arguments
            events += said.start_call(key, name=call, call_id=call_id)
        else:
            events += getattr(said, name)(*arguments)
    said.reason = "other"
    *rest, finish = said.close()
    assert Finish("other") == finish
    states, call_ids = {}, []
    for event in [*events, *rest]:
        state = states.get(event.part_id)
        match event:
            case PartStarted():
                assert state is None
                assert event.part_id.startswith("p.p")
                assert (event.kind == "tool_call") == (event.name is not None)
                call_ids.append(event.call_id or event.part_id)
                states[event.part_id] = event
            case PartDelta():
                assert event.kind == state.kind
                assert event.delta
                event.delta.encode()
            case PartFinished():
                assert (event.kind, event.name, event.call_id) == (
                    state.kind, state.name, state.call_id,
                )  # fmt: skip
                assert event.text
                event.text.encode()
                states[event.part_id] = "over"
    assert {"over"} >= set(states.values())
    assert len(call_ids) == len(set(call_ids))


# Streams of JSON over SSE


@attrs.define(eq=False)
class Words(SseNormalizer):
    """An API that says words, errors and ends."""

    provider: ClassVar[str] = "words"

    def take(self, name, value):
        """Take one frame."""
        match value:
            case {"word": word}:
                yield from self.said.delta("text", word, name)
            case {"error": error}:
                yield from self.said.delta("text", "(")
                raise upstream_error(self.provider, error)
            case {"over": reason}:
                self.said.reason = reason
            case _:
                yield self.unknown(value)


def heard(data, **options):
    """What comes of these bytes, however they are cut, and the error or None."""
    return however_cut(partial(Words, "m."), data, **options)


def frame(value, event=None):
    head = b"" if event is None else b"event: %b\n" % event.encode()
    return b"%bdata: %b\n\n" % (head, json.dumps(value).encode())


def test_frames_are_taken_by_name_and_value_however_they_are_cut():
    """The bytes of a character may be, too."""
    data = frame({"word": "a"}, "one") + ': ping\n\ndata: {\ndata: "word": "ü"}\n\n'.encode()
    data += b'\xef\xbb\xbfdata: {"word": "no"}\r\n\r\nid: 7\ndata:{"over":"stop"}\r\n\r\n'
    produced, error = heard(data)
    assert error is None
    assert [
        begun("m.p1"), more_of("m.p1", "a"), begun("m.p2"), more_of("m.p2", "ü"),
        ended("m.p1", "a"), ended("m.p2", "ü"), Finish("stop"),
    ] == produced  # fmt: skip


def test_what_is_no_object_is_handed_on():
    """Text that is no JSON, JSON that is no object, an object that nobody knows."""
    data = b"data: hello\n\ndata: [1]\n\ndata:\n\n" + frame({"x": None}) + frame({"over": "stop"})
    produced, error = heard(data)
    assert error is None
    raws = [b'"hello"', b"[1]", b'""', b'{"x":null}']
    assert [
        *(ProviderEvent(provider="words", raw=encode_raw(json.loads(raw))) for raw in raws),
        Finish("stop"),
    ] == produced


def test_done_is_the_end_and_no_frame():
    """The reader may leave; what comes all the same counts."""
    machine = Words("m.")
    assert not machine.is_over
    assert [] == list(machine.feed(b"data: [DONE]\n\n"))
    assert machine.is_over
    assert [] == list(machine.feed(frame({"over": "stop"})))
    assert [Finish("stop")] == list(machine.close())


def test_an_error_comes_after_what_came_before_it():
    """And it beats the finish that was told."""
    data = frame({"over": "stop"}) + frame({"error": "overloaded"}) + frame({"word": "no"})
    produced, error = heard(data)
    assert [begun("m.p1"), more_of("m.p1", "(")] == produced
    assert "overloaded" == error.code


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_last_frame_may_lack_its_blank_line(cut):
    """Some servers end with their last byte of JSON."""
    data = frame({"word": "a"}) + frame({"over": "stop"})
    produced, error = heard(data[: len(data) - cut])
    assert error is None
    assert Finish("stop") == produced[-1]


def test_a_last_frame_that_is_cut_off_is_no_end():
    """It is handed on as it came, and the call is incomplete."""
    produced, error = heard(frame({"word": "a"}) + b'data: {"over": "st')
    assert ProviderEvent(provider="words", raw=encode_raw('{"over": "st')) == produced[-1]
    assert "incomplete" == error.code


@pytest.mark.parametrize("is_ended", [False, True])
def test_a_frame_may_be_too_large(is_ended):
    """What came before it is told; then the stream cannot be read on."""
    machine = Words("m.")
    first = frame({"word": "a"}) + b"data: "
    assert 2 == len(list(machine.feed(first)))
    produced, error = play(lambda: machine, [b"x" * (MAX_FRAME + 1) + b"\n\n" * is_ended])
    assert [] == produced
    assert "malformed" == error.code
    assert f"words: expected frames of at most {MAX_FRAME} bytes" in error.message


def test_a_frame_that_is_too_large_is_seen_at_the_end_at_the_latest():
    """It may share its chunk with a good one, which is told first."""
    produced, error = play(partial(Words, "m."), [frame({"word": "a"}) + b"x" * (MAX_FRAME + 1)])
    assert [begun("m.p1"), more_of("m.p1", "a")] == produced
    assert "malformed" == error.code


def test_the_words_are_a_subclass_s():
    """There is no API without them."""

    class Wordless(SseNormalizer):
        provider = "wordless"

    with pytest.raises(NotImplementedError):
        list(Wordless("m.").feed(b"data: {}\n\n"))


# Foreign JSON


@pytest.mark.parametrize(
    ("data", "value", "raw"),
    [
        ('{"a":[1,2.5,null,true,"x"]}', {"a": [1, 2.5, None, True, "x"]}, None),
        (b'{"a":1}', {"a": 1}, None),
        ("hello", "hello", b'"hello"'),
        ("", "", b'""'),
        ('{"a":1} x', '{"a":1} x', rb'"{\"a\":1} x"'),
        (b"\xff1", "\ufffd1", '"\ufffd1"'.encode()),
        (r'"\ud83d\ude00"', "\U0001f600", '"\U0001f600"'.encode()),
        (r'{"\ud83d":"\ude00"}', {HIGH: LOW}, '{"\ufffd":"\ufffd"}'.encode()),
        (f'"{HIGH}"', HIGH, '"\ufffd"'.encode()),
        (f"[{HIGH}", f"[{HIGH}", '"[\ufffd"'.encode()),
        ('{"a":1e999,"b":-Infinity}', {"a": float("inf"), "b": float("-inf")},
         b'{"a":"inf","b":"-inf"}'),
        ("12345678901234567890123", 12345678901234567890123, None),
        ("-9223372036854775809", -9223372036854775809, None),
        ("1" * 5000, "1" * 5000, b'"%b"' % (b"1" * 5000)),
        ("[" * 100_000, "[" * 100_000, b'"%b"' % (b"[" * 100_000)),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_whatever_a_provider_means_as_json_is_read_and_written(data, value, raw):
    """What is no JSON is text; what JSON cannot hold is mended."""
    assert value == decode_foreign(data)
    assert (data.encode() if raw is None and isinstance(data, str) else raw or data) == bytes(
        encode_raw(value)
    )


def test_not_a_number_is_told_as_a_word():
    """Python reads it, JSON has no word for it."""
    assert b'[{"a":"nan"}]' == bytes(encode_raw(decode_foreign('[{"a":NaN}]')))


def test_what_is_nested_too_deeply_is_cut():
    """And what is beside it stays; whatever holds it may be broken elsewhere."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    written = bytes(encode_raw({"a": deep, "b": HIGH, 7: 8}))
    assert written.startswith(b'{"a":[[[')
    assert written.endswith('"b":"\ufffd","7":8}'.encode())
    assert written.count(b"[") <= 101


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, 7), (0, 0), (-1, 0), (7.5, 0), ("7", 0), (True, 0), (None, 0), (1 << 53, 0)],
)
def test_a_count_is_a_count(value, expected):
    """Anything else is none."""
    assert expected == number(value)


def test_a_text_is_a_text():
    """Anything else is none."""
    assert ["a", "", "", ""] == [text_of(value) for value in ("a", None, 7, ["a"])]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a":1}', {"a": 1}),
        ("", {}),
        ("{", {"_raw": "{"}),
        ("[1]", {"_raw": "[1]"}),
    ],
)
def test_arguments_are_an_object(arguments, expected):
    """What is none can be sent back as the model wrote it."""
    assert expected == ToolCall("c", "look", arguments).decoded()


# What goes wrong

OPENAI = "This model's maximum context length is 8192 tokens. However, your messages resulted in"
NESTED = (
    """litellm.BadRequestError: AnthropicException - b'{"type":"error","error":{"type":"""
    """"invalid_request_error","message":"input length and `max_tokens` exceed context limit: """
    """179413 + 32768 > 200000"}}'. Received Model Group=x"""
)
REQUESTS_PER_MINUTE = {
    "code": 429,
    "message": "You exceeded your current quota, please check your plan and billing details.",
    "status": "RESOURCE_EXHAUSTED",
    "details": [
        {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}],
        },
        {"@type": "type.googleapis.com/google.rpc.Help", "links": [{"url": "https://x"}]},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36.5s"},
    ],
}


def error(message, **fields):
    return {"message": message, **fields}


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [
        # OpenAI, and Azure
        (400, error(f"{OPENAI} 9000 tokens.", code="context_length_exceeded",
                    type="invalid_request_error"), "context_length"),
        (None, error("Your input exceeds the context window of this model. Please adjust your "
                     "input and try again.", code="context_length_exceeded"), "context_length"),
        (400, error("Input tokens exceed the configured limit of 272000 tokens. Your messages "
                    "resulted in 509178 tokens.", type="invalid_request_error"), "context_length"),
        (400, error("Invalid 'input[0].content': string too long.", type="invalid_request_error",
                    code="string_above_max_length"), "context_length"),
        (429, error("You exceeded your current quota, please check your plan and billing details.",
                    type="insufficient_quota", code="insufficient_quota"), "quota"),
        (429, error("Rate limit reached for gpt-4o in organization org-x on tokens per min (TPM): "
                    "Limit 30000, Used 29000, Requested 4000. Please try again in 6s.",
                    type="tokens", code="rate_limit_exceeded"), "rate_limit"),
        (None, error("Rate limit reached", code="rate_limit_exceeded"), "rate_limit"),
        (503, error("Slow down", code="slow_down"), "rate_limit"),
        (401, error("Incorrect API key provided: sk-ab***yz.", type="invalid_request_error",
                    code="invalid_api_key"), "auth"),
        (403, error("Country, region, or territory not supported",
                    code="unsupported_country_region_territory"), "auth"),
        (404, error("The model `gpt-9` does not exist or you do not have access to it.",
                    type="invalid_request_error", code="model_not_found"), "not_found"),
        (400, error("Invalid prompt: your prompt was flagged as potentially violating our usage "
                    "policy.", type="invalid_request_error", code="invalid_prompt"),
         "content_filter"),
        (400, error("The response was filtered due to the prompt triggering Azure OpenAI's content "
                    "management policy.", code="content_filter", status=400), "content_filter"),
        (404, error("Resource not found", code="404"), "not_found"),
        (400, error("Unsupported value: 'temperature' does not support 0.2 with this model.",
                    type="invalid_request_error", code="unsupported_value"), "bad_request"),
        (500, error("The server had an error processing your request.", type="server_error"),
         "server_error"),
        (None, error("The server had an error processing your request.", code="server_error"),
         "server_error"),
        (503, error("The engine is currently overloaded, please try again later",
                    type="server_error"), "overloaded"),
        # Anthropic
        (400, error("prompt is too long: 208310 tokens > 200000 maximum",
                    type="invalid_request_error"), "context_length"),
        (400, error("input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, "
                    "decrease input length or `max_tokens` and try again",
                    type="invalid_request_error"), "context_length"),
        (413, error("Request exceeds the maximum size", type="request_too_large"),
         "context_length"),
        (400, error("Your credit balance is too low to access the Anthropic API. Please go to "
                    "Plans & Billing to upgrade or purchase credits.",
                    type="invalid_request_error"), "quota"),
        (402, error("Payment failed", type="billing_error"), "quota"),
        (400, error("Output blocked by content filtering policy", type="invalid_request_error"),
         "content_filter"),
        (401, error("invalid x-api-key", type="authentication_error"), "auth"),
        (403, error("Your API key does not have permission", type="permission_error"), "auth"),
        (404, error("model: claude-9", type="not_found_error"), "not_found"),
        (429, error("This request would exceed your organization's rate limit of 40,000 input "
                    "tokens per minute.", type="rate_limit_error"), "rate_limit"),
        (500, error("Internal server error", type="api_error"), "server_error"),
        (504, error("Request timed out", type="timeout_error"), "timeout"),
        (529, error("Overloaded", type="overloaded_error"), "overloaded"),
        (None, error("Overloaded", type="overloaded_error"), "overloaded"),
        (None, error("Internal server error", type="api_error"), "server_error"),
        # Gemini
        (400, error("The input token count (1189912) exceeds the maximum number of tokens allowed "
                    "(1048575).", code=400, status="INVALID_ARGUMENT"), "context_length"),
        (400, error("The input token count exceeds the maximum number of tokens allowed 1048576.",
                    code=400, status="INVALID_ARGUMENT"), "context_length"),
        (400, error("API key not valid. Please pass a valid API key.", code=400,
                    status="INVALID_ARGUMENT"), "auth"),
        (403, error("Method doesn't allow unregistered callers", code=403,
                    status="PERMISSION_DENIED"), "auth"),
        (404, error("models/gemini-9 is not found for API version v1beta", code=404,
                    status="NOT_FOUND"), "not_found"),
        (429, REQUESTS_PER_MINUTE, "rate_limit"),
        (429, error("You exceeded your current quota, please check your plan and billing details.",
                    code=429, status="RESOURCE_EXHAUSTED", details=[{"violations": [
                        {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}]),
         "quota"),
        (None, REQUESTS_PER_MINUTE, "rate_limit"),
        (503, error("The model is overloaded. Please try again later.", code=503,
                    status="UNAVAILABLE"), "overloaded"),
        (None, error("The model is overloaded.", code=503, status="UNAVAILABLE"), "overloaded"),
        (500, error("An internal error has occurred.", code=500, status="INTERNAL"),
         "server_error"),
        (504, error("Deadline expired", code=504, status="DEADLINE_EXCEEDED"), "timeout"),
        (400, error('Invalid JSON payload received. Unknown name "x"', code=400,
                    status="INVALID_ARGUMENT"), "bad_request"),
        # vLLM
        (400, error("This model's maximum context length is 4096 tokens. However, you requested "
                    "5000 tokens (4900 in the messages, 100 in the completion).", object="error",
                    type="BadRequestError", param=None, code=400), "context_length"),
        (400, error("You passed 1015 input tokens and requested 10 output tokens. However, the "
                    "model's context length is only 1024 tokens", type="BadRequestError",
                    code=400), "context_length"),
        (400, error("The decoder prompt (length 5000) is longer than the maximum model length of "
                    "4096.", type="BadRequestError", code=400), "context_length"),
        (400, error("max_tokens must be at least 1, got -186.", type="BadRequestError", code=400),
         "bad_request"),
        (404, error("The model `x` does not exist.", object="error", type="NotFoundError",
                    code=404), "not_found"),
        (None, error("EngineCore encountered an issue.", type="InternalServerError", code=500),
         "server_error"),
        (None, error("Bad", type="BadRequestError", code=400), "bad_request"),
        # llama.cpp
        (400, error("request (4390 tokens) exceeds the available context size (4096 tokens), try "
                    "increasing it", code=400, type="exceed_context_size_error"),
         "context_length"),
        (None, error("the request exceeds the available context size. try increasing the context "
                     "size or enable context shift", code=400, type="exceed_context_size_error"),
         "context_length"),
        (500, error("Context size has been exceeded.", code=500, type="server_error"),
         "context_length"),
        (503, error("Loading model", code=503, type="unavailable_error"), "overloaded"),
        (401, error("Invalid API Key", code=401, type="authentication_error"), "auth"),
        # Ollama
        (404, "model 'llama9' not found", "not_found"),
        (404, error('model "llama9" not found, try pulling it first', type="api_error"),
         "not_found"),
        (400, "the input length exceeds the context length", "context_length"),
        (500, "model requires more system memory (9.2 GiB) than is available (7.1 GiB)",
         "server_error"),
        (503, "server busy, please try again.  maximum pending requests exceeded", "overloaded"),
        (None, "an error was encountered while running the model: unexpected EOF",
         "provider_error"),
        # LiteLLM
        (400, error("litellm.ContextWindowExceededError: litellm.BadRequestError: OpenAIException "
                    "- too long", type=None, param=None, code="400"), "context_length"),
        (400, error(NESTED, type=None, code="400"), "context_length"),
        (400, error("litellm.BadRequestError: litellm.ContentPolicyViolationError: Azure",
                    type=None, code="400"), "content_filter"),
        (429, error("litellm.RateLimitError: RateLimitError: OpenAIException - You exceeded your "
                    "current quota", type="throttling_error", code="429"), "rate_limit"),
        (401, error("litellm.AuthenticationError: bad", type="auth_error", code="401"), "auth"),
        (None, error("litellm.InternalServerError: it broke", type=None, code="500"),
         "server_error"),
        # Others
        (422, error("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. "
                    "Given: 5000", type="validation"), "context_length"),
        (400, error("Prompt contains 40000 tokens and 0 draft tokens, too large for model with "
                    "32768 maximum context length", type="invalid_request_error"),
         "context_length"),
        (400, error("too many tokens: total number of tokens cannot exceed 4081"),
         "context_length"),
        (429, error("Too many tokens, please wait before trying again."), "rate_limit"),
        (None, error("Too many tokens, please wait before trying again."), "provider_error"),
        (402, error("Insufficient Balance", type="unknown_error", code="invalid_request_error"),
         "quota"),
        (402, error("This request requires more credits", code=402), "quota"),
        (None, error("Provider returned error", code=429), "rate_limit"),
        (None, "Too Many Requests", "rate_limit"),
        (None, "Request timed out.", "timeout"),
        (None, "401 Unauthorized", "auth"),
        (None, "The model x does not exist", "not_found"),
        (None, "Internal Server Error", "server_error"),
        (None, "context_length_exceeded", "context_length"),
        (None, "service temporarily unavailable", "overloaded"),
        # Nothing but a status, or not even that
        (405, "", "bad_request"),
        (408, "", "timeout"),
        (409, None, "bad_request"),
        (413, "<html>", "context_length"),
        (418, {}, "bad_request"),
        (502, "Bad Gateway", "server_error"),
        (504, "", "timeout"),
        (520, "", "server_error"),
        (524, "", "timeout"),
        (529, "", "overloaded"),
        (307, "", "bad_request"),
        (None, "", "provider_error"),
        (None, None, "provider_error"),
        (None, {"code": True, "type": ["x"], "status": 0}, "provider_error"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_errors_are_told_apart(status, said, code):
    """By their names, then by what they say, then by the status: so they can be acted upon."""
    assert code == upstream_error("api", said, status=status).code


@pytest.mark.parametrize(
    "quoted",
    [
        "prompt is too long",
        "You exceeded your current quota",
        "Incorrect API key",
        "Output blocked by content filtering policy",
        "too many requests: rate limit",
        "the model x does not exist",
        "it's overloaded, and timed out",
    ],
)
@pytest.mark.parametrize(
    "message",
    [
        "[{'type': 'missing', 'loc': ('body', 'model'), 'input': {'content': '%s'}}]",
        "[{'msg': 'Field required', 'input': \"%s\"}]",
        'Invalid value: "%s". Supported values are: "auto"',
        "Could not parse `%s` as JSON",
        'Invalid JSON: {"role":"user","content":"%s"}',
        r"Invalid JSON: {\"role\":\"user\",\"content\":\"%s\"}",
    ],
)
def test_what_a_user_wrote_is_not_what_went_wrong(message, quoted):
    """An error may quote the request: that tells nothing about it."""
    if "'%s'" in message:
        quoted = quoted.replace("it's", "it is")
    told = message % quoted
    assert "bad_request" == upstream_error("api", told, status=400).code
    assert "provider_error" == upstream_error("api", told).code


def test_numbers_in_a_message_are_no_status():
    """Only a code is."""
    said = "expected at most 404 messages, got 503; 429 would do"
    assert "bad_request" == upstream_error("api", said, status=400).code
    assert "provider_error" == upstream_error("api", said).code


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        (error("It\n broke", code="x"), 500, "api answered with status 500 (x): It broke"),
        (error("It", code=7, type="y", status="Z"), None, "api answered (7, y, Z): It"),
        (error(HIGH + "a", code=LOW), None, "api answered (\ufffd): \ufffda"),
        (error("", code="x"), None, "api answered (x): (no message)"),
        (error(None), None, "api answered: (no message)"),
        ({"why": [1]}, None, 'api answered: {"why":[1]}'),
        ([{"loc": ["a"]}], 422, 'api answered with status 422: [{"loc":["a"]}]'),
        ("text", None, "api answered: text"),
        ("", 500, "api answered with status 500: (no message)"),
        (7, None, "api answered: 7"),
        ("x" * 501, None, f"api answered: {'x' * 500}..."),
        (error("a", code="c" * 300), None, f"api answered ({'c' * 198}: a"),
        ("Bearer canary", None, "api answered: Bearer [redacted]"),
        ("x" * 490 + " sk-canary1234", None, f"api answered: {'x' * 490} [redacted..."),
        (error("a", type="sk-canary1234"), None, "api answered ([redacted]): a"),
    ],
    ids=itertools.count(),
)
def test_an_error_says_who_said_what(said, status, expected):
    """In one line of bounded length, without what looks like a key, and never half of one."""
    assert expected == upstream_error("api", said, status=status).message


@pytest.mark.parametrize("piece", ["'", "<", '"message":', "{", '"a', "://:"])
def test_a_hostile_error_is_an_error(piece):
    """However large: a pattern that is quadratic in it would be noticed here, by waiting."""
    text = piece * (MAX_FRAME // len(piece))
    assert upstream_error("api", text).message.startswith("api answered: ")
    providers._plain(text[:MAX_ERROR_BODY])


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ([{"retryDelay": "36s"}], 36),
        ([{"@type": "x"}, {"retryDelay": "0.25s"}], 0.25),
        ([{"retryDelay": "-1s"}], None),
        ([{"retryDelay": 7}], None),
        ([{"retryDelay": "soon"}], None),
        (["retryDelay"], None),
        ({"retryDelay": "7s"}, None),
        (None, None),
    ],
)
def test_an_error_may_say_when_to_come_back(details, expected):
    """As google.rpc.RetryInfo; what the response's head says goes first."""
    said = {"message": "No", "details": details}
    assert expected == upstream_error("api", said).retry_after
    assert 1 == upstream_error("api", said, retry_after=1).retry_after


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after-ms": "nan", "retry-after": "7"}, 7),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10),
        ({"retry-after": "Thu, 01 Jan 1970 01:16:50 +0100"}, 10),
        ({"retry-after": "Thu, 01 Jan 1970 00:16:50 -0000"}, 10),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "Thu, 99 Jan 1970 00:16:50 GMT"}, None),
        ({"retry-after": "Thu, 01 Jan 99999 00:16:50 GMT"}, None),
    ],
)
def test_when_to_come_back_is_told_in_seconds_or_as_a_date(headers, expected):
    """RFC 9110, section 10.2.3; milliseconds are OpenAI's. Nonsense tells nothing."""
    assert expected == retry_after(headers, now=1000)


# APIs over HTTP


@attrs.frozen
class WordsApi:
    """An API at a URL; the prompt's model is all it wants to know."""

    kind: ClassVar[str] = "words"

    url: str

    def request(self, prompt):
        """Write a model call."""
        return HttpRequest(self.url, {"authorization": "Bearer k"}, {"model": prompt.model})

    def normalizer(self, prefix):
        """Make a machine."""
        return Words(prefix)


@attrs.frozen
class Run:
    """A run, as far as a provider may know it."""

    window: float = 0.001
    lulls: list = attrs.field(factory=list)

    async def sleep_until(self, when):
        """Wait."""
        await trio.sleep_until(when)

    def lull(self):
        """Note it."""
        self.lulls.append(1)


@attrs.define(eq=False)
class Upstream:
    """A server that answers each request with the same bytes; made by `answering`."""

    port: int = 0
    answer: bytes = b""
    heads: list = attrs.field(factory=list)
    inside: int = 0

    @property
    def url(self):
        """Where to call."""
        return f"http://127.0.0.1:{self.port}/v1/words"

    async def serve(self, stream):
        """Serve one connection."""
        self.inside += 1
        with suppress(trio.BrokenResourceError):
            async with stream:
                while received := await stream.receive_some():
                    while not received.endswith(b"}"):
                        received += await stream.receive_some()
                    self.heads.append(received)
                    await stream.send_all(self.answer)
        self.inside -= 1


@asynccontextmanager
async def answering(body, *, status=b"200 OK", type=b"text/event-stream", headers=b""):
    """Serve on a free port of loopback; leaving the context ends it."""
    head = b"HTTP/1.1 %b\r\ncontent-length: %d\r\n%b" % (status, len(body), headers)
    if type:
        head += b"content-type: %b\r\n" % type
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            upstream = Upstream(port, head + b"\r\n" + body)
            await nursery.start(trio.serve_listeners, upstream.serve, listeners)
            yield upstream
            nursery.cancel_scope.cancel()


def provider_at(upstream, **fields):
    return HttpProvider("api", WordsApi(upstream.url), **fields)


PROMPT = Prompt("m", (UserMessage("Hi"),))


async def call(provider):
    """Call the model, and take all that comes."""
    async with provider.open(Run()) as connection:
        machine, produced = connection.normalizer("m."), []
        async with connection.stream(PROMPT) as chunks:
            async for chunk in chunks:
                produced += machine.feed(chunk)
        return [*produced, *machine.close()]


async def refusal(upstream, **fields):
    """How a call is refused."""
    with pytest.raises(ProviderError) as caught:
        await call(provider_at(upstream, **fields))
    return caught.value


STREAM = frame({"word": "Hi"}) + frame({"over": "stop"})


@pytest.mark.parametrize("type", [b"text/event-stream; charset=utf-8", b"Text/Plain", b""])
async def test_a_call_is_a_post_whose_answer_is_a_stream(type):
    """Some servers say that it is text, or nothing about it."""
    async with answering(STREAM, type=type) as upstream:
        expected = [begun("m.p1"), more_of("m.p1", "Hi"), ended("m.p1", "Hi"), Finish("stop")]
        assert expected == await call(provider_at(upstream))
        [request] = upstream.heads
        head, _, body = request.partition(b"\r\n\r\n")
        assert b'{"model":"m"}' == body
        assert head.startswith(b"POST /v1/words HTTP/1.1\r\n")
        for line in (
            b"content-type: application/json",
            b"accept: text/event-stream",
            b"authorization: Bearer k",
        ):
            assert line in head.split(b"\r\n")


async def test_the_calls_of_a_run_share_a_connection_and_its_pace():
    """The client is told the run's window, and tells the run its lulls; it is closed with it."""
    run, opened = Run(), []

    def open_client(**options):
        opened.append(options)
        return open_http(**options)

    async with answering(STREAM) as upstream:
        provider = provider_at(upstream, open_client=open_client)
        async with provider.open(run) as connection:
            for _ in range(2):
                async with connection.stream(PROMPT) as chunks:
                    assert STREAM == b"".join([chunk async for chunk in chunks])
            assert 1 == upstream.inside
        await wait_until(lambda: not upstream.inside)
    assert [{"window": run.window, "lull": run.lull, "sleep_until": run.sleep_until}] == opened


async def test_a_stream_that_is_left_is_closed():
    """Before the run is over."""
    async with answering(STREAM * 10_000) as upstream, provider_at(upstream).open(Run()) as api:
        async with api.stream(PROMPT) as chunks:
            assert await anext(chunks)
        await wait_until(lambda: not upstream.inside)
        assert [] == [chunk async for chunk in chunks]


async def test_who_is_cancelled_in_a_stream_closes_it():
    """As any other way out of it."""
    partial_answer = STREAM[:20]
    async with answering(partial_answer) as upstream, provider_at(upstream).open(Run()) as api:
        upstream.answer = upstream.answer.replace(b": 20", b": 99")
        with trio.CancelScope() as scope:
            async with api.stream(PROMPT) as chunks:
                assert partial_answer == await anext(chunks)
                scope.cancel()
                await anext(chunks)
        assert scope.cancelled_caught
        await wait_until(lambda: not upstream.inside)


NGINX = b"<html><head><title>404 Not Found</title><style>a{}</style></head><body><h1>404 Not Found"
JSON = b"application/json"


@pytest.mark.parametrize(
    ("status", "type", "body", "code", "message"),
    [
        (401, JSON, b'{"error":{"message":"No","type":"authentication_error"}}', "auth",
         "api answered with status 401 (authentication_error): No"),
        (429, JSON, b'[{"error":{"code":429,"message":"No","status":"RESOURCE_EXHAUSTED"}}]',
         "rate_limit", "api answered with status 429 (429, RESOURCE_EXHAUSTED): No"),
        (400, JSON, b'{"type":"error","error":{"type":"invalid_request_error","message":"No"}}',
         "bad_request", "api answered with status 400 (invalid_request_error): No"),
        (404, JSON, b'{"object":"error","message":"No","type":"NotFoundError","code":404}',
         "not_found", "api answered with status 404 (404, NotFoundError): No"),
        (404, JSON, b'{"error":"model \'x\' not found"}', "not_found",
         "api answered with status 404: model 'x' not found"),
        (401, JSON, b'{"error":"invalid_token","message":"No"}', "auth",
         "api answered with status 401 (invalid_token): No"),
        (500, JSON, b'{"error":true,"message":"No"}', "server_error",
         "api answered with status 500: No"),
        (500, JSON, b'{"error":null,"message":"No"}', "server_error",
         "api answered with status 500: No"),
        (404, JSON, b'{"detail":"Not Found"}', "not_found",
         "api answered with status 404: Not Found"),
        (422, JSON, b'{"detail":[{"loc":["body","model"]}]}', "bad_request",
         'api answered with status 422: [{"loc":["body","model"]}]'),
        (400, JSON, b'{"errors":["No"]}', "bad_request",
         'api answered with status 400: {"errors":["No"]}'),
        (400, JSON, b"[]", "bad_request", "api answered with status 400: []"),
        (400, JSON, b'["No"]', "bad_request", 'api answered with status 400: ["No"]'),
        (500, JSON, b"null", "server_error", "api answered with status 500: null"),
        (404, b"text/html", NGINX, "not_found",
         "api answered with status 404: 404 Not Found 404 Not Found; is base_url right?"),
        (405, b"text/html", b"", "bad_request",
         "api answered with status 405: (no message); is base_url right?"),
        (502, b"text/html", b"<h1>Bad<br>Gateway</h1>", "server_error",
         "api answered with status 502: Bad Gateway"),
        (503, b"text/plain", b"no healthy\n upstream", "overloaded",
         "api answered with status 503: no healthy upstream"),
        (500, b"", b"", "server_error", "api answered with status 500: (no message)"),
        (500, b"", b"\xff\x00", "server_error", "api answered with status 500: \ufffd\x00"),
        (200, JSON, b'{"error":{"message":"Busy","type":"overloaded_error"}}', "overloaded",
         "api answered (overloaded_error): Busy"),
        (200, JSON, b'{"error":{"message":"Busy","code":529}}', "overloaded",
         "api answered (529): Busy"),
        (200, JSON, b'{"id":"x","choices":[]}', "malformed",
         ("api: expected a stream (text/event-stream), got application/json: "
          """'{"id":"x","choices":[]}'; is base_url right?""")),
        (200, b"text/html; charset=utf-8", b"<!doctype html><title>Hi</title>", "malformed",
         "api: expected a stream (text/event-stream), got text/html: 'Hi'; is base_url right?"),
        (204, b"", b"", "bad_request", "api answered with status 204: (no message)"),
    ],
    ids=itertools.count(),
)  # fmt: skip
async def test_an_answer_that_is_no_stream_says_what_it_is(status, type, body, code, message):
    """In JSON of any shape, in a page for people, in text, or not at all."""
    if status == 204:  # it has no body, and no length
        body = b""
    async with answering(body, status=b"%d X" % status, type=type) as upstream:
        error = await refusal(upstream)
        assert (code, message) == (error.code, error.message)
        await wait_until(lambda: not upstream.inside)


@pytest.mark.parametrize(
    ("headers", "where"),
    [(b"location: https://x/v2\r\n", "https://x/v2"), (b"", "nowhere")],
)
async def test_a_redirect_says_where_to(headers, where):
    """A key is not taken there."""
    async with answering(b"Moved", status=b"308 X", headers=headers) as upstream:
        error = await refusal(upstream)
        assert (
            f"api answered with status 308: a redirect to {where}; is base_url right?"
            == error.message
        )
        assert 1 == len(upstream.heads)


async def test_an_error_says_when_to_come_back():
    """By the head of the response: seconds, or a date."""
    later = format_datetime(
        providers.dt.datetime.now(providers.dt.UTC) + providers.dt.timedelta(hours=1), usegmt=True
    )
    body = b'{"error":{"message":"No"}}'
    for value, low, high in (("7", 7, 7), (later, 3000, 3600)):
        headers = b"retry-after: %b\r\n" % value.encode()
        async with answering(body, status=b"429 X", type=JSON, headers=headers) as upstream:
            error = await refusal(upstream)
            assert low <= error.retry_after <= high


async def test_a_long_error_is_bounded():
    """However long it is: a part of it is read, and a part of that is told."""
    body = b"<p>" + b"word " * 1_000_000
    async with answering(body, status=b"500 X", type=b"text/html") as upstream:
        error = await refusal(upstream)
        assert len(error.message) < 600
        await wait_until(lambda: not upstream.inside)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b'{"error":{"message":"Incorrect API key provided: canary-1234."}}'),
        (401, b'{"error":{"message":"%b canary-1234"}}' % (b"x" * 495)),
        (401, b'{"error":{"message":"No","code":"canary-1234"}}'),
        (401, rb'{"error":{"message":"\u0063anary-1234"}}'),
        (500, b"<p>canary-1234</p>"),
        (500, b"canary-<b>1234</b>"[:7] + b"1234"),
        (200, b'{"key":"canary-1234"}'),
    ],
)
async def test_a_key_that_the_api_repeats_is_blanked(status, body):
    """Wherever it stands, and before anything is cut."""
    async with answering(body, status=b"%d X" % status, type=JSON) as upstream:
        provider = provider_at(upstream, key="canary-1234")
        error = await refusal(upstream, key="canary-1234")
        assert "canar" not in f"{error!r}{error.message}{error.__cause__}"
        assert "canary" not in repr(provider)


async def test_a_blanked_error_is_the_same_error():
    """With its code, and when to come back."""
    body = rb'{"error":{"message":"slow down, \u0063anary-1234"}}'
    headers = b"retry-after: 7\r\n"
    async with answering(body, status=b"429 X", type=JSON, headers=headers) as upstream:
        error = await refusal(upstream, key="canary-1234")
    assert "api answered with status 429: slow down, [redacted]" == error.message
    assert ("rate_limit", 7, None) == (error.code, error.retry_after, error.__cause__)


@pytest.mark.parametrize("key", ["", "x", "123", "none", "ollama", "EMPTY", "my-key"])
async def test_a_key_that_is_none_blanks_nothing(key):
    """Servers at home want a word; it may be in any sentence."""
    body = b'{"error":{"message":"ollama: x, none, 123, EMPTY, my-key"}}'
    async with answering(body, status=b"500 X", type=JSON) as upstream:
        error = await refusal(upstream, key=key)
    message = "api answered with status 500: ollama: x, none, 123, EMPTY, my-key"
    assert message == error.message


@pytest.mark.parametrize("key", ["k-123", "a" * 8])
async def test_a_key_may_be_short(key):
    """Whatever is no mere word is one."""
    body = b'{"error":{"message":"no %b"}}' % key.encode()
    async with answering(body, status=b"500 X", type=JSON) as upstream:
        error = await refusal(upstream, key=key)
    assert "api answered with status 500: no [redacted]" == error.message


async def test_an_error_in_the_middle_of_a_stream_is_blanked_as_well():
    """As it is taken while the stream is open."""
    async with answering(frame({"error": "no such key: canary-1234"})) as upstream:
        error = await refusal(upstream, key="canary-1234")
    assert "words answered: no such key: [redacted]" == error.message


async def test_an_error_without_the_key_in_it_is_left_as_it_is():
    """Its causes are for the log."""
    async with answering(b"") as upstream:
        port = upstream.port
    error = await refusal(Upstream(port), key="canary-1234")
    assert "unreachable" == error.code
    assert error.__cause__ is not None


def test_an_error_event_without_json_is_an_error_all_the_same():
    """Its text is what is told."""

    class Plain(SseNormalizer):
        provider = "plain"

    with pytest.raises(ProviderError, match="plain answered: rate limit, slow down") as refused:
        list(Plain("m1").feed(b"event: error\ndata: rate limit, slow down\n\n"))
    assert "rate_limit" == refused.value.code


@pytest.mark.parametrize(
    "text",
    ["Mon, 1 Jan 99999999999999999999 00:00:00 GMT", "Mon, 1 Jan 9999 00:00:00 -99999999999"],
)
def test_a_year_that_no_clock_has_is_no_time_to_come_back(text):
    """It is as if nothing had been said."""
    assert retry_after({"retry-after": text}, now=0.0) in (None, 0.0)


async def test_what_is_left_of_a_key_that_was_cut_is_blanked():
    """Half of it would be worth guessing at."""
    key = "canary-0123456789abcdef"
    said = json.dumps({"error": {"message": "x " * 244 + key}}).encode()
    async with answering(b"data: " + said + b"\n\n") as upstream:
        with pytest.raises(ProviderError) as refused:
            await call(provider_at(upstream, key=key))
    assert "x x [redacted]..." in refused.value.message
    assert "canary" not in refused.value.message


@pytest.mark.parametrize("depth", [600, 100_000])
def test_json_that_is_nested_too_deeply_is_text(depth):
    """Whatever Python itself can read: it could not be written again."""
    data = '["\\ud83d",' + "[" * depth + "]" * depth + "]"
    assert data == decode_foreign(data)


def test_json_that_is_wide_is_not_deep():
    """However many lists there are side by side."""
    assert [[]] * 1_000 == decode_foreign("[" + ",".join(["[]"] * 1_000) + "]")
