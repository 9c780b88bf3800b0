"""The asyncio and blocking drivers: dialling, TLS, WebSocket, timeouts, real brokers."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    ConnectTimeout,
    NotConnected,
    Outcome,
    PublishFailed,
    PublishNotAuthorized,
    ServerRefused,
    TLSProblem,
)
from pubsub_core.secrets import Secret
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.connection import Connection, Session, SessionSettings, Subscribe, Will
from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings, WebSocketTarget
from pubsub_mqtt.connection.asyncio_driver import AsyncioDriver, dial
from pubsub_mqtt.connection.blocking_driver import BlockingDriver
from pubsub_mqtt.connection.transport import BufferedSocket
from pubsub_mqtt.errors import ProtocolError
from pubsub_mqtt.packets import Incoming
from pubsub_mqtt.server import AmqttServer, MosquittoServer
from tests.conftest import PASSWORD
from tests.mqtt.scripted import DISCONNECT, PUBLISH, SUBSCRIBE, scripted
from tests.promises.support import Lag
from tests.servers import Authority, Certificate, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

HOST = "127.0.0.1"


class Peer:
    """A driver and what came of it."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("versions", (4,))
        self.connection = Connection(SessionSettings(**settings), backend="mqtt")
        self.driver = AsyncioDriver(self.connection)
        self.messages: list[Incoming] = []
        self.lost: list[ConnectError] = []
        self.connection.on_message = self._received
        self.driver.on_lost = self.lost.append
        self.settle = True

    def _received(self, message: Incoming) -> None:
        self.messages.append(message)
        if message.serial and self.settle:
            self.connection.settle(message.serial)

    async def open(self, endpoint: BrokerAddress, **options: Any) -> Session:
        options.setdefault("timeout", 5)
        session = await self.driver.open(endpoint, **options)
        self.connection.release()
        return session

    async def subscribe(self, filter: str, qos: int = 0) -> int:
        request = await self.driver.subscribe(Subscribe(filter, qos))
        refused = self.connection.refusal(request)
        if refused is not None:
            raise refused
        return request.codes[0]

    async def got(self, count: int, *, within: float = 5.0) -> list[Incoming]:
        await eventually(lambda: len(self.messages) >= count, within=within)
        return self.messages


@asynccontextmanager
async def peer(endpoint: BrokerAddress, **settings: Any) -> AsyncIterator[Peer]:
    made = Peer(**settings)
    await made.open(endpoint)
    try:
        yield made
    finally:
        async with asyncio.timeout(5):
            await made.driver.close(drain=1)


def tcp(port: int) -> BrokerAddress:
    return BrokerAddress(HOST, port)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts and says nothing."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


# --- connecting -----------------------------------------------------------------------


async def test_connack_that_never_comes(silent: int) -> None:
    made = Peer()
    watch = Stopwatch()
    with pytest.raises(ConnectTimeout):
        await made.open(tcp(silent), timeout=0.3)
    assert watch.seconds < 1.0
    assert made.connection.socket is None
    assert made.lost == []


async def test_cancelling_a_connect_closes_its_socket(silent: int) -> None:
    made = Peer()
    task = asyncio.create_task(made.open(tcp(silent)))
    await eventually(lambda: made.connection.connecting)
    task.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert made.connection.socket is None


@pytest.mark.parametrize("transport", ["tcp", "tls", "websocket"])
async def test_connecting_may_be_cancelled_at_any_point(
    mosquitto: MosquittoServer,
    mosquitto_tls: MosquittoServer,
    authority: Authority,
    transport: str,
) -> None:
    endpoint = {
        "tcp": BrokerAddress("localhost", mosquitto.port),
        "tls": BrokerAddress(
            "localhost", mosquitto_tls.port, tls=TLSSettings(ca_file=authority.cafile)
        ),
        "websocket": BrokerAddress(
            "localhost", mosquitto.websocket_port, websocket=WebSocketTarget("/mqtt")
        ),
    }[transport]
    turns = finished = 0
    while finished < 3:
        made = Peer()
        task = asyncio.create_task(made.open(endpoint))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            assert made.connection.socket is None
        else:
            finished += 1
        await made.driver.close()
        turns = turns + 1 if turns < 20 else turns * 2


async def test_a_refused_connection_says_so() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        port = unused.getsockname()[1]
    with pytest.raises(ConnectError, match="ECONNREFUSED") as caught:
        await Peer().open(tcp(port))
    assert caught.value.retryable is True
    assert isinstance(caught.value.__cause__, OSError)


async def test_an_unknown_name_says_so() -> None:
    with pytest.raises(ConnectError, match="cannot be resolved"):
        await Peer().open(BrokerAddress("no-such-host.invalid", 1883))


async def test_a_name_server_that_hangs_does_not_hold_the_deadline_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        release.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    watch = Stopwatch()
    try:
        with pytest.raises(ConnectTimeout):
            await Peer().open(BrokerAddress("slow.example", 1883), timeout=0.2)
        assert watch.seconds < 1.0
    finally:
        release.set()


async def test_the_next_address_is_tried_while_the_first_hangs(
    mosquitto: MosquittoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 9)),  # TEST-NET-1: nobody
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, mosquitto.port)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    watch = Stopwatch()
    async with peer(BrokerAddress("two.example", mosquitto.port)):
        assert watch.seconds < 2.0


async def test_garbage_instead_of_connack() -> None:
    async with scripted() as broker:
        broker.connack = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        with pytest.raises(ProtocolError):
            await Peer().open(tcp(broker.port))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (1, ServerRefused),
        (2, ServerRefused),
        (3, ServerRefused),
        (4, AuthenticationFailed),
        (5, AuthenticationFailed),
    ],
)
async def test_refusals(code: int, kind: type[ConnectError]) -> None:
    async with scripted() as broker:
        broker.connack = bytes((0x20, 2, 0, code))
        with pytest.raises(kind) as caught:
            await Peer().open(tcp(broker.port))
        assert getattr(caught.value, "reason", None) == code
        assert caught.value.retryable is (code == 3)
        assert broker.connections == 1


@pytest.mark.parametrize("connack", [b"\x20\x02\x00\x01", b"\x20\x03\x00\x84\x00", None])
async def test_auto_falls_back_to_311_once(connack: bytes | None) -> None:
    async with scripted() as broker:

        def answer(packet: Any) -> bytes | None:
            if packet.type != 1:
                return None
            if packet.body[6] == 4:
                return b"\x20\x02\x00\x00"
            if connack is None:
                broker.cut()
            return connack or b""

        broker.answer = answer
        made = Peer(versions=(5, 4))
        session = await made.open(tcp(broker.port))
        assert session.version == 4
        assert broker.connections == 2
        await made.driver.close()


async def test_wrong_credentials(mosquitto_users: MosquittoServer) -> None:
    for version in (4, 5):
        made = Peer(versions=(version,), username="alice", password=Secret("wrong"))
        with pytest.raises(AuthenticationFailed) as caught:
            await made.open(tcp(mosquitto_users.port))
        assert caught.value.retryable is False
        assert "wrong" not in str(caught.value)
    async with peer(tcp(mosquitto_users.port), username="alice", password=Secret(PASSWORD)):
        pass


async def test_dialling_never_blocks_the_loop(
    mosquitto_tls: MosquittoServer, authority: Authority
) -> None:
    tls = TLSSettings(ca_file=authority.cafile)
    async with Lag() as lag:
        for endpoint in (
            BrokerAddress("localhost", mosquitto_tls.port, tls=tls),
            BrokerAddress(
                "localhost",
                mosquitto_tls.websocket_port,
                tls=tls,
                websocket=WebSocketTarget("/mqtt"),
            ),
        ):
            async with peer(endpoint):
                pass
    assert lag.worst < 0.05


# --- transports -----------------------------------------------------------------------


async def round_trip(endpoint: BrokerAddress, topic: str, **settings: Any) -> None:
    async with peer(endpoint, **settings) as made:
        await made.subscribe(topic, 2)
        for qos in (0, 1, 2):
            await made.driver.publish(topic, b"%d" % qos, qos=qos)
        await made.got(3)
        assert sorted(message.payload for message in made.messages) == [b"0", b"1", b"2"]


async def test_tcp(mosquitto: MosquittoServer, unique: Callable[..., str]) -> None:
    await round_trip(tcp(mosquitto.port), unique())
    await round_trip(tcp(mosquitto.port), unique(), versions=(5,))


async def test_unix_socket(mosquitto: MosquittoServer, unique: Callable[..., str]) -> None:
    assert mosquitto.unix_path
    await round_trip(BrokerAddress(unix_path=str(mosquitto.unix_path)), unique())


async def test_amqtt(amqtt_server: AmqttServer, unique: Callable[..., str]) -> None:
    await round_trip(tcp(amqtt_server.port), unique(), versions=(5, 4))


async def test_tls_with_a_private_ca(
    mosquitto_tls: MosquittoServer, authority: Authority, unique: Callable[..., str]
) -> None:
    from pathlib import Path

    pem = Path(authority.cafile).read_text()
    for tls in (TLSSettings(ca_file=authority.cafile), TLSSettings(ca_data=pem)):
        await round_trip(BrokerAddress("localhost", mosquitto_tls.port, tls=tls), unique())
    with pytest.raises(TLSProblem) as caught:
        await Peer().open(BrokerAddress("localhost", mosquitto_tls.port, tls=TLSSettings()))
    assert caught.value.retryable is False
    assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


async def test_tls_large_messages(
    mosquitto_tls: MosquittoServer, authority: Authority, unique: Callable[..., str]
) -> None:
    tls = TLSSettings(ca_file=authority.cafile)
    topic = unique()
    async with peer(BrokerAddress("localhost", mosquitto_tls.port, tls=tls)) as made:
        await made.subscribe(topic, 1)
        payload = bytes(range(256)) * 8192
        for _ in range(3):
            await made.driver.publish(topic, payload, qos=1)
        await made.got(3, within=20)
        assert all(message.payload == payload for message in made.messages)


async def test_tls_refuses_a_wrong_host(
    mosquitto_wrong_host: MosquittoServer, authority: Authority
) -> None:
    tls = TLSSettings(ca_file=authority.cafile)
    with pytest.raises(TLSProblem, match="certificate"):
        await Peer().open(BrokerAddress("localhost", mosquitto_wrong_host.port, tls=tls))


async def test_tls_refuses_an_expired_certificate(
    mosquitto_expired: MosquittoServer, authority: Authority
) -> None:
    tls = TLSSettings(ca_file=authority.cafile)
    with pytest.raises(TLSProblem, match="expired"):
        await Peer().open(BrokerAddress("localhost", mosquitto_expired.port, tls=tls))


async def test_tls_verification_is_only_switched_off_loudly(
    mosquitto_wrong_host: MosquittoServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pubsub_mqtt.connection.address._warned_insecure", False)
    tls = TLSSettings(insecure_skip_verify=True)
    for _ in range(2):
        async with peer(BrokerAddress("localhost", mosquitto_wrong_host.port, tls=tls)):
            pass
    warnings = [record for record in caplog.records if "insecure" in record.message]
    assert len(warnings) == 1
    assert warnings[0].levelname == "WARNING"


async def test_tls_client_certificate(
    mosquitto_client_certificates: MosquittoServer,
    authority: Authority,
    client_certificate: Certificate,
    unique: Callable[..., str],
) -> None:
    port = mosquitto_client_certificates.port
    with pytest.raises(ConnectError) as caught:
        await Peer().open(
            BrokerAddress("localhost", port, tls=TLSSettings(ca_file=authority.cafile))
        )
    assert isinstance(caught.value, TLSProblem)
    tls = TLSSettings(
        ca_file=authority.cafile,
        cert_file=client_certificate.certfile,
        key_file=client_certificate.keyfile,
    )
    await round_trip(BrokerAddress("localhost", port, tls=tls), unique())


async def test_tls_needs_tls_on_the_other_side(mosquitto: MosquittoServer) -> None:
    with pytest.raises(ConnectError):
        await Peer().open(BrokerAddress("localhost", mosquitto.port, tls=TLSSettings()))


@pytest.mark.parametrize("name", ["ca_file", "ca_path", "cert_file"])
async def test_tls_files_that_do_not_exist(name: str) -> None:
    paths: dict[str, Any] = {name: "/no/such/file"}
    tls = TLSSettings(**paths)
    with pytest.raises(TLSProblem, match=name.partition("_")[0].replace("cert", "certificate")):
        await Peer().open(BrokerAddress("localhost", 1, tls=tls))


def test_tls_below_1_2_is_never_spoken() -> None:
    assert TLSSettings().build().minimum_version == ssl.TLSVersion.TLSv1_2
    assert TLSSettings(min_version="1.3").build().minimum_version == ssl.TLSVersion.TLSv1_3
    context = TLSSettings().build()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


async def test_websocket(mosquitto: MosquittoServer, unique: Callable[..., str]) -> None:
    endpoint = BrokerAddress(HOST, mosquitto.websocket_port, websocket=WebSocketTarget("/mqtt"))
    await round_trip(endpoint, unique())


async def test_websocket_with_tls(
    mosquitto_tls: MosquittoServer, authority: Authority, unique: Callable[..., str]
) -> None:
    endpoint = BrokerAddress(
        "localhost",
        mosquitto_tls.websocket_port,
        tls=TLSSettings(ca_file=authority.cafile),
        websocket=WebSocketTarget("/mqtt"),
    )
    await round_trip(endpoint, unique())


async def test_websocket_large_messages(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    endpoint = BrokerAddress(HOST, mosquitto.websocket_port, websocket=WebSocketTarget("/mqtt"))
    topic = unique()
    async with peer(endpoint) as made:
        await made.subscribe(topic, 1)
        payload = bytes(range(256)) * 257  # the third form of a frame's length
        await made.driver.publish(topic, payload, qos=1)
        (message,) = await made.got(1)
        assert message.payload == payload


class WebSocketBroker:
    """A WebSocket server that answers as told."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.reject = 0
        self.data = bytearray()
        self.pongs: list[bytes] = []
        self.port = 0
        self.chunks: list[bytes] = []
        self.masked = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from wsproto import ConnectionType, WSConnection, events

        machine = WSConnection(ConnectionType.SERVER)
        try:
            while data := await reader.read(65536):
                machine.receive_data(data)
                for event in machine.events():
                    match event:
                        case events.Request():
                            self.requests.append(event)
                            if self.reject:
                                writer.write(
                                    machine.send(events.RejectConnection(status_code=self.reject))
                                )
                                writer.close()
                                return
                            writer.write(machine.send(events.AcceptConnection(subprotocol="mqtt")))
                        case events.BytesMessage():
                            self.data += event.data
                            for chunk in self.chunks:
                                writer.write(chunk)
                            self.chunks = []
                        case events.Pong():
                            self.pongs.append(bytes(event.payload))
                        case _:
                            pass
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def websocket_broker() -> AsyncIterator[WebSocketBroker]:
    broker = WebSocketBroker()
    server = await asyncio.start_server(broker.serve, HOST, 0)
    broker.port = server.sockets[0].getsockname()[1]
    try:
        yield broker
    finally:
        server.close()
        await server.wait_closed()


def frame(data: bytes, *, opcode: int = 2, final: bool = True) -> bytes:
    assert len(data) < 126
    return bytes((0x80 * final | opcode, len(data))) + data


async def test_websocket_request_and_frames() -> None:
    async with websocket_broker() as broker:
        broker.chunks = [
            # CONNACK in two fragments with a ping between them, then two packets and a
            # half in one frame and the rest in another.
            frame(b"\x20\x02", final=False),
            frame(b"are you there", opcode=9),
            frame(b"\x00\x00", opcode=0),
            frame(b"\x30\x03\x00\x01a\x30\x03\x00\x01b\x30\x03"),
            frame(b"\x00\x01c"),
        ]
        endpoint = BrokerAddress(
            HOST, broker.port, websocket=WebSocketTarget("/some/path?x=1", {"X-Key": "value"})
        )
        made = Peer()
        await made.open(endpoint)
        (request,) = broker.requests
        assert request.target == "/some/path?x=1"
        assert request.subprotocols == ["mqtt"]
        assert (b"x-key", b"value") in [
            (name.lower(), value) for name, value in request.extra_headers
        ]
        await made.got(3)
        assert [message.topic for message in made.messages] == ["a", "b", "c"]
        await eventually(lambda: broker.pongs == [b"are you there"])
        assert broker.data[:1] == b"\x10"
        await made.driver.close()
        await eventually(lambda: broker.data.endswith(b"\xe0\x00"))


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [(401, AuthenticationFailed, False), (404, ServerRefused, False), (503, ServerRefused, True)],
)
async def test_websocket_refusals(status: int, kind: type[ConnectError], retryable: bool) -> None:
    async with websocket_broker() as broker:
        broker.reject = status
        with pytest.raises(kind, match=str(status)) as caught:
            await Peer().open(BrokerAddress(HOST, broker.port, websocket=WebSocketTarget("/x")))
        assert caught.value.retryable is retryable


async def test_websocket_text_frames_end_the_session() -> None:
    async with websocket_broker() as broker:
        broker.chunks = [frame(b"\x20\x02\x00\x00"), frame(b"hello", opcode=1)]
        made = Peer()
        await made.open(BrokerAddress(HOST, broker.port, websocket=WebSocketTarget("/x")))
        await eventually(lambda: len(made.lost) == 1)
        assert "text frame" in str(made.lost[0])


async def test_websocket_handshake_timeout(silent: int) -> None:
    with pytest.raises(ConnectTimeout):
        await Peer().open(
            BrokerAddress(HOST, silent, websocket=WebSocketTarget("/mqtt")), timeout=0.3
        )


async def test_tls_handshake_timeout(silent: int) -> None:
    with pytest.raises(ConnectTimeout):
        await Peer().open(BrokerAddress(HOST, silent, tls=TLSSettings()), timeout=0.5)


async def test_dial_leaves_nothing_behind_when_it_fails(silent: int) -> None:
    task = asyncio.create_task(dial(BrokerAddress(HOST, silent, tls=TLSSettings())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gc.collect()


# --- traffic --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 + 1, 16 * 1024 * 1024])
async def test_payload_sizes(
    mosquitto: MosquittoServer, unique: Callable[..., str], size: int
) -> None:
    topic = unique()
    async with peer(tcp(mosquitto.port)) as made:
        await made.subscribe(topic, 1)
        payload = b"z" * size
        await made.driver.publish(topic, payload, qos=1)
        (message,) = await made.got(1, within=20)
        assert message.payload == payload


@pytest.mark.parametrize("version", [4, 5])
async def test_retained_flag(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: int
) -> None:
    topic = unique()
    async with peer(tcp(mosquitto.port), versions=(version,)) as made:
        await made.driver.publish(topic, b"kept", qos=1, retain=True)
        await made.subscribe(topic, 1)
        await made.got(1)
        await made.driver.publish(topic, b"", qos=1, retain=True)
        await made.got(2)
        assert [(each.payload, each.retain) for each in made.messages] == [
            (b"kept", True),
            (b"", False),
        ]


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_order_and_number_of_concurrent_publishes(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: int, qos: int
) -> None:
    topic = unique()
    async with peer(tcp(mosquitto.port), versions=(version,)) as made:
        await made.subscribe(topic, qos)
        async with asyncio.timeout(20):
            await asyncio.gather(
                *(made.driver.publish(topic, b"%d" % n, qos=qos) for n in range(500))
            )
        await made.got(500)
        assert [int(message.payload) for message in made.messages] == list(range(500))


async def test_cancelling_one_publish_does_not_break_others() -> None:
    async with scripted() as broker:
        broker.puback = False
        made = Peer(max_inflight=2)
        await made.open(tcp(broker.port))
        first, second, third = (
            asyncio.create_task(made.driver.publish("t", b"%d" % n, qos=1)) for n in range(3)
        )
        await broker.arrived(PUBLISH, 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert len(broker.of(PUBLISH)) == 2
        broker.send(b"\x40\x02\x00\x02")
        async with asyncio.timeout(20):
            await second
        third_packet = (await broker.arrived(PUBLISH, 3))[2]
        assert third_packet.packet_id == 3, "1 is not answered yet"
        broker.send(b"\x40\x02\x00\x03\x40\x02\x00\x01")
        async with asyncio.timeout(20):
            await third
        await eventually(lambda: made.connection.unfinished == 0)
        await made.driver.close()


async def test_a_refused_filter_does_not_harm_the_others(
    mosquitto_users: MosquittoServer,
) -> None:
    async with scripted() as broker:
        broker.answer = lambda packet: (
            b"\x90\x03" + packet.body[:2] + (b"\x80" if b"bad" in packet.body else b"\x01")
            if packet.type == SUBSCRIBE
            else None
        )
        async with peer(tcp(broker.port)) as made:
            good, bad = await asyncio.gather(
                made.subscribe("good", 1), made.subscribe("bad", 1), return_exceptions=True
            )
            assert good == 1
            assert getattr(bad, "code", "") == "subscribe_failed"
            assert getattr(bad, "reason", None) == 0x80


async def test_refused_publishes_raise_under_5(mosquitto_users: MosquittoServer) -> None:
    async with peer(
        tcp(mosquitto_users.port), versions=(5,), username="alice", password=Secret(PASSWORD)
    ) as made:
        for qos in (1, 2):
            with pytest.raises(PublishNotAuthorized) as caught:
                await made.driver.publish("forbidden/x", b"", qos=qos)
            assert caught.value.outcome is Outcome.REJECTED
        sent = await made.driver.publish("open/x", b"", qos=1)
        assert sent.reason == 0x10, "nobody is subscribed"


async def test_unanswered_publishes_survive_the_session(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    client_id = unique("id").replace("/", "-")
    async with (
        FaultProxy(HOST, mosquitto.port) as proxy,
        peer(tcp(mosquitto.port)) as listener,
        peer(tcp(proxy.port), client_id=client_id, clean_start=False) as made,
    ):
        await listener.subscribe(topic, 2)
        proxy.stall(direction=Direction.DOWN)
        tasks = [
            asyncio.create_task(made.driver.publish(topic, b"%d" % n, qos=2)) for n in range(50)
        ]
        await eventually(lambda: made.connection.stats.packets_out >= 20)
        await proxy.cut()
        await eventually(lambda: len(made.lost) == 1)
        proxy.heal()
        assert not any(task.done() for task in tasks)
        await made.open(tcp(proxy.port))
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        await listener.got(50)
        assert [int(each.payload) for each in listener.messages] == list(range(50))
        assert made.connection.stats.resent == 19


async def test_qos_0_waits_for_a_slow_link_instead_of_memory() -> None:
    reading = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x20\x02\x00\x00")
        await reading.wait()  # until then nothing is read
        while await reader.read(1 << 20):
            pass
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0, limit=1)
    made = Peer()
    await made.open(tcp(server.sockets[0].getsockname()[1]))
    published = 0

    async def flood() -> None:
        nonlocal published
        for _ in range(400):
            await made.driver.publish("t", b"x" * 65536)
            published += 1

    flooding = asyncio.create_task(flood())
    await eventually(lambda: made.connection.unsent > 0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert published < 400
    assert made.connection.unsent <= 65536 + 100
    reading.set()
    async with asyncio.timeout(10):
        await flooding
    await made.driver.close()
    server.close()
    await server.wait_closed()


def held_back(sock: BufferedSocket) -> int:
    """Return how many bytes the system has taken and not sent yet (SIOCOUTQNSD, tcp(7))."""
    answer = fcntl.ioctl(sock.fileno(), 0x894B, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def test_what_is_pushed_has_left_and_arrives_with_the_flush() -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with theirs:
        theirs.settimeout(5)
        sock = BufferedSocket(ours, corks=True)
        for number in range(10):
            sock.write(b"%d" % number)
            assert sock.push()
            assert sock.idle
            assert sock.done == sock.begun == sock.written == number + 1
        assert sock.flush()
        assert held_back(sock) == 0, "the system itself would wait 0.2 s"
        got = b""
        while len(got) < 10:
            got += theirs.recv(100)
        assert got == b"0123456789"
        sock.close()


async def test_a_lone_message_is_not_held_back(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with peer(tcp(mosquitto.port)) as made:
        await made.subscribe(topic)
        sock = made.driver.connection.socket
        assert sock is not None
        for number in range(5):
            assert made.driver.try_publish(topic, b"x")
            assert sock.idle, "it is the system's already"
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert held_back(sock) == 0, "the system itself would wait 0.2 s"
            await made.got(number + 1)


# --- the end --------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
async def test_will_after_an_abort_and_not_after_a_disconnect(
    mosquitto: MosquittoServer, unique: Callable[..., str], version: int
) -> None:
    topic = unique()
    async with peer(tcp(mosquitto.port)) as listener:
        await listener.subscribe(topic, 1)
        for end in ("disconnect", "abort"):
            made = Peer(versions=(version,), will=Will(topic, end.encode(), 1))
            await made.open(tcp(mosquitto.port))
            if end == "disconnect":
                # Unread input at the moment of closing must not turn it into a reset.
                await made.subscribe(topic)
                await listener.driver.publish(topic, b"unread", qos=1)
                await made.driver.close()
            else:
                made.driver.abort()
        await listener.got(2)
        assert [each.payload for each in listener.messages] == [b"unread", b"abort"]


async def test_close_flushes_pending_publishes(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with peer(tcp(mosquitto.port)) as listener:
        await listener.subscribe(topic, 1)
        made = Peer(max_inflight=5)
        await made.open(tcp(mosquitto.port))
        tasks = [
            asyncio.create_task(made.driver.publish(topic, b"%d" % n, qos=n % 2))
            for n in range(200)
        ]
        await asyncio.sleep(0)
        await made.driver.close(drain=5)
        await asyncio.gather(*tasks)
        await listener.got(200)


async def test_close_is_bounded_and_tells_what_was_abandoned() -> None:
    async with scripted() as broker:
        broker.puback = False
        made = Peer(max_inflight=1)
        await made.open(tcp(broker.port))
        sent, waiting = (
            asyncio.create_task(made.driver.publish("t", b"", qos=1)) for _ in range(2)
        )
        await broker.arrived(PUBLISH)
        watch = Stopwatch()
        await made.driver.close(drain=0.2)
        assert watch.seconds < 2.0
        with pytest.raises(PublishFailed) as caught:
            await sent
        assert caught.value.outcome is Outcome.UNKNOWN
        with pytest.raises(PublishFailed) as caught:
            await waiting
        assert caught.value.outcome is Outcome.NOT_SENT
        await broker.arrived(DISCONNECT)


async def test_close_is_legal_in_any_state(mosquitto: MosquittoServer) -> None:
    made = Peer()
    await made.driver.close()
    await made.open(tcp(mosquitto.port))
    await asyncio.gather(made.driver.close(), made.driver.close())
    await made.driver.close(drain=1)
    with pytest.raises(NotConnected):
        await made.driver.publish("t", b"")
    with pytest.raises(NotConnected):
        await made.driver.ping()


async def test_closing_ends_an_attempt_to_connect(silent: int) -> None:
    made = Peer()
    connecting = asyncio.create_task(made.open(tcp(silent)))
    await eventually(lambda: made.connection.connecting)
    await made.driver.close(drain=5)
    async with asyncio.timeout(20):
        with pytest.raises(ConnectError, match="closed while"):
            await connecting
    dialling = asyncio.create_task(made.open(tcp(silent)))
    await asyncio.sleep(0)
    await made.driver.close()
    async with asyncio.timeout(20):
        with pytest.raises(ConnectError, match="closed while"):
            await dialling


async def test_closing_twice_at_once_waits_once() -> None:
    async with scripted() as broker:
        broker.puback = False
        made = Peer()
        await made.open(tcp(broker.port))
        publishing = asyncio.create_task(made.driver.publish("t", b"", qos=1))
        await broker.arrived(PUBLISH)
        closing = asyncio.gather(made.driver.close(drain=5), made.driver.close(drain=5))
        await asyncio.sleep(0)
        broker.send(b"\x40\x02\x00\x01")
        async with asyncio.timeout(20):
            await closing
            await publishing


async def test_a_driver_opens_again_after_a_loss(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with FaultProxy(HOST, mosquitto.port) as proxy:
        made = Peer()
        for number in range(1, 6):
            await made.open(tcp(proxy.port))
            assert (await made.driver.ping()) < 2
            await proxy.cut()
            while len(made.lost) < number:
                await asyncio.sleep(0)
        await made.driver.close()


async def test_requests_end_with_the_session() -> None:
    async with scripted() as broker:
        broker.suback = broker.pingresp = False
        made = Peer()
        await made.open(tcp(broker.port))
        tasks = [
            asyncio.create_task(made.subscribe("a")),
            asyncio.create_task(made.driver.unsubscribe("a")),
            asyncio.create_task(made.driver.ping()),
        ]
        await broker.arrived(12)
        broker.cut()
        async with asyncio.timeout(20):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [NotConnected] * 3
        await made.driver.close()


# --- keepalive ------------------------------------------------------------------------


async def test_a_dead_peer_is_noticed_in_time() -> None:
    async with scripted() as broker:
        broker.pingresp = False
        made = Peer(keepalive=2)
        began = time.monotonic()
        await made.open(tcp(broker.port))
        watch = Stopwatch()
        await eventually(lambda: len(made.lost) == 1)
        assert watch.seconds <= 4.0
        assert time.monotonic() - began >= 2.5
        assert len(broker.of(12)) >= 1


async def test_a_dead_peer_is_noticed_while_publishing_without_pause() -> None:
    async with scripted() as broker:
        broker.pingresp = False
        made = Peer(keepalive=2)
        await made.open(tcp(broker.port))
        watch = Stopwatch()

        async def flood() -> None:
            while True:
                await made.driver.publish("t", b"x")
                await asyncio.sleep(0.01)

        flooding = asyncio.create_task(flood())
        await eventually(lambda: len(made.lost) == 1)
        assert watch.seconds <= 4.0
        with pytest.raises((NotConnected, PublishFailed)):
            await flooding


async def test_a_living_peer_is_kept(mosquitto: MosquittoServer) -> None:
    async with peer(tcp(mosquitto.port), keepalive=1) as made:
        await eventually(lambda: made.connection.stats.pings >= 4)
        assert made.lost == []


# --- the blocking driver --------------------------------------------------------------


def blocking(port: int, **settings: Any) -> BlockingDriver:
    settings.setdefault("versions", (5, 4))
    return BlockingDriver(SessionSettings(**settings), tcp(port), backend="mqtt", timeout=5)


async def off_loop(function: Callable[[], None]) -> None:
    """Run a test that has no loop in a thread that ends with it."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    await eventually(lambda: not thread.is_alive(), within=20)
    if failures:
        raise failures[0]


async def test_blocking_loop_start(mosquitto: MosquittoServer, unique: Callable[..., str]) -> None:
    topic = unique()

    def work() -> None:
        made = blocking(mosquitto.port)
        got: list[bytes] = []
        everything = threading.Event()

        def received(message: Incoming) -> None:
            got.append(message.payload)
            if message.payload == b"0":
                made.publish(topic, b"from the callback", qos=1)
            if len(got) == 4:
                everything.set()

        made.on_message = received
        made.on_session = lambda session: None
        made.connect()
        made.loop_start()
        try:
            subscribed = threading.Event()
            made.subscribe(Subscribe(topic, 2), on_done=lambda request: subscribed.set())
            assert subscribed.wait(5)
            answered = threading.Event()
            for qos in (0, 1):
                made.publish(topic, b"%d" % qos, qos=qos)
            made.publish(topic, b"2", qos=2, on_done=lambda out: answered.set())
            assert answered.wait(5)
            assert everything.wait(5)
        finally:
            made.disconnect()
            made.loop_stop()

    await off_loop(work)


async def test_blocking_loop_forever_reconnects(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with FaultProxy(HOST, mosquitto.port) as proxy:
        made = blocking(proxy.port)
        sessions: list[Session] = []
        lost: list[ConnectError] = []
        made.on_session = sessions.append
        made.on_lost = lost.append

        def work() -> None:
            made.connect()
            made.loop_forever()

        thread = threading.Thread(target=work)
        thread.start()
        await eventually(lambda: len(sessions) == 1)
        await proxy.cut()
        await eventually(lambda: len(lost) >= 1)
        await eventually(lambda: len(sessions) == 2)
        assert made.connection.connected
        made.disconnect()
        await eventually(lambda: not thread.is_alive())


async def test_blocking_refusal(mosquitto_users: MosquittoServer) -> None:
    def work() -> None:
        made = blocking(mosquitto_users.port, username="alice", password=Secret("wrong"))
        with pytest.raises(AuthenticationFailed):
            made.connect()
        made.disconnect()

    await off_loop(work)


async def test_blocking_timeout(silent: int) -> None:
    def work() -> None:
        made = BlockingDriver(
            SessionSettings(versions=(4,)), tcp(silent), backend="mqtt", timeout=0.3
        )
        with pytest.raises(ConnectTimeout):
            made.connect()
        made.disconnect()

    await off_loop(work)
