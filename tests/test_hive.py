"""hive's dialect: its words, its filters, what a page makes of them, and its routes.

First the pure parts: events in, bytes out. `Page` reads a stream as hive's own page does, by
replacement, and counts nothing twice by itself: whatever it shows twice was sent twice. Then the
same over real sockets.
"""

import itertools
import json
import random
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx2
import msgspec
import pytest
import trio
from msgspec import UNSET, Raw
from msgspec.structs import replace
from raw import wait_until

from agentsse import Agent, AgentError, RunContext, agent, emit, tool
from agentsse.dialects import (
    Cancel,
    CloseThread,
    ListThreads,
    OpenThread,
    Pause,
    Request,
    ShowThread,
    Start,
    Tell,
    Watch,
    WatchFeed,
)
from agentsse.dialects.hive import (
    DEFAULT,
    GLOBAL,
    GROWTH,
    HIVE,
    LONG,
    META,
    RESERVED,
    TAIL,
    TYPES,
    Interest,
    _lightened,
    greet,
    hive_problem,
    replay,
    session_snapshot,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import BadRequest, NotFound
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
    Receipt,
    Resumed,
    Retry,
    RunFinished,
    RunSnapshot,
    RunStarted,
    Stalled,
    StepFinished,
    StepStarted,
    ThreadSnapshot,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    TriggerChanged,
    Usage,
    ValuesChanged,
)
from agentsse.feed import Feed, FeedReader
from agentsse.log import Stamps
from agentsse.providers import Finish
from agentsse.server import Server
from agentsse.sse import Decoder, Frame
from agentsse.testing import ScriptedProvider, ask_for, open_server, say

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds
TS = "2026-11-21T19:30:00.120Z"
ALL = Interest(TYPES, frozenset("*"))


# Events, as a run makes them


@attrs.define
class Speaker:
    """A run that says what it is told to: each event gets its number."""

    run_id: str = "r1"
    path: tuple[str, ...] = ()
    seq: int = 0

    def __call__(self, event: AnyEvent) -> AnyEvent:
        """Say one thing."""
        self.seq += 1
        return replace(event, run_id=self.run_id, seq=self.seq, ts=TS, path=self.path)

    def each(self, *events: AnyEvent) -> list[AnyEvent]:
        """The same for several."""
        return [self(event) for event in events]


def started(input: bytes = b'{"query":"x"}', name: str = "queen") -> RunStarted:
    return RunStarted(agent=name, input=Raw(input), on_disconnect="continue", thread_id="s1")


def finished(outcome: Any = "success", cause: Any = None, **more: Any) -> RunFinished:
    return RunFinished(outcome=outcome, usage=Usage(), receipt=Receipt(cause=cause), **more)


def problem(message: str = "boom", code: str = "agent_error") -> Problem:
    return Problem(code=code, message=message)


def said(*deltas: str, kind: Any = "text", part_id: str = "p1") -> list[AnyEvent]:
    """A part, from its beginning to its end."""
    return [
        PartStarted(part_id=part_id, kind=kind),
        *(PartDelta(part_id=part_id, kind=kind, delta=delta) for delta in deltas),
        PartFinished(part_id=part_id, kind=kind, text="".join(deltas)),
    ]


def turn(*within: AnyEvent, step_id: str = "m1", **end: Any) -> list[AnyEvent]:
    """A model call."""
    named = {"step_id": step_id, "kind": "model", "name": "p:m"}
    return [StepStarted(**named), *within, StepFinished(**named, **end)]


def called(
    call_id: str = "t1", result: bytes = b'"ok"', *, is_error: bool = False
) -> list[AnyEvent]:
    named = {"call_id": call_id, "name": "search"}
    return [
        ToolStarted(**named, arguments=Raw(b'{"q":"x"}')),
        ToolFinished(**named, result=Raw(result), is_error=is_error, source="local"),
    ]


def asked(*questions: Question, request_id: str = "q1") -> InputRequested:
    text = Question(id="answer", kind="text", prompt="Which?")
    return InputRequested(request_id=request_id, questions=questions or (text,))


def answered(answers: bytes = b'{"answer":"prod"}', request_id: str = "q1") -> InputReceived:
    return InputReceived(request_id=request_id, answers=Raw(answers))


def emitted(name: str, value: bytes = b"{}") -> Custom:
    return Custom(name=name, value=Raw(value))


def trigger(change: Any = "available", trigger_id: str = "t", **more: Any) -> TriggerChanged:
    named = {"name": "Daily", "every_s": 90.0, "text": "Look!"}
    return TriggerChanged(
        thread_id="s1", trigger_id=trigger_id, change=change, ts=TS, **named, **more
    )


# How they are heard


def frames_of(
    events: Iterable[AnyEvent], options: Interest | None = ALL, *, first: int = 1
) -> list[Frame]:
    """What a session's stream says of these events."""
    encoder = HIVE.feed.encoder(options)
    made = [encoder.feed(event, f"e-{n}") for n, event in enumerate(events, first)]
    return Decoder().feed(b"".join(frame for frames in made for frame in frames))


def heard(events: Iterable[AnyEvent], options: Interest | None = ALL) -> list[dict[str, Any]]:
    return [json.loads(frame.data) for frame in frames_of(events, options)]


def types(events: Iterable[AnyEvent], options: Interest | None = ALL) -> list[str]:
    return [event["type"] for event in heard(events, options)]


def told(*events: AnyEvent, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """Type and data of what is said of a run's events."""
    return [(event["type"], event["data"]) for event in heard(Speaker(path=path).each(*events))]


@attrs.define
class Page:
    """What hive's page shows, read as it reads: by `onmessage`, text by replacement.

    It dedupes nothing: what comes twice is there twice.
    """

    texts: dict[tuple[Any, ...], str] = attrs.field(factory=dict)
    thoughts: dict[tuple[Any, ...], str] = attrs.field(factory=dict)
    inputs: list[str] = attrs.field(factory=list)
    requests: list[str] = attrs.field(factory=list)
    tools: list[tuple[str, str]] = attrs.field(factory=list)
    turns: list[Any] = attrs.field(factory=list)
    executions: list[tuple[str, str]] = attrs.field(factory=list)
    reports: list[str] = attrs.field(factory=list)
    fires: list[int] = attrs.field(factory=list)
    triggers: dict[str, str] = attrs.field(factory=dict)
    activity: str | None = None
    gaps: int = 0
    others: list[str] = attrs.field(factory=list)

    def read(self, frame: Frame) -> None:
        """Take a message; a frame with a name would not be one."""
        assert "message" == frame.event
        event = json.loads(frame.data)
        kind, data, execution = event["type"], event["data"], event["execution_id"]
        match kind:
            case "client_output_delta":
                key = (execution, data["iteration"], data["inner_turn"], event["node_id"])
                self.texts[key] = data["snapshot"]
            case "llm_text_delta":
                self.texts[execution, data["inner_turn"], event["node_id"]] = data["snapshot"]
            case "llm_reasoning_delta":
                self.thoughts[execution, data["iteration"]] = data["snapshot"]
            case "client_reasoning":
                self.thoughts[execution, data["iteration"]] = data["reasoning"]
            case "client_input_received":
                self.inputs.append(data["content"])
            case "client_input_requested":
                self.requests.append(data["prompt"])
            case "tool_call_started" | "tool_call_completed":
                self.tools.append((kind, data["tool_use_id"]))
            case "llm_turn_complete":
                self.turns.append(data.get("iteration"))
            case "execution_started" | "execution_completed" | "execution_failed":
                self.executions.append((kind, execution))
            case "subagent_report":
                self.reports.append(data["worker_id"])
            case "trigger_fired":
                self.fires.append(data["fire_count"])
            case "trigger_removed":
                del self.triggers[data["trigger_id"]]
            case _ if kind.startswith("trigger_"):
                self.triggers[data["trigger_id"]] = kind
            case "session_snapshot" | "loop_state_changed":
                self.activity = data["activity"]
            case "gap":
                self.gaps += 1
            case _:
                self.others.append(kind)

    @classmethod
    def of(cls, data: bytes) -> "Page":
        """What it shows of a whole stream."""
        page = cls()
        for frame in Decoder().feed(data):
            page.read(frame)
        return page

    @property
    def text(self) -> list[str]:
        """What was said, in order."""
        return list(self.texts.values())

    @property
    def conversation(self) -> dict[str, Any]:
        """What stays, however one has come to see it."""
        shown = attrs.asdict(self)
        for passing in ("requests", "thoughts", "others", "activity"):
            del shown[passing]
        return shown


# The wire: "SSE format"


def test_a_frame_without_a_name_has_no_event_line_and_the_payload():
    """`data:` with the envelope on one line, and the id that lets a page come back."""
    speaker = Speaker()
    delta = PartDelta(part_id="p1", kind="text", delta="lo")
    events = speaker.each(PartStarted(part_id="p1", kind="text"), delta)
    encoder = HIVE.feed.encoder(None)
    assert [] == encoder.feed(events[0], "e-40")
    (frame,) = encoder.feed(events[1], "e-41")
    assert (
        b'id: e-41\ndata: {"type":"client_output_delta","stream_id":"queen","node_id":"queen",'
        b'"execution_id":"r1","data":{"content":"lo","snapshot":"lo","inner_turn":0,"iteration":1},'
        b'"timestamp":"2026-11-21T19:30:00.120Z","correlation_id":null,"colony_id":null,'
        b'"run_id":"r1","seq":41}\n\n'
    ) == frame


def test_no_frame_has_a_name():
    """The page listens with `onmessage`, which hears nothing else."""
    speaker = Speaker()
    frames = frames_of([*speaker.each(*everything()), trigger(), Gap(from_id="a-1", to_id="a-2")])
    assert {"message"} == {frame.event for frame in frames}


def test_json_that_somebody_else_has_formatted_is_one_line_all_the_same():
    """A reader that takes the stream line by line sees one `data:` per event."""
    (event,) = Speaker().each(emitted("goal_progress", b'{\n  "progress": 0.5\r\n}'))
    (frame,) = HIVE.feed.encoder(None).feed(event, "e-1")
    assert 1 == frame.count(b"data: ")
    assert {"progress": 0.5} == json.loads(Decoder().feed(frame)[0].data)["data"]


@pytest.mark.parametrize("raw", [b'"\n"', b"{\n", b"[1,\r\n2"])
def test_what_is_no_json_spoils_no_stream(raw):
    """An agent may emit what it has not looked at; the frame is one line, and others are whole."""
    (event,) = Speaker().each(emitted("goal_progress", raw))
    (frame,) = HIVE.feed.encoder(None).feed(event, "e-1")
    assert (2, 1) == (frame.strip().count(b"\n") + 1, frame.count(b"data: "))


def test_a_history_of_what_is_no_json_is_short():
    """It cannot be taken apart; how large it was is told."""
    assert {"type": "custom", "_truncated": True, "_original_bytes": 70_000} == json.loads(
        _lightened(b"{" * 70_000)
    )


def test_silence_is_hives_own_comment():
    """Which is also what comes first, so that a proxy lets the stream through."""
    assert b": keepalive\n\n" == HIVE.framing.heartbeat == HIVE.framing.prelude
    assert b"retry: 700\n\n" == HIVE.framing.farewell(700)


# The envelope: "event construction", "to_dict with/without run_id"


def test_an_envelope_says_who_where_and_when():
    """UTC, not the server's local time; `seq` is the number in the feed, not the run's."""
    (event,) = heard(Speaker().each(*called()[:1]), ALL)
    del event["data"]
    assert {
        "type": "tool_call_started",
        "stream_id": "queen",
        "node_id": "queen",
        "execution_id": "r1",
        "timestamp": TS,
        "correlation_id": "t1",
        "colony_id": None,
        "run_id": "r1",
        "seq": 1,
    } == event


def test_what_is_of_no_run_has_no_run_id():
    """A trigger is the session's."""
    (event,) = heard([trigger()])
    assert "run_id" not in event
    assert (None, None, "queen") == (event["execution_id"], event["node_id"], event["stream_id"])


def test_a_worker_has_a_stream_of_its_own():
    """Its node is its place below the queen."""
    (event,) = heard(Speaker("w1", ("helper:1",)).each(emitted("task_created")))
    assert ("worker:w1", "helper:1", "w1", "w1") == (
        event["stream_id"], event["node_id"], event["execution_id"], event["run_id"],
    )  # fmt: skip


def test_ids_may_be_any_text():
    """A client may have named the run."""
    speaker = Speaker('a"b\\', ("x\ny:1",))
    (event,) = heard(speaker.each(emitted("task_created")))
    assert ('worker:a"b\\', "x\ny:1") == (event["stream_id"], event["node_id"])


def test_the_frames_of_one_event_are_told_apart_by_their_times():
    """The page knows a frame by `timestamp` and `seq` together, and drops what it has seen."""
    events = heard(Speaker().each(started(), finished("error", error=problem())))
    keys = [(event["timestamp"], event["seq"]) for event in events]
    assert len(keys) == len(set(keys)) == 5
    assert [1, 1, 2, 2, 2] == [event["seq"] for event in events]
    assert [TS, TS] == [event["timestamp"] for event in (events[1], events[4])]
    assert sorted(TS[:-1] + n for n in ("001Z", "001Z", "002Z")) == sorted(
        event["timestamp"] for event in events if event["timestamp"] != TS
    )


def test_each_frame_of_an_event_has_an_id():
    """The last one has the event's own: who comes back with it has seen all of them."""
    encoder = HIVE.feed.encoder(ALL)
    begun, end = Speaker().each(started(), finished())
    for n, event in enumerate((begun, end), 1):
        ids = [frame.partition(b"\n")[0] for frame in encoder.feed(event, f"e-{n}")]
        assert [f"id: e-{n}.1".encode(), f"id: e-{n}".encode()] == ids


def test_a_types_names_are_unique_strings():
    """Each of hive's names stands for one thing, and what we make of it is one of them."""
    names = [*DEFAULT, *GLOBAL]
    assert len(names) == len(set(names))
    assert all(name == name.lower() and name.isidentifier() for name in TYPES)
    assert 33 + 14 == len(DEFAULT)
    assert META | RESERVED <= TYPES
    made = {name for name, _ in told(*everything())} | {"trigger_fired"}
    assert made <= TYPES


# The vocabulary: "each convenience publisher's payload"


def everything() -> list[AnyEvent]:
    """A run in which all sorts of things happen."""
    return [
        started(),
        *turn(
            *said("Hm", ".", kind="reasoning", part_id="r1"),
            *said("Hel", "lo", part_id="p1"),
            finish_reason="tool_calls",
            usage=Usage(input_tokens=100, output_tokens=50, cache_read_tokens=30),
        ),
        StepStarted(step_id="s1", kind="tool_round", name="tools"),
        *called("t1"),
        ToolOutputDelta(call_id="t1", delta="..."),
        StepFinished(step_id="s1", kind="tool_round", name="tools"),
        AgentStarted(agent="helper", child_run_id="w1", input=Raw(b'"dig"')),
        AgentFinished(agent="helper", child_run_id="w1", report=Raw(b'"gold"')),
        asked(),
        answered(),
        MessageReceived(message_id="u1", text="and?", mode="steer"),
        Paused(reason="user"),
        Resumed(),
        ValuesChanged(values=Raw(b'{"k":1}')),
        Retry(attempt=1, max=5, delay_s=2.0, error=problem("429")),
        Failover(from_model="a:x", to_model="b:y", reason="down"),
        Liveness(elapsed_s=10.0, events=3, since_last_output_s=1.0),
        Stalled(idle_s=600.0, limit_s=600.0),
        LoopDetected(fingerprint="search:1f;", repeats=3),
        ContextUsage(ratio=0.41, tokens=52_000, limit=128_000),
        Compacted(ratio_before=0.82, ratio_after=0.41),
        Moderation(violation=True, message="no"),
        Moderation(violation=False),
        ProviderEvent(provider="p", raw=Raw(b'{"x":1}')),
        emitted("goal_progress", b'{"progress":0.5}'),
        emitted("tick", b'{"n":1}'),
        *turn(*said("Bye", part_id="p2"), step_id="m2", finish_reason="stop"),
        finished(result=Raw(b'{"answer":"y"}')),
    ]


def test_the_texts_of_the_queen_are_output_with_the_whole_so_far():
    """`content` is what is new, `snapshot` all of it; the last one has all of it in any case."""
    assert [
        {"content": "Hel", "snapshot": "Hel", "inner_turn": 0, "iteration": 1},
        {"content": "lo", "snapshot": "Hello", "inner_turn": 0, "iteration": 1},
        {"content": "", "snapshot": "Hello", "inner_turn": 0, "iteration": 1},
    ] == [data for _, data in told(*said("Hel", "lo"))]


def test_a_refusal_is_text():
    """The person is to read it."""
    assert ["client_output_delta"] * 2 == [name for name, _ in told(*said("No", kind="refusal"))]


def test_the_texts_of_a_worker_are_not_for_the_person():
    """They have another name."""
    assert [
        ("llm_text_delta", {"content": "Hel", "snapshot": "Hel", "inner_turn": 1}),
        ("llm_text_delta", {"content": "", "snapshot": "Hel", "inner_turn": 1}),
    ] == told(*said("Hel"), path=("helper:1",))


def test_each_text_is_a_piece_of_its_own():
    """Even where a model names them alike: what comes later never replaces what was said before."""
    page = Page()
    for frame in frames_of(Speaker().each(*said("one"), *said("two"), *said("three"))):
        page.read(frame)
    assert ["one", "two", "three"] == page.text


def test_what_a_call_is_made_of_is_no_text():
    """It is told when it is called."""
    assert [] == told(*said('{"q"', ":1}", kind="tool_call"))


def test_a_part_that_says_nothing_is_not_shown():
    """A model may hide what it thinks, and say so."""
    assert [] == told(*said(kind="reasoning"), *said())


def test_what_the_queen_thinks_is_shown_by_its_end_and_then_as_a_whole():
    """The page shows the end of a long thought while it goes on."""
    first, second, whole = told(*said("h" * 5_000, "m" * 4_000, kind="reasoning"))
    assert ("llm_reasoning_delta", "h" * 5_000, "h" * TAIL) == (
        first[0], first[1]["content"], first[1]["snapshot"],
    )  # fmt: skip
    assert "m" * TAIL == second[1]["snapshot"]
    reasoning = "h" * 5_000 + "m" * 4_000
    assert (
        "client_reasoning",
        {"reasoning": reasoning, "inner_turn": 0, "iteration": 1},
    ) == whole


def test_a_thought_is_complete_also_for_those_who_only_hear_deltas():
    """What was held back comes with its end."""
    only = Interest(frozenset({"llm_reasoning_delta"}))
    events = Speaker().each(*said("h" * 320, "m", kind="reasoning"))
    assert ["h" * 320, "m"] == [event["data"]["content"] for event in heard(events, only)]
    assert ["client_reasoning"] == types(events, Interest(frozenset({"client_reasoning"})))


def test_a_long_text_is_not_sent_again_for_every_word():
    """All snapshots together are at most so many times the text, and none is out of date for long.

    hive sends the whole with each token.
    """
    words = ["word " for _ in range(20_000)]
    sizes = [len(data["snapshot"]) for _, data in told(*said(*words))]
    whole = sum(map(len, words))
    assert whole == sizes[-1] == max(sizes)
    assert sum(sizes) <= (GROWTH + 8) * whole
    for before, after in itertools.pairwise(sizes):
        assert after - before <= (before // GROWTH if before <= LONG else before) + len("word ")


def test_contents_make_the_text_too():
    """For those who append: nothing is missing and nothing twice."""
    words = [f"{n} " for n in range(3_000)]
    contents = [data["content"] for _, data in told(*said(*words))]
    assert "".join(words) == "".join(contents)


def test_what_is_held_back_is_shown_at_the_next_sign_of_life():
    """A text that pauses in the middle does not hide its last words."""
    speaker = Speaker()
    begun = speaker.each(
        PartStarted(part_id="p", kind="text"),
        PartDelta(part_id="p", kind="text", delta="x" * 3_200),
        PartDelta(part_id="p", kind="text", delta="now wait"),
    )
    alive = Liveness(elapsed_s=10.0, events=3, since_last_output_s=9.0)
    assert ["x" * 3_200] == [e["data"]["content"] for e in heard(begun)]
    events = heard([*begun, *speaker.each(alive, alive)])
    assert ["x" * 3_200, "now wait"] == [event["data"]["content"] for event in events]


def test_a_sign_of_life_alone_says_nothing():
    """It is no progress."""
    assert [] == told(Liveness(elapsed_s=10.0, events=3, since_last_output_s=1.0))


def test_a_model_call_is_an_iteration():
    """The first begins the loop; each is known by where it began."""
    assert [
        ("node_loop_started", {"max_iterations": None}),
        ("node_loop_iteration", {"iteration": 2}),
        ("node_loop_iteration", {"iteration": 4}),
    ] == [
        (name, data)
        for name, data in told(started(), *turn(), *turn(step_id="m2"))
        if name.startswith("node_loop")
    ]


def test_a_turn_says_what_it_has_cost():
    """Cached tokens are among the input's."""
    usage = Usage(input_tokens=100, output_tokens=50, cache_read_tokens=30, cache_write_tokens=5)
    assert (
        "llm_turn_complete",
        {
            "stop_reason": "tool_calls",
            "model": "p:m",
            "input_tokens": 100,
            "output_tokens": 50,
            "cached_tokens": 30,
            "cache_creation_tokens": 5,
            "iteration": 1,
        },
    ) == told(*turn(usage=usage, finish_reason="tool_calls"))[-1]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({}, "stop"),
        ({"finish_reason": "length"}, "length"),
        ({"error": problem(code="overloaded")}, "error"),
        ({"error": problem(code="cancelled")}, "cancelled"),
    ],
)
def test_a_turn_says_why_it_ended(end, reason):
    """The page sends what it has queued unless the person has cancelled."""
    assert reason == told(*turn(**end))[-1][1]["stop_reason"]


def test_a_turn_whose_beginning_was_not_seen_has_no_number():
    """A wrong one would be worse."""
    assert "iteration" not in told(turn()[-1])[-1][1]


def test_steps_that_are_no_model_calls_are_none_of_hives():
    """Its page has nothing for them."""
    named = {"step_id": "s1", "name": "fetch"}
    for kind in ("flow", "node", "tool_round"):
        assert [] == told(StepStarted(kind=kind, **named), StepFinished(kind=kind, **named))


def test_a_tool_call_begins_and_ends():
    """With its arguments, its result as text, and its id."""
    assert [
        ("tool_call_started",
         {"tool_use_id": "t1", "tool_name": "search", "tool_input": {"q": "x"}}),
        ("tool_call_completed",
         {"tool_use_id": "t1", "tool_name": "search", "result": "ok", "is_error": False}),
    ] == told(*called())  # fmt: skip
    assert ["t1", "t1"] == [e["correlation_id"] for e in heard(Speaker().each(*called()))]


@pytest.mark.parametrize(
    ("result", "is_error", "shown"),
    [
        (b'"ok"', False, "ok"),
        (b' "ok" ', False, "ok"),
        (b'{"a":1}', False, '{"a":1}'),
        (b"null", False, "null"),
        (b'{"error":"no luck"}', True, "no luck"),
        (b'{"error":{"code":1}}', True, '{"error":{"code":1}}'),
        (b"[1]", True, "[1]"),
        (b"[" * 9_000 + b"]" * 9_000, True, "[" * 9_000 + "]" * 9_000),
    ],
    ids=["text", "spaced", "object", "null", "error", "odd error", "list", "deep"],
)
def test_a_result_is_text(result, is_error, shown):
    """Which is what the page parses again where it wants to."""
    assert shown == told(*called(result=result, is_error=is_error))[-1][1]["result"]


def test_arguments_that_are_no_object_are_kept_as_they_came():
    """Where a model has written something else."""
    call = ToolStarted(call_id="t", name="n", arguments=Raw(b'"{broken"'))
    assert {"_raw": "{broken"} == told(call)[0][1]["tool_input"]


@pytest.mark.parametrize(
    ("input", "shown"),
    [
        (b'{"query":"x"}', {"query": "x"}),
        (b'"hi"', {"input": "hi"}),
        (b"[1]", {"input": [1]}),
        (b" null", {}),
    ],
)
def test_an_execution_begins_with_its_input(input, shown):
    """Which is an object in hive, whatever it is here."""
    assert {"input": shown} == told(started(input))[-1][1]


@pytest.mark.parametrize(
    ("result", "shown"),
    [(Raw(b'{"answer":"y"}'), {"answer": "y"}), (Raw(b'"y"'), {"result": "y"}), (UNSET, {})],
)
def test_an_execution_ends_with_its_output(result, shown):
    """And the queen can be spoken to."""
    assert [
        ("loop_state_changed", stand("awaiting_user", "turn_done")),
        ("execution_completed", {"output": shown}),
    ] == told(finished(result=result))


def stand(activity: str, park: str | None = None, cause: str | None = None) -> dict[str, Any]:
    return {
        "activity": activity,
        "park_reason": park,
        "interrupt_cause": cause,
        "questions": None,
    }


def test_an_error_is_what_the_queen_says_last():
    """Where she speaks, the page shows no other event; then it knows that it can go on."""
    assert [
        ("client_output_delta",
         {"content": "boom", "snapshot": "boom", "inner_turn": 0, "iteration": 1}),
        ("loop_state_changed", stand("interrupted", None, "rate_limit")),
        ("execution_failed", {"error": "boom"}),
    ] == told(finished("error", error=problem(code="rate_limit")))  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "cause", "error", "shown"),
    [
        ("cancelled", "client_cancel", "cancelled", "user_stopped"),
        ("cancelled", "deadline", "cancelled: deadline", "deadline"),
        ("interrupted", "input_timeout", "interrupted: input_timeout", "input_timeout"),
        ("error", None, "error", "error"),
    ],
)
def test_what_was_stopped_has_failed_and_says_why(outcome, cause, error, shown):
    """There is no third end."""
    notices = dict(told(finished(outcome, cause)))
    assert {"error": error} == notices["execution_failed"]
    assert shown == notices["loop_state_changed"]["interrupt_cause"]
    assert ("client_output_delta" in notices) == (outcome == "error")


def test_a_worker_ends_in_its_own_shape():
    """With what it was to do, and what there is of a result."""
    worker = {"worker_id": "r1", "colony_id": None, "task": "dig"}
    found = Raw(b'{"answer":{"a":1},"n":2}')
    assert [
        ("execution_started", {"input": {"input": "dig"}}),
        ("execution_completed",
         {**worker, "success": True, "error": None, "output_keys": ["answer", "n"]}),
    ] == told(started(b'"dig"'), finished(result=found), path=("h:1",))  # fmt: skip
    assert [
        (
            "execution_failed",
            {**worker, "task": '{"a":1}', "success": False, "error": "boom", "output_keys": []},
        ),
    ] == told(started(b'{"a":1}'), finished("error", error=problem()), path=("h:1",))[1:]
    assert [] == told(finished(result=Raw(b"[1]")), path=("h:1",))[0][1]["output_keys"]


def test_a_report_is_in_the_workers_stream_though_its_parent_makes_it():
    """One for each worker: what it was to do, how it went, what it has cost."""
    events = Speaker().each(
        AgentStarted(agent="helper", child_run_id="w1", input=Raw(b'"dig"')),
        AgentFinished(
            agent="helper",
            child_run_id="w1",
            report=Raw(b'{"summary":"gold"}'),
            usage=Usage(input_tokens=600, output_tokens=300),
            seconds=3.2,
        ),
    )
    (event,) = heard(events, None)
    assert ("worker:w1", "helper", "w1") == (
        event["stream_id"], event["node_id"], event["execution_id"],
    )  # fmt: skip
    assert {
        "worker_id": "w1",
        "colony_id": None,
        "task": "dig",
        "status": "success",
        "summary": '{"summary":"gold"}',
        "data": {"summary": "gold"},
        "error": None,
        "duration_seconds": 3.2,
        "tokens_used": 900,
    } == event["data"]


@pytest.mark.parametrize(("code", "status"), [("agent_error", "failed"), ("cancelled", "stopped")])
def test_a_worker_that_failed_is_reported_too(code, status):
    """With what went wrong; nobody knows its task who has not seen it begin."""
    error = problem("no luck", code)
    ((_, data),) = told(AgentFinished(agent="helper", child_run_id="w1", error=error))
    assert {
        "worker_id": "w1",
        "colony_id": None,
        "task": None,
        "status": status,
        "summary": "no luck",
        "data": {},
        "error": "no luck",
        "duration_seconds": None,
        "tokens_used": 0,
    } == data


def test_an_agent_within_a_run_is_no_worker():
    """It has no run of its own."""
    assert [] == told(AgentStarted(agent="a"), AgentFinished(agent="a", report=Raw(b"1")))


def test_a_question_has_its_prompt_and_what_can_be_answered():
    """In the form of April 2026 and in the later one."""
    options = (Option(id="dev", label="Development"), Option(id="prod"))
    choice = Question(id="q", kind="choice", prompt="Which env?", options=options)
    names = ["Development", "prod"]
    assert [
        (
            "client_input_requested",
            {
                "prompt": "Which env?",
                "questions": [{"id": "q", "prompt": "Which env?", "options": names}],
                "options": names,
                "park_reason": "ask_user",
            },
        )
    ] == told(asked(choice))


def test_several_questions_come_together():
    """Yes and no are options too."""
    both = asked(
        Question(id="a", kind="confirm", prompt="Sure?"),
        Question(id="b", kind="text", prompt="Why?"),
    )
    ((_, data),) = told(both)
    assert {
        "prompt": "Sure?\nWhy?",
        "questions": [
            {"id": "a", "prompt": "Sure?", "options": ["Yes", "No"]},
            {"id": "b", "prompt": "Why?"},
        ],
        "park_reason": "ask_user",
    } == data


@pytest.mark.parametrize(
    ("answers", "content"),
    [
        (b'{"a":"prod"}', "prod"),
        (b'{"a":true,"b":false}', "Yes\nNo"),
        (b'{"a":["x","y"]}', "x, y"),
        (b'{"a":7,"b":null}', "7\n"),
        (b"1", ""),
    ],
)
def test_an_answer_is_what_the_person_has_said(answers, content):
    """Whatever kind of question it was."""
    assert [
        ("client_input_received", {"content": content, "image_count": 0}),
    ] == told(answered(answers))


def test_a_question_and_its_answer_belong_together():
    """By the request's id."""
    events = heard(Speaker().each(asked(request_id="q7"), answered(request_id="q7")))
    assert ["q7", "q7"] == [event["correlation_id"] for event in events]


def test_a_message_is_shown_as_it_was_meant_to_be():
    """Which may differ from what the agent was told."""
    message = MessageReceived(message_id="u1", text="shown", mode="steer")
    (event,) = heard(Speaker().each(message))
    assert ("u1", {"content": "shown", "image_count": 0}) == (
        event["correlation_id"],
        event["data"],
    )


def test_a_question_that_is_withdrawn_lets_the_queen_go_on():
    """Nobody needs to answer any more; of a worker the page has shown none."""
    assert [("loop_state_changed", stand("executing"))] == told(InputWithdrawn(request_id="q1"))
    assert [] == told(InputWithdrawn(request_id="q1"), path=("h:1",))


def test_an_execution_rests_and_goes_on():
    """Of a worker only that: she who is interrupted is the queen."""
    assert [
        ("loop_state_changed", stand("interrupted", None, "paused")),
        ("execution_paused", {"reason": "user"}),
        ("loop_state_changed", stand("executing")),
        ("execution_resumed", {}),
    ] == told(Paused(reason="user"), Resumed())
    assert [("execution_paused", {"reason": ""}), ("execution_resumed", {})] == told(
        Paused(), Resumed(), path=("h:1",)
    )


def test_each_value_that_changes_is_told_with_what_it_was():
    """As far as it was seen."""
    assert [
        ("state_changed", {"key": "a", "old_value": None, "new_value": 1, "scope": "shared"}),
        ("state_changed", {"key": "b", "old_value": None, "new_value": [2], "scope": "shared"}),
        ("state_changed", {"key": "b", "old_value": [2], "new_value": None, "scope": "shared"}),
    ] == told(
        ValuesChanged(values=Raw(b'{"a":1,"b":[2]}')), ValuesChanged(values=Raw(b'{"b":null}'))
    )


def test_values_of_a_run_that_is_over_are_forgotten():
    """Another run begins anew."""
    speaker = Speaker()
    change = ValuesChanged(values=Raw(b'{"a":1}'))
    events = speaker.each(started(), change, finished(), started(), change)
    changes = [e["data"] for e in heard(events) if e["type"] == "state_changed"]
    assert [None, None] == [data["old_value"] for data in changes]


@pytest.mark.parametrize(
    ("event", "name", "data"),
    [
        (Retry(attempt=1, max=5, delay_s=2.0, error=problem("429")), "node_retry",
         {"retry_count": 1, "max_retries": 5, "error": "429"}),
        (Stalled(idle_s=600.0, limit_s=600.0), "node_stalled",
         {"reason": "nothing has come for 600 s"}),
        (LoopDetected(fingerprint="search:1f;", repeats=3), "node_tool_doom_loop",
         {"description": "the same calls came 3 times: search:1f;"}),
        (Compacted(ratio_before=0.82, ratio_after=0.41), "context_compacted",
         {"level": "llm", "usage_before": 82, "usage_after": 41}),
        (ContextUsage(ratio=0.41, tokens=52_000, limit=128_000), "context_usage_updated",
         {"usage_ratio": 0.41, "usage_pct": 41, "estimated_tokens": 52_000,
          "max_context_tokens": 128_000, "trigger": "model_call"}),
        (Moderation(violation=True, message="no"), "constraint_violation",
         {"constraint_id": "moderation", "description": "no"}),
        (Moderation(violation=True), "constraint_violation",
         {"constraint_id": "moderation", "description": ""}),
        (Moderation(violation=False, message="fine"), "custom",
         {"name": "moderation", "value": {"violation": False, "message": "fine"}}),
        (Failover(from_model="a:x", to_model="b:y", reason="down"), "custom",
         {"name": "failover", "value": {"from": "a:x", "to": "b:y", "reason": "down"}}),
        (ProviderEvent(provider="p", raw=Raw(b'{"x":1}')), "custom",
         {"name": "provider_event", "value": {"provider": "p", "raw": {"x": 1}}}),
        (ToolOutputDelta(call_id="t1", delta="..."), "custom",
         {"name": "tool_output", "value": {"tool_use_id": "t1", "delta": "..."}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_only_observed_has_hives_names(event, name, data):
    """And none where hive has none."""
    assert [(name, data)] == told(event)


@pytest.mark.parametrize("name", sorted(TYPES - RESERVED))
def test_an_agent_may_emit_hives_own_types(name):
    """Goals, plans, tasks, credentials: the server makes none of them."""
    assert [(name, {"x": 1})] == told(emitted(name, b'{"x":1}'))


@pytest.mark.parametrize("name", [*sorted(RESERVED), "tick", "gap"])
def test_any_other_custom_event_has_its_name_inside(name):
    """So that no agent can say that an execution is over."""
    assert [("custom", {"name": name, "value": {"x": 1}})] == told(emitted(name, b'{"x":1}'))


def test_data_is_an_object_whatever_was_emitted():
    """As everywhere in hive."""
    assert [("goal_progress", {"value": 7})] == told(emitted("goal_progress", b"7"))


def test_what_is_of_no_session_says_so():
    """A page that is open anywhere may want to know."""
    (event,) = heard(Speaker().each(emitted("crm_changed", b'{"entities":[]}')))
    assert ("global", None) == (event["stream_id"], event["execution_id"])


@pytest.mark.parametrize(
    ("change", "more", "data"),
    [
        ("available", {}, {"trigger_type": "timer", "trigger_config": {"interval_minutes": 1.5}}),
        ("activated", {}, {"trigger_type": "timer", "trigger_config": {"interval_minutes": 1.5}}),
        ("removed", {}, {"trigger_type": "timer", "trigger_config": {"interval_minutes": 1.5}}),
        ("deactivated", {}, {}),
        ("updated", {}, {"trigger_type": "timer", "trigger_config": {"interval_minutes": 1.5},
                         "task": "Look!", "entry_node": None}),
        ("fired", {"fired": 3, "last_at": TS, "next_at": "2026-11-21T19:31:30Z"},
         {"trigger_type": "timer", "trigger_config": {"interval_minutes": 1.5}, "task": "Look!",
          "fire_count": 3, "last_fired_at": 1_795_289_400_120, "next_fire_at": 1_795_289_490_000,
          "next_fire_in": 89.88}),
        ("fired", {"fired": 1, "error": problem("full")},
         {"trigger_type": "timer", "trigger_config": {"interval_minutes": 1.5}, "task": "Look!",
          "fire_count": 1, "error": "full"}),
    ],
)  # fmt: skip
def test_a_trigger_comes_changes_fires_and_goes(change, more, data):
    """Its name and id are always there."""
    (event,) = heard([trigger(change, **more)])
    assert f"trigger_{change}" == event["type"]
    shown = event["data"]
    if "next_fire_in" in shown:
        shown["next_fire_in"] = round(shown["next_fire_in"], 2)
    assert {"trigger_id": "t", "name": "Daily", **data} == shown


def test_a_gap_is_told_whatever_is_asked_for():
    """Where hive drops events in silence, a hole is seen, and has no id to come back to."""
    gap = Gap(from_id="e-1", to_id="e-7", ts=TS)
    (frame,) = HIVE.feed.encoder(Interest(frozenset({"goal_progress"}))).feed(gap, "")
    (message,) = Decoder().feed(frame)
    event = json.loads(message.data)
    assert ("", "gap", {"from": "e-1", "to": "e-7"}, 0) == (
        message.id, event["type"], event["data"], event["seq"],
    )  # fmt: skip


def test_a_run_in_full():
    """Its events in their order, as a page gets them that asks for nothing special."""
    assert [
        "loop_state_changed", "execution_started", "node_loop_started", "node_loop_iteration",
        "llm_reasoning_delta", "llm_reasoning_delta", "client_reasoning", "client_output_delta",
        "client_output_delta", "client_output_delta", "llm_turn_complete", "tool_call_started",
        "tool_call_completed", "subagent_report", "client_input_requested",
        "client_input_received", "client_input_received", "loop_state_changed", "execution_paused",
        "loop_state_changed", "node_retry", "node_stalled", "node_tool_doom_loop",
        "context_usage_updated", "context_compacted", "goal_progress", "node_loop_iteration",
        "client_output_delta", "client_output_delta", "llm_turn_complete", "loop_state_changed",
        "execution_completed",
    ] == types(Speaker().each(*everything()), None)  # fmt: skip


# Filters: "worker filter", "watch gating", "non-matching type not delivered"


def test_the_queen_is_always_heard():
    """Whatever is watched."""
    events = Speaker().each(*said("hi"), *called(), *turn())
    assert types(events, Interest()) == types(events, Interest(watch=frozenset({"worker:w9"})))
    assert 6 == len(types(events, Interest()))


def test_a_workers_text_tools_and_iterations_are_not_heard():
    """By default there is nothing of what it says and does."""
    events = Speaker("w1", ("h:1",)).each(
        *said("hi"), *said("hm", kind="reasoning"), *called(), asked(), answered(), Paused(),
        MessageReceived(message_id="u", text="x", mode="steer"), emitted("goal_progress"),
        turn()[0], turn()[1],
    )  # fmt: skip
    assert [] == types(events, None)


def test_a_workers_beginning_and_end_are_heard_by_all():
    """`execution_*` and `subagent_report`, whichever stream they are in."""
    queen, worker = Speaker(), Speaker("w1", ("h:1",))
    nested = Speaker("w2", ("h:1", "i:1"))
    events = [
        *worker.each(started(), *turn()),
        *nested.each(started(), finished("error", error=problem())),
        *worker.each(AgentFinished(agent="i", child_run_id="w2"), finished()),
        *queen.each(AgentFinished(agent="h", child_run_id="w1")),
    ]
    assert [
        ("execution_started", "worker:w1"),
        ("node_loop_started", "worker:w1"),
        ("execution_started", "worker:w2"),
        ("execution_failed", "worker:w2"),
        ("subagent_report", "worker:w2"),
        ("execution_completed", "worker:w1"),
        ("subagent_report", "worker:w1"),
    ] == [(event["type"], event["stream_id"]) for event in heard(events, None)]


def test_the_list_of_what_is_heard_of_every_worker():
    """Three kinds: it began, how far it is, it ended; and what a person has to pay for."""
    assert {
        "execution_started", "node_loop_started", "task_created", "task_updated", "task_deleted",
        "subagent_report", "execution_completed", "execution_failed", "worker_completed",
        "worker_failed", "payment_required",
    } == META  # fmt: skip


def test_a_worker_can_be_drawn_from_its_meta_events_alone():
    """When it began, what it was to do, how far it is, how it ended and what came of it."""
    worker, queen = Speaker("w1", ("h:1",)), Speaker()
    events = [
        *worker.each(started(b'"dig"'), emitted("task_updated", b'{"task_id":1}'), *said("noise")),
        *worker.each(finished(result=Raw(b'"gold"'))),
        *queen.each(AgentFinished(agent="h", child_run_id="w1", report=Raw(b'"gold"'))),
    ]
    begun, task, end, report = heard(events, None)
    assert {"input": {"input": "dig"}} == begun["data"]
    assert {"task_id": 1} == task["data"]
    assert ("dig", True) == (end["data"]["task"], end["data"]["success"])
    assert ("success", "gold") == (report["data"]["status"], report["data"]["summary"])


def test_what_has_to_be_paid_for_is_never_a_workers_own_business():
    """Else nobody would see why nothing goes on."""
    assert ["payment_required"] == types(
        Speaker("w1", ("h:1",)).each(emitted("payment_required")), None
    )


@pytest.mark.parametrize(
    ("watch", "expected"),
    [
        ("", []),
        ("worker:w1", ["one"]),
        ("worker:w1,worker:w2", ["one", "two"]),
        ("*", ["one", "two"]),
    ],
)
def test_a_worker_is_heard_in_full_by_those_who_watch_it(watch, expected):
    """None by default, only those that are listed, or all."""
    one, two = Speaker("w1", ("h:1",)), Speaker("w2", ("h:2",))
    order = decode("GET", "/events", session_id="s1", query={"watch": watch})
    page = Page()
    for frame in frames_of([*one.each(*said("one")), *two.each(*said("two"))], order.options):
        page.read(frame)
    assert expected == page.text


def test_types_choose_what_is_heard():
    """And nothing else is: of an event that has several, only those."""
    events = Speaker().each(*everything())
    for name in sorted({*types(events), "trigger_fired"}):
        chosen = Interest(frozenset({name}), frozenset("*"))
        assert {name} >= set(types([*events, trigger("fired")], chosen))
    frames = frames_of(events[:1], Interest(frozenset({"loop_state_changed"})))
    assert ["e-1"] == [frame.id for frame in frames]  # the last that is left has the id


def test_filters_by_stream_and_type_go_together():
    """All must match."""
    one, two = Speaker("w1", ("h:1",)), Speaker("w2", ("h:2",))
    events = [*one.each(*said("a"), *called()), *two.each(*said("b"), *called())]
    chosen = Interest(frozenset({"tool_call_started"}), frozenset({"worker:w2"}))
    assert [("tool_call_started", "w2")] == [
        (event["type"], event["execution_id"]) for event in heard(events, chosen)
    ]


def test_runs_side_by_side_are_told_apart_by_their_nodes():
    """However their events alternate."""
    one, two = Speaker("w1", ("h:1",)), Speaker("w2", ("h:2",))
    pairs = zip(one.each(*said("a", "b", "c")), two.each(*said("x", "y", "z")), strict=True)
    page = Page()
    for frame in frames_of([event for pair in pairs for event in pair]):
        page.read(frame)
    assert {("w1", 1, "h:1"): "abc", ("w2", 1, "h:2"): "xyz"} == page.texts


# The feed: "EventBus", as far as it is a behaviour


def make_feed(**bounds: Any) -> Feed:
    return Feed(Stamps(), epoch="e", **bounds)


def attach(feed: Feed, after: str | None = None, options: Interest | None = None) -> FeedReader:
    """Come to a session, as the server does it."""
    form = HIVE.feed
    return feed.attach(
        ("hive", options),
        lambda: form.encoder(options),
        after,
        replay=lambda events: frozenset(form.replay(events, options)),
    )


def take_all(reader: FeedReader) -> bytes:
    data = reader.take()
    while reader.is_behind:
        data += reader.take()
    return data


def test_a_reader_hears_what_happens_from_its_beginning_to_its_end():
    """Until it leaves: then there is nothing left of it."""
    feed, speaker = make_feed(), Speaker()
    reader = attach(feed)
    feed.extend(speaker.each(started()), 100)
    assert [("execution_started", "r1")] == Page.of(take_all(reader)).executions
    feed.detach(reader)
    assert not feed.is_read
    feed.extend(speaker.each(finished()), 100)
    assert reader not in feed._waiting


def test_many_readers_hear_the_same():
    """Each with its own filter, and the frames are made once for those with the same."""
    feed, events = make_feed(), Speaker().each(*everything())
    readers = [
        attach(feed),
        attach(feed),
        attach(feed, None, Interest(frozenset({"goal_progress"}))),
    ]
    feed.extend(events, 100)
    one, two, three = (Page.of(take_all(reader)) for reader in readers)
    assert one == two
    assert ["goal_progress"] == three.others
    assert readers[0].rendering is readers[1].rendering is not readers[2].rendering


def test_a_reader_that_fails_or_stands_still_is_nobody_elses_affair():
    """Whoever publishes waits for nobody: what is not taken is there later."""
    feed = make_feed()
    slow, quick = attach(feed), attach(feed)
    for _ in range(10):
        feed.extend(Speaker().each(*everything()), 100)
        assert take_all(quick)
    assert 20 == len(Page.of(take_all(slow)).turns)


def test_history_is_bounded_and_a_hole_is_told():
    """The newest are held; who has missed some is told between which."""
    feed = make_feed(max_events=10)
    reader = attach(feed)
    feed.extend(Speaker().each(*(emitted("goal_progress") for _ in range(25))), 100)
    page = Page.of(take_all(reader))
    assert (1, 10) == (page.gaps, len(page.others))
    assert 10 == len(feed.events)


# Who comes later, and who comes back


def test_a_late_page_sees_the_conversation_once():
    """As one that was there from the beginning; the question that was answered does not pop up."""
    feed, early = make_feed(), Page()
    first = attach(feed)
    feed.extend(Speaker().each(*everything()), 100)
    early = Page.of(take_all(first))
    late = Page.of(take_all(attach(feed)))
    assert early.conversation == late.conversation
    assert (["Which?"], []) == (early.requests, late.requests)


def test_a_page_that_comes_back_sees_each_thing_once():
    """Wherever the connection was cut; it sends the last id that it has seen."""
    feed = make_feed()
    queen, worker = Speaker(), Speaker("w1", ("h:1",))
    first = attach(feed, None, ALL)
    begin, end = queen.each(*everything()), worker.each(started(), *said("a", "b"), finished())
    for events in (begin[:10], end[:4], begin[10:], end[4:]):
        feed.extend(events, 100)
    feed.append(trigger("fired", fired=1))
    whole = take_all(first)
    expected = Page.of(whole)
    assert ["Hello", "ab", "Bye"] == expected.text
    ends = [found.end() + n for found in re.finditer(b"\n\n", whole) for n in (-1, 0, 1)]
    for cut in [*range(0, len(whole), 7), *ends]:
        page, decoder = Page(), Decoder()
        for frame in decoder.feed(whole[:cut]):
            page.read(frame)
        if decoder.last_id:
            again = attach(feed, decoder.last_id, ALL)
            for frame in Decoder().feed(take_all(again)):
                page.read(frame)
            assert expected == page, whole[cut - 80 : cut]
            feed.detach(again)


def test_a_late_page_that_comes_back_sees_each_thing_once():
    """It was told of what had been, and is cut off in the middle of that."""
    feed = make_feed()
    feed.extend(Speaker().each(*everything()), 100)
    whole = take_all(attach(feed))
    for cut in [found.end() for found in re.finditer(b"\n\n", whole)]:
        page, decoder = Page(), Decoder()
        for frame in decoder.feed(whole[:cut]):
            page.read(frame)
        for frame in Decoder().feed(take_all(attach(feed, decoder.last_id or None))):
            page.read(frame)
        assert Page.of(whole).conversation == page.conversation


def test_a_page_that_comes_back_finds_its_texts_by_the_same_names():
    """Also when the feed has forgotten how the execution began: a name needs no memory."""
    feed, speaker = make_feed(max_events=12), Speaker()
    first = attach(feed)
    feed.extend(speaker.each(started(), *turn(*said("one", part_id="a"))), 100)
    page, decoder = Page(), Decoder()
    for frame in decoder.feed(take_all(first)):
        page.read(frame)
    feed.detach(first)
    feed.extend(speaker.each(*turn(*said("two", part_id="b"), step_id="m2")), 100)
    feed.extend(speaker.each(*turn(*said("three", part_id="c"), step_id="m3")), 100)
    assert feed.first > 1
    for frame in Decoder().feed(take_all(attach(feed, decoder.last_id))):
        page.read(frame)
    assert (["one", "two", "three"], 0) == (page.text, page.gaps)


def test_a_text_whose_beginning_is_forgotten_is_shown_when_it_is_complete():
    """A text without its beginning is none."""
    feed = make_feed(max_events=3)
    feed.extend(Speaker().each(*said("a", "b", "c", "d")), 100)
    reader = attach(feed)
    assert ["abcd"] == Page.of(take_all(reader)).text


def test_a_page_from_before_a_restart_is_told_of_the_hole():
    """Its id is of another life of the session."""
    feed = make_feed()
    feed.extend(Speaker().each(started()), 100)
    page = Page.of(take_all(attach(feed, "other-7")))
    assert (1, [("execution_started", "r1")]) == (page.gaps, page.executions)


def test_a_question_or_a_pause_that_lasts_is_replayed():
    """Whoever comes then is to see it; once it is over it is no news."""
    assert [asked(), Paused()] == wanted(asked(), Paused())
    assert [] == wanted(Paused(), Resumed())
    assert [finished()] == wanted(Paused(), finished())


def wanted(*events: AnyEvent) -> list[AnyEvent]:
    """What of these is replayed."""
    numbered = [replace(event, run_id="r1") if not event.run_id else event for event in events]
    return [events[place] for place in replay(numbered, None)]


def test_only_what_makes_the_conversation_is_replayed():
    """Not how it came about; triggers come with the greeting."""
    shown = [
        started(), *called(), MessageReceived(message_id="u", text="x", mode="steer"),
        turn()[1], AgentFinished(agent="a", child_run_id="w"), trigger("fired", fired=1),
        emitted("task_created"), emitted("session_forked"), finished(),
    ]  # fmt: skip
    hidden = [
        AgentStarted(agent="a"), Paused(), Resumed(), ValuesChanged(values=Raw(b"{}")),
        Stalled(idle_s=1.0, limit_s=1.0), emitted("goal_progress"), emitted("tick"), turn()[0],
        trigger(), trigger("activated"), trigger("deactivated"), trigger("updated"),
        trigger("removed"), InputWithdrawn(request_id="q9"), PartStarted(part_id="p", kind="text"),
        Liveness(elapsed_s=1.0, events=1, since_last_output_s=1.0), Gap(from_id="a", to_id="b"),
    ]  # fmt: skip
    assert shown == wanted(*hidden, *shown)


def test_a_text_that_is_complete_is_replayed_once():
    """Not with each of its words; one that goes on with all, for the last has the whole."""
    done, going = said("a", "b"), said("c", "d", part_id="p2")[:-1]
    alive = Liveness(elapsed_s=1.0, events=1, since_last_output_s=1.0)
    assert [done[-1], *going[1:], alive] == wanted(*done, *going, alive)


def test_a_text_that_was_cut_off_is_not_replayed_in_pieces():
    """Its run is over, and whatever was open had its end before."""
    end = finished()
    assert [end] == wanted(*said("a", "b")[:-1], end)


def test_every_trigger_comes_with_the_greeting():
    """Active or not, one frame for each and no id: the feed may have forgotten them."""
    triggers = (trigger("available", "a"), trigger("activated", "b"))
    frames = Decoder().feed(greet(thread(triggers=triggers), None))
    events = [json.loads(frame.data) for frame in frames]
    assert ["session_snapshot", "trigger_available", "trigger_activated"] == [
        event["type"] for event in events
    ]
    assert [{"trigger_id": "a"}, {"trigger_id": "b"}] == [
        {"trigger_id": event["data"]["trigger_id"]} for event in events[1:]
    ]
    assert {("", 0)} == {
        (frame.id, event["seq"]) for frame, event in zip(frames, events, strict=True)
    }


def test_a_session_without_triggers_is_greeted_with_its_state_alone():
    """And one whose reader wants none, too; the state is always told."""
    assert ["session_snapshot"] == greeted(thread())
    chosen = Interest(frozenset({"goal_progress"}))
    assert ["session_snapshot"] == greeted(thread(triggers=(trigger(),)), chosen)
    assert b"" == greet(None, None)


def greeted(shown: ThreadSnapshot, options: Interest | None = None) -> list[str]:
    frames = Decoder().feed(greet(shown, options))
    return [json.loads(frame.data)["type"] for frame in frames]


def test_an_answer_resolves_all_that_was_asked_before_it():
    """A question that is asked after it stays open, and so does a worker's."""
    one, two, three = (asked(request_id=f"q{n}") for n in (1, 2, 3))
    other = replace(asked(request_id="q1"), run_id="w1")
    answer = answered(request_id="q2")
    assert [other, answer, three] == wanted(other, one, two, answer, three)


@pytest.mark.parametrize("end", [InputWithdrawn(request_id="q1"), finished()])
def test_a_question_that_nobody_needs_to_answer_is_not_asked_again(end):
    """It was withdrawn, or its execution is over."""
    assert asked() not in wanted(asked(), end)
    assert [asked()] == wanted(asked())


# The state of a session: "snapshot activity"


def run_of(**more: Any) -> RunSnapshot:
    shown = {
        "id": "r1",
        "agent": "queen",
        "state": "finished",
        "on_disconnect": "continue",
        "created": TS,
        "started": TS,
        "finished": None,
        "thread_id": "s1",
        "parent_run_id": None,
        "outcome": None,
        "result": NULL,
        "error": None,
        "usage": Usage(),
        "receipt": None,
        "events": 3,
        "questions": (),
    }
    return RunSnapshot(**{**shown, **more})


def thread(**more: Any) -> ThreadSnapshot:
    shown = {
        "id": "s1",
        "agent": "queen",
        "created": TS,
        "state": "idle",
        "run": None,
        "runs": (),
        "workers": (),
        "tools": (),
        "triggers": (),
        "last_event_id": None,
        "last_event_at": None,
        "is_open": True,
        "metadata": NULL,
    }
    return ThreadSnapshot(**{**shown, **more})


def test_a_session_in_which_nothing_has_happened():
    """Exactly hive's fields, and it knows of nothing."""
    assert {
        "snapshot_seq": 0,
        "activity": None,
        "is_executing": False,
        "awaiting_input": False,
        "interrupted": False,
        "interrupt_cause": None,
        "current_execution_id": None,
        "current_tool_calls": [],
        "queen_busy_reason": None,
        "park_reason": None,
        "pending_questions": None,
        "last_event_seq": None,
        "last_event_at": None,
        "last_queen_event_at": None,
    } == session_snapshot(thread())


@pytest.mark.parametrize(
    ("state", "run", "activity", "busy", "park", "cause"),
    [
        ("idle", run_of(outcome="success"), "awaiting_user", "awaiting_input", "turn_done", None),
        ("idle", run_of(outcome="error", error=problem(code="quota")), "interrupted",
         "interrupted", None, "quota"),
        ("idle", run_of(outcome="cancelled", receipt=Receipt(cause="client_cancel")),
         "interrupted", "interrupted", None, "user_stopped"),
        ("idle", run_of(outcome="interrupted", receipt=Receipt(cause="input_timeout")),
         "interrupted", "interrupted", None, "input_timeout"),
        ("running", run_of(), "executing", "llm", None, None),
        ("queued", run_of(), "executing", "llm", None, None),
        ("cancelling", run_of(), "executing", "llm", None, None),
        ("waiting", run_of(questions=(asked(),)), "awaiting_user", "awaiting_input", "ask_user",
         None),
        ("paused", run_of(), "interrupted", "interrupted", None, "paused"),
    ],
)  # fmt: skip
def test_where_the_queen_stands(*, state, run, activity, busy, park, cause):
    """One of three, or none: the engine says so, it is not guessed from what was seen."""
    shown = session_snapshot(thread(state=state, run=run))
    assert (activity, busy, park, cause) == (
        shown["activity"], shown["queen_busy_reason"], shown["park_reason"],
        shown["interrupt_cause"],
    )  # fmt: skip
    flags = ("is_executing", "awaiting_input", "interrupted")
    assert 1 == sum(shown[flag] for flag in flags)
    assert (None if state == "idle" else "r1") == shown["current_execution_id"]


def test_the_snapshot_and_the_stream_say_the_same():
    """Whoever was there and whoever comes now see the queen stand in the same place."""
    for end in (
        finished(),
        finished("error", error=problem()),
        finished("cancelled", "client_cancel"),
        finished("interrupted", "input_timeout"),
    ):
        said_live = dict(told(end))["loop_state_changed"]
        run = run_of(outcome=end.outcome, error=end.error, receipt=end.receipt)
        shown = session_snapshot(thread(run=run))
        for name in ("activity", "park_reason", "interrupt_cause"):
            assert said_live[name] == shown[name]


def test_tools_that_are_under_way_are_named():
    """As long as the queen is; a question or a pause is not what a tool does."""
    (call,) = Speaker().each(called()[0])
    shown = session_snapshot(thread(state="running", run=run_of(), tools=(call,)), [(41, call)])
    assert [
        {"id": "t1", "name": "search", "started_at": TS, "execution_id": "r1", "seq": 41}
    ] == shown["current_tool_calls"]
    assert "tool" == shown["queen_busy_reason"]
    resting = session_snapshot(thread(state="paused", run=run_of(), tools=(call,)))
    assert [] == resting["current_tool_calls"]


def test_questions_that_are_open_are_in_the_snapshot():
    """With the place of the last one, where it is known."""
    (request,) = Speaker().each(asked())
    shown = thread(
        state="waiting", run=run_of(questions=(request,)), last_event_id="e-9", last_event_at=TS
    )
    snapshot = session_snapshot(shown, [(8, request)])
    assert [{"id": "answer", "prompt": "Which?"}] == snapshot["pending_questions"]
    assert (9, 8, TS, TS) == tuple(
        snapshot[name]
        for name in ("snapshot_seq", "last_event_seq", "last_event_at", "last_queen_event_at")
    )
    assert None is session_snapshot(shown)["last_event_seq"]


def test_what_workers_do_is_not_what_the_queen_does():
    """She may rest while they work."""
    busy = run_of(id="w1", state="running")
    (call,) = Speaker("w1", ("h:1",)).each(called()[0])
    shown = session_snapshot(thread(run=run_of(outcome="success"), workers=(busy,)), [(3, call)])
    assert ("awaiting_user", None) == (shown["activity"], shown["last_queen_event_at"])


def test_the_greeting_stands_before_what_comes():
    """`snapshot_seq` and its time are those of the last event: what is later is news."""
    shown = thread(last_event_id="e-9", last_event_at="2026-11-21T20:00:00.000Z")
    (frame,) = Decoder().feed(greet(shown, None))
    event = json.loads(frame.data)
    assert (9, "2026-11-21T20:00:00.000Z", "queen") == (
        event["data"]["snapshot_seq"], event["timestamp"], event["stream_id"],
    )  # fmt: skip


# A run by itself: a worker's own stream


def test_a_worker_alone_is_heard_in_full():
    """In the same frames; each has an id, also where an event has several."""
    encoder = HIVE.encoder(Interest(watch=frozenset("*")))
    events = Speaker("w1", ("h:1",)).each(started(), *turn(*said("hi")), finished())
    frames = Decoder().feed(b"".join(frame for event in events for frame in encoder.feed(event)))
    shown = [(frame.id, json.loads(frame.data)["type"]) for frame in frames]
    assert [
        ("1", "execution_started"),
        ("2.1", "node_loop_started"),
        ("2", "node_loop_iteration"),
        ("4", "llm_text_delta"),
        ("5", "llm_text_delta"),
        ("6", "llm_turn_complete"),
        ("7", "execution_completed"),
    ] == shown
    assert ["worker:w1"] * 7 == [json.loads(frame.data)["stream_id"] for frame in frames]


def test_a_run_can_be_read_in_hives_words_from_elsewhere():
    """The native stream asks for them without options."""
    encoder = HIVE.encoder(None)
    (event,) = Speaker().each(started())
    assert 2 == len(list(encoder.feed(event)))


# Requests


ROUTES = {(route.method, route.path): route.decode for route in HIVE.routes}


def decode(
    method: str,
    path: str,
    body: Any = None,
    *,
    query: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
    **parameters: str,
) -> Any:
    """What a request to a session's route asks for."""
    found = ROUTES.get((method, f"/sessions/<session_id>{path}")) or ROUTES[method, path]
    return found(
        Request(
            method=method,
            parameters=parameters or {"session_id": "s1"},
            query=query or {},
            headers=headers or {},
            body=b"" if body is None else json.dumps(body).encode(),
        )
    )


def content(reply: Any, *args: Any) -> tuple[int, Any]:
    made = reply(*args)
    return made.status, json.loads(made.body)


@pytest.mark.parametrize(
    ("body", "thread_id", "name"),
    [
        (None, None, None),
        ({"session_id": "s1"}, "s1", None),
        ({"agent_id": "a"}, None, "a"),
        ({"agent_path": "exports/helper/"}, None, "helper"),
        ({"model": "p:m"}, None, "p:m"),
        ({"agent_id": "a", "agent_path": "x/b", "model": "p:m"}, None, "a"),
    ],
)
def test_a_session_is_opened(body, thread_id, name):
    """With an id and an agent, or the server chooses them."""
    order = decode("POST", "/sessions", body)
    assert isinstance(order, OpenThread)
    assert (thread_id, name) == (order.thread_id, order.agent)
    status, shown = content(order.reply, thread(), ())
    assert (201, "s1") == (status, shown["session_id"])


def test_a_session_with_a_first_message_is_refused():
    """It would be lost."""
    with pytest.raises(BadRequest, match="initial_prompt"):
        decode("POST", "/sessions", {"initial_prompt": "hi"})


def test_sessions_are_listed_shown_and_closed():
    """In hive's own fields, as far as there is something to put in."""
    listed, shown, closed = (
        decode("GET", "/sessions"), decode("GET", ""), decode("DELETE", ""),
    )  # fmt: skip
    assert [ListThreads, ShowThread, CloseThread] == [type(o) for o in (listed, shown, closed)]
    session = thread(triggers=(trigger(fired=2),), workers=(run_of(),), runs=("r1",))
    status, data = content(shown.reply, session, ())
    assert 200 == status
    assert {"sessions": [data]} == content(listed.reply, [session])[1]
    assert ("s1", "queen", True, 1_795_289_400.12) == (
        data["session_id"], data["agent_id"], data["has_worker"], data["loaded_at"],
    )  # fmt: skip
    assert [
        {"id": "default", "name": "Default", "entry_node": "queen", "trigger_type": "manual",
         "trigger_config": {}},
        {"id": "t", "entry_node": "queen", "trigger_id": "t", "trigger_type": "timer",
         "trigger_config": {"interval_minutes": 1.5}, "name": "Daily", "fire_count": 2},
    ] == data["entry_points"]  # fmt: skip
    assert (200, {"session_id": "s1", "stopped": True}) == content(closed.reply, session, ())


@pytest.mark.parametrize(
    "session_id", ["..", ".", "a..b", "a/b", "a\\b", "", "a\nb", "x" * 201, "..%2f", "\x00"]
)
def test_a_session_id_that_might_be_a_path_is_refused(session_id):
    """Everywhere: nothing of it ever reaches a file, and nothing may begin to."""
    for (method, path), read in ROUTES.items():
        if "<session_id>" in path:
            body = json.dumps(
                {"message": "m", "node_id": "n", "content": "c", "execution_id": "e",
                 "checkpoint_id": "k"}
            ).encode()  # fmt: skip
            parameters = {"session_id": session_id, "worker_id": "w"}
            with pytest.raises(BadRequest, match="session_id"):
                read(Request(method, parameters, {}, {}, body))
    with pytest.raises(BadRequest, match="session_id"):
        decode("POST", "/sessions", {"session_id": session_id})


def test_a_stream_is_of_a_session_that_there_is():
    """From where the page has been, with what it wants to hear."""
    order = decode(
        "GET", "/events",
        query={"types": " goal_progress , Tool_Call_Started,", "watch": "worker:w1, worker:w2"},
        headers={"last-event-id": "e-7"},
    )  # fmt: skip
    chosen = Interest(
        frozenset({"goal_progress", "tool_call_started"}), frozenset({"worker:w1", "worker:w2"})
    )
    assert WatchFeed(thread_id="s1", after="e-7", must_exist=True, options=chosen) == order
    assert WatchFeed(thread_id="s1", must_exist=True, options=Interest()) == decode(
        "GET", "/events"
    )


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_no_types_are_all_of_the_usual_ones(text):
    """As in hive."""
    assert DEFAULT == decode("GET", "/events", query={"types": text}).options.types


def test_types_may_be_in_capitals():
    """The manual of hive writes them so, and gets something else without being told."""
    order = decode("GET", "/events", query={"types": "CLIENT_OUTPUT_DELTA"})
    assert {"client_output_delta"} == order.options.types


def test_types_that_there_are_not_are_named():
    """With those that there are; hive takes all of the usual ones instead."""
    with pytest.raises(BadRequest, match=r"expected some of .*goal_progress.*, got 'nope, what'"):
        decode("GET", "/events", query={"types": "what,goal_progress,nope"})


def test_only_streams_of_workers_can_be_watched():
    """Anything else would be listened for in vain."""
    with pytest.raises(BadRequest, match="worker:ID"):
        decode("GET", "/events", query={"watch": "worker:w1,w2"})


def test_the_stream_of_the_whole_server_has_what_is_of_no_session():
    """Or what is asked for."""
    assert WatchFeed(options=Interest(GLOBAL)) == decode("GET", "/events/global")
    chosen = decode("GET", "/events/global", query={"types": "execution_started"})
    assert {"execution_started"} == chosen.options.types


def test_a_worker_has_a_stream():
    """Which hive has promised twice; from where its reader has been."""
    full = Interest(DEFAULT, frozenset("*"))
    order = decode("GET", "/workers/<worker_id>/events", session_id="s1", worker_id="w1")
    assert Watch(run_id="w1", options=full) == order
    found = ROUTES["GET", "/workers/<worker_id>/events"]
    alone = found(Request("GET", {"worker_id": "worker:w1"}, {}, {"last-event-id": "7.1"}))
    assert Watch(run_id="w1", after=(7, 1), options=full) == alone
    with pytest.raises(BadRequest, match="position"):
        found(Request("GET", {"worker_id": "w1"}, {}, {"last-event-id": "e-7"}))


def test_chat_is_told_to_the_queen():
    """And shown as the page wants it."""
    order = decode("POST", "/chat", {"message": "[ctx] hi", "display_message": "hi", "images": []})
    assert isinstance(order, Tell)
    assert ("s1", "[ctx] hi", "hi", "steer", True) == (
        order.thread_id, order.text, order.shown, order.mode, order.must_exist,
    )  # fmt: skip
    assert (200, {"status": "queen", "delivered": True}) == content(
        order.thread_reply, thread(), ()
    )


@pytest.mark.parametrize("path", ["/chat", "/queen-context"])
@pytest.mark.parametrize("body", [None, {}, {"message": ""}, {"message": " \n"}])
def test_an_empty_message_is_refused(path, body):
    """400, as in hive."""
    with pytest.raises(BadRequest, match="message is required"):
        decode("POST", path, body)


def test_images_are_refused():
    """Rather than dropped: nobody here could look at them."""
    with pytest.raises(BadRequest, match="images"):
        decode("POST", "/chat", {"message": "hi", "images": [{"type": "image_url"}]})


def test_something_is_injected():
    """To the queen, or to a worker by its stream."""
    queen = decode("POST", "/inject", {"node_id": "queen", "content": "x"})
    assert ("s1", None, "x") == (queen.thread_id, queen.run_id, queen.text)
    assert (200, {"delivered": True}) == content(queen.thread_reply, thread(), ())
    worker = decode("POST", "/inject", {"node_id": "worker:w1", "content": "x"})
    assert (None, "w1", "x") == (worker.thread_id, worker.run_id, worker.text)
    assert (200, {"delivered": True}) == content(worker.reply, run_of(), ())


@pytest.mark.parametrize(
    ("body", "missing"), [({"content": "x"}, "node_id"), ({"node_id": "queen"}, "content")]
)
def test_what_is_injected_nowhere_or_is_nothing_is_refused(body, missing):
    """400, as in hive."""
    with pytest.raises(BadRequest, match=f"{missing} is required"):
        decode("POST", "/inject", body)


def test_context_waits_until_the_queen_is_done():
    """It interrupts nobody."""
    order = decode("POST", "/queen-context", {"message": "by the way"})
    assert ("follow_up", "by the way", "s1") == (order.mode, order.text, order.thread_id)
    assert (200, {"status": "queued", "delivered": True}) == content(
        order.thread_reply, thread(), ()
    )


def test_an_execution_is_triggered():
    """In the background, after whatever goes on; the entry point may name another agent."""
    order = decode("POST", "/trigger", {"input_data": {"q": 1}, "session_state": {"k": 2}})
    assert isinstance(order, Start)
    assert (None, {"q": 1}, "background", "s1", "enqueue", {"k": 2}, "continue") == (
        order.agent, order.input, order.delivery, order.thread_id, order.if_busy, order.metadata,
        order.on_disconnect,
    )  # fmt: skip
    assert (200, {"execution_id": "r1"}) == content(order.reply, run_of(), ())
    assert "other" == decode("POST", "/trigger", {"entry_point_id": "other"}).agent


def test_an_execution_is_stopped_or_is_not_there_any_more():
    """200, or 404 where there was nothing left to stop."""
    order = decode("POST", "/stop", {"execution_id": "r1"})
    assert isinstance(order, Cancel)
    assert "r1" == order.run_id
    assert (200, {"stopped": True, "execution_id": "r1"}) == content(order.reply, run_of(), ())
    assert (404, {"stopped": False, "error": "Execution 'r1' not found"}) == content(
        order.reply_if_over, run_of(), ()
    )
    with pytest.raises(BadRequest, match="execution_id is required"):
        decode("POST", "/stop", {})


def test_the_queen_is_cancelled():
    """With all that goes on below her."""
    order = decode("POST", "/cancel-queen")
    assert (None, "s1") == (order.run_id, order.thread_id)
    assert (200, {"cancelled": True, "execution_id": "r1"}) == content(order.reply, run_of(), ())


def test_a_pause_is_no_cancel():
    """It rests before its next step, and goes on where it was."""
    pause, resume = decode("POST", "/pause", {"reason": "user"}), decode("POST", "/resume")
    assert [Pause, Pause] == [type(pause), type(resume)]
    assert ("s1", False, "user") == (pause.thread_id, pause.resume, pause.reason)
    assert (200, {"stopped": True, "execution_id": "r1"}) == content(pause.reply, run_of(), ())
    assert ("s1", True) == (resume.thread_id, resume.resume)
    assert (
        200, {"execution_id": "r1", "resumed_from": "s1", "checkpoint_id": None},
    ) == content(resume.reply, run_of(), ())  # fmt: skip


@pytest.mark.parametrize("path", ["/resume", "/replay"])
def test_there_are_no_checkpoints(path):
    """404, which is what hive says of one that it does not have."""
    with pytest.raises(NotFound, match="Checkpoint 'cp1' not found: this server keeps none"):
        decode("POST", path, {"session_id": "s1", "checkpoint_id": "cp1"})


def test_a_replay_of_nothing_is_refused():
    """400, as in hive."""
    with pytest.raises(BadRequest, match="checkpoint_id is required"):
        decode("POST", "/replay", {"session_id": "s1"})


def history(events: Sequence[AnyEvent], last: int | None = None, **query: str) -> dict[str, Any]:
    """What a history says of a feed that holds these."""
    order = decode("GET", "/events/history", query=query)
    shown = thread(last_event_id=f"e-{len(events) if last is None else last}")
    status, data = content(order.reply, shown, events)
    assert 200 == status
    return data


def test_a_history_has_each_text_once():
    """As a page sees it that was there: of a text that was streamed, its last snapshot."""
    events = Speaker().each(*everything())
    data = history(events)
    assert ("s1", False, None, 500) == (
        data["session_id"], data["truncated"], data["before_index"], data["limit"],
    )  # fmt: skip
    page = Page()
    for event in data["events"]:
        page.read(Frame(json.dumps(event)))
    live = Page()
    for frame in frames_of(events):
        live.read(frame)
    assert live == page
    assert 2 == [event["type"] for event in data["events"]].count("client_output_delta")
    assert data["total"] == data["returned"] == len(data["events"])


def test_a_history_is_numbered_like_the_stream():
    """So that a page that has both can tell what it has seen, whatever the feed has forgotten."""
    events = Speaker().each(*called(), emitted("goal_progress"))
    stream = [json.loads(frame.data) for frame in frames_of(events, first=101)]
    assert stream == history(events, last=103)["events"]


def test_a_history_comes_in_pages():
    """The newest first of all; what is before it is asked for by number."""
    events = Speaker().each(*(emitted("goal_progress", b'{"n":%d}' % n) for n in range(1, 6)))
    newest = history(events, limit="2")
    assert ([4, 5], True, 4, 5) == (
        [event["data"]["n"] for event in newest["events"]], newest["truncated"],
        newest["before_index"], newest["total"],
    )  # fmt: skip
    before = history(events, limit="2", before_index=str(newest["before_index"]))
    assert [2, 3] == [event["data"]["n"] for event in before["events"]]
    first = history(events, limit="2", before_index=str(before["before_index"]))
    assert ([1], None) == ([e["data"]["n"] for e in first["events"]], first["before_index"])


def test_a_history_can_be_filtered():
    """Like the stream: by types, and workers by `watch`."""
    queen, worker = Speaker(), Speaker("w1", ("h:1",))
    events = [*queen.each(*said("a")), *worker.each(*said("b"))]
    assert ["client_output_delta"] == [e["type"] for e in history(events)["events"]]
    watched = history(events, watch="worker:w1", types="llm_text_delta")
    assert ["b"] == [event["data"]["snapshot"] for event in watched["events"]]


@pytest.mark.parametrize("limit", ["0", "10001", "-1", "x", "1" * 20])
def test_a_page_of_a_history_has_bounds(limit):
    """So that nobody asks for all there ever was."""
    with pytest.raises(BadRequest, match="limit"):
        decode("GET", "/events/history", query={"limit": limit})


def test_a_history_leaves_out_what_is_heavy():
    """It says how large it is; what is streamed, and held, keeps it."""
    heavy = b'"%b"' % (b"x" * 70_000)
    events = Speaker().each(emitted("goal_progress", b'{"light":1,"heavy":%b}' % heavy))
    (event,) = history(events)["events"]
    assert {"light": 1, "heavy": {"_truncated": True, "_original_bytes": 70_002}} == event["data"]
    assert 70_000 == len(heard(events)[0]["data"]["heavy"])


def test_the_snapshot_can_be_asked_for():
    """With what the feed knows beside: where the open question stands."""
    events = Speaker().each(started(), asked())
    shown = thread(state="waiting", run=run_of(questions=(events[1],)), last_event_id="e-7")
    status, data = content(decode("GET", "/snapshot").reply, shown, events)
    assert (200, 7, 7) == (status, data["snapshot_seq"], data["last_event_seq"])


def test_statistics_count_what_is_held_by_type():
    """And what there is of executions, workers and triggers."""
    busy, done = run_of(id="w1", state="running"), run_of(id="w2", outcome="success")
    shown = thread(
        state="running", runs=("r0", "r1"), workers=(busy, done), triggers=(trigger(),),
        last_event_id="e-1002",
    )  # fmt: skip
    status, data = content(decode("GET", "/stats").reply, shown, Speaker().each(*called()))
    assert (200, {
        "session_id": "s1", "state": "running", "executions": 2, "workers": 2, "active_workers": 1,
        "triggers": 1, "total_events": 1002,
        "events_by_type": {"tool_call_completed": 1, "tool_call_started": 1},
    }) == (status, data)  # fmt: skip


def test_the_progress_towards_the_goal_is_what_was_emitted_last():
    """Or nothing."""
    reply = decode("GET", "/goal-progress").reply
    nothing = {"progress": None, "criteria_status": None}
    assert (200, nothing) == content(reply, thread(), [])
    events = Speaker().each(
        emitted("goal_progress", b'{"progress":0.2}'),
        emitted("goal_progress", b'{"progress":0.5,"criteria_status":{"c1":"met"}}'),
        emitted("tick"),
    )
    assert {"progress": 0.5, "criteria_status": {"c1": "met"}} == content(reply, thread(), events)[
        1
    ]
    half = Speaker().each(emitted("goal_progress", b"0.5"))
    assert {**nothing, "progress": 0.5} == content(reply, thread(), half)[1]


def test_workers_are_listed():
    """With how they fare."""
    error = problem("no luck")
    runs = (
        run_of(id="w1", state="queued"),
        run_of(id="w2", state="running"),
        run_of(id="w3", outcome="success", result=Raw(b'"gold"'), usage=Usage(output_tokens=7)),
        run_of(id="w4", outcome="error", error=error),
        run_of(id="w5", outcome="cancelled"),
    )
    _, data = content(decode("GET", "/workers").reply, thread(workers=runs), ())
    assert ["pending", "running", "completed", "failed", "stopped"] == [
        worker["status"] for worker in data["workers"]
    ]
    assert ("w3", "worker:w3", "gold", 7) == tuple(
        data["workers"][2][name] for name in ("worker_id", "stream_id", "result", "tokens_used")
    )
    assert "no luck" == data["workers"][3]["error"]


def test_an_execution_by_itself():
    """Where nothing else is said of it."""
    shown = json.loads(HIVE.present(run_of(outcome="error", error=problem())))
    assert ("r1", "s1", "error", "boom") == tuple(
        shown[name] for name in ("execution_id", "session_id", "outcome", "error")
    )
    assert None is json.loads(HIVE.present(run_of()))["error"]


@pytest.mark.parametrize(
    ("said_here", "status", "body"),
    [
        ("expected luck", 409, {"error": "expected luck"}),
        ("expected luck", 499, {"error": "expected luck"}),
        ("expected luck", 200, {"error": "expected luck"}),
        ("expected the id of a thread that is open or has runs, got 's9'", 404,
         {"error": "Session 's9' not found"}),
        ("expected the id of a run that goes on or is still kept, got \"it's\"", 404,
         {"stopped": False, "error": "Execution \"it's\" not found"}),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence(said_here, status, body):
    """And what is missing is named as hive names it."""
    reply = hive_problem(Problem(code="x", message=said_here, status=status))
    assert (status if status >= 400 else 500, body) == (reply.status, json.loads(reply.body))


# Over real sockets


@attrs.define(eq=False)
class Visitor:
    """A page that is open: what it shows, and all that it was sent."""

    page: Page = attrs.field(factory=Page)
    decoder: Decoder = attrs.field(factory=Decoder)
    events: list[dict[str, Any]] = attrs.field(factory=list)
    data: bytes = b""
    is_over: bool = False
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def take(self, chunk: bytes) -> None:
        """Read what has come."""
        self.data += chunk
        for frame in self.decoder.feed(chunk):
            self.page.read(frame)
            self.events.append(json.loads(frame.data))
        self.note()

    async def wait_more(self) -> None:
        """Wait until more has come, or its end."""
        await self._changed.wait()

    def note(self) -> None:
        """Wake whoever waits for more."""
        self._changed.set()
        self._changed = trio.Event()

    async def until(
        self, kind: str, count: int = 1, *, stream: str | None = None
    ) -> dict[str, Any]:
        """Wait for the so manyth event of a type; that event."""
        while len(found := self.of(kind, stream)) < count:
            await self.wait_more()
        return found[count - 1]

    def of(self, kind: str, stream: str | None = None) -> list[dict[str, Any]]:
        """All events of a type."""
        return [e for e in self.events if e["type"] == kind and stream in (None, e["stream_id"])]


@attrs.frozen(eq=False)
class Site:
    """A server that speaks hive, and a client."""

    server: Server
    http: httpx2.AsyncClient

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """Post to a session; status and body."""
        answer = await self.http.post(f"/api/sessions{path}", json=body)
        return answer.status_code, answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        """Get; status and body."""
        answer = await self.http.get(f"/api{path}")
        return answer.status_code, answer.json()

    @asynccontextmanager
    async def visit(self, path: str, after: str | None = None) -> AsyncIterator[Visitor]:
        """Open a stream; what comes is read beside."""
        visitor = Visitor()
        headers = {} if after is None else {"Last-Event-ID": after}
        async with self.http.stream("GET", f"/api{path}", headers=headers) as response:
            assert (200, "text/event-stream; charset=utf-8") == (
                response.status_code, response.headers["content-type"],
            )  # fmt: skip

            async def read() -> None:
                async for chunk in response.aiter_bytes():
                    visitor.take(chunk)
                visitor.is_over = True
                visitor.note()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                yield visitor
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_site(*agents: Agent, **server: Any) -> AsyncIterator[Site]:
    """A real server with these agents, in time."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, HIVE), **server) as opened,
            httpx2.AsyncClient(base_url=opened.urls[0], timeout=None) as http,
        ):
            yield Site(opened, http)


@tool
async def lookup(name: str) -> str:
    """Look a name up."""
    await trio.lowlevel.checkpoint()
    return f"{name} is here"


def queen_of(*script: Any, tools: Any = (lookup,)) -> Agent:
    provider = ScriptedProvider(script)
    return Agent.of_model("queen", "scripted:m", provider=provider, tools=tools)


@agent
async def worker(run: RunContext, input: Any) -> Any:
    """Do what it is told, and say so."""
    await trio.lowlevel.checkpoint()
    run.text(f"working on {input}")
    emit("task_created", task={"id": 1})
    return {"done": input}


@agent
async def curious(run: RunContext, input: Any) -> Any:
    """Ask, and repeat the answer."""
    run.text(f"You said {input}. ")
    answer = await run.ask("Which env?")
    run.text(f"So: {answer}")
    return {"answer": answer}


@agent
async def endless(run: RunContext, _input: Any) -> None:
    """Say something, and wait to be stopped."""
    run.text("I begin")
    await trio.sleep_forever()


async def test_a_session_from_its_beginning_to_its_end():
    """Opened, listened to, spoken to, closed; the state comes first, each thing once."""
    usage = {"usage": Usage(input_tokens=10, output_tokens=5)}
    script = [
        [*ask_for(("lookup", '{"name":"ada"}'))[:-1], Finish("tool_calls", **usage)],
        [*say("Ada is here.", part_id="t2")[:-1], Finish("stop", **usage)],
    ]
    async with open_site(queen_of(*script)) as site:
        assert (201, "s1") == pick(await site.post("", session_id="s1"), "session_id")
        async with site.visit("/sessions/s1/events") as visitor:
            first = await visitor.until("session_snapshot")
            assert (None, 0) == (first["data"]["activity"], first["seq"])
            sent = {"message": "[a note] Where is Ada?", "display_message": "Where is Ada?"}
            assert (200, {"status": "queen", "delivered": True}) == await site.post(
                "/s1/chat", **sent
            )
            end = await visitor.until("execution_completed")
            assert {"result": "Ada is here."} == end["data"]["output"]
        page = visitor.page
        assert ["Ada is here."] == page.text
        assert ["Where is Ada?"] == page.inputs
        assert [("tool_call_started", "call1"), ("tool_call_completed", "call1")] == page.tools
        assert ["execution_started", "execution_completed"] == [name for name, _ in page.executions]
        assert 2 == len(page.turns)
        assert "awaiting_user" == page.activity
        seqs = [event["seq"] for event in visitor.events]
        assert sorted(seqs) == seqs
        _, shown = await site.get("/sessions/s1")
        assert ("idle", True) == (shown["state"], shown["awaiting_input"])
        answer = await site.http.delete("/api/sessions/s1")
        assert {"session_id": "s1", "stopped": True} == answer.json()
        assert (404, {"error": "Session 's1' not found"}) == await site.get("/sessions/s1")
        assert (200, {"sessions": []}) == await site.get("/sessions")


def pick(answer: tuple[int, Any], *names: str) -> tuple[Any, ...]:
    return answer[0], *(answer[1][name] for name in names)


async def test_a_session_that_there_is_already_is_not_opened_again():
    """409; and one that there is not is not made by being asked for."""
    async with open_site(curious) as site:
        await site.post("", session_id="s1")
        status, body = await site.post("", session_id="s1")
        assert (409, ["error"]) == (status, list(body))
        assert 404 == (await site.post("", agent_id="nobody"))[0]
        missing = (404, {"error": "Session 's9' not found"})
        for path in ("", "/events", "/events/history", "/snapshot", "/stats", "/workers"):
            assert missing == await site.get(f"/sessions/s9{path}")
        for path, body in (
            ("/chat", {"message": "x"}), ("/queen-context", {"message": "x"}),
            ("/inject", {"node_id": "queen", "content": "x"}), ("/pause", {}), ("/resume", {}),
            ("/cancel-queen", {}),
        ):  # fmt: skip
            assert missing == await site.post(f"/s9{path}", **body)
        assert 404 == (await site.http.delete("/api/sessions/s9")).status_code


async def test_a_path_in_an_id_gets_nowhere():
    """Neither as it is nor escaped."""
    async with open_site(curious) as site:
        for path in ("/sessions/..%5C..%5Cetc/events", "/sessions/a..b", "/sessions/%2e%2e%5cx"):
            status, body = await site.get(path)
            assert (400, ["error"]) == (status, list(body))


async def test_a_question_is_asked_and_answered_by_chat():
    """Whoever comes while it is open sees it; whoever comes later does not."""
    async with open_site(curious) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            await site.post("/s1/chat", message="hi")
            asked_here = await visitor.until("client_input_requested")
            assert "Which env?" == asked_here["data"]["prompt"]
            _, snapshot = await site.get("/sessions/s1/snapshot")
            assert (asked_here["seq"], "ask_user") == (
                snapshot["last_event_seq"], snapshot["park_reason"],
            )  # fmt: skip
            async with site.visit("/sessions/s1/events") as late:
                first = await late.until("session_snapshot")
                assert [{"id": "answer", "prompt": "Which env?"}] == first["data"][
                    "pending_questions"
                ]
                await late.until("client_input_requested")
                assert 200 == (await site.post("/s1/chat", message="prod"))[0]
                await late.until("execution_completed")
                await visitor.until("execution_completed")
            assert visitor.page.conversation == late.page.conversation
        assert ["hi", "prod"] == visitor.page.inputs
        assert ["You said hi. ", "So: prod"] == visitor.page.text
        async with site.visit("/sessions/s1/events") as later:
            await later.until("execution_completed")
        assert [] == later.page.requests
        assert visitor.page.conversation == later.page.conversation


async def test_a_worker_is_heard_by_its_meta_events_or_in_full():
    """By default how it fares; with `watch`, or in a stream of its own, what it says."""

    @agent
    async def delegating(run: RunContext, _input: Any) -> Any:
        return await run.delegate("worker", "a part")

    async with open_site(delegating, worker) as site:
        await site.post("", session_id="s1")
        async with (
            site.visit("/sessions/s1/events") as quiet,
            site.visit("/sessions/s1/events?watch=*") as watching,
        ):
            await quiet.until("session_snapshot")
            await watching.until("session_snapshot")
            await site.post("/s1/chat", message="go")
            for visitor in (quiet, watching):
                await visitor.until("execution_completed", stream="queen")
        (report,) = quiet.of("subagent_report")
        run_id = report["data"]["worker_id"]
        assert ("success", "a part", {"done": "a part"}) == tuple(
            report["data"][name] for name in ("status", "task", "data")
        )
        stream = f"worker:{run_id}"
        assert [
            "execution_started", "task_created", "execution_completed", "subagent_report",
        ] == [event["type"] for event in quiet.events if event["stream_id"] == stream]  # fmt: skip
        assert [] == quiet.page.text
        assert ["working on a part"] == watching.page.text
        for path in (f"/sessions/s1/workers/{run_id}/events", f"/workers/{run_id}/events"):
            async with site.visit(path) as alone:
                await alone.until("execution_completed")
                assert ["working on a part"] == alone.page.text
        _, listed = await site.get("/sessions/s1/workers")
        assert [(run_id, "completed")] == [
            (each["worker_id"], each["status"]) for each in listed["workers"]
        ]


async def test_a_stream_of_its_own_ends_with_its_worker():
    """It has no last word but the worker's; who comes back then is told that there is no more."""
    async with open_site(worker) as site:
        await site.post("", session_id="s1")
        _, begun = await site.post("/s1/trigger", input_data={})
        run_id = begun["execution_id"]
        async with site.visit(f"/workers/{run_id}/events") as visitor:
            while not visitor.is_over:
                await visitor.wait_more()
        assert "execution_completed" == visitor.events[-1]["type"]
        last = visitor.decoder.last_id
        again = await site.http.get(
            f"/api/workers/{run_id}/events", headers={"Last-Event-ID": last}
        )
        assert 204 == again.status_code


async def test_a_message_that_comes_while_the_queen_speaks_is_shown_once():
    """It steers her, and is answered in the same execution or the next."""
    gate = trio.Event()

    @agent
    async def listening(run: RunContext, input: Any) -> Any:
        if input == "more":
            run.text("And more.")
            return None
        run.text("One. ")
        await gate.wait()
        return None

    async with open_site(listening) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            await site.post("/s1/chat", message="begin")
            await visitor.until("client_output_delta")
            assert (200, {"delivered": True}) == await site.post(
                "/s1/inject", node_id="queen", content="more"
            )
            await visitor.until("client_input_received", 2)
            gate.set()
            await visitor.until("execution_completed", 2)
        assert ["begin", "more"] == visitor.page.inputs
        assert ["One. ", "And more."] == visitor.page.text


async def test_context_is_queued_for_the_queen():
    """It is heard, and answered when she is done."""
    async with open_site(queen_of(say("Yes.", part_id="a"), say("Noted.", part_id="b"))) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            assert (200, {"status": "queued", "delivered": True}) == await site.post(
                "/s1/queen-context", message="by the way"
            )
            await visitor.until("execution_completed")
        assert ["by the way"] == visitor.page.inputs


async def test_an_execution_is_triggered_and_stopped():
    """Stopped once: then it is not there any more."""
    async with open_site(endless) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            status, begun = await site.post("/s1/trigger", input_data={"q": 1})
            run_id = begun["execution_id"]
            assert 200 == status
            start = await visitor.until("execution_started")
            assert (run_id, {"q": 1}) == (start["execution_id"], start["data"]["input"])
            await visitor.until("client_output_delta")
            stop = {"execution_id": run_id}
            assert (200, {"stopped": True, **stop}) == await site.post("/s1/stop", **stop)
            gone = (404, {"stopped": False, "error": f"Execution '{run_id}' not found"})
            assert gone == await site.post("/s1/stop", **stop)
            end = await visitor.until("execution_failed")
            assert {"error": "cancelled"} == end["data"]
        assert ["I begin"] == visitor.page.text
        assert "interrupted" == visitor.page.activity
        assert (404, {"stopped": False, "error": "Execution 'r9' not found"}) == await site.post(
            "/s1/stop", execution_id="r9"
        )
        assert 400 == (await site.post("/s1/stop"))[0]


async def test_the_queen_is_cancelled_with_her_workers():
    """Stop means stop."""

    @agent
    async def delegating(run: RunContext, _input: Any) -> Any:
        return await run.delegate("endless", "for ever")

    async with open_site(delegating, endless) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events?watch=*") as visitor:
            await site.post("/s1/chat", message="go")
            await visitor.until("llm_text_delta")
            status, body = await site.post("/s1/cancel-queen")
            assert (200, True) == (status, body["cancelled"])
            await visitor.until("execution_failed", stream="queen")
        (report,) = visitor.of("subagent_report")
        assert "stopped" == report["data"]["status"]
        assert 2 == len(visitor.of("execution_failed"))
        assert not site.server.runs.unfinished()
        assert (200, {"cancelled": False}) == await site.post("/s1/cancel-queen")


async def test_an_execution_is_paused_and_goes_on():
    """Before its next step; nothing of it is lost."""
    reached, gate = trio.Event(), trio.Event()

    @tool
    async def slow() -> str:
        """Take some time."""
        reached.set()
        await gate.wait()
        return "done"

    queen = queen_of(ask_for(("slow", "{}")), say("All done.", part_id="z"), tools=[slow])
    async with open_site(queen) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            await site.post("/s1/chat", message="go")
            await reached.wait()
            _, snapshot = await site.get("/sessions/s1/snapshot")
            assert ("tool", ["slow"]) == (
                snapshot["queen_busy_reason"],
                [call["name"] for call in snapshot["current_tool_calls"]],
            )
            assert 200 == (await site.post("/s1/pause", reason="lunch"))[0]
            gate.set()
            paused = await visitor.until("execution_paused")
            assert {"reason": "lunch"} == paused["data"]
            assert "interrupted" == visitor.page.activity
            _, snapshot = await site.get("/sessions/s1/snapshot")
            assert ("interrupted", "paused") == (
                snapshot["activity"], snapshot["interrupt_cause"],
            )  # fmt: skip
            status, resumed = await site.post("/s1/resume", session_id="s1")
            assert (200, "s1") == (status, resumed["resumed_from"])
            await visitor.until("execution_completed")
        assert ["All done."] == visitor.page.text
        checkpoint = {"session_id": "s1", "checkpoint_id": "cp1"}
        for path in ("/s1/resume", "/s1/replay"):
            status, body = await site.post(path, **checkpoint)
            assert (404, True) == (status, "keeps none" in body["error"])


async def test_an_error_is_said_and_ends_the_execution():
    """The person reads why; the session goes on."""

    @agent
    async def unlucky(run: RunContext, _input: Any) -> None:
        run.text("I try. ")
        await trio.lowlevel.checkpoint()
        raise AgentError("expected luck, got none", code="unlucky")

    async with open_site(unlucky) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            await site.post("/s1/chat", message="go")
            end = await visitor.until("execution_failed")
            assert {"error": "expected luck, got none"} == end["data"]
            assert ["I try. ", "expected luck, got none"] == visitor.page.text
            await site.post("/s1/chat", message="again")
            await visitor.until("execution_failed", 2)
        async with site.visit("/sessions/s1/events") as late:
            await late.until("execution_failed", 2)
        assert visitor.page.conversation == late.page.conversation


async def test_triggers_are_set_natively_and_seen_here():
    """They come with the greeting, change and fire in the stream, and go."""
    async with open_site(worker) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            order = {"every_s": 1.0, "text": "look", "name": "Watch"}
            await site.http.put("/threads/s1/triggers/t1", json=order)
            quiet = {"every_s": 60.0, "text": "never", "active": False}
            await site.http.put("/threads/s1/triggers/t2", json=quiet)
            fired = await visitor.until("trigger_fired")
            assert ("t1", 1) == (fired["data"]["trigger_id"], fired["data"]["fire_count"])
            await visitor.until("execution_completed")
            async with site.visit("/sessions/s1/events") as late:
                await late.until("execution_completed")
                assert visitor.page.triggers == late.page.triggers
            assert {"t1": "trigger_activated", "t2": "trigger_available"} == late.page.triggers
            assert 1 == late.page.fires[0]
            await site.http.delete("/threads/s1/triggers/t1")
            await visitor.until("trigger_removed")
        assert {"t2": "trigger_available"} == visitor.page.triggers
        assert "look" in visitor.page.inputs


async def test_several_questions_are_answered_by_one_message():
    """Each line answers the question that it names."""
    answers = []

    @agent
    async def asking(run: RunContext, _input: Any) -> None:
        questions = [Question(id=name, kind="text", prompt=name) for name in ("env", "when")]
        answers.append(await run.ask(questions))

    async with open_site(asking) as site:
        await site.post("", session_id="s1")
        await site.post("/s1/chat", message="go")
        run = site.server.runs.threads["s1"].run
        await run.wait_done_or_asking()
        assert 400 == (await site.post("/s1/chat", message="prod"))[0]
        assert 200 == (await site.post("/s1/chat", message="[env]: prod\nwhen: now"))[0]
        await run.done.wait()
    assert [{"env": "prod", "when": "now"}] == answers


async def test_a_question_that_the_feed_has_forgotten_is_still_pending():
    """Where everything stands comes from the run, not from what is left of its events."""

    @agent
    async def asking(run: RunContext, _input: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.ask, "Which?")
            await trio.testing.wait_all_tasks_blocked()
            for number in range(50):
                run.emit("noise", number=number)

    async with open_site(asking) as site:
        await site.post("", session_id="s1")
        thread = site.server.runs.threads["s1"]
        thread.feed.max_events = 20
        await site.post("/s1/chat", message="go")
        await wait_until(lambda: thread.feed.first > 30)
        _, snapshot = await site.get("/sessions/s1/snapshot")
        assert not [e for e in thread.feed.events if isinstance(e, InputRequested)]
        assert ("awaiting_user", ["Which?"]) == (
            snapshot["activity"],
            [q["prompt"] for q in snapshot["pending_questions"]],
        )
        async with site.visit("/sessions/s1/events") as late:
            await late.until("session_snapshot")
            assert "awaiting_user" == late.of("session_snapshot")[0]["data"]["activity"]


async def test_what_happens_anywhere_can_be_heard():
    """What is of no session by default, else what is asked for."""

    @agent
    async def changing(_run: RunContext, _input: Any) -> None:
        emit("crm_changed", entities=["people"])
        await trio.lowlevel.checkpoint()

    async with open_site(changing) as site:
        async with (
            site.visit("/events/global") as usual,
            site.visit("/events/global?types=execution_completed") as chosen,
        ):
            for visitor in (usual, chosen):
                while not visitor.data:
                    await visitor.wait_more()
            assert 404 == (await site.post("/s1/trigger"))[0]
            await site.post("", session_id="s1")
            await site.post("/s1/trigger")
            changed = await usual.until("crm_changed")
            await chosen.until("execution_completed")
            assert ({"entities": ["people"]}, "global") == (changed["data"], changed["stream_id"])
        assert ["crm_changed"] == [event["type"] for event in usual.events]


@pytest.mark.parametrize("seed", range(3))
async def test_a_page_that_is_cut_off_again_and_again_sees_each_thing_once(seed):
    """It comes back with the last id, while all goes on; so does one that comes late."""
    chance = random.Random(seed)

    @agent(tools=(lookup,))
    async def talking(run: RunContext, input: Any) -> Any:
        for n in range(12):
            run.text(f"{n} ")
            if n % 4 == 3:
                await run.call("lookup", {"name": str(n)})
            await trio.sleep(0.002)  # so that it is cut off in the middle
        return await run.delegate("worker", input)

    async with open_site(talking, worker) as site:
        await site.post("", session_id="s1")
        cut, last = Page(), ""
        async with site.visit("/sessions/s1/events") as steady:
            await steady.until("session_snapshot")
            for message in ("one", "two"):
                await site.post("/s1/chat", message=message)
            while len(cut.executions) < 8:  # each of two runs and their workers begins and ends
                async with site.visit("/sessions/s1/events", last) as visitor:
                    while not any(event["seq"] for event in visitor.events):
                        await visitor.wait_more()
                decoder, size = Decoder(last_id=last), len(visitor.data)
                for frame in decoder.feed(visitor.data[: chance.randint(size // 2, size)]):
                    cut.read(frame)
                last = decoder.last_id
            await steady.until("execution_completed", 2, stream="queen")
        assert steady.page.conversation == cut.conversation
        async with site.visit("/sessions/s1/events") as late:
            await late.until("execution_completed", 2, stream="queen")
        assert steady.page.conversation == late.page.conversation
        assert steady.page.activity == cut.activity == late.page.activity == "awaiting_user"
        assert ["one", "two"] == late.page.inputs
        assert 2 == len(late.page.reports)
        assert "".join(f"{n} " for n in range(12)) * 2 == "".join(late.page.text)
        _, data = await site.get("/sessions/s1/events/history?limit=10000")
        page = Page()
        for event in data["events"]:
            page.read(Frame(json.dumps(event)))
        assert steady.page.conversation == page.conversation


async def test_a_silent_stream_is_kept_alive():
    """With hive's own comment."""
    async with open_site(endless, heartbeat=0.05) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            while visitor.data.count(b": keepalive\n\n") < 3:
                await visitor.wait_more()
        assert ["session_snapshot"] == [event["type"] for event in visitor.events]


async def test_agents_go_on_when_nobody_listens():
    """A page that is closed stops nothing."""
    gate = trio.Event()

    @agent
    async def patient(run: RunContext, _input: Any) -> None:
        run.text("still ")
        await gate.wait()
        run.text("here")

    async with open_site(patient) as site:
        await site.post("", session_id="s1")
        async with site.visit("/sessions/s1/events") as visitor:
            await site.post("/s1/chat", message="go")
            await visitor.until("client_output_delta")
        gate.set()
        async with site.visit("/sessions/s1/events", visitor.decoder.last_id) as again:
            await again.until("execution_completed")
        assert ["still here"] == again.page.text
        assert "continue" == HIVE.on_disconnect


async def test_a_run_that_was_started_elsewhere_can_be_read_in_hives_words():
    """The native stream takes the dialect's name."""
    async with open_site(worker) as site:
        begun = await site.http.post("/agents/worker/runs", json={"background": True})
        answer = await site.http.get(f"/runs/{begun.json()['id']}/events?dialect=hive")
        page = Page.of(answer.content)
        assert ["working on None"] == page.text
        assert ["execution_started", "execution_completed"] == [name for name, _ in page.executions]


def test_every_answer_is_json():
    """What the routes say of a session that has everything in it."""
    events = Speaker().each(*everything())
    shown = thread(
        run=run_of(outcome="success"), workers=(run_of(id="w1"),), triggers=(trigger(),),
        last_event_id=f"e-{len(events)}", last_event_at=TS,
    )  # fmt: skip
    for method, path in ROUTES:
        if method == "GET" and path.startswith("/sessions/<session_id>") and "<worker" not in path:
            order = decode("GET", path.removeprefix("/sessions/<session_id>"))
            if isinstance(order, ShowThread):
                made = order.reply(shown, events)
                assert "application/json" == made.media_type
                assert isinstance(msgspec.json.decode(made.body), dict)
