"""OpenAI's Responses API, and what Open Responses makes of it: an agent stands where a model did.

Knows: the routes below `/responses`, what may stand in their bodies, and the events of a stream.
Must never know what a run is beyond its events and its snapshot. Sources: OpenAI's API reference,
"Responses", as its own clients for Python and JavaScript read it, and the Open Responses
specification of 2026-04-24.

A run is a response: `resp_<run id>`. Every event of a stream has its type as the event's name, and
a `sequence_number` that counts from 0 and depends on nothing but the run, so that a stream that was
cut goes on behind any number (`GET ...?stream=true&starting_after=N`). One of `response.completed`,
`response.incomplete` and `response.failed` ends it, then `[DONE]`. Who leaves a response has
cancelled it, unless it was begun with `background`, or the agent, or the server's settings, have it
go on.

What is different here:

- `model` is the name of an agent, or the `PROVIDER:MODEL` that it runs on. How the model is to
  sample is the agent's to say: `temperature`, `max_output_tokens`, `reasoning`, `include`, `store`
  and all other fields are overlooked. What would be missing in the answer (a format, a call that is
  forced, hosted tools, log probabilities, `prompt`, `conversation`) is refused.
- The agent runs its own tools. Their calls are items of the type `mcp_call`: of all that the
  clients know it is the one that says that a tool of any name was called on the server's side, with
  its result; a `function_call` the client would make itself. Sent back in a later `input` they are
  what the agent has done.
- The client's `tools` (functions) a model agent may call as well. The response is complete with its
  `function_call` items, and the next request brings a `function_call_output` for each.
- A run that asks a person completes the response with the question, as a message. The next request
  with its id as `previous_response_id` and a text as `input` is the answer, and the same run goes
  on in a response of its own, `resp_<run id>.2` and so on. One that sends the conversation instead
  begins another run. Tools that are under way meanwhile are `in_progress` in the first response,
  and whole in the next one.
- There is no event for a response that was cancelled: it is `response.failed`, and the status in it
  is `cancelled`, as it is when the response is looked at later. Without a stream it is an error.
- Any response can be cancelled while it goes on, not only one in the background. Deleting one
  deletes its run, and with it the run's other responses.
- `background` says whether the run goes on without its client, whatever made it so. What else the
  client has asked for (`metadata`, `instructions`, `tools`) is shown wherever the run is known, but
  not in a stream that is opened again, which knows only what has happened.
- Waiting for its turn is a status (`queued`) and no event: a stream is silent until it begins.
- An agent that says nothing, and has a result, has its result as the message.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeAlias, assert_never

import attrs
import msgspec
from msgspec import UNSET, Raw, UnsetType

from agentsse.errors import BadRequest, NotFound
from agentsse.events import (
    NULL,
    AnyEvent,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    Moderation,
    PartDelta,
    PartFinished,
    PartKind,
    PartStarted,
    Problem,
    RunFinished,
    RunSnapshot,
    RunStarted,
    StepFinished,
    ToolFinished,
    ToolStarted,
    Usage,
    decode_json,
    text_of_json,
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
    MAX_HISTORY,
    MAX_MESSAGES,
    SSE,
    Cancel,
    Dialect,
    Doc,
    Place,
    Reply,
    Request,
    Route,
    Show,
    Start,
    Watch,
    read_body,
)
from .openai import (
    DONE,
    FRAMING,
    Content,
    Course,
    asked,
    encode,
    failed,
    failed_run,
    know_wishes,
    locate,
    no_model,
    present,
    seconds,
    spec_of,
    text_of,
)

MAX_DIGITS: Final = 15  # of a number in a request: JavaScript counts no further

_ID: Final = re.compile(r"resp_(.+?)(?:\.([1-9][0-9]{0,8}))?", re.DOTALL)

Status: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
Incomplete: TypeAlias = Literal["max_output_tokens", "content_filter"]


# Responses and their items ------------------------------------------------------------------------


def response_id(run_id: str, number: int = 1) -> str:
    """The id of the n-th response of a run; the first one has no number where that is clear."""
    text = f"resp_{run_id}"
    match = _ID.fullmatch(text)
    return text if number == 1 and match and not match[2] else f"{text}.{number}"


def read_response_id(text: str) -> tuple[str, int]:
    """The run, and which of its responses, counted from 1; raises `NotFound` where it is no id."""
    match = _ID.fullmatch(text)
    if match is None:
        raise NotFound(f"expected the id of a response, such as resp_123, got {text[:80]!r}")
    return match[1], int(match[2] or 1)


class _Echo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a response repeats of the request that it answers."""

    instructions: str | None = None
    metadata: dict[str, str] = {}
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none"] = "auto"


@attrs.frozen
class _Form:
    """How a kind of part is written.

    Attributes:
        prefix: Of its item's id.
        event: What the types of its events begin with.
        field: What its text is called, in the last of them and in the item.
        part: What else there is to its content; None where the item itself has the text.
        more: What else there is to its events.
    """

    prefix: str
    event: str
    field: str
    part: Mapping[str, Any] | None
    more: Mapping[str, Any] = {}


_FORMS: Final[Mapping[PartKind, _Form]] = {
    "text": _Form(
        "msg",
        "response.output_text",
        "text",
        {"type": "output_text", "annotations": [], "logprobs": []},
        {"logprobs": []},
    ),
    "refusal": _Form("msg", "response.refusal", "refusal", {"type": "refusal"}),
    "reasoning": _Form("rs", "response.reasoning_text", "text", {"type": "reasoning_text"}),
    "tool_call": _Form("fc", "response.function_call_arguments", "arguments", None),
}


@attrs.define(eq=False)
class _Item:
    """An item of the output that is made of a part, while it is open.

    Attributes:
        said: Its text so far, in pieces.
        head: Of its deltas' frames; whoever writes them has made it.
    """

    kind: PartKind
    id: str
    index: int
    name: str = ""
    call_id: str = ""
    said: list[str] = attrs.field(factory=list)
    head: bytes = b""

    @property
    def form(self) -> _Form:
        """How it is written."""
        return _FORMS[self.kind]

    @property
    def place(self) -> dict[str, Any]:
        """Where in the response it is."""
        place = {"item_id": self.id, "output_index": self.index}
        return place if self.form.part is None else place | {"content_index": 0}

    @property
    def content(self) -> dict[str, Any]:
        """The one part of its content, so far."""
        return {**(self.form.part or {}), self.form.field: "".join(self.said)}

    def shown(self, status: Status, *, is_new: bool = False) -> dict[str, Any]:
        """The item as it stands; a new one has no content yet."""
        head = {"id": self.id, "status": status}
        content = [] if is_new else [self.content]
        match self.kind:
            case "text" | "refusal":
                return head | {"type": "message", "role": "assistant", "content": content}
            case "reasoning":
                return head | {"type": "reasoning", "summary": [], "content": content}
            case "tool_call":
                called = {"type": "function_call", "call_id": self.call_id, "name": self.name}
                return head | called | self.content
            case _:
                assert_never(self.kind)


@attrs.frozen
class _Call:
    """A call of one of the agent's own tools, and its item in the response of that number."""

    item: dict[str, Any]
    index: int
    number: int


@attrs.frozen
class _Delta:
    """More of an item."""

    item: _Item
    text: str


@attrs.frozen
class _Told:
    """An event of the protocol, but for its number."""

    type: str
    fields: dict[str, Any]


# From events to responses -------------------------------------------------------------------------


@attrs.define(eq=False)
class _Responses:
    """The pure machine between a run's events and its responses.

    A run has one response, and one more for each time it asks a person. Each thing that `take`
    gives is one event of the protocol, and in a stream one frame.

    Attributes:
        echo: What the request has asked for.
        number: Of the response that is open, or was the last one to be; 0 before the first.
        is_open: Whether its last event is still to come.
        response: The response as it was last shown.
        problem: Why it came to nothing.
    """

    echo: _Echo = attrs.field(factory=_Echo)
    number: int = 0
    is_open: bool = False
    response: dict[str, Any] = attrs.field(factory=dict)
    problem: Problem | None = None
    _run_id: str = ""
    _agent: str = ""
    _created: str = ""
    _is_background: bool = False
    _client_tools: frozenset[str] = frozenset()
    _items: int = 0  # in all responses: no two have the same id
    _output: list[dict[str, Any]] = attrs.field(factory=list)
    _parts: dict[str, _Item] = attrs.field(factory=dict)
    _split: set[str] = attrs.field(factory=set)  # parts that began in an earlier response
    _calls: dict[str, _Call] = attrs.field(factory=dict)
    _spent: Usage = attrs.field(factory=Usage)
    _course: Course = attrs.field(factory=Course)

    def take(self, event: AnyEvent) -> Sequence[_Told | _Delta]:
        """What an event adds to the responses; most of those that no client knows add nothing."""
        match event:
            case RunStarted():
                self._run_id, self._agent = event.run_id, event.agent
                self._is_background = event.on_disconnect == "continue"
                self._client_tools = frozenset(event.client_tools)
                return self._begin(event.ts)
            case PartDelta():
                return self._say_more(event)
            case PartStarted(kind="tool_call") if event.name in self._client_tools:
                return self._open(event, name=event.name or "", call_id=event.call_id or "")[1]
            case PartFinished():
                return self._finish_part(event)
            case ToolStarted():
                return self._start_call(event)
            case ToolFinished():
                return self._finish_call(event)
            case StepFinished(kind="model"):
                self._course.take(event)
                self._spent += event.usage or Usage()
                return ()
            case Moderation(violation=True):
                self._course.take(event)
                return ()
            case InputRequested():
                return self._ask(event)
            case InputReceived() | InputWithdrawn():
                return self._begin(event.ts)
            case RunFinished():
                return self._finish(event)
            case _:
                return ()

    @property
    def current(self) -> dict[str, Any]:
        """The response as it stands."""
        if not self.is_open:
            return self.response
        response = self._show("in_progress")
        for item in self._parts.values():
            response["output"][item.index] = item.shown("in_progress")
        return response

    # A response

    def _begin(self, ts: str) -> Sequence[_Told]:
        if self.is_open:
            return ()
        self.number += 1
        self.is_open, self.problem = True, None
        self._created, self._output, self._spent = ts, [], Usage()
        self._course.begin()
        self.response = self._show("in_progress")
        shown = {"response": self.response}
        return (_Told("response.created", shown), _Told("response.in_progress", shown))

    def _end(
        self,
        status: Status,
        ts: str,
        usage: Usage,
        *,
        reason: Incomplete | None = None,
        problem: Problem | None = None,
    ) -> _Told:
        self.is_open, self.problem = False, problem
        ended: dict[str, Any] = {"usage": _usage(usage)}
        if status == "completed":
            ended["completed_at"] = seconds(ts)
        if reason is not None:
            ended["incomplete_details"] = {"reason": reason}
        if problem is not None:
            ended["error"] = {"code": problem.code, "message": problem.message}
        self.response = self._show(status) | ended
        name = "failed" if problem is not None else status
        return _Told(f"response.{name}", {"response": self.response})

    def _show(self, status: Status) -> dict[str, Any]:
        """The response, all of its fields; those that nothing here is known of have no value."""
        echo, previous = self.echo, self.echo.previous_response_id
        if self.number > 1:
            previous = response_id(self._run_id, self.number - 1)
        return {
            "id": response_id(self._run_id, self.number),
            "object": "response",
            "created_at": seconds(self._created),
            "completed_at": None,
            "status": status,
            "background": self._is_background,
            "error": None,
            "incomplete_details": None,
            "instructions": echo.instructions,
            "max_output_tokens": None,
            "max_tool_calls": None,
            "model": self._agent,
            "output": list(self._output),
            "parallel_tool_calls": True,
            "previous_response_id": previous,
            "prompt_cache_key": None,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": None,
            "service_tier": "default",
            "store": True,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": echo.tool_choice,
            "tools": echo.tools,
            "top_logprobs": 0,
            "top_p": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": echo.metadata,
        }

    # Parts

    def _say_more(self, event: PartDelta) -> Sequence[_Told | _Delta]:
        if not event.delta:
            return ()
        item = self._parts.get(event.part_id)
        if item is not None:
            item.said.append(event.delta)
            return (_Delta(item, event.delta),)
        if event.kind == "tool_call":  # the agent's own; of the client's the item is open
            return ()
        item, opened = self._open(event)
        item.said.append(event.delta)
        return (*opened, _Delta(item, event.delta))

    def _finish_part(self, event: PartFinished) -> Sequence[_Told | _Delta]:
        told: list[_Told | _Delta] = []
        text = event.text
        item = self._parts.pop(event.part_id, None)
        if event.kind == "tool_call":
            if event.name not in self._client_tools:
                return ()
            text = text or "{}"  # which is what the client reads it as
        elif item is None and (event.part_id in self._split or not text):
            self._split.discard(event.part_id)  # all of it was said before
            return ()
        self._split.discard(event.part_id)
        if item is None:
            item, opened = self._open(event, name=event.name or "", call_id=event.call_id or "")
            del self._parts[event.part_id]
            told += opened
        if not item.said:
            item.said.append(text)
            told.append(_Delta(item, text))
        return (*told, *self._close(item, "completed"))

    def _open(
        self, part: PartStarted | PartDelta | PartFinished, *, name: str = "", call_id: str = ""
    ) -> tuple[_Item, Sequence[_Told]]:
        begun = self._begin(part.ts)
        item = self._add(part.kind, name=name, call_id=call_id or part.part_id)
        self._parts[part.part_id] = item
        return item, (*begun, *self._opened(item))

    def _add(self, kind: PartKind, *, name: str = "", call_id: str = "") -> _Item:
        """An item at the end of the output."""
        if kind != "reasoning":
            self._course.speak()
        item = _Item(kind, self._new_id(_FORMS[kind].prefix), len(self._output), name, call_id)
        self._output.append(item.shown("in_progress", is_new=True))
        return item

    def _opened(self, item: _Item) -> Sequence[_Told]:
        added = {"output_index": item.index, "item": item.shown("in_progress", is_new=True)}
        told = _Told("response.output_item.added", added)
        if item.form.part is None:
            return (told,)
        part = {**item.place, "part": item.content}
        return (told, _Told("response.content_part.added", part))

    def _close(self, item: _Item, status: Status) -> Sequence[_Told]:
        form, text = item.form, "".join(item.said)
        done = self._output[item.index] = item.shown(status)
        told = [_Told(f"{form.event}.done", {**item.place, **form.more, form.field: text})]
        if form.part is not None:
            told.append(_Told("response.content_part.done", {**item.place, "part": item.content}))
        shown = {"output_index": item.index, "item": done}
        return (*told, _Told("response.output_item.done", shown))

    def _close_parts(self, status: Status) -> Sequence[_Told]:
        """Close what is open, but for calls: whoever got half of one would make it."""
        told: list[_Told] = []
        parts, self._parts = self._parts, {}
        for part_id, item in parts.items():
            if item.kind == "tool_call":
                self._output[item.index] = item.shown("in_progress")
            else:
                self._split.add(part_id)
                told += self._close(item, status)
        return told

    def _say(self, kind: PartKind, text: str) -> Sequence[_Told | _Delta]:
        """An item of its own, from its beginning to its end."""
        item = self._add(kind)
        opened = self._opened(item)
        item.said.append(text)
        return (*opened, _Delta(item, text), *self._close(item, "completed"))

    def _new_id(self, prefix: str) -> str:
        self._items += 1
        return f"{prefix}_{self._run_id}-{self._items}"

    # The agent's own tools

    def _start_call(self, event: ToolStarted) -> Sequence[_Told]:
        arguments = bytes(event.arguments).decode()
        begun = self._begin(event.ts)
        return (*begun, *self._open_call(event.call_id, event.name, arguments))

    def _open_call(self, call_id: str, name: str, arguments: str) -> Sequence[_Told]:
        index = len(self._output)
        item = {
            "id": self._new_id("mcp"),
            "type": "mcp_call",
            "status": "in_progress",
            "server_label": self._agent,
            "name": name,
            "arguments": arguments,
            "output": None,
            "error": None,
            "approval_request_id": None,
        }
        self._output.append(item)
        self._calls[call_id] = _Call(item, index, self.number)
        place = {"item_id": item["id"], "output_index": index}
        added = {"output_index": index, "item": item | {"arguments": ""}}
        return (
            _Told("response.output_item.added", added),
            _Told("response.mcp_call.in_progress", place),
            _Told("response.mcp_call_arguments.done", {**place, "arguments": arguments}),
        )

    def _finish_call(self, event: ToolFinished) -> Sequence[_Told]:
        call = self._calls.pop(event.call_id, None)
        told = list(self._begin(event.ts))
        if call is None or call.number != self.number:  # it began before a question
            arguments = "{}" if call is None else call.item["arguments"]
            told += self._open_call(event.call_id, event.name, arguments)
            call = self._calls.pop(event.call_id)
        text = text_of_json(event.result)
        if event.is_error:
            content = [{"type": "text", "text": text}]
            error = {"type": "mcp_tool_execution_error", "content": content}
            done = call.item | {"status": "failed", "error": error}
        else:
            done = call.item | {"status": "completed", "output": text}
        self._output[call.index] = done
        place = {"item_id": done["id"], "output_index": call.index}
        shown = {"output_index": call.index, "item": done}
        return (
            *told,
            _Told(f"response.mcp_call.{done['status']}", place),
            _Told("response.output_item.done", shown),
        )

    # Ends

    def _ask(self, event: InputRequested) -> Sequence[_Told | _Delta]:
        begun = self._begin(event.ts)
        closed = self._close_parts("completed")
        said = self._say("text", asked(event.questions, how="One line for each"))
        return (*begun, *closed, *said, self._end("completed", event.ts, self._spent))

    def _finish(self, event: RunFinished) -> Sequence[_Told | _Delta]:
        begun = self._begin(event.ts)
        closed = self._close_parts("incomplete")
        usage = event.usage if self.number == 1 else self._spent
        if (problem := self._course.problem(event)) is None:
            return (*begun, *closed, *self._succeed(event, usage))
        is_cancelled = event.outcome in ("cancelled", "interrupted")
        status: Status = "cancelled" if is_cancelled else "failed"
        return (*begun, *closed, self._end(status, event.ts, usage, problem=problem))

    def _succeed(self, event: RunFinished, usage: Usage) -> Sequence[_Told | _Delta]:
        cut = self._course.cut
        reason: Incomplete | None = "max_output_tokens" if cut == "length" else cut
        kind, text = self._course.last_words(event) or ("text", "")
        said = self._say(kind, text) if text else ()
        status: Status = "incomplete" if reason else "completed"
        return (*said, self._end(status, event.ts, usage, reason=reason))


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


# Errors -------------------------------------------------------------------------------------------


def refuse(problem: Problem) -> Reply:
    """Answer a request that started nothing; what it looked for in vain is a model or a response.

    Which of the two only the message tells.
    """
    if problem.code == "previous_not_found":
        code, param = "previous_response_not_found", "previous_response_id"
        return failed(msgspec.structs.replace(problem, code=code, status=400), param=param)
    if problem.code == "not_found" and "one of the agents" in problem.message:
        return no_model(problem)
    return failed(problem)


# Streams ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class ResponsesEncoder:
    """The events of one run as those of its responses."""

    _responses: _Responses
    _number: int = 0  # of the next event in its response

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames."""
        frames = [self._write(told) for told in self._responses.take(event)]
        if frames and not self._responses.is_open:
            frames.append(DONE)
            self._number = 0
        return frames

    def _write(self, told: _Told | _Delta) -> bytes:
        number, self._number = self._number, self._number + 1
        match told:
            case _Delta(item, text):
                item.head = item.head or _head(item)
                return b"%b%d}\n\n" % (item.head % encode(text), number)
            case _Told(name, fields):
                data = encode({"type": name, "sequence_number": number, **fields})
                return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
            case _:
                assert_never(told)


def _head(item: _Item) -> bytes:
    """A pattern of an item's deltas, up to their numbers; where the text is to be it says `%b`."""
    name = f"{item.form.event}.delta"
    fields = encode({"type": name, **item.place, **item.form.more}).replace(b"%", b"%%")
    head = b"event: %b\ndata: %b" % (name.encode(), fields.removesuffix(b"}"))
    return head + b',"delta":%b,"sequence_number":'


def make_encoder(options: Hashable) -> ResponsesEncoder:
    """Make the machine; the options are what the request has asked for, as JSON, or None."""
    echo = msgspec.json.decode(options, type=_Echo) if isinstance(options, bytes) else _Echo()
    return ResponsesEncoder(_Responses(echo))


def find_place(number: int, after: int | None, events: Sequence[AnyEvent]) -> Place:
    """Where in a run a response begins, or goes on behind one of its events.

    Args:
        number: Of the response.
        after: The number of the event in it; None for its beginning.
        events: Those of the run so far.

    Raises:
        NotFound: The run has no such response so far.
    """
    responses, seen = _Responses(), 0
    for seq, event in enumerate(events, 1):
        told = len(responses.take(event))
        if responses.number < number or not told:
            continue
        if after is None:
            return (seq - 1, 0)
        if seen + told > after or not responses.is_open:
            return (seq, min(after + 1 - seen, told))
        seen += told
    if responses.number < number:
        raise _no_such_response(number)
    return (len(events), 0)


def _no_such_response(number: int) -> NotFound:
    return NotFound(f"expected a response of the run, got number {number}, which has not begun")


# Answers ------------------------------------------------------------------------------------------


def _stand(number: int, snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> _Responses:
    """A run's n-th response as it stands; raises `NotFound` where it has not begun."""
    responses = _Responses(_echo_of(snapshot.metadata))
    for event in events:
        responses.take(event)
        if responses.number == number and not responses.is_open:
            break
    if responses.number < number:
        if events or number > 1:
            raise _no_such_response(number)
        begin = RunStarted(
            run_id=snapshot.id,
            ts=snapshot.created,
            agent=snapshot.agent,
            input=NULL,
            on_disconnect=snapshot.on_disconnect,
        )
        responses.take(begin)
        responses.is_open = False
        responses.response["status"] = "queued"
    return responses


def _echo_of(metadata: Raw | UnsetType) -> _Echo:
    """What the request has asked for, if it was one of ours that began the run."""
    try:
        return _Echo() if metadata is UNSET else msgspec.json.decode(metadata, type=_Echo)
    except msgspec.ValidationError:
        return _Echo()


def _latest(events: Sequence[AnyEvent]) -> int:
    """The response that a request has begun: the first, or the one behind what was answered."""
    asked: dict[str, int] = {}
    latest = 1
    for event in events:
        if isinstance(event, InputRequested):
            asked[event.request_id] = len(asked) + 2
        elif isinstance(event, InputReceived):
            latest = asked.get(event.request_id, latest)
    return latest


def show(number: int, snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer with a run's n-th response as it stands, whatever became of it."""
    return Reply(encode(_stand(number, snapshot, events).current))


def answer(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer a request that has waited: with the response, or the error that it came to."""
    responses = _stand(_latest(events), snapshot, events)
    if responses.problem is None:
        return Reply(encode(responses.current))
    return failed_run(responses.problem)


def acknowledge(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer a request that does not wait, with the response that it has begun."""
    return show(_latest(events), snapshot, events)


def _deleted(text: str, snapshot: RunSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    is_gone = snapshot.state == "finished"
    body = {"id": text, "object": "response", "deleted": is_gone}
    return Reply(encode(body), 200 if is_gone else 202)


def list_input(number: int, snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer with what a response was told: the run's input, or what was said to its question."""
    response = _stand(number, snapshot, events).current
    if number == 1:
        told = [] if snapshot.input is UNSET else [decode_json(snapshot.input)]
    else:
        asked = [each.request_id for each in events if isinstance(each, InputRequested)]
        request_id = asked[number - 2]
        received = [e for e in events if isinstance(e, InputReceived)]
        answers = [decode_json(e.answers) for e in received if e.request_id == request_id]
        told = [value for values in answers for value in values.values()]
    items = [item for value in told for item in _input_items(value)]
    for place, item in enumerate(items, 1):
        item["id"] = f"{response['id'].replace('resp', 'in', 1)}-{place}"
    return Reply(
        encode(
            {
                "object": "list",
                "data": items,
                "first_id": items[0]["id"] if items else None,
                "last_id": items[-1]["id"] if items else None,
                "has_more": False,
            }
        )
    )


def _input_items(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(_is_output(each) for each in value):
        return [{**each, "status": "completed"} for each in value]
    text = value if isinstance(value, str) else encode(value).decode()
    content = [{"type": "input_text", "text": text}]
    return [{"type": "message", "status": "completed", "role": "user", "content": content}]


def _is_output(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "function_call_output"


# Requests -----------------------------------------------------------------------------------------


_TEXTS: Final = ("input_text", "output_text", "text", "summary_text", "refusal")


class _InputItem(msgspec.Struct):
    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content | None = None
    error: Any = None


class _Tool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Format(msgspec.Struct):
    type: str


class _TextOptions(msgspec.Struct):
    format: _Format | None = None


class _Create(msgspec.Struct, kw_only=True):
    """What is to be answered, and how.

    Attributes:
        model: The name of an agent, or the `PROVIDER:MODEL` that it runs on.
        input: A text, or messages, functions' calls and their outputs.
        instructions: What the agent is told first, instead of its own.
        previous_response_id: The response that this one goes on from, or whose question it answers.
        stream: Whether the answer is a stream of events.
        background: Whether it goes on without the client.
        tools: Functions of the client.
        metadata: Whatever the client wants to find again.
    """

    model: str | None = None
    input: str | Annotated[list[_InputItem], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = False
    background: bool | None = False
    tools: list[_Tool] | None = None
    tool_choice: Any = None
    metadata: dict[str, str] | None = None
    text: _TextOptions | None = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None


def decode_create(request: Request) -> Start:
    """`POST /responses`.

    What the response repeats of the request stands in the run's metadata.

    Raises:
        BadRequest: It makes no sense, or wants what is not there; the message says what.
        NotFound: The response before it has no id of ours.
    """
    body = read_body(request, _Create, what="create a response")
    _know_wishes(body)
    previous = body.previous_response_id
    told = _read_input(body.input, is_all=previous is None)
    tools = body.tools or []
    specs = tuple(_read_tool(place, tool) for place, tool in enumerate(tools))
    instructions = "\n\n".join(text for text in (body.instructions, told.instructions) if text)
    echo = _Echo(
        instructions=body.instructions,
        metadata=body.metadata or {},
        previous_response_id=previous,
        tools=[msgspec.structs.asdict(tool) for tool in tools],
        tool_choice=body.tool_choice or "auto",
    )
    is_plain = echo == _Echo()
    start = Start(
        agent=body.model,
        input=told.input,
        delivery="wait",
        makes_thread=True,
        continues=None if previous is None else read_response_id(previous)[0],
        history=told.history,
        said=told.said,
        tools=() if body.tool_choice == "none" else specs,
        instructions=instructions or None,
        metadata=None if is_plain else msgspec.to_builtins(echo),
        # Who comes back to a thread expects no answer to what was left; what is in the background
        # is expected, and comes one after the other.
        if_busy="enqueue" if body.background else "supersede",
        on_disconnect="continue" if body.background else None,
        options=None if is_plain else encode(echo),
        reply=answer,
    )
    if body.stream:
        return msgspec.structs.replace(start, delivery="stream")
    if body.background:
        return msgspec.structs.replace(start, delivery="background", reply=acknowledge)
    return start


def decode_retrieve(request: Request) -> Watch | Show:
    """`GET /responses/{id}`, streamed or not."""
    run_id, number = read_response_id(request.parameters["response_id"])
    if request.query.get("stream", "").lower() not in ("true", "1"):
        return Show(run_id=run_id, reply=partial(show, number))
    after = request.query.get("starting_after")
    if after is not None and not (after.isascii() and after.isdigit() and len(after) <= MAX_DIGITS):
        raise BadRequest(
            "starting_after: expected the sequence_number of an event, from 0 on, "
            f"got {after[:40]!r}"
        )
    place = partial(find_place, number, None if after is None else int(after))
    return Watch(run_id=run_id, after=place)


def decode_cancel(request: Request) -> Cancel:
    """`POST /responses/{id}/cancel`; one that is over is shown as it is."""
    run_id, number = read_response_id(request.parameters["response_id"])
    return Cancel(run_id=run_id, reply=partial(show, number))


def decode_delete(request: Request) -> Cancel:
    """`DELETE /responses/{id}`; one that goes on is cancelled."""
    text = request.parameters["response_id"]
    return Cancel(run_id=read_response_id(text)[0], forgets=True, reply=partial(_deleted, text))


def decode_list_input(request: Request) -> Show:
    """`GET /responses/{id}/input_items`; there are so few that all come at once."""
    run_id, number = read_response_id(request.parameters["response_id"])
    return Show(run_id=run_id, reply=partial(list_input, number))


def _know_wishes(body: _Create) -> None:
    """Refuse what would be missing in the answer."""
    form = body.text and body.text.format
    choice = body.tool_choice not in (None, "auto", "none")
    whole = "go on from a response by 'previous_response_id', or send what was said as 'input'"
    wishes = [
        ("tool_choice", choice, "which tool is called is the model's to choose, or say 'none'"),
        ("text.format", form and form.type != "text", "the form is the agent's to choose"),
        ("conversation", body.conversation is not None, whole),
        ("prompt", body.prompt is not None, "there are no templates"),
        ("top_logprobs", body.top_logprobs, "there are no log probabilities"),
    ]
    know_wishes(wishes)


def _read_tool(place: int, tool: _Tool) -> ToolSpec:
    if tool.type != "function" or not tool.name:
        raise BadRequest(
            f"tools[{place}]: expected a tool of the type 'function', with a name, got one of the "
            f"type {tool.type[:40]!r}, which nobody here would run; leave it out"
        )
    return spec_of(tool.name, tool.description, tool.parameters)


@attrs.frozen
class _ToldInput:
    """What a request's input is to an agent; see `Start`."""

    input: Any
    instructions: str | None = None
    history: tuple[Message, ...] | None = None
    said: tuple[Message, ...] | None = None


def _read_input(given: str | list[_InputItem], *, is_all: bool) -> _ToldInput:
    """Read the input; it is all that was said, or only what is new."""
    if isinstance(given, str):
        return _ToldInput(given)
    reading = _Reading()
    for place, item in enumerate(given):
        reading.take(f"input[{place}]", item)
    messages = reading.done()
    begin = 0
    while begin < len(messages) and isinstance(messages[begin], SystemMessage):
        begin += 1
    first, rest = messages[:begin], messages[begin:]
    end = len(rest)
    while end and isinstance(rest[end - 1], ToolMessage):
        end -= 1
    outputs = [message for message in rest[end:] if isinstance(message, ToolMessage)]
    last = rest[-1] if rest else None
    if isinstance(last, UserMessage):
        end -= 1
    elif not outputs:
        raise BadRequest(
            "input: expected the last item to be a message of the user's or a function's output, "
            "for it is what the agent is told; got another one"
        )
    if not is_all:
        end = 0
    new = tuple(rest[end:])
    return _ToldInput(
        input=last.text if isinstance(last, UserMessage) else [_shown(each) for each in outputs],
        instructions="\n\n".join(each.text for each in first if isinstance(each, SystemMessage)),
        history=tuple(rest[:end]) if is_all else None,
        said=None if new == (last,) and isinstance(last, UserMessage) else new,
    )


def _shown(output: ToolMessage) -> dict[str, Any]:
    """A function's output as the run's input has it."""
    return {
        "type": "function_call_output",
        "call_id": output.call_id,
        "output": text_of_json(Raw(output.content.encode())),
    }


@attrs.define(eq=False)
class _Reading:
    """Items, one by one, as messages.

    Attributes:
        messages: So far; of the last one the calls are missing.
        calls: Those of the last message, which is an assistant's if there are any.
        names: Of the tools that were called, by call id.
    """

    messages: list[Message] = attrs.field(factory=list)
    calls: list[ToolCall] = attrs.field(factory=list)
    names: dict[str, str] = attrs.field(factory=dict)

    def take(self, where: str, item: _InputItem) -> None:
        """Read one item, and put what it says behind the messages so far."""
        match item.type:
            case None | "message":
                self._add(_read_message(where, item))
            case "function_call":
                call_id = _required(where, "call_id", item.call_id)
                self._call(call_id, _required(where, "name", item.name), item.arguments)
            case "function_call_output":
                call_id = _required(where, "call_id", item.call_id)
                # The call may be in an earlier response, whose tools are not known here.
                name = item.name or self.names.get(call_id, "")
                content = _as_json(_read_text(f"{where}.output", item.output))
                self._add(ToolMessage(call_id, name, content))
            case "mcp_call":
                call_id = _required(where, "id", item.id)
                name = _required(where, "name", item.name)
                self._call(call_id, name, item.arguments)
                if item.error is not None:
                    error = item.error
                    said = error if isinstance(error, str) else encode(error).decode()
                    self._add(ToolMessage(call_id, name, _as_json(said), is_error=True))
                elif item.output is not None:
                    content = _as_json(_read_text(f"{where}.output", item.output))
                    self._add(ToolMessage(call_id, name, content))
            case "reasoning":
                pass  # what a model has thought is nothing to another one, or to itself later
            case "item_reference":
                raise BadRequest(
                    f"{where}: expected an item, got a reference to one, and items are not kept "
                    "here one by one; send the item itself, or 'previous_response_id'"
                )
            case other:
                raise BadRequest(
                    f"{where}: expected an item of the type 'message', 'function_call', "
                    f"'function_call_output', 'mcp_call' or 'reasoning', got {other[:40]!r}; "
                    "leave it out"
                )

    def done(self) -> Sequence[Message]:
        """All of them."""
        self._put_calls()
        return self.messages

    def _add(self, message: Message) -> None:
        self._put_calls()
        self.messages.append(message)

    def _call(self, call_id: str, name: str, arguments: str | None) -> None:
        """Put a call where it was made: beside others of the same turn."""
        if not (self.messages and isinstance(self.messages[-1], AssistantMessage)):
            self.messages.append(AssistantMessage(""))
        self.calls.append(ToolCall(call_id, name, arguments or "{}"))
        self.names[call_id] = name

    def _put_calls(self) -> None:
        last = self.messages[-1] if self.calls else None
        if isinstance(last, AssistantMessage):
            self.messages[-1] = attrs.evolve(last, tool_calls=tuple(self.calls))
            self.calls = []


def _read_message(where: str, item: _InputItem) -> Message:
    text = _read_text(f"{where}.content", item.content)
    match item.role:
        case "system" | "developer":
            return SystemMessage(text)
        case "user":
            return UserMessage(text)
        case "assistant":
            return AssistantMessage(text)
        case None:
            raise BadRequest(f"{where}.role: expected a message to have one, got none")
        case _:
            assert_never(item.role)


def _required(where: str, field: str, value: str | None) -> str:
    if not value:
        raise BadRequest(f"{where}.{field}: expected text, got none")
    return value


def _read_text(where: str, content: Content | None) -> str:
    if content is None:
        raise BadRequest(f"{where}: expected text, or a list of parts, got none")
    return text_of(where, content, _TEXTS, "'input_text' or 'output_text'")


def _as_json(text: str) -> str:
    return encode(text).decode()


_SHOWN: Final[Mapping[str, str]] = {
    "stream": "`true` for a stream of its events.",
    "starting_after": "The `sequence_number` of the event behind which the stream is to begin.",
}

OPENAI_RESPONSES: Final = Dialect(
    name="openai_responses",
    mount="/v1",
    routes=(
        Route(
            "POST",
            "/responses",
            decode_create,
            doc=Doc(
                summary="Have an agent make a response, streamed, waited for, or left to itself.",
                body=_Create,
                answers={200: (dict, SSE)},
            ),
        ),
        Route(
            "GET",
            "/responses/<response_id>",
            decode_retrieve,
            doc=Doc(
                summary="Show a response as it stands, or stream it, from any event on.",
                query=_SHOWN,
                answers={200: (dict, SSE)},
            ),
        ),
        Route(
            "DELETE",
            "/responses/<response_id>",
            decode_delete,
            doc=Doc(summary="Cancel a response if it goes on, and forget its run."),
        ),
        Route(
            "POST",
            "/responses/<response_id>/cancel",
            decode_cancel,
            doc=Doc(summary="Cancel a response, and wait until it is gone."),
        ),
        Route(
            "GET",
            "/responses/<response_id>/input_items",
            decode_list_input,
            doc=Doc(summary="List what a response was told."),
        ),
    ),
    encoder=make_encoder,
    present=present,
    framing=FRAMING,
    on_disconnect="cancel",
    locate=locate,
    problem=refuse,
    max_body=MAX_HISTORY,
)
