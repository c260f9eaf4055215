"""Google's Gemini API: `streamGenerateContent`, over SSE.

Knows: what a request and a chunk of that API look like. Must never know sockets, runs or tools.

What is special about it:

- A chunk is a whole response with a few parts in it; there is no word for "begins", "ends" or
  "done". A part of text is an increment, a function call comes whole.
- `usageMetadata` may come with any chunk, and after the chunk that has the `finishReason`. So may
  an error; and it may come as a bare JSON object between the frames, which no SSE reader sees.
  So a `finishReason` makes it over, not ended: what follows at once is still read.
- The model signs parts (`thoughtSignature`), and wants each signed part back where it stood, not
  joined with another. So where one is signed, all of them go back as they came.

Source: https://ai.google.dev/api/generate-content, and .../gemini-api/docs/thought-signatures.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, assert_never
from urllib.parse import quote

import attrs

from agentsse.errors import ProviderError
from agentsse.events import AnyEvent, FinishReason, ProviderEvent, Usage, well_formed
from agentsse.messages import (
    AssistantMessage,
    Echo,
    SystemMessage,
    ToolMessage,
    ToolSpec,
    UserMessage,
)

from . import (
    MAX_ERROR_BODY,
    MAX_QUOTED,
    HttpRequest,
    Produced,
    Prompt,
    SseNormalizer,
    decode_foreign,
    encode_raw,
    name_of,
    number,
    text_of,
    upstream_error,
)

KIND: Final = "gemini"
MAX_CANDIDATES: Final = 8  # of one chunk that are looked at: the most that the API gives

# From version 3 on a function call without a signature is refused; this word, documented for calls
# that another model made, stands in for one. Names without a number mean the newest.
_UNSIGNED: Final = "skip_thought_signature_validator"
_WANTS_SIGNATURES = re.compile(r"gemini-(?![12]\b)")

# Writing ------------------------------------------------------------------------------------------


@attrs.frozen
class GeminiApi:
    """The words of the Gemini API; see `Api`.

    Attributes:
        base_url: Where the API is, with its version.
        key: Sent as a header; None where a proxy adds it.
        options: More of the body (`generationConfig`, `safetySettings`); what is named here
            replaces what would stand there.
    """

    kind: ClassVar[str] = KIND

    base_url: str = "https://generativelanguage.googleapis.com/v1beta"
    key: str | None = attrs.field(default=None, repr=False)
    options: Mapping[str, Any] = attrs.field(factory=dict)

    def request(self, prompt: Prompt, /) -> HttpRequest:
        """Write a model call; the model may be named as `models/...` or `tunedModels/...`."""
        match prompt.model.split("/"):
            case ["models" | "tunedModels" as collection, name]:
                pass
            case _:
                collection, name = "models", prompt.model
        path = f"{collection}/{quote(name, safe='', errors='replace')}"
        told = [message for message in prompt.messages if isinstance(message, SystemMessage)]
        system = [part for message in told for part in _text(message.text)]
        body: dict[str, Any] = {"contents": _contents(prompt)}
        if system:
            body["systemInstruction"] = {"parts": system}
        if prompt.tools:
            body["tools"] = [{"functionDeclarations": [_declaration(t) for t in prompt.tools]}]
        return HttpRequest(
            f"{self.base_url.rstrip('/')}/{path}:streamGenerateContent?alt=sse",
            {} if self.key is None else {"x-goog-api-key": self.key},
            body | dict(self.options),
        )

    def normalizer(self, prefix: str, /) -> "GeminiNormalizer":
        """Make the machine that reads the answer; it is fed bytes."""
        return GeminiNormalizer(prefix)


def _contents(prompt: Prompt) -> list[dict[str, Any]]:
    """The conversation; turns of one role that follow one another are one."""
    contents: list[dict[str, Any]] = []
    signature = _UNSIGNED if _WANTS_SIGNATURES.search(prompt.model) else None
    ids: set[str] = set()  # those that the model itself gave: an id of ours means nothing to it
    for message in prompt.messages:
        match message:
            case SystemMessage():
                continue
            case UserMessage():
                role, parts = "user", _text(message.text)
            case AssistantMessage(echo=Echo(kind="gemini", value=list() as echoed)):
                role, parts = "model", echoed
                ids |= {text_of(call.get("id")) for call in _function_calls(echoed)}
            case AssistantMessage():
                role, parts = "model", _parts(message, signature)
            case ToolMessage():
                role, parts = "user", [_response(message, ids)]
            case _:
                assert_never(message)
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        elif parts:
            contents.append({"role": role, "parts": list(parts)})
    return contents


def _text(text: str) -> list[dict[str, Any]]:
    return [{"text": text}] if text else []  # a part without content would be refused


def _function_calls(parts: list[Any]) -> list[dict[str, Any]]:
    found = [part.get("functionCall") for part in parts if isinstance(part, dict)]
    return [call for call in found if isinstance(call, dict)]


def _parts(message: AssistantMessage, signature: str | None) -> list[dict[str, Any]]:
    """What a model said, written anew; of calls made at once only the first is signed."""
    parts = _text(message.text)
    for call in message.tool_calls:
        part: dict[str, Any] = {"functionCall": {"name": call.name, "args": call.decoded()}}
        if signature is not None:
            part["thoughtSignature"], signature = signature, None
        parts.append(part)
    return parts


def _response(message: ToolMessage, ids: set[str]) -> dict[str, Any]:
    # An object is asked for, and in it these two names have a meaning: so they are always used.
    said = {"error" if message.is_error else "output": decode_foreign(message.content)}
    response: dict[str, Any] = {"name": message.name, "response": said}
    if message.call_id in ids:
        response["id"] = message.call_id
    return {"functionResponse": response}


def _declaration(tool: ToolSpec) -> dict[str, Any]:
    """Declare a tool.

    `parameters` would be a subset of OpenAPI's schema in a closed message: one keyword that it
    lacks (`$schema`, `additionalProperties`, `const`, `$ref`, a list of types) and the API refuses
    the whole request. `parametersJsonSchema` takes JSON Schema as it is; so nothing is rewritten
    here. An object without properties is left out, as the API wants it.
    """
    declaration: dict[str, Any] = {"name": tool.name, "description": tool.description}
    if tool.parameters.get("properties"):
        declaration["parametersJsonSchema"] = tool.parameters
    return declaration


# Reading ------------------------------------------------------------------------------------------

_REASONS: Mapping[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "MALFORMED_FUNCTION_CALL": "error",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
}
# Of a candidate, what is read here or says nothing; the rest (citations, grounding) is handed on.
_READ = frozenset(
    {"content", "finishReason", "index", "safetyRatings", "tokenCount", "avgLogprobs"}
)
_FIELD = re.compile(rb"(?:\xef\xbb\xbf)?(?:(?:data|event|id|retry)?:|(?:data|event|id|retry)?$)")


@attrs.define(eq=False)
class GeminiNormalizer(SseNormalizer):
    """Reads the stream of one model call; only its first candidate is told as what was said."""

    provider: ClassVar[str] = KIND

    _parts: list[dict[str, Any]] = attrs.field(factory=list, init=False)
    _counts: dict[str, Any] = attrs.field(factory=dict, init=False)
    _calls: int = attrs.field(default=0, init=False)
    _codes: int = attrs.field(default=0, init=False)
    _code_id: str = attrs.field(default="", init=False)  # of the code whose result is to come
    _line: bytearray = attrs.field(factory=bytearray, init=False)
    _stray: bytearray = attrs.field(factory=bytearray, init=False)

    def feed(self, chunk: bytes, /) -> Iterator[Produced]:
        """Take some bytes; see `Normalizer`."""
        self._notice(chunk)
        yield from super().feed(chunk)

    def close(self) -> Iterator[Produced]:
        """Take note of the end; see `Normalizer`. An error that stood beside the frames counts."""
        yield from self.feed(b"\n\n")
        if (error := _error_of(decode_foreign(bytes(self._stray)))) is not None:
            raise upstream_error(self.provider, error)
        if any(text_of(part.get("thoughtSignature")) for part in self._parts):
            # Through JSON, as it will go back: half of a surrogate pair could not.
            self.said.echo = Echo(KIND, decode_foreign(bytes(encode_raw(self._parts))))
        yield from super().close()

    def take(self, name: str, value: dict[str, Any]) -> Iterable[AnyEvent]:  # noqa: ARG002 - frames have no names here
        """Take one chunk, bare or wrapped as `{"response": ...}`; may raise `ProviderError`."""
        wrapped = value.get("response")
        chunk = wrapped if isinstance(wrapped, dict) else value
        for said in (value, chunk):
            if (error := _error_of(said)) is not None:
                raise upstream_error(self.provider, error)
        candidates, usage = chunk.get("candidates"), chunk.get("usageMetadata")
        feedback = chunk.get("promptFeedback")
        if isinstance(usage, dict):
            self._count(usage)
        if isinstance(candidates, list):
            for candidate in candidates[:MAX_CANDIDATES]:
                yield from self._candidate(candidate)
            if rest := candidates[MAX_CANDIDATES:]:
                yield self.unknown(rest)  # at once, however many they are
        if isinstance(feedback, dict) and not candidates:
            self._blocked(feedback)
        self.is_over = self.is_over or self.said.reason is not None
        if not (
            isinstance(candidates, list) or isinstance(usage, dict) or isinstance(feedback, dict)
        ):
            yield self.unknown(value)

    def unknown(self, value: Any) -> ProviderEvent:
        """Hand on what nobody here understands; but a list may hold an error."""
        if isinstance(value, list) and (error := _error_of(value)) is not None:
            raise upstream_error(self.provider, error)
        return super().unknown(value)

    # Below

    def _notice(self, chunk: bytes) -> None:
        """Keep the lines that are no field of SSE: an error may stand there, as bare JSON."""
        first, *more = chunk.replace(b"\r", b"\n").split(b"\n")
        self._line += first[: MAX_ERROR_BODY - len(self._line)]
        for piece in more:
            if len(self._stray) < MAX_ERROR_BODY and not _FIELD.match(self._line):
                self._stray += self._line + b"\n"
            self._line[:] = piece[:MAX_ERROR_BODY]

    def _count(self, usage: dict[str, Any]) -> None:
        # Each chunk tells the sums so far; one that leaves a count out has not taken it back.
        self._counts |= usage
        prompt, tools, cached, candidates, thoughts = (
            number(self._counts.get(name))
            for name in (
                "promptTokenCount",
                "toolUsePromptTokenCount",
                "cachedContentTokenCount",
                "candidatesTokenCount",
                "thoughtsTokenCount",
            )
        )
        self.said.usage = Usage(
            input_tokens=prompt + tools,
            output_tokens=candidates + thoughts,
            reasoning_tokens=thoughts,
            cache_read_tokens=cached,
        )

    def _blocked(self, feedback: dict[str, Any]) -> None:
        if reason := text_of(feedback.get("blockReason")):
            why = well_formed(f"{reason} {text_of(feedback.get('blockReasonMessage'))}").strip()
            raise ProviderError(
                f"{self.provider}: expected an answer, got none: the prompt was blocked "
                f"({why[:MAX_QUOTED]}); say it differently, or set safetySettings",
                code="content_filter",
            )

    def _candidate(self, candidate: Any) -> Iterator[AnyEvent]:
        if not isinstance(candidate, dict) or number(candidate.get("index")) > 0:
            yield self.unknown(candidate)
            return
        content = candidate.get("content")
        parts = content.get("parts", []) if isinstance(content, dict) else content
        if isinstance(parts, list):
            for part in parts:
                yield from self._part(part)
        elif parts is not None:
            yield self.unknown(candidate)
        reason = text_of(candidate.get("finishReason"))
        if reason not in ("", "FINISH_REASON_UNSPECIFIED"):
            self.said.reason = _REASONS.get(reason, "other")
        if rest := {key: value for key, value in candidate.items() if key not in _READ}:
            yield self.unknown(rest)

    def _part(self, part: Any) -> Iterator[AnyEvent]:
        if isinstance(part, dict) and (part.get("text") or part.keys() - {"text", "thought"}):
            self._parts.append(part)  # one that holds nothing would be refused when it comes back
        match part:
            case {"functionCall": dict() as call}:
                yield from self.said.finish_all("text", "reasoning")
                yield from self._function_call(call)
            case {"executableCode": dict() as code}:
                yield from self.said.finish_all("text", "reasoning")
                self._codes += 1
                self._code_id = _id_of(code) or f"{self.prefix}x{self._codes}"
                arguments = {key: code[key] for key in ("language", "code") if key in code}
                yield from self.said.tool_started(self._code_id, "code_execution", arguments)
            case {"codeExecutionResult": dict() as result}:
                yield from self.said.finish_all("text", "reasoning")
                yield from self._code_result(result)
            case {"text": str() as text}:
                if text:
                    is_thought = part.get("thought") is True
                    yield from self.said.finish_all("text" if is_thought else "reasoning")
                    yield from self.said.delta("reasoning" if is_thought else "text", text)
            case dict() if part.keys() <= {"thought", "thoughtSignature"}:
                pass  # a signature alone: it is in the echo
            case _:
                yield from self.said.finish_all("text", "reasoning")
                yield self.unknown(part)

    def _function_call(self, call: dict[str, Any]) -> Iterator[AnyEvent]:
        self._calls += 1
        key, arguments = str(self._calls), call.get("args")
        yield from self.said.start_call(key, name=name_of(call.get("name")), call_id=_id_of(call))
        raw = encode_raw({} if arguments is None else arguments)
        yield from self.said.finish_call(key, arguments=bytes(raw).decode())

    def _code_result(self, result: dict[str, Any]) -> Iterator[AnyEvent]:
        call_id, self._code_id = _id_of(result) or self._code_id, ""
        if not call_id:
            self._codes += 1
            call_id = f"{self.prefix}x{self._codes}"
        yield from self.said.tool_finished(
            call_id,
            "code_execution",
            text_of(result.get("output")),
            is_error=result.get("outcome") != "OUTCOME_OK",
        )


def _id_of(value: dict[str, Any]) -> str:
    return name_of(value.get("id"))


def _error_of(value: Any) -> Any:
    """What an error object says, bare or in a list; None where there is none."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and item.get("error"):
            return item["error"]
    return None
