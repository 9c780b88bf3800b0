"""Other people's clients and brokers: paho, aiomqtt and amqtt, against ours.

Mosquitto stands between the clients. Each pair exchanges every quality of service, retained
and empty messages, wildcards and wills in both directions.
"""

from __future__ import annotations

import abc
import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from pubsub_mqtt.client import QOS_1, QOS_2, MQTTClient
from pubsub_mqtt.server import AmqttServer, MosquittoServer
from tests.servers import eventually

# Three clients and two brokers take their time; what they are asked is asked of our own too.
pytestmark = pytest.mark.slow

Unique = Callable[[str], str]
Received = tuple[str, bytes, int, bool]


class Peer(abc.ABC):
    """Somebody else's client: topic, payload, quality of service and retain flag."""

    def __init__(self) -> None:
        self.received: list[Received] = []

    @abc.abstractmethod
    async def subscribe(self, name: str, qos: int) -> None: ...

    @abc.abstractmethod
    async def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None: ...

    async def wait(self, count: int) -> list[Received]:
        await eventually(lambda: len(self.received) >= count, within=10)
        return self.received


class PahoPeer(Peer):
    def __init__(self, protocol: MQTTProtocolVersion) -> None:
        super().__init__()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        self._subscribed: list[int] = []
        self._published: list[int] = []
        self.client.on_message = lambda _c, _u, m: self.received.append(
            (m.topic, bytes(m.payload), m.qos, m.retain)
        )
        self.client.on_subscribe = lambda _c, _u, mid, _r, _p: self._subscribed.append(mid or 0)
        self.client.on_publish = lambda _c, _u, mid, _r, _p: self._published.append(mid)

    async def subscribe(self, name: str, qos: int) -> None:
        _, mid = self.client.subscribe(name, qos)
        await eventually(lambda: mid in self._subscribed)

    async def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        info = self.client.publish(topic, payload, qos, retain)
        await eventually(lambda: info.mid in self._published)


@asynccontextmanager
async def paho_peer(port: int, protocol: MQTTProtocolVersion) -> AsyncIterator[Peer]:
    peer = PahoPeer(protocol)
    await asyncio.to_thread(peer.client.connect, "127.0.0.1", port)
    peer.client.loop_start()
    try:
        await eventually(peer.client.is_connected)
        yield peer
    finally:
        peer.client.disconnect()
        await asyncio.to_thread(peer.client.loop_stop)
        del peer.client  # paho closes its socket pair when it is collected


class AiomqttPeer(Peer):
    def __init__(self, client: Any) -> None:
        super().__init__()
        self.client = client

    async def listen(self) -> None:
        async for message in self.client.messages:
            self.received.append((str(message.topic), message.payload, message.qos, message.retain))

    async def subscribe(self, name: str, qos: int) -> None:
        await self.client.subscribe(name, qos)

    async def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        await self.client.publish(topic, payload, qos, retain)


@asynccontextmanager
async def aiomqtt_peer(port: int) -> AsyncIterator[Peer]:
    aiomqtt = pytest.importorskip("aiomqtt", reason="aiomqtt is not installed")
    async with aiomqtt.Client("127.0.0.1", port) as client:
        peer = AiomqttPeer(client)
        listening = asyncio.create_task(peer.listen())
        try:
            yield peer
        finally:
            listening.cancel()
            await asyncio.wait([listening])


class AmqttPeer(Peer):
    def __init__(self, client: Any) -> None:
        super().__init__()
        self.client = client

    async def listen(self) -> None:
        while True:
            message = await self.client.deliver_message()
            if message is None:
                return
            self.received.append((message.topic, bytes(message.data), message.qos, message.retain))

    async def subscribe(self, name: str, qos: int) -> None:
        assert await self.client.subscribe([(name, qos)]) == [qos]

    async def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        await self.client.publish(topic, payload, qos, retain)


@asynccontextmanager
async def amqtt_peer(port: int) -> AsyncIterator[Peer]:
    pytest.importorskip("amqtt", reason="amqtt is not installed")
    module: Any = importlib.import_module("amqtt.client")
    logging.getLogger("amqtt").setLevel(logging.ERROR)
    client = module.MQTTClient(config={"auto_reconnect": False})
    await client.connect(f"mqtt://127.0.0.1:{port}")
    peer = AmqttPeer(client)
    listening = asyncio.create_task(peer.listen())
    try:
        yield peer
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        await client.disconnect()


PEERS: dict[str, Callable[[int], Any]] = {
    "paho, 3.1.1": lambda port: paho_peer(port, MQTTProtocolVersion.MQTTv311),
    "paho, 5": lambda port: paho_peer(port, MQTTProtocolVersion.MQTTv5),
    "aiomqtt": aiomqtt_peer,
    "amqtt": amqtt_peer,
}


@pytest.fixture(params=PEERS)
async def peer(request: pytest.FixtureRequest, mosquitto: MosquittoServer) -> AsyncIterator[Peer]:
    async with asyncio.timeout(40), PEERS[request.param](mosquitto.port) as found:
        yield found


@pytest.fixture(params=["3.1.1", "5"])
async def ours(
    request: pytest.FixtureRequest, mosquitto: MosquittoServer
) -> AsyncIterator[MQTTClient]:
    async with asyncio.timeout(40), MQTTClient(config={"protocol": request.param}) as found:
        await found.connect(mosquitto.url)
        yield found


async def test_from_ours_to_theirs(ours: MQTTClient, peer: Peer, unique: Unique) -> None:
    await peer.subscribe(unique("+/x/#"), 2)
    for qos in (0, 1, 2):
        await ours.publish(unique(f"{qos}/x"), b"%d" % qos, qos=qos)
    await ours.publish(unique("3/x/ünï/çödé"), "grüß".encode(), qos=QOS_1)
    await ours.publish(unique("4/x"), b"", qos=QOS_1)
    await ours.publish(unique("5/x"), b"\0" * 300_000, qos=QOS_2)
    await ours.publish(unique("6/y"), b"for nobody", qos=QOS_1)
    assert sorted(await peer.wait(6)) == [
        (unique("0/x"), b"0", 0, False),
        (unique("1/x"), b"1", 1, False),
        (unique("2/x"), b"2", 2, False),
        (unique("3/x/ünï/çödé"), "grüß".encode(), 1, False),
        (unique("4/x"), b"", 1, False),
        (unique("5/x"), b"\0" * 300_000, 2, False),
    ]


async def test_from_theirs_to_ours(ours: MQTTClient, peer: Peer, unique: Unique) -> None:
    assert await ours.subscribe([(unique("+/x/#"), QOS_2)]) == [2]
    for qos in (0, 1, 2):
        await peer.publish(unique(f"{qos}/x"), b"%d" % qos, qos, retain=False)
    await peer.publish(unique("3/x/ünï"), "grüß".encode(), 1, retain=False)
    await peer.publish(unique("4/x"), b"", 1, retain=False)
    await peer.publish(unique("5/x"), b"\0" * 300_000, 2, retain=False)
    got: list[Received] = []
    while len(got) < 6:
        message = await ours.deliver_message(10)
        got.append((message.topic, message.data, message.qos, message.retain))
    assert sorted(got) == [
        (unique("0/x"), b"0", 0, False),
        (unique("1/x"), b"1", 1, False),
        (unique("2/x"), b"2", 2, False),
        (unique("3/x/ünï"), "grüß".encode(), 1, False),
        (unique("4/x"), b"", 1, False),
        (unique("5/x"), b"\0" * 300_000, 2, False),
    ]


async def test_order_holds_in_both_directions(ours: MQTTClient, peer: Peer, unique: Unique) -> None:
    await peer.subscribe(unique("there"), 1)
    await ours.subscribe([(unique("back"), QOS_1)])
    numbers = [b"%d" % number for number in range(100)]
    await asyncio.gather(*(ours.publish(unique("there"), data, qos=QOS_1) for data in numbers))
    assert [data for _, data, _, _ in await peer.wait(100)] == numbers
    for data in numbers:
        await peer.publish(unique("back"), data, 1, retain=False)
    assert [(await ours.deliver_message(10)).data for _ in range(100)] == numbers


async def test_retained_messages(ours: MQTTClient, peer: Peer, unique: Unique) -> None:
    await ours.publish(unique("ours"), b"kept", qos=QOS_1, retain=True)
    await peer.publish(unique("theirs"), b"kept", 1, retain=True)
    await peer.subscribe(unique("ours"), 1)
    await ours.subscribe([(unique("theirs"), QOS_1)])
    assert await peer.wait(1) == [(unique("ours"), b"kept", 1, True)]
    message = await ours.deliver_message(10)
    assert (message.topic, message.data, message.retain) == (unique("theirs"), b"kept", True)
    await ours.publish(unique("ours"), b"", qos=QOS_1, retain=True)
    await ours.publish(unique("theirs"), b"", qos=QOS_1, retain=True)


class TestAmqttsBroker:
    """Ours against amqtt's broker, as far as that one goes."""

    @pytest.mark.parametrize("protocol", ["3.1.1", "auto"])
    async def test_every_quality_of_service(
        self, amqtt_server: AmqttServer, unique: Unique, protocol: str
    ) -> None:
        async with asyncio.timeout(20), MQTTClient(config={"protocol": protocol}) as one:
            await one.connect(amqtt_server.url)
            assert await one.subscribe([(unique("#"), QOS_2)]) == [2]
            for qos in (0, 1, 2):
                sent = await one.publish(unique(str(qos)), b"%d" % qos, qos=qos)
                assert sent.qos == qos
            got = [await one.deliver_message(5) for _ in range(3)]
        assert [message.data for message in got] == [b"0", b"1", b"2"]

    async def test_retained_and_unsubscribe(
        self, amqtt_server: AmqttServer, unique: Unique
    ) -> None:
        async with asyncio.timeout(20), MQTTClient() as one:
            await one.connect(amqtt_server.url)
            await one.publish(unique("t"), b"kept", qos=QOS_1, retain=True)
            await one.subscribe([(unique("t"), QOS_1)])
            message = await one.deliver_message(5)
            assert (message.data, message.retain) == (b"kept", True)
            await one.unsubscribe([unique("t")])
            await one.publish(unique("t"), b"unheard", qos=QOS_1)
            with pytest.raises(TimeoutError):
                await one.deliver_message(0.2)

    async def test_subscriptions_come_back_when_the_broker_was_restarted(
        self, amqtt_server: AmqttServer, unique: Unique
    ) -> None:
        async with asyncio.timeout(30), MQTTClient() as one:
            await one.connect(amqtt_server.url)
            await one.subscribe([(unique("t"), QOS_1)])
            await amqtt_server.stop()
            await eventually(lambda: not one.connected)
            await amqtt_server.start()
            await one.publish(unique("t"), b"x", qos=QOS_1)
            assert (await one.deliver_message(5)).data == b"x"

    async def test_other_clients_on_it(self, amqtt_server: AmqttServer, unique: Unique) -> None:
        async with asyncio.timeout(30), MQTTClient() as one:
            await one.connect(amqtt_server.url)
            await one.subscribe([(unique("#"), QOS_1)])
            for make in (
                lambda port: paho_peer(port, MQTTProtocolVersion.MQTTv311),
                aiomqtt_peer,
                amqtt_peer,
            ):
                async with make(amqtt_server.port) as other:
                    await other.publish(unique("t"), b"hello", 1, retain=False)
                    assert (await one.deliver_message(5)).data == b"hello"


pytestmark = pytest.mark.usefixtures("no_leaks")
