"""Every server that is measured: how it is started, and how each kind of work is asked of it.

Knows: programs, their arguments and what they need to run, and requests. Must never know what is
measured, nor what a server's answer costs.

All do the same work by the same contract (bench/README.md); agentsse is asked for it in its own
dialect, its peers by `POST /run`.
"""

import http.client
import importlib.util
import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlencode

import attrs
import trio

from .measuring import CHECKOUT, Address, listening
from .peers.building import BuildError, build_go
from .scenario import Bench

CONTROL_PATIENCE = 30.0  # seconds for an answer to what is not measured
PROGRAMS = CHECKOUT / "bench" / "peers"
KEY_FORMAT = "%06d"  # what a client puts in KEY's place; of one length, so that requests are too


@attrs.frozen
class Ask:
    """A request; KEY in it stands for the number of a stream."""

    method: str
    target: str
    body: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)

    def raw(self, at: Address) -> str:
        """The whole request, as HTTP/1.1 has it once KEY is replaced by `KEY_FORMAT % number`."""
        more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        size = len(self.body.replace("KEY", KEY_FORMAT % 0))
        length = f"Content-Length: {size}\r\n" if self.method == "POST" else ""
        return (
            f"{self.method} {self.target} HTTP/1.1\r\nHost: {at.host}:{at.port}\r\n"
            "Accept: text/event-stream\r\nContent-Type: application/json\r\n"
            f"{more}{length}\r\n{self.body}"
        )


@attrs.frozen(kw_only=True)
class Work:
    """What an agent does: events, their distance, silence; seconds.

    Attributes:
        key: Its name for the counter; KEY for that of a stream.
        upstream: Port that it holds a connection to.
        stamp: Whether its events are tokens that hold the time.
    """

    events: int
    gap: float = 0
    hold: float = 0
    key: str | None = None
    upstream: int | None = None
    stamp: bool = False

    def fields(self) -> dict[str, Any]:
        """What is not as usual."""
        given = attrs.asdict(self, filter=lambda field, value: value != field.default)
        return {name: int(value) if value is True else value for name, value in given.items()}


class Dialect(Protocol):
    """How work is asked of a server."""

    def run(self, work: Work) -> Ask: ...

    def fan_start(self, work: Work) -> Ask: ...

    def fan_watch(self, answer: Any) -> Ask:
        """Ask for what is made since; `answer` is what the start was answered with."""

    def counter(self, *, times: bool) -> tuple[Ask, tuple[str, ...]]:
        """Ask for the counter; the path of names to it in the answer."""


class Contract:
    """The peers' contract."""

    def run(self, work: Work) -> Ask:
        return Ask("POST", "/run?" + urlencode({"gap": 0} | work.fields()))

    def fan_start(self, work: Work) -> Ask:
        return Ask("POST", "/fan?" + urlencode(work.fields()))

    def fan_watch(self, _answer: Any) -> Ask:
        return Ask("GET", "/fan")

    def counter(self, *, times: bool) -> tuple[Ask, tuple[str, ...]]:
        return Ask("GET", "/counter?times=1" if times else "/counter"), ()


class Native:
    """Ours. `more` is what a run is asked for beside its input."""

    def __init__(self, more: Mapping[str, Any] | None = None) -> None:
        self._more = dict(more or {})

    def run(self, work: Work) -> Ask:
        body = {"input": work.fields()} | self._more
        return Ask("POST", "/agents/run/runs", json.dumps(body))

    def fan_start(self, work: Work) -> Ask:
        stamped = attrs.evolve(work, stamp=True)
        body = {"input": stamped.fields(), "background": True} | self._more
        return Ask("POST", "/agents/run/runs", json.dumps(body))

    def fan_watch(self, answer: Any) -> Ask:
        # How text is gathered is settled when the run begins, for all of its readers.
        return Ask("GET", f"/runs/{answer['id']}/events")

    def counter(self, *, times: bool) -> tuple[Ask, tuple[str, ...]]:
        body = {"input": {"times": times}}
        return Ask("POST", "/agents/counter/runs", json.dumps(body)), ("result",)


@attrs.frozen(eq=False)
class Server:
    """A server that can be measured.

    Attributes:
        name: As it is shown.
        command: How it is started; of one that is built, what builds it.
        dialect: How work is asked of it.
        end: What its last event holds; empty where only the last chunk tells.
        modules: Python modules that it needs.
        lacks: Scenarios that it cannot take part in, and why.
        build: Makes the command that starts it, where it has to be built; quick but for once.
    """

    name: str
    command: tuple[str, ...]
    dialect: Dialect = attrs.field(factory=Contract)
    end: str = ""
    modules: tuple[str, ...] = ()
    lacks: Mapping[str, str] = attrs.field(factory=dict)
    build: Callable[[], tuple[str, ...]] | None = None


@attrs.frozen
class Running:
    """A server that listens."""

    server: Server
    at: Address

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def pid(self) -> int:
        return self.at.pid


def _python(name: str, module: str, **more: Any) -> Server:
    return Server(name, (sys.executable, "-m", module), **more)


OURS = _python("agentsse", "bench.ours", dialect=Native(), end='"outcome":"success"')
_NO_LOG = {"reconnect": "it keeps nothing that could be resumed"}
PEERS: tuple[Server, ...] = (
    _python("aiohttp", "bench.peers.aiohttp_peer", modules=("aiohttp",), lacks=_NO_LOG),
    _python(
        "sse-starlette",
        "bench.peers.sse_starlette_peer",
        modules=("sse_starlette", "uvicorn", "uvloop"),
        lacks=_NO_LOG,
    ),
    _python("quart-trio", "bench.peers.quart_trio_peer", lacks=_NO_LOG),
    _python("trio", "bench.peers.trio_peer", lacks=_NO_LOG),  # the floor
    Server("node", ("node", str(PROGRAMS / "node_peer.mjs")), lacks=_NO_LOG),
    Server("go", ("go",), lacks=_NO_LOG, build=partial(build_go, PROGRAMS / "go_peer")),
)
SERVERS = (OURS, *PEERS)
QUICK = ("agentsse", "aiohttp")  # what a smoke starts, unless told otherwise


def why_not(server: Server) -> str | None:
    """Say why a server cannot run here, if so; whatever has to be built is built."""
    if shutil.which(server.command[0]) is None:
        return f"no {server.command[0]!r} on this machine"
    absent = [name for name in server.modules if importlib.util.find_spec(name) is None]
    if absent:
        return f"no module {', '.join(absent)}: install agentsse[bench]"
    try:
        if server.build is not None:
            server.build()
    except BuildError as error:
        return str(error)
    return None


def chosen(bench: Bench, scenario: str) -> Iterator[Server]:
    """The servers that take part; who does not, and why, goes to the progress."""
    wanted = bench.only or (QUICK if bench.quick else [server.name for server in SERVERS])
    for server in SERVERS:
        if server.name not in wanted:
            continue
        reason = server.lacks.get(scenario) or why_not(server)
        if reason is None:
            yield server
        else:
            bench.progress(f"{server.name} is left out: {reason}")


@asynccontextmanager
async def serving(
    bench: Bench, server: Server, *, env: Mapping[str, str] | None = None
) -> AsyncIterator[Running]:
    """Start a server on its core; leaving the context ends it."""
    command = server.command if server.build is None else server.build()
    async with listening(command, bench.cores.server, env=env) as address:
        yield Running(server, address)


async def ask(running: Running, request: Ask) -> Any:
    """Ask for something that is not measured, and return its JSON (None for an empty answer).

    Raises:
        RuntimeError: The answer is no 2xx.
    """
    return await trio.to_thread.run_sync(partial(_ask, running.at, request))


def _ask(at: Address, request: Ask) -> Any:
    connection = http.client.HTTPConnection(at.host, at.port, timeout=CONTROL_PATIENCE)
    try:
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "Connection": "close",
            **request.headers,
        }
        body = request.body if request.method == "POST" else None
        connection.request(request.method, request.target, body, headers)
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if not 200 <= response.status < 300:
        raise RuntimeError(f"expected a 2xx to {request.target}, got {response.status}: {answer!r}")
    return json.loads(answer) if answer else None


async def counter(running: Running, *, times: bool = False) -> dict[str, Any]:
    """What the server's agents saw: started, entered, gone, tasks; and times by key, if asked."""
    request, path = running.server.dialect.counter(times=times)
    found = await ask(running, request)
    for name in path:
        found = found[name]
    return found
