"""Model servers to test clients with: the real bytes of four APIs, over real sockets.

Knows: what each API puts on the wire, well and badly behaved, and how HTTP/1.1 carries it. Must
never know how anybody reads it: it is written from the public descriptions of the APIs and from
what their servers were seen to send, so that it can prove a reader. `tests/test_sdks.py` proves it.

A `Reply` says in neutral words what the model says, how fast, and what goes wrong. `frames` writes
it as the bytes of a stream; a server opened by `open_upstream` answers with them, one reply after
the other, and sees when a client leaves, also while nothing is sent.

Where servers of one API differ, a reply has a `style`. The usual one is that of the API's owner;
sparse and chatty are what compatible servers were seen to do:

- openai_chat, sparse: whole calls that all have index 0 (Ollama), "stop" after calls and the usage
  beside it (Gemini's compatible endpoint), reasoning as `reasoning` (vLLM). Chatty: comments and
  reasoning told twice (OpenRouter), a first chunk without choices (Azure), calls interleaved, usage
  on every chunk.
- openai_responses, sparse: no events but those with news, raw reasoning instead of a summary
  (servers of open models). Chatty: comments, padding, events to come, calls interleaved.
- anthropic, sparse: no pings, no signature, arguments in one piece, little usage. Chatty: pings and
  comments, events to come.
- gemini, sparse: no ids, calls in one chunk, usage with the finish only, which stands alone.
  Chatty: comments, empty parts, ratings, each call signed.

All of them write text as UTF-8; half of a surrogate pair, which UTF-8 cannot carry, as an escape.
"""

import json
import socket
import struct
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from ssl import SSLContext
from typing import Any, ClassVar, Final, Literal, TypeAlias, assert_never

import attrs
import trio

from agentsse.events import Usage

Kind: TypeAlias = Literal["openai_chat", "openai_responses", "anthropic", "gemini"]
Fault: TypeAlias = Literal[
    "auth",
    "bad_request",
    "context_length",
    "not_found",
    "overloaded",
    "quota",
    "rate_limit",
    "server_error",
]
"""What an API complains about, in the words of `agentsse.errors.Fault`."""

INVALID: Final = "\ufdd0"
"""A character that stands, in any text of a reply, for a byte that no UTF-8 holds."""

_CREATED: Final = 1_760_000_000  # seconds since the epoch; a fake has no clock
_BLOCK: Final = 64 * 1024  # bytes of what is made up as it is sent
_LETTERS: Final = b"a" * _BLOCK

# What a model says, and what goes wrong -----------------------------------------------------------


@attrs.frozen
class Call:
    """A tool call; `arguments` is JSON text, broken if you like; without an id one is made."""

    name: str
    arguments: str = "{}"
    call_id: str = ""


@attrs.frozen
class Refusal:
    """An error with a status, in the vendor's own JSON.

    Attributes:
        fault: What the vendor complains about.
        retry_after: The header of that name, if it is sent.
        status: Instead of the vendor's own for that fault.
        headers: More of them.
    """

    fault: Fault
    retry_after: str | None = None
    status: int | None = None
    headers: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Page:
    """A page for people, as a wrong URL or a proxy gives it."""

    html: str = "<html><head><title>Welcome</title></head><body><h1>It works!</h1></body></html>"
    status: int = 200


@attrs.frozen
class Bomb:
    """A stream packed by gzip, asked for or not: of `size` bytes a thousandth is on the wire."""

    size: int


@attrs.frozen
class Failure:
    """An error in the middle of a stream, in the vendor's own words; the stream ends with it.

    Attributes:
        fault: What the vendor complains about.
        after: How many frames come before it, as in a slice; None where even the finish does.
        form: Of openai_responses, which knows three: an `error` event with its fields in an
            object, as the server sends it; the same flat, as it is documented; `response.failed`.
    """

    fault: Fault = "overloaded"
    after: int | None = None
    form: Literal["error", "flat_error", "failed"] = "error"


@attrs.frozen
class Flood:
    """One frame, on one line, of about `size` bytes; made up as it is sent, and unknown to all.

    Attributes:
        size: Bytes; may be more than any memory holds.
        after: How many frames come before it.
    """

    size: int
    after: int = 0


@attrs.frozen
class Stop:
    """The body ends as HTTP wants it, after so many frames, as in a slice."""

    after: int


@attrs.frozen
class Cut:
    """The connection goes away; where it stands instead of a stream, before the head.

    Attributes:
        after: How many frames come before it, as in a slice; None for all of them.
        inside: How many bytes of the next frame do.
        how: What the kernel sends. A stream that is no socket just closes.
    """

    after: int | None = 0
    inside: int = 0
    how: Literal["fin", "rst"] = "fin"


@attrs.frozen
class Hang:
    """Nothing more comes until the client leaves; None for the end of the body only."""

    after: int | None = 0


def _pieces(text: str | Iterable[str]) -> tuple[str, ...]:
    return (text,) * bool(text) if isinstance(text, str) else tuple(text)


def _calls(calls: Iterable[Call | tuple[str, ...]]) -> tuple[Call, ...]:
    return tuple(call if isinstance(call, Call) else Call(*call) for call in calls)


@attrs.frozen
class Reply:
    """What a model answers to one request, and how the server behaves meanwhile.

    Attributes:
        text: What it says: one delta, or one for each of several pieces.
        reasoning: What it thinks before, likewise.
        calls: Tools it calls at once, after that: `Call`s, or pairs of a name and arguments. The
            arguments come in several deltas, but for gemini, which knows none; there, arguments
            that are no object become the finish MALFORMED_FUNCTION_CALL.
        finish: "stop", "length", "tool_calls" or "content_filter", or any word of the vendor's;
            None for what fits. For openai_responses any other word is that of an incomplete one.
        usage: None where the server tells none.
        before: Seconds until the head comes.
        first: Seconds from then until the first frame.
        gap: Seconds between two frames.
        style: See the module.
        line_end: LF, CRLF or CR; None for the vendor's own.
        has_done: Whether `[DONE]` ends the stream; None for the vendor's habit.
        failure: An error in the middle.
        flood: A frame that is too large.
        ends: How else it ends than well.
        instead: What comes instead of a stream.
    """

    text: tuple[str, ...] = attrs.field(default=(), converter=_pieces)
    reasoning: tuple[str, ...] = attrs.field(default=(), converter=_pieces, kw_only=True)
    calls: tuple[Call, ...] = attrs.field(default=(), converter=_calls, kw_only=True)
    finish: str | None = attrs.field(default=None, kw_only=True)
    usage: Usage | None = attrs.field(default=Usage(input_tokens=12, output_tokens=7), kw_only=True)
    before: float = attrs.field(default=0.0, kw_only=True)
    first: float = attrs.field(default=0.0, kw_only=True)
    gap: float = attrs.field(default=0.0, kw_only=True)
    style: Literal["usual", "sparse", "chatty"] = attrs.field(default="usual", kw_only=True)
    line_end: bytes | None = attrs.field(default=None, kw_only=True)
    has_done: bool | None = attrs.field(default=None, kw_only=True)
    failure: Failure | None = attrs.field(default=None, kw_only=True)
    flood: Flood | None = attrs.field(default=None, kw_only=True)
    ends: Stop | Cut | Hang | None = attrs.field(default=None, kw_only=True)
    instead: Refusal | Page | Bomb | Cut | None = attrs.field(default=None, kw_only=True)


def tool_round(*calls: tuple[str, str], text: str = "Done.") -> list[Reply]:
    """The usual script: the model calls tools, at once, and then says a text."""
    return [Reply(calls=calls), Reply(text)]


def halves(text: str) -> list[str]:
    """Cut a text into deltas so that every surrogate pair of it is split over two of them."""
    pieces = [""]
    for letter in text:
        if letter > "\uffff":
            high, low = struct.unpack("<2H", letter.encode("utf-16-le"))
            pieces[-1] += chr(high)
            pieces.append(chr(low))
        else:
            pieces[-1] += letter
    return pieces


def frames(kind: Kind, reply: Reply, *, model: str = "fake-1", number: int = 1) -> list[bytes]:
    """Write the stream of a reply, frame by frame: all that a client gets to see of it.

    Pure. What a reply says about pacing, or wants instead of a stream, does not count here; a
    flood is made in memory.

    Args:
        kind: The API.
        reply: What to say.
        model: Named in the stream.
        number: Of the response; ids are made from it.
    """
    return [b"".join(_bytes_of(frame)) for frame in _stream(kind, reply, model, number)]


def error_body(kind: Kind, fault: Fault) -> dict[str, Any]:
    """What the vendor answers, beside a status, to a request that it refuses."""
    return _WRITERS[kind].error_body(fault)


# The four wire formats ----------------------------------------------------------------------------


@attrs.define
class _Writer:
    """Writes one reply; a subclass knows one API."""

    line_end: ClassVar[bytes] = b"\n"
    has_done: ClassVar[bool] = False
    headers: ClassVar[Mapping[str, str]] = {"content-type": "text/event-stream; charset=utf-8"}
    version: ClassVar[str] = ""  # what a base URL ends with, and ...
    path: ClassVar[str]  # ... what a path does
    finishes: ClassVar[Mapping[str, str]]
    statuses: ClassVar[Mapping[Fault, int]]

    reply: Reply
    model: str
    number: int
    frames: list[bytes] = attrs.field(factory=list)
    farewell: list[bytes] = attrs.field(factory=list)  # what follows the finish
    usage: Usage = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.usage = self.reply.usage or Usage()

    def write(self) -> None:
        """Write all frames."""
        raise NotImplementedError

    def failed(self, failure: Failure) -> bytes:
        """Write the frame of an error."""
        raise NotImplementedError

    @staticmethod
    def error_body(fault: Fault) -> dict[str, Any]:
        """Write the body of a refusal."""
        raise NotImplementedError

    @staticmethod
    def complaint(request: "Request") -> str | None:
        """Say what is wrong with a request, if anything is."""
        return None if request.body.get("stream") is True else "expected stream: true"

    @property
    def is_sparse(self) -> bool:
        return self.reply.style == "sparse"

    @property
    def is_chatty(self) -> bool:
        return self.reply.style == "chatty"

    @property
    def finish(self) -> str:
        """The vendor's word for why the model stopped."""
        fitting = self.reply.finish or ("tool_calls" if self.reply.calls else "stop")
        return self.finishes.get(fitting, fitting)

    def named_calls(self, prefix: str) -> Iterator[tuple[int, str, Call]]:
        """Number the calls, and name them."""
        for index, call in enumerate(self.reply.calls):
            yield index, call.call_id or f"{prefix}{self.number}x{index + 1}", call

    def frame(self, value: Any, event: str = "") -> bytes:
        comment = b": keep-alive\n\n" if self.is_chatty else b""
        head = f"event: {event}\n".encode() if event else b""
        return comment + head + b"data: " + _json(value) + b"\n\n"

    def say(self, value: Any, event: str = "") -> None:
        """Write one more frame."""
        self.frames.append(self.frame(value, event))


_OPENAI_ERRORS: Final[dict[Fault, tuple[int, str, str | None, str]]] = {
    "auth": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    "bad_request": (400, "invalid_request_error", None, "Unknown parameter: 'colour'."),
    "context_length": (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "This model's maximum context length is 8192 tokens. Your messages resulted in 9001.",
    ),
    "not_found": (404, "invalid_request_error", "model_not_found", "The model does not exist."),
    "overloaded": (
        503,
        "service_unavailable_error",
        "server_is_overloaded",
        "Our servers are currently overloaded. Please try again later.",
    ),
    "quota": (
        429,
        "insufficient_quota",
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing details.",
    ),
    "rate_limit": (
        429,
        "tokens",
        "rate_limit_exceeded",
        "Rate limit reached on tokens per min (TPM): Limit 30000. Please try again in 20s.",
    ),
    "server_error": (500, "server_error", None, "The server had an error. Sorry about that!"),
}


@attrs.define
class _OpenAi(_Writer):
    """What both APIs of OpenAI share."""

    version = "/v1"
    statuses: ClassVar[Mapping[Fault, int]] = {f: error[0] for f, error in _OPENAI_ERRORS.items()}

    @staticmethod
    def error_body(fault: Fault) -> dict[str, Any]:
        _, error_type, code, message = _OPENAI_ERRORS[fault]
        error = {"message": message, "type": error_type, "param": None, "code": code}
        return {"error": error}


@attrs.define
class _OpenAiChat(_OpenAi):
    has_done = True
    path = "/chat/completions"
    finishes: ClassVar[Mapping[str, str]] = {}  # ours are theirs

    def write(self) -> None:
        reply = self.reply
        if self.is_chatty:  # Azure
            self.say(self._chunk(choices=[], prompt_filter_results=[{"prompt_index": 0}]))
        if not self.is_sparse:
            content = None if reply.calls and not reply.text else ""
            self._delta(role="assistant", content=content, refusal=None)
        for piece in reply.reasoning:
            match reply.style:
                case "usual":
                    self._delta(reasoning_content=piece)
                case "sparse":
                    self._delta(reasoning=piece)
                case "chatty":
                    detail = {"type": "reasoning.text", "text": piece, "index": 0}
                    self._delta(content="", reasoning=piece, reasoning_details=[detail])
                case _ as unreachable:
                    assert_never(unreachable)
        for piece in reply.text:
            self._delta(content=piece)
        if self.is_sparse:
            for _, call_id, call in self.named_calls("call_"):
                self._call(0, call.arguments, call_id, call.name)
        else:
            self._stream_calls()
        self._end()

    def _stream_calls(self) -> None:
        starts, deltas = [], []
        for index, call_id, call in self.named_calls("call_"):
            starts.append((index, "", call_id, call.name))
            deltas.append([(index, piece) for piece in _some(call.arguments)])
        for start, pieces in zip(starts, deltas, strict=True):
            self._call(*start)
            if not self.is_chatty:
                for delta in pieces:
                    self._call(*delta)
        if self.is_chatty:
            for delta in _interleaved(deltas):
                self._call(*delta)

    def _end(self) -> None:
        if self.is_sparse:
            finish = "stop" if self.reply.calls and not self.reply.finish else self.finish
            told = {} if self.reply.usage is None else {"usage": self._usage()}
            self.say(self._chunk(choices=[self._choice({}, finish)], **told))
            return
        self.say(self._chunk(choices=[self._choice({}, self.finish)], **self._told()))
        if self.reply.usage is not None:
            self.say(self._chunk(choices=[], usage=self._usage()))

    def _call(self, index: int, arguments: str, call_id: str = "", name: str = "") -> None:
        function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
        start = {"id": call_id, "type": "function"} if call_id else {}
        self._delta(tool_calls=[{"index": index, **start, "function": function}])

    def _delta(self, **delta: Any) -> None:
        self.say(self._chunk(choices=[self._choice(delta)], **self._told()))

    def _choice(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _chunk(self, **fields: Any) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.number}",
            "object": "chat.completion.chunk",
            "created": _CREATED,
            "model": self.model,
            "system_fingerprint": "fp_0",
            **fields,
        }

    def _told(self) -> dict[str, Any]:
        """The usage beside a delta: null, until it is known."""
        if self.reply.usage is None or self.is_sparse:
            return {}
        return {"usage": self._usage() if self.is_chatty else None}

    def _usage(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "prompt_tokens": self.usage.input_tokens,
            "completion_tokens": self.usage.output_tokens,
            "total_tokens": self.usage.input_tokens + self.usage.output_tokens,
        }
        read, written = self.usage.cache_read_tokens, self.usage.cache_write_tokens
        if not self.is_sparse or read or written:
            told["prompt_tokens_details"] = {
                "cached_tokens": read,
                "cache_write_tokens": written,
                "audio_tokens": 0,
            }
        if not self.is_sparse or self.usage.reasoning_tokens:
            told["completion_tokens_details"] = {"reasoning_tokens": self.usage.reasoning_tokens}
        return told

    def failed(self, failure: Failure) -> bytes:
        return self.frame(self.error_body(failure.fault))


@attrs.define
class _OpenAiResponses(_OpenAi):
    path = "/responses"
    finishes: ClassVar[Mapping[str, str]] = {"length": "max_output_tokens"}

    items: list[dict[str, Any]] = attrs.field(factory=list)
    sequence: int = 0

    def write(self) -> None:
        self._event("response.created", response=self._response("in_progress"))
        self._extra("response.in_progress", response=self._response("in_progress"))
        if self.is_chatty:
            self._event("response.novelty", novelty={"colour": "blue"})
        is_complete = self.finish in ("stop", "tool_calls")
        if self.reply.reasoning:
            self._reason("".join(self.reply.reasoning))
        if self.reply.text:
            self._speak("".join(self.reply.text), "completed" if is_complete else "incomplete")
        self._call()
        if is_complete:
            self._event("response.completed", response=self._response("completed"))
        else:
            self._event("response.incomplete", response=self._response("incomplete"))

    def _event(self, name: str, **fields: Any) -> None:
        self.say({"type": name, "sequence_number": self.sequence, **fields}, name)
        self.sequence += 1

    def _extra(self, name: str, **fields: Any) -> None:
        """Write an event without which nothing would be missed."""
        if not self.is_sparse:
            self._event(name, **fields)

    def _delta(self, name: str, pieces: Iterable[str], **place: Any) -> None:
        padding = {"obfuscation": "x8Fk2"} if self.is_chatty else {}
        for piece in pieces:
            self._event(name, **place, delta=piece, **padding)

    def _reason(self, text: str) -> None:
        item: dict[str, Any] = {"id": f"rs_{self.number}", "type": "reasoning", "summary": []}
        place = {"item_id": item["id"], "output_index": len(self.items)}
        self._event("response.output_item.added", item=item, output_index=len(self.items))
        if self.is_sparse:
            place["content_index"] = 0
            self._delta("response.reasoning_text.delta", self.reply.reasoning, **place)
            item = item | {"content": [{"type": "reasoning_text", "text": text}]}
        else:
            place["summary_index"] = 0
            empty, full = ({"type": "summary_text", "text": said} for said in ("", text))
            self._event("response.reasoning_summary_part.added", **place, part=empty)
            self._delta("response.reasoning_summary_text.delta", self.reply.reasoning, **place)
            self._event("response.reasoning_summary_text.done", **place, text=text)
            self._event("response.reasoning_summary_part.done", **place, part=full)
            item = item | {"summary": [full], "encrypted_content": f"sealed-{self.number}"}
        self._finish_item(item)

    def _speak(self, text: str, status: str) -> None:
        item = {"id": f"msg_{self.number}", "type": "message", "role": "assistant"}
        index = len(self.items)
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        started = item | {"status": "in_progress", "content": []}
        self._event("response.output_item.added", item=started, output_index=index)
        empty, full = (
            {"type": "output_text", "annotations": [], "logprobs": [], "text": said}
            for said in ("", text)
        )
        self._extra("response.content_part.added", **place, part=empty)
        self._delta("response.output_text.delta", self.reply.text, **place, logprobs=[])
        self._extra("response.output_text.done", **place, text=text, logprobs=[])
        self._extra("response.content_part.done", **place, part=full)
        self._finish_item(item | {"status": status, "content": [full]})

    def _call(self) -> None:
        first = len(self.items)
        items = [
            {
                "id": f"fc_{self.number}x{index + 1}",
                "type": "function_call",
                "call_id": call_id,
                "name": call.name,
                "arguments": call.arguments,
            }
            for index, call_id, call in self.named_calls("call_")
        ]
        numbered = list(enumerate(items, first))
        for together in [numbered] if self.is_chatty else [[one] for one in numbered]:
            for index, item in together:
                started = item | {"status": "in_progress", "arguments": ""}
                self._event("response.output_item.added", item=started, output_index=index)
            deltas = [
                [(piece, item["id"], index) for piece in _some(item["arguments"])]
                for index, item in together
            ]
            for piece, item_id, index in _interleaved(deltas):
                place = {"item_id": item_id, "output_index": index}
                self._delta("response.function_call_arguments.delta", [piece], **place)
            for index, item in together:
                place = {"item_id": item["id"], "output_index": index}
                whole = item["arguments"]
                self._extra("response.function_call_arguments.done", **place, arguments=whole)
                self._finish_item(item | {"status": "completed"})

    def _finish_item(self, item: dict[str, Any]) -> None:
        self._event("response.output_item.done", item=item, output_index=len(self.items))
        self.items.append(item)

    def _response(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        return {
            "id": f"resp_{self.number}",
            "object": "response",
            "created_at": _CREATED,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": self.finish} if status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "model": self.model,
            "output": list(self.items),
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": self._usage() if status in ("completed", "incomplete") else None,
        }

    def _usage(self) -> dict[str, Any] | None:
        if self.reply.usage is None:
            return None
        return {
            "input_tokens": self.usage.input_tokens,
            "input_tokens_details": {
                "cached_tokens": self.usage.cache_read_tokens,
                "cache_write_tokens": self.usage.cache_write_tokens,
            },
            "output_tokens": self.usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.usage.reasoning_tokens},
            "total_tokens": self.usage.input_tokens + self.usage.output_tokens,
        }

    def failed(self, failure: Failure) -> bytes:
        _, error_type, code, message = _OPENAI_ERRORS[failure.fault]
        code = code or error_type
        flat = {"code": code, "message": message, "param": None}
        fields: dict[str, Any] = {"type": "error", "sequence_number": self.sequence}
        match failure.form:
            case "failed":
                self.items.clear()
                fields["type"] = "response.failed"
                fields["response"] = self._response("failed", {"code": code, "message": message})
            case "flat_error":
                fields |= flat
            case "error":
                fields["error"] = {"type": error_type, **flat}
            case _ as unreachable:
                assert_never(unreachable)
        return self.frame(fields, fields["type"])


_ANTHROPIC_ERRORS: Final[dict[Fault, tuple[int, str, str]]] = {
    "auth": (401, "authentication_error", "invalid x-api-key"),
    "bad_request": (400, "invalid_request_error", "colour: Extra inputs are not permitted"),
    "context_length": (
        400,
        "invalid_request_error",
        "prompt is too long: 208310 tokens > 200000 maximum",
    ),
    "not_found": (404, "not_found_error", "model: fake-2"),
    "overloaded": (529, "overloaded_error", "Overloaded"),
    "quota": (
        400,
        "invalid_request_error",
        "Your credit balance is too low to access the Anthropic API.",
    ),
    "rate_limit": (
        429,
        "rate_limit_error",
        "This request would exceed your organization's rate limit of 30,000 tokens per minute.",
    ),
    "server_error": (500, "api_error", "Internal server error"),
}


@attrs.define
class _Anthropic(_Writer):
    path = "/messages"
    finishes: ClassVar[Mapping[str, str]] = {
        "stop": "end_turn",
        "length": "max_tokens",
        "tool_calls": "tool_use",
        "content_filter": "refusal",
    }
    statuses: ClassVar[Mapping[Fault, int]] = {
        f: error[0] for f, error in _ANTHROPIC_ERRORS.items()
    }

    blocks: int = 0

    def write(self) -> None:
        reply = self.reply
        self._event("message_start", message=self._message())
        if self.is_chatty:
            self._event("message_novelty", novelty={"colour": "blue"})
        if reply.reasoning:
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in reply.reasoning]
            if not self.is_sparse:
                deltas.append({"type": "signature_delta", "signature": f"signed-{self.number}"})
            self._block({"type": "thinking", "thinking": "", "signature": ""}, deltas)
        if reply.text:
            deltas = [{"type": "text_delta", "text": piece} for piece in reply.text]
            self._block({"type": "text", "text": ""}, deltas)
        for _, call_id, call in self.named_calls("toolu_"):
            pieces = [call.arguments] if self.is_sparse else ["", *_some(call.arguments)]
            self._block(
                {"type": "tool_use", "id": call_id, "name": call.name, "input": {}},
                [{"type": "input_json_delta", "partial_json": piece} for piece in pieces],
            )
        delta = {"stop_reason": self.finish, "stop_sequence": None}
        self._event("message_delta", delta=delta, usage=self._usage())
        self.farewell.append(self.frame({"type": "message_stop"}, "message_stop"))

    def _event(self, name: str, **fields: Any) -> None:
        self.say({"type": name, **fields}, name)

    def _block(self, block: dict[str, Any], deltas: Sequence[dict[str, str]]) -> None:
        index, self.blocks = self.blocks, self.blocks + 1
        self._event("content_block_start", index=index, content_block=block)
        if self.is_chatty or (index == 0 and not self.is_sparse):
            self._event("ping")
        for delta in deltas:
            self._event("content_block_delta", index=index, delta=delta)
        self._event("content_block_stop", index=index)

    def _message(self) -> dict[str, Any]:
        return {
            "id": f"msg_{self.number}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._input() | {"output_tokens": min(1, self.usage.output_tokens)},
        }

    def _input(self) -> dict[str, int]:
        """What came from the cache, or went into it, is not counted as input here."""
        read, written = self.usage.cache_read_tokens, self.usage.cache_write_tokens
        told = {"input_tokens": self.usage.input_tokens - read - written}
        if not self.is_sparse or read or written:
            told |= {"cache_creation_input_tokens": written, "cache_read_input_tokens": read}
        return told

    def _usage(self) -> dict[str, Any]:
        told: dict[str, Any] = {"output_tokens": self.usage.output_tokens}
        if not self.is_sparse:
            told |= self._input()
        if self.usage.reasoning_tokens:
            told["output_tokens_details"] = {"thinking_tokens": self.usage.reasoning_tokens}
        return told

    def failed(self, failure: Failure) -> bytes:
        return self.frame(self.error_body(failure.fault), "error")

    @staticmethod
    def error_body(fault: Fault) -> dict[str, Any]:
        _, error_type, message = _ANTHROPIC_ERRORS[fault]
        error = {"type": error_type, "message": message}
        return {"type": "error", "error": error, "request_id": "req_0"}

    @staticmethod
    def complaint(request: "Request") -> str | None:
        if "anthropic-version" not in request.headers:
            return "anthropic-version: header is required"
        if not isinstance(request.body.get("max_tokens"), int):
            return "max_tokens: Field required"
        return _Writer.complaint(request)


_GOOGLE: Final = "type.googleapis.com/google.rpc"
_GEMINI_LIMIT: Final = (
    "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits."
)
_GEMINI_ERRORS: Final[dict[Fault, tuple[int, str, str]]] = {
    "auth": (400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."),
    "bad_request": (400, "INVALID_ARGUMENT", 'Unknown name "colour": Cannot find field.'),
    "context_length": (
        400,
        "INVALID_ARGUMENT",
        "The input token count (1200293) exceeds the maximum number of tokens allowed (1048576).",
    ),
    "not_found": (404, "NOT_FOUND", "models/fake-2 is not found for API version v1beta."),
    "overloaded": (503, "UNAVAILABLE", "The model is overloaded. Please try again later."),
    "quota": (429, "RESOURCE_EXHAUSTED", _GEMINI_LIMIT),  # which of the two, ...
    "rate_limit": (429, "RESOURCE_EXHAUSTED", _GEMINI_LIMIT),  # ... only the details say
    "server_error": (500, "INTERNAL", "An internal error has occurred."),
}
_GEMINI_DETAILS: Final[dict[Fault, list[dict[str, Any]]]] = {
    "auth": [
        {
            "@type": f"{_GOOGLE}.ErrorInfo",
            "reason": "API_KEY_INVALID",
            "domain": "googleapis.com",
            "metadata": {"service": "generativelanguage.googleapis.com"},
        }
    ],
    "quota": [
        {
            "@type": f"{_GOOGLE}.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
        }
    ],
    "rate_limit": [
        {
            "@type": f"{_GOOGLE}.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}],
        },
        {"@type": f"{_GOOGLE}.RetryInfo", "retryDelay": "26s"},
    ],
}


@attrs.define
class _Gemini(_Writer):
    line_end = b"\r\n"
    headers: ClassVar[Mapping[str, str]] = {"content-type": "text/event-stream"}
    version = "/v1beta"
    path = ":streamGenerateContent"
    finishes: ClassVar[Mapping[str, str]] = {
        "stop": "STOP",
        "length": "MAX_TOKENS",
        "tool_calls": "STOP",
        "content_filter": "SAFETY",
    }
    statuses: ClassVar[Mapping[Fault, int]] = {f: error[0] for f, error in _GEMINI_ERRORS.items()}

    def write(self) -> None:
        for piece in self.reply.reasoning:
            self._chunk([{"text": piece, "thought": True}])
        for piece in self.reply.text:
            self._chunk([{"text": piece}])
        calls, finish = [], {"finishReason": self.finish}
        for index, call_id, call in self.named_calls("fc"):
            arguments = _object(call.arguments)
            if arguments is None:
                said = f"Malformed function call: {call.name}({call.arguments})"
                finish = {"finishReason": "MALFORMED_FUNCTION_CALL", "finishMessage": said}
                continue
            part: dict[str, Any] = {"functionCall": {"name": call.name, "args": arguments}}
            if not self.is_sparse or call.call_id:
                part["functionCall"]["id"] = call_id
            if self.is_chatty or (index == 0 and not self.is_sparse):
                part["thoughtSignature"] = b64encode(b"signed-%d" % self.number).decode()
            calls.append(part)
        if self.is_sparse and calls:
            self._chunk(calls)
        else:
            for part in calls:
                self._chunk([part])
        if self.is_sparse:
            self._chunk(None, is_last=True, **finish)
        else:
            self._chunk([{"text": ""}], is_last=True, **finish)

    def _chunk(
        self, parts: list[dict[str, Any]] | None, *, is_last: bool = False, **told: Any
    ) -> None:
        candidate: dict[str, Any] = {}
        if parts is not None:
            empty = [{"text": ""}] if self.is_chatty else []
            candidate["content"] = {"parts": [*empty, *parts], "role": "model"}
        candidate |= told
        if not self.is_sparse:
            candidate["index"] = 0
        if self.is_chatty:
            rating = {"category": "HARM_CATEGORY_HARASSMENT", "probability": "NEGLIGIBLE"}
            candidate["safetyRatings"] = [rating]
        chunk: dict[str, Any] = {"candidates": [candidate]}
        if self.reply.usage is not None and (is_last or not self.is_sparse):
            chunk["usageMetadata"] = self._usage(is_last=is_last)
        if not self.is_sparse:
            chunk |= {"modelVersion": self.model, "responseId": f"r-{self.number}"}
        self.say(chunk)

    def _usage(self, *, is_last: bool) -> dict[str, Any]:
        """What was made so far is told with each chunk; thoughts are not counted as output."""
        asked, thought = self.usage.input_tokens, self.usage.reasoning_tokens
        said = self.usage.output_tokens - thought if is_last else 0
        told = {"promptTokenCount": asked, "candidatesTokenCount": said} if said else {
            "promptTokenCount": asked
        }  # fmt: skip
        told["totalTokenCount"] = asked + said + thought
        if thought:
            told["thoughtsTokenCount"] = thought
        if self.usage.cache_read_tokens:
            told["cachedContentTokenCount"] = self.usage.cache_read_tokens
        return told

    def failed(self, failure: Failure) -> bytes:
        return self.frame(self.error_body(failure.fault))

    @staticmethod
    def error_body(fault: Fault) -> dict[str, Any]:
        code, status, message = _GEMINI_ERRORS[fault]
        error: dict[str, Any] = {"code": code, "message": message, "status": status}
        if fault in _GEMINI_DETAILS:
            error["details"] = _GEMINI_DETAILS[fault]
        return {"error": error}

    @staticmethod
    def complaint(request: "Request") -> str | None:
        query = request.path.partition("?")[2]
        return None if "alt=sse" in query.split("&") else "expected alt=sse in the query"


_WRITERS: Final[dict[Kind, type[_Writer]]] = {
    "openai_chat": _OpenAiChat,
    "openai_responses": _OpenAiResponses,
    "anthropic": _Anthropic,
    "gemini": _Gemini,
}


def _stream(kind: Kind, reply: Reply, model: str, number: int) -> list[bytes | Flood]:
    """The frames of a reply, up to where it breaks off."""
    writer = _WRITERS[kind](reply, model, number)
    writer.write()
    written, farewell = writer.frames, writer.farewell
    if writer.has_done if reply.has_done is None else reply.has_done:
        farewell.append(b"data: [DONE]\n\n")
    if reply.failure is not None:
        kept = written[: reply.failure.after]
        if isinstance(writer, _OpenAiResponses):
            writer.sequence = len(kept)  # each of its frames has a number
        written, farewell = [*kept, writer.failed(reply.failure)], []
    line_end = writer.line_end if reply.line_end is None else reply.line_end
    stream: list[bytes | Flood] = [
        frame.replace(b"\n", line_end) for frame in [*written, *farewell]
    ]
    if reply.flood is not None:
        stream.insert(reply.flood.after, reply.flood)
    match reply.ends:
        case None:
            return stream
        case Stop(after) | Hang(after):
            return stream[:after]
        case Cut(after, inside):
            seen = stream[:after]
            cut = b"".join(b"".join(_bytes_of(frame)) for frame in stream[len(seen) :][:1])[:inside]
            return [*seen, cut] if cut else seen
        case _ as unreachable:
            assert_never(unreachable)


def _bytes_of(frame: bytes | Flood) -> Iterator[bytes]:
    """The bytes of a frame, in pieces that fit into memory."""
    if isinstance(frame, bytes):
        yield frame
        return
    yield b'data: {"type":"padding","padding":"'
    for start in range(0, frame.size, _BLOCK):
        yield _LETTERS[: frame.size - start]
    yield b'"}\n\n'


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").replace(INVALID.encode(), b"\xff")


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _some(text: str) -> list[str]:
    """Cut a text into three deltas, where it is that long."""
    size = max(1, -(-len(text) // 3))
    return [text[start : start + size] for start in range(0, len(text), size)]


def _interleaved(rows: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Take one of each in turn, as long as there is any."""
    for turn in range(max(map(len, rows), default=0)):
        for row in rows:
            yield from row[turn : turn + 1]


# The server ---------------------------------------------------------------------------------------


@attrs.frozen
class Request:
    """What a client sent.

    Attributes:
        method, path: As they came; the path with its query.
        headers: By lower-case name.
        body: Decoded JSON; an empty object where it is none.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


Script: TypeAlias = Iterable[Reply | Callable[[Request], Reply]]
"""What a server will say: a reply to each request, or a function of it. It may have no end."""


def _begun(script: Script) -> Iterator[Reply | Callable[[Request], Reply]]:
    return iter(script)


@attrs.define(eq=False)
class _Peer:
    """The other end of a connection."""

    stream: trio.abc.Stream
    unread: bytearray = attrs.field(factory=bytearray)
    has_left: bool = False

    async def read(self) -> bool:
        """Take in what comes next; whether anything did."""
        try:
            data = await self.stream.receive_some(_BLOCK)
        except trio.BrokenResourceError:
            data = b""
        self.has_left = not data
        self.unread += data
        return bool(data)

    async def watch(self, scope: trio.CancelScope) -> None:
        """Cancel the scope when the peer leaves; what it sends meanwhile is its next request."""
        while await self.read():
            pass
        scope.cancel()

    async def read_request(self) -> Request | None:
        """Read the next request; None where the peer leaves before it is complete.

        Raises:
            ValueError: It is nothing that a client of these APIs would send.
        """
        while b"\r\n\r\n" not in self.unread:
            if not await self.read():
                return None
        head, _, _ = bytes(self.unread).partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        method, path, version = (*first.split(" "), "", "")[:3]
        if version != "HTTP/1.1" or "transfer-encoding" in headers:
            raise ValueError(
                f"expected a request of HTTP/1.1 with a content-length, got {head[:200]!r}"
            )
        start, size = len(head) + 4, int(headers.get("content-length", "0"))
        while len(self.unread) < start + size:
            if not await self.read():
                return None
        body = bytes(self.unread[start : start + size])
        del self.unread[: start + size]
        return Request(method, path, headers, _object(body.decode("utf-8", "replace")) or {})

    async def leave(self, how: Literal["fin", "rst"]) -> None:
        """Close the connection without another word."""
        below = self.stream
        if isinstance(below, trio.SSLStream):
            below = below.transport_stream
        if how == "rst" and isinstance(below, trio.SocketStream):
            linger = struct.pack("ii", 1, 0)
            below.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await trio.aclose_forcefully(self.stream)


@attrs.define(eq=False)
class Upstream:
    """A model server: what it will say, and what it has seen; made by `open_upstream`.

    It can also serve a connection without any socket: see `answer`.

    Attributes:
        kind: The API.
        replies: What it will say, in the order in which requests are complete. A request behind the
            last reply is refused, as is one that the real server would not understand.
        base_url: What a client is given.
        requests: All that came, in order.
        open_connections: Clients that are there.
        open_streams: Responses under way.
        hangups: How often a client left before the end of a response. Closing a connection between
            two responses is none.
    """

    kind: Kind
    replies: Iterator[Reply | Callable[[Request], Reply]] = attrs.field(converter=_begun)
    base_url: str = ""
    requests: list[Request] = attrs.field(factory=list)
    open_connections: int = 0
    open_streams: int = 0
    hangups: int = 0
    _changed: trio.Event = attrs.field(factory=trio.Event)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the attributes above holds; looked at whenever they change."""
        await trio.lowlevel.checkpoint()
        while not condition():
            await self._changed.wait()

    async def wait_hangups(self, count: int = 1) -> None:
        """Wait until so many clients have left before the end."""
        await self.wait_until(lambda: self.hangups >= count)

    async def answer(self, stream: trio.abc.Stream) -> None:
        """Serve one connection, request by request, until the client leaves or a reply cuts it.

        Args:
            stream: Any Trio stream: of a socket, over TLS, in memory. It is closed at the end, also
                when cancelled.

        Raises:
            ValueError: What came is no request.
        """
        peer = _Peer(stream)
        self.open_connections += 1
        self._tell()
        try:
            async with stream:
                while (request := await peer.read_request()) is not None:
                    self.requests.append(request)
                    self._tell()
                    if not await self._respond(peer, request):
                        break
        finally:
            self.open_connections -= 1
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _respond(self, peer: _Peer, request: Request) -> bool:
        """Answer a request; whether the connection may serve another one."""
        reply, number, is_said = self._choose(request), len(self.requests), False
        model = str(request.body.get("model", "fake-1"))
        self.open_streams += 1
        self._tell()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.watch, nursery.cancel_scope)
                try:
                    if isinstance(reply, Reply):
                        await self._say(peer.stream, reply, model, number)
                    else:
                        await peer.stream.send_all(reply)
                    is_said = True
                except trio.BrokenResourceError:
                    peer.has_left = True
                nursery.cancel_scope.cancel()
        finally:
            self.open_streams -= 1
            self.hangups += peer.has_left and not is_said
            self._tell()
        if isinstance(reply, Reply):
            for end in (reply.instead, reply.ends):
                if is_said and isinstance(end, Cut):
                    await peer.leave(end.how)
                    return False
        return is_said and request.headers.get("connection", "").lower() != "close"

    def _choose(self, request: Request) -> Reply | bytes:
        """The next reply; the bytes of a refusal where the real server would not go that far."""
        writer = _WRITERS[self.kind]
        is_here = request.method == "POST" and request.path.partition("?")[0].endswith(writer.path)
        if not is_here:
            return _refusal(self.kind, Refusal("not_found"), f"no {request.path} here")
        if complaint := writer.complaint(request):
            return _refusal(self.kind, Refusal("bad_request"), complaint)
        reply = next(self.replies, None)
        if reply is None:
            said = f"expected no more requests, got number {len(self.requests)}"
            return _refusal(self.kind, Refusal("bad_request"), said)
        if callable(reply):
            reply = reply(request)
        if self.kind == "openai_chat":
            options = request.body.get("stream_options") or {}
            if not options.get("include_usage"):
                reply = attrs.evolve(reply, usage=None)
        return reply

    async def _say(self, stream: trio.abc.Stream, reply: Reply, model: str, number: int) -> None:
        """Send a response, all but its violent end."""
        await trio.sleep(reply.before)
        match reply.instead:
            case None:
                await stream.send_all(_head(_WRITERS[self.kind].headers))
                await trio.sleep(reply.first)
                await _say_frames(stream, reply, _stream(self.kind, reply, model, number))
            case Refusal():
                await stream.send_all(_refusal(self.kind, reply.instead))
            case Page(html, status):
                await stream.send_all(_whole(status, {"content-type": "text/html"}, html.encode()))
            case Bomb(size):
                headers = _WRITERS[self.kind].headers
                await stream.send_all(_head({**headers, "content-encoding": "gzip"}))
                for piece in _gzip_bomb(size):
                    await stream.send_all(_chunk(piece))
                await stream.send_all(_chunk(b""))
            case Cut():
                pass
            case _ as unreachable:
                assert_never(unreachable)


async def _say_frames(stream: trio.abc.Stream, reply: Reply, ahead: list[bytes | Flood]) -> None:
    """Send the body of a stream; its end with the last frame.

    So a client that has seen the last frame may leave at once, and has not left too early.
    """
    for index, frame in enumerate(ahead):
        await trio.sleep(reply.gap if index else 0)
        is_last = index == len(ahead) - 1 and not isinstance(reply.ends, Cut | Hang)
        if isinstance(frame, bytes):
            await stream.send_all(_chunk(frame) + (_chunk(b"") if is_last else b""))
        else:
            for piece in _bytes_of(frame):
                await stream.send_all(_chunk(piece))
            if is_last:
                await stream.send_all(_chunk(b""))
    if isinstance(reply.ends, Hang):
        await trio.sleep_forever()
    if not ahead and not isinstance(reply.ends, Cut):
        await stream.send_all(_chunk(b""))


def _head(headers: Mapping[str, str], status: int = 200) -> bytes:
    reason = "OK" if status == 200 else "Other"
    lines = [f"HTTP/1.1 {status} {reason}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if "content-length" not in headers:
        lines.append("transfer-encoding: chunked")
    return "\r\n".join([*lines, "", ""]).encode()


def _chunk(data: bytes) -> bytes:
    """A chunk of a body; an empty one is its end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole(status: int, headers: Mapping[str, str], body: bytes) -> bytes:
    return _head({**headers, "content-length": str(len(body))}, status) + body


def _refusal(kind: Kind, refusal: Refusal, said: str = "") -> bytes:
    body = error_body(kind, refusal.fault)
    if said:
        body["error"]["message"] = said
    headers = {"content-type": "application/json", **refusal.headers}
    if refusal.retry_after is not None:
        headers["retry-after"] = refusal.retry_after
    status = _WRITERS[kind].statuses[refusal.fault] if refusal.status is None else refusal.status
    return _whole(status, headers, _json(body))


def _gzip_bomb(size: int) -> Iterator[bytes]:
    """Pack a frame of that size, of one letter, in pieces: RFC 1952, RFC 1951.

    After a full flush nothing refers back, so one packed block can be sent again and again.
    """
    yield b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    checksum = length = 0
    packed: dict[bytes, bytes] = {}
    for piece in _bytes_of(Flood(size)):
        if piece not in packed:
            packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
            packed[piece] = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
        yield packed[piece]
        checksum, length = zlib.crc32(piece, checksum), length + len(piece)
    yield b"\x03\0" + struct.pack("<2L", checksum, length & 0xFFFFFFFF)


@asynccontextmanager
async def open_upstream(
    kind: Kind,
    replies: Script = (),
    *,
    ssl_context: SSLContext | None = None,
) -> AsyncIterator[Upstream]:
    """Open a model server on a free port of 127.0.0.1; leaving the context closes all of it.

    Args:
        kind: The API.
        replies: What it will say.
        ssl_context: With a certificate, to speak TLS.
    """
    upstream = Upstream(kind, replies)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    version = _WRITERS[kind].version
    scheme = "http" if ssl_context is None else "https"
    upstream.base_url = f"{scheme}://127.0.0.1:{port}{version}"
    serving: list[trio.abc.Listener[Any]] = list(listeners)
    if ssl_context is not None:
        serving = [
            trio.SSLListener(listener, ssl_context, https_compatible=True) for listener in listeners
        ]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, upstream.answer, serving)
        yield upstream
        nursery.cancel_scope.cancel()
