"""The asyncio driver with real and scripted brokers: connecting, traffic, and the end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
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
)
from pubsub_core.secrets import Secret
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.connection import Will
from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings, WebSocketTarget
from pubsub_mqtt.errors import ProtocolError
from pubsub_mqtt.server import MosquittoServer
from tests.conftest import PASSWORD
from tests.mqtt.drivers import HOST, Peer, held_back, peer, tcp
from tests.mqtt.scripted import DISCONNECT, PUBLISH, SUBSCRIBE, scripted
from tests.promises.support import Lag
from tests.servers import Authority, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

# --- connecting ------------------------------------------------------------------------


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


# --- traffic ---------------------------------------------------------------------------


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


# --- the end ---------------------------------------------------------------------------


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


# --- keepalive -------------------------------------------------------------------------


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
