"""The events of a bus, as a program reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import Any, Protocol, Self

from .events import BusEvent

__all__ = ["EventStream"]


class _Events(Protocol):
    """The inner half; the bus holds it weakly."""

    @property
    def dropped(self) -> int: ...
    def close(self) -> None: ...
    def next(self) -> Coroutine[Any, Any, BusEvent]: ...


class EventStream:
    """The events of a bus, as an async iterator; made by `Bus.events`.

    Begins with the current status. Keeps the last 1024 events for a reader that is slow;
    `dropped` counts the others.
    """

    def __init__(self, events: _Events) -> None:
        self._events = events

    @property
    def dropped(self) -> int:
        """Events that a slow reader has missed."""
        return self._events.dropped

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take no more events; those collected can still be read."""
        self._events.close()

    def __aiter__(self) -> AsyncIterator[BusEvent]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, BusEvent]:
        return self._events.next()
