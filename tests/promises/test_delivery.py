"""Confirmed messages are not lost, not doubled without bound, not reordered.

What is counted, and why. A publish counts as confirmed when `Bus.publish` returned. It counts
as accepted by the broker when a second subscriber saw it whose own link is never touched and
whose quality of service is 0: Mosquitto writes such a copy to that subscriber's socket before
it writes the PUBACK, and has no queue for it that could overflow. A confirmed message that the
witness never saw is therefore the publisher's loss, even when the broker is killed right after
the PUBACK. While the broker is down the publisher's way to it stays closed until the witness
has subscribed again; otherwise the broker would confirm messages that it has nobody for.

That the broker itself forgets what it confirmed when it is killed is another matter, which no
client can cure; the tests with a subscriber whose link is cut leave the broker alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from pubsub_core import Bus, ConfirmedBy, Outcome, PublishFailed
from pubsub_core.errors import NotConnected
from pubsub_core.memory import Space
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer

from .support import (
    SOON,
    VERSIONS,
    Tally,
    offline,
    online,
    opened,
    pumping,
    resumed,
    seeded,
    soon,
    until,
)

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(120)]

WINDOW = 30


@asynccontextmanager
async def watched(
    server: MosquittoServer, version: str, topic: str, **options: Any
) -> AsyncIterator[tuple[FaultProxy, Bus, Bus, Tally]]:
    """A publisher behind a proxy and an untouched witness of what the broker accepted."""
    tally = Tally()
    async with (
        FaultProxy(server.host, server.port) as proxy,
        opened(server.url, protocol=version, **SOON) as witness,
        opened(
            f"mqtt://127.0.0.1:{proxy.port}",
            protocol=version,
            offline="buffer",
            max_inflight=WINDOW,
            **SOON,
            **options,
        ) as bus,
    ):
        async with witness.subscribe(topic, handler=tally, qos=0, buffer=100_000):
            yield proxy, bus, witness, tally


def check_order_and_loss(tally: Tally, confirmed: list[int]) -> None:
    lost = sorted(set(confirmed) - tally.seen)
    assert not lost, f"{len(lost)} confirmed messages were lost: {lost[:10]}"
    assert not tally.inversions, f"first arrivals out of order: {tally.inversions[:10]}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("qos", [1, 2])
async def test_resets_lose_nothing_confirmed(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: str, qos: int
) -> None:
    """Six faults in the traffic: resets, a stream cut in the middle of a packet, dribbling."""
    rng = seeded("resets")
    topic = unique()
    async with watched(mosquitto, version, topic) as (proxy, bus, _, tally):
        async with pumping(bus, topic, qos=qos) as pump:
            for fault in ("cut", "up", "down", "cut", "dribble", "up"):
                await pump.confirm(rng.randrange(20, 60))
                sessions = bus.stats.sessions
                match fault:
                    case "cut":
                        await soon(proxy.cut(reset=rng.random() < 0.5))
                    case "dribble":
                        proxy.dribble(7, 0.001)
                        await pump.confirm(5)
                        await soon(proxy.cut())
                        proxy.dribble(0, 0)
                    case _:
                        proxy.drop_after(rng.randrange(1, 400), Direction(fault))
                await resumed(bus, sessions)
            await pump.confirm(20)
        assert not pump.failed
        await until(lambda: set(pump.confirmed) <= tally.seen, "everything arrives")
        check_order_and_loss(tally, pump.confirmed)
        lost_links = bus.stats.sessions - 1
        assert lost_links >= 6
        assert tally.duplicates <= WINDOW * lost_links
        assert max(tally.copies.values(), default=0) <= lost_links


@pytest.mark.parametrize("version", VERSIONS)
async def test_qos_2_arrives_once_within_a_session(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: str
) -> None:
    """With a session that outlives the connection, QoS 2 makes not a single copy."""
    rng = seeded("once")
    topic = unique()
    persistent = {"client_id": unique("client").replace("/", "-"), "clean_start": False}
    async with watched(mosquitto, version, topic, **persistent) as (proxy, bus, _, tally):
        async with pumping(bus, topic, qos=2) as pump:
            for direction in (Direction.UP, Direction.DOWN) * 3:
                await pump.confirm(rng.randrange(10, 40))
                sessions = bus.stats.sessions
                proxy.drop_after(rng.randrange(1, 300), direction)
                await resumed(bus, sessions)
        assert not pump.failed
        await until(lambda: set(pump.confirmed) <= tally.seen, "everything arrives")
        check_order_and_loss(tally, pump.confirmed)
        assert tally.copies == {}
        assert bus.native(MQTTBackend).connection.stats.resent > 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("qos", [1, 2])
async def test_broker_kills_lose_nothing_confirmed(
    mosquitto_own: MosquittoServer, unique: Callable[..., str], version: str, qos: int
) -> None:
    """The broker dies twice by SIGKILL in the traffic, without having stored a session."""
    topic = unique()
    async with watched(mosquitto_own, version, topic) as (proxy, bus, witness, tally):
        async with pumping(bus, topic, qos=qos) as pump:
            for _ in range(2):
                await pump.confirm(150)
                before = witness.stats.sessions
                proxy.refuse()
                await soon(mosquitto_own.kill())
                await offline(bus)
                await soon(mosquitto_own.start())
                await resumed(witness, before)
                proxy.refuse(False)
                await online(bus)
            await pump.confirm(50)
        assert not pump.failed
        await until(lambda: set(pump.confirmed) <= tally.seen, "everything arrives")
        check_order_and_loss(tally, pump.confirmed)
        assert tally.duplicates <= WINDOW * 2
        assert bus.stats.sessions == 3


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_faulty_subscriber_with_a_session_misses_nothing(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: str, qos: int
) -> None:
    """The subscriber's link breaks five times; copies are flagged, at QoS 2 there are none."""
    rng = seeded("subscriber")
    topic = unique()
    tally = Tally()
    async with (
        FaultProxy(mosquitto.host, mosquitto.port) as proxy,
        opened(
            f"mqtt://127.0.0.1:{proxy.port}",
            protocol=version,
            client_id=unique("reader").replace("/", "-"),
            clean_start=False,
            session_expiry=60,
            **SOON,
        ) as reader,
        opened(mosquitto.url, protocol=version, **SOON) as writer,
    ):
        async with reader.subscribe(topic, handler=tally, qos=qos, buffer=100_000):
            # Mosquitto 2.0 drops what exceeds a queue of 1000 for one client, and sends all
            # of the queue as soon as one message is acknowledged: its window of 20 is none.
            def hold(started: int) -> bool:
                return started - len(tally.seen) >= WINDOW

            async with pumping(writer, topic, qos=qos, at_once=5, hold=hold) as pump:
                for fault in ("down", "up", "cut", "down", "up"):
                    target = len(tally.arrived) + rng.randrange(20, 60)
                    await until(partial(tally.has, target), "arrivals")
                    sessions = reader.stats.sessions
                    if fault == "cut":
                        await soon(proxy.cut())
                    else:
                        proxy.drop_after(rng.randrange(1, 200), Direction(fault))
                    await resumed(reader, sessions)
            assert not pump.failed
            await until(lambda: set(pump.confirmed) <= tally.seen, "everything arrives")
            check_order_and_loss(tally, pump.confirmed)
            if qos == 2:
                assert tally.copies == {}
            else:
                assert tally.duplicates <= WINDOW * (reader.stats.sessions - 1)
                unflagged = set(tally.copies) - set(tally.flagged)
                assert not unflagged, f"copies without a flag: {sorted(unflagged)[:10]}"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_message_that_is_sent_again_says_so_on_the_wire(
    version: str,
) -> None:
    """DUP is set and the packet identifier kept when a PUBLISH is repeated."""
    from tests.mqtt.scripted import PUBLISH, scripted

    async with scripted() as broker:
        if version == "5":
            broker.connack = bytes.fromhex("20 03 00 00 00")
        broker.puback = False
        async with opened(broker.url, protocol=version, **SOON) as bus:
            publishing = [asyncio.create_task(bus.publish("a", b"%d" % n)) for n in range(3)]
            first = list(await broker.arrived(PUBLISH, 3))
            broker.puback = True
            broker.cut()
            await soon(asyncio.gather(*publishing))
            again = broker.of(PUBLISH)[3:]
            assert [each.packet_id for each in again] == [each.packet_id for each in first]
            assert [each.head & 0x08 for each in first] == [0, 0, 0]
            assert [each.head & 0x08 for each in again] == [8, 8, 8]


@pytest.mark.parametrize("version", VERSIONS)
async def test_qos_0_never_claims_what_was_not_sent(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: str
) -> None:
    """A stalled link, then a reset: who was told "sent" had their bytes taken by the kernel."""
    topic = unique()
    payload = b"x" * 200_000
    async with FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        async with opened(f"mqtt://127.0.0.1:{proxy.port}", protocol=version, **SOON) as bus:
            connection = bus.native(MQTTBackend).connection
            proxy.stall(True, Direction.UP)
            publishing = [
                asyncio.create_task(bus.publish(topic, payload, qos=0)) for _ in range(100)
            ]
            await until(lambda: connection.unsent > 1_000_000, "the link is full")
            sock = connection.socket
            assert sock is not None
            await soon(proxy.cut())
            results = await soon(asyncio.gather(*publishing, return_exceptions=True))
            accepted = sock.done
            told = [r for r in results if not isinstance(r, BaseException)]
            claimed = [r for r in told if r.confirmed_by is not ConfirmedBy.NOBODY]
            failures = [r for r in results if isinstance(r, PublishFailed | NotConnected)]
            assert len(told) + len(failures) == 100
            assert failures
            assert len(claimed) * len(payload) <= accepted
            outcomes = [r.outcome for r in failures if isinstance(r, PublishFailed)]
            # Only the one that was half way out may have arrived.
            assert outcomes.count(Outcome.UNKNOWN) <= 1
            assert outcomes.count(Outcome.NOT_SENT) >= 50


async def test_qos_0_without_a_session_is_refused_as_not_sent(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        async with opened(f"mqtt://127.0.0.1:{proxy.port}", **SOON) as bus:
            proxy.refuse()
            await soon(proxy.cut())
            await offline(bus)
            with pytest.raises(NotConnected):
                await soon(bus.publish(unique(), b"x", qos=0))


async def test_memory_loses_nothing_confirmed_over_resets(unique: Callable[..., str]) -> None:
    """The in-process broker cuts its sessions ten times; history is the witness."""
    rng = seeded("memory")
    name = unique().replace("/", "-")
    space = Space.named(name, history=100_000)
    try:
        async with (
            opened(f"memory://{name}", offline="buffer", **SOON) as bus,
            opened(f"memory://{name}", **SOON) as reader,
        ):
            tally = Tally()
            async with reader.subscribe("n", handler=tally, buffer=100_000):
                async with pumping(bus, "n") as pump:
                    for _ in range(10):
                        await pump.confirm(rng.randrange(20, 200))
                        sessions, other = bus.stats.sessions, reader.stats.sessions
                        space.disconnect_all()
                        await resumed(bus, sessions)
                        await resumed(reader, other)
                assert not pump.failed
                stored = [int(m.payload) async for m in reader.history("n")]
                assert stored == list(range(pump.started))
                # The hole in the reader's stream was filled from the history, in order.
                await until(lambda: tally.seen >= set(stored), "the hole is filled")
                assert tally.inversions == []
                assert tally.copies == {}
    finally:
        Space.forget(name)
