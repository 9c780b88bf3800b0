"""Exit codes of the ``pubsub`` command: one table, read by the code, the help and the docs.

A shell reports 130, 141 and 143 for a program ended by SIGINT, SIGPIPE and
SIGTERM (128 plus the signal's number).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Final, cast

from pubsub_core.errors import (
    ConfigError,
    ConnectError,
    InvalidTopic,
    NotConnected,
    NotSupported,
    PubSubError,
)

__all__ = ["MEANINGS", "ExitCode", "exit_code", "first_error"]


class ExitCode(IntEnum):
    """Exit status of the process."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CONNECT = 3
    NOT_SUPPORTED = 4
    TIMEOUT = 5
    INTERRUPTED = 130
    PIPE = 141
    TERMINATED = 143


MEANINGS: Final[dict[ExitCode, str]] = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "the operation failed: refused, not delivered, a check found a fault",
    ExitCode.USAGE: "wrong arguments or configuration; nothing was sent",
    ExitCode.CONNECT: "no session with the broker: unreachable, TLS, credentials",
    ExitCode.NOT_SUPPORTED: "the broker cannot do this",
    ExitCode.TIMEOUT: "a deadline passed, e.g. --exit-after before --count was reached",
    ExitCode.INTERRUPTED: "Ctrl-C",
    ExitCode.PIPE: "the reader of the output closed the pipe",
    ExitCode.TERMINATED: "SIGTERM (but 0 from `pubsub serve`, which is stopped that way)",
}


def exit_code(error: BaseException) -> ExitCode:
    """Return the code for *error*; the first rule that fits decides."""
    match error:
        case ConfigError() | InvalidTopic():
            return ExitCode.USAGE
        case ConnectError() | NotConnected():
            return ExitCode.CONNECT
        case NotSupported():
            return ExitCode.NOT_SUPPORTED
        case TimeoutError():
            return ExitCode.TIMEOUT
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED
        case BrokenPipeError():
            return ExitCode.PIPE
        case _:
            return ExitCode.FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        for inner in group.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def first_error(error: BaseException) -> BaseException:
    """Return the error to show for *error*: of a group, its first one of ours, else its first."""
    leaves = list(_leaves(error))
    return next((leaf for leaf in leaves if isinstance(leaf, PubSubError)), leaves[0])
