"""One connection of a client: bytes to messages, frames to bytes.

A connection starts with a handshake, within a deadline, and goes on with messages. `Owner` is
the server as a connection sees it. A connection never waits: it acts on complete messages when
bytes arrive, and lets `Turns` share the loop when a burst takes long.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import ssl
import sys
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, cast

from pubsub_core.errors import PubSubError
from pubsub_messagebus.protocol import (
    Credentials,
    Decoder,
    Dialect,
    HandshakeDecoder,
    HandshakeForm,
    LengthUnit,
    ProtocolError,
    WireLimits,
)

from .authenticators import NullServerAuthenticator, Refused, ServerAuthenticator
from .broker import Broker, Effects
from .counters import ServerStats
from .interactors import Identity
from .peers import PeerNames
from .turns import TURN, Turns

__all__ = ["STOP_DEADLINE", "Connection", "ListenerOptions", "Owner", "QueueBounds"]

logger = logging.getLogger("pubsub_messagebus.server")

STOP_DEADLINE: Final = 2.0
"""Seconds in which a connection that ends may still read its queue."""

# After how many messages and deliveries the clock is looked at. A connection that alone fans
# out may go on a little: many messages written to a connection cost hardly more than one.
_LOOK = 64
_FANNED_OUT = range(1000, 20_000)
_WRITE_AT_ONCE = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerOptions:
    """Where and how clients connect.

    Attributes:
        ssl: Makes it a TLS listener.
        string_length_unit: ``codepoints`` for sites full of old Python clients.
    """

    host: str = "127.0.0.1"
    port: int = 0
    dialect: Dialect = "is_image"
    handshake: HandshakeForm | Literal["auto"] = "auto"
    ssl: ssl.SSLContext | None = None
    string_length_unit: LengthUnit = "bytes"


@dataclass(frozen=True, slots=True)
class QueueBounds:
    """How much may wait to be written to one connection; beyond it, it is disconnected."""

    bytes: int = sys.maxsize
    frames: int = sys.maxsize


class Owner(Protocol):
    """The server, as a connection sees it."""

    authenticator: ServerAuthenticator
    """Checks credentials."""
    broker: Broker
    """Acts on messages."""
    count: ServerStats
    """Where connections count."""
    handshake_timeout: float
    """Seconds for a whole handshake."""
    limits: WireLimits
    """The largest of everything that is read."""
    peers: PeerNames
    """How hosts are called."""
    queue: QueueBounds
    """How much may wait for a connection that does not read."""
    turns: Turns
    """Shares the loop."""

    def opened(self, connection: Connection) -> bool:
        """Learn of a socket; return whether it may stay."""
        ...

    def closed(self, connection: Connection) -> None:
        """Learn that a socket is gone."""

    def admit(self, connection: Connection, identity: Identity, dialect: Dialect) -> None:
        """Take in a connection that has logged in."""

    def leave(self, connection: Connection, *, fault: bool) -> None:
        """Take out a connection that was admitted."""

    def ended(self, connection: Connection) -> None:
        """Learn that a connection acts on nothing more."""

    def deliver(self, effects: Effects) -> None:
        """Queue frames for their connections."""


class Connection(asyncio.Protocol):
    """One client. The event loop has set TCP_NODELAY.

    Attributes:
        transport: None before the connection is made.
        peer: Address and port, for logs.
        written: Messages written so far.
        online: Whether it is logged in and has not ended.
    """

    def __init__(self, server: Owner, listener: ListenerOptions) -> None:
        self._server = server
        self._listener = listener
        self._room = server.queue
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.peer = "?"
        self._host = ""
        self._handshake: HandshakeDecoder | None = HandshakeDecoder(
            server.authenticator.handshake,
            form=listener.handshake,
            limits=server.limits,
            string_length_unit=listener.string_length_unit,
        )
        self._deadline: asyncio.TimerHandle | None = None
        self._authenticating: asyncio.Task[None] | None = None
        self.decoder: Decoder | None = None
        self._early: list[bytes] = []
        self._busy = False
        self._paused = False
        self._frames = collections.deque[bytes]()
        self._queued = 0
        self.written = 0
        self._flushing = False
        self._ended = False
        self._doomed = False
        self.online = False

    # --- asyncio.Protocol --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or close at once if the server stops or has too much to do."""
        # No isinstance: the transports of uvloop are of a class of their own.
        self.transport = cast("asyncio.Transport", transport)
        server = self._server
        if not server.opened(self):
            self._ended = True
            self.transport.abort()
            return
        address: Any = transport.get_extra_info("peername")
        host = str(address[0]) if address else ""
        self.peer = f"{host}:{address[1]}" if address else "?"
        self._host = host
        self.transport.set_write_buffer_limits(high=_WRITE_AT_ONCE)
        if server.authenticator.handshake == "null":
            # Do not wait for a first byte: a client may send none.
            self._begin_authentication(Credentials("null"))
        else:
            self._deadline = self._loop.call_later(server.handshake_timeout, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the handshake or of messages."""
        if self._ended:
            return
        self._server.count.bytes_read += len(data)
        if self._handshake is not None:
            self._shake(data)
        elif self.decoder is None or self._busy:
            self._early.append(data)
        else:
            self.decoder.feed(data)
            self._work(self._server.turns.first)

    def eof_received(self) -> bool:
        """End, whether between messages or inside one."""
        if self._ended:
            return False
        handshake = self._handshake
        if (handshake is not None and handshake.inside) or (
            self.decoder is not None and self.decoder.inside and not self._busy
        ):
            logger.info("%s: the stream ended inside a message", self.peer)
            self.end(fault=True)
        self.end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after a close or a reset."""
        if self._ended or not self.online:
            self.end()
        elif not self._doomed:
            self.doom()
            self._server.turns.end(self, fault=exc is not None)
        self._server.closed(self)

    def pause_writing(self) -> None:
        """Keep frames here until the peer reads again."""
        self._paused = True

    def resume_writing(self) -> None:
        """Go on writing."""
        self._paused = False
        # Not at once: asyncio calls this in the middle of sending, and a transport that breaks in
        # here tells its end twice (CPython 3.11: "Exception in callback").
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    # --- the handshake -----------------------------------------------------------------

    def _shake(self, data: bytes) -> None:
        handshake = self._handshake
        if handshake is None:
            return
        handshake.feed(data)
        try:
            credentials = handshake.next_credentials()
        except ProtocolError as error:
            self._server.count.refused += 1
            logger.warning("%s: refused: %s", self.peer, error)
            self.end()
            return
        if credentials is None:
            if self._server.authenticator.handshake == "null" and self._deadline is None:
                self._deadline = self._loop.call_later(
                    self._server.handshake_timeout, self._too_slow
                )
            return
        self._handshake = None
        if handshake.rest:
            self._early.insert(0, handshake.rest)
        if self.online:
            self._stop_deadline()
            self._work(self._server.turns.first)
            return
        self._begin_authentication(credentials)

    def _begin_authentication(self, credentials: Credentials) -> None:
        server = self._server
        if isinstance(server.authenticator, NullServerAuthenticator):
            self._admit(Identity(host=server.peers.known(self._host)))
            return
        assert self.transport is not None  # noqa: S101 - made
        self.transport.pause_reading()
        self._authenticating = self._loop.create_task(
            self._authenticate(credentials), name=f"messagebus authentication {self.peer}"
        )

    async def _authenticate(self, credentials: Credentials) -> None:
        server = self._server
        try:
            user = await server.authenticator.authenticate(credentials)
            host = await server.peers.ask(self._host)
        except Refused as error:
            server.count.refused += 1
            logger.warning("%s: refused: %s", self.peer, error)
            self.end()
            return
        except PubSubError as error:
            server.count.refused += 1
            logger.error("%s: authentication failed: %s", self.peer, error)  # noqa: TRY400 - one line for one peer
            self.end()
            return
        except Exception:
            server.count.refused += 1
            logger.exception("%s: the authenticator failed", self.peer)
            self.end()
            return
        finally:
            self._authenticating = None
        if self._ended:
            return
        identity = Identity(
            user=user.name,
            host=host,
            method=user.method,
            impersonating=credentials.impersonating,
            forwarded_for=credentials.forwarded_for,
            application=credentials.application,
            permissions=user.permissions,
        )
        self._admit(identity)
        if self._may_read and self.transport is not None:
            self.transport.resume_reading()

    def _admit(self, identity: Identity) -> None:
        if self._server.authenticator.handshake != "null":
            self._stop_deadline()
        self.decoder = Decoder(
            "server",
            dialect=self._listener.dialect,
            limits=self._server.limits,
            string_length_unit=self._listener.string_length_unit,
        )
        self.online = True
        self._server.admit(self, identity, self._listener.dialect)
        if self._handshake is None:
            self._work(self._server.turns.first)

    def _too_slow(self) -> None:
        self._server.count.timeouts += 1
        logger.warning("%s: no handshake within the deadline", self.peer)
        self.end()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # --- messages in -------------------------------------------------------------------

    def _work(self, turn: float) -> None:
        """Act on complete messages; after a long burst let others have a turn.

        The clock is read once per `_LOOK` messages and deliveries and not for each. Bytes that
        came before login, or while a burst waited for its turn, are in ``_early`` and come
        first.
        """
        decoder = self.decoder
        if decoder is None or self._ended:
            return
        early, self._early = self._early, []
        for data in early:
            decoder.feed(data)
        server = self._server
        received = server.broker.received
        deliver = server.deliver
        clock = self._loop.time
        until = clock() + turn
        done, fanned, look = 0, 0, _LOOK
        self._busy = False
        try:
            while True:
                message = decoder.next_message()
                if message is None:
                    return
                result = received(self, message)
                done += 1
                if result:
                    deliver(result)
                    if self._doomed:  # it was sent more than it may hold, maybe by itself
                        return
                    done += len(result)
                    fanned += len(result)
                if done >= look:
                    look = done + _LOOK
                    # Requests that go to nobody have no such excuse: sixty bursts of them, none
                    # of which was waiting yet, kept the loop for 3.6 s.
                    if clock() > until and (
                        server.turns.waiting or 2 * fanned < done or done not in _FANNED_OUT
                    ):
                        break
        except ProtocolError as error:
            server.count.protocol_errors += 1
            logger.warning("%s: protocol error: %s", self.peer, error)
            self.end(fault=True)
            return
        self._busy = True
        if self.transport is not None:
            self.transport.pause_reading()
        server.turns.again(self)

    def proceed(self) -> None:
        """Take another turn, and read on when nothing is left."""
        if self._ended or self._doomed or self.transport is None:
            return
        self._work(TURN)
        if self._may_read:
            self.transport.resume_reading()

    @property
    def _may_read(self) -> bool:
        return not (self._busy or self._ended or self._authenticating is not None)

    # --- frames out --------------------------------------------------------------------

    def write(self, frame: bytes) -> bool:
        """Queue a frame; return False when the connection holds more than it may."""
        if self._doomed:
            return True
        self._frames.append(frame)
        self._queued += len(frame)
        if not self._flushing and not self._paused:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return self._queued <= self._room.bytes and len(self._frames) <= self._room.frames

    def doom(self) -> None:
        """Drop the queue, and act on nothing more."""
        self._doomed = True
        self._frames.clear()
        self._queued = 0
        self._busy = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def _flush(self) -> None:
        # Once per turn of the loop, so that many frames become one write. An echo that writes
        # each frame of 100 bytes reaches a tenth of the rate (benchmarks/messagebus.py).
        self._flushing = False
        transport = self.transport
        frames = self._frames
        if transport is None or self._ended:
            return
        while frames and not self._paused:
            batch: list[bytes] = []
            if self._queued <= _WRITE_AT_ONCE:
                batch.extend(frames)
                frames.clear()
            else:
                size = 0
                while frames and size < _WRITE_AT_ONCE:
                    frame = frames.popleft()
                    size += len(frame)
                    batch.append(frame)
            data = b"".join(batch)
            self._queued -= len(data)
            self.written += len(batch)
            self._server.count.frames_written += len(batch)
            self._server.count.bytes_written += len(data)
            transport.write(data)

    # --- the end -----------------------------------------------------------------------

    def end(self, *, abort: bool = False, fault: bool = False) -> None:
        """Leave the broker, then close; without *abort* the queue is still sent."""
        if self._ended:
            if abort and self.transport is not None:
                self.transport.abort()
            return
        # Only whole frames wait in the queue, so the peer never gets half of one.
        if not abort:
            self._paused = False
            self._flush()
        self._ended = True
        self._stop_deadline()
        self._frames.clear()
        self._queued = 0
        self._server.ended(self)
        if self._authenticating is not None:
            self._authenticating.cancel()
        if self.transport is not None:
            if abort:
                self.transport.abort()
            else:
                self.transport.close()
                if self.transport.get_write_buffer_size():
                    # The peer may never read it.
                    self._loop.call_later(STOP_DEADLINE, self._give_up)
        if self.online:
            self.online = False
            self._server.leave(self, fault=fault)

    @property
    def waiting(self) -> int:
        """Messages that wait to be written."""
        return len(self._frames)

    @property
    def busy(self) -> bool:
        """Whether messages wait for their turn."""
        return self._busy

    @property
    def authentication(self) -> asyncio.Task[None] | None:
        """The task that checks credentials, while it does."""
        return self._authenticating

    def _give_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()
