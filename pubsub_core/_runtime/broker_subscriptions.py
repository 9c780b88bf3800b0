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
from pubsub_core.subscription import Subscription

from .router import Router, Wire
from .session import Session

__all__ = ["Wiring"]

logger = logging.getLogger("pubsub_core")

# Clocks of two machines differ, and so do the times a broker gives its messages.
_SLACK = 1.0

# Seconds for which messages for an earlier process's subscriptions wait to be wanted again.
# They occupy the broker's window (20 messages at Mosquitto), so for ever would stop the rest.
_ORPHANS_WAIT = 10.0


class Owner(Protocol):
    """What the wiring asks of the bus."""

    def can(self, cap: Cap) -> bool:
        """Whether the session at hand has *cap*."""
        ...

    def note(self, event: BusEvent) -> None:
        """Tell an event."""
        ...

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run *work* beside."""
        ...


class Wiring:
    """The subscriptions of one bus, here and at the broker."""

    def __init__(
        self,
        backend: Backend,
        session: Session,
        options: BusOptions,
        clock: Clock,
        stats: BusStats,
        owner: Owner,
    ) -> None:
        self._backend = backend
        self._session = session
        self._options = options
        self._clock = clock
        self._stats = stats
        self._owner = owner
        self._locks = KeyedLocks[tuple[str, str | None]]()
        self._pausing: set[Subscription[Any]] = set()
        # Ended without the broker knowing; one that resumes the session still has them.
        self._left_behind: dict[tuple[str, str | None], WireSub] = {}
        self.router = Router()
        self.router.bind(backend)

    # --- subscribing -------------------------------------------------------------------

    async def attach(self, subscription: Subscription[Any], replay: HistoryQuery | None) -> None:
        """Bring *subscription* to life; return when the broker has confirmed it."""
        if replay is not None:
            subscription.buffer.hold()
        wire = self.router.attach(subscription, echo=self._options.echo)
        try:
            await self._confirm(wire)
            if (
                subscription not in wire.served
                and subscription.group is None
                and self._owner.can(Cap.RETAINED)
            ):
                want = wire.want
                await self._within(
                    lambda: self._backend.repeat_retained(want),
                    f"asking for what {want.filter!r} retained",
                )
            if replay is not None:
                backend = cast("HasHistory", self._backend)
                frames = backend.history(subscription.topic_filter.filter, replay)
                subscription.buffer.replay([frame async for frame in frames])
        except BaseException:
            subscription.end()
            self._owner.spawn(self.detach(subscription), "detach")
            raise
        subscription.start()
        self.router.adopt_orphans()

    async def detach(self, subscription: Subscription[Any]) -> None:
        """Take *subscription* away; return when the broker has confirmed, if it must know."""
        self.unpause(subscription)
        wire = self.router.detach(subscription)
        if wire is not None:
            if wire.tried and not self._session.online:
                self._left_behind[wire.key] = wire.want
            # In a task of its own: whoever is cancelled here must not leave it at the broker.
            await asyncio.shield(self._owner.spawn(self._forget(wire), "unsubscribe"))

    async def _forget(self, wire: Wire) -> None:
        key = wire.key
        async with self._locks.of(key):
            # Somebody may have subscribed again while we waited for our turn.
            if wire.tried == self._session.generation and self.router.find(*key) is None:
                try:
                    await self._within(
                        lambda: self._backend.unsubscribe(wire.want),
                        f"unsubscribing from {wire.want.filter!r}",
                    )
                except PubSubError as error:
                    # Locally it is gone; what the broker still sends is not routed.
                    logger.info("%s", error)
                    self._left_behind[key] = wire.want

    async def _confirm(self, wire: Wire) -> None:
        session = self._session

        async def confirmed() -> None:
            while True:
                await session.wait_online()
                async with self._locks.of(wire.key):
                    generation = session.generation
                    if not session.online:
                        continue
                    if wire.confirmed(generation):
                        return
                    want = wire.want
                    wire.served = wire.subscriptions
                    wire.tried = generation
                    try:
                        wire.granted = await self._backend.subscribe(want)
                    except NotConnected:
                        # Lost just now. The session engine notices in its own time.
                        await asyncio.sleep(0.001)
                        continue
                    wire.generation, wire.asked = generation, want

        await self._deadline(confirmed, f"subscribing to {wire.want.filter!r}")

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
        """Bring the subscriptions back; mark and fill the hole since *lost_at*."""
        history = self._owner.can(Cap.HISTORY) and self._backend.keeps_history
        if not self._session.been_online and facts.resumed:
            self.router.keep_orphans()
            self._owner.spawn(self._give_up_orphans(), "orphans")
        wires = self.router.wires
        await asyncio.gather(*(self._renew(wire, generation, facts.resumed) for wire in wires))
        await self._leave_behind(facts.resumed)
        if lost_at is not None and generation > 1:
            await self._bridge(lost_at, facts.resumed, history)
        if self._pausing:
            self._backend.pause()

    async def _leave_behind(self, resumed: bool) -> None:
        """Drop at the broker what was ended here while there was no session."""
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

    async def _renew(self, wire: Wire, generation: int, resumed: bool) -> None:
        if resumed and wire.generation == generation - 1 and wire.asked == wire.want:
            wire.generation = wire.tried = generation
            return
        want = wire.want
        wire.served = wire.subscriptions
        wire.tried = generation
        for subscription in wire.subscriptions:
            subscription.renewed()
        try:
            await self._deadline(
                lambda: self._backend.subscribe(want), f"subscribing to {want.filter!r} again"
            )
        except SubscribeFailed as error:
            logger.warning("the broker no longer accepts %r: %s", want.filter, error)
            self._owner.note(SubscriptionRefused(want.filter, error))
            for subscription in wire.subscriptions:
                subscription.buffer.fail(error)
        else:
            wire.generation, wire.asked = generation, want

    async def _bridge(self, since: float, resumed: bool, history: bool) -> None:
        until = self._clock.time()
        missed: dict[Wire, list[InFrame]] = {}
        if history and not resumed:
            for wire in self.router.wires:
                if wire.want.group is None:  # other members of a group have had them
                    await self._fetch_missed(wire, since, missed)
        unfilled = [
            wire for wire in self.router.wires if wire.want.group is None and wire not in missed
        ]
        recovered = resumed or (history and not unfilled)
        if not recovered:
            self._stats.gaps += 1
        for wire in self.router.wires:
            filled = resumed or (history and (wire in missed or wire.want.group is not None))
            gap = _gap(since, until, recovered=filled, filter=wire.want.filter)
            frames = missed.get(wire)
            if frames:
                wire.last = frames[-1]
            for subscription in wire.subscriptions:
                subscription.put_gap(msgspec.structs.replace(gap, filter=subscription.filter))
                if frames:
                    subscription.buffer.bridge(frames)
        self._owner.note(_gap(since, until, recovered=recovered))

    async def _fetch_missed(
        self, wire: Wire, since: float, missed: dict[Wire, list[InFrame]]
    ) -> None:
        """Add what *wire* has missed; not where the history of its filter cannot be had."""
        backend = cast("HasHistory", self._backend)
        query = HistoryQuery(since=since - _SLACK)
        try:
            stored = [frame async for frame in backend.history(wire.want.filter, query)]
        except NotConnected:
            raise
        except PubSubError as error:
            # No reason to give up the session: a key may be missing for this filter alone.
            logger.warning("what %r missed cannot be had: %s", wire.want.filter, error)
        else:
            missed[wire] = _after(stored, wire.last, since)

    # --- pressure ------------------------------------------------------------------------

    def pause(self, subscription: Subscription[Any]) -> None:
        """Hold the broker back until *subscription* has room."""
        if not self._pausing:
            self._backend.pause()
        self._pausing.add(subscription)

    def unpause(self, subscription: Subscription[Any]) -> None:
        """Say that *subscription* has room again."""
        if subscription in self._pausing:
            self._pausing.discard(subscription)
            if not self._pausing:
                self._backend.resume()


def _gap(since: float, until: float, *, recovered: bool, filter: str = "") -> Gap:
    lost = 0 if recovered else None
    return Gap(GapReason.DISCONNECTED, lost, recovered, since, until, filter)


def _after(stored: list[InFrame], last: InFrame | None, since: float) -> list[InFrame]:
    """Return what was stored after *last*, the newest message that had arrived."""
    if last is not None and last.id is not None:
        for index in range(len(stored) - 1, -1, -1):
            if stored[index].id == last.id and stored[index].topic == last.topic:
                return stored[index + 1 :]
    return [frame for frame in stored if frame.time >= since]
