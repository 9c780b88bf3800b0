"""Messages published while there is no session: kept in order, within bounds."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable

from .errors import NotConnected, Overflow, PublishFailed, PubSubError
from .message import OutFrame, Receipt
from .settings import OfflineOverflow

__all__ = ["Outbox", "Waiting"]

_AT_ONCE = 100


class Waiting:
    """One message in the outbox.

    Attributes:
        future: What became of it. Cancelling it withdraws the message if it is not `sent`.
        sent: Whether it was handed to the backend.
    """

    __slots__ = ("frame", "future", "number", "sent")

    def __init__(self, number: int, frame: OutFrame, future: asyncio.Future[Receipt]) -> None:
        self.number = number
        self.frame = frame
        self.future = future
        self.sent = False


class Outbox:
    """A bounded queue of publishes that wait for a session.

    What waits is sent in the order of the calls once there is one, and nothing published
    meanwhile overtakes it: while `busy`, the bus puts everything here.
    """

    def __init__(self, *, messages: int, bytes: int, overflow: OfflineOverflow) -> None:
        self._most = messages
        self._most_bytes = bytes
        self._overflow = overflow
        self._queue: deque[Waiting] = deque()
        self._bytes = 0
        self._room: deque[asyncio.Future[None]] = deque()
        self._flushing = False
        self._numbers = itertools.count()
        self._ended = False
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def bytes(self) -> int:
        """Payload bytes that wait."""
        return self._bytes

    @property
    def flushing(self) -> bool:
        """Whether somebody sends what waits; whoever comes meanwhile need not."""
        return self._flushing

    @property
    def busy(self) -> bool:
        """Whether a publish must queue up here to keep the order."""
        return self._flushing or bool(self._queue)

    async def put(self, frame: OutFrame, backend: str) -> Waiting:
        """Keep *frame*; its future tells what became of it.

        Waits for room with ``overflow="block"``.

        Raises:
            Overflow: There is no room, and the policy is ``error`` or ``drop_newest``.
        """
        size = len(frame.payload)
        while self._full(size):
            if self._overflow == "drop_oldest" and self._queue:
                self._drop_oldest(backend)
                continue
            if self._overflow == "block" and size <= self._most_bytes and self._most > 0:
                room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._room.append(room)
                await room
                continue
            self.dropped += 1
            raise Overflow(
                f"the offline buffer is full with {len(self._queue)} messages "
                f"({self._bytes} bytes)",
                hint="wait until the bus is online, or raise offline_messages, offline_bytes",
                backend=backend,
                topic=frame.topic,
            )
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        waiting = Waiting(next(self._numbers), frame, future)
        self._queue.append(waiting)
        self._bytes += size
        return waiting

    async def flush(
        self, send: Callable[[OutFrame], Awaitable[Receipt]], online: Callable[[], bool]
    ) -> None:
        """Send what waits, in order, as long as there is a session."""
        if self._flushing:
            return
        self._flushing = True
        pending: set[asyncio.Future[None]] = set()
        try:
            while self._queue and online():
                waiting = self._take()
                if waiting.future.done():
                    continue
                pending.add(asyncio.ensure_future(self._send(waiting, send)))
                if len(pending) >= _AT_ONCE:
                    _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                else:
                    # Each send must begin before the next one does.
                    await asyncio.sleep(0)
            self._flushing = False
            if pending:
                await asyncio.wait(pending)
        finally:
            self._flushing = False

    def fail(self, error: Callable[[OutFrame], PubSubError]) -> None:
        """End every wait: there will be no session."""
        self._ended = True
        while self._queue:
            waiting = self._take()
            if not waiting.future.done():
                waiting.future.set_exception(error(waiting.frame))
                # Whoever published without waiting for it has no one to raise to.
                waiting.future.exception()
        self._flushing = False

    def _full(self, size: int) -> bool:
        while self._queue and self._queue[0].future.done():
            self._take()
        return len(self._queue) >= self._most or self._bytes + size > self._most_bytes

    def _take(self) -> Waiting:
        waiting = self._queue.popleft()
        self._bytes -= len(waiting.frame.payload)
        while self._room:
            room = self._room.popleft()
            if not room.done():
                room.set_result(None)
                break
        return waiting

    def _drop_oldest(self, backend: str) -> None:
        waiting = self._take()
        self.dropped += 1
        if not waiting.future.done():
            waiting.future.set_exception(
                Overflow(
                    "a newer message took this one's place in the offline buffer",
                    hint="raise offline_messages or offline_bytes, or choose another "
                    "offline_overflow",
                    backend=backend,
                    topic=waiting.frame.topic,
                )
            )
            waiting.future.exception()

    async def _send(self, waiting: Waiting, send: Callable[[OutFrame], Awaitable[Receipt]]) -> None:
        future = waiting.future
        waiting.sent = True
        try:
            receipt = await send(waiting.frame)
        except NotConnected as error:
            # Not sent: the session was lost and the engine has not noticed yet. It waits
            # for the next one, in its old place.
            waiting.sent = False
            if not self._ended:
                self._put_back(waiting)
            elif not future.done():
                future.set_exception(error)
                future.exception()
        except PubSubError as error:
            if not future.done():
                future.set_exception(error)
                future.exception()
        except asyncio.CancelledError:
            if not future.done():
                future.set_exception(
                    PublishFailed("the bus was closed meanwhile", topic=waiting.frame.topic)
                )
                future.exception()
            raise
        else:
            if not future.done():
                future.set_result(receipt)

    def _put_back(self, waiting: Waiting) -> None:
        place = 0
        while place < len(self._queue) and self._queue[place].number < waiting.number:
            place += 1
        self._queue.insert(place, waiting)
        self._bytes += len(waiting.frame.payload)
