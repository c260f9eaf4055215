"""The agents API of Llama Stack: an agent at the server, which runs shields and tools of its own.

Knows: how a prompt becomes an agent, a session and a turn, and what the chunks of a turn mean. Must
never know sockets, runs, or who is told of them. Source: the API's published specification (agents,
`AgentTurnResponseStreamChunk`), and what its reference server sends.

One connection has one agent and one session, made when the first turn begins. A turn goes through
steps until it is complete, or awaits what tools of ours answer:

    turn_start? (step_start step_progress* step_complete)* (turn_complete | turn_awaiting_input)

each as `{"event": {"payload": ...}}`, or an `{"error": {"message": ...}}` instead of whatever was
to follow. The steps are of four types:

- inference: text, and tool calls. Whose tool it is only shows later: the server runs its own in
  steps of their own, and names ours at the end. So calls are held back until then. Where a call
  comes in pieces, they are the model's own way of writing it, and the parsed call takes their
  place; pieces that nothing takes the place of are text.
- tool_execution: tools of the server. What we answer comes back as such a step, and is skipped.
- shield_call: a look at what goes in or comes out. Where the turn ends with a violation, what it
  says is a refusal.
- memory_retrieval, and any other: handed on.

The session knows what was said in it: so a turn brings only what is new, results of tools by way of
`resume`. Where session and prompt may not agree (a turn has failed, the model is another one, an
answer came from elsewhere), a new session is told everything; what others said, as one text, since
a turn takes messages of users and tools alone. Which turn an answer came from is in its echo.

Agents and sessions are left behind: that they are not persisted is what we ask for, so the server
holds them in memory. Deleting them would make whoever leaves wait for a server that may not answer.
"""

import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Final, TypeAlias, assert_never
from urllib.parse import quote

import attrs
import trio
from msgspec import UNSET

from agentsse.errors import ProviderError, redact
from agentsse.events import (
    AnyEvent,
    FinishReason,
    Moderation,
    PartFinished,
    Usage,
    encode_json,
    well_formed,
)
from agentsse.http import HttpClient, open_http
from agentsse.messages import (
    AssistantMessage,
    Echo,
    Message,
    SystemMessage,
    ToolMessage,
    ToolSpec,
    UserMessage,
)

from . import (
    MAX_ERROR_BODY,
    MAX_QUOTED,
    MIN_KEY,
    Caller,
    HttpConnection,
    HttpProvider,
    HttpRequest,
    Produced,
    Prompt,
    SseNormalizer,
    decode_foreign,
    encode_raw,
    name_of,
    number,
    object_of,
    retry_after,
    text_of,
    upstream_error,
)

KIND: Final = "llama_stack"
SESSION_NAME: Final = "agentsse"  # the API wants one, and nobody looks at it

_REASONS: Mapping[str, FinishReason] = {
    "": "stop",
    "end_of_turn": "stop",
    "end_of_message": "stop",
    "out_of_tokens": "length",
}
_STATUS: Final = re.compile(r"([45]\d\d): *(.*)", re.DOTALL)  # how its errors in a stream begin

_Json: TypeAlias = dict[str, Any]

# What is asked ------------------------------------------------------------------------------------


@attrs.frozen
class Asked:
    """Which turn a stream is; its first chunk, which does not come from the server.

    Attributes:
        session_id: Where.
        number: Of the turns that were begun in that session, from 1; one that is resumed counts
            again.
        answered: Ids of our calls that it is given the results of.
    """

    session_id: str
    number: int
    answered: frozenset[str] = frozenset()


@attrs.define(eq=False)
class _Session:
    """A session at the server.

    Attributes:
        turns: How many were begun in it.
    """

    agent: str  # the path of its agent
    session_id: str
    turns: int = 0

    def go_on(self, messages: Sequence[Message]) -> tuple[str, _Json, frozenset[str]] | None:
        """What the next turn is to be asked.

        Returns:
            The end of its path, its body, and the ids of the calls that are answered; None where
            the last answer is not that of the last turn, or nothing came after it.
        """
        place, answer = 0, None
        for index, message in enumerate(messages):
            if isinstance(message, AssistantMessage):
                place, answer = index, message
        if answer is None or answer.echo is None or answer.echo.kind != KIND:
            return None
        mark = answer.echo.value
        if (self.session_id, self.turns) != (mark["session_id"], mark["number"]):
            return None
        news = [m for m in messages[place:] if isinstance(m, UserMessage | ToolMessage)]
        results = [m for m in news if isinstance(m, ToolMessage)]
        answered = frozenset(result.call_id for result in results)
        if mark["waiting"] and results and len(results) == len(news):
            body = {"tool_responses": [_result(result) for result in results]}
            return f"/turn/{_quoted(mark['waiting'])}/resume", body, answered
        return ("/turn", {"messages": [*map(_message, news)]}, answered) if news else None


def _message(message: UserMessage | ToolMessage) -> _Json:
    match message:
        case UserMessage(text):
            return {"role": "user", "content": text}
        case ToolMessage():
            return {"role": "tool", **_result(message)}
        case _:
            assert_never(message)


def _result(message: ToolMessage) -> _Json:
    return {"call_id": message.call_id, "tool_name": message.name, "content": message.content}


def _all_of(messages: Iterable[Message]) -> list[_Json]:
    """A conversation as the first messages of a session; one text where others spoke in it."""
    told = [message for message in messages if not isinstance(message, SystemMessage)]
    asked = [message for message in told if isinstance(message, UserMessage)]
    if len(asked) == len(told):
        return [*map(_message, asked)]
    text = "\n\n".join(section for message in told for section in _sections(message))
    return [{"role": "user", "content": text}]


def _sections(message: UserMessage | AssistantMessage | ToolMessage) -> Iterator[str]:
    match message:
        case UserMessage(text):
            yield f"[user]\n{text}"
        case AssistantMessage(text, calls):
            if text:
                yield f"[assistant]\n{text}"
            for call in calls:
                yield f"[assistant called {call.name}, {call.call_id}]\n{call.arguments}"
        case ToolMessage(call_id, name, content, is_error):
            yield f"[{'error' if is_error else 'result'} of {name}, {call_id}]\n{content}"
        case _:
            assert_never(message)


def _tool(spec: ToolSpec) -> _Json:
    """A tool of ours: its schema for servers since 0.3, a list of parameters for those before."""
    required = spec.parameters.get("required") or ()
    properties = object_of(spec.parameters.get("properties"))
    return {
        "name": spec.name,
        "description": spec.description,
        "parameters": [
            {
                "name": name,
                "parameter_type": text_of(object_of(schema).get("type")) or "string",
                "description": text_of(object_of(schema).get("description")),
                "required": name in required,
            }
            for name, schema in properties.items()
        ],
        "input_schema": spec.parameters,
    }


def _quoted(name: str) -> str:
    """An id as a part of a path."""
    return quote(name, safe="")


# What is answered ---------------------------------------------------------------------------------


@attrs.define(eq=False)
class LlamaStackNormalizer(SseNormalizer):
    """The machine that reads one turn; it is fed bytes, and before them what was `Asked`."""

    provider: ClassVar[str] = KIND

    _asked: Asked | None = attrs.field(default=None, init=False)
    _answered: frozenset[str] = attrs.field(default=frozenset(), init=False)
    _turn_id: str = attrs.field(default="", init=False)
    # Whether anything in the frame at hand was not understood: then it is handed on as well.
    _is_strange: bool = attrs.field(default=False, init=False)
    # The inference step at hand, or the last one: its id, whether it has begun to say anything,
    # pieces of calls as the model writes them, its calls, and what it has said in the end.
    _step: str = attrs.field(default="", init=False)
    _is_speaking: bool = attrs.field(default=False, init=False)
    _written: list[str] = attrs.field(factory=list, init=False)
    _calls: list[_Json] = attrs.field(factory=list, init=False)
    _text: str = attrs.field(default="", init=False)
    # What a shield has said last, where the model has not spoken since.
    _violation: str | None = attrs.field(default=None, init=False)
    # Tools of the server: those that run, with their names; those that are done, with their steps;
    # and the ids that were made here.
    _running: dict[str, str] = attrs.field(factory=dict, init=False)
    _done: dict[str, str] = attrs.field(factory=dict, init=False)
    _made: dict[tuple[str, str], str] = attrs.field(factory=dict, init=False)

    def feed(self, chunk: bytes | Asked, /) -> Iterator[Produced]:
        """Take some bytes; see `Normalizer`."""
        if isinstance(chunk, Asked):
            self._asked, self._answered = chunk, chunk.answered
            return iter(())
        return super().feed(chunk)

    def take(self, name: str, value: _Json) -> list[AnyEvent]:
        """Take one chunk.

        Raises:
            ProviderError: It is an error.
        """
        error = value.get("error")
        if name == "error" or error not in (None, False):
            raise upstream_error(self.provider, _plain_error(value if error is None else error))
        event = object_of(value.get("event")) or value
        payload = object_of(event.get("payload")) or event
        self._is_strange = self.said.reason is not None  # nothing follows the end
        events = [] if self._is_strange else self._take(payload, value)
        return [*events, self.unknown(value)] if self._is_strange else events

    def _take(self, payload: _Json, value: _Json) -> list[AnyEvent]:
        match payload.get("event_type"), payload.get("step_type"):
            case "turn_start", _:
                self._turn_id = name_of(payload.get("turn_id"))
            case "step_start", "inference":
                return self._begin(name_of(payload.get("step_id")))
            case "step_progress", "inference":
                return [*self._enter(payload), *self._delta(object_of(payload.get("delta")))]
            case "step_complete", "inference":
                return [*self._enter(payload), *self._inferred(payload)]
            case "step_start" | "step_progress", "shield_call":
                return self._end_text()
            case "step_complete", "shield_call":
                return [*self._end_text(), *self._shielded(payload.get("step_details"))]
            case "step_start" | "step_progress" | "step_complete" as what, "tool_execution":
                self._written.clear()  # if that was a call, it is this one
                return [*self._end_text(), *self._tool_step(what, payload)]
            case "turn_complete" | "turn_awaiting_input" as how, _:
                turn = object_of(payload.get("turn"))
                message = object_of(turn.get("output_message"))
                self.said.usage = _usage(turn, message, payload, value)
                return self._end(turn, message, is_waiting=how == "turn_awaiting_input")
            case _:
                self._is_strange = True
        return []

    # Inference

    def _enter(self, payload: _Json) -> list[AnyEvent]:
        """Begin the step of an event, where its start was lost."""
        step = name_of(payload.get("step_id"))
        return self._begin(step) if step and step != self._step else []

    def _begin(self, step: str) -> list[AnyEvent]:
        events = self._end_text()
        self._step, self._text, self._violation = step, "", None
        self._calls, self._answered = [], frozenset()
        return events

    def _delta(self, delta: _Json) -> list[AnyEvent]:
        match delta:
            case {"type": "text", "text": str(more)}:
                self._is_speaking, self._violation = True, None
                return self.said.delta("text", more, self._step)
            case {"type": "tool_call", "tool_call": str(piece)}:
                if delta.get("parse_status") == "failed" and piece:  # all of it, once more
                    self._written.clear()
                self._written.append(piece)
            case {"type": "tool_call", "tool_call": dict(call)}:
                self._written.clear()
                if delta.get("parse_status") not in ("started", "in_progress"):
                    self._calls.append(call)
            case _:
                self._is_strange = True
        return []

    def _inferred(self, payload: _Json) -> list[AnyEvent]:
        response = object_of(object_of(payload.get("step_details")).get("model_response"))
        self._is_strange = not response
        if calls := _objects(response.get("tool_calls")):
            self._calls = calls
            self._written.clear()
        return self._end_text(self._all_text(response.get("content")))

    def _end_text(self, whole: str = "") -> list[AnyEvent]:
        """End what the step says; `whole` is its aggregate, if there is one."""
        events: list[AnyEvent] = []
        if whole == self._text and not self._is_speaking:  # told twice
            whole = ""
        if not whole:
            events = self.said.delta("text", "".join(self._written), self._step)
        self._written.clear()
        self._is_speaking = False
        events += self.said.whole("text", whole, self._step)
        for event in events:
            if isinstance(event, PartFinished):
                self._text = event.text
        return events

    def _all_text(self, content: Any) -> str:
        """The text of a content: a string, an item, or several of either."""
        pieces = []
        for item in content if isinstance(content, list) else [content]:
            match item:
                case None:
                    pass
                case str(text) | {"type": "text", "text": str(text)}:
                    pieces.append(text)
                case _:
                    self._is_strange = True
        return well_formed("".join(pieces))

    # Shields

    def _shielded(self, details: Any) -> list[AnyEvent]:
        match object_of(details).get("violation"):
            case None | False | "" if isinstance(details, dict):
                return [Moderation(violation=False)]
            case dict() as violation:
                said, metadata = name_of(violation.get("user_message")), violation.get("metadata")
            case str() | True as violation:
                said, metadata = name_of(violation), None
            case _:
                self._is_strange = True
                return []
        self._violation = said
        shown = UNSET if metadata is None else encode_raw(metadata)
        return [Moderation(violation=True, message=said or None, metadata=shown)]

    # Tools that run at the server

    def _tool_step(self, what: str, payload: _Json) -> list[AnyEvent]:
        match what, payload.get("delta"):
            case "step_complete", _:
                return self._tools_done(payload)
            case "step_progress", {"type": "tool_call", "tool_call": dict(call)}:
                step = name_of(payload.get("step_id"))
                return self._tool_started(self._call_id(call, step, 0), call)
            case "step_progress", _:
                self._is_strange = True
            case _:  # it has begun; of which tool, the next chunk says
                pass
        return []

    def _tools_done(self, payload: _Json) -> list[AnyEvent]:
        """All calls of a step, then all that came of them."""
        step, details = name_of(payload.get("step_id")), object_of(payload.get("step_details"))
        calls, results = (_objects(details.get(f"tool_{what}")) for what in ("calls", "responses"))
        self._is_strange = not calls and not results
        if self._answered.intersection(name_of(result.get("call_id")) for result in results):
            return []  # ours, as we have sent them
        ids = [self._call_id(call, step, place) for place, call in enumerate(calls)]
        given = {name_of(call.get("call_id")) for call in calls}
        self._calls = [
            call
            for call in self._calls
            if call not in calls and name_of(call.get("call_id")) not in given
        ]
        events: list[AnyEvent] = []
        for call_id, call in zip(ids, calls, strict=True):
            events += self._tool_started(call_id, call)
        for place, result in enumerate(results):
            has_call = not name_of(result.get("call_id")) and place < len(ids)
            call_id = ids[place] if has_call else self._call_id(result, step, place)
            content, failed = result.get("content"), result.get("error_message")
            events += self._tool_finished(
                call_id,
                name_of(result.get("tool_name")),
                text_of(failed) if content is None else content,
                step=step,
                is_error=bool(failed or result.get("error_code")),
            )
        for call_id in ids:
            if call_id in self._running:
                events += self._broken_off(call_id, step)
        return events

    def _call_id(self, call: _Json, step: str, place: int) -> str:
        """The id of a call; one is made where there is none, or another step has used it up."""
        given = name_of(call.get("call_id"))
        if given and self._done.get(given, step) == step:
            return given
        made = f"{self.prefix}t{len(self._made) + 1}"
        return self._made.setdefault((step, given or f"#{place}"), made)

    def _tool_started(self, call_id: str, call: _Json) -> list[AnyEvent]:
        name = name_of(call.get("tool_name")) or "unnamed"
        if call_id not in self._done:
            self._running.setdefault(call_id, name)
        given = _given(call)
        arguments = decode_foreign(given) if isinstance(given, str) and given else given or {}
        return self.said.tool_started(call_id, name, arguments)

    def _tool_finished(
        self, call_id: str, name: str, result: Any, *, step: str, is_error: bool
    ) -> list[AnyEvent]:
        self._running.pop(call_id, None)
        self._done.setdefault(call_id, step)
        return self.said.tool_finished(call_id, name or "unnamed", result, is_error=is_error)

    def _broken_off(self, call_id: str, step: str = "") -> list[AnyEvent]:
        said = {"error": "the server told no result of this tool"}
        return self._tool_finished(call_id, "", said, step=step, is_error=True)

    # The end

    def _end(self, turn: _Json, message: _Json, *, is_waiting: bool) -> list[AnyEvent]:
        """The turn is complete, or waits for results of tools of ours."""
        self.is_over = True
        self._turn_id = name_of(turn.get("turn_id")) or self._turn_id
        whole, stop = self._all_text(message.get("content")), text_of(message.get("stop_reason"))
        reason = _REASONS.get(stop, "other")
        calls = _objects(message.get("tool_calls")) or (self._calls if is_waiting else [])
        events = [e for call_id in list(self._running) for e in self._broken_off(call_id)]
        if self._violation is not None:
            reason, calls = "content_filter", []
            events += self._end_text()
            refusal = whole if whole != self._text else self._violation
            events += self.said.whole("refusal", refusal or self._violation)
        elif self._is_speaking or self._written:
            events += self._end_text(whole)
        elif whole != self._text:  # what the last step has said is over: the rest stands alone
            events += self.said.whole("text", whole.removeprefix(self._text), "output")
        if calls and reason == "length":  # the server takes no results of them
            self._is_strange, calls = True, []
        for place, call in enumerate(calls):
            events += self._ask_for(f"#{place}", call)
        self.said.reason = "tool_calls" if calls else reason
        self._is_strange = self._is_strange or bool(turn.get("output_attachments"))
        if self._asked is not None:
            mark = {"session_id": self._asked.session_id, "number": self._asked.number}
            waiting = self._turn_id if is_waiting and calls else ""
            self.said.echo = Echo(KIND, {**mark, "waiting": waiting})
        return events

    def _ask_for(self, key: str, call: _Json) -> list[AnyEvent]:
        """A call that is for us to run."""
        given = _given(call)
        if given is None or isinstance(given, str):
            arguments = well_formed(given or "")
        else:
            arguments = bytes(encode_raw(given)).decode()
        name, call_id = name_of(call.get("tool_name")), name_of(call.get("call_id"))
        started = self.said.start_call(key, name=name, call_id=call_id)
        return [*started, *self.said.finish_call(key, arguments=arguments)]


def _objects(value: Any) -> list[_Json]:
    """The objects of a list; empty where it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _given(call: _Json) -> Any:
    """The arguments of a call: JSON as text or as an object, as the server's version has it."""
    arguments = call.get("arguments")
    return call.get("arguments_json") if arguments is None else arguments


def _usage(*holders: _Json) -> Usage:
    """The tokens of a turn; servers that tell them do so in its metrics, wherever those are."""
    told: dict[str, int] = {}
    for holder in holders:
        for metric in _objects(holder.get("metrics")):
            told.setdefault(text_of(metric.get("metric")), number(metric.get("value")))
    return Usage(
        input_tokens=told.get("prompt_tokens", 0), output_tokens=told.get("completion_tokens", 0)
    )


def _plain_error(error: Any) -> Any:
    """An error in a stream, with the status that stands in its message as its code."""
    fields = object_of(error)
    found = _STATUS.match(text_of(fields.get("message")) or text_of(error))
    return {"code": found[1], **fields, "message": found[2]} if found else error


# The provider -------------------------------------------------------------------------------------


@attrs.frozen
class LlamaStackProvider:
    """A Llama Stack server, whose agents are used as models are; see `Provider`.

    Attributes:
        name: What stands before the colon of a model.
        base_url: Where its API is, with the version: `/v1`, or `/v1alpha` since 0.3.
        key: Sent as a bearer token; None where the server asks for none.
        options: Fields of the agent's configuration, beside ours or instead of them: `toolgroups`,
            `input_shields`, `output_shields`, `sampling_params`, ... None leaves one out.
        open_client: Makes the client of one run; see `agentsse.http.open_http`.
    """

    name: str = KIND
    base_url: str = "http://127.0.0.1:8321/v1"
    key: str | None = attrs.field(default=None, repr=False)
    options: Mapping[str, Any] = attrs.field(factory=dict)
    open_client: Any = open_http

    @asynccontextmanager
    async def open(self, caller: Caller, /) -> AsyncIterator["LlamaStackConnection"]:
        """Open the run's client; see `Provider`. Nothing is made at the server as yet."""
        async with self.open_client(
            window=caller.window, lull=caller.lull, sleep_until=caller.sleep_until
        ) as client:
            yield LlamaStackConnection(self, client)

    def config(self, prompt: Prompt) -> _Json:
        """Write the configuration of an agent that answers a prompt."""
        told = [message.text for message in prompt.messages if isinstance(message, SystemMessage)]
        config = {
            "model": prompt.model,
            "instructions": "\n\n".join(told),
            "client_tools": [_tool(spec) for spec in prompt.tools],
            "enable_session_persistence": False,
            **self.options,
        }
        return {field: value for field, value in config.items() if value is not None}

    def request(self, path: str, body: _Json) -> HttpRequest:
        """Write a request."""
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        return HttpRequest(f"{self.base_url.rstrip('/')}{path}", headers, body)


@attrs.frozen
class _Written:
    """An `Api` of one request, which is written already."""

    kind: ClassVar[str] = KIND
    normalizer: ClassVar = LlamaStackNormalizer

    written: HttpRequest

    def request(self, _prompt: Prompt, /) -> HttpRequest:
        return self.written


@attrs.define(eq=False)
class _Chunks:
    """What was asked, then the bytes that came; its stream is closed by whoever opened it."""

    asked: Asked | None
    chunks: AsyncIterator[bytes]

    def __aiter__(self) -> "_Chunks":
        return self

    async def __anext__(self) -> bytes | Asked:
        if (asked := self.asked) is None:
            return await anext(self.chunks)
        await trio.lowlevel.checkpoint()
        self.asked = None
        return asked


@attrs.define(eq=False)
class LlamaStackConnection:
    """A server's agent and its session, as one run uses them; made by `LlamaStackProvider.open`."""

    provider: LlamaStackProvider
    client: HttpClient
    _config: _Json | None = attrs.field(default=None, init=False)
    _agent: str = attrs.field(default="", init=False)  # its path
    _session: _Session | None = attrs.field(default=None, init=False)

    @asynccontextmanager
    async def stream(self, prompt: Prompt, /) -> AsyncIterator[AsyncIterator[bytes | Asked]]:
        """Begin a turn, or go on with one, and open its stream; see `Connection`.

        Leaving the context closes the connection, which ends the turn at the server. After a turn
        that has not come to its end, the next call begins a new session.
        """
        config = self.provider.config(prompt)
        session = self._session if config == self._config else None
        ahead = None if session is None else session.go_on(prompt.messages)
        if session is None or ahead is None:
            self._session = session = await self._new_session(config)
            ahead = "/turn", {"messages": _all_of(prompt.messages)}, frozenset()
        end, body, answered = ahead
        session.turns += 1
        path = f"{session.agent}/session/{_quoted(session.session_id)}{end}"
        written = self.provider.request(path, body | {"stream": True})
        provider = HttpProvider(self.provider.name, _Written(written), self.provider.key)
        asked = Asked(session.session_id, session.turns, answered)
        async with HttpConnection(provider, self.client).stream(prompt) as chunks:
            yield _Chunks(asked, chunks)

    def normalizer(self, prefix: str, /) -> LlamaStackNormalizer:
        """Make a machine for one turn."""
        return LlamaStackNormalizer(prefix)

    async def _new_session(self, config: _Json) -> _Session:
        if config != self._config:
            agent_id = await self._create("/agents", {"agent_config": config}, "agent_id")
            self._config, self._agent = config, f"/agents/{_quoted(agent_id)}"
        path, agent = f"{self._agent}/session", self._agent
        session_id = await self._create(path, {"session_name": SESSION_NAME}, "session_id")
        return _Session(agent, session_id)

    async def _create(self, path: str, body: _Json, wanted: str) -> str:
        """Post what makes something, and return its id."""
        name, key = self.provider.name, self.provider.key or ""
        written = self.provider.request(path, body)
        headers = {"content-type": "application/json", "accept": "application/json"}
        async with self.client.post(
            written.url,
            headers=headers | dict(written.headers),
            body=bytes(encode_json(written.body, what=f"the request to {name}")),
        ) as response:
            said = await response.read_some(MAX_ERROR_BODY)
        status, is_made = response.status, 200 <= response.status < 300
        if is_made and (made := name_of(object_of(decode_foreign(said)).get(wanted))):
            return made
        if len(key) >= MIN_KEY:
            said = said.replace(key.encode(), b"[redacted]")
        value = decode_foreign(said)
        error = object_of(value).get("error") or object_of(value).get("detail") or value
        shown = (text_of(error) or bytes(encode_raw(error)).decode())[:MAX_QUOTED]
        if is_made:
            raise ProviderError(
                f"{name}: expected POST {path} to answer with {wanted}, got {redact(shown)!r}; "
                "is base_url right?",
                code="malformed",
            )
        if status in (404, 405) or status < 400:
            error = f"{shown}; is base_url right?"
        wait = retry_after(response.headers, now=time.time())
        raise upstream_error(name, error, status=status, retry_after=wait)
