"""The compatible primitives: each is read as it was written, and bytes are what they should be.

The SDK's own tests check a few of them so; these check all, and their edges.
"""

from __future__ import annotations

import asyncio
import struct
import uuid
from typing import Any

import pytest

from pubsub_messagebus.io import DataPacket, DataReader, DataWriter
from pubsub_messagebus.protocol import ProtocolError

IDENTIFIER = uuid.UUID("12345678-1234-5678-1234-567812345678")


class Kept:
    """A stream writer that keeps what is written."""

    def __init__(self) -> None:
        self.data = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        """There is always room."""

    def close(self) -> None:
        self.closed = True

    async def wait_closed(self) -> None:
        """It is closed at once."""


def reading(data: bytes) -> DataReader:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    return DataReader(stream)


PRIMITIVES: list[tuple[str, Any, bytes]] = [
    ("boolean", True, b"\x01"),
    ("boolean", False, b"\0"),
    ("byte", -128, b"\x80"),
    ("byte", 32, b"\x20"),
    ("unsigned_byte", 255, b"\xff"),
    ("short", -2, b"\xff\xfe"),
    ("unsigned_short", 65535, b"\xff\xff"),
    ("int", 42, b"\0\0\0\x2a"),
    ("int", -(2**31), b"\x80\0\0\0"),
    ("long", 2**40, b"\0\0\x01\0\0\0\0\0"),
    ("char", "é", b"\0\xe9"),
    ("float", 0.5, struct.pack(">f", 0.5)),
    ("double", 1 / 3, struct.pack(">d", 1 / 3)),
    ("string", "", b"\0\0\0\0"),
    ("string", "café", b"\0\0\0\x05caf\xc3\xa9"),
    ("byte_array", b"xyz", b"\0\0\0\x03xyz"),
    ("byte_array", None, b"\0\0\0\0"),
    ("uuid", IDENTIFIER, bytes.fromhex("78563412341278561234567812345678")),
    ("int_set", {7}, b"\0\0\0\x01\0\0\0\x07"),
    ("int_set", None, b"\0\0\0\0"),
    ("data_packet", DataPacket({7}, b"x"), b"\0\0\0\x01\0\0\0\x07\0\0\0\x01x"),
    (
        "data_packet_array",
        [DataPacket(None, b"x"), DataPacket(None, None)],
        b"\0\0\0\x02" + b"\0\0\0\0\0\0\0\x01x" + bytes(8),
    ),
    ("data_packet_array", None, b"\0\0\0\0"),
]


@pytest.mark.parametrize(("name", "value", "wire"), PRIMITIVES)
async def test_a_primitive_is_read_as_it_was_written(name: str, value: Any, wire: bytes) -> None:
    kept: Any = Kept()
    getattr(DataWriter(kept), f"write_{name}")(value)
    assert kept.data == wire
    reader = reading(wire)
    assert await getattr(reader, f"read_{name}")() == value
    with pytest.raises(asyncio.IncompleteReadError):
        await reader.read_byte()


async def test_all_of_them_in_one_stream() -> None:
    kept: Any = Kept()
    writer = DataWriter(kept)
    for name, value, _ in PRIMITIVES:
        getattr(writer, f"write_{name}")(value)
    await writer.drain()
    await writer.close()
    assert kept.closed
    reader = reading(kept.data)
    for name, value, _ in PRIMITIVES:
        assert await getattr(reader, f"read_{name}")() == value


@pytest.mark.parametrize("name", ["string", "byte_array", "int_set", "data_packet_array"])
async def test_a_length_above_its_limit_is_refused(name: str) -> None:
    for length in (-1, 2**31 - 1):
        with pytest.raises(ProtocolError, match="length"):
            await getattr(reading(struct.pack(">i", length)), f"read_{name}")()


async def test_other_encodings_and_nothing_at_all() -> None:
    kept: Any = Kept()
    writer = DataWriter(kept)
    writer.write_string("é", "latin-1")
    writer.write_string(None)
    reader = reading(kept.data)
    assert await reader.read_string("latin-1") == "é"
    assert await reader.read_nullable_string() is None
    with pytest.raises(ValueError, match="one character"):
        writer.write_char("ab")
