"""What `pubsub_mqtt.MQTTClient` returns: messages with views of the packets they took.

Programs written for amqtt read ``message.publish_packet.variable_header.topic_name`` and the
like. The views here have those names (amqtt 0.12, ``session.py`` and ``mqtt/publish.py``)
and hold no packets: those come and go in the connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "ApplicationMessage",
    "IncomingApplicationMessage",
    "OutgoingApplicationMessage",
    "PacketIdHeader",
    "PacketView",
    "PublishPacketView",
    "PublishPayload",
    "PublishVariableHeader",
]


@dataclass(frozen=True, slots=True)
class PacketIdHeader:
    """The variable header of an acknowledgement."""

    packet_id: int


@dataclass(frozen=True, slots=True)
class PacketView:
    """PUBACK, PUBREC, PUBREL or PUBCOMP of a message."""

    name: str
    variable_header: PacketIdHeader

    @property
    def packet_id(self) -> int:
        """The packet identifier."""
        return self.variable_header.packet_id


@dataclass(frozen=True, slots=True)
class PublishVariableHeader:
    """Topic and identifier of a PUBLISH; the latter is None at QoS 0."""

    topic_name: str
    packet_id: int | None


@dataclass(frozen=True, slots=True)
class PublishPayload:
    """The payload of a PUBLISH."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PublishPacketView:
    """The PUBLISH of a message.

    Attributes:
        dup_flag: Whether the sender says that it may have sent it before.
    """

    variable_header: PublishVariableHeader
    payload: PublishPayload
    qos: int
    retain_flag: bool
    dup_flag: bool = False

    @property
    def topic_name(self) -> str:
        """The topic."""
        return self.variable_header.topic_name

    @property
    def packet_id(self) -> int | None:
        """The packet identifier; None at QoS 0."""
        return self.variable_header.packet_id

    @property
    def data(self) -> bytes:
        """The payload."""
        return self.payload.data


class ApplicationMessage:
    """One message, received or sent.

    Attributes:
        topic: Its topic.
        data: Its payload.
        qos: Quality of service of this delivery, which may be lower than asked for.
        retain: Received: the broker gave it as the topic's last value. Sent: the flag.
        packet_id: None at QoS 0.
        publish_packet: View of the PUBLISH.
        puback_packet: View of the PUBACK once it was received or sent, else None.
        pubrec_packet: The same at QoS 2.
        pubrel_packet: The same at QoS 2.
        pubcomp_packet: The same at QoS 2.
    """

    __slots__ = (
        "data",
        "packet_id",
        "puback_packet",
        "pubcomp_packet",
        "publish_packet",
        "pubrec_packet",
        "pubrel_packet",
        "qos",
        "retain",
        "topic",
    )

    def __init__(
        self,
        packet_id: int | None,
        topic: str,
        qos: int,
        data: bytes,
        retain: bool,
        *,
        duplicate: bool = False,
    ) -> None:
        self.packet_id = packet_id
        self.topic = topic
        self.qos = qos
        self.data = data
        self.retain = retain
        self.publish_packet = PublishPacketView(
            PublishVariableHeader(topic, packet_id),
            PublishPayload(data),
            qos,
            retain,
            duplicate,
        )
        self.puback_packet: PacketView | None = None
        self.pubrec_packet: PacketView | None = None
        self.pubrel_packet: PacketView | None = None
        self.pubcomp_packet: PacketView | None = None

    def acknowledged(self, *names: str) -> None:
        """Fill in the views of the packets with these names."""
        if self.packet_id is not None:
            header = PacketIdHeader(self.packet_id)
            for name in names:
                setattr(self, f"{name}_packet", PacketView(name.upper(), header))

    def __repr__(self) -> str:
        # The payload may be personal or secret, and repr ends up in logs.
        return (
            f"<{type(self).__name__} {self.topic!r} {len(self.data)} bytes qos={self.qos}"
            f"{' retained' if self.retain else ''}>"
        )


class IncomingApplicationMessage(ApplicationMessage):
    """A message that was received."""

    __slots__ = ()


class OutgoingApplicationMessage(ApplicationMessage):
    """A message that was sent."""

    __slots__ = ()
