"""Threads: what is told when, who runs when somebody says something, and what stays behind.

The engine is the real one, without HTTP. Time is virtual: intervals pass when everybody waits.
"""

import gc
import math
import weakref
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain

import pytest
import trio
import trio.testing

from agentsse.agents import Agent
from agentsse.context import Limits
from agentsse.dialects import OpenThread, Request, SetTrigger, Start
from agentsse.dialects.native import NATIVE, decode_watch_feed
from agentsse.errors import BadRequest, Conflict, NotFound, Overloaded
from agentsse.events import (
    MessageReceived,
    Option,
    PartDelta,
    Question,
    TriggerChanged,
    decode_event,
    decode_json,
    encode_event,
)
from agentsse.feed import NOW
from agentsse.log import DELTAS
from agentsse.runs import open_runs
from agentsse.sse import Decoder
from agentsse.threads import MAX_OPEN, MAX_TRIGGERS, Threads, _see_text
from agentsse.tools import tool

SECONDS = 100_000  # of a clock that jumps: only what hangs gets there
STOPPED = ("cancelled", "client_cancel")
FINE = ("success", None)


async def forever(run, input):
    await trio.sleep_forever()


async def sleeping(run, input):
    await trio.sleep(input)


async def echo(run, input):
    await trio.lowlevel.checkpoint()
    return input


async def listening(run, input):
    """Say what is heard, until told to stop."""
    heard = [input]
    while heard[-1] != "stop":
        heard.append(await run.next_message())
    return heard


async def deaf(run, input):
    """Be busy for ten seconds, and never listen."""
    await trio.sleep(10)


async def asking(run, input):
    return await run.ask("How?")


async def choosing(run, input):
    options = (Option(id="a", label="Apple"), Option(id="b"))
    return await run.ask(Question(id="q", kind="choice", prompt="Which?", options=options))


async def stubborn(run, input):
    """Take three seconds to go."""
    try:
        await trio.sleep_forever()
    finally:
        with run.cleanup():
            await trio.sleep(3)  # noqa: ASYNC102  # that is what cleanup is for


async def talking(run, input):
    run.emit("first")
    for word in ("Hel", "lo"):
        run.text(word)
    await trio.lowlevel.checkpoint()


async def child(run, input):
    run.text("child")
    if input:
        await run.delegate("child", input - 1)
    run.emit("done", depth=input)
    await trio.lowlevel.checkpoint()


async def delegating(run, input):
    run.emit("before")
    await run.delegate("child", input)


@asynccontextmanager
async def opened(*functions, **limits):
    """Open threads for runs of these agents; deltas are not joined."""
    agents = [one if isinstance(one, Agent) else Agent(one.__name__, one) for one in functions]
    reports = []
    with trio.fail_after(SECONDS):
        async with open_runs(
            {one.name: one for one in agents},
            limits=Limits(**{"coalesce": 0} | limits),
            report=lambda event, **facts: reports.append((event, facts)),
        ) as runs:
            runs.report.seen = reports  # what contains a report is a function, and takes a note
            yield Threads(runs)


def start(threads, name, input=None, **order):
    """Start a run as a client does."""
    asked = Start(agent=name, input=input, delivery="background", **order)
    return threads.runs.start(asked, default="continue")[0]


def open_(threads, thread_id="t", agent=None, **order):
    return threads.open(OpenThread(thread_id=thread_id, agent=agent, **order), default=None)


def set_(threads, trigger_id="k", *, every=10, text="tick", **order):
    return threads.set_trigger(
        SetTrigger(thread_id="t", trigger_id=trigger_id, every=every, text=text, **order)
    )


def tag(event):
    return str(event.__struct_config__.tag)


def types(source):
    """The types of a run's events, or of those that a feed holds."""
    return [tag(event) for event in getattr(source, "log", source).events]


def ended(run):
    return run.end.outcome, run.end.receipt.cause


def messages(run):
    """What the run's log says that people have said."""
    return [e.text for e in run.log.events if isinstance(e, MessageReceived)]


def changes(feed):
    """What has become of triggers."""
    return [e.change for e in feed.events if isinstance(e, TriggerChanged)]


def read(feed, after=None, **query):
    """Read a feed in the native dialect."""
    options = decode_watch_feed(Request("GET", {}, query, {})).options
    return feed.attach(("native", options), partial(NATIVE.feed.encoder, options), after)


def taken(reader):
    """The events that a reader gets now."""
    whole = b""
    while piece := reader.take():
        whole += piece
    return [decode_event(frame.data) for frame in Decoder().feed(whole)]


def reported(threads, event):
    """What operators were told."""
    return [facts for name, facts in threads.runs.report.seen if name == event]


async def until(run, state):
    """Wait until a run stands somewhere."""
    await trio.testing.wait_all_tasks_blocked()
    assert state == run.state


# A thread comes with the first thing that is in it, and goes with the last


async def test_a_thread_is_there_as_long_as_a_run_of_it_is_kept(autojump_clock):
    """It comes with its first run; who asks for another one is told what to ask for."""
    async with opened(sleeping, retain_age=100) as threads:
        with pytest.raises(NotFound, match="id of a thread that is open or has runs, got 't'"):
            threads.find("t")
        run = start(threads, "sleeping", 1, thread_id="t")
        thread = threads.find("t")
        assert (thread, [run], [], run) == (run.home, thread.active, thread.kept, thread.run)
        await run.done.wait()
        assert (thread, [], [run], run) == (
            threads.find("t"),
            thread.active,
            thread.kept,
            thread.run,
        )
        await trio.sleep(50)
        second = start(threads, "sleeping", 1, thread_id="t")
        await trio.sleep(60)
        assert [second] == threads.find("t").kept
        await trio.sleep(60)
        assert [] == list(threads)
        with pytest.raises(NotFound, match=r"got 'x{80}'$"):
            threads.find("x" * 100)


async def test_an_empty_id_is_a_thread_and_none_is_none(autojump_clock):
    """Runs without one have nothing to do with each other."""
    async with opened(forever) as threads:
        run = start(threads, "forever", thread_id="")
        assert [run] == threads.find("").active
        with pytest.raises(Conflict, match="the thread '' is busy"):
            start(threads, "forever", thread_id="")
        others = [start(threads, "forever") for _ in range(2)]
        assert [None, None] == [other.home for other in others]
        assert {""} == set(threads.runs.threads)
        assert ["running"] * 2 == [other.state for other in others]


async def test_a_run_may_begin_a_thread_of_its_own(autojump_clock):
    """Its id is the run's."""
    async with opened(echo) as threads:
        run = start(threads, "echo", makes_thread=True)
        other = start(threads, "echo", makes_thread=True, thread_id="t")
        assert [run.id, "t"] == [run.home.id, other.home.id]
        await threads.runs.wait_idle()


async def test_threads_are_listed_the_newest_first(autojump_clock):
    """Whether they were opened or have come by themselves."""
    async with opened(echo) as threads:
        open_(threads, "a")
        start(threads, "echo", thread_id="b")
        open_(threads, "c")
        assert ["c", "b", "a"] == [thread.id for thread in threads]
        await threads.runs.wait_idle()
        open_(threads, "b")
        assert ["c", "b", "a"] == [thread.id for thread in threads]


@pytest.mark.parametrize("kind", ["worker", "run"])
async def test_a_thread_stays_for_the_last_thing_in_it(autojump_clock, kind):
    """A child run that is still kept is one; so is its parent."""
    async with opened(delegating, child, echo, retain_runs=3) as threads:
        parent = start(threads, "delegating", 0, thread_id="t")
        await parent.done.wait()
        [worker] = parent.home.workers
        assert ([parent], [worker]) == (parent.home.kept, parent.home.workers)
        for count in range(2):
            await start(threads, "echo").done.wait()
            assert ("t" in threads.runs.threads, count) == (True, count)
        if kind == "worker":  # it was over first, so it goes first
            assert ([parent], []) == (parent.home.kept, parent.home.workers)
        await start(threads, "echo").done.wait()
        assert {} == threads.runs.threads


async def test_nothing_is_left_of_many_threads(autojump_clock):
    """Neither threads, feeds, readers nor due times: only what is kept of the last runs."""
    async with opened(delegating, child, retain_runs=4, max_running=50) as threads:
        seen = []
        for number in range(100):
            run = start(threads, "delegating", 1, thread_id=f"{number}")
            reader = read(run.home.feed)
            run.home.holders.add(reader)
            seen.append((weakref.ref(run.home), weakref.ref(run.home.feed), weakref.ref(run)))
            if number % 2:
                open_(threads, f"{number}")
                threads.set_trigger(
                    SetTrigger(thread_id=f"{number}", trigger_id="k", every=1e6, text="x")
                )
            await run.done.wait()
            run.home.feed.detach(reader)
            run.home.holders.discard(reader)
            threads.runs.drop_thread(run.home)
            if number % 2:
                await threads.close(f"{number}")
        del run, reader
        await trio.lowlevel.checkpoint()
        assert (4, {}) == (len(threads.runs._kept), threads._opened)
        assert len(threads.runs.threads) <= 4
        gc.collect()
        assert 2 >= sum(thread() is not None for thread, _, _ in seen)
        assert 2 >= sum(feed() is not None for _, feed, _ in seen)
        assert 2 >= sum(run() is not None for _, _, run in seen)
        await trio.sleep(4_000)
        assert ({}, 0) == (threads.runs.threads, len(threads.runs._kept))
        assert [] == [due for *_, due in threads.runs.timer._heap if due.function is not None]


# What is told


async def test_a_thread_s_feed_tells_of_all_its_runs(autojump_clock):
    """The events of their logs, the same objects, as they come; deltas too; of no other thread."""
    async with opened(talking) as threads:
        first = start(threads, "talking", thread_id="t")
        second = start(threads, "talking", thread_id="t", if_busy="enqueue")
        other = start(threads, "talking", thread_id="u")
        start(threads, "talking")
        await threads.runs.wait_idle()
        feed = first.home.feed
        assert all(
            told is logged
            for told, logged in zip(
                feed.events, [*first.log.events, *second.log.events], strict=True
            )
        )
        assert 2 * ["Hel", "lo"] == [e.delta for e in feed.events if isinstance(e, PartDelta)]
        assert tuple(other.log.events) == other.home.feed.events
        assert first.log.size + second.log.size == feed._size


async def test_the_server_s_feed_remembers_from_its_first_reader_on(autojump_clock):
    """And from then on, whether it is read or not; it begins with what comes after that."""
    async with opened(talking) as threads:
        await start(threads, "talking", thread_id="t").done.wait()
        feed = threads.runs.feed
        assert (0, False) == (feed.last, feed.is_used)
        feed.detach(read(feed, NOW))
        assert (0, True) == (feed.last, feed.is_used)
        run = start(threads, "talking")
        await run.done.wait()
        assert [e for e in run.log.events if type(e) not in DELTAS] == list(feed.events)
        assert [] == taken(read(feed, NOW))
        assert types(feed) == [tag(event) for event in taken(read(feed, feed.id_of(0)))]


async def test_the_server_s_feed_tells_of_every_run_and_of_no_delta(autojump_clock):
    """Of threads, of runs without one, and of child runs, in the order in which it happened."""
    async with opened(delegating, child, talking) as threads:
        reader = read(threads.runs.feed, watch="*")
        runs = [
            start(threads, "delegating", 1, thread_id="t"),
            start(threads, "talking", thread_id="u"),
            start(threads, "talking"),
        ]
        await threads.runs.wait_idle()
        told = taken(reader)
        expected = [e for run in threads.runs for e in run.log.events if type(e) not in DELTAS]
        assert Counter(map(encode_event, expected)) == Counter(map(encode_event, told))
        assert {*(run.id for run in runs), *(w.id for w in runs[0].home.workers)} == {
            event.run_id for event in told
        }
        for run in threads.runs:
            numbers = [event.seq for event in told if event.run_id == run.id]
            assert sorted(numbers) == numbers


async def test_what_a_child_run_says_has_a_path(autojump_clock):
    """Also below another one: each level adds whom it has called, and how many before."""
    async with opened(delegating, child) as threads:
        parent = start(threads, "delegating", 2, thread_id="t")
        await parent.done.wait()
        workers = {worker.log.path: worker for worker in parent.home.workers}
        paths = [("child:1",), ("child:1", "child:1"), ("child:1", "child:1", "child:1")]
        assert paths == sorted(workers)
        for path, worker in workers.items():
            assert {path} == {event.path for event in worker.log.events}
            assert (parent.home, None) == (worker.home, worker.thread_id)
            assert set(map(id, worker.log.events)) <= set(map(id, parent.home.feed.events))
        assert {()} == {event.path for event in parent.log.events}
        assert [parent.id] == list(threads.snapshot(parent.home).runs)
        assert {w.id for w in workers.values()} == {
            w.id for w in threads.snapshot(parent.home).workers
        }


async def test_the_second_child_run_has_another_path(autojump_clock):
    """Two of one agent can be told apart, also where they run side by side."""

    async def twice(run, input):
        run.spawn("child", 0)
        run.spawn("child", 0)
        await run.delegate("echo", 0)

    async with opened(twice, child, echo) as threads:
        run = start(threads, "twice", thread_id="t")
        await run.done.wait()
        assert {"child:1", "child:2", "echo:3"} == {
            worker.log.path[0] for worker in run.home.workers
        }


async def test_a_child_run_without_a_thread_has_a_path_too(autojump_clock):
    """It is told of in the server's feed alone."""
    async with opened(delegating, child) as threads:
        reader = read(threads.runs.feed, watch="*")
        await start(threads, "delegating", 0).done.wait()
        assert {(), ("child:1",)} == {event.path for event in taken(reader)}
        assert {} == threads.runs.threads


async def test_readers_of_one_feed_see_what_they_have_asked_for(autojump_clock):
    """Of child runs the beginning and the end, unless they watch them; of types those they name."""
    async with opened(delegating, child) as threads:
        thread = open_(threads)
        plain, all_of = read(thread.feed), read(thread.feed, watch="*")
        ends = read(thread.feed, types="run_finished,custom")
        run = start(threads, "delegating", 0, thread_id="t")
        await run.done.wait()
        [worker] = thread.workers
        mine = read(thread.feed, watch=f"x, {worker.id} ")

        below = [tag(e) for e in taken(plain) if e.path]
        assert ["run_started", "run_finished"] == below
        assert (
            types(worker)
            == [tag(e) for e in taken(all_of) if e.path]
            == [tag(e) for e in taken(mine) if e.path]
        )
        assert [("custom", ()), ("run_finished", ("child:1",)), ("run_finished", ())] == [
            (tag(e), e.path) for e in taken(ends)
        ]


# How a thread stands


async def test_a_thread_is_shown_as_it_stands(autojump_clock):
    """Its run, what it does, who works below it, and what has happened last."""
    async with opened(delegating, child, sleeping) as threads:
        thread = open_(threads, agent="sleeping", metadata={"m": 1})
        idle = threads.snapshot(thread)
        assert ("t", "sleeping", "idle", None, (), (), (), (), None, None, True, {"m": 1}) == (
            *(idle.id, idle.agent, idle.state, idle.run, idle.runs, idle.workers, idle.tools),
            *(idle.triggers, idle.last_event_id, idle.last_event_at, idle.is_open),
            decode_json(idle.metadata),
        )
        first = start(threads, "delegating", 0, thread_id="t")
        await first.done.wait()
        second = start(threads, "sleeping", 5, thread_id="t")
        third = start(threads, "sleeping", 5, thread_id="t", if_busy="enqueue")
        shown = threads.snapshot(thread)
        assert ("running", second.id, (first.id, second.id, third.id)) == (
            shown.state,
            shown.run.id,
            shown.runs,
        )
        assert [("finished", first.id)] == [(w.state, w.parent_run_id) for w in shown.workers]
        assert (thread.feed.id_of(thread.feed.last), thread.feed.events[-1].ts) == (
            shown.last_event_id,
            shown.last_event_at,
        )
        await third.done.wait()
        assert ("idle", third.id) == (
            threads.snapshot(thread).state,
            threads.snapshot(thread).run.id,
        )


async def test_a_thread_shows_the_tools_at_work(autojump_clock):
    """Of its current run, until each has answered."""

    @tool
    async def slow() -> None:
        """Take long."""
        await trio.sleep(5)

    async def working(run, input):
        await run.call(slow, {})
        await trio.sleep(5)

    async with opened(working) as threads:
        run = start(threads, "working", thread_id="t")
        await trio.sleep(1)
        assert ["slow"] == [t.name for t in threads.snapshot(run.home).tools]
        await trio.sleep(6)
        assert () == threads.snapshot(run.home).tools
        assert (False, b"null") == (
            threads.snapshot(run.home).is_open,
            bytes(threads.snapshot(run.home).metadata),
        )
        await run.done.wait()


async def test_a_thread_s_state_is_that_of_its_run(autojump_clock):
    """Whatever its run does, the thread does."""

    async def busy(run, input):
        await run.ask("?")
        run.pause("tea")
        await run.rest_while_paused()
        await stubborn(run, input)

    async with opened(busy, forever, max_running=1) as threads:
        other = start(threads, "forever")
        run = start(threads, "busy", thread_id="t")
        seen = [threads.snapshot(run.home).state]
        other.cancel("client_cancel")
        await trio.sleep(1)
        seen.append(threads.snapshot(run.home).state)
        run.context.answer_next("so")
        await trio.sleep(1)
        seen.append(threads.snapshot(run.home).state)
        run.context.resume()
        await trio.sleep(1)
        seen.append(threads.snapshot(run.home).state)
        run.cancel("client_cancel")
        seen.append(threads.snapshot(run.home).state)
        await run.done.wait()
        seen.append(threads.snapshot(run.home).state)
        assert ["queued", "waiting", "paused", "running", "cancelling", "idle"] == seen


async def test_the_run_that_goes_on_is_shown_though_another_waits_before_it(autojump_clock):
    """There was room for the second one's agent first: it is the one that the thread is about."""
    shy = Agent("shy", forever, max_running=1)
    async with opened(shy, forever) as threads:
        start(threads, "shy")
        waiting = start(threads, "shy", thread_id="t")
        run = start(threads, "forever", thread_id="t", if_busy="enqueue")
        assert ("queued", "running", run) == (waiting.state, run.state, threads.find_run("t"))
        shown = threads.snapshot(run.home)
        assert (run.id, "running") == (shown.run.id, shown.state)


async def test_a_run_that_has_not_begun_cannot_be_told_anything(autojump_clock):
    """Its log begins with its beginning; a thread that is told begins another run behind it."""
    async with opened(echo, forever, max_running=1) as threads:
        other = start(threads, "forever")
        run = start(threads, "echo", thread_id="t")
        with pytest.raises(Conflict, match="still waits for its turn"):
            run.context.hear("x", "steer")
        assert run is not threads.tell(run.home, "x")
        other.cancel("client_cancel")
        await run.done.wait()
        assert ["run_started", "run_finished"] == types(run)


async def test_the_run_that_goes_on_is_found(autojump_clock):
    """By its thread; where there is none, or nothing goes on in it, the error says which."""
    async with opened(sleeping, forever) as threads:
        with pytest.raises(NotFound, match="id of a thread"):
            threads.find_run("t")
        run = start(threads, "sleeping", 1, thread_id="t")
        queued = start(threads, "forever", thread_id="t", if_busy="enqueue")
        assert run is threads.find_run("t")
        run.cancel("client_cancel")
        assert run is threads.find_run("t")
        await run.done.wait()
        assert queued is threads.find_run("t")
        queued.cancel("client_cancel")
        await queued.done.wait()
        with pytest.raises(Conflict, match="expected a run that goes on in the thread 't', got no"):
            threads.find_run("t")


# Something is said to a thread


async def test_a_thread_that_is_idle_begins_a_run(autojump_clock):
    """Its input is what was said, and its first words are what is shown of that."""
    async with opened(forever, echo) as threads:
        thread = open_(threads, agent="echo")
        run = threads.tell(thread, "hello", default="forever")
        assert ("running", [run], "continue") == (run.state, thread.active, str(run.policy))
        await run.done.wait()
        again = threads.tell(thread, "secret", shown="shown")
        await again.done.wait()
        assert ["run_started", "message_received", "run_finished"] == types(run)
        assert [("hello", ["hello"]), ("secret", ["shown"])] == [
            (each.result, messages(each)) for each in (run, again)
        ]
        assert 2 * ["run_started", "message_received", "run_finished"] == types(thread.feed)


async def test_an_empty_text_may_be_shown(autojump_clock):
    """Nothing is not the same as not saying."""
    async with opened(echo) as threads:
        run = threads.tell(open_(threads), "secret", shown="")
        await run.done.wait()
        assert [""] == messages(run)


async def test_who_runs_in_a_thread(autojump_clock):
    """Its own agent; else that of its last run; else the one named; else the server's first."""
    async with opened(forever, echo, talking, sleeping) as threads:
        own = open_(threads, "own", agent="echo")
        await start(threads, "talking", thread_id="own").done.wait()
        last = start(threads, "talking", thread_id="last").home
        await last.run.done.wait()
        nobody = threads.runs.open_thread("nobody")
        for thread, default, expected in (
            (own, "sleeping", "echo"),
            (last, "sleeping", "talking"),
            (nobody, "sleeping", "sleeping"),
            (threads.runs.open_thread("first"), None, "forever"),
        ):
            assert expected == threads.snapshot(thread, default=default).agent
            assert expected == threads.tell(thread, "0", default=default).agent.name


async def test_who_is_nobody_cannot_be_told_anything(autojump_clock):
    """The error names those there are; the thread holds nothing."""
    async with opened(echo) as threads:
        thread = threads.runs.open_thread("t")
        with pytest.raises(NotFound, match="expected one of the agents echo, got 'nobody'"):
            threads.tell(thread, "x", default="nobody")
        threads.runs.drop_thread(thread)
        assert {} == threads.runs.threads


@pytest.mark.parametrize("mode", ["steer", "follow_up"])
async def test_a_run_that_goes_on_hears(autojump_clock, mode):
    """In the mode that was asked for; what is shown may be something else."""
    async with opened(listening) as threads:
        run = start(threads, "listening", "start", thread_id="t")
        await until(run, "running")
        assert run is threads.tell(run.home, "one", mode=mode)
        assert run is threads.tell(run.home, "stop", mode=mode, shown="please")
        await run.done.wait()
        assert ["start", "one", "stop"] == run.result
        assert [(mode, "one"), (mode, "please")] == [
            (e.mode, e.text) for e in run.log.events if isinstance(e, MessageReceived)
        ]


async def test_what_is_said_to_a_run_that_waits_is_the_answer(autojump_clock):
    """Unless it is said not to be; text that does not fit is refused, and it waits on."""
    async with opened(choosing) as threads:
        run = start(threads, "choosing", thread_id="t")
        await until(run, "waiting")
        with pytest.raises(BadRequest, match="expected one of a, b for 'q', got 'c'"):
            threads.tell(run.home, "c")
        assert run is threads.tell(run.home, "by the way", may_answer=False)
        assert (["by the way"], "waiting") == (messages(run), run.state)
        assert run is threads.tell(run.home, "apple")
        await run.done.wait()
        assert "a" == run.result
        [following] = threads.find("t").active  # it had not listened
        await following.done.wait()


async def test_what_is_said_may_answer_several_questions(autojump_clock):
    """By their ids, as far as it does; one text is no answer to two questions, but is to one."""

    async def curious(run, input):
        texts = [Question(id=name, kind="text", prompt="?") for name in "ab"]
        return [await run.ask(texts), await run.ask("?")]

    async with opened(curious) as threads:
        run = start(threads, "curious", thread_id="t")
        await until(run, "waiting")
        with pytest.raises(BadRequest, match="expected answers to a, b, as an object or as lines"):
            threads.tell(run.home, "both")
        with pytest.raises(BadRequest, match="expected answers to a, b, as an object or as lines"):
            threads.tell(run.home, "a: x\nc: y")
        threads.tell(run.home, "a: x")
        await until(run, "waiting")
        threads.tell(run.home, "b: y")
        await until(run, "waiting")
        threads.tell(run.home, "text")
        await run.done.wait()
        assert [{"a": "x", "b": "y"}, "text"] == run.result


async def test_a_run_that_rests_hears_when_it_goes_on(autojump_clock):
    """Nothing is lost meanwhile, and it does not wake up by it."""

    async def resting(run, input):
        run.pause()
        await run.rest_while_paused()
        return run.take_messages()

    async with opened(resting) as threads:
        run = start(threads, "resting", thread_id="t")
        await until(run, "paused")
        assert run is threads.tell(run.home, "one")
        await trio.sleep(100)
        assert "paused" == run.state
        run.context.resume()
        await run.done.wait()
        assert (["one"], [run]) == (run.result, run.home.kept)


async def test_a_run_that_is_being_cancelled_is_not_told(autojump_clock):
    """A new one waits until it is gone, and hears it."""
    async with opened(stubborn) as threads:
        run = start(threads, "stubborn", thread_id="t")
        await until(run, "running")
        run.cancel("client_cancel")
        second = threads.tell(run.home, "one")
        assert ("cancelling", "queued", []) == (run.state, second.state, messages(run))
        await run.done.wait()
        assert ("running", ["one"]) == (second.state, messages(second))
        assert second is threads.tell(run.home, "two")


async def test_a_run_that_waits_for_its_turn_is_followed_by_another(autojump_clock):
    """Nothing is said to what has not begun; each begins in its turn."""
    async with opened(echo, sleeping, max_running=1) as threads:
        thread = open_(threads)
        start(threads, "sleeping", 10)
        runs = [threads.tell(thread, text) for text in ("one", "two")]
        assert ["queued", "queued"] == [run.state for run in runs]
        await threads.runs.wait_idle()
        assert ["one", "two"] == [run.result for run in runs]
        assert runs == thread.kept


async def test_where_there_is_no_room_nothing_is_begun(autojump_clock):
    """The error goes to whoever has said it; the thread is none the worse."""
    async with opened(forever, max_running=1, max_queued=1) as threads:
        thread = open_(threads)
        start(threads, "forever")
        start(threads, "forever")
        with pytest.raises(Overloaded, match="all places are taken"):
            threads.tell(thread, "x")
        assert ([], None, 0) == (thread.active, thread.run, thread.feed.last)


async def test_halves_of_surrogates_harm_nobody(autojump_clock):
    """What goes on hears something readable; what JSON cannot hold begins nothing."""
    async with opened(listening) as threads:
        run = start(threads, "listening", "start", thread_id="t")
        threads.tell(run.home, "half \ud800")
        assert ["half \ufffd"] == messages(run)
        with pytest.raises(BadRequest, match="surrogate"):
            threads.tell(open_(threads, "u"), "half \ud800")
        open_(threads, "t")
        set_(threads, text="half \ud800", name="\udfff")
        [trigger] = threads.snapshot(run.home).triggers
        assert ("half \ufffd", "\ufffd") == (trigger.text, trigger.name)


# Something is said just before a run ends


@pytest.mark.parametrize("mode", ["steer", "follow_up"])
async def test_what_a_run_has_not_heard_begins_another(autojump_clock, mode):
    """Exactly once, with what was said; it is not shown again."""
    async with opened(deaf) as threads:
        run = start(threads, "deaf", thread_id="t")
        await trio.sleep(9)
        assert run is threads.tell(run.home, "late", mode=mode, shown="shown")
        await run.done.wait()
        [following] = run.home.active
        assert (["shown"], []) == (messages(run), messages(following))
        assert (b'"late"', "deaf", "continue") == (
            bytes(following.input),
            following.agent.name,
            str(following.policy),
        )
        await trio.sleep(100)
        assert [run, following] == run.home.kept
        assert 2 == len(list(threads.runs))


async def test_each_thing_that_was_not_heard_begins_a_run(autojump_clock):
    """In their order, behind what was waiting already."""
    async with opened(deaf) as threads:
        run = start(threads, "deaf", thread_id="t")
        queued = start(threads, "deaf", "first", thread_id="t", if_busy="enqueue")
        for text in ("second", "third"):
            threads.tell(run.home, text)
        await threads.runs.wait_idle()
        assert [None, "first", "second", "third"] == [
            decode_json(each.input) for each in run.home.kept
        ]
        assert queued is run.home.kept[1]


async def test_a_run_that_fails_is_followed_as_well(autojump_clock):
    """Its error is no answer."""

    async def failing(run, input):
        await trio.sleep(1)
        raise ValueError

    async with opened(failing, echo) as threads:
        run = start(threads, "failing", thread_id="t")
        threads.tell(run.home, "late")
        await run.done.wait()
        [following] = run.home.active
        await following.done.wait()
        assert ["error", "error"] == [run.end.outcome, following.end.outcome]
        assert [b'"late"'] == [bytes(following.input)]


async def test_what_was_said_in_the_last_moment_is_not_lost(autojump_clock):
    """The agent has returned, and something of its run still goes on."""

    async def lingering(run, input):
        run.nursery.start_soon(trio.sleep, 5)
        return await echo(run, input)

    async with opened(lingering) as threads:
        run = start(threads, "lingering", thread_id="t")
        await trio.sleep(1)
        assert (True, "running") == (run._returned, run.state)
        threads.tell(run.home, "late")
        await threads.runs.wait_idle()
        assert [None, "late"] == [each.result for each in run.home.kept]


@pytest.mark.parametrize("cause", ["client_cancel", "parent", "shutdown"])
async def test_a_cancel_means_that_nothing_follows(autojump_clock, cause):
    """Whoever cancelled wanted silence."""
    async with opened(forever) as threads:
        run = start(threads, "forever", thread_id="t")
        threads.tell(run.home, "late")
        run.cancel(cause)
        await run.done.wait()
        await trio.sleep(100)
        assert [run] == list(threads.runs)


async def test_time_that_is_up_takes_nothing_back(autojump_clock):
    """What was said to a run that took too long begins another, with a time of its own."""
    async with opened(forever) as threads:
        run = start(threads, "forever", thread_id="t", timeout=10)
        threads.tell(run.home, "late")
        await run.done.wait()
        [following] = run.home.active
        assert ("deadline", b'"late"') == (run.end.receipt.cause, bytes(following.input))
        await trio.sleep(100)
        assert [following] == run.home.active


async def test_a_run_without_a_thread_is_not_followed(autojump_clock):
    """There is nothing that it would go on with; the same of a child run."""

    async def parent(run, input):
        await run.delegate("deaf", None)

    async with opened(deaf, parent) as threads:
        alone = start(threads, "deaf")
        above = start(threads, "parent", thread_id="t")
        await trio.sleep(1)
        alone.context.hear("late", "steer")
        above.home.workers[0].context.hear("late", "steer")
        await threads.runs.wait_idle()
        assert 3 == len(list(threads.runs))


async def test_a_run_that_nobody_keeps_is_followed_all_the_same(autojump_clock):
    """Its thread has gone with it, and comes again."""
    async with opened(deaf, retain_age=0) as threads:
        run = start(threads, "deaf", "first", thread_id="t")
        threads.tell(run.home, "late")
        await run.done.wait()
        [following] = threads.find("t").active
        assert b'"late"' == bytes(following.input)
        await following.done.wait()
        assert {} == threads.runs.threads


async def test_what_cannot_be_begun_is_reported(autojump_clock):
    """Nobody waits for an answer any more; operators learn of it, and nothing else ends."""
    async with opened(deaf) as threads:
        run = start(threads, "deaf", thread_id="t")
        threads.tell(run.home, "late")
        threads.runs.refuse()
        await run.done.wait()
        [lost] = reported(threads, "message_lost")
        assert (run.id, "t") == (lost["run_id"], lost["thread_id"])
        assert "about to stop" in lost["error"]
        assert FINE == ended(run)


# Opening


async def test_a_thread_that_was_opened_stays(autojump_clock):
    """Without runs, and after all of them; it may be the one that runs had made before."""
    async with opened(echo, retain_age=1) as threads:
        run = start(threads, "echo", thread_id="t")
        assert run.home is open_(threads)
        made = threads.open(OpenThread(), default="echo")
        assert (32, "echo") == (len(made.id), threads.snapshot(made).agent)
        await trio.sleep(1_000)
        assert ([], [run.home, made]) == (run.home.kept, list(threads.runs.threads.values()))


async def test_a_thread_is_opened_once(autojump_clock):
    """Unless whoever asks is content with one that is there; then it stays as it was."""
    async with opened(echo, forever) as threads:
        thread = open_(threads, metadata=1)
        with pytest.raises(Conflict, match="id of a new thread, got 't', which is open"):
            open_(threads)
        assert thread is open_(threads, agent="forever", metadata=2, is_shared=True)
        shown = threads.snapshot(thread)
        assert ("echo", b"1") == (shown.agent, bytes(shown.metadata))


@pytest.mark.parametrize("name", ["", "a/b", "\n", "\ud800", "x" * 201, "\x00", "\u2028"])
async def test_a_thread_has_a_name_that_fits_into_a_path(autojump_clock, name):
    """The same is expected of a trigger's; nothing is opened."""
    async with opened(echo) as threads:
        if name:  # without one it is given one
            with pytest.raises(BadRequest, match="the thread's id: expected 1 to 200 printable"):
                open_(threads, name)
            assert {} == threads.runs.threads
        open_(threads)
        with pytest.raises(BadRequest, match="the trigger's id: expected 1 to 200 printable"):
            set_(threads, name)
        assert () == threads.snapshot(threads.find("t")).triggers


async def test_an_agent_that_there_is_not_opens_nothing(autojump_clock):
    """Neither does one that is merely the default; an agent is also found by its model."""
    scripted = Agent("ann", echo, model="scripted:x")
    async with opened(scripted) as threads:
        with pytest.raises(NotFound, match="expected one of the agents ann, got 'nobody'"):
            open_(threads, agent="nobody")
        with pytest.raises(NotFound, match="got 'no one'"):
            threads.open(OpenThread(thread_id="t"), default="no one")
        assert {} == threads.runs.threads
        assert "ann" == threads.snapshot(open_(threads, agent="scripted:x")).agent


async def test_so_many_threads_are_open_and_no_more(autojump_clock):
    """A thread that is there can be asked for again; closing one makes room."""
    async with opened(echo) as threads:
        for number in range(MAX_OPEN):
            open_(threads, f"{number}")
        with pytest.raises(Overloaded, match=f"at most {MAX_OPEN} open threads; close one"):
            open_(threads, "new")
        assert "5" == open_(threads, "5", is_shared=True).id
        assert MAX_OPEN == len(threads.runs.threads)
        await threads.close("7")
        assert "new" == open_(threads, "new").id


async def test_a_thread_that_need_not_last_makes_room_for_a_new_one(autojump_clock):
    """The oldest in which nothing goes on, that nobody reads, and that has no triggers."""
    async with opened(forever, echo) as threads:
        names = ("triggered", "running", "read", "over", "idle")
        for name in names:
            open_(threads, name, lasts=False)
        threads.set_trigger(
            SetTrigger(thread_id="triggered", trigger_id="k", every=1e6, text="tick")
        )
        start(threads, "forever", thread_id="running")
        await start(threads, "echo", thread_id="over").done.wait()
        threads.find("read").holders.add(reader := object())
        for number in range(MAX_OPEN - len(names)):
            open_(threads, f"t{number}")
        open_(threads, "one more")
        assert not threads.snapshot(threads.find("over")).is_open  # its run is kept, and so is it
        open_(threads, "and one more")
        with pytest.raises(NotFound):
            threads.find("idle")
        with pytest.raises(Overloaded, match=f"at most {MAX_OPEN} open threads"):
            open_(threads, "one too many")
        threads.find("read").holders.discard(reader)
        open_(threads, "the last one")


async def test_a_server_that_stops_opens_nothing(autojump_clock):
    """It says so, and when to come back."""
    async with opened(echo) as threads:
        threads.runs.refuse()
        with pytest.raises(Overloaded, match="about to stop; try again when it is back") as caught:
            open_(threads)
        assert (5, {}) == (caught.value.retry_after, threads.runs.threads)


# Closing


async def test_closing_cancels_waits_and_forgets(autojump_clock):
    """What waits in the queue never begins; runs stay as long as others, their thread does not."""
    async with opened(stubborn, echo) as threads:
        thread = open_(threads, agent="echo")
        before = start(threads, "echo", thread_id="t")
        await before.done.wait()
        run = start(threads, "stubborn", thread_id="t")
        queued = [start(threads, "echo", thread_id="t", if_busy="enqueue") for _ in range(2)]
        await until(run, "running")
        began = trio.current_time()
        assert thread is await threads.close("t")
        assert began + 3 == pytest.approx(trio.current_time())
        assert {STOPPED} == {ended(each) for each in (run, *queued)}
        assert {"the thread was closed"} == {
            facts["reason"]
            for facts in reported(threads, "run_finished")
            if facts["run_id"] != before.id
        }
        assert [["run_started", "run_finished"]] * 2 == [types(each) for each in queued]
        assert ({}, {}) == (threads.runs.threads, threads._opened)
        assert run is threads.runs.find(run.id)
        assert ([], [before, *reversed(queued), run]) == (thread.active, thread.kept)
        with pytest.raises(NotFound, match="id of a thread"):
            await threads.close("t")
        assert "idle" == threads.snapshot(thread).state


async def test_a_thread_that_nobody_has_opened_can_be_closed(autojump_clock):
    """What is kept of its runs goes in its own time, and takes nothing of a new thread with it."""
    async with opened(echo, forever, retain_age=100) as threads:
        old = start(threads, "echo", thread_id="t")
        await old.done.wait()
        await threads.close("t")
        assert {} == threads.runs.threads
        await trio.sleep(50)
        new = start(threads, "forever", thread_id="t")
        assert (True, ()) == (new.home is not old.home, new.context.history)
        await trio.sleep(60)
        assert [new] == threads.find("t").active
        with pytest.raises(NotFound):
            threads.runs.find(old.id)


async def test_what_is_said_while_a_thread_is_closed_begins_another(autojump_clock):
    """Of the same name, and it stays; what is closed hears nothing any more."""
    async with opened(stubborn, echo) as threads:
        thread = open_(threads)
        run = threads.tell(thread, "first")
        await until(run, "running")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.close, "t")
            await trio.sleep(1)
            with pytest.raises(NotFound):
                threads.find("t")
            second = open_(threads, agent="echo")
            said = threads.tell(second, "second")
            await said.done.wait()
            assert ("cancelling", "second") == (run.state, said.result)
        assert (second, [said]) == (threads.find("t"), second.kept)
        assert [run] == thread.kept
        assert threads.snapshot(second).is_open
        assert thread not in list(threads)


@pytest.mark.parametrize("has_returned", [True, False])
async def test_closing_takes_back_what_was_not_heard(autojump_clock, has_returned):
    """Also where the run ends well in the same moment: nothing follows."""

    async def ending(run, input):
        if has_returned:
            run.nursery.start_soon(trio.sleep_forever)
        else:
            await trio.sleep_forever()

    async with opened(ending) as threads:
        run = threads.tell(open_(threads), "first")
        await until(run, "running")
        threads.tell(run.home, "late")
        await threads.close("t")
        await trio.sleep(100)
        assert ("success" if has_returned else "cancelled") == run.end.outcome
        assert ([run], {}) == (list(threads.runs), threads.runs.threads)


async def test_closing_cancels_child_runs(autojump_clock):
    """They go with the run above them, and with nobody else."""

    async def parent(run, input):
        await run.delegate("forever", None)

    async with opened(parent, forever) as threads:
        run = start(threads, "parent", thread_id="t")
        await until(run, "running")
        await threads.close("t")
        [worker] = run.home.workers
        assert [STOPPED, ("cancelled", "parent")] == [ended(run), ended(worker)]


async def test_a_close_that_is_cancelled_has_cancelled_all_the_same(autojump_clock):
    """Only nobody waits for the end of it."""
    async with opened(stubborn) as threads:
        thread = open_(threads)
        reader = read(thread.feed, types="run_finished")
        runs = [
            threads.tell(thread, "x"),
            start(threads, "stubborn", thread_id="t", if_busy="enqueue"),
        ]
        set_(threads)
        await until(runs[0], "running")
        with trio.move_on_after(1) as scope:
            await threads.close("t")
        assert (True, "cancelling") == (scope.cancelled_caught, runs[0].state)
        assert ({}, {}, False) == (threads.runs.threads, threads._opened, thread.feed.is_over)
        await threads.runs.wait_idle()
        assert thread.feed.is_over
        assert [STOPPED] * 2 == [ended(run) for run in runs]
        await trio.sleep(1_000)
        assert 2 == len(list(threads.runs))
        assert 2 == len(taken(reader))


@pytest.mark.parametrize("seed", range(5))
async def test_readers_get_the_end_of_what_was_closed_and_then_their_own(autojump_clock, seed):
    """In whichever order tasks have their turn: nothing is cut off."""
    async with opened(stubborn) as threads:
        thread = open_(threads)
        run = threads.tell(thread, "x")
        readers, told = [read(thread.feed) for _ in range(seed + 1)], {}
        plain = NATIVE.feed.encoder(decode_watch_feed(Request("GET", {}, {}, {})).options)

        async def pour(reader):
            taken = b""
            while not reader.is_finished:
                if piece := reader.take():
                    taken += piece
                    await trio.lowlevel.checkpoint()
                elif not reader.is_finished:
                    await reader.wait()
            told[reader] = taken

        async with trio.open_nursery() as nursery:
            for reader in readers:
                nursery.start_soon(pour, reader)
            await trio.sleep(1)
            await threads.close("t")

        frames = [plain.feed(e, thread.feed.id_of(n)) for n, e in enumerate(run.log.events, 1)]
        assert [b"".join(chain(*frames))] * len(readers) == list(told.values())
        assert {None} == {reader.closing for reader in readers}


async def test_a_stopping_server_ends_every_feed(autojump_clock):
    """Of threads and its own; runs may end by themselves."""
    async with opened(sleeping) as threads:
        run = start(threads, "sleeping", 10, thread_id="t")
        readers = [read(run.home.feed), read(open_(threads, "u").feed), read(threads.runs.feed)]
        threads.runs.refuse()
        assert ["shutdown"] * 3 == [reader.closing for reader in readers]
        await run.done.wait()
        assert FINE == ended(run)


# Triggers


async def test_a_trigger_tells_the_thread_something_at_an_interval(autojump_clock):
    """Again and again, from its interval on; each time it says so, and when it does so next."""
    async with opened(echo) as threads:
        thread = open_(threads)
        began = trio.current_time()
        assert thread is set_(threads, every=10, text="tick", name="clock")
        [shown] = threads.snapshot(thread).triggers
        assert ("k", "clock", 10, "tick", 0, None, "activated") == (
            *(shown.trigger_id, shown.name, shown.every_s, shown.text, shown.fired),
            *(shown.last_at, shown.change),
        )
        assert None is not shown.next_at
        for fired in range(4):
            await trio.sleep(began + 10 * (fired + 1) - 1 - trio.current_time())
            assert fired == len(thread.kept)
            await trio.sleep(2)
        assert [b'"tick"'] * 4 == [bytes(run.input) for run in thread.kept]
        assert [["tick"]] * 4 == [messages(run) for run in thread.kept]
        [shown] = threads.snapshot(thread).triggers
        assert (4, thread.feed.events[-1].ts[:10]) == (shown.fired, shown.last_at[:10])
        assert ["available", "activated", *["fired"] * 4] == changes(thread.feed)
        last = [e for e in thread.feed.events if isinstance(e, TriggerChanged)][-1]
        assert (4, None, "") == (last.fired, last.error, last.run_id)


async def test_triggers_are_told_of_in_their_thread_s_feed_and_the_server_s(autojump_clock):
    """They are no run's, and say which thread's; the server remembers from its first reader on."""
    async with opened(echo) as threads:
        reader = read(open_(threads).feed, types="trigger_changed")
        set_(threads)
        assert 0 == threads.runs.feed.last
        everywhere = read(threads.runs.feed, NOW)
        set_(threads, is_active=False)
        threads.drop_trigger("t", "k")
        told = taken(reader)
        assert ["available", "activated", "updated", "deactivated", "removed"] == [
            event.change for event in told
        ]
        assert {"t"} == {event.thread_id for event in told}
        assert told[2:] == taken(everywhere)


async def test_a_trigger_that_is_replaced_begins_its_interval_anew(autojump_clock):
    """It keeps its count; the old one is not heard of any more."""
    async with opened(echo) as threads:
        thread = open_(threads)
        set_(threads, every=10, text="old")
        await trio.sleep(15)
        set_(threads, every=100, text="new")
        await trio.sleep(99)
        assert [b'"old"'] == [bytes(run.input) for run in thread.kept]
        await trio.sleep(2)
        assert [b'"old"', b'"new"'] == [bytes(run.input) for run in thread.kept]
        [shown] = threads.snapshot(thread).triggers
        assert (2, "new", 100) == (shown.fired, shown.text, shown.every_s)
        assert ["available", "activated", "fired", "updated", "fired"] == changes(thread.feed)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (True, True, ["updated"]),
        (True, False, ["updated", "deactivated"]),
        (False, True, ["updated", "activated"]),
        (False, False, ["updated"]),
    ],
)
async def test_what_has_changed_is_told(autojump_clock, before, after, expected):
    """That it is new to what it was; being active, or not, is told only where it changes."""
    async with opened(echo) as threads:
        thread = open_(threads)
        set_(threads, is_active=before)
        assert ["available", "activated"][: 1 + before] == changes(thread.feed)
        set_(threads, is_active=after)
        assert expected == changes(thread.feed)[1 + before :]
        [shown] = threads.snapshot(thread).triggers
        assert ("activated" if after else "available", after) == (
            shown.change,
            shown.next_at is not None,
        )
        await trio.sleep(11)
        assert after == len(thread.kept)


async def test_a_trigger_that_was_dropped_is_silent(autojump_clock):
    """One that is not there cannot be dropped; the error names those there are."""
    async with opened(echo) as threads:
        thread = open_(threads)
        with pytest.raises(NotFound, match=r"one of the triggers \(none\), got 'k'"):
            threads.drop_trigger("t", "k")
        set_(threads, "k")
        set_(threads, "l", is_active=False)
        assert thread is threads.drop_trigger("t", "k")
        with pytest.raises(NotFound, match="one of the triggers l, got 'k'"):
            threads.drop_trigger("t", "k")
        threads.drop_trigger("t", "l")
        await trio.sleep(1_000)
        assert ((), []) == (threads.snapshot(thread).triggers, list(threads.runs))
        assert 2 == changes(thread.feed).count("removed")


async def test_a_thread_that_is_closed_has_no_triggers(autojump_clock):
    """Neither does one of the same name that comes later."""
    async with opened(echo) as threads:
        open_(threads)
        set_(threads)
        await threads.close("t")
        thread = open_(threads)
        await trio.sleep(1_000)
        assert ((), []) == (threads.snapshot(thread).triggers, list(threads.runs))
        timer = threads.runs.timer
        assert [] == [due for *_, due in timer._heap if due.function is not None]


async def test_only_what_was_opened_has_triggers(autojump_clock):
    """What has only runs goes with them; the error says what to do."""
    async with opened(forever) as threads:
        for act in (set_, partial(Threads.drop_trigger, thread_id="t", trigger_id="k")):
            with pytest.raises(NotFound, match="id of a thread"):
                act(threads)
        start(threads, "forever", thread_id="t")
        for act in (set_, partial(Threads.drop_trigger, thread_id="t", trigger_id="k")):
            with pytest.raises(Conflict, match=r"opened, got 't': .*; open it first"):
                act(threads)


@pytest.mark.parametrize(
    "every", [0, -1, 0.999, math.nan, math.inf, -math.inf, 366 * 86_400 + 1, 1e308]
)
async def test_an_interval_has_bounds(autojump_clock, every):
    """An agent is no clock; what was there stays as it was."""
    async with opened(echo) as threads:
        thread = open_(threads)
        set_(threads, every=5)
        with pytest.raises(BadRequest, match="every_s: expected a number of seconds from 1 to a y"):
            set_(threads, every=every)
        [shown] = threads.snapshot(thread).triggers
        assert ("activated", 5) == (shown.change, shown.every_s)


@pytest.mark.parametrize("every", [1, 366 * 86_400])
async def test_an_interval_may_be_at_its_bounds(autojump_clock, every):
    """From a second to a year."""
    async with opened(echo) as threads:
        thread = open_(threads)
        set_(threads, every=every)
        [shown] = threads.snapshot(thread).triggers
        assert every == shown.every_s


async def test_a_thread_has_so_many_triggers_and_no_more(autojump_clock):
    """One that is there can be replaced."""
    async with opened(echo) as threads:
        thread = open_(threads)
        for number in range(MAX_TRIGGERS):
            set_(threads, f"{number}", is_active=False)
        with pytest.raises(Overloaded, match=f"at most {MAX_TRIGGERS} triggers in a thread; drop"):
            set_(threads, "new")
        set_(threads, "7", text="new")
        assert ["new"] == [t.text for t in threads.snapshot(thread).triggers if t.text == "new"]


async def test_a_trigger_does_not_answer_a_question(autojump_clock):
    """A person was asked; what it says is heard later, or begins a run."""
    async with opened(asking) as threads:
        thread = open_(threads)
        run = threads.tell(thread, "x")
        set_(threads)
        await trio.sleep(11)
        assert ("waiting", ["x", "tick"]) == (run.state, messages(run))
        threads.drop_trigger("t", "k")
        threads.tell(thread, "so")
        await run.done.wait()
        [following] = thread.active
        assert ("so", b'"tick"') == (run.result, bytes(following.input))


async def test_a_trigger_waits_for_the_end_of_what_goes_on(autojump_clock):
    """It is a follow-up: nothing is interrupted."""
    async with opened(deaf) as threads:
        run = threads.tell(open_(threads), "x")
        set_(threads, every=6)
        await trio.sleep(7)
        assert [("steer", "x"), ("follow_up", "tick")] == [
            (e.mode, e.text) for e in run.log.events if isinstance(e, MessageReceived)
        ]


async def test_a_trigger_that_comes_to_nothing_says_why_and_goes_on(autojump_clock):
    """There was no room; the next time there is."""
    async with opened(sleeping, echo, max_running=1, max_queued=0) as threads:
        thread = open_(threads, agent="echo")
        start(threads, "sleeping", 25)
        set_(threads, every=10)
        await trio.sleep(31)
        fired = [e for e in thread.feed.events if getattr(e, "change", None) == "fired"]
        assert ["overloaded", "overloaded", None] == [e.error and e.error.code for e in fired]
        assert "all places are taken" in fired[0].error.message
        assert [1, 2, 3] == [event.fired for event in fired]
        assert ["tick"] == [run.result for run in thread.kept]
        assert [] == reported(threads, "crash")


async def test_a_trigger_of_a_stopping_server_begins_nothing(autojump_clock):
    """Nobody is told anything any more."""
    async with opened(echo) as threads:
        thread = open_(threads)
        set_(threads)
        threads.runs.refuse()
        await trio.sleep(11)
        assert [] == list(threads.runs)
        assert "activated" == thread.feed.events[-1].change


async def test_a_trigger_waits_until_the_thread_has_heard_the_last_one(autojump_clock):
    """It fires no more often than somebody listens; what comes to nothing says why."""

    async def slow(run, input):
        await trio.sleep(10)
        return input

    async with opened(slow) as threads:
        thread = open_(threads, agent="slow")
        set_(threads, every=1, text="tick")
        await trio.sleep(100.5)
        assert 2 >= len(thread.active)
        fired = [e for e in thread.feed.events if isinstance(e, TriggerChanged) and e.fired]
        skipped = [event for event in fired if event.error is not None]
        assert 100 == len(fired)
        assert 80 <= len(skipped) < 100
        assert {"the thread has not heard yet what it was told last"} == {
            event.error.message for event in skipped
        }


def test_a_trigger_says_little():
    """Each time it fires the run's log grows by that much."""
    with pytest.raises(BadRequest, match="text: expected at most 16384 characters, got 16385"):
        _see_text("x" * 16385)


async def test_what_was_said_to_a_thread_that_was_closed_begins_nothing(autojump_clock):
    """A run that has returned, and is cancelled with its thread, leaves nothing to a new one."""
    async with opened(stubborn) as threads:
        thread = open_(threads)
        run = threads.tell(thread, "x")
        await until(run, "running")
        run.context.hear("y", "follow_up")
        await threads.close("t")
        assert [run] == list(threads.runs)
        with pytest.raises(Conflict, match="is over, or about to be"):
            run.context.hear("z", "steer")


async def test_triggers_of_one_thread_have_each_their_own_time(autojump_clock):
    """One replaced or gone leaves the others alone."""
    async with opened(echo) as threads:
        thread = open_(threads)
        for every in (3, 5, 7):
            set_(threads, f"{every}", every=every, text=f"{every}")
        await trio.sleep(8)
        threads.drop_trigger("t", "3")
        await trio.sleep(8)
        assert Counter({"3": 2, "5": 3, "7": 2}) == Counter(run.result for run in thread.kept)
