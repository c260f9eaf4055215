"""What a start costs: nothing is imported before somebody asks for it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import trio

import agentsse
from agentsse import RunContext, agent
from agentsse.config import DialectSettings, Settings
from agentsse.dialects import Start
from agentsse.errors import ConfigError
from agentsse.server import check_settings
from agentsse.testing import open_server

PATIENCE = 30.0  # seconds until a test that hangs has failed
DIALECTS = "agentsse.dialects."

# Serves, asks for some paths one after the other, and tells the statuses and all modules there are.
SCRIPT = """
import json, sys
import agentsse.cli, agentsse.server
import trio

async def ask(port, method, path):
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        head = f"{method} {path} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 2\\r\\n"
        await stream.send_all(f"{head}Connection: close\\r\\n\\r\\n{{}}".encode())
        return int(b"".join([some async for some in stream]).split()[1])

async def main():
    settings = agentsse.server.Settings(agentsse.config.ServerSettings(port=0))
    agents = agentsse.server.make_agents(settings, None)
    with trio.fail_after(30):
        async with agentsse.server.open_server(agents, settings) as server:
            port = int(server.urls[0].rpartition(":")[2])
            print(json.dumps([await ask(port, *each.split()) for each in sys.argv[1:]]))
            print(json.dumps(list(sys.modules)))

trio.run(main)
"""


def serve_and_ask(*requests: str) -> tuple[list[int], set[str]]:
    """The statuses of some requests to a server in a new interpreter, and what it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *requests],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    statuses, modules = map(json.loads, done.stdout.splitlines())
    return statuses, set(modules)


def dialects(modules: set[str]) -> set[str]:
    return {name.removeprefix(DIALECTS) for name in modules if name.startswith(DIALECTS)}


def test_a_server_that_nobody_has_asked_for_anything_has_loaded_little():
    """It lives, and knows no dialect, no other loop, and no library that few requests need."""
    statuses, modules = serve_and_ask("GET /health/live", "GET /health/ready")
    assert statuses == [200, 200]
    assert dialects(modules) == set()
    unneeded = {"asyncio", "quart", "httpcore2", "prometheus_client", "structlog", "email.utils"}
    assert unneeded & modules == set()
    assert {"importlib.metadata", "agentsse.openapi", "agentsse.client"} & modules == set()


@pytest.mark.parametrize(
    ("request_", "status", "loaded"),
    [
        ("GET /agents", 200, {"native"}),
        ("GET /threads/nobody", 404, {"native"}),
        ("POST /api/sessions", 201, {"hive"}),
        ("GET /pipelines", 200, {"kilroy"}),
        ("GET /v1/models", 200, {"openai", "openai_chat"}),
        ("PUT /api/chat", 405, {"vercel"}),
        ("GET /nowhere", 404, set()),
        ("GET /metrics", 200, set()),
    ],
)
def test_a_request_loads_the_dialect_that_it_is_for(request_, status, loaded):
    """No other one, and none where it is for nobody."""
    statuses, modules = serve_and_ask(request_)
    assert ([status], loaded) == (statuses, dialects(modules))


def test_a_second_request_finds_the_dialect_loaded():
    """Several dialects are loaded, one after the other."""
    asked = ["GET /agents", "GET /api/sessions", "GET /agents", "GET /api/sessions"]
    statuses, modules = serve_and_ask(*asked)
    assert statuses == [200, 200, 200, 200]
    assert dialects(modules) == {"native", "hive"}


def test_the_document_tells_of_all_dialects():
    """Whoever asks for /openapi.json has all of them loaded."""
    statuses, modules = serve_and_ask("GET /openapi.json", "GET /nowhere")
    assert statuses == [200, 404]
    assert {"native", "hive", "kilroy", "langgraph", "vercel"} <= dialects(modules)


@agent
async def hello(run: RunContext, input: str) -> str:
    """Greet."""
    await trio.lowlevel.checkpoint()
    return f"hello {input}"


async def test_a_run_is_watched_in_a_dialect_that_was_not_loaded():
    """To name a dialect is to ask for it."""
    with trio.fail_after(PATIENCE):
        async with open_server(hello) as server:
            host, _, port = server.urls[0].rpartition("/")[2].partition(":")
            run, _ = server.runs.start(
                Start(agent="hello", input="you", delivery="background"),
                default="continue",
            )
            await run.done.wait()
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                path = f"/runs/{run.id}/events?dialect=agui"
                head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                await stream.send_all(head.encode())
                answer = b"".join([some async for some in stream])
    assert b"RUN_FINISHED" in answer


async def test_a_dialect_is_found_where_the_settings_put_it():
    """There, with its agent, and no more where it was."""
    moved = Settings(dialects={"hive": DialectSettings(mount="/elsewhere", agent="hello")})
    with trio.fail_after(PATIENCE):
        async with open_server(hello, settings=moved) as server:
            found = server.app._paths.find("GET", "/elsewhere/sessions")
            assert found is not None
            assert ("hive", "hello") == (found.dialect.name, found.dialect.agent)
            assert server.app._paths.find("GET", "/api/sessions") is None


@pytest.mark.parametrize("name", ["kilroy", "langgraph"])
def test_a_mount_where_paths_are_taken_is_refused_before_anybody_asks(name):
    """Though neither of the two is loaded at that time."""
    settings = Settings(dialects={name: DialectSettings(mount="/")})
    with pytest.raises(ConfigError, match=rf"'native' and '{name}'.*\[dialects.{name}\]"):
        check_settings(settings, [hello])


def test_the_version_is_that_of_the_package():
    """It stands in two places, so that nobody has to look for it on the disk."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["version"] == agentsse.__version__
