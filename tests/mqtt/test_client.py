"""`MQTTClient`: amqtt's names, and none of its losses."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import errors as core
from pubsub_core.testing.clock import VirtualClock
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.client import (
    QOS_0,
    QOS_1,
    QOS_2,
    ClientError,
    ClientException,
    ConnectError,
    ConnectException,
    MQTTClient,
)
from pubsub_mqtt.client.config import ClientConfig
from pubsub_mqtt.server import AmqttServer, MosquittoServer
from tests.conftest import PASSWORD
from tests.mqtt import scripted as wire
from tests.mqtt.scripted import Packet, ScriptedBroker, scripted
from tests.servers import Authority, Certificate, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

Unique = Callable[[str], str]


@asynccontextmanager
async def client(
    url: str, client_id: str | None = None, *, within: float = 30, **config: Any
) -> AsyncIterator[MQTTClient]:
    """A connected client, and a deadline on everything done with it."""
    async with asyncio.timeout(within):
        found = MQTTClient(client_id, config)
        try:
            await found.connect(url)
            yield found
        finally:
            await found.disconnect(drain=0.5)


@pytest.fixture
async def broker() -> AsyncIterator[ScriptedBroker]:
    async with scripted() as found:
        yield found


@pytest.fixture
async def proxy(mosquitto: MosquittoServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", mosquitto.port) as found:
        yield found


@pytest.fixture(scope="session")
def refusing(
    mosquitto: MosquittoServer,
    mosquitto_tls: MosquittoServer,
    mosquitto_wrong_host: MosquittoServer,
    mosquitto_expired: MosquittoServer,
) -> Mapping[str, MosquittoServer]:
    """Servers whose certificate does not hold, by what is wrong."""
    return {
        "unknown authority": mosquitto_tls,
        "wrong host": mosquitto_wrong_host,
        "expired": mosquitto_expired,
        "not TLS at all": mosquitto,
    }


def url_of(proxy: FaultProxy) -> str:
    return f"mqtt://127.0.0.1:{proxy.port}"


async def lost_and_back(one: MQTTClient, proxy: FaultProxy) -> None:
    """Cut, and wait for the next session; it may be there before anybody looks."""
    accepted = proxy.accepted
    await proxy.cut()
    await eventually(lambda: proxy.accepted > accepted and one.connected)


# --- amqtt's documented programs, with only their imports changed --------------------------


class TestSeedPrograms:
    async def test_subscriber(
        self, mosquitto: MosquittoServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def uptime_coro(uri: str) -> None:
            client = MQTTClient()
            await client.connect(uri)
            await client.subscribe(
                [("$SYS/broker/uptime", QOS_1), ("$SYS/broker/load/#", QOS_2)],
            )
            try:
                for i in range(1, 10):
                    message = await client.deliver_message()
                    packet = message.publish_packet
                    name, data = packet.variable_header.topic_name, packet.payload.data
                    print(f"{i}:  {name} => {data.decode()}")
                await client.unsubscribe(["$SYS/broker/uptime", "$SYS/broker/load/#"])
                await client.disconnect()
            except ClientException as ce:
                logging.getLogger(__name__).error("Client exception: %s", ce)

        # Mosquitto tells its load every ten seconds, and the first time at its start.
        async with asyncio.timeout(25):
            await uptime_coro(mosquitto.url + "/")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 9
        assert all(" => " in line for line in lines)
        assert any("$SYS/broker/uptime => " in line for line in lines)

    async def test_publisher_with_tasks(self, mosquitto: MosquittoServer, unique: Unique) -> None:
        topic = unique("a/b")

        async def publish_coro(uri: str) -> None:
            client = MQTTClient()
            await client.connect(uri)
            tasks = [
                asyncio.ensure_future(client.publish(topic, b"TEST MESSAGE WITH QOS_0")),
                asyncio.ensure_future(client.publish(topic, b"TEST MESSAGE WITH QOS_1", qos=QOS_1)),
                asyncio.ensure_future(client.publish(topic, b"TEST MESSAGE WITH QOS_2", qos=QOS_2)),
            ]
            await asyncio.wait(tasks)
            await client.disconnect()

        async with client(mosquitto.url) as watching:
            await watching.subscribe([(topic, QOS_2)])
            await publish_coro(mosquitto.url + "/")
            got = [await watching.deliver_message(5) for _ in range(3)]
        assert [(message.data[-5:], message.qos) for message in got] == [
            (b"QOS_0", 0),
            (b"QOS_1", 1),
            (b"QOS_2", 2),
        ]

    async def test_publisher_in_sequence(self, mosquitto: MosquittoServer, unique: Unique) -> None:
        topic = unique("a/b")

        async def publish_coro(uri: str) -> None:
            try:
                client = MQTTClient()
                await client.connect(uri)
                await client.publish(topic, b"TEST MESSAGE WITH QOS_0", qos=QOS_0)
                await client.publish(topic, b"TEST MESSAGE WITH QOS_1", qos=QOS_1, ack_timeout=5)
                await client.publish(topic, b"TEST MESSAGE WITH QOS_2", qos=QOS_2)
                await client.disconnect()
            except ConnectException:
                logging.getLogger(__name__).exception("Connection failed")
                asyncio.get_running_loop().stop()

        async with client(mosquitto.url) as watching:
            await watching.subscribe([(topic, QOS_0)])
            await publish_coro(mosquitto.url + "/")
            got = [await watching.deliver_message(5) for _ in range(3)]
        assert [message.data[-5:] for message in got] == [b"QOS_0", b"QOS_1", b"QOS_2"]

    async def test_client_made_before_its_loop_with_a_configuration(
        self, mosquitto: MosquittoServer
    ) -> None:
        config = {
            "keep_alive": 5,
            "ping_delay": 1,
            "will": {
                "topic": "/will/client",
                "message": b"Dead or alive",
                "qos": QOS_1,
                "retain": False,
            },
        }
        made: MQTTClient = await asyncio.to_thread(lambda: MQTTClient(config=config))
        async with asyncio.timeout(5):
            assert await made.connect(mosquitto.url + "/") == 0
            await made.disconnect()


# --- what amqtt's client loses, waits for or ignores -----------------------------------------


class TestDefectsOfAmqtt:
    async def test_a_cancelled_deliver_message_takes_no_message_with_it(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto.url) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            for number in range(50):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(one.deliver_message(), 0.001)
                await one.publish(unique("t"), str(number).encode(), qos=QOS_1)
                message = await one.deliver_message(5)
                assert message.data == str(number).encode()

    async def test_cancelling_at_the_very_moment_of_arrival_loses_nothing(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        got: list[bytes] = []
        async with client(mosquitto.url) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            for number in range(50):
                taker = asyncio.create_task(one.deliver_message())
                await one.publish(unique("t"), str(number).encode(), qos=QOS_1)
                for _ in range(number % 10):
                    await asyncio.sleep(0)
                taker.cancel()
                await asyncio.wait([taker])
                if not taker.cancelled():
                    got.append(taker.result().data)
            while len(got) < 50:
                got.append((await one.deliver_message(5)).data)
        assert got == [str(number).encode() for number in range(50)]

    @pytest.mark.parametrize("traffic", [False, True], ids=["idle", "publishing"])
    async def test_a_dead_peer_is_noticed(self, proxy: FaultProxy, traffic: bool) -> None:
        async with client(url_of(proxy), keep_alive=2) as one:
            proxy.blackhole()
            watch = Stopwatch()
            while one.connected:
                if traffic:
                    await one.publish("t", b"into the void")
                await asyncio.sleep(0.01)
                assert watch.seconds < 2 * 1.5 + 1
            proxy.heal()
            await eventually(lambda: one.connected, what="it reconnects")

    async def test_a_missing_connack_ends_connect(self, broker: ScriptedBroker) -> None:
        broker.connack = None
        one = MQTTClient(config={"connection_timeout": 0.2, "auto_reconnect": False})
        async with asyncio.timeout(5):
            with pytest.raises(ConnectError, match=r"within 0\.2 s") as caught:
                await one.connect(broker.url)
        assert caught.value.return_code is None
        assert isinstance(caught.value.__cause__, core.ConnectTimeout)

    async def test_a_missing_suback_ends_subscribe(self, broker: ScriptedBroker) -> None:
        broker.suback = False
        async with client(broker.url, request_timeout=0.2) as one:
            with pytest.raises(core.OperationTimeout, match="no answer to SUBSCRIBE"):
                await one.subscribe([("a", QOS_0)])
            assert one.subscriptions == {}
            # Nobody knows whether it was granted, so it is taken back.
            assert (await broker.arrived(wire.UNSUBSCRIBE))[0].body.endswith(b"\x00\x01a")
            with pytest.raises(TimeoutError, match="no answer to UNSUBSCRIBE"):
                await one.unsubscribe(["a"])

    async def test_subscriptions_come_back_after_a_reconnect(
        self, proxy: FaultProxy, unique: Unique
    ) -> None:
        async with client(url_of(proxy)) as one:
            await one.subscribe([(unique("a"), QOS_1), (unique("b/#"), QOS_0)])
            await one.subscribe([(unique("gone"), QOS_0)])
            await one.unsubscribe([unique("gone")])
            for _ in range(3):
                await lost_and_back(one, proxy)
                assert one.session_present is False
                for topic in (unique("a"), unique("gone"), unique("b/c")):
                    await one.publish(topic, b"x", qos=QOS_1)
                got = [await one.deliver_message(5) for _ in range(2)]
                assert [message.topic for message in got] == [unique("a"), unique("b/c")]
                assert one.waiting == 0

    async def test_a_continued_session_is_told_and_not_subscribed_again(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        name = unique("").strip("/")
        one = MQTTClient(name)
        async with asyncio.timeout(20), client(mosquitto.url) as other:
            try:
                await one.connect(mosquitto.url, cleansession=False)
                assert one.session_present is False
                await one.subscribe([(unique("t"), QOS_1)])
                await one.disconnect()
                await other.publish(unique("t"), b"while away", qos=QOS_1)
                assert await one.reconnect() == 0
                assert one.session_present is True
                assert (await one.deliver_message(5)).data == b"while away"
            finally:
                await one.disconnect()
                await one.reconnect(cleansession=True)
                await one.disconnect()

    async def test_a_resubscription_that_is_refused_is_told(
        self, broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with client(broker.url) as one:
            await one.subscribe([("kept", QOS_0)])
            await one.subscribe([("lost", QOS_0)])

            def refuse(packet: Packet) -> bytes | None:
                if packet.type == wire.SUBSCRIBE:
                    return b"\x90\x04" + packet.body[:2] + b"\x00\x80"
                return None

            broker.answer = refuse
            broker.cut()
            await eventually(lambda: one.refused == {"lost": 0x80})
            await eventually(lambda: one.connected)
            assert one.subscriptions == {"kept": 0}
        assert any("'lost'" in r.getMessage() for r in caplog.records if r.levelname == "ERROR")

    @pytest.mark.parametrize("qos", [1, 2])
    async def test_a_late_acknowledgement_is_waited_for_and_the_message_not_forgotten(
        self, broker: ScriptedBroker, qos: int
    ) -> None:
        broker.puback = False
        async with client(broker.url) as one:
            publishing = asyncio.create_task(one.publish("t", b"x", qos=qos))
            first = (await broker.arrived(wire.PUBLISH))[0]
            broker.puback = True
            broker.cut()
            sent = await publishing
            again = broker.of(wire.PUBLISH)[1]
            assert again.packet_id == first.packet_id == sent.packet_id
            assert again.head == first.head | 0x08  # DUP
            assert again.body == first.body

    @pytest.mark.slow
    async def test_there_is_no_limit_of_five_seconds(self, proxy: FaultProxy) -> None:
        async with client(url_of(proxy)) as one:
            proxy.stall()
            publishing = asyncio.create_task(one.publish("t", b"x", qos=QOS_1))
            done, _ = await asyncio.wait([publishing], timeout=6)
            assert not done
            proxy.stall(False)
            assert (await publishing).puback_packet is not None

    async def test_the_deadline_says_whether_the_message_left(self, broker: ScriptedBroker) -> None:
        broker.puback = False
        async with client(broker.url, max_inflight=1) as one:
            sent = asyncio.create_task(one.publish("t", b"x", qos=QOS_1, ack_timeout=1.0))
            await broker.arrived(wire.PUBLISH)
            with pytest.raises(core.PublishTimeout) as waiting:
                await one.publish("t", b"y", qos=QOS_1, ack_timeout=0.05)
            assert waiting.value.outcome is core.Outcome.NOT_SENT
            with pytest.raises(TimeoutError) as late:
                await sent
            assert isinstance(late.value, core.PublishTimeout)
            assert late.value.outcome is core.Outcome.UNKNOWN

    async def test_disconnect_wakes_a_waiting_receiver_with_an_error(
        self, mosquitto: MosquittoServer
    ) -> None:
        async with client(mosquitto.url) as one:
            waiting = [asyncio.create_task(one.deliver_message()) for _ in range(3)]
            await eventually(lambda: len(one._receivers) == 3)
            await one.disconnect()
            for task in waiting:
                with pytest.raises(ClientError, match="disconnected"):
                    await task

    async def test_an_explicit_retain_false_wins(self, broker: ScriptedBroker) -> None:
        topics = {"t": {"retain": True}}
        async with client(broker.url, default_retain=True, topics=topics) as one:
            await one.publish("t", b"1", retain=False)
            await one.publish("t", b"2")
            await one.publish("other", b"3", retain=False)
            await one.publish("other", b"4")
            heads = [packet.head for packet in await broker.arrived(wire.PUBLISH, 4)]
        assert heads == [0x30, 0x31, 0x30, 0x31]

    @pytest.mark.parametrize("how", ["cafile", "capath", "cadata", "configuration", "context"])
    async def test_every_way_to_name_the_authority_works(
        self, mosquitto_tls: MosquittoServer, authority: Authority, tmp_path: Path, how: str
    ) -> None:
        pem = Path(authority.cafile).read_text()
        folder = tmp_path / "authorities"
        folder.mkdir()
        digest = subprocess.run(
            ["openssl", "x509", "-hash", "-noout", "-in", authority.cafile],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        (folder / f"{digest}.0").write_text(pem)
        arguments: dict[str, Any] = {}
        config: dict[str, Any] = {"auto_reconnect": False}
        match how:
            case "cafile":
                arguments["cafile"] = authority.cafile
            case "capath":
                arguments["capath"] = str(folder)
            case "cadata":
                arguments["cadata"] = pem
            case "configuration":
                config["connection"] = {"cafile": Path(authority.cafile)}
            case _:
                context = ssl.create_default_context(cafile=authority.cafile)
                config["connection"] = {"ssl_context": context}
        one = MQTTClient(config=config)
        async with asyncio.timeout(10):
            assert await one.connect(mosquitto_tls.url, **arguments) == 0
            await one.disconnect()

    async def test_the_incoming_queue_is_bounded_and_nothing_is_lost(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        total = 3000
        async with (
            client(mosquitto.url, incoming_messages=50) as one,
            client(mosquitto.url) as other,
        ):
            await one.subscribe([(unique("t"), QOS_0)])
            for start in range(0, total, 100):
                await asyncio.gather(
                    *(
                        other.publish(unique("t"), str(number).encode() + b" " * 2000)
                        for number in range(start, start + 100)
                    )
                )
            got: list[int] = []
            while len(got) < total:
                assert one.waiting <= 50
                got.append(int((await one.deliver_message(5)).data))
        assert got == list(range(total))

    async def test_a_message_is_acknowledged_when_it_is_handed_over(
        self, broker: ScriptedBroker
    ) -> None:
        async with client(broker.url) as one:
            await one.subscribe([("t", QOS_1)])
            broker.send(b"\x32\x06\x00\x01t\x00\x07x" + b"\x32\x06\x00\x01t\x00\x08y")
            await eventually(lambda: one.waiting == 2)
            await one.ping()
            assert broker.of(wire.PUBACK) == []
            message = await one.deliver_message(5)
            assert (message.packet_id, message.data) == (7, b"x")
            assert message.puback_packet is not None
            assert message.puback_packet.variable_header.packet_id == 7
            assert [packet.packet_id for packet in await broker.arrived(wire.PUBACK)] == [7]

    @pytest.mark.parametrize("qos", [1, 2])
    async def test_what_was_not_handed_over_comes_again_once(
        self, mosquitto: MosquittoServer, unique: Unique, qos: int
    ) -> None:
        async with (
            FaultProxy("127.0.0.1", mosquitto.port) as proxy,
            client(url_of(proxy), unique("").strip("/"), cleansession=False) as one,
            client(mosquitto.url) as other,
        ):
            await one.subscribe([(unique("t"), qos)])
            for number in range(5):
                await other.publish(unique("t"), str(number).encode(), qos=qos)
            await eventually(lambda: one.waiting == 5)
            got = [(await one.deliver_message(5)).data for _ in range(2)]
            await one.ping()  # the acknowledgements have arrived
            await lost_and_back(one, proxy)
            assert one.session_present is True
            await other.publish(unique("t"), b"5", qos=qos)
            got += [(await one.deliver_message(5)).data for _ in range(4)]
            assert got == [b"0", b"1", b"2", b"3", b"4", b"5"]
            assert one.waiting == 0
            await one.unsubscribe([unique("t")])

    async def test_a_connection_lost_during_a_publish_at_qos_0_is_no_success(
        self, proxy: FaultProxy
    ) -> None:
        async with client(url_of(proxy), offline="raise") as one:
            proxy.stall(direction=Direction.UP)
            publishing = asyncio.create_task(one.publish("t", b"x" * 50_000_000))
            await eventually(lambda: proxy.taken[Direction.UP] > 1_000_000)
            assert not publishing.done()
            await proxy.cut()
            with pytest.raises(core.PublishFailed) as caught:
                await publishing
            assert caught.value.outcome is core.Outcome.UNKNOWN


# --- addresses, options, errors ---------------------------------------------------------------


class TestConnecting:
    @pytest.mark.parametrize("scheme", ["mqtt", "tcp"])
    async def test_tcp(self, mosquitto: MosquittoServer, scheme: str) -> None:
        async with client(f"{scheme}://127.0.0.1:{mosquitto.port}") as one:
            assert one.connected

    async def test_unix_socket(self, mosquitto: MosquittoServer) -> None:
        async with client(mosquitto.unix_url) as one:
            assert await one.ping() > 0

    async def test_websocket_with_path_and_headers(self, mosquitto: MosquittoServer) -> None:
        one = MQTTClient()
        async with asyncio.timeout(10):
            where = f"ws://127.0.0.1:{mosquitto.websocket_port}/some/path"
            await one.connect(where, additional_headers={"X-Test": "1"})
            await one.publish("t", b"x", qos=QOS_1)
            await one.disconnect()

    async def test_additional_headers_are_sent(self) -> None:
        requests: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        one = MQTTClient()
        async with asyncio.timeout(5):
            with pytest.raises(ConnectError, match="403") as caught:
                await one.connect(f"ws://127.0.0.1:{port}", additional_headers={"X-Test": "42"})
        server.close()
        assert isinstance(caught.value.__cause__, core.AuthenticationFailed)
        assert requests[0].startswith(b"GET /mqtt ")
        assert b"\r\nx-test: 42\r\n" in requests[0].lower()

    @pytest.mark.parametrize("where", ["url", "websocket_url"])
    async def test_tls(
        self, mosquitto_tls: MosquittoServer, authority: Authority, where: str
    ) -> None:
        one = MQTTClient()
        async with asyncio.timeout(10):
            await one.connect(getattr(mosquitto_tls, where), cafile=authority.cafile)
            await one.publish("t", b"x" * 100_000, qos=QOS_2)
            await one.disconnect()

    async def test_client_certificate(
        self,
        mosquitto_client_certificates: MosquittoServer,
        authority: Authority,
        client_certificate: Certificate,
    ) -> None:
        where = mosquitto_client_certificates.url
        connection = {
            "uri": where,
            "cafile": authority.cafile,
            "certfile": client_certificate.certfile,
            "keyfile": client_certificate.keyfile,
        }
        one = MQTTClient(config={"connection": connection, "auto_reconnect": False})
        async with asyncio.timeout(10):
            assert await one.connect() == 0
            await one.disconnect()

    @pytest.mark.parametrize(
        "kind", ["unknown authority", "wrong host", "expired", "not TLS at all"]
    )
    async def test_a_certificate_that_does_not_hold_is_refused_at_once(
        self, kind: str, authority: Authority, refusing: Mapping[str, MosquittoServer]
    ) -> None:
        server = refusing[kind]
        cafile = None if kind == "unknown authority" else authority.cafile
        # A server that only closes may be starting, so that is worth another attempt.
        one = MQTTClient(config={"reconnect_retries": 0 if kind == "not TLS at all" else -1})
        async with asyncio.timeout(10):
            with pytest.raises(ConnectError) as caught:
                await one.connect(f"mqtts://127.0.0.1:{server.port}", cafile=cafile)
        assert isinstance(caught.value.__cause__, core.ConnectError)
        if kind != "not TLS at all":
            assert isinstance(caught.value.__cause__, core.TLSProblem)

    async def test_the_host_name_is_not_checked_when_that_is_said(
        self,
        mosquitto_wrong_host: MosquittoServer,
        authority: Authority,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        one = MQTTClient(config={"check_hostname": False})
        async with asyncio.timeout(10):
            await one.connect(mosquitto_wrong_host.url, cafile=authority.cafile)
            await one.disconnect()
        assert "check_hostname is off" in caplog.text

    @pytest.mark.parametrize(
        ("uri", "text"),
        [
            (None, "Missing connection parameter 'uri'"),
            ("", "Missing connection parameter 'uri'"),
            ("http://127.0.0.1", "http:// is not an MQTT scheme"),
            ("mqtt://", "mqtt:// without a host"),
            ("mqtt:///", "mqtt:// without a host"),
            ("mqtt://127.0.0.1/some/topic", "'/some/topic' means nothing"),
            ("mqtt+unix://host/path", "names a host"),
            ("mqtt+unix://", "without the path"),
            ("mqtt://127.0.0.1?keepalives=3", "keepalive"),
            ("mqtt://127.0.0.1?keepalive=soon", "keepalive"),
            ("mqtt://127.0.0.1:99999", "port"),
            ("localhost", "not a URL"),
        ],
    )
    async def test_a_bad_uri_is_an_error_that_says_so(self, uri: str | None, text: str) -> None:
        one = MQTTClient()
        async with asyncio.timeout(5):
            with pytest.raises(ClientError, match=text):
                await one.connect(uri)
        with pytest.raises(ClientError):
            await one.deliver_message()

    async def test_ipv6_literal(self) -> None:
        one = MQTTClient(config={"auto_reconnect": False})
        async with asyncio.timeout(5):
            with pytest.raises(ConnectError, match=r"\[::1\]:1"):
                await one.connect("mqtt://[::1]:1")

    async def test_options_in_the_uri_win(self, broker: ScriptedBroker) -> None:
        async with client(f"{broker.url}?keepalive=30&client_id=from-uri", keep_alive=20) as one:
            connect = broker.of(wire.CONNECT)[0]
            assert connect.keep_alive == 30
            assert connect.body.endswith(b"\x00\x08from-uri")
            assert one.client_id == "from-uri"

    @pytest.mark.parametrize("keep_alive", [0, 1, 17, 65535])
    async def test_keep_alive_is_on_the_wire_as_it_is(
        self, broker: ScriptedBroker, keep_alive: int
    ) -> None:
        async with client(broker.url, keep_alive=keep_alive, ping_delay=5):
            assert broker.of(wire.CONNECT)[0].keep_alive == keep_alive

    async def test_keep_alive_is_a_minute_unless_said(self, broker: ScriptedBroker) -> None:
        async with client(broker.url):
            assert broker.of(wire.CONNECT)[0].keep_alive == 60

    async def test_a_ping_is_sent_in_time(self, broker: ScriptedBroker) -> None:
        async with client(broker.url, keep_alive=1):
            await broker.arrived(wire.PINGREQ, 2)

    @pytest.mark.parametrize("clean", [True, False])
    async def test_cleansession_is_on_the_wire(self, broker: ScriptedBroker, clean: bool) -> None:
        one = MQTTClient("me")
        async with asyncio.timeout(5):
            await one.connect(broker.url, cleansession=clean)
            await one.disconnect()
        assert broker.of(wire.CONNECT)[0].connect_flags == (2 if clean else 0)

    @pytest.mark.parametrize("message", ["última", b"\x00\xff"])
    async def test_the_will_is_bytes_or_text(
        self, mosquitto: MosquittoServer, unique: Unique, message: str | bytes
    ) -> None:
        will = {"topic": unique("will"), "message": message, "qos": 1, "retain": False}
        async with client(mosquitto.url) as watching:
            await watching.subscribe([(unique("will"), QOS_1)])
            async with FaultProxy("127.0.0.1", mosquitto.port) as proxy:
                async with client(url_of(proxy), will=will):
                    pass  # a clean end sends none
                async with client(url_of(proxy), will=will, auto_reconnect=False):
                    await proxy.cut()
                    got = await watching.deliver_message(5)
            assert got.data == (message.encode() if isinstance(message, str) else message)
            assert watching.waiting == 0

    async def test_credentials_of_the_uri_are_decoded(
        self, mosquitto_users: MosquittoServer
    ) -> None:
        from urllib.parse import quote

        where = f"mqtt://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{mosquitto_users.port}"
        async with client(where) as one:
            assert one.connected

    async def test_refused_credentials_are_not_tried_again(
        self, mosquitto_users: MosquittoServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        async with FaultProxy("127.0.0.1", mosquitto_users.port) as proxy:
            one = MQTTClient(config={"reconnect_retries": -1})
            async with asyncio.timeout(5):
                with pytest.raises(ConnectError) as caught:
                    await one.connect(f"mqtt://alice:c4n4ry@127.0.0.1:{proxy.port}")
            assert proxy.accepted == 1
        assert caught.value.return_code == 5
        assert isinstance(caught.value.__cause__, core.AuthenticationFailed)
        assert "c4n4ry" not in f"{caught.value!r} {caught.value} {one!r} {caplog.text}"
        # The state is final until somebody connects again.
        with pytest.raises(ConnectError) as again:
            await one.publish("t", b"x")
        assert again.value.return_code == 5

    @pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
    async def test_the_code_of_connack_is_kept(self, broker: ScriptedBroker, code: int) -> None:
        broker.connack = bytes((0x20, 2, 0, code))
        one = MQTTClient(config={"auto_reconnect": False})
        async with asyncio.timeout(5):
            with pytest.raises(ConnectError) as caught:
                await one.connect(broker.url)
        assert caught.value.return_code == code

    async def test_the_first_connection_is_tried_as_often_as_said(
        self, broker: ScriptedBroker
    ) -> None:
        broker.connack = b"\x20\x02\x00\x03"
        clock = VirtualClock(auto=True)
        for retries, attempts in ((None, 1), (0, 1), (2, 3)):
            broker.packets.clear()
            one = MQTTClient(config={"reconnect_retries": retries}, clock=clock)
            async with asyncio.timeout(5):
                with pytest.raises(ConnectError):
                    await one.connect(broker.url)
            assert len(broker.of(wire.CONNECT)) == attempts

    async def test_connecting_twice_is_refused(self, mosquitto: MosquittoServer) -> None:
        async with client(mosquitto.url) as one:
            with pytest.raises(ClientError, match="online already"):
                await one.connect(mosquitto.url)
            assert await one.reconnect() == 0

    async def test_a_cancelled_connect_leaves_nothing(self, broker: ScriptedBroker) -> None:
        broker.connack = None
        one = MQTTClient()
        connecting = asyncio.create_task(one.connect(broker.url))
        await broker.arrived(wire.CONNECT)
        connecting.cancel()
        await asyncio.wait([connecting])
        assert connecting.cancelled()
        broker.connack = b"\x20\x02\x00\x00"
        async with asyncio.timeout(5):
            assert await one.connect(broker.url) == 0
            await one.disconnect()

    async def test_disconnect_is_idempotent_and_silent(self, mosquitto: MosquittoServer) -> None:
        one = MQTTClient()
        await one.disconnect()
        async with asyncio.timeout(10):
            await one.connect(mosquitto.url)
            await one.disconnect()
            await one.disconnect()
            assert await one.reconnect() == 0
            assert one.connected
            await one.disconnect()

    async def test_reconnect_without_connect_says_so(self) -> None:
        with pytest.raises(ClientError, match="nothing to reconnect to"):
            await MQTTClient().reconnect()

    async def test_another_loop_is_refused(self, mosquitto: MosquittoServer) -> None:
        async with client(mosquitto.url) as one:

            def elsewhere() -> None:
                with pytest.raises(core.WrongLoop):
                    asyncio.run(one.publish("t", b"x"))

            await asyncio.to_thread(elsewhere)

    async def test_the_client_is_a_context_manager(self, mosquitto: MosquittoServer) -> None:
        async with asyncio.timeout(10), MQTTClient() as one:
            await one.connect(mosquitto.url)
        assert not one.connected


class TestConfiguration:
    def test_names_of_the_exceptions(self) -> None:
        assert ClientException is ClientError
        assert ConnectException is ConnectError
        assert issubclass(ConnectError, ClientError)
        assert issubclass(ConnectError, core.ConnectError)

    def test_constants(self) -> None:
        assert (QOS_0, QOS_1, QOS_2) == (0, 1, 2)

    @pytest.mark.parametrize(
        ("config", "text"),
        [
            ({"keepalive": 3}, r"config\.keepalive .* did you mean 'keep_alive'"),
            ({"connection": {"url": "x"}}, r"config\.connection\.url .* 'uri'"),
            ({"keep_alive": "soon"}, r"config\.keep_alive: expected a whole number"),
            ({"keep_alive": 70000}, "keepalive=70000"),
            ({"default_qos": 3}, "default_qos is 3"),
            ({"topics": {"a": {"qos": 7}}}, "topics.qos is 7"),
            ({"topics": {"a": {"qo": 1}}}, r"config\.topics\.a\.qo"),
            ({"topics": {"a/#/b": {"qos": 1}}}, "'a/#/b'"),
            ({"will": {"message": "x"}}, r"config\.will\.topic is missing"),
            ({"will": {"topic": "a/#"}}, "will.topic"),
            ({"will": {"topic": "a", "qos": 3}}, "will.qos"),
            ({"connection": {"keyfile": "x"}}, "connection.certfile"),
            ({"connection": {"ssl_context": 3}}, "connection.ssl_context is a int"),
            ({"verify_cert": False}, "check_hostname"),
            ({"request_timeout": 0}, "request_timeout is 0"),
            ({"incoming_messages": 0}, "incoming_messages is 0"),
            ({"offline": "explode"}, r"config\.offline"),
        ],
    )
    def test_a_bad_configuration_names_the_key(self, config: dict[str, Any], text: str) -> None:
        with pytest.raises(core.BadOption, match=text):
            MQTTClient(config=config)

    async def test_the_section_broker_still_works(self, mosquitto: MosquittoServer) -> None:
        with pytest.warns(DeprecationWarning, match="connection"):
            one = MQTTClient(config={"broker": {"uri": mosquitto.url}})
        async with asyncio.timeout(5):
            assert await one.connect() == 0
            await one.disconnect()

    def test_plugins_of_amqtt_are_not_run_and_that_is_said(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        MQTTClient(config={"plugins": {"amqtt.plugins.logging_amqtt.PacketLoggerPlugin": {}}})
        assert "plugins of amqtt are not run" in caplog.text

    def test_the_address_with_its_password_is_not_printed(self) -> None:
        config = ClientConfig.from_dict({"connection": {"uri": "mqtt://u:c4n4ry@h"}})
        assert "c4n4ry" not in repr(config)

    def test_a_configuration_without_warnings(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert MQTTClient(config=ClientConfig()).config == ClientConfig.from_dict({})

    async def test_publish_defaults(self, broker: ScriptedBroker) -> None:
        topics = {
            "exact": {"qos": 2},
            "lab/#": {"qos": 0, "retain": False},
            "lab/+/temp": {"retain": True},
        }
        async with client(broker.url, default_qos=1, topics=topics) as one:
            found = {
                topic: ((await one.publish(topic, b"")).qos, (await one.publish(topic, b"")).retain)
                for topic in ("exact", "lab/oven", "lab/oven/temp", "other")
            }
        assert found == {
            "exact": (2, False),
            "lab/oven": (0, False),
            "lab/oven/temp": (0, True),
            "other": (1, False),
        }


# --- publishing -----------------------------------------------------------------------------


class TestPublishing:
    async def test_what_is_returned(self, mosquitto: MosquittoServer, unique: Unique) -> None:
        async with client(mosquitto.url) as one:
            zero = await one.publish(unique("t"), b"0")
            first = await one.publish(unique("t"), b"1", qos=QOS_1, retain=False)
            second = await one.publish(unique("t"), b"2", qos=QOS_2)
        assert (zero.topic, zero.data, zero.qos, zero.retain) == (unique("t"), b"0", 0, False)
        assert (zero.packet_id, zero.puback_packet) == (None, None)
        assert first.packet_id is not None
        assert first.puback_packet is not None
        assert first.puback_packet.packet_id == first.packet_id
        assert first.publish_packet.variable_header.packet_id == first.packet_id
        assert first.publish_packet.payload.data == first.publish_packet.data == b"1"
        assert second.pubrec_packet is not None
        assert second.pubrel_packet is not None
        assert second.pubcomp_packet is not None
        assert second.puback_packet is None
        assert "b'2'" not in repr(second)

    @pytest.mark.parametrize(
        "payload", [b"", b"x", bytearray(b"xy"), memoryview(b"xyz")[::2].tobytes(), b"\0" * 300_000]
    )
    async def test_bytes_like_payloads(
        self, mosquitto: MosquittoServer, unique: Unique, payload: bytes
    ) -> None:
        async with client(mosquitto.url) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            await one.publish(unique("t"), payload, qos=QOS_1)
            assert (await one.deliver_message(5)).data == bytes(payload)

    @pytest.mark.parametrize("payload", ["text", None, 3])
    async def test_other_payloads_are_refused(
        self, mosquitto: MosquittoServer, payload: Any
    ) -> None:
        async with client(mosquitto.url) as one:
            with pytest.raises(TypeError):
                await one.publish("t", payload)

    @pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b", "x" * 65536])
    async def test_bad_topics_are_refused_before_anything_is_sent(
        self, broker: ScriptedBroker, topic: str
    ) -> None:
        async with client(broker.url) as one:
            with pytest.raises(core.InvalidTopic):
                await one.publish(topic, b"x")
            await one.ping()
        assert broker.of(wire.PUBLISH) == []

    async def test_a_bad_quality_of_service_is_refused(self, broker: ScriptedBroker) -> None:
        async with client(broker.url) as one:
            with pytest.raises(ClientError, match="qos is 3"):
                await one.publish("t", b"x", qos=3)
            with pytest.raises(ClientError, match="qos of 't' is 3"):
                await one.subscribe([("t", 3)])

    async def test_overlapping_publishes_keep_their_order_and_the_window(
        self, broker: ScriptedBroker
    ) -> None:
        open_now, most = 0, 0

        def count(packet: Packet) -> bytes | None:
            nonlocal open_now, most
            if packet.type == wire.PUBLISH:
                open_now += 1
                most = max(most, open_now)
                asyncio.get_running_loop().call_later(0.001, acknowledge, packet)
                return b""
            return None

        def acknowledge(packet: Packet) -> None:
            nonlocal open_now
            open_now -= 1
            broker.send(b"\x40\x02" + packet.packet_id.to_bytes(2, "big"))

        broker.answer = count
        async with client(broker.url, max_inflight=10) as one:
            await asyncio.gather(
                *(one.publish("t", str(number).encode(), qos=QOS_1) for number in range(200))
            )
        assert most <= 10
        bodies = [packet.body[5:] for packet in broker.of(wire.PUBLISH)]
        assert bodies == [str(number).encode() for number in range(200)]

    async def test_a_cancelled_publish_harms_no_other(self, broker: ScriptedBroker) -> None:
        broker.puback = False
        async with client(broker.url) as one:
            first = asyncio.create_task(one.publish("t", b"1", qos=QOS_1))
            packet = (await broker.arrived(wire.PUBLISH))[0]
            first.cancel()
            await asyncio.wait([first])
            broker.puback = True
            second = await one.publish("t", b"2", qos=QOS_1)
            # Nobody acknowledged the first, so its identifier is still taken.
            assert second.packet_id != packet.packet_id

    async def test_before_connecting_it_is_an_immediate_error(self) -> None:
        with pytest.raises(ClientError, match="connect\\(\\) first"):
            await MQTTClient().publish("t", b"x")
        with pytest.raises(ClientError, match="connect\\(\\) first"):
            await MQTTClient().subscribe([("t", 0)])
        with pytest.raises(ClientError, match="connect\\(\\) first"):
            await MQTTClient().ping()

    async def test_after_disconnect_it_is_an_immediate_error(
        self, mosquitto: MosquittoServer
    ) -> None:
        one = MQTTClient()
        async with asyncio.timeout(10):
            await one.connect(mosquitto.url)
            await one.disconnect()
        async with asyncio.timeout(20):
            with pytest.raises(ClientError, match="disconnected"):
                await one.publish("t", b"x")
            with pytest.raises(ClientError, match="disconnected"):
                await one.unsubscribe(["t"])

    async def test_offline_buffer_keeps_the_order(self, proxy: FaultProxy, unique: Unique) -> None:
        async with client(url_of(proxy)) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            proxy.refuse()
            await proxy.cut()
            await eventually(lambda: not one.connected)
            publishing = [
                asyncio.create_task(one.publish(unique("t"), str(number).encode(), qos=number % 3))
                for number in range(60)
            ]
            await eventually(lambda: len(one._offline) == 60)
            proxy.refuse(False)
            await eventually(lambda: one.connected)
            publishing.append(asyncio.create_task(one.publish(unique("t"), b"60", qos=QOS_1)))
            await asyncio.gather(*publishing)
            got = [int((await one.deliver_message(5)).data) for _ in range(61)]
        for qos in (1, 2):
            some = [number for number in got if number % 3 == qos and number < 60]
            assert some == sorted(some)
        assert sorted(got) == list(range(61))

    async def test_offline_buffer_is_bounded(self, proxy: FaultProxy) -> None:
        async with client(url_of(proxy), offline_messages=2, offline_bytes=100) as one:
            proxy.refuse()
            await proxy.cut()
            await eventually(lambda: not one.connected)
            waiting = [asyncio.create_task(one.publish("t", b"x" * 40)) for _ in range(2)]
            await eventually(lambda: len(one._offline) == 2)
            with pytest.raises(core.Overflow, match="2 messages of 80 bytes"):
                await one.publish("t", b"x")
            waiting[0].cancel()
            await eventually(lambda: len(one._offline) == 1)
            with pytest.raises(core.Overflow, match="1 messages of 40 bytes"):
                await one.publish("t", b"x" * 61)
            await one.disconnect()
            with pytest.raises(ClientError, match="disconnected"):
                await waiting[1]

    async def test_offline_deadline_says_that_nothing_was_sent(self, proxy: FaultProxy) -> None:
        async with client(url_of(proxy)) as one:
            proxy.refuse()
            await proxy.cut()
            await eventually(lambda: not one.connected)
            with pytest.raises(core.PublishTimeout, match="not sent") as caught:
                await one.publish("t", b"x", qos=QOS_1, ack_timeout=0.05)
            assert caught.value.outcome is core.Outcome.NOT_SENT
            assert not one._offline

    async def test_offline_raise(self, proxy: FaultProxy) -> None:
        async with client(url_of(proxy), offline="raise") as one:
            proxy.refuse()
            await proxy.cut()
            await eventually(lambda: not one.connected)
            with pytest.raises(core.NotConnected, match="offline='buffer'"):
                await one.publish("t", b"x", qos=QOS_1)

    async def test_offline_drop_is_counted(self, proxy: FaultProxy) -> None:
        async with client(url_of(proxy), offline="drop") as one:
            proxy.refuse()
            await proxy.cut()
            await eventually(lambda: not one.connected)
            sent = await one.publish("t", b"x", qos=QOS_1)
            assert (sent.packet_id, sent.puback_packet, one.dropped) == (None, None, 1)

    @pytest.mark.slow
    async def test_nothing_confirmed_is_lost_over_resets(
        self, proxy: FaultProxy, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        total = 400
        async with client(mosquitto.url) as watching, client(url_of(proxy)) as one:
            await watching.subscribe([(unique("t"), QOS_1)])

            async def publish() -> None:
                for start in range(0, total, 20):
                    await asyncio.gather(
                        *(
                            one.publish(unique("t"), str(number).encode(), qos=QOS_1)
                            for number in range(start, start + 20)
                        )
                    )

            publishing = asyncio.create_task(publish())
            got: list[int] = []
            while len(set(got)) < total:
                message = await watching.deliver_message(10)
                got.append(int(message.data))
                if len(got) in (50, 150, 250):
                    await proxy.cut()
            await publishing
        firsts = list(dict.fromkeys(got))
        assert firsts == list(range(total))


# --- subscribing and receiving ----------------------------------------------------------------


class TestSubscribing:
    async def test_granted_codes_are_returned(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto.url) as one:
            codes = await one.subscribe([(unique(str(qos)), qos) for qos in (0, 1, 2)])
            assert codes == [0, 1, 2]
            assert one.subscriptions == {unique(str(qos)): qos for qos in (0, 1, 2)}

    async def test_refused_filters_raise_and_the_others_hold(self, broker: ScriptedBroker) -> None:
        def refuse(packet: Packet) -> bytes | None:
            if packet.type == wire.SUBSCRIBE:
                return b"\x90\x05" + packet.body[:2] + b"\x80\x01\x80"
            return None

        broker.answer = refuse
        async with client(broker.url, subscribe_errors=True) as one:
            with pytest.raises(core.SubscribeFailed, match="'a', 'c'") as caught:
                await one.subscribe([("a", 1), ("b", 1), ("c", 1)])
            assert caught.value.reason == 0x80
            assert one.subscriptions == {"b": 1}

    async def test_refused_filters_are_codes_and_a_warning(
        self, broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        broker.answer = lambda packet: (
            b"\x90\x04" + packet.body[:2] + b"\x80\x01" if packet.type == wire.SUBSCRIBE else None
        )
        async with client(broker.url) as one:
            assert await one.subscribe([("a", 1), ("b", 1)]) == [0x80, 1]
            assert one.subscriptions == {"b": 1}
        (told,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
        assert "refused the subscription to 'a'" in told.getMessage()

    @pytest.mark.parametrize("name", ["", "a/#/b", "a+", "$share//a", "a\0"])
    async def test_bad_filters_are_refused_before_anything_is_sent(
        self, broker: ScriptedBroker, name: str
    ) -> None:
        async with client(broker.url) as one:
            with pytest.raises(core.InvalidFilter):
                await one.subscribe([("good", 0), (name, 0)])
            with pytest.raises(core.InvalidFilter):
                await one.unsubscribe([name])
            with pytest.raises(ClientError, match="no filter"):
                await one.subscribe([])
            with pytest.raises(ClientError, match="no filter"):
                await one.unsubscribe([])
        assert broker.of(wire.SUBSCRIBE) == broker.of(wire.UNSUBSCRIBE) == []

    async def test_shared_subscription(self, mosquitto: MosquittoServer, unique: Unique) -> None:
        async with client(mosquitto.url) as one, client(mosquitto.url) as two:
            for member in (one, two):
                assert await member.subscribe([(f"$share/g/{unique('t')}", QOS_1)]) == [1]
            for number in range(10):
                await one.publish(unique("t"), str(number).encode(), qos=QOS_1)
            await eventually(lambda: one.waiting + two.waiting == 10)
            assert one.waiting == two.waiting == 5

    async def test_subscribing_waits_for_the_next_connection(
        self, proxy: FaultProxy, unique: Unique
    ) -> None:
        async with client(url_of(proxy)) as one:
            proxy.refuse()
            await proxy.cut()
            await eventually(lambda: not one.connected)
            subscribing = asyncio.create_task(one.subscribe([(unique("t"), QOS_1)]))
            proxy.refuse(False)
            assert await subscribing == [1]
            await one.publish(unique("t"), b"x", qos=QOS_1)
            assert (await one.deliver_message(5)).data == b"x"

    async def test_a_connection_lost_before_suback_is_tried_again(
        self, broker: ScriptedBroker
    ) -> None:
        broker.suback = False
        async with client(broker.url) as one:
            subscribing = asyncio.create_task(one.subscribe([("t", 1)]))
            await broker.arrived(wire.SUBSCRIBE)
            broker.suback = True
            broker.cut()
            assert await subscribing == [1]
            assert [packet.connection for packet in broker.of(wire.SUBSCRIBE)] == [1, 2]

    async def test_many_subscriptions_come_back_in_few_packets(
        self, broker: ScriptedBroker
    ) -> None:
        def grant(packet: Packet) -> bytes | None:
            if packet.type != wire.SUBSCRIBE:
                return None
            count, at = 0, 2
            while at < len(packet.body):
                at += 3 + int.from_bytes(packet.body[at : at + 2], "big")
                count += 1
            return b"\x90" + bytes((count + 2,)) + packet.body[:2] + b"\x00" * count

        broker.answer = grant
        async with client(broker.url) as one:
            for start in range(0, 250, 50):
                await one.subscribe([(f"t/{number}", 0) for number in range(start, start + 50)])
            broker.packets.clear()
            broker.cut()
            await eventually(lambda: broker.connections == 2 and one.connected)
            assert len(broker.of(wire.SUBSCRIBE)) == 3
            assert len(one.subscriptions) == 250


class TestReceiving:
    async def test_what_is_delivered(self, mosquitto: MosquittoServer, unique: Unique) -> None:
        async with client(mosquitto.url) as one:
            await one.publish(unique("t"), b"kept", qos=QOS_1, retain=True)
            await one.subscribe([(unique("t"), QOS_1)])
            old = await one.deliver_message(5)
            await one.publish(unique("t"), b"", qos=QOS_2, retain=True)
            new = await one.deliver_message(5)
        assert (old.topic, old.data, old.qos, old.retain) == (unique("t"), b"kept", 1, True)
        assert old.publish_packet.topic_name == unique("t")
        assert old.publish_packet.retain_flag is True
        assert old.packet_id is not None
        assert (new.data, new.qos, new.retain) == (b"", 1, False)

    async def test_timeout(self, mosquitto: MosquittoServer) -> None:
        async with client(mosquitto.url) as one:
            watch = Stopwatch()
            with pytest.raises(asyncio.TimeoutError, match=r"0\.05 s"):
                await one.deliver_message(timeout_duration=0.05)
            assert watch.seconds < 2
            assert not one._receivers

    async def test_iterating(self, mosquitto: MosquittoServer, unique: Unique) -> None:
        got: list[bytes] = []
        async with client(mosquitto.url) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            for number in range(5):
                await one.publish(unique("t"), str(number).encode(), qos=QOS_1)
            async for message in one:
                got.append(message.data)
                if len(got) == 3:
                    break
            closing: list[asyncio.Future[None]] = []
            async for message in one.messages():
                got.append(message.data)
                if len(got) == 5:
                    asyncio.get_running_loop().call_soon(
                        lambda: closing.append(asyncio.ensure_future(one.disconnect()))
                    )
            assert got == [b"0", b"1", b"2", b"3", b"4"]
            await closing[0]

    async def test_several_receivers_share_the_messages(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto.url) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            tasks = [asyncio.create_task(one.deliver_message(5)) for _ in range(10)]
            await eventually(lambda: len(one._receivers) == 10)
            tasks[0].cancel()
            tasks[4].cancel()
            for number in range(8):
                await one.publish(unique("t"), str(number).encode(), qos=QOS_1)
            done = await asyncio.gather(*(task for n, task in enumerate(tasks) if n not in (0, 4)))
            assert [message.data for message in done] == [str(n).encode() for n in range(8)]

    async def test_what_was_received_can_be_taken_after_disconnect(
        self, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto.url) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            await one.publish(unique("t"), b"last", qos=QOS_1)
            await eventually(lambda: one.waiting == 1)
            await one.disconnect()
            assert (await one.deliver_message()).data == b"last"
            with pytest.raises(ClientError):
                await one.deliver_message()

    async def test_receiving_goes_on_over_a_reconnect(
        self, proxy: FaultProxy, mosquitto: MosquittoServer, unique: Unique
    ) -> None:
        async with client(url_of(proxy)) as one, client(mosquitto.url) as other:
            await one.subscribe([(unique("t"), QOS_1)])
            receiving = asyncio.create_task(one.deliver_message())
            await lost_and_back(one, proxy)
            assert not receiving.done()
            await other.publish(unique("t"), b"x", qos=QOS_1)
            assert (await receiving).data == b"x"


# --- reconnecting -----------------------------------------------------------------------------


class TestReconnecting:
    async def test_delays_are_random_doubling_and_bounded(self, broker: ScriptedBroker) -> None:
        clock = VirtualClock(auto=True)
        one = MQTTClient(config={"reconnect_retries": 30, "reconnect_max_interval": 8}, clock=clock)
        async with asyncio.timeout(20):
            await one.connect(broker.url)
            broker.connack = b"\x20\x02\x00\x03"
            broker.cut()
            with pytest.raises(ConnectError) as caught:
                await one.deliver_message()
        assert caught.value.return_code == 3
        assert len(clock.slept) == 31
        assert clock.slept[0] <= 0.5
        assert max(clock.slept) <= 8
        assert len(set(clock.slept)) == 31
        assert max(clock.slept[10:]) > 1.5

    async def test_after_the_last_attempt_everybody_learns_of_it(
        self, broker: ScriptedBroker
    ) -> None:
        clock = VirtualClock()
        one = MQTTClient(config={"reconnect_retries": 2}, clock=clock)
        broker.puback = False
        async with asyncio.timeout(20):
            await one.connect(broker.url)
            receiving = asyncio.create_task(one.deliver_message())
            in_flight = asyncio.create_task(one.publish("t", b"x", qos=QOS_1))
            await broker.arrived(wire.PUBLISH)
            broker.connack = b"\x20\x02\x00\x03"
            broker.packets.clear()
            broker.cut()
            await clock.asleep()
            buffered = asyncio.create_task(one.publish("t", b"y", qos=QOS_1))
            await eventually(lambda: one._offline)
            for _ in range(3):
                await clock.asleep()
                await clock.advance_to_next()
            for task in (receiving, buffered):
                with pytest.raises(ConnectError):
                    await task
            with pytest.raises(core.PublishFailed) as caught:
                await in_flight
            assert caught.value.outcome is core.Outcome.UNKNOWN
            assert len(broker.of(wire.CONNECT)) == 3
            # A failed client can be connected again.
            broker.connack = b"\x20\x02\x00\x00"
            assert await one.reconnect() == 0
            await one.disconnect()

    async def test_without_auto_reconnect_a_loss_is_final(self, broker: ScriptedBroker) -> None:
        async with client(broker.url, auto_reconnect=False) as one:
            receiving = asyncio.create_task(one.deliver_message())
            await eventually(lambda: one._receivers)
            broker.cut()
            with pytest.raises(ConnectError):
                await receiving
            with pytest.raises(ConnectError):
                await one.publish("t", b"x")
            assert broker.connections == 1

    async def test_credentials_refused_later_end_it(self, broker: ScriptedBroker) -> None:
        async with client(broker.url) as one:
            broker.connack = b"\x20\x02\x00\x05"
            broker.cut()
            with pytest.raises(ConnectError) as caught:
                await one.deliver_message()
            assert caught.value.return_code == 5
            assert broker.connections == 2

    async def test_a_broker_that_was_restarted(
        self, mosquitto_own: MosquittoServer, unique: Unique
    ) -> None:
        async with client(mosquitto_own.url) as one:
            await one.subscribe([(unique("t"), QOS_1)])
            await mosquitto_own.kill()
            await eventually(lambda: not one.connected)
            publishing = asyncio.create_task(one.publish(unique("t"), b"x", qos=QOS_1))
            await mosquitto_own.restart()
            await publishing
            assert (await one.deliver_message(5)).data == b"x"

    async def test_disconnect_during_an_outage_ends_at_once(self, proxy: FaultProxy) -> None:
        async with client(url_of(proxy)) as one:
            proxy.refuse()
            await proxy.cut()
            await eventually(lambda: not one.connected)
            watch = Stopwatch()
            await one.disconnect()
            assert watch.seconds < 1

    async def test_disconnect_waits_for_what_is_under_way(
        self, proxy: FaultProxy, unique: Unique
    ) -> None:
        async with client(url_of(proxy)) as one:
            proxy.delay(0.1)
            publishing = asyncio.create_task(one.publish(unique("t"), b"x", qos=QOS_2))
            await eventually(lambda: proxy.taken[Direction.UP] > 40)
            await one.disconnect()
            assert (await publishing).pubcomp_packet is not None

    async def test_the_same_identifier_used_twice_is_told(
        self, mosquitto: MosquittoServer, unique: Unique, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "pubsub_mqtt")
        name = unique("").strip("/")
        one, two = MQTTClient(name), MQTTClient(name)
        try:
            await one.connect(mosquitto.url)
            await two.connect(mosquitto.url)
            # It looks like a broker that crashes, so none of them may give up.
            await eventually(lambda: "does another client use this client_id?" in caplog.text)
        finally:
            await one.disconnect()
            await two.disconnect()


class TestWithAmqttsBroker:
    async def test_the_whole_round(self, amqtt_server: AmqttServer, unique: Unique) -> None:
        async with client(amqtt_server.url) as one:
            assert await one.subscribe([(unique("#"), QOS_2)]) == [2]
            for qos in (0, 1, 2):
                await one.publish(unique("t"), str(qos).encode(), qos=qos)
            assert [(await one.deliver_message(5)).data for _ in range(3)] == [b"0", b"1", b"2"]
            assert await one.ping() > 0
            await one.unsubscribe([unique("#")])


def test_importing_the_client_needs_neither_amqtt_nor_typer() -> None:
    program = (
        "import sys, pubsub_mqtt.client; "
        "print(sorted({'amqtt', 'typer', 'rich', 'wsproto'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"


async def test_cancelling_anything_anywhere_leaves_the_client_whole(
    proxy: FaultProxy, unique: Unique
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    async with client(url_of(proxy), max_inflight=5, offline_messages=5) as one:
        calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
            lambda: one.publish(unique("t"), b"x", qos=rng.randrange(3)),
            lambda: one.subscribe([(unique("t"), rng.randrange(3))]),
            lambda: one.unsubscribe([unique("t")]),
            one.deliver_message,
            one.ping,
        ]
        for turn in range(300):
            tasks = [asyncio.create_task(rng.choice(calls)()) for _ in range(rng.randrange(1, 8))]
            if turn % 60 == 30:
                await proxy.cut()
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                # What was not cancelled in time succeeded, or failed as it should.
                assert not isinstance(result, BaseException) or isinstance(
                    result, (asyncio.CancelledError, ClientError)
                ), result
        await eventually(lambda: one.connected)
        await one.unsubscribe([unique("t")])
        await eventually(lambda: one._driver is not None and not one._driver.connection.unfinished)
        await one.ping()
        while one.waiting:
            await one.deliver_message()
        assert (one._offline_bytes, len(one._offline), len(one._receivers)) == (0, 0, 0)
        assert one._changes == set()
        await one.subscribe([(unique("end"), QOS_2)])
        for number in range(20):
            await one.publish(unique("end"), b"%d" % number, qos=QOS_2)
            assert (await one.deliver_message(5)).data == b"%d" % number
