"""What every model API is reduced to: a prompt goes in, our events come out.

Knows: messages, tool specifications and the two seams. Must never know runs, logs or HTTP. A
provider is a thin async shell that opens a stream of chunks; its `Normalizer` is a pure machine
that turns those chunks into part events and one `Finish`. Part ids need be unique only within one
model call: the caller gives the prefix that makes them unique in the run.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeAlias

import attrs

from agentsse.events import AnyEvent, FinishReason, Usage


@attrs.frozen
class ToolCall:
    """A call that the model asked for; `arguments` is JSON text, as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@attrs.frozen
class SystemMessage:
    """What the agent is told to be."""

    text: str


@attrs.frozen
class UserMessage:
    """What a person, or the calling agent, said."""

    text: str


@attrs.frozen
class AssistantMessage:
    """What the model said, and the calls that it made."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()


@attrs.frozen
class ToolMessage:
    """What a tool answered; `content` is JSON text."""

    call_id: str
    name: str
    content: str
    is_error: bool = False


Message: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage


@attrs.frozen
class ToolSpec:
    """A tool as a model sees it; `parameters` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]


@attrs.frozen
class Prompt:
    """One model call: everything that the model gets to see."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()


@attrs.frozen
class Finish:
    """The end of one model call; what a stream must bring to count as complete."""

    reason: FinishReason
    usage: Usage = attrs.field(factory=Usage)


class Normalizer(Protocol):
    """A pure machine from one provider's chunks to our events: no await, no clock, no logging."""

    def feed(self, chunk: Any, /) -> Iterable[AnyEvent | Finish]:
        """Take one chunk; raises `ProviderError` where it says that the call has failed."""

    def close(self) -> Iterable[AnyEvent | Finish]:
        """Take note that the stream has ended; raises `ProviderError` if it ended too early."""


class Provider(Protocol):
    """A model API."""

    name: str

    def connect(self, prompt: Prompt, /) -> AbstractAsyncContextManager[AsyncIterator[Any]]:
        """Open the stream of one model call; leaving the context closes it, also when cancelled.

        Raises:
            ProviderError: The API refused the call, or could not be reached.
        """

    def normalizer(self, prefix: str, /) -> Normalizer:
        """Make a machine for one model call; its part and call ids begin with `prefix`."""
