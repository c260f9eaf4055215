"""What OpenAI's two protocols have in common; there is no dialect in it.

Knows: what an error looks like and which kind it is, how a run's end is told to a client that
expects a model's, questions as text, and texts that come in parts. Must never know a route, nor
what either of the two makes of a run. Source: OpenAI's API reference, as its own clients for Python
and JavaScript read it.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeAlias, assert_never

import attrs
import msgspec
from msgspec import UNSET

from agentsse.errors import BadRequest
from agentsse.events import (
    FinishReason,
    InputRequested,
    Moderation,
    Problem,
    Question,
    RunFinished,
    RunSnapshot,
    StepFinished,
    text_of_json,
)
from agentsse.messages import ToolSpec
from agentsse.sse import comment

from . import MAX_MESSAGES, Framing, Reply

REFUSAL: Final = "This request was refused."
CANCELLED: Final = 499  # what Google's APIs say of it; the client does not try again by itself
DONE: Final = b"data: [DONE]\n\n"
FRAMING: Final = Framing(heartbeat=comment(), ends_at=frozenset({InputRequested}))

encode = msgspec.json.encode


# Ends ---------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Course:
    """What is to be remembered of a response until it ends: how it ends follows from it.

    Attributes:
        has_spoken: Whether the client was given anything but thoughts.
        blocked: What a shield has said; None once something else was said.
        is_filtered: Whether one has said anything.
        stopped: Why the last model call ended, unless something was said since.
    """

    has_spoken: bool = False
    blocked: str | None = None
    is_filtered: bool = False
    stopped: FinishReason | None = None

    def take(self, event: StepFinished | Moderation) -> None:
        """A model call has ended, or a shield does not let something pass."""
        match event:
            case StepFinished():
                self.stopped = event.finish_reason
            case Moderation():
                self.is_filtered, self.blocked = True, event.message or REFUSAL
            case _:
                assert_never(event)

    def speak(self) -> None:
        """Something is said."""
        self.has_spoken, self.stopped, self.blocked = True, None, None

    def begin(self) -> None:
        """A response begins."""
        self.has_spoken, self.is_filtered, self.blocked = False, False, None

    @property
    def cut(self) -> Literal["length", "content_filter"] | None:
        """Why what was said is not all there would be to say."""
        if self.is_filtered or self.stopped == "content_filter":
            return "content_filter"
        return "length" if self.stopped == "length" else None

    def problem(self, end: RunFinished) -> Problem | None:
        """Why the run came to nothing; None where it has succeeded."""
        match end.outcome:
            case "success" if self.stopped == "error":
                message = "the model stopped because of an error"
                return Problem(code="provider_error", message=message, status=502)
            case "success":
                return None
            case "error":
                return end.error or Problem(code="internal", message="the run has failed")
            case "cancelled" | "interrupted":
                cause = end.receipt.cause
                told = f" ({cause})" if cause else ""
                status = 503 if cause == "shutdown" else CANCELLED
                message = f"the run was cancelled{told}"
                return Problem(code="cancelled", message=message, status=status)
            case _:
                assert_never(end.outcome)

    def last_words(self, end: RunFinished) -> tuple[Literal["text", "refusal"], str] | None:
        """What is still to be said: the shield's words, or the result of who has said nothing."""
        if self.blocked is not None:
            return "refusal", self.blocked
        if self.has_spoken or end.result is UNSET or bytes(end.result) == b"null":
            return None
        return "text", text_of_json(end.result)


def asked(questions: Sequence[Question], *, how: str) -> str:
    """Questions as text; of several each with its id, and `how` to answer them."""
    pieces = []
    for question in questions:
        pieces.append(
            question.prompt if len(questions) == 1 else f"[{question.id}] {question.prompt}"
        )
        if question.options:
            labels = (option.label or option.id for option in question.options)
            pieces.append("\n".join(f"- {label}" for label in labels))
    if len(questions) > 1:
        pieces.append(f"({how}, such as: [{questions[0].id}]: your answer)")
    return "\n\n".join(pieces)


def seconds(ts: str) -> int:
    """An event's time, as OpenAI has times."""
    return int(datetime.fromisoformat(ts).timestamp())


# Errors and answers -------------------------------------------------------------------------------


def error_of(problem: Problem, *, param: str | None = None) -> dict[str, Any]:
    """The body of an error; what kind it is follows from the status."""
    match problem.status:
        case 401 | 403:
            kind = "authentication_error" if problem.status == 401 else "permission_error"
        case 429:
            kind = "rate_limit_error"
        case status if 400 <= status < CANCELLED:
            kind = "invalid_request_error"
        case _:
            kind = "server_error"
    error = {"message": problem.message, "type": kind, "param": param, "code": problem.code}
    return {"error": error}


def failed(problem: Problem, *, param: str | None = None) -> Reply:
    """Answer with an error."""
    status = problem.status if 400 <= problem.status < 600 else 500
    return Reply(encode(error_of(problem, param=param)), status)


def failed_run(problem: Problem) -> Reply:
    """The same of a run that has failed: it may have done something, and the SDKs would again."""
    return msgspec.structs.replace(failed(problem), headers={"x-should-retry": "false"})


def no_model(problem: Problem) -> Reply:
    """Answer a request for an agent that there is not; where one was expected, it is a model."""
    return failed(msgspec.structs.replace(problem, code="model_not_found"), param="model")


def present(snapshot: RunSnapshot) -> bytes:
    """A run by itself, which neither protocol ever shows."""
    return encode(snapshot)


def locate(_mount: str, run_id: str, *_: object) -> dict[str, str]:
    """The header that the clients tell of a request; here it names the run."""
    return {"x-request-id": run_id}


# Requests -----------------------------------------------------------------------------------------


class Part(msgspec.Struct, gc=False):
    """A part of a text; `text` or `refusal` has it."""

    type: str
    text: str = ""
    refusal: str = ""


Content: TypeAlias = str | Annotated[list[Part], msgspec.Meta(max_length=MAX_MESSAGES)]


def text_of(
    where: str, content: str | Sequence[Part], kinds: tuple[str, ...], expected: str
) -> str:
    """What a text says, or all of its parts, line by line.

    Args:
        where: It stands, for the error.
        content: The text, or its parts.
        kinds: The types of parts that are text.
        expected: Those of them that the error names.

    Raises:
        BadRequest: One of the parts is none.
    """
    if isinstance(content, str):
        return content
    for place, part in enumerate(content):
        if part.type not in kinds:
            raise BadRequest(
                f"{where}[{place}]: expected a part of the type {expected}, got "
                f"{part.type[:40]!r}, which no agent here is given; describe in words what it holds"
            )
    return "\n".join([part.text or part.refusal for part in content])


def spec_of(name: str, description: str | None, parameters: dict[str, Any] | None) -> ToolSpec:
    """A tool of the client's."""
    return ToolSpec(name, description or "", parameters or {"type": "object", "properties": {}})


def know_wishes(wishes: Iterable[tuple[str, object, str]]) -> None:
    """Refuse what would be missing in the answer.

    Args:
        wishes: The names of fields, whether something is wanted by each, and why it is not here.

    Raises:
        BadRequest: Something is.
    """
    for name, is_wanted, why in wishes:
        if is_wanted:
            raise BadRequest(f"{name}: not available here: {why}; leave it out")
