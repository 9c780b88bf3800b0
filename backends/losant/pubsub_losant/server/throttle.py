"""How often a device may publish and connect, and for how long it is banned if it does more.

Pure bookkeeping over sliding windows: time comes in as a number. A window counts what was
admitted in its seconds; what exceeds it is not admitted. Who exceeds a limit is banned, for
longer each time, until it behaved for a while after the last ban.

Counting each direction by itself, and not punishing a device for what is sent to it, is decided
here; no documentation says it.

Source: Losant's documentation of message throttling.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["Ban", "Meter", "Rules", "Throttle", "Window"]

_MAX_TOPICS = 4096


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits as pairs of a number and seconds; times in seconds.

    Attributes:
        per_topic: Messages of one connection on one topic in one direction.
        per_connection: Messages of one connection in one direction.
        new_connections: Connections of all devices together.
        ban: How long the first ban is.
        factor: How many times longer than the last the next is.
        longest: How long a ban is at most.
        forgiven: After that time without ban or violation a ban is the first again.
    """

    per_topic: tuple[int, float] = (30, 15.0)
    per_connection: tuple[int, float] = (300, 15.0)
    new_connections: tuple[int, float] = (300, 15.0)
    ban: float = 30.0
    factor: float = 2.0
    longest: float = 3600.0
    forgiven: float = 900.0


class Window:
    """Admits at most so many within any span of so many seconds."""

    __slots__ = ("_limit", "_seconds", "_times")

    def __init__(self, rule: tuple[int, float]) -> None:
        self._limit, self._seconds = rule
        self._times: deque[float] = deque()

    def has_room(self, now: float) -> bool:
        """Whether one more fits."""
        times = self._times
        while times and times[0] <= now - self._seconds:
            times.popleft()
        return len(times) < self._limit

    def is_idle(self, now: float) -> bool:
        """Whether nothing counts any more."""
        return not self._times or self._times[-1] <= now - self._seconds

    def add(self, now: float) -> None:
        """Count one."""
        self._times.append(now)

    def admit(self, now: float) -> bool:
        """Count one if it fits; return whether it does."""
        if not self.has_room(now):
            return False
        self._times.append(now)
        return True


class Meter:
    """The windows of one connection."""

    __slots__ = ("_all", "_rules", "_topics")

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._all = (Window(rules.per_connection), Window(rules.per_connection))
        self._topics: tuple[dict[str, Window], dict[str, Window]] = ({}, {})

    def incoming(self, topic: str, now: float) -> bool:
        """Count a message from the device; False when it is one too many."""
        return self._admit(0, topic, now)

    def outgoing(self, topic: str, now: float) -> bool:
        """Count a message to the device; False when it is one too many."""
        return self._admit(1, topic, now)

    def _admit(self, direction: int, topic: str, now: float) -> bool:
        topics = self._topics[direction]
        window = topics.get(topic)
        if window is None:
            if len(topics) >= _MAX_TOPICS:
                self._sweep(topics, now)
            window = topics[topic] = Window(self._rules.per_topic)
        everything = self._all[direction]
        if not (window.has_room(now) and everything.has_room(now)):
            return False
        window.add(now)
        everything.add(now)
        return True

    def _sweep(self, topics: dict[str, Window], now: float) -> None:
        # The limit of the connection leaves few topics that are in use.
        for topic in [topic for topic, window in topics.items() if window.is_idle(now)]:
            del topics[topic]


@dataclass(slots=True)
class Ban:
    """The last ban of a device.

    Attributes:
        seconds: How long it is.
        until: When it ends.
    """

    seconds: float
    until: float


class Throttle:
    """What is shared by all connections: bans, and how many connect."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self._connections = Window(self.rules.new_connections)
        self._bans: dict[str, Ban] = {}

    def meter(self) -> Meter:
        """Return the windows of a new connection."""
        return Meter(self.rules)

    def connect(self, now: float) -> bool:
        """Count a new connection; False when it is one too many."""
        return self._connections.admit(now)

    def violate(self, device_id: str, now: float) -> float:
        """Ban a device; return for how many seconds."""
        rules = self.rules
        last = self._bans.get(device_id)
        if last is None or now >= last.until + rules.forgiven:
            seconds = rules.ban
        else:
            seconds = min(last.seconds * rules.factor, rules.longest)
        self._bans[device_id] = Ban(seconds, now + seconds)
        return seconds

    def banned(self, device_id: str, now: float) -> float:
        """Return for how many more seconds a device is banned; 0 when it is not."""
        ban = self._bans.get(device_id)
        return max(0.0, ban.until - now) if ban is not None else 0.0
