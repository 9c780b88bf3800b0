"""Closing is idempotent, bounded, flushes what can be confirmed, and says what was given up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pubsub_core import Bus, BusClosed, Message, Outcome, PublishFailed, Status, connect
from pubsub_core.memory import Space
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer

from .support import SOON, VERSIONS, offline, online, opened, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


async def entered(where: str, **options: Any) -> Bus:
    bus = connect(where, **SOON, **options)
    await soon(bus.open())
    return bus


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("qos", [1, 2])
async def test_closing_flushes_what_is_under_way(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: str, qos: int
) -> None:
    """300 publishes wait for the broker when close() is called; all are confirmed."""
    async with opened(mosquitto.url) as witness:
        async with witness.subscribe(unique(), qos=0, buffer=1000) as seen:
            bus = await entered(mosquitto.url, protocol=version, max_inflight=20)
            publishing = [
                asyncio.create_task(bus.publish(unique(), b"%d" % n, qos=qos)) for n in range(300)
            ]
            await asyncio.sleep(0)
            await soon(bus.close())
            receipts = await soon(asyncio.gather(*publishing))
            assert {receipt.confirmed_by for receipt in receipts} == {"broker"}
            got = [int((await soon(seen.get())).payload) for _ in range(300)]
            assert got == list(range(300))


async def test_closing_flushes_the_offline_buffer_of_a_session_at_hand(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """What had been kept is on its way when close() is called; nothing is given up."""
    async with (
        opened(mosquitto.url) as witness,
        FaultProxy(mosquitto.host, mosquitto.port) as proxy,
    ):
        async with witness.subscribe(unique(), qos=0, buffer=2000) as seen:
            bus = await entered(f"mqtt://127.0.0.1:{proxy.port}", offline="buffer")
            proxy.refuse()
            await soon(proxy.cut())
            await offline(bus)
            for number in range(1000):
                await soon(bus.publish(unique(), b"%d" % number, confirm="nobody"))
            proxy.refuse(False)
            await online(bus)
            await soon(bus.close())
            assert bus.stats.offline == 0
            got = [int((await soon(seen.get())).payload) for _ in range(1000)]
            assert got == list(range(1000))


async def test_what_is_given_up_is_said(
    unique: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = unique().replace("/", "-")
    space = Space.named(name)
    try:
        bus = await entered(f"memory://{name}", offline="buffer")
        space.refuse(True)
        space.disconnect_all()
        await offline(bus)
        await soon(bus.publish("a", b"x", confirm="nobody"))
        waiting = asyncio.create_task(bus.publish("a", b"x"))
        await until(lambda: bus.stats.offline == 2, "two are kept")
        with caplog.at_level(logging.WARNING, "pubsub_core"):
            await soon(bus.close())
        assert "2 messages not sent" in caplog.text
        with pytest.raises(PublishFailed) as caught:
            await soon(waiting)
        assert caught.value.outcome is Outcome.NOT_SENT
    finally:
        Space.forget(name)


@pytest.mark.parametrize("fault", ["blackhole", "stall", "dead", "cut"])
async def test_closing_a_broken_link_is_bounded_and_raises_nothing(
    mosquitto_own: MosquittoServer, unique: Callable[..., str], fault: str
) -> None:
    async with FaultProxy(mosquitto_own.host, mosquitto_own.port) as proxy:
        bus = await entered(f"mqtt://127.0.0.1:{proxy.port}", keepalive=60)
        subscription = await soon(_entered(bus.subscribe(unique("s"))))
        getting = asyncio.create_task(subscription.get())
        match fault:
            case "blackhole":
                proxy.blackhole()
            case "stall":
                proxy.stall(True, Direction.BOTH)
            case "dead":
                await soon(mosquitto_own.kill())
                await offline(bus)
            case _:
                proxy.refuse()
                await soon(proxy.cut())
        publishing = [
            asyncio.create_task(bus.publish(unique(), b"x", qos=qos)) for qos in (0, 1, 2)
        ]
        await asyncio.sleep(0)
        watch = Stopwatch()
        await soon(asyncio.gather(*(bus.close(drain=0.5) for _ in range(3))))
        # The time to drain, and half a second for the broker to see the end.
        assert watch.seconds <= 0.5 + 0.5 + 1.0
        results = await soon(asyncio.gather(*publishing, return_exceptions=True))
        for qos, result in enumerate(results):
            if qos or isinstance(result, BaseException):
                assert isinstance(result, PublishFailed | BusClosed) or "session" in str(result)
        with pytest.raises(BusClosed):
            await soon(getting)
        assert bus.status is Status.CLOSED
        await soon(bus.close())
        with pytest.raises(BusClosed):
            await soon(bus.publish(unique(), b"x"))
        assert bus.native(MQTTBackend).connection.unfinished == 0


async def test_unanswered_publishes_have_an_unknown_outcome(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        bus = await entered(f"mqtt://127.0.0.1:{proxy.port}", max_inflight=3)
        proxy.blackhole(True, Direction.DOWN)
        publishing = [asyncio.create_task(bus.publish(unique(), b"x")) for _ in range(5)]
        await until(lambda: bus.native(MQTTBackend).connection.unfinished == 5, "under way")
        await soon(bus.close(drain=0.1))
        results = await soon(asyncio.gather(*publishing, return_exceptions=True))
        outcomes = [result.outcome for result in results if isinstance(result, PublishFailed)]
        assert outcomes == [Outcome.UNKNOWN] * 3 + [Outcome.NOT_SENT] * 2


async def test_closing_while_it_reconnects_or_connects(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """In every phase of an attempt: refused, black-holed, dribbled."""
    async with FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        for fault in ("refuse", "blackhole", "dribble"):
            bus = await entered(f"mqtt://127.0.0.1:{proxy.port}")
            accepted = proxy.accepted
            match fault:
                case "refuse":
                    proxy.refuse()
                case "blackhole":
                    proxy.blackhole()
                case _:
                    proxy.dribble(1, 0.05)
            bus.native(MQTTBackend).connection.end(_lost())
            await offline(bus)
            if fault != "refuse":
                await until(partial(_more, proxy, accepted), "an attempt is under way")
            watch = Stopwatch()
            await soon(bus.close(drain=5))
            assert watch.seconds < 2.0
            proxy.heal()
            await soon(proxy.cut())


async def test_handlers_finish_what_is_buffered_and_then_publishes_end(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """Handlers publish while the bus drains; those publishes are confirmed, too."""
    async with opened(mosquitto.url) as witness:
        async with witness.subscribe(unique("out"), qos=0) as seen:
            bus = await entered(mosquitto.url)
            release = asyncio.Event()

            async def handler(message: Message[bytes]) -> None:
                await release.wait()
                await bus.publish(unique("out"), message.payload)

            subscription = await soon(_entered(bus.subscribe(unique("in"), handler=handler)))
            for number in range(5):
                await soon(bus.publish(unique("in"), b"%d" % number))
            await until(lambda: subscription.stats.received == 5, "five wait")
            closing = asyncio.create_task(bus.close())
            await asyncio.sleep(0)
            release.set()
            await soon(closing)
            got = [int((await soon(seen.get())).payload) for _ in range(5)]
            assert got == list(range(5))


def _more(proxy: FaultProxy, accepted: int) -> bool:
    return proxy.accepted > accepted


def _lost() -> Any:
    from pubsub_core.errors import ConnectError

    return ConnectError("cut by the test", backend="mqtt")


async def _entered(subscription: Any) -> Any:
    return await subscription
