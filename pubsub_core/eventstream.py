"""What happens to a bus, for everybody who listens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from .events import BusEvent, Status, StatusChanged

__all__ = ["EventHub", "EventStream"]

_EVENTS = 1024


class EventStream:
    """What happens to a bus, as an async iterator; made by `Bus.events`.

    Begins with the status at hand. Keeps the last 1024 events for a reader that is slow;
    `dropped` counts the others.
    """

    def __init__(self, first: BusEvent, forget: Callable[[EventStream], None]) -> None:
        self._events: deque[BusEvent] = deque([first], maxlen=_EVENTS)
        self._forget = forget
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._ended = False
        self.dropped = 0

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
        """Take no more events; what was collected can still be read."""
        self._ended = True
        self._forget(self)
        self._wake()

    def __aiter__(self) -> AsyncIterator[BusEvent]:
        return self

    async def __anext__(self) -> BusEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self._events.popleft()

    def put(self, event: BusEvent) -> None:
        """Add an event; never waits."""
        if len(self._events) == _EVENTS:
            self.dropped += 1
        self._events.append(event)
        if isinstance(event, StatusChanged) and event.status is Status.CLOSED:
            self._ended = True
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)


class EventHub:
    """Keeps the status of a bus and tells its streams what happens.

    Attributes:
        status: The last change of status.
    """

    def __init__(self) -> None:
        self.status = StatusChanged(Status.NEW)
        self._streams: list[EventStream] = []

    def put(self, event: BusEvent) -> None:
        """Tell every stream; never waits."""
        if isinstance(event, StatusChanged):
            self.status = event
        for stream in tuple(self._streams):
            stream.put(event)

    def stream(self) -> EventStream:
        """Return a stream that begins with the status at hand."""
        stream = EventStream(self.status, self._forget)
        if self.status.status is Status.CLOSED:
            stream.close()
        else:
            self._streams.append(stream)
        return stream

    def end(self) -> None:
        """Let every stream end."""
        for stream in tuple(self._streams):
            stream.close()

    def _forget(self, stream: EventStream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
