"""The document at `/openapi.json`, held against the server that it describes.

Rules: a real server on a free port, in a process of its own, and clients that know nothing but the
document: each finds in it what may be asked and what is answered. Whatever a schema cannot say of a
body stands in `SENSE`.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from functools import cache, partial
from subprocess import DEVNULL, PIPE, Popen
from typing import Annotated, Any, Literal, Self

import attrs
import httpx2
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from msgspec import Meta

from agentsse.dialects import (
    Doc,
    Reply,
    Request,
    Route,
    Show,
    Start,
    read_body,
)
from agentsse.dialects.native import NATIVE
from agentsse.errors import AgentsseError
from agentsse.events import AnyEvent
from agentsse.openapi import make_document
from agentsse.paths import OWN, claim_paths
from agentsse.server import DIALECTS as SHIPPED

PATIENCE = 30.0  # seconds until a test that hangs has failed
METHODS = ("get", "post", "put", "delete")
SHAPE = (400, 422)  # statuses of what cannot be understood

DIALECTS = tuple(dialect.load() for dialect in SHIPPED)
PREFIX = {"response_id": "resp_"}  # of ids, by the name of their place

Json = dict[str, Any]


@cache
def document() -> Json:
    """The document of all dialects."""
    found: Json = json.loads(make_document(claim_paths(DIALECTS), version="1.2.3"))
    return found


@attrs.frozen
class Operation:
    """What the document says of one method of one path."""

    method: str
    path: str
    says: Json = attrs.field(repr=False)

    @property
    def id(self) -> str:
        """Its name."""
        return str(self.says["operationId"])

    @property
    def tag(self) -> str:
        """Its dialect."""
        return str(self.says["tags"][0])

    @property
    def body(self) -> Json | None:
        """The schema of what is sent; None where nothing is."""
        if "requestBody" not in self.says:
            return None
        schema: Json = self.says["requestBody"]["content"]["application/json"]["schema"]
        return schema

    @property
    def example(self) -> Any:
        """The body that the document shows."""
        return self.says["requestBody"]["content"]["application/json"]["example"]

    def parameters(self, place: str) -> list[Json]:
        """Those in the path, in the query or in the headers."""
        return [each for each in self.says.get("parameters", ()) if each["in"] == place]


def operations(described: Json) -> list[Operation]:
    return [
        Operation(method, path, item[method])
        for path, item in described["paths"].items()
        for method in METHODS
        if method in item
    ]


ALL = operations(document())
WITH_BODY = [each for each in ALL if each.body is not None]


def by_id(operation: Operation) -> str:
    return operation.id


# Schemas ------------------------------------------------------------------------------------------


def resolved(schema: Json) -> Json:
    """What a schema refers to, if it does."""
    name = schema.get("$ref")
    if name is None:
        return schema
    found: Json = document()
    for step in name.removeprefix("#/").split("/"):
        found = found[step]
    return found


def faults(schema: Json, value: Any, *, strict: bool = False, where: str = "$") -> list[str]:
    """Say why a value does not fit; with `strict`, fields that nobody speaks of are faults too.

    It knows the keywords that there are in the document, and raises where there are others.
    """
    schema = resolved(schema)
    assert schema.keys() <= {
        "title", "description", "default", "examples", "discriminator",
        "type", "enum", "anyOf", "properties", "required", "additionalProperties", "items",
        "minimum", "maximum", "exclusiveMaximum", "minLength", "maxLength", "pattern",
        "minItems", "maxItems",
    }, schema  # fmt: skip
    if "anyOf" in schema:
        each = [faults(choice, value, strict=strict, where=where) for choice in schema["anyOf"]]
        return [] if [] in each else [fault for found in each for fault in found]
    if "enum" in schema and not any(same(value, choice) for choice in schema["enum"]):
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    if "type" in schema and not TYPES[schema["type"]](value):
        return [f"{where}: {value!r} is no {schema['type']}"]
    inner = partial(faults, strict=strict)
    match value:
        case str():
            return list(string_faults(schema, value, where))
        case dict():
            return list(object_faults(schema, value, where, inner, strict=strict))
        case list():
            found = [] if len(value) >= schema.get("minItems", 0) else [f"{where}: too short"]
            found += [] if len(value) <= schema.get("maxItems", len(value)) else [f"{where}: long"]
            for place, item in enumerate(value):
                found += inner(schema.get("items", {}), item, where=f"{where}[{place}]")
            return found
        case int() | float():
            least, most = schema.get("minimum", value), schema.get("maximum", value)
            is_within = least <= value <= most and value < schema.get("exclusiveMaximum", math.inf)
            return [] if is_within else [f"{where}: {value} is out of bounds"]
        case _:
            return []


def same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def as_python(pattern: str) -> str:
    """In JSON Schema `$` is the end, and not what comes before a last line feed as well."""
    return re.sub(r"(?<!\\)\$", r"\\Z", pattern)


def string_faults(schema: Json, value: str, where: str) -> Iterator[str]:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{where}: {len(value)} characters"
    if not re.search(as_python(schema.get("pattern", "")), value):
        yield f"{where}: {value!r} does not match {schema['pattern']}"


def object_faults(
    schema: Json, value: Json, where: str, inner: Callable[..., list[str]], *, strict: bool
) -> Iterator[str]:
    fields, more = schema.get("properties", {}), schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where}: {name} is missing"
    for name, item in value.items():
        if name in fields or isinstance(more, dict):
            yield from inner(fields.get(name, more), item, where=f"{where}.{name}")
        elif more is False or (strict and fields):
            yield f"{where}: {name} is not known"


TEXT = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def fitting(schema: Json) -> st.SearchStrategy[Any]:
    """All that fits a schema."""
    schema = resolved(schema)
    match schema:
        case {"anyOf": choices}:
            return st.one_of([fitting(choice) for choice in choices])
        case {"enum": choices}:
            return st.sampled_from(choices)
        case {"type": "object", "properties": fields}:
            needed = set(schema.get("required", ()))
            made = {name: fitting(each) for name, each in fields.items()}
            return st.fixed_dictionaries(
                {name: each for name, each in made.items() if name in needed},
                optional={name: each for name, each in made.items() if name not in needed},
            )
        case {"type": "object"}:
            return st.dictionaries(
                TEXT, fitting(schema.get("additionalProperties", {})), max_size=3
            )
        case {"type": "array"}:
            least, most = schema.get("minItems", 0), schema.get("maxItems", 3)
            return st.lists(fitting(schema["items"]), min_size=least, max_size=most)
        case {"type": "string", "pattern": pattern} if pattern != r"\S":
            made = st.from_regex(as_python(pattern)).filter(str.isprintable)
            return made.filter(lambda text: not faults(schema, text))
        case {"type": "string"}:
            return TEXT.filter(lambda text: not faults(schema, text))
        case {"type": "integer"}:
            most = schema.get("maximum", schema.get("exclusiveMaximum", 2**53 + 1) - 1)
            return st.integers(schema.get("minimum", -(2**53)), most)
        case {"type": "number"}:
            least, most = schema.get("minimum"), schema.get("maximum")
            return st.floats(least, most, allow_nan=False, allow_infinity=False)
        case {"type": "boolean"}:
            return st.booleans()
        case {"type": "null"}:
            return st.none()
        case _:
            return ANYTHING


# A server, and what there is in it ----------------------------------------------------------------

AGENTS = """
import trio
from agentsse import RunContext, agent

@agent
async def echo(run: RunContext, input):
    "Say it again."
    await trio.lowlevel.checkpoint()
    return input

@agent
async def asker(run: RunContext, input):
    "Ask, and wait for the answer."
    return await run.ask("Well?")
"""


@attrs.define
class Client:
    """Somebody who has read the document, and knows some ids."""

    http: httpx2.Client
    made: int = 0
    _known: dict[str, str] = attrs.field(factory=dict)

    def known(self) -> dict[str, str]:
        """What is there for those who change nothing."""
        if not self._known:
            self._known = self.make()
        return self._known

    @contextmanager
    def places_for(self, operation: Operation) -> Iterator[dict[str, str]]:
        """What is there, for somebody who may change it."""
        if operation.method == "get":
            yield self.known()
        else:
            with self.places() as places:
                yield places

    @contextmanager
    def places(self) -> Iterator[dict[str, str]]:
        """A run that waits for an answer, in a thread with a trigger; afterwards it is gone."""
        made = self.make()
        try:
            yield made
        finally:
            self.http.request("DELETE", f"/threads/{made['thread_id']}")

    def make(self) -> dict[str, str]:
        """Make a run and a thread, and name them in all the ways there are."""
        self.made += 1
        thread = f"{self.made:032x}"
        self.must("POST", "/threads", {"id": thread})
        trigger = {"every_s": 3600, "text": "wake up"}
        self.must("PUT", f"/threads/{thread}/triggers/timer", trigger)
        start = {"background": True, "thread_id": thread}
        run = self.must("POST", "/agents/asker/runs", start)["id"]
        with self.http.stream("GET", f"/runs/{run}/events?types=input_requested") as stream:
            data = next(line for line in stream.iter_lines() if line.startswith("data: "))
        asked = json.loads(data.removeprefix("data: "))
        return {
            "agent": "echo",
            "module": "any",
            "event": "echo",
            "model": "echo",
            "assistant_id": "echo",
            "response_id": PREFIX["response_id"] + run,
            "run_id": run,
            "worker_id": run,
            "thread_id": thread,
            "session_id": thread,
            "trigger_id": "timer",
            "question_id": asked["request_id"],
            "asked": asked["questions"][0]["id"],
        }

    def must(self, method: str, path: str, body: Any) -> Any:
        """Ask for what is sure to be there."""
        answer = self.http.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def ask(
        self,
        operation: Operation,
        places: Mapping[str, str],
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        **headers: str,
    ) -> "Answer":
        """Send a request, and read the answer unless it is a stream."""
        path = re.sub(r"{(\w+)}", lambda found: places[found[1]], operation.path)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.http.stream(
            operation.method.upper(),
            path,
            content=b"" if operation.body is None else content,
            params=dict(query or {}),
            headers=headers,
        ) as response:
            kind = response.headers.get("content-type", "").partition(";")[0]
            text = "" if kind == "text/event-stream" else response.read().decode()
            return Answer(response.status_code, kind, text, dict(response.headers))


@attrs.frozen
class Answer:
    """What the server has said."""

    status: int
    kind: str
    text: str
    headers: Mapping[str, str]


def assert_documented(answer: Answer, operation: Operation) -> None:
    """See that the document speaks of the answer, and says the truth."""
    known = operation.says["responses"]
    told = resolved(known.get(str(answer.status), known.get("default", {})))
    assert str(answer.status) in known or answer.status >= 400, answer
    content = told.get("content", {})
    if not content:
        assert "" == answer.text, answer
        return
    assert answer.kind in content, answer
    if "json" in answer.kind:
        schema, value = content[answer.kind].get("schema", {}), json.loads(answer.text)
        assert [] == faults(schema, value, strict=answer.status < 400), answer


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server in a process of its own, and a client."""
    agents = tmp_path_factory.mktemp("agents") / "agents.py"
    agents.write_text(AGENTS)
    command = [sys.executable, "-m", "agentsse", "serve", str(agents), "--port", "0"]
    with Popen([*command, "--drain", "0.1"], stdout=PIPE, stderr=DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            with httpx2.Client(base_url=url, timeout=PATIENCE) as http:
                yield Client(http)
        finally:
            process.terminate()


# The document -------------------------------------------------------------------------------------


def test_the_document_names_itself():
    """It is OpenAPI 3.1, of this version, and its paths are where it was found."""
    described = document()
    assert described["openapi"].startswith("3.1.")
    assert described["info"]["title"] == "agentsse"
    assert described["info"]["version"] == "1.2.3"
    assert described["servers"] == [{"url": "/"}]


def test_the_server_shows_the_document(client):
    """What is served describes the dialects as they are mounted."""
    answer = client.http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    served = answer.json()
    served["info"]["version"] = "1.2.3"
    assert document() == served


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_route_has_a_doc(dialect):
    """A route of which nobody is told is a mistake, in every form of a dialect."""
    for form in (dialect, *dialect.forms.values()):
        assert [] == [route.path for route in form.routes if route.doc is None]
        make_document(claim_paths([form]), version="1")


def test_every_path_of_the_server_is_described():
    """What the router knows and what the document says are the same."""
    routed = {
        (route.method.lower(), re.sub(r"<(\w+)>", r"{\1}", path))
        for path, _, route in claim_paths(DIALECTS)
    }
    assert routed | {("get", path) for path in OWN} == {(each.method, each.path) for each in ALL}


def test_names_are_fit_for_code():
    """Operations have names of their own, and nothing is called what no generator can write."""
    names = [each.id for each in ALL]
    assert len(set(names)) == len(names)
    for name in (*names, *document()["components"]["schemas"]):
        assert re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name)


def test_every_tag_is_explained():
    """Each dialect's routes are together, under what its file says of it."""
    tags = {tag["name"]: tag["description"] for tag in document()["tags"]}
    assert set(tags) == {each.tag for each in ALL} == {d.name for d in DIALECTS} | {"server"}
    assert tags["native"].startswith("Our own protocol")
    assert all(tags.values())


def test_references_lead_somewhere():
    """Every `$ref` is to something that is there."""

    def look(value: Any) -> None:
        match value:
            case dict():
                if "$ref" in value:
                    resolved(value)
                for each in value.values():
                    look(each)
            case list():
                for each in value:
                    look(each)
            case _:
                pass

    look(document())


@pytest.mark.parametrize("operation", ALL, ids=by_id)
def test_places_in_the_path_are_parameters(operation):
    """What stands in braces is described, and nothing else is said to be in the path."""
    names = re.findall(r"{(\w+)}", operation.path)
    assert names == [each["name"] for each in operation.parameters("path")]


@pytest.mark.parametrize("operation", WITH_BODY, ids=by_id)
def test_an_example_fits_its_schema(operation):
    """Whoever sends the example has sent what the schema wants."""
    assert [] == faults(operation.body, operation.example)


class Query(dict[str, str]):
    """A query that notes what is looked for."""

    def __init__(self, looked: set[str], fields: Mapping[str, str]) -> None:
        super().__init__(fields)
        self.looked = looked

    def get(self, name: str, default: Any = None) -> Any:
        """Note it, and hand it out if it is there."""
        self.looked.add(name)
        return super().get(name, default)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The fields one by one."""
        return tuple((Name(self.looked, name), value) for name, value in self.items())


class Name(str):
    """The name of a field, which notes what it is compared with."""

    __slots__ = ("looked",)
    __hash__ = str.__hash__
    looked: set[str]

    def __new__(cls, looked: set[str], text: str) -> Self:
        """Note it there."""
        made = super().__new__(cls, text)
        made.looked = looked
        return made

    def __eq__(self, other: object) -> bool:
        self.looked.add(str(other))
        return super().__eq__(other)


@pytest.mark.parametrize(
    ("path", "dialect", "route"),
    [pytest.param(*each, id=f"{each[2].method} {each[0]}") for each in claim_paths(DIALECTS)],
)
def test_a_query_is_described_as_it_is_read(path, dialect, route):
    """The fields of the query that a decoder looks for are those that the document names."""
    template = re.sub(r"<(\w+)>", r"{\1}", path)
    (operation,) = [o for o in ALL if (o.method, o.path) == (route.method.lower(), template)]
    places = {name: f"{PREFIX.get(name, '')}{1:032x}" for name in re.findall(r"<(\w+)>", path)}
    body = b"" if operation.body is None else json.dumps(operation.example).encode()
    described = {each["name"] for each in operation.parameters("query")}
    looked: set[str] = set()
    alone = ({name: "true"} for name in described)
    for fields in ({}, *alone, dict.fromkeys(described, "true")):  # some count beside others only
        with suppress(AgentsseError):
            query = Query(looked, fields)
            route.decode(Request(route.method, places, query, {}, body, query.pairs))
    assert described == looked


# The server ---------------------------------------------------------------------------------------


def has_one_source(body: Json) -> bool:
    """Whether a pipeline says what it is, and does not say it twice."""
    sources = [bool(body.get(name)) for name in ("dot_source", "dot_source_path")]
    return sum(sources) < 2 and any([*sources, body.get("workflow"), body.get("package_path")])


def has_answer(body: Json) -> bool:
    """Whether one of the fields is there."""
    return any(value is not None for value in body.values())


def names_whole_model(body: Json) -> bool:
    """Whether provider and model are there together, or neither is."""
    return bool(body.get("provider")) == bool(body.get("model"))


def never(_body: Json) -> bool:
    """It depends on what is there, or on more than a few words can tell."""
    return False


# What no schema can say: whether a body that fits makes sense.
SENSE: dict[str, Callable[[Any], bool]] = {
    "post_run_input": never,
    "post_kilroy_runs": has_one_source,
    "post_pipelines": has_one_source,
    "post_kilroy_run_question_answer": has_answer,
    "post_pipelines_run_question_answer": has_answer,
    "post_v1_query": names_whole_model,
    "post_v1_streaming_query": names_whole_model,
    "post_api_session_replay": never,
}
# They bring whole conversations, and much can be wrong with one that no schema can say.
CONVERSATIONS = {"agui", "langgraph", "openai_chat", "openai_responses", "vercel"}


def body_that_fits(operation: Operation, places: Mapping[str, str]) -> Any:
    """The example, about what there is."""
    match operation.id, operation.example:
        case "post_run_input", example:
            return {**example, "answers": {places["asked"]: "yes"}}
        case "post_api_session_stop", example:
            return {**example, "execution_id": places["run_id"]}
        case "post_v1_streaming_query_interrupt", example:
            return {**example, "request_id": places["run_id"]}
        case "post_kilroy_runs" | "post_pipelines", _:
            return {"workflow": "echo"}
        case name, example if name.startswith("post_langgraph_thread_runs"):
            return {**example, "assistant_id": "asker", "command": {"resume": "yes"}}
        case _, dict() as example:
            named = {name for name in ("model", "assistant_id") if name in example}
            return {**example, **dict.fromkeys(named, "echo")}
        case _, example:
            return example


@pytest.mark.parametrize("operation", ALL, ids=by_id)
def test_what_is_described_is_there(client, operation):
    """A request such as the document shows succeeds, and the answer is what the document says."""
    with client.places_for(operation) as places:
        body = None if operation.body is None else body_that_fits(operation, places)
        if operation.id.endswith("_resume"):
            client.must("POST", f"/runs/{places['run_id']}/pause", {})
        answer = client.ask(operation, places, body=body)
    assert_documented(answer, operation)
    if operation.id == "post_api_session_replay":  # as its summary says
        assert answer.status == 400
    else:
        assert answer.status < 300, answer


@pytest.mark.parametrize("operation", ALL, ids=by_id)
def test_where_the_server_says_it_does_it_streams(client, operation):
    """Whoever accepts a stream only gets one where the document has one, and where it has none."""
    offered = {
        kind for told in operation.says["responses"].values() for kind in told.get("content", ())
    }
    with client.places_for(operation) as places:
        body = None if operation.body is None else body_that_fits(operation, places)
        answer = client.ask(operation, places, body=body, accept="text/event-stream")
    assert_documented(answer, operation)
    assert answer.kind != "text/event-stream" or "text/event-stream" in offered


def query_that_fits(operation: Operation) -> st.SearchStrategy[dict[str, str]]:
    """Some of the fields of a query, written as the document says."""
    fields = {each["name"]: each["schema"] for each in operation.parameters("query")}
    made = {
        name: fitting(schema).map(as_field) for name, schema in fields.items() if name in fields
    }
    return st.fixed_dictionaries({}, optional=made)


def as_field(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def fits_and_is_understood(client: Client, operation: Operation, data: st.DataObject) -> None:
    body = None if operation.body is None else data.draw(fitting(operation.body), "body")
    query = data.draw(query_that_fits(operation), "query")
    assert operation.body is None or [] == faults(operation.body, body)
    with client.places_for(operation) as places:
        answer = client.ask(operation, places, body=body, query=query)
    assert_documented(answer, operation)
    assert answer.status < 500, answer
    is_plain = operation.tag not in CONVERSATIONS and makes_sense(query)
    if is_plain and SENSE.get(operation.id, lambda _body: True)(body):
        assert answer.status not in SHAPE, answer


def makes_sense(query: Mapping[str, str]) -> bool:
    """Whether a query is sure to be about what there is: a place in a stream, a dialect."""
    return not {"after", "dialect"} & set(query)


fuzz = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
thorough = settings(fuzz, max_examples=100)
FUZZED = [each for each in ALL if each.body is not None or each.parameters("query")]


@pytest.mark.parametrize("operation", FUZZED, ids=by_id)
@fuzz
@given(data=st.data())
def test_what_fits_is_understood(client, operation, data):
    """A request that fits the document is no server error, and never refused for its shape."""
    fits_and_is_understood(client, operation, data)


@pytest.mark.slow
@pytest.mark.parametrize("operation", FUZZED, ids=by_id)
@thorough
@given(data=st.data())
def test_what_fits_is_understood_however_odd(client, operation, data):
    """The same, a hundred times each."""
    fits_and_is_understood(client, operation, data)


# Where the server takes more than the document offers: any object is an input.
LENIENT = {"post_agentlang_module_event"}
ODD = (None, True, 0, -1, 1.5, 10**7, "", "x", "/", " ", [], [None], {}, {"x": 1}, "x" * 20_000)


def spoiled(schema: Json) -> st.SearchStrategy[Any]:
    """Bodies that are nearly right: a field is of another kind, is missing, or is not known."""
    schema = resolved(schema)
    fields = schema.get("properties", {})

    def spoil(body: Json, name: str, value: Any, how: str) -> Any:
        match how:
            case "replace":
                return {**body, name: value}
            case "drop":
                return {each: body[each] for each in body if each != name}
            case "add":
                return {**body, "unheard_of": value}
            case _:
                return value

    made = st.builds(
        spoil,
        fitting(schema),
        st.sampled_from(sorted(fields)),
        st.sampled_from(ODD) | ANYTHING,
        st.sampled_from(["replace", "drop", "add", "all"]),
    )
    return made.filter(lambda body: faults(schema, body))


def does_not_fit_and_is_refused(client: Client, operation: Operation, data: st.DataObject) -> None:
    assert operation.body is not None
    body = data.draw(spoiled(operation.body), "body")
    answer = client.ask(operation, client.known(), body=body)
    assert_documented(answer, operation)
    assert 400 <= answer.status < 500, answer


STRICT = [each for each in WITH_BODY if each.id not in LENIENT]


@pytest.mark.parametrize("operation", STRICT, ids=by_id)
@fuzz
@given(data=st.data())
def test_what_does_not_fit_is_refused(client, operation, data):
    """A body that does not fit is the client's error, told in the form that the document has."""
    does_not_fit_and_is_refused(client, operation, data)


@pytest.mark.slow
@pytest.mark.parametrize("operation", STRICT, ids=by_id)
@thorough
@given(data=st.data())
def test_what_does_not_fit_is_refused_however_odd(client, operation, data):
    """The same, a hundred times each."""
    does_not_fit_and_is_refused(client, operation, data)


@pytest.mark.parametrize("body", [b'{"a":1}}', b"\xff"], ids=repr)
@pytest.mark.parametrize("operation", WITH_BODY, ids=by_id)
def test_what_is_no_json_is_refused(client, operation, body):
    """So is a body that is no JSON at all."""
    answer = client.ask(operation, client.known(), body=body)
    assert_documented(answer, operation)
    assert 400 <= answer.status < 500, answer


@pytest.mark.parametrize("name", [dialect.name for dialect in DIALECTS])
def test_who_may_not_speak_is_told_in_the_same_form(client, name):
    """What the server refuses before it looks at the route is documented as well."""
    operation = next(each for each in ALL if each.tag == name)
    answer = client.ask(operation, client.known(), body={}, host="evil.example")
    assert 400 <= answer.status < 500, answer
    assert_documented(answer, operation)


# Types and dialects of all kinds ------------------------------------------------------------------


class _Colour(Enum):
    RED = "red"


class _Inner(msgspec.Struct):
    """Something inside."""

    inner: "list[_Inner] | None" = None


class _Body(msgspec.Struct, rename="camel"):
    """What is sent.

    It goes on.

    Attributes:
        first_name, last_name: Of a person; their order
            is what it is.
        age: In years.
        shoe_size: There is no such field.
    """

    first_name: Annotated[str, Meta(extra_json_schema={"minLength": 1})] = ""
    last_name: str = "Doe"
    age: int = 7
    height: Annotated[float, Meta(ge=0.5)] = 1.7
    is_here: bool = True
    things: list[Any] = msgspec.field(default_factory=list)
    colour: _Colour = _Colour.RED
    parents: Annotated[list[_Inner], Meta(min_length=2)] | None = None
    later: str | msgspec.UnsetType = msgspec.UNSET


class _Other(msgspec.Struct, omit_defaults=True):
    name: str
    nick: str = ""


def toy(*routes: Route, **more: Any) -> Json:
    """The document of a dialect that has these routes."""
    dialect = attrs.evolve(NATIVE, name="toy", routes=routes, **more)
    found: Json = json.loads(make_document(claim_paths([dialect]), version="1"))
    return found


def show(request: Request) -> Show:
    """Decode what has a run's id."""
    return Show(run_id=request.parameters.get("run_id", "1"))


def start(request: Request) -> Start:
    """Decode what needs somebody to run."""
    read_body(request, _Body, what="try")
    return Start(agent="echo", input=None, delivery="stream")


def test_a_struct_is_described_by_its_docstring():
    """The first part is of the type, the attributes are of its fields."""
    described = toy(Route("POST", "/x", start, doc=Doc(summary="Try.", body=_Body)))
    schema = described["components"]["schemas"]["Body"]
    assert schema["description"] == "What is sent.\n\nIt goes on."
    fields = schema["properties"]
    assert "Of a person; their order is what it is." == fields["firstName"]["description"]
    assert fields["firstName"]["description"] == fields["lastName"]["description"]
    assert "In years." == fields["age"]["description"]
    assert "description" not in fields["isHere"]
    assert described["paths"]["/x"]["post"]["summary"] == "Try"


def test_a_default_that_its_own_schema_refuses_is_none():
    """It is there so that what is missing is asked for in words of one's own."""
    described = toy(Route("POST", "/x", start, doc=Doc(summary="Try", body=_Body)))
    schema = described["components"]["schemas"]["Body"]
    assert ["firstName"] == schema["required"]
    assert "default" not in schema["properties"]["firstName"]
    assert "Doe" == schema["properties"]["lastName"]["default"]
    assert described["paths"]["/x"]["post"]["requestBody"]["required"] is True


def test_what_the_server_writes_has_all_its_fields():
    """But for those that are left out while they have nothing to say."""
    doc = Doc(
        summary="Show", answers={200: (_Body, _Other), 201: (list, "application/xml"), 204: ()}
    )
    described = toy(Route("GET", "/x", show, doc=doc))
    answers = described["paths"]["/x"]["get"]["responses"]
    names = ["Body", "Other"]
    assert {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]} == (
        answers["200"]["content"]["application/json"]["schema"]
    )
    assert {"type": "array", "items": {}} == answers["201"]["content"]["application/json"]["schema"]
    assert {"type": "string"} == answers["201"]["content"]["application/xml"]["schema"]
    assert "content" not in answers["204"]
    schemas = described["components"]["schemas"]
    assert "later" not in schemas["Body"]["required"]
    assert len(schemas["Body"]["properties"]) - 1 == len(schemas["Body"]["required"])
    assert ["name"] == schemas["Other"]["required"]


def test_what_is_sent_as_well_as_answered_may_be_sent_in_part():
    """A type has one schema: that of a body, wherever it comes first."""
    answers = {200: (_Body,)}
    for routes in (
        [
            Route("GET", "/x", show, doc=Doc(summary="Show", answers=answers)),
            Route("POST", "/x", start, doc=Doc(summary="Try", body=_Body)),
        ],
        [Route("POST", "/x", start, doc=Doc(summary="Try", body=_Body, answers=answers))],
    ):
        described = toy(*routes)
        assert ["firstName"] == described["components"]["schemas"]["Body"]["required"]


@pytest.mark.parametrize(
    ("shape", "example"),
    [
        (_Body, {"firstName": "Hello"}),
        (Annotated[_Body, Meta(examples=[{"firstName": "Ann"}])], {"firstName": "Ann"}),
        (dict, {}),
        (Annotated[list[int], Meta(min_length=2)], [1, 1]),
        (Annotated[float, Meta(ge=0.5)], 0.5),
        (bool, False),
        (_Colour, "red"),
        (Literal["b", "a"], "a"),
        (_Inner | None, {}),
    ],
    ids=str,
)
def test_every_body_has_an_example(shape, example):
    """The least that fits, unless the type has one."""
    described = toy(Route("POST", "/x", show, doc=Doc(summary="Try", body=shape)))
    content = described["paths"]["/x"]["post"]["requestBody"]["content"]["application/json"]
    assert example == content["example"]
    assert "examples" not in content["schema"]


def test_places_have_one_name_in_a_document():
    """Two routes may name a place as they like; the document says it as the first one does."""
    described = toy(
        Route("GET", "/x/<run_id>", show, doc=Doc(summary="Show")),
        Route("DELETE", "/x/<id>", show, doc=Doc(summary="Drop")),
        Route("PUT", "/x/<id>", show),
    )
    assert {"get", "delete"} == set(described["paths"]["/x/{run_id}"])
    assert described["paths"]["/x/{run_id}"]["delete"]["parameters"][0]["name"] == "run_id"


def test_a_query_is_described_by_words_or_by_types():
    """Words are of a string; a list is one field, with commas."""
    query = {
        "name": "Of a person.",
        "age": Annotated[int, Meta(ge=0, description="In years.")],
        "colours": list[_Colour],
    }
    described = toy(Route("GET", "/x", show, doc=Doc(summary="Show", query=query)))
    name, age, colours = described["paths"]["/x"]["get"]["parameters"]
    assert {"type": "string"} == name["schema"]
    assert "Of a person." == name["description"]
    assert {"type": "integer", "minimum": 0} == age["schema"]
    assert "In years." == age["description"]
    assert colours["explode"] is False


@pytest.mark.parametrize(
    ("reply", "content"),
    [
        (
            Reply(b"no", 400, "text/plain; charset=utf-8"),
            {"text/plain", "application/problem+json"},
        ),
        (
            Reply(b'{"no":{"why":"so","code":1,"more":null,"at":["x"]}}', 400),
            {"application/json", "application/problem+json"},
        ),
    ],
)
def test_an_error_is_described_as_the_dialect_words_it(reply, content):
    """And as the server does, where it is the server that has failed."""
    described = toy(
        Route("GET", "/x", show, doc=Doc(summary="Show")), problem=lambda _problem: reply
    )
    error = described["components"]["responses"]["ToyError"]
    assert content == set(error["content"])
    if "application/json" in content:
        schema = described["components"]["schemas"]["ToyError"]["properties"]["no"]
        assert ["why", "code", "more", "at"] == schema["required"]
        assert {"why": {"type": "string"}, "code": {"type": "integer"}, "more": {}, "at": {}} == (
            schema["properties"]
        )


@pytest.mark.parametrize("decode", [show, start])
def test_a_stream_is_shown_even_if_nothing_is_known_of_its_request(decode):
    """Then it is read as somebody reads it who wants nothing in particular."""
    doc = Doc(summary="Show", body=dict, answers={200: ("text/event-stream", dict)})
    described = toy(Route("POST", "/x", decode, doc=doc))
    answer = described["paths"]["/x"]["post"]["responses"]["200"]
    assert ["application/json", "text/event-stream"] == list(answer["content"])
    assert "event: run_finished" in answer["content"]["text/event-stream"]["example"]
    assert answer["description"].endswith("Each `data` is an `AnyEvent`.")


def test_a_framing_is_shown_as_it_is():
    """Frames that are no events of ours are a text of which nothing is said."""

    class Counter:
        def feed(self, _event: AnyEvent) -> tuple[bytes, ...]:
            return (b"data: {}\n\n",)

    doc = Doc(summary="Show", answers={200: ("text/event-stream",)})
    described = toy(Route("GET", "/x", show, doc=doc), encoder=lambda _options: Counter())
    answer = described["paths"]["/x"]["get"]["responses"]["200"]
    assert answer["content"]["text/event-stream"]["example"].endswith("data: {}\n\ndata: {}\n\n")
    assert "AnyEvent" not in answer["description"]


def test_a_header_is_described_where_it_is_looked_for():
    """However a decoder looks."""

    def look(request: Request) -> Show:
        assert not request.headers.get("prefer")
        assert "last-event-id" not in request.headers
        assert {} == dict(request.headers)
        assert 0 == len(request.headers)
        return show(request)

    described = toy(Route("GET", "/x", look, doc=Doc(summary="Show")))
    headers = described["paths"]["/x"]["get"]["parameters"]
    assert [("header", "Last-Event-ID"), ("header", "Prefer")] == [
        (each["in"], each["name"]) for each in headers
    ]
