"""A lost session comes back: soon, without a storm, and with everything that was subscribed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pubsub_core import Status, SubscribeFailed
from pubsub_core.events import StatusChanged, SubscriptionRefused
from pubsub_core.memory import Space
from pubsub_core.testing.clock import VirtualClock
from pubsub_core.testing.proxy import FaultProxy
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer
from tests.mqtt.scripted import SUBSCRIBE, Packet, scripted

from .support import SOON, VERSIONS, noting, offline, online, opened, resumed, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


class Outage:
    """A bus's way to its broker, to be closed and opened again."""

    def __init__(self, url: str, down: Callable[[], Any], up: Callable[[], Any]) -> None:
        self.url = url
        self._down = down
        self._up = up

    async def begin(self) -> None:
        self._down()

    async def end(self) -> float:
        """End it; return when that was."""
        self._up()
        return time.monotonic()


@pytest.fixture(params=["memory", "mqtt"])
async def outage(
    request: pytest.FixtureRequest, mosquitto: MosquittoServer, unique: Callable[..., str]
) -> AsyncIterator[Outage]:
    if request.param == "memory":
        name = unique().replace("/", "-")
        space = Space.named(name)

        def down() -> None:
            space.refuse(True)
            space.disconnect_all()

        yield Outage(f"memory://{name}", down, lambda: space.refuse(False))
        Space.forget(name)
        return
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(mosquitto.host, mosquitto.port))
        cutting: list[asyncio.Task[int]] = []

        def cut() -> None:
            proxy.refuse()
            cutting.append(asyncio.create_task(proxy.cut()))

        yield Outage(f"mqtt://127.0.0.1:{proxy.port}", cut, lambda: proxy.refuse(False))
        if cutting:
            await asyncio.wait(cutting)


async def recovery(outage: Outage, seconds: float) -> float:
    """Return how long a bus with default options takes after an outage of so many seconds."""
    async with opened(outage.url) as bus:
        began = time.monotonic()
        await outage.begin()
        await offline(bus)
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))  # the outage itself
        await outage.end()
        watch = Stopwatch()
        await online(bus)
        took = watch.seconds
        await soon(bus.publish("a", b"x"))
        return took


async def test_recovery_after_a_short_outage(outage: Outage) -> None:
    assert await recovery(outage, 0.3) <= 2.0


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 10])
async def test_recovery_after_a_longer_outage(outage: Outage, seconds: float) -> None:
    assert await recovery(outage, seconds) <= 2.0


async def test_recovery_after_the_broker_was_killed(mosquitto_own: MosquittoServer) -> None:
    async with opened(mosquitto_own.url) as bus:
        await soon(mosquitto_own.kill())
        await offline(bus)
        await soon(mosquitto_own.start())
        watch = Stopwatch()
        await online(bus)
        assert watch.seconds <= 2.0


async def test_delays_double_with_full_jitter_and_start_over_after_health(
    outage: Outage,
) -> None:
    """With the defaults: 0.5 s, doubling to 30 s, in the first 10 s never above 1.5 s."""
    clock = VirtualClock()
    async with opened(outage.url, clock=clock) as bus, noting(bus) as events:

        def told() -> list[float]:
            return [
                event.retry_in
                for event in events
                if isinstance(event, StatusChanged) and event.retry_in is not None
            ]

        async def fail(times: int) -> list[tuple[float, float]]:
            """Let so many attempts fail; return the time of each since the loss, and its delay."""
            lost_at = clock.monotonic()
            seen: list[tuple[float, float]] = []
            start = len(told())
            await outage.begin()
            while True:
                await until(lambda: len(told()) > start + len(seen), "the next delay")
                seen.append((clock.monotonic() - lost_at, told()[-1]))
                if len(seen) == times:
                    return seen
                await until(lambda: clock.sleepers > 0, "it waits")
                await soon(clock.advance(clock.next_wake or 0.0))

        first = await fail(60)
        assert first[0][1] <= 0.5
        for number, (age, delay) in enumerate(first):
            bound = min(30.0, 0.5 * 2**number)
            assert delay <= (min(bound, 1.5) if age < 10.0 else bound)
        late = [delay for age, delay in first if age > 60]
        assert len({round(delay, 4) for delay in late}) == len(late), "no jitter"
        assert max(late) > 15.0
        assert min(late) < 15.0
        assert max(late) <= 30.0

        async def recover() -> None:
            sessions = bus.stats.sessions
            await outage.end()
            async with asyncio.timeout(20):
                while bus.stats.sessions == sessions:
                    await clock.advance(0.5)
                    await asyncio.sleep(0.001)
            await online(bus)

        await recover()
        # A session that did not last does not calm it down: still long delays later on.
        flapping = await fail(25)
        assert max(delay for age, delay in flapping if age >= 10) > 8.0
        await recover()
        await soon(clock.advance(10.5))
        healthy = await fail(3)
        assert healthy[0][1] <= 0.5
        assert healthy[1][1] <= 1.0
        await recover()


async def test_a_link_that_keeps_breaking_is_not_taken_for_a_rival(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """Resets that a write finds out first, six within seconds, with an identifier of our own."""
    identity = unique().replace("/", "-")
    async with FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        url = f"mqtt://127.0.0.1:{proxy.port}"
        async with opened(url, client_id=identity, offline="buffer", **SOON) as bus:
            connection = bus.native(MQTTBackend).connection
            for _ in range(6):
                sessions = bus.stats.sessions
                sock = connection.socket
                assert sock is not None
                # The reset arrives while nobody reads, so that the next write meets it.
                descriptor = sock.fileno()
                asyncio.get_running_loop().remove_reader(descriptor)
                bus.native(MQTTBackend).driver._reading = False
                await soon(proxy.cut(reset=True))
                await soon(bus.publish(unique(), b"x" * 1000))
                await resumed(bus, sessions)
            assert bus.stats.sessions == 7


# --- subscriptions ------------------------------------------------------------------------


def granted(packet: Packet, version: str, code: int) -> bytes:
    """Return the SUBACK of a SUBSCRIBE with one filter."""
    middle = b"\x00" if version == "5" else b""
    body = packet.body[:2] + middle + bytes((code,))
    return bytes((0x90, len(body))) + body


CONNACKS = {"3.1.1": bytes.fromhex("20 02 00 00"), "5": bytes.fromhex("20 03 00 00 00")}


@pytest.mark.parametrize("version", VERSIONS)
async def test_online_is_told_after_the_last_subscription_is_confirmed(version: str) -> None:
    async with scripted() as broker:
        broker.connack = CONNACKS[version]
        held: list[Packet] = []
        holding = False

        def answer(packet: Packet) -> bytes | None:
            if packet.type != SUBSCRIBE:
                return None
            if holding and len(held) < 1:
                held.append(packet)
                return b""
            return granted(packet, version, 1)

        broker.answer = answer
        async with opened(broker.url, protocol=version, **SOON) as bus:
            subscriptions = [await soon(_entered(bus.subscribe(f"f/{n}"))) for n in range(5)]
            before = len(broker.of(SUBSCRIBE))
            holding = True
            async with noting(bus) as events:
                broker.cut()
                await until(
                    lambda: len(broker.of(SUBSCRIBE)) == before + 5, "five filters come again"
                )
                for _ in range(50):
                    await asyncio.sleep(0)
                assert bus.status is Status.RECONNECTING
                broker.send(granted(held[0], version, 1))
                await online(bus)
                statuses = [e.status for e in events if isinstance(e, StatusChanged)]
                assert statuses.count(Status.ONLINE) == 2  # the one at hand, and the new one
            assert all(subscription.active for subscription in subscriptions)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_refused_resubscription_is_an_event_and_ends_its_stream(version: str) -> None:
    async with scripted() as broker:
        broker.connack = CONNACKS[version]
        refusing = False

        def answer(packet: Packet) -> bytes | None:
            if packet.type != SUBSCRIBE:
                return None
            refuse = refusing and b"secret" in packet.body
            return granted(packet, version, 0x80 if refuse else 1)

        broker.answer = answer
        async with opened(broker.url, protocol=version, **SOON) as bus, noting(bus) as events:
            kept = await soon(_entered(bus.subscribe("open/#")))
            lost = await soon(_entered(bus.subscribe("secret/#")))
            refusing = True
            broker.cut()
            await resumed(bus, 1)
            await until(
                lambda: any(isinstance(event, SubscriptionRefused) for event in events),
                "the refusal is told",
            )
            (refusal,) = [event for event in events if isinstance(event, SubscriptionRefused)]
            assert refusal.filter == "secret/#"
            with pytest.raises(SubscribeFailed):
                await soon(lost.get())
            assert not lost.active
            assert kept.active


async def test_a_memory_resubscription_that_is_refused_is_an_event(
    unique: Callable[..., str],
) -> None:
    name = unique().replace("/", "-")
    space = Space.named(name)
    space.allow("me", subscribe=("#",))
    try:
        async with opened(f"memory://{name}", username="me", **SOON) as bus, noting(bus) as events:
            lost = await soon(_entered(bus.subscribe("secret/#")))
            space.allow("me", subscribe=("open/#",))
            space.disconnect_all()
            await resumed(bus, 1)
            assert [e.filter for e in events if isinstance(e, SubscriptionRefused)] == ["secret/#"]
            with pytest.raises(SubscribeFailed):
                await soon(lost.get())
    finally:
        Space.forget(name)


async def test_subscriptions_come_back_after_the_broker_forgot_everything(
    mosquitto_own: MosquittoServer, unique: Callable[..., str]
) -> None:
    """Killed, and with an empty store: what is published right after ``online`` arrives."""
    async with (
        opened(mosquitto_own.url, **SOON) as bus,
        opened(mosquitto_own.url, **SOON) as other,
    ):
        subscriptions = [await soon(_entered(bus.subscribe(unique(f"{n}")))) for n in range(20)]
        await soon(mosquitto_own.kill())
        await offline(bus)
        await soon(mosquitto_own.start())
        await resumed(bus, 1)
        await resumed(other, 1)
        for number in range(20):
            await soon(other.publish(unique(f"{number}"), b"%d" % number))
        for number, subscription in enumerate(subscriptions):
            assert (await soon(subscription.get())).payload == b"%d" % number


async def _entered(subscription: Any) -> Any:
    return await subscription
