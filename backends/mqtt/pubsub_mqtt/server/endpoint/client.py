"""One client of an endpoint, and the dialect that answers it; no I/O.

`Client` knows which packet may come next and what goes back; `Dialect` is what a service makes
of it. The two stand in one file since each calls the other.

Time comes in as a number, bytes come in through `Client.receive`, and leave through
`Client.take`. The owner of the socket calls `Client.tick` when it says, and `Client.finish`
once the socket is gone.

Sources: MQTT 3.1.1 sections 3.1 (CONNECT comes first and once), 3.1.2.10 (keepalive), 4.3
(quality of service) and 4.6 (order of acknowledgements).
"""

from __future__ import annotations

import abc
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pubsub_core.errors import InvalidFilter
from pubsub_core.topics import validate_filter
from pubsub_mqtt.errors import printable

from .packets import (
    ConnAck,
    Connect,
    Decoder,
    Disconnect,
    OtherProtocol,
    Packet,
    PacketError,
    PacketTooLarge,
    PingReq,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
    encode,
)
from .profile import HttpRequest, HttpResponse, Profile

__all__ = ["Client", "Dialect", "Ending", "EndpointStats"]

logger = logging.getLogger("pubsub_mqtt.server.endpoint")

_PINGRESP: Final = b"\xd0\x00"
_PIECE: Final = 262_144
"""Bytes that `take` joins at a time: all of a long queue would be copied for a socket that takes
a part of it."""

_CROWDED: Final = 1_048_576
# Answers that may wait for a client that sends and does not read. One piece of input, which is
# acted on as a whole, asks for half as many at most.
_ANSWERS: Final = 262_144

# Code points that a server may close the connection over (section 1.5.3): control codes and
# those that are no characters.
_CODES: Final = "\x01-\x1f\x7f-\x9f\ufdd0-\ufdef" + "".join(
    f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17)
)
_DISCOURAGED: Final = re.compile(f"[{_CODES}]")
_NOT_A_TOPIC: Final = re.compile(f"[+#{_CODES}]|\\A\\Z")


class Ending(StrEnum):
    """How a connection came to its end, for dialects that tell."""

    CLOSED = "closed"
    """The dialect or the server closed it."""

    DISCONNECT = "disconnect"
    LATE = "late"
    LOST = "lost"
    MISTAKE = "mistake"
    """An error of this server."""

    PROTOCOL = "protocol"
    REFUSED = "refused"
    SILENT = "silent"
    SLOW = "slow"
    TOO_LARGE = "too large"


@dataclass(slots=True)
class EndpointStats:
    """Counters that only grow, but for *clients*.

    Attributes:
        clients: Clients whose CONNECT was accepted and that are still there.
        turned_away: Connections beyond the limit of clients.
        refused: CONNECTs that were refused.
        late: Connections whose handshake took too long.
        silent: Clients that were silent for longer than their keepalive allows.
        errors: Connections closed over what they sent.
        slow_readers: Clients closed because they did not read.
        dropped: Messages that a client which did not read has lost.
    """

    connections: int = 0
    clients: int = 0
    turned_away: int = 0
    refused: int = 0
    late: int = 0
    silent: int = 0
    errors: int = 0
    slow_readers: int = 0
    dropped: int = 0
    messages_in: int = 0
    messages_out: int = 0


class Dialect(abc.ABC):
    """What one service makes of packets: the part of an endpoint that differs.

    The endpoint owns packets, keepalive, deadlines, limits, WebSocket and TLS. A dialect decides
    what CONNECT, PUBLISH, SUBSCRIBE, UNSUBSCRIBE and the end of a connection mean. It is asked
    before anything changes, and keeps all state that connections share: subscriptions, stored
    messages, who is there.

    Every method is called in the endpoint's event loop, one at a time, and must not block.

    Attributes:
        profile: Read when a connection begins.
    """

    profile: Profile = Profile()

    @abc.abstractmethod
    def connect(self, client: Client, packet: Connect) -> int:
        """Return the CONNACK return code; anything but 0 closes the connection.

        Two clients with the same identifier both stay, unless this closes one of them.
        """

    @abc.abstractmethod
    def publish(self, client: Client, packet: Publish) -> bool:
        """Take a message; answers, if any, go out before its acknowledgement.

        Return True to have it acknowledged at once. After False the dialect calls
        `Client.acknowledge` itself, when it has stored the message. Acknowledgements go out
        in the order of the messages either way.
        """

    @abc.abstractmethod
    def subscribe(self, client: Client, packet: Subscribe) -> Sequence[int]:
        """Subscribe, and return a SUBACK code for each filter."""

    @abc.abstractmethod
    def unsubscribe(self, client: Client, packet: Unsubscribe) -> None:
        """Unsubscribe; UNSUBACK follows whatever happened."""

    @abc.abstractmethod
    def disconnected(self, client: Client, *, clean: bool) -> None:
        """Forget an accepted client, and publish its will where that is due.

        *clean* says that the client sent DISCONNECT. Called once, never from within another
        method of the dialect.
        """

    def rejected(self, client: Client) -> None:
        """Learn that a connection ended without an accepted CONNECT; `Client.reason` says why."""
        return

    def http(self, request: HttpRequest) -> HttpResponse:
        """Answer a request that is no WebSocket upgrade."""
        return HttpResponse(400, b"Bad Request")


class Client:
    """One connection, as its dialect and its socket see it.

    Attributes:
        name: The peer's address, for logs.
        packet: The CONNECT that was accepted, or None so far.
        state: Free for the dialect.
        closed: Nothing is received or sent any more; what was sent before still goes out.
        reason: Why it was closed, for logs; no text of the peer in it that is not escaped.
        ending: The same as a kind; None as long as it is open.
        clean: Whether the client said DISCONNECT.
        crowded: With more bytes than that waiting, `press` is called for each further message,
            so that the publisher can be slowed down.
    """

    __slots__ = (
        "_acks",
        "_answers",
        "_decoder",
        "_finished",
        "_last_in",
        "_made",
        "_out",
        "_received",
        "_silence",
        "_strict",
        "_topic",
        "clean",
        "closed",
        "crowded",
        "dialect",
        "ending",
        "name",
        "packet",
        "press",
        "queued",
        "reason",
        "state",
        "stats",
        "wake",
    )

    def __init__(
        self,
        dialect: Dialect,
        stats: EndpointStats,
        *,
        now: float,
        name: str = "",
        wake: Callable[[], None] = lambda: None,
        press: Callable[[], None] = lambda: None,
    ) -> None:
        profile = dialect.profile
        self.dialect = dialect
        self.stats = stats
        self.name = name
        self.wake = wake
        self.press = press
        self.crowded = min(profile.max_queue // 4, _CROWDED)
        self.packet: Connect | None = None
        self.state: Any = None
        self.closed = False
        self.clean = False
        self.reason = ""
        self.ending: Ending | None = None
        self.queued = 0
        self._decoder = Decoder(profile.max_early_packet, leniency=profile.leniency)
        self._out: deque[bytes] = deque()
        # At most so many of what waits are answers. Not exact: which of the parts are answers is
        # not kept, so that a message costs no more than its bytes.
        self._answers = 0
        # Packets above QoS 0 in their order, and whether they may be acknowledged: section 4.6
        # wants acknowledgements in the order of the messages, also where a later one was stored
        # first.
        self._acks: deque[list[Any]] = deque()
        self._received: set[int] = set()
        self._made = now
        self._last_in = now
        self._silence: float | None = None
        self._finished = False
        self._strict = not profile.leniency.names
        # The last good topic: most clients publish to one over and over.
        self._topic: str | None = None

    def __repr__(self) -> str:
        return f"<Client {self.name} {'closed' if self.closed else 'open'}>"

    # --- what the socket calls ----------------------------------------------------------

    def receive(self, data: bytes, now: float) -> None:
        """Act on what arrived."""
        if self.closed:
            return
        decoder = self._decoder
        try:
            # Only what begins a packet tells its type: CONNECT may come in pieces.
            if self.packet is None and not decoder.buffered and data[0] >> 4 != 1:
                raise PacketError("something else than CONNECT")
            decoder.receive(data)
            while not self.closed:
                packet = decoder.next_packet()
                if packet is None:
                    break
                self._last_in = now
                # Before the `match`, which tries a dozen classes: nearly all packets are this.
                if type(packet) is Publish and self.packet is not None:
                    self._publish(packet)
                else:
                    self._handle(packet)
        except PacketError as exc:
            self.stats.errors += 1
            large = isinstance(exc, PacketTooLarge)
            if isinstance(exc, OtherProtocol) and self.dialect.profile.answer_other_names:
                self._write(encode(ConnAck(1)))
            self.close(f"it sent {exc}", Ending.TOO_LARGE if large else Ending.PROTOCOL)
        except Exception:
            # A mistake of ours must not keep the client waiting for an answer.
            self.stats.errors += 1
            logger.exception("a packet of %s could not be handled", self.name)
            self.close("an error of this server", Ending.MISTAKE)

    def tick(self, now: float) -> float | None:
        """Close the client if it is late; return seconds until the next call, None for never."""
        if self.closed:
            return None
        if self.packet is None:
            left = self._made + self.dialect.profile.handshake - now
            if left > 0:
                return left
            self.stats.late += 1
            self.close("it did not complete its handshake in time", Ending.LATE)
            return None
        if self._silence is None:
            return None
        left = self._last_in + self._silence - now
        if left > 0:
            return left
        self.stats.silent += 1
        self.close(f"it was silent for {now - self._last_in:.1f} s", Ending.SILENT)
        return None

    def touch(self, now: float) -> None:
        """Forgive the silence up to now, during which nothing was read."""
        self._last_in = now

    def take(self) -> bytes:
        """Return some of what is to be sent, or nothing."""
        out = self._out
        if not out:
            return b""
        if self.queued <= _PIECE or len(out) == 1:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            self.queued = self._answers = 0
            return data
        parts: list[bytes] = []
        size = 0
        while out and size < _PIECE:
            part = out.popleft()
            size += len(part)
            parts.append(part)
        self.queued -= size
        self._answers = min(self._answers, len(out))
        return b"".join(parts)

    def finish(self) -> None:
        """Tell the dialect that the client is gone; may be called again."""
        if not self.closed:
            self.close("the connection ended", Ending.LOST)
        if self._finished:
            return
        self._finished = True
        try:
            if self.packet is None:
                self.dialect.rejected(self)
                return
            self.stats.clients -= 1
            self.dialect.disconnected(self, clean=self.clean)
        except Exception:
            logger.exception("the end of a client could not be handled")

    # --- what the dialect calls ---------------------------------------------------------

    def send(self, packet: bytes) -> bool:
        """Queue one encoded PUBLISH; False when it was not taken.

        One that does not read loses it, or its connection, as the profile says.
        """
        if self.closed:
            return False
        profile = self.dialect.profile
        if self.queued + len(packet) > profile.max_queue:
            self.stats.dropped += 1
            if profile.slow_reader == "close":
                self.give_up(f"more than {profile.max_queue} bytes")
            return False
        self.stats.messages_out += 1
        self._write(packet)
        if self.queued > self.crowded:
            self.press()
        return True

    def give_up(self, waiting: str) -> None:
        """Close a client that does not read; nothing that waits goes out any more."""
        if self.closed:
            return
        self.stats.slow_readers += 1
        self._out.clear()
        self.queued = self._answers = 0
        self.close(f"it did not read: {waiting} wait for it", Ending.SLOW)

    def acknowledge(self, packet: Publish) -> None:
        """Acknowledge a message for which `Dialect.publish` returned False."""
        for entry in self._acks:
            if entry[0] is packet:
                entry[1] = True
                break
        self._send_acks()

    def close(self, reason: str, ending: Ending = Ending.CLOSED) -> None:
        """End the connection; what was sent before still goes out."""
        if self.closed:
            return
        self.closed = True
        self.reason = reason
        self.ending = ending
        logger.debug("closing %s: %s", self.name, reason)
        self.wake()

    # --- packets ------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        if not self._out:
            self.wake()
        self._out.append(data)
        self.queued += len(data)

    def _reply(self, data: bytes) -> None:
        """Queue an answer, which is never dropped: what a client asks for has a bound instead."""
        if self._answers >= _ANSWERS:
            self.give_up(f"{_ANSWERS} answers")
        if not self.closed:
            self._answers += 1
            self._write(data)

    def _publish(self, packet: Publish) -> None:
        self.stats.messages_in += 1
        if self._strict and packet.topic != self._topic:
            if _NOT_A_TOPIC.search(packet.topic) is not None:
                raise PacketError(
                    "a PUBLISH whose topic is empty or has a wildcard or control code"
                )
            self._topic = packet.topic
        if packet.qos == 0:
            self.dialect.publish(self, packet)
            return
        if packet.qos == 2:
            # The id, and not the DUP flag, tells a repetition (section 4.3.3).
            if packet.packet_id in self._received:
                if not any(found.packet_id == packet.packet_id for found, _ in self._acks):
                    self._reply(encode(PubRec(packet.packet_id)))
                return
            if len(self._received) >= self.dialect.profile.max_received:
                raise PacketError("more messages at QoS 2 than may wait for their PUBREL")
            self._received.add(packet.packet_id)
        entry = [packet, False]
        self._acks.append(entry)
        if self.dialect.publish(self, packet):
            entry[1] = True
            self._send_acks()

    def _send_acks(self) -> None:
        acks = self._acks
        while acks and acks[0][1]:
            packet: Publish = acks.popleft()[0]
            if not self.closed:
                make = PubAck if packet.qos == 1 else PubRec
                self._reply(encode(make(packet.packet_id)))

    def _handle(self, packet: Packet) -> None:
        if self.packet is None:
            if not isinstance(packet, Connect):
                raise PacketError(f"{_kind(packet)} before CONNECT")
            self._connect(packet)
            return
        match packet:
            case PingReq():
                self._reply(_PINGRESP)
            case Subscribe():
                self._check_filters([text for text, _ in packet.filters])
                codes = self.dialect.subscribe(self, packet)
                if not self.closed:
                    self._reply(encode(SubAck(packet.packet_id, tuple(codes))))
            case Unsubscribe():
                self._check_filters(packet.filters)
                self.dialect.unsubscribe(self, packet)
                if not self.closed:
                    self._reply(encode(UnsubAck(packet.packet_id)))
            case PubRel(packet_id):
                self._received.discard(packet_id)
                self._reply(encode(PubComp(packet_id)))
            case PubAck() | PubRec() | PubComp():
                pass  # nothing is sent above QoS 0, so there is nothing to settle
            case Disconnect():
                self.clean = True
                self.close("it said DISCONNECT", Ending.DISCONNECT)
            case Connect():
                raise PacketError("a second CONNECT")
            case _:
                raise PacketError(f"{_kind(packet)}, which only a server sends")

    def _check_filters(self, filters: Sequence[str]) -> None:
        most = self.dialect.profile.max_filters
        if len(filters) > most:
            raise PacketError(f"{len(filters)} filters in one packet; {most} are allowed")
        if not self._strict:
            return
        for text in filters:
            try:
                validate_filter(text)
            except InvalidFilter as exc:
                raise PacketError("a filter that is none") from exc
            if _DISCOURAGED.search(text) is not None:
                raise PacketError("a filter with a control code")

    def _connect(self, packet: Connect) -> None:
        profile = self.dialect.profile
        if (packet.protocol, packet.level) not in profile.levels:
            code = 1
        else:
            will = packet.will
            if self._strict and will is not None and _NOT_A_TOPIC.search(will.topic) is not None:
                raise PacketError("a will whose topic is none")
            code = self.dialect.connect(self, packet)
        if self.closed:
            return
        if code:
            self.stats.refused += 1
            self._write(encode(ConnAck(code)))
            self.close(f"its CONNECT was refused with return code {code}", Ending.REFUSED)
            return
        self.packet = packet
        self.stats.clients += 1
        self._decoder.limit = profile.max_packet
        # The standard's one and a half times (section 3.1.2.10).
        self._silence = packet.keepalive * 1.5 if packet.keepalive else profile.idle
        self._write(encode(ConnAck()))
        logger.debug("%s is client %s", self.name, printable(repr(packet.client_id)))


def _kind(packet: Packet) -> str:
    return type(packet).__name__.upper()
