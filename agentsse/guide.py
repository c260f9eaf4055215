"""The built-in agent: it answers questions about a folder of text files, and needs no model.

Knows: the folder, which of its files may be seen, and which passages fit a question best. Must
never know who asks, or whether a model or a rule decides what to look for: it gives an agent two
tools, `search` and `read`, and the `offline` provider to start with.

Both tools see the same files, and no others: regular text files below the folder, none of them
hidden. A link that leads out of the folder leads nowhere. Nothing is kept between two searches, so
that there is no index to go stale; a search reads file by file and remembers only the best.
"""

import heapq
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import attrs
from msgspec import Meta

from .agents import Agent
from .context import emit
from .errors import ConfigError, ToolError
from .providers.offline import (
    PASSAGE_LINES,
    all_words,
    content_words,
    fold,
    split_lines,
    split_passages,
    stems,
)
from .tools import Tool, is_cancelled, tool

FILE_BYTES = 4 * 1024 * 1024  # larger ones are data, not something that people read
SNIFFED_BYTES = 8 * 1024  # where a NUL shows that a file is no text, as Git decides it too
READ_LINES = 200  # in one answer: several screens, still little of a model's context
READ_CHARACTERS = 16 * 1024  # the same bound for files with long lines
PASSAGE_CHARACTERS = 600  # of a passage in the list; `read` gives it whole
MOST_PASSAGES = 50  # in one answer
QUERY_CHARACTERS = 1_000  # a question; whoever pastes a book asks for its first words
MOST_WORDS = 12  # of a query: more make it slower and no better
MOST_TERMS = 24  # those words, and the parts of identifiers among them
WORD_CHARACTERS = 64  # what is longer is encoded data
CODE_WEIGHT = 0.6  # of a fenced block: it often repeats a question, and seldom answers it
# How BM25's two constants are usually set, for passages of a usual length.
SATURATION = 1.2
LENGTH_WEIGHT = 0.5
USUAL_CHARACTERS = 400
SHORT_CHARACTERS = 120  # what is shorter has no advantage: it says little
OUTER_WEIGHT = 0.3  # of a word that stands only in the file's name or in an outer heading
PROGRESS_SECONDS = 0.5  # between two reports: often enough to see that it is alive

_UNSEEN = frozenset({"__pycache__", "node_modules", "venv"})  # made by tools, read by nobody
_HERE = Path(__file__).parent

_INSTRUCTIONS = """\
You answer questions about a folder of text files. Search it first, with the words that its files
are likely to use, then read around the best passages. Answer only from what you have read: quote
it, and name the place of each quote as `file:line`. If the folder does not say, say so."""

Result = dict[str, Any]
"""What a tool answers: JSON's own types."""


# The folder ---------------------------------------------------------------------------------------


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


@attrs.frozen
class Folder:
    """A folder, or a single file, as far as it may be seen.

    Attributes:
        root: The real path of the folder, or of the one file.
    """

    root: Path = attrs.field(converter=_real)

    def files(self, skipped: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Walk over all that may be seen, the files of a folder before its folders, by name.

        Args:
            skipped: Called for every folder that cannot be entered.

        Yields:
            Paths below the root, with slashes; some may turn out to be no text.
        """
        if not self.root.is_dir():
            yield self.root.name
            return
        waiting = [self.root]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    seen = sorted((e for e in entries if _is_seen(e.name)), key=lambda e: e.name)
            except OSError:
                skipped()
                continue
            folders = [Path(e.path) for e in seen if e.is_dir(follow_symlinks=False)]
            waiting += [inner for inner in reversed(folders) if not _is_venv(inner)]
            for entry in seen:
                if not entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path).relative_to(self.root).as_posix()

    def text(self, file: str) -> str | None:
        """Read a file.

        Args:
            file: Its path, as `files` gives it; nothing is taken for granted about it.

        Returns:
            Its text, undecodable bytes replaced; None where it may not be seen, is not there, is
            no text or is too large.
        """
        try:
            path = self._find(file)
            if path is None or not stat.S_ISREG(path.stat().st_mode):
                return None
            with path.open("rb") as opened:
                content = opened.read(FILE_BYTES + 1)
        except (OSError, ValueError):  # ValueError: a name that no file can have, with a NUL in it
            return None
        if len(content) > FILE_BYTES or b"\0" in content[:SNIFFED_BYTES]:
            return None
        return content.decode("utf-8-sig", "replace")

    def _find(self, file: str) -> Path | None:
        file.encode()  # a name on disk that is no UTF-8 could not be told in JSON
        if not self.root.is_dir():
            return self.root if file == self.root.name else None
        path = self.root
        for part in PurePosixPath(file).parts:
            path /= part
            if not _is_seen(part) or _is_venv(path):
                return None
        real = _real(path)  # a link may lead out, or to what is hidden
        if not real.is_relative_to(self.root):
            return None
        return real if all(map(_is_seen, real.relative_to(self.root).parts)) else None


def _is_seen(name: str) -> bool:
    return not (name.startswith(".") or name in _UNSEEN)


def _is_venv(folder: Path) -> bool:
    return Path(folder, "pyvenv.cfg").exists()


# Searching ----------------------------------------------------------------------------------------


@attrs.frozen
class _Hit:
    file: str
    line: int
    text: str  # cut: many are kept, and the lines of some files have no end
    saturated: tuple[float, ...]  # per term: how much of it there is, from 0 to 1


@attrs.define
class Ranking:
    """A pure machine that is fed files, and knows the best passages of all that it has seen.

    Passages are ranked as by BM25: a rare word counts more than a common one, a second occurrence
    less than the first, a long passage less than a short one. How rare a word is is known only at
    the end; so the best are kept for each set of words that they match, and weighed then.

    Attributes:
        words: What is looked for; identifiers count as a whole, and a little by their parts.
        limit: How many passages will be asked for.
    """

    words: tuple[str, ...]
    limit: int
    _weights: dict[str, float] = attrs.field(init=False)
    _places: dict[str, int] = attrs.field(init=False)
    _prefixes: tuple[str, ...] = attrs.field(init=False)
    _frequencies: list[int] = attrs.field(init=False)
    _passages: int = 0
    _order: int = 0
    _kept: dict[tuple[bool, ...], list[tuple[float, int, _Hit]]] = attrs.field(
        init=False, factory=dict
    )

    def __attrs_post_init__(self) -> None:
        forms = [stems(word) for word in self.words[:MOST_WORDS]]
        weights = {whole: 1.0 for whole, *_ in forms}
        for _, *parts in forms:
            weights = dict.fromkeys(parts, 1 / max(len(parts), 1)) | weights
        best_first = sorted(weights.items(), key=lambda item: -item[1])
        self._weights = dict(best_first[:MOST_TERMS])
        self._places = {stem: place for place, stem in enumerate(self._weights)}
        # A word begins with its stem, but for a final y that has become an i.
        self._prefixes = tuple(stem.removesuffix("i") for stem in self._weights)
        self._frequencies = [0] * len(self._weights)

    def feed(self, file: str, text: str) -> None:
        """Take a file."""
        if not self._may_match(fold(f"{file}\n{text}")):
            self._passages += text.count("\n\n") + 1
            return
        around: dict[tuple[str, ...], list[float]] = {}
        for passage in split_passages(file, split_lines(text)):
            self._passages += 1
            if passage.headings not in around:
                around[passage.headings] = self._count_around(file, passage.headings)
            inside = self._count(passage.text)
            counts = [a + b for a, b in zip(inside, around[passage.headings], strict=True)]
            if any(counts):
                shown = _cut(passage.text, PASSAGE_CHARACTERS)
                saturated = self._saturated(counts, characters=len(passage.text))
                if "```" in passage.text:
                    saturated = tuple(CODE_WEIGHT * value for value in saturated)
                self._keep(_Hit(file, passage.line, shown, saturated))

    def _count_around(self, file: str, headings: Sequence[str]) -> list[float]:
        """What a passage owes to its place: the nearest heading counts as if it stood in it."""
        *outer, nearest = headings or ("",)
        return [
            1.0 if near else OUTER_WEIGHT * bool(far)
            for near, far in zip(
                self._count(nearest), self._count(" ".join([file, *outer])), strict=True
            )
        ]

    def _may_match(self, folded: str) -> bool:
        """Tell quickly where it is of no use to look at each word."""
        return any(prefix in folded for prefix in self._prefixes)

    def _count(self, text: str) -> list[float]:
        """How often each term stands in a text."""
        counts = [0.0] * len(self._places)
        folded = fold(text)
        for word in all_words(folded) if self._may_match(folded) else ():
            if len(word) <= WORD_CHARACTERS and (
                word.startswith(self._prefixes) or not word.isalnum()
            ):
                for stem in stems(word):
                    if (place := self._places.get(stem)) is not None:
                        counts[place] += 1
        return counts

    def _saturated(self, counts: Sequence[float], *, characters: int) -> tuple[float, ...]:
        length = max(characters, SHORT_CHARACTERS) / USUAL_CHARACTERS
        norm = SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * length)
        return tuple(count / (count + norm) for count in counts)

    def _keep(self, hit: _Hit) -> None:
        matched = tuple(value > 0 for value in hit.saturated)
        self._frequencies = [
            frequency + match for frequency, match in zip(self._frequencies, matched, strict=True)
        ]
        self._order -= 1
        item = (_dot(self._weights.values(), hit.saturated), self._order, hit)
        kept = self._kept.setdefault(matched, [])
        if len(kept) == self.limit and item < kept[0]:
            return
        if any(other.text == hit.text for _, _, other in kept):
            return  # from a copy of the same file, most likely
        (heapq.heappush if len(kept) < self.limit else heapq.heapreplace)(kept, item)

    def best(self) -> list[Result]:
        """The best passages, each text once; of equally good ones the first that came."""
        rarities = [
            weight * math.log(1 + (self._passages - frequency + 0.5) / (frequency + 0.5))
            for weight, frequency in zip(self._weights.values(), self._frequencies, strict=True)
        ]
        ranked = sorted(
            (
                (_dot(rarities, hit.saturated), order, hit)
                for kept in self._kept.values()
                for _, order, hit in kept
            ),
            reverse=True,
        )
        distinct: dict[str, Result] = {}
        for score, _, hit in ranked:
            place = {"file": hit.file, "line": hit.line, "score": round(score, 2)}
            distinct.setdefault(hit.text, place | {"text": hit.text})
        return list(distinct.values())[: self.limit]


def _dot(weights: Iterable[float], values: Iterable[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True))


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]}\u2026"


def search_folder(
    folder: Folder,
    query: str,
    *,
    limit: int,
    report: Callable[[int], object] = lambda _: None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Look for the passages that fit a query best. Blocks; reads every file once.

    Args:
        folder: Where.
        query: What; stopwords in it are ignored.
        limit: How many passages at most.
        report: Called before each file with the number of files that are done.
        is_cancelled: Asked before each file; once it says so, the search is over.

    Raises:
        ToolError: The query has no word to look for.
    """
    words = content_words(query[:QUERY_CHARACTERS])[:MOST_WORDS]
    if not words:
        raise ToolError(
            "expected a query with at least one word besides common ones such as 'how' and 'the', "
            f"got {query!r}; name the thing to look for"
        )
    ranking = Ranking(words, limit)
    searched = 0
    skipped: list[None] = []
    for file in folder.files(lambda: skipped.append(None)):
        if is_cancelled():
            break
        report(searched + len(skipped))
        text = folder.text(file)
        if text is None:
            skipped.append(None)
        else:
            searched += 1
            ranking.feed(file, text)
    return {
        "words": list(words),
        "files_searched": searched,
        "files_skipped": len(skipped),
        "passages": ranking.best(),
    }


def _tell(files: int) -> None:
    emit("searching", files=files)


@attrs.define
class Progress:
    """Tells the run how far a search has come: not at once, but then every half a second."""

    tell: Callable[[int], object] = _tell
    clock: Callable[[], float] = time.monotonic
    _next: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._next = self.clock() + PROGRESS_SECONDS

    def report(self, files: int) -> None:
        """Tell that so many files are done, if it is time to."""
        if (now := self.clock()) >= self._next:
            self._next = now + PROGRESS_SECONDS
            self.tell(files)


# Reading ------------------------------------------------------------------------------------------


def read_file(folder: Folder, file: str, *, line: int, lines: int) -> Result:
    """Read some lines of a file. Blocks.

    Args:
        folder: Where.
        file: Its path below the folder.
        line: The first line, counted from 1.
        lines: How many; fewer come where the file ends, or where they are very long.

    Raises:
        ToolError: There is no such file, or no such line.
    """
    text = folder.text(file)
    if text is None:
        raise ToolError(
            f"expected a text file of the folder by its path as search gives it "
            f"(such as {next(folder.files(), 'README.md')!r}), got {file!r}; search for it first"
        )
    rows = split_lines(text)
    if line > len(rows):
        raise ToolError(f"expected a line of {file!r} from 1 to {len(rows)}, got {line}")
    kept: list[str] = []
    for row in rows[line - 1 : line - 1 + lines]:
        if kept and sum(map(len, kept)) + len(kept) + len(row) > READ_CHARACTERS:
            break
        kept.append(_cut(row, READ_CHARACTERS))
    return {
        "file": file,
        "first": line,
        "last": line + len(kept) - 1,
        "text": "\n".join(kept),
        "total_lines": len(rows),
    }


# The agent ----------------------------------------------------------------------------------------


def folder_tools(root: Path) -> tuple[Tool, ...]:
    """Make the tools `search` and `read` for a folder, or for a single file.

    Args:
        root: What they may see; files that come later are found too.

    Raises:
        ConfigError: It does not exist, or there is nothing to see in it.
    """
    folder = Folder(root)
    if not (folder.root.is_dir() or folder.root.is_file()):
        raise ConfigError(
            f"expected a folder of text files, or one file, got {str(root)!r}, which is neither; "
            "name another with --folder PATH"
        )
    if next(folder.files(), None) is None:
        raise ConfigError(
            f"expected a folder with text files in it, got {str(root)!r}, where there is none "
            "(hidden ones do not count); put some there, or name another with --folder PATH"
        )

    @tool
    def search(query: str, limit: Annotated[int, Meta(ge=1, le=MOST_PASSAGES)] = 5) -> Result:
        """Search the folder's text files for passages that fit a query best, the best first.

        Args:
            query: The words to look for; rare words and identifiers count most.
            limit: How many passages to return at most.
        """
        return search_folder(
            folder, query, limit=limit, report=Progress().report, is_cancelled=is_cancelled
        )

    @tool
    def read(
        file: str,
        line: Annotated[int, Meta(ge=1)] = 1,
        lines: Annotated[int, Meta(ge=1, le=READ_LINES)] = PASSAGE_LINES,
    ) -> Result:
        """Read lines of one of the folder's text files.

        Args:
            file: Its path, as search gives it.
            line: The first line to read, counted from 1.
            lines: How many lines to read.
        """
        return read_file(folder, file, line=line, lines=lines)

    return search, read


def default_folder() -> Path:
    """Find the README.md that agentsse comes with: in the package, or beside it in a checkout.

    Raises:
        ConfigError: It is in neither place.
    """
    for folder in (_HERE, _HERE.parent):
        if (readme := folder / "README.md").is_file():
            return readme
    raise ConfigError(
        f"expected agentsse's README.md in {str(_HERE)!r}, got nothing there; "
        "name a folder of text files with --folder PATH"
    )


def guide(folder: Path | None = None) -> Agent:
    """Make the built-in agent.

    Args:
        folder: What it answers questions about: a folder of text files, or a single one; None for
            agentsse's own README.md.

    Raises:
        ConfigError: There is nothing there to answer from.
    """
    root = default_folder() if folder is None else folder
    return Agent.of_model(
        name="guide",
        model="offline:quote",
        instructions=_INSTRUCTIONS,
        tools=folder_tools(root),
        description=f"Answers questions about {_real(root).name}: searches it, reads, and quotes.",
    )
