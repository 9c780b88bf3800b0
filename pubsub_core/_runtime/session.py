"""The session of a bus: connect, notice a loss, restore, until the bus is closed.

Backends make one session and say when it ended; everything about trying again is here.
While a session is being restored, its frames are held back, so that a gap is marked before
the messages that came after it. Each session has a generation number, and a dead one's sink
is deaf: late frames cannot mix with new ones.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from pubsub_core.clock import Clock
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import (
    BusClosed,
    ConnectError,
    ConnectTimeout,
    MissingDependency,
    NotConnected,
    PubSubError,
)
from pubsub_core.events import InterestEvent, Notice, Status, StatusChanged
from pubsub_core.interfaces import AuthorizationRequest, Backend, SessionFacts
from pubsub_core.message import InFrame
from pubsub_core.pacing import SHORT_OUTAGE, Backoff

__all__ = ["Session", "SessionOwner"]

logger = logging.getLogger("pubsub_core")

_HEALTHY_AFTER = 10.0
_SHORT_ATTEMPT = 2.0


class SessionOwner(Protocol):
    """The engine, as the session sees it."""

    @property
    def route(self) -> Callable[[InFrame], None]:
        """Routes one frame."""
        ...

    def interest(self, event: InterestEvent) -> None:
        """Route one change of interest."""
        ...

    def authorization(self, request: AuthorizationRequest) -> None:
        """Route one question."""
        ...

    def notice(self, notice: Notice) -> None:
        """Pass one notice on."""
        ...

    def sent_again(self, topic: str) -> None:
        """Count a message that was sent once more."""
        ...

    async def restore(self, facts: SessionFacts, generation: int) -> None:
        """Restore subscriptions and watches in a session that was just opened."""
        ...

    def status_changed(self, event: StatusChanged) -> None:
        """Act on a change of status."""
        ...


class Inbox:
    """Takes frames from any thread and routes them on the loop, in order.

    On the loop's own thread a frame is routed at once. From another thread frames are
    queued, with one wake-up of the loop for a burst of them: a `call_soon_threadsafe` for
    each frame writes a byte to the loop's self-pipe each time, which costs more than routing.
    """

    def __init__(
        self, route: Callable[[InFrame], None], call_soon: Callable[[Callable[[], None]], Any]
    ) -> None:
        self._route = route
        self._call_soon = call_soon
        self._thread = threading.get_ident()
        self._queue: deque[Callable[[], None] | InFrame] = deque()
        self._scheduled = False
        self._held = True
        self._deaf = False
        # Whether an item of the loop's own thread may pass at once: nothing is held or queued
        # that it would overtake. One flag, since `frame` runs once per message.
        self._direct = False

    def frame(self, frame: InFrame) -> None:
        """Take a frame."""
        if self._direct and threading.get_ident() == self._thread:
            self._route(frame)
        else:
            self._enqueue(frame)

    def call(self, action: Callable[[], None]) -> None:
        """Take anything else, in order with the frames."""
        if self._direct and threading.get_ident() == self._thread:
            action()
        else:
            self._enqueue(action)

    def release(self) -> None:
        """Route the frames that were held while the session was restored."""
        self._held = False
        self._drain()

    def close(self) -> None:
        """Drop everything from now on: these are late frames of a dead session."""
        self._deaf = True
        self._direct = False
        self._queue.clear()

    def _enqueue(self, item: Callable[[], None] | InFrame) -> None:
        if self._deaf:
            return
        self._direct = False
        self._queue.append(item)
        if not self._held and not self._scheduled:
            self._scheduled = True
            try:
                self._call_soon(self._drain)
            except RuntimeError:  # the loop is closed; so is everything behind it
                self._deaf = True

    def _drain(self) -> None:
        self._scheduled = False
        while self._queue and not self._deaf:
            item = self._queue.popleft()
            if isinstance(item, InFrame):
                self._route(item)
            else:
                item()
        # An item may have been added by another thread since the loop looked; it has
        # scheduled another drain, and until then nothing may pass it.
        self._direct = not (self._deaf or self._held or self._queue)


class _SessionSink:
    """The sink of one session; see `pubsub_core.interfaces.Sink`."""

    def __init__(self, owner: SessionOwner, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._loop = loop
        self.inbox = Inbox(owner.route, loop.call_soon_threadsafe)
        self.ended: asyncio.Future[BaseException] = loop.create_future()
        # On the loop's own thread a released inbox routes at once; hot paths use it as is.
        self.deliver = self.inbox.frame

    def interest(self, event: InterestEvent) -> None:
        self.inbox.call(lambda: self._owner.interest(event))

    def authorization(self, request: AuthorizationRequest) -> None:
        self.inbox.call(lambda: self._owner.authorization(request))

    def notice(self, notice: Notice) -> None:
        self.inbox.call(lambda: self._owner.notice(notice))

    def sent_again(self, topic: str) -> None:
        self.inbox.call(lambda: self._owner.sent_again(topic))

    def lost(self, error: BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._end, error)
        except RuntimeError:
            return  # the loop is closed; there is no bus to tell

    def _end(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    def close(self) -> None:
        self.inbox.close()
        self.ended.cancel()


class Session:
    """Keeps one backend in a session for as long as the bus is open."""

    def __init__(
        self, backend: Backend, options: BusOptions, clock: Clock, owner: SessionOwner, name: str
    ) -> None:
        self._backend = backend
        self._options = options
        self._clock = clock
        self._owner = owner
        self._name = name
        self._backoff = Backoff(options.reconnect_first, options.reconnect_max)
        self._task: asyncio.Task[None] | None = None
        self._sink: _SessionSink | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self.status = Status.NEW
        self.generation = 0
        self.online = False
        self.been_online = False
        self.error: PubSubError | None = None
        self.facts = SessionFacts()

    # --- what the bus calls ------------------------------------------------------------

    async def start(self) -> None:
        """Make the first session, as patiently as the option ``wait`` says.

        Raises:
            ConnectError: It could not be made.
        """
        self._set(Status.CONNECTING)
        wait = self._options.wait
        if wait is False:
            self._task = asyncio.create_task(self._supervise(), name=f"pubsub {self._name}")
            return
        deadline = self._clock.monotonic() + (0.0 if wait is True else wait)
        began = self._clock.monotonic()
        while True:
            try:
                await self._attempt()
            except ConnectError as error:
                now = self._clock.monotonic()
                delay = self._backoff.next(now - began)
                if error.retryable is False or now + delay >= deadline:
                    self._fail(error)
                    raise
                self._set(Status.CONNECTING, error, retry_in=delay)
                await self._clock.sleep(delay)
            except PubSubError as error:
                self._fail(error)
                raise
            else:
                break
        self._task = asyncio.create_task(self._supervise(), name=f"pubsub {self._name}")

    async def wait_online(self) -> None:
        """Return when there is a session.

        Raises:
            BusClosed: The bus was closed.
            ConnectError: There will be none.
        """
        while not self.online:
            if self.status in (Status.CLOSING, Status.CLOSED):
                raise BusClosed(f"bus {self._name!r} is closed", hint="open a new one")
            if self.error is not None and self.status is Status.FAILED:
                raise self.error
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def closing(self) -> None:
        """Stop trying; nothing new is accepted from here on."""
        if self.status not in (Status.CLOSING, Status.CLOSED):
            self._set(Status.CLOSING)

    async def stop_trying(self) -> None:
        """End the task that reconnects; an attempt under way is cancelled."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def closed(self) -> None:
        """Enter the status ``closed``."""
        self.online = False
        if self._sink is not None:
            self._sink.close()
            self._sink = None
        self._set(Status.CLOSED)

    # --- keeping it up -----------------------------------------------------------------

    async def _supervise(self) -> None:
        await self._keep_up()
        # There will be no more session: publishes that wait for one in the backend must end.
        try:
            await self._backend.close(drain=0.0)
        except Exception:
            logger.exception("bus %r: closing the backend failed", self._name)

    async def _keep_up(self) -> None:
        # An outage begins when the last session that lasted ten seconds ended. With a new outage
        # for each session, a broker that ends every one soon after it began was tried again
        # every second: the bound of the first ten seconds never gave way to the doubling.
        outage_began: float | None = None
        while True:
            if self._sink is not None:
                online_at = self._clock.monotonic()
                cause = await self._sink.ended
                ended_at = self._clock.monotonic()
                if outage_began is None or ended_at - online_at >= _HEALTHY_AFTER:
                    self._backoff.reset()
                    outage_began = ended_at
                error = self._lost(cause)
                if error.retryable is False or not self._options.reconnect:
                    self._fail(error)
                    return
                delay = self._backoff.next(ended_at - outage_began)
                self._set(Status.RECONNECTING, error, retry_in=delay)
                await self._clock.sleep(delay)
            elif outage_began is None:
                outage_began = self._clock.monotonic()
            if not await self._reconnect(outage_began):
                return

    async def _reconnect(self, outage_began: float) -> bool:
        """Try until there is a session; return False when that is pointless."""
        while True:
            try:
                await self._attempt(self._clock.monotonic() - outage_began)
            except PubSubError as error:
                if error.retryable is False:
                    self._fail(error)
                    return False
                delay = self._backoff.next(self._clock.monotonic() - outage_began)
                status = Status.RECONNECTING if self.generation else Status.CONNECTING
                self._set(status, error, retry_in=delay)
                await self._clock.sleep(delay)
            except Exception as error:
                # A backend that raises something else is at fault; dying silently would
                # leave a bus that says it is reconnecting and never does.
                logger.exception("bus %r: the backend failed unexpectedly", self._name)
                failure = ConnectError(
                    f"the backend of bus {self._name!r} failed: {type(error).__name__}",
                    hint="this is a defect of the backend; see the log",
                    retryable=False,
                )
                failure.__cause__ = error
                self._fail(failure)
                return False
            else:
                return True

    async def _attempt(self, outage: float | None = None) -> None:
        seconds = self._options.connect_timeout
        if outage is not None and outage < SHORT_OUTAGE:
            # Where packets vanish, an attempt that began during the outage hangs until its
            # deadline; a short one lets the next attempt find that the outage is over.
            seconds = min(seconds, _SHORT_ATTEMPT)
        loop = asyncio.get_running_loop()
        sink = _SessionSink(self._owner, loop)
        try:
            try:
                async with asyncio.timeout(seconds):
                    facts = await self._backend.open(sink)
            except ConnectError:
                raise
            except ImportError as error:
                # Of something that the backend imports only when an option asks for it.
                info = self._backend.context.info
                missing = f"{error.name!r}" if error.name else "a library"
                raise MissingDependency(
                    f"backend {info.name!r} cannot import {missing}: {error}",
                    hint=info.install or f"install what {info.name!r} needs",
                    backend=info.name,
                ) from error
            except TimeoutError as error:
                raise ConnectTimeout(
                    f"no session with {self._backend.context.address} within {seconds:g} s",
                    hint="check host and port, or raise connect_timeout",
                    backend=self._backend.context.info.name,
                ) from error
            self.generation += 1
            try:
                await self._restore(sink, facts)
            except BaseException:
                await self._backend.drop()
                raise
        except BaseException:
            sink.close()
            raise

    async def _restore(self, sink: _SessionSink, facts: SessionFacts) -> None:
        """Let the engine restore everything; then the session is online.

        A session that is lost meanwhile ends this at once: without that, restoring would wait
        for its answers until the deadline of each.
        """
        restoring = asyncio.ensure_future(self._owner.restore(facts, self.generation))
        try:
            either: list[asyncio.Future[Any]] = [restoring, sink.ended]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if sink.ended.done():
                raise self._lost(sink.ended.result())
            restoring.result()
        finally:
            if not restoring.done():
                restoring.cancel()
                await asyncio.wait([restoring])
            elif not restoring.cancelled():
                restoring.exception()
        self.facts = facts
        self._sink = sink
        self.online = self.been_online = True
        self.error = None
        sink.inbox.release()
        self._set(Status.ONLINE)
        try:
            await self._backend.restored()
        except BaseException:
            self.online = False
            self._sink = None
            raise

    def _lost(self, cause: BaseException) -> PubSubError:
        self.online = False
        if self._sink is not None:
            self._sink.close()
            self._sink = None
        if isinstance(cause, PubSubError):
            return cause
        error = ConnectError(
            f"the session of bus {self._name!r} with {self._backend.context.address} was lost: "
            f"{type(cause).__name__}",
            backend=self._backend.context.info.name,
        )
        error.__cause__ = cause
        return error

    def _fail(self, error: PubSubError) -> None:
        self.online = False
        self.error = error
        self._set(Status.FAILED, error)

    def _set(
        self, status: Status, error: PubSubError | None = None, *, retry_in: float | None = None
    ) -> None:
        self.status = status
        self._owner.status_changed(
            StatusChanged(status, error=error, generation=self.generation, retry_in=retry_in)
        )
        if status in (Status.ONLINE, Status.FAILED, Status.CLOSING, Status.CLOSED):
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def not_connected(self) -> PubSubError:
        """Return the error of an operation that needs a session now."""
        if self.status in (Status.CLOSING, Status.CLOSED):
            return BusClosed(f"bus {self._name!r} is closed", hint="open a new one")
        if self.error is not None:
            return self.error
        return NotConnected(
            f"bus {self._name!r} has no session with {self._backend.context.address}",
            hint="wait until it is online, or set offline='buffer'",
            backend=self._backend.context.info.name,
        )
