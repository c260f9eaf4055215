r"""What half a Markdown text is to be given, so that it does not swallow what follows it.

Knows: CommonMark 0.31 as far as something in it can stay open: fences (4.5), HTML blocks (4.6), the
containers that either may stand in (5), raw HTML in a paragraph (6.6); of HTML, how a tag, a
comment and a script begin and end. Must never know who has cut the text, nor what follows.

Theory. Two things can be left open, one below the other. Markdown's own: a fence, or a block of
HTML that only a marker ends. And HTML's, which passes through Markdown as it is: a `<details>` is
open, whatever paragraphs and lists have come since. So lines are read by the block rules, which
say what of them is HTML and what is text or code; what is HTML goes to a small tokenizer that keeps
what is open. A paragraph is read when it ends: only then is it known what in it was code.

What is open inside of a list item or a quote is closed there, with the same indentation: at the
margin, the mark that ends a fence would begin one.

Each character is looked at a bounded number of times, whatever the text.
"""

import re
from collections import Counter
from typing import Final, Literal, TypeAlias

import attrs

MAX_LENGTH: Final = 64 * 1024  # characters: 0.2 s at worst, in which nobody else has a turn
MAX_DEPTH: Final = 20  # containers within one another; what is deeper is taken for text

_SCOPES: Final = frozenset({"table", "td", "th", "caption"})  # an end tag ends nothing around one
_TABLE: Final = _SCOPES | {"tr", "thead", "tbody", "tfoot"}
_CLOSED: Final = _TABLE | {"div", "details", "summary", "pre"}
_RAW: Final = ("script", "style", "textarea")  # what stands in these is no HTML
_RAW_ENDS: Final = {
    f"</{name}": re.compile(rf"</{name}(?=[\s/>]|$)", re.IGNORECASE) for name in _RAW
}
# What begins a block of HTML wherever it stands at the beginning of a line (4.6, condition 6).
_BLOCKS: Final = (
    "address article aside base basefont blockquote body caption center col colgroup dd details "
    "dialog dir div dl dt fieldset figcaption figure footer form frame frameset h1 h2 h3 h4 h5 h6 "
    "head header hr html iframe legend li link main menu menuitem nav noframes ol optgroup option "
    "p param search section summary table tbody td tfoot th thead title tr track ul"
).replace(" ", "|")

_ATTRIBUTES = (
    r"(?:\s++[A-Za-z_:][\w.:-]*+"
    r"(?:\s*+=\s*+(?:[^\s\"'=<>`]++|'[^']*+'|\"[^\"]*+\"))?+)*+"
)
_OPEN_TAG = rf"<[A-Za-z][A-Za-z0-9-]*+{_ATTRIBUTES}\s*+/?>"
_CLOSING_TAG = r"</[A-Za-z][A-Za-z0-9-]*+\s*+>"

_LINE_END = re.compile(r"\r\n|\r|\n")  # and nothing else: str.splitlines knows others
_QUOTE = re.compile(r" {0,3}> ?")
_ITEM = re.compile(r" {0,3}(?:[-+*]|(?P<number>[0-9]{1,9})[.)])(?P<gap> +|$)")
_BREAK = re.compile(r" {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+) *$")
_HEADING = re.compile(r" {0,3}#{1,6}(?: |$)")
_FENCE = re.compile(r" {0,3}(?:(`{3,})[^`]*|(~{3,}).*)$")
_MARKED_BLOCK = re.compile(r" {0,3}(<!--|<\?|<![A-Za-z]|<!\[CDATA\[)")
_PRE_BLOCK = re.compile(r" {0,3}<(?:script|pre|style|textarea)(?=[\s>]|$)", re.IGNORECASE)
_PRE_END = re.compile(r"</(?:script|pre|style|textarea)>", re.IGNORECASE)
_TAG_BLOCK = re.compile(
    rf" {{0,3}}(?:</?(?:{_BLOCKS})(?=\s|/?>|$)"
    rf"|(?:{_CLOSING_TAG}|(?!<(?:script|pre|style|textarea)[\s/>]){_OPEN_TAG})(?P<alone>\s*$))",
    re.IGNORECASE,
)
_INLINE = re.compile(
    r"\\[!-/:-@\[-`{-~]"
    r"|(?P<ticks>`+)"
    r"|<[A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]*+>"
    r"|(?P<marker><!--|<\?|<!\[CDATA\[|<![A-Za-z])"
    rf"|(?P<tag>{_OPEN_TAG}|{_CLOSING_TAG})"
)
_TICKS = re.compile(r"`+")
_MARKUP = re.compile(r"<(?:!--|!\[CDATA\[|!|\?|/?([A-Za-z][^\s/>]*)|/)")
_IN_TAG = re.compile(r"[^>=]*+(?P<stop>= *+[\"']?|>|$)")

_ENDS: Final = {"<!--": "-->", "<?": "?>", "<![CDATA[": "]]>"}  # of `<!` and a letter: `>`

_Block: TypeAlias = Literal["tag", "pre", "marked"]
"""A block of HTML that ends at a blank line, at an end tag, or at the end of what it began with."""


def closing(text: str, *, max_length: int = MAX_LENGTH) -> str:
    """Say what must be appended to a text that was cut off anywhere.

    Args:
        text: Markdown, with HTML in it or not.
        max_length: What is longer is left as it is.

    Returns:
        What closes that which is open in `text`: a fence, a comment, a half tag, a script, block
        tags from the innermost on. Empty where nothing is. What follows it is to begin with a
        blank line, since that alone ends a paragraph.
    """
    if len(text) > max_length:
        return ""
    *lines, last = _LINE_END.split(text)
    reader = _Reader()
    for line in lines:
        reader.take(line)
    if last:
        reader.take(last)
    return reader.close(is_in_line=bool(last))


# HTML ---------------------------------------------------------------------------------------------


@attrs.define
class _Html:
    """What of HTML is open: tags, and the one tag, comment or script that is being read.

    Attributes:
        open: Names of open tags, the outermost first.
        until: What ends the comment or script that is open.
        name: Of the tag that is open itself; with `/` before it, of an end tag.
        quote: Around the attribute that is open in it.
    """

    open: list[str] = attrs.field(factory=list)
    until: str = ""
    name: str = ""
    quote: str = ""
    _tables: Counter[str] = attrs.field(factory=Counter)  # how often each is open, of tables
    _here: list[Counter[str]] = attrs.field(factory=lambda: [Counter()])  # of others, by scope

    def feed(self, html: str) -> None:
        """Read more of it: a line, or what stands between two pieces of text."""
        at = 0
        while at < len(html):
            if self.until:
                at = self._end_of_raw(html, at)
            elif self.name:
                at = self._end_of_tag(html, at)
            elif (found := _MARKUP.search(html, at)) is None:
                return
            else:
                at = found.end()
                if found[1]:
                    self.name = found[0][1:].lower()
                elif found[0] == "<!--":
                    self.until = "-->"
                    at -= 2  # `<!-->` is a whole comment
                else:
                    self.until = ">"

    def take_text(self) -> None:
        """Note that text follows, in a tag of its own: the `>` of that ends whatever it can."""
        if self.until == ">":
            self.until = ""
        elif self.name and not self.quote:
            self._end_tag()

    def half_end(self) -> str:
        """What ends the half tag, the comment or the script that is being read."""
        if self.name:
            return f"{self.quote}>"
        return f"{self.until}>" if self.until.startswith("</") else self.until

    def _end_of_raw(self, html: str, at: int) -> int:
        until = self.until
        if not until.startswith("</"):
            end = html.find(until, at)
            if end < 0:
                return len(html)
            self.until = ""
            return end + len(until)
        found = _RAW_ENDS[until].search(html, at)
        if found is None:
            return len(html)
        self.until, self.name = "", until[1:]
        return found.end()

    def _end_of_tag(self, html: str, at: int) -> int:
        if self.quote:
            end = html.find(self.quote, at)
            if end < 0:
                return len(html)
            self.quote = ""
            return end + 1
        found = _IN_TAG.match(html, at)
        assert found is not None  # it fits the end of the line at the latest
        if found["stop"] == ">":
            self._end_tag()
        elif found["stop"][-1:] in ('"', "'"):
            self.quote = found["stop"][-1]
        return found.end()

    def _end_tag(self) -> None:
        name, self.name = self.name, ""
        if name in _RAW:
            self.until = f"</{name}"
        elif name.startswith("/"):
            self._close_tag(name[1:])
        elif name in _CLOSED:
            self._open_tag(name)

    def _open_tag(self, name: str) -> None:
        if name not in _TABLE:
            self._here[-1][name] += 1
        elif name == "table" or self._tables["table"]:
            self._tables[name] += 1
            if name in _SCOPES:
                self._here.append(Counter())
        else:  # HTML overlooks parts of a table that there is not
            return
        self.open.append(name)

    def _close_tag(self, name: str) -> None:
        counts = self._tables if name in _TABLE else self._here[-1]
        if not counts[name]:
            return
        last = ""
        while last != name:  # what is within it ends with it
            last = self.open.pop()
            if last in _SCOPES:
                self._here.pop()
            counts = self._tables if last in _TABLE else self._here[-1]
            counts[last] -= 1


# Markdown -----------------------------------------------------------------------------------------


@attrs.define
class _Reader:
    """The blocks of a text, line by line, as far as they matter here.

    Attributes:
        containers: The open ones, the outermost first: 0 for a quote, for a list item how far what
            belongs to it is indented.
        fence: What closes the open fence.
        block: The block of HTML that is open.
        end: What ends it, where a marker does.
        paragraph: Lines of the open one.
        is_bare: The innermost container is a list item, and nothing but its mark was seen.
    """

    containers: list[int] = attrs.field(factory=list)
    fence: str = ""
    block: _Block | None = None
    end: str = ""
    paragraph: list[str] = attrs.field(factory=list)
    is_bare: bool = False
    html: _Html = attrs.field(factory=_Html)

    def take(self, line: str) -> None:
        """Take the next line, without its end."""
        line, within = self._strip(line.expandtabs(4) if "\t" in line else line)
        if within == len(self.containers):
            if self.fence:
                self._see_end_of_fence(line)
                return
            if self.block is not None and (self.block != "tag" or line.strip(" ")):
                self._take_html(line)
                return
        self.fence, self.block, self.end = "", None, ""
        self._begin(line, within)

    def close(self, *, is_in_line: bool) -> str:
        """Say what closes all that is open.

        Args:
            is_in_line: The last line has no end, and is not empty.
        """
        margin = "".join(" " * width if width else "> " for width in self.containers)
        closers = []
        if self.fence:
            closers.append(margin + self.fence)
        elif self.block is None:
            closers.append(self._end_paragraph(is_cut=True))
        elif half := self._end_half_html():
            closers.append(margin + half)
        if self.block is None:
            closers.append(self._end_html_below())
        closers.append("".join(f"</{name}>" for name in reversed(self.html.open)))
        if self.block == "pre" and not any(map(_PRE_END.search, closers)):
            closers.append("</pre>")  # its tag is closed, but in a way that does not end the block
        lines = [line for line in closers if line]
        return "\n".join(["", *lines] if is_in_line and lines else lines)

    def _end_half_html(self) -> str:
        """End, within a block of HTML, what is half said in it."""
        closers = self.end
        self.html.feed(closers)
        while half := self.html.half_end():
            self.html.feed(half)
            closers += half
        return closers

    def _end_html_below(self) -> str:
        """End what its block of HTML has left half said: no text could, a comment can."""
        closers = ""
        while half := self.html.half_end():
            half = half if half.startswith("</") else f"<!--{self.html.quote}-->"
            self.html.feed(half)
            closers += half
        return closers

    def _strip(self, line: str) -> tuple[str, int]:
        """The line without the marks of its containers, and how many of them go on with it."""
        within = 0
        # A blank line is within all items, and ends the first quote. There may be very many.
        if not line:
            within = self.containers.index(0) if 0 in self.containers else len(self.containers)
        for width in self.containers if line else ():
            if width == 0:
                if (quote := _QUOTE.match(line)) is None:
                    break
                line = line[quote.end() :]
            elif line.startswith(" " * width):
                line = line[width:]
            elif line.strip(" "):
                break
            within += 1
        if self.is_bare and not line.strip(" "):  # it may begin with one blank line, not with two
            within = min(within, len(self.containers) - 1)
        self.is_bare = False
        return line, within

    def _begin(self, line: str, within: int) -> None:
        """Read a line of which only the containers are known."""
        is_lazy = within < len(self.containers)  # unless something begins, the paragraph goes on
        while inner := self._container(line, is_lazy=is_lazy):
            width, line = inner
            self._leave(within)
            self.html.take_text()
            self.containers.append(width)
            within, is_lazy = within + 1, False
            self.is_bare = width > 0 and not line.strip(" ")
        if not line.strip(" "):
            self._leave(within)
        elif line.startswith(" " * 4):
            if self.paragraph:
                self.paragraph.append(line)
            else:  # code
                self._leave(within)
                self.html.take_text()
        elif fence := _FENCE.match(line):
            self._leave(within)
            self.html.take_text()
            self.fence = fence[1] or fence[2]
        elif block := self._block_of(line):
            self._leave(within)
            self.block, self.end = block
            self._take_html(line)
        elif _HEADING.match(line):
            self._leave(within)
            self.paragraph.append(line)
            self._end_paragraph()
        elif _BREAK.match(line) or (self.paragraph and not is_lazy and _UNDERLINE.match(line)):
            self._leave(within)
            self.html.take_text()
        else:
            if not self.paragraph:
                self._leave(within)
            self.paragraph.append(line)

    def _container(self, line: str, *, is_lazy: bool) -> tuple[int, str] | None:
        """The container that begins here: its width, and the rest of the line."""
        if len(self.containers) >= MAX_DEPTH:
            return None
        if quote := _QUOTE.match(line):
            return 0, line[quote.end() :]
        item = _ITEM.match(line)
        if item is None or _BREAK.match(line):
            return None
        is_empty = item.end() == len(line)
        if self.paragraph and not is_lazy and (is_empty or item["number"] not in (None, "1")):
            return None  # "... in\n1999. That was ..."
        is_code = len(item["gap"]) > 4
        width = item.start("gap") + 1 if is_empty or is_code else item.end()
        return width, line[width:]

    def _block_of(self, line: str) -> tuple[_Block, str] | None:
        if marked := _MARKED_BLOCK.match(line):
            return "marked", _ENDS.get(marked[1], ">")
        if _PRE_BLOCK.match(line):
            return "pre", ""
        found = _TAG_BLOCK.match(line)
        if found is None or (found["alone"] is not None and self.paragraph):
            return None
        return "tag", ""

    def _take_html(self, line: str) -> None:
        self.html.feed(line)
        if self.block == "marked":
            is_over = self.end in line
        else:
            is_over = self.block == "pre" and _PRE_END.search(line) is not None
        if is_over:
            self.block, self.end = None, ""

    def _see_end_of_fence(self, line: str) -> None:
        mark = line.strip(" ")
        is_flush = not line.startswith(" " * 4)
        if is_flush and len(mark) >= len(self.fence) and not mark.strip(self.fence[0]):
            self.fence = ""

    def _leave(self, within: int) -> None:
        """End the paragraph, and the containers behind the first `within`."""
        self._end_paragraph()
        if within < len(self.containers):
            self.html.take_text()
            del self.containers[within:]

    def _end_paragraph(self, *, is_cut: bool = False) -> str:
        """Read the tags of a paragraph; returns what closes a comment that was cut off in it."""
        if not self.paragraph:
            return ""
        text = "\n".join(self.paragraph)
        self.paragraph.clear()
        self.html.take_text()
        if "<" not in text:
            return ""
        runs: dict[int, list[int]] = {}  # ends of strings of backticks, the last first, by length
        for run in reversed(list(_TICKS.finditer(text))):
            runs.setdefault(len(run[0]), []).append(run.end())
        missing: set[str] = set()
        at = 0
        while found := _INLINE.search(text, at):
            at = found.end()
            if ticks := found["ticks"]:
                ends = runs.get(len(ticks), [])
                while ends and ends[-1] <= at:
                    ends.pop()
                at = ends[-1] if ends else at
            elif found["tag"]:
                self.html.feed(found["tag"])
            elif (marker := found["marker"]) and (end := _ENDS.get(marker, ">")) not in missing:
                place = text.find(end, found.start() + 2)
                if place >= 0:
                    at = place + len(end)
                    self.html.feed(text[found.start() : at])
                elif is_cut and marker == "<!--":
                    return end
                else:  # then it is text
                    missing.add(end)
        return ""
