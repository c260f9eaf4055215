"""The Gemini API: what is asked, and what its stream says."""

import json

import pytest
import trio
from hypothesis import example, given, settings, strategies as st
from msgspec import Raw
from normalizing import collect, however_cut, play

from agentsse.errors import ProviderError
from agentsse.events import (
    PartDelta,
    PartFinished,
    PartStarted,
    ProviderEvent,
    ToolFinished,
    ToolStarted,
    Usage,
    decode_event,
    encode_event,
)
from agentsse.messages import (
    AssistantMessage,
    Echo,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.providers import Finish, HttpProvider, Prompt, encode_raw
from agentsse.providers.gemini import GeminiApi, GeminiNormalizer
from agentsse.testing.upstream import Failure, Refusal, Reply, Stop, open_upstream

LOOK = ToolSpec(
    "look",
    "Look somewhere.",
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"at": {"type": ["string", "null"]}},
        "additionalProperties": False,
    },
)


def make():
    """A machine for one call."""
    return GeminiNormalizer("s1.")


def sse(*chunks):
    """The bytes of a stream."""
    return b"".join(
        b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\r\n\r\n" for chunk in chunks
    )


def chunk(*parts, finish=None, **more):
    """One chunk with these parts."""
    candidate = {"content": {"parts": list(parts), "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    return {"candidates": [candidate], **more}


def told(*chunks):
    """What a stream of these chunks, cut anywhere, becomes; without an error."""
    produced, error = however_cut(make, sse(*chunks))
    assert error is None
    return produced


def failed(data):
    """The error that a stream of bytes, cut anywhere, ends with."""
    _, error = however_cut(make, data)
    assert isinstance(error, ProviderError)
    return error


def text_part(part_id, *deltas, kind="text"):
    """The events of a part."""
    return [
        PartStarted(part_id=part_id, kind=kind),
        *(PartDelta(part_id=part_id, kind=kind, delta=delta) for delta in deltas),
        PartFinished(part_id=part_id, kind=kind, text="".join(deltas)),
    ]


def call_part(part_id, call_id, name, arguments):
    """The events of a tool call."""
    return [
        PartStarted(part_id=part_id, kind="tool_call", name=name, call_id=call_id),
        PartDelta(part_id=part_id, kind="tool_call", delta=arguments),
        PartFinished(part_id=part_id, kind="tool_call", text=arguments, name=name, call_id=call_id),
    ]


# Reading ------------------------------------------------------------------------------------------


def test_text_comes_in_increments_and_usage_with_the_last_chunk():
    """Chunks of text are one part; the sums that came last count."""
    produced = told(
        chunk({"text": "Hé"}, usageMetadata={"promptTokenCount": 9, "totalTokenCount": 9}),
        chunk(
            {"text": "llo"},
            finish="STOP",
            usageMetadata={
                "promptTokenCount": 9,
                "cachedContentTokenCount": 4,
                "candidatesTokenCount": 2,
                "thoughtsTokenCount": 5,
            },
            modelVersion="gemini-2.5-flash",
        ),
    )
    usage = Usage(input_tokens=9, output_tokens=7, reasoning_tokens=5, cache_read_tokens=4)
    assert [*text_part("s1.p1", "Hé", "llo"), Finish("stop", usage)] == produced


def test_usage_may_come_after_the_finish_reason():
    """A chunk without candidates still counts, and what it leaves out was not taken back."""
    produced = told(
        chunk({"text": "a"}, finish="STOP", usageMetadata={"promptTokenCount": 3}),
        {"usageMetadata": {"candidatesTokenCount": 1, "toolUsePromptTokenCount": 2}},
    )
    assert Finish("stop", Usage(input_tokens=5, output_tokens=1)) == produced[-1]


def test_a_stream_is_over_with_the_finish_reason():
    """It is read on, for usage or an error may follow, but not waited for."""
    machine = make()
    list(machine.feed(sse(chunk({"text": "a"}))))
    assert not machine.is_over
    list(machine.feed(sse(chunk({"text": "a"}, finish="STOP"))))
    assert machine.is_over


def test_thoughts_are_reasoning():
    """A thought is a part of its own; text ends it, and the other way round."""
    produced = told(
        chunk({"text": "hm", "thought": True}, {"text": "", "thought": True}),
        chunk({"text": "yes"}),
        chunk({"text": ""}, {"text": "or no", "thought": True}, finish="STOP"),
    )
    assert [
        *text_part("s1.p1", "hm", kind="reasoning"),
        *text_part("s1.p2", "yes"),
        *text_part("s1.p3", "or no", kind="reasoning"),
        Finish("stop"),
    ] == produced


def test_a_function_call_comes_whole():
    """Several calls, in one chunk or more, are parts; an id that is missing is made."""
    produced = told(
        chunk(
            {"text": "Looking."},
            {"functionCall": {"name": "look", "args": {"at": "sky"}, "id": "fc1"}},
            {"functionCall": {"name": "look", "args": {"at": "sea"}}},
        ),
        chunk({"functionCall": {"name": "rest"}}, finish="STOP"),
    )
    assert [
        *text_part("s1.p1", "Looking."),
        *call_part("s1.p2", "fc1", "look", '{"at":"sky"}'),
        *call_part("s1.p3", "s1.c3", "look", '{"at":"sea"}'),
        *call_part("s1.p4", "s1.c4", "rest", "{}"),
        Finish("tool_calls"),
    ] == produced


def test_code_that_the_provider_runs_is_a_tool_of_the_provider():
    """Code and its result are a tool's start and end, with its id or a made one."""
    produced = told(
        chunk({"executableCode": {"language": "PYTHON", "code": "1+1", "id": "x9"}}),
        chunk({"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "2\n", "id": "x9"}}),
        chunk({"executableCode": {"code": "1/0"}}),
        chunk({"codeExecutionResult": {"outcome": "OUTCOME_FAILED", "output": "zero"}}),
        chunk({"codeExecutionResult": {"outcome": "OUTCOME_DEADLINE_EXCEEDED"}}, finish="STOP"),
    )
    name = "code_execution"

    def started(call_id, arguments):
        return ToolStarted(call_id=call_id, name=name, arguments=Raw(arguments))

    def finished(call_id, result, is_error):
        raw = Raw(result)
        return ToolFinished(
            call_id=call_id, name=name, result=raw, is_error=is_error, source="provider"
        )

    assert [
        started("x9", b'{"language":"PYTHON","code":"1+1"}'),
        finished("x9", b'"2\\n"', False),
        started("s1.x2", b'{"code":"1/0"}'),
        finished("s1.x2", b'"zero"', True),
        started("s1.x3", b"{}"),
        finished("s1.x3", b'""', True),
        Finish("stop"),
    ] == produced


def test_what_is_unknown_is_handed_on():
    """Images, parts of kinds to come, other candidates, citations, odd frames: all of it."""
    image = {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}
    other = {"content": {"parts": [{"text": "or"}]}, "index": 1}
    produced = told(
        chunk({"text": "a"}, image, {"text": "b"}, {"text": 7}),
        {"candidates": [other, {"groundingMetadata": {"q": 1}, "finishReason": "STOP"}]},
        {"candidates": [{"content": "odd"}, "odder", {"content": {"role": "model"}}]},
        {"candidates": 5},
        {"modelStatus": {}},
        ["list"],
        "text",
    )
    raws = [json.loads(bytes(one.raw)) for one in produced if isinstance(one, ProviderEvent)]
    assert [
        image,
        {"text": 7},
        other,
        {"groundingMetadata": {"q": 1}},
        {"content": "odd"},
        "odder",
        {"candidates": 5},
        {"modelStatus": {}},
        ["list"],
        "text",
    ] == raws
    texts = [one.text for one in produced if isinstance(one, PartFinished)]
    assert ["a", "b"] == texts
    assert Finish("stop") == produced[-1]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("RECITATION", "content_filter"),
        ("BLOCKLIST", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("SPII", "content_filter"),
        ("IMAGE_SAFETY", "content_filter"),
        ("MALFORMED_FUNCTION_CALL", "error"),
        ("LANGUAGE", "other"),
        ("SOMETHING_NEW", "other"),
    ],
)
def test_every_finish_reason_has_a_word_of_ours(reason, expected):
    """What is not known is `other`."""
    assert [Finish(expected)] == told({"candidates": [{"finishReason": reason}]})


def test_candidates_without_number_are_few_events():
    """Only the first candidate is told; of the others few are handed on one by one."""
    [first] = chunk({"text": "Hi"}, finish="STOP")["candidates"]
    others = [{"index": n} for n in range(1, 200_000)]

    produced, error = play(make, [sse({"candidates": [first, *others]})])

    assert error is None
    assert text_part("s1.p1", "Hi")[:2] == produced[:2]
    raw = [json.loads(bytes(one.raw)) for one in produced if isinstance(one, ProviderEvent)]
    assert [*others[:7], others[7:]] == raw
    assert "stop" == produced[-1].reason


def test_the_last_finish_reason_counts():
    """Early models said STOP with every chunk; an unspecified reason is none."""
    produced = told(
        chunk({"text": "a"}, finish="STOP"),
        chunk({"text": "b"}, finish="MAX_TOKENS"),
        chunk(finish="FINISH_REASON_UNSPECIFIED"),
    )
    assert [*text_part("s1.p1", "a", "b"), Finish("length")] == produced


def test_a_stream_without_a_finish_reason_is_incomplete():
    """The connection was cut: what came is told, and then the error."""
    assert "incomplete" == failed(sse(chunk({"text": "half"}))).code
    assert "incomplete" == failed(b"").code


def test_a_wrapped_chunk_is_read_as_a_bare_one():
    """Code Assist wraps each chunk as a response."""
    produced = told(
        {"response": chunk({"text": "a"}), "traceId": "t"},
        {"response": chunk(finish="STOP", usageMetadata={"promptTokenCount": 1})},
    )
    assert [*text_part("s1.p1", "a"), Finish("stop", Usage(input_tokens=1))] == produced


def test_a_last_frame_without_its_blank_line_counts():
    """Some servers end the stream with the frame's own line."""
    produced, error = however_cut(make, sse(chunk({"text": "a"}, finish="STOP")).rstrip())
    assert ([*text_part("s1.p1", "a"), Finish("stop")], None) == (produced, error)


# Errors -------------------------------------------------------------------------------------------

OVERLOADED = {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}


@pytest.mark.parametrize(
    "frame", [{"error": OVERLOADED}, [{"error": OVERLOADED}], {"response": {"error": OVERLOADED}}]
)
def test_an_error_in_a_frame_ends_the_call(frame):
    """As an object, in a list, or wrapped; what came before is told."""
    produced, error = however_cut(make, sse(chunk({"text": "a"}), frame))
    assert text_part("s1.p1", "a")[:2] == produced
    assert "overloaded" == error.code
    assert "gemini answered (503, UNAVAILABLE): The model is overloaded." == error.message


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("value", [{"error": OVERLOADED}, [{"error": OVERLOADED}]])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b": hello\r\n\r\nid: 7\nevent\n"])
def test_an_error_beside_the_frames_beats_the_finish(indent, value, end, start):
    """The API writes it as bare JSON into the stream, even after a finish reason."""
    data = start + sse(chunk({"text": "a"}, finish="STOP"))
    produced, error = however_cut(make, data + json.dumps(value, indent=indent).encode() + end)
    assert text_part("s1.p1", "a")[:2] == produced
    assert "overloaded" == error.code


def test_lines_that_are_no_error_are_ignored():
    """What no SSE reader would see is looked at for an error only, and only up to a bound."""
    data = b"noise\n" + b"x" * 200_000 + b"\n" + b"y" * 10 + b"\n" + sse(chunk(finish="STOP"))
    assert ([Finish("stop")], None) == play(make, [data])
    assert ([Finish("stop")], None) == play(make, [data[:100_000], data[100_000:]])


@pytest.mark.parametrize(
    ("feedback", "named"),
    [
        ({"blockReason": "SAFETY"}, "(SAFETY)"),
        ({"blockReason": "OTHER", "blockReasonMessage": "no \ud800 way"}, "(OTHER no \ufffd way)"),
    ],
)
def test_a_blocked_prompt_is_an_error(feedback, named):
    """There are no candidates then, and nobody else would answer it either."""
    data = b"data: " + json.dumps({"promptFeedback": feedback}).encode() + b"\n\n"
    error = failed(data)
    assert "content_filter" == error.code
    assert named in error.message


def test_feedback_that_blocks_nothing_is_no_error():
    """Ratings of the prompt come with answers too."""
    produced = told(
        {"promptFeedback": {"safetyRatings": []}},
        chunk({"text": "a"}, finish="STOP", promptFeedback={"blockReason": "SAFETY"}),
    )
    assert [*text_part("s1.p1", "a"), Finish("stop")] == produced


# The echo -----------------------------------------------------------------------------------------


def test_signed_parts_are_echoed_as_they_came():
    """Where one part is signed all go back, each by itself; what holds nothing does not."""
    parts = [
        {"text": "hm", "thought": True},
        {"text": "Look"},
        {"text": "ing."},
        {"functionCall": {"name": "look", "args": {"at": "sky"}, "id": "fc1"},
         "thoughtSignature": "c2ln"},
        {"functionCall": {"name": "look", "args": {"at": "sea"}, "id": "fc2"}},
        {"text": "", "thoughtSignature": "bGFzdA=="},
        {"thoughtSignature": "YWxvbmU="},
    ]  # fmt: skip
    produced = told(
        chunk(*parts[:2]),
        chunk({"text": ""}, parts[2], {}, {"thought": True}),
        chunk(*parts[3:], finish="STOP"),
    )
    assert Echo("gemini", parts) == produced[-1].echo
    assert "tool_calls" == produced[-1].reason
    texts = [one.text for one in produced if isinstance(one, PartFinished)]
    assert ["hm", "Looking.", '{"at":"sky"}', '{"at":"sea"}'] == texts


def test_without_a_signature_there_is_no_echo():
    """The message can be built from its text and calls."""
    produced = told(chunk({"text": "a"}, {"functionCall": {"name": "f"}}, finish="STOP"))
    assert produced[-1].echo is None


def test_an_echo_can_always_be_sent():
    """Half of a surrogate pair is replaced: JSON in UTF-8 could not carry it."""
    data = b'data: {"candidates": [{"content": {"parts": [{"text": "\\ud83d", '
    data += b'"thoughtSignature": "s"}]}, "finishReason": "STOP"}]}\n\n'
    produced, error = however_cut(make, data)
    assert error is None
    assert Echo("gemini", [{"text": "\ufffd", "thoughtSignature": "s"}]) == produced[-1].echo
    assert "\ufffd" == produced[-2].text


# Fuzz ---------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *("candidates", "content", "parts", "text", "thought", "thoughtSignature", "functionCall"),
        *("name", "args", "id", "error", "code", "message", "status", "executableCode", "language"),
        *("codeExecutionResult", "outcome", "output", "inlineData", "finishReason", "index"),
        *("usageMetadata", "promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount"),
        *("promptFeedback", "blockReason", "blockReasonMessage", "response"),
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 10**20)
    | st.floats()
    | st.sampled_from(["", "STOP", "OUTCOME_OK", "\ud800", "a"])
)


@st.composite
def shapes(draw, depth=7):
    """JSON with the API's names, where they may or may not belong."""
    kind = draw(st.integers(0, 3)) if depth else 0
    if kind == 0:
        return draw(LEAVES)
    if kind == 1:
        return draw(st.lists(shapes(depth - 1), max_size=2))
    return draw(st.dictionaries(WORDS, shapes(depth - 1), max_size=3))


ANY = shapes(3)
PART = st.one_of(
    st.fixed_dictionaries({"text": ANY}, optional={"thought": ANY, "thoughtSignature": ANY}),
    st.fixed_dictionaries(
        {"functionCall": st.fixed_dictionaries({}, optional={"name": ANY, "args": ANY, "id": ANY})},
        optional={"thoughtSignature": ANY},
    ),
    st.fixed_dictionaries(
        {"executableCode": st.fixed_dictionaries({}, optional={"code": ANY, "id": ANY})}
    ),
    st.fixed_dictionaries(
        {"codeExecutionResult": st.fixed_dictionaries({}, optional={"output": ANY, "id": ANY})}
    ),
    ANY,
)
CANDIDATE = st.fixed_dictionaries(
    {},
    optional={
        "content": st.fixed_dictionaries({"parts": st.lists(PART, max_size=3)}) | ANY,
        "finishReason": st.just("STOP") | ANY,
        "index": ANY,
    },
)
CHUNK = st.fixed_dictionaries(
    {},
    optional={
        "candidates": st.lists(CANDIDATE | ANY, max_size=2) | ANY,
        "usageMetadata": ANY,
        "promptFeedback": ANY,
        "response": ANY,
    },
)


@settings(max_examples=150, deadline=None)
@given(st.lists(CHUNK | shapes(), max_size=4))
@example([{"candidates": [{"content": {"parts": [{"functionCall": {"args": [1]}}]}}]}])
def test_no_frame_is_fatal(frames):
    """Whatever stands where something else belongs: events that can be stored, or an error."""
    data = b"".join(b"data: " + json.dumps(frame).encode() + b"\n\n" for frame in frames)
    produced, error = play(make, [data])
    assert error is None or isinstance(error, ProviderError)
    for one in produced:
        if isinstance(one, Finish):
            encode_raw(one.echo and one.echo.value)
        else:
            assert one == decode_event(encode_event(one))
    open_parts = [one.part_id for one in produced if isinstance(one, PartStarted)]
    finished = [one.part_id for one in produced if isinstance(one, PartFinished)]
    assert error is not None or sorted(open_parts) == sorted(finished)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='data:{}[]"error \r\n').map(str.encode))
def test_no_bytes_are_fatal(data):
    """Bytes that are no frames at all leave an incomplete call."""
    _, error = however_cut(make, data)
    assert isinstance(error, ProviderError)


# Writing ------------------------------------------------------------------------------------------


def body_of(*messages, model="gemini-2.5-flash", tools=(), **api):
    """The body of a request."""
    return GeminiApi(**api).request(Prompt(model, messages, tools)).body


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("gemini-2.5-flash", "models/gemini-2.5-flash"),
        ("models/gemini-2.5-flash", "models/gemini-2.5-flash"),
        ("tunedModels/mine", "tunedModels/mine"),
        ("../x?key=1#é", "models/..%2Fx%3Fkey%3D1%23%C3%A9"),
        ("a/b", "models/a%2Fb"),
    ],
)
def test_the_model_stands_in_the_path(model, path):
    """Once, and quoted; the key never does."""
    request = GeminiApi(base_url="http://h/v1beta/", key="k3y").request(Prompt(model, ()))
    assert f"http://h/v1beta/{path}:streamGenerateContent?alt=sse" == request.url
    assert {"x-goog-api-key": "k3y"} == request.headers


def test_the_key_is_shown_to_nobody():
    """Neither in a representation, nor as a header where there is none."""
    assert "k3y" not in repr(GeminiApi(key="k3y"))
    assert {} == GeminiApi().request(Prompt("m", ())).headers


def test_a_conversation_is_written():
    """System messages stand apart; turns of one role are one; results answer with an object."""
    calls = ToolCall("c1", "look", '{"at":"sky"}'), ToolCall("c2", "f", "[")
    body = body_of(
        SystemMessage("Be brief."),
        UserMessage("Hi"),
        UserMessage("there"),
        AssistantMessage("Hello", calls),
        ToolMessage("c1", "look", '{"output":"blue","n":1}'),
        ToolMessage("c2", "f", '"no such tool"', is_error=True),
        SystemMessage("Be kind."),
        SystemMessage(""),
        AssistantMessage(""),
        UserMessage(""),
        UserMessage("And?"),
    )
    responses = [
        {"functionResponse": {"name": "look", "response": {"output": {"output": "blue", "n": 1}}}},
        {"functionResponse": {"name": "f", "response": {"error": "no such tool"}}},
    ]
    expected = {
        "contents": [
            {"role": "user", "parts": [{"text": "Hi"}, {"text": "there"}]},
            {
                "role": "model",
                "parts": [
                    {"text": "Hello"},
                    {"functionCall": {"name": "look", "args": {"at": "sky"}}},
                    {"functionCall": {"name": "f", "args": {"_raw": "["}}},
                ],
            },
            {"role": "user", "parts": [*responses, {"text": "And?"}]},
        ],
        "systemInstruction": {"parts": [{"text": "Be brief."}, {"text": "Be kind."}]},
    }
    assert expected == body


def test_tools_are_declared_with_their_schema_as_it_is():
    """The field that takes JSON Schema takes all of it; without parameters it is left out."""
    body = body_of(tools=(LOOK, ToolSpec("rest", "Rest.", {"type": "object", "properties": {}})))
    assert [
        {
            "functionDeclarations": [
                {
                    "name": "look",
                    "description": "Look somewhere.",
                    "parametersJsonSchema": LOOK.parameters,
                },
                {"name": "rest", "description": "Rest."},
            ]
        }
    ] == body["tools"]


def test_options_are_put_over_the_body():
    """What an option names is replaced; thoughts are asked for in no other way."""
    config = {"thinkingConfig": {"includeThoughts": True}}
    body = body_of(
        UserMessage("Hi"), tools=(LOOK,), options={"tools": [], "generationConfig": config}
    )
    assert ([], config) == (body["tools"], body["generationConfig"])


def test_an_echo_is_written_verbatim():
    """Its parts stand as they came, and a result names the id that the model gave, not ours."""
    parts = [
        {"functionCall": {"name": "look", "args": {}, "id": "fc1"}, "thoughtSignature": "c2ln"},
        {"functionCall": {"name": "f", "args": {}}},
        {"functionCall": None},
    ]
    calls = (ToolCall("fc1", "look", "{}"), ToolCall("s1.c2", "f", "{}"))
    message = AssistantMessage("", calls, Echo("gemini", parts))
    results = ToolMessage("fc1", "look", "1"), ToolMessage("s1.c2", "f", "2")
    body = body_of(message, AssistantMessage("more"), *results, model="gemini-3-pro")
    assert [
        {"role": "model", "parts": [*parts, {"text": "more"}]},
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "look", "response": {"output": 1}, "id": "fc1"}},
                {"functionResponse": {"name": "f", "response": {"output": 2}}},
            ],
        },
    ] == body["contents"]
    assert 3 == len(parts)


@pytest.mark.parametrize(
    ("model", "signature"),
    [
        ("gemini-1.5-pro", None),
        ("models/gemini-2.5-flash", None),
        ("gemini-3-pro-preview", "skip_thought_signature_validator"),
        ("gemini-flash-latest", "skip_thought_signature_validator"),
        ("gemma-3-27b-it", None),
    ],
)
def test_a_call_that_another_model_made_is_marked_as_such(model, signature):
    """Models from version 3 on refuse a first call without a signature; the word stands for one."""
    foreign = Echo("anthropic", [{"type": "thinking"}])
    calls = (ToolCall("1", "f", "{}"), ToolCall("2", "g", "{}"))
    [content] = body_of(AssistantMessage("", calls, foreign), model=model)["contents"]
    assert [signature, None] == [part.get("thoughtSignature") for part in content["parts"]]


# All of it ----------------------------------------------------------------------------------------


class Run:
    """What a provider knows of a run."""

    window = 0.0

    async def sleep_until(self, when):
        """Wait."""
        await trio.sleep_until(when)

    def lull(self):
        """Nothing waits."""


async def call(provider, prompt):
    """What a call through the provider produces."""
    produced = []
    async with provider.open(Run()) as connection:
        machine = connection.normalizer("s1.")
        async with connection.stream(prompt) as chunks:
            async for data in chunks:
                collect(machine.feed(data), produced)
        collect(machine.close(), produced)
    return produced


@pytest.mark.parametrize("style", ["usual", "sparse", "chatty"])
async def test_a_server_answers_over_a_real_socket(style):
    """Thoughts, text and calls come through, however talkative the server is."""
    usage = Usage(input_tokens=9, output_tokens=7, reasoning_tokens=2, cache_read_tokens=4)
    calls = [("look", '{"at":"sky"}'), ("look", '{"at":"sea"}')]
    reply = Reply("Looking.", reasoning="hm", calls=calls, usage=usage, style=style)
    with trio.fail_after(10):
        async with open_upstream("gemini", [reply]) as upstream:
            api = GeminiApi(upstream.base_url, "k3y")
            prompt = Prompt("gemini-3-pro", (UserMessage("Look!"),), (LOOK,))
            produced = await call(HttpProvider("google", api, "k3y"), prompt)
    finished = [(one.kind, one.text) for one in produced if isinstance(one, PartFinished)]
    assert [
        ("reasoning", "hm"),
        ("text", "Looking."),
        ("tool_call", '{"at":"sky"}'),
        ("tool_call", '{"at":"sea"}'),
    ] == finished
    assert ("tool_calls", usage) == (produced[-1].reason, produced[-1].usage)
    assert (style == "sparse") == (produced[-1].echo is None)
    [request] = upstream.requests
    assert request.path.endswith("/models/gemini-3-pro:streamGenerateContent?alt=sse")
    assert "k3y" == request.headers["x-goog-api-key"]
    assert [{"role": "user", "parts": [{"text": "Look!"}]}] == request.body["contents"]


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Reply("half", failure=Failure("overloaded")), "overloaded"),
        (Reply("half", ends=Stop(1)), "incomplete"),
        (Reply(instead=Refusal("not_found")), "not_found"),
    ],
)
async def test_a_server_that_fails_is_an_error(reply, code):
    """In the stream or instead of it, the error says what was wrong."""
    with trio.fail_after(10):
        async with open_upstream("gemini", [reply]) as upstream:
            provider = HttpProvider("google", GeminiApi(upstream.base_url))
            with pytest.raises(ProviderError) as caught:
                await call(provider, Prompt("gemini-2.5-flash", (UserMessage("Hi"),)))
    assert code == caught.value.code
