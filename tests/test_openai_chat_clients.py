"""OpenAI's own clients, unmodified, at an agent's chat completions: npm's `openai`, and PyPI's.

Both are asked the same things in the same words: `Python` does what `clients/openai_chat.mjs` does.
It is the one that blocks, in a thread; the other one, on Trio, is in test_dialect_openai_chat.py.
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
from cutting import Cut, open_cutter
from raw import connect, request, wait_until
from talking import (
    LARGE,
    TEXT,
    Halved,
    OfNode,
    OpenAI,
    look,
    measure,
    model,
    side_by_side,
    thinking,
)

from agentsse import Agent, AgentError, Question
from agentsse.context import ask_user
from agentsse.dialects.native import NATIVE
from agentsse.dialects.openai import DONE
from agentsse.dialects.openai_chat import OPENAI_CHAT
from agentsse.messages import AssistantMessage, ToolCall, ToolMessage, UserMessage
from agentsse.server import Server
from agentsse.testing import ask_for, open_server, say

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HELLO = [user("Hello")]
THREAD = {"thread_id": "chat-1"}


# The clients --------------------------------------------------------------------------------------


class Python(OpenAI):
    """The client of PyPI."""

    async def read_slowly(self, params: Any, pause: Callable[[], Awaitable[object]]) -> Any:
        """Read a stream, and behind its first text nothing, for a while."""
        return await self.ask("stream", params=params, pause=partial(trio.from_thread.run, pause))

    async def read_many(self, several: list[Any]) -> list[Any]:
        """Read several streams at once, in as many threads."""
        return await side_by_side([partial(self.ask, "stream", params=each) for each in several])

    def do_create(self, params: Any) -> Any:
        """A completion without a stream."""
        try:
            completion = self.client.chat.completions.create(**params)
        except openai.APIError as error:
            return {"error": _problem(error)}
        (choice,) = completion.choices
        called = [each.function for each in choice.message.tool_calls or ()]
        return {
            "id": completion.id,
            "text": choice.message.content,
            "reasoning": getattr(choice.message, "reasoning_content", ""),
            "calls": [[each.name, each.arguments] for each in called],
            "reason": choice.finish_reason,
            "usage": completion.usage.to_dict(),
            "error": None,
        }

    def do_stream(
        self,
        params: Any,
        enough: float = float("inf"),
        pause: Callable[[], object] | None = None,
    ) -> Any:
        """A stream, chunk by chunk; with `enough` it is stopped behind so many characters."""
        try:
            stream = self.client.chat.completions.create(**params, stream=True)
        except openai.APIError as error:
            return {"error": _problem(error)}
        seen = {"text": "", "reasoning": "", "calls": [], "reason": None, "usage": None}
        seen["error"] = None
        try:
            for chunk in stream:
                _take(chunk, seen)
                if len(seen["text"]) >= enough:
                    stream.close()
                    break
                if pause is not None and seen["text"]:
                    pause = pause()
        except openai.APIError as error:
            seen["error"] = _problem(error)
        return seen

    def do_helper(self, params: Any) -> Any:
        """The helper that puts a stream together, and checks its order."""
        with self.client.chat.completions.stream(**params) as stream:
            (choice,) = stream.get_final_completion().choices
        return {"text": choice.message.content, "reason": choice.finish_reason}

    def do_tools(self, params: Any, answers: Any) -> Any:
        """What npm's client has a helper for."""
        said, made = list(params["messages"]), []
        while True:
            now = {**params, "messages": said}
            if now.pop("stream", False):
                with self.client.chat.completions.stream(**now) as stream:
                    (choice,) = stream.get_final_completion().choices
            else:
                (choice,) = self.client.chat.completions.create(**now).choices
            if choice.finish_reason != "tool_calls":
                return {"text": choice.message.content, "made": sorted(made)}
            said.append(choice.message.to_dict())
            for call in choice.message.tool_calls:
                name = call.function.name
                made.append([name, json.loads(call.function.arguments)])
                said.append({"role": "tool", "tool_call_id": call.id, "content": answers[name]})

    def do_models(self, wanted: str) -> Any:
        """The list, one of them, and one that there is not."""
        with pytest.raises(openai.NotFoundError) as caught:
            self.client.models.retrieve("nobody")
        return {
            "all": [model.id for model in self.client.models.list()],
            "found": self.client.models.retrieve(wanted).id,
            "missing": _problem(caught.value),
        }


def _take(chunk: Any, seen: Any) -> None:
    seen["id"], seen["usage"] = chunk.id, chunk.usage and chunk.usage.to_dict()
    for choice in chunk.choices:
        delta, seen["reason"] = choice.delta, choice.finish_reason
        seen["text"] += delta.content or ""
        seen["reasoning"] += getattr(delta, "reasoning_content", "")
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert len(seen["calls"]) == call.index
                seen["calls"].append([call.function.name, ""])
            seen["calls"][call.index][1] += call.function.arguments


def _problem(error: openai.APIError) -> Any:
    return {
        "name": type(error).__name__,
        "status": getattr(error, "status_code", None),
        "code": error.code,
        "param": error.param,
        "type": error.type,
        "message": error.message,
        "request_id": getattr(error, "request_id", None),
    }


class Npm(OfNode):
    """The client of npm, in a process of Node."""

    script: ClassVar = "openai_chat.mjs"

    async def read_slowly(self, params: Any, pause: Callable[[], Awaitable[object]]) -> Any:
        """Read a stream, and behind its first text nothing, for a while."""
        assert "begun" == await self.ask("slow", params=params)
        await pause()
        return await self.ask("go")

    async def read_many(self, several: list[Any]) -> list[Any]:
        """Read several streams at once."""
        return await self.ask("many", several=several)


@pytest.fixture(params=[Python, Npm], ids=["python", "npm"])
def client(request):
    return request.param


STREAMED = pytest.mark.parametrize("do", ["stream", "create"])


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

    async def ask(self, do, messages=HELLO, **more):
        """Have the client do something; what it has seen."""
        command = {name: more.pop(name) for name in ("enough", "answers") if name in more}
        return await self.client.ask(do, params=params(messages, **more), **command)

    async def call(self, method, path, body=b""):
        """What a native client does: the body of the answer."""
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(request(method, path, body))
            return await raw.finish()

    async def wait_left(self):
        """Wait until the server has seen that the client is gone."""
        await wait_until(lambda: self.server.app.streams.closed["client_left"] == 1)


def params(messages=HELLO, **more):
    return {"model": "main", "messages": messages, **more}


@asynccontextmanager
async def site(client, *agents, cut=None):
    """Serve agents to a client, perhaps through a proxy that cuts, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, OPENAI_CHAT)) as server,
            open_cutter(server.urls[0], *([cut] if cut else [])) as cutter,
            client.open(cutter.url if cut else server.urls[0]) as opened,
        ):
            yield Site(server, opened)


# What a run says ----------------------------------------------------------------------------------


@STREAMED
async def test_the_client_reads_what_a_model_says(client, do):
    """Text, what it thinks, why it has ended, and what it has cost; the id is the run's."""
    _, agent = model(thinking(TEXT))
    more = {"stream_options": {"include_usage": True}} if do == "stream" else {}
    async with site(client, agent) as one:
        seen = await one.ask(do, **more)
        assert f"chatcmpl-{one.run.id}" == seen["id"]
    assert (TEXT, "Let me see.", "stop", None) == (
        seen["text"],
        seen["reasoning"],
        seen["reason"],
        seen["error"],
    )
    assert (120, 160) == (seen["usage"]["prompt_tokens"], seen["usage"]["total_tokens"])


async def test_the_clients_helper_is_content(client):
    """It checks the order of what comes, and that there is an end."""
    _, agent = model(thinking(TEXT))
    async with site(client, agent) as one:
        assert {"text": TEXT, "reason": "stop"} == await one.ask("helper")


@STREAMED
async def test_the_agents_own_tools_are_not_seen(client, do):
    """Two of them, called side by side."""
    calls = ask_for(("look", '{"where":"Köln"}'), ("measure", "{}"))
    provider, agent = model(calls, say(TEXT), tools=[look, measure])
    async with site(client, agent) as one:
        seen = await one.ask(do)
    assert (TEXT, [], "stop") == (seen["text"], seen["calls"], seen["reason"])
    answers = [each for each in provider.prompts[1].messages if isinstance(each, ToolMessage)]
    assert ['"sunny in Köln"', "21.5"] == [answer.content for answer in answers]


async def test_runs_side_by_side_are_told_apart(client):
    """Twenty of them, each with its own text."""

    async def echo(run, input):
        for letter in input:
            run.text(letter)
            await trio.lowlevel.checkpoint()

    texts = [f"{number}: {TEXT}" for number in range(20)]
    async with site(client, Agent("main", echo)) as one:
        seen = await one.client.read_many([params([user(text)]) for text in texts])
    assert texts == [each["text"] for each in seen]
    assert 20 == len({each["id"] for each in seen})


async def test_a_client_that_reads_slowly_misses_nothing(client):
    """More waits for it than fits between the two."""

    async def speak(run, _input):
        for _ in range(4):
            run.text(LARGE)
            await trio.lowlevel.checkpoint()

    async with site(client, Agent("main", speak)) as one:

        async def wait_for_the_end():
            await one.run.done.wait()

        seen = await one.client.read_slowly(params(), wait_for_the_end)
    assert (4 * LARGE, "stop", None) == (seen["text"], seen["reason"], seen["error"])


# Tools of the client's ----------------------------------------------------------------------------


def offered(name, **properties):
    """A tool, as the API has it."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


OFFERED = [offered("weather", city={"type": "string"}), offered("clock")]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_client_makes_the_calls_of_its_own_tools(client, stream):
    """Two side by side, one of them with more than 1 MB to say, which comes back to the model."""
    calls = ask_for(("weather", '{"city":"Köln"}'), ("clock", ""))
    provider, agent = model(calls, say(TEXT))
    answers = {"weather": LARGE, "clock": "noon 🕛"}
    async with site(client, agent) as one:
        seen = await one.ask("tools", answers=answers, tools=OFFERED, stream=stream)
    assert {"text": TEXT, "made": [["clock", {}], ["weather", {"city": "Köln"}]]} == seen
    expected = (
        UserMessage("Hello"),
        AssistantMessage(
            "", (ToolCall("call1", "weather", '{"city":"Köln"}'), ToolCall("call2", "clock", "{}"))
        ),
        ToolMessage("call1", "weather", json.dumps(LARGE, ensure_ascii=False)),
        ToolMessage("call2", "clock", '"noon 🕛"'),
    )
    told = provider.prompts[1].messages
    assert expected == tuple(
        attrs.evolve(each, content=json.dumps(json.loads(each.content), ensure_ascii=False))
        if isinstance(each, ToolMessage)
        else each
        for each in told
    )
    assert ["weather", "clock"] == [tool.name for tool in provider.prompts[1].tools]


@STREAMED
async def test_the_agents_own_tools_are_run_beside_those_of_the_client(client, do):
    """The client sees its own, and the run is over."""
    calls = ask_for(("measure", "{}"), ("weather", '{"city":"Köln"}'))
    _, agent = model([*say("Well.")[:-1], *calls], tools=[measure])
    async with site(client, agent) as one:
        seen = await one.ask(do, tools=OFFERED)
        assert "finished" == one.run.state
    assert ("Well.", [["weather", '{"city":"Köln"}']], "tool_calls") == (
        seen["text"],
        seen["calls"],
        seen["reason"],
    )


# Models -------------------------------------------------------------------------------------------


async def test_agents_are_listed_as_models(client):
    """And each can be looked up by its name, or by what it runs on."""
    _, agent = model()
    async with site(client, agent, Agent("other", Halved().agent())) as one:
        seen = await one.client.ask("models", wanted="scripted:m")
    assert (["main", "other"], "scripted:m") == (seen["all"], seen["found"])
    missing = seen["missing"]
    assert ("NotFoundError", 404, "model_not_found", "model") == (
        missing["name"],
        missing["status"],
        missing["code"],
        missing["param"],
    )


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "wish", "expected"),
    [
        ("create", {"model": "nobody"},
         ("NotFoundError", "model_not_found", "one of the agents main")),
        ("stream", {"model": "nobody"},
         ("NotFoundError", "model_not_found", "one of the agents main")),
        ("stream", {"messages": [user([{"type": "image_url", "image_url": {"url": "data:"}}])]},
         ("BadRequestError", "bad_request", "part of the type 'text', got 'image_url'")),
        ("create", {"tools": OFFERED, "tool_choice": "required"},
         ("BadRequestError", "bad_request", "tool_choice: not available here")),
    ],
)  # fmt: skip
async def test_an_error_before_anything_is_raised(client, do, wish, expected):
    """With its own kind, code and words."""
    _, agent = model()
    name, code, said = expected
    async with site(client, agent) as one:
        error = (await one.ask(do, **wish))["error"]
    assert (name, code) == (error["name"], error["code"])
    assert said in error["message"]


async def test_an_error_in_the_middle_is_raised(client):
    """What came before it has come; no reason for an end has."""
    _, agent = model([*say("half")[:2], AgentError("no luck: ü", code="mine", status=422)])
    async with site(client, agent) as one:
        seen = await one.ask("stream")
    assert ("half", None) == (seen["text"], seen["reason"])
    assert ("APIError", "mine") == (seen["error"]["name"], seen["error"]["code"])
    assert "no luck: ü" in seen["error"]["message"]


async def test_an_error_without_a_stream_names_the_run(client):
    """What the client tells of a request is the id to look the run up with."""
    _, agent = model([*say("half")[:2], AgentError("no luck", code="mine", status=422)])
    async with site(client, agent) as one:
        error = (await one.ask("create"))["error"]
        assert one.run.id == error["request_id"]
    assert ("UnprocessableEntityError", 422, "mine") == (
        error["name"],
        error["status"],
        error["code"],
    )


# Ends ---------------------------------------------------------------------------------------------


async def test_a_stop_cancels_the_run(client):
    """All that a page's Stop does is to close the connection."""
    async with site(client, Halved().agent(on_disconnect="cancel")) as one:
        seen = await one.ask("stream", enough=1)
        await one.run.done.wait()
    assert ("half ", None, None) == (seen["text"], seen["reason"], seen["error"])
    assert ("cancelled", "disconnect") == (one.run.end.outcome, one.run.end.receipt.cause)


async def test_a_run_may_outlive_its_stream(client):
    """Under grace it goes on; there is no way back here, but all of it can be looked at."""
    async with site(client, (halved := Halved()).agent(on_disconnect="grace:30")) as one:
        assert "half " == (await one.ask("stream", enough=1))["text"]
        await one.wait_left()
        assert "running" == one.run.state
        halved.go_on.set()
        body = await one.call("GET", f"/runs/{one.run.id}/events?dialect=openai_chat")
        assert "success" == one.run.end.outcome
    assert body.endswith(DONE)
    chunks = [json.loads(frame[len("data: ") :]) for frame in body.split(b"\n\n")[:-2]]
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "half and half" == "".join(said)


async def test_who_stops_and_says_something_else_is_heard(client):
    """In a thread the run that nobody watches any more makes room."""

    async def ramble(run, input):
        run.text("Well, ")
        if input != "Stop.":
            await trio.sleep_forever()
        run.text("yes.")

    async with site(client, Agent("main", ramble, on_disconnect="grace:30")) as one:
        await one.ask("stream", enough=1, metadata=THREAD)
        await one.wait_left()
        first = one.run
        seen = await one.ask("stream", [*HELLO, assistant("Well, "), user("Stop.")],
                             metadata=THREAD)  # fmt: skip
    assert ("Well, yes.", "cancelled") == (seen["text"], first.end.outcome)


async def test_a_thread_in_which_somebody_listens_is_busy(client):
    """Who asks for another run there is told so."""
    async with site(client, (halved := Halved()).agent()) as one:

        async def ask():
            other = await one.ask("create", metadata=THREAD)
            assert ("ConflictError", 409) == (other["error"]["name"], other["error"]["status"])
            halved.go_on.set()

        seen = await one.client.read_slowly(params(metadata=THREAD), ask)
    assert "half and half" == seen["text"]


async def test_a_run_is_cancelled_by_the_id_of_its_completion(client):
    """By the native route, for there is none here; the client does not take it for an answer."""
    async with site(client, Halved().agent()) as one:

        async def cancel():
            answer = json.loads(await one.call("POST", f"/runs/{one.run.id}/cancel"))
            assert "cancelled" == answer["outcome"]

        seen = await one.client.read_slowly(params(), cancel)
        assert f"chatcmpl-{one.run.id}" == seen["id"]
    assert ("half ", None) == (seen["text"], seen["reason"])
    assert ("APIError", "cancelled") == (seen["error"]["name"], seen["error"]["code"])


async def test_a_server_that_stops_has_not_answered(client):
    """The stream ends with an error, and the client raises it."""
    async with site(client, Halved().agent()) as one:
        seen = await one.client.read_slowly(params(), partial(one.server.drain, 0.1))
    assert ("half ", None) == (seen["text"], seen["reason"])
    assert ("APIError", "cancelled") == (seen["error"]["name"], seen["error"]["code"])
    assert "shutdown" in seen["error"]["message"]


CUTS = {
    "before anything": Cut(b"HTTP/1.1 200"),
    "early": Cut(b'"role":"assistant"', "rst"),
    "in the middle of a frame": Cut(b'{"content":"ha'),
    "in the middle of a frame, by a reset": Cut(b'{"content":"ha', "rst"),
    "before the last frame": Cut(b'"finish_reason":"stop"}]}\n\n'),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
async def test_a_cut_is_no_answer(client, cut):
    """The client does not take what it has for all there is; it does not come back, either."""
    halved = Halved()
    halved.go_on.set()
    async with site(client, halved.agent(), cut=cut) as one:
        seen = await one.ask("stream")
        await one.run.done.wait()
    # What Node says in the middle of a body, npm's client hands on as it is.
    assert seen["error"]["name"] in ("APIConnectionError", "TypeError")
    assert seen["error"]["status"] is None


# Questions ----------------------------------------------------------------------------------------


@STREAMED
async def test_a_question_is_answered_in_its_thread(client, do):
    """What the user says next is the answer, and the response goes on with the same run."""
    arguments = '{"question":"Which one?","options":["red","blue"]}'
    provider, agent = model(
        [*say("Well.")[:-1], *ask_for(("ask_user", arguments))], say("Blue it is."), say("Bye."),
        tools=[ask_user],
    )  # fmt: skip
    said = list(HELLO)
    async with site(client, agent) as one:
        asked = await one.ask(do, said, metadata=THREAD)
        question = "Well.\n\nWhich one?\n\n- red\n- blue"
        assert (question, "stop") == (asked["text"], asked["reason"])
        assert "waiting" == one.run.state
        said += [assistant(asked["text"]), user("Blue")]
        answered = await one.ask(do, said, metadata=THREAD)
        assert ("Blue it is.", "stop") == (answered["text"], answered["reason"])
        assert ("finished", f"{asked['id']}-2") == (one.run.state, answered["id"])
        said += [assistant(answered["text"]), user("Bye!")]
        assert "Bye." == (await one.ask(do, said, metadata=THREAD))["text"]
    assert '"blue"' == provider.prompts[1].messages[-1].content
    texts = [message.text for message in provider.prompts[2].messages]
    assert [each["content"] for each in said] == texts


@STREAMED
async def test_an_answer_that_does_not_fit_is_refused(client, do):
    """The run waits on, for one that does: here a line for each of two questions."""

    async def order(run, _input):
        asked = [Question(id="size", kind="text", prompt="How large?"),
                 Question(id="sure", kind="confirm", prompt="Are you sure?")]  # fmt: skip
        return await run.ask(asked)

    async with site(client, Agent("main", order)) as one:
        text = (await one.ask(do, metadata=THREAD))["text"]
        assert "[size] How large?\n\n[sure] Are you sure?" in text
        error = (await one.ask(do, [user("Large")], metadata=THREAD))["error"]
        assert ("BadRequestError", "waiting") == (error["name"], one.run.state)
        seen = await one.ask(do, [user("[size]: large\nsure: yes")], metadata=THREAD)
    assert {"size": "large", "sure": True} == json.loads(seen["text"])


async def test_without_a_thread_a_question_is_left_to_the_model(client):
    """The next message begins another run, which can read what was asked; the first one waits."""
    arguments = '{"question":"Which one?"}'
    provider, agent = model(ask_for(("ask_user", arguments)), say("Blue it is."), tools=[ask_user])
    async with site(client, agent) as one:
        assert "Which one?" == (await one.ask("stream"))["text"]
        said = [*HELLO, assistant("Which one?"), user("Blue")]
        assert "Blue it is." == (await one.ask("stream", said))["text"]
        assert ["finished", "waiting"] == sorted(run.state for run in one.server.runs)
    assert AssistantMessage("Which one?") == provider.prompts[1].messages[1]


# What pages send ----------------------------------------------------------------------------------


async def test_what_a_page_sends_beside_its_messages_does_no_harm(client):
    """Fields of its own, and those that say nothing but what is so anyway."""
    more = {
        "n": 1, "stop": [], "tools": [], "response_format": {"type": "text"}, "temperature": 1,
        "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "max_completion_tokens": 100,
        "logit_bias": {}, "logprobs": False, "reasoning_effort": "low", "service_tier": "auto",
        "parallel_tool_calls": True, "store": False, "user": "u1",
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }  # fmt: skip
    _, agent = model(say(TEXT))
    parts = [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]
    async with site(client, agent) as one:
        seen = await one.ask("stream", [user(parts)], **more)
    assert TEXT == seen["text"]
