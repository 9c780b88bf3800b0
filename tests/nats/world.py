"""What the tests of the backend share: the backend of a bus, a raw connection, users."""

from __future__ import annotations

import asyncio
from typing import Any

from pubsub_core import Bus
from pubsub_nats.backend import NatsBackend

USERS = """
authorization {
  users: [
    { user: all, password: all }
    { user: some, password: some, permissions: {
        publish: { deny: ["no.>", "a.X", "$JS.API.CONSUMER.>"] },
        subscribe: { deny: ["no.>", "q.> workers"] } } }
  ]
}
"""


def backend(bus: Bus) -> NatsBackend:
    return bus.native(NatsBackend)


class Raw:
    """A client of a few lines, which may send what no proper one does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> Raw:
        raw = cls(*await asyncio.open_connection("127.0.0.1", port))
        await raw.reader.readline()
        await raw.send(b'CONNECT {"verbose":false,"headers":true}\r\n')
        return raw

    async def send(self, *frames: bytes) -> None:
        """Send, and wait until the server has acted upon it."""
        self.writer.write(b"".join(frames) + b"PING\r\n")
        while (line := await self.reader.readline()) != b"PONG\r\n":
            if not line:
                raise ConnectionError("the server closed")

    async def publish(self, subject: bytes, payload: bytes = b"x") -> None:
        await self.send(b"PUB %b %d\r\n%b\r\n" % (subject, len(payload), payload))

    def close(self) -> None:
        self.writer.transport.abort()


async def settled(*waiting: Any) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)
