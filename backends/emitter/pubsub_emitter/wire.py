"""What an Emitter session needs of an MQTT connection beyond MQTT.

Requests to the broker are publishes that it answers before it confirms them, on the topic of the
request and with its packet id. A session needs them before the publishes of users may go: for
keys, and to restore. And the filters of Emitter are not MQTT's: ``#`` may be followed by a slash
and options, which paho-mqtt refuses to send.

Source: emitter-io/emitter, ``internal/service/pubsub`` and ``internal/broker/conn.go``; MQTT
3.1.1 section 3.8 for SUBSCRIBE.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from pubsub_core.errors import NotConnected
from pubsub_mqtt.connection import NO_PROPERTIES, Connection, Outgoing, Request
from pubsub_mqtt.outgoing import Phase
from pubsub_mqtt.packets import encode_length

__all__ = ["EmitterConnection"]

_PUBLISH_QOS1: Final = 0x32
_SUBSCRIBE: Final = b"\x82"


class EmitterConnection(Connection):
    """An MQTT connection that can ask an Emitter broker."""

    def ask(self, topic: str, payload: bytes, on_done: Callable[[Outgoing], None]) -> Outgoing:
        """Send a request at once, past the window and whether or not publishes may go.

        *on_done* is called when the broker confirmed it, which is after its answer; when the
        session is lost it is not called, and the request shall be abandoned.

        Raises:
            NotConnected: There is no session.
            PublishFailed: It is too long.
        """
        if not self._usable:
            raise NotConnected("there is no session", backend="emitter")
        lead, tail, size = self._encode(topic, payload, 1, False, NO_PROPERTIES)
        out = Outgoing("a request", 1, _PUBLISH_QOS1, lead, tail, size, on_done)
        out.packet_id = self.next_id()
        out.phase = Phase.SENT
        self._inflight[out.packet_id] = out
        self._send(out, 0)
        return out

    def subscribe_verbatim(self, filter: str, on_done: Callable[[Request], None]) -> Request:
        """Send one SUBSCRIBE at quality of service 0 with *filter* as it is.

        The request does not hold the filter, in which there is a key.

        Raises:
            NotConnected: There is no session.
        """
        if not self._usable:
            raise NotConnected("there is no session", backend="emitter")
        request = Request(("",), on_done)
        request.packet_id = self.next_id()
        self._requests[request.packet_id] = request
        name = filter.encode()
        body = struct.pack("!HH", request.packet_id, len(name)) + name + b"\x00"
        self.write(_SUBSCRIBE + encode_length(len(body)) + body)
        return request
