"""A client of nothing but a socket and the decoder."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Self

from pubsub_messagebus.protocol import (
    Decoder,
    Dialect,
    Message,
    encode_multicast,
    encode_notification_request,
    encode_subscription_request,
)

WITHIN = 20.0


class Raw:
    """One connection. Every wait has a deadline."""

    def __init__(self, port: int, *, dialect: Dialect = "is_image", **options: Any) -> None:
        self._port = port
        self._options = options
        self._dialect: Dialect = dialect
        self._decoder = Decoder("client", dialect=dialect)
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(WITHIN):
            self.reader, self.writer = await asyncio.open_connection(
                "127.0.0.1", self._port, **self._options
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        try:
            async with asyncio.timeout(WITHIN):
                await self.writer.wait_closed()
        except (OSError, ssl.SSLError):
            pass

    def send(self, *wire: bytes) -> None:
        self.writer.write(b"".join(wire))

    def add(self, feed: str = "F", topic: str = "T") -> None:
        self.send(encode_subscription_request(feed, topic, True))

    def publish(self, feed: str = "F", topic: str = "T", packets: Any = None) -> None:
        flag: Any = False if self._dialect == "is_image" else ""
        self.send(encode_multicast(feed, topic, flag, packets, self._dialect))

    def reset(self) -> None:
        """End without a goodbye."""
        self.writer.transport.abort()

    async def next(self, within: float = WITHIN) -> Any:
        """Return the next message.

        Raises:
            ConnectionError: The server closed the connection.
        """
        async with asyncio.timeout(within):
            while (message := self._decoder.next_message()) is None:
                data = await self.reader.read(65536)
                if not data:
                    raise ConnectionResetError("the server closed the connection")
                self._decoder.feed(data)
        return message

    async def take(self, count: int) -> list[Message]:
        return [await self.next() for _ in range(count)]

    async def fence(self, within: float = WITHIN) -> None:
        """Return when everything sent before was acted upon."""
        self.send(encode_notification_request("fence", True))
        self.add("fence", "x")
        while (await self.next(within)).feed != "fence":
            pass
        self.send(encode_subscription_request("fence", "x", False))
        while (await self.next(within)).feed != "fence":
            pass
        self.send(encode_notification_request("fence", False))

    async def closed(self, within: float = WITHIN) -> bytes:
        """Return what came until the server closed."""
        found = b""
        async with asyncio.timeout(within):
            try:
                while data := await self.reader.read(65536):
                    found += data
            except ConnectionError:
                pass
        return found
