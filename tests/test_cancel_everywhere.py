"""Wherever a cancel strikes, nothing is left and everything is told.

One scenario has all that a run can have: tools side by side, child runs that are waited for and
some that are not, a model's stream, questions and a person who answers and says more, rest,
nurseries in nurseries, cleanup, text that is held back and joined, and readers. Trio's scheduler is
seeded, so the scenario is played again and again with the same steps, and each time struck one step
later, until it ends before the blow.
"""

import contextlib
import functools
import itertools

import attrs
import pytest
import trio
import trio.testing

from agentsse.agents import Agent
from agentsse.context import emit
from agentsse.dialects import Start
from agentsse.dialects.native import NativeEncoder
from agentsse.errors import AgentError, Conflict, NotFound
from agentsse.events import (
    AgentFinished,
    AgentStarted,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    MessageReceived,
    PartFinished,
    PartStarted,
    Paused,
    Resumed,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
    ToolFinished,
    ToolStarted,
    decode_event,
    encode_event,
)
from agentsse.log import START
from agentsse.runs import Limits, open_runs
from agentsse.sse import Decoder
from agentsse.testing import ScriptedProvider, ask_for, say
from agentsse.tools import tool

SECONDS = 60  # generous: only a test that hangs ever sees it
CLEANUP = 20.0  # seconds; long enough for a thread that is joined to be slow
HURRY = 5  # how much faster than real time the clock runs where threads do
PAIRS = (  # what is begun, what ends it, and the field that says which
    (PartStarted, PartFinished, "part_id"),
    (StepStarted, StepFinished, "step_id"),
    (ToolStarted, ToolFinished, "call_id"),
    (AgentStarted, AgentFinished, "child_run_id"),
)


@attrs.define(eq=False)
class Blow(trio.abc.Instrument):
    """Counts the steps of a run's tasks, and strikes after the n-th.

    Attributes:
        strike: What to do, step by step from the n-th on; sync, as everything that ends a run.
        errors: What it raised; Trio would only log it.
        alive: Tasks of the run that have begun and not ended.
    """

    step: int
    strike: list = attrs.field(factory=list)
    count: int = 0
    errors: list = attrs.field(factory=list)
    alive: set = attrs.field(factory=set)

    def fall(self):
        """Do the next thing; also called before the first step."""
        try:
            self.strike.pop(0)()
        except BaseException as error:  # noqa: BLE001 - collected, and seen to be empty
            self.errors.append(error)

    def belongs(self, task):
        """Whether a task is the run's, or below it."""
        while task is not None and not task.name.startswith("run "):
            task = task.parent_nursery and task.parent_nursery.parent_task
        return task is not None

    def task_spawned(self, task):
        """Note a beginning."""
        if self.belongs(task):
            self.alive.add(task)

    def task_exited(self, task):
        """Note an end."""
        self.alive.discard(task)

    def after_task_step(self, task):
        """Count, and strike."""
        if self.belongs(task):
            self.count += 1
            if self.count >= self.step and self.strike:
                self.fall()


# The scenario


@tool
async def look_up(word: str) -> str:
    """Look a word up."""
    emit("looking", word=word)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0.02)
        await trio.sleep(0.01)
    return f"what {word} means"


@tool
async def fail() -> None:
    """Fail."""
    await trio.sleep(0.03)
    raise ValueError


@tool
def block(word: str) -> str:
    """Work in a thread, and tell of it."""
    emit("blocking", word=word)
    return word


def the_model():
    return ScriptedProvider(
        [
            [
                0.01,
                *ask_for(("look_up", '{"word":"a"}'), ("look_up", '{"word":"b"}'), ("fail", "")),
            ],
            [*say("So ")[:2], 0.06, say("it is.")[1], 0.01, *say("So it is.")[2:]],
        ]
    )


@attrs.define
class Scenario:
    """A run of everything; notes which of its cleanups were owed, and which were done."""

    threads: bool
    owed: list = attrs.field(factory=list)
    done: list = attrs.field(factory=list)

    @contextlib.asynccontextmanager
    async def tidy(self, run):
        """Owe a cleanup that awaits."""
        self.owed.append(run.id)
        try:
            yield
        finally:
            with run.cleanup():
                await trio.sleep(0.01)
                await trio.lowlevel.checkpoint()
                self.done.append(run.id)

    async def child(self, run, input):
        """Run below another, with tasks of its own."""
        async with self.tidy(run):
            run.nursery.start_soon(trio.sleep, 0.05)
            with run.step("think"):
                run.reasoning("hm, ")
                await trio.sleep(0.01)
                run.reasoning("well")
            return await run.call(look_up, {"word": input})

    async def branch(self, run):
        """Open nurseries in nurseries, each a part of one step."""
        with run.step("branch"):
            async with trio.open_nursery() as outer:
                async with trio.open_nursery() as inner:
                    inner.start_soon(trio.sleep, 0.02)
                    outer.start_soon(trio.sleep, 0.04)
                await trio.lowlevel.checkpoint()

    async def give_up(self, run):
        """Ask something that nobody has to answer."""
        with trio.move_on_after(0.005):
            await run.ask("Or not?")

    async def rest(self, run):
        """Rest for a while, in two tasks."""
        run.pause("a moment")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.rest_while_paused)
            nursery.start_soon(run.rest_while_paused)
            await trio.sleep(0.02)
            run.resume()

    async def main(self, run, input):
        """Do everything at once."""
        async with self.tidy(run):
            run.text(input)
            await trio.sleep(0.01)
            run.text("see: ")
            run.text("well")
            run.nursery.start_soon(self.branch, run)
            with run.step("all", kind="flow"):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run.delegate, "child", "c")
                    nursery.start_soon(run.delegate, "chat", "What is it?")
                    nursery.start_soon(run.ask, "Shall I?")
                    nursery.start_soon(self.give_up, run)
                    nursery.start_soon(self.rest, run)
                    nursery.start_soon(run.next_message)
                    run.spawn("child", "w")
                    run.spawn("bad", None)
                    run.set_values(spawned=2)
                    if self.threads:
                        nursery.start_soon(run.call, block, {"word": "c"})
            with contextlib.suppress(AgentError):
                await run.delegate("bad", None)
            run.text("Done.")
            run.nursery.start_soon(trio.sleep, 0.05)  # some steps are after the return
            return "done"


async def bad(run, input):
    await trio.lowlevel.checkpoint()
    raise ValueError


async def follow(run, reader, got):
    """Read as the shell does, to the end."""
    decoder = Decoder()
    while not reader.is_finished:
        chunk = reader.take()
        got += [frame.data.encode() for frame in decoder.feed(chunk)]
        if not chunk and not reader.is_behind:
            await reader.wait()
    run.detach(reader, "finished")


async def answer(run, reader):
    """Answer what is asked, a moment later, and say more; a run that is gone needs neither."""
    decoder = Decoder()
    while not reader.is_finished:
        chunk = reader.take()
        for event in [decode_event(frame.data) for frame in decoder.feed(chunk)]:
            if isinstance(event, InputRequested):
                await trio.sleep(0.01)
                with contextlib.suppress(NotFound):
                    run.context.answer(event.request_id, {"answer": "yes"})
                with contextlib.suppress(Conflict):
                    run.context.hear("Go on.", "steer")
        if not chunk and not reader.is_behind:
            await reader.wait()
    run.detach(reader, "finished")


def play(blow, strike, *, threads=False, seed=0):
    """Play the scenario once; see that nothing is left, and everything is told.

    Returns:
        The run.
    """
    scenario, model, got = Scenario(threads), the_model(), []
    agents = {
        "main": Agent("main", scenario.main),
        "child": Agent("child", scenario.child),
        "chat": Agent.of_model("chat", "m:x", provider=model, tools=[look_up, fail]),
        "bad": Agent("bad", bad),
    }

    async def everything():
        living = trio.lowlevel.current_statistics().tasks_living
        trio._core._run._r.seed(seed)
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as watchers:
                async with open_runs(agents, limits=Limits(cleanup=CLEANUP)) as runs:
                    run, _ = runs.start(
                        Start(agent="main", input="Let me ", delivery="stream"), default="continue"
                    )
                    blow.strike = [functools.partial(one, run) for one in strike]
                    watchers.start_soon(follow, run, attach(run), got)
                    watchers.start_soon(answer, run, attach(run))
                    if blow.step == 0:
                        blow.fall()
                    await run.done.wait()
                    assert set() == runs.nursery.child_tasks
                assert [] == runs.unfinished()
        assert living == trio.lowlevel.current_statistics().tasks_living
        return runs, run

    jumping, hurrying = {"autojump_threshold": 0}, {"rate": HURRY}
    clock = trio.testing.MockClock(**(hurrying if threads else jumping))
    runs, run = trio.run(everything, clock=clock, instruments=[blow])
    assert [] == blow.errors
    assert set() == blow.alive
    assert 0 == model.open_streams
    assert sorted(scenario.owed) == sorted(scenario.done)
    assert [encode_event(event) for event in run.log.events] == got
    for one in runs:
        see_that_it_is_whole(one, runs)
    return run


def attach(run):
    return run.attach("native", functools.partial(NativeEncoder, None), START)


def see_that_it_is_whole(run, runs):
    """One beginning, one end, and an end to whatever was begun between them."""
    events = run.log.events
    assert run.done.is_set()
    assert [RunStarted] == [type(e) for e in events if isinstance(e, RunStarted)]
    assert [RunFinished] == [type(e) for e in events if isinstance(e, RunFinished)]
    assert (RunStarted, RunFinished) == (type(events[0]), type(events[-1]))
    for begun, over, key in PAIRS:
        assert sorted(getattr(e, key) for e in events if isinstance(e, begun)) == sorted(
            getattr(e, key) for e in events if isinstance(e, over)
        )
    for event in events:
        if isinstance(event, AgentStarted):
            assert run.id == runs.find(event.child_run_id).parent_id
    is_cancelled = run.end.outcome == "cancelled"
    asked = [e.request_id for e in events if isinstance(e, InputRequested)]
    over = [e.request_id for e in events if isinstance(e, InputReceived | InputWithdrawn)]
    assert len(set(over)) == len(over)
    assert set(asked) >= set(over) if is_cancelled else set(asked) == set(over)
    rests = [type(e) for e in events if isinstance(e, Paused | Resumed)]
    assert rests in ([], [Paused, Resumed], [Paused] if is_cancelled else [])


# The blows


def by_nothing(run): ...


def by_cancel(run):
    run.cancel("client_cancel")


def by_leaving(run):
    run.cancel("disconnect")


def from_outside(run):
    run.owner.nursery.cancel_scope.cancel()


@pytest.fixture
def same_steps(monkeypatch):
    """Have Trio run tasks in an order that depends on its random numbers alone."""
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_scenario_plays_to_its_end(seed, same_steps):
    """Nobody strikes: everything succeeds, and twice the same way."""
    plays = [Blow(step=0) for _ in range(2)]
    for blow in plays:
        run = play(blow, [by_nothing], seed=seed)
        assert ("success", "done", None) == (run.end.outcome, run.result, run.end.receipt.cause)
        assert {AgentStarted: 5, InputWithdrawn: 1, InputReceived: 1, Resumed: 1} == {
            kind: sum(isinstance(event, kind) for event in run.log.events)
            for kind in (AgentStarted, InputWithdrawn, InputReceived, Resumed)
        }
        assert any(isinstance(event, MessageReceived) for event in run.log.events)
        assert {"spawned": 2} == run.context.values
    assert plays[0].count == plays[1].count > 100


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("strike", "cause"),
    [
        ([by_cancel], "client_cancel"),
        ([by_leaving, by_cancel, from_outside], "disconnect"),
        ([from_outside], "shutdown"),
        ([from_outside, by_cancel], None),
    ],
    ids=["cancel", "cancel then outside", "outside", "outside then cancel"],
)
def test_a_cancel_at_any_step_leaves_nothing(strike, cause, seed, same_steps):
    """The run is cancelled, or had been done already, and says by what it was ended."""
    outcomes = []
    for step in itertools.count():
        blow = Blow(step)
        run = play(blow, strike, seed=seed)
        if len(blow.strike) == len(strike):
            break
        outcomes.append(run.end.outcome)
        assert 0 <= run.end.receipt.seconds < 0.1
        if run.end.outcome == "cancelled":
            assert run.end.receipt.cause in ((cause,) if cause else ("client_cancel", "shutdown"))
            assert run.result is None
        else:
            assert ("success", "done") == (run.end.outcome, run.result)
    assert "success" == run.end.outcome
    assert len(outcomes) > 50
    assert ["cancelled", "success"] == [outcome for outcome, _ in itertools.groupby(outcomes)]


def test_a_cancel_at_any_step_leaves_nothing_where_there_are_threads():
    """What a thread does meanwhile may change the steps, but not the end."""
    for step in itertools.count():
        blow = Blow(step)
        run = play(blow, [by_cancel], threads=True)
        if blow.strike:
            break
        assert run.end.outcome in ("cancelled", "success")
        assert 0 == run.end.receipt.threads_abandoned
    assert "success" == run.end.outcome
    assert step > 50
