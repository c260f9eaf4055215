"""Parts to test agents and clients with; they ship with the product, and our own tests use them.

Knows: a whole server on a free port, a model that says what a script says, and how to read a
stream. Nothing here is a mock: the server is the server, and the sockets are sockets.
"""

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import attrs
import trio
from msgspec.structs import replace

from agentsse.agents import Agent
from agentsse.config import ServerSettings, Settings
from agentsse.dialects import Dialect
from agentsse.errors import ProviderError
from agentsse.events import AnyEvent, PartDelta, PartFinished, PartStarted, decode_event
from agentsse.providers import Caller, Finish, Prompt
from agentsse.server import Report, Server, open_server as open_real_server
from agentsse.sse import Decoder, Frame

Line: TypeAlias = AnyEvent | Finish | float | Exception
"""What a script says next: an event, the end of the call, seconds of silence, or an error."""


@attrs.define
class ScriptedProvider:
    """A model API that says, call by call, what it was told to say.

    It can make every event happen that a model can: an event goes into the run as it stands, a
    number is a silence of so many seconds, an exception is raised where it stands.

    Attributes:
        script: One list of lines per model call; a function of the prompt where the answer depends
            on what was asked. A call behind the last one is a `ProviderError`.
        prompts: What was asked, in order.
        open_streams: Streams that have been opened and not closed: 0 once a run is over.
    """

    script: Sequence[Sequence[Line] | Callable[[Prompt], Sequence[Line]]]
    name: str = "scripted"
    prompts: list[Prompt] = attrs.field(factory=list)
    open_streams: int = 0

    @asynccontextmanager
    async def open(self, _caller: Caller, /) -> AsyncIterator["ScriptedProvider"]:
        """Open nothing: it is its own connection, for any number of runs."""
        await trio.lowlevel.checkpoint()
        yield self

    @asynccontextmanager
    async def stream(self, prompt: Prompt, /) -> AsyncIterator[AsyncIterator[Line]]:
        """Open the stream of the next call."""
        await trio.lowlevel.checkpoint()
        self.prompts.append(prompt)
        if len(self.prompts) > len(self.script):
            raise ProviderError(f"expected {len(self.script)} model calls, got one more")
        lines = self.script[len(self.prompts) - 1]
        self.open_streams += 1
        try:
            yield _Spoken(iter(lines(prompt) if callable(lines) else lines))
        finally:
            self.open_streams -= 1

    def normalizer(self, prefix: str, /) -> "ScriptedNormalizer":
        """Make the machine for one call; ids stay as the script has them."""
        return ScriptedNormalizer(prefix)


@attrs.define
class _Spoken:
    _lines: Iterator[Line]

    def __aiter__(self) -> "_Spoken":
        return self

    async def __anext__(self) -> Line:
        await trio.lowlevel.checkpoint()
        for line in self._lines:
            match line:
                case float() | int():
                    await trio.sleep(line)
                case Exception():
                    try:
                        raise line
                    finally:
                        del line  # its traceback holds this frame
                case _:
                    return line
        raise StopAsyncIteration


@attrs.define
class ScriptedNormalizer:
    """Hands on what the script says; a script may be said many times, so each time it is a copy."""

    prefix: str
    is_over: bool = False

    def feed(self, line: AnyEvent | Finish, /) -> Iterable[AnyEvent | Finish]:
        """Take one line."""
        return (line if isinstance(line, Finish) else replace(line),)

    def close(self) -> Iterable[AnyEvent | Finish]:
        """Take note of the end; a script without a `Finish` has ended too early."""
        return ()


def say(text: str, *, part_id: str = "t1") -> list[Line]:
    """The lines of a model that says one text, in one delta, and is done."""
    return [
        PartStarted(part_id=part_id, kind="text"),
        PartDelta(part_id=part_id, kind="text", delta=text),
        PartFinished(part_id=part_id, kind="text", text=text),
        Finish("stop"),
    ]


def ask_for(*calls: tuple[str, str]) -> list[Line]:
    """The lines of a model that calls tools: pairs of a name and arguments as JSON text."""
    lines: list[Line] = []
    for number, (name, arguments) in enumerate(calls, 1):
        part_id, call_id = f"k{number}", f"call{number}"
        lines += [
            PartStarted(part_id=part_id, kind="tool_call", name=name, call_id=call_id),
            PartDelta(part_id=part_id, kind="tool_call", delta=arguments),
            PartFinished(
                part_id=part_id, kind="tool_call", text=arguments, name=name, call_id=call_id
            ),
        ]
    return [*lines, Finish("tool_calls")]


@asynccontextmanager
async def open_server(
    *agents: Agent,
    settings: Settings | None = None,
    dialects: Sequence[Dialect] | None = None,
    report: Report = lambda *_args, **_facts: None,
    **server: Any,
) -> AsyncIterator[Server]:
    """Open a real server on a free port of loopback; leaving the context ends it.

    Args:
        agents: What can be run.
        settings: All that can be set; its port is replaced.
        dialects: The client protocols to speak; all there are unless given.
        report: Called with what would be logged.
        server: Fields of `[server]`, such as `heartbeat=0.1`.
    """
    chosen = settings or Settings()
    listening: ServerSettings = attrs.evolve(chosen.server, port=0, **server)
    async with open_real_server(
        agents, attrs.evolve(chosen, server=listening), dialects=dialects, report=report
    ) as opened:
        yield opened


@attrs.define
class EventReader:
    """The events of a stream of bytes, one at a time; made by `read_events`."""

    _chunks: AsyncIterator[bytes]
    _decoder: Decoder = attrs.field(factory=Decoder)
    _frames: deque[Frame] = attrs.field(factory=deque)

    @property
    def last_id(self) -> str:
        """What a client would send as Last-Event-ID now."""
        return self._decoder.last_id

    def __aiter__(self) -> "EventReader":
        return self

    async def __anext__(self) -> AnyEvent:
        await trio.lowlevel.checkpoint()
        while not self._frames:
            self._frames += self._decoder.feed(await anext(self._chunks))
        return decode_event(self._frames.popleft().data)


def read_events(chunks: AsyncIterable[bytes]) -> EventReader:
    """Read a stream in the native dialect.

    Args:
        chunks: The response's body, cut anywhere: what an HTTP client's iterator of bytes gives.

    Returns:
        An async iterator of events; it ends where the body ends. It owns nothing: whoever opened
        the response closes it.
    """
    return EventReader(aiter(chunks))
