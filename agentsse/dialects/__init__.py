"""What a client protocol is: routes in, frames out, and nothing in between.

Knows: requests and the few things that any protocol can ask for. Must never know runs, logs or
sockets, nor which dialects there are. A dialect is one value in one file: its routes as data, each
with a pure `decode`, and an `Encoder`. The server is one loop over those values and never names
one.

A run is read from its log, event by event, each encoded once however many read it: `Encoder`. A
thread, or the whole server, is read from a feed, which forgets: `FeedEncoder`.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import attrs
import msgspec
from msgspec import Struct

from agentsse.errors import BadRequest, NotAcceptable
from agentsse.events import (
    EVENT_TYPES,
    AnyEvent,
    Problem,
    RunSnapshot,
    ThreadSnapshot,
)
from agentsse.messages import Message, ToolSpec

SSE = "text/event-stream; charset=utf-8"
JSON = "application/json"

Body = TypeVar("Body", bound=msgspec.Struct)


class Request(Struct, frozen=True):
    """What a decoder gets to see of an HTTP request.

    Attributes:
        method: In capitals.
        parameters: What stands in the path's `<name>` places.
        query: The query string's fields; of a repeated one, the first.
        pairs: The same with repeated ones, as they came.
        headers: By lower-case name.
        body: As it came, within the limit.
    """

    method: str
    parameters: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""
    pairs: tuple[tuple[str, str], ...] = ()


class Reply(Struct, frozen=True):
    """A whole response that is no stream."""

    body: bytes
    status: int = 200
    media_type: str = JSON
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)


class ReplyWithHistory(Struct, frozen=True):
    """Makes the answer out of a run as it stands, its events, and what was said before. Pure."""

    make: Callable[[RunSnapshot, Sequence[AnyEvent], Sequence[Message]], Reply]


RunReply: TypeAlias = Callable[[RunSnapshot, Sequence[AnyEvent]], Reply] | ReplyWithHistory
"""Makes the answer out of a run as it stands and all its events. Pure."""

ThreadReply: TypeAlias = Callable[[ThreadSnapshot, Sequence[AnyEvent]], Reply]
"""Makes the answer out of a thread as it stands and what its feed still holds. Pure."""

ConversationReply: TypeAlias = Callable[
    [ThreadSnapshot, RunSnapshot | None, Sequence[AnyEvent], Sequence[Message]], Reply
]
"""Makes the answer out of a thread as it stands, its current run with all its events, and what was
said in the thread before that run. Pure."""

Place: TypeAlias = tuple[int, int]
"""An event of a run, and a frame of it; `(0, 0)` is before all of them, `(7, 0)` behind the 7th."""


class AgentCard(Struct, frozen=True, kw_only=True):
    """What clients may know of an agent."""

    name: str
    description: str
    model: str | None
    on_disconnect: str | None
    tools: tuple[ToolSpec, ...]


@attrs.frozen(kw_only=True)
class Framing:
    """What stands around and between the frames of a stream.

    Attributes:
        prelude: First bytes of the stream, sent at once.
        heartbeat: Bytes that mean nothing, for a line that is silent; None where it has none.
        farewell: Frames before the end of a stream whose run goes on, given the milliseconds after
            which the client should come back; None where clients do not, and a stream has to last.
        ends_at: Events behind which a response ends although the run goes on: the next request
            opens another one.
        headers: What its responses have beside those of every stream.
    """

    media_type: str = SSE
    prelude: bytes = b""
    heartbeat: bytes | None = None
    farewell: Callable[[int], bytes] | None = None
    ends_at: frozenset[type[AnyEvent]] = frozenset()
    headers: Mapping[str, str] = attrs.field(factory=dict)


# What can be asked for ----------------------------------------------------------------------------


class Start(Struct, frozen=True, kw_only=True):
    """Start a run, and stream it, wait for its end, or leave it to itself.

    Attributes:
        agent: Its name; None where the one of the thread, else the one that the dialect or the
            server is set to, will do.
        otherwise: Further names, the first that there is counts. An agent is also found by the
            `PROVIDER:MODEL` it runs on.
        delivery: How the answer comes.
        on_disconnect: The policy that the client asked for; None for the default.
        run_id: Where the client names the run; it must be new.
        rejoins: Otherwise the response is the stream of the run of that id, from its beginning.
        shown: Begin with a `message_received` that shows this.
        must_exist: Refuse a thread that nobody has used yet.
        makes_thread: Without a `thread_id`, begin a thread: its id is the run's.
        continues: The run that the client has last heard of in the conversation: the thread is
            that run's, and the history is what that run was told and what was said in it. Where it
            still waits for a person, the input is the answer.
        resumes: Where the thread's run waits for a person, the input is the answer, and the
            response goes on with that run.
        answers: What the thread's run asks is answered by this, by request id, or under `""` where
            one thing is asked, and the response goes on with that run; None declines. It is a
            conflict where nothing is asked.
        history: What was said before, as the client tells it; None for what the thread knows.
        said: What a model agent is told now, such as tools' answers; None for the input.
        tools: The client's own: a model agent may call them as well, and the run is over where it
            does, for the client to go on with what they answer.
        instructions: What a model agent is told first, instead of its own.
        uses_tools: Otherwise a model agent has none in this run.
        coalesce: Seconds; None for the server's.
        timeout: Seconds the run may take; None for the agent's or the server's.
        if_busy: Where the thread has a run that goes on. `supersede` cancels what nobody watches
            and waits for it to be gone; what somebody watches, or is to `continue`, is a conflict.
        fingerprint: Of the body: the same idempotency key must come with the same one.
        options: What the dialect's encoder is made with.
        framing: Of this stream; None for the dialect's.
        reply: Makes the answer where it is no stream; None for the dialect's own `present`.
    """

    agent: str | None
    input: Any
    delivery: Literal["stream", "wait", "background"]
    otherwise: tuple[str, ...] = ()
    on_disconnect: str | None = None
    run_id: str | None = None
    thread_id: str | None = None
    shown: str | None = None
    must_exist: bool = False
    makes_thread: bool = False
    rejoins: bool = False
    continues: str | None = None
    resumes: bool = False
    answers: Mapping[str, Any] | None = None
    history: tuple[Message, ...] | None = None
    said: tuple[Message, ...] | None = None
    tools: tuple[ToolSpec, ...] = ()
    instructions: str | None = None
    uses_tools: bool = True
    coalesce: float | None = None
    timeout: float | None = None
    metadata: Any = None
    if_busy: Literal["reject", "enqueue", "supersede"] = "reject"
    idempotency_key: str | None = None
    fingerprint: bytes = b""
    options: Hashable = None
    framing: Framing | None = None
    reply: RunReply | None = None


class Watch(Struct, frozen=True, kw_only=True):
    """Stream a run's events from a place on.

    Attributes:
        run_id: None for the last run of the thread that goes on or waits for its turn, else the
            last one that is over, if nobody has read it to its end and it was not left; where there
            is none, the answer is 204.
        thread_id: Beside a `run_id` it is a thread that the run must be of.
        after: Behind which place to begin, or how to find it in the events so far. Pure.
        goes_on: Past questions that have been answered; otherwise a stream in a framing that ends
            at questions ends at the first one behind the place.
        on_disconnect: What it means if this client is the last to leave; None for what the run
            says.
        dialect: In whose frames; None for the one that was asked.
        headers_only: HEAD: answer like the stream, and end.
    """

    run_id: str | None
    thread_id: str | None = None
    after: Place | Callable[[Sequence[AnyEvent]], Place] = (0, 0)
    goes_on: bool = False
    on_disconnect: str | None = None
    dialect: str | None = None
    options: Hashable = None
    framing: Framing | None = None
    headers_only: bool = False


class WatchFeed(Struct, frozen=True, kw_only=True):
    """Stream what happens in a thread, or on the whole server.

    Attributes:
        thread_id: None for the server.
        after: The id of the last frame that the client has seen; None to begin with what the feed
            still holds, `now` to begin with what comes.
        must_exist: Refuse a thread that nobody has used yet.
    """

    thread_id: str | None = None
    after: str | None = None
    must_exist: bool = False
    options: Hashable = None
    headers_only: bool = False


class Cancel(Struct, frozen=True, kw_only=True):
    """Cancel a run, or whatever goes on in a thread, and wait until it is gone.

    Attributes:
        run_id, thread_id: Of both given, the run must be of the thread.
        waits: Otherwise the answer comes at once.
        forgets: Keep nothing of the run once it is gone.
        reply: Makes the answer; `reply_if_over` where the run was over already.
        reply_if_idle: The answer where nothing goes on in the thread; otherwise that is a conflict.
        must_exist: Otherwise a thread that nobody has used is one where nothing goes on.
    """

    run_id: str | None = None
    thread_id: str | None = None
    reason: str | None = None
    mode: Literal["now", "after_step"] = "now"
    waits: bool = True
    forgets: bool = False
    reply: RunReply | None = None
    reply_if_over: RunReply | None = None
    reply_if_idle: Reply | None = None
    must_exist: bool = True


class Answer(Struct, frozen=True, kw_only=True):
    """Answer what a run asks; `request_id` may be left out where it asks one thing only.

    Attributes:
        is_loose: The client does not know what kinds of questions there are: `"yes"` will do for a
            confirmation, a label for an option, and some of the answers may come later.
    """

    run_id: str
    answers: Mapping[str, Any]
    request_id: str | None = None
    is_loose: bool = False
    reply: RunReply | None = None


class Tell(Struct, frozen=True, kw_only=True):
    """Say something to a run that goes on, or to a thread.

    A run hears it after the round of tools that it is in (`steer`), or when it would have ended
    (`follow_up`). A thread's run that waits for a person takes it as the answer; a thread with no
    run starts one.

    Attributes:
        shown: What is shown of it in the stream; None for the text.
        reply: Makes the answer where a run was told; None for the dialect's own `present`.
        thread_reply: The same where a thread was.
    """

    text: str
    run_id: str | None = None
    thread_id: str | None = None
    mode: Literal["steer", "follow_up"] = "steer"
    shown: str | None = None
    must_exist: bool = False
    reply: RunReply | None = None
    thread_reply: ThreadReply | None = None


class Pause(Struct, frozen=True, kw_only=True):
    """Let a run, or what goes on in a thread, rest before its next step; `resume`: let it go on."""

    run_id: str | None = None
    thread_id: str | None = None
    resume: bool = False
    reason: str | None = None
    reply: RunReply | None = None


class Show(Struct, frozen=True, kw_only=True):
    """Show a run as it stands.

    Attributes:
        thread_id: A thread that the run must be of.
        waits: Until it is over, or waits for a person; meanwhile the client holds it like a stream.
        on_disconnect: What it means if this client is the last to leave; None for what the run
            says.
    """

    run_id: str
    thread_id: str | None = None
    waits: bool = False
    on_disconnect: str | None = None
    reply: RunReply | None = None


class ListRuns(Struct, frozen=True, kw_only=True):
    """List the runs that are going on or retained, the newest first.

    Attributes:
        thread_id: Only those of this thread, which must be there.
    """

    thread_id: str | None = None
    state: str | None = None
    limit: int = 100
    reply: Callable[[Sequence[RunSnapshot]], Reply] | None = None


class ListAgents(Struct, frozen=True, kw_only=True):
    """List what can be run."""

    reply: Callable[[Sequence[AgentCard]], Reply] | None = None


class OpenThread(Struct, frozen=True, kw_only=True):
    """Begin a thread that stays until it is closed, whether anything runs in it or not.

    Attributes:
        agent: Who runs when the thread is told something; None for the default.
        is_shared: A thread of that id may be there already; otherwise that is a conflict.
        lasts: Otherwise it makes room for new ones when it is the oldest in which nothing goes on.
    """

    thread_id: str | None = None
    agent: str | None = None
    metadata: Any = None
    is_shared: bool = False
    lasts: bool = True
    reply: ThreadReply | None = None


class ShowThread(Struct, frozen=True, kw_only=True):
    """Show a thread as it stands, by either kind of reply."""

    thread_id: str
    reply: ThreadReply | None = None
    conversation_reply: ConversationReply | None = None


class ListThreads(Struct, frozen=True, kw_only=True):
    """List the threads there are, the newest first."""

    reply: Callable[[Sequence[ThreadSnapshot]], Reply] | None = None


class CloseThread(Struct, frozen=True, kw_only=True):
    """Cancel what goes on in a thread, wait until it is gone, and forget the thread."""

    thread_id: str
    reply: ThreadReply | None = None


class SetTrigger(Struct, frozen=True, kw_only=True):
    """Have a thread told something at an interval; one of the same id is replaced.

    Attributes:
        every: Seconds.
        is_active: Otherwise it is there, and does nothing until it is activated.
    """

    thread_id: str
    trigger_id: str
    every: float
    text: str
    name: str | None = None
    is_active: bool = True
    reply: ThreadReply | None = None


class DropTrigger(Struct, frozen=True, kw_only=True):
    """Take a trigger out of its thread."""

    thread_id: str
    trigger_id: str
    reply: ThreadReply | None = None


Intent: TypeAlias = (
    Start
    | Watch
    | WatchFeed
    | Cancel
    | Answer
    | Tell
    | Pause
    | Show
    | ListRuns
    | ListAgents
    | OpenThread
    | ShowThread
    | ListThreads
    | CloseThread
    | SetTrigger
    | DropTrigger
)


# What a dialect is --------------------------------------------------------------------------------


class Encoder(Protocol):
    """The pure machine of a dialect: events in, frames out; no await, no clock."""

    def feed(self, event: AnyEvent, /) -> Iterable[bytes]:
        """Turn one event into its frames, in order; none is an answer too."""


@runtime_checkable
class RecallingEncoder(Encoder, Protocol):
    """One whose frames also show what was said before the run."""

    def recall(self, said: Sequence[Message], /) -> None:
        """Take that, before the first event."""


class FeedEncoder(Protocol):
    """The same for a feed, whose events come from many runs and carry ids of the feed's own."""

    def feed(self, event: AnyEvent, id: str, /) -> Sequence[bytes]:
        """Turn one event into its frames, in order; none where it is not for this reader.

        Of several frames the last one has `id`, those before it `<id>.1`, `<id>.2` and so on. A
        `Gap` has an empty id. What a child run said has a `path`.
        """


@attrs.frozen(kw_only=True)
class FeedForm:
    """How a dialect shows a feed.

    Attributes:
        encoder: Makes the machine for one way of reading (a `WatchFeed`'s options).
        greeting: First frames for everybody who comes: of a thread, its state. None of the server.
        replay: Of the events that the feed holds, the places of those that somebody who comes for
            the first time is given; None for all of them.
        plain: The options of those who want nothing in particular.
    """

    encoder: Callable[[Hashable], FeedEncoder]
    greeting: Callable[[ThreadSnapshot | None, Hashable], bytes] = lambda _thread, _options: b""
    replay: Callable[[Sequence[AnyEvent], Hashable], Collection[int]] | None = None
    plain: frozenset[Hashable] = frozenset({None})


def problem_json(problem: Problem) -> bytes:
    """Write an error as RFC 9457 has it; `code` is an extension member."""
    return msgspec.json.encode(
        {
            "type": "about:blank",
            "title": problem.code.replace("_", " ").capitalize(),
            "status": problem.status,
            "detail": problem.message,
            "code": problem.code,
        }
    )


def problem_reply(problem: Problem) -> Reply:
    """Answer with an error as RFC 9457 has it."""
    status = problem.status if 400 <= problem.status < 600 else 500
    return Reply(problem_json(problem), status, "application/problem+json")


Shape: TypeAlias = Any
"""A JSON body by its type (unions and `Annotated` too), or any other, a str, by its media type."""


@attrs.frozen(kw_only=True)
class Doc:
    """What `/openapi.json` says of a route.

    Attributes:
        summary: One line.
        body: What is read, by its type; None where nothing is.
        query: The fields of the query string: what each is, in words, or by a type that says so.
        answers: Of each status but those of errors, the bodies there are; none for an empty one.
    """

    summary: str
    body: Shape = None
    query: Mapping[str, Any] = attrs.field(factory=dict)
    answers: Mapping[int, tuple[Shape, ...]] = attrs.field(factory=lambda: {200: (dict,)})


@attrs.frozen
class Route:
    """A path, and what a request to it asks for.

    Attributes:
        path: Below the dialect's mount; `<name>` stands for one segment.
        decode: Pure; raises `AgentsseError` where the request makes no sense.
        is_rooted: The path is not below the mount but where it says.
        doc: None where nobody is told of it.
    """

    method: str
    path: str
    decode: Callable[[Request], Intent]
    is_rooted: bool = attrs.field(default=False, kw_only=True)
    doc: Doc | None = attrs.field(default=None, kw_only=True)


@attrs.frozen(kw_only=True)
class Dialect:
    """A client protocol.

    Attributes:
        mount: The prefix of its routes, `/` for none.
        encoder: Makes the machine for one way of reading (a `Start`'s or `Watch`'s options).
        present: A run as a JSON body, where an intent has no `reply` of its own.
        framing: Of its streams, where an intent has none of its own.
        feed: How it shows feeds; None where it has none.
        on_disconnect: What leaving a stream means unless the run says otherwise.
        agent: Who runs where a request names nobody; None for the server's first one.
        locate: Headers that tell where a run is, given the mount without a slash at its end, the
            run's id, its thread's, and the options.
        problem: An error as a response.
        max_body: Bytes that may be posted, where that is more than the server's limit.
        forms: Older or newer forms of it that the config may choose instead, by name.
    """

    name: str
    mount: str
    routes: tuple[Route, ...]
    encoder: Callable[[Hashable], Encoder]
    present: Callable[[RunSnapshot], bytes]
    framing: Framing = Framing()
    feed: FeedForm | None = None
    on_disconnect: str = "cancel"
    agent: str | None = None
    locate: Callable[[str, str, str | None, Hashable], Mapping[str, str]] = lambda *_: {}
    problem: Callable[[Problem], Reply] = problem_reply
    max_body: int | None = None
    forms: Mapping[str, "Dialect"] = attrs.field(factory=dict)

    def path(self, route: Route) -> str:
        """Where a route of it is."""
        return route.path if route.is_rooted else self.mount.rstrip("/") + route.path

    @property
    def prefixes(self) -> frozenset[str]:
        """What its paths begin with: whole segments, up to the first one that may be anything."""
        return frozenset(self.path(route).partition("/<")[0] for route in self.routes)

    def load(self) -> "Dialect":
        """Give itself: it is here."""
        return self


@attrs.frozen(kw_only=True)
class LazyDialect:
    """A dialect whose module is imported when somebody asks for a path of it.

    Until then this is known of it, enough to tell whose a path is: most servers are asked in one or
    two dialects, and all of them would take a sixth of the time to start, and 4 MB.

    Attributes:
        place: Where it is, `module:NAME`.
        mount: The prefix of its routes: its own, or another one.
        below: What all of its paths begin with, below the mount; `""` where they may be anything.
        rooted: The same of those that are not below the mount.
        agent: Who runs where a request names nobody; None for who it says itself.
    """

    name: str
    place: str
    mount: str
    below: tuple[str, ...] = ("",)
    rooted: tuple[str, ...] = ()
    agent: str | None = None

    @property
    def prefixes(self) -> frozenset[str]:
        """What its paths begin with, in whole segments."""
        mount = self.mount.rstrip("/")
        return frozenset(mount + each for each in self.below).union(self.rooted)

    def load(self) -> Dialect:
        """Import it; later it is there already."""
        module, _, name = self.place.partition(":")
        dialect: Dialect = getattr(import_module(module), name)
        return attrs.evolve(dialect, mount=self.mount, agent=self.agent or dialect.agent)


AnyDialect: TypeAlias = Dialect | LazyDialect


# What decoders share ------------------------------------------------------------------------------


def read_body(request: Request, shape: type[Body], *, what: str) -> Body:
    """Read the body as JSON, whatever Content-Type says: `curl -d` says form.

    Args:
        request: An empty body stands for an empty object.
        shape: What it should be.
        what: The end of `expected a JSON object to …`.

    Raises:
        BadRequest: It is something else.
    """
    fields = ", ".join(shape.__struct_encode_fields__)
    _see_structure(request.body)
    try:
        return msgspec.json.decode(request.body or b"{}", type=shape)
    except msgspec.ValidationError as error:
        raise BadRequest(f"expected a JSON object to {what} ({fields}): {error}") from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise BadRequest(
            f"expected JSON to {what} ({fields}), got {request.body[:40]!r}: {error}"
        ) from error


MAX_PLAIN = 1024 * 1024  # bytes of a request that may hold anything
MAX_HISTORY = 32 * 1024 * 1024  # bytes of a request that brings a whole conversation
MAX_MESSAGES = 10_000  # in one; as many as fit, 300,000 tiny ones, would stop everybody for seconds
MAX_STRUCTURE = 500_000  # brackets, or keys, in JSON; more of them stop the loop for seconds
MAX_NAME = 200  # characters of an id that a client gives


def _see_structure(body: bytes) -> None:
    """See that a large body is large for what is said in it; raises `BadRequest`.

    Text is free: what takes time is a value of its own. It is counted in the bytes, within
    milliseconds, so that text that looks like JSON counts as well.
    """
    if len(body) <= MAX_PLAIN:
        return
    brackets, keys, commas = (
        body.count(b"[") + body.count(b"{"),
        body.count(b'":'),
        body.count(b","),
    )
    if brackets > MAX_STRUCTURE or keys > MAX_STRUCTURE or commas > 4 * MAX_STRUCTURE:
        raise BadRequest(
            f"expected at most {MAX_STRUCTURE} arrays and objects, as many fields, and four times "
            f"as many values, in a body of more than {MAX_PLAIN} bytes; got {brackets}, {keys} "
            f"and {commas}"
        )


def see_name(name: str, what: str) -> None:
    """See that an id that a client gives fits into a path; raises `BadRequest`."""
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and "/" not in name):
        raise BadRequest(
            f"{what}: expected 1 to {MAX_NAME} printable characters without '/', got {name[:40]!r}"
        )


def know_query(query: Mapping[str, str], *names: str) -> None:
    """Refuse what stands in a query and is none of these names; raises `BadRequest`."""
    unknown = sorted(set(query) - set(names))
    if unknown:
        expected = f"one of {', '.join(names)}" if names else "no query"
        raise BadRequest(f"query: expected {expected}, got {', '.join(unknown)[:80]!r}")


def types_of(text: str) -> frozenset[type[AnyEvent]]:
    """Read a list of our event types, with commas; raises `BadRequest` for one there is not."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in EVENT_TYPES]
    if unknown:
        raise BadRequest(
            f"types: expected some of {', '.join(EVENT_TYPES)}, got {', '.join(unknown)[:80]!r}"
        )
    return frozenset(EVENT_TYPES[name] for name in names)


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
