"""Wherever a cancel strikes a model call, nothing of it is left: no task, no connection, no part.

A run is refused once, tries again, calls two tools and answers; its model server is a real one,
over streams in memory, so that every step is scheduled by Trio's seeded random numbers. The
scenario is struck one step later each time, until it ends before the blow.
"""

import functools
import gc
import itertools
import random

import attrs
import pytest
import trio
import trio.testing
from test_cancel_everywhere import (
    SECONDS,
    Blow,
    attach,
    by_cancel,
    by_nothing,
    follow,
    from_outside,
    look_up,
    same_steps as same_steps,  # noqa: PLC0414 - a fixture
    see_that_it_is_whole,
)

from agentsse.agents import Agent
from agentsse.context import Limits
from agentsse.dialects import Start
from agentsse.events import Retry, encode_event
from agentsse.http import open_http
from agentsse.providers import HttpProvider
from agentsse.providers.anthropic import AnthropicApi
from agentsse.providers.gemini import GeminiApi
from agentsse.providers.openai_chat import OpenAIChatApi
from agentsse.providers.openai_responses import OpenAIResponsesApi
from agentsse.runs import open_runs
from agentsse.testing.upstream import Refusal, Reply, Upstream

APIS = {
    "openai_chat": OpenAIChatApi,
    "openai_responses": OpenAIResponsesApi,
    "anthropic": AnthropicApi,
    "gemini": GeminiApi,
}
REPLIES = (
    Reply(instead=Refusal("overloaded")),
    Reply(
        reasoning="So.",
        calls=[("look_up", '{"word":"a"}'), ("look_up", '{"word":"b"}')],
        gap=0.02,
        first=0.1,
    ),
    Reply(["It ", "is."], gap=0.02, before=0.1),
)


@attrs.define
class Wires:
    """Connections in memory, to one model server."""

    upstream: Upstream
    nursery: trio.Nursery

    async def open_tcp(self, _host, _port):
        """Connect."""
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.upstream.answer, theirs)
        return ours


def play(kind, blow, strike):
    """Play the scenario once; see that nothing is left, and everything is told.

    Returns:
        The run.
    """
    upstream, got = Upstream(kind, REPLIES), []

    async def everything():
        living = trio.lowlevel.current_statistics().tasks_living
        trio._core._run._r.seed(0)
        random.seed(0)  # the jitter of tries
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                wires = Wires(upstream, nursery)
                client = functools.partial(open_http, open_tcp=wires.open_tcp)
                api = APIS[kind](base_url="http://up")
                provider = HttpProvider("up", api, open_client=client)
                chat = Agent.of_model("chat", "up:m", tools=[look_up])
                async with open_runs(
                    {"chat": chat}, limits=Limits(), providers={"up": provider}
                ) as runs:
                    run, _ = runs.start(
                        Start(agent="chat", input="Hi.", delivery="stream"), default="continue"
                    )
                    blow.strike = [functools.partial(one, run) for one in strike]
                    nursery.start_soon(follow, run, attach(run), got)
                    if blow.step == 0:
                        blow.fall()
                    await run.done.wait()
                await upstream.wait_until(lambda: not upstream.open_connections)
        assert living == trio.lowlevel.current_statistics().tasks_living
        return runs, run

    clock = trio.testing.MockClock(autojump_threshold=0)
    runs, run = trio.run(everything, clock=clock, instruments=[blow])
    assert [] == blow.errors
    assert set() == blow.alive
    assert (0, 0) == (upstream.open_connections, upstream.open_streams)
    assert [encode_event(event) for event in run.log.events] == got
    see_that_it_is_whole(run, runs)
    return run


@pytest.mark.parametrize("kind", APIS)
def test_the_scenario_plays_to_its_end(kind, same_steps):
    """Nobody strikes: it is refused, tries again, calls tools and answers; twice the same way."""
    blows = [Blow(step=0) for _ in range(2)]
    for blow in blows:
        run = play(kind, blow, [by_nothing])
        assert ("success", "It is.") == (run.end.outcome, run.result)
        assert 1 == sum(isinstance(event, Retry) for event in run.log.events)
    assert blows[0].count == blows[1].count > 50


@pytest.mark.parametrize("kind", APIS)
@pytest.mark.parametrize("strike", [by_cancel, from_outside])
def test_a_cancel_at_any_step_of_a_model_call_leaves_nothing(kind, strike, same_steps):
    """The upstream connection is closed, wherever it was; what was begun has its end."""
    outcomes = []
    for step in itertools.count():
        blow = Blow(step)
        run = play(kind, blow, [strike])
        if blow.strike:
            break
        outcomes.append(run.end.outcome)
        assert 0 <= run.end.receipt.seconds < 0.1
    assert "success" == run.end.outcome
    assert len(outcomes) > 50
    assert ["cancelled", "success"] == [outcome for outcome, _ in itertools.groupby(outcomes)]
    gc.collect()  # an async generator that was left behind would be reported now
