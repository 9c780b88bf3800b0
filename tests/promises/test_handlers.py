"""A handler that raises, whatever it raises, harms nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pubsub_core import Bus, Message, Status
from pubsub_core.events import Gap
from pubsub_core.memory import Space
from pubsub_mqtt.server import MosquittoServer

from .support import SOON, offline, online, opened, resumed, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


class Fault(Exception):
    """What user code raises here."""


@pytest.fixture(params=["memory", "mqtt"])
async def bus(
    request: pytest.FixtureRequest, mosquitto: MosquittoServer, unique: Callable[..., str]
) -> AsyncIterator[Bus]:
    name = unique().replace("/", "-")
    if request.param == "memory":
        async with opened(f"memory://{name}", **SOON) as made:
            yield made
        Space.forget(name)
        return
    async with opened(mosquitto.url, **SOON) as made:
        yield made


def raising(kind: str, got: list[bytes]) -> Callable[[Message[bytes]], Any]:
    """Return a handler that raises for every other message."""

    def fail(message: Message[bytes]) -> None:
        got.append(message.payload)
        if int(message.payload) % 2:
            match kind.split("-")[1]:
                case "exception":
                    raise Fault("on purpose")
                case "stop":
                    raise StopIteration("on purpose")
                case "cancelled":
                    raise asyncio.CancelledError("on purpose")

    async def fail_async(message: Message[bytes]) -> None:
        fail(message)

    return fail_async if kind.startswith("async") else fail


@pytest.mark.parametrize(
    "kind",
    [
        "async-exception",
        "async-stop",
        "async-cancelled",
        "plain-exception",
        "plain-stop",
        "plain-cancelled",
    ],
)
async def test_a_raising_handler_gets_the_next_message(
    bus: Bus, unique: Callable[..., str], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every message is delivered, each failure logged once and counted, the session kept."""
    got: list[bytes] = []
    async with bus.subscribe(unique("a"), handler=raising(kind, got)) as failing:
        async with bus.subscribe(unique("a")) as well:
            with caplog.at_level(logging.ERROR, "pubsub_core"):
                for number in range(10):
                    await soon(bus.publish(unique("a"), b"%d" % number))
                expected = [b"%d" % number for number in range(10)]
                assert [(await soon(well.get())).payload for _ in range(10)] == expected
                await until(lambda: len(got) == 10, "the handler sees them all", 5)
                assert got == expected
                await until(
                    lambda: failing.stats.failed + failing.stats.delivered == 10, "counted", 5
                )
            assert failing.stats.failed == 5
            if "cancelled" not in kind:
                assert bus.stats.handler_failures == 5
                records = [record for record in caplog.records if record.exc_info]
                assert len(records) == 5
            assert bus.status is Status.ONLINE
            assert bus.stats.sessions == 1
            assert failing.active


async def test_a_handler_that_cannot_take_a_gap_goes_on(unique: Callable[..., str]) -> None:
    name = unique().replace("/", "-")
    space = Space.named(name)
    got: list[bytes] = []

    class Picky:
        """Raises before there is anything to await."""

        def __call__(self, item: Any) -> Any:
            if isinstance(item, Gap):
                raise Fault("no gaps here")
            got.append(item.payload)

    try:
        async with opened(f"memory://{name}", **SOON) as bus:
            async with bus.subscribe("a", handler=Picky(), gaps=True) as subscription:
                space.disconnect_all()
                await resumed(bus, 1)
                await soon(bus.publish("a", b"x"))
                await until(lambda: got == [b"x"], "the next message", 5)
                assert subscription.stats.failed == 1
    finally:
        Space.forget(name)


async def test_callbacks_of_a_client_may_call_everything(
    bus: Bus, unique: Callable[..., str]
) -> None:
    """From within a handler: publish, subscribe, unsubscribe, ping, close; nothing hangs."""
    done: list[str] = []

    async def handler(message: Message[bytes]) -> None:
        await bus.publish(unique("other"), b"x")
        async with bus.subscribe(unique("inner")) as inner:
            await bus.publish(unique("inner"), b"y")
            assert (await inner.get(timeout=5)).payload == b"y"
        await bus.ping()
        done.append("used")
        await bus.close()
        done.append("closed")

    await soon(_entered(bus.subscribe(unique("a"), handler=handler)))
    await soon(bus.publish(unique("a"), b"x"))
    await until(lambda: done == ["used", "closed"], "the handler is through", 10)
    assert bus.status is Status.CLOSED


async def test_a_raising_listener_of_events_ends_alone(
    mosquitto_own: MosquittoServer, unique: Callable[..., str]
) -> None:
    """Code that fails over a lost session does not keep the session from coming back."""
    async with opened(mosquitto_own.url, **SOON) as bus:

        async def listen() -> None:
            async with bus.events() as events:
                async for event in events:
                    if getattr(event, "status", None) is Status.RECONNECTING:
                        raise Fault("on purpose")

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        await soon(mosquitto_own.kill())
        await offline(bus)
        await soon(asyncio.wait([listening]))
        assert isinstance(listening.exception(), Fault)
        await soon(mosquitto_own.start())
        await online(bus)
        await soon(bus.publish(unique(), b"x"))


async def _entered(subscription: Any) -> Any:
    return await subscription
