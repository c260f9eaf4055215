"""One request, from its head to the end of its response: raw ASGI, one task, one scope.

Knows: bodies and their bounds, what a request holds of a run, streams, and the connection's `Wire`.
Must never know a dialect, what a request means, nor how bytes reach the socket.

A request holds at most one run, or one feed, by a `Lease`. It takes hold in the same sync step that
starts or finds it, and lets go in the `finally` of `Exchange.run`, wherever that is left from: so a
client that vanishes between two steps is seen to leave like any other.
"""

import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Mapping
from functools import partial
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

import attrs
import trio

from .dialects import MAX_HISTORY, Framing, Reply, problem_reply
from .errors import (
    AgentsseError,
    BodyTimeout,
    Forbidden,
    Misdirected,
    NotAllowed,
    Overloaded,
    TooLarge,
)
from .events import Problem
from .feed import FeedReader
from .listener import SlowClient
from .log import MAX_WRITE, CloseReason, Reader
from .runs import Policy, Run, Runs

RETRY_AFTER_ROTATION = (500, 3_000)  # milliseconds; spread, or all come back at once
_LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
SMALL = 16 * 1024  # bytes of last frames that go out together with the end of the body

Headers = Mapping[str, str]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@attrs.frozen
class AppOptions:
    """How the server speaks; seconds and bytes where nothing else is said.

    Attributes:
        heartbeat: Silence after which a stream says something meaningless.
        rotation: Age at which a GET stream is asked to come back, times 0.8 to 1; 0 for never.
        max_body: Of a request.
        max_history: Of one by which a client may post its history, as its dialect says.
        max_bodies: Of all requests that are being read, together.
        allowed_hosts: Names in the Host header beside those of loopback, without port.
        body_patience: How long a request's body may take to come.
        cancel_patience: How long a cancel request waits for the run to be gone: cleanup has 5 s.
    """

    heartbeat: float = 10.0
    rotation: float = 600.0
    max_body: int = 1024 * 1024
    max_history: int = MAX_HISTORY
    max_bodies: int = 256 * 1024 * 1024
    allowed_hosts: tuple[str, ...] = ()
    body_patience: float = 60.0
    cancel_patience: float = 6.0


@attrs.define(eq=False)
class Bodies:
    """Bytes of requests that have come and not been read yet, of all connections together.

    Attributes:
        limit: How many there may be.
    """

    limit: int
    _held: Counter[object] = attrs.field(factory=Counter)
    _total: int = 0

    @property
    def is_full(self) -> bool:
        """Whether no more should be taken."""
        return self._total > self.limit

    def take(self, holder: object, size: int) -> None:
        """Count what somebody holds."""
        self._held[holder] += size
        self._total += size

    def drop(self, holder: object) -> None:
        """Count no more what somebody held."""
        self._total -= self._held.pop(holder, 0)


@attrs.define
class StreamCounts:
    """What operators want to know of streams."""

    open: int = 0
    closed: Counter[CloseReason] = attrs.field(factory=Counter)
    bytes: int = 0


class _Wire(Protocol):
    def when_left(self, call: Callable[[], bool], /) -> None: ...

    async def write(self, data: bytes | memoryview, /) -> None: ...

    def write_with_end(self, data: bytes, /) -> None: ...


def _let_nothing_go(_reason: CloseReason) -> None:
    """Hold nothing."""


@attrs.define(eq=False)
class Lease:
    """What a request holds of a run or of a feed, and how its end is told.

    Attributes:
        reason: Why it ended; the first one stands.
    """

    run: Run | None = None
    reader: Reader | FeedReader | None = None
    reason: CloseReason | None = None
    _let_go: Callable[[CloseReason], object] = _let_nothing_go

    def take(self, run: Run, reader: Reader | None = None, *, policy: Policy | None = None) -> None:
        """Hold a run, by the reader that was attached to it or just by waiting for it."""
        self.run, self.reader = run, reader
        if reader is None:
            run.hold(self, policy)
            self._let_go = partial(run.release, self)
        else:
            self._let_go = partial(run.detach, reader)

    def take_feed(self, reader: FeedReader, let_go: Callable[[], object]) -> None:
        """Hold a feed's reader, and call `let_go` once it is detached."""
        self.reader = reader

        def detach(_reason: CloseReason) -> None:
            reader.feed.detach(reader)
            let_go()

        self._let_go = detach

    def withdraw(self) -> None:
        """Hold nothing, as if nothing had been taken: nobody has left."""
        self.release("finished")
        self.run = self.reader = self.reason = None

    def end(self, reason: CloseReason) -> None:
        """Note why the request is done with the run."""
        self.reason = self.reason or reason

    def leave(self) -> None:
        """Let go for a client that is gone, and has not had the end of its response."""
        if self.reason == "finished":  # but the last of it has not gone out
            self.reason = None
        self.release("client_left")

    def release(self, otherwise: CloseReason) -> CloseReason:
        """Let go; returns why, which is `otherwise` where nobody has said."""
        self.reason = self.reason or otherwise
        let_go, self._let_go = self._let_go, _let_nothing_go  # it refers to this lease
        let_go(self.reason)
        return self.reason


class EventStream:
    """The frames of a run or a feed, written to the wire as they come, in one write per wake-up."""

    def __init__(
        self,
        *,
        lease: Lease,
        runs: Runs,
        wire: _Wire,
        framing: Framing,
        options: AppOptions,
        counts: StreamCounts,
        rotates: bool,
    ) -> None:
        assert lease.reader is not None
        self._runs, self._reader, self._lease = runs, lease.reader, lease
        self._wire, self._framing, self._options, self._counts = wire, framing, options, counts
        self._rotates = rotates
        self._written_at = trio.current_time()
        self._is_waiting = False

    def leave(self) -> bool:
        """Have a stream that waits for news end, since its client has gone; says if it does.

        To ring is cheaper than to cancel, which counts where thousands leave at once.
        """
        if self._is_waiting:
            self._reader.close("client_left")
        return self._is_waiting

    async def pour(self) -> None:
        """Write until the stream is over, and have the lease know why.

        Cancelled, it leaves the reason to whoever cancels.
        """
        timer, now = self._runs.timer, trio.current_time()
        if self._framing.heartbeat is not None:
            self._beat = timer.call_at(now + self._options.heartbeat, self._see_silence)
        rotation = None
        if self._rotates and self._options.rotation:
            age = self._options.rotation * random.uniform(0.8, 1.0)  # noqa: S311  # to spread load
            rotation = timer.call_at(now + age, self._rotate)
        try:
            await self._pour()
        except SlowClient:
            self._lease.end("slow_client")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lease.end("client_left")
        finally:
            if self._framing.heartbeat is not None:
                self._beat.cancel()
            if rotation is not None:
                rotation.cancel()

    async def _pour(self) -> None:
        reader = self._reader
        # The head goes out with the first write: what is there already comes along.
        await self._write(self._framing.prelude + reader.take())
        while True:
            if reader.closing is not None:
                if reader.closing == "client_left":
                    return
                if self._framing.farewell is not None:
                    milliseconds = random.randint(*RETRY_AFTER_ROTATION)  # noqa: S311  # to spread load
                    await self._write(self._framing.farewell(milliseconds))
                self._lease.end(reader.closing)
                return
            if frames := reader.take():
                if reader.is_finished and len(frames) <= SMALL:
                    self._wire.write_with_end(frames)
                    self._counts.bytes += len(frames)
                else:
                    await self._write(frames)
            elif reader.is_behind:  # the encoder is on its way through a long log
                await trio.lowlevel.checkpoint()
            elif reader.is_finished:
                self._lease.end("finished")
                return
            else:
                self._is_waiting = True
                await reader.wait()
                self._is_waiting = False
                if reader.beat:
                    reader.beat = False
                    await self._write(self._framing.heartbeat or b"")

    async def _write(self, frames: bytes) -> None:
        if len(frames) <= MAX_WRITE:
            await self._wire.write(frames)
        else:  # each slice has its time, and none is copied
            whole = memoryview(frames)
            for start in range(0, len(frames), MAX_WRITE):
                await self._wire.write(whole[start : start + MAX_WRITE])
        self._written_at = trio.current_time()
        self._counts.bytes += len(frames)

    def _rotate(self) -> None:
        if not self._runs.is_closing:  # else there is nowhere to come back to
            self._reader.close("rotated")

    def _see_silence(self) -> None:
        now, silence = trio.current_time(), self._options.heartbeat
        due = self._written_at + silence
        if due <= now:
            self._reader.ring_for_silence()
            due = now + silence
        self._beat = self._runs.timer.call_at(due, self._see_silence)


@attrs.frozen
class Answer:
    """A whole response, or the head of one that streams.

    Attributes:
        headers: By name; the length of a body is added.
    """

    status: int
    headers: Headers
    body: bytes | EventStream = b""

    def with_headers(self, more: Headers) -> "Answer":
        """The same with more headers."""
        return attrs.evolve(self, headers={**self.headers, **more})


def answer_json(
    body: bytes,
    status: int = 200,
    headers: Headers | None = None,
    *,
    kind: str = "application/json",
) -> Answer:
    """A JSON body, which nobody shall keep."""
    return Answer(
        status, {"Content-Type": kind, "Cache-Control": "no-store", **(headers or {})}, body
    )


def answer_reply(reply: Reply, headers: Headers | None = None) -> Answer:
    """What a dialect has made."""
    merged = {**(headers or {}), **reply.headers}
    return answer_json(reply.body, reply.status, merged, kind=reply.media_type)


def answer_problem(problem: Problem) -> Answer:
    """A problem where no dialect speaks."""
    return answer_reply(problem_reply(problem))


def answer_error(
    error: AgentsseError, present: Callable[[Problem], Reply] = problem_reply
) -> Answer:
    """An error, as a dialect presents it."""
    headers = {}
    match error:
        case Overloaded():
            headers["Retry-After"] = str(error.retry_after)
        case NotAllowed():
            headers["Allow"] = ", ".join(error.allow)
        case _:
            pass
    problem = Problem(code=error.code, message=error.message, status=error.status)
    return answer_reply(present(problem), headers)


def see_stranger(headers: Headers, allowed_hosts: Container[str]) -> str | None:
    """Refuse what a foreign page, or a name that was bound to this address, may send.

    Args:
        headers: By lower-case name.
        allowed_hosts: Names in the Host header beside those of loopback.

    Returns:
        The origin of the page that asks, if one does.

    Raises:
        Misdirected: The Host is none of this server's names.
        Forbidden: The page is from elsewhere.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    name = _without_port(host.lower())
    if host and name not in LOOPBACK_NAMES and name not in allowed_hosts:
        raise Misdirected(
            f"Host: expected a name of this server ({', '.join(sorted(LOOPBACK_NAMES))}), "
            f"got {host[:80]!r}; add it to allowed_hosts in [server]"
        )
    if origin is not None and not _is_local(origin):
        raise Forbidden(
            f"Origin: expected a page from localhost, 127.0.0.1 or [::1], got {origin[:80]!r}"
        )
    return origin


def allow_origin(origin: str | None) -> Headers:
    """What lets a page of this machine read the response."""
    if origin is None or not _is_local(origin):
        return {}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": ("Location, Content-Location, Retry-After, X-Request-Id"),
        "Vary": "Origin",
    }


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isascii() and port.isdigit() else host


def _is_local(origin: str) -> bool:
    return _LOCAL_ORIGIN.fullmatch(origin) is not None


class Exchange:
    """A request, and the response to it.

    Attributes:
        method: In capitals.
        path: Decoded; empty where the target is no valid URL.
        headers: By lower-case name; of a repeated one, the last.
        lease: What it holds.
        wire: The connection's way out.
        status: Of the response, once it has begun.
        has_left: Whether the client is gone, and this with it.
        is_streaming: Whether it counts as a stream.
    """

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.scope, self.receive, self._send = scope, receive, send
        self.method: str = scope["method"]
        self.path = _path_in(scope["path"])
        self.headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.wire: _Wire = scope["state"]["wire"]
        self.lease = Lease()
        self.status: int | None = None
        self.has_left = self.is_streaming = False
        self._stream: EventStream | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The fields of the query string."""
        query: bytes = self.scope["query_string"]
        return parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else []

    async def read_body(self, most: int, bodies: Bodies, patience: float) -> bytes:
        """Take the whole body; the caller has `bodies` drop it when it is done with it.

        Args:
            most: Bytes that it may have.
            bodies: What it is counted in meanwhile.
            patience: Seconds that it may take.

        Raises:
            TooLarge: It has more, or says so.
            Overloaded: All bodies together have more than there may be.
            BodyTimeout: It did not come in time.

        What is refused is not read on; the listener drops it.
        """
        if not {"content-length", "transfer-encoding"} & self.headers.keys():
            await trio.lowlevel.checkpoint_if_cancelled()
            return b""
        announced = self.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > most:
            raise _too_large(most)
        pieces: list[bytes] = []
        taken, is_whole = 0, False
        with trio.move_on_after(patience) as waiting:
            while not is_whole:
                message = await self.receive()
                if message["type"] != "http.request":
                    await trio.sleep_forever()  # it has left: this is being cancelled
                piece = message.get("body", b"")
                is_whole = not message.get("more_body", False)
                taken += len(piece)
                if taken > most:
                    raise _too_large(most)
                bodies.take(self, len(piece))
                if bodies.is_full:
                    raise Overloaded(
                        f"expected at most {bodies.limit} bytes of requests at once, got more; "
                        "try again"
                    )
                pieces.append(piece)
        if waiting.cancelled_caught:
            raise BodyTimeout(f"expected the whole body within {patience:g} s, got {taken} bytes")
        return b"".join(pieces)

    async def run(self, answer: Callable[["Exchange"], Awaitable[Answer | None]]) -> None:
        """Answer, unless the client leaves before that is done; then let go of what is held.

        Args:
            answer: Makes the answer; None where it has sent one by `send`.

        Cancelled from outside, it lets go as if the connection had failed.
        """
        self.wire.when_left(self._leave)
        if self.has_left:
            await trio.lowlevel.checkpoint()
            return
        try:
            made = await answer(self)
            if made is not None:
                await self._respond(made)
        except Exception:
            self.lease.end("error")  # ours: whoever was reading may come back
            raise

    def _leave(self) -> bool:
        self.has_left = True
        self.lease.leave()  # now: of thousands that leave, each run ends that sooner
        return self._stream is not None and self._stream.leave()

    async def send(self, message: dict[str, Any]) -> None:
        """Send a part of the response, as ASGI has it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def _respond(self, answer: Answer) -> None:
        if isinstance(answer.body, EventStream):
            await self._begin(answer)
            # What the request said is not needed any more, and a stream may last for hours.
            self.headers, self.scope["headers"] = {}, ()
            self._stream = answer.body
            await answer.body.pour()
            if self.has_left:
                return
            body = b""
        else:
            body = answer.body
            await self._begin(answer, None if answer.status == 204 else len(body))
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def _begin(self, answer: Answer, length: int | None = None) -> None:
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in answer.headers.items()
        ]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        await self.send(
            {"type": "http.response.start", "status": answer.status, "headers": headers}
        )


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"expected a body of at most {most} bytes, got more")


def _path_in(target: str) -> str:
    """The path of a target, which may be absolute; empty where it is no valid URL."""
    if target.startswith("/"):
        return target
    try:
        return urlsplit(target).path
    except ValueError:  # such as `http://[`
        return ""


def shown_path(target: bytes) -> str:
    """The path of a request's target, still escaped: fit for a log, and without a password."""
    text = target.decode("ascii", "replace")
    return text if text.startswith("/") else "/" + text.partition("//")[2].partition("/")[2]
