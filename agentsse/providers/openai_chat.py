"""Chat completions: what llama.cpp, vLLM, Ollama, LM Studio and most hosted services speak.

Knows: `POST /chat/completions` with `stream`, as OpenAI's API reference has it, and how servers
that claim the same bend it. Must never know HTTP, runs, or which server it is that answers.

A chunk has choices, of which only the first counts, and its `delta` has any of reasoning, content,
a refusal and pieces of tool calls. What is said stands in order: reasoning, text or a refusal ends
when another of them begins, or a tool call. Tool calls stay open beside each other until the end.

Servers disagree most on which call a piece belongs to. It is looked for by its index, else by its
id; with neither it belongs to the last call that was opened, or, among several of one chunk, to
the one in its place. But a piece with a name begins another call where what was found has another
name or id, or where its arguments are complete and more come: some servers number all calls 0.
Arguments that only repeat what a call has already are dropped.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, Literal, assert_never

import attrs
import msgspec
from msgspec import Struct

from agentsse.errors import BadRequest
from agentsse.events import (
    AnyEvent,
    FinishReason,
    PartFinished,
    PartKind,
    Usage,
    decode_json,
    well_formed,
)
from agentsse.messages import (
    AssistantMessage,
    Echo,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from agentsse.sse import Frame

from . import (
    HttpRequest,
    Produced,
    Prompt,
    SseNormalizer,
    encode_raw,
    number,
    object_of,
    text_of,
    upstream_error,
)

_BLANKS: Final = " \t\n\r"  # of JSON
_MARKS: Final = re.compile(r'[{}"]|\\.?', re.DOTALL)

# Those of OpenAI, then what other servers let through of the APIs behind them, in lower case.
_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "error": "error",
    "end_turn": "stop",
    "eos": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_length": "length",
    "tool_use": "tool_calls",
    "safety": "content_filter",
}
_FIELDS = frozenset(
    {
        "role",
        "content",
        "reasoning_content",
        "reasoning",
        "refusal",
        "tool_calls",
        "function_call",
    }
)

# What is asked ------------------------------------------------------------------------------------


@attrs.frozen
class OpenAIChatApi:
    """Chat completions; see `Api`.

    Attributes:
        base_url: What stands before `/chat/completions`.
        key: Sent as a bearer token; None where the server wants none.
        options: Put over the body of every call: `temperature`, `max_tokens`. None takes a field
            out that a server refuses, `parallel_tool_calls` or `stream_options` for instance.
    """

    kind: ClassVar[str] = "openai_chat"

    base_url: str = "https://api.openai.com/v1"
    key: str | None = attrs.field(default=None, repr=False)
    options: Mapping[str, Any] = attrs.field(factory=dict)

    def request(self, prompt: Prompt, /) -> HttpRequest:
        """Write a model call."""
        body: dict[str, Any] = {
            "model": prompt.model,
            "messages": [self._written(message) for message in prompt.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.parameters,
                    },
                }
                for tool in prompt.tools
            ]
            body["parallel_tool_calls"] = True  # llama.cpp allows them only where asked to
        body |= self.options
        return HttpRequest(
            url=f"{self.base_url.rstrip('/')}/chat/completions",
            headers={"authorization": f"Bearer {self.key}"} if self.key else {},
            body=body,
        )

    def normalizer(self, prefix: str, /) -> "OpenAIChatNormalizer":
        """Make the machine that reads the answer."""
        return OpenAIChatNormalizer(prefix, base_url=self.base_url)

    def _written(self, message: Message) -> dict[str, Any]:
        match message:
            case SystemMessage(text=text):
                return {"role": "system", "content": text}
            case UserMessage(text=text):
                return {"role": "user", "content": text}
            case AssistantMessage(text=text, tool_calls=calls):
                if not calls:
                    return {"role": "assistant", "content": text}
                # Null, as OpenAI writes it: behind some servers stand APIs that refuse empty text.
                content = {"role": "assistant", "content": text or None}
                return content | self._echoed(message.echo) | {"tool_calls": _called(calls)}
            case ToolMessage(call_id=call_id, content=content_):
                return {"role": "tool", "tool_call_id": call_id, "content": content_}
            case _:
                assert_never(message)

    def _echoed(self, echo: Echo | None) -> dict[str, Any]:
        """The reasoning before tool calls, where it came from: other servers refuse the field."""
        if echo is None or echo.kind != self.kind or echo.value["base_url"] != self.base_url:
            return {}
        return {"reasoning_content": echo.value["reasoning_content"]}


def _called(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    """Tool calls as a message holds them; servers refuse arguments that are no JSON object."""
    return [
        {
            "id": call.call_id,
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": call.arguments
                if _object(call.arguments) is not None
                else _text(call.decoded()),
            },
        }
        for call in calls
    ]


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, if it is one."""
    if not text.rstrip().endswith("}"):  # most pieces of arguments are not looked at any further
        return None
    try:
        value = decode_json(text)
    except BadRequest:
        return None
    return value if isinstance(value, dict) else None


def _text(value: dict[str, Any]) -> str:
    return bytes(encode_raw(value)).decode()


# What is answered ---------------------------------------------------------------------------------


class _TextDelta(Struct, gc=False):
    content: str
    role: str | None = None
    reasoning_content: None = None
    reasoning: None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None


class _TextChoice(Struct, gc=False):
    delta: _TextDelta
    index: Literal[0] = 0
    finish_reason: None = None
    message: None = None
    usage: None = None
    error: None = None


class _TextChunk(Struct, gc=False):
    """A chunk in which all that `take` looks at is text; any other does not decode."""

    choices: tuple[_TextChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: None = None
    error: None = None


_text_chunks: Final = msgspec.json.Decoder(_TextChunk)


@attrs.frozen
class _Piece:
    """What a delta says of one tool call; empty where it says nothing."""

    index: int | None
    call_id: str
    name: str
    arguments: str


@attrs.define(eq=False)
class _Arguments:
    """Arguments as they come: every piece is looked at once, and the whole of them once.

    Braces tell when an object may be complete. Whatever follows that is not blank spoils it.
    """

    pieces: list[str] = attrs.field(factory=list)
    _state: Literal["open", "closed", "read", "spoilt"] = "open"
    _depth: int = 0
    _is_quoted: bool = False
    _is_escaped: bool = False
    _value: dict[str, Any] | None = None

    def add(self, text: str) -> None:
        """Take a piece that is not empty."""
        self.pieces.append(text)
        if self._depth:
            self._follow(text)
        elif self._state != "spoilt" and (begun := text.lstrip(_BLANKS)):
            if self._state == "open" and begun.startswith("{"):
                self._follow(text)
            else:
                self._spoil()

    def value(self) -> dict[str, Any] | None:
        """The object, once it is complete."""
        if self._state == "closed":
            self._value, self._state = _object("".join(self.pieces)), "read"
        return self._value

    def _follow(self, text: str) -> None:
        start, self._is_escaped = int(self._is_escaped), False
        for mark in _MARKS.finditer(text, start):
            match mark[0]:
                case '"':
                    self._is_quoted = not self._is_quoted
                case "\\":  # what it escapes comes with the next piece
                    self._is_escaped = True
                case "{" if not self._is_quoted:
                    self._depth += 1
                case "}" if not self._is_quoted:
                    self._depth -= 1
                    if not self._depth:
                        self._state = "closed"
                        if text[mark.end() :].strip(_BLANKS):
                            self._spoil()
                        return
                case _:
                    pass

    def _spoil(self) -> None:
        self._state, self._value = "spoilt", None


@attrs.define(eq=False)
class _Call:
    """A tool call, as far as later pieces are told apart by it."""

    key: str
    index: int | None
    call_id: str = ""
    name: str = ""
    arguments: _Arguments = attrs.field(factory=_Arguments)

    def is_continued_by(self, piece: _Piece) -> bool:
        """Whether a piece that may belong to this call does; else it begins another."""
        if not (piece.name and self.name):
            return True
        return (
            piece.name == self.name
            and piece.index in (None, self.index)
            and (not self.call_id or piece.call_id in ("", self.call_id))
            and not (piece.arguments.strip() and self.arguments.value() is not None)
        )

    def is_repeated_by(self, piece: _Piece) -> bool:
        """Whether a piece is but the aggregate of what was streamed."""
        # A whole call without an id may be the same as the one before, and yet another.
        has_id = bool(piece.call_id) and piece.call_id == self.call_id
        if piece.name and not (has_id and piece.name == self.name):
            return False
        value = _object(piece.arguments)
        return value is not None and value == self.arguments.value()


@attrs.define(eq=False)
class OpenAIChatNormalizer(SseNormalizer):
    """Turns the bytes of a stream of chat completion chunks into our events.

    Attributes:
        base_url: Where they come from; reasoning is sent back to nobody else.
    """

    provider: ClassVar[str] = "openai_chat"

    base_url: str = attrs.field(default="", kw_only=True)
    _begun: int = attrs.field(default=0, init=False)  # calls
    # The last call of an index and an id, of either alone, and of neither: the last of all.
    _last: dict[tuple[int | None, str], _Call] = attrs.field(factory=dict, init=False)
    # The kind that was said last, but for calls; and the texts of the parts that have ended.
    _speaking: PartKind | None = attrs.field(default=None, init=False)
    _done: dict[PartKind, list[str]] = attrs.field(factory=dict, init=False)
    _has_reasoning_content: bool = attrs.field(default=False, init=False)
    # Whether anything in the frame at hand was not understood: then it is handed on as well.
    _is_strange: bool = attrs.field(default=False, init=False)

    def take_text(self, frame: Frame) -> list[AnyEvent] | None:
        """Take one chunk that holds text alone; see `SseNormalizer`."""
        if self._speaking != "text" or frame.event == "error":
            return None
        try:
            chunk = _text_chunks.decode(frame.data)
        except (ValueError, RecursionError):  # the former also where UTF-8 cannot carry a string
            return None
        return self.said.delta("text", chunk.choices[0].delta.content)

    def take(self, name: str, value: dict[str, Any]) -> Iterator[AnyEvent]:
        """Take one chunk; see `SseNormalizer`."""
        if error := value.get("error"):
            raise upstream_error(self.provider, error)
        if name == "error" or value.get("object") == "error":  # the latter is vLLM's
            raise upstream_error(self.provider, value)
        self._is_strange = False
        self._count(value.get("usage"))
        match value.get("choices"):
            case [_, *_] as choices:
                for place, choice in enumerate(choices):
                    if not isinstance(choice, dict):
                        self._is_strange = True
                    elif not choice.get("index", place):
                        yield from self._take_choice(choice)
            case [] | None if "usage" in value:
                pass
            case _:
                self._is_strange = True
        if self._is_strange:
            yield self.unknown(value)

    def close(self) -> Iterator[Produced]:
        """Take note of the end; see `Normalizer`.

        `[DONE]` alone is a finish as well, where anything was said: some servers give no reason.
        """
        yield from self.feed(b"\n\n")
        if self.is_over:
            yield from self._noted(self.said.finish_all())
            if self._done and self.said.reason is None:
                self.said.reason = "stop"
            if self._has_reasoning_content and self.said.has_calls:
                # DeepSeek refuses the answers to calls whose reasoning does not come with them.
                reasoning = "".join(self._done["reasoning"])
                value = {"base_url": self.base_url, "reasoning_content": reasoning}
                self.said.echo = Echo(OpenAIChatApi.kind, value)
        yield from super().close()

    def _take_choice(self, choice: dict[str, Any]) -> Iterator[AnyEvent]:
        if error := choice.get("error"):  # OpenRouter's place for it
            raise upstream_error(self.provider, error)
        self._count(choice.get("usage"))  # Moonshot's
        delta, message = choice.get("delta"), choice.get("message")
        reason = choice.get("finish_reason")
        if isinstance(delta, dict):
            yield from self._take_message(delta, is_whole=False)
        elif delta is not None:
            self._is_strange = True
        if isinstance(message, dict):
            # Beside deltas it is what was said so far, and only the last one is of any use.
            if reason or not delta:
                yield from self._take_message(message, is_whole=True)
        elif message is not None:
            self._is_strange = True
        if isinstance(reason, str) and reason:
            self.is_over = True
            self.said.reason = _REASONS.get(reason.lower(), "other")
            yield from self._noted(self.said.finish_all())
        elif reason:
            self._is_strange = True

    def _take_message(self, message: dict[str, Any], *, is_whole: bool) -> Iterator[AnyEvent]:
        """Take what a delta, or an aggregate, has."""
        if message and not message.keys() & _FIELDS:
            self._is_strange = True
        spoken = [*self._spoken(message)]
        if is_whole:
            texts: dict[PartKind, list[str]] = {}
            for kind, text in spoken:
                texts.setdefault(kind, []).append(text)
            for kind, pieces in texts.items():
                if any(pieces):
                    yield from self._say_whole(kind, well_formed("".join(pieces)))
        else:
            for kind, text in spoken:
                if text:
                    yield from self._end_speaking(kind)
                    yield from self.said.delta(kind, text)
        for piece in self._pieces(message):
            yield from self._take_piece(piece)

    def _count(self, usage: Any) -> None:
        """Take the tokens as told last; some servers tell them in every chunk."""
        if not isinstance(usage, dict | None):
            self._is_strange = True
        if not isinstance(usage, dict):
            return
        given = object_of(usage.get("prompt_tokens_details"))
        made = object_of(usage.get("completion_tokens_details"))
        counted = Usage(
            input_tokens=number(usage.get("prompt_tokens")),
            output_tokens=number(usage.get("completion_tokens")),
            reasoning_tokens=number(made.get("reasoning_tokens")),
            cache_read_tokens=number(given.get("cached_tokens")),
            cache_write_tokens=number(given.get("cache_write_tokens")),
        )
        if counted != Usage():
            self.said.usage = counted

    def _string(self, message: dict[str, Any], field: str) -> str:
        value = message.get(field)
        if not isinstance(value, str | None):
            self._is_strange = True
        return text_of(value)

    # What is said

    def _spoken(self, message: dict[str, Any]) -> Iterator[tuple[PartKind, str]]:
        """What a message says, in order; Mistral has its reasoning among the content."""
        reasoning = self._string(message, "reasoning_content")
        self._has_reasoning_content = self._has_reasoning_content or bool(reasoning)
        # Servers that move from one name to the other send both for a while.
        yield "reasoning", reasoning or self._string(message, "reasoning")
        match message.get("content"):
            case None:
                pass
            case str(text):
                yield "text", text
            case list(parts):
                for part in parts:
                    yield from self._spoken_part(part)
            case _:
                self._is_strange = True
        yield "refusal", self._string(message, "refusal")

    def _spoken_part(self, part: Any) -> Iterator[tuple[PartKind, str]]:
        match part:
            case str(text) | {"type": "text", "text": str(text)}:
                yield "text", text
            case {"type": "thinking", "thinking": str(text)}:
                yield "reasoning", text
            case {"type": "thinking", "thinking": list(thoughts)}:
                for thought in thoughts:
                    match thought:
                        case {"text": str(text)}:
                            yield "reasoning", text
                        case _:
                            self._is_strange = True
            case {"type": "refusal", "refusal": str(text)}:
                yield "refusal", text
            case _:
                self._is_strange = True

    def _say_whole(self, kind: PartKind, text: str) -> Iterator[AnyEvent]:
        """Take the aggregate of all that was said of one kind, in whichever parts."""
        before = "".join(self._done.get(kind, ()))
        rest = text.removeprefix(before)
        if rest:
            yield from self._end_speaking(kind)
            yield from self._noted(self.said.whole(kind, rest))
        self._done[kind] = [text]

    def _end_speaking(self, kind: PartKind | None) -> Iterator[AnyEvent]:
        """End what is being said, unless it is of the kind that is said next."""
        if self._speaking is not None and self._speaking != kind:
            yield from self._noted(self.said.finish(self._speaking))
        self._speaking = kind

    def _noted(self, events: list[AnyEvent]) -> list[AnyEvent]:
        for event in events:
            if isinstance(event, PartFinished):
                self._done.setdefault(event.kind, []).append(event.text)
        return events

    # What is called

    def _pieces(self, message: dict[str, Any]) -> Iterator[_Piece]:
        """What a message says of tool calls, and of the one function there was before them."""
        match message.get("tool_calls"):
            case None:
                pass
            case list(entries):
                for place, entry in enumerate(entries):
                    yield from self._piece(entry, place if len(entries) > 1 else None)
            case _:
                self._is_strange = True
        if (function := message.get("function_call")) is not None:
            yield from self._piece({"function": function}, None)

    def _piece(self, entry: Any, place: int | None) -> Iterator[_Piece]:
        match entry:
            case {"function": dict(function)}:
                pass
            case dict() if entry.get("function") is None:
                function = {}
            case _:
                self._is_strange = True
                return
        given = function.get("arguments")
        arguments = _text(given) if isinstance(given, dict) else text_of(given)
        if not isinstance(given, str | dict | None):
            self._is_strange = True
        index, call_id = entry.get("index"), well_formed(self._string(entry, "id"))
        if type(index) is not int:
            index = None if call_id else place
        name = well_formed(self._string(function, "name"))
        if call_id or name or arguments:
            yield _Piece(index, call_id, name, arguments)

    def _take_piece(self, piece: _Piece) -> Iterator[AnyEvent]:
        call = self._found(piece)
        if call is not None and call.is_repeated_by(piece):
            return
        if call is None or not call.is_continued_by(piece):
            yield from self._end_speaking(None)
            call = self._begin(piece)
        elif not self.said.has_call(call.key):  # it has ended
            self._is_strange = True
            return
        call.name = call.name or piece.name
        if piece.call_id and not call.call_id:
            call.call_id = piece.call_id
            self._last[None, call.call_id] = self._last[call.index, call.call_id] = call
        yield from self.said.start_call(call.key, name=piece.name, call_id=piece.call_id)
        # Some servers begin with an empty object, whatever comes; it is what nothing becomes.
        if piece.arguments and (call.arguments.pieces or _object(piece.arguments) != {}):
            call.arguments.add(piece.arguments)
            yield from self.said.call_delta(call.key, piece.arguments)

    def _begin(self, piece: _Piece) -> _Call:
        call = _Call(str(self._begun), piece.index)
        self._begun += 1
        self._last[None, ""] = self._last[call.index, ""] = call
        return call

    def _found(self, piece: _Piece) -> _Call | None:
        """The call that a piece may belong to."""
        if (piece.index, "") in self._last:
            known = self._last.get((piece.index, piece.call_id))
            return known or self._last[piece.index, ""]
        return self._last.get((None, piece.call_id)) if piece.call_id else None
