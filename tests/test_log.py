"""The log: numbers, visibility, wake-ups, frames, the timer and the joining of deltas.

Encoders here count what they are fed. Wake-ups are counted with Trio's own instrument. Time is the
mock clock's: it jumps when everybody waits, so that nothing here sleeps.
"""

import math
from collections import Counter
from collections.abc import Iterable

import attrs
import pytest
import trio
import trio.testing

from agentsse.events import (
    AnyEvent,
    Custom,
    PartDelta,
    PartFinished,
    RunFinished,
    ToolOutputDelta,
    decode_event,
    encode_event,
    encode_json,
)
from agentsse.log import (
    FORGOTTEN,
    MAX_WRITE,
    START,
    STRIDE,
    TICK,
    Coalescer,
    Lag,
    Log,
    Position,
    Reader,
    Stamps,
    Timer,
)
from agentsse.sse import frame_id

SECONDS = 60  # of the mock clock where it jumps: only what hangs ever gets there


def note(text: str = "x") -> Custom:
    return Custom(name=text, value=encode_json(None))


def said(delta: str, part_id: str = "p", **envelope) -> PartDelta:
    return PartDelta(part_id=part_id, kind="text", delta=delta, **envelope)


def printed(delta: str, call_id: str = "c") -> ToolOutputDelta:
    return ToolOutputDelta(call_id=call_id, delta=delta)


@attrs.define(eq=False)
class Lines:
    """An encoder of one line per frame, `parts` frames per event, that counts what it is fed."""

    parts: int = 1
    fed: Counter[int] = attrs.field(factory=Counter)

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Name every frame."""
        self.fed[event.seq] += 1
        return [
            f"{frame_id(event.seq, part, self.parts)}\n".encode()
            for part in range(1, self.parts + 1)
        ]


@attrs.define(eq=False)
class Blocks:
    """An encoder of one frame of `size` bytes per event."""

    size: int

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Repeat a digit."""
        return (b"%d" % (event.seq % 10) * self.size,)


def write(log: Log, events: int = 1) -> None:
    """Append, and make visible at once: what the memory store does."""
    for _ in range(events):
        log.commit(log.append(note()))


def attach(log: Log, encoder=None, after: Position = START, *, key: object = "lines") -> Reader:
    return log.attach(key, lambda: encoder or Lines(), after)


def drain(reader: Reader) -> bytes:
    """Take until nothing comes."""
    taken = b""
    while reader.is_behind:
        taken += reader.take()
    return taken


async def follow(reader: Reader, writes: list[bytes]) -> None:
    """What a writer does, to the end of the log."""
    while not reader.is_finished:
        if taken := reader.take():
            writes.append(taken)
            await trio.lowlevel.checkpoint()
        elif reader.is_behind:
            await trio.lowlevel.checkpoint()
        elif not reader.is_finished:
            await reader.wait()


@attrs.define(eq=False)
class Wakeups(trio.abc.Instrument):
    """Counts how often a task of some name is scheduled."""

    count: Counter[str] = attrs.field(factory=Counter)

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """Trio calls this before every step of a task."""
        self.count[task.name] += 1


@pytest.fixture
async def timer(nursery):
    """A timer that runs; the test itself asks for the clock, else it gets the real one."""
    timer = Timer()
    nursery.start_soon(timer.run)
    await trio.testing.wait_all_tasks_blocked()
    return timer


# The timer


async def test_what_falls_due_is_called_in_order(autojump_clock, timer):
    """By time; within one tick in the order in which it was asked for."""
    called: list[str] = []
    for when, name in [(3, "d"), (1, "a"), (2, "b"), (2, "c")]:
        timer.call_at(trio.current_time() + when, lambda name=name: called.append(name))

    await trio.sleep(2.5)
    assert ["a", "b", "c"] == called
    await trio.sleep(1)
    assert ["a", "b", "c", "d"] == called


async def test_what_falls_due_within_a_tick_shares_a_wakeup(autojump_clock, timer):
    """A thousand due times within a tick cost one wake-up of the task."""
    called: list[float] = []
    start = math.ceil(trio.current_time() / TICK + 1) * TICK
    for number in range(1_000):
        when = start + TICK * (number + 1) / 1_001
        timer.call_at(when, lambda: called.append(trio.current_time()))
    trio.lowlevel.add_instrument(wakeups := Wakeups())
    await trio.sleep(1)
    trio.lowlevel.remove_instrument(wakeups)

    assert 1_000 == len(called)
    assert 1 == len(set(called))
    assert 1 == wakeups.count["agentsse.log.Timer.run"]


def test_nothing_is_called_early():
    """Rounding to ticks only ever rounds up, also where the due time is a hair above a tick."""
    for ticks in range(1, 10_000):
        timer, when = Timer(), math.nextafter(ticks * TICK, math.inf)
        timer.call_at(when, lambda: None)
        assert when <= timer._next() <= when + TICK


async def test_what_is_cancelled_is_not_called(autojump_clock, timer):
    """Cancelling forgets the function, and may be done twice, or too late."""
    called: list[str] = []
    never = timer.call_at(trio.current_time() + 1, lambda: called.append("never"))
    once = timer.call_at(trio.current_time() + 1, lambda: called.append("once"))
    never.cancel()
    never.cancel()
    assert None is never.function

    await trio.sleep(2)
    once.cancel()

    assert ["once"] == called
    assert 0 == timer._forgotten


async def test_an_earlier_due_time_wakes_the_timer_earlier(autojump_clock, timer):
    """A timer that sleeps until late is woken for what is asked for meanwhile."""
    called: list[float] = []
    start = trio.current_time()
    timer.call_at(start + 100, lambda: called.append(100))
    await trio.sleep(1)
    timer.call_at(start + 2, lambda: called.append(2))
    await trio.sleep(2)

    assert [2] == called


async def test_a_function_may_ask_for_its_next_turn(autojump_clock, timer):
    """What is asked for while something is called is served as well."""
    called: list[int] = []

    def again() -> None:
        called.append(len(called))
        if len(called) < 5:
            timer.call_at(trio.current_time() + 1, again)

    timer.call_at(trio.current_time() + 1, again)
    await trio.sleep(10)

    assert [0, 1, 2, 3, 4] == called


async def test_forgotten_entries_are_tidied_away(autojump_clock, timer):
    """What was cancelled long before it is due does not pile up, and the rest is still served."""
    called: list[int] = []
    start = trio.current_time()
    for number in range(20):
        timer.call_at(start + 1 + number, lambda number=number: called.append(number))
    for _ in range(50 * FORGOTTEN):
        timer.call_at(start + 3_600, lambda: called.append(-1)).cancel()
    assert len(timer._heap) <= 20 + 2 * FORGOTTEN

    await trio.sleep(30)
    assert list(range(20)) == called
    await trio.sleep(3_600)
    assert list(range(20)) == called
    assert [] == timer._heap
    assert 0 == timer._forgotten


def test_what_is_never_due_is_never_kept():
    """An infinite due time costs nothing, and neither does taking it back."""
    timer = Timer()
    for _ in range(2 * FORGOTTEN):
        due = timer.call_at(math.inf, lambda: None)
        assert None is due.function
        due.cancel()

    assert [] == timer._heap
    assert 0 == timer._forgotten


def test_a_callback_that_is_due_again_at_once_does_not_spin():
    """All that is ripe is taken out first: a next turn, also now, is of the next wake-up."""
    timer, called = Timer(), []

    def again() -> None:
        called.append(len(called))
        timer.call_at(1.0, again)

    timer.call_at(1.0, again)
    for turns in (1, 2):
        timer._fire(1.0)
        assert list(range(turns)) == called
    assert 1 == len(timer._heap)


async def test_a_callback_that_is_always_due_leaves_others_their_turn(autojump_clock, timer):
    """Between two of its turns the loop goes round."""
    turns = 0

    def again() -> None:
        timer.call_at(trio.current_time(), again)

    timer.call_at(trio.current_time(), again)
    with trio.fail_after(SECONDS):
        for _ in range(100):
            await trio.lowlevel.checkpoint()
            turns += 1
    assert 100 == turns


async def test_what_is_cancelled_by_its_neighbour_in_the_same_tick_is_not_called(
    autojump_clock, timer
):
    """Being ripe is not being called; the books stay right."""
    called: list[str] = []
    when = trio.current_time() + 1
    timer.call_at(when, lambda: (called.append("first"), second.cancel()))
    second = timer.call_at(when, lambda: called.append("second"))
    timer.call_at(when, lambda: called.append("third"))
    await trio.sleep(2)

    assert ["first", "third"] == called
    assert (0, []) == (timer._forgotten, timer._heap)


def test_lag_is_of_the_last_pass_and_the_worst_is_kept():
    """A loop that was blocked once is quick again afterwards; the worst stays on record."""
    lag = Lag()
    lag.before_io_wait(0)  # added in the middle of a pass: nothing is known of it
    assert (0, 0) == (lag.last, lag.worst)

    lag.after_io_wait(0)
    lag._since -= 3  # as if it had begun so many seconds ago
    lag.before_io_wait(0)
    assert 3 <= lag.last == lag.worst

    lag.after_io_wait(0)
    lag._since += 1_000  # as if it had taken no time at all
    lag.before_io_wait(0)
    assert lag.last < 3 <= lag.worst


async def test_trio_tells_lag_of_every_pass():
    """It is an instrument like any other, and needs no task."""
    trio.lowlevel.add_instrument(lag := Lag())
    for _ in range(3):
        await trio.lowlevel.checkpoint()
    trio.lowlevel.remove_instrument(lag)

    assert 0 < lag.last <= lag.worst


# Stamps


def test_a_time_is_formatted_once_per_millisecond():
    """RFC 3339, UTC, milliseconds; within one of them it is the same object."""
    now = 1_795_193_467_042_100_000
    stamps = Stamps(lambda: now)
    first = stamps.now()
    assert "2026-11-20T16:51:07.042Z" == first

    now += 300_000
    assert first is stamps.now()
    now += 1_000_000
    assert "2026-11-20T16:51:07.043Z" == stamps.now()
    now -= 1_000_000
    assert "2026-11-20T16:51:07.042Z" == stamps.now()


# Append, commit, close


def test_events_are_numbered_from_one_and_stamped():
    """The log gives an event its run, its number and its time, and counts its bytes."""
    log = Log("r1", Stamps(lambda: 0))

    assert [1, 2, 3] == [log.append(note(name)) for name in "abc"]
    assert [1, 2, 3] == [event.seq for event in log.events]
    assert {"r1"} == {event.run_id for event in log.events}
    assert {"1970-01-01T00:00:00.000Z"} == {event.ts for event in log.events}
    assert sum(len(encode_event(event)) for event in log.events) == log.size


def test_what_cannot_be_encoded_is_not_taken_in():
    """An event that would break every reader is refused, and leaves no hole."""
    log = Log("r1")
    write(log)
    size = log.size

    with pytest.raises(ValueError, match="surrogates"):
        log.append(said("\ud800"))
    assert (1, size) == (len(log.events), log.size)
    assert 2 == log.append(note())


def test_nothing_follows_the_last_event():
    """A closed log takes no more, and says what came."""
    log = Log("r1")
    log.close()

    with pytest.raises(ValueError, match="no event after the last one, got Custom"):
        log.append(note())


def test_what_is_not_committed_is_not_seen():
    """A durable store commits later than it appends: until then readers see nothing of it."""
    log, encoder = Log("r1"), Lines()
    reader = attach(log, encoder)
    for _ in range(3):
        log.append(note())
    assert not reader.is_behind
    assert b"" == reader.take()

    log.commit(2)
    assert b"1\n2\n" == drain(reader)
    assert b"" == reader.take()
    assert Counter([1, 2]) == encoder.fed

    log.commit(3)
    assert b"3\n" == drain(reader)
    assert not reader.is_finished


def test_closing_commits_what_is_left():
    """The end is visible at once, with all that was appended before it."""
    log = Log("r1")
    reader = attach(log)
    log.append(note())
    log.close()

    assert not reader.is_finished
    assert b"1\n" == drain(reader)
    assert reader.is_finished


async def test_append_is_legal_while_cancelled():
    """An agent that is being cancelled can still speak, and nothing of it waits."""
    log = Log("r1")
    writer = Coalescer(log, Timer(), 0.05)
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        finally:
            writer.append(said("last"))
            writer.append(said(" words"))
            writer.append(note())
            log.close()

    assert scope.cancelled_caught
    assert ["last", " words", None] == [getattr(event, "delta", None) for event in log.events]


# Who follows, and who speaks


def test_who_follows_is_told_of_what_becomes_visible():
    """The events themselves, in order, each once, and how many bytes they have; not before."""
    told = []
    log = Log("r1", follow=lambda events, size: told.append((events, size)))
    write(log)
    log.append(note("b"))
    log.append(note("c"))
    assert 1 == len(told)
    log.commit(3)
    log.commit(3)
    log.close()

    assert [log.events[:1], log.events[1:]] == [events for events, _ in told]
    assert [sum(map(len, map(encode_event, events))) for events, _ in told] == [s for _, s in told]


def test_who_follows_is_told_of_the_end():
    """Closing makes visible what nobody had committed."""
    told = []
    log = Log("r1", follow=lambda events, size: told.append((len(events), size)))
    write(log, 2)
    log.append(note())
    log.close()

    assert [1, 1, 1] == [count for count, _ in told]
    assert log.size == sum(size for _, size in told)


def test_bytes_are_told_once_though_a_store_commits_late():
    """With what is committed, or with what was before it; never twice, and none is left out."""
    told = []
    log = Log("r1", follow=lambda events, size: told.append((len(events), size)))
    for _ in range(4):
        log.append(note())
    for end in (1, 3, 4):
        log.commit(end)

    assert [1, 2, 1] == [count for count, _ in told]
    assert log.size == sum(size for _, size in told)


def test_a_child_s_events_say_who_speaks():
    """The log knows better than whoever made the event; without a path an event keeps its own."""
    child, root = Log("r1", path=("worker:1", "helper:2")), Log("r2")
    child.append(note())
    child.append(said("a", path=("else",)))
    root.append(note())
    root.append(said("a", path=("else",)))

    assert [("worker:1", "helper:2")] * 2 == [event.path for event in child.events]
    assert [(), ("else",)] == [event.path for event in root.events]
    assert child.size == sum(len(encode_event(event)) for event in child.events)


def test_ways_of_reading_are_counted():
    """Keys, not readers."""
    log = Log("r1")
    readers = [attach(log, key=key) for key in ("a", "a", "b")]
    assert (2, True, False) == (log.ways, log.is_read_by("b"), log.is_read_by("c"))
    for reader in readers:
        log.detach(reader)
    assert (0, False) == (log.ways, log.is_read_by("b"))


# Wake-ups


async def test_ten_thousand_events_are_one_wakeup(autojump_clock):
    """A reader that is behind owes one wake-up, and writes of 64 KiB, not one per event."""
    log, writes = Log("r1"), []
    trio.lowlevel.add_instrument(wakeups := Wakeups())
    async with trio.open_nursery() as nursery:
        reader = attach(log, Blocks(6))
        nursery.start_soon(follow, reader, writes, name="follower")
        await trio.testing.wait_all_tasks_blocked()
        before = wakeups.count["follower"]
        write(log, 10_000)
        await trio.testing.wait_all_tasks_blocked()
        woken = wakeups.count["follower"] - before
        log.close()
    trio.lowlevel.remove_instrument(wakeups)

    assert 60_000 == sum(map(len, writes))
    assert 10_000 // STRIDE == len(writes)
    # Once for the bell, once per write for its checkpoint, once for a ring while it was writing.
    assert woken <= 1 + len(writes) + 1


async def test_a_commit_wakes_only_those_that_wait(autojump_clock):
    """Each of them, once; a reader that has not come back for more is not rung."""
    log = Log("r1")
    readers = [attach(log) for _ in range(4)]
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            for reader in readers[1:]:
                nursery.start_soon(reader.wait)
            await trio.testing.wait_all_tasks_blocked()
            write(log)

    write(log)
    for reader in readers:
        assert not reader.is_rung


async def test_what_is_not_committed_wakes_nobody(autojump_clock):
    """Appending alone leaves readers asleep; the commit that follows wakes them."""
    log = Log("r1")
    reader, woken = attach(log), []

    async def wait() -> None:
        await reader.wait()
        woken.append(log.end)

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            log.append(note())
            log.append(note())
            await trio.testing.wait_all_tasks_blocked()
            assert [] == woken
            log.commit(2)

    assert [2] == woken


@pytest.mark.parametrize("steps", range(6))
async def test_no_wakeup_is_lost(autojump_clock, steps):
    """Whenever something is appended between a take and the wait that follows, the wait returns."""
    log = Log("r1")
    reader = attach(log)
    taken = bytearray()

    async def read() -> None:
        while taken != b"1\n2\n":
            taken.extend(reader.take())
            for _ in range(3):  # a writer that dawdles between taking and waiting
                await trio.lowlevel.checkpoint()
            if taken != b"1\n2\n":
                await reader.wait()

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for _ in range(2):
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                write(log)


async def test_a_wait_that_is_cancelled_loses_nothing(autojump_clock):
    """What was committed while nobody waited is there for the next take, without another ring."""
    log = Log("r1")
    reader = attach(log)
    with trio.move_on_after(1) as scope:
        await reader.wait()
    assert scope.cancelled_caught

    write(log)
    with trio.fail_after(SECONDS):
        await reader.wait()
    assert b"1\n" == reader.take()


async def test_waiting_for_a_closed_log_returns(autojump_clock):
    """There is nothing to wait for any more."""
    log = Log("r1")
    reader = attach(log)
    log.close()

    assert reader.is_finished
    with trio.fail_after(SECONDS), trio.testing.assert_checkpoints():
        await reader.wait()


async def test_closing_a_stream_keeps_the_first_reason(autojump_clock):
    """The server ends one stream, and wakes its writer; the log and other readers go on."""
    log = Log("r1")
    reader, other = attach(log), attach(log)
    assert None is reader.closing

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.wait)
        await trio.testing.wait_all_tasks_blocked()
        reader.close("rotated")
        reader.close("shutdown")

    assert "rotated" == reader.closing
    assert None is other.closing
    assert not log.closed


async def test_silence_rings_with_a_beat(autojump_clock):
    """Who is woken for a heartbeat can tell it from an event."""
    log = Log("r1")
    reader = attach(log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not reader.beat
        reader.ring_for_silence()

    assert reader.beat
    assert not reader.is_behind


async def test_a_reader_that_was_detached_is_not_rung(autojump_clock):
    """Nothing in the log refers to it any more."""
    log = Log("r1")
    reader = attach(log)
    with trio.move_on_after(1):
        await reader.wait()
    assert {reader} == log._waiting

    log.detach(reader)
    assert set() == log._waiting
    assert {} == log._renderings


# Renderings


def test_each_event_is_encoded_once_however_many_read():
    """Readers with equal keys share frames, wherever they begin; others have an encoder each."""
    log, shared, own = Log("r1"), Lines(), Lines()
    readers = [attach(log, shared, Position(start)) for start in (0, 0, 3)]
    other = attach(log, own, key="other")
    write(log, 5)

    assert [b"1\n2\n3\n4\n5\n", b"1\n2\n3\n4\n5\n", b"4\n5\n"] == [drain(r) for r in readers]
    late = attach(log, shared, Position(4))
    assert b"5\n" == drain(late)
    assert Counter(range(1, 6)) == shared.fed
    assert Counter() == own.fed
    assert b"1\n2\n3\n4\n5\n" == drain(other)


def test_a_rendering_goes_with_its_last_reader():
    """Frames are kept while somebody reads them; who comes later has them made again."""
    log, encoder = Log("r1"), Lines()
    write(log, 2)
    first, second = attach(log, encoder), attach(log, encoder)
    drain(first)
    log.detach(first)
    assert b"1\n2\n" == drain(second)
    assert Counter([1, 2]) == encoder.fed

    log.detach(second)
    third = attach(log, encoder)
    assert third.rendering is not second.rendering
    drain(third)
    assert Counter([1, 2, 1, 2]) == encoder.fed


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (START, ["1.1", "1.2", "1", "2.1", "2.2", "2"]),
        (Position(1, 1), ["1.2", "1", "2.1", "2.2", "2"]),
        (Position(1, 2), ["1", "2.1", "2.2", "2"]),
        (Position(1), ["2.1", "2.2", "2"]),
        (Position(1, 3), ["2.1", "2.2", "2"]),
        (Position(1, 9), ["2.1", "2.2", "2"]),
        (Position(2, 2), ["2"]),
        (Position(2), []),
    ],
)
@pytest.mark.parametrize("is_early", [True, False])
def test_a_reader_begins_behind_any_frame(after, expected, is_early):
    """Also in the middle of an event's frames, and also where nothing has been encoded yet."""
    log = Log("r1")
    if is_early:
        reader = attach(log, Lines(3), after)
        write(log, 2)
    else:
        write(log, 2)
        drain(attach(log, Lines(3)))
        reader = attach(log, Lines(3), after)

    assert expected == drain(reader).decode().split()
    write(log)
    assert ["3.1", "3.2", "3"] == drain(reader).decode().split()


def test_a_place_that_is_not_there_yet_can_be_waited_for():
    """Nothing comes until the log has grown past it, and nobody spins meanwhile."""
    log = Log("r1")
    write(log)
    reader = attach(log, Lines(), Position(3))
    assert b"" == drain(reader)
    assert not reader.is_behind
    write(log, 3)

    assert b"4\n" == drain(reader)


def test_an_event_may_have_no_frames():
    """A reader that filters is up to date, though nothing came."""
    log = Log("r1")
    reader = attach(log, Lines(0))
    write(log, 3)

    assert reader.is_behind
    assert b"" == reader.take()
    assert not reader.is_behind


@attrs.define(eq=False)
class Fragile:
    """An encoder that fails in the middle of an event, as often as it is told to."""

    fails: int

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Make two frames, or one and an error."""
        yield b"%d.1\n" % event.seq
        if event.seq == 2 and self.fails:
            self.fails -= 1
            raise RuntimeError("no")
        yield b"%d\n" % event.seq


def test_an_encoder_that_fails_adds_nothing_for_that_event():
    """What was encoded before it is there, and nothing twice once it has come round."""
    log = Log("r1")
    write(log, 3)
    reader = attach(log, Fragile(2))
    with pytest.raises(RuntimeError):
        reader.take()
    assert (1, [b"1.1\n1\n"]) == (reader.rendering.rendered, reader.rendering.blocks)

    assert b"1.1\n1\n" == reader.take()
    with pytest.raises(RuntimeError):
        reader.take()
    assert b"2.1\n2\n3.1\n3\n" == drain(reader)


def test_a_take_encodes_a_thousand_events_at_most():
    """Who comes late to a long log does not stall the loop: each take goes on where one stopped."""
    log, encoder = Log("r1"), Lines()
    write(log, 3 * STRIDE)
    late = attach(log, encoder, Position(3 * STRIDE - 1))
    assert late.is_behind
    for taken in (STRIDE, 2 * STRIDE):
        assert b"" == late.take()
        assert late.is_behind
        assert taken == encoder.fed.total()

    assert b"3000\n" == drain(late)
    assert not late.is_behind
    assert Counter(range(1, 3 * STRIDE + 1)) == encoder.fed


def test_a_take_encodes_no_more_than_a_write():
    """Large events are encoded only as far as the next write reaches."""
    log, encoder = Log("r1"), Blocks(MAX_WRITE // 4)
    write(log, 100)
    reader = attach(log, encoder)

    assert MAX_WRITE == len(reader.take())
    assert 4 == reader.rendering.rendered


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (MAX_WRITE // 2, [MAX_WRITE, MAX_WRITE]),
        (MAX_WRITE // 2 + 1, [MAX_WRITE // 2 + 1] * 4),
        (MAX_WRITE, [MAX_WRITE] * 4),
        (MAX_WRITE + 1, [MAX_WRITE + 1] * 4),
        (3 * MAX_WRITE, [3 * MAX_WRITE] * 4),
        (10, [40]),
    ],
)
def test_a_take_is_a_write(size, expected):
    """Whole frames, 64 KiB at most; a frame larger than that comes alone."""
    log = Log("r1")
    write(log, 4)
    reader = attach(log, Blocks(size))
    takes = []
    while taken := reader.take():
        takes.append(len(taken))

    assert expected == takes


async def test_a_slow_reader_keeps_nobody_waiting(autojump_clock):
    """One that never takes costs the others nothing, and finds all of it when it comes back."""
    log, quick = Log("r1"), []
    slow = attach(log, Blocks(1_000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, attach(log, Blocks(1_000)), quick)
        for _ in range(500):
            write(log)
            await trio.lowlevel.checkpoint()
        log.close()

    assert 500_000 == sum(map(len, quick)) == len(drain(slow))


# Streams that end before the log does


STOP = frozenset({PartFinished})


def stop() -> PartFinished:
    return PartFinished(part_id="p", kind="text", text="")


def speak(log: Log, plan: str) -> None:
    """Append a stop for every `|`, and else a note; visible at once."""
    for sign in plan:
        log.commit(log.append(stop() if sign == "|" else note()))


def attach_to_stop(log: Log, after: Position = START, parts: int = 1, **more) -> Reader:
    return log.attach("stops", lambda: Lines(parts), after, ends_at=STOP, **more)


def test_a_reader_is_finished_behind_the_event_it_ends_at():
    """The log goes on; whoever begins there reads on to the next one, or to the end."""
    log = Log("r1")
    early = attach_to_stop(log)
    speak(log, "..|..|.")
    readers = [early, *(attach_to_stop(log, Position(place)) for place in (2, 3, 5, 6))]

    expected = ["1\n2\n3\n", "3\n", "4\n5\n6\n", "6\n", "7\n"]
    assert expected == [drain(reader).decode() for reader in readers]
    assert [True, True, True, True, False] == [reader.is_finished for reader in readers]
    assert {False} == {reader.is_behind for reader in readers}
    assert {b""} == {reader.take() for reader in readers}
    log.close()
    assert {True} == {reader.is_finished for reader in readers}
    assert {False} == {reader.is_behind for reader in readers}


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_reader_ends_behind_all_frames_of_its_last_event(parts):
    """Also where it began between two of them, or what it ends at is the first event of all."""
    log = Log("r1")
    speak(log, "|.|")
    for part in range(1, parts):
        reader = attach_to_stop(log, Position(1, part), parts)
        assert [frame_id(1, p, parts) for p in range(part + 1, parts + 1)] == (
            drain(reader).decode().split()
        )
        assert reader.is_finished

    reader = attach_to_stop(log, Position(1), parts)
    assert 2 * parts == len(drain(reader).split())
    assert reader.is_finished


@pytest.mark.parametrize("is_there", [True, False])
def test_a_reader_that_waits_for_its_end_is_not_finished_before(is_there):
    """What it ends at may be in the log, or not yet."""
    log = Log("r1")
    reader = attach_to_stop(log)
    speak(log, "..")
    assert b"1\n2\n" == drain(reader)
    assert (False, False) == (reader.is_finished, reader.is_behind)
    speak(log, "|." if is_there else ".")

    assert reader.is_behind
    assert (b"3\n", is_there) == (drain(reader), reader.is_finished)


def test_an_end_that_others_have_seen_is_not_this_reader_s():
    """Readers of one rendering have each the end behind their own beginning."""
    log = Log("r1")
    first = attach_to_stop(log)
    speak(log, ".|")
    drain(first)
    second = attach_to_stop(log, Position(2))
    assert (True, False) == (first.is_finished, second.is_finished)
    speak(log, ".|.|")

    assert b"" == first.take()
    assert (b"3\n4\n", True) == (drain(second), second.is_finished)
    third = attach_to_stop(log, Position(3))
    assert (b"4\n", True) == (drain(third), third.is_finished)


def test_a_write_ends_where_the_reader_does():
    """A take is cut there, though there were room for more."""
    log = Log("r1")
    reader = log.attach("stops", lambda: Blocks(MAX_WRITE // 4), START, ends_at=STOP)
    speak(log, "." * 9 + "|" + "." * 9)
    takes = []
    while taken := reader.take():
        takes.append(len(taken) * 4 // MAX_WRITE)

    assert [4, 4, 2] == takes
    assert reader.is_finished


def test_an_end_far_down_a_long_log_is_found():
    """Each take encodes a stride; a place that is not encoded yet is no end."""
    log = Log("r1")
    speak(log, "|" + "." * 2 * STRIDE + "|.")
    reader = attach_to_stop(log, Position(2 * STRIDE))
    assert (b"", True, False) == (reader.take(), reader.is_behind, reader.is_finished)

    assert b"%d\n%d\n" % (2 * STRIDE + 1, 2 * STRIDE + 2) == drain(reader)
    assert reader.is_finished


def test_who_reads_on_sees_all_of_it():
    """Beside those that end, in the same frames; it is finished when the log is."""
    log, encoder = Log("r1"), Lines()
    ends = log.attach("stops", lambda: encoder, START, ends_at=STOP)
    speak(log, ".|.|.")
    on = [attach_to_stop(log, Position(place), reads_on=True) for place in (0, 2, 3)]

    assert (b"1\n2\n", True) == (drain(ends), ends.is_finished)
    assert [b"1\n2\n3\n4\n5\n", b"3\n4\n5\n", b"4\n5\n"] == [drain(reader) for reader in on]
    assert {False} == {reader.is_finished for reader in on}
    log.close()
    assert {True} == {reader.is_finished for reader in on}
    assert Counter(range(1, 6)) == encoder.fed


def test_who_reads_on_past_some_events_ends_at_the_next():
    """What others ended at before is behind this reader, also while that is not encoded yet."""
    log = Log("r1")
    speak(log, ".|.|.|.")
    readers = [attach_to_stop(log, Position(place), past=past) for place, past in
               ((0, 0), (0, 3), (2, 3), (5, 3), (0, 7))]  # fmt: skip

    assert [b"1\n2\n", b"1\n2\n3\n4\n", b"3\n4\n", b"6\n", b"1\n2\n3\n4\n5\n6\n7\n"] == [
        drain(reader) for reader in readers
    ]
    assert [True] * 4 + [False] == [reader.is_finished for reader in readers]

    long = Log("r2")
    speak(long, "|" + "." * 2 * STRIDE + "|.")
    reader = attach_to_stop(long, START, past=2 * STRIDE)
    assert b"".join(b"%d\n" % n for n in range(1, 2 * STRIDE + 3)) == drain(reader)
    assert reader.is_finished


def test_who_reads_on_from_far_down_a_long_log_is_not_finished_before():
    """Its place is not encoded yet, and what others end at is."""
    log = Log("r1")
    speak(log, "|" + "." * 2 * STRIDE)
    reader = attach_to_stop(log, Position(2 * STRIDE), reads_on=True)
    assert (b"", True, False) == (reader.take(), reader.is_behind, reader.is_finished)
    assert b"%d\n" % (2 * STRIDE + 1) == drain(reader)


async def test_waiting_for_a_reader_s_end_returns(autojump_clock):
    """What it ends at wakes it like anything else."""
    log, writes = Log("r1"), []
    reader = attach_to_stop(log)
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, reader, writes)
            for sign in "..|..":
                await trio.testing.wait_all_tasks_blocked()
                speak(log, sign)

    assert [b"1\n", b"2\n", b"3\n"] == writes


# Coalescing


def deltas(log: Log) -> list[str]:
    """What stands in the log: `name:delta` for deltas, the type's name for the rest."""
    shown = []
    for event in log.events:
        match event:
            case PartDelta():
                shown.append(f"{event.part_id}:{event.delta}")
            case ToolOutputDelta():
                shown.append(f"{event.call_id}:{event.delta}")
            case _:
                shown.append(type(event).__name__)
    return shown


async def test_the_first_delta_goes_at_once_and_later_ones_once_per_window(autojump_clock, timer):
    """What comes within a window is one event at its end."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    for number in range(5):
        writer.append(said(str(number)))
    assert ["p:0"] == deltas(log)

    await trio.sleep(0.06)
    assert ["p:0", "p:1234"] == deltas(log)
    assert 2 == log.end

    writer.append(said("5"))
    assert ["p:0", "p:1234"] == deltas(log)
    await trio.sleep(0.06)
    assert ["p:0", "p:1234", "p:5"] == deltas(log)

    await trio.sleep(1)
    writer.append(said("6"))
    assert ["p:0", "p:1234", "p:5", "p:6"] == deltas(log)


async def test_a_steady_stream_is_one_event_per_window(autojump_clock, timer):
    """A thousand tokens in a second are twenty events or fewer, and the same text."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    for _ in range(1_000):
        writer.append(said("x"))
        await trio.sleep(0.001)
    await trio.sleep(1)

    assert 1_000 == sum(len(event.delta) for event in log.events)
    assert len(log.events) <= 21


async def test_parts_side_by_side_keep_their_own_text(autojump_clock, timer):
    """Deltas of several parts and tools interleave; each is joined with its own, in order."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    for number in range(3):
        writer.append(said(f"a{number}", "a"))
        writer.append(said(f"b{number}", "b"))
        writer.append(printed(f"c{number}", "a"))  # a call may bear the name of its part
    assert ["a:a0"] == deltas(log)

    await trio.sleep(0.06)
    assert ["a:a0", "b:b0b1b2", "a:c0c1c2", "a:a1a2"] == deltas(log)
    assert ["PartDelta", "PartDelta", "ToolOutputDelta", "PartDelta"] == [
        type(event).__name__ for event in log.events
    ]


async def test_joining_keeps_who_spoke_and_how(autojump_clock, timer):
    """All but the text is as it was in the delta."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    for text in "abc":
        writer.append(PartDelta(part_id="p", kind="reasoning", delta=text, path=("worker:3",)))
    await trio.sleep(0.06)

    assert [("a", "reasoning", ("worker:3",)), ("bc", "reasoning", ("worker:3",))] == [
        (event.delta, event.kind, event.path) for event in log.events
    ]


async def test_another_event_flushes_in_order(autojump_clock, timer):
    """What is no delta comes behind all the deltas before it, and the next delta goes at once."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    for event in (said("a"), said("b"), said("c"), note(), said("d"), said("e")):
        writer.append(event)
    assert ["p:a", "p:bc", "Custom", "p:d"] == deltas(log)
    assert 4 == log.end

    await trio.sleep(0.06)
    assert ["p:a", "p:bc", "Custom", "p:d", "p:e"] == deltas(log)
    assert [1, 2, 3, 4, 5] == [event.seq for event in log.events]


async def test_without_a_window_every_delta_is_an_event():
    """Zero turns it off, and the timer is not asked for anything."""
    log, timer = Log("r1"), Timer()
    writer = Coalescer(log, timer, 0)
    for text in "abc":
        writer.append(said(text))
    writer.flush()
    await trio.lowlevel.checkpoint()

    assert ["p:a", "p:b", "p:c"] == deltas(log)
    assert 3 == log.end
    assert [] == timer._heap


async def test_no_more_is_held_than_a_write_takes(autojump_clock, timer):
    """Who speaks much in a window is heard before its end; the window begins anew."""
    log = Log("r1")
    writer = Coalescer(log, timer, 10)
    writer.append(said("first"))
    for _ in range(7):
        writer.append(said("x" * (MAX_WRITE // 8), "p"))
        assert 1 == log.end
    writer.append(printed("y" * (MAX_WRITE // 8)))

    assert ["first", "x" * (7 * MAX_WRITE // 8), "y" * (MAX_WRITE // 8)] == [
        event.delta for event in log.events
    ]
    writer.append(said("later"))
    assert 3 == log.end
    assert 1 == len([due for _, _, due in timer._heap if due.function is not None])
    await trio.sleep(11)
    assert 4 == log.end


@pytest.mark.parametrize("window", [0, 0.05])
def test_a_delta_that_is_no_text_is_refused(window):
    """It could not be joined with others, and nobody could read it."""
    log = Log("r1")
    writer = Coalescer(log, Timer(), window)
    for delta in (None, 5, b"x"):
        with pytest.raises(TypeError, match=f"in a delta, got {type(delta).__name__}$"):
            writer.append(said(delta))

    assert [] == log.events


async def test_nothing_is_lost_at_the_end(autojump_clock, timer):
    """The last event finds all deltas in the log; the timer has nothing to add behind it."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    for text in "abc":
        writer.append(said(text))
    writer.append(PartFinished(part_id="p", kind="text", text="abc"))
    log.close()

    await trio.sleep(1)
    assert ["p:a", "p:bc", "PartFinished"] == deltas(log)


async def test_a_flush_of_nothing_is_nothing(autojump_clock, timer):
    """No commit, no window."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    writer.flush()
    writer.append(said("a"))
    assert ["p:a"] == deltas(log)

    await trio.sleep(1)
    writer.flush()
    assert ["p:a"] == deltas(log)


async def test_what_cannot_be_encoded_is_refused_before_it_is_held(autojump_clock, timer):
    """The error meets whoever spoke, never the timer, and takes nobody else's words with it."""
    log = Log("r1")
    writer = Coalescer(log, timer, 0.05)
    writer.append(said("a"))
    writer.append(said("b", "q"))
    with pytest.raises(ValueError, match="surrogates"):
        writer.append(said("\ud83d"))
    await trio.sleep(1)

    assert ["p:a", "q:b"] == deltas(log)


async def test_readers_wake_once_per_window(autojump_clock, timer, nursery):
    """A window's deltas of many parts are one commit, so one write."""
    log, writes = Log("r1"), []
    writer = Coalescer(log, timer, 0.05)
    nursery.start_soon(follow, attach(log), writes)
    writer.append(said("first"))
    await trio.testing.wait_all_tasks_blocked()
    for number in range(10):
        writer.append(said("x", f"p{number}"))
    await trio.sleep(0.06)
    log.close()

    assert [b"1\n", b"".join(b"%d\n" % number for number in range(2, 12))] == writes


def test_a_frame_of_the_log_is_the_event_itself():
    """Numbers and times are in the event before any encoder sees it."""
    log = Log("r1", Stamps(lambda: 0))

    @attrs.define
    class Native:
        def feed(self, event: AnyEvent) -> Iterable[bytes]:
            return (encode_event(event),)

    write(log)
    event = decode_event(attach(log, Native()).take())

    assert ("r1", 1, "1970-01-01T00:00:00.000Z") == (event.run_id, event.seq, event.ts)
    assert not isinstance(event, RunFinished)


async def test_a_burst_is_one_event_and_waits_for_no_window(autojump_clock, timer):
    """Bursts that come a window apart go out as they end, each part's deltas joined."""
    log = Log("r")
    writer = Coalescer(log, timer, 0.05)
    for number in range(3):
        writer.lull()
        await trio.sleep(0.05)
        for delta in "abc":
            writer.append(said(f"{delta}{number}"))
        assert number == log.end
    writer.lull()
    assert ["p:a0b0c0", "p:a1b1c1", "p:a2b2c2"] == deltas(log)


async def test_a_burst_that_comes_too_early_waits_for_its_window(autojump_clock, timer):
    """Whoever reads more often than the window does not write more often."""
    log = Log("r")
    writer = Coalescer(log, timer, 0.05)
    for number in range(8):
        writer.lull()
        await trio.sleep(0.01)
        writer.append(said(str(number)))
    writer.lull()
    assert 2 == log.end
    await trio.sleep(0.05)
    assert "01234567" == "".join(event.delta for event in log.events)


async def test_a_burst_that_nobody_ends_goes_out_all_the_same(autojump_clock, timer):
    """A source that has no lulls any more loses nothing."""
    log = Log("r")
    writer = Coalescer(log, timer, 0.05)
    writer.lull()
    writer.append(said("a"))
    writer.append(said("b"))
    await trio.sleep(0.9)
    assert 0 == log.end
    await trio.sleep(0.2)
    assert ["p:ab"] == deltas(log)
    writer.lull()
    writer.append(said("c"))
    writer.lull()
    assert ["p:ab", "p:c"] == deltas(log)
    await trio.sleep(2)
    writer.append(said("d"))
    writer.forget()
    await trio.sleep(2)
    assert ["p:ab", "p:c"] == deltas(log)


async def test_what_is_no_delta_ends_a_burst(autojump_clock, timer):
    """The first delta behind it goes out at once, as always."""
    log = Log("r")
    writer = Coalescer(log, timer, 0.05)
    writer.lull()
    writer.append(said("a"))
    writer.append(PartFinished(part_id="p", kind="text", text="a"))
    writer.append(said("b"))
    assert ["p:a", "PartFinished", "p:b"] == deltas(log)


async def test_a_lull_means_nothing_where_nothing_is_joined(autojump_clock, timer):
    """With a window of 0 each delta stands for itself."""
    log = Log("r")
    writer = Coalescer(log, timer, 0)
    writer.lull()
    writer.append(said("a"))
    writer.append(said("b"))
    assert ["p:a", "p:b"] == deltas(log)


async def test_those_who_wait_for_one_tick_wake_up_together(autojump_clock, timer):
    """Not before their time, and up to a tick later."""
    woken = []

    async def sleep(when):
        await timer.sleep_until(when)
        woken.append(trio.current_time())

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(sleep, start + 1 + number / 10_000)
    assert 10 == len(woken)
    assert len(set(woken)) <= 2
    assert all(when >= start + 1 for when in woken)
    assert max(woken) <= start + 1.0009 + 0.005 + 1e-9


async def test_a_wait_that_is_cancelled_is_forgotten(autojump_clock, timer):
    """Nobody is woken who no longer sleeps."""
    with trio.move_on_after(1) as scope:
        await timer.sleep_until(trio.current_time() + 5)
    assert scope.cancelled_caught
    await trio.sleep(10)
    assert not timer._heap


async def test_a_burst_that_came_too_early_does_not_delay_those_behind_it(autojump_clock, timer):
    """From the next one on, each goes out as it ends."""
    log = Log("r")
    writer = Coalescer(log, timer, 0.05)
    writer.append(said("0"))
    await trio.sleep(0.02)
    for number in range(1, 5):
        writer.lull()
        writer.append(said(str(number)))
        writer.lull()
        assert (number > 1) == (number == log.events[-1].seq - 1), number
        await trio.sleep(0.051)
    assert ["p:0", "p:1", "p:2", "p:3", "p:4"] == deltas(log)


async def test_what_the_timer_calls_may_fail_and_the_rest_goes_on(autojump_clock):
    """It is reported, and nobody else notices."""
    errors, done = [], []
    timer = Timer(errors.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timer.run)
        timer.call_at(trio.current_time() + 1, lambda: {}["nothing"])
        timer.call_at(trio.current_time() + 1, lambda: done.append(1))
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert ["KeyError"] == [type(error).__name__ for error in errors]
    assert [1] == done


async def test_a_held_delta_that_cannot_be_encoded_is_refused_where_it_comes(autojump_clock):
    """Not when its time has come: there nobody would know whose it was."""
    log = Log("r")
    writer = Coalescer(log, Timer(), 0.05)
    writer.append(said("a"))
    with pytest.raises(ValueError, match="surrogate"):
        writer.append(PartDelta(part_id="\ud800", kind="text", delta="b"))
    writer.flush()
    assert ["p:a"] == deltas(log)
