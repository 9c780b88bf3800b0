"""Reading and writing primitives on asyncio streams, as ``jetblack_messagebus.io``.

For authenticators and tools that were written against that package. The client itself does
not read through these: it decodes whole chunks.
"""

from __future__ import annotations

import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from .protocol import (
    DEFAULT_LIMITS,
    DataPacket,
    ProtocolError,
    encode_int_set,
    encode_packets,
    encode_string,
)

__all__ = ["DataPacket", "DataReader", "DataWriter"]


class DataReader:
    """Reads primitives, all big-endian.

    Attributes:
        reader: The stream.
    """

    def __init__(self, reader: StreamReader) -> None:
        self.reader = reader

    async def _read(self, layout: str) -> Any:
        data = await self.reader.readexactly(struct.calcsize(layout))
        return struct.unpack(layout, data)[0]

    async def _length(self, limit: int) -> int:
        length = await self.read_int()
        if not 0 <= length <= limit:
            raise ProtocolError(f"a length of {length}; the most is {limit}")
        return length

    async def read_boolean(self) -> bool:
        """Read one byte; anything but zero is true."""
        return bool(await self._read("?"))

    async def read_byte(self) -> int:
        """Read a signed byte."""
        return int(await self._read("b"))

    async def read_unsigned_byte(self) -> int:
        """Read an unsigned byte."""
        return int(await self._read("B"))

    async def read_short(self) -> int:
        """Read 2 bytes."""
        return int(await self._read(">h"))

    async def read_unsigned_short(self) -> int:
        """Read 2 bytes, unsigned."""
        return int(await self._read(">H"))

    async def read_int(self) -> int:
        """Read 4 bytes."""
        return int(await self._read(">i"))

    async def read_long(self) -> int:
        """Read 8 bytes."""
        return int(await self._read(">q"))

    async def read_char(self) -> str:
        """Read 2 bytes of UTF-16."""
        return (await self.reader.readexactly(2)).decode("utf-16-be")

    async def read_float(self) -> float:
        """Read 4 bytes."""
        return float(await self._read(">f"))

    async def read_double(self) -> float:
        """Read 8 bytes."""
        return float(await self._read(">d"))

    async def read_string(self, encoding: str = "utf-8") -> str:
        """Read a length in bytes and as many of them."""
        length = await self._length(DEFAULT_LIMITS.string)
        return (await self.reader.readexactly(length)).decode(encoding)

    async def read_nullable_string(self, encoding: str = "utf-8") -> str | None:
        """Read a string; an empty one is None."""
        return await self.read_string(encoding) or None

    async def read_byte_array(self) -> bytes | None:
        """Read a length and as many bytes; none at all is None."""
        length = await self._length(DEFAULT_LIMITS.data)
        return await self.reader.readexactly(length) if length else None

    async def read_uuid(self) -> UUID:
        """Read 16 bytes in .NET's order."""
        return UUID(bytes_le=await self.reader.readexactly(16))

    async def read_int_set(self) -> set[int] | None:
        """Read a count and as many numbers; none at all is None."""
        count = await self._length(DEFAULT_LIMITS.entitlements)
        if not count:
            return None
        return set(struct.unpack(f">{count}i", await self.reader.readexactly(4 * count)))

    async def read_data_packet(self) -> DataPacket:
        """Read entitlements and data."""
        entitlements = await self.read_int_set()
        return DataPacket(entitlements, await self.read_byte_array())

    async def read_data_packet_array(self) -> list[DataPacket] | None:
        """Read a count and as many packets; none at all is None."""
        count = await self._length(DEFAULT_LIMITS.packets)
        if not count:
            return None
        return [await self.read_data_packet() for _ in range(count)]


class DataWriter:
    """Writes primitives, all big-endian; `drain` waits until the peer has room.

    Attributes:
        writer: The stream.
    """

    def __init__(self, writer: StreamWriter) -> None:
        self.writer = writer

    def write_boolean(self, val: object) -> None:
        """Write one byte, 0 or 1."""
        self.writer.write(b"\x01" if val else b"\0")

    def write_byte(self, val: int) -> None:
        """Write a signed byte."""
        self.writer.write(struct.pack("b", val))

    def write_unsigned_byte(self, val: int) -> None:
        """Write an unsigned byte."""
        self.writer.write(struct.pack("B", val))

    def write_short(self, val: int) -> None:
        """Write 2 bytes."""
        self.writer.write(struct.pack(">h", val))

    def write_unsigned_short(self, val: int) -> None:
        """Write 2 bytes, unsigned."""
        self.writer.write(struct.pack(">H", val))

    def write_int(self, val: int) -> None:
        """Write 4 bytes."""
        self.writer.write(struct.pack(">i", val))

    def write_long(self, val: int) -> None:
        """Write 8 bytes."""
        self.writer.write(struct.pack(">q", val))

    def write_float(self, val: float) -> None:
        """Write 4 bytes."""
        self.writer.write(struct.pack(">f", val))

    def write_double(self, val: float) -> None:
        """Write 8 bytes."""
        self.writer.write(struct.pack(">d", val))

    def write_char(self, val: str) -> None:
        """Write 2 bytes of UTF-16."""
        data = val.encode("utf-16-be")
        if len(data) != 2:
            raise ValueError(f"{val!r} is not one character of 2 bytes")
        self.writer.write(data)

    def write_string(self, val: str | None, encoding: str = "utf-8") -> None:
        """Write the length in bytes and the text; None is empty."""
        if val is None or encoding == "utf-8":
            self.writer.write(encode_string(val))
        else:
            data = val.encode(encoding)
            self.writer.write(struct.pack(">i", len(data)) + data)

    def write_byte_array(self, val: bytes | None) -> None:
        """Write the length and the bytes; None is empty."""
        self.writer.write(struct.pack(">i", len(val or b"")) + (val or b""))

    def write_uuid(self, val: UUID) -> None:
        """Write 16 bytes in .NET's order."""
        self.writer.write(val.bytes_le)

    def write_int_set(self, val: Iterable[int] | None) -> None:
        """Write the count and the numbers; None is empty."""
        self.writer.write(encode_int_set(val))

    def write_data_packet(self, val: DataPacket) -> None:
        """Write entitlements and data."""
        self.writer.write(encode_packets([val])[4:])

    def write_data_packet_array(self, val: Sequence[DataPacket] | None) -> None:
        """Write the count and the packets; None is empty."""
        self.writer.write(encode_packets(val))

    async def drain(self) -> None:
        """Wait until the peer has room."""
        await self.writer.drain()

    async def close(self) -> None:
        """Close the stream after its buffer is sent."""
        self.writer.close()
        await self.writer.wait_closed()
