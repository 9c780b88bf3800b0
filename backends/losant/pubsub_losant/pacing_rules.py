"""How often to try again, and how fast to send: the platform's limits kept at home; no I/O.

Sources: Losant's documentation of message limits: 30 messages in 15 seconds per topic, 300
per connection; who exceeds them is disconnected and banned for 30 seconds and more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from pubsub_core.pacing import Windows

__all__ = [
    "BAN",
    "MARGIN",
    "PLATFORM",
    "RATE",
    "RATE_PER_TOPIC",
    "Backoff",
    "RateGuard",
    "is_platform",
    "is_suspect",
    "own_windows",
]

PLATFORM: Final = "broker.losant.com"
"""Host of the platform's broker."""

RateGuard: TypeAlias = Literal["drop", "wait", "off"]
"""The fate of a state that would exceed the platform's limits."""

BAN: Final = 30.0
"""Seconds a device that exceeded a limit is refused, at least."""

_STABLE: Final = 60.0
_SPREAD: Final = (0.8, 1.2)

RATE: Final = (300, 15.0)
"""Messages and seconds of one connection."""

RATE_PER_TOPIC: Final = (30, 15.0)
"""Messages and seconds of one topic."""

MARGIN: Final = 0.5
"""Seconds; the network can bring messages closer together than they were sent."""


def is_platform(host: str) -> bool:
    """Whether a host is the platform's own, where exceeding a limit has consequences."""
    return host.lower().rstrip(".").endswith(".losant.com")


class Backoff:
    """Seconds between attempts: 1, 2, 4, 8, 16, 30, 30 …, each a fifth more or less."""

    def __init__(
        self,
        least: float,
        most: float,
        *,
        spread: Callable[[], float] = lambda: random.uniform(*_SPREAD),  # noqa: S311 # no secret
    ) -> None:
        self._least = least
        self._most = most
        self._spread = spread
        self._attempts = 0

    def next(self, lasted: float = 0.0) -> float:
        """Return the delay before the next attempt.

        Args:
            lasted: Seconds the session had lasted that was lost; after a stable one the
                delays start over.
        """
        if lasted >= _STABLE:
            self._attempts = 0
        delay = min(self._least * 2.0 ** min(self._attempts, 32), self._most)
        self._attempts += 1
        return delay * self._spread()


def own_windows() -> Windows:
    """Return counters for one connection, a little stricter than the platform's."""
    return Windows(_with_margin(RATE), _with_margin(RATE_PER_TOPIC))


def is_suspect(windows: Windows, now: float) -> bool:
    """Whether so much was sent lately that a lost connection may be a punishment."""
    return windows.full(now + MARGIN)  # the platform knows of no margin


def _with_margin(rate: tuple[int, float]) -> tuple[int, float]:
    count, seconds = rate
    return count, seconds + MARGIN
