"""OpenAI's Responses API as the bytes that it is, and as its own types for Python have it.

Decoder, encoder and answers are pure: they are fed requests and events. What only a connection can
show is shown with a raw client; the official clients are in test_openai_responses_clients.py.
"""

import functools
import json
from contextlib import asynccontextmanager

import attrs
import msgspec
import pydantic
import pytest
import trio
from msgspec import UNSET, Raw
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from raw import connect, request, wait_until

from agentsse import Agent
from agentsse.dialects import MAX_MESSAGES, Request, Show, Start, Watch
from agentsse.dialects.native import NATIVE
from agentsse.dialects.openai import DONE, REFUSAL
from agentsse.dialects.openai_responses import (
    OPENAI_RESPONSES,
    acknowledge,
    answer,
    find_place,
    list_input,
    read_response_id,
    refuse,
    response_id,
    show,
)
from agentsse.errors import BadRequest, NotFound
from agentsse.events import (
    NULL,
    InputReceived,
    InputRequested,
    InputWithdrawn,
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
    ToolFinished,
    ToolStarted,
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
from agentsse.testing import open_server

PATIENCE = 20  # seconds; nothing here takes one
NOON = "2026-11-20T12:00:00.000Z"
LATER = "2026-11-20T12:00:05.900Z"
USAGE = Usage(input_tokens=120, output_tokens=40, reasoning_tokens=9, cache_read_tokens=100)
WIRE_USAGE = {
    "input_tokens": 120,
    "input_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 0},
    "output_tokens": 40,
    "output_tokens_details": {"reasoning_tokens": 9},
    "total_tokens": 160,
}
FULL = {
    "id": "resp_r1", "object": "response", "created_at": 1795176000, "completed_at": None,
    "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "model": "main",
    "output": [], "parallel_tool_calls": True, "previous_response_id": None,
    "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None, "service_tier": "default", "store": True, "temperature": 1.0,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0,
    "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "truncation": "disabled",
    "usage": None, "user": None, "metadata": {},
}  # fmt: skip


# Events, and what becomes of them -----------------------------------------------------------------


def started(*client_tools, policy="cancel"):
    return RunStarted(
        run_id="r1", ts=NOON, agent="main", input=NULL, on_disconnect=policy,
        client_tools=client_tools,
    )  # fmt: skip


def delta(text, kind="text", part_id="p1"):
    return PartDelta(ts=NOON, part_id=part_id, kind=kind, delta=text)


def whole(text, kind="text", part_id="p1", **more):
    return PartFinished(ts=NOON, part_id=part_id, kind=kind, text=text, **more)


def spoken(text, kind="text", part_id="p1"):
    return (
        PartStarted(part_id=part_id, kind=kind),
        delta(text, kind, part_id),
        whole(text, kind, part_id),
    )


def call(name="look", *arguments, part_id="k1", call_id="c1"):
    return (
        PartStarted(ts=NOON, part_id=part_id, kind="tool_call", name=name, call_id=call_id),
        *(delta(piece, "tool_call", part_id) for piece in arguments),
        whole("".join(arguments), "tool_call", part_id, name=name, call_id=call_id),
    )


def used(name="look", *, call_id="c1", arguments=b'{"x": 1}'):
    return ToolStarted(ts=NOON, call_id=call_id, name=name, arguments=Raw(arguments))


def returned(result=b'"sunny"', *, name="look", call_id="c1", is_error=False):
    return ToolFinished(
        ts=NOON, call_id=call_id, name=name, result=Raw(result), is_error=is_error, source="local"
    )


def ended(reason, usage=None):
    return StepFinished(step_id="s1", kind="model", name="m", finish_reason=reason, usage=usage)


def finished(result=b"null", *, outcome="success", error=None, cause=None, pending=()):
    return RunFinished(
        ts=LATER,
        outcome=outcome,
        usage=USAGE,
        receipt=Receipt(cause=cause),
        result=UNSET if result is None else Raw(result),
        error=error,
        pending=pending,
    )


def asked(prompt="Which one?", *, request_id="q1", options=()):
    question = Question(id="go", kind="text", prompt=prompt, options=options)
    return InputRequested(ts=LATER, request_id=request_id, questions=(question,))


def received(request_id="q1", answers=b'{"go":"blue"}'):
    return InputReceived(ts=NOON, request_id=request_id, answers=Raw(answers))


def encoded(*events, options=None):
    """The bytes of a run's stream."""
    encoder = OPENAI_RESPONSES.encoder(options)
    return b"".join(frame for event in events for frame in encoder.feed(event))


def read(*events, options=None, begin=None):
    """The same, frame by frame; the end as it is. Each is what the client's own types have it."""
    frames = encoded(begin or started(), *events, options=options).decode().split("\n\n")
    assert "" == frames.pop()
    read, number = [], 0
    for frame in frames:
        if frame == "data: [DONE]":
            number = 0
            read.append("[DONE]")
            continue
        name, data = frame.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert f"event: {value['type']}" == name
        assert number == value["sequence_number"]
        number += 1
        check(ResponseStreamEvent, value)
        read.append(value)
    return read


def check(shape, value):
    """See that a value is what a type of the client's says: all of it, and no guess."""
    told = json.loads(json.dumps(value))
    for each in (told, told.get("response") or {}):
        if each.get("error"):
            each["error"]["code"] = "server_error"  # the one of its codes that says nothing
    adapter(shape).validate_python(told)


@functools.cache
def adapter(shape):
    """What checks values of a type; it takes long to make."""
    return pydantic.TypeAdapter(shape)


def types(frames):
    """What there is in a stream, in short."""
    return [f if f == "[DONE]" else f["type"].removeprefix("response.") for f in frames]


def final(*events, **more):
    """The response at the end of a stream, which is well ended."""
    *_, last, end = read(*events, **more)
    assert "[DONE]" == end
    return last["response"]


def snapshot(*, state="finished", input=b'"Hello"', metadata=None):
    return RunSnapshot(
        id="r1", agent="main", state=state, on_disconnect="cancel", created=NOON, started=NOON,
        finished=NOON, thread_id=None, parent_run_id=None, outcome=None, result=NULL, error=None,
        usage=USAGE, receipt=None, events=0, questions=(),
        input=UNSET if input is None else Raw(input),
        metadata=UNSET if metadata is None else Raw(json.dumps(metadata).encode()),
    )  # fmt: skip


def shown(number, *events, **more):
    """A response as it stands."""
    reply = show(number, snapshot(**more), events)
    assert (200, "application/json") == (reply.status, reply.media_type)
    value = json.loads(reply.body)
    check(Response, value)
    return value


def message(id, text, status="completed", part="output_text"):
    """An item of the output."""
    content = {"type": part, "text": text, "annotations": [], "logprobs": []}
    if part == "refusal":
        content = {"type": part, "refusal": text}
    return {
        "id": id, "status": status, "type": "message", "role": "assistant", "content": [content]
    }  # fmt: skip


# A text -------------------------------------------------------------------------------------------


def test_a_stream_is_these_events():
    """Each with its type as its name, and a number; the response whole, or as whole as it is."""
    item = {"item_id": "msg_r1-1", "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
    new = message("msg_r1-1", "", "in_progress") | {"content": []}
    done = message("msg_r1-1", "Köln\n")
    over = {"status": "completed", "completed_at": 1795176005, "usage": WIRE_USAGE}
    expected = [
        ("response.created", {"response": FULL}),
        ("response.in_progress", {"response": FULL}),
        ("response.output_item.added", {"output_index": 0, "item": new}),
        ("response.content_part.added", {**item, "part": empty}),
        ("response.output_text.delta", {**item, "logprobs": [], "delta": "Kö"}),
        ("response.output_text.delta", {**item, "logprobs": [], "delta": "ln\n"}),
        ("response.output_text.done", {**item, "logprobs": [], "text": "Köln\n"}),
        ("response.content_part.done", {**item, "part": empty | {"text": "Köln\n"}}),
        ("response.output_item.done", {"output_index": 0, "item": done}),
        ("response.completed", {"response": FULL | over | {"output": [done]}}),
    ]
    frames = read(
        PartStarted(part_id="p1", kind="text"), delta("Kö"), delta(""), delta("ln\n"),
        whole("Köln\n"), Liveness(elapsed_s=1, events=1, since_last_output_s=1),
        finished(b'"K"'),
    )  # fmt: skip
    assert [
        *({"type": name, "sequence_number": n, **f} for n, (name, f) in enumerate(expected)),
        "[DONE]",
    ] == frames


def test_a_stream_is_these_bytes():
    """Lines end with LF alone, there is no id, and what looks like a pattern is none."""
    run = [attrs_free(started(), run_id="50%b"), delta("1 %d\n")]
    frame = (
        b"event: response.output_text.delta\n"
        b'data: {"type":"response.output_text.delta","item_id":"msg_50%b-1","output_index":0,'
        b'"content_index":0,"logprobs":[],"delta":"1 %d\\n","sequence_number":4}\n\n'
    )
    data = encoded(*run)
    assert data.endswith(frame)
    assert (0, 0) == (data.count(b"\r"), data.count(b"\nid:"))


def attrs_free(event, **changes):
    """The event with other fields."""
    return msgspec.structs.replace(event, **changes)


def test_a_part_that_comes_all_at_once_is_told_in_pieces_all_the_same():
    """There are clients that read nothing but deltas."""
    frames = read(whole("all"), finished())
    assert "output_text.delta" in types(frames)
    assert [message("msg_r1-1", "all")] == frames[-2]["response"]["output"]


def test_a_part_of_nothing_is_no_item():
    """As where a model thinks, and does not say what."""
    events = (PartStarted(part_id="p1", kind="reasoning"), whole("", "reasoning"), finished())
    assert ["created", "in_progress", "completed", "[DONE]"] == types(read(*events))


def test_reasoning_and_refusals_are_items_of_their_own():
    """With the names that they have."""
    frames = read(*spoken("Let me see.", "reasoning"), *spoken("No.", "refusal", "p2"), finished())
    assert [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "refusal.delta", "refusal.done",
        "content_part.done", "output_item.done",
        "completed", "[DONE]",
    ] == types(frames)  # fmt: skip
    thought = {
        "id": "rs_r1-1", "status": "completed", "type": "reasoning", "summary": [],
        "content": [{"type": "reasoning_text", "text": "Let me see."}],
    }  # fmt: skip
    refusal = message("msg_r1-2", "No.", part="refusal")
    assert [thought, refusal] == frames[-2]["response"]["output"]
    assert "No." == frames[-5]["refusal"]


def test_parts_may_come_side_by_side():
    """Each has its place in the output from its beginning on."""
    events = [delta("a"), delta("b", part_id="p2"), delta("c"), whole("b", part_id="p2"),
              whole("ac"), finished()]  # fmt: skip
    frames = read(*events)
    places = [f["output_index"] for f in frames[:-1] if f["type"] == "response.output_text.delta"]
    assert [0, 1, 0] == places
    assert [message("msg_r1-1", "ac"), message("msg_r1-2", "b")] == final(*events)["output"]


@pytest.mark.parametrize(
    ("result", "text"),
    [(b'"K\\u00f6ln"', "Köln"), (b'{"a": [1]}', '{"a": [1]}'), (b"0", "0")],
)
def test_who_says_nothing_has_its_result_as_the_message(result, text):
    """A string as it is, anything else as JSON; thoughts say nothing."""
    assert [message("msg_r1-1", text)] == final(finished(result))["output"]
    thought, said = final(*spoken("hm", "reasoning"), finished(result))["output"]
    assert ("reasoning", message("msg_r1-2", text)) == (thought["type"], said)


@pytest.mark.parametrize("result", [b"null", None, b'""'])
def test_no_result_is_an_empty_output(result):
    """The response is complete all the same."""
    response = final(finished(result))
    assert ("completed", []) == (response["status"], response["output"])


# Ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "details"),
    [
        ("length", {"reason": "max_output_tokens"}),
        ("content_filter", {"reason": "content_filter"}),
        ("stop", None),
        ("tool_calls", None),
        (None, None),
    ],
)
def test_an_end_before_the_end_is_incomplete(reason, details):
    """For the reason of the last model call."""
    response = final(ended("length"), *spoken("a"), ended(reason), finished())
    assert ("incomplete" if details else "completed", details) == (
        response["status"],
        response["incomplete_details"],
    )
    assert (None if details else 1795176005) == response["completed_at"]


def test_what_is_said_behind_a_model_call_ends_for_a_reason_of_its_own():
    """An agent goes on by itself where a model has stopped."""
    assert "completed" == final(ended("error"), *spoken("b"), finished())["status"]


def test_a_model_that_stops_because_of_an_error_has_given_no_response():
    """Though the agent has returned."""
    response = final(*spoken("a"), ended("error"), finished())
    assert ("failed", "provider_error") == (response["status"], response["error"]["code"])


@pytest.mark.parametrize(("words", "expected"), [("Not here.", "Not here."), (None, REFUSAL)])
def test_a_shield_refuses_in_its_own_words(words, expected):
    """Or in ours, where it has none."""
    response = final(Moderation(violation=True, message=words), finished(b'"x"'))
    assert [message("msg_r1-1", expected, part="refusal")] == response["output"]
    assert {"reason": "content_filter"} == response["incomplete_details"]


def test_a_shield_whose_words_were_said_has_nothing_to_add():
    """The reason still tells of it; one that found nothing has none."""
    events = (Moderation(violation=True, message="no"), *spoken("Sorry."), finished())
    response = final(*events)
    assert ([message("msg_r1-1", "Sorry.")], "incomplete") == (
        response["output"],
        response["status"],
    )
    assert "completed" == final(Moderation(violation=False), *spoken("a"), finished())["status"]


def failures():
    """Ends that are none of success: the event, the status without a stream, and the error."""
    oops = Problem(code="oops", message="no luck", status=502)
    yield finished(None, outcome="error", error=oops), 502, ("failed", "oops", "no luck")
    unknown = ("failed", "internal", "the run has failed")
    yield finished(None, outcome="error"), 500, unknown
    late = Problem(code="limit", message="full", status=99)
    yield finished(None, outcome="error", error=late), 500, ("failed", "limit", "full")
    stop = ("cancelled", "cancelled", "the run was cancelled (disconnect)")
    yield finished(None, outcome="cancelled", cause="disconnect"), 499, stop
    yield finished(None, outcome="interrupted"), 499, (*stop[:2], "the run was cancelled")
    down = (*stop[:2], "the run was cancelled (shutdown)")
    yield finished(None, outcome="cancelled", cause="shutdown"), 503, down


@pytest.mark.parametrize(("end", "status", "expected"), [*failures()])
def test_what_comes_to_nothing_is_a_failed_response(end, status, expected):
    """One that was cancelled has no event of its own. Without a stream it is an error."""
    events = (*spoken("half"), end)
    response = final(*events)
    assert expected == (
        response["status"],
        response["error"]["code"],
        response["error"]["message"],
    )
    assert [message("msg_r1-1", "half")] == response["output"]
    assert response == shown(1, started(), *events)
    reply = answer(snapshot(), (started(), *events))
    assert (status, "false") == (reply.status, reply.headers["x-should-retry"])
    assert expected[1:] == tuple(json.loads(reply.body)["error"][n] for n in ("code", "message"))


def test_what_was_left_open_is_incomplete():
    """It is closed before the end all the same."""
    frames = read(delta("half"), finished(None, outcome="cancelled"))
    assert ["output_text.done", "content_part.done", "output_item.done", "failed", "[DONE]"] == (
        types(frames)[-5:]
    )
    assert [message("msg_r1-1", "half", "incomplete")] == frames[-2]["response"]["output"]


# Tools --------------------------------------------------------------------------------------------


def test_calls_of_the_clients_tools_are_streamed():
    """The client is to make them, so that the response is complete with them."""
    events = (*call("look", '{"x"', ":1}"), finished(b'""', pending=("c1",)))
    frames = read(*events, begin=started("look"))
    assert [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed", "[DONE]",
    ] == types(frames)  # fmt: skip
    place = {"item_id": "fc_r1-1", "output_index": 0}
    assert place | {"arguments": '{"x":1}'} == {
        name: frames[5][name] for name in ("item_id", "output_index", "arguments")
    }
    item = {
        "id": "fc_r1-1", "status": "completed", "type": "function_call", "call_id": "c1",
        "name": "look", "arguments": '{"x":1}',
    }  # fmt: skip
    assert [item] == frames[-2]["response"]["output"]
    assert item | {"status": "in_progress", "arguments": ""} == frames[2]["item"]


def test_a_call_without_arguments_has_an_empty_object():
    """And one without an id has that of its part."""
    events = (*call("look", call_id=None), finished())
    (item,) = final(*events, begin=started("look"))["output"]
    assert ("{}", "k1") == (item["arguments"], item["call_id"])


def test_a_call_that_comes_all_at_once_is_told_all_the_same():
    """Its beginning was in an earlier response, or it never had one."""
    frames = read(call("look", "{}")[-1], finished(), begin=started("look"))
    assert "function_call_arguments.delta" in types(frames)


def test_calls_of_the_agents_own_tools_are_calls_on_the_server():
    """What the model writes of them is not shown, what is run is, side by side."""
    done = {
        "id": "mcp_r1-1", "type": "mcp_call", "status": "completed", "server_label": "main",
        "name": "look", "arguments": '{"x": 1}', "output": "sunny", "error": None,
        "approval_request_id": None,
    }  # fmt: skip
    error = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": '{"e":1}'}]}
    failed = done | {"id": "mcp_r1-2", "status": "failed", "output": None, "error": error}
    frames = read(
        *call("look", "{}"), used(), used(call_id="c2"),
        returned(b'{"e":1}', call_id="c2", is_error=True), returned(), finished(),
    )  # fmt: skip
    begun = ["output_item.added", "mcp_call.in_progress", "mcp_call_arguments.done"]
    assert [
        "created", "in_progress", *begun, *begun, "mcp_call.failed", "output_item.done",
        "mcp_call.completed", "output_item.done", "completed", "[DONE]",
    ] == types(frames)  # fmt: skip
    assert [done, failed] == frames[-2]["response"]["output"]
    assert done | {"status": "in_progress", "arguments": "", "output": None} == frames[2]["item"]


def test_a_tool_that_was_never_seen_to_begin_is_shown_with_its_result():
    """As a provider's may be."""
    (item,) = final(returned(b"[1, 2]"), finished())["output"]
    assert ("look", "{}", "[1, 2]") == (item["name"], item["arguments"], item["output"])


# Questions ----------------------------------------------------------------------------------------


def test_a_question_completes_the_response():
    """As a message, with what is to choose from, and what it has cost so far."""
    colours = (Option(id="r", label="Red"), Option(id="blue"))
    events = (*spoken("Hm."), ended("tool_calls", USAGE), asked(options=colours))
    response = final(*events)
    question = message("msg_r1-2", "Which one?\n\n- Red\n- blue")
    assert ("completed", 1795176005) == (response["status"], response["completed_at"])
    assert [message("msg_r1-1", "Hm."), question] == response["output"]
    assert WIRE_USAGE == response["usage"]


def test_several_questions_are_told_apart_by_their_ids():
    """And it is said how to answer them."""
    questions = tuple(Question(id=each, kind="text", prompt=f"{each}?") for each in ("a", "b"))
    (item,) = final(InputRequested(ts=NOON, request_id="q", questions=questions))["output"]
    expected = "[a] a?\n\n[b] b?\n\n(One line for each, such as: [a]: your answer)"
    assert expected == item["content"][0]["text"]


def test_an_answer_begins_another_response_of_the_run():
    """With a number of its own, the one before it, and counts from 0; it costs what it costs."""
    cost = Usage(input_tokens=1, output_tokens=2)
    events = (ended("stop", USAGE), asked(), received(), *spoken("Blue."), ended("stop", cost),
              finished())  # fmt: skip
    frames = read(*events)
    end = frames.index("[DONE]")
    assert ["created", "in_progress", "output_item.added"] == types(frames[end + 1 : end + 4])
    response = frames[-2]["response"]
    assert ("resp_r1.2", "resp_r1", [message("msg_r1-2", "Blue.")], 3) == (
        response["id"],
        response["previous_response_id"],
        response["output"],
        response["usage"]["total_tokens"],
    )


def test_a_question_that_is_withdrawn_was_asked():
    """What the run does then is in a response that nobody has asked for."""
    frames = read(asked(), InputWithdrawn(ts=NOON, request_id="q1"), finished(b'"ok"'))
    assert ["[DONE]", "[DONE]"] == [each for each in types(frames) if each == "[DONE]"]
    assert "resp_r1.2" == frames[-2]["response"]["id"]


def test_questions_side_by_side_are_a_response_each():
    """The second one is complete at once; behind both there is a third."""
    events = (asked("Who?"), asked("Where?", request_id="q2"), received(), received("q2"),
              finished(b'"ok"'))  # fmt: skip
    responses = [f["response"] for f in read(*events) if f != "[DONE]" and "completed_at" in f.get(
        "response", {}) and f["type"] == "response.completed"]  # fmt: skip
    assert ["resp_r1", "resp_r1.2", "resp_r1.3"] == [each["id"] for each in responses]
    texts = [each["output"][0]["content"][0]["text"] for each in responses]
    assert ["Who?", "Where?", "ok"] == texts


def test_a_tool_that_asks_is_in_progress_until_the_next_response():
    """There it is whole; what is spoken meanwhile goes on as a message of its own."""
    events = (used("ask_user"), delta("so "), asked(), received(), delta("far"), whole("so far"),
              returned(b'"blue"', name="ask_user"), finished())  # fmt: skip
    first = shown(1, started(), *events)
    second = final(*events)
    asking, so, question = first["output"]
    assert ("in_progress", None) == (asking["status"], asking["output"])
    assert [message("msg_r1-2", "so "), message("msg_r1-3", "Which one?")] == [so, question]
    far, asked_user = second["output"]
    assert message("msg_r1-4", "far") == far
    assert ("completed", "blue", '{"x": 1}') == tuple(
        asked_user[name] for name in ("status", "output", "arguments")
    )
    assert asking["id"] != asked_user["id"]


def test_what_was_said_before_a_question_is_not_said_again():
    """Though its part is over only behind it."""
    events = (delta("all"), asked(), received(), whole("all"), *spoken("new", part_id="p1"),
              finished())  # fmt: skip
    assert [message("msg_r1-3", "new")] == final(*events)["output"]


def test_a_call_that_is_cut_by_a_question_is_not_to_be_made():
    """Whoever got half of it would make it: the next response has it whole."""
    begun, half, _ = call("look", '{"x"')
    events = (begun, half, asked(), received(), call("look", '{"x":1}')[-1], finished())
    first = shown(1, started("look"), *events)["output"][0]
    assert ("in_progress", '{"x"') == (first["status"], first["arguments"])
    (item,) = final(*events, begin=started("look"))["output"]
    assert ("completed", '{"x":1}') == (item["status"], item["arguments"])


# Places -------------------------------------------------------------------------------------------


RUN = (started(), *spoken("One."), asked(), received(), delta("Two"), delta("."), whole("Two."),
       finished())  # fmt: skip


def frames_from(events, number, after=None):
    """What a reader is given who begins there, to the end of the response."""
    seq, part = find_place(number, after, events)
    encoder = OPENAI_RESPONSES.encoder(None)
    by_event = [list(encoder.feed(event)) for event in events]
    rest = [f for each in by_event[seq:] for f in each]
    head = by_event[seq - 1][part:] if part else []
    frames = head + rest
    return frames[: frames.index(DONE) + 1] if DONE in frames else frames


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_goes_on_behind_any_of_its_events(number):
    """Of the first response of a run, or of a later one."""
    whole = frames_from(RUN, number)
    assert (b'"sequence_number":0' in whole[0], DONE) == (True, whole[-1])
    assert f'"id":"{response_id("r1", number)}"'.encode() in whole[0]
    for after in range(len(whole) - 1):
        assert whole[after + 1 :] == frames_from(RUN, number, after)
    assert [DONE] == frames_from(RUN, number, 1000)


def test_a_stream_that_is_not_over_goes_on_from_where_it_is():
    """Also for those who claim to have seen more."""
    assert [] == frames_from(RUN[:3], 1, 4)
    assert [] == frames_from(RUN[:3], 1, 1000)


def test_a_response_that_has_not_begun_is_not_found():
    """Neither its stream nor itself: a question has none behind it until it is answered."""
    for number in (2, 3):
        with pytest.raises(NotFound, match=f"got number {number}, which has not begun"):
            find_place(number, None, RUN[:5])
        with pytest.raises(NotFound, match=f"got number {number}, which has not begun"):
            show(number, snapshot(), RUN[:5])
    assert (5, 0) == find_place(2, None, RUN)


@pytest.mark.parametrize("run_id", ["r1", "a.b", "a.2", "a.2.3", "0", "x.0", "resp_", "ü", "2."])
@pytest.mark.parametrize("number", [1, 2, 12])
def test_an_id_tells_the_run_and_the_response(run_id, number):
    """Whatever the run's own id is like."""
    text = response_id(run_id, number)
    assert (run_id, number) == read_response_id(text)
    assert text.startswith(f"resp_{run_id}")


@pytest.mark.parametrize("text", ["", "r1", "resp_", "msg_1"])
def test_what_is_no_id_is_not_found(text):
    """As what is none of a response's."""
    with pytest.raises(NotFound, match="the id of a response, such as resp_123"):
        read_response_id(text)


# Answers ------------------------------------------------------------------------------------------


def test_a_response_that_goes_on_is_shown_as_it_stands():
    """With what is open in it."""
    response = shown(1, started(policy="continue"), delta("half"), used(), state="running")
    assert ("in_progress", True, None) == (
        response["status"],
        response["background"],
        response["usage"],
    )
    half, used_tool = response["output"]
    assert message("msg_r1-1", "half", "in_progress") == half
    assert ("mcp_call", "in_progress") == (used_tool["type"], used_tool["status"])


def test_a_response_that_waits_for_its_turn_is_queued():
    """Nothing has happened yet, but it is there."""
    response = shown(1, state="queued")
    assert FULL | {"status": "queued"} == response
    assert json.loads(acknowledge(snapshot(state="queued"), ()).body) == response
    with pytest.raises(NotFound):
        show(2, snapshot(state="queued"), ())


def test_what_was_asked_for_stands_in_every_answer():
    """It is in the run's metadata; what somebody else has put there is nobody's."""
    told = {"instructions": "Be brief.", "metadata": {"a": "b"}, "previous_response_id": "resp_0"}
    response = shown(1, *RUN, metadata=told)
    assert told == {name: response[name] for name in told}
    assert "resp_r1" == shown(2, *RUN, metadata=told)["previous_response_id"]
    assert {} == shown(1, *RUN, metadata={"metadata": 5})["metadata"]
    assert {} == shown(1, *RUN, metadata=[1])["metadata"]


def test_an_answer_is_the_response_that_was_begun():
    """The first one, or the one behind the question that was answered last."""
    reply = answer(snapshot(), RUN[:5])
    assert ("resp_r1", 200) == (json.loads(reply.body)["id"], reply.status)
    assert "resp_r1.2" == json.loads(answer(snapshot(), RUN).body)["id"]
    side_by_side = (started(), asked(), asked(request_id="q2"), received(), received("other"))
    assert "resp_r1.2" == json.loads(acknowledge(snapshot(), side_by_side).body)["id"]
    both = (*side_by_side, received("q2"))
    assert "resp_r1.3" == json.loads(acknowledge(snapshot(), both).body)["id"]


def test_a_run_by_itself_is_its_snapshot():
    """This protocol never shows one."""
    assert msgspec.json.encode(snapshot()) == OPENAI_RESPONSES.present(snapshot())


def inputs(number=1, events=RUN, **more):
    """The items that a response was told, and the list of them."""
    body = json.loads(list_input(number, snapshot(**more), events).body)
    assert ("list", False) == (body["object"], body["has_more"])
    return body


def test_the_input_is_a_list_of_items():
    """A text, or what functions have answered; whatever another protocol has sent as its JSON."""
    body = inputs()
    item = {
        "id": "in_r1-1", "type": "message", "role": "user", "status": "completed",
        "content": [{"type": "input_text", "text": "Hello"}],
    }  # fmt: skip
    assert ([item], "in_r1-1", "in_r1-1") == (body["data"], body["first_id"], body["last_id"])
    check(ResponseItemList, body)
    outputs = [{"type": "function_call_output", "call_id": f"c{n}", "output": "x"} for n in (1, 2)]
    body = inputs(input=json.dumps(outputs).encode())
    ids = ("in_r1-1", "in_r1-2")
    assert ids == (body["first_id"], body["last_id"])
    assert [
        {**each, "id": own, "status": "completed"} for each, own in zip(outputs, ids, strict=True)
    ] == body["data"]
    (item,) = inputs(input=b'{"a":[1]}')["data"]
    assert '{"a":[1]}' == item["content"][0]["text"]


def test_the_input_of_a_later_response_is_the_answer():
    """To the question before it; nothing where none has come."""
    (item,) = inputs(2)["data"]
    assert ("in_r1.2-1", "blue") == (item["id"], item["content"][0]["text"])
    withdrawn = (started(), asked(), InputWithdrawn(ts=NOON, request_id="q1"))
    body = inputs(2, withdrawn)
    assert ([], None, None) == (body["data"], body["first_id"], body["last_id"])
    assert [] == inputs(input=None)["data"]


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "answered_with"),
    [(400, "invalid_request_error", 400), (401, "authentication_error", 401),
     (403, "permission_error", 403), (429, "rate_limit_error", 429), (499, "server_error", 499),
     (503, "server_error", 503), (200, "server_error", 500)],
)  # fmt: skip
def test_the_kind_of_an_error_follows_from_its_status(status, kind, answered_with):
    """What is no status of an error is ours."""
    reply = refuse(Problem(code="oops", message="no", status=status))
    error = {"message": "no", "type": kind, "param": None, "code": "oops"}
    assert (answered_with, {"error": error}) == (reply.status, json.loads(reply.body))


@pytest.mark.parametrize(
    ("known", "said", "status", "code", "param"),
    [
        ("not_found", "expected one of the agents main, got 'x'", 404, "model_not_found", "model"),
        ("not_found", "expected the id of a run, got 'x'", 404, "not_found", None),
        ("previous_not_found", "gone", 400, "previous_response_not_found", "previous_response_id"),
    ],
)
def test_what_is_not_found_is_a_model_or_a_response(known, said, status, code, param):
    """Which of them, the words say."""
    reply = refuse(Problem(code=known, message=said, status=404))
    error = {"message": said, "type": "invalid_request_error", "param": param, "code": code}
    assert (status, {"error": error}) == (reply.status, json.loads(reply.body))


# Requests -----------------------------------------------------------------------------------------


def decode(method, path, body=None, **query):
    """What a request asks for, by the dialect's own routes."""
    for route in OPENAI_RESPONSES.routes:
        ours, theirs = route.path.split("/"), path.split("/")
        if route.method == method and len(ours) == len(theirs):
            pairs = list(zip(ours, theirs, strict=True))
            if all(a == b or a.startswith("<") for a, b in pairs):
                parameters = {a.strip("<>"): b for a, b in pairs if a.startswith("<")}
                data = b"" if body is None else json.dumps(body).encode()
                return route.decode(Request(method, parameters, query, {}, data))
    raise AssertionError(path)


def decoded(input="Hello", **body):
    return decode("POST", "/responses", {"model": "main", "input": input, **body})


def test_a_request_asks_for_a_run():
    """That is waited for, and begins a conversation."""
    start = decoded()
    expected = Start(
        agent="main", input="Hello", delivery="wait", makes_thread=True, if_busy="supersede",
        reply=answer,
    )  # fmt: skip
    assert expected == start


@pytest.mark.parametrize(
    ("background", "stream", "expected"),
    [
        (False, True, ("stream", None, "supersede", answer)),
        (True, False, ("background", "continue", "enqueue", acknowledge)),
        (True, True, ("stream", "continue", "enqueue", answer)),
    ],
)
def test_a_response_in_the_background_goes_on_without_its_client(background, stream, expected):
    """Streamed or not; one after the other."""
    start = decoded(background=background, stream=stream)
    assert expected == (start.delivery, start.on_disconnect, start.if_busy, start.reply)


def test_what_is_repeated_is_kept_with_the_run():
    """And is an option of the stream that the request begins."""
    tool = {"type": "function", "name": "look", "description": None, "parameters": None,
            "strict": None}  # fmt: skip
    told = {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "previous_response_id": "resp_r0.2",
        "tools": [tool], "tool_choice": "none",
    }  # fmt: skip
    start = decoded(**told)
    assert told == start.metadata
    response = final(finished(), options=start.options)
    assert told == {name: response[name] for name in told}
    assert ("r0", "Be brief.", ()) == (start.continues, start.instructions, start.tools)
    assert hash(start.options) is not None


def test_the_clients_tools_may_be_called():
    """Functions are all that it can have."""
    parameters = {"type": "object", "properties": {"x": {}}}
    tools = [{"type": "function", "name": "look", "description": "Look.", "parameters": parameters},
             {"type": "function", "name": "go"}]  # fmt: skip
    expected = (
        ToolSpec("look", "Look.", parameters),
        ToolSpec("go", "", {"type": "object", "properties": {}}),
    )
    assert expected == decoded(tools=tools, tool_choice="auto").tools


def said_by(role, content, **more):
    return {"role": role, "content": content, **more}


CALLED = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"x":1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": '{"y": "ü"}'}


def test_a_conversation_is_the_history():
    """The last message is the input; the system's at the beginning are the instructions."""
    start = decoded(
        [
            said_by("system", "Be kind."),
            said_by("developer", [{"type": "input_text", "text": "Be brief."}]),
            said_by("user", [{"type": "input_text", "text": "A?"},
                             {"type": "input_text", "text": "Or B?"}], type="message"),
            {"type": "reasoning", "id": "rs_1", "summary": [],
             "content": [{"type": "reasoning_text", "text": "hm"}]},
            said_by("assistant", [{"type": "output_text", "text": "A."},
                                  {"type": "refusal", "refusal": "Not B."}], id="msg_1"),
            said_by("system", "Now be rude."),
            said_by("user", "Why?"),
        ],
        instructions="Be good.",
    )  # fmt: skip
    assert ("Why?", "Be good.\n\nBe kind.\n\nBe brief.", None) == (
        start.input,
        start.instructions,
        start.said,
    )
    expected = (
        UserMessage("A?\nOr B?"),
        AssistantMessage("A.\nNot B."),
        SystemMessage("Now be rude."),
    )
    assert expected == start.history


def test_what_functions_have_answered_is_said():
    """Calls stand in the message of the turn in which they were made."""
    other = {**CALLED, "call_id": "c2", "name": "go", "arguments": None}
    start = decoded(
        [said_by("user", "A?"), said_by("assistant", "Hm."), CALLED, other, OUTPUT,
         {**OUTPUT, "call_id": "c2", "output": [{"type": "input_text", "text": "gone"}]}]
    )  # fmt: skip
    calls = (ToolCall("c1", "look", '{"x":1}'), ToolCall("c2", "go", "{}"))
    assert (UserMessage("A?"), AssistantMessage("Hm.", calls)) == start.history
    answers = (
        ToolMessage("c1", "look", json.dumps('{"y": "ü"}', ensure_ascii=False)),
        ToolMessage("c2", "go", '"gone"'),
    )
    assert answers == start.said
    assert [OUTPUT, {**OUTPUT, "call_id": "c2", "output": "gone"}] == start.input


def test_behind_a_response_only_what_is_new_is_told():
    """All of it; where it is one message of the user's, that is the input."""
    more = {"previous_response_id": "resp_r1"}
    start = decoded([OUTPUT, {**OUTPUT, "call_id": "c2", "name": "go"}], **more)
    text = json.dumps('{"y": "ü"}', ensure_ascii=False)
    answers = (ToolMessage("c1", "", text), ToolMessage("c2", "go", text))
    assert (None, answers) == (start.history, start.said)
    start = decoded([OUTPUT, said_by("user", "And?")], **more)
    assert ("And?", None) == (start.input, start.history)
    assert (answers[0], UserMessage("And?")) == start.said
    start = decoded([said_by("user", "And?")], **more)
    assert ("And?", None, None) == (start.input, start.history, start.said)


def test_what_the_agent_has_done_may_come_back():
    """Its calls are those of a turn, each with its result, if it had one."""
    made = {"type": "mcp_call", "id": "mcp_1", "name": "look", "arguments": "{}", "output": "sunny",
            "server_label": "main", "error": None}  # fmt: skip
    error = {"type": "mcp_tool_execution_error", "content": []}
    start = decoded(
        [said_by("user", "A?"), made, {**made, "id": "mcp_2", "output": None, "error": error},
         {**made, "id": "mcp_3", "output": None, "error": "no"},
         {**made, "id": "mcp_4", "output": None}, said_by("user", "B?")]
    )  # fmt: skip
    _, *turns = start.history
    calls = [AssistantMessage("", (ToolCall(f"mcp_{n}", "look", "{}"),)) for n in (1, 2, 3, 4)]
    assert calls == [each for each in turns if isinstance(each, AssistantMessage)]
    results = [(each.content, each.is_error) for each in turns if isinstance(each, ToolMessage)]
    assert [
        ('"sunny"', False),
        (json.dumps(json.dumps(error, separators=(",", ":"))), True),
        ('"no"', True),
    ] == results


def test_a_function_whose_call_is_somewhere_before_has_its_name():
    """However far."""
    items = [
        said_by("user", "A?"),
        CALLED,
        {**CALLED, "call_id": "c2", "name": "go"},
        OUTPUT,
        said_by("user", "B?"),
        {**OUTPUT, "call_id": "c2"},
        {**OUTPUT, "call_id": "c9"},
    ]
    assert ["go", ""] == [message.name for message in decoded(items).said]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": None}, "expected a JSON object to create a response"),
        ({"input": []}, "expected a JSON object to create a response"),
        ({"metadata": {"a": 5}}, "expected a JSON object to create a response"),
        ({"tool_choice": "required"}, "tool_choice: not available here"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice: not available here"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format: not available here"),
        ({"conversation": "conv_1"}, "conversation: not available here: .*previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt: not available here"),
        ({"top_logprobs": 3}, "top_logprobs: not available here"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]: .* of the type 'function'"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\]: .*, with a name"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "got a reference to one"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "got 'web_search_call'"),
        ({"input": [{"type": "message", "content": "a"}]}, r"input\[0\].role: expected a message"),
        ({"input": [said_by("user", None)]}, r"input\[0\].content: expected text"),
        ({"input": [said_by("user", [{"type": "input_image"}])]},
         r"input\[0\].content\[0\]: .* got 'input_image'"),
        ({"input": [said_by("assistant", "a")]}, "expected the last item to be"),
        ({"input": [said_by("system", "a")]}, "expected the last item to be"),
        ({"input": [{**OUTPUT, "call_id": ""}]}, r"input\[0\].call_id: expected text, got none"),
        ({"input": [{**CALLED, "name": None}]}, r"input\[0\].name: expected text, got none"),
        ({"input": [{**OUTPUT, "output": None}]}, r"input\[0\].output: expected text"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_in_clear_words(body, said):
    """Rather than left out of the answer in silence."""
    with pytest.raises(BadRequest, match=said):
        decode("POST", "/responses", {"model": "main", "input": "Hello"} | body)


def test_an_input_has_an_end():
    """Neither more items nor more parts of one are read than do no harm to other requests."""
    said = MAX_MESSAGES * [said_by("user", "a")]
    assert MAX_MESSAGES - 1 == len(decoded(said).history)
    parts = [{"type": "input_text", "text": "a"}] * (MAX_MESSAGES + 1)
    for too_many in ([*said, *said[:1]], [said_by("user", parts)]):
        with pytest.raises(BadRequest, match=f"create a response .* length <= {MAX_MESSAGES}"):
            decoded(too_many)


@pytest.mark.parametrize(
    "overlooked",
    [{"temperature": 0.1, "top_p": 1, "reasoning": {"effort": "low"}, "include": ["x"]},
     {"store": False, "truncation": "auto", "max_output_tokens": 5, "user": "me"},
     {"text": {"format": {"type": "text"}, "verbosity": "low"}, "top_logprobs": 0},
     {"parallel_tool_calls": False, "service_tier": "flex", "stream_options": {}}],
)  # fmt: skip
def test_how_the_model_is_to_sample_is_the_agents_to_say(overlooked):
    """It is read over."""
    assert decoded() == decoded(**overlooked)


def test_a_response_before_that_has_no_id_of_ours_is_not_found():
    """No run could have made it."""
    with pytest.raises(NotFound, match="the id of a response"):
        decoded(previous_response_id="chatcmpl-1")


def test_a_response_is_looked_at():
    """Or streamed, from its beginning or behind an event."""
    look = decode("GET", "/responses/resp_r1.2", include="x")
    assert (Show, "r1") == (type(look), look.run_id)
    assert "resp_r1.2" == json.loads(look.reply(snapshot(), RUN).body)["id"]
    watch = decode("GET", "/responses/resp_r1.2", stream="true")
    assert (Watch, "r1", (5, 0)) == (type(watch), watch.run_id, watch.after(RUN))
    watch = decode("GET", "/responses/resp_r1", stream="True", starting_after="3")
    assert find_place(1, 3, RUN) == watch.after(RUN)
    for wrong in ("-1", "x", "²", "", "9" * 16):
        with pytest.raises(BadRequest, match="starting_after: expected the sequence_number"):
            decode("GET", "/responses/resp_r1", stream="true", starting_after=wrong)


def test_a_response_is_cancelled_deleted_and_asked_for_its_input():
    """Each by the run that it is of."""
    cancel = decode("POST", "/responses/resp_r1/cancel")
    assert ("r1", False) == (cancel.run_id, cancel.forgets)
    assert "resp_r1" == json.loads(cancel.reply(snapshot(), RUN).body)["id"]
    delete = decode("DELETE", "/responses/resp_r1.2")
    assert ("r1", True) == (delete.run_id, delete.forgets)
    for state, status in (("finished", 200), ("cancelling", 202)):
        reply = delete.reply(snapshot(state=state), RUN)
        body = {"id": "resp_r1.2", "object": "response", "deleted": status == 200}
        assert (status, body) == (reply.status, json.loads(reply.body))
    items = decode("GET", "/responses/resp_r1/input_items", order="asc")
    assert "list" == json.loads(items.reply(snapshot(), RUN).body)["object"]


# Real sockets -------------------------------------------------------------------------------------


@asynccontextmanager
async def serve(*agents):
    """A server, and a raw client of it."""
    with trio.fail_after(PATIENCE):
        async with (
            open_server(*agents, dialects=(NATIVE, OPENAI_RESPONSES)) as server,
            connect(server.urls[0], is_native=False) as client,
        ):
            yield server, client


def create(**body):
    return request(
        "POST", "/v1/responses", json.dumps({"model": "main", "input": "Hello", **body}).encode()
    )


@attrs.frozen(eq=False)
class Asleep:
    """An agent that says something, and never ends."""

    begun: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, run, _input):
        """Sleep."""
        run.text("half")
        self.begun.set()
        await trio.sleep_forever()


async def greet(run, input):
    """Say something."""
    await trio.lowlevel.checkpoint()
    run.text(f"{input}, Köln!")


async def test_the_stream_is_an_event_stream():
    """Its last frame is `[DONE]`; where the run is stands in a header."""
    async with serve(Agent("main", greet)) as (server, client):
        await client.send(create(stream=True))
        body = await client.finish()
        (run,) = server.runs
    assert "text/event-stream; charset=utf-8" == client.header("content-type")
    assert (run.id, 200) == (client.header("x-request-id"), client.status)
    assert (True, 1) == (body.endswith(DONE), body.count(DONE))
    names = {line.partition(b":")[0] for line in body.splitlines() if line}
    assert {b"event", b"data"} == names


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_has_cancelled_the_response(stream):
    """Unless it is in the background."""
    async with serve(Agent("main", asleep := Asleep())) as (server, client):
        await client.send(create(stream=stream))
        await asleep.begun.wait()
        await client.leave_by_fin()
        (run,) = server.runs
        await run.done.wait()
    assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)


async def test_who_leaves_a_response_in_the_background_has_left_only():
    """It goes on, whoever comes."""
    async with serve(Agent("main", asleep := Asleep())) as (server, client):
        await client.send(create(stream=True, background=True))
        await asleep.begun.wait()
        await client.leave_by_fin()
        await wait_until(lambda: server.app.streams.closed["client_left"] == 1)
        (run,) = server.runs
        assert "running" == run.state


async def test_who_only_looks_on_sees_all_responses_of_a_run():
    """In the frames of this protocol, one response behind the other."""

    async def asks(run, _input):
        run.text(await run.ask("Which one?"))

    async with serve(Agent("main", asks)) as (server, client):
        await client.send(create())
        first = json.loads(await client.finish())
        await client.send(create(input="Blue", previous_response_id=first["id"]))
        second = json.loads(await client.finish())
        (run,) = server.runs
        path = f"/runs/{run.id}/events?dialect=openai_responses"
        await client.send(request("GET", path, accept="text/event-stream"))
        body = await client.finish()
    assert [first["id"], f"{first['id']}.2"] == [first["id"], second["id"]]
    ends = [frame for frame in body.split(b"\n\n") if frame.startswith(b"event: response.comp")]
    assert [first["id"], second["id"]] == [
        json.loads(frame.partition(b"data: ")[2])["response"]["id"] for frame in ends
    ]
    assert 2 == body.count(DONE)


async def test_a_question_that_is_not_answered_yet_has_no_next_response():
    """Neither to look at nor to stream."""

    async def asks(run, _input):
        await run.ask("Which one?")

    async with serve(Agent("main", asks)) as (_server, client):
        await client.send(create())
        first = json.loads(await client.finish())["id"]
        for query in ("", "?stream=true"):
            await client.send(request("GET", f"/v1/responses/{first}.2{query}"))
            error = json.loads(await client.finish())["error"]
            assert (404, "invalid_request_error") == (client.status, error["type"])


async def test_a_response_of_another_protocol_is_one_too():
    """It is shown, streamed and cancelled by its run's id."""
    async with serve(Agent("main", asleep := Asleep())) as (_server, client):
        body = b'{"input":{"a":1},"background":true,"metadata":{"x":1}}'
        await client.send(request("POST", "/agents/main/runs", body))
        run_id = json.loads(await client.finish())["id"]
        await asleep.begun.wait()
        await client.send(request("GET", f"/v1/responses/resp_{run_id}"))
        response = json.loads(await client.finish())
        assert ("in_progress", True, {}) == (
            response["status"],
            response["background"],
            response["metadata"],
        )
        await client.send(request("POST", f"/v1/responses/resp_{run_id}/cancel"))
        assert "cancelled" == json.loads(await client.finish())["status"]
