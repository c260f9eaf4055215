"""Tool calls in text: found however the text was cut, and taught to models without tools."""

import json

import attrs
import pytest
import trio
from hypothesis import example, given, settings, strategies as st
from normalizing import collect, however_cut, play

from agentsse.errors import ProviderError
from agentsse.events import (
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    decode_event,
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
from agentsse.providers import Finish, Prompt
from agentsse.providers.embedded import (
    MAX_BODY,
    MAX_BROKEN,
    MAX_CLOSINGS,
    EmbeddedNormalizer,
    EmbeddedProvider,
    taught,
)
from agentsse.testing import ScriptedNormalizer, ScriptedProvider

CALL = '[[TOOL_CALL]]{"name": "look", "arguments": {"at": "sky"}}[[/TOOL_CALL]]'
CODE = '<tool_code>{"look": {"at": "sky"}}</tool_code>'
REST = '<tool_code>{"rest": {}}</tool_code>'
LOOK = "look", '{"at":"sky"}'


@attrs.define
class Spoken:
    """An inner machine: each chunk is a delta of one text part, which ends with the stream."""

    finish: Finish = attrs.field(factory=lambda: Finish("stop"))
    is_begun: bool = False
    is_over: bool = False
    said: str = ""

    def begin(self):
        """The start of the part, once."""
        is_begun, self.is_begun = self.is_begun, True
        return [] if is_begun else [PartStarted(part_id="t1", kind="text")]

    def feed(self, text):
        """Take a delta."""
        self.said += text
        delta = [PartDelta(part_id="t1", kind="text", delta=text)] if text else []
        return [*self.begin(), *delta]

    def close(self):
        """End the part, and the call."""
        finished = PartFinished(part_id="t1", kind="text", text=self.said)
        return [*self.begin(), finished, self.finish]


@attrs.define
class Joined:
    """An outer machine: all that another one makes, at its end, with adjacent deltas joined."""

    inner: EmbeddedNormalizer
    produced: list = attrs.field(factory=list)

    def feed(self, chunk):
        """Take a chunk."""
        collect(self.inner.feed(chunk), self.produced)
        return ()

    def close(self):
        """Join what was made, and look whether it is well made."""
        collect(self.inner.close(), self.produced)
        return joined(self.produced)


def joined(produced):
    """Events with adjacent deltas joined; each part must be what its deltas are."""
    events, texts = [], {}
    for one in produced:
        match one:
            case PartStarted():
                assert one.part_id not in texts
                texts[one.part_id] = ""
            case PartDelta():
                assert one.delta
                texts[one.part_id] += one.delta
                if isinstance(events[-1], PartDelta) and events[-1].part_id == one.part_id:
                    one = longer(events.pop(), one.delta)  # noqa: PLW2901 - it takes its place
            case PartFinished():
                assert texts[one.part_id] == one.text
            case _:
                pass
        events.append(one)
    return events


def longer(event, more):
    """A delta with more text."""
    return PartDelta(part_id=event.part_id, kind=event.kind, delta=event.delta + more)


def make():
    """A machine that is fed text."""
    return Joined(EmbeddedNormalizer(Spoken(), "s1."))


def short(produced):
    """Text parts as text, calls as a name and arguments."""
    parts = [one for one in produced if isinstance(one, PartFinished)]
    return [one.text if one.kind == "text" else (one.name, one.text) for one in parts]


def shown(machine, text):
    """What is seen of a text that has come letter by letter, and has not ended."""
    produced = [one for letter in text for one in machine.feed(letter)]
    return "".join(one.delta for one in produced if isinstance(one, PartDelta))


def told(text):
    """What a text becomes, cut anywhere."""
    produced, error = however_cut(make, text)
    assert error is None
    return short(produced)


# Finding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [CALL, CODE])
def test_a_call_in_text_is_a_part_of_its_own(call):
    """The text before it ends, the text behind it begins anew, and so the model stopped for it."""
    produced, error = however_cut(make, f"Let me see. {call} Done?")
    assert error is None
    assert [
        PartStarted(part_id="t1", kind="text"),
        PartDelta(part_id="t1", kind="text", delta="Let me see. "),
        PartFinished(part_id="t1", kind="text", text="Let me see. "),
        PartStarted(part_id="s1.e1", kind="tool_call", name="look", call_id="s1.e1c"),
        PartDelta(part_id="s1.e1", kind="tool_call", delta='{"at":"sky"}'),
        PartFinished(
            part_id="s1.e1",
            kind="tool_call",
            text='{"at":"sky"}',
            name="look",
            call_id="s1.e1c",
        ),
        PartStarted(part_id="s1.e2", kind="text"),
        PartDelta(part_id="s1.e2", kind="text", delta=" Done?"),
        PartFinished(part_id="s1.e2", kind="text", text=" Done?"),
        Finish("tool_calls"),
    ] == produced


def test_text_without_calls_passes_as_it_came():
    """Delta by delta, and empty or blank text too."""
    deltas = ["Hel", "lo ", "<", "b>"]
    machine = EmbeddedNormalizer(Spoken(), "s1.")
    produced = [
        [one.delta for one in machine.feed(d) if isinstance(one, PartDelta)] for d in deltas
    ]
    assert [["Hel"], ["lo "], [], ["<b>"]] == produced
    for text in ("", " ", "\n\n"):
        plain, _ = play(lambda: Joined(Spoken()), [text])
        assert (plain, None) == play(make, [text])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"name": "look", "args": {"at": "sky"}}', LOOK),
        ('{"name": "look", "input": {"at": "sky"}, "type": "function"}', LOOK),
        ('{"parameters": {"at": "sky"}, "name": "look"}', LOOK),
        ('{"name": "look", "arguments": "{\\"at\\": \\"sky\\"}"}', LOOK),
        (' \n{"name": "look", "arguments": {"at":"sky"}}\r\n ', LOOK),
        ('{"name": "rest"}', ("rest", "{}")),
        ('{"name": "rest", "arguments": null}', ("rest", "{}")),
        ('{"name": "rest", "arguments": ""}', ("rest", "{}")),
        ('{"name": "say", "arguments": {"text": "é\\n\\u00e9 \\" }"}}',
         ("say", '{"text":"é\\né \\" }"}')),
        ('{"name": "say", "arguments": {"text": "[[/TOOL_CALL]] or </tool_code>"}}',
         ("say", '{"text":"[[/TOOL_CALL]] or </tool_code>"}')),
        ('{"name": "say", "arguments": {"text": "\\ud800"}}', ("say", '{"text":"\ufffd"}')),
    ],
)  # fmt: skip
def test_a_call_may_be_written_in_several_ways(body, expected):
    """The names that models give to the arguments are known, in both notations."""
    assert [expected] == told(f"[[TOOL_CALL]]{body}[[/TOOL_CALL]]")
    assert [expected] == told(f"<tool_code>{body}</tool_code>")


@pytest.mark.parametrize(
    ("opening", "closing"),
    [("[[tool_call]]", "[[/Tool_Call]]"), ("<TOOL_CODE>", "</Tool_code>")],
)
def test_the_case_of_a_marker_does_not_matter(opening, closing):
    """Models shout, or do not."""
    assert [LOOK] == told(f'{opening}{{"name":"look","args":{{"at":"sky"}}}}{closing}')


def test_code_may_call_several_tools():
    """An object of objects names a tool with each key."""
    code = '<tool_code>{"look": {"at": "sky"}, "name": {"x": 1}, "rest": {}}</tool_code>'
    assert [LOOK, ("name", '{"x":1}'), ("rest", "{}")] == told(code)


def test_calls_follow_one_another():
    """White space around calls is no part; text around them is."""
    assert [LOOK, LOOK, LOOK] == told(f"\n\n{CALL}\n{CODE}{CALL} \n")
    assert ["a\n", LOOK, "\n\nb", LOOK, ".", LOOK] == told(f"a\n{CALL}\n\nb{CODE}.{CALL}\n")


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[[",
        "a [[ b [[TOOL c",
        "[[TOOL_CALL",
        "[[TOOL_CALL]]",
        "[[TOOL_CALL]]  \n",
        "[[TOOL_CALL]] is a marker [[/TOOL_CALL]]",
        "[[TOOL_CALL]]{[[/TOOL_CALL]]",
        "[[TOOL_CALL]]{}[[/TOOL_CALL]]",
        '[[TOOL_CALL]]{"name": ""}[[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"name": 7, "arguments": {}}[[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"name": "look", "arguments": [1]}[[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"name": "look", "arguments": "sky"}[[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"name": "look", "arguments": {"n": NaN}}[[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"name": "look", "arguments": {"at": sky}}[[/TOOL_CALL]] and on',
        '[[TOOL_CALL]]{"name": "look"} and [[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"name": "look"}</tool_code>',
        '[[TOOL_CALL]]["look"][[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"look": {"at": "sky"}}[[/TOOL_CALL]]',
        '[[TOOL_CALL]]{"name": "look", "arguments": {"at": "sky[[/TOOL_CALL]] more',
        '[[TOOL_CALL]]{"name": "look", "arguments": {"at": "sky"',
        '[[TOOL_CALL]]{"name": "look"}',
        '[[TOOL_CALL]]{"name": "look"}[[/TOOL_CALL',
        "[[/TOOL_CALL]] [[/TOOL_CALL]]",
        "<",
        "<tool",
        "<tool_box>{}</tool_box>",
        "<tool_code>print(look('sky'))</tool_code>",
        "<tool_code>{}</tool_code>",
        '<tool_code>{"look": 1}</tool_code>',
        '<tool_code>{"look": {}, "": {}}</tool_code>',
        '<tool_code>{"look": {}}[[/TOOL_CALL]]',
        "<too\u017f_code> [[TOOL_C\u00c4LL]]",
    ],
)
def test_what_is_no_call_stays_text(text):
    """Not valid, not closed, or only alike: it is shown as it stood, in one part."""
    assert [text] == told(text)
    assert [text + " ", LOOK] == told(f"{text} {CALL}")


def test_numbers_and_brackets_without_end_stay_text():
    """What Python cannot read is not read."""
    for value in ("9" * 5_000, "[" * 100_000 + "]" * 100_000):
        text = f'[[TOOL_CALL]]{{"name": "f", "arguments": {{"n": {value}}}}}[[/TOOL_CALL]]'
        produced, error = play(make, [text])
        assert ([text], None) == (short(produced), error)


def test_a_call_behind_a_broken_one_is_found():
    """What follows a marker that opens nothing is looked at anew; a string holds no call."""
    assert ["[[TOOL_CALL]]", LOOK] == told(f"[[TOOL_CALL]]{CALL}")
    assert ['[[TOOL_CALL]]{"name": ', LOOK, "}[[/TOOL_CALL]]"] == told(
        f'[[TOOL_CALL]]{{"name": {CALL}}}[[/TOOL_CALL]]'
    )
    quoted = json.dumps({"name": 1, "arguments": {"text": CALL}})
    assert [f"<tool_code>{quoted}</tool_code>"] == told(f"<tool_code>{quoted}</tool_code>")


def test_only_what_may_begin_a_marker_is_held_back():
    """Each letter of other text is shown at once; a marker's letters once it is none."""
    text = "see [[TOOL_CALLS]] or [[TOOL_CALL]] or <tool_codes> or [[TOOL_CALL]]"
    for end in range(len(text)):
        seen = shown(EmbeddedNormalizer(Spoken(), "s1."), text[:end])
        assert text.startswith(seen)
        assert end - len(seen) <= 14  # a whole marker, and white space behind it
    assert text.removesuffix("[[TOOL_CALL]]") == shown(EmbeddedNormalizer(Spoken(), "s1."), text)


def test_a_call_is_shown_as_soon_as_it_is_closed():
    """Nothing that follows is waited for, wherever a delta ends."""
    for cut in range(len(CALL)):
        machine = EmbeddedNormalizer(Spoken(), "s1.")
        produced = [*machine.feed(CALL[:cut]), *machine.feed(CALL[cut:])]
        assert [LOOK] == short(produced)


@pytest.mark.parametrize("body", ['{"name": look}', '{"name": "look"} and', '{"look": {}}'])
def test_an_invalid_call_is_shown_as_soon_as_it_is_closed(body):
    """It is not held until the part ends."""
    text = f"[[TOOL_CALL]]{body}[[/TOOL_CALL]]"
    assert text == shown(EmbeddedNormalizer(Spoken(), "s1."), text)


def bounded():
    """A machine whose calls must be short."""
    return Joined(EmbeddedNormalizer(Spoken(), "s1.", max_body=40))


def test_the_body_of_a_call_is_bounded():
    """A call as large as may be is found; one letter more and it is text, before the part ends."""
    head, tail = '{"name":"f"', "}[[/TOOL_CALL]]"
    largest = f"[[TOOL_CALL]]{head}{' ' * (40 - len(head) - len(tail))}{tail}"
    larger = largest.replace("}", " }")
    quoting = '[[TOOL_CALL]]{"name":"[[/TOOL_CALL]]ff"}[[/TOOL_CALL]]'
    for text, expected in (
        (largest, [("f", "{}")]),
        (larger, [larger]),
        (larger + largest, [larger, ("f", "{}")]),
        (quoting, [quoting]),
    ):
        produced, error = however_cut(bounded, text)
        assert (expected, None) == (short(produced), error)
    assert larger == shown(bounded().inner, larger)


@pytest.mark.parametrize("body", ['{"name": "f", xxxxxxxxxxxxxxxxxxxxxxxxxx', " " * 40])
def test_a_body_that_never_ends_is_text(body):
    """At the bound the marker is given up, and a call behind it is found."""
    assert 40 == len(body)
    assert f"[[TOOL_CALL]]{body}x" == shown(bounded().inner, f"[[TOOL_CALL]]{body}x")
    for text, expected in (
        (f"[[TOOL_CALL]]{body}", [f"[[TOOL_CALL]]{body}"]),
        (f"[[TOOL_CALL]]{body}{REST}", [f"[[TOOL_CALL]]{body}", ("rest", "{}")]),
    ):
        produced, error = however_cut(bounded, text)
        assert (expected, None) == (short(produced), error)


def test_a_marker_is_given_up_with_all_up_to_the_bound():
    """A call that begins before it, and ends behind it, is text too."""
    text = f'[[TOOL_CALL]]{{"name": "f", {"x" * 20}{REST}'
    produced, error = however_cut(bounded, text)
    assert ([text], None) == (short(produced), error)


def test_a_call_may_be_large():
    """Nobody has to set the bound for a file as an argument."""
    text = CALL.replace("sky", "x" * (MAX_BODY - 100))
    produced, _ = play(make, [text[n : n + 4096] for n in range(0, len(text), 4096)])
    assert [("look", json.dumps({"at": "x" * (MAX_BODY - 100)}, separators=(",", ":")))] == short(
        produced
    )


def test_white_space_without_end_is_shown():
    """Blank text is held back no longer than a call would be."""
    assert [("rest", "{}")] == short(however_cut(bounded, " " * 40 + REST)[0])
    assert [" " * 41, ("rest", "{}")] == short(however_cut(bounded, " " * 41 + REST)[0])
    machine = bounded().inner
    assert [] == list(machine.feed(" " * 40))
    assert 2 == len(list(machine.feed(" ")))


@pytest.mark.parametrize(
    "unit",
    [
        "[[TOOL_CALL]]",
        "[[TOOL_CALL]]{x",
        '[[TOOL_CALL]]{"',
        "[[/TOOL_CALL]]",
        '"}[[/TOOL_CALL]]',
        '{"[[TOOL_CALL]]{"',
    ],
)
def test_hostile_text_takes_no_more_time_than_it_has_letters(unit):
    """Markers that open nothing, and close nothing, are not searched again and again."""
    text = '[[TOOL_CALL]]{"a":"' + unit * (MAX_BODY // 2 // len(unit))
    produced, _ = play(make, [text[:100], text[100:]])  # squared it would take hours
    assert [text] == short(produced)


def test_broken_calls_are_counted():
    """A call may stand behind many that are broken; behind too many, all is text."""
    broken = "<tool_code>{x}</tool_code>"
    unread = "[[TOOL_CALL]] and "
    for before, expected in (
        (broken * (MAX_BROKEN - 1), [broken * (MAX_BROKEN - 1), LOOK]),
        (broken * MAX_BROKEN, [broken * MAX_BROKEN + CALL]),
        (unread * MAX_BROKEN, [unread * MAX_BROKEN, LOOK]),
    ):
        for size in (1, 7, 10_000):
            text = before + CALL
            produced, _ = play(make, [text[n : n + size] for n in range(0, len(text), size)])
            assert expected == short(produced)


def test_closing_markers_in_a_call_are_counted():
    """Its strings may quote many of them; with too many it is text, and so is all up to there."""
    for number in (MAX_CLOSINGS - 1, MAX_CLOSINGS):
        text = json.dumps({"name": "f", "arguments": {"a": "</tool_code>" * number}})
        for chunks in ([f"<tool_code>{text}</tool_code>"], f"<tool_code>{text}</tool_code>"):
            (seen,) = short(play(make, chunks)[0])
            assert (number < MAX_CLOSINGS) == isinstance(seen, tuple)


def test_closing_markers_that_come_one_by_one_take_no_more_time():
    """Not each of them is worth another look at all that is held."""
    text = '[[TOOL_CALL]]{"a":"' + "x" * (MAX_BODY // 2)
    closings = ["[[/TOOL_CALL]]"] * 10_000
    produced, _ = play(make, [text, *closings])
    assert [text + "".join(closings)] == short(produced)


# Around it ----------------------------------------------------------------------------------------


def scripted(*lines, prefix="s1."):
    """What a script becomes."""
    return play(lambda: EmbeddedNormalizer(ScriptedNormalizer(prefix), prefix), lines)[0]


def test_other_parts_pass_untouched_and_in_order():
    """Reasoning, refusals and native calls may say what they like."""
    native = "tool_call"
    events = [
        PartStarted(part_id="r1", kind="reasoning"),
        PartDelta(part_id="r1", kind="reasoning", delta=CALL),
        PartStarted(part_id="t1", kind="text"),
        PartDelta(part_id="t1", kind="text", delta="a"),
        PartFinished(part_id="r1", kind="reasoning", text=CALL),
        PartDelta(part_id="t1", kind="text", delta="b"),
        ProviderEvent(provider="p", raw=encode_json(CALL)),
        PartFinished(part_id="t1", kind="text", text="ab"),
        PartStarted(part_id="c1", kind=native, name="f", call_id="x"),
        PartDelta(part_id="c1", kind=native, delta=CALL),
        PartFinished(part_id="c1", kind=native, text=CALL, name="f", call_id="x"),
        PartStarted(part_id="f1", kind="refusal"),
        PartDelta(part_id="f1", kind="refusal", delta=CODE),
        PartFinished(part_id="f1", kind="refusal", text=CODE),
        Finish("stop", echo=Echo("k", 1)),
    ]
    produced = scripted(*events)
    assert events == produced


def test_parts_are_read_side_by_side():
    """Each text part is a text of its own."""
    half, rest = CALL[:20], CALL[20:]
    produced = scripted(
        PartStarted(part_id="t1", kind="text"),
        PartStarted(part_id="t2", kind="text"),
        PartDelta(part_id="t1", kind="text", delta=half),
        PartDelta(part_id="t2", kind="text", delta=CODE),
        PartDelta(part_id="t1", kind="text", delta=rest),
        PartDelta(part_id="t2", kind="text", delta="!"),
        PartFinished(part_id="t1", kind="text", text=CALL),
        PartFinished(part_id="t2", kind="text", text=CODE + "!"),
    )
    assert [LOOK, LOOK, "!"] == short(produced)
    ids = [one.part_id for one in produced if isinstance(one, PartStarted)]
    assert len(set(ids)) == len(ids)


def test_ids_are_kept_and_unique():
    """An id of the model's is taken unless it was given before, natively or not."""
    call = '[[TOOL_CALL]]{"name":"f","id":"x"}[[/TOOL_CALL]]'
    produced = scripted(
        PartStarted(part_id="c1", kind="tool_call", name="f", call_id="x"),
        PartFinished(part_id="c1", kind="tool_call", text="{}", name="f", call_id="x"),
        PartStarted(part_id="t1", kind="text"),
        PartDelta(part_id="t1", kind="text", delta=call + call + CALL + call.replace("x", "y")),
        PartFinished(part_id="t1", kind="text", text=""),
    )
    ids = [one.call_id for one in produced if isinstance(one, PartFinished)]
    assert ["x", "x-2", "x-3", "s1.e5c", "y"] == ids


@pytest.mark.parametrize(
    ("reason", "expected"), [("stop", "tool_calls"), ("length", "length"), ("other", "other")]
)
def test_the_finish_says_that_there_were_calls(reason, expected):
    """A stop becomes that; an echo, in which the call is only text, does not go back."""
    finish = Finish(reason, echo=Echo("k", [CALL]))
    produced, _ = play(lambda: EmbeddedNormalizer(Spoken(finish), "s1."), [CALL])
    assert Finish(expected) == produced[-1]
    produced, _ = play(lambda: EmbeddedNormalizer(Spoken(finish), "s1."), ["no call"])
    assert finish == produced[-1]


def test_errors_and_the_end_are_those_of_the_inner_machine():
    """What came before an error is told; nothing is shown that may turn out to be a call."""

    class Broken(Spoken):
        def feed(self, text):
            yield from Spoken.feed(self, text)
            raise ProviderError("gone")

    machine = EmbeddedNormalizer(Broken(), "s1.")
    assert not machine.is_over
    machine.inner.is_over = True
    assert machine.is_over
    produced = []
    with pytest.raises(ProviderError, match="gone"):
        collect(machine.feed("a [[TOOL"), produced)
    assert ["a "] == [one.delta for one in produced if isinstance(one, PartDelta)]


FRAGMENTS = st.sampled_from(
    [
        *("[[TOOL_CALL]]", "[[/TOOL_CALL]]", "<tool_code>", "</tool_code>", "[[tool_call]]"),
        *(
            "[",
            "[[",
            "]]",
            "<",
            "{",
            "}",
            '"',
            "\\",
            "\\u12",
            ":",
            ",",
            " ",
            "\n",
            "a",
            "é",
            "name",
        ),
        *(
            '{"name":"f","args":{}}',
            '{"f":{}}',
            '{"name":"f","args":{"a":"',
            '"}}',
            "tru",
            "-",
            "NaN",
        ),
        *(CALL, CODE),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(FRAGMENTS, max_size=9).map("".join), st.sampled_from([30, 50, 70, MAX_BODY]), st.data()
)
@example('[[TOOL_CALL]]{"name":"f","args":{"a":"[[/TOOL_CALL]]"}}[[/TOOL_CALL]]', MAX_BODY, None)
@example('[[TOOL_CALL]]{"name":"f","args":{"a":-[[/TOOL_CALL]]', MAX_BODY, None)
def test_however_it_is_cut_a_text_says_the_same(text, bound, data):
    """Visible text and calls are those of the uncut text; without calls all is visible."""

    def make():
        return Joined(EmbeddedNormalizer(Spoken(), "s1.", max_body=bound))

    uncut, error = play(make, [text])
    assert error is None
    assert (uncut, None) == play(make, list(text))
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert (uncut, None) == play(make, pieces)
    said = short(uncut)
    if all(isinstance(part, str) for part in said):
        assert [text] == said
    for one in uncut[:-1]:
        assert one == decode_event(encode_event(one))


# Teaching -----------------------------------------------------------------------------------------

TOOL = ToolSpec("look", "Look somewhere.", {"type": "object", "properties": {"at": {}}})


def test_a_prompt_is_rewritten_as_text():
    """The tools are described, calls and results stand in the notation, and nothing is native."""
    prompt = Prompt(
        "m",
        (
            SystemMessage("Be brief."),
            UserMessage("What is up?"),
            AssistantMessage(
                "Let me see.", (ToolCall("1", *LOOK), ToolCall("2", "f", "[")), Echo("k", 1)
            ),
            ToolMessage("1", "look", '{"colour":"blue"}'),
            ToolMessage("2", "f", '"no such tool"', is_error=True),
            AssistantMessage("", (ToolCall("3", "rest", ""),)),
            ToolMessage("3", "rest", "null"),
            AssistantMessage("Blue.", (), Echo("k", 2)),
            UserMessage("Thanks."),
        ),
        (TOOL,),
    )
    given = taught(prompt)
    lesson = given.messages[1]
    assert isinstance(lesson, SystemMessage)
    assert "look: Look somewhere." in lesson.text
    assert '{"type":"object","properties":{"at":{}}}' in lesson.text
    expected = (
        SystemMessage("Be brief."),
        lesson,
        UserMessage("What is up?"),
        AssistantMessage(
            "Let me see.\n"
            '[[TOOL_CALL]]{"name":"look","arguments":{"at":"sky"}}[[/TOOL_CALL]]\n'
            '[[TOOL_CALL]]{"name":"f","arguments":{"_raw":"["}}[[/TOOL_CALL]]'
        ),
        UserMessage(
            '[[TOOL_RESULT]]{"name":"look","output":{"colour":"blue"}}[[/TOOL_RESULT]]\n'
            '[[TOOL_RESULT]]{"name":"f","error":"no such tool"}[[/TOOL_RESULT]]'
        ),
        AssistantMessage('[[TOOL_CALL]]{"name":"rest","arguments":{}}[[/TOOL_CALL]]'),
        UserMessage('[[TOOL_RESULT]]{"name":"rest","output":null}[[/TOOL_RESULT]]'),
        AssistantMessage("Blue.", (), Echo("k", 2)),
        UserMessage("Thanks."),
    )
    assert Prompt("m", expected) == given


def test_what_is_taught_is_what_is_understood():
    """The example of the lesson, and an earlier call, are read as calls."""
    message = AssistantMessage("", (ToolCall("1", *LOOK),))
    lesson, said = taught(Prompt("m", (message,), (TOOL,))).messages
    assert [LOOK] == told(said.text)
    calls = [part for part in told(lesson.text) if isinstance(part, tuple)]
    assert [("the tool", '{"parameter":"value"}')] == calls


def test_a_prompt_without_tools_is_not_changed():
    """There is nothing to teach; the lesson stands last where there is nothing but system."""
    prompt = Prompt("m", (SystemMessage("Be brief."), UserMessage("Hi")))
    assert prompt == taught(prompt)
    system, lesson = taught(Prompt("m", (SystemMessage("Be brief."),), (TOOL,))).messages
    assert (SystemMessage("Be brief."), True) == (system, "look" in lesson.text)


class Run:
    """What a provider knows of a run."""

    window = 0.0

    async def sleep_until(self, when):
        """Wait."""
        await trio.sleep_until(when)

    def lull(self):
        """Nothing waits."""


@pytest.mark.parametrize("teach", [False, True])
async def test_a_provider_is_wrapped(teach):
    """Its models' calls are found; whether they are taught is its owner's choice."""
    lines = [
        PartStarted(part_id="t1", kind="text"),
        PartDelta(part_id="t1", kind="text", delta=CALL),
        PartFinished(part_id="t1", kind="text", text=CALL),
        Finish("stop"),
    ]
    inner = ScriptedProvider([lines], "local")
    provider = EmbeddedProvider(inner, teach=teach)
    prompt, produced = Prompt("m", (UserMessage("Hi"),), (TOOL,)), []
    async with provider.open(Run()) as connection:
        machine = connection.normalizer("s1.")
        async with connection.stream(prompt) as chunks:
            async for chunk in chunks:
                produced += machine.feed(chunk)
        produced += machine.close()
    assert ("local", [LOOK]) == (provider.name, short(produced))
    assert Finish("tool_calls") == produced[-1]
    assert [taught(prompt) if teach else prompt] == inner.prompts
    assert 0 == inner.open_streams
