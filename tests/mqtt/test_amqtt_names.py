"""What programs for amqtt look at beside the client's methods: its session, its errors, its ends.

The client's own tests of amqtt check these; here they are checked in our words and on Mosquitto,
so that nothing of it is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest

import pubsub_mqtt
from pubsub_mqtt import MQTTClient
from pubsub_mqtt.client.session import Handler, Session
from pubsub_mqtt.server import MosquittoServer
from tests.conftest import PASSWORD
from tests.mqtt import scripted as wire
from tests.mqtt.scripted import Packet, ScriptedBroker, scripted

pytestmark = pytest.mark.usefixtures("no_leaks")

Unique = Callable[..., str]


@asynccontextmanager
async def client(url: str, **config: Any) -> AsyncIterator[MQTTClient]:
    async with asyncio.timeout(20):
        found = MQTTClient(config=config)
        await found.connect(url)
        try:
            yield found
        finally:
            await found.disconnect(drain=0.5)


def session_of(found: MQTTClient) -> Session:
    assert found.session is not None
    return found.session


def handler_of(found: MQTTClient) -> Handler:
    assert found._handler is not None
    return found._handler


def under_way(found: MQTTClient) -> tuple[int, int, int]:
    """Count the publishes that wait for PUBACK, PUBREC and PUBCOMP."""
    handler = handler_of(found)
    waiting = (handler._puback_waiters, handler._pubrec_waiters, handler._pubcomp_waiters)
    return (len(waiting[0]), len(waiting[1]), len(waiting[2]))


class TestSession:
    async def test_there_is_none_before_connecting(self) -> None:
        assert MQTTClient().session is None

    async def test_it_tells_what_connect_said(self, mosquitto_users: MosquittoServer) -> None:
        url = f"mqtt://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{mosquitto_users.port}"
        will = {"topic": "open/gone", "message": "x", "qos": 1, "retain": True}
        async with client(url, keep_alive=7, will=will) as found:
            session = session_of(found)
            assert (session.username, session.password) == ("alice", PASSWORD)
            assert session.client_id == found.client_id
            assert (session.clean_session, session.keep_alive) == (True, 7)
            assert session.remote_address == "127.0.0.1"
            assert session.remote_port == mosquitto_users.port
            assert (session.will_flag, session.will_topic) == (True, "open/gone")
            assert (session.will_message, session.will_qos) == (b"x", 1)
            assert session.will_retain is True
            assert PASSWORD not in repr(session)

    async def test_without_credentials_and_will_they_are_none(
        self, mosquitto: MosquittoServer
    ) -> None:
        async with client(mosquitto.unix_url) as found:
            session = session_of(found)
            assert (session.username, session.password) == (None, None)
            assert (session.will_flag, session.will_topic, session.will_message) == (
                False,
                None,
                None,
            )
            assert (session.will_qos, session.will_retain) == (None, None)
            assert (session.remote_address, session.remote_port) == (mosquitto.unix_path, 0)

    async def test_the_state_follows_the_connection(self, mosquitto: MosquittoServer) -> None:
        async with client(mosquitto.url) as found:
            session = session_of(found)
            assert session.transitions.is_connected()
            await found.disconnect()
            assert session.transitions.is_disconnected()
            await found.reconnect()
            assert session_of(found).transitions.state == "connected"

    async def test_a_broker_that_never_answered_leaves_it_new(self) -> None:
        found = MQTTClient(config={"auto_reconnect": False})
        with pytest.raises(pubsub_mqtt.ConnectError):
            await found.connect("mqtt://127.0.0.1:1")
        assert session_of(found).transitions.is_new()

    async def test_credentials_are_kept_for_a_reconnect(
        self, mosquitto_users: MosquittoServer
    ) -> None:
        async with client(f"mqtt://bob:b@127.0.0.1:{mosquitto_users.port}") as found:
            await found.disconnect()
            await found.reconnect()
            session = session_of(found)
            assert (session.username, session.password) == ("bob", "b")

    async def test_what_arrived_and_was_not_taken_is_counted(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto.url) as found:
            await found.subscribe([(unique(), 1)])
            await found.publish(unique(), b"x", qos=1)
            await found.publish(unique(), b"x", qos=0)
            while found.waiting < 2:
                await asyncio.sleep(0)
            assert session_of(found).inflight_in_count == 1
            for _ in range(2):
                await found.deliver_message()
            assert session_of(found).inflight_in_count == 0


class TestCancelling:
    """A cancelled publish is waited for by nobody, in whichever phase it was."""

    @pytest.fixture
    async def broker(self) -> AsyncIterator[ScriptedBroker]:
        async with scripted() as broker:
            yield broker

    @pytest.mark.parametrize(
        ("qos", "answer", "waits"),
        [(1, False, (1, 0, 0)), (2, False, (0, 1, 0)), (2, True, (0, 0, 1))],
        ids=["PUBACK", "PUBREC", "PUBCOMP"],
    )
    async def test_nothing_is_left(
        self, broker: ScriptedBroker, qos: int, answer: bool, waits: tuple[int, int, int]
    ) -> None:
        def withhold(packet: Packet) -> bytes | None:
            if packet.type == wire.PUBLISH:
                return b"\x50\x02" + packet.packet_id.to_bytes(2) if answer else b""
            return b"" if packet.type == wire.PUBREL else None

        broker.answer = withhold
        async with client(broker.url) as found:
            session = session_of(found)
            assert under_way(found) == (0, 0, 0)
            publishing = asyncio.create_task(found.publish("a", b"x", qos=qos))
            while under_way(found) != waits:
                await asyncio.sleep(0)
            assert session.inflight_out_count == 1
            publishing.cancel()
            await asyncio.wait([publishing])
            assert under_way(found) == (0, 0, 0)
            assert session.inflight_out_count == 0

    async def test_cancel_tasks_ends_every_wait_for_a_message(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto.url) as found:
            await found.subscribe([(unique(), 1)])
            waiting = [asyncio.create_task(found.deliver_message()) for _ in range(3)]
            await asyncio.sleep(0)
            await found.cancel_tasks()
            done, _ = await asyncio.wait(waiting)
            assert all(task.cancelled() for task in done)
            # The client goes on, and loses nothing to those who wait no more.
            await found.publish(unique(), b"after", qos=1)
            assert (await found.deliver_message()).data == b"after"


class TestEnds:
    @pytest.mark.parametrize("message", ["dead or alive", ""])
    async def test_a_client_that_ends_without_a_word_leaves_its_will(
        self, mosquitto: MosquittoServer, unique: Unique, message: str
    ) -> None:
        will = {"topic": unique("gone"), "message": message, "qos": 1, "retain": False}
        async with client(mosquitto.url) as witness, client(mosquitto.url, will=will) as found:
            await witness.subscribe([(unique("gone"), 0)])
            # As amqtt's tests do it: everything but DISCONNECT.
            await found.cancel_tasks()
            assert found._disconnect_task is None
            assert found._connected_state is not None
            assert found._connected_state.is_set()
            found._connected_state.clear()
            await handler_of(found).stop()
            session_of(found).transitions.disconnect()
            assert session_of(found).transitions.is_disconnected()
            assert not found._connected_state.is_set()
            told = await witness.deliver_message()
            assert (told.topic, told.data) == (unique("gone"), message.encode())
            with pytest.raises(pubsub_mqtt.ClientError):
                await found.publish("a", b"x")  # it does not come back by itself

    async def test_a_client_that_says_goodbye_does_not(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        will = {"topic": unique("gone"), "message": "x", "qos": 1, "retain": False}
        async with client(mosquitto.url) as witness, client(mosquitto.url, will=will) as found:
            await witness.subscribe([(unique("#"), 1)])
            await found.disconnect()
            await witness.publish(unique("next"), b"", qos=1)
            assert (await witness.deliver_message()).topic == unique("next")


class TestErrors:
    def test_the_names_of_both_generations_are_there(self) -> None:
        assert issubclass(pubsub_mqtt.ConnectError, pubsub_mqtt.ClientError)
        for name in ("AMQTTError", "MQTTError", "ProtocolHandlerError", "ClientException"):
            assert issubclass(pubsub_mqtt.ConnectError, getattr(pubsub_mqtt, name)), name

    @pytest.mark.parametrize("uri", ["mq://somewhere", '"mqtt://somewhere', ""])
    async def test_a_broken_uri_is_a_client_error(self, uri: str) -> None:
        with pytest.raises(pubsub_mqtt.ClientError):
            await MQTTClient(config={"auto_reconnect": False}).connect(uri)

    async def test_a_wildcard_in_a_topic_is_an_mqtt_error(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto.url) as found:
            for topic in (unique("+/x"), unique("#")):
                with pytest.raises(pubsub_mqtt.MQTTError):
                    await found.publish(topic, b"x")
            await found.publish(unique("*"), b"an asterisk is none")
