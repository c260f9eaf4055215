"""AG-UI: agents for the chat components of web pages, by the protocol's version 1.0 and before it.

Knows: the one route that the protocol has, `POST /agui/{agent}`, two that it lacks, what may stand
in a `RunAgentInput`, and the events of a response. Must never know what a run is beyond its events
and its snapshot. Source: the AG-UI specification 1.0 (docs.ag-ui.com), and what its own clients,
`@ag-ui/client` 1.0.0 and 0.0.59, accept.

A response is one run to the client: RUN_STARTED, what happens, RUN_FINISHED or RUN_ERROR; before
its end everything that is open is closed. A client that declares no `protocolVersion` is one from
before 1.0: it is told of nothing that it would break on. To such a client a cancelled run ends with
RUN_ERROR and the code `cancelled`, later ones have an outcome for it.

- The client tells the whole conversation each time; it alone decides what a model is told. The last
  message of the user is the run's input. `context` is told to a model first; `state`, `context` and
  `forwardedProps` are the run's metadata. Of a message with media the text is taken.
- The client's `tools` may be called by a model. A run that calls them is over; the client goes on
  with another one that brings the answers.
- A run that asks a person ends the response with an interrupt; the next request's `resume` answers
  it, and its response goes on with the same run under the client's new `runId`. RUN_STARTED then
  has the run's own id in its `metadata`. Of what is asked side by side each has a response of its
  own, unless one `resume` answers all of it.
- What the run has set with `run.set` lies over the state that the client has sent, as a
  STATE_SNAPSHOT and STATE_DELTAs.
- What else happens, and has no word here, is CUSTOM, under `agentsse.` and its own name.

The protocol has no way back to a run, and no way to end one but to leave. Here the same `runId`,
posted again in the same thread, finds the run again, and so does a `resume` that has been taken
already, under any `runId`. The response shows all of the run, up to what it asks: a
MESSAGES_SNAPSHOT first empties what the client has of it, for text that comes again is put behind
what is there.
`GET /agui/{agent}/runs/{runId}` goes on behind a frame's id, and `POST .../cancel` ends the run.
What stays out of reach: a client takes a response for whole that just stops; and version 1.0 of
the client reads no event of more than ten million characters.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar, assert_never

import attrs
import msgspec
from msgspec import UNSET, Raw, Struct
from msgspec.structs import asdict, replace

from agentsse.errors import BadRequest
from agentsse.events import (
    NULL,
    TYPE_NAMES,
    AgentFinished,
    AgentStarted,
    AnyEvent,
    Custom,
    InputRequested,
    MessageReceived,
    Moderation,
    PartDelta,
    PartFinished,
    PartStarted,
    Problem,
    ProviderEvent,
    Question,
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
    decode_json,
    encode_event,
    text_of_json,
)
from agentsse.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.sse import FieldError, comment, encode, frame_id, parse_position, retry

from . import (
    MAX_HISTORY,
    MAX_MESSAGES,
    MAX_NAME,
    Cancel,
    Dialect,
    Doc,
    Framing,
    Reply,
    Request,
    Route,
    Start,
    Watch,
    know_query,
    read_body,
    see_name,
)

PROTOCOL: Final = "1.0"
OURS: Final = "agentsse"  # under it we say in `metadata`, and as custom events, what is ours alone
REFUSAL: Final = "This request was refused."
NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object", "properties": {}}

LF, CR = b"\n\r"
_encode = msgspec.json.encode
Shape = TypeVar("Shape", bound=Struct)


# Streams ------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class View:
    """How one client reads a run.

    Attributes:
        is_early: Its protocol is older than 1.0.
        run_id: What it calls the run in this response; None for the run's own id.
        state: The object that it has for a state, as JSON; empty for none.
        snapshot: The event that makes what it has seen of the run undone; empty for none.
    """

    is_early: bool = False
    run_id: str | None = None
    state: bytes = b""
    snapshot: bytes = b""


@attrs.define
class _Open:
    """Something that has begun on the wire, and has to end there.

    Attributes:
        pausing: What stands for `closing` where the run waits for a person.
        head: Of the events that carry more of it, up to the text.
        is_empty: Whether nothing of it has come yet.
    """

    opening: tuple[bytes, ...]
    closing: tuple[bytes, ...]
    pausing: tuple[bytes, ...] = ()
    head: bytes = b""
    is_empty: bool = True

    def more(self, text: str) -> bytes:
        self.is_empty = False
        return b"%b%b}" % (self.head, _encode(text))


@attrs.define(eq=False)
class AGUIEncoder:
    """The events of one run as those of AG-UI, each with its place as the id.

    Ids of messages are made of the run's id and the place in it where they begin: they stay the
    same whenever the run is read, and belong to no other run.
    """

    view: View = View()
    _run_id: str = ""
    _names: dict[str, str] = attrs.field(factory=dict)  # threadId and runId
    _parent_run_id: str | None = None
    _has_begun: bool = False  # the response that is under way
    _open: dict[str, _Open] = attrs.field(factory=dict)  # in their order
    _steps: dict[str, str] = attrs.field(factory=dict)  # names of open ones
    _agents: list[tuple[str, str]] = attrs.field(factory=list)  # open ones: whose, and their ids
    _message: str = ""  # that tool calls belong to
    _has_text: bool = False  # that message
    _calls: dict[str, str] = attrs.field(factory=dict)  # ids on the wire
    _values: dict[str, Raw] = attrs.field(factory=dict)  # the state
    _is_shown: bool = False  # the state, in this response
    _used: dict[str, Usage] = attrs.field(factory=dict)  # by model, in this response
    _counted: Usage = attrs.field(factory=Usage)  # in all of them
    _has_spoken: bool = False
    _blocked: str | None = None  # what a shield has said; None once something else was said

    def __attrs_post_init__(self) -> None:
        if self.view.state:
            self._values = _members(self.view.state)

    def feed(self, event: AnyEvent) -> list[bytes]:
        """Turn one event into its frames."""
        events = [] if self._has_begun else self._begin(event)
        events += self._take(event)
        last = len(events)
        if last == 1:
            return [_frame(events[0], str(event.seq))]
        return [
            _frame(each, frame_id(event.seq, part, last)) for part, each in enumerate(events, 1)
        ]

    def _take(self, event: AnyEvent) -> Iterable[bytes]:
        match event:
            case PartDelta():
                part = self._open.get(f"part {event.part_id}")
                return (part.more(event.delta),) if part and event.delta else ()
            case PartStarted():
                return self._start_part(event)
            case PartFinished():
                return self._finish_part(event)
            case RunStarted():
                return ()
            case RunFinished():
                return self._finish(event)
            case StepStarted():
                return self._start_step(event)
            case StepFinished():
                return self._finish_step(event)
            case ToolStarted():
                return self._start_tool(event)
            case ToolOutputDelta():
                shown = {"toolCallId": self._calls.get(event.call_id, event.call_id)}
                return (_custom(f"{OURS}.tool_output", shown | {"delta": event.delta}),)
            case ToolFinished():
                return (self._answer(event),)
            case AgentStarted() if not self.view.is_early:
                return self._start_agent(event)
            case AgentFinished() if not self.view.is_early:
                return self._finish_agent(event)
            case InputRequested():
                return self._ask(event)
            case MessageReceived():
                self._turn_over()
                return self._say(self._id(event), event.text, role="user")
            case ValuesChanged():
                return self._show(_members(bytes(event.values)))
            case Custom():
                return (_custom(event.name, event.value),)
            case ProviderEvent():
                return (_event("RAW", event=event.raw, source=event.provider),)
            case Moderation(violation=True):
                self._blocked = event.message or REFUSAL
                return (_told(event),)
            case _:
                return (_told(event),)

    def _id(self, event: AnyEvent) -> str:
        return f"{self._run_id}-{event.seq}"

    # Responses

    def _begin(self, event: AnyEvent) -> list[bytes]:
        """Begin the response; what was open when the one before it ended is open again."""
        snapshot: tuple[bytes, ...] = ()
        if isinstance(event, RunStarted):
            self._run_id, self._parent_run_id = event.run_id, event.parent_run_id
            run_id = event.run_id if self.view.run_id is None else self.view.run_id
            self._names = {"threadId": event.thread_id or event.run_id, "runId": run_id}
            snapshot = (self.view.snapshot,) if self.view.snapshot else ()
        self._has_begun, self._is_shown = True, False
        known: dict[str, Any] = {}
        if self._names["runId"] != self._run_id:
            known["metadata"] = {OURS: {"runId": self._run_id}}
        known |= self._names
        if not self.view.is_early:
            known["protocolVersion"] = PROTOCOL
        if self._parent_run_id is not None:
            known["parentRunId"] = self._parent_run_id
        opened = (each for thing in self._open.values() for each in thing.opening)
        return [_event("RUN_STARTED", **known), *snapshot, *opened]

    def _ask(self, event: InputRequested) -> Iterable[bytes]:
        """End the response, though not the run."""
        self._has_begun = False
        things = reversed(self._open.values())
        yield from (each for thing in things for each in thing.pausing or thing.closing)
        asked = {"type": "interrupt", "interrupts": [_interrupt(self._run_id, event)]}
        yield _event("RUN_FINISHED", **self._names, outcome=asked, **self._usage())
        self._used.clear()

    def _finish(self, event: RunFinished) -> Iterable[bytes]:
        self._count("", _rest(event.usage, self._counted))
        yield from (each for thing in reversed(self._open.values()) for each in thing.closing)
        match event.outcome:
            case "success":
                yield from self._last_words(event)
                yield self._succeed(event)
            case "error":
                problem = event.error or Problem(code="internal", message="the run has failed")
                yield self._fail(problem.code, problem.message)
            case "cancelled" | "interrupted":
                known: dict[str, Any] = {"metadata": {OURS: {"receipt": event.receipt}}}
                if self.view.is_early:
                    cause = event.receipt.cause
                    message = f"the run was cancelled{f' ({cause})' if cause else ''}"
                    yield self._fail("cancelled", message, **known)
                else:
                    known |= self._names | {"outcome": {"type": "cancelled"}}
                    yield _event("RUN_FINISHED", **known, **self._usage())
            case _:
                assert_never(event.outcome)

    def _succeed(self, event: RunFinished) -> bytes:
        known: dict[str, Any] = dict(self._names)
        if event.result is not UNSET and event.result != NULL:
            known["result"] = event.result
        if not self.view.is_early:
            pending = [self._calls.get(call_id, call_id) for call_id in event.pending]
            known["outcome"] = {"type": "success"}
            if pending:
                known["outcome"]["pendingToolCallIds"] = pending
        return _event("RUN_FINISHED", **known, **self._usage())

    def _fail(self, code: str, message: str, **known: Any) -> bytes:
        return _event("RUN_ERROR", **known, message=message, code=code, **self._usage())

    def _last_words(self, event: RunFinished) -> Iterable[bytes]:
        """What is said at the end, where nothing was: a shield's words, or a result of text."""
        result = event.result
        if self._blocked is not None:
            return self._say(self._id(event), self._blocked)
        if self._has_spoken or result is UNSET or not bytes(result).startswith(b'"'):
            return ()
        text = text_of_json(result)
        return self._say(self._id(event), text) if text else ()

    # What is said

    def _say(self, message_id: str, text: str, *, role: str = "assistant") -> Iterable[bytes]:
        """A whole message at once."""
        yield _event("TEXT_MESSAGE_START", messageId=message_id, role=role)
        yield _event("TEXT_MESSAGE_CONTENT", messageId=message_id, delta=text)
        yield _event("TEXT_MESSAGE_END", messageId=message_id)

    def _turn_over(self) -> None:
        """What is said from now on is another message."""
        self._message, self._has_text = "", False

    def _start_part(self, event: PartStarted) -> Iterable[bytes]:
        match event.kind:
            case "text" | "refusal":
                self._has_spoken, self._blocked = True, None
                if self._has_text or not self._message:
                    self._message = self._id(event)
                self._has_text = True
                part = _text(self._message)
            case "reasoning":
                part = _reasoning(self._id(event))
            case "tool_call":
                call_id = event.call_id or event.part_id
                self._calls[call_id] = call_id
                part = self._call(event, call_id, event.name or "")
            case _:
                assert_never(event.kind)
        self._open[f"part {event.part_id}"] = part
        return part.opening

    def _finish_part(self, event: PartFinished) -> Iterable[bytes]:
        part = self._open.pop(f"part {event.part_id}", None)
        if part is None:
            return ()
        text = event.text or ("{}" if event.kind == "tool_call" else "")
        # What came in no pieces, or is no text, is told now.
        rest = (part.more(text),) if part.is_empty and text else ()
        return (*rest, *part.closing)

    # Tools

    def _call(self, event: AnyEvent, call_id: str, name: str) -> _Open:
        """A call, in the assistant's message that it was asked for in."""
        if not self._message:
            self._message, self._has_text = self._id(event), False
        known = {"toolCallId": call_id, "toolCallName": name, "parentMessageId": self._message}
        return _Open(
            opening=(_event("TOOL_CALL_START", **known),),
            closing=(_event("TOOL_CALL_END", toolCallId=call_id),),
            head=_head("TOOL_CALL_ARGS", toolCallId=call_id),
        )

    def _start_tool(self, event: ToolStarted) -> Iterable[bytes]:
        if event.call_id in self._calls:  # a model has written it
            return ()
        # Others count their calls anew in each run, and to the client they are one conversation.
        call_id = self._calls[event.call_id] = self._id(event)
        call = self._call(event, call_id, event.name)
        return (*call.opening, call.more(bytes(event.arguments).decode()), *call.closing)

    def _answer(self, event: ToolFinished) -> bytes:
        self._turn_over()
        known: dict[str, Any] = {}
        if event.is_error:
            known["isError"] = True
        if event.source != "local":
            known["source"] = event.source
        result = bytes(event.result)
        return _event(
            "TOOL_CALL_RESULT",
            **({"metadata": {OURS: known}} if known else {}),
            messageId=self._id(event),
            toolCallId=self._calls.get(event.call_id, event.call_id),
            content=event.result if result.startswith(b'"') else result.decode(),
            role="tool",
        )

    # Steps and agents

    def _start_step(self, event: StepStarted) -> Iterable[bytes]:
        if event.kind == "model":
            self._turn_over()
        name, taken = event.name, self._steps.values()
        if name in taken:  # which is fatal
            name = f"{name} ({event.step_id})"
        self._steps[event.step_id] = name
        step = self._open[f"step {event.step_id}"] = _Open(
            opening=(_event("STEP_STARTED", stepName=name),),
            closing=(_event("STEP_FINISHED", stepName=name),),
        )
        return step.opening

    def _finish_step(self, event: StepFinished) -> Iterable[bytes]:
        if event.kind == "model":
            self._turn_over()
            if event.usage is not None:
                self._count(event.name, event.usage)
        name = self._steps.pop(event.step_id, None)
        step = self._open.pop(f"step {event.step_id}", None)
        if name is None or step is None:
            return ()
        if event.error is not None:
            known = {OURS: {"error": event.error}}
            return (_event("STEP_FINISHED", metadata=known, stepName=name),)
        return step.closing

    def _start_agent(self, event: AgentStarted) -> Iterable[bytes]:
        agent_id = event.child_run_id or self._id(event)
        self._agents.append((event.child_run_id or event.agent, agent_id))
        over = {"message": "the run is over", "code": "cancelled"}
        agent = self._open[f"agent {agent_id}"] = _Open(
            opening=(_event("SUBAGENT_STARTED", subagentRunId=agent_id, name=event.agent),),
            closing=(_event("SUBAGENT_ERROR", subagentRunId=agent_id, **over),),
            pausing=(
                _event("SUBAGENT_FINISHED", subagentRunId=agent_id, outcome={"type": "suspended"}),
            ),
        )
        return agent.opening

    def _finish_agent(self, event: AgentFinished) -> Iterable[bytes]:
        whose = event.child_run_id or event.agent
        found = next((each for each in reversed(self._agents) if each[0] == whose), None)
        if found is None:
            return ()
        self._agents.remove(found)
        agent_id = found[1]
        del self._open[f"agent {agent_id}"]
        if (problem := event.error) is not None:
            known: dict[str, Any] = {"message": problem.message, "code": problem.code}
            return (_event("SUBAGENT_ERROR", subagentRunId=agent_id, **known),)
        known = {}
        if event.report is not UNSET and event.report != NULL:
            known["result"] = event.report
        return (_event("SUBAGENT_FINISHED", subagentRunId=agent_id, **known),)

    # State and usage

    def _show(self, changed: Mapping[str, Raw]) -> Iterable[bytes]:
        """Show what has changed; what was there before as well where the response has not."""
        patch: list[dict[str, Any]] = []
        for name, value in changed.items():
            path = "/" + name.replace("~", "~0").replace("/", "~1")
            if value != NULL:
                self._values[name] = value
                patch.append({"op": "add", "path": path, "value": value})
            elif self._values.pop(name, None) is not None:
                patch.append({"op": "remove", "path": path})
        if not self._is_shown:
            self._is_shown = True
            return (_event("STATE_SNAPSHOT", snapshot=self._values),)
        return (_event("STATE_DELTA", delta=patch),) if patch else ()

    def _count(self, model: str, usage: Usage) -> None:
        if usage != Usage():
            self._used[model] = self._used.get(model, Usage()) + usage
            self._counted += usage

    def _usage(self) -> dict[str, Any]:
        """A field of that name, where there is something to tell and the client knows it."""
        if self.view.is_early or not self._used:
            return {}
        return {"usage": [_used(model, usage) for model, usage in self._used.items()]}


def make_encoder(options: Hashable) -> AGUIEncoder:
    """Make the machine; the options are a `View`, or none of its peculiarities."""
    return AGUIEncoder(options if isinstance(options, View) else View())


def _event(kind: str, **fields: Any) -> bytes:
    return _encode({"type": kind, **fields})


def _head(kind: str, **fields: Any) -> bytes:
    """An event up to its delta."""
    return b'%b,"delta":' % _event(kind, **fields).removesuffix(b"}")


def _frame(data: bytes, id: str) -> bytes:
    if LF in data or CR in data:  # there is JSON in it that somebody else has formatted
        return encode(data, id=id)
    return b"id: %b\ndata: %b\n\n" % (id.encode(), data)


def _text(message_id: str) -> _Open:
    known = {"messageId": message_id}
    return _Open(
        opening=(_event("TEXT_MESSAGE_START", **known, role="assistant"),),
        closing=(_event("TEXT_MESSAGE_END", **known),),
        head=_head("TEXT_MESSAGE_CONTENT", **known),
    )


def _reasoning(message_id: str) -> _Open:
    """A span of reasoning with one message in it, both of one id."""
    known = {"messageId": message_id}
    begun = _event("REASONING_MESSAGE_START", **known, role="reasoning")
    return _Open(
        opening=(_event("REASONING_START", **known), begun),
        closing=(_event("REASONING_MESSAGE_END", **known), _event("REASONING_END", **known)),
        head=_head("REASONING_MESSAGE_CONTENT", **known),
    )


def _custom(name: str, value: Any) -> bytes:
    return _event("CUSTOM", name=name, value=value)


def _told(event: AnyEvent) -> bytes:
    """What has no word in this protocol."""
    return _custom(f"{OURS}.{TYPE_NAMES[type(event)]}", Raw(encode_event(event)))


def _members(data: bytes) -> dict[str, Raw]:
    return msgspec.json.decode(data, type=dict[str, Raw])


def _rest(total: Usage, counted: Usage) -> Usage:
    """What the models' own counts leave of the total."""
    named = asdict(counted)
    return Usage(**{name: max(0, value - named[name]) for name, value in asdict(total).items()})


def _used(model: str, usage: Usage) -> dict[str, Any]:
    """Tokens, as this protocol counts them: two totals, and parts of them."""
    provider, _, name = model.partition(":")
    parts = {
        "reasoningTokens": usage.reasoning_tokens,
        "cachedInputTokens": usage.cache_read_tokens,
        "cacheWriteInputTokens": usage.cache_write_tokens,
    }
    return {
        **({"provider": provider} if provider else {}),
        **({"model": name} if name else {}),
        "inputTokens": usage.input_tokens,
        "outputTokens": usage.output_tokens,
        "totalTokens": usage.input_tokens + usage.output_tokens,
        **{part: tokens for part, tokens in parts.items() if tokens},
    }


# Questions ----------------------------------------------------------------------------------------


def _interrupt(run_id: str, event: InputRequested) -> dict[str, Any]:
    """What a person is asked; its id leads back to the run, and is like no other in the thread."""
    questions = event.questions
    return {
        "id": f"{run_id}:{event.request_id}",
        "reason": (
            "confirmation" if all(q.kind == "confirm" for q in questions) else "input_required"
        ),
        "message": "\n".join(question.prompt for question in questions),
        "responseSchema": {
            "type": "object",
            "properties": {question.id: _answer_schema(question) for question in questions},
            "required": [question.id for question in questions],
        },
    }


def _answer_schema(question: Question) -> dict[str, Any]:
    options = [
        {"const": option.id, "title": option.label or option.id} for option in question.options
    ]
    match question.kind:
        case "text":
            schema: dict[str, Any] = {"type": "string"}
        case "confirm":
            schema = {"type": "boolean"}
        case "choice":
            schema = {"type": "string", "oneOf": options}
        case "choices":
            items = {"type": "string", "oneOf": options}
            schema = {"type": "array", "items": items, "uniqueItems": True}
        case _:
            assert_never(question.kind)
    return schema | {"title": question.prompt}


# Requests -----------------------------------------------------------------------------------------


class Tool(Struct):
    """A tool of the client.

    Attributes:
        parameters: A JSON Schema of type object; none for a tool without arguments.
    """

    name: str
    description: str = ""
    parameters: Any = None


class Context(Struct):
    """Something that the agent should know beside the conversation."""

    description: str
    value: str


class ResumeEntry(Struct, rename="camel"):
    """An answer to an interrupt.

    Attributes:
        payload: What its `responseSchema` describes; to one question also the answer by itself.
    """

    interrupt_id: str
    status: Literal["resolved", "cancelled"]
    payload: Any = None


class RunAgentInput(Struct, rename="camel"):
    """What a run is given.

    Attributes:
        thread_id: The conversation; 1 to 200 printable characters without a slash.
        run_id: What the client calls this run; of one that there is already, the run.
        messages: All of the conversation so far.
        protocol_version: None for a client from before 1.0.
        state: An object that the run's values will lie over.
        tools: What the client can do for a model.
        context: What a model is told first.
        forwarded_props: For the agent, whatever it is.
        resume: Answers to all interrupts of the run before.
    """

    thread_id: str
    run_id: str
    messages: Annotated[list[Raw], msgspec.Meta(max_length=MAX_MESSAGES)]
    protocol_version: str | None = None
    parent_run_id: str | None = None
    state: Any = None
    tools: list[Tool] | None = None
    context: list[Context] | None = None
    forwarded_props: Any = None
    resume: list[ResumeEntry] | None = None


class _Message(Struct):
    role: str
    id: str


class _Part(Struct):
    type: str
    text: Any = None


_Parts: TypeAlias = Annotated[list[_Part], msgspec.Meta(max_length=MAX_MESSAGES)]


class _Said(Struct):
    content: str | _Parts | None = None


class _Function(Struct):
    name: str
    arguments: str = ""


class _Call(Struct):
    id: str
    function: _Function


class _Assistant(Struct, rename="camel"):
    content: str | None = None
    tool_calls: Annotated[list[_Call], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None


class _Result(Struct, rename="camel"):
    tool_call_id: str
    content: str | _Parts
    error: str | None = None
    metadata: dict[str, Any] | None = None


class CancelBody(Struct):
    """Why a run is to end."""

    reason: str | None = None


def decode_run(request: Request) -> Start:
    """`POST /agui/{agent}`."""
    body = read_body(request, RunAgentInput, what="run an agent with")
    see_name(body.thread_id, "threadId")
    if len(body.run_id) > MAX_NAME:
        raise BadRequest(f"runId: expected at most {MAX_NAME} characters, got {len(body.run_id)}")
    messages = [(_read(place, each, _Message), each) for place, each in enumerate(body.messages)]
    asking, answers = _read_answers(body.resume or ())
    run_id = asking or (body.run_id if _fits(body.run_id) else None)
    own = frozenset(message.id for message, _ in messages if _is_of(run_id, message.id))
    state = body.state if isinstance(body.state, dict) else {}
    view = View(
        is_early=_is_early(body.protocol_version),
        run_id=None if body.run_id == run_id else body.run_id,
        state=_encode(state) if state else b"",
        snapshot=_snapshot(messages, own) if own else b"",
    )
    context = [asdict(each) for each in body.context or ()]
    known = {"state": body.state, "context": context, "forwardedProps": body.forwarded_props}
    start = Start(
        agent=request.parameters["agent"],
        input="",
        delivery="stream",
        run_id=run_id,
        rejoins=run_id is not None,
        thread_id=body.thread_id,
        tools=tuple(map(_spec, body.tools or ())),
        metadata={name: value for name, value in known.items() if value} or None,
        if_busy="supersede",
        options=None if view == View() else view,
    )
    if asking is not None:
        return replace(start, continues=asking, answers=answers)
    others = ((place, m, raw) for place, (m, raw) in enumerate(messages) if m.id not in own)
    return _continue(start, context, _told_before(others))


def _read_answers(entries: Sequence[ResumeEntry]) -> tuple[str | None, dict[str, Any]]:
    """The run that has asked, and its answers by request id; None where there are none."""
    split = [entry.interrupt_id.rpartition(":") for entry in entries]
    asking = {run_id for run_id, _, _ in split}
    if len(asking) > 1 or "" in asking:
        raise BadRequest(
            "resume: expected answers to the interrupts of one run, as it has named them, got "
            f"{', '.join(entry.interrupt_id for entry in entries)[:80]!r}"
        )
    answers = {
        request_id: entry.payload if entry.status == "resolved" else None
        for (_, _, request_id), entry in zip(split, entries, strict=True)
    }
    return (asking.pop() if asking else None), answers


def _continue(
    start: Start, context: Sequence[Mapping[str, str]], messages: Sequence[Message]
) -> Start:
    """Begin a run with what was said last, and what was said before."""
    shown = "\n\n".join(f"{each['description']}:\n{each['value']}" for each in context)
    begin = (SystemMessage(shown),) if shown else ()
    if answers := _last_answers(messages):
        told = [
            {"toolCallId": each.call_id, "name": each.name, "content": decode_json(each.content)}
            for each in answers
        ]
        history = (*begin, *messages[: -len(answers)])
        return replace(start, input=told, history=history, said=answers)
    for place in reversed(range(len(messages))):
        message = messages[place]
        if isinstance(message, UserMessage):
            # What was said behind it, by a run before, is to be gone on with.
            said = tuple(messages[place:]) if place + 1 < len(messages) else None
            history = (*begin, *messages[:place])
            return replace(start, input=message.text, history=history, said=said)
    return replace(start, history=begin, said=tuple(messages) or None)


def _last_answers(messages: Sequence[Message]) -> tuple[ToolMessage, ...]:
    """Tools' answers that nothing was said behind."""
    found: list[ToolMessage] = []
    for message in reversed(messages):
        if not isinstance(message, ToolMessage):
            break
        found.append(message)
    return tuple(reversed(found))


def _is_early(version: str | None) -> bool:
    """Whether a client is from before 1.0; what is no version at all is newer than we know."""
    return version is None or version.partition(".")[0].strip("0") == ""


def _fits(run_id: str) -> bool:
    """Whether it may stand in a path."""
    try:
        see_name(run_id, "runId")
    except BadRequest:
        return False
    return True


def _is_of(run_id: str | None, message_id: str) -> bool:
    """Whether a message is one of that run, as `AGUIEncoder` names them."""
    run, _, place = message_id.rpartition("-")
    return run == run_id and place.isdigit()


def _spec(tool: Tool) -> ToolSpec:
    has_schema = isinstance(tool.parameters, dict) and bool(tool.parameters)
    return ToolSpec(tool.name, tool.description, tool.parameters if has_schema else NO_PARAMETERS)


def _read(place: int, message: Raw, shape: type[Shape]) -> Shape:
    try:
        return msgspec.json.decode(message, type=shape)
    except msgspec.DecodeError as error:
        raise BadRequest(f"messages[{place}]: expected a message: {error}") from error


def _snapshot(messages: Iterable[tuple[_Message, Raw]], own: Collection[str]) -> bytes:
    """The messages that the client has, those of this run empty.

    They keep their places, and what comes again fills them. Tools' answers would come twice and are
    left out; reasoning that were left out would stay as it is.
    """
    kept = []
    for message, raw in messages:
        if message.id not in own:
            kept.append(raw)
        elif message.role != "tool":
            kept.append(Raw(_encode({"id": message.id, "role": message.role, "content": ""})))
    return _event("MESSAGES_SNAPSHOT", messages=kept)


def _told_before(messages: Iterable[tuple[int, _Message, Raw]]) -> list[Message]:
    """What a model is told of a conversation; of what it cannot be told, nothing."""
    found: list[Message] = []
    names: dict[str, str] = {}  # of tools, by the ids of their calls
    foreign: set[str] = set()  # calls of tools that a provider has run by itself
    for place, message, raw in messages:
        match message.role:
            case "user":
                if text := _text_of(_read(place, raw, _Said).content):
                    found.append(UserMessage(text))
            case "system" | "developer":
                if text := _text_of(_read(place, raw, _Said).content):
                    found.append(SystemMessage(text))
            case "assistant":
                said = _read(place, raw, _Assistant)
                calls = [
                    ToolCall(call.id, call.function.name, call.function.arguments)
                    for call in said.tool_calls or ()
                ]
                names |= {call.call_id: call.name for call in calls}
                if said.content or calls:
                    found.append(AssistantMessage(said.content or "", tuple(calls)))
            case "tool":
                result = _read(place, raw, _Result)
                ours = (result.metadata or {}).get(OURS)
                noted = ours if isinstance(ours, dict) else {}
                if noted.get("source") is not None:
                    foreign.add(result.tool_call_id)
                    continue
                is_error = result.error is not None or noted.get("isError") is True
                name = names.get(result.tool_call_id, "")
                content = _as_json(_text_of(result.content) or result.error or "")
                found.append(ToolMessage(result.tool_call_id, name, content, is_error))
            case _:  # reasoning, what a page shows beside the conversation, what is new
                pass
    return [*_without(foreign, found)] if foreign else found


def _without(foreign: set[str], messages: Iterable[Message]) -> Iterator[Message]:
    """Take out calls that no model is to be told of: its provider has not let it make them."""
    for message in messages:
        if not isinstance(message, AssistantMessage):
            yield message
            continue
        calls = tuple(call for call in message.tool_calls if call.call_id not in foreign)
        if message.text or calls:
            yield AssistantMessage(message.text, calls)


def _text_of(content: str | list[_Part] | None) -> str:
    """The text of a message; a part that is none is dropped, as by any peer that cannot use it."""
    if not isinstance(content, list):
        return content or ""
    texts = [part.text for part in content if part.type == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest("messages: expected a text in each part of the type 'text', got none")
    return "\n".join(texts)


def _as_json(text: str) -> str:
    """What a tool has answered: an object or a list as it is, anything else as a string."""
    if text.startswith(("{", "[")):
        with suppress(BadRequest):
            decode_json(text)
            return text
    return _encode(text).decode()


def decode_watch(request: Request) -> Watch:
    """`GET /agui/{agent}/runs/{run_id}`."""
    know_query(request.query, "after", "protocolVersion")
    last = request.headers.get("last-event-id", request.query.get("after", "0"))
    try:
        after = parse_position(last or "0")
    except FieldError as error:
        raise BadRequest(str(error)) from error
    is_early = _is_early(request.query.get("protocolVersion", PROTOCOL))
    return Watch(
        run_id=request.parameters["run_id"],
        after=after,
        goes_on=True,
        options=View(is_early=True) if is_early else None,
        framing=attrs.evolve(FRAMING, farewell=retry),
    )


def decode_cancel(request: Request) -> Cancel:
    """`POST /agui/{agent}/runs/{run_id}/cancel`."""
    body = read_body(request, CancelBody, what="cancel with")
    return Cancel(run_id=request.parameters["run_id"], reason=body.reason)


# Answers ------------------------------------------------------------------------------------------


def present(snapshot: RunSnapshot) -> bytes:
    """A run as a JSON object."""
    return _encode(
        {
            "threadId": snapshot.thread_id,
            "runId": snapshot.id,
            "agent": snapshot.agent,
            "state": snapshot.state,
            "outcome": snapshot.outcome,
            "result": snapshot.result,
            "error": snapshot.error,
            "receipt": snapshot.receipt,
        }
    )


def refuse(problem: Problem) -> Reply:
    """Answer a request that started nothing, in the words of RUN_ERROR; the client raises it."""
    status = problem.status if 400 <= problem.status < 600 else 500
    return Reply(_encode({"message": problem.message, "code": problem.code}), status)


STREAM: Final = "text/event-stream"
FRAMING: Final = Framing(
    prelude=comment(),
    heartbeat=comment(),
    ends_at=frozenset({InputRequested}),
)

AGUI: Final = Dialect(
    name="agui",
    mount="/agui",
    routes=(
        Route(
            "POST",
            "/<agent>",
            decode_run,
            doc=Doc(
                summary="Run an agent, or come back to its run",
                body=RunAgentInput,
                answers={200: (STREAM,)},
            ),
        ),
        Route(
            "GET",
            "/<agent>/runs/<run_id>",
            decode_watch,
            doc=Doc(
                summary="Stream a run from a place on",
                query={
                    "after": "The id of the last frame that was read; 0 for all of them.",
                    "protocolVersion": "0 for the forms from before 1.0.",
                },
                answers={200: (STREAM,), 204: ()},
            ),
        ),
        Route(
            "POST",
            "/<agent>/runs/<run_id>/cancel",
            decode_cancel,
            doc=Doc(
                summary="Cancel a run",
                body=CancelBody,
                answers={200: (dict,), 202: (dict,)},
            ),
        ),
    ),
    encoder=make_encoder,
    present=present,
    framing=FRAMING,
    on_disconnect="grace",
    problem=refuse,
    max_body=MAX_HISTORY,
)
