"""Runs of model agents against model servers: to the end, badly treated, and left by their readers.

Rules: a real server, a real model server, real sockets between all three. What the model server
sees of a client that leaves is what counts; nothing of a run may be left anywhere.
"""

import json
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from raw import connect, stream_run, wait_quiet, wait_until

from agentsse import Agent
from agentsse.config import LimitSettings, Settings
from agentsse.events import (
    InputRequested,
    PartDelta,
    PartFinished,
    ProviderEvent,
    Retry,
    RunFinished,
    StepFinished,
    ToolFinished,
    ToolStarted,
    Usage,
)
from agentsse.server import make_provider
from agentsse.testing import open_server
from agentsse.testing.codex import codex_command, recorded
from agentsse.testing.upstream import (
    INVALID,
    Bomb,
    Call,
    Cut,
    Failure,
    Flood,
    Hang,
    Page,
    Refusal,
    Reply,
    Stop,
    halves,
    open_upstream,
    tool_round,
)
from agentsse.tools import tool

KINDS = ("openai_chat", "openai_responses", "anthropic", "gemini")
PATIENCE = 60  # seconds for a whole test; what it waits for takes milliseconds
QUICK = LimitSettings(retry_delay=0.01, max_tries=3)


class Meeting:
    """A tool that waits for others of its kind: side by side is the only way to get on."""

    def __init__(self, expected):
        self.missing, self.all_here, self.here = expected, trio.Event(), trio.Event()

    async def meet(self, name: str) -> str:
        """Meet the others."""
        self.here.set()
        self.missing -= 1
        if not self.missing:
            self.all_here.set()
        await self.all_here.wait()
        return f"{name} was here"


@asynccontextmanager
async def serving(kind, replies, *, tools=(), limits=QUICK, **options):
    """Open a model server, and a server with an agent that asks it."""
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, replies) as upstream:
            provider = make_provider(kind, name="up", base_url=upstream.base_url)
            chat = Agent.of_model("chat", "up:m-1", provider=provider, tools=tools, **options)
            async with open_server(chat, settings=Settings(limits=limits)) as server:
                async with connect(server.urls[0]) as client:  # what is made at first use, now
                    await client.send(stream_run("nobody"))
                    await client.finish()
                before = await wait_quiet(server)
                yield upstream, server
                await upstream.wait_until(lambda: not upstream.open_connections)
                assert before == await wait_quiet(server)


async def ask(server, said="Hi.", **fields):
    """Stream a run to its end, and return its events."""
    async with connect(server.urls[0]) as client:
        await client.send(stream_run("chat", json.dumps({"input": said, **fields}).encode()))
        await client.finish()
    return client.events


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def texts(events, kind="text"):
    return [event.text for event in of(events, PartFinished) if event.kind == kind]


def joined(events, kind="text"):
    return "".join(event.delta for event in of(events, PartDelta) if event.kind == kind)


# To the end


@pytest.mark.parametrize("style", ["usual", "sparse", "chatty"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_model_agent_calls_two_tools_side_by_side_and_answers(kind, style):
    """The model's calls, the tools' results, its answer: all in the stream, and sent back to it."""
    meeting = Meeting(2)
    usage = Usage(input_tokens=12, output_tokens=7)
    replies = [
        Reply(
            reasoning=["Let me ", "see."],
            calls=[("meet", '{"name":"ada"}'), ("meet", '{"name":"bob"}')],
            style=style,
            usage=usage,
        ),
        Reply(["They ", "were ", "here."], style=style, usage=usage),
    ]
    async with serving(kind, replies, tools=[tool(meeting.meet)]) as (upstream, server):
        events = await ask(server, "Who?")
        end = events[-1]
        assert isinstance(end, RunFinished)
        assert ("success", b'"They were here."', None) == (
            end.outcome,
            bytes(end.result),
            end.error,
        )
        assert (24, 14) == (end.usage.input_tokens, end.usage.output_tokens) or style == "sparse"
        assert ["They were here."] == texts(events)
        assert "They were here." == joined(events)
        assert "Let me see." == joined(events, "reasoning")
        assert [{"name": "ada"}, {"name": "bob"}] == list(
            map(json.loads, texts(events, "tool_call"))
        )
        assert ["stop"] == [e.finish_reason for e in of(events, StepFinished)][-1:]
        started, finished = of(events, ToolStarted), of(events, ToolFinished)
        assert 2 == len({event.call_id for event in started}) == len(finished)
        assert [b'"ada was here"', b'"bob was here"'] == sorted(bytes(e.result) for e in finished)
        assert [] == of(events, Retry)
        assert 2 == len(upstream.requests)
        sent = json.dumps(upstream.requests[1].body)
        assert all(word in sent for word in ("Who?", "ada was here", "bob was here"))
        assert 0 == upstream.hangups


@pytest.mark.parametrize("kind", KINDS)
async def test_a_thread_is_told_to_the_model_again(kind):
    """Calls and results of an earlier run are in a form that the API takes."""
    meeting = Meeting(2)
    replies = [
        *tool_round(("meet", '{"name":"ada"}'), ("meet", '{"name":"bob"}')),
        Reply("As I said."),
    ]
    async with serving(kind, replies, tools=[tool(meeting.meet)]) as (upstream, server):
        await ask(server, "Who?", thread_id="t")
        events = await ask(server, "Really?", thread_id="t")
        assert ["As I said."] == texts(events)
        sent = json.dumps(upstream.requests[2].body)
        words = ("Who?", "ada was here", "bob was here", "Done.", "Really?")
        assert sorted(map(sent.index, words)) == list(map(sent.index, words))


# Left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("reply", "sign"),
    [
        (Reply("abc", gap=0.001, ends=Hang(after=None)), b"part_delta"),
        (Reply("abc", first=1_000.0), b"step_started"),
        (Reply("abc", before=1_000.0), b"step_started"),
    ],
    ids=["mid-stream", "before the first token", "before the head"],
)
@pytest.mark.parametrize("way", ["fin", "rst", "cancel"])
async def test_a_client_that_leaves_closes_the_upstream_socket(kind, reply, sign, way):
    """Wherever the model is; the run says why it ended, and waits for nobody."""
    async with serving(kind, [reply]) as (upstream, server):
        async with connect(server.urls[0]) as client:
            await client.send(stream_run("chat", b'{"input":"Hi."}'))
            while sign not in client.body:
                await client.receive()
            await upstream.wait_until(lambda: upstream.open_streams == 1)
            (run,) = server.runs
            match way:
                case "fin":
                    await client.leave_by_fin()
                case "rst":
                    client.leave_by_rst()
                case _:
                    run.cancel("client_cancel")
            await upstream.wait_hangups()
            await run.done.wait()
        cause = "client_cancel" if way == "cancel" else "disconnect"
        assert ("cancelled", cause) == (run.end.outcome, run.end.receipt.cause)
        assert 0 == run.end.receipt.threads_abandoned


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_in_a_retry_s_sleep_closes_everything(kind):
    """The connection that was kept for the next try is closed; there is none."""
    limits = LimitSettings(retry_delay=1_000.0)
    reply = Reply(instead=Refusal("overloaded"))
    async with serving(kind, [reply] * 2, limits=limits) as (upstream, server):
        async with connect(server.urls[0]) as client:
            await client.send(stream_run("chat", b'{"input":"Hi."}'))
            await client.wait_for(Retry)
            (run,) = server.runs
            await client.leave_by_fin()
            await run.done.wait()
            await upstream.wait_until(lambda: not upstream.open_connections)
        assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)
        assert 1 == len(upstream.requests)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_inside_a_tool_closes_everything(kind):
    """Both tools are gone, and the connection that was kept for their results."""
    meeting = Meeting(3)
    replies = tool_round(("meet", '{"name":"ada"}'), ("meet", '{"name":"bob"}'))
    async with serving(kind, replies, tools=[tool(meeting.meet)]) as (upstream, server):
        async with connect(server.urls[0]) as client:
            await client.send(stream_run("chat", b'{"input":"Hi."}'))
            await wait_until(lambda: meeting.missing == 1)
            (run,) = server.runs
            await client.leave_by_fin()
            await run.done.wait()
            await upstream.wait_until(lambda: not upstream.open_connections)
        assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)
        assert run.end.receipt.tasks >= 3
        assert [True, True] == [event.is_error for event in of(run.log.events, ToolFinished)]


# Badly treated: each reply, what becomes of the run, and how often it was asked

FINISHED = ("success", None)
LONG = list("abcdefghijkl")  # a delta each; the eighth frame of any kind is one of them
BAD = {
    "cut in a frame": (Reply(LONG, ends=Cut(after=8, inside=20)), ("error", "incomplete")),
    "reset": (Reply(LONG, ends=Cut(after=8, how="rst")), ("error", "incomplete")),
    "no finish": (Reply(LONG, ends=Stop(after=8)), ("error", "incomplete")),
    "error in the middle": (
        Reply(LONG, failure=Failure("overloaded", after=8)),
        ("error", "overloaded"),
    ),
    "error behind the finish": (
        Reply(LONG, failure=Failure("server_error")),
        ("error", "server_error"),
    ),
    "stops for ever": (Reply(LONG, ends=Hang(after=8)), ("error", "stalled")),
    "one endless line": (Reply(LONG, flood=Flood(50_000_000, after=8)), ("error", "malformed")),
    "invalid UTF-8": (Reply(f"ab{INVALID}c"), FINISHED),
    "split surrogates": (Reply(halves("a\U0001f600b")), FINISHED),
    "CRLF": (Reply("abc", line_end=b"\r\n"), FINISHED),
    "no [DONE]": (Reply("abc", has_done=False), FINISHED),
    "does not end": (Reply("abc", ends=Hang(after=None)), FINISHED),
}
SAYS = {"invalid UTF-8": "ab\ufffdc", "split surrogates": "a\U0001f600b"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
async def test_a_model_server_that_misbehaves_ends_in_the_right_outcome(kind, case):
    """What was said stays, nothing is tried again behind it, and a bystander never notices."""
    reply, expected = BAD[case]
    limits = LimitSettings(retry_delay=0.01, max_tries=3, stall=0.6, liveness=0.2)
    async with serving(kind, [reply, Reply("again")], limits=limits) as (upstream, server):
        events = await ask(server)
        end = events[-1]
        assert isinstance(end, RunFinished)
        assert expected == (end.outcome, end.error and end.error.code)
        said = joined(events)
        if expected == FINISHED:
            assert SAYS.get(case, "abc") == said
            assert [said] == texts(events)
        else:
            assert said
            assert "".join(LONG).startswith(said)
            assert [said] == texts(events)
            assert end.error.message
        assert 1 == len(upstream.requests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("instead", "code", "tries"),
    [
        (Refusal("rate_limit"), "rate_limit", 3),
        (Refusal("rate_limit", retry_after="0"), "rate_limit", 3),
        (Refusal("rate_limit", retry_after="3600"), "rate_limit", 1),
        (Refusal("overloaded"), "overloaded", 3),
        (Refusal("server_error"), "server_error", 3),
        (Refusal("auth"), "auth", 1),
        (Refusal("bad_request"), "bad_request", 1),
        (Refusal("not_found"), "not_found", 1),
        (Refusal("context_length"), "context_length", 1),
        (Refusal("quota"), "quota", 1),
        (Page(), "malformed", 1),
        (Page(status=502), "server_error", 3),
        (Bomb(1_000_000_000), "malformed", 1),
        (Cut(), "incomplete", 3),
        (Cut(how="rst"), "incomplete", 3),
    ],
    ids=str,
)
async def test_a_model_server_that_refuses_is_understood(kind, instead, code, tries):
    """Each in its vendor's own words; tried again where that may help, and no more."""
    limits = QUICK
    if (kind, instead) == ("gemini", Refusal("rate_limit")):  # it wants half a minute
        limits, tries = attrs.evolve(QUICK, max_tries=1), 1
    async with serving(kind, [Reply(instead=instead)] * 9, limits=limits) as (upstream, server):
        events = await ask(server)
        end = events[-1]
        assert ("error", code) == (end.outcome, end.error.code)
        assert tries == len(upstream.requests)
        assert tries - 1 == len(of(events, Retry))
        assert "" == joined(events)


@pytest.mark.parametrize("kind", KINDS)
async def test_after_a_refusal_the_answer_is_as_if_nothing_had_been(kind):
    """Refused twice, then served; each try is in the stream."""
    replies = [
        Reply(instead=Refusal("rate_limit", retry_after="0")),
        Reply(instead=Cut()),
        Reply("here"),
    ]
    async with serving(kind, replies) as (_, server):
        events = await ask(server)
        assert ["here"] == texts(events)
        assert ["rate_limit", "incomplete"] == [event.error.code for event in of(events, Retry)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemini"])
async def test_a_call_with_broken_arguments_is_for_the_model_to_mend(kind):
    """The tool says what it expected; the call goes back in a form that the API takes."""
    calls = [Call("meet", '{"name":"ad'), Call("nobody", "{}"), Call("meet", '{"name":"x"}')]
    meeting = Meeting(1)
    async with serving(kind, [Reply(calls=calls), Reply("Sorry.")], tools=[tool(meeting.meet)]) as (
        upstream,
        server,
    ):
        events = await ask(server)
        assert ("success", ["Sorry."]) == (events[-1].outcome, texts(events))
        errors = {bytes(e.result).decode() for e in of(events, ToolFinished) if e.is_error}
        assert 2 == len(errors)
        assert 2 == len(upstream.requests)


@pytest.mark.parametrize("kind", KINDS)
async def test_call_ids_that_come_twice_are_kept_apart(kind):
    """Each call has its own start, and its own end."""
    same = [Call("meet", '{"name":"a"}', "call_1"), Call("meet", '{"name":"b"}', "call_1")]
    meeting = Meeting(2)
    replies = [Reply(calls=same), Reply(calls=same), Reply("Done.")]
    async with serving(kind, replies, tools=[tool(meeting.meet)]) as (_, server):
        events = await ask(server)
        assert ["Done."] == texts(events)
        started = [event.call_id for event in of(events, ToolStarted)]
        assert 4 == len(set(started)) == len(started)
        assert sorted(started) == sorted(event.call_id for event in of(events, ToolFinished))


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_unknown_upstream_is_handed_on(kind):
    """A frame that nobody here understands is an event, once, and harms nothing."""
    async with serving(kind, [Reply("abc", flood=Flood(2_000, after=2))]) as (_, server):
        events = await ask(server)
        assert ["abc"] == texts(events)
        (unknown,) = of(events, ProviderEvent)
        assert kind == unknown.provider


async def test_a_run_that_is_badly_treated_is_nobody_else_s_affair():
    """A bystander's stream goes on while others flood, break off and hang."""
    bad = [reply for reply, _ in BAD.values()]
    limits = LimitSettings(retry_delay=0.01, max_tries=1, stall=0.6, liveness=0.2)
    pieces = [f"{n} " for n in range(100)]
    async with serving("openai_chat", [Reply(pieces, gap=0.02), *bad], limits=limits) as (
        _,
        server,
    ):
        bystander = []
        async with trio.open_nursery() as nursery:

            async def stand_by():
                bystander.extend(await ask(server))

            nursery.start_soon(stand_by)
            await wait_until(lambda: len(list(server.runs)) == 1)
            for _ in bad:
                nursery.start_soon(ask, server)
        assert ["".join(pieces)] == texts(bystander)
        assert "success" == bystander[-1].outcome
        ends = sorted(
            (run.end.outcome, run.end.error.code if run.end.error else None)
            for run in server.runs
            if run.end.seq != bystander[-1].seq or run.id != bystander[-1].run_id
        )
        assert sorted((end for _, end in BAD.values()), key=str) == sorted(ends, key=str)


# Codex


@asynccontextmanager
async def with_codex(script, tmp_path, *, tools=(), **limits):
    """Serve an agent whose model is a Codex app-server that follows a script."""
    record = tmp_path / "record"
    command = codex_command({"record": str(record), **script})
    provider = make_provider("codex", command=command)
    chat = Agent.of_model("chat", "codex:", provider=provider, tools=tools)
    with trio.fail_after(PATIENCE):
        settings = Settings(limits=LimitSettings(**limits))
        async with open_server(chat, settings=settings) as server:
            async with connect(server.urls[0]) as client:
                await client.send(stream_run("nobody"))
                await client.finish()
            before = await wait_quiet(server)
            yield server, record
            assert before == await wait_quiet(server)
    for pid in (fact["pid"] for fact in recorded(record) if "pid" in fact):
        assert is_gone(pid)


def is_gone(pid):
    """Whether a process has ended; one whose parent has not heard of it yet has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def has_begun_a_turn(record):
    return record.exists() and '"turn/start"' in record.read_text()


def call(tool_name, **arguments):
    return f"[[TOOL_CALL]]{json.dumps({'name': tool_name, 'arguments': arguments})}[[/TOOL_CALL]]"


async def test_codex_runs_commands_of_its_own_and_calls_two_tools_of_ours(tmp_path):
    """Ours side by side, as with any model; its own in the stream, with what they print."""
    meeting = Meeting(2)
    turns = [
        [
            {"reasoning": ["Hm", "m."]},
            {"command": "ls", "output": ["a\n", "b\n"]},
            {"text": ["I ask. ", call("meet", name="ada"), call("meet", name="bob")]},
        ],
        [{"text": ["They ", "were here."]}],
    ]
    async with with_codex({"turns": turns}, tmp_path, tools=[tool(meeting.meet)]) as (
        server,
        record,
    ):
        events = await ask(server, "Who?")
        assert ("success", b'"They were here."') == (events[-1].outcome, bytes(events[-1].result))
        sources = sorted(event.source for event in of(events, ToolFinished))
        assert ["local", "local", "provider"] == sources
        (own,) = [event for event in of(events, ToolFinished) if event.source == "provider"]
        assert b'"a\\nb\\n"' == bytes(own.result)
        assert "Hmm." == joined(events, "reasoning")
        assert "[[" not in joined(events)
        turns = [f["received"] for f in recorded(record) if "received" in f]
        turns = [message for message in turns if message.get("method") == "turn/start"]
        assert 2 == len(turns)
        assert "ada was here" in json.dumps(turns[1])


@pytest.mark.parametrize(
    ("step", "sign"),
    [
        ([{"text": ["abc"]}, {"hang": "listening"}], b"part_delta"),
        ([{"text": ["abc"]}, {"hang": "deaf"}], b"part_delta"),
        ([{"hang": "listening"}], b"step_started"),
        ([{"spawn": True}, {"text": ["abc"]}, {"hang": "listening"}], b"part_delta"),
        ([{"approve": "rm x"}], b"input_requested"),
    ],
    ids=["mid-turn", "deaf", "before the first token", "with a child", "while it asks"],
)
@pytest.mark.parametrize("way", ["fin", "rst", "cancel"])
async def test_a_client_that_leaves_ends_codex_and_all_that_it_has_started(
    step, sign, way, tmp_path
):
    """The turn is interrupted where somebody listens; then the process group is gone."""
    async with with_codex({"turns": [step]}, tmp_path) as (server, record):
        async with connect(server.urls[0]) as client:
            body = b'{"input":"Hi.","on_disconnect":"cancel"}'
            await client.send(stream_run("chat", body))
            while sign not in client.body:
                await client.receive()
            await wait_until(lambda: has_begun_a_turn(record))
            (run,) = server.runs
            if sign == b"input_requested" and way != "cancel":
                run.cancel("disconnect")  # leaving never cancels a run that waits for a person
            match way:
                case "fin":
                    await client.leave_by_fin()
                case "rst":
                    client.leave_by_rst()
                case _:
                    run.cancel("client_cancel")
            await run.done.wait()
        assert "cancelled" == run.end.outcome
        facts = recorded(record)
        for pid in (fact["spawned"] for fact in facts if "spawned" in fact):
            assert is_gone(pid)
        methods = [fact["received"].get("method") for fact in facts if "received" in fact]
        if step == [{"text": ["abc"]}, {"hang": "listening"}]:
            assert "turn/interrupt" == methods[-1]


async def test_what_codex_wants_to_be_allowed_is_asked_of_a_person(tmp_path):
    """The question is an event; the answer goes back, and the turn goes on."""
    turns = [[{"approve": "rm x"}, {"text": ["Done."]}]]
    async with with_codex({"turns": turns}, tmp_path) as (server, _):
        async with connect(server.urls[0]) as client:
            await client.send(stream_run("chat", b'{"input":"Hi."}'))
            asked = await client.wait_for(InputRequested)
            (question,) = asked.questions
            assert "rm x" in question.prompt
            (run,) = server.runs
            run.context.answer(asked.request_id, {question.id: True})
            await client.finish()
        assert "success" == client.events[-1].outcome
        assert ["Done."] == texts(client.events)


async def test_codex_that_is_not_there_says_so(tmp_path):
    """And what to do; no try is worth another."""
    provider = make_provider("codex", command=["/nowhere/codex", "app-server"])
    chat = Agent.of_model("chat", "codex:", provider=provider)
    with trio.fail_after(PATIENCE):
        async with open_server(chat) as server:
            events = await ask(server)
    assert ("error", "not_found") == (events[-1].outcome, events[-1].error.code)
    assert "/nowhere/codex" in events[-1].error.message
