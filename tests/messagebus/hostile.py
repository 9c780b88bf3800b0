"""Clients that do what they should not, in a process of their own.

python -m tests.messagebus.hostile PORT SECONDS SEED
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from pubsub_messagebus.protocol import (
    DataPacket,
    encode_authorization_response,
    encode_multicast,
    encode_notification_request,
    encode_subscription_request,
)

from .vectors import MALFORMED, MALFORMED_HANDSHAKES

MIB = 1024 * 1024
CLIENTS = 8


class Hostile:
    """One connection after the other, each with an attack."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._random = random.Random(seed)
        self.attacks = 0

    async def run(self, until: float) -> None:
        attacks: list[Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]] = [
            self.noise,
            self.malformed,
            self.half_a_frame,
            self.interests,
            self.flood,
            self.big_fields,
            self.stalled,
            self.answers,
            self.churn,
        ]
        while time.monotonic() < until:
            attack = self._random.choice(attacks)
            try:
                async with asyncio.timeout(10):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    try:
                        await attack(reader, writer)
                    finally:
                        if self._random.random() < 0.5:
                            writer.transport.abort()
                        else:
                            writer.close()
            except (OSError, TimeoutError):
                pass  # the server may close at any time
            self.attacks += 1

    def _name(self) -> str:
        return self._random.choice(["", "F", "T", "good", "__admin__", "ü" * 300, "x" * 60_000])

    async def noise(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _turn in range(self._random.randrange(1, 20)):
            writer.write(self._random.randbytes(self._random.randrange(1, 5000)))
            await writer.drain()

    async def malformed(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        vector = self._random.choice([*MALFORMED, *MALFORMED_HANDSHAKES])
        writer.write(bytes.fromhex(vector["hex"]))
        await writer.drain()

    async def half_a_frame(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        packets = [DataPacket({1, 2}, self._random.randbytes(100_000))]
        frame = encode_multicast(self._name(), self._name(), False, packets)
        cut = self._random.randrange(len(frame))
        for at in range(0, cut, 7000):
            writer.write(frame[at : min(cut, at + 7000)])
            await writer.drain()
        if writer.can_write_eof() and self._random.random() < 0.5:
            writer.write_eof()

    async def interests(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(2000):
            is_add = self._random.random() < 0.7
            writer.write(encode_subscription_request("F", str(number % 300), is_add))
            if not number % 50:
                writer.write(encode_notification_request(self._name(), is_add))
        await writer.drain()

    async def flood(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frame = encode_multicast("F", "T", False, [DataPacket({7}, bytes(1000))])
        for _turn in range(10):
            writer.write(frame * 100)
            await writer.drain()

    async def big_fields(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wide = DataPacket(set(range(60_000)), b"x")
        many = [DataPacket(None, b"")] * 60_000
        for packets in ([wide], many, [DataPacket(None, bytes(2 * MIB))]):
            writer.write(encode_multicast(self._name(), self._name(), True, packets))
            await writer.drain()

    async def stalled(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        frame = encode_multicast("F", "T", False, [DataPacket(None, bytes(50_000))])
        writer.write(encode_subscription_request("F", "T", True))
        writer.write(encode_notification_request("F", True))
        for _turn in range(60):
            writer.write(frame)
            await writer.drain()

    async def answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _turn in range(200):
            client = UUID(int=self._random.getrandbits(128))
            writer.write(encode_authorization_response(client, self._name(), "T", True, {1, 2}))
        await writer.drain()

    async def churn(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_notification_request("F", True))
        writer.write(encode_subscription_request("F", "T", True))
        async with asyncio.timeout(0.2):
            await reader.read(100)


async def main(port: int, seconds: float, seed: int) -> None:
    until = time.monotonic() + seconds
    clients = [Hostile(port, seed + number) for number in range(CLIENTS)]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(until))
    print(sum(client.attacks for client in clients))


if __name__ == "__main__":
    # asyncio warns of each write to a connection that is gone.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
