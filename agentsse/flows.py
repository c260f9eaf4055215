"""An agent made of named steps, where code decides which one comes next.

Knows: steps, the conditions between them, and when a step, or all of them, is tried again. Must
never know models, HTTP or readers: what a step does is an agent's affair, or a function's.

A flow is a run's function like any other. Its steps happen one after the other in that same run;
what is to happen side by side is one step with a nursery in it. Which step follows is decided
between two steps, in sync code.
"""

import inspect
import math
import reprlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import attrs
import trio
from msgspec import UNSET, Raw, UnsetType

from .agents import Agent
from .context import RunContext, problem_of, unwrapped
from .errors import AgentError, ProviderError
from .events import (
    AgentFinished,
    AgentStarted,
    Problem,
    Retry,
    decode_json,
    encode_json,
)
from .models import ModelLoop
from .tools import Tool, Toolset, gather

MAX_STEPS: Final = 25  # in one go; what is not there by then is going round in circles
CIRCLES: Final = frozenset({"too_many_steps", "loop_detected"})  # dear, and the next one is as long

Action: TypeAlias = Agent | Callable[[RunContext, Any], Awaitable[Any]]
Then: TypeAlias = str | Mapping[Any, str | None] | Callable[[Any], str | None] | None


def _see_name(_instance: object, attribute: "attrs.Attribute[Any]", name: object) -> None:
    if not (isinstance(name, str) and name and name.isprintable()):
        raise ValueError(
            f"{attribute.name}: expected a step's name of printable characters, got {name!a}"
        )


def _see_action(_instance: object, _attribute: object, action: Any) -> None:
    if not (isinstance(action, Agent) or inspect.iscoroutinefunction(action)):
        raise TypeError(
            f"expected an agent or an async function for a step, got {action!r}: "
            "write 'async def', or make an agent of it"
        )


def _see_then(_instance: object, _attribute: object, then: Any) -> None:
    if inspect.iscoroutinefunction(then):
        raise TypeError(
            f"expected a sync function for 'then', got {then!r}: what awaits is a step of its own"
        )
    named = then.values() if isinstance(then, Mapping) else () if callable(then) else (then,)
    if not all(name is None or isinstance(name, str) for name in named):
        raise TypeError(
            "expected None, a step's name, a mapping to such names or a sync function for 'then', "
            f"got {then!r}"
        )


def _see_count(_instance: object, attribute: "attrs.Attribute[Any]", count: object) -> None:
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{attribute.name}: expected a number from 1 on, got {count!r}")


def _kept(then: Then) -> Then:
    return dict(then) if isinstance(then, Mapping) else then  # ours: nobody else changes it


@attrs.frozen(eq=False)
class FlowStep:
    """A step of a flow.

    Attributes:
        name: What streams call it, and the other steps of its flow.
        action: What is done: an agent, within the flow's own run, or an async function of the run
            and the step's input. Of an agent its name, its function and its tools count here; its
            limits are for runs of its own, and `run.delegate` makes one.
        then: What comes next: None ends the flow, a string names a step, a mapping has the step's
            result on its left side and a step's name or None on its right, and a sync function is
            given the result and returns a step's name or None.
        tries: How often it may be begun until it does not fail.
    """

    name: str = attrs.field(validator=_see_name)
    action: Action = attrs.field(validator=_see_action)
    then: Then = attrs.field(default=None, converter=_kept, validator=_see_then)
    tries: int = attrs.field(default=1, kw_only=True, validator=_see_count)

    @property
    def targets(self) -> frozenset[str]:
        """The names of steps that `then` is known to lead to; a function may say anything."""
        match self.then:
            case str():
                return frozenset({self.then})
            case Mapping():
                return frozenset(name for name in self.then.values() if name is not None)
            case _:
                return frozenset()


def flow(
    name: str,
    *steps: FlowStep,
    start: str | None = None,
    max_steps: int = MAX_STEPS,
    tries: int = 1,
    tools: Iterable[Tool | Toolset] = (),
    **settings: Any,
) -> Agent:
    """Make an agent of steps.

    The first step is given the run's input, a later one the result of the step before it. That is
    JSON as Python's plain types, and each try of a step has a copy of its own; `run.input` is the
    run's own input wherever it is looked at. The result of the last step is the run's.

    What fails is tried again, from its beginning, where `tries` allows that: what it did, showed or
    asked before it failed stays, and is done, shown or asked once more; the `retry` event stands
    between. Not tried again is what was cancelled, what would fail in the same way at any model
    (`ProviderError.is_final`), and what went round in circles.

    Cancelling the run ends the step that is under way like anything else in a run: the step and the
    agent in it are finished in the log, with that as their error, and no other step begins.

    Args:
        name: What clients ask for.
        steps: In any order, but for the first.
        start: The name of the step that begins; the first one unless given.
        max_steps: How many steps there may be in one go; tries of the same step count once.
        tries: How often the whole may be begun until it does not fail.
        tools: What `run.call` finds by name in its steps, beside the tools of the function agents
            that are steps. A model calls its own tools only.
        settings: Any other attribute of an agent.

    Raises:
        ValueError: There is no step, or two of one name, or one that leads to no step of the flow;
            or two tools of one name.
    """
    by_name = {step.name: step for step in steps}
    _see_steps(name, steps, by_name, start)
    function = _Flow(name, by_name, start or steps[0].name, max_steps=max_steps, tries=tries)
    return Agent(name, function, tools=_shared(tools, steps), **settings)


def _see_steps(
    name: str, steps: tuple[FlowStep, ...], by_name: Mapping[str, FlowStep], start: str | None
) -> None:
    known = ", ".join(by_name)
    if not steps:
        raise ValueError(f"flow {name!r}: expected at least one step, got none")
    names = [step.name for step in steps]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise ValueError(
            f"flow {name!r}: expected steps of different names, got two of {', '.join(twice)}"
        )
    if start is not None and start not in by_name:
        raise ValueError(f"flow {name!r}: start: expected one of {known}, got {start!r}")
    for step in steps:
        if unknown := sorted(map(repr, step.targets - set(by_name))):
            raise ValueError(
                f"flow {name!r}: step {step.name!r}: then: expected one of {known}, "
                f"got {', '.join(unknown)}"
            )


def _shared(tools: Iterable[Tool | Toolset], steps: Iterable[FlowStep]) -> tuple[Tool, ...]:
    """What `run.call` may find: all tools of the flow and its functions, each of them once."""
    shared = dict.fromkeys(gather(tools))
    for step in steps:
        # A model looks among its own tools, and two models may each have a `search`.
        if isinstance(step.action, Agent) and not isinstance(step.action.function, ModelLoop):
            shared |= dict.fromkeys(step.action.tools)
    return gather(shared)


@attrs.frozen(eq=False)
class _Flow:
    """The function of a flow agent: step after step, until one of them is the last."""

    name: str
    steps: Mapping[str, FlowStep]
    start: str
    max_steps: int = attrs.field(kw_only=True, validator=_see_count)
    tries: int = attrs.field(kw_only=True, validator=_see_count)

    @property
    def wanted_providers(self) -> frozenset[str]:
        """The names of the providers that the server must know for its steps."""
        actions = [step.action for step in self.steps.values()]
        agents = [action for action in actions if isinstance(action, Agent)]
        return frozenset(name for agent in agents for name in agent.wanted_providers)

    async def __call__(self, run: RunContext, input: Any) -> Any:
        """Take the steps; the result is that of the last one.

        Raises:
            AgentError: There were too many steps, or the next one does not exist.
        """
        given = encode_json(input, what=f"the input of {self.name}")
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._take_steps(run, given)
            except Exception as error:
                if not _goes_again(run, error, attempt, self.tries, f"the flow {self.name!r}"):
                    raise

    async def _take_steps(self, run: RunContext, given: Raw) -> Any:
        step = self.steps[self.start]
        for _ in range(self.max_steps):
            await run.rest_while_paused()
            with run.step(step.name, kind="flow") as shown:
                result = shown.result = await _take(run, step, given)
            following = self._next(step, result)
            if following is None:
                return result
            given = encode_json(result, what=f"the result of {step.name}")
            step = self.steps[following]
        raise AgentError(
            f"expected the flow {self.name!r} to end within {self.max_steps} steps, got to "
            f"{step.name!r} after them: end the circle in a 'then', or raise max_steps",
            code="too_many_steps",
        )

    def _next(self, step: FlowStep, result: Any) -> str | None:
        """Decide what comes after a step."""
        match step.then:
            case None | str():
                return step.then
            case Mapping():
                following = _looked_up(step, step.then, result)
            case _:
                following = step.then(result)
        if not (following is None or (isinstance(following, str) and following in self.steps)):
            raise AgentError(
                f"expected one of the steps {', '.join(self.steps)}, or None, after "
                f"{step.name!r}, got {_in_short(following)}: see what its 'then' returns",
                code="unknown_step",
            )
        return following


def _looked_up(step: FlowStep, then: Mapping[Any, str | None], result: Any) -> str | None:
    try:
        return then[result]
    except (KeyError, TypeError):  # the second where a list or an object is looked up
        raise AgentError(
            f"expected the step {step.name!r} to have one of the results "
            f"{', '.join(map(_in_short, then))}, got {_in_short(result)}: add it to its 'then', or "
            "make that a function",
            code="unknown_step",
        ) from None


def _in_short(value: object) -> str:
    return reprlib.repr(value)


# One step -----------------------------------------------------------------------------------------


async def _take(run: RunContext, step: FlowStep, given: Raw) -> Any:
    """Do what a step does, again and again where it fails and may."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return await _perform(run, step.action, given)
        except Exception as error:
            if not _goes_again(run, error, attempt, step.tries, f"the step {step.name!r}"):
                raise
        await trio.lowlevel.checkpoint()


async def _perform(run: RunContext, action: Action, given: Raw) -> Any:
    if not isinstance(action, Agent):
        return await action(run, decode_json(given))
    run.append(AgentStarted(agent=action.name, input=given))
    report: Raw | UnsetType = UNSET
    problem: Problem | None = None
    try:
        result = await action.function(run, decode_json(given))
        report = encode_json(result, what=f"the result of {action.name}")
    except BaseException as error:
        problem = problem_of(error, f"the agent {action.name!r}")
        raise
    finally:
        run.fall_silent()  # what the agent was saying ends with the agent
        run.append(AgentFinished(agent=action.name, report=report, error=problem))
    return result


def _goes_again(run: RunContext, error: Exception, attempt: int, tries: int, where: str) -> bool:
    """Whether what failed is tried again; if so, that is told. Sync."""
    if attempt >= tries or _would_fail_again(unwrapped(error)):
        return False
    if trio.current_effective_deadline() == -math.inf:  # cancelled: this came of its cleanup
        return False
    problem = problem_of(error, where)
    if problem.code == "crashed":  # nobody else gets to see it
        run.host.report_crash(error, where)
    run.append(Retry(attempt=attempt, max=tries, delay_s=0, error=problem))
    return True


def _would_fail_again(error: BaseException) -> bool:
    if isinstance(error, ProviderError):
        return error.is_final
    return isinstance(error, AgentError) and error.code in CIRCLES
