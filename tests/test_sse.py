"""What agentsse.sse promises, held against a second reader written here from the standard's text.

Rules: the reference reader shares nothing with the module, and is slow and literal. Each input is
read whole, byte by byte, in other cuts, and with bytes after it. Inputs are our own; the names in
the tables are those of the public lists that they cover (web-platform-tests `eventsource/`, the
LaunchDarkly SSE contract tests).
"""

import codecs
import json
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from agentsse import sse
from agentsse.sse import Decoder, FieldError, Frame, FrameTooLarge

BOM = "\ufeff".encode()

# What an example takes depends on who else is using the machine.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
sizes_of_pieces = st.lists(st.integers(min_value=1, max_value=12), max_size=40)
text = st.text(st.characters(exclude_categories=["Cs"]))
one_line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"))
# Random characters seldom make a field; random words of the format often do.
soup = st.lists(
    st.sampled_from(
        [b"data", b"event", b"id", b"retry", b":", b": ", b" ", b"\n", b"\n\n", b"\r", b"\r\n", BOM]
        + [b"\0", b"7", b"12", b"x", b"\x0b", b"\x0c", b"\xff", b"\xc3", b"\xe2\x82", b"\xbb\xbf"]
        + [character.encode() for character in "é€😀\x85\u2028"],
    ),
    max_size=60,
).map(b"".join)


class Reference:
    """The standard, "Interpreting an event stream", sentence by sentence, a character at a time."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.last_id = ""
        self.retry: int | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._is_first = True
        self._previous = ""
        self._line = ""
        self._data = ""
        self._type = ""
        self._id = ""

    def read(self, raw: bytes) -> None:
        """Take the stream's next bytes."""
        for character in self._decode(raw):
            is_bom = self._is_first and character == "\ufeff"
            self._is_first = False
            if character == "\r" or (character == "\n" and self._previous != "\r"):
                self._process()
                self._line = ""
            elif character != "\n" and not is_bom:
                self._line += character
            self._previous = character

    def _process(self) -> None:
        if self._line == "":
            self._dispatch()
        elif self._line[0] == ":":
            return
        elif ":" in self._line:
            place = self._line.index(":")
            value = self._line[place + 1 :]
            self._field(self._line[:place], value[1:] if value[:1] == " " else value)
        else:
            self._field(self._line, "")

    def _field(self, name: str, value: str) -> None:
        if name == "event":
            self._type = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id":
            if "\0" not in value:
                self._id = value
        elif name == "retry" and value != "" and all(digit in "0123456789" for digit in value):
            # The one place where the module is stricter: 16 digits are no time.
            self.retry = int(value) if len(value) <= 15 else self.retry

    def _dispatch(self) -> None:
        self.last_id = self._id
        if self._data != "":
            event = self._type if self._type != "" else "message"
            self.frames.append(Frame(data=self._data[:-1], event=event, id=self.last_id))
        self._data = ""
        self._type = ""


def by_reference(raw: bytes) -> Reference:
    reader = Reference()
    reader.read(raw)
    return reader


def cut(raw: bytes, sizes: Iterable[int]) -> list[bytes]:
    """Cut into pieces of these sizes; the last piece is what remains."""
    pieces = []
    for size in sizes:
        pieces.append(raw[:size])
        raw = raw[size:]
    return [*pieces, raw]


def read(pieces: Iterable[bytes], decoder: Decoder | None = None) -> list[Frame]:
    decoder = decoder or Decoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def normalised(value: str) -> str:
    return value.replace("\r\n", "\n").replace("\r", "\n")


# Writing.


@untimed
@given(text, st.none() | one_line, st.none() | one_line, st.none() | st.integers(0, 10**15 - 1))
def test_what_is_encoded_is_read_back(
    data: str, event: str | None, id: str | None, retry: int | None
) -> None:
    """Any text in every field comes out as it went in, but for line ends, which become LF."""
    reader = by_reference(sse.encode(data, event=event, id=id, retry=retry))

    assert [Frame(normalised(data), event or "message", id or "")] == reader.frames
    assert retry == reader.retry


@untimed
@given(text, one_line, one_line, sizes_of_pieces)
def test_what_is_encoded_survives_every_cut(
    data: str, event: str, id: str, sizes: list[int]
) -> None:
    """A network may cut a frame anywhere, within a character too."""
    raw = sse.encode(data, event=event, id=id)
    frames = [Frame(normalised(data), event or "message", id)]

    for place in range(len(raw)):
        assert frames == read([raw[:place], raw[place:]])
    assert frames == read(cut(raw, sizes))


@untimed
@given(text, one_line, one_line)
def test_bytes_are_encoded_like_the_text_they_stand_for(data: str, event: str, id: str) -> None:
    """A caller who has bytes already need not decode them."""
    raw = sse.encode(data.encode(), event=event.encode(), id=id.encode())

    assert sse.encode(data, event=event, id=id) == raw


@untimed
@given(st.dictionaries(text, text | st.integers()), one_line)
def test_the_quick_way_writes_what_the_careful_one_writes(
    value: dict[str, str | int], event: str
) -> None:
    """Within its precondition a filled pattern is what `encode` makes."""
    payload = json.dumps(value).encode()
    careful = sse.encode(payload, event=event, id="12")

    assert careful == sse.frame_of(event.encode()) % (12, payload)


@untimed
@given(st.lists(st.tuples(text, st.none() | one_line, st.sampled_from(["frame", "comment"]))))
def test_frames_and_comments_can_be_joined(pieces: list[tuple[str, str | None, str]]) -> None:
    """What is written one after the other is read one after the other; comments are not read."""
    stream = b""
    expected = []
    last_id = ""
    for content, own_id, kind in pieces:
        if kind == "comment":
            stream += sse.comment(content)
            continue
        stream += sse.encode(content, id=own_id) + sse.retry(5)
        last_id = last_id if own_id is None else own_id
        expected.append(Frame(normalised(content), "message", last_id))

    assert expected == by_reference(stream).frames
    assert expected == read([stream])


def test_the_bytes_of_a_frame() -> None:
    """Fields stand in a fixed order, LF ends each line, a blank line ends the frame."""
    raw = sse.encode("a\r\nb\rc\n", event="tick", id="7.1", retry=250)

    assert raw == b"id: 7.1\nevent: tick\nretry: 250\ndata: a\ndata: b\ndata: c\ndata: \n\n"
    assert sse.frame_of(b"tick") % (7, b"{}") == b"id: 7\nevent: tick\ndata: {}\n\n"
    assert sse.encode("") == b"data: \n\n"
    assert sse.retry(0) == b"retry: 0\n\n"
    assert sse.comment() == b":\n\n"
    assert sse.comment("a\r\nb") == b": a\n: b\n\n"


def test_empty_data_is_an_event() -> None:
    """A data line without text is dispatched; only a block without any data line is not."""
    assert [Frame("", "ping")] == by_reference(sse.encode("", event="ping")).frames
    assert [Frame("", "ping")] == read([sse.encode("", event="ping")])


LINE_ENDS = ["\r", "\n", "\r\n"]
HARMLESS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\ufeff"]


@pytest.mark.parametrize("break_", [*LINE_ENDS, "\0"], ids=repr)
@pytest.mark.parametrize("field", ["id", "event"])
def test_no_field_can_be_smuggled_into_a_name(field: str, break_: str) -> None:
    """An id or event that would end its line, or make readers ignore it, is refused."""
    for value in (f"1{break_}data: evil", break_, f"1{break_}", f"{break_}1"):
        for given_ in (value, value.encode()):
            with pytest.raises(FieldError, match=rf"^{field}: expected .*, got b?'.*; put "):
                sse.encode("x", **{field: given_})  # type: ignore[arg-type]


@pytest.mark.parametrize("sign", HARMLESS, ids=repr)
@pytest.mark.parametrize("field", ["id", "event", "data"])
def test_what_looks_like_a_line_end_is_text(field: str, sign: str) -> None:
    """Only CR, LF and CRLF end a line: other separators, and a BOM, stay in their field."""
    value = f"{sign}1{sign}data: evil{sign}"
    fields = {"data": "x", "event": "e", "id": "i"} | {field: value}
    raw = sse.encode(**fields)  # type: ignore[arg-type]

    assert [Frame(**fields)] == by_reference(raw).frames == read([raw])


@pytest.mark.parametrize("break_", [*LINE_ENDS, "\0", *HARMLESS], ids=repr)
def test_no_field_can_be_smuggled_into_data(break_: str) -> None:
    """Data that spells out fields and a frame's end stays data of its one frame."""
    value = f"a{break_}id: 666{break_}event: evil{break_}retry: 1{break_}{break_}data: evil"
    raw = sse.encode(value, id="7")
    reader = by_reference(raw)

    assert [Frame(normalised(value), "message", "7")] == reader.frames == read([raw])
    assert reader.retry is None


@pytest.mark.parametrize("break_", [*LINE_ENDS, "\0", *HARMLESS], ids=repr)
def test_no_field_can_be_smuggled_into_a_comment(break_: str) -> None:
    """A comment that spells out a frame is still no frame."""
    value = f"{break_}id: 666{break_}data: evil{break_}retry: 1{break_}{break_}"
    reader = by_reference(sse.comment(value) + sse.encode("good"))

    assert [Frame("good")] == reader.frames
    assert reader.retry is None


@pytest.mark.parametrize(
    "value", [-1, 10**15, 10**99, 1.5, float("nan"), "5", "5\ndata: evil", b"5", [5]], ids=repr
)
def test_retry_is_whole_milliseconds(value: int) -> None:
    """Whatever a reader would ignore, or that could hold a line end, is refused."""
    with pytest.raises(FieldError, match=r"^retry: expected whole milliseconds.*; round it$"):
        sse.encode("x", retry=value)
    with pytest.raises(FieldError, match=r"^retry: "):
        sse.retry(value)


def test_half_of_a_surrogate_pair_is_refused() -> None:
    """Text that UTF-8 cannot carry is refused by name of the field and place in it."""
    for field in ("data", "event", "id"):
        fields = {"data": "x"} | {field: "ab\ud83d"}
        with pytest.raises(FieldError, match=rf"^{field}: .*, character 2 of 'ab\\ud83d'; join"):
            sse.encode(**fields)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"^comment: "):
        sse.comment("\udc00")


def test_an_error_does_not_repeat_all_that_came() -> None:
    """What came is shown shortened: a message may end up in a log."""
    with pytest.raises(FieldError) as caught:
        sse.encode("x", id="\n" * 100_000)

    assert len(str(caught.value)) < 200


# Positions.


@untimed
@given(st.integers(1, 10**15 - 1), st.integers(1, 10_000), st.integers(0, 10_000))
def test_a_frame_id_is_read_back(seq: int, part: int, later: int) -> None:
    """The last frame of an event stands for all of it, those before for themselves."""
    expected = (seq, 0 if later == 0 else part)

    assert expected == sse.parse_position(sse.frame_id(seq, part, part + later))


def test_the_frames_of_an_event_are_numbered() -> None:
    """All frames but the last carry the number of the part."""
    assert [sse.frame_id(7, part, 3) for part in (1, 2, 3)] == ["7.1", "7.2", "7"]
    assert sse.frame_id(7, 1, 1) == "7"
    assert sse.parse_position("0") == (0, 0)
    assert sse.parse_position("9" * 15) == (10**15 - 1, 0)


@pytest.mark.parametrize(
    "value",
    [
        *[
            "",
            " ",
            "07",
            "00",
            "0.1",
            "7.",
            "7.0",
            "7.01",
            ".1",
            "7.1.1",
            "-1",
            "+1",
            " 7",
            "7 ",
            "7\n",
        ],
        *["7\0", "1e3", "1_0", "0x7", "7,1", "\u0667", "\uff17", "\xb2", "\ufeff7", "7\u2028", "x"],
        *["null", "3f-7", "1" * 16, "1" * 9999, "7." + "1" * 16],
    ],
    ids=lambda value: repr(value[:20]),
)
def test_only_positions_are_positions(value: str) -> None:
    """What frame_id cannot have written is refused, and the error says what to send."""
    with pytest.raises(FieldError, match=r"^position: expected .*, got .*; send ") as caught:
        sse.parse_position(value)

    assert len(str(caught.value)) < 200


# Reading: the lists of cases.


def messages(*texts: str) -> list[Frame]:
    return [Frame(text) for text in texts]


NOT_LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
LONG = "0123456789" * 4_000
CASES: list[tuple[str, bytes, list[Frame]]] = [
    # web-platform-tests, eventsource/format-*
    ("format-bom", BOM + b"data: a\n\ndata: b\n\n", messages("a", "b")),
    ("format-bom-2", BOM + BOM + b"data: a\n\ndata: b\n\n", messages("b")),
    (
        "format-comments",
        f"data: a\n:\0\n:\r\ndata: b\n:{LONG}\rdata: c\n:d\n\n".encode(),
        [Frame("a\nb\nc")],
    ),
    ("format-data-before-final-empty-line", b"retry: 10\ndata: a\n\ndata: b\n", messages("a")),
    ("format-field-data", b"data:\n\ndata\ndata\n\ndata: a\n\n", messages("", "\n", "a")),
    ("format-field-event", b"event: e\ndata: a\n\ndata: b\n\n", [Frame("a", "e"), Frame("b")]),
    ("format-field-event-empty", b"event: \ndata: a\n\n", messages("a")),
    ("format-field-event-last-wins", b"event: e\nevent: f\ndata: a\n\n", [Frame("a", "f")]),
    ("format-field-event-emptied", b"event: e\nevent\ndata: a\n\n", messages("a")),
    ("format-field-event-without-data", b"event: e\n\ndata: a\n\n", messages("a")),
    ("format-field-id", "id: …\ndata: a\n\n".encode(), [Frame("a", id="…")]),
    (
        "format-field-id-2",
        b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\ndata: d\n\n",
        [Frame("a", id="1"), Frame("b", id="1"), Frame("c"), Frame("d")],
    ),
    (
        "format-field-id-3",
        b"id: 1\n\ndata: a\n\nid:\ndata: b\n\n",
        [Frame("a", id="1"), Frame("b")],
    ),
    (
        "format-field-id-null",
        b"id: 1\ndata: a\n\nid: 2\0\ndata: b\n\nid: \0\ndata: c\n\n",
        [Frame("a", id="1"), Frame("b", id="1"), Frame("c", id="1")],
    ),
    ("format-field-retry", b"retry: 3000\ndata: a\n\n", messages("a")),
    ("format-field-retry-bogus", b"retry: 3000\nretry: 1000x\ndata: a\n\n", messages("a")),
    ("format-field-retry-empty", b"retry\ndata: a\n\n", messages("a")),
    (
        "format-field-parsing",
        b"data:\0\ndata:  b\rDATA: c\ndata\0: d\n data: e\rdata_: f\r\ndata:h:i\ndata\r\n\r\n",
        messages("\0\n b\nh:i\n"),
    ),
    ("format-field-unknown", b"data: a\n data: b\ndata\nfoo: c\njustsome\n\n", messages("a\n")),
    (
        "format-leading-space",
        b"data:\ta\rdata: b\ndata:  c\r\ndata:d\n\n",
        messages("\ta\nb\n c\nd"),
    ),
    ("format-newlines", b"data: a\r\ndata: b\ndata: c\rdata: d\r\r\n", messages("a\nb\nc\nd")),
    ("format-null-character", b"data: a\0b\n\n\n\n\0data: c\n\n", messages("a\0b")),
    ("format-utf-8", "data: ok… é 😀\n\n".encode(), messages("ok… é 😀")),
    ("format-utf-8-invalid", b"data: a\xffb\xe2\x82\n\n", messages("a\ufffdb\ufffd")),
    (
        "format-utf-8-invalid-names",
        b"event: \xc3\nid: \xc3\ndata: a\n\n",
        [Frame("a", "\ufffd", "\ufffd")],
    ),
    # LaunchDarkly SSE contract tests: basic parsing
    ("one-line", b"data: a\n\n", messages("a")),
    ("two-lines", b"data: a\ndata: b\n\n", messages("a\nb")),
    ("two-messages", b"data: a\n\ndata: b\n\n", messages("a", "b")),
    (
        "many-rapid-messages",
        b"".join(b"data: %d\n\n" % n for n in range(300)),
        messages(*map(str, range(300))),
    ),
    ("large-message", f"data: {LONG}\n\n".encode(), messages(LONG)),
    ("all-fields", b"event: e\nid: 1\nretry: 5\ndata: a\n\n", [Frame("a", "e", "1")]),
    ("all-fields-reversed", b"data: a\nretry: 5\nid: 1\nevent: e\n\n", [Frame("a", "e", "1")]),
    ("fields-without-space", b"event:e\nid:1\ndata:a\n\n", [Frame("a", "e", "1")]),
    ("fields-without-colon", b"event\nid\ndata\n\n", messages("")),
    ("fields-with-empty-values", b"event:\nid:\ndata:\n\n", messages("")),
    ("colon-in-value", b"event: a:b\nid: c:d\ndata: e:f\n\n", [Frame("e:f", "a:b", "c:d")]),
    ("only-one-space-removed", b"event:  e\nid:  1\ndata:  a \n\n", [Frame(" a ", " e", " 1")]),
    ("case-matters", b"Data: a\nDATA: b\ndata: c\n\n", messages("c")),
    ("multibyte", "event: ø\nid: ü\ndata: €😀\n\n".encode(), [Frame("€😀", "ø", "ü")]),
    ("not-line-ends", f"data: {NOT_LINE_ENDS}\n\n".encode(), messages(NOT_LINE_ENDS)),
    ("no-data-no-event", b"event: e\nid: 1\n\n", []),
    ("blank-lines-only", b"\n\r\n\r\r\n\n", []),
    ("blank-lines-between", b"\n\ndata: a\n\n\n\n\ndata: b\n\n", messages("a", "b")),
    ("nothing", b"", []),
    ("incomplete-line", b"data: a\n\ndata: b", messages("a")),
    (
        "incomplete-block-keeps-id-unseen",
        b"id: 1\ndata: a\n\nid: 2\ndata: b\n",
        [Frame("a", id="1")],
    ),
    # ... BOM
    ("bom-alone", BOM, []),
    ("bom-incomplete", BOM[:2] + b"data: a\n\ndata: b\n\n", messages("b")),
    ("bom-before-blank-line", BOM + b"\ndata: a\n\n", messages("a")),
    ("bom-before-cr", BOM + b"\rdata: a\r\r", messages("a")),
    ("bom-before-crlf", BOM + b"\r\ndata: a\r\n\r\n", messages("a")),
    ("bom-before-comment", BOM + b": c\ndata: a\n\n", messages("a")),
    ("bom-before-event", BOM + b"event: e\ndata: a\n\n", [Frame("a", "e")]),
    ("bom-before-id", BOM + b"id: 1\ndata: a\n\n", [Frame("a", id="1")]),
    ("bom-in-second-line", b"data: a\n" + BOM + b"data: b\n\n", messages("a")),
    ("bom-in-second-block", b"data: a\n\n" + BOM + b"data: b\n\n", messages("a")),
    (
        "bom-in-values",
        b"event: %b\nid: %b\ndata: %b\n\n" % (BOM, BOM, BOM),
        [Frame(*["\ufeff"] * 3)],
    ),
    ("bom-after-comment", b":\n" + BOM + b"data: a\n\ndata: b\n\n", messages("b")),
    ("bom-of-utf-16", b"\xff\xfedata: a\n\ndata: b\n\n", messages("b")),
    # ... comments
    ("comment-alone", b": c\n", []),
    ("comment-empty", b":\n\n:\n\ndata: a\n\n", messages("a")),
    ("comment-within-block", b"data: a\n: c\ndata: b\n\n", messages("a\nb")),
    ("comment-spelling-a-field", b":data: a\n: data: b\n\n", []),
    # ... line feeds, each terminator and mixed
    *(
        (
            f"line-ends-{name}",
            b"event: e\nid: 1\ndata: a\ndata\n: c\ndata: b\n\ndata: c\n\n".replace(b"\n", end),
            [Frame("a\n\nb", "e", "1"), Frame("c", id="1")],
        )
        for name, end in [("lf", b"\n"), ("cr", b"\r"), ("crlf", b"\r\n")]
    ),
    (
        "line-ends-mixed",
        b"data: a\n\r\ndata: b\r\r\ndata: c\r\n\rdata: d\n\r",
        messages("a", "b", "c", "d"),
    ),
    ("lf-cr-is-two", b"data: a\n\rdata: b\n\r", messages("a", "b")),
]


@pytest.mark.parametrize(
    ("raw", "expected"), [pytest.param(raw, frames, id=name) for name, raw, frames in CASES]
)
def test_a_case_of_the_public_lists(raw: bytes, expected: list[Frame]) -> None:
    """Each case reads the same whole, in ones, twos and threes, and with a line begun after it."""
    assert expected == by_reference(raw).frames
    assert expected == read([raw])
    assert expected == read([raw + b"data: begun"])
    assert expected == read([raw, b"", b"data: begun"])
    for size in (1, 2, 3):
        assert expected == read(raw[n : n + size] for n in range(0, len(raw), size))


@untimed
@given(soup, sizes_of_pieces)
def test_any_bytes_are_read_as_the_standard_reads_them(raw: bytes, sizes: list[int]) -> None:
    """On whatever comes, however it is cut, the decoder agrees with the reference reader."""
    reference = by_reference(raw)

    for pieces in ([raw], [bytes([byte]) for byte in raw], cut(raw, sizes), [raw, b"id: begun"]):
        decoder = Decoder()
        assert reference.frames == read(pieces, decoder)
        assert (reference.last_id, reference.retry) == (decoder.last_id, decoder.retry)


# Reading: what stands beside the frames.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(b": 0", 0), (b":3000", 3000), (b": 007", 7), (b": " + b"9" * 15, 10**15 - 1)],
        *[(b"", None), (b":", None), (b":  1", None), (b": 1 ", None), (b": 1000x", None)],
        *[(b": -1", None), (b": +1", None), (b": 1.5", None), (b": 1e3", None), (b": 5s", None)],
        *[
            (b": 1\0", None),
            (": \u0667".encode(), None),
            (": \xb2".encode(), None),
            (b": \xff", None),
        ],
        *[(b": " + b"9" * 16, None), (b": " + b"9" * 5000, None)],
    ],
)
def test_retry_is_ascii_digits_or_ignored(value: bytes, expected: int | None) -> None:
    """Only digits set the delay, at once, without an event; the rest leaves it as it was."""
    for before, after in ((None, expected), (44, 44 if expected is None else expected)):
        decoder = Decoder(retry=before)

        assert decoder.feed(b"retry" + value + b"\n") == []
        assert after == decoder.retry


def test_the_last_id_is_that_of_the_last_whole_block() -> None:
    """An id counts from the end of its block, with data or without; a block cut off leaves none."""
    decoder = Decoder()
    seen = []
    for piece in (b"id: 1\n", b"data: a\n", b"\n", b"id: 2\n", b"\n", b"data: b\nid: 3\n"):
        decoder.feed(piece)
        seen.append(decoder.last_id)

    assert seen == ["", "", "1", "1", "2", "2"]


def test_a_new_connection_goes_on_with_the_last_id() -> None:
    """A decoder that is given the last id keeps it until the stream brings another."""
    first = Decoder()
    read([sse.encode("a", id="7"), b"id: 8\ndata: cut off"], first)
    second = Decoder(last_id=first.last_id)

    assert second.last_id == "7"
    assert [Frame("b", id="7"), Frame("c", id="8")] == read(
        [sse.encode("b"), sse.encode("c", id="8")], second
    )


def test_a_frame_is_there_with_the_cr_of_its_blank_line() -> None:
    """The LF that may follow is not waited for, and when it comes it ends nothing."""
    decoder = Decoder()

    assert decoder.feed(b"data: a\r\n") == []
    assert [Frame("a")] == decoder.feed(b"\r")
    assert decoder.feed(b"") == []
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"data: b\n") == []
    assert [Frame("b")] == decoder.feed(b"\n")


def test_a_long_line_in_many_pieces_is_looked_at_once() -> None:
    """5 MB in 100,000 pieces: looking at the line anew for each would move 250 GB."""
    content = "x" * 5_000_000
    raw = f"data: {content}\n\n".encode()

    assert [Frame(content)] == read(raw[n : n + 50] for n in range(0, len(raw), 50))


# Reading: the bound.


def read_bounded(pieces: Iterable[bytes], limit: int) -> tuple[list[Frame], bool]:
    """Return the frames read, and whether the bound ended the reading."""
    decoder = Decoder(max_frame_bytes=limit)
    frames: list[Frame] = []
    try:
        for piece in [*pieces, b""]:
            frames += decoder.feed(piece)
    except FrameTooLarge:
        return frames, True
    return frames, False


@pytest.mark.parametrize(
    ("raw", "needed"),
    [
        (b"data: 345\n\n", 9),
        (b"data: a\ndata: bcd\n\n", len("a\n") + 9),
        (b"data: a\n: longer than the data\n\n", len("a\n") + 22),
        (b"event: long\ndata: a\n\n", 11),
        (b"data: a\n\ndata: 345\n\n", 9),
        (b"data: 345\n\ndata: a\n\n", 9),
        (BOM + b"data: 345\n\n", len(BOM) + 9),
        (b"data: begun", 11),
        (b"data: a\ndata: begun", len("a\n") + 11),
    ],
)
def test_a_frame_is_bounded_to_the_byte(raw: bytes, needed: int) -> None:
    """What fits is read; with room for a byte less it is refused; the cuts make no difference."""
    bytewise = [bytes([byte]) for byte in raw]

    for pieces in ([raw], bytewise):
        assert (read([raw]), False) == read_bounded(pieces, needed)
        _, is_refused = read_bounded(pieces, needed - 1)
        assert is_refused


@untimed
@given(soup, sizes_of_pieces, st.integers(0, 20))
def test_the_bound_does_not_depend_on_the_cuts(raw: bytes, sizes: list[int], limit: int) -> None:
    """Frames before one that is too large are delivered, then it is refused, however it came."""
    frames, is_refused = read_bounded([raw], limit)
    unbounded = read([raw])

    assert (frames, is_refused) == read_bounded(cut(raw, sizes), limit)
    assert (frames, is_refused) == read_bounded([bytes([byte]) for byte in raw], limit)
    assert frames == (unbounded[: len(frames)] if is_refused else unbounded)


def test_after_a_frame_too_large_nothing_is_read() -> None:
    """The frames before it come first; then every call says what the bound is and what to do."""
    decoder = Decoder(max_frame_bytes=20)

    assert [Frame("a", id="7")] == decoder.feed(b"id: 7\ndata: a\n\nid: 8\ndata: " + b"x" * 21)
    for piece in (b"", b"\n\n", b"data: b\n\n"):
        with pytest.raises(FrameTooLarge, match=r"at most 20 bytes, got more, after id '7'; end "):
            decoder.feed(piece)
    assert decoder.last_id == "7"


def test_heartbeats_for_ever_fill_nothing() -> None:
    """Comments without a blank line, as some servers send them, do not add up to a frame."""
    decoder = Decoder(max_frame_bytes=20)

    assert read([b": heartbeat\n"] * 1_000, decoder) == []
    assert [Frame("a")] == decoder.feed(b"data: a\n\n")
