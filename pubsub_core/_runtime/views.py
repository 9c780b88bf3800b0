"""The inner halves of `Presence` and `Notifications`: a known state and its changes.

A view begins with what exists and goes on with changes, without a race between the two: it
reconciles by member, so a change that is told twice counts once. After a reconnect it is
compared with the new state and the differences are told.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import cast

from pubsub_core.errors import BusClosed, NotConnected, PubSubError
from pubsub_core.events import InterestEvent, InterestKind
from pubsub_core.interfaces import Backend, HasNotifications, HasPresence, Watch, WatchKind
from pubsub_core.message import Member
from pubsub_core.topics import overlap

__all__ = ["NotificationsView", "PresenceView", "View", "Views"]

_LIMIT = 4096
# A member that leaves because its connection ended takes all its subscriptions with it.
_FINAL = frozenset({"closed", "lost"})


class View(abc.ABC):
    """The base of both views: a bounded queue of changes and its reader.

    Attributes:
        watch: Names the view to the backend.
        dropped: Changes that were not told because nobody read them.
    """

    def __init__(
        self,
        watch: Watch,
        start: Callable[[View], Awaitable[None]],
        stop: Callable[[View], Awaitable[None]],
    ) -> None:
        self.watch = watch
        self._start = start
        self._stop = stop
        self._events: deque[InterestEvent] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._failure: PubSubError | None = None
        self._ended = False
        self._started = False
        self._synced = False
        self.dropped = 0

    # --- what the program's half calls -----------------------------------------------------

    @property
    def filter(self) -> str:
        """Topic or filter looked at."""
        return self.watch.filter

    @property
    def synced(self) -> bool:
        """Whether everything that existed before has been told."""
        return self._synced

    async def enter(self) -> None:
        """Return when the view has begun."""
        if not self._started:
            self._started = True
            await self._start(self)

    async def close(self) -> None:
        """End the view. Idempotent."""
        self.end()
        await self._stop(self)

    async def next(self) -> InterestEvent:
        """Return the next change.

        Raises:
            StopAsyncIteration: There will be none.
        """
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self._events.popleft()

    async def get(self, timeout: float | None) -> InterestEvent:
        """Return the next change; see `InterestView.get`."""
        try:
            async with asyncio.timeout(timeout):
                return await self.next()
        except StopAsyncIteration:
            raise BusClosed(f"the view on {self.filter!r} has ended") from None

    # --- what the bus calls ------------------------------------------------------------

    @abc.abstractmethod
    def apply(self, event: InterestEvent) -> None:
        """Take a change from the backend."""

    @abc.abstractmethod
    def stale(self) -> None:
        """Note that the session was lost: a new one must confirm what is known."""

    def end(self) -> None:
        """End iteration."""
        self._ended = True
        self._wake()

    def fail(self, error: PubSubError) -> None:
        """End iteration with *error*, after the changes that wait."""
        self._failure = error
        self._wake()

    def _tell(self, event: InterestEvent) -> None:
        self._events.append(event)
        if len(self._events) > _LIMIT:
            # Nobody looks at the changes; the state stays right, and they learn of the hole.
            self.dropped += len(self._events)
            self._events.clear()
            self._events.append(InterestEvent(InterestKind.RESYNCED, self.filter))
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)


class PresenceView(View):
    """Who is subscribed to one topic: a consistent snapshot, then every change."""

    def __init__(
        self,
        watch: Watch,
        start: Callable[[View], Awaitable[None]],
        stop: Callable[[View], Awaitable[None]],
    ) -> None:
        super().__init__(watch, start, stop)
        self._members: dict[str, Member] = {}
        # Changes that are told before the snapshot they may already be part of.
        self._early: list[InterestEvent] | None = []

    @property
    def members(self) -> Mapping[str, Member]:
        """Who is there now by id, in the order they were seen."""
        return self._members

    def apply(self, event: InterestEvent) -> None:
        """Take a change from the backend; a repeated one counts once."""
        member = event.member
        if self._early is not None:
            self._early.append(event)
        elif member is None:
            self._tell(event)
        elif event.left:
            if self._members.pop(member.id, None) is not None:
                self._tell(event)
        elif member.id not in self._members or (
            event.kind is InterestKind.UPDATED and self._members[member.id] != member
        ):
            self._members[member.id] = member
            self._tell(event)

    def snapshot(self, members: Iterable[Member]) -> None:
        """Take the complete state; report how it differs from the known one."""
        new = {member.id: member for member in members}
        again = self._synced
        if again:
            for member in [each for each in self._members.values() if each.id not in new]:
                del self._members[member.id]
                self._tell(InterestEvent(InterestKind.LEFT, self.filter, member, reason="resync"))
            for member in new.values():
                if member.id not in self._members:
                    self._members[member.id] = member
                    self._tell(InterestEvent(InterestKind.JOINED, self.filter, member))
            self._tell(InterestEvent(InterestKind.RESYNCED, self.filter))
        else:
            self._members = new
        self._synced = True
        early, self._early = self._early or [], None
        for event in early:
            self.apply(event)

    def stale(self) -> None:
        """Hold changes back until the next snapshot."""
        self._early = []


class NotificationsView(View):
    """Who subscribes to what: existing interest first, then every change."""

    def __init__(
        self,
        watch: Watch,
        start: Callable[[View], Awaitable[None]],
        stop: Callable[[View], Awaitable[None]],
    ) -> None:
        super().__init__(watch, start, stop)
        self._counts: dict[tuple[str, str], int] = {}
        self._members: dict[str, Member] = {}
        self._stale: set[tuple[str, str]] = set()

    @property
    def interest(self) -> dict[str, tuple[Member, ...]]:
        """Who is subscribed now, by topic or filter."""
        result: dict[str, list[Member]] = {}
        for topic, member in self._counts:
            result.setdefault(topic, []).append(self._members[member])
        return {topic: tuple(members) for topic, members in result.items()}

    def apply(self, event: InterestEvent) -> None:
        """Take a change from the backend, balancing repeated subscriptions."""
        member = event.member
        if member is None:
            self._end_of_existing(event)
            return
        key = (event.topic, member.id)
        if event.joined:
            if key in self._stale:
                self._stale.discard(key)
                self._counts[key] = 1
                return
            self._counts[key] = self._counts.get(key, 0) + 1
            self._members[member.id] = member
            if self._counts[key] == 1:
                self._tell(event)
        elif event.left:
            count = self._counts.get(key, 0)
            if count > 1 and event.reason not in _FINAL:
                self._counts[key] = count - 1
            elif count:
                self._forget(key)
                self._tell(event)
        else:
            self._tell(event)

    def stale(self) -> None:
        """Expect everything known to be told again, or to have gone."""
        self._stale = set(self._counts)
        self._synced = False

    def _end_of_existing(self, event: InterestEvent) -> None:
        if event.kind is InterestKind.SYNCED:
            for key in tuple(self._stale):
                member = self._members[key[1]]
                self._forget(key)
                self._tell(InterestEvent(InterestKind.LEFT, key[0], member, reason="resync"))
            self._stale.clear()
            self._synced = True
        self._tell(event)

    def _forget(self, key: tuple[str, str]) -> None:
        del self._counts[key]
        self._stale.discard(key)
        if not any(member == key[1] for _, member in self._counts):
            self._members.pop(key[1], None)


class Views:
    """The open views of one bus, and their watches at the backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._views: dict[int, View] = {}
        self._ids = itertools.count(1)

    def watch(self, kind: WatchKind, filter: str) -> Watch:
        """Return a watch that no other view has."""
        return Watch(next(self._ids), kind, filter)

    async def open(self, view: View) -> None:
        """Begin *view*: ask the backend, take the snapshot."""
        self._views[view.watch.id] = view
        try:
            await self._ask(view)
        except BaseException:
            self._views.pop(view.watch.id, None)
            raise

    async def close(self, view: View, *, online: bool) -> None:
        """End *view*, at the backend too while there is a session."""
        if self._views.pop(view.watch.id, None) is None or not online:
            return
        if isinstance(view, PresenceView):
            await cast("HasPresence", self._backend).unwatch_presence(view.watch)
        else:
            await cast("HasNotifications", self._backend).unwatch_notifications(view.watch)

    async def restore(self) -> None:
        """Begin all views again in a new session."""
        for view in tuple(self._views.values()):
            try:
                await self._ask(view)
            except NotConnected:
                raise
            except PubSubError as error:
                view.fail(error)

    def route(self, event: InterestEvent) -> None:
        """Pass a change to its views."""
        if event.watches is not None:
            for identity in event.watches:
                view = self._views.get(identity)
                if view is not None:
                    view.apply(event)
            return
        for view in tuple(self._views.values()):
            if overlap(view.watch.filter, event.topic):
                view.apply(event)

    def stale(self) -> None:
        """Note in every view that the session was lost."""
        for view in self._views.values():
            view.stale()

    def fail(self, error: PubSubError) -> None:
        """End every view with *error*."""
        for view in self._views.values():
            view.fail(error)

    def end(self) -> None:
        """End every view."""
        for view in tuple(self._views.values()):
            view.end()

    async def _ask(self, view: View) -> None:
        if isinstance(view, PresenceView):
            view.snapshot(await cast("HasPresence", self._backend).watch_presence(view.watch))
        else:
            await cast("HasNotifications", self._backend).watch_notifications(view.watch)
