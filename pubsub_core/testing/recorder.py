"""The calls between a bus and its backend."""

from __future__ import annotations

from typing import Any

from pubsub_core.bus import Bus
from pubsub_core.interfaces import SessionFacts, Sink, WireSub

__all__ = ["Recorder"]


class Recorder:
    """Stands between a bus and its backend, and notes the calls.

    Attributes:
        subscribed: Every `WireSub` that was sent, in order.
        unsubscribed: Every `WireSub` that was dropped, in order.
        sinks: The sink of each session, in order.
        refuse: Raised instead of opening, while it is set.
        attempts: How often opening was tried.
    """

    def __init__(self, bus: Bus) -> None:
        backend: Any = bus._engine.backend  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - no public way to what is underneath
        self.subscribed: list[WireSub] = []
        self.unsubscribed: list[WireSub] = []
        self.sinks: list[Sink] = []
        self.refuse: BaseException | None = None
        self.attempts = 0
        self._open = backend.open
        self._subscribe = backend.subscribe
        self._unsubscribe = backend.unsubscribe
        backend.open = self._opening
        backend.subscribe = self._subscribing
        backend.unsubscribe = self._unsubscribing

    async def _opening(self, sink: Sink) -> SessionFacts:
        self.attempts += 1
        if self.refuse is not None:
            raise self.refuse
        self.sinks.append(sink)
        facts: SessionFacts = await self._open(sink)
        return facts

    async def _subscribing(self, want: WireSub) -> int:
        self.subscribed.append(want)
        granted: int = await self._subscribe(want)
        return granted

    async def _unsubscribing(self, want: WireSub) -> None:
        self.unsubscribed.append(want)
        await self._unsubscribe(want)
