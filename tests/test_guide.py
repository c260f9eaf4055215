"""The built-in agent: what its tools see of a folder, and how well they find it."""

import contextvars
import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from agentsse import guide as guide_module, tools as tools_module
from agentsse.errors import ConfigError, ToolError
from agentsse.events import PartFinished
from agentsse.guide import (
    FILE_BYTES,
    MOST_TERMS,
    PASSAGE_CHARACTERS,
    READ_CHARACTERS,
    READ_LINES,
    Folder,
    Progress,
    Ranking,
    default_folder,
    folder_tools,
    guide,
    read_file,
    search_folder,
)
from agentsse.messages import (
    AssistantMessage,
    Message,
    ToolCall,
    ToolMessage,
    ToolSpec,
    UserMessage,
)
from agentsse.providers import Prompt
from agentsse.providers.offline import OfflineProvider, plan
from agentsse.tools import Tool, Workers

README = """\
# Demo

A small server that streams.

## Running it

Start it with `demo serve`.

## When the network breaks

A stream can be resumed: send the id of the last event that you have seen:

```sh
curl -N -H 'Last-Event-ID: 7' http://127.0.0.1:8080/runs/1/events
```

Nothing is lost.
"""


def write(root: Path, **files: str) -> Path:
    """Write files; `__` in a name stands for a slash, and each ends in .md."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def search(root: Path, query: str, limit: int = 5) -> dict[str, Any]:
    return search_folder(Folder(root), query, limit=limit)


def places(root: Path, query: str, limit: int = 5) -> list[tuple[str, int]]:
    return [(p["file"], p["line"]) for p in search(root, query, limit)["passages"]]


def read(root: Path, file: str, *, line: int = 1, lines: int = 12) -> dict[str, Any]:
    return read_file(Folder(root), file, line=line, lines=lines)


# Searching


def test_search_finds_forms_of_a_word(tmp_path):
    """`resume` finds `resumed`, with file, line, text and a score."""
    write(tmp_path, a="Nothing here.\n\nIt can be resumed later.\n", b="Other.\n")
    found = search(tmp_path, "How to resume?")
    (passage,) = found.pop("passages")
    assert found == {"words": ["resume"], "files_searched": 2, "files_skipped": 0}
    assert passage.pop("score") > 0
    assert passage == {"file": "a.md", "line": 3, "text": "It can be resumed later."}


def test_rare_words_count_more_than_common_ones(tmp_path):
    """A passage with the one rare word beats passages with the common one."""
    write(tmp_path, a="stream\n\nstream\n\nstream stream\n\nzebra\n")
    assert places(tmp_path, "stream zebra")[0] == ("a.md", 7)


def test_all_words_beat_one_word_often(tmp_path):
    """A second occurrence counts less than another word."""
    write(tmp_path, a="slow slow slow slow\n\nA slow reader.\n\nreader reader reader\n")
    assert places(tmp_path, "slow reader")[0] == ("a.md", 3)


def test_short_passages_beat_long_ones(tmp_path):
    """The same word says more about a short passage."""
    write(tmp_path, a="zebra " + "horse " * 200 + "\n\nA zebra.\n")
    assert places(tmp_path, "zebra") == [("a.md", 3), ("a.md", 1)]


def test_headings_and_file_names_give_context(tmp_path):
    """The nearest heading counts as if it stood in the passage, outer ones and the name less."""
    write(
        tmp_path,
        a="# Resume\n\nOuter.\n\n## Details\n\nFar.\n",
        b="Some words about the weather, and resume.\n\nNothing.\n",
        resume="Named.\n",
    )
    found = places(tmp_path, "resume")
    assert set(found[:2]) == {("a.md", 3), ("b.md", 1)}
    assert set(found[2:]) == {("a.md", 7), ("resume.md", 1)}


def test_a_word_in_text_and_heading_is_best(tmp_path):
    """Text under its own heading beats text that mentions it in passing."""
    write(tmp_path, a="Cancel it.\n\n## How to cancel\n\nTo cancel, leave.\n")
    assert places(tmp_path, "cancel")[0] == ("a.md", 5)


def test_identifiers_are_found_whole_and_by_their_parts(tmp_path):
    """The whole identifier comes first; its parts are better than nothing."""
    write(tmp_path, a="An event has an id.\n\nThe header Last-Event-ID.\n")
    assert places(tmp_path, "`Last-Event-ID`") == [("a.md", 3), ("a.md", 1)]
    assert places(tmp_path, "last events")[0] == ("a.md", 3)


def test_unicode_is_found_in_either_form(tmp_path):
    """Composed finds decomposed, in any case; ideographs need no spaces; a BOM is no text."""
    write(tmp_path, a="\ufeffGro\u0308\u00dfe\n\nЖивём вместе\n\n接続が切れたら再開する\n")
    assert places(tmp_path, "GR\u00d6SSE") == [("a.md", 1)]
    assert places(tmp_path, "ЖИВЁМ") == [("a.md", 3)]
    assert places(tmp_path, "再開") == [("a.md", 5)]
    assert not search(tmp_path, "grösse")["passages"][0]["text"].startswith("\ufeff")


def test_undecodable_bytes_do_not_hide_the_rest(tmp_path):
    """A file in another encoding is searched as far as it can be read."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 zebra")
    assert search(tmp_path, "zebra")["passages"][0]["text"] == "caf\ufffd zebra"


def test_what_is_no_text_is_skipped_and_counted(tmp_path):
    """Binary files, files that are too large, pipes, dead links: counted, never a failure."""
    write(tmp_path, a="zebra\n")
    (tmp_path / "binary.md").write_bytes(b"zebra\0")
    (tmp_path / "large.md").write_text("zebra " * (FILE_BYTES // 6 + 1))
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "dead.md").symlink_to("nowhere.md")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.md")).write_text("zebra")
    found = search(tmp_path, "zebra")
    assert [passage["file"] for passage in found["passages"]] == ["a.md"]
    assert (found["files_searched"], found["files_skipped"]) == (1, 5)


def test_what_is_hidden_is_not_there(tmp_path):
    """Hidden files and folders, and those that tools make, are neither searched nor counted."""
    write(tmp_path, a="zebra\n", b__c="zebra two\n", env__lib__x="zebra\n", venv__x="zebra\n")
    write(tmp_path, **dict.fromkeys((".env", ".git__x", "node_modules__x__y"), "zebra\n"))
    (tmp_path / "env" / "pyvenv.cfg").touch()
    found = search(tmp_path, "zebra")
    assert [passage["file"] for passage in found["passages"]] == ["a.md", "b/c.md"]
    assert (found["files_searched"], found["files_skipped"]) == (2, 0)


def test_links_lead_nowhere_outside(tmp_path):
    """A linked file counts if it is inside; linked folders are not entered."""
    write(tmp_path, out__secret="zebra secret\n", root__real__a="zebra\n")
    root = tmp_path / "root"
    (root / "inside.md").symlink_to("real/a.md")
    (root / "outside.md").symlink_to("../out/secret.md")
    (root / "folder").symlink_to("../out")
    (root / "loop.md").symlink_to("loop.md")
    found = search(root, "zebra")
    assert [passage["file"] for passage in found["passages"]] == ["inside.md"]
    assert (found["files_searched"], found["files_skipped"]) == (2, 3)


def test_links_lead_to_nothing_hidden(tmp_path):
    """A name that may be seen shows no file that may not."""
    write(tmp_path, a="zebra\n", **{".env": "zebra secret\n", ".git__config": "zebra secret\n"})
    write(tmp_path, node_modules__x="zebra secret\n")
    hidden = sorted(path for path in tmp_path.rglob("*") if "secret" in _text(path))
    assert len(hidden) == 3
    for number, path in enumerate(hidden):
        (tmp_path / f"shown{number}.md").symlink_to(path)
    (tmp_path / "twice.md").symlink_to("shown0.md")
    (tmp_path / "well.md").symlink_to("a.md")
    found = search(tmp_path, "zebra")
    assert [passage["file"] for passage in found["passages"]] == ["a.md"]
    assert (found["files_searched"], found["files_skipped"]) == (2, 4)
    for name in ("shown0.md", "shown1.md", "shown2.md", "twice.md"):
        with pytest.raises(ToolError, match="expected a text file of the folder"):
            read_file(Folder(tmp_path), name, line=1, lines=1)
    assert read_file(Folder(tmp_path), "well.md", line=1, lines=1)["text"] == "zebra"


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_folders_that_cannot_be_entered_are_counted(tmp_path):
    """A folder that vanishes while it is searched is one that was skipped."""
    root = write(tmp_path, a="zebra", b__c="zebra two")
    skipped: list[None] = []
    walk = Folder(root).files(lambda: skipped.append(None))
    assert next(walk) == "a.md"
    (root / "b" / "c.md").unlink()
    (root / "b").rmdir()
    assert list(walk) == []
    assert skipped == [None]


def test_copies_are_found_once(tmp_path):
    """The same passage in many files is one answer: the first."""
    write(tmp_path, **dict.fromkeys("bcdefgij", "One zebra.\n"), a="## Zebra\n\nOne zebra.\n")
    write(tmp_path, h="Another zebra, and more text.\n")
    found = search(tmp_path, "zebra")["passages"]
    assert sorted(p["text"] for p in found) == ["Another zebra, and more text.", "One zebra."]


def test_only_the_best_are_kept(tmp_path):
    """The limit holds, and what comes later may push out what came first."""
    text = "\n\n".join(f"zebra {'zebra ' * n} number {n}" for n in range(20))
    write(tmp_path, a=text)
    assert places(tmp_path, "zebra", limit=2) == [("a.md", 39), ("a.md", 37)]
    write(tmp_path, a="\n\n".join(reversed(text.split("\n\n"))))
    assert places(tmp_path, "zebra", limit=2) == [("a.md", 1), ("a.md", 3)]


def test_passages_in_the_list_are_bounded(tmp_path):
    """A line without end is cut; encoded data is no word."""
    write(tmp_path, a="zebra " * 1_000, b="zebra" * 1_000)
    (passage,) = search(tmp_path, "zebra")["passages"]
    assert len(passage["text"]) == PASSAGE_CHARACTERS + 1


def test_queries_are_bounded(tmp_path):
    """Of a pasted book the first words are looked for, whole words before parts of them."""
    words = tuple("-".join(f"{letter}{n}" for n in range(9)) for letter in "abcdefghijklmn")
    ranking = Ranking(words, 1)
    assert len(ranking._weights) == MOST_TERMS
    assert list(ranking._weights)[:12] == list(words[:12])
    write(tmp_path, a="w1 zebra")
    assert search(tmp_path, " ".join(f"w{n}" for n in range(1_000)))["words"][-1] == "w11"
    assert search(tmp_path, "x" * 5_000 + " zebra")["passages"] == []


def test_a_query_without_words_says_what_to_do(tmp_path):
    """Stopwords alone find everything, which is nothing."""
    with pytest.raises(ToolError, match="at least one word besides common ones"):
        search(write(tmp_path, a="x"), "how is it?")


def test_thousands_of_files(tmp_path):
    """The one passage is found among 2,000 files, and all were searched."""
    for n in range(2_000):
        folder = tmp_path / f"d{n % 20}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{n}.md").write_text(f"# File {n}\n\nSome words about streams.\n")
    write(tmp_path, d7__f7="# File 7\n\nStreams.\n\nA stream can be resumed after a break.\n")
    found = search(tmp_path, "How do I resume a stream?", limit=1)
    assert found["files_searched"] == 2_000
    assert found["passages"][0]["file"] == "d7/f7.md"
    assert found["passages"][0]["line"] == 5


def test_progress_is_told_now_and_then():
    """Not at once and not for each file: when half a second has passed since the last time."""
    told: list[int] = []
    clock = iter([0.0, 0.1, 0.5, 0.6, 0.99, 1.0])
    progress = Progress(told.append, clock.__next__)
    for files in range(5):
        progress.report(files)
    assert told == [1, 4]


def test_progress_is_an_event_of_the_run_or_nothing():
    """Outside of a run nobody hears it, and nothing breaks."""
    Progress(clock=itertools.count().__next__).report(1)


def test_a_cancelled_search_stops_at_the_next_file(tmp_path):
    """Between two files it asks whether anybody still wants to know."""
    root = write(tmp_path, a="zebra", b="zebra b", c="zebra c")
    reports: list[int] = []
    answers = iter([False, False, True])
    found = search_folder(
        Folder(root),
        "zebra",
        limit=5,
        report=reports.append,
        is_cancelled=lambda: next(answers),
    )
    assert found["files_searched"] == 2
    assert reports == [0, 1]


# Reading


def test_read_gives_lines_as_they_are(tmp_path):
    """From a line on, as many as asked for, or as there are."""
    root = write(tmp_path, docs__a="one\n  two\r\n\nfour")
    assert read(root, "docs/a.md", line=2, lines=2) == {
        "file": "docs/a.md",
        "first": 2,
        "last": 3,
        "text": "  two\n",
        "total_lines": 4,
    }
    assert read(root, "./docs/a.md", line=4)["text"] == "four"


def test_read_is_bounded(tmp_path):
    """Long lines make it fewer lines; the first comes in any case, cut where it has no end."""
    root = write(tmp_path, a="\n".join(["x" * 1_000] * 50), b=f"{'y' * 20_000}\nz")
    first = read(root, "a.md", lines=READ_LINES)
    assert first["last"] == 16
    assert len(first["text"]) <= READ_CHARACTERS
    assert read(root, "b.md")["text"] == "y" * READ_CHARACTERS + "\u2026"


@pytest.mark.parametrize(
    "file",
    [
        "missing.md",
        "../out.md",
        "docs/../../out.md",
        "/etc/passwd",
        "docs",
        "link.md",
        "linked/out.md",
        ".env",
        "",
        "a\0b",
        "\udc80",
        "x" * 5_000,
        "a.md/b",
        "env/lib.md",
    ],
)
def test_read_sees_nothing_but_the_folder(tmp_path, file):
    """What is outside, hidden, missing or no file is refused, with what was expected."""
    root = write(tmp_path, out="secret", root__docs__a="text", root__a="text", root__env__lib="x")
    root /= "root"
    (root / ".env").write_text("SECRET=1")
    (root / "env" / "pyvenv.cfg").touch()
    (root / "link.md").symlink_to("../out.md")
    (root / "linked").symlink_to("..")
    with pytest.raises(ToolError, match=r"as search gives it \(such as 'a.md'\), got '"):
        read(root, file)


def test_read_past_the_end_says_where_the_end_is(tmp_path):
    """A line that there is not is refused; an empty file has none."""
    root = write(tmp_path, a="one\n", b="")
    with pytest.raises(ToolError, match=r"a line of 'a.md' from 1 to 1, got 2"):
        read(root, "a.md", line=2)
    with pytest.raises(ToolError, match=r"from 1 to 0, got 1"):
        read(root, "b.md")


# The tools and the agent


def by_name(root: Path) -> dict[str, Tool]:
    return {tool.name: tool for tool in folder_tools(root)}


def test_a_single_file_is_all_there_is(tmp_path):
    """Its neighbours are neither found nor read."""
    root = write(tmp_path, README=README, other="resume") / "README.md"
    assert places(root, "resume") == [("README.md", 11)]
    assert read(root, "README.md")["total_lines"] == 17
    with pytest.raises(ToolError, match=r"such as 'README.md'"):
        read(root, "other.md")


def test_tools_tell_a_model_how_to_call_them(tmp_path):
    """Names, bounds and descriptions stand in the schema; what does not fit is refused."""
    tools = by_name(write(tmp_path, a="x"))
    assert list(tools) == ["search", "read"]
    assert tools["search"].parameters["required"] == ["query"]
    assert tools["read"].parameters["properties"]["lines"]["maximum"] == READ_LINES
    assert "as search gives it" in tools["read"].parameters["properties"]["file"]["description"]
    with pytest.raises(ToolError, match="limit"):
        tools["search"].decode({"query": "x", "limit": 0})


async def test_tools_run_in_threads(tmp_path):
    """They block, so that a worker thread calls them; they leave none behind."""
    tools = by_name(write(tmp_path, a="zebra"))
    workers = Workers(trio.CapacityLimiter(1), lambda: trio.CancelScope(shield=True))
    with trio.fail_after(30):
        search = tools["search"]
        found = await search.call(search.decode('{"query": "zebra"}'), workers)
        reads = tools["read"]
        text = await reads.call(reads.decode('{"file": "a.md"}'), workers)
    assert [passage["file"] for passage in found["passages"]] == ["a.md"]
    assert text["text"] == "zebra"
    assert workers.abandoned == 0


def test_the_search_tool_listens_to_its_cancel_token(tmp_path):
    """Once the token that a worker thread carries is set, no file is read any more."""
    search = by_name(write(tmp_path, a="zebra"))["search"]

    def cancelled() -> dict[str, Any]:
        tools_module._cancel_token.set(stop)
        return search("zebra")

    stop = threading.Event()
    context = contextvars.copy_context()
    assert context.run(cancelled)["files_searched"] == 1
    stop.set()
    assert context.run(cancelled)["files_searched"] == 0


def test_a_question_is_answered_with_its_place(tmp_path):
    """Plan, search, plan, read, plan: the answer quotes the right lines with file and line."""
    tools = by_name(write(tmp_path, README=README) / "README.md")
    specs = tuple(ToolSpec(t.name, t.description, t.parameters) for t in tools.values())
    messages: list[Message] = [UserMessage("How do I resume a stream?")]
    said = ""
    for step in ("m1", "m2", "m3"):
        machine = OfflineProvider().normalizer(step)
        chunks = plan(Prompt("quote", tuple(messages), specs))
        parts = [e for c in chunks for e in machine.feed(c) if isinstance(e, PartFinished)]
        said = "".join(part.text for part in parts if part.kind == "text")
        calls = tuple(
            ToolCall(str(part.call_id), str(part.name), part.text)
            for part in parts
            if part.kind == "tool_call"
        )
        messages.append(AssistantMessage(said, calls))
        for call in calls:
            answer = tools[call.name](**tools[call.name].decode(call.arguments))
            messages.append(ToolMessage(call.call_id, call.name, json.dumps(answer)))
    assert said.startswith(
        "These passages of the folder answer best (quoted, not written by a model):\n\n"
        "> A stream can be resumed: send the id of the last event that you have seen:\n"
        ">\n> ```sh\n> curl -N -H 'Last-Event-ID: 7' http://127.0.0.1:8080/runs/1/events\n> ```\n\n"
        "`README.md:11`"
    )


def test_the_default_is_the_readme_that_came_along(tmp_path, monkeypatch):
    """In an installed package it is inside, in a checkout beside; in neither, that is said."""
    package = tmp_path / "agentsse"
    package.mkdir()
    monkeypatch.setattr(guide_module, "_HERE", package)
    with pytest.raises(ConfigError, match="--folder PATH"):
        default_folder()
    write(tmp_path, README="beside")
    assert default_folder() == tmp_path / "README.md"
    write(package, README="inside")
    assert default_folder() == package / "README.md"
    assert "README.md" in guide().description


def test_the_agent_is_named_guide_and_needs_no_model(tmp_path):
    """It is a model agent of the offline provider, with the two tools for its folder."""
    agent = guide(write(tmp_path, a="x"))
    assert agent.name == "guide"
    assert agent.model == "offline:quote"
    assert [tool.name for tool in agent.tools] == ["search", "read"]
    assert tmp_path.name in agent.description


def test_a_folder_with_nothing_to_see_refuses_to_start(tmp_path):
    """Missing, empty, all hidden: said at once, with what to do."""
    with pytest.raises(ConfigError, match=r"nowhere', which is neither; name another"):
        guide(tmp_path / "nowhere")
    (tmp_path / ".hidden").touch()
    with pytest.raises(ConfigError, match="where there is none"):
        guide(tmp_path)


def test_prose_that_answers_comes_before_a_command_that_asks(tmp_path):
    """A fenced block that repeats the question is no answer to it."""
    asked = "```sh\nask 'How do I resume a stream?'\n```\n"
    (tmp_path / "a.md").write_text(f"{asked}\nTo resume a stream, send the last id that you saw.\n")
    assert places(tmp_path, "resume stream")[0] == ("a.md", 5)
