"""`python -m bench WHAT`: measurements of agentsse beside others, in one run on one machine."""

from pathlib import Path

import click

from . import relay, saturate


@click.group()
def bench() -> None:
    """Measure agentsse beside others, in one run on one machine."""


@bench.command("saturate")
@click.option("--quick", is_flag=True, help="20 streams x 200 events, one round.")
@click.option("--streams", type=click.IntRange(1, 1_000), help="Streams at once; default 100.")
@click.option("--events", type=click.IntRange(100, 90_000), help="Events of each; default 1000.")
@click.option("--rounds", type=click.IntRange(1, 20), help="Of each server; default 3.")
@click.option("--floor", type=float, help="Fail below this ratio.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write all figures.")
def _saturate(
    *,
    quick: bool,
    streams: int | None,
    events: int | None,
    rounds: int | None,
    floor: float | None,
    file: Path | None,
) -> None:
    """Streams as fast as possible, through agentsse and through aiohttp."""
    usual = saturate.Size(20, 200, 1) if quick else saturate.Size(100, 1_000, 3)
    size = saturate.Size(streams or usual.streams, events or usual.events, rounds or usual.rounds)
    raise SystemExit(saturate.measure(size, floor=floor, file=file))


@bench.command("relay")
@click.option("--quick", is_flag=True, help="20 streams of 1.5 s, one round, no targets.")
@click.option(
    "--streams", type=click.IntRange(1, 900), multiple=True, help="At once; default 150, then 400."
)
@click.option("--seconds", type=click.IntRange(5, 60), help="Of each stream; default 10.")
@click.option("--rounds", type=click.IntRange(1, 20), help="Of each relay; default 3.")
@click.option("--check", is_flag=True, help="Fail where a target is missed.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write all figures.")
def _relay(
    *,
    quick: bool,
    streams: tuple[int, ...],
    seconds: int | None,
    rounds: int | None,
    check: bool,
    file: Path | None,
) -> None:
    """A model's tokens as they come, through agentsse, through aiohttp and through Node."""
    usual = relay.Size((20,), 1.5, 1) if quick else relay.Size((150, 400), 10.0, 3)
    size = relay.Size(
        streams or usual.streams,
        seconds or usual.seconds,
        rounds or usual.rounds,
        is_smoke=quick,
    )
    raise SystemExit(relay.measure(size, check=check, file=file))


@bench.command("serve", hidden=True)
def _serve() -> None:
    """Be the agentsse server that is measured."""
    saturate.serve_ticks()


@bench.command("serve-relay", hidden=True)
@click.argument("url")
def _serve_relay(url: str) -> None:
    """Be the agentsse server that relays."""
    relay.serve_relay(url)


bench(prog_name="python -m bench")
