"""Emitter as the core sees it: the one place where core words become Emitter's.

A core topic ``a/b`` is the channel ``a/b/``, and on the wire ``<key>/a/b/?ttl=60``; the key is
found in a ring or made on demand, and leaves no trace in what comes back. The MQTT below is
`pubsub_mqtt`'s.

With the broker's own matching rule a subscription reaches below its channel, and ``#`` matches
nothing; with the other one it is MQTT's, except that ``a/#/`` does not match ``a/``. A filter
with ``#`` is therefore subscribed to in the form that the broker understands, or in both where
that is not known: a connection gets each message once in any case, and the core filters again.

The broker confirms a publish that it refuses. Before that it says so on ``emitter/error/``, with
the packet id of the publish; so a refusal is an error of the call that waits for it.

Sources: emitter-io/emitter, ``internal/service/pubsub`` and ``internal/security/channel.go``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from pubsub_core.errors import (
    ConnectError,
    InvalidFilter,
    NotAuthorized,
    NotConnected,
    Outcome,
    PayloadTooLarge,
    PublishNotAuthorized,
    SubscribeFailed,
    SubscribeNotAuthorized,
)
from pubsub_core.events import InterestEvent
from pubsub_core.interfaces import (
    BackendContext,
    HistoryQuery,
    SessionFacts,
    Sink,
    Watch,
    WireSub,
)
from pubsub_core.keyed import BoundedCache
from pubsub_core.message import InFrame, Member, Origin, OutFrame, Receipt
from pubsub_core.topics import overlap
from pubsub_emitter.errors import EmitterError
from pubsub_emitter.plugin import MAX_STORED_PAYLOAD
from pubsub_emitter.protocol import SHARE, Fault
from pubsub_mqtt.connection import Outgoing, Request
from pubsub_mqtt.packets import Incoming

from .history import fetch, history_channel
from .keyring import RingKey
from .live_log import LiveLog
from .presence import Interest
from .session import EmitterSession

__all__ = ["EmitterBackend"]

logger = logging.getLogger("pubsub_emitter.backend")

_PROBE: Final = "pubsub-probe"
_KEPT: Final = 4096
_SCAN: Final = 1000
"""Stored messages that are looked at to find the newest of each topic."""


class _Route:
    """Where a topic's messages go, without options. Has no repr that shows the key."""

    __slots__ = ("key", "topic")

    def __init__(self, key: RingKey, channel: str) -> None:
        self.key = key
        self.topic = f"{key.text}/{channel}"


class EmitterBackend(EmitterSession):
    """One session with an Emitter broker.

    `Bus.native` is this object: `keygen`, `keyban`, `link`, `publish_link` and `me` are
    the broker's own requests, and `request` sends any other.
    """

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._routes = BoundedCache[tuple[str, str], _Route](_KEPT)
        # Publishes that wait for a key, and those behind them.
        self._queued: deque[tuple[OutFrame, asyncio.Future[tuple[Outgoing, RingKey]]]] = deque()
        self._serving: asyncio.Task[None] | None = None
        self._current: dict[int, WireSub] = {}
        self._groups: dict[str | None, dict[int, WireSub]] = {}
        self._holders: dict[str, set[int]] = {}
        self._held: dict[int, list[str]] = {}
        self._learning = asyncio.Lock()
        self._learned = False
        self._probe_topic = ""
        self._probe_came = False
        self._live_log = LiveLog()
        self._logs_live = self._ring.may("l")
        self._retains = self._options.store is None and self._logs_live
        self._interest = Interest(
            self._ask_presence,
            self._listening_channels,
            self._interested,
            self._spawn,
            self._options.presence_refresh,
        )

    async def open(self, sink: Sink) -> SessionFacts:
        """Make one session; see `Backend.open`."""
        self._live_log.begin()
        self._learned = False
        return await super().open(sink)

    def session_ended(self, error: ConnectError | None) -> ConnectError | None:
        """Let everything of the session go; see `ConnectionBackend.session_ended`."""
        told = super().session_ended(error)
        queued, self._queued = self._queued, deque()
        for _, turn in queued:
            if not turn.done():
                turn.set_exception(self._not_connected())
        self._serving = None
        self._current.clear()
        self._groups.clear()
        self._holders.clear()
        self._held.clear()
        self._interest.reset()
        return told

    def _refused(self, key: RingKey, topic: str, operation: str) -> None:
        super()._refused(key, topic, operation)
        self._routes.clear()

    # --- channels -----------------------------------------------------------------------

    def _channels(self, filter: str, group: str | None = None) -> tuple[str, ...]:
        """Return the channels that together give everything that matches *filter*."""
        lead = "" if group is None else f"{SHARE}/{group}/"
        levels = filter.split("/")
        if levels[-1] != "#":
            return (f"{lead}{filter}/",)
        parent = "/".join(levels[:-1])
        found: list[str] = []
        if self.matcher != "mqtt":
            found.append(f"{parent or '+'}/")
        elif parent:
            found.append(f"{parent}/")
        if self.matcher != "emitter":
            found.append(f"{parent}/#/" if parent else "#/")
        return tuple(f"{lead}{each}" for each in found)

    def _listening_channels(self, filter: str) -> Sequence[str]:
        self._check(filter, InvalidFilter)
        return self._channels(filter)

    # --- publishing ---------------------------------------------------------------------

    def _letters(self, out: OutFrame) -> str:
        stores = out.retain or out.ttl is not None or self._options.store is not None
        return "ws" if stores else "w"

    def _route(self, out: OutFrame) -> _Route | None:
        """Return where *out* goes; None while there is no key for it."""
        letters = self._letters(out)
        known = self._routes.get((out.topic, letters))
        if known is not None and not self._ring.is_old(known.key):
            return known
        channel = self.to_wire(out.topic)
        key = self._ring.peek(letters, channel)
        if key is None:
            return None
        return self._routes.keep((out.topic, letters), _Route(key, channel))

    def _options_of(self, out: OutFrame) -> str:
        ttl = out.ttl
        if ttl is None and not out.retain:
            ttl = self._options.store
        if (ttl is not None or out.retain) and len(out.payload) > MAX_STORED_PAYLOAD:
            raise PayloadTooLarge(
                size=len(out.payload),
                limit=MAX_STORED_PAYLOAD,
                hint="history could not give a longer message; publish it without ttl and retain",
                backend=self.name,
                topic=out.topic,
            )
        if ttl is None:
            return "" if out.echo else "?me=0"
        seconds = min(math.ceil(ttl), 0xFFFF_FFFF)
        return f"?ttl={seconds}" if out.echo else f"?ttl={seconds}&me=0"

    def try_publish(self, out: OutFrame) -> Receipt | None:
        """Hand a QoS 0 message to the operating system without waiting, if that is possible."""
        if out.qos or self._queued:
            return None
        route = self._route(out)
        if route is None:
            return None
        return self.send_now(out, route.topic + self._options_of(out), out.payload)

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish; at QoS 1 the broker confirms, or refuses, which is an error of this call."""
        self.check_qos(out, "Emitter takes quality of service 2 for 1")
        route = None if self._queued else self._route(out)
        if route is None:
            sent, key = await self._in_turn(out)
        else:
            sent, key = self._send(out, route), route.key
        try:
            receipt = await self.receipt(sent)
        finally:
            fault = self._faults.pop(sent, None)
        if fault is not None:
            raise self._rejected(fault, out.topic, key)
        if out.qos:
            key.accepted("publish", out.topic)
        return receipt

    async def _in_turn(self, out: OutFrame) -> tuple[Outgoing, RingKey]:
        """Submit in the order of the calls, although one of them waits for its key."""
        turn: asyncio.Future[tuple[Outgoing, RingKey]] = asyncio.get_running_loop().create_future()
        self._queued.append((out, turn))
        if self._serving is None:
            self._serving = self._spawn(self._serve(), "publish")
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.connection.abandon(turn.result()[0])
            raise

    async def _serve(self) -> None:
        """Submit queued publishes; the task ends with the session, which fails the rest."""
        queued = self._queued
        while queued:
            out, turn = queued[0]
            try:
                route = None if turn.done() else self._route(out) or await self._obtain(out)
                if route is not None and not turn.done():
                    turn.set_result((self._send(out, route), route.key))
            except Exception as error:  # noqa: BLE001  it is raised where somebody waits
                if not turn.done():
                    turn.set_exception(error)
            queued.popleft()
        self._serving = None

    async def _obtain(self, out: OutFrame) -> _Route:
        channel = self.to_wire(out.topic)
        try:
            key = await self._key(self._letters(out), out.topic, channel)
        except NotAuthorized as exc:
            raise PublishNotAuthorized(
                exc.message,
                outcome=Outcome.NOT_SENT,
                hint=exc.hint,
                backend=self.name,
                topic=out.topic,
            ) from exc.__cause__
        return _Route(key, channel)

    def _send(self, out: OutFrame, route: _Route) -> Outgoing:
        return self.submit(out, route.topic + self._options_of(out), out.payload)

    # --- subscribing --------------------------------------------------------------------

    async def subscribe(self, want: WireSub) -> int:
        """Subscribe; see `Backend.subscribe`. Deliveries have quality of service 0."""
        self._check(want.filter, InvalidFilter)
        if want.filter.endswith("#"):
            await self._learn()
        channels = self._channels(want.filter, want.group)
        others = (
            other
            for group, wants in self._groups.items()
            if group != want.group
            for other in wants.values()
        )
        self.check_distinct(want, others, meets=self._meets)
        new = want.id not in self._current
        self._current[want.id] = want
        self._groups.setdefault(want.group, {})[want.id] = want
        before = self._live_log.number
        joined: list[str] = []
        try:
            key = await self._subscribe_key(want, channels)
            for channel in channels:
                async with self.turns.of(channel):
                    if not self._holders.get(channel):
                        await self._join(key, channel, want.filter)
                    holders = self._holders.setdefault(channel, set())
                    if want.id not in holders:
                        holders.add(want.id)
                        self._held.setdefault(want.id, []).append(channel)
                        joined.append(channel)
            if new:
                await self._give_retained(want, before)
        except BaseException:
            if new:
                self._end(want)
                self._leave_at_once(want, joined)
            raise
        return 0

    async def _subscribe_key(self, want: WireSub, channels: Sequence[str]) -> RingKey:
        try:
            return await self._key("r", want.filter, *channels)
        except NotAuthorized as exc:
            raise SubscribeNotAuthorized(
                exc.message, hint=exc.hint, backend=self.name, topic=want.filter
            ) from exc.__cause__

    async def _join(self, key: RingKey, channel: str, filter: str) -> None:
        """Subscribe to one channel; nothing stored is wanted, which comes unmarked."""
        waiter: asyncio.Future[Fault | None] = asyncio.get_running_loop().create_future()

        def done(request: Request) -> None:
            fault = self._subscribing.pop(request.packet_id, None)
            if not waiter.done():
                waiter.set_result(fault)

        topic = f"{key.text}/{channel}"
        request = self.connection.subscribe_verbatim(f"{topic}?last=0", done)
        self._subscribing[request.packet_id] = None
        try:
            fault = await waiter
        except asyncio.CancelledError:
            # Not waited for: a cancelled caller must not wait, and no subscription may stay.
            with contextlib.suppress(NotConnected):
                self.connection.unsubscribe([topic], _ignore)
            raise
        if request.error is not None:
            raise self._not_connected()
        if request.codes[0] >= 0x80:
            raise self._subscription_refused(fault, filter, key)
        key.accepted("subscribe", filter)

    def _subscription_refused(
        self, fault: Fault | None, filter: str, key: RingKey
    ) -> SubscribeFailed:
        said = fault.message if fault is not None else "it does not say why"
        if fault is None or fault.status == 401:
            self._refused(key, filter, "subscribe")
            return SubscribeNotAuthorized(
                f"the broker refused a subscription to {filter!r}: {said}",
                hint="check the channel, permissions and expiry of its key; the broker's log "
                "says more",
                backend=self.name,
                topic=filter,
            )
        return SubscribeFailed(
            f"the broker refused a subscription to {filter!r}: {said} ({fault.status})",
            hint="look into the broker's log",
            backend=self.name,
            topic=filter,
            retryable=False,
        )

    async def unsubscribe(self, want: WireSub) -> None:
        """Drop a subscription; a channel that another one needs as well stays."""
        self._end(want)
        channels = self._held.pop(want.id, [])
        try:
            for channel in channels:
                async with self.turns.of(channel):
                    await self._leave(want, channel)
        except BaseException:
            self._leave_at_once(want, channels)
            raise

    async def _leave(self, want: WireSub, channel: str) -> None:
        holders = self._holders.get(channel, set())
        if want.id not in holders:
            return  # the session is another one
        if len(holders) > 1:
            holders.discard(want.id)
            return
        key = await self._key("r", want.filter, channel)
        if self._holders.get(channel) is not holders:
            return
        del self._holders[channel]
        try:
            await self.driver.unsubscribe(f"{key.text}/{channel}")
        except NotConnected:
            raise self._not_connected() from None

    def _end(self, want: WireSub) -> None:
        self._current.pop(want.id, None)
        group = self._groups.get(want.group, {})
        group.pop(want.id, None)
        if not group:
            self._groups.pop(want.group, None)

    def _leave_at_once(self, want: WireSub, channels: Sequence[str]) -> None:
        self._held.pop(want.id, None)
        for channel in channels:
            holders = self._holders.get(channel, set())
            if want.id not in holders:
                continue
            holders.discard(want.id)
            if holders:
                continue
            del self._holders[channel]
            key = self._ring.peek("r", channel)
            if key is not None:
                with contextlib.suppress(NotConnected):
                    self.connection.unsubscribe([f"{key.text}/{channel}"], _ignore)

    def _meets(self, one: str, other: str) -> bool:
        """Whether a message can come for both filters.

        The broker's own rule may bring one from below the channel of an ordinary subscription.
        """
        if "#" in (one, other):
            return True
        if self.matcher == "mqtt":
            return overlap(one, other)
        return overlap(f"{one.removesuffix('/#')}/#", f"{other.removesuffix('/#')}/#")

    async def _learn(self) -> None:
        """Find out the broker's matching rule, once in a session, where keys can be made.

        A message below a channel of our own arrives there, or does not, before its
        confirmation. Without such a key filters with ``#`` are subscribed to in both forms.
        """
        if self.matcher != "auto" or self._learned or not self._ring.issues:
            return
        async with self._learning:
            if self._learned:
                return
            channel = f"{_PROBE}/{secrets.token_hex(8)}/"
            below = f"{channel}x/"
            try:
                reads = await self._key("r", channel, channel)
                writes = await self._key("w", below, below)
                self._probe_topic, self._probe_came = below, False
                await self._join(reads, channel, channel)
                _, fault = await self._ask(f"{writes.text}/{below}", b"")
                came = self._probe_came
                await self.driver.unsubscribe(f"{reads.text}/{channel}")
            except (NotAuthorized, SubscribeFailed, EmitterError) as error:
                logger.info("the broker's matching rule was not found out: %s", error)
            else:
                if fault is None:
                    self.matcher = "emitter" if came else "mqtt"
            finally:
                self._probe_topic = ""
            self._learned = True

    # --- stored messages ------------------------------------------------------------------

    async def history(self, filter: str, query: HistoryQuery) -> AsyncIterator[InFrame]:
        """Yield stored messages, oldest first.

        Raises:
            InvalidFilter: Its first level is a wildcard.
            NotAuthorized: No key may read what is stored there.
        """
        for frame in await self._stored(filter, query):
            yield frame

    async def _stored(
        self, filter: str, query: HistoryQuery, *, scan: int | None = None
    ) -> list[InFrame]:
        self._check(filter, InvalidFilter)
        channel = history_channel(filter)
        if channel is None:
            raise InvalidFilter(
                f"the history of {filter!r} cannot be had: the broker looks messages up by their "
                "first level",
                topic=filter,
                level=0,
                character=filter[0],
                reason="wildcard",
                hint="name the first level",
                backend=self.name,
            )
        key = await self._key("l", filter, channel)
        seen = self._live_log.seen()

        def first() -> None:
            nonlocal seen
            seen = self._live_log.seen()

        async def ask(body: Mapping[str, object]) -> Mapping[str, Any] | None:
            return await self._asked("history", body, f"the history of {filter!r}", key, filter)

        found = await fetch(
            ask,
            key.text,
            channel,
            filter,
            query,
            now=self._time,
            on_first=first,
            scan=scan,
        )
        return self._live_log.recognise(found, seen)

    async def last(self, topic: str) -> InFrame | None:
        """Return the newest stored message of *topic*; an empty one means that there is none."""
        found = await self._stored(topic, HistoryQuery(last=1), scan=_SCAN)
        if not found or not found[-1].payload:
            return None
        return msgspec.structs.replace(found[-1], origin=Origin.RETAINED)

    async def repeat_retained(self, want: WireSub) -> None:
        """Give what is stored to a subscription that joins another one."""
        await self._give_retained(want, self._live_log.number)

    async def _give_retained(self, want: WireSub, before: int) -> None:
        """Deliver the newest stored message of each topic that has not come live since."""
        if not self._retains or want.group is not None or history_channel(want.filter) is None:
            return
        exact = "+" not in want.filter and "#" not in want.filter
        query = HistoryQuery(last=1 if exact else _SCAN)
        try:
            found = await self._stored(want.filter, query, scan=_SCAN)
        except (NotAuthorized, EmitterError) as error:
            # No key allows it, or the broker is too old to have history.
            logger.debug("nothing retained for %r: %s", want.filter, error)
            return
        newest = {frame.topic: frame for frame in found}
        late = self._live_log.topics_since(before)
        sink = self.sink
        for topic, frame in newest.items():
            if sink is not None and frame.payload and topic not in late:
                sink.deliver(msgspec.structs.replace(frame, origin=Origin.RETAINED))

    # --- interest ---------------------------------------------------------------------------

    async def watch_presence(self, watch: Watch) -> Sequence[Member]:
        """Tell who comes and goes; return who is there."""
        self.to_wire(watch.filter)
        return await self._interest.watch_presence(watch)

    async def unwatch_presence(self, watch: Watch) -> None:
        """Stop telling."""
        await self._interest.unwatch(watch)

    async def members(self, topic: str) -> Sequence[Member]:
        """Return who is subscribed now."""
        self.to_wire(topic)
        return await self._interest.members(topic)

    async def watch_notifications(self, watch: Watch) -> None:
        """Tell who subscribes to what."""
        if watch.filter.endswith("#"):
            await self._learn()
        await self._interest.watch_notifications(watch)

    async def unwatch_notifications(self, watch: Watch) -> None:
        """Stop telling."""
        await self._interest.unwatch(watch)

    async def _ask_presence(
        self, channel: str, status: bool, changes: bool | None
    ) -> Mapping[str, Any]:
        topic = channel.removesuffix("/")
        key = await self._key("p", topic, channel)
        body = {"key": key.text, "channel": channel, "status": status, "changes": changes}
        answer = await self._asked("presence", body, f"presence on {topic!r}", key, topic)
        if answer is None:
            # Never nobody: those who are there would all have left.
            raise EmitterError(
                f"the broker did not tell who is at {topic!r}: more than one packet can list",
                hint="notifications of a filter with a wildcard tell changes without a list",
                retryable=False,
            )
        return answer

    # --- receiving ----------------------------------------------------------------------

    def _delivered(self, message: Incoming, sink: Sink) -> None:
        topic = message.topic
        if self._probe_topic and topic == self._probe_topic:
            self._probe_came = True
            return
        name = topic.removesuffix("/")
        now = self._time()
        sink.deliver(
            InFrame(
                topic=name,
                payload=message.payload,
                time=now,
                id=self._live_log.note(name, message.payload, now) if self._logs_live else None,
                native=message,
            )
        )

    def _presence_event(self, body: Mapping[str, Any]) -> None:
        self._interest.event(body)

    def _interested(self, event: InterestEvent) -> None:
        if self.sink is not None:
            self.sink.interest(event)


def _ignore(request: Request) -> None:
    """Take the answer that nobody waits for."""
