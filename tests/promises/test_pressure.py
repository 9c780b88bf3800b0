"""A consumer that is slow, or stopped, costs no more memory than its queue; others go on."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core.events import Gap, GapReason
from pubsub_core.memory import Space
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer

from .support import SOON, opened, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

SIZE = 20_000
COUNT = 400
QUEUE = 20


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize(
    ("overflow", "version"),
    [
        ("drop_oldest", "3.1.1"),
        ("drop_oldest", "5"),
        ("drop_newest", "5"),
        ("latest", "5"),
        ("error", "5"),
        ("block", "3.1.1"),
        ("block", "5"),
    ],
)
async def test_a_stopped_consumer_is_bounded(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: str, overflow: Any
) -> None:
    """8 MB go by a queue of 400 kB; a second bus gets every message."""
    async with (
        opened(mosquitto.url, protocol=version, **SOON) as slow,
        opened(mosquitto.url, protocol=version, **SOON) as other,
    ):
        topic = unique()
        # At QoS 0 the broker has nothing to keep for whom it cannot send to.
        async with (
            slow.subscribe(f"{topic}/+", buffer=QUEUE, overflow=overflow, qos=0) as stopped,
            other.subscribe(f"{topic}/+", buffer=COUNT, buffer_bytes=1 << 30, qos=0) as quick,
        ):
            tracemalloc.start()
            try:
                before = traced()
                # In handfuls: one by one, Nagle's algorithm at the broker costs 40 ms each.
                for _ in range(COUNT // 50):
                    handful = [(f"{topic}/{number}", bytes(SIZE)) for number in range(50)]
                    for result in await soon(other.publish_many(handful, qos=1)):
                        assert not isinstance(result, Exception)
                    handful.clear()
                    for _ in range(50):
                        await soon(quick.get())
                if overflow == "block":
                    await until(lambda: not slow.native(MQTTBackend).connection.reading, "it stops")
                else:
                    await until(lambda: stopped.stats.received >= QUEUE + 1, "it is passed by")
                grown = traced() - before
            finally:
                tracemalloc.stop()
            assert quick.stats.delivered == COUNT
            assert quick.stats.dropped == 0
            # With "block" the one that finds it full is kept, and the flow stops behind it.
            assert stopped.stats.buffered <= QUEUE + (overflow == "block")
            if overflow == "block":
                # Besides the queue, what had been read already: a mebibyte at most.
                assert grown < 2 * QUEUE * SIZE + (1 << 20) + 300_000
                assert stopped.stats.dropped == 0
            else:
                assert grown < 2 * QUEUE * SIZE
                stats = stopped.stats
                assert stats.dropped == stats.received - stats.buffered
                assert stats.dropped_bytes == stats.dropped * SIZE


async def test_a_stopped_consumer_of_confirmed_messages_loses_nothing(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """With ``block`` and QoS 1 the broker waits; everything comes once it is asked for."""
    topic = unique()
    async with opened(mosquitto.url, **SOON) as slow, opened(mosquitto.url, **SOON) as other:
        async with slow.subscribe(topic, buffer=5, overflow="block", qos=1) as stopped:
            await soon(other.publish_many((topic, b"%d" % n) for n in range(300)))
            got = [int((await soon(stopped.get())).payload) for _ in range(300)]
            assert got == list(range(300))
            assert stopped.stats.dropped == 0


async def test_a_memory_publisher_waits_for_a_blocking_consumer(
    unique: Callable[..., str],
) -> None:
    name = unique().replace("/", "-")
    try:
        async with opened(f"memory://{name}") as slow, opened(f"memory://{name}") as other:
            async with (
                slow.subscribe("a", buffer=QUEUE, overflow="block") as stopped,
                other.subscribe("b") as lively,
            ):
                sent = 0

                async def publish() -> None:
                    nonlocal sent
                    for number in range(200):
                        await other.publish("a", b"%d" % number)
                        sent += 1

                task = asyncio.create_task(publish())
                await until(lambda: sent >= QUEUE, "the queue is full")
                for _ in range(100):
                    await asyncio.sleep(0)
                assert sent <= QUEUE + 2
                await soon(other.publish("b", b"x"))
                assert (await soon(lively.get())).payload == b"x"
                got = [int((await soon(stopped.get())).payload) for _ in range(200)]
                assert got == list(range(200))
                await soon(task)
    finally:
        Space.forget(name)


async def test_what_was_dropped_is_a_gap_at_its_place(unique: Callable[..., str]) -> None:
    name = unique().replace("/", "-")
    try:
        async with opened(f"memory://{name}") as bus:
            async with bus.subscribe("a", buffer=3, gaps=True) as subscription:
                for number in range(10):
                    await bus.publish("a", b"%d" % number)
                first: Any = await soon(subscription.get())
                assert isinstance(first, Gap)
                assert (first.reason, first.lost) == (GapReason.OVERFLOW, 7)
                rest = [(await soon(subscription.get())).payload for _ in range(3)]
                assert rest == [b"7", b"8", b"9"]
    finally:
        Space.forget(name)


async def test_an_event_reader_that_stopped_is_bounded(unique: Callable[..., str]) -> None:
    """Events nobody reads are counted, not kept."""
    name = unique().replace("/", "-")
    space = Space.named(name)
    try:
        async with opened(f"memory://{name}", reconnect_first=0.0, reconnect_max=0.001) as bus:
            async with bus.events() as events:
                for _ in range(600):
                    sessions = bus.stats.sessions
                    space.disconnect_all()
                    async with asyncio.timeout(5):
                        while bus.stats.sessions == sessions:
                            await asyncio.sleep(0)
                assert events.dropped > 0
                events.close()
                assert len([event async for event in events]) == 1024
    finally:
        Space.forget(name)
