"""TOML, environment and command line into frozen settings, or into a list of all that is wrong.

Knows: the keys, their bounds and defaults, and where a value came from. Must never know what a
setting does, nor a secret: of a credential the file holds only the place, and what stands under
`[providers]` is not repeated in any message, for it may be one that was put there by mistake.

One rule: nothing starts with a setting that was not understood. msgspec converts value by value,
so that every problem is found in one go; it passes over unknown keys, so they are looked for here.
What an alias below says in `description` is what a message says was expected: change both at once.
"""

import contextlib
import importlib
import os
import re
import reprlib
import sys
import tomllib
import traceback
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeAlias, get_args

import attrs
import msgspec
from msgspec import Meta

from .errors import ConfigError, redact

PREFIX = "AGENTSSE_"  # then SECTION__KEY; a name without two underscores in it is not ours

_MIB = 1024 * 1024  # bytes
_LONG = 1_000_000_000  # seconds, 31 years: what is meant as "for ever" without being infinite
_INT64 = 2**63 - 1  # TOML's largest integer; tomllib lets larger ones through

Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535, description="a whole number from 0 to 65535")]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=_INT64, description="a whole number above 0")]
CountOrZero: TypeAlias = Annotated[
    int, Meta(ge=0, le=_INT64, description="a whole number, 0 or more")
]
Bytes: TypeAlias = Annotated[
    int, Meta(ge=1, le=_INT64, description="a whole number of bytes, above 0")
]
Milliseconds: TypeAlias = Annotated[
    int, Meta(ge=0, le=60_000, description="a whole number of milliseconds from 0 to 60000")
]
Seconds: TypeAlias = Annotated[
    float, Meta(gt=0, le=_LONG, description="a number of seconds above 0, at most 1e9")
]
SecondsOrZero: TypeAlias = Annotated[
    float, Meta(ge=0, le=_LONG, description="a number of seconds from 0 to 1e9")
]
# The kernel takes whole milliseconds in a C int, and takes 0 for "as the system does".
KernelSeconds: TypeAlias = Annotated[
    float, Meta(ge=0.001, le=86_400, description="a number of seconds from 0.001 to 86400")
]
Prose: TypeAlias = Annotated[str, Meta(description="a string")]
Name: TypeAlias = Annotated[str, Meta(min_length=1, description="a string that is not empty")]
Names: TypeAlias = Annotated[
    tuple[Name, ...], Meta(description="an array of strings that are not empty")
]
LogFormat: TypeAlias = Annotated[
    Literal["console", "json"], Meta(description='"console" or "json"')
]
Policy: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^(cancel|continue|grace(:[0-9]{1,9}(\.[0-9]{1,9})?)?)\Z",
        description='"cancel", "continue", "grace" or "grace:SECONDS"',
    ),
]
# A user part or a query string is where credentials hide in a URL.
Url: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!\"$->@-~]*)?\Z",
        description="an http or https URL in ASCII, without user, password, query and fragment",
    ),
]
# A pasted key seldom has this form; a name always has it.
Variable: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z",
        description="the name of an environment variable (letters, digits, underscores)",
    ),
]
ToolCalls: TypeAlias = Annotated[
    Literal["native", "text", "taught"], Meta(description='"native", "text" or "taught"')
]
Text: TypeAlias = Annotated[str, Meta(description="text")]
Options: TypeAlias = Annotated[dict[str, Any], Meta(description="a table")]
Mount: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?\Z",
        description='"/" or a path such as "/prefix", without a slash at its end',
    ),
]


@attrs.frozen
class ServerSettings:
    """`[server]`: where it listens, and how long it bears with a peer."""

    host: Name = "127.0.0.1"
    """Address or name to bind; loopback, because there is no authentication."""

    port: Port = 8080
    """TCP port; 0 lets the system choose a free one."""

    folder: Name | None = None
    """What the built-in guide reads, relative to the working directory; None: our own README."""

    drain: SecondsOrZero = 30.0
    """Seconds from SIGTERM to the end of everything; orchestrators often kill after 30."""

    heartbeat: Seconds = 10.0
    """Seconds of silence before a comment is sent; proxies cut streams idle for 30 to 60."""

    rotation: SecondsOrZero = 600.0
    """Seconds after which a GET stream is closed to be resumed, times U(0.8, 1); 0: never.
    Below the lifetime limits of common gateways, and it spreads streams after a restart."""

    write_deadline: Seconds = 10.0
    """Seconds one write may wait for a reader that does not read; then its stream is cut."""

    tcp_user_timeout: KernelSeconds = 20.0
    """Seconds the kernel waits for an ACK of sent bytes; the default would be some 15 minutes."""

    keep_alive: Seconds = 5.0
    """Seconds an idle connection may wait for its next request: each one costs a descriptor."""

    max_body: Bytes = 1 * _MIB
    """Bytes of a request body, but for those of clients that post their history."""

    max_history: Bytes = 32 * _MIB
    """Bytes of a request body where clients post their history; never less than `max_body`."""

    max_bodies: Bytes = 256 * _MIB
    """Bytes of all requests that are being read; who comes when it is full is to come again."""

    max_connections: Count | None = None
    """Connections at once; None: as many as RLIMIT_NOFILE has room for."""

    allowed_hosts: Names = ()
    """Host names answered beside the loopback ones; any other is taken for DNS rebinding."""

    log: LogFormat | None = None
    """How log lines look; None: "console" on a terminal, else "json"."""


@attrs.frozen
class LimitSettings:
    """`[limits]`: bounds of runs; each is there so that no run can take all of the machine."""

    coalesce_ms: Milliseconds = 50
    """Milliseconds for which text is gathered into one event; below what a reader notices."""

    grace: SecondsOrZero = 30.0
    """Seconds a run whose last reader left waits for one to come back: a phone in a tunnel."""

    max_running: Count = 1000
    """Runs at once."""

    max_queued: CountOrZero = 1000
    """Runs that wait for a place; the next one is told to come back later."""

    max_events: Count = 100_000
    """Events of one run: with `max_bytes`, what one log may hold in memory."""

    max_bytes: Bytes = 64 * _MIB
    """Bytes of one run's events."""

    retain_runs: CountOrZero = 1000
    """Finished runs that can still be read and replayed."""

    retain_bytes: CountOrZero = 256 * _MIB
    """Bytes of all finished runs together."""

    retain_age: SecondsOrZero = 3600.0
    """Seconds a finished run is kept: time to come back from lunch."""

    run_timeout: Seconds = 3600.0
    """Seconds a run may take, unless its agent or its request says less."""

    input_timeout: Seconds = 1800.0
    """Seconds a run waits for a person's answer; leaving does not cancel it meanwhile."""

    cleanup: SecondsOrZero = 5.0
    """Seconds, in all, that a cancelled run may shield for cleanup; it has to fit into `drain`."""

    max_threads: Count = 32
    """Worker threads for blocking tools, of all runs together."""

    max_steps: Count = 50
    """Model calls in one run: a loop that goes round and round ends here."""

    max_tries: Count = 6
    """Tries of one model call, while nothing of its answer was shown."""

    retry_delay: SecondsOrZero = 2.0
    """Seconds before the second try; doubled before each further one, up to 120."""

    liveness: Seconds = 10.0
    """Seconds between two signs that a step is still under way."""

    stall: Seconds = 600.0
    """Seconds a model's turn may go on without a sign of progress; then it is given up."""


@attrs.frozen
class ProviderSettings:
    """`[providers.NAME]`: a model API, and where its key is to be found."""

    kind: Name
    """Which protocol it speaks, "openai_chat" for instance."""

    base_url: Url | None = None
    """Where it is; None: the vendor's own address."""

    key_env: Variable | None = None
    """Environment variable that holds the key; at most one of this and `key_file`."""

    key_file: Name | None = None
    """File that holds the key, relative to the working directory."""

    options: Options = attrs.field(factory=dict, repr=False)
    """What is sent with every call beside the conversation: `temperature`, for instance."""

    omit: Names = ()
    """Fields that are left out of every call, because the server refuses them."""

    tool_calls: ToolCalls = "native"
    """How the model calls tools: "native", as its API has it; "text", where it also writes calls
    into its text; "taught", where its API has none and it is told how to write them."""

    command: Names = ()
    """The program, for a kind that runs one: "codex" and its arguments."""


@attrs.frozen
class AgentSettings:
    """`[agents.NAME]`: an agent made of a model, instructions and tools."""

    model: Name
    """PROVIDER:MODEL; the provider is a name under `[providers]` or one that is built in."""

    instructions: Prose = ""
    """The system prompt."""

    description: Prose = ""
    """What it is for, for people and for agents that may call it."""

    tools: Names = ()
    """Places of tools, "package.module:attribute"."""

    fallbacks: Names = ()
    """Models, PROVIDER:MODEL, that take over where this one cannot answer."""

    context_window: CountOrZero = 0
    """Tokens that the model can hold; the stream is told when 85 % are used. 0: unknown."""

    on_disconnect: Policy | None = None
    """What becomes of a run whose readers left; None: what the client's dialect is used to."""

    max_running: Count | None = None
    """Runs at once of this agent: a local model often serves one. None: `limits.max_running`."""

    timeout: Seconds | None = None
    """Seconds a run of it may take; None: `limits.run_timeout`."""


@attrs.frozen
class DialectSettings:
    """`[dialects.NAME]`: where a client protocol has its place."""

    mount: Mount | None = None
    """Path before its routes; None: the one it is known for."""
    agent: Text | None = None
    """Who runs where a request names nobody; None: the server's first agent."""
    form: Text | None = None
    """Which of its forms is spoken, where it has several; None: the current one."""


@attrs.frozen
class Settings:
    """All that can be set. `source` is no key: it says in messages where the settings came from."""

    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    providers: dict[str, ProviderSettings] = attrs.field(factory=dict)
    agents: dict[str, AgentSettings] = attrs.field(factory=dict)
    dialects: dict[str, DialectSettings] = attrs.field(factory=dict)
    source: str = "defaults"


_Class: TypeAlias = type[attrs.AttrsInstance]
# Where a value stands: "$" and its keys in the file, else the variable or the option alone.
_Place: TypeAlias = tuple[str | int, ...]

_SECTIONS: dict[str, _Class] = {"server": ServerSettings, "limits": LimitSettings}
_FAMILIES: dict[str, _Class] = {
    "providers": ProviderSettings,
    "agents": AgentSettings,
    "dialects": DialectSettings,
}
_SECRET = re.compile(r"(?i)(key|token|secret|password|authorization)\Z")
_ELSEWHERE = 'key_env = "NAME" (an environment variable) or key_file = "PATH"'


def load(path: Path | None, environ: Mapping[str, str], **overrides: Any) -> Settings:
    """Read the settings: command line over environment over file over defaults.

    Args:
        path: A TOML file; None for none.
        environ: The environment; of it, `AGENTSSE_SERVER__*` and `AGENTSSE_LIMITS__*` are read.
            An array is written with commas.
        **overrides: Keys of `[server]` from the command line; None stands for "not given".

    Returns:
        The settings, every value within its bounds.

    Raises:
        ConfigError: Something is unknown, of the wrong type or out of bounds. The message has
            one line per problem: file and line, key, what was expected, what came.
    """
    text = "" if path is None else _text(path)
    document = {} if path is None else _document(text, path=path)
    reader = _Reader()
    files = {
        name: reader.fields(cls, document.pop(name, {}), place=("$", name))
        for name, cls in _SECTIONS.items()
    }
    families = {
        name: reader.family(cls, document.pop(name, {}), place=("$", name))
        for name, cls in _FAMILIES.items()
    }
    for name in document:
        reader.refuse(("$", name), _unknown(name, [*_SECTIONS, *_FAMILIES]))
    for name, provider in families["providers"].items():
        if provider.keys() >= {"key_env", "key_file"}:
            reader.refuse(("$", "providers", name), f"expected one of {_ELSEWHERE}, got both")
        for place in _secrets(provider.get("options"), ("$", "providers", name, "options")):
            reader.refuse(place, f"a secret has no place in this file; use {_ELSEWHERE}")
    variables = reader.variables(environ)
    options = {
        name: reader.value(
            attrs.fields_dict(ServerSettings)[name], value, place=(f"--{name.replace('_', '-')}",)
        )
        for name, value in overrides.items()
        if value is not None
    }
    reader.finish(text, path=path)
    return Settings(
        server=ServerSettings(**(files["server"] | variables["server"] | options)),
        limits=LimitSettings(**(files["limits"] | variables["limits"])),
        providers={name: ProviderSettings(**keys) for name, keys in families["providers"].items()},
        agents={name: AgentSettings(**keys) for name, keys in families["agents"].items()},
        dialects={name: DialectSettings(**keys) for name, keys in families["dialects"].items()},
        source="defaults" if path is None else str(path),
    )


def _secrets(value: object, place: _Place) -> Iterator[_Place]:
    """Where in a table, at any depth, a key has the name of a secret."""
    match value:
        case dict():
            for key, inner in value.items():
                if _SECRET.search(key):
                    yield (*place, key)
                else:
                    yield from _secrets(inner, (*place, key))
        case list():
            for inner in value:
                yield from _secrets(inner, place)
        case _:
            pass


def load_object(reference: str, *, what: str) -> object:
    """Import what `reference` names.

    While it is imported, the file's folder (for a module: the working directory) stands first on
    `sys.path`. A file becomes the module of its stem, once, whoever imports it.

    Args:
        reference: "package.module:attribute", "file.py" (the module itself) or
            "file.py:attribute"; a relative path starts at the working directory.
        what: What it is wanted for, a word or two that open the message.

    Returns:
        The attribute, or the module.

    Raises:
        ConfigError: It has another form, or there is no such file, module or attribute, or an
            exception came out of it: then that is the cause, and its place is in the message.
    """
    called = f"{what} {reference!r}"
    if not _REFERENCE.fullmatch(reference):
        raise ConfigError(
            f'{called}: expected "package.module:attribute", "file.py" or "file.py:attribute"'
        )
    target, attribute = reference, ""
    if not reference.endswith(".py"):
        target, _, attribute = reference.rpartition(":")
    if target.endswith(".py"):
        module = _file_module(Path(target).resolve(), called=called)
    else:
        module = _module(target, folder="", called=called)
    if not attribute:
        return module
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(
            f"{called}: no {attribute!r} in {module.__name__}{_similar(attribute, public)}"
        ) from error


@attrs.define
class _Reader:
    """Takes tables apart and converts values; what is wrong it notes and goes on.

    Attributes:
        problems: Where each is, and what was expected, what came or what to do.
    """

    problems: list[tuple[_Place, str]] = attrs.field(factory=list)

    def refuse(self, place: _Place, sentence: str) -> None:
        self.problems.append((place, sentence))

    def family(self, cls: _Class, tables: object, *, place: _Place) -> dict[str, dict[str, Any]]:
        """What each table of a table holds; each is to become a `cls`."""
        if isinstance(tables, dict):
            return {
                name: self.fields(cls, table, place=(*place, name))
                for name, table in tables.items()
            }
        self.refuse(place, f"expected tables [{place[-1]}.NAME], got {_came(tables, place)}")
        return {}

    def fields(self, cls: _Class, table: object, *, place: _Place) -> dict[str, Any]:
        """What one table holds, converted to what the attributes of `cls` ask for."""
        if not isinstance(table, dict):
            self.refuse(place, f"expected a table, got {_came(table, place)}")
            return {}
        known = attrs.fields_dict(cls)
        taken = {}
        for key, given in table.items():
            if key in known:
                taken[key] = self.value(known[key], given, place=(*place, key))
            elif cls is ProviderSettings and _SECRET.search(key):
                self.refuse((*place, key), f"a secret has no place in this file; use {_ELSEWHERE}")
            else:
                self.refuse((*place, key), _unknown(key, known))
        for key, attribute in known.items():
            if attribute.default is attrs.NOTHING and key not in table:
                self.refuse(
                    place, f"expected the key {key!r} ({_expected(attribute)[0]}), got none"
                )
        return taken

    def variables(self, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What the environment says of each section."""
        taken: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
        known = {
            f"{PREFIX}{section}__{key}".upper(): (section, attribute)
            for section, cls in _SECTIONS.items()
            for key, attribute in attrs.fields_dict(cls).items()
        }
        for name, text in environ.items():
            if name in known:
                section, attribute = known[name]
                given = _items(text) if isinstance(attribute.default, tuple) else text
                taken[section][attribute.name] = self.value(
                    attribute, given, place=(name,), strict=False
                )
            elif name.startswith(PREFIX) and "__" in name:
                # All names begin alike, so only a near one is worth a guess.
                hint = _similar(name, known, cutoff=0.9) or f"; expected {_VARIABLES}"
                self.refuse((name,), f"unknown{hint}")
        return taken

    def value(
        self,
        attribute: "attrs.Attribute[Any]",
        given: object,
        *,
        place: _Place,
        strict: bool = True,
    ) -> Any:
        """What `attribute` asks for, made of `given`: text may become a number if not `strict`."""
        try:
            return msgspec.convert(given, attribute.type, strict=strict)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:  # an environment is bytes
            expected = _expected(attribute)
            item = _ITEM.search(str(error))
            if item and isinstance(given, list):
                number = int(item[1])
                self.refuse(
                    (*place, number), f"expected {expected[-1]}, got {_came(given[number], place)}"
                )
            else:
                self.refuse(place, f"expected {expected[0]}, got {_came(given, place)}")

    def finish(self, text: str, *, path: Path | None) -> None:
        """Raise if there is a problem; `text` is what the file at `path` holds."""
        if not self.problems:
            return
        lines = _lines(text)
        told = []
        for place, sentence in self.problems:
            where, line = "", sys.maxsize  # variables and options follow what is in the file
            if place[0] == "$":
                line = lines[tuple(part for part in place[1:] if isinstance(part, str))]
                where = f"{path}:{line}: "
            told.append((line, f"{where}{_spelt(place)}: {sentence}"))
        told.sort(key=lambda problem: problem[0])
        raise ConfigError("\n".join(problem for _, problem in told))


_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ITEM = re.compile(r"`\$\[(\d+)\]`")  # how msgspec says which item of an array it means
_VARIABLES = f"{PREFIX}SERVER__KEY or {PREFIX}LIMITS__KEY: only these sections are read from here"
_REFERENCE = re.compile(r"[^\0]+\.py(:\w+)?|\w+(\.\w+)*:\w+")


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a TOML file that can be read, got: {error.strerror}"
        ) from error
    try:
        return content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: expected UTF-8, got byte 0x{content[error.start]:02x}; "
            "save the file as UTF-8"
        ) from error


def _document(text: str, *, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # int() and deep nesting raise their own
        raise ConfigError(f"{path}: expected TOML, got: {error}") from error


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """On which line of a TOML document each key begins.

    tomllib does not say. But a header, and a key with its value, is the shortest run of lines
    that is a document by itself.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    statement, start = "", 1
    for number, line in enumerate(text.split("\n"), start=1):
        statement += line + "\n"
        try:
            paths = _paths(tomllib.loads(statement))
        except tomllib.TOMLDecodeError:
            continue  # a string or an array that goes on
        header = statement.lstrip().startswith("[")
        if header:
            table = ()
        for keys in paths:
            lines.setdefault(table + keys, start)
        if header:
            table = paths[-1]
        statement, start = "", number + 1
    return lines


def _paths(table: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every key of a table and of the tables in it, outer ones first."""
    paths = []
    rest: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), table)]
    while rest:
        above, table = rest.pop()
        for key, inner in table.items():
            paths.append((*above, key))
            if isinstance(inner, dict):
                rest.append(((*above, key), inner))
    return paths


def _spelt(place: _Place) -> str:
    first, *rest = place
    return str(first) + "".join(
        f".{part}" if isinstance(part, str) and _BARE.fullmatch(part) else f"[{part!r}]"
        for part in rest
    )


def _expected(attribute: "attrs.Attribute[Any]") -> list[str]:
    """What an attribute asks for, in words; for an array then what its items are."""
    return list(_descriptions(attribute.type))


def _descriptions(hint: object) -> Iterator[str]:
    yield from (meta.description for meta in getattr(hint, "__metadata__", ()))
    for inner in get_args(hint):
        yield from _descriptions(inner)


def _came(value: object, place: _Place) -> str:
    """A value in a message: short, on one line, without what may be a secret."""
    shown = place[:2] != ("$", "providers") and not _SECRET.search(str(place[-1]))
    match value:
        case bool() | float() if shown:
            return str(value).lower()  # as TOML spells them
        case int() if shown and value.bit_length() < 64:
            return str(value)
        case str() if shown:
            return reprlib.repr(redact(value))
    kinds = {str: "a string", dict: "a table", list: "an array", int: "an integer"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _similar(name: str, known: Collection[str], *, cutoff: float = 0.6) -> str:
    """A guess at what `name` should have been, or nothing; `cutoff` is difflib's."""
    import difflib  # noqa: PLC0415  # only for what is wrong

    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown(key: str, known: Collection[str]) -> str:
    for section, cls in _SECTIONS.items():
        if key in attrs.fields_dict(cls):
            return f"unknown here; it is a key of [{section}]"
    return f"unknown{_similar(key, known) or '; expected one of: ' + ', '.join(known)}"


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _file_module(path: Path, *, called: str) -> ModuleType:
    if not path.is_file():
        came = "a folder" if path.is_dir() else "nothing"
        raise ConfigError(f"{called}: expected a Python file at {path}, got {came}; check the path")
    name = path.stem
    if "." in name or name in sys.stdlib_module_names:
        raise ConfigError(
            f"{called}: expected a file name without dots that Python itself does not use for a "
            f"module, got {path.name!r}; rename the file"
        )
    module = _module(name, folder=str(path.parent), called=called)
    place = getattr(module, "__file__", None)
    if place is None or Path(place).resolve() != path:
        raise ConfigError(
            f"{called}: expected the module {name!r} to be {path}, but that name is taken by "
            f"{place or 'a module without a file'}; rename the file"
        )
    return module


def _module(name: str, *, folder: str, called: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may be younger than the last look at its folder
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever an author's module may do
        raise _import_error(error, name=name, called=called) from error
    finally:
        with contextlib.suppress(ValueError):  # it may have put sys.path in order itself
            sys.path.remove(folder)


def _import_error(error: BaseException, *, name: str, called: str) -> ConfigError:
    if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
        return ConfigError(
            f"{called}: no module {error.name!r}; expected it to be installed, or in the working "
            "directory"
        )
    sentence = " ".join(redact(str(error)).split())
    return ConfigError(
        f"{called}: {type(error).__name__} while importing {name!r}, at {_author_line(error)}: "
        f"{sentence}"
    )


def _author_line(error: BaseException) -> str:
    """The last line of the author's own code that an exception came through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    import sysconfig  # noqa: PLC0415  # only for what is wrong

    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    others = ("<frozen ", *(f"{folder}{os.sep}" for folder in [Path(__file__).parent, *installed]))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(others)]
    last = (theirs or frames)[-1]
    return f"{last.filename}:{last.lineno}"
