"""One local subscription: its buffer, its overflow policy, and who consumes it.

There is exactly one queue between a backend and the consumer, bounded in messages and in
bytes. The router puts frames in without ever waiting; the consumer, an ``async for`` or a
handler, takes them out, and decoding happens there. What the policy drops is counted, and
is a `Gap` in the stream for who asked for gaps.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, get_args

from .errors import BusClosed, DecodeFailed, HandlerFailed, PubSubError, SubscriptionOverflow
from .events import Gap, GapReason
from .message import InFrame, Message, Verdict
from .middleware import CallNext, Context, Direction
from .settings import OverflowPolicy
from .topics import TopicFilter

if TYPE_CHECKING:
    from .bus import Bus

__all__ = [
    "DecodePolicy",
    "Delivery",
    "Handler",
    "Subscription",
    "SubscriptionSettings",
    "SubscriptionStats",
]

T = TypeVar("T")

Handler = Callable[[Any], Any]
"""Called with a `Message` (or a `Gap`, for ``gaps=True``). Plain functions run in a thread."""

DecodePolicy = Literal["raise", "skip", "dead_letter"]

logger = logging.getLogger("pubsub_core")

_NO_PARAMS: Mapping[str, str] = MappingProxyType({})
# A handler that never waits would otherwise keep the event loop to itself.
_BURST = 64
# An idle thread ends within microseconds; the bound is for a machine that stands still.
_IDLE_JOIN = 1.0


class Delivery:
    """A frame that waits for a decision of every subscription that received it."""

    __slots__ = ("_remaining", "_settle", "_tag", "_verdict")

    def __init__(
        self, tag: object, receivers: int, settle: Callable[[object, Verdict], None]
    ) -> None:
        self._tag = tag
        self._remaining = receivers
        self._settle = settle
        self._verdict = Verdict.ACK

    def decide(self, verdict: Verdict) -> None:
        """Note one receiver's decision; the last one settles the frame with the worst."""
        if verdict is Verdict.NACK or self._verdict is Verdict.ACK:
            self._verdict = verdict
        self._remaining -= 1
        if self._remaining == 0:
            self._settle(self._tag, self._verdict)


class _Settler:
    """One message's single decision; a second one is ignored."""

    __slots__ = ("_bus", "_delivery")

    def __init__(self, bus: Bus, delivery: Delivery | None) -> None:
        self._bus = bus
        self._delivery = delivery

    def __call__(self, verdict: Verdict) -> None:
        self._bus.check_verdict(verdict)
        self.finish(verdict)

    def finish(self, verdict: Verdict) -> None:
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            # Messages may be acknowledged from a plain handler's thread.
            self._bus.on_loop(delivery.decide, verdict)


@dataclass(slots=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionSettings:
    """What a caller of `Bus.subscribe` asked for, checked and complete."""

    buffer: int
    buffer_bytes: int
    overflow: OverflowPolicy
    ack: Literal["auto", "manual"] = "auto"
    gaps: bool = False
    on_decode_error: DecodePolicy = "raise"
    dead_letter: str | None = None

    def check(self) -> None:
        """Raise ValueError for a value that makes no sense."""
        if self.buffer < 1 or self.buffer_bytes < 1:
            raise ValueError("buffer and buffer_bytes are 1 or more; a queue is never unbounded")
        if self.overflow not in get_args(OverflowPolicy):
            raise ValueError(
                f"overflow={self.overflow!r}; pass one of {', '.join(get_args(OverflowPolicy))}"
            )
        if self.on_decode_error not in get_args(DecodePolicy):
            raise ValueError(
                f"on_decode_error={self.on_decode_error!r}; "
                f"pass one of {', '.join(get_args(DecodePolicy))}"
            )


_Item = tuple[InFrame, Delivery | None]


class _Entry:
    """A waiting message that a newer one of its topic may replace."""

    __slots__ = ("delivery", "frame")

    def __init__(self, frame: InFrame, delivery: Delivery | None) -> None:
        self.frame = frame
        self.delivery = delivery


class Subscription(Generic[T]):
    """A subscription of one bus: an async iterator of messages, or a handler at work.

    Made by `Bus.subscribe`. Entering it with ``async with``, or awaiting it, returns when the
    broker has confirmed it; leaving the block, or `close`, ends it. Iterating yields each
    `Message`, and each `Gap` with ``gaps=True``. A wait that is cancelled loses nothing.
    """

    def __init__(
        self,
        bus: Bus,
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
        self._bus = bus
        self._filter = filter
        self.group = group
        self.qos = qos
        self.settings = settings
        self._decoder = decoder
        self._handler = handler
        self._start = start
        self._stop = stop
        self.stats = SubscriptionStats()
        self._params = filter.params if filter.captures else None
        self._buffer: deque[_Item | _Entry | Gap] = deque()
        # With overflow="latest": the one waiting entry of each topic.
        self._newest: dict[str, _Entry] | None = {} if settings.overflow == "latest" else None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._failure: PubSubError | None = None
        self._ended = False
        self._started = False
        self._paused = False
        self._current: _Settler | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: _HandlerThread | None = None
        self._unusable = _Settler(bus, None)
        self._chain: CallNext | None = None
        self._held: list[_Item] | None = None
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
        return self._started and not self._ended and self._failure is None

    def __repr__(self) -> str:
        return f"<Subscription {self.filter!r} buffered={self.stats.buffered}>"

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
        await self.close()

    async def close(self) -> None:
        """End the subscription; nothing is delivered after this returns. Idempotent.

        Safe from within its own handler, which is then left to finish.
        """
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
        async with asyncio.timeout(timeout):
            item = await self._next()
        if item is None:
            raise BusClosed(f"the subscription to {self.filter!r} has ended")
        return item

    # --- what the router calls ---------------------------------------------------------

    def put(self, frame: InFrame, delivery: Delivery | None) -> None:
        """Take one frame; never waits. Applies the overflow policy."""
        if self._held is not None:
            self._hold(frame, delivery)
            return
        stats = self.stats
        stats.received += 1
        if self._ended or self._failure is not None:
            if delivery is not None:
                delivery.decide(Verdict.ACK)
            return
        settings = self.settings
        size = len(frame.payload)
        if self._newest is not None and (older := self._newest.get(frame.topic)) is not None:
            self._replace(older, frame, delivery)
            return
        if (
            stats.buffered >= settings.buffer or stats.buffered_bytes + size > settings.buffer_bytes
        ) and not self._make_room(frame, delivery, size):
            return
        if self._newest is None:
            self._buffer.append((frame, delivery))
        else:
            self._newest[frame.topic] = entry = _Entry(frame, delivery)
            self._buffer.append(entry)
        stats.buffered += 1
        stats.buffered_bytes += size
        if self._waiters:
            self._wake()

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

    def hold(self) -> None:
        """Keep what arrives aside until `replay`."""
        self._held = []

    def replay(self, frames: Iterable[InFrame]) -> None:
        """Take stored *frames*, then what arrived meanwhile, each message once."""
        held, self._held = self._held or [], None
        seen: set[tuple[str, str]] = set()
        for frame in frames:
            if frame.id is not None:
                seen.add((frame.topic, frame.id))
            self.put(frame, None)
        for frame, delivery in held:
            if frame.id is None or (frame.topic, frame.id) not in seen:
                self.put(frame, delivery)
            elif delivery is not None:
                delivery.decide(Verdict.ACK)

    def _hold(self, frame: InFrame, delivery: Delivery | None) -> None:
        held = self._held
        if held is None:
            return
        held.append((frame, delivery))
        if len(held) > self.settings.buffer:
            self.stats.received += 1
            self._drop(*held.pop(0))

    def put_gap(self, gap: Gap) -> None:
        """Mark a hole at this place of the stream, for those who asked for gaps."""
        if self.settings.gaps and not self._ended and self._failure is None:
            self._buffer.append(gap)
            self._wake()

    def start(self) -> None:
        """Begin to hand messages to the handler, where there is one."""
        self._started = True
        if self._handler is None:
            self._chain = self._bus.receive_chain(_keep)
        elif self._task is None:
            self._task = self._bus.spawn(self._serve(self._handler), f"handler {self.filter}")

    def end(self) -> None:
        """Take nothing more; what is buffered is given up, waiting consumers return."""
        if not self._ended:
            self._ended = True
            self._abandon()
            self._wake_all()

    def finish(self) -> None:
        """Take nothing more from the broker; what is buffered can still be consumed."""
        self._ended = True
        self._wake_all()

    def fail(self, error: PubSubError) -> None:
        """Let the consumer raise *error* once it has taken what is buffered."""
        if self._failure is None and not self._ended:
            self._failure = error
            self._wake_all()

    @property
    def handler_task(self) -> asyncio.Task[None] | None:
        """The task that runs the handler, where there is one."""
        return self._task

    # --- the buffer --------------------------------------------------------------------

    def _make_room(self, frame: InFrame, delivery: Delivery | None, size: int) -> bool:
        policy = self.settings.overflow
        if policy == "block":
            # The backend stops; what it had already read is kept rather than lost.
            if not self._paused:
                self._paused = True
                self._bus.pause(self)
            return True
        if policy == "error":
            self.fail(
                SubscriptionOverflow(
                    f"the subscription to {self.filter!r} fell behind with "
                    f"{self.stats.buffered} messages waiting",
                    buffered=self.stats.buffered,
                    hint="consume faster, raise buffer=, or choose another overflow policy",
                    topic=self.filter,
                )
            )
            self._drop(frame, delivery)
            return False
        fits = size <= self.settings.buffer_bytes and self.settings.buffer > 0
        if policy == "drop_newest" or not fits:
            self._drop(frame, delivery)
            self._gap_at_end(1)
            return False
        while self.stats.buffered and (
            self.stats.buffered >= self.settings.buffer
            or self.stats.buffered_bytes + size > self.settings.buffer_bytes
        ):
            self._drop_oldest()
        return True

    def _drop(self, frame: InFrame, delivery: Delivery | None) -> None:
        self.stats.dropped += 1
        self.stats.dropped_bytes += len(frame.payload)
        if delivery is not None:
            delivery.decide(Verdict.REJECT)

    def _drop_oldest(self) -> None:
        before: list[Gap] = []
        while True:
            item = self._pop()
            if isinstance(item, Gap):
                before.append(item)
                continue
            break
        self._drop(*item)
        if self.settings.gaps:
            if before and before[-1].reason is GapReason.OVERFLOW:
                before[-1] = self._overflow_gap((before[-1].lost or 0) + 1, before[-1].since)
            else:
                before.append(self._overflow_gap(1))
        self._buffer.extendleft(reversed(before))

    def _replace(self, older: _Entry, frame: InFrame, delivery: Delivery | None) -> None:
        # The newer message takes the older one's place in the queue, so that a busy topic
        # cannot push a quiet one back for ever.
        self._drop(older.frame, older.delivery)
        self.stats.buffered_bytes += len(frame.payload) - len(older.frame.payload)
        older.frame, older.delivery = frame, delivery

    def _pop(self) -> _Item | Gap:
        item = self._buffer.popleft()
        if isinstance(item, Gap):
            return item
        if isinstance(item, _Entry):
            if self._newest is not None:
                del self._newest[item.frame.topic]
            item = (item.frame, item.delivery)
        self.stats.buffered -= 1
        self.stats.buffered_bytes -= len(item[0].payload)
        return item

    def _gap_at_end(self, lost: int) -> None:
        if not self.settings.gaps:
            return
        last = self._buffer[-1] if self._buffer else None
        if isinstance(last, Gap) and last.reason is GapReason.OVERFLOW:
            self._buffer[-1] = self._overflow_gap((last.lost or 0) + lost, last.since)
        else:
            self._buffer.append(self._overflow_gap(lost))
            self._wake()

    def _overflow_gap(self, lost: int, since: float | None = None) -> Gap:
        now = self._bus.clock.time()
        return Gap(GapReason.OVERFLOW, lost, False, since or now, now, self.filter)

    def _abandon(self) -> None:
        while self._buffer:
            item = self._pop()
            if not isinstance(item, Gap) and item[1] is not None:
                item[1].decide(Verdict.NACK if self._bus.can_nack else Verdict.REJECT)
        self._unpause()

    def _unpause(self) -> None:
        if self._paused and self.stats.buffered * 2 <= self.settings.buffer:
            self._paused = False
            self._bus.unpause(self)

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        while self._waiters:
            self._wake()

    # --- consuming ---------------------------------------------------------------------

    async def _enter(self) -> Subscription[T]:
        if not self._started:
            await self._start(self)
        return self

    async def _take(self) -> _Item | Gap | None:
        """Return the next item, waiting for it; None when there will be none."""
        while True:
            if self._buffer:
                item = self._pop()
                if self._paused:
                    self._unpause()
                return item
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return None
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # this wake-up was meant for somebody who still waits
                raise

    async def _next(self) -> Message[T] | None:
        # Asking for the next message says that the last one is handled.
        if self._current is not None:
            self._current.finish(Verdict.ACK)
            self._current = None
        while True:
            item = await self._take()
            if item is None:
                return None
            if isinstance(item, Gap):
                return cast("Message[T]", item)
            message, settler = self._message(item)
            if message is None:
                continue
            if self._chain is not None:
                passed = await self._chain(self._context(message))
                if passed is None:
                    settler.finish(Verdict.ACK)
                    continue
                message = cast("Message[T]", passed.message)
            if self.settings.ack == "auto":
                self._current = settler
            self.stats.delivered += 1
            return message

    def _message(self, item: _Item) -> tuple[Message[T] | None, _Settler]:
        frame, delivery = item
        settler = self._unusable if delivery is None else _Settler(self._bus, delivery)
        payload: Any = frame.payload
        if self._decoder is not None:
            try:
                payload = self._decoder(frame.topic, payload, frame.content_type)
            except DecodeFailed as error:
                self.stats.failed += 1
                self._undecodable(frame, settler, error)
                return None, settler
        params = _NO_PARAMS if self._params is None else self._params(frame.topic)
        return Message(frame.topic, payload, params, frame, settler), settler

    def _undecodable(self, frame: InFrame, settler: _Settler, error: DecodeFailed) -> None:
        settler.finish(Verdict.REJECT)
        policy = self.settings.on_decode_error
        if policy == "dead_letter":
            self._bus.dead_letter(self.settings.dead_letter or "", frame, error)
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
        self._bus.handler_failed(failed)

    # --- handlers ----------------------------------------------------------------------

    async def _serve(self, handler: Handler) -> None:
        call = self._caller(handler)
        chain = self._bus.receive_chain(_through(call))
        burst = 0
        while True:
            try:
                item = await self._take()
            except PubSubError as error:
                self._report(error, self.filter)
                return
            if item is None:
                return
            if isinstance(item, Gap):
                await self._guarded(call(item), self.filter)
                continue
            message, settler = self._message(item)
            if message is None:
                continue
            try:
                if chain is None:
                    result = call(message)
                    if result is not None:
                        await result
                else:
                    await chain(self._context(message))
            except asyncio.CancelledError:
                settler.finish(Verdict.NACK if self._bus.can_nack else Verdict.REJECT)
                if self._cancelled():
                    raise
                # The handler's own cancellation ends this message, not the subscription.
                self.stats.failed += 1
            except Exception as error:  # noqa: BLE001 - user code may raise anything
                self.stats.failed += 1
                self._report(error, message.topic)
                if self.settings.dead_letter is not None:
                    self._bus.dead_letter(self.settings.dead_letter, message.frame, error)
                settler.finish(Verdict.REJECT)
            else:
                self.stats.delivered += 1
                if self.settings.ack == "auto":
                    settler.finish(Verdict.ACK)
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
            bus=self._bus,
            subscription=self,
        )

    def _cancelled(self) -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    async def _guarded(self, result: Awaitable[Any] | None, topic: str) -> None:
        try:
            if result is not None:
                await result
        except Exception as error:  # noqa: BLE001 - user code may raise anything
            self.stats.failed += 1
            self._report(error, topic)

    def _caller(self, handler: Handler) -> Callable[[Any], Awaitable[Any] | None]:
        if _is_async(handler):
            return handler
        thread = self._thread = _HandlerThread(f"pubsub-{self.filter}")
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
        result = call(context.message)
        return None if result is None else await result

    return terminal


def _is_async(handler: Handler) -> bool:
    call = handler if inspect.isroutine(handler) else getattr(handler, "func", handler)
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
        getattr(call, "__call__", None)  # noqa: B004 - an instance with an async __call__
    )


class _HandlerThread:
    """One daemon thread that runs a plain handler's calls in order.

    A daemon, because a handler that never returns must not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[
            tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Handler, Any] | None
        ] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False

    def call(self, handler: Handler, argument: Any) -> asyncio.Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._calls.put((loop, future, handler, argument))
        return future

    def stop(self) -> None:
        """End the thread after the call at hand; wait for it only if it is idle."""
        if self._thread is not None:
            self._calls.put(None)
            if not self._busy:
                self._thread.join(_IDLE_JOIN)

    def _run(self) -> None:
        while True:
            self._busy = False
            call = self._calls.get()
            if call is None:
                return
            self._busy = True
            loop, future, handler, argument = call
            try:
                result, error = handler(argument), None
            except Exception as exc:  # noqa: BLE001 - handed to whoever awaits the future
                result, error = None, exc
            try:
                loop.call_soon_threadsafe(_resolve, future, result, error)
            except RuntimeError:  # the loop was closed while the handler ran
                return


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
