"""Kilroy's protocol: what its clients send, what they are sent, and what they are never told.

Encoders and replies are pure: they are fed events and snapshots. What is about time runs in the
engine under a clock that jumps. What is about connections uses real sockets, and a client that
reads as kilroy's own page does: unnamed events by `onmessage`, and one listener for `done`.
"""

import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import h11
import httpx2
import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings as playing, strategies as st
from raw import connect, request, wait_until

from agentsse import Agent, AgentError, RunContext, agent, emit, tool
from agentsse.config import DialectSettings, Settings
from agentsse.context import Limits
from agentsse.dialects import Answer, Cancel, ListRuns, Request, Show, Start, Watch
from agentsse.dialects.kilroy import (
    KILROY,
    KilroyEncoder,
    decode_answer,
    decode_cancel,
    decode_context,
    decode_health,
    decode_list,
    decode_questions,
    decode_show,
    decode_submit,
    decode_watch,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import AgentsseError, BadRequest, Forbidden, NotFound, ProviderError
from agentsse.events import (
    NULL,
    AgentFinished,
    AgentStarted,
    AnyEvent,
    Compacted,
    ContextUsage,
    Custom,
    Failover,
    Gap,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    Liveness,
    LoopDetected,
    MessageReceived,
    Moderation,
    Option,
    PartDelta,
    PartFinished,
    PartStarted,
    Paused,
    Problem,
    ProviderEvent,
    Question,
    Raw,
    Receipt,
    Resumed,
    Retry,
    RunFinished,
    RunSnapshot,
    RunStarted,
    Stalled,
    StepFinished,
    StepStarted,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    TriggerChanged,
    Usage,
    ValuesChanged,
    encode_json,
)
from agentsse.flows import FlowStep, flow
from agentsse.log import Coalescer, Log, Position, Stamps, Timer
from agentsse.messages import ToolMessage, UserMessage
from agentsse.runs import Run, open_runs
from agentsse.server import Server
from agentsse.sse import Decoder
from agentsse.testing import ScriptedProvider, ask_for, open_server, say

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds
NOON = "2026-11-20T12:00:00.000Z"
NANOSECONDS = 1_795_176_000_000_000_000  # of that moment
OOPS = Problem(code="oops", message="oops")
SERVER_ERROR = ProviderError("500", code="server_error")


# Logs, and what becomes of them


def log_of(*events: AnyEvent) -> Log:
    """A log of a run of the agent `main`, as it is at noon."""
    log = Log("run-1", Stamps(lambda: NANOSECONDS))
    for event in (RunStarted(agent="main", input=NULL, on_disconnect="continue"), *events):
        log.append(event)
    return log


def frames_of(log: Log) -> list[bytes]:
    encoder = KilroyEncoder()
    return [frame for event in log.events for frame in encoder.feed(event)]


def told(log: Log) -> list[dict[str, Any]]:
    """What `onmessage` hears of a log, without what all of it has."""
    heard = [json.loads(f.data) for f in Decoder().feed(b"".join(frames_of(log))) if f.data != "{}"]
    return [{k: v for k, v in one.items() if k not in ("ts", "run_id", "id")} for one in heard]


def begun(kind: str, name: str, step_id: str = "s1") -> StepStarted:
    return StepStarted(step_id=step_id, kind=kind, name=name)


def ended(kind: str, name: str, step_id: str = "s1", error: Problem | None = None) -> StepFinished:
    return StepFinished(step_id=step_id, kind=kind, name=name, error=error)


def delta(text: str, kind: str = "text") -> PartDelta:
    return PartDelta(part_id="p1", kind=kind, delta=text)


def part(text: str, kind: str = "text") -> PartFinished:
    return PartFinished(part_id="p1", kind=kind, text=text)


def called(name: str = "look", call_id: str = "c1") -> ToolStarted:
    return ToolStarted(call_id=call_id, name=name, arguments=Raw(b'{"secret":1}'))


def answered(name: str = "look", call_id: str = "c1", *, is_error: bool = False) -> ToolFinished:
    return ToolFinished(
        call_id=call_id, name=name, result=Raw(b'"secret"'), is_error=is_error, source="local"
    )


def finished(outcome: str = "success", error: Problem | None = None, cause: Any = None):
    return RunFinished(outcome=outcome, usage=Usage(), receipt=Receipt(cause=cause), error=error)


def again(attempt: int, most: int, delay_s: float = 2.0) -> Retry:
    return Retry(attempt=attempt, max=most, delay_s=delay_s, error=OOPS)


def emitted(name: str, value: Any) -> Custom:
    return Custom(name=name, value=value if isinstance(value, Raw) else encode_json(value))


# Frames


def test_progress_is_an_unnamed_frame_with_its_place_as_id():
    """`onmessage` sees it; who comes back with the id goes on behind it."""
    (frame,) = frames_of(log_of(delta("Hello world")))
    expected = (
        b'id: 2\ndata: {"event":"llm_text_delta","node_id":"main","backend":"api",'
        b'"delta":"Hello world","ts":"2026-11-20T12:00:00.000Z","run_id":"run-1",'
        b'"id":"%b"}\n\n'
    )
    assert expected % json.loads(frame.split(b"data: ")[1])["id"].encode() == frame


def test_every_event_has_an_id_of_its_own_that_stays_the_same():
    """Eight hex digits, as main has it; derived, so that a second look shows the same."""
    log = log_of(*[delta("x") for _ in range(300)], begun("flow", "a"), again(1, 2), finished())
    ids = [json.loads(f.data).get("id") for f in Decoder().feed(b"".join(frames_of(log)))][:-1]
    assert len(ids) == len(set(ids)) == 300 + 1 + 3 + 1
    assert all(re.fullmatch("[0-9a-f]{8}", each) for each in ids)
    assert frames_of(log) == frames_of(log)


def test_frames_of_one_event_are_numbered_and_the_last_one_has_its_number():
    """So that a reader may come back between them."""
    log = log_of(begun("flow", "a"), again(1, 3), finished())
    ids = [frame.id for frame in Decoder().feed(b"".join(frames_of(log)))]
    assert ["2", "3.1", "3.2", "3", "4.1", "4"] == ids


def test_done_is_the_one_named_frame_and_the_last():
    """It comes behind the end of the run and nothing else; its data is an empty object."""
    *_, completed, done = frames_of(log_of(delta("x"), finished()))
    assert b"id: 3\nevent: done\ndata: {}\n\n" == done
    assert completed.startswith(b'id: 3.1\ndata: {"event":"run_completed","status":"success",')


@pytest.mark.parametrize(
    ("end", "fields"),
    [
        (finished(), {"event": "run_completed", "status": "success"}),
        (
            finished("error", OOPS),
            {"event": "run_failed", "status": "fail", "reason": "oops"},
        ),
        (
            finished("cancelled", cause="client_cancel"),
            {"event": "run_failed", "status": "canceled", "reason": "client_cancel"},
        ),
        (
            finished("interrupted", cause="input_timeout"),
            {"event": "run_failed", "status": "fail", "reason": "input_timeout"},
        ),
        (finished("error"), {"event": "run_failed", "status": "fail", "reason": ""}),
    ],
)
def test_every_end_is_said_once(end, fields):
    """Success, failure and cancel, with the reason where there is one; then `done`."""
    log = log_of(end)
    assert [fields] == told(log)
    assert frames_of(log)[-1].endswith(b"event: done\ndata: {}\n\n")


# What a model does


def test_emit_stream_progress_should_forward_agent_session_events():
    """The four kinds of pull request 54, all of the backend `api`, and who speaks."""
    log = log_of(
        begun("node", "n1"),
        begun("model", "openai:m", "s2"),
        PartStarted(part_id="p1", kind="text"),
        delta("Hello world"),
        part("Hello world"),
        PartStarted(part_id="p2", kind="tool_call", name="write_file", call_id="call_1"),
        ended("model", "openai:m", "s2"),
        begun("tool_round", "tools", "s3"),
        called("write_file", "call_1"),
        answered("write_file", "call_1"),
        ended("tool_round", "tools", "s3"),
    )
    at = {"node_id": "n1", "backend": "api"}
    call = {"tool_name": "write_file", "call_id": "call_1"}
    assert [
        {"event": "stage_attempt_start", "node_id": "n1", "attempt": 1, "max": 1},
        {"event": "provider_selected", **at, "provider": "openai", "model": "m", "source": "node"},
        {"event": "llm_text_delta", **at, "delta": "Hello world"},
        {"event": "llm_turn_end", **at, "text_length": 11, "tool_call_count": 1},
        {"event": "llm_tool_call_start", **at, **call},
        {"event": "llm_tool_call_end", **at, **call, "is_error": False},
    ] == told(log)


def test_run_api_emits_provider_tool_lifecycle_progress():
    """A provider's own tool begins and ends within its turn, and is counted."""
    log = log_of(begun("model", "codex:m"), called(), answered(), ended("model", "codex:m"))
    _, start, end, turn = told(log)
    assert ("llm_tool_call_start", "look", "c1") == (
        start["event"],
        start["tool_name"],
        start["call_id"],
    )
    assert ("llm_tool_call_end", False) == (end["event"], end["is_error"])
    assert ("llm_turn_end", 1) == (turn["event"], turn["tool_call_count"])


def test_a_turn_counts_bytes_and_distinct_calls():
    """What the model has written down and what its provider did are the same call."""
    log = log_of(
        begun("model", "p:m"),
        part("Hé"),
        part("thought", "reasoning"),
        part("no", "refusal"),
        PartStarted(part_id="k1", kind="tool_call", name="look", call_id="c1"),
        called(call_id="c1"),
        ToolOutputDelta(call_id="c2", delta="x"),
        answered(call_id="c2"),
        PartStarted(part_id="k3", kind="tool_call", name="look"),
        ended("model", "p:m"),
    )
    turn = told(log)[-1]
    assert ("llm_turn_end", 5, 3) == (turn["event"], turn["text_length"], turn["tool_call_count"])


def test_assistant_text_end_includes_tool_call_count():
    """One, then none: each turn counts its own."""
    calls = [PartStarted(part_id="k", kind="tool_call", name="look", call_id="c")]
    first = [begun("model", "p:m"), *calls, ended("model", "p:m")]
    log = log_of(*first, called(call_id="c"), begun("model", "p:m", "s2"), ended("model", "", "s2"))
    turns = [event for event in told(log) if event["event"] == "llm_turn_end"]
    assert [1, 0] == [turn["tool_call_count"] for turn in turns]


def test_a_turn_that_breaks_off_has_no_end():
    """Its text stays where it is; what comes next says why."""
    log = log_of(
        begun("model", "p:m"), delta("Hel"), part("Hel"), ended("model", "p:m", error=OOPS)
    )
    assert ["provider_selected", "llm_text_delta"] == [event["event"] for event in told(log)]


def test_what_a_refusal_says_is_text():
    """Else a client would see a turn without a word."""
    assert ["no"] == [event["delta"] for event in told(log_of(delta("no", "refusal")))]


def test_a_model_that_is_called_again_says_what_went_wrong():
    """With who was called, and how often it may be."""
    log = log_of(begun("node", "n1"), begun("model", "openai:m", "s2"), again(1, 7))
    assert {
        "event": "llm_retry",
        "node_id": "n1",
        "provider": "openai",
        "model": "m",
        "attempt": 1,
        "max": 7,
        "delay_ms": 2000,
        "error": "oops",
        "retryable": True,
    } == told(log)[-1]


def test_another_model_that_takes_over_is_told():
    """Both of them, with their providers, and why."""
    log = log_of(Failover(from_model="openai:m", to_model="google:g", reason="500"))
    assert [
        {
            "event": "llm_failover",
            "node_id": "main",
            "from_provider": "openai",
            "from_model": "m",
            "to_provider": "google",
            "to_model": "g",
            "reason": "500",
        }
    ] == told(log)


def test_thoughts_arguments_and_output_stay_inside():
    """Kilroy keeps them for its session log; the stream has names and ids."""
    log = log_of(
        delta("secret", "reasoning"),
        delta("secret", "tool_call"),
        called(),
        ToolOutputDelta(call_id="c1", delta="secret"),
        answered(is_error=True),
    )
    assert b"secret" not in b"".join(frames_of(log))
    assert ["llm_tool_call_start", "llm_tool_call_end"] == [event["event"] for event in told(log)]


# Stages


def attempts(log: Log) -> list[Any]:
    return [
        (e["event"].removeprefix("stage_"), e["node_id"], e["attempt"], e.get("max"))
        for e in told(log)
        if e["event"].startswith("stage_")
    ]


def test_a_stage_begins_and_ends_with_its_attempt():
    """How it went, and why not."""
    log = log_of(begun("node", "build"), ended("node", "build", error=OOPS))
    stage = {"node_id": "build", "attempt": 1, "max": 1}
    assert [
        {"event": "stage_attempt_start", **stage},
        {"event": "stage_attempt_end", **stage, "status": "fail", "failure_reason": "oops"},
    ] == told(log)


def test_a_stage_that_failed_and_begins_again_is_its_next_attempt():
    """After a success it counts anew."""
    tries = [OOPS, OOPS, None, None]
    log = log_of(
        *[e for error in tries for e in (begun("node", "b"), ended("node", "b", error=error))]
    )
    starts = [each for each in attempts(log) if each[0] == "attempt_start"]
    assert [1, 2, 3, 1] == [attempt for _, _, attempt, _ in starts]


def test_the_innermost_open_stage_is_the_node():
    """Outside of all of them it is the agent."""
    log = log_of(
        delta("0"),
        begun("flow", "a", "s1"),
        delta("1"),
        begun("node", "b", "s2"),
        begun("model", "p:m", "s3"),
        delta("2"),
        ended("model", "p:m", "s3"),
        ended("node", "b", "s2"),
        delta("3"),
        ended("flow", "a", "s1"),
        delta("4"),
    )
    deltas = [event for event in told(log) if event["event"] == "llm_text_delta"]
    assert ["main", "a", "b", "a", "main"] == [event["node_id"] for event in deltas]


def test_a_stage_that_is_gone_through_again_ends_and_begins():
    """What fails within a step of a flow is tried again in it: three frames tell of it."""
    log = log_of(begun("flow", "a"), again(1, 3, 0.4), ended("flow", "a"))
    assert [
        {"event": "stage_attempt_start", "node_id": "a", "attempt": 1, "max": 1},
        {
            "event": "stage_attempt_end",
            "node_id": "a",
            "attempt": 1,
            "max": 3,
            "status": "fail",
            "failure_reason": "oops",
        },
        {
            "event": "stage_retry_sleep",
            "node_id": "a",
            "attempt": 1,
            "delay_ms": 400,
            "retries": 1,
            "max_retry": 2,
        },
        {"event": "stage_attempt_start", "node_id": "a", "attempt": 2, "max": 3},
        {
            "event": "stage_attempt_end",
            "node_id": "a",
            "attempt": 2,
            "max": 3,
            "status": "success",
            "failure_reason": "",
        },
    ] == told(log)


def edges(log: Log) -> list[tuple[str, str, str]]:
    return [
        (e["from_node"], e["to_node"], e["hop_source"])
        for e in told(log)
        if e["event"] == "edge_selected"
    ]


def test_an_edge_leads_from_step_to_step():
    """It is told where the next step begins; also where that is the same one once more."""
    log = log_of(
        *[e for name in "abb" for e in (begun("flow", name), ended("flow", name))],
        begun("node", "aside"),
    )
    assert [("a", "b", "edge_selection"), ("b", "b", "edge_selection")] == edges(log)
    assert {"event", "from_node", "to_node", "label", "condition", "hop_source"} == set(
        told(log)[2]
    )


def test_steps_within_a_step_have_edges_of_their_own():
    """An edge never leads into another level."""
    log = log_of(
        begun("flow", "out"),
        *[e for name in "ab" for e in (begun("flow", name, name), ended("flow", name, name))],
        ended("flow", "out"),
        begun("flow", "next"),
        begun("flow", "c", "c"),
    )
    assert [("a", "b", "edge_selection"), ("out", "next", "edge_selection")] == edges(log)


def test_a_pipeline_that_begins_again_hops_to_its_retry_target():
    """The edge back is none that anybody has drawn; a lone step has none at all."""
    failed = [begun("flow", "b"), ended("flow", "b", error=OOPS)]
    log = log_of(begun("flow", "a"), ended("flow", "a"), *failed, again(1, 2), begun("flow", "a"))
    assert [("a", "b", "edge_selection"), ("b", "a", "retry_target")] == edges(log)
    assert ("retry_sleep", "main", 1, None) in attempts(log)

    log = log_of(*failed, again(1, 2), *failed, begun("flow", "c"))
    assert [("b", "c", "edge_selection")] == edges(log)


def test_an_end_without_a_beginning_harms_nobody():
    """A log that is read from its middle still makes sense."""
    log = log_of(ended("flow", "a"), ended("model", "p:m"), AgentFinished(agent="w"))
    assert ["stage_attempt_end", "llm_turn_end"] == [event["event"] for event in told(log)]


# Branches, heartbeats, warnings


def test_a_child_run_is_a_branch():
    """It has a key, and its run's id says where it can be watched; its end says how it went."""
    log = log_of(
        AgentStarted(agent="worker", child_run_id="r2"),
        AgentStarted(agent="worker", child_run_id="r3"),
        AgentStarted(agent="helper"),
        AgentFinished(agent="helper"),
        AgentFinished(agent="worker", child_run_id="r3"),
        AgentFinished(agent="worker", child_run_id="r2", error=OOPS),
    )
    first = {"branch_key": "worker:1", "branch_logs_root": "", "branch_run_id": "r2"}
    second = {"branch_key": "worker:2", "branch_logs_root": "", "branch_run_id": "r3"}
    start, done = (
        {"branch_event": "branch_subgraph_start"},
        {"branch_event": "branch_subgraph_done"},
    )
    well = {"branch_status": "success", "branch_failure_reason": ""}
    badly = {"branch_status": "fail", "branch_failure_reason": "oops"}
    assert [
        {"event": "branch_progress", **first, **start},
        {"event": "branch_progress", **second, **start},
        {"event": "branch_progress", **second, **done, **well},
        {"event": "branch_progress", **first, **done, **badly},
    ] == told(log)


def test_a_heartbeat_has_whole_seconds():
    """As in kilroy, where clients may read them as integers."""
    beat = Liveness(elapsed_s=60.004, events=14, since_last_output_s=3.9)
    assert [
        {
            "event": "stage_heartbeat",
            "node_id": "main",
            "elapsed_s": 60,
            "event_count": 14,
            "since_last_output_s": 3,
        }
    ] == told(log_of(beat))


def test_a_stall_is_told_in_milliseconds():
    """What was allowed, and what it was."""
    log = log_of(Stalled(idle_s=601.0, limit_s=600))
    assert [
        {"event": "stall_watchdog_timeout", "stall_timeout_ms": 600_000, "idle_ms": 601_000}
    ] == told(log)


def test_loops_and_full_contexts_are_warnings():
    """In words: kilroy has no other form for them."""
    log = log_of(
        LoopDetected(fingerprint="shell:ab12;", repeats=10),
        ContextUsage(ratio=0.8512, tokens=851, limit=1000),
    )
    loop, context = told(log)
    assert ("warning", "warning") == (loop["event"], context["event"])
    assert "shell:ab12;" in loop["message"]
    assert "10" in loop["message"]
    assert "Context usage at ~85% of context window" == context["message"]


def test_what_kilroy_has_no_word_for_does_not_go_out():
    """Questions among it: they are polled."""
    log = log_of(
        InputRequested(request_id="q1", questions=()),
        InputReceived(request_id="q1", answers=NULL),
        InputWithdrawn(request_id="q2"),
        MessageReceived(message_id="u1", text="hi", mode="steer"),
        Paused(),
        Resumed(),
        ValuesChanged(values=Raw(b"{}")),
        Compacted(ratio_before=0.9, ratio_after=0.1),
        Moderation(violation=True),
        ProviderEvent(provider="p", raw=NULL),
        TriggerChanged(thread_id="s", trigger_id="t", change="fired", name="t", every_s=1, text=""),
        Gap(from_id="1", to_id="2"),
    )
    assert [] == frames_of(log)


# What agents emit


def test_what_is_emitted_goes_out_under_its_own_name():
    """Its fields beside those that all events have."""
    log = log_of(emitted("setup_command_ok", {"index": 0, "command": "npm ci"}))
    assert [{"event": "setup_command_ok", "index": 0, "command": "npm ci"}] == told(log)


@pytest.mark.parametrize("value", [None, 7, "text", [1, {"event": "done"}]])
def test_what_is_no_object_stands_under_value(value):
    """Any JSON can be emitted."""
    assert [{"event": "note", "value": value}] == told(log_of(emitted("note", value)))


@pytest.mark.parametrize(
    "value",
    [
        {"event": "run_completed", "ts": "never", "run_id": "other", "id": "x", "n": 1},
        Raw(b'{"\\u0065vent":"done","\\u0069d":"x","n":1,"event":"run_failed"}'),
    ],
)
def test_nothing_that_is_emitted_takes_the_place_of_the_envelope(value):
    """However its keys are written: each key is there once, and it is ours."""
    (frame,) = frames_of(log_of(emitted("note", value)))
    pairs = json.loads(frame.split(b"data: ")[1], object_pairs_hook=list)
    assert ["event", "n", "ts", "run_id", "id"] == [key for key, _ in pairs]
    assert [("event", "note"), ("n", 1), ("ts", NOON), ("run_id", "run-1")] == pairs[:4]
    assert 8 == len(pairs[4][1])


@pytest.mark.parametrize("name", ["done", "run_completed", "run_failed"])
def test_nobody_but_the_run_says_that_it_is_over(name):
    """What bears the name of an end goes out as something that somebody has emitted."""
    log = log_of(emitted(name, {"status": "success"}))
    assert [{"event": "custom", "name": name, "value": {"status": "success"}}] == told(log)


@pytest.mark.parametrize(
    "value",
    [
        b'0,"event":"run_completed"',
        b'[1],"event":"run_failed"',
        b'{"a":1},"event":"done"',
        b'{"a":',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\xff",
    ],
)
@pytest.mark.parametrize("name", ["note", "done"])
def test_what_is_no_json_stays_in_its_place(name, value):
    """Somebody may have vouched for it; it is text, and says nothing about the run."""
    (heard,) = told(log_of(emitted(name, Raw(value))))
    assert value.decode(errors="replace") == heard["value"]
    assert heard["event"] in ("note", "custom")


def test_json_that_others_have_formatted_does_not_break_the_framing():
    """Line ends in it are broken into data lines; the reader gets what was meant."""
    log = log_of(emitted("note", Raw(b'{"a":\r\n\n[1,\r2]}')))
    (frame,) = frames_of(log)
    assert b"\r" not in frame
    assert [{"event": "note", "a": [1, 2]}] == told(log)


# Throttle: text is let out every 100 ms, and before whatever is no text


@pytest.fixture
async def timer(nursery):
    """A timer that runs; the test itself asks for the clock, else it gets the real one."""
    timer = Timer()
    nursery.start_soon(timer.run)
    await trio.testing.wait_all_tasks_blocked()
    return timer


def heard(log: Log) -> list[str]:
    """The names of what a reader sees now, and the text of deltas."""
    return [
        event.get("delta", event["event"])
        for event in told(log)
        if event["event"] != "provider_selected"
    ]


def throttled(log: Log, timer: Timer) -> Coalescer:
    """What stands between a run that a kilroy client has submitted and its log."""
    order = decode_submit(posted({"workflow": "main"}))
    assert isinstance(order, Start)
    assert order.coalesce is not None
    return Coalescer(log, timer, order.coalesce)


async def test_throttle_nothing_before_the_interval_then_one_joined_event(autojump_clock, timer):
    """But for the very first delta, which nobody has to wait for."""
    writer = throttled(log := log_of(), timer)
    for text in ("Hel", "lo", " ", "world"):
        writer.append(delta(text))
    assert ["Hel"] == heard(log)
    await trio.sleep(0.09)
    assert ["Hel"] == heard(log)
    await trio.sleep(0.02)
    assert ["Hel", "lo world"] == heard(log)


async def test_throttle_turn_end_forces_flush_in_order(autojump_clock, timer):
    """The text of a turn stands before its end."""
    writer = throttled(log := log_of(begun("model", "p:m")), timer)
    for event in (delta("a"), delta("b"), part("ab"), ended("model", "p:m")):
        writer.append(event)
    assert ["a", "b", "llm_turn_end"] == heard(log)


async def test_throttle_tool_events_are_immediate_and_behind_the_text(autojump_clock, timer):
    """A call never overtakes what was said before it."""
    writer = throttled(log := log_of(), timer)
    for event in (delta("a"), delta("b"), called(), delta("c"), delta("d"), answered()):
        writer.append(event)
    assert ["a", "b", "llm_tool_call_start", "c", "d", "llm_tool_call_end"] == heard(log)


async def test_throttle_close_flushes_the_rest(autojump_clock, timer):
    """The end comes behind everything."""
    writer = throttled(log := log_of(), timer)
    for event in (delta("a"), delta("b"), finished()):
        writer.append(event)
    log.close()
    assert ["a", "b", "run_completed"] == heard(log)


async def test_throttle_append_after_close_is_ignored(autojump_clock):
    """Whatever a run says behind its end is dropped, and no empty delta is ever said."""
    kept: list[RunContext] = []

    async def main(run, input):
        kept.append(run)
        run.text("")

    run = await play(Agent("main", main))
    kept[0].text("late")
    assert ["run_completed"] == heard(run.log)


# In the engine, under a clock that jumps


@asynccontextmanager
async def opened(*agents: Agent, **limits: Any) -> AsyncIterator[Any]:
    async with open_runs({one.name: one for one in agents}, limits=Limits(**limits)) as runs:
        yield runs


def submit(runs, name: str = "main", **body: Any) -> Run:
    """Start a run as a kilroy client does."""
    order = decode_submit(posted({"workflow": name, **body}))
    assert isinstance(order, Start)
    return runs.start(order, default=KILROY.on_disconnect)[0]


async def play(main: Agent, *others: Agent, **limits: Any) -> Run:
    """Submit one run, and see it to its end."""
    async with opened(main, *others, **limits) as runs:
        run = submit(runs, main.name)
        await run.done.wait()
    return run


def model(*script: Any, name: str = "main", **settings: Any) -> tuple[Agent, ScriptedProvider]:
    provider = ScriptedProvider(script)
    return Agent.of_model(name, "scripted:one", provider=provider, **settings), provider


@tool
async def look(where: str) -> str:
    """Look there."""
    return f"nothing {where}"


async def test_stream_finish_without_response_preserves_tool_calls(autojump_clock):
    """The tool is really run, and the second request contains its result."""
    main, provider = model(ask_for(("look", '{"where":"there"}')), say("done"), tools=[look])
    run = await play(main)
    results = [m for m in provider.prompts[1].messages if isinstance(m, ToolMessage)]
    assert 2 == len(provider.prompts)
    assert ['"nothing there"'] == [result.content for result in results]
    assert [
        "llm_turn_end",
        "llm_tool_call_start",
        "llm_tool_call_end",
        "done",
        "llm_turn_end",
        "run_completed",
    ] == heard(run.log)


@pytest.mark.parametrize("before", [[], say("x")[:2], say("x")])
async def test_run_api_one_shot_stream_error_event_takes_precedence(before, autojump_clock):
    """An error behind a finish is an error: no turn has ended, and the run has failed."""
    error = ProviderError("boom", code="bad_request")
    run = await play(model([*before, error])[0])
    assert "llm_turn_end" not in heard(run.log)
    assert {"event": "run_failed", "status": "fail", "reason": "boom"} == told(run.log)[-1]


async def test_failover_other_provider_is_used_and_told(autojump_clock):
    """With a retry before it; then the other one's turn."""
    first, second = ScriptedProvider([[SERVER_ERROR]] * 2, name="a"), ScriptedProvider([say("b")])
    main = Agent.of_model("main", "a:x", provider=first, fallbacks=["b:y"])
    async with open_runs(
        {"main": main}, limits=Limits(max_tries=2), providers={"b": second}
    ) as runs:
        await (run := submit(runs)).done.wait()
    assert [
        "provider_selected",
        "llm_retry",
        "llm_failover",
        "provider_selected",
        "llm_text_delta",
        "llm_turn_end",
        "run_completed",
    ] == [event["event"] for event in told(run.log)]
    assert ("b", "y") == (told(run.log)[3]["provider"], told(run.log)[3]["model"])


@pytest.mark.parametrize("code", ["not_found", "content_filter", "auth", "context_length"])
async def test_failover_does_not_happen_for_what_would_fail_anywhere(code, autojump_clock):
    """The other model is not asked, and no `llm_failover` says that it was."""
    first = ScriptedProvider([[ProviderError("no", code=code)]])
    second = ScriptedProvider([say("b")])
    main = Agent.of_model("main", "a:x", provider=first, fallbacks=["b:y"])
    async with open_runs({"main": main}, limits=Limits(), providers={"b": second}) as runs:
        await (run := submit(runs)).done.wait()
    assert ["provider_selected", "run_failed"] == [event["event"] for event in told(run.log)]
    assert [] == second.prompts


async def test_failover_does_not_happen_for_a_turn_limit(autojump_clock):
    """An agent that only calls tools is stopped where it is."""
    first = ScriptedProvider([ask_for(("look", '{"where":"x"}'))])
    second = ScriptedProvider([say("b")])
    main = Agent.of_model("main", "a:x", provider=first, fallbacks=["b:y"], tools=[look])
    limits = Limits(max_steps=1)
    async with open_runs({"main": main}, limits=limits, providers={"b": second}) as runs:
        await (run := submit(runs)).done.wait()
    assert "llm_failover" not in heard(run.log)
    assert "within 1 model calls" in told(run.log)[-1]["reason"]
    assert [] == second.prompts


async def test_failover_needs_a_list_of_who_may_take_over(autojump_clock):
    """Without one, or with an empty one, nobody does."""
    for listed in ({}, {"fallbacks": []}):
        run = await play(model([SERVER_ERROR], **listed)[0], max_tries=1)
        assert ["run_failed"] == heard(run.log)
        assert "500" == told(run.log)[-1]["reason"]


async def test_heartbeat_is_emitted_during_the_agent_loop(autojump_clock):
    """With the seconds, and how many events there were; it stops with the step."""

    async def main(run, input):
        with run.step("build"):
            await trio.sleep(25)
        await trio.sleep(35)

    run = await play(Agent("main", main))
    beats = [event for event in told(run.log) if event["event"] == "stage_heartbeat"]
    assert [("build", 10, 2, 10), ("build", 20, 2, 20)] == [
        (b["node_id"], b["elapsed_s"], b["event_count"], b["since_last_output_s"]) for b in beats
    ]


async def test_heartbeat_comes_as_often_as_it_is_set_to(autojump_clock):
    """Every `liveness` seconds; nothing is derived from the watchdog's limit."""

    async def main(run, input):
        with run.step("build"):
            await trio.sleep(1)

    run = await play(Agent("main", main), liveness=0.3, stall=900)
    assert 3 == [event["event"] for event in told(run.log)].count("stage_heartbeat")


async def test_watchdog_fires_although_there_are_heartbeats(autojump_clock):
    """They are no progress: the stage is given up, and says how long nothing came."""
    run = await play(model([math.inf])[0])
    (stall,) = [e for e in told(run.log) if e["event"] == "stall_watchdog_timeout"]
    assert 600_000 == stall["stall_timeout_ms"]
    assert 600_000 <= stall["idle_ms"] <= 620_000
    assert "stage_heartbeat" in heard(run.log)
    assert ("run_failed", "fail") == (told(run.log)[-1]["event"], told(run.log)[-1]["status"])


async def test_a_flow_is_a_pipeline(autojump_clock):
    """Its steps are stages, with edges between them; a step's retry is the next attempt."""
    tried: list[int] = []

    async def build(run, input):
        tried.append(len(tried))
        if len(tried) < 3:
            raise AgentError("broken")
        return "ok"

    async def ship(run, input):
        return input

    pipeline = flow("main", FlowStep("build", build, "ship", tries=3), FlowStep("ship", ship))
    run = await play(pipeline)
    assert [
        "stage_attempt_start",
        *["stage_attempt_end", "stage_retry_sleep", "stage_attempt_start"] * 2,
        "stage_attempt_end",
        "edge_selected",
        "stage_attempt_start",
        "stage_attempt_end",
        "run_completed",
    ] == heard(run.log)
    assert [("build", "ship", "edge_selection")] == edges(run.log)
    assert [1, 1, 1, 2, 2, 2, 3, 3, 1, 1] == [attempt for _, _, attempt, _ in attempts(run.log)]
    assert {1, 3, None} == {most for _, _, _, most in attempts(run.log)}


async def test_children_run_beside_one_another_as_branches(autojump_clock):
    """Each is told where it begins and where it is done; its own events are in its own log."""

    async def worker(run, input):
        run.text(f"worker {input}")

    async def main(run, input):
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(run.delegate, "worker", number)

    run = await play(Agent("main", main), Agent("worker", worker))
    assert ["branch_progress"] * 4 + ["run_completed"] == heard(run.log)
    keys = [event["branch_key"] for event in told(run.log)[:-1]]
    assert [{"worker:1", "worker:2"}] * 2 == [set(keys[:2]), set(keys[2:])]


async def test_steering_is_heard_after_the_round_and_a_follow_up_at_the_end(autojump_clock):
    """The model is told both, the second when it would have ended; kilroy's stream is not."""
    main, provider = model(
        ask_for(("look", '{"where":"x"}')), say("first"), say("second"), tools=[look]
    )
    async with opened(main) as runs:
        run = submit(runs)
        run.context.hear("steer", "steer")
        run.context.hear("follow", "follow_up")
        await run.done.wait()
    asked = [[m.text for m in p.messages if isinstance(m, UserMessage)] for p in provider.prompts]
    assert "steer" in asked[1]
    assert "follow" not in asked[1]
    assert ["steer", "follow"] == asked[2][1:]
    assert "message_received" not in heard(run.log)


async def test_abort_ends_the_run_with_its_terminal(autojump_clock):
    """Whatever was under way is finished first."""
    async with opened(model([*say("Hel")[:2], math.inf])[0]) as runs:
        run = submit(runs)
        await trio.sleep(1)
        run.cancel("client_cancel")
        await run.done.wait()
    assert ["Hel", "run_failed"] == heard(run.log)
    assert ("canceled", "client_cancel") == (
        told(run.log)[-1]["status"],
        told(run.log)[-1]["reason"],
    )


async def test_leaving_never_ends_a_run(autojump_clock):
    """Also when the last reader goes; kilroy only unsubscribes."""
    async with opened(model([5.0, *say("x")])[0]) as runs:
        run = submit(runs)
        reader = run.attach("kilroy", KilroyEncoder, Position(0))
        await trio.sleep(1)
        run.detach(reader, "client_left")
        await run.done.wait()
    assert run.end is not None
    assert "success" == run.end.outcome


# Resuming


def rendered(log: Log, after: Position) -> bytes:
    """What a reader behind a place is sent."""
    log.commit(len(log.events))
    reader = log.attach("kilroy", KilroyEncoder, after)
    sent = b""
    while reader.is_behind:
        sent += reader.take()
    log.detach(reader)
    return sent


def test_a_reader_comes_back_at_any_id():
    """Everything behind that frame, once: also between the two frames of an end."""
    log = log_of(
        delta("a"), begun("flow", "a"), again(1, 2), ended("flow", "a"), begun("flow", "b"),
        delta("secret", "reasoning"), finished(),
    )  # fmt: skip
    frames = frames_of(log)
    for place, frame in enumerate(Decoder().feed(b"".join(frames))):
        watch = decode_watch(asked(last_event_id=frame.id))
        assert isinstance(watch, Watch)
        assert b"".join(frames[place + 1 :]) == rendered(log, Position(*watch.after))
    assert b"".join(frames) == rendered(log, Position(0))


EVENTS = st.lists(
    st.sampled_from(
        [
            delta("x"), delta("x", "reasoning"), begun("flow", "a"), ended("flow", "a"),
            begun("node", "n", "n"), ended("node", "n", "n", OOPS), begun("model", "p:m", "m"),
            ended("model", "p:m", "m"), again(1, 2), called(), answered(), part("x"),
            emitted("note", {"n": 1}), AgentStarted(agent="w", child_run_id="c"),
            AgentFinished(agent="w", child_run_id="c"),
        ]
    ),
    max_size=40,
)  # fmt: skip


@playing(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=EVENTS, cuts=st.lists(st.integers(1, 2_000), max_size=8))
def test_no_gap_and_no_duplicate_wherever_a_stream_is_cut(events, cuts):
    """A client that is cut off anywhere, and comes back with its last id, has every frame once."""
    log = log_of(*map(msgspec.structs.replace, events), finished())
    got, last = [], "0"
    for cut in [*cuts, None]:
        seq, part_number = map(int, (*last.split("."), "0")[:2])
        decoder = Decoder(last_id="" if last == "0" else last)
        got += decoder.feed(rendered(log, Position(seq, part_number))[:cut])
        last = decoder.last_id or "0"
    assert Decoder().feed(b"".join(frames_of(log))) == got
    assert ["done"] == [frame.event for frame in got if frame.event != "message"]


# Requests


def posted(body: Any, **parameters: str) -> Request:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request("POST", parameters, {}, {}, raw)


def asked(method: str = "GET", query: Any = None, **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(method, {"run_id": "r1"}, query or {}, named)


def test_submitting_starts_a_run_and_leaves_it_to_itself():
    """The workflow is the agent; it is given all that was sent; text comes every 100 ms."""
    body = {"workflow": "ship", "run_id": "run-1", "inputs": {"a": 1}, "tmux": True}
    order = decode_submit(posted(body))
    assert isinstance(order, Start)
    assert ("ship", body, "background", "run-1", 0.1, None) == (
        order.agent,
        order.input,
        order.delivery,
        order.run_id,
        order.coalesce,
        order.metadata,
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digraph deploy { a -> b }", "deploy"),
        ('strict DIGRAPH "My flow"{}', "My flow"),
        ("// a comment\ndigraph\n  x.y-2\n{", "x.y-2"),
        ("digraph{}", None),
        ("graph x {}", None),
        ("digraph " * 10_000, None),
    ],
)
def test_the_name_of_a_graph_is_kept_beside_the_run(source, name):
    """The server's own agent runs; it, and whoever looks, may know what was meant."""
    order = decode_submit(posted({"dot_source": source, "config_path": "run.yaml"}))
    assert isinstance(order, Start)
    assert (None, None, name and {"digraph": name}) == (order.agent, order.run_id, order.metadata)


@pytest.mark.parametrize(
    "body",
    [
        {"dot_source": "digraph x {}", "workflow": "ship"},
        {"dot_source_path": "/x.dot", "dot_source": "", "workflow": "ship", "run_id": ""},
        {"package_path": "/x", "workflow": "ship", "dot_source": None},
    ],
)
def test_a_workflow_that_is_named_is_what_runs(body):
    """Whatever else says what to do."""
    order = decode_submit(posted(body))
    assert isinstance(order, Start)
    assert ("ship", None) == (order.agent, order.run_id)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{not json", "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b"", "got none of them"),
        ({}, "got none of them"),
        ({"dot_source": "", "workflow": None}, "got none of them"),
        ({"dot_source": 7}, "dot_source"),
        ({"dot_source": "digraph{}", "dot_source_path": "/tmp/test.dot"}, "got both"),
    ],
)
def test_submit_validation(body, says):
    """What cannot be understood, or says nothing, or two things, is a 400."""
    with pytest.raises(BadRequest, match=says) as refused:
        decode_submit(posted(body))
    assert 400 == refused.value.status


@pytest.mark.parametrize(
    "run_id",
    [
        "../../../etc/passwd",
        "/tmp/evil",
        "..",
        "foo/bar",
        "  ",
        "-x",
        "_x",
        "x" * 129,
        "é",
        "a\n b",
    ],
)
def test_run_id_path_traversal(run_id):
    """An id is letters, digits, dashes and underscores, or it is refused."""
    with pytest.raises(BadRequest, match="run_id"):
        decode_submit(posted({"workflow": "ship", "run_id": run_id}))


@pytest.mark.parametrize("run_id", ["a", "0", "x" * 128, "01J-a_b", " padded "])
def test_run_ids_that_are_taken(run_id):
    """Spaces around one are not part of it."""
    order = decode_submit(posted({"workflow": "ship", "run_id": run_id}))
    assert isinstance(order, Start)
    assert run_id.strip() == order.run_id


def test_watching_begins_with_the_first_event_or_behind_the_last_one_seen():
    """A browser sends the id by itself; HEAD is answered without a stream."""
    assert Watch(run_id="r1") == decode_watch(asked())
    assert Watch(run_id="r1", after=(7, 1)) == decode_watch(asked(last_event_id="7.1"))
    assert Watch(run_id="r1") == decode_watch(asked(last_event_id=""))
    assert Watch(run_id="r1", headers_only=True) == decode_watch(asked("HEAD"))


def test_an_id_that_nobody_has_sent_is_refused():
    """Rather than to begin anywhere."""
    with pytest.raises(BadRequest, match="Last-Event-ID"):
        decode_watch(asked(last_event_id="9f3a01bc"))


@pytest.mark.parametrize(
    ("question_id", "body", "request_id", "answers"),
    [
        ("q1", {"value": "yes"}, "q1", {"": "yes"}),
        ("q1.go", {"value": "yes"}, "q1", {"go": "yes"}),
        ("q1.a.b", {"values": ["x", "y"]}, "q1", {"a.b": ["x", "y"]}),
        ("q1", {"text": "more"}, "q1", {"": "more"}),
        ("q1", {"value": "", "values": [], "text": "more"}, "q1", {"": "more"}),
        ("q1", {"value": "", "values": None, "text": ""}, "q1", {"": ""}),
        ("q1", {"values": []}, "q1", {"": []}),
    ],
)
def test_answering(question_id, body, request_id, answers):
    """By the question's own id, or without one where it is the only one."""
    intent = decode_answer(posted(body, run_id="r1", question_id=question_id))
    assert isinstance(intent, Answer)
    assert ("r1", request_id, answers, True) == (
        intent.run_id,
        intent.request_id,
        intent.answers,
        intent.is_loose,
    )


@pytest.mark.parametrize("body", [{}, b"", b"[]", b"nope", {"value": 1}, {"values": "a"}])
def test_an_answer_that_says_nothing_is_refused(body):
    """As is one that cannot be read."""
    with pytest.raises(BadRequest):
        decode_answer(posted(body, run_id="r1", question_id="q1"))


def test_routes_stand_below_the_mount_and_where_they_were_at_first():
    """`/runs` moves with the mount, `/pipelines` stays; only `/health` has one place."""
    places = {(route.method, route.path, route.is_rooted) for route in KILROY.routes}
    below = {(m, p.removeprefix("/runs")) for m, p, is_rooted in places if not is_rooted}
    rooted = {(m, p.removeprefix("/pipelines")) for m, p, is_rooted in places if is_rooted}
    assert below == rooted | {("GET", "/health")}
    assert {
        ("POST", ""),
        ("GET", ""),
        ("GET", "/<run_id>"),
        ("GET", "/<run_id>/events"),
        ("POST", "/<run_id>/cancel"),
        ("GET", "/<run_id>/context"),
        ("GET", "/<run_id>/questions"),
        ("POST", "/<run_id>/questions/<question_id>/answer"),
    } == rooted


# Replies


def snapshot(**fields: Any) -> RunSnapshot:
    known = {
        "id": "r1", "agent": "main", "state": "running", "on_disconnect": "continue",
        "created": NOON, "started": NOON, "finished": None, "thread_id": None,
        "parent_run_id": None, "outcome": None, "result": NULL, "error": None, "usage": Usage(),
        "receipt": None, "events": 0, "questions": (), "values": Raw(b"{}"),
    }  # fmt: skip
    return RunSnapshot(**{**known, **fields})


def shown(decode: Any, run: RunSnapshot, events: Any = ()) -> Any:
    """What is answered to a request about a run."""
    intent = decode(asked())
    assert isinstance(intent, Show)
    reply = intent.reply(run, events)
    assert (200, "application/json") == (reply.status, reply.media_type)
    return json.loads(reply.body)


def test_a_submitted_run_is_accepted():
    """202, with its id; kilroy has no other word for it."""
    order = decode_submit(posted({"workflow": "main"}))
    reply = order.reply(snapshot(), ())
    assert (202, b'{"run_id":"r1","status":"accepted"}') == (reply.status, reply.body)


def test_a_cancel_is_answered_at_once():
    """Also where there was nothing left to cancel."""
    order = decode_cancel(Request("POST", {"run_id": "r1"}, {}, {}))
    assert isinstance(order, Cancel)
    assert not order.waits
    assert order.reply is order.reply_if_over
    reply = order.reply(snapshot(), ())
    assert (200, b'{"status":"canceling"}') == (reply.status, reply.body)


NOTHING = dict.fromkeys(
    ("logs_root", "worktree_dir", "run_branch", "final_commit", "cxdb_ui_url"), ""
)


def test_status_says_where_a_run_is():
    """The stage that is open, the last event and its time."""
    log = log_of(
        begun("flow", "a"), ended("flow", "a"), begun("flow", "b"), begun("node", "c", "s2"),
        ended("node", "c", "s2"), delta("x"), delta("y", "reasoning"),
    )  # fmt: skip
    assert {
        "run_id": "r1",
        "state": "running",
        "status": "running",
        "current_node_id": "b",
        "last_event": "llm_text_delta",
        "last_event_at": NOON,
        "failure_reason": "",
        **NOTHING,
    } == shown(decode_show, snapshot(), log.events)


def test_status_after_a_stage_still_names_it():
    """As kilroy's does: it is the node of the newest event. Before any stage it is the agent."""
    log = log_of(begun("flow", "fetch_data"), ended("flow", "fetch_data"))
    status = shown(decode_show, snapshot(), log.events)
    assert ("fetch_data", "stage_attempt_end") == (status["current_node_id"], status["last_event"])

    status = shown(decode_show, snapshot(started=None, state="queued"))
    assert ("main", "", "") == (
        status["current_node_id"],
        status["last_event"],
        status["last_event_at"],
    )
    assert "running" == status["state"]


@pytest.mark.parametrize(
    ("events", "last"),
    [
        ([begun("model", "p:m"), again(1, 3)], "llm_retry"),
        ([begun("model", "p:m"), ended("model", "p:m"), again(1, 3)], "stage_retry_sleep"),
        ([delta("x"), begun("flow", "a"), again(1, 3)], "stage_attempt_start"),
        ([finished()], "run_completed"),
        ([emitted("done", {})], "custom"),
    ],
)
def test_the_last_event_is_the_one_that_went_out_last(events, last):
    """The status says what the stream says."""
    log = log_of(*events)
    status = shown(decode_show, snapshot(), log.events)
    assert last == status["last_event"] == told(log)[-1]["event"]


@pytest.mark.parametrize(
    ("fields", "state", "reason"),
    [
        ({"state": "waiting"}, "running", ""),
        ({"state": "paused"}, "running", ""),
        ({"state": "cancelling"}, "running", ""),
        ({"outcome": "success", "receipt": Receipt(cause="client_cancel")}, "success", ""),
        ({"outcome": "error", "error": OOPS}, "fail", "oops"),
        ({"outcome": "cancelled", "receipt": Receipt(cause="shutdown")}, "canceled", "shutdown"),
        ({"outcome": "interrupted", "receipt": Receipt(cause="input_timeout")}, "fail",
         "input_timeout"),
    ],
)  # fmt: skip
def test_failed_pipeline_status(fields, state, reason):
    """Four words for the state, and why it is not success."""
    status = shown(decode_show, snapshot(**fields))
    assert (state, state, reason) == (status["state"], status["status"], status["failure_reason"])


def test_a_run_is_presented_as_its_status():
    """Where nothing else is asked for."""
    status = json.loads(KILROY.present(snapshot()))
    assert ("r1", "running", "main") == (
        status["run_id"],
        status["state"],
        status["current_node_id"],
    )


def test_context_is_the_values_of_the_run():
    """An empty object where it has set none."""
    assert {} == shown(decode_context, snapshot())
    assert {} == shown(decode_context, snapshot(values=msgspec.UNSET))
    assert {"a": [1]} == shown(decode_context, snapshot(values=Raw(b'{"a":[1]}')))


def test_questions_are_listed_with_what_may_be_answered():
    """One entry each; the stage is the one that was open when it was asked."""
    confirm = Question(id="go", kind="confirm", prompt="Deploy?")
    others = (
        Question(id="a", kind="choice", prompt="A?", options=(Option(id="x", label="X"),)),
        Question(id="b.c", kind="choices", prompt="B?", options=(Option(id="y"),)),
        Question(id="d", kind="text", prompt="D?"),
    )
    named = Question(id="e", kind="confirm", prompt="E?", options=(Option(id="yes", label="Oui"),))
    log = log_of(
        begun("flow", "deploy"),
        one := InputRequested(request_id="q1", questions=(confirm,)),
        ended("flow", "deploy"),
        several := InputRequested(request_id="q2", questions=others),
        begun("flow", "later"),
        last := InputRequested(request_id="q3", questions=(named,)),
    )
    run = snapshot(questions=(one, several, last))
    yes_or_no = [{"key": "yes", "label": "Yes"}, {"key": "no", "label": "No"}]

    def entry(id, type, text, stage, options):
        fields = {"question_id": id, "type": type, "text": text, "stage": stage}
        return {**fields, "options": options, "asked_at": NOON}

    assert [
        entry("q1", "YES_NO", "Deploy?", "deploy", yes_or_no),
        entry("q2.a", "SINGLE_SELECT", "A?", "main", [{"key": "x", "label": "X"}]),
        entry("q2.b.c", "MULTI_SELECT", "B?", "main", [{"key": "y", "label": "y"}]),
        entry("q2.d", "FREE_TEXT", "D?", "main", []),
        entry("q3", "YES_NO", "E?", "later", [{"key": "yes", "label": "Oui"}]),
    ] == shown(decode_questions, run, log.events)
    assert [] == shown(decode_questions, snapshot(), log.events)


def test_a_question_keeps_its_id_while_others_of_its_request_are_answered():
    """It is the request as it was asked that counts."""
    questions = tuple(Question(id=each, kind="text", prompt="?") for each in "ab")
    log = log_of(asked_at := InputRequested(request_id="q1", questions=questions))
    rest = msgspec.structs.replace(asked_at, questions=questions[1:])
    listed = shown(decode_questions, snapshot(questions=(rest,)), log.events)
    assert ["q1.b"] == [question["question_id"] for question in listed]
    listed = shown(decode_questions, snapshot(questions=(rest,)))
    assert ["q1"] == [question["question_id"] for question in listed]
    stranger = msgspec.structs.replace(rest, seq=1)
    listed = shown(decode_questions, snapshot(questions=(stranger,)), log.events)
    assert ["q1"] == [question["question_id"] for question in listed]


def listed(decode: Any, *runs: RunSnapshot, **query: str) -> Any:
    intent = decode(asked(query=query))
    assert isinstance(intent, ListRuns)
    return json.loads(intent.reply(runs).body)


def test_runs_are_listed_as_main_does():
    """With what its page shows of them; `status` and `graph` choose among them."""
    going = snapshot(id="r2", agent="ship", started=None)
    over = snapshot(
        outcome="error", error=OOPS, finished="2026-11-20T12:00:01.500Z", receipt=Receipt()
    )
    rows = [
        {"run_id": "r2", "graph_name": "ship", "status": "running", "started_at": NOON},
        {
            "run_id": "r1",
            "graph_name": "main",
            "status": "fail",
            "started_at": NOON,
            "completed_at": "2026-11-20T12:00:01.500Z",
            "duration_ms": 1500,
            "failure_reason": "oops",
        },
    ]
    assert {"runs": rows, "count": 2} == listed(decode_list, going, over)
    assert {"runs": rows[1:], "count": 1} == listed(decode_list, going, over, status="fail")
    assert {"runs": rows[:1], "count": 1} == listed(decode_list, going, over, graph="hi")
    assert {"runs": [], "count": 0} == listed(decode_list, going, over, graph="x", sort="newest")


def test_health_reflects_the_pipeline_count():
    """Branches are no pipelines of their own."""
    assert {"status": "ok", "pipelines": 0} == listed(decode_health)
    runs = snapshot(), snapshot(id="r2", parent_run_id="r1")
    assert {"status": "ok", "pipelines": 1} == listed(decode_health, *runs)


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (NotFound("expected a run"), 404, b'{"error":"expected a run"}'),
        (BadRequest("no"), 400, b'{"error":"no"}'),
        (Forbidden("Origin: no"), 403, b'{"error":"cross-origin request blocked"}'),
    ],
)
def test_errors_are_one_field(error: AgentsseError, status: int, body: bytes):
    """And a page from elsewhere is told what kilroy tells it, to the letter."""
    reply = KILROY.problem(Problem(code=error.code, message=error.message, status=error.status))
    assert (status, body, "application/json") == (reply.status, reply.body, reply.media_type)


# Over real sockets


@attrs.define(eq=False)
class Page:
    """A client that reads as kilroy's page does, and comes back as an EventSource does.

    Attributes:
        messages: What `onmessage` was given.
        is_done: Whether its listener for `done` was called.
        raw: All bytes that have come.
    """

    url: str
    path: str
    messages: list[dict[str, Any]] = attrs.field(factory=list)
    is_done: bool = False
    raw: bytes = b""
    last_id: str = ""

    async def read(self, *, most: int | None = None, until: str | None = None) -> int:
        """Read to the end, to so many bytes, or to a message; the status of the response."""
        headers = {"last_event_id": self.last_id} if self.last_id else {}
        decoder, left = Decoder(last_id=self.last_id), most
        async with connect(self.url) as client:
            await client.send(request("GET", self.path, **headers))
            while not (left == 0 or (until and until in self.names)):
                match client.http.next_event():
                    case h11.NEED_DATA:
                        client.http.receive_data(await client.stream.receive_some(65_536))
                    case h11.Data(data=data):
                        self._take(decoder, bytes(data)[:left])
                        left = None if left is None else max(left - len(data), 0)
                    case h11.Response() as response:
                        client.response = response
                    case _:
                        break
            return client.status

    def _take(self, decoder: Decoder, data: bytes) -> None:
        self.raw += data
        for frame in decoder.feed(data):
            if frame.event == "message":
                self.messages.append(json.loads(frame.data))
            elif frame.event == "done":
                assert not self.is_done
                self.is_done = True
        self.last_id = decoder.last_id

    @property
    def names(self) -> list[str]:
        """What it was told of, in order."""
        return [message["event"] for message in self.messages]


@attrs.frozen(eq=False)
class Site:
    """A server that speaks kilroy beside the native dialect, and a client of it."""

    server: Server
    http: httpx2.AsyncClient

    async def submit(self, name: str, **body: Any) -> str:
        """Submit a run; its id."""
        answer = await self.http.post("/kilroy/runs", json={"workflow": name, **body})
        assert (202, "accepted") == (answer.status_code, answer.json()["status"])
        run_id: str = answer.json()["run_id"]
        return run_id

    async def get(self, path: str) -> Any:
        """What a GET is answered."""
        answer = await self.http.get(path)
        assert 200 == answer.status_code
        return answer.json()

    def page(self, run_id: str, form: str = "/kilroy/runs") -> Page:
        """A page that has not read anything yet."""
        return Page(self.server.urls[0], f"{form}/{run_id}/events")

    async def question(self, run_id: str) -> Any:
        """The one question that a run asks, once it does."""
        await wait_until(lambda: self.server.runs.find(run_id).state == "waiting")
        (question,) = await self.get(f"/pipelines/{run_id}/questions")
        return question


@asynccontextmanager
async def site(
    *agents: Agent, settings: Settings | None = None, **server: Any
) -> AsyncIterator[Site]:
    """Serve agents, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, settings=settings, dialects=(NATIVE, KILROY), **server) as opened,
            httpx2.AsyncClient(base_url=opened.urls[0]) as http,
        ):
            yield Site(opened, http)


@attrs.frozen(eq=False)
class Gate:
    """An agent that emits what it is told, waits for the word, and emits it again."""

    go: trio.Event = attrs.field(factory=trio.Event)

    def agent(self, name: str = "gated") -> Agent:
        """The agent."""

        async def function(run: RunContext, input: Any) -> None:
            for word in input.get("inputs", ["before"]):
                run.emit(word)
            await self.go.wait()
            run.emit("after")

        return Agent(name, function)


@agent
async def asker(run: RunContext, input: Any) -> Any:
    """Ask what it is told to ask, and make the answer a value."""
    with run.step("deploy"):
        said = await run.ask([msgspec.convert(q, Question) for q in input["inputs"]])
    run.set_values(said=said)
    return said


GO = {"id": "go", "kind": "confirm", "prompt": "Deploy?"}


async def test_sse_integration_replay_then_live_then_done():
    """What was before comes first, then what happens, then `done`, and the stream ends."""
    gate = Gate()
    async with site(gate.agent()) as here:
        run_id = await here.submit("gated")
        page = here.page(run_id, "/pipelines")
        async with here.http.stream("GET", page.path) as response:
            assert "text/event-stream; charset=utf-8" == response.headers["content-type"]
            assert "no" == response.headers["x-accel-buffering"]
            assert "no-store" in response.headers["cache-control"]
        await page.read(until="before")
        assert (["before"], False) == (page.names, page.is_done)
        gate.go.set()
        await page.read()
    assert (["before", "after", "run_completed"], True) == (page.names, page.is_done)
    assert page.raw.endswith(b"event: done\ndata: {}\n\n")


async def test_a_stream_begins_at_once_though_nothing_was_said():
    """The response's head does not wait for the first event, and a HEAD waits for nothing."""
    gate = Gate()
    async with site(gate.agent()) as here:
        run_id = await here.submit("gated", inputs=[])
        async with here.http.stream("GET", f"/kilroy/runs/{run_id}/events") as response:
            assert 200 == response.status_code
        head = await here.http.head(f"/kilroy/runs/{run_id}/events")
        assert (200, b"") == (head.status_code, head.content)


async def test_lifecycle_status_over_both_forms():
    """202 with a Location; running, then success; the list and the health know of it."""
    gate = Gate()
    async with site(gate.agent()) as here:
        answer = await here.http.post(
            "/pipelines", json={"dot_source": "digraph any {}", "run_id": "test-run-001"}
        )
        assert (202, {"run_id": "test-run-001", "status": "accepted"}) == (
            answer.status_code,
            answer.json(),
        )
        location = answer.headers["location"]
        assert "/kilroy/runs/test-run-001/events" == location
        await here.page("test-run-001").read(until="before")
        status = await here.get("/pipelines/test-run-001")
        assert ("running", "before") == (status["state"], status["last_event"])
        gate.go.set()
        await (page := Page(here.server.urls[0], location)).read()
        assert page.is_done
        status = await here.get("/kilroy/runs/test-run-001")
        assert ("success", "run_completed") == (status["state"], status["last_event"])
        assert [("test-run-001", "success")] == [
            (run["run_id"], run["status"]) for run in (await here.get("/kilroy/runs"))["runs"]
        ]
        assert {"status": "ok", "pipelines": 1} == await here.get("/kilroy/health")
        assert "test-run-001" == (await here.get("/runs/test-run-001"))["id"]


async def test_a_whole_transcript_of_a_model_with_a_tool():
    """As kilroy's page reads it: text, calls, turns, and the end; thoughts and arguments do not."""
    main, _ = model(ask_for(("look", '{"where":"secret"}')), say("Hello wörld"), tools=[look])
    async with site(main) as here:
        page = here.page(await here.submit("main"))
        await page.read()
    assert [
        "provider_selected",
        "llm_turn_end",
        "llm_tool_call_start",
        "llm_tool_call_end",
        "provider_selected",
        "llm_text_delta",
        "llm_turn_end",
        "run_completed",
    ] == page.names
    assert (12, 0) == (page.messages[6]["text_length"], page.messages[6]["tool_call_count"])
    assert {"main"} == {m["node_id"] for m in page.messages[:-1]}
    assert b"secret" not in page.raw


async def test_late_subscriber_gets_everything_and_done():
    """And whoever comes back behind `done`, as an EventSource does by itself, is sent away."""
    gate = Gate()
    gate.go.set()
    async with site(gate.agent()) as here:
        run_id = await here.submit("gated")
        await (first := here.page(run_id)).read()
        await (second := here.page(run_id)).read()
        assert first.raw == second.raw
        assert 204 == await second.read()
        assert first.raw == second.raw


async def test_multiple_subscribers_hear_the_same():
    """Whenever they come."""
    gate = Gate()
    async with site(gate.agent()) as here:
        run_id = await here.submit("gated")
        pages = [here.page(run_id) for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for page in pages[:4]:
                nursery.start_soon(page.read)
            await wait_until(lambda: here.server.app.streams.open == 4)
            gate.go.set()
            for page in pages[4:]:
                nursery.start_soon(page.read)
        assert {True} == {page.is_done for page in pages}
        assert {pages[0].raw} == {page.raw for page in pages}


async def test_replay_of_300_events_without_deadlock():
    """More than any queue of kilroy's holds."""

    @agent
    async def main(_run: RunContext, _input: Any) -> None:
        for number in range(300):
            emit("tick", n=number)

    async with site(main) as here:
        page = here.page(await here.submit("main"))
        await page.read()
    assert list(range(300)) == [message["n"] for message in page.messages[:-1]]
    assert page.is_done


async def test_slow_client_drop_is_a_bare_disconnect():
    """Who does not read is cut off without a `done`; the run goes on, and others see its end."""
    gate = Gate()

    async def flood(run: RunContext, _input: Any) -> None:
        for _ in range(256):
            run.emit("flood", said="x" * 64_000)
            await trio.lowlevel.checkpoint()
        await gate.go.wait()

    async with site(Agent("flood", flood), write_deadline=0.2) as here:
        run_id = await here.submit("flood")
        async with connect(here.server.urls[0], receive_buffer=4096) as client:
            await client.send(request("GET", f"/pipelines/{run_id}/events"))
            await wait_until(lambda: here.server.app.streams.closed["slow_client"] == 1)
            received = bytearray()
            try:
                while chunk := await client.stream.receive_some(65_536):
                    received += chunk
            except trio.BrokenResourceError:
                pass
        assert b"event: done" not in received
        assert "running" == (await here.get(f"/pipelines/{run_id}"))["state"]
        gate.go.set()
        await (page := here.page(run_id)).read()
        assert (257, True) == (len(page.messages), page.is_done)


async def test_done_comes_only_on_a_real_close():
    """A stream that the server itself ends says when to come back, and nothing of an end."""
    gate = Gate()
    async with site(gate.agent(), rotation=0.05, heartbeat=0.01) as here:
        run_id = await here.submit("gated")
        page = here.page(run_id)
        await page.read()
        assert not page.is_done
        assert b":\n\n" in page.raw
        assert b"retry: " in page.raw
        gate.go.set()
        while not page.is_done:
            await page.read()
        assert ["before", "after", "run_completed"] == page.names


@pytest.mark.parametrize("form", ["/kilroy/runs", "/pipelines"])
async def test_cancel_200(form):
    """At once, and again, and when it is over; the stream ends as canceled."""
    gate = Gate()
    async with site(gate.agent()) as here:
        run_id = await here.submit("gated")
        page = here.page(run_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(page.read)
            await wait_until(lambda: here.server.app.streams.open == 1)
            answer = await here.http.post(f"{form}/{run_id}/cancel")
            assert (200, {"status": "canceling"}) == (answer.status_code, answer.json())
        assert ("run_failed", "canceled") == (page.names[-1], page.messages[-1]["status"])
        assert page.is_done
        again = await here.http.post(f"{form}/{run_id}/cancel")
        assert (200, answer.content) == (again.status_code, again.content)
        assert "canceled" == (await here.get(f"{form}/{run_id}"))["state"]


async def test_cancel_unblocks_every_pending_question():
    """Whoever was asked need not answer any more."""
    async with site(asker) as here:
        run_id = await here.submit("asker", inputs=[GO])
        question = await here.question(run_id)
        await here.http.post(f"/pipelines/{run_id}/cancel")
        await here.server.runs.find(run_id).done.wait()
        assert [] == await here.get(f"/pipelines/{run_id}/questions")
        late = await here.http.post(
            f"/pipelines/{run_id}/questions/{question['question_id']}/answer", json={"value": "yes"}
        )
        assert late.status_code == 404
        assert ["error"] == list(late.json())


@pytest.mark.parametrize("form", ["/kilroy/runs", "/pipelines"])
@pytest.mark.parametrize(
    ("asks", "body", "said"),
    [
        (GO, {"value": "yes"}, True),
        (GO, {"value": "No", "values": [], "text": ""}, False),
        ({"id": "t", "kind": "text", "prompt": "?"}, {"text": "so"}, "so"),
        (
            {"id": "c", "kind": "choice", "prompt": "?", "options": [{"id": "a", "label": "An"}]},
            {"value": "an"},
            "a",
        ),
        (
            {"id": "c", "kind": "choices", "prompt": "?", "options": [{"id": "a"}, {"id": "b"}]},
            {"values": ["b", "a"]},
            ["b", "a"],
        ),
    ],
)
async def test_questions_ask_list_answer_gone(form, asks, body, said):
    """Of every kind; what was answered reaches the agent."""
    async with site(asker) as here:
        run_id = await here.submit("asker", inputs=[asks])
        assert {} == await here.get(f"{form}/{run_id}/context")
        question = await here.question(run_id)
        assert ("deploy", asks["prompt"]) == (question["stage"], question["text"])
        answer = await here.http.post(
            f"{form}/{run_id}/questions/{question['question_id']}/answer", json=body
        )
        assert (200, {"status": "answered"}) == (answer.status_code, answer.json())
        assert [] == await here.get(f"{form}/{run_id}/questions")
        await (page := here.page(run_id)).read()
        assert {"said": {asks["id"]: said}} == await here.get(f"{form}/{run_id}/context")
    assert ["stage_attempt_start", "stage_attempt_end", "run_completed"] == page.names


async def test_several_questions_are_answered_one_by_one():
    """Each by its own id, which stays; the run goes on with the last one."""
    several = [GO, {"id": "why", "kind": "text", "prompt": "Why?"}]
    async with site(asker) as here:
        run_id = await here.submit("asker", inputs=several)
        await wait_until(lambda: here.server.runs.find(run_id).state == "waiting")
        asked_for = await here.get(f"/pipelines/{run_id}/questions")
        assert ["YES_NO", "FREE_TEXT"] == [question["type"] for question in asked_for]
        for number, value in enumerate(("yes", "so")):
            assert asked_for[number:] == await here.get(f"/pipelines/{run_id}/questions")
            path = f"/pipelines/{run_id}/questions/{asked_for[number]['question_id']}/answer"
            assert 200 == (await here.http.post(path, json={"value": value})).status_code
        await here.server.runs.find(run_id).done.wait()
        context = await here.get(f"/pipelines/{run_id}/context")
    assert {"said": {"go": True, "why": "so"}} == context


async def test_wrong_question_404_and_bad_body_400():
    """A question that is not asked is not found, and an answer must be one."""
    async with site(asker) as here:
        run_id = await here.submit("asker", inputs=[GO])
        question = await here.question(run_id)
        base = f"/pipelines/{run_id}/questions"
        for qid, body, status in (
            ("q-999", b'{"value":"yes"}', 404),
            (question["question_id"], b"nope", 400),
            (question["question_id"], b'{"value":"perhaps"}', 400),
        ):
            answer = await here.http.post(f"{base}/{qid}/answer", content=body)
            assert (status, ["error"]) == (answer.status_code, list(answer.json()))


async def test_duplicate_answer_is_refused():
    """The first one counts."""

    @agent
    async def twice(run: RunContext, _input: Any) -> Any:
        return [await run.ask("1?"), await run.ask("2?")]

    async with site(twice) as here:
        run_id = await here.submit("twice")
        path = f"/pipelines/{run_id}/questions"
        first = (await here.question(run_id))["question_id"]
        for number, expected in enumerate(((200,), (404,))):
            answer = await here.http.post(f"{path}/{first}/answer", json={"text": str(number)})
            assert answer.status_code in expected
        second = (await here.question(run_id))["question_id"]
        assert first != second
        await here.http.post(f"{path}/{second}/answer", json={"text": "2"})
        await (run := here.server.runs.find(run_id)).done.wait()
    assert ["0", "2"] == run.result


async def test_concurrent_asks_have_unique_ids():
    """Branches ask side by side, and each gets its own answer."""

    @agent
    async def many(run: RunContext, _input: Any) -> Any:
        said = {}

        async def ask(name: str) -> None:
            said[name] = await run.ask(name)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(ask, name)
        return said

    async with site(many) as here:
        run_id = await here.submit("many")
        run = here.server.runs.find(run_id)
        await wait_until(lambda: len(run.context.asked) == 3)
        questions = await here.get(f"/pipelines/{run_id}/questions")
        assert 3 == len({question["question_id"] for question in questions})
        for question in questions:
            await here.http.post(
                f"/pipelines/{run_id}/questions/{question['question_id']}/answer",
                json={"value": question["text"].upper()},
            )
        await run.done.wait()
    assert {"a": "A", "b": "B", "c": "C"} == run.result


async def test_interviewer_timeout(autojump_clock):
    """Nobody answers in 30 minutes: the run has failed, and says why."""
    async with opened(asker) as runs:
        run = submit(runs, "asker", inputs=[GO])
        await run.done.wait()
    assert 1_800 <= trio.current_time() < 1_801
    failed = told(run.log)[-1]
    assert ("fail", "input_timeout") == (failed["status"], failed["reason"])


async def test_interviewer_timeout_of_ones_own(autojump_clock):
    """A question that its agent has given up is not listed any more, and the run goes on."""

    async def main(run, input):
        with trio.move_on_after(5):
            await run.ask("?")
        await trio.sleep(5)

    async with opened(Agent("main", main)) as runs:
        run = submit(runs)
        await trio.sleep(1)
        assert 1 == len(shown(decode_questions, run.snapshot(), run.log.events))
        await trio.sleep(6)
        assert [] == shown(decode_questions, run.snapshot(), run.log.events)
        await run.done.wait()
    assert ["run_completed"] == heard(run.log)


async def test_csrf_blocks_cross_origin():
    """To the letter; nothing was started."""
    async with site(asker) as here:
        for path in ("/kilroy/runs", "/pipelines", "/pipelines/x/cancel"):
            answer = await here.http.post(
                path, json={"workflow": "asker"}, headers={"Origin": "https://evil.com"}
            )
            assert (403, b'{"error":"cross-origin request blocked"}') == (
                answer.status_code,
                answer.content,
            )
        assert [] == list(here.server.runs)


@pytest.mark.parametrize(
    "origin", [None, "http://localhost:3000", "http://127.0.0.1:1", "http://[::1]:80"]
)
async def test_csrf_allows_no_origin_and_localhost(origin):
    """Programs, and pages of this machine."""
    headers = {} if origin is None else {"Origin": origin}
    async with site(asker) as here:
        answer = await here.http.post("/pipelines", json={}, headers=headers)
    assert 400 == answer.status_code


async def test_what_is_refused_is_said_in_one_field():
    """An id that is taken, an agent and a run that are not there."""
    gate = Gate()
    async with site(gate.agent()) as here:
        await here.submit("gated", run_id="once")
        unknown = [
            ("GET", "/pipelines/nope"),
            ("GET", "/pipelines/nope/events"),
            ("GET", "/kilroy/runs/nope/context"),
            ("GET", "/kilroy/runs/nope/questions"),
            ("POST", "/pipelines/nope/cancel"),
        ]
        for method, path, body, status in (
            ("POST", "/pipelines", {"workflow": "gated", "run_id": "once"}, 409),
            ("POST", "/pipelines", {"workflow": "nobody"}, 404),
            ("POST", "/pipelines", {}, 400),
            ("POST", "/pipelines/nope/questions/q1/answer", {"value": "x"}, 404),
            *((method, path, None, 404) for method, path in unknown),
        ):
            answer = await here.http.request(method, path, json=body)
            assert (status, ["error"]) == (answer.status_code, list(answer.json()))


async def test_the_mount_moves_one_form_and_not_the_other():
    """`/pipelines` is where it always was."""
    settings = Settings(dialects={"kilroy": DialectSettings(mount="/k")})
    async with site(asker, settings=settings) as here:
        answer = await here.http.post("/k/runs", json={"workflow": "asker", "inputs": [GO]})
        run_id = answer.json()["run_id"]
        assert f"/k/runs/{run_id}/events" == answer.headers["location"]
        assert "running" == (await here.get(f"/pipelines/{run_id}"))["state"]
        assert 404 == (await here.http.get("/kilroy/health")).status_code


@pytest.mark.parametrize("cut", [1, 37, 200, 1_000])
async def test_resume_at_random_cuts_over_sockets(cut):
    """A page that is cut off after every so many bytes has each event once, and one `done`."""
    main, _ = model([*say("Hel")[:2], 0.01, *say("lo", part_id="t2")])
    async with site(main) as here:
        run_id = await here.submit("main")
        page, grown = here.page(run_id), cut
        while not page.is_done:
            await page.read(most=grown)
            grown += cut  # so that it gets somewhere
        await (whole := here.page(run_id)).read()
    assert whole.messages == page.messages


async def test_submitting_is_told_apart_by_what_is_wrong_with_it():
    """Over the wire as it is in the decoder."""
    async with site(asker) as here:
        for body in (b"{not json", b'{"dot_source":"a","dot_source_path":"b"}', b"{}"):
            assert 400 == (await here.http.post("/pipelines", content=body)).status_code
        for run_id in ("../x", "a/b", "  "):
            answer = await here.http.post(
                "/kilroy/runs", json={"workflow": "asker", "run_id": run_id}
            )
            assert 400 == answer.status_code
        assert [] == list(here.server.runs)
