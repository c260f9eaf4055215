"""What runs: agents, the run that they are given, and the loop of a model that calls tools.

Knows: steps, parts, tool calls, questions, and how each becomes events. Must never know HTTP,
dialects or readers, nor who supervises a run: what it needs of that, it asks of a `Host`.

Everything that makes an event is sync and never blocks, so that an agent cannot be slowed down by
whoever watches it, and can still speak while it is being cancelled.
"""

import contextvars
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Protocol, assert_never, overload

import attrs
import trio
from msgspec import UNSET, Raw, UnsetType

from .errors import AgentError, AgentsseError, BadRequest, Conflict, NotFound, ToolError
from .events import (
    NULL,
    AgentFinished,
    AgentStarted,
    AnyEvent,
    Custom,
    FinishReason,
    InputReceived,
    InputRequested,
    PartDelta,
    PartFinished,
    PartKind,
    PartStarted,
    Problem,
    Question,
    StepFinished,
    StepKind,
    StepStarted,
    ToolFinished,
    ToolStarted,
    Usage,
    decode_json,
    encode_json,
)
from .log import Coalescer
from .providers import (
    AssistantMessage,
    Finish,
    Message,
    Prompt,
    Provider,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from .tools import Tool, Toolset, Workers, gather

_OF_PARTS = frozenset({PartStarted, PartDelta, PartFinished})
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # fits into a path, and is no `..`

AgentFunction = Callable[["RunContext", Any], Awaitable[Any]]


@attrs.frozen(eq=False)
class Agent:
    """What can be run: an async function, or a model with instructions and tools.

    Attributes:
        name: What clients ask for; letters, digits, `-`, `_` and `.`.
        function: Called with the run and its input (JSON as Python's plain types); what it returns
            is the result, and must be JSON too.
        tools: What `run.call` finds by name, and what a model may call: tools, and sets of them.
        on_disconnect: `cancel`, `continue`, `grace` or `grace:SECONDS`; None leaves it to the
            dialect and the request.
        max_running: How many runs of it may run at once; None for no limit of its own.
        timeout: Seconds that a run may take; None for the server's own limit.
    """

    name: str = attrs.field()
    function: AgentFunction
    description: str = ""
    tools: tuple[Tool, ...] = attrs.field(default=(), converter=gather)
    on_disconnect: str | None = None
    max_running: int | None = None
    timeout: float | None = None
    model: str | None = None

    @name.validator
    def _see_name(self, _attribute: object, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ValueError(
                "expected an agent's name of 1 to 64 letters, digits, '-', '_' and '.', "
                f"got {name!r}"
            )

    @classmethod
    def of_model(
        cls,
        name: str,
        model: str,
        *,
        instructions: str = "",
        tools: Iterable[Tool | Toolset] = (),
        provider: Provider | None = None,
        **settings: Any,
    ) -> "Agent":
        """Make an agent of a model.

        Args:
            name: What clients ask for.
            model: `provider:model`, the provider's name being one that the server knows.
            instructions: What the model is told first.
            tools: What it may call.
            provider: The provider itself, where the server does not know it by name.
            settings: Any other attribute of an agent.
        """
        if ":" not in model:
            raise ValueError(f"agent {name!r}: expected a model as PROVIDER:MODEL, got {model!r}")
        loop = _ModelLoop(model, instructions=instructions, provider=provider)
        return cls(name, loop, tools=tools, model=model, **settings)

    @property
    def has_own_provider(self) -> bool:
        """Whether its model comes from a provider that it brought along."""
        return isinstance(self.function, _ModelLoop) and self.function.provider is not None

    async def __call__(self, run: "RunContext", input: Any) -> Any:
        """Call the function itself, in the caller's run."""
        return await self.function(run, input)


@overload
def agent(function: AgentFunction, /) -> Agent: ...
@overload
def agent(
    *, name: str | None = ..., tools: Iterable[Tool | Toolset] = ..., **settings: Any
) -> Callable[[AgentFunction], Agent]: ...
def agent(
    function: AgentFunction | None = None,
    /,
    *,
    name: str | None = None,
    tools: Iterable[Tool | Toolset] = (),
    **settings: Any,
) -> Agent | Callable[[AgentFunction], Agent]:
    """Make an agent of an async function of two arguments, the run and its input.

    Args:
        function: Where the decorator stands without parentheses.
        name: The function's own name unless given.
        tools: What `run.call` finds by name.
        settings: Any other attribute of `Agent`.
    """

    def decorate(function: AgentFunction) -> Agent:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(
                f"expected an async function for an agent, got {function!r}: write 'async def'"
            )
        described = {"description": inspect.getdoc(function) or ""} | settings
        return Agent(name or function.__name__, function, tools=tools, **described)

    return decorate if function is None else decorate(function)


class Host(Protocol):
    """What a run needs of whoever supervises it."""

    def report_crash(self, error: BaseException, where: str, /) -> None:
        """Write an error that is not shown to clients, with its traceback, to the log."""

    def limit_reached(self, what: str, /) -> None:
        """The log has reached a bound: the run must end."""

    def input_changed(self) -> None:
        """The run has begun, or ceased, to wait for a person."""

    async def run_child(
        self, agent: "Agent | str", input: Any, *, started: Callable[[str, str], None]
    ) -> Any:
        """Run another agent below this one, and return its result.

        Args:
            agent: The agent, or the name of one that the server knows.
            input: What it is given.
            started: Called with the child's agent and run id before its first step.

        Raises:
            AgentError: It ended in any other way than with success.
        """


@attrs.define(eq=False)
class _Asked:
    questions: tuple[Question, ...]
    event: InputRequested
    since: float  # the loop's time
    answered: trio.Event = attrs.field(factory=trio.Event)
    answers: dict[str, Any] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Step:
    """A step that is under way; what is set on it stands in its `step_finished`."""

    result: Any = None
    usage: Usage | None = None
    finish_reason: FinishReason | None = None


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
    """

    id: str
    agent: Agent
    input: Any
    thread_id: str | None
    metadata: Any
    writer: Coalescer
    host: Host
    limiter: trio.CapacityLimiter
    providers: Mapping[str, Provider]
    cleanup_seconds: float
    max_steps: int
    max_events: int
    max_bytes: int
    is_full: bool = False
    nursery: trio.Nursery = attrs.field(init=False)
    usage: Usage = attrs.field(factory=Usage)
    workers: Workers = attrs.field(init=False)
    asked: dict[str, _Asked] = attrs.field(factory=dict)
    is_cancelled: bool = False
    on_step_finished: Callable[[], None] | None = None
    _open_steps: int = 0
    _open_parts: dict[str, tuple[PartStarted, list[str]]] = attrs.field(factory=dict)
    _speaking: str | None = None
    _answered: set[str] = attrs.field(factory=set)
    _cleanup_until: float | None = None
    _count: int = 0
    loop_thread: int = attrs.field(factory=get_ident)
    loop_token: trio.lowlevel.TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token)

    def __attrs_post_init__(self) -> None:
        self.workers = Workers(self.limiter, self.cleanup)

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
        delta = _well_formed(delta)
        part_id = self._speaking
        if part_id is None or self._open_parts[part_id][0].kind != kind:
            self._fall_silent()
            part_id = self._speaking = self._next("p")
            self.append(PartStarted(part_id=part_id, kind=kind))
        if delta:
            self.append(PartDelta(part_id=part_id, kind=kind, delta=delta))

    def _fall_silent(self) -> None:
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
        """Put an event into the run's log; behind its end, or its bounds, it is dropped. Sync."""
        log = self.writer.log
        if log.closed or self.is_full:
            return
        self.writer.append(event)  # raises before anything is noted
        if type(event) in _OF_PARTS:
            self._follow_part(event)  # type: ignore[arg-type]  # isinstance costs six times the test
        if log.size >= self.max_bytes or len(log.events) >= self.max_events:
            self.is_full = True
            self.host.limit_reached(f"{len(log.events)} events, {log.size} bytes")

    def _follow_part(self, event: PartStarted | PartDelta | PartFinished) -> None:
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
            case _:
                assert_never(event)

    def finish_parts(self) -> None:
        """Finish whatever part is still open with what it holds: nothing stays half said.

        Also where the log is full: what is left to say has been said before, in pieces.
        """
        for part_id in list(self._open_parts):
            self.writer.append(self._whole_part(part_id))
        self._open_parts.clear()
        self._speaking = None

    # What an agent does

    @contextmanager
    def step(self, name: str, *, kind: StepKind = "node") -> Iterator[Step]:
        """Name a stretch of the run; an error in it stands in its `step_finished` and goes on."""
        self._fall_silent()
        step_id, step = self._next("s"), Step()
        self.append(StepStarted(step_id=step_id, kind=kind, name=name))
        self._open_steps += 1
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
            self._fall_silent()
            self.append(
                StepFinished(
                    step_id=step_id,
                    kind=kind,
                    name=name,
                    result=result,
                    error=problem,
                    usage=step.usage,
                    finish_reason=step.finish_reason,
                )
            )
            if self.on_step_finished is not None:
                self.on_step_finished()

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
        until = trio.current_time() + self.cleanup_seconds
        if self.is_cancelled:
            if self._cleanup_until is None:
                self._cleanup_until = until
            until = self._cleanup_until
        with trio.CancelScope(shield=True, deadline=until) as scope:
            yield scope
        if scope.cancelled_caught:
            too_slow = trio.TooSlowError(f"the cleanup took longer than {self.cleanup_seconds:g} s")
            if not self.is_cancelled:
                raise too_slow
            self.host.report_crash(too_slow, "the cleanup")

    async def call(
        self, tool: Tool | str, arguments: Mapping[str, Any] | str, *, call_id: str | None = None
    ) -> Any:
        """Call a tool, and show the call and its result in the stream.

        Args:
            tool: The tool, or the name of one of the agent's.
            arguments: By name; or JSON text, as a model writes it.
            call_id: Made here unless the model made one.

        Returns:
            What the tool returned.

        Raises:
            ToolError: The arguments do not fit, the tool said no, took too long, or crashed; what
                it says has been streamed already.
        """
        self._fall_silent()
        call_id = call_id or self._next("c")
        name = tool.name if isinstance(tool, Tool) else tool
        self.append(ToolStarted(call_id=call_id, name=name, arguments=_shown(arguments)))
        result: Raw = NULL
        is_error = True
        try:
            value = await self._call(tool, arguments)
            result, is_error = encode_json(value, what=f"the result of {name}"), False
        except trio.Cancelled as error:
            result = encode_json({"error": problem_of(error, f"the tool {name!r}").message})
            raise
        except Exception as error:
            message = problem_of(error, f"the tool {name!r}").message
            result = encode_json({"error": message})
            if not isinstance(error, AgentsseError):
                self.host.report_crash(error, f"the tool {name!r}")
            raise ToolError(message) from error
        finally:
            # A group that holds Cancelled beside an error passes here too, and goes on as it is.
            self.append(
                ToolFinished(
                    call_id=call_id, name=name, result=result, is_error=is_error, source="local"
                )
            )
        return value

    async def _call(self, tool: Tool | str, arguments: Mapping[str, Any] | str) -> Any:
        if isinstance(tool, str):
            known = {t.name: t for t in self.agent.tools}
            if tool not in known:
                await trio.lowlevel.checkpoint()
                raise ToolError(
                    f"expected one of the tools {', '.join(known) or '(none)'}, got {tool!r}"
                )
            tool = known[tool]
        return await tool.call(tool.decode(arguments), self.workers)

    async def ask(self, questions: str | Question | Sequence[Question]) -> Any:
        """Ask a person, and wait for the answer.

        While a run waits, leaving never cancels it; the input timeout does.

        Args:
            questions: A prompt for free text, a question, or several.

        Returns:
            The answer, where one thing was asked; else answers by question id.
        """
        self._fall_silent()
        single = isinstance(questions, str | Question)
        if isinstance(questions, str):
            questions = Question(id="answer", kind="text", prompt=questions)
        if isinstance(questions, Question):
            questions = [questions]
        request_id = self._next("q")
        request = InputRequested(request_id=request_id, questions=tuple(questions))
        asked = _Asked(tuple(questions), request, trio.current_time())
        self.append(request)
        self.asked[request_id] = asked
        self.host.input_changed()
        try:
            await asked.answered.wait()
        finally:
            if self.asked.pop(request_id, None) is not None:
                self.host.input_changed()
        return asked.answers[questions[0].id] if single else asked.answers

    def answer(self, request_id: str, answers: Mapping[str, Any]) -> None:
        """Hand in the answers to a request; the first to do so wins. Sync.

        Raises:
            NotFound: Nothing of that id is being asked.
            Conflict: It has been answered already.
            BadRequest: The answers do not fit the questions.
        """
        if request_id in self._answered:
            raise Conflict(f"the request {request_id!r} has been answered already")
        asked = self.asked.get(request_id)
        if asked is None:
            raise NotFound(
                f"expected the id of an open request ({', '.join(self.asked) or 'there is none'}), "
                f"got {request_id!r}"
            )
        check_answers(asked.questions, answers)
        asked.answers = dict(answers)
        received = InputReceived(request_id=request_id, answers=encode_json(asked.answers))
        # From here on it is answered, whatever happens before `ask` gets to run again.
        del self.asked[request_id]
        self._answered.add(request_id)
        self.append(received)
        asked.answered.set()
        self.host.input_changed()

    def dissolve(self) -> None:
        """Forget what an agent needs, once the run is over.

        References in a circle would keep a run beyond its retention until the collector comes by.
        """
        del self.host, self.workers
        self.on_step_finished = None
        self.input = self.metadata = None  # JSON of both is in the run, and takes less room
        self.asked.clear()
        self._open_parts.clear()

    async def delegate(self, agent: "Agent | str", input: Any) -> Any:
        """Run another agent as a child of this run, and return its result.

        Its events are in a log of its own; here only its start and its end are told.

        Raises:
            AgentError: It ended in any other way than with success; says how.
        """
        self._fall_silent()
        begun: list[tuple[str, str]] = []  # stays empty where there is no such agent

        def started(name: str, child_run_id: str) -> None:
            begun.append((name, child_run_id))
            self.append(AgentStarted(agent=name, child_run_id=child_run_id))

        report: Raw | UnsetType = UNSET
        problem: Problem | None = None
        try:
            result = await self.host.run_child(agent, input, started=started)
            report = encode_json(result)
        except BaseException as error:
            problem = problem_of(error, "the child run")
            raise
        finally:
            for name, child_run_id in begun:
                self.append(
                    AgentFinished(
                        agent=name, child_run_id=child_run_id, report=report, error=problem
                    )
                )
        return result

    def _next(self, letter: str) -> str:
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
    event = _emitted(name, data)
    if get_ident() == context.loop_thread:
        context.append(event)
        return
    try:
        context.loop_token.run_sync_soon(context.append, event)
    except trio.RunFinishedError:
        return  # the thread outlived the event loop: there is nobody left to tell


def _emitted(name: str, data: dict[str, Any]) -> Custom:
    try:
        if not (isinstance(name, str) and name and name.isprintable()):
            raise BadRequest(
                f"emit: expected a name of printable characters, got {ascii(name)[:80]}"
            )
        return Custom(name=name, value=encode_json(data, what=name))
    except AgentsseError as error:
        return Custom(name="agentsse.error", value=encode_json(problem_of(error, "emit")))


def problem_of(error: BaseException, where: str) -> Problem:
    """What of an error may be shown: the words of our own, of others only the name of the type."""
    error = unwrapped(error)
    match error:
        case AgentsseError():
            return Problem(
                code=_well_formed(str(error.code)),
                message=_well_formed(error.message),
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
            case _:
                assert_never(question.kind)
        if not fits:
            raise BadRequest(f"expected {expected} for {question.id!r}, got {given!r}")


def unwrapped(error: BaseException) -> BaseException:
    """The one error of a group that holds only one, at any depth, cancels beside it left aside."""
    while isinstance(error, BaseExceptionGroup):
        _, real = error.split(trio.Cancelled)
        if real is not None and len(real.exceptions) > 1:
            return real
        error = (real or error).exceptions[0]
    return error


def _well_formed(text: str) -> str:
    """Text that UTF-8 can carry: halves of surrogate pairs are joined, or replaced where alone."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _shown(arguments: Mapping[str, Any] | str) -> Raw:
    """Arguments as JSON for the stream, also where the model did not write any."""
    if isinstance(arguments, str):
        try:
            return encode_json(decode_json(arguments or "{}"))
        except AgentsseError:
            return encode_json(_well_formed(arguments))
    try:
        return encode_json(arguments)
    except AgentsseError:
        return encode_json(repr(arguments))


@attrs.frozen(eq=False)
class _ModelLoop:
    """The loop of a model agent: model call, tool calls side by side, until it answers."""

    model: str
    instructions: str = attrs.field(kw_only=True)
    provider: Provider | None = attrs.field(kw_only=True)

    async def __call__(self, run: RunContext, input: Any) -> str:
        provider, model = self._find(run)
        messages: list[Message] = [SystemMessage(self.instructions)] if self.instructions else []
        messages.append(UserMessage(input if isinstance(input, str) else _as_text(input)))
        tools = tuple(ToolSpec(t.name, t.description, t.parameters) for t in run.agent.tools)
        for _ in range(run.max_steps):
            prompt = Prompt(model, tuple(messages), tools)
            with run.step(self.model, kind="model") as step:
                said = await _call_model(run, provider, prompt)
                step.usage, step.finish_reason = said.finish.usage, said.finish.reason
            run.usage += said.finish.usage
            messages.append(AssistantMessage(said.text, said.tool_calls))
            if not said.tool_calls:
                return said.text
            with run.step("tools", kind="tool_round"):
                messages += await _call_tools(run, said.tool_calls)
        raise AgentError(
            f"expected an answer within {run.max_steps} model calls, got only tool calls",
            code="too_many_steps",
        )

    def _find(self, run: RunContext) -> tuple[Provider, str]:
        name, _, model = self.model.partition(":")
        provider = self.provider or run.providers.get(name)
        if provider is None:
            raise AgentError(f"expected a provider that the server knows, got {name!r}")
        return provider, model


@attrs.frozen
class _Said:
    text: str
    tool_calls: tuple[ToolCall, ...]
    finish: Finish


async def _call_model(run: RunContext, provider: Provider, prompt: Prompt) -> _Said:
    normalizer = provider.normalizer(run._next("m"))  # noqa: SLF001  # the same module
    text: list[str] = []
    calls: list[ToolCall] = []
    finish: Finish | None = None

    def take(produced: AnyEvent | Finish) -> None:
        nonlocal finish
        match produced:
            case Finish():
                finish = produced
                return
            case PartFinished(kind="text"):
                text.append(produced.text)
            case PartFinished(kind="tool_call"):
                call_id = produced.call_id or produced.part_id
                calls.append(ToolCall(call_id, produced.name or "", produced.text))
            case _:
                pass
        run.append(produced)

    async with provider.connect(prompt) as chunks:
        async for chunk in chunks:
            for produced in normalizer.feed(chunk):
                take(produced)
    for produced in normalizer.close():
        take(produced)
    if finish is None:
        raise AgentError("expected the model's stream to say that it has ended, got no finish")
    return _Said("".join(text), tuple(calls), finish)


async def _call_tools(run: RunContext, calls: Sequence[ToolCall]) -> list[ToolMessage]:
    """Call tools side by side; their results stand in the order of the calls."""
    results: dict[int, ToolMessage] = {}

    async def call(index: int, wanted: ToolCall) -> None:
        try:
            value = await run.call(wanted.name, wanted.arguments, call_id=wanted.call_id)
            content, is_error = bytes(encode_json(value)).decode(), False
        except ToolError as error:
            content, is_error = error.message, True
        results[index] = ToolMessage(wanted.call_id, wanted.name, content, is_error)

    async with trio.open_nursery() as nursery:
        for index, wanted in enumerate(calls):
            nursery.start_soon(call, index, wanted)
    return [results[index] for index in range(len(calls))]


def _as_text(value: Any) -> str:
    return bytes(encode_json(value)).decode()
