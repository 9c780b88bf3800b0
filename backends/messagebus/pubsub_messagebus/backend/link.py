"""One connection to a distributor: bytes in, messages to the backend; frames out."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from typing import Any, Protocol, cast

from pubsub_messagebus.protocol import Decoder, Message, ProtocolError
from pubsub_messagebus.sockets import Acknowledger

__all__ = ["Link", "Receiver"]

# Publishers wait while the transport holds more than this.
_HIGH = 1024 * 1024


class Receiver(Protocol):
    """The backend, as a link sees it."""

    def take(self, link: Link, message: Message) -> None:
        """Act on one message."""

    def ended(self, link: Link) -> None:
        """Learn that the connection is over."""


class Link(asyncio.Protocol):
    """The asyncio side of a connection.

    Attributes:
        room: Set while more may be written.
        closed: Done when the connection is over.
        heard_at: When bytes arrived last, by the given clock's `monotonic`.
        error: Why it ended, or None.
    """

    def __init__(self, receiver: Receiver, decoder: Decoder, now: Callable[[], float]) -> None:
        self._receiver = receiver
        self._decoder = decoder
        self._now = now
        self.transport: asyncio.Transport | None = None
        self.room = asyncio.Event()
        self.room.set()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.heard_at = now()
        self.error: BaseException | None = None
        self._handshake = b""
        self._socket: Any = None
        self._acknowledger = Acknowledger(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH)
        self._socket = transport.get_extra_info("socket")
        self._acknowledger = Acknowledger(self._socket)

    def data_received(self, data: bytes) -> None:
        """Hand complete messages over."""
        self.heard_at = self._now()
        decoder = self._decoder
        decoder.feed(data)
        take = self._receiver.take
        try:
            while (message := decoder.next_message()) is not None:
                take(self, message)
        except ProtocolError as error:
            self.fail(error)
        else:
            self._acknowledger.arrived(len(data), inside=decoder.inside)

    def pause_writing(self) -> None:
        """Make publishers wait."""
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

    def log_in(self, handshake: bytes) -> None:
        """Send the handshake with the first messages, in one segment.

        A server that refuses it closes. With a second segment unread, its system would send a
        reset, which looks like a crash.
        """
        self._handshake = handshake

    def write(self, data: bytes) -> None:
        """Write whole messages."""
        if self.transport is None:
            return
        if self._handshake:
            self.transport.write(self._handshake + data)
            self._handshake = b""
        else:
            self.transport.write(data)

    def fail(self, error: BaseException) -> None:
        """End at once, for this reason."""
        self.error = self.error or error
        if self.transport is not None:
            self.transport.abort()

    def watch(self, seconds: float) -> None:
        """Let the kernel end the connection when the peer's kernel is silent for so long.

        For peers that cannot be asked for a sign of life. It does not notice a process that
        has stopped on a machine that lives.
        """
        if self._socket is None:
            return
        whole = max(1, math.ceil(seconds))
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, whole),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, whole // 4)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1500 * seconds)),
        ):
            self._socket.setsockopt(level, option, value)

    async def finish(self, within: float) -> None:
        """Close once the transport has sent its buffer, or after so many seconds."""
        if self.transport is None:
            return
        self.transport.close()
        try:
            await asyncio.wait([self.closed], timeout=max(within, 0.0))
        finally:
            if not self.closed.done():
                self.transport.abort()
        await asyncio.wait([self.closed], timeout=1)
