"""How fast to send, and how soon to try again.

`RateGuard` keeps a bus below its broker's rate limits, before the broker acts on them; `Windows`
counts for it, and for backends and servers. `Backoff` spreads attempts to reconnect.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable

from .capabilities import Limits
from .clock import Clock

__all__ = ["SHORT_OUTAGE", "Backoff", "RateGuard", "Window", "Windows"]

SHORT_OUTAGE = 10.0
"""Seconds during which attempts to reconnect follow one another closely."""

_SHORT_BOUND = 1.5
_MOST_TOPICS = 10_000


class Window:
    """At most *count* events in any *seconds*; time comes in as a number.

    Attributes:
        note: Remembers one event at the moment it is called with.
    """

    __slots__ = ("_seconds", "_times", "note")

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._times: deque[float] = deque(maxlen=count)
        self.note: Callable[[float], None] = self._times.append  # no call between: it is hot

    def delay(self, now: float) -> float:
        """Return the seconds after which one more may follow; 0 for now."""
        times = self._times
        if len(times) < (times.maxlen or 0):
            return 0.0
        return max(times[0] + self._seconds - now, 0.0)


class Windows:
    """Counts messages against a limit for all of them and one for each topic.

    Args:
        rate: Messages and seconds, for all together; None for no limit.
        per_topic: The same for each topic.
    """

    def __init__(self, rate: tuple[int, float] | None, per_topic: tuple[int, float] | None) -> None:
        self._per_topic = per_topic
        self._all = None if rate is None else Window(*rate)
        # The topic that was used last is at the end. One that is forgotten has not been used
        # while thousands of others were, so its window is empty, unless there is no *rate*.
        self._topics: OrderedDict[str, Window] = OrderedDict()

    def delay(self, topic: str, now: float) -> float:
        """Return the seconds after which *topic* may be published to; 0 for now."""
        delay = 0.0 if self._all is None else self._all.delay(now)
        window = self._topics.get(topic)
        return delay if window is None else max(delay, window.delay(now))

    def note(self, topic: str, at: float) -> None:
        """Count one message that is or will be sent at that moment."""
        if self._all is not None:
            self._all.note(at)
        if self._per_topic is not None:
            window = self._topics.get(topic)
            if window is None:
                window = self._topics[topic] = Window(*self._per_topic)
                if len(self._topics) > _MOST_TOPICS:
                    self._topics.popitem(last=False)
            else:
                self._topics.move_to_end(topic)
            window.note(at)

    def full(self, now: float) -> bool:
        """Whether a limit is reached, so that one more message somewhere would exceed it."""
        if self._all is not None and self._all.delay(now) > 0:
            return True
        return any(window.delay(now) > 0 for window in self._topics.values())


class RateGuard:
    """Keeps a limit for all publishes and one for each topic."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self._windows = Windows(limits.rate, limits.rate_per_topic)
        self.needed = limits.rate is not None or limits.rate_per_topic is not None
        """Whether there is any limit to keep."""

    def delay(self, topic: str) -> float:
        """Return the seconds after which *topic* may be published to; 0 for now."""
        return self._windows.delay(topic, self._clock.monotonic())

    def reserve(self, topic: str) -> float:
        """Reserve a place for one publish; return the seconds to wait before it."""
        now = self._clock.monotonic()
        delay = self._windows.delay(topic, now)
        self._windows.note(topic, now + delay)
        return delay

    def note(self, topic: str) -> None:
        """Count one publish that went out without a reservation."""
        self._windows.note(topic, self._clock.monotonic())


class Backoff:
    """Delays before reconnecting: full jitter, doubling up to a bound.

    A delay is drawn evenly between 0 and a bound that starts at *first* seconds and
    doubles up to *maximum*. During the first ten seconds of an outage the bound stays
    below 1.5 seconds, so that a short outage is over soon after it ended.
    """

    def __init__(
        self, first: float, maximum: float, *, rng: Callable[[], float] = random.random
    ) -> None:
        self._first = first
        self._maximum = maximum
        self._rng = rng
        self._attempts = 0

    def reset(self) -> None:
        """Start over, after a session that stayed healthy."""
        self._attempts = 0

    def bound(self, outage: float) -> float:
        """Return the longest next delay, *outage* seconds after the session was lost."""
        # 2.0 ** 64 seconds is past any maximum; larger exponents would overflow.
        bound = min(self._maximum, self._first * 2.0 ** min(self._attempts, 64))
        return min(bound, _SHORT_BOUND) if outage < SHORT_OUTAGE else bound

    def next(self, outage: float = 0.0) -> float:
        """Return the next delay in seconds."""
        delay = self._rng() * self.bound(outage)
        self._attempts += 1
        return delay
