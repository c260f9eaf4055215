"""The Codex app-server: every message that it may send, and a process that can misbehave.

The normalizer and the line splitter are pure and tested as such. The process is real, but it says
what a script says; each test sees that nothing of its group is left.
"""

import json
import math
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings, strategies as st
from normalizing import however_cut, play

from agentsse import process as processes
from agentsse.errors import ProviderError
from agentsse.events import (
    Option,
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    Question,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    Usage,
    encode_event,
)
from agentsse.messages import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage
from agentsse.providers import Finish, Prompt, codex as under_test
from agentsse.providers.codex import (
    CodexNormalizer,
    CodexProvider,
    LineSplitter,
    approval_question,
    as_text,
    decode_line,
    input_answers,
    input_questions,
    turn_error,
)
from agentsse.providers.embedded import EmbeddedProvider
from agentsse.testing import codex as app_server
from agentsse.testing.codex import codex_command, recorded

SECONDS = 30  # generous: only a test that hangs ever sees it

# Lines


def split(chunks, limit=100):
    """Feed chunks; return the lines, and the error or None."""
    splitter, lines = LineSplitter(limit), []
    try:
        for chunk in chunks:
            for line in splitter.feed(chunk):
                lines.append(line)  # noqa: PERF402 - what came before an error counts
    except ProviderError as error:
        return lines, error.code
    return lines, None


LINES = b'{"a": 1}\n\n{"b": "\xc5\xbelu\xc5\xa5"}\r\n  \n{"c": 3}\nrest'


@pytest.mark.parametrize("at", range(len(LINES) + 1))
def test_lines_are_the_same_however_they_come(at):
    """Bytes may be cut anywhere; blank lines are none, and a line without an end is not one yet."""
    expected = [b'{"a": 1}', b'{"b": "\xc5\xbelu\xc5\xa5"}\r', b'{"c": 3}']
    assert (expected, None) == split([LINES[:at], LINES[at:]])
    assert (expected, None) == split([LINES[n : n + 1] for n in range(len(LINES))])


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_line_too_long(size):
    """A line over the limit is an error, whether it has an end or not; what is before it counts."""
    assert ([b"12345"], None) == split([b"12345\n12345"], limit=5)
    for data in (b"ok\n123456", b"ok\n123456\nmore\n"):
        chunks = [data[n : n + size] for n in range(0, len(data), size)]
        assert ([b"ok"], "malformed") == split(chunks, limit=5)


@pytest.mark.parametrize(
    "line",
    [b"Welcome to Codex", b"[1]", b"1", b'"text"', b"{", b'{"a": "\xff"}', b"\xff\xfe", b"null"],
)
def test_a_line_that_is_no_message(line):
    """What is no JSON object in UTF-8 is an error that shows it."""
    with pytest.raises(ProviderError, match="expected lines of JSON objects") as raised:
        decode_line(line)
    assert raised.value.code == "malformed"
    assert line.decode(errors="replace")[:5] in raised.value.message.replace("\\", "")


def test_a_line_that_is_one():
    """Objects are messages; halves of surrogate pairs, which models write, are let through."""
    assert {"delta": "\ud83d", "ž": 1} == decode_line('{"delta": "\\ud83d", "ž": 1}'.encode())


def test_a_line_keeps_its_secrets():
    """What looks like a credential is not repeated."""
    with pytest.raises(ProviderError) as raised:
        decode_line(b"error: Authorization: Bearer canary-17")
    assert "canary-17" not in raised.value.message


# The normalizer


def told(events):
    """Events in short."""
    return [_told(event) for event in events]


def _told(event):
    match event:
        case PartStarted():
            return ("begin", event.kind)
        case PartDelta():
            return ("delta", event.kind, event.delta)
        case PartFinished():
            return ("end", event.kind, event.text)
        case ToolStarted():
            return ("tool", event.call_id, event.name, bytes(event.arguments).decode())
        case ToolOutputDelta():
            return ("output", event.call_id, event.delta)
        case ToolFinished():
            result = json.loads(bytes(event.result))
            return ("done", event.call_id, event.name, result, event.is_error, event.source)
        case ProviderEvent():
            return ("unknown", json.loads(bytes(event.raw)))
        case Finish():
            return ("finish", event.reason)
    raise AssertionError(event)


def note(method, /, **params):
    return {"method": method, "params": params}


def completed(status="completed", **turn):
    return note("turn/completed", turn={"id": "t1", "status": status, **turn})


def normalized(*messages):
    """What a turn of these messages tells; it must end well, and say `stop`."""
    produced, error = play(lambda: CodexNormalizer("m1"), [*messages, completed()])
    assert error is None
    *events, finish = told(produced)
    assert finish == ("finish", "stop")
    return events


def text(delta, item="i1"):
    return note("item/agentMessage/delta", itemId=item, delta=delta)


def ended(item_type, item="i1", **fields):
    return note("item/completed", item={"id": item, "type": item_type, **fields})


def begun(item_type, item="i1", **fields):
    return note("item/started", item={"id": item, "type": item_type, **fields})


def test_text():
    """An agent's message is a part: it begins with its first delta, and ends as a whole."""
    assert [
        ("begin", "text"),
        ("delta", "text", "Hel"),
        ("delta", "text", "lo"),
        ("end", "text", "Hello"),
    ] == normalized(
        note("turn/started", turn={"id": "t1"}),
        begun("agentMessage", text=""),
        text(""),
        text("Hel"),
        text("lo"),
        ended("agentMessage", text="Hello"),
        ended("agentMessage", text="Hello"),
    )


def test_text_without_deltas():
    """A message that comes only as a whole is told as one."""
    assert [
        ("begin", "text"),
        ("delta", "text", "Hello"),
        ("end", "text", "Hello"),
    ] == normalized(ended("agentMessage", text="Hello"))


def test_text_that_differs_from_its_deltas():
    """The whole has the last word: what is missing is said, what contradicts is said anew."""
    assert ("delta", "text", "lo") == normalized(text("Hel"), ended("agentMessage", text="Hello"))[
        2
    ]
    assert [("delta", "text", "Bye"), ("end", "text", "Bye")] == normalized(
        text("Hel"), ended("agentMessage", text="Bye")
    )[2:]


def test_texts_side_by_side():
    """Deltas belong to their item; what nobody has ended ends with the turn."""
    assert [
        ("begin", "text"),
        ("delta", "text", "a"),
        ("begin", "text"),
        ("delta", "text", "b"),
        ("delta", "text", "A"),
        ("end", "text", "b"),
        ("end", "text", "aA"),
    ] == normalized(
        text("a", "i1"), text("b", "i2"), text("A", "i1"), ended("agentMessage", "i2", text="b")
    )


def test_halves_of_a_surrogate_pair():
    """A character that comes in two deltas is one."""
    assert ("end", "text", "😀") == normalized(text("\ud83d"), text("\ude00"))[-1]


def thought(delta, index=0, item="r1"):
    return note("item/reasoning/summaryTextDelta", itemId=item, delta=delta, summaryIndex=index)


def test_reasoning():
    """Each part of a summary is a part; a new one ends those before it."""
    assert [
        ("begin", "reasoning"),
        ("delta", "reasoning", "One"),
        ("delta", "reasoning", "."),
        ("end", "reasoning", "One."),
        ("begin", "reasoning"),
        ("delta", "reasoning", "Two"),
        ("end", "reasoning", "Two"),
        ("begin", "reasoning"),
        ("delta", "reasoning", "Three"),
        ("end", "reasoning", "Three"),
    ] == normalized(
        begun("reasoning", "r1"),
        note("item/reasoning/summaryPartAdded", itemId="r1", summaryIndex=0),
        thought("One"),
        thought("."),
        note("item/reasoning/summaryPartAdded", itemId="r1", summaryIndex=1),
        thought("Two", 1),
        thought("Three", 2),
        ended("reasoning", "r1", summary=["One.", "Two", "Three"], content=[]),
    )


def test_reasoning_of_two_items():
    """A new part of one item does not end those of another, nor raw content."""
    raw = note("item/reasoning/textDelta", itemId="r1", delta="raw", contentIndex=0)
    events = normalized(raw, thought("a", 0, "r2"), thought("b", 0, "r1"), thought("c", 1, "r1"))
    assert [
        ("end", "reasoning", "b"),
        ("end", "reasoning", "raw"),
        ("end", "reasoning", "a"),
        ("end", "reasoning", "c"),
    ] == [event for event in events if event[0] == "end"]


def test_reasoning_of_an_item_is_complete():
    """When one item is complete, another one goes on."""
    events = normalized(
        thought("a", 0, "r1"),
        thought("b", 0, "r2"),
        ended("reasoning", "r1", summary=["a"]),
        thought("B", 0, "r2"),
    )
    assert [
        ("end", "reasoning", "a"),
        ("delta", "reasoning", "B"),
        ("end", "reasoning", "bB"),
    ] == events[4:]


def test_reasoning_of_many_items():
    """The thoughts of other items are not looked at again for each delta; squared takes minutes."""
    number = 20_000
    events = normalized(*(thought("a", 0, f"r{n}") for n in range(number)))
    assert [("end", "reasoning", "a")] * number == [event for event in events if event[0] == "end"]


def test_reasoning_that_begins_with_white_space():
    """White space is held until a word follows, however long it is, and what is redacted stays."""
    blank = [thought(" " * 1000) for _ in range(2_000)]
    assert ("end", "reasoning", " " * 2_000_000 + "a") == normalized(*blank, thought("a"))[-1]
    assert ("end", "reasoning", "") == normalized(*blank, thought("[redacted] secret"))[-1]


def test_reasoning_without_deltas():
    """Reasoning that comes only as a whole is told, part by part; nothing comes twice."""
    whole = ended("reasoning", "r1", summary=["One", "", 7], content=["raw"])
    assert [
        ("begin", "reasoning"),
        ("delta", "reasoning", "One"),
        ("end", "reasoning", "One"),
        ("begin", "reasoning"),
        ("delta", "reasoning", "raw"),
        ("end", "reasoning", "raw"),
    ] == normalized(whole, whole)


def test_reasoning_that_differs_from_its_deltas():
    """The whole has the last word; what it does not repeat ends as it is."""
    assert [
        ("begin", "reasoning"),
        ("delta", "reasoning", "On"),
        ("begin", "reasoning"),
        ("delta", "reasoning", "raw"),
        ("delta", "reasoning", "e"),
        ("end", "reasoning", "One"),
        ("end", "reasoning", "raw"),
    ] == normalized(
        thought("On"),
        note("item/reasoning/text" + "Delta", item_id="r1", delta="raw", content_index=0),
        ended("reasoning", "r1", summary=["One"], content=None),
    )


@pytest.mark.parametrize(
    "marker",
    [
        "<redacted_reasoning>",
        "[[REDACTED_REASONING]]",
        "[REDACTED]",
        "REDACTED: ",
        " \n<Redacted_Reasoning>",
    ],
)
def test_redacted_reasoning(marker):
    """That there is redacted reasoning is told, and nothing of it, however it comes."""
    existence = [("begin", "reasoning"), ("end", "reasoning", "")]
    secret = f"{marker}c2VjcmV0"
    whole = ended("reasoning", "r1", summary=[secret])

    assert existence == normalized(whole)
    for cut in range(len(secret)):
        deltas = [thought(secret[:cut]), thought(secret[cut:]), thought("more")]
        assert existence == normalized(*deltas)
        assert existence == normalized(*deltas, whole)
        assert existence == normalized(*([thought(marker[:cut])] if cut else []), whole)
    assert existence * 2 == normalized(thought(secret), thought(secret, 1))
    assert [
        ("begin", "reasoning"),
        ("delta", "reasoning", "open"),
        ("end", "reasoning", "open"),
    ] == normalized(thought("open"), whole)


def test_reasoning_that_only_begins_like_a_redacted_one():
    """What turns out not to be redacted is shown, all of it."""
    assert [
        ("begin", "reasoning"),
        ("delta", "reasoning", "[reddish"),
        ("end", "reasoning", "[reddish"),
    ] == normalized(thought("[re"), thought("ddish"))
    assert ("end", "reasoning", "[red") == normalized(thought("[red"))[-1]
    assert ("end", "reasoning", "[red]") == normalized(
        thought("[red"), ended("reasoning", "r1", summary=["[red]"])
    )[-1]


@pytest.mark.parametrize(
    ("kind", "fields", "name", "arguments"),
    [
        ("commandExecution", {"cwd": "/w", "command": "ls"}, "exec_command",
         '{"command":"ls","cwd":"/w"}'),
        ("commandExecution", {"command": ["ls", "-l"]}, "exec_command",
         '{"command":["ls","-l"]}'),
        ("commandExecution", {}, "exec_command", "{}"),
        ("commandExecution", {"command": "", "cwd": None}, "exec_command", "{}"),
        ("command_execution", {"command": "ls"}, "exec_command", '{"command":"ls"}'),
        ("fileChange", {"changes": [{"path": "a"}, {"path": "b"}]}, "apply_patch",
         '{"change_count":2}'),
        ("fileChange", {}, "apply_patch", "{}"),
        ("mcpToolCall", {"arguments": {"q": 1}, "tool": "find", "server": "s"}, "find",
         '{"server":"s","tool":"find","arguments":{"q":1}}'),
        ("mcpToolCall", {"arguments": {}}, "mcp_tool_call", "{}"),
        ("collabToolCall", {"tool": "wait", "senderThreadId": "a", "receiverThreadIds": ["b"]},
         "wait", '{"tool":"wait","sender_thread_id":"a","receiver_thread_ids":["b"]}'),
        ("collabAgentToolCall", {"sender_thread_id": "a", "receiver_thread_ids": []},
         "collab_tool_call", '{"sender_thread_id":"a"}'),
        ("webSearch", {"query": "weather"}, "web_search", '{"query":"weather"}'),
        ("imageView", {"path": "/a.png"}, "view_image", '{"path":"/a.png"}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["id", "itemId", "item_id", "beside"])
def test_tools(kind, fields, name, arguments, place):
    """Each kind of tool has its name and its arguments, in their order, wherever its id stands."""
    source = "mcp" if kind == "mcpToolCall" else "provider"
    item = {"type": kind, **fields}
    params = {"item": item, "itemId": "c1"} if place == "beside" else {"item": {place: "c1"} | item}

    assert [
        ("tool", "c1", name, arguments),
        ("done", "c1", name, "", False, source),
    ] == normalized(
        note("item/started", **params),
        note("item/started", **params),
        note("item/completed", **params),
        note("item/completed", **params),
    )
    assert [
        ("tool", "c1", name, arguments),
        ("done", "c1", name, "", False, source),
    ] == normalized(note("item/completed", **params))


@pytest.mark.parametrize(
    "item", [{"type": "commandExecution"}, {"type": "plan", "id": "p1"}, {"id": "x"}, {}, None]
)
@pytest.mark.parametrize("method", ["item/started", "item/completed"])
def test_items_that_are_not_known(item, method):
    """An item of another kind, or a tool without an id, is handed on."""
    message = note(method, item=item)
    assert [("unknown", message)] == normalized(message)


def done(**fields):
    """What a command's end tells of its result, and whether it is an error."""
    *_, (_, _, _, result, is_error, _) = normalized(ended("commandExecution", "c1", **fields))
    return result, is_error


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"status": "completed"}, ("", False)),
        ({"status": "failed"}, ("", True)),
        ({"status": "declined"}, ("", True)),
        ({"status": "denied"}, ("", True)),
        ({"status": "error"}, ("", True)),
        ({"status": "canceled"}, ("", True)),
        ({"status": "Cancelled"}, ("", True)),
        ({"status": 7}, ("", False)),
        ({"error": "boom"}, ("boom", True)),
        ({"error": ""}, ("", False)),
        ({"error": {}}, ("{}", False)),
        ({"error": {"message": "timeout", "code": "ETIMEDOUT"}, "status": "failed"},
         ('{"code":"ETIMEDOUT","message":"timeout"}', True)),
        ({"aggregatedOutput": "alpha\nbeta\n", "stderr": "warn", "message": "ok", "error": "no"},
         ("alpha\nbeta\n", True)),
        ({"aggregated_output": "alpha\n"}, ("alpha\n", False)),
        ({"stdout": " out\n", "stderr": "err\n", "output": "unused"}, ("out\n\nerr", False)),
        ({"stdout": "same\n", "stderr": "same"}, ("same", False)),
        ({"stderr": "err", "error": "boom", "message": "unused"}, ("err\n\nboom", True)),
        ({"output": "a", "result": {"b": 1, "a": [2]}, "response": None, "value": 3},
         ('a\n\n{"a":[2],"b":1}\n\n3', False)),
        ({"message": "nothing to do"}, ("nothing to do", False)),
        ({"message": {"ž": "ť"}}, ('{"ž":"ť"}', False)),
    ],
)  # fmt: skip
def test_results_of_tools(fields, expected):
    """What was printed comes first, as it was; else what was said in any other way."""
    assert expected == done(**fields)


def test_result_that_is_nested_without_end():
    """A result that no JSON writer can follow is cut, and is no crash."""
    value = []
    for _ in range(100_000):
        value = [value]
    result, _ = done(output=value)
    assert result.startswith("[[[")


def output(delta, method="item/commandExecution/outputDelta", **fields):
    return note(method, **({"itemId": "c1"} | fields), delta=delta)


def test_output_of_a_command():
    """What a command prints is told as it comes; that it is repeated at its end is no news."""
    assert [
        ("tool", "c1", "exec_command", '{"command":"ls"}'),
        ("output", "c1", "a\n"),
        ("output", "c1", "b\n"),
        ("done", "c1", "exec_command", "a\nb\n", False, "provider"),
    ] == normalized(
        begun("commandExecution", "c1", command="ls"),
        output("a\n"),
        output(""),
        output("b\n"),
        ended("commandExecution", "c1", aggregatedOutput="a\nb\n", status="completed"),
    )


@pytest.mark.parametrize(
    ("whole", "more"), [("a\nb\n", ["b\n"]), ("other", ["other"]), ("a\n", []), ("", [])]
)
def test_output_that_differs_from_its_deltas(whole, more):
    """The aggregate is authoritative: one more delta brings what was not said."""
    events = normalized(output("a\n"), ended("commandExecution", "c1", aggregatedOutput=whole))
    expected = [("output", "c1", text) for text in ["a\n", *more]]
    assert expected == [event for event in events if event[0] == "output"]
    assert whole or "a\n" == events[-1][3]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (output("x"), ("exec_command", "x")),
        (output("x", itemId=None, item_id="c1"), ("exec_command", "x")),
        (output("x", "item/fileChange/outputDelta"), ("apply_patch", "x")),
        (note("item/mcpToolCall/progress", itemId="c1", message="x"), ("mcp_tool_call", "x")),
        (note("item/mcpToolCall/progress", itemId="c1", tool="find", message="x"), ("find", "x")),
    ],
)
def test_output_of_a_call_that_is_not_known(message, expected):
    """Output that comes before its call begins it, with the name that such a call has."""
    name, delta = expected
    assert [("tool", "c1", name, "{}"), ("output", "c1", delta)] == normalized(message)


@pytest.mark.parametrize(
    "message",
    [
        output(""),
        note("item/mcpToolCall/progress", itemId="c1"),
        note("item/mcpToolCall/progress", itemId="c1", message=7),
    ],
)
def test_output_of_nothing(message):
    """Empty output is none."""
    assert [] == normalized(message)


@pytest.mark.parametrize(
    "message",
    [
        note("model/rerouted", toModel="x"),
        note("turn/plan/updated"),
        note("item/plan/delta", itemId="p", delta="x"),
        note("account/rateLimits/updated", rateLimits={}),
        note("item/agentMessage/delta", itemId="i", delta=7),
        note("item/reasoning/textDelta", itemId="i"),
        output("x", itemId=""),
        {"method": 7},
        {"method": "a/b", "params": [1]},
        {"event": "a/b", "data": "x"},
        {"type": "a/b", "x": 1},
        {"type": "text"},
        {},
        [],
        "text",
        None,
        7,
        note("error", error={"message": "again"}, willRetry=True),
        note("error", error={"message": "again"}, will_retry=True),
    ],
)
def test_what_is_not_known_is_handed_on(message):
    """Whatever else comes, and an error after which Codex tries again, is handed on as it is."""
    assert [("unknown", message)] == normalized(message)


@pytest.mark.parametrize(
    "message",
    [
        note("turn/start", threadId="x"),
        note("turn/started", turn={"id": "t"}),
        note("thread/started", thread={}),
        note("serverRequest/resolved", requestId=0),
        begun("userMessage", content=[]),
        ended("userMessage", content=[]),
        begun("reasoning"),
        ended("reasoning"),
        ended("agentMessage"),
        note("item/reasoning/summaryPartAdded"),
    ],
)
def test_what_is_known_and_tells_nothing(message):
    """What we have said ourselves, and mere beginnings, are no events."""
    assert [] == normalized(message)


@pytest.mark.parametrize(
    "shape",
    [
        lambda method, params: {"method": method, "params": params},
        lambda method, params: {"event": method, "data": params},
        lambda method, params: {"type": method, **params},
    ],
    ids=["method", "event", "type"],
)
def test_shapes_of_messages(shape):
    """Bridges write the same in other forms."""
    messages = [
        shape("item/agentMessage/delta", {"item_id": "i", "delta": "Hel"}),
        shape("turn/completed", {"turn": {"status": "completed"}}),
    ]
    produced, error = play(lambda: CodexNormalizer("m1"), messages)
    assert error is None
    assert [("delta", "text", "Hel"), ("end", "text", "Hel"), ("finish", "stop")] == told(produced)[
        1:
    ]
    _, error = play(lambda: CodexNormalizer("m1"), [shape("error", {"message": "rate limit"})])
    assert error.code == "rate_limit"


def test_ids_begin_with_the_prefix():
    """Part ids are unique in the run, those of redacted reasoning too."""
    produced, _ = play(
        lambda: CodexNormalizer("m7"), [text("a"), thought("[redacted]"), thought("b", 1)]
    )
    ids = [event.part_id for event in produced if isinstance(event, PartStarted)]
    assert ["m7p1", "m7r1", "m7p2"] == ids


def test_other_threads_are_not_ours():
    """What agents say that Codex has started is handed on, and does not end our turn."""
    other = note("item/agentMessage/delta", threadId="thr_2", itemId="i", delta="theirs")
    ends = note("turn/completed", threadId="thr_2", turn={"status": "failed"})
    own = note("item/agentMessage/delta", threadId="thr_1", itemId="i", delta="ours")
    assert [
        ("unknown", other),
        ("unknown", ends),
        ("begin", "text"),
        ("delta", "text", "ours"),
        ("end", "text", "ours"),
    ] == normalized(note("turn/start", threadId="thr_1"), other, ends, own)


@pytest.mark.parametrize(
    ("status", "reason"), [("completed", "stop"), ("interrupted", "other"), ("strange", "other")]
)
def test_the_end_of_a_turn(status, reason):
    """A turn that is over says why; the finish comes when the stream ends."""
    machine = CodexNormalizer("m1")
    assert not machine.is_over
    assert [] == list(machine.feed(completed(status)))
    assert machine.is_over
    assert [("finish", reason)] == told(machine.close())


def test_a_stream_without_an_end():
    """A stream that ends before the turn is an error, after all that has come."""
    produced, error = play(lambda: CodexNormalizer("m1"), [text("Hel")])
    assert [("begin", "text"), ("delta", "text", "Hel")] == told(produced)
    assert error.code == "incomplete"


def usage(last, total=None):
    names = ("inputTokens", "outputTokens", "reasoningOutputTokens", "cachedInputTokens",
             "cacheWriteInputTokens")  # fmt: skip
    told_of = {"last": dict(zip(names, last, strict=False))}
    if total is not None:
        told_of["total"] = dict(zip(names, total, strict=False))
    return note("thread/tokenUsage/updated", tokenUsage=told_of)


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([], (0, 0, 0, 0, 0)),
        ([usage((12, 8, 3, 4, 5))], (12, 8, 3, 4, 5)),
        ([usage((12, 8)), usage((20, 9))], (20, 9, 0, 0, 0)),
        ([usage((12, 8), (112, 108))], (12, 8, 0, 0, 0)),
        ([usage((12, 8), (112, 108)), usage((12, 8), (112, 108))], (12, 8, 0, 0, 0)),
        ([usage((12, 8), (112, 108)), usage((20, 9), (132, 117))], (32, 17, 0, 0, 0)),
        ([usage((12, 8), (112, 108)), usage((5, 1), (5, 1))], (5, 1, 0, 0, 0)),
        ([note("thread/tokenUsage/updated", token_usage={"last": {"input_tokens": 7}})],
         (7, 0, 0, 0, 0)),
        ([usage(("many", -1))], (0, 0, 0, 0, 0)),
        ([note("thread/tokenUsage/updated")], (0, 0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_usage(updates, expected):
    """The tokens are those of all model calls of the turn, and of no turn before it."""
    produced, _ = play(lambda: CodexNormalizer("m1"), [*updates, completed()])
    got = produced[-1].usage
    assert (
        Usage(
            input_tokens=expected[0],
            output_tokens=expected[1],
            reasoning_tokens=expected[2],
            cache_read_tokens=expected[3],
            cache_write_tokens=expected[4],
        )
        == got
    )


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ({"message": "boom"}, "provider_error", "codex answered: boom"),
        ("boom", "provider_error", "codex answered: boom"),
        (None, "provider_error", "codex answered: Turn failed"),
        ({}, "provider_error", "codex answered: Turn failed"),
        ({"message": "boom", "codexErrorInfo": "other"}, "provider_error",
         "codex answered (other): boom"),
        ({"message": "x", "codexErrorInfo": "contextWindowExceeded"}, "context_length", ""),
        ({"message": "x", "codex_error_info": "context_window_exceeded"}, "context_length", ""),
        ({"message": "x", "codexErrorInfo": "usageLimitExceeded"}, "quota", ""),
        ({"message": "x", "codexErrorInfo": "unauthorized"}, "auth", ""),
        ({"message": "x", "codexErrorInfo": "badRequest"}, "bad_request", ""),
        ({"message": "x", "codexErrorInfo": "serverOverloaded"}, "overloaded", ""),
        ({"message": "x", "codexErrorInfo": {"httpConnectionFailed": {"httpStatusCode": 429}}},
         "rate_limit", "codex answered with status 429 (httpConnectionFailed): x"),
        ({"message": "x", "codexErrorInfo": {"httpConnectionFailed": {"httpStatusCode": None}}},
         "unreachable", ""),
        ({"message": "x", "codexErrorInfo": {"responseStreamDisconnected": {}}}, "incomplete", ""),
        ({"message": "x", "codexErrorInfo": {}}, "provider_error", "codex answered: x"),
        ({"message": "x", "codexErrorInfo": 7}, "provider_error", "codex answered: x"),
        ({"message": "x", "additionalDetails": "more"}, "provider_error",
         "codex answered: x: more"),
        ({"message": "token=canary17"}, "provider_error", "codex answered: token=[redacted]"),
    ],
)  # fmt: skip
def test_a_turn_that_fails(error, code, message):
    """A failed turn is an error that says what Codex said, and what it means; no finish comes."""
    produced, raised = play(
        lambda: CodexNormalizer("m1"), [text("Hel"), completed("failed", error=error), text("lo")]
    )
    assert [("begin", "text"), ("delta", "text", "Hel")] == told(produced)
    assert code == raised.code
    assert message in raised.message


def test_when_to_try_again():
    """Where Codex says how long to wait, the error does."""
    info = {"modelCap": {"model": "x", "reset_after_seconds": 30}}
    error = turn_error("codex", {"message": "x", "codexErrorInfo": info})
    assert ("rate_limit", 30) == (error.code, error.retry_after)


@pytest.mark.parametrize("seconds", [10**400, 1 << 53, -1, "30", True, 3.5])
def test_when_to_try_again_must_be_a_number_of_seconds(seconds):
    """What is none, or beyond all reason, is not taken for one."""
    info = {"modelCap": {"resetAfterSeconds": seconds}}
    assert turn_error("codex", {"message": "x", "codexErrorInfo": info}).retry_after is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (note("error", error={"message": "boom"}, willRetry=False), "codex answered: boom"),
        (note("error", message="boom"), "codex answered: boom"),
        (note("error", error="boom"), "codex answered: boom"),
        (note("error"), "codex answered: Turn failed"),
    ],
)
def test_an_error_beats_any_finish(message, expected):
    """An error for good ends the call, before and after the turn has been completed."""
    for messages in ([message, completed()], [completed(), message]):
        produced, raised = play(lambda: CodexNormalizer("m1"), messages)
        assert expected == raised.message
        assert [] == produced


@attrs.define
class Wire:
    """The splitter, the decoder and the normalizer, as one machine that is fed bytes."""

    lines: LineSplitter = attrs.field(factory=LineSplitter)
    machine: CodexNormalizer = attrs.field(factory=lambda: CodexNormalizer("m1"))

    def feed(self, data):
        """Take some bytes."""
        for line in self.lines.feed(data):
            yield from self.machine.feed(decode_line(line))

    def close(self):
        """Take note of the end."""
        return self.machine.close()


def test_a_whole_turn_however_it_is_cut():
    """The same bytes tell the same, cut at any place."""
    messages = [
        note("turn/start", threadId="thr_1"),
        note("turn/started", threadId="thr_1", turn={"id": "t1"}),
        thought("Let me seé 😀"),
        thought("[REDACTED]", 1),
        begun("commandExecution", "c1", command="ls"),
        output("žluť\n"),
        ended("commandExecution", "c1", command="ls", aggregatedOutput="žluť\n"),
        note("model/rerouted", toModel="x"),
        text("Hel"),
        text("lo 😀"),
        ended("agentMessage", text="Hello 😀"),
        usage((12, 8), (12, 8)),
        completed(),
    ]
    data = "".join(json.dumps(m, ensure_ascii=n % 2 == 0) + "\n" for n, m in enumerate(messages))
    produced, error = however_cut(Wire, data.encode(), every=7)
    assert error is None
    assert len(told(produced)) == 14
    _, error = however_cut(Wire, data.encode() + b"{\xff}\n", every=7)
    assert error.code == "malformed"


fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])

METHODS = (
    "turn/start", "turn/started", "turn/completed", "error", "thread/tokenUsage/updated",
    "item/agentMessage/delta", "item/reasoning/summaryPartAdded",
    "item/reasoning/summaryTextDelta", "item/reasoning/textDelta", "item/started",
    "item/completed", "item/commandExecution/outputDelta", "item/fileChange/outputDelta",
    "item/mcpToolCall/progress", "item/tool/requestUserInput",
)  # fmt: skip
KEYS = st.sampled_from(
    (
        "threadId", "turnId", "itemId", "item", "turn", "id", "type", "delta", "status", "error",
        "message", "codexErrorInfo", "httpStatusCode", "willRetry", "summaryIndex", "text",
        "summary", "content", "command", "cwd", "changes", "server", "tool", "arguments",
        "aggregatedOutput", "stdout", "output", "tokenUsage", "last", "total", "inputTokens",
        "questions", "question", "header", "options", "label", "description", "isSecret", "path",
        "reason", "grantRoot", "fileChanges", "networkApprovalContext", "host",
        "reset_after_seconds",
    )
)  # fmt: skip
WORDS = (
    "agentMessage", "reasoning", "commandExecution", "mcpToolCall", "fileChange", "failed",
    "completed", "i1", "\ud800", "[redacted]", "", "thr_1",
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(alphabet=st.characters(), max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)
MESSAGES = st.fixed_dictionaries(
    {"method": st.sampled_from(METHODS), "params": st.dictionaries(KEYS, VALUES, max_size=8)}
)


@fuzz
@given(st.lists(MESSAGES | VALUES, max_size=8))
def test_wrong_types_never_crash(messages):
    """Whatever comes, the machine makes events that can be sent, or says that the call failed."""
    produced, _ = play(lambda: CodexNormalizer("m1"), messages)
    for event in produced:
        if not isinstance(event, Finish):
            encode_event(event)


@fuzz
@given(st.dictionaries(KEYS, VALUES, max_size=8), VALUES)
def test_wrong_types_of_requests_never_crash(params, answers):
    """Whatever Codex asks, a person is asked something that can be sent."""
    for question in (*input_questions(params), approval_question(params, ("\ud800",))):
        encode_event(question)
    assert input_answers(params, answers).keys() == {"answers"}


# What is said


def test_what_only_the_user_says_is_said_as_it_is():
    """A lone question is not dressed up."""
    assert as_text([UserMessage("What?")]) == "What?"
    assert as_text([UserMessage("What?"), UserMessage("Why?")]) == "What?\n\nWhy?"
    assert as_text([]) == ""


def test_a_conversation_is_said_in_sections():
    """Else each message says whose it is."""
    assert (
        "[system]\nBe brief.\n\n[user]\nWhat?\n\n[assistant]\nLet me see.\n\n"
        '[assistant called look, c1]\n{"at":"sky"}\n\n[assistant called look, c2]\n{}\n\n'
        '[result of look, c1]\n"blue"\n\n[error of look, c2]\nno'
    ) == as_text(
        [
            SystemMessage("Be brief."),
            UserMessage("What?"),
            AssistantMessage("Let me see.", (ToolCall("c1", "look", '{"at":"sky"}'),)),
            AssistantMessage("", (ToolCall("c2", "look", "{}"),)),
            ToolMessage("c1", "look", '"blue"'),
            ToolMessage("c2", "look", "no", is_error=True),
        ]
    )


# What is asked


@pytest.mark.parametrize(
    ("params", "paths", "prompt"),
    [
        ({"command": "rm x", "cwd": "/w", "reason": "it is old"}, (),
         "Codex wants to run: rm x\nin: /w\nbecause: it is old"),
        ({"command": ["rm", "x"]}, (), "Codex wants to run: rm x"),
        ({"networkApprovalContext": {"host": "example.com"}}, (),
         "Codex wants to reach: example.com"),
        ({"grantRoot": "/w"}, ("a.py", "b.py"),
         "Codex wants to change: a.py, b.py\nand from now on to write below: /w"),
        ({"fileChanges": {"a.py": {}}}, (), "Codex wants to change: a.py"),
        ({}, (), "Codex wants to change files, or to run something that it does not name"),
        ({"command": "x" * 5_000}, (),
         "Codex wants to run: " + "x" * 1_980 + "..."),
    ],
)  # fmt: skip
def test_questions_for_approval(params, paths, prompt):
    """A person is told what Codex wants to do, where, and why."""
    assert Question(id="approve", kind="confirm", prompt=prompt) == approval_question(params, paths)


def test_questions_for_input():
    """Questions with options offer them; secrets and what is no question are not asked."""
    asked = [
        {"id": "q1", "header": "Colour", "question": "Which?",
         "options": [{"label": "red", "description": "warm"}, {"label": "blue"}, {"label": "red"},
                     {"label": ""}, 7]},
        {"id": "q2", "question": "Why?", "options": None},
        {"id": "q3", "question": "Password?", "isSecret": True},
        {"id": "q2", "question": "Twice?"},
        {"question": "Nameless?"},
        "no question",
    ]  # fmt: skip
    assert (
        Question(
            id="q1",
            kind="choice",
            prompt="Colour: Which?",
            options=(Option(id="red", label="red: warm"), Option(id="blue")),
        ),
        Question(id="q2", kind="text", prompt="Why?"),
    ) == input_questions({"questions": asked})
    assert {
        "answers": {
            "q1": {"answers": ["red"]},
            "q2": {"answers": []},
            "q3": {"answers": []},
        }
    } == input_answers({"questions": asked}, {"q1": "red", "q2": 7})
    assert () == input_questions({})
    assert {"answers": {}} == input_answers({"questions": "none"}, None)


# The process


@attrs.define
class Person:
    """A run, as a provider sees it, with somebody who answers.

    Attributes:
        answers: What is answered; nothing for ever where it is None.
        asked: All that was asked.
        lulls: How often all was handed on.
    """

    answers: dict | None = None
    window: float = 0.0
    asked: list = attrs.field(factory=list)
    lulls: int = 0
    waiting: int = 0
    asked_now: trio.Event = attrs.field(factory=trio.Event)

    async def sleep_until(self, when):
        """Wait."""
        await trio.sleep_until(when)

    def lull(self):
        """Count it."""
        self.lulls += 1

    async def ask(self, questions):
        """Answer, or do not."""
        self.asked.append(tuple(questions))
        self.waiting += 1
        self.asked_now.set()
        try:
            if self.answers is None:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            return self.answers
        finally:
            self.waiting -= 1


def facts_of_processes():
    """The pid, parent and group of all that are not only waiting to be reaped."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            yield int(path.parent.name), int(parent), int(group)


@attrs.define
class Stage:
    """A place for app-servers that follow a script, and what is known of them afterwards."""

    record: Path
    person: Person = attrs.field(factory=Person)

    def provider(self, *turns, options=None, **script):
        """Make a provider whose app-servers follow a script."""
        command = codex_command({"record": str(self.record), "turns": turns, **script})
        return CodexProvider(command=command, **(options or {}))

    @property
    def received(self):
        """What the app-servers have received."""
        return [fact["received"] for fact in recorded(self.record) if "received" in fact]

    def received_of(self, method):
        """The parameters of all messages of a method."""
        return [m["params"] for m in self.received if m.get("method") == method]

    @property
    def answers(self):
        """What the app-servers were answered, by the ids of their requests."""
        return {m["id"]: m for m in self.received if "method" not in m}

    @property
    def pids(self):
        """The app-servers that there were."""
        return [fact["pid"] for fact in recorded(self.record) if "pid" in fact]

    @property
    def running(self):
        """All that is left of the groups of the app-servers."""
        return [pid for pid, _, group in facts_of_processes() if group in self.pids]


@pytest.fixture
def stage(tmp_path):
    """A stage that must be empty in the end."""
    files = len(list(Path("/proc/self/fd").iterdir()))
    record = tmp_path / "record"
    record.touch()
    stage = Stage(record)
    yield stage
    assert [] == stage.running
    assert [] == [pid for pid, parent, _ in facts_of_processes() if parent == os.getpid()]
    assert files >= len(list(Path("/proc/self/fd").iterdir()))


ASKED = Prompt("gpt", (SystemMessage("Be brief."), UserMessage("What?")))


async def converse(connection, prompt=ASKED, *, on_event=lambda _told_event: None):
    """Make a model call as a run does; return what it has told."""
    machine, events = connection.normalizer("m1"), []
    async with connection.stream(prompt) as chunks:
        async for chunk in chunks:
            for produced in machine.feed(chunk):
                events.append(_told(produced))
                on_event(events[-1])
    events += told(machine.close())
    return events


def says(*pieces):
    """The events of a text."""
    deltas = [("delta", "text", piece) for piece in pieces]
    return [("begin", "text"), *deltas, ("end", "text", "".join(pieces)), ("finish", "stop")]


@asynccontextmanager
async def opened(provider, person):
    """Open a connection, for a bounded time."""
    with trio.fail_after(SECONDS):
        async with provider.open(person) as connection:
            yield connection


async def test_a_call(stage, tmp_path):
    """A call greets the app-server, begins a thread and a turn, and tells what comes of it."""
    provider = stage.provider(
        [{"reasoning": ["Hm", "m"]}, {"command": "ls", "output": ["a\n", "b\n"]},
         {"text": ["Hel", "lo"]}],
        options={"cwd": tmp_path, "options": {"sandbox": "read-only"}},
    )  # fmt: skip
    async with opened(provider, stage.person) as connection:
        events = await converse(connection)

    assert [
        ("begin", "reasoning"),
        ("delta", "reasoning", "Hm"),
        ("delta", "reasoning", "m"),
        ("end", "reasoning", "Hmm"),
        ("tool", "item_3", "exec_command", json.dumps(
            {"command": "ls", "cwd": str(tmp_path)}, separators=(",", ":"))),
        ("output", "item_3", "a\n"),
        ("output", "item_3", "b\n"),
        ("done", "item_3", "exec_command", "a\nb\n", False, "provider"),
        *says("Hel", "lo"),
    ] == events  # fmt: skip
    assert ["initialize", "initialized", "thread/start", "turn/start"] == [
        message["method"] for message in stage.received
    ]
    assert stage.received_of("initialize")[0]["clientInfo"]["name"] == "agentsse"
    assert [
        {
            "model": "gpt",
            "cwd": str(tmp_path),
            "developerInstructions": "Be brief.",
            "sandbox": "read-only",
        }
    ] == stage.received_of("thread/start")
    assert [
        {"threadId": "thr_0", "input": [{"type": "text", "text": "What?"}]}
    ] == stage.received_of("turn/start")
    assert stage.person.lulls > 0


def texts_of(stage):
    """What was said in each turn, and to which thread."""
    return [
        (params["threadId"], params["input"][0]["text"])
        for params in stage.received_of("turn/start")
    ]


def followed_by(prompt, *messages):
    return attrs.evolve(prompt, messages=(*prompt.messages, *messages))


async def test_later_calls_say_only_what_is_new(stage):
    """The process and the thread are used again; what Codex said itself is not repeated to it."""
    call = AssistantMessage("Let me see.", (ToolCall("c1", "look", "{}"),))
    second = followed_by(ASKED, call, ToolMessage("c1", "look", '"blue"'))
    third = followed_by(second, AssistantMessage("Blue."), UserMessage("Why?"))
    fourth = followed_by(third, UserMessage("Really?"))

    async with opened(stage.provider(), stage.person) as connection:
        for prompt in (ASKED, second, third, fourth):
            assert says("done") == await converse(connection, prompt)

    assert [
        ("thr_0", "What?"),
        ("thr_0", '[result of look, c1]\n"blue"'),
        ("thr_0", "Why?"),
        ("thr_0", "Really?"),
    ] == texts_of(stage)
    assert len(stage.pids) == 1


@pytest.mark.parametrize(
    "then",
    [
        ASKED,
        attrs.evolve(ASKED, model="other"),
        Prompt("gpt", (SystemMessage("Be long."), UserMessage("What?"), UserMessage("Why?"))),
        Prompt("gpt", (UserMessage("Why?"),)),
        followed_by(ASKED, AssistantMessage("done")),
    ],
    ids=["the same", "other model", "other instructions", "other question", "nothing new"],
)
async def test_a_prompt_that_a_thread_has_not_heard_begins_a_new_one(stage, then):
    """Where thread and prompt do not agree, a new thread of the same process is told all."""
    async with opened(stage.provider(), stage.person) as connection:
        await converse(connection)
        await converse(connection, then)

    threads = [thread for thread, _ in texts_of(stage)]
    assert len(set(threads)) == 2
    assert then.model == stage.received_of("thread/start")[1]["model"]
    assert len(stage.pids) == 1


async def test_codex_chooses_the_model(stage):
    """Without a model, instructions or a folder Codex is told of none."""
    async with opened(stage.provider(), stage.person) as connection:
        await converse(connection, Prompt("", (UserMessage("What?"),)))
    assert [{}] == stage.received_of("thread/start")


async def test_tools_of_ours_stand_in_the_text(stage):
    """Wrapped, Codex is taught our tools: it calls one in its text, and its answer comes later."""
    script = stage.provider(
        [{"text": ["Let me see. [[TOOL_", 'CALL]]{"name": "look", "arguments": {"at": "sky"}}',
                   "[[/TOOL_CALL]]"]}],
        [{"text": ["It is blue."]}],
    )  # fmt: skip
    prompt = Prompt("gpt", (UserMessage("What colour?"),))
    async with opened(EmbeddedProvider(script, teach=True), stage.person) as connection:
        first = await converse_embedded(connection, prompt)
        calls = [event for event in first if isinstance(event, PartFinished)]
        (call,) = [event for event in calls if event.kind == "tool_call"]
        assert ("look", '{"at":"sky"}') == (call.name, call.text)
        assert first[-1].reason == "tool_calls"
        said = AssistantMessage("Let me see.", (ToolCall(call.call_id, "look", call.text),))
        answered = ToolMessage(call.call_id, "look", '"blue"')
        second = await converse_embedded(connection, followed_by(prompt, said, answered))

    assert second[-2].text == "It is blue."
    assert [
        ("thr_0", "What colour?"),
        ("thr_0", '[[TOOL_RESULT]]{"name":"look","output":"blue"}[[/TOOL_RESULT]]'),
    ] == texts_of(stage)


async def converse_embedded(connection, prompt):
    machine, produced = connection.normalizer("m1"), []
    async with connection.stream(prompt) as chunks:
        async for chunk in chunks:
            produced += machine.feed(chunk)
    return [*produced, *machine.close()]


async def test_what_came_before_the_turn_is_told_in_it(stage):
    """Notifications from before the first turn are not lost."""
    provider = stage.provider(start=[{"notify": "mcpServer/startupStatus/updated"}])
    async with opened(provider, stage.person) as connection:
        events = await converse(connection)
    assert events[0][0] == "unknown"
    assert events[0][1]["method"] == "mcpServer/startupStatus/updated"
    assert says("done") == events[1:]


async def test_other_threads_do_not_end_the_turn(stage):
    """The turns of agents that Codex has started come and go within ours."""
    other = {"threadId": "thr_9", "turn": {"id": "turn_9", "status": "completed"}}
    turn = [
        {"notify": "turn/started", "params": other},
        {"notify": "turn/completed", "params": other},
        {"text": ["on"]},
    ]
    async with opened(stage.provider(turn), stage.person) as connection:
        events = await converse(connection)
    assert ["unknown", "unknown"] == [event[0] for event in events[:2]]
    assert says("on") == events[2:]


async def test_it_is_read_seldom(stage):
    """Within a window that the run has no use for, what comes is gathered."""
    stage.person.window = 0.05
    turn = [{"text": ["a", "b"]}] * 3
    async with opened(stage.provider(turn), stage.person) as connection:
        events = await converse(connection)
    assert len([event for event in events if event[0] == "delta"]) == 6


async def test_environment(stage, monkeypatch):
    """The process has our environment, and what was set for it; that is never repeated."""
    monkeypatch.setenv("OURS", "from-us")
    code = (
        "import os, sys; sys.exit(f\"{os.environ['OURS']} {os.environ['THEIRS']} "
        "{os.environ['SHORT']}\")"
    )
    env = {"THEIRS": "canary-17", "SHORT": "x"}
    provider = CodexProvider(command=(sys.executable, "-S", "-c", code), env=env)
    assert "canary-17" not in repr(provider)
    with pytest.raises(ProviderError) as raised:
        async with opened(provider, stage.person) as connection:
            await converse(connection)
    assert raised.value.code == "incomplete"
    assert "it has ended with exit code 1: from-us [redacted] x" in raised.value.message


# Questions


COMMAND = "item/commandExecution/requestApproval"
FILES = "item/fileChange/requestApproval"


@pytest.mark.parametrize(
    ("answers", "decision", "status"),
    [({"approve": True}, "accept", False), ({"approve": False}, "decline", True)],
)
async def test_a_person_approves_or_not(stage, answers, decision, status):
    """A person is asked whether Codex may, and Codex is told."""
    stage.person.answers = answers
    async with opened(stage.provider([{"approve": "rm x", "output": ["ok"]}]), stage.person) as c:
        events = await converse(c)

    ((question,),) = stage.person.asked
    assert question.prompt.startswith("Codex wants to run: rm x\nin: ")
    assert [{"decision": decision}] == [answer["result"] for answer in stage.answers.values()]
    assert status == events[-2][4]


@pytest.mark.parametrize("approvals", ["ask", "decline"])
@pytest.mark.parametrize(
    ("method", "params", "yes", "no"),
    [
        (COMMAND, {"command": "rm x"}, "accept", "decline"),
        (FILES, {"itemId": "f1"}, "accept", "decline"),
        ("execCommandApproval", {"command": ["rm", "x"]}, "approved", "denied"),
        ("applyPatchApproval", {"fileChanges": {"a.py": {}}}, "approved", "denied"),
    ],
)
async def test_all_ways_to_ask_for_approval(stage, method, params, yes, no, approvals):  # noqa: PLR0917 - the columns of a table
    """Each way has its own words for yes and no; who declines all of it asks nobody."""
    stage.person.answers = {"approve": True}
    turn = [
        {"notify": "item/started",
         "params": {"item": {"id": "f1", "type": "fileChange", "changes": [{"path": "a.py"}, {}]}}},
        {"notify": "item/started",
         "params": {"item": {"id": "f2", "type": "fileChange", "changes": None}}},
        {"request": method, "params": params},
    ]  # fmt: skip
    provider = stage.provider(turn, options={"approvals": approvals})
    async with opened(provider, stage.person) as connection:
        await converse(connection)

    decision = yes if approvals == "ask" else no
    assert [{"decision": decision}] == [answer["result"] for answer in stage.answers.values()]
    prompts = [question.prompt for (question,) in stage.person.asked]
    expected = "Codex wants to run: rm x" if "command" in params else "Codex wants to change: a.py"
    assert ([expected] if approvals == "ask" else []) == prompts


async def test_a_person_answers_questions(stage):
    """What Codex wants to know, a person is asked, and the answers go back by question."""
    stage.person.answers = {"q1": "red", "q2": "because"}
    asked = [
        {"id": "q1", "header": "Colour", "question": "Which?", "options": [{"label": "red"}]},
        {"id": "q2", "header": "", "question": "Why?"},
    ]
    async with opened(stage.provider([{"ask": asked}, {"ask": []}]), stage.person) as connection:
        await converse(connection)

    assert [["choice", "text"]] == [[q.kind for q in qs] for qs in stage.person.asked]
    assert [
        {"answers": {"q1": {"answers": ["red"]}, "q2": {"answers": ["because"]}}},
        {"answers": {}},
    ] == [answer["result"] for answer in stage.answers.values()]


async def test_reading_goes_on_while_a_person_is_asked(stage):
    """What comes while a person thinks is told, and a person is asked no longer than the turn."""
    ask = {"id": 77, "method": COMMAND, "params": {"command": "rm x"}}
    turn = [
        {"raw": json.dumps(ask) + "\n"},
        {"notify": "serverRequest/resolved", "params": {"requestId": "strange"}},
        {"text": ["meanwhile"]},
        {"hang": "listening"},
    ]
    async with opened(stage.provider(turn), stage.person) as connection:
        async with trio.open_nursery() as nursery:

            async def when_asked():
                await stage.person.asked_now.wait()
                nursery.cancel_scope.cancel()

            def on_event(event):
                if event[0] == "end":
                    nursery.start_soon(when_asked)

            nursery.start_soon(lambda: converse(connection, on_event=on_event))
        await trio.testing.wait_all_tasks_blocked()
        assert stage.person.waiting == 0
        assert len(stage.person.asked) == 1

    assert {} == stage.answers


async def test_a_question_that_codex_withdraws(stage):
    """Codex may go on without an answer: then the person is not asked any longer."""
    ask = {"id": 77, "method": COMMAND, "params": {"command": "rm x"}}
    gate = stage.record.with_name("gate")
    os.mkfifo(gate)
    turn = [
        {"raw": json.dumps(ask) + "\n"},
        {"text": ["meanwhile"]},
        {"wait": str(gate)},
        {"notify": "serverRequest/resolved", "params": {"requestId": 77}},
        {"text": ["on"]},
    ]

    async def open_the_gate():
        await stage.person.asked_now.wait()
        os.close(await trio.to_thread.run_sync(os.open, gate, os.O_WRONLY))

    async with opened(stage.provider(turn), stage.person) as connection:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_the_gate)
            await converse(connection)
        await trio.testing.wait_all_tasks_blocked()
        assert stage.person.waiting == 0

    assert {} == stage.answers


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("item/tool/call", {"result": {"contentItems": [], "success": False}}),
        ("account/chatgptAuthTokens/refresh",
         {"error": {"code": -32001, "message": "this client has no tokens to refresh"}}),
        ("item/strange", {"error": {"code": -32601,
                                    "message": "this client does not know 'item/strange'"}}),
    ],
)  # fmt: skip
async def test_requests_that_nobody_is_asked_about(stage, method, expected):
    """Each gets its answer at once, and the turn goes on."""
    async with opened(stage.provider([{"request": method}, {"text": ["on"]}]), stage.person) as c:
        assert says("on") == await converse(c)

    assert [expected] == [
        {key: value for key, value in answer.items() if key != "id"}
        for answer in stage.answers.values()
    ]
    assert [] == stage.person.asked


async def test_an_error_of_the_run_ends_it(stage):
    """Where the run cannot ask, its error goes on as it is."""

    @attrs.define
    class Alone(Person):
        async def ask(self, _questions):
            await trio.lowlevel.checkpoint()
            raise LookupError("nobody is here")

    with pytest.raises(LookupError, match="nobody is here"):
        async with opened(stage.provider([{"approve": "rm x"}]), Alone()) as connection:
            await converse(connection)


# What goes wrong


async def failure(stage, provider):
    """The error of a call, and its events; the connection is of use after it."""
    events = []
    async with opened(provider, stage.person) as connection:
        with pytest.raises(ProviderError) as raised:
            await converse(connection, on_event=events.append)
        assert isinstance(raised.value, ProviderError)
    return raised.value, events


@pytest.mark.parametrize(
    ("steps", "code", "message"),
    [
        ([{"stderr": "out of luck\ntoken=canary17"}, {"exit": 3}], "incomplete",
         "it has ended with exit code 3: out of luck token=[redacted]"),
        ([{"exit": 0}], "incomplete",
         "it has ended with exit code 0: (it has said nothing to stderr)"),
        ([{"raw": '{"method": "item/agent'}, {"exit": 0}], "incomplete", "exit code 0"),
        ([{"raw": "Welcome!\n"}, {"hang": "deaf"}], "malformed", "got 'Welcome!'"),
        ([{"raw": '{"a": "\xff"}\n'}, {"hang": "deaf"}], "malformed", "in UTF-8"),
        ([{"endless": True}], "malformed",
         "codex: expected lines of at most 16777216 bytes, got a longer one"),
        ([{"fail": {"message": "no luck", "codexErrorInfo": "usageLimitExceeded"}}], "quota",
         "codex answered (usageLimitExceeded): no luck"),
        ([{"notify": "error", "params": {"error": {"message": "no luck"}}}, {"text": ["x"]}],
         "provider_error", "codex answered: no luck"),
    ],
)  # fmt: skip
async def test_a_turn_goes_wrong(stage, steps, code, message):
    """Whatever goes wrong within a turn is an error that says what, after what was said before."""
    error, events = await failure(stage, stage.provider([{"text": ["Hel"]}, *steps]))

    assert says("Hel")[:3] == events[:3]
    assert code == error.code
    assert message in error.message
    assert "canary17" not in error.message


async def test_output_is_closed_and_the_process_goes_on(stage, monkeypatch):
    """A process that closes its output without an end is not waited for."""
    monkeypatch.setattr(under_test, "LAST_WORDS", 0.01)
    error, _ = await failure(stage, stage.provider([{"close": True}, {"hang": "deaf"}]))
    assert "but it has closed its output" in error.message


async def test_a_process_is_killed(stage):
    """A process that somebody kills is named as such."""
    async with opened(stage.provider([{"text": ["Hel"]}, {"hang": "deaf"}]), stage.person) as c:

        def on_event(event):
            if event[0] == "end":
                os.kill(stage.pids[0], signal.SIGKILL)

        with pytest.raises(ProviderError, match="signal 9 ended it"):
            await converse(c, on_event=on_event)


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ({"start": [{"stderr": "not logged in"}, {"exit": 1}]}, "incomplete",
         "it has ended with exit code 1: not logged in"),
        ({"refuse": {"initialize": {"code": -32600, "message": "Already initialized"}}},
         "provider_error", "codex answered (-32600): Already initialized"),
        ({"refuse": {"thread/start": {"code": -32603, "message": "no such model does not exist"}}},
         "not_found", "codex answered (-32603): no such model does not exist"),
        ({"refuse": {"turn/start": {"code": -32001, "message": "Server overloaded; retry later."}}},
         "overloaded", "codex answered (-32001): Server overloaded; retry later."),
        ({"results": {"thread/start": {"thread": 7}}}, "malformed",
         'expected thread/start to answer with the id of a thread, got {"thread":7}'),
    ],
)  # fmt: skip
async def test_a_turn_cannot_begin(stage, script, code, message):
    """What goes wrong before the turn is an error too, and nothing is told."""
    error, events = await failure(stage, stage.provider(**script))
    assert [] == events
    assert code == error.code
    assert message in error.message


async def test_there_is_no_such_program(stage):
    """A program that is not there is what a call complains about, each call anew."""
    provider = CodexProvider(command=("no-such-program",), name="mine")
    async with opened(provider, stage.person) as connection:
        for _ in range(2):
            with pytest.raises(ProviderError) as raised:
                await converse(connection)
            assert raised.value.code == "not_found"
            assert raised.value.message.startswith(
                "mine: expected a program that can be started, got no-such-program: No such file"
            )


async def test_answers_to_nothing_are_left_aside(stage):
    """An answer that nobody waits for does no harm, and neither does one without a result."""
    stray = '{"id": 99, "result": {}}\n{"id": null, "error": {"message": "x"}}\n'
    provider = stage.provider([{"raw": stray}, {"text": ["on"]}], start=[{"raw": stray}])
    async with opened(provider, stage.person) as connection:
        assert says("on") == await converse(connection)


async def test_who_reads_nothing_is_given_up(stage, monkeypatch):
    """A process that asks and asks, and never reads the answers, is an error."""
    monkeypatch.setattr(under_test, "MAX_OUTGOING", 10)
    ask = json.dumps({"id": 1, "method": "x" * 70}) + "\n"
    turn = [{"raw": ask * 1_000}, {"hang": "deaf"}]
    error, _ = await failure(stage, stage.provider(turn))
    assert error.code == "malformed"
    assert "it has left 10 messages unread" in error.message


async def test_who_closes_its_input(stage):
    """A process that does not want to read more may still end its turn."""
    turn = [
        {"deafen": True},
        {"raw": json.dumps({"id": 1, "method": "strange", "params": {}}) + "\n"},
        {"text": ["on"]},
    ]
    async with opened(stage.provider(turn), stage.person) as connection:
        assert says("on") == await converse(connection)


# Another try


async def test_a_failed_turn_is_tried_again_in_a_new_thread(stage):
    """After a turn that failed, the same process is told everything again."""
    provider = stage.provider([{"fail": {"message": "rate limit"}}], [{"text": ["on"]}])
    async with opened(provider, stage.person) as connection:
        with pytest.raises(ProviderError):
            await converse(connection)
        assert says("on") == await converse(connection)

    assert [("thr_0", "What?"), ("thr_2", "What?")] == texts_of(stage)
    assert len(stage.pids) == 1


async def test_a_turn_that_is_refused_is_tried_again(stage):
    """A turn that has not begun leaves the process as it is."""
    refuse = {"turn/start": {"code": -32001, "message": "overloaded"}}
    async with opened(stage.provider(refuse=refuse), stage.person) as connection:
        for _ in range(2):
            with pytest.raises(ProviderError):
                await converse(connection)
    assert len(stage.pids) == 1


async def test_a_process_that_died_is_replaced(stage):
    """After the process has died, the next call has a new one, and tells it everything."""
    async with opened(stage.provider([{"exit": 1}]), stage.person) as connection:
        for _ in range(2):
            with pytest.raises(ProviderError):
                await converse(connection)
            assert [] == stage.running

    assert len(stage.pids) == 2
    assert [("thr_0", "What?")] * 2 == texts_of(stage)


async def test_an_error_in_the_turn_interrupts_it(stage):
    """Who stops listening in the middle of a turn interrupts it, and may go on with the process."""
    provider = stage.provider([{"text": ["Hel"]}, {"hang": "listening"}], [{"text": ["on"]}])

    def fail(_event):
        raise ProviderError("enough")

    async with opened(provider, stage.person) as connection:
        with pytest.raises(ProviderError, match="enough"):
            await converse(connection, on_event=fail)
        assert says("on") == await converse(connection)

    assert [{"threadId": "thr_0", "turnId": "turn_1"}] == stage.received_of("turn/interrupt")
    assert len(stage.pids) == 1


# Cancelled


async def cancelled(stage, provider, *, on="end", seconds=math.inf, asked=False):
    """Cancel a call at its first event of a kind, after some time, or when a person is asked."""
    with trio.fail_after(SECONDS), trio.move_on_after(seconds) as scope:

        def on_event(event):
            if event[0] == on:
                scope.cancel()

        async def when_asked():
            await stage.person.asked_now.wait()
            scope.cancel()

        async with trio.open_nursery() as nursery, provider.open(stage.person) as connection:
            if asked:
                nursery.start_soon(when_asked)
            await converse(connection, on_event=on_event)
    assert scope.cancelled_caught
    assert [] == stage.running


async def test_cancel_in_a_turn(stage):
    """A cancelled turn is interrupted; when the call is over nothing of the process is left."""
    turn = [{"spawn": True}, {"text": ["Hel"]}, {"hang": "listening"}]
    await cancelled(stage, stage.provider(turn))

    assert [{"threadId": "thr_0", "turnId": "turn_1"}] == stage.received_of("turn/interrupt")
    assert any("spawned" in fact for fact in recorded(stage.record))


@pytest.mark.parametrize("stubborn", [False, True])
async def test_cancel_a_process_that_does_not_listen(stage, stubborn, monkeypatch):
    """A process that does not end its turn is ended itself, with all that it has started."""
    monkeypatch.setattr(under_test, "INTERRUPT", 0.05)
    monkeypatch.setattr(processes, "GRACE", 0.05)
    turn = [{"spawn": True}, {"text": ["Hel"]}, {"hang": "deaf"}]
    await cancelled(stage, stage.provider(turn, stubborn=stubborn))
    assert [] == stage.received_of("turn/interrupt")


async def test_cancel_before_the_first_token(stage):
    """A turn that has begun and says nothing is interrupted, too."""
    provider = stage.provider([{"notify": "turn/waits"}, {"hang": "listening"}])
    await cancelled(stage, provider, on="unknown")
    assert len(stage.received_of("turn/interrupt")) == 1


@pytest.mark.parametrize("method", ["initialize", "thread/start", "turn/start"])
async def test_cancel_who_never_answers(stage, method, monkeypatch):
    """Where nothing is ever answered, the caller's patience counts, and nothing is waited for."""
    monkeypatch.setattr(under_test, "INTERRUPT", math.inf)
    await cancelled(stage, stage.provider(mute=[method]), seconds=0.3)


@pytest.mark.parametrize(
    "answer",
    [{"refuse": {"turn/interrupt": {"code": -32600, "message": "no turn"}}}, {}],
    ids=["refused", "dies"],
)
async def test_cancel_where_the_interrupt_fails(stage, answer, monkeypatch):
    """An interrupt that is refused, or kills the process, is not waited for any longer."""
    monkeypatch.setattr(under_test, "INTERRUPT", math.inf)
    script = answer or {"exits_on": "turn/interrupt"}
    await cancelled(stage, stage.provider([{"text": ["Hel"]}, {"hang": "listening"}], **script))
    assert len(stage.received_of("turn/interrupt")) == 1


async def test_cancel_while_a_person_is_asked(stage):
    """A question ends with its run."""
    await cancelled(stage, stage.provider([{"approve": "rm x"}]), asked=True)
    assert stage.person.waiting == 0
    assert len(stage.received_of("turn/interrupt")) == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
async def test_cancel_at_every_step(stage, steps):
    """However early the cancel comes, nothing is left behind."""
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:

            async def use():
                async with stage.provider([{"hang": "listening"}]).open(stage.person) as c:
                    await converse(c)

            nursery.start_soon(use)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert [] == stage.running


async def test_leave_without_a_call(stage):
    """A run that makes no model call leaves nothing behind either."""
    async with opened(stage.provider(), stage.person):
        await trio.testing.wait_all_tasks_blocked()
    assert [] == stage.running


# The stand-in


def test_the_stand_in_takes_its_script_from_a_file_too(tmp_path):
    """It takes its script from its argument, or from a file that is named there."""
    for step in ({"strange": 1}, {}):
        path = tmp_path / "script"
        path.write_text(json.dumps({"start": [step]}))
        for argument in (str(path), path.read_text()):
            with pytest.raises(ValueError, match="expected a step that the module describes"):
                app_server.main(argument)


async def test_the_stand_in_runs_as_a_module():
    """It can be started like any module."""
    script = json.dumps({"results": {"initialize": "hello"}})
    command = [sys.executable, "-m", "agentsse.testing.codex", script]
    with trio.fail_after(SECONDS):
        async with processes.open_process(command) as process:
            await process.stdin.send_all(b'{"id": 1, "method": "initialize"}\n')
            assert await process.stdout.receive_some() == b'{"id": 1, "result": "hello"}\n'
            await process.stdin.aclose()
            assert await process.wait() == 0
