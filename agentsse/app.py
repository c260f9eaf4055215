"""HTTP on one side, the engine on the other, and between them one loop over the dialects' routes.

Knows: requests, answers, and what each intent of a dialect means for the engine. Must never name a
dialect, nor know how a request or a response is carried.
"""

import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, assert_never

import attrs
import msgspec
import trio

from . import __version__
from .dialects import (
    AgentCard,
    Answer as AnswerIntent,
    AnyDialect,
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
    ReplyWithHistory,
    Request,
    RunReply,
    SetTrigger,
    Show,
    ShowThread,
    Start,
    Tell,
    ThreadReply,
    Watch,
    WatchFeed,
    problem_reply,
)
from .errors import (
    AgentsseError,
    BadRequest,
    NotAsked,
    NotFound,
    Overloaded,
    redact,
)
from .events import AnyEvent, InputRequested, Problem, RunStarted, encode_event
from .exchange import (
    Answer,
    AppOptions,
    Bodies,
    EventStream,
    Exchange,
    StreamCounts,
    allow_origin,
    answer_error,
    answer_json,
    answer_reply,
    see_stranger,
    shown_path,
)
from .feed import NOW
from .listener import Counts
from .log import START, Position
from .messages import Message, ToolSpec
from .paths import LIVE, METRICS, OPENAPI, READY, Found, Paths, claim_paths
from .runs import TEARDOWN_BUCKETS, Policy, Run, Runs, Thread
from .sse import id_only
from .threads import Threads

if TYPE_CHECKING:
    from .pages import Pages

MAX_LISTED = 1_000  # threads in one answer
STREAM_HEADERS = {
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


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


@cache
def _recalls(kind: type[Encoder]) -> bool:
    """Whether encoders of that class want to know what was said; the question is a dear one."""
    return issubclass(kind, RecallingEncoder)


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


class AgentsseApp:
    """The ASGI application: the dialects' routes, and what operators ask for.

    What belongs to no dialect is left to Quart (pages.py), which is loaded when somebody asks.

    Args:
        runs: The engine.
        dialects: Each with its mount; two claims on one path are refused.
        options: How it speaks.
        report: Called with an event's name and facts, for each request and each crash.
        connections: The listener's counts, for the metrics.
    """

    def __init__(
        self,
        runs: Runs,
        dialects: tuple[AnyDialect, ...],
        *,
        options: AppOptions,
        report: Callable[..., object],
        connections: Counts,
    ) -> None:
        self.runs, self.threads = runs, Threads(runs)
        self.options, self.report = options, report
        self.streams, self.connections = StreamCounts(), connections
        self.bodies = Bodies(options.max_bodies)
        self.dialects = {dialect.name: dialect for dialect in dialects}
        self._paths = Paths.claimed_by(dialects)
        self._loading = trio.CapacityLimiter(
            1
        )  # not the threads that blocking tools may have taken
        self._document: bytes | None = None
        self._pages: Pages | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request; cancelled, it lets go of its run like a client that left."""
        if scope["type"] != "http":  # there is nothing to start or to stop here
            await trio.lowlevel.checkpoint()
            return
        started, exchange = trio.current_time(), Exchange(scope, receive, send)
        lease = exchange.lease
        try:
            await exchange.run(self._answer)
        finally:
            # Cancelled by nobody of ours: the connection has failed, or the server stops.
            reason = lease.release("shutdown" if self.runs.is_closing else "error")
            self.bodies.drop(exchange)
            if exchange.is_streaming:
                self.streams.closed[reason] += 1
                self.streams.open -= 1
            self.report(
                "request",
                method=exchange.method,
                path=shown_path(scope["raw_path"]),
                status=exchange.status if exchange.status is not None else 499,
                seconds=round(trio.current_time() - started, 6),
                **({} if lease.run is None else {"run_id": lease.run.id}),
                **({} if lease.run is None and lease.reader is None else {"closed": reason}),
            )

    # One request

    async def _answer(self, exchange: Exchange) -> Answer | None:
        found = None
        try:
            found = self._paths.find(exchange.method, exchange.path)
            answer = await self._serve(exchange, found)
        except AgentsseError as error:
            answer = answer_error(error, found.dialect.problem if found else problem_reply)
        except Exception as error:
            if exchange.status is not None:  # a page that breaks off
                raise
            exchange.lease.end("error")
            answer = self._answer_crash(exchange.method, exchange.scope["raw_path"], error)
        origin = exchange.headers.get("origin")
        if answer is None or origin is None:
            return answer
        return answer.with_headers(allow_origin(origin))

    async def _serve(self, exchange: Exchange, found: Found | None) -> Answer | None:
        if not exchange.path:
            raise BadRequest("expected a path, got a target that is no valid URL")
        see_stranger(exchange.headers, self.options.allowed_hosts)
        if found is not None:
            intent = await self._decode(exchange, found)
            return await self._act(exchange, found.dialect, intent)
        if exchange.method in {"GET", "HEAD"} and exchange.path in {LIVE, READY}:
            await trio.lowlevel.checkpoint_if_cancelled()
            return self._health(exchange.path)
        if self._pages is None:
            self._pages = await trio.to_thread.run_sync(self._open_pages, limiter=self._loading)
        await self._pages(exchange.scope, exchange.receive, exchange.send)  # type: ignore[arg-type]
        return None

    def _answer_crash(self, method: str, target: bytes, error: Exception) -> Answer:
        self.report(
            "crash",
            where=f"{method} {shown_path(target)}",
            error=type(error).__name__,
            traceback=redact("".join(traceback.format_exception(error))),
        )
        message = f"the server raised {type(error).__name__}; its log has the details"
        return answer_reply(problem_reply(Problem(code="internal", message=message)))

    async def _decode(self, exchange: Exchange, found: Found) -> Intent:
        """What the request asks for, once its body is there."""
        try:
            body = await exchange.read_body(
                self.max_body(exchange.method, found.dialect),
                self.bodies,
                self.options.body_patience,
            )
            pairs = exchange.pairs
            return found.route.decode(
                Request(
                    method=exchange.method,
                    parameters=found.parameters,
                    query=dict(reversed(pairs)),
                    headers=exchange.headers,
                    body=body,
                    pairs=tuple(pairs),
                )
            )
        finally:
            self.bodies.drop(exchange)

    def max_body(self, method: str, dialect: Dialect) -> int:
        """How many bytes a request may bring."""
        if method != "POST" or dialect.max_body is None:
            return self.options.max_body
        return max(self.options.max_body, min(self.options.max_history, dialect.max_body))

    async def _act(self, exchange: Exchange, dialect: Dialect, intent: Intent) -> Answer:
        match intent:
            case Start():
                return await self._start(exchange, dialect, intent)
            case Watch():
                return self._watch(exchange, dialect, intent)
            case WatchFeed():
                return self._watch_feed(exchange, dialect, intent)
            case Cancel():
                return await self._cancel(dialect, intent)
            case AnswerIntent():
                return self._answer_run(dialect, intent)
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
                return await self._show(exchange, dialect, intent)
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

    async def _start(self, exchange: Exchange, dialect: Dialect, order: Start) -> Answer:
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
                    self._attach(
                        exchange, dialect, run,
                        after=after, options=order.options, framing=framing, past=past,
                    )  # fmt: skip
                except Exception as error:
                    if found is None:  # nobody would ever know of it
                        run.cancel("disconnect")
                    if isinstance(error, RecursionError):
                        raise BadRequest("expected JSON that is less deeply nested") from error
                    raise
                self._hand_in(exchange, meant, order)
                return self._pour(exchange, framing, headers, rotates=False)
            case "background":
                self._hand_in(exchange, meant, order)
                return _shown(dialect, run, order.reply, 202, headers)
            case "wait":
                exchange.lease.take(run)
                self._hand_in(exchange, meant, order)
                await self._wait(exchange, run, framing)
                end = run.end
                if order.reply is None and end and end.outcome == "error" and end.error is not None:
                    return answer_reply(dialect.problem(end.error), headers)
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

    def _hand_in(self, exchange: Exchange, meant: "_Meant", order: Start) -> None:
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
            exchange.lease.withdraw()
            raise

    async def _wait(self, exchange: Exchange, run: Run, framing: Framing) -> None:
        """Wait until what the lease holds has come to where a response ends."""
        if InputRequested in framing.ends_at:
            await run.wait_done_or_asking()
        else:
            await run.done.wait()
        exchange.lease.end("finished")

    async def _show(self, exchange: Exchange, dialect: Dialect, order: Show) -> Answer:
        run = self._find(order.run_id, order.thread_id)
        if order.waits:
            exchange.lease.take(run, policy=self._policy(order.on_disconnect))
            await self._wait(exchange, run, dialect.framing)
        return _shown(dialect, run, order.reply)

    def _policy(self, text: str | None) -> Policy | None:
        return None if text is None else Policy.parse(text, self.runs.limits.grace)

    def _watch(self, exchange: Exchange, dialect: Dialect, watch: Watch) -> Answer:
        if watch.run_id is None:
            thread = self.runs.find_thread(watch.thread_id)
            latest = None if thread is None else thread.unread
            if latest is None:
                return Answer(204, {})
            run = latest
        else:
            run = self._find(watch.run_id, watch.thread_id)
        if watch.dialect is not None:
            if watch.dialect not in self.dialects:
                raise BadRequest(
                    f"dialect: expected one of {', '.join(self.dialects)}, "
                    f"got {watch.dialect[:40]!r}"
                )
            dialect = self.dialects[watch.dialect].load()
        framing = watch.framing or dialect.framing
        place = watch.after(run.log.events) if callable(watch.after) else watch.after
        after = Position(*place)
        if watch.headers_only or exchange.method == "HEAD":
            return Answer(200, {**STREAM_HEADERS, "Content-Type": framing.media_type})
        if run.log.closed and after == Position(run.log.end):
            return Answer(204, {})
        # Whoever only looks on sees all of it, also where a client of that protocol asks again.
        self._attach(
            exchange,
            dialect,
            run,
            after=after,
            options=watch.options,
            framing=framing,
            reads_on=watch.dialect is not None,
            past=run.settled if watch.goes_on else 0,
            policy=self._policy(watch.on_disconnect),
        )
        return self._pour(exchange, framing, None, rotates=True)

    def _attach(
        self,
        exchange: Exchange,
        dialect: Dialect,
        run: Run,
        *,
        after: Position,
        options: Hashable,
        framing: Framing,
        reads_on: bool = False,
        past: int = 0,
        policy: Policy | None = None,
    ) -> None:
        """Have the request hold a reader of a run."""

        def make() -> Encoder:
            encoder = dialect.encoder(options)
            if _recalls(type(encoder)):
                assert isinstance(encoder, RecallingEncoder)
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
        exchange.lease.take(run, reader)

    def _pour(
        self,
        exchange: Exchange,
        framing: Framing,
        headers: Mapping[str, str] | None,
        *,
        rotates: bool,
    ) -> Answer:
        """Begin to stream what the lease holds; it is rotated only where clients come back."""
        self.streams.open += 1
        exchange.is_streaming = True
        body = EventStream(
            lease=exchange.lease,
            runs=self.runs,
            wire=exchange.wire,
            framing=framing,
            options=self.options,
            counts=self.streams,
            rotates=rotates and framing.farewell is not None,
        )
        merged = {**STREAM_HEADERS, **framing.headers, **(headers or {})}
        return Answer(200, {"Content-Type": framing.media_type, **merged}, body)

    async def _cancel(self, dialect: Dialect, order: Cancel) -> Answer:
        if (idle := order.reply_if_idle) and order.thread_id is not None:
            find = self.threads.find if order.must_exist else self.runs.find_thread
            thread = find(order.thread_id)
            if thread is None or not thread.active:
                return answer_reply(idle)
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

    def _answer_run(self, dialect: Dialect, answer: AnswerIntent) -> Answer:
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

    def _tell(self, dialect: Dialect, order: Tell) -> Answer:
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

    async def _list_runs(self, dialect: Dialect, order: ListRuns) -> Answer:
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
            return answer_reply(order.reply(shown))
        listed = [msgspec.Raw(dialect.present(each)) for each in shown]
        return answer_json(msgspec.json.encode({"runs": listed}))

    # Threads and feeds

    def _watch_feed(self, exchange: Exchange, dialect: Dialect, watch: WatchFeed) -> Answer:
        form = dialect.feed
        if form is None:
            raise NotFound(f"expected a dialect that shows feeds, got {dialect.name!r}")
        if watch.headers_only or exchange.method == "HEAD":
            return Answer(200, {**STREAM_HEADERS, "Content-Type": dialect.framing.media_type})
        if self.runs.is_closing:
            raise Overloaded("the server is about to stop; try again when it is back", 5)
        lease, options, replay, after = exchange.lease, watch.options, form.replay, watch.after
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
        return self._pour(exchange, dialect.framing, None, rotates=True)

    async def _list_threads(self, dialect: Dialect, order: ListThreads) -> Answer:
        shown = []
        await trio.lowlevel.checkpoint()
        for thread in list(self.threads)[:MAX_LISTED]:
            await trio.lowlevel.checkpoint()
            shown.append(self.threads.snapshot(thread, default=dialect.agent))
        if order.reply is not None:
            return answer_reply(order.reply(shown))
        return answer_json(msgspec.json.encode({"threads": shown}))

    def _shown_thread(
        self, dialect: Dialect, thread: Thread, reply: ThreadReply | None, *, status: int = 200
    ) -> Answer:
        snapshot = self.threads.snapshot(thread, default=dialect.agent)
        if reply is not None:
            return answer_reply(reply(snapshot, thread.feed.events))
        return answer_json(encode_event(snapshot), status)

    def _show_thread(self, dialect: Dialect, order: ShowThread) -> Answer:
        thread = self.threads.find(order.thread_id)
        if order.conversation_reply is None:
            return self._shown_thread(dialect, thread, order.reply)
        run = thread.run
        said = self.runs.said_before(run) if run is not None else ()
        snapshot = self.threads.snapshot(thread, default=dialect.agent)
        shown, events = (run.snapshot(), run.log.events) if run else (None, ())
        return answer_reply(order.conversation_reply(snapshot, shown, events, said))

    def _list_agents(self, order: ListAgents) -> Answer:
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
            return answer_reply(order.reply(cards))
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
        return answer_json(msgspec.json.encode({"agents": shown}))

    # What operators ask for

    def _health(self, path: str) -> Answer:
        if path == READY and self.runs.is_closing:
            raise Overloaded("the server is about to stop", 5)
        return answer_json(b'{"status":"ok"}')

    def _open_pages(self) -> "Pages":
        from .pages import Pages  # noqa: PLC0415  # half the time of a start, for a few who ask

        return Pages(
            {METRICS: self._metrics, OPENAPI: self._openapi},
            self._paths.methods,
            allowed_hosts=self.options.allowed_hosts,
            crash=self._answer_crash,
        )

    async def _openapi(self) -> Answer:
        if self._document is None:
            self._document = await trio.to_thread.run_sync(
                self._make_document, limiter=self._loading
            )
        else:
            await trio.lowlevel.checkpoint()
        return answer_json(self._document)

    def _make_document(self) -> bytes:
        from .openapi import make_document  # noqa: PLC0415  # only for those who ask

        claimed = claim_paths(dialect.load() for dialect in self.dialects.values())
        return make_document(claimed, version=__version__)

    async def _metrics(self) -> Answer:
        await trio.lowlevel.checkpoint_if_cancelled()
        from .metrics import render  # noqa: PLC0415  # 60 ms, and only for those who ask

        text, kind = render(
            self.runs.statistics(), self.streams, self.connections, buckets=TEARDOWN_BUCKETS
        )
        return Answer(200, {"Content-Type": kind}, text)


def _shown(
    dialect: Dialect,
    run: Run,
    reply: RunReply | None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    *,
    brief: bool = False,
) -> Answer:
    """A run as an intent, or else the dialect, wants to show it."""
    snapshot = run.snapshot(brief=brief)
    match reply:
        case None:
            pass
        case ReplyWithHistory():
            said = run.owner.said_before(run)
            return answer_reply(reply.make(snapshot, run.log.events, said), headers)
        case _:
            return answer_reply(reply(snapshot, run.log.events), headers)
    return answer_json(dialect.present(snapshot), status, headers)
