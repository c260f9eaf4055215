"""What can be run: an async function, or a model with instructions and tools.

Knows: names, defaults, and how authors write them down. Must never know how a run goes on: that is
its context's affair, and the loop of a model's.
"""

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, overload

import attrs

from .context import RunContext
from .models import ModelLoop
from .providers import Provider
from .tools import Tool, Toolset, gather

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
        fallbacks: Iterable[str] = (),
        context_window: int = 0,
        **settings: Any,
    ) -> "Agent":
        """Make an agent of a model.

        Args:
            name: What clients ask for.
            model: `provider:model`, the provider's name being one that the server knows.
            instructions: What the model is told first.
            tools: What it may call.
            provider: The provider itself, where the server does not know it by name.
            fallbacks: Models that take over where this one cannot answer, in their order; none
                does once anything of an answer was shown.
            context_window: Tokens that the model can hold; at 85 % of it the stream is told.
            settings: Any other attribute of an agent.
        """
        tools = gather(tools)
        loop = ModelLoop(
            model,
            tools=tools,
            instructions=instructions,
            provider=provider,
            fallbacks=tuple(fallbacks),
            context_window=context_window,
        )
        for each in loop.models:
            if ":" not in each:
                raise ValueError(
                    f"agent {name!r}: expected a model as PROVIDER:MODEL, got {each!r}"
                )
        return cls(name, loop, tools=tools, model=model, **settings)

    @property
    def wanted_providers(self) -> frozenset[str]:
        """The names of the providers that the server must know for it."""
        wanted: frozenset[str] = getattr(self.function, "wanted_providers", frozenset())
        return wanted

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
