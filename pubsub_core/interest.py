"""Two views on interest: who is subscribed to a topic, and who wants what I publish.

Both begin with what exists and go on with changes, without a race between the two: the view
reconciles by member, so a change that is told twice counts once. After a reconnect the view
is compared with the new state and the differences are told.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from .errors import BusClosed, NotConnected, PubSubError
from .events import InterestEvent, InterestKind
from .interfaces import Backend, HasNotifications, HasPresence, Watch, WatchKind
from .message import Member
from .topics import overlap

__all__ = ["InterestView", "Notifications", "Presence", "Views"]

_LIMIT = 4096
# A member that leaves because its connection ended takes all its subscriptions with it.
_FINAL = frozenset({"closed", "lost"})

V = TypeVar("V", bound="InterestView")


class InterestView(abc.ABC):
    """What `Presence` and `Notifications` share: entering, leaving, iterating."""

    def __init__(
        self,
        watch: Watch,
        start: Callable[[InterestView], Awaitable[None]],
        stop: Callable[[InterestView], Awaitable[None]],
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

    @property
    def synced(self) -> bool:
        """Whether everything that existed before has been told.

        Stays False on a broker that does not mark the end of what existed.
        """
        return self._synced

    def __await__(self) -> Generator[Any, None, Self]:
        return self._enter().__await__()

    async def __aenter__(self) -> Self:
        return await self._enter()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the view. Idempotent."""
        self.end()
        await self._stop(self)

    def __aiter__(self) -> AsyncIterator[InterestEvent]:
        return self

    async def __anext__(self) -> InterestEvent:
        event = await self._next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def get(self, timeout: float | None = None) -> InterestEvent:
        """Return the next change, waiting at most *timeout* seconds.

        Raises:
            TimeoutError: Nothing changed in time.
            BusClosed: The view has ended.
        """
        async with asyncio.timeout(timeout):
            event = await self._next()
        if event is None:
            raise BusClosed(f"the view on {self.watch.filter!r} has ended")
        return event

    # --- what the bus calls ------------------------------------------------------------

    @abc.abstractmethod
    def apply(self, event: InterestEvent) -> None:
        """Take a change from the backend."""

    @abc.abstractmethod
    def stale(self) -> None:
        """Learn that the session was lost; what is known must be confirmed anew."""

    def end(self) -> None:
        """Let iterators return."""
        self._ended = True
        self._wake()

    def fail(self, error: PubSubError) -> None:
        """Let iterators raise."""
        self._failure = error
        self._wake()

    async def _enter(self) -> Self:
        if not self._started:
            self._started = True
            await self._start(self)
        return self

    def _tell(self, event: InterestEvent) -> None:
        self._events.append(event)
        if len(self._events) > _LIMIT:
            # Nobody looks at the changes; the state stays right, and they learn of the hole.
            self.dropped += len(self._events)
            self._events.clear()
            self._events.append(InterestEvent(InterestKind.RESYNCED, self.watch.filter))
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def _next(self) -> InterestEvent | None:
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return None
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self._events.popleft()


class Presence(InterestView):
    """Who is subscribed to one topic: a consistent snapshot, then every change.

    Made by `Bus.presence`. After entering, `members` is complete and stays up to date
    whether or not anybody iterates; iterating yields the changes since entering.
    """

    def __init__(
        self,
        watch: Watch,
        start: Callable[[InterestView], Awaitable[None]],
        stop: Callable[[InterestView], Awaitable[None]],
    ) -> None:
        super().__init__(watch, start, stop)
        self._members: dict[str, Member] = {}
        # Changes that are told before the snapshot they may already be part of.
        self._early: list[InterestEvent] | None = []

    @property
    def topic(self) -> str:
        """The topic looked at."""
        return self.watch.filter

    @property
    def members(self) -> tuple[Member, ...]:
        """Who is there now, in the order they were seen."""
        return tuple(self._members.values())

    @property
    def count(self) -> int:
        """How many are there now."""
        return len(self._members)

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
        """Take the complete state and tell how it differs from what was known."""
        new = {member.id: member for member in members}
        again = self._synced
        if again:
            for member in [each for each in self._members.values() if each.id not in new]:
                del self._members[member.id]
                self._tell(InterestEvent(InterestKind.LEFT, self.topic, member, reason="resync"))
            for member in new.values():
                if member.id not in self._members:
                    self._members[member.id] = member
                    self._tell(InterestEvent(InterestKind.JOINED, self.topic, member))
            self._tell(InterestEvent(InterestKind.RESYNCED, self.topic))
        else:
            self._members = new
        self._synced = True
        early, self._early = self._early or [], None
        for event in early:
            self.apply(event)

    def stale(self) -> None:
        """Hold changes back until the next snapshot."""
        self._early = []


class Notifications(InterestView):
    """Who subscribes to what: existing interest first, then every change.

    Made by `Bus.notifications`. A member that subscribes to a topic several times joins
    once and leaves once; one whose connection ends leaves everything.
    """

    def __init__(
        self,
        watch: Watch,
        start: Callable[[InterestView], Awaitable[None]],
        stop: Callable[[InterestView], Awaitable[None]],
    ) -> None:
        super().__init__(watch, start, stop)
        self._counts: dict[tuple[str, str], int] = {}
        self._members: dict[str, Member] = {}
        self._stale: set[tuple[str, str]] = set()

    @property
    def filter(self) -> str:
        """The filter looked at."""
        return self.watch.filter

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
    """The open views of one bus, and what the backend is asked on their behalf."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._views: dict[int, InterestView] = {}
        self._ids = itertools.count(1)

    def watch(self, kind: WatchKind, filter: str) -> Watch:
        """Return a watch that no other view has."""
        return Watch(next(self._ids), kind, filter)

    async def open(self, view: InterestView) -> None:
        """Begin *view*: ask the backend, take the snapshot."""
        self._views[view.watch.id] = view
        try:
            await self._ask(view)
        except BaseException:
            self._views.pop(view.watch.id, None)
            raise

    async def close(self, view: InterestView, *, online: bool) -> None:
        """End *view*, at the backend too while there is a session."""
        if self._views.pop(view.watch.id, None) is None or not online:
            return
        if isinstance(view, Presence):
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
        """Bring a change to the views it is for."""
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
        """Learn that the session was lost."""
        for view in self._views.values():
            view.stale()

    def fail(self, error: PubSubError) -> None:
        """Let every view raise."""
        for view in self._views.values():
            view.fail(error)

    def end(self) -> None:
        """Let every view return."""
        for view in tuple(self._views.values()):
            view.end()

    async def _ask(self, view: InterestView) -> None:
        if isinstance(view, Presence):
            view.snapshot(await cast("HasPresence", self._backend).watch_presence(view.watch))
        else:
            await cast("HasNotifications", self._backend).watch_notifications(view.watch)
