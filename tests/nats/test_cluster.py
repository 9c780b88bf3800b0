"""A cluster of three, and a node that is killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import nats
import nats.errors
import pytest

from pubsub_core import Bus, connect
from pubsub_core.errors import PubSubError
from pubsub_nats.server import NatsServer
from tests.servers import eventually

from .world import backend

# Three servers a test, on two processors.
pytestmark = pytest.mark.slow

TOPICS = 10


@pytest.fixture
async def cluster() -> AsyncIterator[NatsServer]:
    async with NatsServer(cluster=3) as server:
        yield server


def at(server: NatsServer, node: int, **options: Any) -> Bus:
    """Return a bus whose first address is that of *node*; it knows the others as well."""
    urls = [url.removeprefix("nats://") for url in server.urls]
    return connect(
        server.urls[node],
        servers=[each for number, each in enumerate(urls) if number != node],
        stream="S",
        prefix="s",
        create=True,
        replicas=3,
        reconnect_first=0.01,
        **options,
    )


async def leader_of(server: NatsServer) -> int:
    client = await nats.connect(server.urls[0])
    try:
        info = await client.jetstream(timeout=30).stream_info("S")
        assert info.cluster is not None
        assert info.cluster.leader is not None
        return int(info.cluster.leader.removeprefix("n")) - 1
    finally:
        await client.close()


async def stored(server: NatsServer) -> list[tuple[str, int]]:
    """Return what the stream holds, read by a client that we did not write."""
    alive = next(url for url, pid in zip(server.urls, server.pids, strict=True) if pid)
    client = await nats.connect(alive)
    try:
        # A request that falls into the election of the cluster's leader is never answered, and
        # nats-py does not ask again.
        for _ in range(20):
            with contextlib.suppress(nats.errors.TimeoutError):
                return await _read(client.jetstream(timeout=5))
        return await _read(client.jetstream(timeout=30))
    finally:
        await client.close()


async def _read(stream: Any) -> list[tuple[str, int]]:
    reader = await stream.subscribe("s.>", ordered_consumer=True)
    info = await stream.stream_info("S")
    found: list[tuple[str, int]] = []
    for _ in range(info.state.messages):
        message = await reader.next_msg(timeout=20)
        found.append((message.subject, int(message.data)))
    return found


async def killed_under_load(
    cluster: NatsServer, where: str, count: int
) -> tuple[dict[int, str | None], list[PubSubError], float]:
    """Publish *count* messages, kill the stream's leader at a third; return what became of them."""
    async with at(cluster, 0):
        pass
    leader = await leader_of(cluster)
    node = leader if where == "leader" else (leader + 1) % 3
    confirmed: dict[int, str | None] = {}
    failures: list[PubSubError] = []
    pause = 0.0
    async with at(cluster, node, offline="buffer") as bus:
        room = asyncio.Semaphore(200)
        last = time.monotonic()

        async def one(number: int) -> None:
            nonlocal last, pause
            try:
                receipt = await bus.publish(f"t/{number % TOPICS}", b"%d" % number)
            except PubSubError as error:
                failures.append(error)
            else:
                confirmed[number] = receipt.id
                now = time.monotonic()
                last, pause = now, max(pause, now - last)
            finally:
                room.release()

        tasks: set[asyncio.Task[None]] = set()
        for number in range(count):
            await room.acquire()
            tasks.add(asyncio.create_task(one(number)))
            if number == count // 3:
                await cluster.kill(leader)
        await asyncio.wait(tasks)
    return confirmed, failures, pause


@pytest.mark.timeout(180)
@pytest.mark.parametrize("run", range(5))
@pytest.mark.parametrize("where", ["leader", "follower"])
async def test_the_leader_is_killed_under_6000_publishes(
    cluster: NatsServer, where: str, run: int, record_property: Any
) -> None:
    confirmed, failures, pause = await killed_under_load(cluster, where, 6000)
    print(f"client on the {where}: longest pause between two receipts {pause:.1f} s")
    record_property("pause", pause)
    assert not failures, f"{len(failures)}: {failures[0]!r}"
    assert len(confirmed) == 6000
    found = await stored(cluster)
    numbers = [number for _, number in found]
    assert sorted(numbers) == list(range(6000)), "lost, or stored twice"
    for topic in range(TOPICS):
        own = [number for subject, number in found if subject == f"s.t.{topic}"]
        assert own == sorted(own), "a topic lost its order"


async def test_what_is_published_during_an_election_is_stored_once(cluster: NatsServer) -> None:
    confirmed, failures, _ = await killed_under_load(cluster, "follower", 300)
    assert not failures
    assert len(confirmed) == 300
    found = await stored(cluster)
    assert sorted(number for _, number in found) == list(range(300))


async def test_a_subscriber_goes_on_when_a_node_is_killed(cluster: NatsServer) -> None:
    async with at(cluster, 0), at(cluster, 1, offline="buffer") as publisher:
        leader = await leader_of(cluster)
        async with (
            at(cluster, leader) as bus,
            bus.subscribe("#", buffer=10_000) as messages,
            bus.subscribe("#", group="g", ack="manual") as jobs,
        ):
            for number in range(100):
                await publisher.publish("a", b"%d" % number)
            await eventually(lambda: messages.stats.received == 100)
            await cluster.kill(leader)
            for number in range(100, 200):
                await publisher.publish("a", b"%d" % number)
            await eventually(lambda: messages.stats.received >= 200, within=40)
            got = [int((await messages.get(timeout=5)).payload) for _ in range(200)]
            assert got == list(range(200)), "a hole, or a message twice"
            done: set[int] = set()
            while len(done) < 200:
                message = await jobs.get(timeout=40)
                done.add(int(message.payload))
                await message.ack()
            assert backend(bus)._server is not None


async def test_without_a_majority_publishes_end_and_core_mode_goes_on(
    cluster: NatsServer,
) -> None:
    async with at(cluster, 0, offline="buffer") as bus, connect(cluster.urls[0]) as core:
        async with core.subscribe("plain") as messages:
            await bus.publish("a", b"1")
            await cluster.kill(1)
            await cluster.kill(2)
            with pytest.raises(PubSubError) as caught:
                await bus.publish("a", b"2", timeout=2)
            assert isinstance(caught.value, TimeoutError)
            await core.publish("plain", b"x")
            assert (await messages.get(timeout=5)).payload == b"x"
            await cluster.start(1)
            await cluster.start(2)
            await bus.publish("a", b"3", timeout=40)
        history = [int(m.payload) async for m in bus.history("a", last=10)]
        assert history[0] == 1
        assert history[-1] == 3


async def test_a_node_that_says_goodbye_costs_nothing(cluster: NatsServer) -> None:
    async with at(cluster, 0, offline="buffer") as bus, at(cluster, 1) as reader:
        async with reader.subscribe("a", buffer=10_000) as messages:
            await bus.publish("a", b"0")
            pid = cluster.pids[0]
            assert pid is not None
            os.kill(pid, signal.SIGUSR2)
            sent = 1
            while bus.stats.sessions < 2:
                await bus.publish("a", b"%d" % sent)
                sent += 1
            got = [int((await messages.get(timeout=20)).payload) for _ in range(sent)]
            assert got == list(range(sent))
