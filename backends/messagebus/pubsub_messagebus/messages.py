"""The messages as classes that read and write themselves, as ``jetblack_messagebus.messages``.

For tools that were written against that package; the client and the server use `protocol`.
Fields are constructor arguments and attributes, in the order of the wire.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Self

from .io import DataReader, DataWriter
from .protocol import MessageType

__all__ = [
    "AuthorizationRequest",
    "AuthorizationResponse",
    "ForwardedMulticastData",
    "ForwardedSubscriptionRequest",
    "ForwardedUnicastData",
    "Message",
    "MessageType",
    "MulticastData",
    "NotificationRequest",
    "SubscriptionRequest",
    "UnicastData",
]

# How each field is read and written, by its name.
_PRIMITIVES = {
    "client_id": "uuid",
    "is_image": "boolean",
    "is_add": "boolean",
    "is_authorization_required": "boolean",
    "entitlements": "int_set",
    "data_packets": "data_packet_array",
}


class Message(abc.ABC):
    """Base of the nine.

    Attributes:
        message_type: The type byte.
    """

    message_type: ClassVar[MessageType]
    fields: ClassVar[tuple[str, ...]]

    def __init__(self, *values: Any, **named: Any) -> None:
        given = dict(zip(self.fields, values, strict=False)) | named
        if len(values) > len(self.fields) or set(given) != set(self.fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.fields)}")
        for name, value in given.items():
            setattr(self, name, value)

    @staticmethod
    async def read(reader: DataReader) -> Message:
        """Read any message.

        Raises:
            ValueError: It is of no known type.
        """
        return await _CLASSES[MessageType(await reader.read_unsigned_byte())].read_body(reader)

    @classmethod
    async def read_body(cls, reader: DataReader) -> Self:
        """Read the fields after the type byte."""
        return cls(
            *[
                await getattr(reader, f"read_{_PRIMITIVES.get(name, 'string')}")()
                for name in cls.fields
            ]
        )

    def write_body(self, writer: DataWriter) -> None:
        """Write the fields after the type byte."""
        for name in self.fields:
            write = getattr(writer, f"write_{_PRIMITIVES.get(name, 'string')}")
            write(getattr(self, name))

    async def write(self, writer: DataWriter) -> None:
        """Write the message, and wait until the peer has room."""
        writer.write_byte(self.message_type.value)
        self.write_body(writer)
        await writer.drain()

    def __str__(self) -> str:
        shown = (
            f'{name}="{getattr(self, name)}"'
            if name not in _PRIMITIVES
            else f"{name}={getattr(self, name)}"
            for name in self.fields
        )
        return f"{type(self).__name__}({','.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # mutable


class MulticastData(Message):
    """Data for every subscriber."""

    message_type = MessageType.MULTICAST_DATA
    fields = ("feed", "topic", "is_image", "data_packets")


class UnicastData(Message):
    """Data for one subscriber."""

    message_type = MessageType.UNICAST_DATA
    fields = ("client_id", "feed", "topic", "is_image", "data_packets")


class ForwardedSubscriptionRequest(Message):
    """Somebody subscribed, or unsubscribed."""

    message_type = MessageType.FORWARDED_SUBSCRIPTION_REQUEST
    fields = ("user", "host", "client_id", "feed", "topic", "is_add")


class NotificationRequest(Message):
    """Start or stop being told of subscriptions."""

    message_type = MessageType.NOTIFICATION_REQUEST
    fields = ("feed", "is_add")


class SubscriptionRequest(Message):
    """Add or take away a subscription."""

    message_type = MessageType.SUBSCRIPTION_REQUEST
    fields = ("feed", "topic", "is_add")


class AuthorizationRequest(Message):
    """Asks an authorizer what this client may see."""

    message_type = MessageType.AUTHORIZATION_REQUEST
    fields = ("client_id", "host", "user", "feed", "topic")


class AuthorizationResponse(Message):
    """Answers what a client may see."""

    message_type = MessageType.AUTHORIZATION_RESPONSE
    fields = ("client_id", "feed", "topic", "is_authorization_required", "entitlements")


class ForwardedMulticastData(Message):
    """Data that somebody published."""

    message_type = MessageType.FORWARDED_MULTICAST_DATA
    fields = ("user", "host", "feed", "topic", "is_image", "data_packets")


class ForwardedUnicastData(Message):
    """Data that somebody sent to one client."""

    message_type = MessageType.FORWARDED_UNICAST_DATA
    fields = ("user", "host", "client_id", "feed", "topic", "is_image", "data_packets")


_CLASSES: dict[MessageType, type[Message]] = {
    each.message_type: each
    for each in (
        MulticastData,
        UnicastData,
        ForwardedSubscriptionRequest,
        NotificationRequest,
        SubscriptionRequest,
        AuthorizationRequest,
        AuthorizationResponse,
        ForwardedMulticastData,
        ForwardedUnicastData,
    )
}
