"""A Codex app-server without a model: it says what a script says, over the real pipes.

Knows: the messages of the protocol, and how a process can misbehave. Must never know who talks to
it: it is a program, and imports nothing but the standard library, so that it is up at once.

    python -m agentsse.testing.codex '{"turns": [[{"text": ["Hel", "lo"]}]]}'

The script is a JSON object, or the path of a file that holds one:

    turns       a list of steps for each `turn/start`, in order; behind the last one it says "done"
    start       steps to take before anything is read
    refuse      JSON-RPC errors that requests are answered with, by method
    results     results that requests are answered with, by method, and nothing else happens
    mute        methods that are never answered
    exits_on    a method at which it exits
    stubborn    whether SIGTERM is ignored
    record      a file to write to, a JSON object per line: its `pid`, each message that it has
                `received`, the pid of each process that it has `spawned`

A step is an object:

    {"text": ["Hel", "lo"]}             an agent's message, in pieces
    {"reasoning": ["Hm", "m"]}          a summary of its reasoning, in pieces
    {"command": "ls", "output": ["a"]}  a command that it runs itself, and what that prints
    {"approve": "rm x"}                 a command that it asks about first, and runs if it may
    {"ask": [{"id": ..., ...}]}         questions for a person
    {"request": "a/b", "params": {}}    any request; it waits for the answer
    {"notify": "a/b", "params": {}}     any notification
    {"fail": {"message": "..."}}        the turn fails
    {"hang": "listening"}               nothing more, but interrupts are obeyed
    {"hang": "deaf"}                    nothing more at all
    {"wait": "/a/fifo"}                 waits until somebody opens it for writing
    {"spawn": true}                     a process that holds its pipes and sleeps
    {"raw": "..."}                      bytes, as Latin-1
    {"stderr": "..."}                   text on stderr
    {"endless": true}                   a line without end
    {"close": true}                     its output is closed
    {"deafen": true}                    its input is closed
    {"exit": 3}                         it exits
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_SLEEP = (sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)")


def codex_command(script: Mapping[str, Any]) -> tuple[str, ...]:
    """The command of an app-server that follows a script; see the module."""
    # By its path, and without `site`: so it imports nothing of the package around it.
    return (sys.executable, "-I", "-S", __file__, json.dumps(script))


def recorded(record: Path) -> list[dict[str, Any]]:
    """What the app-servers that wrote to this file have recorded so far."""
    return [json.loads(line) for line in record.read_text().splitlines()]


class _Interrupted(Exception):
    """The client has interrupted the turn."""


class _Failed(Exception):
    """The script wants the turn to fail; holds the error."""


class AppServer:
    """The server: it reads a message, does what the script says, and reads the next one."""

    def __init__(self, script: Mapping[str, Any], reads: BinaryIO, writes: BinaryIO) -> None:
        self.script = script
        self.reads = reads
        self.writes = writes
        self.turns: list[Sequence[dict[str, Any]]] = list(script.get("turns", ()))
        self.ids = itertools.count()
        self.thread = self.turn = ""

    def run(self) -> None:
        """Serve until there is nothing more to read."""
        if self.script.get("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.record({"pid": os.getpid()})
        for step in self.script.get("start", ()):
            self.take_step(step)
        while True:
            with suppress(_Interrupted):  # too late: there is no turn
                self.take(self.receive())

    def record(self, fact: Mapping[str, Any]) -> None:
        """Write something down for the test."""
        if path := self.script.get("record"):
            with Path(path).open("a") as file:
                file.write(json.dumps(fact) + "\n")

    # Messages

    def send(self, message: Mapping[str, Any]) -> None:
        """Write a message."""
        self.write(json.dumps(message).encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Write anything."""
        self.writes.write(data)
        self.writes.flush()

    def notify(self, method: str, **params: Any) -> None:
        """Write a notification of this turn."""
        of_turn = {"threadId": self.thread, "turnId": self.turn}
        self.send({"method": method, "params": of_turn | params})

    def receive(self) -> dict[str, Any]:
        """Read a message; at the end of the input this is the end of the process."""
        line = self.reads.readline()
        if not line:
            raise SystemExit
        message: dict[str, Any] = json.loads(line)
        self.record({"received": message})
        return message

    def take(self, message: dict[str, Any]) -> None:
        """Do what a message asks for."""
        method, request_id = message.get("method"), message.get("id")
        if method in self.script.get("mute", ()):
            return
        if method is not None and method == self.script.get("exits_on"):
            raise SystemExit
        for key, given in (("error", "refuse"), ("result", "results")):
            if method in self.script.get(given, {}):
                self.send({"id": request_id, key: self.script[given][method]})
                return
        match method:
            case "initialize":
                self.send({"id": request_id, "result": {"userAgent": "agentsse.testing"}})
            case "thread/start":
                self.thread = f"thr_{next(self.ids)}"
                self.send({"id": request_id, "result": {"thread": {"id": self.thread}}})
                self.send({"method": "thread/started", "params": {"thread": {"id": self.thread}}})
            case "turn/start":
                self.turn = f"turn_{next(self.ids)}"
                turn: dict[str, Any] = {
                    "id": self.turn,
                    "status": "inProgress",
                    "items": [],
                    "error": None,
                }
                self.send({"id": request_id, "result": {"turn": turn}})
                self.notify("turn/started", turn=turn)
                self.take_turn()
            case "turn/interrupt":
                self.send({"id": request_id, "result": {}})
                raise _Interrupted
            case _:  # the notification `initialized`
                pass

    def request(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the client, and wait for its answer; other messages are taken meanwhile."""
        request_id = next(self.ids)
        of_turn = {"threadId": self.thread, "turnId": self.turn}
        self.send({"id": request_id, "method": method, "params": of_turn | params})
        while True:
            message = self.receive()
            if message.get("id") == request_id and "method" not in message:
                return message
            self.take(message)

    # Turns

    def take_turn(self) -> None:
        """Take the steps of the next turn."""
        status, error = "completed", None
        try:
            for step in self.turns.pop(0) if self.turns else [{"text": ["done"]}]:
                self.take_step(step)
        except _Interrupted:
            status = "interrupted"
        except _Failed as failure:
            status, error = "failed", failure.args[0]
        turn: dict[str, Any] = {"id": self.turn, "status": status, "items": [], "error": error}
        self.notify("turn/completed", turn=turn)

    def take_step(self, step: Mapping[str, Any]) -> None:
        """Take a step; see the module."""
        match step:
            case {"text": pieces}:
                self.say("agentMessage", "item/agentMessage/delta", pieces)
            case {"reasoning": pieces}:
                self.say("reasoning", "item/reasoning/summaryTextDelta", pieces)
            case {"command": command}:
                self.run_command(command, step.get("output", ()))
            case {"approve": command}:
                self.run_command(command, step.get("output", ()), is_asked=True)
            case {"ask": questions}:
                item = f"item_{next(self.ids)}"
                self.request("item/tool/requestUserInput", itemId=item, questions=questions)
            case {"request": method}:
                self.request(method, **step.get("params", {}))
            case {"notify": method}:
                self.notify(method, **step.get("params", {}))
            case {"fail": error}:
                raise _Failed(error)
            case {"hang": "listening"}:
                while True:
                    self.take(self.receive())
            case {"raw": text}:
                self.write(text.encode("latin-1"))
            case _:
                self.misbehave(step)

    def misbehave(self, step: Mapping[str, Any]) -> None:
        """Take a step that no app-server should."""
        match step:
            case {"hang": _}:
                while True:
                    time.sleep(600)
            case {"spawn": _}:
                child = subprocess.Popen(_SLEEP)  # noqa: S603  # the words are ours
                self.record({"spawned": child.pid})
            case {"stderr": text}:
                sys.stderr.write(text)
                sys.stderr.flush()
            case {"endless": _}:
                while True:
                    self.write(b"x" * 65_536)
            case {"wait": path}:
                Path(path).read_bytes()
            case {"close": _}:
                os.close(self.writes.fileno())
            case {"deafen": _}:
                os.close(self.reads.fileno())
            case {"exit": code}:
                os._exit(code)
            case _:
                raise ValueError(f"expected a step that the module describes, got {step}")

    def say(self, kind: str, method: str, pieces: Sequence[str]) -> None:
        """Say an item in pieces, and then as a whole."""
        item = {"id": f"item_{next(self.ids)}", "type": kind}
        self.notify("item/started", item=item)
        for piece in pieces:
            self.notify(method, itemId=item["id"], delta=piece, summaryIndex=0)
        text = "".join(pieces)
        whole = {"text": text} if kind == "agentMessage" else {"summary": [text], "content": []}
        self.notify("item/completed", item={**item, **whole})

    def run_command(self, command: str, output: Sequence[str], *, is_asked: bool = False) -> None:
        """Pretend to run a command, if the client lets it."""
        item = {
            "id": f"item_{next(self.ids)}",
            "type": "commandExecution",
            "command": command,
            "cwd": str(Path.cwd()),
            "status": "inProgress",
        }
        self.notify("item/started", item=item)
        if is_asked:
            method = "item/commandExecution/requestApproval"
            answer = self.request(method, itemId=item["id"], command=command, cwd=item["cwd"])
            if answer.get("result") != {"decision": "accept"}:
                self.notify("item/completed", item={**item, "status": "declined"})
                return
        for piece in output:
            self.notify("item/commandExecution/outputDelta", itemId=item["id"], delta=piece)
        end = {"status": "completed", "aggregatedOutput": "".join(output), "exitCode": 0}
        self.notify("item/completed", item={**item, **end})


def main(argument: str) -> None:
    """Serve the process's own pipes."""
    text = argument if argument.lstrip().startswith("{") else Path(argument).read_text()
    AppServer(json.loads(text), sys.stdin.buffer, sys.stdout.buffer).run()


if __name__ == "__main__":
    main(sys.argv[1])
