"""HTTP on one side, the engine on the other, and between them one loop over the dialects' routes.

Knows: requests, responses, streams, and what each intent of a dialect means for the engine. The
only importer of quart and quart_trio. Must never name a dialect, nor know how bytes reach the
socket: a stream writes to the connection's `Wire`.

A request holds at most one run, or one feed, by a `Lease`. It takes hold in the same sync step that
starts or finds it, and lets go in the `finally` of the connection's call, wherever that is left
from: so a client that vanishes between two steps is seen to leave like any other.
"""

import random
import re
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from types import TracebackType
from typing import Any, Protocol, Self, assert_never

import attrs
import msgspec
import trio
from quart import Response, request as current_request
from quart.wrappers.response import ResponseBody
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge

from .dialects import (
    MAX_HISTORY,
    AgentCard,
    Answer,
    Cancel,
    CloseThread,
    Dialect,
    DropTrigger,
    Encoder,
    Framing,
    Intent,
    ListAgents,
    ListRuns,
    ListThreads,
    OpenThread,
    Pause,
    RecallingEncoder,
    Reply,
    ReplyWithHistory,
    Request,
    Route,
    RunReply,
    SetTrigger,
    Show,
    ShowThread,
    Start,
    Tell,
    ThreadReply,
    Watch,
    WatchFeed,
    problem_json,
    problem_reply,
)
from .errors import (
    AgentsseError,
    BadRequest,
    ConfigError,
    Forbidden,
    Misdirected,
    NotAllowed,
    NotAsked,
    NotFound,
    Overloaded,
    TooLarge,
    redact,
)
from .events import AnyEvent, InputRequested, Problem, RunStarted, encode_event
from .feed import NOW, FeedReader
from .listener import Counts, SlowClient
from .log import MAX_WRITE, START, CloseReason, Position, Reader
from .messages import Message, ToolSpec
from .runs import TEARDOWN_BUCKETS, Policy, Run, Runs, Thread
from .sse import id_only
from .threads import Threads

MAX_LISTED = 1_000  # threads in one answer
RETRY_AFTER_ROTATION = (500, 3_000)  # milliseconds; spread, or all come back at once
_LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

LIVE, READY, METRICS = "/health/live", "/health/ready", "/metrics"
OPENAPI = "/openapi.json"

STREAM_HEADERS = {
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


@attrs.frozen
class AppOptions:
    """How the server speaks; seconds and bytes where nothing else is said.

    Attributes:
        heartbeat: Silence after which a stream says something meaningless.
        rotation: Age at which a GET stream is asked to come back, times 0.8 to 1; 0 for never.
        max_body: Of a request.
        max_history: Of one by which a client may post its history, as its dialect says.
        max_bodies: Of all requests that are being read, together.
        allowed_hosts: Names in the Host header beside those of loopback, without port.
        cancel_patience: How long a cancel request waits for the run to be gone: cleanup has 5 s.
    """

    heartbeat: float = 10.0
    rotation: float = 600.0
    max_body: int = 1024 * 1024
    max_history: int = MAX_HISTORY
    max_bodies: int = 256 * 1024 * 1024
    allowed_hosts: tuple[str, ...] = ()
    cancel_patience: float = 6.0


@attrs.define(eq=False)
class Bodies:
    """Bytes of requests that have come and not been read yet, of all connections together.

    Attributes:
        limit: How many there may be.
    """

    limit: int
    _held: Counter[object] = attrs.field(factory=Counter)
    _total: int = 0

    @property
    def is_full(self) -> bool:
        """Whether no more should be taken."""
        return self._total > self.limit

    def take(self, holder: object, size: int) -> None:
        """Count what somebody holds."""
        self._held[holder] += size
        self._total += size

    def drop(self, holder: object) -> None:
        """Count no more what somebody held."""
        self._total -= self._held.pop(holder, 0)


@attrs.define
class StreamCounts:
    """What operators want to know of streams."""

    open: int = 0
    closed: Counter[CloseReason] = attrs.field(factory=Counter)
    bytes: int = 0


class _Wire(Protocol):
    async def write(self, data: bytes | memoryview, /) -> None: ...


def _let_nothing_go(_reason: CloseReason) -> None:
    """Hold nothing."""


@attrs.define(eq=False)
class Lease:
    """What a request holds of a run or of a feed, and how its end is told.

    Attributes:
        reason: Why it ended; the first one stands.
    """

    run: Run | None = None
    reader: Reader | FeedReader | None = None
    reason: CloseReason | None = None
    _let_go: Callable[[CloseReason], object] = _let_nothing_go

    def take(self, run: Run, reader: Reader | None = None, *, policy: Policy | None = None) -> None:
        """Hold a run, by the reader that was attached to it or just by waiting for it."""
        self.run, self.reader = run, reader
        if reader is None:
            run.hold(self, policy)
            self._let_go = partial(run.release, self)
        else:
            self._let_go = partial(run.detach, reader)

    def take_feed(self, reader: FeedReader, let_go: Callable[[], object]) -> None:
        """Hold a feed's reader, and call `let_go` once it is detached."""
        self.reader = reader

        def detach(_reason: CloseReason) -> None:
            reader.feed.detach(reader)
            let_go()

        self._let_go = detach

    def withdraw(self) -> None:
        """Hold nothing, as if nothing had been taken: nobody has left."""
        self.release("finished")
        self.run = self.reader = self.reason = None

    def end(self, reason: CloseReason) -> None:
        """Note why the request is done with the run."""
        self.reason = self.reason or reason

    def release(self, otherwise: CloseReason) -> CloseReason:
        """Let go; returns why, which is `otherwise` where nobody has said."""
        self.reason = self.reason or otherwise
        let_go, self._let_go = self._let_go, _let_nothing_go  # it refers to this lease
        let_go(self.reason)
        return self.reason


class EventStream(ResponseBody):
    """The frames of a run or a feed, written to the wire as they come.

    Quart starts the response and ends it; everything between goes straight to the connection, in
    one write per wake-up. It yields nothing to Quart.
    """

    def __init__(
        self,
        *,
        lease: Lease,
        runs: Runs,
        wire: _Wire,
        framing: Framing,
        options: AppOptions,
        counts: StreamCounts,
        rotates: bool,
    ) -> None:
        assert lease.reader is not None
        self._runs, self._reader, self._lease = runs, lease.reader, lease
        self._wire, self._framing, self._options, self._counts = wire, framing, options, counts
        self._rotates = rotates
        self._written_at = trio.current_time()

    async def __aenter__(self) -> Self:
        await trio.lowlevel.checkpoint_if_cancelled()
        return self

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> bytes:
        timer, now = self._runs.timer, trio.current_time()
        if self._framing.heartbeat is not None:
            self._beat = timer.call_at(now + self._options.heartbeat, self._see_silence)
        rotation = None
        if self._rotates and self._options.rotation:
            age = self._options.rotation * random.uniform(0.8, 1.0)  # noqa: S311  # to spread load
            rotation = timer.call_at(now + age, self._rotate)
        try:
            await self._pour()
        except SlowClient:
            self._lease.end("slow_client")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lease.end("client_left")
        finally:
            if self._framing.heartbeat is not None:
                self._beat.cancel()
            if rotation is not None:
                rotation.cancel()
        raise StopAsyncIteration

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Leave everything to the lease: there is nothing here to close."""

    async def _pour(self) -> None:
        reader = self._reader
        await self._write(self._framing.prelude)
        while True:
            if reader.closing is not None:
                if self._framing.farewell is not None:
                    milliseconds = random.randint(*RETRY_AFTER_ROTATION)  # noqa: S311  # to spread load
                    await self._write(self._framing.farewell(milliseconds))
                self._lease.end(reader.closing)
                return
            if frames := reader.take():
                await self._write(frames)
            elif reader.is_behind:  # the encoder is on its way through a long log
                await trio.lowlevel.checkpoint()
            elif reader.is_finished:
                self._lease.end("finished")
                return
            else:
                await reader.wait()
                if reader.beat:
                    reader.beat = False
                    await self._write(self._framing.heartbeat or b"")

    async def _write(self, frames: bytes) -> None:
        whole = memoryview(frames)  # of a large frame each slice has its time, and none is copied
        for start in range(0, len(frames), MAX_WRITE):
            await self._wire.write(whole[start : start + MAX_WRITE])
        self._written_at = trio.current_time()
        self._counts.bytes += len(frames)

    def _rotate(self) -> None:
        if not self._runs.is_closing:  # else there is nowhere to come back to
            self._reader.close("rotated")

    def _see_silence(self) -> None:
        now, silence = trio.current_time(), self._options.heartbeat
        due = self._written_at + silence
        if due <= now:
            self._reader.ring_for_silence()
            due = now + silence
        self._beat = self._runs.timer.call_at(due, self._see_silence)


@attrs.frozen
class _Meant:
    """The run that a request is about, and where its response begins.

    Attributes:
        past: It goes on past questions among this many events.
        is_answer: Whether the request brings what the run waits for.
    """

    run: Run
    after: Position = START
    past: int = 0
    is_answer: bool = attrs.field(default=False, kw_only=True)


@attrs.define(eq=False)
class _Recalling:
    """An encoder that is told what was said before the run once that is known: when it begins."""

    encoder: RecallingEncoder
    said_before: Callable[[], Sequence[Message]]

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames."""
        if isinstance(event, RunStarted):
            self.encoder.recall(self.said_before())
        return self.encoder.feed(event)


@attrs.frozen
class _Unheeded:
    """In a nursery's place: a scope that nobody is in."""

    cancel_scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


class Connection(TrioASGIHTTPConnection):
    """One request, from its head to the end of its response.

    What Quart-Trio does, but for three things: a disconnect that Hypercorn reports because the
    response is complete does not cancel the code that completes it (else the connection is neither
    closed nor reused); the request runs in this task, one less per stream; and whatever it holds of
    a run is let go here.
    """

    app: "AgentsseApp"

    async def __call__(self, receive: Any, send: Any) -> None:
        """Serve the request; cancelled, it lets go of its run like a client that left."""
        started = trio.current_time()
        self.is_complete = self.has_left = False
        self.status: int | None = None
        self.lease = Lease()
        self.scope["state"]["lease"] = self.lease

        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                self.is_complete = True
            await send(message)

        try:
            request = self._create_request_from_scope(send_on)
        except (ValueError, IndexError):  # a target such as `http://[` or `?query`
            await _refuse(send_on, "expected a path, got a target that is no valid URL")
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wait_for_leave, nursery, request, receive)
                await self._respond(nursery, request, send_on)
        except Exception:
            self.lease.end("error")  # ours: whoever was reading may come back
            raise
        finally:
            if self.has_left:
                self.lease.end("client_left")
            # Cancelled by nobody of ours: the connection has failed, or the server stops.
            reason = self.lease.release("shutdown" if self.app.runs.is_closing else "error")
            self.app.bodies.drop(self)
            if self.lease.reader is not None:
                self.app.streams.closed[reason] += 1
                self.app.streams.open -= 1
            self._log(started)

    async def _wait_for_leave(self, nursery: trio.Nursery, request: Any, receive: Any) -> None:
        taken, most = 0, self.app.max_body(request.method, request.path)
        bodies = self.app.bodies

        async def receive_within() -> Any:
            # Quart keeps what comes until somebody reads it, which may be never: past the limit a
            # body is said to end, which is refused, and what is behind it is dropped.
            nonlocal taken
            while (message := await receive())["type"] == "http.request":
                before, taken = taken, taken + len(message.get("body", b""))
                if before <= most and not bodies.is_full:
                    bodies.take(self, taken - before)
                    is_last = taken > most or bodies.is_full
                    return {**message, "more_body": False} if is_last else message
            return message

        # Quart-Trio cancels what it is given as soon as the client is gone: ours to decide.
        await super().handle_messages(_Unheeded(), request, receive_within)  # type: ignore[arg-type]
        if not self.is_complete:
            self.has_left = True
            nursery.cancel_scope.cancel(reason="the client has left")

    async def _respond(self, nursery: trio.Nursery, request: Any, send: Any) -> None:
        response = await self.app.handle_request(request)
        self.app.bodies.drop(self)
        # No time limit on a response: a stream lasts as long as its run, and a write has its own.
        await self._send_response(send, response)
        nursery.cancel_scope.cancel(reason="the response is complete")

    def _log(self, started: float) -> None:
        scope, lease = self.scope, self.lease
        self.app.report(
            "request",
            method=scope["method"],
            path=_path_of(scope["raw_path"]),
            status=self.status if self.status is not None else 499,
            seconds=round(trio.current_time() - started, 6),
            **({} if lease.run is None else {"run_id": lease.run.id}),
            **({} if lease.run is None and lease.reader is None else {"closed": lease.reason}),
        )


async def _refuse(send: Callable[[Any], Awaitable[None]], message: str) -> None:
    body = problem_json(Problem(code="bad_request", message=message, status=400))
    headers = [(b"content-type", b"application/problem+json"), (b"connection", b"close")]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def claim_paths(dialects: Iterable[Dialect]) -> list[tuple[str, Dialect, Route]]:
    """Where each route of each dialect is.

    Raises:
        ConfigError: Two of them claim one path, or one what operators ask for.
    """
    owners = {("GET", path): "the server itself" for path in (LIVE, READY, METRICS, OPENAPI)}
    claimed = []
    for dialect in dialects:
        for route in dialect.routes:
            path = route.path if route.is_rooted else dialect.mount.rstrip("/") + route.path
            pattern = "/".join("<>" if each.startswith("<") else each for each in path.split("/"))
            owner = owners.setdefault((route.method, pattern), dialect.name)
            if owner != dialect.name:
                raise ConfigError(
                    f"expected one dialect for {route.method} {path}, got {owner!r} and "
                    f"{dialect.name!r}: give one of them another mount, in "
                    f"[dialects.{dialect.name}]"
                )
            claimed.append((path, dialect, route))
    return claimed


class AgentsseApp(QuartTrio):
    """The ASGI application: the dialects' routes, and what operators ask for.

    Args:
        runs: The engine.
        dialects: Each with its mount; two claims on one path are refused.
        options: How it speaks.
        report: Called with an event's name and facts, for each request and each crash.
        connections: The listener's counts, for the metrics.
    """

    asgi_http_class = Connection

    def __init__(
        self,
        runs: Runs,
        dialects: tuple[Dialect, ...],
        *,
        options: AppOptions,
        report: Callable[..., object],
        connections: Counts,
    ) -> None:
        super().__init__("agentsse", static_folder=None)
        self.url_map.merge_slashes = False  # `/threads//messages` is no thread named "messages"
        self.runs, self.threads = runs, Threads(runs)
        self.options, self.report = options, report
        self.streams, self.connections = StreamCounts(), connections
        self.bodies = Bodies(options.max_bodies)
        self.dialects = {dialect.name: dialect for dialect in dialects}
        self._speakers: dict[str, Dialect] = {}  # by endpoint
        self._claimed = claim_paths(dialects)
        self._document: bytes | None = None
        self._large = _large_bodies(self._claimed)
        self.config["MAX_CONTENT_LENGTH"] = max(options.max_body, options.max_history)
        self.before_request(self._guard)
        self.after_request(self._allow_origin)
        self.register_error_handler(Exception, self._answer_error)
        views = {
            LIVE: self._live,
            READY: self._ready,
            METRICS: self._metrics,
            OPENAPI: self._openapi,
        }
        for path, view in views.items():
            self.add_url_rule(path, path, view, methods=["GET"])
        for path, dialect, route in self._claimed:
            view, endpoint = partial(self._view, dialect, route), f"{route.method} {path}"
            self._speakers[endpoint] = dialect
            self.add_url_rule(path, endpoint, view, methods=[route.method])

    def max_body(self, method: str, path: str) -> int:
        """How many bytes a request may bring."""
        if method != "POST":
            return self.options.max_body
        limits = (size for prefix, size in self._large.items() if path.startswith(prefix))
        return max(self.options.max_body, min(self.options.max_history, max(limits, default=0)))

    # One request

    async def _view(self, dialect: Dialect, route: Route, **parameters: str) -> Response:
        try:
            return await self._act(dialect, await self._decode(route, parameters))
        except AgentsseError as error:
            return _error(error, dialect)

    async def _decode(self, route: Route, parameters: Mapping[str, str]) -> Intent:
        most = self.max_body(current_request.method, current_request.path)
        too_large = TooLarge(f"expected a body of at most {most} bytes, got more")
        if (current_request.content_length or 0) > most:
            raise too_large
        try:
            # Not cached: it would be kept for as long as the stream that it asks for.
            body: bytes = await current_request.get_data(False, False, False)
        except RequestEntityTooLarge as error:
            raise too_large from error
        if len(body) > most:
            raise too_large
        if self.bodies.is_full:
            raise Overloaded(
                f"expected at most {self.options.max_bodies} bytes of requests at once, got more; "
                "try again"
            )
        return route.decode(
            Request(
                method=current_request.method,
                parameters=parameters,
                query=current_request.args.to_dict(),
                headers={name.lower(): value for name, value in current_request.headers.items()},
                body=body,
                pairs=tuple(current_request.args.items(multi=True)),
            )
        )

    async def _act(self, dialect: Dialect, intent: Intent) -> Response:
        match intent:
            case Start():
                return await self._start(dialect, intent)
            case Watch():
                return self._watch(dialect, intent)
            case WatchFeed():
                return self._watch_feed(dialect, intent)
            case Cancel():
                return await self._cancel(dialect, intent)
            case Answer():
                return self._answer(dialect, intent)
            case Tell():
                return self._tell(dialect, intent)
            case Pause():
                run = self._find(intent.run_id, intent.thread_id)
                if intent.resume:
                    run.resume()
                else:
                    run.pause(intent.reason)
                return _shown(dialect, run, intent.reply, brief=True)
            case Show():
                return await self._show(dialect, intent)
            case ListRuns():
                return await self._list_runs(dialect, intent)
            case ListAgents():
                return self._list_agents(intent)
            case ListThreads():
                return await self._list_threads(dialect, intent)
            case OpenThread():
                thread = self.threads.open(intent, default=dialect.agent)
                return self._shown_thread(dialect, thread, intent.reply, status=201)
            case ShowThread():
                return self._show_thread(dialect, intent)
            case CloseThread():
                thread = self.threads.find(intent.thread_id)
                with trio.move_on_after(self.options.cancel_patience) as scope:
                    await self.threads.close(intent.thread_id)
                status = 202 if scope.cancelled_caught else 200
                return self._shown_thread(dialect, thread, intent.reply, status=status)
            case SetTrigger():
                thread = self.threads.set_trigger(intent)
                return self._shown_thread(dialect, thread, intent.reply)
            case DropTrigger():
                thread = self.threads.drop_trigger(intent.thread_id, intent.trigger_id)
                return self._shown_thread(dialect, thread, intent.reply)
            case _:
                assert_never(intent)

    def _find(self, run_id: str | None, thread_id: str | None) -> Run:
        if run_id is None:
            assert thread_id is not None
            return self.threads.find_run(thread_id)
        if thread_id is None:
            return self.runs.find(run_id)
        return self.runs.find_run_of(thread_id, run_id)

    # Runs

    async def _start(self, dialect: Dialect, order: Start) -> Response:
        found = self._meant(order)
        meant = found or _Meant(self._begin(dialect, order))
        run = meant.run
        mount = dialect.mount.rstrip("/")
        headers = dialect.locate(mount, run.id, run.thread_id, order.options)
        framing = order.framing or dialect.framing
        match order.delivery:
            case "stream":
                # Held before it is answered: an answer is not to be lost with its request.
                after, past = meant.after, meant.past
                try:
                    self._attach(dialect, run, after, order.options, framing, past=past)
                except Exception as error:
                    if found is None:  # nobody would ever know of it
                        run.cancel("disconnect")
                    if isinstance(error, RecursionError):
                        raise BadRequest("expected JSON that is less deeply nested") from error
                    raise
                self._hand_in(meant, order)
                return self._pour(framing, headers, rotates=False)
            case "background":
                self._hand_in(meant, order)
                return _shown(dialect, run, order.reply, 202, headers)
            case "wait":
                self._lease.take(run)
                self._hand_in(meant, order)
                await self._wait(run, framing)
                end = run.end
                if order.reply is None and end and end.outcome == "error" and end.error is not None:
                    return _answered(dialect.problem(end.error), headers)
                return _shown(dialect, run, order.reply, 200, headers)
            case _:
                assert_never(order.delivery)

    def _begin(self, dialect: Dialect, order: Start) -> Run:
        """Start a run."""
        if order.continues is not None:
            agent: str | None = self.runs.find_previous(order).agent.name
        else:
            thread = self.runs.find_thread(order.thread_id)
            if thread is None and order.must_exist:
                thread = self.threads.find(order.thread_id or "")
            agent = self.threads.agent_of(thread, dialect.agent) if thread else dialect.agent
        run, _ = self.runs.start(order, default=dialect.on_disconnect, agent=agent)
        return run

    def _meant(self, order: Start) -> "_Meant | None":
        """The run that is there already, if the request is for that: to answer it, or to rejoin."""
        rejoined = self.runs.look_up(order.run_id) if order.rejoins else None
        if rejoined is not None:
            agent = self.runs.choose_agent(order.agent, default=rejoined.agent.name)
            if (rejoined.thread_id, rejoined.agent) != (order.thread_id, agent):
                rejoined = None
        if order.continues is not None:
            run: Run | None = self.runs.find_previous(order)
        else:
            wanted = order.resumes or order.answers is not None
            thread = self.runs.find_thread(order.thread_id) if wanted else None
            run = thread.running if thread is not None else None
        asked = run.context.asked if run is not None and run.state != "cancelling" else {}
        by_id = order.answers is not None and list(order.answers) != [""]
        answered = [i for i in order.answers or () if i in asked] if by_id else list(asked)
        # Who comes back to a run has answered before what they answer now.
        if run is not None and asked and (answered or rejoined is None):
            seqs = [asked[request_id].event.seq for request_id in answered or asked]
            # Answers by id come from somebody who has seen all of them, words from one who has not.
            seq = max(seqs) if by_id else min(seqs)
            return _Meant(run, Position(seq), is_answer=True)
        if rejoined is not None:
            return _Meant(rejoined, past=rejoined.settled)
        if order.answers is not None:
            raise NotAsked(
                "expected answers to what a run asks, but nothing is asked (any more) in "
                + (f"the run {run.id}" if run else f"the thread {order.thread_id!r}")
            )
        return None

    def _hand_in(self, meant: "_Meant", order: Start) -> None:
        """Answer what the run asks, if that is what the request is for."""
        if not meant.is_answer:
            return
        context = meant.run.context
        try:
            if order.answers is not None:
                context.answer_several(order.answers)
            else:
                context.answer_next(order.input, is_whole=True)
        except AgentsseError:
            self._lease.withdraw()
            raise

    async def _wait(self, run: Run, framing: Framing) -> None:
        """Wait until what the lease holds has come to where a response ends."""
        if InputRequested in framing.ends_at:
            await run.wait_done_or_asking()
        else:
            await run.done.wait()
        self._lease.end("finished")

    async def _show(self, dialect: Dialect, order: Show) -> Response:
        run = self._find(order.run_id, order.thread_id)
        if order.waits:
            self._lease.take(run, policy=self._policy(order.on_disconnect))
            await self._wait(run, dialect.framing)
        return _shown(dialect, run, order.reply)

    def _policy(self, text: str | None) -> Policy | None:
        return None if text is None else Policy.parse(text, self.runs.limits.grace)

    def _watch(self, dialect: Dialect, watch: Watch) -> Response:
        if watch.run_id is None:
            thread = self.runs.find_thread(watch.thread_id)
            latest = None if thread is None else thread.unread
            if latest is None:
                return Response(b"", 204)
            run = latest
        else:
            run = self._find(watch.run_id, watch.thread_id)
        if watch.dialect is not None:
            if watch.dialect not in self.dialects:
                raise BadRequest(
                    f"dialect: expected one of {', '.join(self.dialects)}, "
                    f"got {watch.dialect[:40]!r}"
                )
            dialect = self.dialects[watch.dialect]
        framing = watch.framing or dialect.framing
        place = watch.after(run.log.events) if callable(watch.after) else watch.after
        after = Position(*place)
        if watch.headers_only or current_request.method == "HEAD":
            return Response(b"", 200, STREAM_HEADERS, content_type=framing.media_type)
        if run.log.closed and after == Position(run.log.end):
            return Response(b"", 204)
        # Whoever only looks on sees all of it, also where a client of that protocol asks again.
        self._attach(
            dialect,
            run,
            after,
            watch.options,
            framing,
            reads_on=watch.dialect is not None,
            past=run.settled if watch.goes_on else 0,
            policy=self._policy(watch.on_disconnect),
        )
        return self._pour(framing, None, rotates=True)

    def _attach(
        self,
        dialect: Dialect,
        run: Run,
        after: Position,
        options: Hashable,
        framing: Framing,
        *,
        reads_on: bool = False,
        past: int = 0,
        policy: Policy | None = None,
    ) -> None:
        """Have the request hold a reader of a run."""

        def make() -> Encoder:
            encoder = dialect.encoder(options)
            if isinstance(encoder, RecallingEncoder):
                return _Recalling(encoder, partial(self.runs.said_before, run))
            return encoder

        reader = run.attach(
            (dialect.name, options),
            make,
            after,
            ends_at=framing.ends_at,
            reads_on=reads_on,
            past=past,
            is_plain=options is None,
            policy=policy,
        )
        self._lease.take(run, reader)

    def _pour(
        self, framing: Framing, headers: Mapping[str, str] | None, *, rotates: bool
    ) -> Response:
        """Begin to stream what the lease holds; it is rotated only where clients come back."""
        self.streams.open += 1
        body = EventStream(
            lease=self._lease,
            runs=self.runs,
            wire=current_request.scope["state"]["wire"],
            framing=framing,
            options=self.options,
            counts=self.streams,
            rotates=rotates and framing.farewell is not None,
        )
        merged = {**STREAM_HEADERS, **framing.headers, **(headers or {})}
        return Response(body, 200, merged, content_type=framing.media_type)

    async def _cancel(self, dialect: Dialect, order: Cancel) -> Response:
        if (idle := order.reply_if_idle) and order.thread_id is not None:
            find = self.threads.find if order.must_exist else self.runs.find_thread
            thread = find(order.thread_id)
            if thread is None or not thread.active:
                return _answered(idle)
        run = self._find(order.run_id, order.thread_id)
        was_over = run.log.closed
        if order.forgets:
            self.runs.forget(run)
        match order.mode:
            case "now":
                run.cancel("client_cancel", reason=order.reason)
            case "after_step":
                run.cancel_after_step(reason=order.reason)
            case _:
                assert_never(order.mode)
        with trio.move_on_after(self.options.cancel_patience if order.waits else 0):
            await run.done.wait()
        reply = order.reply_if_over if was_over and order.reply_if_over else order.reply
        return _shown(dialect, run, reply, 200 if run.done.is_set() else 202)

    def _answer(self, dialect: Dialect, answer: Answer) -> Response:
        run = self.runs.find(answer.run_id)
        open_requests = list(run.context.asked)
        if run.log.closed:
            raise NotAsked(f"expected a run that goes on, got {run.id}, which is over")
        request_id = answer.request_id
        if request_id is None:
            if len(open_requests) != 1:
                raise BadRequest(
                    f"request_id: expected one of {', '.join(open_requests) or '(none is open)'}, "
                    "got none"
                )
            request_id = open_requests[0]
        run.context.answer(request_id, answer.answers, is_loose=answer.is_loose)
        return _shown(dialect, run, answer.reply)

    def _tell(self, dialect: Dialect, order: Tell) -> Response:
        if order.run_id is not None:
            run = self.runs.find(order.run_id)
            run.context.hear(order.text, order.mode, shown=order.shown)
            return _shown(dialect, run, order.reply, 202, brief=True)
        assert order.thread_id is not None
        if order.must_exist:
            thread = self.threads.find(order.thread_id)
        else:
            thread = self.runs.open_thread(order.thread_id)
        try:
            self.threads.tell(
                thread,
                order.text,
                mode=order.mode,
                shown=order.shown,
                default=dialect.agent,
            )
        finally:
            self.runs.drop_thread(thread)
        return self._shown_thread(dialect, thread, order.thread_reply, status=202)

    async def _list_runs(self, dialect: Dialect, order: ListRuns) -> Response:
        shown = []
        await trio.lowlevel.checkpoint()
        thread_id = order.thread_id
        if thread_id is not None:
            self.threads.find(thread_id)
        wanted = (run for run in self.runs if thread_id in (None, run.thread_id))
        for run in [run for run in wanted if order.state in (None, run.state)][: order.limit]:
            await trio.lowlevel.checkpoint()  # a snapshot looks at a whole log
            shown.append(run.snapshot(brief=True))
        if order.reply is not None:
            return _answered(order.reply(shown))
        listed = [msgspec.Raw(dialect.present(each)) for each in shown]
        return _json(msgspec.json.encode({"runs": listed}))

    # Threads and feeds

    def _watch_feed(self, dialect: Dialect, watch: WatchFeed) -> Response:
        form = dialect.feed
        if form is None:
            raise NotFound(f"expected a dialect that shows feeds, got {dialect.name!r}")
        if watch.headers_only or current_request.method == "HEAD":
            return Response(b"", 200, STREAM_HEADERS, content_type=dialect.framing.media_type)
        if self.runs.is_closing:
            raise Overloaded("the server is about to stop; try again when it is back", 5)
        lease, options, replay, after = self._lease, watch.options, form.replay, watch.after
        thread: Thread | None = None
        if watch.thread_id is None:
            after = after or NOW  # it remembers since somebody first read it, which is no beginning
        elif watch.must_exist:
            thread = self.threads.find(watch.thread_id)
        else:
            thread = self.runs.open_thread(watch.thread_id)
        feed = self.runs.feed if thread is None else thread.feed

        def let_go() -> None:
            if thread is not None:
                thread.holders.discard(lease)
                self.runs.drop_thread(thread)

        try:
            # Who is sent away before anything has happened must know its place, or there is a hole.
            place = id_only(feed.id_of(feed.last)) if after == NOW else b""
            snapshot = None
            if thread is not None:
                thread.holders.add(lease)
                snapshot = self.threads.snapshot(thread, default=dialect.agent)
            reader = feed.attach(
                (dialect.name, options),
                partial(form.encoder, options),
                after,
                greeting=form.greeting(snapshot, options) + place,
                replay=lambda events: frozenset(replay(events, options)) if replay else None,
                is_plain=options in form.plain,
            )
        except Exception:
            let_go()
            raise
        lease.take_feed(reader, let_go)
        return self._pour(dialect.framing, None, rotates=True)

    async def _list_threads(self, dialect: Dialect, order: ListThreads) -> Response:
        shown = []
        await trio.lowlevel.checkpoint()
        for thread in list(self.threads)[:MAX_LISTED]:
            await trio.lowlevel.checkpoint()
            shown.append(self.threads.snapshot(thread, default=dialect.agent))
        if order.reply is not None:
            return _answered(order.reply(shown))
        return _json(msgspec.json.encode({"threads": shown}))

    def _shown_thread(
        self, dialect: Dialect, thread: Thread, reply: ThreadReply | None, *, status: int = 200
    ) -> Response:
        snapshot = self.threads.snapshot(thread, default=dialect.agent)
        if reply is not None:
            return _answered(reply(snapshot, thread.feed.events))
        return _json(encode_event(snapshot), status)

    def _show_thread(self, dialect: Dialect, order: ShowThread) -> Response:
        thread = self.threads.find(order.thread_id)
        if order.conversation_reply is None:
            return self._shown_thread(dialect, thread, order.reply)
        run = thread.run
        said = self.runs.said_before(run) if run is not None else ()
        snapshot = self.threads.snapshot(thread, default=dialect.agent)
        shown, events = (run.snapshot(), run.log.events) if run else (None, ())
        return _answered(order.conversation_reply(snapshot, shown, events, said))

    def _list_agents(self, order: ListAgents) -> Response:
        cards = [
            AgentCard(
                name=agent.name,
                description=agent.description,
                model=agent.model,
                on_disconnect=agent.on_disconnect,
                tools=tuple(ToolSpec(t.name, t.description, t.parameters) for t in agent.tools),
            )
            for agent in self.runs.agents.values()
        ]
        if order.reply is not None:
            return _answered(order.reply(cards))
        shown = [
            {
                "name": card.name,
                "description": card.description,
                "model": card.model,
                "on_disconnect": card.on_disconnect,
                "tools": [{"name": t.name, "description": t.description} for t in card.tools],
            }
            for card in cards
        ]
        return _json(msgspec.json.encode({"agents": shown}))

    @property
    def _lease(self) -> Lease:
        lease: Lease = current_request.scope["state"]["lease"]
        return lease

    # Who may speak

    async def _guard(self) -> Response | None:
        """Refuse what a foreign page, or a name that was bound to this address, may send.

        Async, though it waits for nothing: Quart runs sync functions in a worker thread.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        host = current_request.headers.get("Host", "")
        name = _without_port(host.lower())
        rule = current_request.url_rule
        speaker = self._speakers.get(rule.endpoint) if rule is not None else None
        if host and name not in LOOPBACK_NAMES and name not in self.options.allowed_hosts:
            error = Misdirected(
                f"Host: expected a name of this server ({', '.join(sorted(LOOPBACK_NAMES))}), "
                f"got {host[:80]!r}; add it to allowed_hosts in [server]"
            )
            return _error(error, speaker)
        origin = current_request.headers.get("Origin")
        if origin is not None and not _is_local(origin):
            return _error(
                Forbidden(
                    f"Origin: expected a page from localhost, 127.0.0.1 or [::1], "
                    f"got {origin[:80]!r}"
                ),
                speaker,
            )
        if current_request.method == "OPTIONS" and origin is not None:
            return Response(
                b"",
                204,
                {
                    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
                    "Access-Control-Allow-Headers": current_request.headers.get(
                        "Access-Control-Request-Headers", "*"
                    ),
                    "Access-Control-Max-Age": "600",
                },
            )
        return None

    async def _allow_origin(self, response: Response) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        origin = current_request.headers.get("Origin")
        if origin is not None and _is_local(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = (
                "Location, Content-Location, Retry-After, X-Request-Id"
            )
            response.headers["Vary"] = "Origin"
        return response

    async def _answer_error(self, error: Exception) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        match error:
            case AgentsseError():
                return _error(error)
            case MethodNotAllowed():
                methods = tuple(sorted(error.valid_methods or ()))
                return _error(
                    NotAllowed(
                        f"expected one of {', '.join(methods)} for this path, "
                        f"got {current_request.method}",
                        methods,
                    )
                )
            case HTTPException(code=404):
                return _error(
                    NotFound(
                        "expected a path that this server knows, got "
                        f"{current_request.path[:80]!r}; GET /agents lists what can be run"
                    )
                )
            case HTTPException():
                code = (error.name or "error").lower().replace(" ", "_")
                problem = Problem(
                    code=code, message=error.description or code, status=error.code or 500
                )
            case _:
                self._lease.end("error")
                self.report(
                    "crash",
                    where=f"{current_request.method} {_path_of(current_request.scope['raw_path'])}",
                    error=type(error).__name__,
                    traceback=redact("".join(traceback.format_exception(error))),
                )  # fmt: skip
                problem = Problem(
                    code="internal",
                    message=f"the server raised {type(error).__name__}; its log has the details",
                )
        return _json(problem_json(problem), problem.status, kind="application/problem+json")

    # What operators ask for

    async def _live(self) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        return _json(b'{"status":"ok"}')

    async def _ready(self) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.runs.is_closing:
            raise Overloaded("the server is about to stop", 5)
        return _json(b'{"status":"ok"}')

    async def _openapi(self) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._document is None:
            self._document = await trio.to_thread.run_sync(self._make_document)
        return _json(self._document)

    def _make_document(self) -> bytes:
        from .openapi import make_document  # noqa: PLC0415  # only for those who ask

        return make_document(self._claimed, version=version("agentsse"))

    async def _metrics(self) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        from .metrics import render  # noqa: PLC0415  # 60 ms, and only for those who ask

        text, kind = render(
            self.runs.statistics(), self.streams, self.connections, buckets=TEARDOWN_BUCKETS
        )
        return Response(text, 200, content_type=kind)


def _large_bodies(claimed: Iterable[tuple[str, Dialect, Route]]) -> dict[str, int]:
    """What the paths begin with to which more than usual may be posted, and how much that is."""
    large: dict[str, int] = {}
    for path, dialect, route in claimed:
        if route.method == "POST" and dialect.max_body is not None:
            prefix = path.partition("<")[0]
            large[prefix] = max(large.get(prefix, 0), dialect.max_body)
    return large


def _json(
    body: bytes,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    *,
    kind: str = "application/json",
) -> Response:
    return Response(
        body, status, {"Cache-Control": "no-store", **(headers or {})}, content_type=kind
    )


def _answered(reply: Reply, headers: Mapping[str, str] | None = None) -> Response:
    merged = {**(headers or {}), **reply.headers}
    return _json(reply.body, reply.status, merged, kind=reply.media_type)


def _shown(
    dialect: Dialect,
    run: Run,
    reply: RunReply | None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    *,
    brief: bool = False,
) -> Response:
    """A run as an intent, or else the dialect, wants to show it."""
    snapshot = run.snapshot(brief=brief)
    match reply:
        case None:
            pass
        case ReplyWithHistory():
            said = run.owner.said_before(run)
            return _answered(reply.make(snapshot, run.log.events, said), headers)
        case _:
            return _answered(reply(snapshot, run.log.events), headers)
    return _json(dialect.present(snapshot), status, headers)


def _error(error: AgentsseError, dialect: Dialect | None = None) -> Response:
    shown = Problem(code=error.code, message=error.message, status=error.status)
    headers = {}
    match error:
        case Overloaded():
            headers["Retry-After"] = str(error.retry_after)
        case NotAllowed():
            headers["Allow"] = ", ".join(error.allow)
        case _:
            pass
    return _answered(dialect.problem(shown) if dialect else problem_reply(shown), headers)


def _path_of(target: bytes) -> str:
    """The path of a request's target, still escaped: fit for a log, and without a password."""
    text = target.decode("ascii", "replace")
    return text if text.startswith("/") else "/" + text.partition("//")[2].partition("/")[2]


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isascii() and port.isdigit() else host


def _is_local(origin: str) -> bool:
    return _LOCAL_ORIGIN.fullmatch(origin) is not None
