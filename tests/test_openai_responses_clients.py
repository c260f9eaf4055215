"""OpenAI's own clients, unmodified, at an agent's responses: npm's `openai`, and PyPI's.

Both are asked the same things in the same words: `Python` does what `clients/openai_responses.mjs`
does. It is the client that blocks, in a thread. A stream is read in each way that a client has:
`raw` gives its events as they come, `helper` puts the response together and checks their order,
`readable`, which npm's alone has, is the helper of a page that is fed by the client of a server.

All is over real sockets, and nothing waits for the clock.
"""

import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar

import attrs
import openai
import pytest
import trio
from cutting import Cut, Cutter, open_cutter
from raw import wait_until
from talking import (
    FILLER,
    LARGE,
    TEXT,
    Halved,
    OfNode,
    OpenAI,
    look,
    model,
    side_by_side,
    thinking,
)
from trio.testing import wait_all_tasks_blocked

from agentsse import Agent, AgentError, Question, tool
from agentsse.context import ask_user
from agentsse.dialects.native import NATIVE
from agentsse.dialects.openai_responses import OPENAI_RESPONSES
from agentsse.events import Option
from agentsse.messages import AssistantMessage, UserMessage
from agentsse.server import Server
from agentsse.testing import ask_for, open_server, say

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds
HELLO = {"model": "main", "input": "Hello"}
MORE = "response.output_text.delta"


# The clients --------------------------------------------------------------------------------------


class Python(OpenAI):
    """The client of PyPI."""

    ways: ClassVar = ("raw", "helper")

    async def read_slowly(self, pause: Callable[[], Awaitable[object]], **command: Any) -> Any:
        """Read a stream, and behind its first text nothing, for a while."""
        return await self.ask("read", pause=partial(trio.from_thread.run, pause), **command)

    async def read_many(self, count: int) -> Any:
        """Read several streams at once, in as many threads."""
        creates = [{"model": "main", "input": f"I am {place}"} for place in range(count)]
        return await side_by_side(
            [partial(self.ask, "read", how="helper", create=create) for create in creates]
        )

    def open_stream(self, how: str, *, create: Any, find: Any, through: str | None) -> Any:
        """A stream, as a part of the client gives it."""
        client = (
            self.client if through is None else self.client.with_options(base_url=f"{through}/v1")
        )
        responses = client.responses
        match how, find:
            case "raw", None:
                return responses.create(**create, stream=True)
            case "raw", _:
                return responses.retrieve(find["id"], stream=True, **find.get("query", {}))
            case _, None:
                return responses.stream(**create)
            case _:
                return responses.stream(response_id=find["id"], **find.get("query", {}))

    def do_read(
        self,
        *,
        how: str,
        create: Any = None,
        find: Any = None,
        through: str | None = None,
        stop_after: str | None = None,
        pause: Callable[[], object] | None = None,
    ) -> Any:
        """Read a stream, `through` another server, perhaps, than the one that is there for all."""
        seen = {"types": [], "numbers": [], "text": "", "response": None, "error": None}
        try:
            with self.open_stream(how, create=create, find=find, through=through) as stream:
                for event in stream:
                    seen["types"].append(event.type)
                    seen["numbers"].append(event.sequence_number)
                    if event.type == MORE:
                        seen["text"] += event.delta
                        pause = pause and pause()
                    if hasattr(event, "response"):
                        seen["response"] = event.response.to_dict(mode="json")
                    if event.type == stop_after:
                        stream.close()
                        return seen
                if how == "helper":
                    seen["response"] = stream.get_final_response().to_dict(mode="json")
        except (openai.APIError, RuntimeError) as error:
            seen["error"] = problem(error)
        return seen

    def do_create(self, create: Any, retries: int = 0) -> Any:
        """Wait for a response."""
        return told(
            lambda: self.client.with_options(max_retries=retries).responses.create(**create)
        )

    def do_retrieve(self, id: str) -> Any:
        """Look at one."""
        return told(lambda: self.client.responses.retrieve(id))

    def do_cancel(self, id: str) -> Any:
        """Cancel it."""
        return told(lambda: self.client.responses.cancel(id))

    def do_delete(self, id: str) -> Any:
        """Delete it."""
        return told(lambda: self.client.responses.delete(id))

    def do_input_items(self, id: str) -> Any:
        """What it was told."""
        return told(lambda: [item.to_dict() for item in self.client.responses.input_items.list(id)])

    def do_converse(self, model: str, first: str, second: str) -> Any:
        """A conversation that the client keeps by itself: all of it goes back."""
        create = self.client.responses.create
        output = create(model=model, input=first).output
        said = [{"role": "user", "content": first}, *output, {"role": "user", "content": second}]
        return told(lambda: create(model=model, input=said))

    def do_answer_calls(self, create: Any, outputs: Any, filler: str) -> Any:
        """A conversation that the server keeps, in which the client makes the calls."""
        first = self.client.responses.create(**create)
        calls = [item for item in first.output if item.type == "function_call"]
        answers = [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": outputs[call.name] + filler * 100_000,
            }
            for call in calls
        ]
        again = {**create, "input": answers, "previous_response_id": first.id}
        return told(
            lambda: {
                "calls": [call.to_dict() for call in calls],
                "second": self.client.responses.create(**again).to_dict(mode="json"),
            }
        )


def told(ask: Callable[[], Any]) -> Any:
    try:
        response = ask()
    except openai.APIError as error:
        return {"response": None, "error": problem(error)}
    if hasattr(response, "output_text"):
        response = {**response.to_dict(mode="json"), "output_text": response.output_text}
    return {"response": response, "error": None}


def problem(error: Exception) -> Any:
    return {
        "name": type(error).__name__,
        "status": getattr(error, "status_code", None),
        "code": getattr(error, "code", None),
        "message": str(error),
    }


class Npm(OfNode):
    """The client of npm, in a process of Node."""

    script: ClassVar = "openai_responses.mjs"
    ways: ClassVar = ("raw", "helper", "readable")

    async def read_slowly(self, pause: Callable[[], Awaitable[object]], **command: Any) -> Any:
        """Read a stream, and behind its first text nothing, for a while."""
        assert {"paused": True} == await self.ask("read", pause_after=MORE, **command)
        await pause()
        return await self.ask("resume")

    async def read_many(self, count: int) -> Any:
        """Read several streams at once."""
        return await self.ask("many", count=count)


@pytest.fixture(params=[Python, Npm], ids=["python", "npm"])
def client(request):
    return request.param


# The server ---------------------------------------------------------------------------------------


@attrs.frozen
class Site:
    """A server, a proxy before it that cuts, and a client."""

    server: Server
    cutter: Cutter
    client: Python | Npm

    @property
    def run(self):
        """The newest run that goes on, else the last one that did."""
        return next(iter(self.server.runs))

    async def read(self, how="raw", **command):
        """What the client sees of a stream; `find` is one that there is."""
        if "find" not in command:
            command["create"] = HELLO | command.get("create", {})
        return await self.client.ask("read", how=how, **command)

    async def find(self, id, *, after=None, how="raw"):
        """What it sees of the stream of a response that there is."""
        query = {} if after is None else {"starting_after": after}
        return await self.read(how, find={"id": id, "query": query})

    async def create(self, retries=0, **create):
        """The answer to a request without a stream."""
        return await self.client.ask("create", create=HELLO | create, retries=retries)

    async def response(self, do, id):
        """The answer to a request about a response."""
        answer = await self.client.ask(do, id=id)
        assert answer["error"] is None
        return answer["response"]

    async def wait_left(self, times=1):
        """Wait until the server has seen that the client is gone, for that many times."""
        await wait_until(lambda: self.server.app.streams.closed["client_left"] == times)


@asynccontextmanager
async def site(client, *agents, cuts=(), **settings):
    """Serve agents to a client, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, OPENAI_RESPONSES), **settings) as server,
            open_cutter(server.urls[0], *cuts) as cutter,
            client.open(server.urls[0]) as opened,
        ):
            yield Site(server, cutter, opened)


@tool
async def fetch() -> str:
    """Fetch very much."""
    await trio.lowlevel.checkpoint()
    return LARGE


def own(response):
    """A response without what a client adds to it."""
    added = ("output_text", "output_parsed", "parsed", "parsed_arguments")
    return json.loads(
        json.dumps(response),
        object_hook=lambda value: {k: v for k, v in value.items() if k not in added},
    )


def text_of(response):
    """All that a response says to its reader."""
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


# What a run says ----------------------------------------------------------------------------------


async def test_the_client_reads_what_a_model_says(client):
    """Text, what it thinks, what it has cost; numbers without a gap; the id is the run's."""
    _, agent = model(*[thinking(TEXT)] * 3)
    async with site(client, agent) as one:
        for how in client.ways:
            seen = await one.read(how)
            response = seen["response"]
            assert f"resp_{one.run.id}" == response["id"]
            shown = await one.response("retrieve", response["id"])
            assert (TEXT, None) == (seen["text"], seen["error"])
            assert list(range(len(seen["types"]))) == seen["numbers"]
            assert ("response.completed", "completed") == (seen["types"][-1], response["status"])
            assert ["reasoning", "message"] == [item["type"] for item in response["output"]]
            assert "Let me see." == response["output"][0]["content"][0]["text"]
            assert (120, 160) == tuple(
                response["usage"][name] for name in ("input_tokens", "total_tokens")
            )
            assert (TEXT, own(response)) == (text_of(response), own(shown))


async def test_the_client_reads_an_answer(client):
    """What it has asked for stands in it."""
    _, agent = model(thinking(TEXT), instructions="Be nobody.")
    async with site(client, agent) as one:
        answer = await one.create(instructions="Be brief.", metadata={"colour": "blue"})
        response = answer["response"]
        shown = await one.response("retrieve", response["id"])
        items = await one.response("input_items", response["id"])
    assert (TEXT, "completed") == (response["output_text"], response["status"])
    assert ("Be brief.", {"colour": "blue"}) == (response["instructions"], response["metadata"])
    assert response == shown
    (item,) = items
    assert ("user", "Hello") == (item["role"], item["content"][0]["text"])


async def test_the_agents_own_tools_are_seen(client):
    """Two of them, called side by side: on the server, so that the client need not call them."""
    calls = ask_for(("look", '{"where":"Köln"}'), ("look", '{"where": 5}'))
    _, agent = model(*[calls, say(TEXT)] * 3, tools=[look])
    async with site(client, agent) as one:
        for how in client.ways:
            response = (await one.read(how))["response"]
            assert TEXT == text_of(response)
            called = [item for item in response["output"] if item["type"] == "mcp_call"]
            by_status = {call["status"]: call for call in called}
            done, failed = by_status["completed"], by_status["failed"]
            assert ("look", '{"where":"Köln"}', "sunny in Köln") == (
                done["name"],
                done["arguments"],
                done["output"],
            )
            assert (None, "mcp_tool_execution_error") == (failed["output"], failed["error"]["type"])


async def test_runs_side_by_side_are_told_apart(client):
    """Twenty of them, each with its own text."""

    async def echo(run, input):
        for letter in f"{input}: {TEXT}":
            run.text(letter)
            await trio.lowlevel.checkpoint()

    async with site(client, Agent("main", echo)) as one:
        seen = await one.client.read_many(20)
    assert [f"I am {place}: {TEXT}" for place in range(20)] == [each["text"] for each in seen]
    assert 20 == len({each["response"]["id"] for each in seen})


async def test_a_client_that_reads_slowly_misses_nothing(client):
    """More waits for it than fits between the two."""

    async def speak(run, _input):
        run.text(LARGE)
        await trio.lowlevel.checkpoint()

    async with site(client, Agent("main", speak)) as one:

        async def wait_for_the_end():
            await one.run.done.wait()

        seen = await one.client.read_slowly(wait_for_the_end, how="helper", create=HELLO)
    assert (LARGE, None) == (seen["text"], seen["error"])
    assert LARGE == text_of(seen["response"])


# Conversations ------------------------------------------------------------------------------------


async def test_a_conversation_is_kept_by_the_server(client):
    """Each response goes on from the one before; an older one can be gone on from as well."""
    provider, agent = model(say("One."), say("Two."), say("Else."))
    async with site(client, agent) as one:
        first = (await one.create(input="1?"))["response"]
        second = await one.create(input="2?", previous_response_id=first["id"])
        assert first["id"] == second["response"]["previous_response_id"]
        await one.create(input="Else?", previous_response_id=first["id"])
    said = [UserMessage("1?"), AssistantMessage("One."), UserMessage("2?")]
    assert said == list(provider.prompts[1].messages)
    assert [*said[:2], UserMessage("Else?")] == list(provider.prompts[2].messages)


async def test_a_conversation_is_kept_by_the_client(client):
    """All of it comes back, with more than 1 MB that a tool of the agent's has said."""
    calls = ask_for(("fetch", "{}"))
    provider, agent = model([*thinking("Well.")[:-1], *calls], say("Much."), say("Yes."),
                            tools=[fetch])  # fmt: skip
    async with site(client, agent) as one:
        answer = await one.client.ask("converse", model="main", first="Hello", second="Sure?")
        assert (None, "Yes.") == (answer["error"], answer["response"]["output_text"])
    asked, called, fetched, said, again = provider.prompts[2].messages
    assert (UserMessage("Hello"), AssistantMessage("Much."), UserMessage("Sure?")) == (
        asked,
        said,
        again,
    )
    (call,) = called.tool_calls
    assert ("Well.", "fetch", "fetch") == (called.text, call.name, fetched.name)
    assert (LARGE, call.call_id) == (json.loads(fetched.content), fetched.call_id)


def offered(name, **properties):
    """A tool of the client's, as the API has it."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "name": name, "parameters": parameters, "strict": False}


OFFERED = [offered("weather", city={"type": "string"}), offered("clock")]


async def test_the_client_makes_the_calls_of_its_own_tools(client):
    """Two side by side, with more than 1 MB to say, which comes back to the model."""
    calls = ask_for(("weather", '{"city":"Köln"}'), ("clock", ""))
    provider, agent = model(calls, say(TEXT))
    outputs = {"weather": "sunny ", "clock": "noon "}
    async with site(client, agent) as one:
        create = HELLO | {"tools": OFFERED}
        seen = await one.client.ask("answer_calls", create=create, outputs=outputs, filler=FILLER)
    called, second = seen["response"]["calls"], seen["response"]["second"]
    assert [("weather", '{"city":"Köln"}'), ("clock", "{}")] == [
        (call["name"], call["arguments"]) for call in called
    ]
    assert ("completed", TEXT) == (second["status"], text_of(second))
    asked, made, *answers = provider.prompts[1].messages
    assert UserMessage("Hello") == asked
    assert ["weather", "clock"] == [call.name for call in made.tool_calls]
    assert [call.call_id for call in made.tool_calls] == [each.call_id for each in answers]
    assert ["sunny " + LARGE, "noon " + LARGE] == [json.loads(each.content) for each in answers]


async def test_calls_of_the_clients_tools_are_streamed(client):
    """Beside one of the agent's own, which the client is not to make."""
    calls = ask_for(("look", '{"where":"Rom"}'), ("weather", '{"city":"Köln"}'))
    _, agent = model(*[calls] * 3, tools=[look])
    async with site(client, agent) as one:
        for how in client.ways:
            response = (await one.read(how, create={"tools": OFFERED}))["response"]
            assert ("finished", "completed") == (one.run.state, response["status"])
            wanted, made = response["output"]
            assert ("function_call", "mcp_call") == (wanted["type"], made["type"])
            assert ("weather", '{"city":"Köln"}', "call2") == (
                wanted["name"],
                wanted["arguments"],
                wanted["call_id"],
            )


# Errors -------------------------------------------------------------------------------------------


async def test_an_error_before_anything_is_raised(client):
    """With its own kind, code and words."""
    _, agent = model()
    wishes: list[Any] = [
        ({"model": "nobody"}, "NotFoundError", "model_not_found", "one of the agents main"),
        ({"previous_response_id": "resp_0"}, "BadRequestError", "previous_response_not_found",
         "expected the id of a run"),
        ({"tools": [{"type": "web_search"}]}, "BadRequestError", "bad_request",
         "a tool of the type 'function'"),
    ]  # fmt: skip
    async with site(client, agent) as one:
        for wish, name, code, said in wishes:
            for answer in (await one.create(**wish), await one.read(create=wish)):
                assert (name, code) == (answer["error"]["name"], answer["error"]["code"])
                assert said in answer["error"]["message"]


async def test_an_error_in_the_middle_is_a_failed_response(client):
    """What came before it has come. Python's helper raises where no response is complete."""
    error = AgentError("no luck: ü", code="mine", status=422)
    _, agent = model(*[[*say("half")[:2], error]] * 3)
    async with site(client, agent) as one:
        for how in client.ways:
            seen = await one.read(how)
            assert ("half", "response.failed") == (seen["text"], seen["types"][-1])
            failed = seen["response"]
            assert ("failed", "mine", "no luck: ü") == (
                failed["status"],
                failed["error"]["code"],
                failed["error"]["message"],
            )
            raised = seen["error"] and seen["error"]["name"]
            assert ("RuntimeError" if (client, how) == (Python, "helper") else None) == raised


async def test_a_run_that_has_failed_is_not_begun_again_by_the_client(client):
    """It may have done something already; the clients try again what the server has failed at."""
    runs = []

    async def breaking(run, _input):
        runs.append(run.id)
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async with site(client, Agent("main", breaking)) as one:
        error = (await one.create(retries=2))["error"]
    assert ("InternalServerError", 500, 1) == (error["name"], error["status"], len(runs))


async def test_a_response_that_was_cut_short_by_the_model_says_so(client):
    """It is incomplete, and no success."""
    _, agent = model(*[thinking(TEXT, "length")] * 3)
    async with site(client, agent) as one:
        for how in client.ways:
            seen = await one.read(how)
            response = seen["response"]
            assert ("response.incomplete", "incomplete", {"reason": "max_output_tokens"}) == (
                seen["types"][-1],
                response["status"],
                response["incomplete_details"],
            )
            assert TEXT == text_of(response)


# Ends ---------------------------------------------------------------------------------------------


async def test_a_stop_cancels_the_run(client):
    """All that a page's Stop does is to close the connection."""
    async with site(client, Halved().agent(on_disconnect="cancel")) as one:
        for how in client.ways:
            seen = await one.read(how, stop_after=MORE)
            await one.run.done.wait()
            assert ("half ", None) == (seen["text"], seen["error"])
            end = one.run.end
            assert ("cancelled", "disconnect") == (end.outcome, end.receipt.cause)
            shown = await one.response("retrieve", seen["response"]["id"])
            assert ("cancelled", "half ") == (shown["status"], text_of(shown))


async def test_who_stops_may_come_back(client):
    """Under grace the run goes on, and the client sees the rest of it."""
    halved = Halved()
    async with site(client, halved.agent(on_disconnect="grace:30")) as one:
        for times, how in enumerate(("raw", "helper"), 1):
            halved.go_on = trio.Event()
            before = await one.read(how, stop_after=MORE)
            await one.wait_left(times)
            assert "running" == one.run.state
            halved.go_on.set()
            response_id, last = before["response"]["id"], before["numbers"][-1]
            rest = await one.find(response_id, after=last, how=how)
            numbers = before["numbers"] + rest["numbers"]
            assert list(range(len(numbers))) == numbers
            assert "half and half" == before["text"] + rest["text"] == text_of(rest["response"])


async def test_who_stops_and_says_something_else_is_heard(client):
    """The run that nobody watches any more makes room, in the conversation of an older response."""
    halved = Halved()
    halved.go_on.set()
    async with site(client, halved.agent(on_disconnect="grace:30")) as one:
        again = {"previous_response_id": (await one.create())["response"]["id"]}
        halved.go_on = trio.Event()
        await one.read(create=again, stop_after=MORE)
        await one.wait_left()
        stopped = one.run
        halved.go_on = trio.Event()  # the stopped one is not told
        halved.go_on.set()
        answer = await one.create(**again)
    assert "half and half" == answer["response"]["output_text"]
    assert "cancelled" == stopped.end.outcome


async def test_a_response_in_the_background_is_cancelled(client):
    """Who cancels it again is shown the same, and so is who looks at it, or streams it."""
    async with site(client, Halved().agent()) as one:
        begun = (await one.create(background=True))["response"]
        assert ("in_progress", True) == (begun["status"], begun["background"])
        cancelled = await one.response("cancel", begun["id"])
        end = one.run.end
        assert ("cancelled", "client_cancel") == (end.outcome, end.receipt.cause)
        for do in ("cancel", "retrieve"):
            assert own(cancelled) == own(await one.response(do, begun["id"]))
        seen = await one.find(begun["id"])
    assert ("cancelled", "cancelled") == (cancelled["status"], cancelled["error"]["code"])
    assert ("response.failed", "cancelled") == (seen["types"][-1], seen["response"]["status"])


async def test_a_cancelled_response_is_no_success(client):
    """Whoever waits for it has an error that it does not try again."""
    async with site(client, Halved().agent()) as one, trio.open_nursery() as nursery:

        async def cancel():
            await wait_until(lambda: any(run.log.end > 1 for run in one.server.runs))
            one.run.cancel("client_cancel")

        nursery.start_soon(cancel)
        error = (await one.create(retries=2))["error"]
        assert 499 == error["status"]
        assert 1 == len(list(one.server.runs))


async def test_a_server_that_stops_has_not_answered(client):
    """The response has failed, and says why."""
    async with site(client, Halved().agent()) as one:
        drain = partial(one.server.drain, 0.1)
        seen = await one.client.read_slowly(drain, how="helper", create=HELLO)
    assert ("half ", "response.failed") == (seen["text"], seen["types"][-1])
    assert "cancelled" == seen["response"]["status"]
    assert "shutdown" in seen["response"]["error"]["message"]


async def test_a_deleted_response_is_gone(client):
    """With its run; deleting it while it goes on cancels it."""
    async with site(client, Halved().agent()) as one:
        begun = (await one.create(background=True))["response"]
        run = one.run
        await one.response("delete", begun["id"])
        assert ("cancelled", []) == (run.end.outcome, list(one.server.runs))
        error = (await one.client.ask("retrieve", id=begun["id"]))["error"]
    assert ("NotFoundError", 404) == (error["name"], error["status"])


# The background, and cuts -------------------------------------------------------------------------


async def test_a_response_in_the_background_goes_on_by_itself(client):
    """It can be looked at until it is complete; a second one waits for its turn."""
    async with site(client, (halved := Halved()).agent(max_running=1)) as one:
        begun = (await one.create(background=True))["response"]
        queued = (await one.create(background=True))["response"]
        assert ("in_progress", "queued") == (begun["status"], queued["status"])
        assert "queued" == (await one.response("retrieve", queued["id"]))["status"]
        halved.go_on.set()
        await wait_until(lambda: not one.server.runs.unfinished())
        for response_id in (begun["id"], queued["id"]):
            shown = await one.response("retrieve", response_id)
            assert ("completed", "half and half") == (shown["status"], shown["output_text"])


CUTS = [
    b"event: response.created",  # early
    b'"delta":"ha',  # in the middle of an event
    b'"delta":"half "',
    b"event: response.completed",  # late
    b'"status":"completed","background"',
]


async def test_a_stream_that_was_cut_goes_on_where_it_was(client):
    """In the background nothing is lost: each event comes once, in its order."""
    halved = Halved()
    halved.go_on.set()
    cuts = [Cut(after, way) for after in CUTS for way in ("fin", "rst")]
    async with site(client, halved.agent(), cuts=cuts) as one:
        for _ in cuts:
            seen = await one.read(create={"background": True}, through=one.cutter.url)
            assert seen["error"]["name"] in ("APIConnectionError", "TypeError")
            response_id, last = f"resp_{one.run.id}", max(seen["numbers"], default=None)
            await one.run.done.wait()
            rest = await one.find(response_id, after=last)
            whole = await one.find(response_id, how="helper")
            numbers = seen["numbers"] + rest["numbers"]
            assert list(range(len(numbers))) == numbers == whole["numbers"]
            assert seen["types"] + rest["types"] == whole["types"]
            assert "half and half" == seen["text"] + rest["text"] == text_of(rest["response"])
            assert "completed" == rest["response"]["status"]


async def test_a_cut_in_the_foreground_is_no_answer(client):
    """The client does not take what it has for all there is, and the run is cancelled."""
    cuts = [Cut(b'"delta":"half "')] * len(client.ways)
    async with site(client, Halved().agent(), cuts=cuts) as one:
        for how in client.ways:
            seen = await one.read(how, through=one.cutter.url)
            await one.run.done.wait()
            assert seen["error"]["name"] in ("APIConnectionError", "TypeError", "OpenAIError")
            end = one.run.end
            assert ("cancelled", "disconnect") == (end.outcome, end.receipt.cause)


async def test_a_stream_lasts_as_long_as_its_run(client):
    """Others are told to come back now and then; this client would not."""
    async with site(client, (halved := Halved()).agent(), rotation=0.001) as one:
        response_id = (await one.create(background=True))["response"]["id"]

        async def go_on():
            await wait_until(lambda: one.server.app.streams.open == 1)
            await trio.sleep(0.05)  # it would have been told long ago
            halved.go_on.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            seen = await one.find(response_id, how=client.ways[0])
        assert (None, "half and half") == (seen["error"], seen["text"])
        assert 0 == one.server.app.streams.closed["rotated"]


# Questions ----------------------------------------------------------------------------------------


async def test_a_question_is_answered_by_the_next_request(client):
    """The same run goes on in a response of its own, and both can be looked at."""
    arguments = '{"question":"Which one?","options":["red","blue"]}'
    script = [
        [*thinking("Well.")[:-1], *ask_for(("ask_user", arguments))],
        say("Blue it is."),
        say("Bye."),
    ]
    provider, agent = model(*script * 3, tools=[ask_user])
    async with site(client, agent) as one:
        for how in client.ways:
            first = await one.read(how)
            asked = first["response"]
            assert ("completed", "waiting") == (asked["status"], one.run.state)
            assert "Well.Which one?\n\n- red\n- blue" == text_of(asked)
            (call,) = [item for item in asked["output"] if item["type"] == "mcp_call"]
            assert ("ask_user", "in_progress") == (call["name"], call["status"])
            create = {"input": "Blue", "previous_response_id": asked["id"]}
            second = await one.read(how, create=create)
            answered = second["response"]
            assert (f"{asked['id']}.2", asked["id"]) == (
                answered["id"],
                answered["previous_response_id"],
            )
            assert ("finished", "completed") == (one.run.state, answered["status"])
            assert "Blue it is." == text_of(answered)
            for seen in (first, second):
                assert list(range(len(seen["numbers"]))) == seen["numbers"]
                response_id = seen["response"]["id"]
                again = await one.find(response_id, how=how)
                assert (seen["types"], seen["numbers"]) == (again["types"], again["numbers"])
                shown = own(await one.response("retrieve", response_id))
                assert own(seen["response"])["output"] == shown["output"]
            (item,) = await one.response("input_items", answered["id"])
            assert "blue" == item["content"][0]["text"]
            create = {"input": "Bye!", "previous_response_id": answered["id"]}
            assert "Bye." == (await one.read(how, create=create))["text"]
            assert '"blue"' == provider.prompts[-2].messages[-1].content
            assert UserMessage("Bye!") == provider.prompts[-1].messages[-1]


async def test_a_question_is_answered_without_a_stream(client):
    """Those who wait are given it as the response, and the next one in the same way."""

    async def asks(run, _input):
        colours = (Option(id="r", label="Red"), Option(id="b", label="Blue"))
        colour = await run.ask(Question(id="c", kind="choice", prompt="Which?", options=colours))
        if await run.ask(Question(id="s", kind="confirm", prompt="Sure?")):
            run.text(f"Chosen: {colour}.")

    async with site(client, Agent("main", asks)) as one:
        for background in (False, True):

            async def say_and_wait(
                text: str, previous: str | None, *, background: bool = background
            ) -> Any:
                create = {"input": text, "background": background}
                response = (await one.create(**create, previous_response_id=previous))["response"]
                await wait_until(lambda: one.run.state in ("waiting", "finished"))
                return await one.response("retrieve", response["id"])

            first = await say_and_wait("Hello", None)
            second = await say_and_wait("Blue", first["id"])
            third = await say_and_wait("yes", second["id"])
            texts = [each["output_text"] for each in (first, second, third)]
            assert ["Which?\n\n- Red\n- Blue", "Sure?", "Chosen: b."] == texts
            assert {"completed"} == {each["status"] for each in (first, second, third)}
            ids = [first["id"] + end for end in ("", ".2", ".3")]
            assert ids == [each["id"] for each in (first, second, third)]


async def test_questions_side_by_side_are_answered_one_by_one(client):
    """The second one is the next response, complete at once."""

    async def asks(run, _input):
        said = {}

        async def ask(prompt):
            said[prompt] = await run.ask(prompt)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "Who?")
            await wait_all_tasks_blocked()
            nursery.start_soon(ask, "Where?")
        run.text(f"{said['Who?']} in {said['Where?']}")

    async with site(client, Agent("main", asks)) as one:
        for how in client.ways:
            response = (await one.read(how))["response"]
            texts = [text_of(response)]
            await wait_until(lambda: len(one.run.context.asked) == 2)
            for answer in ("Ada", "London"):
                create = {"input": answer, "previous_response_id": response["id"]}
                response = (await one.read(how, create=create))["response"]
                texts.append(text_of(response))
            assert ["Who?", "Where?", "Ada in London"] == texts
            assert response["id"] == f"resp_{one.run.id}.3"


async def test_a_question_that_nobody_answers_can_be_cancelled(client):
    """By the id of the response that has asked."""

    async def asks(run, _input):
        await run.ask("Which one?")

    async with site(client, Agent("main", asks)) as one:
        asked = (await one.create())["response"]
        assert "completed" == (await one.response("cancel", asked["id"]))["status"]
        assert "cancelled" == one.run.end.outcome
        seen = await one.find(f"{asked['id']}.2")
    assert ("response.failed", "cancelled") == (seen["types"][-1], seen["response"]["status"])
