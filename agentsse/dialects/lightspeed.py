r"""The protocol of lightspeed-stack: a query, its answer in tokens, and the documents behind it.

Knows: the routes `/query`, `/streaming_query` and `/streaming_query/interrupt`, what may stand in
their bodies, and lightspeed's words for what happens. Must never know what a run is beyond its
events and its snapshot. Sources: lightspeed-core/lightspeed-stack, `cd1a0484` (the current form)
and pull request 254 (`476d12d`, the seed form, where its token stream comes from).

A stream has frames of data only, each `data: {"event": <name>, "data": {...}}\n\n`, written as
Python's json does. What comes is chosen by `media_type` in the body, not by Accept: `text/plain` is
the answer as it would be printed. A conversation is a thread; the request's id is the run's.

The current form:

    start (compaction | token | tool_call | tool_result)* turn_complete error? end
    start ... error                  the run has failed
    start ... token interrupted      the user has stopped it; the token repairs what is half said
    start token end                  a shield has refused

The seed form, chosen by `?form=seed` or in the config, tells everything in tokens with a role, and
tool calls as text. Its words are kept, its faults are not: each event has its own id, `end` follows
no `error`, tokens are counted, and the heartbeat comes from a timer, so that it beats while nothing
else comes. There was no interrupt: who stops a run there makes an `error` of it. Of a request it
takes the fields of its time, and overlooks all others.

A run that asks a person ends the response with the question as its last token; the next query of
that conversation is the answer, and its response has the rest. Where the conversation is busy, the
next query waits for its turn: a chat has no use for a refusal.
"""

import base64
import binascii
import json
import re
import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeGuard, assert_never

import attrs
import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from agentsse.errors import BadRequest, Unprocessable
from agentsse.events import (
    AgentFinished,
    AgentStarted,
    AnyEvent,
    Compacted,
    ContextUsage,
    Custom,
    Failover,
    FinishReason,
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
    Usage,
    ValuesChanged,
)
from agentsse.markdown import closing
from agentsse.sse import comment

from . import (
    SSE,
    Body,
    Cancel,
    Dialect,
    Doc,
    Framing,
    Intent,
    Reply,
    Request,
    Route,
    Start,
    read_body,
)

Form: TypeAlias = Literal["current", "text", "seed"]
"""How a run is read; `text` is the current form as `text/plain`."""

ROOM: Final = 50  # levels
STOPPED: Final = "\n\n*Response stopped by the user.*"
REFUSAL: Final = "I cannot process this request due to policy restrictions."
SPOKEN: Final = frozenset({"text", "refusal"})  # kinds of parts that are the answer
SEARCHES: Final = frozenset({"knowledge_search", "file_search"})  # tools that find documents
# Of tools that run at the provider, by name; any other is called by way of MCP, or as good as.
_PROVIDED: Final[Mapping[str, str]] = {
    "web_search": "web_search_call",
    "web_search_call": "web_search_call",
    "file_search": "file_search_call",
    "file_search_call": "file_search_call",
    "knowledge_search": "file_search_call",
    "mcp_list_tools": "mcp_list_tools",
}

ATTACHMENTS: Final = (
    "alert",
    "api object",
    "configuration",
    "error message",
    "event",
    "image",
    "log",
    "stack trace",
)
_LANGUAGES: Final[Mapping[str, str]] = {  # of the fence that an attachment stands in
    "text/plain": "text",
    "application/json": "json",
    "application/yaml": "yaml",
    "application/xml": "xml",
}
_IMAGES: Final[Mapping[str, bytes]] = {"image/jpeg": b"\xff\xd8\xff", "image/png": b"\x89PNG"}

_UUID = re.compile(
    r"[0-9a-f]{8}(-?)[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}", re.IGNORECASE
)
_HASH = re.compile(r"(?:conv_)?[0-9a-f]{48}", re.IGNORECASE)
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_TICKS = re.compile(r"`+")

_TOKEN: Final = b'data: {"event": "token", "data": {"id": %d, "token": %b}}\n\n'


def _frame(event: str, data: Mapping[str, Any], **beside: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps({"event": event, "data": data, **beside}).encode()


# What went wrong ----------------------------------------------------------------------------------


@attrs.frozen
class _Failure:
    """An error in lightspeed's words: the status, what the user is told, and what caused it."""

    status_code: int
    cause: str

    @property
    def response(self) -> str:
        """What the user is told."""
        return _RESPONSES[self.status_code]

    def reply(self) -> Reply:
        """The answer to a request that came to nothing else."""
        detail = {"response": self.response, "cause": self.cause}
        return Reply(msgspec.json.encode({"detail": detail}), self.status_code)


_RESPONSES: Final[Mapping[int, str]] = {
    401: "Missing or invalid credentials",
    403: "Not permitted",
    404: "Not found",
    413: "Prompt is too long",
    422: "Invalid request",
    429: "Quota exceeded",
    500: "Internal server error",
    503: "Service unavailable",
}
_STATUSES: Final[Mapping[str, int]] = {  # by our code, where our status is not theirs
    "context_length": 413,
    "content_filter": 500,
    "rate_limit": 429,
    "quota": 429,
    "unreachable": 503,
    "overloaded": 503,
}


def _failure_of(problem: Problem) -> _Failure:
    status = _STATUSES.get(problem.code, problem.status)
    if status not in _RESPONSES:
        status = 422 if 400 <= status < 500 else 500
    return _Failure(status, problem.message)


def _failure_of_end(
    outcome: Outcome | None, error: Problem | None, receipt: Receipt | None
) -> _Failure:
    """Why a run has come to no result."""
    if outcome == "error" and error is not None:
        return _failure_of(error)
    cause = receipt.cause if receipt is not None else None
    message = f"the run was cancelled ({cause})" if cause else "the run was cancelled"
    return _Failure(503 if cause == "shutdown" else 500, message)


def _failure_of_finish(reason: FinishReason | None) -> _Failure | None:
    """What is wrong with an answer that is there, by the reason for which the model stopped."""
    match reason:
        case None | "stop" | "tool_calls" | "other":
            return None
        case "length":
            return _Failure(413, "the model stopped at its limit of tokens")
        case "content_filter":
            return _Failure(500, "the provider's content filter stopped the model")
        case "error":
            return _Failure(500, "the model stopped because of an error")
        case _:
            assert_never(reason)


def refuse(problem: Problem) -> Reply:
    """Answer a request that started nothing."""
    return _failure_of(problem).reply()


# What a response has told -------------------------------------------------------------------------


class Document(msgspec.Struct, frozen=True):
    """A document that the answer rests on."""

    doc_url: str
    doc_title: str
    source: str | None = None
    document_id: str | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """A call, as lightspeed tells of it."""

    id: str
    name: str
    args: dict[str, Any]
    type: str


class ToolResult(msgspec.Struct, frozen=True):
    """What came of a call."""

    id: str
    status: str
    content: str
    type: str
    round: int


@attrs.define(eq=False)
class _Turn:
    """What the events of one response come to; a run that asks a person has several.

    Attributes:
        is_open: A response is under way.
        conversation_id, request_id: Of the run.
        said: The answer, in the pieces that were sent.
        refused: Those of them that are refusals.
        blocked: How many had been sent when a shield refused; None where none has.
        refusal: What it said.
        round: Of tools; once the model has heard a result, what it does next is another one.
        told: Tokens that earlier responses of the run have told.
        spent: Tokens of all its model calls so far.
    """

    is_open: bool = False
    conversation_id: str = ""
    request_id: str = ""
    said: list[str] = attrs.field(factory=list)
    refused: list[str] = attrs.field(factory=list)
    blocked: int | None = None
    refusal: str = REFUSAL
    documents: dict[tuple[str, str], Document] = attrs.field(factory=dict)
    calls: dict[str, ToolCall] = attrs.field(factory=dict)
    results: dict[str, ToolResult] = attrs.field(factory=dict)
    finish_reason: FinishReason | None = None
    round: int = 1
    told: Usage = attrs.field(factory=Usage)
    spent: Usage = attrs.field(factory=Usage)
    is_in_model: bool = False
    is_in_round: bool = False
    _has_result: bool = False

    @property
    def text(self) -> str:
        """The whole answer so far."""
        return "".join(self.said)

    @property
    def is_refused(self) -> bool:
        """Whether a shield has refused before anything was said, and nothing else was."""
        return self.blocked == 0 and len(self.said) == len(self.refused)

    def is_opened_by(self, event: AnyEvent) -> bool:
        """Whether a response begins with this event; then the one before is forgotten."""
        if self.is_open or type(event) not in _OPENING:
            return False
        if isinstance(event, RunStarted):
            self.conversation_id = event.thread_id or event.run_id
            self.request_id = request_id_of(event.run_id)
        self.is_open = True
        self.said, self.refused, self.blocked, self.refusal = [], [], None, REFUSAL
        self.documents, self.calls, self.results = {}, {}, {}
        self.finish_reason, self.round, self._has_result = None, 1, False
        self.told = self.spent
        return True

    def take(self, event: AnyEvent) -> ToolCall | ToolResult | None:
        """Take note of an event; returns the call or result that it brings, if that is new."""
        match event:
            case PartDelta():
                self.say(event.delta, event.kind)
            case PartStarted():
                if event.kind != "reasoning":
                    self._begin()
            case StepStarted() | StepFinished():
                self._pass_step(event)
            case ToolStarted():
                return self._note_call(event)
            case ToolFinished():
                return self._note_result(event)
            case Moderation():
                if event.violation and self.blocked is None:
                    self.blocked, self.refusal = len(self.said), event.message or REFUSAL
            case InputRequested():
                self.say(_asked(event.questions, is_first=not self.said))
                self.is_open = False
            case RunFinished():
                self.is_open = False
            case _:
                pass
        return None

    def say(self, text: str, kind: str = "text") -> None:
        """Take note of more of the answer."""
        if kind in SPOKEN:
            self.said.append(text)
        if kind == "refusal":
            self.refused.append(text)

    def last_word(self, result: Raw | UnsetType) -> str:
        """What is still to be said at the end: what the shield says, or the bare result."""
        if self.blocked is not None:
            if len(self.said) > self.blocked:
                return ""
            self.say(self.refusal, "refusal")
        elif self.said or not has_result(result):
            return ""
        else:
            self.say(_content(result))
        return self.said[-1]

    def final_text(self) -> str:
        """The answer as a whole; where a filter has stopped it, what it says instead."""
        if self.finish_reason == "content_filter":
            return "".join(self.refused) or REFUSAL
        return self.text

    def stopped(self) -> str:
        """What is still to be said where the user has stopped it: an end to what is half said."""
        return closing(self.text) + STOPPED

    def tokens(self, total: Usage) -> dict[str, int]:
        """What this response has cost, of the run's tokens."""
        return {
            "input_tokens": max(total.input_tokens - self.told.input_tokens, 0),
            "output_tokens": max(total.output_tokens - self.told.output_tokens, 0),
        }

    def _pass_step(self, event: StepStarted | StepFinished) -> None:
        is_open = isinstance(event, StepStarted)
        match event.kind:
            case "model":
                self.is_in_model = is_open
            case "tool_round":
                self.is_in_round = is_open
            case "node" | "flow":
                pass
            case _:
                assert_never(event.kind)
        if isinstance(event, StepFinished) and event.kind == "model":
            self.finish_reason = event.finish_reason
            self.spent += event.usage or Usage()

    def _begin(self) -> None:
        if self._has_result:
            self.round, self._has_result = self.round + 1, False

    def _note_call(self, event: ToolStarted) -> ToolCall | None:
        if event.call_id in self.calls:
            return None
        if not self.is_in_round:  # there, all calls are of the one round
            self._begin()
        kind = _PROVIDED.get(event.name, "mcp_call") if self.is_in_model else "function_call"
        call = ToolCall(event.call_id, event.name, _arguments(event.arguments), kind)
        self.calls[event.call_id] = call
        return call

    def _note_result(self, event: ToolFinished) -> ToolResult | None:
        if event.call_id in self.results:
            return None
        if event.name in SEARCHES and not event.is_error:
            for document in _documents(event.result):
                self.documents.setdefault((document.doc_url, document.doc_title), document)
        kind = "function_call_output"
        if event.source != "local":
            kind = _PROVIDED.get(event.name, "mcp_call")
        status = "failure" if event.is_error else "success"
        result = ToolResult(event.call_id, status, _content(event.result), kind, self.round)
        self.results[event.call_id] = result
        self._has_result = True
        return result


_OPENING: Final[frozenset[type[AnyEvent]]] = frozenset(
    {
        RunStarted,
        StepStarted,
        PartStarted,
        PartDelta,
        ToolStarted,
        ToolFinished,
        Moderation,
        Compacted,
        InputRequested,
        InputReceived,
        InputWithdrawn,
        RunFinished,
    }
)


def has_result(result: Raw | UnsetType) -> TypeGuard[Raw]:
    """Whether a run has come to a result."""
    return result is not UNSET and bytes(result) != b"null"


def request_id_of(run_id: str) -> str:
    """A run's id as a UUID; one that a client of another protocol has made up stays as it is."""
    return str(uuid.UUID(hex=run_id)) if _RUN_ID.fullmatch(run_id) else run_id


def _asked(questions: Sequence[Question], *, is_first: bool) -> str:
    """Questions as text, apart from what was said before."""
    pieces = [] if is_first else [""]
    for question in questions:
        pieces.append(question.prompt)
        if question.options:
            options = (option.label or option.id for option in question.options)
            pieces.append("\n".join(f"- {option}" for option in options))
    return "\n\n".join(pieces)


def _content(result: Raw) -> str:
    """A result as text: a string as it is, anything else its JSON."""
    data = bytes(result)
    if data.startswith(b'"'):
        return str(json.loads(data))
    return data.decode()


def _arguments(arguments: Raw) -> dict[str, Any]:
    """A call's arguments; what is no object, or too deep for one, stands in one as it is."""
    value = _plain(arguments)
    return value if isinstance(value, dict) else {"arguments": value}


def _plain(value: Raw) -> Any:
    """JSON as Python's plain types, or its text where it is too deep to be written again."""
    data = bytes(value)
    try:
        plain = json.loads(data)
        within = plain
        for _ in range(ROOM):  # what is around it in a frame, and in the code that writes it
            within = [within]
        for write in (json.dumps, repr):  # as one of the forms will
            write(within)
    except (ValueError, RecursionError):
        return data.decode()
    return plain


# Documents ----------------------------------------------------------------------------------------

_METADATA = re.compile(r"\nMetadata: (\{.+})(?=\n)")  # a line of what knowledge_search finds
# It is a dict as Python writes it; with other quotes it is JSON, unless a title has an apostrophe.
_PAIR = re.compile(r"""["'](\w+)["']: *(?:'((?:[^'\\]|\\.)*+)'|"((?:[^"\\]|\\.)*+)")""")
_ESCAPED = re.compile(r"\\(.)")
_URLS: Final = ("doc_url", "docs_url", "url", "reference_url")
_TITLES: Final = ("doc_title", "title")


def _documents(result: Raw) -> Iterator[Document]:
    """The documents in a result: JSON with addresses and titles in it, or text with metadata."""
    try:
        ahead = [msgspec.json.decode(result)]
    except (msgspec.DecodeError, RecursionError, ValueError):
        return
    while ahead:
        value = ahead.pop()
        match value:
            case str():
                for line in _METADATA.findall(value):
                    pairs = {key: one or other for key, one, other in _PAIR.findall(line)}
                    pairs = {key: _ESCAPED.sub(r"\1", text) for key, text in pairs.items()}
                    if (document := _document(pairs)) is not None:
                        yield document
            case dict():
                if (document := _document(value)) is not None:
                    yield document
                else:
                    ahead += reversed(value.values())
            case list():
                ahead += reversed(value)
            case _:
                pass


def _document(fields: Mapping[str, Any]) -> Document | None:
    url, title = _first(fields, _URLS), _first(fields, _TITLES)
    if title is None or url is None or "://" not in url:
        return None
    return Document(url, title, _first(fields, ("source",)), _first(fields, ("document_id",)))


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these that is a text, and not empty."""
    texts = (fields[name] for name in names if isinstance(fields.get(name), str))
    return next((text for text in texts if text), None)


# The current form ---------------------------------------------------------------------------------


@attrs.define(eq=False)
class LightspeedEncoder:
    """The events of one run in the current form, as JSON or as text."""

    is_text: bool = False
    _turn: _Turn = attrs.field(factory=_Turn)
    _next: int = 0  # the id of the next token

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames."""
        turn, frames = self._turn, []
        if turn.is_opened_by(event):
            self._next = 0
            ids = {"conversation_id": turn.conversation_id, "request_id": turn.request_id}
            frames.append(self._frame("start", ids))
        elif not turn.is_open:  # its turn comes with the answer
            turn.take(event)
            return ()
        tool = turn.take(event)
        frames += self._tell(event, tool)
        return [frame for frame in frames if frame]

    def _tell(self, event: AnyEvent, tool: ToolCall | ToolResult | None) -> Iterable[bytes]:
        match event:
            case PartDelta():
                return (self._token(event.delta),) if event.kind in SPOKEN else ()
            case PartStarted():  # a page shows that something comes
                return (self._token(""),) if event.kind == "text" else ()
            case ToolStarted() | ToolFinished():
                return () if tool is None else (self._tool(tool),)
            case Compacted():
                data = {"status": "completed", "conversation_id": self._turn.conversation_id}
                return (_frame("compaction", data),)  # JSON, also where all else is text
            case InputRequested():
                return (self._token(self._turn.said[-1]), *self._complete(self._turn.spent))
            case RunFinished():
                return self._finish(event)
            case (
                RunStarted()
                | PartFinished()
                | StepStarted()
                | StepFinished()
                | Moderation()
                | ToolOutputDelta()
                | AgentStarted()
                | AgentFinished()
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
                | Custom()
                | ProviderEvent()
                | TriggerChanged()
                | Gap()
            ):
                return ()
            case _:
                assert_never(event)

    def _finish(self, event: RunFinished) -> Iterator[bytes]:
        turn = self._turn
        match event.outcome:
            case "success":
                if word := turn.last_word(event.result):
                    yield self._token(word)
                if turn.is_refused or not (turn.said or has_result(event.result)):
                    yield self._end(event.usage)
                else:
                    failure = _failure_of_finish(turn.finish_reason)
                    yield from self._complete(event.usage, failure)
            case "error":
                yield self._error(_failure_of_end(event.outcome, event.error, event.receipt))
            case "cancelled" | "interrupted":
                if event.receipt.cause not in _BY_USER:
                    yield self._error(_failure_of_end(event.outcome, event.error, event.receipt))
                    return
                yield self._token(turn.stopped())
                yield self._frame("interrupted", {"request_id": turn.request_id})
            case _:
                assert_never(event.outcome)

    def _complete(self, usage: Usage, failure: _Failure | None = None) -> Iterator[bytes]:
        yield self._frame("turn_complete", {"id": self._next, "token": self._turn.final_text()})
        if failure is not None:
            yield self._error(failure)
        yield self._end(usage)

    def _frame(self, event: str, data: Mapping[str, Any]) -> bytes:
        """A frame of an event that has no text."""
        return b"" if self.is_text else _frame(event, data)

    def _token(self, text: str) -> bytes:
        number, self._next = self._next, self._next + 1
        return text.encode() if self.is_text else _TOKEN % (number, json.dumps(text).encode())

    def _tool(self, tool: ToolCall | ToolResult) -> bytes:
        match tool:
            case ToolCall():
                event, text = "tool_call", f"[Tool Call: {tool.name}]\n"
            case ToolResult():
                event, text = "tool_result", "[Tool Result]\n"
            case _:
                assert_never(tool)
        return text.encode() if self.is_text else _frame(event, msgspec.structs.asdict(tool))

    def _error(self, failure: _Failure) -> bytes:
        status, response, cause = failure.status_code, failure.response, failure.cause
        if self.is_text:
            return f"Status: {status} - {response} - {cause}".encode()
        return _frame("error", {"status_code": status, "response": response, "cause": cause})

    def _end(self, usage: Usage) -> bytes:
        documents = self._turn.documents.values()
        if self.is_text:
            lines = [f"{document.doc_title}: {document.doc_url}" for document in documents]
            return "\n".join(["\n\n---\n", *lines]).encode() if lines else b""
        data = {
            "referenced_documents": [msgspec.structs.asdict(document) for document in documents],
            "truncated": None,
            **self._turn.tokens(usage),
        }
        return _frame("end", data, available_quotas={})


# A client that has left has stopped it as well: what others read of the run is the same.
_BY_USER: Final = frozenset({"client_cancel", "disconnect"})


# The seed form ------------------------------------------------------------------------------------


@attrs.define(eq=False)
class SeedEncoder:
    """The events of one run in the form of pull request 254."""

    _turn: _Turn = attrs.field(factory=_Turn)
    _next: int = 0  # the id of the next frame
    _held: list[ToolFinished] = attrs.field(factory=list)  # until all calls of the round are told

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames."""
        turn, frames = self._turn, []
        if turn.is_opened_by(event):
            self._next = 0
            frames.append(_frame("start", {"conversation_id": turn.conversation_id}))
        elif not turn.is_open:  # its turn comes with the answer
            turn.take(event)
            return ()
        is_told = turn.take(event) is None and isinstance(event, ToolStarted | ToolFinished)
        return frames if is_told else [*frames, *self._tell(event)]

    def _tell(self, event: AnyEvent) -> Iterable[bytes]:
        match event:
            case PartDelta():
                return self._tell_delta(event)
            case RunStarted() | InputReceived():  # a turn begins
                return (self._say("token", ""),)
            case StepStarted():
                return (self._tell_step(event),)
            case StepFinished():
                return self._let_go() if event.kind == "tool_round" else ()
            case PartFinished():
                if event.kind != "tool_call":
                    return ()
                return (self._say("tool_call", event.name or "", role="inference"),)
            case ToolStarted():
                call = self._turn.calls[event.call_id]
                said = f"Tool:{call.name} arguments:{call.args}"
                return (self._say("tool_call", said, role="tool_execution"),)
            case ToolFinished():
                if self._turn.is_in_round:
                    self._held.append(event)
                    return ()
                return (self._tell_result(event),)
            case Moderation():
                return (self._say("token", _verdict(event), role="shield_call"),)
            case Liveness() | ProviderEvent():
                return (self._say("heartbeat", "heartbeat"),)
            case InputRequested():
                return (
                    self._say("token", ""),
                    self._say("token", self._turn.said[-1], role="inference"),
                    *self._complete(self._turn.spent),
                )
            case RunFinished():
                return self._finish(event)
            case (
                PartStarted()
                | ToolOutputDelta()
                | AgentStarted()
                | AgentFinished()
                | InputWithdrawn()
                | MessageReceived()
                | Paused()
                | Resumed()
                | ValuesChanged()
                | Retry()
                | Failover()
                | Stalled()
                | LoopDetected()
                | ContextUsage()
                | Compacted()
                | Custom()
                | TriggerChanged()
                | Gap()
            ):
                return ()
            case _:
                assert_never(event)

    def _tell_delta(self, event: PartDelta) -> Iterable[bytes]:
        match event.kind:
            case "text" | "refusal":
                return (self._say("token", event.delta, role="inference"),)
            case "tool_call":
                return (self._say("tool_call", event.delta, role="inference"),)
            case "reasoning":
                return ()
            case _:
                assert_never(event.kind)

    def _tell_step(self, event: StepStarted) -> bytes:
        match event.kind:
            case "model":
                return self._say("token", "", role="inference")
            case "tool_round":
                return self._say("tool_call", "", role="tool_execution")
            case "node" | "flow":  # kinds of steps that it does not know
                return self._say("heartbeat", "heartbeat")
            case _:
                assert_never(event.kind)

    def _let_go(self) -> Iterable[bytes]:
        """Tell what has come of a round of calls, in their order."""
        places = {call_id: place for place, call_id in enumerate(self._turn.calls)}
        held, self._held = self._held, []
        held.sort(key=lambda event: places.get(event.call_id, -1))
        return [self._tell_result(event) for event in held]

    def _tell_result(self, event: ToolFinished) -> bytes:
        content = _content(event.result)
        match event.name:
            case "query_from_memory":
                said = f"Fetched {len(content.encode())} bytes from memory"
            case "knowledge_search" if summary := _summary(event.result):
                said = f"Tool:knowledge_search summary:{summary}"
            case name:
                said = f"Tool:{name} response:{content}"
        return self._say("tool_call", said, role="tool_execution")

    def _finish(self, event: RunFinished) -> Iterator[bytes]:
        match event.outcome:
            case "success":
                if word := self._turn.last_word(event.result):
                    yield self._say("token", word, role="inference")
                yield from self._complete(event.usage)
            case "cancelled" if event.receipt.cause in _BY_USER:
                yield self._say("token", self._turn.stopped(), role="inference")
                yield self._say("error", STOPPED.strip("\n*"))
            case "error" | "cancelled" | "interrupted":
                failure = _failure_of_end(event.outcome, event.error, event.receipt)
                yield self._say("error", failure.cause)
            case _:
                assert_never(event.outcome)

    def _complete(self, usage: Usage) -> Iterator[bytes]:
        yield self._say("turn_complete", self._turn.text)
        documents = [
            {"doc_url": document.doc_url, "doc_title": document.doc_title}
            for document in self._turn.documents.values()
        ]
        data = {"referenced_documents": documents, "truncated": None}
        yield _frame("end", data | self._turn.tokens(usage), available_quotas={})

    def _say(self, event: str, text: str, *, role: str | None = None) -> bytes:
        number, self._next = self._next, self._next + 1
        spoken = f'"role": "{role}", ' if role else ""
        data = f'{{"id": {number}, {spoken}"token": {json.dumps(text)}}}'
        return f'data: {{"event": "{event}", "data": {data}}}\n\n'.encode()


def _verdict(event: Moderation) -> str:
    """What a shield has found."""
    if not event.violation:
        return "No Violation"
    metadata = {} if event.metadata is UNSET else _plain(event.metadata)
    return f"Violation: {event.message or REFUSAL} (Metadata: {metadata})"


def _summary(result: Raw) -> str:
    """The first line of the first text in what was found."""
    value = _plain(result)
    while True:
        match value:
            case str(text):
                return text.partition("\n")[0]
            case [value, *_] | {"text": value} | {"content": value}:
                pass
            case _:
                return ""


# Requests -----------------------------------------------------------------------------------------


_DIGIT: Final = "[0-9a-fA-F]"
_UUIDS: Final = rf"{_DIGIT}{{32}}|{_DIGIT}{{8}}(-{_DIGIT}{{4}}){{3}}-{_DIGIT}{{12}}"
_IDS: Final = rf"{_UUIDS}|(conv_)?{_DIGIT}{{48}}"
_MEDIA: Final = ("", "application/json", "text/plain")
_SOME_ID: Final = "0198c0de-0000-7000-8000-000000000001"
_TEXTS: Final = [kind for kind in ATTACHMENTS if kind != "image"]


class _Attachment(msgspec.Struct, forbid_unknown_fields=True):
    """A text that the query is about."""

    attachment_type: Annotated[str, Meta(extra_json_schema={"enum": _TEXTS})]
    content_type: Annotated[str, Meta(extra_json_schema={"enum": list(_LANGUAGES)})]
    content: str


class _SeedQuery(msgspec.Struct, kw_only=True):
    """A query, with the fields of the seed's time.

    Attributes:
        conversation_id: A conversation to go on with: a UUID, or 48 hexadecimal digits.
        provider: Together with `model`, or neither.
        model: The name of an agent, or of the model that it runs on.
        system_prompt: What the agent is told first, instead of its own.
    """

    query: str
    conversation_id: Annotated[str, Meta(extra_json_schema={"pattern": f"^({_IDS})?$"})] | None = (
        None
    )
    provider: str | None = None
    model: str | None = None
    system_prompt: str | None = None
    attachments: list[_Attachment] | None = None

    def wishes(self) -> dict[str, Any]:
        """What the agent may heed, if it looks at its run's metadata."""
        return {}

    @property
    def uses_tools(self) -> bool:
        """Whether the model may call any."""
        return True


class _Query(_SeedQuery, kw_only=True, forbid_unknown_fields=True):
    """A query.

    Attributes:
        conversation_id: A conversation to go on with: a UUID, or 48 hexadecimal digits.
        provider: Together with `model`, or neither.
        model: The name of an agent, or of the model that it runs on.
        system_prompt: What the agent is told first, instead of its own.
        no_tools: Answer without tools.
        media_type: Of the stream: `text/plain` is the answer as it would be printed.
        vector_store_ids, shield_ids, solr: They stand in the run's metadata.
    """

    no_tools: bool | None = False
    generate_topic_summary: bool | None = True
    media_type: Annotated[str, Meta(extra_json_schema={"enum": list(_MEDIA)})] | None = None
    vector_store_ids: list[str] | None = None
    shield_ids: list[str] | None = None
    solr: Any = None

    def wishes(self) -> dict[str, Any]:
        """What the agent may heed, if it looks at its run's metadata."""
        return {
            "vector_store_ids": self.vector_store_ids,
            "shield_ids": self.shield_ids,
            "solr": self.solr,
        }

    @property
    def uses_tools(self) -> bool:
        """Whether the model may call any."""
        return not self.no_tools


class _Interrupt(msgspec.Struct, forbid_unknown_fields=True):
    """Which request to stop.

    Attributes:
        request_id: As the stream's `start` has told it.
    """

    request_id: Annotated[
        str, Meta(examples=[_SOME_ID], extra_json_schema={"pattern": f"^({_IDS})$"})
    ]


def decode_query(request: Request, *, default: Form, delivery: Literal["stream", "wait"]) -> Intent:
    """`POST /query` and `POST /streaming_query`.

    Stores and shields are an agent's own here. What a query says of them stands in its run's
    metadata, under the same names.

    Raises:
        Unprocessable: The query makes no sense.
    """
    form = _form_of(request.query.get("form", default))
    body: _SeedQuery
    if form == "seed":
        body = _read(request, _SeedQuery, what="ask with")
    else:
        query = body = _read(request, _Query, what="ask with")
        form = _medium_of(query.media_type)
    if bool(body.provider) != bool(body.model):
        raise Unprocessable(
            "expected provider and model together, or neither of them, got "
            f"provider {body.provider!r} and model {body.model!r}"
        )
    thread_id = body.conversation_id or None
    if thread_id is not None and not _is_id(thread_id):
        raise Unprocessable(
            "conversation_id: expected a UUID, or 48 hexadecimal digits that `conv_` may precede, "
            f"got {thread_id[:80]!r}"
        )
    metadata = {name: wish for name, wish in body.wishes().items() if wish is not None}
    return Start(
        agent=f"{body.provider}:{body.model}" if body.model else None,
        otherwise=(body.model,) if body.model else (),
        input="\n\n".join([body.query, *map(_attached, body.attachments or ())]),
        delivery=delivery,
        thread_id=thread_id,
        makes_thread=True,
        resumes=True,
        instructions=body.system_prompt or None,
        uses_tools=body.uses_tools,
        if_busy="enqueue",
        metadata=metadata or None,
        options=form,
        framing=PLAIN if form == "text" else EVENTS,
        reply=answer,
    )


def decode_interrupt(request: Request) -> Intent:
    """`POST /streaming_query/interrupt`; raises `Unprocessable`."""
    request_id = _read(request, _Interrupt, what="interrupt with").request_id
    if not _is_id(request_id):
        raise Unprocessable(
            f"request_id: expected the UUID that the stream's start has told, got "
            f"{request_id[:80]!r}"
        )
    return Cancel(
        run_id=request_id.replace("-", "").lower(),
        reply=partial(_interrupted, request_id, is_news=True),
        reply_if_over=partial(_interrupted, request_id, is_news=False),
    )


def _read(request: Request, shape: type[Body], *, what: str) -> Body:
    try:
        return read_body(request, shape, what=what)
    except BadRequest as error:  # lightspeed has one status for all that is wrong with a body
        raise Unprocessable(error.message) from error


def _form_of(form: str) -> Form:
    if form not in ("current", "seed"):
        raise Unprocessable(f"form: expected 'current' or 'seed', got {form[:20]!r}")
    return "seed" if form == "seed" else "current"


def _medium_of(media_type: str | None) -> Form:
    match media_type:
        case None | "" | "application/json":
            return "current"
        case "text/plain":
            return "text"
        case _:
            raise Unprocessable(
                f"media_type: expected 'application/json' or 'text/plain', got {media_type[:40]!r}"
            )


def _is_id(text: str) -> bool:
    return bool(_UUID.fullmatch(text) or _HASH.fullmatch(text))


def _attached(attachment: _Attachment) -> str:
    """An attachment as a part of the query: what it is, and its content in a fence."""
    kind, content_type, content = (
        attachment.attachment_type,
        attachment.content_type,
        attachment.content,
    )
    if kind not in ATTACHMENTS:
        raise Unprocessable(
            f"attachment_type: expected one of {', '.join(ATTACHMENTS)}, got {kind[:40]!r}"
        )
    if content_type not in _LANGUAGES and content_type not in _IMAGES:
        raise Unprocessable(
            f"content_type: expected one of {', '.join([*_LANGUAGES, *_IMAGES])}, "
            f"got {content_type[:40]!r}"
        )
    if (kind == "image") != (content_type in _IMAGES):
        raise Unprocessable(
            "expected an attachment of type 'image' if, and only if, its content type is one of "
            f"{', '.join(_IMAGES)}, got {kind!r} and {content_type!r}"
        )
    if kind == "image":
        _check_image(content_type, content)
        raise Unprocessable(
            "attachments: expected text, got an image, which no agent here can look at; "
            "describe what it shows"
        )
    fence = "`" * max(3, *(len(run) + 1 for run in _TICKS.findall(content)), 0)
    return f"{kind} ({content_type}):\n{fence}{_LANGUAGES[content_type]}\n{content}\n{fence}"


def _check_image(content_type: str, content: str) -> None:
    try:
        image = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"attachments: expected an image in base64: {error}") from error
    if not image.startswith(_IMAGES[content_type]):
        raise Unprocessable(
            f"attachments: expected the beginning of a file of {content_type}, got {image[:4]!r}"
        )


# Answers ------------------------------------------------------------------------------------------


class _Answer(msgspec.Struct):
    """What a query has come to.

    Attributes:
        conversation_id: To go on with.
        referenced_documents: Those that the answer rests on.
    """

    conversation_id: str
    response: str
    rag_chunks: list[Any]
    referenced_documents: list[Document]
    truncated: bool
    input_tokens: int
    output_tokens: int
    available_quotas: dict[str, int]
    tool_calls: list[ToolCall]
    tool_results: list[ToolResult]


class _Interrupted(msgspec.Struct):
    """What an interrupt has come to.

    Attributes:
        interrupted: Otherwise it was over already.
    """

    request_id: str
    interrupted: bool
    message: str


def answer(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer `/query`: what its stream would have told, in one object."""
    if snapshot.outcome is None:
        # It waits for a person, or did just now: what it has asked is the answer.
        ends = [place for place, event in enumerate(events) if isinstance(event, InputRequested)]
        events = events[: ends[-1] + 1] if ends else events
    turn = _Turn()
    for event in events:
        turn.is_opened_by(event)
        turn.take(event)
    if snapshot.outcome not in (None, "success"):
        return _failure_of_end(snapshot.outcome, snapshot.error, snapshot.receipt).reply()
    if snapshot.outcome == "success":
        turn.last_word(snapshot.result)
        failure = None if turn.is_refused else _failure_of_finish(turn.finish_reason)
        if failure is not None:
            return failure.reply()
    body = {
        "conversation_id": turn.conversation_id,
        "response": turn.text,
        "rag_chunks": [],
        "referenced_documents": list(turn.documents.values()),
        "truncated": False,
        **turn.tokens(snapshot.usage),
        "available_quotas": {},
        "tool_calls": list(turn.calls.values()),
        "tool_results": list(turn.results.values()),
    }
    return Reply(msgspec.json.encode(body))


def _interrupted(
    request_id: str, _snapshot: RunSnapshot, _events: Sequence[AnyEvent], *, is_news: bool
) -> Reply:
    message = "Streaming request interrupted"
    if not is_news:
        message = "Streaming request already completed; nothing to interrupt"
    body = {"request_id": request_id, "interrupted": is_news, "message": message}
    return Reply(msgspec.json.encode(body))


def _present(snapshot: RunSnapshot) -> bytes:
    """A run by itself, which this protocol never shows."""
    return msgspec.json.encode(snapshot)


# The dialect --------------------------------------------------------------------------------------

EVENTS: Final = Framing(heartbeat=comment("heartbeat"), ends_at=frozenset({InputRequested}))
PLAIN: Final = attrs.evolve(EVENTS, media_type="text/plain; charset=utf-8", heartbeat=None)


def make_encoder(default: Form, options: Hashable) -> LightspeedEncoder | SeedEncoder:
    """Make the machine for a form; for the one that is spoken where a reader names none."""
    form = default if options is None else options
    return SeedEncoder() if form == "seed" else LightspeedEncoder(is_text=form == "text")


def _speaking(form: Form) -> Dialect:
    """The dialect as it is where a request does not say which form it wants."""
    decode = partial(decode_query, default=form)
    about = "How the run is told: as now, or as it was once."
    forms: Any = Annotated[Literal["current", "seed"], Meta(description=about)]
    body = _Query if form == "current" else _SeedQuery
    return Dialect(
        name="lightspeed",
        mount="/v1",
        routes=(
            Route(
                "POST",
                "/query",
                partial(decode, delivery="wait"),
                doc=Doc(
                    summary="Ask, and wait for the answer",
                    body=body,
                    query={"form": forms},
                    answers={200: (_Answer,)},
                ),
            ),
            Route(
                "POST",
                "/streaming_query",
                partial(decode, delivery="stream"),
                doc=Doc(
                    summary="Ask, and stream the answer",
                    body=body,
                    query={"form": forms},
                    answers={200: (SSE, "text/plain")},
                ),
            ),
            Route(
                "POST",
                "/streaming_query/interrupt",
                decode_interrupt,
                doc=Doc(
                    summary="Stop an answer that is being streamed",
                    body=_Interrupt,
                    answers={200: (_Interrupted,)},
                ),
            ),
        ),
        encoder=partial(make_encoder, form),
        present=_present,
        framing=EVENTS,
        on_disconnect="cancel",
        problem=refuse,
    )


LIGHTSPEED: Final = attrs.evolve(
    _speaking("current"), forms={"current": _speaking("current"), "seed": _speaking("seed")}
)
