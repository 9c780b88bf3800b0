"""What is on its way to the broker and waits for an answer."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

from pubsub_core.errors import PubSubError

__all__ = ["Outgoing", "Phase", "Request"]


class Phase(IntEnum):
    """How far a message got."""

    QUEUED = 0
    """Not handed to the socket yet."""
    SENT = 1
    """Waits for PUBACK, or PUBREC at QoS 2."""
    RELEASED = 2
    """PUBREC arrived, PUBREL is sent, waits for PUBCOMP."""
    DONE = 3


class Outgoing:
    """One message on its way to the broker, and in the end what became of it.

    Attributes:
        packet_id: 0 until it is sent; kept for every resend.
        error: Why it failed; None while it is under way or when it succeeded.
        reason: The broker's code; 0x10 says that nobody was subscribed.
        tag: Free for whoever published it.
    """

    __slots__ = (
        "abandoned",
        "end",
        "error",
        "head",
        "lead",
        "on_done",
        "packet_id",
        "phase",
        "qos",
        "reason",
        "refusals",
        "resent_in",
        "size",
        "start",
        "tag",
        "tail",
        "topic",
    )

    def __init__(
        self,
        topic: str,
        qos: int,
        head: int,
        lead: bytes,
        tail: tuple[bytes, ...],
        size: int,
        on_done: Callable[[Outgoing], None],
    ) -> None:
        self.topic = topic
        self.qos = qos
        self.size = size
        self.phase = Phase.QUEUED
        self.packet_id = 0
        self.error: PubSubError | None = None
        self.reason = 0
        self.tag: Any = None
        self.head = head
        self.lead = lead
        self.tail = tail
        self.on_done = on_done
        self.abandoned = False
        self.refusals = 0
        self.resent_in = 0
        self.start = 0
        self.end = 0

    @property
    def done(self) -> bool:
        """Whether the outcome is known."""
        return self.phase is Phase.DONE

    @property
    def sent(self) -> bool:
        """Whether any part of it may have left this process."""
        return self.phase is not Phase.QUEUED or self.packet_id != 0

    def __repr__(self) -> str:
        return f"<Outgoing {self.topic!r} qos={self.qos} id={self.packet_id} {self.phase.name}>"


class Request:
    """A SUBSCRIBE or UNSUBSCRIBE that waits for its acknowledgement."""

    __slots__ = ("codes", "error", "filters", "on_done", "packet_id", "said")

    def __init__(self, filters: tuple[str, ...], on_done: Callable[[Request], None]) -> None:
        self.filters = filters
        self.on_done = on_done
        self.packet_id = 0
        self.codes: tuple[int, ...] = ()
        self.said = ""
        self.error: PubSubError | None = None
