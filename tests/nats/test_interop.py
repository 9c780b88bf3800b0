"""With clients that we did not write: nats-py, paho-mqtt and Mosquitto's commands."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import nats
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from pubsub_core import connect
from pubsub_nats.server import NatsServer
from tests.servers import eventually

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "nats_vectors.json").read_text()
)
# The gateway of 2.9 closes the connection for the topic ".", newer ones carry it.
TOPICS = [pair["topic"] for pair in VECTORS["topic_subject"]]


async def test_nats_py_hears_us_and_we_hear_it(server: NatsServer) -> None:
    theirs = await nats.connect(server.url)
    try:
        heard = await theirs.subscribe("talk.>")
        await theirs.flush()
        async with connect(server.url) as bus, bus.subscribe("talk/#") as messages:
            await bus.publish(
                "talk/a.b", {"x": 1}, headers={"one": "1", "two": "zwei"}, content_type="a/b"
            )
            message = await heard.next_msg(timeout=5)
            assert message.subject == "talk.a//b"
            assert message.data == b'{"x":1}'
            assert message.headers == {"one": "1", "two": "zwei", "Content-Type": "a/b"}
            assert (await messages.get(timeout=5)).topic == "talk/a.b"
            await theirs.publish("talk.c", b"hi", headers={"k": "v", "Content-Type": "text/plain"})
            got = await messages.get(timeout=5)
            assert (got.topic, got.payload, got.content_type) == ("talk/c", b"hi", "text/plain")
            assert got.headers == {"k": "v"}
    finally:
        await theirs.close()


async def test_nats_py_and_we_share_a_queue_group(server: NatsServer) -> None:
    theirs = await nats.connect(server.url)
    try:
        other = await theirs.subscribe("jobs.*", queue="crew")
        await theirs.flush()
        async with connect(server.url) as bus, bus.subscribe("jobs/+", group="crew") as mine:
            for n in range(60):
                await bus.publish(f"jobs/{n}", b"x")
            await theirs.flush()
            await eventually(lambda: mine.stats.received + other.pending_msgs == 60)
            assert mine.stats.received
            assert other.pending_msgs
    finally:
        await theirs.close()


class Device:
    """A paho client on its own thread."""

    def __init__(self, port: int) -> None:
        self.got: list[tuple[str, bytes, int]] = []
        self._ready = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self.client.on_message = self._message
        self.client.on_connect = lambda *_: self._ready.set()
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self._ready.wait(10)

    def _message(self, client: Any, data: Any, message: paho.MQTTMessage) -> None:
        self.got.append((message.topic, bytes(message.payload), message.qos))

    def subscribe(self, filter: str) -> None:
        self._ready.clear()
        self.client.subscribe(filter, 1)
        assert self._ready.wait(10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


async def test_mqtt_devices_and_programs_exchange_every_topic(server: NatsServer) -> None:
    device = await asyncio.to_thread(Device, server.mqtt_port)
    try:
        await asyncio.to_thread(device.subscribe, "#")
        async with connect(server.url) as bus, bus.subscribe("#") as messages:
            for number, topic in enumerate(TOPICS):
                await bus.publish(topic, b"from us %d" % number)
            await eventually(lambda: len(device.got) == len(TOPICS), within=10)
            assert [(topic, payload) for topic, payload, _ in device.got] == [
                (topic, b"from us %d" % number) for number, topic in enumerate(TOPICS)
            ]
            for _ in TOPICS:
                await messages.get(timeout=5)
            for number, topic in enumerate(TOPICS):
                # The gateway delivers in order within one quality of service.
                device.client.publish(topic, b"from it %d" % number, qos=1)
            for number, topic in enumerate(TOPICS):
                message = await messages.get(timeout=5)
                assert (message.topic, message.payload) == (topic, b"from it %d" % number)
                assert not message.headers
    finally:
        await asyncio.to_thread(device.close)


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_every_quality_of_service_of_a_device_arrives(server: NatsServer, qos: int) -> None:
    device = await asyncio.to_thread(Device, server.mqtt_port)
    try:
        async with connect(server.url) as bus, bus.subscribe("q/#") as messages:
            device.client.publish("q/1", b"x", qos=qos)
            message = await messages.get(timeout=10)
            assert (message.topic, message.payload) == ("q/1", b"x")
    finally:
        await asyncio.to_thread(device.close)


@pytest.mark.skipif(shutil.which("mosquitto_pub") is None, reason="needs mosquitto-clients")
async def test_mosquittos_commands(server: NatsServer) -> None:
    at = ["-h", "127.0.0.1", "-p", str(server.mqtt_port), "-V", "mqttv311"]
    async with connect(server.url) as bus, bus.subscribe("m/#") as messages:
        await asyncio.to_thread(
            subprocess.run,
            ["mosquitto_pub", *at, "-t", "m/there", "-m", "hello", "-q", "1"],
            check=True,
            timeout=20,
        )
        assert (await messages.get(timeout=5)).payload == b"hello"
        listening = await asyncio.create_subprocess_exec(
            "mosquitto_sub", *at, "-t", "m/back", "-C", "1", stdout=subprocess.PIPE
        )
        output = asyncio.ensure_future(listening.communicate())
        while not output.done():
            # It does not say when it is subscribed.
            await bus.publish("m/back", b"world")
            await asyncio.wait([output], timeout=0.05)
        assert output.result()[0].strip() == b"world"
