"""A run's append-only log, the readers that follow it, and the one timer.

Knows: events in order, cursors, when to wake whom. Must never know sockets, dialects' words,
agents, or why anything is appended.

The theory in five sentences. A log only grows; an event's number is its place. What is appended
becomes visible when it is committed, and a commit rings the bells of the readers that wait: nobody
else. A bell is like a memory channel with one slot: it conflates, so a reader that is ten thousand
events behind owes one wake-up and one write. What it carries is only a ring; a reader takes all
that is visible, in one sync step, and waits only when there is nothing left to take, so that no
wake-up is ever lost. Replay and live are therefore the same code: there is no hand-over to get
wrong.

Frames are made once per dialect and options, by one encoder that has seen the log from event 1, and
are shared by all its readers: that is a `Rendering`.

In Trio a sync function is atomic: nothing here needs a lock.
"""

import heapq
import math
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from typing import Literal, Never, TypeAlias

import attrs
import trio
from msgspec.structs import force_setattr, replace

from .dialects import Encoder
from .events import AnyEvent, PartDelta, ToolOutputDelta, encode_event, encode_event_into

MAX_WRITE = 64 * 1024  # bytes that one write takes: what a socket buffer holds anyway
STRIDE = 1_000  # events encoded between two checkpoints: 100,000 at once stall the loop for 95 ms
TICK = 0.005  # seconds; what falls due within one tick shares one wake-up
DELTA = 100  # bytes of a delta beside its text, about
PATIENCE = 1.0  # seconds, at most, that a burst is waited for whose end nobody tells
MILLISECOND = 1_000_000  # nanoseconds
FORGOTTEN = 100  # cancelled entries that the timer's heap may hold before it is worth tidying

LONG_AGO = -math.inf
DELTAS = frozenset({PartDelta, ToolOutputDelta})

CloseReason: TypeAlias = Literal[
    "finished", "client_left", "slow_client", "rotated", "shutdown", "error"
]


@attrs.define(eq=False, repr=False)
class Due:
    """Something that the timer will do, unless it is cancelled before."""

    timer: "Timer"
    function: Callable[[], object] | None

    def cancel(self) -> None:
        """Forget it, and what it refers to."""
        if self.function is not None:
            self.function = None
            self.timer.forget_one()


@attrs.define(eq=False, repr=False)
class Timer:
    """The one task that waits for the clock, on behalf of everything that has a due time.

    Coalescing, heartbeats, rotation, grace, deadlines: each is a sync function that falls due. The
    task sleeps when nothing is.
    """

    report: Callable[[Exception], object] = lambda _error: None
    _heap: list[tuple[float, int, Due]] = attrs.field(factory=list)
    _count: int = 0
    _forgotten: int = 0
    _sleep: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _wakes_at: float = math.inf  # what its deadline is; to ask the scope costs more

    def call_at(self, when: float, function: Callable[[], object]) -> Due:
        """Have `function` called at `when` (the loop's clock), or up to a tick later.

        The function is sync. What it raises is reported, and nobody else notices.
        """
        if math.isinf(when):
            return Due(self, None)
        due = Due(self, function)
        when = max(when, math.ceil(when / TICK) * TICK)  # the product may round to below `when`
        self._count += 1  # keeps the order of what falls due together, and functions uncompared
        heapq.heappush(self._heap, (when, self._count, due))
        if when < self._wakes_at:
            self._wakes_at = self._sleep.deadline = when
        return due

    async def sleep_until(self, when: float) -> None:
        """Wait like `trio.sleep_until`, up to a tick longer: for many it costs half of that.

        No scope, no deadline of its own; those who wait for the same tick wake up together.
        """
        task = trio.lowlevel.current_task()
        due = self.call_at(when, partial(trio.lowlevel.reschedule, task))

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            due.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def forget_one(self) -> None:
        """Count an entry that is no longer wanted; where most are not, the heap is made anew."""
        self._forgotten += 1
        if self._forgotten > FORGOTTEN and self._forgotten * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].function is not None]
            heapq.heapify(self._heap)
            self._forgotten = 0

    async def run(self) -> Never:
        """Serve until cancelled."""
        while True:
            self._wakes_at = self._next()
            self._sleep = trio.CancelScope(deadline=self._wakes_at)
            with self._sleep:
                await trio.sleep_forever()
            self._fire(trio.current_time())

    def _next(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def _fire(self, now: float) -> None:
        """Call what is due; what that puts on the heap has its turn at the next wake-up."""
        ripe = []
        while self._heap and self._heap[0][0] <= now:
            ripe.append(heapq.heappop(self._heap)[2])
        for due in ripe:
            if due.function is None:
                self._forgotten -= 1
            else:
                function, due.function = due.function, None
                try:
                    function()
                except Exception as error:  # noqa: BLE001  # it would end all runs
                    self.report(error)


@attrs.define(eq=False, repr=False)
class Lag(trio.abc.Instrument):
    """How long passes of the event loop take: for so long nobody else gets a turn.

    Attributes:
        last: Seconds of the last pass.
        worst: Seconds of the longest one so far.
    """

    last: float = 0.0
    worst: float = 0.0
    _since: float | None = None

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002  # as Trio calls it
        """Note that a pass begins."""
        self._since = time.perf_counter()

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002  # as Trio calls it
        """Note that it is over."""
        if self._since is not None:
            self.last = time.perf_counter() - self._since
            self.worst = max(self.worst, self.last)


@attrs.define(eq=False, repr=False)
class Stamps:
    """RFC 3339 times, in UTC with milliseconds; the calendar is asked once per second."""

    clock: Callable[[], int] = time.time_ns
    _since: int = 0  # the text is right from here ...
    _until: int = 0  # ... up to here
    _text: str = ""
    _second: int = -1
    _date: str = ""  # up to the second

    def now(self) -> str:
        """The time as text, such as `2026-11-20T16:51:07.042Z`."""
        now = self.clock()
        if not self._since <= now < self._until:
            millisecond = now // MILLISECOND
            self._since = millisecond * MILLISECOND
            self._until = self._since + MILLISECOND
            second, rest = divmod(millisecond, 1000)
            if second != self._second:
                self._second = second
                self._date = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}"
            self._text = f"{self._date}.{rest:03d}Z"
        return self._text


@attrs.frozen
class Position:
    """A place in a log: after frame `part` of event `seq`; part 0 stands for all of its frames."""

    seq: int
    part: int = 0


START = Position(0)

Follow: TypeAlias = Callable[[Sequence[AnyEvent], int], object]
"""Told of events as they become visible, and of how many bytes they have; must not raise."""


@attrs.define(eq=False, repr=False)
class Log:
    """The events of one run, from the first on; nothing is ever taken out or changed.

    Attributes:
        run_id: Whose it is.
        path: Who speaks in it, below the run that a client has started.
        follow: Told of whatever becomes visible.
        events: What was appended; event n is `events[n - 1]`.
        end: How many of them readers may see.
        size: Bytes of all of them as JSON.
        closed: Whether the last event is in; nothing follows it.
    """

    run_id: str
    stamps: Stamps = attrs.field(factory=Stamps)
    path: tuple[str, ...] = ()
    follow: Follow | None = None
    events: list[AnyEvent] = attrs.field(factory=list)
    end: int = 0
    size: int = 0
    closed: bool = False
    _followed: int = 0  # bytes that were there at the last commit
    _scratch: bytearray = attrs.field(factory=bytearray)
    _waiting: "set[Reader]" = attrs.field(factory=set)
    _renderings: "dict[Hashable, Rendering]" = attrs.field(factory=dict)

    def append(self, event: AnyEvent) -> int:
        """Take an event in, and give it its number, its time and its run.

        Sync, and legal while cancelled. The event is complete from here on and never changes.

        Raises:
            ValueError: A string of the event holds half of a surrogate pair.
        """
        if self.closed:
            raise ValueError(f"expected no event after the last one, got {type(event).__name__}")
        events, scratch = self.events, self._scratch
        seq = len(events) + 1
        force_setattr(event, "run_id", self.run_id)
        force_setattr(event, "seq", seq)
        force_setattr(event, "ts", self.stamps.now())
        if self.path:
            force_setattr(event, "path", self.path)
        encode_event_into(event, scratch)  # raises before anything is kept
        self.size += len(scratch)
        events.append(event)
        return seq

    def write(self, event: AnyEvent) -> None:
        """Append an event, and make it visible at once: what the memory store does.

        Raises:
            ValueError: As `append`.
        """
        end = self.append(event)
        if self._waiting or self.follow is not None:
            self.commit(end)
        else:  # most of the time nobody is there to be told, and a call less is a saving
            self.end, self._followed = end, self.size

    def commit(self, end: int) -> None:
        """Make everything up to event `end` visible, and wake the readers that wait."""
        seen, self.end = self.end, end
        if self.follow is not None and end > seen:
            self.follow(self.events[seen:end], self.size - self._followed)
        self._followed = self.size
        if self._waiting:
            waiting, self._waiting = self._waiting, set()
            for reader in waiting:
                reader.ring()

    def close(self) -> None:
        """Take no more events; readers end when they have taken the last one."""
        self.closed = True
        self._scratch = bytearray()  # it is as large as the largest event was
        self.commit(len(self.events))

    @property
    def ways(self) -> int:
        """In how many dialects and filters it is being read."""
        return len(self._renderings)

    def is_read_by(self, key: Hashable) -> bool:
        """Whether somebody reads it in this way."""
        return key in self._renderings

    def attach(
        self,
        key: Hashable,
        make: Callable[[], Encoder],
        after: Position,
        *,
        ends_at: frozenset[type[AnyEvent]] = frozenset(),
        reads_on: bool = False,
        past: int = 0,
    ) -> "Reader":
        """Open a reader behind `after`; whoever opens it detaches it.

        Args:
            key: Names the dialect and its options: readers with equal keys share one rendering.
            make: Makes the encoder, where nobody reads in that way yet.
            after: Where to begin; `START` for everything.
            ends_at: Events behind whose frames a reader is finished, though the log is not. Each
                has a frame, and whoever begins behind it reads on to the next one. The same for all
                readers with one key.
            reads_on: This reader goes on to the end of the log all the same.
            past: It does so past those among this many events.
        """
        rendering = self._renderings.get(key)
        if rendering is None:
            rendering = self._renderings[key] = Rendering(self, key, make(), ends_at)
        rendering.readers += 1
        return Reader(self, rendering, after, reads_on, past)

    def detach(self, reader: "Reader") -> None:
        """Forget a reader, and its rendering with the last one."""
        self._waiting.discard(reader)
        rendering = reader.rendering
        rendering.readers -= 1
        if rendering.readers == 0:
            self._renderings.pop(rendering.key, None)

    def wake_on_commit(self, reader: "Reader") -> None:
        """Ring this reader's bell at the next commit, once."""
        self._waiting.add(reader)


@attrs.define(eq=False, repr=False)
class Rendering:
    """A log in one dialect: frames made once, on demand, shared by all who read it that way.

    What is made at one time is one block of bytes. Whoever keeps up takes it as it is, and so do
    the thousand others that keep up: none of them joins or copies anything. Places are bytes.

    Attributes:
        rendered: How many events the encoder has seen.
        size: Bytes of all frames.
        stops: Up to where a reader is finished.
    """

    log: Log
    key: Hashable
    encoder: Encoder
    ends_at: frozenset[type[AnyEvent]] = frozenset()
    readers: int = 0
    rendered: int = 0
    size: int = 0
    blocks: list[bytes] = attrs.field(factory=list)
    stops: list[int] = attrs.field(factory=list)
    _begins: "array[int]" = attrs.field(factory=lambda: array("q"))  # of the blocks
    _ends: "array[int]" = attrs.field(factory=lambda: array("q", [0]))  # of the events
    _parts: dict[int, tuple[int, ...]] = attrs.field(factory=dict)  # where an event's frames meet

    def extend(self) -> None:
        """Encode more of what is visible: one write's worth, and at most a stride of events."""
        done, begin = self.rendered, self.size
        if done == self.log.end:
            return
        size, enough = begin, begin + MAX_WRITE
        feed, note_end, ends_at = self.encoder.feed, self._ends.append, self.ends_at
        block: list[bytes] = []
        try:
            for event in self.log.events[done : min(self.log.end, done + STRIDE)]:
                frames = tuple(feed(event))  # whole, or not at all if the encoder raises
                if len(frames) == 1:
                    block.append(frames[0])
                    size += len(frames[0])
                elif frames:
                    block += frames
                    *meet, size = accumulate(map(len, frames), initial=size)
                    self._parts[len(self._ends)] = tuple(meet[1:])
                note_end(size)
                if ends_at and type(event) in ends_at:
                    self.stops.append(size)
                if size >= enough:
                    break
        finally:
            self.rendered, self.size = len(self._ends) - 1, size
            if block:
                self._begins.append(begin)
                self.blocks.append(b"".join(block))

    def locate(self, seq: int, part: int = 0) -> int:
        """The place behind a frame of an event that the encoder has seen, or behind them all."""
        parts = self._parts.get(seq, ())
        return parts[part - 1] if 0 < part <= len(parts) else self._ends[seq]

    def reach(self, start: int) -> int:
        """Up to where one write goes: whole frames, at most 64 KiB of them, or one."""
        most = start + MAX_WRITE
        if self.size <= most:
            return self.size
        seq = bisect_right(self._ends, most)  # the first event that goes beyond
        bounds = (self._ends[seq - 1], *self._parts.get(seq, ()), self._ends[seq])
        place = bisect_right(bounds, most)
        return bounds[place - 1] if bounds[place - 1] > start else bounds[place]

    def cut(self, start: int, stop: int) -> bytes:
        """What is between two places; a whole block is not copied."""
        begins = self._begins
        first, last = bisect_right(begins, start) - 1, bisect_left(begins, stop)
        before = begins[first]
        return b"".join(self.blocks[first:last])[start - before : stop - before]


@attrs.define(eq=False, repr=False)
class Bell:
    """What wakes the one task that writes a stream; rung ever so often, it wakes it once.

    A memory channel with one slot would do the same, for twice the time.

    Attributes:
        closing: Why the server wants this stream to end before there is nothing left, once it does.
        beat: Whether it was rung because the line has been silent for long.
        is_rung: Whether it was rung while nobody waited.
    """

    closing: CloseReason | None = attrs.field(default=None, init=False)
    beat: bool = attrs.field(default=False, init=False)
    is_rung: bool = attrs.field(default=False, init=False)
    _sleeper: trio.lowlevel.Task | None = attrs.field(default=None, init=False)

    def ring(self) -> None:
        """Wake the reader; a bell that has been rung already is left alone."""
        if self._sleeper is None:
            self.is_rung = True
        else:
            sleeper, self._sleeper = self._sleeper, None
            trio.lowlevel.reschedule(sleeper)

    def ring_for_silence(self) -> None:
        """Wake the reader so that it writes a heartbeat."""
        self.beat = True
        self.ring()

    def close(self, reason: CloseReason) -> None:
        """Ask the writer to end this stream, between two writes; the first reason stands."""
        if self.closing is None:
            self.closing = reason
        self.ring()

    async def wait_rung(self) -> None:
        """Wait until somebody rings."""
        if self.is_rung:
            await trio.lowlevel.checkpoint()
            self.is_rung = False
            return
        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)

    def _stop_waiting(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._sleeper = None
        return trio.lowlevel.Abort.SUCCEEDED


@attrs.define(eq=False, repr=False)
class Reader(Bell):
    """A cursor in a rendering, and the bell that says there is more.

    A task that writes owns it: `take` until nothing comes, then `wait`, then again.
    """

    log: Log
    rendering: Rendering
    after: Position
    reads_on: bool = False
    past: int = 0
    _cursor: int | None = None  # up to where it has taken; None until its place is made
    _began: int = 0

    def take(self) -> bytes:
        """Take the next frames, and move behind them.

        Returns:
            Whole frames, joined: at most 64 KiB, or one frame that is larger. Empty if there is
            nothing to send now; if `is_behind` then says so, only the encoding has got further.
        """
        rendering = self.rendering
        if (start := self._next()) is None:
            rendering.extend()
            if (start := self._next()) is None:
                return b""
        stop = rendering.reach(start)
        if rendering.stops and (end := self._end()) is not None:
            stop = min(stop, end)
        self._cursor = stop
        return rendering.cut(start, stop)

    @property
    def is_behind(self) -> bool:
        """Whether something visible has not been taken yet."""
        if self.rendering.stops and self._is_at_end():
            return False
        return self.rendering.rendered < self.log.end or self._next() is not None

    @property
    def is_finished(self) -> bool:
        """Whether the last frame there will ever be for this reader has been taken."""
        if self.rendering.stops and self._is_at_end():
            return True
        return self.log.closed and not self.is_behind

    async def wait(self) -> None:
        """Wait until there is something to take, the log is closed, or somebody rings.

        Cancelling it loses nothing: what there is to take is in the log.
        """
        if self.is_behind or self.log.closed:  # since the last take
            self.ring()
        else:
            self.log.wake_on_commit(self)
        await self.wait_rung()

    def _next(self) -> int | None:
        """Where the next frame begins, or None while it has not been made."""
        cursor, rendering = self._cursor, self.rendering
        if cursor is None and self.after.seq <= rendering.rendered:
            place = rendering.locate(self.after.seq, self.after.part)
            cursor = self._cursor = self._began = place
        if cursor is None or cursor == rendering.size:
            return None
        if rendering.stops and self._is_at_end():
            return None
        return cursor

    def _end(self) -> int | None:
        """Up to where this reader is finished before the log is, once that is known."""
        if self.reads_on:
            return None
        stops, begin = self.rendering.stops, self._began
        if self.past:
            if self.rendering.rendered < self.past:
                return None
            begin = max(begin, self.rendering.locate(self.past))
        place = bisect_right(stops, begin)
        return stops[place] if place < len(stops) else None

    def _is_at_end(self) -> bool:
        return self._cursor is not None and self._cursor == self._end()


@attrs.define(eq=False, repr=False)
class Coalescer:
    """Joins the deltas of a part before they enter the log.

    The first delta after anything else goes in at once, later ones at most once per window, each
    part's in one piece. An event that is no delta flushes what is held, so that the order stays.
    Whoever knows when all that came together is in, says so by `lull`: what comes in bursts is then
    joined burst by burst, and none waits for a window that has passed.

    Attributes:
        window: Seconds; 0 turns it off. What is held never grows beyond one write.
    """

    log: Log
    timer: Timer
    window: float
    _held: dict[tuple[type, str], list[PartDelta | ToolOutputDelta]] = attrs.field(factory=dict)
    _held_bytes: int = 0
    _open_at: float = LONG_AGO
    _is_burst: bool = False
    _due: Due | None = None
    _safety: Due | None = None

    def append(self, event: AnyEvent) -> None:
        """Put an event into the log, now or at the window's end; sync, legal while cancelled.

        Raises:
            TypeError: What a delta holds is no text.
            ValueError: As `Log.append`.
        """
        if type(event) in DELTAS:
            # What cannot be joined raises here, not in the timer's task.
            text: object = event.delta  # type: ignore[union-attr]
            if not isinstance(text, str):
                raise TypeError(f"expected text in a delta, got {type(text).__name__}")
            if self.window:
                self._hold(event)  # type: ignore[arg-type]  # isinstance costs three times the test
                return
        if self._held:
            self.flush()
        self._open_at = LONG_AGO
        self._is_burst = False
        self.log.write(event)

    def lull(self) -> None:
        """Note that nothing more is here now; what comes next comes in bursts as well."""
        self._is_burst = True
        # Bursts come a window apart, and none does so to the microsecond.
        if self._held and trio.current_time() >= self._open_at - self.window / 4:
            self.flush()

    def flush(self) -> None:
        """Put what is held into the log."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        held, self._held, self._held_bytes = self._held, {}, 0
        for deltas in held.values():
            whole = deltas[0]
            if len(deltas) > 1:
                whole = replace(whole, delta="".join([d.delta for d in deltas]))
            self.log.append(whole)
        if held:
            self._open_at = trio.current_time() + self.window
            self.log.commit(len(self.log.events))

    def _hold(self, event: PartDelta | ToolOutputDelta) -> None:
        key = (type(event), event.part_id if type(event) is PartDelta else event.call_id)  # type: ignore[union-attr]
        if not self._held and (now := trio.current_time()) >= self._open_at:
            if not self._is_burst:
                self._open_at = now + self.window
                self.log.commit(self.log.append(event))
                return
            # Its end is awaited, but not for ever. One entry serves burst after burst.
            if self._safety is None:
                self._safety = self.timer.call_at(now + PATIENCE, self._lose_patience)
        elif self._due is None and not self._held:
            self._due = self.timer.call_at(self._open_at, self._flush_late)
        # What cannot be encoded raises here, not in the timer's task.
        text = event.delta
        self._held_bytes += DELTA + len(text if text.isascii() else text.encode())
        if (held := self._held.get(key)) is None:
            encode_event(event)  # so does what is wrong with the rest of it
            held = self._held[key] = []
        held.append(event)
        if self._held_bytes > MAX_WRITE:
            self.flush()

    def forget(self) -> None:
        """Await nothing any more; what is held is not let out by itself."""
        for due in (self._due, self._safety):
            if due is not None:
                due.cancel()

    def _flush_late(self) -> None:
        self.flush()
        if self._is_burst:  # else every burst from now on would be early, and wait for its window
            self._open_at = LONG_AGO

    def _lose_patience(self) -> None:
        self._safety = None
        if self._held and self._due is None:
            self.flush()
