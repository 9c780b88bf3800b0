"""A process that ends with this one, however this one ends."""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pubsub_core.threads import in_thread

__all__ = ["Child"]

logger = logging.getLogger("pubsub_nats.server")

_STOP = 5.0


class Child:
    """One process, started when it is made.

    Args:
        command: The program and its arguments.
        directory: A folder of its own that stands in *command*; by that the guard tells the
            process from another that may have its number by then.
    """

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        with (directory / "output").open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - the program was found by its name
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
            )
        # Killed, an interpreter runs no finalizer. What closes even then is the standard input
        # of this shell.
        script = (
            "read -r _; "
            '{ tr "\\0" " " <"/proc/$0/cmdline" || ps -o args= -p "$0"; } | grep -qF "$1" '
            '&& kill -9 "$0"; rm -rf "$1" || { sleep 1; rm -rf "$1"; }; '
            # That of all nodes, once the last of them is gone.
            'rmdir "${1%/*}" 2>/dev/null'
        )
        self._guard = subprocess.Popen(  # noqa: S603 - our own script; both arguments are ours
            ["/bin/sh", "-c", script, str(self._process.pid), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        """Whether it is alive."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    async def stop(self) -> None:
        """Ask it to end; end it when it does not."""
        if self.running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await in_thread(lambda: self._process.wait(_STOP), name="pubsub-nats-stop")
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._guard.poll() is None:
            self._guard.kill()
        self._guard.wait()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
