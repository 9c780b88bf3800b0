"""One connection to a distributor: bytes in, messages to the backend; frames out."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from pubsub_messagebus.protocol import Decoder, Message, ProtocolError

__all__ = ["Link", "Receiver"]

# Publishers wait while the transport holds more than this.
_HIGH = 1024 * 1024


class Receiver(Protocol):
    """Who takes what arrives."""

    def take(self, link: Link, message: Message) -> None:
        """Act on one message."""

    def ended(self, link: Link) -> None:
        """Learn that the connection is over."""


class Link(asyncio.Protocol):
    """The asyncio side of a connection.

    Attributes:
        room: Set while more may be written.
        closed: Done when the connection is over.
        heard_at: When bytes arrived last, by the loop's clock.
        error: Why it ended, or None.
    """

    def __init__(self, receiver: Receiver, decoder: Decoder) -> None:
        self._receiver = receiver
        self._decoder = decoder
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.room = asyncio.Event()
        self.room.set()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.heard_at = self._loop.time()
        self.error: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH)

    def data_received(self, data: bytes) -> None:
        """Hand complete messages over."""
        self.heard_at = self._loop.time()
        decoder = self._decoder
        decoder.feed(data)
        take = self._receiver.take
        try:
            while (message := decoder.next_message()) is not None:
                take(self, message)
        except ProtocolError as error:
            self.fail(error)

    def pause_writing(self) -> None:
        """Let publishers wait."""
        self.room.clear()

    def resume_writing(self) -> None:
        """Let publishers go on."""
        self.room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the end."""
        self.error = self.error or exc or ConnectionError("the distributor closed the connection")
        self.room.set()
        if not self.closed.done():
            self.closed.set_result(None)
        self._receiver.ended(self)

    def write(self, data: bytes) -> None:
        """Write whole messages."""
        if self.transport is not None:
            self.transport.write(data)

    def fail(self, error: BaseException) -> None:
        """End at once, for this reason."""
        self.error = self.error or error
        if self.transport is not None:
            self.transport.abort()

    async def finish(self, within: float) -> None:
        """Close after the transport has sent what it holds, but for so many seconds at most."""
        if self.transport is None:
            return
        self.transport.close()
        try:
            await asyncio.wait([self.closed], timeout=max(within, 0.0))
        finally:
            if not self.closed.done():
                self.transport.abort()
        await asyncio.wait([self.closed], timeout=1)
