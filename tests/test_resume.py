"""The promise of resuming: what a client receives is the log behind its place, in every dialect.

Hypothesis writes a play: runs are started and speak, clients come at any place, read a few bytes
now and then, leave in the middle of a frame, come back at any id that they have received, are sent
away by the server; runs are cancelled, end, and are forgotten. The play is performed by the real
engine, in one `trio.run` with a clock that jumps. Then each connection is held against a model: all
frames of the run's log, made by a fresh encoder, from behind the place it asked for. There must be
no gap, no duplicate, the order must be the log's, and the one end must come last.
"""

import itertools
import math
from collections.abc import Hashable, Iterable

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings, strategies as st

from agentsse import sse
from agentsse.agents import Agent
from agentsse.context import Limits, RunContext
from agentsse.dialects import Encoder, Start
from agentsse.dialects.hive import HIVE
from agentsse.dialects.kilroy import KILROY
from agentsse.dialects.native import NATIVE
from agentsse.errors import BadRequest, NotFound
from agentsse.events import TYPE_NAMES, AnyEvent, Custom, PartDelta, RunFinished, RunStarted
from agentsse.log import CloseReason, Position, Reader
from agentsse.runs import Run, Runs, open_runs

RETAINED = 3  # finished runs that are kept
RUNNING = 4  # runs at once; more have to wait
SECONDS = 100_000  # of a clock that jumps: only what hangs gets there


@attrs.define(eq=False)
class Split:
    """An encoder that has state and makes up to three frames per event."""

    count: int = 0

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Number the frames of the whole log, so that who skips an event is found out."""
        parts = 1 + event.seq % 3
        for part in range(1, parts + 1):
            self.count += 1
            yield sse.encode(
                f"{self.count}\n{TYPE_NAMES[type(event)]}",
                event="part",
                id=sse.frame_id(event.seq, part, parts),
            )


def encoder(dialect: Hashable) -> Encoder:
    """A fresh encoder; the dialect's name is the key of its rendering as well."""
    for known in (NATIVE, KILROY, HIVE):  # those that have ids
        if known.name == dialect:
            return known.encoder(None)
    return Split()


@attrs.define(eq=False)
class Model:
    """All the frames that a run's log makes in a dialect, with their ids."""

    frames: list[bytes]
    ids: list[str]

    @classmethod
    def of(cls, run: Run, dialect: str) -> "Model":
        """Encode everything anew."""
        made = encoder(dialect)
        frames = [frame for event in run.log.events for frame in made.feed(event)]
        return cls(frames, [frame.id for frame in sse.Decoder().feed(b"".join(frames))])

    def behind(self, place: str) -> int:
        """The index of the first frame behind an id."""
        return 0 if place == "0" else self.ids.index(place) + 1


@attrs.define(eq=False)
class Connection:
    """A stream to a client that reads as slowly as it likes."""

    run: Run
    dialect: str
    place: str
    reader: Reader
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    received: bytearray = attrs.field(factory=bytearray)
    decoder: sse.Decoder = attrs.field(factory=sse.Decoder)
    ids: list[str] = attrs.field(factory=list)
    end: CloseReason | None = None
    _pipe: tuple[trio.abc.SendStream, trio.abc.ReceiveStream] = attrs.field(
        factory=trio.testing.lockstep_stream_one_way_pair
    )

    async def pour(self) -> None:
        """What the server does."""
        reader, reason = self.reader, "client_left"
        try:
            with self.scope:
                while True:
                    if reader.closing is not None:
                        reason = reader.closing
                        break
                    if taken := reader.take():
                        await self._pipe[0].send_all(taken)
                    elif reader.is_behind:
                        await trio.lowlevel.checkpoint()
                    elif reader.is_finished:
                        reason = "finished"
                        break
                    else:
                        await reader.wait()
        finally:
            self.end = reason
            self._pipe[0].close()
            self.run.detach(reader, reason)

    async def read(self, most: int | None) -> bool:
        """Read what comes, at most so many bytes; False at the end of the stream."""
        chunk = await self._pipe[1].receive_some(most)
        self.received += chunk
        self.ids += [frame.id for frame in self.decoder.feed(bytes(chunk))]
        return bool(chunk)

    async def read_on(self) -> None:
        """Read to the end of the stream."""
        while await self.read(None):
            pass

    def check(self) -> None:
        """Hold what was received against the model."""
        model = Model.of(self.run, self.dialect)
        start = model.behind(self.place)
        expected = b"".join(model.frames[start:])
        assert expected.startswith(self.received)
        assert model.ids[start : start + len(self.ids)] == self.ids
        if self.end == "finished" and self.is_drained:
            assert expected == self.received
            assert model.ids[start:] == self.ids

    @property
    def is_drained(self) -> bool:
        """Whether nothing of what was sent is still on its way."""
        return not self.scope.cancel_called


@attrs.define(eq=False)
class World:
    """The stage: runs whose agents do as they are told, and their clients."""

    runs: Runs = attrs.field(init=False)
    clients: trio.Nursery = attrs.field(init=False)
    all: list[Run] = attrs.field(factory=list)
    orders: list[trio.MemorySendChannel[tuple]] = attrs.field(factory=list)
    scripts: list[trio.MemoryReceiveChannel[tuple]] = attrs.field(factory=list)
    spoken: list[list[tuple[str, str]]] = attrs.field(factory=list)
    connections: list[Connection] = attrs.field(factory=list)
    ended: dict[Run, int] = attrs.field(factory=dict)  # and at which look that was seen
    looks: int = 0

    async def puppet(self, run: RunContext, number: int) -> str:
        """An agent that does as it is told, and has last words."""
        spoken = self.spoken[number]
        try:
            async for order in self.scripts[number]:
                match order:
                    case ("emit", count, size):
                        for _ in range(count):
                            spoken.append(("emit", str(len(spoken))))
                            run.emit(str(len(spoken) - 1), filling="x" * size)
                    case ("say", text):
                        spoken.append(("text", text))
                        run.text(text)
                    case ("fail",):
                        raise ValueError
                    case ("return",):
                        return "done"
        finally:
            spoken.append(("text", "last "))
            run.text("last ")
            spoken.append(("emit", "words"))
            run.emit("words")
        raise AssertionError

    def start(self, policy: str, window: float) -> None:
        """Start a run, or queue it."""
        sender, script = trio.open_memory_channel[tuple](math.inf)
        self.orders.append(sender)
        self.scripts.append(script)
        self.spoken.append([])
        order = Start(
            agent="puppet", input=len(self.all), delivery="stream",
            on_disconnect=policy, coalesce=window,
        )  # fmt: skip
        run, is_new = self.runs.start(order, default="continue")
        assert is_new
        self.all.append(run)

    def attach(self, run: Run, dialect: str, place: str) -> Connection:
        """Open a stream, as a client that knows the run."""
        reader = run.attach(dialect, lambda: encoder(dialect), Position(*sse.parse_position(place)))
        connection = Connection(run, dialect, place, reader)
        self.connections.append(connection)
        self.clients.start_soon(connection.pour)
        return connection

    async def perform(self, step: tuple) -> None:
        """Do one thing; what needs a run or a connection that is not there does nothing."""
        match step:
            case ("start", policy, window):
                self.start(policy, window)
            case ("tell", which, order) if self.all:
                self.orders[which % len(self.all)].send_nowait(order)
            case ("cancel", which) if self.all:
                self.all[which % len(self.all)].cancel("client_cancel")
            case ("attach", which, dialect, where) if self.all:
                run = self.all[which % len(self.all)]
                ids = ["0", *Model.of(run, dialect).ids]
                self.attach(run, dialect, ids[where % len(ids)])
            case ("beyond", which) if self.all:
                run = self.all[which % len(self.all)]
                with pytest.raises(BadRequest):
                    self.attach(run, "native", str(run.log.end + 1))
            case ("read", which, most) if self.connections:
                with trio.move_on_after(0.001):
                    await self.connections[which % len(self.connections)].read(most)
            case ("leave", which) if self.connections:
                self.connections[which % len(self.connections)].scope.cancel()
            case ("rotate", which) if self.connections:
                self.connections[which % len(self.connections)].reader.close("rotated")
            case ("resume", which, where, is_abrupt) if self.connections:
                old = self.connections[which % len(self.connections)]
                if is_abrupt:
                    old.scope.cancel()
                ids = [old.place, *old.ids]
                self.attach(old.run, old.dialect, ids[where % len(ids)])
            case ("churn", count):
                for _ in range(count):
                    self.start("continue", 0.0)
                    self.orders[-1].send_nowait(("return",))
            case ("pass", seconds):
                await trio.sleep(seconds)
            case ("look",):
                await self.look()
            case _:
                pass

    async def look(self) -> None:
        """See that what is kept is what ended last, and that what goes on can be found."""
        await trio.testing.wait_all_tasks_blocked()
        self.looks += 1
        for run in self.all:
            if run.done.is_set():
                self.ended.setdefault(run, self.looks)
        kept, gone = [], []
        for run in self.all:
            try:
                assert run is self.runs.find(run.id)
            except NotFound:
                gone.append(self.ended[run])
            else:
                kept += [self.ended[run]] if run in self.ended else []
        assert min(RETAINED, len(self.ended)) == len(kept)
        assert not gone or max(gone) <= min(kept)

    async def finish(self) -> None:
        """End all runs, read all streams to their ends, and come late once more."""
        for order, run in zip(self.orders, self.all, strict=True):
            order.send_nowait(("return",))
            await run.done.wait()
        for run, dialect in itertools.product(self.all, ("native", "split", "kilroy", "hive")):
            self.attach(run, dialect, "0")
        async with trio.open_nursery() as nursery:
            for connection in self.connections:
                nursery.start_soon(connection.read_on)
        await self.look()

    def check(self) -> None:
        """Hold everything against the model."""
        for run, spoken in zip(self.all, self.spoken, strict=True):
            check_log(run, spoken)
            assert {} == run.log._renderings
            assert set() == run.log._waiting
        for connection in self.connections:
            connection.check()
            assert connection.end is not None
        late = self.connections[len(self.connections) - 4 * len(self.all) :]
        assert {"finished"} >= {connection.end for connection in late}


def check_log(run: Run, spoken: list[tuple[str, str]]) -> None:
    """All that the agent said is in the log, in order, between one beginning and one end."""
    events = run.log.events
    kinds = [type(event) for event in events]
    assert list(range(1, len(events) + 1)) == [event.seq for event in events]
    assert (RunStarted, RunFinished) == (kinds[0], kinds[-1])
    assert (1, 1) == (kinds.count(RunStarted), kinds.count(RunFinished))
    assert run.log.end == len(events)
    written = [
        ("text", event.delta) if isinstance(event, PartDelta) else ("emit", event.name)
        for event in events
        if isinstance(event, PartDelta | Custom)
    ]
    assert joined(spoken) == joined(written)


def joined(said: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same with neighbouring pieces of text in one."""
    pieces: list[tuple[str, str]] = []
    for kind, said_so in said:
        if kind == "text" and pieces and pieces[-1][0] == "text":
            pieces[-1] = ("text", pieces[-1][1] + said_so)
        else:
            pieces.append((kind, said_so))
    return pieces


async def play(steps: list[tuple]) -> World:
    """Perform a play from its first step to the end of everything, and check it."""
    world = World()
    agents = {"puppet": Agent("puppet", world.puppet)}
    limits = Limits(retain_runs=RETAINED, max_running=RUNNING, max_queued=1_000_000)
    with trio.fail_after(SECONDS):
        async with open_runs(agents, limits=limits) as world.runs, trio.open_nursery() as nursery:
            world.clients = nursery
            for step in steps:
                await world.perform(step)
            await world.finish()
    world.check()
    return world


def perform(steps: list[tuple]) -> World:
    """`play`, in a loop of its own whose clock jumps when nobody has anything to do."""
    return trio.run(play, steps, clock=trio.testing.MockClock(autojump_threshold=0))


which = st.integers(min_value=0, max_value=7)
somewhere = st.integers(min_value=0, max_value=400)
policies = st.sampled_from(["continue", "cancel", "grace:1"])
dialects = st.sampled_from(["native", "split", "kilroy", "hive"])
starts = st.tuples(st.just("start"), policies, st.sampled_from([0.0, 0.05]))
orders = st.one_of(
    st.tuples(
        st.just("emit"),
        st.sampled_from([1, 2, 5, 40, 1_100]),
        st.sampled_from([0, 10, 100]),
    ),
    st.tuples(st.just("emit"), st.sampled_from([1, 3]), st.sampled_from([30_000, 70_000])),
    st.tuples(st.just("say"), st.sampled_from(["a", "bc", "dé\n"])),
    st.tuples(st.just("say"), st.sampled_from(["a", "bc", "dé\n"])),
    st.tuples(st.sampled_from(["return", "fail"])),
)
attachments = st.tuples(st.just("attach"), which, dialects, somewhere)
steps = st.one_of(
    st.just(("look",)),  # first: a step that does not matter shrinks to it
    starts,
    st.tuples(st.just("tell"), which, orders),
    st.tuples(st.just("tell"), which, orders),
    st.tuples(st.just("cancel"), which),
    attachments,
    attachments,
    st.tuples(st.just("beyond"), which),
    st.tuples(st.just("read"), which, st.sampled_from([1, 7, 50, 200, 5_000, 100_000])),
    st.tuples(st.just("read"), which, st.sampled_from([1, 7, 50, 200, 5_000, 100_000])),
    st.tuples(st.just("leave"), which),
    st.tuples(st.just("rotate"), which),
    st.tuples(st.just("resume"), which, somewhere, st.booleans()),
    st.tuples(st.just("resume"), which, somewhere, st.booleans()),
    st.tuples(st.just("churn"), st.integers(min_value=1, max_value=5)),
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.001, 0.03, 0.06, 2.0, 40.0])),
)
plays = st.tuples(starts, attachments, st.lists(steps, min_size=25, max_size=80)).map(
    lambda play: [play[0], play[1], *play[2]]
)
bounded = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(bounded, max_examples=150)
@given(plays)
def test_no_gap_no_duplicate_one_end(steps):
    """Whatever happens, each connection receives the log behind its place, in order, to the end."""
    perform(steps)


@pytest.mark.slow
@settings(bounded, max_examples=5_000)
@given(plays)
def test_no_gap_no_duplicate_one_end_in_many_plays(steps):
    """The same, for as long as there is patience."""
    perform(steps)


def test_the_play_has_all_it_should_have():
    """One play by hand: every kind of step does what its name says, so that none is idle."""
    world = perform(
        [
            ("start", "cancel", 0.05),
            ("attach", 0, "split", 0),
            ("tell", 0, ("emit", 40, 10)),
            ("tell", 0, ("say", "a")),
            ("tell", 0, ("say", "bc")),
            ("read", 0, 100_000),
            ("pass", 0.06),
            ("read", 0, 100_000),
            ("attach", 0, "native", 7),
            ("resume", 0, 5, False),
            ("read", 2, 200),
            ("rotate", 2),
            ("leave", 1),
            ("beyond", 0),
            ("resume", 2, 3, True),
            ("start", "cancel", 0.0),
            ("attach", 1, "native", 0),
            ("pass", 0.06),
            ("leave", 4),
            ("start", "grace:1", 0.0),
            ("attach", 2, "native", 0),
            ("pass", 0.06),
            ("leave", 5),
            ("pass", 0.5),
            ("look",),
            ("pass", 2.0),
            ("start", "continue", 0.0),
            ("tell", 3, ("fail",)),
            ("look",),
            ("churn", 5),
            ("look",),
            ("cancel", 0),
        ]
    )

    assert ["finished", "client_left", "client_left", "finished", "client_left", "client_left"] == [
        connection.end for connection in world.connections[:6]
    ]
    assert "1.1" in world.connections[0].ids
    assert world.connections[3].place in world.connections[2].ids
    assert [
        ("cancelled", "client_cancel"),
        ("cancelled", "disconnect"),
        ("cancelled", "disconnect"),
        ("error", None),
    ] == [(run.end.outcome, run.end.receipt.cause) for run in world.all[:4]]
    assert 9 == len(world.all) == len(world.ended)
    assert RETAINED == len(world.runs._kept)
    assert ("text", "abclast ") in joined(world.spoken[0])
