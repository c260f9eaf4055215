"""The server that is measured, with the agents that do the contract's work.

Knows: agents by the public API, and the settings that differ from the defaults. Must never know
who measures it, or that it is measured: it is served as any other agents would be.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

import attrs
import trio

from agentsse import Agent, agent, emit
from agentsse.config import LimitSettings, ServerSettings, Settings
from agentsse.server import Server, serve

from .peers.contract import TEXT, Counter, Order, announce

STRIDE = 50  # events between two checkpoints of an agent that does not wait
RUNS = 20_000  # at once; the default of 1,000 would queue what the others let in

COUNTER = Counter()


@agent(on_disconnect="cancel")
async def run(run, input):
    """Do the contract's work."""
    order = Order.of(input)
    COUNTER.start()
    upstream = None
    try:
        if order.upstream is not None:
            upstream = await trio.open_tcp_stream("127.0.0.1", order.upstream)
            await upstream.send_all(order.greeting)
        start = trio.current_time()
        for n in range(1, order.events + 1):
            if order.gap:
                await trio.sleep_until(start + (n - 1) * order.gap)
            elif n % STRIDE == 0:
                await trio.lowlevel.checkpoint()
            if order.stamp:
                run.text(f"{time.monotonic_ns()};")
            else:
                emit("tick", n=n, text=TEXT)
        await trio.sleep(order.hold)
    finally:
        COUNTER.enter(order.key)
        if upstream is not None:
            with run.cleanup():
                await upstream.aclose()
        COUNTER.leave(order.key)


@agent
async def counter(_run, input):
    """Say what has become of the runs."""
    await trio.lowlevel.checkpoint()
    tasks = trio.lowlevel.current_statistics().tasks_living
    return COUNTER.shown(tasks=tasks, times=input["times"])


def serve_quietly(agents: Sequence[Agent], *, drain: float | None = None) -> None:
    """Serve until SIGTERM; print the address as a JSON line. Ends the process.

    Args:
        agents: What can be run.
        drain: Seconds from SIGTERM to the end; the server's default unless given.
    """

    def tell(server: Server) -> None:
        host, _, port = server.urls[0].removeprefix("http://").rpartition(":")
        announce(host, int(port))

    def ignore(*_args: object, **_facts: object) -> None:
        """Log nothing, as the peers do."""

    usual = ServerSettings(port=0)
    settings = Settings(
        server=usual if drain is None else attrs.evolve(usual, drain=drain),
        limits=LimitSettings(max_running=RUNS),
    )
    sys.exit(trio.run(partial(serve, agents, settings, report=ignore, announce=tell)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--drain", type=float)
    serve_quietly([run, counter], drain=parser.parse_args().drain)


if __name__ == "__main__":
    main()
