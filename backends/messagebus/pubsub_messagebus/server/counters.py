"""The counters of a distributor, and the snapshot of them that `metrics` shows.

Clients choose the names of feeds. So feeds are counted one by one only up to a bound, and the
rest together: otherwise a client could fill the server's memory with counters, which outlive it.
"""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = [
    "MAX_COUNTED_FEEDS",
    "MAX_COUNTED_NAME",
    "OTHER_FEEDS",
    "BrokerStats",
    "Faults",
    "InteractorCounts",
    "InteractorView",
    "ServerStats",
    "Snapshot",
    "Traffic",
    "count_feed",
]

MAX_COUNTED_FEEDS: Final = 1000
"""Feeds that are counted one by one for a connection."""

MAX_COUNTED_NAME: Final = 200
"""Characters of the longest name that is kept in a counter."""

OTHER_FEEDS: Final = "…"
"""The name under which the other feeds are counted."""

MAX_FAULTY: Final = 1000
"""Peers whose faults are counted one by one."""


@dataclass(slots=True)
class BrokerStats:
    """Counters of the broker; the last four are sizes.

    Attributes:
        delivered: Data messages handed to a subscriber, without notices.
        ignored: Requests that were dropped because a role was missing or they made no sense.
    """

    received: int = 0
    multicast: int = 0
    unicast: int = 0
    delivered: int = 0
    notifications: int = 0
    stale_notices: int = 0
    not_entitled_notices: int = 0
    authorization_requests: int = 0
    authorization_responses: int = 0
    ignored: int = 0
    clients: int = 0
    subscriptions: int = 0
    listeners: int = 0
    pending: int = 0


@dataclass(slots=True)
class ServerStats:
    """Counters of the connections; `BrokerStats` counts the routing.

    Attributes:
        turned_away: Connections closed at once, because too many wait for their turn.
        refused: Connections closed for their credentials.
        timeouts: Connections closed because the handshake took too long.
        protocol_errors: Connections closed because they broke the protocol.
        slow_consumers: Connections closed because they did not read.
        interactor_faults: Connections that ended, after login, for anything but a close.
        events_enqueued: Connects, disconnects, messages and heartbeats that arrived.
        write_queue_length: Messages that wait to be written, on all connections.
    """

    accepted: int = 0
    connections: int = 0
    turned_away: int = 0
    refused: int = 0
    timeouts: int = 0
    protocol_errors: int = 0
    slow_consumers: int = 0
    interactor_faults: int = 0
    events_enqueued: int = 0
    events_dequeued: int = 0
    events_queue_length: int = 0
    write_queue_length: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    frames_written: int = 0


def _by_feed() -> dict[str, int]:
    return {}


@dataclass(slots=True)
class Traffic:
    """The messages of one connection; the last three by feed.

    Attributes:
        told: Notifications that it was sent.
    """

    reads: int = 0
    authorization_requests: int = 0
    authorization_responses: int = 0
    told: dict[str, int] = field(default_factory=_by_feed)
    unicast: dict[str, int] = field(default_factory=_by_feed)
    multicast: dict[str, int] = field(default_factory=_by_feed)

    def add(self, other: Traffic) -> None:
        """Add the numbers of *other*."""
        self.reads += other.reads
        self.authorization_requests += other.authorization_requests
        self.authorization_responses += other.authorization_responses
        for own, more in (
            (self.told, other.told),
            (self.unicast, other.unicast),
            (self.multicast, other.multicast),
        ):
            for feed, count in more.items():
                count_feed(own, feed, count)


def count_feed(counted: dict[str, int], feed: str, more: int = 1) -> None:
    """Count something on *feed*, or among the others when there is no room for its name."""
    if feed not in counted and (len(counted) >= MAX_COUNTED_FEEDS or len(feed) > MAX_COUNTED_NAME):
        feed = OTHER_FEEDS
    counted[feed] = counted.get(feed, 0) + more


class Faults(dict[tuple[str, str, str], int]):
    """Connections that ended for a fault, by host, user and application."""

    def note(self, names: tuple[str, str, str]) -> None:
        """Count one; under empty names when there is no room for these."""
        if names not in self and (
            len(self) >= MAX_FAULTY or max(map(len, names)) > MAX_COUNTED_NAME
        ):
            names = ("", "", "")
        self[names] = self.get(names, 0) + 1


@dataclass(frozen=True, slots=True)
class InteractorView:
    """One connection as `Broker.interactors` shows it.

    Attributes:
        user: The effective one on feeds that are not listed; likewise *host*.
        subscriptions: How many topics, by feed.
        listening: Feeds whose subscriptions it is told of.
    """

    conn: Hashable
    id: uuid.UUID
    user: str
    host: str
    application: str
    traffic: Traffic
    subscriptions: dict[str, int]
    listening: dict[str, int]


@dataclass(frozen=True, slots=True)
class InteractorCounts:
    """A connection, and the messages written to it and waiting for it."""

    view: InteractorView
    written: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All numbers of a server at one moment.

    Attributes:
        ended: The traffic of connections that are gone.
        ended_written: The messages written to them.
    """

    interactors: Sequence[InteractorCounts]
    ended: Traffic
    ended_written: int
    faults: Mapping[tuple[str, str, str], int]
    events_enqueued: int
    events_dequeued: int
    events_queue_length: int
