"""TCP, Unix sockets, TLS and WebSocket, to real and scripted brokers."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    ConnectTimeout,
    ServerRefused,
    TLSProblem,
)
from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings, WebSocketTarget
from pubsub_mqtt.connection.asyncio_driver import dial
from pubsub_mqtt.connection.transport import BufferedSocket
from pubsub_mqtt.server import AmqttServer, MosquittoServer
from tests.mqtt.drivers import HOST, Peer, held_back, peer, round_trip, tcp
from tests.servers import Authority, Certificate, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")


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
