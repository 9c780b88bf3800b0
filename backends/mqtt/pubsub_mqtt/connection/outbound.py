"""Publishes on their way to the broker: the window, the order, and the outcome of each.

Up to `window` messages above QoS 0 wait for the broker; the others queue behind them, those at
QoS 0 among them, since all go out in the order of the calls. What a lost session left unanswered
goes out first in the next one, under the packet ids it had.

paho-mqtt keeps a store of its own for this. It stays empty, since paho 2.2 sends all of it after a
reconnect without regard to the broker's receive maximum, and takes a PUBREC that refuses for
success.

Sources: MQTT 5.0 sections 3.3.4 (receive maximum), 4.3 (quality of service), 4.4 (redelivery),
4.6 (order); MQTT 3.1.1 section 4.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from paho.mqtt.packettypes import PacketTypes

from pubsub_core.errors import Outcome, PayloadTooLarge, PublishFailed, PubSubError
from pubsub_core.keyed import BoundedCache
from pubsub_mqtt.errors import ProtocolError, publish_error
from pubsub_mqtt.options import MAX_PACKET
from pubsub_mqtt.packets import (
    NO_PROPERTIES,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    encode_length,
    read_length,
)

from .paho_client import reason_text
from .state import ConnectionState, Outgoing, Phase, discard
from .transport import BufferedSocket

__all__ = ["Outbound"]

_TOPICS_CACHED: Final = 4096
_REFUSALS: Final = 2
"""Sessions that a message may end before it is given up."""

_QUICK_END: Final = 1.0
"""Seconds after a sending within which the end of the session is held against the message."""

_JOINED: Final = 4096
"""Longest payload that is copied into one piece with its header; beyond it copying costs more
than a second piece does."""

_QOS2_WINDOW_311: Final = 19
"""Most QoS 2 publishes under way under MQTT 3.1.1.

A 3.1.1 broker cannot tell its receive maximum. Mosquitto 2.0 counts QoS 2 against its
``max_inflight_messages``, 20 by default, and closes the connection of a client that
exceeds it. With exactly 20 under way, 2.0.11 confirms a QoS 1 publish and delivers it to
nobody (eclipse/mosquitto issue 2876 has more of that kind), so one place stays free for it.
"""


class Outbound:
    """Publishes without an outcome.

    Attributes:
        released: Whether publishes may go; see `release`.
        released_at: When they last began to.
        window: Most publishes above QoS 0 that may wait for the broker.
        queue: Those that wait for the window, in the order of the calls.
        unflushed: QoS 0 messages in the socket's buffer.
    """

    def __init__(self, state: ConnectionState) -> None:
        self._state = state
        self.released = False
        self.released_at = 0.0
        self.window = state.settings.max_inflight
        self.queue: deque[Outgoing] = deque()
        self.unflushed: deque[Outgoing] = deque()
        self._inflight = state.inflight
        self._resend = state.resend
        self._window2 = self.window
        self._under_way2 = 0
        self._max_out = MAX_PACKET
        self._encoded = BoundedCache[str, bytes](_TOPICS_CACHED)

    @property
    def unfinished(self) -> int:
        """Publishes whose outcome is not known yet."""
        return len(self.queue) + len(self._inflight) + len(self._resend) + len(self.unflushed)

    # --- sessions -------------------------------------------------------------------------

    def session_began(self, *, present: bool, window: int, max_packet_size: int) -> None:
        """Take the broker's limits; with *present* it knows what it had of us."""
        self.window = window
        self._window2 = window if self._state.version == 5 else min(window, _QOS2_WINDOW_311)
        self._max_out = max_packet_size
        if present:
            return
        for packet_id, out in list(self._resend.items()):
            if out.abandoned:  # no caller waits, and the broker forgot it
                del self._resend[packet_id]
            else:
                out.phase = Phase.SENT  # the broker knows no PUBREC any more

    def session_ended(self, sock: BufferedSocket, why: PubSubError) -> None:
        """Finish the publishes whose outcome is known now; keep the others for the next session."""
        self.released = False
        # QoS 0: what left is out of our hands, what did not can be told.
        gone: list[Outgoing] = []
        for out in self.unflushed:
            if out.end <= sock.done:
                self._finish(out, None)
            else:
                if out.start >= sock.begun:
                    out.phase = Phase.QUEUED
                gone.append(out)
        self.unflushed.clear()
        # Those in flight are older than what still waits to be sent again. In place: the
        # connection's next packet id depends on the same dictionaries.
        later = dict(self._resend)
        self._resend.clear()
        self._resend.update(self._inflight)
        self._resend.update(later)
        self._inflight.clear()
        self._under_way2 = 0
        kept: deque[Outgoing] = deque()
        for out in self.queue:
            if out.phase is Phase.DONE:
                continue
            (kept if out.qos else gone).append(out)
        self.queue = kept
        for out in gone:
            self._finish(out, self._failure(out, why))

    def release(self) -> None:
        """Let publishes go: first those of the last session in their order, then new ones.

        Until then they queue: a session is restored first, so that no message is lost
        between a publish of ours and a subscription that should see its effect.
        """
        if self._state.connected and not self.released:
            self.released = True
            self.released_at = self._state.clock()
            self._pump()

    def fail_pending(self) -> None:
        """Give every unfinished publish its outcome: unknown if sent, else not sent."""
        every = [
            *self._inflight.values(),
            *self._resend.values(),
            *self.unflushed,
            *self.queue,
        ]
        for store in (self._resend, self._inflight, self.unflushed, self.queue):
            store.clear()
        for out in every:
            self._finish(out, self._failure(out, None))

    def _failure(self, out: Outgoing, why: BaseException | None) -> PublishFailed:
        if out.sent:
            error = PublishFailed(
                f"the connection ended before the broker confirmed the message for {out.topic!r}",
                outcome=Outcome.UNKNOWN,
                hint="it may have arrived",
                backend=self._state.backend,
                topic=out.topic,
                retryable=True,
            )
        else:
            error = PublishFailed(
                f"the connection ended before the message for {out.topic!r} was sent",
                outcome=Outcome.NOT_SENT,
                hint="publish it again when the bus is online",
                backend=self._state.backend,
                topic=out.topic,
                retryable=True,
            )
        error.__cause__ = why
        return error

    def suspect(self, how: str, *, named: bool = False) -> None:
        """Notice that the broker ended the session, perhaps over a message.

        Without this a message that the broker cannot stand would end every session: MQTT has
        it sent again first thing in the next one. The oldest without an answer is suspected,
        since a broker handles messages in order and answers those before it. The second time
        it is given up; the others go on.

        Args:
            how: What the broker did, as a verb with its object.
            named: Whether the broker gave a reason that a message can have caused. Without one
                the end must have come soon after a sending, or it says nothing about it.
        """
        state = self._state
        for out in self._inflight.values():
            if out.phase is Phase.RELEASED:
                continue  # the broker has taken it
            # What was sent again went out with the release. For a new one no time is kept, which
            # would cost each message a look at the clock: the last byte of any kind stands for it.
            again = out.sent_in != state.generation
            sent_at = self.released_at if again else state.last_out
            if not named and state.clock() - sent_at >= _QUICK_END:
                return
            out.refusals += 1
            if out.refusals < _REFUSALS:
                return
            del self._inflight[out.packet_id]
            state.stats.refused_replays += 1
            text = (
                f"the broker {how} {_REFUSALS} times when the message for {out.topic!r} "
                f"({self._payload_size(out)} bytes) was sent; it is given up"
            )
            state.on_notice("publish_refused", text, out.topic)
            self._finish(
                out,
                PublishFailed(
                    text,
                    outcome=Outcome.UNKNOWN,
                    hint="the broker's log says more; most often it is too large, or may not "
                    "be published there",
                    backend=state.backend,
                    topic=out.topic,
                    retryable=False,
                ),
            )
            return

    def _payload_size(self, out: Outgoing) -> int:
        first = out.tail[0]
        if len(out.tail) == 2:
            return len(out.tail[1])
        if self._state.version != 5:
            return len(first)
        properties, start = read_length(first, 0, len(first))
        return len(first) - start - properties

    # --- publishing -----------------------------------------------------------------------

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        shown: str | None = None,
        on_done: Callable[[Outgoing], None] = discard,
    ) -> Outgoing:
        """Send a message as soon as the window allows, in the order of the calls.

        Above QoS 0 it survives the session: it is sent again in the next one, after
        `release`. *on_done* is called when its outcome is known, never from within this.

        *topic* must be valid; *properties* are what `publish_properties` made, and are left
        out under 3.1.1. *shown* is the topic's name in errors, notices and `Outgoing.topic`,
        where that on the wire holds a key or means nothing to users.

        Raises:
            NotConnected: There is no session.
            PublishFailed: This session cannot carry it.
        """
        name = topic if shown is None else shown
        if not self._state.usable:
            raise self._state.not_connected(name)
        lead, tail, size = self._encode(topic, payload, qos, retain, properties, name)
        head = PUBLISH | qos << 1 | retain
        out = Outgoing(name, qos, head, lead, tail, size, on_done)
        if qos == 0 and self.released and not self.queue and not self._resend:
            self._send_qos0(out)  # what `_pump` would do, and the most common case
            return out
        self.queue.append(out)
        self._pump()
        return out

    def publish_now(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        shown: str | None = None,
    ) -> bool:
        """Write a QoS 0 message to the socket's buffer, if nothing is waiting before it.

        The short way for the most common case: nothing is kept, so its outcome is the
        socket's counters. Returns False when it has to wait; call `publish` then.

        Raises:
            NotConnected, PublishFailed: As `publish`.
        """
        name = topic if shown is None else shown
        if not self._state.usable:
            raise self._state.not_connected(name)
        if not self.released or self.queue:
            return False
        lead, tail, _ = self._encode(topic, payload, 0, retain, properties, name)
        first = bytes((PUBLISH | retain,)) + lead
        if len(tail) == 1:
            self._state.write(first + tail[0])
        else:
            self._state.write(first)
            for part in tail:
                self._state.write(part)
        return True

    def ask(
        self, topic: str, payload: bytes, on_done: Callable[[Outgoing], None], *, shown: str
    ) -> Outgoing:
        """Publish at QoS 1 at once, past the window and whether or not publishes may go.

        For requests that the broker answers with a message: a session may need them before
        the publishes of users go out. *on_done* is called when the broker confirmed it; when
        the session is lost it is not, and the request shall be abandoned.

        Raises:
            NotConnected: There is no session.
            PublishFailed: This session cannot carry it.
        """
        if not self._state.usable:
            raise self._state.not_connected()
        lead, tail, size = self._encode(topic, payload, 1, False, NO_PROPERTIES, shown)
        out = Outgoing(shown, 1, PUBLISH | 1 << 1, lead, tail, size, on_done)
        out.packet_id = self._state.next_id()
        out.phase = Phase.SENT
        out.sent_in = self._state.generation
        self._inflight[out.packet_id] = out
        self._send(out, 0)
        return out

    def abandon(self, out: Outgoing) -> None:
        """Stop waiting for *out*. What was not sent never will be.

        A message that was sent keeps its packet id until the broker answers; in a
        resumed session it is even sent again, as MQTT demands.
        """
        out.on_done = discard
        out.abandoned = True
        if out.phase is Phase.QUEUED and out.packet_id == 0:
            out.phase = Phase.DONE  # and `_pump` passes it over

    def pending(self, packet_id: int) -> Outgoing | None:
        """Return the unfinished message with that packet id."""
        return self._inflight.get(packet_id) or self._resend.get(packet_id)

    def _encode(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool,
        properties: bytes,
        shown: str,
    ) -> tuple[bytes, tuple[bytes, ...], int]:
        name = self._encoded.get(topic)
        if name is None:
            data = topic.encode()
            name = self._encoded.keep(topic, len(data).to_bytes(2, "big") + data)
        if self._state.version == 4:
            properties = b""
        size = len(name) + len(properties) + len(payload) + (2 if qos else 0)
        if size + 5 > self._max_out and size + 1 + len(encode_length(size)) > self._max_out:
            over = size + 1 + len(encode_length(min(size, MAX_PACKET))) - len(payload)
            raise PayloadTooLarge(
                size=len(payload),
                limit=max(self._max_out - over, 0),
                hint="send less; the broker accepts no longer packet",
                backend=self._state.backend,
                topic=shown,
            )
        session = self._state.session
        if session is not None:
            if qos > session.maximum_qos:
                raise PublishFailed(
                    f"the broker has no QoS {qos}",
                    outcome=Outcome.NOT_SENT,
                    hint=f"publish with qos={session.maximum_qos}",
                    backend=self._state.backend,
                    topic=shown,
                    retryable=False,
                )
            if retain and not session.retain:
                raise PublishFailed(
                    "the broker keeps no retained messages",
                    outcome=Outcome.NOT_SENT,
                    hint="publish without retain",
                    backend=self._state.backend,
                    topic=shown,
                    retryable=False,
                )
        lead = (bytes((size,)) if size < 128 else encode_length(size)) + name
        if len(payload) <= _JOINED:
            return lead, (properties + payload,), size
        return lead, (properties, payload), size

    def _pump(self) -> None:
        """Send what the window allows."""
        if not self.released:
            return
        inflight = self._inflight
        while self._resend and len(inflight) < self.window:
            packet_id, out = next(iter(self._resend.items()))
            if out.qos == 2:
                if self._under_way2 >= self._window2:
                    return
                self._under_way2 += 1
            del self._resend[packet_id]
            inflight[packet_id] = out
            self._state.stats.resent += 1
            self._state.on_resend(out.topic)
            if out.phase is Phase.RELEASED:
                self._state.write(struct.pack("!BBH", PUBREL | 2, 2, packet_id))
            else:
                self._send(out, 0x08)
        if self._resend:
            return  # nothing overtakes what an earlier session left (section 4.6)
        queue = self.queue
        while queue:
            out = queue[0]
            if out.phase is Phase.DONE:
                queue.popleft()
                continue
            if out.qos == 0:
                # In its turn, although no window holds it: a program that publishes a state
                # at QoS 1 and then an event at QoS 0 relies on their order.
                queue.popleft()
                self._send_qos0(out)
                continue
            if len(inflight) >= self.window:
                return
            if out.qos == 2:
                if self._under_way2 >= self._window2:
                    return
                self._under_way2 += 1
            queue.popleft()
            out.packet_id = self._state.next_id()
            out.phase = Phase.SENT
            out.sent_in = self._state.generation
            inflight[out.packet_id] = out
            self._send(out, 0)

    def _send(self, out: Outgoing, duplicate: int) -> None:
        first = bytes((out.head | duplicate,)) + out.lead
        first += out.packet_id.to_bytes(2, "big")
        tail = out.tail
        if len(tail) == 1:
            self._state.write(first + tail[0])
        else:
            self._state.write(first)
            for part in tail:
                self._state.write(part)

    def _send_qos0(self, out: Outgoing) -> None:
        sock = self._state.socket
        if sock is None:
            return
        out.start = sock.written
        tail = out.tail
        rest = tail[0] if len(tail) == 1 else b"".join(tail)
        self._state.write(bytes((out.head,)) + out.lead + rest)
        out.end = sock.written
        out.phase = Phase.SENT
        self.unflushed.append(out)

    def _finish(self, out: Outgoing, error: PubSubError | None) -> None:
        out.error = error
        out.phase = Phase.DONE
        out.on_done(out)

    # --- answers --------------------------------------------------------------------------

    def confirm_flushed(self, done: int) -> None:
        """Finish the QoS 0 messages that the system accepted: *done* bytes of the stream."""
        waiting = self.unflushed
        while waiting and waiting[0].end <= done:
            self._finish(waiting.popleft(), None)

    def acknowledged(
        self, kind: int, packet_id: int, reason: int, data: bytes, start: int, stop: int
    ) -> None:
        """Act on PUBACK, PUBREC or PUBCOMP.

        Args:
            kind: Which of them.
            packet_id: Of the message.
            reason: The broker's code, 0 where it gave none.
            data: Holds the packet, whose text is read only when it is needed.
            start: Where its body begins.
            stop: Where it ends.

        Raises:
            ProtocolError: MQTT 5, and the message waits for something else.
        """
        out = self._inflight.get(packet_id)
        if out is None:
            self._unknown(kind, packet_id)
            return
        qos = out.qos
        if kind == PUBACK:
            # RabbitMQ 3.10 lowers QoS 2 to 1 and answers so, against [MQTT-4.3.3]: it took the
            # message, and nothing else will come. Waiting would fill the window for good.
            lowered = qos == 2 and out.phase is Phase.SENT and self._state.version != 5
            fits = qos == 1 or lowered
        elif kind == PUBREC:
            fits = qos == 2
        else:
            fits = qos == 2 and out.phase is Phase.RELEASED
        if not fits:
            self._state.stats.wrong_phase_acks += 1
            if self._state.version == 5:
                raise ProtocolError(
                    f"packet 0x{kind:02X} for a message that does not wait for it", reason=0x82
                )
            return
        failed = reason >= 0x80 and kind != PUBCOMP
        if kind == PUBREC and not failed:
            out.phase = Phase.RELEASED
            out.reason = reason
            self._state.write(struct.pack("!BBH", PUBREL | 2, 2, packet_id))
            return
        del self._inflight[packet_id]
        if qos == 2:
            self._under_way2 -= 1
        if failed:
            said = (
                reason_text(data[start + 3 : stop], PacketTypes.PUBACK) if stop - start > 3 else ""
            )
            out.reason = reason
            self._finish(
                out,
                publish_error(
                    reason, topic=out.topic, size=out.size, backend=self._state.backend, said=said
                ),
            )
        else:
            if kind == PUBACK:
                out.reason = reason
            self._finish(out, None)
        if self.queue or self._resend:
            self._pump()

    def _unknown(self, kind: int, packet_id: int) -> None:
        self._state.stats.unknown_acks += 1
        if kind == PUBREC and self._state.version == 5:
            # An earlier process of ours may have begun this; let the broker forget it.
            self._state.write(struct.pack("!BBHB", PUBREL | 2, 3, packet_id, 0x92))
