"""Our own protocol: every event as it is, one frame each, its id the event's number.

Knows: the routes of `/agents`, `/runs`, `/threads` and `/events`, their bodies, and how Accept
chooses between a stream and a JSON answer. Must never know what a run is beyond its snapshot.
"""

import hashlib
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

import attrs
import msgspec
from msgspec import Meta

from agentsse.errors import BadRequest
from agentsse.events import (
    EVENT_TYPES,
    TYPE_NAMES,
    AnyEvent,
    Gap,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    RunFinished,
    RunSnapshot,
    RunStarted,
    RunState,
    ThreadSnapshot,
    encode_event,
    encode_event_into,
)
from agentsse.sse import FieldError, comment, encode, frame_of, parse_position, retry

from . import (
    MAX_NAME,
    SSE,
    Answer,
    Cancel,
    CloseThread,
    Dialect,
    Doc,
    DropTrigger,
    FeedForm,
    Framing,
    Intent,
    ListAgents,
    ListRuns,
    ListThreads,
    OpenThread,
    Pause,
    Request,
    Route,
    SetTrigger,
    Show,
    ShowThread,
    Start,
    Tell,
    Watch,
    WatchFeed,
    know_query,
    negotiate,
    read_body,
    see_name,
    types_of,
)

RETRY = 2_000  # milliseconds before an EventSource comes back; its own default is 3 s or more
MAX_KEY = 255  # characters of an Idempotency-Key
MAX_COALESCE = 10_000  # milliseconds
MAX_TIMEOUT = 86_400  # seconds
MAX_RUNS = 1_000  # in one answer
ENDS = frozenset({RunStarted, RunFinished, InputRequested, InputReceived, InputWithdrawn})
ALWAYS = frozenset({RunFinished, Gap})  # pass every filter: an end must be seen, and so must a hole

LF, CR = b"\n\r"
_FRAMES = {kind: frame_of(name.encode()) for kind, name in TYPE_NAMES.items()}


@attrs.frozen
class NativeEncoder:
    """Events as their own JSON; with `types`, only those and the ones that always pass."""

    types: frozenset[type[AnyEvent]] | None
    _json: bytearray = attrs.field(factory=bytearray, init=False)  # a new one each costs a third

    def feed(self, event: AnyEvent) -> tuple[bytes, ...]:
        """Make the one frame of an event, or none where it is filtered out."""
        kind, data = type(event), self._json
        if self.types is not None and kind not in self.types and kind not in ALWAYS:
            return ()
        encode_event_into(event, data)
        if LF in data or CR in data:  # there is JSON in it that somebody else has formatted
            return (encode(bytes(data), event=TYPE_NAMES[kind], id=str(event.seq)),)
        return (_FRAMES[kind] % (event.seq, data),)


@attrs.frozen
class _FeedFilter:
    """What a reader of a feed wants.

    Attributes:
        types: None for all of them.
        watch: Child runs of which it wants all; of others it gets the beginning and the end.
            `*` stands for every one.
    """

    types: frozenset[type[AnyEvent]] | None = None
    watch: frozenset[str] = frozenset()


@attrs.frozen
class NativeFeedEncoder:
    """The same frames with the feed's ids; what child runs say only for those who watch them."""

    filter: _FeedFilter

    def feed(self, event: AnyEvent, id: str) -> tuple[bytes, ...]:
        """Make the one frame of an event, or none where it is filtered out."""
        kind, wanted = type(event), self.filter
        if wanted.types is not None and kind not in wanted.types and kind not in ALWAYS:
            return ()
        is_watched = "*" in wanted.watch or event.run_id in wanted.watch
        if event.path and not is_watched and kind not in ENDS:
            return ()
        return (encode(encode_event(event), event=TYPE_NAMES[kind], id=id or None),)


# Bodies -------------------------------------------------------------------------------------------

_Name: TypeAlias = Annotated[
    str, Meta(extra_json_schema={"maxLength": MAX_NAME, "pattern": "^[^/]+$"})
]
_NewName: TypeAlias = Annotated[
    str, Meta(extra_json_schema={"maxLength": MAX_NAME, "pattern": "^[^/]*$"})
]
_Policy: TypeAlias = Annotated[
    str,
    Meta(extra_json_schema={"pattern": "^(cancel|continue|grace(:[0-9]{1,7})?)$"}),
]


def _bounded(least: float, most: float) -> dict[str, float]:
    return {"minimum": least, "maximum": most}


class _StartBody(msgspec.Struct, forbid_unknown_fields=True):
    """How a run is to go.

    Attributes:
        input: What the agent is given, whatever it is made for.
        thread_id: The thread it is to be part of; a new id begins one. 1 to 200 printable
            characters, none of them a slash.
        on_disconnect: What leaving the stream means for the run: `cancel`, `continue`, `grace` or
            `grace:SECONDS`, which is a time to come back in.
        coalesce_ms: Text may wait so long for more of it. Less is livelier, more is cheaper.
        timeout_s: The run is cancelled when it takes longer.
        metadata: Yours; it is shown with the run.
        background: Leave the run to itself, and answer at once.
        if_busy: What is to happen where another run of the thread goes on.
    """

    input: Any = None
    thread_id: _Name | None = None
    on_disconnect: _Policy | None = None
    coalesce_ms: Annotated[float, Meta(extra_json_schema=_bounded(0, MAX_COALESCE))] | None = None
    timeout_s: Annotated[float, Meta(extra_json_schema=_bounded(0, MAX_TIMEOUT))] | None = None
    metadata: Any = None
    background: bool = False
    if_busy: Literal["reject", "enqueue"] = "reject"


class _CancelBody(msgspec.Struct, forbid_unknown_fields=True):
    """How a run is to be cancelled.

    Attributes:
        reason: It is shown with the run.
        mode: At once, or when the step that it is in is done.
    """

    reason: str | None = None
    mode: Literal["now", "after_step"] = "now"


class _InputBody(msgspec.Struct, forbid_unknown_fields=True):
    """Answers to what a run asks.

    Attributes:
        answers: By question id: text for `text`, an option's id for `choice`, a list of them for
            `choices`, true or false for `confirm`.
        request_id: Of the `input_requested`; it may be left out where one thing is asked.
    """

    answers: dict[str, Any]
    request_id: str | None = None


class _MessageBody(msgspec.Struct, forbid_unknown_fields=True):
    """What is said to a run, or to a thread.

    Attributes:
        mode: A run hears it after the round of tools that it is in (`steer`), or when it would have
            ended (`follow_up`).
    """

    text: Annotated[str, Meta(extra_json_schema={"minLength": 1})]
    mode: Literal["steer", "follow_up"] = "steer"


class _PauseBody(msgspec.Struct, forbid_unknown_fields=True):
    """Why a run is to rest.

    Attributes:
        reason: It is shown with the run.
    """

    reason: str | None = None


class _ThreadBody(msgspec.Struct, forbid_unknown_fields=True):
    """What a thread is to be.

    Attributes:
        id: A new one; without it the server makes one up. At most 200 printable characters, none
            of them a slash.
        agent: Who runs when the thread is told something.
        metadata: Yours; it is shown with the thread.
    """

    id: _NewName | None = None
    agent: str | None = None
    metadata: Any = None


class _TriggerBody(msgspec.Struct, forbid_unknown_fields=True):
    """What a thread is to be told, and how often.

    Attributes:
        every_s: The interval.
        text: What the thread is told.
        name: For people.
        active: Otherwise it is there, and does nothing.
    """

    every_s: Annotated[float, Meta(extra_json_schema=_bounded(1, 366 * 24 * 3600))]
    text: Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": 16 * 1024})]
    name: str | None = None
    active: bool = True


class _Tool(msgspec.Struct):
    """What an agent can use."""

    name: str
    description: str


class _Agent(msgspec.Struct):
    """What can be run.

    Attributes:
        model: The `PROVIDER:MODEL` that it runs on; null where it is a function.
        on_disconnect: What leaving a stream means where the request does not say.
    """

    name: str
    description: str
    model: str | None
    on_disconnect: str | None
    tools: list[_Tool]


class _Agents(msgspec.Struct):
    """All agents of the server."""

    agents: list[_Agent]


class _Runs(msgspec.Struct):
    """Runs, the newest first."""

    runs: list[RunSnapshot]


class _Threads(msgspec.Struct):
    """Threads, the newest first."""

    threads: list[ThreadSnapshot]


# Requests -----------------------------------------------------------------------------------------


def decode_start(request: Request) -> Intent:
    """`POST /agents/{agent}/runs`."""
    body = read_body(request, _StartBody, what="start a run with")
    for name, value, most in (
        ("coalesce_ms", body.coalesce_ms, MAX_COALESCE),
        ("timeout_s", body.timeout_s, MAX_TIMEOUT),
    ):
        if value is not None and not 0 <= value <= most:
            raise BadRequest(f"{name}: expected a number from 0 to {most}, got {value}")
    if body.thread_id is not None:
        see_name(body.thread_id, "thread_id")
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
    know_query(request.query, "after", "types", "dialect")
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
        options=None if types is None else types_of(types),
        headers_only=request.method == "HEAD",
    )


def decode_cancel(request: Request) -> Intent:
    """`POST /runs/{id}/cancel`."""
    body = read_body(request, _CancelBody, what="cancel with")
    return Cancel(run_id=request.parameters["run_id"], reason=body.reason, mode=body.mode)


def decode_input(request: Request) -> Intent:
    """`POST /runs/{id}/input`."""
    body = read_body(request, _InputBody, what="answer with")
    return Answer(
        run_id=request.parameters["run_id"], answers=body.answers, request_id=body.request_id
    )


def decode_show(request: Request) -> Intent:
    """`GET /runs/{id}`."""
    know_query(request.query)
    return Show(run_id=request.parameters["run_id"])


def decode_list_runs(request: Request) -> Intent:
    """`GET /runs`."""
    know_query(request.query, "state", "limit")
    limit = request.query.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 0 < int(limit) <= MAX_RUNS):
        raise BadRequest(f"limit: expected a number from 1 to {MAX_RUNS}, got {limit[:20]!r}")
    state = request.query.get("state")
    states = get_args(RunState)
    if state is not None and state not in states:
        raise BadRequest(f"state: expected one of {', '.join(states)}, got {state[:20]!r}")
    return ListRuns(state=state, limit=int(limit))


def decode_messages(request: Request) -> Intent:
    """`POST /runs/{id}/messages`, and the same of a thread."""
    body = read_body(request, _MessageBody, what="say")
    if not body.text:
        raise BadRequest("text: expected something to say, got an empty string")
    return Tell(
        run_id=request.parameters.get("run_id"),
        thread_id=request.parameters.get("thread_id"),
        text=body.text,
        mode=body.mode,
    )


def decode_pause(request: Request) -> Intent:
    """`POST /runs/{id}/pause`."""
    body = read_body(request, _PauseBody, what="pause with")
    return Pause(run_id=request.parameters["run_id"], reason=body.reason)


def decode_resume(request: Request) -> Intent:
    """`POST /runs/{id}/resume`."""
    return Pause(run_id=request.parameters["run_id"], resume=True)


def decode_watch_feed(request: Request) -> Intent:
    """`GET /events` and `GET /threads/{id}/events`, and HEAD."""
    know_query(request.query, "after", "types", "watch")
    negotiate(request.headers.get("accept", "*/*"), only="stream")
    types, watch = request.query.get("types"), request.query.get("watch", "")
    return WatchFeed(
        thread_id=request.parameters.get("thread_id"),
        after=request.headers.get("last-event-id") or request.query.get("after") or None,
        options=_FeedFilter(
            types=None if types is None else types_of(types),
            watch=frozenset(name.strip() for name in watch.split(",") if name.strip()),
        ),
        headers_only=request.method == "HEAD",
    )


def decode_open_thread(request: Request) -> Intent:
    """`POST /threads`."""
    body = read_body(request, _ThreadBody, what="open a thread with")
    return OpenThread(thread_id=body.id, agent=body.agent, metadata=body.metadata)


def decode_list_threads(request: Request) -> Intent:
    """`GET /threads`."""
    know_query(request.query)
    return ListThreads()


def decode_show_thread(request: Request) -> Intent:
    """`GET /threads/{id}`."""
    know_query(request.query)
    return ShowThread(thread_id=request.parameters["thread_id"])


def decode_close_thread(request: Request) -> Intent:
    """`DELETE /threads/{id}`."""
    return CloseThread(thread_id=request.parameters["thread_id"])


def decode_set_trigger(request: Request) -> Intent:
    """`PUT /threads/{id}/triggers/{trigger}`."""
    body = read_body(request, _TriggerBody, what="set a trigger with")
    return SetTrigger(
        thread_id=request.parameters["thread_id"],
        trigger_id=request.parameters["trigger_id"],
        every=body.every_s,
        text=body.text,
        name=body.name,
        is_active=body.active,
    )


def decode_drop_trigger(request: Request) -> Intent:
    """`DELETE /threads/{id}/triggers/{trigger}`."""
    return DropTrigger(
        thread_id=request.parameters["thread_id"], trigger_id=request.parameters["trigger_id"]
    )


def decode_list_agents(request: Request) -> Intent:
    """`GET /agents`."""
    know_query(request.query)
    return ListAgents()


def _prefers_async(headers: Mapping[str, str]) -> bool:
    preferences = headers.get("prefer", "").split(",")
    return any(item.split(";")[0].strip().lower() == "respond-async" for item in preferences)


def _encoder(options: Hashable) -> NativeEncoder:
    return NativeEncoder(options)  # type: ignore[arg-type]  # what decode_watch made


def _feed_encoder(options: Hashable) -> NativeFeedEncoder:
    return NativeFeedEncoder(options)  # type: ignore[arg-type]  # what decode_watch_feed made


def _present(snapshot: RunSnapshot) -> bytes:
    return msgspec.json.encode(snapshot)


# The dialect --------------------------------------------------------------------------------------

_TYPES: Any = Annotated[
    list[Annotated[str, Meta(extra_json_schema={"enum": list(EVENT_TYPES)})]],
    Meta(
        min_length=1,
        description="Only events of these types; `run_finished` and `gap` come in any case.",
    ),
]
_STATE: Any = Annotated[RunState, Meta(description="Only runs that stand so.")]
_LIMIT: Any = Annotated[
    int, Meta(ge=1, le=MAX_RUNS, description="How many at most; 100 if unsaid.")
]
_AFTER: Any = Annotated[
    str,
    Meta(
        pattern="^(0|[1-9][0-9]{0,14}([.][1-9][0-9]{0,14})?)$",
        description="The id of the last frame that was read, like Last-Event-ID.",
    ),
]
_WATCH: Any = Annotated[
    list[str], Meta(description="Ids of child runs of which all is shown; `*` for every one.")
]
_FEED: Final[Mapping[str, Any]] = {
    "after": "The id of the last frame that was read, like Last-Event-ID; `now` for what comes.",
    "types": _TYPES,
    "watch": _WATCH,
}
_RUN: Final[Mapping[int, tuple[Any, ...]]] = {200: (RunSnapshot,)}
_THREAD: Final[Mapping[int, tuple[Any, ...]]] = {200: (ThreadSnapshot,)}

NATIVE = Dialect(
    name="native",
    mount="/",
    routes=(
        Route(
            "GET",
            "/agents",
            decode_list_agents,
            doc=Doc(summary="List what can be run", answers={200: (_Agents,)}),
        ),
        Route(
            "POST",
            "/agents/<agent>/runs",
            decode_start,
            doc=Doc(
                summary="Start a run; stream it, wait for its end, or leave it to itself",
                body=Annotated[_StartBody, Meta(examples=[{"input": "Hello"}])],
                answers={200: (SSE, RunSnapshot), 202: (RunSnapshot,)},
            ),
        ),
        Route(
            "GET",
            "/runs",
            decode_list_runs,
            doc=Doc(
                summary="List the runs that go on or are kept",
                query={"state": _STATE, "limit": _LIMIT},
                answers={200: (_Runs,)},
            ),
        ),
        Route("GET", "/runs/<run_id>", decode_show, doc=Doc(summary="Show a run", answers=_RUN)),
        Route(
            "GET",
            "/runs/<run_id>/events",
            decode_watch,
            doc=Doc(
                summary="Stream a run's events, those there were first",
                query={
                    "after": _AFTER,
                    "types": _TYPES,
                    "dialect": "The protocol in whose frames to stream; without `types`.",
                },
                answers={200: (SSE,)},
            ),
        ),
        Route(
            "POST",
            "/runs/<run_id>/cancel",
            decode_cancel,
            doc=Doc(
                summary="Cancel a run, and wait until it is gone",
                body=_CancelBody,
                answers={**_RUN, 202: (RunSnapshot,)},
            ),
        ),
        Route(
            "POST",
            "/runs/<run_id>/input",
            decode_input,
            doc=Doc(summary="Answer what a run asks", body=_InputBody, answers=_RUN),
        ),
        Route(
            "POST",
            "/runs/<run_id>/messages",
            decode_messages,
            doc=Doc(
                summary="Say something to a run that goes on",
                body=_MessageBody,
                answers={202: (RunSnapshot,)},
            ),
        ),
        Route(
            "POST",
            "/runs/<run_id>/pause",
            decode_pause,
            doc=Doc(summary="Let a run rest before its next step", body=_PauseBody, answers=_RUN),
        ),
        Route(
            "POST",
            "/runs/<run_id>/resume",
            decode_resume,
            doc=Doc(summary="Let a run that rests go on", answers=_RUN),
        ),
        Route(
            "GET",
            "/events",
            decode_watch_feed,
            doc=Doc(
                summary="Stream what happens on the server", query=_FEED, answers={200: (SSE,)}
            ),
        ),
        Route(
            "GET",
            "/threads",
            decode_list_threads,
            doc=Doc(summary="List the threads", answers={200: (_Threads,)}),
        ),
        Route(
            "POST",
            "/threads",
            decode_open_thread,
            doc=Doc(
                summary="Open a thread that stays until it is closed",
                body=_ThreadBody,
                answers={201: (ThreadSnapshot,)},
            ),
        ),
        Route(
            "GET",
            "/threads/<thread_id>",
            decode_show_thread,
            doc=Doc(summary="Show a thread", answers=_THREAD),
        ),
        Route(
            "DELETE",
            "/threads/<thread_id>",
            decode_close_thread,
            doc=Doc(
                summary="Cancel what goes on in a thread, and forget it",
                answers={**_THREAD, 202: (ThreadSnapshot,)},
            ),
        ),
        Route(
            "GET",
            "/threads/<thread_id>/events",
            decode_watch_feed,
            doc=Doc(summary="Stream what happens in a thread", query=_FEED, answers={200: (SSE,)}),
        ),
        Route(
            "POST",
            "/threads/<thread_id>/messages",
            decode_messages,
            doc=Doc(
                summary="Say something to a thread: an answer, a message, or the input of a run",
                body=_MessageBody,
                answers={202: (ThreadSnapshot,)},
            ),
        ),
        Route(
            "PUT",
            "/threads/<thread_id>/triggers/<trigger_id>",
            decode_set_trigger,
            doc=Doc(
                summary="Have a thread told something at an interval",
                body=_TriggerBody,
                answers=_THREAD,
            ),
        ),
        Route(
            "DELETE",
            "/threads/<thread_id>/triggers/<trigger_id>",
            decode_drop_trigger,
            doc=Doc(summary="Take a trigger out of its thread", answers=_THREAD),
        ),
    ),
    encoder=_encoder,
    feed=FeedForm(encoder=_feed_encoder, plain=frozenset({_FeedFilter()})),
    present=_present,
    framing=Framing(
        prelude=retry(RETRY) + comment("agentsse"), heartbeat=comment(), farewell=retry
    ),
    on_disconnect="cancel",
    locate=lambda mount, run, *_: {"Location": f"{mount}/runs/{run}/events"},
)
