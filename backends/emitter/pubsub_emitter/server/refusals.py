"""Refusals of an Emitter broker, and their log, which holds no key."""

from __future__ import annotations

import logging
import re
import time
from typing import Final

from pubsub_emitter.keys import InvalidTarget, TargetTooLong
from pubsub_emitter.protocol import TARGET_INVALID, TARGET_TOO_LONG, Fault
from pubsub_mqtt.errors import printable
from pubsub_mqtt.server.endpoint import Client

__all__ = ["RefusalLog", "Refused", "named", "target_refused"]

logger = logging.getLogger("pubsub_emitter.broker")

_LINES_PER_SECOND: Final = 20
_KEY_LIKE: Final = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{32}(?![A-Za-z0-9_-])", re.ASCII)


class Refused(Exception):
    """An operation is refused; *why* is for the log and holds no key."""

    def __init__(self, fault: Fault, why: str) -> None:
        super().__init__(why)
        self.fault = fault
        self.why = why


def named(channel: str) -> str:
    """Return a channel for the log: escaped, and without text that may be a misplaced key."""
    return printable(_KEY_LIKE.sub("***", channel))


def target_refused(error: InvalidTarget) -> Refused:
    """Return the refusal of a key for a target that none can have."""
    fault = TARGET_TOO_LONG if isinstance(error, TargetTooLong) else TARGET_INVALID
    return Refused(fault, str(error))


class RefusalLog:
    """Logs why operations were refused; a client that guesses keys cannot flood it."""

    def __init__(self) -> None:
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def refused(self, what: str, client: Client, why: str) -> None:
        """Log it, unless this second has enough lines; the rest is counted."""
        second = int(time.monotonic())
        if second != self._second:
            if self._left_out:
                logger.warning("refused %d more operations", self._left_out)
            self._second, self._lines, self._left_out = second, 0, 0
        if self._lines >= _LINES_PER_SECOND:
            self._left_out += 1
            return
        self._lines += 1
        logger.warning("refused %s of %s: %s", printable(what), client.name, why)
