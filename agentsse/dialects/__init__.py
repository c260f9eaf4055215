"""What a client protocol is: routes in, frames out, and nothing in between.

Knows: requests and the few things that any protocol can ask for. Must never know runs, logs or
sockets, nor which dialects there are. A dialect is one value in one file: its routes as data, each
with a pure `decode`, and an `Encoder`. The server is one loop over those values and never names
one.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import attrs
import msgspec

from agentsse.events import AnyEvent, Problem, RunSnapshot

SSE = "text/event-stream; charset=utf-8"


@attrs.frozen
class Request:
    """What a decoder gets to see of an HTTP request.

    Attributes:
        method: In capitals.
        parameters: What stands in the path's `<name>` places.
        query: The query string's fields; of a repeated one, the first.
        headers: By lower-case name.
        body: As it came, within the limit.
    """

    method: str
    parameters: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""


@attrs.frozen(kw_only=True)
class Start:
    """Start a run, and stream it, wait for its end, or leave it to itself.

    Attributes:
        delivery: How the answer comes.
        on_disconnect: The policy that the client asked for; None for the default.
        coalesce: Seconds; None for the server's.
        timeout: Seconds the run may take; None for the agent's or the server's.
        fingerprint: Of the body: the same idempotency key must come with the same one.
        options: What the dialect's encoder is made with.
    """

    agent: str
    input: Any
    delivery: Literal["stream", "wait", "background"]
    on_disconnect: str | None = None
    thread_id: str | None = None
    coalesce: float | None = None
    timeout: float | None = None
    metadata: Any = None
    if_busy: Literal["reject", "enqueue"] = "reject"
    idempotency_key: str | None = None
    fingerprint: bytes = b""
    options: Hashable = None


@attrs.frozen(kw_only=True)
class Watch:
    """Stream a run's events from a place on.

    Attributes:
        after: Event and frame behind which to begin, as `parse_position` gives them.
        dialect: In whose frames; None for the one that was asked.
        headers_only: HEAD: answer like the stream, and end.
    """

    run_id: str
    after: tuple[int, int] = (0, 0)
    dialect: str | None = None
    options: Hashable = None
    headers_only: bool = False


@attrs.frozen(kw_only=True)
class Cancel:
    """Cancel a run, and wait until it is gone."""

    run_id: str
    reason: str | None = None
    mode: Literal["now", "after_step"] = "now"


@attrs.frozen(kw_only=True)
class Answer:
    """Answer what a run asks; `request_id` may be left out where it asks one thing only."""

    run_id: str
    answers: Mapping[str, Any]
    request_id: str | None = None


@attrs.frozen(kw_only=True)
class Show:
    """Show a run as it stands."""

    run_id: str


@attrs.frozen(kw_only=True)
class ListRuns:
    """List the runs that are going on or retained, the newest first."""

    state: str | None = None
    limit: int = 100


@attrs.frozen(kw_only=True)
class ListAgents:
    """List what can be run."""


Intent: TypeAlias = Start | Watch | Cancel | Answer | Show | ListRuns | ListAgents


class Encoder(Protocol):
    """The pure machine of a dialect: events in, frames out; no await, no clock."""

    def feed(self, event: AnyEvent, /) -> Iterable[bytes]:
        """Turn one event into its frames, in order; none is an answer too."""


def problem_json(problem: Problem) -> bytes:
    """Write an error as RFC 9457 has it; `code` is an extension member."""
    return msgspec.json.encode(
        {
            "type": "about:blank",
            "title": problem.code.replace("_", " ").capitalize(),
            "status": problem.status,
            "detail": problem.message,
            "code": problem.code,
        }
    )


@attrs.frozen
class Route:
    """A path, and what a request to it asks for.

    Attributes:
        path: Below the dialect's mount; `<name>` stands for one segment.
        decode: Pure; raises `AgentsseError` where the request makes no sense.
    """

    method: str
    path: str
    decode: Callable[[Request], Intent]


@attrs.frozen(kw_only=True)
class Dialect:
    """A client protocol.

    Attributes:
        mount: The prefix of its routes, `/` for none.
        encoder: Makes the machine for one way of reading (a `Start`'s or `Watch`'s options).
        prelude: First bytes of every stream, sent at once.
        heartbeat: Bytes that mean nothing, for a line that is silent; None where it has none.
        on_disconnect: What leaving a stream means unless the run says otherwise.
        farewell: Frames before the end of a stream whose run goes on, given the milliseconds after
            which the client should come back.
        present: A run as a JSON body.
        problem: An error as a JSON body.
    """

    name: str
    mount: str
    routes: tuple[Route, ...]
    encoder: Callable[[Hashable], Encoder]
    present: Callable[[RunSnapshot], bytes]
    problem: Callable[[Problem], bytes] = problem_json
    problem_type: str = "application/problem+json"
    media_type: str = SSE
    prelude: bytes = b""
    heartbeat: bytes | None = None
    on_disconnect: str = "cancel"
    farewell: Callable[[int], bytes] = lambda _milliseconds: b""
