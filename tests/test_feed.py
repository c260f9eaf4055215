"""Feeds: what is held, what a reader gets from every place, and what it is told that it missed.

Encoders here name each event by its id and count what they are fed. Nothing waits for a clock.
"""

import math
from collections import Counter
from collections.abc import Callable

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from agentsse.dialects import Request
from agentsse.dialects.native import NATIVE, decode_watch_feed
from agentsse.errors import BadRequest, Overloaded
from agentsse.events import AnyEvent, Custom, Gap, decode_event, encode_event, encode_json
from agentsse.feed import MAX_FRAMES, MAX_WAYS, NOW, Feed, FeedReader
from agentsse.log import MAX_WRITE, Stamps
from agentsse.sse import Decoder, encode

SECONDS = 60  # of the mock clock where it jumps: only what hangs ever gets there
THEN = "1970-01-01T00:00:00.000Z"


def note(text: str = "x") -> Custom:
    return Custom(name=text, value=encode_json(None))


def make(**bounds: int) -> Feed:
    return Feed(Stamps(lambda: 0), epoch="e", **bounds)


def tell(feed: Feed, events: int = 1, *, size: int = 1) -> None:
    """Have so many events happen, one after the other, of so many bytes each."""
    for _ in range(events):
        feed.extend([note()], size)


@attrs.define(eq=False)
class Lines:
    """An encoder of one line per event, its id, that counts what it is fed."""

    fed: Counter[str] = attrs.field(factory=Counter)

    def feed(self, event: AnyEvent, id: str) -> tuple[bytes, ...]:
        """Name the event, or what is missing."""
        if isinstance(event, Gap):
            return (f"gap({event.from_id},{event.to_id})\n".encode(),)
        self.fed[id] += 1
        return (f"{id}\n".encode(),)


@attrs.define(eq=False)
class Blocks:
    """An encoder of one frame of `size` bytes per event, or only for every `nth` one."""

    size: int
    nth: int = 1

    def feed(self, event: AnyEvent, id: str) -> tuple[bytes, ...]:
        """Repeat a letter."""
        if isinstance(event, Gap):
            return (b"gap",)
        return (b"x" * self.size,) if int(id.partition("-")[2]) % self.nth == 0 else ()


@attrs.define(eq=False)
class Fragile:
    """An encoder that raises at some event, as often as it is told to."""

    id: str
    fails: int = 1

    def feed(self, _event: AnyEvent, id: str) -> tuple[bytes, ...]:
        """Name the event, or fail."""
        if id == self.id and self.fails:
            self.fails -= 1
            raise ZeroDivisionError(id)
        return (f"{id}\n".encode(),)


def attach(feed: Feed, encoder=None, after: str | None = None, **more) -> FeedReader:
    key = more.pop("key", "lines")
    return feed.attach(key, lambda: encoder if encoder is not None else Lines(), after, **more)


def drain(reader: FeedReader) -> list[str]:
    """Take until nothing comes; the lines."""
    taken = b""
    while piece := reader.take():
        taken += piece
    assert not reader.is_behind
    return taken.decode().split()


def ids(*numbers: int) -> list[str]:
    return [f"e-{number}" for number in numbers]


# What is held


def test_a_feed_holds_the_events_themselves_in_their_order():
    """The same objects, with numbers from one on; nothing of an event is changed."""
    feed = make()
    assert (1, 0, ()) == (feed.first, feed.last, feed.events)
    first, *more = events = [note(name) for name in "abc"]
    feed.extend([first], 10)
    feed.extend(more, 20)

    assert (1, 3) == (feed.first, feed.last)
    assert all(told is held for told, held in zip(events, feed.events, strict=True))
    assert feed[2] is events[1]
    assert ("", 0) == (first.ts, first.seq)
    assert "e-3" == feed.id_of(feed.last)


def test_what_is_held_can_be_looked_at_while_the_feed_goes_on():
    """It is a sequence like any other, and a copy."""
    feed = make(max_events=3)
    tell(feed, 3)
    held = feed.events
    tell(feed, 3)

    assert 2 == len(held[1:])
    assert set(map(id, held)).isdisjoint(map(id, feed.events))


def test_each_feed_has_an_epoch_of_its_own():
    """An id of one is none of another, nor of the same thread's after a restart."""
    assert 100 == len({Feed(Stamps()).epoch for _ in range(100)})


def test_an_event_that_is_no_run_s_is_given_its_time():
    """It has no log that would do it."""
    feed = make()
    feed.append(note("mine"))

    assert [("mine", THEN, "", 0)] == [(e.name, e.ts, e.run_id, e.seq) for e in feed.events]
    assert len(encode_event(feed[1])) == feed._size


def test_an_event_of_two_feeds_has_one_time():
    """What stands in one does not change because of the other."""
    first, second = Feed(Stamps(lambda: 0)), Feed(Stamps(lambda: 10**12))
    first.append(event := note())
    second.append(event)

    assert (THEN, True) == (event.ts, first[1] is second[1])


def test_a_feed_is_bounded_by_count():
    """The oldest goes for the newest, also where many come at once."""
    feed = make(max_events=3)
    tell(feed, 5)
    assert (3, 5, 3) == (feed.first, feed.last, len(feed.events))

    feed.extend([note() for _ in range(10)], 10)
    assert (13, 15, 3) == (feed.first, feed.last, len(feed.events))


def test_a_feed_is_bounded_by_bytes():
    """However few events that are; sizes go with their events."""
    feed = make(max_bytes=100)
    tell(feed, 10, size=10)
    assert (1, 10, 100) == (feed.first, feed.last, feed._size)

    tell(feed, size=31)
    assert (5, 11, 91) == (feed.first, feed.last, feed._size)
    feed.extend([note(), note()], 2)
    assert (5, 13, 93) == (feed.first, feed.last, feed._size)


def test_an_event_that_is_too_large_is_held_alone():
    """The newest is there whatever its size, until the next one comes."""
    feed = make(max_bytes=100)
    tell(feed, 3)
    tell(feed, size=1_000)
    assert (4, 4, 1_000) == (feed.first, feed.last, feed._size)

    tell(feed, size=1)
    assert (5, 5, 1) == (feed.first, feed.last, feed._size)


def test_bytes_never_run_away():
    """What goes takes with it what it came with, to the byte."""
    feed = make(max_events=7)
    for number in range(1, 200):
        feed.extend([note() for _ in range(number % 5 + 1)], number)
    assert sum(feed._sizes) == feed._size
    assert 7 == len(feed._sizes) == len(feed.events)


def test_a_feed_knows_whether_it_is_read():
    """Ever, and now."""
    feed = make()
    assert (False, False) == (feed.is_used, feed.is_read)
    reader = attach(feed)
    assert (True, True) == (feed.is_used, feed.is_read)
    feed.detach(reader)
    assert (True, False) == (feed.is_used, feed.is_read)


# Where a reader begins


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (None, ids(1, 2, 3)),
        ("e-0", ids(1, 2, 3)),
        ("e-1", ids(2, 3)),
        ("e-3", []),
        (NOW, []),
    ],
)
def test_a_reader_begins_behind_an_id(after, expected):
    """Without one with all that is held, with `now` with what comes; then it gets everything."""
    feed = make()
    tell(feed, 3)
    reader = attach(feed, after=after)

    assert expected == drain(reader)
    tell(feed, 2)
    assert ids(4, 5) == drain(reader)


def test_now_is_when_the_reader_came():
    """Not when it first looks."""
    feed = make()
    reader = attach(feed, after=NOW)
    tell(feed, 2)

    assert ids(1, 2) == drain(reader)


@pytest.mark.parametrize(
    "after",
    [
        *("", "7", "-7", "e-", "e", "-", "e--", "NOW", "now ", "e-1 ", "e-x", "e-0x1"),
        *("e-²", "e-٣", "e-" + "1" * 16, "e-" + "9" * 5_000, "e-+1", "e-1_0", "e-1-", "e-07"),
        *("e-0.1", "e-1.0", "e-1.", "e-1.1.1", "e-1.x"),
    ],
)
def test_what_is_no_id_is_refused(after):
    """The error shows what one looks like, and cuts short what came."""
    feed = make()
    tell(feed, 10)
    with pytest.raises(
        BadRequest, match="expected the id of a feed's event, such as 1f00ba42-7, got '"
    ) as caught:
        attach(feed, after=after)

    assert len(caught.value.message) < 150
    assert (False, {}) == (feed.is_read, feed._renderings)


@pytest.mark.parametrize(("told", "after"), [(0, "e-1"), (3, "e-4"), (3, "e-" + "9" * 15)])
def test_an_id_that_was_not_given_yet_is_refused(told, after):
    """Nobody can have seen it; the error says up to which there are."""
    feed = make()
    tell(feed, told)
    with pytest.raises(BadRequest, match=f"expected an id up to e-{told}, got '{after}'; leave it"):
        attach(feed, after=after)

    assert (False, {}) == (feed.is_read, feed._renderings)


def test_a_reader_without_an_id_may_want_only_some_of_what_is_held():
    """What comes after it has come it gets whole."""
    feed = make(max_events=5)
    tell(feed, 8)
    seen = []

    def replay(events):
        seen.extend(events)
        return frozenset({0, 3})

    reader = attach(feed, replay=replay)
    tell(feed)
    assert list(feed.events)[:4] == seen[1:]
    assert ["gap(e-4,e-4)", *ids(7, 9)] == drain(reader)
    assert ids() == drain(attach(feed, replay=lambda _events: frozenset()))


@pytest.mark.parametrize("after", ["e-1", "f-1", NOW])
def test_whoever_has_an_id_is_given_all_behind_it(after):
    """Nothing is picked for somebody who was there before."""
    feed = make()
    tell(feed, 3)

    def replay(_events):
        raise AssertionError

    expected = {"e-1": ids(2, 3), "f-1": ["gap(f-1,e-0)", *ids(1, 2, 3)], NOW: []}
    assert expected[after] == drain(attach(feed, after=after, replay=replay))


def test_a_greeting_comes_once_and_before_everything():
    """Also before what was missed, and for each reader its own."""
    feed = make(max_events=2)
    tell(feed, 3)
    readers = [attach(feed, after=a, greeting=g) for a, g in ((None, b"hi\n"), ("e-0", b"ho\n"))]

    assert [["hi", *ids(2, 3)], ["ho", "gap(e-1,e-1)", *ids(2, 3)]] == [drain(r) for r in readers]
    tell(feed)
    assert [ids(4), ids(4)] == [drain(r) for r in readers]


# What was missed


@pytest.mark.parametrize("told", [0, 3, 9])
def test_a_foreign_epoch_is_one_gap(told):
    """The id is from before a restart: it gets all that is held, and knows that there was more."""
    feed = make(max_events=5)
    tell(feed, told)
    first = max(1, told - 4)
    reader = attach(feed, after="f-7")

    assert [f"gap(f-7,e-{first - 1})", *ids(*range(first, told + 1))] == drain(reader)
    tell(feed, 5)
    assert ids(*range(told + 1, told + 6)) == drain(reader)


def test_a_foreign_id_may_have_dashes_of_its_own():
    """Whatever stands before the last one is the epoch."""
    assert ["gap(some-thing-7,e-0)"] == drain(attach(make(), after="some-thing-7"))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("e-0", ["gap(e-1,e-3)", *ids(4, 5)]),
        ("e-2", ["gap(e-3,e-3)", *ids(4, 5)]),
        ("e-3", ids(4, 5)),
        ("e-4", ids(5)),
        (None, ids(4, 5)),
    ],
)
def test_an_id_that_is_no_longer_held_is_one_gap(after, expected):
    """It names the first and the last that were missed; the last that is not held is no gap."""
    feed = make(max_events=2)
    tell(feed, 5)

    assert expected == drain(attach(feed, after=after))


def test_a_reader_that_falls_behind_is_told_once_each_time():
    """However much it has missed; where it keeps up it is told nothing."""
    feed = make(max_events=3)
    reader = attach(feed)
    tell(feed, 3)
    assert ids(1, 2, 3) == drain(reader)
    tell(feed, 3)
    assert ids(4, 5, 6) == drain(reader)
    tell(feed, 4)
    assert ["gap(e-7,e-7)", *ids(8, 9, 10)] == drain(reader)
    tell(feed, 100)
    assert ["gap(e-11,e-107)", *ids(108, 109, 110)] == drain(reader)
    tell(feed)
    assert ids(111) == drain(reader)


def test_who_had_missed_something_before_and_falls_behind_is_told_once():
    """One gap from where it was to what is held now."""
    feed = make(max_events=2)
    tell(feed, 2)
    readers = [attach(feed, after=after) for after in ("f-1", "e-0")]
    tell(feed, 10)

    assert ["gap(f-1,e-10)", *ids(11, 12)] == drain(readers[0])
    assert ["gap(e-1,e-10)", *ids(11, 12)] == drain(readers[1])


def test_a_gap_has_its_time_and_no_id():
    """It is made for its reader alone: nothing stands in the feed."""
    feed, seen = make(max_events=1), []

    @attrs.define
    class Keeps:
        def feed(self, event: AnyEvent, id: str) -> tuple[bytes, ...]:
            seen.append((event, id))
            return (b"x",)

    tell(feed, 3)
    attach(feed, Keeps(), "e-0").take()

    assert [(Gap(from_id="e-1", to_id="e-2", ts=THEN), ""), (feed[3], "e-3")] == seen


def test_the_hole_may_open_between_two_takes():
    """Of what a slow reader has not taken yet it gets what is left, with the gap where it was."""
    feed = make(max_events=10)
    reader = attach(feed, Blocks(MAX_WRITE))
    tell(feed, 10)
    assert MAX_WRITE == len(reader.take())
    assert reader.is_behind
    tell(feed, 5)

    assert (2, 6) == (reader.cursor, feed.first)
    taken = []
    while piece := reader.take():
        taken.append(piece)
    assert b"gap" + b"x" * 10 * MAX_WRITE == b"".join(taken)
    assert 10 == len(taken)


# Frames


def test_each_event_is_encoded_once_however_many_read():
    """Readers with equal keys share frames, wherever they begin; others have an encoder each."""
    feed, shared, own = make(), Lines(), Lines()
    tell(feed, 2)
    readers = [attach(feed, shared, after) for after in (None, "e-1", NOW, None)]
    other = attach(feed, own, key="other")
    tell(feed, 3)

    assert [ids(1, 2, 3, 4, 5), ids(2, 3, 4, 5), ids(3, 4, 5), ids(1, 2, 3, 4, 5)] == [
        drain(reader) for reader in readers
    ]
    assert Counter() == own.fed
    assert ids(1, 2, 3, 4, 5) == drain(other)
    late = attach(feed, Lines(), "e-4")
    assert ids(5) == drain(late)
    assert Counter(ids(1, 2, 3, 4, 5)) == shared.fed == own.fed


def test_an_encoder_that_has_missed_an_event_is_made_anew():
    """Whoever speaks never waits for one, so none sees what nobody takes."""
    feed, made = make(max_events=3), []

    def make_encoder() -> Lines:
        made.append(Lines())
        return made[-1]

    reader = feed.attach("lines", make_encoder, None)
    tell(feed, 2)
    assert ids(1, 2) == drain(reader)
    tell(feed, 10)
    assert [ids(1, 2)] == [list(encoder.fed) for encoder in made]
    assert [] == list(reader.rendering.frames)

    assert ["gap(e-3,e-9)", *ids(10, 11, 12)] == drain(reader)
    assert [ids(1, 2), ids(10, 11, 12)] == [list(encoder.fed) for encoder in made]
    tell(feed)
    assert [(b"e-11\n",), (b"e-12\n",)] == list(reader.rendering.frames)


def test_an_encoder_that_comes_late_begins_with_what_is_held():
    """And is none the worse for what others have read before."""
    feed, early, late = make(max_events=3), Lines(), Lines()
    drain(attach(feed, early, key="early"))
    tell(feed, 5)
    reader = attach(feed, late, "e-4", key="late")
    tell(feed)

    assert ids(5, 6) == drain(reader)
    assert [] == list(early.fed)
    assert ids(4, 5, 6) == list(late.fed)


def test_whoever_comes_back_finds_the_encoder_as_it_was():
    """It knows what began before; its frames are gone, and it is not asked for what it has made."""
    feed, encoder, anew = make(max_events=4), Lines(), Lines()
    first, second, other = attach(feed, encoder), attach(feed, encoder), attach(feed, key="other")
    tell(feed, 2)
    drain(first)
    feed.detach(first)
    assert ids(1, 2) == drain(second)
    feed.detach(second)
    assert [] == list(second.rendering.frames)
    tell(feed, 4)
    assert ids(1, 2) == list(encoder.fed)

    third = attach(feed, anew, "e-2")
    assert third.rendering is first.rendering
    assert ids(3, 4, 5, 6) == drain(third)
    assert Counter(ids(*range(1, 7))) == encoder.fed
    assert other.rendering is attach(feed, key="other").rendering
    late = attach(feed, anew, "e-4")  # who has not seen the beginning sees it by another one
    assert late.rendering is third.rendering
    assert ids(5, 6) == drain(late)
    tell(feed)
    assert (ids(7), ids(7)) == (drain(third), drain(late))
    assert ids(*range(1, 8)) == list(encoder.fed)


def test_one_way_of_reading_is_kept_that_nobody_uses():
    """The one that was used last; one that is in use is never lost."""
    feed = make()
    readers = {key: attach(feed, key=key) for key in "abcd"}
    for key in "bca":
        feed.detach(readers[key])
        assert key in feed._renderings
    assert {"d", "a"} == set(feed._renderings)


def test_frames_have_a_bound_of_their_own():
    """An encoder may make much of little; who is behind what is left is told of a gap."""
    feed = make()
    quick, slow = (attach(feed, Blocks(MAX_FRAMES // 4)) for _ in range(2))
    tell(feed, 10)
    while quick.take():
        pass
    assert MAX_FRAMES >= quick.rendering.size
    assert 4 == len(quick.rendering.frames)
    assert slow.take().startswith(b"gap")
    assert 8 == slow.cursor


def test_a_reader_that_filters_is_up_to_date_though_nothing_came():
    """Empty frames are no write, and no reason to spin."""
    feed = make()
    reader = attach(feed, Blocks(10, nth=3))
    tell(feed, 2)
    assert reader.is_behind
    assert b"" == reader.take()
    assert not reader.is_behind
    tell(feed, 5)
    assert b"x" * 20 == reader.take()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (MAX_WRITE // 2, [MAX_WRITE, MAX_WRITE]),
        (MAX_WRITE // 2 + 1, [MAX_WRITE + 2, MAX_WRITE + 2]),
        (MAX_WRITE, [MAX_WRITE] * 4),
        (3 * MAX_WRITE, [3 * MAX_WRITE] * 4),
        (10, [40]),
    ],
)
def test_a_take_is_about_a_write(size, expected):
    """Whole frames, until there are 64 KiB."""
    feed = make()
    tell(feed, 4)
    reader, takes = attach(feed, Blocks(size)), []
    while taken := reader.take():
        takes.append(len(taken))

    assert expected == takes


def test_a_large_greeting_is_a_write_of_its_own():
    """What follows waits for the next one."""
    feed = make()
    tell(feed)
    reader = attach(feed, greeting=b"g" * MAX_WRITE)

    assert MAX_WRITE == len(reader.take())
    assert reader.is_behind
    assert b"e-1\n" == reader.take()


def test_whoever_speaks_never_hears_of_an_encoder_that_fails():
    """Those who read in that way do, if they are not too late for it; others have their frames."""
    feed = make(max_events=2)
    broken, fine = attach(feed, Fragile("e-5", 99), key="broken"), attach(feed)
    tell(feed, 5)
    assert ["gap(e-1,e-3)", *ids(4, 5)] == drain(fine)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="e-5"):
            broken.take()
    tell(feed, 5)
    assert (9, 10) == (feed.first, feed.last)
    assert ids(9, 10) == drain(attach(feed, Fragile("e-2"), key="broken"))


def test_an_encoder_that_fails_halfway_leaves_the_frames_before_it():
    """They go with their events; what is behind them comes once it can be made."""
    feed = make(max_events=3)
    reader = attach(feed, Fragile("e-3", 99))
    tell(feed, 3)
    with pytest.raises(ZeroDivisionError):
        reader.take()
    assert [(b"e-1\n",), (b"e-2\n",)] == list(reader.rendering.frames)
    tell(feed, 2)
    assert 3 == reader.rendering.first == feed.first
    with pytest.raises(ZeroDivisionError):
        reader.take()


def test_an_encoder_that_fails_once_goes_on_where_it_was():
    """Nothing is lost, and nothing comes twice."""
    feed = make()
    first, second = (attach(feed, Fragile("e-2"), key="same") for _ in range(2))
    tell(feed, 3)
    with pytest.raises(ZeroDivisionError):
        first.take()

    assert ids(1, 2, 3) == drain(second)


def test_a_feed_is_read_in_so_many_ways_and_no_more():
    """Each holds frames of its own; the ways in use are open to all."""
    feed = make()
    readers = [attach(feed, key=number) for number in range(MAX_WAYS)]
    with pytest.raises(Overloaded, match=f"read in {MAX_WAYS} ways already, .* use one of the"):
        attach(feed, key="new")
    assert readers[5].rendering is attach(feed, key=5).rendering
    feed.detach(readers[7])

    assert ids() == drain(attach(feed, key="new"))


# Events of several frames


@attrs.define(eq=False)
class Parts:
    """An encoder of as many frames per event as its number says, modulo three; it has state."""

    count: int = 0

    def feed(self, event: AnyEvent, id: str) -> list[bytes]:
        """Name the frames, and count them."""
        if isinstance(event, Gap):
            return [b"gap\n", b"gap\n"]
        parts = int(id.partition("-")[2]) % 3
        self.count += parts
        return [
            f"{id if part == parts else f'{id}.{part}'}\n".encode() for part in range(1, parts + 1)
        ]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (None, "e-1 e-2.1 e-2 e-4 e-5.1 e-5"),
        ("e-1", "e-2.1 e-2 e-4 e-5.1 e-5"),
        ("e-2.1", "e-2 e-4 e-5.1 e-5"),
        ("e-2.2", "e-4 e-5.1 e-5"),
        ("e-2.9", "e-4 e-5.1 e-5"),
        ("e-3", "e-4 e-5.1 e-5"),
        ("e-3.1", "e-4 e-5.1 e-5"),
        ("e-5.1", "e-5"),
        ("e-5", ""),
        ("f-5.1", "gap gap e-1 e-2.1 e-2 e-4 e-5.1 e-5"),
    ],
)
def test_a_reader_begins_behind_any_frame(after, expected):
    """Also between two of an event; a part that there is not is the last one."""
    feed = make()
    tell(feed, 5)
    reader = attach(feed, Parts(), after)

    assert expected.split() == drain(reader)
    tell(feed, 3)
    assert ["e-7", "e-8.1", "e-8"] == drain(reader)


def test_what_is_missing_of_an_event_that_is_gone_is_missed():
    """Though some of its frames were seen."""
    feed = make(max_events=2)
    tell(feed, 5)
    assert ["gap(e-2,e-3)", *ids(4, 5)] == drain(attach(feed, after="e-2.1"))
    reader = attach(feed, after="e-4.1")
    tell(feed, 3)
    assert ["gap(e-4,e-6)", *ids(7, 8)] == drain(reader)


# Wake-ups


async def wakes(feed: Feed, reader: FeedReader, cause: Callable[[], object]) -> None:
    """See that something wakes a reader that waits."""
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.wait)
            await trio.testing.wait_all_tasks_blocked()
            cause()
    assert set() == feed._waiting


@pytest.mark.parametrize("cause", ["extend", "append", "finish"])
async def test_what_happens_wakes_those_that_wait(autojump_clock, cause):
    """Each once; a reader that has not come back for more is not rung."""
    feed = make()
    reader, other = attach(feed), attach(feed)
    causes = {
        "extend": lambda: tell(feed),
        "append": lambda: feed.append(note()),
        "finish": feed.finish,
    }
    await wakes(feed, reader, causes[cause])

    causes[cause]()
    for each in (reader, other):
        assert not each.is_rung


async def test_closing_wakes_every_reader_and_the_first_reason_stands(autojump_clock):
    """The server ends the streams; the feed itself goes on."""
    feed = make()
    reader, other = attach(feed), attach(feed)
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.wait)
            nursery.start_soon(other.wait)
            await trio.testing.wait_all_tasks_blocked()
            feed.close("shutdown")
            feed.close("finished")

    assert ["shutdown", "shutdown"] == [reader.closing, other.closing]
    assert None is attach(feed).closing
    tell(feed)
    assert ids(1) == drain(reader)
    assert not reader.is_finished


async def test_a_feed_that_is_over_ends_its_readers_behind_the_last_event(autojump_clock):
    """Who is behind gets what is left first; nobody waits."""
    feed = make()
    reader = attach(feed)
    tell(feed, 2)
    feed.finish()
    assert (True, False) == (reader.is_behind, reader.is_finished)
    with trio.fail_after(SECONDS), trio.testing.assert_checkpoints():
        await reader.wait()

    assert ids(1, 2) == drain(reader)
    assert reader.is_finished
    with trio.fail_after(SECONDS), trio.testing.assert_checkpoints():
        await reader.wait()


@pytest.mark.parametrize("steps", range(6))
async def test_no_wakeup_is_lost(autojump_clock, steps):
    """Whenever something happens between a take and the wait that follows, the wait returns."""
    feed, taken = make(), []
    reader = attach(feed)

    async def read() -> None:
        while len(taken) < 2:
            taken.extend(reader.take().decode().split())
            for _ in range(3):  # a writer that dawdles between taking and waiting
                await trio.lowlevel.checkpoint()
            if len(taken) < 2:
                await reader.wait()

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for _ in range(2):
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                tell(feed)
    assert ids(1, 2) == taken


async def test_a_wait_that_is_cancelled_loses_nothing(autojump_clock):
    """What happened meanwhile is there for the next take; a reader that is gone is forgotten."""
    feed = make()
    reader = attach(feed)
    with trio.move_on_after(1) as scope:
        await reader.wait()
    assert scope.cancelled_caught
    assert {reader} == feed._waiting

    tell(feed)
    with trio.fail_after(SECONDS):
        await reader.wait()
    assert ids(1) == drain(reader)
    with trio.move_on_after(1):
        await reader.wait()
    with trio.move_on_after(1):
        await reader.wait()
    feed.detach(reader)
    assert (set(), set()) == (feed._waiting, feed._readers)


async def test_silence_rings_with_a_beat(autojump_clock):
    """Who is woken for a heartbeat can tell it from an event."""
    feed = make()
    reader = attach(feed)
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.wait)
            await trio.testing.wait_all_tasks_blocked()
            reader.ring_for_silence()

    assert (True, False) == (reader.beat, reader.is_behind)


# The promise


@attrs.define(eq=False)
class Split:
    """An encoder of up to three frames per event; the last one has the id."""

    def feed(self, event: AnyEvent, id: str) -> list[bytes]:
        """Repeat the event in all its frames."""
        parts = parts_of(id)
        return [
            encode(encode_event(event), id=id if part == parts else f"{id}.{part}")
            for part in range(1, parts + 1)
        ]


def parts_of(id: str) -> int:
    """How many frames the event of that id has; a gap has one."""
    return 1 + int(id.partition("-")[2]) % 3 if id else 1


@attrs.define(eq=False)
class Client:
    """A page that reads a feed, and holds it against its promise as it goes.

    Behind the last frame that it has seen there comes the next one, or one gap that begins there.
    """

    feed: Feed
    is_split: bool
    expected: tuple[int, int] = (1, 1)  # event and frame
    seen: list[tuple[int, int]] = attrs.field(factory=list)
    holes: int = 0
    last_id: str = ""
    reader: FeedReader | None = None

    def come(self) -> None:
        """Connect, behind the last id; what the line still held is lost."""
        self.leave()
        options = decode_watch_feed(Request("GET", {}, {}, {})).options
        make = Split if self.is_split else lambda: NATIVE.feed.encoder(options)
        self.reader = self.feed.attach(self.is_split, make, self.last_id or None)
        number, _, part = self.last_id.partition("-")[2].partition(".")
        if part:
            self.expected = (int(number), int(part) + 1)
        else:
            self.expected = (int(number) + 1 if number else self.feed.first, 1)

    def leave(self) -> None:
        """Disconnect."""
        if self.reader is not None:
            self.feed.detach(self.reader)
            self.reader = None

    def read(self, takes: float = math.inf, cut: int | None = None) -> None:
        """Read that many writes, and only so many bytes of them."""
        wire = b""
        while self.reader is not None and takes > 0 and (taken := self.reader.take()):
            wire += taken
            takes -= 1
        decoder = Decoder(last_id=self.last_id)
        for frame in decoder.feed(wire[:cut]):
            self.see(decode_event(frame.data), frame.id)
        self.last_id = decoder.last_id

    def see(self, event: AnyEvent, id: str) -> None:
        """Take a frame in."""
        number, part = self.expected
        if isinstance(event, Gap):
            assert self.feed.id_of(number) == event.from_id
            until = int(event.to_id.partition("-")[2])
            assert until >= number
            self.holes += 1
            self.expected = (until + 1, 1)
            return
        whole = self.feed.id_of(number)
        parts = parts_of(whole) if self.is_split else 1
        assert (whole if part == parts else f"{whole}.{part}", f"n{number}") == (id, event.name)
        self.seen.append(self.expected)
        self.expected = (number + 1, 1) if part == parts else (number, part + 1)


plays = st.lists(
    st.one_of(
        st.tuples(st.just("tell"), st.integers(1, 9), st.integers(0, 300)),
        st.tuples(st.just("read"), st.integers(0, 2), st.integers(1, 4)),
        st.tuples(st.just("come"), st.integers(0, 2)),
        st.tuples(st.just("cut"), st.integers(0, 2), st.integers(0, 900)),
    ),
    max_size=40,
)


@given(plays, st.integers(1, 12), st.integers(200, 2_000))
@settings(deadline=None)
def test_a_client_that_comes_and_goes_misses_nothing_silently(play, max_events, max_bytes):
    """Cut anywhere, come back at any id: each frame comes once and in order, or is in a gap."""
    feed = make(max_events=max_events, max_bytes=max_bytes)
    clients = [Client(feed, is_split) for is_split in (False, True, True)]
    for act in play:
        match act:
            case "tell", count, size:
                events = [note(f"n{feed.last + 1 + place}") for place in range(count)]
                feed.extend(events, size * count)
            case "read", who, takes:
                clients[who].read(takes)
            case "come", who:
                clients[who].come()
            case "cut", who, place:  # a connection that breaks in the middle of a frame
                clients[who].read(cut=place)
                clients[who].leave()
    for client in clients:
        client.come()
        client.read()
        assert (feed.last + 1, 1) == client.expected
        assert len(set(client.seen)) == len(client.seen)
        client.leave()
    assert (0, set()) == (sum(r.readers for r in feed._renderings.values()), feed._readers)
