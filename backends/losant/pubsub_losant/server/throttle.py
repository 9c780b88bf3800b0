"""How often a device may publish and connect, and for how long it is banned if it does more.

Pure bookkeeping over sliding windows: time comes in as a number. A window counts the messages that
were admitted in its seconds, and admits no more than its limit. A device that exceeds a limit is
banned, for longer each time, until it has behaved for a while after the last ban.

Counting each direction by itself, and not punishing a device for messages to it, is decided
here; no documentation says it.

Source: Losant's documentation of message throttling.
"""

from __future__ import annotations

from dataclasses import dataclass

from pubsub_core.pacing import Window, Windows

__all__ = ["Ban", "Meter", "Rules", "Throttle"]


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


class Meter:
    """Counts the messages of one connection, each direction by itself."""

    __slots__ = ("_incoming", "_outgoing")

    def __init__(self, rules: Rules) -> None:
        self._incoming = Windows(rules.per_connection, rules.per_topic)
        self._outgoing = Windows(rules.per_connection, rules.per_topic)

    def incoming(self, topic: str, now: float) -> bool:
        """Count a message from the device; False when it is one too many."""
        return _admit(self._incoming, topic, now)

    def outgoing(self, topic: str, now: float) -> bool:
        """Count a message to the device; False when it is one too many."""
        return _admit(self._outgoing, topic, now)


def _admit(windows: Windows, topic: str, now: float) -> bool:
    if windows.delay(topic, now):
        return False
    windows.note(topic, now)
    return True


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
    """Shared by all connections: bans, and the rate of new connections."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self._connections = Window(*self.rules.new_connections)
        self._bans: dict[str, Ban] = {}

    def meter(self) -> Meter:
        """Return the windows of a new connection."""
        return Meter(self.rules)

    def connect(self, now: float) -> bool:
        """Count a new connection; False when it is one too many."""
        if self._connections.delay(now):
            return False
        self._connections.note(now)
        return True

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
