"""One run in many protocols at once: started in one, watched in all, stopped in another.

What one protocol alone says, and how, is in its own tests. These are over real sockets.
"""

import json
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import httpx2
import pytest
import trio
from raw import connect, request
from trio.testing import wait_all_tasks_blocked

from agentsse import Agent, RunContext, agent, tool
from agentsse.dialects import Dialect
from agentsse.events import AnyEvent, InputRequested, RunFinished
from agentsse.server import DIALECTS as SHIPPED, Server
from agentsse.sse import Frame
from agentsse.testing import ScriptedProvider, ask_for, open_server, say

PATIENCE = 30.0  # seconds until a test that hangs has failed

DIALECTS = tuple(dialect.load() for dialect in SHIPPED)

# How a stream in each dialect says that the run is over, given the frames of it.
ENDS: dict[str, Callable[[Frame], bool]] = {
    "native": lambda frame: frame.event == "run_finished",
    "agui": lambda frame: json.loads(frame.data)["type"] in ("RUN_FINISHED", "RUN_ERROR"),
    "vercel": lambda frame: frame.data == "[DONE]",
    "openai_responses": lambda frame: frame.data == "[DONE]",
    "langgraph": lambda frame: frame.event in ("end", "error"),
    "agentlang": lambda frame: (
        frame.event == "result" or (frame.event == "error" and json.loads(frame.data)["terminal"])
    ),
    "lightspeed": lambda frame: json.loads(frame.data)["event"] in ("end", "error", "interrupted"),
    "kilroy": lambda frame: frame.event == "done",
    "openai_chat": lambda frame: frame.data == "[DONE]" or "error" in json.loads(frame.data),
    "hive": lambda frame: (
        json.loads(frame.data)["type"] in ("execution_completed", "execution_failed")
        and not json.loads(frame.data)["stream_id"].startswith("worker")
    ),
}
NAMES = sorted(ENDS)


# Their responses end at a question to a person, and the next one tells what follows; whoever only
# watches sees both.
END_AT_QUESTIONS = tuple(each.name for each in DIALECTS if InputRequested in each.framing.ends_at)


@attrs.define(eq=False)
class Counting:
    """An encoder that counts how often each event has been given to it."""

    encoder: Any
    counts: Counter[tuple[str, int]]

    def feed(self, event: AnyEvent) -> Any:
        """Count, and encode."""
        self.counts[event.run_id, event.seq] += 1
        return self.encoder.feed(event)


def counted(dialect: Dialect, counts: Counter[tuple[str, int]]) -> Dialect:
    """The same dialect; `counts` says how often each event was encoded for runs."""
    return attrs.evolve(dialect, encoder=lambda options: Counting(dialect.encoder(options), counts))


@tool
async def lookup(name: str) -> str:
    """Look a name up."""
    await trio.lowlevel.checkpoint()
    return f"{name} is here"


@agent
async def worker(run: RunContext, input: Any) -> Any:
    """Do a part of it."""
    await trio.lowlevel.checkpoint()
    run.text(f"working on {input}")
    return {"done": input}


def everything(gate: trio.Event) -> Agent:
    """An agent that does all there is; it goes on when the gate opens."""
    provider = ScriptedProvider(
        [ask_for(("lookup", '{"name": "ada"}'), ("lookup", '{"name": "bob"}')), say("All there.")]
    )
    model = Agent.of_model("model", "scripted:x", provider=provider, tools=[lookup])

    @agent(name="everything")
    async def act(run: RunContext, input: Any) -> Any:
        run.set_values(stage="waiting")
        await gate.wait()
        run.emit("progress", percent=50)
        run.reasoning("Hm.")
        with run.step("think") as step:
            step.result = await model(run, input)
        sure = await run.ask("Sure?")
        report = await run.delegate("worker", "a part")
        run.set_values(stage=None)
        return {"said": step.result, "sure": sure, "report": report}

    return act


@agent
async def endless(run: RunContext, _input: Any) -> None:
    """Say something, and wait to be cancelled."""
    run.text("I begin")
    await trio.sleep_forever()


@attrs.define(eq=False)
class Site:
    """A server, and a client that behaves."""

    server: Server
    http: httpx2.AsyncClient

    async def post(self, path: str, body: Any = None, *, status: int = 200) -> Any:
        """What a POST answers, which must have that status."""
        answer = await self.http.post(path, json=body if body is not None else {})
        assert answer.status_code == status, answer.text
        return answer.json()

    async def begin(self, name: str, **fields: Any) -> str:
        """Start a run in the background; its id."""
        body = {"background": True, **fields}
        return str((await self.post(f"/agents/{name}/runs", body, status=202))["id"])

    async def read(
        self,
        path: str,
        ends: Callable[[Frame], bool] = lambda _frame: False,
        *,
        last_id: str | None = None,
        began: trio.Event | None = None,
    ) -> list[Frame]:
        """Read a stream up to the frame where `ends` says so, or to its end."""
        headers = {} if last_id is None else {"last_event_id": last_id}
        async with connect(self.server.urls[0], is_native=False) as client:
            await client.send(request("GET", path, **headers))
            while await client.receive():
                assert client.status == 200
                if began is not None:
                    began.set()
                for number, frame in enumerate(client.frames):
                    if ends(frame):
                        return client.frames[: number + 1]
            return client.frames


@asynccontextmanager
async def site(*agents: Agent, dialects: tuple[Dialect, ...] = DIALECTS) -> AsyncIterator[Site]:
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=dialects) as server,
            httpx2.AsyncClient(base_url=server.urls[0], timeout=None) as http,
        ):
            yield Site(server, http)


def test_every_dialect_is_watched_here():
    """A new one is put into these tests, or this fails."""
    assert NAMES == sorted(dialect.name for dialect in DIALECTS)


async def test_one_run_is_watched_in_every_dialect_at_once_and_encoded_once_in_each():
    """Two readers in each protocol see it whole, and end when it does; a session's stream too."""
    gate = trio.Event()
    counts: dict[str, Counter[tuple[str, int]]] = {name: Counter() for name in NAMES}
    dialects = tuple(counted(dialect, counts[dialect.name]) for dialect in DIALECTS)
    streams: dict[str, list[list[Frame]]] = {name: [] for name in NAMES}
    session: list[list[Frame]] = []
    async with site(everything(gate), worker, dialects=dialects) as s:
        await s.post("/api/sessions", {"session_id": "t", "agent_id": "everything"}, status=201)
        run_id = await s.begin("everything", input="all of it", thread_id="t")

        async def watch(path: str, name: str, into: list[list[Frame]], *, began: trio.Event):
            is_session = "/api/" in path  # it goes on
            into.append(
                await s.read(path, ENDS[name] if is_session else lambda _: False, began=began)
            )

        async with trio.open_nursery() as nursery:
            ready = []
            for name in (*NAMES, *NAMES):
                ready.append(trio.Event())
                path = f"/runs/{run_id}/events?dialect={name}"
                nursery.start_soon(partial(watch, path, name, streams[name], began=ready[-1]))
            for path in ("/api/sessions/t/events", f"/kilroy/runs/{run_id}/events"):
                ready.append(trio.Event())
                name, into = ("hive", session) if "api" in path else ("kilroy", streams["kilroy"])
                nursery.start_soon(partial(watch, path, name, into, began=ready[-1]))
            for each in ready:
                await each.wait()
            gate.set()
            run = s.server.runs.find(run_id)
            await run.wait_done_or_asking()
            await s.post(f"/runs/{run_id}/input", {"answers": {"answer": "very"}})

        assert run.result == {
            "said": "All there.",
            "sure": "very",
            "report": {"done": "a part"},
        }

    for name, seen in streams.items():
        for frames in seen:
            assert frames == seen[0]
            ends = [ENDS[name](frame) for frame in frames]
            assert (True, 2 if name in END_AT_QUESTIONS else 1) == (ends[-1], sum(ends))
    assert ENDS["hive"](session[0][-1])
    for name in NAMES:
        own = {key: n for key, n in counts[name].items() if key[0] == run_id}
        assert {(run_id, seq): 1 for seq in range(1, run.log.end + 1)} == own


CANCELS: dict[str, Callable[[str], tuple[str, dict[str, str]]]] = {
    "native": lambda run_id: (f"/runs/{run_id}/cancel", {"reason": "enough"}),
    "agui": lambda run_id: (f"/agui/endless/runs/{run_id}/cancel", {}),
    "vercel": lambda _run_id: ("/api/chat/t/stop", {}),
    "langgraph": lambda run_id: (f"/langgraph/threads/t/runs/{run_id}/cancel?wait=1", {}),
    "lightspeed": lambda run_id: (
        "/v1/streaming_query/interrupt",
        {"request_id": str(uuid.UUID(hex=run_id))},
    ),
    "kilroy": lambda run_id: (f"/pipelines/{run_id}/cancel", {}),
    "hive": lambda run_id: ("/api/sessions/t/stop", {"execution_id": run_id}),
}


@pytest.mark.parametrize("name", sorted(CANCELS))
async def test_a_run_that_is_cancelled_in_one_dialect_ends_in_all(name):
    """Whoever stops it, each stream ends, and says so in its own words."""
    streams: dict[str, list[Frame]] = {}
    async with site(endless, worker) as s:
        await s.post("/api/sessions", {"session_id": "t", "agent_id": "endless"}, status=201)
        run_id = await s.begin("endless", thread_id="t")

        async def watch(dialect: str, began: trio.Event):
            path = f"/runs/{run_id}/events?dialect={dialect}"
            streams[dialect] = await s.read(path, began=began)

        async with trio.open_nursery() as nursery:
            for dialect in NAMES:
                began = trio.Event()
                nursery.start_soon(watch, dialect, began)
                await began.wait()
            path, body = CANCELS[name](run_id)
            await s.post(path, body)
        end = s.server.runs.find(run_id).end

    assert ("cancelled", "client_cancel") == (end.outcome, end.receipt.cause)
    assert NAMES == sorted(streams)
    for dialect, frames in streams.items():
        assert [False] * (len(frames) - 1) + [True] == [ENDS[dialect](f) for f in frames], dialect


def told(frames: list[Frame]) -> list[tuple[str, bytes | str]]:
    return [(frame.event, frame.data) for frame in frames]


@pytest.mark.parametrize(
    "path",
    [
        "/runs/{}/events",
        "/kilroy/runs/{}/events",
        "/pipelines/{}/events",
        "/api/sessions/t/workers/{}/events",
    ],
)
async def test_a_run_is_resumed_at_any_cut(path):
    """Behind each id that a client has seen comes exactly the rest, live and after the end."""
    gate = trio.Event()
    async with site(everything(gate), worker) as s:
        await s.post("/api/sessions", {"session_id": "t", "agent_id": "everything"}, status=201)
        run_id = await s.begin("everything", input="x", thread_id="t")
        path = path.format(run_id)
        gate.set()
        run = s.server.runs.find(run_id)
        await run.wait_done_or_asking()
        rest: list[list[Frame]] = []
        before = await s.read(path, lambda frame: int(frame.id.split(".")[0]) >= run.log.end - 1)

        async def read_rest(last_id: str):
            rest.append(await s.read(path, last_id=last_id))

        async with trio.open_nursery() as nursery:
            for frame in before:
                nursery.start_soon(read_rest, frame.id)
            await wait_all_tasks_blocked()
            run.context.answer_next("yes")
        whole = await s.read(path)
        by_id = {frame.id: number for number, frame in enumerate(whole)}
        assert len(by_id) == len(whole)
        expected = [told(whole[by_id[frame.id] + 1 :]) for frame in before]
        assert sorted(expected) == sorted(map(told, rest))
        for number, frame in enumerate(whole[:-1]):
            assert told(whole[number + 1 :]) == told(await s.read(path, last_id=frame.id))
        over = await s.http.get(path, headers={"Last-Event-ID": whole[-1].id})
        assert over.status_code == 204


@pytest.mark.parametrize("path", ["/threads/t/events", "/threads/t/events?watch=*",
                                  "/api/sessions/t/events"])  # fmt: skip
async def test_a_threads_stream_is_resumed_at_any_cut(path):
    """No gap and no duplicate, with a worker's events among the others."""
    gate = trio.Event()
    gate.set()
    async with site(everything(gate), worker) as s:
        await s.post("/api/sessions", {"session_id": "t", "agent_id": "everything"}, status=201)
        whole: list[Frame] = []

        async def read_all(began: trio.Event):
            whole.extend(await s.read(path, is_end_of_thread, began=began))

        async with trio.open_nursery() as nursery:
            began = trio.Event()
            nursery.start_soon(read_all, began)
            await began.wait()
            run_id = await s.begin("everything", input="x", thread_id="t")
            run = s.server.runs.find(run_id)
            await run.wait_done_or_asking()
            run.context.answer_next("yes")
        ids = [frame.id for frame in whole if frame.id]
        for place in random.sample(ids[:-1], min(12, len(ids) - 1)):
            read = await s.read(path, is_end_of_thread, last_id=place)
            after = [frame for frame in read if not is_greeting(frame)]
            behind = next(n for n, frame in enumerate(whole) if frame.id == place)
            assert told(whole[behind + 1 :]) == told(after)


def is_greeting(frame: Frame) -> bool:
    return frame.event == "message" and json.loads(frame.data).get("type") == "session_snapshot"


def is_end_of_thread(frame: Frame) -> bool:
    """Whether the run that a client has started is over; its workers are before."""
    data = json.loads(frame.data)
    if "path" in data:
        return False
    return ENDS["hive"](frame) if frame.event == "message" else ENDS["native"](frame)


def test_the_end_is_a_type_that_passes_every_filter():
    """What these tests wait for is what every client waits for."""
    assert "run_finished" == RunFinished.__struct_config__.tag
