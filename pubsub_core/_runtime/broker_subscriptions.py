"""Keeps the broker's subscriptions and the local ones in step.

One subscription at the broker serves all local ones with the same filter and group. It is
made for the first and dropped after the last; after a reconnect everything is brought back,
and the hole in between is marked, and filled where the broker has a history.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, cast

import msgspec

from pubsub_core.capabilities import Cap
from pubsub_core.clock import Clock
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import NotConnected, OperationTimeout, PubSubError, SubscribeFailed
from pubsub_core.events import BusEvent, Gap, GapReason, Notice, SubscriptionRefused
from pubsub_core.interfaces import Backend, HasHistory, HistoryQuery, SessionFacts, WireSub
from pubsub_core.keyed import KeyedLocks
from pubsub_core.message import InFrame
from pubsub_core.stats import BusStats

from .delivery import Subscriber
from .router import Route, Router
from .session import Session

__all__ = ["BrokerSubscriptions", "SubscriptionsOwner"]

logger = logging.getLogger("pubsub_core")

# Clocks of two machines differ, and so do the times a broker gives its messages.
_SLACK = 1.0

# Seconds for which messages for an earlier process's subscriptions wait for a subscriber.
# They occupy the broker's window (20 messages at Mosquitto); without a limit they would stop
# all others.
_ORPHANS_WAIT = 10.0


class SubscriptionsOwner(Protocol):
    """The engine, as the subscriptions see it."""

    def can(self, cap: Cap) -> bool:
        """Whether the current session has *cap*."""
        ...

    def note(self, event: BusEvent) -> None:
        """Report an event to the bus's event streams."""
        ...

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run *work* in a task that ends with the bus."""
        ...


class BrokerSubscriptions:
    """The subscriptions of one bus, here and at the broker."""

    def __init__(
        self,
        backend: Backend,
        session: Session,
        options: BusOptions,
        clock: Clock,
        stats: BusStats,
        owner: SubscriptionsOwner,
    ) -> None:
        self._backend = backend
        self._session = session
        self._options = options
        self._clock = clock
        self._stats = stats
        self._owner = owner
        # Subscribing to a filter and leaving it take turns; other filters do not wait.
        self._locks = KeyedLocks[tuple[str, str | None]]()
        self._pausing: set[Subscriber] = set()
        # Ended here without the broker knowing. It still has them if it resumes the session.
        self._left_behind: dict[tuple[str, str | None], WireSub] = {}
        self.router = Router()
        self.router.bind(backend)

    # --- subscribing -------------------------------------------------------------------

    async def attach(self, subscriber: Subscriber) -> None:
        """Start *subscriber*; return when the broker has confirmed its subscription."""
        replay = subscriber.settings.replay
        if replay is not None:
            # Live messages may arrive before the stored ones have been read.
            subscriber.buffer.hold()
        route = self.router.attach(subscriber, echo=self._options.echo)
        try:
            await self._confirm(route)
            # The broker sent its retained messages to those who were there when it was asked.
            if (
                subscriber not in route.served
                and subscriber.settings.group is None
                and self._owner.can(Cap.RETAINED)
            ):
                want = route.want
                await self._within(
                    lambda: self._backend.repeat_retained(want),
                    f"asking for what {want.filter!r} retained",
                )
            if replay is not None:
                backend = cast("HasHistory", self._backend)
                frames = backend.history(subscriber.topic_filter.filter, replay)
                subscriber.buffer.replay([frame async for frame in frames])
        except BaseException:
            subscriber.end()
            self._owner.spawn(self.detach(subscriber), "detach")
            raise
        subscriber.start()
        self.router.adopt_orphans()

    async def detach(self, subscriber: Subscriber) -> None:
        """End *subscriber*; return when the broker has confirmed, if it must know."""
        # A subscriber that ends while it holds the broker back must not do so for good.
        self.unpause(subscriber)
        route = self.router.detach(subscriber)
        if route is not None:
            if route.tried and not self._session.online:
                self._left_behind[route.key] = route.want
            # In a task of its own: a cancelled caller must not leave it at the broker.
            await asyncio.shield(self._owner.spawn(self._forget(route), "unsubscribe"))

    async def _forget(self, route: Route) -> None:
        key = route.key
        async with self._locks.of(key):
            # A new subscriber may have come while this waited for its turn.
            if route.tried == self._session.generation and self.router.find(*key) is None:
                try:
                    await self._within(
                        lambda: self._backend.unsubscribe(route.want),
                        f"unsubscribing from {route.want.filter!r}",
                    )
                except PubSubError as error:
                    # Here it is gone already: messages that the broker still sends for it find
                    # no route. A session that is resumed later gets another attempt.
                    logger.info("%s", error)
                    self._left_behind[key] = route.want

    async def _confirm(self, route: Route) -> None:
        session = self._session

        async def confirmed() -> None:
            while True:
                await session.wait_online()
                async with self._locks.of(route.key):
                    generation = session.generation
                    if not session.online:
                        continue
                    if route.confirmed(generation):
                        return
                    want = route.want
                    route.served = route.subscribers
                    route.tried = generation
                    try:
                        route.granted = await self._backend.subscribe(want)
                    except NotConnected:
                        # Lost just now, and the session learns of it by a call from the
                        # backend, perhaps from another thread. Until then it is online, and
                        # asking again without a pause would keep the loop busy.
                        await asyncio.sleep(0.001)
                        continue
                    route.generation, route.asked = generation, want

        await self._deadline(confirmed, f"subscribing to {route.want.filter!r}")

    async def _within(self, call: Callable[[], Awaitable[Any]], what: str) -> None:
        if self._session.online:
            await self._deadline(call, what)

    async def _deadline(self, call: Callable[[], Awaitable[Any]], what: str) -> None:
        seconds = self._options.timeout
        try:
            async with asyncio.timeout(seconds):
                await call()
        except TimeoutError as error:
            if isinstance(error, PubSubError):
                raise
            raise OperationTimeout(
                f"{what}: no answer within {seconds:g} s",
                hint="look at bus.status, or raise the bus's timeout",
                backend=self._backend.context.info.name,
            ) from error

    # --- a new session -----------------------------------------------------------------

    async def restore(self, facts: SessionFacts, generation: int, lost_at: float | None) -> None:
        """Restore the subscriptions; mark the gap since *lost_at*, and fill it where possible."""
        history = self._owner.can(Cap.HISTORY) and self._backend.keeps_history
        if not self._session.been_online and facts.resumed:
            self.router.keep_orphans()
            self._owner.spawn(self._give_up_orphans(), "orphans")
        routes = self.router.routes
        await asyncio.gather(
            *(self._restore_route(route, generation, facts.resumed) for route in routes)
        )
        await self._leave_behind(facts.resumed)
        if lost_at is not None and generation > 1:
            await self._bridge(lost_at, facts.resumed, history)
        if self._pausing:
            self._backend.pause()

    async def _leave_behind(self, resumed: bool) -> None:
        """Unsubscribe at the broker from filters that were dropped without a session."""
        left, self._left_behind = self._left_behind, {}
        for key, want in left.items():
            if not resumed or self.router.find(*key) is not None:
                continue
            try:
                await self._deadline(
                    functools.partial(self._backend.unsubscribe, want),
                    f"unsubscribing from {want.filter!r}",
                )
            except PubSubError as error:
                logger.info("%s", error)
                self._left_behind[key] = want

    async def _give_up_orphans(self) -> None:
        await self._clock.sleep(_ORPHANS_WAIT)
        if dropped := self.router.drop_orphans():
            text = (
                f"{dropped} messages for subscriptions of an earlier process were given up: "
                f"nobody subscribed to their topics within {_ORPHANS_WAIT:g} s"
            )
            logger.warning("bus %r: %s", self._backend.context.bus, text)
            self._owner.note(Notice("unwanted", text))

    async def _restore_route(self, route: Route, generation: int, resumed: bool) -> None:
        # A resumed session has the subscription already, if the session just before this one
        # had it confirmed, and nothing about it has changed since.
        if resumed and route.generation == generation - 1 and route.asked == route.want:
            route.generation = route.tried = generation
            return
        want = route.want
        route.served = route.subscribers
        route.tried = generation
        for subscriber in route.subscribers:
            subscriber.forget_retained()
        try:
            await self._deadline(
                lambda: self._backend.subscribe(want), f"subscribing to {want.filter!r} again"
            )
        except SubscribeFailed as error:
            logger.warning("the broker no longer accepts %r: %s", want.filter, error)
            self._owner.note(SubscriptionRefused(want.filter, error))
            for subscriber in route.subscribers:
                subscriber.buffer.fail(error)
        else:
            route.generation, route.asked = generation, want

    async def _bridge(self, since: float, resumed: bool, history: bool) -> None:
        """Mark the gap in every subscription; fill it from the history where there is one.

        Frames of the new session are still held back, so the gap comes before them. All
        histories are read before the first gap is marked: a session that is lost meanwhile
        has then told nothing, and the next one bridges the whole outage.
        """
        until = self._clock.time()
        missed: dict[Route, list[InFrame]] = {}
        if history and not resumed:
            for route in self.router.routes:
                if route.want.group is None:  # other members of a group have received them
                    await self._fetch_missed(route, since, missed)
        unfilled = [
            route
            for route in self.router.routes
            if route.want.group is None and route not in missed
        ]
        recovered = resumed or (history and not unfilled)
        if not recovered:
            self._stats.gaps += 1
        for route in self.router.routes:
            filled = resumed or (history and (route in missed or route.want.group is not None))
            gap = _gap(since, until, recovered=filled, filter=route.want.filter)
            frames = missed.get(route)
            if frames:
                route.last = frames[-1]
            for subscriber in route.subscribers:
                subscriber.buffer.put_gap(msgspec.structs.replace(gap, filter=subscriber.filter))
                if frames:
                    subscriber.buffer.bridge(frames)
        self._owner.note(_gap(since, until, recovered=recovered))

    async def _fetch_missed(
        self, route: Route, since: float, missed: dict[Route, list[InFrame]]
    ) -> None:
        """Add to *missed* what *route* has missed, unless its history cannot be read."""
        backend = cast("HasHistory", self._backend)
        query = HistoryQuery(since=since - _SLACK)
        try:
            stored = [frame async for frame in backend.history(route.want.filter, query)]
        except NotConnected:
            raise
        except PubSubError as error:
            # The session goes on: a key may be missing for this filter alone. Its gap is
            # then told as not recovered.
            logger.warning("the history of %r cannot be read: %s", route.want.filter, error)
        else:
            missed[route] = _after(stored, route.last, since)

    # --- pressure ------------------------------------------------------------------------

    def pause(self, subscriber: Subscriber) -> None:
        """Hold the broker back until *subscriber* has room."""
        if not self._pausing:
            self._backend.pause()
        self._pausing.add(subscriber)

    def unpause(self, subscriber: Subscriber) -> None:
        """Let the broker go on, once no other subscriber is full."""
        if subscriber in self._pausing:
            self._pausing.discard(subscriber)
            if not self._pausing:
                self._backend.resume()


def _gap(since: float, until: float, *, recovered: bool, filter: str = "") -> Gap:
    lost = 0 if recovered else None
    return Gap(GapReason.DISCONNECTED, lost, recovered, since, until, filter)


def _after(stored: list[InFrame], last: InFrame | None, since: float) -> list[InFrame]:
    """Return the messages stored after *last*, the newest that had arrived.

    By identifier where there is one: the broker's clock and ours differ.
    """
    if last is not None and last.id is not None:
        for index in range(len(stored) - 1, -1, -1):
            if stored[index].id == last.id and stored[index].topic == last.topic:
                return stored[index + 1 :]
    return [frame for frame in stored if frame.time >= since]
