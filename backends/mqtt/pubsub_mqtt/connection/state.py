"""The state that the parts of a connection share: socket, flags, callbacks, packets under way.

`Connection` is one of these with a life; `Outbound`, `Inbound`, `Requests` and `Reader` hold it as
this and nothing more, so that none of them can begin or end a session.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from pubsub_core.errors import ConnectError, NotConnected, PubSubError
from pubsub_mqtt.packets import Incoming

from .keepalive import KeepalivePolicy, standard_keepalive
from .paho_client import PahoClient
from .session_data import (
    ConnectionStats,
    Session,
    SessionSettings,
    Version,
    random_client_id,
)
from .transport import BufferedSocket

__all__ = ["ConnectionState", "Outgoing", "Phase", "Request", "discard"]


def discard(_: object) -> None:
    """The callback of an owner that set none."""


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
    """One message on its way to the broker, and in the end its outcome.

    Attributes:
        packet_id: 0 until it is sent; kept for every resend.
        error: Why it failed; None while it is under way or when it succeeded.
        reason: The broker's code; 0x10: there were no subscribers.
        refusals: Sessions that the broker ended, it seems, over this message.
        sent_in: Generation of the session in which it was first sent.
        tag: Free for the publisher.
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
        "sent_in",
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
        self.sent_in = 0
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
    """A SUBSCRIBE or UNSUBSCRIBE that waits for its acknowledgement.

    Attributes:
        sent_at: When a SUBSCRIBE was sent that may be held responsible for the session's end;
            0.0 for others.
    """

    __slots__ = ("codes", "error", "filters", "on_done", "packet_id", "said", "sent_at")

    def __init__(self, filters: tuple[str, ...], on_done: Callable[[Request], None]) -> None:
        self.filters = filters
        self.on_done = on_done
        self.packet_id = 0
        self.codes: tuple[int, ...] = ()
        self.said = ""
        self.sent_at = 0.0
        self.error: PubSubError | None = None


class ConnectionState:
    """The facts that outlive a session, and those of the session.

    Attributes:
        settings: What CONNECT will say.
        backend: Whose connection it is, for errors.
        client_id: Ours, or the one that the broker chose.
        stats: Counters that only grow.
        generation: Number of the session, or of the attempt at one; 0 before the first.
        session: What CONNACK said; stays after the session.
        version: Protocol level of this session, or of the next attempt.
        socket: Of the session, CONNECT sent; None between sessions.
        connected: CONNACK accepted us.
        usable: Connected, and DISCONNECT was not said.
        where: The address, for errors.
        clock: Seconds; only differences count.
        last_in: When the last byte arrived.
        last_out: When the last byte left this process.
        inflight: Publishes above QoS 0 that were sent in this session, by packet id.
        resend: Those of earlier sessions, oldest first.
        unanswered: SUBSCRIBE and UNSUBSCRIBE, by packet id.
        paho: paho's client of this session, or of the last one.
    """

    def __init__(
        self,
        settings: SessionSettings,
        *,
        backend: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.client_id = random_client_id() if settings.client_id is None else settings.client_id
        self.stats = ConnectionStats()
        self.generation: int = 0
        self.session: Session | None = None
        self.version: Version = settings.versions[0]
        self.socket: BufferedSocket | None = None
        self.paho: PahoClient | None = None
        self.connected = False
        self.usable = False
        self.where = ""
        self.clock = clock
        self.last_in = 0.0
        self.last_out = 0.0

        self.dial: Callable[[], BufferedSocket] | None = None
        self.wake: Callable[[], None] = lambda: None
        self.on_close: Callable[[BufferedSocket], None] = discard
        self.on_session: Callable[[Session], None] = discard
        self.on_message: Callable[[Incoming], None] = discard
        self.on_lost: Callable[[ConnectError], None] = discard
        self.on_notice: Callable[[str, str, str], None] = lambda kind, text, topic: None
        self.on_resend: Callable[[str], None] = discard
        self.keepalive_policy: KeepalivePolicy = standard_keepalive
        # A random identifier, or one that the broker chose, is nobody else's.
        self.short_life_policy: Callable[[], bool] = lambda: settings.client_id is not None

        # In one place since a packet id is free only when none of the three uses it.
        self.inflight: dict[int, Outgoing] = {}
        self.resend: dict[int, Outgoing] = {}
        self.unanswered: dict[int, Request] = {}
        self._last_id = 0
        self._woken = False

    @property
    def connecting(self) -> bool:
        """Whether CONNECT is sent and CONNACK not yet here."""
        return self.socket is not None and not self.connected

    @property
    def wants_write(self) -> bool:
        """Whether a flush has something to do."""
        return self.socket is not None and not self.socket.idle

    @property
    def unsent(self) -> int:
        """Bytes that wait for the operating system."""
        return 0 if self.socket is None else self.socket.unsent

    def write(self, data: bytes) -> None:
        """Put a packet into the socket's buffer, and have it flushed soon."""
        sock = self.socket
        if sock is None:
            return
        self.stats.packets_out += 1
        sock.write(data)
        # One call of `wake` for all that a turn of the loop writes: scheduling a flush costs
        # more than writing a small packet.
        if not self._woken:
            self.wake_up()

    def wake_up(self) -> None:
        """Have the driver flush soon."""
        self._woken = True
        self.wake()

    def next_id(self) -> int:
        """Return a packet id that nothing unfinished uses."""
        candidate = self._last_id
        while True:
            candidate = candidate + 1 if candidate < 65535 else 1
            if (
                candidate not in self.inflight
                and candidate not in self.resend
                and candidate not in self.unanswered
            ):
                self._last_id = candidate
                return candidate

    def not_connected(self, topic: str = "") -> NotConnected:
        """Return the error for a call without a session."""
        return NotConnected("there is no session", backend=self.backend, topic=topic)
