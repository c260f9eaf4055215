"""HTTP over real sockets: routes, negotiation, streams from every place on, refusals, bounds.

Rules: a real server on port 0; httpx2 where the client behaves, `raw` where it does not; agents
are told by events what to do next, and nothing waits for the clock but what is about the clock.
"""

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import attrs
import h11
import httpx2
import msgspec
import pytest
import trio
from raw import RawClient, connect, request, stream_run, wait_quiet, wait_until
from trio.testing import assert_checkpoints

from agentsse import Agent, AgentError, RunContext, agent, emit, server as server_module, tool
from agentsse.app import STREAM_HEADERS, AgentsseApp
from agentsse.config import LimitSettings, Settings
from agentsse.dialects import Framing, Route
from agentsse.dialects.native import NATIVE, decode_list_agents
from agentsse.errors import ConfigError
from agentsse.events import Custom, InputRequested, RunFinished, RunStarted, StepStarted
from agentsse.exchange import AppOptions
from agentsse.listener import Counts
from agentsse.log import MAX_WRITE
from agentsse.runs import Runs, open_runs
from agentsse.server import Server
from agentsse.sse import Decoder
from agentsse.testing import open_server, read_events

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds
NOT_SEEN = 0.3  # seconds that something is given to happen that must not
SSE = {"Accept": "text/event-stream"}


# Agents


@agent
async def echo(_run: RunContext, input: Any) -> Any:
    """Give back what comes in."""
    return input


@agent
async def count(_run: RunContext, input: Any) -> None:
    """Emit as many events as asked for."""
    for number in range(input):
        emit("tick", n=number)
        await trio.lowlevel.checkpoint()


@agent(on_disconnect="continue")
async def silent(_run: RunContext, _input: Any) -> None:
    """Say nothing until cancelled."""
    await trio.sleep_forever()


@agent
async def fail(_run: RunContext, input: Any) -> None:
    """End with the error that the client is to read."""
    raise AgentError("expected luck, got none", code="unlucky", status=input)


def gated(gate: trio.Event, *words: str) -> Agent:
    """An agent that says some words, waits for the gate, and says them again."""

    async def function(run: RunContext, _input: Any) -> None:
        for word in words:
            run.emit(word)
        await gate.wait()
        for word in words:
            run.emit(word)

    return Agent("gated", function)


@attrs.frozen(eq=False)
class Site:
    """A server, a client of it, and what it has reported."""

    server: Server
    http: httpx2.AsyncClient
    reports: list[tuple[str, dict[str, Any]]]

    async def post(self, path: str, content: bytes = b"{}", /, **headers: str) -> httpx2.Response:
        """Post bytes, with headers; `_` stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, content=content, headers=named)

    async def start(self, name: str, **body: Any) -> str:
        """Start a run in the background; its id."""
        answer = await self.http.post(f"/agents/{name}/runs", json={"background": True, **body})
        assert 202 == answer.status_code
        run_id: str = answer.json()["id"]
        return run_id

    async def finished(self, name: str, **body: Any) -> str:
        """Run an agent to its end; the run's id."""
        run_id = await self.start(name, **body)
        await self.server.runs.find(run_id).done.wait()
        return run_id

    async def ids(self, run_id: str, **headers: str) -> list[str]:
        """The ids of what a stream has to say from a place on."""
        answer = await self.http.get(f"/runs/{run_id}/events", headers=headers)
        assert answer.status_code in (200, 204)
        return [frame.id for frame in Decoder().feed(answer.content)]


@asynccontextmanager
async def site(
    *agents: Agent, limits: LimitSettings | None = None, **server: Any
) -> AsyncIterator[Site]:
    """Serve agents, within the time of a test."""
    reports: list[tuple[str, dict[str, Any]]] = []

    def report(event: str, /, **facts: Any) -> None:
        reports.append((event, facts))

    settings = Settings(limits=limits or LimitSettings())
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, settings=settings, report=report, **server) as opened,
            httpx2.AsyncClient(base_url=opened.urls[0]) as http,
        ):
            yield Site(opened, http, reports)


async def wait_no_stream(server: Server) -> None:
    """Wait until no stream is open."""
    await wait_until(lambda: server.app.streams.open == 0)


def assert_problem(answer: httpx2.Response, status: int, *, says: str = "") -> None:
    """The answer is problem JSON (RFC 9457) that says so."""
    problem = answer.json()
    assert status == answer.status_code
    assert "application/problem+json" == answer.headers["content-type"]
    assert {"type", "title", "status", "detail", "code"} == set(problem)
    assert ("about:blank", status) == (problem["type"], problem["status"])
    assert says in problem["detail"]


# Which answer a client gets

ACCEPTED = [
    ("*/*", "json"),
    ("", "json"),
    (",;q=1", "json"),
    ("application/json", "json"),
    ("application/*", "json"),
    ("text/html, */*;q=0.1", "json"),
    ("text/event-stream", "stream"),
    ("TEXT/Event-Stream", "stream"),
    ("text/*", "stream"),
    ("application/json, text/event-stream", "stream"),
    ("text/event-stream, */*", "stream"),
    ("text/*, application/json", "json"),
    ("text/event-stream;q=0.5, application/json", "json"),
    ("text/event-stream, application/json;q=0.9", "stream"),
    ("text/event-stream;level=1;q=0.3, application/json ; q=0.2", "stream"),
    ("*/*;q=0.1, text/event-stream;q=0.05", "json"),
    ("text/event-stream;q=0, */*", "json"),
    ("text/event-stream;q=junk, application/json", "json"),
    ("text/event-stream;q=7, application/json;q=1", "stream"),
    ("text/event-stream;q=0", "406"),
    ("text/html", "406"),
    ("application/json;q=nan", "406"),
]


@pytest.mark.parametrize(("accept", "expected"), ACCEPTED)
async def test_accept_decides_between_stream_and_json(accept: str, expected: str) -> None:
    """The type of higher quality wins; `*/*` alone means JSON; on a tie a named stream wins."""
    async with site(echo) as s:
        answer = await s.post("/agents/echo/runs", accept=accept)
        kind = answer.headers["content-type"]

        assert expected == {
            "application/json": "json",
            "text/event-stream; charset=utf-8": "stream",
            "application/problem+json": "406",
        }.get(kind)
        assert (406 if expected == "406" else 200) == answer.status_code


@pytest.mark.parametrize("accept", ["*/*", "text/*;q=0.1", "text/event-stream, text/html", ""])
async def test_events_are_a_stream_whatever_else_is_accepted(accept: str) -> None:
    """Where there is only one kind of answer, it need only be acceptable."""
    async with site(echo) as s:
        run_id = await s.finished("echo")
        answer = await s.http.get(f"/runs/{run_id}/events", headers={"Accept": accept})

        assert 200 == answer.status_code


@pytest.mark.parametrize("accept", ["application/json", "text/html", "text/event-stream;q=0"])
async def test_events_are_refused_to_who_does_not_accept_them(accept: str) -> None:
    """406, and no stream is opened."""
    async with site(silent) as s:
        run_id = await s.start("silent")
        answer = await s.http.get(f"/runs/{run_id}/events", headers={"Accept": accept})

        assert_problem(answer, 406, says="expected text/event-stream")


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"background": true}', {}),
        (b'{"background": true}', SSE),
        (b"{}", {"Prefer": "respond-async"}),
        (b"{}", {"Prefer": 'wait=10, Respond-Async; strict="yes"'}),
    ],
)
async def test_background_is_answered_at_once(body: bytes, headers: dict[str, str]) -> None:
    """202 with the run as it stands and its place; nobody needs to watch it."""
    async with site(Agent("plain", silent.function)) as s:
        answer = await s.post("/agents/plain/runs", body, **headers)
        shown = answer.json()

        assert 202 == answer.status_code
        assert f"/runs/{shown['id']}/events" == answer.headers["location"]
        assert ("running", "continue") == (shown["state"], shown["on_disconnect"])


async def test_json_waits_for_the_end() -> None:
    """Without a stream the answer is the finished run, with its result and where its events are."""
    async with site(echo) as s:
        answer = await s.post("/agents/echo/runs", b'{"input": {"x": [1]}, "metadata": "mine"}')
        shown = answer.json()

        assert 200 == answer.status_code
        assert f"/runs/{shown['id']}/events" == answer.headers["location"]
        assert "no-store" == answer.headers["cache-control"]
        assert ("finished", "success", {"x": [1]}) == (
            shown["state"],
            shown["outcome"],
            shown["result"],
        )
        assert ({"x": [1]}, "mine", "cancel") == (
            shown["input"],
            shown["metadata"],
            shown["on_disconnect"],
        )
        assert shown == (await s.http.get(f"/runs/{shown['id']}")).json()


@pytest.mark.parametrize(("status", "shown"), [(422, 422), (503, 503), (200, 500), (700, 500)])
async def test_error_outcome_is_problem_json_with_its_status(status: int, shown: int) -> None:
    """Who waits for JSON learns from the status that the run failed, and where its events are."""
    async with site(fail) as s:
        answer = await s.post("/agents/fail/runs", b'{"input": %d}' % status)
        problem = answer.json()

        assert shown == answer.status_code
        assert "application/problem+json" == answer.headers["content-type"]
        assert ("unlucky", "expected luck, got none") == (problem["code"], problem["detail"])
        assert answer.headers["location"].endswith("/events")


async def test_error_outcome_of_a_stream_is_its_last_event() -> None:
    """A stream has said 200 long before: the error is in its end."""
    async with site(fail) as s:
        answer = await s.post("/agents/fail/runs", b'{"input": 422}', **SSE)
        *_, last = Decoder().feed(answer.content)
        end = json.loads(last.data)

        assert 200 == answer.status_code
        assert ("run_finished", "error") == (last.event, end["outcome"])
        assert {"code": "unlucky", "message": "expected luck, got none", "status": 422} == end[
            "error"
        ]


# Starting


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"]
)
async def test_bodies_are_json_whatever_they_are_called(kind: str) -> None:
    """`curl -d` says form; what is meant is JSON."""
    async with site(echo) as s:
        answer = await s.post("/agents/echo/runs", b'{"input": "a=b&c"}', content_type=kind)

        assert "a=b&c" == answer.json()["result"]


async def test_no_body_is_an_empty_one() -> None:
    """Everything in a start's body has a default."""
    async with site(echo) as s:
        answer = await s.http.post("/agents/echo/runs")

        assert (200, None) == (answer.status_code, answer.json()["result"])


BAD_STARTS = [
    (b"{", "expected JSON to start a run with"),
    (b"[]", "expected a JSON object"),
    (b"3", "expected a JSON object"),
    (b'"\xff"', "expected"),
    (b'{"input": "\\ud800"}', "expected JSON"),
    (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "expected JSON"),
    (b'{"input": ' + b"9" * 5_000 + b"}", "expected"),
    (b'{"input": 1e999}', "out of range"),
    (b'{"inputs": 1}', "inputs"),
    (b'{"thread_id": 7}', "$.thread_id"),
    (b'{"background": "yes"}', "$.background"),
    (b'{"if_busy": "wait"}', "$.if_busy"),
    (b'{"coalesce_ms": -1}', "coalesce_ms: expected a number from 0 to 10000"),
    (b'{"timeout_s": 86401}', "timeout_s: expected a number from 0 to 86400"),
    (b'{"timeout_s": 1e309}', "expected"),
    (b'{"on_disconnect": "never"}', "on_disconnect: expected 'cancel'"),
    (b'{"on_disconnect": "grace:-1"}', "on_disconnect: expected 'cancel'"),
]


@pytest.mark.parametrize(("body", "says"), BAD_STARTS, ids=range(len(BAD_STARTS)))
async def test_start_that_makes_no_sense_is_refused(body: bytes, says: str) -> None:
    """400 says what was expected; nothing has been started."""
    async with site(echo) as s:
        answer = await s.post("/agents/echo/runs", body)

        assert_problem(answer, 400, says=says)
        assert [] == list(s.server.runs)


async def test_unknown_agent_is_answered_with_those_there_are() -> None:
    """404 names the agents that are known."""
    async with site(echo, silent) as s:
        answer = await s.post("/agents/nobody/runs")

        assert_problem(answer, 404, says="expected one of the agents echo, silent, got 'nobody'")


async def test_settings_of_one_run() -> None:
    """Policy, coalescing and time limit of a start hold for its run."""

    @agent
    async def talks(run: RunContext, _input: Any) -> None:
        for _ in range(3):
            run.text("x")
        await trio.sleep_forever()

    async with site(talks) as s:
        answer = await s.post(
            "/agents/talks/runs",
            b'{"on_disconnect": "grace:7", "coalesce_ms": 0, "timeout_s": 0.05}',
            **SSE,
        )
        frames = list(Decoder().feed(answer.content))
        first, last = json.loads(frames[0].data), json.loads(frames[-1].data)

        assert 3 == sum(frame.event == "part_delta" for frame in frames)
        assert "grace:7" == first["on_disconnect"]
        assert ("cancelled", "deadline") == (last["outcome"], last["receipt"]["cause"])


async def test_idempotency_key_finds_the_same_run() -> None:
    """The same key and body: the same run, from its first event on, also when it is over."""
    async with site(count) as s:
        first = await s.post("/agents/count/runs", b'{"input": 3}', idempotency_key="k", **SSE)
        again = await s.post("/agents/count/runs", b'{"input": 3}', idempotency_key="k", **SSE)
        waited = await s.post("/agents/count/runs", b'{"input": 3}', idempotency_key="k")
        other = await s.post("/agents/count/runs", b'{"input": 3}', idempotency_key="other")

        assert first.content == again.content
        assert first.headers["location"] == again.headers["location"] == waited.headers["location"]
        assert "grace:30" == waited.json()["on_disconnect"]
        assert other.headers["location"] != first.headers["location"]
        assert 2 == len(list(s.server.runs))


async def test_idempotency_key_with_another_body_is_refused() -> None:
    """422: it is not known which of the two was meant."""
    async with site(echo) as s:
        await s.post("/agents/echo/runs", b'{"input": 1}', idempotency_key="k")
        answer = await s.post("/agents/echo/runs", b'{"input": 2}', idempotency_key="k")

        assert_problem(answer, 422, says="use a new key")


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_idempotency_key_has_bounds(key: str) -> None:
    """It is kept with its run, so it is short and printable."""
    async with site(echo) as s:
        answer = await s.post("/agents/echo/runs", idempotency_key=key)

        assert_problem(answer, 400, says="Idempotency-Key")


async def test_second_run_on_a_thread_is_refused_or_waits() -> None:
    """One run at a time on a thread: 409, unless the client wants to wait its turn."""
    gate = trio.Event()
    async with site(gated(gate)) as s:
        first = await s.start("gated", thread_id="t")
        refused = await s.post("/agents/gated/runs", b'{"thread_id": "t"}')
        second = await s.start("gated", thread_id="t", if_busy="enqueue")
        waiting = (await s.http.get(f"/runs/{second}")).json()
        gate.set()
        await s.server.runs.find(second).done.wait()
        shown = (await s.http.get(f"/runs/{second}")).json()

        assert_problem(refused, 409, says=first)
        assert "queued" == waiting["state"]
        assert ("finished", "success", "t") == (
            shown["state"],
            shown["outcome"],
            shown["thread_id"],
        )


async def test_full_queue_is_answered_with_when_to_come_back() -> None:
    """503 with Retry-After; who is in the queue stays there."""
    async with site(silent, limits=LimitSettings(max_running=1, max_queued=1)) as s:
        await s.start("silent")
        await s.start("silent")
        answer = await s.post("/agents/silent/runs")
        queued = (await s.http.get("/runs", params={"state": "queued"})).json()["runs"]

        assert_problem(answer, 503, says="try again later")
        assert "1" == answer.headers["retry-after"]
        assert 1 == len(queued)


async def test_body_over_the_limit_is_refused() -> None:
    """413, whether its length was announced or not; below the limit it passes."""
    async with site(echo, max_body=1_000) as s:
        small = await s.post("/agents/echo/runs", json.dumps({"input": "x" * 900}).encode())
        large = await s.post("/agents/echo/runs", json.dumps({"input": "x" * 1_000}).encode())
        async with connect(s.server.urls[0]) as client:
            head = request("POST", "/agents/echo/runs", transfer_encoding="chunked")
            await client.send(head + b"400\r\n" + b" " * 1024 + b"\r\n")
            await client.finish()
            chunked = client.status

        assert 200 == small.status_code
        assert_problem(large, 413, says="at most 1000 bytes")
        assert 413 == chunked


# Streams


async def test_stream_is_for_events_and_for_nobody_to_keep() -> None:
    """The headers that keep proxies and browsers from buffering, storing and guessing."""
    async with site(echo) as s:
        started = await s.post("/agents/echo/runs", **SSE)
        watched = await s.http.get(started.headers["location"])

        for answer in (started, watched):
            assert "text/event-stream; charset=utf-8" == answer.headers["content-type"]
            for name, value in STREAM_HEADERS.items():
                assert value == answer.headers[name]
            for name in ("content-length", "content-encoding", "server"):
                assert name not in answer.headers


async def read_past(client: RawClient, text: bytes) -> None:
    """Read until that stands in the body."""
    while text not in client.body:
        assert await client.receive()


@pytest.mark.parametrize("places", [0, 1], ids=["queued", "running"])
async def test_first_bytes_come_before_any_event(places: int) -> None:
    """Prelude at once: the client knows that it is connected, though there is nothing to say."""
    async with site(silent, limits=LimitSettings(max_running=1)) as s:
        if not places:
            await s.start("silent")
        async with connect(s.server.urls[0]) as client:
            await client.send(stream_run("silent"))
            await read_past(client, b"retry: 2000\n\n: agentsse\n\n")

            assert 200 == client.status
            assert client.body.startswith(b"retry: 2000\n\n: agentsse\n\n")


async def test_silence_is_filled_with_heartbeats() -> None:
    """A comment after each stretch of silence, without an id; also for a run in the queue."""
    async with site(silent, heartbeat=0.03, limits=LimitSettings(max_running=1)) as s:
        await s.start("silent")
        async with connect(s.server.urls[0]) as client:
            await client.send(stream_run("silent"))
            await read_past(client, b"agentsse\n\n:\n\n:\n\n:\n\n")

            assert [] == client.events
            assert b"id" not in client.body


async def test_events_put_heartbeats_off() -> None:
    """Silence is counted from the last write: who always has something to say needs no filling."""

    @agent
    async def talks(_run: RunContext, _input: Any) -> None:
        for n in range(9):
            await trio.sleep(0.1)
            emit("tick", n=n)

    async with site(talks, heartbeat=0.5) as s:
        answer = await s.post("/agents/talks/runs", **SSE)

        assert 9 == answer.content.count(b"event: custom")
        assert b"\n\n:\n\n" not in answer.content


async def test_get_streams_are_rotated_and_resumed_without_a_gap() -> None:
    """An old stream is asked to come back, and a client that does so by id misses nothing."""
    gate = trio.Event()
    async with site(gated(gate, "a", "b"), rotation=0.05) as s:
        run_id = await s.start("gated")
        seen: list[int] = []
        endings: list[bytes] = []
        last_id = "0"
        while not endings or b"retry: 2000" != endings[-1]:
            answer = await s.http.get(f"/runs/{run_id}/events", headers={"Last-Event-ID": last_id})
            decoder = Decoder()
            seen += [json.loads(frame.data)["seq"] for frame in decoder.feed(answer.content)]
            last_id = decoder.last_id or last_id
            endings += re.findall(rb"retry: [0-9]+", answer.content)[-1:]
            if len(endings) == 2:
                gate.set()
        run = s.server.runs.find(run_id)

        assert list(range(1, run.log.end + 1)) == seen
        assert run.end is not None
        assert "success" == run.end.outcome
        assert s.server.app.streams.closed["rotated"] >= 2
        for ending in endings[:-1]:
            assert 500 <= int(ending.removeprefix(b"retry: ")) <= 3_000


async def test_rotation_does_not_cancel_a_run() -> None:
    """The server's own doing is no leaving: even policy `cancel` waits for the client's return."""
    async with site(Agent("plain", silent.function), rotation=0.03) as s:
        run_id = await s.start("plain", on_disconnect="cancel")
        answer = await s.http.get(f"/runs/{run_id}/events")
        await wait_no_stream(s.server)
        run = s.server.runs.find(run_id)

        assert re.search(rb"\n\nretry: [0-9]+\n\n\Z", answer.content)
        assert "running" == run.state
        assert {"rotated": 1} == s.server.app.streams.closed


async def test_post_streams_are_never_rotated() -> None:
    """A POST cannot be repeated by a browser's own means: it lasts as long as its run."""

    @agent
    async def slow(_run: RunContext, _input: Any) -> None:
        await trio.sleep(0.1)

    async with site(slow, rotation=0.02) as s:
        answer = await s.post("/agents/slow/runs", **SSE)

        await wait_no_stream(s.server)

        assert b"run_finished" in answer.content
        assert {"finished": 1} == s.server.app.streams.closed


@pytest.mark.parametrize("rotation", [0.0, 600.0])
async def test_stream_that_is_not_old_is_not_rotated(rotation: float) -> None:
    """0 stands for never."""
    async with site(count, rotation=rotation) as s:
        run_id = await s.finished("count", input=3)

        assert list("12345") == await s.ids(run_id)


async def test_get_and_post_streams_of_a_run_are_the_same_bytes() -> None:
    """Live or replayed, to whoever starts a run or only watches it."""
    gate = trio.Event()
    async with site(gated(gate, "a", "b")) as s:
        async with (
            connect(s.server.urls[0]) as starter,
            connect(s.server.urls[0]) as watcher,
        ):
            await starter.send(stream_run("gated"))
            first = await starter.wait_for(RunStarted)
            await watcher.send(request("GET", f"/runs/{first.run_id}/events"))
            await watcher.wait_for(RunStarted)
            gate.set()
            live, watched = await starter.finish(), await watcher.finish()
        late = await s.http.get(f"/runs/{first.run_id}/events")
        again = await s.http.get(f"/runs/{first.run_id}/events?dialect=native")

        assert live == watched == late.content == again.content


async def test_stream_is_resumed_at_every_id_without_a_gap() -> None:
    """Whatever id a client has seen last, it gets all behind it, and 204 once that is all."""
    async with site(count) as s:
        run_id = await s.finished("count", input=20)
        everything = [str(number) for number in range(1, 23)]

        for seen in range(22):
            assert everything[seen:] == await s.ids(run_id, **{"Last-Event-ID": str(seen)})
        assert [] == await s.ids(run_id, **{"Last-Event-ID": "22"})


async def test_stream_of_a_run_that_goes_on_is_resumed_at_every_id() -> None:
    """The same while more is to come: what is there first, then what follows."""
    gate = trio.Event()
    words = ("a", "b", "c", "d")
    async with site(gated(gate, *words)) as s:
        run_id = await s.start("gated")
        got: dict[int, list[str]] = {}

        async def resume(after: int) -> None:
            got[after] = await s.ids(run_id, **{"Last-Event-ID": str(after)})

        async with trio.open_nursery() as nursery:
            for after in range(6):
                nursery.start_soon(resume, after)
            await wait_until(lambda: s.server.app.streams.open == 6)
            gate.set()

        assert {after: [str(n) for n in range(after + 1, 11)] for after in range(6)} == got


async def test_nothing_more_to_come_is_said_without_a_stream() -> None:
    """204 tells an EventSource to stop; while the run goes on there is more to come."""
    gate = trio.Event()
    async with site(gated(gate)) as s:
        run_id = await s.start("gated")
        async with s.http.stream("GET", f"/runs/{run_id}/events?after=1") as live:
            assert 200 == live.status_code
            gate.set()
            await live.aread()
        over = await s.http.get(f"/runs/{run_id}/events?after=2")

        assert (204, b"") == (over.status_code, over.content)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("after=3", "expected a place in the run's 2 events, got 3"),
        ("after=99", "0 stands for all"),
        ("after=abc", "abc"),
        ("after=-1", "-1"),
        ("after=01", "01"),
        ("after=1.0", "1.0"),
        ("after=9999999999999999999", "999"),
        ("types=nonsense", "types: expected some of run_started"),
        ("types=", "types: expected"),
        ("types=custom&dialect=native", "drop one of them"),
        ("dialect=klingon", "dialect: expected one of native"),
        ("affter=1", "query: expected one of after, types, dialect, got 'affter'"),
    ],
)
async def test_place_that_does_not_exist_is_refused(query: str, says: str) -> None:
    """400 says what was expected, and no stream is opened."""
    async with site(echo) as s:
        run_id = await s.finished("echo")
        answer = await s.http.get(f"/runs/{run_id}/events?{query}")

        assert_problem(answer, 400, says=says)
        assert 0 == s.server.app.streams.closed.total()


async def test_last_event_id_wins_over_after() -> None:
    """An EventSource keeps the address it began with, and adds what it has seen since."""
    async with site(count) as s:
        run_id = await s.finished("count", input=3)
        path = f"/runs/{run_id}/events?after=1"
        both = await s.http.get(path, headers={"Last-Event-ID": "3"})
        empty = await s.http.get(path, headers={"Last-Event-ID": ""})
        junk = await s.http.get(path, headers={"Last-Event-ID": "junk"})

        assert ["4", "5"] == [frame.id for frame in Decoder().feed(both.content)]
        assert list("12345") == [frame.id for frame in Decoder().feed(empty.content)]
        assert_problem(junk, 400, says="junk")


async def test_types_filter_what_is_streamed_but_never_the_end() -> None:
    """Only what was asked for comes, with the ids that it has anyway, and the end."""
    async with site(count) as s:
        run_id = await s.finished("count", input=2)
        ticks = await s.http.get(f"/runs/{run_id}/events?types=custom, tool_started")
        only_end = await s.http.get(f"/runs/{run_id}/events", params={"types": "liveness"})

        assert [("2", "custom"), ("3", "custom"), ("4", "run_finished")] == [
            (frame.id, frame.event) for frame in Decoder().feed(ticks.content)
        ]
        assert ["run_finished"] == [frame.event for frame in Decoder().feed(only_end.content)]


async def test_large_frame_arrives_whole() -> None:
    """An event of many writes is one event; what follows it stands behind it."""

    @agent
    async def loud(run: RunContext, _input: Any) -> None:
        run.emit("large", text="\N{SNOWMAN}x" * 262_144)
        run.emit("small")

    async with site(loud) as s, s.http.stream("POST", "/agents/loud/runs", headers=SSE) as answer:
        events = [event async for event in read_events(answer.aiter_bytes())]
        large = events[1]

        assert [1, 2, 3, 4] == [event.seq for event in events]
        assert isinstance(large, Custom)
        assert {"text": "\N{SNOWMAN}x" * 262_144} == json.loads(bytes(large.value))
        assert len(answer.headers) > 0
        assert s.server.app.streams.bytes > 1_000_000


async def test_long_log_is_replayed_without_stalling() -> None:
    """A log longer than one stride of encoding comes whole, filtered or not."""
    async with site(count) as s:
        run_id = await s.finished("count", input=5_000)
        everything = await s.ids(run_id)
        behind = await s.ids(run_id, **{"Last-Event-ID": "4990"})
        filtered = await s.http.get(f"/runs/{run_id}/events?types=retry")

        assert [str(number) for number in range(1, 5_003)] == everything
        assert everything[4_990:] == behind
        assert ["run_finished"] == [frame.event for frame in Decoder().feed(filtered.content)]


async def test_stalled_reader_costs_the_others_nothing() -> None:
    """Of fifty readers one takes nothing: the others get everything, and so does the agent."""
    talked = trio.Event()

    @agent(on_disconnect="continue")
    async def flood(run: RunContext, _input: Any) -> None:
        for _ in range(100):
            run.emit("flood", said="x" * 60_000)
            await trio.lowlevel.checkpoint()
        talked.set()

    bodies: list[bytes] = []

    async def read(url: str, path: str) -> None:
        async with connect(url) as client:  # without chunks, so that it can be read as it comes
            await client.stream.send_all(request("GET", path, version="1.0"))
            taken = bytearray()
            while data := await client.stream.receive_some(1024 * 1024):
                taken += data
            bodies.append(bytes(taken).partition(b"\r\n\r\n")[2])

    gate = trio.Event()

    @agent
    async def waits(run: RunContext, _input: Any) -> None:
        await gate.wait()
        await flood.function(run, None)

    async with site(Agent("waits", waits.function, on_disconnect="continue")) as s:
        url, run_id = s.server.urls[0], await s.start("waits")
        path = f"/runs/{run_id}/events"
        async with connect(url, receive_buffer=4096) as stalled:
            await stalled.send(request("GET", path))
            async with trio.open_nursery() as nursery:
                for _ in range(49):
                    nursery.start_soon(read, url, path)
                await wait_until(lambda: s.server.app.streams.open == 50)
                gate.set()
                await talked.wait()
            await wait_until(lambda: s.server.app.streams.open == 1)

        assert 49 == len(bodies)
        assert 1 == len(set(bodies))
        frames = list(Decoder().feed(bodies[0]))
        assert [str(number) for number in range(1, 103)] == [frame.id for frame in frames]


async def test_reader_of_events_gives_them_one_by_one() -> None:
    """What came before a frame that cannot be read is given, and each step is a checkpoint."""
    gate = trio.Event()
    gate.set()
    async with site(gated(gate, "a")) as s:
        frames = (await s.post("/agents/gated/runs", **SSE)).content
        send, receive = trio.open_memory_channel[bytes](1)
        with send:
            send.send_nowait(frames + b"data: {}\n\n")
        reader = read_events(receive)
        for seq in range(1, 5):
            with assert_checkpoints():
                event = await anext(reader)
            assert seq == event.seq
        assert "4" == reader.last_id
        with pytest.raises(msgspec.ValidationError):
            await anext(reader)
        with pytest.raises(StopAsyncIteration):
            await anext(reader)
        receive.close()


# Cancelling and answering


async def test_cancel_is_answered_when_the_run_is_gone() -> None:
    """200 with the receipt; once more, the same; the stream has the same end."""
    ended = trio.Event()

    @agent
    async def tidy(run: RunContext, _input: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with run.cleanup():
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102  # that is what cleanup is for
                ended.set()

    async with site(tidy) as s, connect(s.server.urls[0]) as client:
        await client.send(stream_run("tidy"))
        started = await client.wait_for(RunStarted)
        answer = await s.post(f"/runs/{started.run_id}/cancel", b'{"reason": "enough"}')
        again = await s.post(f"/runs/{started.run_id}/cancel")
        end = await client.wait_for(RunFinished)
        await client.finish()
        shown = answer.json()

        assert 200 == answer.status_code == again.status_code
        assert answer.json() == again.json()
        assert ended.is_set()
        assert ("finished", "cancelled", "client_cancel", 1) == (
            shown["state"],
            shown["outcome"],
            shown["receipt"]["cause"],
            shown["receipt"]["tasks"],
        )
        assert isinstance(end, RunFinished)
        assert "client_cancel" == end.receipt.cause
        assert client.complete


async def test_cancel_after_step_lets_the_step_end() -> None:
    """Nothing is torn in the middle of a step; the next one does not begin."""
    gate = trio.Event()

    @agent
    async def steps(run: RunContext, _input: Any) -> None:
        for name in ("one", "two"):
            with run.step(name):
                await gate.wait()
            await trio.lowlevel.checkpoint()

    async with site(steps) as s:
        run_id = await s.start("steps")
        run = s.server.runs.find(run_id)
        await wait_until(lambda: run.context.is_in_step)
        answers = []

        async def cancel() -> None:
            answers.append(await s.post(f"/runs/{run_id}/cancel", b'{"mode": "after_step"}'))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            await wait_until(lambda: run.context.on_step_finished is not None)
            assert "running" == run.state
            gate.set()
        [answer] = answers

        assert (200, "cancelled") == (answer.status_code, answer.json()["outcome"])
        assert ["one"] == [e.name for e in run.log.events if isinstance(e, StepStarted)]


async def test_cancel_of_a_run_that_shields_itself_is_answered_in_time() -> None:
    """202 `cancelling`: it was asked to go and has not gone yet."""
    gate, shielding = trio.Event(), trio.Event()

    @agent
    async def stubborn(_run: RunContext, _input: Any) -> None:
        with trio.CancelScope(shield=True):
            shielding.set()
            await gate.wait()
        await trio.lowlevel.checkpoint()

    async with site(stubborn) as s:
        s.server.app.options = attrs.evolve(s.server.app.options, cancel_patience=0.05)
        run_id = await s.start("stubborn")
        await shielding.wait()
        answer = await s.post(f"/runs/{run_id}/cancel")
        gate.set()
        await s.server.runs.find(run_id).done.wait()
        later = await s.post(f"/runs/{run_id}/cancel")

        assert (202, "cancelling", None) == (
            answer.status_code,
            answer.json()["state"],
            answer.json()["receipt"],
        )
        assert (200, "cancelled") == (later.status_code, later.json()["outcome"])


async def test_cancel_of_a_queued_run_takes_it_out_of_the_queue() -> None:
    """It has a beginning and an end all the same, and its place goes to the next."""
    async with site(silent, limits=LimitSettings(max_running=1)) as s:
        await s.start("silent")
        run_id = await s.start("silent")
        answer = await s.post(f"/runs/{run_id}/cancel")

        assert (200, "cancelled") == (answer.status_code, answer.json()["outcome"])
        assert ["1", "2"] == await s.ids(run_id)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("cancel", b'{"mode": "later"}', "$.mode"),
        ("cancel", b'{"why": 1}', "why"),
        ("cancel", b"{", "expected JSON to cancel with (reason, mode)"),
        ("input", b"{}", "answers"),
        ("input", b'{"answers": []}', "$.answers"),
        ("input", b'{"answers": {}}', "request_id: expected one of (none is open), got none"),
    ],
)
async def test_order_to_a_run_that_makes_no_sense_is_refused(
    path: str, body: bytes, says: str
) -> None:
    """400, and the run goes on."""
    async with site(silent) as s:
        run_id = await s.start("silent")
        answer = await s.post(f"/runs/{run_id}/{path}", body)

        assert_problem(answer, 400, says=says)
        assert "running" == s.server.runs.find(run_id).state


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/runs/nobody", b""),
        ("GET", "/runs/nobody/events", b""),
        ("HEAD", "/runs/nobody/events", b""),
        ("POST", "/runs/nobody/cancel", b""),
        ("POST", "/runs/nobody/input", b'{"answers": {}}'),
    ],
)
async def test_unknown_run_is_not_found(method: str, path: str, body: bytes) -> None:
    """404 in every place where a run's id stands."""
    async with site(echo) as s:
        answer = await s.http.request(method, path, content=body)

        assert 404 == answer.status_code
        if method != "HEAD":
            assert_problem(answer, 404, says="'nobody'")


async def test_questions_are_answered_over_http() -> None:
    """The answer goes to what is asked; by id where more than one thing is."""

    @agent
    async def asks(run: RunContext, _input: Any) -> None:
        async def ask(prompt: str) -> None:
            run.emit("heard", answer=await run.ask(prompt))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "One?")
            nursery.start_soon(ask, "Two?")

    async with site(asks) as s, connect(s.server.urls[0]) as client:
        await client.send(stream_run("asks"))
        first = await client.wait_for(InputRequested)
        second = await client.wait_for(InputRequested)
        assert isinstance(first, InputRequested)
        assert isinstance(second, InputRequested)
        path = f"/runs/{first.run_id}/input"
        shown = (await s.http.get(f"/runs/{first.run_id}")).json()
        which = await s.http.post(path, json={"answers": {"answer": "x"}})
        unknown = await s.http.post(path, json={"answers": {"answer": "x"}, "request_id": "q99"})
        unfit = await s.http.post(
            path, json={"answers": {"answer": 7}, "request_id": first.request_id}
        )
        one = await s.http.post(
            path, json={"answers": {"answer": "1"}, "request_id": first.request_id}
        )
        await client.wait_for(Custom)
        two = await s.http.post(path, json={"answers": {"answer": "2"}})
        await client.wait_for(RunFinished)
        late = await s.http.post(path, json={"answers": {"answer": "3"}})

        assert "waiting" == shown["state"]
        assert ["One?", "Two?"] == sorted(q["questions"][0]["prompt"] for q in shown["questions"])
        assert_problem(which, 400, says=f"{first.request_id}, {second.request_id}")
        assert_problem(unknown, 404, says="q99")
        assert_problem(unfit, 400, says="expected a string")
        assert [200, 200] == [one.status_code, two.status_code]
        assert_problem(late, 409, says="which is over")


# What there is


async def test_agents_are_listed() -> None:
    """With what a client needs to know to choose one."""

    @tool
    async def look(name: str) -> str:
        """Look something up."""
        return name

    @agent(tools=[look], on_disconnect="grace:9")
    async def finder(_run: RunContext, _input: Any) -> None:
        """Find things."""

    async with site(finder, echo) as s:
        found, plain = (await s.http.get("/agents")).json()["agents"]

        assert {
            "name": "finder",
            "description": "Find things.",
            "model": None,
            "on_disconnect": "grace:9",
            "tools": [{"name": "look", "description": "Look something up."}],
        } == found
        assert "echo" == plain["name"]


async def test_runs_are_listed_the_newest_first() -> None:
    """Those that go on before those that are over; by state and number if asked."""
    async with site(echo, silent) as s:
        over = [await s.finished("echo") for _ in range(2)]
        going = [await s.start("silent") for _ in range(2)]

        async def listed(**query: str) -> list[str]:
            answer = await s.http.get("/runs", params=query)
            return [run["id"] for run in answer.json()["runs"]]

        assert [*reversed(going), *reversed(over)] == await listed()
        assert [*reversed(over)] == await listed(state="finished")
        assert [going[1]] == await listed(limit="1")
        assert [] == await listed(state="waiting")


async def test_list_of_runs_is_brief() -> None:
    """What a run was given and has said is in its own view: a list of a thousand stays short."""

    @agent
    async def talks(run: RunContext, input: Any) -> Any:
        run.text("said")
        return input

    async with site(talks) as s:
        run_id = await s.finished("talks", input="given", metadata="mine")
        [listed] = (await s.http.get("/runs")).json()["runs"]
        shown = (await s.http.get(f"/runs/{run_id}")).json()

        assert {"input": "given", "metadata": "mine", "output": "said", "values": {}} == {
            name: value for name, value in shown.items() if name not in listed
        }
        assert listed == {name: shown[name] for name in listed}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/runs?limit=0", "limit: expected a number from 1 to 1000"),
        ("/runs?limit=1001", "limit: expected"),
        ("/runs?limit=%D9%A1", "limit: expected"),
        ("/runs?limit=" + "9" * 5_000, "limit: expected"),
        ("/runs?limit=00010", "limit: expected"),
        ("/runs?state=lost", "state: expected one of queued"),
        ("/runs?order=new", "query: expected one of state, limit"),
        ("/agents?x=1", "query: expected no query, got 'x'"),
        ("/runs/nobody?x=1", "query: expected no query"),
    ],
)
async def test_query_that_is_not_understood_is_refused(path: str, says: str) -> None:
    """400 rather than something else than was meant."""
    async with site(echo) as s:
        assert_problem(await s.http.get(path), 400, says=says)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/agents/echo/runs", "OPTIONS, POST"),
        ("POST", "/agents", "GET, HEAD, OPTIONS"),
        ("DELETE", "/runs/x", "GET, HEAD, OPTIONS"),
        ("PUT", "/runs/x/events", "GET, HEAD, OPTIONS"),
        ("POST", "/health/live", "GET, HEAD, OPTIONS"),
    ],
)
async def test_wrong_method_is_told_the_right_ones(method: str, path: str, allow: str) -> None:
    """405 with Allow."""
    async with site(echo) as s:
        answer = await s.http.request(method, path)

        assert_problem(answer, 405, says=method)
        assert allow == answer.headers["allow"]


@pytest.mark.parametrize("path", ["/", "/nothing", "/agents/", "/agents/echo", "/runs/x/y", "//"])
async def test_unknown_path_is_not_found(path: str) -> None:
    """404 says where to begin."""
    async with site(echo) as s, connect(s.server.urls[0]) as client:
        await client.send(request("GET", path))
        problem = json.loads(await client.finish())

        assert (404, "not_found") == (client.status, problem["code"])
        assert "GET /agents" in problem["detail"]


@pytest.mark.parametrize("target", ["http://[", "?after=1"])
async def test_target_that_is_no_path_is_refused(target: str) -> None:
    """400 and the end of the connection; the next one is served."""
    async with site(echo) as s:
        async with connect(s.server.urls[0]) as client:
            await client.send(request("GET", target))
            problem = json.loads(await client.finish())
            assert b"" == await client.stream.receive_some()
        live = await s.http.get("/health/live")

        assert (400, "bad_request") == (client.status, problem["code"])
        assert "no valid URL" in problem["detail"]
        assert 200 == live.status_code
        assert [] == [event for event, _ in s.reports if event != "request"]


# Who may speak


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]", 200),
        ("[::1]:8080", 200),
        ("mine.example", 200),
        ("Mine.Example:80", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:80", 421),
        ("localhost:evil", 421),
        ("0.0.0.0", 421),
    ],
)
@pytest.mark.parametrize("path", ["/agents", "/metrics", "/nothing"])
async def test_host_must_be_a_name_of_this_server(host: str, status: int, path: str) -> None:
    """A foreign name that was bound to this address is DNS rebinding: 421, on every path."""
    async with site(echo, allowed_hosts=("Mine.example",)) as s:
        answer = await s.http.get(path, headers={"Host": host})

        if status == 421:
            assert_problem(answer, 421, says="allowed_hosts")
        else:
            assert (404 if path == "/nothing" else 200) == answer.status_code


async def test_http10_needs_no_host() -> None:
    """Before HTTP/1.1 there was none."""
    async with site(echo) as s, connect(s.server.urls[0]) as client:
        await client.send(b"GET /agents HTTP/1.0\r\n\r\n")
        body = await client.finish()

        assert 200 == client.status
        assert "echo" == json.loads(body)["agents"][0]["name"]
        assert b"" == await client.stream.receive_some()


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://evil.example",
        "http://localhost.evil.example",
        "http://localhost:80@evil.example",
        "http://127.0.0.1:123456",
        "file://localhost",
        "HTTP://LOCALHOST/",
        "",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_foreign_origin_is_refused(origin: str, method: str) -> None:
    """A page from anywhere else may not run agents here: 403, and no CORS headers."""
    async with site(echo) as s:
        path = "/agents/echo/runs" if method != "GET" else "/agents"
        answer = await s.http.request(method, path, headers={"Origin": origin})

        assert_problem(answer, 403, says="expected a page from localhost")
        assert "access-control-allow-origin" not in answer.headers
        assert [] == list(s.server.runs)


@pytest.mark.parametrize(
    "origin", ["http://localhost", "https://127.0.0.1:3000", "http://[::1]:65535"]
)
async def test_local_origin_passes_with_cors_headers(origin: str) -> None:
    """A page that is being developed on this machine may use the server, streams included."""
    async with site(echo) as s:
        for path, headers in (("/agents/echo/runs", {}), ("/agents/echo/runs", SSE)):
            answer = await s.http.post(path, headers={"Origin": origin, **headers})

            assert 200 == answer.status_code
            assert origin == answer.headers["access-control-allow-origin"]
            exposed = answer.headers["access-control-expose-headers"]
            assert "Location, Content-Location, Retry-After, X-Request-Id" == exposed
            assert "Origin" == answer.headers["vary"]
        refused = await s.http.get("/nothing", headers={"Origin": origin})
        assert (404, origin) == (
            refused.status_code,
            refused.headers["access-control-allow-origin"],
        )


async def test_preflight_of_a_local_origin_is_answered() -> None:
    """OPTIONS with an origin: what the browser asks for may be sent."""
    async with site(echo) as s:
        answer = await s.http.options(
            "/agents/echo/runs",
            headers={
                "Origin": "http://localhost:3000",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "idempotency-key",
            },
        )
        bare = await s.http.options("/agents/echo/runs", headers={"Origin": "http://localhost"})
        plain = await s.http.options("/agents/echo/runs")

        assert 204 == answer.status_code
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "idempotency-key" == answer.headers["access-control-allow-headers"]
        assert "http://localhost:3000" == answer.headers["access-control-allow-origin"]
        assert (204, "*") == (bare.status_code, bare.headers["access-control-allow-headers"])
        assert (200, "OPTIONS, POST") == (
            plain.status_code,
            ", ".join(sorted(plain.headers["allow"].split(", "))),
        )
        assert [] == list(s.server.runs)


# Connections


async def test_connection_is_used_again_after_json_and_after_a_stream() -> None:
    """Keep-alive: answers of every kind end so that the next request can follow."""
    async with site(count) as s, connect(s.server.urls[0]) as client:
        for accept in ("application/json", "text/event-stream") * 2:
            await client.send(request("POST", "/agents/count/runs", b'{"input": 2}', accept=accept))
            await client.finish()
            assert (200, True) == (client.status, client.complete)
        for path, status in (("/nothing", 404), ("/health/live", 200)):
            await client.send(request("GET", path))
            await client.finish()
            assert status == client.status

        assert 1 == s.server.connections.accepted


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_connection_that_is_to_close_closes(accept: str) -> None:
    """`Connection: close` gets its answer whole, and then the end of the line."""
    async with site(count) as s, connect(s.server.urls[0]) as client:
        await client.send(
            request(
                "POST", "/agents/count/runs", b'{"input": 2}', accept=accept, connection="close"
            )
        )
        await client.finish()

        assert (200, True) == (client.status, client.complete)
        assert b"" == await client.stream.receive_some()
        await wait_quiet(s.server)


async def test_no_request_needs_a_thread_of_others() -> None:
    """Blocking tools may have taken all there are: what is loaded late has a thread of its own."""
    async with site(echo) as s:
        limiter = trio.to_thread.current_default_thread_limiter()
        holders = [object() for _ in range(int(limiter.total_tokens))]
        for holder in holders:
            limiter.acquire_on_behalf_of_nowait(holder)
        try:
            for path in ("/agents", "/runs", "/health/live", "/health/ready", "/metrics"):
                assert 200 == (await s.http.get(path)).status_code
            assert 404 == (await s.http.get("/nothing")).status_code
            assert 421 == (await s.http.get("/", headers={"Host": "evil.example"})).status_code
            assert 200 == (await s.post("/agents/echo/runs", **SSE)).status_code
        finally:
            for holder in holders:
                limiter.release_on_behalf_of(holder)


def make_app(runs: Runs) -> AgentsseApp:
    """The application by itself, without a server."""
    return AgentsseApp(
        runs,
        (NATIVE,),
        options=AppOptions(),
        report=lambda *_args, **_facts: None,
        connections=Counts(),
    )


# Bodies that nobody reads

UNREAD = 4 * 1024 * 1024  # bytes; more than is allowed
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/nothing", 404),
        ("POST", "/agents", 405),
        ("POST", "/runs/nobody/events", 405),
        ("POST", "/agents/echo/runs", 413),
        ("GET", "/agents", 413),
        ("GET", "/health/live", 200),
    ],
)
@pytest.mark.parametrize("chunked", [True, False])
async def test_body_that_nobody_reads_is_in_nobody_s_way(
    method: str, path: str, status: int, *, chunked: bool
) -> None:
    """The answer comes all the same, whole, and the end of the connection behind it."""
    async with site(echo) as s:
        before = await wait_quiet(s.server)
        async with connect(s.server.urls[0]) as client:
            if chunked:
                head, body = request(method, path, transfer_encoding="chunked"), CHUNK * 64
            else:
                head, body = request(method, path, content_length=str(UNREAD)), bytes(UNREAD)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_regardless, client, head + body)
                await client.finish()
                nursery.cancel_scope.cancel()
            assert (status, True) == (client.status, client.complete)
        after = await wait_quiet(s.server)

        assert before == after
        assert {"request"} == {event for event, _ in s.reports}
        assert 0 == s.server.connections.crashed


async def send_regardless(client: RawClient, data: bytes) -> None:
    """Send more than the server may want; that it does not take it is no error here."""
    with suppress(trio.BrokenResourceError):
        await client.send(data)


@pytest.mark.parametrize("size", [10, 1_000, 1_001])
async def test_body_of_a_question_is_dropped(size: int) -> None:
    """A GET may come with a body, however strange: what is within the limit does no harm."""
    async with site(echo, max_body=1_000) as s, connect(s.server.urls[0]) as client:
        await client.send(request("GET", "/agents", b"x" * size))
        await client.finish()
        status = client.status
        if size <= 1_000:
            await client.send(request("GET", "/health/live"))
            assert b'{"status":"ok"}' == await client.finish()

        assert (200 if size <= 1_000 else 413) == status


async def test_body_without_an_end_is_refused_as_soon_as_it_is_too_large() -> None:
    """413 while it is still coming: nobody waits for the end of what is refused anyway."""
    async with site(echo, max_body=100_000) as s, connect(s.server.urls[0]) as client:
        await client.send(request("POST", "/agents/echo/runs", transfer_encoding="chunked"))
        await client.stream.send_all(CHUNK * 2)
        problem = json.loads(await client.finish())

        assert (413, "too_large") == (client.status, problem["code"])
        assert "at most 100000 bytes" in problem["detail"]


# What goes wrong

CANARY = "sk-CANARY0123456789abcdef"


async def test_crash_of_an_agent_is_its_own_affair_and_its_words_stay_inside() -> None:
    """An error ends its run only; what it says is in no answer, and credentials in no report."""
    gate = trio.Event()

    @agent
    async def crash(_run: RunContext, _input: Any) -> None:
        raise ValueError(f"no luck with Authorization: Bearer {CANARY}")

    async with site(crash, gated(gate, "word")) as s, connect(s.server.urls[0]) as bystander:
        await bystander.send(stream_run("gated"))
        await bystander.wait_for(Custom)
        streamed = await s.post("/agents/crash/runs", **SSE)
        waited = await s.post("/agents/crash/runs")
        shown = await s.http.get(waited.headers["location"].removesuffix("/events"))
        replayed = await s.http.get(waited.headers["location"])
        listed = await s.http.get("/runs")
        metrics = await s.http.get("/metrics")
        gate.set()
        await bystander.finish()

        assert_problem(waited, 500, says="the agent 'crash' raised ValueError; the server's log")
        for answer in (streamed, waited, shown, replayed, listed, metrics):
            assert CANARY not in answer.text
            assert "no luck" not in answer.text
        assert isinstance(bystander.events[-1], RunFinished)
        assert bystander.complete
        crashes = [facts for event, facts in s.reports if event == "crash"]
        assert 2 == len(crashes)
        for facts in crashes:
            assert "ValueError: no luck with" in facts["traceback"]
        assert CANARY not in str(s.reports)


async def test_exit_in_an_agent_or_a_tool_ends_no_process() -> None:
    """A tool that uses argparse calls `sys.exit`: the run, or only the call, has an error."""

    @tool
    def leave() -> None:
        """Go."""
        raise SystemExit(2)

    @agent
    async def exits(_run: RunContext, _input: Any) -> None:
        raise SystemExit(3)

    @agent(tools=[leave])
    async def calls(run: RunContext, _input: Any) -> None:
        await run.call("leave", {})

    async with site(exits, calls) as s:
        direct = await s.post("/agents/exits/runs")
        by_tool = await s.post("/agents/calls/runs")
        live = await s.http.get("/health/live")

        assert_problem(direct, 500, says="tried to end the process")
        assert "system_exit" == direct.json()["code"]
        assert_problem(by_tool, 500, says="tool leave wanted to exit, with 2")
        assert 200 == live.status_code


async def test_what_cannot_be_emitted_is_an_event_that_says_so() -> None:
    """A bad name or value neither raises nor breaks the stream's framing."""

    @agent
    async def careless(run: RunContext, _input: Any) -> None:
        run.emit("")
        run.emit("a\nid: 99\n\ndata: forged")
        run.emit("half \ud800")
        run.emit("number", value=float("nan"))
        run.emit("fine", text="a\r\nid: 99\n\n\x00\u2028")

    async with site(careless) as s:
        answer = await s.post("/agents/careless/runs", **SSE)
        frames = list(Decoder().feed(answer.content))
        events = [json.loads(frame.data) for frame in frames]

        assert [str(n) for n in range(1, 8)] == [frame.id for frame in frames]
        assert ["agentsse.error"] * 4 + ["fine"] == [e["name"] for e in events[1:6]]
        assert {"text": "a\r\nid: 99\n\n\x00\u2028"} == events[5]["value"]
        assert "success" == events[6]["outcome"]


async def test_json_that_others_have_formatted_does_not_break_the_framing() -> None:
    """Ready-made JSON may hold line ends: it comes in more lines, and reads the same."""
    pretty = msgspec.Raw(b'{\n\n"x":\r\n[1,\r2]}')

    @agent
    async def formats(run: RunContext, _input: Any) -> Any:
        run.emit("pretty", value=pretty)
        return pretty

    async with site(formats) as s:
        answer = await s.post("/agents/formats/runs", **SSE)
        frames = list(Decoder().feed(answer.content))
        events = [json.loads(frame.data) for frame in frames]

        assert ["run_started", "custom", "run_finished"] == [frame.event for frame in frames]
        assert ["1", "2", "3"] == [frame.id for frame in frames]
        assert {"value": {"x": [1, 2]}} == events[1]["value"]
        assert {"x": [1, 2]} == events[2]["result"]


@attrs.frozen
class _Broken:
    """An encoder that fails at the second event."""

    def feed(self, event: Any) -> tuple[bytes, ...]:
        if event.seq == 2:
            raise ZeroDivisionError(CANARY)
        return (b": first\n\n",)


async def test_error_of_our_own_breaks_the_stream_off_and_spares_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reader sees a stream that broke off, and may come back; nobody else sees anything."""
    broken = attrs.evolve(NATIVE, name="broken", mount="/broken", encoder=lambda _: _Broken())
    monkeypatch.setattr(server_module, "DIALECTS", (NATIVE, broken))
    gate = trio.Event()
    async with site(gated(gate, "word")) as s:
        async with connect(s.server.urls[0]) as client:
            await client.send(
                request("POST", "/broken/agents/gated/runs", b"{}", accept="text/event-stream")
            )
            with pytest.raises(h11.RemoteProtocolError):
                await client.finish()
        await wait_no_stream(s.server)
        [run] = s.server.runs
        assert "running" == run.state
        gate.set()
        again = await s.http.get(f"/runs/{run.id}/events")
        await wait_no_stream(s.server)

        assert b"event: run_finished" in again.content
        assert {"error": 1, "finished": 1} == s.server.app.streams.closed
        assert CANARY not in str(s.reports)


async def test_error_of_our_own_before_an_answer_is_a_500_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client learns the error's type, the log that there was one, and nobody its words."""

    def present(_snapshot: Any) -> bytes:
        raise ZeroDivisionError(CANARY)

    broken = attrs.evolve(NATIVE, name="broken", mount="/broken", present=present)
    monkeypatch.setattr(server_module, "DIALECTS", (NATIVE, broken))
    async with site(echo) as s:
        answer = await s.post("/broken/agents/echo/runs")

        assert_problem(answer, 500, says="the server raised ZeroDivisionError; its log")
        assert CANARY not in answer.text + str(s.reports)
        assert ("crash", "POST /broken/agents/echo/runs", "ZeroDivisionError") in [
            (event, facts.get("where"), facts.get("error")) for event, facts in s.reports
        ]


@attrs.define(eq=False)
class ByHand:
    """The other side of ASGI: one request, what is written to the wire, and a cancel from outside.

    A server is needed to see what a connection does; what its failure does to the request is seen
    better without one.
    """

    written: list[bytes] = attrs.field(factory=list)
    sent: list[dict[str, Any]] = attrs.field(factory=list)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _asked: bool = False

    async def write(self, data: bytes | memoryview, /) -> None:
        """Be the wire."""
        await trio.lowlevel.checkpoint()
        self.written.append(bytes(data))

    def write_with_end(self, data: bytes, /) -> None:
        """Be the wire, at the end."""
        self.written.append(data)

    def when_left(self, call: Callable[[], object], /) -> None:
        """Be the wire of a client that stays."""

    async def receive(self) -> dict[str, Any]:
        """Give the request's empty body, and then nothing more."""
        if self._asked:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        self._asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: dict[str, Any]) -> None:
        """Take what Hypercorn would."""
        await trio.lowlevel.checkpoint()
        self.sent.append(message)

    async def ask(self, app: AgentsseApp, method: str, path: str, **headers: str) -> None:
        """Have one request served, until it is answered or cancelled."""
        asked = {
            "type": "http",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": None,
            "server": None,
            "extensions": {},
            "state": {"wire": self},
        }
        with self.scope:
            await app(asked, self.receive, self.send)


@pytest.mark.parametrize(
    ("is_closing", "reason", "waits"), [(False, "error", True), (True, "shutdown", False)]
)
async def test_connection_that_fails_is_no_client_that_has_left(
    reason: str, *, is_closing: bool, waits: bool
) -> None:
    """Cancelled by nobody of ours, the client is given time to come back; at the end it is not."""
    with trio.fail_after(PATIENCE):
        async with open_runs({"gated": gated(trio.Event())}) as runs:
            app, hand = make_app(runs), ByHand()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    partial(hand.ask, app, "POST", "/agents/gated/runs", accept="text/event-stream")
                )
                await wait_until(lambda: b"event: run_started" in b"".join(hand.written))
                [run] = runs
                runs.is_closing = is_closing
                hand.scope.cancel()

            assert hand.scope.cancelled_caught
            assert {reason: 1} == app.streams.closed
            assert 0 == app.streams.open
            assert "running" == run.state
            assert waits == (run._grace is not None)
            assert {} == run._holders


async def test_first_frames_go_with_the_prelude_and_large_ones_are_cut_into_slices() -> None:
    """A client that joins learns all at once, and no write is too long for its deadline."""

    @agent
    async def loud(run: RunContext, _input: Any) -> None:
        run.emit("large", text="x" * 5 * MAX_WRITE)

    with trio.fail_after(PATIENCE):
        async with open_runs({"loud": loud}) as runs:
            app, hand = make_app(runs), ByHand()
            await hand.ask(app, "POST", "/agents/loud/runs", accept="text/event-stream")

        assert hand.written[0].startswith(NATIVE.framing.prelude + b"id: 1\n")
        assert len(hand.written) >= 7
        assert MAX_WRITE == max(map(len, hand.written))
        assert sum(map(len, hand.written)) == app.streams.bytes
        frames = list(Decoder().feed(b"".join(hand.written)))
        assert ["1", "2", "3"] == [frame.id for frame in frames]
        assert [("http.response.start", 200), ("http.response.body", None)] == [
            (message["type"], message.get("status")) for message in hand.sent
        ]


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/%1b%5b2J%0a%0d?key=secret", "/%1b%5b2J%0a%0d"),
        ("/%e2%80%ae%ff", "/%e2%80%ae%ff"),
        ("http://ann:secret@localhost/agents?key=secret", "/agents"),
        ("http://ann:secret@localhost", "/"),
        ("http://ann:secret@localhost?key=secret", "/"),
        ("ann:secret", "/"),
    ],
)
async def test_reported_path_is_as_it_came_and_only_the_path(target: str, path: str) -> None:
    """Escaped, so that no terminal obeys it, and without the user info of an absolute target."""
    async with site(echo) as s, connect(s.server.urls[0]) as client:
        await client.send(request("GET", target))
        await client.finish()
        await wait_until(lambda: len(s.reports) == 1)
        [(event, facts)] = s.reports

        assert ("request", path) == (event, facts["path"])


async def test_body_that_does_not_come_ends_the_request() -> None:
    """408 for a client that announces more than it sends."""
    async with site(echo) as s, connect(s.server.urls[0]) as client:
        s.server.app.options = attrs.evolve(s.server.app.options, body_patience=0.05)
        await client.send(request("POST", "/agents/echo/runs", content_length="10"))
        problem = json.loads(await client.finish())

        assert (408, "request_timeout") == (client.status, problem["code"])


# Dialects


async def test_dialect_without_heartbeat_and_prelude_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a protocol has no bytes for is not sent."""
    plain = attrs.evolve(
        NATIVE, name="plain", mount="/plain", framing=Framing(media_type="text/plain")
    )
    monkeypatch.setattr(server_module, "DIALECTS", (NATIVE, plain))

    @agent
    async def slow(_run: RunContext, _input: Any) -> None:
        await trio.sleep(0.1)

    async with site(slow, heartbeat=0.02) as s:
        answer = await s.post("/plain/agents/slow/runs", **SSE)
        crossed = await s.http.get(
            answer.headers["location"].removeprefix("/plain") + "?dialect=plain"
        )

        assert answer.content.startswith(b"id: 1\n")
        assert answer.content == crossed.content
        assert b"\n:" not in answer.content
        assert "text/plain" == answer.headers["content-type"] == crossed.headers["content-type"]
        assert answer.headers["location"].startswith("/plain/runs/")


async def test_two_dialects_cannot_claim_one_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses to start, and says what to change."""
    twin = attrs.evolve(NATIVE, name="twin")
    monkeypatch.setattr(server_module, "DIALECTS", (NATIVE, twin))
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, match=r"'native' and 'twin'.*\[dialects.twin\]"),
        flatten_subgroups=True,
        allow_unwrapped=True,
    ):
        async with site(echo):
            pass


@pytest.mark.parametrize("path", ["/metrics", "/health/live", "/health/ready", "/openapi.json"])
async def test_no_dialect_can_claim_what_operators_ask_for(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a server is alive is not a client protocol's to say."""
    greedy = attrs.evolve(NATIVE, routes=(*NATIVE.routes, Route("GET", path, decode_list_agents)))
    monkeypatch.setattr(server_module, "DIALECTS", (greedy,))
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, match=rf"GET {path}, got 'the server itself' and 'native'"),
        flatten_subgroups=True,
        allow_unwrapped=True,
    ):
        async with site(echo):
            pass


# Operations

FAMILIES = (
    'agentsse_runs{state="running"} 1.0',
    'agentsse_runs{state="queued"} 0.0',
    'agentsse_runs{state="retained"} 2.0',
    'agentsse_runs_finished_total{outcome="success"} 1.0',
    'agentsse_runs_finished_total{outcome="cancelled"} 1.0',
    'agentsse_runs_finished_total{outcome="error"} 0.0',
    'agentsse_runs_finished_total{outcome="interrupted"} 0.0',
    "agentsse_streams_open 1.0",
    "agentsse_connections_open 2.0",
    'agentsse_connections_total{how="accepted"} 2.0',
    'agentsse_connections_total{how="refused"} 0.0',
    'agentsse_connections_total{how="crashed"} 0.0',
    'agentsse_streams_closed_total{reason="finished"} 1.0',
    'agentsse_streams_closed_total{reason="client_left"} 0.0',
    "agentsse_teardown_seconds_count 1.0",
    'agentsse_teardown_seconds_bucket{le="10.0"} 1.0',
    'agentsse_teardown_seconds_bucket{le="+Inf"} 1.0',
)


async def test_metrics_count_everything_and_tell_nothing() -> None:
    """Every family is there, with its number; no input, id or name of a thread is."""
    async with site(echo, silent) as s:
        secret = f'{{"input": "{CANARY}", "metadata": "{CANARY}", "thread_id": "{CANARY}"}}'
        await s.post("/agents/echo/runs", secret.encode(), idempotency_key=CANARY, **SSE)
        await s.post(f"/runs/{await s.start('silent')}/cancel")
        run_id = await s.start("silent", input=CANARY)
        async with connect(s.server.urls[0]) as client:
            await client.send(request("GET", f"/runs/{run_id}/events"))
            await client.wait_for(RunStarted)
            answer = await s.http.get("/metrics")
        lines = answer.text.splitlines()

        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert [] == [line for line in FAMILIES if line not in lines]
        for family in (
            "agentsse_retained_bytes",
            "agentsse_events_total",
            "agentsse_stream_bytes_total",
            "agentsse_teardown_seconds_sum",
            'agentsse_loop_lag_seconds{which="last"}',
            'agentsse_loop_lag_seconds{which="worst"}',
        ):
            [line] = [line for line in lines if line.startswith(f"{family} ")]
            assert float(line.split()[-1]) >= 0
        assert CANARY not in answer.text
        assert run_id not in answer.text


async def test_health_is_told() -> None:
    """Live while it answers; ready unless it is about to stop."""
    async with site(echo) as s:
        live, ready = await s.http.get("/health/live"), await s.http.get("/health/ready")
        s.server.runs.is_closing = True
        stopping = await s.http.get("/health/ready")

        assert ({"status": "ok"}, {"status": "ok"}) == (live.json(), ready.json())
        assert_problem(stopping, 503, says="about to stop")
        assert "5" == stopping.headers["retry-after"]


async def test_no_run_is_started_while_the_server_drains() -> None:
    """503 to who would start one; what goes on can be looked at, watched and cancelled."""
    async with site(silent) as s, connect(s.server.urls[0]) as watcher:
        run_id = await s.start("silent")
        s.server.runs.is_closing = True
        started = await s.post("/agents/silent/runs", **SSE)
        waited = await s.post("/agents/silent/runs")
        shown = await s.http.get(f"/runs/{run_id}")
        await watcher.send(request("GET", f"/runs/{run_id}/events"))
        await watcher.wait_for(RunStarted)
        cancelled = await s.post(f"/runs/{run_id}/cancel")
        end = await watcher.wait_for(RunFinished)
        await watcher.finish()

        for answer in (started, waited):
            assert_problem(answer, 503, says="about to stop; try again when it is back")
            assert "5" == answer.headers["retry-after"]
        assert (200, "running") == (shown.status_code, shown.json()["state"])
        assert (200, "cancelled") == (cancelled.status_code, cancelled.json()["outcome"])
        assert isinstance(end, RunFinished)
        assert (200, True) == (watcher.status, watcher.complete)


async def test_same_key_finds_its_run_while_the_server_drains() -> None:
    """That starts nothing: who sends it again gets the run that it has."""
    async with site(echo) as s:
        first = await s.post("/agents/echo/runs", idempotency_key="k")
        s.server.runs.is_closing = True
        again = await s.post("/agents/echo/runs", idempotency_key="k")

        assert (200, first.json()) == (again.status_code, again.json())


async def test_nothing_is_rotated_while_the_server_drains() -> None:
    """There would be nowhere to come back to: an old stream stays until its run has ended."""
    gate = trio.Event()
    async with (
        site(gated(gate, "word"), rotation=0.02, heartbeat=0.05) as s,
        connect(s.server.urls[0]) as watcher,
    ):
        run_id = await s.start("gated")
        s.server.runs.is_closing = True
        await watcher.send(request("GET", f"/runs/{run_id}/events"))
        await read_past(watcher, b"\n\n:\n\n:\n\n")  # twice the silence: it is old by now
        gate.set()
        await watcher.finish()
        await wait_no_stream(s.server)

        assert b"event: run_finished" in watcher.body
        assert {"finished": 1} == s.server.app.streams.closed


async def test_every_request_is_reported_without_its_query() -> None:
    """Method, path, status, time, and of a run its id and why it was let go; nothing secret."""
    async with site(echo, silent) as s:
        await s.http.get(f"/runs?state={CANARY}", headers={"Authorization": CANARY})
        streamed = await s.post(f"/agents/echo/runs?key={CANARY}", CANARY.encode(), **SSE)
        assert 400 == streamed.status_code
        streamed = await s.post("/agents/echo/runs", **SSE)
        run_id = streamed.headers["location"].split("/")[2]
        async with connect(s.server.urls[0]) as client:
            await client.send(request("POST", "/agents/silent/runs", b"{}"))
            await wait_until(lambda: len(s.server.runs.unfinished()) == 1)
            left = s.server.runs.unfinished()[0].id
            client.leave_by_rst()
        await wait_until(lambda: len(s.reports) == 5)
        assert 200 == (await s.post(f"/runs/{left}/cancel")).status_code
        await wait_until(lambda: len(s.reports) == 7)
        lines = [facts for event, facts in s.reports if event == "request"]
        ends = [facts for event, facts in s.reports if event == "run_finished"]

        assert "/runs/" + left + "/cancel" == lines.pop()["path"]
        assert all(facts.pop("seconds") >= 0 for facts in lines)
        start = {"method": "POST", "path": "/agents/echo/runs"}
        assert [
            {"method": "GET", "path": "/runs", "status": 400},
            {**start, "status": 400},
            {**start, "status": 200, "run_id": run_id, "closed": "finished"},
            {
                "method": "POST",
                "path": "/agents/silent/runs",
                "status": 499,
                "run_id": left,
                "closed": "client_left",
            },
        ] == lines
        assert [
            (run_id, "echo", "success", None),
            (left, "silent", "cancelled", "client_cancel"),
        ] == [(f["run_id"], f["agent"], f["outcome"], f.get("cause")) for f in ends]
        assert CANARY not in str(s.reports)
