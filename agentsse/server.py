"""The composition root: sockets, signals, nurseries, and the order in which they end.

Knows: which parts there are and who owns whom. Must never know what a request or an event means.

    services    the timer
    supervisor  one task per run                            (runs.py)
    listener    one task per connection                     (listener.py, app.py)

They are opened in this order and end in the other one: first the runs, which gives every stream its
end, then the connections, then the timer. A drain is that, on time.
"""

import gc
import ipaddress
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeGuard

import attrs
import trio

from .agents import Agent
from .app import AgentsseApp
from .config import AgentSettings, ProviderSettings, Settings, load_object
from .context import Limits
from .dialects import AnyDialect, LazyDialect
from .errors import ConfigError
from .exchange import AppOptions
from .guide import guide
from .listener import Counts, ListenerOptions, open_sockets, serve as listen
from .paths import Paths
from .providers import HttpProvider, Provider
from .providers.offline import OfflineProvider
from .runs import Run, Runs, contained, open_runs
from .tools import Tool, Toolset


def _dialect(name: str, mount: str, *below: str, rooted: tuple[str, ...] = ()) -> LazyDialect:
    """One of ours: its module and its value are called what it is called."""
    place = f"agentsse.dialects.{name}:{name.upper()}"
    return LazyDialect(name=name, place=place, mount=mount, below=below or ("",), rooted=rooted)


DIALECTS: tuple[AnyDialect, ...] = (
    _dialect("native", "/", "/agents", "/events", "/runs", "/threads"),
    _dialect("agui", "/agui"),
    _dialect("vercel", "/api", "/chat"),
    _dialect("openai_chat", "/v1", "/chat", "/models"),
    _dialect("openai_responses", "/v1", "/responses"),
    _dialect("langgraph", "/langgraph"),
    _dialect("agentlang", "/agentlang"),
    _dialect("lightspeed", "/v1", "/query", "/streaming_query"),
    _dialect("kilroy", "/kilroy", rooted=("/pipelines",)),
    _dialect("hive", "/api", "/events", "/sessions", "/workers"),
)
RESERVED_DESCRIPTORS = 64  # for logs, upstreams and files, beside the connections
MIN_CLEANUP = 5.0  # seconds, at most half of the drain, that cancelled runs get to clean up
# Streams and runs that end leave no cycles, so what is collected is somebody else's. To look at all
# objects stops the loop for a second where 8,000 streams are open; so it is done rarely.
COLLECT_AFTER = (10_000, 5, 200)  # objects more than before; then collections of the younger ones
MIN_FAREWELL = 0.5  # seconds that streams get for their last bytes, though the drain is over

Report = Callable[..., None]


@attrs.define(eq=False, repr=False)
class Server:
    """A server that listens.

    Attributes:
        urls: Where, such as `http://127.0.0.1:8080`.
        runs: The engine.
        app: The HTTP side.
        connections: Counts for operators.
    """

    urls: list[str]
    runs: Runs
    app: AgentsseApp
    connections: Counts

    async def drain(self, seconds: float) -> list[Run]:
        """End everything that goes on, within a time.

        New runs are refused at once. Those that go on may end by themselves for all but the last
        5 s (at most half) of the time; then they are cancelled with the cause `shutdown`, and their
        streams get their end like any other.

        Returns:
            The runs that have outlived it: each shields itself from cancellation.
        """
        until = trio.current_time() + seconds
        self.runs.refuse()
        with trio.move_on_at(until - min(MIN_CLEANUP, seconds / 2)):
            await self.runs.wait_idle()
        self.runs.close("shutdown")
        with trio.move_on_at(until):
            await self.runs.wait_idle()
        return self.runs.unfinished()


@asynccontextmanager
async def open_server(
    agents: Sequence[Agent],
    settings: Settings | None = None,
    *,
    providers: Mapping[str, Provider] | None = None,
    dialects: Sequence[AnyDialect] | None = None,
    report: Report = lambda *_args, **_facts: None,
) -> AsyncIterator[Server]:
    """Open a server; leaving the context ends its runs, then its connections.

    Args:
        agents: What can be run; their names must differ.
        settings: All that can be set; port 0 finds a free one.
        providers: Model APIs by name, beside those of the settings and those that are built in.
        dialects: The client protocols to speak; all there are unless given.
        report: Called with an event's name and facts, for the log; what it raises is dropped.

    Raises:
        ConfigError: Two agents of one name, a model of a provider that there is not or whose key
            is missing, an address that is not loopback, or one in use.
        ExceptionGroup: As nurseries do, it wraps what the block raises.
    """
    settings, report = settings or Settings(), contained(report)
    dialects = DIALECTS if dialects is None else dialects
    check_settings(settings, agents, providers=providers, dialects=dialects)
    by_name = {agent.name: agent for agent in agents}
    offered = _offered(settings, agents, providers)
    options = _listener_options(settings)
    sockets = _open_sockets(options, report)
    counts = Counts()
    stop = trio.Event()
    try:
        async with open_runs(
            by_name, limits=make_limits(settings), providers=offered, report=report
        ) as runs:
            app = AgentsseApp(
                runs,
                _mounted(settings, agents, dialects),
                options=_app_options(settings),
                report=report,
                connections=counts,
            )
            async with trio.open_nursery() as nursery:
                urls = await nursery.start(
                    partial(
                        listen, app, sockets, options,
                        shutdown_trigger=stop.wait, log=report, counts=counts,
                    )
                )  # fmt: skip
                try:
                    yield Server(urls, runs, app, counts)
                    runs.close("shutdown")
                    with trio.move_on_after(settings.limits.cleanup + MIN_FAREWELL):
                        await runs.wait_idle()
                finally:
                    runs.close("shutdown")
                    stop.set()
    finally:
        for sock in sockets:
            sock.close()


async def serve(
    agents: Sequence[Agent],
    settings: Settings,
    *,
    providers: Mapping[str, Provider] | None = None,
    report: Report,
    announce: Callable[[Server], None],
    flush: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal says to stop, drain, and say how that went.

    Args:
        agents: What can be run.
        settings: All that can be set.
        providers: Model APIs by name.
        report: For the log.
        announce: Called once, when it listens.
        flush: Called before the process ends without further ado: what was reported is written.

    Returns:
        The exit code: 0, or 1 if a run outlived the drain; it has been named in the log.

    SIGTERM or SIGINT begins the drain. A second one ends the process at once.
    """
    raise_descriptor_limit(report)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as watch:
            with trio.CancelScope() as whole:
                async with open_server(
                    agents, settings, providers=providers, report=report
                ) as server:
                    gc.freeze()  # what is here now stays: no collection need look at it again
                    gc.set_threshold(*COLLECT_AFTER)
                    announce(server)
                    received = signal.Signals(await anext(signals))
                    watch.start_soon(_end_at_second_signal, signals, flush)
                    drain = settings.server.drain
                    until = trio.current_time() + drain
                    report("draining", signal=received.name, seconds=drain)
                    for run in (unfinished := await server.drain(drain)):
                        report("run_outlived_drain", run_id=run.id, agent=run.agent.name)
                    if unfinished:
                        _exit(1, flush)
                    # Every stream has its end; a client that does not take it is not waited for.
                    whole.deadline = max(until, trio.current_time() + MIN_FAREWELL)
            watch.cancel_scope.cancel()
    report("stopped")
    return 0


async def _end_at_second_signal(signals: AsyncIterator[int], flush: Callable[[], None]) -> None:
    _exit(128 + await anext(signals), flush)


def _exit(code: int, flush: Callable[[], None]) -> None:
    """Leave without waiting for anybody: what is left is what does not want to end."""
    flush()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, full, or None where there never was one
            stream.flush()
    os._exit(code)


def make_agents(settings: Settings, reference: str | None) -> list[Agent]:
    """Find the agents that are to be served.

    Args:
        settings: Their `[agents.NAME]` tables, and the folder of the guide.
        reference: A file or `module:object`: an agent, several, or a module that holds them.

    Returns:
        Those of the reference, then those of the settings; the built-in guide where there is none
        of either, or where a folder was named for it.

    Raises:
        ConfigError: Something named is not there, or is not what it should be.
    """
    agents = [] if reference is None else _agents_in(reference)
    agents += [_model_agent(name, chosen) for name, chosen in settings.agents.items()]
    if settings.server.folder is not None or not agents:
        folder = settings.server.folder
        agents.append(guide(None if folder is None else Path(folder)))
    return agents


def _agents_in(reference: str) -> list[Agent]:
    found = load_object(reference, what="agents")
    if isinstance(found, Agent):
        return [found]
    values = vars(found).values() if isinstance(found, ModuleType) else found
    agents = [value for value in values if isinstance(value, Agent)] if _is_many(values) else []
    if not agents:
        raise ConfigError(
            f"{reference}: expected an agent, or a module with some, got none: "
            "decorate an async function of (run, input) with @agent"
        )
    return list(dict.fromkeys(agents))  # a module may know one by two names


def _is_many(found: object) -> TypeGuard[Iterable[object]]:
    return isinstance(found, Iterable) and not isinstance(found, str)


def _are_tools(found: Iterable[object]) -> TypeGuard[Iterable[Tool]]:
    return all(isinstance(each, Tool) for each in found)


def _model_agent(name: str, chosen: AgentSettings) -> Agent:
    tools: list[Tool | Toolset] = []
    for reference in chosen.tools:
        match load_object(reference, what="a tool"):
            # An agent, too, has an attribute `tools`, and a class is no source before it is called.
            case Tool() | Toolset() as found if not isinstance(found, Agent | type):
                tools.append(found)
            case list() | tuple() as several if several and _are_tools(several):
                tools += several
            case other:
                raise ConfigError(
                    f"agents.{name}: tools: expected a tool at {reference!r}, got "
                    f"{type(other).__name__}: decorate the function with @tool"
                )
    try:
        return Agent.of_model(
            name,
            chosen.model,
            instructions=chosen.instructions,
            tools=tools,
            fallbacks=chosen.fallbacks,
            context_window=chosen.context_window,
            description=chosen.description,
            on_disconnect=chosen.on_disconnect,
            max_running=chosen.max_running,
            timeout=chosen.timeout,
        )
    except ValueError as error:
        raise ConfigError(f"agents: {error}") from error


@attrs.frozen
class _Kind:
    """Where a kind of provider is made, and the variable that its vendor's key is in."""

    module: str
    factory: str
    key_env: str | None = None


_HTTP_KINDS = {
    "openai_chat": _Kind("agentsse.providers.openai_chat", "OpenAIChatApi", "OPENAI_API_KEY"),
    "openai_responses": _Kind(
        "agentsse.providers.openai_responses", "OpenAIResponsesApi", "OPENAI_API_KEY"
    ),
    "anthropic": _Kind("agentsse.providers.anthropic", "AnthropicApi", "ANTHROPIC_API_KEY"),
    "gemini": _Kind("agentsse.providers.gemini", "GeminiApi", "GEMINI_API_KEY"),
}
KINDS = ("offline", *_HTTP_KINDS, "llama_stack", "codex")


def make_provider(
    kind: str,
    *,
    name: str | None = None,
    base_url: str | None = None,
    key_env: str | None = None,
    key_file: str | None = None,
    options: Mapping[str, Any] | None = None,
    omit: Sequence[str] = (),
    tool_calls: Literal["native", "text", "taught"] = "native",
    command: Sequence[str] = (),
) -> Provider:
    """Make a provider, as a `[providers.NAME]` table does.

    Args:
        kind: `openai_chat`, `openai_responses`, `anthropic`, `gemini`, `llama_stack`,
            `codex` or `offline`.
        name: What stands before the colon of a model; the kind unless given.
        base_url: Where the API is; the vendor's own address unless given.
        key_env: The environment variable that holds the key. Without one, and without `key_file`,
            the vendor's own address is given the vendor's own variable, any other one no key.
        key_file: A file that holds the key, relative to the working directory.
        options: What is sent with every call beside the conversation, `temperature` for instance.
        omit: Fields that are left out of every call, because the server refuses them.
        tool_calls: `text` where the model also writes calls into its text, `taught` where its API
            has none, and it is told how to write them.
        command: The program of a kind that runs one.

    Raises:
        ConfigError: A kind that there is not, or a key that is not where it should be.
    """
    chosen = ProviderSettings(
        kind=kind,
        base_url=base_url,
        key_env=key_env,
        key_file=key_file,
        options=dict(options or {}),
        omit=tuple(omit),
        tool_calls=tool_calls,
        command=tuple(command),
    )
    return _make_provider(name or kind, chosen, f"the provider {name or kind!r}")


def _make_provider(name: str, chosen: ProviderSettings, where: str) -> Provider:
    # Imported here: who does not use a kind does not pay for it.
    provider: Provider
    match chosen.kind:
        case "offline":
            return OfflineProvider(name=name)
        case "codex":
            codex = import_module("agentsse.providers.codex")
            command = {"command": chosen.command} if chosen.command else {}
            made = codex.CodexProvider(name=name, options=chosen.options, **command)
            provider, is_taught = made, True
        case "llama_stack" as kind:
            of_kind = _Kind("agentsse.providers.llama_stack", "LlamaStackProvider")
            at = {} if chosen.base_url is None else {"base_url": chosen.base_url.rstrip("/")}
            provider = getattr(import_module(of_kind.module), of_kind.factory)(
                name=name,
                key=_key(chosen, of_kind, where),
                options=chosen.options | dict.fromkeys(chosen.omit),
                **at,
            )
            is_taught = chosen.tool_calls == "taught"
        case kind if kind in _HTTP_KINDS:
            of_kind = _HTTP_KINDS[kind]
            key = _key(chosen, of_kind, where)
            at = {} if chosen.base_url is None else {"base_url": chosen.base_url.rstrip("/")}
            make = getattr(import_module(of_kind.module), of_kind.factory)
            options = chosen.options | dict.fromkeys(chosen.omit)
            api = make(key=key, options=options, **at)
            provider, is_taught = HttpProvider(name, api, key), chosen.tool_calls == "taught"
        case kind:
            raise ConfigError(f"{where}.kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if is_taught or chosen.tool_calls == "text":
        embedded = import_module("agentsse.providers.embedded")
        provider = embedded.EmbeddedProvider(provider, teach=is_taught)
    return provider


def _key(chosen: ProviderSettings, kind: _Kind, where: str) -> str | None:
    """The key, from where the settings say; never in a message."""
    if chosen.key_file is not None:
        try:
            key = Path(chosen.key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{where}.key_file: expected a file with a key at {chosen.key_file!r}, got "
                f"{getattr(error, 'strerror', None) or 'no text'}"
            ) from None
        source = f"the file {chosen.key_file!r}"
    else:
        # Another address than the vendor's must not be sent the vendor's key.
        variable = chosen.key_env or (None if chosen.base_url else kind.key_env)
        if variable is None:
            return None
        key = os.environ.get(variable, "").strip()
        source = f"the environment variable {variable}"
    if not key or not key.isascii() or not key.isprintable():
        came = "one that no header can carry" if key else "none"
        raise ConfigError(f"{where}: expected a key in {source}, got {came}")
    return key


def make_providers(settings: Settings, wanted: Iterable[str] = ()) -> dict[str, Provider]:
    """The model APIs of the settings, and of those that are built in the ones that are wanted.

    Args:
        settings: Their `[providers.NAME]` tables.
        wanted: Names; of these, each kind stands for itself, at its vendor's address.

    Raises:
        ConfigError: A kind that there is not, or a key that is not where it should be.
    """
    providers: dict[str, Provider] = {"offline": OfflineProvider()}
    for name, chosen in settings.providers.items():
        providers[name] = _make_provider(name, chosen, f"{settings.source}: providers.{name}")
    for name in wanted:
        if name in KINDS and name not in providers:
            where = f"{settings.source}: the provider {name!r}"
            providers[name] = _make_provider(name, ProviderSettings(kind=name), where)
    return providers


def raise_descriptor_limit(report: Report) -> None:
    """Allow as many connections as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            report("descriptor_limit", soft=soft, hard=hard, error=str(error))


def is_loopback(host: str) -> bool:
    """Whether a name or address stands for this machine only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # ValueError: a name that IDNA cannot encode
        return False
    return bool(found) and all(
        ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found
    )


def _open_sockets(options: ListenerOptions, report: Report) -> list[socket.socket]:
    try:
        sockets, lacking = open_sockets(options)
    except OSError as error:
        raise ConfigError(str(error)) from error
    if lacking:
        report("socket_options_lacking", options=lacking)
    return sockets


def _mounted(
    settings: Settings, agents: Sequence[Agent], dialects: Sequence[AnyDialect]
) -> tuple[AnyDialect, ...]:
    """The dialects as the settings want them."""
    known = {dialect.name: dialect for dialect in dialects}
    unknown = sorted(set(settings.dialects) - set(known))
    if unknown:
        raise ConfigError(
            f"{settings.source}: dialects: expected some of {', '.join(known)}, "
            f"got {', '.join(unknown)}"
        )
    for name, chosen in settings.dialects.items():
        dialect, where = known[name], f"{settings.source}: dialects.{name}"
        if chosen.form is not None:
            forms = dialect.load().forms
            if chosen.form not in forms:
                raise ConfigError(
                    f"{where}.form: expected one of {', '.join(forms) or '(it has none)'}, "
                    f"got {chosen.form!r}"
                )
            dialect = forms[chosen.form]
        if chosen.mount is not None:
            dialect = attrs.evolve(dialect, mount=chosen.mount)
        if chosen.agent is not None:
            if chosen.agent not in {agent.name for agent in agents}:
                raise ConfigError(
                    f"{where}.agent: expected one of "
                    f"{', '.join(agent.name for agent in agents)}, got {chosen.agent!r}"
                )
            dialect = attrs.evolve(dialect, agent=chosen.agent)
        known[name] = dialect
    mounted = tuple(known.values())
    Paths.claimed_by(mounted)
    return mounted


def check_settings(
    settings: Settings,
    agents: Sequence[Agent],
    *,
    providers: Mapping[str, Provider] | None = None,
    dialects: Sequence[AnyDialect] | None = None,
) -> None:
    """See whether a server could be made of this, without opening anything.

    Raises:
        ConfigError: Two agents of one name, a model of a provider that there is not, a dialect
            that there is not, or an address that is not loopback.
    """
    names = [agent.name for agent in agents]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"expected agents of different names, got two of {', '.join(twice)}")
    offered = _offered(settings, agents, providers)
    for agent in agents:
        for name in sorted(agent.wanted_providers - set(offered)):
            raise ConfigError(
                f"agent {agent.name!r}: expected a model of one of the providers "
                f"{', '.join(sorted({*offered, *KINDS}))}, got {name!r}"
            )
    _mounted(settings, agents, DIALECTS if dialects is None else dialects)
    if not is_loopback(settings.server.host):
        raise ConfigError(
            f"host: expected an address of loopback, got {settings.server.host!r}. Whoever can "
            "connect can run agents, and there is no authentication: put a proxy that "
            "authenticates before it"
        )


def _offered(
    settings: Settings, agents: Sequence[Agent], providers: Mapping[str, Provider] | None
) -> dict[str, Provider]:
    """Every provider that these agents may ask for."""
    given = dict(providers or {})
    wanted = {name for agent in agents for name in agent.wanted_providers} - set(given)
    return make_providers(settings, sorted(wanted)) | given


def make_limits(settings: Settings) -> Limits:
    """The bounds of runs, as they are set."""
    chosen = attrs.asdict(settings.limits)
    return Limits(coalesce=chosen.pop("coalesce_ms") / 1000, **chosen)


def _app_options(settings: Settings) -> AppOptions:
    server = settings.server
    return AppOptions(
        heartbeat=server.heartbeat,
        rotation=server.rotation,
        max_body=server.max_body,
        max_history=server.max_history,
        max_bodies=server.max_bodies,
        allowed_hosts=tuple(name.lower() for name in server.allowed_hosts),
    )


def _listener_options(settings: Settings) -> ListenerOptions:
    server = settings.server
    most: Any = server.max_connections
    if most is None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = None if soft == resource.RLIM_INFINITY else max(1, soft - RESERVED_DESCRIPTORS)
    return ListenerOptions(
        host=server.host,
        port=server.port,
        write_deadline=server.write_deadline,
        tcp_user_timeout=server.tcp_user_timeout,
        keep_alive=server.keep_alive,
        max_connections=most,
    )
