"""OpenAI's chat completions: an agent stands where a client expects a model.

Knows: the route `/chat/completions`, what may stand in its body, and the chunks of its stream. Must
never know what a run is beyond its events and its snapshot. Source: OpenAI's API reference, "Chat
completions", as its own Python client reads it.

A stream has frames of data only, without ids: a first chunk with the role, chunks with pieces of
what is said, one with the reason for the end, one with the usage where the client has asked for it,
and `[DONE]`. A run that came to nothing ends with an error object and no `[DONE]`: the client
raises it. A client that leaves has cancelled the run; there is no way back to a stream.

What is different here:

- `model` is the name of an agent, or the `PROVIDER:MODEL` that it runs on.
- The agent runs its own tools and they are not shown. What would need the client (its `tools`), or
  what no agent here gives (several choices, audio, log probabilities, a format, stop sequences), is
  refused. How the model is to sample is the agent's to say: `temperature`, `max_tokens` and all
  other fields are overlooked.
- The last message is the run's input, the system's messages at the beginning are its instructions.
  A run takes no conversation: what was said before stands as text, labelled, in front of the input.
- A run that asks a person ends the response with the question. The run waits on; its answer comes
  by another protocol, for this one has no word that would lead back to it.
- An agent that says nothing, and has a result, has its result as the answer.
"""

from collections.abc import Hashable, Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeAlias, assert_never

import attrs
import msgspec
from msgspec import UNSET, Raw

from agentsse.errors import BadRequest
from agentsse.events import (
    AnyEvent,
    InputRequested,
    Moderation,
    PartDelta,
    Problem,
    Question,
    RunFinished,
    RunSnapshot,
    RunStarted,
    StepFinished,
    Usage,
    decode_json,
)
from agentsse.sse import comment

from . import Dialect, Framing, Reply, Request, Route, Start, read_body

REFUSAL: Final = "This request was refused."
CANCELLED: Final = 499  # what Google's APIs say of it; the client does not try again by itself
DONE: Final = b"data: [DONE]\n\n"

Field: TypeAlias = Literal["content", "refusal", "reasoning_content"]
Reason: TypeAlias = Literal["stop", "length", "content_filter"]

_encode = msgspec.json.encode


# What a response says -----------------------------------------------------------------------------


@attrs.frozen
class _Said:
    """A piece of the message."""

    field: Field
    text: str


@attrs.frozen
class _Done:
    """The end of the response, with the tokens of the run so far."""

    reason: Reason
    usage: Usage


_Piece: TypeAlias = _Said | _Done | Problem
"""A problem is an end as well."""


@attrs.define(eq=False)
class _Turn:
    """The pure machine between events and a response, streamed or not.

    A run that asks a person has several responses; who watches it in this protocol sees them all.
    """

    _has_spoken: bool = False
    _blocked: str | None = None  # what a shield has said; None once something else was said
    _is_filtered: bool = False
    _stopped: str | None = None  # why the last model call ended, unless something was said since
    _spent: Usage = attrs.field(factory=Usage)

    def take(self, event: AnyEvent) -> Sequence[_Piece]:
        """What an event adds to the response; most add nothing."""
        match event:
            case PartDelta(kind="text"):
                return (self._say("content", event.delta),)
            case PartDelta(kind="refusal"):
                return (self._say("refusal", event.delta),)
            case PartDelta(kind="reasoning"):
                return (_Said("reasoning_content", event.delta),)
            case StepFinished(kind="model"):
                self._stopped = event.finish_reason
                self._spent += event.usage or Usage()
                return ()
            case Moderation(violation=True):
                self._is_filtered, self._blocked = True, event.message or REFUSAL
                return ()
            case InputRequested():
                prompt = self._say(
                    "content", _asked(event.questions, is_first=not self._has_spoken)
                )
                self._has_spoken, self._is_filtered, self._blocked = False, False, None
                return (prompt, _Done("stop", self._spent))
            case RunFinished():
                return self._finish(event)
            case _:
                return ()

    def _say(self, field: Field, text: str) -> _Said:
        self._has_spoken, self._stopped, self._blocked = True, None, None
        return _Said(field, text)

    def _finish(self, event: RunFinished) -> Sequence[_Piece]:
        match event.outcome:
            case "success":
                return self._succeed(event)
            case "error":
                return (event.error or Problem(code="internal", message="the run has failed"),)
            case "cancelled" | "interrupted":
                return (_cancelled(event.receipt.cause),)
            case _:
                assert_never(event.outcome)

    def _succeed(self, event: RunFinished) -> Sequence[_Piece]:
        if self._stopped == "error":
            message = "the model stopped because of an error"
            return (Problem(code="provider_error", message=message, status=502),)
        done = _Done(self._reason(), event.usage)
        if self._blocked is not None:
            return (_Said("refusal", self._blocked), done)
        if self._has_spoken or event.result is UNSET or bytes(event.result) == b"null":
            return (done,)
        return (_Said("content", _text_of(event.result)), done)

    def _reason(self) -> Reason:
        if self._is_filtered or self._stopped == "content_filter":
            return "content_filter"
        return "length" if self._stopped == "length" else "stop"


def _cancelled(cause: str | None) -> Problem:
    message = f"the run was cancelled ({cause})" if cause else "the run was cancelled"
    status = 503 if cause == "shutdown" else CANCELLED
    return Problem(code="cancelled", message=message, status=status)


def _asked(questions: Sequence[Question], *, is_first: bool) -> str:
    """Questions as text, apart from what was said before."""
    pieces = [] if is_first else [""]
    for question in questions:
        pieces.append(question.prompt)
        if question.options:
            labels = (option.label or option.id for option in question.options)
            pieces.append("\n".join(f"- {label}" for label in labels))
    return "\n\n".join(pieces)


def _text_of(result: Raw) -> str:
    """A result as text: a string as it is, anything else its JSON."""
    data = bytes(result)
    return str(decode_json(data)) if data.startswith(b'"') else data.decode()


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _created(ts: str) -> int:
    return int(datetime.fromisoformat(ts).timestamp())


# Errors -------------------------------------------------------------------------------------------


def _error(problem: Problem, *, param: str | None = None) -> bytes:
    """An error object; what kind it is follows from the status."""
    match problem.status:
        case 401 | 403:
            kind = "authentication_error" if problem.status == 401 else "permission_error"
        case 429:
            kind = "rate_limit_error"
        case status if 400 <= status < CANCELLED:
            kind = "invalid_request_error"
        case _:
            kind = "server_error"
    return _encode(
        {
            "error": {
                "message": problem.message,
                "type": kind,
                "param": param,
                "code": problem.code,
            }
        }
    )


def _failed(problem: Problem, *, param: str | None = None) -> Reply:
    status = problem.status if 400 <= problem.status < 600 else 500
    return Reply(_error(problem, param=param), status)


def refuse(problem: Problem) -> Reply:
    """Answer a request that started nothing; what it looked for in vain is a model."""
    if problem.code == "not_found":
        return _failed(msgspec.structs.replace(problem, code="model_not_found"), param="model")
    return _failed(problem)


def _break_off(_milliseconds: int) -> bytes:
    """End a stream whose run goes on: without this the client would take it for complete."""
    message = "the stream ended before the run did"
    return b"data: %b\n\n" % _error(Problem(code="incomplete", message=message))


# Streams ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class ChatEncoder:
    """The events of one run as chunks.

    Attributes:
        has_usage: Whether the client has asked for it.
    """

    has_usage: bool = False
    _turn: _Turn = attrs.field(factory=_Turn)
    _head: bytes = b""  # of every chunk, up to its choices
    _is_open: bool = False

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames."""
        if isinstance(event, RunStarted):
            envelope = {
                "id": f"chatcmpl-{event.run_id}",
                "object": "chat.completion.chunk",
                "created": _created(event.ts),
                "model": event.agent,
            }
            self._head = b'data: %b,"choices":[' % _encode(envelope).removesuffix(b"}")
            return self._open()
        frames: list[bytes] = []
        for piece in self._turn.take(event):
            match piece:
                case _Said():
                    frames += self._open()
                    frames.append(
                        self._chunk(b'{"%b":%b}' % (piece.field.encode(), _encode(piece.text)))
                    )
                case _Done():
                    frames += self._open()
                    frames += self._close(piece)
                case Problem():
                    frames.append(b"data: %b\n\n" % _error(piece))
                case _:
                    assert_never(piece)
        return frames

    def _open(self) -> Sequence[bytes]:
        if self._is_open:
            return ()
        self._is_open = True
        return (self._chunk(b'{"role":"assistant","content":""}'),)

    def _close(self, done: _Done) -> Sequence[bytes]:
        self._is_open = False
        last = self._chunk(b"{}", reason=_encode(done.reason))
        if not self.has_usage:
            return (last, DONE)
        usage = _encode(_usage(done.usage))
        return (last, b'%b],"usage":%b}\n\n' % (self._head, usage), DONE)

    def _chunk(self, delta: bytes, *, reason: bytes = b"null") -> bytes:
        choice = b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}' % (delta, reason)
        tail = b',"usage":null' if self.has_usage else b""
        return b"%b%b]%b}\n\n" % (self._head, choice, tail)


def make_encoder(options: Hashable) -> ChatEncoder:
    """Make the machine; the option is whether there is to be a chunk with the usage."""
    return ChatEncoder(has_usage=bool(options))


# Answers ------------------------------------------------------------------------------------------


def answer(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer where there is no stream: what the stream would have said, in one object."""
    turn = _Turn()
    said: dict[Field, list[str]] = {"content": [], "refusal": [], "reasoning_content": []}
    for event in events:
        for piece in turn.take(event):
            match piece:
                case _Said():
                    said[piece.field].append(piece.text)
                case _Done():
                    texts = {field: "".join(pieces) for field, pieces in said.items()}
                    return Reply(_encode(_completion(snapshot, texts, piece)))
                case Problem():
                    # A run that has failed may have done something: the SDKs would do it again.
                    return attrs.evolve(_failed(piece), headers={"x-should-retry": "false"})
                case _:
                    assert_never(piece)
    return _failed(Problem(code="internal", message="the run has not come to an end"))


def _completion(snapshot: RunSnapshot, texts: dict[Field, str], done: _Done) -> dict[str, Any]:
    refusal = texts["refusal"] or None
    message = {
        "role": "assistant",
        "content": texts["content"] or (None if refusal else ""),
        "refusal": refusal,
    }
    if texts["reasoning_content"]:
        message["reasoning_content"] = texts["reasoning_content"]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.reason}
    return {
        "id": f"chatcmpl-{snapshot.id}",
        "object": "chat.completion",
        "created": _created(snapshot.created),
        "model": snapshot.agent,
        "choices": [choice],
        "usage": _usage(done.usage),
    }


def _present(snapshot: RunSnapshot) -> bytes:
    """A run by itself, which this protocol never shows."""
    return _encode(snapshot)


# Requests -----------------------------------------------------------------------------------------


class _Part(msgspec.Struct):
    type: str
    text: str = ""
    refusal: str = ""


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _ResponseFormat(msgspec.Struct):
    type: str


class _Completion(msgspec.Struct, kw_only=True):
    model: Annotated[str, msgspec.Meta(min_length=1)]
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: _ResponseFormat | None = None
    stop: str | list[str] | None = None
    web_search_options: Any = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


def decode_completion(request: Request) -> Start:
    """`POST /chat/completions`.

    What the client says in `user` and `metadata` stands in the run's metadata, under these names.

    Raises:
        BadRequest: It makes no sense, or wants what is not there; the message says what.
    """
    body = read_body(request, _Completion, what="complete a chat")
    _know_wishes(body)
    instructions, text = _read_messages(body.messages)
    told = {"user": body.user, "metadata": body.metadata}
    return Start(
        agent=body.model,
        input=text,
        delivery="stream" if body.stream else "wait",
        instructions=instructions,
        metadata={name: value for name, value in told.items() if value} or None,
        options=bool(body.stream_options and body.stream_options.include_usage),
        reply=answer,
    )


def _know_wishes(body: _Completion) -> None:
    """Refuse what would be missing in the answer."""
    own = "an agent runs its own tools, and can use none of the client's"
    form = body.response_format
    wishes = (
        ("tools", body.tools, own),
        ("functions", body.functions, own),
        ("n", body.n not in (None, 1), "a run has one answer"),
        ("modalities", set(body.modalities or ()) - {"text"}, "an agent answers in text"),
        ("audio", body.audio, "an agent answers in text"),
        ("logprobs", body.logprobs, "there are no log probabilities"),
        ("top_logprobs", body.top_logprobs, "there are no log probabilities"),
        ("response_format", form and form.type != "text", "the form is the agent's to choose"),
        ("stop", body.stop, "there are no stop sequences"),
        ("web_search_options", body.web_search_options is not None, own),
    )
    for name, is_wanted, why in wishes:
        if is_wanted:
            raise BadRequest(f"{name}: not available here: {why}; leave it out")


def _read_messages(messages: Sequence[_Message]) -> tuple[str | None, str]:
    """What the agent is told first, if anything is, and the input."""
    texts = [_read_message(place, message) for place, message in enumerate(messages)]
    if messages[-1].role != "user":
        raise BadRequest(
            "messages: expected the last one to be the user's, for it is what the agent is given; "
            f"got one of the role {messages[-1].role!r}"
        )
    begin = next(i for i, each in enumerate(messages) if each.role not in ("system", "developer"))
    instructions = "\n\n".join(text for text in texts[:begin] if text) or None
    earlier = [
        f"{message.role.capitalize()}: {text}"
        for message, text in zip(messages[begin:-1], texts[begin:-1], strict=True)
        if text
    ]
    if not earlier:
        return instructions, texts[-1]
    pieces = ["The conversation so far:", *earlier, "The user's message now:", texts[-1]]
    return instructions, "\n\n".join(pieces)


def _read_message(place: int, message: _Message) -> str:
    where = f"messages[{place}]"
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise BadRequest(
            f"{where}: expected a message of text, got a tool's call or result: an agent runs its "
            "own tools, and cannot be told of the client's; leave the message out"
        )
    match message.content:
        case None:
            return message.refusal or ""
        case str():
            return message.content
        case parts:
            return "\n".join(_read_part(f"{where}.content[{i}]", p) for i, p in enumerate(parts))


def _read_part(where: str, part: _Part) -> str:
    if part.type not in ("text", "refusal"):
        raise BadRequest(
            f"{where}: expected a part of the type 'text', got {part.type[:40]!r}, which no agent "
            "here is given; describe in words what it holds"
        )
    return part.text or part.refusal


OPENAI_CHAT: Final = Dialect(
    name="openai_chat",
    mount="/v1",
    routes=(Route("POST", "/chat/completions", decode_completion),),
    encoder=make_encoder,
    present=_present,
    framing=Framing(heartbeat=comment(), farewell=_break_off, ends_at=frozenset({InputRequested})),
    on_disconnect="cancel",
    problem=refuse,
)
