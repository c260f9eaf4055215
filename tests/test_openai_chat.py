"""Chat completions: what is asked, and what every kind of stream is turned into.

The streams are of the shapes that servers send, made up here; each is fed whole, byte by byte and
in two at every position.
"""

import json

import attrs
import h11
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
from agentsse.providers import Api, Finish, HttpProvider, Prompt
from agentsse.providers.openai_chat import OpenAIChatApi, OpenAIChatNormalizer

DONE = b"data: [DONE]\n\n"


def frame(value):
    """One frame; text stands in it as it is."""
    return b"data: %b\n\n" % (value if isinstance(value, str) else json.dumps(value)).encode()


def delta(finish=None, /, **fields):
    """A chunk whose only choice has this delta."""
    return frame({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})


def message(finish=None, /, **fields):
    """A chunk that is shaped as the answer of a call that does not stream."""
    return frame({"choices": [{"index": 0, "message": fields, "finish_reason": finish}]})


def call(*entries, finish=None):
    """A chunk with pieces of tool calls."""
    return delta(finish, tool_calls=list(entries))


def entry(arguments=None, /, name=None, **fields):
    """A piece of a tool call: what is None is left out."""
    function = {"name": name, "arguments": arguments}
    return fields | {"function": {k: v for k, v in function.items() if v is not None}}


@attrs.frozen
class Answer:
    """What came of a stream."""

    events: list
    finish: Finish | None
    error: Exception | None

    @property
    def parts(self):
        """Kind and text of each."""
        return [(e.kind, e.text) for e in self.events if isinstance(e, PartFinished)]

    @property
    def calls(self):
        """Call id, name and arguments of each."""
        found = [e for e in self.events if isinstance(e, PartFinished) and e.kind == "tool_call"]
        return [(e.call_id, e.name, e.text) for e in found]

    @property
    def handed_on(self):
        """What was not understood."""
        return [decode_json(e.raw) for e in self.events if isinstance(e, ProviderEvent)]

    @property
    def reason(self):
        """Why the model stopped, where the stream said so."""
        return self.finish and self.finish.reason


def read(*frames, every=1):
    """Read a stream, however it is cut, and look whether its events are sound."""
    produced, error = however_cut(machine, b"".join(frames), every=every)
    check_sound(produced, error)
    finish = produced[-1] if error is None else None
    return Answer([one for one in produced if not isinstance(one, Finish)], finish, error)


def machine():
    return OpenAIChatNormalizer("m1", base_url="http://here/v1")


@attrs.define(eq=False)
class Unhurried(OpenAIChatNormalizer):
    """What the machine is without its short way for text."""

    prefix: str = "m1"
    base_url: str = attrs.field(default="http://here/v1", kw_only=True)

    def take_text(self, _frame):
        """Leave everything to `take`."""


def check_sound(produced, error, *, has_aggregates=False):
    """What holds for every stream whatever."""
    said, started, finished = {}, {}, set()
    for event in produced:
        match event:
            case PartStarted(part_id=part_id):
                assert part_id not in started
                assert part_id.startswith("m1")
                assert (event.kind == "tool_call") == bool(event.name) == bool(event.call_id)
                started[part_id], said[part_id] = event, ""
            case PartDelta(part_id=part_id):
                assert part_id not in finished
                assert event.kind == started[part_id].kind
                assert event.delta
                said[part_id] += event.delta
            case PartFinished(part_id=part_id):
                assert part_id not in finished
                start = started[part_id]
                told = (start.kind, start.name, start.call_id)
                assert told == (event.kind, event.name, event.call_id)
                assert has_aggregates or said[part_id] == event.text
                finished.add(part_id)
            case _:
                assert isinstance(event, ProviderEvent | Finish)
        if not isinstance(event, Finish):
            encode_event(event)
    call_ids = [part.call_id for part in started.values() if part.call_id]
    assert len(call_ids) == len(set(call_ids))
    finishes = [n for n, event in enumerate(produced) if isinstance(event, Finish)]
    if error is None:
        assert [len(produced) - 1] == finishes
        assert set(started) == finished
    else:
        assert finishes == []


# Text and reasoning


def test_a_text_is_a_part_with_its_increments():
    """A role, content in pieces, a reason, the usage, the end: one part, and one finish."""
    answer = read(
        delta(role="assistant", content="", refusal=None),
        delta(content="Hel"),
        delta(content="lo"),
        delta("stop"),
        frame({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}),
        DONE,
    )
    expected = [
        PartStarted(part_id="m1p1", kind="text"),
        PartDelta(part_id="m1p1", kind="text", delta="Hel"),
        PartDelta(part_id="m1p1", kind="text", delta="lo"),
        PartFinished(part_id="m1p1", kind="text", text="Hello"),
    ]
    assert expected == answer.events
    assert Finish("stop", Usage(input_tokens=9, output_tokens=2)) == answer.finish


@pytest.mark.parametrize(
    "thoughts",
    [
        [{"reasoning_content": "Hm"}, {"reasoning_content": "."}],
        [{"reasoning": "Hm"}, {"reasoning": "."}],
        [{"reasoning": "Hm", "reasoning_content": "Hm"}, {"reasoning": ".", "content": ""}],
        [{"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]}],
    ],
)
def test_reasoning_is_a_part_that_ends_where_the_text_begins(thoughts):
    """Whatever a server calls it, and also where it has two names for it."""
    answer = read(
        delta(role="assistant", content=None),
        *[delta(**thought) for thought in thoughts],
        delta(content="Yes", reasoning_content=None),
        delta("stop", content=""),
    )
    kinds = [(type(event), event.kind) for event in answer.events]
    assert [("reasoning", "Hm."), ("text", "Yes")] == answer.parts
    assert kinds.index((PartFinished, "reasoning")) < kinds.index((PartStarted, "text"))
    assert answer.handed_on == []


def test_parts_stand_in_the_order_in_which_they_are_said():
    """Reasoning after text is a part of its own, and so is the text after that."""
    answer = read(
        delta(reasoning="a"),
        delta(content="b"),
        delta(reasoning="c", content="d"),
        delta(reasoning="", content="e"),
        delta("stop"),
    )
    expected = [("reasoning", "a"), ("text", "b"), ("reasoning", "c"), ("text", "de")]
    assert expected == answer.parts


def test_a_refusal_is_a_part():
    """It ends the text before it, as all that is said does."""
    answer = read(delta(content="Well"), delta(refusal="I can"), delta("stop", refusal="not."))
    assert [("text", "Well"), ("refusal", "I cannot.")] == answer.parts


def test_content_may_be_a_list_of_parts():
    """Text parts are text, and thinking is reasoning; what is neither is handed on, once."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}
    answer = read(
        delta(content=[thinking]),
        delta(content=[{"type": "thinking", "thinking": "."}, {"type": "text", "text": "Yes"}]),
        delta(content=[", ", {"type": "refusal", "refusal": "no"}]),
        delta("stop", content=[{"type": "image"}, 7]),
    )
    expected = [("reasoning", "Hm."), ("text", "Yes, "), ("refusal", "no")]
    assert expected == answer.parts
    assert [[{"type": "image"}, 7]] == [
        v["choices"][0]["delta"]["content"] for v in answer.handed_on
    ]


@pytest.mark.parametrize("thinking", [[7], [{"text": 7}], [{}], 7])
def test_thinking_that_is_no_text_is_handed_on(thinking):
    """Once, as all that is not understood."""
    answer = read(delta("stop", content=[{"type": "thinking", "thinking": thinking}]))
    assert ([], 1) == (answer.parts, len(answer.handed_on))


def test_a_surrogate_pair_split_over_two_chunks_is_one_character():
    """Half of it is held; a half that stays alone is replaced."""
    pair = ["\ud83d", "\ude00"]
    answer = read(*[delta(content=half) for half in pair], delta("stop"), DONE)
    assert ["\U0001f600"] == [e.delta for e in answer.events if isinstance(e, PartDelta)]
    alone = read(delta(content="a\ud83d"), delta(reasoning="b"), delta("stop", content="\ude00"))
    assert [("text", "a\ufffd"), ("reasoning", "b"), ("text", "\ufffd")] == alone.parts


def test_a_surrogate_pair_split_within_arguments_is_one_character():
    """Also there a chunk may end between its halves."""
    answer = read(
        call(entry('{"a":"\ud83d', name="f", index=0, id="c")),
        call(entry('\ude00"}', index=0), finish="tool_calls"),
    )
    assert [("c", "f", '{"a":"\U0001f600"}')] == answer.calls


def test_names_and_ids_are_made_such_that_utf_8_can_carry_them():
    """A half of a surrogate pair in them is replaced."""
    answer = read(call(entry("{}", name="f\ud83d", id="c\ude00"), finish="stop"))
    assert [("c\ufffd", "f\ufffd", "{}")] == answer.calls


def test_bytes_that_are_no_utf_8_are_replaced():
    """They cost a character, not the stream."""
    answer = read(delta(content="a-b").replace(b"-", b"\xff\xc3"), delta("stop"))
    assert [("text", "a\ufffd\ufffdb")] == answer.parts


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_lines_may_end_in_any_way(end):
    """CRLF and CR are line ends as well, wherever a chunk is cut."""
    stream = [delta(content="a"), b": ping\n\n", delta("stop", content="b"), DONE]
    answer = read(*[one.replace(b"\n", end) for one in stream])
    assert ([("text", "ab")], "stop") == (answer.parts, answer.reason)


# Tool calls


def test_parallel_tool_calls_may_be_interleaved():
    """Pieces belong to the call of their index; the text before them ends."""
    answer = read(
        delta(role="assistant", content="I look."),
        call(entry("", name="look", index=0, id="c1", type="function")),
        call(entry('{"a"', index=0)),
        call(entry("", name="find", index=1, id="c2", type="function")),
        call(entry('{"b"', index=1), entry(":1}", index=0)),
        call(entry(":2}", index=1)),
        delta("tool_calls"),
        DONE,
    )
    expected = [
        PartStarted(part_id="m1p1", kind="text"),
        PartDelta(part_id="m1p1", kind="text", delta="I look."),
        PartFinished(part_id="m1p1", kind="text", text="I look."),
        PartStarted(part_id="m1p2", kind="tool_call", name="look", call_id="c1"),
        PartDelta(part_id="m1p2", kind="tool_call", delta='{"a"'),
        PartStarted(part_id="m1p3", kind="tool_call", name="find", call_id="c2"),
        PartDelta(part_id="m1p3", kind="tool_call", delta='{"b"'),
        PartDelta(part_id="m1p2", kind="tool_call", delta=":1}"),
        PartDelta(part_id="m1p3", kind="tool_call", delta=":2}"),
        PartFinished(part_id="m1p2", kind="tool_call", text='{"a":1}', name="look", call_id="c1"),
        PartFinished(part_id="m1p3", kind="tool_call", text='{"b":2}', name="find", call_id="c2"),
    ]
    assert expected == answer.events
    assert answer.reason == "tool_calls"


ONE, TWO = '{"a":1}', '{"a":2}'
TOGETHER = {
    "the name and the id in every piece": [
        [entry("", name="f", index=0, id="c")],
        [entry('{"a":', name="f", index=0, id="c")],
        [entry("1}", name="f", index=0, id="c")],
        [entry("", name="f", index=0, id="c")],
    ],
    "the name in every piece, and nothing else": [
        [entry("", name="f")],
        [entry('{"a":', name="f")],
        [entry("1}", name="f")],
        [entry("", name="f")],
    ],
    "only the first has an index and an id": [
        [entry('{"a"', name="f", index=0, id="c")],
        [entry(":1}")],
    ],
    "an id and no index": [[entry('{"a"', name="f", id="c")], [entry(":1}", id="c")]],
    "an id of its own for every piece": [
        [entry('{"a"', name="f", index=0, id="c")],
        [entry(":1}", index=0, id="d")],
    ],
    "another index for the same id": [
        [entry('{"a"', name="f", index=0, id="c")],
        [entry(":1}", index=1, id="c")],
    ],
    "the index is null": [
        [entry('{"a"', name="f", index=None, id="c")],
        [entry(":1}", index=None, id="")],
    ],
    "the name comes last": [
        [entry('{"a"', index=0)],
        [entry(":1}", index=0)],
        [entry(name="f", index=0, id="c")],
    ],
    "an object that is no text": [[entry({"a": 1}, name="f", index=0, id="c")]],
    "an empty object to begin with": [
        [entry("{}", name="f", index=0, id="c")],
        [entry('{"a"', index=0)],
        [entry(":1}", index=0)],
    ],
    "an empty object that is no text to begin with": [
        [entry({}, name="f", index=0, id="c")],
        [entry(ONE, index=0)],
    ],
    "all arguments once more": [
        [entry('{"a":', name="f", index=0, id="c")],
        [entry("1}", index=0)],
        [entry('{"a": 1}', index=0)],
    ],
    "the whole call once more": [
        [entry('{"a":', name="f", index=0, id="c")],
        [entry("1}", index=0)],
        [entry('{"a": 1}', name="f", index=0, id="c")],
    ],
    "the whole call once more at another index": [
        [entry(ONE, name="f", index=0, id="c")],
        [entry(ONE, name="f", index=1, id="c")],
    ],
    "a piece that says nothing": [
        [entry(ONE, name="f", index=0, id="c")],
        [{"index": 0}, {"index": 1, "function": None}, entry("", index=2, id="", name="")],
    ],
}


@pytest.mark.parametrize("chunks", TOGETHER.values(), ids=TOGETHER)
def test_pieces_of_one_call_are_put_together(chunks):
    """However a server marks that they belong together."""
    answer = read(*[call(*entries) for entries in chunks], delta("tool_calls"))
    assert [("f", ONE)] == [call[1:] for call in answer.calls]
    assert ([], "tool_calls") == (answer.handed_on, answer.reason)


APART = {
    "each has its index": [[entry(ONE, name="f", index=0), entry(TWO, name="g", index=1)]],
    "each has its id": [[entry(ONE, name="f", id="c")], [entry(TWO, name="g", id="d")]],
    "index 0 for all, ids": [
        [entry("", name="f", index=0, id="c")],
        [entry(ONE, index=0)],
        [entry("", name="g", index=0, id="d")],
        [entry(TWO, index=0)],
    ],
    "index 0 for all, an id in every piece": [
        [entry("", name="f", index=0, id="c")],
        [entry('{"a"', index=0, id="c")],
        [entry("", name="g", index=0, id="d")],
        [entry('{"a"', index=0, id="d"), entry(":1}", index=0, id="c")],
        [entry(":2}", index=0, id="d")],
    ],
    "index 0 for all, no ids": [
        [entry(ONE, name="f", index=0, id="")],
        [entry(TWO, name="g", index=0, id="")],
    ],
    "index 0 and one id for all": [
        [entry(ONE, name="f", index=0, id="c")],
        [entry(TWO, name="g", index=0, id="c")],
    ],
    "one id for all": [
        [entry("", name="f", index=0, id="c"), entry("", name="g", index=1, id="c")],
        [entry(ONE, index=0), entry(TWO, index=1)],
    ],
    "ids that come in any order": [
        [entry('{"a"', name="f", id="c"), entry('{"a"', name="g", id="d")],
        [entry(":2}", id="d"), entry(":1}", id="c")],
    ],
    "neither, in one chunk": [[entry(ONE, name="f"), entry(TWO, name="g")]],
    "neither, in chunks of their own": [[entry(ONE, name="f")], [entry(TWO, name="g")]],
    "neither, but for their place": [
        [entry("", name="f"), entry("", name="g")],
        [entry('{"a"'), entry('{"a"')],
        [entry(":1}"), entry(":2}")],
    ],
    "objects that are no text": [[entry({"a": 1}, name="f"), entry({"a": 2}, name="g")]],
}


@pytest.mark.parametrize("chunks", APART.values(), ids=APART)
@pytest.mark.parametrize("names", ["fg", "ff"])
def test_calls_are_told_apart(chunks, names):
    """However a server numbers them, and also where both are of one tool."""
    stream = b"".join(call(*entries) for entries in chunks) + delta("tool_calls")
    answer = read(stream.replace(b'"g"', b'"%c"' % names[1].encode()))
    assert [(names[0], ONE), (names[1], TWO)] == [call[1:] for call in answer.calls]


@pytest.mark.parametrize("same", [{}, {"index": 0}, {"index": 0, "id": "c"}])
def test_another_name_begins_another_call(same):
    """Whatever else says that it is the same."""
    answer = read(
        call(entry("", name="f", **same)),
        call(entry(ONE, **same)),
        call(entry("", name="g", **same)),
        call(entry(TWO, **same), finish="tool_calls"),
    )
    assert [("f", ONE), ("g", TWO)] == [call[1:] for call in answer.calls]


def test_equal_calls_without_ids_are_two():
    """A model may well call a tool twice in the same way; ids are made for them."""
    answer = read(*[call(entry(ONE, name="f"))] * 2, delta("stop"))
    assert [("m1c1", "f", ONE), ("m1c2", "f", ONE)] == answer.calls


def test_ids_that_come_twice_are_told_apart():
    """Whoever answers a call has to name it."""
    answer = read(call(*[entry(ONE, name="f", index=n, id="c") for n in (0, 1)]))
    assert answer.error is not None
    two = [entry(text, name="f", index=n, id="c") for n, text in enumerate((ONE, TWO))]
    assert [("c", "f", ONE), ("c-2", "f", TWO)] == read(call(*two), delta("stop")).calls


def test_broken_arguments_are_passed_on_as_they_are():
    """Nobody here knows what was meant."""
    answer = read(call(entry('{"a": [1,', name="f", id="c")), delta("length"))
    assert ([("c", "f", '{"a": [1,')], "length") == (answer.calls, answer.reason)


def test_a_call_without_arguments_has_an_empty_object():
    """Nothing, nothing at all, and an empty object are the same."""
    answer = read(
        call(entry(name="f", index=0), entry("", name="g", index=1), entry({}, name="h", index=2)),
        delta("tool_calls"),
    )
    assert [("f", "{}"), ("g", "{}"), ("h", "{}")] == [call[1:] for call in answer.calls]


def test_a_call_that_never_gets_a_name_is_shown_in_the_end():
    """So that the model can be told."""
    answer = read(call(entry(ONE, index=0)), delta("tool_calls"))
    assert [("m1c1", "unnamed", ONE)] == answer.calls


def test_a_call_that_is_named_twice_keeps_its_first_id():
    """What was shown cannot be taken back: an id that comes after the name is too late."""
    answer = read(
        call(entry("", name="f", index=0)), call(entry(ONE, index=0, id="c")), delta("stop")
    )
    assert [("m1c1", "f", ONE)] == answer.calls


def test_a_stop_after_tool_calls_means_them():
    """Some servers say `stop` whatever happens; other reasons are kept."""
    stream = call(entry(ONE, name="f"))
    assert read(stream, delta("stop")).reason == "tool_calls"
    assert read(stream, delta("length")).reason == "length"


def test_text_may_be_said_beside_an_open_call():
    """The call goes on; the text ends where the next call begins."""
    answer = read(
        call(entry('{"a"', name="f", index=0)),
        delta(content="And "),
        call(entry(":1}", index=0)),
        delta(content="so."),
        call(entry(TWO, name="g", index=1), finish="tool_calls"),
    )
    expected = [("text", "And so."), ("tool_call", ONE), ("tool_call", TWO)]
    assert expected == answer.parts


def fed(*frames):
    """Read a stream that is too long to be cut at every position."""
    reader = machine()
    produced = [*reader.feed(b"".join(frames)), *reader.close()]
    return Answer(produced[:-1], produced[-1], None)


def test_long_arguments_in_small_pieces_are_read_once():
    """Also where every other piece looks like an end: they are not put together for each."""
    arguments = '{"a":[' + "{}," * 33_000 + '"\\"}"]}'
    pieces = [call(entry("", name="f", id="c", index=0))]
    letters = [entry(letter, index=0) for letter in arguments]
    pieces += [call(*letters[i : i + 1000]) for i in range(0, len(letters), 1000)]
    assert [("c", "f", arguments)] == fed(*pieces, delta("tool_calls")).calls


def test_many_repetitions_of_long_arguments_are_dropped():
    """What was complete is not decoded anew for each of them."""
    long = '{"a":[' + "[]," * 100_000 + "1]}"
    pieces = [call(entry(long, name="f", id="c", index=0))]
    pieces += [call(entry('{"a":1}', index=0))] + [call(entry("{}", index=0))] * 5_000
    assert [("c", "f", long + '{"a":1}' + "{}" * 5_000)] == fed(*pieces, delta("tool_calls")).calls


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (['{"a":"}', "\\", '"{', '"}'], True),
        (["\n", '{"a":{}}', " \n"], True),
        (['{"a":{}}', "}"], False),
        (['{"a":{}} }'], False),
        (["1", '{"a":{}}'], False),
        (['{"a" {}}'], False),
    ],
)
def test_arguments_are_complete_when_they_are_an_object(pieces, expected):
    """Then more of them, with the name again, is another call; braces in strings do not count."""
    chunks = [call(entry(piece, index=0)) for piece in pieces]
    first, again = call(entry(name="f", index=0)), call(entry('{"b":2}', name="f", index=0))
    assert expected == (len(read(first, *chunks, again, delta("tool_calls")).calls) == 2)


@pytest.mark.parametrize("name", [None, "f"])
def test_an_answer_has_at_most_128_calls(name):
    """With names or without: more are no answer, but a flood."""
    calls = [call(entry(ONE, name=name, index=i, id=f"c{i}")) for i in range(129)]
    assert 128 == len(fed(*calls[:128], delta("tool_calls")).calls)
    with pytest.raises(ProviderError, match="at most 128 tool calls") as caught:
        fed(*calls)
    assert "malformed" == caught.value.code


def test_many_messages_after_a_long_answer_are_read_once():
    """Each is compared with what was said, which is put together once."""
    alternating = ["a", {"type": "thinking", "thinking": "b"}] * 5_000
    stream = [delta(content=alternating), *[message(content="")] * 5_000]
    stream += [message(content="a" * 5_000)] * 100
    answer = fed(*stream, delta("stop"))
    assert [("text", "a"), ("reasoning", "b")] * 5_000 == answer.parts


def test_what_comes_for_a_call_that_has_ended_is_handed_on():
    """But for a repetition of it, which is dropped."""
    late = call(entry("more", index=0))
    answer = read(
        call(entry(ONE, name="f", index=0), finish="stop"), call(entry(ONE, index=0)), late
    )
    assert [("f", ONE)] == [call[1:] for call in answer.calls]
    assert [late] == [frame(value) for value in answer.handed_on]


def test_the_one_function_call_of_old_is_a_tool_call():
    """Its pieces have no index and no id."""
    answer = read(
        delta(role="assistant", content=None, function_call={"name": "f", "arguments": ""}),
        delta(function_call={"arguments": '{"a"'}),
        delta(function_call={"arguments": ":1}"}),
        delta("function_call", function_call=None),
    )
    assert ([("m1c1", "f", ONE)], "tool_calls") == (answer.calls, answer.reason)


# Aggregates


def test_a_message_instead_of_deltas_is_the_whole():
    """Some servers answer in one piece though they were asked for a stream."""
    calls = [entry(ONE, name="f", id="c")]
    answer = read(
        message("tool_calls", role="assistant", reasoning="Hm", content="I look.", tool_calls=calls)
    )
    expected = [("reasoning", "Hm"), ("text", "I look."), ("tool_call", ONE)]
    assert (expected, "tool_calls") == (answer.parts, answer.reason)


@pytest.mark.parametrize("content", ["Hello", "Hello!", [{"type": "text", "text": "Hello!"}]])
def test_a_message_that_continues_the_deltas_adds_the_rest(content):
    """What was streamed is not said again."""
    answer = read(delta(content="Hel"), delta(content="lo"), message("stop", content=content))
    expected = "Hello" if content == "Hello" else "Hello!"
    assert [("text", expected)] == answer.parts


def test_a_message_that_contradicts_the_deltas_is_right():
    """One more delta brings it; the finished text is the message's."""
    produced, error = however_cut(machine, delta(content="Hel") + message("stop", content="Bye"))
    check_sound(produced, error, has_aggregates=True)
    assert ["Hel", "Bye"] == [e.delta for e in produced if isinstance(e, PartDelta)]
    assert ["Bye"] == [e.text for e in produced if isinstance(e, PartFinished)]


def test_a_message_holds_all_parts_of_its_kind():
    """Text before and after a call is one in it; what of it is new is said, only once."""
    answer = read(
        delta(content="a"),
        call(entry(ONE, name="f", id="c")),
        delta(content="b"),
        message(content="abc", tool_calls=[entry(ONE, name="f", id="c")]),
        message("stop", content="abc"),
    )
    expected = [("text", "a"), ("text", "bc"), ("tool_call", ONE)]
    assert expected == answer.parts


def test_a_message_that_contradicts_what_has_ended_is_said_once():
    """It is a part of its own, and not said again where it is repeated."""
    frames = [delta(content="a"), call(entry(ONE, name="f", id="c"))]
    frames += [message(content="Bye"), message("stop", content="Bye")]
    assert [("text", "a"), ("text", "Bye"), ("tool_call", ONE)] == read(*frames).parts


def test_a_message_is_compared_as_it_was_told():
    """What UTF-8 cannot carry was replaced, and is no difference."""
    broken = "a\ud83d"
    frames = [delta(content=broken), call(entry(ONE, name="f")), message("stop", content=broken)]
    assert [("text", "a\ufffd"), ("tool_call", ONE)] == read(*frames).parts


def test_messages_beside_deltas_are_looked_at_when_they_are_complete():
    """Perplexity repeats in every chunk all that was said so far."""
    said, frames = "", []
    for text, finish in (("Hel", None), ("lo", None), ("", "stop")):
        said += text
        choice = {"delta": {"content": text}, "message": {"content": said}, "finish_reason": finish}
        frames.append(frame({"choices": [choice]}))
    answer = read(*frames)
    assert ([("text", "Hello")], []) == (answer.parts, answer.handed_on)


# Usage


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([delta("stop")], Usage()),
        ([delta("stop"), frame({"usage": None}), frame({"choices": None, "usage": {}})], Usage()),
        (
            [frame({"choices": [{"delta": {}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 5, "completion_tokens": 3}})],
            Usage(input_tokens=5, output_tokens=3),
        ),
        (
            [frame({"choices": [{"delta": {}, "finish_reason": "stop",
                                 "usage": {"prompt_tokens": 5, "completion_tokens": 3}}]})],
            Usage(input_tokens=5, output_tokens=3),
        ),
        (
            [frame({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}),
             frame({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}),
             delta("stop"), frame({"usage": {"prompt_tokens": 0, "completion_tokens": 0}})],
            Usage(input_tokens=5, output_tokens=2),
        ),
        (
            [delta("stop"), frame({"choices": [], "usage": {
                "prompt_tokens": 90, "completion_tokens": 30, "total_tokens": 120,
                "prompt_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 8},
                "completion_tokens_details": {"reasoning_tokens": 20}}}), DONE],
            Usage(input_tokens=90, output_tokens=30, reasoning_tokens=20,
                  cache_read_tokens=64, cache_write_tokens=8),
        ),
        (
            [delta("stop"), frame({"choices": [], "usage": {
                "prompt_tokens": 7, "completion_tokens": "many",
                "prompt_tokens_details": None, "completion_tokens_details": [1]}})],
            Usage(input_tokens=7),
        ),
    ],
)  # fmt: skip
def test_usage_is_what_was_told_last(frames, expected):
    """In a chunk of its own, in the last one, in all of them; what is no number counts as 0."""
    answer = read(*frames)
    assert (expected, []) == (answer.finish.usage, answer.handed_on)


# Ends


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("tool_calls", "tool_calls"),
        ("function_call", "tool_calls"),
        ("content_filter", "content_filter"),
        ("error", "error"),
        ("STOP", "stop"),
        ("max_tokens", "length"),
        ("insufficient_system_resource", "other"),
    ],
)
def test_reasons_are_mapped(said, expected):
    """Those of the API, some that leak from others, and what nobody knows."""
    assert expected == read(delta(said, content="a"), DONE).reason


def test_an_empty_reason_is_none():
    """Some servers send it in every chunk."""
    answer = read(delta("", content="a"), delta("", content="b"), delta("stop"))
    assert ([("text", "ab")], "stop") == (answer.parts, answer.reason)


def test_done_may_be_missing():
    """A reason is enough."""
    assert read(delta("stop", content="a")).reason == "stop"


def test_done_alone_is_a_finish_where_anything_was_said():
    """Some servers never give a reason."""
    assert read(delta(content="a"), DONE).finish == Finish("stop")
    assert read(call(entry(ONE, name="f")), DONE).reason == "tool_calls"


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [DONE],
        [delta(role="assistant"), DONE],
        [delta(content="a")],
        [call(entry('{"a"', name="f"))],
        [frame({"choices": [], "usage": {"prompt_tokens": 1}})],
    ],
)
def test_a_stream_that_ends_without_a_finish_is_an_error(frames):
    """It was cut off, or there was nothing in it."""
    answer = read(*frames)
    assert answer.error.code == "incomplete"
    assert answer.error.is_transient


def test_it_is_over_with_a_reason_or_with_done():
    """From then on nothing but usage, or an error, is to come."""
    first, second = machine(), machine()
    for reader, end in ((first, delta("stop")), (second, DONE)):
        list(reader.feed(delta(content="a")))
        assert not reader.is_over
        list(reader.feed(end))
        assert reader.is_over


def test_a_last_frame_that_lacks_only_its_blank_line_counts():
    """The connection closed a byte too early for the letter of the standard."""
    for cut in (1, 2):
        assert read(delta("stop", content="a")[:-cut]).reason == "stop"


def test_a_frame_that_was_cut_is_handed_on():
    """After a finish it does no harm; before one the stream is incomplete."""
    cut = delta(content="never heard")[:-20]
    expected = [cut.removeprefix(b"data: ").decode()]
    after = read(delta("stop", content="a"), cut)
    assert (expected, "stop") == (after.handed_on, after.reason)
    before = read(delta(content="a"), cut)
    assert (expected, "incomplete") == (before.handed_on, before.error.code)


def test_what_is_said_after_the_finish_is_still_told():
    """It is a part of its own."""
    answer = read(delta("stop", content="a"), delta(content="b"), DONE)
    assert [("text", "a"), ("text", "b")] == answer.parts


# Errors

BUSY = {"message": "too many requests", "type": "rate_limit_error", "code": 429}
ERRORS = {
    "an object": frame({"error": BUSY}),
    "text": frame({"error": "Rate limit reached"}),
    "beside a choice": frame(
        {"error": BUSY, "choices": [{"delta": {"content": "no"}, "finish_reason": "error"}]}
    ),
    "in a choice": frame({"choices": [{"error": BUSY, "finish_reason": "error"}]}),
    "an event of its own": b"event: error\n" + frame({"error": BUSY}),
    "an event that is the error": b"event: error\n" + frame(BUSY),
    "the object itself": frame({"object": "error"} | BUSY),
}
BEFORE = {
    "at once": [],
    "in the middle": [delta(content="a"), call(entry('{"a"', name="f"))],
    "after a finish": [delta("stop", content="a"), DONE],
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_an_error_beats_everything(before, error):
    """Wherever in the stream it comes; what came before it was told."""
    answer = read(*before, error, delta("stop"))
    assert (answer.error.code, bool(before)) == ("rate_limit", bool(answer.events))
    assert "openai_chat answered" in answer.error.message


def test_llama_cpp_says_that_the_context_is_full():
    """As an object with a code of HTTP's."""
    error = {"code": 400, "type": "exceed_context_size_error",
             "message": "the request exceeds the available context size"}  # fmt: skip
    assert read(frame({"error": error})).error.code == "context_length"


@pytest.mark.parametrize("nothing", [None, False, "", {}, []])
def test_an_empty_error_is_none(nothing):
    """Some servers have the field in every chunk."""
    chunk = {"error": nothing, "choices": [{"error": nothing, "delta": {"content": "a"}}]}
    answer = read(frame(chunk), delta("stop"))
    assert ([("text", "a")], []) == (answer.parts, answer.handed_on)


def test_an_error_without_words_is_one():
    """All that is known is that it failed."""
    assert read(b"event: error\ndata: {}\n\n").error.code == "provider_error"
    assert read(frame({"error": 7})).error.code == "provider_error"


# What is not understood


@pytest.mark.parametrize(
    "value",
    [
        {"type": "ping"},
        {},
        {"choices": []},
        {"choices": [], "prompt_filter_results": []},
        {"choices": {"delta": {}}},
        {"choices": 7, "usage": {}},
        {"choices": [7]},
        {"choices": [{"delta": 7}]},
        {"choices": [{"message": 7}]},
        {"choices": [{"delta": {}, "finish_reason": 7}]},
        {"choices": [{"delta": {"audio": {"data": "AAAA"}}}]},
        {"choices": [{"delta": {"content": 7}}]},
        {"choices": [{"delta": {"reasoning": {}}}]},
        {"choices": [{"delta": {"refusal": []}}]},
        {"choices": [{"delta": {"tool_calls": {}}}]},
        {"choices": [{"delta": {"tool_calls": [7]}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": "f"}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"name": 7, "arguments": 7}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"id": 7}]}}]},
        {"choices": [{"delta": {"function_call": "auto"}}]},
        {"choices": [{"delta": {}}], "usage": 7},
        [],
        7,
        "text",
    ],
)
def test_what_is_unknown_is_handed_on_once(value):
    """It is never fatal, and never lost."""
    answer = read(frame(json.dumps(value)), delta("stop"))
    assert ([value], []) == (answer.handed_on, answer.parts)


def test_what_is_no_json_is_handed_on_as_text():
    """Also that is never lost."""
    assert ["{not json"] == read(b"data: {not json\n\n", delta("stop")).handed_on


def test_what_is_understood_of_a_frame_is_told_before_it_is_handed_on():
    """A field of a wrong type does not spoil those beside it."""
    answer = read(delta("stop", content="a", tool_calls=7))
    assert ([("text", "a")], 1) == (answer.parts, len(answer.handed_on))


def test_comments_and_empty_deltas_are_nothing():
    """They keep the connection alive, and no more."""
    answer = read(
        b": PROCESSING\n\n",
        b":\n\n",
        b"retry: 3000\n\n",
        delta(),
        delta(role="assistant", content="", tool_calls=[], function_call=None),
        delta(content=None, reasoning_content=None, refusal=None, tool_calls=None),
        frame({"choices": [{"index": 0}], "prompt_progress": {"total": 9, "processed": 3}}),
        delta("stop"),
    )
    assert ([], "stop") == (answer.events, answer.reason)


def test_only_the_first_choice_counts():
    """Whoever asks for more gets the first; in one chunk, or in chunks of their own."""
    two = {"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": "length"},
                       {"index": 0, "delta": {"content": "a"}}]}  # fmt: skip
    unnumbered = {"choices": [{"delta": {"content": "b"}}, {"delta": {"content": "no"}}]}
    answer = read(frame(two), frame(unnumbered), delta("stop"))
    assert ([("text", "ab")], "stop", []) == (answer.parts, answer.reason, answer.handed_on)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.sampled_from(["f", "g", ONE, TWO, "{}", '{"a"', ":1}", "\ud83d", "\ude00"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def fuzzed(usual, **fields):
    """An object whose fields are what they should be, or anything, or not there."""
    optional = {name: value if usual else value | JSON for name, value in fields.items()}
    return st.fixed_dictionaries({}, optional=optional)


def chunks(usual):
    """Chunks in which every field may be of any type; or, usually, of the right one."""
    text = st.sampled_from(["", "a", "b ", "\ud83d", "\ude00"])
    function = fuzzed(
        usual,
        name=st.sampled_from(["f", "g", ""]),
        arguments=st.sampled_from(["", "{}", ONE, TWO, '{"a"', ":1}", {"a": 1}, {}, "\ud83d"]),
    )
    piece = fuzzed(
        usual,
        index=st.integers(0, 2),
        id=st.sampled_from(["c", "d", ""]),
        function=function,
    )
    said = st.lists(fuzzed(usual, type=st.just("text"), text=text) | text, max_size=2)
    saying = fuzzed(
        usual,
        role=st.just("assistant"),
        content=text | said,
        reasoning=text,
        reasoning_content=text,
        refusal=text,
        tool_calls=st.lists(piece, max_size=3),
        function_call=function,
    )
    reason = st.sampled_from([None, "", "stop", "tool_calls", "length"])
    choice = fuzzed(usual, index=st.just(0), delta=saying, message=saying, finish_reason=reason)
    usage = fuzzed(usual, prompt_tokens=st.integers(), prompt_tokens_details=st.none())
    return fuzzed(usual, choices=st.lists(choice, max_size=2), usage=usage | st.none())


TEXT_CHUNK = {
    "object": "chat.completion.chunk",
    "choices": [
        {
            "index": 0,
            "delta": dict.fromkeys(
                ("reasoning", "reasoning_content", "refusal", "tool_calls", "function_call")
            )
            | {"content": "a", "role": "assistant"},
            "finish_reason": None,
            "message": None,
            "usage": None,
            "error": None,
        }
    ],
    "usage": None,
    "error": None,
}
GONE = object()


def but_for(path, value):
    """A chunk of text alone, but for one field."""
    chunk = json.loads(json.dumps(TEXT_CHUNK))
    *outer, name = path
    place = chunk
    for step in outer:
        place = place[step]
    if value is GONE:
        del place[name]
    else:
        place[name] = value
    return chunk


def paths(value, path=()):
    """All places in a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, child in inner:
        yield (*path, name)
        if isinstance(child, dict | list):
            yield from paths(child, (*path, name))


@pytest.mark.parametrize("path", [*paths(TEXT_CHUNK)], ids=lambda path: ".".join(map(str, path)))
def test_the_short_way_for_text_is_but_shorter(path):
    """A chunk of text gives what it gives without it, whatever else one of its fields says."""
    odd = ["", "b", "stop", "error", {"message": "no"}, {"content": "c"}, {"prompt_tokens": 3}]
    odd += [0, 1, False, None, [], [1], ["d", {"type": "text", "text": "e"}], "\ud83d", GONE]
    odd += [{"name": "f", "arguments": "{}"}, [{"index": 0, "function": {"name": "f"}}]]
    for value in odd:
        for name in ("", "event: error\n"):
            stream = delta(content="begun") + name.encode() + frame(but_for(path, value))
            stream += frame(TEXT_CHUNK) + delta(content="\ude00") + DONE
            produced, error = play(machine, [stream])
            expected, failed = play(Unhurried, [stream])
            assert (expected, failed and failed.message) == (produced, error and error.message)


def test_text_beside_what_is_nested_too_deeply_is_not_understood():
    """Such a chunk is handed on as text, as any that is no JSON; the stream goes on."""
    deep = '{"choices":[{"delta":{"content":"b"}}],"x":%s}' % ("[" * 100_000 + "]" * 100_000)
    answer = read(delta(content="a"), frame(deep), delta("stop", content="c"), every=20_000)
    assert [("text", "ac")] == answer.parts
    assert [deep] == answer.handed_on


@pytest.mark.parametrize("usual", [True, False])
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_frame_can_break_the_machine(usual, data):
    """Whatever stands in any field: sound events come out, or a `ProviderError`."""
    values = data.draw(st.lists(chunks(usual), max_size=8))
    errors = st.fixed_dictionaries({"error": JSON})
    values += data.draw(st.just([]) | st.lists(errors | JSON, max_size=1))
    stream = b"".join(frame(json.dumps(value)) for value in values)
    stream += data.draw(st.sampled_from([b"", DONE, delta("stop")]))
    produced, error = play(machine, [stream])
    check_sound(produced, error, has_aggregates=b'"message"' in stream)
    for make, way in (
        (machine, [stream[n : n + 1] for n in range(len(stream))]),
        (Unhurried, [stream]),
    ):
        again, failed = play(make, way)
        assert (produced, error and error.message) == (again, failed and failed.message)


# What is asked

LOOK = ToolSpec("look", "Looks.", {"type": "object", "properties": {"a": {"type": "integer"}}})


def body(*messages, api=None, tools=()):
    """The body of a call, as it is sent."""
    request = (api or OpenAIChatApi()).request(Prompt("qwen3", messages, tools))
    return decode_json(encode_json(request.body))


def test_a_full_conversation_is_written():
    """Every kind of message, and the tools."""
    expected = {
        "model": "qwen3",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Look twice."},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "look", "arguments": '{ "a": 1 }'},
                    },
                    {
                        "id": "c2",
                        "type": "function",
                        "function": {"name": "look", "arguments": '{"_raw":"{\\"a\\""}'},
                    },
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": '{"found": true}'},
            {"role": "tool", "tool_call_id": "c2", "content": "expected JSON"},
            {"role": "assistant", "content": "Found."},
            {"role": "user", "content": "Thanks."},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look",
                    "description": "Looks.",
                    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
                },
            }
        ],
        "parallel_tool_calls": True,
    }
    calls = (ToolCall("c1", "look", '{ "a": 1 }'), ToolCall("c2", "look", '{"a"'))
    assert expected == body(
        SystemMessage("Be brief."),
        UserMessage("Look twice."),
        AssistantMessage("I look.", calls),
        ToolMessage("c1", "look", '{"found": true}'),
        ToolMessage("c2", "look", "expected JSON", is_error=True),
        AssistantMessage("Found."),
        UserMessage("Thanks."),
        tools=(LOOK,),
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}\n', '{"a": 1}\n'),
        ("", "{}"),
        ("[1]", '{"_raw":"[1]"}'),
        ("{a:1}", '{"_raw":"{a:1}"}'),
        ("\ud83d}", '{"_raw":"\ufffd}"}'),
    ],
)
def test_arguments_are_always_a_json_object(arguments, expected):
    """Servers refuse a whole conversation for one that is none; what is one stays as it was."""
    written = body(AssistantMessage("", (ToolCall("c", "f", arguments),)))["messages"][0]
    assert expected == written["tool_calls"][0]["function"]["arguments"]


def test_a_message_of_calls_alone_has_no_content():
    """Null, not empty text; a message of nothing at all has empty text."""
    only_calls = AssistantMessage("", (ToolCall("c", "f", "{}"),))
    messages = body(only_calls, AssistantMessage(""))["messages"]
    assert [None, ""] == [message["content"] for message in messages]


def test_without_tools_nothing_is_said_of_them():
    """Servers refuse an empty list."""
    assert {"model", "messages", "stream", "stream_options"} == set(body(UserMessage("Hi")))


def test_options_are_put_over_the_body():
    """They set fields, replace them, and take them out: what is None is not sent."""
    options = {"temperature": 0.2, "stream_options": None, "parallel_tool_calls": False}
    written = body(UserMessage("Hi"), api=OpenAIChatApi(options=options), tools=(LOOK,))
    assert (0.2, False) == (written["temperature"], written["parallel_tool_calls"])
    assert written["stream_options"] is None


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_there_is_no_authorization(key):
    """Local servers want none."""
    request = OpenAIChatApi("http://127.0.0.1:8081/v1/", key).request(Prompt("m", ()))
    assert ("http://127.0.0.1:8081/v1/chat/completions", {}) == (request.url, request.headers)


def test_a_key_is_a_bearer_token_and_is_never_shown():
    """Not in the representation either."""
    api: Api = OpenAIChatApi(key="sk-hidden")
    assert {"authorization": "Bearer sk-hidden"} == api.request(Prompt("m", ())).headers
    assert api.request(Prompt("m", ())).url == "https://api.openai.com/v1/chat/completions"
    assert "hidden" not in repr(api)
    assert api.kind == "openai_chat"


# Reasoning that is wanted back


def thinking(*frames):
    """The reasoning that goes back with the calls that were made, by the server that made it."""
    api = OpenAIChatApi("http://here/v1")
    produced, error = however_cut(lambda: api.normalizer("m1"), b"".join(frames))
    check_sound(produced, error)
    said = AssistantMessage("", (ToolCall("c", "f", ONE),), produced[-1].echo)
    elsewhere = OpenAIChatApi("http://there/v1")
    return [body(said, api=api)["messages"][0].get("reasoning_content") for api in (api, elsewhere)]


def test_reasoning_content_goes_back_to_its_server_with_the_calls():
    """DeepSeek refuses calls without it; other servers refuse the field."""
    calls = call(entry(ONE, name="f", id="c"), finish="tool_calls")
    two = delta(reasoning_content="Hm, "), delta(reasoning_content="f.")
    assert ["Hm, f.", None] == thinking(*two, calls)
    assert ["Hm, f.", None] == thinking(delta(content="I"), *two, calls, DONE)
    assert [None, None] == thinking(*two, delta("stop", content="No."))
    assert [None, None] == thinking(delta(reasoning="Hm, f."), calls)


def test_what_another_kind_of_provider_wants_back_is_left_out():
    """A message is then made of its text and its calls."""
    said = AssistantMessage("a", (ToolCall("c", "f", ONE),), Echo("anthropic", [{"type": "text"}]))
    assert {"role", "content", "tool_calls"} == set(body(said)["messages"][0])


# Over HTTP


class Nobody:
    """A run as a provider sees it, without one."""

    window = 0.0

    async def sleep_until(self, when):
        """Wait."""
        await trio.sleep_until(when)

    def lull(self):
        """Do nothing."""

    async def ask(self, questions, /):
        """Nobody answers."""
        raise NotImplementedError


async def test_a_call_over_http():
    """A request as it is on the wire, and a stream that comes in pieces of any size."""
    asked = {}
    answer = b"".join([delta(content="Hel"), delta("stop", content="lo"), DONE])

    async def serve(stream):
        server, sent = h11.Connection(h11.SERVER), b""
        while not isinstance(event := server.next_event(), h11.EndOfMessage):
            match event:
                case h11.Request():
                    asked["target"], asked["headers"] = event.target, dict(event.headers)
                case h11.Data():
                    sent += event.data
                case _:
                    server.receive_data(await stream.receive_some())
        asked["body"] = json.loads(sent)
        head = h11.Response(status_code=200, headers=[("content-type", "text/event-stream")])
        await stream.send_all(server.send(head))
        for n in range(0, len(answer), 7):
            await stream.send_all(server.send(h11.Data(answer[n : n + 7])))
        await stream.send_all(server.send(h11.EndOfMessage()))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/v1"
            provider = HttpProvider("local", OpenAIChatApi(url, "sk-1"), key="sk-1")
            async with provider.open(Nobody()) as connection:
                reader, produced = connection.normalizer("m1"), []
                async with connection.stream(Prompt("qwen3", (UserMessage("Hi"),))) as pieces:
                    async for piece in pieces:
                        produced += reader.feed(piece)
                produced += reader.close()
            nursery.cancel_scope.cancel()
    assert produced[-1] == Finish("stop")
    assert [PartFinished(part_id="m1p1", kind="text", text="Hello")] == produced[-2:-1]
    assert (b"/v1/chat/completions", b"Bearer sk-1") == (
        asked["target"],
        asked["headers"][b"authorization"],
    )
    assert body(UserMessage("Hi")) == asked["body"]
