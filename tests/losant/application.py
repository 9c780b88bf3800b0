"""The application of the access vectors, a broker that has it, and a device made of packets."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any, Final

from pubsub_losant import AccessKey, DeviceSpec, LosantServer
from pubsub_losant.server.access import Registry
from pubsub_mqtt.server.endpoint.packets import (
    ConnAck,
    Connect,
    Packet,
    PingReq,
    PingResp,
    Publish,
    SubAck,
    Subscribe,
    WillMessage,
)
from tests.losant.vectors import VECTORS
from tests.mqtt.server.endpoint.wire import Wire

A: Final = "a" * 24
B: Final = "b" * 24
GATEWAY: Final = "d0" * 12
PERIPHERAL: Final = "c1" * 12
OTHER_PERIPHERAL: Final = "c2" * 12
FLOATING: Final = "f1" * 12
EDGE: Final = "e1" * 12

DEVICES: Final = {
    name: DeviceSpec(spec["class"], spec.get("gatewayId"))
    for name, spec in VECTORS["dev_broker_acl"]["devices"].items()
}
KEYS: Final = (
    AccessKey("kA", "secret of kA"),
    AccessKey("kR", "secret of kR", device_ids=[A]),
    AccessKey("kAll", "secret of kAll", filter_type="all"),
    AccessKey(
        "kW",
        "secret of kW",
        filter_type="whitelist",
        pub_topics=["alerts/+"],
        sub_topics=["alerts/#"],
    ),
    AccessKey(
        "kB",
        "secret of kB",
        filter_type="blacklist",
        pub_topics=["private/#"],
        sub_topics=["private/#"],
    ),
)


def registry() -> Registry:
    return Registry(DEVICES, KEYS)


def secret(key: str) -> bytes:
    return f"secret of {key}".encode()


def state(device_id: str = A) -> str:
    return f"losant/{device_id}/state"


def command(device_id: str = A) -> str:
    return f"losant/{device_id}/command"


def sign_in(
    device_id: str = A, key: str = "kA", *, keepalive: int = 15, will: WillMessage | None = None
) -> Connect:
    """Return a CONNECT with the secret of *key*."""
    return Connect(device_id, key, secret(key), keepalive, will=will)


@contextlib.asynccontextmanager
async def broker(**options: Any) -> AsyncIterator[LosantServer]:
    """A broker with the application of the vectors."""
    async with LosantServer(**{"devices": DEVICES, "keys": KEYS, **options}) as server:
        yield server


class Peer:
    """One connection of a device."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._ids = itertools.count(1)

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(
        cls, server: LosantServer, connect: Connect | None = None, *, port: int = 0
    ) -> AsyncIterator[Peer]:
        async with Wire.connected(port or server.port, connect or sign_in()) as wire:
            yield cls(wire)

    async def publish(self, topic: str, payload: Any = b"x", *, qos: int = 0) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        mid = next(self._ids) if qos else 0
        await self.wire.send(Publish(topic, data, qos, packet_id=mid))

    async def subscribe(self, *filters: str, qos: int = 0) -> tuple[int, ...]:
        """Return the codes; nothing else may arrive meanwhile."""
        mid = next(self._ids)
        await self.wire.send(Subscribe(mid, tuple((text, qos) for text in filters)))
        found = await self.wire.next()
        assert isinstance(found, SubAck)
        assert found.packet_id == mid
        return found.codes

    async def settled(self) -> list[Packet]:
        """Return what arrived up to now: the broker answers one connection in order."""
        await self.wire.send(PingReq())
        return await self.wire.until(PingResp())

    async def messages(self) -> list[tuple[str, bytes]]:
        """Return topic and payload of what arrived up to now."""
        found: list[tuple[str, bytes]] = []
        for each in await self.settled():
            assert isinstance(each, Publish)
            assert (each.qos, each.retain, each.duplicate) == (0, False, False)
            found.append((each.topic, each.payload))
        return found


async def refused(server: LosantServer, connect: Connect) -> int | None:
    """Connect in vain; return the return code, None when the broker just closed."""
    wire = await Wire.open(server.port)
    try:
        await wire.send(connect)
        found = await wire.closed()
        if not found:
            return None
        (answer,) = found
        assert isinstance(answer, ConnAck)
        assert answer.code
        return answer.code
    finally:
        wire.close()


async def ended(server: LosantServer, device_id: str = A) -> dict[str, Any]:
    """Return the newest entry of the connection log, once the device is gone."""
    await server.wait_disconnected(device_id)
    entry = server.connection_log(device_id)[0]
    assert entry["connected"] == 0
    return entry
