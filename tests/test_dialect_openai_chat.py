"""OpenAI's chat completions, as its own client reads them, and as the bytes that they are.

Decoder, encoder and answers are pure: they are fed requests and events. What is about connections
uses real sockets and the official `openai` client.
"""

import json
from contextlib import asynccontextmanager

import attrs
import msgspec
import openai
import pytest
import trio
from msgspec import UNSET, Raw
from msgspec.structs import replace
from raw import connect, request, wait_until

from agentsse import Agent, AgentError, tool
from agentsse.dialects import MAX_MESSAGES, AgentCard, Request, Start
from agentsse.dialects.native import NATIVE
from agentsse.dialects.openai import DONE, REFUSAL
from agentsse.dialects.openai_chat import (
    OPENAI_CHAT,
    ChatEncoder,
    answer,
    decode_completion,
    decode_model,
    decode_models,
    refuse,
)
from agentsse.errors import BadRequest
from agentsse.events import (
    NULL,
    InputReceived,
    InputRequested,
    Liveness,
    Moderation,
    Option,
    PartDelta,
    PartFinished,
    PartStarted,
    Problem,
    Question,
    Receipt,
    RunFinished,
    RunSnapshot,
    RunStarted,
    StepFinished,
    Usage,
)
from agentsse.messages import (
    AssistantMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.providers import Finish
from agentsse.testing import ScriptedProvider, ask_for, open_server, say

# The client leaves its async generators to the garbage collector when a stream ends, or breaks,
# before its connection does; Trio says so. That is its to mend.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Async generator '(openai|httpx2|httpcore2)\.:ResourceWarning"
)

PATIENCE = 20  # seconds; nothing here takes one
NOON = "2026-11-20T12:00:00.000Z"
USAGE = Usage(input_tokens=120, output_tokens=40, reasoning_tokens=9, cache_read_tokens=100)
WIRE_USAGE = {
    "prompt_tokens": 120,
    "completion_tokens": 40,
    "total_tokens": 160,
    "prompt_tokens_details": {"cached_tokens": 100},
    "completion_tokens_details": {"reasoning_tokens": 9},
}
HELLO = [{"role": "user", "content": "Hello"}]
TEXT = "It is sunny in Köln 😀."


# Events, and what becomes of them


def started(*client_tools):
    return RunStarted(
        run_id="r1", ts=NOON, agent="main", input=NULL, on_disconnect="cancel",
        client_tools=client_tools,
    )  # fmt: skip


def delta(text, kind="text"):
    return PartDelta(part_id="p1", kind=kind, delta=text)


def ended(reason, usage=None):
    return StepFinished(step_id="s1", kind="model", name="m", finish_reason=reason, usage=usage)


def finished(result=b"null", *, outcome="success", error=None, cause=None, pending=(), usage=USAGE):
    return RunFinished(
        outcome=outcome,
        usage=usage,
        pending=pending,
        receipt=Receipt(cause=cause),
        result=UNSET if result is None else Raw(result),
        error=error,
    )


def asked(*questions, request_id="q1"):
    return InputRequested(
        request_id=request_id,
        questions=questions or (Question(id="go", kind="text", prompt="Which one?"),),
    )


def call(name="look", *arguments, part_id="k1", call_id="c1", text=None):
    """A model's call of a tool, its arguments in pieces."""
    return (
        PartStarted(part_id=part_id, kind="tool_call", name=name, call_id=call_id),
        *(PartDelta(part_id=part_id, kind="tool_call", delta=piece) for piece in arguments),
        PartFinished(
            part_id=part_id, kind="tool_call", name=name, call_id=call_id,
            text="".join(arguments) if text is None else text,
        ),
    )  # fmt: skip


def begun(events):
    """The same events, behind a run's first one if that is not there."""
    return events if isinstance(events[0], RunStarted) else (started(), *events)


def encoded(*events, has_usage=False):
    """The bytes of a run's stream."""
    encoder = OPENAI_CHAT.encoder(has_usage)
    return b"".join(frame for event in begun(events) for frame in encoder.feed(event))


def read(*events, has_usage=False):
    """The same, frame by frame; the end as it is."""
    frames = encoded(*events, has_usage=has_usage).decode().split("\n\n")
    assert "" == frames.pop()
    assert all(frame.startswith("data: ") for frame in frames)
    data = [frame.removeprefix("data: ") for frame in frames]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def deltas(*events):
    """What the chunks behind the first one add, and the reason in the last one."""
    first, *chunks, end = read(*events)
    assert ({"role": "assistant", "content": ""}, "[DONE]") == (delta_of(first), end)
    assert {None} == {chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]} | {None}
    *said, nothing = (delta_of(chunk) for chunk in chunks)
    assert {} == nothing
    return said, chunks[-1]["choices"][0]["finish_reason"]


def delta_of(chunk):
    return chunk["choices"][0]["delta"]


def answered(*events):
    """The status and the body of the answer that is no stream."""
    snapshot = RunSnapshot(
        id="r1", agent="main", state="finished", on_disconnect="cancel", created=NOON, started=NOON,
        finished=NOON, thread_id=None, parent_run_id=None, outcome=None, result=NULL, error=None,
        usage=USAGE, receipt=None, events=0, questions=(),
    )  # fmt: skip
    reply = answer(snapshot, begun(events))
    assert "application/json" == reply.media_type
    return reply.status, json.loads(reply.body)


def message_of(*events):
    """The message, and the reason for its end."""
    status, body = answered(*events)
    assert 200 == status
    (choice,) = body["choices"]
    return choice["message"], choice["finish_reason"]


def test_a_stream_is_these_bytes():
    """A chunk with the role, one with text, one with the reason, and the end."""
    head = (
        b'data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":1795176000,'
        b'"model":"main","choices":['
    )
    chunk = b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]}\n\n'
    expected = [
        head + chunk % (b'{"role":"assistant","content":""}', b"null"),
        head + chunk % ('{"content":"Köln\\n"}'.encode(), b"null"),
        head + chunk % (b"{}", b'"stop"'),
        b"data: [DONE]\n\n",
    ]
    assert b"".join(expected) == encoded(delta("Köln\n"), finished())


def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for():
    """The chunks before it have none, and say so."""
    *chunks, usage, end = read(delta("a"), finished(), has_usage=True)
    assert [None, None, None] == [chunk["usage"] for chunk in chunks]
    assert ([], WIRE_USAGE, "[DONE]") == (usage["choices"], usage["usage"], end)
    assert 1 == len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, usage]})


def test_nobody_is_told_the_usage_unasked():
    """Not even that there is none."""
    *chunks, _end = read(delta("a"), ended("stop", USAGE), finished())
    assert not any("usage" in chunk for chunk in chunks)


def test_reasoning_and_refusals_have_fields_of_their_own():
    """What a model writes of a call to a tool has none, and whatever else happens has none."""
    events = (
        PartStarted(part_id="p1", kind="reasoning"),
        delta("Let me see.", "reasoning"),
        delta("{}", "tool_call"),
        delta("No", "refusal"),
        PartFinished(part_id="p1", kind="refusal", text="No"),
        Liveness(elapsed_s=1, events=1, since_last_output_s=1),
        StepFinished(step_id="s2", kind="tool_round", name="tools"),
        Moderation(violation=False),
        finished(b'"No"'),
    )
    assert ([{"reasoning_content": "Let me see."}, {"refusal": "No"}], "stop") == deltas(*events)
    message = {
        "role": "assistant",
        "content": None,
        "refusal": "No",
        "reasoning_content": "Let me see.",
    }
    assert (message, "stop") == message_of(*events)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", "stop"), ("length", "length"), ("content_filter", "content_filter"),
     ("tool_calls", "stop"), ("other", "stop"), (None, "stop")],
)  # fmt: skip
def test_the_reason_is_that_of_the_last_model_call(reason, expected):
    """Calls of tools are none to the client: it would try to make them."""
    events = (ended("length"), delta("a"), ended(reason), finished())
    assert ([{"content": "a"}], expected) == deltas(*events)
    assert expected == message_of(*events)[1]


def test_what_is_said_behind_a_model_call_ends_for_a_reason_of_its_own():
    """An agent goes on by itself where a model has stopped."""
    assert "stop" == deltas(delta("a"), ended("error"), delta("b"), finished())[1]


@pytest.mark.parametrize(
    ("result", "text"),
    [(b'"K\\u00f6ln"', "Köln"), (b'{"a": [1]}', '{"a": [1]}'), (b"0", "0")],
)
def test_who_says_nothing_has_its_result_as_the_answer(result, text):
    """A string as it is, anything else as JSON; thoughts say nothing."""
    assert ([{"content": text}], "stop") == deltas(finished(result))
    said, _ = deltas(delta("hm", "reasoning"), finished(result))
    assert {"content": text} == said[-1]
    assert text == message_of(finished(result))[0]["content"]


def test_a_result_is_not_said_behind_what_was_said():
    """It is most likely the same."""
    assert ([{"content": "a"}], "stop") == deltas(delta("a"), finished(b'"a"'))


@pytest.mark.parametrize("result", [b"null", None])
def test_no_result_is_an_empty_answer(result):
    """There is a message all the same."""
    assert ([], "stop") == deltas(finished(result))
    assert {"role": "assistant", "content": "", "refusal": None} == message_of(finished(result))[0]


@pytest.mark.parametrize(("message", "expected"), [("Not here.", "Not here."), (None, REFUSAL)])
def test_a_shield_refuses_in_its_own_words(message, expected):
    """Or in ours, where it has none."""
    events = (Moderation(violation=True, message=message), finished(b'"x"'))
    assert ([{"refusal": expected}], "content_filter") == deltas(*events)


def test_a_shield_whose_words_were_said_has_nothing_to_add():
    """The reason still tells of it."""
    events = (Moderation(violation=True, message="no"), delta("Sorry."), finished())
    assert ([{"content": "Sorry."}], "content_filter") == deltas(*events)


def failures():
    """Ends that are none of success: the event, the status, and the error."""
    oops = Problem(code="oops", message="no luck", status=502)
    error = {"message": "no luck", "type": "server_error", "param": None, "code": "oops"}
    yield finished(None, outcome="error", error=oops), 502, error
    unknown = error | {"message": "the run has failed", "code": "internal"}
    yield finished(None, outcome="error"), 500, unknown
    stopped = error | {"message": "the run was cancelled (client_cancel)", "code": "cancelled"}
    yield finished(None, outcome="cancelled", cause="client_cancel"), 499, stopped
    down = stopped | {"message": "the run was cancelled (shutdown)"}
    yield finished(None, outcome="cancelled", cause="shutdown"), 503, down
    broken = stopped | {"message": "the run was cancelled"}
    yield finished(None, outcome="interrupted"), 499, broken


@pytest.mark.parametrize(("end", "status", "error"), [*failures()])
def test_what_comes_to_nothing_ends_with_an_error_and_no_done(end, status, error):
    """What was said before it was said; without a stream it is not told."""
    *said, last = read(delta("half"), end)
    assert ["", "half"] == [delta_of(chunk)["content"] for chunk in said]
    assert {"error": error} == last
    assert (status, {"error": error}) == answered(delta("half"), end)


def test_a_model_that_stops_because_of_an_error_has_given_no_answer():
    """Though the agent has ended well."""
    *_, last = read(delta("half"), ended("error"), finished())
    assert ("provider_error", "server_error") == (last["error"]["code"], last["error"]["type"])
    assert 502 == answered(delta("half"), ended("error"), finished())[0]


def test_a_question_is_the_end_of_the_response():
    """Its options stand below it; what the model has cost so far is told."""
    question = Question(
        id="go",
        kind="choice",
        prompt="Which one?",
        options=(Option(id="a", label="The first"), Option(id="b")),
    )
    events = (delta("Hm."), ended("tool_calls", USAGE), asked(question))
    text = "\n\nWhich one?\n\n- The first\n- b"
    assert ([{"content": "Hm."}, {"content": text}], "stop") == deltas(*events)
    assert WIRE_USAGE == read(*events, has_usage=True)[-2]["usage"]
    status, body = answered(*events)
    assert (200, "Hm." + text) == (status, body["choices"][0]["message"]["content"])
    assert WIRE_USAGE == body["usage"]


def test_several_questions_are_told_apart_by_their_ids():
    """That is how their answers are, too."""
    questions = [
        Question(id=each, kind="text", prompt=f"Which {each}?") for each in ("size", "color")
    ]
    text = (
        "[size] Which size?\n\n[color] Which color?\n\n"
        "(Answer in lines, such as: [size]: your answer)"
    )
    assert ([{"content": text}], "stop") == deltas(asked(*questions))


def received(request_id="q1"):
    return InputReceived(request_id=request_id, answers=NULL)


def test_an_answer_to_a_question_goes_on_behind_it():
    """Streamed or not; and each response has the usage of its own."""
    more = Usage(input_tokens=130, output_tokens=45, reasoning_tokens=9, cache_read_tokens=100)
    events = (delta("Hm."), ended("tool_calls", USAGE), asked(), received(), delta("more"),
              finished(usage=more))  # fmt: skip
    status, body = answered(*events)
    assert (200, "more") == (status, body["choices"][0]["message"]["content"])
    assert "chatcmpl-r1-2" == body["id"]
    *_, usage, _done = read(*events, has_usage=True)
    expected = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
    assert (expected, expected) == (body["usage"], usage["usage"])


def test_questions_side_by_side_are_answered_one_by_one():
    """Behind the first one's answer comes the second one, as in the stream."""
    other = Question(id="go", kind="text", prompt="And the other?")
    events = (asked(), asked(other, request_id="q2"))
    first, _ = message_of(*events)
    second, _ = message_of(*events, received())
    third, _ = message_of(*events, received(), received("q2"), delta("Good."), finished())
    said = [message["content"] for message in (first, second, third)]
    assert ["Which one?", "And the other?", "Good."] == said


def test_a_question_that_somebody_else_has_answered_meanwhile_was_asked():
    """Whoever waited for the response is told of it, rather than of nothing."""
    assert "Which one?" == message_of(asked(), received())[0]["content"]


def test_who_watches_on_behind_a_question_reads_another_response():
    """It begins with its role, ends with its own end, and has an id of its own."""
    first, second = (
        part + DONE for part in encoded(asked(), delta("ok"), finished()).split(DONE)[:-1]
    )
    assert b"Which one?" in first
    assert second.replace(b"chatcmpl-r1-2", b"chatcmpl-r1") == encoded(delta("ok"), finished())


TOOLS = started("look", "find")


def test_calls_of_the_clients_tools_are_streamed():
    """Their names first, then their arguments as they come; what they are for is the client's."""
    events = (TOOLS, delta("Hm."), *call("look", '{"a":', "1}"),
              *call("find", "{}", part_id="k2", call_id="c2"), ended("tool_calls"),
              finished(b'"Hm."', pending=("c1", "c2")))  # fmt: skip
    said, reason = deltas(*events)
    first, second = [
        {"index": index, "id": call_id, "type": "function",
         "function": {"name": name, "arguments": ""}}
        for index, call_id, name in [(0, "c1", "look"), (1, "c2", "find")]
    ]  # fmt: skip
    pieces = [(0, '{"a":'), (0, "1}"), (1, "{}")]
    one, two, three = [{"index": i, "function": {"arguments": text}} for i, text in pieces]
    expected = [{"tool_calls": [each]} for each in (first, one, two, second, three)]
    assert ([{"content": "Hm."}, *expected], "tool_calls") == (said, reason)

    message, reason = message_of(*events)
    calls = [("c1", "look", '{"a":1}'), ("c2", "find", "{}")]
    assert ("Hm.", "tool_calls") == (message["content"], reason)
    assert calls_of(*calls) == message["tool_calls"]


def calls_of(*calls):
    """Calls as they stand in a message."""
    return [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]


def test_a_message_of_calls_alone_has_no_content():
    """Null, as the original has it; the run's result is no answer."""
    message, reason = message_of(TOOLS, *call("look", "{}"), finished(b'""', pending=("c1",)))
    assert (None, "tool_calls") == (message["content"], reason)


@pytest.mark.parametrize("pieces", [(), ("",)])
@pytest.mark.parametrize(("text", "expected"), [("", "{}"), ('{"a":1}', '{"a":1}')])
def test_arguments_that_come_all_at_once_are_told_all_the_same(pieces, text, expected):
    """And none are an empty object: clients parse them."""
    events = (TOOLS, *call("look", *pieces, text=text), finished(pending=("c1",)))
    assert calls_of(("c1", "look", expected)) == message_of(*events)[0]["tool_calls"]


def test_calls_of_the_agents_own_tools_are_not_shown():
    """Whether the client has tools as well or not."""
    events = (TOOLS, *call("mine", "{}"), ended("tool_calls"), delta("a"), finished())
    assert ([{"content": "a"}], "stop") == deltas(*events)
    assert "tool_calls" not in message_of(*events)[0]


def test_a_call_that_is_cut_off_ends_for_that_reason():
    """Its arguments may be half of what they should be."""
    events = (TOOLS, *call("look", '{"a'), ended("length"), finished(pending=("c1",)))
    assert "length" == deltas(*events)[1]


def test_what_is_to_be_called_is_told_again_behind_a_question():
    """The response that ended with the question was not the one that asked for the calls."""
    events = (TOOLS, *call("look", "{}"), *call("mine", "{}", part_id="k2", call_id="c2"),
              ended("tool_calls"), asked(), received(), *call("find", part_id="k3", call_id="c3"),
              finished(pending=("c1", "c3")))  # fmt: skip
    message, reason = message_of(*events)
    assert (calls_of(("c3", "find", "{}"), ("c1", "look", "{}")), "tool_calls") == (
        message["tool_calls"], reason,
    )  # fmt: skip
    second = encoded(*events).split(DONE)[1]
    assert [0, 0, 1, 1] == [
        call["index"]
        for frame in second.split(b"\n\n")[1:-2]
        for call in delta_of(json.loads(frame.removeprefix(b"data: ")))["tool_calls"]
    ]


def test_a_call_that_a_question_has_cut_in_two_is_told_whole():
    """In the response that asks for it; a model's own server may ask before it goes on."""
    begin, *pieces = call("look", '{"a":', "1}")
    events = (TOOLS, begin, pieces[0], asked(), received(), *pieces[1:], finished(pending=("c1",)))
    assert calls_of(("c1", "look", '{"a":1}')) == message_of(*events)[0]["tool_calls"]


def test_an_answer_is_this_object():
    """With the usage, which nobody has to ask for."""
    expected = {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "created": 1795176000,
        "model": "main",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": WIRE_USAGE,
    }
    assert (200, expected) == answered(delta("a"), delta("b"), finished(b'"ab"'))


def test_a_run_without_an_end_is_no_answer():
    """It cannot come to this; if it does, it is an error."""
    status, body = answered(delta("a"))
    assert (500, "internal") == (status, body["error"]["code"])


@pytest.mark.parametrize(
    ("status", "kind", "answered_with"),
    [(400, "invalid_request_error", 400), (401, "authentication_error", 401),
     (403, "permission_error", 403), (413, "invalid_request_error", 413),
     (429, "rate_limit_error", 429), (503, "server_error", 503), (200, "server_error", 500)],
)  # fmt: skip
def test_the_kind_of_an_error_follows_from_its_status(status, kind, answered_with):
    """A status that is none of an error is our fault."""
    reply = refuse(Problem(code="x", message="y", status=status))
    error = {"message": "y", "type": kind, "param": None, "code": "x"}
    assert (answered_with, {"error": error}) == (reply.status, json.loads(reply.body))


def test_a_run_by_itself_is_its_snapshot():
    """No route shows it."""
    assert b"{}" == OPENAI_CHAT.present(msgspec.defstruct("Shown", [])())


def test_a_watcher_of_another_protocol_gets_no_usage():
    """It has no options."""
    assert ChatEncoder(has_usage=False).has_usage == OPENAI_CHAT.encoder(None).has_usage


# Requests


def decoded(messages=HELLO, **body):
    """What a request asks for."""
    body = {"model": "main", "messages": messages, **body}
    return decode_completion(
        Request(method="POST", parameters={}, query={}, headers={}, body=json.dumps(body).encode())
    )


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def test_a_request_asks_for_a_run():
    """To be waited for, unless it says otherwise."""
    expected = Start(
        agent="main", input="Hello", delivery="wait", history=(), if_busy="supersede",
        options=False, reply=answer,
    )  # fmt: skip
    assert expected == decoded()
    neutral = {
        "n": 1, "stop": [], "tools": [], "functions": [], "tool_choice": "auto", "audio": None,
        "response_format": {"type": "text"}, "modalities": ["text"], "logprobs": False,
        "top_logprobs": 0, "logit_bias": {}, "max_tokens": None, "max_completion_tokens": 9,
        "parallel_tool_calls": False, "reasoning_effort": "high", "store": False, "metadata": None,
        "stream_options": None, "temperature": 0.5, "function_call": "auto", "anything": 1,
    }  # fmt: skip
    assert expected == decoded(stream=False, **neutral)
    assert replace(expected, delivery="stream") == decoded(stream=True, stream_options=None)


@pytest.mark.parametrize(("stream", "delivery"), [(True, "stream"), (False, "wait")])
def test_what_the_client_accepts_says_nothing(stream, delivery):
    """Its SDKs accept JSON, and mean a stream."""
    body = json.dumps({"model": "main", "messages": HELLO, "stream": stream}).encode()
    headers = {"accept": "application/json" if stream else "text/event-stream"}
    wish = Request(method="POST", parameters={}, query={}, headers=headers, body=body)
    assert delivery == decode_completion(wish).delivery


@pytest.mark.parametrize("include_usage", [True, False])
def test_the_usage_is_an_option_of_the_encoder(include_usage):
    """It is all that makes streams differ."""
    options = {"include_usage": include_usage}
    assert include_usage is decoded(stream=True, stream_options=options).options


def test_what_the_client_says_of_itself_is_the_runs_metadata():
    """Under the names it has in the request."""
    wish = decoded(user="u1", metadata={"a": "b"})
    assert {"user": "u1", "metadata": {"a": "b"}} == wish.metadata


def test_the_systems_messages_at_the_beginning_are_the_instructions():
    """By either name that the role has had."""
    wish = decoded([message("system", "Be brief."), message("developer", "Be kind."), *HELLO])
    assert ("Be brief.\n\nBe kind.", "Hello") == (wish.instructions, wish.input)


def test_what_was_said_before_is_the_history():
    """Message by message; of those that say nothing there is none."""
    wish = decoded(
        [
            message("system", "Be brief."),
            message("user", "Who are you?", name="Ada"),
            message("assistant", None),
            message("assistant", None, refusal="I won't say."),
            message("assistant", [{"type": "refusal", "refusal": "No."}]),
            message("user", ""),
            message("system", "Be kind."),
            *HELLO,
        ]
    )
    expected = (
        UserMessage("Who are you?"),
        AssistantMessage("I won't say."),
        AssistantMessage("No."),
        SystemMessage("Be kind."),
    )
    assert ("Be brief.", expected, "Hello") == (wish.instructions, wish.history, wish.input)


ASKED = message("assistant", None, tool_calls=calls_of(("c1", "look", "{}"), ("c2", "find", "")))
CALLED = AssistantMessage("", (ToolCall("c1", "look", "{}"), ToolCall("c2", "find", "")))
ANSWERS = [
    message("tool", "süß", tool_call_id="c1"),
    message("tool", [{"type": "text", "text": '{"a":1}'}], tool_call_id="c2"),
]
ANSWERED = (ToolMessage("c1", "look", '"süß"'), ToolMessage("c2", "find", '"{\\"a\\":1}"'))


def test_what_tools_have_answered_goes_to_the_agent():
    """All that stand at the end; the input shows them, and what is before is the history."""
    wish = decoded([*HELLO, ASKED, *ANSWERS])
    assert ((UserMessage("Hello"), CALLED), ANSWERED) == (wish.history, wish.said)
    expected = [
        {"call_id": "c1", "name": "look", "content": "süß"},
        {"call_id": "c2", "name": "find", "content": '{"a":1}'},
    ]
    assert expected == wish.input


def test_what_tools_have_answered_before_is_history():
    """What the user says behind it is the input."""
    wish = decoded([*HELLO, ASKED, *ANSWERS, message("user", "Go on.")])
    assert (UserMessage("Hello"), CALLED, *ANSWERED) == wish.history
    assert (None, "Go on.") == (wish.said, wish.input)


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Look.", "parameters": {"type": "object"},
                 "strict": True},
}  # fmt: skip


@pytest.mark.parametrize("choice", [None, "auto"])
def test_the_clients_tools_may_be_called(choice):
    """Without a schema they take nothing."""
    clock = {"type": "function", "function": {"name": "clock"}}
    expected = (
        ToolSpec("weather", "Look.", {"type": "object"}),
        ToolSpec("clock", "", {"type": "object", "properties": {}}),
    )
    assert expected == decoded(tools=[WEATHER, clock], tool_choice=choice).tools


def test_none_of_them_is_called_where_the_client_says_so():
    """The agent's own are its own."""
    wish = decoded(tools=[WEATHER], tool_choice="none")
    assert ((), True) == (wish.tools, wish.uses_tools)


def test_a_thread_is_named_in_the_metadata():
    """What the user says then answers a run that waits there; what tools say does not."""
    wish = decoded(metadata={"thread_id": "t1"})
    assert ("t1", True, ()) == (wish.thread_id, wish.resumes, wish.history)
    wish = decoded([*HELLO, ASKED, *ANSWERS], metadata={"thread_id": "t1"})
    assert ("t1", False) == (wish.thread_id, wish.resumes)
    wish = decoded(metadata={"thread": "t1"})
    assert (None, False) == (wish.thread_id, wish.resumes)


CARDS = [
    AgentCard(name=name, description="", model=model, on_disconnect=None, tools=())
    for name, model in [("main", None), ("other", "scripted:m")]
]


def test_agents_are_models():
    """As many as there are, at once."""
    reply = decode_models(Request(method="GET", parameters={}, query={}, headers={})).reply(CARDS)
    models = [
        {"id": name, "object": "model", "created": 0, "owned_by": "agentsse"}
        for name in ("main", "other")
    ]
    assert {"object": "list", "data": models} == json.loads(reply.body)


@pytest.mark.parametrize("name", ["main", "scripted:m"])
def test_an_agent_is_a_model(name):
    """By its name, or by what it runs on."""
    assert (200, name) == ((reply := shown(name)).status, json.loads(reply.body)["id"])


def shown(model):
    """What is answered to who wants to see a model."""
    parameters = {"model": model}
    wish = decode_model(Request(method="GET", parameters=parameters, query={}, headers={}))
    return wish.reply(CARDS)


def test_a_model_that_there_is_not_has_an_error_of_its_own():
    """The same that a completion with it has."""
    error = json.loads(shown("nobody").body)["error"]
    assert (404, "model_not_found", "model") == (
        shown("nobody").status, error["code"], error["param"],
    )  # fmt: skip
    assert "expected one of the agents main, other" in error["message"]


def test_parts_of_text_are_lines_of_one_text():
    """As other servers have it."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "a\nb" == decoded([message("user", parts)]).input


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\]: .* of the type 'function'; leave it"),
        ({"tools": [{"type": "custom", "custom": {}}]}, r"tools\[0\]: .* of the type 'custom'"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "to complete a chat"),
        ({"tool_choice": "required"}, "tool_choice: not available here: the model chooses"),
        ({"tool_choice": {"type": "function"}}, "tool_choice: not available"),
        ({"functions": [{}]}, "functions: not available"),
        ({"n": 2}, "n: not available here: a run has one answer"),
        ({"modalities": ["text", "audio"]}, "modalities: not available"),
        ({"audio": {"voice": "x"}}, "audio: not available"),
        ({"logprobs": True}, "logprobs: not available"),
        ({"top_logprobs": 2}, "top_logprobs: not available"),
        ({"response_format": {"type": "json_object"}}, "response_format: not available"),
        ({"stop": ["\n"]}, "stop: not available"),
        ({"web_search_options": {}}, "web_search_options: not available"),
        ({"messages": []}, "expected a JSON object to complete a chat"),
        ({"model": ""}, "expected a JSON object to complete a chat"),
        ({"metadata": {"thread_id": 5}}, "metadata.thread_id: expected a string, got 5"),
        ({"metadata": {"thread_id": "a/b"}}, "metadata.thread_id: expected 1 to 200 printable"),
        ({"messages": [message("assistant", "a")]}, "expected the last one to be the user's"),
        ({"messages": [message("system", "a")]}, "expected the last one to be the user's"),
        ({"messages": [message("tool", "a"), *HELLO]}, r"\[0\].tool_call_id: expected the id of"),
        ({"messages": [ASKED, message("tool", "a", tool_call_id="c9")]}, "before it, got 'c9'"),
        ({"messages": [message("assistant", None, tool_calls=[{}]), *HELLO]}, "complete a chat"),
        ({"messages": [message("assistant", None, tool_calls=[{"id": "c", "type": "custom"}]),
                       *HELLO]}, r"messages\[0\]\.tool_calls\[0\]: .* of the type 'custom'"),
        ({"messages": [message("assistant", "", function_call={"name": "x"}), *HELLO]}, "older"),
        ({"messages": [message("function", "a"), *HELLO]}, "the older form of 'functions'"),
        ({"messages": [message("user", [{"type": "image_url", "image_url": {}}])]},
         r"messages\[0\]\.content\[0\]: expected a part of the type 'text', got 'image_url'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_in_clear_words(wish, said):
    """Rather than left out of the answer in silence."""
    with pytest.raises(BadRequest, match=said):
        decoded(**wish)


def test_a_conversation_has_an_end():
    """Neither more messages nor more parts of one are read than do no harm to other requests."""
    said = MAX_MESSAGES * HELLO
    assert MAX_MESSAGES - 1 == len(decoded(said).history)
    parts = [{"type": "text", "text": "a"}] * (MAX_MESSAGES + 1)
    for too_many in (said + HELLO, [message("user", parts)]):
        with pytest.raises(BadRequest, match=f"to complete a chat .* length <= {MAX_MESSAGES}"):
            decoded(too_many)


# Real sockets, and the official client


@attrs.frozen
class Site:
    """A server, and OpenAI's client of it."""

    server: object
    client: openai.AsyncOpenAI

    async def ask(self, messages=HELLO, model="main", **body):
        """Create a completion."""
        return await self.client.chat.completions.create(model=model, messages=messages, **body)

    async def stream(self, **body):
        """All chunks of a stream."""
        return [chunk async for chunk in await self.ask(stream=True, **body)]

    async def post(self, **body):
        """The bytes of a response."""
        body = json.dumps({"model": "main", "messages": HELLO, **body}).encode()
        async with connect(self.server.urls[0], is_native=False) as raw:
            await raw.send(request("POST", "/v1/chat/completions", body))
            return raw, await raw.finish()


@asynccontextmanager
async def site(*agents):
    """Serve agents, within the time of a test."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, OPENAI_CHAT)) as server,
            openai.AsyncOpenAI(
                base_url=f"{server.urls[0]}/v1", api_key="key", max_retries=0
            ) as client,
        ):
            yield Site(server, client)


def model(*script, name="main", **settings):
    provider = ScriptedProvider(script)
    return provider, Agent.of_model(name, "scripted:m", provider=provider, **settings)


def thinking(text):
    """The lines of a model that thinks, says a text in pieces, and counts."""
    return [
        PartStarted(part_id="r", kind="reasoning"),
        PartDelta(part_id="r", kind="reasoning", delta="Let me see."),
        PartFinished(part_id="r", kind="reasoning", text="Let me see."),
        PartStarted(part_id="t", kind="text"),
        *(PartDelta(part_id="t", kind="text", delta=letter) for letter in text),
        PartFinished(part_id="t", kind="text", text=text),
        Finish("stop", USAGE),
    ]


def text_of(chunks):
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)


@pytest.mark.parametrize("include_usage", [True, False])
async def test_the_client_reads_a_stream(include_usage):
    """Text, one id, the reason, and the usage where it is asked for; thoughts do no harm."""
    _, agent = model(thinking(TEXT))
    async with site(agent) as one:
        chunks = await one.stream(stream_options={"include_usage": include_usage})
    assert TEXT == text_of(chunks)
    thoughts = [getattr(c.delta, "reasoning_content", None) for k in chunks for c in k.choices]
    assert "Let me see." == "".join(each for each in thoughts if each)
    assert {"main"} == {chunk.model for chunk in chunks}
    (run,) = one.server.runs
    assert {f"chatcmpl-{run.id}"} == {chunk.id for chunk in chunks}
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert ["stop"] == [reason for reason in reasons if reason]
    usages = [chunk.usage.total_tokens for chunk in chunks if chunk.usage]
    assert ([160] if include_usage else []) == usages


async def test_the_clients_helper_puts_a_completion_together():
    """It checks the order of what comes."""
    _, agent = model(thinking(TEXT))
    async with (
        site(agent) as one,
        one.client.chat.completions.stream(
            model="main", messages=HELLO, stream_options={"include_usage": True}
        ) as stream,
    ):
        completion = await stream.get_final_completion()
    (choice,) = completion.choices
    assert (TEXT, "stop") == (choice.message.content, choice.finish_reason)
    assert 9 == completion.usage.completion_tokens_details.reasoning_tokens


async def test_the_client_reads_an_answer():
    """The agent is found by its model as well, and hears all that was said."""
    provider, agent = model(thinking(TEXT), instructions="Be nobody.")
    messages = [message("system", "Be brief."), message("user", "A?"), message("assistant", "B."),
                *HELLO]  # fmt: skip
    async with site(agent) as one:
        completion = await one.ask(messages, model="scripted:m")
    (choice,) = completion.choices
    assert (TEXT, "stop") == (choice.message.content, choice.finish_reason)
    assert ("main", 160) == (completion.model, completion.usage.total_tokens)
    expected = (
        SystemMessage("Be brief."),
        UserMessage("A?"),
        AssistantMessage("B."),
        UserMessage("Hello"),
    )
    assert expected == provider.prompts[0].messages


async def test_tools_of_the_agent_are_run_and_not_shown():
    """The client sees one message."""

    @tool
    async def look() -> str:
        """Look."""
        await trio.lowlevel.checkpoint()
        return "sunny"

    _, agent = model(ask_for(("look", "{}")), say("Sunny."), tools=[look])
    async with site(agent) as one:
        chunks = await one.stream()
    assert "Sunny." == text_of(chunks)
    assert not [c for chunk in chunks for c in chunk.choices if c.delta.tool_calls]
    assert "stop" == chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize("stream", [True, False])
async def test_an_unknown_model_is_not_found(stream):
    """The client raises it as such, with OpenAI's code for it."""
    _, agent = model()
    async with site(agent) as one:
        with pytest.raises(openai.NotFoundError, match="expected one of the agents main") as caught:
            await one.ask(model="nobody", stream=stream)
    assert ("model_not_found", "model") == (caught.value.code, caught.value.param)


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_not_there_is_a_bad_request(stream):
    """Before any stream has begun."""
    _, agent = model()
    async with site(agent) as one:
        with pytest.raises(openai.BadRequestError, match="n: not available here") as caught:
            await one.ask(n=2, stream=stream)
    assert ("invalid_request_error", "bad_request") == (caught.value.type, caught.value.code)


async def failing(run, input):
    """Say something, and fail."""
    await trio.lowlevel.checkpoint()
    raise AgentError("no luck", code="mine", status=422)


async def test_an_error_in_the_middle_is_raised():
    """With the agent's own words; what came before it has come."""
    _, agent = model([*say("half")[:2], AgentError("no luck", code="mine", status=422)])
    chunks = []
    async with site(agent) as one:
        with pytest.raises(openai.APIError, match="no luck") as caught:
            chunks += [chunk async for chunk in await one.ask(stream=True)]
    assert "mine" == caught.value.code


async def test_an_error_without_a_stream_is_a_status():
    """That of the error, in OpenAI's form."""
    async with site(Agent("main", failing)) as one:
        with pytest.raises(openai.UnprocessableEntityError, match="no luck") as caught:
            await one.ask()
    assert ("invalid_request_error", "mine") == (caught.value.type, caught.value.code)


async def test_a_run_that_has_failed_is_not_begun_again_by_the_client():
    """It may have done something already; the SDKs retry 5xx of their own accord."""
    runs = []

    async def breaking(run, _input):
        runs.append(run.id)
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async with site(Agent("main", breaking)) as one:
        with pytest.raises(openai.InternalServerError) as caught:
            await one.client.with_options(max_retries=2).chat.completions.create(
                model="main", messages=[{"role": "user", "content": "hi"}]
            )
    assert "false" == caught.value.response.headers["x-should-retry"]
    assert 1 == len(runs)


async def test_done_is_the_last_of_a_success():
    """Without an event's name, and without ids."""
    _, agent = model(say(TEXT))
    async with site(agent) as one:
        raw, body = await one.post(stream=True)
    assert "text/event-stream; charset=utf-8" == raw.header("content-type")
    assert (True, 1) == (body.endswith(DONE), body.count(DONE))
    assert {b"data"} == {line.partition(b":")[0] for line in body.splitlines() if line}
    assert TEXT.encode() in body


async def test_a_failure_has_no_done():
    """Its error is the last that comes, and the response is whole."""
    async with site(Agent("main", failing)) as one:
        raw, body = await one.post(stream=True)
    assert (200, True) == (raw.status, raw.complete)
    assert b"[DONE]" not in body
    last = json.loads(body.split(b"\n\n")[-2].removeprefix(b"data: "))
    assert "no luck" == last["error"]["message"]


async def asker(run, input):
    """Ask a person."""
    return await run.ask("Which one?")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_question_is_the_answer(stream):
    """The response ends well, and the run waits."""
    async with site(Agent("main", asker)) as one:
        if stream:
            text = text_of(await one.stream())
        else:
            text = (await one.ask()).choices[0].message.content
        (run,) = one.server.runs
        assert ("Which one?", "waiting") == (text, run.state)


async def test_a_run_that_is_cancelled_is_no_answer():
    """The client does not try it again: somebody wanted its end."""
    async with site(Agent("main", asleep := Sleeper())) as one, trio.open_nursery() as nursery:

        async def ask():
            with pytest.raises(openai.APIStatusError, match="cancelled") as caught:
                await one.ask()
            assert 499 == caught.value.status_code

        nursery.start_soon(ask)
        await asleep.begun.wait()
        (run,) = one.server.runs
        run.cancel("client_cancel")


@attrs.frozen(eq=False)
class Sleeper:
    """An agent that never ends."""

    begun: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, _run, _input):
        """Sleep."""
        self.begun.set()
        await trio.sleep_forever()


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_has_cancelled_the_run(stream):
    """Nobody else would read it."""
    async with site(Agent("main", asleep := Sleeper())) as one:
        body = json.dumps({"model": "main", "messages": HELLO, "stream": stream}).encode()
        async with connect(one.server.urls[0], is_native=False) as raw:
            await raw.send(request("POST", "/v1/chat/completions", body))
            await asleep.begun.wait()
            await raw.leave_by_fin()
        (run,) = one.server.runs
        await run.done.wait()
    assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)


async def test_the_client_leaves_a_stream_by_closing_it():
    """As a page's Stop does."""
    _, agent = model([*say("half")[:2], 3600.0])
    async with site(agent) as one:
        stream = await one.ask(stream=True)
        await anext(aiter(stream))
        await stream.close()
        (run,) = one.server.runs
        await wait_until(run.done.is_set)
    assert "cancelled" == run.end.outcome
