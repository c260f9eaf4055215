"""What every model API is reduced to: a prompt goes in, our events come out.

Knows: messages, tool specifications, the seams, and what all providers share: how deltas,
aggregates and errors take precedence, and how an HTTP API is called. Must never know runs, logs or
the words of one API.

A provider is a thin async shell that opens streams of chunks; its `Normalizer` is a pure machine
that turns those chunks into part events and one `Finish`. The rules that all of them keep:

- Deltas are increments. An aggregate that repeats what was streamed is dropped if it is equal; if
  it is not, it is authoritative, and one more delta reconciles.
- Arguments of a tool call: those at its start, or at its end, count only if no delta came.
- An error beats any finish, before or after it: so the `Finish` comes out of `close`.
- A stream that ends with neither is an error.
- What is missing is made (ids), what is unknown is handed on (`provider_event`), never fatal.

Part ids, and the call ids that are made here, begin with a prefix that the caller chooses, so that
they are unique in the run.
"""

import datetime as dt
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeAlias

import attrs
from msgspec import Raw

from agentsse.errors import BadRequest, Fault, ProviderError, Unencodable, redact
from agentsse.events import (
    AnyEvent,
    FinishReason,
    PartDelta,
    PartFinished,
    PartKind,
    PartStarted,
    ProviderEvent,
    Question,
    ToolFinished,
    ToolOutputDelta,
    ToolSource,
    ToolStarted,
    Usage,
    decode_json,
    encode_json,
    well_formed,
)
from agentsse.messages import (
    Echo,
    Message,
    ToolSpec,
)
from agentsse.sse import Decoder, Frame, FrameTooLarge

if TYPE_CHECKING:
    from agentsse.http import HttpClient, Response

MAX_FRAME: Final = 16 * 1024 * 1024  # bytes of one upstream frame; a whole response fits into it
MAX_CALLS: Final = 128  # of our tools in one answer, named or not: all of them run at once
MAX_ERROR_BODY: Final = 64 * 1024  # bytes of an error's body that are looked at
MIN_KEY: Final = 8  # characters of a key that are worth hiding
MAX_DEPTH: Final = 500  # of JSON; how deep Python itself can read and write depends on its version
MAX_QUOTED: Final = 500  # characters of what a provider says that are quoted in a message

# What is said and asked ---------------------------------------------------------------------------


@attrs.frozen
class Prompt:
    """One model call: everything that the model gets to see."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()


@attrs.frozen
class Finish:
    """The end of one model call; what a stream must bring to count as complete."""

    reason: FinishReason
    usage: Usage = attrs.field(factory=Usage)
    echo: Echo | None = None


Produced: TypeAlias = AnyEvent | Finish

# The seams ----------------------------------------------------------------------------------------


class Normalizer(Protocol):
    """A pure machine from one provider's chunks to our events: no await, no clock, no logging."""

    @property
    def is_over(self) -> bool:
        """Whether the provider has said that it is done: nothing but an error could follow."""

    def feed(self, chunk: Any, /) -> Iterable[Produced]:
        """Take one chunk. What is returned may be lazy, and is to be exhausted.

        Raises:
            ProviderError: The chunk says that the call has failed; what came before is returned
                first. Nothing can be fed from then on.
        """

    def close(self) -> Iterable[Produced]:
        """Take note that the stream has ended, and finish.

        Raises:
            ProviderError: It ended too early.
        """


class Connection(Protocol):
    """A model API, as one run uses it: one call after the other."""

    def stream(self, prompt: Prompt, /) -> AbstractAsyncContextManager[AsyncIterator[Any]]:
        """Open the stream of one model call; leaving the context closes it, also when cancelled.

        Raises:
            ProviderError: The API refused the call, or could not be reached, or went away.
        """

    def normalizer(self, prefix: str, /) -> Normalizer:
        """Make a machine for one model call; its part and call ids begin with `prefix`."""


class Caller(Protocol):
    """The run that a provider works for, as far as a provider may know it."""

    @property
    def window(self) -> float:
        """Seconds; hearing more often than this is of no use to the run."""

    async def sleep_until(self, when: float, /) -> None:
        """Wait until the loop's clock says so, or a few milliseconds longer; cheap for many."""

    def lull(self) -> None:
        """Call it when all that has come was handed on, before waiting for more. Sync."""

    async def ask(self, questions: Sequence[Question], /) -> Any:
        """Ask a person, and wait for the answers, by question id."""


class Provider(Protocol):
    """A model API."""

    @property
    def name(self) -> str:
        """What stands before the colon of a model."""

    def open(self, caller: Caller, /) -> AbstractAsyncContextManager[Connection]:
        """Open what one run needs; leaving the context closes all of it, also when cancelled."""


# What normalizers share ---------------------------------------------------------------------------


@attrs.define(eq=False)
class _Part:
    kind: PartKind
    part_id: str
    number: int
    is_shown: bool = False
    pieces: list[str] = attrs.field(factory=list)
    half: str = ""  # a surrogate whose other half comes with the next delta
    name: str = ""
    call_id: str | None = None
    start_arguments: str = ""


@attrs.define(eq=False)
class _Lifecycle:
    name: str
    pieces: list[str] = attrs.field(factory=list)
    half: str = ""  # as above
    is_finished: bool = False


@attrs.define(eq=False)
class Accumulator:
    """What a model has said in one call, part by part, and the events that tell it.

    Parts are told apart by a key of the API's own (an index, an item's id), which means nothing
    outside of the call. Every method returns the events to hand on, in order.

    Attributes:
        provider: Who says it, for errors.
        prefix: What ids begin with.
        reason: Why the model stopped, once it is known.
        usage: Tokens, as last told.
        echo: See `Finish`.
    """

    provider: str
    prefix: str
    reason: FinishReason | None = None
    usage: Usage = attrs.field(factory=Usage)
    echo: Echo | None = None
    _open: dict[tuple[PartKind, str], _Part] = attrs.field(factory=dict)
    _tools: dict[str, _Lifecycle] = attrs.field(factory=dict)
    _call_ids: set[str] = attrs.field(factory=set)
    _numbers: dict[str, int] = attrs.field(factory=dict)  # the next one for an id that came before
    _parts: int = 0
    _calls: int = 0

    @property
    def has_calls(self) -> bool:
        """Whether the model has asked for a tool of ours."""
        return bool(self._call_ids)

    def delta(self, kind: PartKind, text: str, key: str = "") -> list[AnyEvent]:
        """More text of a part, which begins with the first that is not empty."""
        part = self._open.get((kind, key))
        if part is None:
            if not text:
                return []
            part = self._begin(kind, key)
        text, part.half = _whole_characters(part.half + text)
        return self._say(part, well_formed(text)) if text else []

    def whole(self, kind: PartKind, text: str, key: str = "") -> list[AnyEvent]:
        """The aggregate of a part, and its end: what it has beyond the deltas is still said.

        Where it is not what was said, all of it is said, and it alone is the part's text. Empty, it
        is none. It is given once: of a part that is complete, nothing is known here.
        """
        events: list[AnyEvent] = []
        if text:
            part = self._open.get((kind, key)) or self._begin(kind, key)
            text, said, part.half = well_formed(text), "".join(part.pieces), ""
            if text != said:
                events = self._say(part, text.removeprefix(said))
                part.pieces = [text]
        return [*events, *self.finish(kind, key)]

    def start_call(
        self, key: str, *, name: str = "", call_id: str | None = None, arguments: str = ""
    ) -> list[AnyEvent]:
        """A tool call begins, or more of its beginning is known; shown once it has a name."""
        part = self._open.get(("tool_call", key)) or self._begin("tool_call", key)
        part.name = part.name or name
        if part.call_id is None and call_id:
            part.call_id = self._unique(call_id)
        part.start_arguments = part.start_arguments or arguments
        return self._show_call(part) if part.name else []

    def call_delta(self, key: str, arguments: str) -> list[AnyEvent]:
        """More of a tool call's arguments."""
        part = self._open.get(("tool_call", key)) or self._begin("tool_call", key)
        if part.is_shown:
            return self.delta("tool_call", arguments, key)
        if arguments:  # nameless as yet
            part.pieces.append(arguments)
        return []

    def finish_call(self, key: str, *, arguments: str = "") -> list[AnyEvent]:
        """A tool call is complete; the arguments given here count only if no delta came."""
        part = self._open.pop(("tool_call", key), None)
        if part is None:
            return []
        part.name = part.name or "unnamed"
        events = self._show_call(part)
        if not part.pieces:
            part.half = ""
            events += self._say(part, well_formed(arguments or part.start_arguments or "{}"))
        return [*events, *self._end(part)]

    def has_call(self, key: str) -> bool:
        """Whether a tool call of that key has begun and not ended."""
        return ("tool_call", key) in self._open

    def finish(self, kind: PartKind, key: str = "") -> list[AnyEvent]:
        """A part is complete with what was said; one that never began is none."""
        if kind == "tool_call":
            return self.finish_call(key)
        part = self._open.pop((kind, key), None)
        return [] if part is None else self._end(part)

    def finish_all(self, *kinds: PartKind) -> list[AnyEvent]:
        """Complete every open part of these kinds; of all kinds where none is named."""
        events: list[AnyEvent] = []
        for kind, key in list(self._open):
            if not kinds or kind in kinds:
                events += self.finish(kind, key)
        return events

    def close(self) -> list[Produced]:
        """The end of the stream: whatever is open is complete, and the call is finished.

        Raises:
            ProviderError: Nothing has said why the model stopped.
        """
        if self.reason is None:
            raise ProviderError(
                f"{self.provider}: expected the stream to say why the model stopped, got its end "
                "before that: the connection was cut, or the server gave up",
                code="incomplete",
            )
        events = self.finish_all()
        reason = "tool_calls" if self.has_calls and self.reason == "stop" else self.reason
        return [*events, Finish(reason, self.usage, self.echo)]

    # Tools that the provider runs itself

    def tool_started(self, call_id: str, name: str, arguments: Any = None) -> list[AnyEvent]:
        """The provider calls a tool of its own; told once per call id."""
        if call_id in self._tools:
            return []
        self._tools[call_id] = _Lifecycle(name)
        raw = encode_raw({} if arguments is None else arguments)
        return [ToolStarted(call_id=call_id, name=name, arguments=raw)]

    def tool_output(self, call_id: str, delta: str, name: str = "tool") -> list[AnyEvent]:
        """More of what such a tool prints."""
        events = self.tool_started(call_id, name)
        tool = self._tools[call_id]
        if tool.is_finished:
            return events
        delta, tool.half = _whole_characters(tool.half + delta)
        if not delta:
            return events
        delta = well_formed(delta)
        tool.pieces.append(delta)
        return [*events, ToolOutputDelta(call_id=call_id, delta=delta)]

    def tool_finished(
        self,
        call_id: str,
        name: str,
        result: Any,
        *,
        is_error: bool,
        source: ToolSource = "provider",
    ) -> list[AnyEvent]:
        """Such a tool is done; told once per call id.

        Args:
            call_id: Which call.
            name: Of the tool, where it was not known before.
            result: Text, or JSON as Python's plain types. Where output was streamed, text is its
                aggregate: what it has beyond the deltas is still said, and all of it where it is
                not what was said. Empty text stands for what was said.
            is_error: Whether it failed.
            source: Where the tool lives.
        """
        events = self.tool_started(call_id, name)
        tool = self._tools[call_id]
        if tool.is_finished:
            return events
        half, tool.half = tool.half, ""
        if half and not (isinstance(result, str) and result):
            events += self.tool_output(call_id, "\ufffd")
        if isinstance(result, str):
            said = "".join(tool.pieces)
            result = well_formed(result) or said
            if tool.pieces and result != said:
                events += self.tool_output(call_id, result.removeprefix(said))
        tool.is_finished = True
        finished = ToolFinished(
            call_id=call_id,
            name=tool.name,
            result=encode_raw(result),
            is_error=is_error,
            source=source,
        )
        return [*events, finished]

    # Below

    def _begin(self, kind: PartKind, key: str) -> _Part:
        self._parts += 1
        self._calls += kind == "tool_call"
        if self._calls > MAX_CALLS:
            raise ProviderError(
                f"{self.provider}: expected at most {MAX_CALLS} tool calls in one answer, got more",
                code="malformed",
            )
        part = _Part(kind, f"{self.prefix}p{self._parts}", self._parts)
        self._open[kind, key] = part
        return part

    def _show_call(self, part: _Part) -> list[AnyEvent]:
        if part.is_shown:
            return []
        if part.call_id is None:
            part.call_id = self._unique(f"{self.prefix}c{part.number}")
        held, part.half = _whole_characters("".join(part.pieces))
        part.pieces = []
        return self._say(part, well_formed(held)) if held else self._start(part)

    def _start(self, part: _Part) -> list[AnyEvent]:
        part.is_shown = True
        return [
            PartStarted(
                part_id=part.part_id, kind=part.kind, name=part.name or None, call_id=part.call_id
            )
        ]

    def _say(self, part: _Part, text: str) -> list[AnyEvent]:
        events = [] if part.is_shown else self._start(part)
        part.pieces.append(text)
        return [*events, PartDelta(part_id=part.part_id, kind=part.kind, delta=text)]

    def _end(self, part: _Part) -> list[AnyEvent]:
        events = self._say(part, "\ufffd") if part.half else []
        return [
            *events,
            PartFinished(
                part_id=part.part_id,
                kind=part.kind,
                text="".join(part.pieces),
                name=part.name or None,
                call_id=part.call_id,
            ),
        ]

    def _unique(self, call_id: str) -> str:
        known, number = call_id, self._numbers.get(call_id, 2)
        while call_id in self._call_ids:
            call_id, number = f"{known}-{number}", number + 1
        self._numbers[known] = number
        self._call_ids.add(call_id)
        return call_id


def _whole_characters(text: str) -> tuple[str, str]:
    """Cut off the first half of a surrogate pair whose other half may come with the next delta."""
    if text and "\ud800" <= text[-1] <= "\udbff":
        return text[:-1], text[-1]
    return text, ""


@attrs.define(eq=False)
class SseNormalizer:
    """What the normalizers of APIs that stream JSON over SSE share; a subclass knows the words.

    It is fed bytes, cut anywhere: the same bytes make the same events.
    """

    provider: ClassVar[str]

    prefix: str
    is_over: bool = attrs.field(default=False, init=False)
    said: Accumulator = attrs.field(init=False)
    _decoder: Decoder = attrs.field(factory=lambda: Decoder(max_frame_bytes=MAX_FRAME), init=False)

    def __attrs_post_init__(self) -> None:
        self.said = Accumulator(self.provider, self.prefix)

    def take(self, name: str, value: dict[str, Any]) -> Iterable[AnyEvent]:
        """Take one frame: its event's name and its JSON object; may raise `ProviderError`."""
        raise NotImplementedError

    def take_text(self, frame: Frame) -> Iterable[AnyEvent] | None:  # noqa: ARG002
        """Take one frame if it is nothing but more text, which nearly all are: the same, sooner.

        Returns:
            None for any other frame; `take` is given that.
        """
        return None

    def feed(self, chunk: bytes, /) -> Iterator[Produced]:
        """Take some bytes; see `Normalizer`."""
        try:
            frames = self._decoder.feed(chunk)
        except FrameTooLarge as error:
            raise ProviderError(
                f"{self.provider}: expected frames of at most {MAX_FRAME} bytes, got a larger one",
                code="malformed",
            ) from error
        for frame in frames:
            if (events := self.take_text(frame)) is not None:
                yield from events
                continue
            if frame.data.strip() == "[DONE]":
                self.is_over = True
                continue
            value = decode_foreign(frame.data)
            if isinstance(value, dict):
                yield from self.take(frame.event, value)
            elif frame.event == "error":
                raise upstream_error(self.provider, frame.data)
            else:
                yield self.unknown(value)

    def close(self) -> Iterator[Produced]:
        """Take note of the end; a last frame that lacks only its blank line counts."""
        yield from self.feed(b"\n\n")
        yield from self.said.close()

    def unknown(self, value: Any) -> ProviderEvent:
        """Hand on what nobody here understands."""
        return ProviderEvent(provider=self.provider, raw=encode_raw(value))


def decode_foreign(data: str | bytes) -> Any:
    """Read what a provider means as JSON; halves of surrogate pairs are let through.

    Returns:
        Python's plain types; the text itself where it is no JSON.
    """
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    try:
        value = decode_json(data)
    except BadRequest:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
    may_be_deep = text.count("[") + text.count("{") > MAX_DEPTH
    return text if may_be_deep and _is_deep(value) else value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested so deeply that it could not be written again."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def encode_raw(value: Any) -> Raw:
    """What came from a provider as JSON, whatever it is; text that is broken is mended."""
    try:
        return encode_json(value)
    except Unencodable:
        return encode_json(_mended(value, 0))


def _mended(value: Any, depth: int) -> Any:
    match value:
        case _ if depth > 100:
            return None
        case str():
            return well_formed(value)
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {well_formed(str(k)): _mended(v, depth + 1) for k, v in value.items()}
        case list():
            return [_mended(item, depth + 1) for item in value]
        case _:
            return value


def number(value: Any) -> int:
    """A count of tokens as a provider gives it; 0 where it is none."""
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def text_of(value: Any) -> str:
    """A string as a provider gives it; empty where it is none."""
    return value if isinstance(value, str) else ""


def name_of(value: Any) -> str:
    """A name or an id as a provider gives it, mended where it is broken: events carry it."""
    return well_formed(text_of(value))


def object_of(value: Any) -> dict[str, Any]:
    """An object as a provider gives it; empty where it is none."""
    return value if isinstance(value, dict) else {}


# What goes wrong ----------------------------------------------------------------------------------

# What the names in an error mean (its code, type or status, in lower case, with underscores), and
# what its message does where they say nothing; the first that is found counts.
_NAMES: tuple[tuple[str, Fault], ...] = (
    (r"context_?(?:length|window)|exceed_context|request_too_large", "context_length"),
    (r"string_above_max", "context_length"),
    (r"insufficient_(?:quota|balance|credits)|billing|payment_required|per_?day", "quota"),
    (r"content_?(?:filter|policy)|responsible_?ai|moderation|safety", "content_filter"),
    (r"rate_?limit|resource_?exhausted|too_?many_?requests|throttl|slow_down", "rate_limit"),
    (r"overloaded|unavailable", "overloaded"),
    (r"authenti|unauthorized|permission|forbidden|api_key", "auth"),
    (r"not_?found", "not_found"),
    (r"time_?out|timed_out|deadline_exceeded", "timeout"),
)
_VAGUE: tuple[tuple[str, Fault], ...] = (  # names that say less than a status does
    (r"invalid|bad_?request|unprocessable", "bad_request"),
    (r"server_?error|api_error|internal", "server_error"),
)
_PHRASES: tuple[tuple[str, Fault], ...] = (
    (r"(?:maximum|available|model's) context (?:length|size|window)", "context_length"),
    (r"exceed\w* (?:the |maximum )*context (?:length|limit|size|window)", "context_length"),
    (r"context (?:length|size|window) (?:has been |was )?exceeded", "context_length"),
    (r"(?:prompt|input) is too long|maximum (?:model|prompt) length", "context_length"),
    (r"input tokens? (?:count )?(?:\(\d+\) )?exceed|tokens? \+ +must be <=", "context_length"),
    (r"contextwindowexceedederror", "context_length"),  # LiteLLM's
    (r"too many tokens(?!.* wait)", "context_length"),
    (r"credit balance is too low|exceeded your current quota|billing hard limit", "quota"),
    (r"insufficient (?:balance|credits|quota)", "quota"),
    (
        r"content (?:filter\w*|management) policy|violat\w+ (?:our |the )?usage polic",
        "content_filter",
    ),
    (r"contentpolicyviolationerror", "content_filter"),  # LiteLLM's
    (r"(?:incorrect|invalid) api key|api key (?:not valid|expired)", "auth"),
)
_LOOSE: tuple[tuple[str, Fault], ...] = (  # what a message means if there is nothing else at all
    (r"rate limit|too many requests", "rate_limit"),
    (r"overloaded|temporarily unavailable|server (?:is )?busy", "overloaded"),
    (r"unauthorized|not authenticated", "auth"),
    (r"\bmodel\b.* (?:not found|does not exist)", "not_found"),
    (r"timed? ?out", "timeout"),
    (r"internal (?:server )?error", "server_error"),
)
_STATUS: dict[int, Fault] = {
    400: "bad_request",
    401: "auth",
    402: "quota",
    403: "auth",
    404: "not_found",
    408: "timeout",
    413: "context_length",
    429: "rate_limit",
    503: "overloaded",
    504: "timeout",
    524: "timeout",  # Cloudflare's
    529: "overloaded",  # Anthropic's
}
_OPEN = frozenset({None, 400, 413, 422, 500})  # statuses that leave open what it was
# What is quoted may be what a user wrote: it tells nothing. But an error may quote an error.
_QUOTED = re.compile(
    r"""\\?["']message\\?["']\s*:\s*\\?["']|(?<!\w)(["'`]).*?\1(?!\w)""", re.DOTALL
)


def upstream_error(
    provider: str, error: Any, *, status: int | None = None, retry_after: float | None = None
) -> ProviderError:
    """Make an error of what a provider says went wrong.

    Args:
        provider: Who says it.
        error: Its error object (`message`, and `code`, `type` or `status`), or text.
        status: Of the HTTP response, where it is one that says so.
        retry_after: See `ProviderError`; where it is None, the error object may say it.
    """
    fields = object_of(error)
    message = text_of(fields.get("message")) or text_of(error)
    if not message and error and "message" not in fields:
        message = bytes(encode_raw(error)).decode()
    names = [
        str(fields[key])
        for key in ("code", "type", "status")
        if isinstance(fields.get(key), str | int) and fields[key]
    ]
    details = fields.get("details")
    said = redact(" ".join(well_formed(message[:MAX_ERROR_BODY]).split())) or "(no message)"
    if len(said) > MAX_QUOTED:
        said = said[:MAX_QUOTED] + "..."
    what = "" if status is None else f" with status {status}"
    named = redact(well_formed(f" ({', '.join(names)})"))[:200] if names else ""
    return ProviderError(
        f"{provider} answered{what}{named}: {said}",
        code=_fault(status, [*names, _quotas(details)], message),
        retry_after=_retry_delay(details) if retry_after is None else retry_after,
    )


def blanked(error: ProviderError, secrets: Iterable[str]) -> ProviderError:
    """The same error without what must never be seen; itself where none of it is there."""
    message = error.message
    for secret in secrets:
        message = message.replace(secret, "[redacted]")
    if message == error.message:
        return error
    return ProviderError(message, code=error.code, retry_after=error.retry_after)


def _fault(status: int | None, names: Sequence[str], message: str) -> Fault:
    if status is None:  # many say it in the code
        status = next((int(n) for n in names if re.fullmatch(r"[45]\d\d", n)), None)
    if re.fullmatch(r"[\w.-]+", message):  # a name where others have a sentence
        names = [*names, message]
    named = re.sub(r"[\s-]+", "_", " ".join(names).lower())
    plain = _QUOTED.sub(lambda found: " " if found[1] else found[0], message[:2000]).lower()
    found = (
        _meaning(_NAMES, named)
        or (_meaning(_PHRASES, plain) if status in _OPEN else None)
        or (None if status is None else _STATUS.get(status))
        or _meaning(_VAGUE, named)
        or (_meaning(_LOOSE, plain) if status is None else None)
    )
    if found is not None:
        return found
    if status is None:
        return "provider_error"
    return "server_error" if status >= 500 else "bad_request"


def _meaning(table: Iterable[tuple[str, Fault]], text: str) -> Fault | None:
    return next((fault for words, fault in table if re.search(words, text)), None)


def _quotas(details: Any) -> str:
    """Whether the quota of a day is used up, where google.rpc.QuotaFailure says which."""
    return "per_day" if b"PerDay" in bytes(encode_raw(details)) else ""


def _retry_delay(details: Any) -> float | None:
    """Seconds to wait, as google.rpc.RetryInfo says it: "36.5s"."""
    for detail in details if isinstance(details, list) else ():
        delay = text_of(detail.get("retryDelay")) if isinstance(detail, dict) else ""
        if re.fullmatch(r"\d{1,6}(\.\d+)?s", delay):
            return float(delay[:-1])
    return None


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds to wait, as a response says it: RFC 9110 section 10.2.3, and in milliseconds.

    Args:
        headers: By lower-case name.
        now: The time, as seconds since the epoch.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    from email.utils import parsedate_to_datetime  # noqa: PLC0415  # 4 ms, for a few who say a date

    try:
        when = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError, OverflowError):
        return None
    if when.tzinfo is None:  # "-0000", which is GMT as well
        when = when.replace(tzinfo=dt.UTC)
    return max(0.0, when.timestamp() - now)


# APIs over HTTP -----------------------------------------------------------------------------------

# A key that is none: servers at home want "ollama", "none", "x". To blank it would blank words.
_PLACEHOLDER = re.compile(r"[A-Za-z-]{0,7}|.{0,3}")


@attrs.frozen
class HttpRequest:
    """A POST that opens a stream.

    Attributes:
        url: Where.
        headers: Beside those of every such request; the key is among them.
        body: JSON as Python's plain types; fields that are None are left out.
    """

    url: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    body: dict[str, Any]


class Api(Protocol):
    """The words of one HTTP API; pure."""

    kind: ClassVar[str]

    def request(self, prompt: Prompt, /) -> HttpRequest:
        """Write a model call."""

    def normalizer(self, prefix: str, /) -> Normalizer:
        """Make the machine that reads its answer; it is fed bytes."""


@attrs.frozen
class HttpProvider:
    """A model API over HTTP: each run has a small pool of connections of its own.

    Attributes:
        name: What stands before the colon of a model.
        api: The words.
        key: What must never be seen; blanked wherever an error of the API repeats it.
        open_client: Makes the client of one run; see `agentsse.http.open_http`.
    """

    name: str
    api: Api
    key: str | None = attrs.field(default=None, repr=False)
    open_client: Any = None

    @asynccontextmanager
    async def open(self, caller: Caller, /) -> AsyncIterator["HttpConnection"]:
        """Open the run's client; see `Provider`."""
        open_client = self.open_client
        if open_client is None:
            # Late: who never calls a model over HTTP does not pay for the client.
            from agentsse.http import open_http as open_client  # noqa: PLC0415
        async with open_client(
            window=caller.window, lull=caller.lull, sleep_until=caller.sleep_until
        ) as client:
            yield HttpConnection(self, client)


@attrs.frozen
class HttpConnection:
    """An HTTP API, as one run uses it."""

    provider: HttpProvider
    client: "HttpClient"

    @asynccontextmanager
    async def stream(self, prompt: Prompt, /) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open the stream of one model call; see `Connection`."""
        name, request = self.provider.name, self.provider.api.request(prompt)
        key = self.provider.key
        if key is not None and _PLACEHOLDER.fullmatch(key):
            key = None
        fields = {field: value for field, value in request.body.items() if value is not None}
        body = bytes(encode_json(fields, what=f"the request to {name}"))
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        try:
            async with self.client.post(
                request.url, headers=headers | dict(request.headers), body=body
            ) as response:
                media_type = response.headers.get("content-type", "").partition(";")[0].strip()
                is_stream = media_type.lower() in ("text/event-stream", "", "text/plain")
                if response.status != 200 or not is_stream:
                    said = await response.read_some(MAX_ERROR_BODY)
                    if key is not None:  # before anything is cut, and half of it is left
                        said = said.replace(key.encode(), b"[redacted]")
                    raise _refusal(name, response, media_type, said)
                yield response.chunks
        except ProviderError as error:
            if (shown := blanked(error, () if key is None else _remains(key))) is error:
                raise
            raise shown from None

    def normalizer(self, prefix: str, /) -> Normalizer:
        """Make a machine for one model call."""
        return self.provider.api.normalizer(prefix)


def _remains(key: str) -> list[str]:
    """A key, and what may be left of it where a text was cut; the longest comes first."""
    return [key, *(key[:length] for length in range(len(key) - 1, MIN_KEY - 1, -1))]


def _refusal(name: str, response: "Response", media_type: str, body: bytes) -> ProviderError:
    """What an answer that is no stream says: an error object, a page for people, or nothing."""
    status, value = response.status, decode_foreign(body)
    if isinstance(value, list) and value:
        value = value[0]
    wait = retry_after(response.headers, now=time.time())
    error = _error_in(value) if isinstance(value, dict) else None
    if status == 200 and error is None:
        page = _plain(body.decode("utf-8", "replace"))
        return ProviderError(
            f"{name}: expected a stream (text/event-stream), got {media_type[:100] or 'no type'}: "
            f"{redact(page)[:MAX_QUOTED]!r}; is base_url right?",
            code="malformed",
        )
    if error is None:
        error = _plain(body.decode("utf-8", "replace"))
        if 300 <= status < 400:
            where = response.headers.get("location", "nowhere")
            error = f"a redirect to {where[:MAX_QUOTED]}; is base_url right?"
        elif status in (404, 405):
            error = f"{error or '(no message)'}; is base_url right?"
    return upstream_error(name, error, status=None if status == 200 else status, retry_after=wait)


def _error_in(value: dict[str, Any]) -> Any:
    """The error in what a server says of it; they do not agree on where it stands."""
    match value:
        case {"error": dict() as error}:
            return error
        case {"error": str() as code, "message": str() as message}:
            return {"message": message, "code": code}
        case {"message": str()}:
            return value
        case _:
            return value.get("error") or value.get("detail") or None


def _plain(page: str) -> str:
    """The words of a page, without its markup."""
    page = re.sub(r"(?is)<(script|style)\b.*?(</\1>|$)", " ", page)
    return " ".join(re.sub(r"<[^<>]*>", " ", page).split())
