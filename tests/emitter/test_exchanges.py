"""Whole exchanges, captured from the Go broker, packet by packet."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pubsub_emitter import EmitterServer
from pubsub_emitter.server.broker import Matcher
from pubsub_mqtt.server.endpoint.packets import (
    Packet,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
)
from tests.emitter.support import Peer, broker, matches
from tests.emitter.vectors import KEYS, VECTORS

pytestmark = pytest.mark.usefixtures("no_leaks")

# Where this broker answers otherwise on purpose, and what it answers instead.
BANNED = {
    "packet": "PUBLISH",
    "topic": "emitter/error/",
    "qos": 0,
    "retain": False,
    "payload": {"req": 41, "status": 401, "message": VECTORS["errors"][1]["message"]},
}
DIFFERENT: dict[str, Any] = {
    # Go remembers for a minute that a key was not banned.
    "publish with banned key": [BANNED, {"packet": "PUBACK", "packet_id": 41}],
    # Go does not normalise UNSUBSCRIBE as it does SUBSCRIBE.
    "unsubscribe malformed": [{"packet": "UNSUBACK", "packet_id": 1, "return_codes": []}],
}


def shown(packet: Packet) -> dict[str, Any]:
    match packet:
        case Publish():
            text = packet.payload.decode()
            payload = json.loads(text) if packet.topic.startswith("emitter/") else text
            return {
                "packet": "PUBLISH",
                "topic": packet.topic,
                "qos": packet.qos,
                "retain": packet.retain,
                "payload": payload,
            }
        case PubAck(packet_id):
            return {"packet": "PUBACK", "packet_id": packet_id}
        case SubAck(packet_id, codes):
            return {"packet": "SUBACK", "packet_id": packet_id, "return_codes": list(codes)}
        case UnsubAck(packet_id):
            return {"packet": "UNSUBACK", "packet_id": packet_id, "return_codes": []}
        case _:
            return {"packet": type(packet).__name__}


async def exchange(peer: Peer, packet: Packet) -> list[dict[str, Any]]:
    await peer.wire.send(packet, PingReq())
    found: list[dict[str, Any]] = []
    for each in await peer.wire.until(PingResp()):
        if isinstance(each, PubRec):  # Go answers QoS 2 as if it were QoS 1
            await peer.wire.send(PubRel(each.packet_id))
            assert await peer.wire.next() == PubComp(each.packet_id)
            found.append({"packet": "PUBACK", "packet_id": each.packet_id})
        else:
            found.append(shown(each))
    return found


async def run_exchanges(server: EmitterServer) -> None:
    async with Peer.connected(server, "alice") as peer:
        for vector in VECTORS["exchanges"]:
            sent = vector["publish"]
            packet = Publish(
                sent["topic"],
                sent["payload"].encode(),
                sent["qos"],
                retain=sent["retain"],
                packet_id=sent["packet_id"] or 0,
            )
            found = await exchange(peer, packet)
            wanted = DIFFERENT.get(vector["name"], vector["sender_receives"])
            assert matches(wanted, found), f"{vector['name']}: {found}"


async def test_every_exchange_of_the_go_broker() -> None:
    async with broker() as server:
        await run_exchanges(server)


async def test_every_subscribe_exchange_of_the_go_broker() -> None:
    async with broker() as server:
        await run_exchanges(server)
        for vector in VECTORS["subscribe_exchanges"]:
            async with Peer.connected(server) as peer:
                topics = vector["topics"]
                mid = vector["packet_id"]
                packet: Packet
                if vector["packet"] == "SUBSCRIBE":
                    qos = vector["requested_qos"]
                    packet = Subscribe(mid, tuple((topic, qos) for topic in topics))
                else:
                    packet = Unsubscribe(mid, tuple(topics))
                found = await exchange(peer, packet)
                for each in found:
                    for name in ("qos", "retain"):
                        each.pop(name, None)
                wanted = DIFFERENT.get(vector["name"], vector["receives"])
                assert matches(wanted, found), f"{vector['name']}: {found}"


ACTIONS = {
    "bob subscribes demo/room/": [("+", "demo/room/")],
    "bob subscribes demo/room/ twice": [("+", "demo/room/"), ("+", "demo/room/")],
    "bob subscribes demo/room/sub/": [("+", "demo/room/sub/")],
    "bob subscribes demo/": [("+", "demo/")],
    "bob subscribes demo/+/": [("+", "demo/+/")],
    "bob subscribes then unsubscribes demo/room/": [("+", "demo/room/"), ("-", "demo/room/")],
    "bob subscribes then disconnects": [("+", "demo/room/"), ("x", "")],
}


@pytest.mark.parametrize("vector", VECTORS["presence_events"], ids=lambda v: v["action"])
async def test_every_presence_event_of_the_go_broker(vector: dict[str, Any]) -> None:
    key = KEYS["demo/#/ rwslp"]
    async with broker() as server, Peer.connected(server) as listener:
        channel = vector["listener_channel"]
        asked = await listener.request(
            "presence", key=key, channel=channel, status=False, changes=True
        )
        assert asked["status"] == 200
        async with Peer.connected(server, "bob") as bob:
            for action, topic in ACTIONS[vector["action"]]:
                if action == "+":
                    await bob.subscribe(f"{key}/{topic}")
                elif action == "-":
                    assert await bob.unsubscribe(f"{key}/{topic}") == 0
                else:
                    bob.wire.writer.write(b"\xe0\x00")
                    assert await bob.wire.closed() == []
            found = [json.loads(each.payload) for each in await listener.settled()]
        assert matches(vector["listener_receives"], found), found


@pytest.mark.parametrize("matcher", ["emitter", "mqtt"])
async def test_every_channel_reaches_the_subscriptions_the_go_broker_delivers_to(
    matcher: Matcher,
) -> None:
    rows = [row for row in VECTORS["match"] if row[0] == matcher]
    assert len(rows) > 100
    subscriptions = list(dict.fromkeys(row[1] for row in rows))
    channels = list(dict.fromkeys(row[2] for row in rows))
    async with broker(matcher=matcher) as server:
        wide = server.make_key("#/", "rw")
        shared = server.make_key("$share/#/", "rw")
        delivered: set[tuple[str, str]] = set()
        async with Peer.connected(server) as publisher:
            for subscription in subscriptions:
                async with Peer.connected(server) as peer:
                    key = shared if subscription.startswith("$share") else wide
                    await peer.subscribe(f"{key}/{subscription}")
                    for channel in channels:
                        await publisher.publish(f"{wide}/{channel}", b"")
                    for topic, _ in await peer.messages():
                        assert (subscription, topic) not in delivered
                        delivered.add((subscription, topic))
        for _, subscription, channel, wanted in rows:
            assert ((subscription, channel) in delivered) is wanted, (subscription, channel)
