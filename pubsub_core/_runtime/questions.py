"""The broker's questions about other clients, and the inner halves of the authorizers.

A right is only ever what a handler returned in time. One that raises, that is late, or that
returns something else is answered with a refusal, counted and told; so a defect here hides
data and never shows it. Questions that a lost session leaves behind are dropped: a broker
whose client still waits asks again in the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias, cast

from pubsub_core.authorization import AuthorizationHandler, AuthorizerStats
from pubsub_core.errors import BadType, HandlerFailed, NotConnected, PubSubError
from pubsub_core.events import Notice
from pubsub_core.interfaces import (
    AuthorizationRequest,
    Backend,
    Entitlements,
    Everything,
    HasAuthorization,
)
from pubsub_core.threads import HandlerThread, is_async
from pubsub_core.topics import TopicFilter

__all__ = ["Answerer", "AnswererHost", "Questions", "entitlements_of"]

logger = logging.getLogger("pubsub_core")

_AT_ONCE = 32
_MOST_WAITING = 10_000
_LATE_LIMIT = 1.0

_Key: TypeAlias = tuple[str, str]


def entitlements_of(given: Any) -> Entitlements | None:
    """Return a handler's answer as entitlements, or None for no right at all.

    Raises:
        TypeError: It is neither.
    """
    if given is None or isinstance(given, Everything):
        return given
    if not isinstance(given, (str, bytes, bytearray, Mapping)):
        with contextlib.suppress(TypeError):
            held: frozenset[Any] = frozenset(given)
            if all(isinstance(each, int) and not isinstance(each, bool) for each in held):
                return held
    raise BadType("entitlements are a set of int, EVERYTHING, or None for no right at all")


class AnswererHost(Protocol):
    """The engine, as an answerer sees it."""

    async def authorize(
        self, request: AuthorizationRequest, entitlements: Entitlements | None
    ) -> None:
        """Answer the broker; NotConnected when the session is over."""
        ...

    def note(self, event: Notice) -> None:
        """Report an event to the bus's event streams."""
        ...

    def handler_failed(self, error: HandlerFailed) -> None:
        """Count a failure, and tell the listeners."""
        ...


class Answerer:
    """The inner half of an `Authorizer`: asks its handler, and answers the broker.

    Attributes:
        topic_filter: The filter, parsed.
        stats: The counters.
        timeout: Seconds that the handler has for one answer.
    """

    def __init__(
        self,
        host: AnswererHost,
        filter: TopicFilter,
        handler: AuthorizationHandler,
        timeout: float,
        start: Callable[[Answerer], Awaitable[None]],
        stop: Callable[[Answerer], Awaitable[None]],
    ) -> None:
        self._host = host
        self.topic_filter = filter
        self._handler = handler
        self._start = start
        self._stop = stop
        self.timeout = timeout
        self.stats = AuthorizerStats()
        self._started = False
        self._ended = False
        # One question at a time about each client and topic: the last answer wins, and an
        # older one must not come after it.
        self._waiting: dict[_Key, AuthorizationRequest] = {}
        self._active: dict[_Key, AuthorizationRequest | None] = {}
        self._workers: dict[asyncio.Task[None], asyncio.Future[Any] | None] = {}
        self._late: set[asyncio.Future[Any]] = set()
        plain = not is_async(handler)
        self._thread = HandlerThread(f"pubsub-authorizer-{filter.text}") if plain else None
        self._most_workers = 1 if plain else _AT_ONCE

    # --- what the program's half calls -----------------------------------------------------

    @property
    def filter(self) -> str:
        """The filter as it was given, captures included."""
        return self.topic_filter.text

    @property
    def waiting(self) -> int:
        """Questions whose answer has not begun."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Return when the backend asks."""
        if not self._started:
            self._started = True
            try:
                await self._start(self)
            except BaseException:
                self._started = False
                raise

    async def close(self) -> None:
        """Answer no more; rights that were given stay. Idempotent."""
        await self._stop(self)
        await self.end(asyncio.current_task())

    # --- what the bus calls ------------------------------------------------------------

    def take(self, request: AuthorizationRequest) -> None:
        """Take one question; never blocks."""
        if self._ended:
            return
        self.stats.asked += 1
        key = (request.member.id, request.topic)
        if key in self._active:
            self._active[key] = request
            return
        if key not in self._waiting and len(self._waiting) >= _MOST_WAITING:
            self.stats.dropped += 1
            self._host.note(
                Notice(
                    "authorization_dropped",
                    f"more than {_MOST_WAITING} clients wait for authorization",
                    request.topic,
                )
            )
            return
        self._waiting[key] = request
        if len(self._workers) < self._most_workers:
            worker = asyncio.create_task(self._work(), name=f"pubsub authorizer {self.filter}")
            self._workers[worker] = None
            worker.add_done_callback(self._worker_done)

    async def end(self, caller: asyncio.Task[Any] | None) -> None:
        """End running handlers, except *caller*; waiting questions get no answer."""
        self._ended = True
        self.stats.dropped += len(self._waiting)
        self._waiting.clear()
        workers = [
            worker
            for worker, future in self._workers.items()
            if caller is None or caller not in (worker, future)
        ]
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.wait(workers)
        late = self._late - {caller}
        if late:
            # One that ignores being cancelled cannot be ended, only left.
            await asyncio.wait(late, timeout=_LATE_LIMIT)
        if self._thread is not None:
            self._thread.stop()

    # --- answering ---------------------------------------------------------------------

    def _worker_done(self, worker: asyncio.Task[None]) -> None:
        self._workers.pop(worker, None)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            logger.error("the authorizer of %r failed", self.filter, exc_info=error)

    async def _work(self) -> None:
        while self._waiting:
            key = next(iter(self._waiting))
            request = self._waiting.pop(key)
            self._active[key] = None
            try:
                await self._answer(request)
            finally:
                again = self._active.pop(key)
                if again is not None and not self._ended:
                    self._waiting[key] = again

    async def _answer(self, request: AuthorizationRequest) -> None:
        held: Entitlements | None = None
        try:
            held = entitlements_of(await self._asked(request))
        except Exception as error:  # noqa: BLE001 - user code may raise anything
            self._failed(request, error)
        if await self._told(request, held):
            return
        # The broker cannot carry that answer, and must not be left with an older one.
        await self._told(request, None)

    async def _asked(self, request: AuthorizationRequest) -> Any:
        """Call the handler; wait for it no longer than allowed, whatever it does."""
        asking = (
            self._handler(request)
            if self._thread is None
            else self._thread.call(self._handler, request)
        )
        future: asyncio.Future[Any] = asyncio.ensure_future(asking)
        worker = cast("asyncio.Task[None]", asyncio.current_task())
        self._workers[worker] = future
        in_time = False
        try:
            await asyncio.wait([future], timeout=self.timeout)
            in_time = future.done()
        finally:
            self._workers[worker] = None
            if not in_time:
                self._late.add(future)
                future.add_done_callback(self._too_late)
                future.cancel()
        if not in_time:
            raise TimeoutError(f"no answer within {self.timeout:g} s")
        try:
            return future.result()
        except asyncio.CancelledError as error:
            raise RuntimeError("the handler was cancelled") from error

    def _too_late(self, future: asyncio.Future[Any]) -> None:
        self._late.discard(future)
        if not future.cancelled():
            future.exception()  # looked at: the refusal has been told already

    async def _told(self, request: AuthorizationRequest, held: Entitlements | None) -> bool:
        """Answer the broker; return False when this answer cannot be given."""
        try:
            await self._host.authorize(request, held)
        except NotConnected:
            self.stats.dropped += 1
            return True
        except Exception as error:  # e.g. a number that the broker cannot carry
            if held is None:
                self.stats.dropped += 1
                logger.exception("refusing %r to a client failed", request.topic)
                return True
            self._failed(request, error)
            return False
        if held is None:
            self.stats.refused += 1
        else:
            self.stats.granted += 1
        return True

    def _failed(self, request: AuthorizationRequest, error: BaseException) -> None:
        self.stats.failed += 1
        failed = HandlerFailed(
            f"deciding who may see {request.topic!r} failed: {type(error).__name__}",
            filter=self.filter,
            topic=request.topic,
        )
        failed.__cause__ = error
        logger.error("%s (authorizer %r)", failed, self.filter, exc_info=error)
        self._host.note(
            Notice(
                "authorization_failed",
                f"the authorizer failed ({type(error).__name__}), so a client was refused",
                request.topic,
            )
        )
        self._host.handler_failed(failed)


class Questions:
    """Passes each question of the broker to the first answerer whose filter matches."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._all: list[Answerer] = []

    async def open(self, answerer: Answerer) -> None:
        """Start *answerer*, and let the backend ask about its filter."""
        self._all.append(answerer)
        try:
            await self._watch(answerer)
        except BaseException:
            self._all.remove(answerer)
            raise

    async def close(self, answerer: Answerer, *, online: bool) -> None:
        """Remove *answerer*, at the backend too while there is a session."""
        if answerer not in self._all:
            return
        self._all.remove(answerer)
        wanted = answerer.topic_filter.filter
        if online and not any(each.topic_filter.filter == wanted for each in self._all):
            with contextlib.suppress(NotConnected):
                await cast("HasAuthorization", self._backend).unwatch_authorizations(wanted)

    async def restore(self) -> None:
        """Let the backend ask again in a new session."""
        for answerer in tuple(self._all):
            try:
                await self._watch(answerer)
            except NotConnected:
                raise
            except PubSubError as error:
                logger.warning("authorizing %r is no longer possible: %s", answerer.filter, error)

    def route(self, request: AuthorizationRequest) -> bool:
        """Pass a question on; return whether any answerer's filter matches."""
        for answerer in self._all:
            if answerer.topic_filter.matches(request.topic):
                answerer.take(request)
                return True
        return False

    async def end(self, caller: asyncio.Task[Any] | None) -> None:
        """End them all."""
        ending, self._all = self._all, []
        for answerer in ending:
            await answerer.end(caller)

    async def _watch(self, answerer: Answerer) -> None:
        await cast("HasAuthorization", self._backend).watch_authorizations(
            answerer.topic_filter.filter
        )
