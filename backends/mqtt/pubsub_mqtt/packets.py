"""PUBLISH and its properties as bytes, and back; nothing here knows a socket or paho-mqtt.

These are the packets that every message goes through, so they are made and read here and
not by paho-mqtt, whose generic properties cost more than the rest of a message together.
Every decoder is total: it returns a value or raises `ProtocolError`.

Sources: MQTT 5.0 sections 1.5 (data types), 2.2.2 (properties) and 3.3 (PUBLISH).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from pubsub_core.errors import Outcome, PublishFailed

from .errors import ProtocolError

__all__ = [
    "CONNACK",
    "DISCONNECT",
    "NO_PROPERTIES",
    "PINGRESP",
    "PUBACK",
    "PUBCOMP",
    "PUBLISH",
    "PUBREC",
    "PUBREL",
    "SUBACK",
    "SUBSCRIBE",
    "UNSUBACK",
    "Incoming",
    "PublishProperties",
    "encode_length",
    "malformed",
    "publish_properties",
    "read_data",
    "read_length",
    "read_publish_properties",
    "read_text",
]

CONNACK: Final = 0x20
PUBLISH: Final = 0x30
PUBACK: Final = 0x40
PUBREC: Final = 0x50
PUBREL: Final = 0x60
PUBCOMP: Final = 0x70
SUBSCRIBE: Final = 0x80
SUBACK: Final = 0x90
UNSUBACK: Final = 0xB0
PINGRESP: Final = 0xD0
DISCONNECT: Final = 0xE0

NO_PROPERTIES: Final = b"\x00"
"""The encoded properties of a PUBLISH that has none."""

_MAX_USER_PROPERTIES = 64
_MOST_SHOWN = 60


class PublishProperties(msgspec.Struct, frozen=True, gc=False):
    """The properties of a PUBLISH (MQTT 5.0 section 3.3.2.3).

    Attributes:
        expiry: Seconds left, or None.
        user: User properties in their order; names may repeat.
        subscriptions: Identifiers of our subscriptions this copy is for.
    """

    expiry: int | None = None
    content_type: str | None = None
    user: tuple[tuple[str, str], ...] = ()
    subscriptions: tuple[int, ...] = ()
    response_topic: str | None = None
    correlation: bytes | None = None
    utf8: bool = False


class Incoming(msgspec.Struct, frozen=True, gc=False):
    """One PUBLISH from the broker.

    Attributes:
        duplicate: The broker says it may have sent it before.
        serial: What `Connection.settle` wants to hear; 0 at QoS 0, never used twice.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool
    duplicate: bool
    serial: int
    properties: PublishProperties | None


# --- encoding ------------------------------------------------------------------------


def encode_length(value: int) -> bytes:
    """Encode a variable byte integer (section 1.5.5)."""
    if value < 128:
        return bytes((value,))
    if value < 16_384:  # as most messages are
        return bytes((value & 127 | 128, value >> 7))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _text(value: str, what: str) -> bytes:
    """Encode an MQTT string (section 1.5.4): at most 65535 bytes, no NUL, no surrogates."""
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise _bad_property(what, "holds a surrogate, which UTF-8 cannot carry") from None
    if len(data) > 65535:
        raise _bad_property(what, f"has {len(data)} bytes, MQTT carries 65535")
    if b"\0" in data:
        raise _bad_property(what, "holds U+0000, which MQTT forbids")
    return len(data).to_bytes(2, "big") + data


def _bad_property(what: str, why: str) -> PublishFailed:
    return PublishFailed(
        f"{what} {why}",
        outcome=Outcome.NOT_SENT,
        hint="shorten or escape it",
        retryable=False,
    )


def publish_properties(
    *,
    expiry: float | None = None,
    content_type: str | None = None,
    user: Iterable[tuple[str, str]] = (),
    response_topic: str | None = None,
    correlation: bytes | None = None,
) -> bytes:
    """Encode the properties of a PUBLISH, their length in front (section 3.3.2.3).

    *expiry* is in seconds, rounded up to whole ones: the wire has no fractions. *user* are the
    user properties, in order; names may repeat.

    Raises:
        PublishFailed: A text cannot be carried; nothing was sent.
    """
    parts: list[bytes] = []
    if expiry is not None:
        seconds = min(max(0, -int(-expiry // 1)), 0xFFFF_FFFF)
        parts.append(b"\x02" + seconds.to_bytes(4, "big"))
    if content_type is not None:
        parts.append(b"\x03" + _text(content_type, "the content type"))
    if response_topic is not None:
        parts.append(b"\x08" + _text(response_topic, "the response topic"))
    if correlation is not None:
        if len(correlation) > 65535:
            raise _bad_property("the correlation data", f"has {len(correlation)} bytes of 65535")
        parts.append(b"\x09" + len(correlation).to_bytes(2, "big") + correlation)
    for name, value in user:
        shown = name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}…"
        parts.append(
            b"\x26" + _text(name, f"the header name {shown!r}") + _text(value, f"header {shown!r}")
        )
    body = b"".join(parts)
    return encode_length(len(body)) + body


# --- decoding -------------------------------------------------------------------------


def malformed(what: str) -> ProtocolError:
    """Return the error for a packet that cannot be read."""
    return ProtocolError(f"the broker sent a malformed packet: {what}", reason=0x81)


def read_length(data: bytes, pos: int, stop: int) -> tuple[int, int]:
    """Return a variable byte integer and the position after it.

    Raises:
        ProtocolError: It is not complete before *stop*, or has more than four bytes.
    """
    value = 0
    for shift in (0, 7, 14, 21):
        if pos >= stop:
            raise malformed("it ends within a number")
        byte = data[pos]
        pos += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, pos
    raise malformed("a number of more than four bytes")


def read_data(
    data: bytes, pos: int, stop: int, malformed: Callable[[str], Exception] = malformed
) -> tuple[bytes, int]:
    """Return binary data with its length in front (section 1.5.6), and the position after it.

    Args:
        data: Where it stands.
        pos: Position of the length.
        stop: Where the packet ends.
        malformed: Makes what is raised when it reaches beyond that.
    """
    if pos + 2 > stop:
        raise malformed("it ends within a length")
    end = pos + 2 + (data[pos] << 8 | data[pos + 1])
    if end > stop:
        raise malformed("a field reaches beyond the packet")
    return data[pos + 2 : end], end


def read_text(
    data: bytes, pos: int, stop: int, malformed: Callable[[str], Exception] = malformed
) -> tuple[str, int]:
    """Return an MQTT string (section 1.5.4) and the position after it; see `read_data`."""
    raw, end = read_data(data, pos, stop, malformed)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise malformed("a text is not UTF-8") from None
    if "\0" in text:
        raise malformed("a text holds U+0000")
    return text, end


def read_publish_properties(data: bytes, pos: int, stop: int) -> PublishProperties:
    """Decode the properties between *pos* and *stop*; their length is already read."""
    expiry: int | None = None
    content_type: str | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    utf8 = False
    user: list[tuple[str, str]] = []
    subscriptions: list[int] = []
    while pos < stop:
        kind = data[pos]
        pos += 1
        if kind == 0x0B:
            number, pos = read_length(data, pos, stop)
            subscriptions.append(number)
        elif kind == 0x26:
            name, pos = read_text(data, pos, stop)
            value, pos = read_text(data, pos, stop)
            user.append((name, value))
            if len(user) > _MAX_USER_PROPERTIES:
                raise ProtocolError(
                    f"a message with more than {_MAX_USER_PROPERTIES} headers", reason=0x97
                )
        elif kind == 0x02:
            if pos + 4 > stop:
                raise malformed("it ends within the message expiry")
            expiry = int.from_bytes(data[pos : pos + 4], "big")
            pos += 4
        elif kind == 0x03:
            content_type, pos = read_text(data, pos, stop)
        elif kind == 0x01:
            if pos + 1 > stop:
                raise malformed("it ends within the payload format")
            utf8 = data[pos] == 1
            pos += 1
        elif kind == 0x08:
            response_topic, pos = read_text(data, pos, stop)
        elif kind == 0x09:
            correlation, pos = read_data(data, pos, stop)
        elif kind == 0x23:
            raise ProtocolError("a topic alias, which we did not allow", reason=0x94)
        else:
            raise malformed(f"property 0x{kind:02X} in a PUBLISH")
    return PublishProperties(
        expiry, content_type, tuple(user), tuple(subscriptions), response_topic, correlation, utf8
    )
