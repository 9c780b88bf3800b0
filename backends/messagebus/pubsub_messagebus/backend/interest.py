"""Who is subscribed to what: the listing of a feed, and the changes after it, made to balance.

The distributor counts subscriptions, but tells them without counts, and tells the end of a
connection once however often it had subscribed. So a removal may leave a doubt: is the client
gone, or does it hold the topic once more? Then the feed's listing is asked for again and
compared. What a watch is told therefore balances: one joined, one left.

Distributors up to 6.0 keep ghosts: a subscription that was added once and removed once stays in
their listings until its connection ends. Compared with such a listing, nobody who was listed
ever leaves. So there a removal is believed: it takes one off the count, an unknown count being
one, and a listing only tells who of the others has gone altogether. Whether this distributor
keeps ghosts is tried out once per session.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator
from typing import TypeAlias

from pubsub_core.errors import InvalidFilter, NotConnected
from pubsub_core.events import InterestEvent, InterestKind
from pubsub_core.interfaces import Watch
from pubsub_core.message import Member
from pubsub_core.topics import TopicFilter, parse_filter
from pubsub_messagebus.protocol import (
    FENCE_FEEDS,
    ForwardedSubscriptionRequest,
    encode_notification_request,
    encode_subscription_request,
)

from .names import TopicNames
from .session import Session

__all__ = ["FeedView", "Interest"]

_Key: TypeAlias = tuple[str, uuid.UUID]
"""Topic and client."""


class FeedView:
    """The subscriptions to one feed, kept as long as somebody looks.

    Attributes:
        known: Who is there.
        counts: How often they subscribed, or None where only a listing told of them.
        gone: Those whose removal was believed; a listing that has them has ghosts.
        watches: Who is told of changes.
        listed: The last word on each subscription since a listing was asked for; None when
            no listing is under way.
        muted: Between giving up the old listing and asking for the next, nothing counts.
        dirty: A removal left a doubt.
        users: How many look at it for a moment.
        working: The task that lists.
    """

    def __init__(self, feed: str) -> None:
        self.feed = feed
        self.known: dict[_Key, Member] = {}
        self.counts: dict[_Key, int | None] = {}
        self.gone: set[_Key] = set()
        self.watches: dict[int, tuple[Watch, TopicFilter]] = {}
        self.listed: dict[_Key, tuple[bool, Member]] | None = None
        self.muted = False
        self.dirty = False
        self.users = 0
        self.working: asyncio.Task[None] | None = None


class Interest:
    """The views of one session, by feed."""

    def __init__(self, session: Session, names: TopicNames, *, backend: str) -> None:
        self._session = session
        self._names = names
        self._backend = backend
        self._views: dict[str, FeedView] = {}
        self._trial = f"{FENCE_FEEDS}{uuid.uuid4()}"
        self._tried = 0
        self._trying: asyncio.Task[None] | None = None

    @property
    def _ghosts(self) -> bool:
        # Added once, removed, and listed all the same.
        return self._tried > 1

    async def watch(self, watch: Watch) -> list[tuple[str, Member]]:
        """Start telling changes; return the present subscriptions, as core topics and members.

        Raises:
            InvalidFilter: It spans all feeds.
            NotConnected: The session ended.
        """
        parsed = parse_filter(watch.filter)
        feed = self._names.pair(parsed.filter).feed
        if self._names.feed is None and feed in ("+", "#"):
            raise InvalidFilter(
                f"{watch.filter!r} spans all feeds, and the distributor tells of one at a time",
                topic=watch.filter,
                level=0,
                character=feed,
                hint="name the feed: 'LSE/#'",
                backend=self._backend,
            )
        view = self._open(feed)
        try:
            await self._listed(view)
            view.watches[watch.id] = (watch, parsed)
        finally:
            view.users -= 1
            self._close(view)
        there = ((self._names.core(feed, name), who) for (name, _), who in view.known.items())
        return [(topic, member) for topic, member in there if parsed.matches(topic)]

    def unwatch(self, watch: Watch) -> None:
        """Stop telling."""
        for view in tuple(self._views.values()):
            if view.watches.pop(watch.id, None) is not None:
                self._close(view)

    async def members(self, topic: str) -> list[Member]:
        """Return who is subscribed to a core topic now."""
        feed, wanted = self._names.pair(topic)
        async with self._settled(feed) as view:
            return [member for (name, _), member in view.known.items() if name == wanted]

    async def is_subscribed(self, feed: str, topic: str, client_id: uuid.UUID) -> bool:
        """Whether a client is subscribed to (*feed*, *topic*) now, as the listing has it."""
        async with self._settled(feed) as view:
            return (topic, client_id) in view.known

    def take(self, message: ForwardedSubscriptionRequest) -> None:
        """Act on one notification."""
        if message.feed == self._trial:
            self._tried += message.is_add
            return
        view = self._views.get(message.feed)
        if view is None or view.muted:
            return
        key = (message.topic, message.client_id)
        member = Member(str(message.client_id), message.user, message.host)
        if view.listed is not None:
            if message.is_add and key in view.listed:
                view.gone.discard(key)  # a listing has it once; this is news
            view.listed[key] = (message.is_add, member)
            return
        if message.is_add:
            if key in view.known:
                count = view.counts.get(key)
                view.counts[key] = None if count is None else count + 1
            else:
                self._join(view, key, member, 1)
        elif key in view.known:
            self._removed(view, key)

    def _removed(self, view: FeedView, key: _Key) -> None:
        count = view.counts.get(key)
        believed = self._ghosts or not self._session.confirms
        if count == 1 or (believed and count is None):
            self._leave(view, key)
            if believed:
                view.gone.add(key)
            return
        if believed and count is not None:
            view.counts[key] = count - 1
        if not self._session.confirms:
            return  # nothing would tell where a listing ends
        view.dirty = True
        if view.working is None:
            view.working = self._session.spawn(self._list(view), "listing")

    # --- views -------------------------------------------------------------------------------

    def _open(self, feed: str) -> FeedView:
        if self._session.over:
            raise self._session.not_connected()
        view = self._views.get(feed)
        if view is None:
            view = self._views[feed] = FeedView(feed)
            view.working = self._session.spawn(self._list(view, first=True), "listing")
        view.users += 1
        return view

    def _close(self, view: FeedView) -> None:
        if view.users or view.watches or self._views.get(view.feed) is not view:
            return
        del self._views[view.feed]
        if view.working is not None:
            view.working.cancel()
        if not self._session.over:
            self._session.send(encode_notification_request(view.feed, False))

    @contextlib.asynccontextmanager
    async def _settled(self, feed: str) -> AsyncGenerator[FeedView, None]:
        """Look at a feed for a moment, after everything sent before has shown in it."""
        view = self._open(feed)
        try:
            await self._listed(view)
            await self._session.confirm()
            while view.working is not None:
                await self._listed(view)
            yield view
        finally:
            view.users -= 1
            self._close(view)

    async def _listed(self, view: FeedView) -> None:
        """Return when the listing is complete."""
        if view.working is not None:
            await asyncio.wait([view.working])
        if self._session.over:
            raise self._session.not_connected()

    # --- listings ----------------------------------------------------------------------------

    async def _list(self, view: FeedView, *, first: bool = False) -> None:
        """Ask for the listing and compare, until no removal leaves a doubt."""
        session = self._session
        try:
            await self._try_out()
            view.dirty = True
            while view.dirty:
                view.dirty = False
                if not first:
                    view.muted = True
                    session.send(encode_notification_request(view.feed, False))
                    # Only a registration that is new is answered with a listing, and what
                    # is under way for the old one must not be taken for it.
                    await session.confirm()
                view.listed = {}
                view.muted = False
                first = False
                session.send(encode_notification_request(view.feed, True))
                await session.confirm()
                self._compare(view)
        except NotConnected:
            return
        finally:
            view.working = None

    async def _try_out(self) -> None:
        """Find out whether listings keep ghosts: make one, and look for it."""
        if not self._session.confirms:
            return
        if self._trying is None:
            self._trying = self._session.spawn(self._make_ghost(), "trial")
        await asyncio.shield(self._trying)

    async def _make_ghost(self) -> None:
        session, feed = self._session, self._trial
        session.send(
            encode_notification_request(feed, True)
            + encode_subscription_request(feed, "x", True)
            + encode_subscription_request(feed, "x", False)
            + encode_notification_request(feed, False)
            + encode_notification_request(feed, True)
        )
        await session.confirm()
        session.send(encode_notification_request(feed, False))

    def _compare(self, view: FeedView) -> None:
        """Tell the differences between a listing and the known subscribers."""
        listed, view.listed = view.listed or {}, None
        view.gone.intersection_update(listed)
        for key in tuple(view.known):
            if key not in listed:
                self._leave(view, key)
        for key, (is_add, member) in listed.items():
            if self._ghosts:
                if key in view.known:
                    if not is_add:
                        self._removed(view, key)
                elif not is_add:
                    view.gone.add(key)
                elif key not in view.gone:
                    self._join(view, key, member, None)
                continue
            if not is_add:
                # Removed since; it may have subscribed twice, and still be there.
                view.dirty = True
                if key not in view.known:
                    continue
            view.counts[key] = None
            if key not in view.known:
                self._join(view, key, member, None)

    def _join(self, view: FeedView, key: _Key, member: Member, count: int | None) -> None:
        view.gone.discard(key)
        view.known[key] = member
        view.counts[key] = count
        self._tell(view, key[0], member, InterestKind.JOINED)

    def _leave(self, view: FeedView, key: _Key) -> None:
        member = view.known.pop(key)
        view.counts.pop(key, None)
        self._tell(view, key[0], member, InterestKind.LEFT)

    def _tell(self, view: FeedView, name: str, member: Member, kind: InterestKind) -> None:
        topic = self._names.core(view.feed, name)
        watches = tuple(
            identity for identity, (_, parsed) in view.watches.items() if parsed.matches(topic)
        )
        if watches:
            self._session.sink.interest(InterestEvent(kind, topic, member, watches=watches))
