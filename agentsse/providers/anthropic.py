"""The words of Anthropic's Messages API, streaming.

Knows: how a prompt is written for `POST /v1/messages`, and what the frames of its answer mean.
Must never know sockets, runs, or another provider. Source: the reference at
platform.claude.com/docs ("Create a Message", "Streaming messages", "Extended thinking").

Theory of operation. An answer is a list of content blocks, told apart by `index`:

    message_start (content_block_start content_block_delta* content_block_stop)*
    message_delta (why it stopped, and the tokens so far) message_stop

with `ping` anywhere between them, and `error` instead of whatever was to follow. A block is begun
by its start, or by the first delta where the start was lost. Reasoning comes signed, or encrypted,
and the API wants it back unchanged in front of the calls that came of it: so the blocks are kept
in the API's own form, and `Finish` carries them where any of them was reasoning.

What the API refuses in a request is left out of it: text without a visible character, a message
without content, reasoning as the last word of an answer, and call ids that only others would give.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, TypeAlias, assert_never

import attrs

from agentsse.events import AnyEvent, FinishReason, PartFinished, Usage
from agentsse.messages import (
    AssistantMessage,
    Echo,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from agentsse.providers import (
    HttpRequest,
    Produced,
    Prompt,
    SseNormalizer,
    decode_foreign,
    encode_raw,
    name_of,
    number,
    object_of,
    text_of,
    upstream_error,
)

KIND: Final = "anthropic"
VERSION: Final = "2023-06-01"  # of the API; newer abilities come without a newer one

MAX_TOKENS: Final = 32_000
"""Tokens of one answer: what every Claude since 4 can write. The API demands a limit."""

MAX_ID: Final = 200  # characters of a call's id; the rest of a longer one becomes a digest

_REASONS: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_REASONING: Final = ("thinking", "redacted_thinking")
_COUNTED: Final = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
)
_UNFIT: Final = re.compile(r"[^a-zA-Z0-9_-]")  # what the API lets into no id

_Json: TypeAlias = dict[str, Any]


@attrs.frozen
class AnthropicApi:
    """The Messages API; see `Api`.

    Attributes:
        base_url: Where it is, without `/v1`.
        key: Sent as `x-api-key`; None where the server asks for none.
        options: Fields of the request's body, beside ours or instead of them: `max_tokens`,
            `thinking`, `temperature`, ...
    """

    kind: ClassVar[str] = KIND

    base_url: str = "https://api.anthropic.com"
    key: str | None = attrs.field(default=None, repr=False)
    options: Mapping[str, Any] = attrs.field(factory=dict)

    def request(self, prompt: Prompt, /) -> HttpRequest:
        """Write a model call."""
        body: _Json = {"model": prompt.model, "max_tokens": MAX_TOKENS, "stream": True}
        told = [m.text for m in prompt.messages if isinstance(m, SystemMessage) and m.text.strip()]
        if told:
            body["system"] = "\n\n".join(told)
        body["messages"] = _turns(prompt.messages)
        if prompt.tools:
            body["tools"] = [
                {"name": t.name, "description": t.description, "input_schema": t.parameters}
                for t in prompt.tools
            ]
        headers = {"anthropic-version": VERSION}
        if self.key is not None:
            headers["x-api-key"] = self.key
        url = f"{self.base_url.rstrip('/')}/v1/messages"
        return HttpRequest(url, headers, body | dict(self.options))

    def normalizer(self, prefix: str, /) -> "AnthropicNormalizer":
        """Make the machine that reads its answer."""
        return AnthropicNormalizer(prefix)


# What is asked ------------------------------------------------------------------------------------


def _turns(messages: Iterable[Message]) -> list[_Json]:
    """Messages as user and assistant take turns; who speaks twice in a row speaks once, longer."""
    turns: list[_Json] = []
    for message in messages:
        match message:
            case SystemMessage():
                continue
            case UserMessage(text):
                role, blocks = "user", _visible(text)
            case ToolMessage():
                role, blocks = "user", [_result(message)]
            case AssistantMessage():
                role, blocks = "assistant", _echoed(message) or _rewritten(message)
            case _:
                assert_never(message)
        if not blocks:
            continue
        if not turns or turns[-1]["role"] != role:
            turns.append({"role": role, "content": []})
        turns[-1]["content"] += blocks
    for turn in turns:
        if turn["role"] == "user":  # results first: they answer the calls right before them
            turn["content"].sort(key=lambda block: block["type"] != "tool_result")
    return turns


def _visible(text: str) -> list[_Json]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _result(message: ToolMessage) -> _Json:
    block: _Json = {"type": "tool_result", "tool_use_id": _fit(message.call_id)}
    if message.content.strip():
        block["content"] = message.content
    if message.is_error:
        block["is_error"] = True
    return block


def _rewritten(message: AssistantMessage) -> list[_Json]:
    """What was said, in this API's form; wherever it was said."""
    calls = [
        {"type": "tool_use", "id": _fit(call.call_id), "name": call.name, "input": call.decoded()}
        for call in message.tool_calls
    ]
    return [*_visible(message.text), *calls]


def _echoed(message: AssistantMessage) -> list[_Json]:
    """What was said here, as it was said; nothing where there is nothing that could go back."""
    echo = message.echo
    if echo is None or echo.kind != KIND or not isinstance(echo.value, list):
        return []
    # An answer may hold empty text, and end while the model was still thinking; a request may not.
    blocks = [b for b in echo.value if b["type"] != "text" or b["text"].strip()]
    while blocks and blocks[-1]["type"] in _REASONING:
        blocks.pop()
    return blocks


def _fit(call_id: str) -> str:
    """A call id with only what the API lets into one; two that differ still do."""
    return _UNFIT.sub(lambda found: f"_{ord(found[0]):x}", _short(call_id))


def _short(call_id: str) -> str:
    """A call id of bearable length; of equal ones equal, and two that differ still do."""
    if len(call_id) <= MAX_ID:
        return call_id
    digest = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()
    return call_id[: MAX_ID - len(digest)] + digest


# What is answered ---------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Block:
    """A content block: `value` is its start, in the API's form, and complete once it is finished.

    Attributes:
        key: Its index.
        number: Its place among all of them, from 1.
        arguments: Pieces of what the provider gives to a tool of its own.
    """

    key: str
    number: int
    value: _Json
    arguments: list[str] = attrs.field(factory=list)

    @property
    def type(self) -> str:
        return name_of(self.value["type"])


@attrs.define(eq=False)
class AnthropicNormalizer(SseNormalizer):
    """The machine that reads one answer; see `Normalizer`."""

    provider: ClassVar[str] = KIND

    _blocks: list[_Block] = attrs.field(factory=list, init=False)  # all, in order
    _open: dict[str, _Block] = attrs.field(factory=dict, init=False)
    _tokens: dict[str, int] = attrs.field(factory=dict, init=False)

    def take(self, name: str, value: _Json) -> list[AnyEvent]:
        """Take one frame.

        Raises:
            ProviderError: It is an error.
        """
        kind = text_of(value.get("type")) or name
        match kind:
            case "content_block_delta":
                return self._delta(value)
            case "content_block_start":
                return self._start(value)
            case "content_block_stop":
                return self._stop(_key(value))
            case "message_start":
                self._count(object_of(value.get("message")).get("usage"))
            case "message_delta":
                self._count(value.get("usage"))
                return self._stopped(value)
            case "message_stop":
                self.is_over = True
                self.said.reason = self.said.reason or "stop"  # it did, and told no other reason
            case "ping":
                pass
            case _ if "error" in (kind, name) or value.get("error"):
                raise upstream_error(self.provider, value.get("error") or value)
            case _:
                return [self.unknown(value)]
        return []

    def close(self) -> Iterator[Produced]:
        """Take note of the end; blocks that never stopped are complete if the answer is."""
        yield from self.feed(b"\n\n")  # a last frame that lacks only its blank line counts
        if self.said.reason is not None:
            for key in list(self._open):
                yield from self._stop(key)
            if any(block.type in _REASONING for block in self._blocks):
                whole = encode_raw([block.value for block in self._blocks])
                self.said.echo = Echo(KIND, decode_foreign(bytes(whole)))
        yield from super().close()

    # Blocks

    def _start(self, frame: _Json) -> list[AnyEvent]:
        key = _key(frame)
        events = self._stop(key)  # of one that never did, and had the same index
        value = object_of(frame.get("content_block"))
        if not name_of(value.get("type")):
            return [*events, self.unknown(frame)]
        block = self._begin(key, value)
        match block.type:
            case "text":
                events += self.said.delta("text", text_of(value.get("text")), key)
            case "thinking":
                events += self.said.delta("reasoning", text_of(value.get("thinking")), key)
            case "tool_use":
                given = value.get("input")
                events += self.said.start_call(
                    key,
                    name=name_of(value.get("name")),
                    call_id=_short(name_of(value.get("id"))),
                    arguments="" if given is None else bytes(encode_raw(given)).decode(),
                )
            case "redacted_thinking" | "server_tool_use" | "mcp_tool_use":
                pass
            case kind if kind.endswith("_tool_result"):
                events += self._tool_finished(block)
            case _:
                events.append(self.unknown(frame))
        return events

    def _delta(self, frame: _Json) -> list[AnyEvent]:
        key = _key(frame)
        match frame.get("delta"):
            case {"type": "text_delta", "text": str(more)} if self._at(key, "text"):
                return self.said.delta("text", more, key)
            case {"type": "input_json_delta", "partial_json": str(more)}:
                if self._at(key, "tool_use"):
                    return self.said.call_delta(key, more)
                if block := self._at(key, "server_tool_use", "mcp_tool_use"):
                    block.arguments.append(more)
                    return []
            case {"type": "thinking_delta", "thinking": str(more)} if self._at(key, "thinking"):
                return self.said.delta("reasoning", more, key)
            case {"type": "signature_delta", "signature": str(signature)}:
                if block := self._at(key, "thinking"):
                    block.value["signature"] = signature
                    return []
            case {"type": "citations_delta", "citation": dict(citation)}:
                if block := self._at(key, "text"):
                    if not isinstance(block.value.get("citations"), list):
                        block.value["citations"] = []
                    block.value["citations"].append(citation)
            case _:
                pass
        return [self.unknown(frame)]

    def _at(self, key: str, *types: str) -> _Block | None:
        """The open block there, if it is of such a type; where there is none, one is begun."""
        block = self._open.get(key) or self._begin(key, {"type": types[0]})
        return block if block.type in types else None

    def _begin(self, key: str, value: Mapping[str, Any]) -> _Block:
        block = self._open[key] = _Block(key, len(self._blocks) + 1, dict(value))
        self._blocks.append(block)
        return block

    def _stop(self, key: str) -> list[AnyEvent]:
        block = self._open.pop(key, None)
        if block is None:
            return []
        value, events = block.value, list[AnyEvent]()
        match block.type:
            case "text" | "thinking" as kind:
                events = self.said.finish("text" if kind == "text" else "reasoning", key)
                value[kind] = "".join(e.text for e in events if isinstance(e, PartFinished))
            case "tool_use":
                events = self.said.finish_call(key)
                for event in events:
                    if isinstance(event, PartFinished):
                        call = ToolCall(event.call_id or "", event.name or "", event.text)
                        value |= {
                            "id": _fit(call.call_id),
                            "name": call.name,
                            "input": call.decoded(),
                        }
            case "server_tool_use" | "mcp_tool_use":
                events = self._tool_started(block)
            case _:
                pass
        return events

    # Tools that run at the provider

    def _tool_started(self, block: _Block) -> list[AnyEvent]:
        value, written = block.value, "".join(block.arguments)
        given = decode_foreign(written) if written else value.get("input") or {}
        value |= {
            "id": name_of(value.get("id")) or self._made_id(block),
            "name": name_of(value.get("name")) or "unnamed",
            "input": given if isinstance(given, dict) else {"_raw": given},
        }
        return self.said.tool_started(value["id"], value["name"], given)

    def _tool_finished(self, block: _Block) -> list[AnyEvent]:
        kind, content = block.type, block.value.get("content")
        failed = text_of(object_of(content).get("type")).endswith("_error")
        return self.said.tool_finished(
            name_of(block.value.get("tool_use_id")) or self._made_id(block),
            kind.removesuffix("_tool_result"),
            content,
            is_error=failed or block.value.get("is_error") is True,
            source="mcp" if kind == "mcp_tool_result" else "provider",
        )

    def _made_id(self, block: _Block) -> str:
        return f"{self.prefix}b{block.number}"

    # The end

    def _stopped(self, frame: _Json) -> list[AnyEvent]:
        """Why the model stopped; what explains it, as with a refusal, is handed on."""
        delta = object_of(frame.get("delta"))
        reason = text_of(delta.get("stop_reason")) or text_of(frame.get("stop_reason"))
        if reason:
            self.said.reason = _REASONS.get(reason, "other")
        return [self.unknown(frame)] if delta.get("stop_details") else []

    def _count(self, usage: Any) -> None:
        """Take the tokens as told last: counts are cumulative, and what is missing stands."""
        told = object_of(usage)
        told = object_of(told.get("output_tokens_details")) | told
        for name in (*_COUNTED, "thinking_tokens"):
            self._tokens[name] = max(self._tokens.get(name, 0), number(told.get(name)))
        fresh, written, read, output = (self._tokens[name] for name in _COUNTED)
        self.said.usage = Usage(
            input_tokens=fresh + written + read,
            output_tokens=output,
            reasoning_tokens=self._tokens["thinking_tokens"],
            cache_read_tokens=read,
            cache_write_tokens=written,
        )


def _key(frame: _Json) -> str:
    return str(number(frame.get("index")))
