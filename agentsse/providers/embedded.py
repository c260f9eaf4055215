"""Tool calls that stand in the text: for models that were not taught to call tools any other way.

Knows: two notations, and how a prompt explains the first of them. Must never know whose model it
is, what a tool does, or how its words came here: any provider can be wrapped.

    [[TOOL_CALL]]{"name": "look", "arguments": {"at": "sky"}}[[/TOOL_CALL]]
    <tool_code>{"look": {"at": "sky"}}</tool_code>

Theory of operation. Whether a marker opens a call is a question about the text alone, not about how
it was cut: a call is a marker, one JSON object of the right shape, and its closing marker. What
looks like a marker within a string of that object is text of the string. Whatever is no call stays
text as it stood, and what comes right behind its opening marker is looked at anew. So the answer
about text that has not ended is yes, no, or wait; and only what has to wait is held back.

To look costs as much as there is to read, so looks are counted, and by the text alone: a call has
an end before its closing markers are too many, and a text with too many broken calls has no others.

A model that quotes a call makes one: the notation has no other way to say it.
"""

import json
import re
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import groupby
from typing import Any, Final, Never, assert_never

import attrs

from agentsse.events import (
    AnyEvent,
    FinishReason,
    PartDelta,
    PartFinished,
    PartStarted,
    well_formed,
)
from agentsse.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)

from . import (
    Caller,
    Connection,
    Finish,
    Normalizer,
    Produced,
    Prompt,
    Provider,
    decode_foreign,
    encode_raw,
    name_of,
)

MAX_BODY: Final = 1024 * 1024  # characters of a call; a whole file may be an argument

MAX_BROKEN: Final = 64  # objects behind a marker that are no call, in a text part; the rest is text
MAX_CLOSINGS: Final = 64  # closing markers of a call, those in its strings too

# Finding ------------------------------------------------------------------------------------------

_OPENINGS = ("[[tool_call]]", "<tool_code>")
_LONGEST = len("[[/TOOL_CALL]]")  # of the markers
_FLAGS = re.IGNORECASE | re.ASCII
_OPEN = re.compile(r"\[\[TOOL_CALL\]\]|<tool_code>", _FLAGS)
_CLOSE = re.compile(r"\[\[/TOOL_CALL\]\]|</tool_code>", _FLAGS)
_CLOSE_OF = {
    "[": re.compile(r"\s*\[\[/TOOL_CALL\]\]", _FLAGS),
    "<": re.compile(r"\s*</tool_code>", _FLAGS),
}
_HEAD = re.compile(r"\s*(\{|\Z)?", _FLAGS)  # an object, nothing as yet, or something else
_INK = re.compile(r"\S", _FLAGS)
_ARGUMENTS = ("arguments", "args", "input", "parameters")


def _refuse(word: str) -> Never:
    raise ValueError(f"expected JSON, got {word}")


_JSON = json.JSONDecoder(parse_constant=_refuse)  # it can read an object that has text behind it


@attrs.frozen
class _Call:
    name: str
    arguments: str
    call_id: str = ""


@attrs.frozen
class _Calls:
    """These calls stand there, and end there."""

    calls: list[_Call]
    end: int


@attrs.frozen
class _Text:
    """No call begins there; look for the next one behind this place."""

    end: int
    is_broken: bool = False  # an object was read for nothing


@attrs.frozen
class _Wait:
    """It may be one; before this has come, another look is of no use."""

    need: re.Pattern[str]


@attrs.define(eq=False)
class _Scanner:
    """Tells text from calls in one text part."""

    bound: int
    _held: list[str] = attrs.field(factory=list)
    _size: int = 0  # characters held
    _need: re.Pattern[str] | None = None
    _broken: int = 0
    _tail: str = ""  # the last of what is held: what is needed may come in two pieces

    def feed(self, delta: str) -> list[str | _Call]:
        """Take more text; return what is certain, in order."""
        if self._broken >= MAX_BROKEN:
            return [delta]
        self._held.append(delta)
        self._size += len(delta)
        seen = self._tail + delta
        if self._need is not None and self._size <= self.bound and not self._need.search(seen):
            self._tail = seen[1 - _LONGEST :]
            return []
        return self._scan(is_final=False)

    def close(self) -> list[str | _Call]:
        """Take note of the end; return what was held."""
        return self._scan(is_final=True)

    def _scan(self, *, is_final: bool) -> list[str | _Call]:
        text = "".join(self._held)
        closings = [found.end() for found in _CLOSE.finditer(text)]
        certain: list[str | _Call] = []
        shown = at = 0
        until: int | None = None
        self._need = None
        while (
            until is None
            and self._broken < MAX_BROKEN
            and (opening := _OPEN.search(text, at)) is not None
        ):
            match _read(text, opening, closings, bound=self.bound, is_final=is_final):
                case _Text(end, is_broken):
                    at = end
                    self._broken += is_broken
                case _Calls(calls, end):
                    certain += [text[shown : opening.start()], *calls]
                    shown = at = end
                case _Wait(need):
                    self._need, until = need, opening.start()
                case other:
                    assert_never(other)
        if until is None:
            is_decided = is_final or self._broken >= MAX_BROKEN
            until = len(text) if is_decided else _begun(text, at)
        certain.append(text[shown:until])
        held = text[until:]
        self._held, self._size = [held], len(held)
        self._tail = held[1 - _LONGEST :] if self._need is _CLOSE else ""
        return [piece for piece in certain if piece]


def _read(
    text: str, opening: re.Match[str], closings: Sequence[int], *, bound: int, is_final: bool
) -> _Calls | _Text | _Wait:
    """Say whether a call begins at this marker; `closings` is where all closing ones end."""
    begin = opening.end()
    bound += begin
    head = _HEAD.match(text, begin)
    assert head is not None  # it matches anything
    if head[1] is None:
        return _Text(begin)
    if head[1] and len(closings) >= (most := bisect_right(closings, begin) + MAX_CLOSINGS):
        bound = min(bound, closings[most - 1])
    # What is not known yet will not be known behind the bound. Then all up to there is text: to
    # look at it again for each marker in it would take its length squared.
    undecided: _Text | _Wait
    if len(text) >= bound:
        undecided = _Text(bound, is_broken=bool(head[1]))
    else:
        undecided = (
            _Text(begin, is_broken=bool(head[1]))
            if is_final
            else _Wait(_CLOSE if head[1] else _INK)
        )
    known = bisect_right(closings, bound)
    last = closings[known - 1] if known else 0
    if last <= begin:
        return undecided
    try:
        value, end = _JSON.raw_decode(text, head.end() - 1)
    except json.JSONDecodeError as error:
        # The end of the text is an error too; but none that stands before a whole marker is.
        is_cut = error.pos >= last or error.msg.startswith("Unterminated string")
        return undecided if is_cut else _Text(begin, is_broken=True)
    except (ValueError, RecursionError):  # NaN, a number without end, brackets without end
        return _Text(begin, is_broken=True)
    closing = _CLOSE_OF[text[opening.start()]].match(text, end)
    if closing is None or closing.end() > bound:
        return undecided if last <= end else _Text(begin, is_broken=True)
    calls = _calls(value, is_code=text[opening.start()] == "<")
    return _Calls(calls, closing.end()) if calls else _Text(begin, is_broken=True)


def _begun(text: str, at: int) -> int:
    """Where, behind `at`, the end of a text may be the beginning of a marker; its length if not."""
    for start in range(max(at, len(text) - _LONGEST), len(text)):
        if text[start] in "[<" and any(o.startswith(text[start:].lower()) for o in _OPENINGS):
            return start
    return len(text)


def _calls(value: dict[str, Any], *, is_code: bool) -> list[_Call]:
    """The calls that an object stands for; none where it has another shape."""
    name = value.get("name")
    if isinstance(name, str) and name:
        given: Any = next((value[key] for key in _ARGUMENTS if value.get(key) is not None), {})
        # Who knows the APIs' own notation writes the arguments as a string of JSON.
        arguments = decode_foreign(given or "{}") if isinstance(given, str) else given
        if not isinstance(arguments, dict):
            return []
        return [_Call(well_formed(name), _json(arguments), name_of(value.get("id")))]
    if is_code and all(key and isinstance(item, dict) for key, item in value.items()):
        return [_Call(well_formed(key), _json(item)) for key, item in value.items()]
    return []


def _json(value: Any) -> str:
    return bytes(encode_raw(value)).decode()


# Telling ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Stretch:
    """Text between calls: a part of its own, if there is more to it than white space."""

    started: PartStarted
    bound: int
    is_shown: bool = False
    _pieces: list[str] = attrs.field(factory=list)
    _size: int = 0

    def say(self, text: str) -> list[AnyEvent]:
        """Take more of it; white space waits for what follows it."""
        self._pieces.append(text)
        self._size += len(text)
        if self.is_shown:
            return [PartDelta(part_id=self.started.part_id, kind="text", delta=text)]
        return [] if text.isspace() and self._size <= self.bound else self.show()

    def show(self) -> list[AnyEvent]:
        """Begin the part, with all that waits."""
        self.is_shown = True
        self._pieces = ["".join(self._pieces)]
        delta = PartDelta(part_id=self.started.part_id, kind="text", delta=self._pieces[0])
        return [self.started, delta] if delta.delta else [self.started]

    def finish(self) -> list[AnyEvent]:
        """End the part, if it ever began."""
        if not self.is_shown:
            return []
        text = "".join(self._pieces)
        return [PartFinished(part_id=self.started.part_id, kind="text", text=text)]


@attrs.define(eq=False)
class _TextPart:
    stretch: _Stretch
    scanner: _Scanner
    has_calls: bool = False


@attrs.define(eq=False)
class EmbeddedNormalizer:
    """A machine around another one: the calls that stand in its text parts become parts.

    Everything else passes as it is, in order. What the provider wanted back verbatim (`Echo`) does
    not, once a call was found: in it that call would still be text.

    Attributes:
        inner: The machine of the provider; it is fed, and closed, with this one.
        prefix: What new ids begin with, an `e` behind it.
        max_body: Characters behind an opening marker, its closing one included; beyond that it is
            text, and so is all up to there.
    """

    inner: Normalizer
    prefix: str
    max_body: int = attrs.field(default=MAX_BODY, kw_only=True)
    _parts: dict[str, _TextPart] = attrs.field(factory=dict, init=False)
    _call_ids: set[str | None] = attrs.field(factory=set, init=False)
    _made: int = attrs.field(default=0, init=False)
    _has_calls: bool = attrs.field(default=False, init=False)

    @property
    def is_over(self) -> bool:
        """Whether the provider has said that it is done."""
        return self.inner.is_over

    def feed(self, chunk: Any, /) -> Iterator[Produced]:
        """Take one chunk; see `Normalizer`."""
        return self._rewritten(self.inner.feed(chunk))

    def close(self) -> Iterator[Produced]:
        """Take note of the end; see `Normalizer`."""
        return self._rewritten(self.inner.close())

    def _rewritten(self, produced: Iterable[Produced]) -> Iterator[Produced]:
        for one in produced:
            match one:
                case PartStarted(kind="text"):
                    stretch = _Stretch(one, self.max_body)
                    self._parts[one.part_id] = _TextPart(stretch, _Scanner(self.max_body))
                case PartDelta(part_id=part_id) if part_id in self._parts:
                    part = self._parts[part_id]
                    yield from self._told(part, part.scanner.feed(one.delta))
                case PartFinished(part_id=part_id) if part_id in self._parts:
                    yield from self._finished(self._parts.pop(part_id), one)
                case PartStarted(call_id=str()):
                    self._call_ids.add(one.call_id)
                    yield one
                case Finish() if self._has_calls:
                    reason: FinishReason = "tool_calls" if one.reason == "stop" else one.reason
                    yield attrs.evolve(one, reason=reason, echo=None)
                case _:
                    yield one

    def _told(self, part: _TextPart, found: Sequence[str | _Call]) -> Iterator[AnyEvent]:
        for piece in found:
            if isinstance(piece, str):
                yield from part.stretch.say(piece)
            else:
                yield from part.stretch.finish()
                yield from self._called(piece)
                started = PartStarted(part_id=self._made_id(), kind="text")
                part.stretch = _Stretch(started, self.max_body)
                part.has_calls = self._has_calls = True

    def _finished(self, part: _TextPart, finished: PartFinished) -> Iterator[AnyEvent]:
        yield from self._told(part, part.scanner.close())
        if part.has_calls:
            yield from part.stretch.finish()
            return
        if not part.stretch.is_shown:
            yield from part.stretch.show()
        yield finished

    def _called(self, call: _Call) -> list[AnyEvent]:
        part_id = self._made_id()
        known = call_id = call.call_id or f"{part_id}c"
        number = 2
        while call_id in self._call_ids:
            call_id, number = f"{known}-{number}", number + 1
        self._call_ids.add(call_id)
        return [
            PartStarted(part_id=part_id, kind="tool_call", name=call.name, call_id=call_id),
            PartDelta(part_id=part_id, kind="tool_call", delta=call.arguments),
            PartFinished(
                part_id=part_id,
                kind="tool_call",
                text=call.arguments,
                name=call.name,
                call_id=call_id,
            ),
        ]

    def _made_id(self) -> str:
        self._made += 1
        return f"{self.prefix}e{self._made}"


# Teaching -----------------------------------------------------------------------------------------

_LESSON = """\
You can call tools. To call one, write its name and its arguments as JSON between these markers:

[[TOOL_CALL]]{"name": "the tool", "arguments": {"parameter": "value"}}[[/TOOL_CALL]]

Write it outside of code blocks, as often as you need it, then end your turn. Each result comes back
to you as [[TOOL_RESULT]]{"name": "the tool", "output": ...}[[/TOOL_RESULT]], in the order of the
calls, or with "error" in place of "output". Never write a result yourself.

These are the tools, with the JSON Schema of their arguments:
"""


def taught(prompt: Prompt) -> Prompt:
    """Rewrite a prompt for a model that knows no tools: all about them becomes text; pure.

    Returns:
        The same prompt without tools. A system message, behind those that come first, describes
        them, and how they are called. Earlier calls stand in what the model said, and their results
        in what the user said, in that notation; a message that had calls loses its echo.
    """
    messages: list[Message] = []
    for _, several in groupby(prompt.messages, key=lambda m: isinstance(m, ToolMessage)):
        results = []
        for message in several:
            match message:
                case ToolMessage():
                    results.append(_answered(message))
                case AssistantMessage(tool_calls=(_, *_)):
                    said = [message.text] if message.text else []
                    said += [_asked(call) for call in message.tool_calls]
                    messages.append(AssistantMessage("\n".join(said)))
                case AssistantMessage() | SystemMessage() | UserMessage():
                    messages.append(message)
                case _:
                    assert_never(message)
        if results:
            messages.append(UserMessage("\n".join(results)))
    if prompt.tools:
        lesson = SystemMessage(_LESSON + "".join(_described(tool) for tool in prompt.tools))
        is_first = [isinstance(message, SystemMessage) for message in messages]
        messages.insert([*is_first, False].index(False), lesson)
    return attrs.evolve(prompt, messages=tuple(messages), tools=())


def _asked(call: ToolCall) -> str:
    asked = _json({"name": call.name, "arguments": call.decoded()})
    return f"[[TOOL_CALL]]{asked}[[/TOOL_CALL]]"


def _answered(message: ToolMessage) -> str:
    key = "error" if message.is_error else "output"
    answered = _json({"name": message.name, key: decode_foreign(message.content)})
    return f"[[TOOL_RESULT]]{answered}[[/TOOL_RESULT]]"


def _described(tool: ToolSpec) -> str:
    return f"\n{tool.name}: {tool.description}\n{_json(tool.parameters)}\n"


# A provider around another one --------------------------------------------------------------------


@attrs.frozen
class EmbeddedProvider:
    """A provider whose models call tools in their text; the same name, and all else, as `inner`.

    Attributes:
        inner: Who speaks with the models.
        teach: Whether the prompt explains the tools, see `taught`; else they are offered natively,
            and calls in the text are understood beside.
    """

    inner: Provider
    teach: bool = attrs.field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """What stands before the colon of a model."""
        return self.inner.name

    @asynccontextmanager
    async def open(self, caller: Caller, /) -> AsyncIterator["EmbeddedConnection"]:
        """Open what one run needs of the inner provider; see `Provider`."""
        async with self.inner.open(caller) as connection:
            yield EmbeddedConnection(connection, teach=self.teach)


@attrs.frozen
class EmbeddedConnection:
    """A connection of the inner provider, with calls in text; whoever opened that one closes it."""

    inner: Connection
    teach: bool = attrs.field(kw_only=True)

    def stream(self, prompt: Prompt, /) -> AbstractAsyncContextManager[AsyncIterator[Any]]:
        """Open the stream of one model call; see `Connection`."""
        return self.inner.stream(taught(prompt) if self.teach else prompt)

    def normalizer(self, prefix: str, /) -> EmbeddedNormalizer:
        """Make a machine for one model call."""
        return EmbeddedNormalizer(self.inner.normalizer(prefix), prefix)
