r"""The wire format of Server-Sent Events, both ways.

Knows: bytes, and the WHATWG HTML standard, "Parsing an event stream" and "Interpreting an event
stream" (9.2.5, 9.2.6). Must never know: sockets, clocks, HTTP, what an event means, who reads.

Theory of operation. A stream is UTF-8 text in lines. CR, LF and CRLF end a line and nothing else
does (not U+2028: `bytes.splitlines` is right here, `str.splitlines` is wrong). No byte of a
multibyte character looks like CR, LF or a colon, so lines and fields are cut as bytes; only what is
handed out is decoded. A line is `name: value`; one space after the colon belongs to the colon. A
blank line ends a block:

- `data` lines pile up. A block with at least one is dispatched, also when all are empty (`data:`
  alone is an event whose data is the empty string). A block with none is no event.
- `event` names this block only. An empty name is as good as none: the event is a "message".
- `id` stays until another comes, and counts from the end of its block, dispatched or not.
- `retry` counts at once.
- The rest is ignored: comments (lines that begin with a colon), unknown fields, the block that the
  end of the stream cut off.

So a writer may break data at every line end, and the reader sees LF. But a line end in an `id` or
`event` would let whoever chose it write fields of their own, and a NUL makes readers ignore an
`id`: both are refused before a byte is written.
"""

import re
import reprlib
from typing import Final

import attrs
from msgspec import Struct

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""Bytes; a run of ours holds no more in all."""

MAX_DIGITS: Final = 15
"""Digits in a number; exact as a JavaScript number too, and `int()` refuses 4,301 anyway."""

_NUL, _LF, _CR = b"\0\n\r"  # as integers: looking for one costs a fifth of looking for bytes
_BOM = b"\xef\xbb\xbf"
_DATA = b"data: "
_NUMBER = rf"[1-9][0-9]{{0,{MAX_DIGITS - 1}}}"
_POSITION = re.compile(rf"0|({_NUMBER})(?:\.({_NUMBER}))?")


class FieldError(ValueError):
    """A value that its field cannot carry; nothing of it was written."""


class FrameTooLarge(ValueError):
    """A frame larger than the decoder may hold; the rest of its stream cannot be read."""


def encode(
    data: bytes | str,
    *,
    event: bytes | str | None = None,
    id: bytes | str | None = None,
    retry: int | None = None,
) -> bytes:
    """Write one frame: `id`, `event`, `retry`, `data`, in this order, then a blank line.

    Args:
        data: One `data` line for each of its lines. Empty data is one empty line; browsers do
            dispatch that, as an event without text. Bytes, here and below, must be UTF-8.
        event: The type. None or empty: the reader sees "message".
        id: What the reader will send as Last-Event-ID. None keeps the one before, empty clears it.
            Beyond 128 bytes of `[A-Za-z0-9._:-]` browsers ask for a preflight across origins.
        retry: Milliseconds to wait before reconnecting, from now on.

    Raises:
        FieldError: `event` or `id` holds CR, LF or NUL, a text holds half of a surrogate pair, or
            `retry` is not a whole number of at most 15 digits, 0 or more.
    """
    head = b""
    if id is not None:
        head = b"id: %b\n" % _one_line("id", id)
    if event is not None:
        head = b"%bevent: %b\n" % (head, _one_line("event", event))
    if retry is not None:
        head = b"%bretry: %d\n" % (head, _milliseconds(retry))
    return b"%bdata: %b\n\n" % (head, _continued("data", data, prefix=b"data: "))


def frame_of(event: bytes) -> bytes:
    """Make a pattern of the frames of one type: `pattern % (id, data)` is the frame `encode` makes.

    In a sixth of the time, by looking at nothing: the id is an int, and the caller vouches that the
    data is UTF-8 without CR or LF, as unindented JSON is, since encoders escape control characters.
    What came from outside goes through `encode`.

    Args:
        event: The type; a literal of our own.

    Raises:
        FieldError: As `encode`.
    """
    return b"id: %%d\nevent: %b\ndata: %%b\n\n" % _one_line("event", event).replace(b"%", b"%%")


def comment(text: str = "") -> bytes:
    """Write a comment: no reader sees an event, every proxy sees traffic.

    It ends with a blank line, since many clients cut the stream at blank lines and look only at how
    each piece begins. So it stands between frames, never within one. Errors as `encode`.
    """
    return b": %b\n\n" % _continued("comment", text, prefix=b": ") if text else b":\n\n"


def id_only(id: str) -> bytes:
    """Write a frame that sets the last id, and is no event. Errors as `encode`."""
    return b"id: %b\n\n" % _utf8("id", id)


def retry(milliseconds: int) -> bytes:
    """Write how long a reader is to wait before it reconnects; no event. Errors as `encode`."""
    return b"retry: %d\n\n" % _milliseconds(milliseconds)


def _utf8(field: str, value: bytes | str) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise FieldError(
            f"{field}: expected text that UTF-8 can carry, got half of a surrogate pair, character "
            f"{error.start} of {reprlib.repr(value)}; join the halves or replace it"
        ) from None


def _one_line(field: str, value: bytes | str) -> bytes:
    raw = _utf8(field, value)
    if _LF in raw or _CR in raw or _NUL in raw:
        raise FieldError(
            f"{field}: expected one line without CR, LF or NUL, got {reprlib.repr(value)}; "
            "put free text into data"
        )
    return raw


def _continued(field: str, value: bytes | str, *, prefix: bytes) -> bytes:
    raw = _utf8(field, value)
    if _LF in raw or _CR in raw:
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\n" + prefix)
    return raw


def _milliseconds(value: int) -> int:
    # `%d` would cut a float and a delay is often computed, so the type is looked at.
    if not isinstance(value, int) or not 0 <= value < 10**MAX_DIGITS:
        raise FieldError(
            f"retry: expected whole milliseconds, 0 or more, of at most {MAX_DIGITS} digits, "
            f"got {reprlib.repr(value)}; round it"
        )
    return value


def frame_id(seq: int, part: int, parts: int) -> str:
    """Name frame `part` of the `parts` that event `seq` became, all counted from 1.

    The last is `<seq>`: who has it has the whole event. Those before it are `<seq>.<part>`, so that
    a reader may resume between them.
    """
    return str(seq) if part == parts else f"{seq}.{part}"


def parse_position(text: str) -> tuple[int, int]:
    """Read a `frame_id` back, as it comes in Last-Event-ID.

    Returns:
        The event's seq, and how many of its frames were seen; 0 stands for all of them. "0", before
        the first event, gives (0, 0). Mind that (7, 0) comes after (7, 1).

    Raises:
        FieldError: It is nothing that `frame_id` writes, nor "0".
    """
    if (found := _POSITION.fullmatch(text)) is None:
        raise FieldError(
            f"position: expected '7', '7.1' or '0' ({MAX_DIGITS} digits at most), "
            f"got {reprlib.repr(text)}; send the last id received, unchanged"
        )
    seq, part = found.groups(default="0")
    return int(seq), int(part)


class Frame(Struct, frozen=True, gc=False):
    """An event as a browser would dispatch it.

    Attributes:
        data: Its data lines, joined with LF.
        event: Its type.
        id: The last id as of this frame, which may have come with an earlier one; empty if none.
    """

    data: str
    event: str = "message"
    id: str = ""


@attrs.define(eq=False, kw_only=True)
class Decoder:
    """A reader of one event stream, from its first byte; a new connection takes a new one.

    There is nothing to close: what is incomplete at the end of the stream counts for nothing.

    Attributes:
        max_frame_bytes: How much of a frame may be held, its data so far and its current line.
        last_id: What to send as Last-Event-ID. A new decoder is given that of the one before it.
        retry: Milliseconds to wait before reconnecting, as last asked for by the server.
    """

    max_frame_bytes: int = MAX_FRAME_BYTES
    last_id: str = ""
    retry: int | None = None

    # The three buffers of the standard, ...
    _data: bytearray = attrs.field(factory=bytearray, init=False)
    _event: bytes = attrs.field(default=b"", init=False)
    _id: str = attrs.field(init=False)
    # ... and where in the stream we are.
    _line: bytearray = attrs.field(factory=bytearray, init=False)  # its end was not seen yet
    _is_at_start: bool = attrs.field(default=True, init=False)  # a BOM may still come
    _is_after_cr: bool = attrs.field(default=False, init=False)  # an LF would belong to it
    _is_overfull: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._id = self.last_id

    def feed(self, chunk: bytes) -> list[Frame]:
        """Take the next bytes, however they were cut, and return the frames that they complete.

        A frame is complete at the CR of its blank line: no LF is waited for. Linear in time.

        Raises:
            FrameTooLarge: The frame after those returned is larger than `max_frame_bytes`. If this
                very chunk completed frames before it, they are returned and the next call raises.
                Nothing can be read from then on.
        """
        frames: list[Frame] = []
        most = self.max_frame_bytes
        may_overfill = len(self._data) + len(self._line) + len(chunk) > most
        if not self._is_overfull:
            for line in self._cut(chunk):
                if may_overfill and len(self._data) + len(line) > most:
                    self._is_overfull = True
                    break
                if (frame := self._take(line)) is not None:
                    frames.append(frame)
            else:
                self._is_overfull = may_overfill and len(self._data) + len(self._line) > most
        if self._is_overfull and not frames:
            raise FrameTooLarge(
                f"expected a frame of at most {self.max_frame_bytes} bytes, got more, after id "
                f"{reprlib.repr(self.last_id)}; end the connection, or raise max_frame_bytes"
            )
        return frames

    def _cut(self, chunk: bytes) -> list[bytes]:
        """Return the lines that end in this chunk; keep what follows them."""
        if not chunk:
            return []
        is_after_cr, self._is_after_cr = self._is_after_cr, chunk.endswith(b"\r")
        if is_after_cr:
            chunk = chunk.removeprefix(b"\n")
        lines = chunk.splitlines()
        rest = lines.pop() if lines and not chunk.endswith((b"\n", b"\r")) else b""
        if lines and self._line:  # joined once per line, not once per chunk
            lines[0] = bytes(self._line + lines[0])
            self._line.clear()
        self._line += rest
        return lines

    def _take(self, line: bytes) -> Frame | None:
        if self._is_at_start:
            self._is_at_start, line = False, line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        if line.startswith(_DATA):  # what nearly every line is
            self._data += line[len(_DATA) :]
            self._data += b"\n"
            return None
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match name:
            case b"data":
                self._data += value
                self._data += b"\n"
            case b"event":
                self._event = value
            case b"id" if _NUL not in value:
                self._id = _text(value)
            case b"retry" if value.isdigit() and len(value) <= MAX_DIGITS:
                self.retry = int(value)
            case _:
                pass  # the standard: ignore it; that leaves room for fields to come
        return None

    def _dispatch(self) -> Frame | None:
        self.last_id = self._id
        event, self._event = self._event, b""
        if not self._data:
            return None
        data = _text(self._data[:-1])  # without the LF after the last line
        self._data.clear()
        return Frame(data, _text(event) if event else "message", self._id)


def _text(raw: bytes | bytearray) -> str:
    return raw.decode("utf-8", "replace")
