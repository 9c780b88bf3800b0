"""The offline buffer is bounded, says so, and frees a place as soon as nobody needs it."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_core import Bus, Outcome, Overflow, PublishFailed, PublishTimeout, Status, connect
from pubsub_core.memory import Space
from pubsub_core.testing import VirtualClock

from .support import SOON, offline, online, opened, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


class Room:
    """A memory space whose sessions can be taken away."""

    def __init__(self, name: str) -> None:
        self.url = f"memory://{name}"
        self.space = Space.named(name, history=100_000)

    async def down(self, *buses: Bus) -> None:
        self.space.refuse(True)
        self.space.disconnect_all()
        for bus in buses:
            await offline(bus)

    async def up(self, *buses: Bus) -> None:
        self.space.refuse(False)
        for bus in buses:
            await online(bus)

    async def stored(self, topic: str) -> list[int]:
        async with opened(self.url) as bus:
            return [int(message.payload) async for message in bus.history(topic)]


@pytest.fixture
async def room(unique: Callable[..., str]) -> AsyncIterator[Room]:
    name = unique().replace("/", "-")
    yield Room(name)
    Space.forget(name)


@asynccontextmanager
async def away(room: Room, **options: Any) -> AsyncIterator[Bus]:
    """A bus with an offline buffer, and no session."""
    async with opened(room.url, offline="buffer", **SOON, **options) as bus:
        await room.down(bus)
        yield bus


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_default_bounds(room: Room) -> None:
    """10 000 messages or 16 MiB, then an error; memory stays within that."""
    async with away(room) as bus:
        for number in range(10_000):
            await bus.publish("a", b"%d" % number, confirm="nobody")
        with pytest.raises(Overflow, match="10000 messages") as caught:
            await bus.publish("a", b"x", confirm="nobody")
        assert caught.value.outcome is Outcome.NOT_SENT
        assert bus.stats.offline == 10_000
        await room.up(bus)
        await until(lambda: bus.stats.offline == 0, "it is empty")
    assert await room.stored("a") == list(range(10_000))
    async with away(room) as bus:
        tracemalloc.start()
        try:
            for _ in range(16):
                await bus.publish("b", bytes(1024 * 1024), confirm="nobody")
            with pytest.raises(Overflow):
                await bus.publish("b", b"x", confirm="nobody")
            assert tracemalloc.get_traced_memory()[0] < 18 * 1024 * 1024
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("policy", ["error", "drop_newest", "drop_oldest", "block"])
async def test_each_overflow_policy_keeps_what_it_says(room: Room, policy: str) -> None:
    async with away(room, offline_messages=3, offline_overflow=policy) as bus:
        publishing = []
        for number in range(6):
            publishing.append(asyncio.create_task(bus.publish("a", b"%d" % number)))
            await turns()
        assert bus.stats.offline == 3
        await room.up(bus)
        results = await soon(asyncio.gather(*publishing, return_exceptions=True))
        sent = [n for n, result in enumerate(results) if not isinstance(result, BaseException)]
        failed = [result for result in results if isinstance(result, BaseException)]
        expected = {
            "error": [0, 1, 2],
            "drop_newest": [0, 1, 2],
            "drop_oldest": [3, 4, 5],
            "block": [0, 1, 2, 3, 4, 5],
        }[policy]
        assert sent == expected
        assert all(
            isinstance(error, Overflow) and error.outcome is Outcome.NOT_SENT for error in failed
        )
        dropped = 3 if policy in ("drop_newest", "drop_oldest") else 0
        assert bus.stats.dropped == dropped
        assert bus.stats.failed == len(failed)
    assert await room.stored("a") == expected


async def test_dropping_is_counted_where_nobody_waits(room: Room) -> None:
    async with away(room, offline_messages=2, offline_overflow="drop_oldest") as bus:
        for number in range(10):
            await bus.publish("a", b"%d" % number, confirm="nobody")
        assert (bus.stats.offline, bus.stats.dropped) == (2, 8)


async def test_a_message_larger_than_the_buffer_displaces_nobody(room: Room) -> None:
    async with away(room, offline_bytes=10, offline_overflow="drop_oldest") as bus:
        await bus.publish("a", b"1", confirm="nobody")
        with pytest.raises(Overflow):
            await bus.publish("a", b"x" * 11, confirm="nobody")
        assert bus.stats.offline == 1


async def test_a_publish_that_timed_out_gives_its_place_back(room: Room) -> None:
    """One message waits for ever at the head; those behind it come and go."""
    async with away(room, offline_messages=3, offline_bytes=30) as bus:
        await bus.publish("a", b"0", confirm="nobody")
        for _ in range(10):
            results = await soon(
                bus.publish_many([("a", b"x" * 10), ("a", b"x" * 10)], timeout=0.01)
            )
            assert all(isinstance(result, PublishTimeout) for result in results)
        assert bus.stats.offline == 1
        await bus.publish("a", b"1", confirm="nobody")
        await room.up(bus)
        await until(lambda: bus.stats.offline == 0, "it is empty")
    assert await room.stored("a") == [0, 1]


async def test_a_cancelled_wait_for_room_passes_its_turn_on(room: Room) -> None:
    """Room is made, and whoever was to get it is cancelled in the same moment."""
    async with away(room, offline_messages=1, offline_overflow="block") as bus:
        first = asyncio.create_task(bus.publish("a", b"0"))
        await turns()
        second = asyncio.create_task(bus.publish("a", b"1"))
        await turns()
        third = asyncio.create_task(bus.publish("a", b"2"))
        await turns()
        first.cancel()
        await asyncio.wait([first])
        second.cancel()
        await turns()
        await room.up(bus)
        await soon(third, 5)
    assert await room.stored("a") == [2]


async def test_whoever_waits_for_room_is_not_overtaken(room: Room) -> None:
    """Publishes go out in the order of the calls, also those that come when there is room."""
    async with away(room, offline_messages=2, offline_overflow="block") as bus:
        publishing = []
        for number in range(50):
            publishing.append(asyncio.create_task(bus.publish("a", b"%d" % number)))
            await asyncio.sleep(0)
        await room.up()
        for number in range(50, 200):
            publishing.append(asyncio.create_task(bus.publish("a", b"%d" % number)))
            await asyncio.sleep(0)
        await soon(asyncio.gather(*publishing))
    assert await room.stored("a") == list(range(200))


async def test_closing_ends_who_waits_for_room(room: Room) -> None:
    bus = connect(room.url, offline="buffer", offline_messages=1, offline_overflow="block", **SOON)
    await soon(bus.open())
    await room.down(bus)
    publishing = [asyncio.create_task(bus.publish("a", b"x")) for _ in range(4)]
    await turns()
    assert bus.stats.offline == 1
    await soon(bus.close(drain=0), 2)
    results = await soon(asyncio.gather(*publishing, return_exceptions=True), 2)
    for result in results:
        assert isinstance(result, PublishFailed)
        assert result.outcome is Outcome.NOT_SENT


async def test_memory_of_what_was_withdrawn_is_freed(room: Room) -> None:
    async with away(room) as bus:
        await bus.publish("a", b"0", confirm="nobody")
        tracemalloc.start()
        try:
            for _ in range(20):
                await soon(
                    bus.publish_many([("a", bytes(500_000)) for _ in range(5)], timeout=0.001)
                )
            gc.collect()  # errors and their tracebacks refer to each other
            assert tracemalloc.get_traced_memory()[0] < 4_000_000
        finally:
            tracemalloc.stop()
        assert bus.status is not Status.ONLINE
        assert bus.stats.offline == 1


class Paced:
    """A bus that may send two messages a second, and time that a test moves."""

    def __init__(self, room: Room, bus: Bus, clock: VirtualClock) -> None:
        self.room = room
        self.bus = bus
        self.clock = clock

    async def lose(self) -> None:
        """Take the session away until `regain`."""
        self.room.space.refuse(True)
        self.room.space.disconnect_all()
        await self.clock.asleep()

    async def regain(self) -> None:
        self.room.space.refuse(False)
        await self.clock.advance_to_next()
        assert self.bus.status is Status.ONLINE

    async def keep(self, count: int) -> None:
        """Publish so many to the offline buffer."""
        for number in range(count):
            await soon(self.bus.publish("a", b"%d" % number, confirm="nobody"))


@asynccontextmanager
async def paced(room: Room, **options: Any) -> AsyncIterator[Paced]:
    clock = VirtualClock()
    async with opened(room.url, offline="buffer", rate=2, clock=clock, **options) as bus:
        yield Paced(room, bus, clock)


async def test_what_was_kept_leaves_no_faster_than_the_broker_allows(room: Room) -> None:
    """Twelve at two a second need five seconds; the rate is kept, and no more than that."""
    async with paced(room) as it:
        await it.lose()
        await it.keep(12)
        await it.regain()
        left = []
        for _ in range(5):
            left.append(it.bus.stats.offline)
            await it.clock.advance(0.9)
            assert it.bus.stats.offline == left[-1]
            await it.clock.advance(0.1 + 1e-9)
        left.append(it.bus.stats.offline)
        assert left == [10, 8, 6, 4, 2, 0]
    assert await room.stored("a") == list(range(12))


async def test_what_is_published_meanwhile_keeps_the_rate_and_the_order(room: Room) -> None:
    async with paced(room) as it:
        await it.lose()
        await it.keep(4)
        await it.regain()
        late = asyncio.create_task(it.bus.publish("a", b"4"))
        await it.clock.advance(1.0)
        assert not late.done()
        await it.clock.advance(1.0)
        await soon(late)
        direct = asyncio.create_task(it.bus.publish("a", b"5"))
        over = asyncio.create_task(it.bus.publish("a", b"6"))
        await it.clock.asleep()
        assert (direct.done(), over.done()) == (True, False)
        await it.clock.advance(1.0)
        await soon(over)
    assert await room.stored("a") == list(range(7))


async def test_a_session_lost_while_its_backlog_is_paced_goes_on_in_the_next(room: Room) -> None:
    async with paced(room) as it:
        await it.lose()
        await it.keep(6)
        await it.regain()
        assert it.bus.stats.offline == 4
        await it.lose()
        await it.clock.advance(1.0)
        assert it.bus.stats.offline == 4
        it.room.space.refuse(False)
        await it.clock.advance(60.0)
        assert it.bus.stats.offline == 0
    assert await room.stored("a") == list(range(6))


async def test_a_message_withdrawn_before_its_turn_takes_no_place(room: Room) -> None:
    async with paced(room) as it:
        await it.lose()
        await it.keep(2)
        given_up = asyncio.create_task(it.bus.publish("a", b"x"))
        last = asyncio.create_task(it.bus.publish("a", b"2"))
        also_last = asyncio.create_task(it.bus.publish("a", b"3"))
        await turns()
        await it.regain()
        given_up.cancel()
        await it.clock.advance(1.0)
        await soon(asyncio.gather(last, also_last))
    assert await room.stored("a") == [0, 1, 2, 3]


async def test_a_message_that_grows_too_old_behind_the_rate_is_dropped(room: Room) -> None:
    async with paced(room, offline_age=2.5) as it:
        await it.lose()
        await it.keep(8)
        await it.regain()
        await it.clock.advance(10.0)
        assert (it.bus.stats.offline, it.bus.stats.dropped) == (0, 2)
    assert await room.stored("a") == list(range(6))


async def test_closing_ends_a_backlog_that_is_paced(room: Room) -> None:
    async with paced(room) as it:
        await it.lose()
        waiting = [asyncio.create_task(it.bus.publish("a", b"x")) for _ in range(4)]
        await turns()
        await it.regain()
        await soon(it.bus.close(drain=0))
        results = await soon(asyncio.gather(*waiting, return_exceptions=True))
        assert [getattr(each, "outcome", None) for each in results] == [
            None,
            None,
            Outcome.NOT_SENT,
            Outcome.NOT_SENT,
        ]
