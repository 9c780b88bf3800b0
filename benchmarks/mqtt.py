"""Publishing and receiving through one Mosquitto: our bus, our client, and their peers.

Publisher and subscriber share one client in one process; the broker is a child process on
loopback. Throughput: the time from the first publish to the last message received, 100
bytes each; at quality of service 1 with 100 publishes under way. Latency: one message at a
time, from publish to receipt. The broker's queues are unbounded, so that it drops nothing;
what was lost is printed, and a row that lost messages has no rate.

Each figure is the best of several rounds with the clients taking turns (for latency: all
rounds together); the factor says how many times faster than paho on its own thread a row is.
A peer that is not installed is left out, and named; one that fails is shown as failed, with what
it raised, and takes no further turn.

    python benchmarks/mqtt.py [--quick] [--qos 0 1] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from pubsub_core import Message, connect
from pubsub_mqtt import MQTTClient
from pubsub_mqtt.server import MosquittoServer, find_mosquitto

PAYLOAD = b"x" * 100
TOPIC = "bench/topic"
WINDOW = 100
DEADLINE = 120.0

Publish = Callable[[], Awaitable[object]]
Receive = Callable[[], None]


@dataclass
class Counter:
    """Counts what arrived, and says when it is enough."""

    wanted: int = 0
    count: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def reset(self, wanted: int) -> None:
        """Begin to count to *wanted*."""
        self.wanted, self.count = wanted, 0
        self.done = asyncio.Event()

    def arrived(self) -> None:
        """Count one message."""
        self.count += 1
        if self.count == self.wanted:
            self.done.set()


Peer = Callable[[str, int, Counter], Any]
"""Connects, subscribes, and yields how to publish one message."""


def bus(protocol: str) -> Peer:
    @asynccontextmanager
    async def open_bus(url: str, qos: int, counter: Counter) -> AsyncIterator[Publish]:
        async def handle(message: Message[bytes]) -> None:
            counter.arrived()

        async with connect(url, qos=qos, buffer=1_000_000, protocol=protocol) as opened:
            await opened.subscribe(TOPIC, handler=handle)
            yield lambda: opened.publish(TOPIC, PAYLOAD)

    return open_bus


@asynccontextmanager
async def native(url: str, qos: int, counter: Counter) -> AsyncIterator[Publish]:
    client = MQTTClient()
    await client.connect(url)
    await client.subscribe([(TOPIC, qos)])

    async def receive() -> None:
        while await client.deliver_message() is not None:
            counter.arrived()

    receiving = asyncio.ensure_future(receive())
    try:
        yield lambda: client.publish(TOPIC, PAYLOAD, qos=qos)
    finally:
        receiving.cancel()
        await asyncio.wait([receiving])
        await client.disconnect()


@asynccontextmanager
async def paho(url: str, qos: int, counter: Counter) -> AsyncIterator[Publish]:
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion

    loop = asyncio.get_running_loop()
    client = Client(CallbackAPIVersion.VERSION2)
    client.max_inflight_messages_set(WINDOW)
    subscribed = threading.Event()
    waiting: dict[int, asyncio.Future[None]] = {}
    acknowledged: set[int] = set()

    def on_message(*_: object) -> None:
        counter.count += 1
        if counter.count == counter.wanted:
            loop.call_soon_threadsafe(counter.done.set)

    def on_publish(_client: object, _userdata: object, mid: int, *_: object) -> None:
        loop.call_soon_threadsafe(resolve, mid)

    def resolve(mid: int) -> None:
        future = waiting.pop(mid, None)
        if future is None:
            acknowledged.add(mid)
        else:
            future.set_result(None)

    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    if qos:
        client.on_publish = on_publish
    parts = urlsplit(url)
    client.connect(parts.hostname or "", parts.port or 1883)
    connected = threading.Event()
    client.on_connect = lambda *_: connected.set()
    client.loop_start()

    async def publish() -> None:
        mid = client.publish(TOPIC, PAYLOAD, qos).mid
        if qos and mid not in acknowledged:
            waiting[mid] = loop.create_future()
            await waiting[mid]
        acknowledged.discard(mid)

    try:
        if await asyncio.to_thread(connected.wait, 10):
            client.subscribe(TOPIC, qos)
        if not await asyncio.to_thread(subscribed.wait, 10):
            raise TimeoutError("not connected and subscribed within 10 s")
        yield publish
    finally:
        client.disconnect()
        await asyncio.to_thread(client.loop_stop)


@asynccontextmanager
async def gmqtt(url: str, qos: int, counter: Counter) -> AsyncIterator[Publish]:
    from gmqtt import Client, Subscription  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an extra without types

    subscribed = asyncio.Event()
    client = Client("")
    client.set_config({"reconnect_retries": 0})
    # Its publish cannot be awaited, and nothing else keeps it within the broker's receive
    # maximum, beyond which the broker hangs up. What came back makes room.
    room = asyncio.Semaphore(WINDOW)

    def on_message(*_: object) -> int:
        room.release()
        counter.arrived()
        return 0

    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    parts = urlsplit(url)
    await client.connect(parts.hostname or "", parts.port or 1883)

    async def publish() -> None:
        if qos:
            await room.acquire()
        client.publish(TOPIC, PAYLOAD, qos=qos)
        await asyncio.sleep(0)

    try:
        client.subscribe(Subscription(TOPIC, qos=qos))
        await asyncio.wait_for(subscribed.wait(), 10)
        yield publish
    finally:
        await client.disconnect()


@asynccontextmanager
async def aiomqtt(url: str, qos: int, counter: Counter) -> AsyncIterator[Publish]:
    from aiomqtt import Client

    parts = urlsplit(url)
    async with Client(parts.hostname or "", parts.port or 1883) as client:
        client.pending_calls_threshold = 10 * WINDOW
        await client.subscribe(TOPIC, qos)

        async def receive() -> None:
            async for _ in client.messages:
                counter.arrived()

        receiving = asyncio.ensure_future(receive())
        try:
            yield lambda: client.publish(TOPIC, PAYLOAD, qos)
        finally:
            receiving.cancel()
            await asyncio.wait([receiving])


PEERS: dict[str, tuple[Peer, str]] = {
    "paho, own thread": (paho, "paho"),
    "bus, MQTT 3.1.1": (bus("3.1.1"), "pubsub_mqtt"),
    "bus, MQTT 5": (bus("5"), "pubsub_mqtt"),
    "pubsub_mqtt.MQTTClient": (native, "pubsub_mqtt"),
    "gmqtt": (gmqtt, "gmqtt"),
    "aiomqtt": (aiomqtt, "aiomqtt"),
}


async def throughput(
    peer: Peer, url: str, qos: int, count: int, profile: cProfile.Profile | None = None
) -> tuple[float, int]:
    """Return seconds, and how many messages never came."""
    counter = Counter()
    async with peer(url, qos, counter) as publish:
        counter.reset(count)
        if profile is not None:
            profile.enable()
        began = time.perf_counter()
        if qos == 0:
            for _ in range(count):
                await publish()
        else:
            left = iter(range(count))

            async def worker() -> None:
                for _ in left:
                    await publish()

            try:
                async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
                    for _ in range(WINDOW):
                        group.create_task(worker())
            except TimeoutError:
                return float("inf"), count - counter.count
        try:
            await asyncio.wait_for(counter.done.wait(), DEADLINE)
        except TimeoutError:
            return float("inf"), count - counter.count
        finally:
            if profile is not None:
                profile.disable()
        return time.perf_counter() - began, 0


async def latency(peer: Peer, url: str, qos: int, count: int) -> list[float]:
    """Return seconds from publish to receipt, one message at a time."""
    counter = Counter()
    times: list[float] = []
    async with peer(url, qos, counter) as publish:
        for _ in range(count):
            counter.reset(1)
            began = time.perf_counter()
            publishing = asyncio.ensure_future(publish())
            await asyncio.wait_for(counter.done.wait(), 10)
            times.append(time.perf_counter() - began)
            await publishing
    return times


async def measure(qos_levels: list[int], count: int, rounds: int, console: Console) -> None:
    peers = {name: peer for name, (peer, module) in PEERS.items() if find_spec(module)}
    for name, (_, module) in PEERS.items():
        if not find_spec(module):
            console.print(f"left out: {name} (install {module})")
    console.print(
        f"{len(peers)} clients at one Mosquitto: messages/s from the first publish to the last "
        "received, ms from publish to receipt"
    )
    server = MosquittoServer(extra_config="max_queued_messages 0\nmax_inflight_messages 1000\n")
    await server.start()
    try:
        for qos in qos_levels:
            await measure_level(server.url, qos, peers, count, rounds, console)
    finally:
        await server.stop()


async def measure_level(
    url: str, qos: int, peers: dict[str, Peer], count: int, rounds: int, console: Console
) -> None:
    best = dict.fromkeys(peers, float("inf"))
    lost = dict.fromkeys(peers, 0)
    times: dict[str, list[float]] = {name: [] for name in peers}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, peer in peers.items():
            if name in failed:
                continue
            try:
                seconds, missing = await throughput(peer, url, qos, count)
                best[name] = min(best[name], seconds)
                lost[name] += missing
                times[name] += await latency(peer, url, qos, max(100, count // 20))
            except Exception as error:  # whatever a peer raises, the others have their turns
                failed[name] = reason(error)
    table = Table(title=f"through Mosquitto, QoS {qos}, {count:,} messages of 100 bytes")
    for column in ("", "messages/s", "of paho", "p50 ms", "p95 ms", "p99 ms", "lost"):
        table.add_column(column, justify="left" if not column else "right")
    reference = count / best["paho, own thread"] if "paho, own thread" not in failed else 0.0
    for name in peers:
        if name in failed:
            table.add_row(name, "failed")
            continue
        rate = count / best[name]
        cuts = statistics.quantiles(times[name], n=100)
        table.add_row(
            name,
            f"{rate:,.0f}" if rate else "none",
            f"{rate / reference:.2f}" if reference else "",
            *(f"{1000 * cuts[cut - 1]:.2f}" for cut in (50, 95, 99)),
            str(lost[name]),
        )
    console.print(table)
    for name, why in failed.items():
        console.print(f"failed: {name}: {why}", markup=False)


def reason(error: BaseException) -> str:
    """Return the type and the text of the first error that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


async def profile(qos_levels: list[int], count: int) -> None:
    server = MosquittoServer(extra_config="max_queued_messages 0\nmax_inflight_messages 1000\n")
    await server.start()
    try:
        for qos in qos_levels:
            profiler = cProfile.Profile()
            await throughput(bus("3.1.1"), server.url, qos, count, profiler)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    finally:
        await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    parser.add_argument("--qos", type=int, nargs="+", default=[0, 1], choices=[0, 1, 2])
    parser.add_argument("--profile", action="store_true", help="where the bus spends its time")
    arguments = parser.parse_args()
    count, rounds = (3_000, 2) if arguments.quick else (20_000, 5)
    if find_mosquitto() is None:
        parser.exit(1, "nothing to measure: Mosquitto is missing (apt-get install mosquitto)\n")
    if arguments.profile:
        asyncio.run(profile(arguments.qos, count))
    else:
        asyncio.run(measure(arguments.qos, count, rounds, Console()))


if __name__ == "__main__":
    main()
