"""A model's turn in a run: it is called, its tools are called, and so on until it answers.

Knows: what is shown of a model call, when to try again, where else to try, and when to give up.
Must never know a provider's words, HTTP, readers, or who supervises the run.

What decides is sync and pure where it can be (`LoopGuard`, `well_ended`); what is tried again, and
what is not, is in one place, `ModelLoop._call`: nothing is tried again once any of it was shown.
"""

import functools
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Any, Final, assert_never

import attrs
import msgspec
import trio
from msgspec.structs import replace

from .context import RunContext, problem_of, unwrapped
from .errors import AgentError, BadArguments, ProviderError, ToolError
from .events import (
    ContextUsage,
    Failover,
    LoopDetected,
    PartDelta,
    PartFinished,
    PartStarted,
    Retry,
    ToolFinished,
    ToolStarted,
    encode_json,
    well_formed,
)
from .messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from .providers import MAX_CALLS, Connection, Finish, Normalizer, Produced, Prompt, Provider
from .tools import Tool

SAME_CALLS: Final = 10  # rounds of the same calls after which the model is told to stop it
SAME_FAILURES: Final = 3  # rounds of the same malformed, or all failing, calls that end the run
MAX_DELAY: Final = 120.0  # seconds before another try; who asks for more is not waited for
STRIDE: Final = 500  # events of one chunk between two checkpoints
FAREWELL: Final = 2.0  # seconds for a stream to end once it has said that it is over
FULL: Final = 0.85  # of the context window: little room is left for what tools may bring
BYTES_PER_TOKEN: Final = 4  # where the provider does not count; right within a factor of two

ENOUGH: Final = (
    "You have made the same tool calls {repeats} times in a row, with nothing new to learn from "
    "them. Do something else, or answer with what you know."
)


@attrs.frozen(eq=False)
class ModelLoop:
    """The function of a model agent: model call, tool calls side by side, until it answers.

    Attributes:
        model: `provider:model`.
        tools: What the model may call.
        instructions: What the model is told first.
        provider: The provider itself, where the server does not know it by name.
        fallbacks: Models that take over, in this order, where one cannot answer.
        context_window: Tokens; 0 where nobody knows.
    """

    model: str
    tools: tuple[Tool, ...] = attrs.field(kw_only=True)
    instructions: str = attrs.field(kw_only=True)
    provider: Provider | None = attrs.field(kw_only=True)
    fallbacks: tuple[str, ...] = attrs.field(kw_only=True, default=())
    context_window: int = attrs.field(kw_only=True, default=0)

    @property
    def models(self) -> tuple[str, ...]:
        """All that may be asked, in their order."""
        return (self.model, *self.fallbacks)

    @property
    def wanted_providers(self) -> frozenset[str]:
        """The names of the providers that the server must know for it."""
        names = [model.partition(":")[0] for model in self.models]
        return frozenset(names) - (set() if self.provider is None else {names[0]})

    async def __call__(self, run: RunContext, input: Any) -> str:
        """Converse until the model answers without a tool call; the text is the result.

        It is over, too, where the model calls tools of the client, who goes on with their answers.

        What people say meanwhile it is told after the round of tools that it is in, or the rest;
        what they say later than that, and follow-ups, when it would have ended. What comes too late
        for its last call it leaves for whoever runs next.

        Raises:
            AgentError: It went round in circles, or made too many calls.
            ProviderError: No model could be asked, or one broke off after it had shown something.
        """
        # A function may call this one within its own run: what is said then is not that run's.
        is_own = run.agent.function is self
        instructions = (run.instructions if is_own else None) or self.instructions
        system = (SystemMessage(instructions),) if instructions else ()
        own_tools = self.tools if run.uses_tools or not is_own else ()
        client_tools = run.client_tools if run.uses_tools and is_own else ()
        of_client = {spec.name for spec in client_tools}
        history, conversation = (run.history, run.conversation) if is_own else ((), [])
        conversation += (run.said if is_own else None) or (_message_of(input),)
        told, begun = well_ended((*history, *conversation)), len(conversation)
        specs = (ToolSpec(t.name, t.description, t.parameters) for t in own_tools)
        tools = (*specs, *client_tools)
        guard, gauge = LoopGuard(), Gauge(self.context_window)
        async with AsyncExitStack() as stack:
            known = {m.call_id for m in told if isinstance(m, ToolMessage)}
            turn = _Turn(run, self, stack, conversation, call_ids=known, told=len(history))
            for left in reversed(range(run.limits.max_steps)):
                if await run.rest_while_paused():
                    conversation += map(UserMessage, run.take_messages("steer"))
                messages = (*system, *told, *conversation[begun:])
                said = await turn.ask(messages, tools)
                run.usage += said.finish.usage
                if said.text or said.tool_calls or said.finish.echo:
                    echo = said.finish.echo
                    conversation.append(
                        AssistantMessage(said.text, said.tool_calls, echo, turn.provider_name)
                    )
                if (usage := gauge.read(said.finish, messages)) is not None:
                    run.append(usage)
                if not said.tool_calls:
                    if not left or not (heard := run.take_messages()):
                        return said.text
                    conversation += map(UserMessage, heard)
                    continue
                own_calls = [call for call in said.tool_calls if call.name not in of_client]
                answers: dict[int, Answered] = {}
                try:
                    if own_calls:
                        with run.step("tools", kind="tool_round"), _unless_stalled(run, _stalled):
                            await _call_tools(run, own_tools, own_calls, answers)
                finally:  # those that have answered did, whatever becomes of the others
                    in_order = [answers[index] for index in sorted(answers)]
                    conversation += [answer.message for answer in in_order]
                if len(own_calls) < len(said.tool_calls):
                    conversation += map(UserMessage, run.take_messages())  # for whoever goes on
                    run.pending = tuple(
                        call.call_id for call in said.tool_calls if call.name in of_client
                    )
                    return said.text
                if (circle := guard.note(said.tool_calls, in_order)) is not None:
                    conversation.append(_judge(run, circle))
                if left:
                    conversation += map(UserMessage, run.take_messages("steer"))
        raise AgentError(
            f"expected an answer within {run.limits.max_steps} model calls, got only tool calls",
            code="too_many_steps",
        )


# One model call ---------------------------------------------------------------------------------


@attrs.frozen
class _Said:
    text: str
    tool_calls: tuple[ToolCall, ...]
    finish: Finish


@attrs.define(eq=False)
class _Turn:
    """The models that a run may ask, and where it stands among them."""

    run: RunContext
    loop: ModelLoop
    stack: AsyncExitStack
    conversation: list[Message]
    call_ids: set[str]
    told: int  # messages of earlier runs: ids that are made here differ from theirs
    _place: int = 0
    _connections: dict[str, Connection] = attrs.field(factory=dict)

    async def ask(self, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...]) -> _Said:
        """Ask the model, or those that stand in for it; who has answered is asked from then on."""
        models = self.loop.models
        while True:
            model = models[self._place]
            outcome = await self._ask_one(model, messages, tools)
            if isinstance(outcome, _Said):
                return outcome
            if outcome.is_final or self._place + 1 == len(models):
                try:
                    raise outcome
                finally:
                    del outcome  # its traceback holds this frame, which would hold it
            self._place += 1
            self.run.append(
                Failover(
                    from_model=model,
                    to_model=models[self._place],
                    reason=well_formed(outcome.message),
                )
            )

    @property
    def provider_name(self) -> str:
        """Who is asked now."""
        return self.loop.models[self._place].partition(":")[0]

    async def _ask_one(
        self, model: str, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...]
    ) -> _Said | ProviderError:
        """Ask one model, again and again where that may help."""
        run, limits = self.run, self.run.limits
        name, _, own_name = model.partition(":")
        # What was signed or sealed elsewhere means nothing here, and may be refused.
        prompt = Prompt(own_name, tuple(_without_echo_of_others(m, name) for m in messages), tools)
        with run.step(model, kind="model") as step:
            attempt = 0
            while True:
                attempt += 1
                outcome = await self._try(name, prompt)
                if isinstance(outcome, _Said):
                    step.usage, step.finish_reason = outcome.finish.usage, outcome.finish.reason
                    return outcome
                problem = problem_of(outcome, model)
                delay = _delay(outcome, attempt, tries=limits.max_tries, first=limits.retry_delay)
                if delay is None:
                    step.error = problem
                    return outcome
                run.append(
                    Retry(
                        attempt=attempt,
                        max=limits.max_tries,
                        delay_s=round(delay, 3),
                        error=problem,
                    )
                )
                await trio.sleep(delay)

    async def _try(self, name: str, prompt: Prompt) -> _Said | ProviderError:
        """Make one model call; its error is returned where nothing was shown of it yet."""
        run, call = self.run, None
        try:
            connection = await self._connect(name)
            prefix = run.next_id("m") + (f"h{self.told}" if self.told else "")
            machine = connection.normalizer(prefix)
            call = _ModelCall(run, machine, self.conversation, self.call_ids)
            with _unless_stalled(run, functools.partial(ProviderError, code="stalled")):
                async with connection.stream(prompt) as chunks:
                    await call.take_all(chunks)
                    return call.close()
        except Exception as error:
            failure = unwrapped(error)
            # A traceback holds this frame: neither may hold the other, and with it the run.
            if isinstance(failure, ProviderError) and not (call and call.was_shown):
                return failure.with_traceback(None)
            del failure
            raise
        finally:
            if call is not None:
                call.abandon()

    async def _connect(self, name: str) -> Connection:
        """Open what this run needs of a provider, once; it is closed with the turn."""
        if name not in self._connections:
            provider = self.run.providers.get(name)
            if name == self.loop.model.partition(":")[0] and self.loop.provider is not None:
                provider = self.loop.provider
            if provider is None:
                raise AgentError(f"expected a provider that the server knows, got {name!r}")
            self._connections[name] = await self.stack.enter_async_context(provider.open(self.run))
        return self._connections[name]


def _without_echo_of_others(message: Message, provider: str) -> Message:
    if isinstance(message, AssistantMessage) and message.echo and message.provider != provider:
        return attrs.evolve(message, echo=None)
    return message


@attrs.define(eq=False)
class _ModelCall:
    """One attempt: what it shows goes into the run as it comes.

    Attributes:
        was_shown: Whether anything of it was: from then on it cannot be taken back.
    """

    run: RunContext
    machine: Normalizer
    conversation: list[Message]
    call_ids: set[str]  # of all calls that the model may remember; ours are added
    was_shown: bool = False
    _finish: Finish | None = None
    _text: list[str] = attrs.field(factory=list)
    _calls: list[ToolCall] = attrs.field(factory=list)
    _parts: dict[str, str | None] = attrs.field(factory=dict)  # open ones, and their call ids
    _tools: dict[str, ToolStarted | None] = attrs.field(factory=dict)  # the provider's own
    _begun: int = 0  # tool calls
    _is_renamed: bool = False
    _is_closed: bool = False

    async def take_all(self, chunks: AsyncIterator[Any]) -> None:
        """Take what comes, until the stream ends, or does not though it is over."""
        machine = self.machine
        patience = min(FAREWELL, self.run.limits.stall / 2)
        with trio.CancelScope() as farewell:
            async for chunk in chunks:
                for count, produced in enumerate(machine.feed(chunk), 1):
                    self._take(produced)
                    if count % STRIDE == 0:  # a frame may hold very many
                        await trio.lowlevel.checkpoint()
                if machine.is_over:
                    farewell.deadline = min(farewell.deadline, trio.current_time() + patience)

    def close(self) -> _Said:
        """Take the last of it; raises `ProviderError` where there is no finish."""
        for produced in self.machine.close():
            self._take(produced)
        if (finish := self._finish) is None:
            raise ProviderError(
                "expected the model's stream to say that it has ended, got no finish",
                code="incomplete",
            )
        self._is_closed = True
        if self._is_renamed:  # in the provider's own form the calls have their old names
            finish = attrs.evolve(finish, echo=None)
        return _Said("".join(self._text), tuple(self._calls), finish)

    def abandon(self) -> None:
        """Complete what is half said, and remember it; nothing to do after a whole call. Sync."""
        for part in self.run.finish_parts(self._parts):
            self._note(part)
        for call_id, started in self._tools.items():
            if started is not None:
                self.run.append(_broken_off(call_id, started.name))
        if not self._is_closed and (text := "".join(self._text)):
            self.conversation.append(AssistantMessage(mended(text)))

    def _take(self, produced: Produced) -> None:
        match produced:
            case PartDelta():
                self.was_shown = True
            case Finish():
                self._finish = produced
                return
            case PartStarted():
                self.was_shown = True
                if produced.kind == "tool_call":
                    self._count_call()
                call_id = produced.call_id and self._own_id(produced.call_id)
                if call_id != produced.call_id:
                    produced = replace(produced, call_id=call_id)
                self._parts[produced.part_id] = call_id
            case PartFinished():
                self.was_shown = True
                call_id = self._parts.pop(produced.part_id, produced.call_id)
                if call_id != produced.call_id:
                    produced = replace(produced, call_id=call_id)
                self._note(produced)
            case ToolStarted():
                self.was_shown = True
                self.call_ids.add(produced.call_id)
                self._tools[produced.call_id] = produced
            case ToolFinished():
                self.was_shown = True
                self._tools[produced.call_id] = None
            case _:
                pass
        self.run.append(produced)

    def _note(self, part: PartFinished) -> None:
        """Remember what the model will be told that it has said."""
        match part.kind:
            case "text" | "refusal":
                self._text.append(part.text)
            case "tool_call":
                call_id = part.call_id or part.part_id
                self._calls.append(ToolCall(call_id, part.name or "", part.text))
            case "reasoning":
                pass
            case _:
                assert_never(part.kind)

    def _count_call(self) -> None:
        self._begun += 1
        if self._begun > MAX_CALLS:
            raise ProviderError(
                f"expected at most {MAX_CALLS} tool calls in one answer, got more",
                code="malformed",
            )

    def _own_id(self, call_id: str) -> str:
        """A call id that no other call of the conversation has: some servers count anew."""
        own, number = call_id, len(self.call_ids) + 1
        while own in self.call_ids:
            own, number = f"{call_id}-{number}", number + 1
            self._is_renamed = True
        self.call_ids.add(own)
        return own


def _broken_off(call_id: str, name: str) -> ToolFinished:
    said = {"error": "the provider's stream ended before the tool had"}
    return ToolFinished(
        call_id=call_id, name=name, result=encode_json(said), is_error=True, source="provider"
    )


def _delay(error: ProviderError, attempt: int, *, tries: int, first: float) -> float | None:
    """Seconds before the next try; None where there should be none."""
    if not error.is_transient or attempt >= tries:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= MAX_DELAY else None
    # Half as long to half as long again: those who failed together do not come back together.
    doubled = first * 2.0 ** min(attempt - 1, 32) * random.uniform(0.5, 1.5)  # noqa: S311
    return min(doubled, MAX_DELAY)


def _stalled(message: str) -> AgentError:
    return AgentError(message, code="stalled", status=504)


@contextmanager
def _unless_stalled(run: RunContext, error: Callable[[str], Exception]) -> Iterator[None]:
    """Leave the block when nothing has come of it for as long as `limits.stall`."""
    with run.watched() as scope:
        yield
    if scope.cancel_called:  # also where the block had just ended: it has been told
        raise error(f"expected something to happen within {run.limits.stall:g} s, nothing did")


# Tools --------------------------------------------------------------------------------------------


@attrs.frozen
class Answered:
    """A tool's answer, and whether the call itself could not be understood."""

    message: ToolMessage
    is_malformed: bool = False


async def _call_tools(
    run: RunContext,
    tools: Sequence[Tool],
    calls: Sequence[ToolCall],
    answers: dict[int, Answered],
) -> None:
    """Call tools side by side; their answers are put under the places of the calls."""

    async def call(index: int, wanted: ToolCall) -> None:
        is_malformed = False
        try:
            value = await run.call(
                wanted.name, wanted.arguments, call_id=wanted.call_id, among=tools
            )
            content, is_error = _as_json(value), False
        except ToolError as error:
            content, is_error = error.message, True
            is_malformed = isinstance(error, BadArguments)
        message = ToolMessage(wanted.call_id, wanted.name, content, is_error)
        answers[index] = Answered(message, is_malformed)

    async with trio.open_nursery() as nursery:
        for index, wanted in enumerate(calls):
            nursery.start_soon(call, index, wanted)


# What goes round in circles -----------------------------------------------------------------------


@attrs.frozen
class Circle:
    """The same round of calls, once more.

    Attributes:
        event: What the stream is told.
        is_hopeless: Whether the run should end; otherwise the model is told to stop it.
    """

    event: LoopDetected
    is_hopeless: bool


@attrs.define
class LoopGuard:
    """Sees whether a model goes round in circles. Pure."""

    _fingerprint: str = ""
    _repeats: int = 0
    _failures: int = 0

    def note(self, calls: Sequence[ToolCall], answers: Sequence[Answered]) -> Circle | None:
        """Take a round of calls and what came of them."""
        fingerprint = "".join(map(_fingerprint, calls))
        if fingerprint != self._fingerprint:
            self._fingerprint, self._repeats, self._failures = fingerprint, 0, 0
        self._repeats += 1
        has_failed = all(a.message.is_error for a in answers) or any(
            a.is_malformed for a in answers
        )
        self._failures = self._failures + 1 if has_failed else 0
        if self._failures >= SAME_FAILURES:
            return Circle(LoopDetected(fingerprint=fingerprint, repeats=self._failures), True)
        if self._repeats % SAME_CALLS == 0:
            return Circle(LoopDetected(fingerprint=fingerprint, repeats=self._repeats), False)
        return None


def _fingerprint(call: ToolCall) -> str:
    """A call in short: its name, and a digest of its arguments whatever the order of their keys."""
    arguments = msgspec.json.encode(call.decoded(), order="deterministic")
    return f"{call.name}:{hashlib.sha256(arguments).hexdigest()[:8]};"


def _judge(run: RunContext, circle: Circle) -> UserMessage:
    """Tell of a circle; returns what the model is told, or raises `AgentError`."""
    run.append(circle.event)
    repeats = circle.event.repeats
    if circle.is_hopeless:
        raise AgentError(
            f"expected the model to learn from its errors, got the same failing calls {repeats} "
            f"times in a row: {circle.event.fingerprint[:200]}",
            code="loop_detected",
        )
    return UserMessage(ENOUGH.format(repeats=repeats))


# Context and history ------------------------------------------------------------------------------


@attrs.define
class Gauge:
    """Sees whether the context window fills up. Pure.

    Attributes:
        limit: Tokens of the window; 0 where nobody knows.
    """

    limit: int
    _is_told: bool = False

    def read(self, finish: Finish, messages: Sequence[Message]) -> ContextUsage | None:
        """Take a model call; what it used is estimated where the provider does not count."""
        if not self.limit:
            return None
        tokens = finish.usage.input_tokens + finish.usage.output_tokens
        tokens = tokens or size_of(messages) // BYTES_PER_TOKEN
        ratio = tokens / self.limit
        was_told, self._is_told = self._is_told, ratio >= FULL
        if was_told or not self._is_told:
            return None
        return ContextUsage(ratio=round(ratio, 4), tokens=tokens, limit=self.limit)


def _size(message: Message) -> int:
    match message:
        case SystemMessage() | UserMessage():
            return len(message.text.encode())
        case AssistantMessage(text, calls, echo):
            size = len(text.encode()) + sum(len(call.arguments.encode()) for call in calls)
            return size + (0 if echo is None else len(bytes(encode_json(echo.value))))
        case ToolMessage():
            return len(message.content.encode())
        case _:
            assert_never(message)


def well_ended(
    conversation: Sequence[Message], *, awaited: Collection[str] = ()
) -> tuple[Message, ...]:
    """A conversation as a model may be told it: each tool call has its result behind it. Pure.

    A result that is of no call, or of one that has its result, is left out: models refuse it.

    Args:
        conversation: What was said.
        awaited: Ids of calls whose results may still come.
    """
    results: dict[tuple[int, int], ToolMessage] = {}  # by the places of their calls
    open_calls: dict[str, tuple[int, int]] = {}
    for place, message in enumerate(conversation):
        match message:
            case AssistantMessage(tool_calls=calls):
                open_calls |= {call.call_id: (place, n) for n, call in enumerate(calls)}
            case ToolMessage(call_id) if call_id in open_calls:
                results[open_calls.pop(call_id)] = message
            case _:
                pass
    whole: list[Message] = []
    for place, message in enumerate(conversation):
        if isinstance(message, ToolMessage):
            continue
        whole.append(message)
        for n, call in enumerate(
            message.tool_calls if isinstance(message, AssistantMessage) else ()
        ):
            if (result := results.get((place, n))) is not None:
                whole.append(attrs.evolve(result, name=call.name))
            elif call.call_id not in awaited:
                whole.append(_unanswered(call))
    return tuple(whole)


def _unanswered(call: ToolCall) -> ToolMessage:
    content = _as_json({"error": "the tool has not answered"})
    return ToolMessage(call.call_id, call.name, content, is_error=True)


def _message_of(input: Any) -> UserMessage:
    return UserMessage(input if isinstance(input, str) else _as_json(input))


def size_of(conversation: Sequence[Message]) -> int:
    """About how many bytes a conversation takes."""
    return sum(map(_size, conversation))


def mended(text: str) -> str:
    """A text that was cut off, with an end to the markdown that is open in it."""
    from .markdown import closing  # noqa: PLC0415  # 5 ms of expressions, for what is cut

    return text + closing(text)


def _as_json(value: Any) -> str:
    return bytes(encode_json(value)).decode()
