"""Threads that people talk to: opened, told things, woken at intervals, closed.

Knows: who runs when a thread is told something, and what is told when. Must never know HTTP,
frames, or how a run goes on.

A thread is there as soon as a run names it, and goes with the last thing that is in it. One that
was opened stays until it is closed, with an agent of its own and with triggers. What is said to a
thread is the answer if its run waits for one, a message if its run goes on, and the input of a new
run otherwise; nothing of it is lost, even if a run ends before it has listened.
"""

import math
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import attrs
import trio
from msgspec import Raw

from .context import MessageMode, problem_of
from .dialects import OpenThread, SetTrigger, Start, see_name
from .errors import AgentsseError, BadRequest, Conflict, NotFound, Overloaded
from .events import (
    NULL,
    Problem,
    ThreadSnapshot,
    TriggerChange,
    TriggerChanged,
    encode_json,
    well_formed,
)
from .log import Due
from .runs import ID_BYTES, Run, Runs, Thread

MAX_OPEN = 1_000  # threads that stay until they are closed
MAX_TRIGGERS = 100  # of one thread
MIN_INTERVAL = 1.0  # seconds; an agent is no clock
MAX_TEXT = 16 * 1024  # characters of a trigger's text
POLICY = "continue"  # of runs that a thread starts: nobody reads them by themselves


@attrs.define(eq=False)
class _Trigger:
    thread_id: str
    id: str
    name: str
    every: float
    text: str
    fired: int = 0
    last_at: str | None = None
    next_at: str | None = None
    due: Due | None = None


@attrs.define(eq=False)
class _Opened:
    """What a thread has that was opened; it is a holder of the thread."""

    agent: str
    metadata: Raw
    lasts: bool = True
    triggers: dict[str, _Trigger] = attrs.field(factory=dict)


@attrs.define(eq=False, repr=False)
class Threads:
    """All threads of a server, as those see them who talk to them.

    Attributes:
        runs: Where their runs live.
    """

    runs: Runs
    _opened: dict[str, _Opened] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.runs.unheard = self._start_unheard

    def __iter__(self) -> Iterator[Thread]:
        """Every thread there is, the newest first."""
        return reversed(self.runs.threads.values())

    def find(self, thread_id: str) -> Thread:
        """The thread of that id.

        Raises:
            NotFound: Nothing is in it, and nobody has opened it.
        """
        thread = self.runs.threads.get(thread_id)
        if thread is None:
            raise NotFound(
                f"expected the id of a thread that is open or has runs, got {thread_id[:80]!r}"
            )
        return thread

    def find_run(self, thread_id: str) -> Run:
        """The run that goes on in a thread.

        Raises:
            NotFound: There is no such thread.
            Conflict: Nothing goes on in it.
        """
        thread = self.find(thread_id)
        if not thread.active:
            raise Conflict(f"expected a run that goes on in the thread {thread_id!r}, got none")
        return thread.running or thread.active[0]

    def open(self, order: OpenThread, *, default: str | None) -> Thread:
        """Open a thread, so that it stays.

        Args:
            order: What was asked for.
            default: Who runs where it names nobody; None for the server's first agent.

        Raises:
            NotFound: There is no such agent.
            Conflict: It is open already, and the client wanted a new one.
            Overloaded: Too many are open, and none of those that do not last is idle.
        """
        agent = self.runs.choose_agent(order.agent, default=default)
        thread_id = order.thread_id or secrets.token_hex(ID_BYTES)
        see_name(thread_id, "the thread's id")
        metadata = encode_json(order.metadata, what="metadata")
        if thread_id in self._opened:
            if not order.is_shared:
                raise Conflict(f"expected the id of a new thread, got {thread_id!r}, which is open")
            return self.find(thread_id)
        if self.runs.is_closing:
            raise Overloaded("the server is about to stop; try again when it is back", 5)
        if len(self._opened) >= MAX_OPEN:
            self._make_room()
        thread = self.runs.open_thread(thread_id)
        opened = self._opened[thread_id] = _Opened(agent.name, metadata, order.lasts)
        thread.holders.add(opened)
        return thread

    def _make_room(self) -> None:
        """Let the oldest open thread go that does not last, and in which nothing goes on."""
        for thread_id, opened in self._opened.items():
            thread = self.runs.threads[thread_id]
            if not (opened.lasts or opened.triggers or thread.active or len(thread.holders) > 1):
                del self._opened[thread_id]
                thread.holders.discard(opened)
                self.runs.drop_thread(thread)
                return
        raise Overloaded(f"expected at most {MAX_OPEN} open threads; close one of them first")

    async def close(self, thread_id: str) -> Thread:
        """Cancel what goes on in a thread, forget the thread, and wait until all of it is gone.

        What is said under its id from now on begins another thread. Cancelled, it has cancelled the
        runs all the same, and only does not wait for them.

        Raises:
            NotFound: There is no such thread.
        """
        thread = self.find(thread_id)
        opened = self._opened.pop(thread_id, None)
        if opened is not None:
            for trigger in opened.triggers.values():
                _stop(trigger)
        going_on = list(thread.active)
        for run in reversed(going_on):  # queued ones first, or they would be let in one by one
            run.context.take_messages()  # or, returning just now, it would leave them to a new one
            run.cancel("client_cancel", reason="the thread was closed")
        self.runs.close_thread(thread)  # or it would be told what nobody hears while it ends
        await trio.lowlevel.checkpoint()
        for run in going_on:
            await run.done.wait()
        return thread

    def snapshot(self, thread: Thread, *, default: str | None = None) -> ThreadSnapshot:
        """A thread as it stands."""
        opened, run, feed = self._opened.get(thread.id), thread.run, thread.feed
        is_going_on = run is not None and bool(thread.active)
        triggers = opened.triggers.values() if opened else ()
        return ThreadSnapshot(
            id=thread.id,
            agent=self.agent_of(thread, default),
            created=thread.created,
            state=run.state if is_going_on and run and run.state != "finished" else "idle",
            run=run.snapshot(brief=True) if run else None,
            runs=tuple(run.id for run in (*thread.kept, *thread.active)),
            workers=tuple(worker.snapshot(brief=True) for worker in thread.workers),
            tools=tuple(run.context.open_tools.values()) if run else (),
            triggers=tuple(
                _told(trigger, "activated" if trigger.due else "available") for trigger in triggers
            ),
            last_event_id=feed.id_of(feed.last) if feed.last else None,
            last_event_at=feed[feed.last].ts if feed.last else None,
            is_open=opened is not None,
            metadata=opened.metadata if opened else NULL,
        )

    def tell(
        self,
        thread: Thread,
        text: str,
        *,
        mode: MessageMode = "steer",
        shown: str | None = None,
        default: str | None = None,
        may_answer: bool = True,
    ) -> Run:
        """Say something to a thread; the run that has heard it.

        Args:
            thread: Where.
            text: What its agent is told.
            mode: How a run that goes on hears it.
            shown: What streams show of it; the text unless given.
            default: Who runs where the thread has nobody of its own yet.
            may_answer: Whether it may be the answer to what the thread's run asks.

        Raises:
            BadRequest: It is no answer to what is asked.
            Overloaded: There is no room for a new run.
        """
        run = thread.running
        if run is None:
            return self._start(thread, text, shown=shown, default=default)
        if run.context.asked and may_answer:
            run.context.answer_next(text)
        else:
            run.context.hear(text, mode, shown=shown)
        return run

    # Triggers

    def set_trigger(self, order: SetTrigger) -> Thread:
        """Have an open thread told something at an interval.

        Raises:
            NotFound, Conflict: There is no such thread, or nobody has opened it.
            BadRequest: The interval is too short, or the name is none.
            Overloaded: It has too many.
        """
        thread, opened = self._find_opened(order.thread_id)
        see_name(order.trigger_id, "the trigger's id")
        if not MIN_INTERVAL <= order.every <= timedelta(days=366).total_seconds():
            raise BadRequest(
                f"every_s: expected a number of seconds from {MIN_INTERVAL:g} to a year, "
                f"got {order.every:g}"
            )
        _see_text(order.text)
        old = opened.triggers.get(order.trigger_id)
        was_active = old is not None and old.due is not None
        if old is None and len(opened.triggers) >= MAX_TRIGGERS:
            raise Overloaded(f"expected at most {MAX_TRIGGERS} triggers in a thread; drop one")
        name, text = well_formed(order.name or order.trigger_id), well_formed(order.text)
        trigger = _Trigger(thread.id, order.trigger_id, name, order.every, text)
        if old is not None:
            _stop(old)
            trigger.fired, trigger.last_at = old.fired, old.last_at
        opened.triggers[trigger.id] = trigger
        if order.is_active:
            self._await_next(thread, trigger)
        self._show(thread, _told(trigger, "available" if old is None else "updated"))
        if order.is_active and not was_active:
            self._show(thread, _told(trigger, "activated"))
        if was_active and not order.is_active:
            self._show(thread, _told(trigger, "deactivated"))
        return thread

    def drop_trigger(self, thread_id: str, trigger_id: str) -> Thread:
        """Take a trigger out; raises `NotFound` where there is none."""
        thread, opened = self._find_opened(thread_id)
        trigger = opened.triggers.pop(trigger_id, None)
        if trigger is None:
            known = ", ".join(opened.triggers) or "(none)"
            raise NotFound(f"expected one of the triggers {known}, got {trigger_id[:80]!r}")
        _stop(trigger)
        self._show(thread, _told(trigger, "removed"))
        return thread

    def _show(self, thread: Thread, event: TriggerChanged) -> None:
        """Tell of a trigger: it is no run's, so nobody else does."""
        thread.feed.append(event)
        if self.runs.feed.is_used:
            self.runs.feed.append(event)

    def _await_next(self, thread: Thread, trigger: _Trigger) -> None:
        trigger.next_at = _in(trigger.every)
        when = trio.current_time() + trigger.every
        trigger.due = self.runs.timer.call_at(when, lambda: self._fire(thread, trigger))

    def _fire(self, thread: Thread, trigger: _Trigger) -> None:
        """Tell the thread, unless it has still to hear what it was told before.

        It is no answer to a question, and if it comes to nothing, the next one may not.
        """
        problem: Problem | None = None
        if self.runs.is_closing:
            return
        self._await_next(thread, trigger)
        try:
            if thread.is_behind:
                raise Conflict("the thread has not heard yet what it was told last")
            self.tell(thread, trigger.text, mode="follow_up", may_answer=False)
        except AgentsseError as error:
            problem = problem_of(error, f"the trigger {trigger.id!r}")
        trigger.fired += 1
        trigger.last_at = self.runs.stamps.now()
        self._show(thread, _told(trigger, "fired", problem))

    # What is between the lines

    def _find_opened(self, thread_id: str) -> tuple[Thread, _Opened]:
        thread = self.find(thread_id)
        opened = self._opened.get(thread_id)
        if opened is None:
            raise Conflict(
                f"expected a thread that was opened, got {thread_id!r}: it goes with its runs; "
                "open it first"
            )
        return thread, opened

    def agent_of(self, thread: Thread, default: str | None) -> str:
        """The name of who runs when the thread is told something."""
        if (opened := self._opened.get(thread.id)) is not None:
            return opened.agent
        if thread.run is not None:
            return thread.run.agent.name
        return self.runs.choose_agent(None, default=default).name

    def _start(
        self, thread: Thread, text: str, *, shown: str | None, default: str | None = None
    ) -> Run:
        order = Start(
            agent=self.agent_of(thread, default),
            input=text,
            delivery="background",
            thread_id=thread.id,
            if_busy="enqueue",
            shown=text if shown is None else shown,
        )
        return self.runs.start(order, default=POLICY)[0]

    def _start_unheard(self, run: Run, messages: list[str]) -> None:
        """Begin anew with what the last run was told when it was about to end."""
        home = run.home
        if home is None or home.is_closed or run.parent_id is not None:
            self.runs.report("message_lost", run_id=run.id, messages=len(messages))
            return
        for text in messages:
            order = Start(
                agent=run.agent.name,
                input=text,
                delivery="background",
                thread_id=home.id,
                if_busy="enqueue",
            )
            try:
                self.runs.start(order, default=POLICY)
            except AgentsseError as error:
                self.runs.report(
                    "message_lost", run_id=run.id, thread_id=home.id, error=error.message
                )


def _told(
    trigger: _Trigger, change: TriggerChange, problem: Problem | None = None
) -> TriggerChanged:
    return TriggerChanged(
        thread_id=trigger.thread_id,
        trigger_id=trigger.id,
        change=change,
        name=trigger.name,
        every_s=trigger.every,
        text=trigger.text,
        fired=trigger.fired,
        last_at=trigger.last_at,
        next_at=trigger.next_at,
        error=problem,
    )


def _stop(trigger: _Trigger) -> None:
    if trigger.due is not None:
        trigger.due.cancel()
        trigger.due = trigger.next_at = None


def _in(seconds: float) -> str:
    when = datetime.now(UTC) + timedelta(seconds=math.ceil(seconds))
    return f"{when:%Y-%m-%dT%H:%M:%SZ}"


def _see_text(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise BadRequest(
            f"text: expected at most {MAX_TEXT} characters, got {len(text)}: it is said again and "
            "again"
        )
