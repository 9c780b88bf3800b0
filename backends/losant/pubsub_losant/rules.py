"""How often to try again, and how fast to send: the platform's limits kept at home; no I/O.

Sources: Losant's documentation of message limits: 30 messages in 15 seconds per topic, 300
per connection; who exceeds them is disconnected and banned for 30 seconds and more.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

__all__ = ["BAN", "Backoff", "RateGuard", "Throttle"]

RateGuard: TypeAlias = Literal["drop", "wait", "off"]
"""What happens to a state that would exceed the platform's limits."""

BAN: Final = 30.0
"""Seconds a device that exceeded a limit is refused, at least."""

_STABLE: Final = 60.0
_SPREAD: Final = (0.8, 1.2)

_PER_TOPIC: Final = 30
_PER_CONNECTION: Final = 300
_SECONDS: Final = 15.0
_MARGIN: Final = 0.5
"""The network can bring messages closer together than they were sent."""

_MOST_TOPICS: Final = 4096


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


class _Window:
    """The last so many moments at which something was sent, and how long they count."""

    __slots__ = ("_times", "note")

    def __init__(self, count: int) -> None:
        self._times: deque[float] = deque(maxlen=count)
        self.note = self._times.append

    def delay(self, now: float, seconds: float) -> float:
        times = self._times
        if len(times) < (times.maxlen or 0):
            return 0.0
        return max(times[0] + seconds - now, 0.0)


class Throttle:
    """Counts what is sent, and says when the next message may go."""

    def __init__(self) -> None:
        self._all = _Window(_PER_CONNECTION)
        self._topics: OrderedDict[str, _Window] = OrderedDict()

    def delay(self, topic: str, now: float) -> float:
        """Return the seconds after which *topic* may be published to; 0 for now."""
        window = self._topics.get(topic)
        least = self._all.delay(now, _SECONDS + _MARGIN)
        if window is None:
            return least
        return max(least, window.delay(now, _SECONDS + _MARGIN))

    def note(self, topic: str, at: float) -> None:
        """Remember one message that is or will be sent at that moment."""
        self._all.note(at)
        window = self._topics.get(topic)
        if window is None:
            window = self._topics[topic] = _Window(_PER_TOPIC)
            if len(self._topics) > _MOST_TOPICS:
                self._topics.popitem(last=False)
        window.note(at)

    def suspected(self, now: float) -> bool:
        """Whether so much was sent lately that a lost connection may be a punishment."""
        if self._all.delay(now, _SECONDS) > 0:
            return True
        return any(window.delay(now, _SECONDS) > 0 for window in self._topics.values())
