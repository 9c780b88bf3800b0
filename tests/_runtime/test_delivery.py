"""The two halves of what a bus hands out: what a program sees, and what the bus keeps."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from pubsub_core import (
    Authorizer,
    EventStream,
    Message,
    Notifications,
    Presence,
    Status,
    Subscription,
    connect,
)
from pubsub_core.middleware import CallNext, Context

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is collected but what nobody refers to any more."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("handle", "names"),
    [
        (Subscription, {"ack", "active", "close", "drain", "filter", "get", "stats"}),
        (Presence, {"close", "count", "dropped", "get", "members", "synced", "topic"}),
        (Notifications, {"close", "dropped", "filter", "get", "interest", "synced"}),
        (Authorizer, {"close", "filter", "stats", "timeout"}),
        (EventStream, {"close", "dropped"}),
    ],
)
def test_a_handle_shows_what_a_program_calls(handle: type[Any], names: set[str]) -> None:
    assert {name for name in dir(handle) if not name.startswith("_")} == names


async def test_a_dropped_iterator_is_gone_while_its_subscriber_is_kept(uncollected: None) -> None:
    async with connect("memory://") as bus:
        subscription = await bus.subscribe("a")
        await bus.publish("a", b"1")
        assert (await subscription.get(timeout=5)).payload == b"1"
        noticed = weakref.ref(subscription)
        del subscription
        assert noticed() is None
        (subscriber,) = bus._engine.subscriptions.router.subscribers()
        assert subscriber.filter == "a"


async def test_a_handler_s_subscription_lives_with_it_whoever_drops_it(uncollected: None) -> None:
    seen: list[Any] = []
    done = asyncio.Event()

    async def look(context: Context, call_next: CallNext) -> Any:
        if context.subscription is not None:
            seen.append(context.subscription)
        return await call_next(context)

    async def handle(message: Message[bytes]) -> None:
        if message.payload == b"2":
            done.set()

    async with asyncio.timeout(20), connect("memory://") as bus:
        bus.use(look)
        await bus.subscribe("a", handler=handle)
        await bus.publish("a", b"1")
        await bus.publish("a", b"2")
        await done.wait()
        assert isinstance(seen[0], Subscription)
        assert seen[0] is seen[1]


async def test_middleware_sees_the_subscription_that_is_iterated() -> None:
    seen: list[Any] = []

    async def look(context: Context, call_next: CallNext) -> Any:
        if context.message is not None:
            seen.append(context.subscription)
        return await call_next(context)

    async with connect("memory://") as bus:
        bus.use(look)
        async with bus.subscribe("a") as subscription:
            await bus.publish("a", b"1")
            await subscription.get(timeout=5)
            assert seen == [subscription]


async def test_a_dropped_stream_of_events_takes_its_queue_with_it(uncollected: None) -> None:
    async with connect("memory://") as bus:
        before = len(bus._hub._queues)
        kept, dropped = bus.events(), bus.events()
        assert len(bus._hub._queues) == before + 2
        del dropped
        assert len(bus._hub._queues) == before + 1
    statuses = [event.status async for event in kept]  # type: ignore[union-attr]
    assert statuses == [Status.ONLINE, Status.CLOSING, Status.CLOSED]


async def test_draining_lets_a_handler_finish_and_takes_no_more() -> None:
    handled: list[bytes] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        begun.set()
        await go_on.wait()
        handled.append(message.payload)

    async with asyncio.timeout(20), connect("memory://") as bus:
        subscription = await bus.subscribe("a", handler=handle)
        await bus.publish("a", b"1")
        await bus.publish("a", b"2")
        await begun.wait()
        assert await subscription.drain(timeout=0) is False
        await bus.publish("a", b"3")
        draining = asyncio.ensure_future(subscription.drain())
        go_on.set()
        assert await draining is True
        assert handled == [b"1", b"2"]
        assert not subscription.active


async def test_draining_an_iterator_ends_it_after_what_waits() -> None:
    async with asyncio.timeout(20), connect("memory://") as bus:
        async with bus.subscribe("a") as messages:
            await bus.publish("a", b"1")
            assert await messages.drain() is True
            await bus.publish("a", b"2")
            assert [message.payload async for message in messages] == [b"1"]


async def test_a_handler_may_drain_its_own_subscription() -> None:
    done = asyncio.Event()

    async def handle(message: Message[bytes]) -> None:
        assert await subscription.drain() is True
        done.set()

    async with asyncio.timeout(20), connect("memory://") as bus:
        subscription = await bus.subscribe("a", handler=handle)
        await bus.publish("a", b"1")
        await done.wait()
