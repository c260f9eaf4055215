"""Llama Stack's agents API: what is asked, what its chunks mean however they are cut, and runs.

The chunks of the first tests are written by hand, the longer ones by the server that ships with the
package; the runs go over real sockets, and those that are struck at every step over streams in
memory, where every step is scheduled by Trio's seeded random numbers.
"""

import copy
import functools
import gc
import itertools
import json
import random
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings, strategies as st
from msgspec import UNSET, Raw
from normalizing import however_cut, play
from raw import connect, stream_run, wait_quiet
from test_cancel_everywhere import (
    SECONDS,
    Blow,
    attach,
    by_cancel,
    by_nothing,
    follow,
    from_outside,
    look_up,
    same_steps as same_steps,  # noqa: PLC0414 - a fixture
    see_that_it_is_whole,
)

from agentsse import Agent
from agentsse.config import LimitSettings, Settings
from agentsse.context import Limits
from agentsse.dialects import Start
from agentsse.errors import ConfigError, ProviderError
from agentsse.events import (
    Moderation,
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    Retry,
    RunFinished,
    StepFinished,
    ToolFinished,
    ToolStarted,
    Usage,
    decode_event,
    encode_event,
)
from agentsse.http import open_http
from agentsse.messages import (
    AssistantMessage,
    Echo,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.providers import Finish, Prompt
from agentsse.providers.llama_stack import Asked, LlamaStackNormalizer, LlamaStackProvider
from agentsse.runs import open_runs
from agentsse.server import make_provider
from agentsse.testing import open_server
from agentsse.testing.llama_stack import (
    Inference,
    LlamaStack,
    MemoryRetrieval,
    ShieldCall,
    ToolExecution,
    Turn,
    open_llama_stack,
    turn_frames,
)
from agentsse.testing.upstream import Call, Cut, Failure, Hang, Page, Refusal, Stop

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds
QUICK = LimitSettings(retry_delay=0.01, max_tries=3)


# Chunks, written by hand --------------------------------------------------------------------------


def make():
    return LlamaStackNormalizer("m1")


def sse(*chunks):
    return b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks)


def chunk(event_type, step_type=None, **fields):
    step = {} if step_type is None else {"step_type": step_type, "step_id": "s1"}
    return {"event": {"payload": {"event_type": event_type, **step, **fields}}}


def progress(**delta):
    return chunk("step_progress", "inference", delta=delta)


def text(said):
    return progress(type="text", text=said)


def called(tool_call, parse_status="succeeded"):
    return progress(type="tool_call", tool_call=tool_call, parse_status=parse_status)


def inferred(content="", *calls, step_id="s1"):
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    details = {"step_type": "inference", "model_response": message}
    return chunk("step_complete", "inference", step_id=step_id, step_details=details)


def shielded(violation):
    return chunk("step_complete", "shield_call", step_details={"violation": violation})


def executed(calls, responses, step_id="s2", **details):
    details |= {"tool_calls": calls, "tool_responses": responses}
    return chunk("step_complete", "tool_execution", step_id=step_id, step_details=details)


def started(step_type="inference", step_id="s1"):
    return chunk("step_start", step_type, step_id=step_id, metadata={})


def ended(content="", *calls, how="turn_complete", stop="end_of_turn", **turn):
    message = {
        "role": "assistant",
        "content": content,
        "stop_reason": stop,
        "tool_calls": list(calls),
    }
    return chunk(how, turn={"turn_id": "t1", "output_message": message, **turn})


def waits(*calls, **fields):
    return ended("", *calls, how="turn_awaiting_input", stop="end_of_message", **fields)


LOOKED = {"call_id": "c1", "tool_name": "look", "arguments": '{"at":"door"}'}
KNOCKED = {"call_id": "c2", "tool_name": "knock", "arguments": '{"n":2}'}
RETRIEVED = chunk("step_complete", "memory_retrieval", step_details={"inserted_context": "x"})


def told(call, content):
    return {"call_id": call["call_id"], "tool_name": call["tool_name"], "content": content}


def read(*chunks, **ways):
    """What a machine makes of these chunks, however they are cut; there is no error."""
    produced, error = however_cut(make, sse(*chunks), **ways)
    assert error is None
    check(produced, error)
    return produced


def part(number, kind, *deltas, whole=None, **named):
    """The events of a part."""
    part_id = f"m1p{number}"
    return [
        PartStarted(part_id=part_id, kind=kind, **named),
        *(PartDelta(part_id=part_id, kind=kind, delta=delta) for delta in deltas),
        PartFinished(
            part_id=part_id,
            kind=kind,
            text="".join(deltas) if whole is None else whole,
            **named,
        ),
    ]


def ran(call, result, *, is_error=False, call_id=None):
    """The events of a tool that the server has run."""
    named = {"call_id": call_id or call["call_id"], "name": call["tool_name"]}
    return [
        ToolStarted(arguments=json_of(json.loads(call["arguments"])), **named),
        ToolFinished(result=json_of(result), is_error=is_error, source="provider", **named),
    ]


def json_of(value):
    return Raw(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def handed_on(value):
    return ProviderEvent(provider="llama_stack", raw=json_of(value))


def check(produced, error):
    """Parts and tools begin and end once, in order; there is a finish, or an error that says so."""
    begun, finished, running, done = {}, set(), set(), set()
    for one in produced[:-1] if error is None else produced:
        assert one == decode_event(encode_event(one))
        match one:
            case PartStarted(part_id=part_id):
                assert part_id not in begun
                begun[part_id] = ""
            case PartDelta(part_id=part_id, delta=more):
                assert part_id not in finished
                assert more
                begun[part_id] += more
            case PartFinished(part_id=part_id, text=said):
                assert part_id not in finished
                assert begun[part_id].endswith(said)
                finished.add(part_id)
            case ToolStarted(call_id=call_id):
                assert call_id not in running
                running.add(call_id)
            case ToolFinished(call_id=call_id):
                assert call_id in running - done
                done.add(call_id)
            case _:
                assert isinstance(one, ProviderEvent | Moderation)
    if error is None:
        assert isinstance(produced[-1], Finish)
        assert set(begun) == finished
        assert running == done
    else:
        assert isinstance(error, ProviderError)


# Each chunk that PR 254 has a case for


def test_turn_start_says_nothing_yet():
    """It has the turn's id, and no news for anybody who reads."""
    start = chunk("turn_start", turn_id="t1")

    assert [Finish("stop")] == read(start, ended())


def test_turn_awaiting_input_finishes_with_the_pending_calls():
    """Calls of ours are parts, once they are known to be ours; the finish says why it stopped."""
    assert [
        *part(1, "tool_call", '{"at":"door"}', name="look", call_id="c1"),
        *part(2, "tool_call", '{"n":2}', name="knock", call_id="c2"),
        Finish("tool_calls"),
    ] == read(started(), called(LOOKED), called(KNOCKED), waits(LOOKED, KNOCKED))


def test_turn_complete_says_its_content():
    """Where nothing was streamed, the message at the end is the answer."""
    assert [*part(1, "text", "content"), Finish("stop")] == read(ended("content"))


def test_shield_call_without_violation_is_moderation():
    """It was looked at, and is well."""
    assert [Moderation(violation=False), Finish("stop")] == read(
        started("shield_call"), shielded(None), ended()
    )


def test_shield_call_with_violation_is_moderation_and_a_refusal():
    """What the shield says, with its metadata; where the turn ends with it, it is a refusal."""
    violation = {"violation_level": "error", "user_message": "Not that.", "metadata": {"a": 1}}

    assert [
        Moderation(violation=True, message="Not that.", metadata=json_of({"a": 1})),
        *part(1, "refusal", "Not that."),
        Finish("content_filter"),
    ] == read(shielded(violation), ended("Not that."))


def test_step_progress_with_text_is_a_delta():
    """Each is an increment."""
    assert [*part(1, "text", "Kube", "rnetes"), Finish("stop")] == read(
        started(), text("Kube"), text("rnetes"), inferred("Kubernetes"), ended("Kubernetes")
    )


def test_step_progress_with_a_tool_call_as_str_is_held_for_the_call():
    """It is the model's own way of writing the call; what is parsed takes its place."""
    assert [
        *part(1, "tool_call", '{"at":"door"}', name="look", call_id="c1"),
        Finish("tool_calls"),
    ] == read(
        called("", "started"),
        called("[look(", "in_progress"),
        called('at="door")]', "in_progress"),
        called(LOOKED),
        waits(LOOKED),
    )


@pytest.mark.parametrize("statuses", [["succeeded"], ["in_progress", "succeeded"], [None]])
def test_step_progress_with_a_tool_call_object_is_a_call(statuses):
    """It has its name and its arguments; the end may leave it at that."""
    chunks = [called(LOOKED, status) for status in statuses]

    assert [
        *part(1, "tool_call", '{"at":"door"}', name="look", call_id="c1"),
        Finish("tool_calls"),
    ] == read(started(), *chunks, waits())


def test_step_complete_of_tool_execution_tells_calls_then_responses():
    """All calls, then all results, each by its own id."""
    summary = [{"type": "text", "text": "knowledge_search tool found 2 chunks:\n"}]
    first, last = ran(LOOKED, summary), ran(KNOCKED, "42")

    assert [first[0], last[0], first[1], last[1], Finish("stop")] == read(
        started("tool_execution"),
        executed([LOOKED, KNOCKED], [told(LOOKED, summary), told(KNOCKED, "42")]),
        ended(),
    )


def test_chunk_with_an_error_is_an_error():
    """Its message is that of the error."""
    produced, error = however_cut(make, sse({"error": {"message": "Something went wrong"}}))

    assert ([], "provider_error") == (produced, error.code)
    assert "llama_stack answered: Something went wrong" == error.message


@pytest.mark.parametrize("event_type", ["step_start", "step_progress", "step_complete"])
def test_unknown_step_is_handed_on(event_type):
    """Whatever the server does there, somebody may know what it is."""
    steps = [chunk(event_type, "memory_retrieval", x=1), chunk(event_type, "quantum_leap", x=2)]

    assert [*map(handed_on, steps), Finish("stop")] == read(*steps, ended())


# Inference


def test_each_inference_is_a_part():
    """A turn thinks aloud, runs a tool and answers; only the last is told again at the end."""
    assert [
        *part(1, "text", "Let me look."),
        *ran(LOOKED, "open"),
        *part(2, "text", "It is ", "open."),
        Finish("stop"),
    ] == read(
        started(),
        text("Let me look."),
        called(LOOKED),
        inferred("", LOOKED),
        executed([LOOKED], [told(LOOKED, "open")]),
        started(step_id="s3"),
        chunk("step_progress", "inference", step_id="s3", delta={"type": "text", "text": "It is "}),
        chunk("step_progress", "inference", step_id="s3", delta={"type": "text", "text": "open."}),
        inferred("It is open.", step_id="s3"),
        ended("It is open."),
        every=7,
    )


@pytest.mark.parametrize(
    ("content", "deltas", "whole"),
    [
        ("", ["ab"], "ab"),
        ("ab", ["ab"], "ab"),
        ("abc", ["ab", "c"], "abc"),
        ("xyz", ["ab", "xyz"], "xyz"),
        ([{"type": "text", "text": "a"}, "bc"], ["ab", "c"], "abc"),
        ({"type": "text", "text": "ab"}, ["ab"], "ab"),
    ],
)
@pytest.mark.parametrize("end", [inferred, ended], ids=["at the step's end", "at the turn's end"])
def test_one_delta_reconciles_the_aggregate(content, deltas, whole, end):
    """The same again is dropped, more is said, and what differs counts alone."""
    behind = [] if end is ended else [ended(content)]

    assert [*part(1, "text", *deltas, whole=whole), Finish("stop")] == read(
        started(), text("ab"), end(content), *behind
    )


@pytest.mark.parametrize(("content", "rest"), [("abc", "c"), ("xyz", "xyz")])
def test_what_the_end_has_beyond_the_last_step_is_a_part(content, rest):
    """The last step has ended; what the turn says instead of it, or more, is still said."""
    assert [*part(1, "text", "ab"), *part(2, "text", rest), Finish("stop")] == read(
        started(), text("ab"), inferred("ab"), ended(content)
    )


def test_a_step_may_lack_its_start_and_its_end():
    """Steps are told apart by their ids; one that begins ends the one before."""
    first, second = text("a"), text("b")
    second["event"]["payload"]["step_id"] = "s2"

    assert [*part(1, "text", "a"), *part(2, "text", "b"), Finish("stop")] == read(
        first, second, ended("b")
    )


def test_a_step_that_ends_twice_is_told_once():
    """Also where another step has ended what it was saying."""
    assert [*part(1, "text", "ab"), Moderation(violation=False), Finish("stop")] == read(
        started(), text("ab"), shielded(None), inferred("ab"), inferred("ab"), ended("ab")
    )


def test_a_call_that_could_not_be_parsed_is_text():
    """The server says so in the end; without that, what the model has written stands."""
    pieces = [called("<look", "in_progress"), called(" door>", "in_progress")]
    failed = called("<look door>", "failed")
    expected = [*part(1, "text", "<look door>"), Finish("stop")]

    assert expected == read(started(), *pieces, failed, inferred("<look door>"), ended())
    assert expected == read(started(), *pieces, called("", "failed"), inferred(), ended())
    assert expected == read(started(), *pieces, ended())
    assert expected == read(started(), *pieces, failed, ended("<look door>"))


def test_calls_that_stand_in_the_step_count():
    """What was streamed of them is dropped; a new inference is about other calls."""
    assert [
        *part(1, "tool_call", '{"n":2}', name="knock", call_id="c2"),
        Finish("tool_calls"),
    ] == read(
        started(),
        called("[look()]", "in_progress"),
        inferred("", LOOKED),
        started(),
        inferred("", KNOCKED),
        waits(),
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"arguments": {"a": [1]}}, '{"a":[1]}'),
        ({"arguments": '{"a": 1}', "arguments_json": "[]"}, '{"a": 1}'),
        ({"arguments": None, "arguments_json": '{"b":1}'}, '{"b":1}'),
        ({"arguments": '{"a'}, '{"a'),
        ({"arguments": ""}, "{}"),
        ({}, "{}"),
        ({"arguments": 7}, "7"),
    ],
)
def test_arguments_are_text_or_an_object(given, expected):
    """As the server's version has it."""
    assert [
        *part(1, "tool_call", expected, name="look", call_id="m1c1"),
        Finish("tool_calls"),
    ] == read(waits({"tool_name": "look", **given}))


def test_a_turn_of_old_ends_with_its_calls():
    """Before there was anything to resume, a complete turn had them."""
    produced = read(inferred("", LOOKED), ended("", LOOKED))

    assert ["tool_call", "tool_call", "tool_call"] == [one.kind for one in produced[:-1]]
    assert Finish("tool_calls") == produced[-1]


def test_a_turn_that_waits_for_nothing_is_complete():
    """There is nothing to answer."""
    assert [Finish("stop")] == read(waits())


def test_calls_that_were_made_as_the_tokens_ran_out_are_handed_on():
    """The server takes no results for them."""
    end = ended("", LOOKED, how="turn_awaiting_input", stop="out_of_tokens")

    assert [handed_on(end), Finish("length")] == read(end)


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ("end_of_turn", "stop"),
        ("end_of_message", "stop"),
        ("out_of_tokens", "length"),
        (None, "stop"),
        ("boredom", "other"),
    ],
)
def test_reasons(stop, reason):
    """Every word for why the model stopped has one of ours."""
    assert Finish(reason) == read(text("a"), ended("a", stop=stop))[-1]


def test_too_many_calls_are_an_error():
    """All of them would run at once."""
    produced, error = play(make, [sse(waits(*[{"tool_name": "look"}] * 129))])

    check(produced, error)
    assert "malformed" == error.code


# Shields


def test_a_violation_in_the_answer_refuses_it():
    """What was streamed stays; the refusal is a part of its own."""
    assert [
        *part(1, "text", "Take "),
        Moderation(violation=True, message="No."),
        *part(2, "refusal", "I can't."),
        Finish("content_filter"),
    ] == read(
        started(),
        text("Take "),
        inferred("Take "),
        shielded({"user_message": "No."}),
        ended("I can't."),
    )


@pytest.mark.parametrize(
    ("violation", "message"),
    [
        ({"user_message": "No.", "metadata": None}, "No."),
        ({"user_message": None}, None),
        ({}, None),
        ("No.", "No."),
        (True, None),
    ],
)
def test_a_violation_may_say_little(violation, message):
    """It is one all the same; without any words there is nothing to show."""
    refusal = part(1, "refusal", message) if message else []

    assert [Moderation(violation=True, message=message), *refusal, Finish("content_filter")] == (
        read(shielded(violation), ended())
    )


def test_metadata_that_is_none_is_unset():
    """Only what the shield has said is told."""
    assert UNSET is read(shielded({"user_message": "No."}), ended())[0].metadata


def test_an_answer_that_was_refused_as_it_stands_is_told_why():
    """Where the message at the end is the answer again, the shield's words are the refusal."""
    assert [*part(2, "refusal", "No."), Finish("content_filter")] == read(
        text("Take "), inferred("Take "), shielded({"user_message": "No."}), ended("Take ")
    )[-4:]


@pytest.mark.parametrize("more", [[started(step_id="s3")], [text("Well.")]])
def test_a_violation_that_does_not_end_the_turn_is_no_refusal(more):
    """The model goes on: it was only told."""
    produced = read(shielded({"user_message": "Hm."}), *more, text("So."), ended())

    assert (Moderation(violation=True, message="Hm."), Finish("stop")) == (
        produced[0],
        produced[-1],
    )


@pytest.mark.parametrize("violation", [None, False, ""])
def test_no_violation_may_be_told_in_other_ways(violation):
    """It is none."""
    assert [Moderation(violation=False), Finish("stop")] == read(shielded(violation), ended())


# Tools of the server


def test_a_tool_is_shown_while_it_runs():
    """Its start is told with the first chunk that names it; it is told once."""
    running = chunk(
        "step_progress",
        "tool_execution",
        step_id="s2",
        delta={"type": "tool_call", "tool_call": LOOKED, "parse_status": "in_progress"},
    )
    machine = make()

    assert ran(LOOKED, "open")[:1] == [*machine.feed(sse(started("tool_execution"), running))]
    assert ran(LOOKED, "open")[1:] == [
        *machine.feed(sse(executed([LOOKED], [told(LOOKED, "open")])))
    ]


@pytest.mark.parametrize("content", ["42", ["a", {"type": "text", "text": "b"}], {"x": 1}, 7, []])
def test_results_are_told_as_they_are(content):
    """Text is text, and items stay items: what they hold is for others to read."""
    assert [*ran(LOOKED, content), Finish("stop")] == read(
        executed([LOOKED], [told(LOOKED, content)]), ended()
    )


@pytest.mark.parametrize(
    ("fields", "result", "is_error"),
    [
        ({"content": None, "error_message": "gone"}, "gone", True),
        ({"content": "what", "error_code": 4}, "what", True),
        ({"content": None}, "", False),
    ],
)
def test_results_may_be_errors(fields, result, is_error):
    """What an error says is the result, where there is none."""
    assert [*ran(LOOKED, result, is_error=is_error), Finish("stop")] == read(
        executed([LOOKED], [told(LOOKED, "") | fields]), ended()
    )


def test_every_call_has_one_end():
    """One without a result, and one that never ended, have failed; the same told twice is told."""
    lost = {"error": "the server told no result of this tool"}
    running = chunk(
        "step_progress", "tool_execution", delta={"type": "tool_call", "tool_call": KNOCKED}
    )

    assert [
        *ran(LOOKED, lost, is_error=True),
        *ran(KNOCKED, lost, is_error=True),
        Finish("stop"),
    ] == read(executed([LOOKED], []), executed([LOOKED], [told(LOOKED, "x")]), running, ended())


def test_a_result_without_its_call_is_a_tool():
    """It was called, or there would be no result."""
    result = {"tool_name": "look", "content": "open"}
    expected = ran(LOOKED | {"arguments": "{}"}, "open", call_id="m1t1")

    assert [*expected, Finish("stop")] == read(executed([], [result]), ended())


def test_calls_without_ids_are_paired_by_their_places():
    """And told apart from those of other steps."""
    calls = [{**call, "call_id": ""} for call in (LOOKED, KNOCKED)]
    results = [{"tool_name": "x", "content": content} for content in ("a", "b", "c")]
    step = [executed(calls, results[:2]), executed(calls[:1], results[2:], step_id="s3")]
    one, two = ran(LOOKED, "a", call_id="m1t1"), ran(KNOCKED, "b", call_id="m1t2")

    assert [
        one[0],
        two[0],
        one[1],
        two[1],
        *ran(LOOKED, "c", call_id="m1t3"),
        Finish("stop"),
    ] == read(*step, ended())


def test_ids_that_another_step_has_used_up_are_made_new():
    """Some servers count anew in each."""
    assert [
        *ran(LOOKED, "a"),
        *ran(LOOKED, "b", call_id="m1t1"),
        Finish("stop"),
    ] == read(
        executed([LOOKED], [told(LOOKED, "a")]),
        executed([LOOKED], [told(LOOKED, "b")], step_id="s3"),
        ended(),
    )


def test_arguments_of_a_tool_may_be_no_json():
    """Then they are text."""
    call = LOOKED | {"arguments": "door"}

    (begun, *_) = read(executed([call], [told(call, "a")]), ended())
    assert json_of("door") == begun.arguments


def test_a_call_that_the_server_has_run_is_not_for_us():
    """Of those that the model has made, the others are."""
    without_id = {"tool_name": "hum", "arguments": "{}"}

    produced = read(
        started(),
        called(LOOKED),
        called(without_id),
        called(KNOCKED),
        executed([LOOKED, without_id], [told(LOOKED, "a"), {"content": "b"}]),
        waits(),
    )
    assert ["knock"] == [one.name for one in produced if isinstance(one, PartStarted)]


def answered(*chunks, ids=("c1",)):
    """What a machine makes of a turn that was given results."""
    asked = Asked("session-1", 2, frozenset(ids))
    produced, error = play(make, [asked, sse(*chunks)])
    check(produced, error)
    return produced


def test_our_own_results_are_not_told_again():
    """A turn that is resumed begins with them; from then on tools are the server's."""
    ours = executed([LOOKED], [told(LOOKED, "open")])

    assert [*ran(LOOKED, "shut")] == answered(
        ours, started(), executed([LOOKED], [told(LOOKED, "shut")]), ended()
    )[:-1]
    assert [Finish] == [
        type(one) for one in answered(executed([], [told(LOOKED, "open")]), ended())
    ]


def test_what_was_asked_is_echoed():
    """So that the next call knows where the answer came from, and whether it is waited for."""
    mark = {"session_id": "session-1", "number": 2}

    assert Echo("llama_stack", {**mark, "waiting": "t1"}) == answered(waits(LOOKED))[-1].echo
    assert Echo("llama_stack", {**mark, "waiting": ""}) == answered(ended("a"))[-1].echo
    assert Echo("llama_stack", {**mark, "waiting": ""}) == answered(ended("", LOOKED))[-1].echo
    assert read(waits(LOOKED))[-1].echo is None


def test_the_id_of_a_turn_may_stand_at_its_start_alone():
    """It is what results are sent to."""
    waiting = waits(LOOKED)
    del waiting["event"]["payload"]["turn"]["turn_id"]

    start = chunk("turn_start", turn_id="t7")
    assert "t7" == answered(start, waiting)[-1].echo.value["waiting"]


# Errors, ends, and what is odd


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ({"message": "500: Internal server error: An unexpected error."}, "server_error", "(500)"),
        ({"message": "400: Invalid value: no such tool"}, "bad_request", ": Invalid value: no"),
        ({"message": "401: Authentication required: x"}, "auth", "(401)"),
        ({"message": "404: Model 'm' not found"}, "not_found", "Model 'm' not found"),
        ({"message": "429: Quota exceeded"}, "rate_limit", "Quota exceeded"),
        ({"message": "504: Operation timed out: "}, "timeout", "timed out"),
        (
            {"message": "400: This model's maximum context length is 8"},
            "context_length",
            "maximum context length",
        ),
        ({"message": "Rate limit", "code": "rate_limit_exceeded"}, "rate_limit", "Rate limit"),
        ("503: busy", "overloaded", "busy"),
        ("Something", "provider_error", "Something"),
        ({}, "provider_error", "(no message)"),
        ([1], "provider_error", "[1]"),
    ],
)
def test_errors_say_what_they_are(error, code, words):
    """A status before the message is one."""
    _, failed = however_cut(make, sse({"error": error}))

    assert code == failed.code
    assert words in failed.message


@pytest.mark.parametrize("frames", [[text("a"), ended("a")], [waits(LOOKED)], []])
@pytest.mark.parametrize("behind", [[], [ended("b")]])
def test_an_error_beats_any_finish(frames, behind):
    """Before it, and after it; what was said stays."""
    error = {"error": {"message": "500: broken"}}
    produced, failed = however_cut(make, sse(*frames, error, *behind), every=5)

    check(produced, failed)
    assert "server_error" == failed.code


@pytest.mark.parametrize("data", [b'{"message": "gone"}', b"gone"])
def test_an_event_of_the_name_error_is_one(data):
    """Whatever it holds."""
    _, failed = however_cut(make, b"event: error\ndata: %b\n\n" % data)

    assert "gone" in failed.message


@pytest.mark.parametrize("error", [None, False])
def test_an_error_that_is_none_is_none(error):
    """Some write all of their fields."""
    assert [*part(1, "text", "a"), Finish("stop")] == read(ended("a") | {"error": error})


@pytest.mark.parametrize("frames", [[], [started(), text("a"), inferred("a")], [RETRIEVED]])
def test_a_stream_without_an_end_is_incomplete(frames):
    """Whatever it has said."""
    produced, error = however_cut(make, sse(*frames), every=3)

    check(produced, error)
    assert "incomplete" == error.code


def test_a_turn_is_over_at_its_end():
    """What follows it means nothing, and is handed on."""
    machine = make()
    [*machine.feed(sse(text("a")))]
    assert not machine.is_over

    [*machine.feed(sse(ended("a")))]
    assert machine.is_over
    assert [handed_on(ended("b"))] == [*machine.feed(sse(ended("b")))]
    assert [Finish("stop")] == [*machine.close()]


@pytest.mark.parametrize(
    "wrap", [lambda one: one, lambda one: {"payload": one}, lambda one: {"event": one}]
)
def test_a_payload_may_be_wrapped_otherwise(wrap):
    """As other versions of the server, and what stands before it, do."""
    chunks = [text("a"), shielded(None), inferred("a"), ended("a")]

    assert read(*chunks) == read(*(wrap(one["event"]["payload"]) for one in chunks))


@pytest.mark.parametrize(
    "value",
    [
        {"event": {"payload": {"event_type": "turn_paused"}}},
        {"event": {"payload": {}}},
        {"event": "x"},
        {},
        chunk("step_start"),
        progress(type="image", image="aGk="),
        progress(type="text", text=1),
        progress(type="tool_call", tool_call=1),
        chunk("step_progress", "inference", delta="Hello"),
        chunk("step_progress", "tool_execution", delta={"type": "text", "text": "x"}),
        chunk("step_complete", "inference", step_details={}),
        chunk("step_complete", "tool_execution", step_details={"tool_calls": "x"}),
        chunk("step_complete", "shield_call"),
        shielded(5),
        ["a", "list"],
        "text",
        7,
        None,
    ],
    ids=str,
)
def test_what_is_unknown_is_handed_on_once(value):
    """Never dropped, never fatal."""
    assert [handed_on(value), Finish("stop")] == read(value, ended())


def test_a_frame_that_is_no_json_is_handed_on():
    """As the text that it is."""
    produced, error = however_cut(make, b"data: {nonsense\n\n" + sse(ended()))

    assert ([handed_on("{nonsense"), Finish("stop")], None) == (produced, error)


@pytest.mark.parametrize(
    "end",
    [
        ended("a", output_attachments=[{"mime_type": "image/png"}]),
        ended(["a", {"type": "image", "image": {}}]),
    ],
)
def test_what_is_no_text_is_handed_on(end):
    """The text is told, and the whole of it handed on."""
    assert [*part(1, "text", "a"), handed_on(end), Finish("stop")] == read(end)


def test_halves_of_a_surrogate_pair_are_joined():
    """Whichever deltas they come in."""
    assert [*part(1, "text", "a", "\U0001f600"), Finish("stop")] == read(
        text("a\ud83d"), text("\ude00"), inferred("a\ud83d\ude00"), ended("a\U0001f600")
    )


@pytest.mark.parametrize(
    "where",
    [
        lambda end: end,
        lambda end: end["event"]["payload"],
        lambda end: end["event"]["payload"]["turn"],
        lambda end: end["event"]["payload"]["turn"]["output_message"],
    ],
)
def test_usage_is_told_where_there_is_any(where):
    """Wherever its metrics are; what is no count counts as none."""
    end = ended("a")
    where(end)["metrics"] = [
        {"metric": "prompt_tokens", "value": 12, "unit": None},
        {"metric": "completion_tokens", "value": 7},
        {"metric": "total_tokens", "value": 19},
        {"metric": None, "value": "x"},
        "odd",
    ]

    assert Finish("stop", Usage(input_tokens=12, output_tokens=7)) == read(end)[-1]


def test_done_is_welcome_after_the_end():
    """Some proxies write it."""
    produced, error = play(make, [sse(ended("a")) + b"data: [DONE]\n\n"])

    assert (Finish("stop"), None) == (produced[-1], error)


# Whatever the server sends

FULL = [
    chunk("turn_start", turn_id="t1"),
    started("shield_call", "s0"),
    shielded(None),
    started(),
    text("Let "),
    text("me."),
    called("[look", "in_progress"),
    called(LOOKED),
    called(KNOCKED),
    inferred("", LOOKED, KNOCKED),
    started("tool_execution", "s2"),
    chunk("step_progress", "tool_execution", delta={"type": "tool_call", "tool_call": LOOKED}),
    executed([LOOKED], [told(LOOKED, [{"type": "text", "text": "open"}])]),
    RETRIEVED,
    shielded({"violation_level": "error", "user_message": "No.", "metadata": {"a": 1}}),
    started(step_id="s4"),
    waits(KNOCKED, metrics=[{"metric": "prompt_tokens", "value": 1}]),
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=3)
    | st.sampled_from(["\ud83d", "s1", "c1", "failed", "text", "tool_call"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_field_breaks_the_machine(data):
    """A real turn in which any field is replaced by anything, missing, or told twice."""
    frames = json.loads(json.dumps(copy.deepcopy(FULL)))
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()) and frames:
            frames.insert(
                data.draw(st.integers(0, len(frames))), data.draw(st.sampled_from(frames))
            )
            frames = json.loads(json.dumps(frames))
        *path, last = data.draw(st.sampled_from(list(places(frames))))
        holder: Any = frames
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(JSON)
        else:
            del holder[last]
    written = sse(*frames)
    ids = data.draw(st.sampled_from([(), ("c1",), ("c1", "c2")]))
    asked = Asked("s", 1, frozenset(ids))

    produced, error = play(make, [asked, written])
    check(produced, error)
    half = data.draw(st.integers(0, len(written)))
    again = play(make, [asked, written[:half], written[half:]])
    assert (produced, error and error.message) == (again[0], again[1] and again[1].message)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([*FULL, ended("Let me."), {"error": {"message": "x"}}]) | JSON))
def test_no_order_breaks_the_machine(frames):
    """Chunks of a turn, and any other, in any order."""
    check(*play(make, [sse(*frames)]))


def test_deep_arguments_do_not_break_the_machine():
    """Arguments nested deeper than can be written again are text."""
    deep = "[" * 5_000 + "]" * 5_000
    call = LOOKED | {"arguments": deep}

    (begun, *_) = read(executed([call], [told(call, "a")]), ended(), every=5_000)
    assert json_of(deep) == begun.arguments


# What is asked ------------------------------------------------------------------------------------

LOOK = ToolSpec(
    "look",
    "Looks.",
    {
        "type": "object",
        "properties": {
            "at": {"type": "string", "description": "Where."},
            "n": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "required": ["at"],
    },
)


def test_an_agent_is_configured_by_the_prompt():
    """The model, what it is told to be, and its tools, for old servers and new ones."""
    prompt = Prompt(
        "m", (SystemMessage("Be brief."), UserMessage("Hi."), SystemMessage("Be.")), (LOOK,)
    )

    assert {
        "model": "m",
        "instructions": "Be brief.\n\nBe.",
        "client_tools": [
            {
                "name": "look",
                "description": "Looks.",
                "parameters": [
                    {
                        "name": "at",
                        "parameter_type": "string",
                        "description": "Where.",
                        "required": True,
                    },
                    {
                        "name": "n",
                        "parameter_type": "string",
                        "description": "",
                        "required": False,
                    },
                ],
                "input_schema": LOOK.parameters,
            }
        ],
        "enable_session_persistence": False,
    } == LlamaStackProvider().config(prompt)


def test_options_are_put_over_the_configuration():
    """None leaves a field out."""
    provider = LlamaStackProvider(
        options={"toolgroups": ["builtin::rag"], "client_tools": None, "model": "n"}
    )

    assert {
        "model": "n",
        "instructions": "",
        "enable_session_persistence": False,
        "toolgroups": ["builtin::rag"],
    } == provider.config(Prompt("m", ()))


def test_the_key_is_a_bearer_token_and_is_not_shown():
    """A server that asks for none is sent none."""
    keyed = LlamaStackProvider(key="k-12345678")

    assert {"authorization": "Bearer k-12345678"} == keyed.request("/x", {}).headers
    assert {} == LlamaStackProvider().request("/x", {}).headers
    assert "k-12345678" not in repr(keyed)
    assert "http://127.0.0.1:8321/v1/x" == LlamaStackProvider().request("/x", {}).url


def test_it_is_made_by_its_kind(monkeypatch):
    """At home unless told otherwise, and without a key unless one is named."""
    monkeypatch.setenv("STACK_KEY", "k-12345678")
    at_home = make_provider("llama_stack")
    elsewhere = make_provider(
        "llama_stack",
        name="stack",
        base_url="http://h:1/v1alpha/",
        key_env="STACK_KEY",
        options={"toolgroups": ["t"]},
        omit=["client_tools"],
    )

    assert LlamaStackProvider() == at_home
    options = {"toolgroups": ["t"], "client_tools": None}
    assert elsewhere == LlamaStackProvider(
        "stack", "http://h:1/v1alpha", "k-12345678", options=options
    )
    assert make_provider("llama_stack", tool_calls="taught").teach
    with pytest.raises(ConfigError, match="expected a key in the environment variable NO_KEY"):
        make_provider("llama_stack", key_env="NO_KEY")


# Over sockets -------------------------------------------------------------------------------------


@attrs.frozen
class Listener:
    """The least that a provider may know of a run."""

    window: float = 0.0

    async def sleep_until(self, when):
        """Wait."""
        await trio.sleep_until(when)

    def lull(self):
        """Do nothing."""


@asynccontextmanager
async def connected(turns=(), *, making=None, **fields):
    """A server, and a connection to it."""
    with trio.fail_after(PATIENCE):
        async with open_llama_stack(turns, making=making) as stack:
            provider = LlamaStackProvider("up", stack.base_url, **fields)
            async with provider.open(Listener()) as connection:
                yield stack, connection
            await stack.wait_until(lambda: not stack.open_connections)


async def call(connection, prompt):
    """Make a call, and return what it produced."""
    produced, machine = [], connection.normalizer("m1")
    async with connection.stream(prompt) as chunks:
        async for one in chunks:
            produced += machine.feed(one)
    return [*produced, *machine.close()]


async def failed(connection, prompt):
    """Make a call that fails, and return its error."""
    with pytest.raises(ProviderError) as caught:
        await call(connection, prompt)
    return caught.value


def said(produced):
    """What the model will be told that it has said."""
    parts = [one for one in produced if isinstance(one, PartFinished)]
    calls = tuple(
        ToolCall(one.call_id, one.name, one.text) for one in parts if one.kind == "tool_call"
    )
    told_ = "".join(one.text for one in parts if one.kind != "tool_call")
    return AssistantMessage(told_, calls, produced[-1].echo)


HI = UserMessage("Hi.")
ASKED = Prompt("m", (SystemMessage("Be brief."), HI), (LOOK,))


def user(content):
    return {"role": "user", "content": content}


async def test_the_first_turn_makes_an_agent_and_a_session():
    """Each by a request of its own, over one connection; the turn is a stream."""
    async with connected([Turn(["He", "llo."])], key="k-12345678") as (stack, connection):
        assert [] == stack.requests
        produced = await call(connection, ASKED)

        assert [*part(1, "text", "He", "llo.")] == produced[:-1]
        assert ("stop", 1) == (produced[-1].reason, stack.open_connections)
        made, opened, turn = stack.requests
        assert ("/v1/agents", connection.provider.config(ASKED)) == (
            made.path,
            made.body["agent_config"],
        )
        assert ("/v1/agents/agent-1/session", {"session_name": "agentsse"}) == (
            opened.path,
            opened.body,
        )
        assert "/v1/agents/agent-1/session/session-1/turn" == turn.path
        assert {"messages": [user("Hi.")], "stream": True} == turn.body
        assert ["Bearer k-12345678"] * 3 == [one.headers["authorization"] for one in stack.requests]
        assert ["application/json"] * 2 + ["text/event-stream"] == [
            one.headers["accept"] for one in stack.requests
        ]


async def test_a_later_turn_brings_only_what_is_new():
    """The session knows the rest."""
    async with connected([Turn("Hello."), Turn("Fine.")]) as (stack, connection):
        answer = said(await call(connection, ASKED))
        later = (*ASKED.messages, answer, UserMessage("How?"), UserMessage("Well?"))
        await call(connection, attrs.evolve(ASKED, messages=later))

        assert 4 == len(stack.requests)
        assert stack.asked[0].path == stack.asked[1].path
        assert [user("How?"), user("Well?")] == stack.asked[1].body["messages"]


async def test_results_of_tools_resume_the_turn_that_waits_for_them():
    """All of them at once, by the ids of their calls; they are not told again."""
    calls = [Call("look", '{"at":"door"}'), Call("look", '{"at":"roof"}')]
    async with connected([Turn(calls=calls), Turn("Open.")]) as (stack, connection):
        produced = await call(connection, ASKED)
        answer = said(produced)
        assert ("tool_calls", 2) == (produced[-1].reason, len(answer.tool_calls))
        results = [ToolMessage(one.call_id, "look", '"open"') for one in answer.tool_calls]
        later = (*ASKED.messages, answer, *results)
        produced = await call(connection, attrs.evolve(ASKED, messages=later))

        assert [*part(1, "text", "Open.")] == produced[:-1]
        assert "/v1/agents/agent-1/session/session-1/turn/turn-1/resume" == stack.asked[1].path
        assert {
            "tool_responses": [
                {"call_id": f"turn-1-call-{n}", "tool_name": "look", "content": '"open"'}
                for n in (1, 2)
            ],
            "stream": True,
        } == stack.asked[1].body


async def test_results_beside_other_news_are_a_turn():
    """What resumes a turn has no place for what people say meanwhile."""
    async with connected([Turn(calls=[Call("look")]), Turn("So?")]) as (stack, connection):
        answer = said(await call(connection, ASKED))
        result = ToolMessage("turn-1-call-1", "look", '"open"')
        later = (*ASKED.messages, answer, result, UserMessage("Stop."))
        await call(connection, attrs.evolve(ASKED, messages=later))

        assert stack.asked[0].path == stack.asked[1].path
        tool = {"role": "tool", "call_id": "turn-1-call-1", "tool_name": "look"}
        assert [{**tool, "content": '"open"'}, user("Stop.")] == stack.asked[1].body["messages"]


TOLD = """[user]
Hi.

[assistant]
Hello.

[assistant called look, c1]
{"at":"door"}

[result of look, c1]
"open"

[error of look, c2]
gone

[user]
So?"""


async def test_a_conversation_from_elsewhere_is_told_as_one_text():
    """A new session has messages of users alone, so it says who has spoken."""
    spoken = (
        AssistantMessage("Hello.", (ToolCall("c1", "look", '{"at":"door"}'),)),
        ToolMessage("c1", "look", '"open"'),
        ToolMessage("c2", "look", "gone", is_error=True),
        SystemMessage("Be."),
        AssistantMessage(""),
        UserMessage("So?"),
    )
    prompt = attrs.evolve(ASKED, messages=(*ASKED.messages, *spoken))
    async with connected([Turn("a")]) as (stack, connection):
        await call(connection, prompt)

        assert [user(TOLD)] == stack.asked[0].body["messages"]


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: (*ASKED.messages, attrs.evolve(answer, echo=None), HI),
        lambda answer: (*ASKED.messages, attrs.evolve(answer, echo=Echo("other", [])), HI),
        lambda answer: (*ASKED.messages, answer, AssistantMessage("b"), HI),
        lambda answer: (*ASKED.messages, answer),
        lambda _answer: ASKED.messages,
    ],
    ids=["no echo", "another kind", "another answer since", "nothing new", "the same again"],
)
async def test_where_they_do_not_agree_a_new_session_is_told_everything(change):
    """The agent is the same."""
    async with connected([Turn("a"), Turn("b")]) as (stack, connection):
        answer = said(await call(connection, ASKED))
        await call(connection, attrs.evolve(ASKED, messages=change(answer)))

        assert ["agent-1", "agent-1"] == [*stack.sessions.values()]
        assert "/session/session-2/turn" in stack.asked[1].path
        assert "Hi." in stack.asked[1].body["messages"][0]["content"]


async def test_another_model_is_another_agent():
    """So are other tools, and other instructions."""
    async with connected([Turn("a"), Turn("b")]) as (stack, connection):
        answer = said(await call(connection, ASKED))
        later = (*ASKED.messages, answer, HI)
        await call(connection, attrs.evolve(ASKED, model="n", messages=later))

        assert ["m", "n"] == [config["model"] for config in stack.agents.values()]
        assert "/v1/agents/agent-2/session/session-2/turn" == stack.asked[1].path


async def test_after_a_turn_that_failed_a_new_session_is_told_everything():
    """Nobody knows what the old one has kept of it."""
    failing = Turn("abc", failure=Failure("server_error", after=3))
    async with connected([Turn("a"), failing, Turn("b")]) as (stack, connection):
        answer = said(await call(connection, ASKED))
        later = attrs.evolve(ASKED, messages=(*ASKED.messages, answer, HI))
        assert "server_error" == (await failed(connection, later)).code
        await call(connection, later)

        sessions = [one.path.split("/")[5] for one in stack.asked]
        assert ["session-1", "session-1", "session-2"] == sessions
        assert ["agent-1"] == [*stack.agents]


@asynccontextmanager
async def answering(*answers):
    """A server that gives these answers, one to each request, and a connection to it."""
    heard, left = [], list(answers)

    async def serve(stream):
        received = b""
        async with stream:
            while left:
                while not received.endswith(b"}"):
                    received += await stream.receive_some()
                heard.append(received.split(b" ", 2)[1].decode())
                received = b""
                await stream.send_all(left.pop(0))

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(
                functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
            )
            port = listeners[0].socket.getsockname()[1]
            key = "k-12345678"
            provider = LlamaStackProvider("up", f"http://127.0.0.1:{port}/v1", key)
            async with provider.open(Listener()) as connection:
                yield heard, connection
            nursery.cancel_scope.cancel()


def whole(body, status="200 OK", **headers):
    """The bytes of an answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


async def test_ids_of_the_server_are_parts_of_a_path():
    """Whatever is in them."""
    made = [whole({"agent_id": "a/b?c"}), whole({"session_id": "\u00e9 d"}, "201 Created")]
    async with answering(*made, whole(sse(ended("a")))) as (heard, connection):
        await call(connection, ASKED)

    path = "/v1/agents/a%2Fb%3Fc/session"
    assert ["/v1/agents", path, f"{path}/%C3%A9%20d/turn"] == heard


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (whole({"id": "x"}), "malformed", "expected POST /agents to answer with agent_id, got '{"),
        (whole(b"<h1>Hi</h1>"), "malformed", "is base_url right?"),
        (whole({"agent_id": ""}), "malformed", "agent_id"),
        (whole({"detail": "Not Found"}, "404 N"), "not_found", ": Not Found; is base_url right?"),
        (whole({"detail": {"a": 1}}, "404 N"), "not_found", '{"a":1}; is base_url right?'),
        (whole(b"", "302 F", location="/x"), "bad_request", "is base_url right?"),
        (whole({"detail": "k-12345678 is none"}, "401 U"), "auth", "[redacted] is none"),
        (whole({"error": {"message": "no"}}, "403 F"), "auth", "no"),
        (whole({"error": {"detail": "no"}}, "400 B"), "bad_request", '{"detail":"no"}'),
        (whole(b"<p>bad gateway</p>", "502 B"), "server_error", "bad gateway"),
        (whole({"detail": "busy"}, "503 S", retry_after="7"), "overloaded", "busy"),
        (b"", "incomplete", ""),
    ],
)
async def test_an_agent_that_cannot_be_made_is_an_error(answer, code, words):
    """It says what the server has said, without the key."""
    async with answering(answer) as (_, connection):
        error = await failed(connection, ASKED)

    assert code == error.code
    assert words in error.message
    assert "k-1234" not in error.message
    assert error.retry_after == (7 if b"retry-after" in answer else None)


async def test_a_session_that_cannot_be_made_is_an_error():
    """The agent that was made is used by the next call."""
    making = {"session": [Turn(instead=Refusal("overloaded"))]}
    async with connected([Turn("a")], making=making) as (stack, connection):
        assert "overloaded" == (await failed(connection, ASKED)).code
        assert "Stop" not in said(await call(connection, ASKED)).text

        assert 1 == len(stack.agents)


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        (Turn(instead=Refusal("auth")), "auth"),
        (Turn(instead=Refusal("rate_limit", retry_after="3")), "rate_limit"),
        (Turn(instead=Refusal("context_length")), "context_length"),
        (Turn(instead=Page()), "malformed"),
        (Turn(instead=Cut()), "incomplete"),
        (Turn("abc", ends=Cut(after=2, how="rst")), "incomplete"),
        (Turn("abc", ends=Cut(after=2, inside=9)), "incomplete"),
        (Turn("abc", ends=Stop(after=2)), "incomplete"),
        (Turn("abc", ends=Stop(after=0)), "incomplete"),
        (Turn("abc", has_end=False), "incomplete"),
        (Turn("abc", failure=Failure("overloaded", after=2)), "overloaded"),
        (Turn("abc", failure=Failure("server_error")), "server_error"),
        (Turn(failure=Failure("not_found", after=0)), "not_found"),
    ],
    ids=str,
)
async def test_a_turn_that_goes_wrong_is_an_error(turn, code):
    """Whenever it does."""
    async with connected([turn]) as (_, connection):
        assert code == (await failed(connection, ASKED)).code


async def test_a_server_that_was_restarted_knows_no_session():
    """It says so in the stream; that is final, and blanked like any error."""
    async with connected([Turn("a")], key="session-1") as (stack, connection):
        answer = said(await call(connection, ASKED))
        stack.sessions.clear()
        later = attrs.evolve(ASKED, messages=(*ASKED.messages, answer, HI))
        error = await failed(connection, later)

        assert ("not_found", True) == (error.code, error.is_final)
        assert "Session '[redacted]' not found" in error.message


@pytest.mark.parametrize("style", ["usual", "sparse", "chatty"])
def test_turns_of_every_style_are_read_alike(style):
    """What differs between servers is not what they say."""
    usage = Usage(input_tokens=12, output_tokens=7) if style == "chatty" else Usage()
    turn = Turn(
        ["It is ", "open."],
        steps=[
            ShieldCall(),
            Inference(["Hm."], [Call("peek", '{"n":1}', "k1")]),
            ToolExecution([(Call("peek", '{"n":1}', "k1"), [{"type": "text", "text": "open"}])]),
        ],
        style=style,
    )
    frames = turn_frames(turn)
    produced, error = however_cut(make, b"".join(frames), every=11)

    check(produced, error)
    told_ = [one for one in produced if not isinstance(one, ProviderEvent)]
    peek = {"call_id": "k1", "tool_name": "peek", "arguments": '{"n":1}'}
    assert [
        Moderation(violation=False),
        *part(1, "text", "Hm."),
        *ran(peek, [{"type": "text", "text": "open"}]),
        *part(2, "text", "It is ", "open."),
        Finish("stop", usage),
    ] == told_
    assert (style == "chatty") == (len(produced) > len(told_))


def test_an_unparsed_call_of_the_server_is_text():
    """As it tells it, in pieces and again."""
    turn = Turn(steps=[Inference(unparsed="<look door>")], line_end=b"\r\n")

    produced, _ = play(make, turn_frames(turn))
    assert [*part(1, "text", "<look door>"), Finish("stop")] == produced


# Runs


@asynccontextmanager
async def serving(turns, *, tools=(), limits=QUICK, making=None, **options):
    """Open a Llama Stack server, and a server with an agent that asks it."""
    with trio.fail_after(PATIENCE):
        async with open_llama_stack(turns, making=making) as stack:
            provider = make_provider("llama_stack", name="up", base_url=stack.base_url)
            chat = Agent.of_model("chat", "up:m", provider=provider, tools=tools, **options)
            async with open_server(chat, settings=Settings(limits=limits)) as server:
                async with connect(server.urls[0]) as client:  # what is made at first use, now
                    await client.send(stream_run("nobody"))
                    await client.finish()
                before = await wait_quiet(server)
                yield stack, server
                await stack.wait_until(lambda: not stack.open_connections)
                assert before == await wait_quiet(server)


async def ask(server, input="Hi.", **fields):
    """Stream a run to its end, and return its events."""
    async with connect(server.urls[0]) as client:
        await client.send(stream_run("chat", json.dumps({"input": input, **fields}).encode()))
        await client.finish()
    assert isinstance(client.events[-1], RunFinished)
    return client.events


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def texts(events, kind="text"):
    return [event.text for event in of(events, PartFinished) if event.kind == kind]


@pytest.mark.parametrize("style", ["usual", "sparse", "chatty"])
async def test_a_run_says_what_the_turn_says(style):
    """Piece by piece, and once."""
    async with serving([Turn(["Kube", "rnetes"], style=style)]) as (stack, server):
        events = await ask(server, "What?")

        assert ("success", b'"Kubernetes"') == (events[-1].outcome, bytes(events[-1].result))
        assert ["Kubernetes"] == texts(events)
        assert [user("What?")] == stack.asked[0].body["messages"]
        assert (3, 0) == (len(stack.requests), stack.hangups)


@pytest.mark.parametrize("style", ["usual", "sparse", "chatty"])
async def test_a_run_calls_tools_of_ours_side_by_side(style):
    """The turn awaits them, and goes on with their results; each is told once."""
    calls = [Call("look_up", '{"word":"a"}', "k1"), Call("look_up", '{"word":"b"}', "k2")]
    turns = [Turn("Let me.", calls=calls, style=style), Turn("Done.", style=style)]
    async with serving(turns, tools=[look_up]) as (stack, server):
        events = await ask(server)

        assert ("success", b'"Done."') == (events[-1].outcome, bytes(events[-1].result))
        assert ["Let me.", "Done."] == texts(events)
        assert ["k1", "k2"] == sorted(event.call_id for event in of(events, ToolStarted))
        assert [("k1", "local"), ("k2", "local")] == sorted(
            (event.call_id, event.source) for event in of(events, ToolFinished)
        )
        first, second = (request.path for request in stack.asked)
        assert f"{first}/turn-1/resume" == second
        responses = stack.asked[1].body["tool_responses"]
        assert ['"what a means"', '"what b means"'] == [one["content"] for one in responses]
        assert ["look_up"] == [tool["name"] for tool in stack.agents["agent-1"]["client_tools"]]
        assert ["tool_calls", "stop"] == [
            event.finish_reason for event in of(events, StepFinished) if event.kind == "model"
        ]


async def test_call_ids_that_come_again_begin_a_new_session():
    """Our names of such calls mean nothing to the server, so it is told everything."""
    same = Turn(calls=[Call("look_up", '{"word":"a"}', "k1")])
    async with serving([same, same, Turn("Done.")], tools=[look_up]) as (stack, server):
        events = await ask(server)

        assert ["Done."] == texts(events)
        assert 2 == len({event.call_id for event in of(events, ToolStarted)})
        assert [("turn-1/resume"), "turn"] == [
            stack.asked[1].path.partition("turn/")[2],
            stack.asked[2].path.rpartition("/")[2],
        ]
        assert "[result of look_up, k1]" in stack.asked[2].body["messages"][0]["content"]


async def test_a_run_shows_tools_of_the_server():
    """They run there; nothing is called here."""
    peek = Call("peek", '{"n":1}')
    turn = Turn("Two.", steps=[Inference(calls=[Call("hum"), peek]), ToolExecution([(peek, "2")])])
    async with serving([turn], tools=[look_up]) as (stack, server):
        events = await ask(server)

        (tool,) = of(events, ToolFinished)
        assert ("peek", b'"2"', "provider") == (tool.name, bytes(tool.result), tool.source)
        assert ["Two."] == texts(events)
        assert [] == texts(events, "tool_call")
        assert 1 == len(stack.asked)


async def test_a_violation_ends_a_run_with_a_refusal():
    """The run has an answer: that there is none, and why."""
    async with serving([Turn(steps=[ShieldCall("Not that.", {"a": 1})])]) as (_, server):
        events = await ask(server)

        (seen,) = of(events, Moderation)
        assert (True, "Not that.", b'{"a":1}') == (
            seen.violation,
            seen.message,
            bytes(seen.metadata),
        )
        assert ["Not that."] == texts(events, "refusal")
        assert [] == texts(events)
        assert ("success", b'"Not that."') == (events[-1].outcome, bytes(events[-1].result))
        (step,) = of(events, StepFinished)
        assert "content_filter" == step.finish_reason


async def test_what_nobody_understands_is_in_the_stream():
    """A memory retrieval, for instance."""
    async with serving([Turn("So.", steps=[MemoryRetrieval("facts")])]) as (_, server):
        events = await ask(server)

        assert ["llama_stack"] * 2 == [event.provider for event in of(events, ProviderEvent)]
        assert b'"inserted_context":"facts"' in bytes(of(events, ProviderEvent)[1].raw)
        assert ["So."] == texts(events)


async def test_an_error_in_mid_stream_ends_the_run_and_keeps_what_was_said():
    """Nothing is tried again behind what was shown."""
    turn = Turn(["ab", "cd"], failure=Failure("server_error", after=3))
    async with serving([turn, Turn("again")]) as (stack, server):
        events = await ask(server)

        assert ("error", "server_error") == (events[-1].outcome, events[-1].error.code)
        assert ["ab"] == texts(events)
        assert ([], 1) == (of(events, Retry), len(stack.asked))


async def test_an_error_before_anything_was_shown_is_tried_again():
    """In a new session, by the same agent."""
    turns = [Turn(failure=Failure("overloaded", after=1)), Turn("here")]
    making = {"agent": [Turn(instead=Refusal("overloaded", retry_after="0"))]}
    async with serving(turns, making=making) as (stack, server):
        events = await ask(server)

        assert ["overloaded", "overloaded"] == [event.error.code for event in of(events, Retry)]
        assert ["here"] == texts(events)
        assert 2 == len(stack.sessions)


async def test_a_thread_is_told_to_a_new_session():
    """Each run has its own."""
    async with serving([Turn("a"), Turn("b")]) as (stack, server):
        await ask(server, "Who?", thread_id="t")
        events = await ask(server, "Really?", thread_id="t")

        assert ["b"] == texts(events)
        assert [user("[user]\nWho?\n\n[assistant]\na\n\n[user]\nReally?")] == (
            stack.asked[1].body["messages"]
        )
        assert 2 == len(stack.sessions)


@pytest.mark.parametrize(
    ("turn", "making", "sign"),
    [
        (Turn("abc", ends=Hang(after=3)), None, b"part_delta"),
        (Turn("abc", first=1_000.0), None, b"step_started"),
        (Turn("abc", before=1_000.0), None, b"step_started"),
        (Turn("abc"), {"agent": [Turn(before=1_000.0)]}, b"step_started"),
        (Turn("abc"), {"session": [Turn(before=1_000.0)]}, b"step_started"),
    ],
    ids=["mid-stream", "before the first chunk", "before the head", "an agent", "a session"],
)
@pytest.mark.parametrize("way", ["fin", "rst", "cancel"])
async def test_a_client_that_leaves_closes_the_upstream_socket(turn, making, sign, way):
    """Wherever the turn is; nobody is waited for."""
    async with serving([turn], making=making) as (stack, server):
        async with connect(server.urls[0]) as client:
            await client.send(stream_run("chat", b'{"input":"Hi."}'))
            while sign not in client.body:
                await client.receive()
            at = ("agent", "session").index(*making) + 1 if making else 3
            await stack.wait_until(lambda: stack.open_streams == 1 and len(stack.requests) == at)
            (run,) = server.runs
            match way:
                case "fin":
                    await client.leave_by_fin()
                case "rst":
                    client.leave_by_rst()
                case _:
                    run.cancel("client_cancel")
            await stack.wait_hangups()
            await run.done.wait()
        cause = "client_cancel" if way == "cancel" else "disconnect"
        assert ("cancelled", cause) == (run.end.outcome, run.end.receipt.cause)


async def test_a_turn_that_does_not_end_its_response_is_over_all_the_same():
    """The run waits a moment for it, and leaves."""
    limits = LimitSettings(stall=0.4, liveness=0.1)
    async with serving([Turn("abc", ends=Hang(after=None))], limits=limits) as (stack, server):
        events = await ask(server)

        assert ("success", ["abc"]) == (events[-1].outcome, texts(events))
        await stack.wait_hangups()


async def test_a_server_that_falls_silent_is_left():
    """The watch over the run says so."""
    limits = LimitSettings(stall=0.3, liveness=0.1)
    async with serving([Turn("abc", ends=Hang(after=3))], limits=limits) as (stack, server):
        events = await ask(server)

        assert ("error", "stalled") == (events[-1].outcome, events[-1].error.code)
        await stack.wait_hangups()


async def test_requests_that_the_server_does_not_know_are_refused():
    """The fake is as strict as the real one: paths, agents, results that nobody waits for."""
    async with connected([Turn(calls=[Call("look")])]) as (stack, connection):
        for path, status in [("/nothing", 404), ("/agents/x/session", 404)]:
            async with connection.client.post(
                stack.base_url + path, headers={}, body=b'{"session_name":"x"}'
            ) as response:
                assert status == response.status
                await response.read_some(1_000)
        answer = said(await call(connection, ASKED))
        twice = [ToolMessage("turn-1-call-1", "look", "a")] * 2
        later = attrs.evolve(ASKED, messages=(*ASKED.messages, answer, *twice))
        error = await failed(connection, later)
        assert "does not wait for these results" in error.message
        assert "expected no more turns" in (await failed(connection, ASKED)).message
        url = stack.base_url.removesuffix("/v1") + stack.asked[0].path
        async with connection.client.post(url, headers={}, body=b"{}") as response:
            assert b"expected stream: true" in await response.read_some(1_000)


async def test_a_script_may_be_a_function_of_the_request():
    """It sees what was asked."""
    async with connected([lambda request: Turn(request.body["messages"][0]["content"])]) as (
        _,
        connection,
    ):
        assert "Hi." == said(await call(connection, ASKED)).text


# Wherever a cancel strikes


TURNS = (
    Turn(instead=Refusal("overloaded")),
    Turn(
        calls=[Call("look_up", '{"word":"a"}', "k1"), Call("look_up", '{"word":"b"}', "k2")],
        steps=[ShieldCall(), ToolExecution([(Call("peek"), "1")])],
        gap=0.02,
        first=0.1,
    ),
    Turn(["It ", "is."], gap=0.02, before=0.1),
)


@attrs.define
class Wires:
    """Connections in memory, to one server."""

    stack: LlamaStack
    nursery: trio.Nursery

    async def open_tcp(self, _host, _port):
        """Connect."""
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.stack.answer, theirs)
        return ours


def play_run(blow, strike):
    """Play the scenario once; see that nothing is left, and everything is told.

    Returns:
        The run.
    """
    stack, got = LlamaStack(TURNS), []

    async def everything():
        living = trio.lowlevel.current_statistics().tasks_living
        trio._core._run._r.seed(0)
        random.seed(0)  # the jitter of tries
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                wires = Wires(stack, nursery)
                client = functools.partial(open_http, open_tcp=wires.open_tcp)
                provider = LlamaStackProvider("up", "http://up/v1", open_client=client)
                chat = Agent.of_model("chat", "up:m", tools=[look_up])
                async with open_runs(
                    {"chat": chat}, limits=Limits(), providers={"up": provider}
                ) as runs:
                    run, _ = runs.start(
                        Start(agent="chat", input="Hi.", delivery="stream"), default="continue"
                    )
                    blow.strike = [functools.partial(one, run) for one in strike]
                    nursery.start_soon(follow, run, attach(run), got)
                    if blow.step == 0:
                        blow.fall()
                    await run.done.wait()
                await stack.wait_until(lambda: not stack.open_connections)
        assert living == trio.lowlevel.current_statistics().tasks_living
        return runs, run

    clock = trio.testing.MockClock(autojump_threshold=0)
    runs, run = trio.run(everything, clock=clock, instruments=[blow])
    assert [] == blow.errors
    assert set() == blow.alive
    assert (0, 0) == (stack.open_connections, stack.open_streams)
    assert [encode_event(event) for event in run.log.events] == got
    see_that_it_is_whole(run, runs)
    return run


def test_the_scenario_plays_to_its_end(same_steps):
    """Nobody strikes: it is refused, tries again, calls tools and answers; twice the same way."""
    blows = [Blow(step=0) for _ in range(2)]
    for blow in blows:
        run = play_run(blow, [by_nothing])
        assert ("success", "It is.") == (run.end.outcome, run.result)
        assert 1 == sum(isinstance(event, Retry) for event in run.log.events)
    assert blows[0].count == blows[1].count > 50


@pytest.mark.parametrize("strike", [by_cancel, from_outside])
def test_a_cancel_at_any_step_of_a_turn_leaves_nothing(strike, same_steps):
    """The upstream connection is closed, wherever it was; what was begun has its end."""
    outcomes = []
    for step in itertools.count():
        blow = Blow(step)
        run = play_run(blow, [strike])
        if blow.strike:
            break
        outcomes.append(run.end.outcome)
        assert 0 <= run.end.receipt.seconds < 0.1
    assert "success" == run.end.outcome
    assert len(outcomes) > 50
    assert ["cancelled", "success"] == [outcome for outcome, _ in itertools.groupby(outcomes)]
    gc.collect()  # an async generator that was left behind would be reported now
