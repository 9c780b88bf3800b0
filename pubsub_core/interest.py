"""Two views on interest: the subscribers of one topic, and subscriptions by filter.

Both begin with what exists and go on with changes, without a race between the two.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Generator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from .events import InterestEvent
from .message import Member

__all__ = ["InterestView", "Notifications", "Presence"]


class _View(Protocol):
    """The inner half of a view, which the bus holds."""

    @property
    def filter(self) -> str: ...
    @property
    def synced(self) -> bool: ...
    @property
    def dropped(self) -> int: ...
    async def enter(self) -> None: ...
    async def close(self) -> None: ...
    def next(self) -> Coroutine[Any, Any, InterestEvent]: ...
    async def get(self, timeout: float | None) -> InterestEvent: ...


class _PresenceView(_View, Protocol):
    @property
    def members(self) -> Mapping[str, Member]: ...


class _NotificationsView(_View, Protocol):
    @property
    def interest(self) -> dict[str, tuple[Member, ...]]: ...


class InterestView:
    """The base of `Presence` and `Notifications`: entering, leaving, iterating."""

    def __init__(self, view: _View) -> None:
        self._view = view

    @property
    def synced(self) -> bool:
        """Whether everything that existed before has been told.

        Stays False on a broker that does not mark the end of what existed.
        """
        return self._view.synced

    @property
    def dropped(self) -> int:
        """Changes that were not told because nobody read them; a ``resynced`` replaced them."""
        return self._view.dropped

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        await self._view.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the view. Idempotent."""
        await self._view.close()

    def __aiter__(self) -> AsyncIterator[InterestEvent]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, InterestEvent]:
        return self._view.next()

    async def get(self, timeout: float | None = None) -> InterestEvent:
        """Return the next change, waiting at most *timeout* seconds.

        Raises:
            TimeoutError: Nothing changed in time.
            BusClosed: The view has ended.
        """
        return await self._view.get(timeout)


class Presence(InterestView):
    """Who is subscribed to one topic: a consistent snapshot, then every change.

    Made by `Bus.presence`. After entering, `members` is complete and stays up to date
    whether or not anybody iterates; iterating yields the changes since entering.
    """

    def __init__(self, view: _PresenceView) -> None:
        super().__init__(view)
        self._presence = view

    @property
    def topic(self) -> str:
        """The topic looked at."""
        return self._view.filter

    @property
    def members(self) -> tuple[Member, ...]:
        """Who is there now, in the order they were seen."""
        return tuple(self._presence.members.values())

    @property
    def count(self) -> int:
        """How many are there now."""
        return len(self._presence.members)


class Notifications(InterestView):
    """Who subscribes to what: existing interest first, then every change.

    Made by `Bus.notifications`. A member that subscribes to a topic several times joins
    once and leaves once; one whose connection ends leaves everything.
    """

    def __init__(self, view: _NotificationsView) -> None:
        super().__init__(view)
        self._notifications = view

    @property
    def filter(self) -> str:
        """The filter looked at."""
        return self._view.filter

    @property
    def interest(self) -> dict[str, tuple[Member, ...]]:
        """Who is subscribed now, by topic or filter."""
        return self._notifications.interest
