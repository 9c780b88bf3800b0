"""Backends with one defect each; the suite must find every one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import ClassVar

from pubsub_core.capabilities import Cap, Support
from pubsub_core.interfaces import Backend, SessionFacts, Sink, WireSub
from pubsub_core.memory.backend import MemoryBackend
from pubsub_core.message import InFrame, OutFrame, Receipt


class Bare(Backend):
    """Has no optional power at all."""

    async def open(self, sink: Sink) -> SessionFacts:
        return SessionFacts()

    async def close(self, *, drain: float) -> None:
        return None

    async def publish(self, out: OutFrame) -> Receipt:
        raise NotImplementedError

    async def subscribe(self, want: WireSub) -> int:
        return 0

    async def unsubscribe(self, want: WireSub) -> None:
        return None


class _Tampering:
    """A sink that does something to every frame."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.count = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._sink, name)


class _Twice(_Tampering):
    def deliver(self, frame: InFrame) -> None:
        self._sink.deliver(frame)
        self._sink.deliver(InFrame(topic=frame.topic, payload=frame.payload))


class _Losing(_Tampering):
    def deliver(self, frame: InFrame) -> None:
        self.count += 1
        if self.count % 10:
            self._sink.deliver(frame)


class _Late(_Tampering):
    def deliver(self, frame: InFrame) -> None:
        asyncio.get_running_loop().call_later(
            0.01 if self.count == 0 else 0, self._sink.deliver, frame
        )
        self.count += 1


class Duplicating(MemoryBackend):
    """Delivers everything twice."""

    async def open(self, sink: Sink) -> SessionFacts:
        return await super().open(_Twice(sink))  # type: ignore[arg-type]  # the rest is passed on


class Losing(MemoryBackend):
    """Loses every tenth message."""

    async def open(self, sink: Sink) -> SessionFacts:
        return await super().open(_Losing(sink))  # type: ignore[arg-type]  # the rest is passed on


class Reordering(MemoryBackend):
    """Lets the second message overtake the first."""

    async def open(self, sink: Sink) -> SessionFacts:
        return await super().open(_Late(sink))  # type: ignore[arg-type]  # the rest is passed on


class Leaking(MemoryBackend):
    """Leaves a task behind."""

    left: ClassVar[list[asyncio.Task[bool]]] = []

    async def open(self, sink: Sink) -> SessionFacts:
        self.left.append(asyncio.create_task(asyncio.Event().wait()))
        return await super().open(sink)


class Raising(MemoryBackend):
    """Finds at run time what it had said it cannot."""

    async def probe(self) -> Mapping[Cap, Support]:
        return {Cap.HISTORY: Support.none("")}


class Deaf(MemoryBackend):
    """Says that it is subscribed before it is."""

    async def subscribe(self, want: WireSub) -> int:
        asyncio.get_running_loop().call_later(0.05, self.space.subscribe, self, want)
        return want.qos
