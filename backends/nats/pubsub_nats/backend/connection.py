"""One connection on asyncio: bytes to events, commands to bytes, and who waits for which PONG.

The server acts upon the commands of a connection in order, and refuses one before it answers
the next PING. So one PING behind all commands of a turn of the loop confirms them together, and
what was refused since the PONG before is known when that PONG comes.

What a turn of the loop sends goes out in one write. Measured, that and the shared PING are what
make publishing fast; a task or a queue for each subscription is what makes it slow.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from pubsub_nats.errors import Refusal, refusal
from pubsub_nats.protocol import (
    PING,
    PONG,
    Err,
    Info,
    Msg,
    Parser,
    Ping,
    Pong,
    ProtocolError,
    encode_sub,
    encode_unsub,
)
from pubsub_nats.websocket import WebSocket, WebSocketRejected

__all__ = ["Connection", "Denied", "LimitExceeded", "Lost", "Owner", "Unsent"]

logger = logging.getLogger("pubsub_nats")

_HIGH = 1024 * 1024
_PUSH = 64 * 1024
_LAME_DUCK = 2.0


class Lost(ConnectionError):
    """The connection ended; what was sent may or may not have arrived."""


class Unsent(Lost):
    """The connection ended before the command was written."""


class Denied(Exception):
    """The server's permissions refuse the operation."""


class LimitExceeded(Exception):
    """The server allows no further subscription."""


class Owner(Protocol):
    """What a connection tells of."""

    def message(self, message: Msg) -> None:
        """Take one message."""
        ...

    def told(self, info: Mapping[str, Any]) -> None:
        """Learn what the server tells of itself; it may come at any time."""
        ...

    def publish_denied(self, subject: bytes) -> None:
        """Learn that a publish was refused, for those that no PING follows."""
        ...

    def ended(self, connection: Connection) -> None:
        """Learn that the connection is over; `Connection.error` says why."""
        ...


class _Batch:
    """The commands between two PINGs, and who waits for their PONG."""

    __slots__ = ("begun", "plain", "publishes", "subscriptions")

    def __init__(self) -> None:
        # Whether some of it was written before its turn of the loop was over.
        self.begun = False
        self.publishes: list[tuple[bytes, asyncio.Future[None]]] = []
        self.subscriptions: list[tuple[bytes, bytes, asyncio.Future[None]]] = []
        self.plain: list[asyncio.Future[None]] = []

    def futures(self) -> list[asyncio.Future[None]]:
        return [
            *(each[1] for each in self.publishes),
            *(each[2] for each in self.subscriptions),
            *self.plain,
        ]


class Connection(asyncio.Protocol):
    """One connection.

    Attributes:
        info: What the server told last.
        error: Why it ended.
        last_error: Text of the last error that concerned the whole connection, or ``""``.
        closed: Done once the transport is gone.
    """

    def __init__(self, owner: Owner, framing: WebSocket | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._framing = framing
        self._parser = Parser()
        self._message: Callable[[Msg], None] = owner.message
        self.transport: asyncio.Transport | None = None
        self.info: Mapping[str, Any] = {}
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        self.upgraded: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.error: BaseException | None = None
        self.last_error = ""
        self._out: list[bytes] = []
        self._size = 0
        self._flushing = False
        self._batch = _Batch()
        self._wants_pong = False
        self._pongs: deque[_Batch] = deque()
        self._refused: list[Refusal] = []
        self._paused = False
        self._blocked: deque[asyncio.Future[None]] = deque()
        self._heard = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._lame: asyncio.TimerHandle | None = None
        # Control messages so far; before TLS there may be one.
        self.controls = 0

    @property
    def framing(self) -> WebSocket | None:
        """The WebSocket around it, if there is one."""
        return self._framing

    @property
    def pending(self) -> int:
        """Bytes of an event that is not complete."""
        return self._parser.pending

    # --- asyncio.Protocol ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH)

    def over_tls(self, transport: asyncio.Transport) -> None:
        """Go on over TLS."""
        self.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Act upon what arrived."""
        self._heard = self._loop.time()
        try:
            if self._framing is not None:
                data = self._unframed(self._framing, data)
            for event in self._parser.receive(data):
                if type(event) is Msg:
                    self._message(event)
                else:
                    self._control(event)
        except (ProtocolError, WebSocketRejected, ConnectionError) as error:
            self.fail(error)

    def _unframed(self, framing: WebSocket, data: bytes) -> bytes:
        payload, reply = framing.receive(data)
        if reply and self.transport is not None:
            self.transport.write(reply)
        if framing.open and not self.upgraded.done():
            self.upgraded.set_result(None)
        return payload

    def _control(self, event: object) -> None:
        self.controls += 1
        match event:
            case Pong():
                self._pong()
            case Ping():
                self.write(PONG)
            case Err(text):
                self._err(text)
            case Info(fields):
                self._info(fields)
            case _:
                pass

    def pause_writing(self) -> None:
        """Let publishers wait."""
        self._paused = True

    def resume_writing(self) -> None:
        """Let publishers go on."""
        self._paused = False
        self._wake()

    def eof_received(self) -> bool:
        """Close; there is nothing that could still be sent."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End every wait."""
        for timer in (self._timer, self._lame):
            if timer is not None:
                timer.cancel()
        self.error = self.error or exc or Lost("the server closed the connection")
        self._paused = False
        while self._pongs:
            self._give_up(self._pongs.popleft(), Lost("the connection ended"))
        why = "the connection ended"
        self._give_up(self._batch, Lost(why) if self._batch.begun else Unsent(f"{why} before"))
        self._out.clear()
        for waiter in self._blocked:
            if not waiter.done():
                waiter.set_result(None)
        for future in (self.greeted, self.upgraded):
            if not future.done():
                future.cancel()
        if not self.closed.done():
            self.closed.set_result(None)
        self._owner.ended(self)

    def _future(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        if self.closed.done():
            future.set_exception(Unsent("the connection ended before"))
        return future

    @staticmethod
    def _give_up(batch: _Batch, error: Lost) -> None:
        for future in batch.futures():
            if not future.done():
                future.set_exception(error)

    # --- out -------------------------------------------------------------------------------

    @property
    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.transport is None or self.transport.is_closing()

    def write(self, frame: bytes) -> None:
        """Send *frame* with whatever else this turn of the loop sends."""
        self._out.append(frame)
        self._size += len(frame)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)
        if self._size >= _PUSH:
            # In one long turn the server would have nothing to do, and we no bound.
            self._batch.begun = True
            self._push()

    def _push(self) -> None:
        data = b"".join(self._out)
        self._out.clear()
        self._size = 0
        if self.transport is not None and not self.is_closing:
            self.transport.write(data if self._framing is None else self._framing.frame(data))

    def flush(self) -> None:
        """Send what waits now."""
        self._flushing = False
        if self.is_closing or self.transport is None:
            return  # `connection_lost` comes, and tells what was not sent
        if self._wants_pong:
            self._wants_pong = False
            self._pongs.append(self._batch)
            self._batch = _Batch()
            self._out.append(PING)
        if self._out:
            self._push()

    @property
    def full(self) -> bool:
        """Whether publishers have to wait for `room`."""
        return self._paused or bool(self._blocked)

    async def room(self) -> None:
        """Return when there is room, in the order of the calls, or when the end came."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._blocked.append(waiter)
        try:
            await waiter
        finally:
            self._blocked.remove(waiter)
            self._wake()

    def _wake(self) -> None:
        if self._blocked and not self._paused and not self._blocked[0].done():
            self._blocked[0].set_result(None)

    def publish(self, frame: bytes, subject: bytes) -> asyncio.Future[None]:
        """Send a publish; the future is done once the server has acted upon it.

        It raises `Denied`, `Lost` or `Unsent`.
        """
        future = self._future()
        self._batch.publishes.append((subject, future))
        self._wants_pong = True
        self.write(frame)
        return future

    def subscribe(self, subject: bytes, sid: int, queue: bytes = b"") -> asyncio.Future[None]:
        """Subscribe; the future is done once the server has, and raises as `publish` does.

        `LimitExceeded` as well.
        """
        future = self._future()
        self._batch.subscriptions.append((subject, queue, future))
        self._wants_pong = True
        self.write(encode_sub(subject, sid, queue))
        return future

    def unsubscribe(self, sid: int) -> None:
        """Unsubscribe; a `ping` confirms it."""
        self.write(encode_unsub(sid))

    def ping(self) -> asyncio.Future[None]:
        """Return a future that is done once the server has acted upon everything so far."""
        future = self._future()
        self._batch.plain.append(future)
        self._pongs_follow()
        return future

    def _pongs_follow(self) -> None:
        self._wants_pong = True
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    # --- in --------------------------------------------------------------------------------

    def _pong(self) -> None:
        refused, self._refused = self._refused, []
        if not self._pongs:
            return  # one that nobody asked for
        batch = self._pongs.popleft()
        if refused:
            self._refuse(batch, refused)
        for _, future in batch.publishes:
            if not future.done():
                future.set_result(None)
        for _, _, future in batch.subscriptions:
            if not future.done():
                future.set_result(None)
        for future in batch.plain:
            if not future.done():
                future.set_result(None)
        if self._lame is not None and not self._pongs:
            self.fail(Lost("the server is shutting down"))

    @staticmethod
    def _refuse(batch: _Batch, refused: list[Refusal]) -> None:
        publishes = {each.subject for each in refused if each.kind == "publish"}
        subscriptions = {
            (each.subject, each.queue) for each in refused if each.kind == "subscription"
        }
        # Such an error names none; beyond the limit every further one is refused.
        too_many = sum(each.kind == "limit" for each in refused)
        for subject, future in batch.publishes:
            if subject in publishes and not future.done():
                future.set_exception(Denied)
        for subject, queue, future in batch.subscriptions:
            if (subject, queue) in subscriptions and not future.done():
                future.set_exception(Denied)
        for _, _, future in batch.subscriptions[len(batch.subscriptions) - too_many :]:
            if not future.done():
                future.set_exception(LimitExceeded)

    def _err(self, text: str) -> None:
        found = refusal(text)
        if found is None:
            self.last_error = text
            return
        self._refused.append(found)
        if found.kind == "publish":
            self._owner.publish_denied(found.subject)

    def _info(self, fields: Mapping[str, Any]) -> None:
        # A later INFO may hold less than the first.
        self.info = {**self.info, **fields}
        if not self.greeted.done():
            self.greeted.set_result(None)
        self._owner.told(self.info)
        if fields.get("ldm") is True and self._lame is None:
            # It goes in ten seconds. Ended between two messages, nothing is in the air.
            ending = Lost("the server is shutting down")
            self._lame = self._loop.call_later(_LAME_DUCK, self.fail, ending)
            self._pongs_follow()

    # --- life ------------------------------------------------------------------------------

    def keep_alive(self, seconds: float) -> None:
        """Ask for a sign of life after *seconds* of silence, and give up after half as many."""
        self._timer = self._loop.call_later(seconds, self._look, seconds, False)

    def _look(self, seconds: float, asked: bool) -> None:
        silent = self._loop.time() - self._heard
        if silent < seconds:
            self._timer = self._loop.call_later(seconds - silent, self._look, seconds, False)
        elif not asked:
            self._pongs_follow()
            self._timer = self._loop.call_later(seconds / 2, self._look, seconds, True)
        else:
            self.fail(Lost(f"no sign of life for {1.5 * seconds:g} s"))

    def fail(self, error: BaseException) -> None:
        """End at once, for this reason."""
        self.error = self.error or error
        if self.transport is not None:
            self.transport.abort()

    async def close(self, drain: float) -> None:
        """Close after what was sent has been acted upon, within *drain* seconds."""
        transport = self.transport
        if transport is None:
            return
        drained = False
        try:
            if drain > 0 and not transport.is_closing():
                waiting = self.ping()
                await asyncio.wait(
                    [waiting, self.closed], timeout=drain, return_when=asyncio.FIRST_COMPLETED
                )
                drained = waiting.done() and waiting.exception() is None
                waiting.cancel()
        finally:
            if drained:
                transport.close()
            else:
                self.flush()
                transport.abort()
        _, late = await asyncio.wait([self.closed], timeout=1)
        if late:  # a peer that does not answer the end of TLS
            transport.abort()
            await asyncio.wait([self.closed], timeout=1)
