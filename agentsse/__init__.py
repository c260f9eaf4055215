"""A minimal standalone server, on Trio, that runs agents and streams what they do over SSE.

What an author of agents needs is here, imported when it is first asked for: so `agentsse --help`
costs what click costs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agents import Agent as Agent, agent as agent
    from .client import Client as Client, ServerError as ServerError, open_client as open_client
    from .context import (
        RunContext as RunContext,
        ask_user as ask_user,
        current_run as current_run,
        emit as emit,
    )
    from .errors import AgentError as AgentError, ToolError as ToolError
    from .events import Option as Option, Question as Question
    from .flows import FlowStep as FlowStep, flow as flow
    from .server import make_provider as make_provider
    from .tools import (
        Tool as Tool,
        Toolset as Toolset,
        is_cancelled as is_cancelled,
        run_program as run_program,
        tool as tool,
        write_output as write_output,
    )

_HOMES = {
    "Agent": "agentsse.agents",
    "AgentError": "agentsse.errors",
    "Client": "agentsse.client",
    "FlowStep": "agentsse.flows",
    "Option": "agentsse.events",
    "Question": "agentsse.events",
    "RunContext": "agentsse.context",
    "ServerError": "agentsse.client",
    "Tool": "agentsse.tools",
    "ToolError": "agentsse.errors",
    "Toolset": "agentsse.tools",
    "agent": "agentsse.agents",
    "ask_user": "agentsse.context",
    "current_run": "agentsse.context",
    "emit": "agentsse.context",
    "flow": "agentsse.flows",
    "is_cancelled": "agentsse.tools",
    "make_provider": "agentsse.server",
    "open_client": "agentsse.client",
    "run_program": "agentsse.tools",
    "tool": "agentsse.tools",
    "write_output": "agentsse.tools",
}

__version__ = "0.1.0"  # as in pyproject.toml; to ask what is installed would take 20 ms

__all__ = [  # noqa: PLE0604  # the names above, which type checkers see and Python makes
    *_HOMES
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'agentsse' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
