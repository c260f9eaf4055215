"""Threads, their feeds and triggers, over real sockets in the native dialect.

Rules: a real server on port 0; httpx2 where the client behaves, `raw` where it does not; agents are
told by events what to do next, and nothing waits for the clock but what is about the clock.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import h11
import httpx2
import msgspec
import pytest
import trio
from raw import RawClient, connect, request, wait_quiet, wait_until

from agentsse import Agent, RunContext, agent
from agentsse.app import STREAM_HEADERS
from agentsse.config import LimitSettings, Settings
from agentsse.dialects import (
    Dialect,
    FeedForm,
    Reply,
    Request,
    Route,
    Start,
    Tell,
    WatchFeed,
    negotiate,
)
from agentsse.dialects.native import NATIVE, decode_watch_feed
from agentsse.events import (
    AnyEvent,
    Gap,
    InputRequested,
    MessageReceived,
    RunFinished,
    TriggerChanged,
)
from agentsse.runs import Run, Thread
from agentsse.server import Server
from agentsse.sse import Decoder, Frame
from agentsse.testing import open_server

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds
SSE = {"Accept": "text/event-stream"}


@agent
async def echo(_run: RunContext, input: Any) -> Any:
    """Give back what comes in."""
    await trio.lowlevel.checkpoint()
    return input


@agent
async def silent(_run: RunContext, _input: Any) -> None:
    """Say nothing until cancelled."""
    await trio.sleep_forever()


@agent
async def listening(run: RunContext, input: Any) -> list[Any]:
    """Say what is heard, until told to stop."""
    heard = [input]
    while heard[-1] != "stop":
        heard.append(await run.next_message())
    return heard


@agent
async def asking(run: RunContext, _input: Any) -> list[Any]:
    """Ask twice."""
    return [await run.ask("How?"), await run.ask("Why?")]


@agent
async def pausing(run: RunContext, _input: Any) -> None:
    """Wait for a word, then take a step, if it may."""
    await run.next_message()
    await run.rest_while_paused()
    run.emit("step")


@agent
async def worker(run: RunContext, input: Any) -> None:
    """Say something, with another one below if asked to."""
    run.text("working")
    if input:
        await run.delegate("worker", input - 1)


@agent
async def delegating(run: RunContext, input: Any) -> None:
    """Have workers below."""
    run.emit("before")
    await run.delegate("worker", input)


def gated(gate: trio.Event, *, words: int = 1) -> Agent:
    """An agent that says some words, waits for the gate, and says some more."""

    async def function(run: RunContext, _input: Any) -> None:
        for number in range(words):
            run.emit("word", n=number)
        await gate.wait()
        for number in range(words):
            run.emit("word", n=words + number)

    return Agent("gated", function)


@attrs.frozen(eq=False)
class Site:
    """A server, and a client of it."""

    server: Server
    http: httpx2.AsyncClient
    reports: list[tuple[str, dict[str, Any]]]

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.urls[0]

    @property
    def threads(self) -> dict[str, Thread]:
        """What there is."""
        return self.server.runs.threads

    async def start(self, name: str, **body: Any) -> Run:
        """Start a run in the background."""
        answer = await self.http.post(f"/agents/{name}/runs", json={"background": True, **body})
        assert 202 == answer.status_code
        return self.server.runs.find(answer.json()["id"])

    async def tell(self, thread_id: str, text: str) -> httpx2.Response:
        """Say something to a thread."""
        return await self.http.post(f"/threads/{thread_id}/messages", json={"text": text})


@asynccontextmanager
async def site(
    *agents: Agent,
    limits: LimitSettings | None = None,
    dialects: tuple[Dialect, ...] = (NATIVE,),
    **server: Any,
) -> AsyncIterator[Site]:
    """Serve agents, within the time of a test."""
    reports: list[tuple[str, dict[str, Any]]] = []
    settings = Settings(limits=limits or LimitSettings())
    with trio.fail_after(PATIENCE):
        async with (
            open_server(
                *agents,
                settings=settings,
                dialects=dialects,
                report=lambda event, **facts: reports.append((event, facts)),
                **server,
            ) as opened,
            httpx2.AsyncClient(base_url=opened.urls[0]) as http,
        ):
            yield Site(opened, http, reports)


@asynccontextmanager
async def watching(s: Site, path: str, /, **headers: str) -> AsyncIterator[RawClient]:
    """Read a feed; its first bytes have come."""
    async with connect(s.url) as client:
        await client.send(request("GET", path, accept="text/event-stream", **headers))
        while NATIVE.framing.prelude not in client.body:
            assert await client.receive()
        yield client


async def read_to_end(client: RawClient, run: Run) -> list[Frame]:
    """Read on to the end of a run; the frames so far."""
    while True:
        event = await client.next_event()
        if isinstance(event, RunFinished) and event.run_id == run.id:
            return Decoder().feed(client.body)


def assert_problem(answer: httpx2.Response, status: int, *, says: str = "") -> None:
    """The answer is problem JSON (RFC 9457) that says so."""
    problem = answer.json()
    assert (status, "application/problem+json") == (
        answer.status_code,
        answer.headers["content-type"],
    )
    assert says in problem["detail"]


def types(events: list[AnyEvent]) -> list[str]:
    return [str(event.__struct_config__.tag) for event in events]


# Threads


async def test_a_thread_is_opened_shown_listed_and_closed() -> None:
    """201, then 200 with the same body until it is closed; then it is not there any more."""
    async with site(echo, silent) as s:
        opened = await s.http.post(
            "/threads", json={"id": "t", "agent": "silent", "metadata": {"m": 1}}
        )
        shown = opened.json()
        assert (201, "application/json") == (opened.status_code, opened.headers["content-type"])
        assert ("t", "silent", "idle", True, {"m": 1}, None, []) == (
            *(shown["id"], shown["agent"], shown["state"], shown["is_open"], shown["metadata"]),
            *(shown["run"], shown["runs"]),
        )
        assert shown == (await s.http.get("/threads/t")).json()
        assert {"threads": [shown]} == (await s.http.get("/threads")).json()
        closed = await s.http.delete("/threads/t")
        assert (200, False) == (closed.status_code, closed.json()["is_open"])
        assert {"threads": []} == (await s.http.get("/threads")).json()
        assert_problem(await s.http.get("/threads/t"), 404, says="a thread that is open or has run")


async def test_a_thread_needs_no_body() -> None:
    """It is given an id, and the server's first agent."""
    async with site(echo, silent) as s:
        shown = (await s.http.post("/threads")).json()
        assert (32, "echo", None) == (len(shown["id"]), shown["agent"], shown["metadata"])


REFUSED = [
    ("POST", "/threads", {"agent": "nobody"}, 404, "one of the agents asking, echo, got 'nobody'"),
    ("POST", "/threads", {"id": "open"}, 409, "id of a new thread, got 'open', which is open"),
    ("POST", "/threads", {"id": "a/b"}, 400, "printable characters without '/', got 'a/b'"),
    ("POST", "/threads", {"id": 7}, 400, "a JSON object to open a thread with (id, agent, met"),
    ("POST", "/threads", {"name": "t"}, 400, "unknown field `name`"),
    ("GET", "/threads?limit=1", None, 400, "query: expected no query, got 'limit'"),
    ("GET", "/threads/none", None, 404, "expected the id of a thread that is open or has runs"),
    ("GET", "/threads/open?x=1", None, 400, "query: expected no query"),
    ("DELETE", "/threads/none", None, 404, "thread that is open or has runs, got 'none'"),
    ("POST", "/threads/open/messages", {"text": ""}, 400, "text: expected something to say"),
    ("POST", "/threads/open/messages", {}, 400, "missing required field `text`"),
    ("POST", "/threads/open/messages", {"text": "x", "mode": "now"}, 400, "$.mode"),
    ("POST", "/runs/none/messages", {"text": "x"}, 404, "run that goes on or is still kept"),
    ("POST", "/runs/{over}/messages", {"text": "x"}, 409, "goes on, got {over}, which is over"),
    ("POST", "/runs/none/pause", {}, 404, "run that goes on or is still kept"),
    ("POST", "/runs/none/resume", {}, 404, "run that goes on or is still kept"),
    ("POST", "/runs/{over}/pause", {}, 409, "goes on, got {over}, which is over"),
    ("POST", "/runs/{over}/pause", {"why": 1}, 400, "a JSON object to pause with (reason)"),
    ("PUT", "/threads/open/triggers/k", {"text": "x"}, 400, "missing required field `every_s`"),
    ("PUT", "/threads/open/triggers/k", {"every_s": 0.5, "text": "x"}, 400, "from 1 to a year"),
    ("PUT", "/threads/open/triggers/k", {"every_s": "1", "text": "x"}, 400, "$.every_s"),
    ("PUT", "/threads/none/triggers/k", {"every_s": 5, "text": "x"}, 404, "got 'none'"),
    ("PUT", "/threads/runs/triggers/k", {"every_s": 5, "text": "x"}, 409, "open it first"),
    ("DELETE", "/threads/open/triggers/k", None, 404, "one of the triggers l, got 'k'"),
    ("DELETE", "/threads/runs/triggers/k", None, 409, "open it first"),
    ("GET", "/events?types=nothing", None, 400, "types: expected some of run_started, "),
    ("GET", "/events?types=", None, 400, "types: expected some of run_started, "),
    ("GET", "/events?since=7", None, 400, "query: expected one of after, types, watch, got 'sin"),
    ("GET", "/events?after=7", None, 400, "the id of a feed's event, such as 1f00ba42-7, got '7'"),
    ("GET", "/threads/new/events?after=7", None, 400, "the id of a feed's event"),
    (
        "GET",
        "/threads/runs/events?after={epoch}-99",
        None,
        400,
        "an id up to {epoch}-2, got '{epoch}-99'",
    ),
    ("GET", "/threads/new/events?dialect=native", None, 400, "query: expected one of after"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"), REFUSED, ids=range(len(REFUSED))
)
async def test_what_makes_no_sense_is_refused(
    method: str, path: str, body: Any, status: int, says: str
) -> None:
    """The answer says what was expected, what came, and what to do; nothing stays of it."""
    async with site(asking, echo) as s:
        await s.http.post("/threads", json={"id": "open"})
        await s.http.put("/threads/open/triggers/l", json={"every_s": 99, "text": "x"})
        over = await s.start("echo", thread_id="runs")
        await over.done.wait()
        names = {"over": over.id, "epoch": s.threads["runs"].feed.epoch}
        answer = await s.http.request(method, path.format(**names), json=body)

        assert_problem(answer, status, says=says.format(**names))
        assert {"open", "runs"} == set(s.threads)
        assert [over] == list(s.server.runs)
        assert 1 == len(s.threads["open"].holders)
        assert not s.server.runs.feed.is_read


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/threads", "GET, HEAD, OPTIONS, POST"),
        ("POST", "/threads/t", "DELETE, GET, HEAD, OPTIONS"),
        ("POST", "/threads/t/events", "GET, HEAD, OPTIONS"),
        ("GET", "/threads/t/messages", "OPTIONS, POST"),
        ("POST", "/threads/t/triggers/k", "DELETE, OPTIONS, PUT"),
        ("DELETE", "/events", "GET, HEAD, OPTIONS"),
    ],
)
async def test_wrong_methods_are_told_the_right_ones(method: str, path: str, allow: str) -> None:
    """405 with Allow, and no thread is made."""
    async with site(echo) as s:
        answer = await s.http.request(method, path)
        assert_problem(answer, 405, says=f"got {method}")
        assert (allow, {}) == (answer.headers["allow"], s.threads)


@pytest.mark.parametrize("accept", ["application/json", "text/html", "text/event-stream;q=0"])
@pytest.mark.parametrize("path", ["/events", "/threads/t/events"])
async def test_a_feed_is_refused_to_who_does_not_accept_it(path: str, accept: str) -> None:
    """406, and nothing is made or remembered."""
    async with site(echo) as s:
        answer = await s.http.get(path, headers={"Accept": accept})
        assert_problem(answer, 406, says="expected text/event-stream")
        assert ({}, False) == (s.threads, s.server.runs.feed.is_used)


@pytest.mark.parametrize(
    "name", ["a b", "ä", "%", "a?b", "..a", "x" * 200, "🐙", "a'\"b", "<id>", "a+b", "a:b;c=d"]
)
async def test_ids_may_be_what_a_path_can_carry(name: str) -> None:
    """Escaped in the path, they are the same thread everywhere."""
    escaped = "".join(f"%{byte:02X}" for byte in name.encode())
    place = f"/threads/{escaped}"
    async with site(echo) as s:
        assert 201 == (await s.http.post("/threads", json={"id": name})).status_code
        run = await s.start("echo", input=1, thread_id=name)
        await run.done.wait()
        shown = (await s.http.get(place)).json()
        assert (name, [run.id]) == (shown["id"], shown["runs"])
        triggered = await s.http.put(
            f"{place}/triggers/{escaped}", json={"every_s": 9, "text": "x"}
        )
        assert [name] == [t["trigger_id"] for t in triggered.json()["triggers"]]
        assert 200 == (await s.http.delete(place)).status_code


@pytest.mark.parametrize("thread_id", ["", "a/b", "x" * 201, "a\n", "\0"])
async def test_a_thread_has_an_id_that_a_path_can_name(thread_id: str) -> None:
    """What it is begun by is what it is read and closed by; a run without one is in no thread."""
    async with site(silent) as s:
        answer = await s.http.post("/agents/silent/runs", json={"thread_id": thread_id})
        assert_problem(answer, 400, says="thread_id: expected 1 to 200 printable characters")
        await s.start("silent")
        assert {} == s.threads
        for path in ("/threads/", "/threads//events"):  # and are not taken for another one
            assert 404 == (await s.http.get(path)).status_code


# Saying something


async def test_what_is_said_to_an_idle_thread_begins_a_run() -> None:
    """202 with the thread as it stands then; the thread need not have been there."""
    async with site(listening) as s:
        answer = await s.tell("t", "stop")
        shown = answer.json()
        assert (202, "running", "t") == (answer.status_code, shown["state"], shown["id"])
        run = s.server.runs.find(shown["run"]["id"])
        await run.done.wait()
        assert (["stop"], "continue") == (run.result, str(run.policy))
        assert ["run_started", "message_received", "run_finished"] == types(run.log.events)


async def test_what_is_said_to_a_thread_whose_run_goes_on_is_heard() -> None:
    """By that run, whether it is said to the thread or to the run."""
    async with site(listening) as s:
        run = await s.start("listening", input="start", thread_id="t")
        assert 202 == (await s.tell("t", "one")).status_code
        told = await s.http.post(
            f"/runs/{run.id}/messages", json={"text": "stop", "mode": "follow_up"}
        )
        assert (202, run.id) == (told.status_code, told.json()["id"])
        await run.done.wait()
        assert ["start", "one", "stop"] == run.result
        assert [("one", "steer"), ("stop", "follow_up")] == [
            (e.text, e.mode) for e in run.log.events if isinstance(e, MessageReceived)
        ]


async def test_what_is_said_to_a_thread_that_waits_is_the_answer() -> None:
    """One question after the other; the thread says that it waits."""
    async with site(asking) as s:
        run = s.server.runs.find((await s.tell("t", "begin")).json()["run"]["id"])
        for text in ("so", "thus"):
            await wait_until(lambda: run.state == "waiting")
            shown = (await s.http.get("/threads/t")).json()
            assert ("waiting", 1) == (shown["state"], len(shown["run"]["questions"]))
            assert 202 == (await s.tell("t", text)).status_code
        await run.done.wait()
        assert ["so", "thus"] == run.result


async def test_a_run_that_rests_is_shown_so_until_it_goes_on() -> None:
    """It is paused before its next step; asking twice, or for nothing, changes nothing."""
    async with site(pausing) as s:
        run = await s.start("pausing", thread_id="t")
        for _ in range(2):
            asked = await s.http.post(f"/runs/{run.id}/pause", json={"reason": "tea"})
            assert (200, "running") == (asked.status_code, asked.json()["state"])
        await s.tell("t", "go")
        await wait_until(lambda: run.state == "paused")
        assert "paused" == (await s.http.get("/threads/t")).json()["state"]
        for _ in range(2):
            resumed = await s.http.post(f"/runs/{run.id}/resume")
            assert 200 == resumed.status_code
        await run.done.wait()
        assert ["message_received", "paused", "resumed", "custom"] == types(run.log.events)[1:-1]
        assert "tea" == run.log.events[2].reason


async def test_where_there_is_no_room_a_thread_is_not_made() -> None:
    """503 with Retry-After; nothing stays of it."""
    async with site(silent, limits=LimitSettings(max_running=1, max_queued=0)) as s:
        await s.start("silent")
        answer = await s.tell("t", "x")
        assert_problem(answer, 503, says="all places are taken")
        assert ("1", {}) == (answer.headers["retry-after"], s.threads)


# Feeds


async def test_a_thread_s_feed_is_what_happens_in_it() -> None:
    """First the prelude, then each event as it is, with an id of the feed's own."""
    gate = trio.Event()
    async with site(gated(gate)) as s, watching(s, "/threads/t/events") as client:
        run = await s.start("gated", thread_id="t")
        other = await s.start("gated", thread_id="u")
        gate.set()
        await other.done.wait()
        frames = await read_to_end(client, run)
        feed = s.threads["t"].feed
        assert client.body.startswith(b"retry: 2000\n\n: agentsse\n\n")
        assert STREAM_HEADERS == {name: client.header(name) for name in STREAM_HEADERS}
        assert "text/event-stream; charset=utf-8" == client.header("content-type")
        assert run.log.events == client.events
        assert [(feed.id_of(n), event) for n, event in enumerate(types(run.log.events), 1)] == [
            (frame.id, frame.event) for frame in frames
        ]


async def test_whoever_comes_later_gets_what_is_held() -> None:
    """From every place on: what was before it and what is behind it are the whole."""
    gate = trio.Event()
    gate.set()
    async with site(gated(gate, words=3)) as s:
        run = await s.start("gated", thread_id="t")
        await run.done.wait()
        feed = s.threads["t"].feed
        for place in range(feed.last):
            headers = {} if not place else {"last_event_id": feed.id_of(place)}
            async with watching(s, f"/threads/t/events?after={feed.id_of(3)}", **headers) as client:
                await client.wait_for(RunFinished)
                assert run.log.events[place or 3 :] == client.events
        async with watching(s, "/threads/t/events") as client:
            await client.wait_for(RunFinished)
            assert run.log.events == client.events


async def test_now_is_what_comes() -> None:
    """In an id's place, for a thread; it is what the server's feed begins with by itself."""
    gate = trio.Event()
    gate.set()
    async with site(gated(gate)) as s:
        first = await s.start("gated", thread_id="t")
        await first.done.wait()
        async with (
            watching(s, "/threads/t/events?after=now") as one,
            watching(s, "/events") as all_of,
            watching(s, "/events?after=now") as too,
        ):
            second = await s.start("gated", thread_id="t")
            for client in (one, all_of, too):
                await client.wait_for(RunFinished)
                assert second.log.events == client.events


async def test_the_server_s_feed_has_no_deltas_and_remembers() -> None:
    """It can be come back to behind any id, though nobody read it meanwhile."""
    async with site(delegating, worker) as s:
        async with watching(s, "/events?watch=*") as client:
            run = await s.start("delegating", input=1, thread_id="t")
            seen = await read_to_end(client, run)
        assert "part_delta" not in [frame.event for frame in seen]
        assert {(), ("worker:1",), ("worker:1", "worker:1")} == {e.path for e in client.events}
        again = await s.start("delegating")
        await again.done.wait()
        async with watching(s, "/events?watch=*", last_event_id=seen[3].id) as client:
            frames = await read_to_end(client, again)
        assert [(f.id, f.data) for f in seen[4:]] == [
            (f.id, f.data) for f in frames[: len(seen) - 4]
        ]
        numbers = [int(frame.id.partition("-")[2]) for frame in frames]
        assert list(range(5, 5 + len(frames))) == numbers


async def test_an_id_from_before_a_restart_is_a_gap_without_an_id() -> None:
    """Of each feed; what is held follows, so that the next id is one that is known."""
    async with site(echo) as s:
        run = await s.start("echo", thread_id="t")
        await run.done.wait()
        feed = s.threads["t"].feed
        async with watching(s, "/threads/t/events", last_event_id="0ld-7") as client:
            gap, *frames = await read_to_end(client, run)
            assert {"type": "gap", "from": "0ld-7", "to": feed.id_of(0)} == {
                key: value for key, value in json.loads(gap.data).items() if key != "ts"
            }
            assert ("gap", "") == (gap.event, gap.id)
            assert [feed.id_of(1), feed.id_of(2)] == [frame.id for frame in frames]
        async with watching(s, "/events?after=0ld-7") as client:
            assert isinstance(await client.next_event(), Gap)


async def test_a_reader_that_cannot_keep_up_is_told_what_it_missed() -> None:
    """It stalls, thousands of events go by, it reads on: all in order, but for gaps that say so."""
    gate, stalled = trio.Event(), trio.Event()

    @agent
    async def loud(run: RunContext, _input: Any) -> None:
        for number in range(6_000):
            run.emit("word", n=number, text="x" * 2_000)
            if number % 50 == 0:
                await trio.lowlevel.checkpoint()
            if number == 4_000:
                stalled.set()
                await gate.wait()

    async with site(loud) as s, connect(s.url, receive_buffer=4_096) as client:
        await client.send(request("GET", "/threads/t/events", accept="text/event-stream"))
        await wait_until(lambda: s.server.app.streams.open == 1)
        await s.start("loud", thread_id="t")
        await stalled.wait()
        gate.set()
        await client.wait_for(RunFinished)
        feed, expected, holes = s.threads["t"].feed, 1, 0
        for frame in Decoder().feed(client.body):
            if frame.event == "gap":
                told = json.loads(frame.data)
                assert feed.id_of(expected) == told["from"]
                expected = int(told["to"].partition("-")[2]) + 1
                holes += 1
            else:
                assert feed.id_of(expected) == frame.id
                expected += 1
        assert (6_003, True) == (expected, holes > 0)


async def test_two_readers_of_one_feed_with_filters_of_their_own() -> None:
    """Each gets what it has asked for, and the ends; ids are the feed's for both."""
    async with (
        site(delegating, worker) as s,
        watching(s, "/threads/t/events?types=custom,trigger_changed") as some,
        watching(s, "/threads/t/events?watch=*") as all_of,
        watching(s, "/threads/t/events") as plain,
    ):
        run = await s.start("delegating", input=0, thread_id="t")
        await run.done.wait()
        everything, *others = [await read_to_end(each, run) for each in (all_of, some, plain)]
        assert len(s.threads["t"].feed.events) == len(everything)
        assert [("custom", ()), ("run_finished", ("worker:1",)), ("run_finished", ())] == [
            (str(e.__struct_config__.tag), e.path) for e in some.events
        ]
        assert ["run_started", "run_finished"] == types([e for e in plain.events if e.path])
        known = {(frame.id, frame.data) for frame in everything}
        assert known > {(frame.id, frame.data) for frames in others for frame in frames}


async def test_a_child_run_can_be_watched_by_its_id() -> None:
    """What it says has its path; those that nobody asked for stay brief."""
    async with site(delegating, worker) as s:
        run = await s.start("delegating", input=1, thread_id="t")
        await run.done.wait()
        first, second = sorted(s.threads["t"].workers, key=lambda w: w.log.path)
        async with watching(s, f"/threads/t/events?watch={first.id}") as client:
            await read_to_end(client, run)
        said = {w: [e for e in client.events if e.run_id == w.id] for w in (first, second)}
        assert first.log.events == said[first]
        assert ["run_started", "run_finished"] == types(said[second])
        assert [("worker:1",), ("worker:1", "worker:1")] == [said[w][0].path for w in said]


@pytest.mark.parametrize("path", ["/events", "/threads/t/events", "/threads/t/events?after=junk"])
async def test_head_of_a_feed_makes_nothing(path: str) -> None:
    """The head is that of the stream; nobody reads, no thread is there, nothing is remembered."""
    async with site(echo) as s:
        answer = await s.http.head(path)
        assert (200, b"", "text/event-stream; charset=utf-8") == (
            answer.status_code,
            answer.content,
            answer.headers["content-type"],
        )
        assert ({}, False, 0) == (s.threads, s.server.runs.feed.is_used, s.server.app.streams.open)


@pytest.mark.parametrize("path", ["/events", "/threads/t/events"])
async def test_a_silent_feed_has_heartbeats(path: str) -> None:
    """Comments, behind the prelude, as long as nothing happens."""
    async with site(echo, heartbeat=0.02) as s, watching(s, path) as client:
        while client.body.count(b":\n\n") < 3:
            assert await client.receive()
        assert client.body.startswith(NATIVE.framing.prelude)
        assert b":\n\n" * 3 in client.body
        assert [] == client.events


@pytest.mark.parametrize("path", ["/events", "/threads/t/events"])
async def test_a_feed_is_asked_to_come_back_when_it_is_old(path: str) -> None:
    """With `retry:` as its last word, and nothing lost in between."""
    async with site(echo, rotation=0.05) as s:
        async with watching(s, path) as client:
            await client.finish()
        *_, farewell, _ = client.body.split(b"\n\n")
        assert (True, True) == (farewell.startswith(b"retry: "), client.complete)
        assert 500 <= int(farewell.partition(b" ")[2]) <= 3_000
        await wait_until(lambda: s.server.app.streams.open == 0)
        assert ({"rotated": 1}, {}) == (s.server.app.streams.closed, s.threads)


async def test_a_server_that_stops_ends_feeds_and_opens_none() -> None:
    """They are told when to come back; runs may end by themselves."""
    gate = trio.Event()
    async with (
        site(gated(gate)) as s,
        watching(s, "/events") as all_of,
        watching(s, "/threads/t/events") as one,
    ):
        run = await s.start("gated", thread_id="t")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.server.drain, 20.0)
            for client in (all_of, one):
                await client.finish()
                assert client.body.split(b"\n\n")[-2].startswith(b"retry: ")
            for path in ("/events", "/threads/t/events", "/threads/new/events"):
                refused = await s.http.get(path)
                assert_problem(refused, 503, says="about to stop; try again when it is back")
                assert "5" == refused.headers["retry-after"]
            for refused in (await s.http.post("/threads"), await s.tell("new", "x")):
                assert_problem(refused, 503, says="about to stop")
            assert {"t"} == set(s.threads)
            gate.set()
        assert "success" == run.end.outcome
        await wait_until(lambda: s.server.app.streams.open == 0)
        assert {"shutdown": 2} == s.server.app.streams.closed


# Leaving


@pytest.mark.parametrize("way", ["fin", "rst", "half_close"])
@pytest.mark.parametrize("path", ["/events", "/threads/t/events", "/threads/t/events?watch=*"])
async def test_a_client_that_leaves_a_feed_lets_go_of_it(path: str, way: str) -> None:
    """Nothing is left: no task, no descriptor, no thread."""
    async with site(echo) as s:
        before = await wait_quiet(s.server)
        async with watching(s, path) as client:
            assert 1 == len(s.server.runs.feed._readers) + sum(
                len(thread.feed._readers) for thread in s.threads.values()
            )
            match way:
                case "fin":
                    await client.leave_by_fin()
                case "rst":
                    client.leave_by_rst()
                case _:
                    await client.leave_by_half_close()
            await wait_until(lambda: s.server.app.streams.open == 0)
        await s.http.aclose()
        assert before == await wait_quiet(s.server)
        assert {"client_left": 1} == s.server.app.streams.closed
        assert ({}, set()) == (s.threads, s.server.runs.feed._readers)


async def test_nothing_is_left_of_many_readers() -> None:
    """Who come at once, to threads of their own and the same, and leave in any order."""
    async with site(echo) as s:
        before = await wait_quiet(s.server)
        async with trio.open_nursery() as nursery:

            async def come(number: int) -> None:
                path = f"/threads/{number % 7}/events?watch=w{number % 3}"
                async with connect(s.url) as client:
                    await client.send(request("GET", path))
                    while NATIVE.framing.prelude not in client.body:
                        await client.receive()
                    for _ in range(number % 5):
                        await trio.lowlevel.checkpoint()

            for number in range(60):
                nursery.start_soon(come, number)
        await wait_until(lambda: not s.server.app.streams.open)
        assert ({}, {"client_left": 60}) == (s.threads, s.server.app.streams.closed)
        assert before == await wait_quiet(s.server)


async def test_a_thread_stays_for_its_readers() -> None:
    """Its runs are long forgotten; with its last reader it goes."""
    async with site(echo, limits=LimitSettings(retain_runs=1)) as s:
        async with watching(s, "/threads/t/events") as client:
            async with watching(s, "/threads/t/events"):
                for thread_id in ("t", "u"):
                    await (await s.start("echo", thread_id=thread_id)).done.wait()
                await client.wait_for(RunFinished)
                assert ([], 2) == (s.threads["t"].kept, len(s.threads["t"].holders))
            await wait_until(lambda: len(s.threads["t"].holders) == 1)
            assert {"t", "u"} == set(s.threads)
        await wait_until(lambda: set(s.threads) == {"u"})


async def test_a_feed_s_reader_is_nobody_who_watches_a_run() -> None:
    """It does not keep a run that its last reader has left, and its leaving ends none."""
    async with site(silent) as s:
        run = await s.start("silent", thread_id="t", on_disconnect="cancel")
        async with watching(s, "/threads/t/events"):
            pass
        await wait_until(lambda: s.server.app.streams.open == 0)
        assert "running" == run.state
        async with watching(s, "/threads/t/events") as client:
            async with watching(s, f"/runs/{run.id}/events"):
                assert "running" == run.state
            end = await client.wait_for(RunFinished)
            assert ("cancelled", "disconnect") == (end.outcome, end.receipt.cause)


@pytest.mark.parametrize("round", range(8))
async def test_closing_a_thread_ends_its_streams_behind_its_last_event(round: int) -> None:
    """Those who watch see how it ended, and then the end; other streams go on."""
    async with (
        site(silent) as s,
        watching(s, "/threads/t/events") as client,
        watching(s, "/threads/u/events") as other,
    ):
        await s.http.post("/threads", json={"id": "t", "agent": "silent"})
        run = s.server.runs.find((await s.tell("t", "x")).json()["run"]["id"])
        closed = await s.http.delete("/threads/t")
        await client.finish()
        assert (200, "idle", "finished") == (
            closed.status_code,
            closed.json()["state"],
            closed.json()["run"]["state"],
        )
        assert client.complete
        assert run.log.events == client.events
        assert ("cancelled", "client_cancel") == (run.end.outcome, run.end.receipt.cause)
        await wait_until(lambda: s.server.app.streams.open == 1)
        assert {"finished": 1} == s.server.app.streams.closed
        assert ({"u"}, False) == (set(s.threads), other.complete)


async def test_whoever_comes_back_to_a_thread_that_was_closed_finds_another() -> None:
    """Its old id is a gap there."""
    async with site(echo) as s:
        await (await s.start("echo", thread_id="t")).done.wait()
        last = s.threads["t"].feed.id_of(2)
        await s.http.delete("/threads/t")
        async with watching(s, "/threads/t/events", last_event_id=last) as client:
            gap = await client.next_event()
            assert (last, s.threads["t"].feed.id_of(0)) == (gap.from_id, gap.to_id)


# Triggers


async def test_a_trigger_is_set_fires_and_is_dropped() -> None:
    """Each change is in the thread's feed; the thread shows it as it stands."""
    async with site(echo) as s, watching(s, "/threads/t/events") as client:
        await s.http.post("/threads", json={"id": "t"})
        body = {"every_s": 1, "text": "tick", "name": "clock"}
        answer = await s.http.put("/threads/t/triggers/k", json=body)
        [shown] = answer.json()["triggers"]
        assert (200, "k", "activated", 1.0, "tick", "clock") == (
            *(answer.status_code, shown["trigger_id"], shown["change"], shown["every_s"]),
            *(shown["text"], shown["name"]),
        )
        end = await client.wait_for(RunFinished)
        assert b'"tick"' == bytes(end.result)
        dropped = await s.http.delete("/threads/t/triggers/k")
        assert (200, []) == (dropped.status_code, dropped.json()["triggers"])
        while not (
            isinstance(event := await client.next_event(), TriggerChanged)
            and event.change == "removed"
        ):
            pass
        changes = [e.change for e in client.events if isinstance(e, TriggerChanged)]
        assert ["available", "activated", "fired", "removed"] == changes
        assert types(client.events)[:5] == [
            *("trigger_changed", "trigger_changed", "run_started"),
            *("message_received", "trigger_changed"),
        ]


async def test_a_trigger_that_is_not_active_waits_to_be() -> None:
    """It is there, and has no next time."""
    async with site(echo) as s:
        await s.http.post("/threads", json={"id": "t"})
        body = {"every_s": 60, "text": "tick", "active": False}
        for active, change in ((False, "available"), (True, "activated"), (False, "available")):
            answer = await s.http.put("/threads/t/triggers/k", json={**body, "active": active})
            [shown] = answer.json()["triggers"]
            assert (change, active) == (shown["change"], "next_at" in shown)


# What a dialect of its own may ask for


def talks(name: str = "talks", **form: Any) -> Dialect:
    """A dialect that goes on with a thread's run where that waits for a person."""

    def start(request: Request) -> Start:
        body = json.loads(request.body)
        return Start(
            agent="asking",
            input=body["input"],
            delivery=negotiate(request.headers.get("accept", "*/*")),
            thread_id=body.get("thread_id"),
            resumes=True,
            if_busy="enqueue",
        )

    def watch(request: Request) -> WatchFeed:
        return msgspec.structs.replace(decode_watch_feed(request), must_exist=True)

    def tell(request: Request) -> Tell:
        return Tell(
            text="secret",
            shown="shown",
            thread_id=request.parameters["thread_id"],
            must_exist=True,
            thread_reply=lambda thread, events: Reply(
                json.dumps([thread.state, len(events)]).encode()
            ),
        )

    return attrs.evolve(
        NATIVE,
        name=name,
        mount=f"/{name}",
        routes=(
            Route("POST", "/turns", start),
            Route("GET", "/<thread_id>/events", watch),
            Route("POST", "/<thread_id>/told", tell),
        ),
        framing=attrs.evolve(
            NATIVE.framing, farewell=lambda _ms: b"", ends_at=frozenset({InputRequested})
        ),
        **form,
    )


async def test_a_turn_goes_on_with_the_run_that_waits() -> None:
    """Each stream ends with the next question; the answer's stream begins behind the one before."""
    async with site(asking, dialects=(NATIVE, talks())) as s:
        turns = [
            await s.http.post("/talks/turns", json={"input": text, "thread_id": "t"}, headers=SSE)
            for text in ("begin", "so", "thus", "again")
        ]
        runs = list(s.server.runs)
        told = [[frame.event for frame in Decoder().feed(turn.content)] for turn in turns]
        assert [
            ["run_started", "input_requested"],
            ["input_received", "input_requested"],
            ["input_received", "run_finished"],
            ["run_started", "input_requested"],
        ] == told
        assert (2, 4, ["so", "thus"]) == (
            len(runs),
            len([turn for turn in turns if turn.status_code == 200]),
            s.threads["t"].kept[0].result,
        )
        places = [turn.headers["location"] for turn in turns]
        assert [places[0]] * 3 == places[:3]
        assert places[3] != places[0]


async def test_a_turn_may_be_waited_for() -> None:
    """The answer is the run as it stands when it asks, or is over."""
    async with site(asking, dialects=(NATIVE, talks())) as s:
        states = []
        for text in ("begin", "so", "thus"):
            turn = await s.http.post("/talks/turns", json={"input": text, "thread_id": "t"})
            states.append((turn.status_code, turn.json()["state"], len(turn.json()["questions"])))
        assert [(200, "waiting", 1), (200, "waiting", 1), (200, "finished", 0)] == states


async def test_a_turn_without_a_thread_begins_a_run_each_time() -> None:
    """There is nothing that it could go on with."""
    async with site(asking, dialects=(NATIVE, talks())) as s:
        for _ in range(2):
            turn = await s.http.post("/talks/turns", json={"input": "x"}, headers=SSE)
            assert 200 == turn.status_code
        assert ["waiting"] * 2 == [run.state for run in s.server.runs]


async def test_a_thread_that_must_exist_is_not_made() -> None:
    """404 for its feed, and for what is said to it; one that is there is told."""
    async with site(asking, dialects=(NATIVE, talks())) as s:
        assert_problem(await s.http.get("/talks/t/events"), 404, says="got 't'")
        assert_problem(await s.http.post("/talks/t/told"), 404, says="got 't'")
        assert {} == s.threads
        await s.http.post("/threads", json={"id": "t"})
        told = await s.http.post("/talks/t/told")
        assert (200, ["running", 2]) == (told.status_code, told.json())
        [run] = s.threads["t"].active
        assert (b'"secret"', "shown") == (bytes(run.input), run.log.events[1].text)


async def test_a_dialect_without_feeds_says_so() -> None:
    """404, and no thread is made."""
    async with site(asking, dialects=(NATIVE, talks(feed=None))) as s:
        await s.http.post("/threads", json={"id": "t"})
        assert_problem(await s.http.get("/talks/t/events"), 404, says="dialect that shows feeds")
        assert 1 == len(s.threads["t"].holders)


async def test_a_feed_may_greet_and_pick_what_it_replays() -> None:
    """Its greeting comes first; whoever has an id gets everything behind it."""
    form = attrs.evolve(
        NATIVE.feed,
        greeting=lambda thread, _options: f": {thread.state} {len(thread.runs)}\n\n".encode(),
        replay=lambda events, _options: [len(events) - 1],
    )
    async with site(echo, dialects=(NATIVE, talks(feed=form))) as s:
        run = await s.start("echo", thread_id="t")
        await run.done.wait()
        async with watching(s, "/talks/t/events") as client:
            await client.wait_for(RunFinished)
            assert client.body.startswith(NATIVE.framing.prelude + b": idle 1\n\nid: ")
            assert run.log.events[-1:] == client.events
        after = s.threads["t"].feed.id_of(0)
        async with watching(s, "/talks/t/events", last_event_id=after) as client:
            await client.wait_for(RunFinished)
            assert run.log.events == client.events


# What goes wrong on our side


@attrs.frozen
class _Broken:
    """An encoder that fails at the end of a run."""

    def feed(self, event: AnyEvent, _id: str) -> tuple[bytes, ...]:
        if isinstance(event, RunFinished):
            raise ZeroDivisionError
        return (b": fine\n\n",)


async def test_an_encoder_that_fails_breaks_off_the_stream_and_nothing_else() -> None:
    """The run ends well, other streams go on, and the thread is let go of."""
    form = FeedForm(encoder=lambda _options: _Broken())
    gate = trio.Event()
    async with site(gated(gate), dialects=(NATIVE, talks(feed=form))) as s:
        await s.http.post("/threads", json={"id": "t"})
        async with watching(s, "/threads/t/events") as fine, watching(s, "/talks/t/events") as bad:
            run = await s.start("gated", thread_id="t")
            gate.set()
            with pytest.raises(h11.RemoteProtocolError):
                await bad.finish()
            await fine.wait_for(RunFinished)
        await wait_until(lambda: s.server.app.streams.open == 0)
        assert "success" == run.end.outcome
        assert {"error": 1, "client_left": 1} == s.server.app.streams.closed
        assert (1, set()) == (len(s.threads["t"].holders), s.threads["t"].feed._readers)


@pytest.mark.parametrize("what", ["greeting", "replay"])
async def test_a_feed_that_cannot_be_opened_is_let_go_of(what: str) -> None:
    """500, and the thread that was made for it goes again."""

    def fail(*_args: Any) -> Any:
        raise ZeroDivisionError

    form = attrs.evolve(NATIVE.feed, **{what: fail})
    dialect = attrs.evolve(NATIVE, name="broken", mount="/broken", feed=form)
    async with site(echo, dialects=(NATIVE, dialect)) as s:
        answer = await s.http.get("/broken/threads/t/events")
        assert_problem(answer, 500, says="the server raised ZeroDivisionError")
        assert ({}, 0) == (s.threads, s.server.app.streams.open)


async def test_a_feed_whose_thread_has_nobody_to_run_is_let_go_of() -> None:
    """404 where the server has no agents; the thread that was made for it goes again."""
    async with site() as s:
        answer = await s.http.get("/threads/t/events")
        assert_problem(answer, 404, says="expected one of the agents (none)")
        assert {} == s.threads


async def test_a_thread_whose_run_will_not_go_is_not_waited_for_for_ever() -> None:
    """202, as for a run that is cancelled and takes its time."""
    release = trio.Event()

    @agent
    async def stubborn(_run: RunContext, _input: Any) -> None:
        with trio.CancelScope(shield=True):
            await release.wait()

    async with site(stubborn) as s:
        s.server.app.options = attrs.evolve(s.server.app.options, cancel_patience=0.05)
        await s.tell("t", "x")
        with trio.move_on_after(5) as scope:
            closed = await s.http.delete("/threads/t")
            assert 202 == closed.status_code
        release.set()
        assert not scope.cancelled_caught


async def test_a_feed_that_was_silent_can_be_come_back_to() -> None:
    """Who is sent away before anything has happened knows its place: else there is a hole."""
    async with site(echo, rotation=0.05) as s:
        for path in ("/events", "/threads/t/events?after=now"):
            async with watching(s, path) as client:
                await client.finish()
            assert "" != client.decoder.last_id, path
