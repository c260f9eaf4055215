"""Settings from TOML, environment and command line, and objects named by a string.

Every refusal is asserted on its message: it is all that the person who wrote the file will see.
"""

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given, settings as bounds, strategies

from agentsse import config
from agentsse.config import (
    AgentSettings,
    DialectSettings,
    LimitSettings,
    ProviderSettings,
    ServerSettings,
    Settings,
    load,
    load_object,
)
from agentsse.errors import ConfigError

EXAMPLE = """\
[server]
port = 8080
[providers.local]
kind = "openai_chat"
base_url = "http://127.0.0.1:8081/v1"      # key_env = "NAME" or key_file = "path" where needed
[agents.helper]
model = "local:qwen3"
instructions = "..."
tools = ["mytools:lookup"]
on_disconnect = "grace:30"
"""

# Each table, its class, and what it needs to be complete.
TABLES: list[tuple[str, Any, dict[str, str]]] = [
    ("server", ServerSettings, {}),
    ("limits", LimitSettings, {}),
    ("providers.local", ProviderSettings, {"kind": '"x"'}),
    ("agents.helper", AgentSettings, {"model": '"x"'}),
    ("dialects.native", DialectSettings, {}),
]
FIELDS = [
    pytest.param(table, attribute, needed, id=f"{table}.{attribute.name}")
    for table, cls, needed in TABLES
    for attribute in attrs.fields(cls)
]
# For every field one of these is right; no field has one of them as its default.
SAMPLES = [
    "7",
    '["seven"]',
    '"console"',
    '"cancel"',
    '"taught"',
    "{ seven = 7 }",
    '"http://seven"',
    '"/seven"',
    '"seven"',
]


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file and returns its path."""

    def write_text(text):
        path = tmp_path / "agentsse.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@pytest.fixture
def refusal(write):
    """The message for a file, without the file's name."""

    def load_text(text, environ=None, **overrides):
        path = write(text)
        with pytest.raises(ConfigError) as caught:
            load(path, environ or {}, **overrides)
        return caught.value.message.replace(f"{path}:", "")

    return load_text


@pytest.fixture
def author(tmp_path, monkeypatch):
    """Writes modules into the working directory; those named "cfg..." are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)

    def write_module(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    yield write_module
    for name in [name for name in sys.modules if name.startswith("cfg")]:
        del sys.modules[name]


def unimportable(reference):
    with pytest.raises(ConfigError) as caught:
        load_object(reference, what="tool")
    return caught.value


# --- what can be set


def test_nothing_given_means_defaults():
    """Without a file, a variable or an option the settings are the documented defaults."""
    settings = load(None, {})

    assert Settings() == settings
    assert "defaults" == settings.source
    assert ("127.0.0.1", 8080, 30.0, 10.0, 600.0) == (
        settings.server.host,
        settings.server.port,
        settings.server.drain,
        settings.server.heartbeat,
        settings.server.rotation,
    )
    assert (1024**2, 64 * 1024**2, 256 * 1024**2) == (
        settings.server.max_body,
        settings.limits.max_bytes,
        settings.limits.retain_bytes,
    )


def test_the_example_of_the_design_loads(write):
    """The example that is printed in the documents is a valid file."""
    path = write(EXAMPLE)

    assert Settings(
        providers={
            "local": ProviderSettings(kind="openai_chat", base_url="http://127.0.0.1:8081/v1")
        },
        agents={
            "helper": AgentSettings(
                model="local:qwen3",
                instructions="...",
                tools=("mytools:lookup",),
                on_disconnect="grace:30",
            )
        },
        source=str(path),
    ) == load(path, {})


def test_every_toml_block_of_the_readme_loads(write):
    """What the README shows as configuration can be pasted."""
    readme = Path(__file__).parent.parent / "README.md"
    for block in re.findall(r"(?ms)^```toml\n(.*?)^```", readme.read_text("utf-8")):
        load(write(block), {})


@pytest.mark.parametrize(("table", "attribute", "needed"), FIELDS)
def test_every_field_can_be_set_in_the_file(write, table, attribute, needed):
    """There is no attribute that a file cannot set, and it arrives as it was written."""
    for sample in SAMPLES:
        value = tomllib.loads(f"x = {sample}")["x"]
        try:
            expected = msgspec.convert(value, attribute.type)
        except msgspec.ValidationError:
            continue
        keys = needed | {attribute.name: sample}
        text = "".join(f"{key} = {written}\n" for key, written in keys.items())
        settings = load(write(f"[{table}]\n{text}"), {})
        section, _, name = table.partition(".")
        found = getattr(settings, section)

        assert expected == getattr(found[name] if name else found, attribute.name)
        assert expected != attribute.default
        return
    pytest.fail(f"no sample fits {attribute.name}")


@pytest.mark.parametrize("wrong", ["2024-01-01", "[{ a = 1 }]", "[[1]]", "true", "1e400", "nan"])
@pytest.mark.parametrize(("table", "attribute", "needed"), FIELDS)
def test_a_wrong_type_is_refused_with_the_name_of_the_key(refusal, table, attribute, needed, wrong):
    """Whatever the field, a value of another type names line, key and what was expected."""
    keys = needed | {attribute.name: wrong}
    text = "".join(f"{key} = {written}\n" for key, written in keys.items())
    message = refusal(f"[{table}]\n{text}")

    line = 2 + list(keys).index(attribute.name)
    assert message.startswith(f"{line}: $.{table}.{attribute.name}")
    assert re.search(r": expected .+, got .+", message)
    assert "\n" not in message


@pytest.mark.parametrize("section", ["server", "limits"])
def test_every_key_of_server_and_limits_has_a_variable(section):
    """The environment can set each of them, text becoming what the key asks for."""
    for attribute in attrs.fields(type(getattr(Settings(), section))):
        text = "console" if attribute.name == "log" else "7"
        name = f"AGENTSSE_{section}__{attribute.name}".upper()
        value = getattr(getattr(load(None, {name: text}), section), attribute.name)

        assert value in (7, "7", ("7",), "console")


def test_command_line_beats_environment_beats_file(write):
    """Each source covers what the ones below it say, key by key; None is no option."""
    path = write("[server]\nport = 1\ndrain = 1\nheartbeat = 1\n[limits]\ngrace = 1\n")
    environ = {
        "AGENTSSE_SERVER__PORT": "2",
        "AGENTSSE_SERVER__DRAIN": "2",
        "AGENTSSE_LIMITS__GRACE": "0.5",
        "AGENTSSE_HOME": "a single underscore is somebody else's",
        "PATH": "/bin",
    }
    settings = load(path, environ, port=3, host=None)

    assert (3, 2.0, 1.0, 0.5, "127.0.0.1") == (
        settings.server.port,
        settings.server.drain,
        settings.server.heartbeat,
        settings.limits.grace,
        settings.server.host,
    )


def test_an_array_in_the_environment_is_written_with_commas():
    """Blanks around items and empty items do not count."""
    environ = {"AGENTSSE_SERVER__ALLOWED_HOSTS": "a.example, b.example,"}

    assert ("a.example", "b.example") == load(None, environ).server.allowed_hosts


def test_integers_pass_for_seconds(write):
    """A duration may be written without a point."""
    drain = load(write("[server]\ndrain = 5"), {}).server.drain

    assert (float, 5.0) == (type(drain), drain)


@pytest.mark.parametrize("policy", ["cancel", "continue", "grace", "grace:30", "grace:0.5"])
def test_every_policy_is_accepted(write, policy):
    """The words for what happens when the readers have left."""
    path = write(f'[agents.a]\nmodel = "x"\non_disconnect = "{policy}"')

    assert policy == load(path, {}).agents["a"].on_disconnect


def test_a_byte_order_mark_is_passed_over(write):
    """Some editors begin a file with one."""
    assert 1 == load(write("\ufeff[server]\r\nport = 1\r\n"), {}).server.port


# --- what is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server]\nprot = 1", "2: $.server.prot: unknown; did you mean 'port'?"),
        ("port = 1", "1: $.port: unknown here; it is a key of [server]"),
        (
            "[server]\nmax_running = 1",
            "2: $.server.max_running: unknown here; it is a key of [limits]",
        ),
        ("[sever]\nport = 1", "1: $.sever: unknown; did you mean 'server'?"),
        (
            "source = 'x'",
            "1: $.source: unknown; expected one of: server, limits, providers, agents, dialects",
        ),
        (
            "[dialects.x]\nzzz = 1",
            "2: $.dialects.x.zzz: unknown; expected one of: mount, agent, form",
        ),
        ("server = 1", "1: $.server: expected a table, got 1"),
        ("[[agents]]", "1: $.agents: expected tables [agents.NAME], got an array"),
        ("[agents]\n'a b' = 7", "2: $.agents['a b']: expected a table, got 7"),
        (
            "\n[agents.a]",
            "2: $.agents.a: expected the key 'model' (a string that is not empty), got none",
        ),
        (
            "[server]\nport = 65536",
            "2: $.server.port: expected a whole number from 0 to 65535, got 65536",
        ),
        (
            "[server]\nport = 1.0",
            "2: $.server.port: expected a whole number from 0 to 65535, got 1.0",
        ),
        (
            "[server]\nheartbeat = 0",
            "2: $.server.heartbeat: expected a number of seconds above 0, at most 1e9, got 0",
        ),
        (
            "[server]\nmax_body = 0x" + "f" * 9000,
            "2: $.server.max_body: expected a whole number of bytes, above 0, got an integer",
        ),
        (
            "[server]\nlog = '$[3]'",
            '2: $.server.log: expected "console" or "json", got \'$[3]\'',
        ),
        (
            "[server]\nallowed_hosts = [\n'a',\n'',\n]",
            "2: $.server.allowed_hosts[1]: expected a string that is not empty, got ''",
        ),
        (
            "[server]\nallowed_hosts = 'a'",
            "2: $.server.allowed_hosts: expected an array of strings that are not empty, got 'a'",
        ),
        (
            "[agents.a]\nmodel = 'x'\non_disconnect = 'grace:'",
            (
                '3: $.agents.a.on_disconnect: expected "cancel", "continue", "grace" or '
                "\"grace:SECONDS\", got 'grace:'"
            ),
        ),
        (
            "dialects.native.mount = '/x/'",
            (
                '1: $.dialects.native.mount: expected "/" or a path such as "/prefix", without a '
                "slash at its end, got '/x/'"
            ),
        ),
    ],
)
def test_a_refusal_says_where_and_what(refusal, text, expected):
    """Line, key, what was expected, what came; a guess where a name is nearly right."""
    assert expected == refusal(text)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SERVER__PORT", "80a", "expected a whole number from 0 to 65535, got '80a'"),
        ("SERVER__PORT", "", "expected a whole number from 0 to 65535, got ''"),
        ("SERVER__PORT", "true", "expected a whole number from 0 to 65535, got 'true'"),
        ("LIMITS__GRACE", "nan", "expected a number of seconds from 0 to 1e9, got 'nan'"),
        ("SERVER__LOG", "\udcff", 'expected "console" or "json", got \'\\udcff\''),
        ("SERVER__PROT", "1", "unknown; did you mean 'AGENTSSE_SERVER__PORT'?"),
        (
            "PROVIDERS__LOCAL__KEY",
            "hunter2",
            (
                "unknown; expected AGENTSSE_SERVER__KEY or AGENTSSE_LIMITS__KEY: only these "
                "sections are read from here"
            ),
        ),
    ],
)
def test_a_variable_is_refused_by_its_name(name, value, expected):
    """What stands in the environment is as strict as the file, bytes that are no text included."""
    with pytest.raises(ConfigError) as caught:
        load(None, {f"AGENTSSE_{name}": value})

    assert f"AGENTSSE_{name}: {expected}" == caught.value.message


def test_all_problems_are_told_at_once(refusal):
    """One line each: the file's in the order of its lines, then variables, then options."""
    message = refusal(
        "[agents.a]\n[sever]\n[server]\nport = true\ndrain = -1\n",
        {"AGENTSSE_LIMITS__GRACE": "x"},
        max_body="x",
    )

    assert [
        "1: $.agents.a: expected the key 'model' (a string that is not empty), got none",
        "2: $.sever: unknown; did you mean 'server'?",
        "4: $.server.port: expected a whole number from 0 to 65535, got true",
        "5: $.server.drain: expected a number of seconds from 0 to 1e9, got -1",
        "AGENTSSE_LIMITS__GRACE: expected a number of seconds from 0 to 1e9, got 'x'",
        "--max-body: expected a whole number of bytes, above 0, got 'x'",
    ] == message.splitlines()


@pytest.mark.parametrize("key", ["key", "api_key", "token", "API-KEY", "client_secret"])
def test_a_secret_in_the_file_is_refused(refusal, key):
    """Where a key is found stands in the file, never the key; the message points the way."""
    message = refusal(f'[providers.x]\nkind = "x"\n{key} = "canary-4711"')

    assert (
        f"3: $.providers.x.{key}: a secret has no place in this file; use "
        'key_env = "NAME" (an environment variable) or key_file = "PATH"'
    ) == message


@pytest.mark.parametrize(
    "text",
    [
        '[providers.x]\nkind = "x"\nkey_env = "canary-4711"',
        '[providers.x]\nkind = "x"\nbase_url = "http://u:canary-4711@host/"',
        '[providers.x]\nkind = "x"\nbase_url = "http://host/?key=canary-4711"',
        '[providers.x]\nkind = "x"\nkey_file = ["canary-4711"]',
        "[providers]\nx = 'canary-4711'",
        "providers = 'canary-4711'",
        '[agents]\napi_key = "canary-4711"',
        '[server]\ntoken = "canary-4711"',
        'port = "canary-4711"',
        '[server]\nport = "Bearer canary-4711"',
    ],
)
def test_what_may_be_a_secret_is_not_repeated(refusal, text):
    """A credential in a wrong place does not travel on, into a terminal or a log."""
    assert "canary" not in refusal(text)


@pytest.mark.parametrize(
    ("url", "is_fit"),
    [
        ("https://api.example.com", True),
        ("http://127.0.0.1:8081/v1", True),
        ("http://[::1]:8081/openai/v1/", True),
        ("http://my_box.local/a%20b/@c", True),
        ("ftp://host/", False),
        ("//host/v1", False),
        ("http:///v1", False),
        ("http://host:/v1", False),
        ("http://host:123456/v1", False),
        ("http://[::1/v1", False),
        ("http://h\u00f6st/v1", False),
        ("http://host/\u00e4", False),
        ("http://host/a b", False),
        ("http://host/v1#a", False),
    ],
)
def test_an_address_is_one_that_can_be_asked(tmp_path, url, is_fit):
    """What no request could be sent to is refused by `check` already."""
    path = tmp_path / "agentsse.toml"
    path.write_text(f'[providers.x]\nkind = "x"\nbase_url = "{url}"', encoding="utf-8")
    if is_fit:
        assert url == load(path, {}).providers["x"].base_url
    else:
        with pytest.raises(ConfigError, match="expected an http or https URL in ASCII"):
            load(path, {})


def test_a_provider_has_its_key_in_one_place(refusal):
    """Two places would leave open which one counts."""
    message = refusal('[providers.x]\nkind = "x"\nkey_env = "A"\nkey_file = "b"')

    assert (
        '1: $.providers.x: expected one of key_env = "NAME" (an environment variable) or '
        'key_file = "PATH", got both'
    ) == message


def test_an_option_that_does_not_exist_is_a_mistake_of_the_caller():
    """Options are names in our own code, so this is no ConfigError."""
    with pytest.raises(KeyError, match="prot"):
        load(None, {}, prot=1)


# --- files


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    """Missing, a folder, or closed to us: the message has the path and the system's word for it."""
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    for path, reason in [
        (tmp_path / "none.toml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (loop, "Too many levels of symbolic links"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        expected = f"{path}: expected a TOML file that can be read, got: {reason}"

        assert expected == caught.value.message


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    """The message names the line and the byte."""
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# one\n# caf\xe9\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})

    assert (
        f"{path}:2: expected UTF-8, got byte 0xe9; save the file as UTF-8" == caught.value.message
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[server]\nport = \n", r"Invalid value \(at line 2, column 8\)"),
        ("a = " + "1" * 5000, r"Exceeds the limit"),
        ("a = " + "[" * 100_000, r"\w+"),
    ],
)
def test_a_file_that_is_not_toml_is_refused(write, text, reason):
    """Line and column where tomllib knows them; never a traceback."""
    path = write(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: expected TOML, got: {reason}"):
        load(path, {})


def test_a_line_is_found_behind_every_form_of_toml():
    """Comments, dotted and quoted keys, inline tables, and strings that look like settings."""
    text = """\
# [server]
[server] # here
port = 1

a.b = { c = { d = 1 } }
[agents."x.y"]
instructions = '''
[server]
port = 2
'''
tools = [
  "[server]", # port = 3
]

  [ agents . z ]
'qu oted' = 1
[[list]]
k = 1
[[list]]
k = 2
"""

    assert {
        ("server",): 2,
        ("server", "port"): 3,
        ("server", "a"): 5,
        ("server", "a", "b"): 5,
        ("server", "a", "b", "c"): 5,
        ("server", "a", "b", "c", "d"): 5,
        ("agents",): 6,
        ("agents", "x.y"): 6,
        ("agents", "x.y", "instructions"): 7,
        ("agents", "x.y", "tools"): 11,
        ("agents", "z"): 15,
        ("agents", "z", "qu oted"): 16,
        ("list",): 17,
        ("list", "k"): 18,
    } == config._lines(text)


@bounds(deadline=None)  # the machine may be busy
@given(
    strategies.permutations(
        [
            "[a]\nx = 1\n",
            "[a.b]\ny.z = [1,\n  2]\n",
            "[[c]]\nx = 1\n",
            "[d.'e f']\ns = '''\n[a]\n'''\n",
            '[g]\ns = """\\\n  x = 1\n  """\n',
            "[h]\nt = { u = { v = 1 }, w = '#' } # end\r\n",
            "# [z]\n\n",
        ]
    )
)
def test_every_key_has_a_line(blocks):
    """In whatever order a file is written, no key that it has is without its place."""
    text = "".join(blocks)
    found = config._lines(text)

    assert set(config._paths(tomllib.loads(text))) <= found.keys()
    for keys, line in found.items():
        assert keys[-1].split()[0] in text.split("\n")[line - 1]


def test_a_very_deep_key_is_refused_like_any_other(refusal):
    """Depth is no way to bring down the message itself."""
    assert refusal("deep" + ".a" * 3000 + " = 1").startswith("1: $.deep: unknown")


# --- objects by name


def test_a_file_is_a_module(author):
    """A file alone names its module, with a colon an attribute of it; it runs only once."""
    path = author("cfg_agents.py", "import cfg_sibling\nanswer = object()\n")
    author("cfg_sibling.py", "")
    before = list(sys.path)
    module = load_object("cfg_agents.py", what="agents")

    assert isinstance(module, ModuleType)
    assert ("cfg_agents", str(path)) == (module.__name__, module.__file__)
    assert module.answer is load_object(f"{path}:answer", what="agent")
    assert module.answer is load_object("cfg_agents:answer", what="agent")
    assert before == sys.path


def test_a_file_may_stand_in_another_folder(author):
    """Its siblings are found, wherever the server was started; hyphens in its name are no harm."""
    author("elsewhere/cfg-far.py", "from cfg_near import answer\n")
    author("elsewhere/cfg_near.py", "answer = 42\n")

    assert 42 == load_object("elsewhere/cfg-far.py:answer", what="agent")


def test_a_module_in_a_package_is_found(author):
    """From the working directory, as Python itself would do it, or as installed."""
    author("cfg_package/__init__.py", "")
    author("cfg_package/inner.py", "answer = 42\n")

    assert 42 == load_object("cfg_package.inner:answer", what="tool")
    assert load is load_object("agentsse.config:load", what="tool")


@pytest.mark.parametrize(
    "reference",
    ["", "agents", "a.b", ":x", "a:", "a.py:", "a:b:c", ".a:b", "a b:c", "a/b:c", "a\0.py"],
)
def test_a_reference_of_another_form_is_refused(reference):
    """The message shows the three forms there are."""
    assert (
        f'tool {reference!r}: expected "package.module:attribute", "file.py" or "file.py:attribute"'
    ) == unimportable(reference).message


def test_a_file_that_is_not_there_is_refused(author, tmp_path):
    """The message has the whole path: the working directory may not be the expected one."""
    author("cfg_folder.py/x", "")

    assert (
        f"tool 'cfg_none.py:x': expected a Python file at {tmp_path / 'cfg_none.py'}, got nothing; "
        "check the path"
    ) == unimportable("cfg_none.py:x").message
    assert "got a folder" in unimportable("cfg_folder.py").message


@pytest.mark.parametrize("name", ["queue.py", "my.agents.py"])
def test_a_file_name_that_can_be_no_module_is_refused(author, name):
    """A file that shadows the standard library would break whoever imports that next."""
    author(name, "")

    assert (
        f"tool '{name}': expected a file name without dots that Python itself does not use for a "
        f"module, got '{name}'; rename the file"
    ) == unimportable(name).message


def test_a_file_name_that_is_taken_is_refused(author, monkeypatch):
    """Nobody gets an object out of another module of the same name."""
    path = author("attrs.py", "frozen = 1\n")
    author("cfg_bare.py", "")
    monkeypatch.setitem(sys.modules, "cfg_bare", ModuleType("cfg_bare"))

    assert (
        f"tool 'attrs.py:frozen': expected the module 'attrs' to be {path}, but that name is taken "
        f"by {attrs.__file__}; rename the file"
    ) == unimportable("attrs.py:frozen").message
    assert "taken by a module without a file" in unimportable("cfg_bare.py").message


def test_a_module_that_is_not_there_is_refused(author):
    """Also where only a part of its name is missing."""
    author("cfg_half/__init__.py", "")

    assert (
        "tool 'cfg_none.x:y': no module 'cfg_none'; expected it to be installed, or in the "
        "working directory"
    ) == unimportable("cfg_none.x:y").message
    assert "no module 'cfg_half.x';" in unimportable("cfg_half.x:y").message


def test_an_attribute_that_is_not_there_is_refused(author):
    """With a guess where a public name is near."""
    author("cfg_names.py", "lookup = _private = 1\n")

    assert (
        "tool 'cfg_names:lokup': no 'lokup' in cfg_names; did you mean 'lookup'?"
        == unimportable("cfg_names:lokup").message
    )
    assert (
        "tool 'cfg_names.py:privat': no 'privat' in cfg_names"
        == unimportable("cfg_names.py:privat").message
    )


@pytest.mark.parametrize(
    ("text", "cause", "line", "sentence"),
    [
        ("\nraise ValueError('a\\nb')", ValueError, 2, "a b"),
        ("import json\n\njson.loads('x')", ValueError, 3, "Expecting value"),
        ("import sys\nsys.exit(3)", SystemExit, 2, "3"),
        ("import cfg_absent", ModuleNotFoundError, 1, "No module named 'cfg_absent'"),
        ("x = 1\nif x\n", SyntaxError, 2, "expected ':'"),
        ("def f():\n  1 / 0\n\nf()", ZeroDivisionError, 2, "division by zero"),
        ("raise ValueError('token=canary-4711')", ValueError, 1, "token=[redacted]"),
    ],
)
def test_an_exception_while_importing_is_shown_where_it_arose(author, text, cause, line, sentence):
    """The author's own file and line, not those of the library it went into; the cause is kept."""
    before = list(sys.path)
    path = author("cfg_broken.py", text)
    error = unimportable("cfg_broken:x")

    assert isinstance(error.__cause__, cause)
    assert error.message.startswith(
        f"tool 'cfg_broken:x': {type(error.__cause__).__name__} while importing 'cfg_broken', "
        f"at {path}:{line}: {sentence}"
    )
    assert "\n" not in error.message
    assert before == sys.path


@pytest.mark.skipif(sys.platform == "win32", reason="there this module can be imported")
def test_an_exception_in_installed_code_is_shown_there(author):
    """Where no line is the author's own, the last one has to do."""
    message = unimportable("multiprocessing.popen_spawn_win32:x").message

    assert re.search(r"at \S+popen_spawn_win32\.py:\d+: No module named 'msvcrt'", message)


def test_an_interrupt_while_importing_is_no_error_of_the_author(author):
    """Control-C ends the program, whoever's code is running."""
    author("cfg_slow.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_object("cfg_slow:x", what="tool")


def test_a_module_may_put_the_path_in_order_itself(author):
    """What it removed from sys.path is not missed."""
    author("cfg_tidy.py", "import sys\nsys.path.pop(0)\n")
    before = [entry for entry in sys.path if entry]
    load_object("cfg_tidy:sys", what="tool")

    assert before == [entry for entry in sys.path if entry]
