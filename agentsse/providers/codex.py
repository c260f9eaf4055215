"""The Codex app-server: an agent of its own, in a child process that speaks JSON-RPC on its pipes.

Knows: the words of its protocol, how a prompt becomes a thread and a turn, and how a turn is
interrupted. Must never know runs, HTTP, or what a tool of ours does.

One connection is one process, and one thread in it: later calls of a run say only what is new. What
breaks a thread's agreement with the prompt (another model, an older message that has changed, a
turn that failed) begins a new thread; what breaks the process begins a new process.

Codex runs tools of its own within a turn; they are shown as the provider's. Tools of ours it does
not know: who wants them called wraps this provider, so that they stand in the text.

The protocol is public: https://developers.openai.com/codex/app-server. Messages are JSON objects,
one per line, without the member `jsonrpc`. While nobody streams, nobody reads, and the pipe holds
the process back; what is written goes through a task of its own, so that neither side can wait for
the other.
"""

import importlib.metadata
import json
import os
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeAlias, assert_never

import attrs
import trio

from agentsse.errors import Fault, ProviderError, redact
from agentsse.events import (
    AnyEvent,
    Option,
    PartFinished,
    PartStarted,
    ProviderEvent,
    Question,
    ToolSource,
    Usage,
    well_formed,
)
from agentsse.messages import AssistantMessage, Message, SystemMessage, ToolMessage, UserMessage
from agentsse.process import CannotStart, Process, open_process, open_service_nursery

from . import (
    MAX_FRAME,
    MAX_QUOTED,
    MIN_KEY,
    Accumulator,
    Caller,
    Produced,
    Prompt,
    blanked,
    decode_foreign,
    encode_raw,
    number,
    object_of,
    text_of,
    upstream_error,
)

INTERRUPT: Final = 2.0  # seconds for a turn to end by itself; the process has its own grace after
LAST_WORDS: Final = 1.0  # seconds for a process to exit once it has closed its output
READ: Final = 64 * 1024  # bytes that one read takes: what a pipe holds
MAX_EARLY: Final = 1_000  # notifications kept from before a turn; of more the oldest are of no use
MAX_OUTGOING: Final = 1_000  # messages that wait to be read; who reads none of them is broken
MAX_ASKED: Final = 2_000  # characters of a command, or a reason, that a person is shown

_Json: TypeAlias = dict[str, Any]
_Id: TypeAlias = str | int

# Lines --------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class LineSplitter:
    """Cuts bytes into lines that are not blank. Pure."""

    limit: int = MAX_FRAME
    _rest: bytearray = attrs.field(factory=bytearray, init=False)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take some bytes; what is returned is lazy, and is to be exhausted.

        Raises:
            ProviderError: A line is longer than the limit; what came before is returned first.
        """
        *whole, rest = data.split(b"\n")
        for line in whole:
            self._add(line)
            line, self._rest = bytes(self._rest), bytearray()  # noqa: PLW2901  # with its beginning
            if line.strip():
                yield line
        self._add(rest)

    def _add(self, data: bytes) -> None:
        self._rest += data
        if len(self._rest) > self.limit:
            raise ProviderError(
                f"codex: expected lines of at most {self.limit} bytes, got a longer one",
                code="malformed",
            )


def decode_line(line: bytes) -> _Json:
    """Read a line as a message.

    Raises:
        ProviderError: It is not a JSON object in UTF-8.
    """
    try:
        value = decode_foreign(line.decode())
    except UnicodeDecodeError:
        value = None
    if isinstance(value, dict):
        return value
    shown = redact(line[:MAX_QUOTED].decode(errors="replace"))
    raise ProviderError(
        f"codex: expected lines of JSON objects in UTF-8, got {shown!r}; does the command start "
        "an app-server?",
        code="malformed",
    )


# What comes ---------------------------------------------------------------------------------------

# What a tool of Codex's is called, by the type of its item.
_TOOLS: Final[Mapping[str, str]] = {
    "commandExecution": "exec_command",
    "fileChange": "apply_patch",
    "mcpToolCall": "mcp_tool_call",
    "collabToolCall": "collab_tool_call",
    "collabAgentToolCall": "collab_tool_call",
    "webSearch": "web_search",
    "imageView": "view_image",
}
_NAMED: Final = ("mcpToolCall", "collabToolCall", "collabAgentToolCall")  # in the item itself
_BAD: Final = frozenset({"failed", "declined", "denied", "error", "canceled", "cancelled"})
_REDACTED: Final = ("<redacted_reasoning>", "[[redacted_reasoning]]", "[redacted]", "redacted:")

# What Codex says went wrong, where no HTTP status says it; `codexErrorInfo`, lower case.
_FAULTS: Final[Mapping[str, Fault]] = {
    "badrequest": "bad_request",
    "contextwindowexceeded": "context_length",
    "cyberpolicy": "content_filter",
    "httpconnectionfailed": "unreachable",
    "internalservererror": "server_error",
    "modelcap": "rate_limit",
    "responsestreamconnectionfailed": "unreachable",
    "responsestreamdisconnected": "incomplete",
    "serveroverloaded": "overloaded",
    "unauthorized": "auth",
    "unsupportedinputmodality": "bad_request",
    "usagelimitexceeded": "quota",
}


@attrs.define(eq=False)
class _Thought:
    """A part of the reasoning; its text is held until it is clear that it is not redacted."""

    pieces: list[str] = attrs.field(factory=list)  # what is held
    start: str = ""  # of that, without white space before it
    is_redacted: bool | None = None
    is_finished: bool = False

    @property
    def held(self) -> str:
        """What has come, and was not said."""
        return "".join(self.pieces)


@attrs.define(eq=False)
class CodexNormalizer:
    """A pure machine from the notifications of one turn to our events.

    It is fed decoded messages: `{method, params}`, and `{event, data}` or `{type: "a/b", ...}` as
    bridges write them. Our own `turn/start` may come first: what other threads say, of agents
    that Codex has started, is then handed on, and not taken for ours.
    """

    provider: ClassVar[str] = "codex"

    prefix: str
    is_over: bool = attrs.field(default=False, init=False)
    said: Accumulator = attrs.field(init=False)
    _thread: str = attrs.field(default="", init=False)
    _thoughts: dict[str, _Thought] = attrs.field(factory=dict, init=False)
    # Those that nobody has ended yet, by item and kind.
    _unended: dict[tuple[str, str], list[str]] = attrs.field(factory=dict, init=False)
    _whole: set[str] = attrs.field(factory=set, init=False)  # messages that are complete
    _before: tuple[int, ...] | None = attrs.field(default=None, init=False)
    _hidden: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.said = Accumulator(self.provider, self.prefix)

    def feed(self, message: Any, /) -> Iterator[Produced]:
        """Take one message; see `Normalizer`."""
        method, params = _opened(message)
        thread = _text(params, "threadId")
        if self._thread and thread and thread != self._thread:
            yield self._unknown(message)
            return
        match method:
            case "turn/start":
                self._thread = thread
            case "thread/started" | "turn/started" | "serverRequest/resolved":
                pass
            case "turn/completed":
                self.is_over = True
                self._complete(_object(params, "turn"))
            case "error" if _get(params, "willRetry") is not True:
                raise turn_error(self.provider, params.get("error") or params)
            case "thread/tokenUsage/updated":
                self._use(_object(params, "tokenUsage"))
            case "item/reasoning/summaryPartAdded":
                yield from self._end_summaries(_item_id(params))
            case _:
                events = self._item_event(method, params)
                yield from (self._unknown(message),) if events is None else events

    def close(self) -> Iterator[Produced]:
        """Take note of the end; see `Normalizer`."""
        for key in self._thoughts:
            yield from self._end_thought(key)
        yield from self.said.close()

    # Items

    def _item_event(self, method: str, params: _Json) -> Iterable[AnyEvent] | None:
        """What happens to an item; None where it is not known."""
        item_id, delta = _item_id(params), params.get("delta")
        match method:
            case "item/agentMessage/delta" if isinstance(delta, str):
                return self.said.delta("text", delta, item_id)
            case "item/reasoning/summaryTextDelta" if isinstance(delta, str):
                index = number(_get(params, "summaryIndex"))
                ended = self._end_summaries(item_id, but=f"{item_id}:summary:{index}")
                return [*ended, *self._think(item_id, "summary", index, delta)]
            case "item/reasoning/textDelta" if isinstance(delta, str):
                index = number(_get(params, "contentIndex"))
                return self._think(item_id, "content", index, delta)
            case "item/commandExecution/outputDelta" if item_id and isinstance(delta, str):
                return self._output(item_id, delta, "exec_command")
            case "item/fileChange/outputDelta" if item_id and isinstance(delta, str):
                return self._output(item_id, delta, "apply_patch")
            case "item/mcpToolCall/progress" if item_id:
                name = well_formed(_text(params, "tool")) or "mcp_tool_call"
                return self._output(item_id, _text(params, "message"), name)
            case "item/started":
                return self._started(_object(params, "item"), params)
            case "item/completed":
                return self._completed(_object(params, "item"), params)
            case _:
                return None

    def _output(self, call_id: str, delta: str, name: str) -> list[AnyEvent]:
        return self.said.tool_output(call_id, delta, name) if delta else []

    def _started(self, item: _Json, params: _Json) -> Iterable[AnyEvent] | None:
        kind = _kind(item)
        if kind in ("agentMessage", "reasoning", "userMessage"):
            return ()
        call_id = _item_id(item) or _item_id(params)
        if kind not in _TOOLS or not call_id:
            return None
        return self.said.tool_started(call_id, _tool_name(kind, item), _arguments(kind, item))

    def _completed(self, item: _Json, params: _Json) -> Iterable[AnyEvent] | None:
        kind, item_id = _kind(item), _item_id(item) or _item_id(params)
        match kind:
            case "userMessage":  # what we have said
                return ()
            case "agentMessage":
                if item_id in self._whole:
                    return ()
                self._whole.add(item_id)
                return self.said.whole("text", _text(item, "text"), item_id)
            case "reasoning":
                return self._reasoned(item_id, item)
            case _ if kind not in _TOOLS or not item_id:
                return None
        source: ToolSource = "mcp" if kind == "mcpToolCall" else "provider"
        is_error = _text(item, "status").lower() in _BAD or bool(item.get("error"))
        name = _tool_name(kind, item)
        return [
            *self.said.tool_started(item_id, name, _arguments(kind, item)),
            *self.said.tool_finished(
                item_id, name, _result(item), is_error=is_error, source=source
            ),
        ]

    # Reasoning

    def _think(self, item_id: str, kind: str, index: int, text: str) -> list[AnyEvent]:
        """Take more of a thought; one that is redacted is told of, and nothing else of it."""
        key = f"{item_id}:{kind}:{index}"
        if key not in self._thoughts:
            self._thoughts[key] = _Thought()
            self._unended.setdefault((item_id, kind), []).append(key)
        thought = self._thoughts[key]
        if thought.is_redacted is None:
            thought.pieces.append(text)
            thought.start = (thought.start + text).lstrip()
            thought.is_redacted, text = _is_redacted(thought.start), ""
            if thought.is_redacted:
                return self._hide()
            if thought.is_redacted is False:
                text, thought.pieces = thought.held, []
        return [] if thought.is_redacted else self.said.delta("reasoning", text, key)

    def _hide(self) -> list[AnyEvent]:
        self._hidden += 1
        part_id = f"{self.prefix}r{self._hidden}"
        return [
            PartStarted(part_id=part_id, kind="reasoning"),
            PartFinished(part_id=part_id, kind="reasoning", text=""),
        ]

    def _end_thought(self, key: str, whole: str = "") -> list[AnyEvent]:
        thought = self._thoughts[key]
        if thought.is_finished or thought.is_redacted:
            return []
        thought.is_finished = True
        if _is_redacted(whole):  # and what was held is the beginning of its marker
            return self._hide() if thought.held else self.said.finish("reasoning", key)
        events = self.said.delta("reasoning", thought.held, key)
        if whole:
            return [*events, *self.said.whole("reasoning", whole, key)]
        return [*events, *self.said.finish("reasoning", key)]

    def _end_summaries(self, item_id: str, but: str = "") -> list[AnyEvent]:
        """End the summaries of an item, but for one."""
        keys = self._unended.pop((item_id, "summary"), [])
        if but in keys:
            self._unended[item_id, "summary"] = [but]
        return [event for key in keys if key != but for event in self._end_thought(key)]

    def _reasoned(self, item_id: str, item: _Json) -> list[AnyEvent]:
        """Reasoning is complete: what has not been said of it is said, and all of it ends."""
        events: list[AnyEvent] = []
        for kind in ("summary", "content"):
            texts = item.get(kind)
            for index, text in enumerate(texts if isinstance(texts, list) else ()):
                key = f"{item_id}:{kind}:{index}"
                if isinstance(text, str) and text:
                    if key not in self._thoughts:
                        events += self._think(item_id, kind, index, text)
                    events += self._end_thought(key, text)
        for kind in ("summary", "content"):
            for key in self._unended.pop((item_id, kind), ()):
                events += self._end_thought(key)
        return events

    # The turn

    def _use(self, usage: _Json) -> None:
        """Note the tokens of this turn; it may have many calls of a model, and `last` is of one."""
        last, total = _counts(_object(usage, "last")), _counts(_object(usage, "total"))
        if self._before is None:
            self._before = tuple(t - x for t, x in zip(total, last, strict=True))
        spent = tuple(t - b for t, b in zip(total, self._before, strict=True))
        counts = spent if any(total) and min(spent) >= 0 else last
        self.said.usage = Usage(
            input_tokens=counts[0],
            output_tokens=counts[1],
            reasoning_tokens=counts[2],
            cache_read_tokens=counts[3],
            cache_write_tokens=counts[4],
        )

    def _complete(self, turn: _Json) -> None:
        match turn.get("status"):
            case "completed":
                self.said.reason = "stop"
            case "failed":
                raise turn_error(self.provider, turn.get("error") or "Turn failed")
            case _:
                self.said.reason = "other"

    def _unknown(self, message: Any) -> ProviderEvent:
        return ProviderEvent(provider=self.provider, raw=encode_raw(message))


def _opened(message: Any) -> tuple[str, _Json]:
    """The method of a notification, in any of its three forms, and its parameters."""
    params: Any
    match message:
        case {"method": str(method)}:
            params = message.get("params")
        case {"event": str(method)}:
            params = message.get("data")
        case {"type": str(method)} if "/" in method or method == "error":
            params = message
        case _:
            return "", {}
    return method, object_of(params)


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def _get(fields: Any, name: str) -> Any:
    """A member, by its name in camel case, or in snake case."""
    if not isinstance(fields, dict):
        return None
    value = fields.get(name)
    return fields.get(_snake(name)) if value is None else value


def _object(fields: Any, name: str) -> _Json:
    return object_of(_get(fields, name))


def _text(fields: Any, name: str) -> str:
    return text_of(_get(fields, name))


def _item_id(fields: _Json) -> str:
    return well_formed(_text(fields, "itemId") or _text(fields, "id"))


def _kind(item: _Json) -> str:
    first, *others = text_of(item.get("type")).split("_")
    return first + "".join(word.capitalize() for word in others)


def _tool_name(kind: str, item: _Json) -> str:
    own = well_formed(_text(item, "tool")) if kind in _NAMED else ""
    return own or _TOOLS[kind]


def _arguments(kind: str, item: _Json) -> _Json:
    """What a tool was called with: what is there of it, in this order."""
    match kind:
        case "commandExecution":
            found = {"command": item.get("command"), "cwd": item.get("cwd")}
        case "fileChange":
            changes = item.get("changes")
            found = {"change_count": len(changes) if isinstance(changes, list | dict) else None}
        case "mcpToolCall":
            found = {key: item.get(key) for key in ("server", "tool", "arguments")}
        case "webSearch":
            found = {"query": item.get("query")}
        case "imageView":
            found = {"path": item.get("path")}
        case _:  # of other agents
            found = {
                "tool": item.get("tool"),
                "sender_thread_id": _get(item, "senderThreadId"),
                "receiver_thread_ids": _get(item, "receiverThreadIds"),
            }
    return {key: value for key, value in found.items() if value not in (None, "", [], {})}


def _result(item: _Json) -> str:
    """What a tool has answered, as text: its output as it was printed, if it is there."""
    if aggregated := _text(item, "aggregatedOutput"):
        return aggregated
    pieces = [_text(item, key).strip() for key in ("stdout", "stderr")]
    if not any(pieces):
        pieces = [_shown(item.get(key)) for key in ("output", "result", "response", "value")]
    pieces.append(_shown(item.get("error")))
    if not any(pieces):
        pieces = [_shown(item.get("message"))]
    return "\n\n".join(dict.fromkeys(piece for piece in pieces if piece))


def _shown(value: Any) -> str:
    """A value as text: JSON with sorted keys, where it is none."""
    if value is None or isinstance(value, str):
        return (value or "").strip()
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):  # nested without end
        return bytes(encode_raw(value)).decode()


def _is_redacted(text: str) -> bool | None:
    """Whether a thought is one that must not be shown; None while it may become one."""
    text = text.lstrip().lower()
    if text.startswith(_REDACTED):
        return True
    return None if any(marker.startswith(text) for marker in _REDACTED) else False


def _counts(usage: _Json) -> tuple[int, ...]:
    names = (
        "inputTokens",
        "outputTokens",
        "reasoningOutputTokens",
        "cachedInputTokens",
        "cacheWriteInputTokens",
    )
    return tuple(number(_get(usage, name)) for name in names)


def turn_error(provider: str, error: Any) -> ProviderError:
    """Make an error of what Codex says of a turn: `{message, codexErrorInfo, additionalDetails}`.

    Args:
        provider: Who says it.
        error: An object like that, or text.
    """
    if not isinstance(error, dict):
        return upstream_error(provider, error)
    info = _get(error, "codexErrorInfo")
    details: Any = None
    if isinstance(info, dict):
        info, details = next(iter(info.items()), ("", None))
    info = text_of(info)
    status = number(_get(details, "httpStatusCode")) or None
    wait = _get(details, "resetAfterSeconds")
    message = _text(error, "message") or "Turn failed"
    if more := _text(error, "additionalDetails"):
        message = f"{message}: {more}"
    failure = upstream_error(
        provider,
        {"message": message, "code": info},
        status=status if status is not None and 400 <= status < 600 else None,
        retry_after=float(wait) if type(wait) is int and 0 <= wait < 1 << 53 else None,
    )
    fault = None if status else _FAULTS.get(info.replace("_", "").lower())
    if fault is None:
        return failure
    return ProviderError(failure.message, code=fault, retry_after=failure.retry_after)


# What is said -------------------------------------------------------------------------------------


def as_text(messages: Sequence[Message]) -> str:
    """A conversation as one text; what only the user has said stands there as it is."""
    if all(isinstance(message, UserMessage) for message in messages):
        return "\n\n".join(m.text for m in messages if isinstance(m, UserMessage))
    return "\n\n".join(section for message in messages for section in _sections(message))


def _sections(message: Message) -> Iterator[str]:
    match message:
        case SystemMessage(text):
            yield f"[system]\n{text}"
        case UserMessage(text):
            yield f"[user]\n{text}"
        case AssistantMessage(text, calls):
            if text:
                yield f"[assistant]\n{text}"
            for call in calls:
                yield f"[assistant called {call.name}, {call.call_id}]\n{call.arguments}"
        case ToolMessage(call_id, name, content, is_error):
            what = "error" if is_error else "result"
            yield f"[{what} of {name}, {call_id}]\n{content}"
        case _:
            assert_never(message)


@attrs.frozen
class _Thread:
    """A thread of the app-server, and the prompt that it has answered."""

    thread_id: str
    prompt: Prompt

    def news(self, prompt: Prompt) -> tuple[Message, ...]:
        """What a prompt has beyond what the thread knows; nothing where they do not agree."""
        known = self.prompt.messages
        if prompt.model != self.prompt.model or prompt.messages[: len(known)] != known:
            return ()
        news = prompt.messages[len(known) :]
        # The first is what it has said itself.
        return news[1:] if news and isinstance(news[0], AssistantMessage) else news


# What is asked ------------------------------------------------------------------------------------

_APPROVAL: Final = "approve"

# Who asks whether it may, and the words for yes and no.
_APPROVALS: Final[Mapping[str, tuple[str, str]]] = {
    "item/commandExecution/requestApproval": ("accept", "decline"),
    "item/fileChange/requestApproval": ("accept", "decline"),
    "execCommandApproval": ("approved", "denied"),
    "applyPatchApproval": ("approved", "denied"),
}


def approval_question(params: _Json, paths: Iterable[str] = ()) -> Question:
    """What a person is asked before Codex does something.

    Args:
        params: Of the request.
        paths: The files that it is about, where only their item says so.
    """
    command = params.get("command")
    changes = _get(params, "fileChanges")
    paths = [*paths, *(changes if isinstance(changes, dict) else ())]
    if isinstance(command, list):
        command = " ".join(map(str, command))
    if command:
        asked = [f"Codex wants to run: {command!s}"]
    elif host := _text(_object(params, "networkApprovalContext"), "host"):
        asked = [f"Codex wants to reach: {host}"]
    elif paths:
        asked = [f"Codex wants to change: {', '.join(map(str, paths))}"]
    else:
        asked = ["Codex wants to change files, or to run something that it does not name"]
    for words, name in (
        ("in", "cwd"),
        ("and from now on to write below", "grantRoot"),
        ("because", "reason"),
    ):
        if said := _text(params, name):
            asked.append(f"{words}: {_brief(said)}")
    asked[0] = _brief(asked[0])
    return Question(id=_APPROVAL, kind="confirm", prompt=well_formed("\n".join(asked)))


def input_questions(params: _Json) -> tuple[Question, ...]:
    """What a person is asked where Codex wants to know something.

    Secrets are not asked for: what a person answers stands in the run's log.
    """
    found: dict[str, Question] = {}
    asked = params.get("questions")
    for each in asked if isinstance(asked, list) else ():
        question_id = well_formed(_text(each, "id"))
        if not question_id or question_id in found or _get(each, "isSecret") is True:
            continue
        prompt = [_text(each, "header"), _text(each, "question")]
        options = _options(_get(each, "options"))
        found[question_id] = Question(
            id=question_id,
            kind="choice" if options else "text",
            prompt=well_formed(_brief(": ".join(filter(None, prompt)))),
            options=options,
        )
    return tuple(found.values())


def _options(given: Any) -> tuple[Option, ...]:
    found: dict[str, Option] = {}
    for each in given if isinstance(given, list) else ():
        if label := well_formed(_text(each, "label")):
            more = well_formed(_text(each, "description"))
            found.setdefault(
                label, Option(id=label, label=f"{label}: {_brief(more)}" if more else None)
            )
    return tuple(found.values())


def input_answers(params: _Json, answers: Any) -> _Json:
    """The answers as Codex wants them: a list of texts for each of its questions."""
    asked = params.get("questions")
    ids = [_text(each, "id") for each in (asked if isinstance(asked, list) else ())]
    given = {each: _get(answers, well_formed(each)) for each in ids if each}
    return {
        "answers": {
            each: {"answers": [answer] if isinstance(answer, str) else []}
            for each, answer in given.items()
        }
    }


def _brief(text: str) -> str:
    return text if len(text) <= MAX_ASKED else f"{text[:MAX_ASKED]}..."


# The process --------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Server:
    """An app-server, and what it has been told; one task at a time reads what it says.

    Attributes:
        scope: Around the process; shielded, so that a cancelled turn can still be interrupted.
        gone: Set when the process has been joined.
        failure: Why it is of no more use.
        thread: What it may be asked next without being told everything again.
        changes: The files of its changes, by item, in the turn that there is.
    """

    provider: "CodexProvider"
    caller: Caller
    nursery: trio.Nursery
    scope: trio.CancelScope = attrs.field(factory=lambda: trio.CancelScope(shield=True))
    ready: trio.Event = attrs.field(factory=trio.Event)
    gone: trio.Event = attrs.field(factory=trio.Event)
    failure: ProviderError | None = None
    thread: _Thread | None = None
    is_greeted: bool = False
    changes: dict[str, list[str]] = attrs.field(factory=dict)
    early: deque[_Json] = attrs.field(factory=lambda: deque(maxlen=MAX_EARLY))
    process: Process = attrs.field(init=False)
    _send: trio.MemorySendChannel[bytes] = attrs.field(init=False)
    _outgoing: trio.MemoryReceiveChannel[bytes] = attrs.field(init=False)
    _lines: LineSplitter = attrs.field(factory=LineSplitter)
    _incoming: deque[_Json] = attrs.field(factory=deque)
    _not_before: float = 0.0
    _asks: dict[_Id, trio.CancelScope] = attrs.field(factory=dict)
    _count: int = 0

    def __attrs_post_init__(self) -> None:
        self._send, self._outgoing = trio.open_memory_channel(MAX_OUTGOING)

    async def run(self) -> None:
        """Be the process, until the scope is cancelled; a task of the connection's nursery."""
        provider = self.provider
        env = None if provider.env is None else {**os.environ, **provider.env}
        with self.scope:
            try:
                async with open_process(provider.command, env=env, cwd=provider.cwd) as process:
                    self.process = process
                    self.ready.set()
                    async for line in self._outgoing:
                        with suppress(trio.BrokenResourceError):  # its end will tell
                            await process.stdin.send_all(line)
            except CannotStart as error:
                self.failure = ProviderError(f"{provider.name}: {error.message}", code="not_found")
            finally:
                self.ready.set()
                self.gone.set()

    # Out

    def post(self, message: _Json) -> None:
        """Send a message; sync, it waits for its turn in a queue."""
        try:
            self._send.send_nowait(bytes(encode_raw(message)) + b"\n")
        except trio.WouldBlock:
            raise ProviderError(
                f"{self.provider.name}: expected the app-server to read what it is sent, but it "
                f"has left {MAX_OUTGOING} messages unread",
                code="malformed",
            ) from None

    def post_request(self, method: str, params: _Json) -> int:
        """Send a request; returns its id."""
        self._count += 1
        self.post({"id": self._count, "method": method, "params": params})
        return self._count

    async def request(self, method: str, params: _Json) -> _Json:
        """Send a request, and wait for its result; what else comes is kept for the next turn.

        Raises:
            ProviderError: It was refused, or the process is of no use.
        """
        request_id = self.post_request(method, params)
        while True:
            message = await self.receive()
            if not _is_answer(message):
                self.early.append(message)
            elif message["id"] == request_id:
                return self.result_of(message)

    def result_of(self, answer: _Json) -> _Json:
        """The result that an answer brings; raises `ProviderError` where it brings an error."""
        if "error" in answer:
            raise upstream_error(self.provider.name, answer["error"])
        return _object(answer, "result")

    # In

    async def receive(self, *, in_turn: bool = False) -> _Json:
        """Wait for the next message that is no request; requests are answered on the way.

        Args:
            in_turn: Read seldom, and tell the caller when all that has come was handed on.

        Raises:
            ProviderError: The process has ended, or what it says is not the protocol.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            while self._incoming:
                message = self._incoming.popleft()
                if "method" not in message or type(message.get("id")) not in (str, int):
                    return message
                self._answer(message)
                await trio.lowlevel.checkpoint()  # so that the answer can go out
            if self.failure is not None:
                raise self.failure
            await self._read(in_turn=in_turn)

    async def _read(self, *, in_turn: bool) -> None:
        if in_turn:
            self.caller.lull()
            if trio.current_time() < self._not_before:
                await self.caller.sleep_until(self._not_before)
        data = await self.process.stdout.receive_some(READ)
        if len(data) < READ:  # else there is more already
            self._not_before = trio.current_time() + self.caller.window
        if not data:
            self.failure = await self._death()
            return
        try:
            for line in self._lines.feed(data):
                self._incoming.append(decode_line(line))
        except ProviderError as error:
            self.failure = error  # what has come before it is heard first

    async def _death(self) -> ProviderError:
        """Say how the process has ended."""
        how = "it has closed its output"
        with trio.move_on_after(LAST_WORDS):
            code = await self.process.wait()
            how = f"it has ended with exit code {code}" if code >= 0 else f"signal {-code} ended it"
        said = " ".join(redact(self.process.stderr_tail()).split())[-MAX_QUOTED:]
        return ProviderError(
            f"{self.provider.name}: expected the app-server to answer, but {how}: "
            f"{said or '(it has said nothing to stderr)'}",
            code="incomplete",
        )

    # Requests from the other side

    def _answer(self, message: _Json) -> None:
        request_id: _Id = message["id"]
        method, params = _opened(message)
        match method:
            case "item/tool/call":
                self.post({"id": request_id, "result": {"contentItems": [], "success": False}})
            case "item/tool/requestUserInput":
                asked = input_questions(params)
                self._ask(request_id, asked, lambda given: input_answers(params, given))
            case _ if method in _APPROVALS:
                yes, no = _APPROVALS[method]
                question = approval_question(params, self.changes.get(_item_id(params), ()))
                self._ask(
                    request_id,
                    (question,) if self.provider.approvals == "ask" else (),
                    lambda given: {"decision": yes if _get(given, _APPROVAL) is True else no},
                )
            case "account/chatgptAuthTokens/refresh":
                self._refuse(request_id, -32001, "this client has no tokens to refresh")
            case _:
                self._refuse(request_id, -32601, f"this client does not know {method!r}")

    def _refuse(self, request_id: _Id, code: int, message: str) -> None:
        self.post({"id": request_id, "error": {"code": code, "message": message}})

    def _ask(
        self, request_id: _Id, questions: tuple[Question, ...], result: Callable[[Any], _Json]
    ) -> None:
        """Ask a person, and answer with what `result` makes of that; meanwhile reading goes on."""
        if not questions:
            self.post({"id": request_id, "result": result({})})
            return
        scope = self._asks[request_id] = trio.CancelScope()
        self.nursery.start_soon(self._ask_person, request_id, scope, questions, result)

    async def _ask_person(
        self,
        request_id: _Id,
        scope: trio.CancelScope,
        questions: tuple[Question, ...],
        result: Callable[[Any], _Json],
    ) -> None:
        with scope:
            answers = await self.caller.ask(questions)
            self.post({"id": request_id, "result": result(answers)})

    def withdraw(self, request_id: Any) -> None:
        """Ask a person no longer: Codex does not want to know any more."""
        if type(request_id) in (str, int) and request_id in self._asks:
            self._asks.pop(request_id).cancel()

    def withdraw_all(self) -> None:
        """Ask nothing any longer."""
        for request_id in list(self._asks):
            self.withdraw(request_id)


def _is_answer(message: _Json) -> bool:
    has_outcome = "result" in message or "error" in message
    return has_outcome and "id" in message and "method" not in message


@attrs.define(eq=False)
class _Turn:
    """The messages of one turn, to its end.

    Attributes:
        is_over: Whether Codex has said so, or has refused to begin.
        is_complete: Whether it has come to its end as it should.
    """

    server: _Server
    thread_id: str
    request_id: int
    _first: deque[_Json]
    is_over: bool = False
    is_complete: bool = False
    _turn_id: str = ""

    def __aiter__(self) -> "_Turn":
        return self

    async def __anext__(self) -> _Json:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._first:
            return self._first.popleft()
        while not self.is_over:
            message = await self.server.receive(in_turn=True)
            self._note(message)
            if not _is_answer(message):
                return message
            if message["id"] == self.request_id and "error" in message:
                self.is_over = True
                self.server.result_of(message)
        raise StopAsyncIteration

    async def interrupt(self) -> None:
        """Ask Codex to end the turn, and wait until it has: best effort, and bounded."""
        if not self._turn_id or self.server.failure is not None:
            return
        params = {"threadId": self.thread_id, "turnId": self._turn_id}
        with trio.move_on_after(INTERRUPT), suppress(ProviderError):
            request_id = self.server.post_request("turn/interrupt", params)
            while not self.is_over:
                message = await self.server.receive()
                self._note(message)
                if _is_answer(message) and message["id"] == request_id:
                    self.server.result_of(message)

    def _note(self, message: _Json) -> None:
        """Take from a message what matters for the turn itself."""
        if _is_answer(message):
            if message["id"] == self.request_id:
                self._turn_id = _text(_object(_object(message, "result"), "turn"), "id")
            return
        method, params = _opened(message)
        if _text(params, "threadId") not in ("", self.thread_id):
            return
        turn, item = _object(params, "turn"), _object(params, "item")
        match method:
            case "turn/started":
                self._turn_id = _text(turn, "id") or _text(params, "turnId")
            case "turn/completed":
                self.is_over, self.is_complete = True, turn.get("status") == "completed"
            case "item/started" if _kind(item) == "fileChange":
                self.server.changes[_item_id(item)] = _paths(item.get("changes"))
            case "serverRequest/resolved":
                self.server.withdraw(_get(params, "requestId"))
            case _:
                pass


def _paths(changes: Any) -> list[str]:
    paths = [_text(change, "path") for change in (changes if isinstance(changes, list) else ())]
    return [path for path in paths if path]


# The provider -------------------------------------------------------------------------------------


@attrs.frozen
class CodexProvider:
    """Codex, as a program on this machine; it logs in by itself, and knows its own models.

    Attributes:
        name: What stands before the colon of a model. An empty model is Codex's own choice.
        command: The app-server and its arguments; it is found like any program.
        cwd: Where it works; the working directory of this process unless given.
        env: Its environment, beside that of this process.
        approvals: Whether a person is asked when Codex wants to be allowed something, or it is
            declined at once. What it wants to be allowed, its own configuration says.
        options: More parameters of `thread/start`: `sandbox`, `approvalPolicy`, `config`.
    """

    name: str = "codex"
    command: Sequence[str] = ("codex", "app-server")
    cwd: str | os.PathLike[str] | None = None
    env: Mapping[str, str] | None = attrs.field(default=None, repr=False)
    approvals: Literal["ask", "decline"] = "ask"
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @asynccontextmanager
    async def open(self, caller: Caller, /) -> AsyncIterator["CodexConnection"]:
        """Start the run's process; see `Provider`.

        Leaving the context ends it with all that it has started, joined, whatever the way; a turn
        that is cancelled is interrupted first, see `CodexConnection.stream`.
        """
        async with open_service_nursery() as nursery:
            connection = CodexConnection(self, caller, nursery)
            connection.start()
            try:
                yield connection
            finally:
                connection.stop()


@attrs.define(eq=False)
class CodexConnection:
    """An app-server, as one run uses it; made by `CodexProvider.open`, which closes it."""

    provider: CodexProvider
    caller: Caller
    nursery: trio.Nursery
    _server: _Server | None = attrs.field(default=None, init=False)

    def start(self) -> _Server:
        """Start a process; sync, what goes wrong is raised by the call that wants to use it."""
        self._server = _Server(self.provider, self.caller, self.nursery)
        self.nursery.start_soon(self._server.run)
        return self._server

    def stop(self) -> None:
        """Let the process end, if there is one; sync, its `gone` says when it has."""
        if self._server is not None:
            self._server.scope.cancel()
            self._server = None

    @asynccontextmanager
    async def stream(self, prompt: Prompt, /) -> AsyncIterator[AsyncIterator[_Json]]:
        """Begin a turn, and open its messages; see `Connection`.

        Leaving the context before the turn is over, also when cancelled, interrupts it: Codex has
        `INTERRUPT` seconds to say that it has ended, then the process is ended. The next call
        tells a new thread everything, in a new process if need be.
        """
        server, turn = self._server or self.start(), None
        try:
            turn = await self._begin(server, prompt)
            yield turn
        except ProviderError as error:
            # Shorter values are no secrets, and would be found everywhere.
            given = (self.provider.env or {}).values()
            if (shown := blanked(error, [v for v in given if len(v) >= MIN_KEY])) is error:
                raise
            raise shown from None
        finally:
            with trio.CancelScope(shield=True):  # bounded: INTERRUPT, and the end of a process
                await self._leave(server, turn, prompt)

    def normalizer(self, prefix: str, /) -> CodexNormalizer:
        """Make a machine for one model call."""
        return CodexNormalizer(prefix)

    async def _begin(self, server: _Server, prompt: Prompt) -> _Turn:
        """Send what the thread does not know yet; begin one where there is none to go on with."""
        await server.ready.wait()
        if server.failure is not None:
            raise server.failure
        if not server.is_greeted:
            await self._greet(server)
        thread, server.thread = server.thread, None  # until it has answered this, too
        news = thread.news(prompt) if thread else ()
        if thread is None or not news:
            news = tuple(m for m in prompt.messages if not isinstance(m, SystemMessage))
            thread_id = await self._start_thread(server, prompt)
        else:
            thread_id = thread.thread_id
        server.changes.clear()
        request_id = server.post_request(
            "turn/start",
            {"threadId": thread_id, "input": [{"type": "text", "text": as_text(news)}]},
        )
        own = {"method": "turn/start", "params": {"threadId": thread_id}}
        first = deque([own, *server.early])
        server.early.clear()
        return _Turn(server, thread_id, request_id, first)

    async def _greet(self, server: _Server) -> None:
        version = importlib.metadata.version("agentsse")
        client = {"name": "agentsse", "title": "agentsse", "version": version}
        await server.request("initialize", {"clientInfo": client})
        server.post({"method": "initialized"})
        server.is_greeted = True

    async def _start_thread(self, server: _Server, prompt: Prompt) -> str:
        result = await server.request("thread/start", self._thread_params(prompt))
        if thread_id := _text(_object(result, "thread"), "id"):
            return thread_id
        raise ProviderError(
            f"{self.provider.name}: expected thread/start to answer with the id of a thread, got "
            f"{redact(_shown(result))[:MAX_QUOTED]}; is it a version that this client knows?",
            code="malformed",
        )

    def _thread_params(self, prompt: Prompt) -> _Json:
        system = [m.text for m in prompt.messages if isinstance(m, SystemMessage)]
        cwd = self.provider.cwd
        params = {
            "model": prompt.model,
            "cwd": cwd and str(Path(cwd).absolute()),
            "developerInstructions": "\n\n".join(system),
        }
        return {key: value for key, value in params.items() if value} | dict(self.provider.options)

    async def _leave(self, server: _Server, turn: _Turn | None, prompt: Prompt) -> None:
        """Bring a turn to its end, and the process too, if it is of no more use; shielded."""
        server.withdraw_all()
        if turn is not None and not turn.is_over:
            await turn.interrupt()
        if turn is not None and turn.is_complete:
            server.thread = _Thread(turn.thread_id, prompt)
        if turn is None or not turn.is_over or server.failure is not None:
            self.stop()
            await server.gone.wait()
