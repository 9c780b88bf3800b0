"""The inner half of a subscription: from its buffer to an ``async for`` or a handler.

The router puts frames into the subscriber's `Buffer` without ever waiting; the consumer takes
them out. Decoding, middleware and user code run there, never on a network path.

A program holds a `Subscription`, which sees its subscriber and nothing else. In the other
direction the subscriber of an iterator knows its `Subscription` weakly, so that one that its
program has dropped can be noticed; a handler's lives as long as the handler.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

from pubsub_core.clock import Clock
from pubsub_core.errors import (
    BusClosed,
    DecodeFailed,
    HandlerFailed,
    NotConnected,
    OperationTimeout,
    PubSubError,
)
from pubsub_core.events import Gap, Notice
from pubsub_core.message import InFrame, Message, Verdict
from pubsub_core.middleware import CallNext, Context, Direction
from pubsub_core.stats import BusStats
from pubsub_core.subscription import Handler, Subscription, SubscriptionStats, check_number
from pubsub_core.threads import HandlerThread, is_async
from pubsub_core.topics import TopicFilter

from .buffer import Buffer, Settlement, SubscriptionSettings

__all__ = ["Subscriber", "SubscriberHost"]

logger = logging.getLogger("pubsub_core")

_NO_PARAMS: Mapping[str, str] = MappingProxyType({})
# A handler that never waits would otherwise keep the event loop to itself.
_BURST = 64
# Looking up a member of an enumeration costs as much as making a frame in Python 3.11.
_ACK = Verdict.ACK


class SubscriberHost(Protocol):
    """The engine, as a subscriber sees it."""

    @property
    def bus(self) -> object:
        """The bus, for middleware."""
        ...

    @property
    def clock(self) -> Clock:
        """The clock that the bus goes by."""
        ...

    @property
    def counters(self) -> BusStats:
        """The counters of the bus."""
        ...

    @property
    def can_nack(self) -> bool:
        """Whether the broker redelivers a message that is given back."""
        ...

    @property
    def handlers_run(self) -> asyncio.Event:
        """Not set while new handlers are to wait."""
        ...

    def pause(self, subscriber: Subscriber) -> None:
        """Hold the broker back until *subscriber* has room."""
        ...

    def unpause(self, subscriber: Subscriber) -> None:
        """Let the broker go on, once no other subscriber is full."""
        ...

    def check_verdict(self, verdict: Verdict) -> None:
        """Raise NotSupported for a verdict that the broker cannot follow."""
        ...

    def on_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call *function* on the bus's loop: now, if this is it."""
        ...

    def receive_chain(self, terminal: CallNext) -> CallNext | None:
        """Return the middleware around *terminal*, or None where there is none."""
        ...

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run *work* in a task that ends with the bus."""
        ...

    def dead_letter(self, topic: str, frame: InFrame, error: BaseException) -> None:
        """Publish a message that could not be handled to *topic*."""
        ...

    def handler_failed(self, error: HandlerFailed) -> None:
        """Count a failure, and tell the listeners."""
        ...

    def notice(self, notice: Notice) -> None:
        """Tell the listeners."""
        ...


class _Settler:
    """One message's single decision; a second one is ignored."""

    __slots__ = ("_host", "_settlement")

    def __init__(self, host: SubscriberHost, settlement: Settlement | None) -> None:
        self._host = host
        self._settlement = settlement

    @property
    def open(self) -> bool:
        """Whether the decision is still to be made."""
        return self._settlement is not None

    def __call__(self, verdict: Verdict) -> None:
        self._host.check_verdict(verdict)
        self.finish(verdict)

    def finish(self, verdict: Verdict) -> None:
        settlement, self._settlement = self._settlement, None
        if settlement is not None:
            # Messages may be acknowledged from a plain handler's thread.
            self._host.on_loop(settlement.decide, verdict)


class Subscriber:
    """Consumes the messages of one local subscription.

    Attributes:
        topic_filter: The filter, parsed.
        settings: Its options, checked and complete.
        buffer: Messages that wait for the consumer.
        put: Takes one frame; `Buffer.put` itself, since the router calls it per message.
    """

    def __init__(
        self,
        host: SubscriberHost,
        filter: TopicFilter,
        settings: SubscriptionSettings,
        *,
        decoder: Callable[[str, bytes, str | None], Any] | None,
        handler: Handler | None,
        start: Callable[[Subscriber], Awaitable[None]],
        stop: Callable[[Subscriber], Awaitable[None]],
    ) -> None:
        self._host = host
        self.topic_filter = filter
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
            stats=host.counters,
            now=host.clock.time,
            pause=lambda: host.pause(self),
            unpause=lambda: host.unpause(self),
            report=self._overflowed,
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
        self._handle: Callable[[], Subscription[Any] | None] = lambda: None

    def handle(self) -> Subscription[Any]:
        """Return the program's half; called once."""
        handle = Subscription[Any](self)
        # Nobody iterates a handler's subscription, and most programs drop it at once.
        self._handle = weakref.ref(handle) if self._handler is None else lambda: handle
        return handle

    # --- what the program's half calls -----------------------------------------------------

    @property
    def filter(self) -> str:
        """The filter as it was given, captures included."""
        return self.topic_filter.text

    @property
    def ack(self) -> Literal["auto", "manual"]:
        """Who acknowledges: the subscriber after handling, or the consumer itself."""
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

    async def enter(self) -> None:
        """Return when the broker has confirmed the subscription."""
        # Entered twice at once, it is one subscription all the same.
        async with self._entering:
            if not self._started:
                await self._start(self)

    async def close(self, *, failed: bool = False) -> None:
        """End the subscription; nothing is delivered after this returns. Idempotent.

        Args:
            failed: The consumer was left in the middle of its last message, which then counts
                as not handled.
        """
        if self._current is not None:
            self._current.finish(self._give_back if failed else _ACK)
            self._current = None
        self.end()
        try:
            await self._stop(self)
        finally:
            await self.stop_handler(asyncio.current_task())

    async def drain(self, timeout: float | None) -> bool:
        """Take no more and wait for the handler; return whether it was done in time."""
        self.buffer.finish()
        task = self._task
        if task is None or task is asyncio.current_task():
            return True
        done, _ = await asyncio.wait([task], timeout=timeout)
        return bool(done)

    async def next(self) -> Message[Any]:
        """Return the next message, or a gap where gaps were asked for.

        Raises:
            StopAsyncIteration: There will be none.
        """
        if not self._started and self.buffer.open:
            raise NotConnected(
                f"the subscription to {self.filter!r} was not entered, so nothing would come",
                hint="write `async with bus.subscribe(...) as messages`, or `messages = await "
                "bus.subscribe(...)`, before `async for`",
                topic=self.filter,
                retryable=False,
            )
        # Asking for the next message says that the last one is handled.
        if self._current is not None:
            self._current.finish(_ACK)
            self._current = None
        buffer = self.buffer
        while True:
            # Without the question `take` would do, and cost a coroutine for each message.
            item = buffer.pop() if buffer.ready else await buffer.take()
            if item is None:
                raise StopAsyncIteration
            if isinstance(item, Gap):
                return item  # type: ignore[return-value]  # see `Subscription.__anext__`
            frame, settlement = item
            if self._plain and settlement is None:  # as in `_serve`
                settler = self._unusable
                message = Message(frame.topic, frame.payload, _NO_PARAMS, frame, settler)
            else:
                made = self._message(frame, settlement)
                if made is None:
                    continue
                message, settler = made
            if self._chain is not None:
                try:
                    passed = await self._chain(self._context(message))
                except asyncio.CancelledError:
                    if settler.open or settler is self._unusable:
                        buffer.give_back(item)  # the next one to ask gets it
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

    async def get(self, timeout: float | None) -> Message[Any]:
        """Return the next message; see `Subscription.get`."""
        check_number("timeout", timeout)
        try:
            async with asyncio.timeout(timeout):
                return await self.next()
        except StopAsyncIteration:
            raise BusClosed(f"the subscription to {self.filter!r} has ended") from None
        except TimeoutError as error:
            if isinstance(error, PubSubError) or timeout is None:
                raise
            raise OperationTimeout(
                f"no message of {self.filter!r} within {timeout:g} s",
                hint="nothing is lost; ask again, or wait longer",
                topic=self.filter,
            ) from None

    # --- what the bus calls ----------------------------------------------------------------

    def first_retained(self, topic: str) -> bool:
        """Note a retained message; return whether it is the topic's first in this session.

        The broker repeats retained messages for every local subscription that joins.
        """
        if topic in self._retained:
            return False
        self._retained.add(topic)
        return True

    def forget_retained(self) -> None:
        """Let retained messages pass again: a new session repeats them."""
        self._retained.clear()

    def end(self) -> None:
        """Give up the buffered messages and take no more; waiting consumers return."""
        self.buffer.end(self._give_back)

    def abandon(self) -> None:
        """End because the bus is closed: unhandled messages stay with the broker."""
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

    async def stop_handler(self, caller: asyncio.Task[Any] | None) -> None:
        """Cancel the handler's task and wait for it, unless *caller* is that task."""
        task, thread = self._task, self._thread
        if task is not None and task is not caller and not task.done():
            task.cancel()
            await asyncio.wait([task])
        if thread is not None:
            thread.stop()

    # --- messages --------------------------------------------------------------------------

    @property
    def _give_back(self) -> Verdict:
        return Verdict.NACK if self._host.can_nack else Verdict.REJECT

    def _message(
        self, frame: InFrame, settlement: Settlement | None
    ) -> tuple[Message[Any], _Settler] | None:
        """Return a message and its settler; None when it could not be decoded."""
        settler = self._unusable if settlement is None else _Settler(self._host, settlement)
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

    def _overflowed(self, lost: int, seconds: float) -> None:
        settings = self.settings
        text = (
            f"the subscription to {self.filter!r} dropped {lost} messages within {seconds:.1f} s "
            f"(overflow={settings.overflow!r}): its consumer is slower than they come; consume "
            f"faster, raise buffer= ({settings.buffer} messages) or buffer_bytes= "
            f"({settings.buffer_bytes}), or choose another overflow policy"
        )
        # A consumer that asked for gaps finds each one in its stream.
        logger.log(logging.INFO if settings.gaps else logging.WARNING, "%s", text)
        self._host.notice(Notice("overflow", text, topic=self.filter))

    def _context(self, message: Message[Any]) -> Context:
        return Context(
            direction=Direction.RECEIVE,
            topic=message.topic,
            payload=message.payload,
            headers=dict(message.headers),
            message=message,
            bus=self._host.bus,
            subscription=self._handle(),
        )

    # --- the handler -----------------------------------------------------------------------

    async def _serve(self, handler: Handler) -> None:
        call = self._caller(handler)
        chain = self._host.receive_chain(_through(call))
        buffer = self.buffer
        run = self._host.handlers_run
        # One that waited with a full buffer would lose messages, or, where the buffer holds back
        # the broker, keep the answer away that it waits for.
        if buffer.full:
            run.set()
        elif not run.is_set():
            buffer.on_full(run.set)
            await run.wait()
            buffer.on_full(None)
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
            frame, settlement = item
            if self._plain and settlement is None:
                # The common case by far, so without the call. The message of a frame without
                # settlement cannot be acknowledged, and all of them share one settler.
                settler = self._unusable
                message = Message(frame.topic, frame.payload, _NO_PARAMS, frame, settler)
            else:
                made = self._message(frame, settlement)
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
                # A bus that closes leaves the message unanswered, so that the broker gives it
                # to the next session; giving it back would offer it to this one first.
                if not self._abandoned:
                    settler.finish(self._give_back)
                if self._cancelled():
                    raise
                # Raised by the handler itself, e.g. by a task that it awaits: this ends the
                # message, not the subscription.
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

    def _cancelled(self) -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def _caller(self, handler: Handler) -> Callable[[Any], Awaitable[Any] | None]:
        if is_async(handler):
            return handler
        thread = self._thread = HandlerThread(f"pubsub-{self.filter}")
        return lambda message: thread.call(handler, message)


async def _keep(context: Context) -> Context:
    return context


def _through(call: Callable[[Any], Awaitable[Any] | None]) -> Callable[[Context], Awaitable[Any]]:
    async def terminal(context: Context) -> Any:
        result = call(context.received())
        return None if result is None else await result

    return terminal
