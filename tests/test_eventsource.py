"""What the world's readers of event streams make of ours: the native dialect, read by real clients.

They are the browser's own EventSource, npm's `eventsource`, PyPI's `httpx-sse`, and `curl -N`, each
over real sockets. What a client has seen is held against the run's own log: the same ids, the same
types, the same bytes of data, in the same order, none twice.

The first two come back by themselves, as the standard has it. The other two are told how by whoever
uses them, which is a loop of a few lines, here as elsewhere. Nothing waits for the clock: what
makes a reader come back says "after 20 ms", and only that differs from the dialect as it is served.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import count, groupby
from typing import Any

import attrs
import httpx  # noqa: ASYNC127  # what httpx-sse reads from, in a thread of its own
import httpx_sse
import node
import pytest
import trio
from cutting import Cut, open_cutter, open_cutters
from raw import wait_until
from trio.testing import wait_all_tasks_blocked

from agentsse import Agent, AgentError, RunContext, tool
from agentsse.config import LimitSettings, Settings
from agentsse.dialects import Dialect
from agentsse.dialects.native import NATIVE
from agentsse.events import EVENT_TYPES, AnyEvent, PartDelta, PartFinished, PartStarted
from agentsse.runs import Run
from agentsse.server import Server
from agentsse.sse import Decoder, Frame, comment, retry
from agentsse.testing import Line, ScriptedProvider, ask_for, open_server, say

PATIENCE = 30  # seconds for a whole test; what it waits for takes milliseconds
SOON = 20  # milliseconds, in place of the dialect's two seconds
FOREIGN = "somebody.test"  # a name that the browser resolves to 127.0.0.1
NODE_READS = 1 << 20  # bytes at once of what a driver says

PLAIN = {"trust_env": False, "verify": False, "timeout": PATIENCE}  # to prepare TLS takes 50 ms

TEXT = "Grüße aus Zürich ☕ 😀: one\u2028two\r\nthree"
LARGE = "ö☕😀\u2028\n" * 80_000  # a bit more than 1 MB


def coming_back_after(milliseconds: int) -> Dialect:
    """The native dialect with another time to come back after."""
    framing = attrs.evolve(
        NATIVE.framing,
        prelude=retry(milliseconds) + comment("agentsse"),
        farewell=lambda _asked: retry(milliseconds),
    )
    return attrs.evolve(NATIVE, framing=framing)


# What a client has seen ---------------------------------------------------------------------------


@attrs.define(eq=False)
class View:
    """What a client has seen of one stream, across all connections that it took.

    Attributes:
        frames: Its events.
        opened: How often a response has begun, and `lost` how often one has broken off or ended.
        end: `closed` by the client itself, or `stopped` by the server; None while it goes on.
    """

    frames: list[Frame] = attrs.field(factory=list)
    opened: int = 0
    lost: int = 0
    end: str | None = None
    _changed: trio.Event = attrs.field(factory=trio.Event)

    def note(self, what: Frame | str) -> None:
        """Note an event, or what has become of the connection."""
        match what:
            case Frame():
                self.frames.append(what)
            case "open":
                self.opened += 1
            case "lost":
                self.lost += 1
            case _:
                self.end = self.end or what
        self._changed.set()
        self._changed = trio.Event()

    async def wait_until(self, condition: Callable[["View"], bool]) -> None:
        """Wait until it has become true of what was seen."""
        while not condition(self):
            assert self.end is None, f"it has ended, {self.end}, with {self.kinds}"
            await self._changed.wait()

    async def wait_for(self, kind: str, times: int = 1) -> None:
        """Wait for so many events of a type."""
        await self.wait_until(lambda view: view.kinds.count(kind) >= times)

    async def wait_ended(self) -> str:
        """Wait for the end; which one it was."""
        while self.end is None:
            await self._changed.wait()
        return self.end

    @property
    def kinds(self) -> list[str]:
        """The types of its events."""
        return [frame.event for frame in self.frames]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its events as a page has them."""
        return [json.loads(frame.data) for frame in self.frames]


def frames_of(events: Iterable[AnyEvent]) -> list[Frame]:
    """What must be seen of these events."""
    encoder = NATIVE.encoder(None)
    return Decoder().feed(b"".join(frame for event in events for frame in encoder.feed(event)))


@attrs.frozen
class Answer:
    """What a client was answered; status 0 where it was not allowed to know."""

    status: int
    body: Any
    location: str | None = None


NAMES = count()  # of what is asked of drivers, which outlive a test


# The clients --------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Gate:
    """A server of one empty page at `localhost`, and of a gate at which whoever asks has to wait.

    Attributes:
        url: The page's; the gate's is `gate` below.
        knocked: Somebody waits at the gate.
        let_through: Set to let them through.
    """

    url: str = ""
    knocked: trio.Event = attrs.field(factory=trio.Event)
    let_through: trio.Event = attrs.field(factory=trio.Event)

    async def wait(self) -> None:
        """Wait at the gate."""
        self.knocked.set()
        await self.let_through.wait()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Serve; leaving the context ends it."""
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.url = f"http://localhost:{listeners[0].socket.getsockname()[1]}/"
            await nursery.start(trio.serve_listeners, self._serve, listeners)
            yield
            nursery.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        head = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                while b"\r\n\r\n" not in head:
                    data = await stream.receive_some()
                    if not data:
                        return
                    head += data
                if head.startswith(b"GET /gate "):
                    await self.wait()
                await stream.send_all(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n"
                    b"Connection: close\r\n\r\n<!doctype html>"
                )


@attrs.define(eq=False)
class Client:
    """A client in general: it posts JSON, and follows a stream until an event of some type.

    Attributes:
        nursery: Where what it reads is read.
        gate: Where it waits while it does not read.
    """

    nursery: trio.Nursery | None = None
    gate: Gate = attrs.field(factory=Gate)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Be ready; leaving the context ends all that it reads."""
        async with self.gate.opened(), trio.open_nursery() as nursery:
            self.nursery = nursery
            yield
            nursery.cancel_scope.cancel()

    async def follow(self, url: str, *, until: str = "run_finished") -> View:
        """Begin to read a stream, which the client itself closes behind an event of that type."""
        raise NotImplementedError

    async def post(self, url: str, body: Any) -> Answer:
        """Post JSON."""
        raise NotImplementedError

    async def stop_reading(self) -> None:
        """Read no more than what may come next, whatever is sent."""
        raise NotImplementedError

    async def read_on(self) -> None:
        """Read on."""
        self.gate.let_through.set()
        await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class Driven(Client):
    """A client in another process, told by lines of JSON what to do."""

    process: subprocess.Popen[bytes] = attrs.field(kw_only=True)
    _views: dict[str, View] = attrs.field(factory=dict)
    _answers: dict[str, tuple[trio.Event, list[Any]]] = attrs.field(factory=dict)
    _stdin: trio.lowlevel.FdStream | None = None
    _turn: trio.Lock = attrs.field(factory=trio.Lock)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Listen; leaving the context closes all that is open there."""
        assert self.process.stdin
        assert self.process.stdout
        stdout = trio.lowlevel.FdStream(os.dup(self.process.stdout.fileno()))
        self._stdin = trio.lowlevel.FdStream(os.dup(self.process.stdin.fileno()))
        try:
            async with self._stdin, stdout, self.gate.opened(), trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, stdout)
                self.nursery = nursery
                yield
                await self.ask(do="reset")
                nursery.cancel_scope.cancel()
        except BaseException:
            self.process.kill()  # nobody knows what it would say next
            self.process.wait()
            raise

    async def _listen(self, stdout: trio.lowlevel.FdStream) -> None:
        rest = b""
        while data := await stdout.receive_some(NODE_READS):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        raise EOFError(f"the driver has ended: {await trio.to_thread.run_sync(self.process.wait)}")

    def _take(self, said: Any) -> None:
        match said:
            case {"name": name, "answer": answer}:
                came, answers = self._answers[name]
                answers.append(answer)
                came.set()
            case {"name": name, "seen": {"id": id, "event": event, "data": data}}:
                self._views[name].note(Frame(data, event, id))
            case {"name": name, "state": state}:
                self._views[name].note(state)
            case _:
                raise AssertionError(said)

    async def tell(self, **command: Any) -> None:
        """Give it a command."""
        assert self._stdin is not None
        async with self._turn:
            await self._stdin.send_all(json.dumps(command).encode() + b"\n")

    async def ask(self, **command: Any) -> Any:
        """Give it a command; its answer."""
        name = f"a{next(NAMES)}"
        came, answers = self._answers[name] = trio.Event(), []
        await self.tell(name=name, **command)
        await came.wait()
        return answers[0]

    async def follow(self, url: str, *, until: str = "run_finished", **more: Any) -> View:
        """Open an EventSource; it comes back by itself."""
        name = f"v{next(NAMES)}"
        view = self._views[name] = View()
        types = sorted(EVENT_TYPES)
        await self.tell(do="follow", name=name, url=url, types=types, until=[until], **more)
        return view

    async def post(self, url: str, body: Any, **more: str) -> Answer:
        """Post JSON, by `fetch`."""
        return Answer(**await self.ask(do="post", url=url, body=body, **more))

    async def stop_reading(self, **more: str) -> None:
        """Keep its one thread waiting for an answer."""
        assert self.nursery is not None
        block = partial(self.ask, do="block", url=f"{self.gate.url}gate", **more)
        self.nursery.start_soon(block)
        await self.gate.knocked.wait()


@attrs.define(eq=False)
class Browser(Driven):
    """Chromium; it is asked in the tab `main`, which shows a page of another origin."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Show an empty page; leaving the context closes all tabs."""
        async with super().opened():
            await self.visit(self.gate.url)
            yield

    async def visit(self, url: str, *, tab: str = "main") -> None:
        """Open a page in a tab, which is a new one if need be."""
        await self.ask(do="visit", tab=tab, url=url)

    async def back(self, *, tab: str = "main") -> None:
        """Go back to the page before, as by the button for it."""
        await self.ask(do="back", tab=tab)

    async def leave(self, *, tab: str = "main") -> None:
        """Close a tab."""
        await self.ask(do="leave", tab=tab)

    async def follow(
        self, url: str, *, until: str = "run_finished", tab: str = "main", keeps: bool = False
    ) -> View:
        """Open an EventSource in a tab, which is closed when its page is left unless it `keeps`."""
        return await super().follow(url, until=until, tab=tab, keeps=keeps)

    async def post(self, url: str, body: Any, *, tab: str = "main") -> Answer:
        """Post JSON from a tab, by `fetch`."""
        return await super().post(url, body, tab=tab)

    async def close(self, view: View, *, tab: str = "main") -> None:
        """Close an EventSource."""
        (name,) = (name for name, each in self._views.items() if each is view)
        await self.tell(do="close", name=name, tab=tab)

    async def stop_reading(self) -> None:
        """Keep the page's main thread waiting for an answer."""
        await super().stop_reading(tab="main")


@attrs.define(eq=False)
class Looping(Client):
    """A client that comes back because whoever uses it asks again, with the last id it has seen."""

    async def follow(self, url: str, *, until: str = "run_finished") -> View:
        """Read in a loop."""
        assert self.nursery is not None
        view = View()
        self.nursery.start_soon(self._loop, url, until, view)
        await trio.lowlevel.checkpoint()
        return view

    async def _loop(self, url: str, until: str, view: View) -> None:
        last_id = ""
        while view.end is None:
            last_id = await self._read(url, last_id, until, view)
            if view.end is None:
                view.note("lost")

    async def _read(self, url: str, last_id: str, until: str, view: View) -> str:
        """Read one response to its end, however it ends; the last id."""
        raise NotImplementedError


@attrs.define(eq=False)
class HttpxSse(Looping):
    """`httpx-sse` on httpx's sync client, in a thread."""

    _waits: bool = False

    async def _read(self, url: str, last_id: str, until: str, view: View) -> str:
        read = partial(self._read_in_thread, url, last_id, until, view)
        last: str = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        return last

    def _read_in_thread(self, url: str, last_id: str, until: str, view: View) -> str:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        note = partial(trio.from_thread.run_sync, view.note)
        with (
            contextlib.suppress(httpx.TransportError),  # then it comes back
            httpx.Client(**PLAIN) as http,
            httpx_sse.connect_sse(http, "GET", url, headers=headers) as source,
        ):
            if source.response.status_code != httpx.codes.OK:
                note("stopped")
                return last_id
            note("open")
            for event in source.iter_sse():
                last_id = event.id
                if not event.data:
                    continue  # a `retry`, an id, or a heartbeat: no event for others
                note(Frame(event.data, event.event, event.id))
                if event.event == until:
                    note("closed")
                    break
                if self._waits:
                    trio.from_thread.run(self.gate.wait)
        return last_id

    async def stop_reading(self) -> None:
        """Let its thread do something else behind the next event."""
        self._waits = True
        await trio.lowlevel.checkpoint()

    async def post(self, url: str, body: Any) -> Answer:
        """Post JSON."""
        post = partial(httpx.post, url, json=body, **PLAIN)
        answer = await trio.to_thread.run_sync(post, abandon_on_cancel=True)
        return Answer(answer.status_code, answer.json(), answer.headers.get("location"))


@attrs.define(eq=False)
class Curl(Looping):
    """`curl -N`; what it prints is cut into events by our own decoder.

    Attributes:
        options: More of the command line.
        processes: All that were started, in order.
        codes: What they exited with: 18 or 56 for a response that broke off, 0 for a whole one.
    """

    options: tuple[str, ...] = ()
    processes: list[trio.Process] = attrs.field(factory=list)
    codes: list[int] = attrs.field(factory=list)

    async def _read(self, url: str, last_id: str, until: str, view: View) -> str:
        command = ["-N", "-f", "-H", "Accept: text/event-stream", *self.options, url]
        command += ["-H", f"Last-Event-ID: {last_id}"] if last_id else []
        decoder = Decoder(last_id=last_id)
        async with self._running(command) as process:
            if data := await process.stdout.receive_some():
                view.note("open")
            while data:
                for frame in decoder.feed(data):
                    view.note(frame)
                    if frame.event == until:
                        process.send_signal(signal.SIGINT)
                        view.note("closed")
                        return frame.id
                data = await process.stdout.receive_some()
            status = await _read_all(process.stderr)
        if status[-3:] not in (b"200", b"000"):
            view.note("stopped")
        return decoder.last_id

    async def post(self, url: str, body: Any) -> Answer:
        """Post JSON."""
        command = ["-H", "Content-Type: application/json", "-d", "@-", url]
        async with self._running(command) as process:
            await process.stdin.send_all(json.dumps(body).encode())
            await process.stdin.aclose()
            answer = await _read_all(process.stdout)
            status = await _read_all(process.stderr)
        return Answer(int(status[-3:]), json.loads(answer))

    async def stop_reading(self) -> None:
        """As a person who presses Ctrl-Z."""
        self.processes[-1].send_signal(signal.SIGSTOP)
        await trio.lowlevel.checkpoint()

    async def read_on(self) -> None:
        """As one who then says `fg`."""
        self.processes[-1].send_signal(signal.SIGCONT)
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def _running(self, command: list[str]) -> AsyncIterator[Any]:
        general = ["curl", "-sS", "--noproxy", "*", "-w", "%{stderr}%{http_code}"]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = await trio.lowlevel.open_process([*general, *command], **pipes)
        self.processes.append(process)
        try:
            async with process.stdin, process.stdout, process.stderr:
                yield process
            self.codes.append(await process.wait())
        except BaseException:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            raise


async def _read_all(stream: Any) -> bytes:
    return b"".join([data async for data in stream])


# The processes of the first two are for all tests here: each test has what it opens for itself


@pytest.fixture(scope="module")
def drivers() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes of drivers, by name."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    yield started
    for process in started.values():
        end_process(process)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Let a driver end, which does so when nothing more can come."""
    process.stdin.close()
    process.stdout.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def driver(drivers, name, *command):
    """The process of that name, which is started if need be."""
    process = drivers.get(name)
    if process is not None and process.poll() is not None:
        end_process(process)
        process = None
    if process is None:
        if (reason := node._installed()) is not None:
            node._do_without(reason)
        script, *arguments = command
        process = drivers[name] = subprocess.Popen(
            ["node", str(node.CLIENTS / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    return process


def browser(drivers):
    node.need("chromium")
    chromium = shutil.which("chromium")
    return Browser(process=driver(drivers, "browser", "browser.mjs", chromium))


def npm(drivers):
    return Driven(process=driver(drivers, "npm", "eventsource.mjs", "listen"))


def curl(_drivers):
    node.need("curl")
    return Curl()


KINDS = {"browser": browser, "npm": npm, "httpx-sse": lambda _drivers: HttpxSse(), "curl": curl}


@pytest.fixture(params=list(KINDS))
def client(request, drivers):
    """Each of the clients in its turn."""
    return KINDS[request.param](drivers)


def only(*names: str) -> Any:
    """Some of the clients."""
    return pytest.mark.parametrize("client", names, indirect=True)


# The server ---------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Site:
    """A server, and a client of it.

    Attributes:
        requests: Those that it has answered: method, path and status.
    """

    server: Server
    client: Any
    dialects: tuple[Dialect, ...] = ()
    requests: list[tuple[str, str, int]] = attrs.field(factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.urls[0]

    async def start(self, name: str = "main", **body: Any) -> Run:
        """Have the client start a run in the background."""
        body = {"background": True, **body}
        answer = await self.client.post(f"{self.url}/agents/{name}/runs", body)
        assert 202 == answer.status
        return self.server.runs.find(answer.body["id"])

    async def follow(self, run: Run, *, at: str | None = None, until="run_finished") -> View:
        """Have the client follow a run, perhaps through a proxy."""
        return await self.client.follow(f"{at or self.url}/runs/{run.id}/events", until=until)

    async def wait_closed(self, reason: str, times: int = 1) -> None:
        """Wait until the server has closed so many streams for that reason."""
        await wait_until(lambda: self.server.app.streams.closed[reason] == times)


@asynccontextmanager
async def site(client: Client, *agents: Agent, **server: Any) -> AsyncIterator[Site]:
    """Serve agents to a client, within the time of a test; text is not held back."""
    settings = Settings(limits=LimitSettings(coalesce_ms=0))
    dialects = (coming_back_after(SOON),)
    requests: list[tuple[str, str, int]] = []

    def report(what: str, **facts: Any) -> None:
        if what == "request":
            requests.append((facts["method"], facts["path"], facts["status"]))

    with trio.fail_after(PATIENCE):
        async with (
            open_server(
                *agents, settings=settings, dialects=dialects, report=report, **server
            ) as opened,
            client.opened(),
        ):
            yield Site(opened, client, dialects, requests)


def assert_whole(run: Run, *views: View, end: str = "closed") -> None:
    """The client has seen the run's log: all of it, in order, nothing twice."""
    assert ("finished", end) == (run.state, views[-1].end)
    assert frames_of(run.log.events) == [frame for view in views for frame in view.frames]


# Agents


@attrs.define(eq=False)
class Puppet:
    """An agent that does what the test says, one order after another."""

    _orders: Any = attrs.field(factory=lambda: trio.open_memory_channel(1_000))

    @property
    def agent(self) -> Agent:
        """What can be run."""
        return Agent("main", self._run)

    async def _run(self, run: RunContext, _input: Any) -> str:
        async for order in self._orders[1]:
            order(run)
        return "done"

    def emit(self, **value: Any) -> None:
        """Have it report something."""
        self._orders[0].send_nowait(lambda run: run.emit("fact", **value))

    def say(self, text: str) -> None:
        """Have it say something."""
        self._orders[0].send_nowait(lambda run: run.text(text))

    def end(self) -> None:
        """Have it return."""
        self._orders[0].close()


@tool
async def look(where: str) -> str:
    """Look somewhere."""
    await trio.lowlevel.checkpoint()
    return f"sunny in {where}"


@tool
async def measure() -> dict[str, float]:
    """Measure."""
    await trio.lowlevel.checkpoint()
    return {"degrees": 21.5}


@tool
async def dump() -> str:
    """Give back a lot."""
    await trio.lowlevel.checkpoint()
    return LARGE


def model(*script: list[Line]) -> Callable[[], Agent]:
    """Make an agent of a model that says what it is told to."""
    return lambda: Agent.of_model(
        "main", "scripted:m", provider=ScriptedProvider(script), tools=[look, measure, dump]
    )


def function(body: Callable[[RunContext, Any], Awaitable[Any]]) -> Callable[[], Agent]:
    """Make an agent of a function."""
    return lambda: Agent("main", body)


async def fail_at_once(_run, _input):
    """Fail."""
    await trio.lowlevel.checkpoint()
    raise AgentError("no luck: ü", code="mine", status=422)


async def asking(run, _input):
    """Ask a person."""
    run.text("Well. ")
    answer = await run.ask("Which one, Zoë?")
    run.text(answer)
    return answer


THOUGHT = [
    PartStarted(part_id="r1", kind="reasoning"),
    PartDelta(part_id="r1", kind="reasoning", delta="Let me "),
    PartDelta(part_id="r1", kind="reasoning", delta="see."),
    PartFinished(part_id="r1", kind="reasoning", text="Let me see."),
]


# A run, seen from beginning to end ----------------------------------------------------------------


async def let_it_be(_site: Site, _run: Run, _view: View) -> None:
    """Only look on."""
    await trio.lowlevel.checkpoint()


async def answer_it(one: Site, run: Run, view: View) -> None:
    """Answer what it asks, once the client has seen the question."""
    await view.wait_for("input_requested")
    (question,) = view.events[-1]["questions"]
    assert "Which one, Zoë?" == question["prompt"]
    answers = {"answers": {question["id"]: "the ☕"}}
    answer = await one.client.post(f"{one.url}/runs/{run.id}/input", answers)
    assert (200, run.id) == (answer.status, answer.body["id"])


async def cancel_it(one: Site, run: Run, view: View) -> None:
    """Cancel it, once the client has seen half of it; the answer says that it is gone."""
    await view.wait_for("part_delta")
    answer = await one.client.post(f"{one.url}/runs/{run.id}/cancel", {"reason": "enough"})
    assert (200, "cancelled", "client_cancel") == (
        answer.status,
        answer.body["outcome"],
        answer.body["receipt"]["cause"],
    )


@attrs.frozen
class Scenario:
    """A run, what the client does to it, and what it has seen in the end.

    Attributes:
        agent: Makes the agent.
        kinds: The types of events, neighbours that are alike once.
        outcome: Of the run.
        holds: What is among what was seen.
        act: What the client does meanwhile.
    """

    agent: Callable[[], Agent]
    kinds: str
    outcome: str = "success"
    holds: tuple[str, ...] = ()
    act: Callable[[Site, Run, View], Awaitable[None]] = let_it_be


PART = "part_started part_delta part_finished"
SCENARIOS = {
    "text": Scenario(
        model(say(TEXT)),
        f"run_started step_started {PART} step_finished run_finished",
        holds=(TEXT,),
    ),
    "two tools": Scenario(
        model(ask_for(("look", '{"where":"Köln"}'), ("measure", "{}")), say("Sunny.")),
        f"run_started step_started {PART} {PART} step_finished step_started tool_started "
        f"tool_finished step_finished step_started {PART} step_finished run_finished",
        holds=("sunny in Köln", "Sunny."),
    ),
    "reasoning": Scenario(
        model([*THOUGHT, *say(TEXT)]),
        f"run_started step_started {PART} {PART} step_finished run_finished",
        holds=("Let me see.", TEXT),
    ),
    "error before anything": Scenario(
        function(fail_at_once), "run_started run_finished", "error", holds=("no luck: ü",)
    ),
    "error in the middle": Scenario(
        model([*say("half")[:2], AgentError("no luck: ü", code="mine", status=422)]),
        f"run_started step_started {PART} step_finished run_finished",
        "error",
        holds=("half", "no luck: ü"),
    ),
    "explicit cancel": Scenario(
        model([*say("half")[:2], 3600.0]),
        f"run_started step_started {PART} step_finished run_finished",
        "cancelled",
        holds=("half",),
        act=cancel_it,
    ),
    "interrupt answered": Scenario(
        function(asking),
        "run_started part_started part_delta part_finished input_requested input_received "
        f"{PART} run_finished",
        holds=("the ☕",),
        act=answer_it,
    ),
    "1 MB of unicode": Scenario(
        model(ask_for(("dump", "{}")), say("Much.")),
        f"run_started step_started {PART} step_finished step_started tool_started tool_finished "
        f"step_finished step_started {PART} step_finished run_finished",
        holds=(LARGE, "Much."),
    ),
}


def strings_in(value: Any) -> Iterator[str]:
    """All texts in what JSON holds."""
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from strings_in(each)
        case list():
            for each in value:
                yield from strings_in(each)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_the_client_sees_the_run(client, scenario):
    """From the first event to the last, as it was, and then it leaves."""
    async with site(client, scenario.agent()) as one:
        run = await one.start()
        view = await one.follow(run)
        await scenario.act(one, run, view)
        await view.wait_ended()
        await run.done.wait()
    assert scenario.kinds.split() == [kind for kind, _ in groupby(view.kinds)]
    assert scenario.outcome == view.events[-1]["outcome"]
    assert set(scenario.holds) <= set(strings_in(view.events))
    assert_whole(run, view)


# What comes before a stream -----------------------------------------------------------------------


async def test_a_request_for_nothing_is_answered_with_an_error(client):
    """Before anything has begun, in words for a program."""
    async with site(client, Puppet().agent) as one:
        unknown = await client.post(f"{one.url}/agents/nobody/runs", {"background": True})
        wrong = await client.post(f"{one.url}/agents/main/runs", {"backgrund": True})
    assert (404, "not_found") == (unknown.status, unknown.body["code"])
    assert (400, "bad_request") == (wrong.status, wrong.body["code"])


async def test_a_stream_that_there_is_not_is_asked_for_once(client):
    """An error's status ends an EventSource for good: nobody comes back for it."""
    async with site(client) as one:
        view = await client.follow(f"{one.url}/runs/nobody/events")
        assert "stopped" == await view.wait_ended()
    assert (0, 0, []) == (view.opened, view.lost, view.frames)
    assert [("GET", "/runs/nobody/events", 404)] == one.requests


# The end of a stream ------------------------------------------------------------------------------


async def test_who_comes_back_after_the_end_is_told_to_stay_away(client):
    """A client that does not close at `run_finished` asks once more, and 204 stops it."""
    puppet = Puppet()
    async with site(client, puppet.agent) as one:
        run = await one.start()
        view = await one.follow(run, until="nothing")
        puppet.emit(n=0)
        puppet.end()
        assert "stopped" == await view.wait_ended()
    path = f"/runs/{run.id}/events"
    assert [("GET", path, 200), ("GET", path, 204)] == one.requests[-2:]
    assert (1, 1) == (view.opened, view.lost)
    assert_whole(run, view, end="stopped")


@only("browser", "npm")
async def test_retry_says_when_to_come_back(client):
    """Of those that are cut off at one time, each comes when it was told to, not all together."""
    order, puppets = [], {wait: Puppet() for wait in (1_000, 500, SOON)}
    async with site(client), trio.open_nursery() as nursery, contextlib.AsyncExitStack() as stack:

        async def see_back(view: View, wait: int) -> None:
            await view.wait_until(lambda view: view.opened == 2)
            order.append(wait)

        for wait, puppet in puppets.items():
            server = await stack.enter_async_context(
                open_server(puppet.agent, dialects=(coming_back_after(wait),))
            )
            proxy = await stack.enter_async_context(
                open_cutter(server.urls[0], Cut(b"event: custom"))
            )
            one = Site(server, client)
            view = await one.follow(await one.start(), at=proxy.url)
            await view.wait_for("run_started")
            nursery.start_soon(see_back, view, wait)
        for puppet in puppets.values():
            puppet.emit(n=0)
        await wait_until(lambda: len(order) == 3)
    assert [SOON, 500, 1_000] == order


# A client that leaves -----------------------------------------------------------------------------


async def test_who_stops_has_cancelled_the_run(client):
    """`close()`, the end of a `with`, Ctrl-C: the run was there for this client."""
    puppet = Puppet()
    async with site(client, puppet.agent) as one:
        run = await one.start(on_disconnect="cancel")
        view = await one.follow(run, until="custom")
        puppet.emit(n=0)
        assert "closed" == await view.wait_ended()
        await run.done.wait()
        await one.wait_closed("client_left")
    assert ("cancelled", "disconnect") == (run.end.outcome, run.end.receipt.cause)
    assert frames_of(run.log.events)[: len(view.frames)] == view.frames


async def test_who_stops_may_come_back_within_the_grace(client):
    """The run has gone on, and a new EventSource begins where the old one ended, by `after`.

    That stands in its URL for good: when it comes back by itself, the id that it has seen counts.
    """
    puppet = Puppet()
    async with (
        site(client, puppet.agent) as one,
        open_cutter(one.url, Cut(b"event: part_delta")) as proxy,
    ):
        run = await one.start(on_disconnect="grace:30")
        before = await one.follow(run, until="custom")
        puppet.emit(n=0)
        await before.wait_ended()
        await one.wait_closed("client_left")
        puppet.emit(n=1)
        after = f"{proxy.url}/runs/{run.id}/events?after={before.frames[-1].id}"
        behind = await client.follow(after)
        await behind.wait_for("custom")
        puppet.say(TEXT)
        puppet.end()
        await behind.wait_ended()
        await run.done.wait()
    assert ("success", None) == (run.end.outcome, run.end.receipt.cause)
    assert 1 == behind.lost
    assert_whole(run, before, behind)


@only("browser")
@pytest.mark.parametrize("policy", ["cancel", "grace:30"])
@pytest.mark.parametrize("way", ["close", "navigate"])
async def test_a_page_that_goes_away_is_seen_to(client, policy, way):
    """Its tab is closed, or it shows another page and the one before has heeded `pagehide`."""
    puppet = Puppet()
    async with site(client, puppet.agent) as one:
        run = await one.start(on_disconnect=policy)
        await client.visit(client.gate.url, tab="other")
        url = f"{one.url}/runs/{run.id}/events"
        view = await client.follow(url, tab="other")
        puppet.emit(n=0)
        await view.wait_for("custom")
        if way == "close":
            await client.leave(tab="other")
        else:
            await client.visit(f"{client.gate.url}elsewhere", tab="other")
        await one.wait_closed("client_left")
        if policy == "cancel":
            await run.done.wait()
        else:
            puppet.end()
            again = await client.follow(f"{url}?after={view.frames[-1].id}")
            await again.wait_ended()
            assert_whole(run, view, again)
    expected = ("cancelled", "disconnect") if policy == "cancel" else ("success", None)
    assert expected == (run.end.outcome, run.end.receipt.cause)


@only("browser")
async def test_a_page_that_is_kept_for_the_back_button_has_not_left(client):
    """One that does not close its stream keeps it open, unread, and goes on when it is back."""
    puppet = Puppet()
    async with site(client, puppet.agent) as one:
        run = await one.start(on_disconnect="cancel")
        await client.visit(client.gate.url, tab="other")
        url = f"{one.url}/runs/{run.id}/events"
        view = await client.follow(url, tab="other", keeps=True)
        await view.wait_for("run_started")
        await client.visit(f"{client.gate.url}elsewhere", tab="other")
        puppet.say(TEXT)
        await wait_until(lambda: run.log.end == 3)
        await client.back(tab="other")
        await view.wait_for("part_delta")
        puppet.end()
        await view.wait_ended()
    assert (1, 0) == (view.opened, view.lost)
    assert_whole(run, view)


# A client that is slow ----------------------------------------------------------------------------


async def overfill(one: Site, puppet: Puppet) -> None:
    """Say more than the buffers on the way hold, which may be many MB, until that is noticed."""
    while not one.server.app.streams.closed["slow_client"]:
        puppet.emit(filling="x" * 60_000)
        await wait_all_tasks_blocked(0.002)


async def test_a_client_that_does_not_read_is_cut_and_has_all_in_the_end(client):
    """The run goes on without waiting; what was not taken in time is there when it reads again."""
    puppet = Puppet()
    async with site(client, puppet.agent, write_deadline=0.2) as one:
        run = await one.start(on_disconnect="cancel")
        view = await one.follow(run)
        await view.wait_for("run_started")
        await client.stop_reading()
        await overfill(one, puppet)
        puppet.end()
        await run.done.wait()
        await client.read_on()
        await view.wait_ended()
    assert view.lost
    assert_whole(run, view)


async def test_a_client_that_pauses_loses_nothing(client):
    """Within the time that a write has, the stream waits for it."""
    puppet = Puppet()
    async with site(client, puppet.agent) as one:
        run = await one.start()
        view = await one.follow(run)
        await view.wait_for("run_started")
        await client.stop_reading()
        puppet.say(LARGE)
        puppet.end()
        await run.done.wait()
        await client.read_on()
        await view.wait_ended()
    assert 0 == view.lost
    assert_whole(run, view)


@only("curl")
async def test_a_client_that_reads_slowly_has_all_in_the_end(client):
    """As curl does with `--limit-rate`."""
    puppet = Puppet()
    client.options = ("--limit-rate", "100k")
    async with site(client, puppet.agent) as one:
        run = await one.start()
        view = await one.follow(run)
        puppet.say(LARGE)
        puppet.end()
        await view.wait_ended()
    assert 0 == view.lost
    assert_whole(run, view)


# Many runs ----------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Crowd:
    """An agent whose runs speak when all are there."""

    go: trio.Event = attrs.field(factory=trio.Event)

    async def __call__(self, run: RunContext, input: Any) -> None:
        """Say what came in, three times."""
        await self.go.wait()
        for n in range(3):
            run.text(f"{input}: {n} {TEXT}. ")
            await trio.lowlevel.checkpoint()


def text_in(events: Iterable[dict[str, Any]]) -> str:
    """What was said."""
    return "".join(event["delta"] for event in events if event["type"] == "part_delta")


def said_by(number: int) -> str:
    """What the run of that number says."""
    return "".join(f"run {number}: {n} {TEXT}. " for n in range(3))


@only("npm", "httpx-sse", "curl")
async def test_twenty_runs_at_once(client):
    """Each stream has its own run's text."""
    crowd = Crowd()
    async with site(client, Agent("main", crowd)) as one:
        runs = [await one.start(input=f"run {number}") for number in range(20)]
        views = [await one.follow(run) for run in runs]
        for view in views:
            await view.wait_for("run_started")
        assert 20 == one.server.app.streams.open
        crowd.go.set()
        for view in views:
            await view.wait_ended()
    for number, (run, view) in enumerate(zip(runs, views, strict=True)):
        assert said_by(number) == text_in(view.events)
        assert_whole(run, view)


async def test_twenty_runs_at_once_in_one_stream(client):
    """One connection tells of all that happens on the server; of texts, when they are whole."""
    crowd = Crowd()
    async with site(client, Agent("main", crowd)) as one:
        view = await client.follow(f"{one.url}/events", until="nothing")
        await view.wait_until(lambda view: view.opened)
        runs = [await one.start(input=f"run {number}") for number in range(20)]
        assert 1 == one.server.app.streams.open
        await view.wait_for("run_started", 20)
        crowd.go.set()
        await view.wait_for("run_finished", 20)
        feed = one.server.runs.feed
    assert fed(feed) == view.frames
    for number, run in enumerate(runs):
        seen = [event for event in view.events if event["run_id"] == run.id]
        said = [event["text"] for event in seen if event["type"] == "part_finished"]
        assert [said_by(number)] == said
        told = [event.seq for event in run.log.events if not isinstance(event, PartDelta)]
        assert told == [event["seq"] for event in seen]


async def test_twenty_child_runs_at_once_in_their_thread(client):
    """The thread's stream has what its children say as they say it, for those who ask for it."""
    crowd = Crowd()

    async def leading(run, _input):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(run.delegate, "main", f"run {number}")

    async with site(client, Agent("main", crowd), Agent("leader", leading)) as one:
        url = f"{one.url}/threads/t1/events?watch=*"
        view = await client.follow(url, until="nothing")
        run = await one.start("leader", thread_id="t1")
        await view.wait_for("run_started", 21)
        crowd.go.set()
        await view.wait_for("run_finished", 21)
        children = run.home.workers
    assert {said_by(number) for number in range(20)} == {
        text_in(event for event in view.events if event["run_id"] == child.id) for child in children
    }
    for each in (run, *children):
        seen = [frame.data for frame in view.frames if f'"run_id":"{each.id}"' in frame.data]
        assert [frame.data for frame in frames_of(each.log.events)] == seen


@only("browser")
async def test_a_browser_has_six_connections_for_all_streams_of_a_host(client):
    """The seventh stream waits for one of them to end, and so does any other request."""
    crowd, answers = Crowd(), []
    async with site(client, Agent("main", crowd)) as one, trio.open_nursery() as nursery:
        runs = [await one.start(input=f"run {number}") for number in range(7)]
        views = [await one.follow(run) for run in runs]
        for view in views[:6]:
            await view.wait_for("run_started")

        async def ask():
            answers.append(await client.post(f"{one.url}/runs/{runs[0].id}/cancel", {}))

        nursery.start_soon(ask)
        by_other_name = one.url.replace("127.0.0.1", "localhost")  # has six of its own
        url = f"{by_other_name}/runs/{runs[1].id}/messages"
        assert 202 == (await client.post(url, {"text": "hello"})).status
        assert (6, 0, []) == (one.server.app.streams.open, views[6].opened, answers)
        await client.close(views[5])
        await client.close(views[4])
        await views[6].wait_for("run_started")
        await runs[0].done.wait()
        crowd.go.set()
        for view in views:
            await view.wait_ended()
    assert [200] == [answer.status for answer in answers]
    for run, view in zip(runs, views, strict=True):
        if view not in views[4:6]:
            assert_whole(run, view)


# Connections that break ---------------------------------------------------------------------------


PLACES = {
    "before the first event": b": agentsse\n\n",
    "behind an id": b"id: 2\n",
    "behind a type": b"event: custom\n",
    "in the middle of an event": b'"fact"',
    "inside a character": b"Z\xc3",
    "before a blank line": b'"value":{"n":0}}\n',
    "between events": b'"value":{"n":0}}\n\n',
    "in the last event": b"event: run_finished\ndata: {",
    "before the last line end": b'"threads_abandoned":0}',
}


EARLY = {
    "fin at once": Cut(0),
    "rst at once": Cut(0, "rst"),
    "fin in the head": Cut(60),
    "rst in the head": Cut(60, "rst"),
}


async def test_a_connection_that_breaks_before_a_stream_has_begun(client):
    """Who comes back and meets nobody comes back again, but for one case that a page has to see to.

    Chromium takes half a head that ends with a FIN for a whole one, and a response that is no event
    stream for an answer that is final: then the page opens another EventSource.
    """
    puppet = Puppet()
    plans = [[Cut(b": agentsse\n\n"), cut] for cut in EARLY.values()]
    async with site(client, puppet.agent) as one, open_cutters(one.url, *plans) as proxies:
        run = await one.start(on_disconnect="grace:30")
        views = {
            name: await one.follow(run, at=proxy.url)
            for name, proxy in zip(EARLY, proxies, strict=True)
        }
        if isinstance(client, Browser):
            view = views.pop("fin in the head")
            assert ("stopped", 1) == (await view.wait_ended(), view.opened)
        for view in views.values():
            await view.wait_for("run_started")
        puppet.end()
        for view in views.values():
            await view.wait_ended()
    for name, view in views.items():
        assert (name, 2) == (name, view.lost)
        assert_whole(run, view)


@pytest.mark.parametrize("way", ["fin", "rst"])
async def test_a_connection_that_breaks_costs_nothing(client, way):
    """Wherever it breaks, the client comes back, and has seen each event once."""
    puppet = Puppet()
    plans = [[Cut(place, way)] for place in PLACES.values()]
    async with site(client, puppet.agent) as one, open_cutters(one.url, *plans) as proxies:
        run = await one.start(on_disconnect="grace:30")
        views = [await one.follow(run, at=proxy.url) for proxy in proxies]
        puppet.emit(n=0)
        puppet.say(TEXT)
        for view in views:
            await view.wait_for("part_delta")
        puppet.emit(n=1)
        puppet.end()
        for view in views:
            await view.wait_ended()
    for place, proxy, view in zip(PLACES, proxies, views, strict=True):
        assert (place, 1) == (place, view.lost)
        assert ["GET"] * 2 == [line.split()[0] for line in proxy.lines]
        assert_whole(run, view)


async def test_a_connection_that_breaks_again_and_again_costs_nothing(client):
    """Each time a little later, now so, now so; no two of them at the same place of an event."""
    puppet = Puppet()
    cuts = [Cut(400 + 37 * n, ("fin", "rst")[n % 2]) for n in range(20)]
    async with site(client, puppet.agent) as one, open_cutter(one.url, *cuts) as proxy:
        run = await one.start()
        for n in range(50):
            puppet.emit(n=n, text=TEXT)
        puppet.end()
        view = await one.follow(run, at=proxy.url)
        await view.wait_ended()
    assert [] == list(proxy.cuts)
    assert view.lost >= len(cuts)
    assert_whole(run, view)


async def test_a_connection_that_stalls_costs_nothing(client):
    """What lies between delivers late: the server has long since given up on it."""
    puppet = Puppet()
    cut = Cut(b"event: custom\n", "stall")
    async with (
        site(client, puppet.agent, write_deadline=0.2) as one,
        open_cutter(one.url, cut) as proxy,
    ):
        run = await one.start(on_disconnect="cancel")
        view = await one.follow(run, at=proxy.url)
        await overfill(one, puppet)
        puppet.end()
        proxy.resume.set()
        await view.wait_ended()
        await run.done.wait()
    assert view.lost
    assert_whole(run, view)


async def test_a_stream_that_the_server_rotates_costs_nothing(client):
    """It ends well, is asked for again, and the run is not cancelled for it."""
    puppet = Puppet()
    async with site(client, puppet.agent, rotation=0.1) as one:
        run = await one.start(on_disconnect="cancel")
        view = await one.follow(run)
        for n in range(3):
            await view.wait_until(lambda view, n=n: view.opened > n)
            puppet.emit(n=n)
            puppet.say(TEXT)
        await view.wait_until(lambda view: view.opened > 3)
        puppet.end()
        await view.wait_ended()
        assert 3 <= one.server.app.streams.closed["rotated"]
    assert "success" == run.end.outcome
    assert_whole(run, view)


@only("curl")
@pytest.mark.parametrize(("way", "code"), [("fin", 18), ("rst", 56)])
async def test_curl_tells_a_stream_that_broke_off_from_a_whole_one(client, way, code):
    """By what it exits with: 0 is for a run that has ended, and for one that ended before."""
    puppet, cut = Puppet(), Cut(b"event: custom", way)
    async with site(client, puppet.agent) as one, open_cutter(one.url, cut) as proxy:
        run = await one.start()
        view = await one.follow(run, at=proxy.url, until="nothing")
        puppet.emit(n=0)
        puppet.end()
        await view.wait_ended()
    assert [0, code, 0, 0] == client.codes
    assert_whole(run, view, end="stopped")


async def test_a_server_that_stops_ends_its_runs_first(client):
    """Their streams have the end that every stream has, and it says why."""
    async with site(client, Puppet().agent) as one:
        run = await one.start()
        view = await one.follow(run)
        await view.wait_for("run_started")
        await one.server.drain(0.2)
        await view.wait_ended()
    end = view.events[-1]
    assert ("cancelled", "shutdown") == (end["outcome"], end["receipt"]["cause"])
    assert_whole(run, view)


async def test_a_run_of_before_a_restart_is_not_waited_for(client):
    """Another server answers at that address, and knows nothing of it."""
    puppet = Puppet()
    async with (
        site(client, puppet.agent) as one,
        open_server(dialects=one.dialects) as other,
        open_cutter(one.url, Cut(b'"value":{"n":1')) as proxy,
    ):
        run = await one.start()
        view = await one.follow(run, at=proxy.url)
        puppet.emit(n=0)
        await view.wait_for("custom")
        proxy.turn_to(other.urls[0])
        puppet.emit(n=1)
        assert "stopped" == await view.wait_ended()
    assert ["run_started", "custom"] == view.kinds


async def test_heartbeats_are_no_events(client):
    """They keep a silent line open, and nobody sees them."""
    puppet = Puppet()
    async with site(client, puppet.agent, heartbeat=0.02) as one:
        run = await one.start()
        view = await one.follow(run)
        await view.wait_for("run_started")
        before = one.server.app.streams.bytes
        await wait_until(lambda: one.server.app.streams.bytes > before + 10)
        puppet.end()
        await view.wait_ended()
    assert_whole(run, view)


def test_no_event_has_the_name_of_one_that_an_event_source_makes_itself():
    """`error` would be taken for a connection that has broken."""
    assert set() == {"open", "error", "message", "close"} & set(EVENT_TYPES)


# Feeds --------------------------------------------------------------------------------------------


def fed(feed):
    """What must be seen of a feed, from its first event."""
    (plain,) = NATIVE.feed.plain
    encoder = NATIVE.feed.encoder(plain)
    frames = [
        frame
        for number, event in enumerate(feed.events, feed.first)
        for frame in encoder.feed(event, feed.id_of(number))
    ]
    return Decoder().feed(b"".join(frames))


FEED_PLACES = {
    "behind a type": b"event: custom\n",
    "inside a character": b"Z\xc3",
    "between events": b'"value":{"n":0}}\n\n',
    "behind a run": b"event: run_finished\ndata: {",
}


@pytest.mark.parametrize(
    ("path", "first"),
    [("/events", b"-0\n\n"), ("/threads/t1/events", b": agentsse\n\n")],
    ids=["all", "thread"],
)
@pytest.mark.parametrize("way", ["fin", "rst"])
async def test_a_feed_that_breaks_costs_nothing(client, path, first, way):
    """What happens while the client is away is there when it is back, in all runs of a thread.

    Who reads what happens on the server has no place in it before that has come; a thread is read
    from its beginning.
    """
    puppet = Puppet()
    places = {"before the first event": first, **FEED_PLACES}
    plans = [[Cut(place, way)] for place in places.values()]
    async with site(client, puppet.agent) as one, open_cutters(one.url, *plans) as proxies:
        views = [await client.follow(f"{each.url}{path}", until="nothing") for each in proxies]
        for view in views:
            await view.wait_until(lambda view: view.opened)
        runs = [await one.start(thread_id="t1", if_busy="enqueue") for _ in range(2)]
        puppet.emit(n=0)
        puppet.say(TEXT)
        puppet.emit(n=1)
        for view in views:
            await view.wait_for("custom", 2)
        puppet.end()
        for view in views:
            await view.wait_for("run_finished", 2)
        feed = one.server.runs.feed if path == "/events" else runs[0].home.feed
        for place, view in zip(places, views, strict=True):
            assert (place, 1) == (place, view.lost)
            assert fed(feed) == view.frames


async def test_a_feed_that_begins_anew_tells_of_a_gap(client):
    """After a restart ids are of another epoch: what was missed nobody knows, and that is said."""
    puppet, second = Puppet(), Puppet()
    async with (
        site(client, puppet.agent) as one,
        open_server(second.agent, dialects=one.dialects) as other,
        open_cutter(one.url, Cut(b'"value":{"n":1')) as proxy,
    ):
        view = await client.follow(f"{proxy.url}/events", until="nothing")
        await view.wait_until(lambda view: view.opened)
        await one.start()
        puppet.emit(n=0)
        await view.wait_for("custom")
        proxy.turn_to(other.urls[0])
        puppet.emit(n=1)
        await view.wait_for("gap")
        started = await Site(other, client).start()
        await view.wait_for("run_started", 2)
    assert ["run_started", "custom", "gap", "run_started"] == view.kinds
    assert view.frames[1].id == view.events[2]["from"]
    assert started.id == view.events[3]["run_id"]


# Whose pages --------------------------------------------------------------------------------------


@only("browser")
async def test_a_page_of_another_local_origin_may_read_and_post(client):
    """It is asked about before it posts JSON, but never before it comes back to a stream."""
    puppet = Puppet()
    async with (
        site(client, puppet.agent) as one,
        open_cutter(one.url, Cut(b"event: custom")) as proxy,
    ):
        answer = await client.post(f"{one.url}/agents/main/runs", {"background": True})
        run = one.server.runs.find(answer.body["id"])
        assert f"/runs/{run.id}/events" == answer.location
        view = await client.follow(f"{proxy.url}{answer.location}")
        puppet.emit(n=0)
        puppet.end()
        await view.wait_ended()
    assert ["1"] == proxy.last_ids
    assert {"OPTIONS": 1, "POST": 1, "GET": 2} == {
        method: len(list(same)) for method, same in groupby(m for m, *_ in one.requests)
    }
    assert_whole(run, view)


@only("browser")
async def test_a_page_of_our_own_origin_is_asked_nothing(client):
    """As one that a proxy serves beside us, with addresses that are only paths."""
    puppet = Puppet()
    async with site(client, puppet.agent) as one:
        await client.visit(f"{one.url}/health/live", tab="own")
        body = {"background": True}
        answer = await client.post("/agents/main/runs", body, tab="own")
        view = await client.follow(answer.location, tab="own")
        puppet.end()
        await view.wait_ended()
        assert_whole(one.server.runs.find(answer.body["id"]), view)
    assert "OPTIONS" not in {method for method, *_ in one.requests}


@only("browser")
async def test_a_page_of_somebody_else_is_refused(client):
    """Wherever its name leads to."""
    async with site(client, Puppet().agent) as one:
        run = await one.start()
        await client.visit(client.gate.url.replace("localhost", FOREIGN), tab="foreign")
        view = await client.follow(f"{one.url}/runs/{run.id}/events", tab="foreign")
        assert "stopped" == await view.wait_ended()
        answer = await client.post(f"{one.url}/agents/main/runs", {}, tab="foreign")
        assert [run] == list(one.server.runs)
    assert (0, []) == (answer.status, view.frames)
    assert [("GET", 403), ("OPTIONS", 403)] == [(how, code) for how, _, code in one.requests[-2:]]


@only("browser")
async def test_a_page_of_no_origin_gets_nothing(client):
    """Such as a `data:` one, which may be anybody's: the browser does not even ask us."""
    async with site(client, Puppet().agent) as one:
        run = await one.start()
        await client.visit("data:text/html,nobody", tab="nobody")
        view = await client.follow(f"{one.url}/runs/{run.id}/events", tab="nobody")
        assert "stopped" == await view.wait_ended()
        answer = await client.post(f"{one.url}/agents/main/runs", {}, tab="nobody")
        assert [run] == list(one.server.runs)
    assert (0, []) == (answer.status, view.frames)
