"""LangGraph's own clients, unmodified: `@langchain/langgraph-sdk` of npm, `langgraph-sdk` of PyPI.

Both are asked the same things in the same words: `Python` answers commands as the driver
`clients/langgraph.mjs` does. The Python client is the one that blocks, in a thread. All is over
real sockets; where a client comes back after a cut, it takes its own time for that.
"""

import re
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import attrs
import langgraph_sdk
import pytest
import trio
from cutting import Cut, open_cutter
from langchain_core.messages import AIMessageChunk, convert_to_messages
from node import Driver, node
from raw import wait_until
from talking import LARGE, TEXT, Halved, look, model, side_by_side, thinking

from agentsse import Agent, AgentError, Question, emit, tool
from agentsse.context import ask_user
from agentsse.dialects.langgraph import LANGGRAPH
from agentsse.dialects.native import NATIVE
from agentsse.messages import ToolMessage
from agentsse.server import Server
from agentsse.testing import ask_for, open_server, say

PATIENCE = 60  # seconds; what is cut takes some, for the clients wait before they come back
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
TUPLES = ["messages-tuple", "values"]
ALL = ["values", "updates", "messages-tuple", "custom"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Reconnecting without a Last-Event-ID",  # the client's, where it was cut before any
    "ignore:Request failed, attempting reconnect",
)


# The clients --------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Python:
    """The client of PyPI, which answers commands as the driver of npm's does."""

    url: str
    _clients: dict[str, langgraph_sdk.client.SyncLangGraphClient] = attrs.field(factory=dict)
    _go: trio.Event = attrs.field(factory=trio.Event)

    @classmethod
    @asynccontextmanager
    async def open(cls, url):
        """Make the client."""
        python = cls(url)
        try:
            yield python
        finally:
            for client in python._clients.values():
                client.close()

    def _of(self, url):
        if url not in self._clients:
            self._clients[url] = langgraph_sdk.get_sync_client(url=f"{url}/langgraph", api_key=None)
        return self._clients[url]

    async def call(self, of: str, method: str, *args: Any, **options: Any) -> Any:
        """Anything that is no stream."""
        function = getattr(getattr(self._of(self.url), of), method)
        try:
            value = await trio.to_thread.run_sync(partial(function, *args, **options))
        except Exception as error:  # noqa: BLE001  # whatever it is, the test is to see it
            return {"value": None, "error": _problem(error)}
        return {"value": value, "error": None}

    async def read(self, of, method, *args, url=None, enough=None, pause=None, **options):
        """A stream, until it ends or has said enough."""
        function = getattr(getattr(self._of(url or self.url), of), method)
        seen: dict[str, Any] = {"events": [], "run": None, "error": None}
        if method == "stream":
            options["on_run_created"] = lambda run: seen.update(run=run["run_id"])

        def read() -> None:
            stream = function(*args, **options)
            for part in stream:
                seen["events"].append([part.event, part.data, part.id])
                if enough is not None and enough in str(part.data):
                    stream.close()
                    return
                if pause is not None and len(seen["events"]) == 1:
                    trio.from_thread.run(pause)

        try:
            await trio.to_thread.run_sync(read)
        except Exception as error:  # noqa: BLE001  # as above
            seen["error"] = _problem(error)
        return seen

    async def read_slowly(self, pause, of, method, *args, **options):
        """A stream of which nothing is read behind the first event, for a while."""
        return await self.read(of, method, *args, pause=pause, **options)

    async def read_many(self, several):
        """Several streams side by side, each with its method's arguments and options."""
        return await side_by_side(
            [partial(self.read, of, method, *args, **more) for of, method, args, more in several]
        )


def _problem(error: Exception) -> Any:
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = "\n".join([str(error), *getattr(error, "__notes__", ())])
    return {"name": type(error).__name__, "status": status, "message": message}


@attrs.frozen
class Npm:
    """The client of npm, in a process of Node."""

    url: str
    driver: Driver

    @classmethod
    @asynccontextmanager
    async def open(cls, url):
        """Start a process."""
        async with node("langgraph.mjs") as driver:
            yield cls(url, driver)

    def _command(self, of, method, args, options):
        own = {name: options.pop(name) for name in ("url", "enough") if name in options}
        in_order = ("wait", "action") if method == "cancel" else ()
        args = [*args, *(options.pop(name) for name in in_order if name in options)]
        return {
            "url": self.url, "of": of, "method": _camel(method), "args": args,
            "options": {_camel(name): value for name, value in options.items()}, **own,
        }  # fmt: skip

    async def call(self, of: str, method: str, *args: Any, **options: Any) -> Any:
        """Anything that is no stream."""
        return await self.driver.ask(do="call", **self._command(of, method, args, options))

    async def read(self, of, method, *args, **options):
        """A stream, until it ends or has said enough."""
        return await self.driver.ask(do="read", **self._command(of, method, args, options))

    async def read_slowly(self, pause, of, method, *args, **options):
        """A stream of which nothing is read behind the first event, for a while."""
        command = self._command(of, method, args, options)
        assert "begun" == await self.driver.ask(do="slow", **command)
        await pause()
        return await self.driver.ask(do="go")

    async def read_many(self, several):
        """Several streams side by side, each with its method's arguments and options."""
        commands = [self._command(of, method, args, dict(o)) for of, method, args, o in several]
        return await self.driver.ask(do="many", several=commands)


def _camel(name):
    return re.sub("_([a-z])", lambda found: found[1].upper(), name)


@pytest.fixture(params=[Python, Npm], ids=["python", "npm"])
def client(request):
    return request.param


# The server ---------------------------------------------------------------------------------------


@attrs.frozen
class Site:
    """A server, and a client of it."""

    server: Server
    client: Python | Npm

    @property
    def run(self):
        """The one run that there was."""
        (run,) = self.server.runs
        return run

    async def call(self, of, method, *args, **options):
        """Have the client do something, which succeeds; what came of it."""
        seen = await self.client.call(of, method, *args, **options)
        assert seen["error"] is None
        return seen["value"]

    async def fail(self, of, method, *args, **options):
        """Have the client do something, which fails; how."""
        seen = await self.client.call(of, method, *args, **options)
        assert seen["error"] is not None
        return seen["error"]

    async def open_thread(self, **options):
        """Open a thread; its id."""
        return (await self.call("threads", "create", **options))["thread_id"]

    async def stream(self, thread_id, **options):
        """Run the agent, and stream it; what was seen."""
        options = {"input": HELLO, "stream_mode": TUPLES, **options}
        return await self.client.read("runs", "stream", thread_id, "main", **options)

    async def wait_left(self):
        """Wait until the server has seen that the client is gone."""
        await wait_until(lambda: self.server.app.streams.closed["client_left"] > 0)


@asynccontextmanager
async def site(client, *agents, **settings):
    """Serve agents to a client, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, LANGGRAPH), **settings) as server,
            client.open(server.urls[0]) as opened,
        ):
            yield Site(server, opened)


@tool
async def measure() -> dict[str, float]:
    """Measure."""
    await trio.lowlevel.checkpoint()
    return {"degrees": 21.5}


def of(name, seen):
    """The data of a stream's events of one name."""
    return [data for event, data, _id in seen["events"] if event == name]


def names(seen):
    """The names of a stream's events."""
    return [event for event, _data, _id in seen["events"]]


def ids(seen):
    """The ids of a stream's events."""
    return [event_id for _event, _data, event_id in seen["events"]]


def text_of(seen):
    """What the agent has said, chunk by chunk."""
    chunks = [chunk for chunk, _place in of("messages", seen)]
    return "".join(chunk["content"] for chunk in chunks if chunk["type"] != "tool")


def contents(messages):
    """What each of some messages says, and who says it."""
    return [(message["type"], message["content"]) for message in messages]


# What a run says ----------------------------------------------------------------------------------


async def test_the_client_reads_what_a_model_says(client):
    """Text, what it thinks, and what it has cost; the client is told the run's id at once."""
    _, agent = model(thinking(TEXT))
    async with site(client, agent) as one:
        thread = await one.open_thread()
        seen = await one.stream(thread)
        assert (one.run.id, None) == (seen["run"], seen["error"])
        state = await one.call("threads", "get_state", thread)
    message = None
    for chunk, place in of("messages", seen):
        assert "model" == place["langgraph_node"]
        read = AIMessageChunk(**chunk)
        message = read if message is None else message + read
    assert (TEXT, "Let me see.", 160) == (
        message.content,
        message.additional_kwargs["reasoning_content"],
        message.usage_metadata["total_tokens"],
    )
    *_, last = of("values", seen)
    assert [("human", "Hello"), ("ai", TEXT)] == contents(last["messages"])
    assert (last, []) == (state["values"], state["next"])
    assert [{"run_id": seen["run"], "status": "success"}] == of("end", seen)
    assert ("metadata", "end") == (names(seen)[0], names(seen)[-1])


async def test_the_agents_tools_are_seen(client):
    """Two of them, called side by side; LangChain reads the messages."""
    calls = ask_for(("look", '{"where":"Köln"}'), ("measure", "{}"))
    _, agent = model(calls, say(TEXT), tools=[look, measure])
    async with site(client, agent) as one:
        seen = await one.stream(await one.open_thread(), stream_mode=ALL)
    *_, last = of("values", seen)
    human, asked, first, second, said = convert_to_messages(last["messages"])
    assert ("Hello", TEXT) == (human.content, said.content)
    assert [("look", {"where": "Köln"}), ("measure", {})] == [
        (call["name"], call["args"]) for call in asked.tool_calls
    ]
    assert {
        ("call1", "look", "sunny in Köln"),
        ("call2", "measure", '{"degrees":21.5}'),
    } == {(each.tool_call_id, each.name, each.content) for each in (first, second)}
    nodes = [node for update in of("updates", seen) for node in update]
    assert ["model", "tools", "model"] == nodes
    answers = [chunk for chunk, _place in of("messages", seen) if chunk["type"] == "tool"]
    assert 2 == len(answers)


async def test_what_a_function_does_is_seen(client):
    """Its values and its result are the state, its events are custom, its steps are nodes."""

    async def count(run, input):
        await trio.lowlevel.checkpoint()
        with run.step("count", kind="node"):
            run.set_values(n=input["most"])
        emit("tick", n=1)
        return {"done": True}

    async with site(client, Agent("main", count)) as one:
        seen = await one.stream(await one.open_thread(), input={"most": 3}, stream_mode=ALL)
    *_, last = of("values", seen)
    assert (3, 3, True) == (last["most"], last["n"], last["done"])
    assert [{"name": "tick", "value": {"n": 1}}] == of("custom", seen)
    assert {"count", "main"} == {node for update in of("updates", seen) for node in update}


async def test_runs_side_by_side_are_told_apart(client):
    """Twenty of them, each with its own text, without a thread."""

    async def echo(run, input):
        for letter in input:
            run.text(letter)
            await trio.lowlevel.checkpoint()

    texts = [f"{number}: {TEXT}" for number in range(20)]
    async with site(client, Agent("main", echo)) as one:
        seen = await one.client.read_many(
            [
                ("runs", "stream", [None, "main"],
                 {"input": {"messages": text}, "stream_mode": TUPLES})
                for text in texts
            ]
        )  # fmt: skip
    assert texts == [text_of(each) for each in seen]
    assert 20 == len({each["run"] for each in seen})


async def test_a_client_that_reads_slowly_misses_nothing(client):
    """More waits for it than fits between the two."""

    async def speak(run, _input):
        for _ in range(4):
            run.text(LARGE)
            await trio.lowlevel.checkpoint()

    async with site(client, Agent("main", speak)) as one:

        async def wait_for_the_end():
            await wait_until(lambda: bool(list(one.server.runs)))
            await one.run.done.wait()

        seen = await one.client.read_slowly(
            wait_for_the_end, "runs", "stream", None, "main", input=HELLO,
            stream_mode="messages-tuple",
        )  # fmt: skip
    assert (4 * LARGE, "end", None) == (text_of(seen), names(seen)[-1], seen["error"])


async def test_a_large_answer_of_a_tool_is_carried_on(client):
    """By the thread, and by a client that posts all of it again: more than 1 MB, both ways."""

    @tool
    async def fetch() -> str:
        """Fetch."""
        await trio.lowlevel.checkpoint()
        return LARGE

    asks = ask_for(("fetch", "{}"))
    provider, agent = model(asks, say("Read."), say("Again."), say("Anew."), tools=[fetch])
    async with site(client, agent) as one:
        thread = await one.open_thread()
        seen = await one.stream(thread)
        *_, last = of("values", seen)
        assert ("tool", LARGE) == contents(last["messages"])[2]
        await one.call("runs", "wait", thread, "main", input=HELLO)
        again = {"messages": [*last["messages"], *HELLO["messages"]]}
        state = await one.call("runs", "wait", None, "main", input=again)
        assert "Anew." == state["messages"][-1]["content"]
    for prompt in provider.prompts[2:]:
        (answer,) = (each for each in prompt.messages if isinstance(each, ToolMessage))
        assert len(LARGE) < len(answer.content)
        assert ["Hello", "Read.", "Hello"] == [
            each.text for each in prompt.messages if not isinstance(each, ToolMessage) and each.text
        ]


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "status", "said"),
    [
        ("wait", {"assistant_id": "nobody"}, 404, "one of the agents main"),
        ("create", {"multitask_strategy": "rollback"}, 422, "multitask_strategy: not available"),
        ("wait", {"input": {"messages": [{"role": "ai", "content": "a"}]}}, 400, "a person's"),
        ("create", {"command": {"resume": "yes"}}, 409, "nothing is asked"),
    ],
)
async def test_an_error_before_anything_is_raised(client, method, options, status, said):
    """At once, with its own status and words."""
    _, agent = model()
    assistant = options.pop("assistant_id", "main")
    async with site(client, agent) as one:
        thread = await one.open_thread()
        error = await one.fail("runs", method, thread, assistant, **options)
        options.setdefault("assistant_id", assistant)
    assert (status, True) == (error["status"], said in error["message"])


async def test_a_thread_must_be_there(client):
    """Unless the client says otherwise."""
    _, agent = model(say(TEXT))
    async with site(client, agent) as one:
        seen = await one.stream("t1")
        assert ([], 404) == (seen["events"], seen["error"]["status"])
        seen = await one.stream("t1", if_not_exists="create")
        assert TEXT == text_of(seen)
        assert "idle" == (await one.call("threads", "get", "t1"))["status"]


async def test_an_error_in_the_middle_is_seen(client):
    """What came before it has come, and no end has; who waits has it raised."""
    broken = [*say("half")[:2], AgentError("no luck: ü", code="mine", status=422)]
    _, agent = model(broken, broken)
    async with site(client, agent) as one:
        thread = await one.open_thread()
        seen = await one.stream(thread)
        error = {"error": "mine", "message": "no luck: ü"}
        assert ("half", [error], "error") == (text_of(seen), of("error", seen), names(seen)[-1])
        run = await one.call("runs", "get", thread, seen["run"])
        whole = await one.call("threads", "get", thread)
        assert ("error", "error", error) == (run["status"], whole["status"], whole["error"])
        raised = await one.fail("runs", "wait", None, "main", input=HELLO)
    assert "mine: no luck: ü" in raised["message"]


# Ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [("cancel", None), ("continue", "cancel")])
async def test_a_stop_cancels_the_run(client, policy):
    """All that a page's Stop does is to close the connection; the agent has a policy for it."""
    of_agent, asked = policy
    options = {} if asked is None else {"on_disconnect": asked}
    async with site(client, Halved().agent(on_disconnect=of_agent)) as one:
        thread = await one.open_thread()
        seen = await one.stream(thread, enough="half", **options)
        await one.run.done.wait()
        assert ("cancelled", "disconnect") == (one.run.end.outcome, one.run.end.receipt.cause)
        assert "interrupted" == (await one.call("runs", "get", thread, one.run.id))["status"]
        state = await one.call("threads", "get_state", thread)
    assert ("half ", None) == (text_of(seen), seen["error"])
    assert [("human", "Hello"), ("ai", "half ")] == contents(state["values"]["messages"])


@pytest.mark.parametrize("policy", ["grace:30", None])
async def test_a_run_may_outlive_its_stream(client, policy):
    """The client comes back behind the last id that it has seen, and sees the rest."""
    async with site(client, (halved := Halved()).agent(on_disconnect=policy)) as one:
        thread = await one.open_thread()
        seen = await one.stream(thread, enough="half")
        await one.wait_left()
        assert "running" == one.run.state
        halved.go_on.set()
        *_, last_id = ids(seen)
        rest = await one.client.read(
            "runs", "join_stream", thread, seen["run"], last_event_id=last_id
        )
    assert ("half ", "and half") == (text_of(seen), text_of(rest))
    assert ["messages", "messages", "values", "end"] == names(rest)


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
async def test_a_run_is_cancelled(client, action):
    """Who reads it is told so, and it is no success; a rollback leaves nothing of it."""
    async with site(client, Halved().agent()) as one:
        thread = await one.open_thread()

        async def cancel():
            await wait_until(lambda: bool(list(one.server.runs)))
            await wait_until(lambda: one.run.state == "running")
            other = python_of(one.client)
            await trio.to_thread.run_sync(
                partial(other.runs.cancel, thread, one.run.id, wait=True, action=action)
            )
            other.close()

        seen = await one.client.read_slowly(
            cancel, "runs", "stream", thread, "main", input=HELLO, stream_mode=TUPLES
        )
        assert [{"error": "cancelled", "message": "the run was cancelled (client_cancel)"}] == of(
            "error", seen
        )
        assert "end" not in names(seen)
        runs = await one.call("runs", "list", thread)
        state = await one.call("threads", "get_state", thread)
    if action == "rollback":
        assert ([], None) == (runs, state["checkpoint"])
    else:
        assert ["interrupted"] == [run["status"] for run in runs]
        assert ("ai", "half ") == contents(state["values"]["messages"])[-1]


def python_of(client):
    """A client of its own, for while the other one reads."""
    return langgraph_sdk.get_sync_client(url=f"{client.url}/langgraph", api_key=None)


@pytest.mark.parametrize("waits", [True, False])
async def test_a_background_run_is_cancelled(client, waits):
    """Whoever waits for it is told that it came to nothing."""
    async with site(client, Halved().agent()) as one:
        thread = await one.open_thread()
        run = await one.call("runs", "create", thread, "main", input=HELLO)
        assert one.run.id == run["run_id"]
        await one.call("runs", "cancel", thread, run["run_id"], wait=waits, action="interrupt")
        state = await one.call("runs", "join", thread, run["run_id"])
        assert "cancelled" == state["__error__"]["error"]
        again = await one.client.call(
            "runs", "cancel", thread, run["run_id"], wait=waits, action="interrupt"
        )
        assert again["error"] is None


async def test_a_server_that_stops_has_not_answered(client):
    """The stream ends with an error."""
    async with site(client, Halved().agent()) as one:

        async def stop():
            await wait_until(lambda: bool(list(one.server.runs)))
            await wait_until(lambda: one.run.state == "running")
            await one.server.drain(0.1)

        seen = await one.client.read_slowly(
            stop, "runs", "stream", None, "main", input=HELLO, stream_mode=TUPLES
        )
    assert [{"error": "cancelled", "message": "the run was cancelled (shutdown)"}] == of(
        "error", seen
    )
    assert "end" not in names(seen)


# Coming back --------------------------------------------------------------------------------------

CUTS = {
    "before any event": Cut(b"\r\n\r\n"),
    "in the middle of the first": Cut(b'"attempt"', "rst"),
    "in the middle of a text": Cut(b'"content":"ha'),
    "behind an event": Cut(b"event: updates\n", "rst"),
    "in the middle of the last": Cut(b'"status":"suc'),
    "behind the last": Cut(b'"status":"success"}\n\n', "rst"),
}


async def test_a_client_that_is_cut_off_comes_back(client):
    """By itself, and sees an unbroken sequence wherever it was cut."""
    halved = Halved()
    halved.go_on.set()
    async with site(client, halved.agent()) as one, AsyncExitStack() as stack:
        url = one.server.urls[0]
        cutters = [await stack.enter_async_context(open_cutter(url, cut)) for cut in CUTS.values()]
        whole, *several = await one.client.read_many(
            [
                ("runs", "stream", [None, "main"],
                 {"input": HELLO, "stream_mode": ALL, "url": each})
                for each in (url, *(cutter.url for cutter in cutters))
            ]
        )  # fmt: skip
    for name, cutter, seen in zip(CUTS, cutters, several, strict=True):
        assert (name, None, "half and half") == (name, seen["error"], text_of(seen))
        assert (name, ids(whole)) == (name, ids(seen))
        assert (name, names(whole)) == (name, names(seen))
        first, *others = cutter.asked
        assert (name, True) == (name, first.startswith(b"POST /langgraph/runs/stream "))
        place = f"GET /langgraph/threads/{seen['run']}/runs/{seen['run']}/stream".encode()
        assert (name, [True]) == (name, [asked.startswith(place) for asked in others])


async def test_a_stream_lasts_as_long_as_its_run(client):
    """Others are told to come back now and then; this client would take that for the end."""
    async with site(client, (halved := Halved()).agent(), rotation=0.001) as one:
        thread = await one.open_thread()
        run = await one.call("runs", "create", thread, "main", input=HELLO)

        async def go_on():
            await wait_until(lambda: one.server.app.streams.open == 1)
            await trio.sleep(0.05)  # it would have been told long ago
            halved.go_on.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            seen = await one.client.read(
                "runs", "join_stream", thread, run["run_id"], last_event_id="-1"
            )
        assert 0 == one.server.app.streams.closed["rotated"]
    assert ("half and half", "end", None) == (text_of(seen), names(seen)[-1], seen["error"])


async def test_who_joins_sees_what_it_asks_for(client):
    """All of a run from its beginning, or what comes; of a run that is over, the end."""
    async with site(client, (halved := Halved()).agent()) as one:
        thread = await one.open_thread()
        run = await one.call("runs", "create", thread, "main", input=HELLO)
        join = partial(one.client.read, "runs", "join_stream", thread, run["run_id"])
        seen = await join(enough="half", last_event_id="-1")
        assert ["metadata", "values", "messages"] == names(seen)
        halved.go_on.set()
        state = await one.call("runs", "join", thread, run["run_id"])
        assert "half and half" == state["messages"][-1]["content"]
        assert "end" == names(await join())[-1]
        whole = await join(last_event_id="-1", stream_mode="values")
        assert ["metadata", "values", "values", "end"] == names(whole)
        *_, last_id = ids(whole)
        assert [] == names(await join(last_event_id=last_id, stream_mode="values"))
        (listed,) = await one.call("runs", "list", thread, status="success")
    assert ("success", run["run_id"]) == (listed["status"], listed["run_id"])


async def test_leaving_a_stream_that_was_joined_may_cancel(client):
    """Where the client says so."""
    async with site(client, Halved().agent()) as one:
        thread = await one.open_thread()
        run = await one.call("runs", "create", thread, "main", input=HELLO)
        await one.client.read(
            "runs", "join_stream", thread, run["run_id"], last_event_id="-1",
            cancel_on_disconnect=True, enough="half",
        )  # fmt: skip
        await one.run.done.wait()
    assert ("cancelled", "disconnect") == (one.run.end.outcome, one.run.end.receipt.cause)


# People -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_id", [True, False])
async def test_a_question_is_answered(client, by_id):
    """The response ends with an interrupt; the answer's goes on with the same run."""
    arguments = '{"question":"Which one? ü","options":["red","blue"]}'
    provider, agent = model(
        [*say("Well.")[:-1], *ask_for(("ask_user", arguments))], say("Blue it is."),
        tools=[ask_user],
    )  # fmt: skip
    async with site(client, agent) as one:
        thread = await one.open_thread()
        asked = await one.stream(thread)
        *_, last = of("values", asked)
        (interrupt,) = last["__interrupt__"]
        (question,) = interrupt["value"]["questions"]
        assert ("Which one? ü", ["red", "blue"]) == (
            question["prompt"],
            [option["id"] for option in question["options"]],
        )
        assert [{"run_id": asked["run"], "status": "interrupted"}] == of("end", asked)
        assert "interrupted" == (await one.call("runs", "get", thread, asked["run"]))["status"]
        whole = await one.call("threads", "get", thread)
        state = await one.call("threads", "get_state", thread)
        assert ("interrupted", [interrupt], [interrupt], ["main"]) == (
            whole["status"],
            whole["interrupts"][asked["run"]],
            state["tasks"][0]["interrupts"],
            state["next"],
        )
        joined = await one.client.read("runs", "join_stream", thread, asked["run"])
        assert ([interrupt], "end") == (
            of("values", joined)[-1]["__interrupt__"],
            names(joined)[-1],
        )
        answer = {interrupt["id"]: "blue"} if by_id else "blue"
        seen = await one.stream(thread, input=None, command={"resume": answer})
        assert (asked["run"], "Blue it is.") == (seen["run"], text_of(seen))
        assert [{"run_id": asked["run"], "status": "success"}] == of("end", seen)
        assert all("__interrupt__" not in each for each in of("values", seen))
        error = await one.fail("runs", "wait", thread, "main", command={"resume": answer})
        assert 409 == error["status"]
    assert '"blue"' == provider.prompts[1].messages[-1].content


async def test_who_waits_for_a_run_is_told_what_it_asks(client):
    """And an answer that does not fit is refused; what is said next is one, too."""

    async def order(run, _input):
        run.text("Well.")
        return await run.ask(Question(id="sure", kind="confirm", prompt="Are you sure?"))

    async with site(client, Agent("main", order)) as one:
        thread = await one.open_thread()
        state = await one.call("runs", "wait", thread, "main", input=HELLO)
        assert "Are you sure?" == state["__interrupt__"][0]["value"]["questions"][0]["prompt"]
        error = await one.fail("runs", "wait", thread, "main", command={"resume": "perhaps"})
        assert (400, "waiting") == (error["status"], one.run.state)
        state = await one.call("runs", "wait", thread, "main", input={"messages": "yes"})
    assert (True, "Well.") == (state["result"], state["messages"][-1]["content"])


async def ask_for_two(run, _input):
    """An agent that asks two things side by side, and says what it was told."""
    told = {}

    async def ask(name, question):
        told[name] = await run.ask(question)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "color", "Which one?")
        nursery.start_soon(ask, "number", "How many?")
    run.text(f"half {told['number']} of {told['color']}.")


@pytest.mark.parametrize("cut", [None, "before any event", "in the middle of a text"])
async def test_two_questions_are_answered_by_one_command(client, cut):
    """The response goes on to the end of the run, also where it was cut off meanwhile."""
    async with site(client, Agent("main", ask_for_two)) as one:
        thread = await one.open_thread()
        await one.stream(thread)
        await wait_until(lambda: len(one.run.context.asked) == 2)
        state = await one.call("threads", "get_state", thread)
        answers = {
            interrupt["id"]: {"Which one?": "blue", "How many?": "3"}[question["prompt"]]
            for interrupt in state["interrupts"]
            for question in interrupt["value"]["questions"]
        }
        cuts = [] if cut is None else [CUTS[cut]]
        async with open_cutter(one.server.urls[0], *cuts) as cutter:
            resume = {"input": None, "command": {"resume": answers}}
            seen = await one.stream(thread, **resume, url=cutter.url)
            assert len(cuts) + 1 == len(cutter.asked)
        state = await one.call("threads", "get_state", thread)
    assert ("half 3 of blue.", None) == (text_of(seen), seen["error"])
    assert {"run_id": one.run.id, "status": "success"} == of("end", seen)[-1]
    *_, last = of("values", seen)
    assert ([("human", "Hello"), ("ai", "half 3 of blue.")], last) == (
        contents(last["messages"]),
        state["values"],
    )


# Threads and assistants ---------------------------------------------------------------------------


async def test_a_thread_goes_on(client):
    """A second run knows what was said in the first; the thread's state has both."""
    provider, agent = model(say("One."), say("Two."))
    async with site(client, agent) as one:
        thread = await one.open_thread(metadata={"a": 1})
        await one.stream(thread)
        await one.stream(thread, input={"messages": "More!"})
        (state,) = await one.call("threads", "get_history", thread)
        whole = await one.call("threads", "get", thread)
    expected = [("human", "Hello"), ("ai", "One."), ("human", "More!"), ("ai", "Two.")]
    assert expected == contents(state["values"]["messages"])
    assert (state["values"], {"a": 1}) == (whole["values"], whole["metadata"])
    assert ["Hello", "One.", "More!"] == [each.text for each in provider.prompts[1].messages]


TURN = [("human", "Hello"), ("ai", "half and half")]


@pytest.mark.parametrize("cut", [None, "in the middle of a text"])
async def test_a_second_turn_shows_the_first_one(client, cut):
    """Each message once, in its order, and with one id: in all states, and behind a cut."""
    halved = Halved()
    halved.go_on.set()
    async with site(client, halved.agent()) as one:
        thread = await one.open_thread()
        *_, first = of("values", await one.stream(thread))
        cuts = [] if cut is None else [CUTS[cut]]
        async with open_cutter(one.server.urls[0], *cuts) as cutter:
            seen = await one.stream(thread, stream_mode=ALL, url=cutter.url)
            assert len(cuts) + 1 == len(cutter.asked)
        whole = await one.call("threads", "get", thread)
        state = await one.call("threads", "get_state", thread)
        joined = await one.call("runs", "join", thread, seen["run"])
        third = await one.call("runs", "wait", thread, "main", input=HELLO)
    begun, *_, last = (values["messages"] for values in of("values", seen))
    assert (TURN, [*TURN, TURN[0]]) == (contents(first["messages"]), contents(begun))
    assert (2 * TURN, last[:-1], "half and half") == (contents(last), begun, text_of(seen))
    assert last == state["values"]["messages"] == joined["messages"] == whole["values"]["messages"]
    assert {last[-1]["id"]} == {chunk["id"] for chunk, _place in of("messages", seen)}
    assert (3 * TURN, last[:2]) == (contents(third["messages"]), third["messages"][:2])
    assert 6 == len({each["id"] for each in third["messages"]})


async def test_a_turn_that_has_to_wait_shows_what_it_has_waited_for(client):
    """To whoever joins it meanwhile, in several modes; also what its own request has told."""
    go_on = trio.Event()

    @tool
    async def rest() -> str:
        """Rest."""
        await go_on.wait()
        return "rested"

    _, agent = model(ask_for(("rest", "{}")), say("One."), say("Two."), tools=[rest])
    more = [{"role": "assistant", "content": "Well."}, {"role": "user", "content": "More!"}]
    async with site(client, agent) as one, trio.open_nursery() as nursery:
        thread = await one.open_thread()
        await one.call("runs", "create", thread, "main", input=HELLO)
        second = await one.call(
            "runs", "create", thread, "main", input={"messages": more},
            multitask_strategy="enqueue",
        )  # fmt: skip
        assert "pending" == second["status"]

        async def let_go():
            await wait_until(lambda: one.server.app.streams.open == 1)
            go_on.set()

        nursery.start_soon(let_go)
        join = partial(one.client.read, "runs", "join_stream", thread, second["run_id"])
        seen = await join(last_event_id="-1", stream_mode=TUPLES)
        again = await join(last_event_id=ids(seen)[1], stream_mode=TUPLES)
        state = await one.call("threads", "get_state", thread)
    expected = [
        ("human", "Hello"), ("ai", ""), ("tool", "rested"), ("ai", "One."),
        ("ai", "Well."), ("human", "More!"), ("ai", "Two."),
    ]  # fmt: skip
    begun, *_, last = of("values", seen)
    assert (expected[:-1], expected) == (contents(begun["messages"]), contents(last["messages"]))
    assert (last, seen["events"][2:]) == (state["values"], again["events"])
    assert {"metadata", "values", "messages", "end"} == set(names(seen))
    assert 7 == len({each["id"] for each in last["messages"]})


async def test_who_is_cut_off_while_it_waits_is_given_the_state_all_the_same():
    """By the Python client, which comes back for it; the other one lets its caller know."""
    halved = Halved()
    halved.go_on.set()
    async with site(Python, halved.agent()) as one:
        thread = await one.open_thread()
        async with open_cutter(one.server.urls[0], Cut(b"half and", "rst")) as cutter:
            python = python_of(Python(cutter.url))
            wait = partial(python.runs.wait, thread, "main", input=HELLO)
            state = await trio.to_thread.run_sync(wait)
            python.close()
        (_, again) = cutter.asked
        path = f"GET /langgraph/threads/{thread}/runs/{one.run.id}/join HTTP".encode()
        assert again.startswith(path)
    assert TURN == contents(state["messages"])


async def test_threads_are_kept_apart(client):
    """They are found by what they are, and gone when they are deleted."""
    _, agent = model()
    async with site(client, agent) as one:
        first = await one.open_thread(metadata={"who": "a"}, thread_id="first")
        second = await one.open_thread(metadata={"who": "b"})
        error = await one.fail("threads", "create", thread_id="first")
        again = await one.open_thread(thread_id="first", if_exists="do_nothing")
        assert (409, first) == (error["status"], again)
        (found,) = await one.call("threads", "search", metadata={"who": "b"})
        assert second == found["thread_id"]
        await one.call("threads", "delete", first)
        assert 404 == (await one.fail("threads", "get", first))["status"]
        left = await one.call("threads", "search")
    assert [second] == [each["thread_id"] for each in left]


async def test_a_busy_thread_is_waited_for_or_not(client):
    """As the client wishes."""
    async with site(client, (halved := Halved()).agent()) as one:
        thread = await one.open_thread()
        first = await one.call("runs", "create", thread, "main", input=HELLO)
        error = await one.fail(
            "runs", "create", thread, "main", input=HELLO, multitask_strategy="reject"
        )
        assert 409 == error["status"]
        second = await one.call("runs", "create", thread, "main", input=HELLO)
        assert "pending" == second["status"]
        assert "busy" == (await one.call("threads", "get", thread))["status"]
        halved.go_on.set()
        await one.call("runs", "join", thread, second["run_id"])
        runs = await one.call("runs", "list", thread)
    assert [(second["run_id"], "success"), (first["run_id"], "success")] == [
        (run["run_id"], run["status"]) for run in runs
    ]


async def test_agents_are_assistants(client):
    """By their names."""
    _, agent = model()
    async with site(client, agent, Agent("other", Halved().run)) as one:
        found = await one.call("assistants", "search")
        assert ["main", "other"] == [each["assistant_id"] for each in found]
        assert found[1] == await one.call("assistants", "get", "other")
        assert 404 == (await one.fail("assistants", "get", "nobody"))["status"]


async def test_runs_without_a_thread_have_one_of_their_own(client):
    """By their ids, so that what they ask can be answered."""

    async def order(run, _input):
        return await run.ask("Which one?")

    async with site(client, Agent("main", order)) as one:
        seen = await one.stream(None)
        (metadata,) = of("metadata", seen)
        assert seen["run"] == metadata["run_id"] == metadata["thread_id"]
        thread = metadata["thread_id"]
        state = await one.call("runs", "wait", thread, "main", command={"resume": "blue"})
    assert "blue" == state["messages"][-1]["content"]
