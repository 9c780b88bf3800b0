"""Results within a bound, and one lock for each name."""

from __future__ import annotations

import asyncio

import pytest

from pubsub_core.keyed import BoundedCache, KeyedLocks


def test_a_cache_never_holds_more_than_its_bound() -> None:
    cache = BoundedCache[int, int](3)
    sizes = [cache.keep(number, -number) and len(cache) for number in range(1, 9)]
    assert sizes == [1, 2, 3, 1, 2, 3, 1, 2]
    assert cache.get(8) == -8
    assert cache.get(1) is None
    assert cache.get(1, 5) == 5


def test_keep_returns_the_value_and_replaces_an_older_one() -> None:
    cache = BoundedCache[str, list[int]](8)
    first, second = list[int](), list[int]()
    assert cache.keep("a", first) is first
    assert cache.keep("a", second) is second
    assert cache.get("a") is second
    assert cache.pop("a") is second
    assert len(cache) == 0
    cache.keep("a", first)
    cache.clear()
    assert cache.get("a") is None


async def test_one_name_is_held_alone_and_in_the_order_of_the_calls() -> None:
    locks = KeyedLocks[str]()
    inside, seen = 0, list[int]()

    async def work(number: int) -> None:
        nonlocal inside
        async with locks.of("a/b"):
            inside += 1
            assert inside == 1
            for _ in range(3):
                await asyncio.sleep(0)
            seen.append(number)
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(work(number))
            await asyncio.sleep(0)
    assert seen == [0, 1, 2, 3, 4]


async def test_other_names_do_not_wait() -> None:
    locks = KeyedLocks[str]()
    async with locks.of("a"), locks.of("b"):
        assert len(locks) == 2


async def test_a_name_that_nobody_holds_or_waits_for_is_forgotten() -> None:
    locks = KeyedLocks[str]()

    async def wait() -> None:
        async with locks.of("a"):
            raise AssertionError("it was cancelled before its turn")

    async with locks.of("a"):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(locks) == 1
    assert len(locks) == 0
    with pytest.raises(ZeroDivisionError):
        async with locks.of("a"):
            _ = 1 // 0
    assert len(locks) == 0


async def test_a_newcomer_does_not_pass_who_was_woken_but_has_not_run() -> None:
    locks = KeyedLocks[str]()
    seen = list[str]()

    async def work(name: str) -> None:
        async with locks.of("a"):
            seen.append(name)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        async with locks.of("a"):
            group.create_task(work("waited"))
            await asyncio.sleep(0)
        # Released: the lock is free until the waiter runs.
        group.create_task(work("late"))
        async with locks.of("a"):
            seen.append("here")
    assert seen == ["waited", "here", "late"]
