"""Primitives, limits and encoders of the messagebus protocol.

A message is a type byte and its fields; there is no frame length, so one wrong length loses
the stream for good. All numbers are big-endian, except that a UUID is in .NET's ``Guid``
order (`uuid.UUID.bytes_le`). String lengths count bytes: the Python packages up to 6.0.0a1
count characters, and lose the stream on the first accented name.

Everything is checked before a byte is written, so that a bad argument is an error where it
was given and not half a message on the wire.

Sources: jetblack-messagebus ``DataReader.cs``, ``DataWriter.cs``, ``MessageType.cs``, and the
recordings in tests/data/messagebus_vectors.json.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final, Literal, Self, TypeAlias
from uuid import UUID

import msgspec

__all__ = [
    "ADMIN_FEED",
    "DEFAULT_LIMITS",
    "FENCE_FEEDS",
    "HEARTBEAT",
    "HEARTBEAT_TOPIC",
    "DataPacket",
    "Dialect",
    "Flag",
    "MessageType",
    "ProtocolError",
    "Truncated",
    "WireLimits",
    "decode_packets",
    "encode_authorization_request",
    "encode_authorization_response",
    "encode_flag",
    "encode_forwarded_multicast",
    "encode_forwarded_subscription",
    "encode_forwarded_unicast",
    "encode_int_set",
    "encode_multicast",
    "encode_notification_request",
    "encode_packets",
    "encode_string",
    "encode_subscription_request",
    "encode_unicast",
    "notice",
    "unpack_int",
]

Dialect: TypeAlias = Literal["is_image", "content_type"]
"""The field in which data messages differ: a boolean, or a media type."""

Flag: TypeAlias = bool | str
"""The value of that field: a bool in one dialect, a str in the other."""

ADMIN_FEED: Final = "__admin__"
HEARTBEAT_TOPIC: Final = "heartbeat"
FENCE_FEEDS: Final = "__sync__"
"""How feeds begin that clients subscribe to for a moment, to be told of it, and never for data."""

_INT = struct.Struct(">i")
_pack = _INT.pack
unpack_int = _INT.unpack_from
_ZERO = b"\0\0\0\0"
_CACHED = 64


class MessageType(IntEnum):
    """The type byte."""

    MULTICAST_DATA = 1
    UNICAST_DATA = 2
    FORWARDED_SUBSCRIPTION_REQUEST = 3
    NOTIFICATION_REQUEST = 4
    SUBSCRIPTION_REQUEST = 5
    AUTHORIZATION_REQUEST = 6
    AUTHORIZATION_RESPONSE = 7
    FORWARDED_MULTICAST_DATA = 8
    FORWARDED_UNICAST_DATA = 9


class ProtocolError(Exception):
    """The peer broke the protocol; the stream is lost."""

    def again(self) -> Self:
        """Return the same error without its traceback.

        An error that was raised holds the frames it went through, and they all that was
        received; a decoder that kept it would keep itself alive as well.
        """
        return type(self)(*self.args)


class Truncated(ProtocolError):
    """The stream ended inside a message."""


@dataclass(frozen=True, slots=True)
class WireLimits:
    """The largest of everything, checked before memory is taken or anything waited for.

    Every length stays below 2**24, so that a stream which lost its step nearly always shows
    a byte where a zero belongs, and is caught at once.

    Attributes:
        string: Bytes of a feed, topic, user, host or content type.
        handshake_string: Bytes of one string of the handshake.
        data: Bytes of one data packet.
        message: Bytes of a whole message.
        packets: Packets of a message.
        entitlements: Entitlements of a packet or of an authorization.
    """

    string: int = 65536
    handshake_string: int = 65536
    data: int = 0xFFFFFF
    message: int = 0xFFFFFF
    packets: int = 65536
    entitlements: int = 65536


DEFAULT_LIMITS: Final = WireLimits()


class DataPacket(msgspec.Struct, gc=False):
    """A part of a message that needs certain entitlements.

    Attributes:
        entitlements: Those that a subscriber must hold to receive it; None and empty are the same
            on the wire, and arrive as None.
        data: The bytes; None and empty are the same on the wire, and arrive as None.
    """

    entitlements: set[int] | None
    data: bytes | None

    def __str__(self) -> str:
        return f"entitlements={self.entitlements},data={self.data!r}"

    def __repr__(self) -> str:
        return f"DataPacket({self.entitlements!r}, {self.data!r})"


# --- primitives --------------------------------------------------------------------------


def _string(text: str) -> bytes:
    data = text.encode()
    if len(data) > DEFAULT_LIMITS.string:
        raise ValueError(
            f"a string of {len(data)} bytes; the longest that is sent is {DEFAULT_LIMITS.string}"
        )
    return _pack(len(data)) + data


_cached_string = lru_cache(4096)(_string)


def encode_string(text: str | None) -> bytes:
    """Return the length in bytes and the UTF-8 text; None is the empty string.

    Raises:
        TypeError: It is no string.
        ValueError: It is too long, or has half a surrogate pair.
    """
    if text is None:
        return _ZERO
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
        raise TypeError(f"a name is a str, not {type(text).__name__}")
    # Names repeat; long ones are not kept.
    return _cached_string(text) if len(text) <= _CACHED else _string(text)


def _uuid(value: UUID) -> bytes:
    if not isinstance(value, UUID):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
        raise TypeError(f"a client id is a uuid.UUID, not {type(value).__name__}")
    return value.bytes_le


def encode_int_set(values: Iterable[int] | None) -> bytes:
    """Return the count and the numbers; None and an empty set are the same.

    Raises:
        TypeError: A number is no int.
        ValueError: A number does not fit 32 bits, or there are too many.
    """
    if values is None:
        return _ZERO
    if isinstance(values, (str, bytes)):
        raise TypeError("entitlements are a set of numbers")
    unique = values if isinstance(values, (set, frozenset)) else dict.fromkeys(values)
    count = len(unique)
    if not count:
        return _ZERO
    if count > DEFAULT_LIMITS.entitlements:
        raise ValueError(f"{count} entitlements; the most is {DEFAULT_LIMITS.entitlements}")
    try:
        return struct.pack(f">{count + 1}i", count, *unique)
    except struct.error as error:
        for value in unique:
            if not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
                raise TypeError(f"an entitlement is an int, not {type(value).__name__}") from error
            if not -(2**31) <= value < 2**31:
                raise ValueError(f"entitlement {value} does not fit 32 bits") from error
        raise


def _data(data: bytes | bytearray | memoryview | None) -> bytes:
    if data is None:
        return _ZERO
    if not isinstance(data, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
        raise TypeError(f"data is bytes, not {type(data).__name__}")
    size = data.nbytes if isinstance(data, memoryview) else len(data)
    if size > DEFAULT_LIMITS.data:
        raise ValueError(f"data of {size} bytes; the most in a packet is {DEFAULT_LIMITS.data}")
    return _pack(size) + data


def encode_packets(packets: Sequence[DataPacket] | None) -> bytes:
    """Return the count and the packets; None and an empty list are the same."""
    if not packets:
        return _ZERO
    count = len(packets)
    if count > DEFAULT_LIMITS.packets:
        raise ValueError(f"{count} packets; the most in a message is {DEFAULT_LIMITS.packets}")
    parts = [_pack(count)]
    for packet in packets:
        try:
            entitlements, data = packet.entitlements, packet.data
        except AttributeError:
            raise TypeError(
                f"data_packets is a list of DataPacket, and holds a {type(packet).__name__}"
            ) from None
        parts.append(encode_int_set(entitlements) if entitlements else _ZERO)
        parts.append(_data(data))
    return b"".join(parts)


def encode_flag(flag: object, dialect: Dialect) -> bytes:
    """Return the field in which the dialects differ.

    Any truth value is a boolean, as in the packages. A bool where a content type belongs, or
    the other way round, is a mistake that would lose the stream.
    """
    if dialect == "is_image":
        if isinstance(flag, str):
            raise TypeError("a content type needs the dialect 'content_type'; is_image is a bool")
        return b"\x01" if flag else b"\0"
    if flag is not None and not isinstance(flag, str):
        raise TypeError("the dialect 'content_type' takes a content type, which is a str")
    return encode_string(flag)


def _bool(value: object) -> bytes:
    return b"\x01" if value else b"\0"


def _checked(frame: bytes) -> bytes:
    if len(frame) > DEFAULT_LIMITS.message:
        raise ValueError(f"a message of {len(frame)} bytes; the most is {DEFAULT_LIMITS.message}")
    return frame


def decode_packets(body: bytes, at: int) -> list[DataPacket] | None:
    """Return the packets that begin at *at*, which the decoder has already checked."""
    (count,) = unpack_int(body, at)
    if not count:
        return None
    at += 4
    if count == 1 and body[at : at + 4] == _ZERO:
        # The usual message: one packet without entitlements, to the end of the body.
        return [DataPacket(None, body[at + 8 :] or None)]
    packets: list[DataPacket] = []
    for _ in range(count):
        (entitled,) = unpack_int(body, at)
        at += 4
        entitlements: set[int] | None = None
        if entitled:
            entitlements = set(struct.unpack_from(f">{entitled}i", body, at))
            at += 4 * entitled
        (size,) = unpack_int(body, at)
        at += 4
        packets.append(DataPacket(entitlements, body[at : at + size] if size else None))
        at += size
    return packets


# --- messages, in the order of their numbers -----------------------------------------------


def _data_body(
    feed: str,
    topic: str,
    flag: object,
    packets: Sequence[DataPacket] | None,
    dialect: Dialect,
) -> bytes:
    """Return the common end of the four data messages; a server forwards it unchanged."""
    return (
        encode_string(feed)
        + encode_string(topic)
        + encode_flag(flag, dialect)
        + encode_packets(packets)
    )


def encode_multicast(
    feed: str,
    topic: str,
    flag: object,
    packets: Sequence[DataPacket] | None,
    dialect: Dialect = "is_image",
) -> bytes:
    """Type 1, client to server."""
    return _checked(b"\x01" + _data_body(feed, topic, flag, packets, dialect))


def encode_unicast(
    client_id: UUID,
    feed: str,
    topic: str,
    flag: object,
    packets: Sequence[DataPacket] | None,
    dialect: Dialect = "is_image",
) -> bytes:
    """Type 2, client to server; *client_id* is the recipient."""
    return _checked(b"\x02" + _uuid(client_id) + _data_body(feed, topic, flag, packets, dialect))


def encode_forwarded_subscription(
    user: str, host: str, client_id: UUID, feed: str, topic: str, is_add: object
) -> bytes:
    """Type 3, server to client; all three identify the subscriber."""
    return (
        b"\x03"
        + encode_string(user)
        + encode_string(host)
        + _uuid(client_id)
        + encode_string(feed)
        + encode_string(topic)
        + _bool(is_add)
    )


def encode_notification_request(feed: str, is_add: object) -> bytes:
    """Type 4, client to server."""
    return b"\x04" + encode_string(feed) + _bool(is_add)


def encode_subscription_request(feed: str, topic: str, is_add: object) -> bytes:
    """Type 5, client to server."""
    return b"\x05" + encode_string(feed) + encode_string(topic) + _bool(is_add)


def encode_authorization_request(
    client_id: UUID, host: str, user: str, feed: str, topic: str
) -> bytes:
    """Type 6, server to client. Here, and only here, the host comes before the user."""
    return (
        b"\x06"
        + _uuid(client_id)
        + encode_string(host)
        + encode_string(user)
        + encode_string(feed)
        + encode_string(topic)
    )


def encode_authorization_response(
    client_id: UUID,
    feed: str,
    topic: str,
    is_authorization_required: object,
    entitlements: Iterable[int] | None,
) -> bytes:
    """Type 7, client to server; *client_id* is the subscriber."""
    return (
        b"\x07"
        + _uuid(client_id)
        + encode_string(feed)
        + encode_string(topic)
        + _bool(is_authorization_required)
        + encode_int_set(entitlements)
    )


def encode_forwarded_multicast(
    user: str,
    host: str,
    feed: str,
    topic: str,
    flag: object,
    packets: Sequence[DataPacket] | None,
    dialect: Dialect = "is_image",
) -> bytes:
    """Type 8, server to client; user and host are the publisher's."""
    return (
        b"\x08"
        + encode_string(user)
        + encode_string(host)
        + _data_body(feed, topic, flag, packets, dialect)
    )


def encode_forwarded_unicast(
    user: str,
    host: str,
    client_id: UUID,
    feed: str,
    topic: str,
    flag: object,
    packets: Sequence[DataPacket] | None,
    dialect: Dialect = "is_image",
) -> bytes:
    """Type 9, server to client; user and host are the publisher's, the id the recipient's."""
    return (
        b"\x09"
        + encode_string(user)
        + encode_string(host)
        + _uuid(client_id)
        + _data_body(feed, topic, flag, packets, dialect)
    )


def notice(feed: str, topic: str, dialect: Dialect = "is_image") -> bytes:
    """Return the notice for a stale topic and for a missing entitlement, which look alike."""
    flag: Flag = True if dialect == "is_image" else ""
    return encode_forwarded_multicast("", "", feed, topic, flag, None, dialect)


HEARTBEAT: Final[dict[Dialect, bytes]] = {
    "is_image": encode_forwarded_multicast(
        "admin", "localhost", ADMIN_FEED, HEARTBEAT_TOPIC, True, None
    ),
    "content_type": encode_forwarded_multicast(
        "admin", "localhost", ADMIN_FEED, HEARTBEAT_TOPIC, "", None, "content_type"
    ),
}
"""A server's heartbeat."""
