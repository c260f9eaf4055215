"""Child processes: each leads a session, and nothing of the session outlives its context.

Knows: programs, pipes, signals, groups and sessions. Must never know what a program says or whom it
serves.

The rule to keep: the leader is not reaped before its session was killed. Until then its pid, which
is also the id of the session and of its first group, is its own, and no signal can reach a
stranger. So nothing here polls the child in the ordinary way, which reaps it: its exit is seen
through a descriptor that leaves it waiting.

What a program starts belongs to the session and dies with it, in whatever group, unless it takes a
session of its own. Linux says who is in a session, and when the last of it is gone; elsewhere the
leader is joined, and the others of its group are killed and not waited for.
"""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import attrs
import trio

from .errors import AgentsseError

GRACE: Final = 2.0  # seconds to end by itself: a run has 5 for all of its cleanup
KILLED: Final = 5.0  # seconds for the kernel to end what was killed; only its own waits take longer
TAIL: Final = 4 * 1024  # bytes of stderr that are kept: a message, or the end of a traceback
PIPE: Final = 1024 * 1024  # bytes; no pipe holds more unless a privileged process made it

Argument: TypeAlias = str | os.PathLike[str]


class CannotStart(AgentsseError):
    """A program that is not there, or cannot be run."""

    code: ClassVar[str] = "cannot_start"


class CannotEnd(AgentsseError):
    """A program that was killed and goes on: it is another user's, or hangs in the kernel."""

    code: ClassVar[str] = "cannot_end"


@attrs.define(eq=False)
class Process:
    """A running program; made by `open_process`, which ends it.

    Attributes:
        pid: Of the program, its group and its session.
        stdin: What it reads; close it to tell that nothing more comes.
        stdout: What it prints. Its stderr is read all the time, see `stderr_tail`.
    """

    pid: int
    stdin: trio.abc.SendStream
    stdout: trio.lowlevel.FdStream
    _stderr: trio.lowlevel.FdStream = attrs.field(repr=False)
    _child: trio.Process = attrs.field(repr=False)  # its repr would reap it
    # Shielded: while a cancelled program ends, it may still have something to say.
    _service: trio.CancelScope = attrs.field(
        factory=lambda: trio.CancelScope(shield=True), init=False, repr=False
    )
    _exited: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)
    _status: int = attrs.field(default=0, init=False, repr=False)
    _tail: bytearray = attrs.field(factory=bytearray, init=False, repr=False)

    async def wait(self) -> int:
        """Wait until the program has exited; what it has started may go on.

        Returns:
            The exit code, or minus the number of the signal that has ended it.
        """
        await self._exited.wait()
        self._keep(_read_now(self._stderr))
        return self._status

    def stderr_tail(self) -> str:
        """The end of what it has printed to stderr so far: all of it, after `wait`."""
        return self._tail.decode(errors="replace").strip()

    def rest_of_stdout(self) -> bytes:
        """What is in the pipe now; after `wait`, the last that the program itself has printed.

        Whoever reads to the end of the pipe waits for all who hold it: for a grandchild, too.
        """
        return _read_now(self.stdout)

    # Below

    async def _serve(self) -> None:
        """Read stderr, and see the exit."""
        try:
            with self._service:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._drain)
                    self._status = await _wait_exit(self.pid)
                    self._exited.set()
        finally:
            self._stderr.close()  # here, where nobody can be about to read it

    async def _drain(self) -> None:
        while data := await self._stderr.receive_some():
            self._keep(data)

    def _keep(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-TAIL]

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # what of it is left is not ours
            os.killpg(self.pid, number)

    async def _end(self) -> None:
        """End the session and join it; call it once, shielded."""
        await self.stdin.aclose()
        await self.stdout.aclose()
        if not self._exited.is_set():
            self._signal(signal.SIGTERM)
            await _ask_other_groups(self.pid)
            with trio.move_on_after(GRACE):
                await self._exited.wait()
        self._signal(signal.SIGKILL)
        with trio.move_on_after(KILLED) as killing:
            await self._exited.wait()
            await _kill_session(self.pid)
            await self._child.wait()  # reaped: from here on its pid may be anybody's
        self._service.cancel()
        if killing.cancelled_caught:
            raise CannotEnd(
                f"expected process {self.pid} to end when it was killed, got none of it in "
                f"{KILLED:g} s: it may belong to another user; end it by hand"
            )


@asynccontextmanager
async def open_process(
    argv: Sequence[Argument],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Argument | None = None,
) -> AsyncIterator[Process]:
    """Start a program, as the leader of a session and a group of its own.

    Leaving the context, in whatever way, ends the session: SIGTERM, where the program still runs a
    grace of `GRACE` seconds for it, then SIGKILL to all that is left, be it the program or what
    it had started. All is joined, and the pipes are closed. Cancellation does not shorten this.

    Args:
        argv: The program and its arguments. There is no shell.
        env: The whole environment; that of this process where there is none.
        cwd: Where to start it.

    Raises:
        CannotStart: The program or the folder is not there, or cannot be used.
        CannotEnd: On leaving; the program could not be killed.
    """
    child = await _spawn(argv, env, cwd)
    stdin, stdout, stderr = child.stdin, child.stdout, child.stderr
    assert stdin is not None
    assert isinstance(stdout, trio.lowlevel.FdStream)
    assert isinstance(stderr, trio.lowlevel.FdStream)
    process = Process(child.pid, stdin, stdout, stderr, child)
    async with open_service_nursery() as nursery:
        nursery.start_soon(process._serve)  # noqa: SLF001  # the same module
        try:
            yield process
        finally:
            with trio.CancelScope(shield=True):  # bounded: GRACE and KILLED
                await process._end()  # noqa: SLF001  # the same module


@asynccontextmanager
async def open_service_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery for tasks that serve the block: they are cancelled when it is left.

    An error goes on as it is, in no group, where it is the only one: an error of the block, or
    that of a task, which cancels the block.
    """
    errors: list[BaseException] = []
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:  # noqa: ASYNC103, BLE001  # it is raised below
                errors.append(error)
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        errors += group.exceptions
    real = [error for error in errors if not isinstance(error, trio.Cancelled)] or errors[:1]
    if len(real) > 1:
        raise BaseExceptionGroup("a block and the tasks that serve it", real)
    if real:
        raise real[0]


async def _spawn(
    argv: Sequence[Argument], env: Mapping[str, str] | None, cwd: Argument | None
) -> trio.Process:
    if not argv:
        raise CannotStart("expected a program and its arguments, got nothing")
    program = argv[0]
    options: dict[str, Any] = {"env": env, "cwd": cwd, "start_new_session": True}
    try:
        return await trio.lowlevel.open_process(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
    except OSError as error:
        if cwd is not None and error.filename == os.fspath(cwd):
            raise CannotStart(
                f"expected a folder to start {program!s} in, got {cwd!s}: {error.strerror}"
            ) from error
        raise CannotStart(
            f"expected a program that can be started, got {program!s}: {error.strerror}; install "
            "it, or give its whole path"
        ) from error
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise CannotStart(
            f"expected arguments for {program!r} that a program can be given, got one that "
            f"cannot: {error}"
        ) from error


# The kernel ---------------------------------------------------------------------------------------


def _read_now(stream: trio.lowlevel.FdStream) -> bytes:
    """What a pipe holds, without waiting; nothing where it is closed."""
    with suppress(OSError):
        return os.read(stream.fileno(), PIPE)
    return b""


@contextmanager
def _opened(pid: int) -> Iterator[int | None]:
    """A descriptor that can be read once the process has exited; None where there is no such."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield fd
    finally:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)


async def _wait_exit(pid: int) -> int:
    """Wait until a child has exited, and leave it unreaped."""
    peek = os.WEXITED | os.WNOWAIT
    with _opened(pid) as fd:
        if fd is None:
            # A thread of its own: it may take as long as the program does. If it is cancelled, the
            # program has been reaped or given up, and the thread ends with it.
            found = await trio.to_thread.run_sync(
                os.waitid,
                os.P_PID,
                pid,
                peek,
                abandon_on_cancel=True,
                limiter=trio.CapacityLimiter(1),
            )
        else:
            await trio.lowlevel.wait_readable(fd)
            found = os.waitid(os.P_PID, pid, peek | os.WNOHANG)  # noqa: ASYNC222  # nothing to wait for
    assert found is not None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


async def _ask_other_groups(session: int) -> None:
    """Send SIGTERM to whoever has left the first group of a session, where the kernel tells."""
    for pid, group in (await _members(session)).items():
        if group != session:
            with _opened(pid) as fd:
                _signal_member(pid, fd, session, signal.SIGTERM)


async def _kill_session(session: int) -> None:
    """Kill all who are in a session, and wait until the last is gone, where the kernel tells.

    Its leader must not be reaped yet. Who is killed may just have started another: so it ends when
    nobody is found.
    """
    is_told = True
    while is_told and (members := await _members(session)):
        with ExitStack() as stack:
            killed = []
            for pid in members:
                fd = stack.enter_context(_opened(pid))
                if _signal_member(pid, fd, session, signal.SIGKILL):
                    killed.append(fd)
            for fd in killed:
                if fd is None:
                    is_told = False
                else:
                    await trio.lowlevel.wait_readable(fd)


def _signal_member(pid: int, fd: int | None, session: int, number: int) -> bool:
    """Signal a process if it still is in the session; what has taken its pid is left alone.

    Args:
        pid: Of the process.
        fd: Its descriptor, opened before: it stands for the same process as long as that lives.
        session: Where it was seen.
        number: The signal.

    Returns:
        Whether it was in the session.
    """
    if _group(Path(f"/proc/{pid}/stat"), session) is None:
        return False
    with suppress(ProcessLookupError, PermissionError):  # gone by now, or another user's
        if fd is None:
            os.kill(pid, number)
        else:
            signal.pidfd_send_signal(fd, number)
    return True


async def _members(session: int) -> dict[int, int]:
    """Who is in a session, each with its group; nobody where there is no /proc."""
    # A limiter of its own: no other threads can hold up the end of a program.
    limiter = trio.CapacityLimiter(1)
    return await trio.to_thread.run_sync(_living, session, limiter=limiter)


def _living(session: int) -> dict[int, int]:
    found = {int(path.parent.name): _group(path, session)
             for path in Path("/proc").glob("[0-9]*/stat")}  # fmt: skip
    return {pid: group for pid, group in found.items() if group is not None}


def _group(stat: Path, session: int) -> int | None:
    """The group of a process; None if it is in another session, or dead and not yet reaped.

    proc_pid_stat(5): after the name in parentheses stand state, parent, group and session.
    """
    try:
        text = stat.read_text(errors="replace")
    except OSError:  # it is gone
        return None
    state, _, group, of, *_ = text.rpartition(")")[2].split()
    return int(group) if of == str(session) and state not in "ZX" else None
