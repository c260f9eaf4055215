"""Our own protocol: every event as it is, one frame each, its id the event's number.

Knows: the routes of `/agents` and `/runs`, their bodies, and how Accept chooses between a stream
and a JSON answer. Must never know what a run is beyond its snapshot.
"""

import hashlib
from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeVar

import attrs
import msgspec

from agentsse.errors import BadRequest, NotAcceptable
from agentsse.events import (
    EVENT_TYPES,
    TYPE_NAMES,
    AnyEvent,
    Gap,
    RunFinished,
    RunSnapshot,
    encode_event,
)
from agentsse.sse import FieldError, comment, encode, frame_of, parse_position, retry

from . import (
    Answer,
    Cancel,
    Dialect,
    Intent,
    ListAgents,
    ListRuns,
    Request,
    Route,
    Show,
    Start,
    Watch,
)

RETRY = 2_000  # milliseconds before an EventSource comes back; its own default is 3 s or more
MAX_KEY = 255  # characters of an Idempotency-Key
ALWAYS = frozenset({RunFinished, Gap})  # pass every filter: an end must be seen, and so must a hole

Body = TypeVar("Body", bound=msgspec.Struct)

LF, CR = b"\n\r"
_FRAMES = {kind: frame_of(name.encode()) for kind, name in TYPE_NAMES.items()}


@attrs.frozen
class NativeEncoder:
    """Events as their own JSON; with `types`, only those and the ones that always pass."""

    types: frozenset[type[AnyEvent]] | None

    def feed(self, event: AnyEvent) -> tuple[bytes, ...]:
        """Make the one frame of an event, or none where it is filtered out."""
        kind = type(event)
        if self.types is not None and kind not in self.types and kind not in ALWAYS:
            return ()
        data = encode_event(event)
        if LF in data or CR in data:  # there is JSON in it that somebody else has formatted
            return (encode(data, event=TYPE_NAMES[kind], id=str(event.seq)),)
        return (_FRAMES[kind] % (event.seq, data),)


class _StartBody(msgspec.Struct, forbid_unknown_fields=True):
    input: Any = None
    thread_id: str | None = None
    on_disconnect: str | None = None
    coalesce_ms: float | None = None
    timeout_s: float | None = None
    metadata: Any = None
    background: bool = False
    if_busy: Literal["reject", "enqueue"] = "reject"


class _CancelBody(msgspec.Struct, forbid_unknown_fields=True):
    reason: str | None = None
    mode: Literal["now", "after_step"] = "now"


class _InputBody(msgspec.Struct, forbid_unknown_fields=True):
    answers: dict[str, Any]
    request_id: str | None = None


def decode_start(request: Request) -> Intent:
    """`POST /agents/{agent}/runs`."""
    body = _body(request, _StartBody, what="start a run with")
    for name, value, most in (
        ("coalesce_ms", body.coalesce_ms, 10_000),
        ("timeout_s", body.timeout_s, 86_400),
    ):
        if value is not None and not 0 <= value <= most:
            raise BadRequest(f"{name}: expected a number from 0 to {most}, got {value}")
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isprintable()):
        raise BadRequest(
            f"Idempotency-Key: expected 1 to {MAX_KEY} printable characters, got {len(key)}"
        )
    if body.background or _prefers_async(request.headers):
        delivery: Literal["stream", "wait", "background"] = "background"
        default = "continue"
    else:
        delivery, default = negotiate(request.headers.get("accept", "*/*")), None
    if key is not None and default is None:
        default = "grace"  # else the retry would find a run that its own first try has cancelled
    return Start(
        agent=request.parameters["agent"],
        input=body.input,
        delivery=delivery,
        on_disconnect=body.on_disconnect or default,
        thread_id=body.thread_id,
        coalesce=None if body.coalesce_ms is None else body.coalesce_ms / 1000,
        timeout=body.timeout_s,
        metadata=body.metadata,
        if_busy=body.if_busy,
        idempotency_key=key,
        fingerprint=hashlib.sha256(request.body).digest(),
    )


def decode_watch(request: Request) -> Intent:
    """`GET /runs/{id}/events`, and HEAD."""
    _know(request.query, "after", "types", "dialect")
    negotiate(request.headers.get("accept", "*/*"), only="stream")
    dialect, types = request.query.get("dialect"), request.query.get("types")
    if dialect is not None and types is not None:
        raise BadRequest("types: expected no filter together with 'dialect'; drop one of them")
    last = request.headers.get("last-event-id", request.query.get("after", "0"))
    try:
        after = parse_position(last or "0")
    except FieldError as error:
        raise BadRequest(str(error)) from error
    return Watch(
        run_id=request.parameters["run_id"],
        after=after,
        dialect=dialect,
        options=None if types is None else _types(types),
        headers_only=request.method == "HEAD",
    )


def decode_cancel(request: Request) -> Intent:
    """`POST /runs/{id}/cancel`."""
    body = _body(request, _CancelBody, what="cancel with")
    return Cancel(run_id=request.parameters["run_id"], reason=body.reason, mode=body.mode)


def decode_input(request: Request) -> Intent:
    """`POST /runs/{id}/input`."""
    body = _body(request, _InputBody, what="answer with")
    return Answer(
        run_id=request.parameters["run_id"], answers=body.answers, request_id=body.request_id
    )


def decode_show(request: Request) -> Intent:
    """`GET /runs/{id}`."""
    _know(request.query)
    return Show(run_id=request.parameters["run_id"])


def decode_list_runs(request: Request) -> Intent:
    """`GET /runs`."""
    _know(request.query, "state", "limit")
    limit = request.query.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 0 < int(limit) <= 1_000):
        raise BadRequest(f"limit: expected a number from 1 to 1000, got {limit[:20]!r}")
    state = request.query.get("state")
    states = ("queued", "running", "waiting", "cancelling", "finished")
    if state is not None and state not in states:
        raise BadRequest(f"state: expected one of {', '.join(states)}, got {state[:20]!r}")
    return ListRuns(state=state, limit=int(limit))


def decode_list_agents(request: Request) -> Intent:
    """`GET /agents`."""
    _know(request.query)
    return ListAgents()


def negotiate(accept: str, *, only: Literal["stream"] | None = None) -> Literal["stream", "wait"]:
    """Choose between an event stream and a JSON answer (RFC 9110 section 12.5.1).

    Args:
        accept: The Accept header. `*/*` alone means JSON; on a tie a named `text/event-stream`
            wins.
        only: Where there is no choice.

    Raises:
        NotAcceptable: The header allows neither, or not the one there is.
    """
    ranges = _ranges(accept)
    stream, named = _quality(ranges, "text", "event-stream")
    json, _ = _quality(ranges, "application", "json")
    if only is not None:
        json = 0.0
    if stream > json or (named and stream == json > 0):
        return "stream"
    if json > 0:
        return "wait"
    offered = "text/event-stream" if only else "text/event-stream or application/json"
    raise NotAcceptable(f"Accept: expected {offered}, got {accept[:80]!r}")


def _ranges(accept: str) -> dict[tuple[str, str], float]:
    ranges: dict[tuple[str, str], float] = {}
    for item in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in item.split(";"))
        kind, _, subtype = name.partition("/")
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = min(max(float(parameter[2:]), 0.0), 1.0)
                except ValueError:
                    quality = 0.0
        if kind:
            ranges[kind, subtype] = quality
    return ranges or {("*", "*"): 1.0}


def _quality(
    ranges: Mapping[tuple[str, str], float], kind: str, subtype: str
) -> tuple[float, bool]:
    """The quality of the most specific range that fits, and whether it names the type."""
    if (kind, subtype) in ranges:
        return ranges[kind, subtype], True
    return ranges.get((kind, "*"), ranges.get(("*", "*"), 0.0)), False


def _prefers_async(headers: Mapping[str, str]) -> bool:
    preferences = headers.get("prefer", "").split(",")
    return any(item.split(";")[0].strip().lower() == "respond-async" for item in preferences)


def _types(text: str) -> frozenset[type[AnyEvent]]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in EVENT_TYPES]
    if unknown:
        raise BadRequest(
            f"types: expected some of {', '.join(EVENT_TYPES)}, got {', '.join(unknown)[:80]!r}"
        )
    return frozenset(EVENT_TYPES[name] for name in names)


def _know(query: Mapping[str, str], *names: str) -> None:
    unknown = sorted(set(query) - set(names))
    if unknown:
        expected = f"one of {', '.join(names)}" if names else "no query"
        raise BadRequest(f"query: expected {expected}, got {', '.join(unknown)[:80]!r}")


def _body(request: Request, shape: type[Body], *, what: str) -> Body:
    """Read the body as JSON, whatever Content-Type says: `curl -d` says form."""
    fields = ", ".join(shape.__struct_encode_fields__)
    try:
        return msgspec.json.decode(request.body or b"{}", type=shape)
    except msgspec.ValidationError as error:
        raise BadRequest(f"expected a JSON object to {what} ({fields}): {error}") from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise BadRequest(
            f"expected JSON to {what} ({fields}), got {request.body[:40]!r}: {error}"
        ) from error


def _encoder(options: Hashable) -> NativeEncoder:
    return NativeEncoder(options)  # type: ignore[arg-type]  # what decode_watch made


def _present(snapshot: RunSnapshot) -> bytes:
    return msgspec.json.encode(snapshot)


NATIVE = Dialect(
    name="native",
    mount="/",
    routes=(
        Route("GET", "/agents", decode_list_agents),
        Route("POST", "/agents/<agent>/runs", decode_start),
        Route("GET", "/runs", decode_list_runs),
        Route("GET", "/runs/<run_id>", decode_show),
        Route("GET", "/runs/<run_id>/events", decode_watch),
        Route("POST", "/runs/<run_id>/cancel", decode_cancel),
        Route("POST", "/runs/<run_id>/input", decode_input),
    ),
    encoder=_encoder,
    present=_present,
    prelude=retry(RETRY) + comment("agentsse"),
    heartbeat=comment(),
    on_disconnect="cancel",
    farewell=retry,
)
