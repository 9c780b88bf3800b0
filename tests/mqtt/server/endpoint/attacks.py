"""Attacks on a broker over MQTT that are the same for every dialect.

Each one leaves its figures in what it returns or asserts; the tests of a backend say what a
working client is, and which packets hurt there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pubsub_mqtt.server.endpoint.packets import (
    Connect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    encode,
)
from tests.mqtt.server.endpoint.process import Process
from tests.mqtt.server.endpoint.wire import Wire

__all__ = [
    "UPGRADE",
    "acknowledged_until_killed",
    "damaged",
    "half_connects",
    "mutated_packets",
    "stop_reading",
]

RoundTrip = Callable[[Wire, int], Awaitable[None]]
"""Has a working client publish a number to itself, and see it."""

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def damaged(source: random.Random, packets: Iterable[bytes]) -> bytes:
    """Join packets, and change a few bytes of every other result."""
    data = bytearray(b"".join(packets))
    if source.random() < 0.5:
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
    return bytes(data)


def stop_reading(wire: Wire) -> None:
    """Take nothing more from the system: a reader that hangs."""
    stream: Any = wire.reader  # asyncio has no public way
    stream._transport.pause_reading()


async def half_connects(
    broker: Process, wire: Wire, connect: Connect, round_trip: RoundTrip
) -> dict[str, int]:
    """Begin 900 connections that never go on; return the counters when the broker ended them.

    *wire* is of a client that works, and others can connect meanwhile. What the broker does for
    such a newcomer is measured as its own work, since the machine may be busy with other things.
    """
    before = broker.watched.memory()
    half = encode(connect)[:-1]
    halves: list[Wire] = []
    try:
        for _ in range(900):
            halves.append(await Wire.open(broker.port))
            halves[-1].writer.write(half)
        work: list[float] = []
        for number in range(5):
            began = broker.watched.worked()
            async with Wire.connected(broker.port, connect):
                await round_trip(wire, number)
            work.append(broker.watched.worked() - began)
        print(f"a newcomer costs {min(work) * 1000:.0f} ms of work")
        assert min(work) < 0.1
        assert broker.watched.memory() - before < 30_000_000

        async def meanwhile() -> None:
            while True:
                await round_trip(wire, 7)
                await asyncio.sleep(0.01)

        working = asyncio.create_task(meanwhile())
        try:
            async with asyncio.timeout(30):
                for each in halves:
                    assert await each.closed() == []
            assert not working.done()
        finally:
            working.cancel()
            await asyncio.wait([working])
    finally:
        for each in halves:
            each.close()
    return await broker.quiet()


async def mutated_packets(
    broker: Process,
    wire: Wire,
    packets: Callable[[int], tuple[bytes, bytes]],
    round_trip: RoundTrip,
    *,
    count: int,
) -> dict[str, int]:
    """Send a greeting and then more to the broker, over and over; return its counters.

    Args:
        packets: Makes both, of the number of the attempt.
        count: Attempts that are measured, after as many as are needed to warm up.
    """

    async def attack(count: int) -> None:
        for number in range(count):
            enemy = await Wire.open(broker.port)
            for data in packets(number):
                enemy.writer.write(data)
            with contextlib.suppress(OSError):  # it was closed already
                enemy.writer.write_eof()
            # It is answered or not; what matters is that the broker closes it.
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(10):
                    while await enemy.reader.read(65536):
                        pass
            enemy.close()
            if number % 100 == 0:
                await round_trip(wire, number)

    await attack(count // 5)  # what is imported and cached on first use belongs to no attack
    before = broker.watched.memory()
    await attack(count)
    growth = broker.watched.memory() - before
    print(f"{growth / 1e6:.1f} MB more")
    assert growth < 20_000_000
    await wire.send(PingReq())
    assert await wire.next() == PingResp()
    return await broker.quiet()


async def acknowledged_until_killed(
    pid: int, wire: Wire, messages: Callable[[int], tuple[str, bytes]]
) -> int:
    """Publish 2,000 messages, kill the broker in the middle; return the last it acknowledged.

    Args:
        pid: The broker's process.
        messages: Makes topic and payload of a number from 1.
    """
    sent: list[Packet] = [
        Publish(*messages(number), 1, packet_id=number) for number in range(1, 2001)
    ]
    await wire.send(*sent)
    acknowledged = 0
    while acknowledged < 1000:
        packet = await wire.next()
        assert isinstance(packet, PubAck)
        acknowledged = packet.packet_id
    os.kill(pid, signal.SIGKILL)
    for late in await wire.closed():
        assert isinstance(late, PubAck)
        acknowledged = late.packet_id
    return acknowledged
