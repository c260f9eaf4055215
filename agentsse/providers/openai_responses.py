"""The Responses API of OpenAI, and of the servers that follow the Open Responses specification.

Knows: how a call is written, the items that a response consists of, and the events that tell them.
Must never know connections, runs, logs, or who carries out a call.

A response is a list of items: messages, reasoning, calls of our tools, tools that the provider runs
itself. The stream tells each of them up to five times: piece by piece, then at the end of a text,
of a part, of the item and of the response. All but the pieces are aggregates of the same text, and
any of them may be missing. So every item is remembered, with what was said of it, and an aggregate
adds only what is new; a server that sends nothing but `response.completed` is understood as well.

Which item an event means is told by its id. Some servers give no ids, some give each event another
one, some no index: what is missing is taken from the place in the output, then from the order.

Sources: the API reference of OpenAI, "Streaming events"; openresponses.org.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final, assert_never

import attrs

from agentsse.errors import ProviderError
from agentsse.events import (
    AnyEvent,
    FinishReason,
    PartFinished,
    PartKind,
    ToolSource,
    Usage,
    well_formed,
)
from agentsse.messages import (
    AssistantMessage,
    Echo,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
)

from . import (
    HttpRequest,
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

KIND: Final = "openai_responses"

# What is asked ------------------------------------------------------------------------------------


@attrs.frozen
class OpenAIResponsesApi:
    """The words of the Responses API; nothing is stored at the provider.

    Attributes:
        base_url: What stands before `/responses`.
        key: Sent as a bearer token.
        options: More fields of the body; they replace ours.
    """

    kind: ClassVar[str] = KIND

    base_url: str = "https://api.openai.com/v1"
    key: str | None = attrs.field(default=None, repr=False)
    options: Mapping[str, Any] = attrs.field(factory=dict)

    def request(self, prompt: Prompt, /) -> HttpRequest:
        """Write a model call; the whole conversation goes along."""
        body: dict[str, Any] = {
            "model": prompt.model,
            "stream": True,
            "store": False,
            # Nothing is stored, so the model's reasoning has to come here and go back, sealed.
            "include": ["reasoning.encrypted_content"],
            "input": [item for message in prompt.messages for item in _written(message)],
        }
        told = [message.text for message in prompt.messages if isinstance(message, SystemMessage)]
        if told:
            body["instructions"] = "\n\n".join(told)
        if prompt.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                    "strict": False,  # else the schema must list every property as required
                }
                for tool in prompt.tools
            ]
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        url = f"{self.base_url.rstrip('/')}/responses"
        return HttpRequest(url, headers, body | dict(self.options))

    def normalizer(self, prefix: str, /) -> "OpenAIResponsesNormalizer":
        """Make the machine that reads the answer."""
        return OpenAIResponsesNormalizer(prefix)


def _written(message: Message) -> list[dict[str, Any]]:
    """The input items that a message becomes."""
    match message:
        case SystemMessage():
            return []
        case UserMessage(text=text):
            return [{"type": "message", "role": "user", "content": text}]
        case AssistantMessage(echo=Echo(kind="openai_responses", value=list(items))):
            return items
        case AssistantMessage(text=text, tool_calls=calls):
            said = [{"type": "message", "role": "assistant", "content": text}] if text else []
            asked = [
                {
                    "type": "function_call",
                    "call_id": call.call_id,
                    "name": call.name,
                    "arguments": call.arguments or "{}",
                }
                for call in calls
            ]
            return [*said, *asked]
        case ToolMessage(call_id=call_id, content=content):
            return [{"type": "function_call_output", "call_id": call_id, "output": content}]
        case _:
            assert_never(message)


# What is answered ---------------------------------------------------------------------------------


@attrs.frozen
class _Text:
    """A stream of text: in which items it stands, what it is, and where its events say so."""

    item: str
    kind: PartKind
    index: str = "content_index"
    whole: str = "text"


_TEXTS: Final = {
    "response.output_text": _Text("message", "text"),
    "response.refusal": _Text("message", "refusal", whole="refusal"),
    "response.reasoning_text": _Text("reasoning", "reasoning"),
    "response.reasoning_summary_text": _Text("reasoning", "reasoning", index="summary_index"),
}
# A part as it stands in an item is one of these, by its own type.
_PARTS: Final = {
    "output_text": _TEXTS["response.output_text"],
    "refusal": _TEXTS["response.refusal"],
    "reasoning_text": _TEXTS["response.reasoning_text"],
    "summary_text": _TEXTS["response.reasoning_summary_text"],
}
# They say that something goes on, or begins; what it is comes with other events.
_PINGS: Final = frozenset(
    {
        "keepalive",
        "ping",
        "response.content_part.added",
        "response.created",
        "response.in_progress",
        "response.mcp_list_tools.completed",
        "response.mcp_list_tools.in_progress",
        "response.queued",
        "response.reasoning_summary_part.added",
    }
)
# Older servers cut these names elsewhere.
_TOOL_ARGUMENTS: Final = re.compile(
    r"response\.(mcp_call|code_interpreter_call)[._](?:arguments|code)[._](delta|done)"
)
_TOOL_STATUS: Final = re.compile(
    r"response\.(\w+_call)\.(in_progress|searching|interpreting|generating|completed|failed)"
)
# Calls that a client is to carry out: those of functions are ours, nobody has offered the others.
_NOT_RUN_THERE: Final = frozenset(
    {
        "apply_patch_call",
        "computer_call",
        "custom_tool_call",
        "function_call",
        "local_shell_call",
    }
)
_FAILED: Final = frozenset({"cancelled", "failed", "incomplete"})
_CUT_SHORT: Final[Mapping[str, FinishReason]] = {
    "content_filter": "content_filter",
    "max_output_tokens": "length",
}


@attrs.define(eq=False)
class _Item:
    """An item of the output, as far as it is known.

    Attributes:
        type: The provider's word.
        key: Names it here; its parts in the accumulator begin with it.
        id: Names it there, or a made one.
        index: Its place in the output.
        is_nameless: Whether no event has given its id.
        was_added: Whether `output_item.added` has told of it.
        has_ended: Whether an aggregate has come: pieces without any id belong to another one.
        whole: The item in full.
        parts: The parts of its text, and what aggregates have said they are.
        open: Those of them that are not finished; a set that keeps its order.
        annotations: How many were handed on, by part.
        name, call_id: Of a call.
        call: A call of ours that is complete, as it was told.
        pieces: The arguments of a tool that the provider runs, as they come.
        arguments: The same, as JSON; None while they are not known.
        is_shown, has_failed, is_over: Where such a tool stands.
    """

    type: str
    key: str
    id: str
    index: int
    is_nameless: bool = False
    was_added: bool = False
    has_ended: bool = False
    whole: dict[str, Any] | None = None
    parts: dict[tuple[PartKind, str], str] = attrs.field(factory=dict)
    open: dict[tuple[PartKind, str], None] = attrs.field(factory=dict)
    annotations: dict[str, int] = attrs.field(factory=dict)
    name: str = ""
    call_id: str = ""
    call: PartFinished | None = None
    pieces: list[str] = attrs.field(factory=list)
    arguments: Any = None
    is_shown: bool = False
    has_failed: bool = False
    is_over: bool = False

    @property
    def is_tool(self) -> bool:
        """Whether the provider itself does what the item says."""
        return _is_tool(self.type)

    @property
    def source(self) -> ToolSource:
        """Where such a tool lives."""
        return "mcp" if self.type == "mcp_call" else "provider"


@attrs.define(eq=False)
class OpenAIResponsesNormalizer(SseNormalizer):
    """A machine that reads one streamed response; see `SseNormalizer`.

    Its `Finish` echoes the items that the model needs to see again: messages, calls, and reasoning
    that is sealed. It echoes none where the stream has not brought them in full: then the message
    is written from what was said.
    """

    provider: ClassVar[str] = KIND

    _items: list[_Item] = attrs.field(factory=list, init=False)
    _known: dict[tuple[str, str | int], _Item] = attrs.field(factory=dict, init=False)
    _last: dict[str, _Item] = attrs.field(factory=dict, init=False)

    def take(self, name: str, value: dict[str, Any]) -> Iterator[AnyEvent]:
        """Take one event of the API; see `SseNormalizer`."""
        type_ = text_of(value.get("type"))
        name = type_ or name
        if name == "error" or (value.get("error") and not type_):
            raise _failure(value)
        if name == "response.failed":
            raise upstream_error(KIND, object_of(value.get("response")).get("error"))
        if name in _PINGS:
            return
        if self.said.reason is not None:  # what comes after the end changes nothing
            yield self.unknown(value)
            return
        stem, _, verb = name.rpartition(".")
        if (text := _TEXTS.get(stem)) is not None and verb in ("delta", "done"):
            yield from self._take_text(text, value, is_whole=verb == "done")
            return
        match name:
            case "response.completed" | "response.incomplete":
                yield from self._end(name, object_of(value.get("response")))
            case "response.output_item.added":
                yield from self._begin_item(value)
            case "response.output_item.done":
                yield from self._end_item(value)
            case "response.content_part.done" | "response.reasoning_summary_part.done":
                yield from self._end_part(value)
            case "response.function_call_arguments.delta":
                yield from self._take_arguments(value)
            case "response.function_call_arguments.done":
                yield from self._end_arguments(value)
            case "response.output_text.annotation.added":
                item, where = self._find(value, "message"), _place("content_index", value)
                item.annotations[where] = item.annotations.get(where, 0) + 1
                yield self.unknown(value)
            case _:
                yield from self._take_tool(name, value)

    # Text

    def _take_text(self, text: _Text, value: dict[str, Any], *, is_whole: bool) -> list[AnyEvent]:
        where = _place(text.index, value)
        if is_whole:
            item = self._find(value, text.item, is_whole=True)
            return self._whole(item, text.kind, where, text_of(value.get(text.whole)))
        delta = value.get("delta", value.get("text"))
        if not isinstance(delta, str):
            return [self.unknown(value)]
        item = self._find(value, text.item)
        item.parts.setdefault((text.kind, where), "")
        item.open[text.kind, where] = None
        return self.said.delta(text.kind, delta, item.key + where)

    def _whole(self, item: _Item, kind: PartKind, where: str, text: str) -> list[AnyEvent]:
        """An aggregate of a text: what it has beyond all that was said is still said."""
        item.open.pop((kind, where), None)
        # Taken out, so that it grows in place: a long text may be added to many times.
        text, before = well_formed(text), item.parts.pop((kind, where), "")
        events = self.said.whole(kind, text.removeprefix(before), item.key + where)
        match events:
            case [*_, PartFinished(text=said)]:
                before += said
        item.parts[kind, where] = text or before
        item.has_ended = True
        return events

    def _end_part(self, value: dict[str, Any]) -> Iterator[AnyEvent]:
        part = object_of(value.get("part"))
        text = _PARTS.get(text_of(part.get("type")))
        item = self._find(value, "message" if text is None else text.item, is_whole=True)
        if text is None:
            item.annotations.setdefault(_place("content_index", value), 0)  # not again
            yield self.unknown(value)
        else:
            yield from self._take_part(item, text, _place(text.index, value), part)

    def _take_part(
        self, item: _Item, text: _Text, where: str, part: dict[str, Any]
    ) -> Iterator[AnyEvent]:
        yield from self._whole(item, text.kind, where, text_of(part.get(text.whole)))
        annotations = part.get("annotations")
        if isinstance(annotations, list):
            told = item.annotations.get(where, 0)
            yield from map(self.unknown, annotations[told:])
            item.annotations[where] = max(told, len(annotations))

    def _take_parts(self, item: _Item, index: str, parts: Any) -> Iterator[AnyEvent]:
        """The parts of an item that has come in full."""
        if isinstance(parts, str):  # as it may stand in an input, and some answer so
            parts = [{"type": "output_text", "text": parts}]
        for number_, part in enumerate(parts if isinstance(parts, list) else []):
            where = f".{index}.{number_}"
            text = _PARTS.get(text_of(object_of(part).get("type")))
            if text is not None and text.item == item.type:
                yield from self._take_part(item, text, where, object_of(part))
            elif where not in item.annotations:  # no text of the model's: handed on, once
                item.annotations[where] = 0
                yield self.unknown(part)

    # Calls of our tools

    def _take_arguments(self, value: dict[str, Any]) -> list[AnyEvent]:
        delta = value.get("delta")
        item = self._find(value, "function_call")
        if not isinstance(delta, str) or item.call is not None:
            return [self.unknown(value)]
        return [*self._take_call(item, value), *self.said.call_delta(item.key, delta)]

    def _end_arguments(self, value: dict[str, Any]) -> list[AnyEvent]:
        item = self._find(value, "function_call", is_whole=True)
        item.has_ended = True
        arguments = _arguments(value)
        events = self._take_call(item, value)
        if item.name and arguments:
            events += self._end_call(item, arguments)
        return events  # else its name, or they, come with the item

    def _take_call(
        self, item: _Item, fields: dict[str, Any], arguments: str = ""
    ) -> list[AnyEvent]:
        """What an event, or an item, says of a call that is not complete."""
        if item.call is not None:
            return []
        item.name = item.name or name_of(fields.get("name"))
        item.call_id = item.call_id or name_of(fields.get("call_id"))
        return self.said.start_call(
            item.key, name=item.name, call_id=item.call_id, arguments=arguments
        )

    def _end_call(self, item: _Item, arguments: str = "") -> list[AnyEvent]:
        """A call is complete; the arguments given here count only if no delta came."""
        events = self.said.finish_call(item.key, arguments=arguments)
        match events:
            case [*_, PartFinished() as call]:
                item.call = call
        return events

    # Tools that the provider runs

    def _take_tool(self, name: str, value: dict[str, Any]) -> Iterator[AnyEvent]:
        """An event of such a tool: it is shown when it is run, for then its arguments are known."""
        if found := _TOOL_ARGUMENTS.fullmatch(name):
            item = self._find(value, found[1], is_whole=found[2] == "done")
            piece = value.get("delta", value.get("arguments", value.get("code")))
            if not isinstance(piece, str):
                yield self.unknown(value)
            elif found[2] == "delta":
                item.pieces.append(piece)
            else:
                item.pieces = [piece]
                item.name = item.name or name_of(value.get("name"))
                if item.name or item.source != "mcp":
                    yield from self._show_tool(item)
        elif (found := _TOOL_STATUS.fullmatch(name)) and _is_tool(found[1]):
            if found[2] in ("searching", "interpreting", "generating"):
                yield from self._show_tool(self._find(value, found[1]))
            elif found[2] == "failed":
                self._find(value, found[1]).has_failed = True
        else:
            yield self.unknown(value)

    def _show_tool(self, item: _Item) -> list[AnyEvent]:
        if item.is_shown:
            return []
        item.is_shown = True
        item.name = item.name or item.type.removesuffix("_call")
        text = "".join(item.pieces)
        if item.arguments is None and text:
            item.arguments = {"code": text} if item.source != "mcp" else decode_foreign(text)
        return self.said.tool_started(item.id, item.name, item.arguments)

    def _learn_tool(self, item: _Item, fields: dict[str, Any]) -> None:
        """What an item says of a tool before it has run."""
        item.name = item.name or name_of(fields.get("name"))
        for field in ("arguments", "action", "queries", "code", "revised_prompt"):
            found = fields.get(field)
            if isinstance(found, str) and field == "arguments":
                found = decode_foreign(found) if found else None
            if found:
                is_whole = isinstance(found, dict) or field == "arguments"
                item.arguments = found if is_whole else {field: found}
                return

    def _end_tool(
        self, item: _Item, result: Any, *, is_error: bool, shown: Any = None
    ) -> Iterator[AnyEvent]:
        """Such a tool is done.

        Args:
            item: Which one.
            result: What it says of its result.
            is_error: Whether that is none.
            shown: Its arguments, as told before, if it was shown before.
        """
        was_shown = item.is_shown
        yield from self._show_tool(item)
        if result is None and was_shown and item.arguments != shown:
            result = item.arguments  # what was searched for is told at the end, as often as not
        item.is_over = True
        yield from self.said.tool_finished(
            item.id, item.name, result, is_error=is_error or item.has_failed, source=item.source
        )

    # Items

    def _begin_item(self, value: dict[str, Any]) -> list[AnyEvent]:
        fields = object_of(value.get("item"))
        type_ = name_of(fields.get("type"))
        if not type_:
            return [self.unknown(value)]
        item = self._known.get((type_, name_of(fields.get("id"))))
        if item is None:
            item = self._new(type_, _names(fields), _index(value))
        item.was_added = True
        if item.type == "function_call":
            return self._take_call(item, fields, _arguments(fields))
        if item.is_tool:
            self._learn_tool(item, fields)
        return []

    def _end_item(self, value: dict[str, Any]) -> Iterator[AnyEvent]:
        fields = object_of(value.get("item"))
        type_ = name_of(fields.get("type"))
        if not type_:
            yield self.unknown(value)
            return
        own, index = name_of(fields.get("id")), _index(value)
        item = self._known.get((type_, own)) or self._at(type_, index, is_named=bool(own))
        if item is None:
            item = self._known.get((type_, name_of(fields.get("call_id"))))
        if item is None and (last := self._last.get(type_)) is not None:
            item = last if last.is_nameless and last.whole is None else None
        if item is None:
            item = self._new(type_, _names(fields), index)
        yield from self._take_item(item, fields, value)

    def _take_item(self, item: _Item, fields: dict[str, Any], raw: Any) -> Iterator[AnyEvent]:
        """An item in full, for the first time or again; `raw` is what brought it."""
        is_new = item.whole is None
        item.whole, item.has_ended = fields, True
        match item.type:
            case "message":
                yield from self._take_parts(item, "content_index", fields.get("content"))
            case "reasoning":
                yield from self._take_parts(item, "summary_index", fields.get("summary"))
                yield from self._take_parts(item, "content_index", fields.get("content"))
            case "function_call":
                yield from self._take_call(item, fields)
                yield from self._end_call(item, _arguments(fields))
            case _ if item.is_tool and item.is_over:
                pass
            case _ if item.is_tool:
                shown = item.arguments
                self._learn_tool(item, fields)
                error = fields.get("error")
                is_error = bool(error) or text_of(fields.get("status")) in _FAILED
                result = error or _result(fields)
                if result is None and fields.get("call_id") and not is_error:
                    # An item of its own will bring it.
                    yield from self._show_tool(item)
                else:
                    yield from self._end_tool(item, result, is_error=is_error, shown=shown)
            case _ if is_new:
                yield from self._take_output(item, fields, raw)
            case _:
                pass
        for kind, where in item.open:
            yield from self.said.finish(kind, item.key + where)
        item.open.clear()

    def _take_output(self, item: _Item, fields: dict[str, Any], raw: Any) -> Iterator[AnyEvent]:
        """An item of a type that is none of ours: the output of a tool, or unknown."""
        type_, call_id = item.type.removesuffix("_output"), name_of(fields.get("call_id"))
        tool = self._known.get((type_, call_id))
        if tool is None or not tool.is_tool or tool.is_over:
            yield self.unknown(raw)
            return
        is_error = text_of(fields.get("status")) in _FAILED
        yield from self._end_tool(tool, _result(fields), is_error=is_error, shown=tool.arguments)

    # Which item

    def _find(self, value: dict[str, Any], type_: str, *, is_whole: bool = False) -> _Item:
        """The item of that type that an event means; a new one where it is not known yet."""
        own = text_of(value.get("item_id"))
        if (item := self._known.get((type_, own))) is not None:  # as of nearly every piece
            return item
        names, index = _names(value), _index(value)
        for name in names:
            if (item := self._known.get((type_, name))) is not None:
                return item
        if (item := self._at(type_, index, is_named=bool(names))) is not None:
            return item
        if not names and index is None:
            last = self._last.get(type_)
            if last is not None and (is_whole or not last.has_ended):
                return last
        return self._new(type_, names, index)

    def _at(self, type_: str, index: int | None, *, is_named: bool) -> _Item | None:
        """The item at that place; it may have got another id since it was added."""
        item = None if index is None else self._known.get((type_, index))
        is_it = item is None or not is_named or (item.was_added and item.whole is None)
        return item if is_it else None

    def _new(self, type_: str, names: list[str], index: int | None) -> _Item:
        place = len(self._items)
        item = _Item(
            type_,
            key=str(place),
            id=names[0] if names else f"{self.prefix}t{place + 1}",
            index=place if index is None else index,
            is_nameless=not names,
        )
        self._items.append(item)
        self._last[type_] = item
        for name in names:
            self._known[type_, name] = item
        if index is not None:
            self._known[type_, index] = item
        return item

    def _matched(self, output: list[dict[str, Any]]) -> Iterator[tuple[_Item, dict[str, Any]]]:
        """The items of a full response, each with what is known of it: by name, else by order."""
        matches: list[_Item | None] = []
        taken: set[str] = set()
        for fields in output:
            named = [self._known.get((text_of(fields["type"]), name)) for name in _names(fields)]
            free = [item for item in named if item is not None and item.key not in taken]
            taken |= {item.key for item in free[:1]}
            matches.append(free[0] if free else None)
        left: dict[str, list[_Item]] = {}
        for item in reversed(self._items):
            if item.key not in taken and not item.call_id:  # a call with another id is another one
                left.setdefault(item.type, []).append(item)
        for fields, match in zip(output, matches, strict=True):
            type_ = text_of(fields["type"])
            if match is not None:
                yield match, fields
            elif left.get(type_):
                yield left[type_].pop(), fields
            else:
                yield self._new(type_, _names(fields), None), fields

    # The end

    def _end(self, name: str, response: dict[str, Any]) -> Iterator[AnyEvent]:
        status = response.get("status")
        if status == "failed" or response.get("error"):
            raise upstream_error(KIND, response.get("error"))
        output = response.get("output")
        items = [
            fields
            for fields in (output if isinstance(output, list) else [])
            if isinstance(fields, dict) and name_of(fields.get("type"))
        ]
        for index, (item, fields) in enumerate(list(self._matched(items))):
            item.index = index
            yield from self._take_item(item, fields, fields)
        is_cut = name == "response.incomplete" or status == "incomplete"
        for item in self._items:
            yield from self._end_call(item)
            if item.is_tool and not item.is_over:
                yield from self._end_tool(item, None, is_error=is_cut, shown=item.arguments)
        yield from self.said.finish_all()
        details = object_of(response.get("incomplete_details"))
        self.said.usage = _usage(object_of(response.get("usage")))
        self.said.echo = self._echo()
        cause = text_of(details.get("reason"))
        self.said.reason = _CUT_SHORT.get(cause, "other") if is_cut else "stop"
        self.is_over = True

    def _echo(self) -> Echo | None:
        kept: list[dict[str, Any]] = []
        for item in sorted(self._items, key=lambda item: item.index):
            if item.call is not None:
                if item.whole is None:
                    return None
                # As it was told: its result will come under that id.
                call = {"call_id": item.call.call_id, "name": item.call.name}
                kept.append({**item.whole, **call, "arguments": item.call.text})
            elif item.type == "message" and item.whole is None and item.parts:
                return None
            elif item.type == "message" and item.whole is not None and item.whole.get("content"):
                kept.append(item.whole)
            elif item.type == "reasoning" and (item.whole or {}).get("encrypted_content"):
                kept.append(item.whole or {})
        while kept and kept[-1].get("type") == "reasoning":
            kept.pop()  # the API refuses reasoning that nothing follows
        # There and back: what JSON cannot carry is mended, for it has to be sent.
        return Echo(KIND, decode_foreign(bytes(encode_raw(kept)))) if kept else None


def _is_tool(type_: str) -> bool:
    return type_.endswith("_call") and type_ not in _NOT_RUN_THERE


def _arguments(fields: dict[str, Any]) -> str:
    """The arguments of a call, as text: some servers give an object."""
    found = fields.get("arguments")
    return bytes(encode_raw(found)).decode() if isinstance(found, dict) else text_of(found)


def _names(value: dict[str, Any]) -> list[str]:
    """The ids that an event, or an item, gives for an item."""
    names = (name_of(value.get(field)) for field in ("item_id", "id", "call_id"))
    return [name for name in names if name]


def _index(value: dict[str, Any]) -> int | None:
    index = value.get("output_index")
    return index if type(index) is int else None


def _place(index: str, value: dict[str, Any]) -> str:
    """Where in its item a part stands."""
    found = value.get(index)
    return f".{index}.{found if type(found) is int else 0}"


def _result(fields: dict[str, Any]) -> Any:
    """What an item says that a tool has brought."""
    found = (fields.get(field) for field in ("output", "outputs", "results", "result"))
    return next((value for value in found if value is not None), None)


def _usage(fields: dict[str, Any]) -> Usage:
    given = object_of(fields.get("input_tokens_details"))
    made = object_of(fields.get("output_tokens_details"))
    return Usage(
        input_tokens=number(fields.get("input_tokens")),
        output_tokens=number(fields.get("output_tokens")),
        reasoning_tokens=number(made.get("reasoning_tokens")),
        cache_read_tokens=number(given.get("cached_tokens")),
        cache_write_tokens=number(given.get("cache_write_tokens")),
    )


def _failure(value: dict[str, Any]) -> ProviderError:
    """What an error says: documented flat, but sent as an object of its own, as over HTTP."""
    flat = {key: value[key] for key in ("code", "message", "status") if value.get(key)}
    return upstream_error(KIND, value.get("error") or flat)
