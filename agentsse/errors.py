"""What can go wrong, whose fault it is, and which HTTP status says so.

Knows: names, codes and statuses. Must never know who raises or who answers. Every message of an
`AgentsseError` is meant to be read by the person at the other end: it says what was expected, what
came and what to do, and holds no secret. The text of any other exception stays in the log.
"""

import re
from typing import ClassVar, Final, Literal, TypeAlias

MAX_MESSAGE = 4_000  # characters; enough for a list of names, too little to be an echo


class AgentsseError(Exception):
    """An error whose message may be shown to whoever caused it.

    Attributes:
        code: A stable, machine-readable name; it stands in problem JSON and in error events.
        status: The HTTP status that fits where the error ends a request.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    @property
    def message(self) -> str:
        """The sentence given when it was raised; what is quoted in it may be long, it is not."""
        text = (str(self.args[0]) if self.args else "") or self.code
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


class BadRequest(AgentsseError):
    """A request that cannot be understood: its JSON, a field, a query parameter, a header."""

    code = "bad_request"
    status = 400


class Forbidden(AgentsseError):
    """A request from an origin that may not speak to this server."""

    code = "forbidden"
    status = 403


class NotFound(AgentsseError):
    """An agent, run, thread or question that does not exist (any more)."""

    code = "not_found"
    status = 404


class PreviousNotFound(NotFound):
    """A run that another one was to continue, and that there is not (any more)."""

    code = "previous_not_found"


class NotAllowed(AgentsseError):
    """A method that the path does not know.

    Attributes:
        allow: The methods that it does know.
    """

    code = "method_not_allowed"
    status = 405

    def __init__(self, message: str, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.allow = allow


class NotAcceptable(AgentsseError):
    """An Accept header that names nothing this path can send."""

    code = "not_acceptable"
    status = 406


class Conflict(AgentsseError):
    """A request that contradicts the state of a thread, a run or a question."""

    code = "conflict"
    status = 409


class NotAsked(Conflict):
    """An answer to what is not being asked, or no longer."""

    code = "not_asked"


class BodyTimeout(AgentsseError):
    """A request whose body did not come in time."""

    code = "request_timeout"
    status = 408


class TooLarge(AgentsseError):
    """A body over the limit."""

    code = "too_large"
    status = 413


class Misdirected(AgentsseError):
    """A Host header that does not name this server: DNS rebinding looks like this."""

    code = "misdirected"
    status = 421


class Unprocessable(AgentsseError):
    """The request is well formed, and what it says makes no sense."""

    code = "unprocessable"
    status = 422


class KeyReused(Unprocessable):
    """An Idempotency-Key that was used before with another body."""

    code = "idempotency_key_reused"
    status = 422


class NotSupported(AgentsseError):
    """Something that the protocol knows, and this server does not do."""

    code = "not_supported"
    status = 501


class Overloaded(AgentsseError):
    """A server that has no room now.

    Attributes:
        retry_after: Seconds after which it is worth another try.
    """

    code = "overloaded"
    status = 503

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ConfigError(AgentsseError):
    """A configuration that cannot be used; nothing has been started."""

    code = "bad_config"


class AgentError(AgentsseError):
    """What an agent raises to end its run with words that the client may read.

    Args:
        message: Shown to the client as it is.
        code: Shown beside it, for programs.
        status: The HTTP status of a JSON answer.
    """

    def __init__(self, message: str, *, code: str = "agent_error", status: int = 500) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # an agent names its own
        self.status = status  # type: ignore[misc]  # and says how bad it is


class ToolError(AgentsseError):
    """What a tool raises to tell the model, and the stream, why it has no result."""

    code = "tool_error"


class BadArguments(ToolError):
    """A call whose arguments do not fit the tool; the message tells the model what would."""

    code = "bad_arguments"


Fault: TypeAlias = Literal[
    "auth",
    "bad_request",
    "content_filter",
    "context_length",
    "incomplete",
    "malformed",
    "not_found",
    "overloaded",
    "provider_error",
    "quota",
    "rate_limit",
    "server_error",
    "stalled",
    "timeout",
    "unreachable",
]
"""What was wrong with a model call; `provider_error` where the provider does not say."""

# Worth another try in a moment; what is in neither set is worth a try elsewhere, but not here.
TRANSIENT: Final[frozenset[Fault]] = frozenset(
    {
        "incomplete",
        "overloaded",
        "provider_error",
        "rate_limit",
        "server_error",
        "timeout",
        "unreachable",
    }
)
# The same elsewhere: it is the request, or the configuration.
FINAL: Final[frozenset[Fault]] = frozenset(
    {"auth", "bad_request", "content_filter", "context_length", "not_found"}
)
_FAULT_STATUS: dict[str, int] = {
    "content_filter": 422,
    "context_length": 413,
    "overloaded": 503,
    "quota": 503,
    "rate_limit": 503,
    "stalled": 504,
    "timeout": 504,
}


class ProviderError(AgentsseError):
    """A model API that answered with an error, or with nothing that can be understood.

    Args:
        message: Says which provider, and what it said; holds no key.
        code: What was wrong.
        retry_after: Seconds that the provider wants to be left alone, if it says so.

    Attributes:
        is_transient: Whether the same call may succeed in a moment.
        is_final: Whether it would fail at any other model as well.
    """

    def __init__(
        self, message: str, *, code: Fault = "provider_error", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code: Fault = code  # type: ignore[misc]  # here each error has its own
        self.status = _FAULT_STATUS.get(code, 502)  # type: ignore[misc]  # and it says how bad
        self.retry_after = retry_after

    @property
    def is_transient(self) -> bool:
        """Whether the same call may succeed in a moment."""
        return self.code in TRANSIENT

    @property
    def is_final(self) -> bool:
        """Whether it would fail at any other model as well."""
        return self.code in FINAL


class Unencodable(AgentsseError, ValueError):
    """A value that JSON cannot hold; the message says where in it."""

    code = "unencodable"


# Shapes of credentials that find their way into messages: a header, a field, a query parameter, the
# password in an URL, a vendor's key. What is configured by name is blanked by name as well.
_QUOTE = r"\\*[\"']"
_IS = rf"(?:(?:{_QUOTE})?\s*[:=]|{_QUOTE}\s*,)\s*(?:b?{_QUOTE})?"  # also (b"name", b"value")
_VALUE = r"(?:(?<=[\"'])[^\"'\\\r\n]+|[^\s\"'\\,;&]+)"  # between quotes a value may hold spaces
_CREDENTIALS = tuple(
    re.compile(shape, re.IGNORECASE)
    for shape in (
        rf"((?:authorization|cookie){_IS})[^\"'\\\r\n]+",  # any scheme, all cookies
        rf"((?:api[-_]?key|token|secret|password){_IS}){_VALUE}",
        r"((?:bearer|basic)\s+)[^\s\"'\\,;&]+",
        r"(://[^/\s:@]*:)[^\s/]+(?=@)",
        r"([?&]key=)[^\s\"'\\&#]+",
        r"()\bsk-[a-z0-9_-]{8,}",
    )
)


def redact(text: str) -> str:
    """Blank what looks like a credential in `text`, for a log line.

    Args:
        text: Any text, a traceback for instance.

    Returns:
        The text with every such value replaced by `[redacted]`.
    """
    for credential in _CREDENTIALS:
        text = credential.sub(r"\1[redacted]", text)
    return text
