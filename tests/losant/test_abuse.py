"""The embedded broker under attack, as a process of its own.

Each test says what a working device sees meanwhile, what the broker's memory does, and that
nothing was left unhandled.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pubsub_mqtt.server.endpoint.packets import (
    ConnAck,
    Connect,
    Packet,
    PingReq,
    Publish,
    PubRel,
    SubAck,
    Subscribe,
    Unsubscribe,
    WillMessage,
    encode,
)
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

BROKER = """
from pubsub_losant import AccessKey, DeviceSpec, LosantServer
devices = {name: DeviceSpec() for name in ("good", "enemy", "stopped")}
server = LosantServer(devices=devices, keys=[AccessKey("k", "s", filter_type="all")])

def more(server):
    return {"rejections": len(server.rejections), "states": len(server.states("good"))}
"""


def sign_in(device_id: str, will: WillMessage | None = None) -> Connect:
    return Connect(device_id, "k", b"s", 60, will=will)


@pytest.fixture(autouse=True)
def descriptors() -> None:
    allow_sockets()


@pytest.fixture
async def working() -> AsyncIterator[tuple[Process, Wire]]:
    """A broker with a short deadline for handshakes, and a device that works."""
    async with process(BROKER, handshake=2.0) as broker:
        async with Wire.connected(broker.port, sign_in("good")) as wire:
            await wire.send(Subscribe(1, (("losant/good/state", 0),)))
            assert await wire.next() == SubAck(1, (0,))
            yield broker, wire


async def round_trip(wire: Wire, number: int) -> None:
    """Send a state, and wait until it comes back."""
    payload = b'{"data":{"n":%d}}' % number
    await wire.send(Publish("losant/good/state", payload))
    assert await wire.next() == Publish("losant/good/state", payload)


async def test_900_half_connects_disturb_nobody_and_are_gone_after_the_deadline(
    working: tuple[Process, Wire],
) -> None:
    stats = await half_connects(*working, sign_in("enemy"), round_trip)
    assert (stats["late"], stats["errors"]) == (900, 0)
    assert stats["rejections"] == 900


async def test_a_large_packet_is_refused_on_its_header_before_and_after_connect(
    working: tuple[Process, Wire],
) -> None:
    broker, wire = working
    before = broker.watched.memory()
    for first in (b"", encode(sign_in("enemy"))):
        for head in (b"\x10", b"\x30", b"\x82"):
            enemy = await Wire.open(broker.port)
            await enemy.send(first)
            if first:
                assert await enemy.next() == ConnAck(0)
            await enemy.send(head + b"\xff\xff\xff\x7f")
            assert await enemy.closed() == []
            enemy.close()
    assert broker.watched.memory() - before < 2_000_000
    await round_trip(wire, 1)


def _hostile(source: random.Random) -> bytes:
    """Packets that begin well, some of them damaged."""
    topic = source.choice([
        "losant/enemy/state", "losant/good/state", "losant/enemy/command", "my/topic", "losant",
        "$SYS/x", "", "#", "losant/enemy/fromAgent/hello", "losant/\0/state", "/" * 500,
    ])  # fmt: skip
    value: Any = source.choice(
        [1, "x" * 300, None, [], {}, True, -1e300, {"$date": "2020"}, 1 << 70]
    )
    payload = source.choice([
        json.dumps({"data": {"a": value, "b": 1}, "time": value}).encode(),
        json.dumps([{"data": {"a": value}}, value, {"data": value, "meta": value}]).encode(),
        source.randbytes(30), b"[" * 2000, b"", b'{"data":{"a":' * 50,
    ])  # fmt: skip
    qos = source.randrange(3)
    mid = source.randint(1, 9) if qos else 0
    text = source.choice([topic, "losant/+/state", "my/+/#", "losant/enemy/command", "+/+"])
    packets: list[Packet] = [
        Publish("losant/enemy/state", payload, source.randrange(2), packet_id=5),
        Publish(topic, payload, qos, packet_id=mid),
        Subscribe(source.randint(1, 9), ((text, source.randrange(3)),)),
        Unsubscribe(source.randint(1, 9), (text,)),
        PubRel(source.randint(1, 9)),
        PingReq(),
    ]
    chosen = [source.choice(packets) for _ in range(6)]
    return damaged(
        source,
        (
            encode(Publish(each.topic, each.payload))
            if isinstance(each, Publish) and not each.qos
            else encode(each)
            for each in chosen
        ),
    )


def _greeting(source: random.Random, number: int) -> bytes:
    match number % 8:
        case 0:
            return source.randbytes(60)
        case 1:
            return b"GET / HTTP/1.1\r\nHost: h\r\n" + source.randbytes(40) + b"\r\n\r\n"
        case 2:
            return encode(Connect("enemy", "k", source.randbytes(8)))
        case 3:
            return UPGRADE + source.randbytes(60)
        case _:
            will = WillMessage("losant/enemy/state", source.choice([b"x", b'{"data":{"w":1}}']))
            return encode(sign_in("enemy", source.choice([None, will])))


async def test_random_and_mutated_packets_kill_and_leave_nothing(
    working: tuple[Process, Wire],
) -> None:
    source = random.Random(41)

    def packets(number: int) -> tuple[bytes, bytes]:
        return _greeting(source, number), _hostile(source)

    stats = await mutated_packets(*working, packets, round_trip, count=1200)
    assert stats["errors"] > 150
    assert stats["clients"] == 1
    assert stats["rejections"] <= 1000


async def test_a_reader_that_stopped_costs_neither_memory_nor_the_others(
    working: tuple[Process, Wire],
) -> None:
    broker, wire = working
    async with Wire.connected(broker.port, sign_in("stopped")) as stopped:
        await stopped.send(Subscribe(1, (("my/flood", 0),)))
        assert await stopped.next() == SubAck(1, (0,))
        stop_reading(stopped)
        before = broker.watched.memory()
        async with Wire.connected(broker.port, sign_in("enemy")) as enemy:
            for number in range(400):
                await enemy.send(Publish("my/flood", bytes(200_000)))
                if number % 40 == 0:
                    await round_trip(wire, number)
        growth = broker.watched.memory(peak=True) - before
        print(f"{growth / 1e6:.0f} MB more at most")
        assert growth < 40_000_000
        stats = await broker.stats()
        assert stats["dropped"] > 100
        assert stats["slow_readers"] == 0
    await broker.quiet()
