"""OpenAI's chat completions: an agent stands where a client expects a model.

Knows: the routes `/chat/completions` and `/models`, what may stand in a body, and the chunks of a
stream. Must never know what a run is beyond its events and its snapshot. Source: OpenAI's API
reference, "Chat completions" and "Models", as its own clients for Python and JavaScript read it.

A stream has frames of data only, without ids: a first chunk with the role, chunks with pieces of
what is said, one with the reason for the end, one with the usage where the client has asked for it,
and `[DONE]`. A run that came to nothing, and a stream that ends before its run, end with an error
object and no `[DONE]`: the client raises it. It raises an error of the connection where a stream is
cut, and there is no way back to it: who leaves has cancelled the run, unless the agent, or the
server's settings, have it go on. Then it can be looked at by the native `/runs/{id}/events`, and
cancelled by `/runs/{id}/cancel`, for which this protocol has no word either. The id stands in the
header `x-request-id`, and in that of the completion, `chatcmpl-<id>`; of a run that has asked a
person the second response is `chatcmpl-<id>-2`.

What is different here:

- `model` is the name of an agent, or the `PROVIDER:MODEL` that it runs on; `/models` lists agents.
- The agent runs its own tools, and they are not shown. Those of the client (`tools`, functions) a
  model agent may call as well, and the client makes the call. Which tool is called, and how many at
  once, is the model's to choose: a `tool_choice` that forces a call is refused, and
  `parallel_tool_calls` is overlooked.
- What no agent here gives (several choices, images, audio, log probabilities, a format, stop
  sequences) is refused. How the model is to sample is the agent's to say: `temperature`,
  `max_tokens`, `max_completion_tokens` and all other fields are overlooked.
- The last message, or the tools' answers at the end, is what the agent is told now; the system's
  messages at the beginning are its instructions; what is between them is what was said before.
- A run that asks a person ends the response with the question as text. Its answer needs a thread:
  with `"metadata": {"thread_id": ...}` in both requests the user's next message is the answer, and
  the response goes on with the run. Without one the run waits on, and a next message begins a new
  run, whose model can read the question in what was said before. In a thread, too, the client's
  messages are all that was said before; a run that nobody watches any more makes room for the next.
- The usage is that of the response, also where a run has several.
- An agent that says nothing, and has a result, has its result as the answer.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeAlias, assert_never

import attrs
import msgspec

from agentsse.errors import BadRequest
from agentsse.events import (
    AnyEvent,
    InputReceived,
    InputRequested,
    Moderation,
    PartDelta,
    PartFinished,
    PartStarted,
    Problem,
    Question,
    RunFinished,
    RunSnapshot,
    RunStarted,
    StepFinished,
    Usage,
    decode_json,
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
    AgentCard,
    Dialect,
    Doc,
    ListAgents,
    Reply,
    Request,
    Route,
    Start,
    read_body,
    see_name,
)
from .openai import (
    DONE,
    FRAMING,
    Content,
    Course,
    asked,
    encode,
    error_of,
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

Field: TypeAlias = Literal["content", "refusal", "reasoning_content"]
Reason: TypeAlias = Literal["stop", "length", "content_filter", "tool_calls"]


# What a response says -----------------------------------------------------------------------------


@attrs.frozen
class _Said:
    """A piece of the message."""

    field: Field
    text: str


@attrs.frozen
class _Called:
    """A call of one of the client's tools begins; in a response they are counted from 0."""

    index: int
    call_id: str
    name: str


@attrs.frozen
class _Arguments:
    """More of a call's arguments."""

    index: int
    text: str


@attrs.frozen
class _Done:
    """The end of the response, with its tokens."""

    reason: Reason
    usage: Usage


_Piece: TypeAlias = _Said | _Called | _Arguments | _Done | Problem
"""A problem is an end as well."""


@attrs.define(eq=False)
class _Turn:
    """The pure machine between events and a response, streamed or not.

    A run that asks a person has several responses; who watches it in this protocol sees them all.
    """

    _course: Course = attrs.field(factory=Course)
    _spent: Usage = attrs.field(factory=Usage)
    _billed: Usage = attrs.field(factory=Usage)  # of it, in earlier responses
    _client_tools: frozenset[str] = frozenset()
    _calls: dict[str, ToolCall] = attrs.field(factory=dict)  # whole ones of the run, by call id
    _called: set[str] = attrs.field(factory=set)  # call ids in this response
    _open: dict[str, int] = attrs.field(factory=dict)  # parts of calls that go on, and their index
    _bare: set[str] = attrs.field(factory=set)  # those of them without arguments yet

    def take(self, event: AnyEvent) -> Sequence[_Piece]:
        """What an event adds to the response; most add nothing."""
        match event:
            case RunStarted():
                self._client_tools = frozenset(event.client_tools)
                return ()
            case PartDelta(kind="text"):
                return (self._say("content", event.delta),)
            case PartDelta(kind="refusal"):
                return (self._say("refusal", event.delta),)
            case PartDelta(kind="reasoning"):
                return (_Said("reasoning_content", event.delta),)
            case PartStarted(kind="tool_call", name=str(name)) if name in self._client_tools:
                begun = self._call(event.call_id or event.part_id, name)
                self._open[event.part_id] = begun.index
                self._bare.add(event.part_id)
                return (begun,)
            case PartDelta(kind="tool_call") if event.delta and event.part_id in self._open:
                self._bare.discard(event.part_id)
                return (_Arguments(self._open[event.part_id], event.delta),)
            case PartFinished(kind="tool_call", name=str(name)) if name in self._client_tools:
                return self._finish_call(event, name)
            case StepFinished(kind="model"):
                self._course.take(event)
                self._spent += event.usage or Usage()
                return ()
            case Moderation(violation=True):
                self._course.take(event)
                return ()
            case InputRequested():
                return self._ask(event.questions)
            case RunFinished():
                return self._finish(event)
            case _:
                return ()

    def _say(self, field: Field, text: str) -> _Said:
        self._course.speak()
        return _Said(field, text)

    def _call(self, call_id: str, name: str) -> _Called:
        index = len(self._called)
        self._called.add(call_id)
        return _Called(index, call_id, name)

    def _finish_call(self, event: PartFinished, name: str) -> Sequence[_Piece]:
        call_id, arguments = event.call_id or event.part_id, event.text or "{}"
        self._calls[call_id] = ToolCall(call_id, name, arguments)
        index = self._open.pop(event.part_id, None)
        if index is None or event.part_id not in self._bare:
            return ()
        self._bare.remove(event.part_id)
        return (_Arguments(index, arguments),)

    def _ask(self, questions: Sequence[Question]) -> Sequence[_Piece]:
        apart = "\n\n" if self._course.has_spoken else ""
        prompt = self._say("content", apart + asked(questions, how="Answer in lines"))
        done = _Done("stop", _less(self._spent, self._billed))
        self._course.begin()
        self._billed = self._spent
        for of_this_response in (self._called, self._open, self._bare):
            of_this_response.clear()
        return (prompt, done)

    def _finish(self, event: RunFinished) -> Sequence[_Piece]:
        if (problem := self._course.problem(event)) is not None:
            return (problem,)
        reason: Reason = self._course.cut or ("tool_calls" if event.pending else "stop")
        done = _Done(reason, _less(event.usage, self._billed))
        if event.pending:
            return (*self._call_again(event.pending), done)
        if (words := self._course.last_words(event)) is None:
            return (done,)
        kind, text = words
        return (_Said("refusal" if kind == "refusal" else "content", text), done)

    def _call_again(self, pending: Sequence[str]) -> Iterable[_Piece]:
        """What is to be called, and stood in a response that a question has ended."""
        for call_id in pending:
            if call_id not in self._called:
                call = self._calls[call_id]
                begun = self._call(call_id, call.name)
                yield from (begun, _Arguments(begun.index, call.arguments))


def _less(usage: Usage, billed: Usage) -> Usage:
    fields = Usage.__struct_fields__
    return Usage(**{name: getattr(usage, name) - getattr(billed, name) for name in fields})


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _name(run_id: str, number: int) -> str:
    """The id of a run's first, second ... response; clients keep messages by their ids."""
    return f"chatcmpl-{run_id}" if number == 1 else f"chatcmpl-{run_id}-{number}"


# Errors -------------------------------------------------------------------------------------------


def refuse(problem: Problem) -> Reply:
    """Answer a request that started nothing; what it looked for in vain is a model."""
    return no_model(problem) if problem.code == "not_found" else failed(problem)


# Streams ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class ChatEncoder:
    """The events of one run as chunks.

    Attributes:
        has_usage: Whether the client has asked for it.
    """

    has_usage: bool = False
    _turn: _Turn = attrs.field(factory=_Turn)
    _begun: RunStarted | None = None
    _responses: int = 0
    _head: bytes = b""  # of every chunk of the response that is open, up to its choices

    def feed(self, event: AnyEvent) -> Iterable[bytes]:
        """Turn one event into its frames."""
        if isinstance(event, RunStarted):
            self._begun = event
            self._turn.take(event)
            return self._open()
        frames: list[bytes] = []
        for piece in self._turn.take(event):
            match piece:
                case _Said() | _Called() | _Arguments():
                    frames += self._open()
                    frames.append(self._chunk(_delta(piece)))
                case _Done():
                    frames += self._open()
                    frames += self._close(piece)
                case Problem():
                    frames.append(b"data: %b\n\n" % encode(error_of(piece)))
                case _:
                    assert_never(piece)
        return frames

    def _open(self) -> Sequence[bytes]:
        if self._head:
            return ()
        assert self._begun is not None
        self._responses += 1
        envelope = {
            "id": _name(self._begun.run_id, self._responses),
            "object": "chat.completion.chunk",
            "created": seconds(self._begun.ts),
            "model": self._begun.agent,
        }
        self._head = b'data: %b,"choices":[' % encode(envelope).removesuffix(b"}")
        return (self._chunk(b'{"role":"assistant","content":""}'),)

    def _close(self, done: _Done) -> Sequence[bytes]:
        last = self._chunk(b"{}", reason=encode(done.reason))
        head, self._head = self._head, b""
        if not self.has_usage:
            return (last, DONE)
        return (last, b'%b],"usage":%b}\n\n' % (head, encode(_usage(done.usage))), DONE)

    def _chunk(self, delta: bytes, *, reason: bytes = b"null") -> bytes:
        choice = b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}' % (delta, reason)
        tail = b',"usage":null' if self.has_usage else b""
        return b"%b%b]%b}\n\n" % (self._head, choice, tail)


def _delta(piece: _Said | _Called | _Arguments) -> bytes:
    match piece:
        case _Said():
            return b'{"%b":%b}' % (piece.field.encode(), encode(piece.text))
        case _Called():
            function = {"name": piece.name, "arguments": ""}
            call = {"index": piece.index, "id": piece.call_id, "type": "function"}
            return encode({"tool_calls": [call | {"function": function}]})
        case _Arguments():
            return b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (
                piece.index,
                encode(piece.text),
            )
        case _:
            assert_never(piece)


def make_encoder(options: Hashable) -> ChatEncoder:
    """Make the machine; the option is whether there is to be a chunk with the usage."""
    return ChatEncoder(has_usage=bool(options))


# Answers ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Draft:
    """The message of a response, piece by piece."""

    _texts: dict[Field, list[str]] = attrs.field(factory=dict)
    _calls: list[tuple[_Called, list[str]]] = attrs.field(factory=list)

    def add(self, piece: _Said | _Called | _Arguments) -> None:
        """Take one piece more."""
        match piece:
            case _Said():
                self._texts.setdefault(piece.field, []).append(piece.text)
            case _Called():
                self._calls.append((piece, []))
            case _Arguments():
                self._calls[piece.index][1].append(piece.text)
            case _:
                assert_never(piece)

    def build(self) -> dict[str, Any]:
        """Put the message together."""
        texts = {field: "".join(pieces) for field, pieces in self._texts.items()}
        nothing = None if texts.get("refusal") or self._calls else ""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": texts.get("content") or nothing,
            "refusal": texts.get("refusal") or None,
        }
        if texts.get("reasoning_content"):
            message["reasoning_content"] = texts["reasoning_content"]
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(arguments)},
                }
                for call, arguments in self._calls
            ]
        return message


def answer(snapshot: RunSnapshot, events: Sequence[AnyEvent]) -> Reply:
    """Answer where there is no stream: what the stream would have said, in one object."""
    turn, draft = _Turn(), _Draft()
    begin, count, reply = _begin(events), 0, None
    for number, event in enumerate(events):
        for piece in turn.take(event):
            match piece:
                case _Done():
                    count += 1
                    name = _name(snapshot.id, count)
                    reply = Reply(encode(_completion(snapshot, name, draft, piece)))
                    if number >= begin:
                        return reply
                    draft = _Draft()
                case Problem():
                    return failed_run(piece)
                case _:
                    draft.add(piece)
    return reply or failed(Problem(code="internal", message="the run has not come to an end"))


def _begin(events: Sequence[AnyEvent]) -> int:
    """Where the response begins: behind the question that was answered last, if one was."""
    answered = next((e.request_id for e in reversed(events) if isinstance(e, InputReceived)), None)
    for number, event in enumerate(events, 1):
        if isinstance(event, InputRequested) and event.request_id == answered:
            return number
    return 0


def _completion(snapshot: RunSnapshot, name: str, draft: _Draft, done: _Done) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": draft.build(),
        "logprobs": None,
        "finish_reason": done.reason,
    }
    return {
        "id": name,
        "object": "chat.completion",
        "created": seconds(snapshot.created),
        "model": snapshot.agent,
        "choices": [choice],
        "usage": _usage(done.usage),
    }


class _Model(msgspec.Struct):
    """An agent; nobody knows since when there is one of its name."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "agentsse"


class _Models(msgspec.Struct):
    data: list[_Model]
    object: Literal["list"] = "list"


def list_models(cards: Sequence[AgentCard]) -> Reply:
    """Answer with all agents."""
    return Reply(encode(_Models([_Model(card.name) for card in cards])))


def _show_model(name: str, cards: Sequence[AgentCard]) -> Reply:
    if any(name in (card.name, card.model) for card in cards):
        return Reply(encode(_Model(name)))
    known = ", ".join(card.name for card in cards)
    message = f"expected one of the agents {known}, or the model of one, got {name[:80]!r}"
    return refuse(Problem(code="not_found", message=message, status=404))


# Requests -----------------------------------------------------------------------------------------


class _CalledFunction(msgspec.Struct):
    name: str
    arguments: str = ""


class _ToolCall(msgspec.Struct):
    id: str
    type: str = "function"
    function: _CalledFunction | None = None


class _ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[_ToolCall], msgspec.Meta(max_length=MAX_MESSAGES)] | None = None
    tool_call_id: str | None = None
    function_call: Any = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _ResponseFormat(msgspec.Struct):
    type: str


class _Function(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(msgspec.Struct):
    type: str
    function: _Function | None = None


_SAMPLE: Final = [{"role": "user", "content": "Hello"}]


class _Completion(msgspec.Struct, kw_only=True):
    model: Annotated[str, msgspec.Meta(min_length=1, examples=["assistant"])]
    messages: Annotated[
        list[_ChatMessage],
        msgspec.Meta(min_length=1, max_length=MAX_MESSAGES, examples=[_SAMPLE]),
    ]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: _ResponseFormat | None = None
    stop: str | list[str] | None = None
    web_search_options: Any = None
    user: Any = None
    metadata: dict[str, Any] | None = None


def decode_completion(request: Request) -> Start:
    """`POST /chat/completions`.

    What the client says in `user` and `metadata` stands in the run's metadata, under these names.

    Raises:
        BadRequest: It makes no sense, or wants what is not there; the message says what.
    """
    body = read_body(request, _Completion, what="complete a chat")
    _know_wishes(body)
    told = _read_messages(body.messages)
    thread_id = _thread_of(body.metadata or {})
    metadata = {"user": body.user, "metadata": body.metadata}
    return Start(
        agent=body.model,
        input=told.input,
        delivery="stream" if body.stream else "wait",
        thread_id=thread_id,
        # What a person is asked, no tool answers.
        resumes=thread_id is not None and told.said is None,
        if_busy="supersede",
        history=told.history,
        said=told.said,
        tools=_read_tools(body),
        instructions=told.instructions,
        metadata={name: value for name, value in metadata.items() if value} or None,
        options=bool(body.stream_options and body.stream_options.include_usage),
        reply=answer,
    )


def decode_models(_request: Request) -> ListAgents:
    """`GET /models`."""
    return ListAgents(reply=list_models)


def decode_model(request: Request) -> ListAgents:
    """`GET /models/{model}`."""
    return ListAgents(reply=partial(_show_model, request.parameters["model"]))


def _know_wishes(body: _Completion) -> None:
    """Refuse what would be missing in the answer."""
    form, none = body.response_format, "there are no log probabilities"
    choice = body.tool_choice not in (None, "auto", "none")
    wishes = [
        ("tool_choice", choice, "the model chooses, among all ('auto') or none ('none')"),
        ("functions", body.functions, "they are 'tools' by now"),
        ("n", body.n not in (None, 1), "a run has one answer"),
        ("modalities", set(body.modalities or ()) - {"text"}, "an agent answers in text"),
        ("audio", body.audio, "an agent answers in text"),
        ("logprobs", body.logprobs, none),
        ("top_logprobs", body.top_logprobs, none),
        ("response_format", form and form.type != "text", "the form is the agent's to choose"),
        ("stop", body.stop, "there are no stop sequences"),
        ("web_search_options", body.web_search_options is not None, "an agent has its own tools"),
    ]
    know_wishes(wishes)


def _thread_of(metadata: Mapping[str, Any]) -> str | None:
    thread_id = metadata.get("thread_id")
    if thread_id is None:
        return None
    if not isinstance(thread_id, str):
        raise BadRequest(f"metadata.thread_id: expected a string, got {str(thread_id)[:40]}")
    see_name(thread_id, "metadata.thread_id")
    return thread_id


def _read_tools(body: _Completion) -> tuple[ToolSpec, ...]:
    """The client's tools, if it wants any to be called."""
    specs = []
    for place, tool in enumerate(body.tools or ()):
        if tool.type != "function" or (function := tool.function) is None:
            raise BadRequest(
                f"tools[{place}]: expected a tool of the type 'function', with its 'function', "
                f"got one of the type {tool.type[:40]!r}; leave it out"
            )
        specs.append(spec_of(function.name, function.description, function.parameters))
    return () if body.tool_choice == "none" else tuple(specs)


@attrs.frozen
class _Told:
    """What a request's messages are to an agent; see `Start`."""

    instructions: str | None
    history: tuple[Message, ...]
    said: tuple[ToolMessage, ...] | None
    input: Any


def _read_messages(messages: Sequence[_ChatMessage]) -> _Told:
    roles = [message.role for message in messages]
    if roles[-1] not in ("user", "tool"):
        raise BadRequest(
            "messages: expected the last one to be the user's or a tool's, for it is what the "
            f"agent is given; got one of the role {roles[-1]!r}"
        )
    names: dict[str, str] = {}
    read = [_read_message(f"messages[{place}]", each, names) for place, each in enumerate(messages)]
    begin = next(place for place, each in enumerate(read) if not isinstance(each, SystemMessage))
    told_first = [each.text for each in read[:begin] if isinstance(each, SystemMessage)]
    last, end = read[-1], len(read) - 1
    while roles[end] == roles[end - 1] == "tool":
        end -= 1
    said = tuple(message for message in read[end:] if isinstance(message, ToolMessage))
    return _Told(
        instructions="\n\n".join(text for text in told_first if text) or None,
        history=tuple(message for message in read[begin:end] if _says_something(message)),
        said=said or None,
        input=last.text if isinstance(last, UserMessage) else [_shown(each) for each in said],
    )


def _says_something(message: Message) -> bool:
    match message:
        case AssistantMessage():
            return bool(message.text or message.tool_calls)
        case SystemMessage() | UserMessage():
            return bool(message.text)
        case ToolMessage():
            return True
        case _:
            assert_never(message)


def _shown(answer: ToolMessage) -> dict[str, Any]:
    """A tool's answer as a part of the run's input."""
    return {
        "call_id": answer.call_id,
        "name": answer.name,
        "content": decode_json(answer.content),
    }


def _read_message(where: str, message: _ChatMessage, names: dict[str, str]) -> Message:
    """Read one message; `names` has those of the tools called so far, by call id."""
    if message.function_call:
        raise _old_form(where)
    text = _read_text(where, message)
    match message.role:
        case "system" | "developer":
            return SystemMessage(text)
        case "user":
            return UserMessage(text)
        case "assistant":
            calls = tuple(
                _read_call(f"{where}.tool_calls[{place}]", call)
                for place, call in enumerate(message.tool_calls or ())
            )
            names.update((call.call_id, call.name) for call in calls)
            return AssistantMessage(text, calls)
        case "tool":
            call_id = message.tool_call_id or ""
            if call_id not in names:
                raise BadRequest(
                    f"{where}.tool_call_id: expected the id of a call in a message before it, "
                    f"got {call_id[:80]!r}"
                )
            return ToolMessage(call_id, names[call_id], encode(text).decode())
        case "function":
            raise _old_form(where)
        case _:
            assert_never(message.role)


def _old_form(where: str) -> BadRequest:
    return BadRequest(
        f"{where}: expected a call as 'tool_calls' and its result in the role 'tool', got the "
        "older form of 'functions'; leave the message out"
    )


def _read_call(where: str, call: _ToolCall) -> ToolCall:
    if call.type != "function" or call.function is None:
        raise BadRequest(
            f"{where}: expected a call of the type 'function', with its 'function', got one of "
            f"the type {call.type[:40]!r}; leave the message out"
        )
    return ToolCall(call.id, call.function.name, call.function.arguments)


def _read_text(where: str, message: _ChatMessage) -> str:
    if message.content is None:
        return message.refusal or ""
    return text_of(f"{where}.content", message.content, ("text", "refusal"), "'text'")


OPENAI_CHAT: Final = Dialect(
    name="openai_chat",
    mount="/v1",
    routes=(
        Route(
            "POST",
            "/chat/completions",
            decode_completion,
            doc=Doc(
                summary="Have an agent answer a chat, streamed or not",
                body=_Completion,
                answers={200: (dict, SSE)},
            ),
        ),
        Route(
            "GET",
            "/models",
            decode_models,
            doc=Doc(summary="List the agents as models", answers={200: (_Models,)}),
        ),
        Route(
            "GET",
            "/models/<model>",
            decode_model,
            doc=Doc(summary="Show an agent as a model", answers={200: (_Model,)}),
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
