"""Reports the events of a bus to every stream that reads them."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from pubsub_core.events import BusEvent, Status, StatusChanged

__all__ = ["EventHub", "EventQueue"]

_EVENTS = 1024


class EventQueue:
    """The inner half of an `EventStream`: the events that its reader has not had.

    Attributes:
        dropped: Events that a slow reader has missed.
    """

    def __init__(self, first: BusEvent) -> None:
        self._events: deque[BusEvent] = deque([first], maxlen=_EVENTS)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._ended = False
        self.dropped = 0

    def put(self, event: BusEvent) -> None:
        """Add an event; never waits."""
        if self._ended:
            return
        if len(self._events) == _EVENTS:
            self.dropped += 1
        self._events.append(event)
        if isinstance(event, StatusChanged) and event.status is Status.CLOSED:
            self._ended = True
        self._wake()

    def close(self) -> None:
        """Take no more events; those collected can still be read."""
        self._ended = True
        self._wake()

    async def next(self) -> BusEvent:
        """Return the next event.

        Raises:
            StopAsyncIteration: There will be none.
        """
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self._events.popleft()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)


class EventHub:
    """Keeps the status of a bus and passes its events to the queues.

    Attributes:
        status: The last change of status.
    """

    def __init__(self) -> None:
        self.status = StatusChanged(Status.NEW)
        # Weak: a stream that its program has dropped without closing it takes its queue with
        # it, instead of filling up for as long as the bus is open.
        self._queues: list[weakref.ref[EventQueue]] = []

    def put(self, event: BusEvent) -> None:
        """Pass an event to every queue; never waits."""
        if isinstance(event, StatusChanged):
            self.status = event
        for reference in tuple(self._queues):
            queue = reference()
            if queue is not None:
                queue.put(event)

    def queue(self) -> EventQueue:
        """Return a queue that begins with the current status."""
        queue = EventQueue(self.status)
        if self.status.status is Status.CLOSED:
            queue.close()
        else:
            self._queues.append(weakref.ref(queue, self._queues.remove))
        return queue

    def end(self) -> None:
        """End every queue."""
        for reference in tuple(self._queues):
            queue = reference()
            if queue is not None:
                queue.close()
