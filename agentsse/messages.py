"""What is said in a conversation: by a person, a model, a tool; and what a tool looks like.

Knows: the words that prompts, histories and clients' requests have in common. Must never know who
said them to whom, nor the form of any API.
"""

from typing import Any, TypeAlias

import attrs

from .errors import BadRequest
from .events import decode_json


@attrs.frozen
class ToolCall:
    """A call that the model asked for; `arguments` is JSON text, as the model wrote it."""

    call_id: str
    name: str
    arguments: str

    def decoded(self) -> dict[str, Any]:
        """The arguments as an object; what is none stands under `_raw`, to be sent back."""
        try:
            value = decode_json(self.arguments or "{}")
        except BadRequest:
            value = None
        return value if isinstance(value, dict) else {"_raw": self.arguments}


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
    """What the model said, and the calls that it made.

    Attributes:
        echo: The same in its provider's own form, where `Finish` had one.
        provider: The name of that provider; no other one is given the echo.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    echo: "Echo | None" = None
    provider: str = attrs.field(default="", eq=False)


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
class Echo:
    """What a provider wants back, verbatim, with the next call: signed reasoning, for instance.

    Attributes:
        kind: Which kind of provider made it; another one builds the message from its text.
        value: JSON as Python's plain types, in that provider's own form.
    """

    kind: str
    value: Any
