"""The lines that an operator reads about an outage: lost, trying, back.

One line each, by the logger ``pubsub_core``. Attempts are told only when the interval between
them has doubled since the last line, so that an outage of a day is a dozen lines.
"""

from __future__ import annotations

import logging

from pubsub_core.clock import Clock
from pubsub_core.events import BusEvent, Gap, Status, StatusChanged

__all__ = ["OutageLog"]

logger = logging.getLogger("pubsub_core")

_FIRST_TRY_TOLD = 1.0


class OutageLog:
    """Follows the events of one bus.

    Args:
        name: The bus.
        where: The broker's address, without credentials.
    """

    def __init__(self, name: str, where: str, clock: Clock) -> None:
        self._name = name
        self._where = where
        self._clock = clock
        self._since: float | None = None
        self._told = 0.0
        self._gap: Gap | None = None

    def note(self, event: BusEvent) -> None:
        """Log what *event* tells about an outage, if anything."""
        if isinstance(event, Gap):
            self._gap = event
        elif isinstance(event, StatusChanged):
            self._status(event)

    def _status(self, event: StatusChanged) -> None:
        now = self._clock.monotonic()
        if event.status in (Status.RECONNECTING, Status.CONNECTING) and event.error is not None:
            if self._since is None:
                self._begin(event, now)
            elif event.retry_in is not None and event.retry_in >= 2 * self._told:
                self._told = event.retry_in
                logger.info(
                    "bus %r: no session with %s for %.1f s, next attempt in %.1f s: %s",
                    self._name, self._where, now - self._since, event.retry_in, event.error,
                )  # fmt: skip
        elif event.status is Status.ONLINE:
            if self._since is not None:
                logger.info(
                    "bus %r: back at %s after %.1f s; %s",
                    self._name, self._where, now - self._since, self._missed(),
                )  # fmt: skip
            self._since = self._gap = None
        elif event.status is Status.FAILED:
            # No error: the callers that wait get this very exception.
            logger.info("bus %r: gave up %s: %s", self._name, self._where, event.error)
            self._since = self._gap = None

    def _begin(self, event: StatusChanged, now: float) -> None:
        self._since = now
        self._told = _FIRST_TRY_TOLD
        lost = "lost" if event.status is Status.RECONNECTING else "cannot reach"
        logger.info("bus %r: %s %s, trying again: %s", self._name, lost, self._where, event.error)

    def _missed(self) -> str:
        if self._gap is None:
            return "nothing was subscribed before"
        return "no message is missing" if self._gap.recovered else "messages may be missing"
