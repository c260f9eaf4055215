"""Our own client against our own server: what it sees is what the log has, whatever is cut between.

The server is the real one, on loopback, and so are the cuts. Its native dialect asks its clients to
come back after a millisecond, so that nobody waits. Where waiting is what is tested the server is a
script in memory, and the clock is virtual.
"""

import itertools
import json
import random
import socket
import subprocess
import sys
from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import attrs
import pytest
import trio
import trio.testing
from cutting import Cut, open_cutter
from hypothesis import HealthCheck, given, settings, strategies as st
from raw import wait_quiet, wait_until
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from agentsse import agent, client as client_module, tool
from agentsse.agents import Agent
from agentsse.client import (
    FIRST_WAIT,
    LASTING,
    MOST_PATIENCE,
    MOST_WAIT,
    SPREAD,
    TRIES,
    URL,
    AgentCard,
    ServerError,
    ToolCard,
    Unreachable,
    open_client,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import AgentError, BadRequest, ProviderError, Unencodable
from agentsse.events import (
    Custom,
    Gap,
    InputReceived,
    InputRequested,
    MessageReceived,
    PartDelta,
    PartFinished,
    Paused,
    Resumed,
    RunFinished,
    RunStarted,
    StepStarted,
    ToolFinished,
    ToolStarted,
    decode_json,
)
from agentsse.sse import comment, encode, id_only, retry
from agentsse.testing import PartStarted, ScriptedProvider, ask_for, open_server, say
from agentsse.tools import write_output

SECONDS = 30  # generous: only a test that hangs ever sees it
WHALE = "🐋"
EAGER = attrs.evolve(
    NATIVE,
    framing=attrs.evolve(
        NATIVE.framing, prelude=retry(1) + comment("agentsse"), farewell=lambda _ms: retry(1)
    ),
)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    """Have no proxy."""
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)


# Agents


@agent
async def counter(run, input):
    """Say numbers, and whales, and wait in between if told."""
    for n in range(input["n"]):
        await trio.sleep(input.get("gap", 0))
        run.emit("tick", n=n, whale=WHALE)
    return input["n"]


@agent
async def asker(run, input):
    """Ask for a name."""
    name = await run.ask("Your name?")
    run.text(f"hello {name}")
    return name


@agent
async def failing(run, input):
    """Say something, and fail."""
    await trio.lowlevel.checkpoint()
    run.text("so far")
    raise AgentError("the moon is not in reach", code="no_moon")


@agent(on_disconnect="cancel")
async def forever(run, input):
    """Say one thing and wait for the end."""
    run.text("here")
    await trio.sleep_forever()


@attrs.define
class Gate:
    """An agent that goes on when it is told."""

    opened: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, run, _input):
        """Say something, wait, say more."""
        run.emit("before")
        await self.opened.wait()
        run.emit("after")
        return "through"

    @property
    def agent(self):
        """Itself, to be served."""
        return Agent("gate", self)


@asynccontextmanager
async def site(*agents, dialects=(EAGER,), tries=TRIES, **server):
    """A server and a client of it."""
    with trio.fail_after(SECONDS):
        async with (
            open_server(*agents, dialects=dialects, **server) as served,
            open_client(served.urls[0], tries=tries) as client,
        ):
            yield served, client


async def everything(stream):
    """All events of a stream that ends."""
    return [event async for event in stream]


async def until(stream, kind):
    """Read on to the next event of a kind."""
    async for event in stream:
        if isinstance(event, kind):
            return event
    raise EOFError(kind)


def seqs(events):
    """The numbers of events."""
    return [event.seq for event in events]


def text_of(events):
    """What was said in deltas."""
    return "".join(event.delta for event in events if isinstance(event, PartDelta))


# Runs


async def test_a_run_is_streamed_from_its_beginning_to_its_end():
    """Each event once and in order; the stream ends with run_finished, and knows the run's id."""
    async with site(counter) as (server, client):
        async with client.run("counter", {"n": 3}) as run:
            events = await everything(run)
            again = await everything(run)
        [kept] = list(server.runs)
    assert [RunStarted, Custom, Custom, Custom, RunFinished] == [type(event) for event in events]
    assert [1, 2, 3, 4, 5] == seqs(events)
    assert [] == again
    assert (kept.id, events[-1], "5") == (run.run_id, run.end, run.last_id)
    assert "success" == run.end.outcome
    assert kept.log.events == events


async def test_a_model_s_run_with_two_tools_and_reasoning_is_all_there():
    """Reasoning, two calls side by side, their results, and the text that follows."""

    @tool
    async def add(a: int, b: int) -> int:
        """Add."""
        await trio.lowlevel.checkpoint()
        return a + b

    @tool
    async def shout(text: str) -> str:
        """Shout."""
        write_output("louder\n")
        await trio.lowlevel.checkpoint()
        return text.upper()

    calls = ask_for(("add", '{"a":1,"b":2}'), ("shout", '{"text":"whale"}'))
    thought = [
        PartStarted(part_id="r1", kind="reasoning"),
        PartDelta(part_id="r1", kind="reasoning", delta="Let me see."),
        PartFinished(part_id="r1", kind="reasoning", text="Let me see."),
    ]
    provider = ScriptedProvider([[*thought, *calls], say("3 WHALE")])
    helper = Agent.of_model("helper", "scripted:x", provider=provider, tools=[add, shout])
    async with site(helper) as (server, client), client.run("helper", "go") as run:
        events = await everything(run)
        [kept] = list(server.runs)
    assert kept.log.events == events
    assert {"add", "shout"} == {e.name for e in events if isinstance(e, ToolStarted)}
    results = {e.name: decode_json(e.result) for e in events if isinstance(e, ToolFinished)}
    assert {"add": 3, "shout": "WHALE"} == results
    assert "Let me see." in [e.text for e in events if isinstance(e, PartFinished)]
    assert text_of(events).endswith("3 WHALE")


async def test_what_cannot_be_started_says_why():
    """An error before the stream: the server's own code, status and words."""
    async with site(counter) as (_server, client):
        with pytest.raises(ServerError, match="expected one of the agents") as caught:
            async with client.run("nobody", "x"):
                raise AssertionError
        assert (404, "not_found", False) == (
            caught.value.status, caught.value.code, caught.value.is_transient,
        )  # fmt: skip
        with pytest.raises(ServerError, match="on_disconnect") as caught:
            await client.start("counter", {"n": 1}, on_disconnect="maybe")
        assert 400 == caught.value.status
        with pytest.raises(Unencodable, match="the request"):
            await client.start("counter", object())


async def test_an_error_in_the_middle_is_the_run_s_end():
    """What was said stays, and the end has the agent's words; it is no exception."""
    async with site(failing) as (_server, client), client.run("failing") as run:
        events = await everything(run)
    assert "so far" == text_of(events)
    assert ("error", "no_moon", "the moon is not in reach") == (
        run.end.outcome, run.end.error.code, run.end.error.message,
    )  # fmt: skip


async def test_a_model_that_breaks_off_is_an_error_in_the_middle():
    """The provider's failure ends the run, after what it had said."""
    lines = [*say("half")[:2], ProviderError("the line is dead", code="auth")]
    helper = Agent.of_model("helper", "scripted:x", provider=ScriptedProvider([lines]))
    async with site(helper) as (_server, client), client.run("helper", "x") as run:
        events = await everything(run)
    assert "half" == text_of(events)
    assert ("error", "auth") == (run.end.outcome, run.end.error.code)


async def test_leaving_cancels_the_run_where_its_policy_says_so():
    """The end of the block closes the socket, and the server takes it for what it is."""
    async with site(forever) as (server, client):
        async with client.run("forever") as run:
            await until(run, PartDelta)
        await wait_quiet(server)
        shown = await client.show(run.run_id)
    assert ("cancelled", "disconnect") == (shown.outcome, shown.receipt.cause)


async def test_a_cancelled_scope_leaves_like_anybody_else():
    """Wherever the task was, the socket is closed at once, and nothing is left."""
    async with site(forever) as (server, client):
        before = await wait_quiet(server)
        with trio.CancelScope() as scope:
            async with client.run("forever") as run:
                await until(run, PartDelta)
                scope.cancel()
                await until(run, RunFinished)
        after = await wait_quiet(server)
        shown = await client.show(run.run_id)
        assert before == after
    assert "disconnect" == shown.receipt.cause


async def test_who_leaves_under_grace_may_come_back():
    """The run goes on, and `stream` goes on behind the last event that was seen."""
    gate = Gate()
    async with site(gate.agent) as (_server, client):
        async with client.run("gate", on_disconnect="grace:30") as run:
            seen = [await anext(run), await anext(run)]
        async with client.stream(run.run_id, after=run.last_id) as back:
            gate.opened.set()
            rest = await everything(back)
    assert [1, 2, 3, 4] == seqs(seen + rest)
    assert "success" == back.end.outcome


async def test_a_run_is_cancelled_by_its_id():
    """It is gone when `cancel` returns; who streams it sees why; a second one changes nothing."""
    async with site(forever) as (_server, client), client.run("forever") as run:
        await until(run, PartDelta)
        gone = await client.cancel(run.run_id, reason="enough")
        rest = await everything(run)
        again = await client.cancel(run.run_id)
    assert ("finished", "client_cancel") == (gone.state, gone.receipt.cause)
    assert gone.receipt == again.receipt == rest[-1].receipt
    assert "cancelled" == run.end.outcome


async def test_a_run_may_be_cancelled_after_its_step():
    """`after_step` lets what is open finish."""
    entered, opened = trio.Event(), trio.Event()

    @agent
    async def stepping(run, input):
        with run.step("one"):
            entered.set()
            await opened.wait()
        await trio.sleep_forever()

    async with site(stepping) as (_server, client), trio.open_nursery() as nursery:
        started = await client.start("stepping")
        await entered.wait()

        async def cancel():
            gone = await client.cancel(started.id, mode="after_step")
            assert "cancelled" == gone.outcome

        nursery.start_soon(cancel)
        async with client.stream(started.id) as run:
            await until(run, StepStarted)
            opened.set()
            await until(run, RunFinished)


async def test_a_question_is_answered():
    """The stream shows it, `answer` answers it once, and the run goes on."""
    async with site(asker) as (_server, client), client.run("asker") as run:
        asked = await until(run, InputRequested)
        await client.answer(run.run_id, {"answer": "Ada"}, request_id=asked.request_id)
        rest = await everything(run)
        with pytest.raises(ServerError) as caught:
            await client.answer(run.run_id, {"answer": "Eve"})
    assert isinstance(rest[0], InputReceived)
    assert "hello Ada" == text_of(rest)
    assert "not_asked" == caught.value.code


async def test_a_run_is_told_things_paused_and_let_go():
    """`tell`, `pause` and `resume` are seen in the stream."""

    @agent
    async def listening(run, input):
        while (heard := await run.next_message()) != "end":
            run.text(heard)
            await run.rest_while_paused()

    async with site(listening) as (_server, client), client.run("listening") as run:
        await client.pause(run.run_id, reason="lunch")
        await client.tell(run.run_id, f"a {WHALE}")
        assert f"a {WHALE}" == (await until(run, MessageReceived)).text
        assert "lunch" == (await until(run, Paused)).reason
        assert "paused" == (await client.show(run.run_id)).state
        await client.resume(run.run_id)
        await until(run, Resumed)
        await client.tell(run.run_id, "end", mode="follow_up")
        assert "success" == (await until(run, RunFinished)).outcome


async def test_a_run_in_the_background_is_streamed_by_its_id():
    """`start` comes back at once with the run; what was said meanwhile comes with the rest."""
    gate = Gate()
    async with site(gate.agent) as (_server, client):
        started = await client.start(
            "gate", "x", metadata={"a": 1}, seconds=60, coalesce_ms=0, if_busy="enqueue",
            thread_id="t",
        )  # fmt: skip
        assert ("gate", "continue", "t") == (
            started.agent, started.on_disconnect, started.thread_id,
        )  # fmt: skip
        async with client.stream(started.id) as run:
            await until(run, Custom)
        gate.opened.set()
        async with client.stream(started.id, types=["custom"]) as run:
            events = await everything(run)
        shown = await client.show(started.id)
    assert ["before", "after"] == [event.name for event in events[:-1]]
    assert {"a": 1} == decode_json(shown.metadata)
    assert (run.run_id, "through") == (shown.id, decode_json(shown.result))


async def test_the_same_key_finds_the_same_run():
    """A start that is sent again does not start again."""
    async with site(counter) as (server, client):
        first = await client.start("counter", {"n": 1}, idempotency_key="k")
        second = await client.start("counter", {"n": 1}, idempotency_key="k")
        with pytest.raises(ServerError) as caught:
            await client.start("counter", {"n": 2}, idempotency_key="k")
        assert 1 == len(list(server.runs))
    assert first.id == second.id
    assert "idempotency_key_reused" == caught.value.code


async def test_behind_the_end_of_a_run_there_is_nothing():
    """A stream that begins there ends at once, without an end of its own."""
    async with site(counter) as (_server, client):
        async with client.run("counter", {"n": 1}) as run:
            await everything(run)
        async with client.stream(run.run_id, after=run.end.seq) as late:
            assert [] == await everything(late)
            assert late.end is None
        async with client.stream(run.run_id, after=1) as late:
            assert [2, 3] == seqs(await everything(late))


async def test_what_can_be_run_is_listed():
    """Agents with their tools."""

    @tool
    async def lookup(name: str) -> str:
        """Look a name up."""
        await trio.lowlevel.checkpoint()
        return name

    provider = ScriptedProvider([])
    helper = Agent.of_model("helper", "scripted:x", provider=provider, tools=[lookup])
    async with site(forever, helper) as (_server, client):
        first, second = await client.agents()
        assert client.url.startswith("http://127.0.0.1:")
    assert ("forever", None, "cancel") == (first.name, first.model, first.on_disconnect)
    card = AgentCard(
        name="helper", description=second.description, model="scripted:x",
        tools=(ToolCard(name="lookup", description="Look a name up."),),
    )  # fmt: skip
    assert card == second


async def test_unicode_and_a_megabyte_of_output_are_carried_through_two_turns():
    """A tool's whole result comes over the wire, and into the thread's next turn."""
    page = f"{WHALE} \u2028 \x00 é\n" * 80_000

    @tool
    async def read() -> str:
        """Read the page."""
        await trio.lowlevel.checkpoint()
        return page

    provider = ScriptedProvider([ask_for(("read", "{}")), say("read"), say(WHALE)])
    helper = Agent.of_model("helper", "scripted:x", provider=provider, tools=[read])
    async with site(helper) as (_server, client):
        async with client.run("helper", f"go {WHALE}", thread_id="t") as run:
            finished = await until(run, ToolFinished)
            await until(run, RunFinished)
        async with client.run("helper", "again", thread_id="t") as run:
            events = await everything(run)
    assert len(page.encode()) > 1_000_000
    assert page == decode_json(finished.result)
    assert WHALE == text_of(events)
    kept = [str(message) for message in provider.prompts[2].messages]
    assert max(map(len, kept)) >= len(page)


async def test_a_slow_client_loses_nothing():
    """The server cuts off who does not read for long; who comes back then has all of it."""
    page = "x" * 60_000

    @agent
    async def flood(run, input):
        for n in range(300):
            run.emit("page", n=n, page=page)
            await trio.lowlevel.checkpoint()

    async with site(flood, write_deadline=0.05) as (server, client), client.run("flood") as run:
        first = await anext(run)
        await wait_until(lambda: server.app.streams.closed["slow_client"])
        rest = await everything(run)
    assert list(range(1, 303)) == seqs([first, *rest])
    assert "success" == run.end.outcome


async def test_twenty_at_once_do_not_mix():
    """One client, twenty tasks: each sees its own run, whole."""
    seen = {}

    @agent
    async def echo(run, input):
        for word in input.split():
            run.text(word)
            await trio.sleep(0.001)

    async with site(echo) as (_server, client):

        async def play(n):
            async with client.run("echo", f"{n} " * 5, coalesce_ms=0) as run:
                seen[n] = await everything(run)

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(play, n)
    assert {n: str(n) * 5 for n in range(20)} == {n: text_of(seen[n]) for n in range(20)}
    assert 20 == len({events[0].run_id for events in seen.values()})


# Threads and feeds


async def test_a_thread_is_told_and_its_feed_followed():
    """What a thread hears starts a run; the feed shows all its runs and ends with the thread."""
    async with site(asker) as (server, client), client.feed("a/b".replace("/", "·")) as feed:
        told = await client.tell_thread("a·b", "hi")
        asked = await until(feed, InputRequested)
        await client.tell_thread("a·b", "Ada", mode="follow_up")
        finished = await until(feed, RunFinished)
        shown = await client.show_thread("a·b")
        thread = server.runs.find_thread("a·b")
        assert feed.last_id == thread.feed.id_of(thread.feed.last)
    assert ("asker", "a·b") == (told.agent, told.id)
    assert asked.run_id == finished.run_id == shown.runs[0]


async def test_a_feed_ends_with_its_thread():
    """A thread that is closed has no more to tell, and its feed is not waited for."""
    async with site(counter) as (server, client), client.feed("t") as feed:
        await client.tell_thread("t", "x")  # fails: no object
        await until(feed, RunFinished)
        await server.app.threads.close("t")
        assert [] == await everything(feed)


async def test_the_server_s_feed_begins_with_now_and_is_filtered():
    """Of all runs only what was asked for, ends always."""
    async with site(counter) as (_server, client):
        await client.start("counter", {"n": 1})
        async with client.feed(types=["run_started"], watch=["*"], after="now") as feed:
            second = await client.start("counter", {"n": 2})
            events = [await anext(feed), await anext(feed)]
    assert [(RunStarted, second.id), (RunFinished, second.id)] == [
        (type(event), event.run_id) for event in events
    ]


async def test_a_feed_that_has_forgotten_says_so():
    """After a restart one gap stands for what was before, and then it goes on."""
    ports = []

    async def open_tcp(host, port):
        return await trio.open_tcp_stream("127.0.0.1", ports[-1])

    with trio.fail_after(SECONDS):
        async with open_client(URL, open_tcp=open_tcp) as client:
            async with open_server(counter, dialects=(EAGER,)) as server:
                ports.append(int(server.urls[0].rpartition(":")[2]))
                async with open_cutter(server.urls[0], Cut(b"run_finished")) as cutter:
                    ports.append(cutter.port)
                    feed = client.feed("t")
                    await feed.__aenter__()
                    await client.start("counter", {"n": 1}, thread_id="t")
                    first = await anext(feed)
                await until(feed, Custom)
            async with open_server(counter, dialects=(EAGER,)) as server:
                ports.append(int(server.urls[0].rpartition(":")[2]))
                gap = await anext(feed)
                await client.start("counter", {"n": 1}, thread_id="t")
                second = await until(feed, RunStarted)
                await feed.__aexit__()
    assert isinstance(first, RunStarted)
    assert isinstance(gap, Gap)
    assert first.run_id != second.run_id


# Cuts


CUTS = {
    "in the head": b"HTTP/1.1 2",
    "behind the head": b"\r\n\r\n",
    "before the first event": b": agentsse\n\n",
    "in an id": b"id: 2",
    "in an event": b'"name":"ti',
    "in a character": WHALE.encode()[:2],
    "before a blank line": b'"tick"',
    "late": b"event: run_fin",
}


def lines_of(cutter):
    """The request line of each connection."""
    return [bytes(asked).partition(b" HTTP/1.1")[0].decode() for asked in cutter.asked]


@pytest.mark.parametrize("way", ["fin", "rst"])
@pytest.mark.parametrize("place", CUTS)
async def test_a_run_is_whole_wherever_its_socket_is_cut(place, way, monkeypatch):
    """Early, in an event, in a character, late: each event once, in order, to the end."""
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.001)
    with trio.fail_after(SECONDS):
        async with (
            open_server(counter, dialects=(EAGER,)) as server,
            open_cutter(server.urls[0], Cut(CUTS[place], way)) as cutter,
            open_client(cutter.url) as client,
            client.run("counter", {"n": 5, "gap": 0.001}, on_disconnect="grace") as run,
        ):
            events = await everything(run)
            [kept] = list(server.runs)
    assert kept.log.events == events
    assert "success" == run.end.outcome
    started, back = "POST /agents/counter/runs", f"GET /runs/{run.run_id}/events"
    assert [started, started if place == "in the head" else back] == lines_of(cutter)


async def test_each_stream_comes_back_with_the_last_id_it_has():
    """Cut three times, it asks for what it has not got, and for no more."""
    whole = Cut(10**9)
    cuts = [whole, Cut(b"event: custom\nda"), Cut(b"id: 5\nevent: custom\n"), Cut(b"id: 6")]
    told = []
    with trio.fail_after(SECONDS):
        async with (
            open_server(counter, dialects=(EAGER,)) as server,
            open_cutter(server.urls[0], *cuts) as cutter,
            open_client(
                cutter.url, report=lambda event, **facts: told.append((event, facts))
            ) as client,
        ):
            started = await client.start("counter", {"n": 6})
            async with client.stream(started.id) as run:
                events = await everything(run)
    assert list(range(1, 9)) == seqs(events)
    assert ["resuming"] * len(told) == [event for event, _facts in told]
    assert 3 == len(told)
    assert [facts["after"] for _event, facts in told] == cutter.last_ids[1:]
    assert [f"/runs/{started.id}/events"] * len(told) == [facts["path"] for _, facts in told]
    assert all("broke" in facts["reason"] for _event, facts in told)


async def play_cuts(places, way):
    """A run behind a cutter: what its client has seen, and what its log has."""
    cuts = [Cut(place, way) for place in places]
    with trio.fail_after(SECONDS):
        async with (
            open_server(counter, dialects=(EAGER,)) as server,
            open_cutter(server.urls[0], *cuts) as cutter,
            open_client(cutter.url) as client,
            client.run("counter", {"n": 8, "gap": 0.0005}, on_disconnect="grace") as run,
        ):
            events = await everything(run)
            [kept] = list(server.runs)
            return events, kept.log.events


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(min_value=1, max_value=2500), min_size=1, max_size=6),
    st.sampled_from(["fin", "rst"]),
)
def test_a_run_is_whole_whatever_bytes_it_is_cut_behind(places, way):
    """Cut and cut again, at any byte: what is seen is what the log has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "FIRST_WAIT", 0.001)  # before the server has said how long
        seen, kept = trio.run(play_cuts, places, way)
    assert kept == seen


async def test_under_cancel_a_cut_is_the_run_s_end():
    """The server cannot tell it from leaving; the client sees what became of the run."""
    with trio.fail_after(SECONDS):
        async with (
            open_server(forever, dialects=(EAGER,)) as server,
            open_cutter(server.urls[0], Cut(b"event: part_delta")) as cutter,
            open_client(cutter.url) as client,
            client.run("forever") as run,
        ):
            events = await everything(run)
    assert "here" == text_of(events)
    assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)


async def test_a_start_without_a_key_is_not_sent_again():
    """Whether it has begun nobody can tell; so it is said, and is for the caller to decide."""
    with trio.fail_after(SECONDS):
        async with (
            open_server(counter, dialects=(EAGER,)) as server,
            open_cutter(server.urls[0], Cut(b"HTTP/1.1 2")) as cutter,
            open_client(cutter.url) as client,
        ):
            with pytest.raises(Unreachable) as caught:
                await client.run("counter", {"n": 1}).__aenter__()
            assert ["POST /agents/counter/runs"] == lines_of(cutter)
    assert "incomplete" == caught.value.code


async def test_a_stalled_connection_is_waited_for():
    """Silence is no cut: when the line goes on, so does the stream, on the same connection."""
    with trio.fail_after(SECONDS):
        async with (
            open_server(counter, dialects=(EAGER,)) as server,
            open_cutter(server.urls[0], Cut(b"event: custom\nda", "stall")) as cutter,
            open_client(cutter.url) as client,
            client.run("counter", {"n": 3}) as run,
        ):
            first = await anext(run)
            await wait_all_tasks_blocked(0.05)
            cutter.resume.set()
            rest = await everything(run)
            assert 1 == len(cutter.asked)
    assert [1, 2, 3, 4, 5] == seqs([first, *rest])


async def test_a_rotated_stream_goes_on():
    """The server asks its readers to come back now and then; nobody above notices."""
    told = []
    with trio.fail_after(SECONDS):
        async with (
            open_server(counter, dialects=(EAGER,), rotation=0.02) as server,
            open_client(
                server.urls[0], report=lambda _event, **facts: told.append(facts["reason"])
            ) as client,
        ):
            started = await client.start("counter", {"n": 10, "gap": 0.01})
            async with client.stream(started.id) as run:
                events = await everything(run)
            async with client.feed("t") as feed:
                await wait_until(lambda: server.app.streams.closed["rotated"] >= 3)
                await client.start("counter", {"n": 1}, thread_id="t")
                await until(feed, RunFinished)
    assert list(range(1, 13)) == seqs(events)
    assert {"the server asked to come back"} == set(told)


async def test_a_run_that_the_server_has_lost_is_missed_clearly():
    """After a restart nothing is left of it: the error says which run, where, and why."""
    ports = []

    async def open_tcp(host, port):
        return await trio.open_tcp_stream("127.0.0.1", ports[-1])

    with trio.fail_after(SECONDS):
        async with (
            open_server(counter, dialects=(EAGER,)) as anew,
            open_server(counter, dialects=(EAGER,)) as server,
            open_cutter(server.urls[0], Cut(b'"n":1')) as cutter,
            open_client(URL, open_tcp=open_tcp) as client,
        ):
            ports.append(cutter.port)
            async with client.run("counter", {"n": 5}) as run:
                await until(run, Custom)
                ports.append(int(anew.urls[0].rpartition(":")[2]))
                with pytest.raises(ServerError) as caught:
                    await everything(run)
                assert [] == await everything(run)
    assert (404, "not_found") == (caught.value.status, caught.value.code)
    assert caught.value.message.startswith(f"run {run.run_id} is gone, at id 2: the server was")


async def test_a_server_that_stops_ends_its_streams_truthfully():
    """What it cancels on its way out is told, as the end that it is."""
    with trio.fail_after(SECONDS):
        async with AsyncExitStack() as serving:
            server = await serving.enter_async_context(open_server(forever, dialects=(EAGER,)))
            async with open_client(server.urls[0]) as client, client.run("forever") as run:
                await until(run, PartDelta)
                await serving.aclose()
                end = await until(run, RunFinished)
    assert ("cancelled", "shutdown") == (end.outcome, end.receipt.cause)


async def test_where_nobody_listens_it_is_said_at_once():
    """Connection refused: where, why, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with trio.fail_after(SECONDS):
        async with open_client(f"http://127.0.0.1:{port}/") as client:
            for ask in (client.agents, client.stream("x").__aenter__, client.run("x").__aenter__):
                with pytest.raises(Unreachable) as caught:
                    await ask()
                assert "unreachable" == caught.value.code
                assert f"127.0.0.1:{port}: expected to reach it" in caught.value.message
                assert "refused" in caught.value.message
                assert "is the server running? `agentsse serve` starts one" in caught.value.message


async def test_a_connection_is_watched_by_the_kernel():
    """A machine that vanishes says nothing: probes find out."""
    async with site(counter) as (server, _client):
        port = int(server.urls[0].rpartition(":")[2])
        async with await client_module._open_tcp("127.0.0.1", port) as stream:
            assert 1 == stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# Cancelled waits


async def test_a_wait_that_is_cancelled_loses_nothing():
    """A reader with limits of its own reads on afterwards, on the same connection."""
    gate = Gate()
    async with site(gate.agent) as (server, client), client.run("gate") as run:
        seen = [await anext(run), await anext(run)]
        for _ in range(3):
            with trio.move_on_after(0.01):
                seen.append(await anext(run))
        gate.opened.set()
        seen += await everything(run)
        assert 1 == server.connections.accepted
    assert [1, 2, 3, 4] == seqs(seen)
    assert "success" == run.end.outcome


# A server that is a script, in memory, and a clock that jumps


STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%btransfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"


def chunk(data):
    """A chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def streaming(*frames, head=b"", ends=False):
    """An answer that streams; it breaks off unless it ends."""
    return STREAM % head + b"".join(map(chunk, frames)) + (END if ends else b"")


def answering(status, body=b"", *headers):
    """An answer that is no stream."""
    lines = b"".join(b"%b\r\n" % each for each in headers)
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n%b\r\n%b" % (status, len(body), lines, body)


def problem(status, code, detail="no", *headers):
    """An error of agentsse's."""
    body = json.dumps({"code": code, "detail": detail, "status": status}).encode()
    return answering(b"%d No" % status, body, b"content-type: application/problem+json", *headers)


def tick(id, n=0):
    """A frame of a custom event."""
    data = f'{{"type":"custom","seq":{n},"name":"tick","value":{n}}}'
    return encode(data, event="custom", id=id)


FINISHED = encode(
    '{"type":"run_finished","seq":9,"outcome":"success","usage":{},"receipt":{}}',
    event="run_finished",
    id="9",
)
LOCATION = b"location: /runs/r1/events\r\n"


@attrs.define(eq=False)
class Play:
    """A server that gives each connection the next answer; the last one stands for all that follow.

    An exception refuses it; a list has pauses in it; a function makes the answer to a request.

    Attributes:
        heads: The head of each request.
        times: When each connection was asked for.
    """

    answers: deque
    nursery: trio.Nursery
    heads: list = attrs.field(factory=list)
    times: list = attrs.field(factory=list)

    async def open_tcp(self, _host, _port):
        """Connect."""
        await trio.lowlevel.checkpoint()
        self.times.append(trio.current_time())
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        ours, theirs = memory_stream_pair()
        self.nursery.start_soon(self._serve, theirs, answer)
        return ours

    async def _serve(self, stream, answer):
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += await stream.receive_some()
            self.heads.append(head.partition(b"\r\n\r\n")[0].decode().split("\r\n"))
            if callable(answer):
                answer = answer(self.last_ids[-1])
            for piece in answer if isinstance(answer, list) else [answer]:
                if isinstance(piece, bytes):
                    await stream.send_all(piece)
                else:
                    await trio.sleep(piece)
            await stream.aclose()

    @property
    def waits(self):
        """Seconds between one connection and the next."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def last_ids(self):
        """What came as Last-Event-ID, per connection."""
        return [
            next((line.partition(": ")[2] for line in head if line.startswith("last-event")), None)
            for head in self.heads
        ]


@asynccontextmanager
async def playing(*answers, **options):
    """A client of a server that is a script."""
    async with trio.open_nursery() as nursery:
        play = Play(deque(answers), nursery)
        async with open_client(URL, open_tcp=play.open_tcp, **options) as client:
            yield play, client
        nursery.cancel_scope.cancel()


REFUSED = ConnectionRefusedError("connection refused")


async def test_the_waits_grow_and_are_spread(autojump_clock, monkeypatch):
    """Twice as long each time, up to a bound, and a little more at random; then it gives up."""
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    refusals = [REFUSED] * 8
    async with (
        playing(streaming(tick("1")), *refusals, tries=8) as (play, client),
        client.stream("r1") as run,
    ):
        assert "1" == (await anext(run), run.last_id)[1]
        with pytest.raises(Unreachable, match="given up after 8 tries to come back, at id 1"):
            await anext(run)
        assert [] == await everything(run)
    bound = MOST_WAIT * SPREAD[1]
    assert [1.25, 2.5, 5.0, 10.0, 20.0, bound, bound, bound] == play.waits
    assert FIRST_WAIT * SPREAD[1] == play.waits[0]


async def test_the_server_says_how_long_to_wait(autojump_clock, monkeypatch):
    """By `retry:` between the frames, and by Retry-After where it has no room."""
    monkeypatch.setattr(random, "uniform", lambda low, _high: low)
    busy = problem(503, "overloaded", "full", b"retry-after: 70")
    never = problem(500, "internal", "x", b"retry-after: 9999999")
    later = answering(b"502 Bad Gateway", b"<html>", b"retry-after: tomorrow")
    answers = [
        busy,
        streaming(retry(4_000), tick("1")),
        streaming(retry(7_000), tick("2")),
        busy,
        never,
        later,
        streaming(FINISHED),
    ]
    async with playing(*answers) as (play, client), client.stream("r1", after=0) as run:
        events = await everything(run)
    assert [70.0, 4.0, 7.0, 70.0, MOST_PATIENCE, MOST_WAIT] == play.waits
    assert ["0", "0", "1", "2", "2", "2", "2"] == play.last_ids
    assert 3 == len(events)


async def test_a_place_may_be_within_an_event(autojump_clock):
    """Where one event is several frames, the id of the last that came is what is sent back."""
    answers = [streaming(tick("7.1"), tick("7.2"), tick("7")[:-4]), streaming(tick("7"), FINISHED)]
    async with playing(*answers) as (play, client), client.stream("r1", after="6") as run:
        assert "6" == run.last_id
        await anext(run)
        assert "7.1" == run.last_id
        await everything(run)
    assert ["6", "7.2"] == play.last_ids


async def test_an_event_gives_new_patience_and_so_does_time(autojump_clock):
    """It gives up only where nothing comes of it: neither an event nor a connection that lasts."""
    broken = streaming(comment("agentsse"))
    lasting = [broken, LASTING + 1]
    answers = [
        streaming(tick("1")),
        broken, streaming(tick("2")),
        broken, lasting, broken, lasting, broken, broken,
    ]  # fmt: skip
    async with playing(*answers, tries=2) as (play, client), client.stream("r1") as run:
        assert 0 == (await anext(run)).seq
        await anext(run)
        with pytest.raises(Unreachable, match="given up after 2 tries"):
            await anext(run)
        assert [broken] == list(play.answers)  # it stands for the last one


async def test_a_run_s_stream_has_no_end_but_run_finished(autojump_clock):
    """An answer that ends as answers do, without it, is a cut like any other."""
    told = []
    answers = [streaming(tick("1"), ends=True), streaming(FINISHED, ends=True)]
    report = lambda _event, **facts: told.append(facts["reason"])  # noqa: E731
    async with playing(*answers, report=report) as (play, client), client.stream("r1") as run:
        events = await everything(run)
    assert 2 == len(events)
    assert ["0", "1"] == play.last_ids
    assert [f"{URL}: expected run_finished, got the end of the stream"] == told


async def test_a_feed_ends_where_it_is_not_asked_back(autojump_clock):
    """With a farewell it comes back with its place, which needs no event; else it is over."""
    answers = [
        streaming(retry(9), comment("agentsse"), id_only("e-3"), retry(5), ends=True),
        streaming(retry(9), comment("agentsse"), tick("e-4"), ends=True),
    ]
    async with playing(*answers) as (play, client), client.feed(after="now") as feed:
        assert 1 == len(await everything(feed))
        assert "e-4" == feed.last_id
    assert ["now", "e-3"] == play.last_ids
    assert 0.005 <= play.waits[0] <= 0.005 * SPREAD[1]


async def test_a_wait_to_come_back_may_be_cancelled(autojump_clock):
    """The next one waits anew, and nothing is lost."""
    answers = [streaming(tick("1")), streaming(tick("2"), FINISHED)]
    async with playing(*answers) as (play, client), client.stream("r1") as run:
        await anext(run)
        for _ in range(2):
            with trio.move_on_after(0.5):
                await anext(run)
        assert 1 == len(play.times)
        assert 2 == len(await everything(run))
    assert ["0", "1"] == play.last_ids


async def test_a_connection_that_is_read_until_it_closes_is_left_when_a_wait_is(autojump_clock):
    """Where a body has no chunks a cancelled read cannot go on; the stream can, by a new one."""
    head = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n"
    answers = [[head + tick("1"), 60], streaming(FINISHED)]
    async with playing(*answers) as (play, client), client.feed("t") as feed:
        await anext(feed)
        with trio.move_on_after(1):
            await anext(feed)
        assert isinstance(await anext(feed), RunFinished)
    assert [None, "1"] == play.last_ids


async def play_impatience(cuts, patience, size):
    """A reader that gives up each wait after so many seconds, of a run that is cut and slow."""
    frames = [*(tick(str(n), n) for n in range(1, 9)), FINISHED]
    cuts = itertools.cycle(cuts)

    def answer(last_id):
        rest = frames[int(last_id) :]
        whole = streaming(retry(3_000), *rest)
        sent = whole[: len(STREAM) + next(cuts)]
        pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
        return [each for piece in pieces for each in (piece, 1.0)]

    seen, limits = [], itertools.cycle(patience)
    async with playing(answer, tries=1_000) as (_play, client):
        stream = client.stream("r1")
        with trio.move_on_after(1_000) as begun:
            await stream.__aenter__()
        assert not begun.cancelled_caught
        while stream.end is None:
            with trio.move_on_after(next(limits)):
                seen.append(await anext(stream))
        await stream.__aexit__()
    return seqs(seen)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(min_value=200, max_value=900), min_size=1, max_size=4),
    st.lists(st.integers(min_value=1, max_value=200).map(lambda n: n / 4), min_size=1).map(
        lambda some: [*some, 10_000.0]
    ),
    st.integers(min_value=20, max_value=300),
)
def test_waits_may_be_cancelled_anywhere(cuts, patience, size):
    """In a read, in a wait to come back, in a connect: the next goes on, and nothing is lost."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    assert [*range(1, 10)] == trio.run(play_impatience, cuts, patience, size, clock=clock)


async def test_a_start_whose_answer_was_lost_is_sent_again(autojump_clock):
    """With a key, and until it is answered; but not where the server has refused it."""
    started = streaming(tick("1"), head=LOCATION)
    answers = [b"HTTP/1.1 2", REFUSED, problem(503, "overloaded"), started, streaming(FINISHED)]
    async with playing(*answers) as (play, client):
        async with client.run("a b", 1, on_disconnect="continue") as run:
            assert 2 == len(await everything(run))
        assert "r1" == run.run_id
        keys = [line for head in play.heads for line in head if line.startswith("idempotency-key")]
        assert [3, 1] == [len(keys), len(set(keys))]
        lines = [head[0] for head in play.heads]
        assert ["POST /agents/a%20b/runs HTTP/1.1"] * 3 == lines[:3]
        assert ["GET /runs/r1/events HTTP/1.1"] == lines[3:]
        play.answers[0] = problem(503, "overloaded", "full", b"retry-after: 3")
        with pytest.raises(ServerError, match="full") as caught:
            await client.run("a", on_disconnect="grace").__aenter__()
    assert (503, 3.0, True) == (
        caught.value.status, caught.value.retry_after, caught.value.is_transient,
    )  # fmt: skip


async def test_what_comes_back_as_an_error_ends_the_stream(autojump_clock):
    """A refusal that no wait would change is raised, as the server says it."""
    answers = [streaming(tick("1")), problem(410, "gone", "it is gone")]
    async with playing(*answers) as (_play, client), client.stream("r1") as run:
        await anext(run)
        with pytest.raises(ServerError, match=r"^it is gone$"):
            await anext(run)
    answers = [streaming(tick("1")), answering(b"204 No Content")]
    async with playing(*answers) as (_play, client), client.stream("r1") as run:
        assert 1 == len(await everything(run))
    answers = [streaming(tick("1")), problem(404, "not_found", "what?")]
    async with playing(*answers) as (_play, client), client.feed("t") as feed:
        await anext(feed)
        with pytest.raises(ServerError, match=r"^what\?$"):
            await anext(feed)


async def test_what_this_version_does_not_know_is_passed_over(autojump_clock):
    """A newer server may say more; its ids count."""
    newer = encode('{"type":"weather"}', event="weather", id="3")
    answers = [streaming(newer, tick("4"), newer), streaming(FINISHED)]
    async with playing(*answers) as (play, client), client.stream("r1") as run:
        assert 2 == len(await everything(run))
    assert ["0", "3"] == play.last_ids


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (encode("[]", event="custom"), "custom '\\[\\]'"),
        (encode("{", event="custom"), "custom"),
        (b"data: " + b"x" * 1000, "at most 100 bytes"),
    ],
)
async def test_an_event_that_is_none_is_an_error(frame, words, autojump_clock, monkeypatch):
    """What claims to be an event and cannot be read is not passed over; the stream is over."""
    real = client_module.Decoder
    monkeypatch.setattr(
        client_module, "Decoder", lambda **options: real(max_frame_bytes=100, **options)
    )
    async with playing(streaming(frame)) as (_play, client), client.stream("r1") as run:
        with pytest.raises(ServerError, match=words) as caught:
            await anext(run)
        assert [] == await everything(run)
    assert "malformed" == caught.value.code


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 60], "is http://127.0.0.1:8080 an agentsse server?"),
        (answering(b"200 OK", b"<html>", b"content-type: text/html"), "got content-type 'text/ht"),
        (answering(b"404 Not Found", b"<html>"), "status 404, b'<html>'; is the URL right"),
        (answering(b"404 Not Found", b"\xff"), "status 404"),
        (answering(b"302 Found", b"", b"location: /login"), "status 302, to '/login'"),
        (answering(b"304 Not Modified"), "status 304"),
        (streaming(tick("1")), "location ''"),
        (streaming(tick("1"), head=b"location: /elsewhere\r\n"), "location '/elsewhere'"),
    ],
)
async def test_a_server_of_another_kind_is_no_agentsse_server(answer, words, autojump_clock):
    """Whatever it says instead, the error names the URL, and asks whether it is right."""
    async with playing(answer) as (_play, client):
        with pytest.raises(ServerError) as caught:
            await client.run("a").__aenter__()
    assert "malformed" == caught.value.code
    assert words in caught.value.message
    assert not caught.value.is_transient


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"\xff", b'"\xff"'])
async def test_an_answer_that_is_none_is_an_error(body, autojump_clock):
    """JSON of another shape, or none."""
    async with playing(answering(b"200 OK", body)) as (_play, client):
        with pytest.raises(ServerError, match="is the URL right") as caught:
            await client.agents()
    assert "malformed" == caught.value.code
    assert caught.value.message.startswith("GET http://127.0.0.1:8080/agents: expected")


async def test_an_answer_has_a_bound(autojump_clock, monkeypatch):
    """Whoever answers without end is stopped."""
    monkeypatch.setattr(client_module, "MAX_ANSWER", 10)
    async with playing(answering(b"200 OK", b"x" * 11)) as (_play, client):
        with pytest.raises(ServerError, match="got more than 10 bytes"):
            await client.agents()


async def test_an_answer_that_breaks_off_is_an_error(autojump_clock):
    """Half of it is not taken for all of it."""
    async with playing(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{") as (_play, client):
        with pytest.raises(Unreachable) as caught:
            await client.agents()
    assert "incomplete" == caught.value.code


async def test_headers_are_sent_with_every_request(autojump_clock):
    """What a proxy wants to see; a value that cannot be sent is not told."""
    answers = [answering(b"200 OK", b'{"agents":[]}'), streaming(FINISHED)]
    secret = {"Authorization": "Bearer k"}
    async with playing(*answers, headers=secret) as (play, client):
        assert () == await client.agents()
        async with client.stream("r1", types=["custom", "retry"]) as run:
            await everything(run)
    assert all("authorization: Bearer k" in head for head in play.heads)
    assert all("connection: close" in head for head in play.heads)
    assert "GET /runs/r1/events?types=custom%2Cretry HTTP/1.1" == play.heads[1][0]
    async with playing(headers={"Authorization": "Bearer\n“k”"}) as (_play, client):
        with pytest.raises(ServerError) as caught:
            await client.agents()
    assert ("bad_request", 400) == (caught.value.code, caught.value.status)
    assert "“k”" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "http://127.0.0.1:0",
        "http://127.0.0.1:port",
        "http://127.0.0.1:8080/?a=b",
        "http://127.0.0.1:8080/#x",
        "http://user:hunter2@127.0.0.1:8080",
        "http://bücher.example",
    ],
)
async def test_what_is_no_server_s_url_is_refused(url):
    """Before anything is sent, and without a password."""
    with pytest.raises(BadRequest, match="expected the URL of a server") as caught:
        async with open_client(url):
            raise AssertionError
    assert "hunter2" not in caught.value.message


async def test_a_server_may_stand_behind_a_path(autojump_clock):
    """The URL's own path comes first, whatever the server takes its paths for."""
    async with trio.open_nursery() as nursery:
        play = Play(deque([streaming(head=LOCATION), streaming(FINISHED)]), nursery)
        async with (
            open_client("http://127.0.0.1/behind/", open_tcp=play.open_tcp) as client,
            client.run("a") as run,
        ):
            await everything(run)
    assert ["POST /behind/agents/a/runs", "GET /behind/runs/r1/events"] == [
        head[0].removesuffix(" HTTP/1.1") for head in play.heads
    ]


async def test_a_stream_is_read_only_within_its_context():
    """Behind it is a mistake, and said to be one."""
    async with site(counter) as (server, client):
        before = await wait_quiet(server)
        async with client.run("counter", {"n": 3}) as run:
            await anext(run)
        with pytest.raises(trio.ClosedResourceError):
            await anext(run)
        assert before == await wait_quiet(server)


def test_the_client_is_light():
    """It brings no server along."""
    code = """
import sys
from agentsse import Client, ServerError, open_client
print({"quart", "hypercorn", "click", "agentsse.dialects", "agentsse.runs"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
