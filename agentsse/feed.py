"""A bounded ring of what happens in a thread or on the whole server, for whoever follows it.

Knows: events in order, ids of its own, readers and what they have missed. Must never know runs,
sockets, or a dialect's words.

A log keeps all and ends; a feed forgets and goes on. Its events are those of many logs, the same
objects, in the order in which they became visible. A reader that falls behind what is still held is
told so by one `gap`, never by a silent hole. An id is `<epoch>-<n>`: the epoch is a feed's own, so
that an id from before a restart is known for what it is. Where an event is several frames, those
before the last have ids of their own, `<epoch>-<n>.1` and so on, as in a log.

Frames are made once per dialect and options, when somebody takes them, and held as long as their
events are. The encoder that was used last is kept without them when nobody reads any more: whoever
comes back goes on with one that knows what had begun before.
"""

import secrets
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import attrs
from msgspec.structs import force_setattr

from .dialects import FeedEncoder
from .errors import BadRequest, Overloaded
from .events import AnyEvent, Gap, encode_event
from .log import MAX_WRITE, Bell, CloseReason, Stamps
from .sse import FieldError, parse_position

MAX_EVENTS = 1_000  # that a feed holds; a page that reconnects within a minute misses nothing
MAX_BYTES = 4 * 1024 * 1024  # of their JSON, however few they are
MAX_WAYS = 64  # dialects and filters in which one feed is read at once
MAX_FRAMES = 16 * 1024 * 1024  # bytes of frames in one way of reading
NOW = "now"  # in an id's place: begin with what comes


@attrs.define(eq=False, repr=False)
class Feed:
    """A ring of events; appending is sync and never waits for a reader.

    Attributes:
        epoch: What its ids begin with.
        first: The number of the oldest event that is held.
        when_used: Called when somebody reads it for the first time.
        is_used: Whether anybody ever has.
        is_over: Whether nothing follows; readers end when they have taken what there is.
    """

    stamps: Stamps
    max_events: int = MAX_EVENTS
    max_bytes: int = MAX_BYTES
    when_used: Callable[[], object] = lambda: None
    epoch: str = attrs.field(factory=lambda: secrets.token_hex(4))
    first: int = 1
    is_used: bool = False
    is_over: bool = False
    _ring: deque[AnyEvent] = attrs.field(factory=deque)
    _sizes: deque[int] = attrs.field(factory=deque)
    _size: int = 0
    _readers: "set[FeedReader]" = attrs.field(factory=set)
    _waiting: "set[FeedReader]" = attrs.field(factory=set)
    _renderings: "dict[Hashable, _Rendering]" = attrs.field(factory=dict)

    @property
    def last(self) -> int:
        """The number of the newest event; 0 while there is none."""
        return self.first + len(self._ring) - 1

    @property
    def events(self) -> Sequence[AnyEvent]:
        """What is held, the oldest first; a copy, since the ring goes on."""
        return tuple(self._ring)

    @property
    def is_read(self) -> bool:
        """Whether somebody reads it now."""
        return bool(self._readers)

    def id_of(self, number: int) -> str:
        """The id of an event by its number."""
        return f"{self.epoch}-{number}"

    def extend(self, events: Sequence[AnyEvent], size: int) -> None:
        """Take events in, which have `size` bytes together, and wake the readers that wait."""
        each = size // len(events)
        for event in events:
            self._ring.append(event)
            self._sizes.append(each)
            self._size += each
        while len(self._ring) > self.max_events or (
            self._size > self.max_bytes and len(self._ring) > 1
        ):
            self._drop_first()
        self._wake_waiting()

    def append(self, event: AnyEvent) -> None:
        """Take in an event that is no run's; it is given its time, unless another feed has."""
        if not event.ts:
            force_setattr(event, "ts", self.stamps.now())
        self.extend([event], len(encode_event(event)))

    def attach(
        self,
        key: Hashable,
        make: Callable[[], FeedEncoder],
        after: str | None,
        *,
        greeting: bytes = b"",
        replay: Callable[[Sequence[AnyEvent]], "frozenset[int] | None"] = lambda _events: None,
        is_plain: bool = False,
    ) -> "FeedReader":
        """Open a reader; whoever opens it detaches it.

        Args:
            key: Names the dialect and its options: readers with equal keys share their frames.
            make: Makes the encoder, where nobody reads in that way yet.
            after: The id behind which to begin; None to begin with what is held, `now` to begin
                with what comes.
            greeting: What this reader gets before anything else.
            replay: Of the events that are held, the places of those that a reader without an id
                gets; None for all of them.
            is_plain: It reads without a filter of its own, for which there is always room.

        Raises:
            BadRequest: `after` is no id, or none that this feed has given yet.
            Overloaded: It is read in too many ways at once.
        """
        wanted: frozenset[int] | None = None
        missed: str | None = None
        part = 0
        if after is None:
            begin, places = self.first, replay(self.events)
            if places is not None:
                wanted = frozenset(self.first + place for place in places)
        elif after == NOW:
            begin = self.last + 1
        else:
            epoch, number, part = _parse(after)
            if epoch != self.epoch:
                begin, missed = self.first, after
            elif number > self.last:
                raise BadRequest(
                    f"expected an id up to {self.id_of(self.last)}, got {after[:40]!r}; "
                    "leave it out to begin with what is held"
                )
            else:
                begin = number if part else number + 1
        rendering = self._renderings.get(key)
        if rendering is None:
            ways = sum(bool(each.readers) for each in self._renderings.values())
            if ways >= MAX_WAYS and not is_plain:
                raise Overloaded(
                    f"the feed is read in {MAX_WAYS} ways already, each a copy of its frames: "
                    "use one of the filters in use, or none"
                )
            rendering = self._renderings[key] = _Rendering(self, key, make, self.first)
        if begin < rendering.first:
            rendering.reach_back()
        rendering.readers += 1
        reader = FeedReader(self, rendering, begin, part, self.last, wanted, missed, greeting)
        self._readers.add(reader)
        if not self.is_used:
            self.is_used = True
            self.when_used()
        return reader

    def detach(self, reader: "FeedReader") -> None:
        """Forget a reader; of the ways of reading that nobody uses the last one is kept."""
        self._readers.discard(reader)
        self._waiting.discard(reader)
        rendering = reader.rendering
        rendering.readers -= 1
        if rendering.readers == 0:
            for key in [key for key, each in self._renderings.items() if not each.readers]:
                del self._renderings[key]
            rendering.drop_frames()
            self._renderings[rendering.key] = rendering

    def close(self, reason: CloseReason) -> None:
        """End all streams that read it, at once."""
        for reader in self._readers:
            reader.close(reason)

    def finish(self) -> None:
        """Let readers end when they have taken what there is."""
        self.is_over = True
        self._wake_waiting()

    def wake_on_event(self, reader: "FeedReader") -> None:
        """Ring this reader's bell at the next event, once."""
        self._waiting.add(reader)

    def __getitem__(self, number: int) -> AnyEvent:
        return self._ring[number - self.first]

    def _wake_waiting(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, set()
            for reader in waiting:
                reader.ring()

    def _drop_first(self) -> None:
        for rendering in self._renderings.values():
            if rendering.first == self.first:  # else it has dropped it already
                rendering.drop_first()
        self._ring.popleft()
        self._size -= self._sizes.popleft()
        self.first += 1


@attrs.define(eq=False, repr=False)
class _Rendering:
    """A feed in one dialect: the frames of what is held, made once, on demand."""

    feed: Feed
    key: Hashable
    make: Callable[[], FeedEncoder]
    first: int  # the number of the first frame that is held
    readers: int = 0
    size: int = 0
    frames: deque[Sequence[bytes]] = attrs.field(factory=deque)
    _encoder: FeedEncoder | None = None

    @property
    def encoder(self) -> FeedEncoder:
        """The machine; a new one where the last one has missed an event, or failed."""
        if self._encoder is None:
            self._encoder = self.make()
        return self._encoder

    def frames_of(self, number: int) -> Sequence[bytes]:
        """The frames of an event that is not before `first`."""
        while self.first + len(self.frames) <= number:
            self._make_next()
        return self.frames[number - self.first]

    def drop_first(self) -> None:
        """Forget the oldest event. Whoever speaks never waits for an encoder, nor hears of one."""
        if self.frames:
            self.size -= sum(map(len, self.frames.popleft()))
        else:
            self._encoder = None
        self.first += 1

    def reach_back(self) -> None:
        """Make the frames of all that is held: somebody has come who has not seen the beginning.

        They come from an encoder of their own, since the one that goes on is beyond them.
        """
        encoder, feed = self.make(), self.feed
        for number in range(feed.first, self.first):
            frames = encoder.feed(feed[number], feed.id_of(number))
            self.frames.insert(number - feed.first, frames)
            self.size += sum(map(len, frames))
        self.first = feed.first
        self._see_bound()

    def drop_frames(self) -> None:
        """Keep only the encoder, and how far it has come."""
        self.first += len(self.frames)
        self.frames.clear()
        self.size = 0

    def _make_next(self) -> None:
        number = self.first + len(self.frames)
        try:
            frames = self.encoder.feed(self.feed[number], self.feed.id_of(number))
        except Exception:
            self._encoder = None
            raise
        self.frames.append(frames)
        self.size += sum(map(len, frames))
        self._see_bound()

    def _see_bound(self) -> None:
        while self.size > MAX_FRAMES and len(self.frames) > 1:
            self.drop_first()


@attrs.define(eq=False, repr=False)
class FeedReader(Bell):
    """A place in a feed, and the bell that says there is more.

    A task that writes owns it: `take` until nothing comes, then `wait`, then again.
    """

    feed: Feed
    rendering: _Rendering
    cursor: int  # the number of the next event
    _part: int  # of its frames, those that have been taken
    _until: int  # up to here, only what is wanted
    _wanted: frozenset[int] | None
    _missed: str | None
    _greeting: bytes

    def take(self) -> bytes:
        """Take the next frames, and move behind them; empty if there is nothing to send now."""
        feed = self.feed
        pieces, self._greeting = [self._greeting], b""
        if self._missed is not None:
            pieces += self._tell_gap()
        if self.cursor < self.rendering.first:
            pieces += self._tell_gap()
        size = sum(map(len, pieces))
        while self.cursor <= feed.last and size < MAX_WRITE:
            if self._wanted is None or self.cursor > self._until or self.cursor in self._wanted:
                frames = self.rendering.frames_of(self.cursor)[self._part :]
                pieces += frames
                size += sum(map(len, frames))
            self._part = 0
            self.cursor += 1
        return b"".join(pieces)

    @property
    def is_behind(self) -> bool:
        """Whether something has not been taken yet."""
        return self.cursor <= self.feed.last

    @property
    def is_finished(self) -> bool:
        """Whether the last frame there will ever be for this reader has been taken."""
        return self.feed.is_over and not self.is_behind

    async def wait(self) -> None:
        """Wait until something happens, or somebody rings; cancelling it loses nothing."""
        if self.is_behind or self.feed.is_over:  # since the last take
            self.ring()
        else:
            self.feed.wake_on_event(self)
        await self.wait_rung()

    def _tell_gap(self) -> Sequence[bytes]:
        feed, first = self.feed, self.rendering.first
        since = self._missed or feed.id_of(self.cursor)
        self._missed, self.cursor, self._part = None, first, 0
        gap = Gap(from_id=since, to_id=feed.id_of(first - 1), ts=feed.stamps.now())
        return self.rendering.encoder.feed(gap, "")


def _parse(id: str) -> tuple[str, int, int]:
    """The epoch, the number of the event, and how many of its frames were seen; 0 for all."""
    epoch, _, place = id.rpartition("-")
    try:
        number, part = parse_position(place if epoch else "")
    except FieldError as error:
        raise BadRequest(
            f"expected the id of a feed's event, such as 1f00ba42-7, got {id[:40]!r}"
        ) from error
    return epoch, number, part
