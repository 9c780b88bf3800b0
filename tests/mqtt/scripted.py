"""A broker that answers only as told: for silence, refusals and golden bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.servers import eventually

CONNECT, PUBLISH, PUBACK, PUBREC, PUBREL, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = (
    1,
    3,
    4,
    5,
    6,
    8,
    10,
    12,
    14,
)


@dataclass
class Packet:
    """One packet of the client, undecoded."""

    head: int
    body: bytes
    connection: int

    @property
    def type(self) -> int:
        return self.head >> 4

    @property
    def keep_alive(self) -> int:
        """Seconds in a CONNECT of MQTT 3.1.1."""
        return int.from_bytes(self.body[8:10], "big")

    @property
    def connect_flags(self) -> int:
        return self.body[7]

    @property
    def packet_id(self) -> int:
        """Identifier of everything but CONNECT, PUBLISH at QoS 0 and packets without one."""
        start = 0
        if self.type == PUBLISH:
            start = 2 + int.from_bytes(self.body[:2], "big")
        return int.from_bytes(self.body[start : start + 2], "big")


@dataclass
class ScriptedBroker:
    """What it answers can be changed while it runs; None means silence.

    Attributes:
        answer: Takes each packet and returns the bytes to send, or None for the usual answer.
    """

    connack: bytes | None = b"\x20\x02\x00\x00"
    suback: bool = True
    puback: bool = True
    pingresp: bool = True
    answer: Callable[[Packet], bytes | None] = field(default=lambda packet: None)
    packets: list[Packet] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def of(self, kind: int) -> list[Packet]:
        """Return the packets of a type so far."""
        return [packet for packet in self.packets if packet.type == kind]

    async def arrived(self, kind: int, count: int = 1, *, within: float = 5.0) -> list[Packet]:
        """Return the packets of a type once there are so many."""
        await eventually(lambda: len(self.of(kind)) >= count, within=within)
        return self.of(kind)

    def send(self, data: bytes) -> None:
        """Send bytes to the last client."""
        self._writers[-1].write(data)

    def cut(self) -> None:
        """End every connection at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.append(writer)
        try:
            while True:
                head = (await reader.readexactly(1))[0]
                size = shift = 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    size |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                packet = Packet(head, await reader.readexactly(size), number)
                self.packets.append(packet)
                data = self.answer(packet)
                if data is None:
                    data = self._usual(packet)
                if data:
                    writer.write(data)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _usual(self, packet: Packet) -> bytes | None:
        match packet.type:
            case 1:
                return self.connack
            case 3 if packet.head & 6 == 2 and self.puback:
                return b"\x40\x02" + packet.packet_id.to_bytes(2, "big")
            case 3 if packet.head & 6 == 4 and self.puback:
                return b"\x50\x02" + packet.packet_id.to_bytes(2, "big")
            case 6:
                return b"\x70\x02" + packet.body
            case 8 if self.suback:
                return b"\x90\x03" + packet.body[:2] + packet.body[-1:]
            case 10 if self.suback:
                return b"\xb0\x02" + packet.body[:2]
            case 12 if self.pingresp:
                return b"\xd0\x00"
            case _:
                return None


@asynccontextmanager
async def scripted() -> AsyncIterator[ScriptedBroker]:
    broker = ScriptedBroker()
    server = await asyncio.start_server(broker.serve, "127.0.0.1", 0)
    broker.port = server.sockets[0].getsockname()[1]
    try:
        yield broker
    finally:
        server.close()
        broker.cut()
        await eventually(lambda: all(writer.is_closing() for writer in broker._writers))
