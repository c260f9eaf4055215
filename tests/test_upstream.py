"""The fake model servers say what they were told, misbehave as they were told, and see who leaves.

Whether their streams are those of the real servers is asked in test_sdks.py; of Gemini, whose
client needs more than it is worth here, the fields are held against the public description:
https://ai.google.dev/api/generate-content. The client is a socket, or a pair of streams in memory.
"""

import json
import math
import socket
import ssl
import struct
import zlib
from contextlib import asynccontextmanager
from functools import partial
from itertools import product, repeat
from typing import get_args

import attrs
import h11
import httpx2
import pytest
import trio
from msgspec import structs
from normalizing import however_cut, play
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from agentsse.events import PartDelta, PartFinished, Usage
from agentsse.providers import Finish
from agentsse.providers.anthropic import AnthropicApi
from agentsse.providers.gemini import GeminiApi
from agentsse.providers.openai_chat import OpenAIChatApi
from agentsse.providers.openai_responses import OpenAIResponsesApi
from agentsse.sse import Decoder
from agentsse.testing.upstream import (
    INVALID,
    Bomb,
    Call,
    Cut,
    Failure,
    Fault,
    Flood,
    Hang,
    Page,
    Refusal,
    Reply,
    Stop,
    Upstream,
    error_body,
    frames,
    halves,
    open_upstream,
    tool_round,
)

PATIENCE = 20  # seconds; nothing here takes one
FAULTS = get_args(Fault)
PATHS = {
    "openai_chat": "/v1/chat/completions",
    "openai_responses": "/v1/responses",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/gemini-3:streamGenerateContent?alt=sse",
}
BODY = {
    "model": "m-1",
    "stream": True,
    "max_tokens": 10,
    "stream_options": {"include_usage": True},
}
KINDS = pytest.mark.parametrize("kind", list(PATHS))
STYLES = pytest.mark.parametrize("style", ["usual", "sparse", "chatty"])
CALLS = [("weather", '{"city":"Köln","days":3}'), ("clock", '{"zone":"Europe/Berlin"}')]
USAGE = Usage(
    input_tokens=120,
    output_tokens=40,
    reasoning_tokens=9,
    cache_read_tokens=100,
    cache_write_tokens=8,
)
FULL = Reply(["It is ", "sunny."], reasoning=["Let ", "me see."], calls=CALLS, usage=USAGE)


def read_frames(data):
    """The name and the value of every frame; the rest of a stream that broke off is left out."""
    return [
        (frame.event, "[DONE]" if frame.data == "[DONE]" else json.loads(frame.data))
        for frame in Decoder().feed(data)
    ]


def values(kind, reply):
    """The values of all frames of a reply."""
    return [value for _, value in read_frames(b"".join(frames(kind, reply)))]


def request(kind, *, path=None, method="POST", body=BODY, **headers):
    """The bytes of a request that the real server would understand."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"host": "h", "content-length": str(len(data)), "anthropic-version": "2023-06-01"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path or PATHS[kind]} HTTP/1.1", *(f"{n}: {v}" for n, v in sent.items())]
    return "\r\n".join([*lines, "", ""]).encode() + data


@attrs.define(eq=False)
class Client:
    """One connection: what is sent is bytes, what comes is read by h11."""

    stream: trio.abc.Stream
    kind: str
    http: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT))
    head: h11.Response | None = None
    body: bytes = b""
    received: int = 0

    async def ask(self, data=None):
        """Send a request, and read the head of its answer."""
        await self.send(data)
        self.head = await self.next()

    async def send(self, data=None):
        """Send a request."""
        if self.http.our_state is h11.DONE:
            self.http.start_next_cycle()
        self.body = b""
        self.http.send(h11.Request(method="POST", target="/", headers=[("Host", "h")]))
        self.http.send(h11.EndOfMessage())
        await self.stream.send_all(request(self.kind) if data is None else data)

    async def next(self):
        """The next event; a `RemoteProtocolError` where the connection ends too early."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            data = await self.stream.receive_some(65536)
            self.received += len(data)
            self.http.receive_data(data)
        return event

    async def finish(self):
        """Read the body to its end."""
        while isinstance(event := await self.next(), h11.Data):
            self.body += event.data
        assert isinstance(event, h11.EndOfMessage), event
        return self.body

    async def read_frames(self, count):
        """Read on until there are so many frames."""
        while len(found := read_frames(self.body)) < count:
            self.body += (await self.next()).data
        return found

    @property
    def status(self):
        """Of the answer."""
        return self.head.status_code

    @property
    def headers(self):
        """Of the answer."""
        return {name.decode(): value.decode() for name, value in self.head.headers}


@asynccontextmanager
async def connect(upstream):
    """Connect by a socket."""
    port = httpx2.URL(upstream.base_url).port
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield Client(stream, upstream.kind)


@asynccontextmanager
async def connect_in_memory(upstream):
    """Connect without any socket."""
    async with trio.open_nursery() as nursery:
        ours, theirs = memory_stream_pair()
        nursery.start_soon(upstream.answer, theirs)
        async with ours:
            yield Client(ours, upstream.kind)


CONNECTS = pytest.mark.parametrize("connected", [connect, connect_in_memory])


# What is written


@KINDS
@STYLES
@pytest.mark.parametrize("line_end", [None, b"\n", b"\r\n", b"\r"])
def test_every_frame_is_an_event_of_json(kind, style, line_end):
    """Whatever the style and the line end, our decoder and a JSON parser read all of it."""
    written = frames(kind, attrs.evolve(FULL, style=style, line_end=line_end))

    named = [read_frames(frame) for frame in written]
    assert {1} == {len(found) for found in named}
    for [(name, value)] in named:
        assert value == "[DONE]" or isinstance(value, dict)
        if kind in ("openai_responses", "anthropic"):
            assert name == value["type"]
        else:
            assert "message" == name


@KINDS
def test_line_ends_change_nothing_else(kind):
    """A stream with CRLF is the one with LF, but for its line ends; Gemini's own are CRLF."""
    lf = b"".join(frames(kind, attrs.evolve(FULL, line_end=b"\n")))
    crlf = b"".join(frames(kind, attrs.evolve(FULL, line_end=b"\r\n")))

    assert lf.replace(b"\n", b"\r\n") == crlf
    assert (crlf if kind == "gemini" else lf) == b"".join(frames(kind, FULL))


@KINDS
def test_done_is_sent_by_habit_or_by_order(kind):
    """Chat completions end with [DONE], the others do not; a reply may want it otherwise."""
    done = {
        has_done: values(kind, attrs.evolve(FULL, has_done=has_done)).count("[DONE]")
        for has_done in (None, True, False)
    }

    assert {None: int(kind == "openai_chat"), True: 1, False: 0} == done


@KINDS
def test_ids_differ_between_responses(kind):
    """The number of a response is in its ids; the same number gives the same bytes."""
    first = b"".join(frames(kind, FULL, number=1))

    assert first == b"".join(frames(kind, FULL, number=1))
    assert first != b"".join(frames(kind, FULL, number=2))


# Of every object that Gemini streams: the fields that its public description knows.
GEMINI = {
    "": {"candidates", "usageMetadata", "modelVersion", "responseId"},
    "candidates": {"content", "finishReason", "finishMessage", "safetyRatings", "index"},
    "content": {"parts", "role"},
    "parts": {"text", "thought", "thoughtSignature", "functionCall"},
    "functionCall": {"id", "name", "args"},
    "safetyRatings": {"category", "probability"},
    "usageMetadata": {
        "promptTokenCount",
        "cachedContentTokenCount",
        "candidatesTokenCount",
        "thoughtsTokenCount",
        "totalTokenCount",
    },
}


def check_fields(value, name=""):
    """Every object has only fields that its description knows."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and name != "args":
            assert not set(item) - GEMINI[name], name
            for key, inner in item.items():
                check_fields(inner, key)


@STYLES
def test_gemini_is_written_as_it_is_described(style):
    """Thoughts, text, whole calls, one finish and the usage, in fields that are described."""
    chunks = values("gemini", attrs.evolve(FULL, style=style))

    check_fields(chunks)
    candidates = [candidate for chunk in chunks for candidate in chunk["candidates"]]
    parts = [part for c in candidates if "content" in c for part in c["content"]["parts"]]
    texts = [part for part in parts if "text" in part]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    assert "Let me see." == "".join(part["text"] for part in texts if part.get("thought"))
    assert "It is sunny." == "".join(part["text"] for part in texts if not part.get("thought"))
    assert CALLS == [
        (call["name"], json.dumps(call["args"], ensure_ascii=False, separators=(",", ":")))
        for call in calls
    ]
    assert (style == "sparse") == all("id" not in call for call in calls)
    assert ["STOP"] == [c["finishReason"] for c in candidates if "finishReason" in c]
    assert {
        "promptTokenCount": 120,
        "cachedContentTokenCount": 100,
        "candidatesTokenCount": 31,
        "thoughtsTokenCount": 9,
        "totalTokenCount": 160,
    } == chunks[-1]["usageMetadata"]


@pytest.mark.parametrize("arguments", ['{"city":', "[1]", "3"])
def test_gemini_says_that_a_call_is_malformed(arguments):
    """It has no place for arguments that are no object: the call is lost, the finish says so."""
    *_, last = values("gemini", Reply("Well.", calls=[("weather", arguments), ("clock", "{}")]))

    [candidate] = last["candidates"]
    assert "MALFORMED_FUNCTION_CALL" == candidate["finishReason"]
    assert arguments in candidate["finishMessage"]


@pytest.mark.parametrize("kind", ["openai_chat", "openai_responses", "anthropic"])
def test_broken_arguments_go_out_as_they_are(kind):
    """The other three stream the text of arguments, whatever it is."""
    data = b"".join(frames(kind, Reply(calls=[("weather", '{"city": nowhere')], style="sparse")))

    assert rb"nowhere" in data


@KINDS
def test_a_call_may_have_the_id_of_another(kind):
    """Ids are made unless they are given; two calls may be given the same."""
    reply = Reply(calls=[Call("a", call_id="same"), Call("b", call_id="same"), Call("c")])
    data = b"".join(frames(kind, reply))

    assert 2 <= data.count(b'"same"')
    assert b"1x3" in data


@KINDS
def test_a_surrogate_pair_is_split_over_two_deltas(kind):
    """Each half goes out as an escape; put together they are the character again."""
    data = b"".join(frames(kind, Reply(["It is ", *halves("sunny 😀!")])))

    assert rb"\ud83d" in data.partition(rb"\ude00")[0]
    assert b"\xf0\x9f\x98\x80" not in data
    assert ["a\ud83d", "\ude00b\ud83d", "\ude00"] == halves("a😀b😀")


@KINDS
def test_a_byte_that_no_utf8_holds_is_put_into_a_text(kind):
    """It stands in the middle of a frame, and the rest of the frame is well."""
    data = b"".join(frames(kind, Reply(f"caf{INVALID}!")))

    assert b"caf\xff!" in data
    assert "caf\ufffd!" in json.dumps(read_frames(data), ensure_ascii=False)


@KINDS
def test_text_is_written_as_utf8(kind):
    """As the real servers do; only what UTF-8 cannot carry is escaped."""
    assert "Köln 😀".encode() in b"".join(frames(kind, Reply("Köln 😀")))


@KINDS
def test_the_usage_may_be_left_out(kind):
    """A reply without usage has none, or as good as none, on the wire."""
    text = b"".join(frames(kind, attrs.evolve(FULL, usage=None))).decode()

    assert "120" not in text
    assert "40" not in text


def told_error(kind, value):
    """The code and the message of an error in a stream, however it is wrapped."""
    error = value.get("response", value).get("error") or value
    return error.get("code") or error["type"], error["message"]


@KINDS
@STYLES
@pytest.mark.parametrize("after", [0, 3, -1, None])
def test_an_error_ends_a_stream(kind, style, after):
    """It comes after so many frames, as a slice counts them, or after the finish; nothing after."""
    reply = attrs.evolve(FULL, style=style)
    well = values(kind, attrs.evolve(reply, has_done=False))
    if kind == "anthropic":
        well = well[:-1]  # the finish is said in the last but one

    failed = values(kind, attrs.evolve(reply, failure=Failure("overloaded", after)))

    assert well[:after] == failed[:-1]
    code, message = told_error(kind, failed[-1])
    assert code in ("server_is_overloaded", "overloaded_error", 503)
    assert "overloaded" in message.lower()


@pytest.mark.parametrize("form", ["error", "flat_error", "failed"])
def test_openai_responses_has_three_forms_of_errors(form):
    """All of them have the next number, and say what is wrong."""
    reply = attrs.evolve(FULL, failure=Failure("rate_limit", 5, form))
    *_, (name, value) = read_frames(b"".join(frames("openai_responses", reply)))

    assert name == value["type"] == ("response.failed" if form == "failed" else "error")
    assert 5 == value["sequence_number"]
    assert "rate_limit_exceeded" == told_error("openai_responses", value)[0]


@KINDS
@pytest.mark.parametrize("end", [Stop(4), Hang(4), Cut(4)])
def test_a_stream_may_break_off(kind, end):
    """Up to there it is what it would have been."""
    assert frames(kind, FULL)[:4] == frames(kind, attrs.evolve(FULL, ends=end))
    assert frames(kind, FULL)[:-1] == frames(kind, attrs.evolve(FULL, ends=Stop(-1)))


@KINDS
def test_a_stream_may_break_off_in_a_frame(kind):
    """So many bytes of the next frame are still sent."""
    whole = b"".join(frames(kind, FULL))
    cut = frames(kind, attrs.evolve(FULL, ends=Cut(2, inside=7)))

    assert 7 == len(cut[-1])
    assert b"".join(cut) == whole[: len(b"".join(cut))]


@KINDS
def test_a_flood_is_one_line(kind):
    """A frame of that size stands between the others, and is JSON that nobody knows."""
    written = frames(kind, attrs.evolve(FULL, flood=Flood(200_000, after=2)))
    flood = written.pop(2)

    assert frames(kind, FULL) == written
    assert (2, b"\n\n") == (flood.count(b"\n"), flood[-2:])
    assert 200_000 == len(json.loads(flood.removeprefix(b"data: "))["padding"])


# What is served


@KINDS
@CONNECTS
async def test_a_connection_serves_one_request_after_the_other(kind, connected):
    """Calls, then a text, over one connection; the requests are recorded as they came."""
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, tool_round(*CALLS)) as upstream:
            async with connected(upstream) as client:
                for number, reply in enumerate(tool_round(*CALLS), 1):
                    await client.ask(request(kind, x_number=str(number)))
                    expected = frames(kind, reply, model="m-1", number=number)
                    assert b"".join(expected) == await client.finish()
                    assert (200, "chunked") == (client.status, client.headers["transfer-encoding"])
                    assert client.headers["content-type"].startswith("text/event-stream")
                await upstream.wait_until(lambda: upstream.open_streams == 0)
                assert 1 == upstream.open_connections
            await upstream.wait_until(lambda: upstream.open_connections == 0)

    assert ["1", "2"] == [request.headers["x-number"] for request in upstream.requests]
    assert [PATHS[kind]] * 2 == [request.path for request in upstream.requests]
    assert [BODY] * 2 == [request.body for request in upstream.requests]
    assert 0 == upstream.hangups


async def test_a_client_may_ask_ahead():
    """What it sends during a response, in any pieces, is its next request."""
    with trio.fail_after(PATIENCE):
        upstream = Upstream("gemini", [Reply("one"), Reply("two")])
        async with connect_in_memory(upstream) as client:
            ahead = request("gemini")
            await client.send(ahead + ahead[:30])
            client.head = await client.next()
            assert b"one" in await client.finish()
            await wait_all_tasks_blocked()
            for byte in ahead[30:-1]:
                await client.stream.send_all(bytes([byte]))
            await client.ask(ahead[-1:])
            assert b"two" in await client.finish()

    assert 2 == len(upstream.requests)


async def test_a_client_may_want_the_connection_closed():
    """`Connection: close` is heeded."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("anthropic", repeat(FULL)) as upstream,
            connect(upstream) as client,
        ):
            await client.ask(request("anthropic", connection="close"))
            await client.finish()
            assert b"" == await client.stream.receive_some()

    assert 0 == upstream.hangups


@KINDS
async def test_a_real_client_is_served(kind):
    """httpx2 reads the stream over a socket, and uses the connection again."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream(kind, repeat(FULL)) as upstream,
            httpx2.AsyncClient(headers={"anthropic-version": "2023-06-01"}) as client,
        ):
            url = upstream.base_url.removesuffix("/v1") + PATHS[kind].removeprefix("/v1beta")
            for number in (1, 2):
                response = await client.post(url, json=BODY)
                expected = frames(kind, FULL, model="m-1", number=number)
                assert b"".join(expected) == response.content
            assert 1 == upstream.open_connections


async def test_a_reply_may_depend_on_the_request():
    """A function is called with the request, when it is complete."""

    def echo(asked):
        return Reply(asked.body["messages"][0])

    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("openai_chat", repeat(echo)) as upstream,
            connect(upstream) as client,
        ):
            for text in ("one", "two"):
                await client.ask(request("openai_chat", body=BODY | {"messages": [text]}))
                assert text.encode() in await client.finish()


async def test_replies_belong_to_their_requests(autojump_clock):
    """Two clients at once: each response has the number and the model of its own request."""
    replies = [Reply("one", before=2), Reply("two", before=1)]
    upstream = Upstream("anthropic", replies)
    async with connect_in_memory(upstream) as first, connect_in_memory(upstream) as second:
        await first.send(request("anthropic", body=BODY | {"model": "m-1"}))
        await upstream.wait_until(lambda: upstream.open_streams == 1)
        await second.send(request("anthropic", body=BODY | {"model": "m-2"}))
        for number, client in [(2, second), (1, first)]:
            client.head = await client.next()
            expected = frames("anthropic", replies[number - 1], model=f"m-{number}", number=number)
            assert b"".join(expected) == await client.finish()


# Not a request that the real server would answer


@KINDS
@pytest.mark.parametrize(
    ("status", "wrong"),
    [
        (404, {"path": "/v1/elsewhere"}),
        (404, {"method": "GET"}),
        (400, {"body": b"not json"}),
        (400, {"body": {}}),
    ],
)
async def test_a_wrong_request_is_refused(kind, status, wrong):
    """No reply is used up for it, and the error is in the vendor's JSON."""
    if kind == "gemini" and "body" in wrong:
        wrong = {"path": PATHS["gemini"].removesuffix("?alt=sse")}
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, [FULL]) as upstream, connect(upstream) as client:
            await client.ask(request(kind, **wrong))
            error = json.loads(await client.finish())["error"]
            assert status == client.status
            assert error["message"]
            await client.ask()
            await client.finish()
            assert 200 == client.status


async def test_anthropic_wants_its_header():
    """As the real server, it refuses a request that does not say which version it is."""
    with trio.fail_after(PATIENCE):
        async with open_upstream("anthropic", [FULL]) as upstream, connect(upstream) as client:
            plain = request("anthropic").replace(b"anthropic-version: 2023-06-01\r\n", b"")
            await client.ask(plain)
            assert b"anthropic-version" in await client.finish()
            assert 400 == client.status


@KINDS
async def test_a_request_too_many_is_refused(kind):
    """With an error that nobody should try again after."""
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind) as upstream, connect(upstream) as client:
            await client.ask()
            assert b"expected no more requests, got number 1" in await client.finish()
            assert 400 == client.status


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_a_bug_of_the_test(data):
    """The fake is strict: nothing that a client of these APIs would send may be misread."""
    ours, theirs = memory_stream_pair()
    await ours.send_all(data)
    upstream = Upstream("gemini", [])

    with (
        trio.fail_after(PATIENCE),
        pytest.raises(ValueError, match=r"expected a request of HTTP/1\.1"),
    ):
        await upstream.answer(theirs)

    assert 0 == upstream.open_connections


# Pace


@KINDS
async def test_a_reply_takes_its_time(kind, autojump_clock):
    """Before the head, before the first frame, and between frames."""
    upstream = Upstream(kind, [attrs.evolve(FULL, before=5, first=7, gap=2)])
    started = trio.current_time()
    async with connect_in_memory(upstream) as client:
        await client.ask()
        assert 5 == trio.current_time() - started
        await client.read_frames(1)
        assert 12 == trio.current_time() - started
        await client.finish()

    count = len(frames(kind, FULL))
    assert 12 + 2 * (count - 1) == trio.current_time() - started


# Who leaves

SILENT = {
    "before the head": Reply("Hello", before=math.inf),
    "before the first frame": Reply("Hello", first=math.inf),
    "in a pause": Reply(["Hel", "lo"], gap=math.inf),
    "after some frames": attrs.evolve(FULL, ends=Hang(3)),
    "where only the end is missing": Reply("Hello", ends=Hang(None)),
    "while it is being sent": Reply("Hello", flood=Flood(1 << 40)),
    "while a bomb is being sent": Reply(instead=Bomb(1 << 40)),
}


@KINDS
@CONNECTS
@pytest.mark.parametrize("phase", SILENT)
async def test_a_client_that_leaves_is_seen_at_once(kind, connected, phase):
    """In every phase of a response, also while nothing is sent, and it is counted."""
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, [SILENT[phase]]) as upstream:
            async with connected(upstream) as client:
                await client.send()
                await upstream.wait_until(lambda: upstream.open_streams == 1)
                if phase != "before the head":
                    await client.next()
            await upstream.wait_hangups()

            assert (1, 0) == (upstream.hangups, upstream.open_streams)
            await upstream.wait_until(lambda: upstream.open_connections == 0)


@KINDS
@pytest.mark.parametrize("after", [3, None])
async def test_a_server_hangs(kind, after, autojump_clock):
    """What was to come has come, and then nothing does, until the client leaves."""
    reply = attrs.evolve(FULL, ends=Hang(after))
    upstream = Upstream(kind, [reply])
    async with connect_in_memory(upstream) as client:
        await client.ask()
        expected = frames(kind, reply, model="m-1")
        await client.read_frames(len(expected))
        assert b"".join(expected) == client.body
        with trio.move_on_after(3600) as hour:
            await client.next()
        assert hour.cancelled_caught
        assert 1 == upstream.open_streams

    assert (1, 0) == (upstream.hangups, upstream.open_streams)


@CONNECTS
@pytest.mark.parametrize("said", [b"", b"POST / HT", request("gemini")[:-3]])
async def test_a_client_that_leaves_between_requests_is_no_hangup(connected, said):
    """The connection is gone; no response was lost."""
    with trio.fail_after(PATIENCE):
        async with open_upstream("gemini", [FULL]) as upstream:
            async with connected(upstream) as client:
                await upstream.wait_until(lambda: upstream.open_connections == 1)
                await client.stream.send_all(said)
            await upstream.wait_until(lambda: upstream.open_connections == 0)

    assert (0, []) == (upstream.hangups, upstream.requests)


async def test_a_client_that_half_closes_has_left():
    """It will never ask again, and no client of these APIs does it."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("gemini", [SILENT["in a pause"]]) as upstream,
            connect(upstream) as client,
        ):
            await client.ask()
            await client.stream.send_eof()
            await upstream.wait_hangups()


async def test_a_client_that_resets_has_left():
    """RST is seen as FIN is."""
    with trio.fail_after(PATIENCE):
        async with open_upstream("gemini", [SILENT["in a pause"]]) as upstream:
            async with connect(upstream) as client:
                await client.ask()
                linger = struct.pack("ii", 1, 0)
                client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            await upstream.wait_hangups()


async def test_leaving_the_context_ends_what_is_under_way():
    """Nobody hung up: it was the server that went."""
    with trio.fail_after(PATIENCE):
        async with open_upstream("gemini", repeat(SILENT["in a pause"])) as upstream:
            port = httpx2.URL(upstream.base_url).port
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await Client(stream, "gemini").ask()
        assert (0, 0, 0) == (upstream.hangups, upstream.open_streams, upstream.open_connections)
        await stream.aclose()


# What goes wrong


@KINDS
@CONNECTS
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("inside", [0, 5])
async def test_a_connection_is_cut(kind, connected, how, inside):
    """After so many frames, and bytes of the next one; it is no hang-up of the client's."""
    reply = attrs.evolve(FULL, ends=Cut(2, inside=inside, how=how))
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, [reply]) as upstream, connected(upstream) as client:
            await client.ask()
            await client.read_frames(2)
            expected = trio.BrokenResourceError if how == "rst" else h11.RemoteProtocolError
            with pytest.raises((h11.RemoteProtocolError, expected)) as caught:
                await client.finish()

    if connected is connect:
        assert expected is caught.type
    if how == "fin":  # a reset may overtake what was sent
        assert b"".join(frames(kind, reply, model="m-1")) == client.body
    assert 0 == upstream.hangups


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_connection_is_cut_before_the_head(how):
    """The server goes away without a word, as one does whose idle time was over."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("anthropic", [Reply(instead=Cut(how=how))]) as upstream,
            connect(upstream) as client,
        ):
            with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
                await client.ask()

    assert 0 == client.received


@KINDS
async def test_a_body_ends_well_though_the_stream_does_not(kind):
    """HTTP is content; the finish is missing. So it is where nothing at all is sent."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream(kind, [attrs.evolve(FULL, ends=Stop(n)) for n in (0, 3)]) as upstream,
            connect(upstream) as client,
        ):
            for number, count in [(1, 0), (2, 3)]:
                await client.ask()
                expected = frames(kind, FULL, model="m-1", number=number)[:count]
                assert b"".join(expected) == await client.finish()


@KINDS
async def test_a_refusal_is_in_the_vendors_words(kind):
    """Every fault has a status, a type and a message of that vendor's; headers are added."""
    expected = {
        "auth": 401,
        "bad_request": 400,
        "context_length": 400,
        "not_found": 404,
        "overloaded": 503,
        "quota": 429,
        "rate_limit": 429,
        "server_error": 500,
    }
    match kind:
        case "anthropic":
            expected |= {"overloaded": 529, "quota": 400}
        case "gemini":
            expected["auth"] = 400
    replies = [Reply(instead=Refusal(f, retry_after="7", headers={"x-f": f})) for f in expected]
    statuses = {}
    with trio.fail_after(PATIENCE):
        async with open_upstream(kind, replies) as upstream, connect(upstream) as client:
            for fault in expected:
                await client.ask()
                assert error_body(kind, fault) == json.loads(await client.finish())
                assert ("7", fault) == (client.headers["retry-after"], client.headers["x-f"])
                assert "application/json" == client.headers["content-type"]
                statuses[fault] = client.status

    assert expected == statuses


async def test_a_refusal_may_have_another_status_and_no_header():
    """What is not asked for is not sent."""
    reply = Reply(instead=Refusal("rate_limit", status=418))
    with trio.fail_after(PATIENCE):
        async with open_upstream("gemini", [reply]) as upstream, connect(upstream) as client:
            await client.ask()
            await client.finish()
            assert 418 == client.status
            assert "retry-after" not in client.headers


async def test_a_page_is_for_people():
    """A status that says all is well, and HTML."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("gemini", [Reply(instead=Page())]) as upstream,
            connect(upstream) as client,
        ):
            await client.ask()
            assert b"<h1>It works!</h1>" in await client.finish()
            assert (200, "text/html") == (client.status, client.headers["content-type"])


async def test_a_bomb_is_small_on_the_wire():
    """Ten megabytes come in a few kilobytes, and it is sound gzip."""
    with trio.fail_after(PATIENCE):
        async with (
            open_upstream("gemini", [Reply(instead=Bomb(10_000_000))]) as upstream,
            connect(upstream) as client,
        ):
            await client.ask()
            packed = await client.finish()

    assert "gzip" == client.headers["content-encoding"]
    assert 200_000 > len(packed)
    unpacked = zlib.decompress(packed, wbits=31)
    assert 10_000_000 == len(json.loads(unpacked.removeprefix(b"data: "))["padding"])


async def test_a_flood_is_made_up_as_it_is_sent():
    """A line of a terabyte begins at once; it is read as far as its reader likes."""
    with trio.fail_after(PATIENCE):
        async with open_upstream("gemini", [Reply("Hello", flood=Flood(1 << 40))]) as upstream:
            async with connect(upstream) as client:
                await client.ask()
                while client.received < 1 << 20:
                    assert b"\n" not in (await client.next()).data
            await upstream.wait_hangups()


async def test_a_flood_is_followed_by_the_rest():
    """Who reads through it finds the stream as it would have been; also where it is the last."""
    reply = Reply("Hello", flood=Flood(300_000))
    count = len(frames("gemini", reply))
    replies = [reply, attrs.evolve(reply, flood=Flood(300_000, after=count))]
    with trio.fail_after(PATIENCE):
        async with open_upstream("gemini", replies) as upstream, connect(upstream) as client:
            for number, said in enumerate(replies, 1):
                await client.ask()
                expected = frames("gemini", said, model="m-1", number=number)
                assert b"".join(expected) == await client.finish()


# TLS


def anonymous(protocol):
    """A context that needs no certificate, and proves nothing: enough to see that TLS is spoken."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("end", [None, Cut(2), Cut(2, how="rst")])
async def test_tls_is_spoken(end):
    """A stream comes over TLS, a client that leaves is seen, and a connection can be cut."""
    replies = [FULL, attrs.evolve(FULL, ends=end) if end else SILENT["in a pause"]]
    server_side = anonymous(ssl.PROTOCOL_TLS_SERVER)
    with trio.fail_after(PATIENCE):
        async with open_upstream("anthropic", replies, ssl_context=server_side) as upstream:
            assert upstream.base_url.startswith("https://")
            async with connect(upstream) as plain:
                plain.stream = trio.SSLStream(
                    plain.stream, anonymous(ssl.PROTOCOL_TLS_CLIENT), https_compatible=True
                )
                await plain.ask()
                assert b"message_stop" in await plain.finish()
                await plain.ask()
                if end:
                    with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
                        await plain.finish()
            await upstream.wait_until(lambda: upstream.open_connections == 0)

    assert int(end is None) == upstream.hangups


# What our own readers make of it

API = {
    "openai_chat": OpenAIChatApi,
    "openai_responses": OpenAIResponsesApi,
    "anthropic": AnthropicApi,
    "gemini": GeminiApi,
}


def neutral(produced):
    """What a normalizer's events say, in the words of a reply; deltas add up to their parts."""
    parts = [event for event in produced if isinstance(event, PartFinished)]
    for part in parts:
        deltas = [
            e.delta for e in produced if isinstance(e, PartDelta) and e.part_id == part.part_id
        ]
        assert part.text == "".join(deltas)
    said = {
        kind: "".join(part.text for part in parts if part.kind == kind)
        for kind in ("text", "reasoning")
    }
    calls = [(part.name, json.loads(part.text)) for part in parts if part.kind == "tool_call"]
    [finish] = [one for one in produced if isinstance(one, Finish)]
    return said["text"], said["reasoning"], calls, finish.reason, finish.usage


@KINDS
@STYLES
@pytest.mark.parametrize("line_end", [None, b"\r\n"])
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (FULL, "tool_calls"),
        (Reply(["It is ", *halves("sunny 😀.")], usage=USAGE), "stop"),
        (Reply("It is", reasoning="Hm.", usage=USAGE, finish="length"), "length"),
        (Reply("It is", usage=USAGE, finish="content_filter"), "content_filter"),
        (Reply(calls=[("clock", "{}")], usage=USAGE), "tool_calls"),
    ],
)
def test_our_reader_gets_back_what_was_said(kind, style, line_end, reply, reason):
    """Whichever way the bytes are cut: text, reasoning, calls, why it stopped, and the usage."""
    data = b"".join(frames(kind, attrs.evolve(reply, style=style, line_end=line_end)))
    usage = structs.replace(USAGE, cache_write_tokens=0) if kind == "gemini" else USAGE
    expected = (
        "".join(reply.text).encode("utf-16", "surrogatepass").decode("utf-16"),
        "".join(reply.reasoning),
        [(call.name, json.loads(call.arguments)) for call in reply.calls],
        reason,
        usage,
    )

    make = partial(API[kind]().normalizer, "s1.")
    produced, error = however_cut(make, data, every=len(data) // 40)

    assert error is None
    assert expected == neutral(produced)
    ids = [e.call_id for e in produced if isinstance(e, PartFinished) and e.kind == "tool_call"]
    assert len(reply.calls) == len(set(ids))


@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, "error") for kind in PATHS]
    + [("openai_responses", "flat_error"), ("openai_responses", "failed")],
)
@STYLES
def test_our_reader_says_what_went_wrong(kind, form, style):
    """An error wins, wherever in the stream it stands, and keeps its meaning."""
    for fault, after in product(FAULTS, [0, 4, None]):
        reply = attrs.evolve(FULL, style=style, failure=Failure(fault, after, form))

        _, error = play(partial(API[kind]().normalizer, "s1."), frames(kind, reply))

        assert fault == error.code
