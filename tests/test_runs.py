"""Who may run, who still watches, why a run ends, and what it leaves behind.

The engine is the real one, without HTTP; readers are attached as the shell does it. Time is
virtual; where a test needs a real thread, it runs on real time and waits for events.
"""

import bisect
import contextvars
import functools
import gc
import math
import threading
import weakref
from contextlib import asynccontextmanager
from itertools import chain

import attrs
import msgspec
import pytest
import trio
import trio.testing

from agentsse.agents import Agent
from agentsse.context import MAX_HEARD, MAX_UNHEARD
from agentsse.dialects import Start
from agentsse.dialects.native import NATIVE, NativeEncoder
from agentsse.errors import (
    AgentError,
    BadRequest,
    Conflict,
    KeyReused,
    NotFound,
    Overloaded,
    ToolError,
    Unencodable,
)
from agentsse.events import (
    TYPE_NAMES,
    Custom,
    PartDelta,
    PartFinished,
    PartStarted,
    StepFinished,
    Usage,
    decode_event,
    encode_json,
)
from agentsse.log import START, Position
from agentsse.runs import (
    MAX_DEPTH,
    MAX_WAYS,
    TEARDOWN_BUCKETS,
    Limits,
    Policy,
    open_runs,
)
from agentsse.sse import Decoder
from agentsse.tools import is_cancelled, tool

SECONDS = 10  # generous: only a test that hangs ever sees it

colour = contextvars.ContextVar("colour", default="none")


@attrs.define
class Reports:
    """What operators would be told."""

    seen: list = attrs.field(factory=list)

    def __call__(self, event, **facts):
        """Take note."""
        self.seen.append((event, facts))


def make(function, **settings):
    return Agent(settings.pop("name", function.__name__), function, **settings)


async def forever(run, input):
    await trio.sleep_forever()


async def sleeping(run, input):
    await trio.sleep(input)
    return input


async def asking(run, input):
    answer = await run.ask("How?")
    await trio.sleep(input)
    return answer


@asynccontextmanager
async def opened(*functions, **limits):
    """Open a place for runs of these agents; deltas are not joined."""
    agents = [one if isinstance(one, Agent) else make(one) for one in functions]
    async with open_runs(
        {one.name: one for one in agents},
        limits=Limits(**{"coalesce": 0} | limits),
        report=(report := Reports()),
    ) as runs:
        runs.report.seen = report.seen  # what contains a report is a function, and takes a note
        yield runs


def begin(runs, agent, input=None, *, default="continue", **order):
    name = agent if isinstance(agent, str) else agent.__name__
    return runs.start(Start(agent=name, input=input, delivery="stream", **order), default=default)[
        0
    ]


def read(run, after=START):
    return run.attach("native", functools.partial(NativeEncoder, None), after)


def all_of(reader):
    """What a reader of a finished run gets."""
    decoder, events = Decoder(), []
    while not reader.is_finished:
        events += [decode_event(frame.data) for frame in decoder.feed(reader.take())]
    return events


def ended(run):
    """How a run ended: its outcome, the cause of its cancel, the code of its error."""
    return run.end.outcome, run.end.receipt.cause, run.end.error and run.end.error.code


def reported(runs, *, ends=False):
    """What operators were told, without the line that each run's end is, or that alone."""
    return [told for told in runs.report.seen if ends == (told[0] == "run_finished")]


def types(run):
    return [str(event.__struct_config__.tag) for event in run.log.events]


LEFT = ("cancelled", "disconnect", None)
STOPPED = ("cancelled", "client_cancel", None)
FINE = ("success", None, None)


# Starting, finding, listing


async def test_a_run_is_started_found_and_listed(autojump_clock):
    """Its states follow one another; whoever knows the id finds it, also when it is over."""
    async with opened(sleeping) as runs:
        run = begin(runs, sleeping, 5, thread_id="t", metadata={"m": 1})
        assert ("running", run, [run]) == (run.state, runs.find(run.id), list(runs))
        assert f"<Run {run.id} of 'sleeping', running>" == repr(run)
        assert (None, None) == (run.snapshot().outcome, run.result)
        await run.done.wait()
        shown = run.snapshot()
        other = begin(runs, sleeping, 5)
        assert run is runs.find(run.id)
        assert [other, run] == list(runs)
        assert [other] == runs.unfinished()
    first = run.log.events[0]
    assert ["run_started", "run_finished"] == types(run)
    assert ("sleeping", "t", "continue", None) == (
        first.agent,
        first.thread_id,
        first.on_disconnect,
        first.parent_run_id,
    )
    assert b"5" == bytes(first.input) == bytes(shown.input) == bytes(shown.result)
    assert b'{"m":1}' == bytes(shown.metadata)
    assert ("finished", "success", 5, 2) == (shown.state, shown.outcome, run.result, shown.events)
    assert first.ts == shown.started <= run.end.ts == shown.finished
    assert 32 == len(run.id)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input": object()}, "the input: expected what JSON can hold, got object at $;"),
        ({"input": [math.inf]}, "the input: expected finite numbers, got inf at $[0];"),
        ({"input": "half \ud800"}, "the input: .* half of a surrogate pair at $;"),
        ({"metadata": {"x": object()}}, "metadata: expected what JSON can hold, got object at $.x"),
        ({"thread_id": "half \ud800"}, "thread_id: .* half of a surrogate pair at $;"),
    ],
)
async def test_what_json_cannot_hold_starts_nothing(given, words, autojump_clock):
    """It is the request's fault, and nothing is kept of it."""
    async with opened(forever) as runs:
        with pytest.raises(BadRequest, match=words.replace("$", r"\$").replace("[0]", r"\[0\]")):
            begin(runs, forever, **({"idempotency_key": "k"} | given))
        assert ([], [], None) == (list(runs), runs.unfinished(), runs._keys.get("forever\nk"))


async def test_what_is_not_there_is_not_found(autojump_clock):
    """The error says what was asked for, cut short, and what there is."""
    async with opened(forever, sleeping) as runs:
        with pytest.raises(NotFound, match="one of the agents forever, sleeping, got 'nobody'"):
            begin(runs, "nobody")
        with pytest.raises(NotFound, match=r"run that goes on or is still kept, got 'x{80}'$"):
            runs.find("x" * 100)
    async with opened() as runs:
        with pytest.raises(NotFound, match=r"one of the agents \(none\), got 'nobody'"):
            begin(runs, "nobody")


async def test_a_run_lives_in_a_clean_context(autojump_clock):
    """What the starter had set, a request for instance, is not seen and not kept alive."""

    async def look(run, input):
        await trio.lowlevel.checkpoint()
        return colour.get()

    async with opened(look, max_running=1) as runs:
        colour.set("red")
        both = [begin(runs, look), begin(runs, look)]
        await runs.wait_idle()
        assert ["none", "none"] == [run.result for run in both]
        assert "red" == colour.get()


# Those who watch


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("cancel", Policy("cancel")),
        ("continue", Policy("continue")),
        ("grace", Policy("grace", 30)),
        ("grace:0", Policy("grace", 0)),
        ("grace:1234567", Policy("grace", 1_234_567)),
    ],
)
def test_a_policy_is_read_and_written(text, policy):
    """What is shown can be read again, and means the same."""
    assert policy == Policy.parse(text, 30) == Policy.parse(str(policy), 1)


@pytest.mark.parametrize(
    "text",
    [
        *("", "stop", "cancel:", "continue:5", "grace:", "grace:-1"),
        *("grace:1.5", "grace:²", "grace:1e9", "grace:12345678"),
    ],
)
def test_a_policy_is_one_of_four(text):
    """Anything else is refused, with what would do."""
    with pytest.raises(BadRequest, match="on_disconnect: expected 'cancel', 'continue', 'grace'"):
        Policy.parse(text, 30)


async def test_the_client_s_policy_beats_the_agent_s_beats_the_default(autojump_clock):
    """The run shows which one it lives by."""
    willing, shy = make(forever, name="willing"), make(forever, name="shy", on_disconnect="grace:5")
    async with opened(willing, shy) as runs:
        assert ["cancel", "grace:5", "continue"] == [
            begin(runs, name, default="cancel", on_disconnect=asked).snapshot().on_disconnect
            for name, asked in (("willing", None), ("shy", None), ("shy", "continue"))
        ]
        with pytest.raises(BadRequest, match="on_disconnect"):
            begin(runs, "shy", on_disconnect="stop")
        assert 3 == len(runs.unfinished())


async def test_the_last_reader_to_leave_cancels(autojump_clock):
    """The first one does not."""
    async with opened(forever) as runs:
        run = begin(runs, forever, on_disconnect="cancel")
        first, second = read(run), read(run)
        run.detach(first, "client_left")
        assert "running" == run.state
        run.detach(second, "client_left")
        assert "cancelling" == run.state
        await run.done.wait()
        await trio.sleep(100)
        assert [] == reported(runs)
    assert LEFT == ended(run)


async def test_whoever_waits_holds_a_run_as_readers_do(autojump_clock):
    """A JSON waiter keeps it alive, and cancels it by leaving."""
    async with opened(forever) as runs:
        run, waiter = begin(runs, forever, on_disconnect="cancel"), object()
        reader = read(run)
        run.hold(waiter)
        run.detach(reader, "client_left")
        assert "running" == run.state
        run.release(waiter, "client_left")
        await run.done.wait()
    assert LEFT == ended(run)


async def test_a_run_that_continues_does_not_care(autojump_clock):
    """It ends in its own time, and can be read afterwards."""
    async with opened(sleeping) as runs:
        run = begin(runs, sleeping, 100, on_disconnect="continue")
        run.detach(read(run), "client_left")
        run.detach(read(run), "slow_client")
        await run.done.wait()
        reader = read(run)
        assert run.log.events == all_of(reader)
        run.detach(reader, "client_left")
    assert FINE == ended(run)


@pytest.mark.parametrize("seconds", [0, 10])
async def test_grace_is_a_time_to_come_back_in(seconds, autojump_clock):
    """Whoever is back in time keeps the run; leaving starts the time anew."""
    async with opened(forever) as runs:
        run = begin(runs, forever, on_disconnect=f"grace:{seconds}")
        reader = read(run)
        for _ in range(3):
            run.detach(reader, "client_left")
            if seconds:
                await trio.sleep(0.9 * seconds)
            reader = read(run)
            await trio.sleep(100)
        assert "running" == run.state
        left = trio.current_time()
        run.detach(reader, "client_left")
        await run.done.wait()
        assert seconds <= trio.current_time() - left < seconds + 0.01
    assert LEFT == ended(run)


@pytest.mark.parametrize("reason", ["slow_client", "rotated", "error"])
@pytest.mark.parametrize(("policy", "seconds"), [("cancel", 30), ("grace:5", 30), ("grace:60", 60)])
async def test_what_the_server_closes_can_be_come_back_to(reason, policy, seconds, autojump_clock):
    """Thirty seconds at least, whatever the policy says."""
    async with opened(forever) as runs:
        run = begin(runs, forever, on_disconnect=policy)
        run.detach(read(run), reason)
        await trio.sleep(seconds - 1)
        assert "running" == run.state
        await run.done.wait()
        assert seconds <= trio.current_time() < seconds + 0.01
    assert LEFT == ended(run)


@pytest.mark.parametrize("reason", ["finished", "shutdown"])
async def test_a_stream_that_ends_for_the_server_s_sake_is_nobody_leaving(reason, autojump_clock):
    """The run goes on: who shuts down decides for itself."""
    async with opened(sleeping) as runs:
        run = begin(runs, sleeping, 100, on_disconnect="cancel")
        run.detach(read(run), reason)
        await run.done.wait()
    assert FINE == ended(run)


async def test_a_background_run_can_be_left_only_after_its_first_reader(autojump_clock):
    """Nobody at all is not somebody who has left."""
    async with opened(forever) as runs:
        run = begin(runs, forever, on_disconnect="cancel")
        await trio.sleep(1_000)
        assert "running" == run.state
        run.detach(read(run), "client_left")
        await run.done.wait()
    assert LEFT == ended(run)


@pytest.mark.parametrize("policy", ["cancel", "grace:5"])
async def test_waiting_for_a_person_is_not_ended_by_leaving(policy, autojump_clock):
    """Somebody may be thinking; after the answer, with nobody there, there are thirty seconds."""
    async with opened(asking) as runs:
        run = begin(runs, asking, 10_000, on_disconnect=policy)
        reader = read(run)
        await trio.testing.wait_all_tasks_blocked()
        run.detach(reader, "client_left")
        await trio.sleep(1_000)
        assert "waiting" == run.state
        run.context.answer("q1", {"answer": "so"})
        await run.done.wait()
        assert 1_030 <= trio.current_time() < 1_030.01
    assert LEFT == ended(run)


async def test_a_question_stops_the_time_to_come_back_in(autojump_clock):
    """Whoever left before it was asked may be thinking about it too."""

    async def main(run, input):
        await trio.sleep(5)
        return await run.ask("How?")

    async with opened(main) as runs:
        run = begin(runs, main, on_disconnect="grace:10")
        run.detach(read(run), "client_left")
        await trio.sleep(100)
        assert "waiting" == run.state
        run.context.answer("q1", {"answer": "so"})
        await run.done.wait()
    assert ("success", None, None) == ended(run)


async def test_whoever_was_back_has_not_left(autojump_clock):
    """Having been left once is forgotten with the next reader."""
    async with opened(asking) as runs:
        run = begin(runs, asking, 100, on_disconnect="cancel")
        reader = read(run)
        await trio.testing.wait_all_tasks_blocked()
        run.detach(reader, "client_left")
        run.detach(read(run), "shutdown")
        run.context.answer("q1", {"answer": "so"})
        await run.done.wait()
    assert FINE == ended(run)


async def test_a_reader_begins_where_it_says(autojump_clock):
    """Behind a place that there is; any other is refused, and holds nothing."""

    async def main(run, input):
        run.emit("a")
        run.emit("b")
        await trio.sleep_forever()

    async with opened(main) as runs:
        run = begin(runs, main, on_disconnect="cancel")
        await trio.testing.wait_all_tasks_blocked()
        for place, words in (
            (Position(4), r"a place in the run's 3 events, got 4; 0 stands for all"),
            (Position(4, 1), r"got 4\.1;"),
            (Position(0, 1), r"got 0\.1;"),
        ):
            with pytest.raises(BadRequest, match=words):
                read(run, place)
        later = read(run, Position(2))
        run.detach(read(run), "client_left")
        assert "running" == run.state
        run.cancel("client_cancel")
        await run.done.wait()
        assert run.log.events[2:] == all_of(later)


async def test_a_run_is_read_in_a_few_ways_at_once(autojump_clock):
    """Each is a copy of its frames; one that is in use already may have any number of readers."""
    async with opened(forever) as runs:
        run = begin(runs, forever, on_disconnect="cancel")
        encoder = functools.partial(NativeEncoder, None)
        readers = [run.attach(way, encoder, START) for way in range(MAX_WAYS)]
        with pytest.raises(Overloaded, match=rf"read in {MAX_WAYS} ways already"):
            run.attach(MAX_WAYS, encoder, START)
        assert (MAX_WAYS, True, False) == (
            run.log.ways,
            run.log.is_read_by(0),
            run.log.is_read_by(MAX_WAYS),
        )
        second = run.attach(0, encoder, START)
        assert second.rendering is readers[0].rendering
        run.detach(readers.pop(), "client_left")
        readers += [second, run.attach(MAX_WAYS, encoder, START)]
        for reader in readers:
            assert "running" == run.state
            run.detach(reader, "client_left")
        await run.done.wait()
    assert (LEFT, 0) == (ended(run), run.log.ways)


# Waiting for a place


async def test_runs_beyond_the_bound_wait_in_the_order_they_came(autojump_clock):
    """Each begins when one before it has ended; until then nothing is in its log."""
    began = []

    async def note(run, input):
        began.append(input)
        await trio.sleep(1)

    async with opened(note, max_running=2) as runs:
        waiting = [begin(runs, note, n) for n in range(5)]
        assert ["running", "running", "queued", "queued", "queued"] == [r.state for r in waiting]
        assert ([], None) == (waiting[4].log.events, waiting[4].snapshot().started)
        await runs.wait_idle()
        assert 3 == trio.current_time()
    assert [0, 1, 2, 3, 4] == sorted(began)
    assert [{0, 1}, {2, 3}, {4}] == [set(began[:2]), set(began[2:4]), set(began[4:])]
    assert [FINE] * 5 == [ended(run) for run in waiting]


async def test_an_agent_may_have_a_bound_of_its_own(autojump_clock):
    """Others overtake those that wait for it."""
    local = make(sleeping, name="local", max_running=1)
    async with opened(local, sleeping) as runs:
        first, second = begin(runs, "local", 1), begin(runs, "local", 1)
        assert ["running", "queued"] == [first.state, second.state]
        assert "running" == begin(runs, sleeping, 1).state
        await runs.wait_idle()
        assert 2 == trio.current_time()


async def test_a_full_queue_refuses(autojump_clock):
    """The error says when to come back; what has a place of its own is let in all the same."""
    local = make(forever, name="local", max_running=1)
    async with opened(local, forever, max_running=5, max_queued=1) as runs:
        begin(runs, "local")
        begin(runs, "local")
        with pytest.raises(Overloaded, match="all places are taken and 1 runs are waiting") as full:
            begin(runs, "local", thread_id="t", idempotency_key="k")
        assert 1 == full.value.retry_after
        assert "running" == begin(runs, forever, thread_id="t").state
        assert 3 == len(list(runs))


async def test_a_full_server_refuses_whoever_comes(autojump_clock):
    """Neither a place nor a place in the queue: nothing is begun, and nothing is kept."""
    async with opened(forever, sleeping, max_running=1, max_queued=1) as runs:
        both = [begin(runs, forever), begin(runs, sleeping)]
        for name in (forever, sleeping):
            with pytest.raises(Overloaded, match="all places are taken and 1 runs are waiting"):
                begin(runs, name)
        assert both == runs.unfinished()


async def test_a_run_that_is_cancelled_while_it_waits_never_runs(autojump_clock):
    """It has a beginning and an end all the same, and the place goes to the next."""
    began = []

    async def note(run, input):
        began.append(input)
        await trio.sleep(1)

    async with opened(note, max_running=1) as runs:
        _, second, third = (begin(runs, note, n, thread_id=f"{n}") for n in range(3))
        reader = read(second)
        second.cancel_after_step(reason="changed my mind")
        assert second.done.is_set()
        assert ["run_started", "run_finished"] == types(second)
        assert second.log.events == all_of(reader)
        assert (STOPPED, 0) == (ended(second), second.end.receipt.tasks)
        await third.done.wait()
    assert [0, 2] == began


async def test_leaving_a_run_that_waits_cancels_it(autojump_clock):
    """The policy holds from the first moment on."""
    async with opened(forever, max_running=1) as runs:
        begin(runs, forever)
        run = begin(runs, forever, on_disconnect="cancel")
        run.detach(read(run), "client_left")
        assert LEFT == ended(run)
        assert 0 == runs.statistics().queued


async def test_a_busy_thread_refuses_or_queues(autojump_clock):
    """One run of a conversation at a time; those without one are nobody's neighbours."""
    async with opened(sleeping) as runs:
        first = begin(runs, sleeping, 1, thread_id="t")
        with pytest.raises(Conflict, match=rf"'t' is busy with the run {first.id}: .*enqueue"):
            begin(runs, sleeping, 1, thread_id="t")
        second = begin(runs, sleeping, 1, thread_id="t", if_busy="enqueue")
        third = begin(runs, sleeping, 1, thread_id="t", if_busy="enqueue")
        assert "running" == begin(runs, sleeping, 1, thread_id="").state
        assert "running" == begin(runs, sleeping, 1).state
        assert ["running", "queued", "queued"] == [one.state for one in (first, second, third)]
        await second.done.wait()
        assert 2 == trio.current_time()
        await third.done.wait()
        assert "running" == begin(runs, sleeping, 1, thread_id="t").state


# Idempotency


async def test_the_same_key_finds_the_same_run(autojump_clock):
    """While it goes on, afterwards, and also when nothing new is started; per agent."""
    async with opened(forever, sleeping) as runs:
        order = Start(
            agent="sleeping", input=1, delivery="wait", idempotency_key="k", fingerprint=b"f"
        )
        start = functools.partial(runs.start, default="cancel")
        run, is_new = start(order)
        assert ((run, False), True) == (start(order), is_new)
        assert start(msgspec.structs.replace(order, agent="forever"))[1]
        assert start(msgspec.structs.replace(order, idempotency_key="other"))[1]
        with pytest.raises(KeyReused, match="Idempotency-Key first came with, got another one"):
            start(msgspec.structs.replace(order, fingerprint=b"g"))
        await run.done.wait()
        runs.close()
        assert (run, False) == start(order)


async def test_a_key_is_forgotten_with_its_run(autojump_clock):
    """By then it is a new request; what was evicted without a key changes nothing."""
    async with opened(sleeping, retain_runs=1) as runs:
        order = Start(agent="sleeping", input=1, delivery="wait", idempotency_key="k")
        first, _ = runs.start(order, default="cancel")
        await first.done.wait()
        for _ in range(2):
            await begin(runs, sleeping, 1).done.wait()
        second, is_new = runs.start(order, default="cancel")
        assert (True, True) == (is_new, second is not first)


# Agents and ids that a client names


async def test_an_agent_is_found_by_its_name_or_its_model(autojump_clock):
    """The first of the names that there is; without one it is the server's first agent."""
    chat = Agent.of_model("chat", "offline:x")
    named = make(forever, name="offline.x")
    async with opened(sleeping, chat, named) as runs:
        choose = runs.choose_agent
        assert ["sleeping", "chat", "chat", "chat", "offline.x"] == [
            chosen.name
            for chosen in (
                choose(None),
                choose("chat"),
                choose("offline:x"),
                choose("gone", "offline:x", "sleeping"),
                choose("offline.x", "chat"),
            )
        ]
        with pytest.raises(NotFound, match=r"sleeping, got 'gone'"):
            choose("gone", "gone too")
        run = begin(runs, "gone", 1, otherwise=("other", "sleeping"))
        assert "sleeping" == run.agent.name
    async with opened() as runs:
        with pytest.raises(NotFound, match=r"one of the agents \(none\), got '\(none\)'"):
            runs.choose_agent(None)


async def test_a_client_may_name_its_run(autojump_clock):
    """As long as there is no other of that name, whether it goes on or is kept."""
    async with opened(sleeping, retain_age=60, max_running=1) as runs:
        run, queued = (begin(runs, sleeping, 1, run_id=name) for name in ("mine", "next"))
        assert ("mine", run) == (run.id, runs.find("mine"))
        for name in ("mine", "next"):
            with pytest.raises(Conflict, match=f"the id of a new run, got '{name}', which there"):
                begin(runs, sleeping, 1, run_id=name)
        await queued.done.wait()
        with pytest.raises(Conflict, match="got 'mine'"):
            begin(runs, sleeping, 1, run_id="mine", thread_id="t")
        assert None is runs.find_thread("t")
        await trio.sleep(61)
        again = begin(runs, sleeping, 1, run_id="mine")
        assert (again, "running") == (runs.find("mine"), again.state)
        with pytest.raises(BadRequest, match="run_id: expected what JSON can hold"):
            begin(runs, sleeping, 1, run_id="half \ud800")
        assert [again] == list(runs)


async def test_the_same_key_and_the_same_id_are_the_same_run(autojump_clock):
    """Whoever tries again with both gets what there is, and no conflict."""
    async with opened(sleeping) as runs:
        order = {"run_id": "mine", "idempotency_key": "k"}
        assert begin(runs, sleeping, 1, **order) is begin(runs, sleeping, 1, **order)


async def test_a_run_may_begin_a_thread(autojump_clock):
    """Of its own name, unless it has another one."""
    async with opened(sleeping) as runs:
        own = begin(runs, sleeping, 1, makes_thread=True)
        named = begin(runs, sleeping, 1, makes_thread=True, run_id="mine")
        other = begin(runs, sleeping, 1, makes_thread=True, thread_id="t")
        alone = begin(runs, sleeping, 1)
        assert [own.id, "mine", "t", None] == [run.thread_id for run in (own, named, other, alone)]
        assert [own.home, named.home, other.home] == list(runs.threads.values())
        assert None is alone.home
        with pytest.raises(Conflict, match="'mine' is busy with the run mine"):
            begin(runs, sleeping, 1, thread_id="mine")


async def test_what_was_said_to_begin_a_run_is_shown(autojump_clock):
    """Behind its beginning, also where the run never runs."""
    async with opened(sleeping, max_running=1) as runs:
        run = begin(runs, sleeping, 1, shown="half \ud800")
        queued = begin(runs, sleeping, 1, shown="")
        queued.cancel("client_cancel")
        await run.done.wait()
    assert ["half \ufffd", ""] == [one.log.events[1].text for one in (run, queued)]
    assert {"steer"} == {one.log.events[1].mode for one in (run, queued)}
    ends = ["run_started", "message_received", "run_finished"]
    assert ends == types(run) == types(queued)


# Threads


async def test_a_thread_is_there_as_long_as_anything_is_in_it(autojump_clock):
    """Runs that go on, wait or are kept, their child runs, and whoever else holds it."""

    async def main(run, input):
        await run.delegate("sleeping", 1)

    async with opened(main, sleeping, retain_runs=2) as runs:
        assert runs.find_thread("t") is runs.find_thread(None) is None
        run = begin(runs, main, thread_id="t")
        queued = begin(runs, sleeping, 1, thread_id="t", if_busy="enqueue")
        thread = runs.find_thread("t")
        assert thread is run.home is runs.open_thread("t")
        assert ([run, queued], run, run) == (thread.active, thread.run, thread.running)
        await trio.testing.wait_all_tasks_blocked()
        (child,) = thread.workers
        assert (run.id, thread) == (child.parent_id, child.home)
        run.cancel("client_cancel")
        assert (run, None) == (thread.run, thread.running)
        await queued.done.wait()
        assert ([], [run, queued], []) == (thread.active, thread.kept, thread.workers)
        assert (queued, None) == (thread.run, thread.running)
        thread.holders.add("somebody")
        for _ in range(2):
            await begin(runs, sleeping, 1).done.wait()
        assert ([], None) == (thread.kept, thread.run)
        runs.drop_thread(thread)
        assert thread is runs.find_thread("t")
        thread.holders.clear()
        runs.drop_thread(thread)
        assert None is runs.find_thread("t")


async def test_a_thread_is_about_the_run_that_goes_on(autojump_clock):
    """Also where one that came before it still waits, because its agent has no room."""
    shy = make(forever, name="shy", max_running=1)
    async with opened(shy, forever) as runs:
        begin(runs, "shy")
        queued = begin(runs, "shy", thread_id="t")
        run = begin(runs, forever, thread_id="t", if_busy="enqueue")
        assert ([queued, run], run, run) == (run.home.active, run.home.run, run.home.running)
        run.cancel("client_cancel")
        await run.done.wait()
        assert (queued, None) == (run.home.run, run.home.running)


async def test_a_thread_that_was_forgotten_is_another_one_afterwards(autojump_clock):
    """Its runs are kept as long as others; nothing of it is known to who comes later."""
    async with opened(sleeping) as runs:
        run = begin(runs, sleeping, 1, thread_id="t")
        await run.done.wait()
        runs.forget_thread(run.home)
        assert run is runs.find(run.id)
        later = begin(runs, sleeping, 1, thread_id="t")
        assert later.home is not run.home
        assert () == later.context.history
        runs.forget_thread(run.home)
        assert later.home is runs.find_thread("t")


async def test_a_thread_s_feed_has_what_its_workers_say(autojump_clock):
    """At any depth, each event once and with its path, between those of the run above."""

    async def leaf(run, input):
        run.emit("leaf")
        await trio.sleep(1)

    async def worker(run, input):
        run.emit("worker")
        run.spawn("leaf", None)
        await trio.sleep(1)

    async def main(run, input):
        run.spawn("worker", None)
        run.spawn("worker", None)
        await trio.sleep(5)
        run.emit("main")

    async with opened(main, worker, leaf) as runs:
        run = begin(runs, main, thread_id="t")
        other = begin(runs, leaf, thread_id="u")
        await runs.wait_idle()
        thread = run.home
        logs = [run.log.events, *(one.log.events for one in thread.workers)]
        assert 4 == len(thread.workers)
        assert sorted(map(id, chain(*logs))) == sorted(map(id, thread.feed.events))
        assert other.log.events == list(other.home.feed.events)
        told = [(e.name, e.path) for e in thread.feed.events if isinstance(e, Custom)]
    assert [
        ("leaf", ("worker:1", "leaf:1")),
        ("leaf", ("worker:2", "leaf:1")),
        ("main", ()),
        ("worker", ("worker:1",)),
        ("worker", ("worker:2",)),
    ] == sorted(told)


async def test_the_server_s_feed_has_all_but_deltas_once_somebody_reads_it(autojump_clock):
    """Of runs without a thread as well; until then it costs nothing."""

    async def speaking(run, input):
        run.text(input)
        await trio.sleep(1)

    async with opened(speaking) as runs:
        await begin(runs, speaking, "a").done.wait()
        assert () == tuple(runs.feed.events)
        reader = runs.feed.attach("native", lambda: NATIVE.feed.encoder(None), None)
        runs.feed.detach(reader)
        run = begin(runs, speaking, "b")
        await begin(runs, speaking, "c", thread_id="t").done.wait()
        assert 2 * [e.run_id for e in runs.feed.events].count(run.id) == len(runs.feed.events)
    assert ["run_started", "part_started", "part_finished", "run_finished"] == [
        TYPE_NAMES[type(event)] for event in runs.feed.events if event.run_id == run.id
    ]


async def test_refusing_ends_the_streams_of_feeds_and_no_run(autojump_clock):
    """They would go on for ever; what runs may end by itself."""
    async with opened(sleeping) as runs:
        run = begin(runs, sleeping, 5, thread_id="t")
        readers = [
            feed.attach("native", lambda: NATIVE.feed.encoder(None), None)
            for feed in (runs.feed, run.home.feed)
        ]
        runs.refuse()
        assert ["shutdown"] * 2 == [reader.closing for reader in readers]
        with pytest.raises(Overloaded):
            begin(runs, sleeping, 5)
        await run.done.wait()
    assert FINE == ended(run)


# What was said too late


async def ends_well(run, input):
    await trio.sleep(5)


async def ends_badly(run, input):
    await trio.sleep(5)
    raise ValueError


async def overflows(run, input):
    await trio.sleep(5)
    while True:
        run.emit("more")
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("main", "cause", "is_told"),
    [
        (ends_well, None, True),
        (ends_badly, None, True),
        (overflows, "limit", True),
        (asking, "input_timeout", True),
        (forever, "deadline", True),
        (forever, "client_cancel", False),
        (forever, "disconnect", True),
        (forever, "shutdown", False),
    ],
)
async def test_what_nobody_has_heard_is_handed_over_unless_the_run_was_stopped(
    main, cause, is_told, autojump_clock
):
    """Once, in order, when the run is over and found as such."""
    unheard = []
    limits = {"max_events": 50, "input_timeout": 5, "run_timeout": 6}
    async with opened(main, **limits) as runs:
        runs.unheard = lambda run, messages: unheard.append((run.state, run.id, messages))
        run, silent = begin(runs, main), begin(runs, main)
        run.context.hear("a", "follow_up")
        run.context.hear("b", "steer")
        await trio.sleep(1)
        if main is forever and cause != "deadline":
            run.cancel(cause)
        await run.done.wait()
        silent.cancel("client_cancel")
    assert cause == run.end.receipt.cause
    assert ([("finished", run.id, ["a", "b"])] if is_told else []) == unheard


async def test_by_default_what_nobody_has_heard_is_nobody_s(autojump_clock):
    """Threads are told of it where there are any."""
    async with opened(ends_well) as runs:
        run = begin(runs, ends_well)
        run.context.hear("a", "steer")
        await run.done.wait()
    assert FINE == ended(run)


# Waiting for an end or a question


async def test_whoever_waits_for_an_answer_gets_a_question_too(autojump_clock):
    """Until the run is over, or asks something itself; many may wait."""

    async def main(run, input):
        await trio.sleep(1)
        await run.delegate("asking", 1)  # that is not this run's question
        await run.ask("Sure?")
        await trio.sleep(1)

    async def wait(run):
        await run.wait_done_or_asking()
        woken.append((trio.current_time(), run.state))

    woken = []
    async with opened(main, asking) as runs:
        run = begin(runs, main)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, run)
            nursery.start_soon(wait, run)
            await trio.sleep(2)
            (child,) = run.children
            child.context.answer("q1", {"answer": ""})
        assert [(3, "waiting")] * 2 == woken
        await wait(run)
        async with trio.open_nursery() as nursery:
            run.context.answer("q1", {"answer": ""})
            nursery.start_soon(wait, run)
            nursery.start_soon(wait, run)
        await wait(run)
    assert [(3, "waiting")] * 3 + [(4, "finished")] * 3 == woken


async def test_a_question_that_was_answered_meanwhile_is_waited_over(autojump_clock):
    """Whoever wakes up looks again."""
    async with opened(sleeping) as runs:
        run = begin(runs, sleeping, 3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.wait_done_or_asking)
            await trio.testing.wait_all_tasks_blocked()
            run._wake_waiting()
        assert (3, "finished") == (trio.current_time(), run.state)


# Why a run ends


@pytest.mark.parametrize(
    ("cause", "outcome"),
    [
        ("client_cancel", "cancelled"),
        ("disconnect", "cancelled"),
        ("deadline", "cancelled"),
        ("shutdown", "cancelled"),
        ("parent", "cancelled"),
        ("limit", "error"),
        ("input_timeout", "interrupted"),
    ],
)
async def test_the_first_cause_stands(cause, outcome, autojump_clock):
    """Whatever asks for the end later changes nothing; each cause has its outcome."""
    async with opened(forever) as runs:
        run = begin(runs, forever)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel(cause)
        for later in ("client_cancel", "limit"):
            run.cancel(later)
        run.cancel_after_step()
        await run.done.wait()
        run.cancel("client_cancel")
    assert (outcome, cause) == ended(run)[:2]
    assert ["run_started", "run_finished"] == types(run)


async def test_a_run_that_is_cancelled_before_its_first_step_has_both_ends(autojump_clock):
    """Its agent gets as far as its first await."""
    async with opened(forever) as runs:
        run = begin(runs, forever)
        run.cancel("client_cancel")
        await run.done.wait()
    assert (STOPPED, 0) == (ended(run), run.end.receipt.tasks)
    assert ["run_started", "run_finished"] == types(run)


@pytest.mark.parametrize(
    ("of_agent", "of_request", "of_server", "seconds"),
    [
        (None, None, 30, 30),
        (20, None, 30, 20),
        (20, 10, 30, 10),
        (20, 40, 30, 20),
        (None, 40, 30, 30),
    ],
)
async def test_the_shortest_deadline_ends_a_run(
    of_agent, of_request, of_server, seconds, autojump_clock
):
    """Counted from its start, not from its wait in the queue."""
    async with opened(
        make(forever, timeout=of_agent), sleeping, run_timeout=of_server, max_running=1
    ) as runs:
        begin(runs, sleeping, 5)
        run = begin(runs, forever, timeout=of_request)
        await run.done.wait()
        assert seconds + 5 <= trio.current_time() < seconds + 5.02
    assert ("cancelled", "deadline", None) == ended(run)


async def test_a_log_has_a_bound_in_events(autojump_clock):
    """At it the run ends with an error; what comes after it is dropped, but for what ends."""

    async def main(run, input):
        run.emit("a")
        run.text("said")
        run.text("unsaid")
        run.reasoning("unheard")
        with run.step("dropped"):
            await trio.sleep_forever()

    async with opened(main, max_events=4) as runs:
        run = begin(runs, main)
        await run.done.wait()
    assert ("error", "limit", "limit") == ended(run)
    assert (507, True) == (run.end.error.status, "4 events" in run.end.error.message)
    part = ["part_started", "part_delta", "part_finished"]
    assert ["run_started", "custom", *part, "run_finished"] == types(run)
    assert "said" == run.snapshot().output


async def test_what_begins_a_part_may_be_the_last_event(autojump_clock):
    """An agent goes on speaking to nobody, until it awaits."""

    async def main(run, input):
        for _ in range(3):
            run.reasoning("a")
            run.text("b")
        await trio.sleep_forever()

    part = ["part_started", "part_delta", "part_finished"]
    for bound, told in ((1, []), (2, part[::2]), (3, part), (4, part)):
        async with opened(main, max_events=bound) as runs:
            run = begin(runs, main)
            await run.done.wait()
        assert ("error", "limit", "limit") == ended(run)
        assert ["run_started", *told, "run_finished"] == types(run)
        assert [] == reported(runs)


async def test_a_log_that_is_full_is_an_error_also_after_the_return(autojump_clock):
    """Tasks that the agent has left go on speaking; parts they had begun get their end."""

    async def main(run, input):
        async def chatter():
            run.append(PartStarted(part_id="a", kind="text"))
            run.append(PartStarted(part_id="b", kind="tool_call", name="n", call_id="c"))
            while True:
                run.append(PartDelta(part_id="a", kind="text", delta="x"))
                await trio.sleep(1)

        run.nursery.start_soon(chatter)
        await trio.lowlevel.checkpoint()
        return "done"

    async with opened(main, max_events=10) as runs:
        run = begin(runs, main)
        await run.done.wait()
    assert ("error", "limit", "limit") == ended(run)
    assert run.result is None
    assert [("a", "x" * 7, None), ("b", "", "n")] == [
        (event.part_id, event.text, event.name)
        for event in run.log.events
        if isinstance(event, PartFinished)
    ]


async def test_a_log_has_a_bound_in_bytes(autojump_clock):
    """The same as with events."""

    async def main(run, input):
        while True:
            run.emit("a", much="x" * 1_000)
            await trio.lowlevel.checkpoint()

    async with opened(main, max_bytes=10_000) as runs:
        run = begin(runs, main)
        await run.done.wait()
    assert ("error", "limit", "limit") == ended(run)
    assert 10_000 < run.log.size < 12_000


async def test_a_cancel_after_the_agent_has_returned_changes_no_result(autojump_clock):
    """Tasks that it left in its nursery are ended, and the receipt says by what."""

    async def main(run, input):
        run.nursery.start_soon(trio.sleep_forever)
        await trio.lowlevel.checkpoint()
        return "done"

    async with opened(main) as runs:
        run = begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        assert "running" == run.state
        run.cancel("client_cancel")
        await run.done.wait()
    assert ("success", "client_cancel", None) == ended(run)
    assert ("done", 2) == (run.result, run.end.receipt.tasks)


async def test_an_agent_that_swallows_its_cancel_is_cancelled_all_the_same(autojump_clock):
    """What it returns then is nobody's result."""

    async def main(run, input):
        with trio.CancelScope():
            try:
                await trio.sleep_forever()
            except BaseException:  # noqa: BLE001 - as bad agents do
                return "got away"

    async with opened(main) as runs:
        run = begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel("client_cancel")
        await run.done.wait()
    assert STOPPED == ended(run)
    assert run.result is None


async def test_a_cancel_may_wait_for_the_step(autojump_clock):
    """It comes when no step is open: neither in the middle of one, nor between nested ones."""

    async def main(run, input):
        with run.step("outer"):
            with run.step("inner"):
                await trio.sleep(1)
            await trio.sleep(1)
            run.emit("still here")
        await trio.sleep_forever()

    async with opened(main) as runs:
        run = begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel_after_step(reason="enough")
        assert "running" == run.state
        await run.done.wait()
        assert 2 == trio.current_time()
    assert STOPPED == ended(run)
    assert "custom" in types(run)
    assert [None, None] == [e.error for e in run.log.events if isinstance(e, StepFinished)]


async def test_who_asked_first_for_the_end_of_a_step_is_named(autojump_clock):
    """A later one changes nothing."""

    async def main(run, input):
        with run.step("long"):
            await trio.sleep(1)
        await trio.sleep_forever()

    async with opened(main) as runs:
        run = begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel_after_step(reason="enough")
        run.cancel_after_step(reason="more than enough")
        await run.done.wait()
        ((_, facts),) = reported(runs, ends=True)
    assert (STOPPED, "enough") == (ended(run), facts["reason"])


async def test_between_steps_such_a_cancel_comes_at_once(autojump_clock):
    """There is nothing to wait for."""
    async with opened(forever) as runs:
        run = begin(runs, forever)
        run.cancel_after_step()
        await run.done.wait()
        assert 0 == trio.current_time()
    assert STOPPED == ended(run)


# What an agent may raise


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (AgentError("no", code="nope", status=418), "nope", "no"),
        (ValueError("secret"), "crashed", "the agent 'main' raised ValueError;"),
        (SystemExit(3), "system_exit", "the agent 'main' tried to end the process"),
        (ExceptionGroup("x", [ValueError("secret")]), "crashed", "'main' raised ValueError;"),
        (ExceptionGroup("x", [KeyError(), OSError()]), "crashed", "raised ExceptionGroup;"),
        (BaseExceptionGroup("x", [SystemExit(3)]), "system_exit", "tried to end the process"),
        (RecursionError("secret"), "crashed", "raised RecursionError;"),
        (GeneratorExit(), "crashed", "raised GeneratorExit;"),
    ],
)
async def test_what_an_agent_raises_ends_its_run_and_nothing_else(
    error, code, words, autojump_clock
):
    """The neighbour goes on; what is not ours is reported, and not shown."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        raise error

    async with opened(main, sleeping) as runs:
        run, neighbour = begin(runs, main), begin(runs, sleeping, 5)
        await runs.wait_idle()
    assert ("error", None, code) == ended(run)
    assert words in run.end.error.message
    assert "secret" not in run.end.error.message
    assert ([] if code == "nope" else ["crash"]) == [event for event, _ in reported(runs)]
    assert FINE == ended(neighbour)


async def test_an_agent_that_forgets_to_leave_a_scope_crashes_alone(autojump_clock):
    """What Trio says about it comes from the run's own scopes."""

    async def main(run, input):
        trio.CancelScope().__enter__()
        await trio.lowlevel.checkpoint()

    async with opened(main, sleeping) as runs:
        run, neighbour = begin(runs, main), begin(runs, sleeping, 5)
        await runs.wait_idle()
    assert ("error", None, "crashed") == ended(run)
    assert "Cancel scope stack corrupted" in reported(runs)[0][1]["traceback"]
    assert FINE == ended(neighbour)


async def test_an_interrupt_is_not_the_agent_s(autojump_clock):
    """It goes on, and takes the neighbours down in order."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        raise KeyboardInterrupt

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        async with opened(main, forever) as runs:
            run, neighbour = begin(runs, main), begin(runs, forever)
            await trio.sleep_forever()
    assert [("cancelled", "shutdown", None)] * 2 == [ended(run), ended(neighbour)]
    assert [] == runs.unfinished()


async def test_an_error_beside_a_cancel_from_outside_is_the_run_s(autojump_clock):
    """The error is told and reported, and the cancel goes on."""

    async def main(run, input):
        async def complain():
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("secret")

        run.nursery.start_soon(complain)
        await trio.sleep_forever()

    with trio.CancelScope() as outside:
        async with opened(main, forever) as runs:
            run, neighbour = begin(runs, main), begin(runs, forever)
            await trio.testing.wait_all_tasks_blocked()
            runs.nursery.cancel_scope.cancel()
            outside.cancel()
            await trio.sleep_forever()
    assert outside.cancelled_caught
    assert ("cancelled", "shutdown", "crashed") == ended(run)
    assert ["crash"] == [event for event, _ in reported(runs)]
    assert ("cancelled", "shutdown", None) == ended(neighbour)


async def test_an_agent_that_cancels_its_own_nursery_has_no_result(autojump_clock):
    """That is an error of its own: nobody has asked for the end. What it returns counts."""

    async def main(run, input):
        run.nursery.cancel_scope.cancel()
        if input is None:
            await trio.sleep_forever()
        return input

    async with opened(main) as runs:
        without, with_result = begin(runs, main), begin(runs, main, 5)
        await runs.wait_idle()
    assert ("error", None, "no_result") == ended(without)
    assert "it cancelled itself" in without.end.error.message
    assert FINE == ended(with_result)
    assert 5 == with_result.result


async def test_an_error_beside_the_cancel_of_a_parent_is_the_child_s(autojump_clock):
    """The parent, whose own scope it was, gets the cancel; the child tells both."""

    async def child(run, input):
        async def complain():
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("secret")

        run.nursery.start_soon(complain)
        await trio.sleep_forever()

    async def main(run, input):
        with trio.move_on_after(3):
            await run.delegate("child", None)
        return "moved on"

    async with opened(main, child) as runs:
        run = begin(runs, main)
        await run.done.wait()
        (below,) = (other for other in runs if other is not run)
    assert ("cancelled", "parent", "crashed") == ended(below)
    assert ["crash"] == [event for event, _ in reported(runs)]
    assert FINE == ended(run)


async def test_runs_below_one_another_have_a_bound(autojump_clock):
    """Agents that delegate in a circle end with an error, as deep as they may go."""

    async def circle(run, input):
        try:
            await run.delegate("circle", input + 1)
        except AgentError as error:
            return [input, error.code]

    async with opened(circle) as runs:
        run = begin(runs, circle, 0)
        await run.done.wait()
        by_depth = {one.depth: one for one in runs}
        assert list(range(MAX_DEPTH + 1)) == sorted(by_depth)
        for depth in range(1, MAX_DEPTH + 1):
            assert by_depth[depth - 1].id == by_depth[depth].parent_id
    assert (run, None) == (by_depth[0], run.parent_id)
    assert [MAX_DEPTH, "too_deep"] == by_depth[MAX_DEPTH].result
    assert [FINE] * (MAX_DEPTH + 1) == [ended(one) for one in by_depth.values()]


def nested(depth):
    """Lists in lists."""
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def is_too_deep(depth):
    try:
        encode_json(nested(depth))
    except Unencodable:
        return True
    return False


@pytest.mark.parametrize("places", [1, 1_000])
async def test_an_input_too_deep_to_be_read_ends_its_run_alone(places, autojump_clock):
    """Python's recursion has a bound, wherever it is met: refused at once, or an error."""
    bound = bisect.bisect(range(100_000), False, key=is_too_deep)
    refused = []

    async def main(run, input):
        await trio.sleep(1)

    async with opened(main, max_running=places) as runs:
        for depth in range(bound - 50, bound + 20):
            try:
                begin(runs, main, nested(depth))
            except BadRequest as error:
                refused.append(error.message)
        with trio.fail_after(1_000):
            await runs.wait_idle()
        ends = {ended(run) for run in runs}
    assert {FINE} <= ends <= {FINE, ("error", None, "bad_request")}
    assert refused
    assert all("the input: expected what JSON can hold" in message for message in refused)


async def test_a_body_that_fails_takes_its_runs_along(autojump_clock):
    """Leaving cancels what goes on with the cause `shutdown`, and waits until it is gone."""

    async def main(run, input):
        try:
            await trio.sleep_forever()
        finally:
            with run.cleanup():
                await trio.sleep(1)

    with pytest.RaisesGroup(ValueError, flatten_subgroups=True):
        async with opened(main) as runs:
            run = begin(runs, main)
            await trio.testing.wait_all_tasks_blocked()
            raise ValueError
    assert ("cancelled", "shutdown", None) == ended(run)
    assert 1 == run.end.receipt.seconds


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: setattr(run, "usage", Usage(input_tokens=object())),
        lambda run: setattr(run, "usage", "half \ud800"),
        lambda run: run._open_parts.update(a=(PartStarted(part_id="a", kind="text"), [None])),
    ],
)
async def test_an_end_that_cannot_be_written_is_a_crash_of_the_run(spoil, autojump_clock):
    """It has an end all the same, and the neighbour goes on."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        spoil(run)
        return "done"

    async with opened(main, sleeping) as runs:
        run, neighbour = begin(runs, main), begin(runs, sleeping, 5)
        await runs.wait_idle()
    assert ("error", None, "crashed") == ended(run)
    assert "the end of 'main' raised" in run.end.error.message
    assert (Usage(), ["run_started", "run_finished"]) == (run.end.usage, types(run))
    ((event, facts),) = reported(runs)
    assert ("crash", "the end of 'main'", run.id) == (event, facts["where"], facts["run_id"])
    assert (FINE, 5) == (ended(neighbour), neighbour.result)


class Mute(AgentError):
    """An error that has no words, and no code that is text."""

    def __str__(self):
        """Fail."""
        raise ValueError

    @property
    def message(self):
        """Fail."""
        raise ValueError


class Odd(AgentError):
    """An error whose code and status are neither text nor number."""

    def __init__(self):
        super().__init__("half \ud800", code=5, status="bad")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Mute("no"), "crashed", "the end of 'main' raised ValueError;"),
        (Odd(), "5", "half \ufffd"),
        (AgentError("no", code="\ud800", status=400), "\ufffd", "no"),
    ],
)
async def test_whatever_an_error_holds_the_run_has_an_end(error, code, words, autojump_clock):
    """Its code and its words are made fit; what cannot be asked is a crash."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        raise error

    async with opened(main, sleeping) as runs:
        run, neighbour = begin(runs, main), begin(runs, sleeping, 5)
        await runs.wait_idle()
    assert ("error", None, code) == ended(run)
    assert words in run.end.error.message
    assert isinstance(run.end.error.status, int)
    assert FINE == ended(neighbour)


@pytest.mark.parametrize("window", [0, 0.05])
@pytest.mark.parametrize("delta", [None, 5, b"x"])
async def test_a_delta_that_is_no_text_is_a_crash_of_the_run_alone(delta, window, autojump_clock):
    """It is refused at once, and never meets the timer that all runs share."""

    async def main(run, input):
        run.append(PartStarted(part_id="a", kind="text"))
        for text in ("b", "c", delta):
            run.append(PartDelta(part_id="a", kind="text", delta=text))

    async with opened(main, sleeping, coalesce=window) as runs:
        run, neighbour = begin(runs, main), begin(runs, sleeping, 5)
        await runs.wait_idle()
    assert ("error", None, "crashed") == ended(run)
    assert ["bc"] == [event.text for event in run.log.events if isinstance(event, PartFinished)]
    assert FINE == ended(neighbour)


# What a run leaves behind


async def test_each_end_is_reported(autojump_clock):
    """One line for each run, also below another; what asked for the end only where it was asked."""

    async def main(run, input):
        await run.delegate("sleeping", 1)
        run.nursery.start_soon(trio.sleep_forever)
        await trio.sleep_forever()

    async with opened(main, sleeping, crashing) as runs:
        crashed, run = begin(runs, crashing), begin(runs, main)
        await trio.sleep(2)
        run.cancel("client_cancel", reason="enough")
        await run.done.wait()
        told = [facts for _, facts in reported(runs, ends=True)]
        below = next(one for one in runs if one.parent_id)
    assert [
        {
            "run_id": crashed.id,
            "agent": "crashing",
            "outcome": "error",
            "seconds": 0.0,
            "events": 6,
            "error": "crashed",
            "message": "the agent 'crashing' raised ValueError; the server's log has the details",
        },
        {
            "run_id": below.id,
            "agent": "sleeping",
            "outcome": "success",
            "seconds": 1.0,
            "events": 2,
        },
        {
            "run_id": run.id,
            "agent": "main",
            "outcome": "cancelled",
            "seconds": 2.0,
            "events": 4,
            "cause": "client_cancel",
            "teardown_s": 0,
            "tasks": 2,
            "reason": "enough",
        },
    ] == told


async def test_what_fails_in_the_timer_is_reported(autojump_clock):
    """It is nobody's run; operators are told where it was, and the runs go on."""

    def late():
        raise OSError("nobody's")

    async with opened(sleeping) as runs:
        runs.timer.call_at(trio.current_time() + 1, late)
        run = begin(runs, sleeping, 5)
        await runs.wait_idle()
        ((event, facts),) = reported(runs)
    assert ("crash", "the timer", "OSError") == (event, facts["where"], facts["error"])
    assert "nobody's" in facts["traceback"]
    assert FINE == ended(run)


async def test_a_report_that_fails_changes_nothing(autojump_clock):
    """Neither the run that it is told of, nor the others."""
    told = []

    def report(event, **facts):
        told.append(event)
        raise ValueError

    async with open_runs({"crashing": make(crashing)}, report=report) as runs:
        run = begin(runs, "crashing")
        await run.done.wait()
    assert ("error", None, "crashed") == ended(run)
    assert ["crash", "run_finished"] == told


async def test_the_receipt_counts_every_task_below_the_run(autojump_clock):
    """In nurseries of nurseries, and while the agent is still at work."""

    async def tree(depth):
        async with trio.open_nursery() as nursery:
            for _ in range(2 if depth else 0):
                nursery.start_soon(tree, depth - 1)
            await trio.sleep_forever()

    async def main(run, input):
        run.nursery.start_soon(trio.sleep_forever)
        try:
            await tree(2)
        finally:
            with run.cleanup():
                await trio.sleep(2)

    async with opened(main, forever) as runs:
        begin(runs, forever)
        run = begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel("client_cancel")
        await run.done.wait()
    receipt = run.end.receipt
    assert ("client_cancel", 2, 8, 0) == (
        receipt.cause,
        receipt.seconds,
        receipt.tasks,
        receipt.threads_abandoned,
    )


async def test_the_receipt_counts_threads_that_do_not_listen():
    """The run ends without them, when its cleanup time is over."""
    started, go = trio.Event(), threading.Event()

    @tool
    def deaf() -> None:
        trio.from_thread.run_sync(started.set)
        go.wait(SECONDS)

    async def main(run, input):
        await run.call(deaf, {})

    with trio.fail_after(SECONDS):
        async with opened(main, cleanup=0) as runs:
            run = begin(runs, main)
            await started.wait()
            run.cancel("client_cancel")
            await run.done.wait()
            go.set()
    assert (STOPPED, 1) == (ended(run), run.end.receipt.threads_abandoned)


async def test_a_thread_that_listens_is_joined():
    """The run ends after it, and owes nobody anything."""
    started, heard = trio.Event(), []

    @tool
    def attentive() -> None:
        trio.from_thread.run_sync(started.set)
        while not is_cancelled():
            threading.Event().wait(0.001)
        heard.append(True)

    async def main(run, input):
        await run.call(attentive, {})

    with trio.fail_after(SECONDS):
        async with opened(main, cleanup=SECONDS) as runs:
            run = begin(runs, main)
            await started.wait()
            run.cancel("client_cancel")
            await run.done.wait()
            assert [True] == heard
    assert (STOPPED, 0) == (ended(run), run.end.receipt.threads_abandoned)


async def test_a_run_that_shields_itself_is_named(autojump_clock):
    """A second after its cleanup time; its end waits for it all the same."""

    async def main(run, input):
        with trio.CancelScope(shield=True):
            await trio.sleep(100)

    async with opened(main, cleanup=5) as runs:
        run = begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        run.cancel("client_cancel")
        await trio.sleep(5.9)
        assert [] == reported(runs)
        await trio.sleep(0.2)
        ((event, facts),) = reported(runs)
        assert ("run_overdue", run.id, "main", "client_cancel", 1) == (
            event,
            facts["run_id"],
            facts["agent"],
            facts["cause"],
            facts["tasks"],
        )
        await run.done.wait()
    assert STOPPED == ended(run)
    assert 100 == run.end.receipt.seconds


async def test_a_snapshot_shows_what_has_been_said(autojump_clock):
    """Text alone, also of a run that was cancelled in the middle."""

    async def main(run, input):
        run.reasoning("hm")
        run.text("It ")
        run.emit("other")
        run.text("is")
        await trio.sleep_forever()

    async with opened(main) as runs:
        run = begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        assert ("It is", "running", None) == (
            run.snapshot().output,
            run.snapshot().state,
            run.snapshot().receipt,
        )
        run.cancel("client_cancel")
        assert "cancelling" == run.snapshot().state
        await run.done.wait()
    shown = run.snapshot()
    assert ("It is", "finished", run.end.receipt) == (shown.output, shown.state, shown.receipt)
    assert ["hm", "It is"] == [e.text for e in run.log.events if isinstance(e, PartFinished)]
    assert msgspec.json.encode(shown)


async def test_a_brief_snapshot_leaves_out_what_may_be_large(autojump_clock):
    """Where runs are listed, what was given and said is not there, not even as null."""

    async def main(run, input):
        run.text("It is")
        run.set_values(n=1)
        await trio.lowlevel.checkpoint()

    async with opened(main) as runs:
        run = begin(runs, main, "what?", metadata={"m": 1})
        await run.done.wait()
    whole, brief = (
        msgspec.json.decode(msgspec.json.encode(run.snapshot(brief=brief)))
        for brief in (False, True)
    )
    large = {"input": "what?", "metadata": {"m": 1}, "output": "It is", "values": {"n": 1}}
    assert whole == brief | large
    assert set() == set(brief) & set(large)


@pytest.fixture
def no_collector():
    """Have Python free only what nothing refers to any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def returning(run, input):
    run.text("said")
    await trio.lowlevel.checkpoint()


async def crashing(run, input):
    run.append(PartStarted(part_id="a", kind="text"))
    with run.step("crash"):
        await trio.lowlevel.checkpoint()
        raise ValueError("secret")


async def delegating(run, input):
    await run.delegate("returning", None)
    with pytest.raises(AgentError):
        await run.delegate("crashing", None)
    with trio.move_on_after(1):
        await run.delegate("forever", None)


async def working(run, input):
    for worker in ("returning", "crashing", "forever"):
        run.spawn(worker, None)
    await trio.sleep_forever()


async def conversing(run, input):
    run.set_values(input)
    run.host.pause("lunch")
    with trio.move_on_after(0.5):
        await run.rest_while_paused()
    run.resume()
    run.hear("a", "steer")
    run.hear("b", "follow_up")
    await run.next_message()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.ask, "How?")
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.5):
            await run.ask("Really?")
        run.answer_next("so")


@tool
async def nothing(*, well: bool) -> None:
    """Do nothing."""
    await trio.lowlevel.checkpoint()
    if not well:
        raise ValueError


async def calling(run, input):
    await run.call(nothing, {"well": True})
    with pytest.raises(ToolError):
        await run.call(nothing, {"well": False})
    with trio.move_on_after(1):
        await run.ask("How?")
    with run.cleanup():
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "main", [returning, crashing, delegating, working, calling, conversing, forever]
)
async def test_a_run_that_is_not_kept_is_freed_at_once(main, no_collector, autojump_clock):
    """Nothing in it, or in the runs below it, refers to itself, however it ended."""
    mains = (returning, crashing, forever, delegating, working, calling, conversing)
    async with opened(*mains, retain_runs=4) as runs:
        run = begin(runs, main, {"much": "x"}, metadata={"m": 1}, idempotency_key="k")
        reader = read(run)
        await trio.sleep(2)
        run.cancel("client_cancel")
        await run.done.wait()
        run.detach(reader, "finished")
        assert (None, None) == (run.context.input, run.context.metadata)
        assert b'{"much":"x"}' == bytes(run.snapshot().input)
        gone = [weakref.ref(one) for run in runs for one in (run, run.context)]
        assert (8 if main in (delegating, working) else 2) == len(gone)
        runs.report.seen.clear()
        del run, reader
        for _ in range(4):
            await begin(runs, returning).done.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert [None] * len(gone) == [one() for one in gone]


@pytest.mark.parametrize("main", [delegating, working])
@pytest.mark.parametrize("thread_id", [None, "t"])
async def test_a_child_run_does_not_keep_the_run_above(
    main, thread_id, no_collector, autojump_clock
):
    """Once it is over it knows the other one's id, and no more of it."""
    async with opened(main, returning, crashing, forever, retain_runs=4) as runs:
        run = begin(runs, main, thread_id=thread_id)
        await trio.sleep(2)
        children = [one for one in runs if one.parent_id]
        run.cancel("client_cancel")
        await run.done.wait()
        assert [run.id] * 3 == [child.parent_id for child in children]
        gone = [weakref.ref(run), weakref.ref(run.context)]
        runs.report.seen.clear()
        del run
        for _ in range(4):
            await begin(runs, returning).done.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert [None, None] == [one() for one in gone]
        assert {None} == {child.parent for child in children}
        assert {} == runs.threads


async def test_finished_runs_are_kept_within_a_count(autojump_clock):
    """The oldest goes first; a reader that still holds it reads on."""
    async with opened(sleeping, retain_runs=2) as runs:
        done = []
        for _ in range(3):
            done.append(begin(runs, sleeping, 1))
            reader = read(done[0])
            await done[-1].done.wait()
        assert done[:0:-1] == list(runs)
        with pytest.raises(NotFound):
            runs.find(done[0].id)
        assert done[0].log.events == all_of(reader)
        assert (2, 3) == (runs.statistics().retained, runs.statistics().finished["success"])


async def test_finished_runs_are_kept_within_bytes(autojump_clock):
    """But for the newest, which is kept whatever its size."""

    async def main(run, input):
        run.emit("much", x="x" * input)
        await trio.lowlevel.checkpoint()

    async with opened(main, retain_bytes=10_000) as runs:
        done = []
        for size, metadata, kept in (
            (4_000, None, 1),
            (100, "m" * 4_000, 2),
            (4_000, [1], 2),
            (20_000, None, 1),
        ):
            done.append(begin(runs, main, size, metadata=metadata))
            await done[-1].done.wait()
            assert done[: -kept - 1 : -1] == list(runs)
            held = sum(run.log.size + len(msgspec.json.encode(run.metadata)) for run in runs)
            assert held == runs.statistics().retained_bytes


async def test_finished_runs_are_kept_for_a_time(autojump_clock):
    """Each for as long from its own end; with the last one, nothing is left to wait for."""
    async with opened(sleeping, retain_age=60) as runs:
        first, second = begin(runs, sleeping, 1), begin(runs, sleeping, 20)
        await runs.wait_idle()
        await trio.sleep(40.5)
        assert [second, first] == list(runs)
        await trio.sleep(1)
        assert [second] == list(runs)
        await trio.sleep(20)
        assert [] == list(runs)
        third = begin(runs, sleeping, 1)
        await third.done.wait()
        await trio.sleep(59)
        assert [third] == list(runs)
        await trio.sleep(2)
        assert [] == list(runs)


async def test_closing_starts_nothing_and_ends_everything(autojump_clock):
    """Those that wait for a place are ended too, and a child with its parent."""

    async def main(run, input):
        await run.delegate("forever", None)

    async with opened(main, forever, max_running=1) as runs:
        await runs.wait_idle()
        first, second = begin(runs, main), begin(runs, main)
        await trio.testing.wait_all_tasks_blocked()
        (child,) = first.children
        runs.close()
        with pytest.raises(Overloaded, match="about to stop") as refused:
            begin(runs, main)
        assert 5 == refused.value.retry_after
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(runs.wait_idle)
        assert [] == runs.unfinished()
    assert [("cancelled", "shutdown", None)] * 2 == [ended(first), ended(second)]
    assert ("cancelled", "parent", None) == ended(child)


async def test_closing_lets_nobody_in(autojump_clock):
    """Those that wait go first: no place that becomes free is given away."""
    began = []

    async def note(run, input):
        began.append(input)
        await trio.sleep_forever()

    async with opened(make(note, max_running=1), max_running=2) as runs:
        waiting = [begin(runs, note, n) for n in range(5)]
        await trio.testing.wait_all_tasks_blocked()
        runs.close()
        assert [False, True, True, True, True] == [run.done.is_set() for run in waiting]
        await runs.wait_idle()
    assert [0] == began
    assert [("cancelled", "shutdown", None)] * 5 == [ended(run) for run in waiting]


async def test_closing_may_have_another_cause(autojump_clock):
    """Whoever closes says why."""
    async with opened(forever) as runs:
        run = begin(runs, forever)
        runs.close("deadline")
        await runs.wait_idle()
    assert ("cancelled", "deadline", None) == ended(run)


async def test_statistics_count_runs_events_and_how_long_ends_took(autojump_clock):
    """As of now, and since the beginning."""

    async def main(run, input):
        try:
            await trio.sleep_forever()
        finally:
            with run.cleanup():
                await trio.sleep(input)

    async with opened(main, sleeping, max_running=2) as runs:
        quick, slow, waiting = begin(runs, main, 0.3), begin(runs, main, 4), begin(runs, main, 0)
        await trio.testing.wait_all_tasks_blocked()
        now = runs.statistics()
        assert (1, 2, 0, 0, {}) == (
            now.queued,
            now.running,
            now.retained,
            now.retained_bytes,
            now.finished,
        )
        assert 2 == now.events
        for run in (waiting, quick, slow):
            run.cancel("client_cancel")
        await runs.wait_idle()
        await begin(runs, sleeping, 1).done.wait()
        then = runs.statistics()
    took = dict.fromkeys((*TEARDOWN_BUCKETS, math.inf), 0) | {0.001: 1, 0.5: 1, 5.0: 1}
    assert {"cancelled": 3, "success": 1} == then.finished
    assert (0, 0, 4, 8) == (then.queued, then.running, then.retained, then.events)
    assert tuple(took.values()) == then.teardowns
    assert 4.3 == then.teardown_seconds
    assert 0 <= then.loop_lag <= then.worst_loop_lag < 0.01


async def test_lag_is_measured_while_runs_are_open(autojump_clock):
    """Trio's loop is left as it was found."""
    async with opened(sleeping) as runs:
        await begin(runs, sleeping, 1).done.wait()
        assert 0 < runs.statistics().loop_lag <= runs.statistics().worst_loop_lag
    with pytest.raises(KeyError):
        trio.lowlevel.remove_instrument(runs.lag)


async def test_by_default_nothing_is_reported_anywhere(autojump_clock):
    """Limits, providers and reports may be left out."""

    async def main(run, input):
        await trio.lowlevel.checkpoint()
        raise ValueError

    async with open_runs({"main": make(main)}) as runs:
        run = begin(runs, "main")
        await run.done.wait()
    assert ("error", None, "crashed") == ended(run)


async def test_a_run_rests_with_all_below_it(autojump_clock):
    """Also with what is begun below it meanwhile; both go on together."""
    steps = []

    async def below(run, input):
        for number in range(2):
            await run.rest_while_paused()
            steps.append((input, number, trio.current_time()))
            await trio.sleep(2)

    async def above(run, input):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.delegate, "below", "early")
            await trio.sleep(1.5)
            nursery.start_soon(run.delegate, "below", "late")

    async with opened(above, below) as runs:
        run = begin(runs, above)
        await trio.sleep(1)
        run.pause("wait")
        await trio.sleep(9)
        assert [("early", 0, 0.0)] == steps
        assert {"paused"} == {child.state for child in run.children}
        run.resume()
        await run.done.wait()
    assert [("early", 1, 10.0), ("late", 0, 10.0)] == sorted(steps[1:3])


async def test_a_run_that_pauses_itself_pauses_nobody_else(autojump_clock):
    """What it begins meanwhile goes on: it would not be told when that is over."""

    async def below(run, input):
        await run.rest_while_paused()
        return trio.current_time()

    async def above(run, input):
        run.pause("a moment")
        began = await run.delegate("below", None)
        run.resume()
        return began

    async with opened(above, below) as runs:
        run = begin(runs, above)
        await run.done.wait()
    assert ("success", 0.0) == (run.end.outcome, run.result)


async def test_a_run_that_does_not_listen_is_told_so_much_and_no_more(autojump_clock):
    """By number and by size; what it is shown counts for nothing."""
    async with opened(forever) as runs:
        run, other = begin(runs, forever), begin(runs, forever)
        for _ in range(MAX_HEARD):
            run.context.hear("a", "steer")
        with pytest.raises(Overloaded, match=f"expected at most {MAX_HEARD} messages"):
            run.context.hear("a", "steer")
        other.context.hear("x" * MAX_UNHEARD, "steer", shown="")
        with pytest.raises(Overloaded, match=f"of {MAX_UNHEARD} characters"):
            other.context.hear("y", "steer")
        assert 1 == len(other.context.take_messages())
        other.context.hear("y", "steer")
