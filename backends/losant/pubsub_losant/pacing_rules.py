"""How often to try again, and how fast to send: the platform's limits kept at home; no I/O.

Sources: Losant's documentation of message limits: 30 messages in 15 seconds per topic, 300
per connection; who exceeds them is disconnected and banned for 30 seconds and more.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from pubsub_core.pacing import Window

__all__ = [
    "BAN",
    "MARGIN",
    "PLATFORM",
    "RATE",
    "RATE_PER_TOPIC",
    "Backoff",
    "RateGuard",
    "Throttle",
    "is_platform",
]

PLATFORM: Final = "broker.losant.com"
"""Host of the platform's broker."""

RateGuard: TypeAlias = Literal["drop", "wait", "off"]
"""What happens to a state that would exceed the platform's limits."""

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

_MOST_TOPICS: Final = 4096


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
                delays begin anew.
        """
        if lasted >= _STABLE:
            self._attempts = 0
        delay = min(self._least * 2.0 ** min(self._attempts, 32), self._most)
        self._attempts += 1
        return delay * self._spread()


class Throttle:
    """Counts what is sent, and says when the next message may go."""

    def __init__(self) -> None:
        self._all = _window(RATE)
        self._topics: OrderedDict[str, Window] = OrderedDict()

    def delay(self, topic: str, now: float) -> float:
        """Return the seconds after which *topic* may be published to; 0 for now."""
        window = self._topics.get(topic)
        least = self._all.delay(now)
        return least if window is None else max(least, window.delay(now))

    def note(self, topic: str, at: float) -> None:
        """Remember one message that is or will be sent at that moment."""
        self._all.note(at)
        window = self._topics.get(topic)
        if window is None:
            window = self._topics[topic] = _window(RATE_PER_TOPIC)
            if len(self._topics) > _MOST_TOPICS:
                self._topics.popitem(last=False)
        else:
            self._topics.move_to_end(topic)  # whoever is forgotten was not used for longest
        window.note(at)

    def suspected(self, now: float) -> bool:
        """Whether so much was sent lately that a lost connection may be a punishment."""
        now += MARGIN  # which the platform does not know
        return any(window.delay(now) > 0 for window in (self._all, *self._topics.values()))


def _window(rate: tuple[int, float]) -> Window:
    count, seconds = rate
    return Window(count, seconds + MARGIN)
