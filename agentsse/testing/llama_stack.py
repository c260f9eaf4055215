"""A Llama Stack server without a model: the agents API, byte for byte, over real sockets.

Knows: how agents, sessions and turns are made, which chunks a turn consists of, and how the server
misbehaves. Must never know how anybody reads it: it is written from the API's specification and
from what the reference server sends, so that it can prove a reader.

A `Turn` says in neutral words what one turn, or one that is resumed, goes through; a server opened
by `open_llama_stack` answers with them, one after the other. It knows which tools are the client's
from the agent's configuration: where the model calls one of those, the turn awaits its results.
Other calls are told as tool executions only where the script has them, for their results stand
there. What follows a turn at the same time (results of another turn, a session that is not there)
is refused as the server refuses it: for a stream, that is an error within it.

The usual style is that of the server since 0.1. Sparse: bare payloads, without starts, ids of calls
and the ends of steps. Chatty: comments, a memory retrieval, events to come, pieces of calls as the
model writes them, arguments told twice, and metrics.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias, assert_never

import attrs
import trio

from .upstream import (
    Call,
    Cut,
    Fault,
    Hang,
    Page,
    Refusal,
    Reply,
    Request,
    Stop,
    _head,
    _json,
    _object,
    _Peer,
    _say_frames,
    _some,
    _whole,
)

_ERRORS: Final[Mapping[Fault, tuple[int, str]]] = {
    "auth": (401, "Authentication required: no token was given"),
    "bad_request": (400, "Invalid value: Toolgroup builtin::colour not found"),
    "context_length": (400, "Invalid value: This model's maximum context length is 8192 tokens."),
    "not_found": (404, "Model 'fake-2' not found."),
    "overloaded": (503, "Service Unavailable"),
    "quota": (429, "You exceeded your current quota, please check your plan."),
    "rate_limit": (429, "Quota exceeded for this minute"),
    "server_error": (500, "Internal server error: An unexpected error occurred."),
}
_TIME: Final = "2025-10-01T12:00:00+00:00"  # a fake has no clock

# What a turn goes through -------------------------------------------------------------------------


@attrs.frozen
class Inference:
    """The model speaks, and calls tools; the text comes in one delta for each of its pieces.

    Attributes:
        unparsed: A call that the server could not make sense of: it becomes the text.
    """

    text: Sequence[str] = ()
    calls: Sequence[Call] = ()
    unparsed: str = ""


@attrs.frozen
class ShieldCall:
    """A shield looks; what it says is a violation, and None that there is none."""

    violation: str | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class ToolExecution:
    """The server runs tools of its own: calls with their results, side by side in one step."""

    results: Sequence[tuple[Call, Any]]


@attrs.frozen
class MemoryRetrieval:
    """The server looks something up."""

    context: str = "what it knows"


Step: TypeAlias = Inference | ShieldCall | ToolExecution | MemoryRetrieval


@attrs.frozen
class Turn(Reply):
    """What one turn goes through; see `Reply` for how the server behaves meanwhile.

    Its text and calls are the last inference, behind all other steps; a turn without either has
    none of its own. A failure within it, too, is what the server would say of such a fault.

    Attributes:
        steps: What comes before.
        has_end: Whether it says that it is complete.
    """

    steps: tuple[Step, ...] = attrs.field(default=(), converter=tuple, kw_only=True)
    has_end: bool = attrs.field(default=True, kw_only=True)

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """All of them, the last inference included."""
        is_last = bool(self.text or self.calls)
        return (*self.steps, Inference(self.text, self.calls)) if is_last else self.steps

    @property
    def last_calls(self) -> Sequence[Call]:
        """The calls that its last step has made."""
        last = self.all_steps[-1] if self.all_steps else None
        return last.calls if isinstance(last, Inference) else ()


def turn_frames(
    turn: Turn,
    *,
    client_tools: Iterable[str] = (),
    answers: Sequence[Mapping[str, Any]] | None = None,
    turn_id: str = "turn-1",
    session_id: str = "session-1",
) -> list[bytes]:
    """Write the stream of a turn, frame by frame: all that a client gets to see of it. Pure.

    Args:
        turn: What it goes through; its pacing does not count here.
        client_tools: Names of the tools whose results it awaits.
        answers: Of a turn that is resumed, the results that were given.
        turn_id: Its id, from which those of its steps and calls are made.
        session_id: Where it belongs.
    """
    writer = _Writer(turn, set(client_tools), turn_id, session_id)
    if answers is None:
        writer.say("turn_start", turn_id=turn_id)
    else:
        writer.resume(answers)
    for step in turn.all_steps:
        writer.write(step)
    if turn.has_end:
        writer.end()
    frames = writer.frames
    if turn.failure is not None:
        status, said = _ERRORS[turn.failure.fault]
        kept = frames[: turn.failure.after]
        frames = [*kept, b"data: " + _json({"error": {"message": f"{status}: {said}"}}) + b"\n\n"]
    if turn.line_end is not None:
        frames = [frame.replace(b"\n", turn.line_end) for frame in frames]
    match turn.ends:
        case None:
            return frames
        case Stop(after) | Hang(after):
            return frames[:after]
        case Cut(after, inside):
            seen = frames[:after]
            return [*seen, *(frame[:inside] for frame in frames[len(seen) :][:1] if inside)]
        case _ as unreachable:
            assert_never(unreachable)


@attrs.define
class _Writer:
    """Writes one turn."""

    turn: Turn
    client_tools: set[str]
    turn_id: str
    session_id: str
    frames: list[bytes] = attrs.field(factory=list)
    done: list[dict[str, Any]] = attrs.field(factory=list)  # the details of steps
    message: dict[str, Any] = attrs.field(factory=dict)
    asked: list[tuple[Call, dict[str, Any]]] = attrs.field(factory=list)  # and not answered
    step_id: str = ""
    steps: int = 0
    calls: int = 0

    @property
    def is_sparse(self) -> bool:
        return self.turn.style == "sparse"

    @property
    def is_chatty(self) -> bool:
        return self.turn.style == "chatty"

    def say(self, event_type: str, **fields: Any) -> None:
        """Write one more frame."""
        payload = {"event_type": event_type, **fields}
        chunk = payload if self.is_sparse else {"event": {"payload": payload}}
        comment = b": ping - 2025-10-01 12:00:00+00:00\n\n" if self.is_chatty else b""
        self.frames.append(comment + b"data: " + _json(chunk) + b"\n\n")

    def say_step(self, event_type: str, step_type: str, **fields: Any) -> None:
        self.say(event_type, step_type=step_type, step_id=self.step_id, **fields)

    def begin(self, step_type: str, **metadata: Any) -> None:
        self.steps += 1
        self.step_id = f"{self.turn_id}-step-{self.steps}"
        if not self.is_sparse:
            self.say_step("step_start", step_type, metadata=metadata)

    def complete(self, step_type: str, **details: Any) -> None:
        details = {
            "turn_id": self.turn_id,
            "step_id": self.step_id,
            "started_at": _TIME,
            "completed_at": _TIME,
            "step_type": step_type,
            **details,
        }
        self.done.append(details)
        if not self.is_sparse or step_type != "inference":
            self.say_step("step_complete", step_type, step_details=details)

    def write(self, step: Step) -> None:
        match step:
            case Inference():
                self.infer(step)
            case ShieldCall(violation, metadata):
                self.begin("shield_call", touchpoint="user-input")
                self.shield(violation, metadata)
            case ToolExecution(results):
                calls = [self.made(call) for call, _ in results]
                answers = [
                    {
                        "call_id": call["call_id"],
                        "tool_name": call["tool_name"],
                        "content": content,
                        "metadata": None,
                    }
                    for call, (_, content) in zip(calls, results, strict=True)
                ]
                self.begin("tool_execution")
                for call in [] if self.is_sparse else calls:
                    self.delta("tool_execution", call, "in_progress")
                self.execute(calls, answers)
            case MemoryRetrieval(context):
                self.begin("memory_retrieval")
                self.complete("memory_retrieval", vector_db_ids="db", inserted_context=context)
            case _ as unreachable:
                assert_never(unreachable)

    def infer(self, step: Inference) -> None:
        if self.is_chatty:
            self.write(MemoryRetrieval())
            self.say("step_novelty", novelty={"colour": "blue"})
        self.begin("inference")
        for piece in step.text:
            self.say_step("step_progress", "inference", delta={"type": "text", "text": piece})
        calls = [self.call(call) for call in step.calls]
        self.asked += zip(step.calls, calls, strict=True)
        for call in calls:
            if self.is_chatty:
                self.delta("inference", "", "started")
                for piece in _some(f"[{call['tool_name']}(...)]"):
                    self.delta("inference", piece, "in_progress")
            self.delta("inference", call, "succeeded")
        if step.unparsed:
            for piece in _some(step.unparsed):
                self.delta("inference", piece, "in_progress")
            self.delta("inference", step.unparsed, "failed")
        content = "" if calls else step.unparsed or "".join(step.text)
        self.message = self.told(content, calls)
        self.complete("inference", model_response=self.message)

    def delta(self, step_type: str, call: str | dict[str, Any], parse_status: str) -> None:
        delta = {"type": "tool_call", "tool_call": call, "parse_status": parse_status}
        self.say_step("step_progress", step_type, delta=delta)

    def made(self, call: Call) -> dict[str, Any]:
        """A call as the model has made it, where it has."""
        for asked in self.asked:
            if asked[0] == call:
                self.asked.remove(asked)
                return asked[1]
        return self.call(call)

    def call(self, call: Call) -> dict[str, Any]:
        self.calls += 1
        made = "" if self.is_sparse else f"{self.turn_id}-call-{self.calls}"
        told: dict[str, Any] = {
            "call_id": call.call_id or made,
            "tool_name": call.name,
            "arguments": call.arguments,
        }
        if self.is_chatty:
            arguments = _object(call.arguments)
            told |= {"arguments": arguments or {}, "arguments_json": call.arguments}
        return told

    def shield(self, violation: str | None, metadata: Mapping[str, Any]) -> None:
        told = None
        if violation is not None:
            told = {
                "violation_level": "error",
                "user_message": violation,
                "metadata": dict(metadata),
            }
            self.message = self.told(violation, [])
        self.complete("shield_call", violation=told)

    def execute(
        self, calls: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
    ) -> None:
        self.complete("tool_execution", tool_calls=calls, tool_responses=answers)

    def resume(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Tell the step that has waited for these results."""
        self.step_id = f"{self.turn_id}-step-0"
        calls = [
            {"call_id": one["call_id"], "tool_name": one["tool_name"], "arguments": "{}"}
            for one in answers
        ]
        self.execute([] if self.is_sparse else calls, answers)

    def told(self, content: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        finish = self.turn.finish or "stop"
        stop = {"stop": "end_of_turn", "length": "out_of_tokens"}.get(finish, finish)
        return {
            "role": "assistant",
            "content": content,
            "stop_reason": stop,
            "tool_calls": calls,
        }

    def pending(self) -> list[dict[str, Any]]:
        """The calls whose results the turn awaits."""
        calls: list[dict[str, Any]] = self.message.get("tool_calls", [])
        return [call for call in calls if call["tool_name"] in self.client_tools]

    def end(self) -> None:
        pending = self.pending()
        message = self.message | {"tool_calls": pending}
        if pending and not self.turn.finish:
            message["stop_reason"] = "end_of_message"
        turn: dict[str, Any] = {
            "turn_id": self.turn_id,
            "session_id": self.session_id,
            "input_messages": [],
            "steps": [] if self.is_sparse else self.done,
            "output_message": message,
            "output_attachments": [],
            "started_at": _TIME,
            "completed_at": _TIME,
        }
        if self.is_chatty and (usage := self.turn.usage) is not None:
            told = (("prompt", usage.input_tokens), ("completion", usage.output_tokens))
            turn["metrics"] = [
                {"metric": f"{name}_tokens", "value": value, "unit": None} for name, value in told
            ]
        self.say("turn_awaiting_input" if pending else "turn_complete", turn=turn)


# The server ---------------------------------------------------------------------------------------

Script: TypeAlias = Iterable[Turn | Callable[[Request], Turn]]
"""What a server will say: a turn to each request for one, or a function of it."""

_PATHS: Final = re.compile(r".*/agents(?:/([^/]+)/session(?:/([^/]+)/turn(?:/([^/]+)/resume)?)?)?")


def _begun(script: Script) -> Iterator[Turn | Callable[[Request], Turn]]:
    return iter(script)


@attrs.define(eq=False)
class LlamaStack:
    """A server: what it will say, and what it has seen; made by `open_llama_stack`.

    It can also serve a connection without any socket: see `answer`.

    Attributes:
        turns: What it will say, in the order in which requests for turns are complete.
        making: How requests for an `agent` or a `session` are treated, where it is not well; each
            is used once.
        base_url: What a client is given.
        requests: All that came, in order.
        agents: The configurations of those that were made, by id.
        sessions: The ids of their agents, by id.
        open_connections: Clients that are there.
        open_streams: Responses under way.
        hangups: How often a client left before the end of a response.
    """

    turns: Iterator[Turn | Callable[[Request], Turn]] = attrs.field(converter=_begun)
    making: dict[str, list[Turn]] = attrs.field(factory=dict)
    base_url: str = ""
    requests: list[Request] = attrs.field(factory=list)
    agents: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    sessions: dict[str, str] = attrs.field(factory=dict)
    open_connections: int = 0
    open_streams: int = 0
    hangups: int = 0
    _awaiting: dict[str, int] = attrs.field(factory=dict)  # results that turns wait for, by id
    _changed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def asked(self) -> list[Request]:
        """The requests for turns."""
        return [request for request in self.requests if "/turn" in request.path]

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the attributes above holds; looked at whenever they change."""
        await trio.lowlevel.checkpoint()
        while not condition():
            await self._changed.wait()

    async def wait_hangups(self, count: int = 1) -> None:
        """Wait until so many clients have left before the end."""
        await self.wait_until(lambda: self.hangups >= count)

    async def answer(self, stream: trio.abc.Stream) -> None:
        """Serve one connection, request by request, until the client leaves or a turn cuts it.

        Args:
            stream: Any Trio stream, of a socket or in memory. It is closed at the end, also when
                cancelled.

        Raises:
            ValueError: What came is no request.
        """
        peer = _Peer(stream)
        self.open_connections += 1
        self._tell()
        try:
            async with stream:
                while (request := await peer.read_request()) is not None:
                    self.requests.append(request)
                    if not await self._respond(peer, request):
                        break
        finally:
            self.open_connections -= 1
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _respond(self, peer: _Peer, request: Request) -> bool:
        """Answer a request; whether the connection may serve another one."""
        how, answer, is_said = *self._choose(request), False
        self.open_streams += 1
        self._tell()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.watch, nursery.cancel_scope)
                try:
                    await _say(peer.stream, how, answer)
                    is_said = True
                except trio.BrokenResourceError:
                    peer.has_left = True
                nursery.cancel_scope.cancel()
        finally:
            self.open_streams -= 1
            self.hangups += peer.has_left and not is_said
            self._tell()
        for end in (how.instead, how.ends):
            if is_said and isinstance(end, Cut):
                await peer.leave(end.how)
                return False
        return is_said

    def _choose(self, request: Request) -> tuple[Turn, bytes | list[bytes]]:
        """How to answer, and the answer: all of its bytes, or the frames of a stream."""
        path = _PATHS.fullmatch(request.path)
        if path is None or request.method != "POST":
            return Turn(), _whole(404, _JSON, _json({"detail": "Not Found"}))
        agent_id, session_id, turn_id = path.groups()
        if session_id is not None:
            return self._choose_turn(request, agent_id, session_id, turn_id)
        kind = "agent" if agent_id is None else "session"
        how = self.making.get(kind, []).pop(0) if self.making.get(kind) else Turn()
        if agent_id is None:
            made = f"agent-{len(self.agents) + 1}"
            self.agents[made] = request.body["agent_config"]
        elif agent_id not in self.agents:
            detail = {"detail": f"Agent '{agent_id}' not found."}
            return Turn(), _whole(404, _JSON, _json(detail))
        else:
            made = f"session-{len(self.sessions) + 1}"
            self.sessions[made] = agent_id
        return how, _whole(200, _JSON, _json({f"{kind}_id": made}))

    def _choose_turn(
        self, request: Request, agent_id: str, session_id: str, turn_id: str | None
    ) -> tuple[Turn, list[bytes]]:
        body = request.body
        answers: list[dict[str, Any]] | None = None if turn_id is None else body["tool_responses"]
        if self.sessions.get(session_id) != agent_id:
            return _failing(f"404: Session '{session_id}' not found.")
        if turn_id is not None and self._awaiting.pop(turn_id, 0) != len(answers or ()):
            return _failing(f"400: Invalid value: Turn {turn_id} does not wait for these results")
        if body.get("stream") is not True:
            return _failing("501: Not implemented: expected stream: true")
        turn = next(self.turns, None)
        if turn is None:
            return _failing("400: Invalid value: expected no more turns, got one")
        turn = turn if isinstance(turn, Turn) else turn(request)
        turn_id = turn_id or f"turn-{len(self.asked)}"
        client_tools = [tool["name"] for tool in self.agents[agent_id]["client_tools"]]
        self._awaiting[turn_id] = sum(call.name in client_tools for call in turn.last_calls)
        return turn, turn_frames(
            turn,
            client_tools=client_tools,
            answers=answers,
            turn_id=turn_id,
            session_id=session_id,
        )


_JSON: Final = {"content-type": "application/json"}
_STREAM: Final = {"content-type": "text/event-stream; charset=utf-8"}


def _failing(message: str) -> tuple[Turn, list[bytes]]:
    """What goes wrong where a stream was asked for is told within it."""
    return Turn(), [b"data: " + _json({"error": {"message": message}}) + b"\n\n"]


async def _say(stream: trio.abc.Stream, how: Turn, answer: bytes | list[bytes]) -> None:
    """Send a response, all but its violent end."""
    await trio.sleep(how.before)
    match how.instead:
        case Refusal(fault, wait, status, headers):
            code, said = _ERRORS[fault]
            head = {**_JSON, **headers} | ({} if wait is None else {"retry-after": wait})
            await stream.send_all(_whole(status or code, head, _json({"detail": said})))
        case Page(html, status):
            await stream.send_all(_whole(status, {"content-type": "text/html"}, html.encode()))
        case Cut():
            pass
        case _ if isinstance(answer, bytes):
            await stream.send_all(answer)
        case _:
            await stream.send_all(_head(_STREAM))
            await trio.sleep(how.first)
            await _say_frames(stream, how, [*answer])


@asynccontextmanager
async def open_llama_stack(
    turns: Script = (), *, making: Mapping[str, Iterable[Turn]] | None = None
) -> AsyncIterator[LlamaStack]:
    """Open a server on a free port of 127.0.0.1; leaving the context closes all of it.

    Args:
        turns: What it will say.
        making: See `LlamaStack`.
    """
    stack = LlamaStack(turns, {kind: [*ways] for kind, ways in (making or {}).items()})
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    stack.base_url = f"http://127.0.0.1:{port}/v1"
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, stack.answer, listeners)
        yield stack
        nursery.cancel_scope.cancel()
