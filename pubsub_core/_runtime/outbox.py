"""Messages published while there is no session: kept in order, within bounds."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable

from pubsub_core.clock import Clock
from pubsub_core.config.bus_options import OfflineOverflow
from pubsub_core.errors import NotConnected, Outcome, Overflow, PublishFailed, PubSubError
from pubsub_core.message import OutFrame, Receipt
from pubsub_core.pacing import RateGuard

__all__ = ["Outbox", "Waiting"]

_AT_ONCE = 100


class Waiting:
    """One message in the outbox.

    Attributes:
        future: Its receipt or error; cancelled by `Outbox.withdraw`.
        sent: Whether it was handed to the backend.
        since: When it was put here, in seconds of the clock.
    """

    __slots__ = ("frame", "future", "number", "sent", "since")

    def __init__(
        self, number: int, frame: OutFrame, future: asyncio.Future[Receipt], since: float
    ) -> None:
        self.number = number
        self.since = since
        self.frame = frame
        self.future = future
        self.sent = False


class _Blocked:
    """A publish that waits for room."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Outbox:
    """A bounded queue of publishes that wait for a session.

    Messages are sent in the order of the calls once there is one, and no later publish
    overtakes them: while `busy`, the publisher puts everything here.

    Attributes:
        dropped: Messages that ``drop_oldest`` or ``drop_newest`` dropped, or that grew too old.
    """

    def __init__(
        self,
        *,
        messages: int,
        bytes: int,
        overflow: OfflineOverflow,
        age: float | None,
        clock: Clock,
    ) -> None:
        self._age = age
        self._clock = clock
        self._most = messages
        self._most_bytes = bytes
        self._overflow = overflow
        self._queue: deque[Waiting] = deque()
        # How many of these were withdrawn and only wait to be swept out.
        self._withdrawn = 0
        self._bytes = 0
        # Publishes that wait for room, in the order of the calls.
        self._blocked: deque[_Blocked] = deque()
        self._flushing = False
        self._numbers = itertools.count()
        self._ended: Callable[[OutFrame], PubSubError] | None = None
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._queue) - self._withdrawn

    @property
    def bytes(self) -> int:
        """Payload bytes that wait."""
        return self._bytes

    @property
    def flushing(self) -> bool:
        """Whether the outbox is being sent; one flush at a time is enough."""
        return self._flushing

    @property
    def busy(self) -> bool:
        """Whether a publish must queue up here to keep the order."""
        return self._flushing or len(self) > 0 or bool(self._blocked)

    async def put(self, frame: OutFrame, backend: str) -> Waiting:
        """Keep *frame*; its future gets the receipt or the error.

        Waits for room with ``overflow="block"``.

        Raises:
            Overflow: There is no room, and the policy is ``error`` or ``drop_newest``.
            PubSubError: There will be no session any more.
        """
        size = len(frame.payload)
        if self._overflow == "block" and size <= self._most_bytes:
            await self._wait_for_room(size)
        if self._ended is not None:
            raise self._ended(frame)
        while self._full(size):
            if self._overflow == "drop_oldest" and size <= self._most_bytes and len(self):
                self._drop_oldest(backend)
                continue
            if self._overflow in ("drop_oldest", "drop_newest"):
                self.dropped += 1
            raise Overflow(
                f"the offline buffer is full with {len(self)} messages ({self._bytes} bytes)",
                hint="wait until the bus is online, or raise offline_messages, offline_bytes",
                backend=backend,
                topic=frame.topic,
            )
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        waiting = Waiting(next(self._numbers), frame, future, self._clock.monotonic())
        self._queue.append(waiting)
        self._bytes += size
        return waiting

    def withdraw(self, waiting: Waiting) -> None:
        """Give up *waiting*. Its place is free at once, unless it is being sent already."""
        if waiting.future.done():
            return
        waiting.future.cancel()
        if waiting.sent:
            return
        self._withdrawn += 1
        self._bytes -= len(waiting.frame.payload)
        # Now and then, so that each withdrawal costs the same however many wait.
        if self._withdrawn * 2 >= len(self._queue):
            self._queue = deque(each for each in self._queue if not each.future.cancelled())
            self._withdrawn = 0
        self._wake()

    async def flush(
        self,
        send: Callable[[OutFrame], Awaitable[Receipt]],
        online: Callable[[], bool],
        rate: Callable[[], RateGuard | None],
    ) -> None:
        """Send the waiting messages, in order, as long as there is a session.

        Args:
            send: Hands one message to the backend.
            online: Whether there is a session.
            rate: Returns the limits of the session, where it has any.
        """
        if self._flushing:
            return
        self._flushing = True
        pending: set[asyncio.Future[None]] = set()
        try:
            while len(self) and online():
                limits = rate()
                # Nothing is taken out of the queue before its turn: while this waits, the
                # oldest may be withdrawn and the session lost. A limit of its topic alone
                # holds up the others too, since they stay in the order of the calls.
                if limits is not None and (delay := limits.delay(self._oldest().frame.topic)) > 0:
                    await self._clock.sleep(delay)
                    continue
                pending.add(asyncio.ensure_future(self._send_next(send, limits)))
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

    def fail(self, error: Callable[[OutFrame], PubSubError]) -> int:
        """End every wait: there will be no session. Return how many messages are given up."""
        self._ended = error
        given_up = len(self)
        while len(self):
            waiting = self._take()
            waiting.future.set_exception(error(waiting.frame))
            # Looked at: a publish with confirm="nobody" has returned, and nobody else would.
            waiting.future.exception()
        for blocked in self._blocked:
            blocked.wake()
        self._flushing = False
        return given_up

    async def _wait_for_room(self, size: int) -> None:
        blocked = _Blocked()
        self._blocked.append(blocked)
        try:
            while self._ended is None and (self._blocked[0] is not blocked or self._full(size)):
                await blocked.wait()
        finally:
            # Also when cancelled: the next one must not wait for a wake-up that this one had.
            self._blocked.remove(blocked)
            self._wake()

    def _wake(self) -> None:
        if self._blocked:
            self._blocked[0].wake()

    def _full(self, size: int) -> bool:
        return len(self) >= self._most or self._bytes + size > self._most_bytes

    def _oldest(self) -> Waiting:
        """Return the oldest message that was not withdrawn; there must be one."""
        while (waiting := self._queue[0]).future.cancelled():
            self._queue.popleft()
            self._withdrawn -= 1
        return waiting

    def _take(self) -> Waiting:
        """Take the oldest message that was not withdrawn; there must be one."""
        waiting = self._oldest()
        self._queue.popleft()
        self._bytes -= len(waiting.frame.payload)
        self._wake()
        return waiting

    def _drop_oldest(self, backend: str) -> None:
        waiting = self._take()
        self.dropped += 1
        waiting.future.set_exception(
            Overflow(
                "a newer message took this one's place in the offline buffer",
                hint="raise offline_messages or offline_bytes, or choose another offline_overflow",
                backend=backend,
                topic=waiting.frame.topic,
            )
        )
        waiting.future.exception()

    async def _send_next(
        self, send: Callable[[OutFrame], Awaitable[Receipt]], limits: RateGuard | None
    ) -> None:
        if not len(self):
            return  # withdrawn since this was planned
        waiting = self._take()
        future = waiting.future
        if self._age is not None and self._clock.monotonic() - waiting.since > self._age:
            self._expire(waiting, self._age)
            return
        if limits is not None:
            # Here, and not when `flush` looked: the oldest may be another by now. It takes
            # the place all the same, as everything else queues up meanwhile.
            limits.reserve(waiting.frame.topic)
        waiting.sent = True
        try:
            receipt = await send(waiting.frame)
        except NotConnected as error:
            # Not sent: the backend lost the session, which has not noticed it yet. It waits
            # for the next one, in its old place.
            waiting.sent = False
            if future.done():
                return  # withdrawn meanwhile
            if self._ended is None:
                self._put_back(waiting)
            else:
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

    def _expire(self, waiting: Waiting, age: float) -> None:
        self.dropped += 1
        waiting.future.set_exception(
            PublishFailed(
                f"waited longer than {age:g} s to be sent",
                outcome=Outcome.NOT_SENT,
                hint="publish it again, or raise offline_age",
                topic=waiting.frame.topic,
            )
        )
        waiting.future.exception()

    def _put_back(self, waiting: Waiting) -> None:
        place = 0
        while place < len(self._queue) and self._queue[place].number < waiting.number:
            place += 1
        self._queue.insert(place, waiting)
        self._bytes += len(waiting.frame.payload)
