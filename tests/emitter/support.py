"""A client of an Emitter broker made of packets, and what tests of the broker share."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from pubsub_emitter import EmitterServer
from pubsub_mqtt.server.endpoint.packets import (
    ConnAck,
    Connect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
    WillMessage,
)
from tests.emitter.vectors import LICENSE
from tests.mqtt.server.endpoint.wire import Wire

__all__ = ["Peer", "broker", "matches"]

_PLACEHOLDERS = {
    "$KEY": r"[A-Za-z0-9_-]{32}",
    "$ID": r"[A-Z2-7]{26}",
    "$MID": r"[A-Za-z0-9+/]+=*",
}


def matches(wanted: Any, found: Any) -> bool:
    """Whether *found* is what a vector wants, placeholders filled in."""
    match wanted:
        case "$TIME":
            return isinstance(found, int) and found > 1_700_000_000
        case str() if "$" in wanted:
            pattern = re.escape(wanted)
            for name, text in _PLACEHOLDERS.items():
                pattern = pattern.replace(re.escape(name), text)
            return isinstance(found, str) and re.fullmatch(pattern, found) is not None
        case dict():
            return (
                isinstance(found, dict)
                and list(wanted) == list(found)
                and all(matches(wanted[name], found[name]) for name in wanted)
            )
        case list():
            return (
                isinstance(found, list)
                and len(wanted) == len(found)
                and all(itertools.starmap(matches, zip(wanted, found, strict=True)))
            )
        case _:
            return bool(wanted == found) and type(wanted) is type(found)


class Peer:
    """One connection to a broker; packet ids count by themselves."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._ids = itertools.count(1)

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(
        cls, server: EmitterServer, username: str | None = None, will: WillMessage | None = None
    ) -> AsyncIterator[Peer]:
        wire = await Wire.open(server.port)
        try:
            await wire.send(Connect("", username, will=will))
            assert await wire.next() == ConnAck(0)
            yield cls(wire)
        finally:
            wire.close()

    async def settled(self) -> list[Publish]:
        """Return what arrived up to now: the broker answers one connection in order."""
        await self.wire.send(PingReq())
        found = await self.wire.until(PingResp())
        assert all(isinstance(each, Publish) for each in found), found
        return [each for each in found if isinstance(each, Publish)]

    async def messages(self) -> list[tuple[str, bytes]]:
        """Return topic and payload of what arrived up to now."""
        found = await self.settled()
        assert all(each.qos == 0 and not each.retain and not each.duplicate for each in found)
        return [(each.topic, each.payload) for each in found]

    async def publish(
        self, topic: str, payload: bytes = b"x", *, retain: bool = False
    ) -> list[tuple[str, Any]]:
        """Publish at QoS 1; return what came before its acknowledgement."""
        mid = next(self._ids)
        await self.wire.send(Publish(topic, payload, 1, retain=retain, packet_id=mid))
        return _shown(await self.wire.until(PubAck(mid)))

    async def refusal(self, topic: str, payload: bytes = b"x") -> int:
        """Publish; return the status of the error that came, 0 for none."""
        return _status(await self.publish(topic, payload))

    async def request(self, name: str, /, **body: Any) -> Any:
        """Ask the broker something; return the answer, `req` checked and taken out."""
        mid = next(self._ids)
        topic = f"emitter/{name}/"
        data = json.dumps(body).encode()
        await self.wire.send(Publish(topic, data, 1, packet_id=mid))
        answers = [
            each
            for each in await self.wire.until(PubAck(mid))
            if isinstance(each, Publish) and each.topic == topic
        ]
        for each in answers:
            found = json.loads(each.payload)
            if found.pop("req", None) == mid:
                return found
        return None

    async def subscribe(self, *topics: str, qos: int = 0) -> list[tuple[str, Any]]:
        """Subscribe and expect success; return what was replayed."""
        codes, found = await self.try_subscribe(*topics, qos=qos)
        assert codes == tuple(qos for _ in topics), found
        return found

    async def try_subscribe(
        self, *topics: str, qos: int = 0
    ) -> tuple[tuple[int, ...], list[tuple[str, Any]]]:
        mid = next(self._ids)
        await self.wire.send(Subscribe(mid, tuple((topic, qos) for topic in topics)))
        before: list[Packet] = []
        while True:
            packet = await self.wire.next()
            if isinstance(packet, SubAck):
                assert packet.packet_id == mid
                return packet.codes, _shown(before)
            before.append(packet)

    async def unsubscribe(self, *topics: str) -> int:
        """Unsubscribe; return the status of the error that came, 0 for none."""
        mid = next(self._ids)
        await self.wire.send(Unsubscribe(mid, topics))
        return _status(_shown(await self.wire.until(UnsubAck(mid))))


def _shown(packets: list[Packet]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for each in packets:
        assert isinstance(each, Publish)
        assert (each.qos, each.retain, each.packet_id) == (0, False, 0)
        if each.topic.startswith("emitter/"):
            found.append((each.topic, json.loads(each.payload)))
        else:
            found.append((each.topic, each.payload))
    return found


def _status(found: list[tuple[str, Any]]) -> int:
    for topic, body in found:
        if topic == "emitter/error/":
            assert body["req"]
            status: int = body["status"]
            return status
    return 0


@contextlib.asynccontextmanager
async def broker(**options: Any) -> AsyncIterator[EmitterServer]:
    """A broker with the license of the vectors."""
    async with EmitterServer(license=LICENSE, **options) as server:
        yield server
