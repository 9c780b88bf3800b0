"""What the fault tests share: patient helpers, a seeded random, a tally of arrivals."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

from pubsub_core import Bus, Message, Status, connect
from pubsub_core.errors import PubSubError
from pubsub_core.events import BusEvent
from pubsub_core.testing.stopwatch import Stopwatch

T = TypeVar("T")

DEADLINE = 20.0
"""Seconds that any single step may take before a test gives up."""

SOON: dict[str, Any] = {"reconnect_first": 0.02, "reconnect_max": 0.2}
"""Options of a bus that comes back quickly, where the time is not what is tested."""

VERSIONS = ("3.1.1", "5")


def seeded(name: str) -> random.Random:
    """Return a random generator whose seed is printed, and can be set with PUBSUB_TEST_SEED."""
    seed = int(os.environ.get("PUBSUB_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"{name}: PUBSUB_TEST_SEED={seed}")
    return random.Random(seed)


async def soon(work: Awaitable[T], seconds: float = DEADLINE) -> T:
    """Await *work* within a deadline."""
    async with asyncio.timeout(seconds):
        return await work


async def until(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Return once *condition* holds; fail when it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        await asyncio.sleep(0.002)


async def offline(bus: Bus) -> None:
    await until(lambda: bus.status is not Status.ONLINE, "the loss is noticed")


async def lost(bus: Bus, sessions: int) -> None:
    """Wait until session number *sessions* has ended; the next one may be there already."""
    await until(
        lambda: bus.status is not Status.ONLINE or bus.stats.sessions > sessions,
        "the loss is noticed",
    )


async def online(bus: Bus, seconds: float = DEADLINE) -> None:
    await until(lambda: bus.status is Status.ONLINE, f"{bus!r} is back", seconds)


async def resumed(bus: Bus, sessions: int, seconds: float = DEADLINE) -> None:
    """Wait until *bus* is online in a later session than number *sessions*."""
    await until(
        lambda: bus.stats.sessions > sessions and bus.status is Status.ONLINE,
        "a new session",
        seconds,
    )


@asynccontextmanager
async def opened(where: str, **options: Any) -> AsyncIterator[Bus]:
    """Open a bus and close it, both within a deadline."""
    bus = connect(where, **options)
    await soon(bus.open())
    try:
        yield bus
    finally:
        await soon(bus.close(drain=1.0))


class Tally:
    """A handler that notes what arrives, in its order."""

    def __init__(self) -> None:
        self.arrived: list[int] = []
        self.flagged: list[int] = []
        self.seen: set[int] = set()

    async def __call__(self, message: Message[bytes]) -> None:
        number = int(message.payload)
        self.arrived.append(number)
        self.seen.add(number)
        if message.redelivered:
            self.flagged.append(number)

    def has(self, count: int) -> bool:
        """Whether so many arrived, copies included."""
        return len(self.arrived) >= count

    @property
    def copies(self) -> dict[int, int]:
        """Numbers that arrived more than once, and how often too many."""
        return {number: count - 1 for number, count in Counter(self.arrived).items() if count > 1}

    @property
    def duplicates(self) -> int:
        return sum(self.copies.values())

    @property
    def inversions(self) -> list[tuple[int, int]]:
        """Neighbours in the order of first arrival that came the wrong way round."""
        firsts = list(dict.fromkeys(self.arrived))
        return [(a, b) for a, b in itertools.pairwise(firsts) if a > b]


class Pump:
    """Publishes numbers to one topic, several under way at once, until told to stop.

    Args:
        at_once: How many wait for their outcome at most.
        hold: Given how many were started, tells whether the next one has to wait.
    """

    def __init__(
        self,
        bus: Bus,
        topic: str,
        *,
        at_once: int = 40,
        hold: Callable[[int], bool] = lambda started: False,
        **options: Any,
    ) -> None:
        self._hold = hold
        self._bus = bus
        self._topic = topic
        self._at_once = at_once
        self._options = options
        self._window: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.started = 0
        self.confirmed: list[int] = []
        self.failed: dict[int, PubSubError] = {}

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Publish no more; return when the outcome of everything is known."""
        self._stopping = True
        if self._task is not None:
            await soon(self._task)

    async def confirm(self, more: int) -> None:
        """Return once that many more publishes were confirmed."""
        target = len(self.confirmed) + more
        await until(lambda: len(self.confirmed) >= target, f"{target} confirmed publishes")

    async def _run(self) -> None:
        while not self._stopping:
            if self._hold(self.started):
                await asyncio.sleep(0.001)
                continue
            number = self.started
            self.started += 1
            self._window.add(asyncio.create_task(self._one(number)))
            if len(self._window) >= self._at_once:
                _, self._window = await asyncio.wait(
                    self._window, return_when=asyncio.FIRST_COMPLETED
                )
            else:
                await asyncio.sleep(0)
        if self._window:
            await asyncio.wait(self._window)

    async def _one(self, number: int) -> None:
        try:
            await self._bus.publish(self._topic, b"%d" % number, **self._options)
        except PubSubError as error:
            self.failed[number] = error
        else:
            self.confirmed.append(number)


@asynccontextmanager
async def pumping(bus: Bus, topic: str, **options: Any) -> AsyncIterator[Pump]:
    pump = Pump(bus, topic, **options)
    pump.start()
    try:
        yield pump
    finally:
        await pump.stop()


class Lag:
    """Measures the longest time that the event loop did not come round.

    Time in which it could have, but got no processor, does not count.
    """

    def __init__(self) -> None:
        self.worst = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._measure())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _measure(self) -> None:
        while True:
            watch = Stopwatch()
            await asyncio.sleep(0.002)
            self.worst = max(self.worst, watch.seconds - 0.002)


@asynccontextmanager
async def noting(bus: Bus) -> AsyncIterator[list[BusEvent]]:
    """Collect what happens to *bus*."""
    noted: list[BusEvent] = []

    async def collect() -> None:
        async with bus.events() as events:
            async for event in events:
                noted.append(event)  # noqa: PERF401 - read by the test while it grows

    task = asyncio.create_task(collect())
    await asyncio.sleep(0)
    try:
        yield noted
    finally:
        task.cancel()
        await asyncio.wait([task])
