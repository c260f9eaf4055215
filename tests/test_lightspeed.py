"""lightspeed's protocol: both forms byte for byte, its requests, and a page that reads it.

The encoders are fed events by hand; over sockets there is a real server, and a client that reads
frames as PatternFly's chat does: data alone, each a JSON object that says what it is.
"""

import base64
import json
import uuid
from contextlib import asynccontextmanager
from functools import partial

import attrs
import httpx2
import msgspec
import pytest
import trio
from msgspec import Raw
from raw import connect, request, wait_until

from agentsse.agents import Agent, agent
from agentsse.config import DialectSettings, LimitSettings, Settings
from agentsse.dialects import Cancel, Request, Start
from agentsse.dialects.lightspeed import (
    LIGHTSPEED,
    REFUSAL,
    STOPPED,
    LightspeedEncoder,
    SeedEncoder,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import AgentError, ProviderError, Unprocessable
from agentsse.events import (
    EVENT_TYPES,
    NULL,
    AgentStarted,
    Compacted,
    Custom,
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
    ProviderEvent,
    Question,
    Receipt,
    RunFinished,
    RunSnapshot,
    RunStarted,
    StepFinished,
    StepStarted,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    Usage,
)
from agentsse.messages import AssistantMessage, SystemMessage, UserMessage
from agentsse.providers import Finish
from agentsse.testing import ScriptedProvider, ask_for, open_server, say
from agentsse.tools import tool

SECONDS = 30  # for a whole test; what it waits for takes milliseconds
RUN_ID = "0123456789abcdef0123456789abcdef"
REQUEST_ID = "01234567-89ab-cdef-0123-456789abcdef"
USAGE = Usage(input_tokens=11, output_tokens=19)
DEEP = b"[" * 100_000 + b"]" * 100_000  # deeper than Python can read
_METADATA = (  # as Python writes it
    "{'docs_url': 'https://d/1', 'title': 'Doc1', 'document_id': 'd1', 'score': 0.5}",
    "{'docs_url': 'https://d/2', 'title': \"What's new\", 'source': 'ocp', 'document_id': 'd2'}",
    "{'title': 'No address', 'document_id': 'd3'}",
    "{'docs_url': 'https://d/1', 'title': 'Doc1', 'document_id': 'd1'}",
)
FOUND = (
    "knowledge_search tool found 2 chunks:\nBEGIN of knowledge_search tool results.\n",
    *(f"Result\nContent: some\nMetadata: {metadata}\n" for metadata in _METADATA),
    "END of knowledge_search tool results.\n",
)


# What tests are made of


@attrs.define
class ChatReader:
    """What a chat page does with the bytes: lines of data, each JSON that names its event."""

    rest: str = ""
    comments: list = attrs.field(factory=list)
    frames: list = attrs.field(factory=list)

    def feed(self, text):
        """Take more of the response."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.startswith("data: "):
                self.frames.append(json.loads(line.removeprefix("data: ")))
            elif line:
                self.comments.append(line)

    @property
    def names(self):
        """What has come, by name."""
        return [frame["event"] for frame in self.frames]

    @property
    def text(self):
        """The answer, as the page shows it."""
        return "".join(self.data("token", "token"))

    def data(self, name, field=None):
        """The data of frames of one name, or one field of it."""
        data = [frame["data"] for frame in self.frames if frame["event"] == name]
        return data if field is None else [each[field] for each in data]

    @property
    def ids(self):
        """The ids of tokens and of what completes them."""
        return [
            frame["data"]["id"]
            for frame in self.frames
            if frame["event"] in ("token", "turn_complete", "heartbeat", "error")
            and "id" in frame["data"]
        ]


def encoder_of(form):
    return LIGHTSPEED.encoder(form)


def encoded(*events, form="current"):
    """What an encoder makes of events, as bytes."""
    encoder = encoder_of(form)
    frames = [frame for event in events for frame in encoder.feed(event)]
    assert all(frames)
    return b"".join(frames)


def read(*events, form="current"):
    """The same as a page reads it."""
    reader = ChatReader()
    reader.feed(encoded(*events, form=form).decode())
    assert "" == reader.rest
    assert [] == reader.comments
    return reader


def plain(*events, form="current"):
    """The frames behind the start, as pairs of a name and its data."""
    first, *frames = read(started(), *events, form=form).frames
    assert "start" == first["event"]
    return [(frame["event"], frame["data"]) for frame in frames]


seed = partial(plain, form="seed")


def printed(*events):
    """The whole stream as text."""
    return encoded(started(), *events, form="text").decode()


def started(thread_id="c-1"):
    return RunStarted(
        run_id=RUN_ID, agent="a", input=NULL, on_disconnect="cancel", thread_id=thread_id
    )


def finished(result=b"null", *, usage=USAGE, outcome="success", error=None, cause=None):
    return RunFinished(
        outcome=outcome,
        usage=usage,
        receipt=Receipt(cause=cause),
        result=Raw(result) if outcome == "success" else msgspec.UNSET,
        error=error,
    )


def failed(code="crashed", message="no luck", status=500):
    return finished(outcome="error", error=Problem(code=code, message=message, status=status))


def stopped(cause="client_cancel", outcome="cancelled"):
    return finished(outcome=outcome, cause=cause)


def delta(text, kind="text", part_id="p1"):
    return PartDelta(part_id=part_id, kind=kind, delta=text)


def part(*deltas, kind="text", part_id="p1", **of_call):
    """A part and all that is in it."""
    return (
        PartStarted(part_id=part_id, kind=kind, **of_call),
        *(delta(text, kind, part_id) for text in deltas),
        PartFinished(part_id=part_id, kind=kind, text="".join(deltas), **of_call),
    )


def step(kind, *within, step_id="s1", name="m:x", **end):
    """A step and what is within it."""
    of = {"step_id": step_id, "kind": kind, "name": name}
    return (StepStarted(**of), *within, StepFinished(**of, **end))


def call(call_id="tc_1", name="get_weather", arguments=b'{"city":"Brno"}'):
    return ToolStarted(call_id=call_id, name=name, arguments=Raw(arguments))


def result(call_id="tc_1", name="get_weather", value=b'"22C"', *, is_error=False, source="local"):
    return ToolFinished(
        call_id=call_id, name=name, result=Raw(value), is_error=is_error, source=source
    )


def as_json(value):
    return msgspec.json.encode(value)


def asked(request_id="q1", *questions):
    return InputRequested(
        request_id=request_id,
        questions=questions or (Question(id="answer", kind="text", prompt="Which one?"),),
    )


def received(request_id="q1"):
    return InputReceived(request_id=request_id, answers=Raw(b'{"answer":"b"}'))


def said(text, usage=USAGE):
    """The lines of a model that says a text, and counts."""
    return [*say(text)[:-1], Finish("stop", usage)]


def model(name, *script, **settings):
    provider = ScriptedProvider(script, name=name)
    return provider, Agent.of_model(name, f"{name}:m", provider=provider, **settings)


# Formatting


def test_a_token_is_these_bytes():
    """As Python's json writes it, data alone: no event, no id."""
    expected = b'data: {"event": "token", "data": {"id": 0, "token": "Hello"}}\n\n'
    assert encoded(started(), delta("Hello")).endswith(b"\n\n" + expected)


def test_a_token_is_ascii_whatever_it_says():
    """Line ends and other letters are escaped."""
    expected = b'data: {"event": "token", "data": {"id": 0, "token": "\\u017elu\\n\\"\\\\"}}\n\n'
    assert encoded(started(), delta('žlu\n"\\')).endswith(expected)


def test_a_token_as_text_is_itself():
    """Nothing else is printed."""
    assert "Hello" == printed(delta("Hello"))
    assert "žluť" == printed(delta("žluť"))


def test_a_tool_call_as_text_has_a_line_of_its_name():
    """Its arguments are not printed."""
    assert "[Tool Call: search]\n" == printed(call(name="search"))


def test_a_tool_result_as_text_is_a_line_that_says_so():
    """What it is stays unsaid."""
    assert "[Tool Call: search]\n[Tool Result]\n" == printed(call(name="search"), result())


def test_what_has_no_text_is_not_printed():
    """Neither a start nor a turn's end, nor anything that the protocol does not know."""
    assert "a" == printed(delta("a"), Custom(name="b", value=NULL), finished(b'"a"'))
    assert "a" + STOPPED == printed(delta("a"), stopped())


def test_the_end_as_text_lists_the_documents():
    """Below a line; where there is none, there is nothing at all."""
    found = result(name="knowledge_search", value=as_json(FOUND))
    assert ("[Tool Result]\na\n\n---\n\nDoc1: https://d/1\nWhat's new: https://d/2") == printed(
        found, delta("a"), finished()
    )
    assert "a" == printed(delta("a"), finished())


def test_an_error_as_text_is_a_line_with_its_status():
    """Status, what it is, and why."""
    assert "Status: 413 - Prompt is too long - no room" == printed(
        failed("context_length", "no room")
    )


def test_a_compaction_is_json_also_where_all_else_is_text():
    """There is no other way to tell of it."""
    expected = (
        'data: {"event": "compaction", '
        '"data": {"status": "completed", "conversation_id": "c-1"}}\n\n'
    )
    compacted = Compacted(ratio_before=0.9, ratio_after=0.2)
    assert expected == printed(compacted)
    assert encoded(started(), compacted).endswith(expected.encode())


def test_streams_say_what_they_are():
    """An event stream with comments for heartbeats, or text, which has no comments."""
    events, text = (decode(media_type=kind).framing for kind in ("application/json", "text/plain"))
    assert "text/event-stream; charset=utf-8" == events.media_type
    assert b": heartbeat\n\n" == events.heartbeat
    assert "text/plain; charset=utf-8" == text.media_type
    assert (b"", None) == (text.prelude, text.heartbeat)


# The current form


def test_a_stream_begins_with_the_ids_of_the_conversation_and_the_request():
    """The thread's as it is, the run's as a UUID."""
    expected = {"event": "start", "data": {"conversation_id": "c-1", "request_id": REQUEST_ID}}
    assert [expected] == read(started()).frames


def test_a_run_without_a_thread_or_with_a_name_of_its_own_has_ids_all_the_same():
    """Runs of other protocols can be read in this one."""
    event = RunStarted(run_id="run-1", agent="a", input=NULL, on_disconnect="cancel")
    expected = {"conversation_id": "run-1", "request_id": "run-1"}
    assert [expected] == read(event).data("start")


def test_an_answer_is_start_tokens_turn_complete_and_end():
    """The ids rise from 0; the beginning of a part is a token too."""
    assert [
        ("token", {"id": 0, "token": ""}),
        ("token", {"id": 1, "token": "Kube"}),
        ("token", {"id": 2, "token": "rnetes"}),
        ("turn_complete", {"id": 3, "token": "Kubernetes"}),
        (
            "end",
            {
                "referenced_documents": [],
                "truncated": None,
                "input_tokens": 11,
                "output_tokens": 19,
            },
        ),
    ] == plain(
        *step("model", *part("Kube", "rnetes"), finish_reason="stop", usage=USAGE),
        finished(b'"Kubernetes"'),
    )


def test_quotas_stand_beside_the_data_of_the_end():
    """There are none; that is an empty object."""
    frame = read(started(), finished()).frames[-1]
    assert {"event", "data", "available_quotas"} == set(frame)
    assert {} == frame["available_quotas"]


def test_a_part_that_says_nothing_is_a_token_still():
    """An empty one, as a page wants to see it."""
    assert [("token", {"id": 0, "token": ""})] == plain(*part())
    assert [("token", {"id": 0, "token": ""})] == plain(delta(""))


def test_what_was_streamed_is_the_answer_where_a_part_ends_without_its_text():
    """The deltas stand."""
    whole = PartFinished(part_id="p1", kind="text", text="")
    reader = read(started(), delta("buf"), delta("fered\n\n"), whole, finished())
    assert ["buffered\n\n"] == reader.data("turn_complete", "token")


def test_reasoning_and_what_else_the_protocol_has_no_word_for_is_not_told():
    """Ignored, and nothing of it is kept."""
    assert [] == plain(
        *part("hm", kind="reasoning"),
        Custom(name="note", value=Raw(b"1")),
        ProviderEvent(provider="m", raw=Raw(b"{}")),
        Liveness(elapsed_s=10, events=1, since_last_output_s=10),
        ToolOutputDelta(call_id="x", delta="1"),
        AgentStarted(agent="b"),
        Moderation(violation=False),
        *step("node", *step("flow")),
    )


def test_a_tool_call_and_its_result_are_told_with_the_id_of_the_call():
    """They take no number of the tokens'."""
    assert [
        ("token", {"id": 0, "token": "a"}),
        (
            "tool_call",
            {
                "id": "tc_1",
                "name": "get_weather",
                "args": {"city": "Brno"},
                "type": "function_call",
            },
        ),
        (
            "tool_result",
            {
                "id": "tc_1",
                "status": "success",
                "content": "22C",
                "type": "function_call_output",
                "round": 1,
            },
        ),
        ("token", {"id": 1, "token": "b"}),
    ] == plain(delta("a"), *step("tool_round", call(), result()), delta("b"))


def test_a_tool_call_is_these_bytes():
    """Its arguments as Python's json writes them, however they came."""
    event = call(arguments=b'{\n "city":"Plze\xc5\x88"}')
    assert encoded(started(), event).endswith(
        b'data: {"event": "tool_call", "data": {"id": "tc_1", "name": "get_weather", '
        b'"args": {"city": "Plze\\u0148"}, "type": "function_call"}}\n\n'
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (b"{}", {}),
        (b'"{half"', {"arguments": "{half"}),
        (b"[1]", {"arguments": [1]}),
        (DEEP, {"arguments": DEEP.decode()}),
    ],
)
def test_arguments_are_an_object_whatever_the_model_wrote(arguments, expected):
    """What is none stands in one."""
    ((_, data),) = plain(call(arguments=arguments))
    assert expected == data["args"]


@pytest.mark.parametrize(
    ("value", "expected"), [(b'"a\\nb"', "a\nb"), (b'{"a":1}', '{"a":1}'), (b"null", "null")]
)
def test_the_content_of_a_result_is_text(value, expected):
    """A string as it is, anything else as its JSON."""
    ((_, data),) = plain(result(value=value))
    assert expected == data["content"]


def test_a_tool_that_fails_says_so():
    """In its status."""
    ((_, data),) = plain(result(value=b'{"error":"no"}', is_error=True))
    assert ("failure", '{"error":"no"}') == (data["status"], data["content"])


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("get_weather", "local", ("function_call", "function_call_output")),
        ("web_search", "provider", ("web_search_call", "web_search_call")),
        ("web_search_call", "provider", ("web_search_call", "web_search_call")),
        ("file_search", "provider", ("file_search_call", "file_search_call")),
        ("knowledge_search", "provider", ("file_search_call", "file_search_call")),
        ("mcp_list_tools", "mcp", ("mcp_list_tools", "mcp_list_tools")),
        ("get_pods", "mcp", ("mcp_call", "mcp_call")),
        ("anything_else", "provider", ("mcp_call", "mcp_call")),
    ],
)
def test_the_type_of_a_tool_says_where_it_runs(name, source, expected):
    """Those of the provider run within the model's step."""
    kind = "tool_round" if source == "local" else "model"
    events = step(kind, call(name=name), result(name=name, source=source))
    assert expected == tuple(data["type"] for _, data in plain(*events))


def test_what_was_told_of_a_call_is_not_told_again():
    """Once per call and once per result."""
    events = plain(call(), call(), result(), result(), result())
    assert ["tool_call", "tool_result"] == [name for name, _ in events]


def test_rounds_are_counted_by_what_the_model_does_once_it_has_heard_a_result():
    """Calls side by side are of one round."""
    asking = part("{}", kind="tool_call", part_id="k", name="get_weather", call_id="x")

    def round_of(*ids):
        calls = [event for call_id in ids for event in (call(call_id), result(call_id))]
        return step("tool_round", *calls)

    events = plain(*asking, *round_of("1", "2"), *asking, *asking, *round_of("3"), *part("a"))
    rounds = [data["round"] for name, data in events if name == "tool_result"]
    assert [1, 1, 2] == rounds


def test_a_function_that_calls_one_tool_after_another_does_so_in_rounds():
    """Where there are no parts, calls begin them."""
    events = plain(call("1"), result("1"), call("2"), call("3"), result("2"), result("3"))
    assert [1, 2, 2] == [data["round"] for name, data in events if name == "tool_result"]


@pytest.mark.parametrize(
    ("code", "status", "expected", "response"),
    [
        ("context_length", 413, 413, "Prompt is too long"),
        ("rate_limit", 503, 429, "Quota exceeded"),
        ("quota", 503, 429, "Quota exceeded"),
        ("unreachable", 502, 503, "Service unavailable"),
        ("overloaded", 503, 503, "Service unavailable"),
        ("server_error", 502, 500, "Internal server error"),
        ("stalled", 504, 500, "Internal server error"),
        ("content_filter", 422, 500, "Internal server error"),
        ("crashed", 500, 500, "Internal server error"),
        ("limit", 507, 500, "Internal server error"),
        ("mine", 418, 422, "Invalid request"),
    ],
)
def test_a_run_that_fails_ends_with_an_error_and_nothing_else(code, status, expected, response):
    """With the status for what was wrong; there is no end behind it."""
    events = plain(delta("half"), failed(code, "no luck", status))
    assert ["token", "error"] == [name for name, _ in events]
    data = {"status_code": expected, "response": response, "cause": "no luck"}
    assert data == events[-1][1]


def test_an_error_in_a_step_is_not_the_end():
    """What comes of it is told at the end."""
    events = plain(*step("model", error=Problem(code="x", message="y")), delta("a"), finished())
    assert ["token", "turn_complete", "end"] == [name for name, _ in events]


@pytest.mark.parametrize(
    ("reason", "status", "text"),
    [
        ("length", 413, "half"),
        ("content_filter", 500, REFUSAL),
        ("error", 500, "half"),
    ],
)
def test_an_answer_that_was_cut_off_says_so_before_its_end(reason, status, text):
    """The turn is complete, and has an error; the end follows, for the run has come to it."""
    events = plain(*step("model", *part("half"), finish_reason=reason), finished(b'"half"'))
    assert ["token", "token", "turn_complete", "error", "end"] == [name for name, _ in events]
    assert (text, status) == (events[2][1]["token"], events[3][1]["status_code"])


@pytest.mark.parametrize("reason", ["stop", "tool_calls", "other", None])
def test_an_answer_that_ended_well_has_no_error(reason):
    """Nor has one of which nobody knows why it ended."""
    events = plain(*step("model", *part("all"), finish_reason=reason), finished(b'"all"'))
    assert ["token", "token", "turn_complete", "end"] == [name for name, _ in events]


def test_a_filtered_answer_is_what_the_provider_says_instead():
    """Its refusal; where it says none, ours."""
    within = (*part("Well"), *part("I won't.", kind="refusal", part_id="p2"))
    reader = read(started(), *step("model", *within, finish_reason="content_filter"), finished())
    assert ["", "Well", "I won't."] == reader.data("token", "token")
    assert ["I won't."] == reader.data("turn_complete", "token")


@pytest.mark.parametrize(("message", "expected"), [("Not here.", "Not here."), (None, REFUSAL)])
def test_a_refusal_by_a_shield_is_one_token_and_the_end(message, expected):
    """No turn was taken."""
    events = plain(Moderation(violation=True, message=message), finished(usage=Usage()))
    assert ["token", "end"] == [name for name, _ in events]
    assert {"id": 0, "token": expected} == events[0][1]


def test_a_refusal_that_is_said_is_not_said_again():
    """A provider that has shields says it itself, once or for every shield that looked."""
    shields = (
        Moderation(violation=True, message="Not here."),
        Moderation(violation=True, message="Nor there."),
    )
    within = (*shields, *part("Not here.", kind="refusal"))
    events = plain(*step("model", *within, finish_reason="content_filter"), finished(b'"x"'))
    assert [("token", {"id": 0, "token": "Not here."})] == events[:-1]
    assert "end" == events[-1][0]


def test_a_shield_that_looks_at_the_answer_ends_it():
    """What was said before it was said."""
    events = plain(delta("Well, "), Moderation(violation=True, message="no."), finished())
    assert ["token", "token", "turn_complete", "end"] == [name for name, _ in events]
    assert "Well, no." == events[2][1]["token"]


def test_an_agent_that_answers_in_spite_of_a_shield_has_answered():
    """Then it is a turn."""
    events = plain(Moderation(violation=True, message="no."), delta("Yes."), finished())
    assert ["token", "turn_complete", "end"] == [name for name, _ in events]


@pytest.mark.parametrize(("value", "expected"), [(b'"forty"', "forty"), (b'{"n":40}', '{"n":40}')])
def test_a_bare_result_is_the_answer_of_an_agent_that_has_said_nothing(value, expected):
    """It is sent as a token, so that all that reads tokens has it."""
    events = plain(finished(value))
    assert [("token", {"id": 0, "token": expected})] == events[:1]
    assert ("turn_complete", {"id": 1, "token": expected}) == events[1]


def test_a_run_without_any_result_has_nothing_but_an_end():
    """With the tokens that were counted: none."""
    events = plain(finished(usage=Usage()))
    assert ["end"] == [name for name, _ in events]
    assert (0, 0) == (events[0][1]["input_tokens"], events[0][1]["output_tokens"])


def test_an_empty_answer_is_one():
    """The model had nothing to say."""
    events = plain(*step("model"), finished(b'""'))
    assert ["turn_complete", "end"] == [name for name, _ in events]


def test_a_run_that_is_stopped_ends_with_what_repairs_its_text_and_interrupted():
    """One more token, with the next id; no end."""
    assert [
        ("token", {"id": 0, "token": ""}),
        ("token", {"id": 1, "token": "```py\nprint("}),
        ("token", {"id": 2, "token": "\n```\n\n*Response stopped by the user.*"}),
        ("interrupted", {"request_id": REQUEST_ID}),
    ] == plain(*part("```py\nprint("), stopped())


def test_a_run_that_is_stopped_before_it_has_said_anything_says_only_that():
    """The first token is the last."""
    assert [("token", {"id": 0, "token": STOPPED})] == plain(stopped())[:1]


def test_ids_of_a_stopped_answer_are_sorted_unique_and_without_a_gap():
    """Whatever else was told in between."""
    reader = read(
        started(), *part("a"), *step("tool_round", call(), result()), *part("b"), stopped()
    )
    assert list(range(len(reader.ids))) == reader.ids
    assert len(reader.ids) - 1 == reader.ids[-1]


@pytest.mark.parametrize("cause", ["client_cancel", "disconnect"])
def test_who_leaves_has_stopped_it(cause):
    """Others that read the run see it that way."""
    assert "interrupted" == plain(stopped(cause))[-1][0]


@pytest.mark.parametrize(
    ("cause", "outcome", "status"),
    [
        ("shutdown", "cancelled", 503),
        ("deadline", "cancelled", 500),
        ("parent", "cancelled", 500),
        ("input_timeout", "interrupted", 500),
        (None, "cancelled", 500),
    ],
)
def test_a_run_that_nobody_has_stopped_does_not_say_so(cause, outcome, status):
    """It is an error, which says what it was."""
    ((name, data),) = plain(stopped(cause, outcome))
    assert ("error", status) == (name, data["status_code"])
    assert f"({cause})" in data["cause"] or cause is None


# Documents


def documents(*events, form="current"):
    (end,) = read(started(), *events, finished(), form=form).data("end")
    return end["referenced_documents"]


DOCUMENTS = [
    {"doc_url": "https://d/1", "doc_title": "Doc1", "source": None, "document_id": "d1"},
    {"doc_url": "https://d/2", "doc_title": "What's new", "source": "ocp", "document_id": "d2"},
]


@pytest.mark.parametrize(
    "value",
    [
        "".join(FOUND),
        list(FOUND),
        [{"type": "text", "text": text} for text in FOUND],
        {"content": [{"type": "text", "text": text} for text in FOUND], "metadata": None},
    ],
)
def test_documents_come_from_the_metadata_in_what_was_found(value):
    """Each once, and only those that have an address and a title."""
    assert DOCUMENTS == documents(result(name="knowledge_search", value=as_json(value)))


@pytest.mark.parametrize(
    "value",
    [
        [
            {"doc_url": "https://d/1", "doc_title": "Doc1", "document_id": "d1"},
            {"url": "https://d/2", "title": "What's new", "source": "ocp", "document_id": "d2"},
            {"url": "https://d/1", "title": "Doc1", "score": 1},
            {"url": "javascript:alert(1)", "title": "a"},
            {"url": "https://d/3", "title": ""},
            {"url": 3, "title": "a"},
            {"title": "a"},
            17,
        ],
        {
            "results": [
                {"docs_url": "https://d/1", "title": "Doc1", "document_id": "d1"},
                {"attributes": {"reference_url": "https://d/2", "title": "What's new"}},
            ]
        },
    ],
)
def test_documents_come_from_results_that_are_json(value):
    """Wherever in it they are."""
    found = documents(result(name="file_search", value=as_json(value)))
    assert ["https://d/1", "https://d/2"] == [each["doc_url"] for each in found]
    assert ["Doc1", "What's new"] == [each["doc_title"] for each in found]


@pytest.mark.parametrize(
    "event",
    [
        result(name="get_weather", value=as_json(FOUND)),
        result(name="knowledge_search", value=as_json(FOUND), is_error=True),
        result(name="knowledge_search", value=DEEP),
        result(name="knowledge_search", value=as_json("\nMetadata: {nothing}\n")),
    ],
)
def test_other_results_have_no_documents(event):
    """Nor what failed, or cannot be read."""
    assert [] == documents(event)


def test_a_title_may_have_any_letter():
    """As Python escapes it."""
    line = r"""
Metadata: {'docs_url': "https://d/\"", 'title': 'It\'s "this"'}
"""
    (found,) = documents(result(name="knowledge_search", value=as_json(line)))
    assert ('https://d/"', 'It\'s "this"') == (found["doc_url"], found["doc_title"])


# Questions


def test_a_question_ends_the_response_with_its_prompt():
    """The page shows it, and the turn is complete; the tokens are those spent so far."""
    model_step = step("model", *part("Hm."), usage=USAGE)
    assert [
        ("token", {"id": 2, "token": "\n\nWhich one?"}),
        ("turn_complete", {"id": 3, "token": "Hm.\n\nWhich one?"}),
    ] == plain(*model_step, asked())[2:-1]
    name, data = plain(*model_step, asked())[-1]
    assert ("end", 11, 19) == (name, data["input_tokens"], data["output_tokens"])
    assert {InputRequested} == LIGHTSPEED.framing.ends_at


def test_a_question_shows_what_can_be_answered():
    """Options by their labels; several questions one below the other."""
    questions = (
        Question(
            id="a",
            kind="choice",
            prompt="Which?",
            options=(Option(id="x", label="The first"), Option(id="y")),
        ),
        Question(id="b", kind="confirm", prompt="Sure?"),
    )
    ((_, data), *_) = plain(asked("q1", *questions))
    assert "Which?\n\n- The first\n- y\n\nSure?" == data["token"]


def test_the_response_to_an_answer_begins_anew():
    """Its own start, ids, text, documents, and its share of the tokens."""
    more = Usage(input_tokens=31, output_tokens=20)
    reader = read(
        started(),
        result(name="knowledge_search", value=as_json(FOUND)),
        *step("model", usage=USAGE),
        asked(),
        received(),
        *step("model", *part("b it is"), usage=Usage(input_tokens=20, output_tokens=1)),
        finished(usage=more),
    )
    first = reader.names.index("end") + 1
    reader.frames = reader.frames[first:]
    assert ["start", "token", "token", "turn_complete", "end"] == reader.names
    assert [0, 1, 2] == reader.ids
    assert ["b it is"] == reader.data("turn_complete", "token")
    assert [
        {"referenced_documents": [], "truncated": None, "input_tokens": 20, "output_tokens": 1}
    ] == reader.data("end")


@pytest.mark.parametrize("form", ["current", "seed"])
def test_what_happens_while_a_person_is_asked_begins_the_next_response(form):
    """It is not lost; what would tell nothing does not begin one."""
    reader = read(
        started(),
        *(call("1"), call("2")),
        asked(),
        Liveness(elapsed_s=1, events=1, since_last_output_s=1),
        result("1"),
        received(),
        finished(b'"b"'),
        form=form,
    )
    first = reader.names.index("end") + 1
    reader.frames = reader.frames[first:]
    assert 1 == reader.names.count("start")
    assert "start" == reader.names[0]
    assert "tool_result" in reader.names or "Tool:get_weather response:22C" in reader.data(
        "tool_call", "token"
    )


def test_a_question_that_is_withdrawn_begins_the_next_response():
    """Nobody has to answer any more."""
    reader = read(started(), asked(), InputWithdrawn(request_id="q1"), delta("Well."), finished())
    assert ["start", "token", "turn_complete", "end"] * 2 == reader.names


# The seed form


def test_the_seed_begins_a_turn_with_an_empty_token():
    """`start`, then `turn_start`, which has no role."""
    assert (
        b'data: {"event": "start", "data": {"conversation_id": "c-1"}}\n\n'
        b'data: {"event": "token", "data": {"id": 0, "token": ""}}\n\n'
    ) == encoded(started(), form="seed")


def test_the_seed_tells_that_a_turn_waits_for_input_with_an_empty_token():
    """`turn_awaiting_input`; the prompt follows, for there is no other word for it."""
    assert [
        ("token", {"id": 1, "token": ""}),
        ("token", {"id": 2, "role": "inference", "token": "Which one?"}),
        ("turn_complete", {"id": 3, "token": "Which one?"}),
    ] == seed(asked())[1:-1]


def test_the_seed_completes_a_turn_with_the_whole_answer():
    """`turn_complete` has an id and no role."""
    events = seed(delta("con"), delta("tent"), finished())
    assert ("turn_complete", {"id": 3, "token": "content"}) == events[-2]


def test_the_seed_tells_that_a_shield_has_no_objection():
    """In its own role."""
    expected = ("token", {"id": 1, "role": "shield_call", "token": "No Violation"})
    assert expected == seed(Moderation(violation=False))[-1]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (msgspec.UNSET, "Violation: not allowed (Metadata: {})"),
        (Raw(b'{"type":"x"}'), "Violation: not allowed (Metadata: {'type': 'x'})"),
    ],
)
def test_the_seed_tells_a_violation_with_its_metadata(metadata, expected):
    """As Python prints it; it is the answer where nothing else is said."""
    shield = Moderation(violation=True, message="not allowed", metadata=metadata)
    events = seed(shield, finished())
    assert ("token", {"id": 1, "role": "shield_call", "token": expected}) == events[1]
    assert ("turn_complete", {"id": 3, "token": "not allowed"}) == events[-2]


def test_the_seed_tells_a_violation_that_has_no_message():
    """With ours."""
    ((_, data),) = seed(Moderation(violation=True))[1:]
    assert f"Violation: {REFUSAL} (Metadata: {{}})" == data["token"]


def test_the_seed_tells_the_text_of_inference():
    """A step's start is an empty token, each delta one with text."""
    assert [
        ("token", {"id": 1, "role": "inference", "token": ""}),
        ("token", {"id": 2, "role": "inference", "token": "Kube"}),
    ] == seed(*step("model", *part("Kube")))[1:]


def test_the_seed_tells_a_tool_call_of_inference_in_pieces_and_by_its_name():
    """A raw string as it comes, the parsed call by its tool's name."""
    asking = part('{"x":1}', kind="tool_call", name="my-tool", call_id="tc_1")
    assert [
        ("tool_call", {"id": 1, "role": "inference", "token": '{"x":1}'}),
        ("tool_call", {"id": 2, "role": "inference", "token": "my-tool"}),
    ] == seed(*asking)[1:]


def test_the_seed_does_not_tell_reasoning():
    """It had none."""
    assert [] == seed(*part("hm", kind="reasoning"))[1:]


def test_the_seed_tells_tools_arguments_first_and_then_what_came_of_them():
    """All calls before all results, in the order of the calls; each with an id of its own."""
    found = result("2", "knowledge_search", as_json(FOUND))
    events = step(
        "tool_round",
        call("1", "lookup", b'{"x":1}'),
        result("1", "lookup", b"42"),
        call("2", "knowledge_search", b'{"query":"k8s"}'),
        call("3", "query_from_memory", b"{}"),
        result("3", "query_from_memory", as_json("x" * 210)),
        found,
    )
    assert [
        ("tool_call", {"id": number, "role": "tool_execution", "token": token})
        for number, token in enumerate(
            (
                "",
                "Tool:lookup arguments:{'x': 1}",
                "Tool:knowledge_search arguments:{'query': 'k8s'}",
                "Tool:query_from_memory arguments:{}",
                "Tool:lookup response:42",
                "Tool:knowledge_search summary:knowledge_search tool found 2 chunks:",
                "Fetched 210 bytes from memory",
            ),
            start=1,
        )
    ] == seed(*events)[1:]


def test_the_seed_tells_the_tools_of_a_provider_as_they_come():
    """Outside of a round there is nothing to wait for; each is told once."""
    within = (call("1", "lookup"), call("1", "lookup"), result("1", "lookup", source="provider"))
    tokens = [data["token"] for _, data in seed(*step("model", *within))[2:]]
    assert ["Tool:lookup arguments:{'city': 'Brno'}", "Tool:lookup response:22C"] == tokens


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one\ntwo", "summary:one"),
        (["one\ntwo", "three"], "summary:one"),
        ([{"type": "text", "text": "one\ntwo"}], "summary:one"),
        ({"content": [{"type": "text", "text": "one"}]}, "summary:one"),
        ([], "response:[]"),
        ("", "response:"),
        (7, "response:7"),
    ],
)
def test_the_seed_sums_up_what_was_found(value, expected):
    """By the first line of its first text; without a text it is a response like any other."""
    event = result(name="knowledge_search", value=as_json(value))
    ((_, data),) = seed(event)[1:]
    assert f"Tool:knowledge_search {expected}" == data["token"]


def test_the_seed_tells_an_error_and_nothing_behind_it():
    """Its message; no end."""
    events = seed(failed(message="Something went wrong"))
    assert [("error", {"id": 1, "token": "Something went wrong"})] == events[1:]


@pytest.mark.parametrize(
    "event",
    [
        ProviderEvent(provider="m", raw=Raw(b'{"step_type":"memory_retrieval"}')),
        Liveness(elapsed_s=10, events=1, since_last_output_s=10),
        StepStarted(step_id="s", kind="node", name="retrieval"),
    ],
)
def test_the_seed_beats_where_it_has_no_word(event):
    """For kinds of steps that it does not know, and by the clock while one is under way."""
    assert [("heartbeat", {"id": 1, "token": "heartbeat"})] == seed(event)[1:]


def test_the_seed_ends_with_documents_and_counts():
    """Address and title alone; the quotas beside the data."""
    found = result(name="knowledge_search", value=as_json(FOUND))
    frame = read(started(), found, finished(), form="seed").frames[-1]
    assert {
        "event": "end",
        "data": {
            "referenced_documents": [
                {"doc_url": "https://d/1", "doc_title": "Doc1"},
                {"doc_url": "https://d/2", "doc_title": "What's new"},
            ],
            "truncated": None,
            "input_tokens": 11,
            "output_tokens": 19,
        },
        "available_quotas": {},
    } == frame


def test_the_seed_has_an_error_for_what_is_stopped():
    """The text is repaired all the same; there was no other word for it."""
    assert [
        ("token", {"id": 1, "role": "inference", "token": "~~~\na"}),
        ("token", {"id": 2, "role": "inference", "token": "\n~~~" + STOPPED}),
        ("error", {"id": 3, "token": "Response stopped by the user."}),
    ] == seed(delta("~~~\na"), stopped())[1:]
    assert ("error", {"id": 1, "token": "the run was cancelled (shutdown)"}) == seed(
        stopped("shutdown")
    )[-1]


def test_ids_of_the_seed_rise_one_by_one():
    """No two frames have the same, and none is left out."""
    events = seed(
        *step("model", *part("a"), *part("{}", kind="tool_call", name="t", call_id="1")),
        *step("tool_round", call("1"), result("1")),
        Liveness(elapsed_s=10, events=1, since_last_output_s=10),
        finished(),
    )
    ids = [data["id"] for name, data in events if name != "end"]
    assert list(range(len(ids))) == ids


# Every event


@pytest.mark.parametrize("form", ["current", "text", "seed"])
def test_every_kind_of_event_can_be_read(form):
    """None is unknown to an encoder."""
    fields = {
        "arguments": NULL, "raw": NULL, "values": NULL, "value": NULL, "result": NULL,
        "answers": NULL, "input": NULL, "questions": (), "receipt": Receipt(), "usage": Usage(),
        "error": Problem(code="x", message="y"), "kind": "text", "outcome": "success",
        "source": "local", "mode": "steer", "change": "fired", "violation": False,
    }  # fmt: skip
    for name, kind in EVENT_TYPES.items():
        wanted = {
            field.name: fields.get(field.name, "1")
            for field in msgspec.structs.fields(kind)
            if field.required
        }
        if name.startswith("step"):
            wanted["kind"] = "model"
        encoder = encoder_of(form)
        encoder.feed(started())
        assert isinstance(list(encoder.feed(kind(**wanted))), list)


def test_a_reader_that_names_no_form_has_the_one_that_is_spoken():
    """As who watches a run from elsewhere does."""
    assert isinstance(LIGHTSPEED.encoder(None), LightspeedEncoder)
    assert isinstance(LIGHTSPEED.forms["current"].encoder(None), LightspeedEncoder)
    assert isinstance(LIGHTSPEED.forms["seed"].encoder(None), SeedEncoder)
    assert {"lightspeed"} == {form.name for form in LIGHTSPEED.forms.values()}


# Requests


def decode(path="/streaming_query", *, form=None, dialect=LIGHTSPEED, raw=None, **body):
    """What a request with this body asks for."""
    if path != "/streaming_query/interrupt":
        body = {"query": "What is it?"} | body
    (route,) = [each for each in dialect.routes if each.path == path]
    query = {} if form is None else {"form": form}
    content = as_json(body) if raw is None else raw
    return route.decode(
        Request(method="POST", parameters={}, query=query, headers={}, body=content)
    )


def test_a_query_starts_a_run_in_a_conversation():
    """A new one, unless it names one."""
    intent = decode()
    assert isinstance(intent, Start)
    assert ("What is it?", "stream", "current") == (intent.input, intent.delivery, intent.options)
    assert (None, None, True) == (intent.agent, intent.thread_id, intent.makes_thread)
    assert (True, "enqueue", None) == (intent.resumes, intent.if_busy, intent.metadata)
    assert "wait" == decode("/query").delivery


@pytest.mark.parametrize(
    "conversation_id",
    [
        REQUEST_ID,
        REQUEST_ID.upper(),
        RUN_ID,
        "ab" * 24,
        "conv_" + "ab" * 24,
    ],
)
def test_a_conversation_is_known_by_its_id(conversation_id):
    """As it is written: a UUID, or 48 hexadecimal digits."""
    assert conversation_id == decode(conversation_id=conversation_id).thread_id


@pytest.mark.parametrize("empty", ["", None])
def test_a_conversation_without_an_id_is_a_new_one(empty):
    """An empty one counts as none."""
    assert decode(conversation_id=empty).thread_id is None


def test_a_model_is_looked_for_by_its_provider_and_by_its_own_name():
    """Whichever there is."""
    intent = decode(provider="openai", model="gpt4mini")
    assert ("openai:gpt4mini", ("gpt4mini",)) == (intent.agent, intent.otherwise)


def test_what_an_agent_may_heed_stands_in_the_metadata():
    """Stores and shields."""
    wishes = {
        "vector_store_ids": ["v"],
        "shield_ids": [],
        "solr": {"filters": {"fq": []}},
    }
    assert wishes == decode(**wishes, generate_topic_summary=False).metadata
    assert decode(form="seed").metadata is None


def test_a_query_brings_its_system_prompt_and_may_want_no_tools():
    """Both are for a model agent; the seed form knew no `no_tools`."""
    intent = decode(system_prompt="Be brief.", no_tools=True)
    assert ("Be brief.", False, None) == (intent.instructions, intent.uses_tools, intent.metadata)
    intent = decode(form="seed", system_prompt="Be brief.", no_tools=True)
    assert ("Be brief.", True) == (intent.instructions, intent.uses_tools)
    assert (None, True) == (decode().instructions, decode().uses_tools)


async def test_a_model_without_tools_is_given_none_and_heeds_the_prompt():
    """What the query says of both is what the model hears."""
    provider = ScriptedProvider([say("Yes.")])
    model = Agent.of_model(
        "model", "scripted:x", instructions="Be long.", provider=provider, tools=[knowledge_search]
    )
    with trio.fail_after(30):
        async with open_server(model) as server, httpx2.AsyncClient() as http:
            url = f"{server.urls[0]}/v1/query"
            body = {"query": "hi", "system_prompt": "Be brief.", "no_tools": True}
            assert 200 == (await http.post(url, json=body)).status_code
    [prompt] = provider.prompts
    assert (SystemMessage("Be brief."), UserMessage("hi")) == prompt.messages
    assert () == prompt.tools


@pytest.mark.parametrize(
    ("media_type", "expected"),
    [
        (None, "current"),
        ("", "current"),
        ("application/json", "current"),
        ("text/plain", "text"),
    ],
)
def test_the_body_says_how_the_answer_is_to_come(media_type, expected):
    """And no header does."""
    assert expected == decode(media_type=media_type).options


@pytest.mark.parametrize(
    ("form", "spoken", "expected"),
    [
        (None, "current", "current"),
        ("seed", "current", "seed"),
        (None, "seed", "seed"),
        ("current", "seed", "current"),
    ],
)
def test_a_request_may_say_which_form_it_wants(form, spoken, expected):
    """Else it is the one that is configured."""
    assert expected == decode(form=form, dialect=LIGHTSPEED.forms[spoken]).options


def test_the_seed_overlooks_what_it_does_not_know():
    """Also how the answer is to come: it had one way only."""
    assert "seed" == decode(form="seed", media_type="text/plain", no_tools=7, other=1).options


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"query": None}, "Expected `str`, got `null`"),
        ({"other": 1}, "unknown field `other`"),
        ({"provider": "openai"}, "provider and model together"),
        ({"model": "gpt4mini"}, "provider and model together"),
        ({"conversation_id": "c-1"}, "expected a UUID"),
        ({"conversation_id": REQUEST_ID[:-1]}, "expected a UUID"),
        ({"conversation_id": "0123456789abcdef-0123456789abcdef"}, "expected a UUID"),
        ({"conversation_id": "conv_" + RUN_ID}, "expected a UUID"),
        ({"media_type": "text/html"}, "media_type"),
        ({"no_tools": "yes"}, "no_tools"),
        ({"attachments": [{"attachment_type": "log"}]}, "content"),
        ({"form": "oct", "raw": b'{"query":""}'}, "'current' or 'seed'"),
        ({"raw": b"{}"}, "query"),
        ({"raw": b""}, "query"),
        ({"raw": b"{"}, "JSON"),
        ({"raw": b"[]"}, "object"),
    ],
)
@pytest.mark.parametrize("path", ["/query", "/streaming_query"])
def test_a_query_that_makes_no_sense_is_unprocessable(path, body, words):
    """Missing query, half a model, an id that is none, and what is not known."""
    with pytest.raises(Unprocessable, match=words):
        decode(path, **body)


@pytest.mark.parametrize("body", [{"model": "m"}, {"conversation_id": "x"}, {"query": 1}])
def test_the_seed_looks_at_the_fields_of_its_time(body):
    """They are checked as in the current form."""
    with pytest.raises(Unprocessable):
        decode(form="seed", **body)


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0").decode()


def attached(kind="log", content_type="text/plain", content="warning: quota"):
    return {"attachment_type": kind, "content_type": content_type, "content": content}


def test_attachments_follow_the_query_each_in_a_fence():
    """What it is, and its content as it came; the fence is longer than any within."""
    intent = decode(
        attachments=[
            attached(),
            attached("configuration", "application/yaml", "kind: Pod\n"),
            attached("api object", "application/json", "```"),
            attached("event", "application/xml", "<a/>"),
        ]
    )
    assert (
        "What is it?\n\n"
        "log (text/plain):\n```text\nwarning: quota\n```\n\n"
        "configuration (application/yaml):\n```yaml\nkind: Pod\n\n```\n\n"
        "api object (application/json):\n````json\n```\n````\n\n"
        "event (application/xml):\n```xml\n<a/>\n```"
    ) == intent.input


@pytest.mark.parametrize(
    ("attachment", "words"),
    [
        (attached("poem"), "expected one of alert, api object"),
        (attached(content_type="text/html"), "expected one of text/plain"),
        (attached("image"), "if, and only if"),
        (attached("log", "image/png", PNG), "if, and only if"),
        (attached("image", "image/png", "no base64!"), "in base64"),
        (attached("image", "image/png", "žluť"), "in base64"),
        (attached("image", "image/png", JPEG), "beginning of a file of image/png"),
        (attached("image", "image/jpeg", PNG), "beginning of a file of image/jpeg"),
        (attached("image", "image/png", PNG), "no agent here can look at"),
        (attached("image", "image/jpeg", JPEG), "no agent here can look at"),
        (attached() | {"name": "a.log"}, "unknown field"),
    ],
)
def test_an_attachment_that_cannot_be_used_is_refused(attachment, words):
    """Its type, its content's type, whether they fit, and whether it is the image it says it is."""
    with pytest.raises(Unprocessable, match=words):
        decode(attachments=[attachment])


@pytest.mark.parametrize("request_id", [REQUEST_ID, RUN_ID, REQUEST_ID.upper()])
def test_an_interrupt_names_a_run(request_id):
    """By the id that its start has told."""
    intent = decode("/streaming_query/interrupt", request_id=request_id)
    assert isinstance(intent, Cancel)
    assert (RUN_ID, True) == (intent.run_id, intent.waits)


def test_the_answer_to_an_interrupt_says_whether_there_was_anything_to_stop():
    """With the id as it was sent."""
    intent = decode("/streaming_query/interrupt", request_id=REQUEST_ID)
    assert {
        "request_id": REQUEST_ID,
        "interrupted": True,
        "message": "Streaming request interrupted",
    } == json.loads(intent.reply(snapshot(), ()).body)
    assert {
        "request_id": REQUEST_ID,
        "interrupted": False,
        "message": "Streaming request already completed; nothing to interrupt",
    } == json.loads(intent.reply_if_over(snapshot(), ()).body)


@pytest.mark.parametrize(
    "body", [{}, {"request_id": "7"}, {"request_id": 7}, {"request_id": RUN_ID, "other": 1}]
)
def test_an_interrupt_that_makes_no_sense_is_unprocessable(body):
    """Above all an id that is none."""
    with pytest.raises(Unprocessable):
        decode("/streaming_query/interrupt", **body)


# Answers


def snapshot(**fields):
    plain = {
        "id": RUN_ID,
        "agent": "a",
        "state": "finished",
        "on_disconnect": "cancel",
        "created": "",
        "started": None,
        "finished": None,
        "thread_id": "c-1",
        "parent_run_id": None,
        "outcome": "success",
        "result": NULL,
        "error": None,
        "usage": USAGE,
        "receipt": None,
        "events": 1,
        "questions": (),
    }
    return RunSnapshot(**plain | fields)


def answered(*events, **fields):
    """The status and the object that a query is answered with."""
    reply = decode("/query").reply(snapshot(**fields), (started(), *events))
    assert "application/json" == reply.media_type
    return reply.status, json.loads(reply.body)


def test_an_answer_is_the_stream_in_one_object():
    """The same text, tools, documents and counts."""
    found = result("2", "knowledge_search", as_json(FOUND))
    status, body = answered(
        *part("Well: "),
        *step("tool_round", call(), call("2", "knowledge_search", b"{}"), result(), found),
        *part("22C"),
        finished(b'"22C"'),
        result=Raw(b'"22C"'),
    )
    assert 200 == status
    assert {
        "conversation_id": "c-1",
        "response": "Well: 22C",
        "rag_chunks": [],
        "referenced_documents": DOCUMENTS,
        "truncated": False,
        "input_tokens": 11,
        "output_tokens": 19,
        "available_quotas": {},
    } == {key: value for key, value in body.items() if not key.startswith("tool")}
    assert [("tc_1", "function_call"), ("2", "function_call")] == [
        (each["id"], each["type"]) for each in body["tool_calls"]
    ]
    assert [("22C", 1)] == [(each["content"], each["round"]) for each in body["tool_results"][:1]]


def test_an_answer_that_is_a_bare_result_or_a_refusal_is_its_text():
    """As in the stream."""
    assert "forty" == answered(finished(), result=Raw(b'"forty"'))[1]["response"]
    refused = Moderation(violation=True, message="no")
    filtered = step("model", refused, finish_reason="content_filter")
    assert (200, "no") == (answered(*filtered)[0], answered(*filtered)[1]["response"])


@pytest.mark.parametrize(("reason", "status"), [("length", 413), ("content_filter", 500)])
def test_an_answer_that_was_cut_off_is_an_error(reason, status):
    """Half an answer is none, where nothing else could say that it is half."""
    got, body = answered(*step("model", *part("half"), finish_reason=reason))
    assert status == got
    assert {"response", "cause"} == set(body["detail"])


def test_a_failed_run_is_answered_with_its_error():
    """In the words of the protocol."""
    error = Problem(code="rate_limit", message="later", status=503)
    assert (429, {"detail": {"response": "Quota exceeded", "cause": "later"}}) == answered(
        outcome="error", error=error
    )
    status, body = answered(outcome="cancelled", receipt=Receipt(cause="client_cancel"))
    assert (500, "the run was cancelled (client_cancel)") == (status, body["detail"]["cause"])
    assert 500 == answered(outcome="cancelled")[0]


@pytest.mark.parametrize("events", [(), (received(),), (received(), delta("b "))])
def test_a_question_is_an_answer(events):
    """The prompt is the response, also where somebody has answered it just now."""
    status, body = answered(*part("Hm."), asked(), *events, outcome=None, state="waiting")
    assert (200, "Hm.\n\nWhich one?") == (status, body["response"])


def test_a_run_that_is_looked_at_midway_has_said_what_it_has():
    """Where nothing was asked."""
    assert "Hm." == answered(*part("Hm."), outcome=None, state="running")[1]["response"]


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("unauthorized", 401, 401),
        ("forbidden", 403, 403),
        ("not_found", 404, 404),
        ("too_large", 413, 413),
        ("unprocessable", 422, 422),
        ("bad_request", 400, 422),
        ("conflict", 409, 422),
        ("too_many", 429, 429),
        ("overloaded", 503, 503),
        ("internal", 500, 500),
        ("odd", 700, 500),
    ],
)
def test_a_refusal_has_one_of_eight_statuses_and_a_detail(code, status, expected):
    """What it is, and why."""
    reply = LIGHTSPEED.problem(Problem(code=code, message="why", status=status))
    detail = json.loads(reply.body)["detail"]
    assert (expected, "application/json") == (reply.status, reply.media_type)
    assert "why" == detail["cause"]
    assert isinstance(detail["response"], str)


def test_a_run_by_itself_is_shown_as_it_is():
    """No route of the protocol does."""
    assert RUN_ID == json.loads(LIGHTSPEED.present(snapshot()))["id"]


# Over sockets


@attrs.frozen(eq=False)
class Site:
    """A server, and a page that asks it."""

    server: object
    http: httpx2.AsyncClient

    async def stream(self, query="What is it?", *, form=None, **body):
        """Ask, and read the stream to its end."""
        reader = ChatReader()
        async with self.open(query, form=form, **body) as response:
            assert 200 == response.status_code
            async for text in response.aiter_text():
                reader.feed(text)
        assert "" == reader.rest
        return reader

    def open(self, query="What is it?", *, form=None, **body):
        """Ask, and leave the reading to who has asked."""
        parameters = {} if form is None else {"form": form}
        return self.http.stream(
            "POST", "/v1/streaming_query", json={"query": query} | body, params=parameters
        )

    async def ask(self, query="What is it?", **body):
        """Ask, and wait for the one answer."""
        response = await self.http.post("/v1/query", json={"query": query} | body)
        return response.status_code, response.json()

    async def interrupt(self, request_id):
        """Stop a stream."""
        body = {"request_id": request_id}
        response = await self.http.post("/v1/streaming_query/interrupt", json=body)
        return response.status_code, response.json()


@asynccontextmanager
async def site(*agents, settings=None, **server):
    """Serve agents in lightspeed's protocol and our own, within the time of a test."""
    with trio.fail_after(SECONDS):
        async with (
            open_server(
                *agents, settings=settings, dialects=(NATIVE, LIGHTSPEED), **server
            ) as opened,
            httpx2.AsyncClient(base_url=opened.urls[0]) as http,
        ):
            yield Site(opened, http)


@tool
async def knowledge_search(query: str) -> list[str]:
    """Search what is known."""
    await trio.lowlevel.checkpoint()
    return list(FOUND)


def searching(**settings):
    """A model that searches, and then answers."""
    asks = ask_for(("knowledge_search", '{"query":"kubernetes"}'))
    script = [[*asks[:-1], Finish("tool_calls", USAGE)], said("It is a system.")]
    return model("m", *script, tools=[knowledge_search], **settings)[1]


@agent
async def guided(run, input):
    """Ask for guidance, twice."""
    run.text("Well.")
    first = await run.ask("Which one?")
    run.text(f"{first} of {input}.")
    kind = Question(id="s", kind="confirm", prompt="Sure?")
    return None if await run.ask(kind) else run.text("No.")


async def test_a_query_is_streamed_in_the_current_form():
    """Data alone, in the order of the protocol, with the documents at the end."""
    async with site(searching()) as one:
        reader = await one.stream(conversation_id=REQUEST_ID)
        (run,) = list(one.server.runs)
    start, tool_call, tool_result, begin, token, complete, end = reader.frames
    request_id = str(uuid.UUID(hex=run.id))
    assert {"conversation_id": REQUEST_ID, "request_id": request_id} == start["data"]
    args = {"query": "kubernetes"}
    assert ("tool_call", args) == (tool_call["event"], tool_call["data"]["args"])
    assert ("tool_result", "success") == (tool_result["event"], tool_result["data"]["status"])
    assert [{"id": 0, "token": ""}, {"id": 1, "token": "It is a system."}] == [
        begin["data"],
        token["data"],
    ]
    assert {"id": 2, "token": "It is a system."} == complete["data"]
    assert {
        "referenced_documents": DOCUMENTS,
        "truncated": None,
        "input_tokens": 22,
        "output_tokens": 38,
    } == end["data"]
    assert [] == reader.comments


async def test_a_query_is_streamed_in_the_seed_form():
    """Start, tokens with their roles, tool calls as text, the end with two documents."""
    async with site(searching()) as one:
        reader = await one.stream(form="seed")
    assert ["start", "token", "token"] == reader.names[:3]
    assert ["turn_complete", "end"] == reader.names[-2:]
    assert [
        '{"query":"kubernetes"}',
        "knowledge_search",
        "",
        "Tool:knowledge_search arguments:{'query': 'kubernetes'}",
        "Tool:knowledge_search summary:knowledge_search tool found 2 chunks:",
    ] == reader.data("tool_call", "token")
    (end,) = reader.data("end")
    assert ["Doc1", "What's new"] == [each["doc_title"] for each in end["referenced_documents"]]
    assert list(range(len(reader.frames) - 2)) == [
        frame["data"]["id"] for frame in reader.frames[1:-1]
    ]
    assert "It is a system." == reader.text


async def test_a_query_is_streamed_as_text():
    """As it would be printed, with the documents below."""
    async with site(searching()) as one, one.open(media_type="text/plain") as response:
        assert "text/plain; charset=utf-8" == response.headers["content-type"]
        text = "".join([piece async for piece in response.aiter_text()])
    assert (
        "[Tool Call: knowledge_search]\n[Tool Result]\nIt is a system."
        "\n\n---\n\nDoc1: https://d/1\nWhat's new: https://d/2"
    ) == text


async def test_the_media_type_in_the_body_is_that_of_the_stream():
    """Whatever Accept says."""
    async with site(searching()) as one, one.open(media_type="application/json") as response:
        assert "text/event-stream; charset=utf-8" == response.headers["content-type"]
        await response.aread()


async def test_streamed_tokens_are_the_answer():
    """The same as the whole, and as what is answered without a stream."""
    pieces = [delta(text, part_id="t1") for text in ("It ", "is ", "a ", "system.")]
    lines = [PartStarted(part_id="t1", kind="text"), *pieces, *said("")[2:]]
    lines[-2] = PartFinished(part_id="t1", kind="text", text="It is a system.")
    async with site(model("m", lines, lines)[1]) as one:
        reader = await one.stream()
        status, body = await one.ask()
    assert "It is a system." == reader.text
    assert [reader.text] == reader.data("turn_complete", "token")
    assert (200, reader.text) == (status, body["response"])


async def test_a_query_is_answered_without_a_stream():
    """The same in one object."""
    async with site(searching()) as one:
        status, body = await one.ask()
        (run,) = list(one.server.runs)
    assert 200 == status
    assert (run.id, "It is a system.") == (body["conversation_id"], body["response"])
    assert ["knowledge_search"] == [each["name"] for each in body["tool_calls"]]
    assert [1] == [each["round"] for each in body["tool_results"]]
    assert (DOCUMENTS, 22, 38) == (
        body["referenced_documents"],
        body["input_tokens"],
        body["output_tokens"],
    )


async def test_a_conversation_goes_on_under_the_id_that_its_start_has_told():
    """The model is told what was said before."""
    provider, one_agent = model("m", said("one"), said("two"))
    async with site(one_agent) as one:
        (first,) = (await one.stream("first")).data("start")
        status, body = await one.ask("second", conversation_id=first["conversation_id"])
    assert (200, first["conversation_id"]) == (status, body["conversation_id"])
    assert ["first", "one", "second"] == [each.text for each in provider.prompts[1].messages]


async def test_a_model_is_found_by_its_provider_and_name_or_by_its_own_name():
    """One that there is not is not found, and nothing begins."""
    _, by_model = model("k", said("by model"))
    _, by_name = model("n", said("by name"))
    async with site(guided, by_model, by_name) as one:
        assert "by model" == (await one.ask(provider="k", model="m"))[1]["response"]
        assert "by name" == (await one.ask(provider="x", model="n"))[1]["response"]
        status, body = await one.ask(provider="x", model="y")
        async with one.open(provider="x", model="y") as response:
            assert 404 == response.status_code
    assert 404 == status
    assert {"response", "cause"} == set(body["detail"])


@pytest.mark.parametrize("path", ["/v1/query", "/v1/streaming_query"])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": "a", "model": "m"},
        {"query": "a", "provider": "m"},
        {"query": "a", "attachments": [attached("image", "image/png", JPEG)]},
    ],
)
async def test_what_makes_no_sense_is_refused_before_any_stream(path, body):
    """With a status and a detail."""
    async with site(guided) as one:
        response = await one.http.post(path, json=body)
        assert [] == list(one.server.runs)
    assert 422 == response.status_code
    assert {"response", "cause"} == set(response.json()["detail"])


async def test_a_prompt_that_is_too_long_is_an_error_in_the_stream_or_the_status():
    """The stream has begun when the model says so."""
    too_long = [ProviderError("no room", code="context_length")]
    async with site(model("m", too_long, too_long)[1]) as one:
        reader = await one.stream()
        status, body = await one.ask()
    assert ["start", "error"] == reader.names
    assert [413] == reader.data("error", "status_code")
    assert (413, "Prompt is too long") == (status, body["detail"]["response"])


async def test_a_stream_that_fails_in_the_middle_ends_with_an_error():
    """What was said was said; no end."""

    async def main(run, input):
        run.text("half")
        await trio.lowlevel.checkpoint()
        raise AgentError("no luck", code="unreachable", status=502)

    async with site(Agent("main", main)) as one:
        reader = await one.stream()
    assert ["start", "token", "token", "error"] == reader.names
    assert [503] == reader.data("error", "status_code")


async def read_until(response, reader, is_there):
    """Read a stream until something has come."""
    chunks = response.aiter_text()
    while not is_there():
        reader.feed(await anext(chunks))
    return chunks


async def test_an_interrupt_stops_a_stream_and_repairs_what_was_said():
    """The half answer is whole Markdown; a second interrupt finds nothing to stop."""
    lines = [*say("Do:\n```sh\noc get")[:2], 3600.0]
    provider, one_agent = model("m", lines, said("Well."))
    async with site(one_agent) as one:
        reader = ChatReader()
        async with one.open("How?") as response:
            chunks = await read_until(response, reader, lambda: "oc get" in reader.text)
            (start,) = reader.data("start")
            first = await one.interrupt(start["request_id"])
            async for text in chunks:
                reader.feed(text)
        second = await one.interrupt(start["request_id"])
        (run,) = list(one.server.runs)
        shown = (await one.http.get(f"/runs/{run.id}")).json()
        await one.ask("Go on.", conversation_id=start["conversation_id"])
    assert ["start", "token", "token", "token", "interrupted"] == reader.names
    assert [0, 1, 2] == reader.ids
    assert "Do:\n```sh\noc get\n```" + STOPPED == reader.text
    assert [start["request_id"]] == reader.data("interrupted", "request_id")
    assert (200, True) == (first[0], first[1]["interrupted"])
    assert (200, False) == (second[0], second[1]["interrupted"])
    # What was said is kept once: by the run, and, repaired, in what the model is told next.
    assert ("cancelled", "Do:\n```sh\noc get") == (shown["outcome"], shown["output"])
    assert [
        UserMessage("How?"),
        AssistantMessage("Do:\n```sh\noc get\n```"),
        UserMessage("Go on."),
    ] == list(provider.prompts[1].messages)
    assert 0 == provider.open_streams


async def test_an_interrupt_before_any_token_uses_the_first_id():
    """And nothing but it is said."""
    gate = trio.Event()

    async def main(run, input):
        gate.set()
        await trio.sleep_forever()

    async with site(Agent("main", main)) as one:
        reader = ChatReader()
        async with one.open() as response:
            chunks = await read_until(response, reader, lambda: reader.frames)
            await one.interrupt(reader.data("start")[0]["request_id"])
            async for text in chunks:
                reader.feed(text)
    assert [{"id": 0, "token": STOPPED}] == reader.data("token")


async def test_an_interrupt_of_what_nobody_has_started_is_not_found():
    """And of what is no id, unprocessable."""
    async with site(guided) as one:
        status, body = await one.interrupt(REQUEST_ID)
        assert 422 == (await one.interrupt("7"))[0]
    assert 404 == status
    assert {"response", "cause"} == set(body["detail"])


async def test_interrupts_at_the_same_time_do_no_harm():
    """All of them are answered, and the stream has one end."""
    async with site(model("m", [*say("a")[:2], 3600.0])[1]) as one:
        reader, answers = ChatReader(), []

        async def interrupt(request_id):
            answers.append(await one.interrupt(request_id))

        async with one.open() as response:
            chunks = await read_until(response, reader, lambda: "token" in reader.names)
            (request_id,) = reader.data("start", "request_id")
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(interrupt, request_id)
            async for text in chunks:
                reader.feed(text)
    assert [200] * 8 == [status for status, _ in answers]
    assert any(body["interrupted"] for _, body in answers)
    assert 1 == reader.names.count("interrupted")


async def test_a_silent_stream_is_kept_alive():
    """By comments, which no page sees."""
    gate = trio.Event()

    async def main(run, input):
        await gate.wait()
        return "done"

    async with site(Agent("main", main), heartbeat=0.02) as one:
        reader = ChatReader()
        async with one.open() as response:
            async for text in response.aiter_text():
                reader.feed(text)
                if reader.comments:
                    gate.set()
    assert {": heartbeat"} == set(reader.comments)
    assert ["start", "token", "turn_complete", "end"] == reader.names


async def test_the_seed_beats_while_the_model_is_silent():
    """By the clock: nothing comes from upstream."""
    gate = trio.Event()

    async def main(run, input):
        with run.step("loading"):
            await gate.wait()
        return "done"

    settings = Settings(limits=LimitSettings(liveness=0.02))
    async with site(Agent("main", main), settings=settings) as one:
        reader = ChatReader()
        async with one.open(form="seed") as response:
            async for text in response.aiter_text():
                reader.feed(text)
                if reader.names.count("heartbeat") > 3:
                    gate.set()
    assert {"heartbeat"} == set(reader.data("heartbeat", "token"))
    assert ["turn_complete", "end"] == reader.names[-2:]


async def test_a_text_stream_is_silent_while_nothing_is_said():
    """It has no comments, however long it takes."""
    gate = trio.Event()

    async def main(run, input):
        await gate.wait()
        return "done"

    async with (
        site(Agent("main", main), heartbeat=0.02) as one,
        one.open(media_type="text/plain") as response,
    ):
        reader = ChatReader()
        async with one.open() as beside:
            async for text in beside.aiter_text():
                reader.feed(text)
                if len(reader.comments) > 3:
                    gate.set()
        assert "done" == "".join([piece async for piece in response.aiter_text()])


async def test_a_question_ends_the_stream_and_the_next_query_answers_it():
    """The response to the answer has the rest; a run asks as often as it wants."""
    async with site(guided) as one:
        first = await one.stream("these")
        (thread_id,) = first.data("start", "conversation_id")
        second = await one.stream("the red one", conversation_id=thread_id)
        third = await one.stream("no", conversation_id=thread_id)
        (run,) = list(one.server.runs)
    assert ["start", "token", "token", "token", "turn_complete", "end"] == first.names
    assert "Well.\n\nWhich one?" == first.text
    assert "start" == second.names[0]
    assert [thread_id] == second.data("start", "conversation_id")
    assert "the red one of these.\n\nSure?" == second.text
    assert "No." == third.text
    assert "end" == third.names[-1]
    assert "success" == run.end.outcome


async def test_a_question_is_answered_without_a_stream_as_well():
    """The prompt is the response, and the next query's response is the rest."""
    async with site(guided) as one:
        _, first = await one.ask("these")
        _, second = await one.ask("the red one", conversation_id=first["conversation_id"])
        refused, _ = await one.ask("perhaps", conversation_id=first["conversation_id"])
        _, third = await one.ask("yes", conversation_id=first["conversation_id"])
    assert "Well.\n\nWhich one?" == first["response"]
    assert "the red one of these.\n\nSure?" == second["response"]
    assert 422 == refused
    assert "" == third["response"]


async def test_a_conversation_that_is_busy_lets_the_next_query_wait():
    """It is answered in its turn."""
    gate, begun = trio.Event(), trio.Event()

    async def main(run, input):
        begun.set()
        await gate.wait()
        return input

    async with site(Agent("main", main)) as one:
        answers = []

        async def ask(query):
            answers.append((await one.ask(query, conversation_id=RUN_ID))[1]["response"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "first")
            await begun.wait()
            nursery.start_soon(ask, "second")
            await wait_until(lambda: one.server.runs.statistics().queued == 1)
            gate.set()
    assert ["first", "second"] == answers


async def test_who_leaves_cancels_what_they_have_asked_for():
    """Nobody else would hear the answer."""
    begun = trio.Event()

    async def main(run, input):
        begun.set()
        await trio.sleep_forever()

    async with site(Agent("main", main)) as one:
        async with connect(one.server.urls[0], is_native=False) as raw:
            await raw.send(request("POST", "/v1/streaming_query", b'{"query":"a"}'))
            await begun.wait()
            await raw.leave_by_fin()
        (run,) = list(one.server.runs)
        await run.done.wait()
    assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)


async def test_the_config_says_which_form_is_spoken():
    """A request may still say otherwise."""
    settings = Settings(dialects={"lightspeed": DialectSettings(form="seed")})
    async with site(searching(), settings=settings) as one:
        reader = await one.stream()
        run_id = next(iter(one.server.runs)).id
        watched = await one.http.get(f"/runs/{run_id}/events?dialect=lightspeed")
    assert "inference" in [data.get("role") for data in reader.data("token")]
    assert reader.frames == read_text(watched.text).frames


def read_text(text):
    reader = ChatReader()
    reader.feed(text)
    return reader


async def test_a_run_begun_elsewhere_can_be_watched_in_this_protocol():
    """One run, many dialects."""
    async with site(searching()) as one:
        begun = await one.http.post("/agents/m/runs", json={"input": "What is it?"})
        watched = await one.http.get(f"/runs/{begun.json()['id']}/events?dialect=lightspeed")
    reader = read_text(watched.text)
    assert [begun.json()["id"]] == reader.data("start", "conversation_id")
    assert "It is a system." == reader.text
