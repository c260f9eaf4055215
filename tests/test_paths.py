"""Paths: whose they are, that nobody claims another's, and which dialects need not be loaded."""

import re
import subprocess
import sys

import attrs
import pytest

from agentsse.dialects import Dialect, LazyDialect, Route
from agentsse.dialects.hive import HIVE
from agentsse.dialects.lightspeed import LIGHTSPEED
from agentsse.dialects.native import NATIVE
from agentsse.dialects.vercel import VERCEL
from agentsse.errors import ConfigError
from agentsse.paths import LIVE, OWN, Paths, claim_paths
from agentsse.server import DIALECTS

LOADED = tuple(dialect.load() for dialect in DIALECTS)
LAZY = {dialect.name: dialect for dialect in DIALECTS if isinstance(dialect, LazyDialect)}
SEVERAL = [  # forms of one dialect have the paths of that dialect
    *((LAZY[dialect.name], form) for dialect in LOADED for form in dialect.forms.values()),
    *zip(DIALECTS, LOADED, strict=True),
]


def loads(statement: str) -> set[str]:
    """The modules of dialects that a new interpreter has imported after a statement."""
    shown = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, timeout=60, check=True
    )
    prefix = "agentsse.dialects."
    return {name.removeprefix(prefix) for name in done.stdout.split() if name.startswith(prefix)}


def route(path: str, method: str = "GET") -> Route:
    return attrs.evolve(NATIVE.routes[0], path=path, method=method)


@pytest.mark.parametrize(
    ("path", "dialect", "claimed"),
    [pytest.param(*each, id=f"{each[2].method} {each[0]}") for each in claim_paths(LOADED)],
)
def test_every_route_is_found_by_the_first_request_for_it(path, dialect, claimed):
    """What is said of a dialect that is not loaded leaves none of its routes out."""
    asked = re.sub(r"<\w+>", "x", path)
    found = Paths.claimed_by(DIALECTS).find(claimed.method, asked)
    assert found is not None
    assert (dialect.name, claimed.path) == (found.dialect.name, found.route.path)
    assert dict.fromkeys(re.findall(r"<(\w+)>", path), "x") == found.parameters


@pytest.mark.parametrize(("lazy", "loaded"), SEVERAL, ids=lambda dialect: dialect.name)
def test_what_is_said_of_a_dialect_is_true(lazy, loaded):
    """Its name and mount, and that all of its paths begin as is said."""
    assert (lazy.name, lazy.mount) == (loaded.name, loaded.mount)
    for each in loaded.routes:
        assert loaded.path(each).startswith(tuple(f"{prefix}/" for prefix in lazy.prefixes)) or (
            loaded.path(each) in lazy.prefixes
        )


def test_no_dialect_is_loaded_until_one_of_its_paths_is_asked_for():
    """One request loads one dialect; a path that nobody knows loads none."""
    ask = "from agentsse.server import DIALECTS, Paths\npaths = Paths.claimed_by(DIALECTS)\n"
    assert loads("import agentsse.server") == set()
    assert loads(f"{ask}paths.find('GET', '/nowhere'), paths.methods('/health/live')") == set()
    assert loads(f"{ask}paths.find('GET', '/agents')") == {"native"}
    assert loads(f"{ask}paths.methods('/api/sessions/7/stop')") == {"hive"}
    assert loads(f"{ask}paths.find('GET', '/pipelines/7')") == {"kilroy"}


def test_a_path_is_asked_for_by_the_methods_there_are():
    """HEAD goes with GET, OPTIONS with all; a path that nobody claims has none."""
    paths = Paths.claimed_by(DIALECTS)
    assert paths.methods("/threads/7") == ("DELETE", "GET", "HEAD", "OPTIONS")
    assert paths.methods("/v1/chat/completions") == ("OPTIONS", "POST")
    assert paths.methods(LIVE) == ("GET", "HEAD", "OPTIONS")
    assert paths.methods("/threads//messages") == paths.methods("/nowhere") == ()


def test_a_named_segment_goes_before_one_that_may_be_anything():
    """The methods of both are told."""
    dialect = attrs.evolve(
        NATIVE, routes=(route("/a/<b>"), route("/a/b"), route("/a/<b>/c"), route("/a/b", "POST"))
    )
    paths = Paths.claimed_by([dialect])
    for path, expected in {"/a/b": "/a/b", "/a/x": "/a/<b>", "/a/b/c": "/a/<b>/c"}.items():
        assert (found := paths.find("HEAD", path)) is not None
        assert expected == found.route.path
    assert paths.find("GET", "/a/") is None
    assert paths.methods("/a/b") == ("GET", "HEAD", "OPTIONS", "POST")


def test_a_lazy_dialect_keeps_what_it_was_set_to():
    """Its mount and its default agent are those of the settings once it is loaded."""
    vercel = attrs.evolve(LAZY["vercel"], mount="/ai", agent="helper")
    found = Paths.claimed_by([vercel]).find("POST", "/ai/chat")
    assert found is not None
    assert ("/ai", "helper") == (found.dialect.mount, found.dialect.agent)
    assert attrs.evolve(found.dialect, mount=VERCEL.mount, agent=None) == VERCEL
    assert Paths.claimed_by([vercel]).find("POST", "/api/chat") is None


@pytest.mark.parametrize(
    ("dialects", "path"),
    [
        ((attrs.evolve(LAZY["kilroy"], mount="/"), LAZY["native"]), "GET /runs"),
        ((LAZY["native"], attrs.evolve(LAZY["kilroy"], mount="/")), "GET /runs"),
        ((attrs.evolve(LAZY["langgraph"], mount="/"), NATIVE), "POST /threads"),
        ((attrs.evolve(NATIVE, name="twin"), LAZY["native"]), "GET /agents"),
    ],
)
def test_a_path_that_two_dialects_claim_is_refused_at_once(dialects, path):
    """Where a lazy one might be in another's way, it is loaded to see."""
    with pytest.raises(ConfigError, match=rf"expected one dialect for {path}, got"):
        Paths.claimed_by(dialects)


@pytest.mark.parametrize(
    "dialects",
    [
        (attrs.evolve(LAZY["hive"], mount="/"), LAZY["native"]),  # /events and /events/global
        (LIGHTSPEED, attrs.evolve(LAZY["vercel"], mount="/v1"), LAZY["openai_chat"]),
        (attrs.evolve(LAZY["agui"], mount="/"), HIVE, LAZY["kilroy"]),
    ],
)
def test_what_paths_begin_with_may_be_shared_in_peace(dialects):
    """Every route of both is found."""
    paths = Paths.claimed_by(dialects)
    for path, dialect, claimed in claim_paths(each.load() for each in dialects):
        found = paths.find(claimed.method, re.sub(r"<\w+>", "x", path))
        assert found is not None
        assert dialect.name == found.dialect.name


@pytest.mark.parametrize("path", OWN)
@pytest.mark.parametrize("mount", ["", "/health"])
def test_what_operators_ask_for_is_nobody_elses(path, mount):
    """A dialect that is mounted above it is looked at; one that claims it is refused."""
    Paths.claimed_by([attrs.evolve(LAZY["agui"], mount=mount or "/")])
    claiming: Dialect = attrs.evolve(NATIVE, routes=(route(path),))
    with pytest.raises(ConfigError, match=rf"GET {path}, got 'the server itself' and 'native'"):
        Paths.claimed_by([claiming])
