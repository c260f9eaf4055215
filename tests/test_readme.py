"""What the README shows is what happens."""

import re
from pathlib import Path
from typing import get_args

import pytest
import trio

from agentsse.cli import main
from agentsse.config import load
from agentsse.dialects import Start
from agentsse.dialects.native import NATIVE
from agentsse.errors import Fault
from agentsse.events import EVENT_TYPES, Custom
from agentsse.runs import open_runs
from agentsse.server import DIALECTS, KINDS

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


async def test_the_agent_in_the_readme_runs(autojump_clock):
    """The example works as it is printed."""
    scope = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), scope)
    ticker = scope["ticker"]
    async with open_runs({"ticker": ticker}) as runs:
        order = Start(agent="ticker", input={"n": 2, "gap": 0.5}, delivery="wait")
        run, _ = runs.start(order, default="cancel")
        await run.done.wait()
    assert run.result == {"n": 2, "found": "ada is here"}
    assert run.snapshot().output == "0 1 "
    assert sum(isinstance(event, Custom) for event in run.log.events) == 2


async def test_the_flow_in_the_readme_runs(autojump_clock):
    """The flow works as it is printed: it asks, and does what was said."""
    scope = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), scope)
    async with open_runs({"triage": scope["triage"]}) as runs:
        order = Start(agent="triage", input="my vpn", delivery="wait")
        run, _ = runs.start(order, default="cancel")
        await run.wait_done_or_asking()
        run.context.answer_next("yes")
        await run.done.wait()
    assert run.result == "provisioned: yes"


async def test_the_test_in_the_readme_passes():
    """The example of `agentsse.testing` works as it is printed."""
    scope = {}
    exec(compile(blocks("python")[3], "README.md", "exec"), scope)
    with trio.fail_after(30):
        await scope["test_it"]()
    assert scope["helper"].function.provider.open_streams == 0


@pytest.mark.parametrize("name", sorted(EVENT_TYPES))
def test_every_event_type_is_told(name):
    """The table of events is complete."""
    assert f"`{name}`" in README


@pytest.mark.parametrize("route", NATIVE.routes, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_told(route):
    """The table of routes is complete."""
    path = re.sub("<(run|thread)_id>", "{id}", route.path)
    path = path.replace("<agent>", "{agent}").replace("<trigger_id>", "{name}")
    assert f"`{route.method} {path}`" in README


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_dialect_is_told(dialect):
    """The table of protocols is complete."""
    assert f"| `{dialect.name}` |" in README


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_and_option_is_told(command):
    """The synopsis names every option that there is."""
    synopsis = next(b for b in blocks("text") if "agentsse version" in b)
    line = next(line for line in synopsis.splitlines() if line.startswith(f"agentsse {command}"))
    for parameter in main.commands[command].params:
        told = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name
        assert told.lower() in line.lower(), f"{told} is not in {line!r}"


def test_the_two_commands_are_one_line_each():
    """One line installs and serves, one installs and passes the tests."""
    install = "python3 -m venv .venv && .venv/bin/pip install -q "
    lines = [line for line in README.splitlines() if line.startswith(install)]
    assert [line.removeprefix(install) for line in lines] == [
        ". && .venv/bin/agentsse serve",
        "'.[test]' && .venv/bin/pytest -q",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_provider_is_told(kind):
    """The table of providers is complete."""
    assert f"| `{kind}` |" in README


@pytest.mark.parametrize("code", sorted({*get_args(Fault), "loop_detected", "too_many_steps"}))
def test_every_fault_of_a_model_call_is_told(code):
    """Whoever sees a code finds out what it means."""
    assert f"`{code}`" in README


def test_the_models_in_the_readme_are_a_configuration(tmp_path):
    """The table is understood as it is printed."""
    (config,) = [block for block in blocks("toml") if "openai_chat" in block]
    path = tmp_path / "agentsse.toml"
    path.write_text(config)
    settings = load(path, {})
    assert "openai_chat" == settings.providers["local"].kind
    assert "local:qwen3" == settings.agents["helper"].model
