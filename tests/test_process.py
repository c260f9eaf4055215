"""Child processes: what they print is heard, and when their context is left nothing of them runs.

Programs here are real; each test looks into /proc for what is left of them.
"""

import gc
import math
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from agentsse import process as under_test
from agentsse.errors import AgentsseError
from agentsse.process import CannotEnd, CannotStart, open_process, open_service_nursery

SECONDS = 20  # generous: only a test that hangs ever sees it
PYTHON = (sys.executable, "-S", "-E", "-c")

FOREVER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


def starts(code, then=FOREVER):
    """A program that starts another one in its group, which holds its pipes, and goes on."""
    other = [*PYTHON, code]
    return f"import subprocess; subprocess.Popen({other!r}); {then}"


def facts_of_processes():
    """The pid, state, parent and group of all that are not only waiting to be reaped."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        state, parent, group, *_ = text.rpartition(")")[2].split()
        if state != "Z":
            yield int(path.parent.name), int(parent), int(group)


def living(group):
    """Who is in a group."""
    return [pid for pid, _, of in facts_of_processes() if of == group]


def in_session(session):
    """Who is in a session, and not only waiting to be reaped."""
    found = []
    for pid, _, _ in facts_of_processes():
        with suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                found.append(pid)
    return found


pidfd_open = os.pidfd_open


def own_children():
    """Who was started here, and is still there."""
    return [pid for pid, parent, _ in facts_of_processes() if parent == os.getpid()]


def fail():
    raise KeyError


async def fail_later():
    await trio.lowlevel.cancel_shielded_checkpoint()
    fail()


def open_files():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True)
def nothing_stays():
    """No test leaves a child or a descriptor behind."""
    before = open_files()
    yield
    assert [] == own_children()
    assert len(before) >= len(open_files())


async def lines_of(process, number):
    """Read until so many lines have come."""
    text = b""
    while text.count(b"\n") < number:
        text += await process.stdout.receive_some()
    return text.decode().split()


# Pipes


async def test_it_reads_prints_and_exits():
    """What is written to it arrives, what it prints comes back, and its exit is seen."""
    with trio.fail_after(SECONDS):
        async with open_process(["cat"]) as process:
            await process.stdin.send_all(b"hello")
            await process.stdin.aclose()

            assert b"hello" == await process.stdout.receive_some()
            assert b"" == await process.stdout.receive_some()
            assert await process.wait() == 0
            assert await process.wait() == 0
            assert process.stderr_tail() == ""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
async def test_exit_code(code, expected):
    """An exit has its code, and an end by a signal the number of that."""
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, code]) as process:
            assert expected == await process.wait()


async def test_environment_and_folder(tmp_path):
    """A program gets the environment and the folder that it was given."""
    code = "import os; print(os.environ.get('COLOUR'), os.environ.get('HOME'), os.getcwd())"
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, code], env={"COLOUR": "green"}, cwd=tmp_path) as process:
            assert ["green", "None", str(tmp_path)] == await lines_of(process, 1)


async def test_stderr_is_drained_and_its_end_kept():
    """A program that prints more to stderr than a pipe holds is not blocked."""
    code = "import sys; sys.stderr.write('x' * 1_000_000 + '\\nat the end\\n'); print('done')"
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, code]) as process:
            assert ["done"] == await lines_of(process, 1)
            assert await process.wait() == 0

            assert process.stderr_tail().endswith("x\nat the end")
            assert under_test.TAIL >= len(process.stderr_tail())


async def test_last_words_are_known_once_it_has_exited():
    """What it has printed to stderr before its exit is there after `wait`, who else may hold it."""
    code = starts(FOREVER, "import sys; sys.stderr.write('sorry'); raise SystemExit(1)")
    with trio.fail_after(SECONDS):
        for _ in range(5):
            async with open_process([*PYTHON, code]) as process:
                assert await process.wait() == 1
                assert process.stderr_tail() == "sorry"


async def test_rest_of_stdout():
    """What it has printed can be had after its exit, though a child of its holds the pipe."""
    code = starts("import time; time.sleep(600)", "print('x' * 50_000, flush=True)")
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, code]) as process:
            assert await process.wait() == 0
            assert b"x" * 50_000 + b"\n" == process.rest_of_stdout()
            assert process.rest_of_stdout() == b""
        assert process.rest_of_stdout() == b""


# What cannot be started


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such-program"], "got no-such-program: No such file or directory; install it"),
        ([Path("/etc/passwd")], "got /etc/passwd: Permission denied; install it"),
        (["echo", "a\0b"], "got one that cannot: embedded null byte"),
        (["echo", "\ud800"], "got one that cannot: 'utf-8' codec"),
        (["echo", "x" * 10_000_000], "got echo: Argument list too long"),
        ([], "expected a program and its arguments, got nothing"),
    ],
)
async def test_cannot_start(argv, message):
    """What cannot be started is named, with the reason and what to do."""
    with trio.fail_after(SECONDS), pytest.raises(CannotStart) as raised:
        async with open_process(argv):
            raise AssertionError

    assert isinstance(raised.value, AgentsseError)
    assert message in raised.value.message


async def test_cannot_start_in_a_folder_that_is_not_there():
    """It is said when the folder is what is missing."""
    with trio.fail_after(SECONDS), pytest.raises(CannotStart) as raised:
        async with open_process(["cat"], cwd="/no/such"):
            raise AssertionError

    expected = "expected a folder to start cat in, got /no/such: No such file or directory"
    assert expected == raised.value.message


# The end


@pytest.mark.parametrize(
    ("code", "number"),
    [
        (FOREVER, 1),
        (starts(FOREVER), 2),
        (starts(STUBBORN), 2),
        (starts(starts(FOREVER)), 3),
        (starts(FOREVER, "pass"), 1),
        (starts(STUBBORN, "pass"), 1),
        ("print('up', flush=True); import os, time; os.close(1); os.close(2); time.sleep(600)", 1),
        ("print('up', flush=True); print('x' * 1_000_000)", 1),
    ],
    ids=[
        "alone",
        "child",
        "stubborn child",
        "grandchild",
        "child without its parent",
        "stubborn child without its parent",
        "no pipes",
        "blocked in a pipe",
    ],
)
@pytest.mark.parametrize("way", ["leave", "cancel", "error"])
async def test_nothing_outlives_the_context(code, number, way):
    """However the context is left, nothing that the program has started runs any longer."""
    with trio.fail_after(SECONDS), trio.CancelScope() as scope:
        try:
            async with open_process([*PYTHON, code]) as process:
                assert ["up"] * number == (await lines_of(process, number))[:number]
                assert living(process.pid)
                if way == "cancel":
                    scope.cancel()
                    await trio.sleep_forever()
                if way == "error":
                    fail()
        except KeyError:
            assert way == "error"
        assert [] == living(process.pid)

    assert ("cancel" == way) == scope.cancelled_caught
    assert [] == living(process.pid)


async def test_who_does_not_listen_is_killed(monkeypatch):
    """A program that ignores SIGTERM has its grace, and no more."""
    monkeypatch.setattr(under_test, "GRACE", 0.05)
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, STUBBORN]) as process:
            await lines_of(process, 1)
        assert [] == living(process.pid)


async def test_who_listens_may_clean_up(tmp_path, monkeypatch):
    """A program is asked first, and what it does then is waited for."""
    monkeypatch.setattr(under_test, "GRACE", math.inf)
    code = (
        "import signal, sys, pathlib\n"
        "def tidy(*_): pathlib.Path(sys.argv[1]).write_text('tidy'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, tidy)\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
        "while True: signal.pause()"
    )
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, code, tmp_path / "note"]) as process:
            await lines_of(process, 1)

    assert (tmp_path / "note").read_text() == "tidy"


async def test_no_grace_for_who_is_gone(monkeypatch):
    """When the program has exited, nobody waits for what it has left behind."""
    monkeypatch.setattr(under_test, "GRACE", math.inf)
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, starts(STUBBORN, "pass")]) as process:
            await lines_of(process, 1)
            await process.wait()
            assert living(process.pid)
        assert [] == living(process.pid)


async def test_pid_is_kept_until_the_group_is_dead():
    """A program that has exited stays unreaped: no stranger can have its pid, or its group's."""
    with trio.fail_after(SECONDS):
        async with open_process(["true"]) as process:
            await process.wait()
            os.killpg(process.pid, 0)
            repr(process)
            os.killpg(process.pid, 0)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


@pytest.mark.parametrize("steps", range(12))
async def test_cancel_at_every_step(steps):
    """However early the cancel comes, nothing is left behind."""
    pids = []

    async def use():
        async with open_process([*PYTHON, FOREVER]) as process:
            pids.append(process.pid)
            await lines_of(process, 1)

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    assert [] == [pid for pid in pids if living(pid)]
    assert [] == own_children()


def only_the_leader(group, number):
    """A stand-in for the kernel that is slow to kill the rest of a group."""
    if number:
        os.kill(group, number)


async def test_the_last_of_the_group_is_waited_for(monkeypatch):
    """The context is left when the slowest of those who were killed is gone."""
    open_pidfd = os.pidfd_open

    def kill_late(pid):
        fd = open_pidfd(pid)
        if pid in others:
            os.kill(pid, signal.SIGKILL)
        return fd

    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, starts(FOREVER)]) as process:
            await lines_of(process, 2)
            others = [pid for pid in living(process.pid) if pid != process.pid]
            monkeypatch.setattr(os, "killpg", only_the_leader)
            monkeypatch.setattr(os, "pidfd_open", kill_late)
    assert len(others) == 1
    assert [] == living(process.pid)


def test_who_goes_while_it_is_looked_at():
    """A process that ends while /proc is read counts as gone."""
    assert under_test._group(Path("/proc/0/stat"), 0) is None


def test_who_is_in_another_session_is_not_signalled():
    """A pid that has become a stranger's is left alone, whatever it was before."""
    stranger = os.getsid(0) + 1
    assert not under_test._signal_member(os.getpid(), None, stranger, signal.SIGKILL)


async def test_who_has_gone_since_it_was_seen_is_not_waited_for(monkeypatch):
    """Nor is a stranger that has its pid now: the session is looked at once more."""
    seen = [{}, {os.getpid(): os.getpgid(0)}]
    monkeypatch.setattr(under_test, "_living", lambda _session: seen.pop())
    with trio.fail_after(SECONDS):
        await under_test._kill_session(os.getsid(0) + 1)
    assert [] == seen


LONELY = f"import os; os.setpgid(0, 0); {FOREVER}"
JOB = "sh -c 'echo up; exec sleep 600'"


@pytest.mark.parametrize(
    ("argv", "number"),
    [
        ([*PYTHON, starts(LONELY)], 2),
        ([*PYTHON, starts(starts(LONELY, LONELY))], 3),
        ([*PYTHON, starts(f"import os; os.setpgid(0, 0); {STUBBORN}")], 2),
        ([*PYTHON, starts(LONELY, "pass")], 1),
        (["bash", "-c", f"timeout 600 {JOB}; true"], 1),
        (["bash", "-c", f"set -m; {JOB} & wait"], 1),
    ],
    ids=["child", "grandchild", "stubborn", "child without its parent", "timeout", "job control"],
)
async def test_who_makes_a_group_of_its_own_ends_too(argv, number):
    """Another group is no way out of the session, and what is in it is joined."""
    with trio.fail_after(SECONDS), trio.CancelScope() as scope:
        async with open_process(argv) as process:
            await lines_of(process, number)
            before = in_session(process.pid)
            assert {pid for pid in before if os.getpgid(pid) != process.pid}
            scope.cancel()
            await trio.sleep_forever()

    assert scope.cancelled_caught
    assert [] == in_session(process.pid)


async def test_who_makes_a_group_of_its_own_is_asked_first(tmp_path, monkeypatch):
    """SIGTERM reaches it as well: a program that waits for its child ends in time."""
    monkeypatch.setattr(under_test, "GRACE", math.inf)
    script = f"trap 'echo tidy >{tmp_path}/note; exit' TERM; timeout 600 {JOB}"
    with trio.fail_after(SECONDS):
        async with open_process(["bash", "-c", script]) as process:
            await lines_of(process, 1)

    assert (tmp_path / "note").read_text() == "tidy\n"


async def test_without_pidfd(monkeypatch):
    """Where the kernel has no descriptors for processes, threads wait for leaders.

    The rest of a session is killed too, but not waited for.
    """
    monkeypatch.delattr(os, "pidfd_open")
    with trio.fail_after(SECONDS):
        async with open_process([*PYTHON, "raise SystemExit(7)"]) as process:
            assert await process.wait() == 7
        stubborn = f"import os; os.setpgid(0, 0); {STUBBORN}"
        async with open_process([*PYTHON, starts(stubborn)]) as process:
            await lines_of(process, 2)
            (other,) = set(in_session(process.pid)) - {process.pid}
            fd = pidfd_open(other)
        await trio.lowlevel.wait_readable(fd)
    trio.lowlevel.notify_closing(fd)
    os.close(fd)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_who_cannot_be_killed_is_named(monkeypatch):
    """A program of another user, which no signal reaches, is not waited for without end."""

    def refuse(_group, _number):
        raise PermissionError

    monkeypatch.setattr(under_test, "GRACE", 0.01)
    monkeypatch.setattr(under_test, "KILLED", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", refuse)
        with trio.fail_after(SECONDS), pytest.raises(CannotEnd) as raised:
            async with open_process([*PYTHON, "import time; time.sleep(600)"]) as process:
                await trio.testing.wait_all_tasks_blocked()

    pid = process.pid
    assert f"expected process {pid} to end when it was killed" in raised.value.message
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # noqa: ASYNC222 - it is dead
    del process, raised  # with them goes the descriptor that Trio has of it
    gc.collect()


async def test_who_may_not_be_signalled_but_is_gone(monkeypatch):
    """Where the kernel refuses to tell whether a group is there, its members are looked for."""

    def refuse(_group, _number):
        raise PermissionError

    with trio.fail_after(SECONDS):
        async with open_process(["true"]) as process:
            await process.wait()
            monkeypatch.setattr(os, "killpg", refuse)
        assert [] == living(process.pid)


# Errors


@pytest.mark.parametrize("error", [ValueError("bug"), ExceptionGroup("two", [ValueError("bug")])])
async def test_an_error_goes_on_as_it_is(error):
    """An error of the block leaves the context in no other group than its own."""
    with trio.fail_after(SECONDS), pytest.raises(type(error)) as raised:
        async with open_process(["cat"]):
            raise error

    assert error is raised.value
    assert raised.value.__context__ is None


async def test_a_lone_error_of_a_task_stands_for_its_group():
    """A task that fails ends the block, and its error is what is raised."""

    async def serve():
        async with open_service_nursery() as nursery:
            nursery.start_soon(fail_later)
            await trio.sleep_forever()

    with pytest.raises(KeyError):
        await serve()


async def test_errors_of_two_tasks_stay_together():
    """Nor is an error of a task lost beside that of another one."""

    async def serve():
        async with open_service_nursery() as nursery:
            nursery.start_soon(fail_later)
            nursery.start_soon(fail_later)
            await trio.sleep_forever()

    with pytest.RaisesGroup(KeyError, KeyError):
        await serve()


async def test_two_errors_stay_together():
    """Where the block and a task fail, neither is lost."""

    async def serve():
        async with open_service_nursery() as nursery:
            nursery.start_soon(fail_later)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError

    with pytest.RaisesGroup(ValueError, KeyError):
        await serve()


async def test_a_service_ends_with_its_block():
    """A task that goes on without end is cancelled when the block is left."""
    async with open_service_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        await trio.lowlevel.checkpoint()


async def test_cancelled_goes_on_as_cancelled():
    """A cancel from outside reaches the block and its tasks, and goes on in no group."""
    seen = []
    with trio.CancelScope() as scope:
        try:
            async with open_service_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                scope.cancel()
                await trio.lowlevel.checkpoint()
        except BaseException as error:
            seen.append(type(error))
            raise

    assert scope.cancelled_caught
    assert [trio.Cancelled] == seen
