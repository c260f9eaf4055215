r"""The protocol of agentlang: every agent is an event of a module, and tells by name what it does.

Knows: agentlang's paths, bodies and event names, and how Accept asks for a stream. Must never know
what a run is beyond its events and its snapshot. Source: agentlang-ai/agentlang, pull request 610
(commit 6caa3d2), which is where its streams come from.

`POST /<module>/<event>` runs an agent. Its answer is the bare result; with `text/event-stream` in
Accept it is a stream of named events, `event: <type>\ndata: <one line of JSON>\n\n`, without ids:

    : connected
    event: agent_start          {"agent"}
    event: flow_step_start      {"step", "agent"}             where an agent does the step
    event: llm_response         {"agent", "content", "tokens": {"input", "output", "total"}?}
    event: agent_complete       {"agent"}                     after a success
    event: flow_step_complete   {"step", "result"}            the result as a string
    event: error                {"agent" or "step", "error", "terminal": false}
    event: <name>               what `emit` has told
    event: result               the bytes of the answer that is no stream; the response ends
    event: error                {"error", "statusCode", "terminal": true}; the response ends

What differs from the original. `terminal` tells the two kinds of `error` apart. An agent that has
failed does not complete, and a failed step is told once, where it failed, not at each level above.
`agent_start` has one shape. A custom event that has one of these names, and might be taken for an
end that is none, goes out as `custom` with its name in it. Deltas, reasoning and tool calls have no
word in this protocol.

A run that asks a person ends the response with `result` and `{"suspension": <request id>}`, and
goes on when the next request of the same `chatId` brings the answer, whose response has the rest.
Without a `chatId` it is answered in another of the server's protocols.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal, assert_never

import attrs
import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from agentsse.errors import BadRequest, NotAcceptable
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
    Outcome,
    PartDelta,
    PartFinished,
    PartStarted,
    Paused,
    Problem,
    ProviderEvent,
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
    decode_json,
)
from agentsse.sse import comment

from . import MAX_NAME, Dialect, Doc, Framing, Intent, Reply, Request, Route, Start, negotiate

TEXT: Final = "text/plain; charset=utf-8"
SPOKEN: Final = frozenset({"text", "refusal"})  # kinds of parts that are the answer to a person
VOCABULARY: Final = frozenset(
    {
        "agent_complete",
        "agent_start",
        "custom",
        "error",
        "flow_step_complete",
        "flow_step_start",
        "llm_response",
        "result",
        "",  # no name at all: the reader would see a "message"
    }
)
_json = msgspec.json.encode


# What an answer says ------------------------------------------------------------------------------


def _suspension(request_id: str) -> bytes:
    """The result of a run that waits for a person."""
    return _json({"suspension": request_id})


def _one_line(value: Raw) -> bytes:
    """JSON as it stands; line ends, which only formatting brings in, become spaces."""
    data = bytes(value)
    if b"\n" in data or b"\r" in data:
        return data.replace(b"\n", b" ").replace(b"\r", b" ")
    return data


def _status_of(problem: Problem) -> int:
    """The status of a failed run: 401, 400 or 500; there are no others in this protocol."""
    if problem.status in (401, 403):
        return 401
    return 400 if 400 <= problem.status < 500 else 500


def _failure(
    outcome: Outcome | None, error: Problem | None, receipt: Receipt | None
) -> tuple[str, int]:
    """The words and the status of a run that came to no result."""
    if outcome == "error" and error is not None:
        return error.message, _status_of(error)
    cause = receipt.cause if receipt is not None else None
    said = f"the run was cancelled ({cause})" if cause else "the run was cancelled"
    return (said if error is None else f"{said}; {error.message}"), 500


def reply(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer with the bare result, a suspension, or the words of an error."""
    if snapshot.outcome is None:
        # Somebody else may have answered just now: it was asked all the same.
        asked = snapshot.questions or [e for e in events if isinstance(e, InputRequested)][-1:]
        if asked:
            return Reply(_suspension(asked[0].request_id))
    if snapshot.outcome in (None, "success"):
        return Reply(_one_line(snapshot.result))
    words, status = _failure(snapshot.outcome, snapshot.error, snapshot.receipt)
    return Reply(words.encode(), status, TEXT)


def refuse(problem: Problem) -> Reply:
    """Answer a request that started nothing; an unknown event is not found."""
    status = 404 if problem.status == 404 else _status_of(problem)
    return Reply(problem.message.encode(), status, TEXT)


# Events -------------------------------------------------------------------------------------------


def _frame(name: str, data: bytes) -> bytes:
    """One named event; `data` is a line."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _is_own(name: str) -> bool:
    """Whether a custom event may go out under its own name."""
    # Many a reader trims what stands behind `event:`.
    return name.isprintable() and name.strip() not in VOCABULARY


@attrs.define(eq=False)
class _OpenStep:
    """A step that is under way.

    Attributes:
        since: How many failures had been told when it began.
        is_announced: Whether its start has been told; a flow step's is when an agent begins it.
        said: What a model has said in it.
    """

    event: StepStarted
    agent: str
    since: int
    is_announced: bool = False
    said: list[str] = attrs.field(factory=list)


@attrs.define(eq=False)
class AgentlangEncoder:
    """The events of one run as agentlang tells them."""

    _agents: list[str] = attrs.field(factory=list)  # open ones, the innermost last
    _steps: dict[str, _OpenStep] = attrs.field(factory=dict)  # likewise, by step id
    _parts: dict[str, tuple[str, str]] = attrs.field(factory=dict)  # agent, model step or ""
    _failures: dict[tuple[str, str], int] = attrs.field(factory=dict)  # when each was told last
    _count: int = 0  # failures that were told

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames."""
        match event:
            case PartDelta():  # nearly all there is
                return ()
            case PartStarted():
                if event.kind in SPOKEN:
                    self._parts[event.part_id] = self._agent, self._model_step
                return ()
            case PartFinished():
                return self._finish_part(event)
            case RunStarted():
                return self._start_agent(event.agent)
            case RunFinished():
                return self._finish(event)
            case AgentStarted():
                if event.child_run_id is not None:  # it speaks elsewhere
                    return (_agent_frame("agent_start", event.agent),)
                return (*self._announce(event.agent), *self._start_agent(event.agent))
            case AgentFinished():
                return self._finish_agent(event)
            case StepStarted():
                if not self._steps:  # nothing is open that what has failed could end
                    self._failures.clear()
                self._steps[event.step_id] = _OpenStep(event, self._agent, self._count)
                return ()
            case StepFinished():
                return self._finish_step(event)
            case InputRequested():
                return (_frame("result", _suspension(event.request_id)),)
            case Custom():
                return (_custom(event),)
            case (
                ToolStarted()
                | ToolOutputDelta()
                | ToolFinished()
                | InputReceived()
                | InputWithdrawn()
                | MessageReceived()
                | Paused()
                | Resumed()
                | ValuesChanged()
                | Retry()
                | Failover()
                | Liveness()
                | Stalled()
                | LoopDetected()
                | ContextUsage()
                | Compacted()
                | Moderation()
                | ProviderEvent()
                | TriggerChanged()
                | Gap()
            ):
                return ()
            case _:
                assert_never(event)

    # Agents

    @property
    def _agent(self) -> str:
        """The innermost agent that is open."""
        return self._agents[-1] if self._agents else ""

    def _start_agent(self, agent: str) -> tuple[bytes, ...]:
        self._agents.append(agent)
        return (_agent_frame("agent_start", agent),)

    def _announce(self, agent: str) -> tuple[bytes, ...]:
        """Tell of the innermost flow step, once an agent does it."""
        for step in reversed(self._steps.values()):
            if step.event.kind == "flow":
                if step.is_announced:
                    return ()
                step.is_announced = True
                data = _json({"step": step.event.name, "agent": agent})
                return (_frame("flow_step_start", data),)
        return ()

    def _finish_agent(self, event: AgentFinished) -> tuple[bytes, ...]:
        if event.child_run_id is None and event.agent in self._agents:
            last = len(self._agents) - 1 - self._agents[::-1].index(event.agent)
            del self._agents[last]
        if event.error is None:
            return (_agent_frame("agent_complete", event.agent),)
        # Within this run the step that failed tells it; of a child run nobody else does.
        return () if event.child_run_id is None else self._fail(event.error, agent=event.agent)

    def _finish(self, event: RunFinished) -> tuple[bytes, ...]:
        if event.outcome == "success":
            result = NULL if event.result is UNSET else event.result
            return (
                _agent_frame("agent_complete", self._agents[0] if self._agents else ""),
                _frame("result", _one_line(result)),
            )
        words, status = _failure(event.outcome, event.error, event.receipt)
        data = _json({"error": words, "statusCode": status, "terminal": True})
        return (_frame("error", data),)

    # Steps, and what is said in them

    @property
    def _model_step(self) -> str:
        """The id of the innermost model call that is under way, or nothing."""
        for step_id, step in reversed(self._steps.items()):
            if step.event.kind == "model":
                return step_id
        return ""

    def _finish_part(self, event: PartFinished) -> tuple[bytes, ...]:
        if event.kind not in SPOKEN:
            return ()
        otherwise = self._agent, self._model_step
        agent, step_id = self._parts.pop(event.part_id, otherwise)
        if (step := self._steps.get(step_id)) is not None:
            step.said.append(event.text)
            return ()
        return (_frame("llm_response", _json({"agent": agent, "content": event.text})),)

    def _finish_step(self, event: StepFinished) -> tuple[bytes, ...]:
        step = self._steps.pop(event.step_id, None)
        if step is None:
            return ()
        if event.error is not None:
            return self._fail_step(step, event.error)
        match event.kind:
            case "model":
                data: dict[str, object] = {"agent": step.agent, "content": "".join(step.said)}
                if event.usage not in (None, Usage()):
                    data["tokens"] = _tokens(event.usage)
                return (_frame("llm_response", _json(data)),)
            case "flow":
                data = {"step": event.name, "result": _as_string(event.result)}
                return (_frame("flow_step_complete", _json(data)),)
            case "node" | "tool_round":
                return ()
            case _:
                assert_never(event.kind)

    def _fail_step(self, step: _OpenStep, error: Problem) -> tuple[bytes, ...]:
        """Tell of a failure, unless it comes from something within this step and was told there."""
        if self._failures.get(_identity(error), -1) >= step.since:
            return ()
        match step.event.kind:
            case "model":
                return self._fail(error, agent=step.agent)
            case "flow" | "node":
                return self._fail(error, step=step.event.name)
            case "tool_round":
                return ()
            case _:
                assert_never(step.event.kind)

    def _fail(self, error: Problem, **where: str) -> tuple[bytes, ...]:
        self._failures[_identity(error)] = self._count
        self._count += 1
        return (_frame("error", _json({**where, "error": error.message, "terminal": False})),)


def _agent_frame(name: str, agent: str) -> bytes:
    return _frame(name, _json({"agent": agent}))


def _custom(event: Custom) -> bytes:
    if _is_own(event.name):
        return _frame(event.name, _one_line(event.value))
    value = Raw(_one_line(event.value))
    return _frame("custom", _json({"name": event.name, "value": value}))


def _tokens(usage: Usage) -> dict[str, int]:
    total = usage.input_tokens + usage.output_tokens
    return {"input": usage.input_tokens, "output": usage.output_tokens, "total": total}


def _as_string(result: Raw | UnsetType) -> str | Raw:
    """A result as a JSON string: one that is a string as it is, anything else its JSON."""
    data = _one_line(NULL if result is UNSET else result).strip()
    return Raw(data) if data.startswith(b'"') else data.decode()


def _identity(error: Problem) -> tuple[str, str]:
    """What is the same about one failure at each level: the words may begin with the level."""
    match error.code:
        case "crashed":
            return error.code, error.message.rpartition(" raised ")[2]
        case "cancelled" | "system_exit":
            return error.code, ""
        case _:
            return error.code, error.message


# Requests -----------------------------------------------------------------------------------------


_NAME: Final = {"maxLength": MAX_NAME, "pattern": "^[^/]*$"}


class _Message(msgspec.Struct, rename="camel"):
    """What an agent is told. Any other object is the input of an event as it stands.

    Attributes:
        message: The input.
        chat_id: The conversation; one that waits for a person takes the message as the answer. At
            most 200 printable characters, none of them a slash.
        mode: It stands in the run's metadata.
    """

    message: Any = None
    chat_id: Annotated[str, Meta(extra_json_schema=_NAME)] | None = None
    mode: Literal["chat", "planner"] | None = None


_FIELDS: Final = frozenset(_Message.__struct_encode_fields__)


def decode_start(request: Request) -> Intent:
    """`POST /<module>/<event>`."""
    module, event = request.parameters["module"], request.parameters["event"]
    body = decode_json(request.body or b"{}")
    if not isinstance(body, dict):
        raise BadRequest(
            f"expected a JSON object for the event {event!r}, got {request.body[:40]!r}"
        )
    message = _message(body)
    return Start(
        agent=f"{module}.{event}",
        otherwise=(event,),
        input=body if message is None else message.message,
        delivery=_delivery(request.headers.get("accept", "")),
        thread_id=message.chat_id or None if message else None,
        resumes=True,
        if_busy="enqueue",
        metadata={"mode": message.mode} if message and message.mode else None,
        reply=reply,
    )


def _message(body: dict[str, Any]) -> _Message | None:
    if "message" not in body or not body.keys() <= _FIELDS:
        return None
    try:
        return msgspec.convert(body, _Message)
    except msgspec.ValidationError as error:
        raise BadRequest(f"expected {{message, chatId?, mode?}} for an agent: {error}") from error


def _delivery(accept: str) -> Literal["stream", "wait"]:
    try:
        return negotiate(accept or "*/*")
    except NotAcceptable:  # whoever wants no stream gets the answer that everybody gets
        return "wait"


def _encoder(_options: object) -> AgentlangEncoder:
    return AgentlangEncoder()


def _present(snapshot: RunSnapshot) -> bytes:
    return reply(snapshot, ()).body


AGENTLANG = Dialect(
    name="agentlang",
    mount="/agentlang",
    routes=(
        Route(
            "POST",
            "/<module>/<event>",
            decode_start,
            doc=Doc(
                summary="Run an agent: its result, or a stream that ends with it",
                body=Annotated[_Message, Meta(examples=[{"message": "Hello"}])],
                answers={200: ("text/event-stream", Any)},
            ),
        ),
    ),
    encoder=_encoder,
    present=_present,
    framing=Framing(
        media_type="text/event-stream",
        prelude=comment("connected"),
        heartbeat=comment("keepalive"),
        ends_at=frozenset({InputRequested}),
    ),
    on_disconnect="continue",
    problem=refuse,
)
