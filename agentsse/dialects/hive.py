"""hive's protocol: a session has one stream, on which a queen and her workers are heard.

Knows: the routes under `/sessions`, hive's words for what happens, and what its page makes of them.
Must never know how a thread is kept or what a run is beyond its events and snapshots.

A session is a thread. The queen is whoever runs in it: events without a `path`. Workers are child
runs, heard as `worker:<run id>`. An execution is a run. What hive's page does with the frames
decides what they must be:

- Frames have no name, for it listens with `onmessage`. They have ids, so that a page that comes
  back goes on where it was; hive itself has none. An event of ours may be several of hive's. All of
  them have the event's `seq`, and each a `timestamp` of its own, since both together are what the
  page knows a frame by.
- It draws text by replacement: each `snapshot` is all that was said so far of one piece. A piece is
  told from another by `iteration` (of a worker's text `inner_turn`), which is the number that its
  beginning has in its run: it rises, and is the same for everybody, whenever they came. Snapshots
  of a long text come when it has grown by a 32nd, so that all of them together are not the square
  of it. The last one has the whole.
- What comes before its first frame, `session_snapshot`, says where everything stands. It brings all
  triggers too, which the feed may have forgotten.

hive's own form of a time is the server's local one, without a zone; here it is UTC.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias, assert_never

import attrs
import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

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
    ThreadState,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    TriggerChanged,
    ValuesChanged,
    decode_json,
)
from agentsse.sse import FieldError, frame_id, parse_position, retry

from . import (
    SSE,
    Cancel,
    CloseThread,
    Dialect,
    Doc,
    FeedForm,
    Framing,
    Intent,
    ListThreads,
    OpenThread,
    Pause,
    Reply,
    Request,
    Route,
    ShowThread,
    Start,
    Tell,
    ThreadReply,
    Watch,
    WatchFeed,
    read_body,
)

KEEPALIVE: Final = b": keepalive\n\n"
GROWTH: Final = 32  # a snapshot is sent when the text has grown by one part in so many
LONG: Final = 64 * 1024  # characters; beyond them, when it has doubled
TAIL: Final = 4_000  # characters of what is thought; the page shows the end of it
HEAVY: Final = 64 * 1024  # bytes of a field beyond which a history only says how large it is
PAGE: Final = 500  # events of a history unless asked for more
MAX_PAGE: Final = 10_000
MAX_NAME: Final = 200  # characters of a session's id

LF, CR = b"\n\r"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What hive's page listens to if it does not say. First those of April 2026, then what came since.
DEFAULT: Final = _words("""
    client_output_delta client_input_requested client_input_received llm_text_delta
    llm_turn_complete tool_call_started tool_call_completed execution_started execution_completed
    execution_failed execution_paused node_loop_started node_loop_iteration node_loop_completed
    node_action_plan goal_progress node_internal_output node_stalled node_retry node_tool_doom_loop
    context_compacted context_usage_updated worker_colony_loaded colony_created
    credentials_required subagent_report queen_phase_changed trigger_available trigger_activated
    trigger_deactivated trigger_fired trigger_removed trigger_updated

    session_snapshot loop_state_changed llm_reasoning_delta client_reasoning client_input_committed
    client_credential_form_requested colony_suggestion_requested context_compaction_started
    payment_required session_forked task_created task_updated task_deleted task_list_reset
    """)
# What is of no session; the stream of the whole server has these if it is not asked for more.
GLOBAL: Final = _words("""
    credential_provider_connected credential_provider_disconnected tool_catalog_refreshed
    tools_config_changed crm_changed
    """)
TYPES: Final = DEFAULT | GLOBAL | _words("""
    constraint_violation custom escalation_requested execution_resumed execution_resurrected
    goal_achieved judge_verdict missed_triggers node_input_blocked queen_identity_selected
    reminder_injected state_changed state_conflict stream_inactive stream_nudge_sent stream_started
    stream_stopped stream_ttft_exceeded task_list_reattach_mismatch tool_call_replay_detected
    webhook_received worker_completed worker_failed
    """)  # fmt: skip
# What an agent may not emit: these say how an execution goes, and only the server knows that.
RESERVED: Final = _words("""
    client_input_received client_input_requested client_output_delta client_reasoning custom
    execution_completed execution_failed execution_paused execution_resumed execution_started
    llm_reasoning_delta llm_text_delta llm_turn_complete loop_state_changed node_loop_iteration
    node_loop_started session_snapshot subagent_report tool_call_completed tool_call_started
    trigger_activated trigger_available trigger_deactivated trigger_fired trigger_removed
    trigger_updated
    """)
# What everybody hears of a worker: enough to draw it, and nothing of what it says.
META: Final = _words("""
    execution_completed execution_failed execution_started node_loop_started payment_required
    subagent_report task_created task_deleted task_updated worker_completed worker_failed
    """)
# Of what authors emit, what somebody who comes later is told as well.
REPLAYED: Final = _words("""
    client_input_committed session_forked task_created task_deleted task_list_reset task_updated
    """)

_TRIGGERS: Final = {
    "available": "trigger_available",
    "activated": "trigger_activated",
    "fired": "trigger_fired",
    "deactivated": "trigger_deactivated",
    "updated": "trigger_updated",
    "removed": "trigger_removed",
}

_json: Callable[[object], bytes] = msgspec.json.encode


# What hive's events are made of -------------------------------------------------------------------


class _Speaker(NamedTuple):
    """Whose event it is: the beginning and the end of its envelope, as JSON."""

    head: bytes
    tail: bytes


def _speaker(stream: str, node: str | None, run_id: str) -> _Speaker:
    execution = _json(run_id or None)
    head = b'"stream_id":%b,"node_id":%b,"execution_id":%b' % (
        _json(stream),
        _json(node),
        execution,
    )
    return _Speaker(head, b',"run_id":%b' % execution if run_id else b"")


QUEEN: Final = _speaker("queen", None, "")  # where it is of no run
EVERYBODY: Final = _speaker("global", None, "")


class _Notice(NamedTuple):
    """An event of hive's that has no place yet.

    Attributes:
        data: As JSON, like the correlation id.
        piece: What it is the newest state of: a history has only the last one.
    """

    type: str
    data: bytes
    by: _Speaker
    correlation_id: bytes = b"null"
    piece: Hashable = None


def _line(notice: _Notice, timestamp: str, seq: int) -> bytes:
    line = (
        b'{"type":"%b",%b,"data":%b,"timestamp":"%b","correlation_id":%b,"colony_id":null%b,"seq":%d}'
        % (
            notice.type.encode(),
            notice.by.head,
            notice.data,
            timestamp.encode(),
            notice.correlation_id,
            notice.by.tail,
            seq,
        )
    )
    if LF in line or CR in line:  # there is JSON in it that somebody else has formatted
        try:
            return msgspec.json.format(line, indent=-1)
        except (msgspec.DecodeError, RecursionError):  # it is no JSON at all: one line, at least
            return line.replace(b"\n", b" ").replace(b"\r", b" ")
    return line


def _lines(notices: Sequence[_Notice], timestamp: str, seq: int) -> Iterator[bytes]:
    """The notices of one event: the last has its time, those before it one of their own."""
    for place, notice in enumerate(notices, 1 - len(notices)):
        own = f"{timestamp[:-1]}{-place:03d}Z" if place else timestamp
        yield _line(notice, own, seq)


def _frame(line: bytes, id: str = "") -> bytes:
    return b"id: %b\ndata: %b\n\n" % (id.encode(), line) if id else b"data: %b\n\n" % line


def _object(value: Raw | UnsetType, name: bytes) -> bytes:
    """JSON as hive wants it, which is an object; what is none is put into one."""
    text = b"null" if value is UNSET else bytes(value).strip()
    if text == b"null":
        return b"{}"
    return text if text.startswith(b"{") else b'{"%b":%b}' % (name, text)


def _text(value: Raw | UnsetType) -> str | None:
    """A string's own text, of anything else its JSON; None where there is nothing."""
    if value is UNSET or value == NULL:
        return None
    text = bytes(value).decode()
    return str(decode_json(value)) if text.lstrip().startswith('"') else text


def _fields(value: Raw | bytes) -> dict[str, Raw]:
    """The fields of an object, as they are; none of anything else, nor of what is too deep."""
    try:
        return msgspec.json.decode(value, type=dict[str, Raw])
    except (msgspec.DecodeError, RecursionError):
        return {}


def _shown_question(question: Question) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": question.id, "prompt": question.prompt}
    if question.kind == "confirm":
        shown["options"] = ["Yes", "No"]
    elif question.options:
        shown["options"] = [option.label or option.id for option in question.options]
    return shown


def _shown_trigger(trigger: TriggerChanged) -> dict[str, Any]:
    return {
        "trigger_id": trigger.trigger_id,
        "trigger_type": "timer",
        "trigger_config": {"interval_minutes": trigger.every_s / 60},
        "name": trigger.name,
    }


def _epoch(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


class _Stand(NamedTuple):
    """Where the queen stands."""

    activity: str | None
    park_reason: str | None = None
    interrupt_cause: str | None = None


EXECUTING: Final = _Stand("executing")
PAUSED: Final = _Stand("interrupted", None, "paused")


def _stand_after(outcome: str, error: Problem | None, receipt: Receipt | None) -> _Stand:
    cause = receipt.cause if receipt is not None else None
    match outcome:
        case "success":
            return _Stand("awaiting_user", "turn_done")
        case "error":
            return _Stand("interrupted", None, error.code if error else "error")
        case _:
            return _Stand(
                "interrupted", None, "user_stopped" if cause == "client_cancel" else cause
            )


# From our events to hive's ------------------------------------------------------------------------


@attrs.define(eq=False)
class _Piece:
    """What is being said, or thought.

    Attributes:
        place: The number of the event that began it.
        sent: What of it has been shown.
        held: What has not.
    """

    place: int
    is_thought: bool
    sent: str = ""
    held: list[str] = attrs.field(factory=list)
    _size: int = 0

    def take(self, delta: str) -> bool:
        """Add to it; whether it is time to show it."""
        self.held.append(delta)
        self._size += len(delta)
        shown = len(self.sent)
        return self._size > (shown // GROWTH if shown <= LONG else shown)

    def show(self) -> str:
        """Note that all of it is shown; what was new."""
        new = "".join(self.held)
        self.sent += new
        self.held.clear()
        self._size = 0
        return new


@attrs.define(eq=False)
class _Run:
    """What is remembered of a run until it is over.

    Attributes:
        wanted: The types that the reader gets of it.
        is_fresh: It has begun, and no model was called yet.
        task: Its input.
        steps: Where its model calls began.
        workers: Inputs of runs below it.
    """

    by: _Speaker
    is_worker: bool
    wanted: frozenset[str]
    is_fresh: bool = False
    task: Raw | UnsetType = UNSET
    pieces: dict[str, _Piece] = attrs.field(factory=dict)
    steps: dict[str, int] = attrs.field(factory=dict)
    values: dict[str, Raw] = attrs.field(factory=dict)
    workers: dict[str, Raw | UnsetType] = attrs.field(factory=dict)

    def notice(
        self, type: str, data: object, *, about: str | None = None, piece: Hashable = None
    ) -> _Notice:
        """Make an event of hive's; data that is bytes is JSON already."""
        encoded = data if isinstance(data, bytes) else _json(data)
        return _Notice(type, encoded, self.by, _json(about), piece)

    def state(self, stand: _Stand) -> list[_Notice]:
        """Say where the queen stands; a worker stands nowhere."""
        if self.is_worker:
            return []
        data = {**stand._asdict(), "questions": None}
        return [self.notice("loop_state_changed", data)]

    def text(self, place: int, new: str, snapshot: str) -> _Notice:
        """Show text; what a worker says is not for the person."""
        piece = (self.by, place)
        data: dict[str, Any] = {"content": new, "snapshot": snapshot}
        if self.is_worker:
            return self.notice("llm_text_delta", {**data, "inner_turn": place}, piece=piece)
        data |= {"inner_turn": 0, "iteration": place}
        return self.notice("client_output_delta", data, piece=piece)

    def progress(self, piece: _Piece) -> _Notice:
        """Show what was said so far."""
        new = piece.show()
        if not piece.is_thought:
            return self.text(piece.place, new, piece.sent)
        data = {"content": new, "inner_turn": 0, "iteration": piece.place}
        data["snapshot"] = piece.sent[-TAIL:]
        return self.notice("llm_reasoning_delta", data, piece=(self.by, piece.place))


@attrs.frozen
class Interest:
    """What a reader wants to hear.

    Attributes:
        types: Of hive's.
        watch: Streams of workers of which it wants all; `*` stands for every one.
    """

    types: frozenset[str] = DEFAULT
    watch: frozenset[str] = frozenset()

    def in_worker(self, stream: str) -> frozenset[str]:
        """The types that it gets of a worker."""
        if stream in self.watch or "*" in self.watch:
            return self.types
        return self.types & (META | GLOBAL)


@attrs.frozen(eq=False)
class _Mapping:
    """The pure machine in both encoders: an event of ours in, those of hive's out."""

    interest: Interest
    _runs: dict[str, _Run] = attrs.field(factory=dict)

    def take(self, event: AnyEvent) -> list[_Notice]:
        """Turn an event into those of hive's that the reader wants, in order."""
        run = self._runs.get(event.run_id) or self._begin(event)
        if type(event) is RunFinished:
            del self._runs[event.run_id]
        return [notice for notice in _notices(run, event) if notice.type in run.wanted]

    def _begin(self, event: AnyEvent) -> _Run:
        types = self.interest.types
        if not event.run_id:
            return _Run(QUEEN, is_worker=False, wanted=types | {"gap"})
        if not event.path:
            run = _Run(_speaker("queen", "queen", event.run_id), is_worker=False, wanted=types)
        else:
            stream = f"worker:{event.run_id}"
            by = _speaker(stream, event.path[-1], event.run_id)
            run = _Run(by, is_worker=True, wanted=self.interest.in_worker(stream))
        self._runs[event.run_id] = run
        return run


def _notices(run: _Run, event: AnyEvent) -> list[_Notice]:
    """Say in hive's words what has happened in a run."""
    match event:
        case PartDelta():
            piece = run.pieces.get(event.part_id)
            return [run.progress(piece)] if piece and piece.take(event.delta) else []
        case PartStarted():
            _open(run, event)
            return []
        case PartFinished():
            return _whole(run, event)
        case Liveness():
            late = [p for p in run.pieces.values() if p.held and len(p.sent) <= LONG]
            return [run.progress(piece) for piece in late]
        case ToolStarted():
            data = b'{"tool_use_id":%b,"tool_name":%b,"tool_input":%b}' % (
                _json(event.call_id),
                _json(event.name),
                _object(event.arguments, b"_raw"),
            )
            return [run.notice("tool_call_started", data, about=event.call_id)]
        case ToolFinished():
            data = b'{"tool_use_id":%b,"tool_name":%b,"result":%b,"is_error":%b}' % (
                _json(event.call_id),
                _json(event.name),
                _result(event),
                _json(event.is_error),
            )
            return [run.notice("tool_call_completed", data, about=event.call_id)]
        case ToolOutputDelta():
            value = {"tool_use_id": event.call_id, "delta": event.delta}
            return [run.notice("custom", {"name": "tool_output", "value": value})]
        case RunStarted():
            run.is_fresh, run.task = True, event.input
            data = b'{"input":%b}' % _object(event.input, b"input")
            return [*run.state(EXECUTING), run.notice("execution_started", data)]
        case RunFinished():
            return _worker_ended(run, event) if run.is_worker else _queen_ended(run, event)
        case StepStarted():
            return _iteration(run, event) if event.kind == "model" else []
        case StepFinished():
            return [_turn(run, event)] if event.kind == "model" else []
        case AgentStarted():
            if event.child_run_id is not None:
                run.workers[event.child_run_id] = event.input
            return []
        case AgentFinished():
            return [] if event.child_run_id is None else [_report(run, event, event.child_run_id)]
        case InputRequested():
            asked = _asked(event.questions)
            return [run.notice("client_input_requested", asked, about=event.request_id)]
        case InputReceived():
            received = {"content": _said(event.answers), "image_count": 0}
            return [run.notice("client_input_received", received, about=event.request_id)]
        case MessageReceived():
            received = {"content": event.text, "image_count": 0}
            return [run.notice("client_input_received", received, about=event.message_id)]
        case InputWithdrawn():
            return run.state(EXECUTING)
        case Paused():
            paused = run.notice("execution_paused", {"reason": event.reason or ""})
            return [*run.state(PAUSED), paused]
        case Resumed():
            return [*run.state(EXECUTING), run.notice("execution_resumed", {})]
        case ValuesChanged():
            return _values(run, event)
        case Custom():
            return [_emitted(run, event)]
        case TriggerChanged():
            return [_trigger(run, event)]
        case Gap():
            return [run.notice("gap", {"from": event.from_id, "to": event.to_id})]
        case _:
            return [_observed(run, event)]


def _observed(
    run: _Run,
    event: Retry
    | Failover
    | Stalled
    | LoopDetected
    | ContextUsage
    | Compacted
    | Moderation
    | ProviderEvent,
) -> _Notice:
    """What is only looked at: it changes nothing for whoever reads."""
    match event:
        case Retry(attempt=attempt, max=most, error=error):
            data = {"retry_count": attempt, "max_retries": most, "error": error.message}
            return run.notice("node_retry", data)
        case Failover():
            value = {"from": event.from_model, "to": event.to_model, "reason": event.reason}
            return run.notice("custom", {"name": "failover", "value": value})
        case Stalled(idle_s=idle):
            return run.notice("node_stalled", {"reason": f"nothing has come for {idle:g} s"})
        case LoopDetected(fingerprint=fingerprint, repeats=repeats):
            description = f"the same calls came {repeats} times: {fingerprint}"
            return run.notice("node_tool_doom_loop", {"description": description})
        case ContextUsage():
            usage = {
                "usage_ratio": event.ratio,
                "usage_pct": round(event.ratio * 100),
                "estimated_tokens": event.tokens,
                "max_context_tokens": event.limit,
                "trigger": "model_call",
            }
            return run.notice("context_usage_updated", usage)
        case Compacted(ratio_before=before, ratio_after=after):
            pressure = {"usage_before": round(before * 100), "usage_after": round(after * 100)}
            return run.notice("context_compacted", {"level": "llm", **pressure})
        case Moderation():
            if event.violation:
                found = {"constraint_id": "moderation", "description": event.message or ""}
                return run.notice("constraint_violation", found)
            seen = {"violation": False, "message": event.message}
            return run.notice("custom", {"name": "moderation", "value": seen})
        case ProviderEvent():
            sent = {"provider": event.provider, "raw": event.raw}
            return run.notice("custom", {"name": "provider_event", "value": sent})
        case _:
            assert_never(event)


def _open(run: _Run, event: PartStarted) -> None:
    """Begin to listen to a part, if the reader is to hear of it."""
    match event.kind:
        case "text" | "refusal":
            heard = {"llm_text_delta" if run.is_worker else "client_output_delta"}
        case "reasoning":
            heard = {"llm_reasoning_delta", "client_reasoning"}
        case "tool_call":
            return
        case _:
            assert_never(event.kind)
    if heard & run.wanted:
        run.pieces[event.part_id] = _Piece(event.seq, event.kind == "reasoning")


def _whole(run: _Run, event: PartFinished) -> list[_Notice]:
    """Show the whole of a part, also where its beginning was not seen."""
    piece = run.pieces.pop(event.part_id, None)
    place = event.seq if piece is None else piece.place
    if event.kind == "tool_call" or not event.text:
        return []
    if event.kind != "reasoning":
        new = event.text[len(piece.sent) if piece else 0 :]
        return [run.text(place, new, event.text)]
    data = {"reasoning": event.text, "inner_turn": 0, "iteration": place}
    whole = run.notice("client_reasoning", data, piece=(run.by, place))
    if piece is None or whole.type in run.wanted:
        return [whole]
    return [run.progress(piece)]


def _result(event: ToolFinished) -> bytes:
    """A tool's result as hive has it, which is text; of an error, what it says."""
    result = bytes(event.result).strip()
    if result.startswith(b'"'):
        return result
    said = bytes(_fields(result).get("error", NULL)) if event.is_error else b""
    return said if said.startswith(b'"') else _json(result.decode())


def _queen_ended(run: _Run, event: RunFinished) -> list[_Notice]:
    """Tell how a queen's execution ended, and that she can be spoken to; an error she says."""
    state = run.state(_stand_after(event.outcome, event.error, event.receipt))
    match event.outcome:
        case "success":
            data = b'{"output":%b}' % _object(event.result, b"result")
            return [*state, run.notice("execution_completed", data)]
        case "error":
            said = _failure(event)
            failed = run.notice("execution_failed", {"error": said})
            return [run.text(event.seq, said, said), *state, failed]
        case "cancelled" | "interrupted":
            return [*state, run.notice("execution_failed", {"error": _failure(event)})]
        case _:
            assert_never(event.outcome)


def _worker_ended(run: _Run, event: RunFinished) -> list[_Notice]:
    has_succeeded = event.outcome == "success"
    data = {
        "worker_id": event.run_id,
        "colony_id": None,
        "task": _text(run.task),
        "success": has_succeeded,
        "error": None if has_succeeded else _failure(event),
        "output_keys": [] if event.result is UNSET else list(_fields(event.result)),
    }
    return [run.notice("execution_completed" if has_succeeded else "execution_failed", data)]


def _failure(event: RunFinished) -> str:
    cause = event.receipt.cause
    if event.outcome == "error" and event.error is not None:
        return event.error.message
    return event.outcome if cause in (None, "client_cancel") else f"{event.outcome}: {cause}"


def _iteration(run: _Run, event: StepStarted) -> list[_Notice]:
    run.steps[event.step_id] = event.seq
    was_fresh, run.is_fresh = run.is_fresh, False
    again = run.notice("node_loop_iteration", {"iteration": event.seq})
    if not was_fresh:
        return [again]
    return [run.notice("node_loop_started", {"max_iterations": None}), again]


def _turn(run: _Run, event: StepFinished) -> _Notice:
    usage, reason = event.usage, event.finish_reason
    if event.error is not None:
        reason_shown = "cancelled" if event.error.code == "cancelled" else "error"
    else:
        reason_shown = reason or "stop"
    data: dict[str, Any] = {
        "stop_reason": reason_shown,
        "model": event.name,
        "input_tokens": usage.input_tokens if usage else 0,
        "output_tokens": usage.output_tokens if usage else 0,
        "cached_tokens": usage.cache_read_tokens if usage else 0,
        "cache_creation_tokens": usage.cache_write_tokens if usage else 0,
    }
    if (place := run.steps.pop(event.step_id, None)) is not None:
        data["iteration"] = place
    return run.notice("llm_turn_complete", data)


def _report(run: _Run, event: AgentFinished, worker_id: str) -> _Notice:
    """Tell how a worker fared, in its own stream; the run above it knows, exactly once."""
    if event.error is None:
        status = "success"
    else:
        status = "stopped" if event.error.code == "cancelled" else "failed"
    report = b"" if event.report is UNSET else bytes(event.report).strip()
    data = {
        "worker_id": worker_id,
        "colony_id": None,
        "task": _text(run.workers.pop(worker_id, UNSET)),
        "status": status,
        "summary": (event.error.message if event.error else _text(event.report)) or "",
        "data": Raw(report) if report.startswith(b"{") else {},
        "error": event.error.message if event.error else None,
        "duration_seconds": event.seconds,
        "tokens_used": event.usage.input_tokens + event.usage.output_tokens if event.usage else 0,
    }
    by = _speaker(f"worker:{worker_id}", event.agent, worker_id)
    return _Notice("subagent_report", _json(data), by)


def _asked(questions: Sequence[Question]) -> dict[str, Any]:
    """What a person is asked, in both forms that hive has had for it."""
    shown = [_shown_question(question) for question in questions]
    data = {"prompt": "\n".join(question["prompt"] for question in shown), "questions": shown}
    if len(shown) == 1 and "options" in shown[0]:
        data["options"] = shown[0]["options"]
    return {**data, "park_reason": "ask_user"}


def _said(answers: Raw) -> str:
    """Answers as a person would have written them."""
    words = []
    for answer in _fields(answers).values():
        match bytes(answer):
            case b"true":
                words.append("Yes")
            case b"false":
                words.append("No")
            case text if text.startswith(b"["):
                words.append(", ".join(map(str, decode_json(answer))))
            case _:
                words.append(_text(answer) or "")
    return "\n".join(words)


def _values(run: _Run, event: ValuesChanged) -> list[_Notice]:
    """One notice for each value; what it was before is known as far as it was seen."""
    notices = []
    for key, value in _fields(event.values).items():
        old = run.values.get(key, NULL)
        run.values[key] = Raw(bytes(value))  # else it would hold all that it came with
        data = {"key": key, "old_value": old, "new_value": value, "scope": "shared"}
        notices.append(run.notice("state_changed", data))
    return notices


def _emitted(run: _Run, event: Custom) -> _Notice:
    """What an agent has emitted: in hive's words, where it has them and may use them."""
    if event.name in TYPES and event.name not in RESERVED:
        by = EVERYBODY if event.name in GLOBAL else run.by
        return _Notice(event.name, _object(event.value, b"value"), by)
    return run.notice("custom", {"name": event.name, "value": event.value})


def _trigger(run: _Run, event: TriggerChanged) -> _Notice:
    data = _shown_trigger(event)
    match event.change:
        case "deactivated":
            del data["trigger_config"], data["trigger_type"]
        case "updated":
            data |= {"task": event.text, "entry_node": None}
        case "fired":
            data |= {"task": event.text, "fire_count": event.fired}
            if event.last_at is not None:
                data["last_fired_at"] = round(_epoch(event.last_at) * 1_000)
            if event.next_at is not None:
                data["next_fire_at"] = round(_epoch(event.next_at) * 1_000)
                data["next_fire_in"] = max(_epoch(event.next_at) - _epoch(event.ts), 0.0)
            if event.error is not None:
                data["error"] = event.error.message
        case "available" | "activated" | "removed":
            pass
        case _:
            assert_never(event.change)
    return run.notice(_TRIGGERS[event.change], data)


@attrs.frozen(eq=False)
class HiveEncoder:
    """A run in hive's frames; this is a worker's own stream, which hive never had."""

    mapping: _Mapping

    def feed(self, event: AnyEvent) -> list[bytes]:
        """Make the frames of an event; each has an id, so that a page may come back between."""
        lines = list(_lines(self.mapping.take(event), event.ts, event.seq))
        total = len(lines)
        return [
            _frame(line, frame_id(event.seq, part, total)) for part, line in enumerate(lines, 1)
        ]


@attrs.frozen(eq=False)
class HiveFeedEncoder:
    """A session, or the whole server, in hive's frames."""

    mapping: _Mapping

    def feed(self, event: AnyEvent, id: str) -> list[bytes]:
        """Make the frames of an event; the last one has the id, the others are parts of it."""
        lines = list(_lines(self.mapping.take(event), event.ts, _number(id)))
        last = len(lines)
        return [
            _frame(line, id if part == last or not id else f"{id}.{part}")
            for part, line in enumerate(lines, 1)
        ]


def _number(id: str) -> int:
    """An event's place in its feed; a gap has none."""
    return int(id.rpartition("-")[2] or 0)


# What somebody who comes is told first ------------------------------------------------------------


def session_snapshot(
    thread: ThreadSnapshot, events: Sequence[tuple[int, AnyEvent]] = ()
) -> dict[str, Any]:
    """Say where everything stands.

    Args:
        thread: As it stands.
        events: What its feed still holds, each with its number, where that is known.
    """
    run = thread.run
    match thread.state:
        case "idle":
            stand = _Stand(None)
            if run is not None and run.outcome is not None:
                stand = _stand_after(run.outcome, run.error, run.receipt)
        case "queued" | "running" | "cancelling":
            stand = EXECUTING
        case "waiting":
            stand = _Stand("awaiting_user", "ask_user")
        case "paused":
            stand = PAUSED
        case _:
            assert_never(thread.state)
    requests = run.questions if run is not None and thread.state == "waiting" else ()
    places = {(e.run_id, e.seq): number for number, e in events}
    heard = [e.ts for _, e in events if e.run_id and not e.path]
    is_executing = stand.activity == "executing"
    tools = [
        {
            "id": tool.call_id,
            "name": tool.name,
            "started_at": tool.ts,
            "execution_id": tool.run_id,
            "seq": places.get((tool.run_id, tool.seq)),
        }
        for tool in thread.tools
        if is_executing
    ]
    return {
        "snapshot_seq": _number(thread.last_event_id or ""),
        "activity": stand.activity,
        "is_executing": is_executing,
        "awaiting_input": stand.activity == "awaiting_user",
        "interrupted": stand.activity == "interrupted",
        "interrupt_cause": stand.interrupt_cause,
        "current_execution_id": run.id if run is not None and thread.state != "idle" else None,
        "current_tool_calls": tools,
        "queen_busy_reason": _busy_reason(stand.activity, is_in_tool=bool(tools)),
        "park_reason": stand.park_reason,
        "pending_questions": [_shown_question(q) for asked in requests for q in asked.questions]
        or None,
        "last_event_seq": places.get((requests[-1].run_id, requests[-1].seq)) if requests else None,
        "last_event_at": thread.last_event_at,
        "last_queen_event_at": heard[-1] if heard else None,
    }


def _busy_reason(activity: str | None, *, is_in_tool: bool) -> str | None:
    match activity:
        case "executing":
            return "tool" if is_in_tool else "llm"
        case "awaiting_user":
            return "awaiting_input"
        case _:
            return activity


def greet(thread: ThreadSnapshot | None, options: Hashable) -> bytes:
    """Make the first frames: where everything stands, and all triggers.

    They are of no event: they have no id, and the `seq` by which hive's page knows such.
    """
    if thread is None:
        return b""
    snapshot, types = session_snapshot(thread), _interest(options).types
    now = thread.last_event_at or thread.created
    by = _speaker("queen", "queen", snapshot["current_execution_id"] or "")
    notices = [_Notice("session_snapshot", _json(snapshot), by)]
    for trigger in thread.triggers:
        name = _TRIGGERS[trigger.change]
        if name in types:
            notices.append(_Notice(name, _json(_shown_trigger(trigger)), QUEEN))
    return b"".join(_frame(_line(notice, now, 0)) for notice in notices)


def replay(events: Sequence[AnyEvent], _options: Hashable) -> list[int]:
    """Choose what somebody who comes for the first time is told of what has been.

    That is what is seen in a conversation, and how each execution began and ended; not the
    triggers, which the greeting has. Of text that is complete, only the whole; a question that was
    answered, or whose run is over, not at all. An answer is the answer to all that its run has
    asked before: the page shows one question at a time.
    """
    wanted: set[int] = set()
    open_parts: dict[str, dict[str, list[int]]] = {}  # by run: where each was said
    open_requests: dict[str, dict[str, int]] = {}
    resting: dict[str, int] = {}
    for place, event in enumerate(events):
        match event:
            case PartDelta():
                parts = open_parts.setdefault(event.run_id, {})
                parts.setdefault(event.part_id, []).append(place)
            case Liveness():
                for deltas in open_parts.get(event.run_id, {}).values():
                    deltas.append(place)
            case PartFinished():
                open_parts.get(event.run_id, {}).pop(event.part_id, None)
                wanted.add(place)
            case InputRequested():
                open_requests.setdefault(event.run_id, {})[event.request_id] = place
            case InputReceived():
                open_requests.pop(event.run_id, None)
                wanted.add(place)
            case InputWithdrawn():
                open_requests.get(event.run_id, {}).pop(event.request_id, None)
            case Paused():
                resting[event.run_id] = place
            case Resumed():
                resting.pop(event.run_id, None)
            case RunFinished():
                for still in (open_requests, open_parts, resting):
                    still.pop(event.run_id, None)
                wanted.add(place)
            case RunStarted() | MessageReceived() | ToolStarted() | ToolFinished():
                wanted.add(place)
            case AgentFinished() | StepFinished() | TriggerChanged(change="fired"):
                wanted.add(place)
            case Custom():
                if event.name in REPLAYED:
                    wanted.add(place)
            case _:
                pass
    for parts in open_parts.values():
        wanted.update(place for deltas in parts.values() for place in deltas)
    for requests in open_requests.values():
        wanted.update(requests.values())
    return sorted(wanted.union(resting.values()))


# Requests -----------------------------------------------------------------------------------------


_Some: TypeAlias = Annotated[str, Meta(extra_json_schema={"minLength": 1})]
_Words: TypeAlias = Annotated[str, Meta(extra_json_schema={"pattern": r"\S"})]
_Empty: TypeAlias = Annotated[str, Meta(extra_json_schema={"maxLength": 0})]
_NoImages: TypeAlias = Annotated[list[Any], Meta(extra_json_schema={"maxItems": 0})]
_Id: TypeAlias = Annotated[
    str,
    Meta(
        extra_json_schema={
            "minLength": 1,
            "maxLength": MAX_NAME,
            "pattern": r"^(?!\.$)(?!.*\.\.)[^/\\]+$",
        }
    ),
]


class _OpenBody(msgspec.Struct):
    """What a session is to be.

    Attributes:
        session_id: A new one; without it the server makes one up. 1 to 200 printable characters
            without a slash, a backslash or two dots in a row.
        agent_id: Who is the queen.
        agent_path: The same, by the last part of a path.
        model: The same, by the `PROVIDER:MODEL` that it runs on.
        initial_prompt: Empty: what is said first is sent to the chat.
    """

    session_id: _Id | None = None
    agent_id: str | None = None
    agent_path: str | None = None
    model: str | None = None
    initial_prompt: _Empty | None = None


class _ChatBody(msgspec.Struct):
    """What is said to the queen.

    Attributes:
        message: Some text.
        display_message: What is shown of it, if it is something else.
        images: None: agents here read text.
    """

    message: _Words = ""
    display_message: str | None = None
    images: _NoImages | None = None


class _ContextBody(msgspec.Struct):
    """What the queen is to know.

    Attributes:
        message: Some text.
    """

    message: _Words = ""


class _InjectBody(msgspec.Struct):
    """What is said, and to whom.

    Attributes:
        node_id: `worker:ID`, or anything else for the queen.
    """

    node_id: Annotated[_Some, Meta(examples=["queen"])] = ""
    content: _Some = ""


class _TriggerBody(msgspec.Struct):
    """What is to be executed.

    Attributes:
        entry_point_id: The name of an agent; `default` is the session's.
        input_data: What it is given.
        session_state: It stands in the execution's metadata.
    """

    entry_point_id: str = "default"
    input_data: dict[str, Any] = msgspec.field(default_factory=dict)
    session_state: Any = None


class _StopBody(msgspec.Struct):
    """What is to be stopped."""

    execution_id: _Some = ""


class _PauseBody(msgspec.Struct):
    """Why the queen is to rest."""

    reason: str | None = None


class _ResumeBody(msgspec.Struct):
    """What is to go on.

    Attributes:
        checkpoint_id: There are none here: whatever is asked for is not found.
    """

    session_id: str | None = None
    checkpoint_id: str | None = None


def decode_open(request: Request) -> Intent:
    """`POST /sessions`."""
    body = read_body(request, _OpenBody, what="open a session with")
    if body.session_id is not None:
        _see_id("session_id", body.session_id)
    if body.initial_prompt:
        raise BadRequest("initial_prompt: expected none, got one; send it to /chat instead")
    folder = (body.agent_path or "").rstrip("/").rpartition("/")[2]
    return OpenThread(
        thread_id=body.session_id,
        agent=body.agent_id or folder or body.model or None,
        reply=_session_reply(201),
    )


def decode_list(_request: Request) -> Intent:
    """`GET /sessions`."""
    return ListThreads(
        reply=lambda threads: _reply({"sessions": [_session(thread) for thread in threads]})
    )


def decode_show(request: Request) -> Intent:
    """`GET /sessions/{sid}`."""
    return ShowThread(thread_id=_session_id(request), reply=_session_reply(200))


def decode_close(request: Request) -> Intent:
    """`DELETE /sessions/{sid}`."""
    return CloseThread(
        thread_id=_session_id(request),
        reply=lambda thread, _events: _reply({"session_id": thread.id, "stopped": True}),
    )


def decode_events(request: Request) -> Intent:
    """`GET /sessions/{sid}/events`."""
    return WatchFeed(
        thread_id=_session_id(request),
        after=request.headers.get("last-event-id") or None,
        must_exist=True,
        options=_read_interest(request, DEFAULT),
    )


def decode_global(request: Request) -> Intent:
    """`GET /events/global`."""
    return WatchFeed(
        after=request.headers.get("last-event-id") or None, options=_read_interest(request, GLOBAL)
    )


def decode_worker_events(request: Request) -> Intent:
    """`GET /sessions/{sid}/workers/{worker}/events`, and the same without the session."""
    if "session_id" in request.parameters:
        _session_id(request)
    try:
        after = parse_position(request.headers.get("last-event-id") or "0")
    except FieldError as error:
        raise BadRequest(str(error)) from error
    return Watch(
        run_id=request.parameters["worker_id"].removeprefix("worker:"),
        after=after,
        options=Interest(_read_interest(request, DEFAULT).types, frozenset("*")),
    )


def decode_chat(request: Request) -> Intent:
    """`POST /sessions/{sid}/chat`."""
    body = read_body(request, _ChatBody, what="chat with")
    if not body.message.strip():
        raise BadRequest("message is required: expected some text, got none")
    if body.images:
        raise BadRequest(f"images: expected none, got {len(body.images)}; agents here read text")
    return Tell(
        thread_id=_session_id(request),
        text=body.message,
        shown=body.display_message,
        must_exist=True,
        thread_reply=_delivered("queen"),
    )


def decode_inject(request: Request) -> Intent:
    """`POST /sessions/{sid}/inject`: to the queen, or to the worker that `node_id` names."""
    body = read_body(request, _InjectBody, what="inject")
    session_id = _session_id(request)
    if not body.node_id:
        raise BadRequest("node_id is required: expected 'queen' or 'worker:ID', got none")
    if not body.content:
        raise BadRequest("content is required: expected some text, got none")
    kind, colon, run_id = body.node_id.partition(":")
    if kind == "worker" and colon:
        return Tell(
            run_id=run_id,
            text=body.content,
            reply=lambda _run, _events: _reply({"delivered": True}),
        )
    return Tell(
        thread_id=session_id, text=body.content, must_exist=True, thread_reply=_delivered(None)
    )


def decode_context(request: Request) -> Intent:
    """`POST /sessions/{sid}/queen-context`: heard when the queen would have ended."""
    body = read_body(request, _ContextBody, what="tell the queen")
    if not body.message.strip():
        raise BadRequest("message is required: expected some text, got none")
    return Tell(
        thread_id=_session_id(request),
        text=body.message,
        mode="follow_up",
        must_exist=True,
        thread_reply=_delivered("queued"),
    )


def decode_trigger(request: Request) -> Intent:
    """`POST /sessions/{sid}/trigger`: an execution, of the agent that the entry point names."""
    body = read_body(request, _TriggerBody, what="trigger with")
    return Start(
        agent=None if body.entry_point_id == "default" else body.entry_point_id,
        input=body.input_data,
        delivery="background",
        on_disconnect="continue",
        thread_id=_session_id(request),
        must_exist=True,
        if_busy="enqueue",
        metadata=body.session_state,
        reply=lambda run, _events: _reply({"execution_id": run.id}),
    )


def decode_stop(request: Request) -> Intent:
    """`POST /sessions/{sid}/stop`."""
    body = read_body(request, _StopBody, what="stop")
    _session_id(request)
    if not body.execution_id:
        raise BadRequest("execution_id is required: expected the id of an execution, got none")
    return Cancel(
        run_id=body.execution_id,
        reply=lambda run, _events: _reply({"stopped": True, "execution_id": run.id}),
        reply_if_over=lambda run, _events: _not_stopped(run.id),
    )


def decode_cancel(request: Request) -> Intent:
    """`POST /sessions/{sid}/cancel-queen`: with all workers below her."""
    return Cancel(
        thread_id=_session_id(request),
        reply=lambda run, _events: _reply({"cancelled": True, "execution_id": run.id}),
        reply_if_idle=_reply({"cancelled": False}),
    )


def decode_pause(request: Request) -> Intent:
    """`POST /sessions/{sid}/pause`: before the queen's next step."""
    body = read_body(request, _PauseBody, what="pause with")
    return Pause(
        thread_id=_session_id(request),
        reason=body.reason,
        reply=lambda run, _events: _reply({"stopped": True, "execution_id": run.id}),
    )


def decode_resume(request: Request) -> Intent:
    """`POST /sessions/{sid}/resume`: what was paused goes on; there are no checkpoints."""
    body = read_body(request, _ResumeBody, what="resume")
    session_id = _session_id(request)
    if body.checkpoint_id is not None:
        raise _no_checkpoint(body.checkpoint_id)
    resumed = {"resumed_from": body.session_id or session_id, "checkpoint_id": None}
    return Pause(
        thread_id=session_id,
        resume=True,
        reply=lambda run, _events: _reply({"execution_id": run.id, **resumed}),
    )


def decode_replay(request: Request) -> Intent:
    """`POST /sessions/{sid}/replay`: there is nothing to replay from, whatever is asked for."""
    body = read_body(request, _ResumeBody, what="replay")
    _session_id(request)
    if body.checkpoint_id is None:
        raise BadRequest("checkpoint_id is required: expected the id of a checkpoint, got none")
    raise _no_checkpoint(body.checkpoint_id)


def decode_history(request: Request) -> Intent:
    """`GET /sessions/{sid}/events/history`: what the session's feed still holds."""
    interest = _read_interest(request, TYPES)
    limit = _read_number(request.query, "limit", PAGE)
    if not 1 <= limit <= MAX_PAGE:
        raise BadRequest(f"limit: expected a number from 1 to {MAX_PAGE}, got {limit}")
    before = _read_number(request.query, "before_index", 0)

    def reply(thread: ThreadSnapshot, events: Sequence[AnyEvent]) -> Reply:
        found = [
            (seq, line) for seq, line in _history(thread, events, interest) if not 0 < before <= seq
        ]
        page = found[-limit:]
        return _reply(
            {
                "events": [Raw(_lightened(line)) for _, line in page],
                "session_id": thread.id,
                "total": len(found),
                "returned": len(page),
                "truncated": len(page) < len(found),
                "limit": limit,
                "before_index": page[0][0] if len(page) < len(found) else None,
            }
        )

    return ShowThread(thread_id=_session_id(request), reply=reply)


def decode_snapshot(request: Request) -> Intent:
    """`GET /sessions/{sid}/snapshot`."""
    return ShowThread(
        thread_id=_session_id(request),
        reply=lambda thread, events: _reply(session_snapshot(thread, _numbered(thread, events))),
    )


def decode_stats(request: Request) -> Intent:
    """`GET /sessions/{sid}/stats`."""

    def reply(thread: ThreadSnapshot, events: Sequence[AnyEvent]) -> Reply:
        mapping = _Mapping(Interest(TYPES, frozenset("*")))
        types = Counter(notice.type for event in events for notice in mapping.take(event))
        return _reply(
            {
                "session_id": thread.id,
                "state": thread.state,
                "executions": len(thread.runs),
                "workers": len(thread.workers),
                "active_workers": sum(run.outcome is None for run in thread.workers),
                "triggers": len(thread.triggers),
                "total_events": _number(thread.last_event_id or ""),
                "events_by_type": dict(sorted(types.items())),
            }
        )

    return ShowThread(thread_id=_session_id(request), reply=reply)


def decode_goal(request: Request) -> Intent:
    """`GET /sessions/{sid}/goal-progress`: what was emitted under that name last."""

    def reply(_thread: ThreadSnapshot, events: Sequence[AnyEvent]) -> Reply:
        data: dict[str, Any] = {"progress": None, "criteria_status": None}
        for event in reversed(events):
            if isinstance(event, Custom) and event.name == "goal_progress":
                return _reply(data | decode_json(_object(event.value, b"progress")))
        return _reply(data)

    return ShowThread(thread_id=_session_id(request), reply=reply)


def decode_workers(request: Request) -> Intent:
    """`GET /sessions/{sid}/workers`."""
    return ShowThread(
        thread_id=_session_id(request),
        reply=lambda thread, _events: _reply({"workers": [_worker(run) for run in thread.workers]}),
    )


def _session_id(request: Request) -> str:
    session_id = request.parameters["session_id"]
    _see_id("session_id", session_id)
    return session_id


def _see_id(what: str, value: str) -> None:
    """Refuse what would be a path, if it ever became a part of one."""
    is_path = "/" in value or "\\" in value or ".." in value or value == "."
    if is_path or not value.isprintable() or not 0 < len(value) <= MAX_NAME:
        raise BadRequest(
            f"{what}: expected 1 to {MAX_NAME} printable characters without '/', '\\' and '..', "
            f"got {value[:40]!r}"
        )


def _interest(options: Hashable) -> Interest:
    assert isinstance(options, Interest | None)
    return options or Interest()


def _read_interest(request: Request, default: frozenset[str]) -> Interest:
    types = _names(request.query.get("types", ""))
    types = frozenset(name.lower() for name in types)
    if unknown := sorted(types - TYPES):
        raise BadRequest(
            f"types: expected some of {', '.join(sorted(TYPES))}, got {', '.join(unknown)[:80]!r}"
        )
    watch = _names(request.query.get("watch", ""))
    if unknown := sorted(name for name in watch if not re.fullmatch(r"\*|worker:.+", name)):
        raise BadRequest(
            "watch: expected streams of workers, such as worker:ID, or *, "
            f"got {', '.join(unknown)[:80]!r}"
        )
    return Interest(types or default, watch)


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _read_number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise BadRequest(f"{name}: expected a number, got {text[:20]!r}")
    return int(text)


def _no_checkpoint(checkpoint_id: str) -> NotFound:
    return NotFound(
        f"Checkpoint {checkpoint_id[:80]!r} not found: this server keeps none; a paused execution "
        "goes on with /resume and no checkpoint_id, another one begins with /trigger"
    )


# Answers ------------------------------------------------------------------------------------------


class _Question(msgspec.Struct):
    """What the queen asks."""

    id: str
    prompt: str
    options: list[str] | UnsetType = UNSET


class _ToolCall(msgspec.Struct):
    """A tool call that is under way."""

    id: str
    name: str
    started_at: str
    execution_id: str
    seq: int | None


class _Snapshot(msgspec.Struct):
    """Where everything stands."""

    snapshot_seq: int
    activity: Literal["executing", "awaiting_user", "interrupted"] | None
    is_executing: bool
    awaiting_input: bool
    interrupted: bool
    interrupt_cause: str | None
    current_execution_id: str | None
    current_tool_calls: list[_ToolCall]
    queen_busy_reason: Literal["tool", "llm", "awaiting_input", "interrupted"] | None
    park_reason: str | None
    pending_questions: list[_Question] | None
    last_event_seq: int | None
    last_event_at: str | None
    last_queen_event_at: str | None


class _EntryPoint(msgspec.Struct):
    """What starts an execution: a person, or a timer."""

    id: str
    name: str
    entry_node: str
    trigger_type: str
    trigger_config: dict[str, Any]
    trigger_id: str | UnsetType = UNSET
    fire_count: int | UnsetType = UNSET


class _Session(msgspec.Struct):
    """A session as it stands; what hive keeps in folders is empty.

    Attributes:
        loaded_at: Seconds since 1970.
    """

    session_id: str
    agent_id: str
    agent_path: str
    worker_id: str | None
    worker_name: str | None
    has_worker: bool
    colony_id: str | None
    queen_id: str
    queen_name: str
    queen_phase: str
    description: str
    goal: str
    node_count: int
    intro_message: str
    loaded_at: float
    state: ThreadState
    execution_ids: list[str]
    entry_points: list[_EntryPoint]
    is_executing: bool
    awaiting_input: bool
    interrupted: bool
    queen_busy_reason: str | None


class _Sessions(msgspec.Struct):
    """Sessions, the newest first."""

    sessions: list[_Session]


class _Closed(msgspec.Struct):
    """A session that is gone."""

    session_id: str
    stopped: bool


class _History(msgspec.Struct):
    """A page of what has happened, the oldest first.

    Attributes:
        total: How many events there are of what was asked for.
        before_index: For the page before this one; null where there is none.
    """

    events: list[dict[str, Any]]
    session_id: str
    total: int
    returned: int
    truncated: bool
    limit: int
    before_index: int | None


class _Stats(msgspec.Struct):
    """Counts of a session."""

    session_id: str
    state: ThreadState
    executions: int
    workers: int
    active_workers: int
    triggers: int
    total_events: int
    events_by_type: dict[str, int]


class _Goal(msgspec.Struct):
    """The last `goal_progress` that an agent has emitted."""

    progress: Any
    criteria_status: Any


class _Worker(msgspec.Struct):
    """A child run."""

    worker_id: str
    stream_id: str
    agent_id: str
    status: Literal["pending", "running", "completed", "failed", "stopped"]
    started_at: str | None
    finished_at: str | None
    result: Any
    error: str | None
    tokens_used: int


class _Workers(msgspec.Struct):
    """Child runs, the oldest first."""

    workers: list[_Worker]


class _Told(msgspec.Struct):
    """What was said has come to somebody."""

    status: Literal["queen", "queued"]
    delivered: bool


class _Injected(msgspec.Struct):
    """What was said has come to somebody."""

    delivered: bool


class _Triggered(msgspec.Struct):
    """An execution that has begun, or waits for its turn."""

    execution_id: str


class _Stopped(msgspec.Struct):
    """An execution that was stopped, or rests."""

    stopped: bool
    execution_id: str


class _Cancelled(msgspec.Struct):
    """Whether something was cancelled, and what."""

    cancelled: bool
    execution_id: str | UnsetType = UNSET


class _Resumed(msgspec.Struct):
    """An execution that goes on."""

    execution_id: str
    resumed_from: str
    checkpoint_id: None


def _reply(data: object, status: int = 200) -> Reply:
    return Reply(_json(data), status)


def _session_reply(status: int) -> ThreadReply:
    return lambda thread, _events: _reply(_session(thread), status)


def _delivered(status: str | None) -> ThreadReply:
    said = {"delivered": True} if status is None else {"status": status, "delivered": True}
    return lambda _thread, _events: _reply(said)


def _not_stopped(run_id: str) -> Reply:
    return _reply({"stopped": False, "error": f"Execution {run_id[:80]!r} not found"}, 404)


def _session(thread: ThreadSnapshot) -> dict[str, Any]:
    """A session as hive shows it; what it has of hive's own agents' folders is empty."""
    snapshot = session_snapshot(thread)
    manual = {"id": "default", "name": "Default", "entry_node": "queen", "trigger_type": "manual"}
    timers = [
        {"id": t.trigger_id, "entry_node": "queen", **_shown_trigger(t), "fire_count": t.fired}
        for t in thread.triggers
    ]
    return {
        "session_id": thread.id,
        "agent_id": thread.agent,
        "agent_path": "",
        "worker_id": None,
        "worker_name": None,
        "has_worker": bool(thread.workers),
        "colony_id": None,
        "queen_id": thread.agent,
        "queen_name": thread.agent,
        "queen_phase": "independent",
        "description": "",
        "goal": "",
        "node_count": 0,
        "intro_message": "",
        "loaded_at": _epoch(thread.created),
        "state": thread.state,
        "execution_ids": thread.runs,
        "entry_points": [{**manual, "trigger_config": {}}, *timers],
        **{
            name: snapshot[name]
            for name in ("is_executing", "awaiting_input", "interrupted", "queen_busy_reason")
        },
    }


def _worker(run: RunSnapshot) -> dict[str, Any]:
    match run.outcome:
        case None:
            status = "pending" if run.state == "queued" else "running"
        case "success":
            status = "completed"
        case "error":
            status = "failed"
        case _:
            status = "stopped"
    return {
        "worker_id": run.id,
        "stream_id": f"worker:{run.id}",
        "agent_id": run.agent,
        "status": status,
        "started_at": run.started,
        "finished_at": run.finished,
        "result": run.result,
        "error": run.error.message if run.error else None,
        "tokens_used": run.usage.input_tokens + run.usage.output_tokens,
    }


def _numbered(thread: ThreadSnapshot, events: Sequence[AnyEvent]) -> Sequence[tuple[int, AnyEvent]]:
    """What a feed holds, each with its number: the newest has the feed's last one."""
    return list(enumerate(events, _number(thread.last_event_id or "") + 1 - len(events)))


def _history(
    thread: ThreadSnapshot, events: Sequence[AnyEvent], interest: Interest
) -> list[tuple[int, bytes]]:
    """What has happened, each with its number; of text, the last that was shown of each piece."""
    mapping = _Mapping(interest)
    found: dict[Hashable, tuple[int, bytes]] = {}
    for number, event in _numbered(thread, events):
        notices = mapping.take(event)
        for place, line in enumerate(_lines(notices, event.ts, number)):
            piece = notices[place].piece
            key = (number, place) if piece is None else piece
            found.pop(key, None)
            found[key] = (number, line)
    return list(found.values())


def _lightened(line: bytes) -> bytes:
    """An event without its heavy fields; what is streamed keeps them."""
    if len(line) <= HEAVY:
        return line
    try:
        event = msgspec.json.decode(line, type=dict[str, Raw])
        data = msgspec.json.decode(event["data"], type=dict[str, Raw])
    except (msgspec.DecodeError, RecursionError):  # what somebody has made up as `Raw`
        return _json({"type": "custom", "_truncated": True, "_original_bytes": len(line)})
    shown: dict[str, Any] = dict(data)
    for name, value in data.items():
        if (size := len(bytes(value))) > HEAVY:
            shown[name] = {"_truncated": True, "_original_bytes": size}
    return _json({**event, "data": shown})


def present(run: RunSnapshot) -> bytes:
    """An execution, where nothing else is said of it."""
    return _json(
        {
            "execution_id": run.id,
            "session_id": run.thread_id,
            "agent_id": run.agent,
            "state": run.state,
            "outcome": run.outcome,
            "output": run.result,
            "error": run.error.message if run.error else None,
        }
    )


_MISSING = re.compile(r"expected the id of a (thread|run) .*, got (['\"])(.*)\2", re.DOTALL)


def hive_problem(problem: Problem) -> Reply:
    """An error as hive says it: one sentence, under `error`."""
    status = problem.status if 400 <= problem.status < 600 else 500
    if (missing := _MISSING.fullmatch(problem.message)) is None:
        return _reply({"error": problem.message}, status)
    what, _, name = missing.groups()
    if what == "run":
        return _not_stopped(name)
    return _reply({"error": f"Session '{name}' not found"}, status)


_SESSION = "/sessions/<session_id>"


def _said_in_query(default: str) -> dict[str, Any]:
    names = list[Annotated[str, Meta(extra_json_schema={"enum": sorted(TYPES)})]]
    about = f"Only events of these types; unless said, {default}."
    return {"types": Annotated[names, Meta(description=about)]}


_WATCH: Any = Annotated[
    list[Annotated[str, Meta(pattern=r"^([*]|worker:[^,\s]+)$")]],
    Meta(description="Workers of whom all is heard, such as `worker:ID`; `*` for every one."),
]
_HEARD: Final = {**_said_in_query("those that hive's page listens to"), "watch": _WATCH}
_HISTORY: Final[Mapping[str, Any]] = {
    **_said_in_query("all"),
    "watch": _WATCH,
    "limit": Annotated[
        int, Meta(ge=1, le=MAX_PAGE, description=f"How many at most, {PAGE} unless said.")
    ],
    "before_index": Annotated[
        int,
        Meta(
            ge=0,
            lt=10**15,
            description="Only what came before this `seq`, as the last page said it.",
        ),
    ],
}
_WORKER: Final = Doc(
    summary="Stream a worker's events, or those of any run", query=_HEARD, answers={200: (SSE,)}
)

HIVE = Dialect(
    name="hive",
    mount="/api",
    routes=(
        Route(
            "POST",
            "/sessions",
            decode_open,
            doc=Doc(summary="Open a session", body=_OpenBody, answers={201: (_Session,)}),
        ),
        Route(
            "GET",
            "/sessions",
            decode_list,
            doc=Doc(summary="List the sessions", answers={200: (_Sessions,)}),
        ),
        Route(
            "GET",
            _SESSION,
            decode_show,
            doc=Doc(summary="Show a session", answers={200: (_Session,)}),
        ),
        Route(
            "DELETE",
            _SESSION,
            decode_close,
            doc=Doc(summary="Close a session", answers={200: (_Closed,)}),
        ),
        Route(
            "GET",
            f"{_SESSION}/events",
            decode_events,
            doc=Doc(summary="Stream a session's events", query=_HEARD, answers={200: (SSE,)}),
        ),
        Route(
            "GET",
            f"{_SESSION}/events/history",
            decode_history,
            doc=Doc(
                summary="List a session's events, a page at a time",
                query=_HISTORY,
                answers={200: (_History,)},
            ),
        ),
        Route(
            "GET",
            f"{_SESSION}/snapshot",
            decode_snapshot,
            doc=Doc(summary="Show where a session stands", answers={200: (_Snapshot,)}),
        ),
        Route(
            "GET",
            f"{_SESSION}/stats",
            decode_stats,
            doc=Doc(summary="Show a session's counts", answers={200: (_Stats,)}),
        ),
        Route(
            "GET",
            f"{_SESSION}/goal-progress",
            decode_goal,
            doc=Doc(summary="Show how far a session's goal is", answers={200: (_Goal,)}),
        ),
        Route(
            "GET",
            f"{_SESSION}/workers",
            decode_workers,
            doc=Doc(summary="List a session's workers", answers={200: (_Workers,)}),
        ),
        Route("GET", f"{_SESSION}/workers/<worker_id>/events", decode_worker_events, doc=_WORKER),
        Route("GET", "/workers/<worker_id>/events", decode_worker_events, doc=_WORKER),
        Route(
            "GET",
            "/events/global",
            decode_global,
            doc=Doc(
                summary="Stream what happens on the server",
                query={**_said_in_query("those of no session"), "watch": _WATCH},
                answers={200: (SSE,)},
            ),
        ),
        Route(
            "POST",
            f"{_SESSION}/chat",
            decode_chat,
            doc=Doc(summary="Chat with the queen", body=_ChatBody, answers={200: (_Told,)}),
        ),
        Route(
            "POST",
            f"{_SESSION}/inject",
            decode_inject,
            doc=Doc(
                summary="Say something to the queen, or to a worker",
                body=_InjectBody,
                answers={200: (_Injected,)},
            ),
        ),
        Route(
            "POST",
            f"{_SESSION}/queen-context",
            decode_context,
            doc=Doc(
                summary="Tell the queen something for her next turn",
                body=_ContextBody,
                answers={200: (_Told,)},
            ),
        ),
        Route(
            "POST",
            f"{_SESSION}/trigger",
            decode_trigger,
            doc=Doc(summary="Begin an execution", body=_TriggerBody, answers={200: (_Triggered,)}),
        ),
        Route(
            "POST",
            f"{_SESSION}/stop",
            decode_stop,
            doc=Doc(summary="Stop an execution", body=_StopBody, answers={200: (_Stopped,)}),
        ),
        Route(
            "POST",
            f"{_SESSION}/cancel-queen",
            decode_cancel,
            doc=Doc(
                summary="Cancel what goes on in a session, workers included",
                answers={200: (_Cancelled,)},
            ),
        ),
        Route(
            "POST",
            f"{_SESSION}/pause",
            decode_pause,
            doc=Doc(
                summary="Let the queen rest before her next step",
                body=_PauseBody,
                answers={200: (_Stopped,)},
            ),
        ),
        Route(
            "POST",
            f"{_SESSION}/resume",
            decode_resume,
            doc=Doc(summary="Let the queen go on", body=_ResumeBody, answers={200: (_Resumed,)}),
        ),
        Route(
            "POST",
            f"{_SESSION}/replay",
            decode_replay,
            doc=Doc(
                summary="Not found, ever: there are no checkpoints", body=_ResumeBody, answers={}
            ),
        ),
    ),
    encoder=lambda options: HiveEncoder(_Mapping(_interest(options))),
    present=present,
    framing=Framing(prelude=KEEPALIVE, heartbeat=KEEPALIVE, farewell=retry),
    feed=FeedForm(
        encoder=lambda options: HiveFeedEncoder(_Mapping(_interest(options))),
        greeting=greet,
        replay=replay,
        plain=frozenset({Interest(DEFAULT), Interest(GLOBAL)}),
    ),
    on_disconnect="continue",
    locate=lambda mount, run, *_: {"Location": f"{mount}/workers/{run}/events"},
    problem=hive_problem,
)
