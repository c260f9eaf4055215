"""AG-UI with the clients that people have: `@ag-ui/client` 1.0.0 and 0.0.59, and Python's types.

Both clients check each event against their schemas, and the order of all against the protocol's
rules, and throw where something is wrong; what version 1.0.0 does not know it complains of. So a
run that comes to its end without a complaint is a proof by itself.
"""

from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from ag_ui.core import Event
from ag_ui.encoder import EventEncoder
from cutting import Cut, open_cutter
from node import node
from pydantic import TypeAdapter
from raw import connect, request, wait_until
from test_agui import EARLY, Gated, encoded, happenings, model, values

from agentsse import Agent, AgentError, ask_user, tool
from agentsse.dialects.agui import AGUI, View
from agentsse.dialects.native import NATIVE
from agentsse.events import PartDelta, PartFinished, PartStarted, Question, Usage
from agentsse.messages import AssistantMessage, ToolCall, ToolMessage, UserMessage
from agentsse.providers import Finish
from agentsse.testing import ask_for, open_server, say

PATIENCE = 60  # seconds; nothing here takes ten
TEXT = "It is sunny in Köln 😀."
ANSWER = "a\n\n\r\n\u2028 Köln 😀 \0 data: x\n\n"
PACKAGES = {False: "@ag-ui/client", True: "ag-ui-client-0"}  # by whether it is an early one
EACH = pytest.mark.parametrize("early", [False, True], ids=["1.0.0", "0.0.59"])


@attrs.define
class Talk:
    """A server, and a client that is one conversation with an agent of it.

    Attributes:
        way: Where the client goes, where that is not the server itself.
    """

    server: object
    driver: object
    way: str | None = None

    def command(self, agent="main", **more):
        """Tell the driver to run."""
        url = f"{self.way or self.server.urls[0]}/agui/{agent}"
        known = {"do": "run", "name": "talk", "url": url, "lingers": 5}
        return known | more

    async def run(self, agent="main", *, is_odd=False, **more):
        """Run once; what the client has seen. It has nothing to complain of, unless it is odd."""
        seen = await self.driver.ask(**self.command(agent, **more))
        if not is_odd:
            assert ([], [], None) == (seen["complaints"], seen["unhandled"], seen.get("error"))
        return seen

    @asynccontextmanager
    async def running(self, **more):
        """Run, and be there meanwhile; what is seen is put into the list that this gives."""
        seen = []
        async with trio.open_nursery() as nursery:

            async def run():
                seen.append(await self.run(**more))

            nursery.start_soon(run)
            yield seen

    async def post(self, path):
        """Send a request of nothing; the status."""
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(request("POST", path))
            await raw.finish()
            return raw.status


@asynccontextmanager
async def talk(early, *agents, **settings):
    with trio.fail_after(PATIENCE):
        async with (
            node("agui.mjs", PACKAGES[early]) as driver,
            open_server(*agents, dialects=(NATIVE, AGUI), **settings) as server,
        ):
            yield Talk(server, driver)


def said(seen):
    """What the client has of the conversation: role and content."""
    return [(message["role"], message.get("content")) for message in seen["messages"]]


def thinking(text):
    """The lines of a model that thinks, and says a text in pieces."""
    return [
        PartStarted(part_id="r", kind="reasoning"),
        PartDelta(part_id="r", kind="reasoning", delta="Let me see."),
        PartFinished(part_id="r", kind="reasoning", text="Let me see."),
        PartStarted(part_id="t", kind="text"),
        *(PartDelta(part_id="t", kind="text", delta=letter) for letter in text),
        PartFinished(part_id="t", kind="text", text=text),
        Finish("stop", usage=Usage(input_tokens=7, output_tokens=3)),
    ]


@tool
async def look(name: str) -> dict:
    """Look."""
    await trio.lowlevel.checkpoint()
    return {"seen": name}


@tool
async def shout(text: str) -> str:
    """Shout."""
    await trio.lowlevel.checkpoint()
    return text + ANSWER


async def asker(run, _input):
    """Ask, and say what was answered."""
    run.text(f"You said {await run.ask('Which one?')}.")


# What a run shows


@EACH
async def test_a_text_run_with_reasoning(early):
    """The text is a message, the thoughts are another; the result is what the run returns."""
    _, agent = model(thinking(TEXT))
    async with talk(early, agent) as one:
        seen = await one.run(text="Hello", runId="R")
    assert [("user", "Hello"), ("reasoning", "Let me see."), ("assistant", TEXT)] == said(seen)
    assert ("success", TEXT, "R") == (seen["outcome"], seen["result"], seen["runId"])
    counts = {"provider": "scripted", "model": "m", "inputTokens": 7, "outputTokens": 3}
    assert (None if early else [counts | {"totalTokens": 10}]) == seen.get("usage")


@EACH
async def test_two_tools_and_a_second_turn(early):
    """The client posts all of it back, and the model is told just what it was told before."""
    calls = ask_for(("look", '{"name":"x"}'), ("shout", '{"text":"Hey "}'))
    provider, agent = model(calls, say("Done."), say("Again."), tools=[look, shout])
    async with talk(early, agent) as one:
        first = await one.run(text="Hello")
        second = await one.run(text="And now?")
    user, wanted, *answers, end = first["messages"]
    assert ("Hello", "Done.") == (user["content"], end["content"])
    assert [("call1", "look"), ("call2", "shout")] == [
        (call["id"], call["function"]["name"]) for call in wanted["toolCalls"]
    ]
    found = {answer["toolCallId"]: answer["content"] for answer in answers}
    assert {"call1": '{"seen":"x"}', "call2": "Hey " + ANSWER} == found
    assert ["scripted:m", "tools", "scripted:m"] == first["steps"]
    assert "Again." == second["messages"][-1]["content"]

    begin, made, *told, done, again = provider.prompts[2].messages
    assert (UserMessage("Hello"), UserMessage("And now?")) == (begin, again)
    arguments = [
        ToolCall("call1", "look", '{"name":"x"}'),
        ToolCall("call2", "shout", '{"text":"Hey "}'),
    ]
    assert (AssistantMessage("", tuple(arguments)), AssistantMessage("Done.")) == (made, done)
    assert {*provider.prompts[1].messages[-2:]} == {*told}


@EACH
async def test_a_megabyte_through_a_second_turn(early):
    """The request that brings it back is larger than others may be."""
    much = "Köln 😀 " * 100_000

    @tool
    async def fetch() -> str:
        """Fetch a lot."""
        await trio.lowlevel.checkpoint()
        return much

    provider, agent = model(ask_for(("fetch", "{}")), say("Fetched."), say("Again."), tools=[fetch])
    async with talk(early, agent) as one:
        first = await one.run(text="Hello")
        await one.run(text="And now?")
    assert much == first["messages"][2]["content"]
    (answer,) = (m for m in provider.prompts[2].messages if isinstance(m, ToolMessage))
    assert answer == provider.prompts[1].messages[-1]


@EACH
async def test_all_else_that_an_agent_can_do(early):
    """State, steps of one name, agents below, its own events, its own calls, a result."""

    async def below(_run, input):
        await trio.lowlevel.checkpoint()
        return f"below {input}"

    async def busy(run, _input):
        with run.step("draw"), run.step("draw"):
            run.set_values(seen=run.metadata["state"]["mine"], list=[1])
            run.emit("tick", n=1)
            await run.call("shout", {"text": "Hey "})
            await run.delegate("below", 1)
            run.reasoning("Hm.")
            run.set_values(list=None, more={"a/b": 1})
        run.text("Done.")
        return {"n": 3}

    agents = (Agent("main", busy, tools=[shout]), Agent("below", below))
    async with talk(early, *agents) as one:
        seen = await one.run(text="Hello", state={"mine": 7})
        again = await one.run(text="Again")
    assert {"mine": 7, "seen": 7, "more": {"a/b": 1}} == seen["state"] == again["state"]
    assert ({"n": 3}, "success") == (seen["result"], seen["outcome"])
    assert ["tick", {"n": 1}] in seen["custom"]
    assert 2 == len(set(seen["steps"]))
    agents = ["SUBAGENT_STARTED", "SUBAGENT_FINISHED"]
    assert ([] if early else agents) == [kind for kind in seen["types"] if kind in agents]
    roles = ["user", "assistant", "tool", "reasoning", "assistant"]
    assert roles * 2 == [role for role, _ in said(again)]
    assert 2 == len({m["toolCallId"] for m in again["messages"] if m["role"] == "tool"})


@EACH
async def test_the_clients_tools(early):
    """A model calls them, the client answers, and the conversation goes on."""
    provider, agent = model(ask_for(("pick", '{"n":1}')), say("Picked."))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    tools = [{"name": "pick", "description": "Pick one", "parameters": schema}]
    context = [{"description": "The page", "value": "Settings"}]
    async with talk(early, agent) as one:
        first = await one.run(text="Hello", tools=tools, context=context)
        second = await one.run(answers={"call1": "the red one"}, tools=tools)
    assert "success" == first["outcome"]
    assert (None if early else ["call1"]) == first.get("pending")
    assert "Picked." == second["messages"][-1]["content"]
    assert ToolMessage("call1", "pick", '"the red one"') == provider.prompts[1].messages[-1]


@EACH
async def test_twenty_at_once(early):
    """Each sees its own text."""

    async def echo(run, input):
        for word in str(input).split():
            run.text(word + " ")
            await trio.sleep(0.01)

    async with talk(early, Agent("main", echo)) as one:
        command = one.command(do="many", count=20, text="this is number")
        seen = await one.driver.ask(**command)
    assert [["success", f"this is number {n} "] for n in range(20)] == seen


# Errors


@EACH
async def test_an_error_before_the_stream(early):
    """The client throws, with the status and what the server says."""
    _, agent = model()
    async with talk(early, agent) as one:
        seen = await one.run("nobody", text="Hello", is_odd=True)
    assert (404, "not_found") == (seen["status"], seen["payload"]["code"])
    assert seen["error"].startswith("HTTP 404")


@EACH
async def test_an_error_in_the_middle(early):
    """It is no success; what was said stays."""

    async def failing(run, _input):
        run.text("half")
        await trio.lowlevel.checkpoint()
        raise AgentError("no luck", code="oops")

    async with talk(early, Agent("main", failing)) as one:
        seen = await one.run(text="Hello")
    assert {"message": "no luck", "code": "oops"} == seen["failure"]
    assert ("half", None) == (seen["messages"][-1]["content"], seen.get("outcome"))


# Leaving, stopping, coming back


@EACH
async def test_the_users_stop_where_leaving_cancels(early):
    """It is nothing but the end of the connection."""
    async with talk(early, Agent("main", Gated(), on_disconnect="cancel")) as one:
        seen = await one.run(text="Hello", stopAt="TEXT_MESSAGE_CONTENT", is_odd=True)
        (run,) = one.server.runs
        await run.done.wait()
    assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)
    assert "abort" == seen["failure"]["code"]


@EACH
async def test_the_users_stop_under_grace_and_back(early):
    """The run goes on; who posts the same run id sees all of it, and nothing twice."""
    gated = Gated()
    async with talk(early, Agent("main", gated, on_disconnect="grace:30")) as one:
        seen = await one.run(text="Hello", runId="R", stopAt="TEXT_MESSAGE_CONTENT", is_odd=True)
        assert [("user", "Hello"), ("assistant", "one ")] == said(seen)
        (run,) = one.server.runs
        await wait_until(lambda: not run.is_held)
        assert "running" == run.state
        async with one.running(runId="R") as back:
            await wait_until(lambda: run.is_held)
            gated.gate.set()
        assert [run] == [*one.server.runs]
    assert [("user", "Hello"), ("assistant", "one two")] == said(back[0])
    assert ("success", "one two") == (back[0]["outcome"], back[0]["result"])


@EACH
async def test_the_users_stop_and_another_message(early):
    """The run that was left makes room, and what it has said is part of the conversation."""
    provider, agent = model([*say("half")[:2], 3600.0], say("Better."))
    async with talk(early, agent) as one:
        await one.run(text="Hello", stopAt="TEXT_MESSAGE_CONTENT", is_odd=True)
        (left,) = one.server.runs
        await wait_until(lambda: not left.is_held)
        seen = await one.run(text="Try again")
    assert "Better." == seen["messages"][-1]["content"]
    assert ("cancelled", "client_cancel") == (left.end.outcome, left.end.receipt.cause)
    assert (
        UserMessage("Hello"), AssistantMessage("half"), UserMessage("Try again"),
    ) == provider.prompts[1].messages  # fmt: skip


@EACH
async def test_an_explicit_cancel(early):
    """The stream ends as cancelled: an outcome to the one, an error to the other."""
    async with (
        talk(early, Agent("main", Gated())) as one,
        one.running(text="Hello", runId="R") as seen,
    ):
        await wait_until(lambda: any(run.log.end > 2 for run in one.server.runs))
        assert 200 == await one.post("/agui/main/runs/R/cancel")
    see_cancelled(seen[0], early, "client_cancel")


@EACH
async def test_a_server_that_is_told_to_stop(early):
    """It ends its runs, and the client does not take that for success."""
    gated = Gated()
    with trio.fail_after(PATIENCE):
        async with node("agui.mjs", PACKAGES[early]) as driver:
            async with open_server(Agent("main", gated), dialects=(NATIVE, AGUI)) as server:
                await driver.tell(**Talk(server, driver).command(text="Hello"))
                await wait_until(lambda: any(run.log.end > 2 for run in server.runs))
            seen = await driver.hear()
    see_cancelled(seen, early, "shutdown")


def see_cancelled(seen, early, cause):
    """See that the run has not ended well."""
    assert "one " == seen["messages"][-1]["content"]
    if early:
        assert f"the run was cancelled ({cause})" == seen["failure"]["message"]
        assert ("cancelled", None) == (seen["failure"]["code"], seen.get("outcome"))
    else:
        assert ("cancelled", None) == (seen["outcome"], seen.get("result"))
        assert cause == seen["metadata"]["agentsse"]["receipt"]["cause"]


CUTS = (
    Cut(b'"type":"RUN_ST'),
    Cut(b'"delta":"Let me'),
    Cut(b'"delta":"I', way="rst"),
    Cut(b'"type":"TEXT_MESSAGE_END"'),
)


@EACH
async def test_a_cut_is_no_success_and_who_comes_back_has_it_whole(early):
    """Early, in an event, late: whatever the client had of messages, thoughts, calls, answers."""
    calls = [*thinking(TEXT)[:-1], *ask_for(("look", '{"name":"x"}'))]
    script = [calls, thinking("Done.")] * len(CUTS)
    _, agent = model(*script, tools=[look], on_disconnect="grace:30")
    async with talk(early, agent) as one, open_cutter(one.server.urls[0], *CUTS) as cutter:
        for number in range(len(CUTS)):
            known = {"name": f"talk {number}", "runId": f"R{number}"}
            one.way = cutter.url
            cut = await one.run(text="Hello", is_odd=True, **known)
            assert cut["error"]
            assert "outcome" not in cut
            one.way = None
            see_whole(await one.run(**known))
        assert len(CUTS) == len([*one.server.runs])


def see_whole(seen):
    """See that everything is there once, and in its place."""
    assert [
        ("user", "Hello"),
        ("reasoning", "Let me see."),
        ("assistant", TEXT),
        ("tool", '{"seen":"x"}'),
        ("reasoning", "Let me see."),
        ("assistant", "Done."),
    ] == said(seen)
    (wanted,) = seen["messages"][2]["toolCalls"]
    assert {"name": "look", "arguments": '{"name":"x"}'} == wanted["function"]


@EACH
async def test_a_slow_client(early):
    """It stops reading for a while; nothing is lost, and the run did not wait for it."""
    pieces = [str(n) * 512 * 1024 for n in range(6)]
    script = [
        PartStarted(part_id="t", kind="text"),
        *(PartDelta(part_id="t", kind="text", delta=piece) for piece in pieces),
        PartFinished(part_id="t", kind="text", text="".join(pieces)),
        Finish("stop"),
    ]
    _, agent = model(script)
    stall = Cut(10_000, way="stall")
    async with talk(early, agent) as one, open_cutter(one.server.urls[0], stall) as cutter:
        one.way = cutter.url
        async with one.running(text="Hello") as seen:
            await wait_until(lambda: any(run.done.is_set() for run in one.server.runs))
            assert not seen
            cutter.resume.set()
    assert "".join(pieces) == seen[0]["messages"][-1]["content"]


# Questions


@EACH
async def test_an_interrupt_answered(early):
    """The client keeps it until it is answered, and the next run is the same one of ours."""
    async with talk(early, Agent("main", asker)) as one:
        first = await one.run(text="Hello")
        (interrupt,) = first["interrupts"]
        answer = {"interruptId": interrupt["id"], "status": "resolved", "payload": "this one"}
        second = await one.run(resume=[answer])
        assert 1 == len([*one.server.runs])
    assert "interrupt" == first["outcome"]
    assert ("input_required", "Which one?") == (interrupt["reason"], interrupt["message"])
    assert [("user", "Hello"), ("assistant", "You said this one.")] == said(second)
    assert ("success", []) == (second["outcome"], second["interrupts"])
    assert first["runId"] != second["runId"]


@EACH
async def test_an_interrupt_declined_in_the_middle_of_a_step(early):
    """What was open is closed for the question, and open again behind it."""

    async def careful(run, _input):
        with run.step("decide"):
            run.text("Well. ")
            go = await run.ask(Question(id="go", kind="confirm", prompt="Go?"))
        run.text("Going." if go else "Staying.")

    async with talk(early, Agent("main", careful)) as one:
        first = await one.run(text="Hello")
        (interrupt,) = first["interrupts"]
        second = await one.run(resume=[{"interruptId": interrupt["id"], "status": "cancelled"}])
    assert "confirmation" == interrupt["reason"]
    assert ["decide"] == first["steps"] == second["steps"]
    assert [("assistant", "Well. "), ("assistant", "Staying.")] == said(second)[1:]


@EACH
async def test_a_model_that_asks_the_user(early):
    """The tool's answer comes in another response than its call, and belongs to it all the same."""
    calls = ask_for(("ask_user", '{"question":"Which?","options":["red","blue"]}'))
    provider, agent = model(calls, say("Red it is."), tools=[ask_user])
    async with talk(early, agent) as one:
        first = await one.run(text="Hello")
        (interrupt,) = first["interrupts"]
        answer = {"interruptId": interrupt["id"], "status": "resolved", "payload": "red"}
        second = await one.run(resume=[answer])
    assert "Which?" == interrupt["message"]
    expected = [
        ("user", "Hello"),
        ("assistant", None),
        ("tool", "red"),
        ("assistant", "Red it is."),
    ]
    assert expected == said(second)
    assert ToolMessage("call1", "ask_user", '"red"') == provider.prompts[1].messages[-1]


async def asker_of_two(run, _input):
    """Ask one thing after the other, and say what was answered."""
    run.text("Well. ")
    run.text(f"You said {await run.ask('Which one?')}. ")
    run.text(f"And {await run.ask('How many?')} of them.")


def resolved(interrupt, payload):
    """The answer to an interrupt, by itself or by its id."""
    known = interrupt if isinstance(interrupt, str) else interrupt["id"]
    return {"interruptId": known, "status": "resolved", "payload": payload}


@EACH
async def test_an_answer_whose_response_is_cut_is_posted_again(early):
    """With the same run id or with another one: the run is there, whole, to its next question."""
    cuts = (Cut(b"You sa"), Cut(b'"type":"RUN_ST', "rst"), Cut(b"And"))
    agent = Agent("main", asker_of_two, on_disconnect="grace:30")
    async with talk(early, agent) as one, open_cutter(one.server.urls[0], *cuts) as cutter:

        async def answer(interrupt, payload, *, first, times, again):
            one.way = cutter.url
            resume = [resolved(interrupt, payload)]
            for _ in range(times):
                cut = await one.run(resume=resume, runId=first, is_odd=True)
                assert (True, None) == (bool(cut["error"]), cut.get("outcome"))
            one.way = None
            return await one.run(resume=resume, runId=again)

        seen = await one.run(text="Hello", runId="R")
        seen = await answer(seen["interrupts"][0], "this", first="A", times=2, again="A")
        assert ("interrupt", "A") == (seen["outcome"], seen["runId"])
        assert ["Hello", "Well. ", "You said this. "] == [text for _role, text in said(seen)]
        (interrupt,) = seen["interrupts"]
        assert "How many?" == interrupt["message"]
        seen = await answer(interrupt, "two", first="B", times=1, again="C")
        (run,) = one.server.runs
        *_, before, last = (text for _role, text in said(seen))
        assert (4, "You said this. ", "And two of them.") == (len(said(seen)), before, last)
        assert ("success", [], "C") == (seen["outcome"], seen["interrupts"], seen["runId"])
        assert ("R", "success") == (run.id, run.end.outcome)


@EACH
async def test_two_interrupts_at_once(early):
    """Answered by one request, the response goes on to the end; by two, to what is still asked."""
    calls = ask_for(
        ("ask_user", '{"question":"Which?","options":["red","blue"]}'),
        ("ask_user", '{"question":"How many?","options":["one","two"]}'),
    )
    _, agent = model(calls, say("Both."), calls, say("Each."), tools=[ask_user])
    answers = {"Which?": "red", "How many?": "two"}
    async with talk(early, agent) as one:
        for name, text in (("at once", "Both."), ("in turn", "Each.")):
            seen = await one.run(text="Hello", name=name)
            run = next(run for run in one.server.runs if run.thread_id == name)
            await wait_until(lambda run=run: len(run.context.asked) == 2)
            if name == "at once":
                resume = [
                    resolved(f"{run.id}:{asked.request_id}", answers[asked.questions[0].prompt])
                    for asked in run.context.open_questions()
                ]
                seen = await one.run(resume=resume, name=name)
            else:
                for _ in range(2):
                    (interrupt,) = seen["interrupts"]
                    resume = [resolved(interrupt, answers[interrupt["message"]])]
                    seen = await one.run(resume=resume, name=name)
            assert ("success", []) == (seen["outcome"], seen["interrupts"])
            given = {content for role, content in said(seen) if role == "tool"}
            assert (text, {"red", "two"}) == (seen["messages"][-1]["content"], given)


@EACH
async def test_another_conversations_run_is_none_of_this_one(early):
    """Whoever posts its id in a conversation of its own is refused, and sees nothing of it."""
    async with talk(early, Agent("main", asker_of_two)) as one:
        await one.run(text="Hello", runId="R")
        seen = await one.run(text="Hello", runId="R", name="other", is_odd=True)
        (run,) = one.server.runs
    assert (409, "conflict") == (seen["status"], seen["payload"]["code"])
    assert ([("user", "Hello")], "talk") == (said(seen), run.thread_id)


# All there is, as bytes


@EACH
async def test_everything_that_can_happen(early):
    """Made up, and served as it is: both clients' schemas and verifiers agree with it."""
    data = encoded(*happenings(), view=EARLY if early else View(state=b'{"mine":1}'))
    with trio.fail_after(PATIENCE):
        async with node("agui.mjs", PACKAGES[early]) as driver, serving(data) as url:
            known = {"do": "run", "name": "talk", "url": url}
            seen = await driver.ask(**known, text="Hello")
    assert ([], [], None) == (seen["complaints"], seen["unhandled"], seen.get("error"))
    assert ("success", {"n": 3}) == (seen["outcome"], seen["result"])
    assert ({} if early else {"mine": 1}) | {"a": 2} == seen["state"]
    texts = [content for role, content in said(seen) if role in ("assistant", "reasoning")]
    expected = ["Let me see.", "It is sunny 😀", "So be it", "No.", None]
    assert expected == texts


@asynccontextmanager
async def serving(data):
    """Serve these bytes to whoever asks for anything; where."""
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

    async def serve(client):
        async with client:
            await client.receive_some(65536)
            await client.send_all(head.encode() + data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("view", [None, EARLY, View(run_id="B", state=b'{"mine":1}')])
def test_pythons_types_read_every_event_and_write_the_same_bytes(view):
    """In the same order of fields, and as compact."""
    reader, writer = TypeAdapter(Event), EventEncoder()
    frames = encoded(*happenings(), values('{"a":null}'), view=view).decode().split("\n\n")[:-1]
    for frame in frames:
        data = frame.partition("\n")[2]
        event = reader.validate_json(data.removeprefix("data: "))
        assert f"{data}\n\n" == writer.encode(event)
    assert len(frames) > len(happenings())
