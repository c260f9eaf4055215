"""A run, as its agent sees it: what it says, does and asks, and how each becomes events.

Knows: steps, parts, tool calls, questions, messages, values, and the limits of one run. Must never
know HTTP, dialects or readers, nor who supervises a run: what it needs of that, it asks of a
`Host`.

Everything that makes an event is sync and never blocks, so that an agent cannot be slowed down by
whoever watches it, and can still speak while it is being cancelled.
"""

import contextvars
import re
import reprlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol, assert_never

import attrs
import trio
from msgspec import UNSET, Raw, UnsetType
from msgspec.structs import replace

from .errors import (
    AgentError,
    AgentsseError,
    BadRequest,
    Conflict,
    NotAsked,
    NotFound,
    Overloaded,
    ToolError,
)
from .events import (
    NULL,
    AgentFinished,
    AgentStarted,
    AnyEvent,
    Custom,
    FinishReason,
    InputReceived,
    InputRequested,
    InputWithdrawn,
    Liveness,
    MessageReceived,
    Option,
    PartDelta,
    PartFinished,
    PartKind,
    PartStarted,
    Paused,
    Problem,
    Question,
    Resumed,
    Stalled,
    StepFinished,
    StepKind,
    StepStarted,
    ToolFinished,
    ToolOutputDelta,
    ToolStarted,
    Usage,
    ValuesChanged,
    decode_json,
    encode_json,
    well_formed,
)
from .log import Coalescer, Due
from .messages import Message, ToolSpec
from .providers import Provider
from .tools import Tool, Workers, output_to, tool

_OF_PARTS = frozenset({PartStarted, PartDelta, PartFinished})
_OF_TOOLS = frozenset({ToolStarted, ToolFinished})
_OF_OTHERS = frozenset({StepStarted, StepFinished, AgentStarted, AgentFinished})
_FOLLOWED = _OF_PARTS | _OF_TOOLS | _OF_OTHERS
MAX_HEARD = 100  # messages that wait to be heard
MAX_UNHEARD = 4 * 1024 * 1024  # characters of all of them
_YES = frozenset({"yes", "y", "true", "ok", "1"})
_NO = frozenset({"no", "n", "false", "0"})

MessageMode = Literal["steer", "follow_up"]


@attrs.frozen
class Limits:
    """The bounds within which runs live; seconds and bytes where nothing else is said.

    Attributes:
        coalesce: How long deltas of a part are held to be joined; 0 for not at all.
        grace: How long `grace` waits for somebody to come back.
        max_running: Runs at once; `max_queued` more wait their turn, then new ones are refused.
        max_events: Of one run; at this or `max_bytes` it ends with the error `limit`.
        retain_runs: Finished runs that are kept, within `retain_bytes` and `retain_age`.
        run_timeout: From a run's start to its cancel.
        input_timeout: How long a run waits for a person.
        cleanup: What `run.cleanup` shields, in all, after a cancel.
        max_threads: Worker threads of all blocking tools together.
        max_steps: Model calls in one run.
        max_tries: Of one model call, as long as nothing of it was shown.
        retry_delay: Before the second try; doubled before each further one.
        liveness: How often a run says that a step of it is still under way.
        stall: How long a model's turn may go on without any event but those.
    """

    coalesce: float = 0.05
    grace: float = 30.0
    max_running: int = 1_000
    max_queued: int = 1_000
    max_events: int = 100_000
    max_bytes: int = 64 * 1024 * 1024
    retain_runs: int = 1_000
    retain_bytes: int = 256 * 1024 * 1024
    retain_age: float = 3_600.0
    run_timeout: float = 3_600.0
    input_timeout: float = 1_800.0
    cleanup: float = 5.0
    max_threads: int = 32
    max_steps: int = 50
    max_tries: int = 6
    retry_delay: float = 2.0
    liveness: float = 10.0
    stall: float = 600.0


class Runnable(Protocol):
    """An agent, as far as its run needs to know it."""

    @property
    def name(self) -> str:
        """What clients ask for."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What `run.call` finds by name."""

    @property
    def function(self) -> Any:
        """What is called with the run."""


class Host(Protocol):
    """What a run needs of whoever supervises it."""

    def report_crash(self, error: BaseException, where: str, /) -> None:
        """Write an error that is not shown to clients, with its traceback, to the log."""

    def limit_reached(self, what: str, /) -> None:
        """The log has reached a bound: the run must end."""

    def input_changed(self) -> None:
        """The run has begun, or ceased, to wait for a person."""

    def make_child(self, agent: Any, input: Any, /) -> "Child":
        """Make a run below this one; whoever asks for it sees it to its end. Sync.

        Args:
            agent: The agent, or the name of one that the server knows.
            input: What it is given.

        Raises:
            AgentsseError: There is no such agent, or too many are below one another.
        """


class Child(Protocol):
    """A child run, as the run above it sees it."""

    @property
    def id(self) -> str:
        """Its id."""

    def begun(self) -> AgentStarted:
        """How the run above tells that it has begun."""

    def reported(self, problem: Problem | None, /) -> AgentFinished:
        """How the run above tells that it is over: its one report."""

    async def run_below(self) -> Any:
        """Run it in the calling task, to its end, and return its result.

        Raises:
            AgentError: It ended in any other way than with success.
        """


@attrs.define(eq=False)
class _Asked:
    questions: tuple[Question, ...]
    event: InputRequested
    since: float  # the loop's time
    answered: trio.Event = attrs.field(factory=trio.Event)
    answers: dict[str, Any] = attrs.field(factory=dict)  # so far
    is_declined: bool = False

    @property
    def unanswered(self) -> tuple[Question, ...]:
        return tuple(q for q in self.questions if q.id not in self.answers)


@attrs.frozen
class _Heard:
    text: str
    mode: MessageMode


@attrs.define(eq=False)
class Step:
    """A step that is under way; what is set on it stands in its `step_finished`."""

    result: Any = None
    error: Problem | None = None
    usage: Usage | None = None
    finish_reason: FinishReason | None = None


@attrs.define(eq=False)
class _Pulse:
    """Where the watch over open steps stands; times are the loop's."""

    began: float
    changed: float  # when more events were first seen
    events: int  # at that time, those that count
    beat: float  # when the last `liveness` was told
    due: Due | None = None


@attrs.define(eq=False, repr=False)
class RunContext:
    """A run, as its agent sees it.

    Attributes:
        id: The run's id.
        agent: Who runs.
        thread_id: The conversation that it belongs to, if any.
        input: What the run was given.
        metadata: What the client attached to it.
        nursery: The run's own; what is started here is part of the run, and is cancelled and
            joined with it.
        history: What was said before: in its thread, or as the client tells it.
        conversation: What is said in this run, as later runs of the thread will be told.
        said: What a model agent is told now, where that is not the input: tools' answers.
        client_tools: What the client can call, and a model agent may ask it to.
        pending: Ids of the calls that it was asked for; with them the run is over.
        instructions: What a model agent is told first, where the client says so.
        uses_tools: Whether a model agent is given its tools.
    """

    id: str
    agent: Runnable
    input: Any
    thread_id: str | None
    metadata: Any
    writer: Coalescer
    host: Host
    limiter: trio.CapacityLimiter
    providers: Mapping[str, Provider]
    limits: Limits
    history: tuple[Message, ...] = ()
    conversation: list[Message] = attrs.field(factory=list)
    said: tuple[Message, ...] | None = None
    client_tools: tuple[ToolSpec, ...] = ()
    pending: tuple[str, ...] = ()
    instructions: str | None = None
    uses_tools: bool = True
    is_full: bool = False
    nursery: trio.Nursery = attrs.field(init=False)
    usage: Usage = attrs.field(factory=Usage)
    workers: Workers = attrs.field(init=False)
    asked: dict[str, _Asked] = attrs.field(factory=dict)
    open_tools: dict[str, ToolStarted] = attrs.field(factory=dict)
    is_cancelled: bool = False
    on_step_finished: Callable[[], None] | None = None
    _open_steps: int = 0
    _pulse: "_Pulse | None" = None
    _watching: set[trio.CancelScope] = attrs.field(factory=set)
    _delegations: int = 0
    _values: dict[str, Raw] = attrs.field(factory=dict)
    _heard: list[_Heard] = attrs.field(factory=list)
    _hearing: trio.Event | None = None
    _resume: trio.Event | None = None
    _pause_reason: str | None = None
    _is_pause_told: bool = False
    _resting: int = 0  # tasks
    _beats: int = 0
    _open_others: set[str] = attrs.field(factory=set)  # keys of steps and agents
    _open_parts: dict[str, tuple[PartStarted, list[str]]] = attrs.field(factory=dict)
    _speaking: str | None = None
    _answered: set[str] = attrs.field(factory=set)
    _cleanup_until: float | None = None
    _count: int = 0
    loop_thread: int = attrs.field(factory=threading.get_ident)
    loop_token: trio.lowlevel.TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token)

    def __attrs_post_init__(self) -> None:
        self.workers = Workers(self.limiter, self.cleanup)

    # What a provider may know of it (`agentsse.providers.Caller`)

    @property
    def window(self) -> float:
        """Seconds for which deltas are joined: hearing them more often is of no use."""
        return self.writer.window

    async def sleep_until(self, when: float) -> None:
        """Wait for the loop's clock, together with all others that wait."""
        await self.writer.timer.sleep_until(when)

    def lull(self) -> None:
        """Let out what has come together; called before waiting for more. Sync."""
        self.writer.lull()

    # What an agent says

    def emit(self, name: str, /, **data: Any) -> None:
        """Report something: a `custom` event with this name and, as its value, `data` as JSON.

        It never blocks and never raises: what JSON cannot hold becomes an event named
        `agentsse.error` that says where.
        """
        self.append(_emitted(name, data))

    def text(self, delta: str) -> None:
        """Say more: text for the person, streamed as it comes, in one part until something else."""
        self._speak("text", delta)

    def reasoning(self, delta: str) -> None:
        """Think aloud: like `text`, in a part of its own kind."""
        self._speak("reasoning", delta)

    def _speak(self, kind: PartKind, delta: str) -> None:
        if self.writer.log.closed or self.is_full:
            return
        delta = well_formed(delta)
        part_id = self._speaking
        if part_id is None or self._open_parts[part_id][0].kind != kind:
            self.fall_silent()
            part_id = self._speaking = self.next_id("p")
            self.append(PartStarted(part_id=part_id, kind=kind))
        if delta:
            self.append(PartDelta(part_id=part_id, kind=kind, delta=delta))

    def fall_silent(self) -> None:
        """End the part that `text` or `reasoning` has begun, if there is one."""
        if self._speaking is not None:
            self.append(self._whole_part(self._speaking))

    def _whole_part(self, part_id: str) -> PartFinished:
        started, deltas = self._open_parts[part_id]
        return PartFinished(
            part_id=part_id,
            kind=started.kind,
            text="".join(deltas),
            name=started.name,
            call_id=started.call_id,
        )

    def append(self, event: AnyEvent) -> None:
        """Put an event into the run's log; behind its end, or its bounds, it is dropped. Sync.

        What ends something that the log tells of is never behind its bounds.
        """
        log = self.writer.log
        if log.closed or (self.is_full and not self._is_awaited(event)):
            return
        self.writer.append(event)  # raises before anything is noted
        if type(event) in _FOLLOWED:
            self._follow(event)  # type: ignore[arg-type]  # isinstance costs six times the test
        is_over = log.size >= self.limits.max_bytes or len(log.events) >= self.limits.max_events
        if is_over and not self.is_full:
            self.is_full = True
            self.host.limit_reached(f"{len(log.events)} events, {log.size} bytes")

    def hand_in(self, event: AnyEvent) -> None:
        """Append an event from whichever thread this is; from another one a moment later."""
        if threading.get_ident() == self.loop_thread:
            self.append(event)
            return
        try:
            self.loop_token.run_sync_soon(self._append_contained, event)
        except trio.RunFinishedError:
            return  # the thread outlived the event loop: there is nobody left to tell

    def _append_contained(self, event: AnyEvent) -> None:
        """Append what a thread has handed in; what it raised here would end the event loop."""
        try:
            self.append(event)
        except Exception as error:  # noqa: BLE001
            self.host.report_crash(error, "an event of a thread")

    def _is_awaited(self, event: AnyEvent) -> bool:
        """Whether it ends something that has been told to begin."""
        match event:
            case ToolFinished():
                return event.call_id in self.open_tools
            case StepFinished() | AgentFinished():
                return _key(event) in self._open_others
            case _:
                return False

    def _follow(
        self,
        event: PartStarted
        | PartDelta
        | PartFinished
        | ToolStarted
        | ToolFinished
        | StepStarted
        | StepFinished
        | AgentStarted
        | AgentFinished,
    ) -> None:
        match event:
            case PartDelta():
                if (part := self._open_parts.get(event.part_id)) is not None:
                    part[1].append(event.delta)
            case PartStarted():
                self._open_parts[event.part_id] = (event, [])
            case PartFinished():
                self._open_parts.pop(event.part_id, None)
                if event.part_id == self._speaking:
                    self._speaking = None
            case ToolStarted():
                self.open_tools[event.call_id] = event
            case ToolFinished():
                self.open_tools.pop(event.call_id, None)
            case StepStarted() | AgentStarted():
                self._open_others.add(_key(event))
            case StepFinished() | AgentFinished():
                self._open_others.discard(_key(event))
            case _:
                assert_never(event)

    def finish_parts(self, part_ids: Collection[str] | None = None) -> list[PartFinished]:
        """Finish whatever part is still open with what it holds: nothing stays half said.

        Also where the log is full: what is left to say has been said before, in pieces.

        Args:
            part_ids: Only these; None for all.
        """
        wanted = self._open_parts if part_ids is None else part_ids
        finished = [self._whole_part(part_id) for part_id in self._open_parts if part_id in wanted]
        for part in finished:
            del self._open_parts[part.part_id]
            self.writer.append(part)
            if part.part_id == self._speaking:
                self._speaking = None
        return finished

    def finish_tools(self) -> None:
        """Finish whatever tool call is still open: who began it has not."""
        said = encode_json({"error": "the run ended before the tool had answered"})
        open_tools, self.open_tools = self.open_tools, {}
        for call_id, started in open_tools.items():
            self.writer.append(
                ToolFinished(
                    call_id=call_id,
                    name=started.name,
                    result=said,
                    is_error=True,
                    source="local",
                )
            )

    # Values that clients may look at

    def set_values(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Set some of the run's values, which clients see as they change, and whenever they ask.

        Args:
            values: Names that are no identifiers go here.
            more: Anything that JSON can hold; None takes a value out.

        Behind the run's end, or its bounds, nothing changes.

        Raises:
            Unencodable: A value is something that JSON cannot hold.
        """
        changed = {name: encode_json(value, what=name) for name, value in (values or {}).items()}
        changed |= {name: encode_json(value, what=name) for name, value in more.items()}
        event = ValuesChanged(values=encode_json(changed, what="the names of values"))
        if self.writer.log.closed or self.is_full:
            return  # what is not told has not changed
        self.append(event)
        for name, value in changed.items():
            if value == NULL:
                self._values.pop(name, None)
            else:
                self._values[name] = value

    @property
    def values(self) -> dict[str, Any]:
        """The run's values, as a copy."""
        return {name: decode_json(value) for name, value in self._values.items()}

    def values_json(self) -> Raw:
        """The same as JSON."""
        return encode_json(self._values)

    # What people say to it while it goes on

    def hear(self, text: str, mode: MessageMode, *, shown: str | None = None) -> None:
        """Take a message in; the agent hears it at its next turn. Sync.

        Args:
            text: What the agent is told.
            mode: `steer` for as soon as it can be, `follow_up` for when it would have ended.
            shown: What the stream shows of it; the text unless given.

        Raises:
            Conflict: The run is over or being cancelled, or still waits for its turn.
            Overloaded: It has not listened for long.
        """
        log = self.writer.log
        if log.closed or not log.events or self.is_cancelled:
            where = "still waits for its turn" if not log.events else "is over, or about to be"
            raise Conflict(f"expected a run that goes on, got {self.id}, which {where}")
        waiting = sum(len(heard.text) for heard in self._heard) if self._heard else 0
        if len(self._heard) >= MAX_HEARD or waiting + len(text) > MAX_UNHEARD:
            raise Overloaded(
                f"expected at most {MAX_HEARD} messages, of {MAX_UNHEARD} characters, that the run "
                "has not heard yet; wait until it has"
            )
        self.tell_of_message(text if shown is None else shown, mode)
        self._heard.append(_Heard(well_formed(text), mode))
        if self._hearing is not None:
            self._hearing.set()
            self._hearing = None

    @property
    def has_unheard(self) -> bool:
        """Whether something was said that it has not taken yet."""
        return bool(self._heard)

    def tell_of_message(self, shown: str, mode: MessageMode) -> None:
        """Show that somebody has said something."""
        message_id = self.next_id("u")
        self.append(MessageReceived(message_id=message_id, text=well_formed(shown), mode=mode))

    def take_messages(self, mode: MessageMode | None = None) -> list[str]:
        """Take what was said to the run since it last listened; of one mode, or all. Sync."""
        taken = [heard.text for heard in self._heard if mode in (None, heard.mode)]
        self._heard = [heard for heard in self._heard if mode not in (None, heard.mode)]
        return taken

    async def next_message(self) -> str:
        """Wait for the next thing that somebody says to the run, whichever its mode.

        Cancelling it loses nothing.
        """
        await trio.lowlevel.checkpoint()
        while not self._heard:
            if self._hearing is None:
                self._hearing = trio.Event()
            await self._hearing.wait()
        return self._heard.pop(0).text

    def pause(self, reason: str | None = None) -> None:
        """Ask the run to rest before its next step. Sync; `paused` is told when it does."""
        if self._resume is None:
            self._resume, self._pause_reason = trio.Event(), reason

    def resume(self) -> None:
        """Let the run go on. Sync; `resumed` is told if `paused` was."""
        if self._resume is not None:
            self._resume.set()
            self._resume = None
        if self._is_pause_told:  # before anything that follows from it
            self._is_pause_told = False
            self.append(Resumed())

    @property
    def is_paused(self) -> bool:
        """Whether it was asked to rest, and not yet to go on."""
        return self._resume is not None

    @property
    def is_resting(self) -> bool:
        """Whether it does, in one of its tasks at least."""
        return self._resting > 0 and self._resume is not None

    async def rest_while_paused(self) -> bool:
        """Rest here if the run was paused; models and flows do so before each step.

        Cancelled, it tells nothing: the run is not let go on by that.

        Returns:
            Whether it has rested.
        """
        await trio.lowlevel.checkpoint()
        has_rested = False
        self._resting += 1
        try:
            while self._resume is not None:
                has_rested = True
                if not self._is_pause_told:  # else another of its tasks has said so
                    self._is_pause_told = True
                    reason = self._pause_reason
                    self.append(Paused(reason=reason and well_formed(reason)))
                await self._resume.wait()
        finally:
            self._resting -= 1
        return has_rested

    # What an agent does

    @contextmanager
    def step(self, name: str, *, kind: StepKind = "node") -> Iterator[Step]:
        """Name a stretch of the run; an error in it stands in its `step_finished` and goes on."""
        self.fall_silent()
        step_id, step = self.next_id("s"), Step()
        self.append(StepStarted(step_id=step_id, kind=kind, name=name))
        self._open_steps += 1
        if self._pulse is None:
            self._begin_pulse()
        problem: Problem | None = None
        result: Raw | UnsetType = UNSET
        try:
            yield step
            if step.result is not None:
                result = encode_json(step.result, what="step.result")
        except BaseException as error:
            problem = problem_of(error, f"the step {name!r}")
            raise
        finally:
            self._open_steps -= 1
            if not self._open_steps:
                self._end_pulse()
            self.fall_silent()
            self.append(
                StepFinished(
                    step_id=step_id,
                    kind=kind,
                    name=name,
                    result=result,
                    error=problem or step.error,
                    usage=step.usage,
                    finish_reason=step.finish_reason,
                )
            )
            if self.on_step_finished is not None:
                self.on_step_finished()

    def _begin_pulse(self) -> None:
        now = trio.current_time()
        self._pulse = _Pulse(now, now, len(self.writer.log.events) - self._beats, now)
        self._await_pulse(self._pulse)

    def _end_pulse(self) -> None:
        if self._pulse is not None and self._pulse.due is not None:
            self._pulse.due.cancel()
        self._pulse = None

    def _await_pulse(self, pulse: _Pulse) -> None:
        limits = self.limits
        interval = min(limits.liveness, limits.stall / 3)
        when = trio.current_time() + interval
        pulse.due = self.writer.timer.call_at(when, lambda: self._feel_pulse(pulse))

    def _feel_pulse(self, pulse: _Pulse) -> None:
        """Tell that a step is under way, and see whether anything has happened.

        Events are counted here, now and then: nothing on their way pays for it.
        """
        now, count = trio.current_time(), len(self.writer.log.events) - self._beats
        # A person may take their time, and a child run has a watch of its own.
        is_waiting = bool(self.asked) or self.is_resting
        if count != pulse.events or is_waiting or self._delegations:
            pulse.changed, pulse.events = now, count
        idle = now - pulse.changed
        if now - pulse.beat >= self.limits.liveness and not is_waiting:
            pulse.beat = now
            self._beats += 1
            self.append(
                Liveness(
                    elapsed_s=round(now - pulse.began, 3),
                    events=count,
                    since_last_output_s=round(idle, 3),
                )
            )
        if idle >= self.limits.stall and self._watching:
            self.append(Stalled(idle_s=round(idle, 3), limit_s=self.limits.stall))
            for scope in self._watching:
                scope.cancel(reason="stalled")
            pulse.changed = now
        self._await_pulse(pulse)

    @contextmanager
    def watched(self) -> Iterator[trio.CancelScope]:
        """Watch over a stretch of a step: it is cancelled when nothing happens in the run.

        That is when no event has come for as long as `limits.stall`, but those that only say that
        the step is under way, while no person was asked and no child run was waited for.
        """
        with trio.CancelScope() as scope:
            self._watching.add(scope)
            if self._pulse is not None:
                self._pulse.changed = trio.current_time()
            try:
                yield scope
            finally:
                self._watching.discard(scope)

    @property
    def is_in_step(self) -> bool:
        """Whether a step is open."""
        return self._open_steps > 0

    @contextmanager
    def cleanup(self) -> Iterator[trio.CancelScope]:
        """Shield what must still be done, for a bounded time.

        An await in a `finally` is cancelled at once when the run is; inside of this it is not, for
        5 s in all per run, counted from the first cleanup after the cancel. When that time is up
        the block is left like any `move_on` scope, and the log says so.

        Raises:
            trio.TooSlowError: It took as long in a run that nobody has cancelled.
        """
        until = trio.current_time() + self.limits.cleanup
        if self.is_cancelled:
            if self._cleanup_until is None:
                self._cleanup_until = until
            until = self._cleanup_until
        with trio.CancelScope(shield=True, deadline=until) as scope:
            yield scope
        if scope.cancelled_caught:
            too_slow = trio.TooSlowError(f"the cleanup took longer than {self.limits.cleanup:g} s")
            if not self.is_cancelled:
                raise too_slow
            self.host.report_crash(too_slow, "the cleanup")

    async def call(
        self,
        tool: Tool | str,
        arguments: Mapping[str, Any] | str,
        *,
        call_id: str | None = None,
        among: Sequence[Tool] | None = None,
    ) -> Any:
        """Call a tool, and show the call and its result in the stream.

        Args:
            tool: The tool, or the name of one.
            arguments: By name; or JSON text, as a model writes it.
            call_id: Made here unless the model made one.
            among: Where the name is looked up; the agent's own tools unless given.

        Returns:
            What the tool returned.

        Raises:
            ToolError: The arguments do not fit, the tool said no, took too long, or crashed; what
                it says has been streamed already.
            AgentError: The run is over.
        """
        self._see_that_it_goes_on()
        self.fall_silent()
        call_id = call_id or self.next_id("c")
        name = tool.name if isinstance(tool, Tool) else tool
        self.append(ToolStarted(call_id=call_id, name=name, arguments=_shown(arguments)))
        result: Raw = NULL
        is_error = True
        is_over = threading.Event()

        def show(delta: str) -> None:
            if not is_over.is_set():  # a thread may write on when nobody waits for it any more
                self.hand_in(ToolOutputDelta(call_id=call_id, delta=well_formed(delta)))

        try:
            with output_to(show):
                value = await self._call(
                    tool, arguments, self.agent.tools if among is None else among
                )
            result, is_error = encode_json(value, what=f"the result of {name}"), False
        except trio.Cancelled as error:
            result = encode_json({"error": problem_of(error, f"the tool {name!r}").message})
            raise
        except Exception as error:
            message = problem_of(error, f"the tool {name!r}").message
            result = encode_json({"error": message})
            if isinstance(error, ToolError):
                raise
            if not isinstance(error, AgentsseError):
                self.host.report_crash(error, f"the tool {name!r}")
            raise ToolError(message) from error
        finally:
            # A group that holds Cancelled beside an error passes here too, and goes on as it is.
            is_over.set()
            self.append(
                ToolFinished(
                    call_id=call_id, name=name, result=result, is_error=is_error, source="local"
                )
            )
        return value

    async def _call(
        self, tool: Tool | str, arguments: Mapping[str, Any] | str, among: Sequence[Tool]
    ) -> Any:
        if isinstance(tool, str):
            known = {t.name: t for t in among}
            if tool not in known:
                await trio.lowlevel.checkpoint()
                raise ToolError(
                    f"expected one of the tools {', '.join(known) or '(none)'}, got {tool!r}"
                )
            tool = known[tool]
        return await tool.call(tool.decode(arguments), self.workers)

    async def ask(self, questions: str | Question | Sequence[Question]) -> Any:
        """Ask a person, and wait for the answer.

        While a run waits, leaving never cancels it; the input timeout does. Who does not want to
        wait that long puts `trio.move_on_after` around it: the question is then withdrawn.

        Args:
            questions: A prompt for free text, a question, or several.

        Returns:
            The answer, where one thing was asked; else answers by question id.

        Raises:
            AgentError: The run is over; or, with the code `declined`, the person does not want to
                say. A confirmation that is declined is a no.
        """
        self._see_that_it_goes_on()
        self.fall_silent()
        single = isinstance(questions, str | Question)
        if isinstance(questions, str):
            questions = Question(id="answer", kind="text", prompt=questions)
        if isinstance(questions, Question):
            questions = [questions]
        request_id = self.next_id("q")
        request = InputRequested(request_id=request_id, questions=tuple(questions))
        asked = _Asked(tuple(questions), request, trio.current_time())
        self.append(request)
        self.asked[request_id] = asked
        self.host.input_changed()
        try:
            await asked.answered.wait()
        finally:
            if self.asked.pop(request_id, None) is not None:
                if not self.is_cancelled:
                    self.append(InputWithdrawn(request_id=request_id))
                self.host.input_changed()
        if asked.is_declined:
            raise AgentError("the person has declined to answer", code="declined", status=409)
        return asked.answers[questions[0].id] if single else asked.answers

    def answer(
        self, request_id: str, answers: Mapping[str, Any], *, is_loose: bool = False
    ) -> None:
        """Hand in the answers to a request; the first to do so wins. Sync.

        Args:
            request_id: Of an open request.
            answers: By question id.
            is_loose: They come from somebody who does not know the questions well: `"yes"` will do
                for a confirmation, an option's label for its id, the key `""` for the only
                question, and what is missing may come later.

        Raises:
            NotFound: Nothing of that id is being asked.
            NotAsked: It has been answered already.
            BadRequest: The answers do not fit the questions.
        """
        asked = self._find_asked(request_id)
        if is_loose:
            given = asked.answers | fitted_answers(asked.questions, answers)
        else:
            check_answers(asked.questions, answers)
            given = dict(answers)
        encoded = encode_json(given, what="the answers")  # raises before anything is noted
        asked.answers = given
        if len(given) < len({question.id for question in asked.questions}):
            return
        self._note_answer(asked, InputReceived(request_id=request_id, answers=encoded))

    def answer_several(self, answers: Mapping[str, Any]) -> None:
        """Answer open requests with what somebody has said to each: all of it, or none. Sync.

        Args:
            answers: By request id, or under `""` where there is one, loose: to one question its
                answer, to several an object; None where the person does not want to say.

        Raises:
            NotFound, NotAsked, BadRequest: As `answer`.
        """
        fitting = {}
        if list(answers) == [""] and len(self.asked) == 1:
            answers = {next(iter(self.asked)): answers[""]}
        if not answers or "" in answers:
            raise BadRequest(
                f"answers: expected some, by request id ({', '.join(self.asked)}), "
                f"got {'one without' if answers else 'none'}"
            )
        for request_id, said in answers.items():
            asked = self._find_asked(request_id)
            if said is None and all(question.kind == "confirm" for question in asked.questions):
                fitting[request_id] = {question.id: False for question in asked.questions}
            elif said is not None:
                fitting[request_id] = given = fitted_answers(asked.questions, _by_id(asked, said))
                encode_json(given, what="the answers")
                missing = {q.id for q in asked.questions} - set(asked.answers) - set(given)
                if missing:
                    raise BadRequest(
                        f"answers: expected {', '.join(sorted(missing))} as well, got none"
                    )
        for request_id in answers:
            if request_id in fitting:
                self.answer(request_id, fitting[request_id], is_loose=True)
            else:
                asked = self._find_asked(request_id)
                asked.is_declined = True
                self._note_answer(asked, InputWithdrawn(request_id=request_id))

    def _find_asked(self, request_id: str) -> _Asked:
        if request_id in self._answered:
            raise NotAsked(f"the request {request_id!r} has been answered already")
        asked = self.asked.get(request_id)
        if asked is None:
            raise NotFound(
                f"expected the id of an open request ({', '.join(self.asked) or 'there is none'}), "
                f"got {request_id[:80]!r}"
            )
        return asked

    def _note_answer(self, asked: _Asked, event: InputReceived | InputWithdrawn) -> None:
        # From here on it is answered, whatever happens before `ask` gets to run again.
        del self.asked[event.request_id]
        self._answered.add(event.request_id)
        self.append(event)
        asked.answered.set()
        self.host.input_changed()

    def open_questions(self) -> tuple[InputRequested, ...]:
        """What waits for an answer, without what has been answered of it already."""
        return tuple(
            replace(asked.event, questions=asked.unanswered) if asked.answers else asked.event
            for asked in self.asked.values()
        )

    def answer_next(self, said: Any, *, is_whole: bool = False) -> None:
        """Answer the oldest open request with what somebody has said: text, or answers by id.

        Args:
            said: To several questions also lines of `id: answer` or `[id]: answer`. Those that it
                leaves open may be answered later.
            is_whole: Nothing more will come.

        Raises:
            NotAsked: Nothing is being asked.
            BadRequest: It does not fit.
        """
        if not self.asked:
            raise NotAsked(f"expected a run that waits for a person, got {self.id}, which does not")
        request_id, asked = next(iter(self.asked.items()))
        given = _by_id(asked, said)
        missing = {q.id for q in asked.questions} - set(asked.answers) - set(given)
        if missing and is_whole and list(given) != [""]:
            raise BadRequest(f"answers: expected {', '.join(sorted(missing))} as well, got none")
        self.answer(request_id, given, is_loose=True)

    def dissolve(self) -> None:
        """Forget what an agent needs, once the run is over.

        References in a circle would keep a run beyond its retention until the collector comes by.
        """
        del self.host, self.workers
        with suppress(AttributeError):  # a run that never ran has none
            del self.nursery  # its task knows the context of the run above
        self.on_step_finished = None
        self._end_pulse()
        self.writer.forget()
        self.history, self.conversation, self.said = (), [], None
        self.client_tools, self.instructions = (), None
        self.input = self.metadata = None  # JSON of both is in the run, and takes less room
        self.asked.clear()
        self._open_parts.clear()
        self.open_tools.clear()
        self._open_others.clear()

    async def delegate(self, agent: Runnable | str, input: Any) -> Any:
        """Run another agent as a child of this run, and return its result.

        Its events are in a log of its own; here only its start and its end are told.

        Raises:
            AgentError: It ended in any other way than with success, and says how; or this run is
                over.
        """
        self._see_that_it_goes_on()
        self.fall_silent()
        child = self.host.make_child(agent, input)
        self.append(child.begun())
        self._delegations += 1
        try:
            return await self._see_to_its_end(child)
        finally:
            self._delegations -= 1

    def spawn(self, agent: Runnable | str, input: Any) -> str:
        """Start another agent as a child of this run, beside whatever goes on; its run's id.

        It ends with this run at the latest, and this run with it. How it went is told by its one
        `agent_finished`; if it fails, that is all that happens. Sync.

        Raises:
            AgentsseError: There is no such agent, or this run is over.
        """
        self._see_that_it_goes_on()
        child = self.host.make_child(agent, input)
        self.nursery.start_soon(self._see_to_its_end_alone, child, name=f"worker {child.id}")
        self.append(child.begun())
        return child.id

    async def _see_to_its_end(self, child: Child) -> Any:
        problem: Problem | None = None
        try:
            return await child.run_below()
        except BaseException as error:
            problem = problem_of(error, "the child run")
            raise
        finally:
            self.append(child.reported(problem))

    async def _see_to_its_end_alone(self, child: Child) -> None:
        # `suppress` would keep the group that a cancel comes in, and that its own frame.
        try:
            await self._see_to_its_end(child)
        except AgentError:
            return  # it stands in the report

    def _see_that_it_goes_on(self) -> None:
        if self.writer.log.closed:
            raise AgentError(
                f"expected a run that goes on, got {self.id}, which is over; "
                "whoever uses it is to be part of it: start such tasks in its nursery"
            )

    def next_id(self, letter: str) -> str:
        """An id that nothing else in this run has."""
        self._count += 1
        return f"{letter}{self._count}"


_current: contextvars.ContextVar[RunContext | None] = contextvars.ContextVar(
    "agentsse.run", default=None
)


def current_run() -> RunContext | None:
    """The run that the calling code is part of, if it is part of one."""
    return _current.get()


@contextmanager
def running(context: RunContext) -> Iterator[None]:
    """Make `context` the current run of this task, and of all that is started below it."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def emit(name: str, /, **data: Any) -> None:
    """Report something from anywhere below an agent: a function, a child task, a tool's thread.

    Outside of a run it does nothing. It never blocks and never raises.

    Args:
        name: What clients know it by.
        data: Anything that JSON can hold; encoded here and now.
    """
    context = _current.get()
    if context is None:
        return
    if threading.get_ident() == context.loop_thread:
        context.append(_emitted(name, data))
    else:
        context.hand_in(_emitted(name, data))


def _emitted(name: str, data: dict[str, Any]) -> Custom:
    try:
        if not (isinstance(name, str) and name and name.isprintable()):
            raise BadRequest(
                f"emit: expected a name of printable characters, got {ascii(name)[:80]}"
            )
        return Custom(name=name, value=encode_json(data, what=name))
    except AgentsseError as error:
        return Custom(name="agentsse.error", value=encode_json(problem_of(error, "emit")))


def _key(event: StepStarted | StepFinished | AgentStarted | AgentFinished) -> str:
    """What the beginning and the end of a step, or of an agent, have in common."""
    if isinstance(event, StepStarted | StepFinished):
        return event.step_id
    return event.child_run_id or f"agent {event.agent}"


def problem_of(error: BaseException, where: str) -> Problem:
    """What of an error may be shown: the words of our own, of others only the name of the type."""
    error = unwrapped(error)
    match error:
        case AgentsseError():
            return Problem(
                code=well_formed(str(error.code)),
                message=well_formed(error.message),
                status=error.status if isinstance(error.status, int) else 500,
            )
        case trio.Cancelled():
            return Problem(code="cancelled", message=f"{where} was cancelled", status=499)
        case SystemExit():
            return Problem(
                code="system_exit",
                message=f"{where} tried to end the process; raise an error instead",
                status=500,
            )
        case _:
            return Problem(
                code="crashed",
                message=f"{where} raised {type(error).__name__}; the server's log has the details",
                status=500,
            )


def _by_id(asked: _Asked, said: Any) -> Mapping[str, Any]:
    """What was said by question id, or under `""` where there is one question.

    Raises:
        BadRequest: It cannot be told what is meant to answer which.
    """
    ids = {question.id for question in asked.questions}
    if isinstance(said, str) and len(ids) > 1:
        said = _by_lines(said) or said
    if isinstance(said, Mapping) and said and set(said) <= ids:
        return said
    if len(ids) > 1:
        raise BadRequest(
            f"expected answers to {', '.join(sorted(ids))}, as an object or as lines of "
            f"'id: answer', got {reprlib.repr(said)}"
        )
    return {"": said}


def check_answers(questions: Sequence[Question], answers: Mapping[str, Any]) -> None:
    """See that answers fit their questions: all of them, and nothing else.

    Raises:
        BadRequest: Says which does not, and what was expected.
    """
    ids = [question.id for question in questions]
    if set(answers) != set(ids):
        raise BadRequest(
            f"answers: expected the keys {', '.join(ids)}, got {', '.join(answers) or 'none'}"
        )
    for question in questions:
        given = answers[question.id]
        match question.kind:
            case "text":
                fits, expected = isinstance(given, str), "a string"
            case "confirm":
                fits, expected = isinstance(given, bool), "true or false"
            case "choice":
                options = [option.id for option in question.options]
                fits, expected = given in options, f"one of {', '.join(options)}"
            case "choices":
                options = [option.id for option in question.options]
                fits = isinstance(given, list) and all(each in options for each in given)
                expected = f"a list of some of {', '.join(options)}"
            case _:
                assert_never(question.kind)
        if not fits:
            raise BadRequest(f"expected {expected} for {question.id!r}, got {given!r}")


def fitted_answers(questions: Sequence[Question], answers: Mapping[str, Any]) -> dict[str, Any]:
    """Make answers fit their questions where it is clear what they mean.

    Raises:
        BadRequest: Says which does not, and what was expected.
    """
    by_id = {question.id: question for question in questions}
    if list(answers) == [""] and len(questions) == 1:
        answers = {questions[0].id: answers[""]}
    unknown = set(answers) - set(by_id)
    if unknown or not answers:
        raise BadRequest(
            f"answers: expected some of the keys {', '.join(by_id)}, got "
            f"{', '.join(sorted(unknown)) or 'none'}"
        )
    fitted = {name: _fitted(by_id[name], value) for name, value in answers.items()}
    check_answers([by_id[name] for name in fitted], fitted)
    return fitted


_LINE = re.compile(r"(?:\[([^\]]{1,200})\]|([\w.-]{1,200})):(.*)")


def _by_lines(text: str) -> dict[str, str] | None:
    """Answers by question id, where each line of a text is one."""
    found = [_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
    if not all(found):
        return None
    return {match[1] or match[2]: match[3].strip() for match in found if match}


def _fitted(question: Question, value: Any) -> Any:
    match question.kind:
        case "text":
            if value is None or isinstance(value, str):
                return value
            return bytes(encode_json(value)).decode()
        case "confirm":
            word = value.strip().lower() if isinstance(value, str) else None
            return True if word in _YES else False if word in _NO else value
        case "choice":
            return _option(question.options, value)
        case "choices":
            several = [value] if isinstance(value, str) else value
            if not isinstance(several, list):
                return value
            fitted = [_option(question.options, each) for each in several]
            if isinstance(value, str) and fitted[0] not in [o.id for o in question.options]:
                fitted = [_option(question.options, each) for each in value.split(",")]
            return fitted
        case _:
            assert_never(question.kind)


def _option(options: Sequence[Option], value: Any) -> Any:
    """The id of the option that is meant, by its id or its label."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    for option in options:
        if value == option.id:
            return value
    for option in options:
        if word in (option.id.lower(), (option.label or option.id).lower()):
            return option.id
    return value


def unwrapped(error: BaseException) -> BaseException:
    """The one error of a group that holds only one, at any depth, cancels beside it left aside."""
    while isinstance(error, BaseExceptionGroup):
        _, real = error.split(trio.Cancelled)
        if real is not None and len(real.exceptions) > 1:
            return real
        error = (real or error).exceptions[0]
    return error


def _shown(arguments: Mapping[str, Any] | str) -> Raw:
    """Arguments as JSON for the stream, also where the model did not write any."""
    if isinstance(arguments, str):
        try:
            return encode_json(decode_json(arguments or "{}"))
        except AgentsseError:
            return encode_json(well_formed(arguments))
    try:
        return encode_json(arguments)
    except AgentsseError:
        return encode_json(repr(arguments))


@tool(seconds=None)
async def ask_user(question: str, options: list[str] | None = None) -> str:
    """Ask the person you work for, and wait for the answer.

    Args:
        question: What you want to know.
        options: What can be answered; leave it out for free text.
    """
    run = _current.get()
    if run is None:
        raise AgentError("ask_user: expected to be called within a run, got none")
    if not options:
        return str(await run.ask(question))
    offered = tuple(Option(id=option) for option in options)
    asked = Question(id="answer", kind="choice", prompt=question, options=offered)
    return str(await run.ask(asked))
