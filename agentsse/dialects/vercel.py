"""Vercel's AI SDK: what `useChat` speaks, its UI message stream v1.

Knows: the routes below `/chat`, UI messages and their parts, and the chunks that make one. Must
never know what a run is beyond its events and its snapshot. Source: the AI SDK's documentation,
"Stream Protocols" and "Chatbot Resume Streams", as the clients of its versions 6 and 7 read them;
only chunks that both know are sent, since one that is unknown ends a client's stream.

A run is one message of the assistant, and the run's id is the message's. A response is frames of
data only, without ids, from `start` to `finish` and `[DONE]`; a run that came to nothing has
`error` in place of `finish`, one that somebody stopped has `abort`. A model call and the tools that
it asks for are one step. What an agent emits is a part `data-<name>`, each of its values one
`data-values` with the value's name as the id, what a tool prints a `data-tool-output` that passes.

- Whoever comes back (`resumeStream`) is given the whole message again, which takes the place of
  what the client had of it; also once the run is over, until somebody has read it to its end.
- The client's `stop()` is no request: it closes the connection, like any that breaks. Under `grace`
  the run goes on until its time is up, or the next message takes its place. To end it at once there
  is `POST /chat/{id}/stop`, which is ours, as the protocol has none.
- What a run asks ends the response. One question of yes or no is a call of the dynamic tool
  `confirm` that wants approval; all else is a call of `ask_user`, answered by its output. The
  message that comes back with it goes on with the run. Each has a step of its own, for the client's
  rules of when to send by itself look at the last step alone.
- The protocol has no word for tools of the client's own. They stand in the field `tools` beside the
  messages, by name, as assistant-ui has it. What such a tool gives comes back with the message, and
  another run goes on with the same message.
- Files cannot be given to an agent. Steering, and what has no chunk, is not shown.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias, assert_never

import attrs
import msgspec
from msgspec import UNSET, Raw, UnsetType

from agentsse.errors import BadRequest
from agentsse.events import (
    NULL,
    AnyEvent,
    Custom,
    FinishReason,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    Moderation,
    PartDelta,
    PartFinished,
    PartStarted,
    Problem,
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
from agentsse.sse import comment, encode as encode_frame

from . import (
    MAX_HISTORY,
    MAX_MESSAGES,
    SSE,
    Cancel,
    Dialect,
    Doc,
    Framing,
    Reply,
    Request,
    Route,
    Start,
    Watch,
    read_body,
    see_name,
)

CONFIRM: Final = "confirm"
ASK: Final = "ask_user"
REFUSAL: Final = "This request was refused."
CONTINUED: Final = "continued"
"""The encoder's option for a client that has what the message held before the run."""

DONE: Final = b"data: [DONE]\n\n"
START_STEP: Final = b'data: {"type":"start-step"}\n\n'
FINISH_STEP: Final = b'data: {"type":"finish-step"}\n\n'

REASONS: Final[Mapping[FinishReason | None, str]] = {
    "length": "length",
    "content_filter": "content-filter",
    "other": "other",
}
"""Why a message ended, where that is not `stop`, and not for tools or questions."""

LF, CR = b"\n\r"

_encode = msgspec.json.encode


# Messages, as clients hold them -------------------------------------------------------------------


class _Approval(msgspec.Struct):
    id: str
    approved: bool | None = None


class _Part(msgspec.Struct, rename="camel"):
    """A piece of a message.

    Attributes:
        type: `text`, `reasoning`, `step-start`, `tool-<name>`, `dynamic-tool`, or another.
        text: Of text and reasoning.
        tool_name: Of a dynamic tool.
        state: How far a call has come.
        input: What a tool was called with.
        output: What it gave.
        error_text: Why it gave nothing.
    """

    type: str
    text: str | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None
    state: str | None = None
    input: Raw | UnsetType = UNSET
    output: Raw | UnsetType = UNSET
    error_text: str | None = None
    approval: _Approval | None = None
    provider_executed: bool | None = None

    @property
    def is_call(self) -> bool:
        """Whether it is a tool's call."""
        return self.type == "dynamic-tool" or self.type.startswith("tool-")

    @property
    def is_question(self) -> bool:
        """Whether it is what a run asks."""
        return self.type == "dynamic-tool" and self.tool_name in (CONFIRM, ASK)

    @property
    def name(self) -> str:
        """Of the tool that is called."""
        dynamic = self.type == "dynamic-tool"
        return (self.tool_name or "") if dynamic else self.type.removeprefix("tool-")


class _UIMessage(msgspec.Struct):
    """A message of a chat.

    Attributes:
        parts: What it is made of.
    """

    role: Literal["system", "user", "assistant"]
    parts: Annotated[list[_Part], msgspec.Meta(max_length=MAX_MESSAGES)]
    id: str = ""

    @property
    def text(self) -> str:
        """All its text."""
        return "\n".join(part.text for part in self.parts if part.type == "text" and part.text)


def _steps(parts: Sequence[_Part]) -> list[list[_Part]]:
    """The parts between the marks where steps start."""
    steps: list[list[_Part]] = [[]]
    for part in parts:
        if part.type == "step-start":
            steps.append([])
        else:
            steps[-1].append(part)
    return steps


class _Whole(msgspec.Struct):
    """A message whose parts stand as they came."""

    parts: list[Raw]


@attrs.frozen
class _Held:
    """The message that a run continues, and its parts as they came."""

    id: str
    parts: list[tuple[_Part, Raw]]


def _held(value: Raw) -> _Held | None:
    """Read a run's input as the message that it continues; None where it is something else."""
    try:
        message = msgspec.json.decode(value, type=_UIMessage)
        whole = msgspec.json.decode(value, type=_Whole)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None
    if message.role != "assistant" or not message.id:
        return None
    return _Held(message.id, list(zip(message.parts, whole.parts, strict=True)))


# Chunks -------------------------------------------------------------------------------------------


def _chunk(kind: str, **fields: Any) -> bytes:
    """Write a frame; of the values those that are `Raw` stand as they are."""
    data = _encode({"type": kind, **fields})
    if LF in data or CR in data:  # there is JSON in it that somebody else has formatted
        return encode_frame(data)
    return b"data: %b\n\n" % data


def _value(raw: Raw) -> Raw:
    """A value as clients take it: they end a stream that names what they fear, so it is text."""
    data = bytes(raw)
    if b'"__proto__"' in data or (b'"constructor"' in data and b'"prototype"' in data):
        return Raw(_encode(data.decode()))
    return raw


def _input_of(text: str) -> Raw:
    """What a model has written to call a tool: as a value, or else as the text that it is."""
    try:
        return _value(Raw(_encode(msgspec.json.decode(text or "{}"))))
    except (msgspec.DecodeError, RecursionError, ValueError):
        return Raw(_encode(text))


def _error_text(result: Raw) -> str:
    """What a tool says that has failed."""
    try:
        return msgspec.json.decode(result, type=_ToolError).error
    except msgspec.DecodeError:
        return text_of_json(result)


class _ToolError(msgspec.Struct):
    error: str


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens in the SDK's own words, its `LanguageModelUsage`."""
    cached = usage.cache_read_tokens + usage.cache_write_tokens
    return {
        "inputTokens": usage.input_tokens,
        "inputTokenDetails": {
            "noCacheTokens": max(0, usage.input_tokens - cached),
            "cacheReadTokens": usage.cache_read_tokens,
            "cacheWriteTokens": usage.cache_write_tokens,
        },
        "outputTokens": usage.output_tokens,
        "outputTokenDetails": {
            "textTokens": max(0, usage.output_tokens - usage.reasoning_tokens),
            "reasoningTokens": usage.reasoning_tokens,
        },
        "totalTokens": usage.input_tokens + usage.output_tokens,
    }


_Streamed: TypeAlias = Literal["text", "reasoning"]


@attrs.define(eq=False)
class MessageEncoder:
    """The events of one run as chunks of one message.

    It closes what is open before a response ends, or a step, and opens it again where more of it
    comes: a client keeps nothing open beyond either.

    Attributes:
        is_continued: The client has what the message held before the run; otherwise that comes
            first.
    """

    is_continued: bool = False
    _run_id: str = ""
    _start: bytes = b""  # of each response but the first
    _is_open: bool = False  # whether a response is
    _in_step: bool = False
    _models: set[str] = attrs.field(factory=set)  # steps of model calls that are under way
    _streams: dict[str, _Streamed] = attrs.field(factory=dict)  # open parts
    _inputs: dict[str, str] = attrs.field(factory=dict)  # call ids, by parts that are being written
    _calls: dict[str, None] = attrs.field(factory=dict)  # without a result
    _confirms: set[str] = attrs.field(factory=set)  # request ids
    _has_calls: bool = False  # in the last step, and the client might take them for its own
    _has_spoken: bool = False
    _blocked: str | None = None  # what a shield has said; None once something else was said
    _is_filtered: bool = False
    _stopped: FinishReason | None = None  # why the last model call ended

    def feed(self, event: AnyEvent) -> Sequence[bytes]:
        """Turn one event into its frames."""
        frames = tuple(self._take(event))
        if not frames:
            return ()
        was_open, self._is_open = self._is_open, frames[-1] is not DONE
        return frames if was_open else (self._start, *frames)

    def _take(self, event: AnyEvent) -> Iterator[bytes]:
        match event:
            case RunStarted():
                yield from self._begin(event)
            case StepStarted(kind="model"):
                self._models.add(event.step_id)
                if not self._inputs:
                    yield from self._end_step()  # the next one begins with what is said in it
            case StepFinished(kind="model"):
                self._models.discard(event.step_id)
                self._stopped = event.finish_reason
            case PartStarted() | PartDelta() | PartFinished():
                yield from self._take_part(event)
            case ToolStarted():
                if event.call_id not in self._calls:
                    is_foreign = bool(self._models)  # a provider runs its tools in its own step
                    yield from self._call(
                        event.call_id, event.name, _value(event.arguments), is_foreign=is_foreign
                    )
            case ToolOutputDelta():
                data = {"toolCallId": event.call_id, "delta": event.delta}
                yield _chunk("data-tool-output", data=data, transient=True)
            case ToolFinished():
                yield self._answer(event)
            case Custom():
                yield _chunk(f"data-{event.name}", data=_value(event.value))
            case ValuesChanged():
                values = msgspec.json.decode(event.values, type=dict[str, Raw])
                for name, value in values.items():
                    yield _chunk("data-values", id=name, data=_value(value))
            case Moderation(violation=True):
                self._is_filtered, self._blocked = True, event.message or REFUSAL
            case InputRequested():
                yield from self._ask(event)
            case InputReceived():
                yield self._hear(event)
            case InputWithdrawn():
                yield self._fail(self._question(event.request_id), "The question was withdrawn.")
            case RunFinished():
                yield from self._finish(event)
            case _:
                pass

    # The beginning

    def _begin(self, event: RunStarted) -> Iterator[bytes]:
        held = _held(event.input)
        self._run_id, message_id = event.run_id, held.id if held else event.run_id
        self._start, self._is_open = _chunk("start", messageId=message_id), True
        metadata = {"runId": event.run_id, "agent": event.agent}
        yield _chunk("start", messageId=message_id, messageMetadata=metadata)
        if held is not None:
            if not self.is_continued:
                for number, (part, raw) in enumerate(held.parts):
                    yield from self._retell(part, raw, f"before{number}")
            self._has_calls = True  # and what the client has brought stands in its last step

    def _retell(self, part: _Part, raw: Raw, part_id: str) -> Iterator[bytes]:
        """Tell a part that the message held before the run."""
        match part.type:
            case "step-start":
                yield from self._begin_step()
            case "text" | "reasoning":
                yield from self._say(part_id, part.type, part.text or "")
                yield from self._end_streams()
            case "file" | "source-url" | "source-document":
                yield b"data: %b\n\n" % bytes(raw)
            case kind if kind.startswith("data-"):
                yield b"data: %b\n\n" % bytes(raw)
            case _ if part.is_call:
                yield from self._retell_call(part)
            case _:
                pass

    def _retell_call(self, part: _Part) -> Iterator[bytes]:
        call_id = part.tool_call_id or ""
        fields: dict[str, Any] = {"dynamic": True} if part.type == "dynamic-tool" else {}
        if part.provider_executed:
            fields["providerExecuted"] = True
        yield _chunk(
            "tool-input-available",
            toolCallId=call_id,
            toolName=part.name,
            input=None if part.input is UNSET else part.input,
            **fields,
        )
        if part.approval is not None:
            approval_id = part.approval.id
            yield _chunk("tool-approval-request", approvalId=approval_id, toolCallId=call_id)
        match part.state:
            case "output-available" if part.output is not UNSET:
                yield _chunk("tool-output-available", toolCallId=call_id, output=part.output)
            case "output-error":
                yield self._fail(call_id, part.error_text or "")
            case "output-denied":
                yield _chunk("tool-output-denied", toolCallId=call_id)
            case _:
                pass

    # Steps

    def _begin_step(self) -> Iterator[bytes]:
        if self._inputs:  # a client looks for what is being written in the last step only
            return
        yield from self._end_step()
        self._in_step, self._has_calls = True, False
        yield START_STEP

    def _end_step(self) -> Iterator[bytes]:
        yield from self._end_streams()
        if self._in_step:
            self._in_step = False
            yield FINISH_STEP

    def _enter(self) -> Iterator[bytes]:
        """See that there is a step for what comes; it is not that of calls with their answers."""
        if not self._in_step or (self._has_calls and not self._calls):
            yield from self._begin_step()

    # What is said

    def _take_part(self, event: PartStarted | PartDelta | PartFinished) -> Iterator[bytes]:
        kind: _Streamed
        match event.kind:
            case "tool_call":
                yield from self._take_call(event)
                return
            case "reasoning":
                kind = "reasoning"
            case "text" | "refusal":
                kind = "text"
            case _:
                assert_never(event.kind)
        match event:
            case PartStarted():
                pass  # it may remain empty
            case PartDelta():
                self._has_spoken |= kind == "text"
                self._stopped = self._blocked = None
                yield from self._say(event.part_id, kind, event.delta)
            case PartFinished():
                if event.part_id in self._streams:
                    yield self._end_stream(event.part_id)
            case _:
                assert_never(event)

    def _say(self, part_id: str, kind: _Streamed, text: str) -> Iterator[bytes]:
        if part_id not in self._streams:
            yield from self._enter()
            self._streams[part_id] = kind
            yield _chunk(f"{kind}-start", id=part_id)
        yield _chunk(f"{kind}-delta", id=part_id, delta=text)

    def _end_stream(self, part_id: str) -> bytes:
        return _chunk(f"{self._streams.pop(part_id)}-end", id=part_id)

    def _end_streams(self) -> Iterator[bytes]:
        for part_id in tuple(self._streams):
            yield self._end_stream(part_id)

    # Calls of tools

    def _take_call(self, event: PartStarted | PartDelta | PartFinished) -> Iterator[bytes]:
        match event:
            case PartStarted():
                call_id, name = event.call_id or event.part_id, event.name or ""
                yield from self._enter()
                self._inputs[event.part_id] = call_id
                self._calls[call_id] = None
                self._has_calls = True
                yield _chunk("tool-input-start", toolCallId=call_id, toolName=name)
            case PartDelta():
                call_id = self._inputs[event.part_id]
                yield _chunk("tool-input-delta", toolCallId=call_id, inputTextDelta=event.delta)
            case PartFinished():
                call_id = self._inputs.pop(event.part_id)
                yield _chunk(
                    "tool-input-available",
                    toolCallId=call_id,
                    toolName=event.name or "",
                    input=_input_of(event.text),
                )
            case _:
                assert_never(event)

    def _call(
        self,
        call_id: str,
        name: str,
        value: Any,
        *,
        is_foreign: bool = False,
        is_dynamic: bool = False,
    ) -> Iterator[bytes]:
        """Tell of a call as a whole."""
        fields = {"dynamic": is_dynamic, "providerExecuted": is_foreign}
        yield from self._enter()
        self._calls[call_id] = None
        self._has_calls |= not is_foreign
        yield _chunk(
            "tool-input-available",
            toolCallId=call_id,
            toolName=name,
            input=value,
            **{field: True for field, is_so in fields.items() if is_so},
        )

    def _answer(self, event: ToolFinished) -> bytes:
        if event.is_error:
            return self._fail(event.call_id, _error_text(event.result))
        self._calls.pop(event.call_id, None)
        output = _value(event.result)
        return _chunk("tool-output-available", toolCallId=event.call_id, output=output)

    def _fail(self, call_id: str, text: str) -> bytes:
        self._calls.pop(call_id, None)
        return _chunk("tool-output-error", toolCallId=call_id, errorText=text)

    # Questions

    def _question(self, request_id: str) -> str:
        """A request's id as that of a call: ids of requests begin anew with each run."""
        return f"{self._run_id}:{request_id}"

    def _ask(self, event: InputRequested) -> Iterator[bytes]:
        call_id, questions = self._question(event.request_id), event.questions
        self._has_spoken, self._blocked = False, None
        yield from self._begin_step()
        if [question.kind for question in questions] == ["confirm"]:
            self._confirms.add(event.request_id)
            value: Any = {"prompt": questions[0].prompt}
            yield from self._call(call_id, CONFIRM, value, is_dynamic=True)
            yield _chunk("tool-approval-request", approvalId=call_id, toolCallId=call_id)
        else:
            yield from self._call(call_id, ASK, {"questions": questions}, is_dynamic=True)
        yield from self._end_step()
        yield _chunk("finish", finishReason="tool-calls")
        yield DONE

    def _hear(self, event: InputReceived) -> bytes:
        call_id = self._question(event.request_id)
        self._calls.pop(call_id, None)
        values = list(msgspec.json.decode(event.answers, type=dict[str, Raw]).values())
        answer = values[0] if len(values) == 1 else event.answers
        if event.request_id in self._confirms and bytes(answer) != b"true":
            return _chunk("tool-output-denied", toolCallId=call_id)
        return _chunk("tool-output-available", toolCallId=call_id, output=_value(answer))

    # The end

    def _finish(self, event: RunFinished) -> Iterator[bytes]:
        last = self._last(event)
        if event.outcome == "success":
            yield from self._say_at_last(event)
        for call_id in [each for each in self._calls if each not in event.pending]:
            yield self._fail(call_id, "The run ended before the tool had answered.")
        self._inputs.clear()
        if self._has_calls and not event.pending:
            # Else a client that sends by itself once all calls are answered would send this again.
            yield from self._begin_step()
        yield from self._end_step()
        yield last
        yield DONE

    def _say_at_last(self, event: RunFinished) -> Iterator[bytes]:
        """Say what a shield has said, or the result of an agent that has said nothing."""
        result = NULL if event.result is UNSET else event.result
        if self._blocked is not None:
            yield from self._say("end", "text", self._blocked)
        elif not (self._has_spoken or event.pending or bytes(result) == b"null"):
            yield from self._say("end", "text", text_of_json(result))

    def _last(self, event: RunFinished) -> bytes:
        match event.outcome:
            case "success" if self._stopped == "error":
                return _failure("the model stopped because of an error")
            case "success":
                reason = REASONS.get(self._stopped, "stop")
                if event.pending:
                    reason = "tool-calls"
                elif self._is_filtered:
                    reason = "content-filter"
                metadata = {"usage": _usage(event.usage)}
                return _chunk("finish", finishReason=reason, messageMetadata=metadata)
            case "error":
                return _failure(event.error.message if event.error else "the run has failed")
            case "cancelled" | "interrupted":
                cause = event.receipt.cause
                if cause in ("client_cancel", "disconnect", "parent"):
                    return _chunk("abort", reason=cause)
                # Nobody wanted this end: a client takes an abort for a good one.
                return _failure("the run was cancelled" + (f" ({cause})" if cause else ""))
            case _:
                assert_never(event.outcome)


def _failure(text: str) -> bytes:
    return _chunk("error", errorText=text)


def make_encoder(options: Hashable) -> MessageEncoder:
    """Make the machine; the one option there is, is `CONTINUED`."""
    return MessageEncoder(is_continued=options == CONTINUED)


def refuse(problem: Problem) -> Reply:
    """Answer with an error in plain words: a client takes the body for the error's message."""
    status = problem.status if 400 <= problem.status < 600 else 500
    return Reply(problem.message.encode(), status, "text/plain; charset=utf-8")


def _present(snapshot: RunSnapshot) -> bytes:
    return _encode(snapshot)


# Requests -----------------------------------------------------------------------------------------


class _Tool(msgspec.Struct, rename="camel"):
    """A tool of the client's.

    Attributes:
        parameters: A JSON Schema of type object.
        input_schema: The same under the name that the SDK's own tools have for it.
    """

    description: str | None = None
    parameters: dict[str, Any] | None = None
    input_schema: dict[str, Any] | None = None


_SAMPLE = [{"id": "m1", "role": "user", "parts": [{"type": "text", "text": "Hello"}]}]


class _Chat(msgspec.Struct):
    """A chat, as `useChat` sends it; what it may send beside this is overlooked.

    Attributes:
        id: Of the chat.
        messages: All of it. The last one is the user's, or the assistant's with answers in it.
        trigger: What made the client send it; it makes no difference.
        agent: Who is to answer: a name.
        model: The same, or the `PROVIDER:MODEL` that the agent runs on.
        tools: The client's own, by name.
    """

    id: str
    messages: Annotated[
        list[_UIMessage],
        msgspec.Meta(min_length=1, max_length=MAX_MESSAGES, examples=[_SAMPLE]),
    ]
    trigger: str | None = None
    agent: str | None = None
    model: str | None = None
    tools: dict[str, _Tool] | None = None


class _Messages(msgspec.Struct):
    messages: list[Raw]


def decode_chat(request: Request) -> Start:
    """`POST /chat`.

    Raises:
        BadRequest: It makes no sense; the message says what is missing.
    """
    body = read_body(request, _Chat, what="answer in a chat")
    see_name(body.id, "id")
    last, said = body.messages[-1], None
    history = [told for message in body.messages[:-1] for told in _told(message)]
    value: Any = last.text
    options = None
    if last.role != "user":
        if (answered := _answers(last)) is not None:
            run_id, answers = answered
            return Start(
                agent=None,
                input=None,
                delivery="stream",
                thread_id=body.id,
                continues=run_id,
                answers=answers,
            )
        history += _told(last)
        said = _taken_from_end(history)
        # As it came, and whole: what the message held before is in no other place.
        value, options = msgspec.json.decode(_last_of(request)), CONTINUED
    elif not value:
        raise BadRequest(
            "messages: expected text in the last one, for it is what the agent is given; got "
            f"parts of the types {', '.join(part.type for part in last.parts)[:80] or '(none)'}"
        )
    return Start(
        agent=body.agent or body.model,
        input=value,
        delivery="stream",
        thread_id=body.id,
        history=tuple(history),
        said=said,
        tools=_specs(body.tools or {}),
        if_busy="supersede",
        options=options,
    )


def _last_of(request: Request) -> Raw:
    return msgspec.json.decode(request.body, type=_Messages).messages[-1]


def _answers(message: _UIMessage) -> tuple[str, dict[str, Any]] | None:
    """The run that has asked, and the answers by request id; None where none has.

    What stands before the last step was answered by earlier requests.
    """
    questions = [part for part in _steps(message.parts)[-1] if part.is_question]
    if not questions:
        return None
    answers: dict[str, Any] = {}
    run_id = ""
    for part in questions:
        run_id, _, request_id = (part.tool_call_id or "").rpartition(":")
        match part.state:
            case "approval-responded":
                answers[request_id] = bool(part.approval and part.approval.approved)
            case "output-available" if part.output is not UNSET:
                answers[request_id] = msgspec.json.decode(part.output)
            case "output-error" | "output-denied":
                answers[request_id] = None
            case _:
                pass
    if not answers:
        raise BadRequest(
            "messages: expected an answer to what the last one asks, got none: approve the call of "
            f"{CONFIRM!r}, or add the output of that of {ASK!r}"
        )
    return run_id, answers


def _taken_from_end(history: list[Message]) -> tuple[ToolMessage, ...]:
    """Take what tools have answered from the end of a conversation, and give it."""
    said: list[ToolMessage] = []
    while history and isinstance(history[-1], ToolMessage):
        said.append(history[-1])
        history.pop()
    if not said:
        raise BadRequest(
            "messages: expected the last one to be the user's, or to hold what the tools of the "
            "client have given in its last step; got one that asks for nothing"
        )
    return tuple(reversed(said))


def _specs(tools: Mapping[str, _Tool]) -> tuple[ToolSpec, ...]:
    empty = {"type": "object", "properties": {}}
    return tuple(
        ToolSpec(name, tool.description or "", tool.parameters or tool.input_schema or empty)
        for name, tool in tools.items()
    )


def _told(message: _UIMessage) -> Iterator[Message]:
    """What a model is told of a message; of an assistant's, step by step."""
    match message.role:
        case "system":
            if message.text:
                yield SystemMessage(message.text)
        case "user":
            if message.text:
                yield UserMessage(message.text)
        case "assistant":
            for parts in _steps(message.parts):
                yield from _told_of_step(parts)
        case _:
            assert_never(message.role)


def _told_of_step(parts: Sequence[_Part]) -> Iterator[Message]:
    """Text and calls, then what the calls gave; not thoughts, nor calls that were not the agent's.

    A provider that runs a tool itself is not told of it again, nor is the model of what people were
    asked: the tool that has asked them has answered as well.
    """
    text = "\n".join(part.text for part in parts if part.type == "text" and part.text)
    calls = [
        part
        for part in parts
        if part.is_call
        and not (part.is_question or part.provider_executed or part.state == "input-streaming")
    ]
    if text or calls:
        yield AssistantMessage(text, tuple(map(_call_of, calls)))
    for part in calls:
        call_id = part.tool_call_id or ""
        match part.state:
            case "output-available" if part.output is not UNSET:
                yield ToolMessage(call_id, part.name, bytes(part.output).decode())
            case "output-error":
                yield _failed_call(call_id, part.name, part.error_text or "the tool has failed")
            case "output-denied":
                yield _failed_call(call_id, part.name, "the user does not want this call")
            case _:
                pass


def _call_of(part: _Part) -> ToolCall:
    arguments = "{}" if part.input is UNSET else text_of_json(part.input)
    return ToolCall(part.tool_call_id or "", part.name, arguments)


def _failed_call(call_id: str, name: str, text: str) -> ToolMessage:
    return ToolMessage(call_id, name, _encode({"error": text}).decode(), is_error=True)


def decode_resume(request: Request) -> Watch:
    """`GET /chat/{id}/stream`."""
    return Watch(run_id=None, thread_id=request.parameters["thread_id"], goes_on=True)


def decode_stop(request: Request) -> Cancel:
    """`POST /chat/{id}/stop`; it does no harm to stop what has stopped."""
    idle = Reply(b"", 204)
    thread_id = request.parameters["thread_id"]
    return Cancel(thread_id=thread_id, reply_if_idle=idle, must_exist=False)


VERCEL: Final = Dialect(
    name="vercel",
    mount="/api",
    routes=(
        Route(
            "POST",
            "/chat",
            decode_chat,
            doc=Doc(
                summary="Have an agent answer in a chat, or go on with its answer.",
                body=_Chat,
                answers={200: (SSE,)},
            ),
        ),
        Route(
            "GET",
            "/chat/<thread_id>/stream",
            decode_resume,
            doc=Doc(
                summary="Come back to the answer that is being given in a chat.",
                answers={200: (SSE,), 204: ()},
            ),
        ),
        Route(
            "POST",
            "/chat/<thread_id>/stop",
            decode_stop,
            doc=Doc(
                summary="Stop what goes on in a chat, and wait until it is gone.",
                answers={200: (RunSnapshot,), 202: (RunSnapshot,), 204: ()},
            ),
        ),
    ),
    encoder=make_encoder,
    present=_present,
    framing=Framing(
        heartbeat=comment(),
        ends_at=frozenset({InputRequested}),
        headers={"x-vercel-ai-ui-message-stream": "v1"},
    ),
    on_disconnect="grace",
    problem=refuse,
    max_body=MAX_HISTORY,
)
