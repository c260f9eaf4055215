"""The fakes of `agentsse.testing.upstream` are true: their vendors' own clients understand them.

What a client reads out of a stream is compared with what the reply said in neutral words. Gemini's
client is not asked: its bytes are checked in test_upstream.py against the public description.
"""

import anthropic
import attrs
import openai
import pytest
import trio

from agentsse.events import Usage
from agentsse.testing.upstream import Failure, Refusal, Reply, open_upstream

# Both clients leave their async generators to the garbage collector when a stream ends, or breaks,
# before its connection does; Trio says so. That is theirs to mend.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Async generator '(openai|anthropic|httpx2|httpcore2)\.:ResourceWarning"
)

PATIENCE = 20  # seconds; nothing here takes one
QUESTION = [{"role": "user", "content": "What is the weather?"}]
TEXT = "It is sunny in Köln 😀."
REASONING = "Let me see."
CALLS = [("weather", '{"city":"Köln","days":3}'), ("clock", '{"zone":"Europe/Berlin"}')]
USAGE = Usage(
    input_tokens=120,
    output_tokens=40,
    reasoning_tokens=9,
    cache_read_tokens=100,
    cache_write_tokens=8,
)
FULL = Reply(["It is ", "sunny in Köln 😀", "."], reasoning=["Let ", "me see."], calls=CALLS,
             usage=USAGE)  # fmt: skip
STYLES = pytest.mark.parametrize("style", ["usual", "chatty"])


def open_openai(upstream):
    return openai.AsyncOpenAI(base_url=upstream.base_url, api_key="key", max_retries=0)


def open_anthropic(upstream):
    return anthropic.AsyncAnthropic(base_url=upstream.base_url, api_key="key", max_retries=0)


def stream_chat(client):
    """The helper that puts a chat completion together."""
    return client.chat.completions.stream(
        model="gpt-5", messages=QUESTION, stream_options={"include_usage": True}
    )


def stream_responses(client):
    """The helper that puts a response together."""
    return client.responses.stream(model="gpt-5", input="What is the weather?")


def stream_messages(client):
    """The helper that puts a message together."""
    return client.messages.stream(model="claude-5", max_tokens=1000, messages=QUESTION)


CLIENTS = pytest.mark.parametrize(
    ("kind", "open_client", "stream"),
    [
        ("openai_chat", open_openai, stream_chat),
        ("openai_responses", open_openai, stream_responses),
        ("anthropic", open_anthropic, stream_messages),
    ],
)


async def read(stream):
    """Every event of a stream."""
    return [event async for event in stream]


# OpenAI, chat completions


@STYLES
async def test_openai_reads_a_chat_completion(style):
    """Text, two parallel calls, the finish and the usage come out of the chunks."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("openai_chat", [attrs.evolve(FULL, style=style)]) as upstream,
            open_openai(upstream) as client,
            stream_chat(client) as stream,
        ):
            completion = await stream.get_final_completion()
            await upstream.wait_until(lambda: upstream.open_streams == 0)

    choice = completion.choices[0]
    assert TEXT == choice.message.content
    assert CALLS == [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
    assert 2 == len({call.id for call in choice.message.tool_calls})
    assert "tool_calls" == choice.finish_reason
    usage = completion.usage
    assert (120, 40, 160) == (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert 9 == usage.completion_tokens_details.reasoning_tokens
    assert 100 == usage.prompt_tokens_details.cached_tokens
    assert "gpt-5" == completion.model
    assert 0 == upstream.hangups


@pytest.mark.parametrize(
    ("style", "field"),
    [("usual", "reasoning_content"), ("sparse", "reasoning"), ("chatty", "reasoning")],
)
async def test_openai_reads_reasoning_beside_the_content(style, field):
    """Compatible servers stream reasoning in a field of their own, which the client hands on."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("openai_chat", [attrs.evolve(FULL, style=style)]) as upstream,
            open_openai(upstream) as client,
        ):
            chunks = await read(
                await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
            )

    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert REASONING == "".join(getattr(delta, field, None) or "" for delta in deltas)
    assert TEXT == "".join(delta.content or "" for delta in deltas)


async def test_openai_is_told_the_usage_only_where_it_asks():
    """As the real server, the fake wants `include_usage`; without it no chunk has any."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("openai_chat", [FULL]) as upstream,
            open_openai(upstream) as client,
        ):
            chunks = await read(
                await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
            )

    assert {None} == {chunk.usage for chunk in chunks}


# OpenAI, responses


@STYLES
async def test_openai_reads_a_response(style):
    """The helper checks the order of all events, and puts every item together."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("openai_responses", [attrs.evolve(FULL, style=style)]) as upstream,
            open_openai(upstream) as client,
            stream_responses(client) as stream,
        ):
            events = await read(stream)
            response = await stream.get_final_response()
            await upstream.wait_until(lambda: upstream.open_streams == 0)

    reasoning, message, *calls = response.output
    assert REASONING == reasoning.summary[0].text
    assert TEXT == response.output_text == message.content[0].text
    assert CALLS == [(call.name, call.arguments) for call in calls]
    assert 2 == len({call.call_id for call in calls})
    assert "completed" == response.status
    usage = response.usage
    assert (120, 40, 160) == (usage.input_tokens, usage.output_tokens, usage.total_tokens)
    assert 9 == usage.output_tokens_details.reasoning_tokens
    assert 100 == usage.input_tokens_details.cached_tokens
    assert "gpt-5" == response.model
    assert 0 == upstream.hangups
    assert list(range(len(events))) == [event.sequence_number for event in events]
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert [arguments for _, arguments in CALLS] == [
        "".join(delta.delta for delta in deltas if delta.output_index == index) for index in (2, 3)
    ]


async def test_openai_reads_a_response_that_is_incomplete():
    """A response that was too long ends with an event, and a reason, of its own."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("openai_responses", [Reply("It is", finish="length")]) as upstream,
            open_openai(upstream) as client,
            stream_responses(client) as stream,
        ):
            last = (await read(stream))[-1]

    assert "response.incomplete" == last.type
    assert "max_output_tokens" == last.response.incomplete_details.reason


@pytest.mark.parametrize(("form", "kind"), [("failed", "response.failed"), ("flat_error", "error")])
async def test_openai_hands_on_errors_of_a_response_as_events(form, kind):
    """The client raises only where an event has an error object; the rest it hands on."""
    reply = attrs.evolve(FULL, failure=Failure("rate_limit", after=9, form=form))
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("openai_responses", [reply]) as upstream,
            open_openai(upstream) as client,
            stream_responses(client) as stream,
        ):
            last = (await read(stream))[-1]

    assert kind == last.type
    assert "rate_limit_exceeded" == (last.response.error if form == "failed" else last).code


# Anthropic


@pytest.mark.parametrize("style", ["usual", "sparse", "chatty"])
async def test_anthropic_reads_a_message(style):
    """Thinking, text, two parallel tools, the stop reason and the usage come out of the blocks."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("anthropic", [attrs.evolve(FULL, style=style)]) as upstream,
            open_anthropic(upstream) as client,
            stream_messages(client) as stream,
        ):
            message = await stream.get_final_message()
            await upstream.wait_until(lambda: upstream.open_streams == 0)

    thinking, text, *tools = message.content
    assert REASONING == thinking.thinking
    assert bool(thinking.signature) == (style != "sparse")
    assert TEXT == text.text
    assert [("weather", {"city": "Köln", "days": 3}), ("clock", {"zone": "Europe/Berlin"})] == [
        (tool.name, tool.input) for tool in tools
    ]
    assert 2 == len({tool.id for tool in tools})
    assert "tool_use" == message.stop_reason
    usage = message.usage
    assert (12, 100, 8, 40) == (
        usage.input_tokens,
        usage.cache_read_input_tokens,
        usage.cache_creation_input_tokens,
        usage.output_tokens,
    )
    assert 9 == usage.output_tokens_details.thinking_tokens
    assert "claude-5" == message.model
    assert 0 == upstream.hangups


@pytest.mark.parametrize(
    ("finish", "stop_reason"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal"),
     ("pause_turn", "pause_turn")],
)  # fmt: skip
async def test_anthropic_reads_why_the_model_stopped(finish, stop_reason):
    """Neutral words become Anthropic's; its own words stay."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("anthropic", [Reply("It is", finish=finish)]) as upstream,
            open_anthropic(upstream) as client,
            stream_messages(client) as stream,
        ):
            message = await stream.get_final_message()

    assert stop_reason == message.stop_reason


# All of them


def raised(kind):
    """The errors of the client that speaks to that API."""
    return anthropic if kind == "anthropic" else openai


@CLIENTS
async def test_an_error_in_the_middle_is_raised(kind, open_client, stream):
    """A client that has read some of an answer gets the vendor's error as its own."""
    reply = attrs.evolve(FULL, failure=Failure("overloaded", after=6))
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, [reply]) as upstream, open_client(upstream) as client:
            with pytest.raises(raised(kind).APIError, match=r"(?i)overloaded"):
                async with stream(client) as events:
                    await read(events)


@CLIENTS
async def test_an_error_after_the_finish_is_raised(kind, open_client, stream):
    """Whoever reads to the end of the stream does not miss it."""
    reply = attrs.evolve(FULL, failure=Failure("server_error"))
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, [reply]) as upstream, open_client(upstream) as client:
            with pytest.raises(raised(kind).APIError):
                async with stream(client) as events:
                    await read(events)


@CLIENTS
@pytest.mark.parametrize(
    "refused",
    [
        ("auth", "AuthenticationError", 401),
        ("bad_request", "BadRequestError", 400),
        ("context_length", "BadRequestError", 400),
        ("not_found", "NotFoundError", 404),
        ("rate_limit", "RateLimitError", 429),
        ("server_error", "InternalServerError", 500),
    ],
)
async def test_a_refusal_is_raised_as_what_it_is(kind, open_client, stream, refused):
    """The status, the vendor's JSON and Retry-After reach whoever called."""
    fault, error, status = refused
    refusal = Refusal(fault, retry_after="3")
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream(kind, [Reply(instead=refusal)]) as upstream,
            open_client(upstream) as client,
        ):
            with pytest.raises(getattr(raised(kind), error)) as caught:
                async with stream(client):
                    pass

    assert status == caught.value.status_code
    assert "3" == caught.value.response.headers["retry-after"]
    body = caught.value.body
    assert (body.get("error") or body)["message"] in str(caught.value)


@CLIENTS
async def test_a_client_that_leaves_is_seen(kind, open_client, stream):
    """Leaving a stream closes the connection, and the fake counts it."""
    reply = attrs.evolve(FULL, gap=3600)
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, [reply]) as upstream, open_client(upstream) as client:
            async with stream(client) as events:
                await anext(aiter(events))
            await upstream.wait_hangups()

    assert (1, 0) == (upstream.hangups, upstream.open_streams)


@CLIENTS
async def test_what_the_client_sends_is_recorded(kind, open_client, stream):
    """The decoded body, the path and the headers are there to be looked at."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream(kind, [FULL]) as upstream,
            open_client(upstream) as client,
            stream(client) as events,
        ):
            await read(events)

    [request] = upstream.requests
    assert "POST" == request.method
    assert request.body["stream"] is True
    assert "key" in (request.headers.get("x-api-key") or request.headers["authorization"])
