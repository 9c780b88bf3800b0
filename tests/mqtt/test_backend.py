"""The MQTT backend below the core and through a bus, on Mosquitto with 3.1.1 and 5."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

import pytest

from pubsub_core import (
    BadOption,
    Bus,
    Cap,
    ConfirmedBy,
    ConnectError,
    InvalidFilter,
    Level,
    NotConnected,
    NotSupported,
    Origin,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
    PubSubError,
    Redelivery,
    Secret,
    Status,
    SubscribeFailed,
    TakenOver,
    connect,
)
from pubsub_core.config.options import build, parse_url
from pubsub_core.events import InterestEvent, Notice, StatusChanged, SubscriptionRefused
from pubsub_core.interfaces import (
    Address,
    AuthorizationRequest,
    BackendContext,
    HasAcknowledgement,
    HasHistory,
    HasNotifications,
    HasPresence,
    HasRetained,
    HasUnicast,
    WireSub,
)
from pubsub_core.message import Headers, InFrame, OutFrame, Verdict
from pubsub_core.testing.proxy import FaultProxy
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.connection.address import broker_address
from pubsub_mqtt.connection.session_data import settings_of
from pubsub_mqtt.options import MQTTOptions, TopicDefaults, WillOptions
from pubsub_mqtt.plugin import INFO
from pubsub_mqtt.server import AmqttServer, MosquittoServer
from tests.conftest import PASSWORD
from tests.mqtt.scripted import SUBSCRIBE, UNSUBSCRIBE, Packet, scripted
from tests.servers import Authority, Certificate, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

BOTH = pytest.mark.parametrize("protocol", ["3.1.1", "5"])


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self, backend: MQTTBackend | None = None) -> None:
        self.frames: list[InFrame] = []
        self.errors: list[BaseException] = []
        self.notices: list[Notice] = []
        self.settle_with = backend

    def deliver(self, frame: InFrame) -> None:
        self.frames.append(frame)
        if self.settle_with is not None and frame.tag is not None:
            self.settle_with.settle(frame.tag, Verdict.ACK)

    def interest(self, event: InterestEvent) -> None:
        raise AssertionError(f"MQTT knows no interest: {event}")

    def authorization(self, request: AuthorizationRequest) -> None:
        raise AssertionError(f"MQTT asks nothing: {request}")

    def notice(self, notice: Notice) -> None:
        self.notices.append(notice)

    def sent_again(self, topic: str) -> None:
        raise AssertionError(f"MQTT has no rate limit that counts {topic!r} again")

    def lost(self, error: BaseException) -> None:
        self.errors.append(error)

    async def got(self, count: int, *, within: float = 5.0) -> list[InFrame]:
        await eventually(lambda: len(self.frames) >= count, within=within)
        return self.frames


def backend(port: int, **options: Any) -> MQTTBackend:
    return MQTTBackend(
        BackendContext(INFO, Address("mqtt", "127.0.0.1", port), MQTTOptions(**options))
    )


@asynccontextmanager
async def session(
    port: int, *, settle: bool = True, **options: Any
) -> AsyncIterator[tuple[MQTTBackend, Recorder]]:
    made = backend(port, **options)
    sink = Recorder(made if settle else None)
    async with asyncio.timeout(5):
        await made.open(sink)
        await made.restored()
    try:
        yield made, sink
    finally:
        async with asyncio.timeout(5):
            await made.close(drain=1)


def out(topic: str, payload: bytes = b"", **values: Any) -> OutFrame:
    return OutFrame(topic=topic, payload=payload, **values)


# --- registration ---------------------------------------------------------------------


def test_announcing_needs_no_paho() -> None:
    program = (
        "import sys; sys.modules['paho'] = None\n"
        "import pubsub_mqtt.plugin as plugin\n"
        "assert plugin.INFO.name == 'mqtt'\n"
        "assert not any(name.startswith('paho.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_the_package_imports_its_names_when_they_are_used() -> None:
    import pubsub_mqtt

    assert pubsub_mqtt.__all__ == sorted(pubsub_mqtt.__all__, key=_isort_key)
    for name in pubsub_mqtt.__all__:
        assert getattr(pubsub_mqtt, name) is not None, name
    with pytest.raises(AttributeError):
        _ = pubsub_mqtt.nothing


def _isort_key(name: str) -> tuple[bool, str]:
    return (not name.isupper(), name) if "_" in name else (True, name)


def test_what_is_declared_is_implemented() -> None:
    powers = {
        Cap.ACK: HasAcknowledgement,
        Cap.RETAINED: HasRetained,
        Cap.HISTORY: HasHistory,
        Cap.PRESENCE: HasPresence,
        Cap.NOTIFICATIONS: HasNotifications,
        Cap.UNICAST: HasUnicast,
    }
    made = backend(1883)
    for cap, power in powers.items():
        assert bool(INFO.capabilities[cap]) is isinstance(made, power), cap
    assert set(INFO.capabilities) == set(Cap)
    for cap, support in INFO.capabilities.items():
        assert support or support.why, f"{cap} is missing without a reason"


def test_every_option_has_help() -> None:
    for field in fields(MQTTOptions):
        assert field.metadata["help"], field.name


# --- addresses and options --------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "path"),
    [
        ("mqtt://broker", "broker", 1883, False, None),
        ("mqtt://broker/", "broker", 1883, False, None),
        ("tcp://broker:1", "broker", 1, False, None),
        ("mqtts://broker", "broker", 8883, True, None),
        ("ssl://broker", "broker", 8883, True, None),
        ("ws://broker", "broker", 80, False, "/mqtt"),
        ("ws://broker/", "broker", 80, False, "/"),
        ("wss://broker/a/b", "broker", 443, True, "/a/b"),
        ("wss://broker/a?ws_path=b", "broker", 443, True, "/b"),
        ("mqtt://[::1]:1884", "::1", 1884, False, None),
    ],
)
def test_addresses(url: str, host: str, port: int, tls: bool, path: str | None) -> None:
    address, query = parse_url(url)
    options = build(MQTTOptions, query, where=url, backend="mqtt")
    where = broker_address(address, options)
    assert (where.host, where.port, where.tls is not None) == (host, port, tls)
    assert (where.websocket.path if where.websocket else None) == path


def test_a_unix_socket() -> None:
    address, _ = parse_url("mqtt+unix:///run/broker.sock")
    assert broker_address(address, MQTTOptions()).unix_path == "/run/broker.sock"


@pytest.mark.parametrize(
    "address",
    [
        Address("mqtt"),
        Address("wss", path="/mqtt"),
        Address("mqtt", "broker", path="/topic"),
        Address("mqtt+unix"),
        Address("mqtt+unix", "broker", path="/x"),
        Address("http", "broker"),
    ],
)
def test_addresses_that_cannot_be(address: Address) -> None:
    with pytest.raises(BadOption) as caught:
        broker_address(address, MQTTOptions())
    assert caught.value.hint


def test_options_from_a_url() -> None:
    _, query = parse_url("mqtt://h?keepalive=30&client_id=x&clean_start=false&max_inflight=5")
    options = build(MQTTOptions, query, where="url", backend="mqtt")
    assert (options.keepalive, options.client_id, options.clean_start) == (30, "x", False)
    assert options.max_inflight == 5


@pytest.mark.parametrize(
    "values",
    [
        {"keepalive": 65536},
        {"keepalive": -1},
        {"protocol": "3.1"},
        {"max_inflight": 0},
        {"receive_maximum": 65536},
        {"max_packet_size": 1},
        {"session_expiry": -1},
        {"clean_start": False},
        {"ssl_context": "x"},
        {"key_file": "x"},
        {"tls_min_version": "1.1"},
        {"will": {"topic": "a/+"}},
        {"will": {"topic": "a", "qos": 3}},
        {"will": {"payload": "x"}},
        {"topics": {"a": {"qos": 3}}},
        {"keepalife": 30},
    ],
)
def test_options_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        build(MQTTOptions, values, where="here", backend="mqtt")


def test_options_win_over_the_url_s_credentials() -> None:
    address = Address("mqtt", "h", username="url", password=Secret("one"))
    settings = settings_of(address, MQTTOptions(password=Secret("two")))
    assert settings.username == "url"
    assert settings.password == Secret("two")


def test_what_prints_options_prints_no_secret() -> None:
    options = MQTTOptions(
        password=Secret("canary1"),
        key_password=Secret("canary2"),
        ws_headers={"Authorization": "canary3"},
        will=WillOptions(topic="w", payload="canary4"),
    )
    text = repr(options) + repr(settings_of(Address("ws", "h"), options))
    text += repr(broker_address(Address("wss", "h"), options))
    assert "canary" not in text


def test_strict_utf8_forbids_what_brokers_close_connections_over() -> None:
    assert backend(1883).limits.forbidden_characters == ""
    forbidden = backend(1883, strict_utf8=True).limits.forbidden_characters
    for character in ("\x01", "\x1f", "\x7f", "\x9f", "\ufdd0", "\uffff", "\U0001fffe"):
        assert character in forbidden
    assert not set("aä€😀 ") & set(forbidden)


def test_topic_defaults_the_longest_filter_wins() -> None:
    made = backend(
        1883,
        default_retain=True,
        topics={
            "#": TopicDefaults(qos=0),
            "a/#": TopicDefaults(qos=2),
            "a/b": TopicDefaults(retain=False),
        },
    )
    defaults = made.topic_defaults
    assert defaults is not None
    assert defaults("x") == (0, True)
    assert defaults("a/x") == (2, True)
    assert defaults("a/b") == (2, False)
    assert backend(1883).topic_defaults is None


@BOTH
async def test_topic_defaults_apply_and_arguments_win(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    options: dict[str, Any] = {"topics": {topic: {"qos": 2, "retain": True}}, "protocol": protocol}
    async with asyncio.timeout(10), connect(mosquitto.url, **options) as bus:
        async with bus.subscribe(topic, qos=2) as messages:
            await bus.publish(topic, b"1")
            assert (await messages.get(timeout=5)).qos == 2
            await bus.publish(topic, b"2", qos=1, retain=False)
            assert (await messages.get(timeout=5)).qos == 1
        kept = await bus.last(topic)
        assert kept is not None
        assert kept.payload == b"1"
        await bus.clear(topic)


# --- sessions -------------------------------------------------------------------------


@BOTH
async def test_facts(mosquitto: MosquittoServer, protocol: str) -> None:
    async with session(mosquitto.port, protocol=protocol, client_id="me") as (made, _):
        assert made.session is not None
        facts = made.session
        assert facts.version == (5 if protocol == "5" else 4)
        assert facts.client_id == "me"
        assert made.endpoint.port == mosquitto.port
        assert await made.ping() < 2
        assert made.native is made


async def test_auto_takes_5_where_it_is_and_311_where_not(
    mosquitto: MosquittoServer, amqtt_server: AmqttServer
) -> None:
    for server, version in ((mosquitto, 5), (amqtt_server, 4)):
        async with session(server.port) as (made, _):
            assert made.session is not None
            assert made.session.version == version


async def test_probe_of_5_lowers_only_what_the_session_lacks(mosquitto: MosquittoServer) -> None:
    async with session(mosquitto.port, protocol="5") as (made, _):
        probed = await made.probe()
        assert set(probed) == {Cap.PERSISTENT_SESSION, Cap.REDELIVERY}
        assert made.guarantees.redelivery is Redelivery.NEVER
    async with session(mosquitto.port, protocol="5", client_id="p1", session_expiry=5) as (made, _):
        assert await made.probe() == {}
        assert made.guarantees.redelivery is Redelivery.AFTER_RECONNECT


@pytest.mark.parametrize(
    ("shared", "level"), [(None, Level.UNKNOWN), (True, Level.NATIVE), (False, Level.NONE)]
)
async def test_probe_of_311(mosquitto: MosquittoServer, shared: bool | None, level: Level) -> None:
    async with session(mosquitto.port, protocol="3.1.1", shared_subscriptions=shared) as (made, _):
        probed = await made.probe()
        for cap in (Cap.TTL, Cap.HEADERS, Cap.CONTENT_TYPE, Cap.ECHO_CONTROL, Cap.REFUSAL_VISIBLE):
            assert probed[cap].level is Level.NONE
            assert "3.1.1" in probed[cap].why
        assert probed[Cap.GROUPS].level is level


async def test_probe_of_what_a_broker_of_5_lacks() -> None:
    async with scripted() as broker:
        broker.connack = bytes.fromhex("20 0b 00 00 08 25 00 28 00 29 00 2a 00")
        async with session(broker.port, protocol="5") as (made, _):
            probed = await made.probe()
            assert probed[Cap.RETAINED].level is Level.NONE
            assert probed[Cap.WILDCARDS].level is Level.NONE
            assert probed[Cap.GROUPS].level is Level.NONE


async def test_the_broker_s_longest_packet_lowers_the_limit() -> None:
    async with scripted() as broker:
        broker.connack = bytes.fromhex("20 08 00 00 05 27 00001000")
        async with session(broker.port, protocol="5") as (made, _):
            assert made.limits.max_payload == 4096 - 10
            with pytest.raises(PayloadTooLarge) as caught:
                await made.publish(out("topic", b"x" * 4086))
            assert caught.value.outcome is Outcome.NOT_SENT


async def test_closing_is_final_and_legal_in_any_state(mosquitto: MosquittoServer) -> None:
    made = backend(mosquitto.port)
    await made.close(drain=1)
    with pytest.raises(ConnectError):
        await made.open(Recorder())
    async with session(mosquitto.port) as (made, sink):
        await asyncio.gather(made.close(drain=1), made.close(drain=0))
        assert sink.errors == [], "an end that was asked for is no loss"
        with pytest.raises(NotConnected):
            await made.publish(out("t"))


async def collect_errors(bus: Bus, told: list[PubSubError]) -> None:
    async for event in bus.events():
        if isinstance(event, StatusChanged) and event.error is not None:
            told += [event.error]


@BOTH
async def test_a_client_id_that_another_uses_is_told_and_not_final(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    # Mosquitto 2.0 hangs up without a word, under MQTT 5 as well.
    options: dict[str, Any] = {
        "client_id": unique().replace("/", "-"),
        "protocol": protocol,
        "reconnect_first": 0.05,
    }
    told: list[PubSubError] = []
    async with asyncio.timeout(40), connect(mosquitto.url, **options) as one:
        task = asyncio.create_task(collect_errors(one, told))
        async with connect(mosquitto.url, **options) as two:
            await eventually(lambda: any("another client" in each.hint for each in told))
            assert Status.FAILED not in (one.status, two.status)
        await one.wait_for(Status.ONLINE, timeout=20)
        await one.publish("t", b"", qos=1)
        task.cancel()


async def test_the_broker_s_word_that_a_session_is_taken_over_is_final() -> None:
    async with scripted() as broker:
        broker.connack = bytes.fromhex("20 03 00 00 00")
        async with connect(broker.url, client_id="own", protocol="5", reconnect_first=0.05) as bus:
            for _ in range(3):
                await bus.wait_for(Status.ONLINE, timeout=20)
                sessions = bus.stats.sessions
                broker.send(bytes.fromhex("e0 01 8e"))
                await eventually(
                    lambda before=sessions: (  # type: ignore[misc]
                        bus.stats.sessions > before or bus.status is Status.FAILED
                    )
                )
            with pytest.raises(TakenOver, match="own"):
                await bus.publish("t", b"")


@BOTH
async def test_a_broker_that_crashes_again_and_again_is_no_takeover(protocol: str) -> None:
    async with scripted() as broker:
        broker.connack = bytes.fromhex("20020000" if protocol == "3.1.1" else "2003000000")
        told: list[PubSubError] = []
        async with connect(
            broker.url, client_id="own", protocol=protocol, reconnect_first=0.05
        ) as bus:
            task = asyncio.create_task(collect_errors(bus, told))
            for _ in range(5):
                await bus.wait_for(Status.ONLINE, timeout=20)
                sessions = bus.stats.sessions
                broker.cut()
                await eventually(
                    lambda before=sessions: bus.stats.sessions > before  # type: ignore[misc]
                )
            await bus.publish("t", b"x", qos=1)
            assert any("client id 'own'" in str(each) and "crash" in each.hint for each in told)
            task.cancel()


async def test_a_filter_that_mosquitto_cannot_stand_harms_itself_only(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    # Mosquitto closes the connection over more than 200 levels.
    options: dict[str, Any] = {"protocol": "3.1.1", "reconnect_first": 0.05}
    async with connect(mosquitto.url, **options) as bus:
        topic, deep = unique("good"), "/".join(["a"] * 250)
        async with bus.subscribe(topic) as good:
            with pytest.raises(SubscribeFailed, match="2 times") as caught:
                await bus.subscribe(deep)
            assert caught.value.retryable is False
            await bus.wait_for(Status.ONLINE, timeout=20)
            sessions = bus.stats.sessions
            with pytest.raises(SubscribeFailed):
                await bus.subscribe(deep)
            await bus.publish(topic, b"x", qos=1)
            assert (await good.get(timeout=20)).payload == b"x"
            assert bus.stats.sessions == sessions


@BOTH
async def test_of_several_filters_the_one_that_ends_the_session_is_refused(
    protocol: str,
) -> None:
    """Restored after a reconnect it would poison every session."""
    async with scripted() as broker:
        hostile = False

        def answer(packet: Packet) -> bytes | None:
            if packet.type != SUBSCRIBE:
                return None
            if hostile and b"bad/#" in packet.body:
                broker.cut()
                return b""
            if protocol == "5":
                return b"\x90\x04" + packet.body[:2] + b"\x00\x00"
            return None

        broker.answer = answer
        broker.connack = bytes.fromhex("20020000" if protocol == "3.1.1" else "2003000000")
        refused: list[str] = []
        async with connect(broker.url, protocol=protocol, reconnect_first=0.05) as bus:

            async def collect() -> None:
                async for event in bus.events():
                    if isinstance(event, SubscriptionRefused):
                        refused.extend([event.filter])

            task = asyncio.create_task(collect())
            async with bus.subscribe("a"), bus.subscribe("bad/#") as bad, bus.subscribe("c"):
                hostile = True
                broker.cut()
                with pytest.raises(SubscribeFailed, match="bad"):
                    await bad.get(timeout=20)
                await bus.wait_for(Status.ONLINE, timeout=20)
                assert set(refused) == {"bad/#"}
                last = broker.connections
                names = [p.body for p in broker.of(SUBSCRIBE) if p.connection == last]
                assert len(names) == 2, "the two others were restored"
            task.cancel()


@pytest.mark.parametrize("option", ["client_id", "username", "password"])
@pytest.mark.parametrize("text", ["SECRET\ud800", "SECRET" * 10_923])
async def test_text_that_connect_cannot_carry_is_refused_by_name(option: str, text: str) -> None:
    options: dict[str, Any] = {option: text}
    with pytest.raises(BadOption, match=option) as caught:
        async with connect("mqtt://127.0.0.1:1", **options):
            pass
    assert caught.value.option.endswith(option)
    assert "SECRET" not in str(caught.value)


# --- publishing -----------------------------------------------------------------------


@BOTH
async def test_receipts_say_who_confirmed(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    async with session(mosquitto.port, protocol=protocol) as (made, _):
        assert (await made.publish(out(unique(), qos=0))).confirmed_by is ConfirmedBy.TRANSPORT
        for qos in (1, 2):
            receipt = await made.publish(out(unique(), qos=qos))
            assert receipt.confirmed_by is ConfirmedBy.BROKER
            if qos == 1:
                assert receipt.subscribers == (0 if protocol == "5" else None)


async def test_publishing_without_waiting_hands_over_at_once(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port) as (made, sink):
        await made.subscribe(WireSub(1, topic, qos=0))
        receipt = made.try_publish(out(topic, b"1", qos=0))
        assert receipt is not None
        assert receipt.confirmed_by is ConfirmedBy.TRANSPORT
        assert made.connection.unsent == 0
        assert made.try_publish(out(topic, qos=1)) is None
        await sink.got(1)
        given_way = [made.try_publish(out(topic, b"2", qos=0)) for _ in range(1000)]
        assert None in given_way, "the loop must get its turn"


async def test_publishing_without_waiting_does_not_overtake(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port, max_inflight=1) as (made, sink):
        await made.subscribe(WireSub(1, topic, qos=1))
        tasks = [asyncio.create_task(made.publish(out(topic, b"%d" % n, qos=1))) for n in range(3)]
        await asyncio.sleep(0)
        assert made.try_publish(out(topic, b"x", qos=0)) is None
        await asyncio.gather(*tasks)
        await sink.got(3)


async def test_headers_ttl_and_content_type(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    headers = Headers([("b", "1"), ("a", ""), ("b", "ü€😀"), ("B", "x" * 1000)])
    async with session(mosquitto.port, protocol="5") as (made, sink):
        await made.subscribe(WireSub(7, topic, qos=1))
        await made.publish(out(topic, headers=headers, ttl=60, content_type="text/x"))
        (frame,) = await sink.got(1)
        assert frame.headers.pairs == headers.pairs
        assert frame.content_type == "text/x"
        assert frame.expires_in is not None
        assert 58 <= frame.expires_in <= 60
        assert frame.subscriptions == (7,)


async def test_ttl_expires_what_is_retained(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port, protocol="5") as (made, _):
        await made.publish(out(topic, b"1", retain=True, ttl=1))
        assert await made.last(topic) is not None
        async with asyncio.timeout(5):
            while await made.last(topic) is not None:
                await asyncio.sleep(0.05)


async def test_311_refuses_what_it_cannot_carry(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with session(mosquitto.port, protocol="3.1.1") as (made, _):
        for frame in (out(unique(), headers=Headers({"a": "b"})), out(unique(), ttl=5.0)):
            with pytest.raises(NotSupported):
                await made.publish(frame)
        with pytest.raises(NotSupported):
            await made.subscribe(WireSub(1, unique(), echo=False))


async def test_a_header_that_mqtt_cannot_carry(mosquitto: MosquittoServer) -> None:
    async with session(mosquitto.port, protocol="5") as (made, _):
        with pytest.raises(PublishFailed) as caught:
            await made.publish(out("t", headers=Headers({"a": "\0"})))
        assert caught.value.outcome is Outcome.NOT_SENT
        await made.publish(out("t", headers=Headers({"a": "b"})))


async def test_refused_publish_through_a_bus(mosquitto_users: MosquittoServer) -> None:
    async with (
        asyncio.timeout(10),
        connect(
            mosquitto_users.url, username="alice", password=Secret(PASSWORD), protocol="5"
        ) as bus,
    ):
        with pytest.raises(PublishNotAuthorized) as caught:
            await bus.publish("forbidden/topic", b"")
        assert caught.value.outcome is Outcome.REJECTED


async def test_a_message_that_mosquitto_cannot_stand_harms_itself_only(
    mosquitto_installed: None,
) -> None:
    # Mosquitto resets the connection over a longer packet; 3.1.1 has no words for it.
    async with (
        MosquittoServer(extra_config="max_packet_size 50000") as server,
        connect(server.url, protocol="3.1.1", client_id="own", reconnect_first=0.05) as bus,
    ):
        sessions = bus.stats.sessions
        others = [asyncio.create_task(bus.publish("t", b"x", qos=1 + n % 2)) for n in range(100)]
        with pytest.raises(PublishFailed, match=r"'large' \(60000 bytes\)") as caught:
            await bus.publish("large", b"x" * 60_000, qos=1)
        assert caught.value.retryable is False
        assert not isinstance(caught.value, TimeoutError)
        assert caught.value.topic == "large"
        await asyncio.gather(*others)
        await bus.wait_for(Status.ONLINE, timeout=20)
        assert bus.stats.sessions - sessions == 2, "each sending ended one session"
        await bus.publish("t", b"z", qos=1)


# --- subscribing ----------------------------------------------------------------------


@BOTH
async def test_echo_and_identifiers(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with session(mosquitto.port, protocol=protocol) as (made, sink):
        assert await made.subscribe(WireSub(3, f"{topic}/+", qos=1)) == 1
        assert await made.subscribe(WireSub(4, f"{topic}/#", qos=2)) == 2
        await made.publish(out(f"{topic}/a", b"x"))
        if protocol == "5":
            await sink.got(2)
            ids = [each for frame in sink.frames for each in frame.subscriptions or ()]
            assert sorted(ids) == [3, 4]
        else:
            (frame,) = await sink.got(1)
            assert frame.subscriptions is None


async def test_no_echo_under_5(mosquitto: MosquittoServer, unique: Callable[..., str]) -> None:
    topic = unique()
    async with (
        session(mosquitto.port, protocol="5") as (made, sink),
        session(mosquitto.port) as (other, _),
    ):
        await made.subscribe(WireSub(1, topic, echo=False))
        await made.publish(out(topic, b"own"))
        await other.publish(out(topic, b"other's"))
        await sink.got(1)
        assert [frame.payload for frame in sink.frames] == [b"other's"]


@BOTH
async def test_share_groups_split_the_messages(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with (
        session(mosquitto.port, protocol=protocol) as (one, first),
        session(mosquitto.port, protocol=protocol) as (two, second),
        session(mosquitto.port, protocol=protocol) as (other, _),
    ):
        for made in (one, two):
            await made.subscribe(WireSub(1, f"{topic}/#", group="workers", qos=1))
        for number in range(20):
            await other.publish(out(f"{topic}/x", b"%d" % number))
        await eventually(lambda: len(first.frames) + len(second.frames) == 20)
        assert first.frames
        assert second.frames
        got = sorted(int(frame.payload) for frame in (*first.frames, *second.frames))
        assert got == list(range(20))


async def test_group_and_plain_are_told_apart_under_5(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port, protocol="5") as (made, sink):
        await made.subscribe(WireSub(1, topic, qos=1))
        await made.subscribe(WireSub(2, topic, group="g", qos=1))
        await made.publish(out(topic, b"x"))
        await sink.got(2)
        assert sorted(frame.subscriptions or () for frame in sink.frames) == [(1,), (2,)]


async def test_what_cannot_be_told_apart_is_refused_under_311(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port, protocol="3.1.1") as (made, sink):
        await made.subscribe(WireSub(1, f"{topic}/+", group="g", qos=1))
        for pattern, group in ((f"{topic}/a", None), (f"{topic}/#", "other")):
            with pytest.raises(SubscribeFailed, match="cannot be told apart") as caught:
                await made.subscribe(WireSub(2, pattern, group=group))
            assert "MQTT 5" in caught.value.hint
            assert caught.value.retryable is False
        await made.subscribe(WireSub(3, f"{topic}/b/c"))
        await made.subscribe(WireSub(1, f"{topic}/+", group="g", qos=2))
        await made.publish(out(f"{topic}/a"))
        (frame,) = await sink.got(1)
        assert frame.subscriptions is None
        await made.unsubscribe(WireSub(1, f"{topic}/+", group="g"))
        await made.subscribe(WireSub(2, f"{topic}/a"))


@pytest.mark.parametrize("group", ["", "a/b", "a+", "#", "a\nb", "a\ud800", "g" * 65536])
async def test_a_group_that_has_no_name(mosquitto: MosquittoServer, group: str) -> None:
    async with session(mosquitto.port) as (made, _):
        with pytest.raises(InvalidFilter):
            await made.subscribe(WireSub(1, "a", group=group))


async def test_one_subscription_on_the_wire_for_many() -> None:
    async with (
        scripted() as broker,
        asyncio.timeout(10),
        connect(broker.url, protocol="3.1.1") as bus,
    ):
        many = [bus.subscribe("a/#") for _ in range(20)]
        await asyncio.gather(*many)
        late = await bus.subscribe("a/#")
        # More than one, since whoever joins wants the retained messages as well.
        assert len(broker.of(SUBSCRIBE)) < 12
        assert {packet.body[2:] for packet in broker.of(SUBSCRIBE)} == {b"\x00\x03a/#\x01"}
        broker.send(b"\x30\x05\x00\x03a/b")
        for messages in (*many, late):
            assert (await messages.get(timeout=2)).topic == "a/b"
        for messages in many:
            await messages.close()
        assert broker.of(UNSUBSCRIBE) == []
        await late.close()
        assert len(broker.of(UNSUBSCRIBE)) == 1


# --- receiving ------------------------------------------------------------------------


@BOTH
async def test_messages_wait_for_their_acknowledgement(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with (
        session(mosquitto.port, protocol=protocol, settle=False) as (made, sink),
        session(mosquitto.port) as (other, _),
    ):
        await made.subscribe(WireSub(1, topic, qos=1, manual_ack=True))
        for number in range(60):
            await other.publish(out(topic, b"%d" % number))
        await sink.got(20)
        await made.ping()
        assert len(sink.frames) == 20, "Mosquitto's window"
        made.settle(sink.frames[5].tag, Verdict.REJECT)
        made.settle(sink.frames[0].tag, Verdict.ACK)
        await sink.got(22)
        sink.settle_with = made
        for frame in sink.frames[1:22]:
            made.settle(frame.tag, Verdict.ACK)
        await sink.got(60)
        assert [int(frame.payload) for frame in sink.frames] == list(range(60))


@BOTH
async def test_what_was_not_acknowledged_comes_again_in_a_persistent_session(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    options: dict[str, Any] = {
        "protocol": protocol,
        "client_id": unique("id").replace("/", "-"),
        "clean_start": False,
        "session_expiry": 60,
    }
    async with session(mosquitto.port, settle=False, **options) as (made, sink):
        await made.subscribe(WireSub(1, topic, qos=1))
        await made.subscribe(WireSub(2, f"{topic}/2", qos=2))
        await made.publish(out(topic, b"1"))
        await made.publish(out(f"{topic}/2", b"2", qos=2))
        await sink.got(2)
        await made.drop()
        again = Recorder()
        facts = await made.open(again)
        assert facts.resumed
        await made.restored()
        (frame,) = await again.got(1)
        assert (frame.payload, frame.redelivered) == (b"1", True)
        made.settle(frame.tag, Verdict.ACK)
        made.settle(sink.frames[1].tag, Verdict.ACK)
        await eventually(lambda: made.connection.stats.duplicates == 1)
        await made.ping()
        assert len(again.frames) == 1, "QoS 2 is not delivered twice"


async def test_identifiers_of_an_earlier_process_are_not_taken_for_ours(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    options: dict[str, Any] = {
        "protocol": "5",
        "client_id": unique("id").replace("/", "-"),
        "clean_start": False,
        "session_expiry": 60,
    }
    async with session(mosquitto.port, **options) as (made, _):
        await made.subscribe(WireSub(1, f"{topic}/old", qos=1))
    async with session(mosquitto.port) as (other, _):
        await other.publish(out(f"{topic}/old", b"queued"))
    async with session(mosquitto.port, **options) as (made, sink):
        await made.subscribe(WireSub(1, f"{topic}/new", qos=1))
        (frame,) = await sink.got(1)
        assert (frame.topic, frame.subscriptions) == (f"{topic}/old", None)
        await made.publish(out(f"{topic}/new"))
        await sink.got(2)
        assert sink.frames[1].subscriptions == (1,)
    # Leave nothing behind at the shared broker.
    async with session(mosquitto.port, protocol="5", client_id=options["client_id"]):
        pass


@BOTH
async def test_pausing_stops_the_flow_and_loses_nothing(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with (
        session(mosquitto.port, protocol=protocol) as (made, sink),
        session(mosquitto.port) as (other, _),
    ):
        await made.subscribe(WireSub(1, topic, qos=1))
        assert made.pause()
        await made.publish(out(topic, b"0"))  # its acknowledgement is still read
        for number in range(1, 100):
            await other.publish(out(topic, b"%d" % number))
        assert sink.frames == []
        made.resume()
        await sink.got(100)
        assert [int(frame.payload) for frame in sink.frames] == list(range(100))


async def test_a_full_queue_stops_reading_and_loses_nothing(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with (
        asyncio.timeout(20),
        connect(mosquitto.url) as bus,
        connect(mosquitto.url) as other,
    ):
        async with bus.subscribe(topic, buffer=10, overflow="block", qos=1) as messages:
            for number in range(300):
                await other.publish(topic, b"%d" % number)
            got = [int((await messages.get(timeout=5)).payload) for _ in range(300)]
            assert got == list(range(300))
            assert messages.stats.dropped == 0


# --- retained values --------------------------------------------------------------------


@BOTH
async def test_last_alone(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with session(mosquitto.port, protocol=protocol) as (made, sink):
        assert await made.last(topic) is None
        await made.publish(out(topic, b"kept", retain=True))
        frame = await made.last(topic)
        assert frame is not None
        assert (frame.topic, frame.payload, frame.origin) == (topic, b"kept", Origin.RETAINED)
        assert sink.frames == []
        await made.publish(out(topic, b"", retain=True))
        assert await made.last(topic) is None
        await made.publish(out(topic, b"live"))
        await made.ping()
        assert sink.frames == [], "the subscription of last() is gone"


@BOTH
async def test_last_beside_other_subscriptions(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with session(mosquitto.port, protocol=protocol) as (made, sink):
        await made.publish(out(topic, b"kept", retain=True))
        await made.subscribe(WireSub(1, f"{topic}/#", qos=1))
        await made.subscribe(WireSub(2, topic, qos=2))
        await made.ping()
        before = len(sink.frames)
        assert before == 2, "each subscription got the retained message"
        for _ in range(3):
            frame = await made.last(topic)
            assert frame is not None
            assert frame.payload == b"kept"
        assert len(sink.frames) == before, "nobody else noticed"
        await made.publish(out(topic, b"live", qos=2))
        await sink.got(before + 1)
        await made.ping()
        live = sink.frames[before:]
        assert {frame.payload for frame in live} == {b"live"}
        if protocol == "5":
            assert sorted(frame.subscriptions or () for frame in live) == [(1,), (2,)]
            assert {frame.qos for frame in live} == {1, 2}, "the subscriptions are as before"
        await made.publish(out(topic, b"", retain=True))


async def test_last_of_many_topics_at_once(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port) as (made, _):
        topics = [f"{topic}/{number}" for number in range(30)]
        await asyncio.gather(
            *(made.publish(out(each, each.encode(), retain=True)) for each in topics)
        )
        async with asyncio.timeout(5):
            found = await asyncio.gather(*(made.last(each) for each in topics * 2))
        assert [frame and frame.payload.decode() for frame in found] == topics * 2
        await asyncio.gather(*(made.publish(out(each, retain=True)) for each in topics))


async def test_last_that_is_cancelled_leaves_no_subscription(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port) as (made, sink):
        for turns in range(6):
            task = asyncio.create_task(made.last(topic))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await made.ping()
            await made.publish(out(topic, b"live"))
            await made.ping()
            assert sink.frames == []


async def test_last_on_amqtt(amqtt_server: AmqttServer, unique: Callable[..., str]) -> None:
    topic = unique()
    async with session(amqtt_server.port) as (made, _):
        await made.publish(out(topic, b"kept", retain=True))
        frame = await made.last(topic)
        assert frame is not None
        assert frame.payload == b"kept"


@BOTH
async def test_retained_messages_can_be_repeated(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    want = WireSub(1, f"{topic}/+", qos=1)
    async with session(mosquitto.port, protocol=protocol) as (made, sink):
        await made.publish(out(f"{topic}/a", b"kept", retain=True))
        await made.subscribe(want)
        await made.repeat_retained(want)
        await sink.got(2)
        assert {frame.origin for frame in sink.frames} == {Origin.RETAINED}
        await made.publish(out(f"{topic}/a", b"", retain=True))


async def test_changing_the_quality_of_service_repeats_no_retained_message(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique()
    async with session(mosquitto.port, protocol="5") as (made, sink):
        await made.publish(out(topic, b"kept", retain=True))
        await made.subscribe(WireSub(1, topic, qos=0))
        assert await made.subscribe(WireSub(1, topic, qos=2)) == 2
        await made.ping()
        assert len(sink.frames) == 1
        await made.publish(out(topic, b"", retain=True))


# --- through a bus --------------------------------------------------------------------


@BOTH
async def test_publishes_survive_resets_without_loss_or_disorder(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with (
        asyncio.timeout(40),
        FaultProxy("127.0.0.1", mosquitto.port) as proxy,
        connect(mosquitto.url) as listener,
        connect(
            f"mqtt://127.0.0.1:{proxy.port}",
            protocol=protocol,
            offline="buffer",
            reconnect_first=0.05,
        ) as bus,
        listener.subscribe(topic, qos=1, buffer=10_000) as messages,
    ):
        confirmed: list[int] = []
        numbers = iter(range(1500))

        async def publisher() -> None:
            for number in numbers:
                await bus.publish(topic, b"%d" % number, qos=1, timeout=20)
                confirmed.append(number)

        publishers = [asyncio.create_task(publisher()) for _ in range(20)]
        for cut in range(1, 5):
            while len(confirmed) <= 250 * cut:
                await asyncio.sleep(0)
            await proxy.cut()
        await asyncio.gather(*publishers)
        assert sorted(confirmed) == list(range(1500))
        got: list[int] = []
        while len(set(got)) < 1500:
            got.append(int((await messages.get(timeout=5)).payload))
        first = list(dict.fromkeys(got))
        assert first == sorted(first), "first arrivals keep their order"
        assert len(got) - 1500 <= 4 * 100


@BOTH
async def test_a_restarted_broker(
    mosquitto_own: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    topic = unique()
    async with (
        asyncio.timeout(30),
        connect(mosquitto_own.url, protocol=protocol, reconnect_first=0.05) as bus,
    ):
        async with bus.subscribe(f"{topic}/#", qos=1) as messages:
            await bus.publish(f"{topic}/1", b"")
            assert (await messages.get(timeout=5)).topic == f"{topic}/1"
            await mosquitto_own.restart()
            await bus.wait_for(Status.RECONNECTING, Status.ONLINE, timeout=10)
            await bus.wait_for(Status.ONLINE, timeout=10)
            await bus.publish(f"{topic}/2", b"", timeout=10)
            assert (await messages.get(timeout=10)).topic == f"{topic}/2"


async def test_tls_and_websocket_urls(
    mosquitto_tls: MosquittoServer, authority: Authority, unique: Callable[..., str]
) -> None:
    for url in (
        f"mqtts://localhost:{mosquitto_tls.port}",
        f"wss://localhost:{mosquitto_tls.websocket_port}/mqtt",
    ):
        async with asyncio.timeout(10), connect(url, ca_file=authority.cafile) as bus:
            topic = unique()
            async with bus.subscribe(topic) as messages:
                await bus.publish(topic, b"x")
                assert (await messages.get(timeout=5)).payload == b"x"


async def test_client_certificates(
    mosquitto_client_certificates: MosquittoServer,
    authority: Authority,
    client_certificate: Certificate,
) -> None:
    url = f"mqtts://localhost:{mosquitto_client_certificates.port}"
    async with (
        asyncio.timeout(10),
        connect(
            url,
            ca_file=authority.cafile,
            cert_file=client_certificate.certfile,
            key_file=client_certificate.keyfile,
        ) as bus,
    ):
        await bus.publish("t", b"x")


@BOTH
async def test_other_clients_and_ours_understand_each_other(
    mosquitto: MosquittoServer, unique: Callable[..., str], protocol: str
) -> None:
    import aiomqtt

    topic = unique()
    async with (
        asyncio.timeout(15),
        connect(mosquitto.url, protocol=protocol) as bus,
        aiomqtt.Client("127.0.0.1", mosquitto.port) as other,
    ):
        await other.subscribe(f"{topic}/theirs", 2)
        async with bus.subscribe(f"{topic}/ours", qos=2) as ours:
            for qos in (0, 1, 2):
                await bus.publish(f"{topic}/theirs", b"%d" % qos, qos=qos)
                await other.publish(f"{topic}/ours", b"%d" % qos, qos=qos)
            got = [await ours.get(timeout=5) for _ in range(3)]
            assert [(each.payload, each.qos) for each in got] == [(b"0", 0), (b"1", 1), (b"2", 2)]
            theirs = [await anext(aiter(other.messages)) for _ in range(3)]
            assert [each.payload for each in theirs] == [b"0", b"1", b"2"]
