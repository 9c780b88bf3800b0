"""Bytes into packets: framing, and to which part of the connection each packet goes.

A generic decoder that makes an object of each packet was tried: it cost more than all the rest of
a small message. So the parts get the whole chunk and two positions, and only they copy.

Source: MQTT 5.0 section 2.1 (fixed header).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pubsub_mqtt.errors import ProtocolError
from pubsub_mqtt.packets import (
    CONNACK,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    malformed,
)

from .inbound import Inbound
from .outbound import Outbound
from .state import ConnectionState
from .transport import BufferedSocket

__all__ = ["Reader"]

# What a TLS record with an alert begins with (RFC 8446 section 5.1).
_ALERT: Final = 0x15
_EARLY_PACKET: Final = 65_536
"""Longest packet that is read before the broker accepted us."""


_ACKNOWLEDGEMENTS: Final = (PUBACK, PUBREC, PUBREL, PUBCOMP)


class Reader:
    """Cuts what arrives into packets and hands each to its part.

    Args:
        state: The connection.
        inbound: Gets PUBLISH and PUBREL.
        outbound: Gets the other acknowledgements.
        connack: Gets head and body of the first packet.
        other: Gets head, kind and body of everything else.
    """

    def __init__(
        self,
        state: ConnectionState,
        inbound: Inbound,
        outbound: Outbound,
        *,
        connack: Callable[[int, bytes], None],
        other: Callable[[int, int, bytes], None],
    ) -> None:
        self._state = state
        self._inbound = inbound
        self._outbound = outbound
        self._connack = connack
        self._other = other
        # The beginning of a packet that is not complete, and the size at which it will be:
        # joining at every chunk would make a large packet quadratic.
        self._rest: list[bytes] = []
        self._rest_size = 0
        self._need = 0

    def begin(self) -> None:
        """Forget what the last session left."""
        self._rest.clear()
        self._rest_size = self._need = 0

    def feed(self, chunk: bytes, sock: BufferedSocket) -> None:
        """Act on what arrived on *sock*; stop when that ends the session.

        Raises:
            ProtocolError: The peer broke the protocol; the session must end.
        """
        if self._rest_size:
            self._rest.append(chunk)
            self._rest_size += len(chunk)
            if self._rest_size < self._need:
                return
            chunk = b"".join(self._rest)
            self._rest.clear()
            self._rest_size = 0
        self._parse(chunk, sock)

    def _parse(self, data: bytes, sock: BufferedSocket) -> None:
        pos = 0
        end = len(data)
        packets = 0
        state = self._state
        longest = state.settings.max_packet_size
        limit = longest if state.connected else _EARLY_PACKET
        need = 0
        try:
            while end - pos >= 2:
                head = data[pos]
                if head != CONNACK and not state.connected:
                    alert = " (a TLS alert: the port wants mqtts://)" if head == _ALERT else ""
                    raise ProtocolError(
                        f"instead of CONNACK the peer sent what begins with 0x{head:02X}{alert}"
                    )
                # `read_length` in place: of a length that is not complete it would raise, which
                # here means only that the rest is still on its way.
                size = data[pos + 1]
                start = pos + 2
                if size & 0x80:
                    size &= 0x7F
                    shift = 7
                    while True:
                        if start >= end:
                            size = -1
                            break
                        byte = data[start]
                        start += 1
                        size |= (byte & 0x7F) << shift
                        if byte < 0x80:
                            break
                        shift += 7
                        if shift > 21:
                            raise malformed("a length of more than four bytes")
                    if size < 0:
                        break
                stop = start + size
                if stop - pos > limit:
                    raise ProtocolError(
                        f"the broker sent a packet of {stop - pos} bytes; the limit is {limit}",
                        reason=0x95,
                    )
                if stop > end:
                    need = stop - pos
                    break
                packets += 1
                kind = head & 0xF0
                if not state.connected:
                    self._connack(head, data[start:stop])
                    limit = longest
                elif kind == PUBLISH:
                    self._inbound.publish(data, head, start, stop)
                elif kind in _ACKNOWLEDGEMENTS:
                    self._acknowledged(head, kind, data, start, stop)
                else:
                    self._other(head, kind, data[start:stop])
                pos = stop
                if state.socket is not sock:
                    return  # bytes behind the end of a session belong to no session
        finally:
            state.stats.packets_in += packets
        if pos < end:
            self._rest.append(data[pos:])
            self._rest_size = end - pos
            self._need = need

    def _acknowledged(self, head: int, kind: int, data: bytes, start: int, stop: int) -> None:
        if head & 0x0F != (2 if kind == PUBREL else 0):
            raise malformed(f"flags of packet 0x{head:02X}")
        size = stop - start
        if size < 2 or (size > 2 and self._state.version == 4):
            raise malformed(f"packet 0x{head:02X} of {size} bytes")
        packet_id = data[start] << 8 | data[start + 1]
        if kind == PUBREL:
            self._inbound.released(packet_id)
            return
        reason = data[start + 2] if size > 2 else 0
        self._outbound.acknowledged(kind, packet_id, reason, data, start, stop)
