"""The facts of a run: one closed union of frozen Structs, and the values they are made of.

Knows: names, fields and JSON. Must never know how an event travels, who watches, or what time it
is: a log gives an event its number and its time when it takes it in, and from then on nothing
about it changes.

An event is flat: the envelope first (`run_id`, `seq`, `ts`, `path`), then its own fields. A field
that has a default here is left out on the wire while it has that value; all others are always
there. What users give (inputs, results, custom values) is JSON from the moment it is emitted: an
event is a fact, and a later change of the object that it was made from must not change it. Where
there may be none it is UNSET, for null is JSON too (and msgspec reads no union of Raw and None).
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from .errors import BadRequest, Unencodable

Outcome: TypeAlias = Literal["success", "error", "cancelled", "interrupted"]
Cause: TypeAlias = Literal[
    "client_cancel", "disconnect", "deadline", "shutdown", "limit", "parent", "input_timeout"
]
StepKind: TypeAlias = Literal["model", "flow", "node", "tool_round"]
PartKind: TypeAlias = Literal["text", "reasoning", "tool_call", "refusal"]
FinishReason: TypeAlias = Literal[
    "stop", "length", "tool_calls", "content_filter", "error", "other"
]
ToolSource: TypeAlias = Literal["local", "provider", "mcp"]
RunState: TypeAlias = Literal["queued", "running", "waiting", "paused", "cancelling", "finished"]
ThreadState: TypeAlias = Literal["idle", "queued", "running", "waiting", "paused", "cancelling"]
TriggerChange: TypeAlias = Literal[
    "available", "activated", "fired", "deactivated", "updated", "removed"
]

NULL = Raw(b"null")


class Problem(Struct, frozen=True, kw_only=True, gc=False):
    """What went wrong, for a program (`code`), a person (`message`) and HTTP (`status`)."""

    code: str
    message: str
    status: int = 500


class Usage(Struct, frozen=True, kw_only=True, gc=False):
    """Tokens that a run, or one model call, has used.

    Attributes:
        input_tokens: All that the model was given, cached or not.
        output_tokens: All that it made, reasoning included.
        reasoning_tokens: Of the output, where the provider says.
        cache_read_tokens, cache_write_tokens: Of the input, where the provider says.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cache_read_tokens=self.cache_read_tokens + other.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
        )


class Receipt(Struct, frozen=True, kw_only=True, gc=False):
    """How a run was torn down.

    Attributes:
        cause: What asked for the end first; None where nothing did.
        seconds: From that signal until the run's nursery had exited.
        tasks: Tasks that were alive below the run at the signal; all of them have been joined.
        threads_abandoned: Worker threads that outlived their grace; they run on, unheard.
    """

    cause: Cause | None = None
    seconds: float = 0.0
    tasks: int = 0
    threads_abandoned: int = 0


class Option(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One of the answers that a question offers."""

    id: str
    label: str | None = None


class Question(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a run asks a person: free text, one or some of several options, or yes and no."""

    id: str
    kind: Literal["text", "choice", "choices", "confirm"]
    prompt: str
    options: tuple[Option, ...] = ()


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class Event(
    Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="type",
    tag=_snake_case,
    gc=False,  # they refer to nothing that refers back: a long log is no work for the collector
):
    """The envelope. `Log.append` fills it in, once; `path` names the sub-agent that spoke."""

    run_id: str = ""
    seq: int = 0
    ts: str = ""
    path: tuple[str, ...] = ()


class RunStarted(Event, frozen=True, kw_only=True):
    """Always first; `client_tools` names those of the client that a model may call."""

    agent: str
    input: Raw
    on_disconnect: str
    thread_id: str | None = None
    parent_run_id: str | None = None
    client_tools: tuple[str, ...] = ()


class RunFinished(Event, frozen=True, kw_only=True):
    """Always last, once; `pending` are ids of the tool calls that the client is to make."""

    outcome: Outcome
    usage: Usage
    receipt: Receipt
    result: Raw | UnsetType = UNSET
    error: Problem | None = None
    pending: tuple[str, ...] = ()


class StepStarted(Event, frozen=True, kw_only=True):
    """A named stretch of the run begins."""

    step_id: str
    kind: StepKind
    name: str


class StepFinished(Event, frozen=True, kw_only=True):
    """A step is over; its error, if it has one, does not by itself end the run."""

    step_id: str
    kind: StepKind
    name: str
    result: Raw | UnsetType = UNSET
    error: Problem | None = None
    usage: Usage | None = None
    finish_reason: FinishReason | None = None


class PartStarted(Event, frozen=True, kw_only=True):
    """A piece of what the model says begins; a tool call has its name and call id here already."""

    part_id: str
    kind: PartKind
    name: str | None = None
    call_id: str | None = None


class PartDelta(Event, frozen=True, kw_only=True):
    """More of a part: always an increment, never the whole."""

    part_id: str
    kind: PartKind
    delta: str


class PartFinished(Event, frozen=True, kw_only=True):
    """The whole part: for a tool call, its arguments as JSON text."""

    part_id: str
    kind: PartKind
    text: str
    name: str | None = None
    call_id: str | None = None


class ToolStarted(Event, frozen=True, kw_only=True):
    """A tool is called."""

    call_id: str
    name: str
    arguments: Raw


class ToolOutputDelta(Event, frozen=True, kw_only=True):
    """More of what a tool prints while it works."""

    call_id: str
    delta: str


class ToolFinished(Event, frozen=True, kw_only=True):
    """A tool has answered, or failed: exactly once per call id."""

    call_id: str
    name: str
    result: Raw
    is_error: bool
    source: ToolSource


class AgentStarted(Event, frozen=True, kw_only=True):
    """A nested agent begins; of a child run the events are in a log of its own."""

    agent: str
    child_run_id: str | None = None
    input: Raw | UnsetType = UNSET


class AgentFinished(Event, frozen=True, kw_only=True):
    """A nested agent is done; `report` is its result. Of a child run it comes exactly once."""

    agent: str
    child_run_id: str | None = None
    report: Raw | UnsetType = UNSET
    error: Problem | None = None
    usage: Usage | None = None
    seconds: float | None = None


class InputRequested(Event, frozen=True, kw_only=True):
    """The run waits for a person."""

    request_id: str
    questions: tuple[Question, ...]


class InputReceived(Event, frozen=True, kw_only=True):
    """Somebody has answered; `answers` maps question ids to answers."""

    request_id: str
    answers: Raw


class InputWithdrawn(Event, frozen=True, kw_only=True):
    """The run no longer waits for this answer: it took too long, or is not needed any more."""

    request_id: str


class MessageReceived(Event, frozen=True, kw_only=True):
    """Somebody has said something to a run that goes on; it hears it at its next turn."""

    message_id: str
    text: str
    mode: Literal["steer", "follow_up"]


class Paused(Event, frozen=True, kw_only=True):
    """The run rests before its next step."""

    reason: str | None = None


class Resumed(Event, frozen=True, kw_only=True):
    """The run goes on."""


class ValuesChanged(Event, frozen=True, kw_only=True):
    """Some of the run's values are new: an object of those that changed, null for one removed."""

    values: Raw


class Retry(Event, frozen=True, kw_only=True):
    """A model call failed before it had shown anything, or a flow's step failed: once more."""

    attempt: int
    max: int
    delay_s: float
    error: Problem


class Failover(Event, frozen=True, kw_only=True):
    """Another listed model takes over."""

    from_model: str = msgspec.field(name="from")
    to_model: str = msgspec.field(name="to")
    reason: str


class Liveness(Event, frozen=True, kw_only=True):
    """A step is still running; this never counts as progress."""

    elapsed_s: float
    events: int
    since_last_output_s: float


class Stalled(Event, frozen=True, kw_only=True):
    """Nothing has come for longer than the watchdog allows."""

    idle_s: float
    limit_s: float


class LoopDetected(Event, frozen=True, kw_only=True):
    """The same call has come too often."""

    fingerprint: str
    repeats: int


class ContextUsage(Event, frozen=True, kw_only=True):
    """The context window fills up."""

    ratio: float
    tokens: int
    limit: int


class Compacted(Event, frozen=True, kw_only=True):
    """The conversation was shortened to fit the context window."""

    ratio_before: float
    ratio_after: float


class Moderation(Event, frozen=True, kw_only=True):
    """A shield has looked at what goes in or comes out."""

    violation: bool
    message: str | None = None
    metadata: Raw | UnsetType = UNSET


class Custom(Event, frozen=True, kw_only=True):
    """What `emit` makes."""

    name: str
    value: Raw


class ProviderEvent(Event, frozen=True, kw_only=True):
    """Anything unknown from upstream: never dropped silently, never fatal."""

    provider: str
    raw: Raw


class TriggerChanged(Event, frozen=True, kw_only=True):
    """A thread's trigger has come, changed, fired or gone; in feeds only.

    Attributes:
        thread_id: Whose it is.
        every_s: Its interval.
        text: What the thread is told.
        fired: How often it has.
        last_at, next_at: When it last did, and will do so again.
        error: Why a firing came to nothing.
    """

    thread_id: str
    trigger_id: str
    change: TriggerChange
    name: str
    every_s: float
    text: str
    fired: int = 0
    last_at: str | None = None
    next_at: str | None = None
    error: Problem | None = None


class Gap(Event, frozen=True, kw_only=True):
    """Events that a feed no longer holds; synthetic, without an id."""

    from_id: str = msgspec.field(name="from")
    to_id: str = msgspec.field(name="to")


AnyEvent: TypeAlias = (
    RunStarted
    | RunFinished
    | StepStarted
    | StepFinished
    | PartStarted
    | PartDelta
    | PartFinished
    | ToolStarted
    | ToolOutputDelta
    | ToolFinished
    | AgentStarted
    | AgentFinished
    | InputRequested
    | InputReceived
    | InputWithdrawn
    | MessageReceived
    | Paused
    | Resumed
    | ValuesChanged
    | Retry
    | Failover
    | Liveness
    | Stalled
    | LoopDetected
    | ContextUsage
    | Compacted
    | Moderation
    | Custom
    | ProviderEvent
    | TriggerChanged
    | Gap
)

EVENT_TYPES: Mapping[str, type[AnyEvent]] = {
    str(kind.__struct_config__.tag): kind for kind in AnyEvent.__args__
}
TYPE_NAMES: Mapping[type[AnyEvent], str] = {kind: name for name, kind in EVENT_TYPES.items()}


class RunSnapshot(Struct, frozen=True, kw_only=True):
    """A run as it stands: what `GET /runs/{id}` shows, in any dialect's clothes.

    Attributes:
        result: JSON; null while there is none.
        input, metadata, output, values: Left out where runs are listed. The output is the text that
            the model has said so far: what a cancelled run leaves behind.
        events: How many events its log holds.
    """

    id: str
    agent: str
    state: RunState
    on_disconnect: str
    created: str
    started: str | None
    finished: str | None
    thread_id: str | None
    parent_run_id: str | None
    outcome: Outcome | None
    result: Raw
    error: Problem | None
    usage: Usage
    receipt: Receipt | None
    events: int
    questions: tuple[InputRequested, ...]
    input: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET
    output: str | UnsetType = UNSET
    values: Raw | UnsetType = UNSET


class ThreadSnapshot(Struct, frozen=True, kw_only=True):
    """A thread as it stands.

    Attributes:
        agent: Who runs when the thread is told something.
        state: Of its current run; `idle` without one.
        run: The current run, in brief: the one that goes on, else the last one that is kept.
        runs: Ids of all that are kept, the oldest first; child runs are not among them.
        workers: Child runs that are kept, in brief, the oldest first.
        tools: Tool calls of the current run that are under way.
        triggers: Each as its last change.
        last_event_id: Of its feed; null while nothing has happened.
        last_event_at: When that was.
        is_open: Whether it stays until it is closed.
    """

    id: str
    agent: str
    created: str
    state: ThreadState
    run: RunSnapshot | None
    runs: tuple[str, ...]
    workers: tuple[RunSnapshot, ...]
    tools: tuple[ToolStarted, ...]
    triggers: tuple[TriggerChanged, ...]
    last_event_id: str | None
    last_event_at: str | None
    is_open: bool
    metadata: Raw


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)

encode_event = _encoder.encode
"""An event as compact JSON bytes."""

encode_event_into = _encoder.encode_into
"""The same into a bytearray that is used again and again."""


def decode_event(data: bytes | str) -> AnyEvent:
    """Read an event from its JSON; raises `msgspec.ValidationError` where it is none."""
    return _decoder.decode(data)


def encode_json(value: object, *, what: str = "the value") -> Raw:
    """Turn a value into JSON, now and for good.

    Args:
        value: Anything that msgspec encodes: JSON's own types, attrs and dataclass instances,
            Structs, dates, UUIDs, bytes (as base64).
        what: How to name the value in the error.

    Raises:
        Unencodable: JSON cannot hold it (NaN and infinity among others); says what, and where.
    """
    try:
        encoded = encode_event(value)
    except Exception as error:  # a value's own code may raise anything
        raise Unencodable(
            f"{what}: expected what JSON can hold, got {_culprit(value, '$')}; "
            "turn it into strings, finite numbers, booleans, lists and dicts"
        ) from error
    # msgspec writes NaN and infinity as null: only then is a closer look needed. To look for it by
    # `find` takes as long as to encode; `in` takes longer.
    if encoded.partition(b"null")[1] and (place := _not_finite(value, "$")) is not None:
        raise Unencodable(
            f"{what}: expected finite numbers, got {place}; JSON has no NaN and no infinity"
        )
    return Raw(encoded)


def well_formed(text: str) -> str:
    """Text that UTF-8 can carry: halves of surrogate pairs are joined, or replaced where alone."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def decode_json(data: bytes | str | Raw) -> Any:
    """Read JSON as Python's plain types; depth and numbers are bounded by msgspec.

    Raises:
        BadRequest: It is not JSON, or nested too deeply.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise BadRequest(f"expected JSON, got something else: {error}") from error


def text_of_json(value: Raw) -> str:
    """A string's own text; of anything else its JSON."""
    text = bytes(value).decode()
    return str(decode_json(value)) if text.startswith('"') else text


def _children(value: object, place: str) -> list[tuple[object, str]]:
    """What a container holds, each with its place in JSONPath's notation."""
    match value:
        case Mapping():
            return [(item, f"{place}.{_shown(key)}") for key, item in value.items()]
        case list() | tuple():
            return [(item, f"{place}[{index}]") for index, item in enumerate(value)]
        case set() | frozenset():
            return [(item, f"{place}[]") for item in value]
        case Struct():
            return [(getattr(value, f, None), f"{place}.{f}") for f in value.__struct_fields__]
        case _ if hasattr(type(value), "__attrs_attrs__") or hasattr(value, "__dataclass_fields__"):
            names = [f.name for f in getattr(type(value), "__attrs_attrs__", ())]
            names += list(getattr(value, "__dataclass_fields__", ()))
            return [(getattr(value, name, None), f"{place}.{name}") for name in names]
        case _:
            return []


def _shown(key: object) -> str:
    """A key as it may stand in a message: short, and text that UTF-8 can carry."""
    text = str(key) if isinstance(key, str | int | float) else f"<{type(key).__name__}>"
    return text[:40].encode(errors="backslashreplace").decode()


def _is_finite(value: object) -> bool:
    ahead = [value]
    while ahead:
        value = ahead.pop()
        match value:
            case float():
                if not math.isfinite(value):
                    return False
            case str() | int() | None:
                pass
            case dict():
                ahead += value.values()
            case list() | tuple():
                ahead += value
            case _:
                ahead += [child for child, _ in _children(value, "")]
    return True


def _not_finite(value: object, place: str) -> str | None:
    """Find the first number that JSON has no word for; no recursion, what is deep is welcome."""
    if _is_finite(value):  # where each value is takes far more room than the values
        return None
    ahead = [(value, place)]
    while ahead:
        value, place = ahead.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} at {place}"
        ahead += reversed(_children(value, place))
    return None


def _culprit(value: object, place: str, depth: int = 0) -> str:
    """Find the innermost value that cannot be encoded, and say where it is."""
    if depth > 50:
        return f"something nested too deeply, or in itself, at {place[:40]}"
    for child, where in _children(value, place):
        try:
            _encoder.encode(child)
        except (TypeError, ValueError, RecursionError, OverflowError):
            return _culprit(child, where, depth + 1)
    return f"{_summary(value)} at {place}"


def _summary(value: object) -> str:
    if isinstance(value, str):
        return "a str with half of a surrogate pair"
    if isinstance(value, dict):
        return f"{type(value).__name__} with a key that is no text"
    return type(value).__name__
