"""A clock that moves only when a test says so.

Pass it wherever a `pubsub_core.clock.Clock` is taken. Nothing that waits on it wakes up
before `VirtualClock.advance` reaches its time, so a test of a 30 second back-off takes no time
and cannot be flaky.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field

__all__ = ["VirtualClock"]

_TURNS = 20
"""Turns of the event loop in which tasks that were woken get as far as they can."""


@dataclass(order=True)
class _Sleeper:
    due: float
    number: int
    waiter: asyncio.Future[None] = field(compare=False)


class VirtualClock:
    """Time as a number that a test moves.

    Args:
        auto: Jump to the next sleeper by itself once the event loop has nothing else to do for
            some turns. For programs that only compute and sleep: it does not wait for
            sockets, threads or real timers.
        start: The first `time`, in Unix seconds.

    Attributes:
        slept: Every duration that `sleep` was asked for, in order.
    """

    def __init__(self, *, auto: bool = False, start: float = 1_700_000_000.0) -> None:
        self.slept: list[float] = []
        self._auto = auto
        self._start = start
        self._elapsed = 0.0
        self._sleepers: list[_Sleeper] = []
        self._numbers = itertools.count()
        self._arrivals: set[asyncio.Future[None]] = set()
        self._idle: asyncio.Handle | None = None

    def time(self) -> float:
        """Return Unix seconds, as far as the clock was moved."""
        return self._start + self._elapsed

    def monotonic(self) -> float:
        """Return seconds since the clock was made."""
        return self._elapsed

    @property
    def sleepers(self) -> int:
        """How many are asleep."""
        return sum(not sleeper.waiter.done() for sleeper in self._sleepers)

    @property
    def next_wake(self) -> float | None:
        """Seconds until the next one wakes up, or None when nobody sleeps."""
        self._forget_cancelled()
        return self._sleepers[0].due - self._elapsed if self._sleepers else None

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock was moved that far. Cancellation ends the wait."""
        self.slept.append(seconds)
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sleeper = _Sleeper(self._elapsed + seconds, next(self._numbers), waiter)
        heapq.heappush(self._sleepers, sleeper)
        for arrival in self._arrivals:
            if not arrival.done():
                arrival.set_result(None)
        if self._auto and self._idle is None:
            self._arm(_TURNS)
        await waiter

    async def advance(self, seconds: float) -> None:
        """Move on by that much, waking sleepers at their time and in their order.

        Tasks run in between, and who falls asleep meanwhile is woken too if its time comes.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        target = self._elapsed + seconds
        await self._settle()
        while (wait := self.next_wake) is not None and self._elapsed + wait <= target:
            self._wake_next()
            await self._settle()
        self._elapsed = max(self._elapsed, target)
        await self._settle()

    async def advance_to_next(self) -> float:
        """Move on until the next sleeper wakes up, and return by how much.

        Raises:
            RuntimeError: Nobody sleeps.
        """
        await self._settle()
        wait = self.next_wake
        if wait is None:
            raise RuntimeError("nobody sleeps on this clock; await asleep() first")
        await self.advance(wait)
        return wait

    async def asleep(self, count: int = 1, *, within: float = 5.0) -> None:
        """Return once at least *count* are asleep.

        Args:
            count: How many.
            within: Real seconds after which it gives up.

        Raises:
            TimeoutError: They are not.
        """
        async with asyncio.timeout(within):
            while self.sleepers < count:
                arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._arrivals.add(arrival)
                try:
                    await arrival
                finally:
                    self._arrivals.discard(arrival)

    async def _settle(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    def _forget_cancelled(self) -> None:
        while self._sleepers and self._sleepers[0].waiter.done():
            heapq.heappop(self._sleepers)

    def _wake_next(self) -> None:
        sleeper = heapq.heappop(self._sleepers)
        self._elapsed = max(self._elapsed, sleeper.due)
        sleeper.waiter.set_result(None)

    def _arm(self, turns: int) -> None:
        loop = asyncio.get_running_loop()
        self._idle = loop.call_soon(self._count_down, turns)

    def _count_down(self, turns: int) -> None:
        self._idle = None
        self._forget_cancelled()
        if not self._sleepers:
            return
        if turns:
            self._arm(turns - 1)
        else:
            self._wake_next()
            self._arm(_TURNS)
