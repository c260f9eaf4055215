"""The provider that needs no model and no network: it plans by rule, and quotes.

Knows: the words of a question, what a passage of a text is, and two tools by name, `search` and
`read`. Must never know where the texts are, or pretend that a model has spoken: every answer says
that it is quoted or made by rule, and its usage is zero tokens because there are none.

A question takes three model calls: words become a call of `search`, what that finds becomes calls
of `read`, what those give becomes quotes, each with its file and line. `plan` decides all of it
from the messages alone; nothing is kept between calls.
"""

import re
import unicodedata
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Literal, TypeAlias, TypeVar, assert_never

import attrs
import msgspec
import trio

from agentsse.errors import ProviderError
from agentsse.events import (
    AnyEvent,
    FinishReason,
    PartDelta,
    PartFinished,
    PartStarted,
    encode_json,
)
from agentsse.messages import Message, ToolMessage, UserMessage

from . import Caller, Finish, Prompt

PACE = 0.02  # seconds between two pieces of an answer: a terminal shows it live, nobody waits long
QUESTION_CHARACTERS = 2_000  # that are looked at: what is asked comes first, or is no question
PIECE_CHARACTERS = 24  # of an answer at a time: a screenful takes about one second
PASSAGE_LINES = 12  # as many as `read` gives unasked: what was found is what gets quoted
QUOTED_PASSAGES = 3  # more is a list of hits, not an answer
QUOTED_CHARACTERS = 1_200  # of one passage: minified code has lines without end
WORTH_READING = 0.4  # of the best score; below it a passage shares only a common word

# Words --------------------------------------------------------------------------------------------

# Ideographs and kana stand without spaces: each is a word. All other scripts make words of letters
# and digits; what is joined inside, as in `Last-Event-ID` or `max_events`, stays one word.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"
_WORD = rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+(?:[-_.'][^\W_{_IDEOGRAPHS}]+)*"
_STOPWORDS = frozenset(
    """
    a about all also am an and any are aren't as at be because been being but by can can't could
    did didn't do does doesn't doing don't explain find for from get give had happen happens has
    have having he her here him his how i i'd i'll i'm i've if in into is isn't it its just know let
    like many me mean means more most much my need no not of on one or our out over please s she
    should so some t tell than that the their them then there these they this those to too up us use
    used uses using very want was way we were what when where which while who why will with without
    won't work works would you you're your
    """.split()  # noqa: SIM905  # a list would be a page
)
# Composing takes time with the square of the combining marks in a row: 100,000 take 20 seconds.
_ENDLESS = re.compile(r"\S{200}")
_JOINER = re.compile(r"[-_.']")
_VOWEL = re.compile(r"[aeiouy]")
_SUFFIXES = (  # taken off in this order, each where at least three letters with a vowel stay
    re.compile(r"(?<![sui])s$"),
    re.compile(r"(?:ing|(?<!e)ed|e)$"),
    re.compile(r"(?<=([bdfgmnprt]))\1$|(?<=...l)l$"),
)


def fold(text: str) -> str:
    """A text in the form in which words are compared: composed, and without case."""
    if not text.isascii():
        text = text.replace("\u2019", "'")
        if not _ENDLESS.search(text):
            text = unicodedata.normalize("NFC", text)
    return text.casefold()


def all_words(folded: str) -> list[str]:
    """Every word of a folded text, in order, as often as it stands there."""
    return _words().findall(folded)


@cache
def _words() -> re.Pattern[str]:
    return re.compile(_WORD)  # 5 ms, for so many ideographs


def content_words(text: str) -> tuple[str, ...]:
    """The words of a question that are worth looking for.

    Returns:
        Case-folded words without English stopwords, each once, in order; an identifier such as
        `last-event-id` is one word.
    """
    words = (word.removesuffix("'s") for word in all_words(fold(text)))
    return tuple(dict.fromkeys(word for word in words if word not in _STOPWORDS))


@lru_cache(maxsize=8_192)
def stems(word: str) -> tuple[str, ...]:
    """What a case-folded word is compared by: its stem, then those of the parts it is joined of.

    English endings only, and only the frequent ones: `resume`, `resumes`, `resumed` and `resuming`
    are one, `server` and `serve` are two. `last-event-id` is itself, and `last`, `event`, `id`.
    """
    word = word.removesuffix("'s")
    parts = [part for part in _JOINER.split(word) if part not in _STOPWORDS]
    whole = word if len(parts) > 1 else "".join(parts) or word
    return tuple(dict.fromkeys(_stem(form) for form in (whole, *parts)))


def _stem(word: str) -> str:
    if not (word.isascii() and word.isalpha()):
        return word
    for suffix in _SUFFIXES:
        shorter = suffix.sub("", word)
        if len(shorter) >= 3 and _VOWEL.search(shorter):
            word = shorter
    return word[:-1] + "i" if word.endswith("y") else word


# Passages -----------------------------------------------------------------------------------------

_PROSE = frozenset({"", ".adoc", ".markdown", ".md", ".mdx", ".rst", ".txt"})
_HEADING = re.compile(r"(#{1,6})\s+(.*)")
_UNDERLINE = re.compile(r"([=\-])\1{2,}\s*$")
_RST_UNDERLINE = re.compile(r"([=\-~^\"'`+*#])\1{2,}\s*$")
_BULLET = re.compile(r"(?:[-*+]|\d{1,3}[.)])\s")
_FENCE = re.compile(r"\s*(```|~~~)")


@attrs.frozen
class Passage:
    """A piece of a text that can be read on its own: a paragraph, a list item, a block of code.

    Attributes:
        line: Where it begins, counted from 1.
        text: Its lines, without blank ones at the end.
        headings: The headings that it stands under, the outermost first.
    """

    line: int
    text: str
    headings: tuple[str, ...] = ()


def split_lines(text: str) -> list[str]:
    """The lines of a text as an editor counts them, whatever ends them."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def split_passages(file: str, lines: Sequence[str]) -> list[Passage]:
    """Cut a file into passages of at most 12 lines.

    Blank lines cut; in prose, by the ending of its name, so do headings (`# so`, or underlined) and
    list items, while a fence holds together, and a line that ends in a colon holds on to what it
    announces. A heading with nothing below it is a passage itself.
    """
    suffix = PurePosixPath(file).suffix.lower()
    prose = suffix in _PROSE
    fences = prose and suffix != ".rst"
    underline = _UNDERLINE if fences else _RST_UNDERLINE
    found: list[tuple[int, list[str], tuple[str, ...]]] = []
    above: dict[int, str] = {}  # the headings in force, by level
    fence = ""
    is_open = False  # the last passage takes more lines
    is_bare = False  # the last passage is a heading with nothing below it
    for number, (line, below) in enumerate(pairwise([*lines, ""]), 1):
        if (
            prose
            and not fence
            and (heading := _heading_of(line, "" if is_open else below, underline))
        ):
            level, title = heading
            above = {outer: text for outer, text in above.items() if outer < level}
            found.append((number, [line], tuple(above.values())))
            above[level] = title
            is_open, is_bare = False, True
            continue
        if is_bare and not fence and underline.match(line):
            continue
        # The last two lines: between the announcement and the announced there may be a blank one.
        announced = is_open and "".join(found[-1][1][-2:]).rstrip().endswith(":")
        if not fence and not announced and (not line.strip() or (prose and _BULLET.match(line))):
            is_open = False
        if is_open and len(found[-1][1]) == PASSAGE_LINES:
            is_open = False
        if is_open:
            found[-1][1].append(line)
        elif line.strip():
            if is_bare:
                found.pop()
            found.append((number, [line], tuple(above.values())))
            is_open, is_bare = True, False
        if fences and (mark := _FENCE.match(line)) and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
    return [Passage(number, "\n".join(block).rstrip(), up) for number, block, up in found]


def _heading_of(line: str, below: str, underline: re.Pattern[str]) -> tuple[int, str] | None:
    """The level and the title of a heading, if `line` is one."""
    if mark := _HEADING.match(line):
        return len(mark[1]), mark[2].rstrip("# \t")
    if line.strip() and (mark := underline.match(below)):
        return {"=": 1, "-": 2}.get(mark[1], 3), line.strip()
    return None


# Chunks and the plan ------------------------------------------------------------------------------


@attrs.frozen
class Words:
    """A piece of what is said."""

    kind: Literal["reasoning", "text"]
    text: str


@attrs.frozen
class Call:
    """A whole tool call; `arguments` is JSON text."""

    name: str
    arguments: str


@attrs.frozen
class End:
    """The end of the stream; always last, once."""

    reason: FinishReason


Chunk: TypeAlias = Words | Call | End

_WHO = (
    "This is agentsse's `offline` provider: it runs no language model. It looks for the words of a "
    "question in a folder of text files, and quotes what it finds."
)
_MODEL = "For answers by a model, give an agent a `Provider` that speaks to one."


class _Place(msgspec.Struct, frozen=True):
    file: str
    line: int
    score: float = 0.0


class _Found(msgspec.Struct, frozen=True):
    passages: tuple[_Place, ...]
    files_searched: int = 0
    files_skipped: int = 0


class _Read(msgspec.Struct, frozen=True):
    file: str
    first: int
    text: str


_Answer = TypeVar("_Answer", _Found, _Read)


def plan(prompt: Prompt) -> list[Chunk]:
    """Decide what comes next, from the messages alone.

    Returns:
        The whole stream: calls of `search` or `read`, or the answer, and the end.
    """
    question, results = _last_turn(prompt.messages)
    words = content_words(question[:QUESTION_CHARACTERS])
    tools = {tool.name for tool in prompt.tools}
    reads = [result for result in results if result.name == "read"]
    searches = [result for result in results if result.name == "search"]
    if reads:
        return _said(_quotes(reads))
    if searches:
        found = _decoded(searches[-1], _Found)
        if isinstance(found, str):
            return _said(f"The search failed: {found}\n\n{_WHO}")
        if not found.passages:
            return _said(_nothing(words, found))
        places = _worth_reading(found.passages)
        if "read" not in tools:
            named = "\n".join(f"- `{place.file}:{place.line}`" for place in places)
            return _said(f"These places answer best; there is no tool to read them:\n\n{named}")
        return _called(
            f"Reading: {', '.join(f'{place.file}:{place.line}' for place in places)}",
            [("read", {"file": place.file, "line": place.line}) for place in places],
        )
    if "search" not in tools:
        return _said(f"{_WHO} Here it has no `search` tool, so it cannot answer. {_MODEL}")
    if not words:
        return _said(
            f"{_WHO} Your message has no word to look for, only common ones: name the thing that "
            f'you want to know about, as in "How do I resume a stream?". {_MODEL}'
        )
    return _called(f"Searching for: {', '.join(words)}", [("search", {"query": " ".join(words)})])


def _last_turn(messages: Sequence[Message]) -> tuple[str, list[ToolMessage]]:
    """The last question, and what tools have answered since."""
    results: list[ToolMessage] = []
    for message in reversed(messages):
        if isinstance(message, UserMessage):
            return message.text, results[::-1]
        if isinstance(message, ToolMessage):
            results.append(message)
    return "", results[::-1]


def _decoded(message: ToolMessage, kind: type[_Answer]) -> _Answer | str:
    """What a tool answered, or a sentence about why that is of no use."""
    if message.is_error:
        return message.content
    try:
        return msgspec.json.decode(message.content, type=kind)
    except msgspec.DecodeError as error:
        return f"`{message.name}` answered in a shape that is not known here: {error}."


def _worth_reading(places: Sequence[_Place]) -> list[_Place]:
    """The best places, each once, the best first; places far behind the best are left out."""
    enough = WORTH_READING * max(place.score for place in places)
    distinct = {(place.file, place.line): place for place in places if place.score >= enough}
    return list(distinct.values())[:QUOTED_PASSAGES]


def _quotes(reads: Sequence[ToolMessage]) -> str:
    quotes: list[str] = []
    troubles: list[str] = []
    for message in reads:
        read = _decoded(message, _Read)
        if isinstance(read, str):
            troubles.append(f"A passage could not be read: {read}")
        else:
            quotes.append(_quote(read))
    lead = "These passages of the folder answer best (quoted, not written by a model):"
    return "\n\n".join([lead, *quotes, *troubles] if quotes else [*troubles, _WHO])


def _quote(read: _Read) -> str:
    """The passage that begins where was read, or just after its heading, as a Markdown quote."""
    passages = split_passages(read.file, split_lines(read.text))
    text = passages[0].text if passages else ""
    line = read.first + (passages[0].line - 1 if passages else 0)
    if len(text) > QUOTED_CHARACTERS:
        text = f"{text[:QUOTED_CHARACTERS]}\u2026"
    quoted = "\n".join(f"> {row}".rstrip() for row in text.split("\n"))
    return f"{quoted}\n\n`{read.file}:{line}`"


def _nothing(words: Sequence[str], found: _Found) -> str:
    skipped = f", {found.files_skipped} skipped" if found.files_skipped else ""
    return (
        f"Nothing in the folder matches: {', '.join(words)} "
        f"({found.files_searched} files searched{skipped}). Try words that the files themselves "
        "use, or serve another folder with `agentsse serve --folder PATH`.\n\n"
        f"{_WHO} {_MODEL}"
    )


def _said(text: str) -> list[Chunk]:
    return [*(Words("text", piece) for piece in _pieces(text)), End("stop")]


def _called(reasoning: str, calls: Sequence[tuple[str, dict[str, object]]]) -> list[Chunk]:
    return [
        Words("reasoning", reasoning),
        *(Call(name, bytes(encode_json(arguments)).decode()) for name, arguments in calls),
        End("tool_calls"),
    ]


def _pieces(text: str) -> Iterator[str]:
    """Cut a text between words; joined again, the pieces are the text."""
    piece = ""
    for word in re.findall(r"\s*\S+|\s+$", text):
        piece += word
        if len(piece) >= PIECE_CHARACTERS:
            yield piece
            piece = ""
    if piece:
        yield piece


# The seams ----------------------------------------------------------------------------------------


@attrs.define
class OfflineNormalizer:
    """Turns chunks into part events: words of one kind in a row are one part, a call is one."""

    prefix: str
    _parts: int = 0
    _calls: int = 0
    _open: PartStarted | None = None
    _text: str = ""
    _has_ended: bool = False

    @property
    def is_over(self) -> bool:
        """Whether an `End` has come."""
        return self._has_ended

    def feed(self, chunk: Chunk, /) -> list[AnyEvent | Finish]:
        """Take one chunk; never raises."""
        match chunk:
            case Words(kind=kind, text=text):
                events: list[AnyEvent | Finish] = []
                if self._open is None or self._open.kind != kind:
                    events += self._finish_part()
                    self._open = PartStarted(part_id=self._part_id(), kind=kind)
                    events.append(self._open)
                self._text += text
                return [
                    *events,
                    PartDelta(part_id=self._open.part_id, kind=kind, delta=text),
                ]
            case Call(name=name, arguments=arguments):
                self._calls += 1
                events = self._finish_part()
                started = PartStarted(
                    part_id=self._part_id(),
                    kind="tool_call",
                    name=name,
                    call_id=f"{self.prefix}c{self._calls}",
                )
                self._open, self._text = started, arguments
                delta = PartDelta(part_id=started.part_id, kind="tool_call", delta=arguments)
                return [*events, started, delta, *self._finish_part()]
            case End(reason=reason):
                self._has_ended = True
                return [*self._finish_part(), Finish(reason)]
            case _:
                assert_never(chunk)

    def close(self) -> list[AnyEvent | Finish]:
        """Take note that the stream is over; raises `ProviderError` if no `End` had come."""
        if not self._has_ended:
            raise ProviderError(
                "expected an end chunk from the offline provider, got the end of the stream"
            )
        return []

    def _part_id(self) -> str:
        self._parts += 1
        return f"{self.prefix}p{self._parts}"

    def _finish_part(self) -> list[AnyEvent | Finish]:
        if (part := self._open) is None:
            return []
        text, self._open, self._text = self._text, None, ""
        return [
            PartFinished(
                part_id=part.part_id,
                kind=part.kind,
                text=text,
                name=part.name,
                call_id=part.call_id,
            )
        ]


@attrs.define
class _Paced:
    """An iterator over chunks that takes its time before each piece of what is said."""

    _chunks: Iterator[Chunk]
    _pace: float

    def __aiter__(self) -> "_Paced":
        return self

    async def __anext__(self) -> Chunk:
        chunk = next(self._chunks, None)
        await trio.sleep(self._pace if isinstance(chunk, Words) else 0)
        if chunk is None:
            raise StopAsyncIteration
        return chunk


@attrs.define
class OfflineProvider:
    """The provider named `offline`: for every question it searches, reads and quotes.

    Attributes:
        pace: Seconds before each piece of text; with 0 each is still a checkpoint.
    """

    pace: float = PACE
    name: str = "offline"

    @asynccontextmanager
    async def open(self, _caller: Caller, /) -> AsyncIterator["OfflineProvider"]:
        """Open nothing: it is its own connection, for any number of runs."""
        await trio.lowlevel.checkpoint()
        yield self

    @asynccontextmanager
    async def stream(self, prompt: Prompt, /) -> AsyncIterator[AsyncIterator[Chunk]]:
        """Open the stream of one call; it holds nothing, so that leaving has nothing to close."""
        await trio.lowlevel.checkpoint()
        yield _Paced(iter(plan(prompt)), self.pace)

    def normalizer(self, prefix: str, /) -> OfflineNormalizer:
        """Make a machine for one call; its part and call ids begin with `prefix`."""
        return OfflineNormalizer(prefix)
