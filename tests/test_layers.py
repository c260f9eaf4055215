"""The house: who may import whom, and where nothing may wait.

A floor imports only floors below it. Within the shell and the engine each module may import those
that stand after it; members of a family share their package's `__init__` and, where it is said
below, a base, and nothing else.
"""

import ast
from pathlib import Path

import pytest

import agentsse

PACKAGE = Path(agentsse.__file__).parent

VALUES = ("markdown", "messages", "events", "sse", "errors")
OUTBOUND = ("http", "process")
FAMILIES = ("providers", "dialects", "stores", "tools")
BASES = {
    "dialects.openai_chat": "dialects.openai",
    "dialects.openai_responses": "dialects.openai",
}
ENGINE = ("threads", "runs", "flows", "agents", "models", "context", "feed", "log")
SHELL = (
    "cli", "server", "app", "pages", "openapi", "metrics", "exchange", "paths", "listener",
    "config", "guide",
)  # fmt: skip
CLIENT = ("client",)
BESIDE = ("", "__main__", "testing")

ONLY_IMPORTER = {
    "quart": "pages",
    "quart_trio": "pages",
    "werkzeug": "pages",
    "hypercorn": "listener",
    "h11": "listener",
    "httpcore2": "http",
    "structlog": "cli",
    "click": "cli",
    "prometheus_client": "metrics",
}
NOWHERE = ("asyncio", "anyio", "sniffio", "trio_asyncio")


def module_name(path: Path) -> str:
    """`providers/offline.py` is `providers.offline`; a package is its folder."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


MODULES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports(name: str) -> set[str]:
    """Every module that this one imports, wherever in it; ours without the package's name."""
    is_package = (PACKAGE / name.replace(".", "/") / "__init__.py").is_file()
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(MODULES[name]):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(level=0):
                found.add(node.module or "")
            case ast.ImportFrom():
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, node.module] if node.module else parents)
                names = {f"{base}.{alias.name}".strip(".") for alias in node.names}
                found |= {f"agentsse.{n}" for n in names if n in MODULES} or {f"agentsse.{base}"}
            case _:
                pass
    return found


def inner_imports(name: str) -> set[str]:
    """Those of our own modules."""
    own = {found.removeprefix("agentsse").removeprefix(".") for found in imports(name)
           if found.split(".")[0] == "agentsse"}  # fmt: skip
    return {found if found in MODULES else found.rpartition(".")[0] for found in own}


def place(name: str) -> tuple[int, int]:
    """The floor, and the place on it: a lower pair may not import a higher one."""
    family = name.split(".", maxsplit=1)[0]
    if name in VALUES:
        return 0, -VALUES.index(name)
    if name in OUTBOUND:
        return 1, 0
    if family in FAMILIES or name in CLIENT:
        return 2, 0
    if name in ENGINE:
        return 3, -ENGINE.index(name)
    return 4, -SHELL.index(name)


def in_the_house() -> list[str]:
    return sorted(name for name in MODULES if name.split(".")[0] not in BESIDE)


@pytest.mark.parametrize("name", in_the_house())
def test_a_module_imports_only_what_stands_below_it(name):
    """Floors import floors below, and within a floor what stands after; families keep apart."""
    family = name.split(".")[0]
    for imported in inner_imports(name) - {name, ""}:
        if imported.split(".")[0] == family and family in FAMILIES:
            assert imported in (family, BASES.get(name)), f"{name} imports its sibling {imported}"
        else:
            assert place(name) > place(imported), f"{name} imports {imported}"


def test_every_module_has_its_place():
    """A new module is put into the house, or this fails."""
    known = {*VALUES, *OUTBOUND, *FAMILIES, *CLIENT, *ENGINE, *SHELL, *BESIDE}
    assert {name.split(".")[0] for name in MODULES} <= known


@pytest.mark.parametrize(("library", "importer"), ONLY_IMPORTER.items())
def test_a_library_has_one_importer(library, importer):
    """What a library does to us is dealt with in one place."""
    users = {name for name in MODULES if library in {i.split(".")[0] for i in imports(name)}}
    assert users == {importer}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_but_trio_waits(name):
    """No other event loop, and no layer that would hide which one it is."""
    assert not {found.split(".")[0] for found in imports(name)} & set(NOWHERE)


@pytest.mark.parametrize(
    "name", [name for name in sorted(MODULES) if name in VALUES or name.startswith("dialects")]
)
def test_values_and_dialects_never_wait(name):
    """Floor 0 and the dialects have no await, and know no trio."""
    assert not awaits(MODULES[name])
    assert "trio" not in imports(name)


def test_normalizers_and_encoders_never_wait():
    """A pure machine has no await, whatever the module around it has."""
    machines = [
        node
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Normalizer", "Encoder"))
    ]
    names = {node.name for node in machines}
    assert {"OfflineNormalizer", "SseNormalizer", "CodexNormalizer", "NativeEncoder"} <= names
    assert [node.name for node in machines if awaits(node)] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_opens_with_what_it_is(name):
    """The first thing in a file is its theory, or its purpose."""
    assert ast.get_docstring(MODULES[name])


def awaits(tree: ast.AST) -> bool:
    """Whether anything in the tree can block."""
    waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    return any(isinstance(node, waiting) for node in ast.walk(tree))
