"""The document at `/openapi.json`: what the routes say of themselves, as OpenAPI 3.1 has it.

Knows: routes with their docs, and how types become JSON schemas. Must never know which dialects
there are, nor what an answer means. What a `Doc` does not say is learnt from the dialect itself:
the form of its errors by letting it word one, the headers that count by letting it decode the least
request that fits, its frames by letting it encode a short run. So little can become untrue here.

What a schema says of a type is the type's docstring, and of its fields the `Attributes:` there.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from inspect import cleandoc
from typing import Annotated, Any, Final

import attrs
import msgspec
from msgspec import NODEFAULT, Meta, Raw
from msgspec.inspect import StructType, type_info

from .dialects import (
    JSON,
    Dialect,
    Doc,
    Intent,
    Reply,
    Request,
    Route,
    Shape,
    Start,
    Watch,
    WatchFeed,
    problem_reply,
)
from .errors import AgentsseError
from .events import (
    AnyEvent,
    PartDelta,
    PartFinished,
    PartStarted,
    Problem,
    Receipt,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
    Usage,
    decode_event,
)
from .sse import Decoder

OPENAPI: Final = "3.1.1"
STREAM: Final = "text/event-stream"
REF: Final = "#/components/schemas/"

OWN: Final[Mapping[str, Doc]] = {
    "/health/live": Doc(summary="See whether the server is there"),
    "/health/ready": Doc(summary="See whether the server takes new runs"),
    "/metrics": Doc(summary="Read the server's counts", answers={200: ("text/plain",)}),
    "/openapi.json": Doc(summary="Read this document"),
}
"""What the server answers by itself, all of it to GET."""

ANSWERS: Final[Mapping[int, str]] = {
    200: "Done.",
    201: "There is something new.",
    202: "Under way; the answer does not wait for the end.",
    204: "There is nothing to show.",
}
HEADERS: Final[Mapping[str, tuple[str, Any]]] = {
    "last-event-id": (
        "Last-Event-ID",
        "The id of the last frame that was read; the stream goes on behind it.",
    ),
    "idempotency-key": (
        "Idempotency-Key",
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=255,
                description="The same request once more finds the run that it has started.",
            ),
        ],
    ),
    "prefer": ("Prefer", "With `respond-async` the run is left to itself."),
}
"""What a decoder may look at, by the name it uses. For Accept OpenAPI has a place of its own."""

PLACES: Final[Mapping[str, str]] = {
    "agent": "The name of an agent, or the `PROVIDER:MODEL` that it runs on.",
    "run_id": "The id of a run.",
    "thread_id": "The id of a thread.",
}
"""What may stand in a path."""

SAMPLE_ID: Final = "0198c0de000070008000000000000001"
_PLACE = re.compile(r"<(\w+)>")
_FIELD = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def make_document(claimed: Iterable[tuple[str, Dialect, Route]], *, version: str) -> bytes:
    """Describe the routes, those of the server itself included.

    Args:
        claimed: The path of each route, as `claim_paths` has found them. One without a doc is left
            out.
        version: Of the package.

    Returns:
        The document, as JSON.
    """
    schemas = Schemas()
    paths: dict[str, dict[str, Any]] = {}
    templates: dict[str, str] = {}
    abouts: dict[str, str] = {}
    errors: dict[str, Any] = {}
    for path, dialect, route in claimed:
        if route.doc is None:
            continue
        # Two routes may differ in how they name a place; in a document they may not.
        template = templates.setdefault(_PLACE.sub("<>", path), _PLACE.sub(r"{\1}", path))
        operation = _describe(template, dialect, route, route.doc, schemas)
        paths.setdefault(template, {})[route.method.lower()] = operation
        abouts.setdefault(dialect.name, _about(route))
        errors.setdefault(_error_name(dialect), _describe_error(dialect, schemas))
    for path, doc in OWN.items():
        responses = {
            status: _describe_answer(status, shapes, schemas)
            for status, shapes in doc.answers.items()
        }
        named = _named("GET", path, doc.summary, "server")
        paths[path] = {"get": {**named, "responses": responses}}
    tags = [{"name": name, "description": about} for name, about in abouts.items()]
    document = {
        "openapi": OPENAPI,
        "info": {
            "title": "agentsse",
            "version": version,
            "summary": "Runs AI agents, and streams what they do.",
            "description": (
                "Each tag is a protocol of its own; all of them show the same runs. What answers "
                "GET answers HEAD too. A request's body is read as JSON, whatever its Content-Type "
                "says."
            ),
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [*tags, {"name": "server", "description": "For those who operate it."}],
        "paths": paths,
        "components": {"schemas": schemas.components, "responses": errors},
    }
    return msgspec.json.encode(document)


# Operations ---------------------------------------------------------------------------------------


def _describe(
    template: str, dialect: Dialect, route: Route, doc: Doc, schemas: "Schemas"
) -> dict[str, Any]:
    body = None if doc.body is None else schemas.add(doc.body)
    example = None
    if body is not None:
        example = schemas.least(body)
        body.pop("examples", None)
    intent, headers = _try(route, example)
    operation = _named(route.method, template, doc.summary, dialect.name)
    offered = {_media_type(shape) for shapes in doc.answers.values() for shape in shapes}
    if "accept" in headers and {STREAM, JSON} <= offered:
        operation["description"] = "The Accept header chooses between the stream and the JSON."
    operation["parameters"] = [
        *_places(template),
        *(_parameter("query", name, about, schemas) for name, about in doc.query.items()),
        *(_parameter("header", *HEADERS[name], schemas) for name in HEADERS if name in headers),
    ]
    if body is not None:
        operation["requestBody"] = {
            "content": {JSON: {"schema": body, "example": example}},
            "required": bool(schemas.resolve(body).get("required")),
        }
    stream = _describe_stream(_frames(dialect, intent), schemas) if STREAM in offered else None
    location = _location(dialect, intent)
    operation["responses"] = {
        status: _describe_answer(status, shapes, schemas, stream=stream, headers=location)
        for status, shapes in doc.answers.items()
    } | {"default": {"$ref": f"#/components/responses/{_error_name(dialect)}"}}
    return operation


def _named(method: str, template: str, summary: str, tag: str) -> dict[str, Any]:
    name = _operation_id(method, template)
    return {"operationId": name, "summary": summary.removesuffix("."), "tags": [tag]}


def _operation_id(method: str, template: str) -> str:
    """A name such as `get_run_events`, from a path such as `/runs/{run_id}/events`."""
    words = [method.lower()]
    for segment in template.strip("/").split("/"):
        word = re.sub(r"\W+", "_", segment.strip("{}")).removesuffix("_id")
        if segment.startswith("{") and words[-1] in (word, f"{word}s"):
            words.pop()  # "runs": it is one of them
        words.append(word)
    return "_".join(words)


def _about(route: Route) -> str:
    """What a dialect's file says of itself first."""
    decode: Any = route.decode
    while isinstance(decode, partial):
        decode = decode.func
    return cleandoc(sys.modules[decode.__module__].__doc__ or "").partition("\n\n")[0]


def _places(template: str) -> list[dict[str, Any]]:
    schema = {"type": "string", "minLength": 1}
    return [
        {"in": "path", "name": name, "required": True, "schema": schema, **_about_place(name)}
        for name in re.findall(r"{(\w+)}", template)
    ]


def _about_place(name: str) -> dict[str, str]:
    return {"description": PLACES[name]} if name in PLACES else {}


def _parameter(place: str, name: str, about: Any, schemas: "Schemas") -> dict[str, Any]:
    """A parameter that may be left out: words alone are about a string."""
    parameter: dict[str, Any] = {"in": place, "name": name}
    if isinstance(about, str):
        return {**parameter, "description": about, "schema": {"type": "string"}}
    schema = parameter["schema"] = schemas.add(about)
    if "description" in schema:
        parameter["description"] = schema.pop("description")
    if schema.get("type") == "array":
        parameter["explode"] = False  # one field, with commas
    return parameter


def _describe_answer(
    status: int,
    shapes: Iterable[Shape],
    schemas: "Schemas",
    *,
    stream: "_Stream | None" = None,
    headers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    types = [schemas.add(each, is_answer=True) for each in shapes if not isinstance(each, str)]
    content: dict[str, Any] = {}
    if types:  # it comes first: there are clients that look at nothing else
        content[JSON] = {"schema": types[0] if len(types) == 1 else {"anyOf": types}}
    about = [ANSWERS.get(status, "")]
    for kind in (_media_type(each) for each in shapes if isinstance(each, str)):
        if kind == STREAM and stream is not None:
            # No schema: some take it for that of the whole, some of a frame, some of its data.
            content[kind] = {"example": stream.frames}
            about.append(stream.about)
        else:
            content[kind] = {"schema": {"type": "string"}}
    answer: dict[str, Any] = {"description": " ".join(about)}
    if headers:
        answer["headers"] = headers
    if content:
        answer["content"] = content
    return answer


def _media_type(shape: Shape) -> str:
    return shape.partition(";")[0].strip() if isinstance(shape, str) else JSON


# What the dialect itself knows --------------------------------------------------------------------


@attrs.define
class _Headers(Mapping[str, str]):
    """No headers at all; notes which ones are looked for."""

    wanted: set[str] = attrs.field(factory=set)

    def __getitem__(self, name: str) -> str:
        self.wanted.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _try(route: Route, body: Any) -> tuple[Intent | None, set[str]]:
    """Decode the least request there is: what it asks for, and the headers that count."""
    headers = _Headers()
    parameters = dict.fromkeys(_PLACE.findall(route.path), SAMPLE_ID)
    data = b"" if body is None else msgspec.json.encode(body)
    try:
        return route.decode(Request(route.method, parameters, {}, headers, data)), headers.wanted
    except AgentsseError:  # it wants what no schema can say
        return None, headers.wanted


def _location(dialect: Dialect, intent: Intent | None) -> dict[str, Any]:
    """Headers that tell where the run is that was started."""
    if not isinstance(intent, Start):
        return {}
    found = dialect.locate(dialect.mount.rstrip("/"), "{run_id}", "{thread_id}", intent.options)
    return {
        name: {"description": f"`{value}`", "schema": {"type": "string"}}
        for name, value in found.items()
    }


_RUN: Any = {"run_id": SAMPLE_ID, "ts": "2026-01-01T00:00:00.000000Z"}
_STEP: Any = {"step_id": "1", "kind": "model", "name": "openai:gpt"}
_PART: Any = {"part_id": "1.1", "kind": "text"}
_USAGE = Usage(input_tokens=8, output_tokens=2)
RUN: Final[tuple[AnyEvent, ...]] = (
    RunStarted(**_RUN, seq=1, agent="assistant", input=Raw(b'"Hi"'), on_disconnect="cancel"),
    StepStarted(**_RUN, seq=2, **_STEP),
    PartStarted(**_RUN, seq=3, **_PART),
    PartDelta(**_RUN, seq=4, **_PART, delta="Hello."),
    PartFinished(**_RUN, seq=5, **_PART, text="Hello."),
    StepFinished(**_RUN, seq=6, **_STEP, usage=_USAGE, finish_reason="stop"),
    RunFinished(
        **_RUN,
        seq=7,
        outcome="success",
        result=Raw(b'"Hello."'),
        usage=_USAGE,
        receipt=Receipt(),
    ),
)
"""A run to show what frames look like."""


def _frames(dialect: Dialect, intent: Intent | None) -> str:
    """A short run, as a request like this would read it."""
    framing, options = dialect.framing, None
    frames: list[bytes] = []
    match intent:
        case WatchFeed():
            assert dialect.feed is not None
            reader = dialect.feed.encoder(intent.options)
            for event in RUN:
                frames += reader.feed(event, str(event.seq))
            return b"".join([framing.prelude, *frames]).decode()
        case Start() | Watch():
            framing, options = intent.framing or framing, intent.options
        case _:
            pass
    encoder = dialect.encoder(options)
    for event in RUN:
        frames += encoder.feed(event)
    return b"".join([framing.prelude, *frames]).decode()


@attrs.frozen
class _Stream:
    """What a stream looks like."""

    frames: str
    about: str


def _describe_stream(frames: str, schemas: "Schemas") -> _Stream:
    about = "The stream in the example is a short run."
    if _are_events(frames):
        about += " Each `data` is an `AnyEvent`."
        union = schemas.add(AnyEvent, is_answer=True)
        schemas.components["AnyEvent"] = {
            "title": "AnyEvent",
            "description": "What happens in a run.",
            **union,
        }
    return _Stream(frames, about)


def _are_events(frames: str) -> bool:
    """Whether the frames hold our events as they are."""
    try:
        return [decode_event(frame.data) for frame in Decoder().feed(frames.encode())] == [*RUN]
    except msgspec.MsgspecError:
        return False


def _error_name(dialect: Dialect) -> str:
    return f"{_prefix(dialect.name)}Error"


def _describe_error(dialect: Dialect, schemas: "Schemas") -> dict[str, Any]:
    """An error as the dialect words it; where the server itself fails, it is a problem."""
    sample = Problem(code="bad_request", message="expected ..., got ...", status=400)
    own, general = dialect.problem(sample), problem_reply(sample)
    content: dict[str, Any] = {}
    for name, reply in ((_error_name(dialect), own), ("ProblemDetails", general)):
        content.setdefault(_media_type(reply.media_type), _shown(name, reply, schemas))
    return {
        "description": (
            "What is wrong, and with a status from 400 to 499 what to do. With 503 and a "
            "Retry-After it is worth another try."
        ),
        "content": content,
    }


def _shown(name: str, reply: Reply, schemas: "Schemas") -> dict[str, Any]:
    """A body by its example."""
    if not reply.media_type.endswith("json"):
        return {"schema": {"type": "string"}, "example": reply.body.decode()}
    example = msgspec.json.decode(reply.body)
    schemas.components[name] = {"title": name, **_like(example)}
    return {"schema": {"$ref": REF + name}, "example": example}


def _like(value: Any) -> dict[str, Any]:
    """The schema of what looks like this value."""
    match value:
        case dict():
            fields = {name: _like(each) for name, each in value.items()}
            return {"type": "object", "properties": fields, "required": list(value)}
        case str():
            return {"type": "string"}
        case int():
            return {"type": "integer"}
        case _:
            return {}


# Schemas ------------------------------------------------------------------------------------------


@attrs.define
class Schemas:
    """The schemas of types, gathered under names that tell whose they are.

    Attributes:
        components: By name; types of a dialect's own have the dialect's name before theirs.
    """

    components: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    def add(self, shape: Any, *, is_answer: bool = False) -> dict[str, Any]:
        """Take in what a type is made of; returns its schema, which refers to the components.

        Args:
            shape: What msgspec can decode.
            is_answer: It is written by us, and so has all the fields that it can have.
        """
        (schema,), found = msgspec.json.schema_components([shape], ref_template=f"{REF}{{name}}")
        classes = {}
        for info in _nested(type_info(shape), set()):
            classes[info.cls.__name__] = info
            classes[f"{info.cls.__module__}.{info.cls.__qualname__}"] = info
        names = {f"{REF}{name}": f"{REF}{_name_of(classes[name].cls)}" for name in found}
        for name, component in found.items():
            own = _name_of(classes[name].cls)
            if own not in self.components or not is_answer:
                told = _told(classes[name], _renamed(component, names), is_answer=is_answer)
                self.components[own] = {**told, "title": own}
        renamed: dict[str, Any] = _renamed(schema, names)
        return renamed

    def resolve(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Look up what a schema refers to, if it does."""
        name = schema.get("$ref")
        return schema if name is None else self.components[name.removeprefix(REF)]

    def least(self, schema: Mapping[str, Any]) -> Any:
        """Make the smallest value that fits a schema."""
        match schema:
            case {"examples": [first, *_]} | {"enum": [first, *_]}:
                return first
            case {"$ref": _}:
                return self.least(self.resolve(schema))
            case {"anyOf": [first, *_]}:
                return self.least(first)
            case {"type": "object"}:
                fields = schema.get("properties", {})
                return {name: self.least(fields[name]) for name in schema.get("required", ())}
            case {"type": "array"}:
                return [self.least(schema["items"])] * schema.get("minItems", 0)
            case {"type": "integer" | "number"}:
                return schema.get("minimum", 1)
            case {"type": "boolean"}:
                return False
            case _:
                return "Hello"


def _nested(info: Any, seen: set[Any]) -> Iterator[Any]:
    """The classes that a type is made of."""
    match info:
        case tuple():
            for each in info:
                yield from _nested(each, seen)
        case msgspec.Struct():
            cls = getattr(info, "cls", None)
            if cls in seen:
                return
            if cls is not None:
                seen.add(cls)
                yield info
            for name in info.__struct_fields__:
                if name not in ("default", "default_factory"):
                    yield from _nested(getattr(info, name), seen)
        case _:
            pass


def _prefix(name: str) -> str:
    return name.title().replace("_", "")


def _name_of(cls: type) -> str:
    package, _, module = cls.__module__.rpartition(".")
    name = cls.__name__.lstrip("_")
    return _prefix(module) + name if package.endswith("dialects") else name


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    match value:
        case {"type": "array"} if "items" not in value:  # some readers want to be told: anything
            return {**value, "items": {}}
        case dict():
            return {name: _renamed(each, names) for name, each in value.items()}
        case list() | tuple():
            return [_renamed(each, names) for each in value]
        case str():
            return names.get(value, value)
        case _:
            return value


def _told(info: Any, component: dict[str, Any], *, is_answer: bool) -> dict[str, Any]:
    """A type's schema, with what its docstring says where it belongs."""
    text, _, attributes = cleandoc(info.cls.__doc__ or "").partition("\n\nAttributes:\n")
    fields = component.get("properties", {})
    by_name = {field.name: field for field in getattr(info, "fields", ())}
    for names, about in _FIELD.findall(attributes):
        for name in by_name.keys() & names.split(", "):
            fields[by_name[name].encode_name]["description"] = " ".join(about.split())
    required = set(component.pop("required", ()))
    if is_answer and isinstance(info, StructType) and not info.cls.__struct_config__.omit_defaults:
        required |= {field.encode_name for field in info.fields if _has_default(field)}
    for name, schema in fields.items():
        if "default" in schema and not _is_fit(schema["default"], schema):
            del schema["default"]  # it is there to be refused in words of one's own
            required.add(name)
    if required:
        component["required"] = [name for name in fields if name in required]
    return {**component, "description": text} if text else component


def _has_default(field: Any) -> bool:
    """Whether a field that may be left out is in all that we write: it is, unless it is UNSET."""
    return (field.default, field.default_factory) != (NODEFAULT, NODEFAULT)


def _is_fit(default: Any, schema: Mapping[str, Any]) -> bool:
    if not isinstance(default, str):
        return True
    is_long = len(default) >= schema.get("minLength", 0)
    return is_long and re.search(schema.get("pattern", ""), default) is not None
