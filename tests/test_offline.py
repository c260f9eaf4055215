"""The offline provider: its words, its passages, its plan, its stream."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
import trio
import trio.testing

from agentsse.errors import ProviderError
from agentsse.events import AnyEvent, PartDelta, PartFinished, PartStarted, Usage
from agentsse.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.providers import Finish, Prompt, Provider
from agentsse.providers.offline import (
    PASSAGE_LINES,
    QUESTION_CHARACTERS,
    Call,
    Chunk,
    End,
    OfflineProvider,
    Passage,
    Words,
    content_words,
    fold,
    plan,
    split_lines,
    split_passages,
    stems,
)

SEARCH = ToolSpec("search", "", {"type": "object"})
READ = ToolSpec("read", "", {"type": "object"})
QUESTION = UserMessage("How do I resume a stream?")


def prompt(*messages: Message, tools: Iterable[ToolSpec] = (SEARCH, READ)) -> Prompt:
    return Prompt("quote", messages, tuple(tools))


def answered(name: str, value: Any, *, call_id: str = "c1") -> ToolMessage:
    return ToolMessage(call_id, name, json.dumps(value))


def found(*places: tuple[str, int, float], **more: int) -> ToolMessage:
    passages = [
        {"file": file, "line": line, "score": score, "text": "..."} for file, line, score in places
    ]
    return answered("search", {"words": ["resume"], "passages": passages} | more)


def read(file: str, first: int, text: str) -> ToolMessage:
    return answered("read", {"file": file, "first": first, "last": 9, "text": text})


def spoken(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Words))


def calls(chunks: list[Chunk]) -> list[tuple[str, Any]]:
    return [(c.name, json.loads(c.arguments)) for c in chunks if isinstance(c, Call)]


# Words


def test_content_words_are_folded_and_unique_without_stopwords():
    """The words of a question: case-folded, in order, each once, common English ones dropped."""
    assert content_words("How do I RESUME a stream? Resume the stream!") == ("resume", "stream")


def test_identifiers_stay_one_word():
    """What is joined by -, _ or . is one word; a possessive is none."""
    expected = ("last-event-id", "max_events", "run.text", "server")
    assert expected == content_words("the `Last-Event-ID`, --max_events, run.text(); server's")


def test_words_of_other_scripts_are_composed_and_ideographs_stand_alone():
    """A decomposed umlaut equals a composed one; typographic apostrophes are apostrophes."""
    assert content_words("don\u2019t Gro\u0308sse") == ("gr\u00f6sse",)
    assert content_words("поток 再開") == ("поток", "再", "開")


def test_what_has_no_spaces_is_left_as_it_is():
    """Composing takes the square of the marks in a row: nobody writes 200 signs without a space."""
    for row in (199, 200, 120_000):
        marks = "O" + "\u0308" * (row - 1)
        expected = "\u00f6" + "\u0308" * (row - 2) if row < 200 else marks.casefold()
        assert expected == fold(marks)
        assert f"stra\u00dfe {expected}".casefold() == fold(f"Stra\u00dfe {marks}")
    assert "don't \u00f6" == fold("DON\u2019T O\u0308")


def test_a_question_of_common_words_has_no_content():
    """Nothing is left of a question that names nothing."""
    assert content_words("What can you do?") == ()


@pytest.mark.parametrize(
    "forms",
    [
        "resume resumes resumed resuming",
        "stream streams streamed streaming",
        "cancel cancels cancelled canceled cancelling",
        "query queries queried",
        "run runs running run's",
        "class classes",
        "call calls called calling",
        "feed feeds",
        "string strings",
        "status",
    ],
)
def test_forms_of_a_word_share_a_stem(forms):
    """Light stemming joins the frequent forms of an English word."""
    assert len({stems(form) for form in forms.split()}) == 1


@pytest.mark.parametrize(("one", "other"), [("call", "cal"), ("string", "str"), ("v2", "v")])
def test_different_words_keep_different_stems(one, other):
    """Too little is never left of a word, and what has digits in it is left alone."""
    assert stems(one) != stems(other)


def test_an_identifier_is_also_its_parts():
    """Parts count too, but stopwords among them do not."""
    assert stems("last-event-id") == ("last-event-id", "last", "event", "id")
    assert stems("not-found") == ("found",)
    assert stems("to-do") == ("to-do",)


# Passages


def test_lines_end_as_in_an_editor():
    """LF, CRLF and CR end a line; a form feed does not; the last line need not end."""
    assert split_lines("a\r\nb\rc\fd\ne\n") == ["a", "b", "c\fd", "e"]
    assert split_lines("a") == ["a"]
    assert split_lines("") == []


def test_prose_is_cut_at_blank_lines_headings_and_items():
    """Each passage knows its line and the headings above it; a bare heading is one itself."""
    text = [
        "# Guide #",
        "",
        "## Start",
        "First.",
        "Still first.",
        "",
        "",
        "Second",
        "- one",
        "- two",
        "  and more of two",
        "1. numbered",
        "## End",
    ]
    expected = [
        Passage(1, "# Guide #"),
        Passage(4, "First.\nStill first.", ("Guide", "Start")),
        Passage(8, "Second", ("Guide", "Start")),
        Passage(9, "- one", ("Guide", "Start")),
        Passage(10, "- two\n  and more of two", ("Guide", "Start")),
        Passage(12, "1. numbered", ("Guide", "Start")),
        Passage(13, "## End", ("Guide",)),
    ]
    assert expected == split_passages("a.md", text)


def test_underlined_headings():
    """A first line with a row of = or - below it is a heading, in reStructuredText of more."""
    text = ["Title", "=====", "", "Part", "----", "Text", "more", "---", "", "Deep", "~~~~", "End"]
    assert split_passages("a.md", text) == [
        Passage(1, "Title"),
        Passage(6, "Text\nmore\n---", ("Title", "Part")),
        Passage(10, "Deep\n~~~~\nEnd", ("Title", "Part")),
    ]
    assert split_passages("a.rst", text)[-1] == Passage(12, "End", ("Title", "Part", "Deep"))


def test_a_fence_holds_together():
    """Blank lines, headings and other fences inside of a fence do not cut it."""
    text = ["```sh", "# no heading", "", "- no item", "~~~", "```", "", "after"]
    expected = [Passage(1, "\n".join(text[:6])), Passage(8, "after")]
    assert expected == split_passages("README.md", text)


def test_a_colon_holds_on_to_what_it_announces():
    """A line that ends in a colon takes the next block along, over a blank line."""
    text = [
        "Resume it so:",
        "",
        "```",
        "curl",
        "```",
        "",
        "Then:",
        "- item",
        "- next",
        "x:",
        "",
        "",
    ]
    expected = [
        Passage(1, "Resume it so:\n\n```\ncurl\n```"),
        Passage(7, "Then:\n- item"),
        Passage(9, "- next\nx:"),
    ]
    assert expected == split_passages("a.md", text)


def test_code_is_cut_at_blank_lines_only():
    """In a file that is no prose, # begins a comment and - no item."""
    text = ["# comment", "- x", "---", "", "y"]
    assert [Passage(1, "# comment\n- x\n---"), Passage(5, "y")] == split_passages("a.py", text)


def test_long_blocks_are_cut():
    """No passage is longer than what `read` gives unasked."""
    passages = split_passages("a.py", ["x"] * (2 * PASSAGE_LINES + 1))
    assert [p.line for p in passages] == [1, 1 + PASSAGE_LINES, 1 + 2 * PASSAGE_LINES]


# The plan


def test_a_question_becomes_a_search():
    """First it says what it looks for, then it calls `search` with the content words."""
    expected = [
        Words("reasoning", "Searching for: resume, stream"),
        Call("search", '{"query":"resume stream"}'),
        End("tool_calls"),
    ]
    assert expected == plan(prompt(SystemMessage("Be nice."), QUESTION))


def test_only_the_beginning_of_a_question_is_looked_at():
    """Whoever pastes a book asks for its first words, whatever it is made of."""
    for filling in ("the ", "\u0308", "resume it. "):
        question = "stream " + filling * 120_000 + " zebra"
        ((_, arguments),) = calls(plan(prompt(UserMessage(question))))
        assert "stream" == arguments["query"].split()[0]
        assert "zebra" not in arguments["query"]
    edge = "x" * (QUESTION_CHARACTERS - 6)
    assert [("search", {"query": f"{edge} zebra"})] == calls(
        plan(prompt(UserMessage(f"{edge} zebras")))
    )


def test_only_what_came_after_the_last_question_counts():
    """An earlier question's results answer nothing; a new question is searched for anew."""
    earlier = (UserMessage("Ports?"), AssistantMessage(""), found(("a.md", 1, 1.0)))
    chunks = plan(prompt(*earlier, AssistantMessage("80"), QUESTION))
    assert calls(chunks) == [("search", {"query": "resume stream"})]


def test_found_places_become_reads():
    """The best three distinct places are read side by side; far weaker ones are not."""
    places = [("a.md", 7, 4.0), ("a.md", 7, 4.0), ("b.md", 1, 3.0), ("c.md", 2, 1.0)]
    chunks = plan(prompt(QUESTION, AssistantMessage(""), found(*places)))
    expected = [("read", {"file": "a.md", "line": 7}), ("read", {"file": "b.md", "line": 1})]
    assert expected == calls(chunks)
    assert spoken(chunks) == "Reading: a.md:7, b.md:1"
    assert End("tool_calls") == chunks[-1]
    many = found(*((f"{n}.md", 1, 1.0) for n in range(5)))
    assert len(calls(plan(prompt(QUESTION, many)))) == 3


def test_reads_become_quotes_with_their_places():
    """The answer quotes the passage that begins where was read, and names file and line."""
    chunks = plan(
        prompt(
            QUESTION,
            found(("a.md", 7, 4.0), ("b.py", 1, 4.0)),
            read("a.md", 7, "Send the id:\n\n    Last-Event-ID: 7\n\nOther things."),
            read("b.py", 1, "resume()\n"),
        )
    )
    expected = (
        "These passages of the folder answer best (quoted, not written by a model):\n\n"
        "> Send the id:\n>\n>     Last-Event-ID: 7\n\n`a.md:7`\n\n"
        "> resume()\n\n`b.py:1`"
    )
    assert expected == spoken(chunks)
    assert End("stop") == chunks[-1]


def test_a_quote_names_the_line_below_a_heading():
    """Where reading began at a heading, the quote is what stands below it."""
    chunks = plan(prompt(QUESTION, read("a.md", 3, "## Resume\n\nSend the id.\n\nMore.")))
    assert spoken(chunks).endswith("> Send the id.\n\n`a.md:5`")


def test_long_and_empty_quotes():
    """A line without end is cut, and says so; a blank place is quoted as what it is."""
    long = spoken(plan(prompt(QUESTION, read("a.js", 1, "x" * 5_000))))
    assert "x\u2026\n\n`a.js:1`" in long
    assert len(long) < 2_000
    assert spoken(plan(prompt(QUESTION, read("a.js", 4, "")))).endswith("\n\n>\n\n`a.js:4`")


def test_errors_of_tools_are_told():
    """What a tool could not do is in the answer, in the tool's words."""
    failed = ToolMessage("c1", "read", "expected a file", is_error=True)
    both = spoken(plan(prompt(QUESTION, failed, read("a.md", 1, "Quote."))))
    assert both.endswith("> Quote.\n\n`a.md:1`\n\nA passage could not be read: expected a file")
    alone = spoken(plan(prompt(QUESTION, failed)))
    assert alone.startswith("A passage could not be read: expected a file\n\nThis is agentsse's")
    search = ToolMessage("c1", "search", "too slow", is_error=True)
    assert spoken(plan(prompt(QUESTION, search))).startswith("The search failed: too slow\n\n")


@pytest.mark.parametrize("content", ["[]", "no JSON", '{"passages": [{"file": 1}]}'])
def test_a_search_of_another_shape_is_told(content):
    """Another tool named `search` may answer anything."""
    answer = spoken(plan(prompt(QUESTION, ToolMessage("c1", "search", content))))
    assert answer.startswith("The search failed: `search` answered in a shape that is not known")


def test_nothing_found_says_what_was_looked_for_and_what_to_try():
    """An empty result is an honest answer."""
    answer = spoken(plan(prompt(QUESTION, found(files_searched=7))))
    assert answer.startswith("Nothing in the folder matches: resume, stream (7 files searched).")
    assert "--folder PATH" in answer
    answer = spoken(plan(prompt(QUESTION, found(files_searched=7, files_skipped=2))))
    assert "(7 files searched, 2 skipped)" in answer


def test_without_read_the_places_are_named():
    """A search alone can still say where to look."""
    answer = spoken(plan(prompt(QUESTION, found(("a.md", 7, 4.0)), tools=[SEARCH])))
    assert answer.endswith("- `a.md:7`")


@pytest.mark.parametrize("messages", [(QUESTION,), (), (SystemMessage("x"), QUESTION)])
def test_without_tools_it_says_what_it_is(messages):
    """It never pretends to answer where it cannot look."""
    chunks = plan(Prompt("quote", messages))
    assert "runs no language model" in spoken(chunks)
    assert "no `search` tool" in spoken(chunks)
    assert End("stop") == chunks[-1]


def test_a_question_that_names_nothing_gets_told_how_to_ask():
    """Where there is no word to look for, nothing is searched."""
    chunks = plan(prompt(UserMessage("What can you do?")))
    assert calls(chunks) == []
    assert "no word to look for" in spoken(chunks)


def test_an_answer_comes_in_pieces_that_make_the_whole():
    """Pieces are cut between words and lose nothing, white space at the end included."""
    failed = ToolMessage("c1", "search", "a b\n" * 30, is_error=True)
    chunks = plan(prompt(QUESTION, failed))
    assert len(chunks) > 5
    assert "The search failed: " + "a b\n" * 30 + "\n\nThis is" in spoken(chunks)
    trailing = ToolMessage("c1", "read", "end \n", is_error=True)
    quoted = plan(prompt(QUESTION, read("a.md", 1, "Quote."), trailing))
    assert spoken(quoted).endswith("end \n")


# The stream


def normalized(chunks: Iterable[Chunk]) -> list[AnyEvent | Finish]:
    machine = OfflineProvider().normalizer("m1")
    return [event for chunk in chunks for event in machine.feed(chunk)] + list(machine.close())


def test_chunks_become_parts():
    """Words of one kind in a row are one part, a call is one, the end is a Finish: no tokens."""
    chunks: list[Chunk] = [
        Words("reasoning", "Think "),
        Words("reasoning", "more"),
        Words("text", "Say"),
        Call("search", '{"query":"x"}'),
        Call("read", "{}"),
        Words("text", "Done"),
        End("tool_calls"),
    ]
    expected = [
        PartStarted(part_id="m1p1", kind="reasoning"),
        PartDelta(part_id="m1p1", kind="reasoning", delta="Think "),
        PartDelta(part_id="m1p1", kind="reasoning", delta="more"),
        PartFinished(part_id="m1p1", kind="reasoning", text="Think more"),
        PartStarted(part_id="m1p2", kind="text"),
        PartDelta(part_id="m1p2", kind="text", delta="Say"),
        PartFinished(part_id="m1p2", kind="text", text="Say"),
        PartStarted(part_id="m1p3", kind="tool_call", name="search", call_id="m1c1"),
        PartDelta(part_id="m1p3", kind="tool_call", delta='{"query":"x"}'),
        PartFinished(
            part_id="m1p3", kind="tool_call", text='{"query":"x"}', name="search", call_id="m1c1"
        ),
        PartStarted(part_id="m1p4", kind="tool_call", name="read", call_id="m1c2"),
        PartDelta(part_id="m1p4", kind="tool_call", delta="{}"),
        PartFinished(part_id="m1p4", kind="tool_call", text="{}", name="read", call_id="m1c2"),
        PartStarted(part_id="m1p5", kind="text"),
        PartDelta(part_id="m1p5", kind="text", delta="Done"),
        PartFinished(part_id="m1p5", kind="text", text="Done"),
        Finish("tool_calls", Usage(input_tokens=0, output_tokens=0)),
    ]
    assert expected == normalized(chunks)


def test_a_stream_without_an_end_is_an_error():
    """Whoever cuts the stream off does not get away with half an answer."""
    with pytest.raises(ProviderError, match="expected an end chunk"):
        normalized([Words("text", "Half")])


async def test_a_stream_gives_the_plan_and_takes_its_time(autojump_clock):
    """Each piece of text waits for its turn, calls do not; the stream ends after the plan."""
    provider: Provider = OfflineProvider(pace=1.0)
    asked = prompt(QUESTION)
    assert provider.name == "offline"
    began = trio.current_time()
    async with provider.stream(asked) as chunks:
        assert plan(asked) == [chunk async for chunk in chunks]
    assert pytest.approx(trio.current_time() - began) == 1.0


async def test_without_pace_each_chunk_is_still_a_checkpoint():
    """Another task gets its turn between any two chunks, and after the last."""
    async with OfflineProvider(pace=0).stream(Prompt("quote", (QUESTION,))) as chunks:
        for expected in plan(Prompt("quote", (QUESTION,))):
            with trio.testing.assert_checkpoints():
                assert expected == await anext(chunks)
        with trio.testing.assert_checkpoints(), pytest.raises(StopAsyncIteration):
            await anext(chunks)


@pytest.mark.parametrize("after", [0.0, 0.5, 2.5])
async def test_cancelling_a_stream_leaves_nothing(autojump_clock, after):
    """Cancelled while opening, before the first piece or in the middle, it is simply gone."""
    tasks = trio.lowlevel.current_statistics().tasks_living
    seen: list[Chunk] = []
    with trio.move_on_after(after) as scope:
        async with OfflineProvider(pace=1.0).stream(Prompt("quote", (QUESTION,))) as chunks:
            async for chunk in chunks:
                seen.append(chunk)  # noqa: PERF401  # what was seen before the cancel counts
    assert scope.cancelled_caught
    assert int(after) == len(seen)
    assert tasks == trio.lowlevel.current_statistics().tasks_living


async def test_it_is_its_own_connection_and_over_with_its_end():
    """There is nothing to open, and nothing comes behind the end."""
    provider = OfflineProvider(pace=0)
    async with provider.open(None) as connection:
        assert connection is provider
        machine = connection.normalizer("m1")
        async with connection.stream(Prompt("quote", (QUESTION,))) as chunks:
            async for chunk in chunks:
                assert not machine.is_over
                list(machine.feed(chunk))
    assert machine.is_over
