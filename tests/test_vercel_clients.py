"""Vercel's AI SDK as it is published, versions 6 and 7, talking to a server over real sockets.

Each test does the same with both versions, side by side in one process; what their chats show is
what a page would: status, error, messages, and what `onFinish` was told.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from cutting import Cut, open_cutter
from node import Driver, node
from raw import connect, request, wait_until

from agentsse import Agent, AgentError, Question, tool, write_output
from agentsse.dialects.native import NATIVE
from agentsse.dialects.vercel import VERCEL
from agentsse.events import PartDelta, PartFinished, PartStarted, Usage
from agentsse.messages import AssistantMessage, ToolMessage, UserMessage
from agentsse.providers import Finish
from agentsse.runs import Run
from agentsse.server import Server
from agentsse.testing import ScriptedProvider, ask_for, open_server, say

PATIENCE = 40  # seconds; nothing here takes three
VERSIONS = (6, 7)
GOOD = {"isAbort": False, "isDisconnect": False, "isError": False}
STEP = {"type": "step-start"}
UNICODE = "Köln 😀 \u2028 \u0000 שלום"


@attrs.define(eq=False)
class Chat:
    """A chat of one version of the SDK, in the driver's process."""

    site: "Site"
    name: str
    version: int

    async def tell(self, do: str, **command: Any) -> None:
        """Have it do something; what it shows then is heard later."""
        await self.site.driver.tell(do=do, chat=self.name, **command)

    async def ask(self, do: str, **command: Any) -> Any:
        """Have it do something; what it shows then."""
        await self.tell(do, **command)
        return await self.hear()

    async def hear(self) -> Any:
        """What it shows when it has done something."""
        seen = await self.site.driver.hear()
        assert self.name == seen.get("id"), seen
        return seen

    async def say(self, text: str = "Hi") -> Any:
        """Say something; what it shows when the answer is there."""
        return await self.ask("send", text=text)

    @property
    def runs(self) -> list[Run]:
        """The runs of this chat, the oldest first."""
        return [run for run in reversed([*self.site.server.runs]) if run.thread_id == self.name]


@attrs.define(eq=False)
class Site:
    """A server and a process with clients."""

    server: Server
    driver: Driver
    chats: int = 0

    async def open(self, version: int, *, like: Chat | None = None, **settings: Any) -> Chat:
        """Open a chat; `like` another one, with the same id on the server."""
        self.chats += 1
        name = like.name if like else f"chat{self.chats}"
        settings = {"url": self.server.urls[0], **settings}
        await self.driver.tell(do="open", version=version, chat=name, **settings)
        return Chat(self, name, version)

    async def stop(self, chat: Chat) -> int:
        """Stop what goes on in a chat, as a page would have to; the status."""
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(request("POST", f"/api/chat/{chat.name}/stop"))
            await raw.finish()
            return raw.status


@asynccontextmanager
async def site(*agents: Agent, **settings: Any) -> AsyncIterator[Site]:
    """Serve agents to clients, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, VERCEL), **settings) as server,
            node("vercel.mjs") as driver,
        ):
            yield Site(server, driver)


def model(*script, **settings):
    """A model agent that says the same to each version."""
    provider = ScriptedProvider([*script, *script])
    return provider, Agent.of_model("main", "scripted:m", provider=provider, **settings)


@tool
async def look(place: str) -> str:
    """Look."""
    await trio.lowlevel.checkpoint()
    return f"sunny in {place}"


def text_part(text, state="done"):
    return {"type": "text", "text": text, "state": state}


def parts_of(seen):
    """The parts of the assistant's last message."""
    message = seen["messages"][-1]
    assert "assistant" == message["role"]
    return message["parts"]


def texts_of(seen):
    return [part["text"] for part in parts_of(seen) if part["type"] == "text"]


class Sleeper:
    """An agent that says something, and the rest when it is told to; each chat has its own."""

    def __init__(self):
        self.begun, self.go = trio.Event(), trio.Event()

    async def __call__(self, run, _input):
        """Sleep."""
        run.text("half")
        self.begun.set()
        await self.go.wait()
        run.text(" done")


def sleepers(**settings):
    """One for each version, and the agents that they are."""
    asleep = {version: Sleeper() for version in VERSIONS}
    agents = [Agent(f"main{v}", sleeper, **settings) for v, sleeper in asleep.items()]
    return asleep, agents


async def test_a_text_is_read():
    """As one message with the run's id, its usage and the reason why it ended; silence is none."""
    *lines, _ = say(UNICODE)
    _, agent = model([*lines, 0.05, Finish("stop", Usage(input_tokens=3, output_tokens=4))])
    async with site(agent, heartbeat=0.01) as one:
        for version in VERSIONS:
            chat = await one.open(version)
            seen = await chat.say()
            (run,) = chat.runs
            assert ("ready", None) == (seen["status"], seen["error"])
            assert [{**GOOD, "finishReason": "stop"}] == seen["finishes"]
            assert [STEP, text_part(UNICODE)] == parts_of(seen)
            assert run.id == seen["messages"][-1]["id"]
            metadata = seen["messages"][-1]["metadata"]
            assert (run.id, 7) == (metadata["runId"], metadata["usage"]["totalTokens"])
            assert "v1" == seen["headers"][0]["x-vercel-ai-ui-message-stream"]


async def test_tools_of_the_agent_are_shown():
    """What they were called with, and what they gave; the client is not asked for it again."""
    calls = ask_for(("look", '{"place":"A"}'), ("look", '{"place":"B"}'))
    _, agent = model(calls, say("Sunny."), tools=[look])
    async with site(agent) as one:
        for version in VERSIONS:
            chat = await one.open(version, auto=["tools", "approvals"])
            seen = await chat.say()
            first, second = (
                {"type": "tool-look", "toolCallId": call_id, "state": "output-available",
                 "input": {"place": place}, "output": f"sunny in {place}"}
                for call_id, place in (("call1", "A"), ("call2", "B"))
            )  # fmt: skip
            assert [STEP, first, second, STEP, text_part("Sunny.")] == parts_of(seen)
            assert ("ready", 1) == (seen["status"], len(chat.runs))


async def test_thoughts_are_shown_and_not_sent_back_to_the_model():
    """As parts of their own."""
    thinking = [
        PartStarted(part_id="r", kind="reasoning"),
        PartDelta(part_id="r", kind="reasoning", delta="Let me see."),
        PartFinished(part_id="r", kind="reasoning", text="Let me see."),
        *say("Sunny."),
    ]
    provider, agent = model(thinking, say("Still."))
    async with site(agent) as one:
        for version in VERSIONS:
            chat = await one.open(version)
            reasoning = parts_of(await chat.say())[1]
            assert ("reasoning", "Let me see.") == (reasoning["type"], reasoning["text"])
            assert ["Still."] == texts_of(await chat.say("And now?"))
            told = (UserMessage("Hi"), AssistantMessage("Sunny."), UserMessage("And now?"))
            assert told == provider.prompts[-1].messages


async def test_errors_are_the_chats_error():
    """Before the stream in the words of the response, in the middle of it in the agent's own."""

    async def failing(run, _input):
        run.text("half")
        await trio.lowlevel.checkpoint()
        raise AgentError("no luck")

    async with site(Agent("main", failing)) as one:
        for version in VERSIONS:
            chat = await one.open(version, body={"agent": "nobody"})
            seen = await chat.say()
            assert ("error", 1) == (seen["status"], len(seen["messages"]))
            assert seen["error"].startswith("expected one of the agents main, got 'nobody'")
            chat = await one.open(version)
            seen = await chat.say()
            assert ("error", "no luck") == (seen["status"], seen["error"])
            assert [STEP, text_part("half")] == parts_of(seen)
            assert [{**GOOD, "isError": True}] == seen["finishes"]


async def test_a_stop_cancels_the_run_where_leaving_does():
    """All it does is to close the connection."""
    asleep, agents = sleepers(on_disconnect="cancel")
    async with site(*agents) as one:
        for version in VERSIONS:
            chat = await one.open(version, body={"agent": f"main{version}"})
            await chat.tell("send", text="Hi")
            await asleep[version].begun.wait()
            await chat.tell("stop")
            seen = [await chat.hear(), await chat.hear()][-1]
            assert ("ready", None) == (seen["status"], seen["error"])
            assert [{**GOOD, "isAbort": True}] == seen["finishes"]
            (run,) = chat.runs
            await run.done.wait()
            assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)


async def test_a_stop_under_grace_can_be_taken_back():
    """The run goes on, and whoever comes back has all of it; once it is over there is no more."""
    asleep, agents = sleepers(on_disconnect="grace:30")
    async with site(*agents) as one:
        for version in VERSIONS:
            chat = await one.open(version, body={"agent": f"main{version}"})
            await chat.tell("send", text="Hi")
            await asleep[version].begun.wait()
            await chat.tell("stop")
            await chat.hear()
            await chat.hear()
            (run,) = chat.runs
            await wait_until(lambda run=run: not run.is_held)
            await chat.tell("resume")
            await wait_until(lambda run=run: run.is_held)
            asleep[version].go.set()
            seen = await chat.hear()
            assert ("ready", None, 2) == (seen["status"], seen["error"], len(seen["messages"]))
            assert [STEP, text_part("half done")] == parts_of(seen)
            assert {**GOOD, "finishReason": "stop"} == seen["finishes"][-1]
            again = await chat.ask("resume")
            assert (204, seen["messages"]) == (again["statuses"][-1], again["messages"])
            assert "success" == run.end.outcome


async def test_a_stop_that_is_asked_for_ends_it_at_once():
    """It is an end that the client takes for a good one, with nothing left open."""
    asleep, agents = sleepers(on_disconnect="grace:30")
    async with site(*agents) as one:
        for version in VERSIONS:
            chat = await one.open(version, body={"agent": f"main{version}"}, auto=["tools"])
            assert 204 == await one.stop(chat)  # which the server does not know yet
            await chat.tell("send", text="Hi")
            await asleep[version].begun.wait()
            assert 200 == await one.stop(chat)
            seen = await chat.hear()
            assert ("ready", None) == (seen["status"], seen["error"])
            assert [STEP, text_part("half")] == parts_of(seen)
            assert [GOOD] == seen["finishes"]
            assert "client_cancel" == chat.runs[0].end.receipt.cause


async def test_the_next_message_takes_the_place_of_one_that_was_stopped():
    """At once, though the run would have had its grace."""
    asleep, agents = sleepers(on_disconnect="grace:30")

    async def greet(run, input):
        await trio.lowlevel.checkpoint()
        run.text(f"Hello, {input}.")

    async with site(*agents, Agent("greeter", greet)) as one:
        for version in VERSIONS:
            chat = await one.open(version, body={"agent": f"main{version}"})
            await chat.tell("send", text="Hi")
            await asleep[version].begun.wait()
            await chat.tell("stop")
            await chat.hear()
            await chat.hear()
            other = await one.open(version, like=chat, body={"agent": "greeter"})
            assert ["Hello, you."] == texts_of(await other.say("you"))
            first, _ = chat.runs
            assert ("cancelled", "client_cancel") == (first.end.outcome, first.end.receipt.cause)


async def painter(run, _input):
    """Ask whether, then how."""
    run.text("Well.")
    if not await run.ask(Question(id="go", kind="confirm", prompt="Paint it?")):
        return "Left as it is."
    color = await run.ask("Which color?")
    return f"Painted {color}."


@pytest.mark.parametrize("auto", [True, False])
async def test_a_run_that_asks_is_answered(auto):
    """By an approval and by a tool's output; it goes on in the same message, by itself or sent."""
    async with site(Agent("main", painter)) as one:
        for version in VERSIONS:
            chat = await one.open(version, auto=["tools", "approvals"] if auto else None)
            seen = await chat.say()
            part = parts_of(seen)[-1]
            assert ("dynamic-tool", "confirm") == (part["type"], part["toolName"])
            assert ("approval-requested", "Paint it?") == (part["state"], part["input"]["prompt"])
            assert {**GOOD, "finishReason": "tool-calls"} == seen["finishes"][-1]
            await chat.ask("approve", id=part["approval"]["id"], approved=True)
            seen = await (chat.ask("finished", count=2) if auto else chat.ask("send"))
            confirmed, part = (each for each in parts_of(seen) if each["type"] == "dynamic-tool")
            assert ("output-available", True) == (confirmed["state"], confirmed["output"])
            assert ("ask_user", "input-available") == (part["toolName"], part["state"])
            assert "Which color?" == part["input"]["questions"][0]["prompt"]
            await chat.ask("output", tool="ask_user", id=part["toolCallId"], output="red")
            seen = await (chat.ask("finished", count=3) if auto else chat.ask("send"))
            assert ("ready", None, 2) == (seen["status"], seen["error"], len(seen["messages"]))
            assert ["Well.", "Painted red."] == texts_of(seen)
            assert "red" == parts_of(seen)[-3]["output"]
            assert ["success"] == [run.end.outcome for run in chat.runs]
            assert 3 == len((await chat.ask("view"))["finishes"])


async def test_what_is_not_approved_is_a_no():
    """The call is shown as denied."""
    async with site(Agent("main", painter)) as one:
        for version in VERSIONS:
            chat = await one.open(version, auto=["approvals"])
            part = parts_of(await chat.say())[-1]
            await chat.ask("approve", id=part["approval"]["id"], approved=False)
            seen = await chat.ask("finished", count=2)
            assert ["Well.", "Left as it is."] == texts_of(seen)
            assert "output-denied" == parts_of(seen)[-3]["state"]


async def test_who_comes_back_to_a_run_that_has_asked_has_all_of_it():
    """In one stream with what was answered; then it is asked what is asked now."""
    async with site(Agent("main", painter)) as one:
        for version in VERSIONS:
            chat = await one.open(version)
            part = parts_of(await chat.say())[-1]
            await chat.ask("approve", id=part["approval"]["id"], approved=True)
            before = await chat.ask("send")
            seen = await chat.ask("resume")
            assert ("ready", None, 2) == (seen["status"], seen["error"], len(seen["messages"]))
            approval, again = parts_of(before)[3].pop("approval"), parts_of(seen)[3].pop("approval")
            assert parts_of(before) == parts_of(seen)
            assert approval["id"] == again["id"]
            reloaded = await one.open(version, like=chat, auto=["tools"])
            seen = await reloaded.ask("resume")
            assert parts_of(before)[-1] == parts_of(seen)[-1]
            await reloaded.ask("output", tool="ask_user", id=parts_of(seen)[-1]["toolCallId"],
                               errorText="I would rather not say")  # fmt: skip
            seen = await reloaded.ask("finished", count=2)
            assert ("error", "the person has declined to answer") == (seen["status"], seen["error"])


PICK = {"pick": {"description": "Pick one.", "inputSchema": {"type": "object"}}}


async def test_tools_of_the_client_are_called_in_the_client():
    """What they give goes on in the same message; nothing is sent twice."""
    calls = ask_for(("look", '{"place":"A"}'), ("pick", '{"of":2}'))
    provider, agent = model(calls, say("The second."), tools=[look])
    async with site(agent) as one:
        for version in VERSIONS:
            chat = await one.open(
                version, auto=["tools"], body={"tools": PICK}, outputs={"pick": 2}
            )
            await chat.say()
            seen = await chat.ask("finished", count=2)
            assert ("ready", None, 2) == (seen["status"], seen["error"], len(seen["messages"]))
            _, looked, picked, *rest = parts_of(seen)
            assert ("output-available", 2) == (picked["state"], picked["output"])
            assert [STEP, text_part("The second.")] == rest
            assert ["success"] * 2 == [run.end.outcome for run in chat.runs]
            *_, first, second = provider.prompts[-1].messages
            assert ToolMessage(looked["toolCallId"], "look", '"sunny in A"') == first
            assert ToolMessage(picked["toolCallId"], "pick", "2") == second


async def test_a_message_that_two_runs_have_made_comes_back_whole():
    """The second one begins behind what the client had brought."""
    asleep = {version: Sleeper() for version in VERSIONS}

    async def wait(place: str) -> str:
        sleeper = asleep[int(place)]
        sleeper.begun.set()
        await sleeper.go.wait()
        return "there"

    scripts = [
        [ask_for(("pick", "{}")), ask_for(("wait", f'{{"place":"{v}"}}')), say("Done.")]
        for v in VERSIONS
    ]
    provider = ScriptedProvider([call for script in scripts for call in script])
    agent = Agent.of_model("main", "scripted:m", provider=provider, tools=[tool(wait)])
    async with site(agent) as one:
        for version in VERSIONS:
            chat = await one.open(
                version, auto=["tools"], body={"tools": PICK}, outputs={"pick": 2}
            )
            await chat.tell("send", text="Hi")
            await asleep[version].begun.wait()
            await chat.tell("stop")
            await chat.hear()
            await chat.hear()
            await chat.tell("resume")
            await wait_until(lambda chat=chat: chat.runs[1].is_held)
            asleep[version].go.set()
            seen = await chat.hear()
            assert ("ready", 2) == (seen["status"], len(seen["messages"]))
            calls = [part for part in parts_of(seen) if part["type"].startswith("tool-")]
            assert [("tool-pick", 2), ("tool-wait", "there")] == [
                (part["type"], part["output"]) for part in calls
            ]
            assert ["Done."] == texts_of(seen)


async def test_what_a_tool_gave_goes_round_whatever_it_is():
    """Much of it, in any script, and what the client fears to read."""
    large = UNICODE + "ä" * 1024 * 1024

    @tool
    async def fetch() -> str:
        """Fetch."""
        await trio.lowlevel.checkpoint()
        return large

    @tool
    async def dig() -> Any:
        """Dig."""
        await trio.lowlevel.checkpoint()
        return {"__proto__": {"a": 1}}

    calls = ask_for(("fetch", "{}"), ("dig", "{}"))
    provider, agent = model(calls, say("Much."), say("Indeed."), tools=[fetch, dig])
    async with site(agent) as one:
        for version in VERSIONS:
            chat = await one.open(version)
            seen = await chat.say()
            _, fetched, dug, *_ = parts_of(seen)
            is_whole = large == fetched["output"]  # too long to be shown
            assert (True, '{"__proto__":{"a":1}}') == (is_whole, dug["output"])
            seen = await chat.say("Really?")
            assert ("ready", ["Indeed."]) == (seen["status"], texts_of(seen))
            _, _, told, _, _, _ = provider.prompts[-1].messages
            is_whole = large in told.content.replace("\\u0000", "\0")
            assert is_whole


async def test_a_client_that_does_not_read_for_a_while_loses_nothing():
    """What it does not take waits for it, and no run waits."""
    pieces = [str(number) * 100_000 for number in range(25)]

    async def talk(run, _input):
        for piece in pieces:
            await trio.lowlevel.checkpoint()
            run.text(piece)

    async with site(Agent("main", talk)) as one:
        for version in VERSIONS:
            chat = await one.open(version, held=True)
            await chat.tell("send", text="Hi")
            await wait_until(lambda chat=chat: bool(chat.runs and chat.runs[0].done.is_set()))
            assert 1 == one.server.app.streams.open
            await chat.tell("release")
            seen = await chat.hear()
            is_whole = ["".join(pieces)] == texts_of(seen)
            assert ("ready", True) == (seen["status"], is_whole)


async def test_twenty_chats_at_once_see_each_their_own():
    """In one process, over as many connections."""

    async def echo(run, input):
        for letter in input:
            await trio.sleep(0.001)
            run.text(letter)

    async with site(Agent("main", echo)) as one:
        chats = [await one.open(VERSIONS[number % 2]) for number in range(20)]
        for chat in chats:
            await chat.tell("send", text=f"I am {chat.name} {UNICODE}")
        seen = [await one.driver.hear() for _ in chats]
    assert {chat.name: [f"I am {chat.name} {UNICODE}"] for chat in chats} == {
        each["id"]: texts_of(each) for each in seen
    }


@pytest.mark.parametrize(
    ("after", "way"),
    [
        (b"HTTP/1.1 200 ", "rst"),
        (b'{"type":"start","mess', "fin"),
        (b'"delta":"ha', "rst"),
        (b'"type":"tool-output-available"', "fin"),
    ],
)
async def test_a_cut_is_an_error_and_whoever_comes_back_has_all_of_it(after, way):
    """Early, in the middle of a chunk, and late: the replay takes the place of what had come."""
    asleep = {version: Sleeper() for version in VERSIONS}

    async def careful(run, input):
        run.text("half")
        await run.call(look, {"place": "A"})
        await asleep[int(input)].go.wait()
        run.text("done")

    async with site(Agent("main", careful, tools=[look])) as one:
        for version in VERSIONS:
            async with open_cutter(one.server.urls[0], Cut(after, way)) as cutter:
                chat = await one.open(version, url=cutter.url)
                seen = await chat.say(str(version))
                assert ("error", True) == (seen["status"], seen["finishes"][-1]["isError"])
                (run,) = chat.runs
                await wait_until(lambda run=run: not run.is_held)
                await chat.tell("resume")
                await wait_until(lambda run=run: run.is_held)
                asleep[version].go.set()
                seen = await chat.hear()
            assert ("ready", None, 2) == (seen["status"], seen["error"], len(seen["messages"]))
            kinds = [part["type"] for part in parts_of(seen)]
            assert ["step-start", "text", "tool-look", "step-start", "text"] == kinds
            assert ["half", "done"] == texts_of(seen)
            assert {**GOOD, "finishReason": "stop"} == seen["finishes"][-1]


@pytest.mark.parametrize(
    ("after", "way"),
    [(b'"delta":"half"', "fin"), (b'"type":"tool-output-available"', "rst"), (b'"done"', "fin")],
)
async def test_a_run_that_ended_while_nobody_read_it_is_made_whole(after, way):
    """Once: whoever has read it to its end has nothing to come back to."""
    asleep = {version: Sleeper() for version in VERSIONS}

    async def careful(run, input):
        run.text("half")
        await run.call(look, {"place": "A"})
        run.text("done")
        asleep[int(input)].begun.set()
        await asleep[int(input)].go.wait()

    async with site(Agent("main", careful, tools=[look])) as one:
        for version in VERSIONS:
            async with open_cutter(one.server.urls[0], Cut(after, way)) as cutter:
                chat = await one.open(version, url=cutter.url)
                seen = await chat.say(str(version))
                assert ("error", True) == (seen["status"], seen["finishes"][-1]["isError"])
                await asleep[version].begun.wait()
                (run,) = chat.runs
                await wait_until(lambda run=run: not run.is_held)
                asleep[version].go.set()
                await run.done.wait()
                assert not run.was_read
                seen = await chat.ask("resume")
                again = await chat.ask("resume")
            assert ("ready", None, 2) == (seen["status"], seen["error"], len(seen["messages"]))
            assert ["half", "done"] == texts_of(seen)
            assert {**GOOD, "finishReason": "stop"} == seen["finishes"][-1]
            assert ([200, 204], seen["messages"]) == (again["statuses"][-2:], again["messages"])


async def test_a_stream_that_was_resumed_lasts_to_the_end():
    """Other streams are told to come back now and then; the client would take that for an end."""
    asleep, agents = sleepers()
    async with site(*agents, rotation=0.001) as one:
        for version in VERSIONS:
            chat = await one.open(version, body={"agent": f"main{version}"})
            await chat.tell("send", text="Hi")
            await asleep[version].begun.wait()
            reloaded = await one.open(version, like=chat)
            await reloaded.tell("resume")
            await wait_until(lambda: one.server.app.streams.open == 2)
            await trio.sleep(0.05)  # it would have been told long ago
            asleep[version].go.set()
            await chat.hear()
            await chat.hear()
            seen = await reloaded.ask("view")
            assert ("ready", None) == (seen["status"], seen["error"])
            assert [STEP, text_part("half done")] == parts_of(seen)
            assert [{**GOOD, "finishReason": "stop"}] == seen["finishes"]
        assert 0 == one.server.app.streams.closed["rotated"]


async def test_a_server_that_stops_is_an_error():
    """Nobody wanted that end; a client would have taken a mere one for good."""
    asleep, agents = sleepers()
    async with site(*agents) as one:
        chats = []
        for version in VERSIONS:
            chats.append(await one.open(version, body={"agent": f"main{version}"}))
            await chats[-1].tell("send", text="Hi")
            await asleep[version].begun.wait()
        await one.server.drain(0)
        for seen in [await one.driver.hear() for _ in chats]:
            assert ("error", "the run was cancelled (shutdown)") == (seen["status"], seen["error"])
            assert [STEP, text_part("half")] == parts_of(seen)


async def test_what_an_agent_emits_is_data():
    """Values take the place of those before; what a tool prints is told and not kept."""

    @tool
    async def count() -> int:
        """Count."""
        await trio.lowlevel.checkpoint()
        write_output("one")
        return 1

    async def busy(run, _input):
        run.set_values(progress=0.5, note="so far")
        run.emit("chart", x=[1])
        await run.call(count, {})
        run.set_values(progress=1)

    async with site(Agent("main", busy, tools=[count])) as one:
        for version in VERSIONS:
            chat = await one.open(version, auto=["tools", "approvals"])
            seen = await chat.say()
            assert ("ready", None, 1) == (seen["status"], seen["error"], len(chat.runs))
            data = [part for part in parts_of(seen) if part["type"].startswith("data-")]
            assert [
                {"type": "data-values", "id": "progress", "data": 1},
                {"type": "data-values", "id": "note", "data": "so far"},
                {"type": "data-chart", "data": {"x": [1]}},
            ] == data
            passing = [part["data"]["delta"] for part in seen["data"] if part.get("transient")]
            assert ["one"] == passing


async def test_an_answer_is_given_anew():
    """Without what was answered before."""
    provider, agent = model(say("One."), say("Two."))
    async with site(agent) as one:
        for version in VERSIONS:
            chat = await one.open(version)
            assert ["One."] == texts_of(await chat.say())
            seen = await chat.ask("regenerate")
            assert (["Two."], 2) == (texts_of(seen), len(seen["messages"]))
            assert (UserMessage("Hi"),) == provider.prompts[-1].messages
