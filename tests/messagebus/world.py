"""A broker whose connections have names, and whose effects can be read."""

from __future__ import annotations

import uuid
from typing import Any

from pubsub_messagebus.protocol import (
    DataPacket,
    Decoder,
    Dialect,
    Flag,
    encode_authorization_response,
    encode_multicast,
    encode_notification_request,
    encode_subscription_request,
    encode_unicast,
)
from pubsub_messagebus.server.broker import Broker, Effects
from pubsub_messagebus.server.interactors import Identity

from .vectors import plain

Seen = tuple[str, dict[str, Any]]


class World:
    """Drives a broker through bytes, as a server does.

    Attributes:
        raw: The effects of the last call.
    """

    def __init__(self, broker: Broker | None = None) -> None:
        self.broker = Broker() if broker is None else broker
        self.dialects: dict[str, Dialect] = {}
        self.ids: dict[str, uuid.UUID] = {}
        self.raw: Effects = []

    def connect(
        self, *names: str, dialect: Dialect = "is_image", identity: Identity | None = None
    ) -> list[Seen]:
        seen: list[Seen] = []
        for name in names:
            self.dialects[name] = dialect
            who = identity or Identity(user=name, host=f"host-{name}")
            seen += self._read(self.broker.connected(name, who, dialect=dialect))
            self.ids[name] = self.broker.client_id(name)
        return seen

    def leave(self, name: str) -> list[Seen]:
        return self._read(self.broker.disconnected(name))

    def send(self, name: str, wire: bytes) -> list[Seen]:
        decoder = Decoder("server", dialect=self.dialects[name])
        decoder.feed(wire)
        message = decoder.next_message()
        assert message is not None
        assert not decoder.inside
        return self._read(self.broker.received(name, message))

    def add(self, name: str, feed: str = "F", topic: str = "T") -> list[Seen]:
        return self.send(name, encode_subscription_request(feed, topic, True))

    def remove(self, name: str, feed: str = "F", topic: str = "T") -> list[Seen]:
        return self.send(name, encode_subscription_request(feed, topic, False))

    def listen(self, name: str, feed: str = "F", is_add: bool = True) -> list[Seen]:
        return self.send(name, encode_notification_request(feed, is_add))

    def publish(
        self,
        name: str,
        feed: str = "F",
        topic: str = "T",
        packets: list[DataPacket] | None = None,
        flag: Flag = False,
    ) -> list[Seen]:
        dialect = self.dialects[name]
        if dialect == "content_type" and isinstance(flag, bool):
            flag = ""
        return self.send(name, encode_multicast(feed, topic, flag, packets, dialect))

    def unicast(
        self,
        name: str,
        target: str | uuid.UUID,
        feed: str = "F",
        topic: str = "T",
        packets: list[DataPacket] | None = None,
        flag: Flag = True,
    ) -> list[Seen]:
        identifier = self.ids[target] if isinstance(target, str) else target
        dialect = self.dialects[name]
        return self.send(name, encode_unicast(identifier, feed, topic, flag, packets, dialect))

    def answer(
        self,
        name: str,
        client: str,
        entitlements: set[int] | None,
        feed: str = "F",
        topic: str = "T",
        required: bool = True,
    ) -> list[Seen]:
        return self.send(
            name,
            encode_authorization_response(self.ids[client], feed, topic, required, entitlements),
        )

    def heartbeat(self) -> list[Seen]:
        return self._read(self.broker.heartbeat())

    def _read(self, effects: Effects) -> list[Seen]:
        self.raw = effects
        seen: list[Seen] = []
        for conn, frame in effects:
            name = str(conn)
            decoder = Decoder("client", dialect=self.dialects[name])
            decoder.feed(frame)
            message = decoder.next_message()
            assert message is not None
            assert not decoder.inside
            seen.append((name, {"type": frame[0], **plain(message)}))
        return seen


def packet(data: str, *entitlements: int) -> DataPacket:
    return DataPacket(set(entitlements) or None, data.encode())


def texts(seen: dict[str, Any]) -> list[str] | None:
    """Return the data of a message as text."""
    packets = seen["data_packets"]
    return packets and [bytes.fromhex(each["data"]).decode() for each in packets]
