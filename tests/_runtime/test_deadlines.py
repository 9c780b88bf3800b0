"""One timer for many waits ends them as `asyncio.timeout` would, and no other way."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_core import Outcome, PublishTimeout, connect
from pubsub_core._runtime.deadlines import Deadlines
from pubsub_core.memory.backend import MemoryBackend

Bound = Callable[[float], Any]


@asynccontextmanager
async def shared(seconds: float) -> AsyncIterator[None]:
    with Deadlines(seconds).wait():
        yield


@pytest.fixture(params=[shared, asyncio.timeout], ids=["shared", "asyncio"])
def bound(request: pytest.FixtureRequest) -> Bound:
    """Every test with this runs on both: they must not differ."""
    made: Bound = request.param
    return made


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_time_that_is_up_is_a_timeout(bound: Bound) -> None:
    with pytest.raises(TimeoutError) as caught:
        async with bound(0.01):
            await forever()
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_what_ends_in_time_is_left_alone(bound: Bound) -> None:
    async with bound(0.01):
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)  # the timer, if it is still there, is due meanwhile


async def test_other_errors_pass(bound: Bound) -> None:
    with pytest.raises(LookupError):
        async with bound(5):
            raise LookupError


async def cancelled_while(bound: Bound, seconds: float, after: Callable[[], Awaitable[Any]]) -> str:
    ended: list[str] = []

    async def work() -> None:
        try:
            async with bound(seconds):
                await forever()
        except TimeoutError:
            ended.append("timeout")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await after()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.done()
    return ended[0]


async def test_a_cancellation_stays_one(bound: Bound) -> None:
    assert await cancelled_while(bound, 5, lambda: asyncio.sleep(0)) == "cancelled"


async def test_a_cancellation_in_the_moment_of_the_timeout_stays_one(bound: Bound) -> None:
    ended: list[str] = []
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        task.cancel()

    async def work() -> None:
        try:
            async with bound(0.01):
                # Blocks the loop until the deadline is past; both come in one turn of it.
                loop.call_later(0.005, cancel)
                end = loop.time() + 0.03
                while loop.time() < end:
                    pass
                await forever()
        except TimeoutError:
            ended.append("timeout")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    task = asyncio.create_task(work())
    await asyncio.wait([task], timeout=5)
    assert ended == ["cancelled"]
    assert task.cancelled()


async def test_an_outer_deadline_ends_the_inner_one(bound: Bound) -> None:
    outer = asyncio.timeout(0.01)

    async def inner() -> None:
        async with outer, bound(5):
            await forever()

    with pytest.raises(TimeoutError):
        await inner()
    assert outer.expired()


async def test_an_inner_deadline_leaves_the_outer_one(bound: Bound) -> None:
    async with asyncio.timeout(5) as outer:
        with pytest.raises(TimeoutError):
            async with bound(0.01):
                await forever()
        await asyncio.sleep(0)
    assert not outer.expired()


@pytest.mark.parametrize("seconds", [0, -1])
async def test_no_time_at_all_is_over_at_the_first_wait(bound: Bound, seconds: float) -> None:
    with pytest.raises(TimeoutError):
        async with bound(seconds):
            await forever()


# --- what is different -------------------------------------------------------------------


async def test_many_waits_take_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    call_at, made = loop.call_at, list[float]()

    def counting(when: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
        made.append(when)
        return call_at(when, *arguments, **options)

    monkeypatch.setattr(loop, "call_at", counting)
    deadlines = Deadlines(60)

    async def wait() -> None:
        for _ in range(10):
            with deadlines.wait():
                await asyncio.sleep(0)

    await asyncio.gather(*(wait() for _ in range(100)))
    assert len(made) == 1
    assert len(deadlines) == 0
    deadlines.close()


async def test_each_wait_ends_at_its_own_time() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(0.05)
    ended: list[tuple[int, float]] = []

    async def wait(number: int) -> None:
        began = loop.time()
        with pytest.raises(TimeoutError):
            with deadlines.wait():
                await forever()
        ended.append((number, loop.time() - began))

    waits: list[asyncio.Task[None]] = []
    for number in range(5):
        waits.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(0.01)
    await asyncio.wait(waits, timeout=5)
    for each in waits:
        each.result()
    assert [number for number, _ in ended] == [0, 1, 2, 3, 4]
    assert all(seconds >= 0.049 for _, seconds in ended)
    assert len(deadlines) == 0


async def test_closing_drops_the_timer_once_nobody_needs_it() -> None:
    deadlines = Deadlines(0.01)

    async def wait() -> None:
        with deadlines.wait():
            await forever()

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    deadlines.close()
    with pytest.raises(TimeoutError):
        await waiting
    long = Deadlines(3600)
    with long.wait():
        pass
    gone = weakref.ref(long)
    long.close()
    del long
    gc.collect()
    assert gone() is None, "a timer holds it"


async def test_a_wait_needs_a_task() -> None:
    found: list[BaseException] = []

    def outside() -> None:
        try:
            deadlines.wait().__enter__()
        except RuntimeError as error:
            found.append(error)

    deadlines = Deadlines(1)
    loop = asyncio.get_running_loop()
    loop.call_soon(outside)
    await asyncio.sleep(0)
    assert len(found) == 1


async def test_publishes_time_out_one_by_one_whatever_their_time() -> None:
    async with connect("memory://deadlines", timeout=0.05) as bus:
        backend: Any = bus.native(MemoryBackend)
        backend.try_publish = lambda out: None

        async def never(out: object) -> None:
            await forever()

        backend.publish = never
        own = [bus.publish("a", b"x", timeout=seconds) for seconds in (0.01, 5)]
        usual = [bus.publish("a", b"x") for _ in range(20)]
        tasks = [asyncio.ensure_future(each) for each in [*own, *usual]]
        async with asyncio.timeout(5):
            await asyncio.wait([tasks[0], *tasks[2:]])
        assert not tasks[1].done()
        for task in (tasks[0], *tasks[2:]):
            error = task.exception()
            assert isinstance(error, PublishTimeout)
            assert error.outcome is Outcome.UNKNOWN
        assert "0.01 s" in str(tasks[0].exception())
        assert "0.05 s" in str(tasks[2].exception())
        assert bus.stats.failed == 21
        tasks[1].cancel()
        await asyncio.wait([tasks[1]], timeout=5)
        assert tasks[1].cancelled()
        assert bus.stats.failed == 21
