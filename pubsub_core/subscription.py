"""One local subscription, and who consumes it: an ``async for`` or a handler.

The router puts frames into its `Buffer` without ever waiting; the consumer takes them out,
and decoding, middleware and user code happen there, never on a network path.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from ._runtime.buffer import Buffer, Delivery, Item, SubscriptionSettings
from .errors import BusClosed, DecodeFailed, HandlerFailed, PubSubError
from .events import Gap
from .message import InFrame, Message, Verdict
from .middleware import CallNext, Context, Direction
from .threads import HandlerThread, is_async
from .topics import TopicFilter

if TYPE_CHECKING:
    from ._runtime.engine import Engine

__all__ = ["Handler", "Subscription", "SubscriptionStats"]

T = TypeVar("T")

Handler = Callable[[Any], Any]
"""Called with a `Message` (or a `Gap`, for ``gaps=True``). Plain functions run in a thread."""

logger = logging.getLogger("pubsub_core")

_NO_PARAMS: Mapping[str, str] = MappingProxyType({})
# A handler that never waits would otherwise keep the event loop to itself.
_BURST = 64
# Looking up a member of an enumeration costs as much as making a frame in Python 3.11.
_ACK = Verdict.ACK


class _Settler:
    """One message's single decision; a second one is ignored."""

    __slots__ = ("_delivery", "_host")

    def __init__(self, host: Engine, delivery: Delivery | None) -> None:
        self._host = host
        self._delivery = delivery

    @property
    def open(self) -> bool:
        """Whether the decision is still to be made."""
        return self._delivery is not None

    def __call__(self, verdict: Verdict) -> None:
        self._host.check_verdict(verdict)
        self.finish(verdict)

    def finish(self, verdict: Verdict) -> None:
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            # Messages may be acknowledged from a plain handler's thread.
            self._host.on_loop(delivery.decide, verdict)


@dataclass(frozen=True, slots=True)
class SubscriptionStats:
    """Counters of one subscription.

    Attributes:
        received: Messages that arrived for it.
        delivered: Messages its consumer got.
        dropped: Messages its overflow policy dropped.
        dropped_bytes: Payload bytes of these.
        failed: Messages whose decoding or handler raised.
        buffered: Messages waiting now.
        buffered_bytes: Payload bytes waiting now.
    """

    received: int = 0
    delivered: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    failed: int = 0
    buffered: int = 0
    buffered_bytes: int = 0


class Subscription(Generic[T]):
    """A subscription of one bus: an async iterator of messages, or a handler at work.

    Made by `Bus.subscribe`. Entering it with ``async with``, or awaiting it, returns when the
    broker has confirmed it; leaving the block, or `close`, ends it. Iterating yields each
    `Message`, and each `Gap` with ``gaps=True``. A wait that is cancelled loses nothing.
    """

    def __init__(
        self,
        host: Engine,
        filter: TopicFilter,
        *,
        group: str | None,
        qos: int,
        settings: SubscriptionSettings,
        decoder: Callable[[str, bytes, str | None], Any] | None,
        handler: Handler | None,
        start: Callable[[Subscription[Any]], Awaitable[None]],
        stop: Callable[[Subscription[Any]], Awaitable[None]],
    ) -> None:
        self._host = host
        self._filter = filter
        self.group = group
        self.qos = qos
        self.settings = settings
        self._decoder = decoder
        self._handler = handler
        self._start = start
        self._stop = stop
        self._params = filter.params if filter.captures else None
        # Whether a message is made without decoding and captures.
        self._plain = decoder is None and not filter.captures
        self.buffer = Buffer(
            filter.text,
            settings,
            now=host.clock.time,
            pause=lambda: host.pause(self),
            unpause=lambda: host.unpause(self),
        )
        self.put = self.buffer.put
        self._delivered = 0
        self._failed = 0
        self._started = False
        self._entering = asyncio.Lock()
        self._abandoned = False
        self._current: _Settler | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: HandlerThread | None = None
        self._unusable = _Settler(host, None)
        self._chain: CallNext | None = None
        self._retained: set[str] = set()

    # --- what users see ----------------------------------------------------------------

    @property
    def filter(self) -> str:
        """The filter as it was given, captures included."""
        return self._filter.text

    @property
    def topic_filter(self) -> TopicFilter:
        """The filter, parsed."""
        return self._filter

    @property
    def ack(self) -> Literal["auto", "manual"]:
        """Who acknowledges: the subscription after handling, or the consumer itself."""
        return self.settings.ack

    @property
    def active(self) -> bool:
        """Whether it is in place and can still receive."""
        return self._started and self.buffer.open

    @property
    def stats(self) -> SubscriptionStats:
        """The counters, as they are now."""
        buffer = self.buffer
        return SubscriptionStats(
            received=buffer.received,
            delivered=self._delivered,
            dropped=buffer.dropped,
            dropped_bytes=buffer.dropped_bytes,
            failed=self._failed,
            buffered=len(buffer),
            buffered_bytes=buffer.bytes,
        )

    def __repr__(self) -> str:
        return f"<Subscription {self.filter!r} buffered={len(self.buffer)}>"

    def __await__(self) -> Generator[Any, None, Subscription[T]]:
        return self._enter().__await__()

    async def __aenter__(self) -> Subscription[T]:
        return await self._enter()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None and self._current is not None:
            # The block was left in the middle of this message.
            self._current.finish(Verdict.NACK if self._host.can_nack else Verdict.REJECT)
        await self.close()

    async def close(self) -> None:
        """End the subscription; nothing is delivered after this returns. Idempotent.

        The message that was iterated to last counts as handled.

        Safe from within its own handler, which is then left to finish.
        """
        if self._current is not None:
            self._current.finish(_ACK)
            self._current = None
        self.end()
        try:
            await self._stop(self)
        finally:
            await self.stop_handler(asyncio.current_task())

    def __aiter__(self) -> AsyncIterator[Message[T]]:
        return self

    async def __anext__(self) -> Message[T]:
        # With gaps=True it yields Gap as well; typing every loop for that would burden
        # the many who do not ask for gaps.
        item = await self._next()
        if item is None:
            raise StopAsyncIteration
        return item

    async def get(self, timeout: float | None = None) -> Message[T]:
        """Return the next message, waiting at most *timeout* seconds.

        Raises:
            TimeoutError: Nothing came in time; nothing is lost.
            BusClosed: The subscription has ended.
        """
        try:
            async with asyncio.timeout(timeout):
                item = await self._next()
        except TimeoutError as error:
            if isinstance(error, PubSubError) or timeout is None:
                raise
            raise TimeoutError(f"no message of {self.filter!r} within {timeout:g} s") from None
        if item is None:
            raise BusClosed(f"the subscription to {self.filter!r} has ended")
        return item

    # --- what the router calls ---------------------------------------------------------

    def first_retained(self, topic: str) -> bool:
        """Note a retained message; return whether it is the topic's first in this session.

        The broker repeats retained messages for every local subscription that joins.
        """
        if topic in self._retained:
            return False
        self._retained.add(topic)
        return True

    def renewed(self) -> None:
        """Learn that a new session begins, in which retained messages come again."""
        self._retained.clear()

    def put_gap(self, gap: Gap) -> None:
        """Mark a hole at this place of the stream."""
        self.buffer.put_gap(gap)

    def end(self) -> None:
        """Take nothing more; what is buffered is given up, waiting consumers return."""
        self.buffer.end(Verdict.NACK if self._host.can_nack else Verdict.REJECT)

    def abandon(self) -> None:
        """End because the bus is closed: what was not handled stays with the broker."""
        self._abandoned = True
        self.buffer.end(Verdict.NACK if self._host.can_nack else None)

    def start(self) -> None:
        """Begin to hand messages to the handler, where there is one."""
        self._started = True
        if self._handler is None:
            self._chain = self._host.receive_chain(_keep)
        elif self._task is None:
            self._task = self._host.spawn(self._serve(self._handler), f"handler {self.filter}")

    @property
    def handler_task(self) -> asyncio.Task[None] | None:
        """The task that runs the handler, where there is one."""
        return self._task

    # --- consuming ---------------------------------------------------------------------

    async def _enter(self) -> Subscription[T]:
        # Entered twice at once, it is one subscription all the same.
        async with self._entering:
            if not self._started:
                await self._start(self)
        return self

    async def _next(self) -> Message[T] | None:
        # Asking for the next message says that the last one is handled.
        if self._current is not None:
            self._current.finish(_ACK)
            self._current = None
        while True:
            item = await self.buffer.take()
            if item is None:
                return None
            if isinstance(item, Gap):
                return cast("Message[T]", item)
            made = self._message(item)
            if made is None:
                continue
            message, settler = made
            if self._chain is not None:
                try:
                    passed = await self._chain(self._context(message))
                except asyncio.CancelledError:
                    if settler.open or settler is self._unusable:
                        self.buffer.give_back(item)  # whoever waits next gets it
                    raise
                except BaseException:
                    self._failed += 1
                    settler.finish(Verdict.REJECT)
                    raise
                if passed is None:
                    settler.finish(Verdict.ACK)
                    continue
                message = passed.received()
            if self.settings.ack == "auto":
                self._current = settler
            self._delivered += 1
            return message

    def _message(self, item: Item) -> tuple[Message[T], _Settler] | None:
        frame, delivery = item
        if self._plain and delivery is None:
            message = Message(frame.topic, frame.payload, _NO_PARAMS, frame, self._unusable)
            return cast("Message[T]", message), self._unusable
        settler = self._unusable if delivery is None else _Settler(self._host, delivery)
        payload: Any = frame.payload
        if self._decoder is not None:
            try:
                payload = self._decoder(frame.topic, payload, frame.content_type)
            except DecodeFailed as error:
                self._failed += 1
                self._undecodable(frame, settler, error)
                return None
        params = _NO_PARAMS if self._params is None else self._params(frame.topic)
        return Message(frame.topic, payload, params, frame, settler), settler

    def _undecodable(self, frame: InFrame, settler: _Settler, error: DecodeFailed) -> None:
        settler.finish(Verdict.REJECT)
        policy = self.settings.on_decode_error
        if policy == "dead_letter":
            self._host.dead_letter(self.settings.dead_letter or "", frame, error)
        elif policy == "raise":
            if self._handler is None:
                raise error
            self._report(error, frame.topic)

    def _report(self, error: BaseException, topic: str) -> None:
        failed = HandlerFailed(
            f"handling a message of {topic!r} failed: {type(error).__name__}",
            filter=self.filter,
            topic=topic,
        )
        failed.__cause__ = error
        logger.error("%s (subscription %r)", failed, self.filter, exc_info=error)
        self._host.handler_failed(failed)

    # --- handlers ----------------------------------------------------------------------

    async def _serve(self, handler: Handler) -> None:
        call = self._caller(handler)
        chain = self._host.receive_chain(_through(call))
        buffer = self.buffer
        burst = 0
        while True:
            if buffer.ready:
                item = buffer.pop()
            else:
                try:
                    taken = await buffer.take()
                except PubSubError as error:
                    self._report(error, self.filter)
                    return
                if taken is None:
                    return
                item = taken
            if isinstance(item, Gap):
                await self._guarded(call, item)
                continue
            made = self._message(item)
            if made is None:
                continue
            message, settler = made
            try:
                if chain is None:
                    result = call(message)
                    if result is not None:
                        await result
                else:
                    await chain(self._context(message))
            except asyncio.CancelledError:
                if not self._abandoned:
                    settler.finish(Verdict.NACK if self._host.can_nack else Verdict.REJECT)
                if self._cancelled():
                    raise
                # The handler's own cancellation ends this message, not the subscription.
                self._failed += 1
            except Exception as error:  # noqa: BLE001 - user code may raise anything
                self._failed += 1
                self._report(error, message.topic)
                if self.settings.dead_letter is not None:
                    self._host.dead_letter(self.settings.dead_letter, message.frame, error)
                settler.finish(Verdict.REJECT)
            else:
                self._delivered += 1
                if settler is not self._unusable and self.settings.ack == "auto":
                    settler.finish(_ACK)
            burst += 1
            if burst >= _BURST:
                burst = 0
                await asyncio.sleep(0)

    def _context(self, message: Message[T]) -> Context:
        return Context(
            direction=Direction.RECEIVE,
            topic=message.topic,
            payload=message.payload,
            headers=dict(message.headers),
            message=message,
            bus=self._host.bus,
            subscription=self,
        )

    def _cancelled(self) -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    async def _guarded(self, call: Callable[[Any], Awaitable[Any] | None], gap: Gap) -> None:
        try:
            result = call(gap)
            if result is not None:
                await result
        except asyncio.CancelledError:
            if self._cancelled():
                raise
            self._failed += 1
        except Exception as error:  # noqa: BLE001 - user code may raise anything
            self._failed += 1
            self._report(error, self.filter)

    def _caller(self, handler: Handler) -> Callable[[Any], Awaitable[Any] | None]:
        if is_async(handler):
            return handler
        thread = self._thread = HandlerThread(f"pubsub-{self.filter}")
        return lambda message: thread.call(handler, message)

    async def stop_handler(self, caller: asyncio.Task[Any] | None) -> None:
        """Cancel the handler's task and wait for it, unless *caller* is that task."""
        task, thread = self._task, self._thread
        if task is not None and task is not caller and not task.done():
            task.cancel()
            await asyncio.wait([task])
        if thread is not None:
            thread.stop()


async def _keep(context: Context) -> Context:
    return context


def _through(call: Callable[[Any], Awaitable[Any] | None]) -> Callable[[Context], Awaitable[Any]]:
    async def terminal(context: Context) -> Any:
        result = call(context.received())
        return None if result is None else await result

    return terminal
