"""Kilroy's protocol: a pipeline is submitted, watched, asked about, answered and cancelled.

Knows: its routes, its bodies, and the vocabulary of its progress events. Must never know what a
run is beyond its events and its snapshot. The wire is that of danshapiro/kilroy: the server of its
pull request 54, and what its main branch has added since.

Progress goes out as unnamed frames, so that `onmessage` of an EventSource sees them, with the type
in the field `event`; the one named frame is `done`, and it comes behind the end of the run only:
a stream that breaks off has none. What is ours beside it: frames have ids, and so a reader that
comes back goes on where it was, where kilroy would tell it everything again.

Many things happen in a run that kilroy has no word for, and some that it keeps to itself (thoughts,
the arguments of tools and what they print, questions, which are to be polled): none of them goes
out. A tool call that the model has only written down is counted; it is shown when it is carried
out.
"""

import re
import zlib
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeAlias, assert_never

import attrs
import msgspec
from msgspec import Meta, Raw, UnsetType

from agentsse.errors import BadRequest
from agentsse.events import (
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
    Outcome,
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
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    TriggerChanged,
    ValuesChanged,
    decode_json,
)
from agentsse.sse import FieldError, comment, encode, frame_id, parse_position, retry

from . import (
    SSE,
    Answer,
    Cancel,
    Dialect,
    Doc,
    Framing,
    Intent,
    ListRuns,
    Reply,
    Request,
    Route,
    Show,
    Start,
    Watch,
    read_body,
)

COALESCE: Final = 0.1  # seconds; so often does kilroy let text out
MOST_RUNS: Final = 100_000  # that are listed, or counted: all there are
_ID: Final = "[a-zA-Z0-9][a-zA-Z0-9_-]{0,127}"
RUN_ID: Final = re.compile(_ID)
DIGRAPH: Final = re.compile(
    r"\bdigraph\s+(?:\"([^\"\n]{1,200})\"|([\w.-]{1,200}))\s*\{", re.IGNORECASE
)

SPOKEN: Final = frozenset({"text", "refusal"})  # what a model says to whoever reads
STAGES: Final = frozenset({"flow", "node"})
ENVELOPE: Final = ("event", "ts", "run_id", "id")
TERMINAL: Final = frozenset({"done", "run_completed", "run_failed"})  # nobody's but the run's own

LF, CR = b"\n\r"
_Said: TypeAlias = tuple[str, dict[str, Any]]
_object = msgspec.json.Decoder(dict[str, Raw])
_any = msgspec.json.Decoder(Raw)


# Events -------------------------------------------------------------------------------------------


@attrs.define
class _Stage:
    name: str
    attempt: int
    most: int
    around: str  # the step id of the stage that it is part of; empty for none

    def named(self) -> dict[str, Any]:
        return {"node_id": self.name, "attempt": self.attempt, "max": self.most}


@attrs.define
class _Turn:
    provider: str
    model: str
    text_length: int = 0
    calls: set[str] = attrs.field(factory=set)


@attrs.define(eq=False)
class KilroyEncoder:
    """Events as kilroy's progress; it remembers where in the pipeline the run is."""

    _agent: str = ""
    _salt: int = 0
    _stages: dict[str, _Stage] = attrs.field(factory=dict)  # open ones by step id, innermost last
    _turns: dict[str, _Turn] = attrs.field(factory=dict)  # open model calls by step id
    _behind: dict[str, str] = attrs.field(factory=dict)  # in a stage: which step ended there last
    _attempts: dict[str, int] = attrs.field(factory=dict)  # failed ones, since the last success
    _hop: str = "edge_selection"  # why the next edge is taken
    _branches: dict[str, str] = attrs.field(factory=dict)  # keys of open ones, by run id
    _branched: int = 0

    def feed(self, event: AnyEvent) -> tuple[bytes, ...]:
        """Make the frames of an event; of most events none or one."""
        said = self.say(event)
        is_end = isinstance(event, RunFinished)
        parts = len(said) + is_end
        frames = [
            self._frame(event, part, frame_id(event.seq, part, parts), name, fields)
            for part, (name, fields) in enumerate(said, 1)
        ]
        if is_end:
            frames.append(encode(b"{}", event="done", id=str(event.seq)))
        return tuple(frames)

    def _frame(
        self, event: AnyEvent, part: int, id: str, name: str, fields: Mapping[str, Any]
    ) -> bytes:
        envelope = {
            "ts": event.ts,
            "run_id": event.run_id,
            "id": f"{(self._salt + (event.seq << 3) + part) & 0xFFFFFFFF:08x}",  # one of its own
        }
        data = msgspec.json.encode({"event": name, **fields, **envelope})
        if LF in data or CR in data:  # there is JSON in it that somebody else has formatted
            return encode(data, id=id)
        return b"id: %b\ndata: %b\n\n" % (id.encode(), data)

    def say(self, event: AnyEvent) -> Sequence[_Said]:
        """Tell what becomes of an event: names and fields, without what all events have."""
        match event:
            case PartDelta():
                if event.kind not in SPOKEN:
                    return ()
                return (("llm_text_delta", self._at_node(backend="api", delta=event.delta)),)
            case PartStarted():
                if event.kind == "tool_call":
                    self._count(event.call_id or event.part_id)
                return ()
            case PartFinished():
                if event.kind in SPOKEN and (turn := self._turn) is not None:
                    text = event.text
                    turn.text_length += len(text if text.isascii() else text.encode())
                return ()
            case ToolStarted():
                self._count(event.call_id)
                return (("llm_tool_call_start", self._call(event)),)
            case ToolOutputDelta():
                self._count(event.call_id)
                return ()
            case ToolFinished():
                self._count(event.call_id)
                return (("llm_tool_call_end", self._call(event, is_error=event.is_error)),)
            case StepStarted():
                return self._begin(event)
            case StepFinished():
                return self._finish(event)
            case Retry():
                return self._retry(event)
            case Failover():
                return (("llm_failover", self._at_node(**_failover(event))),)
            case Liveness():
                beat = self._at_node(
                    elapsed_s=int(event.elapsed_s),
                    event_count=event.events,
                    since_last_output_s=int(event.since_last_output_s),
                )
                return (("stage_heartbeat", beat),)
            case AgentStarted():
                return self._branch_off(event)
            case AgentFinished():
                return self._join(event)
            case Stalled():
                limit, idle = _milliseconds(event.limit_s), _milliseconds(event.idle_s)
                return (("stall_watchdog_timeout", {"stall_timeout_ms": limit, "idle_ms": idle}),)
            case LoopDetected():
                message = f"Loop detected: {event.fingerprint} came {event.repeats} times in a row"
                return (("warning", {"message": message}),)
            case ContextUsage():
                message = f"Context usage at ~{event.ratio:.0%} of context window"
                return (("warning", {"message": message}),)
            case Custom():
                return (_custom(event),)
            case RunStarted():
                self._agent, self._salt = event.agent, zlib.crc32(event.run_id.encode())
                return ()
            case RunFinished():
                return (_end(event),)
            case (
                InputRequested()
                | InputReceived()
                | InputWithdrawn()
                | MessageReceived()
                | Paused()
                | Resumed()
                | ValuesChanged()
                | Compacted()
                | Moderation()
                | ProviderEvent()
                | TriggerChanged()
                | Gap()
            ):
                return ()
            case _:
                assert_never(event)

    # Where the run is

    @property
    def _turn(self) -> _Turn | None:
        return next(reversed(self._turns.values()), None)

    def _at_node(self, **fields: Any) -> dict[str, Any]:
        stage = next(reversed(self._stages.values()), None)
        return {"node_id": stage.name if stage else self._agent, **fields}

    def _begin(self, event: StepStarted) -> Sequence[_Said]:
        match event.kind:
            case "model":
                provider, _, model = event.name.partition(":")
                self._turns[event.step_id] = _Turn(provider, model)
                named = {"provider": provider, "model": model, "backend": "api", "source": "node"}
                return (("provider_selected", self._at_node(**named)),)
            case "flow" | "node":
                return self._begin_stage(event)
            case "tool_round":
                return ()
            case _:
                assert_never(event.kind)

    def _begin_stage(self, event: StepStarted) -> list[_Said]:
        name, around = event.name, next(reversed(self._stages), "")
        attempt = self._attempts.get(name, 0) + 1
        stage = self._stages[event.step_id] = _Stage(name, attempt, attempt, around)
        said = [("stage_attempt_start", stage.named())]
        if event.kind == "flow":
            came_from, hop = self._behind.get(around), self._hop
            self._hop = "edge_selection"
            is_again = came_from == name and attempt > 1
            if came_from is not None and not is_again:
                edge = {"from_node": came_from, "to_node": name, "label": "", "condition": ""}
                said.insert(0, ("edge_selected", {**edge, "hop_source": hop}))
        return said

    def _finish(self, event: StepFinished) -> Sequence[_Said]:
        match event.kind:
            case "model":
                turn = self._turns.pop(event.step_id, None) or _Turn("", "")
                if event.error is not None:  # there was no such turn, or it broke off
                    return ()
                counts = {"text_length": turn.text_length, "tool_call_count": len(turn.calls)}
                return (("llm_turn_end", self._at_node(backend="api", **counts)),)
            case "flow" | "node":
                return (self._finish_stage(event),)
            case "tool_round":
                return ()
            case _:
                assert_never(event.kind)

    def _finish_stage(self, event: StepFinished) -> _Said:
        stage = self._stages.pop(event.step_id, None) or _Stage(event.name, 1, 1, "")
        self._behind.pop(event.step_id, None)
        if event.kind == "flow":
            self._behind[stage.around] = event.name
        if event.error is None:
            self._attempts.pop(event.name, None)
        else:
            self._attempts[event.name] = stage.attempt
        return "stage_attempt_end", stage.named() | _status(event.error)

    def _count(self, call_id: str) -> None:
        if (turn := self._turn) is not None:
            turn.calls.add(call_id)

    def _call(self, event: ToolStarted | ToolFinished, **more: Any) -> dict[str, Any]:
        return self._at_node(backend="api", tool_name=event.name, call_id=event.call_id, **more)

    def _retry(self, event: Retry) -> list[_Said]:
        """A model is called again, a stage is gone through again, or the whole pipeline is."""
        delay = _milliseconds(event.delay_s)
        if (turn := self._turn) is not None:
            call = {"provider": turn.provider, "model": turn.model}
            tries = {"attempt": event.attempt, "max": event.max, "delay_ms": delay}
            failed = {"error": event.error.message, "retryable": True}
            return [("llm_retry", self._at_node(**call, **tries, **failed))]
        tried = self._at_node(attempt=event.attempt, delay_ms=delay)
        sleep = (
            "stage_retry_sleep",
            tried | {"retries": event.attempt, "max_retry": event.max - 1},
        )
        if (stage := next(reversed(self._stages.values()), None)) is None:
            self._hop = "retry_target"
            return [sleep]
        stage.most = max(stage.attempt + 1, event.max)
        ended = ("stage_attempt_end", stage.named() | _status(event.error))
        stage.attempt += 1
        return [ended, sleep, ("stage_attempt_start", stage.named())]

    # Branches: child runs

    def _branch_off(self, event: AgentStarted) -> Sequence[_Said]:
        if event.child_run_id is None:
            return ()
        self._branched += 1
        key = self._branches[event.child_run_id] = f"{event.agent}:{self._branched}"
        return (_branch(key, "branch_subgraph_start", event.child_run_id),)

    def _join(self, event: AgentFinished) -> Sequence[_Said]:
        if event.child_run_id is None:
            return ()
        key = self._branches.pop(event.child_run_id, event.agent)
        name, fields = _branch(key, "branch_subgraph_done", event.child_run_id)
        ended = {f"branch_{field}": value for field, value in _status(event.error).items()}
        return ((name, {**fields, **ended}),)


def _branch(key: str, what: str, run_id: str) -> _Said:
    fields = {"branch_key": key, "branch_logs_root": "", "branch_event": what}
    return "branch_progress", {**fields, "branch_run_id": run_id}  # ours: where it can be watched


def _status(error: Problem | None) -> dict[str, str]:
    if error is None:
        return {"status": "success", "failure_reason": ""}
    return {"status": "fail", "failure_reason": error.message}


def _failover(event: Failover) -> dict[str, str]:
    from_provider, _, from_model = event.from_model.partition(":")
    to_provider, _, to_model = event.to_model.partition(":")
    return {
        "from_provider": from_provider,
        "from_model": from_model,
        "to_provider": to_provider,
        "to_model": to_model,
        "reason": event.reason,
    }


def _custom(event: Custom) -> _Said:
    """What an agent has emitted, as if kilroy had; but nobody else may say that the run is over."""
    if event.name in TERMINAL:
        return "custom", {"name": event.name, "value": _closed(event.value)}
    try:
        fields: dict[str, Any] = _object.decode(event.value)
    except (msgspec.DecodeError, RecursionError):  # it is no object
        return event.name, {"value": _closed(event.value)}
    for field in ENVELOPE:
        fields.pop(field, None)
    return event.name, fields


def _closed(value: Raw) -> Raw | str:
    """JSON as it is; as text what is none, for beside its place it might say anything."""
    try:
        return _any.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return bytes(value).decode(errors="replace")


def _end(event: RunFinished) -> _Said:
    if event.outcome == "success":
        return "run_completed", {"status": "success"}
    reason = _reason(event.outcome, event.error, event.receipt)
    return "run_failed", {"status": _state(event.outcome), "reason": reason}


def _state(outcome: Outcome | None) -> str:
    match outcome:
        case None:
            return "running"
        case "success":
            return "success"
        case "cancelled":
            return "canceled"
        case "error" | "interrupted":
            return "fail"
        case _:
            assert_never(outcome)


def _reason(outcome: Outcome | None, error: Problem | None, receipt: Receipt | None) -> str:
    if outcome == "success":
        return ""
    if error is not None:
        return error.message
    return (receipt and receipt.cause) or ""


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


# Requests -----------------------------------------------------------------------------------------


class _SubmitBody(msgspec.Struct):
    """A pipeline: `workflow`, `package_path`, or one of `dot_source` and `dot_source_path`.

    The agent that runs it is given the whole body.

    Attributes:
        dot_source: A graph in DOT; the agent of the digraph's name runs it, if there is one.
        workflow: The name of the agent.
        run_id: The run's id, which must be new.
    """

    dot_source: str | None = None
    dot_source_path: str | None = None
    workflow: str | None = None
    package_path: str | None = None
    config_path: str | None = None
    run_id: Annotated[str, Meta(extra_json_schema={"pattern": rf"^(\s*{_ID}\s*)?$"})] | None = None


class _AnswerBody(msgspec.Struct):
    """An answer: one of these."""

    value: str | None = None
    values: list[str] | None = None
    text: str | None = None


def decode_submit(request: Request) -> Intent:
    """`POST /runs`: the agent is the workflow; it is given the whole body."""
    body = read_body(request, _SubmitBody, what="submit a pipeline with")
    sources = [name for name in ("dot_source", "dot_source_path") if getattr(body, name)]
    if not (body.workflow or body.package_path or sources):
        raise BadRequest(
            "expected dot_source, dot_source_path, workflow or package_path, got none of them"
        )
    if len(sources) == 2:
        raise BadRequest("expected dot_source or dot_source_path, got both; drop one of them")
    run_id = (body.run_id or "").strip()
    if body.run_id and not RUN_ID.fullmatch(run_id):
        raise BadRequest(
            "run_id: expected 1 to 128 letters, digits, '-' and '_', the first a letter or a "
            f"digit, got {body.run_id[:40]!r}"
        )
    named = DIGRAPH.search(body.dot_source or "")
    return Start(
        agent=body.workflow or None,
        otherwise=() if named is None else (named[1] or named[2],),
        input=decode_json(request.body),
        delivery="background",
        run_id=run_id or None,
        coalesce=COALESCE,
        metadata=None if named is None else {"digraph": named[1] or named[2]},
        reply=_accepted,
    )


def decode_watch(request: Request) -> Intent:
    """`GET /runs/{id}/events`: all there was, and what comes; after Last-Event-ID the rest."""
    last = request.headers.get("last-event-id", "")
    try:
        after = parse_position(last or "0")
    except FieldError as error:
        raise BadRequest(f"Last-Event-ID: {error}") from error
    return Watch(
        run_id=request.parameters["run_id"], after=after, headers_only=request.method == "HEAD"
    )


def decode_cancel(request: Request) -> Intent:
    """`POST /runs/{id}/cancel`."""
    return Cancel(
        run_id=request.parameters["run_id"],
        waits=False,
        reply=_canceling,
        reply_if_over=_canceling,
    )


def decode_show(request: Request) -> Intent:
    """`GET /runs/{id}`."""
    return Show(run_id=request.parameters["run_id"], reply=_show)


def decode_context(request: Request) -> Intent:
    """`GET /runs/{id}/context`."""
    return Show(run_id=request.parameters["run_id"], reply=_context)


def decode_questions(request: Request) -> Intent:
    """`GET /runs/{id}/questions`."""
    return Show(run_id=request.parameters["run_id"], reply=_questions)


def decode_answer(request: Request) -> Intent:
    """`POST /runs/{id}/questions/{qid}/answer`."""
    body = read_body(request, _AnswerBody, what="answer with")
    given = [each for each in (body.values, body.value, body.text) if each is not None]
    if not given:
        raise BadRequest("expected value, values or text to answer with, got none of them")
    request_id, _, question_id = request.parameters["question_id"].partition(".")
    return Answer(
        run_id=request.parameters["run_id"],
        request_id=request_id,
        # Without an id it is the only one there is; some clients send the other fields empty.
        answers={question_id: next(filter(None, given), given[0])},
        is_loose=True,
        reply=_answered,
    )


def decode_list(request: Request) -> Intent:
    """`GET /runs`, with `status` and `graph` as filters."""
    status, graph = request.query.get("status", ""), request.query.get("graph", "")
    return ListRuns(limit=MOST_RUNS, reply=partial(_list, status=status, graph=graph))


def decode_health(_request: Request) -> Intent:
    """`GET /health`."""
    return ListRuns(limit=MOST_RUNS, reply=_health)


# Replies ------------------------------------------------------------------------------------------

_State: TypeAlias = Literal["running", "success", "fail", "canceled"]


class _Accepted(msgspec.Struct):
    """A pipeline that was taken in."""

    run_id: str
    status: Literal["accepted"]


class _Canceling(msgspec.Struct):
    """A run that was told to end."""

    status: Literal["canceling"]


class _Answered(msgspec.Struct):
    """A question that was answered."""

    status: Literal["answered"]


class _Health(msgspec.Struct):
    """A server that is there.

    Attributes:
        pipelines: How many runs it knows, branches aside.
    """

    status: Literal["ok"]
    pipelines: int


class _Run(msgspec.Struct):
    """A run as it stands; what kilroy keeps in files is empty."""

    run_id: str
    state: _State
    status: _State
    current_node_id: str
    last_event: str
    last_event_at: str
    failure_reason: str
    logs_root: str
    worktree_dir: str
    run_branch: str
    final_commit: str
    cxdb_ui_url: str


class _Row(msgspec.Struct, omit_defaults=True):
    """A run in a list."""

    run_id: str
    graph_name: str
    status: _State
    started_at: str
    completed_at: str | msgspec.UnsetType = msgspec.UNSET
    duration_ms: int | msgspec.UnsetType = msgspec.UNSET
    failure_reason: str | msgspec.UnsetType = msgspec.UNSET


class _Rows(msgspec.Struct):
    """Runs, the newest first."""

    runs: list[_Row]
    count: int


class _Choice(msgspec.Struct):
    """One of the answers that a question offers."""

    key: str
    label: str


class _Question(msgspec.Struct):
    """What a run asks a person."""

    question_id: str
    type: Literal["FREE_TEXT", "SINGLE_SELECT", "MULTI_SELECT", "YES_NO"]
    text: str
    stage: str
    options: list[_Choice]
    asked_at: str


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(msgspec.json.encode(value), status)


def _accepted(snapshot: RunSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    return _json({"run_id": snapshot.id, "status": "accepted"}, 202)


def _canceling(_snapshot: RunSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    return _json({"status": "canceling"})


def _answered(_snapshot: RunSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    return _json({"status": "answered"})


def _context(snapshot: RunSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    return _json({} if isinstance(snapshot.values, UnsetType) else snapshot.values)


def _show(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    last = _last_said(events)
    state = _state(snapshot.outcome)
    return _json(
        {
            "run_id": snapshot.id,
            "state": state,
            "status": state,  # as main says it of runs that are over; its pages look here first
            "current_node_id": _node_at(events, snapshot.agent, or_last=True),
            "last_event": last[0],
            "last_event_at": last[1],
            "failure_reason": _reason(snapshot.outcome, snapshot.error, snapshot.receipt),
            "logs_root": "",
            "worktree_dir": "",
            "run_branch": "",
            "final_commit": "",
            "cxdb_ui_url": "",
        }
    )


def _last_said(events: Sequence[AnyEvent]) -> tuple[str, str]:
    """The name and the time of the last event that kilroy has a word for."""
    encoder = KilroyEncoder()
    for place in range(len(events) - 1, -1, -1):
        event = events[place]
        if isinstance(event, Retry):  # of what, depends on what is open
            for earlier in events[:place]:
                if isinstance(earlier, StepStarted | StepFinished):
                    encoder.say(earlier)
        if said := encoder.say(event):
            return said[-1][0], event.ts
    return "", ""


def _node_at(events: Sequence[AnyEvent], agent: str, *, or_last: bool = False) -> str:
    """The innermost stage that is open behind these events, else the agent that runs.

    With `or_last` the stage that ended last comes before the agent.
    """
    over: set[str] = set()
    last = ""
    for event in reversed(events):
        if isinstance(event, StepFinished) and event.kind in STAGES:
            over.add(event.step_id)
            last = last or event.name
        elif isinstance(event, StepStarted) and event.kind in STAGES and event.step_id not in over:
            return event.name
    return (or_last and last) or agent


def _questions(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    asked: list[dict[str, Any]] = []
    for request in snapshot.questions:
        stage = _node_at(events[: request.seq], snapshot.agent)
        is_single = len(_as_asked(request, events).questions) == 1
        asked += [
            {
                "question_id": request.request_id + ("" if is_single else f".{question.id}"),
                "type": _TYPES[question.kind],
                "text": question.prompt,
                "stage": stage,
                "options": _options(question),
                "asked_at": request.ts,
            }
            for question in request.questions
        ]
    return _json(asked)


def _as_asked(request: InputRequested, events: Sequence[AnyEvent]) -> InputRequested:
    """A request with all its questions: some of them may have been answered."""
    original = events[request.seq - 1] if 0 < request.seq <= len(events) else request
    return original if isinstance(original, InputRequested) else request


_TYPES = {
    "text": "FREE_TEXT",
    "choice": "SINGLE_SELECT",
    "choices": "MULTI_SELECT",
    "confirm": "YES_NO",
}


def _options(question: Question) -> list[dict[str, str]]:
    if question.kind == "confirm" and not question.options:
        return [{"key": "yes", "label": "Yes"}, {"key": "no", "label": "No"}]
    return [{"key": option.id, "label": option.label or option.id} for option in question.options]


def _list(snapshots: Sequence[RunSnapshot], *, status: str, graph: str) -> Reply:
    runs = [
        _row(snapshot)
        for snapshot in snapshots
        if status in ("", _state(snapshot.outcome)) and graph in snapshot.agent
    ]
    return _json({"runs": runs, "count": len(runs)})


def _row(snapshot: RunSnapshot) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run_id": snapshot.id,
        "graph_name": snapshot.agent,
        "status": _state(snapshot.outcome),
        "started_at": snapshot.started or snapshot.created,
    }
    if snapshot.finished is not None:
        began, ended = (datetime.fromisoformat(t) for t in (row["started_at"], snapshot.finished))
        row["completed_at"] = snapshot.finished
        row["duration_ms"] = _milliseconds((ended - began).total_seconds())
    if reason := _reason(snapshot.outcome, snapshot.error, snapshot.receipt):
        row["failure_reason"] = reason
    return row


def _health(snapshots: Sequence[RunSnapshot]) -> Reply:
    pipelines = sum(snapshot.parent_run_id is None for snapshot in snapshots)  # not their branches
    return _json({"status": "ok", "pipelines": pipelines})


def _problem(problem: Problem) -> Reply:
    message = "cross-origin request blocked" if problem.code == "forbidden" else problem.message
    return _json({"error": message}, 404 if problem.code == "not_asked" else problem.status)


def _encoder(_options: Hashable) -> KilroyEncoder:
    return KilroyEncoder()


def _present(snapshot: RunSnapshot) -> bytes:
    return _show(snapshot, ()).body


_FILTERS: Final[Mapping[str, Any]] = {
    "status": "Only runs that are `running`, or have come to `success`, `fail` or `canceled`.",
    "graph": "Only runs whose graph has this in its name.",
}
_SUBMIT: Any = Annotated[_SubmitBody, Meta(examples=[{"workflow": "assistant"}])]
_ANSWER: Any = Annotated[_AnswerBody, Meta(examples=[{"value": "yes"}])]
_BELOW = (
    (
        "POST",
        "",
        decode_submit,
        Doc(summary="Submit a pipeline", body=_SUBMIT, answers={202: (_Accepted,)}),
    ),
    ("GET", "", decode_list, Doc(summary="List runs", query=_FILTERS, answers={200: (_Rows,)})),
    ("GET", "/<run_id>", decode_show, Doc(summary="Show a run", answers={200: (_Run,)})),
    (
        "GET",
        "/<run_id>/events",
        decode_watch,
        Doc(summary="Stream a run's progress, from its beginning", answers={200: (SSE,)}),
    ),
    (
        "POST",
        "/<run_id>/cancel",
        decode_cancel,
        Doc(summary="Cancel a run", answers={200: (_Canceling,)}),
    ),
    (
        "GET",
        "/<run_id>/context",
        decode_context,
        Doc(summary="Show a run's values", answers={200: (dict[str, Any],)}),
    ),
    (
        "GET",
        "/<run_id>/questions",
        decode_questions,
        Doc(summary="List what a run asks", answers={200: (list[_Question],)}),
    ),
    (
        "POST",
        "/<run_id>/questions/<question_id>/answer",
        decode_answer,
        Doc(summary="Answer a question", body=_ANSWER, answers={200: (_Answered,)}),
    ),
)

KILROY = Dialect(
    name="kilroy",
    mount="/kilroy",
    routes=(
        Route(
            "GET",
            "/health",
            decode_health,
            doc=Doc(summary="See whether the server is there", answers={200: (_Health,)}),
        ),
        *(Route(method, f"/runs{path}", decode, doc=doc) for method, path, decode, doc in _BELOW),
        *(
            Route(method, f"/pipelines{path}", decode, is_rooted=True, doc=doc)
            for method, path, decode, doc in _BELOW
        ),
    ),
    encoder=_encoder,
    present=_present,
    framing=Framing(heartbeat=comment(), farewell=retry),
    on_disconnect="continue",
    locate=lambda mount, run, *_: {"Location": f"{mount}/runs/{run}/events"},
    problem=_problem,
)
