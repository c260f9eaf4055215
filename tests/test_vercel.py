"""Vercel's UI message stream: what comes in, what goes out, and what a client would make of it.

Decoder and encoder are pure: they are fed requests and events. `read` puts chunks together as the
SDK does, and as strictly: what would end a client's stream fails a test. What is about connections
uses real sockets; the clients themselves are in `test_vercel_clients.py`.
"""

import json
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from hypothesis import given, strategies as st
from msgspec import UNSET, Raw
from raw import connect, request, wait_until

from agentsse import Agent, AgentError
from agentsse.dialects import MAX_MESSAGES, Cancel, Request, Start, Watch
from agentsse.dialects.native import NATIVE
from agentsse.dialects.vercel import CONTINUED, DONE, REFUSAL, VERCEL, decode_chat, refuse
from agentsse.errors import BadRequest
from agentsse.events import (
    NULL,
    AgentStarted,
    Custom,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    Liveness,
    Moderation,
    Option,
    PartDelta,
    PartFinished,
    PartStarted,
    Problem,
    Question,
    Receipt,
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
USAGE = Usage(input_tokens=120, output_tokens=40, reasoning_tokens=9, cache_read_tokens=100)
WIRE_USAGE = {
    "inputTokens": 120,
    "inputTokenDetails": {"noCacheTokens": 20, "cacheReadTokens": 100, "cacheWriteTokens": 0},
    "outputTokens": 40,
    "outputTokenDetails": {"textTokens": 31, "reasoningTokens": 9},
    "totalTokens": 160,
}
STEP = {"type": "step-start"}
CONFIRMATION = Question(id="go", kind="confirm", prompt="Go on?")
COLOR = Question(id="color", kind="choice", prompt="Which?", options=(Option(id="red"),))
TYPES = {
    *("start", "finish", "abort", "error", "start-step", "finish-step", "text-start", "text-delta"),
    *("text-end", "reasoning-start", "reasoning-delta", "reasoning-end", "tool-input-start"),
    *("tool-input-delta", "tool-input-available", "tool-approval-request", "tool-output-available"),
    *("tool-output-error", "tool-output-denied", "file", "source-url", "source-document"),
}  # that both versions know, of those we send


# Events


def started(value=b'"Hi"'):
    return RunStarted(run_id="r1", agent="main", input=Raw(value), on_disconnect="grace:30")


def text(*deltas, kind="text", part_id="p1"):
    return (
        PartStarted(part_id=part_id, kind=kind),
        *(PartDelta(part_id=part_id, kind=kind, delta=delta) for delta in deltas),
        PartFinished(part_id=part_id, kind=kind, text="".join(deltas)),
    )


def call(name, *deltas, call_id="c1"):
    """What a model says to call a tool."""
    part_id = f"part of {call_id}"
    return (
        PartStarted(part_id=part_id, kind="tool_call", name=name, call_id=call_id),
        *(PartDelta(part_id=part_id, kind="tool_call", delta=delta) for delta in deltas),
        PartFinished(
            part_id=part_id, kind="tool_call", text="".join(deltas), name=name, call_id=call_id
        ),
    )


def run_tool(name="look", result=b'"sunny"', *, call_id="c1", is_error=False, source="local"):
    return (
        ToolStarted(call_id=call_id, name=name, arguments=Raw(b'{"place":"here"}')),
        ToolFinished(
            call_id=call_id, name=name, result=Raw(result), is_error=is_error, source=source
        ),
    )


def model(*events, step_id="s1", reason="stop"):
    """A model call in which this is said."""
    return (
        StepStarted(step_id=step_id, kind="model", name="m"),
        *events,
        StepFinished(step_id=step_id, kind="model", name="m", finish_reason=reason),
    )


def finished(result=b"null", *, outcome="success", error=None, cause=None, pending=()):
    return RunFinished(
        outcome=outcome,
        usage=USAGE,
        receipt=Receipt(cause=cause),
        result=UNSET if result is None else Raw(result),
        error=error,
        pending=pending,
    )


def asked(*questions, request_id="q1"):
    return InputRequested(request_id=request_id, questions=questions)


def received(answers, request_id="q1"):
    return InputReceived(request_id=request_id, answers=Raw(json.dumps(answers).encode()))


# What becomes of them


def frames(*events, options=None, value=b'"Hi"'):
    encoder = VERCEL.encoder(options)
    return [frame for event in (started(value), *events) for frame in encoder.feed(event)]


def chunks(*events, options=None, value=b'"Hi"'):
    """The chunks of a whole run, its first one left out; the ends of responses as they are."""
    all_of_them = []
    for frame in frames(*events, options=options, value=value):
        assert frame.startswith(b"data: ")
        assert frame.endswith(b"\n\n")
        lines = [line.removeprefix(b"data: ") for line in frame[:-2].split(b"\n")]
        data = b"\n".join(lines).decode()
        all_of_them.append(data if data == "[DONE]" else json.loads(data))
    first, *others = all_of_them
    assert "start" == first["type"]
    return others


class Reader:
    """What a client makes of chunks, of version 6 or 7, both as strict as they are together."""

    def __init__(self):
        self.parts, self.open, self.inputs = [], {}, {}
        self.last, self.failed = None, None

    def feed(self, chunk):
        """Take a chunk; what a client would not take is an error."""
        kind = chunk["type"]
        assert kind in TYPES or kind.startswith("data-"), kind
        match kind.partition("-"):
            case ("start", "-", _):
                self.parts.append(STEP)
            case ("finish", "-", _):
                assert {} == self.open, "version 6 closes them without a word"
            case ("text" | "reasoning" as what, _, "start"):
                self.open[what, chunk["id"]] = part = {"type": what, "text": ""}
                self.parts.append(part)
            case ("text" | "reasoning" as what, _, "delta"):
                self.open[what, chunk["id"]]["text"] += chunk["delta"]
            case ("text" | "reasoning" as what, _, "end"):
                del self.open[what, chunk["id"]]
            case ("tool", _, what):
                self.take_tool(what, chunk)
            case ("data", _, _) if not chunk.get("transient"):
                self.parts.append(chunk)
            case ("finish" | "abort" | "error", "", _):
                assert {} == self.open, "a client would show them as unfinished"
                self.last = chunk
            case _:
                pass

    def take_tool(self, what, chunk):
        """Take a chunk that is about a call."""
        call_id = chunk["toolCallId"]
        in_step = self.parts[len(self.parts) - [*reversed(self.parts), STEP].index(STEP) :]
        match what:
            case "input-start" | "input-available":
                found = [part for part in in_step if part.get("toolCallId") == call_id]
                part = found[0] if found else {"toolCallId": call_id}
                if not found:
                    self.parts.append(part)
                part |= {"type": "dynamic-tool" if chunk.get("dynamic") else "tool",
                         "name": chunk["toolName"], "state": what}  # fmt: skip
                part |= {name: chunk[name] for name in ("input", "providerExecuted")
                         if name in chunk}  # fmt: skip
                self.inputs[call_id] = ""
            case "input-delta":
                assert any(part.get("toolCallId") == call_id for part in in_step)
                self.inputs[call_id] += chunk["inputTextDelta"]
            case _:
                part = next(p for p in reversed(self.parts) if p.get("toolCallId") == call_id)
                part["state"] = what
                part |= {name: chunk[name] for name in ("output", "errorText", "approvalId")
                         if name in chunk}  # fmt: skip

    @property
    def would_send_again(self):
        """Whether a client would that sends by itself once its tools have answered."""
        in_step = self.parts[len(self.parts) - [*reversed(self.parts), STEP].index(STEP) :]
        calls = [p for p in in_step if "toolCallId" in p and not p.get("providerExecuted")]
        return bool(calls) and all(p["state"] in ("output-available", "output-error")
                                   for p in calls)  # fmt: skip


def read(*events, options=None, value=b'"Hi"'):
    """What a client has that has read it all, responses and all."""
    reader = Reader()
    for chunk in chunks(*events, options=options, value=value):
        if chunk != "[DONE]":
            reader.feed(chunk)
    return reader


def parts(*events, **how):
    """The parts of the message that comes of it."""
    return read(*events, **how).parts


def spoken(words):
    return {"type": "text", "text": words}


def test_a_stream_is_these_bytes():
    """Data only, without names and ids; the message has the run's id, and its usage at the end."""
    expected = [
        '{"type":"start","messageId":"r1","messageMetadata":{"runId":"r1","agent":"main"}}',
        '{"type":"start-step"}',
        '{"type":"text-start","id":"p1"}',
        '{"type":"text-delta","id":"p1","delta":"Höf"}',
        '{"type":"text-delta","id":"p1","delta":"lich 😀"}',
        '{"type":"text-end","id":"p1"}',
        '{"type":"finish-step"}',
        '{"type":"finish","finishReason":"stop","messageMetadata":{"usage":'
        + json.dumps(WIRE_USAGE, separators=(",", ":"))
        + "}}",
        "[DONE]",
    ]
    events = [*model(*text("Höf", "lich 😀")), finished(b'"ignored"')]
    assert [f"data: {each}\n\n".encode() for each in expected] == frames(*events)


def test_a_model_call_and_its_tools_are_a_step():
    """Their answers come in the step of the calls; what is said of them is in the next one."""
    events = [
        *model(*text("I look."), *call("look", '{"pla', 'ce": 1}'), *call("dig", call_id="c2"),
               reason="tool_calls"),
        StepStarted(step_id="t", kind="tool_round", name="tools"),
        *run_tool("dig", b'{"error":"no spade"}', call_id="c2", is_error=True),
        *run_tool("look"),
        StepFinished(step_id="t", kind="tool_round", name="tools"),
        *model(*text("Sunny.", part_id="p2"), step_id="s2"),
        finished(),
    ]  # fmt: skip
    look = {"type": "tool", "name": "look", "toolCallId": "c1", "state": "output-available",
            "input": {"place": 1}, "output": "sunny"}  # fmt: skip
    dig = {"type": "tool", "name": "dig", "toolCallId": "c2", "state": "output-error",
           "input": {}, "errorText": "no spade"}  # fmt: skip
    reader = read(*events)
    assert [STEP, spoken("I look."), look, dig, STEP, spoken("Sunny.")] == reader.parts
    assert ("stop", False) == (reader.last["finishReason"], reader.would_send_again)


def test_a_model_that_says_nothing_makes_no_step():
    """Another one may have taken over."""
    assert [STEP, spoken("Hm.")] == parts(*model(), *model(*text("Hm.")), finished())


def test_how_a_tool_is_called_is_told_as_it_is_written():
    """Piece by piece, and then as a value."""
    told = [
        c for c in chunks(*model(*call("look", '{"a":', "[1]}")), finished()) if "toolCallId" in c
    ]
    assert [
        {"type": "tool-input-start", "toolCallId": "c1", "toolName": "look"},
        {"type": "tool-input-delta", "toolCallId": "c1", "inputTextDelta": '{"a":'},
        {"type": "tool-input-delta", "toolCallId": "c1", "inputTextDelta": "[1]}"},
        {"type": "tool-input-available", "toolCallId": "c1", "toolName": "look",
         "input": {"a": [1]}},
        {"type": "tool-output-error", "toolCallId": "c1",
         "errorText": "The run ended before the tool had answered."},
    ] == [chunk for chunk in told if "toolCallId" in chunk]  # fmt: skip


@pytest.mark.parametrize("written", ["{not JSON", '"\\ud800"', "[" * 5000])
def test_what_a_model_writes_that_is_no_json_is_told_as_text(written):
    """A call is a call, and the tool's answer says what is wrong with it."""
    (part,) = [p for p in parts(*model(*call("look", written)), finished()) if "toolCallId" in p]
    assert written == part["input"]


def test_thoughts_and_refusals_are_said():
    """Thoughts as such, refusals as text; what was never said is not begun."""
    events = [*text("Hm.", kind="reasoning"), *text("No.", kind="refusal", part_id="p2"),
              *text(part_id="p3")]  # fmt: skip
    expected = [STEP, {"type": "reasoning", "text": "Hm."}, spoken("No.")]
    assert expected == parts(*model(*events), finished())


def test_a_providers_own_tools_are_no_business_of_the_client():
    """They are marked, so that it neither calls them nor waits for them."""
    looked = run_tool("search", source="provider")
    reader = read(*model(*looked, *text("Found.")), finished())
    (part,) = [p for p in reader.parts if "toolCallId" in p]
    assert (True, {"place": "here"}) == (part["providerExecuted"], part["input"])
    assert ([STEP], False) == ([p for p in reader.parts if p == STEP], reader.would_send_again)


@pytest.mark.parametrize(
    ("result", "expected"),
    [(b'{"error":"no"}', "no"), (b'"no"', "no"), (b'{"error":1}', '{"error":1}'), (b"[1]", "[1]")],
)
def test_why_a_tool_has_failed_is_text(result, expected):
    """Its own words, or all it gave."""
    _, part, *_ = parts(*run_tool("x", result, is_error=True), finished())
    assert ("output-error", expected) == (part["state"], part["errorText"])


def test_an_agents_tools_need_no_model():
    """What it says behind them begins a step, as if a model had said it."""
    looked = {"type": "tool", "name": "look", "toolCallId": "c1", "state": "output-available",
              "input": {"place": "here"}, "output": "sunny"}  # fmt: skip
    expected = [STEP, looked, STEP, spoken("Sunny.")]
    assert expected == parts(*run_tool(), *text("Sunny."), finished())


@pytest.mark.parametrize("end", [finished(), finished(None, outcome="cancelled", cause="parent")])
def test_a_client_that_sends_by_itself_does_not_send_a_run_that_is_over(end):
    """Its rule is that all calls of the last step have been answered: they are not in the last."""
    reader = read(*run_tool(), end)
    assert (STEP, False) == (reader.parts[-1], reader.would_send_again)


def test_what_is_half_said_when_a_step_begins_is_closed_and_opened_again():
    """Version 6 would know nothing of it any more."""
    begun, delta, *_ = text("a", "b")
    other = PartDelta(part_id="p1", kind="text", delta="c")
    events = [begun, delta, *model(*text("M", part_id="p2")), other, finished()]
    assert [STEP, spoken("a"), STEP, spoken("M"), spoken("c")] == parts(*events)


def test_a_call_that_is_being_written_is_not_parted_from_its_step():
    """Two models may speak at once: a client looks for the call in the last step."""
    begin, delta, end = call("look", "{}")
    other = model(*text("M"), step_id="s2")
    events = [*model(begin, *other[:2], delta, *other[2:], end), *run_tool(), finished()]
    (part,) = [part for part in parts(*events) if "toolCallId" in part]
    assert ({}, "sunny") == (part["input"], part["output"])


def test_what_an_agent_emits_is_data():
    """Under its name; what a tool prints passes by."""
    emitted = Custom(name="chart", value=Raw(b'{"x":[1,2]}'))
    printed = ToolOutputDelta(call_id="c1", delta="half")
    told = chunks(emitted, printed, finished())
    assert [
        {"type": "data-chart", "data": {"x": [1, 2]}},
        {"type": "data-tool-output", "data": {"toolCallId": "c1", "delta": "half"},
         "transient": True},
    ] == told[:2]  # fmt: skip


def test_each_of_an_agents_values_is_data_that_is_replaced():
    """One part for each, by its name; what is removed becomes null."""
    changes = [
        ValuesChanged(values=Raw(b'{"a":1,"b":{"c":2}}')),
        ValuesChanged(values=Raw(b'{"a":null}')),
    ]
    expected = [("a", 1), ("b", {"c": 2}), ("a", None)]
    told = chunks(*changes, finished())[:3]
    assert {"data-values"} == {chunk["type"] for chunk in told}
    assert expected == [(chunk["id"], chunk["data"]) for chunk in told]


@pytest.mark.parametrize(
    "value", [b'{"__proto__":{}}', b'[{"constructor":{"prototype":1}}]', b'"\\"__proto__\\""']
)
def test_a_value_that_clients_fear_is_told_as_text(value):
    """They would end the stream for its sake; a text is a text, whatever it holds."""
    (part,) = parts(Custom(name="x", value=Raw(value)), finished())
    assert isinstance(part["data"], str)
    assert value.decode() in (part["data"], json.dumps(part["data"]))


def test_json_that_somebody_has_formatted_is_one_frame():
    """The lines of it are lines of the frame."""
    (part,) = parts(Custom(name="x", value=Raw(b'{\n "a": [\r\n 1]}')), finished())
    assert {"a": [1]} == part["data"]


@pytest.mark.parametrize(
    ("result", "expected"),
    [(b'"Done."', "Done."), (b'{"a":1}', '{"a":1}'), (b"null", None), (None, None)],
)
def test_who_says_nothing_has_its_result_as_the_text(result, expected):
    """Text as it is, anything else its JSON."""
    assert ([STEP, spoken(expected)] if expected else []) == parts(finished(result))


def test_a_result_is_not_said_behind_what_was_said():
    """It is the same, as a rule; thoughts alone are no answer."""
    assert [STEP, spoken("Hm.")] == parts(*text("Hm."), finished(b'"Done."'))
    thought = {"type": "reasoning", "text": "Hm."}
    said = parts(*text("Hm.", kind="reasoning"), finished(b'"Done."'))
    assert [STEP, thought, spoken("Done.")] == said


@pytest.mark.parametrize(("message", "expected"), [("Not here.", "Not here."), (None, REFUSAL)])
def test_a_shield_refuses_in_its_own_words(message, expected):
    """Unless they were said already, or something else was."""
    shield = Moderation(violation=True, message=message)
    reader = read(shield, Moderation(violation=False), finished())
    assert [STEP, spoken(expected)] == reader.parts
    assert "content-filter" == reader.last["finishReason"]
    assert [STEP, spoken("Sorry.")] == parts(shield, *text("Sorry."), finished())


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", "stop"), ("tool_calls", "stop"), ("length", "length"), ("other", "other"),
     ("content_filter", "content-filter"), (None, "stop")],
)  # fmt: skip
def test_the_reason_is_that_of_the_last_model_call(reason, expected):
    """Calls that the agent makes itself are none to end a message for."""
    reader = read(*model(*text("Hm."), reason=reason), finished())
    assert expected == reader.last["finishReason"]


def test_what_is_said_behind_a_model_call_ends_for_a_reason_of_its_own():
    """The call was cut short, not the agent."""
    reader = read(*model(*text("Hm."), reason="length"), *text("So."), finished())
    assert "stop" == reader.last["finishReason"]


BROKEN = "the model stopped because of an error"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (finished(None, outcome="error", error=Problem(code="x", message="no luck")),
         {"type": "error", "errorText": "no luck"}),
        (finished(None, outcome="error"), {"type": "error", "errorText": "the run has failed"}),
        (finished(None, outcome="cancelled", cause="client_cancel"),
         {"type": "abort", "reason": "client_cancel"}),
        (finished(None, outcome="cancelled", cause="disconnect"),
         {"type": "abort", "reason": "disconnect"}),
        (finished(None, outcome="cancelled", cause="deadline"),
         {"type": "error", "errorText": "the run was cancelled (deadline)"}),
        (finished(None, outcome="interrupted", cause="shutdown"),
         {"type": "error", "errorText": "the run was cancelled (shutdown)"}),
        (finished(None, outcome="cancelled"),
         {"type": "error", "errorText": "the run was cancelled"}),
    ],
)  # fmt: skip
def test_what_is_no_success_closes_everything_and_says_why(end, expected):
    """An abort is for whoever wanted it: a client takes it for a good end."""
    begun, delta, _ = text("half", part_id="p9")
    reader = read(*model(*call("look", "{}"), begun, delta), end)
    assert expected == reader.last
    (part,) = [p for p in reader.parts if "toolCallId" in p]
    assert "output-error" == part["state"]


def test_a_model_that_stops_because_of_an_error_has_given_no_answer():
    """Though the run went on."""
    reader = read(*model(*text("Hm."), reason="error"), finished())
    assert {"type": "error", "errorText": BROKEN} == reader.last


def test_a_call_that_breaks_off_while_it_is_written_is_over():
    """Nothing more comes of it."""
    (begin, delta, _) = call("look", "{")
    reader = read(*model(begin, delta), finished(None, outcome="cancelled", cause="parent"))
    (part,) = [p for p in reader.parts if "toolCallId" in p]
    assert "output-error" == part["state"]


def test_what_has_no_chunk_is_not_shown():
    """A client would end the stream for it."""
    others = [
        Liveness(elapsed_s=1, events=2, since_last_output_s=1),
        AgentStarted(agent="other"),
        StepStarted(step_id="f", kind="flow", name="f"),
        StepFinished(step_id="f", kind="flow", name="f"),
    ]
    assert ["finish", "[DONE]"] == [
        c["type"] if c != "[DONE]" else c for c in chunks(*others, finished())
    ]


# Tools of the client


def test_a_call_of_the_clients_is_left_to_it():
    """The message ends with it; the agent's own calls beside it have been answered."""
    events = [
        *model(*call("look", "{}"), *call("pick", '{"of":2}', call_id="c2"), reason="tool_calls"),
        *run_tool(),
        finished(b'""', pending=("c2",)),
    ]
    reader = read(*events)
    states = {p["name"]: p["state"] for p in reader.parts if "toolCallId" in p}
    assert {"look": "output-available", "pick": "input-available"} == states
    assert "tool-calls" == reader.last["finishReason"]
    assert {"toolCallId": "c2"}.items() <= reader.parts[-1].items()


HELD = {
    "id": "m7",
    "role": "assistant",
    "metadata": {"any": "thing"},
    "parts": [
        {"type": "step-start"},
        {"type": "reasoning", "text": "Hm.", "state": "done"},
        {"type": "text", "text": "I look.", "state": "done"},
        {"type": "tool-look", "toolCallId": "c1", "state": "output-available", "input": {"a": 1},
         "output": "sunny"},
        {"type": "tool-search", "toolCallId": "c2", "state": "output-error", "input": {},
         "errorText": "no net", "providerExecuted": True},
        {"type": "dynamic-tool", "toolName": "confirm", "toolCallId": "r0:q1", "input": {},
         "state": "output-denied", "approval": {"id": "r0:q1", "approved": False}},
        {"type": "tool-pick", "toolCallId": "c3", "state": "input-available"},
        {"type": "data-chart", "id": "d", "data": [1]},
        {"type": "source-url", "sourceId": "s", "url": "http://x"},
        {"type": "steering-message", "id": "of version 7", "parts": []},
        {"type": "step-start"},
        {"type": "tool-pick", "toolCallId": "c4", "state": "output-available", "output": 2},
    ],
}  # fmt: skip


def test_a_run_that_goes_on_with_a_message_has_its_id():
    """Whoever has brought it has what stands in it, and gets what is new, in a step of its own."""
    value = json.dumps(HELD).encode()
    first, *others = frames(*text("Two."), finished(), options=CONTINUED, value=value)
    assert b'{"type":"start","messageId":"m7","messageMetadata":{"runId":"r1"' in first
    assert b"start-step" in others[0]
    assert [STEP, spoken("Two.")] == parts(
        *text("Two."), finished(), options=CONTINUED, value=value
    )


def test_a_run_that_adds_nothing_to_a_message_ends_it_all_the_same():
    """Else a client that sends by itself would send it again, and again."""
    assert [STEP] == parts(finished(), options=CONTINUED, value=json.dumps(HELD).encode())


def test_whoever_comes_back_to_such_a_run_is_told_what_stood_in_it_before():
    """Part by part: a replay takes the place of all that a client has of the message."""
    reader = read(*text("Two."), finished(), value=json.dumps(HELD).encode())
    by_id = {p["toolCallId"]: p for p in reader.parts if "toolCallId" in p}
    assert ("output-available", {"a": 1}, "sunny") == tuple(
        by_id["c1"][each] for each in ("state", "input", "output")
    )
    assert ("output-error", "no net", True) == tuple(
        by_id["c2"][each] for each in ("state", "errorText", "providerExecuted")
    )
    assert ("dynamic-tool", "output-denied", "r0:q1") == tuple(
        by_id["r0:q1"][each] for each in ("type", "state", "approvalId")
    )
    assert ("input-available", None) == (by_id["c3"]["state"], by_id["c3"]["input"])
    assert ("output-available", 2) == (by_id["c4"]["state"], by_id["c4"]["output"])
    assert [STEP, {"type": "reasoning", "text": "Hm."}, spoken("I look.")] == reader.parts[:3]
    assert HELD["parts"][7] in reader.parts
    assert [STEP, by_id["c4"], STEP, spoken("Two.")] == reader.parts[-4:]


@pytest.mark.parametrize(
    "value",
    [b"[1]", b'{"id":"m","role":"user","parts":[]}', b'{"id":"","role":"assistant","parts":[]}',
     b'{"id":"m","role":"assistant","parts":[3]}', b"[" * 5000 + b"]" * 5000],
)  # fmt: skip
def test_an_input_that_is_no_such_message_is_just_an_input(value):
    """An agent may be given anything."""
    assert b'"messageId":"r1"' in frames(value=value)[0]


# Questions


def test_a_question_of_yes_or_no_is_a_call_that_wants_approval():
    """In a step of its own, which ends the response; the run's id makes its own unique."""
    told = chunks(*text("Hm."), asked(CONFIRMATION))
    assert [
        {"type": "finish-step"},
        {"type": "start-step"},
        {"type": "tool-input-available", "toolCallId": "r1:q1", "toolName": "confirm",
         "input": {"prompt": "Go on?"}, "dynamic": True},
        {"type": "tool-approval-request", "approvalId": "r1:q1", "toolCallId": "r1:q1"},
        {"type": "finish-step"},
        {"type": "finish", "finishReason": "tool-calls"},
        "[DONE]",
    ] == told[4:]  # fmt: skip


@pytest.mark.parametrize(
    ("questions", "listed"),
    [
        ((COLOR,), [{"id": "color", "kind": "choice", "prompt": "Which?",
                     "options": [{"id": "red"}]}]),
        ((CONFIRMATION, CONFIRMATION), [{"id": "go", "kind": "confirm", "prompt": "Go on?"}] * 2),
    ],
)  # fmt: skip
def test_any_other_question_is_a_call_to_be_answered(questions, listed):
    """With all that is asked as its input."""
    reader = read(asked(*questions))
    call = {"type": "dynamic-tool", "name": "ask_user", "toolCallId": "r1:q1",
            "state": "input-available", "input": {"questions": listed}}  # fmt: skip
    assert ([STEP, call], False) == (reader.parts, reader.would_send_again)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (CONFIRMATION, {"go": True}, {"state": "output-available", "output": True}),
        (CONFIRMATION, {"go": False}, {"state": "output-denied"}),
        (COLOR, {"color": "red"}, {"state": "output-available", "output": "red"}),
    ],
)
def test_an_answer_is_what_the_call_gave(question, answer, expected):
    """The response that goes on begins with it; what follows is in a step of its own."""
    events = [asked(question), received(answer), *text("So."), finished()]
    reader = read(*events)
    _, part, *rest = reader.parts
    assert expected.items() <= part.items()
    assert [STEP, spoken("So.")] == rest
    all_of_them = chunks(*events)
    begin = all_of_them.index("[DONE]") + 1
    assert {"type": "start", "messageId": "r1"} == all_of_them[begin]


def test_answers_to_several_questions_are_told_by_their_ids():
    """As the agent gets them."""
    answers = {"go": True, "color": "red"}
    _, part, *_ = parts(asked(CONFIRMATION, COLOR), received(answers), finished())
    assert answers == part["output"]


def test_a_question_that_is_withdrawn_is_answered_no_more():
    """And so is one whose run is over."""
    _, part, *_ = parts(asked(COLOR), InputWithdrawn(request_id="q1"), finished())
    assert ("output-error", "The question was withdrawn.") == (part["state"], part["errorText"])
    end = finished(None, outcome="cancelled", cause="client_cancel")
    reader = read(asked(CONFIRMATION), end)
    assert ("output-error", False) == (reader.parts[1]["state"], reader.would_send_again)


def test_who_only_answers_has_its_result_as_the_text():
    """What it said before the question is no answer to it."""
    events = [*text("Hm."), asked(CONFIRMATION), received({"go": True}), finished(b'"Done."')]
    assert [STEP, spoken("Done.")] == parts(*events)[-2:]


def test_questions_that_are_asked_side_by_side_come_one_by_one():
    """Each response holds one, in the last step of the message."""
    events = [asked(COLOR), asked(CONFIRMATION, request_id="q2"), received({"color": "red"}),
              received({"go": True}, "q2"), finished()]  # fmt: skip
    all_of_them = chunks(*events)
    assert 3 == all_of_them.count("[DONE]")
    states = [part["state"] for part in parts(*events) if "toolCallId" in part]
    assert ["output-available"] * 2 == states


def test_what_is_half_said_when_a_question_comes_goes_on_behind_it():
    """Others may speak while one asks; a client remembers nothing open from the response before."""
    begun, delta, *_ = text("a", "b")
    start, piece, end = call("look", "{}")
    events = [begun, delta, start, asked(COLOR), piece, end, delta, received({"color": "red"}),
              *run_tool(), finished()]  # fmt: skip
    said = [part["text"] for part in parts(*events) if part["type"] == "text"]
    assert ["a", "a"] == said


EVENTS = st.sampled_from(
    [
        *model(), *model(step_id="s2"), *text("a"), *text("b", kind="reasoning", part_id="p2"),
        Custom(name="x", value=Raw(b"1")), Moderation(violation=True),
    ]
)  # fmt: skip
GROUPS = st.one_of(
    EVENTS.map(lambda event: [event]),
    st.integers(3, 99).map(lambda n: [*run_tool(call_id=f"c{n}")]),
    st.integers(3, 99).map(lambda n: [*call("look", "{}", call_id=f"c{n}")]),
    st.integers(3, 99).map(
        lambda n: [asked(CONFIRMATION, request_id=f"q{n}"), received({"go": True}, f"q{n}")]
    ),
)


@given(
    groups=st.lists(GROUPS, max_size=12),
    outcome=st.sampled_from(["success", "error", "cancelled"]),
)
def test_nothing_that_may_happen_is_fatal_to_a_client(groups, outcome):
    """In whatever order: no piece without its beginning, nothing open at an end, one last chunk."""
    events = [event for group in groups for event in group]
    reader = read(*events, finished(None, outcome=outcome, cause="client_cancel"))
    assert {"success": "finish", "error": "error", "cancelled": "abort"}[outcome] == reader.last[
        "type"
    ]
    assert not reader.would_send_again
    assert DONE == frames(*events, finished())[-1]


# Requests


def posted(*messages, **body):
    """A request to answer in a chat."""
    body = {"id": "chat1", "trigger": "submit-message", "messages": messages, **body}
    return Request("POST", {}, {}, {}, msgspec.json.encode(body))


def user(*words):
    return {"id": "u", "role": "user", "parts": [{"type": "text", "text": each} for each in words]}


def assistant(*held):
    return {"id": "a", "role": "assistant", "parts": [*held]}


def used(name, output=None, *, call_id="c1", state="output-available", **more):
    part = {"type": f"tool-{name}", "toolCallId": call_id, "state": state, **more}
    return part if output is None else {**part, "output": output}


def question(name="confirm", *, request_id="q1", **more):
    return {"type": "dynamic-tool", "toolName": name, "toolCallId": f"r1:{request_id}", **more}


def approved(is_so, **more):
    return question(state="approval-responded", approval={"id": "r1:q1", "approved": is_so}, **more)


def test_a_message_of_the_user_asks_for_a_run():
    """In the thread of the chat; what nobody watches any more makes room for it."""
    expected = Start(
        agent=None, input="Hello\nyou", delivery="stream", thread_id="chat1", history=(),
        if_busy="supersede",
    )  # fmt: skip
    assert expected == decode_chat(posted(user("Hello", "", "you"), unknown=1, messageId=None))


@pytest.mark.parametrize(
    ("body", "agent"), [({"agent": "a", "model": "m"}, "a"), ({"model": "p:m"}, "p:m"), ({}, None)]
)
def test_the_agent_is_one_of_the_fields_beside_the_messages(body, agent):
    """By its name, or by the model that it runs on."""
    assert agent == decode_chat(posted(user("Hello"), **body)).agent


def test_what_was_said_before_is_the_history():
    """Step by step: text, calls and what they gave; no thoughts, nor what is not the agent's."""
    answer = assistant(
        {"type": "step-start"},
        {"type": "reasoning", "text": "Hm."},
        {"type": "text", "text": "I look."},
        used("look", "sunny", input={"at": 1}),
        used("dig", state="output-error", call_id="c2", input="{not JSON", errorText="no spade"),
        used("ask", state="output-denied", call_id="c3"),
        used("wait", state="input-available", call_id="c4"),
        used("write", state="input-streaming", call_id="c5"),
        used("search", [], call_id="c6", providerExecuted=True),
        used("fail", state="output-error", call_id="c7"),
        question(state="output-denied"),
        {"type": "dynamic-tool", "toolName": "mcp", "toolCallId": "c8", "output": None,
         "state": "output-available"},
        {"type": "step-start"},
        {"type": "step-start"},
        {"type": "text", "text": "Sunny."},
    )  # fmt: skip
    system = {"role": "system", "parts": [{"type": "text", "text": "Be brief."}]}
    empty = [{"role": role, "parts": []} for role in ("system", "user", "assistant")]
    start = decode_chat(posted(system, user("Where?"), answer, *empty, user("And now?")))
    calls = [("c1", "look", '{"at":1}'), ("c2", "dig", "{not JSON"), ("c3", "ask", "{}"),
             ("c4", "wait", "{}"), ("c7", "fail", "{}"), ("c8", "mcp", "{}")]  # fmt: skip
    denied = '{"error":"the user does not want this call"}'
    assert start.history == (
        SystemMessage("Be brief."),
        UserMessage("Where?"),
        AssistantMessage("I look.", tuple(ToolCall(*each) for each in calls)),
        ToolMessage("c1", "look", '"sunny"'),
        ToolMessage("c2", "dig", '{"error":"no spade"}', is_error=True),
        ToolMessage("c3", "ask", denied, is_error=True),
        ToolMessage("c7", "fail", '{"error":"the tool has failed"}', is_error=True),
        ToolMessage("c8", "mcp", "null"),
        AssistantMessage("Sunny."),
    )
    assert ("And now?", None) == (start.input, start.said)


def test_tools_of_the_client_stand_beside_the_messages():
    """Under either name for their schema, or without one."""
    schema = {"type": "object", "properties": {"a": {}}}
    tools = {
        "x": {"description": "X.", "inputSchema": schema},
        "y": {"parameters": schema},
        "z": {},
    }
    empty = {"type": "object", "properties": {}}
    specs = (ToolSpec("x", "X.", schema), ToolSpec("y", "", schema), ToolSpec("z", "", empty))
    assert specs == decode_chat(posted(user("Hello"), tools=tools)).tools


def test_what_the_clients_tools_have_given_goes_on_with_the_message():
    """The message as it came is the input; what came before its last answers is the history."""
    message = assistant(
        {"type": "step-start"}, used("look", 1), {"type": "step-start"},
        {"type": "text", "text": "Pick."}, used("look", 2, call_id="c2"),
        used("pick", {"n": 3}, call_id="c3"),
    )  # fmt: skip
    start = decode_chat(posted(user("Hello"), message, tools={"pick": {}}))
    last = (ToolMessage("c2", "look", "2"), ToolMessage("c3", "pick", '{"n":3}'))
    assert last == start.said
    assert start.history == (
        UserMessage("Hello"),
        AssistantMessage("", (ToolCall("c1", "look", "{}"),)),
        ToolMessage("c1", "look", "1"),
        AssistantMessage("Pick.", tuple(ToolCall(m.call_id, m.name, "{}") for m in last)),
    )
    assert (message, CONTINUED) == (start.input, start.options)


@pytest.mark.parametrize(
    ("part", "answers"),
    [
        (approved(is_so=True), {"q1": True}),
        (approved(is_so=False), {"q1": False}),
        (question(state="approval-responded"), {"q1": False}),
        (question("ask_user", state="output-available", output={"a": [1]}), {"q1": {"a": [1]}}),
        (question("ask_user", state="output-available", output=None), {"q1": None}),
        (question("ask_user", state="output-error", errorText="no"), {"q1": None}),
    ],
)
def test_an_answer_goes_on_with_the_run_that_has_asked(part, answers):
    """Which is in the call's id; answers of earlier steps have been given."""
    before = question(state="approval-responded", request_id="q0")
    start = decode_chat(posted(user("Hi"), assistant(STEP, before, STEP, part), agent="a"))
    expected = Start(agent=None, input=None, delivery="stream", thread_id="chat1", continues="r1",
                     answers=answers)  # fmt: skip
    assert expected == start


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "expected a JSON object to answer in a chat"),
        ([user()], r"expected text in the last one.* got parts of the types \(none\)"),
        ([{"role": "user", "parts": [{"type": "file"}]}], "of the types file"),
        ([user("Hi"), assistant({"type": "text", "text": "Ho"})], "what the tools of the client"),
        ([user("Hi"), assistant(used("look", state="input-available"))], "asks for nothing"),
        ([{"role": "system", "parts": []}], "expected the last one to be the user's"),
        ([assistant(question(state="approval-requested"))], "expected an answer to what the last"),
        ([assistant(question("ask_user", state="output-available"))], "add the output of that"),
        ([user("Hi"), {"role": "tool", "parts": []}], "Invalid enum value 'tool'"),
    ],
)
def test_what_asks_for_nothing_is_refused_in_clear_words(messages, said):
    """Before anything has begun."""
    with pytest.raises(BadRequest, match=said):
        decode_chat(posted(*messages))


def test_a_chat_has_an_end():
    """Neither more messages nor more parts of one are read than do no harm to other requests."""
    said = MAX_MESSAGES * [user("Hi")]
    assert MAX_MESSAGES - 1 == len(decode_chat(posted(*said)).history)
    for too_many in ([*said, user("Hi")], [user(*(MAX_MESSAGES + 1) * ["a"])]):
        with pytest.raises(BadRequest, match=f"to answer in a chat .* length <= {MAX_MESSAGES}"):
            decode_chat(posted(*too_many))


@pytest.mark.parametrize("chat", ["", "a/b", "x" * 201])
def test_a_chat_that_no_path_could_name_is_refused(chat):
    """For whoever comes back to it asks for a path with its id."""
    with pytest.raises(BadRequest, match="id: expected 1 to 200 printable"):
        decode_chat(posted(user("Hi"), id=chat))


def test_who_comes_back_or_stops_asks_for_what_goes_on_in_the_chat():
    """All of it again, past what was answered; to stop what has stopped is no error."""
    _, resume, stop = VERCEL.routes
    paths = [
        ("POST", "/chat"),
        ("GET", "/chat/<thread_id>/stream"),
        ("POST", "/chat/<thread_id>/stop"),
    ]
    assert paths == [(route.method, route.path) for route in VERCEL.routes]
    asked_for = Request("GET", {"thread_id": "c"}, {}, {})
    assert Watch(run_id=None, thread_id="c", goes_on=True) == resume.decode(asked_for)
    order = stop.decode(asked_for)
    assert ("c", 204, b"") == (
        order.thread_id,
        order.reply_if_idle.status,
        order.reply_if_idle.body,
    )
    assert isinstance(order, Cancel)


@pytest.mark.parametrize(("status", "answered_with"), [(404, 404), (0, 500)])
def test_an_error_is_plain_words(status, answered_with):
    """The client takes the body of a response for the message of its error."""
    reply = refuse(Problem(code="x", message="expected ä, got b", status=status))
    assert (answered_with, "expected ä, got b") == (reply.status, reply.body.decode())


# Over real sockets


class Site:
    """A server that speaks it, and requests."""

    def __init__(self, server):
        self.server = server

    @property
    def runs(self):
        """All that were started, the oldest first."""
        return [*reversed([*self.server.runs])]

    async def ask(self, method, path, body=b""):
        """The response to a request, and its body."""
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(request(method, f"/api/chat{path}", body))
            return raw, (await raw.finish()).decode()

    async def say(self, *messages, chat="chat1", **body):
        """The response to a message."""
        return await self.ask("POST", "", posted(*messages, id=chat, **body).body)

    @asynccontextmanager
    async def reading(self, method="POST", path="", body=None):
        """A response that goes on."""
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(
                request(method, f"/api/chat{path}", body or posted(user("Hi")).body)
                if method == "POST"
                else request(method, f"/api/chat{path}")
            )
            while not raw.frames:
                assert await raw.receive()
            yield raw


@asynccontextmanager
async def site(*agents, **settings):
    """Serve agents, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with open_server(*agents, dialects=(NATIVE, VERCEL), **settings) as server:
            yield Site(server)


class Sleeper:
    """An agent that says something and waits for a word to end."""

    def __init__(self):
        self.begun, self.go = trio.Event(), trio.Event()

    async def __call__(self, run, _input):
        """Sleep."""
        run.text("half")
        self.begun.set()
        await self.go.wait()
        run.text(" done")


async def greeter(run, input):
    """Greet."""
    await trio.lowlevel.checkpoint()
    run.text(f"Hello, {input}")


async def asker(run, input):
    """Ask twice."""
    if await run.ask(CONFIRMATION):
        return f"painted {await run.ask(COLOR)}"
    return "left as it is"


async def test_a_response_is_a_stream_of_its_kind():
    """With the header that names the protocol and its version, and `[DONE]` at its end."""
    async with site(Agent("main", greeter)) as one:
        raw, body = await one.say(user("Köln 😀"))
    assert (200, "v1") == (raw.status, raw.header("x-vercel-ai-ui-message-stream"))
    assert "text/event-stream; charset=utf-8" == raw.header("content-type")
    assert (True, "grace") == (body.endswith("data: [DONE]\n\n"), one.runs[0].policy.kind)
    assert '"delta":"Hello, Köln 😀"' in body


async def test_an_error_before_the_stream_is_its_status_in_plain_words():
    """As the client wants to show it."""
    async with site(Agent("main", greeter)) as one:
        raw, body = await one.say(user("Hi"), agent="nobody")
        bad, said = await one.say(assistant())
    assert (404, "text/plain; charset=utf-8") == (raw.status, raw.header("content-type"))
    assert body.startswith("expected one of the agents main, got 'nobody'")
    assert (400, True) == (bad.status, said.startswith("messages: expected the last one"))


async def test_a_model_agent_is_told_the_chat():
    """What the client posts is the history, also where the server knows another one."""
    provider = ScriptedProvider([say("One."), say("Two.")])
    agent = Agent.of_model("main", "scripted:m", provider=provider)
    async with site(agent) as one:
        await one.say(user("First."))
        await one.say(user("Edited."), assistant({"type": "text", "text": "Ho."}), user("Again?"))
    expected = (UserMessage("Edited."), AssistantMessage("Ho."), UserMessage("Again?"))
    assert expected == provider.prompts[1].messages


async def test_a_tool_of_the_client_is_called_and_heard():
    """The run ends with the call; the next one goes on with the same message."""
    provider = ScriptedProvider([ask_for(("pick", '{"of":2}')), say("The second.")])
    agent = Agent.of_model("main", "scripted:m", provider=provider)
    tools = {"pick": {"description": "Pick.", "inputSchema": {"type": "object"}}}
    async with site(agent) as one:
        _, body = await one.say(user("Which?"), tools=tools)
        assert '"finishReason":"tool-calls"' in body
        held = assistant(STEP, used("pick", 2, call_id="call1", input={"of": 2}))
        _, body = await one.say(user("Which?"), held, tools=tools)
    assert '"type":"start","messageId":"a"' in body
    assert ('"delta":"The second."' in body, '"tool-input-available"' in body) == (True, False)
    assert ToolMessage("call1", "pick", "2") == provider.prompts[1].messages[-1]


async def test_nothing_goes_on_where_nobody_has_said_anything():
    """204 is the protocol's word for it."""
    async with site(Agent("main", greeter)) as one:
        assert (204, "") == await status_of(one.ask("GET", "/chat1/stream"))
        await one.say(user("Hi"))
        assert (204, "") == await status_of(one.ask("GET", "/chat1/stream"))


async def status_of(asking):
    raw, body = await asking
    return raw.status, body


async def test_who_comes_back_gets_the_whole_message():
    """From its beginning, and then what comes; the same bytes as whoever has stayed."""
    async with site(Agent("main", sleeper := Sleeper())) as one, one.reading() as raw:
        await sleeper.begun.wait()
        async with one.reading("GET", "/chat1/stream") as again:
            assert "v1" == again.header("x-vercel-ai-ui-message-stream")
            sleeper.go.set()
            assert await raw.finish() == await again.finish()


async def test_stop_ends_it_at_once_and_does_no_harm_later():
    """Those who read it see the end that was wanted."""
    async with site(Agent("main", sleeper := Sleeper())) as one, one.reading() as raw:
        await sleeper.begun.wait()
        stopped, body = await one.ask("POST", "/chat1/stop")
        assert (200, "cancelled") == (stopped.status, json.loads(body)["outcome"])
        assert b'data: {"type":"abort","reason":"client_cancel"}\n\n' in await raw.finish()
        assert (204, "") == await status_of(one.ask("POST", "/chat1/stop"))


async def test_who_leaves_may_come_back_within_the_grace():
    """A connection that is closed is no stop."""
    async with site(Agent("main", sleeper := Sleeper())) as one:
        async with one.reading() as raw:
            await sleeper.begun.wait()
            await raw.leave_by_fin()
        (run,) = one.runs
        await wait_until(lambda: not run.is_held)
        async with one.reading("GET", "/chat1/stream") as again:
            sleeper.go.set()
            assert b'"delta":" done"' in await again.finish()


async def test_the_next_message_takes_the_place_of_what_nobody_watches():
    """The client's stop closes the connection, and its user says something else."""
    async with site(Agent("main", Sleeper()), Agent("greeter", greeter)) as one:
        async with one.reading():
            raw, body = await one.say(user("Hi"), agent="greeter")
            assert (409, True) == (raw.status, "busy" in body)
        first = one.runs[0]
        await wait_until(lambda: not first.is_held)
        _, body = await one.say(user("you"), agent="greeter")
    assert '"delta":"Hello, you"' in body
    assert ("cancelled", "client_cancel") == (first.end.outcome, first.end.receipt.cause)


async def test_answers_go_on_with_the_run():
    """Each response ends with the next question; a replay shows what came of those before."""
    async with site(Agent("main", asker)) as one:
        _, body = await one.say(user("Hi"))
        (run,) = one.runs
        call_id = f"{run.id}:{next(iter(run.context.asked))}"
        assert f'"approvalId":"{call_id}"' in body
        yes = {**approved(is_so=True), "toolCallId": call_id}
        _, body = await one.say(user("Hi"), assistant(STEP, yes))
        assert body.startswith(f'data: {{"type":"start","messageId":"{run.id}"}}\n\n')
        assert (1, 1) == (body.count('"tool-output-available"'), body.count("[DONE]"))
        _, replay = await one.ask("GET", "/chat1/stream")
        assert (True, 2) == (replay.endswith(body), replay.count("[DONE]"))
        asked_id = f"{run.id}:{next(iter(run.context.asked))}"
        red = question("ask_user", state="output-available", output="red", toolCallId=asked_id)
        raw, body = await one.say(
            user("Hi"), assistant(STEP, yes, STEP, {**red, "toolCallId": asked_id})
        )
        assert (200, True) == (raw.status, '"delta":"painted red"' in body)
        raw, body = await one.say(user("Hi"), assistant(STEP, yes))
        assert (409, True) == (raw.status, "nothing is asked (any more)" in body)


async def test_a_message_that_answers_nothing_takes_the_place_of_a_run_that_asks():
    """The protocol says so of approvals that nobody has given."""
    async with site(Agent("main", asker), Agent("greeter", greeter)) as one:
        await one.say(user("Hi"))
        _, body = await one.say(user("Hi"), assistant(), user("you"), agent="greeter")
        assert '"delta":"Hello, you"' in body
        assert ("cancelled", "finished") == (one.runs[0].end.outcome, one.runs[1].state)


async def test_a_long_chat_comes_whole():
    """More than a request may bring elsewhere: what tools gave comes back with each message."""
    provider = ScriptedProvider([say("Done.")])
    agent = Agent.of_model("main", "scripted:m", provider=provider)
    large = "ä" * 1024 * 1024
    held = assistant(STEP, used("look", large, input={}), STEP, {"type": "text", "text": "Seen."})
    async with site(agent) as one:
        _, body = await one.say(user("Look."), held, user("And?"))
    assert '"delta":"Done."' in body
    told = provider.prompts[0].messages[2]
    assert ("c1", "look") == (told.call_id, told.name)
    is_whole = f'"{large}"' == told.content  # which is too long to be shown
    assert is_whole


async def test_an_error_in_the_middle_is_the_last_of_a_stream():
    """In the agent's own words."""

    async def failing(run, _input):
        run.text("half")
        await trio.lowlevel.checkpoint()
        raise AgentError("no luck")

    async with site(Agent("main", failing)) as one:
        _, body = await one.say(user("Hi"))
    assert body.endswith('data: {"type":"error","errorText":"no luck"}\n\ndata: [DONE]\n\n')


async def test_a_server_that_stops_is_no_good_end():
    """A client that reads has an error, for nobody wanted this."""
    async with site(Agent("main", sleeper := Sleeper())) as one, one.reading() as raw:
        await sleeper.begun.wait()
        await one.server.drain(0)
        body = await raw.finish()
    assert b'"errorText":"the run was cancelled (shutdown)"' in body


async def test_a_stop_shows_the_run():
    """As it stands; so does whoever looks at it in this protocol."""
    async with site(Agent("main", Sleeper())) as one, one.reading():
        _, body = await one.ask("POST", "/chat1/stop")
        snapshot = msgspec.json.decode(body, type=RunSnapshot)
        assert (one.runs[0].id, NULL) == (snapshot.id, snapshot.result)
