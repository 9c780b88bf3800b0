"""Any wait may be cancelled at any point; nothing is left behind and the bus goes on.

Each round begins one operation, lets the event loop turn a random number of times, and
cancels. The seed is printed; PUBSUB_TEST_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from pubsub_core import Bus, Status, connect
from pubsub_core.errors import PubSubError
from pubsub_core.memory import Space
from pubsub_core.testing.proxy import FaultProxy
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer
from tests.servers import LeakCheck

from .support import SOON, online, opened, resumed, seeded, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(120)]


@pytest.fixture(params=["memory", "3.1.1", "5"])
async def broker(
    request: pytest.FixtureRequest, mosquitto: MosquittoServer, unique: Callable[..., str]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    name = unique().replace("/", "-")
    if request.param == "memory":
        Space.named(name)
        yield f"memory://{name}", {}
        Space.forget(name)
    else:
        yield mosquitto.url, {"protocol": request.param, "max_inflight": 5}


async def interrupted(work: Coroutine[Any, Any, Any], rng: random.Random) -> bool:
    """Cancel *work* after a random number of turns; return whether it was too late."""
    task = asyncio.ensure_future(work)
    for _ in range(rng.choice((0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144))):
        if task.done():
            break
        await asyncio.sleep(0)
    late = task.done()
    task.cancel()
    await soon(asyncio.wait([task]))
    if not task.cancelled():
        error = task.exception()
        if error is not None and not isinstance(error, PubSubError | TimeoutError):
            raise error
    return late


def pending(bus: Bus) -> list[str]:
    """Return what a bus at rest, without a subscription, must not hold."""
    engine = bus._engine
    assert engine is not None
    subscriptions, outbox = engine.subscriptions, engine.publisher._outbox
    held: dict[str, object] = {
        "routes": subscriptions.router.routes,
        "locks": subscriptions._locks,
        "pausing": subscriptions._pausing,
        "outbox": outbox._queue,
        "blocked": outbox._blocked,
        "waiters": engine.session._waiters,
        "tasks": [task for task in engine._tasks if not task.done()],
    }
    backend = engine.backend
    if isinstance(backend, MQTTBackend):
        connection = backend.connection
        held |= {
            "publishes": connection.unfinished,
            "unflushed": connection.outbound.unflushed,
            "requests": connection.unanswered,
            "pings": connection.requests.pings,
            "unsettled": connection.inbound.unsettled,
            "turns": backend.turns,
            "captures": backend._captures,
            "subscriptions": backend._current,
            "drained": backend.driver._drained,
        }
    return [name for name, value in held.items() if value]


async def at_rest(bus: Bus) -> None:
    with contextlib.suppress(AssertionError):
        await until(lambda: not pending(bus), "nothing is held", 5)
    assert not pending(bus), "still held"


async def works(bus: Bus, topic: str) -> None:
    """Show that *bus* does everything it did before."""
    async with bus.subscribe(topic) as subscription:
        await soon(bus.publish(topic, b"alive", qos=1))
        while (await soon(subscription.get())).payload != b"alive":
            pass
    await soon(bus.ping())


async def test_operations_cancelled_anywhere_leave_nothing(
    broker: tuple[str, dict[str, Any]], unique: Callable[..., str]
) -> None:
    url, options = broker
    rng = seeded("operations")
    async with opened(url, **SOON, **options) as bus:
        topic = unique()

        async def subscribe() -> None:
            async with bus.subscribe(f"{topic}/{rng.randrange(3)}"):
                await asyncio.sleep(0)

        async def shared() -> None:
            one = await bus.subscribe(f"{topic}/x")
            try:
                two = await bus.subscribe(f"{topic}/x", qos=0)
                await two.close()
            finally:
                await one.close()

        async def get() -> None:
            async with bus.subscribe(f"{topic}/g") as subscription:
                await bus.publish(f"{topic}/g", b"x")
                await subscription.get()

        operations: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            lambda: bus.publish(f"{topic}/0", b"x", qos=0),
            lambda: bus.publish(f"{topic}/0", b"x" * 5000, qos=1),
            lambda: bus.publish(f"{topic}/0", b"x", qos=2),
            lambda: bus.publish_many([(f"{topic}/0", b"x")] * 20),
            lambda: bus.last(f"{topic}/{rng.randrange(3)}"),
            bus.ping,
            subscribe,
            subscribe,
            shared,
            get,
        ]
        late = 0
        rounds = 150
        for _ in range(rounds):
            at_once = [interrupted(rng.choice(operations)(), rng) for _ in range(3)]
            late += sum(await soon(asyncio.gather(*at_once)))
        assert 0 < late < rounds * 3, "every cancellation came too late, or none did"
        await at_rest(bus)
        await works(bus, topic)
        await at_rest(bus)
        # Nothing was left at the broker either: nobody here gets this.
        unrouted, received = bus.stats.unrouted, bus.stats.received
        for name in ("0", "1", "2", "x", "g"):
            await soon(bus.publish(f"{topic}/{name}", b"x", qos=1))
        await soon(bus.ping())
        assert (bus.stats.unrouted, bus.stats.received) == (unrouted, received)
        assert bus.stats.sessions == 1


async def test_a_cancelled_get_loses_no_message(
    broker: tuple[str, dict[str, Any]], unique: Callable[..., str]
) -> None:
    url, options = broker
    rng = seeded("get")
    count = 150
    async with opened(url, **SOON, **options) as bus:
        async with bus.subscribe(unique(), buffer=count) as subscription:
            got: list[int] = []

            async def get() -> None:
                # Nothing may come between taking and noting.
                got.append(int((await subscription.get()).payload))

            for number in range(count):
                publishing = asyncio.create_task(bus.publish(unique(), b"%d" % number))
                for _ in range(2):
                    await interrupted(get(), rng)
                await soon(publishing)
            while len(got) < count:
                await soon(get())
            assert got == list(range(count))


async def test_a_cancelled_open_or_close_leaves_nothing(
    broker: tuple[str, dict[str, Any]], unique: Callable[..., str]
) -> None:
    url, options = broker
    rng = seeded("open")
    check = LeakCheck()
    for _ in range(25):
        bus = connect(url, **SOON, **options)
        await interrupted(bus.open(), rng)
        if bus.status is Status.ONLINE:
            async with bus.subscribe(unique()):
                publishing = asyncio.create_task(bus.publish(unique(), b"x"))
                await interrupted(bus.close(), rng)
                await soon(bus.close())
            await soon(asyncio.wait([publishing]))
            publishing.exception()
        await soon(bus.close())
        assert bus.status is Status.CLOSED
    await check.check()
    async with opened(url, **options) as bus:
        await works(bus, unique())


async def test_connecting_cancelled_at_each_stage(
    mosquitto_tls: MosquittoServer, authority: Any, unique: Callable[..., str]
) -> None:
    """A slow link with TLS and WebSocket gives every stage of connecting its turn."""
    rng = seeded("stages")
    check = LeakCheck()
    async with FaultProxy(mosquitto_tls.host, mosquitto_tls.websocket_port) as proxy:
        proxy.delay(0.01)
        url = f"wss://127.0.0.1:{proxy.port}"
        for _ in range(12):
            bus = connect(url, ca_file=authority.cafile, **SOON)
            opening = asyncio.create_task(bus.open())
            await asyncio.wait([opening], timeout=rng.uniform(0.0, 0.12))
            opening.cancel()
            await soon(asyncio.wait([opening]))
            if not opening.cancelled():
                opening.exception()
            await soon(bus.close(drain=0))
        proxy.delay(0)
        async with opened(url, ca_file=authority.cafile) as bus:
            await works(bus, unique())
    await check.check()


async def test_cancellations_amid_resets(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """Both at once: links break while operations are cancelled."""
    rng = seeded("resets")
    async with FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        async with opened(
            f"mqtt://127.0.0.1:{proxy.port}", offline="buffer", max_inflight=5, **SOON
        ) as bus:
            topic = unique()

            async def subscribe() -> None:
                async with bus.subscribe(f"{topic}/{rng.randrange(3)}") as subscription:
                    await subscription.get(timeout=0.01)

            operations: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                lambda: bus.publish(f"{topic}/0", b"x", qos=1),
                lambda: bus.publish(f"{topic}/1", b"x", qos=2, timeout=0.01),
                lambda: bus.publish_many([(f"{topic}/2", b"x")] * 10),
                subscribe,
            ]
            sessions = 0
            for number in range(100):
                if number % 10 == 0:
                    sessions = bus.stats.sessions
                    proxy.drop_after(rng.randrange(1, 300))
                await soon(
                    asyncio.gather(*(interrupted(rng.choice(operations)(), rng) for _ in range(3)))
                )
                if number % 10 == 9:
                    await soon(proxy.cut())
                    await resumed(bus, sessions)
            proxy.heal()
            await online(bus)
            await at_rest(bus)
            await works(bus, topic)
            await at_rest(bus)
