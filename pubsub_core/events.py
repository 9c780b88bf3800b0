"""Events of a bus, besides messages: its status, gaps, interest, notices."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

from .errors import PubSubError
from .message import Member

__all__ = [
    "AccessRefused",
    "BusEvent",
    "Gap",
    "GapReason",
    "InterestEvent",
    "InterestKind",
    "KeyRefused",
    "Notice",
    "Status",
    "StatusChanged",
    "SubscriptionRefused",
]


class Status(StrEnum):
    """Where a bus is in its life: new → connecting → online ⇄ reconnecting → closing → closed.

    ``failed`` replaces ``reconnecting`` where retrying is pointless, e.g. after refused
    credentials.
    """

    NEW = "new"
    CONNECTING = "connecting"
    ONLINE = "online"
    RECONNECTING = "reconnecting"
    FAILED = "failed"
    CLOSING = "closing"
    CLOSED = "closed"


class StatusChanged(msgspec.Struct, frozen=True):
    """The bus entered *status*.

    Attributes:
        error: Why, when it was not asked for.
        generation: Number of sessions that were online so far.
        retry_in: Seconds until the next attempt, when reconnecting.
    """

    status: Status
    error: PubSubError | None = None
    generation: int = 0
    retry_in: float | None = None


class GapReason(StrEnum):
    """Why messages may be missing."""

    DISCONNECTED = "disconnected"
    """The session was down and messages were published meanwhile, or may have been."""
    OVERFLOW = "overflow"
    """The subscription fell behind and its overflow policy dropped messages."""


class Gap(msgspec.Struct, frozen=True):
    """A hole in a stream: messages may be missing at exactly this place.

    Attributes:
        reason: See `GapReason`.
        lost: How many messages are missing, or None when that is unknown.
        recovered: Whether the messages that follow fill the hole (from the broker's session or
            history).
        since: Unix seconds when the hole began.
        until: Unix seconds when it ended.
        filter: Filter of the subscription; ``""`` in an event of the whole bus.
    """

    reason: GapReason
    lost: int | None
    recovered: bool
    since: float
    until: float
    filter: str = ""


class SubscriptionRefused(msgspec.Struct, frozen=True):
    """After a reconnect the broker refused a subscription that it had accepted before."""

    filter: str
    error: PubSubError


class Notice(msgspec.Struct, frozen=True):
    """A report from a backend: a stale publisher, an expired key, a refused message.

    Attributes:
        kind: A stable word, e.g. ``source_lost``, ``not_entitled``, ``key_expired``.
        text: One sentence for people. Holds no secret.
        topic: Topic concerned, or ``""``.
    """

    kind: str
    text: str
    topic: str = ""


class AccessRefused(Notice, frozen=True):
    """A key, token or right that worked before works no longer: it expired or was revoked.

    Its kind is ``key_expired`` where that is known, else ``key_refused``.

    Attributes:
        operation: Its use, e.g. ``publish`` or ``subscribe``.
    """

    operation: str = ""


KeyRefused = AccessRefused
"""Its name until 0.2."""

BusEvent: TypeAlias = StatusChanged | Gap | SubscriptionRefused | Notice


class InterestKind(StrEnum):
    """The kinds of an `InterestEvent`."""

    JOINED = "joined"
    LEFT = "left"
    UPDATED = "updated"
    SYNCED = "synced"
    """Everything that existed before the watch began has been told; member is None."""
    RESYNCED = "resynced"
    """The session was restored; the view was compared with a new snapshot."""


class InterestEvent(msgspec.Struct, frozen=True):
    """Who is subscribed to what, and how that changes: presence and notifications alike.

    Attributes:
        kind: See `InterestKind`.
        topic: Topic or filter that the member subscribed to.
        member: Who; None for ``synced`` and ``resynced``.
        reason: Why a member left: ``unsubscribed``, ``closed``, ``lost``, ``resync`` or
            ``""`` where the broker does not tell.
        watches: Ids of the `Watch` this event is for; None lets the core match by topic.
    """

    kind: InterestKind
    topic: str
    member: Member | None = None
    reason: str = ""
    watches: tuple[int, ...] | None = None

    @property
    def joined(self) -> bool:
        """Whether a member came."""
        return self.kind is InterestKind.JOINED

    @property
    def left(self) -> bool:
        """Whether a member left."""
        return self.kind is InterestKind.LEFT
