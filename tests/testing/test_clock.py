"""The virtual clock: time moves when told, sleepers wake in order."""

from __future__ import annotations

import asyncio

import pytest

from pubsub_core.clock import Clock
from pubsub_core.testing.clock import VirtualClock
from pubsub_core.testing.stopwatch import Stopwatch


async def sleeper(clock: Clock, seconds: float, woken: list[tuple[str, float]], name: str) -> None:
    await clock.sleep(seconds)
    woken.append((name, clock.monotonic()))


async def test_nothing_wakes_before_its_time() -> None:
    clock, woken = VirtualClock(), list[tuple[str, float]]()
    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper(clock, 10, woken, "a"))
        await clock.advance(9.999)
        assert woken == []
        await clock.advance(0.001)
        assert [name for name, _ in woken] == ["a"]


async def test_sleepers_wake_in_order_and_at_their_own_time() -> None:
    clock, woken = VirtualClock(), list[tuple[str, float]]()
    async with asyncio.TaskGroup() as group:
        for name, seconds in (("late", 30), ("early", 1), ("first of two", 5), ("second", 5)):
            group.create_task(sleeper(clock, seconds, woken, name))
        await clock.advance(100)
    assert woken == [("early", 1), ("first of two", 5), ("second", 5), ("late", 30)]
    assert clock.monotonic() == 100


async def test_who_falls_asleep_during_an_advance_is_woken_by_it() -> None:
    clock, times = VirtualClock(), list[float]()

    async def ticking() -> None:
        for _ in range(5):
            await clock.sleep(2)
            times.append(clock.monotonic())

    async with asyncio.TaskGroup() as group:
        group.create_task(ticking())
        await clock.advance(7)
        assert times == [2, 4, 6]
        await clock.advance(3)
    assert times == [2, 4, 6, 8, 10]


async def test_both_times_move_together() -> None:
    clock = VirtualClock(start=1000)
    await clock.advance(2.5)
    assert (clock.time(), clock.monotonic()) == (1002.5, 2.5)


async def test_a_cancelled_sleeper_leaves_nothing() -> None:
    clock = VirtualClock()
    task = asyncio.create_task(clock.sleep(5))
    await clock.asleep()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (clock.sleepers, clock.next_wake) == (0, None)
    await clock.advance(10)


async def test_advance_to_next_moves_exactly_to_the_next_sleeper() -> None:
    clock, woken = VirtualClock(), list[tuple[str, float]]()
    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper(clock, 7, woken, "a"))
        group.create_task(sleeper(clock, 3, woken, "b"))
        assert await clock.advance_to_next() == 3
        assert [name for name, _ in woken] == ["b"]
        assert await clock.advance_to_next() == 4
    with pytest.raises(RuntimeError, match="nobody sleeps"):
        await clock.advance_to_next()


async def test_asleep_waits_for_tasks_that_come_from_elsewhere() -> None:
    clock = VirtualClock()

    async def after_real_work() -> None:
        await asyncio.to_thread(lambda: None)
        await clock.sleep(1)

    async with asyncio.TaskGroup() as group:
        group.create_task(after_real_work())
        await clock.asleep(1)
        assert clock.sleepers == 1
        await clock.advance(1)
    with pytest.raises(TimeoutError):
        await clock.asleep(1, within=0.01)


async def test_what_was_asked_for_is_remembered() -> None:
    clock = VirtualClock(auto=True)
    for seconds in (0.5, 0, 30):
        await clock.sleep(seconds)
    assert clock.slept == [0.5, 0, 30]


async def test_sleeping_for_no_time_lets_others_run() -> None:
    clock, ran = VirtualClock(), list[int]()
    asyncio.get_running_loop().call_soon(ran.append, 1)
    await clock.sleep(0)
    assert ran == [1]


async def test_auto_jumps_when_nothing_else_is_to_do() -> None:
    clock, woken = VirtualClock(auto=True), list[tuple[str, float]]()
    watch = Stopwatch()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(sleeper(clock, 3600, woken, "hour"))
        group.create_task(sleeper(clock, 60, woken, "minute"))
    assert woken == [("minute", 60), ("hour", 3600)]
    assert watch.seconds < 5


async def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="does not go back"):
        await VirtualClock().advance(-1)
