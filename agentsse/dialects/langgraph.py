"""LangGraph Server's protocol, version 1: agents are graphs, their runs go on in threads.

Knows: the routes that LangGraph's clients use for threads, runs and assistants, how LangChain
writes messages, and the events of a stream. Must never know what a run is beyond its events and its
snapshot. Source: LangGraph Server's API reference, and what its own clients do:
`@langchain/langgraph-sdk` 2.0.0 for JavaScript, `langgraph-sdk` 0.4.14 for Python.

A stream begins with `metadata`, shows what happens in the modes that the client wants, and ends
with `end` or `error`. Every frame has an id, so both clients come back by themselves when they are
cut off, to the address in `Location`; that is relative to the base address they were given, for
that is how they read it, and not as RFC 9110 has it. The id says in which modes it was: they do not
say it again.

- An assistant is an agent, its id the agent's name. The graph of a model agent has the nodes
  `model` and `tools`; a function's or a flow's has those of its steps.
- The state is an object: `messages`; the input's fields, where that is an object; what the run has
  set with `run.set_values`; the fields of the result, or another result under `result`. Of the runs
  before it has the messages alone. Those have other ids than in their own runs, and keep them.
- `input.messages` ends with what the person says: the run's input. What stands before it a model is
  told as well. Any other input goes to the agent as it is.
- A run that asks a person is `interrupted`: the response ends with `__interrupt__`. What comes as
  `command.resume` answers it, and so does the next input. The answer's response goes on with the
  same run, under the same id.
- A cancelled run ends its stream with `error`, and has the status `interrupted`. What it had said
  stays in the thread.
- A run without a thread has one of its own, by its own id, for as long as it is kept.
- `wait` and `join` say where their answer can be had again; the Python client goes there if it is
  cut off while it reads it.

What stays out of reach. The present state is the only one: there are no checkpoints, no forks, no
updates of a state, and a `checkpoint` is overlooked. The modes `events`, `debug`, `tasks` and
`checkpoints` are refused, and so is what would be a promise not kept: webhooks, delays,
breakpoints, other strategies for a busy thread than to wait or to be refused. Subgraphs are not
told apart. What a tool prints while it works has no word. `wait` and `join` answer when there is an
answer, without the white space that keeps a line alive before it. And the JavaScript client takes a
stream that ends early, but properly, for complete: so none does.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeAlias, assert_never
from urllib.parse import quote

import attrs
import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from agentsse.errors import AgentsseError, BadRequest, NotFound, NotSupported
from agentsse.events import (
    AgentFinished,
    AnyEvent,
    Custom,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    MessageReceived,
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
    StepStarted,
    ThreadSnapshot,
    ToolFinished,
    ToolStarted,
    Usage,
    ValuesChanged,
    text_of_json,
)
from agentsse.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from agentsse.sse import FieldError, frame_id, parse_position

from . import (
    MAX_HISTORY,
    MAX_MESSAGES,
    SSE,
    AgentCard,
    Cancel,
    CloseThread,
    ConversationReply,
    Dialect,
    Doc,
    Framing,
    ListAgents,
    ListRuns,
    ListThreads,
    OpenThread,
    Place,
    Reply,
    ReplyWithHistory,
    Request,
    Route,
    RunReply,
    Show,
    ShowThread,
    Start,
    Watch,
    problem_reply,
    read_body,
    see_name,
)

MODES: Final = {
    "values": "v",
    "updates": "u",
    "messages-tuple": "t",
    "messages": "m",
    "custom": "c",
}
"""What can be streamed, and how an id says so."""

LETTERS: Final = frozenset(MODES.values())
DEFAULT_MODES: Final = MODES["values"]
ALL_MODES: Final = "ctuv"  # for who does not say: all that says something of its own
COMMENT: Final = b":\n"
"""Without a blank line: the JavaScript client would make an event of that."""

PARTIAL: Final = 128  # a partial message is shown again when it has grown by this part of itself
MAX_LISTED: Final = 1_000
EPOCH: Final = "1970-01-01T00:00:00.000Z"  # nobody knows since when there is an agent

_encode = msgspec.json.encode


def _line(value: Raw) -> bytes:
    """JSON that somebody else may have formatted, in one line."""
    data = bytes(value)
    return msgspec.json.format(data, indent=-1) if b"\n" in data or b"\r" in data else data


def _object(data: bytes | str) -> dict[str, Raw] | None:
    """The fields of an object; None where it is none."""
    try:
        return msgspec.json.decode(data, type=dict[str, Raw])
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None


# Messages, as LangChain writes them ---------------------------------------------------------------


def _human(text: str, id: str | None = None) -> bytes:
    return _encode({"content": text, "type": "human", **_named(id)})


def _tool(content: bytes, call_id: str, name: str, *, is_error: bool, id: str | None) -> bytes:
    return _encode(
        {
            "content": Raw(content),
            "type": "tool",
            "name": name,
            **_named(id),
            "tool_call_id": call_id,
            "status": "error" if is_error else "success",
        }
    )


def _ai(text: str, calls: Iterable[ToolCall], id: str | None = None, **more: Any) -> bytes:
    good, bad = [], []
    for call in calls:
        arguments = call.arguments or "{}"
        if _object(arguments) is not None:
            args = Raw(_line(Raw(arguments.encode())))
            good.append({"name": call.name, "args": args, "id": call.call_id, "type": "tool_call"})
        else:
            bad.append(
                {
                    "name": call.name,
                    "args": call.arguments,
                    "id": call.call_id,
                    "error": "expected a JSON object",
                    "type": "invalid_tool_call",
                }
            )
    message = {"content": text, "additional_kwargs": {}, "response_metadata": {}, "type": "ai"}
    return _encode({**message, **_named(id), **more, "tool_calls": good, "invalid_tool_calls": bad})


def _named(id: str | None) -> dict[str, str]:
    return {} if id is None else {"id": id}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "input_token_details": {
            "cache_read": usage.cache_read_tokens,
            "cache_creation": usage.cache_write_tokens,
        },
        "output_token_details": {"reasoning": usage.reasoning_tokens},
    }


def _written(message: Message) -> bytes:
    """A message of a conversation."""
    match message:
        case UserMessage():
            return _human(message.text)
        case SystemMessage():
            return _encode({"content": message.text, "type": "system"})
        case AssistantMessage():
            return _ai(message.text, message.tool_calls)
        case ToolMessage():
            content = _text_or_json(message.content)
            call_id, name = message.call_id, message.name
            return _tool(content, call_id, name, is_error=message.is_error, id=None)
        case _:
            assert_never(message)


def _earlier(said: Iterable[Message]) -> list[bytes]:
    """What was said before a run, as messages of the state.

    Which runs have made them nobody knows any more. Their ids are made of what they say: the same
    in all later runs, whatever has been forgotten meanwhile, and none that a run would give.
    """
    found, times = [], Counter[str]()
    for message in said:
        data = _written(message)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        times[digest] += 1
        found.append(b'{"id":"said-%b-%d",%b' % (digest.encode(), times[digest], data[1:]))
    return found


def _text_or_json(content: str) -> bytes:
    """What a tool has answered as a JSON string: a string's own text, of anything else its JSON."""
    try:
        return _encode(text_of_json(Raw(content.encode())))
    except BadRequest:  # an error's text stands there as it is
        return _encode(content)


# The graph ----------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Call:
    """A tool call that the model is asking for."""

    call_id: str
    name: str
    index: int
    arguments: str | None = None  # once they are whole
    is_begun: bool = False


@attrs.define(eq=False)
class _Speech:
    """A message of the agent while it is being said.

    Attributes:
        place: Where in the graph, as JSON.
        answers: What the provider's own tools have answered meanwhile.
        grown: Characters of text.
        shown: How many there were when the message was last shown as a whole.
    """

    id: str
    node: str
    place: bytes
    text: list[str] = attrs.field(factory=list)
    reasoning: list[str] = attrs.field(factory=list)
    refusal: list[str] = attrs.field(factory=list)
    calls: list[_Call] = attrs.field(factory=list)
    answers: list[bytes] = attrs.field(factory=list)
    model: str | None = None
    reason: str | None = None
    usage: Usage = attrs.field(factory=Usage)
    grown: int = 0
    shown: int | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.grown or self.calls)

    def call(self, call_id: str, name: str) -> _Call:
        self.calls.append(_Call(call_id, name, len(self.calls)))
        return self.calls[-1]

    def add(self, kind: PartKind, text: str) -> None:
        self.grown += len(text)
        if kind == "reasoning":
            self.reasoning.append(text)
        else:
            self.text.append(text)
        if kind == "refusal":
            self.refusal.append(text)

    @property
    def circumstances(self) -> dict[str, Any]:
        """What is known of how it came about, once it is whole."""
        provider, _, model = (self.model or "").rpartition(":")
        known = {"model_provider": provider, "model_name": model, "finish_reason": self.reason}
        more: dict[str, Any] = {
            "response_metadata": {name: value for name, value in known.items() if value}
        }
        return more if self.usage == Usage() else {**more, "usage_metadata": _usage(self.usage)}

    def message(self) -> bytes:
        kinds = {"reasoning_content": self.reasoning, "refusal": self.refusal}
        more = {name: "".join(pieces) for name, pieces in kinds.items() if pieces}
        calls = (
            ToolCall(call.call_id, call.name, call.arguments)
            for call in self.calls
            if call.arguments is not None
        )
        return _ai("".join(self.text), calls, self.id, additional_kwargs=more, **self.circumstances)


@attrs.frozen
class _Begun:
    """A response begins."""


@attrs.frozen
class _Grown:
    """More of a message."""

    speech: _Speech
    kind: PartKind
    text: str


@attrs.frozen
class _Called:
    """A tool call in a message: its name, or more of its arguments."""

    speech: _Speech
    call: _Call
    more: str | None = None


@attrs.frozen
class _Said:
    """A whole message, of the agent or, without a speech, of a tool."""

    message: bytes
    id: str
    place: bytes
    speech: _Speech | None = None


@attrs.frozen
class _Updated:
    """What a node has brought about, as JSON."""

    node: str
    value: bytes


@attrs.frozen
class _Settled:
    """The state, changed, at the end of a step; `interrupt` is a question, as JSON."""

    interrupt: bytes | None = None


@attrs.frozen
class _Ended:
    """The end of a response; a problem says why it is none to be glad of."""

    status: str
    problem: Problem | None = None


_Piece: TypeAlias = _Begun | _Grown | _Called | _Said | _Updated | _Settled | Custom | _Ended


@attrs.define(eq=False)
class Graph:
    """The pure machine between events and what LangGraph's clients see of a graph.

    Attributes:
        messages: Of the state, each as JSON.
        fields: The rest of the state, as JSON, by name.
    """

    messages: list[bytes] = attrs.field(factory=list)
    fields: dict[str, bytes] = attrs.field(factory=dict)
    run_id: str = ""
    thread_id: str | None = None
    agent: str = ""
    _is_open: bool = False  # a response
    _is_changed: bool = False  # the state, since it was shown
    _messages_made: int = 0
    _steps_begun: int = 0
    _steps: dict[str, StepStarted] = attrs.field(factory=dict)  # that are open
    _speech: _Speech | None = None
    _parts: dict[str, tuple[_Speech, _Call | None]] = attrs.field(factory=dict)
    _calls: set[str] = attrs.field(factory=set)  # that a message has
    _round: list[bytes] = attrs.field(factory=list)  # answers of the tools that are being called
    _heard: list[bytes] = attrs.field(factory=list)  # what the agent has not taken up yet
    _last_text: str = ""
    _has_spoken: bool = False
    _blocked: str | None = None  # what a shield has said; None once something else was said

    def take(self, event: AnyEvent) -> Iterator[_Piece]:
        """What an event comes to; the state is that of each piece as it is handed out."""
        if isinstance(event, RunStarted):
            self.run_id, self.thread_id, self.agent = event.run_id, event.thread_id, event.agent
        if not self._is_open:
            self._is_open = True
            yield _Begun()
        match event:
            case RunStarted():
                self._take_input(event.input)
                yield from self._settle(anyway=True)
            case StepStarted():
                yield from self._begin_step(event)
            case StepFinished():
                yield from self._end_step(event)
            case PartStarted():
                yield from self._begin_part(event)
            case PartDelta():
                yield from self._grow(event)
            case PartFinished():
                yield from self._end_part(event)
            case ToolStarted():
                yield from self._call(event)
            case ToolFinished():
                yield from self._answer(event)
            case AgentFinished(child_run_id=str()):
                yield _Updated(event.agent, _shown(event.report))
            case MessageReceived():
                if event.seq != 2:  # that of a run that was begun by it shows its input
                    self._heard.append(_human(event.text, self._next_id()))
            case ValuesChanged():
                yield from self._change(_line(event.values))
            case Moderation(violation=True):
                self._blocked = event.message or "This request was refused."
            case Custom():
                yield event
            case InputRequested():
                yield from self._ask(event)
            case InputReceived() | InputWithdrawn():
                yield from self._settle(anyway=True)
            case RunFinished():
                yield from self._finish(event)
            case _:
                pass

    def state(self, more: bytes = b"") -> bytes:
        """The state as JSON; `more` are fields with a comma before each."""
        fields = b"".join(b",%b:%b" % (_encode(name), data) for name, data in self.fields.items())
        return b'{"messages":[%b]%b%b}' % (b",".join(self.messages), fields, more)

    # The state

    def _take_input(self, value: Raw) -> None:
        if bytes(value) == b"null":
            return
        self._set(_object(_line(value)) or {})
        self._heard.append(_human(text_of_json(value), self._next_id()))
        self._take_up()

    def _change(self, values: bytes) -> Iterator[_Piece]:
        self._set(_object(values) or {})
        yield _Updated(self._node, values)
        if not self._steps:
            yield from self._settle()

    def _set(self, values: Mapping[str, Raw]) -> None:
        for name, value in values.items():
            if name in ("messages", "__interrupt__"):
                continue
            if bytes(value) == b"null":
                self.fields.pop(name, None)
            else:
                self.fields[name] = bytes(value)
        self._is_changed = True

    def _take_up(self) -> None:
        """Put what the agent was told into the conversation, where it is about to speak."""
        if self._heard:
            self.messages += self._heard
            self._heard, self._is_changed = [], True

    def _settle(self, *, anyway: bool = False) -> Iterator[_Piece]:
        if self._is_changed or anyway:
            self._is_changed = False
            yield _Settled()

    # Places

    @property
    def _node(self) -> str:
        """Where what is no step of its own happens."""
        open_nodes = (s.name for s in reversed(self._steps.values()) if s.kind in ("node", "flow"))
        return next(open_nodes, self.agent)

    def _is_in(self, kind: str) -> bool:
        return any(step.kind == kind for step in self._steps.values())

    def _place(self, node: str) -> bytes:
        return _encode(
            {
                "langgraph_node": node,
                "langgraph_step": self._steps_begun,
                "run_id": self.run_id,
                "thread_id": self.thread_id,
                "graph_id": self.agent,
                "assistant_id": self.agent,
            }
        )

    def _next_id(self) -> str:
        self._messages_made += 1
        return f"{self.run_id}-{self._messages_made}"

    # Steps

    def _begin_step(self, event: StepStarted) -> Iterator[_Piece]:
        if not self._is_in("model"):
            yield from self._end_speech()
        if event.kind == "model":
            self._take_up()
        self._steps[event.step_id] = event
        self._steps_begun += 1

    def _end_step(self, event: StepFinished) -> Iterator[_Piece]:
        speech = self._speech
        if event.kind == "model" and speech is not None:
            speech.model, speech.reason = event.name, event.finish_reason
            speech.usage += event.usage or Usage()
        self._steps.pop(event.step_id, None)
        if not self._is_in("model"):
            yield from self._end_speech()
        match event.kind:
            case "model":
                pass
            case "tool_round":
                yield from self._end_round()
            case "node" | "flow":
                yield _Updated(event.name, _shown(event.result))
            case _:
                assert_never(event.kind)
        yield from self._settle()

    # What is said

    def _begin_speech(self) -> _Speech:
        node = "model" if self._is_in("model") else self._node
        self._take_up()
        return _Speech(self._next_id(), node, self._place(node))

    def _end_speech(self) -> Iterator[_Piece]:
        speech, self._speech = self._speech, None
        if speech is not None:
            yield from self._put(speech)

    def _put(self, speech: _Speech) -> Iterator[_Piece]:
        """Put what was said into the state."""
        if not speech.is_empty:
            self._last_text = "".join(speech.text)
            message = speech.message()
            self.messages += (message, *speech.answers)
            self._is_changed = True
            yield _Said(message, speech.id, speech.place, speech)
            yield _Updated(speech.node, b'{"messages":[%b]}' % message)
            self._round += speech.answers
            yield from self._end_round()

    def _begin_part(self, event: PartStarted) -> Iterator[_Piece]:
        models = sum(step.kind == "model" for step in self._steps.values())
        if models > 1:  # they speak side by side: whose part it is nobody knows
            speech = self._begin_speech()
        else:
            speech = self._speech = self._speech or self._begin_speech()
        call = None
        if event.kind == "tool_call":
            call = speech.call(event.call_id or event.part_id, event.name or "")
            self._calls.add(call.call_id)
            yield _Called(speech, call)
        self._parts[event.part_id] = (speech, call)

    def _grow(self, event: PartDelta) -> Iterator[_Piece]:
        speech, call = self._parts[event.part_id]
        if call is not None:
            call.is_begun = True
            yield _Called(speech, call, event.delta)
        else:
            self._note(event.kind)
            speech.add(event.kind, event.delta)
            yield _Grown(speech, event.kind, event.delta)

    def _note(self, kind: PartKind) -> None:
        if kind != "reasoning":
            self._has_spoken, self._blocked = True, None

    def _end_part(self, event: PartFinished) -> Iterator[_Piece]:
        speech, call = self._parts.pop(event.part_id)
        if call is not None:
            if event.text and not call.is_begun:
                yield _Called(speech, call, event.text)
            call.arguments = event.text
            yield _Grown(speech, "tool_call", "")
        if speech is not self._speech:
            yield from self._put(speech)

    def _say(self, text: str) -> Iterator[_Piece]:
        """Say something in the agent's place."""
        speech = self._begin_speech()
        speech.add("text", text)
        yield _Grown(speech, "text", text)
        yield from self._put(speech)

    # Tools

    def _call(self, event: ToolStarted) -> Iterator[_Piece]:
        """Have a message with the call, where the model has not asked for it in one."""
        if event.call_id in self._calls:
            return
        self._calls.add(event.call_id)
        speech = self._speech or self._begin_speech()
        call = speech.call(event.call_id, event.name)
        yield _Called(speech, call)
        call.arguments = _line(event.arguments).decode()
        yield _Called(speech, call, call.arguments)
        self._speech = speech
        if not self._is_in("model"):
            yield from self._end_speech()
            yield from self._settle()

    def _answer(self, event: ToolFinished) -> Iterator[_Piece]:
        data, own_id = _line(event.result), self._next_id()
        content = data if data.startswith(b'"') else _encode(data.decode())
        message = _tool(content, event.call_id, event.name, is_error=event.is_error, id=own_id)
        yield _Said(message, own_id, self._place("tools"))
        if self._speech is not None and self._is_in("model"):
            self._speech.answers.append(message)
            return
        self.messages.append(message)
        self._is_changed = True
        self._round.append(message)
        if not self._is_in("tool_round"):
            yield from self._end_round()
            yield from self._settle()

    def _end_round(self) -> Iterator[_Piece]:
        if self._round:
            answers, self._round = self._round, []
            yield _Updated("tools", b'{"messages":[%b]}' % b",".join(answers))

    # The end of a response, and of all

    def _ask(self, event: InputRequested) -> Iterator[_Piece]:
        yield from self._end_speech()
        interrupt = interrupt_of(self.run_id, event)
        yield _Updated("__interrupt__", b"[%b]" % interrupt)
        yield _Settled(interrupt)
        self._is_open = self._is_changed = False
        yield _Ended("interrupted")

    def _finish(self, event: RunFinished) -> Iterator[_Piece]:
        yield from self._end_speech()
        problem = event.error
        match event.outcome:
            case "success":
                yield from self._take_result(event.result)
                problem = None
            case "error":
                problem = problem or Problem(code="internal", message="the run has failed")
            case "cancelled" | "interrupted":
                problem = _cut_short(event)
            case _:
                assert_never(event.outcome)
        yield from self._settle()
        yield _Ended(_status_of(event), problem)

    def _take_result(self, result: Raw | UnsetType) -> Iterator[_Piece]:
        if self._blocked is not None:
            yield from self._say(self._blocked)
        if result is UNSET or bytes(result) == b"null":
            return
        data, text = _line(result), text_of_json(result)
        if not self._has_spoken and text:
            yield from self._say(text)
        if (fields := _object(data)) is not None:
            self._set(fields)
            yield _Updated(self.agent, data)
        elif data != _encode(self._last_text):
            self._set({"result": Raw(data)})
            yield _Updated(self.agent, b'{"result":%b}' % data)


def _shown(value: Raw | UnsetType) -> bytes:
    return b"null" if value is UNSET else _line(value)


def _cut_short(event: RunFinished) -> Problem:
    word = "cancelled" if event.outcome == "cancelled" else "interrupted"
    cause = f" ({event.receipt.cause})" if event.receipt.cause else ""
    return Problem(code=word, message=f"the run was {word}{cause}")


def _status_of(end: RunFinished) -> str:
    return _status(end.outcome, end.receipt.cause)


def _status(outcome: str | None, cause: str | None) -> str:
    """How LangGraph calls the way in which a run has ended."""
    if outcome in ("success", "error"):
        return outcome
    return "timeout" if cause in ("deadline", "input_timeout") else "interrupted"


def interrupt_of(run_id: str, request: InputRequested) -> bytes:
    """What a run asks, as JSON; the id says of which run it is."""
    questions = {"questions": request.questions}
    return _encode({"id": f"{run_id}:{request.request_id}", "value": questions})


# Streams ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class LangGraphEncoder:
    """The events of one run in some modes.

    Attributes:
        modes: As ids have them.
    """

    modes: str
    _graph: Graph = attrs.field(factory=Graph)
    _wire: list[tuple[bytes, bytes]] = attrs.field(factory=list)
    _is_over: bool = False  # a response, with this event

    def recall(self, said: Sequence[Message]) -> None:
        """Take what was said in the thread before: the state has it too."""
        self._graph.messages = _earlier(said)

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames.

        Behind the end of a response stands a comment, so that whoever has seen the end may come
        back and be told that there is nothing more: a stream, as it expects one.
        """
        wire, self._wire, self._is_over = self._wire, [], False
        wire = self._wire
        for piece in self._graph.take(event):
            self._write(piece)
        parts = len(wire) + self._is_over
        frames = [
            b"id: %b-%b\nevent: %b\ndata: %b\n\n"
            % (frame_id(event.seq, part, parts).encode(), self.modes.encode(), name, data)
            for part, (name, data) in enumerate(wire, 1)
        ]
        return [*frames, COMMENT] if self._is_over else frames

    def _write(self, piece: _Piece) -> None:
        modes, graph = self.modes, self._graph
        match piece:
            case _Begun():
                told = {"run_id": graph.run_id, "thread_id": graph.thread_id, "attempt": 1}
                self._put(b"metadata", _encode(told))
            case _Grown():
                if "t" in modes and piece.text:
                    self._put(b"messages", _chunk(piece.speech, _grown(piece)))
                if "m" in modes:
                    self._show_partly(piece)
            case _Called():
                if "t" in modes:
                    self._put(b"messages", _chunk(piece.speech, _called(piece)))
            case _Said():
                self._say(piece)
            case _Updated():
                if "u" in modes:
                    self._put(b"updates", b"{%b:%b}" % (_encode(piece.node), piece.value))
            case _Settled():
                if "v" in modes:
                    asked = piece.interrupt
                    more = b"" if asked is None else b',"__interrupt__":[%b]' % asked
                    self._put(b"values", graph.state(more))
            case Custom():
                if "c" in modes:
                    named = b'{"name":%b,"value":%b}' % (_encode(piece.name), _line(piece.value))
                    self._put(b"custom", named)
            case _Ended():
                self._is_over = True
                if piece.problem is None:
                    told = {"run_id": graph.run_id, "status": piece.status}
                    self._put(b"end", _encode(told))
                else:
                    self._put(b"error", _encode(_error(piece.problem)))
            case _:
                assert_never(piece)

    def _put(self, name: bytes, data: bytes) -> None:
        self._wire.append((name, data))

    def _say(self, piece: _Said) -> None:
        if "t" in self.modes:
            if piece.speech is None:
                self._put(b"messages", b"[%b,%b]" % (piece.message, piece.place))
            else:
                last = {**piece.speech.circumstances, "chunk_position": "last"}
                self._put(b"messages", _chunk(piece.speech, last))
        if "m" in self.modes:
            if piece.speech is None or piece.speech.shown is None:
                self._introduce(piece.id, piece.place)
            self._put(b"messages/complete", b"[%b]" % piece.message)

    def _show_partly(self, piece: _Grown) -> None:
        """Show a message as far as it has come; the longer it is, the less often."""
        speech = piece.speech
        if speech.shown is None:
            self._introduce(speech.id, speech.place)
        elif piece.text and speech.grown < speech.shown + speech.shown // PARTIAL:
            return
        speech.shown = speech.grown
        self._put(b"messages/partial", b"[%b]" % speech.message())

    def _introduce(self, id: str, place: bytes) -> None:
        self._put(b"messages/metadata", b'{%b:{"metadata":%b}}' % (_encode(id), place))


def _chunk(speech: _Speech, more: dict[str, Any]) -> bytes:
    chunk = {"content": "", "type": "AIMessageChunk", "id": speech.id, **more}
    return b"[%b,%b]" % (_encode(chunk), speech.place)


def _grown(piece: _Grown) -> dict[str, Any]:
    match piece.kind:
        case "reasoning":
            return {"additional_kwargs": {"reasoning_content": piece.text}}
        case "refusal":
            return {"content": piece.text, "additional_kwargs": {"refusal": piece.text}}
        case _:
            return {"content": piece.text}


def _called(piece: _Called) -> dict[str, Any]:
    call, begins = piece.call, piece.more is None
    chunk = {
        "name": call.name if begins else None,
        "args": piece.more or "",
        "id": call.call_id if begins else None,
        "index": call.index,
        "type": "tool_call_chunk",
    }
    return {"tool_call_chunks": [chunk]}


def _error(problem: Problem) -> dict[str, str]:
    return {"error": problem.code, "message": problem.message}


def make_encoder(options: Hashable) -> LangGraphEncoder:
    """Make the machine; the option is the modes, as ids have them."""
    return LangGraphEncoder(ALL_MODES if options is None else str(options))


def locate(
    _mount: str, run_id: str, thread_id: str | None, options: Hashable = None
) -> Mapping[str, str]:
    """Where a run is, and where to come back to its stream."""
    place = f"/threads/{quote(str(thread_id), safe='')}/runs/{run_id}"
    query = "last_event_id=-1"  # who has no id yet begins at the beginning
    if options is not None:
        query = f"{query}&stream_mode={','.join(_names_of(str(options)))}"
    return {"Content-Location": place, "Location": f"{place}/stream?{query}"}


def _names_of(modes: str) -> list[str]:
    return [name for name, letter in MODES.items() if letter in modes]


# Answers ------------------------------------------------------------------------------------------


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(_encode(value), status)


def refuse(problem: Problem) -> Reply:
    """Answer a request that started nothing.

    What is not supported has the status 422, for the JavaScript client would try again otherwise.
    """
    if problem.code == NotSupported.code:
        problem = msgspec.structs.replace(problem, status=422)
    return problem_reply(problem)


def _status_now(run: RunSnapshot) -> str:
    match run.state:
        case "queued":
            return "pending"
        case "running" | "paused" | "cancelling":
            return "running"
        case "waiting":
            return "interrupted"
        case "finished":
            return _status(run.outcome, run.receipt.cause if run.receipt else None)
        case _:
            assert_never(run.state)


def _metadata(value: Raw | UnsetType) -> Raw:
    return Raw(b"{}") if value is UNSET or bytes(value) == b"null" else value


def _run(run: RunSnapshot) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "thread_id": run.thread_id,
        "assistant_id": run.agent,
        "created_at": run.created,
        "updated_at": run.finished or run.started or run.created,
        "status": _status_now(run),
        "metadata": _metadata(run.metadata),
        "multitask_strategy": "enqueue",
    }


def _present(run: RunSnapshot) -> bytes:
    return _encode(_run(run))


def show_run(run: RunSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    """Answer with a run."""
    return Reply(_present(run))


def show_values(
    run: RunSnapshot, events: Sequence[AnyEvent], said: Sequence[Message], status: int = 200
) -> Reply:
    """Answer with the state that a run has come to, what it asks, and how it has failed.

    A client that is cut off while it reads that comes back to where it can be had again.
    """
    graph, problem = _seen(events, said)
    more = b""
    if interrupts := _interrupts(run):
        more = b',"__interrupt__":[%b]' % b",".join(interrupts)
    if problem is not None:
        more += b',"__error__":%b' % _encode(_error(problem))
    place = locate("", run.id, run.thread_id)["Content-Location"]
    return Reply(graph.state(more), status, headers={"Location": f"{place}/join"})


def show_cancelled(run: RunSnapshot, events: Sequence[AnyEvent], said: Sequence[Message]) -> Reply:
    """Answer when a run should be gone: with what it has come to, if it is."""
    return show_values(run, events, said, 200 if run.state == "finished" else 202)


def show_accepted(_run: RunSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    """Answer before a run is gone."""
    return _json({}, 202)


def _seen(events: Sequence[AnyEvent], said: Sequence[Message]) -> tuple[Graph, Problem | None]:
    """The graph that has seen all these events, and what the last of them has for a problem."""
    graph, problem = Graph(_earlier(said)), None
    for event in events:
        for piece in graph.take(event):
            if isinstance(piece, _Ended):
                problem = piece.problem
    return graph, problem


def _interrupts(run: RunSnapshot | None) -> list[bytes]:
    return [] if run is None else [interrupt_of(run.id, asked) for asked in run.questions]


def _thread(thread: ThreadSnapshot, values: bytes = b"null") -> dict[str, Any]:
    run = thread.run
    updated = thread.last_event_at or thread.created
    interrupts = [Raw(each) for each in _interrupts(run)]
    error = run.error if run is not None else None
    match thread.state:
        case "idle":
            has_failed = run is not None and run.outcome == "error"
            status = "error" if has_failed else "idle"
        case "waiting":
            status = "interrupted"
        case "queued" | "running" | "paused" | "cancelling":
            status = "busy"
        case _:
            assert_never(thread.state)
    return {
        "thread_id": thread.id,
        "created_at": thread.created,
        "updated_at": updated,
        "state_updated_at": updated,
        "metadata": _metadata(thread.metadata),
        "status": status,
        "config": {},
        "values": Raw(values),
        "interrupts": {run.id: interrupts} if run is not None and interrupts else {},
        "error": _error(error) if status == "error" and error is not None else None,
    }


def show_thread(thread: ThreadSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    """Answer with a thread, without its state."""
    return _json(_thread(thread))


def show_whole_thread(
    thread: ThreadSnapshot,
    _run: RunSnapshot | None,
    events: Sequence[AnyEvent],
    said: Sequence[Message],
) -> Reply:
    """Answer with a thread and its state."""
    return _json(_thread(thread, _values(events, said)))


def forget_thread(_thread: ThreadSnapshot, _events: Sequence[AnyEvent]) -> Reply:
    """Answer when a thread is gone."""
    return Reply(b"", 204)


def _values(events: Sequence[AnyEvent], said: Sequence[Message]) -> bytes:
    graph, _ = _seen(events, said)
    return graph.state()


def _state(
    thread: ThreadSnapshot,
    run: RunSnapshot | None,
    events: Sequence[AnyEvent],
    said: Sequence[Message],
) -> dict[str, Any]:
    """A thread's state; its checkpoint is named by the run that has brought it about."""
    if run is None:
        return {
            "values": {},
            "next": [],
            "tasks": [],
            "interrupts": [],
            "checkpoint": None,
            "metadata": {},
            "created_at": thread.created,
            "parent_checkpoint": None,
        }
    interrupts = [Raw(each) for each in _interrupts(run)]
    has_failed = run.outcome == "error" and run.error is not None
    is_over = run.state == "finished"
    task = {
        "id": run.id,
        "name": run.agent,
        "error": run.error.message if has_failed and run.error is not None else None,
        "interrupts": interrupts,
        "checkpoint": None,
        "state": None,
        "result": None,
    }
    return {
        "values": Raw(_values(events, said)),
        "next": [] if is_over else [run.agent],
        "tasks": [] if is_over and not has_failed else [task],
        "interrupts": interrupts,
        "checkpoint": {
            "thread_id": thread.id,
            "checkpoint_ns": "",
            "checkpoint_id": run.id,
            "checkpoint_map": None,
        },
        "metadata": {"run_id": run.id, "thread_id": thread.id, "graph_id": run.agent},
        "created_at": run.finished or run.started or run.created,
        "parent_checkpoint": None,
    }


def show_state(
    thread: ThreadSnapshot,
    run: RunSnapshot | None,
    events: Sequence[AnyEvent],
    said: Sequence[Message],
) -> Reply:
    """Answer with a thread's state."""
    return _json(_state(thread, run, events, said))


def show_history(
    thread: ThreadSnapshot,
    run: RunSnapshot | None,
    events: Sequence[AnyEvent],
    said: Sequence[Message],
) -> Reply:
    """Answer with the states that a thread has had: the present one, if there is one."""
    return _json([] if run is None else [_state(thread, run, events, said)])


def _assistant(card: AgentCard) -> dict[str, Any]:
    return {
        "assistant_id": card.name,
        "graph_id": card.name,
        "name": card.name,
        "description": card.description,
        "config": {},
        "context": {},
        "created_at": EPOCH,
        "updated_at": EPOCH,
        "metadata": {"created_by": "system"},
        "version": 1,
    }


def show_ok(_cards: Sequence[AgentCard]) -> Reply:
    """Answer that the server is there."""
    return _json({"ok": True})


def show_info(_cards: Sequence[AgentCard]) -> Reply:
    """Answer with what the server can do."""
    return _json({"flags": {"assistants": True, "crons": False, "langsmith": False}})


# Requests: runs -----------------------------------------------------------------------------------


class _Command(Struct):
    """What is to happen to a graph that waits, in place of an input.

    Attributes:
        resume: The answer to what is asked: as it is, or by the ids of the interrupts.
        update, goto: Not available.
    """

    resume: Any = UNSET
    update: Any = None
    goto: Any = None


_Nodes: TypeAlias = list[str] | str | None


class _RunBody(Struct, kw_only=True):
    """A run as LangGraph's clients ask for it; what is not named here is overlooked.

    Attributes:
        assistant_id: The agent.
        input: `{"messages": [...]}`, or whatever the agent is made for.
        command: In place of an input, where the thread's run asks something.
        stream_mode: Some of `values`, `updates`, `messages-tuple`, `messages`, `custom`.
        metadata: Yours; it is shown with the run.
        on_disconnect: What leaving the stream means for the run.
        multitask_strategy: Where another run of the thread goes on: wait for it, or be refused.
        if_not_exists: Whether a thread that there is not yet is begun.
        webhook, after_seconds, feedback_keys: Not available.
        interrupt_before, interrupt_after: Not available.
    """

    assistant_id: str
    input: Any = None
    command: _Command | None = None
    stream_mode: str | list[str] | None = None
    metadata: dict[str, Any] | None = None
    on_disconnect: Literal["cancel", "continue"] | None = None
    multitask_strategy: Literal["enqueue", "reject", "interrupt", "rollback"] | None = None
    if_not_exists: Literal["create", "reject"] | None = None
    webhook: str | None = None
    after_seconds: float | None = None
    feedback_keys: list[str] | None = None
    interrupt_before: _Nodes = None
    interrupt_after: _Nodes = None


def decode_run(
    request: Request,
    *,
    delivery: Literal["stream", "wait", "background"],
    reply: RunReply | None = None,
) -> Start:
    """`POST /threads/{thread}/runs`, `.../stream`, `.../wait`, and the same without a thread.

    Raises:
        BadRequest: It makes no sense; the message says what.
        NotSupported: It wants what there is not here.
    """
    body = read_body(request, _RunBody, what="start a run with")
    thread_id = request.parameters.get("thread_id")
    if thread_id is not None:
        see_name(thread_id, "thread_id")
    _know_wishes(body)
    start = Start(
        agent=body.assistant_id,
        input=None,
        delivery=delivery,
        on_disconnect=body.on_disconnect,
        thread_id=thread_id,
        must_exist=thread_id is not None and body.if_not_exists != "create",
        makes_thread=thread_id is None,
        metadata=body.metadata,
        if_busy="reject" if body.multitask_strategy == "reject" else "enqueue",
        options=read_modes(body.stream_mode),
        reply=reply,
    )
    if body.command is not None and body.command.resume is not UNSET:
        return _resume(start, body.command.resume)
    start = msgspec.structs.replace(start, resumes=thread_id is not None)
    if not (isinstance(body.input, dict) and "messages" in body.input):
        return msgspec.structs.replace(start, input=body.input)
    instructions, before, text = read_messages(body.input["messages"])
    said = (*before, UserMessage(text)) if before else None
    return msgspec.structs.replace(start, input=text, said=said, instructions=instructions)


def _know_wishes(body: _RunBody) -> None:
    """Refuse what would be a promise not kept."""
    command = body.command or _Command()
    stays = "a state is what its runs make it"
    wishes = (
        ("command.update", command.update is not None, stays),
        ("command.goto", command.goto, "code decides where an agent goes"),
        ("webhook", body.webhook, "nobody would call it"),
        ("after_seconds", body.after_seconds, "a run starts as soon as it can"),
        ("feedback_keys", body.feedback_keys, "nothing gathers feedback"),
        ("interrupt_before", body.interrupt_before, "a run stops where it asks"),
        ("interrupt_after", body.interrupt_after, "a run stops where it asks"),
        (
            "multitask_strategy",
            body.multitask_strategy in ("interrupt", "rollback"),
            "a run is cancelled by a cancel; use 'enqueue' or 'reject'",
        ),
    )
    for name, is_wanted, why in wishes:
        if is_wanted:
            raise NotSupported(f"{name}: not available here: {why}; leave it out")


_INTERRUPT: Final = re.compile(r"(.+):(q[0-9]+)")


def _resume(start: Start, answer: Any) -> Start:
    """Answer what the thread's run asks: by the ids of its interrupts, or the only one."""
    if start.thread_id is None:
        raise BadRequest("command.resume: expected a thread whose run waits, got a run without one")
    ids = list(answer) if isinstance(answer, dict) else []
    found = [match for match in map(_INTERRUPT.fullmatch, ids) if match]
    if not found or len(found) < len(ids):
        return msgspec.structs.replace(start, answers={"": answer})
    runs = {match[1] for match in found}
    if len(runs) > 1:
        raise BadRequest(
            "command.resume: expected answers for one run, got some for "
            f"{', '.join(sorted(runs))[:200]}"
        )
    answers = {match[2]: answer[match[0]] for match in found}
    return msgspec.structs.replace(start, continues=runs.pop(), answers=answers)


def read_modes(wish: str | Sequence[str] | None) -> str:
    """Read what is to be streamed; returns it as ids have it.

    Raises:
        NotSupported: A mode that there is not here.
    """
    names = [wish] if isinstance(wish, str) else wish or ()
    for name in names:
        if name not in MODES:
            raise NotSupported(
                f"stream_mode: expected some of {', '.join(MODES)}, got {name[:40]!r}, which an "
                "agent here has nothing to say in; leave it out"
            )
    return "".join(sorted({MODES[name] for name in names})) or DEFAULT_MODES


# Requests: messages -------------------------------------------------------------------------------

_ROLES: Final = {
    "human": "human",
    "user": "human",
    "ai": "ai",
    "assistant": "ai",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}


class _ToolCallBody(Struct):
    name: str
    args: dict[str, Any] = {}
    id: str | None = None


class _MessageBody(Struct):
    content: str | Annotated[list[Any], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    role: str | None = None
    type: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[_ToolCallBody], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    status: str | None = None


def read_messages(messages: Any) -> tuple[str | None, tuple[Message, ...], str]:
    """Read messages in any form that LangChain takes.

    Returns:
        What the system says, what was said before, and what the person says last.

    Raises:
        BadRequest: They make no sense; the message says which one.
        NotSupported: They would change what was said.
    """
    several = messages if isinstance(messages, list) else [messages]
    if len(several) > MAX_MESSAGES:
        raise BadRequest(
            f"input.messages: expected at most {MAX_MESSAGES}, got {len(several)}; leave out the "
            "oldest"
        )
    read = [_read_message(f"input.messages[{n}]", message) for n, message in enumerate(several)]
    instructions = [each.text for each in read if isinstance(each, SystemMessage)]
    said = [each for each in read if not isinstance(each, SystemMessage)]
    last = said.pop() if said else None
    if not isinstance(last, UserMessage):
        raise BadRequest(
            "input.messages: expected the last one to be a person's, for it is what the agent is "
            f"given; got {'one of another role' if last else 'none'}"
        )
    return "\n\n".join(instructions) or None, tuple(said), last.text


def _read_message(where: str, message: Any) -> Message:
    match message:
        case str():
            return UserMessage(message)
        case [str(role), content]:
            fields: Any = {"role": role, "content": content}
        case {"lc": 1, "type": "constructor", "id": [*_, str(name)], "kwargs": dict(fields)}:
            fields = {**fields, "type": name}
        case dict():
            fields = message
        case _:
            raise BadRequest(f"{where}: expected a message, got {str(message)[:40]!r}")
    try:
        body = msgspec.convert(fields, _MessageBody)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{where}: expected a message: {error}") from error
    name = body.role or body.type or ""
    kind = _ROLES.get(name.removesuffix("Chunk").removesuffix("Message").lower())
    match kind:
        case "human":
            return UserMessage(_read_content(where, body.content))
        case "system":
            return SystemMessage(_read_content(where, body.content))
        case "ai":
            calls = (
                ToolCall(each.id or "", each.name, _encode(each.args).decode())
                for each in body.tool_calls or ()
            )
            text = _read_content(where, body.content, is_strict=False)
            return AssistantMessage(text, tuple(calls))
        case "tool":
            content = _encode(_read_content(where, body.content)).decode()
            is_error = body.status == "error"
            return ToolMessage(body.tool_call_id or "", body.name or "", content, is_error)
        case _ if name.startswith(("remove", "Remove")):
            raise NotSupported(f"{where}: not available here: what was said stays; leave it out")
        case _:
            raise BadRequest(
                f"{where}: expected one of the roles {', '.join(_ROLES)}, got {name[:40]!r}"
            )


def _read_content(
    where: str, content: str | Sequence[Any] | None, *, is_strict: bool = True
) -> str:
    """The text of a message; of what an agent has said itself the rest may be missing."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for place, block in enumerate(content):
        is_text = isinstance(block, dict) and block.get("type") == "text"  # `match` is slow here
        text = block.get("text") if is_text else block
        if isinstance(text, str):
            texts.append(text)
        elif is_strict:
            raise BadRequest(
                f"{where}.content[{place}]: expected a block of text, got "
                f"{_encode(block).decode()[:40]!r}, which no agent here is given; describe in "
                "words what it holds"
            )
    return "\n".join(texts)


# Requests: what goes on ---------------------------------------------------------------------------

_TRUE: Final = ("1", "true", "True")


def decode_watch(request: Request) -> Watch:
    """`GET /threads/{thread}/runs/{run}/stream`, and the same without a thread.

    Raises:
        BadRequest: The id is none of ours.
        NotSupported: It wants a mode that there is not here.
    """
    run_id, thread_id = request.parameters["run_id"], request.parameters.get("thread_id")
    last = request.headers.get("last-event-id") or request.query.get("last_event_id")
    after, modes = (from_now_on, "") if not last else _read_last_id(last)
    wishes = [each for name, each in request.pairs if name == "stream_mode" and each]
    if wishes:  # it is empty where the Python client wants nothing
        wanted = read_modes([mode for wish in wishes for mode in _listed(wish)])
        if modes not in ("", wanted) and not callable(after) and after[1]:
            after = (after[0] - 1, 0)  # in other modes it has other frames: rather again than never
        modes = wanted
    options = modes or ALL_MODES
    headers = locate("", run_id, thread_id, options)
    is_cancelled = request.query.get("cancel_on_disconnect") in _TRUE
    if thread_id is None:
        headers = {}
    elif is_cancelled:
        headers = {**headers, "Location": f"{headers['Location']}&cancel_on_disconnect=1"}
    return Watch(
        run_id=run_id,
        thread_id=thread_id,
        after=after,
        goes_on=True,
        on_disconnect="cancel" if is_cancelled else None,
        options=options,
        framing=attrs.evolve(FRAMING, headers=headers),
    )


def _listed(wish: str) -> list[str]:
    """Modes as a query has them: with commas, or as a JSON array."""
    try:
        return msgspec.json.decode(wish, type=list[str])
    except msgspec.DecodeError:
        return wish.split(",")


def _read_last_id(last: str) -> tuple[Place | Callable[[Sequence[AnyEvent]], Place], str]:
    """Where to begin, and in which modes the client was reading, if the id says so."""
    if last == "-1":
        return (0, 0), ""
    number, _, modes = last.partition("-")
    with suppress(FieldError):
        place = parse_position(number)
        if "".join(sorted(LETTERS & set(modes))) == modes:
            return place, modes
    raise BadRequest(
        f"Last-Event-ID: expected an id of one of the run's events, or -1, got {last[:40]!r}"
    )


def from_now_on(events: Sequence[AnyEvent]) -> Place:
    """Behind all that has happened; but an end is told to whoever comes after it.

    A question that is still open is one, too.
    """
    asked: dict[str, int] = {}
    for place, event in enumerate(events, 1):
        match event:
            case InputRequested():
                asked[event.request_id] = place
            case InputReceived() | InputWithdrawn():
                asked.pop(event.request_id, None)
            case RunFinished():
                return place - 1, 0
            case _:
                pass
    return (min(asked.values()) - 1 if asked else len(events)), 0


def decode_show(request: Request) -> Show:
    """`GET /threads/{thread}/runs/{run}`."""
    run_id, thread_id = request.parameters["run_id"], request.parameters["thread_id"]
    return Show(run_id=run_id, thread_id=thread_id, reply=show_run)


def decode_join(request: Request) -> Show:
    """`GET /threads/{thread}/runs/{run}/join`."""
    is_cancelled = request.query.get("cancel_on_disconnect") in _TRUE
    return Show(
        run_id=request.parameters["run_id"],
        thread_id=request.parameters["thread_id"],
        waits=True,
        on_disconnect="cancel" if is_cancelled else None,
        reply=ReplyWithHistory(show_values),
    )


def decode_cancel(request: Request) -> Cancel:
    """`POST /threads/{thread}/runs/{run}/cancel`; what is to be forgotten is waited for."""
    action = request.query.get("action", "interrupt")
    if action not in ("interrupt", "rollback"):
        raise BadRequest(f"action: expected 'interrupt' or 'rollback', got {action[:40]!r}")
    waits = request.query.get("wait", "0") in _TRUE
    return Cancel(
        run_id=request.parameters["run_id"],
        thread_id=request.parameters["thread_id"],
        waits=waits or action == "rollback",
        forgets=action == "rollback",
        reply=ReplyWithHistory(show_cancelled) if waits else show_accepted,
    )


def decode_list_runs(request: Request) -> ListRuns:
    """`GET /threads/{thread}/runs`."""
    limit, offset = _number(request, "limit", 10), _number(request, "offset", 0)
    status = request.query.get("status")

    def reply(runs: Sequence[RunSnapshot]) -> Reply:
        rows = [row for row in map(_run, runs) if status in (None, row["status"])]
        return _json(rows[offset : offset + limit])

    return ListRuns(thread_id=request.parameters["thread_id"], limit=MAX_LISTED, reply=reply)


def _number(request: Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise BadRequest(f"{name}: expected a whole number, got {text[:20]!r}")
    return int(text)


# Requests: threads --------------------------------------------------------------------------------


class _ThreadBody(Struct):
    """A thread that is to be there.

    Attributes:
        thread_id: Without it the server makes one up.
        metadata: Yours; it is shown with the thread.
        if_exists: What is to happen where the thread is there already.
        supersteps: Not available.
    """

    thread_id: str | None = None
    metadata: dict[str, Any] | None = None
    if_exists: Literal["raise", "do_nothing"] | None = None
    supersteps: list[Any] | None = None


def decode_open_thread(request: Request) -> OpenThread:
    """`POST /threads`."""
    body = read_body(request, _ThreadBody, what="open a thread with")
    if body.supersteps:
        raise NotSupported("supersteps: not available here: a thread begins empty; leave it out")
    return OpenThread(
        thread_id=body.thread_id,
        metadata=body.metadata,
        is_shared=body.if_exists == "do_nothing",
        lasts=False,
        reply=show_thread,
    )


def decode_show_thread(request: Request, *, reply: ConversationReply) -> ShowThread:
    """`GET /threads/{thread}`, `GET .../state`, and `POST .../history`."""
    return ShowThread(thread_id=request.parameters["thread_id"], conversation_reply=reply)


def decode_close_thread(request: Request) -> CloseThread:
    """`DELETE /threads/{thread}`."""
    return CloseThread(thread_id=request.parameters["thread_id"], reply=forget_thread)


class _ThreadSearch(Struct):
    """Which threads are wanted.

    Attributes:
        metadata: They have these fields.
        ids: They are among these.
    """

    metadata: dict[str, Any] | None = None
    ids: list[str] | None = None
    status: str | None = None
    limit: int = 10
    offset: int = 0
    sort_by: (
        Literal["thread_id", "status", "created_at", "updated_at", "state_updated_at"] | None
    ) = None
    sort_order: Literal["asc", "desc"] | None = None


def decode_search_threads(request: Request) -> ListThreads:
    """`POST /threads/search`."""
    body = read_body(request, _ThreadSearch, what="search threads with")

    def reply(threads: Sequence[ThreadSnapshot]) -> Reply:
        rows = [
            row
            for row in map(_thread, threads)
            if body.status in (None, row["status"])
            and (body.ids is None or row["thread_id"] in body.ids)
            and _has(msgspec.json.decode(row["metadata"]), body.metadata)
        ]
        if (name := body.sort_by) is not None:
            rows.sort(key=lambda row: str(row[name]), reverse=body.sort_order != "asc")
        return _json(rows[body.offset : body.offset + body.limit])

    return ListThreads(reply=reply)


def _has(fields: Any, wanted: Mapping[str, Any] | None) -> bool:
    try:
        return all(
            isinstance(fields, dict) and fields.get(name) == value
            for name, value in (wanted or {}).items()
        )
    except RecursionError:  # nested so deeply that Python cannot tell
        return False


# Requests: assistants -----------------------------------------------------------------------------


class _AssistantSearch(Struct):
    """Which assistants are wanted.

    Attributes:
        metadata: They have these fields.
        graph_id, name: They are called so.
    """

    metadata: dict[str, Any] | None = None
    graph_id: str | None = None
    name: str | None = None
    limit: int = 10
    offset: int = 0


def decode_search_assistants(request: Request) -> ListAgents:
    """`POST /assistants/search`."""
    body = read_body(request, _AssistantSearch, what="search assistants with")

    def reply(cards: Sequence[AgentCard]) -> Reply:
        rows = [
            row
            for row in map(_assistant, cards)
            if body.graph_id in (None, row["graph_id"])
            and body.name in (None, row["name"])
            and _has(row["metadata"], body.metadata)
        ]
        return _json(rows[body.offset : body.offset + body.limit])

    return ListAgents(reply=reply)


def decode_show_assistant(request: Request) -> ListAgents:
    """`GET /assistants/{assistant}`."""
    name = request.parameters["assistant_id"]

    def reply(cards: Sequence[AgentCard]) -> Reply:
        for card in cards:
            if name == card.name:
                return _json(_assistant(card))
        known = ", ".join(card.name for card in cards) or "(none)"
        return _refusal(NotFound(f"expected one of the assistants {known}, got {name[:80]!r}"))

    return ListAgents(reply=reply)


def _refusal(error: AgentsseError) -> Reply:
    return refuse(Problem(code=error.code, message=error.message, status=error.status))


def decode_status(
    _request: Request, *, reply: Callable[[Sequence[AgentCard]], Reply]
) -> ListAgents:
    """`GET /ok` and `GET /info`."""
    return ListAgents(reply=reply)


# The dialect --------------------------------------------------------------------------------------

FRAMING: Final = Framing(
    prelude=COMMENT,
    heartbeat=COMMENT,
    # No farewell: the JavaScript client would take the end of the stream for that of the run.
    ends_at=frozenset({InputRequested}),
)

_stream: Final = partial(decode_run, delivery="stream")
_wait: Final = partial(decode_run, delivery="wait", reply=ReplyWithHistory(show_values))
_leave: Final = partial(decode_run, delivery="background", reply=show_run)

_STREAM: Final[Mapping[int, tuple[Any, ...]]] = {200: (SSE,)}
_LIST: Final[Mapping[int, tuple[Any, ...]]] = {200: (list,)}
_WATCHED: Final[Mapping[str, Any]] = {
    "stream_mode": "Some of the modes, with commas; all but `messages` if unsaid.",
    "cancel_on_disconnect": "`1`: from now on, leaving the stream cancels the run.",
    "last_event_id": "Like Last-Event-ID, where there is none; `-1` for the beginning.",
}
_PAGE: Final[Mapping[str, Any]] = {
    "limit": "How many at most; 10 if unsaid.",
    "offset": "How many of the newest are left out.",
}


def _runs(prefix: str, where: str) -> tuple[Route, ...]:
    """The routes that start a run."""
    return (
        Route(
            "POST",
            f"{prefix}/runs",
            _leave,
            doc=Doc(summary=f"Start a run{where}, and leave it to itself", body=_RunBody),
        ),
        Route(
            "POST",
            f"{prefix}/runs/stream",
            _stream,
            doc=Doc(summary=f"Start a run{where}, and stream it", body=_RunBody, answers=_STREAM),
        ),
        Route(
            "POST",
            f"{prefix}/runs/wait",
            _wait,
            doc=Doc(
                summary=f"Start a run{where}, and wait for the state it ends in", body=_RunBody
            ),
        ),
    )


LANGGRAPH: Final = Dialect(
    name="langgraph",
    mount="/langgraph",
    routes=(
        *_runs("", ""),
        *_runs("/threads/<thread_id>", " in a thread"),
        Route(
            "GET",
            "/runs/<run_id>/stream",
            decode_watch,
            doc=Doc(summary="Stream a run", query=_WATCHED, answers=_STREAM),
        ),
        Route(
            "GET",
            "/threads/<thread_id>/runs",
            decode_list_runs,
            doc=Doc(
                summary="List the runs of a thread",
                query={"status": "Only those with this status.", **_PAGE},
                answers=_LIST,
            ),
        ),
        Route(
            "GET",
            "/threads/<thread_id>/runs/<run_id>",
            decode_show,
            doc=Doc(summary="Show a run of a thread"),
        ),
        Route(
            "GET",
            "/threads/<thread_id>/runs/<run_id>/stream",
            decode_watch,
            doc=Doc(summary="Stream a run of a thread", query=_WATCHED, answers=_STREAM),
        ),
        Route(
            "GET",
            "/threads/<thread_id>/runs/<run_id>/join",
            decode_join,
            doc=Doc(
                summary="Wait for the state that a run ends in",
                query={"cancel_on_disconnect": _WATCHED["cancel_on_disconnect"]},
            ),
        ),
        Route(
            "POST",
            "/threads/<thread_id>/runs/<run_id>/cancel",
            decode_cancel,
            doc=Doc(
                summary="Cancel a run",
                query={
                    "wait": "`1`: answer when it is gone.",
                    "action": "`interrupt`, or `rollback` to keep nothing of it.",
                },
                answers={200: (dict,), 202: (dict,)},
            ),
        ),
        Route(
            "POST",
            "/threads",
            decode_open_thread,
            doc=Doc(summary="Open a thread", body=_ThreadBody),
        ),
        Route(
            "POST",
            "/threads/search",
            decode_search_threads,
            doc=Doc(
                summary="Search the threads, without their states",
                body=_ThreadSearch,
                answers=_LIST,
            ),
        ),
        Route(
            "GET",
            "/threads/<thread_id>",
            partial(decode_show_thread, reply=show_whole_thread),
            doc=Doc(summary="Show a thread"),
        ),
        Route(
            "DELETE",
            "/threads/<thread_id>",
            decode_close_thread,
            doc=Doc(summary="Cancel what goes on in a thread, and forget it", answers={204: ()}),
        ),
        Route(
            "GET",
            "/threads/<thread_id>/state",
            partial(decode_show_thread, reply=show_state),
            doc=Doc(summary="Show the state of a thread"),
        ),
        Route(
            "POST",
            "/threads/<thread_id>/history",
            partial(decode_show_thread, reply=show_history),
            doc=Doc(summary="List the states of a thread: the present one", answers=_LIST),
        ),
        Route(
            "POST",
            "/assistants/search",
            decode_search_assistants,
            doc=Doc(summary="Search the agents", body=_AssistantSearch, answers=_LIST),
        ),
        Route(
            "GET",
            "/assistants/<assistant_id>",
            decode_show_assistant,
            doc=Doc(summary="Show an agent"),
        ),
        Route(
            "GET",
            "/ok",
            partial(decode_status, reply=show_ok),
            doc=Doc(summary="See whether the server is there"),
        ),
        Route(
            "GET",
            "/info",
            partial(decode_status, reply=show_info),
            doc=Doc(summary="See what the server can do"),
        ),
    ),
    encoder=make_encoder,
    present=_present,
    framing=FRAMING,
    on_disconnect="continue",
    locate=locate,
    problem=refuse,
    max_body=MAX_HISTORY,
)
