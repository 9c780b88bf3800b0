"""Messages from the broker: decoded, delivered once, and acknowledged when they are settled.

A message above QoS 0 is acknowledged when its consumer settles it, not when it arrives, so
that the broker keeps what was not handled. paho-mqtt hands a QoS 2 message over only after PUBREL
and in a round trip more; here it is delivered at once and remembered until PUBREL, which is the
other method that section 4.3.3 allows.

Sources: MQTT 5.0 sections 3.3 (PUBLISH), 3.3.4 (receive maximum), 4.3 (quality of service).
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from typing import Final

from pubsub_core.keyed import BoundedCache
from pubsub_mqtt.errors import ProtocolError
from pubsub_mqtt.packets import (
    PUBACK,
    PUBCOMP,
    PUBREC,
    Incoming,
    malformed,
    read_length,
    read_publish_properties,
)

from .state import ConnectionState

__all__ = ["Inbound"]

logger = logging.getLogger("pubsub_mqtt")

_TOPICS_CACHED: Final = 4096
_DEFERRED_BYTES: Final = 1_048_576
"""Messages kept while deliveries are paused, before the socket is no longer read."""


def _cost(message: Incoming) -> int:
    """Return about how many bytes a message that is kept takes."""
    return len(message.payload) + len(message.topic) + 200


class Inbound:
    """What arrived and is not settled.

    Attributes:
        unsettled: Packet id and QoS of the messages that wait for `settle`, by serial number.
    """

    def __init__(self, state: ConnectionState) -> None:
        self._state = state
        self._receive_maximum = state.settings.receive_maximum or 65535
        self._serial = 0
        self.unsettled: dict[int, tuple[int, int]] = {}
        # QoS 2 between PUBLISH and PUBREL, by packet id: whether it is settled, and whether
        # the broker waits for our PUBREC in this session.
        self._received: dict[int, tuple[bool, bool]] = {}
        self._topics = BoundedCache[bytes, str](_TOPICS_CACHED)
        self._paused = False
        self._deferred: deque[Incoming] = deque()
        self._deferred_bytes = 0

    @property
    def reading(self) -> bool:
        """Whether the driver shall watch the socket for input."""
        return not (self._paused and self._deferred_bytes >= _DEFERRED_BYTES)

    # --- sessions -------------------------------------------------------------------------

    def session_began(self, *, present: bool) -> None:
        """Sort what waits: with *present* the broker sends it again, else it has forgotten it."""
        if present:
            # What waited at QoS 2 comes again, and is acknowledged then without being
            # delivered twice; what waited at QoS 1 is delivered again.
            self._received = {mid: (settled, False) for mid, (settled, _) in self._received.items()}
            self.unsettled = {
                serial: (mid, qos) for serial, (mid, qos) in self.unsettled.items() if qos == 2
            }
        else:
            self._received.clear()
            self.unsettled.clear()

    def session_ended(self) -> None:
        """Drop the messages kept while deliveries were paused; no consumer has seen them."""
        self._deferred.clear()
        self._deferred_bytes = 0
        self._paused = False

    # --- what consumers do ----------------------------------------------------------------

    def pause(self) -> None:
        """Deliver no more messages. Acknowledgements are still read, up to a bound.

        Up to 1 MiB of messages is kept so that a handler that publishes while it holds the
        flow back still sees its acknowledgement; beyond that the socket is left alone.
        """
        self._paused = True

    def resume(self) -> None:
        """Deliver again, first what was kept."""
        was_reading = self.reading
        self._paused = False
        deferred = self._deferred
        while deferred and not self._paused:
            message = deferred.popleft()
            self._deferred_bytes -= _cost(message)
            try:
                self._state.on_message(message)
            except Exception:
                logger.exception("the consumer of a message failed")
        if not was_reading:
            self._state.last_in = self._state.clock()  # the silence was ours

    def settle(self, serial: int, *, refuse: bool = False) -> None:
        """Acknowledge the message with that serial number; unknown ones are ignored.

        One that arrived in an earlier session is left to the broker, which sends it again;
        at QoS 2, in a session that was resumed, it is acknowledged when it does.
        Acknowledgements go out in the order of the calls, not of arrival: a message that is
        never settled must not hold back every other.

        *refuse* says that it was not handled (MQTT 5); the broker forgets it all the same.
        """
        # By a serial number of ours, since the broker reuses packet ids: a late call for a
        # message of an earlier session must not acknowledge another one.
        packet_id, qos = self.unsettled.pop(serial, (0, 0))
        if qos == 2:
            asked = self._received[packet_id][1]
            self._received[packet_id] = (True, asked)
            if not asked or not self._state.usable:
                return
            command = PUBREC
        elif qos == 1 and self._state.usable:
            command = PUBACK
        else:
            return
        if refuse and self._state.version == 5:
            self._received.pop(packet_id, None)
            self._state.write(struct.pack("!BBHB", command, 3, packet_id, 0x83))
        else:
            self._state.write(struct.pack("!BBH", command, 2, packet_id))

    def packet_id_of(self, serial: int) -> int | None:
        """Return the packet identifier of a message that waits for `settle`."""
        return self.unsettled[serial][0] if serial in self.unsettled else None

    # --- packets --------------------------------------------------------------------------

    def publish(self, data: bytes, head: int, start: int, stop: int) -> None:
        """Act on a PUBLISH that stands in *data* between *start* and *stop*.

        Raises:
            ProtocolError: It is malformed, or more than we allowed.
        """
        pos = start + 2
        if pos > stop:
            raise malformed("PUBLISH without a topic")
        name_end = pos + (data[start] << 8 | data[start + 1])
        if name_end > stop:
            raise malformed("a topic reaches beyond the packet")
        # By its bytes: decoding and checking a topic costs as much as all else of a small message.
        raw = data[pos:name_end]
        topic = self._topics.get(raw)
        if topic is None:
            topic = self._new_topic(raw)
        qos = head >> 1 & 3
        pos = name_end
        packet_id = 0
        if qos:
            if qos == 3 or pos + 2 > stop:
                raise malformed("PUBLISH with QoS 3" if qos == 3 else "no packet id")
            packet_id = data[pos] << 8 | data[pos + 1]
            pos += 2
            if not packet_id:
                raise malformed("packet id 0")
        elif head & 0x08:
            raise malformed("DUP with QoS 0")
        properties = None
        if self._state.version == 5:
            if pos >= stop:
                raise malformed("PUBLISH without properties")
            size = data[pos]
            pos += 1
            if size:
                if size > 127:
                    size, pos = read_length(data, pos - 1, stop)
                after = pos + size
                if after > stop:
                    raise malformed("properties reach beyond the packet")
                properties = read_publish_properties(data, pos, after)
                pos = after
        if qos == 2:
            # Known until PUBREL: that, and not the DUP flag, is what makes it exactly once.
            known = self._received.get(packet_id)
            if known is not None:
                self._duplicate(packet_id, settled=known[0])
                return
            self._received[packet_id] = (False, True)
        serial = 0
        if qos:
            serial = self._serial = self._serial + 1
            self.unsettled[serial] = (packet_id, qos)
            # Section 3.3.4 has this end the session, which also bounds what waits here.
            if len(self.unsettled) > self._receive_maximum:
                raise ProtocolError(
                    "the broker sent more unacknowledged messages than allowed", reason=0x93
                )
        message = Incoming(
            topic,
            data[pos:stop],
            qos,
            head & 1 == 1,
            head & 0x08 != 0,
            serial,
            properties,
        )
        if self._paused:
            self._deferred.append(message)
            self._deferred_bytes += _cost(message)
            return
        try:
            self._state.on_message(message)
        except Exception:
            logger.exception("the consumer of a message failed")

    def _new_topic(self, raw: bytes) -> str:
        try:
            topic = raw.decode()
        except UnicodeDecodeError:
            raise malformed("a topic is not UTF-8") from None
        if not topic:
            raise ProtocolError("a message without a topic", reason=0x82)
        if "\0" in topic or "+" in topic or "#" in topic:
            raise ProtocolError("a message to a topic with NUL or a wildcard", reason=0x90)
        return self._topics.keep(raw, topic)

    def _duplicate(self, packet_id: int, *, settled: bool) -> None:
        """Answer a QoS 2 message that was delivered before (section 4.3.3)."""
        self._state.stats.duplicates += 1
        self._received[packet_id] = (settled, True)
        if settled:
            self._state.write(struct.pack("!BBH", PUBREC, 2, packet_id))

    def released(self, packet_id: int) -> None:
        """Act on PUBREL: the broker will not send that QoS 2 message again.

        Raises:
            ProtocolError: We sent no PUBREC yet.
        """
        # Also for one that is unknown: the broker must be able to finish (4.3.3).
        known = self._received.pop(packet_id, None)
        if known is not None and not known[0]:
            self._received[packet_id] = known
            raise ProtocolError("PUBREL for a message without PUBREC", reason=0x82)
        if known is None and self._state.version == 5:
            self._state.write(struct.pack("!BBHB", PUBCOMP, 3, packet_id, 0x92))
        else:
            self._state.write(struct.pack("!BBH", PUBCOMP, 2, packet_id))
