"""The in-flight window holds during replay, and every session gets a little further.

The peer is a socket of the test that counts what it has not answered. A broker with a receive
maximum ends the session of a client that exceeds it (MQTT 5.0 section 3.3.4), so a client that
replays everything it has at once never gets through.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from pubsub_mqtt.backend import MQTTBackend
from tests.mqtt.scripted import PUBLISH, PUBREL, Packet, ScriptedBroker, scripted

from .support import SOON, opened, resumed, seeded, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


class Counting:
    """Answers so many packets in each session, then cuts; knows what is under way."""

    def __init__(self, broker: ScriptedBroker, *, limit: int) -> None:
        self.broker = broker
        self.limit = limit
        self.answers = 0
        self.open: set[int] = set()
        self.most = 0
        self.exceeded = 0
        self.completed = 0
        self.connection = 0
        self.holding = True
        self.kept: list[Packet] = []
        broker.answer = self.answer

    def answer(self, packet: Packet) -> bytes | None:
        if packet.connection != self.connection:
            # What a new session brings counts from nothing, as the broker counts.
            self.connection = packet.connection
            self.open = set()
            self.kept.clear()
        if packet.type not in (PUBLISH, PUBREL):
            return None
        self.open.add(packet.packet_id)
        self._look()
        if self.holding:
            self.kept.append(packet)
            return b""
        return self._reply(packet)

    def has_open(self, count: int) -> bool:
        return len(self.open) >= count

    def release(self, answers: int) -> None:
        """Answer what was held back, and so many packets in all."""
        self.answers = answers
        self.holding = False
        kept, self.kept = self.kept, []
        for packet in kept:
            self.broker.send(self._reply(packet))

    def _reply(self, packet: Packet) -> bytes:
        if self.answers <= 0:
            return b""
        self.answers -= 1
        identity = packet.packet_id.to_bytes(2, "big")
        if packet.type == PUBLISH and packet.head & 6 == 4:
            return b"\x50\x02" + identity
        self.open.discard(packet.packet_id)
        self.completed += 1
        return (b"\x40\x02" if packet.type == PUBLISH else b"\x70\x02") + identity

    def _look(self) -> None:
        self.most = max(self.most, len(self.open))
        if len(self.open) > self.limit:
            self.exceeded += 1


def connack(version: str, *, maximum: int | None, present: bool) -> bytes:
    if version == "3.1.1":
        return bytes((0x20, 2, present, 0))
    properties = b"" if maximum is None else b"\x21" + maximum.to_bytes(2, "big")
    body = bytes((present, 0, len(properties))) + properties
    return bytes((0x20, len(body))) + body


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize(
    ("version", "qos", "own", "maximum", "limit"),
    [
        ("5", 1, 100, 7, 7),
        ("5", 2, 100, 7, 7),
        ("5", 1, 4, 50, 4),
        ("5", 2, 100, 1, 1),
        ("3.1.1", 1, 9, None, 9),
        ("3.1.1", 2, 9, None, 9),
        # An MQTT 3.1.1 broker cannot tell its window; Mosquitto breaks from 20 at QoS 2 on.
        ("3.1.1", 2, 100, None, 19),
    ],
)
async def test_replay_stays_within_the_window_and_gets_further(
    version: str, qos: int, own: int, maximum: int | None, limit: int, present: bool
) -> None:
    rng = seeded("window")
    count = 4 * limit + 3
    async with scripted() as broker:
        peer = Counting(broker, limit=limit)
        broker.connack = connack(version, maximum=maximum, present=False)
        options: dict[str, Any] = {"client_id": "me", "clean_start": False} if present else {}
        async with opened(
            broker.url, protocol=version, max_inflight=own, offline="buffer", **SOON, **options
        ) as bus:
            broker.connack = connack(version, maximum=maximum, present=present)
            publishing = [
                asyncio.create_task(bus.publish("a", b"%d" % n, qos=qos)) for n in range(count)
            ]
            while not all(task.done() for task in publishing):
                # First the whole window without an answer, then a few answers, then the end.
                left = sum(not task.done() for task in publishing)
                await until(partial(peer.has_open, min(limit, left)), "a full window")
                before = peer.completed
                # At QoS 2 two answers make one message: twice the window gives one at least.
                peer.release(rng.randrange(2 * limit, 3 * limit + 1))
                await until(
                    lambda: not peer.answers or all(task.done() for task in publishing), "answers"
                )
                assert peer.completed > before, "a session without any progress"
                await asyncio.sleep(0)
                if all(task.done() for task in publishing):
                    break
                sessions = bus.stats.sessions
                peer.holding = True
                broker.cut()
                await resumed(bus, sessions)
            await soon(asyncio.gather(*publishing))
            assert peer.exceeded == 0, f"{peer.most} under way, {limit} allowed"
            assert peer.most == limit
            assert bus.native(MQTTBackend).connection.unfinished == 0
