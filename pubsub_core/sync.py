"""The bus without ``async``: the same names and arguments, safe from any thread.

::

    from pubsub_core import sync

    with sync.connect("memory://") as bus, bus.subscribe("lab/#", float) as readings:
        bus.publish("lab/oven/temp", 81.5)
        print(readings.get(timeout=1).payload)

Anything that async code awaits or enters is ready when the call returns: `connect` gives an
open bus, `SyncBus.subscribe` a confirmed subscription. Everything runs on one event loop in a
daemon thread that all buses share; it starts with the first and ends with the last one. A call
blocks its own thread only, ends at once on Ctrl-C, and may come from any thread, plain
handlers included.

Calls that can only hang raise `WrongLoop` instead: from inside a running event loop, and in
a child process that was forked while the bus was open.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, Unpack, overload

from . import bus as _bus
from .authorization import AuthorizationHandler, Authorizer, AuthorizerStats
from .bus import Bus
from .capabilities import Cap, ConfirmedBy, Guarantees, Limits, Support
from .clock import Clock
from .config import Config
from .config.bus_options import BusOptions
from .errors import BusClosed, PubSubError, WrongLoop
from .events import BusEvent, InterestEvent, Status
from .eventstream import EventStream
from .interest import InterestView, Notifications, Presence
from .interfaces import AuthorizationRequest, BackendInfo, Everything
from .message import Member, Message, Part, Receipt
from .middleware import Middleware
from .stats import BusStats
from .subscription import Handler, SubscribeOptions, Subscription, SubscriptionStats
from .threads import is_async

__all__ = [
    "SyncAuthorizer",
    "SyncBus",
    "SyncEventStream",
    "SyncNotifications",
    "SyncPresence",
    "SyncSubscription",
    "connect",
    "wrap",
]

T = TypeVar("T")
N = TypeVar("N")
R = TypeVar("R")
V = TypeVar("V", bound=InterestView)

_CHECK = 0.25
_EXIT_DRAIN = 2.0
_EXIT_LIMIT = 4.0
# An async handler that blocks its loop must not block the thread that closes the bus as well.
_STOP_LIMIT = 5.0
_JOIN_LIMIT = 1.0


def connect(
    where: str,
    /,
    *,
    require: Iterable[Cap] = (),
    clock: Clock | None = None,
    config: Config | None = None,
    **options: Any,
) -> SyncBus:
    """Return an open bus; ``with`` it, or call `SyncBus.close` when done.

    Arguments and errors are those of `pubsub_core.connect` and `Bus.open`.

    Raises:
        WrongLoop: Called inside a running event loop.

    Example:
        >>> with connect("memory://") as bus:
        ...     readings = bus.subscribe("lab/+/temp", float)
        ...     receipt = bus.publish("lab/oven/temp", 81.5)
        ...     readings.get(timeout=1).payload
        81.5
    """
    _refuse_running_loop(
        "sync.connect()", "`async with connect(...)` or `await connect(...)` of pubsub_core"
    )
    portal = _Portal.acquire()
    try:

        async def opened() -> Bus:
            bus = _bus.connect(where, require=require, clock=clock, config=config, **options)
            await bus.open()
            return bus

        bus = portal.call(opened, "connect")
    except BaseException:
        portal.release()
        portal.settle()
        raise
    portal.buses.add(bus)
    return SyncBus(bus, portal)


def wrap(bus: Bus) -> SyncBus:
    """Return a view of an async bus for other threads; call it on the bus's own loop.

    Closing either closes the bus.
    """
    return SyncBus(bus, _Caller(asyncio.get_running_loop()))


_here = threading.local()


def marked(handler: Handler, bus: Bus) -> Handler:
    """Return *handler*, and if it is a plain one note in its thread whose it is."""
    if is_async(handler):
        return handler

    def call(message: Any) -> Any:
        _here.bus = bus
        try:
            return handler(message)
        finally:
            _here.bus = None

    return call


class _Synchronous:
    """Something that lives on another thread's event loop."""

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller

    def _call(self, function: Callable[[], Awaitable[R]], name: str) -> R:
        return self._caller.call(function, name)

    def _next(self, iterator: AsyncIterator[R]) -> R:
        try:
            item = self._call(lambda: _step(iterator), "__next__")
        except _LoopEnded:
            item = None  # closed together with its bus, as any other end
        if item is None:
            raise StopIteration
        return item


class SyncBus(_Synchronous):
    """A `Bus` for code without an event loop. Made by `connect`; safe from any thread."""

    def __init__(self, bus: Bus, caller: _Caller) -> None:
        super().__init__(caller)
        self._bus = bus
        self._closing: asyncio.Future[None] | None = None

    # --- life --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SyncBus {self.name!r} {self.status.value}>"

    def open(self) -> None:
        """Connect; `connect` has done so already."""
        self._call(self._bus.open, "open")

    def close(self, *, drain: float | None = None) -> None:
        """End the bus; see `Bus.close`. Does nothing in a forked child: it is not its bus.

        From a plain handler of this very bus, which the bus waits for, it returns at once;
        the bus is closed when the handler has returned.
        """
        if self._caller.forked:
            return

        async def close() -> None:
            try:
                await self._bus.close(drain=drain)
            finally:
                if self._bus.status is Status.CLOSED:
                    self._caller.forget(self._bus)

        async def begin() -> None:
            self._closing = asyncio.ensure_future(close())

        with contextlib.suppress(BusClosed):  # its loop has ended, and it with that
            if getattr(_here, "bus", None) is self._bus:
                self._call(begin, "close")
            else:
                self._call(close, "close")
        self._caller.settle()

    # --- what it is --------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name in the configuration; for a URL its scheme, host and port."""
        return self._bus.name

    @property
    def info(self) -> BackendInfo:
        """The announcement of the backend."""
        return self._bus.info

    @property
    def status(self) -> Status:
        """Where the bus is in its life."""
        return self._bus.status

    @property
    def error(self) -> PubSubError | None:
        """Why the bus is reconnecting or failed, if it is."""
        return self._bus.error

    @property
    def capabilities(self) -> Mapping[Cap, Support]:
        """The capabilities of this broker: declared ones, lowered to those the session found."""
        return self._bus.capabilities

    @property
    def guarantees(self) -> Guarantees:
        """The guarantees of this broker."""
        return self._bus.guarantees

    @property
    def limits(self) -> Limits:
        """Sizes and rates that are kept here, before anything is sent."""
        return self._bus.limits

    @property
    def options(self) -> BusOptions:
        """The options of the bus, from whatever source they came."""
        return self._bus.options

    @property
    def stats(self) -> BusStats:
        """Counters of the bus."""
        return self._bus.stats

    @property
    def clock(self) -> Clock:
        """The clock that the bus goes by."""
        return self._bus.clock

    def supports(self, cap: Cap) -> Support:
        """Return whether this broker can do *cap*, and why not; true when it can."""
        return self._bus.supports(cap)

    def native(self, cls: type[N]) -> N:
        """Return the backend's own client; see `Bus.native`.

        It belongs to the bus's event loop: use it through `call`.
        """
        return self._bus.native(cls)

    def call(self, function: Callable[..., Awaitable[R]], /, *args: Any, **kwargs: Any) -> R:
        """Call an async *function* on the bus's event loop and return its result."""
        return self._call(lambda: function(*args, **kwargs), "call")

    # --- publishing --------------------------------------------------------------------

    def publish(
        self,
        topic: str,
        payload: Any = b"",
        *,
        qos: int | None = None,
        retain: bool | None = None,
        ttl: float | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        content_type: str | None = None,
        codec: str | None = None,
        confirm: ConfirmedBy | str | None = None,
        timeout: float | None = None,
        parts: Sequence[Part] | None = None,
    ) -> Receipt:
        """Publish one message and return a receipt; see `Bus.publish`."""
        return self._call(
            lambda: self._bus.publish(
                topic,
                payload,
                qos=qos,
                retain=retain,
                ttl=ttl,
                headers=headers,
                content_type=content_type,
                codec=codec,
                confirm=confirm,
                timeout=timeout,
                parts=parts,
            ),
            "publish",
        )

    def publish_many(
        self, items: Iterable[tuple[str, Any]], **options: Any
    ) -> list[Receipt | PubSubError]:
        """Publish several messages at once; see `Bus.publish_many`."""
        # *items* may be a generator of the caller's, so it runs in the caller's thread.
        listed = list(items)
        return self._call(lambda: self._bus.publish_many(listed, **options), "publish_many")

    def send_to(
        self,
        member: Member | str,
        topic: str,
        payload: Any = b"",
        *,
        qos: int | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        content_type: str | None = None,
        codec: str | None = None,
        timeout: float | None = None,
        parts: Sequence[Part] | None = None,
    ) -> Receipt:
        """Send to one member; see `Bus.send_to`."""
        return self._call(
            lambda: self._bus.send_to(
                member,
                topic,
                payload,
                qos=qos,
                headers=headers,
                content_type=content_type,
                codec=codec,
                timeout=timeout,
                parts=parts,
            ),
            "send_to",
        )

    def clear(self, topic: str) -> Receipt:
        """Forget the retained value of *topic* (capability ``retained``)."""
        return self._call(lambda: self._bus.clear(topic), "clear")

    # --- subscribing -------------------------------------------------------------------

    @overload
    def subscribe(
        self, filter: str, **options: Unpack[SubscribeOptions]
    ) -> SyncSubscription[bytes]: ...

    @overload
    def subscribe(
        self, filter: str, type: type[T], **options: Unpack[SubscribeOptions]
    ) -> SyncSubscription[T]: ...

    def subscribe(
        self, filter: str, type: Any = bytes, **options: Unpack[SubscribeOptions]
    ) -> SyncSubscription[Any]:
        """Subscribe and return once the broker confirmed; arguments as `Bus.subscribe`.

        Iterate the result in any thread, or give a *handler*, which runs in one of its own.
        """
        handler = options.get("handler")
        if handler is not None:
            options["handler"] = marked(handler, self._bus)

        async def subscribed() -> Subscription[Any]:
            return await self._bus.subscribe(filter, type, **options)

        return SyncSubscription(self._call(subscribed, "subscribe"), self._caller)

    # --- stored messages ---------------------------------------------------------------

    @overload
    def history(
        self,
        filter: str,
        *,
        last: int | None = None,
        since: float | None = None,
        until: float | None = None,
        codec: str | None = None,
    ) -> Iterator[Message[bytes]]: ...

    @overload
    def history(
        self,
        filter: str,
        type: type[T],
        *,
        last: int | None = None,
        since: float | None = None,
        until: float | None = None,
        codec: str | None = None,
    ) -> Iterator[Message[T]]: ...

    def history(
        self,
        filter: str,
        type: Any = bytes,
        *,
        last: int | None = None,
        since: float | None = None,
        until: float | None = None,
        codec: str | None = None,
    ) -> Iterator[Message[Any]]:
        """Yield stored messages, oldest first; see `Bus.history`."""

        async def found() -> AsyncIterator[Message[Any]]:
            return self._bus.history(filter, type, last=last, since=since, until=until, codec=codec)

        return self._pull(self._call(found, "history"))

    def _pull(self, messages: AsyncIterator[R]) -> Generator[R, None, None]:
        try:
            while (item := self._call(lambda: _step(messages), "history")) is not None:
                yield item
        finally:
            close = getattr(messages, "aclose", None)
            if close is not None and not self._caller.ended:
                self._call(close, "history")

    @overload
    def last(self, topic: str, *, codec: str | None = None) -> Message[bytes] | None: ...

    @overload
    def last(self, topic: str, type: type[T], *, codec: str | None = None) -> Message[T] | None: ...

    def last(
        self, topic: str, type: Any = bytes, *, codec: str | None = None
    ) -> Message[Any] | None:
        """Return the retained value of *topic*, or None; see `Bus.last`."""
        return self._call(lambda: self._bus.last(topic, type, codec=codec), "last")

    # --- interest ----------------------------------------------------------------------

    def presence(self, topic: str) -> SyncPresence:
        """Return who is subscribed to *topic*, kept up to date; see `Bus.presence`."""

        async def entered() -> Presence:
            return await self._bus.presence(topic)

        return SyncPresence(self._call(entered, "presence"), self._caller)

    def members(self, topic: str) -> list[Member]:
        """Return who is subscribed to *topic* now (capability ``presence``)."""
        return self._call(lambda: self._bus.members(topic), "members")

    def notifications(self, filter: str) -> SyncNotifications:
        """Return the interest in topics that match *filter*; see `Bus.notifications`."""

        async def entered() -> Notifications:
            return await self._bus.notifications(filter)

        return SyncNotifications(self._call(entered, "notifications"), self._caller)

    # --- authorization -----------------------------------------------------------------

    def authorize(
        self, filter: str, handler: AuthorizationHandler, *, timeout: float | None = None
    ) -> SyncAuthorizer:
        """Decide what other clients may see, from now on; see `Bus.authorize`."""

        async def entered() -> Authorizer:
            return await self._bus.authorize(filter, marked(handler, self._bus), timeout=timeout)

        return SyncAuthorizer(self._call(entered, "authorize"), self._caller)

    def entitle(
        self, request: AuthorizationRequest, entitlements: Iterable[int] | Everything | None
    ) -> None:
        """Change what the client of an earlier *request* may see; see `Bus.entitle`."""
        self._call(lambda: self._bus.entitle(request, entitlements), "entitle")

    # --- status, events, middleware ------------------------------------------------------

    def events(self) -> SyncEventStream:
        """Return the events of the bus from now on, beginning with its status."""

        async def made() -> EventStream:
            return self._bus.events()

        return SyncEventStream(self._call(made, "events"), self._caller)

    def wait_for(self, *statuses: Status, timeout: float | None = None) -> Status:
        """Return when the status is one of *statuses*; see `Bus.wait_for`."""
        return self._call(lambda: self._bus.wait_for(*statuses, timeout=timeout), "wait_for")

    def ping(self) -> float:
        """Return the seconds of a round trip to the broker (capability ``ping``)."""
        return self._call(self._bus.ping, "ping")

    def use(self, *middleware: Middleware) -> None:
        """Add middleware, which stays async and runs on the bus's loop; see `Bus.use`."""

        async def added() -> None:
            self._bus.use(*middleware)

        self._call(added, "use")


class SyncSubscription(_Synchronous, Generic[T]):
    """A `Subscription` to be iterated by any thread. Made by `SyncBus.subscribe`."""

    def __init__(self, subscription: Subscription[T], caller: _Caller) -> None:
        super().__init__(caller)
        self._subscription = subscription

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SyncSubscription {self.filter!r} buffered={self.stats.buffered}>"

    @property
    def filter(self) -> str:
        """The filter as it was given, captures included."""
        return self._subscription.filter

    @property
    def stats(self) -> SubscriptionStats:
        """Counters of the subscription."""
        return self._subscription.stats

    @property
    def active(self) -> bool:
        """Whether it is in place and can still receive."""
        return self._subscription.active

    @property
    def ack(self) -> Literal["auto", "manual"]:
        """Who acknowledges: the subscription after handling, or the consumer itself."""
        return self._subscription.ack

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more messages; wait for the handler; see `Subscription.drain`."""
        return self._call(lambda: self._subscription.drain(timeout), "drain")

    def close(self) -> None:
        """End the subscription; iterating it stops. Idempotent."""
        if not self._caller.ended:
            self._call(self._subscription.close, "close")

    def __iter__(self) -> Iterator[Message[T]]:
        return self

    def __next__(self) -> Message[T]:
        return self._next(self._subscription)

    def get(self, timeout: float | None = None) -> Message[T]:
        """Return the next message, waiting at most *timeout* seconds.

        Raises:
            TimeoutError: Nothing came in time; nothing is lost.
            BusClosed: The subscription has ended.
        """
        return self._call(lambda: self._subscription.get(timeout), "get")


class _SyncView(_Synchronous, Generic[V]):
    def __init__(self, view: V, caller: _Caller) -> None:
        super().__init__(caller)
        self._view = view

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def synced(self) -> bool:
        """Whether everything that existed before has been told."""
        return self._view.synced

    @property
    def dropped(self) -> int:
        """Changes that were not told because nobody read them."""
        return self._view.dropped

    def close(self) -> None:
        """End the view. Idempotent."""
        if not self._caller.ended:
            self._call(self._view.close, "close")

    def __iter__(self) -> Iterator[InterestEvent]:
        return self

    def __next__(self) -> InterestEvent:
        return self._next(self._view)

    def get(self, timeout: float | None = None) -> InterestEvent:
        """Return the next change, waiting at most *timeout* seconds.

        Raises:
            TimeoutError: Nothing changed in time.
            BusClosed: The view has ended.
        """
        return self._call(lambda: self._view.get(timeout), "get")


class SyncPresence(_SyncView[Presence]):
    """Who is subscribed to one topic; see `Presence`. Made by `SyncBus.presence`."""

    @property
    def topic(self) -> str:
        """The topic looked at."""
        return self._view.topic

    @property
    def members(self) -> tuple[Member, ...]:
        """Who is there now, in the order they were seen."""
        return self._view.members

    @property
    def count(self) -> int:
        """How many are there now."""
        return self._view.count


class SyncNotifications(_SyncView[Notifications]):
    """Who subscribes to what; see `Notifications`. Made by `SyncBus.notifications`."""

    @property
    def filter(self) -> str:
        """The filter looked at."""
        return self._view.filter

    @property
    def interest(self) -> dict[str, tuple[Member, ...]]:
        """Who is subscribed now, by topic or filter."""

        async def looked() -> dict[str, tuple[Member, ...]]:
            return self._view.interest

        return self._call(looked, "interest")


class SyncAuthorizer(_Synchronous):
    """Decides what others may see; see `Authorizer`. Made by `SyncBus.authorize`."""

    def __init__(self, authorizer: Authorizer, caller: _Caller) -> None:
        super().__init__(caller)
        self._authorizer = authorizer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def filter(self) -> str:
        """The filter as it was given, captures included."""
        return self._authorizer.filter

    @property
    def timeout(self) -> float:
        """Seconds that the handler has for one answer."""
        return self._authorizer.timeout

    @property
    def stats(self) -> AuthorizerStats:
        """Counters of the authorizer."""
        return self._authorizer.stats

    def close(self) -> None:
        """Answer no more; rights that were given stay. Idempotent."""
        if not self._caller.ended:
            self._call(self._authorizer.close, "close")


class SyncEventStream(_Synchronous):
    """The events of a bus; see `EventStream`. Made by `SyncBus.events`."""

    def __init__(self, stream: EventStream, caller: _Caller) -> None:
        super().__init__(caller)
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def dropped(self) -> int:
        """Events that a slow reader has missed."""
        return self._stream.dropped

    def close(self) -> None:
        """Take no more events; those collected can still be read."""

        async def closed() -> None:
            self._stream.close()

        if not self._caller.ended:
            self._call(closed, "close")

    def __iter__(self) -> Iterator[BusEvent]:
        return self

    def __next__(self) -> BusEvent:
        return self._next(self._stream)


async def _step(iterator: AsyncIterator[R]) -> R | None:
    try:
        return await iterator.__anext__()
    except StopAsyncIteration:
        return None


# --- the loop in its thread ---------------------------------------------------------------


def _refuse_running_loop(what: str, instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise WrongLoop(
        f"{what} was called inside a running event loop, which it would block",
        hint=f"use {instead}",
    )


class _Caller:
    """Runs coroutines on an event loop of another thread, for callers that block."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pid = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that the loop runs in."""
        return os.getpid() != self._pid

    @property
    def ended(self) -> bool:
        """Whether nothing on that loop can be reached, or has to be cleaned up, from here."""
        return self._loop.is_closed() or self.forked

    def forget(self, bus: Bus) -> None:
        """Called when *bus* is closed."""

    def settle(self) -> None:
        """Return when nothing of a loop that is no longer needed is left."""

    def call(self, function: Callable[[], Awaitable[R]], name: str) -> R:
        """Run *function* on the loop and return its result.

        Raises:
            WrongLoop: Waiting here could never end.
            BusClosed: The loop has ended, or ends while waiting.
        """
        if self.forked:
            raise WrongLoop(
                f"{name}() was called in process {os.getpid()} on a bus that belongs to "
                f"process {self._pid}; a connection cannot be shared after a fork",
                hint="call sync.connect() again in this process",
            )
        _refuse_running_loop(
            f"sync {name}()",
            f"the async bus there: `await bus.{name}(...)` of `pubsub_core.connect`",
        )
        call = _Call(function)
        try:
            self._loop.call_soon_threadsafe(call.start)
        except RuntimeError:
            raise _closed(name) from None
        try:
            return call.wait(self._loop)
        except CancelledError:
            raise _closed(name) from None
        finally:
            # Ctrl-C, or anything else that ends the wait, also ends the call.
            call.give_up(self._loop)
            del call  # it may hold an exception, and that this frame


class _Call(Generic[R]):
    """One call on its way through the loop.

    `asyncio.run_coroutine_threadsafe` would do, but makes the coroutine in the calling
    thread: a Ctrl-C between making it and handing it over leaves one that is never awaited.
    """

    def __init__(self, function: Callable[[], Awaitable[R]]) -> None:
        self._function = function
        self._future: Future[R] = Future()
        self._task: asyncio.Task[R] | None = None

    # --- in the calling thread -----------------------------------------------------------

    def wait(self, loop: asyncio.AbstractEventLoop, limit: float | None = None) -> R:
        """Return the result; raises CancelledError when the loop ended without one."""
        while True:
            try:
                return self._future.result(_CHECK if limit is None else limit)
            except TimeoutError:
                if self._future.done():
                    return self._future.result()
                if limit is not None:
                    raise
                # What a loop was asked for while it ended is neither run nor cancelled.
                if loop.is_closed():
                    raise CancelledError from None

    def give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the call if it still runs."""
        if self._future.cancel():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._cancel)

    # --- in the loop's thread ------------------------------------------------------------

    def start(self) -> None:
        """Begin, unless the caller has given up."""
        if not self._future.cancelled():
            self._task = asyncio.get_running_loop().create_task(_run(self._function))
            self._task.add_done_callback(self._done)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _done(self, task: asyncio.Task[R]) -> None:
        if task.cancelled():
            self._future.cancel()
            return
        error = task.exception()  # looked at, or asyncio would report it as never retrieved
        if not self._future.set_running_or_notify_cancel():
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())


class _LoopEnded(BusClosed):
    """Ended because the loop did."""


def _closed(name: str) -> BusClosed:
    return _LoopEnded(f"{name}() on a bus that is closed", hint="open a new one")


async def _run(function: Callable[[], Awaitable[R]]) -> R:
    return await function()


class _Portal(_Caller):
    """The shared loop and its daemon thread; there while any bus needs it."""

    _lock = threading.Lock()
    _current: _Portal | None = None
    # What a forked child inherits is kept, not collected: closing a copy of the loop would
    # unregister sockets from the parent's epoll instance, which both share.
    _inherited: list[_Portal] = []  # noqa: RUF012 - one for the process, as intended

    def __init__(self) -> None:
        super().__init__(asyncio.new_event_loop())
        self.buses: set[Bus] = set()
        self._users = 0
        self._over = False
        self._thread = threading.Thread(target=self._serve, name="pubsub-sync", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> _Portal:
        """Return the portal, started if need be; each call is paired with `release`."""
        with cls._lock:
            portal = cls._current
            if portal is None:
                portal = cls._current = _Portal()
            portal._users += 1
            return portal

    def forget(self, bus: Bus) -> None:
        """Give up the share of *bus* in the loop, once."""
        with self._lock:
            if bus not in self.buses:
                return
            self.buses.discard(bus)
        self.release()

    def release(self) -> None:
        """End the loop after its last user."""
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            if _Portal._current is self:
                _Portal._current = None
            self._over = True
        self._stop()

    def settle(self) -> None:
        """Wait for the thread, when it is about to end."""
        if self._over and self._thread is not threading.current_thread():
            self._thread.join(_STOP_LIMIT)

    def _stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                # A caller that waits for one of them is told that the bus was closed.
                loop.run_until_complete(asyncio.wait(tasks))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    @classmethod
    def after_fork(cls) -> None:
        """Start over in a child process: the parent's loop and buses are its own."""
        cls._lock = threading.Lock()
        if cls._current is not None:
            cls._inherited.append(cls._current)
            cls._current = None

    @classmethod
    def at_exit(cls) -> None:
        """Close the buses that were left open, within a few seconds."""
        with cls._lock:
            portal, cls._current = cls._current, None
        if portal is not None:
            portal.abandon()

    def abandon(self) -> None:
        """Close every bus and end the thread, however they behave, within a few seconds."""

        async def close() -> None:
            await asyncio.gather(
                *(bus.close(drain=_EXIT_DRAIN) for bus in self.buses), return_exceptions=True
            )

        call = _Call(close)
        with contextlib.suppress(RuntimeError, TimeoutError, CancelledError):
            self._loop.call_soon_threadsafe(call.start)
            call.wait(self._loop, _EXIT_LIMIT)
        self._stop()
        self._thread.join(_JOIN_LIMIT)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Portal.after_fork)
atexit.register(_Portal.at_exit)
