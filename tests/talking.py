"""What the tests with people's own clients have in common: what is said, by whom, and to whom.

Knows: texts that are hard to carry, agents that say them, and how a client is asked for something
that blocks in a thread or runs in a process of Node. Must never know a protocol.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar, Self

import attrs
import openai
import trio
from node import Driver, node

from agentsse import Agent, RunContext, tool
from agentsse.events import PartDelta, PartFinished, PartStarted, Usage
from agentsse.providers import Finish
from agentsse.testing import ScriptedProvider

TEXT = "It is sunny in Köln 😀."
FILLER = "ö☕😀\u2028\n"
LARGE = FILLER * 100_000  # more than 1 MB
USAGE = Usage(input_tokens=120, output_tokens=40, reasoning_tokens=9)


# Agents -------------------------------------------------------------------------------------------


def model(*script, **settings):
    """A provider that says what a script says, and an agent of it."""
    provider = ScriptedProvider(script)
    return provider, Agent.of_model("main", "scripted:m", provider=provider, **settings)


def thinking(text, reason="stop"):
    """The lines of a model that thinks, says a text in pieces, and counts."""
    return [
        PartStarted(part_id="r", kind="reasoning"),
        PartDelta(part_id="r", kind="reasoning", delta="Let me see."),
        PartFinished(part_id="r", kind="reasoning", text="Let me see."),
        PartStarted(part_id="t", kind="text"),
        *(PartDelta(part_id="t", kind="text", delta=letter) for letter in text),
        PartFinished(part_id="t", kind="text", text=text),
        Finish(reason, USAGE),
    ]


@attrs.define(eq=False)
class Halved:
    """An agent that says half of what it has to say, and the rest when it is told to go on."""

    go_on: trio.Event = attrs.field(factory=trio.Event)

    def agent(self, **settings):
        """What can be run."""
        return Agent("main", self.run, **settings)

    async def run(self, run: RunContext, _input: Any) -> None:
        """Say it."""
        run.text("half ")
        await self.go_on.wait()
        run.text("and half")


@tool
async def look(where: str) -> str:
    """Look somewhere."""
    await trio.lowlevel.checkpoint()
    return f"sunny in {where}"


@tool
async def measure() -> float:
    """Measure."""
    await trio.lowlevel.checkpoint()
    return 21.5


# Clients ------------------------------------------------------------------------------------------


async def side_by_side(asks: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Do several things at once; what came of each."""
    seen: dict[int, Any] = dict.fromkeys(range(len(asks)))

    async def ask(place: int) -> None:
        seen[place] = await asks[place]()

    async with trio.open_nursery() as nursery:
        for place in seen:
            nursery.start_soon(ask, place)
    return list(seen.values())


@attrs.frozen
class OpenAI:
    """OpenAI's client of PyPI that blocks; each method `do_<name>` is what `ask` can do."""

    client: openai.OpenAI

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """Make one."""
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
            yield cls(client)

    async def ask(self, do: str, **command: Any) -> Any:
        """Do something, in a thread; what was seen."""
        return await trio.to_thread.run_sync(partial(getattr(self, f"do_{do}"), **command))


@attrs.frozen
class OfNode:
    """A client of npm, in a process that is the driver of the name `script`."""

    driver: Driver
    script: ClassVar[str]

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Self]:
        """Start the process."""
        async with node(cls.script, url) as driver:
            yield cls(driver)

    async def ask(self, do: str, **command: Any) -> Any:
        """Do something; what was seen."""
        return await self.driver.ask(do=do, **command)
