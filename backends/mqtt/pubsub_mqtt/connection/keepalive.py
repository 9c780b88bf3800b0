"""When a quiet connection is asked for a sign of life, and when its silence means death.

A policy is a function: it gets how long either side has been quiet and says what to do. It
keeps nothing, so the whole rule stands in one place and a test needs no clock.

Sources: MQTT 3.1.1 section 3.1.2.10: the server may close a connection that was silent for
one and a half intervals, and a client that waits "a reasonable time" for PINGRESP in vain
should close it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

__all__ = ["KeepalivePolicy", "KeepaliveStep", "Quiet", "standard_keepalive"]


class Quiet(NamedTuple):
    """How quiet a session is; times in seconds.

    Attributes:
        keepalive: The interval in force, never 0.
        inbound: Since the last byte arrived.
        outbound: Since the last byte left this process.
        pinged: Since a policy last had PINGREQ sent in this session; None if it never did.
        reading: Whether the socket is read at all. While it is not, silence is our own doing.
    """

    keepalive: int
    inbound: float
    outbound: float
    pinged: float | None
    reading: bool

    @property
    def unanswered(self) -> bool:
        """Whether nothing arrived since PINGREQ was sent; any packet counts as an answer."""
        return self.pinged is not None and self.inbound >= self.pinged


class KeepaliveStep(NamedTuple):
    """What to do now, and when to ask again.

    Attributes:
        due: Seconds until the next look.
        ping: Send PINGREQ now.
        dead: Why the session is over, as the end of a sentence; empty while it is not.
    """

    due: float
    ping: bool = False
    dead: str = ""


KeepalivePolicy: TypeAlias = Callable[[Quiet], KeepaliveStep]


def standard_keepalive(quiet: Quiet) -> KeepaliveStep:
    """Ping in good time when either side is quiet; give up after one and a half intervals.

    The peer counts our silence and we count its: a client that publishes QoS 0 without pause
    gets no packet back, and paho, which looks at what it sent, would never notice a dead peer.
    """
    # A quarter early, so that PINGREQ is there within the interval over a slow link, but at
    # least one second and at most half the interval.
    ping_after = max(min(quiet.keepalive * 0.75, quiet.keepalive - 1.0), quiet.keepalive * 0.5)
    dead_after = quiet.keepalive * 1.5
    if quiet.reading and quiet.inbound >= dead_after:
        return KeepaliveStep(0.0, dead=f"was silent for {quiet.inbound:.1f} s")
    awaits = quiet.unanswered
    ping = quiet.outbound >= ping_after or (
        quiet.reading and quiet.inbound >= ping_after and not awaits
    )
    due = ping_after - (0.0 if ping else quiet.outbound)
    if quiet.reading:
        due = min(due, (dead_after if ping or awaits else ping_after) - quiet.inbound)
    return KeepaliveStep(due, ping)
