"""The embedded broker under attack, as a process of its own, with its default settings.

Each test says what a working client sees meanwhile, what the broker's memory does, and that
nothing was left unhandled. Sizes of single packets, keepalive and malformed packets are tested
with the endpoint.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pubsub_mqtt.server.endpoint.packets import (
    ConnAck,
    Connect,
    Packet,
    PingReq,
    PubAck,
    Publish,
    PubRel,
    SubAck,
    Subscribe,
    Unsubscribe,
    WillMessage,
    encode,
)
from tests.emitter.vectors import KEYS, LICENSE, MASTER_KEY
from tests.mqtt.server.endpoint.attacks import (
    UPGRADE,
    damaged,
    half_connects,
    mutated_packets,
    stop_reading,
)
from tests.mqtt.server.endpoint.process import Process, allow_sockets, process
from tests.mqtt.server.endpoint.wire import Wire

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

DEMO = KEYS["demo/#/ rwslp"]

BROKER = """
from pubsub_emitter import EmitterServer
server = EmitterServer(license=sys.argv[2])
"""


@pytest.fixture(autouse=True)
def descriptors() -> None:
    allow_sockets()


async def round_trip(wire: Wire, number: int) -> None:
    """Publish to oneself, and wait until it is back and confirmed."""
    text = b"%d" % number
    await wire.send(Publish(f"{DEMO}/demo/self/", text, 1, packet_id=9))
    assert await wire.next() == Publish("demo/self/", text)
    assert await wire.next() == PubAck(9)


async def join(wire: Wire, channel: str) -> None:
    await wire.send(Subscribe(1, ((f"{DEMO}/{channel}", 0),)))
    assert await wire.next() == SubAck(1, (0,))


@pytest.fixture
async def working() -> AsyncIterator[tuple[Process, Wire]]:
    """A broker with a short deadline for handshakes, and a client that works."""
    async with (
        process(BROKER, LICENSE, handshake=2.0) as broker,
        Wire.connected(broker.port) as wire,
    ):
        await join(wire, "demo/self/")
        yield broker, wire


async def test_900_half_connects_disturb_nobody_and_are_gone_after_the_deadline(
    working: tuple[Process, Wire],
) -> None:
    stats = await half_connects(*working, Connect("good"), round_trip)
    assert (stats["late"], stats["errors"]) == (900, 0)


def _hostile(source: random.Random) -> bytes:
    """Packets that begin well, some of them damaged."""
    key = source.choice([DEMO, MASTER_KEY, *KEYS.values(), "", "x" * 32])
    channel = source.choice(["demo/a/", "demo/+/", "demo/#/", "demo", "/", "$share/g/demo/"])
    query = source.choice(["", "", "?ttl=60", "?last=5&from=1", "?ttl=-1", "?me=0", "?x", "?a=%"])
    request = source.choice(["keygen", "keyban", "link", "me", "presence", "history", "x"])
    body: dict[str, Any] = {
        "key": source.choice([key, None, 5, [], {}]),
        "channel": source.choice([channel, None, 1.5, ["a"], "\0"]),
        "type": source.choice(["rwslpex", "", None, 3]),
        "ttl": source.choice([0, -1, 1 << 80, "1", None]),
        "secret": MASTER_KEY,
        "target": source.choice([DEMO[::-1], "", None]),
        "banned": source.choice([True, False, None, "no"]),
        "name": source.choice(["a", "ab", "abc", "", None]),
        "subscribe": True,
        "status": source.choice([True, None, 1]),
        "changes": source.choice([True, False, None, "x"]),
        "startFromID": source.choice(["", "x", base64.b64encode(bytes(20)).decode()]),
    }
    payload = json.dumps(body).encode()
    qos = source.randrange(3)
    mid = source.randint(1, 9) if qos else 0
    packets: list[Packet] = [
        Publish(f"{key}/{channel}{query}", source.randbytes(20), qos, packet_id=mid),
        Publish(f"emitter/{request}/{query}", payload, qos, packet_id=mid),
        Publish(source.choice(["a", "ab", "", "#"]), b"by a link", qos, packet_id=mid),
        Subscribe(source.randint(1, 9), ((f"{key}/{channel}{query}", source.randrange(3)),)),
        Unsubscribe(source.randint(1, 9), (f"{key}/{channel}",)),
        PubRel(source.randint(1, 9)),
        PingReq(),
    ]
    return damaged(source, (encode(source.choice(packets)) for _ in range(6)))


def _greeting(source: random.Random, number: int) -> bytes:
    match number % 8:
        case 0:
            return source.randbytes(60)
        case 1:
            return b"GET /keygen HTTP/1.1\r\nHost: h\r\n" + source.randbytes(40) + b"\r\n\r\n"
        case 2:
            body = b"key=" + MASTER_KEY.encode() + b"&channel=" + source.randbytes(9)
            return (
                b"POST /keygen HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
        case 3:
            return UPGRADE + source.randbytes(60)
        case _:
            will = WillMessage(f"{DEMO}/demo/will/", b"x", retain=True)
            return encode(Connect("fuzz", "u", b"p", will=source.choice([None, will])))


async def test_random_and_mutated_packets_kill_and_leave_nothing(
    working: tuple[Process, Wire],
) -> None:
    source = random.Random(31)

    def packets(number: int) -> tuple[bytes, bytes]:
        return _greeting(source, number), _hostile(source)

    stats = await mutated_packets(*working, packets, round_trip, count=3000)
    assert stats["errors"] > 500
    assert (stats["links"], stats["clients"]) == (1, 1)


async def test_1000_clients_connect_at_once_and_take_little_memory() -> None:
    async with process(BROKER, LICENSE) as broker:
        before = broker.watched.memory()
        wires: list[Wire] = []

        async def connect(number: int) -> float:
            began = time.perf_counter()
            wire = await Wire.open(broker.port)
            wires.append(wire)
            await wire.send(Connect(f"client{number}"))
            assert await wire.next() == ConnAck(0)
            await join(wire, f"demo/{number}/")
            return time.perf_counter() - began

        async with asyncio.timeout(10):
            times = await asyncio.gather(*(connect(number) for number in range(1000)))
        each = (broker.watched.memory() - before) / 1000
        total = broker.watched.memory()
        print(f"{each:.0f} bytes for each client, {total / 1e6:.0f} MB together")
        print(f"the last one was connected after {max(times):.2f} s")
        assert each < 20_000
        assert total < 60_000_000
        assert (await broker.stats())["clients"] == 1000
        for wire in wires:
            wire.close()
        async with asyncio.timeout(10):
            while (await broker.stats())["links"]:
                await asyncio.sleep(0.01)


async def test_200_mb_for_a_reader_that_stopped_harm_neither_others_nor_memory() -> None:
    size, count = 62_000, 3_300
    async with process(BROKER, LICENSE) as broker:
        async with (
            Wire.connected(broker.port, Connect("stopped")) as stopped,
            Wire.connected(broker.port, Connect("fast")) as fast,
            Wire.connected(broker.port, Connect("aside")) as aside,
            Wire.connected(broker.port, Connect("publisher")) as publisher,
        ):
            await join(stopped, "demo/flood/")
            await join(fast, "demo/flood/")
            await join(aside, "demo/self/")
            stop_reading(stopped)
            before = broker.watched.memory()

            async def read() -> None:
                for number in range(count):
                    packet = await fast.next()
                    assert isinstance(packet, Publish)
                    assert int(packet.payload[:8]) == number

            async def publish() -> None:
                for number in range(count):
                    payload = b"%08d" % number + bytes(size - 8)
                    await publisher.send(Publish(f"{DEMO}/demo/flood/", payload))

            async with asyncio.timeout(40), asyncio.TaskGroup() as group:
                reading = group.create_task(read())
                group.create_task(publish())
                while not reading.done():
                    await round_trip(aside, 1)
                    await asyncio.sleep(0.02)
            growth = broker.watched.memory(peak=True) - before
            print(f"{growth / 1e6:.0f} MB more at most")
            assert growth < 64_000_000
            stats = await broker.stats()
            assert (stats["slow_readers"], stats["clients"]) == (1, 3)
            assert stats["messages_in"] >= count
