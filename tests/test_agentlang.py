"""agentlang's protocol: its events byte for byte, its requests, and a client that reads it.

The encoder is fed events by hand and by real runs; over sockets there is a real server, and a
client that reads a response as a page does that has nothing but `fetch`.
"""

import json
from contextlib import asynccontextmanager
from functools import partial

import attrs
import httpx2
import msgspec
import pytest
import trio
from msgspec import Raw
from raw import connect, request, wait_until
from test_agents import begin, opened

from agentsse.agents import Agent, agent
from agentsse.context import current_run, emit
from agentsse.dialects import Dialect, Reply, Request
from agentsse.dialects.agentlang import AGENTLANG, VOCABULARY, AgentlangEncoder
from agentsse.dialects.native import NATIVE
from agentsse.errors import AgentError, BadRequest, ProviderError
from agentsse.events import (
    EVENT_TYPES,
    NULL,
    AgentFinished,
    AgentStarted,
    Custom,
    InputRequested,
    Liveness,
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
    Usage,
    decode_event,
)
from agentsse.flows import FlowStep, flow
from agentsse.log import START
from agentsse.providers import Finish
from agentsse.testing import ScriptedProvider, ask_for, open_server, say
from agentsse.tools import tool

SECONDS = 30  # for a whole test; what it waits for takes milliseconds
STREAM = {"Accept": "text/event-stream"}
USAGE = Usage(input_tokens=812, output_tokens=4)


# What tests are made of


@attrs.define
class FetchReader:
    """What a page writes around `fetch`: it cuts at blank lines, and takes `event` and `data`."""

    rest: str = ""
    comments: list = attrs.field(factory=list)
    events: list = attrs.field(factory=list)

    def feed(self, text):
        """Take more of the response."""
        *blocks, self.rest = (self.rest + text).split("\n\n")
        for block in blocks:
            if block.startswith(":"):
                self.comments.append(block)
                continue
            name, data = block.split("\n")
            assert name.startswith("event: ")
            assert data.startswith("data: ")
            self.events.append((name.removeprefix("event: "), data.removeprefix("data: ")))

    @property
    def plain(self):
        """The events with their data as plain values."""
        return [(name, json.loads(data)) for name, data in self.events]

    @property
    def names(self):
        """Their names alone."""
        return [name for name, _ in self.events]


def read(frames):
    """The events of whole bytes."""
    reader = FetchReader()
    reader.feed(frames.decode())
    assert "" == reader.rest
    return reader


def encoded(*events):
    """What the encoder makes of events, as bytes."""
    encoder = AgentlangEncoder()
    return b"".join(frame for event in events for frame in encoder.feed(event))


def plain(*events):
    """The same as names and values."""
    return read(encoded(*events)).plain


def started(agent="triager"):
    return RunStarted(agent=agent, input=NULL, on_disconnect="continue")


def finished(result=b"null", outcome="success", error=None, cause=None):
    return RunFinished(
        outcome=outcome,
        usage=Usage(),
        receipt=Receipt(cause=cause),
        result=Raw(result) if outcome == "success" else msgspec.UNSET,
        error=error,
    )


def part(text, part_id="p1", kind="text"):
    return (
        PartStarted(part_id=part_id, kind=kind),
        PartDelta(part_id=part_id, kind=kind, delta=text),
        PartFinished(part_id=part_id, kind=kind, text=text),
    )


def step(step_id, kind, name, *within, **end):
    """A step and what is within it."""
    of = {"step_id": step_id, "kind": kind, "name": name}
    return (StepStarted(**of), *within, StepFinished(**of, **end))


def within(name, *events, error=None, child_run_id=None):
    """An agent and what is within it."""
    of = {"agent": name, "child_run_id": child_run_id}
    return (AgentStarted(**of), *events, AgentFinished(**of, error=error))


def problem(code="agent_error", message="no luck", status=500):
    return Problem(code=code, message=message, status=status)


def said(text, usage=USAGE):
    """The lines of a model that says a text, and counts."""
    return [*say(text)[:-1], Finish("stop", usage)]


def model(name, *script, **settings):
    provider = ScriptedProvider(script, name=name)
    return Agent.of_model(name, f"{name}:m", provider=provider, **settings)


# The encoder


def test_a_custom_event_is_one_frame_with_its_name_and_its_value():
    """Exactly these bytes, without an id."""
    event = Custom(name="my_event", value=Raw(b'{"foo":"bar"}'))
    assert b'event: my_event\ndata: {"foo":"bar"}\n\n' == encoded(event)


def test_custom_events_of_any_name_are_sent_in_order():
    """The vocabulary is open."""
    names = ["custom_progress_update", "another-type", "agentsse.error", "größer", "message"]
    assert [(name, n) for n, name in enumerate(names)] == plain(
        *(Custom(name=name, value=Raw(b"%d" % n)) for n, name in enumerate(names))
    )


@pytest.mark.parametrize("name", [*sorted(VOCABULARY), " result", "error ", "a\nb", "a\rb", " "])
def test_a_custom_event_cannot_pass_for_one_of_ours(name):
    """A false end must not be possible, nor a name that would break the frame."""
    event = Custom(name=name, value=Raw(b'{"statusCode":500}'))
    assert [("custom", {"name": name, "value": {"statusCode": 500}})] == plain(event)


def test_a_plain_agent_tells_its_start_what_it_said_its_end_and_the_result():
    """The order and the bytes of the original."""
    assert (
        b'event: agent_start\ndata: {"agent":"triager"}\n\n'
        b'event: llm_response\ndata: {"agent":"triager","content":"DONE",'
        b'"tokens":{"input":812,"output":4,"total":816}}\n\n'
        b'event: agent_complete\ndata: {"agent":"triager"}\n\n'
        b'event: result\ndata: "DONE"\n\n'
    ) == encoded(
        started(), *step("s1", "model", "m:x", *part("DONE"), usage=USAGE), finished(b'"DONE"')
    )


def test_a_flow_tells_its_steps_around_their_agents():
    """A step's start when an agent begins it; its end with the result as a string."""
    assert [
        ("agent_start", {"agent": "net"}),
        ("flow_step_start", {"step": "classify", "agent": "classifier"}),
        ("agent_start", {"agent": "classifier"}),
        ("llm_response", {"agent": "classifier", "content": "DNS"}),
        ("agent_complete", {"agent": "classifier"}),
        ("flow_step_complete", {"step": "classify", "result": "DNS"}),
        ("flow_step_complete", {"step": "note", "result": '{"id":7}'}),
        ("agent_complete", {"agent": "net"}),
        ("result", {"id": 7}),
    ] == plain(
        started("net"),
        *step(
            "s1",
            "flow",
            "classify",
            *within("classifier", *step("s2", "model", "m:x", *part("DNS"))),
            result=Raw(b'"DNS"'),
        ),
        *step("s3", "flow", "note", result=Raw(b'{"id":7}')),
        finished(b'{"id":7}'),
    )


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (Raw(b'"a \\"b\\"\\n"'), 'a "b"\n'),
        (Raw(b' "a" '), "a"),
        (Raw(b"[1,2]"), "[1,2]"),
        (Raw(b"[1,\n2]"), "[1, 2]"),
        (Raw(b"null"), "null"),
        (msgspec.UNSET, "null"),
    ],
)
def test_the_result_of_a_step_is_a_string(result, shown):
    """A string stays as it is, all else is its JSON."""
    expected = ("flow_step_complete", {"step": "s", "result": shown})
    assert [expected] == plain(*step("s1", "flow", "s", result=result))


def test_a_step_that_is_tried_again_starts_once():
    """Its agent starts anew each time; the retry itself has no word here."""
    failed = within("a", error=problem())
    assert [
        ("flow_step_start", {"step": "s", "agent": "a"}),
        ("agent_start", {"agent": "a"}),
        ("agent_start", {"agent": "a"}),
        ("agent_complete", {"agent": "a"}),
        ("flow_step_complete", {"step": "s", "result": "null"}),
    ] == plain(*step("s1", "flow", "s", *failed, *within("a")))


def test_a_flow_in_a_flow_tells_both():
    """The outer step is done by the inner flow, whose steps have agents of their own."""
    inner = step("s2", "flow", "deep", *within("worker"))
    assert [
        ("agent_start", "main"),
        ("flow_step_start", "outer"),
        ("agent_start", "inner"),
        ("flow_step_start", "deep"),
        ("agent_start", "worker"),
        ("agent_complete", "worker"),
        ("flow_step_complete", "deep"),
        ("agent_complete", "inner"),
        ("flow_step_complete", "outer"),
        ("agent_complete", "main"),
        ("result", None),
    ] == [
        (name, data and (data.get("step") or data["agent"]))
        for name, data in plain(
            started("main"), *step("s1", "flow", "outer", *within("inner", *inner)), finished()
        )
    ]


def test_an_agent_outside_of_a_flow_has_no_step():
    """A node is none, and a step within one is that of the flow around it."""
    assert ["agent_start", "agent_complete"] == [
        name for name, _ in plain(*step("s1", "node", "n", *within("a")))
    ]
    around = step("s1", "flow", "f", *step("s2", "node", "n", *within("a")))
    assert ("flow_step_start", {"step": "f", "agent": "a"}) == plain(*around)[0]


def test_a_child_run_is_told_by_its_start_and_its_end():
    """What it says is in a log of its own; what is said here meanwhile is not its."""
    child = within("worker", *part("while it works"), child_run_id="c1")
    assert [
        ("agent_start", {"agent": "main"}),
        ("agent_start", {"agent": "worker"}),
        ("llm_response", {"agent": "main", "content": "while it works"}),
        ("agent_complete", {"agent": "worker"}),
    ] == plain(started("main"), *child)


def test_a_child_run_that_failed_is_an_error_and_not_complete():
    """Told once, also where the step that waited for it fails with it; the run may go on."""
    lost = problem(message="the child run c1 of 'worker': lost")
    expected = [
        ("agent_start", {"agent": "worker"}),
        ("error", {"agent": "worker", "error": lost.message, "terminal": False}),
    ]
    child = within("worker", error=lost, child_run_id="c1")
    assert expected == plain(*child)
    assert expected == plain(*step("s1", "flow", "f", *child, error=lost))


def test_the_innermost_agent_has_said_it():
    """Also when another of the same name is open, or one ends that never began."""
    events = [
        started("a"),
        AgentStarted(agent="b"),
        AgentStarted(agent="a"),
        *part("1"),
        AgentFinished(agent="b"),
        *part("2"),
        AgentFinished(agent="a"),
        *part("3"),
        AgentFinished(agent="never"),
        *part("4"),
    ]
    assert [("a", "1"), ("a", "2"), ("a", "3"), ("a", "4")] == [
        (data["agent"], data["content"]) for name, data in plain(*events) if name == "llm_response"
    ]


def test_an_answer_is_told_whole_with_all_its_parts():
    """Text and refusals, not reasoning and tool calls; without usage there are no tokens."""
    said = [*part("a", "1"), *part("hm", "2", "reasoning"), *part("b", "3", "refusal")]
    said += part("{}", "4", "tool_call")
    assert [("llm_response", {"agent": "x", "content": "ab"})] == plain(
        started("x"), *step("s1", "model", "m:x", *said, usage=Usage())
    )[1:]
    assert [("llm_response", {"agent": "x", "content": ""})] == plain(
        started("x"), *step("s1", "model", "m:x")
    )[1:]


def test_what_is_said_outside_of_a_model_call_is_an_answer_without_tokens():
    """Whoever was innermost when it began has said it, wherever it ends."""
    begun, *rest = part("late")
    assert [("llm_response", {"agent": "a", "content": "late"})] == [
        event
        for event in plain(started("a"), begun, AgentStarted(agent="b"), *rest)
        if event[0] == "llm_response"
    ]
    assert [("llm_response", {"agent": "", "content": "x"})] == plain(*part("x")[1:])
    around = plain(*step("s1", "flow", "f", *step("s2", "node", "n", *part("x"))))
    assert ["llm_response", "flow_step_complete"] == [name for name, _ in around]


def test_a_part_that_outlives_its_model_call_is_not_lost():
    """It is told for itself."""
    begun, *rest = part("late")
    assert [
        ("llm_response", {"agent": "", "content": ""}),
        ("llm_response", {"agent": "", "content": "late"}),
    ] == plain(*step("s1", "model", "m:x", begun), *rest)


def test_a_failed_model_call_is_an_error_of_its_agent_that_is_not_the_end():
    """Nothing of what it had said is told; the run may go on."""
    failed = step("s1", "model", "m:x", *part("hal"), error=problem("overloaded", "busy", 503))
    assert [
        ("error", {"agent": "triager", "error": "busy", "terminal": False}),
        ("llm_response", {"agent": "triager", "content": "DONE"}),
    ] == plain(started(), *failed, *step("s2", "model", "m:y", *part("DONE")))[1:]


@pytest.mark.parametrize("kind", ["flow", "node"])
def test_a_failed_step_is_an_error_of_the_step_that_is_not_the_end(kind):
    """It is not complete, then."""
    expected = {"step": "look", "error": "no luck", "terminal": False}
    assert [("error", expected)] == plain(*step("s1", kind, "look", error=problem()))


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (problem(), problem()),
        (
            problem("crashed", "the step 'in' raised KeyError; see the log"),
            problem("crashed", "the agent 'out' raised KeyError; see the log"),
        ),
        (problem("cancelled", "in was cancelled"), problem("cancelled", "out was cancelled")),
        (problem("system_exit", "in exits"), problem("system_exit", "out exits")),
    ],
)
def test_a_failure_is_told_where_it_happened_and_not_at_each_level(inner, outer):
    """The words of a level do not make it another failure."""
    events = step("s3", "model", "m:x", error=inner)
    events = step("s2", "node", "n", *events, error=outer)
    events = step("s1", "flow", "f", *within("a", *events, error=outer), error=outer)
    assert ["flow_step_start", "agent_start", "error"] == [name for name, _ in plain(*events)]


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (problem(), problem(message="no hope")),
        (problem(), problem(code="city")),
        (problem("crashed", "in raised KeyError"), problem("crashed", "out raised ValueError")),
    ],
)
def test_another_failure_is_told_too(inner, outer):
    """It is another one by its code, or its words."""
    events = step("s1", "flow", "f", *step("s2", "node", "n", error=inner), error=outer)
    assert [("n", inner.message), ("f", outer.message)] == [
        (data["step"], data["error"]) for _, data in plain(*events)
    ]


def test_the_same_failure_happens_again():
    """In a step that began after it was told, it is a new one."""
    once = step("s1", "node", "n", error=problem())
    assert 2 == len(plain(*once, *once))
    again = step("s2", "model", "m:x", error=problem())
    assert 2 == len(plain(*step("s1", "flow", "f", *again, *again, error=problem())))


def test_a_failed_round_of_tools_is_told_by_the_step_around_it():
    """There are no tools in this protocol."""
    tools = step("s2", "tool_round", "tools", error=problem())
    assert [] == plain(*tools)
    expected = {"step": "f", "error": "no luck", "terminal": False}
    assert [("error", expected)] == plain(*step("s1", "flow", "f", *tools, error=problem()))


def test_a_success_ends_with_the_bare_result():
    """Any JSON, without a wrapper; a run without a result has null."""
    assert (
        b'event: result\ndata: {"id":1,"name":"TestItem"}\n\n'
        == encoded(finished(b'{"id":1,"name":"TestItem"}')).partition(b"\n\n")[2]
    )
    no_result = msgspec.structs.replace(finished(), result=msgspec.UNSET)
    assert [("agent_complete", {"agent": ""}), ("result", None)] == plain(no_result)


def test_a_failure_ends_with_an_error_that_says_it_is_the_end():
    """With the status that the answer would have had, and no agent completes."""
    event = finished(outcome="error", error=problem(message="something broke"))
    assert (
        b'event: error\ndata: {"error":"something broke","statusCode":500,"terminal":true}\n\n'
    ) == encoded(event)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (finished(outcome="cancelled", cause="client_cancel"), "(client_cancel)"),
        (finished(outcome="interrupted", cause="input_timeout"), "(input_timeout)"),
        (
            finished(outcome="cancelled", cause="shutdown", error=problem()),
            "(shutdown); no luck",
        ),
    ],
)
def test_a_cancelled_run_ends_with_an_error_that_says_so(event, words):
    """Nothing looks like a result."""
    expected = {"error": f"the run was cancelled {words}", "statusCode": 500, "terminal": True}
    assert [("error", expected)] == plain(started(), event)[1:]


def test_a_question_is_a_result_with_the_suspension():
    """The response ends there; the run does not."""
    event = InputRequested(request_id="q1", questions=())
    assert b'event: result\ndata: {"suspension":"q1"}\n\n' == encoded(event)
    assert {InputRequested} == AGENTLANG.framing.ends_at


def test_json_that_somebody_has_formatted_is_one_line_here():
    """A reader that takes one line of data has it whole."""
    pretty = b'{\r\n  "a": [1,\n  2],\r "b": "c\\n"\n}'
    custom = Custom(name="x", value=Raw(pretty))
    wrapped = Custom(name="result", value=Raw(pretty))
    for event in (custom, wrapped, finished(pretty)):
        data = encoded(event).split(b"data: ")[-1]
        assert data.endswith(b"\n\n")
        assert b"\n" not in data[:-2]
        assert b"\r" not in data
    assert [("x", {"a": [1, 2], "b": "c\n"})] == plain(custom)


SILENT = {
    "part_delta": {"part_id": "p", "kind": "text", "delta": "x"},
    "tool_started": {"call_id": "c", "name": "n", "arguments": {}},
    "tool_output_delta": {"call_id": "c", "delta": "x"},
    "tool_finished": {
        "call_id": "c",
        "name": "n",
        "result": 1,
        "is_error": False,
        "source": "local",
    },
    "input_received": {"request_id": "q", "answers": {}},
    "input_withdrawn": {"request_id": "q"},
    "message_received": {"message_id": "m", "text": "x", "mode": "steer"},
    "paused": {},
    "resumed": {},
    "values_changed": {"values": {}},
    "retry": {
        "attempt": 1,
        "max": 2,
        "delay_s": 0,
        "error": {"code": "c", "message": "m", "status": 500},
    },
    "failover": {"from": "a", "to": "b", "reason": "c"},
    "liveness": {"elapsed_s": 1, "events": 1, "since_last_output_s": 1},
    "stalled": {"idle_s": 1, "limit_s": 1},
    "loop_detected": {"fingerprint": "f", "repeats": 3},
    "context_usage": {"ratio": 1, "tokens": 1, "limit": 1},
    "compacted": {"ratio_before": 1, "ratio_after": 1},
    "moderation": {"violation": False},
    "provider_event": {"provider": "p", "raw": {}},
    "trigger_changed": {
        "thread_id": "t",
        "trigger_id": "t",
        "change": "fired",
        "name": "n",
        "every_s": 1,
        "text": "x",
    },
    "gap": {"from": "1", "to": "2"},
}
SPOKEN = {
    *("run_started", "run_finished", "step_started", "step_finished"),
    *("part_started", "part_finished", "agent_started", "agent_finished"),
    *("input_requested", "custom"),
}


def test_all_events_are_told_or_have_no_word_here():
    """Every type that there is, is one or the other."""
    assert SPOKEN | SILENT.keys() == EVENT_TYPES.keys()
    assert not SPOKEN & SILENT.keys()


@pytest.mark.parametrize("kind", SILENT)
def test_what_has_no_word_is_not_told(kind):
    """Deltas, tools, retries and the like make no frame."""
    assert b"" == encoded(decode_event(json.dumps({"type": kind, **SILENT[kind]})))


def test_steps_and_parts_without_a_beginning_do_no_harm():
    """An end alone tells nothing of a step."""
    assert b"" == encoded(step("s1", "flow", "f")[-1], PartStarted(part_id="p", kind="reasoning"))


def test_what_came_before_costs_nothing():
    """After any number of events the encoder holds what is open, and no more."""
    encoder = AgentlangEncoder()
    for n in range(1_000):
        failed = problem(message=f"no {n}")
        turn = step(f"s{n}", "model", "m:x", *part("x", f"p{n}"), error=failed)
        for event in (*within("a", *turn), Liveness(elapsed_s=1, events=1, since_last_output_s=1)):
            encoder.feed(event)
    held = attrs.asdict(encoder, recurse=False)
    assert {"_agents": 0, "_steps": 0, "_parts": 0, "_failures": 1} == {
        name: len(value) for name, value in held.items() if name != "_count"
    }


# Requests


def decode(body, event="triage", module="Net", **headers):
    (route,) = AGENTLANG.routes
    assert ("POST", "/<module>/<event>") == (route.method, route.path)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return route.decode(Request("POST", {"module": module, "event": event}, {}, named, body))


def test_an_event_is_an_agent_of_its_module_or_of_that_name():
    """The name with the module counts first."""
    order = decode(b"{}")
    assert ("Net.triage", ("triage",)) == (order.agent, order.otherwise)


@pytest.mark.parametrize(
    ("body", "input", "chat_id", "mode"),
    [
        ({"message": "x"}, "x", None, None),
        ({"message": {"a": 1}, "chatId": "c"}, {"a": 1}, "c", None),
        ({"message": None, "chatId": "c", "mode": "chat"}, None, "c", "chat"),
        ({"message": "x", "mode": "planner"}, "x", None, "planner"),
        ({"message": "x", "chatId": None, "mode": None}, "x", None, None),
        ({"message": "x", "chatId": ""}, "x", None, None),
    ],
)
def test_an_agent_is_told_a_message_perhaps_in_a_chat(body, input, chat_id, mode):
    """The chat is a thread: who comes while it is busy waits, or answers what it asks."""
    order = decode(msgspec.json.encode(body))
    assert (input, chat_id) == (order.input, order.thread_id)
    assert ({"mode": mode} if mode else None) == order.metadata
    assert (True, "enqueue") == (order.resumes, order.if_busy)


@pytest.mark.parametrize(
    "body",
    [{}, {"id": 1, "name": "x"}, {"message": "x", "severity": 3}, {"chatId": "c"}, {"mode": 7}],
)
def test_any_other_object_is_the_input_as_a_whole(body):
    """An event has attributes of its own."""
    order = decode(msgspec.json.encode(body))
    assert (body, None, None) == (order.input, order.thread_id, order.metadata)


def test_an_empty_body_is_an_empty_object():
    """An event may have no attributes."""
    assert {} == decode(b"").input


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[1]", "expected a JSON object for the event 'triage', got b'\\[1\\]'"),
        (b'"x"', "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"message":"x","chatId":7}', r"{message, chatId\?, mode\?} .*chatId"),
        (b'{"message":"x","mode":"loud"}', r"{message, chatId\?, mode\?} .*mode"),
    ],
)
def test_a_body_that_makes_no_sense_is_refused(body, words):
    """In words that say what was expected."""
    with pytest.raises(BadRequest, match=words):
        decode(body)


@pytest.mark.parametrize("accept", ["text/event-stream", "Text/Event-Stream; q=0.5"])
def test_a_request_that_accepts_an_event_stream_is_streamed(accept):
    """Whatever its case."""
    assert "stream" == decode(b"{}", accept=accept).delivery


@pytest.mark.parametrize(
    "accept",
    [
        "text/event-stream, application/json",
        "application/json, text/event-stream",
        "application/json;q=0.8, text/event-stream",
    ],
)
def test_a_request_that_accepts_a_list_with_an_event_stream_is_streamed(accept):
    """On a tie the named event stream wins."""
    assert "stream" == decode(b"{}", accept=accept).delivery


def test_a_request_that_accepts_json_is_not_streamed():
    """It gets one answer."""
    assert "wait" == decode(b"{}", accept="application/json").delivery


def test_a_request_that_accepts_nothing_by_name_is_not_streamed():
    """A stream is for those who ask for it."""
    assert "wait" == decode(b"{}").delivery


@pytest.mark.parametrize(
    "accept",
    ["*/*", "text/event-stream;q=0", "text/html", "", "text/event-stream;q=0.2, application/json"],
)
def test_a_request_that_would_rather_have_something_else_is_not_streamed(accept):
    """Weights are heeded, and nobody is turned away."""
    assert "wait" == decode(b"{}", accept=accept).delivery


# Answers


def snapshot(**fields):
    plain = {
        "id": "r",
        "agent": "a",
        "on_disconnect": "continue",
        "created": "",
        "started": None,
        "finished": None,
        "thread_id": None,
        "parent_run_id": None,
        "outcome": None,
        "result": NULL,
        "error": None,
        "usage": Usage(),
        "receipt": None,
        "events": 1,
        "questions": (),
        "state": "finished",
    }
    return RunSnapshot(**plain | fields)


def answer(run, events=()):
    reply = decode(b"{}").reply(run, events)
    return reply.status, reply.media_type, reply.body


def test_an_answer_is_the_bytes_of_the_result():
    """Exactly as the run has them."""
    odd = b'{"b": 1.0, "a":1e2}'
    run = snapshot(outcome="success", result=Raw(odd))
    assert (200, "application/json", odd) == answer(run)
    assert odd == AGENTLANG.present(run)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (problem("auth", "no key", 502), 500),  # the key of this server, not of its client
        (problem("x", "who?", 401), 401),
        (problem("forbidden", "not you", 403), 401),
        (problem("bad_request", "what?", 400), 400),
        (problem("unprocessable", "what?", 422), 400),
        (problem("not_found", "where?", 404), 400),
        (problem("crashed", "it raised", 500), 500),
        (problem("overloaded", "busy", 503), 500),
        (problem("odd", "odd", 200), 500),
    ],
)
def test_an_error_is_plain_text_with_one_of_three_statuses(error, status):
    """The stream's end has the same words and the same number."""
    run = snapshot(outcome="error", error=error)
    text = "text/plain; charset=utf-8"
    assert (status, text, error.message.encode()) == answer(run)
    assert [("error", {"error": error.message, "statusCode": status, "terminal": True})] == plain(
        finished(outcome="error", error=error)
    )


def test_a_cancelled_run_is_a_500_that_says_so():
    """Nothing looks like a result."""
    run = snapshot(outcome="cancelled", receipt=Receipt(cause="client_cancel"))
    assert (500, b"the run was cancelled (client_cancel)") == answer(run)[::2]
    assert (500, b"the run was cancelled") == answer(snapshot(outcome="cancelled"))[::2]


def test_a_run_that_waits_for_a_person_is_a_suspension():
    """Of the oldest question; or of the last one, where somebody has answered it just now."""
    first, second = (InputRequested(request_id=each, questions=()) for each in ("q1", "q2"))
    assert b'{"suspension":"q1"}' == answer(snapshot(questions=(first, second)))[2]
    assert b'{"suspension":"q2"}' == answer(snapshot(), (started(), first, second))[2]
    assert (200, "application/json", b"null") == answer(snapshot())


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (problem("not_found", "no such event", 404), 404),
        (problem("bad_request", "no", 400), 400),
        (problem("too_large", "no", 413), 400),
        (problem("overloaded", "no", 503), 500),
    ],
)
def test_a_refusal_is_plain_text(refused, status):
    """An unknown event is not found."""
    expected = Reply(refused.message.encode(), status, "text/plain; charset=utf-8")
    assert expected == AGENTLANG.problem(refused)


# emit


def test_emit_is_a_no_op_where_nobody_streams():
    """Outside of a run there is nobody to tell."""
    emit("unheard", n=1)


async def frames_of(agent_or_function, input=None):
    """Run an agent without HTTP; its frames, and the run."""
    one = agent_or_function
    one = one if isinstance(one, Agent) else Agent("main", one)
    async with opened(one) as runs:
        run = begin(runs, one.name, input)
        await run.done.wait()
    return encoded(*run.log.events), run


async def test_emit_tells_those_who_stream(autojump_clock):
    """It comes out under its own name, from wherever it was called."""

    async def main(run, input):
        await deep()

    async def deep():
        emit("my_event", foo="bar")
        await trio.lowlevel.checkpoint()

    frames, _ = await frames_of(main)
    assert b'event: my_event\ndata: {"foo":"bar"}\n\n' in frames


async def test_emit_is_a_no_op_once_the_run_is_over(autojump_clock):
    """Whoever kept the run speaks to nobody, and the stream has one end."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()

    frames, run = await frames_of(main)
    run.context.emit("late")
    assert frames == encoded(*run.log.events)
    assert ["agent_start", "agent_complete", "result"] == read(frames).names


async def test_emit_is_inherited_by_child_tasks(autojump_clock):
    """And by theirs."""

    async def child(depth):
        emit("from", depth=depth)
        await trio.lowlevel.checkpoint()
        if depth < 3:
            current_run().nursery.start_soon(child, depth + 1)

    async def main(run, input):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child, 1)
            nursery.start_soon(trio.lowlevel.checkpoint)

    frames, _ = await frames_of(main)
    assert [("from", {"depth": n}) for n in (1, 2, 3)] == read(frames).plain[1:-2]


async def test_the_current_run_is_none_and_then_the_run(autojump_clock):
    """What `emit` finds can be looked at."""
    seen = []

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        seen.append(current_run() is run)

    assert None is current_run()
    await frames_of(main)
    assert [True] == seen
    assert None is current_run()


async def test_a_run_delivers_its_result_and_leaves_the_stream_to_http(autojump_clock):
    """The end is in the log; a reader is finished by it, and closed by whoever opened it."""

    async def create_item(run, input):
        with run.step("CreateItem"):
            await trio.lowlevel.checkpoint()
        return {"id": 1, **input}

    async with opened(Agent("main", create_item)) as runs:
        run = begin(runs, input={"name": "TestItem"})
        make = partial(AGENTLANG.encoder, None)
        reader = run.attach(("agentlang", None), make, START, ends_at=AGENTLANG.framing.ends_at)
        await run.done.wait()
        assert reader.closing is None
        assert ("result", {"id": 1, "name": "TestItem"}) == read(reader.take()).plain[-1]
        assert reader.is_finished
        run.detach(reader, "finished")


async def test_a_run_that_is_ended_twice_has_one_end(autojump_clock):
    """Exactly one terminal event, and it is the last."""
    async with opened(Agent("main", wait_for_ever)) as runs:
        run = begin(runs)
        await trio.sleep(1)
        for cause in ("client_cancel", "disconnect", "shutdown"):
            run.cancel(cause)
        await run.done.wait()
        run.cancel("shutdown")
    ends = [data for name, data in read(encoded(*run.log.events)).plain if "terminal" in data]
    assert [True] == [data["terminal"] for data in ends]
    assert "the run was cancelled (client_cancel)" == ends[0]["error"]


async def wait_for_ever(run, input):
    await trio.sleep_forever()


# Over sockets


class Unread:
    """In a decoder's place: the bytes are all that is looked at."""

    def feed(self, _chunk):
        """Find nothing."""
        return ()


@asynccontextmanager
async def connected(one):
    """A connection that is nothing but a socket."""
    async with connect(one.server.urls[0]) as raw:
        raw.decoder = Unread()
        yield raw


@attrs.frozen(eq=False)
class Site:
    """A server, and a client of it."""

    server: object
    http: httpx2.AsyncClient

    async def stream(self, path, **body):
        """Post, and read the stream to its end, as a page would."""
        reader = FetchReader()
        target = f"/agentlang{path}"
        async with self.http.stream("POST", target, json=body, headers=STREAM) as response:
            assert (200, "text/event-stream") == (
                response.status_code,
                response.headers["content-type"],
            )
            async for text in response.aiter_text():
                reader.feed(text)
        assert ("", [": connected"]) == (reader.rest, reader.comments)
        return reader

    async def ask(self, path, **body):
        """Post, and wait for the one answer."""
        response = await self.http.post(f"/agentlang{path}", json=body)
        return response.status_code, response.headers["content-type"], response.content


@asynccontextmanager
async def site(*agents, **server):
    """Serve agents in agentlang's protocol and our own, within the time of a test."""
    with trio.fail_after(SECONDS):
        async with (
            open_server(*agents, dialects=(NATIVE, AGENTLANG), **server) as opened,
            httpx2.AsyncClient(base_url=opened.urls[0]) as http,
        ):
            yield Site(opened, http)


@agent(name="Kernel.echo")
async def echo(run, input):
    """Give back what comes in."""
    await trio.lowlevel.checkpoint()
    return input


@agent
async def fail(run, input):
    """End with the error that the client is to read."""
    await trio.lowlevel.checkpoint()
    raise AgentError("expected luck, got none", code="unlucky", status=input)


@agent
async def guided(run, input):
    """Ask for guidance, twice."""
    run.text("Well. ")
    first = await run.ask(f"What of {input}?")
    emit("noted", answer=first)
    second = await run.ask("Sure?")
    return [input, first, second]


async def test_a_stream_has_the_headers_of_an_event_stream_and_begins_with_connected():
    """The first bytes come at once, whatever the agent does."""
    async with site(Agent("silent", wait_for_ever)) as one, connected(one) as raw:
        await raw.send(request("POST", "/agentlang/Net/silent", b"{}", **STREAM))
        await raw.receive()
        assert (200, "text/event-stream") == (raw.status, raw.header("content-type"))
        assert "no" == raw.header("x-accel-buffering")
        assert "no-store" in raw.header("cache-control")
        assert "close" != raw.header("connection")
        while b"agent_start" not in raw.body:
            assert await raw.receive()
        assert raw.body.startswith(b": connected\n\nevent: agent_start\n")
        for run in one.server.runs.unfinished():
            run.cancel("client_cancel")
        assert (await raw.finish()).endswith(b'"statusCode":500,"terminal":true}\n\n')


async def test_a_plain_agent_is_streamed_in_order():
    """Start, what the model said with its tokens, end, result; tools are not told."""

    @tool
    async def look_up(word: str) -> str:
        """Look up."""
        await trio.lowlevel.checkpoint()
        return word

    script = [ask_for(("look_up", '{"word":"a"}')), said("DONE")]
    async with site(model("triager", *script, tools=[look_up])) as one:
        reader = await one.stream("/Net/triager", message="x")
    tokens = {"input": 812, "output": 4, "total": 816}
    assert [
        ("agent_start", {"agent": "triager"}),
        ("llm_response", {"agent": "triager", "content": ""}),
        ("llm_response", {"agent": "triager", "content": "DONE", "tokens": tokens}),
        ("agent_complete", {"agent": "triager"}),
        ("result", "DONE"),
    ] == reader.plain


async def test_a_flow_is_streamed_in_order():
    """The root, then each step with its agent, then the root's end."""
    net = flow(
        "net",
        FlowStep("classify", model("classifier", said("DNS")), {"DNS": "fix"}),
        FlowStep("fix", guided_by_code, "close"),
        FlowStep("close", Agent("closer", echo.function)),
    )
    async with site(net) as one:
        reader = await one.stream("/Net/net", message="no names are found")
    tokens = {"input": 812, "output": 4, "total": 816}
    assert [
        ("agent_start", {"agent": "net"}),
        ("flow_step_start", {"step": "classify", "agent": "classifier"}),
        ("agent_start", {"agent": "classifier"}),
        ("llm_response", {"agent": "classifier", "content": "DNS", "tokens": tokens}),
        ("agent_complete", {"agent": "classifier"}),
        ("flow_step_complete", {"step": "classify", "result": "DNS"}),
        ("progress", {"fixing": "DNS"}),
        ("flow_step_complete", {"step": "fix", "result": '{"fixed":true}'}),
        ("flow_step_start", {"step": "close", "agent": "closer"}),
        ("agent_start", {"agent": "closer"}),
        ("agent_complete", {"agent": "closer"}),
        ("flow_step_complete", {"step": "close", "result": '{"fixed":true}'}),
        ("agent_complete", {"agent": "net"}),
        ("result", {"fixed": True}),
    ] == reader.plain


async def guided_by_code(run, input):
    """Fix it."""
    emit("progress", fixing=input)
    await trio.lowlevel.checkpoint()
    return {"fixed": True}


async def test_an_error_in_the_middle_of_a_flow_is_told_once_and_then_ends_it():
    """Where it happened, not as the end; nothing completes; then the end, like the answer's."""

    def net():
        broken = [[ProviderError("the key was refused", code="auth")]] * 2
        return flow(
            "net",
            FlowStep("classify", model("classifier", said("DNS")), "fix"),
            FlowStep("fix", model("fixer", *broken)),
        )

    async with site(net()) as one:
        reader = await one.stream("/Net/net", message="x")
    async with site(net()) as one:
        response = await one.ask("/Net/net", message="x")
    assert [
        *("agent_start", "flow_step_start", "agent_start", "llm_response", "agent_complete"),
        *("flow_step_complete", "flow_step_start", "agent_start", "error", "error"),
    ] == reader.names
    words = "the key was refused"
    assert [
        ("error", {"agent": "fixer", "error": words, "terminal": False}),
        ("error", {"error": words, "statusCode": 500, "terminal": True}),
    ] == reader.plain[-2:]
    assert (500, "text/plain; charset=utf-8", words.encode()) == response


@pytest.mark.parametrize("status", [400, 500])
async def test_an_agent_that_fails_ends_its_stream_with_the_status_of_the_answer(status):
    """The one is 200 for good, and says it in its last event; the other is plain text."""
    async with site(fail) as one:
        reader = await one.stream("/Net/fail", message=status)
        response = await one.ask("/Net/fail", message=status)
    words = "expected luck, got none"
    assert [
        ("agent_start", {"agent": "fail"}),
        ("error", {"error": words, "statusCode": status, "terminal": True}),
    ] == reader.plain
    assert (status, "text/plain; charset=utf-8", words.encode()) == response


@pytest.mark.parametrize(
    "value", [None, "DONE\n\u2028", {"id": 1, "name": "größer"}, [1.5, []], 7, True, ""]
)
async def test_the_answer_is_byte_for_byte_the_data_of_the_result(value):
    """Whatever the result is; the agent is found by its module."""
    async with site(echo) as one:
        reader = await one.stream("/Kernel/echo", message=value)
        response = await one.ask("/Kernel/echo", message=value)
    name, data = reader.events[-1]
    assert "result" == name
    assert (200, "application/json", data.encode()) == response
    assert value == json.loads(data)


async def test_an_event_is_given_its_whole_object():
    """Where it is no agent's message."""
    async with site(echo) as one:
        reader = await one.stream("/Kernel/echo", id=1, name="TestItem")
    assert ("result", {"id": 1, "name": "TestItem"}) == reader.plain[-1]


async def test_a_question_ends_the_stream_and_the_next_message_answers_it():
    """Each response has what came since; one run in all, and one real end."""
    async with site(guided) as one:
        first, second, third = [
            await one.stream("/Net/guided", message=message, chatId="c")
            for message in ("DNS", "restart it", "yes")
        ]
        assert 1 == len(list(one.server.runs))
    assert [
        ("agent_start", {"agent": "guided"}),
        ("llm_response", {"agent": "guided", "content": "Well. "}),
        ("result", {"suspension": "q2"}),
    ] == first.plain
    assert [("noted", {"answer": "restart it"}), ("result", {"suspension": "q3"})] == second.plain
    assert [
        ("agent_complete", {"agent": "guided"}),
        ("result", ["DNS", "restart it", "yes"]),
    ] == third.plain


async def test_a_question_is_an_answer_of_its_own_and_the_next_message_answers_it():
    """The same without streams; the bytes are those of the streams' results."""
    async with site(guided) as one:
        answers = [
            await one.ask("/Net/guided", message=message, chatId="c")
            for message in ("DNS", "restart it", "yes")
        ]
        streams = [
            await one.stream("/Net/guided", message=message, chatId="d")
            for message in ("DNS", "restart it", "yes")
        ]
    assert [(200, "application/json")] * 3 == [each[:2] for each in answers]
    assert [each[2].decode() for each in answers] == [each.events[-1][1] for each in streams]


async def test_a_question_of_a_flow_suspends_it():
    """The step goes on with the answer."""

    async def ask(run, input):
        return await run.ask("Is it plugged in?")

    net = flow("net", FlowStep("ask", ask, {"yes": "fix"}), FlowStep("fix", guided_by_code))
    async with site(net) as one:
        first = await one.stream("/Net/net", message="x", chatId="c")
        second = await one.stream("/Net/net", message="yes", chatId="c")
    assert ["agent_start", "result"] == first.names
    assert [
        *("flow_step_complete", "progress", "flow_step_complete"),
        *("agent_complete", "result"),
    ] == second.names


async def test_a_chat_is_remembered():
    """The next message of it finds what was said before."""
    provider = ScriptedProvider([said("one"), said("two")], name="m")
    async with site(Agent.of_model("chat", "m:m", provider=provider)) as one:
        for message in ("first", "second"):
            await one.stream("/Net/chat", message=message, chatId="c", mode="chat")
        assert [{"mode": "chat"}] * 2 == [
            msgspec.json.decode(run.metadata) for run in one.server.runs
        ]
    assert ["first", "one", "second"] == [each.text for each in provider.prompts[1].messages]


async def test_a_client_that_leaves_is_noticed_and_its_run_goes_on():
    """It ends as if somebody had watched; whoever asks later sees that."""
    gate = trio.Event()

    async def main(run, input):
        emit("waiting")
        await gate.wait()
        return "done"

    async with site(Agent("main", main)) as one:
        async with connected(one) as raw:
            await raw.send(request("POST", "/agentlang/Net/main", b"{}", **STREAM))
            while b"waiting" not in raw.body:
                assert await raw.receive()
            await raw.leave_by_fin()
        await wait_until(lambda: one.server.app.streams.open == 0)
        assert {"client_left": 1} == dict(one.server.app.streams.closed)
        (run,) = one.server.runs.unfinished()
        gate.set()
        await run.done.wait()
        shown = (await one.http.get(f"/runs/{run.id}")).json()
    assert ("success", "done") == (shown["outcome"], shown["result"])


async def test_a_client_that_leaves_before_its_answer_leaves_the_run_going():
    """The same without a stream."""
    gate, begun = trio.Event(), trio.Event()

    async def main(run, input):
        begun.set()
        await gate.wait()

    async with site(Agent("main", main)) as one:
        async with connected(one) as raw:
            await raw.send(request("POST", "/agentlang/Net/main", b"{}"))
            await begun.wait()
            raw.leave_by_rst()
        await wait_until(lambda: one.server.connections.open == 0)
        (run,) = one.server.runs.unfinished()
        gate.set()
        await run.done.wait()
    assert "success" == run.end.outcome


async def test_a_silent_stream_is_kept_alive_by_comments():
    """They are no events."""
    gate = trio.Event()

    async def main(run, input):
        await gate.wait()

    async with site(Agent("main", main), heartbeat=0.02) as one:
        reader = FetchReader()
        stream = one.http.stream("POST", "/agentlang/Net/main", json={}, headers=STREAM)
        async with stream as response:
            async for text in response.aiter_text():
                reader.feed(text)
                if ": keepalive" in reader.comments:
                    gate.set()
    assert ": connected" == reader.comments[0]
    assert {": keepalive"} == set(reader.comments[1:])
    assert ["agent_start", "agent_complete", "result"] == reader.names


@pytest.mark.parametrize("headers", [STREAM, {}], ids=["stream", "answer"])
@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/Net/nobody", b"{}", 404, "expected one of the agents Kernel.echo"),
        ("/Kernel/echo", b"{", 400, "expected JSON"),
        ("/Kernel/echo", b"[]", 400, "expected a JSON object"),
    ],
)
async def test_what_cannot_begin_is_refused_before_any_stream(path, body, status, words, headers):
    """An ordinary status, and plain text."""
    async with site(echo) as one:
        response = await one.http.post(f"/agentlang{path}", content=body, headers=headers)
    assert status == response.status_code
    assert "text/plain; charset=utf-8" == response.headers["content-type"]
    assert response.text.startswith(words)


async def test_a_run_that_somebody_cancels_ends_its_streams_truthfully():
    """With the error that says so; and so does the answer."""
    async with site(Agent("silent", wait_for_ever)) as one:
        got = {}

        async def stream():
            got["stream"] = (await one.stream("/Net/silent")).plain

        async def ask():
            got["answer"] = await one.ask("/Net/silent")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            nursery.start_soon(ask)
            await wait_until(lambda: len(one.server.runs.unfinished()) == 2)
            for run in one.server.runs.unfinished():
                await one.http.post(f"/runs/{run.id}/cancel")
    words = "the run was cancelled (client_cancel)"
    assert [("error", {"error": words, "statusCode": 500, "terminal": True})] == got["stream"][1:]
    assert (500, "text/plain; charset=utf-8", words.encode()) == got["answer"]


async def test_a_run_begun_elsewhere_can_be_watched_in_this_protocol():
    """One run, many dialects."""
    async with site(echo) as one:
        begun = await one.http.post("/agents/Kernel.echo/runs", json={"input": {"id": 1}})
        watched = await one.http.get(f"/runs/{begun.json()['id']}/events?dialect=agentlang")
    reader = FetchReader()
    reader.feed(watched.text)
    assert ["agent_start", "agent_complete", "result"] == reader.names
    assert ("result", '{"id":1}') == reader.events[-1]


def test_the_protocol_is_one_value():
    """Its place, and what leaving means."""
    assert isinstance(AGENTLANG, Dialect)
    assert ("agentlang", "/agentlang", "continue") == (
        AGENTLANG.name,
        AGENTLANG.mount,
        AGENTLANG.on_disconnect,
    )
    assert isinstance(AGENTLANG.encoder(None), AgentlangEncoder)
    assert (b": connected\n\n", b": keepalive\n\n") == (
        AGENTLANG.framing.prelude,
        AGENTLANG.framing.heartbeat,
    )
