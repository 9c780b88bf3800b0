"""A server that does what a test says, and keeps the bytes it was sent."""

from __future__ import annotations

import asyncio
from typing import Self

from pubsub_messagebus.protocol import Decoder, Message


class Scripted:
    """Accepts connections on loopback.

    Attributes:
        received: The bytes of each connection.
        writers: The other ends of them.
    """

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.ended = 0
        self.reading = asyncio.Event()
        self.reading.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1024)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self.writers:
            writer.transport.abort()
        async with asyncio.timeout(5):
            await self._server.wait_closed()
            while self.ended < len(self.writers):
                await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = bytearray()
        self.received.append(buffer)
        self.writers.append(writer)
        try:
            while True:
                await self.reading.wait()
                data = await reader.read(4096)
                if not data:
                    break
                buffer += data
        except ConnectionError:
            pass
        finally:
            self.ended += 1
            writer.close()

    def messages(self, number: int = 0) -> list[Message]:
        """Return the complete messages of a connection; the stream must not end inside one."""
        decoder = Decoder("server")
        decoder.feed(bytes(self.received[number]))
        decoder.eof()
        found: list[Message] = []
        while (message := decoder.next_message()) is not None:
            found.append(message)
        return found
