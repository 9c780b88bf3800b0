"""Bytes in, messages out: the receiving half of both roles, with no socket in it.

`Decoder` keeps its place inside a message between calls, down to the packet, so a large
message that arrives in small pieces costs linear time. It finds the end of a data message and
its names without building the packets; `decode_packets` builds them when they are needed.
A server forwards the body as it came.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, TypeAlias
from uuid import UUID

import msgspec

from .encoding import (
    DEFAULT_LIMITS,
    DataPacket,
    Dialect,
    Flag,
    MessageType,
    ProtocolError,
    Truncated,
    WireLimits,
    decode_packets,
    encode_flag,
    encode_packets,
    encode_string,
    unpack_int,
)

__all__ = [
    "AuthorizationRequest",
    "AuthorizationResponse",
    "Decoder",
    "ForwardedMulticastData",
    "ForwardedSubscriptionRequest",
    "ForwardedUnicastData",
    "LengthUnit",
    "Message",
    "MulticastData",
    "NotificationRequest",
    "Side",
    "SubscriptionRequest",
    "UnicastData",
    "codepoints_end",
]

Side: TypeAlias = Literal["client", "server"]
LengthUnit: TypeAlias = Literal["bytes", "codepoints"]


class MulticastData(msgspec.Struct, frozen=True, gc=False):
    """Data for every subscriber of (*feed*, *topic*).

    Attributes:
        body: Everything after the type byte, in normal form.
        at: Where the packets begin in *body*.
        entitled: Whether any packet has entitlements.
    """

    feed: str
    topic: str
    flag: Flag
    body: bytes
    at: int
    entitled: bool

    @property
    def data_packets(self) -> list[DataPacket] | None:
        """The packets, decoded at each access."""
        return decode_packets(self.body, self.at)


class UnicastData(msgspec.Struct, frozen=True, gc=False):
    """Data for one subscriber; *body*, *at* and *entitled* as in `MulticastData`."""

    client_id: UUID
    feed: str
    topic: str
    flag: Flag
    body: bytes
    at: int
    entitled: bool

    @property
    def data_packets(self) -> list[DataPacket] | None:
        """The packets, decoded at each access."""
        return decode_packets(self.body, self.at)


class ForwardedSubscriptionRequest(msgspec.Struct, frozen=True, gc=False):
    """Somebody subscribed, or unsubscribed."""

    user: str
    host: str
    client_id: UUID
    feed: str
    topic: str
    is_add: bool


class NotificationRequest(msgspec.Struct, frozen=True, gc=False):
    """Start or stop being told of subscriptions to *feed*."""

    feed: str
    is_add: bool


class SubscriptionRequest(msgspec.Struct, frozen=True, gc=False):
    """Add or take away one subscription to (*feed*, *topic*)."""

    feed: str
    topic: str
    is_add: bool


class AuthorizationRequest(msgspec.Struct, frozen=True, gc=False):
    """Asks an authorizer what this client may see."""

    client_id: UUID
    host: str
    user: str
    feed: str
    topic: str


class AuthorizationResponse(msgspec.Struct, frozen=True, gc=False):
    """Answers what a client may see; entitlements required and none given is a denial."""

    client_id: UUID
    feed: str
    topic: str
    is_authorization_required: bool
    entitlements: frozenset[int] | None


class ForwardedMulticastData(msgspec.Struct, frozen=True, gc=False):
    """Data that *user* on *host* published; both are empty in a server's notice."""

    user: str
    host: str
    feed: str
    topic: str
    flag: Flag
    body: bytes
    at: int

    @property
    def data_packets(self) -> list[DataPacket] | None:
        """The packets, decoded at each access."""
        return decode_packets(self.body, self.at)


class ForwardedUnicastData(msgspec.Struct, frozen=True, gc=False):
    """Data that *user* on *host* sent to the client *client_id*."""

    user: str
    host: str
    client_id: UUID
    feed: str
    topic: str
    flag: Flag
    body: bytes
    at: int

    @property
    def data_packets(self) -> list[DataPacket] | None:
        """The packets, decoded at each access."""
        return decode_packets(self.body, self.at)


Message: TypeAlias = (
    MulticastData
    | UnicastData
    | ForwardedSubscriptionRequest
    | NotificationRequest
    | SubscriptionRequest
    | AuthorizationRequest
    | AuthorizationResponse
    | ForwardedMulticastData
    | ForwardedUnicastData
)

# The fields by type: string, uuid, boolean, flag, packets, entitlements.
_STRING, _UUID, _BOOL, _FLAG, _PACKETS, _INTS = range(6)
_LAYOUTS: tuple[tuple[int, ...], ...] = (
    (),
    (_STRING, _STRING, _FLAG, _PACKETS),
    (_UUID, _STRING, _STRING, _FLAG, _PACKETS),
    (_STRING, _STRING, _UUID, _STRING, _STRING, _BOOL),
    (_STRING, _BOOL),
    (_STRING, _STRING, _BOOL),
    (_UUID, _STRING, _STRING, _STRING, _STRING),
    (_UUID, _STRING, _STRING, _BOOL, _INTS),
    (_STRING, _STRING, _STRING, _STRING, _FLAG, _PACKETS),
    (_STRING, _STRING, _UUID, _STRING, _STRING, _FLAG, _PACKETS),
)
_PLAIN: dict[int, Any] = {
    3: ForwardedSubscriptionRequest,
    4: NotificationRequest,
    5: SubscriptionRequest,
    6: AuthorizationRequest,
    7: AuthorizationResponse,
}
_FORWARDED: dict[int, Any] = {8: ForwardedMulticastData, 9: ForwardedUnicastData}
_TO_CLIENT = frozenset({3, 6, 8, 9})

_HINT = (
    "is the sender a Python package up to 6.0.0a1? They count the characters of a name instead "
    "of its bytes"
)


def codepoints_end(buffer: bytes | bytearray, at: int, count: int) -> tuple[int, int]:
    """Return where *count* characters end, and how many could not be seen yet."""
    end = len(buffer)
    while count and at < end:
        lead = buffer[at]
        at += 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        count -= 1
    return at, count


class Decoder:
    """Decodes one direction of one connection, after the handshake.

    There is no frame length, so it reads field by field after `_LAYOUTS`. It keeps its place
    between calls: field, position, packets left. Every length is checked before it is waited
    for, so a stream that lost its step ends soon and takes no memory.

    One loop over a layout and no function per field: every message of a server passes here.

    Args:
        side: Who we are. A client refuses messages that only a server may receive. A server
            returns those that only a client may receive, so that it can log and ignore them.
        string_length_unit: ``codepoints`` reads the streams of Python packages up to 6.0.0a1,
            which count characters; then nobody else can be read.

    Attributes:
        received: Messages returned so far.
    """

    def __init__(
        self,
        side: Side,
        *,
        dialect: Dialect = "is_image",
        limits: WireLimits = DEFAULT_LIMITS,
        string_length_unit: LengthUnit = "bytes",
    ) -> None:
        self._client = side == "client"
        self._string_flag = dialect == "content_type"
        self._dialect: Dialect = dialect
        self._limits = limits
        self._codepoints = string_length_unit == "codepoints"
        self._buffer: bytes | bytearray = b""
        self._eof = False
        self._error: ProtocolError | None = None
        # The place of the current message: its start, how far it was read, and how long the
        # buffer must be before reading on makes sense. A decoder that starts each message over
        # is quadratic when a large one arrives in small pieces.
        self._start = 0
        self._at = 0
        self._need = 1
        self._kind = 0
        self._field = 0
        self._values: list[Any] = []
        self._packets_at = 0
        self._left: int = -1
        self._odd = False
        self._entitled = False
        self.received = 0

    @property
    def inside(self) -> bool:
        """Whether the last message is incomplete."""
        return len(self._buffer) > self._start

    def feed(self, data: bytes) -> None:
        """Store bytes."""
        if self._start >= len(self._buffer):
            # The usual case: nothing is left over, and the bytes need no copy.
            self._buffer = data
            self._start = self._at = 0
            self._need = 1
        elif isinstance(self._buffer, bytearray) and not self._start:
            self._buffer += data
        else:
            self._rebase()
            rest = bytearray(self._buffer)
            rest += data
            self._buffer = rest

    def eof(self) -> None:
        """Learn that nothing more will come."""
        self._eof = True

    def next_message(self) -> Message | None:
        """Return the next complete message, or None until more data arrives.

        Raises:
            ProtocolError: The peer broke the protocol. Messages before the bad bytes were
                returned already; every later call raises again.
            Truncated: After `eof`, when the stream ended inside a message.
        """
        if self._error is not None:
            raise self._error.again()
        if len(self._buffer) >= self._need:
            try:
                message = self._scan()
            except ProtocolError as error:
                self._error = error.again()
                raise
            if message is not None:
                self.received += 1
                return message
        if self._eof and self.inside:
            self._error = Truncated(
                f"the stream ended inside a message, after {len(self._buffer) - self._start} bytes"
            )
            raise self._error.again()
        return None

    def _rebase(self) -> None:
        start = self._start
        if start:
            self._buffer = self._buffer[start:]
            self._at -= start
            self._need -= start
            self._packets_at -= start
            self._start = 0

    def _scan(self) -> Message | None:
        """Read fields until the message is complete or the buffer is at its end.

        The place is kept in locals, and written back only when a message is incomplete.
        """
        buffer = self._buffer
        end = len(buffer)
        kind = self._kind
        at = self._at
        if not kind:
            at = self._start
            if at >= end:
                return None
            kind = buffer[at]
            if not 1 <= kind <= 9:
                raise ProtocolError(f"message type {kind}; expected 1 to 9")
            if self._client and kind not in _TO_CLIENT:
                raise ProtocolError(
                    f"message type {kind} ({MessageType(kind).name}), which only a server receives"
                )
            self._kind = kind
            self._field = 0
            self._values = []
            self._left = -1
            self._odd = self._entitled = False
            at += 1
        layout = _LAYOUTS[kind]
        values = self._values
        field = self._field
        need = 0
        limit = self._limits.string
        count = len(layout)
        while field < count:
            code = layout[field]
            if code == _STRING or (code == _FLAG and self._string_flag):
                if at + 4 > end:
                    need = at + 4
                    break
                (size,) = unpack_int(buffer, at)
                if not 0 <= size <= limit:
                    raise _bad_length("a string", size, limit)
                stop = at + 4 + size
                if self._codepoints:
                    stop, missing = codepoints_end(buffer, at + 4, size)
                    if missing or stop > end:
                        need = max(stop + missing, end + 1)
                        break
                elif stop > end:
                    need = stop
                    break
                try:
                    values.append(str(buffer[at + 4 : stop], "utf-8"))
                except UnicodeDecodeError:
                    raise ProtocolError(f"a name is not UTF-8; {_HINT}") from None
                at = stop
            elif code == _PACKETS:
                if self._left < 0:
                    if at + 4 > end:
                        need = at + 4
                        break
                    left: int = unpack_int(buffer, at)[0]
                    if not 0 <= left <= self._limits.packets:
                        raise _bad_length("a list of packets", left, self._limits.packets)
                    self._left = left
                    self._packets_at = at
                    at += 4
                at, need = self._skip_packets(buffer, at, end)
                if need:
                    break
            elif code in (_BOOL, _FLAG):
                if at >= end:
                    need = at + 1
                    break
                byte = buffer[at]
                if byte > 1:
                    # True for every reader, but a body that is forwarded has 0 or 1.
                    self._odd = True
                values.append(byte != 0)
                at += 1
            elif code == _UUID:
                if at + 16 > end:
                    need = at + 16
                    break
                values.append(UUID(bytes_le=bytes(buffer[at : at + 16])))
                at += 16
            else:
                if at + 4 > end:
                    need = at + 4
                    break
                (size,) = unpack_int(buffer, at)
                if not 0 <= size <= self._limits.entitlements:
                    raise _bad_length("a set of entitlements", size, self._limits.entitlements)
                stop = at + 4 + 4 * size
                if stop > end:
                    need = stop
                    break
                numbers = struct.unpack_from(f">{size}i", buffer, at + 4)
                values.append(frozenset(numbers) if numbers else None)
                at = stop
            field += 1
        if need:
            self._at = at
            self._field = field
            self._need = need
            return None
        start = self._start
        self._start = at
        self._kind = 0
        self._need = at + 1
        return self._make(kind, values, buffer, start + 1, at)

    def _skip_packets(self, buffer: bytes | bytearray, at: int, end: int) -> tuple[int, int]:
        """Skip the packets; return the position, and the buffer length needed to go on."""
        limits = self._limits
        start = self._start
        left = self._left
        while left:
            if at + 4 > end:
                self._left = left
                return at, at + 4
            (entitled,) = unpack_int(buffer, at)
            size_at = at + 4
            if entitled:
                if not 0 <= entitled <= limits.entitlements:
                    raise _bad_length("a set of entitlements", entitled, limits.entitlements)
                size_at += 4 * entitled
            if size_at + 4 > end:
                self._left = left
                return at, size_at + 4
            (size,) = unpack_int(buffer, size_at)
            if not 0 <= size <= limits.data:
                raise _bad_length("a data packet", size, limits.data)
            stop = size_at + 4 + size
            if stop - start > limits.message:
                raise ProtocolError(
                    f"a message of more than {stop - start - 1} bytes; the most is {limits.message}"
                )
            if stop > end:
                self._left = left
                return at, stop
            if entitled:
                self._entitled = True
                if entitled > 1:
                    numbers = struct.unpack_from(f">{entitled}i", buffer, at + 4)
                    if len(set(numbers)) != entitled:
                        self._odd = True
            at = stop
            left -= 1
        self._left = 0
        return at, 0

    def _make(
        self, kind: int, values: list[Any], buffer: bytes | bytearray, start: int, stop: int
    ) -> Message:
        if kind in (3, 4, 5, 6, 7):
            plain: Message = _PLAIN[kind](*values)
            return plain
        names = len(values) - 1
        body, at = self._body(values[:names], values[names], buffer, start, stop)
        if kind == 1:
            return MulticastData(values[0], values[1], values[2], body, at, self._entitled)
        if kind == 2:
            client_id, feed, topic, flag = values
            return UnicastData(client_id, feed, topic, flag, body, at, self._entitled)
        forwarded: Message = _FORWARDED[kind](*values, body, at)
        return forwarded

    def _body(
        self, head: list[Any], flag: Flag, buffer: bytes | bytearray, start: int, stop: int
    ) -> tuple[bytes, int]:
        """Return the fields as bytes, in normal form, and where the packets begin in them."""
        at = self._packets_at - start
        body = bytes(buffer[start:stop])
        if not self._odd and not self._codepoints:
            return body, at
        # Rare: a boolean above 1, a repeated entitlement, lengths in characters.
        parts = [
            value.bytes_le if isinstance(value, UUID) else encode_string(value) for value in head
        ]
        parts.append(encode_flag(flag, self._dialect))
        beginning = b"".join(parts)
        packets = encode_packets(decode_packets(body, at))
        return beginning + packets, len(beginning)


def _bad_length(what: str, size: int, limit: int) -> ProtocolError:
    if size < 0:
        return ProtocolError(f"{what} of length {size}")
    return ProtocolError(f"{what} of length {size}; the most is {limit}; or {_HINT}")
