"""Events and JSON: what goes in comes out, what cannot go in says where, and nothing can be bent.

Examples of events are made from the types themselves, so that a new event is tested the day it is
added.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import attrs
import msgspec
import pytest

from agentsse.errors import BadRequest, Unencodable
from agentsse.events import (
    EVENT_TYPES,
    NULL,
    TYPE_NAMES,
    Custom,
    Event,
    Failover,
    Gap,
    Option,
    PartDelta,
    Question,
    RunFinished,
    Usage,
    decode_event,
    decode_json,
    encode_event,
    encode_event_into,
    encode_json,
)

ENVELOPE = {"run_id": "r1", "seq": 7, "ts": "2026-11-20T16:51:07.042Z", "path": ("a", "b")}


# Examples, made from the types


def examples_of(kind: Any) -> list[Any]:
    """Values of a type: every literal, every arm of a union."""
    if kind is type(None):
        return [None]
    if kind is msgspec.Raw:
        return [msgspec.Raw(b'{"a":[1,null]}')]
    if kind in (str, int, float, bool):
        return {str: ["é\n\u2028"], int: [3], float: [1.5], bool: [True, False]}[kind]
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) is tuple:
        return [(), tuple(examples_of(get_args(kind)[0]))]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return list(structs_of(kind))
    return list(itertools.chain.from_iterable(map(examples_of, get_args(kind))))


def structs_of(kind: type[msgspec.Struct]):
    """Instances that between them hold every example of every field."""
    options = {field.name: examples_of(field.type) for field in msgspec.structs.fields(kind)}
    if issubclass(kind, Event):
        options |= {name: [value] for name, value in ENVELOPE.items()}
    for index in range(max(map(len, options.values()))):
        yield kind(**{name: values[index % len(values)] for name, values in options.items()})


def minimal(kind: type[msgspec.Struct]) -> Any:
    """An instance that is given what it must be given, and nothing else."""
    return kind(
        **{
            field.name: examples_of(field.type)[0]
            for field in msgspec.structs.fields(kind)
            if field.required
        }
    )


def plain(event: msgspec.Struct) -> dict[str, Any]:
    """Its fields as JSON has them; a Raw is equal to nothing but itself."""
    return json.loads(encode_event(event))


EVERY = pytest.mark.parametrize("kind", EVENT_TYPES.values(), ids=EVENT_TYPES.keys())


# Events


@EVERY
def test_an_event_survives_its_json(kind):
    """Decoding what was encoded gives the same type and the same JSON, for text and bytes."""
    for event in structs_of(kind):
        encoded = encode_event(event)
        for decoded in (decode_event(encoded), decode_event(encoded.decode())):
            assert kind is type(decoded)
            assert encoded == encode_event(decoded)
            for field in kind.__struct_fields__:
                if not isinstance(value := getattr(event, field), msgspec.Raw):
                    assert value == getattr(decoded, field)


@EVERY
def test_the_envelope_comes_first_and_is_flat(kind):
    """Every event begins with its type, run, number, time and path."""
    for event in structs_of(kind):
        shown = plain(event)
        assert ["type", "run_id", "seq", "ts", "path"] == list(shown)[:5]
        assert {"type": TYPE_NAMES[kind]} | ENVELOPE | {"path": ["a", "b"]} == {
            name: shown[name] for name in ("type", *ENVELOPE)
        }


@EVERY
def test_defaults_are_left_out(kind):
    """A field that has a default here is absent while it has it; all others are there."""
    required = {f.encode_name for f in msgspec.structs.fields(kind) if f.required}

    assert {"type"} | required == set(plain(minimal(kind)))


@EVERY
def test_events_are_frozen(kind):
    """An event is a fact: nobody can change it by accident."""
    with pytest.raises(AttributeError):
        minimal(kind).seq = 2


@EVERY
def test_one_line_of_json(kind):
    """The JSON of an event holds no line end, so that it fits one data line."""
    for event in structs_of(kind):
        assert not set(b"\r\n") & set(encode_event(event))


def test_type_names_are_snake_case_and_unique():
    """The names on the wire are what the table says, one for each type, both ways."""
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", name) for name in EVENT_TYPES)
    assert {kind: name for name, kind in EVENT_TYPES.items()} == dict(TYPE_NAMES)
    assert "tool_output_delta" in EVENT_TYPES
    assert 31 == len(EVENT_TYPES) == len(TYPE_NAMES)


def test_words_that_python_reserves_have_their_own_names_on_the_wire():
    """`from` and `to` are fields of JSON, not of Python."""
    assert {"type": "failover", "from": "a", "to": "b", "reason": "c"} == plain(
        Failover(from_model="a", to_model="b", reason="c")
    )
    assert {"type": "gap", "from": "1", "to": "5"} == plain(Gap(from_id="1", to_id="5"))


def test_parts_of_events_show_all_they_have():
    """Receipt and usage hold no default that would be left out; options and questions do."""
    shown = plain(minimal(RunFinished))

    assert {
        "input_tokens": 3,
        "output_tokens": 3,
        "reasoning_tokens": 3,
        "cache_read_tokens": 3,
        "cache_write_tokens": 3,
    } == shown["usage"]
    assert {"cause", "seconds", "tasks", "threads_abandoned"} == set(shown["receipt"])
    assert set(shown["usage"]) == set(msgspec.to_builtins(Usage()))
    assert b'{"id":"a","kind":"choice","prompt":"?","options":[{"id":"b"}]}' == msgspec.json.encode(
        Question(id="a", kind="choice", prompt="?", options=(Option(id="b"),))
    )


def test_usage_adds_up():
    """The tokens of a run are the sum of its calls'."""
    total = Usage(input_tokens=1, output_tokens=2) + Usage(input_tokens=3, output_tokens=4)

    assert Usage(input_tokens=4, output_tokens=6) == total


def test_encoding_into_a_buffer_leaves_nothing_of_what_was_there():
    """A buffer that is used again holds the last event, and its length is the event's."""
    buffer = bytearray(b"x" * 500)
    for delta in ("long " * 200, "short"):
        event = PartDelta(part_id="p", kind="text", delta=delta)
        encode_event_into(event, buffer)
        assert encode_event(event) == bytes(buffer)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"null", b"[]", b"{}", b'{"type":"nothing"}', b'{"type":"part_delta"}',
        b'{"type":"part_delta","part_id":"p","kind":"song","delta":""}',
        b'{"type":"custom","name":1,"value":1}',
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused(data):
    """A client learns that it cannot read a frame; nothing half read is handed out."""
    with pytest.raises(msgspec.DecodeError):
        decode_event(data)


# Values that users give


class Opaque:
    """Nothing that JSON knows."""


class Unspeakable:
    """A key that cannot even be printed."""

    def __repr__(self) -> str:
        raise LookupError

    __str__ = __repr__


@attrs.define
class Slotted:
    """An attrs class, one field of which may never be set."""

    value: object
    unset: int = attrs.field(init=False)


@dataclasses.dataclass
class Data:
    """A dataclass."""

    value: object


class Record(msgspec.Struct):
    """A Struct."""

    value: object


def nested(depth: int, leaf: object) -> list[Any]:
    value = [leaf]
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append({"again": value})
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, b"null"),
        ({"a": [1, 2.5, True, None, "é"]}, '{"a":[1,2.5,true,null,"é"]}'.encode()),
        ((1, {2}), b"[1,[2]]"),
        ({1: "int", 1.5: "float"}, b'{"1":"int","1.5":"float"}'),
        (Slotted({"x": None}), b'{"value":{"x":null}}'),
        (Data(Record(None)), b'{"value":{"value":null}}'),
        (b"bytes", b'"Ynl0ZXM="'),
        (2**70, b"1180591620717411303424"),
        ("null", b'"null"'),
    ],
)
def test_what_json_can_hold_is_encoded(value, expected):
    """JSON's own types, and what msgspec adds to them."""
    assert expected == bytes(encode_json(value))


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (math.nan, "nan at $"),
        ([1, {"a": math.inf}], "inf at $[1].a"),
        ({"a": [None, 0.5], "b": -math.inf}, "-inf at $.b"),
        ((math.inf, math.nan), "inf at $[0]"),
        ({math.inf}, "inf at $[]"),
        (frozenset({math.nan}), "nan at $[]"),
        (Slotted(math.nan), "nan at $.value"),
        (Data([math.nan]), "nan at $.value[0]"),
        (Record({"x": math.nan}), "nan at $.value.x"),
        ({7: math.nan}, "nan at $.7"),
    ],
)
def test_numbers_that_json_has_no_word_for_say_where_they_are(value, place):
    """NaN and infinity are refused, in every container; they never become null."""
    with pytest.raises(Unencodable) as caught:
        encode_json(value, what="the result")

    assert (
        f"the result: expected finite numbers, got {place}; JSON has no NaN and no infinity"
        == caught.value.message
    )


def test_what_is_no_number_at_the_second_look_is_let_through():
    """Only a dict of somebody's own can say NaN here and None there; what was encoded is JSON."""

    class Fickle(dict):
        def values(self):
            return [math.nan]

    assert b'{"a":null}' == bytes(encode_json(Fickle(a=None)))


@pytest.mark.parametrize(
    ("value", "culprit"),
    [
        (Opaque(), "Opaque at $"),
        ([1, [Opaque()]], "Opaque at $[1][0]"),
        ({"a": {"b": Opaque()}}, "Opaque at $.a.b"),
        (Slotted(Opaque()), "Opaque at $.value"),
        (Data(Opaque()), "Opaque at $.value"),
        (Record((Opaque(),)), "Opaque at $.value[0]"),
        ({Opaque()}, "Opaque at $[]"),
        (Data, "type at $"),
        (len, "builtin_function_or_method at $"),
        (1 + 2j, "complex at $"),
        ([10**5000], "int at $[0]"),
        ("\ud800", "a str with half of a surrogate pair at $"),
        ({"a": "x\udfff"}, "a str with half of a surrogate pair at $.a"),
        ({"a": {(1, 2): 3}}, "dict with a key that is no text at $.a"),
        ({None: 1}, "dict with a key that is no text at $"),
        ({"\ud800": 1}, "dict with a key that is no text at $"),
        ({"\ud800é": Opaque()}, "Opaque at $.\\ud800é"),
        ({Unspeakable(): 1}, "dict with a key that is no text at $"),
        ({Unspeakable(): Opaque()}, "Opaque at $.<Unspeakable>"),
        ({"k" * 100_000: Opaque()}, f"Opaque at $.{'k' * 40}"),
        (MappingProxyType({"a": 1}), "mappingproxy at $"),
        (nested(60, Opaque()), f"something nested too deeply, or in itself, at $[0{'][0' * 12}]"),
        (nested(200_000, 1), f"something nested too deeply, or in itself, at $[0{'][0' * 12}]"),
    ],
)
def test_what_json_cannot_hold_says_what_and_where(value, culprit):
    """The innermost value is named, with its place; the message itself can always be shown."""
    with pytest.raises(Unencodable) as caught:
        encode_json(value)

    assert (
        f"the value: expected what JSON can hold, got {culprit}; "
        "turn it into strings, finite numbers, booleans, lists and dicts"
    ) == caught.value.message
    caught.value.message.encode()


def test_a_value_within_itself_is_refused():
    """What never ends is refused like what is nested too deeply."""
    with pytest.raises(Unencodable, match=r"in itself, at \$\[0\]\.again\[0\]\.again"):
        encode_json(itself())


def test_every_depth_is_encoded_or_refused():
    """There is no depth at which the search for NaN gives up where encoding did not."""
    for depth in range(900, 1_100):
        try:
            encoded = bytes(encode_json(nested(depth, None)))
        except Unencodable:
            continue
        assert b"[" * (depth + 1) + b"null" + b"]" * (depth + 1) == encoded


@pytest.mark.parametrize("container", [list, dict, Slotted, Data, Record, set])
def test_what_was_encoded_does_not_change(container):
    """A later change of the object that an event was made from does not change the event."""
    inner: list[Any] = [1]
    made: dict[type, Any] = {
        list: inner, dict: {"a": inner}, Slotted: Slotted(inner), Data: Data(inner),
        Record: Record(inner), set: {1},
    }  # fmt: skip
    value = made[container]
    event = Custom(name="x", value=encode_json(value))
    before = encode_event(event)

    (value.add if container is set else inner.append)(2)
    if isinstance(value, Mapping):
        value["b"] = 2

    assert before == encode_event(event)
    assert bytes(encode_json(value)) not in before


# JSON that clients send


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"nope", b"NaN", b"Infinity", b"1 2", b'"\xff"', b'"\\ud800"', '"\ud800"',
        b"1e999", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5_000, b"-" + b"1" * 5_000,
        b"1" * 5_000 + b".5e1", msgspec.Raw(b"{"),
    ],
)  # fmt: skip
def test_what_is_no_json_or_a_bomb_is_a_bad_request(data):
    """Depth and digits are bounded; whatever is wrong is the client's, in words it can be shown."""
    with pytest.raises(BadRequest, match=r"^expected JSON, got something else: ") as caught:
        decode_json(data)

    assert len(caught.value.message.encode()) < 300


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"null", None),
        (NULL, None),
        ('{"a":[1,2.5,"\\u00e9"]}', {"a": [1, 2.5, "é"]}),
        (b"123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_json_is_read_as_plain_types(data, expected):
    """Bytes, text or what an event holds."""
    assert expected == decode_json(data)


def test_nulls_without_end_are_looked_at_without_a_word_for_each():
    """What is no number without a word in JSON is found where it is, also behind many nulls."""
    deep = inner = []
    for _ in range(300):
        inner.append([None] * 1_000)
        inner.append([])
        inner = inner[-1]
    assert encode_json(deep)
    inner.append({"here": (1, "x", True, float("nan"), {1})})
    with pytest.raises(Unencodable, match=r"got nan at .*here\[3\]"):
        encode_json(deep)
