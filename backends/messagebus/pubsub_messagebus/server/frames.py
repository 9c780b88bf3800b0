"""The forms in which one data message reaches its subscribers, each made once."""

from __future__ import annotations

from pubsub_messagebus.protocol import (
    DataPacket,
    Dialect,
    Flag,
    MulticastData,
    UnicastData,
    encode_flag,
    encode_packets,
    encode_string,
)

__all__ = ["Frames"]


class Frames:
    """A message on its way out.

    A forwarded message is the publisher's user and host before the body as it came, so most
    subscribers share one frame that was never taken apart. Packets are decoded only when a
    subscriber has entitlements, and subscribers for whom the same packets pass share a frame.

    Args:
        kind: The type byte of the frames.
        head: User and host of the publisher, encoded.
    """

    __slots__ = ("_cached", "_dialect", "_front", "_message", "_packets", "_whole")

    def __init__(self, kind: int, head: bytes, message: MulticastData | UnicastData) -> None:
        self._message = message
        self._front = bytes((kind,)) + head
        self._dialect: Dialect = "is_image" if isinstance(message.flag, bool) else "content_type"
        self._whole: dict[Dialect, bytes] = {}
        self._cached: dict[tuple[Dialect, tuple[int, ...]], bytes] = {}
        self._packets: list[DataPacket] | None = None

    def whole(self, dialect: Dialect) -> bytes:
        """Return all packets, for a subscriber whose packets are not filtered."""
        frame = self._whole.get(dialect)
        if frame is None:
            message = self._message
            if dialect == self._dialect:
                frame = self._front + message.body
            else:
                frame = self._beginning(dialect) + message.body[message.at :]
            self._whole[dialect] = frame
        return frame

    def filtered(self, dialect: Dialect, held: frozenset[int]) -> bytes:
        """Return the packets whose entitlements are all *held*, maybe none.

        A packet without entitlements does not pass: on a feed that needs authorization,
        nothing is for everybody by default.
        """
        if self._packets is None:
            self._packets = self._message.data_packets or []
        passing = tuple(
            index
            for index, packet in enumerate(self._packets)
            if packet.entitlements is not None and packet.entitlements <= held
        )
        frame = self._cached.get((dialect, passing))
        if frame is None:
            packets = encode_packets([self._packets[index] for index in passing])
            frame = self._cached[dialect, passing] = self._beginning(dialect) + packets
        return frame

    def _beginning(self, dialect: Dialect) -> bytes:
        message = self._message
        if dialect == self._dialect:
            return self._front + message.body[: message.at]
        # Neither dialect has a field for the other's flag.
        flag: Flag = False if dialect == "is_image" else ""
        names = encode_string(message.feed) + encode_string(message.topic)
        identifier = message.client_id.bytes_le if isinstance(message, UnicastData) else b""
        return self._front + identifier + names + encode_flag(flag, dialect)
