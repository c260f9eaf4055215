"""Runs: started, queued, found, cancelled, supervised, retained, drained.

Knows: who may run, who still watches, why a run ends, and what it leaves behind. Must never know
HTTP or frames.

A run is one task in the supervisor nursery, with a nursery and a cancel scope of its own. All that
decides about it is sync, hence atomic; only `Run.supervise` awaits. It is the one place that
catches what an agent raises, and lets nothing through but what is not the agent's: a cancel from
outside. The end is appended in its `finally`, synchronously, so that nothing can come between.

Whoever reads a run holds it: streams, and clients that wait for a JSON answer. The last one to
leave decides, by the run's own policy, what becomes of it.
"""

import contextvars
import functools
import secrets
import traceback
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain
from typing import Any, Literal, assert_never

import attrs
import trio
from msgspec import UNSET, Raw
from msgspec.structs import replace

from .agents import Agent
from .context import Limits, RunContext, problem_of, running, unwrapped
from .dialects import Encoder, Start
from .errors import (
    AgentError,
    BadRequest,
    Conflict,
    KeyReused,
    NotFound,
    Overloaded,
    PreviousNotFound,
    Unencodable,
    redact,
)
from .events import (
    NULL,
    AgentFinished,
    AgentStarted,
    AnyEvent,
    Cause,
    Outcome,
    PartDelta,
    Problem,
    Receipt,
    RunFinished,
    RunSnapshot,
    RunStarted,
    RunState,
    Usage,
    decode_json,
    encode_json,
    text_of_json,
)
from .feed import Feed
from .log import (
    DELTAS,
    CloseReason,
    Coalescer,
    Due,
    Follow,
    Lag,
    Log,
    Position,
    Reader,
    Stamps,
    Timer,
)
from .messages import AssistantMessage, Message, ToolMessage, ToolSpec, UserMessage
from .models import ModelLoop, mended, size_of, well_ended
from .providers import MAX_CALLS, Provider
from .stores.memory import MemoryStore

MAX_WAYS = 16  # dialects and filters in which one run is read at once
MAX_DEPTH = 32  # runs below one another; agents that delegate in a circle end here
SECOND_CHANCE = 30.0  # seconds, at least, to come back to a stream that the server itself ended
OVERDUE = (
    1.0  # seconds beyond the cleanup time after which a run that is not gone is named in the log
)
# What makes a model refuse would make it refuse whatever follows in the thread.
MAX_TOOL_NAME = 128  # characters
UNSPEAKABLE = frozenset({"bad_request", "content_filter", "context_length"})
ID_BYTES = 16  # 128 random bits: a run's id is a capability
TEARDOWN_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


@attrs.frozen
class Policy:
    """What leaving a run means: cancel it, let it continue, or give a time to come back in."""

    kind: Literal["cancel", "continue", "grace"]
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str, grace: float) -> "Policy":
        """Read `cancel`, `continue`, `grace` (for `grace` seconds) or `grace:SECONDS`.

        Raises:
            BadRequest: It is none of them.
        """
        word, colon, number = text.partition(":")
        match word:
            case "cancel" | "continue" if not colon:
                return cls(word)
            case "grace" if not colon:
                return cls("grace", grace)
            case "grace" if number.isascii() and number.isdigit() and len(number) < 8:
                return cls("grace", float(number))
            case _:
                raise BadRequest(
                    "on_disconnect: expected 'cancel', 'continue', 'grace' or 'grace:SECONDS', "
                    f"got {text!r}"
                )

    def __str__(self) -> str:
        return f"grace:{self.seconds:.10g}" if self.kind == "grace" else self.kind


@attrs.frozen
class _Signal:
    cause: Cause
    at: float
    tasks: int
    reason: str | None
    in_time: bool  # before the agent had returned


@attrs.define(eq=False, repr=False)
class Thread:
    """A conversation: its runs, and the feed of all that happens in them.

    Attributes:
        active: Runs that go on or wait for their turn, in their order.
        kept: Those that are over and still retained.
        workers: Child runs of either, at any depth.
        holders: Whoever wants it to stay although there is no run: readers, an open session.
        is_closed: Whether it was closed: its feed is over with the last run that goes on.
    """

    id: str
    feed: Feed
    created: str
    active: "list[Run]" = attrs.field(factory=list)
    kept: "list[Run]" = attrs.field(factory=list)
    workers: "list[Run]" = attrs.field(factory=list)
    holders: set[object] = attrs.field(factory=set)
    is_closed: bool = False

    @property
    def is_behind(self) -> bool:
        """Whether something that was said to it has not been heard yet."""
        return any(not run.holds_place or run.context.has_unheard for run in self.active)

    @property
    def run(self) -> "Run | None":
        """The run that goes on, else the first that waits for its turn, else the last one kept."""
        going_on = (run for run in self.active if run.holds_place)
        return next(chain(going_on, self.active, reversed(self.kept)), None)

    @property
    def unread(self) -> "Run | None":
        """The last run that goes on, else the last one if nobody has read it to its end."""
        going_on = (run for run in reversed(self.active) if run.state != "cancelling")
        over = (run for run in self.kept[-1:] if not (run.was_read or run.was_left))
        return next(chain(going_on, over), None)

    @property
    def running(self) -> "Run | None":
        """The run that goes on and has not been asked to end."""
        run = next((run for run in self.active if run.holds_place), None)
        return None if run is None or run.state == "cancelling" else run


@attrs.define(eq=False, repr=False)
class Run:
    """One execution of an agent: a log, a cancel scope, a nursery, and those who watch.

    Attributes:
        home: The thread whose feed tells of it; a child run's is that of the run above.
        done: Set when the run is over: its nursery has exited and its last event is in the log.
        was_read: Whether somebody has been sent all of it.
        conversation: What later runs of its thread are told of it, once it is over.
        told: What was said before it, where that is not what its thread knows; until it begins.
        previous: What those are told of that continue it: the run that it continues itself, or
            what was said before it.
        lead: How many messages of its conversation were said before the last one that began it.
        is_unwanted: Nothing is to be kept of it.
    """

    id: str
    agent: Agent
    policy: Policy
    input: Raw
    metadata: Raw
    thread_id: str | None
    parent: "Run | None"  # while it goes on
    parent_id: str | None
    log: Log
    timeout: float
    created: str
    owner: "Runs"
    context: RunContext = attrs.field(init=False)
    home: Thread | None = None
    depth: int = 0
    started: str | None = None
    finished: str | None = None
    end: RunFinished | None = None
    conversation: tuple[Message, ...] = ()
    conversation_size: int = 0
    told: tuple[Message, ...] | None = None
    previous: "weakref.ref[Run] | tuple[Message, ...] | None" = None
    lead: int = 0
    is_unwanted: bool = False
    shown: str | None = None  # of what was said to begin it
    done: trio.Event = attrs.field(factory=trio.Event)
    was_read: bool = False
    children: "set[Run]" = attrs.field(factory=set)
    made: int = 0  # children, ever
    idempotency: tuple[str, bytes] | None = None
    holds_place: bool = False  # of max_running; child runs and queued ones hold none
    lends_place: bool = False  # to others, while a person thinks
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _task: trio.lowlevel.Task | None = None
    _nursery: trio.Nursery | None = None
    _returned: bool = False
    _signal: _Signal | None = None
    _holders: dict[object, Policy | None] = attrs.field(factory=dict)
    _left: Policy | None = None  # of the last one to leave
    _is_paused: bool = False
    _grace: Due | None = None
    _deadline: Due | None = None
    _input_deadline: Due | None = None
    _overdue: Due | None = None
    _full: str | None = None
    _asking: trio.Event | None = None
    _began: float = attrs.field(factory=trio.current_time)

    def __repr__(self) -> str:
        return f"<Run {self.id} of {self.agent.name!r}, {self.state}>"

    @property
    def state(self) -> RunState:
        """Where it stands."""
        if self.log.closed:
            return "finished"
        if self._signal is not None:
            return "cancelling"
        if self.started is None:
            return "queued"
        if self.context.asked:
            return "waiting"
        return "paused" if self.context.is_resting else "running"

    # Those who watch

    def attach(
        self,
        key: Hashable,
        make: Callable[[], Encoder],
        after: Position,
        *,
        ends_at: frozenset[type[AnyEvent]] = frozenset(),
        reads_on: bool = False,
        past: int = 0,
        is_plain: bool = False,
        policy: Policy | None = None,
    ) -> Reader:
        """Open a reader behind `after`; it holds the run until `detach`.

        Where it ends is `Log.attach`'s to say. With `is_plain` it reads without a filter, for which
        there is always room.

        Raises:
            BadRequest: The place is past the end of the log.
            Overloaded: It is read in too many ways at once.
        """
        if after.seq > self.log.end or (after.seq == 0 and after.part):
            raise BadRequest(
                f"expected a place in the run's {self.log.end} events, "
                f"got {after.seq}{f'.{after.part}' if after.part else ''}; 0 stands for all of them"
            )
        if self.log.ways >= MAX_WAYS and not (is_plain or self.log.is_read_by(key)):
            raise Overloaded(
                f"the run is read in {self.log.ways} ways already, each a copy of its frames: "
                "use one of the filters in use, or none"
            )
        reader = self.log.attach(key, make, after, ends_at=ends_at, reads_on=reads_on, past=past)
        self.hold(reader, policy)
        return reader

    def detach(self, reader: Reader, reason: CloseReason) -> None:
        """Close a reader, and let go of the run."""
        self.log.detach(reader)
        if reason == "finished" and self.log.closed:
            self.was_read = True
        self.release(reader, reason)

    @property
    def was_left(self) -> bool:
        """Whether it was cancelled because nobody watched it any more."""
        return self.end is not None and self.end.receipt.cause == "disconnect"

    @property
    def settled(self) -> int:
        """How many events there are before the first question that is still open."""
        asked = self.context.asked
        return next(iter(asked.values())).event.seq - 1 if asked else self.log.end

    @property
    def is_held(self) -> bool:
        """Whether somebody waits for it, or leaving it would not end it."""
        return bool(self._holders) or self.policy.kind == "continue"

    def hold(self, holder: object, policy: Policy | None = None) -> None:
        """Count somebody who waits for this run, in whatever way.

        Args:
            holder: Who lets go of it later.
            policy: What it means if this one is the last to leave; the run's unless given.
        """
        self._holders[holder] = policy
        self._left = None
        self._stop(self._grace)

    def release(self, holder: object, reason: CloseReason) -> None:
        """Let go; the last one to leave decides by its policy, or the run's."""
        policy = self._holders.pop(holder, None) or self.policy
        if self._holders or self.log.closed:
            return
        match reason:
            case "client_left":
                self._left = policy
                self._abandon(policy)
            case "slow_client" | "rotated" | "error":  # the server's doing: they may come back
                self._left = policy
                self._abandon(_at_least_second_chance(policy))
            case "finished" | "shutdown":
                pass
            case _:
                assert_never(reason)

    def _abandon(self, policy: Policy) -> None:
        if self.context.asked:  # somebody may be thinking about the answer
            return
        match policy.kind:
            case "cancel":
                self.cancel("disconnect")
            case "grace":
                self._stop(self._grace)
                self._grace = self.owner.timer.call_at(
                    trio.current_time() + policy.seconds, lambda: self.cancel("disconnect")
                )
            case "continue":
                pass
            case _:
                assert_never(policy.kind)

    # The end

    def cancel(self, cause: Cause, *, reason: str | None = None) -> None:
        """Ask the run to end, now; the first cause stands. Sync; `done` says when it is gone."""
        if self.log.closed or self._signal is not None:
            return
        for child in self.children:
            child.note_parent_cancelled()
        self._note(cause, reason)
        overdue = trio.current_time() + self.owner.limits.cleanup + OVERDUE
        self._overdue = self.owner.timer.call_at(overdue, self._report_overdue)
        if self.started is None:
            self.owner.drop_queued(self)
        else:
            self._scope.cancel(reason=cause)

    def cancel_after_step(self, *, reason: str | None = None) -> None:
        """Ask the run to end as soon as no step is under way."""
        if self.started is None or not self.context.is_in_step:
            self.cancel("client_cancel", reason=reason)
            return

        def step_finished() -> None:
            if not self.context.is_in_step:
                self.cancel("client_cancel", reason=reason)

        if self.context.on_step_finished is None:  # who asked first is named
            self.context.on_step_finished = step_finished

    def note_parent_cancelled(self) -> None:
        """Remember that the parent's cancel is on its way down here."""
        for child in self.children:
            child.note_parent_cancelled()
        if not self.log.closed and self._signal is None:
            self._note("parent", None)

    def _note(self, cause: Cause, reason: str | None) -> None:
        now = trio.current_time()
        self._signal = _Signal(cause, now, self._count_tasks(), reason, not self._returned)
        self.context.is_cancelled = True
        self._stop(self._grace)

    def _count_tasks(self) -> int:
        """Tasks of the run that are alive: its own, and all in nurseries below."""
        task = self._task
        if task is None or self._nursery is None:
            return 0
        # A child run lives in a task of its parent: what that had opened before is not the child's.
        nurseries = task.child_nurseries
        return 1 + sum(map(_tasks_in, nurseries[nurseries.index(self._nursery) :]))

    def _report_overdue(self) -> None:
        self.owner.report(
            "run_overdue",
            run_id=self.id,
            agent=self.agent.name,
            cause=self._signal.cause if self._signal else None,
            tasks=self._count_tasks(),
            hint="something in it shields itself from cancellation for longer than its cleanup",
        )

    def pause(self, reason: str | None = None) -> None:
        """Ask the run, and all below it, to rest before the next step.

        Raises:
            Conflict: It is over.
        """
        if self.log.closed:
            raise Conflict(f"expected a run that goes on, got {self.id}, which is over")
        self._is_paused = True  # with all below it, unlike one that pauses itself
        self.context.pause(reason)
        for child in self.children:
            child.pause(reason)

    def resume(self) -> None:
        """Let the run go on, with all below it; nothing where it was not asked to rest."""
        self._is_paused = False
        self.context.resume()
        for child in self.children:
            child.resume()

    # What the run's context asks for

    def report_crash(self, error: BaseException, where: str, /) -> None:
        """Write an error that clients do not get to see to the server's log."""
        _report_crash(self.owner.report, error, run_id=self.id, agent=self.agent.name, where=where)

    def limit_reached(self, what: str, /) -> None:
        """End the run: its log is as long as it may be."""
        self._full = what
        self.cancel("limit")

    async def wait_done_or_asking(self) -> None:
        """Wait until the run is over, or waits for a person itself."""
        await trio.lowlevel.checkpoint()
        while not (self.done.is_set() or self.context.asked):
            if self._asking is None:
                self._asking = trio.Event()
            await self._asking.wait()

    def _wake_waiting(self) -> None:
        if self._asking is not None:
            self._asking.set()
            self._asking = None

    def input_changed(self) -> None:
        """Watch the time while a person is asked; then see whether anybody is still there."""
        self._stop(self._input_deadline)
        self.owner.lend_place(self, is_lent=bool(self.context.asked))
        if self.context.asked:
            self._wake_waiting()
            self._stop(self._grace)
            since = next(iter(self.context.asked.values())).since  # the first one asked
            until = since + self.owner.limits.input_timeout
            self._input_deadline = self.owner.timer.call_at(
                until, lambda: self.cancel("input_timeout")
            )
        elif self._left and not self._holders:
            self._abandon(_at_least_second_chance(self._left))

    def make_child(self, agent: Agent | str, input: Any, /) -> "Run":
        """Make a run below this one, which has begun; `run_below` sees it to its end."""
        child = self.owner.make_child(self, agent, input)
        self.children.add(child)
        if self._is_paused:
            child.pause()
        return child

    # What the run above asks for

    def begun(self) -> AgentStarted:
        """How the run above tells that this one has begun."""
        return AgentStarted(agent=self.agent.name, child_run_id=self.id, input=self.input)

    def reported(self, problem: Problem | None, /) -> AgentFinished:
        """How the run above tells that this one is over."""
        end = self.end
        if end is not None and end.outcome == "success":
            problem = None  # the run above may have been cancelled in the meantime
        return AgentFinished(
            agent=self.agent.name,
            child_run_id=self.id,
            report=end.result if end is not None else UNSET,
            error=problem,
            usage=end.usage if end is not None else None,
            seconds=round(trio.current_time() - self._began, 6),
        )

    async def run_below(self) -> Any:
        """Run to the end in the calling task, and return the result.

        Raises:
            AgentError: It ended in any other way than with success.
        """
        parent = self.parent
        assert parent is not None
        try:
            await self.supervise()
        finally:
            parent.children.discard(self)
        await trio.lowlevel.checkpoint_if_cancelled()
        end = self.end
        assert end is not None
        if end.outcome != "success":
            said = end.error.message if end.error else f"it was {end.outcome}"
            raise AgentError(f"the child run {self.id} of {self.agent.name!r}: {said}")
        return self.result

    @property
    def result(self) -> Any:
        """The result as Python's plain types, or None while there is none."""
        if self.end is None or self.end.result is UNSET:
            return None
        return decode_json(self.end.result)

    # The task

    def begin(self) -> None:
        """Note that the run starts; its task follows."""
        self.started = self.log.stamps.now()
        self.context.append(
            RunStarted(
                agent=self.agent.name,
                input=self.input,
                on_disconnect=str(self.policy),
                thread_id=self.thread_id,
                parent_run_id=self.parent_id,
                client_tools=tuple(spec.name for spec in self.context.client_tools),
            )
        )
        if self.shown is not None:
            self.context.tell_of_message(self.shown, "steer")
        self._deadline = self.owner.timer.call_at(
            trio.current_time() + self.timeout, lambda: self.cancel("deadline")
        )

    async def supervise(self) -> None:
        """Run the agent to its end, whatever that is.

        Raises:
            trio.Cancelled: Cancelled from outside, with the run's end in its log all the same.
        """
        result: Raw | None = None
        foreign: BaseException | None = None
        error: BaseException | None = None
        was_cancelled_outside = True
        try:
            with running(self.context):
                async with trio.open_nursery(strict_exception_groups=True) as nursery:
                    self._task, self._nursery = trio.lowlevel.current_task(), nursery
                    if self._scope.cancel_called:  # before the task began
                        nursery.cancel_scope.cancel()
                    self._scope = nursery.cancel_scope
                    self.context.nursery = nursery
                    # A copy: nobody else's hand is on it. If it is too deep, that ends this run.
                    self.context.input = decode_json(self.input)
                    value = await self.agent.function(self.context, self.context.input)
                    self._returned = True
                    result = encode_json(value, what=f"the result of {self.agent.name}")
            was_cancelled_outside = False
        except BaseExceptionGroup as group:
            # What is not the agent's goes on; a real error beside it is still the run's error.
            foreign, error = group.split((trio.Cancelled, KeyboardInterrupt))
            if foreign is not None:
                raise foreign from None
            was_cancelled_outside = False
        except Exception as misnested:  # noqa: BLE001  # Trio's word for scopes left out of order
            error, was_cancelled_outside = misnested, False
        finally:
            self._task = self._nursery = None
            if was_cancelled_outside and self._signal is None:
                self._note("parent" if self.parent_id else "shutdown", None)
            self.finish(result, error)
            foreign = error = None  # they hold this frame, which holds them

    def finish(self, result: Raw | None, error: BaseException | None) -> None:
        """Append the one end, and let go of everything; sync, legal while cancelled."""
        for due in (self._grace, self._deadline, self._input_deadline, self._overdue):
            self._stop(due)
        try:
            end = self._make_end(result, error)
            self.context.finish_parts()
            self.context.finish_tools()
            self.context.writer.append(end)
        except Exception as unfit:  # noqa: BLE001  # an agent may have put anything into its usage
            self.report_crash(unfit, f"the end of {self.agent.name!r}")
            problem = problem_of(unfit, f"the end of {self.agent.name!r}")
            end = RunFinished(
                outcome="error", usage=Usage(), receipt=self._receipt(), error=problem
            )
            self.log.append(end)
        self.end = end
        self.told = None
        self.log.close()
        self.finished = end.ts
        if self.thread_id is not None and self.holds_place:  # else nobody has heard of it
            self._remember(end)
        self._report_end(end)
        unheard = self.context.take_messages()
        self.owner.retire(self)
        self.parent = None  # or what is kept of this one would keep that one
        self.done.set()
        self._wake_waiting()
        self.context.dissolve()
        # Whoever cancels a run takes back what was said to it; who only leaves it does not.
        if unheard and end.receipt.cause not in ("client_cancel", "parent", "shutdown"):
            self.owner.unheard(self, unheard)

    def _make_end(self, result: Raw | None, error: BaseException | None) -> RunFinished:
        problem = self._problem(error)
        if self._signal is None and result is None and problem is None:
            problem = Problem(
                code="no_result",
                message="expected the agent to return, or to raise, but it cancelled itself",
            )
        if self._signal is not None and self._signal.cause == "limit":
            problem = Problem(
                code="limit",
                message=f"the run's log has reached its bound: {self._full}",
                status=507,
            )
        outcome = self._outcome(problem)
        return RunFinished(
            outcome=outcome,
            usage=self.context.usage,
            receipt=self._receipt(),
            result=UNSET if result is None or outcome != "success" else result,
            error=problem,
            pending=self.context.pending if outcome == "success" else (),
        )

    def _report_end(self, end: RunFinished) -> None:
        told: dict[str, object] = {}
        if end.error is not None:
            told |= {"error": end.error.code, "message": redact(end.error.message)}
        if self._signal is not None:
            told |= {"cause": end.receipt.cause, "teardown_s": end.receipt.seconds}
            told |= {"tasks": end.receipt.tasks}
            told |= {} if self._signal.reason is None else {"reason": self._signal.reason}
        self.owner.report(
            "run_finished",
            run_id=self.id,
            agent=self.agent.name,
            outcome=end.outcome,
            seconds=round(trio.current_time() - self._began, 6),
            events=self.log.end,
            **told,
        )

    def _problem(self, error: BaseException | None) -> Problem | None:
        if error is None:
            return None
        problem = problem_of(error, f"the agent {self.agent.name!r}")
        if problem.code in ("crashed", "system_exit"):
            self.report_crash(error, f"the agent {self.agent.name!r}")
        return problem

    def _outcome(self, problem: Problem | None) -> Outcome:
        signal = self._signal
        if signal is not None and signal.cause == "limit":
            return "error"
        if signal is not None and signal.in_time:
            return "interrupted" if signal.cause == "input_timeout" else "cancelled"
        return "success" if problem is None else "error"

    def _receipt(self) -> Receipt:
        threads = self.context.workers.abandoned
        if self._signal is None:
            return Receipt(threads_abandoned=threads)
        return Receipt(
            cause=self._signal.cause,
            seconds=round(trio.current_time() - self._signal.at, 6),
            tasks=self._signal.tasks,
            threads_abandoned=threads,
        )

    def snapshot(self, *, brief: bool = False) -> RunSnapshot:
        """The run as it stands, with what it has said so far unless it is to be brief."""
        end = self.end
        return RunSnapshot(
            id=self.id,
            agent=self.agent.name,
            state=self.state,
            on_disconnect=str(self.policy),
            created=self.created,
            started=self.started,
            finished=self.finished,
            thread_id=self.thread_id,
            parent_run_id=self.parent_id,
            outcome=end.outcome if end else None,
            result=end.result if end and end.result is not UNSET else NULL,
            error=end.error if end else None,
            usage=end.usage if end else self.context.usage,
            receipt=end.receipt if end else None,
            events=self.log.end,
            questions=self.context.open_questions(),
            input=UNSET if brief else self.input,
            metadata=UNSET if brief else self.metadata,
            output=UNSET if brief else self._output(),
            values=UNSET if brief else self.context.values_json(),
        )

    def _remember(self, end: RunFinished) -> None:
        """Note what later runs of the thread are told; nothing where it is what was wrong."""
        if end.error is not None and end.error.code in UNSPEAKABLE:
            return
        try:
            conversation = self._conversation(end)
            told = self.previous if isinstance(self.previous, tuple) else ()
            self.conversation_size = size_of(conversation) + size_of(told)
            self.conversation = conversation
        except Exception as error:  # noqa: BLE001  # an agent may have put anything into it
            self.report_crash(error, f"the conversation of {self.agent.name!r}")

    def _conversation(self, end: RunFinished) -> tuple[Message, ...]:
        """What was said: by a model's own account, else the input and the text that came of it."""
        if self.context.conversation:
            return well_ended(self.context.conversation, awaited=end.pending)
        said = self._output() if end.outcome == "success" else mended(self._output())
        if not said and end.result not in (UNSET, NULL):
            said = text_of_json(end.result)
        before = (self.context.said or ())[:-1]
        question = UserMessage(text_of_json(self.input))
        return (*before, question, *((AssistantMessage(said),) if said else ()))

    def _output(self) -> str:
        return "".join(
            event.delta
            for event in self.log.events
            if isinstance(event, PartDelta) and event.kind == "text"
        )

    def _stop(self, due: Due | None) -> None:
        if due is not None:
            due.cancel()


def _at_least_second_chance(policy: Policy) -> Policy:
    if policy.kind == "continue":
        return policy
    return Policy("grace", max(policy.seconds, SECOND_CHANCE))


@attrs.frozen
class RunStatistics:
    """What operators want to know of runs."""

    queued: int
    running: int
    retained: int
    retained_bytes: int
    finished: Mapping[Outcome, int]
    events: int
    teardowns: tuple[int, ...]  # how many took up to each of TEARDOWN_BUCKETS, and longer
    teardown_seconds: float
    loop_lag: float
    worst_loop_lag: float


def _ignore(_event: str, **_facts: Any) -> None:
    """Report to nobody."""


def contained(report: Callable[..., object]) -> Callable[..., None]:
    """Make a report that never raises: what it is told of must not end because of it."""

    def told(event: str, **facts: Any) -> None:
        with suppress(Exception):
            report(event, **facts)

    return told


@attrs.define(eq=False, repr=False)
class Runs:
    """All runs of a server. Made by `open_runs`, which owns the nursery they live in."""

    agents: Mapping[str, Agent]
    limits: Limits
    providers: Mapping[str, Provider]
    report: Callable[..., object]
    timer: Timer
    nursery: trio.Nursery
    lag: Lag = attrs.field(factory=Lag)
    stamps: Stamps = attrs.field(factory=Stamps)
    is_closing: bool = False
    unheard: Callable[[Run, list[str]], object] = lambda _run, _messages: None
    """Told of what was said to a run that ended before it had listened."""
    _active: dict[str, Run] = attrs.field(factory=dict)
    _queue: dict[Run, None] = attrs.field(factory=dict)  # in their order
    _running: Counter[str] = attrs.field(factory=Counter)  # by agent, child runs not counted
    _lent: int = 0  # places of runs that wait for a person
    threads: dict[str, Thread] = attrs.field(factory=dict)
    _keys: dict[str, Run] = attrs.field(factory=dict)  # idempotency keys
    _finished: Counter[Outcome] = attrs.field(factory=Counter)
    _events: int = 0
    _teardowns: list[int] = attrs.field(factory=lambda: [0] * (len(TEARDOWN_BUCKETS) + 1))
    _teardown_seconds: float = 0.0
    _expiry: Due | None = None
    _idle: trio.Event | None = None
    feed: Feed = attrs.field(init=False)
    _kept: MemoryStore[Run] = attrs.field(init=False)
    _limiter: trio.CapacityLimiter = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        limits = self.limits
        self._kept = MemoryStore(limits.retain_runs, limits.retain_bytes, limits.retain_age)
        self._limiter = trio.CapacityLimiter(limits.max_threads)
        self.feed = Feed(self.stamps, when_used=self._tell_feed)

    def start(self, order: Start, *, default: str, agent: str | None = None) -> tuple[Run, bool]:
        """Start a run, or queue it; sync, so that a reader can be attached in the same step.

        Args:
            order: What the client asked for.
            default: The policy where neither the client nor the agent names one.
            agent: Who runs where the client names nobody; the server's first one unless given.

        Returns:
            The run, and whether it is new: the same idempotency key finds the same run again.

        Raises:
            NotFound: There is no such agent, or no run that it continues.
            BadRequest: The policy is none.
            Conflict: The thread is busy, and the client did not want to wait; or the run that it
                wants to continue goes on.
            KeyReused: The key came before with another body.
            Overloaded: The queue is full, or the server is about to stop.
        """
        chosen = self.choose_agent(order.agent, *order.otherwise, default=agent)
        key = f"{chosen.name}\n{order.idempotency_key}" if order.idempotency_key else None
        if key is not None and (known := self._keys.get(key)) is not None:
            if known.idempotency != (key, order.fingerprint):
                raise KeyReused(
                    "expected the body that this Idempotency-Key first came with, got another one; "
                    "use a new key for a new request"
                )
            return known, False
        if self.is_closing:
            raise Overloaded("the server is about to stop; try again when it is back", 5)
        previous = None if order.continues is None else self.find_previous(order)
        if previous is not None:
            if not previous.log.closed:
                raise Conflict(f"expected a run that is over, got {previous.id}, which goes on")
            if previous.thread_id is None:
                raise BadRequest(
                    f"expected a run of a thread to be continued, got {previous.id}, which is of "
                    "none: nobody remembers what was said in it"
                )
            order = replace(order, thread_id=previous.thread_id)
        policy = Policy.parse(
            order.on_disconnect or chosen.on_disconnect or default, self.limits.grace
        )
        thread = self.find_thread(order.thread_id)
        busy = tuple(thread.active) if thread is not None else ()
        # Of what is being cancelled nobody expects anything any more.
        in_the_way = order.if_busy == "supersede" and any(
            run.is_held and run.state != "cancelling" for run in busy
        )
        if in_the_way or (busy and order.if_busy == "reject"):
            raise Conflict(
                f"the thread {order.thread_id!r} is busy with the run {busy[0].id}: wait for its "
                'end, cancel it, or send "if_busy": "enqueue"'
            )
        if order.run_id in self._active or (order.run_id and self._kept.find(order.run_id)):
            raise Conflict(
                f"expected the id of a new run, got {order.run_id[:80]!r}, which there is already"
            )
        run = self._make(chosen, order.input, policy=policy, order=order)
        leaving = sum(other in self._queue for other in busy) if order.if_busy == "supersede" else 0
        if len(self._queue) - leaving >= self.limits.max_queued and not self._has_room(run):
            raise Overloaded(
                f"all places are taken and {len(self._queue)} runs are waiting; try again later"
            )
        run.told, run.lead = order.history, max(len(order.said or ()) - 1, 0)
        if previous is not None and run.told is None:
            run.told = (*self._told_to(previous), *previous.conversation)
            run.previous = weakref.ref(previous)
        elif order.makes_thread or previous is not None:
            run.previous = run.told
        if order.said is not None and run.told is not None:
            _see_results(order.said, run.told)
        if order.if_busy == "supersede":
            for other in reversed(busy):  # queued ones first, or they would be let in one by one
                other.cancel("client_cancel", reason=f"the run {run.id} takes its place")
        if key is not None:
            run.idempotency = (key, order.fingerprint)
            self._keys[key] = run
        self._active[run.id] = run
        if run.thread_id is not None:
            run.home = self.open_thread(run.thread_id)
            run.home.active.append(run)
            run.log.follow = self._follow(run.home)
        self._queue[run] = None
        self._admit()
        return run, True

    def said_before(self, run: Run) -> tuple[Message, ...]:
        """What was said before a run, as it was told, as far as that is kept."""
        if run.log.closed:
            return (*self._told_to(run), *run.conversation[: run.lead])
        told = run.told
        if told is None:
            told = self._told_to(run) if run.started is None else run.context.history
        return (*told, *(run.context.said or ())[:-1])

    def _told_to(self, run: Run) -> tuple[Message, ...]:
        """What a run was told by others: those that it continues, or those before it."""
        said: list[Sequence[Message]] = []
        while isinstance(run.previous, weakref.ref):
            previous = run.previous()
            if previous is None or self._kept.find(previous.id) is not previous:
                break
            run = previous
            said.append(run.conversation)
        else:
            if run.previous is not None:
                said.append(run.previous)
            elif run.home is not None:
                kept = run.home.kept
                before = kept[: kept.index(run)] if run in kept else kept
                said += [other.conversation for other in reversed(before)]
        return tuple(chain.from_iterable(reversed(said)))

    def make_child(self, parent: Run, agent: Agent | str, input: Any) -> Run:
        """Make a run below another; it has begun, and whoever made it supervises it."""
        agent = self.find_agent(agent) if isinstance(agent, str) else agent
        if parent.depth >= MAX_DEPTH:
            raise AgentError(
                f"expected at most {MAX_DEPTH} runs below one another: do agents delegate in a "
                "circle?",
                code="too_deep",
            )
        child = self._make(agent, input, policy=Policy("continue"), parent=parent)
        self._active[child.id] = child
        if (home := parent.home) is not None:
            child.home = home
            home.workers.append(child)
            child.log.follow = self._follow(home)
        child.begin()
        return child

    def find(self, run_id: str) -> Run:
        """The run of that id, whether it goes on or is over.

        Raises:
            NotFound: There is none, or it is no longer kept.
        """
        run = self.look_up(run_id)
        if run is None:
            raise NotFound(
                f"expected the id of a run that goes on or is still kept, got {run_id[:80]!r}"
            )
        return run

    def look_up(self, run_id: str | None) -> Run | None:
        """The run of that id, or None."""
        return None if run_id is None else self._active.get(run_id) or self._kept.find(run_id)

    def find_previous(self, order: Start) -> Run:
        """The run that is to be continued; raises `PreviousNotFound`."""
        run_id = order.continues or ""
        run = self.look_up(run_id)
        if run is None or order.thread_id not in (None, run.thread_id):
            where = "" if order.thread_id is None else f" in the thread {order.thread_id[:80]!r}"
            raise PreviousNotFound(
                f"expected the id of a run that goes on or is still kept{where}, "
                f"got {run_id[:80]!r}"
            )
        return run

    def find_agent(self, name: str) -> Agent:
        """The agent of that name; raises `NotFound` if there is none."""
        agent = self.agents.get(name)
        if agent is None:
            known = ", ".join(sorted(self.agents)) or "(none)"
            raise NotFound(f"expected one of the agents {known}, got {name[:80]!r}")
        return agent

    def choose_agent(self, name: str | None, *otherwise: str, default: str | None = None) -> Agent:
        """The first of these agents that there is, each by its name or the model it runs on.

        Args:
            name: None where whoever there is will do in the end.
            otherwise: More names.
            default: Who that is; the server's first agent unless given.

        Raises:
            NotFound: There is none of them.
        """
        wanted = otherwise if name is None else (name, *otherwise)
        for each in wanted:
            if each in self.agents:
                return self.agents[each]
            for agent in self.agents.values():
                if agent.model == each:
                    return agent
        return self.find_agent(name or default or next(iter(self.agents), "(none)"))

    def find_run_of(self, thread_id: str, run_id: str) -> Run:
        """The run of that id, which must be of that thread; raises `NotFound`."""
        run = self.find(run_id)
        if run.thread_id != thread_id:
            raise NotFound(f"expected a run of the thread {thread_id[:80]!r}, got {run_id[:80]!r}")
        return run

    def find_thread(self, thread_id: str | None) -> Thread | None:
        """The thread of that id, if there is one."""
        return None if thread_id is None else self.threads.get(thread_id)

    def open_thread(self, thread_id: str) -> Thread:
        """The thread of that id, made where there is none; it stays as long as something is in it.

        What is not a run's is put into its `holders`, and `drop_thread` is called afterwards.
        """
        thread = self.threads.get(thread_id)
        if thread is None:
            thread = Thread(thread_id, Feed(self.stamps), self.stamps.now())
            self.threads[thread_id] = thread
        return thread

    def drop_thread(self, thread: Thread) -> None:
        """Forget a thread, unless something is in it."""
        if not (thread.active or thread.kept or thread.workers or thread.holders):
            self.forget_thread(thread)

    def close_thread(self, thread: Thread) -> None:
        """Forget a thread; its feed is over when nothing goes on in it any more."""
        thread.is_closed = True
        self.forget_thread(thread)
        if not thread.active:
            thread.feed.finish()

    def forget_thread(self, thread: Thread) -> None:
        """Forget a thread with all that was said in it; its runs are kept as long as others."""
        if self.threads.get(thread.id) is thread:
            del self.threads[thread.id]

    def _follow(self, thread: Thread | None) -> Follow | None:
        """Who is told of what a run says: its thread's feed, and the server's once it is used."""
        feed = self.feed
        if thread is None and not feed.is_used:
            return None

        def tell(events: Sequence[AnyEvent], size: int) -> None:
            if thread is not None:
                thread.feed.extend(events, size)
            if feed.is_used and (told := [e for e in events if type(e) not in DELTAS]):
                feed.extend(told, size * len(told) // len(events))

        return tell

    def _tell_feed(self) -> None:
        """From now on, tell the server's feed of what runs say; before, each would only ask."""
        for run in self._active.values():
            run.log.follow = self._follow(run.home)

    def __iter__(self) -> Iterator[Run]:
        """Every run there is, the newest first of those that go on, then of those that are over."""
        return chain(reversed(self._active.values()), self._kept)

    def refuse(self) -> None:
        """Start nothing any more, and end the streams of all feeds: they would go on for ever."""
        self.is_closing = True
        for feed in (self.feed, *(thread.feed for thread in self.threads.values())):
            feed.close("shutdown")

    def close(self, cause: Cause = "shutdown") -> None:
        """Start nothing any more, and cancel what goes on; `wait_idle` says when it is gone."""
        self.refuse()
        queued_first = [*self._queue, *self._active.values()]  # or they would be let in one by one
        for run in queued_first:
            if run.parent_id is None:
                run.cancel(cause)

    async def wait_idle(self) -> None:
        """Wait until no run goes on."""
        if not self._active:
            await trio.lowlevel.checkpoint()
        while self._active:
            if self._idle is None:
                self._idle = trio.Event()
            await self._idle.wait()

    def unfinished(self) -> list[Run]:
        """The runs that go on."""
        return list(self._active.values())

    def statistics(self) -> RunStatistics:
        """Counts for operators, as of now."""
        events = self._events + sum(run.log.end for run in self._active.values())
        return RunStatistics(
            queued=len(self._queue),
            running=len(self._active) - len(self._queue),
            retained=len(self._kept),
            retained_bytes=self._kept.size,
            finished=dict(self._finished),
            events=events,
            teardowns=tuple(self._teardowns),
            teardown_seconds=self._teardown_seconds,
            loop_lag=self.lag.last,
            worst_loop_lag=self.lag.worst,
        )

    # What runs tell their owner

    def lend_place(self, run: Run, *, is_lent: bool) -> None:
        """Let others run while a run waits for a person, who may never come.

        Once it is answered it goes on, even if all places are taken by then. Of those that wait no
        more lend theirs than there are places: so that there is an end to them, too.
        """
        if not run.holds_place or is_lent == run.lends_place:
            return
        if is_lent and self._lent >= self.limits.max_running:
            return
        was_full = self._lent >= self.limits.max_running
        run.lends_place = is_lent
        change = -1 if is_lent else 1
        self._lent -= change
        self._running[run.agent.name] += change
        if is_lent:
            self._admit()
        elif was_full:
            for other in self._active.values():
                if other.context.asked and other.holds_place and not other.lends_place:
                    self.lend_place(other, is_lent=True)
                    break

    def drop_queued(self, run: Run) -> None:
        """End a run that has not begun: it has a beginning and an end all the same."""
        del self._queue[run]
        run.begin()
        run.finish(None, None)

    def retire(self, run: Run) -> None:
        """Keep a run that has just ended, and let the next one in."""
        del self._active[run.id]
        end = run.end
        assert end is not None
        self._finished[end.outcome] += 1
        self._events += run.log.end
        if end.receipt.cause is not None:
            self._teardowns[bisect_left(TEARDOWN_BUCKETS, end.receipt.seconds)] += 1
            self._teardown_seconds += end.receipt.seconds
        if run.thread_id is not None and run.home is not None:
            run.home.active.remove(run)
            run.home.kept.append(run)
            if run.home.is_closed and not run.home.active:
                run.home.feed.finish()
        self.lend_place(run, is_lent=False)
        if run.holds_place:
            self._running[run.agent.name] -= 1
        now = trio.current_time()
        size = run.log.size + len(bytes(run.metadata)) + run.conversation_size
        self._forget(self._kept.keep(run.id, run, size=size, now=now))
        if run.is_unwanted:
            self.forget(run)
        if self._expiry is None:
            self._expiry = self.timer.call_at(now + self.limits.retain_age, self._expire)
        self._admit()
        if self._idle is not None and not self._active:
            self._idle.set()
            self._idle = None

    def _make(
        self,
        agent: Agent,
        input: Any,
        *,
        policy: Policy,
        order: Start | None = None,
        parent: Run | None = None,
    ) -> Run:
        limits = self.limits
        run_id = (order and order.run_id) or secrets.token_hex(ID_BYTES)
        path: tuple[str, ...] = ()
        if parent is not None:
            parent.made += 1
            path = (*parent.log.path, f"{agent.name}:{parent.made}")
        log = Log(run_id, self.stamps, path, self._follow(None))
        metadata = order.metadata if order else None
        try:
            encoded = encode_json(input, what="the input")
            encoded_metadata = encode_json(metadata, what="metadata")
            encode_json(order.thread_id if order else None, what="thread_id")
            encode_json(run_id, what="run_id")
            tools = _tools_for(agent, order)
            encode_json([tool.name for tool in tools], what="the names of tools")
        except Unencodable as error:
            raise BadRequest(error.message) from error
        own = order.timeout if order else None
        run = Run(
            id=run_id,
            agent=agent,
            policy=policy,
            input=encoded,
            metadata=encoded_metadata,
            thread_id=_thread_id(order, run_id),
            parent=parent,
            parent_id=parent.id if parent else None,
            shown=order.shown if order else None,
            depth=parent.depth + 1 if parent else 0,
            log=log,
            timeout=min(t for t in (own, agent.timeout, limits.run_timeout) if t is not None),
            created=self.stamps.now(),
            owner=self,
        )
        window = order.coalesce if order and order.coalesce is not None else limits.coalesce
        run.context = RunContext(
            id=run_id,
            agent=agent,
            input=None,  # until it begins: JSON takes less room than what it stands for
            thread_id=run.thread_id,
            metadata=metadata,
            writer=Coalescer(log, self.timer, window),
            host=run,
            limiter=self._limiter,
            providers=self.providers,
            limits=limits,
            instructions=order.instructions if order else None,
            uses_tools=order.uses_tools if order else True,
            said=order.said if order else None,
            client_tools=tools,
        )
        return run

    def _has_room(self, run: Run) -> bool:
        if self._running.total() >= self.limits.max_running:
            return False
        own = run.agent.max_running
        if own is not None and self._running[run.agent.name] >= own:
            return False
        thread = self.find_thread(run.thread_id)
        return thread is None or not any(other.holds_place for other in thread.active)

    def _admit(self) -> None:
        """Start those in the queue that there is room for, in their order."""
        while (run := self._next_with_room()) is not None:
            del self._queue[run]
            run.holds_place = True
            self._running[run.agent.name] += 1
            run.begin()
            if run.told is not None:
                run.context.history, run.told = run.told, None
            elif run.home is not None:
                told = (message for other in run.home.kept for message in other.conversation)
                run.context.history = tuple(told)
            # In a clean context: else the run would pin the request that started it, 35 KiB.
            contextvars.Context().run(
                functools.partial(
                    self.nursery.start_soon, run.supervise, name=f"run {run.id} {run.agent.name}"
                )
            )

    def _next_with_room(self) -> Run | None:
        if self._running.total() >= self.limits.max_running:
            return None
        return next((run for run in self._queue if self._has_room(run)), None)

    def _expire(self) -> None:
        self._forget(self._kept.expire(trio.current_time()))
        when = self._kept.next_expiry()
        self._expiry = None if when is None else self.timer.call_at(when, self._expire)

    def forget(self, run: Run) -> None:
        """Keep nothing of a run, nor of those below it; if it goes on, once it is over."""
        for child in [other for other in self if other.parent_id == run.id]:
            self.forget(child)
        run.is_unwanted = True
        if (kept := self._kept.drop(run.id)) is not None:
            self._forget([kept])

    def _forget(self, evicted: list[Run]) -> None:
        for run in evicted:
            if run.idempotency is not None:
                self._keys.pop(run.idempotency[0], None)
            if (home := run.home) is not None:
                (home.workers if run.parent_id else home.kept).remove(run)
                self.drop_thread(home)


@asynccontextmanager
async def open_runs(
    agents: Mapping[str, Agent],
    *,
    limits: Limits | None = None,
    providers: Mapping[str, Provider] | None = None,
    report: Callable[..., object] = _ignore,
) -> AsyncIterator[Runs]:
    """Open the place where runs live.

    Args:
        agents: By name.
        limits: The bounds.
        providers: Model APIs by the name that stands before a model's colon.
        report: Called with an event's name and facts where operators should know of it.

    On leaving, whatever still goes on is cancelled with the cause `shutdown` and joined.
    """
    async with trio.open_nursery() as services:
        timer = Timer(functools.partial(_report_crash, contained(report), where="the timer"))
        services.start_soon(timer.run)
        async with trio.open_nursery() as supervisor:
            runs = Runs(
                agents, limits or Limits(), providers or {}, contained(report), timer, supervisor
            )
            trio.lowlevel.add_instrument(runs.lag)
            try:
                yield runs
            finally:
                trio.lowlevel.remove_instrument(runs.lag)
                runs.close()
        services.cancel_scope.cancel()


def _report_crash(report: Callable[..., object], error: BaseException, **facts: str) -> None:
    report(
        "crash",
        **facts,
        error=type(unwrapped(error)).__name__,
        traceback=redact("".join(traceback.format_exception(error))),
    )


def _see_results(said: Sequence[Message], told: Sequence[Message]) -> None:
    """See that what tools are said to have answered was asked; raises `BadRequest`."""
    calls = (m.tool_calls for m in told if isinstance(m, AssistantMessage))
    known = {call.call_id for call in chain.from_iterable(calls)}
    for message in said:
        if isinstance(message, ToolMessage) and message.call_id not in known:
            raise BadRequest(
                f"expected the result of a tool call of the conversation, got one of "
                f"{message.call_id[:80]!r}, which is none of its calls"
            )


def _tools_for(agent: Agent, order: Start | None) -> tuple[ToolSpec, ...]:
    """Those of the client's tools that a model may call: none with a name of the agent's own."""
    if order is None or not order.uses_tools or not isinstance(agent.function, ModelLoop):
        return ()
    if len(order.tools) > MAX_CALLS:
        raise BadRequest(f"expected at most {MAX_CALLS} tools of the client, got more")
    for spec in order.tools:
        if not 0 < len(spec.name) <= MAX_TOOL_NAME:
            raise BadRequest(
                f"expected a tool's name of 1 to {MAX_TOOL_NAME} characters, got {spec.name[:40]!r}"
            )
    own = {tool.name for tool in agent.tools}
    return tuple({spec.name: spec for spec in order.tools if spec.name not in own}.values())


def _thread_id(order: Start | None, run_id: str) -> str | None:
    if order is None:
        return None
    return run_id if order.makes_thread and order.thread_id is None else order.thread_id


def _tasks_in(nursery: trio.Nursery) -> int:
    """How many tasks live in a nursery and in those below."""
    return sum(1 + sum(map(_tasks_in, task.child_nurseries)) for task in nursery.child_tasks)
