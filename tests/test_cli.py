"""The command line as people meet it: real processes, real terminals, real signals."""

import json
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial

import attrs
import httpx2
import pytest
import trio
from cutting import Cut, open_cutter
from raw import wait_until

from agentsse import agent, tool
from agentsse.cli import LogWriter, _reporter
from agentsse.client import open_client
from agentsse.dialects import OpenThread, SetTrigger
from agentsse.dialects.native import NATIVE
from agentsse.events import Custom, Option, PartDelta, Question, RunFinished, decode_event
from agentsse.exchange import AppOptions
from agentsse.sse import comment, retry
from agentsse.testing import open_server, read_events

WHALE = "🐋"
PIPE = 64 * 1024  # bytes that a pipe holds
TOO_MANY = 25_000  # lines; more than wait in the writer and in the pipe together

AGENTS = '''
import trio
from agentsse import AgentError, agent, emit

@agent
async def ticker(run, input):
    """Count."""
    try:
        for n in range(input["n"]):
            emit("tick", n=n)
            run.text(f"{n} ")
            await trio.sleep(input.get("gap", 0))
        return {"n": input["n"]}
    finally:
        with run.cleanup():
            emit("cleaned")

@agent
async def broken(run, input):
    raise AgentError("the moon is not in reach")

@agent
async def crashing(run, input):
    raise ValueError("a bug")

@agent
async def asker(run, input):
    return await run.ask("Your name?")

@agent
async def chooser(run, input):
    return await run.ask(input)
'''


@pytest.fixture
def agents(tmp_path):
    path = tmp_path / "some_agents.py"
    path.write_text(AGENTS)
    return path


def agentsse(*arguments, **options):
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "agentsse", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


@asynccontextmanager
async def serving(*arguments):
    """A served process, and the URL that it prints; it is ended by its own id."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "agentsse", "serve", "--port", "0", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        told = b""
        while b"try:" not in told:
            chunk = await process.stdout.receive_some()
            assert chunk, f"it ended early: {(await process.stderr.receive_some()).decode()}"
            told += chunk
        words = told.decode().split()
        yield process, next(word for word in words if word.startswith("http")), told.decode()
    finally:
        if process.poll() is None:
            process.kill()
        with trio.move_on_after(10, shield=True):
            await process.wait()
        await process.stdout.aclose()
        await process.stderr.aclose()


async def test_serve_answers_from_the_readme_without_any_setting():
    """`agentsse serve` prints its address and serves the guide, which quotes file and line."""
    with trio.fail_after(60):
        async with serving() as (process, url, told), httpx2.AsyncClient() as client:
            assert "agents: guide" in told
            asked = {"input": "How do I resume a stream?"}
            headers = {"Accept": "text/event-stream"}
            async with client.stream(
                "POST", f"{url}/agents/guide/runs", json=asked, headers=headers
            ) as response:
                events = [event async for event in read_events(response.aiter_bytes())]
            said = "".join(event.delta for event in events if isinstance(event, PartDelta))
            process.send_signal(signal.SIGTERM)
            code = await process.wait()
    assert isinstance(events[-1], RunFinished)
    assert events[-1].outcome == "success"
    assert "Last-Event-ID" in said
    assert "`README.md:" in said
    assert code == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
async def test_the_line_that_serve_prints_works_as_it_stands():
    """What it tells people to try can be pasted into a shell."""
    with trio.fail_after(60):
        async with serving() as (_process, _url, told):
            line = told.partition("try: ")[2].strip()
            done = await trio.run_process(["sh", "-c", line], capture_stdout=True)
    frames = done.stdout.decode().split("\n\n")
    assert "event: run_started" in frames[2]
    assert "event: run_finished" in frames[-2]


async def test_folder_is_what_the_guide_reads(tmp_path):
    """`--folder` points it at other files."""
    (tmp_path / "whales.txt").write_text("Blue whales eat krill.\n")
    with trio.fail_after(60):
        asked = {"input": "What do blue whales eat?"}
        async with (
            serving("--folder", tmp_path) as (_process, url, _told),
            httpx2.AsyncClient() as client,
        ):
            answer = await client.post(f"{url}/agents/guide/runs", json=asked)
    assert "krill" in answer.json()["result"]
    assert "whales.txt:1" in answer.json()["result"]


async def test_the_log_has_a_line_of_json_per_request(agents):
    """Off a terminal the log is JSON lines on standard error, without the query."""
    with trio.fail_after(60):
        async with serving(agents) as (process, url, _told):
            async with httpx2.AsyncClient() as client:
                await client.get(f"{url}/health/live?secret=canary")
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            logged = b""
            while chunk := await process.stderr.receive_some():
                logged += chunk
    lines = [json.loads(line) for line in logged.splitlines()]
    request = next(line for line in lines if line["event"] == "request")
    assert (request["method"], request["path"], request["status"]) == ("GET", "/health/live", 200)
    assert b"canary" not in logged
    assert lines[-1]["event"] == "stopped"


# What happens to the log and to the output is nobody's reason not to serve


def free_port():
    """A port that nobody has just now, for a server that cannot say which one it has taken."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


async def wait_served(process, port):
    """Wait until a server that says nothing answers; its answer."""
    while True:
        assert process.poll() is None
        try:
            async with httpx2.AsyncClient() as client:
                return await client.get(f"http://127.0.0.1:{port}/health/live")
        except httpx2.ConnectError:
            await trio.sleep(0.05)  # nothing else tells: its output is closed


@pytest.mark.parametrize(
    "redirection", [">/dev/full", ">&-", "2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"]
)
async def test_serve_needs_nobody_to_read_what_it_says(redirection):
    """Standard streams that are full or closed: it serves, drains, and exits with 0."""
    port = free_port()
    command = f"exec {sys.executable} -m agentsse serve --port {port} {redirection}"
    with trio.fail_after(60):
        process = await trio.lowlevel.open_process(
            ["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            answers = [await wait_served(process, port) for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            told, logged = b"", b""
            async with process.stdout, process.stderr:
                async for chunk in process.stdout:
                    told += chunk
                async for chunk in process.stderr:
                    logged += chunk
            code = await process.wait()
        finally:
            if process.poll() is None:
                process.kill()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert code == 0
    assert b"Traceback" not in logged
    assert b'"event"' not in told  # a log that has no place does not take another's
    assert (b"listens on" in told) == ("2" == redirection[0])


async def test_log_that_nobody_reads_holds_nobody_up(agents):
    """A pipe that is full stops no request; the exit, too, waits for it no longer than a second."""
    with trio.fail_after(60):
        async with serving(agents) as (process, url, _told):
            async with httpx2.AsyncClient() as client:
                statuses = {
                    (await client.get(f"{url}/nothing/{'x' * 200}/{n}")).status_code
                    for n in range(PIPE // 200 + 100)
                }
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            logged = await process.stderr.receive_some(2 * PIPE)
    assert statuses == {404}
    assert len(logged) >= PIPE // 2


def test_log_drops_what_is_too_much_and_says_how_much(monkeypatch):
    """At most 10,000 lines wait for a reader; of those beyond, only the number is kept."""
    reading, writing = os.pipe()
    with open(reading) as log, open(writing, "w") as stderr:  # noqa: PTH123  # a pipe has no path
        monkeypatch.setattr(sys, "stderr", stderr)
        writer = LogWriter()
        for n in range(TOO_MANY):
            writer.put(f"line {n} {'x' * 100}")
        kept = [log.readline()]
        while writer._lines.full():
            kept.append(log.readline())
        writer.put("marked")
        while kept[-1] != "marked\n":
            kept.append(log.readline())
        kept.append(log.readline())
        writer.close()
    numbers = [int(line.split()[1]) for line in kept if line.startswith("line")]
    dropped = [int(line[1:].split()[0]) for line in kept if line.startswith("(")]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 10_000
    assert dropped
    assert len(numbers) + sum(dropped) == TOO_MANY


def test_log_is_written_before_the_end(capsys):
    """Closing writes what waits; a second time there is nothing to do."""
    writer = LogWriter()
    for n in range(100):
        writer.put(f"line {n}")
    writer.close()
    writer.close()
    assert capsys.readouterr().err.splitlines() == [f"line {n}" for n in range(100)]


@pytest.mark.parametrize("form", ["json", "console", None])
def test_log_has_levels_and_escapes_what_a_terminal_would_obey(form, capsys):
    """An error is marked as one; a client's bytes are shown, not obeyed."""
    writer = LogWriter()
    report = _reporter(form, writer)
    report("request", path="/a b\x1b[2J")
    report("run_overdue", run_id="r")
    report("crash", where="here")
    writer.close()
    lines = capsys.readouterr().err.splitlines()
    assert ["info", "warning", "error"] == [
        next(level for level in ("info", "warning", "error") if level in line) for line in lines
    ]
    assert "\x1b[2J" not in lines[0]


# One run


def test_run_prints_what_an_agent_does(agents):
    """Events a line each, text as it comes, the outcome last; the exit code is 0."""
    done = agentsse("run", "--agents", agents, "ticker", '{"n": 2}')
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert '  tick {"n":0}' in lines
    assert lines[-1] == "success"


def test_run_prints_events_as_lines_of_json(agents):
    """`--json` is one event a line, the same as on the wire."""
    done = agentsse("run", "--json", "--agents", agents, "ticker", '{"n": 2}')
    events = [decode_event(line) for line in done.stdout.splitlines()]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.name for event in events if isinstance(event, Custom)] == [
        "tick", "tick", "cleaned",
    ]  # fmt: skip
    assert isinstance(events[-1], RunFinished)


def test_run_tells_an_error_by_its_exit_code(agents):
    """The agent's own words are shown, and the exit code is 1."""
    done = agentsse("run", "--agents", agents, "broken", "x")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "error: the moon is not in reach"


def test_run_tells_of_a_bug_with_its_traceback(agents):
    """What is for whoever wrote the agent goes to standard error, and no other report does."""
    done = agentsse("run", "--agents", agents, "crashing", "x")
    assert done.returncode == 1
    assert "the agent 'crashing' raised ValueError" in done.stdout.splitlines()[-1]
    assert done.stderr.startswith("crash: ")
    assert "ValueError: a bug" in done.stderr
    assert "run_finished" not in done.stderr


def test_run_reads_its_input_from_a_pipe(agents):
    """`-` stands for standard input."""
    done = agentsse("run", "--agents", agents, "ticker", "-", input='{"n": 1}')
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody", "x"], "expected one of the agents"),
        (["ticker", '{"n": '], "INPUT: expected JSON"),
    ],
)
def test_run_refuses_what_it_cannot_do(agents, arguments, told):
    """What was wrong is said on standard error, and the exit code is 2."""
    done = agentsse("run", "--agents", agents, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


async def test_interrupt_cancels_the_run_and_prints_its_receipt(agents):
    """^C lets the agent clean up; the receipt is the last line, the exit code 130."""
    command = [sys.executable, "-m", "agentsse", "run", "--agents", str(agents), "ticker"]
    with trio.fail_after(60):
        process = await trio.lowlevel.open_process(
            [*command, '{"n": 9, "gap": 60}'], stdout=subprocess.PIPE
        )
        async with process.stdout:
            told = b""
            while b"tick" not in told:
                told += await process.stdout.receive_some()
            process.send_signal(signal.SIGINT)
            while chunk := await process.stdout.receive_some():
                told += chunk
        assert await process.wait() == 130
    lines = told.decode().splitlines()
    assert "  cleaned {}" in lines
    assert lines[-1].startswith("cancelled: cause client_cancel, gone in ")


async def run_at_terminal(agents, *arguments, typed):
    """Run an agent with a terminal as its input, and type when it asks; code, output, errors."""
    command = [sys.executable, "-m", "agentsse", "run", "--agents", str(agents), *arguments]
    ours, theirs = pty.openpty()
    told, errors = bytearray(), bytearray()
    with trio.fail_after(60):
        process = await trio.lowlevel.open_process(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        os.close(theirs)

        async def read_errors(terminal):
            async for chunk in process.stderr:
                errors.extend(chunk)
                while typed and errors.count(b"> ") >= asked - len(typed) + 1:
                    await terminal.send_all(typed.pop(0))

        asked = len(typed)
        async with (
            process.stdout,
            process.stderr,
            trio.lowlevel.FdStream(ours) as terminal,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(read_errors, terminal)
            async for chunk in process.stdout:
                told.extend(chunk)
        code = await process.wait()
    return code, told.decode(), errors.decode()


async def test_run_asks_the_person_at_the_terminal(agents):
    """A question is put to the terminal, and the line that is typed answers it.

    The prompt goes to standard error, so that the output is what the agent does and nothing else.
    """
    code, told, errors = await run_at_terminal(agents, "asker", "x", typed=[b"Ada\n"])
    assert code == 0
    assert "? Your name?" in told.splitlines()
    assert told.splitlines()[-1] == "success"
    assert errors == "> "


async def test_output_of_a_run_that_asks_is_events_only(agents):
    """Also with `--json`: each line is an event, whatever is asked meanwhile."""
    code, told, errors = await run_at_terminal(agents, "--json", "asker", "x", typed=[b"Ada\n"])
    events = [decode_event(line) for line in told.splitlines()]
    assert code == 0
    assert isinstance(events[-1], RunFinished)
    assert bytes(events[-1].result) == b'"Ada"'
    assert errors == "> "


async def test_end_of_input_at_a_question_cancels_the_run(agents):
    """Ctrl-D says that there will be no answer: the run is cancelled, as by Ctrl-C."""
    code, told, errors = await run_at_terminal(agents, "asker", "x", typed=[b"\x04"])
    assert code == 130
    assert told.splitlines()[-1].startswith("cancelled: cause client_cancel")
    assert "Traceback" not in errors


def test_a_question_that_nobody_can_answer_ends_the_run(agents):
    """Lines of a pipe are answers; once it has ended, the exit code tells of an open question."""
    answered = agentsse("run", "--agents", agents, "asker", "x", input="Ada\n")
    open_still = agentsse("run", "--agents", agents, "asker", "x", stdin=subprocess.DEVNULL)
    assert (answered.returncode, open_still.returncode) == (0, 4)
    assert answered.stdout.splitlines()[-1] == "success"
    assert "nobody can answer" in open_still.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")  # noqa: PTH110
def test_a_full_disk_cancels_the_run(agents):
    """What cannot be printed need not be done: it says why, and the exit code is 3."""
    command = f"{sys.executable} -m agentsse run --agents {agents} ticker '{{\"n\": 99999}}'"
    done = subprocess.run(
        ["sh", "-c", f"{command} > /dev/full"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "cannot print: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_reader_that_leaves_the_pipe_cancels_the_run(agents):
    """`agentsse run ... | head -1` ends, without a traceback."""
    command = f"{sys.executable} -m agentsse run --agents {agents} ticker '{{\"n\": 99999}}'"
    with trio.fail_after(60):
        done = await trio.run_process(
            ["sh", "-c", f"{command} | head -n 1"], capture_stdout=True, capture_stderr=True
        )
    assert done.stdout.count(b"\n") == 1
    assert b"Traceback" not in done.stderr


# Looking on at a server's runs, and cancelling them


@tool
async def lookup(name: str) -> str:
    """Look a name up."""
    await trio.lowlevel.checkpoint()
    return f"{name} is here"


@agent(tools=[lookup])
async def talker(run, input):
    """Say things of many kinds, with a whale in them."""
    with run.step("look around"):
        await run.call("lookup", {"name": WHALE})
    run.emit("seen", whale=WHALE)
    for word in input["words"]:
        run.text(word)
        await trio.sleep(0.001)
    return "done"


@agent
async def asking(run, input):
    """Ask one thing of each kind."""
    options = (Option(id="a'b"), Option(id="c"))
    return await run.ask(
        [
            Question(id="q1", kind="text", prompt="Your name?"),
            Question(id="q2", kind="confirm", prompt="Sure?"),
            Question(id="q3", kind="choice", prompt="Which?", options=options),
            Question(id="q4", kind="choices", prompt="Which ones?", options=options),
        ]
    )


@agent
async def spinning(run, input):
    """Go on for ever."""
    run.text("round")
    await trio.sleep_forever()


@asynccontextmanager
async def site(**options):
    """A server in this process, its URL, and a client of it."""
    with trio.fail_after(60):
        async with (
            open_server(talker, asking, spinning, **options) as server,
            open_client(server.urls[0]) as client,
        ):
            yield server, server.urls[0], client


async def told(*arguments, code=0):
    """What a command prints, once it has ended with this code: its lines, and its errors."""
    done = await trio.run_process(
        [sys.executable, "-m", "agentsse", *arguments],
        capture_stdout=True, capture_stderr=True, check=False,
    )  # fmt: skip
    errors = done.stderr.decode()
    assert code == done.returncode, errors
    assert "Traceback" not in errors
    return done.stdout.decode().splitlines(), errors


@attrs.define
class Watching:
    """A `watch` that goes on."""

    process: trio.Process
    stdout: trio.abc.ReceiveStream
    read: bytearray = attrs.field(factory=bytearray)

    async def until(self, words):
        """Read on until it has said this; all it has said."""
        while words not in self.read:
            chunk = await self.stdout.receive_some()
            assert chunk, f"it ended early: {(await self.process.stderr.receive_some()).decode()}"
            self.read.extend(chunk)
        return self.read.decode()

    async def end(self):
        """Read on to the end; what it has said, and its exit code."""
        async for chunk in self.stdout:
            self.read.extend(chunk)
        return self.read.decode(), await self.process.wait()


@asynccontextmanager
async def watching(*arguments, stdout=subprocess.PIPE):
    """A `watch` that is read while it goes on; it is ended by its own id."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "agentsse", "watch", *arguments],
        stdout=stdout, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Watching(process, process.stdout)
    finally:
        if process.poll() is None:
            process.kill()
        with trio.move_on_after(10, shield=True):
            await process.wait()
        await process.stderr.aclose()
        if process.stdout is not None:
            await process.stdout.aclose()


async def test_watch_prints_a_run_as_it_comes():
    """What it was given, steps, tools, text as it comes, and how it ended; the exit code is 0."""
    async with site() as (_server, url, client):
        started = await client.start("talker", {"words": ["one ", "two"]})
        lines, errors = await told("watch", f"{url}/runs/{started.id}")
        again, _errors = await told("watch", f"{url}/runs/{started.id}/events?after=1")
    assert [
        f"run {started.id} of talker",
        '> {"words":["one ","two"]}',
        "step look around",
        f'  lookup {{"name":"{WHALE}"}}',
        f'  lookup gave "{WHALE} is here"',
        f'  seen {{"whale":"{WHALE}"}}',
        "one two",
        "success",
    ] == lines
    assert lines[2:] == again
    assert errors == ""


async def test_watch_prints_events_as_lines_of_json():
    """`--json` is one event a line, the same as on the wire; `types` chooses."""
    async with site() as (server, url, client):
        started = await client.start("talker", {"words": ["x"]})
        lines, _errors = await told("watch", "--json", f"{url}/runs/{started.id}")
        chosen, _errors = await told("watch", "--json", f"{url}/runs/{started.id}?types=custom")
        [run] = list(server.runs)
    assert list(run.log.events) == [decode_event(line) for line in lines]
    assert ["custom", "run_finished"] == [json.loads(line)["type"] for line in chosen]


async def test_watch_resumes_by_itself_and_says_so():
    """A connection that breaks costs a line on standard error, and nothing on standard output."""
    eager = attrs.evolve(NATIVE.framing, prelude=retry(1) + comment("agentsse"))
    async with site(dialects=(attrs.evolve(NATIVE, framing=eager),)) as (_server, url, client):
        started = await client.start("talker", {"words": ["one ", "two"]})
        cut = Cut(f'"seen","value":{{"whale":"{WHALE}'.encode()[:-2])
        async with open_cutter(url, cut) as cutter:
            lines, errors = await told("watch", f"{cutter.url}/runs/{started.id}")
        whole, _errors = await told("watch", f"{url}/runs/{started.id}")
    assert whole == lines
    assert errors.startswith("agentsse: 127.0.0.1:")
    assert errors.endswith("; back in 0.0 s\n")
    assert 1 == errors.count("\n")


async def test_watch_shows_a_question_and_what_to_type():
    """The line below it answers, pasted into a shell; each place has an answer of its kind."""
    async with site() as (_server, url, client):
        started = await client.start("asking")
        async with watching(f"{url}/runs/{started.id}") as looker:
            shown = (await looker.until(b"/input\n")).splitlines()
            _curl, _d, body, place = shlex.split(shown[-1])
            answer = json.loads(body)
            await client.answer(started.id, answer["answers"], request_id=answer["request_id"])
            rest, code = await looker.end()
    assert [
        "? Your name?",
        "? Sure? (yes or no)",
        "? Which? (a'b, c)",
        "? Which ones?",
    ] == shown[2:-1]
    assert f"{url}/runs/{started.id}/input" == place
    assert {"q1": "...", "q2": True, "q3": "a'b", "q4": ["a'b", "c"]} == answer["answers"]
    assert '  answered {"q1":"...","q2":true,"q3":"a\'b","q4":["a\'b","c"]}' in rest.splitlines()
    assert 0 == code


async def test_watch_shows_a_whole_server():
    """Each line stands below the name of its run; what came without deltas is shown as a whole."""
    async with site() as (server, url, client), watching(f"{url}/events") as looker:
        await wait_until(lambda: server.runs.feed.is_read)
        first = await client.start("spinning", "x", thread_id="t")
        await looker.until(b'> "x"\n')
        second = await client.start("talker", {"words": ["one ", "two"]})
        await looker.until(b"success\n")
        await client.cancel(first.id)
        shown = await looker.until(b"cancelled: ")
    lines = shown.splitlines()
    assert [f"run {first.id} of spinning", '> "x"', f"run {second.id} of talker"] == lines[:3]
    assert ["one two", "success", f"run {first.id}", "round"] == lines[-5:-1]


async def test_watch_shows_a_thread_until_it_is_closed():
    """What is said to it, its triggers, and its runs; an end of the thread is the end."""
    async with site() as (server, url, client), watching(f"{url}/threads/my%20t") as looker:
        await wait_until(lambda: server.runs.find_thread("my t") is not None)
        server.app.threads.open(OpenThread(thread_id="my t", agent="spinning"), default=None)
        server.app.threads.set_trigger(
            SetTrigger(thread_id="my t", trigger_id="hourly", every=3600.0, text="Look.")
        )
        told_so = await client.tell_thread("my t", "hello")
        await looker.until(b"round")
        await client.tell(told_so.run.id, "more")
        await looker.until(b"> more")
        await server.app.threads.close("my t")
        shown, code = await looker.end()
    lines = shown.splitlines()
    assert 0 == code
    assert "  trigger hourly available" in lines
    assert ["round", "> more"] == lines[lines.index("> more") - 1 :][:2]
    assert lines[-1].startswith("cancelled: cause client_cancel")


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
async def test_interrupt_ends_a_watch_and_leaves_the_run(way):
    """^C is leaving: what becomes of the run is its policy's to say. The exit code is 130."""
    async with site() as (server, url, client):
        kept = await client.start("spinning")
        left = await client.start("spinning", on_disconnect="cancel")
        for run in (kept, left):
            async with watching(f"{url}/runs/{run.id}") as looker:
                await looker.until(b"round")
                looker.process.send_signal(way)
                shown, code = await looker.end()
                assert 130 == code
                assert b"" == await looker.process.stderr.receive_some()
        await server.runs.find(left.id).done.wait()
        assert "running" == (await client.show(kept.id)).state
        assert "disconnect" == (await client.show(left.id)).receipt.cause
        await client.cancel(kept.id)
    assert "round" in shown


@pytest.mark.parametrize(("outcome", "code"), [("error", 1), ("cancelled", 3)])
async def test_watch_tells_how_a_run_ended_by_its_exit_code(outcome, code):
    """As `run` does; behind the end there is nothing, which is no error."""
    async with site() as (server, url, client):
        started = await client.start("talker" if outcome == "error" else "spinning", {})
        run = server.runs.find(started.id)
        if outcome == "cancelled":
            await client.cancel(started.id)
        await run.done.wait()
        lines, _errors = await told("watch", f"{url}/runs/{started.id}/", code=code)
        behind, _errors = await told("watch", f"{url}/runs/{started.id}?after={run.log.end}")
    assert lines[-1].startswith(outcome)
    assert behind == []


async def test_a_reader_that_leaves_a_watch_is_followed():
    """`agentsse watch ... | head -1` ends, without a word; the run goes on."""
    async with site() as (server, url, client):
        started = await client.start("spinning", on_disconnect="continue")
        reading, writing = os.pipe()
        async with watching(f"{url}/runs/{started.id}", stdout=writing) as looker:
            os.close(writing)
            async with trio.lowlevel.FdStream(reading) as pipe:
                await pipe.receive_some(1)
            await client.tell(started.id, "more")
            await client.tell(started.id, "and more")
            assert 141 == await looker.process.wait()
            assert b"" == await looker.process.stderr.receive_some()
        assert "running" == (await client.show(started.id)).state
        assert server.runs.unfinished()
        await client.cancel(started.id)


async def test_a_watch_at_a_terminal_shows_what_it_would_obey():
    """Colours are ours; whatever else a model writes to a terminal is a picture of itself."""
    async with site() as (_server, url, client):
        words = ["a\x1b[2J\x9b\x7f\r", f"{WHALE}\t\n"]
        started = await client.start("talker", {"words": words})
        ours, theirs = pty.openpty()
        async with watching(f"{url}/runs/{started.id}", stdout=theirs) as looker:
            os.close(theirs)
            shown = b""
            async with trio.lowlevel.FdStream(ours) as terminal:
                while b"success" not in shown:
                    shown += await terminal.receive_some()
                assert 0 == await looker.process.wait()
    assert f"\r\na␛[2J\ufffd␡␍{WHALE}\t\r\n".encode() in shown
    assert b"\x1b[32msuccess\x1b[0m" in shown


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{url}/runs/nobody", "a run that goes on or is still kept, got 'nobody'"),
        ("{url}", "expected the URL of a run, such as http://127.0.0.1:8080/runs/ID"),
        ("{url}/runs", "expected the URL of a run"),
        ("{url}/runs/x?dialect=hive", "got 'dialect' in its query"),
        ("{url}/events?types=wether", "types: expected"),
        ("{url}/runs/x?after=y", "expected '7', '7.1' or '0'"),
        ("ftp://127.0.0.1/runs/x", "expected the URL of a server"),
        ("127.0.0.1:{free}/runs/x", "is the server running? `agentsse serve` starts one"),
        ("http://127.0.0.1:{other}/runs/x", "is the URL right?"),
    ],
)
async def test_watch_says_why_it_cannot(url, words):
    """A wrong URL, nobody there, nothing of that name, somebody else: one line, and exit code 2."""

    async def answer(stream):
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\n<htm>")

    async with site() as (_server, served, _client), trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, answer, 0, host="127.0.0.1", handler_nursery=nursery)
        )
        other = listeners[0].socket.getsockname()[1]
        lines, errors = await told(
            "watch", url.format(url=served, free=free_port(), other=other), code=2
        )
        nursery.cancel_scope.cancel()
    assert [] == lines
    assert errors.startswith("agentsse: ")
    assert words in errors
    assert 1 == errors.count("\n")


async def test_cancel_prints_the_receipt():
    """It ends the run and says how; of one that is over already it says the same."""
    async with site() as (server, url, client):
        started = await client.start("spinning")
        first, _errors = await told("cancel", f"{url}/runs/{started.id}", "--reason", "enough")
        second, _errors = await told("cancel", f"{url}/runs/{started.id}/events")
        run = server.runs.find(started.id)
    assert first == second
    assert 1 == len(first)
    assert first[0].startswith("cancelled: ")
    assert "cause client_cancel, gone in " in first[0]
    assert "client_cancel" == run.end.receipt.cause


async def test_cancel_says_what_it_cannot():
    """No run, or none any more: exit code 2; a run that is not gone yet: 1."""
    async with site() as (_server, url, _client):
        _lines, errors = await told("cancel", f"{url}/threads/t", code=2)
        assert "expected the URL of a run, such as http://127.0.0.1:8080/runs/ID" in errors
        _lines, errors = await told("cancel", f"{url}/runs/nobody", code=2)
        assert "got 'nobody'" in errors


async def test_cancel_does_not_take_a_request_for_an_end():
    """A run that shields itself longer than the server waits is said to be there still."""
    opened = trio.Event()

    @agent
    async def stubborn(run, input):
        with trio.CancelScope(shield=True):
            await opened.wait()

    options = attrs.evolve(AppOptions(), cancel_patience=0.01)
    async with site() as (server, url, client):
        server.runs.agents["stubborn"] = stubborn
        server.app.options = options
        started = await client.start("stubborn")
        lines, _errors = await told("cancel", f"{url}/runs/{started.id}", code=1)
        opened.set()
        await server.runs.find(started.id).done.wait()
    assert ["not gone yet: something in it shields itself; look again"] == lines


def test_check_says_what_a_configuration_makes(tmp_path):
    """A good file: the address, and the agents."""
    path = tmp_path / "good.toml"
    path.write_text('[agents.librarian]\nmodel = "offline:quote"\n')
    done = agentsse("check", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "agents: librarian" in done.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[server]\nprot = 1\n", "did you mean 'port'"),
        ('[server]\nport = "x"\n', "bad.toml:2"),
        ('[server]\nhost = "0.0.0.0"\n', "loopback"),
        ('[agents.x]\nmodel = "nowhere:x"\n', "expected a model of one of the providers"),
        ('[agents.x]\nmodel = "x"\n', "expected a model as PROVIDER:MODEL"),
        ('[agents."a b"]\nmodel = "offline:x"\n', "expected an agent's name"),
        ('[agents.x]\nmodel = "offline:x"\ntools = ["os:getcwd"]\n', "decorate the function"),
        ('[providers.x]\nkind = "carrier_pigeon"\n', "providers.x.kind"),
        ('[dialects.x]\nmount = "/x"\n', "dialects"),
        ("[server\n", "bad.toml"),
    ],
)
def test_check_says_what_is_wrong(tmp_path, text, told):
    """A bad file: what, where, and what was expected; the exit code is 2."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    done = agentsse("check", path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_takes_no_address_but_loopback():
    """Whoever can connect can run agents, so nobody else may."""
    done = agentsse("serve", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "there is no authentication" in done.stderr


def test_help_imports_nothing_heavy():
    """`agentsse --help` costs what click costs."""
    code = "import sys, agentsse.cli; print({'trio', 'msgspec', 'quart'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names_are_imported_when_they_are_asked_for():
    """`from agentsse import agent` is the decorator, before and after its module is imported."""
    code = """
import sys, agentsse
assert "trio" not in sys.modules
from agentsse import agent, emit, tool
import agentsse.agents
from agentsse import agent as again
assert agent is again is agentsse.agents.agent, again
assert all(getattr(agentsse, name) for name in agentsse.__all__)
try:
    agentsse.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "module 'agentsse' has no attribute 'nothing'"


def test_the_version_is_the_package_s():
    """`version` says what is installed."""
    assert agentsse("version").stdout.startswith("agentsse 0.")
