"""Our own client: it starts runs, follows what they do through every cut, answers and cancels.

Knows: the native protocol's paths and bodies, its errors, and how to come back to a stream. Must
never know the server's side: it shares the events with it, the wire format, and nothing else.

Theory of operation. A stream here is no connection: it is a place in a log that the server keeps,
named by the id of the last event that was handed out. Connections come and go below it. Whoever
asks for the next event does all the work, in their own task: reads, finds the connection broken,
waits, connects again with that id. So there is nothing in the background, nothing to poll, and a
cancel between two events, or in the middle of a wait, loses nothing.

What was cut in the middle of an event counts for nothing and comes again as a whole. A run's stream
has one true end, `run_finished`; any other end is a cut. A feed has none of its own: there the
server says whether it wants its reader back.

Each request has a connection of its own, which ends with it: a connection that is kept may be
closed by the other side just when a request is on its way, and a cancel must not be lost to that.
"""

import random
import re
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from secrets import token_hex
from typing import Any, Final, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlencode, urlsplit

import attrs
import msgspec
import trio
from msgspec import Struct

from .errors import AgentsseError, BadRequest, ProviderError
from .events import (
    EVENT_TYPES,
    AnyEvent,
    RunFinished,
    RunSnapshot,
    ThreadSnapshot,
    decode_event,
    encode_json,
)
from .http import HttpClient, OpenTcp, Response, open_http
from .sse import Decoder, Frame, FrameTooLarge

URL: Final = "http://127.0.0.1:8080"  # where `agentsse serve` listens, if nobody says otherwise
TRIES: Final = 10  # to come back, without an event in between; with the waits below, minutes
FIRST_WAIT: Final = 1.0  # seconds, where the server has not said how long
MOST_WAIT: Final = 30.0  # seconds; what is doubled with each try has to end somewhere
MOST_PATIENCE: Final = 300.0  # seconds that a server's Retry-After may ask for
SPREAD: Final = (1.0, 1.25)  # times as long, at random: or all clients come back at once
LASTING: Final = 30.0  # seconds; a connection that was good for so long was no failure
MAX_ANSWER: Final = 256 * 1024 * 1024  # bytes of an answer that is no stream; a run has 64 MiB
MAX_PROBLEM: Final = 64 * 1024  # bytes of an error
MAX_QUOTED: Final = 200  # characters of what a stranger says

LATER: Final = frozenset({429, 502, 503, 504})  # statuses that may be others in a moment
_LOCATION: Final = re.compile(r"/runs/([^/?#]+)/events")
_FAREWELL: Final = re.compile(rb"\nretry: [0-9]+\n\n\Z")  # the last of a stream to come back to
_FAREWELL_BYTES: Final = 64  # more than it has

T = TypeVar("T")
Report = Callable[..., object]
Hearing = Literal["steer", "follow_up"]


def _tell_nobody(_event: str, **_facts: Any) -> None:
    """Report nothing."""


class ServerError(AgentsseError):
    """What a server says that is no success, or that is nothing of agentsse's.

    Args:
        message: What it said; or what was expected, what came, and what to look at.
        code: The server's own name for it; `malformed` where the answer is not agentsse's.
        status: Of HTTP, as it came; 502 where none did that says it.
        retry_after: Seconds after which the server wants to be asked again.
        is_transient: Whether the same request may succeed in a moment.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int,
        retry_after: float | None = None,
        is_transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # here each error has its own
        self.status = status  # type: ignore[misc]  # and its status
        self.retry_after = retry_after
        self.is_transient = is_transient


class Unreachable(ServerError):
    """No connection to the server, or one that broke before all had come.

    The code is `unreachable`, `timeout`, or `incomplete`. With the last one the server may have
    done what it was asked.
    """


class ToolCard(Struct, frozen=True, kw_only=True):
    """A tool of an agent."""

    name: str
    description: str = ""


class AgentCard(Struct, frozen=True, kw_only=True):
    """An agent, as the server tells of it."""

    name: str
    description: str = ""
    model: str | None = None
    on_disconnect: str | None = None
    tools: tuple[ToolCard, ...] = ()


class StartOptions(TypedDict, total=False):
    """What may be said with a start; what is not said, the agent or the server decides.

    Attributes:
        thread_id: The conversation that it belongs to.
        on_disconnect: `cancel`, `continue`, `grace` or `grace:SECONDS`: what becomes of the run
            when nobody reads it any more.
        metadata: Anything that JSON can hold; shown with the run.
        if_busy: `reject` or `enqueue`, where the thread has a run that goes on.
        seconds: The run's limit; the server cancels it then.
        coalesce_ms: Milliseconds in which the deltas of a part become one event; 0 for each.
        idempotency_key: The same key finds the same run, however often it is sent. Where
            `on_disconnect` is left out, a key makes it `grace`.
    """

    thread_id: str
    on_disconnect: str
    metadata: Any
    if_busy: Literal["reject", "enqueue"]
    seconds: float
    coalesce_ms: float
    idempotency_key: str


@asynccontextmanager
async def open_client(
    url: str = URL,
    *,
    headers: Mapping[str, str] | None = None,
    tries: int = TRIES,
    report: Report = _tell_nobody,
    open_tcp: OpenTcp | None = None,
) -> "AsyncIterator[Client]":
    """Open a client; leaving the context closes it, and sends nothing.

    Args:
        url: The server's, with the path that a proxy, or a mount, may have put before its own.
        headers: Sent with every request, such as what a proxy wants to see; never told in an error.
        tries: How often a stream tries to come back without an event in between, before it fails.
        report: Called with `resuming` and its facts before each wait of a stream that was cut:
            `path`, `after`, `seconds`, `reason`.
        open_tcp: How to reach a host's port; a stream of any kind will do.

    Raises:
        BadRequest: The URL cannot be one of a server.
    """
    base = _see_base(url)
    async with open_http(open_tcp=open_tcp or _open_tcp) as http:
        yield Client(_Server(base, http, dict(headers or {}), tries, report))


@attrs.frozen(eq=False)
class Client:
    """A server, as its clients see it; made by `open_client`.

    Every method may raise `ServerError`, or its kind `Unreachable`; `Unencodable` where JSON cannot
    hold what it is given. None has a time limit of its own: callers have scopes for that. Nothing
    is sent twice, but for what is said at `run`. Any number of tasks may use one client.
    """

    _server: "_Server"

    @property
    def url(self) -> str:
        """The server's, without a slash at its end."""
        return self._server.url

    # Runs

    async def agents(self) -> tuple[AgentCard, ...]:
        """List what can be run."""
        return (await self._server.ask(_Ask("GET", "/agents"), _Agents)).agents

    async def start(
        self, agent: str, input: Any = None, **options: Unpack[StartOptions]
    ) -> RunSnapshot:
        """Start a run in the background, and come back at once; `stream` shows what it does.

        Args:
            agent: Its name.
            input: Anything that JSON can hold.
            options: See `StartOptions`. The policy is `continue` unless one is named; another one
                counts from the run's first reader on.
        """
        return await self._server.ask(_start(agent, input, options, background=True), RunSnapshot)

    def run(self, agent: str, input: Any = None, **options: Unpack[StartOptions]) -> "RunStream":
        """Start a run and stream what it does: `async with client.run("guide", "Hello") as run`.

        Leaving the context closes the connection; so does a cancel. Where the run's policy is
        `cancel`, which it is unless somebody has said otherwise, and nobody else reads it, the run
        is cancelled then. To the server a connection that breaks looks the same: so coming back is
        worth something under `grace` and `continue`, while under `cancel` what is left is the
        run's end.

        Where `on_disconnect` is named the start has an idempotency key, and is sent again if the
        connection breaks before the head of the answer is here; else that is `Unreachable`.

        Args:
            agent: Its name.
            input: Anything that JSON can hold.
            options: See `StartOptions`.
        """
        if "on_disconnect" in options:
            options.setdefault("idempotency_key", token_hex(16))
        return RunStream(self._server, _start(agent, input, options, background=False))

    def stream(
        self, run_id: str, *, after: str | int = 0, types: Iterable[str] = ()
    ) -> "RunStream":
        """Stream what a run does, or has done: `async with client.stream(run_id) as run`.

        Leaving counts as leaving, also of one who only looks on: see `run`.

        Args:
            run_id: Of a run that goes on, or is still kept.
            after: The id of the last event that is known; 0 for all from the beginning.
            types: Those that are wanted, besides `run_finished`; none for all.
        """
        ask = _watching("runs", run_id, types=types)
        return RunStream(self._server, ask, Decoder(last_id=str(after)), run_id=run_id)

    async def show(self, run_id: str) -> RunSnapshot:
        """Show a run as it stands."""
        return await self._server.ask(_Ask("GET", f"/runs/{_quoted(run_id)}"), RunSnapshot)

    async def cancel(
        self,
        run_id: str,
        *,
        reason: str | None = None,
        mode: Literal["now", "after_step"] = "now",
    ) -> RunSnapshot:
        """Cancel a run and wait until it is gone; one that is over stays as it is.

        Args:
            run_id: Which.
            reason: Words for whoever reads its end.
            mode: With `after_step`, the steps that are open may finish.

        Returns:
            The run, with its receipt; without one where it was not gone after 6 seconds.
        """
        return await self._order(run_id, "cancel", {"reason": reason, "mode": mode})

    async def answer(
        self, run_id: str, answers: Mapping[str, Any], *, request_id: str | None = None
    ) -> RunSnapshot:
        """Answer what a run asks.

        Args:
            run_id: Which.
            answers: By question id; the question of `run.ask("...")` has the id `answer`.
            request_id: Of the `input_requested` event; needed where several are open.
        """
        body = {"answers": dict(answers), "request_id": request_id}
        return await self._order(run_id, "input", body)

    async def tell(self, run_id: str, text: str, *, mode: Hearing = "steer") -> RunSnapshot:
        """Say something to a run that goes on: it hears it at its next turn, or before its end."""
        return await self._order(run_id, "messages", {"text": text, "mode": mode})

    async def pause(self, run_id: str, *, reason: str | None = None) -> RunSnapshot:
        """Let a run rest before its next step."""
        return await self._order(run_id, "pause", {"reason": reason})

    async def resume(self, run_id: str) -> RunSnapshot:
        """Let a run that rests go on."""
        return await self._order(run_id, "resume", {})

    async def _order(self, run_id: str, verb: str, body: Mapping[str, Any]) -> RunSnapshot:
        return await self._server.ask(_post(f"/runs/{_quoted(run_id)}/{verb}", body), RunSnapshot)

    # Threads and feeds

    async def tell_thread(
        self, thread_id: str, text: str, *, mode: Hearing = "steer"
    ) -> ThreadSnapshot:
        """Say something to a thread: an answer, a message, or the input of a new run."""
        path = f"/threads/{_quoted(thread_id)}/messages"
        return await self._server.ask(_post(path, {"text": text, "mode": mode}), ThreadSnapshot)

    async def show_thread(self, thread_id: str) -> ThreadSnapshot:
        """Show a thread as it stands."""
        return await self._server.ask(_Ask("GET", f"/threads/{_quoted(thread_id)}"), ThreadSnapshot)

    def feed(
        self,
        thread_id: str | None = None,
        *,
        after: str = "",
        types: Iterable[str] = (),
        watch: Iterable[str] = (),
    ) -> "EventStream":
        """Stream what happens in a thread, or on the whole server: `async with client.feed("t")`.

        A feed forgets: what it no longer held when its reader came back is one `gap` event, and so
        is what was before the server was started anew. It ends when the thread is closed. Leaving
        it does nothing to any run.

        Args:
            thread_id: Which thread's; None for the server's, which has no deltas.
            after: The id of the last event that is known, or `now`. Without one a thread's begins
                with what is held, the server's with what comes.
            types: Those that are wanted, besides `run_finished` and `gap`; none for all.
            watch: Child runs of which all is wanted; `*` stands for every one.
        """
        kind = "" if thread_id is None else "threads"
        ask = _watching(kind, thread_id or "", types=types, watch=watch)
        return EventStream(self._server, ask, Decoder(last_id=after))


# Streams ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class EventStream:
    """Events, one after the other, whatever happens to the connection; made by `Client.feed`.

    A context manager, whose end closes the connection, and in it an async iterator, for one task at
    a time. It raises `ServerError` where coming back makes no sense or has failed too often, and is
    over then. A wait for the next event that is cancelled loses nothing: the stream may be read on.
    Types that this version does not know are passed over.
    """

    _server: "_Server"
    _ask: "_Ask"
    _decoder: Decoder = attrs.field(factory=Decoder)
    _frames: deque[Frame] = attrs.field(factory=deque, init=False)
    _given: str = attrs.field(init=False)  # the id of the last frame handed out
    _is_over: bool = attrs.field(default=False, init=False)
    _is_closed: bool = attrs.field(default=False, init=False)
    # The connection, ...
    _chunks: AsyncIterator[bytes] | None = attrs.field(default=None, init=False)
    _connection: AsyncExitStack = attrs.field(factory=AsyncExitStack, init=False)
    _since: float = attrs.field(default=0.0, init=False)
    _tail: bytes = attrs.field(default=b"", init=False)
    # ... and why there is none; None where the server has asked to come back.
    _fault: ServerError | None = attrs.field(default=None, init=False)
    _failures: int = attrs.field(default=0, init=False)  # without an event in between

    @property
    def last_id(self) -> str:
        """The place: what to give as `after`, to go on behind the last event."""
        return self._given if self._frames else self._decoder.last_id

    def __attrs_post_init__(self) -> None:
        self._given = self._decoder.last_id

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            ServerError: The server does not answer with a stream. Where nobody listens that is said
                at once; a server that says `Retry-After` is asked again.
        """
        try:
            await self._connect()
        except ServerError as error:
            if not self._ask.may_follow(error):
                raise
            self._fault, self._failures = error, 1
            await self._come_back()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        """Close the connection, if there is one."""
        self._is_closed, self._chunks = True, None
        await self._connection.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnyEvent:
        await trio.lowlevel.checkpoint()
        if self._is_closed:
            raise trio.ClosedResourceError("expected to be read before its context was left")
        while True:
            while self._frames:
                frame = self._frames.popleft()
                self._given = frame.id
                if frame.event in EVENT_TYPES:
                    return self._take(frame)
            if self._is_over:
                raise StopAsyncIteration
            if self._chunks is None:
                await self._come_back()
            else:
                await self._read(self._chunks)

    # Reading

    def _take(self, frame: Frame) -> AnyEvent:
        try:
            return decode_event(frame.data)
        except msgspec.DecodeError as error:
            self._frames.clear()
            raise self._not_understood(f"{frame.event} {frame.data[:80]!r}: {error}") from error

    async def _read(self, chunks: AsyncIterator[bytes]) -> None:
        """Take in what comes, or take note that nothing more does."""
        try:
            chunk = await anext(chunks, None)
        except ProviderError as error:
            await self._lose(self._server.failure(error))
            return
        if chunk is None:
            asks_back = _FAREWELL.search(self._tail) is not None
            await self._lose(None if asks_back else self._ended())
            return
        self._tail = (self._tail + chunk)[-_FAREWELL_BYTES:]
        try:
            self._frames += self._decoder.feed(chunk)
        except FrameTooLarge as error:
            raise self._not_understood(str(error)) from error
        if self._frames:
            self._failures = 0

    def _ended(self) -> ServerError | None:
        """Judge an answer that has ended as answers do, without a word of coming back."""
        self._is_over = True
        return None

    async def _lose(self, fault: ServerError | None) -> None:
        """Be without a connection."""
        was_good = fault is None or trio.current_time() - self._since >= LASTING
        self._failures = (0 if was_good else self._failures) + (fault is not None)
        self._fault, self._chunks = fault, None
        await self._connection.aclose()

    def _not_understood(self, came: str) -> ServerError:
        self._is_over = True
        return self._server.malformed(self._ask, came)

    # Connecting

    async def _come_back(self) -> None:
        """Connect again, after a wait; and again."""
        while self._chunks is None and not self._is_over:
            if self._fault is not None and self._failures > self._server.tries:
                self._is_over = True
                raise self._given_up(self._fault) from self._fault
            seconds = self._wait()
            self._server.report(
                "resuming",
                path=self._ask.path,
                after=self._decoder.last_id,
                seconds=round(seconds, 3),
                reason=self._fault.message if self._fault else "the server asked to come back",
            )
            await trio.sleep(seconds)
            try:
                await self._connect()
            except ServerError as error:
                if not error.is_transient:
                    self._is_over = True
                    raise self._explained(error) from error
                self._fault, self._failures = error, self._failures + 1

    def _wait(self) -> float:
        """Seconds until the next try."""
        asked = self._decoder.retry
        wait = FIRST_WAIT if asked is None else asked / 1000
        wait = min(wait * 2.0 ** min(max(self._failures - 1, 0), 16), MOST_WAIT)
        if self._fault is not None and self._fault.retry_after is not None:
            wait = max(wait, min(self._fault.retry_after, MOST_PATIENCE))
        return wait * random.uniform(*SPREAD)  # noqa: S311  # to spread load

    async def _connect(self) -> None:
        """Open a connection behind the last event; raises where no stream comes of it."""
        server, ask, last_id = self._server, self._ask, self._decoder.last_id
        async with AsyncExitStack() as stack:
            response = await stack.enter_async_context(server.open(ask, last_id))
            if response.status == 204:  # nothing is left behind that id
                self._is_over = True
                return
            if response.status != 200:
                raise await server.refusal(ask, response)
            kind = response.headers.get("content-type", "")
            if kind.partition(";")[0].strip().lower() != "text/event-stream":
                raise server.malformed(ask, f"content-type {kind!r}")
            self._see_head(response)
            self._decoder = Decoder(last_id=last_id, retry=self._decoder.retry)
            self._since, self._tail = trio.current_time(), b""
            self._chunks, self._connection = response.chunks, stack.pop_all()

    def _see_head(self, response: Response) -> None:
        """Note what the head of an answer tells."""

    def _explained(self, error: ServerError) -> ServerError:
        """An error, as it is to be understood by whoever had a stream before."""
        return error

    def _given_up(self, fault: ServerError) -> ServerError:
        return type(fault)(
            f"{fault.message}; given up after {self._server.tries} tries to come back, "
            f"at id {self._decoder.last_id or 0}",
            code=fault.code,
            status=fault.status,
            retry_after=fault.retry_after,
            is_transient=True,
        )


@attrs.define(eq=False)
class RunStream(EventStream):
    """What one run does, from some event on to its end; made by `Client.run` and `Client.stream`.

    Attributes:
        run_id: The run's.
        end: Its last event, once it was handed out. A stream that ends without one was asked for
            what comes behind a run's end, which is nothing.
    """

    run_id: str = attrs.field(default="", kw_only=True)
    end: RunFinished | None = attrs.field(default=None, init=False)

    def _take(self, frame: Frame) -> AnyEvent:
        event = super()._take(frame)
        if isinstance(event, RunFinished):
            self.end, self._is_over = event, True
        return event

    def _ended(self) -> ServerError | None:
        return Unreachable(
            f"{self._server.url}: expected run_finished, got the end of the stream",
            code="incomplete",
            status=502,
            is_transient=True,
        )

    def _see_head(self, response: Response) -> None:
        if not self.run_id:
            place = response.headers.get("location", "")
            if (found := _LOCATION.search(place)) is None:
                raise self._server.malformed(self._ask, f"location {place!r}")
            self.run_id = found[1]
            self._ask = _watching("runs", self.run_id)

    def _explained(self, error: ServerError) -> ServerError:
        if error.status != 404 or not self.run_id:
            return error
        return ServerError(
            f"run {self.run_id} is gone, at id {self._decoder.last_id or 0}: the server was "
            f"started anew, or keeps it no longer; it says: {error.message}",
            code=error.code,
            status=error.status,
        )


# Requests -----------------------------------------------------------------------------------------


@attrs.frozen
class _Ask:
    """A request, but for where it goes."""

    method: str
    path: str
    body: bytes | None = attrs.field(default=None, repr=False)
    accept: str = "application/json"
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)

    def may_follow(self, error: ServerError) -> bool:
        """Whether the first one of a stream may be sent again, when it has failed like this."""
        if self.method == "GET":  # where nobody listens the URL is wrong: better said at once
            return error.is_transient and error.code not in ("unreachable", "timeout")
        return error.code == "incomplete" and "idempotency-key" in self.headers


class _Agents(Struct):
    agents: tuple[AgentCard, ...]


class _Problem(Struct):
    code: str
    detail: str


def _post(
    path: str,
    body: Mapping[str, Any],
    *,
    accept: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> _Ask:
    told = {name: value for name, value in body.items() if value is not None}
    encoded = bytes(encode_json(told, what="the request"))
    sent = {"content-type": "application/json", **(headers or {})}
    return _Ask("POST", path, encoded, accept, sent)


def _start(agent: str, input: Any, options: StartOptions, *, background: bool) -> _Ask:
    body = {"input": input, **options, "background": background or None}
    key, body["timeout_s"] = body.pop("idempotency_key", None), body.pop("seconds", None)
    return _post(
        f"/agents/{_quoted(agent)}/runs",
        body,
        accept="application/json" if background else "text/event-stream",
        headers={} if key is None else {"idempotency-key": str(key)},
    )


def _watching(kind: str, id: str, *, types: Iterable[str] = (), watch: Iterable[str] = ()) -> _Ask:
    wanted = {"types": ",".join(types), "watch": ",".join(watch)}
    query = urlencode({name: value for name, value in wanted.items() if value})
    place = f"/{kind}/{_quoted(id)}" if kind else ""
    return _Ask("GET", f"{place}/events{'?' if query else ''}{query}", accept="text/event-stream")


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _see_base(url: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(url)
        is_bare = url.isascii() and not (parts.query or parts.fragment or "@" in parts.netloc)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and is_bare:
            return url.rstrip("/")
    shown = url.rpartition("@")[2][:MAX_QUOTED]  # without a password
    raise BadRequest(
        f"expected the URL of a server, such as {URL}, got {shown!r}; what a proxy wants to see "
        "goes into headers"
    )


@attrs.frozen(eq=False)
class _Server:
    """Where requests go, and what its answers mean."""

    url: str
    http: HttpClient = attrs.field(repr=False)
    headers: Mapping[str, str] = attrs.field(repr=False)
    tries: int
    report: Report = attrs.field(repr=False)

    async def ask(self, ask: _Ask, kind: type[T]) -> T:
        """Send a request and read its answer, all of it."""
        async with self.open(ask) as response:
            if response.status >= 300:
                raise await self.refusal(ask, response)
            answer = bytearray()
            async for chunk in response.chunks:
                answer += chunk
                if len(answer) > MAX_ANSWER:
                    raise self.malformed(ask, f"more than {MAX_ANSWER} bytes")
        try:
            return msgspec.json.decode(bytes(answer), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.malformed(ask, f"{bytes(answer[:80])!r}: {error}") from error

    @asynccontextmanager
    async def open(self, ask: _Ask, last_id: str = "") -> AsyncIterator[Response]:
        """Send a request, and open its answer."""
        headers = {"connection": "close", "accept": ask.accept, **self.headers, **ask.headers}
        if last_id and ask.method == "GET":
            headers["last-event-id"] = last_id
        try:
            async with self.http.request(
                ask.method, self.url + ask.path, headers=headers, body=ask.body
            ) as response:
                yield response
        except ProviderError as error:
            raise self.failure(error) from error

    def failure(self, error: ProviderError) -> ServerError:
        """What has gone wrong on the way, for whoever asks a server."""
        match error.code:
            case "unreachable" | "timeout":
                said = f"{error.message}; is the server running? `agentsse serve` starts one"
            case "incomplete":
                said = error.message
            case "malformed":
                said = f"{error.message}; is {self.url} an agentsse server?"
                return ServerError(said, code="malformed", status=error.status)
            case _:  # it cannot be sent, nor will it ever
                return ServerError(error.message, code=error.code, status=400)
        return Unreachable(said, code=error.code, status=error.status, is_transient=True)

    async def refusal(self, ask: _Ask, response: Response) -> ServerError:
        """Read an answer that is no success."""
        body, status = await response.read_some(MAX_PROBLEM), response.status
        seconds = response.headers.get("retry-after", "")
        is_number = seconds.isascii() and seconds.isdigit() and len(seconds) < 10
        retry_after = float(seconds) if is_number else None
        is_transient = status in LATER or (status >= 500 and retry_after is not None)
        try:
            problem = msgspec.json.decode(body, type=_Problem)
            code, said = problem.code, problem.detail
        except (msgspec.DecodeError, UnicodeDecodeError):
            place = response.headers.get("location", "")
            came = f"status {status}, {f'to {place!r}' if place else repr(body)}"
            code, said = "malformed", self.malformed(ask, came).message
        return ServerError(
            said, code=code, status=status, retry_after=retry_after, is_transient=is_transient
        )

    def malformed(self, ask: _Ask, came: str) -> ServerError:
        """An answer that no agentsse server gives."""
        return ServerError(
            f"{ask.method} {self.url}{ask.path}: expected the answer of an agentsse server, got "
            f"{came[:MAX_QUOTED]}; is the URL right?",
            code="malformed",
            status=502,
        )


async def _open_tcp(host: str, port: int) -> trio.abc.Stream:
    """Connect, and have the kernel see whether the other side is still there.

    A stream may be silent for long, and a machine that vanishes says nothing.
    """
    stream = await trio.open_tcp_stream(host, port)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 20),  # seconds of silence before the first probe; heartbeats come sooner
        ("TCP_KEEPINTVL", 10),  # seconds between probes
        ("TCP_KEEPCNT", 3),  # probes: 50 s from the last byte to the end
    ):
        with suppress(AttributeError, OSError):  # not on every platform
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return stream
