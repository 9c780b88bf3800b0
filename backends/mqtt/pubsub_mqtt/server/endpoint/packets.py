"""MQTT 3.1.1 and 3.1 packets as values, and back; no socket, clock or event loop.

`Decoder` takes bytes in any portions and returns whole packets; `encode` is its inverse. Both
know all packet types of both directions, so a server, a client and the tests can use them.

What a packet means, and whether its topic is good, is not decided here: some services take
topics that the standard forbids. A few checks can be switched off for them in `Leniency`.

Source: MQTT 3.1.1; section numbers in comments are its own. MQTT 3.1 differs only in the
protocol's name and level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from pubsub_mqtt.packets import encode_length, read_data, read_text

__all__ = [
    "MAX_LENGTH",
    "REFUSED",
    "STRICT",
    "ConnAck",
    "Connect",
    "Decoder",
    "Disconnect",
    "Leniency",
    "OtherProtocol",
    "Packet",
    "PacketError",
    "PacketTooLarge",
    "PingReq",
    "PingResp",
    "PubAck",
    "PubComp",
    "PubRec",
    "PubRel",
    "Publish",
    "SubAck",
    "Subscribe",
    "UnsubAck",
    "Unsubscribe",
    "WillMessage",
    "encode",
    "encode_publish",
]

MAX_LENGTH: Final = 268_435_455
"""Largest remaining length that four bytes can say (section 2.2.3)."""

REFUSED: Final = 0x80
"""Return code of a SUBACK for a filter that was refused."""


class PacketError(Exception):
    """The peer sent what MQTT does not allow; the connection must be closed (section 4.8)."""


class OtherProtocol(PacketError):
    """A CONNECT that names neither MQTT nor its predecessor."""


class PacketTooLarge(PacketError):
    """The header of a packet says more bytes than are allowed; nothing of it was kept."""


# --- packets ---------------------------------------------------------------------------


class WillMessage(msgspec.Struct, frozen=True):
    """What the server publishes when the connection ends."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False

    def __repr__(self) -> str:  # topics hold keys in some dialects
        return f"WillMessage({len(self.payload)} bytes, qos={self.qos})"


class Connect(msgspec.Struct, frozen=True):
    """CONNECT.

    Attributes:
        protocol: ``MQTT``, or ``MQIsdp`` in version 3.1.
        level: 4, or 3 in version 3.1.
        keepalive: Seconds, 0 for none.
    """

    client_id: str
    username: str | None = None
    password: bytes | None = None
    keepalive: int = 0
    clean_session: bool = True
    will: WillMessage | None = None
    protocol: str = "MQTT"
    level: int = 4

    def __repr__(self) -> str:  # without the password
        return f"Connect({self.client_id!r}, {self.username!r}, level={self.level})"


class ConnAck(msgspec.Struct, frozen=True):
    """CONNACK; codes are those of section 3.2.2.3."""

    code: int = 0
    session_present: bool = False


class Publish(msgspec.Struct, frozen=True, gc=False):
    """PUBLISH, in both directions. *packet_id* is 0 at QoS 0."""

    topic: str
    payload: bytes = b""
    qos: int = 0
    retain: bool = False
    duplicate: bool = False
    packet_id: int = 0

    def __repr__(self) -> str:  # topics hold keys in some dialects
        return f"Publish({len(self.payload)} bytes, qos={self.qos}, packet_id={self.packet_id})"


class PubAck(msgspec.Struct, frozen=True, gc=False):
    """PUBACK."""

    packet_id: int


class PubRec(msgspec.Struct, frozen=True, gc=False):
    """PUBREC."""

    packet_id: int


class PubRel(msgspec.Struct, frozen=True, gc=False):
    """PUBREL."""

    packet_id: int


class PubComp(msgspec.Struct, frozen=True, gc=False):
    """PUBCOMP."""

    packet_id: int


class Subscribe(msgspec.Struct, frozen=True):
    """SUBSCRIBE: filters with the quality of service asked for."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]


class SubAck(msgspec.Struct, frozen=True):
    """SUBACK: for each filter the quality of service granted, or `REFUSED`."""

    packet_id: int
    codes: tuple[int, ...]


class Unsubscribe(msgspec.Struct, frozen=True):
    """UNSUBSCRIBE."""

    packet_id: int
    filters: tuple[str, ...]


class UnsubAck(msgspec.Struct, frozen=True, gc=False):
    """UNSUBACK."""

    packet_id: int


class PingReq(msgspec.Struct, frozen=True, gc=False):
    """PINGREQ."""


class PingResp(msgspec.Struct, frozen=True, gc=False):
    """PINGRESP."""


class Disconnect(msgspec.Struct, frozen=True, gc=False):
    """DISCONNECT."""


Packet: TypeAlias = (
    Connect
    | ConnAck
    | Publish
    | PubAck
    | PubRec
    | PubRel
    | PubComp
    | Subscribe
    | SubAck
    | Unsubscribe
    | UnsubAck
    | PingReq
    | PingResp
    | Disconnect
)


@dataclass(frozen=True, slots=True)
class Leniency:
    """Deviations from the standard that a service forgives.

    Attributes:
        subscribe_flags: Any flags in the first byte of SUBSCRIBE and UNSUBSCRIBE.
        names: Any text as a topic or filter; the service answers itself for what is wrong.
    """

    subscribe_flags: bool = False
    names: bool = False


STRICT: Final = Leniency()


# --- decoding --------------------------------------------------------------------------


class Decoder:
    """Bytes in, packets out. After a `PacketError` it stays broken.

    Attributes:
        limit: Largest remaining length accepted. A longer packet is refused when its header
            is there, before any of its body is kept. May be changed between packets.
    """

    __slots__ = ("_at", "_broken", "_data", "_heads", "_need", "_rest", "limit")

    def __init__(self, limit: int = MAX_LENGTH, *, leniency: Leniency = STRICT) -> None:
        self.limit = limit
        self._heads = _LENIENT_HEADS if leniency.subscribe_flags else _HEADS
        self._data = b""
        self._at = 0
        # A packet that has arrived in part, and how many bytes of it there must be before
        # looking again: many small pieces of a large packet cost what one piece does.
        self._rest = bytearray()
        self._need = 0
        self._broken: PacketError | None = None

    def receive(self, data: bytes) -> None:
        """Take what arrived. Call `next_packet` until it returns None before the next call."""
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < self._need:
                return
            data = bytes(rest)
            rest.clear()
        self._data = data
        self._at = 0

    @property
    def buffered(self) -> int:
        """How many bytes of an unfinished packet are kept."""
        return len(self._rest)

    def next_packet(self) -> Packet | None:
        """Return the next packet, or None until more data arrives.

        Raises:
            PacketError: The bytes are no packet. Those before were returned already; every
                later call raises again.
        """
        if self._broken is not None:
            raise self._broken
        data, start = self._data, self._at
        size = len(data)
        if start >= size:
            return None
        # A first byte that no packet has is refused at once: the rest may never come.
        head = data[start]
        if head & 0xF0 != 0x30 and head not in self._heads:
            raise self._break(f"packet type {head >> 4} with flags {head & 15}")
        # The remaining length: one to four bytes (section 2.2.3).
        length = shift = 0
        at = start + 1
        while True:
            if at >= size:
                self._keep(start, size - start + 1)
                return None
            byte = data[at]
            at += 1
            length |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if shift > 21:
                raise self._break("a remaining length of five bytes")
        if length > self.limit:
            raise self._break(
                f"a packet of {length} bytes; {self.limit} are allowed", PacketTooLarge
            )
        end = at + length
        if end > size:
            self._keep(start, end - start)
            return None
        self._at = end
        try:
            if head & 0xF0 == 0x30:
                return _read_publish(head & 15, data, at, end)
            return _READERS[head >> 4](data, at, end)
        except PacketError as exc:
            self._broken = exc
            self._data = b""
            raise

    def _keep(self, start: int, need: int) -> None:
        self._rest += self._data[start:]
        self._need = need
        self._data = b""
        self._at = 0

    def _break(self, what: str, kind: type[PacketError] = PacketError) -> PacketError:
        self._broken = kind(what)
        self._data = b""
        return self._broken


def _read_publish(flags: int, data: bytes, at: int, end: int) -> Publish:
    qos = flags >> 1 & 3
    if at + 2 > end:
        raise PacketError("a PUBLISH that ends within its topic")
    body = at + 2 + (data[at] << 8 | data[at + 1])
    if body > end:
        raise PacketError("a PUBLISH whose topic reaches beyond it")
    try:
        topic = data[at + 2 : body].decode()
    except UnicodeDecodeError:
        raise PacketError("a topic that is not UTF-8") from None
    if "\0" in topic:
        raise PacketError("a topic with U+0000")
    if not qos:
        if flags & 8:
            raise PacketError("a PUBLISH with DUP at QoS 0")
        return Publish(topic, data[body:end], 0, bool(flags & 1))
    if qos == 3:
        raise PacketError("a PUBLISH with QoS 3")
    packet_id, body = _read_id(data, body, end)
    return Publish(topic, data[body:end], qos, bool(flags & 1), bool(flags & 8), packet_id)


def _read_id(data: bytes, at: int, end: int) -> tuple[int, int]:
    if at + 2 > end:
        raise PacketError("a packet that ends within its identifier")
    value = data[at] << 8 | data[at + 1]
    if not value:
        raise PacketError("packet identifier 0")
    return value, at + 2


def _read_text(data: bytes, at: int, end: int) -> tuple[str, int]:
    return read_text(data, at, end, PacketError)


def _complete(at: int, end: int) -> None:
    if at != end:
        raise PacketError(f"{end - at} bytes more than the packet says")


def _read_connect(data: bytes, at: int, end: int) -> Connect:
    protocol, at = _read_text(data, at, end)
    if at + 4 > end:
        raise PacketError("a CONNECT that ends within its header")
    level, flags = data[at], data[at + 1]
    keepalive = data[at + 2] << 8 | data[at + 3]
    at += 4
    if protocol not in ("MQTT", "MQIsdp"):
        raise OtherProtocol("a CONNECT of another protocol")
    if level not in (3, 4):
        # What follows is laid out otherwise in other versions: do not read on.
        return Connect("", protocol=protocol, level=level, keepalive=keepalive)
    if flags & 1:
        raise PacketError("a CONNECT with its reserved flag")
    client_id, at = _read_text(data, at, end)
    will: WillMessage | None = None
    qos = flags >> 3 & 3
    if flags & 4:
        if qos == 3:
            raise PacketError("a will with QoS 3")
        topic, at = _read_text(data, at, end)
        payload, at = read_data(data, at, end, PacketError)
        will = WillMessage(topic, payload, qos, bool(flags & 0x20))
    elif flags & 0x38:
        raise PacketError("a CONNECT with flags of a will it does not have")
    username: str | None = None
    password: bytes | None = None
    if flags & 0x80:
        username, at = _read_text(data, at, end)
    if flags & 0x40:
        if username is None and level == 4:
            raise PacketError("a password without a user name")
        password, at = read_data(data, at, end, PacketError)
    _complete(at, end)
    return Connect(client_id, username, password, keepalive, bool(flags & 2), will, protocol, level)


def _read_connack(data: bytes, at: int, end: int) -> ConnAck:
    _complete(at + 2, end)
    if data[at] > 1:
        raise PacketError("a CONNACK with reserved flags")
    return ConnAck(data[at + 1], bool(data[at]))


def _read_subscribe(data: bytes, at: int, end: int) -> Subscribe:
    packet_id, at = _read_id(data, at, end)
    filters: list[tuple[str, int]] = []
    while at < end:
        text, at = _read_text(data, at, end)
        if at >= end or data[at] > 2:
            raise PacketError("a SUBSCRIBE with a quality of service that does not exist")
        filters.append((text, data[at]))
        at += 1
    if not filters:
        raise PacketError("a SUBSCRIBE without filters")
    return Subscribe(packet_id, tuple(filters))


def _read_suback(data: bytes, at: int, end: int) -> SubAck:
    packet_id, at = _read_id(data, at, end)
    codes = tuple(data[at:end])
    if not codes or any(code > 2 and code != REFUSED for code in codes):
        raise PacketError("a SUBACK with codes that do not exist")
    return SubAck(packet_id, codes)


def _read_unsubscribe(data: bytes, at: int, end: int) -> Unsubscribe:
    packet_id, at = _read_id(data, at, end)
    filters: list[str] = []
    while at < end:
        text, at = _read_text(data, at, end)
        filters.append(text)
    if not filters:
        raise PacketError("an UNSUBSCRIBE without filters")
    return Unsubscribe(packet_id, tuple(filters))


_Reader: TypeAlias = Callable[[bytes, int, int], Packet]


def _id_only(make: Callable[[int], Packet]) -> _Reader:
    def read(data: bytes, at: int, end: int) -> Packet:
        packet_id, at = _read_id(data, at, end)
        _complete(at, end)
        return make(packet_id)

    return read


def _empty(packet: Packet) -> _Reader:
    def read(data: bytes, at: int, end: int) -> Packet:
        _complete(at, end)
        return packet

    return read


_PINGREQ: Final = PingReq()
_PINGRESP: Final = PingResp()
_DISCONNECT: Final = Disconnect()

_READERS: Final[Mapping[int, _Reader]] = {
    1: _read_connect,
    2: _read_connack,
    4: _id_only(PubAck),
    5: _id_only(PubRec),
    6: _id_only(PubRel),
    7: _id_only(PubComp),
    8: _read_subscribe,
    9: _read_suback,
    10: _read_unsubscribe,
    11: _id_only(UnsubAck),
    12: _empty(_PINGREQ),
    13: _empty(_PINGRESP),
    14: _empty(_DISCONNECT),
}
# First bytes of all packets but PUBLISH, whose flags differ (section 2.2.2).
_HEADS: Final = frozenset(kind << 4 | (2 if kind in (6, 8, 10) else 0) for kind in _READERS)
_LENIENT_HEADS: Final = _HEADS | set(range(0x80, 0x90)) | set(range(0xA0, 0xB0))


# --- encoding --------------------------------------------------------------------------


def encode(packet: Packet) -> bytes:
    """Return the bytes of *packet*.

    Raises:
        ValueError: A text is too long, or the packet is.
    """
    match packet:
        case Publish():
            return encode_publish(
                packet.topic,
                packet.payload,
                qos=packet.qos,
                retain=packet.retain,
                duplicate=packet.duplicate,
                packet_id=packet.packet_id,
            )
        case PubAck(packet_id):
            return b"\x40\x02" + packet_id.to_bytes(2, "big")
        case PubRec(packet_id):
            return b"\x50\x02" + packet_id.to_bytes(2, "big")
        case PubRel(packet_id):
            return b"\x62\x02" + packet_id.to_bytes(2, "big")
        case PubComp(packet_id):
            return b"\x70\x02" + packet_id.to_bytes(2, "big")
        case SubAck(packet_id, codes):
            return _frame(0x90, packet_id.to_bytes(2, "big") + bytes(codes))
        case UnsubAck(packet_id):
            return b"\xb0\x02" + packet_id.to_bytes(2, "big")
        case PingReq():
            return b"\xc0\x00"
        case PingResp():
            return b"\xd0\x00"
        case Disconnect():
            return b"\xe0\x00"
        case ConnAck(code, session_present):
            return bytes((0x20, 2, session_present, code))
        case Subscribe(packet_id, filters):
            body = b"".join(_text(text) + bytes((qos,)) for text, qos in filters)
            return _frame(0x82, packet_id.to_bytes(2, "big") + body)
        case Unsubscribe(packet_id, names):
            return _frame(0xA2, packet_id.to_bytes(2, "big") + b"".join(map(_text, names)))
        case Connect():
            return _encode_connect(packet)


def encode_publish(
    topic: str,
    payload: bytes,
    *,
    qos: int = 0,
    retain: bool = False,
    duplicate: bool = False,
    packet_id: int = 0,
) -> bytes:
    """Return the bytes of a PUBLISH; the same ones can be sent to many."""
    head = 0x30 | duplicate << 3 | qos << 1 | retain
    name = topic.encode()
    size = len(name)
    if size > 65535:
        raise ValueError(f"a topic of {size} bytes; MQTT carries 65535")
    if qos:
        return _frame(
            head, b"".join((size.to_bytes(2, "big"), name, packet_id.to_bytes(2, "big"), payload))
        )
    length = 2 + size + len(payload)
    if length < 128:
        return bytes((head, length, 0, size)) + name + payload
    return b"".join((bytes((head,)), _length(length), size.to_bytes(2, "big"), name, payload))


def _encode_connect(packet: Connect) -> bytes:
    flags = packet.clean_session << 1
    parts = [_text(packet.client_id)]
    if packet.will is not None:
        flags |= 4 | packet.will.qos << 3 | packet.will.retain << 5
        parts += [_text(packet.will.topic), _data(packet.will.payload)]
    if packet.username is not None:
        flags |= 0x80
        parts.append(_text(packet.username))
    if packet.password is not None:
        flags |= 0x40
        parts.append(_data(packet.password))
    head = bytes((packet.level, flags)) + packet.keepalive.to_bytes(2, "big")
    return _frame(0x10, _text(packet.protocol) + head + b"".join(parts))


def _text(text: str) -> bytes:
    return _data(text.encode())


def _data(data: bytes) -> bytes:
    if len(data) > 65535:
        raise ValueError(f"a field of {len(data)} bytes; MQTT carries 65535")
    return len(data).to_bytes(2, "big") + data


def _frame(head: int, body: bytes) -> bytes:
    return bytes((head,)) + _length(len(body)) + body


def _length(value: int) -> bytes:
    if value > MAX_LENGTH:
        raise ValueError(f"a packet of {value} bytes; MQTT carries {MAX_LENGTH}")
    return encode_length(value)
