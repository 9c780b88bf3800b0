"""How the tests run the command: in this process, or as a real one with its signals."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from typer.testing import CliRunner, Result

from pubsub_core.cli.root import build

DEADLINE = 20.0
"""Seconds that any single step of a child process may take."""


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without settings of ours and of terminals."""
    unwanted = ("PUBSUB_", "FORCE_COLOR", "COLUMNS", "_PUBSUB", "TERMINAL_WIDTH")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, "NO_COLOR": "1", **more}


class Invoke:
    """Runs the command in this process."""

    def __call__(
        self, *arguments: str, input: bytes | str | None = None, **environment: str | None
    ) -> Result:
        env: dict[str, str | None] = {"NO_COLOR": "1", "COLUMNS": "200", **environment}
        return CliRunner().invoke(build(), list(arguments), input=input, env=env)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    for name in [name for name in os.environ if name.startswith("PUBSUB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return Invoke()


def records(text: str) -> list[dict[str, Any]]:
    """Read what ``--json`` printed; fails when a line is not one object."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(record, dict) and record["type"] for record in found)
    return found


class Child:
    """The command as a real process, its output read line by line with a deadline."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.stderr = b""
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        assert process.stdout is not None
        assert process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._collect, args=(process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)

    def _collect(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.stderr += line

    def line(self) -> bytes:
        """The next line of standard output."""
        try:
            line = self._lines.get(timeout=DEADLINE)
        except queue.Empty:
            pytest.fail(f"no output within {DEADLINE} s; standard error: {self.stderr!r}")
        assert line is not None, f"no more output; standard error: {self.stderr!r}"
        return line

    def record(self) -> dict[str, Any]:
        """The next line as JSON."""
        found: dict[str, Any] = json.loads(self.line())
        return found

    def until_error(self, text: bytes) -> None:
        """Wait until standard error holds *text*."""
        end = time.monotonic() + DEADLINE
        while text not in self.stderr:
            assert self.process.poll() is None or text in self.stderr, self.stderr
            assert time.monotonic() < end, self.stderr
            time.sleep(0.01)

    def write(self, data: bytes) -> None:
        """Write to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if any, and return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(DEADLINE)
        for thread in self._threads:
            thread.join(DEADLINE)
        return code

    def rest(self) -> list[bytes]:
        """What was printed and not read, once it has ended."""
        found: list[bytes] = []
        while (line := self._lines.get(timeout=DEADLINE)) is not None:
            found.append(line)
        return found


Spawn = Callable[..., Child]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Start the command as a process; whatever still runs at the end is killed."""
    children: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, stdin: int = subprocess.DEVNULL, **environment: str) -> Child:
        process = subprocess.Popen(
            [sys.executable, "-m", "pubsub_core.cli", *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=clean_environment(**environment),
        )
        children.append(process)
        return Child(process)

    yield start
    for process in children:
        if process.poll() is None:
            process.kill()
        process.wait(DEADLINE)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
