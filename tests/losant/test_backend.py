"""The Losant backend through a bus, on the embedded broker."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from pubsub_core import (
    AuthenticationFailed,
    BadOption,
    Bus,
    Cap,
    ConfirmedBy,
    ConnectError,
    InvalidFilter,
    InvalidTopic,
    NotConnected,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
    RateLimited,
    Secret,
    Status,
    SubscribeNotAuthorized,
    connect,
)
from pubsub_core.config.options import build, parse_url
from pubsub_core.errors import PubSubError
from pubsub_core.events import Notice, StatusChanged
from pubsub_core.interfaces import BackendContext, Endpoint, WireSub
from pubsub_core.message import OutFrame
from pubsub_core.testing import VirtualClock
from pubsub_losant import (
    AccessKey,
    DeviceCommand,
    DeviceSpec,
    DeviceState,
    LosantServer,
    LosantThrottled,
)
from pubsub_losant.backend import LosantBackend
from pubsub_losant.options import LosantOptions
from pubsub_losant.plugin import INFO
from pubsub_losant.server.throttle import Rules
from pubsub_losant.states import encode_state
from tests.losant.application import (
    EDGE,
    FLOATING,
    GATEWAY,
    OTHER_PERIPHERAL,
    PERIPHERAL,
    A,
    B,
    broker,
    command,
    secret,
    state,
)
from tests.servers import Authority, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

WHEN = dt.datetime(2026, 3, 1, 12, 30, tzinfo=dt.UTC)
SOON: dict[str, Any] = {"reconnect_first": 0.01, "reconnect_max": 0.05}


def url_of(server: LosantServer, device: str = A, key: str = "kAll") -> str:
    return server.url_for(device, key, secret(key).decode())


@asynccontextmanager
async def opened(
    server: LosantServer, device: str = A, key: str = "kAll", **options: Any
) -> AsyncIterator[Bus]:
    async with asyncio.timeout(20):
        async with connect(url_of(server, device, key), **options) as bus:
            yield bus


@asynccontextmanager
async def told(bus: Bus) -> AsyncIterator[list[Any]]:
    """A list that grows by every event of a bus."""
    found: list[Any] = []
    stream = bus.events()

    async def collect() -> None:
        async for event in stream:
            found.append(event)  # noqa: PERF401 # it must grow one by one

    task = asyncio.create_task(collect())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.wait([task])


def errors(events: list[Any]) -> list[PubSubError]:
    return [each.error for each in events if isinstance(each, StatusChanged) and each.error]


async def lost(events: list[Any], count: int) -> None:
    """Wait until a bus told of so many errors."""
    await eventually(lambda: len(errors(events)) >= count)


def made(url: str, *, clock: VirtualClock | None = None, **options: Any) -> LosantBackend:
    """A backend that was not opened."""
    address, query = parse_url(url)
    built = build(LosantOptions, {**query, **options}, where="test", backend="losant")
    more: dict[str, Any] = {} if clock is None else {"clock": clock}
    return LosantBackend(BackendContext(INFO, address, built, **more))


# --- addresses and options ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        (f"losant://k:s@{A}", "broker.losant.com", 8883, True),
        (f"losant+ws://k:s@{A}", "broker.losant.com", 443, True),
        (f"losant://k:s@{A}?secure=false", "broker.losant.com", 1883, False),
        (f"losant+ws://k:s@{A}?secure=false", "broker.losant.com", 80, False),
        (f"losant://k:s@{A}?transport=websockets", "broker.losant.com", 443, True),
        (f"losant+ws://k:s@{A}/other?transport=websockets", "broker.losant.com", 443, True),
        (f"losant://k:s@{A}:1234?endpoint=mine.example", "mine.example", 1234, True),
        (f"losant://k:s@{A}:1234?endpoint=::1", "::1", 1234, True),
    ],
)
def test_where_it_connects_to(url: str, host: str, port: int, tls: bool) -> None:
    assert made(url).endpoint == Endpoint(host, port, tls)


def test_a_device_id_keeps_its_case() -> None:
    assert made("losant://k:s@5f0C1aDeviceID").device_id == "5f0C1aDeviceID"


@pytest.mark.parametrize(
    ("url", "options", "option", "says"),
    [
        ("losant://", {}, "", "without the id"),
        (f"losant://{A}", {}, "access_key", "no access_key"),
        (f"losant://k@{A}", {}, "access_secret", "no access_secret"),
        (f"losant://{A}", {"access_secret": Secret("s")}, "access_key", "no access_key"),
        (f"losant://k:s@{A}/path", {}, "", "means nothing"),
        (f"losant+ws://k:s@{A}", {"transport": "tcp"}, "transport", "contradicts"),
        (f"losant://k:s@{A}", {"transport": "udp"}, "transport", "transport"),
        (f"losant://k:s@{A}", {"endpoint": "host:1883"}, "endpoint", "no host"),
        (f"losant://k:s@{A}", {"endpoint": "mqtt://host"}, "endpoint", "no host"),
        (f"losant://k:s@{A}", {"endpoint": ""}, "endpoint", "no host"),
        (f"losant://k:s@{A}", {"peripherals": ["a/b"]}, "peripherals", "no device id"),
        (f"losant://k:s@{A}", {"keepalive": -1}, "keepalive", "keepalive"),
        (
            f"losant://k:s@{A}",
            {"will": {"topic": "state", "payload": "{}", "retain": True}},
            "will",
            "refuses a will",
        ),
        (f"losant://k:s@{A}", {"will": {"topic": "state", "payload": "x"}}, "will", "no state"),
    ],
)
def test_what_cannot_be_an_address(
    url: str, options: dict[str, Any], option: str, says: str
) -> None:
    with pytest.raises(BadOption, match=says) as caught:
        made(url, **options)
    assert caught.value.option.endswith(option)
    assert caught.value.backend == "losant"


def test_a_certificate_stands_in_for_key_and_secret() -> None:
    settings = made(f"losant://{A}", cert_file="device.pem").connection.settings
    assert settings.username is None
    assert settings.password is None


def test_what_connect_says() -> None:
    settings = made(f"losant://k:s@{A}", access_key="key", access_secret="good").connection.settings
    assert (settings.client_id, settings.username) == (A, "key")
    assert settings.password == Secret("good")
    assert settings.versions == (4,)
    assert settings.clean_start
    assert settings.keepalive == 15


@pytest.mark.parametrize(
    ("url", "guards"),
    [
        (f"losant://k:s@{A}", True),
        (f"losant://k:s@{A}?endpoint=broker.eu.losant.com", True),
        (f"losant://k:s@{A}?endpoint=127.0.0.1", False),
        (f"losant://k:s@{A}?endpoint=127.0.0.1&rate_guard=true", True),
        (f"losant://k:s@{A}?rate_guard=false", False),
    ],
)
def test_the_limits_are_kept_at_the_platform(url: str, guards: bool) -> None:
    limits = made(url).limits
    if guards:
        assert limits.rate == (300, 15.5)
        assert limits.rate_per_topic == (30, 15.5)
    else:
        assert limits.rate is None
        assert limits.rate_per_topic is None
    assert limits.max_payload == 262_144


# --- topics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topic", "wire"),
    [
        ("state", f"losant/{A}/state"),
        ("command", f"losant/{A}/command"),
        (f"{B}/state", f"losant/{B}/state"),
        (f"{B}/command", f"losant/{B}/command"),
        (f"losant/{GATEWAY}/state", f"losant/{GATEWAY}/state"),
        (f"losant/{A}/fromAgent/hello", f"losant/{A}/fromAgent/hello"),
        (f"losant/{A}/toAgent/flows", f"losant/{A}/toAgent/flows"),
        (f"{GATEWAY}/state", f"{GATEWAY}/state"),
        (f"{B}/other", f"{B}/other"),
        ("state/of/mine", "state/of/mine"),
        ("my/losant", "my/losant"),
        ("Losant/x", "Losant/x"),
    ],
)
def test_topics_and_the_platform_s_names(topic: str, wire: str) -> None:
    backend = made(f"losant://k:s@{A}", peripherals=[B])
    assert backend.to_wire(topic) == wire
    assert backend.from_wire(wire) == topic


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        (f"losant/{A}/state", "alias"),
        (f"losant/{A}/command", "alias"),
        (f"losant/{B}/state", "alias"),
        ("losant", "reserved"),
        ("losantish/x", "reserved"),
        (f"losant/{GATEWAY}", "reserved"),
        (f"losant/{GATEWAY}/other", "reserved"),
        (f"losant/{GATEWAY}/fromAgent/hello", "reserved"),
        ("$SYS/x", "reserved"),
    ],
)
def test_topics_that_are_not_there(topic: str, reason: str) -> None:
    backend = made(f"losant://k:s@{A}", peripherals=[B])
    with pytest.raises(InvalidTopic) as caught:
        backend.to_wire(topic)
    assert caught.value.reason == reason
    assert caught.value.topic == topic
    assert caught.value.hint


async def test_filters_that_the_platform_refuses() -> None:
    async with broker() as server, opened(server) as bus:
        for text in ("#", "+/state", "losant/+/state", "losant/#", "{room}/x"):
            with pytest.raises(NotSupported) as caught:
                await bus.subscribe(text).__aenter__()
            assert caught.value.capability == Cap.WILDCARDS
            assert "level" in caught.value.hint
        for text in (f"losant/{A}/state", f"losant/{B}/other", "losantish/+"):
            with pytest.raises(InvalidFilter):
                await bus.subscribe(text).__aenter__()


# --- state ----------------------------------------------------------------------------------


async def test_the_url_of_the_server_is_enough() -> None:
    async with LosantServer() as server, asyncio.timeout(10):
        async with connect(server.url) as bus:
            receipt = await bus.publish("state", {"temperature": 21.5})
            assert receipt.confirmed_by is ConfirmedBy.BROKER
            (stored,) = await server.wait_state(server.device_id)
            assert stored.data == {"temperature": 21.5}
            assert bus.native(LosantBackend).device_id == server.device_id
            assert await bus.ping() > 0


async def test_key_and_secret_as_options() -> None:
    async with broker() as server, asyncio.timeout(10):
        url = server.url_for(A)
        async with connect(url, access_key="kA", access_secret=Secret("secret of kA")) as bus:
            assert bus.status is Status.ONLINE


class Reading(msgspec.Struct):
    temperature: float
    open: bool = False


async def test_what_is_published_is_what_a_device_sends() -> None:
    clock = VirtualClock(start=1_700_000_000.25)
    async with broker(clock=clock.time) as server, opened(server, clock=clock) as bus:
        async with opened(server, GATEWAY) as witness:
            native = witness.native(LosantBackend)
            raw: list[bytes] = []
            receive = native.connection.on_message

            def look(message: Any) -> None:
                raw.append(message.payload)
                receive(message)

            native.connection.on_message = look
            async with witness.subscribe(state(A), DeviceState) as states:
                await bus.publish("state", {"b": 1, "a": "ü"})
                await bus.publish("state", Reading(21.5))
                await bus.publish("state", {"c": True}, qos=0)
                for data in ({"b": 1, "a": "ü"}, {"temperature": 21.5, "open": False}, {"c": True}):
                    message = await states.get(timeout=5)
                    assert message.payload.data == data
                    assert raw.pop(0) == encode_state(data, now=1_700_000_000_250).encode()


async def test_a_state_with_its_time_and_several_at_once() -> None:
    async with (
        broker() as server,
        opened(server) as bus,
        bus.subscribe("state", DeviceState) as own,
    ):
        now = dt.datetime.now(dt.UTC).replace(microsecond=0)
        earlier = now - dt.timedelta(hours=1)
        await bus.publish("state", DeviceState({"a": 1}, earlier, meta={"by": "hand"}))
        await bus.publish("state", [DeviceState({"a": 2}, now), DeviceState({"b": 3}, now)])
        stored = await server.wait_state(A, 2)
        assert [(each.ms, each.data) for each in stored] == [
            (int(earlier.timestamp() * 1000), {"a": 1}),
            (int(now.timestamp() * 1000), {"a": 2, "b": 3}),
        ]
        assert stored[0].meta == {"by": "hand"}
        got = [await own.get(timeout=5) for _ in range(3)]
        assert [each.payload.data for each in got] == [{"a": 1}, {"a": 2}, {"b": 3}]
        assert [each.payload.time for each in got] == [earlier, now, now]
        assert {each.topic for each in got} == {"state"}


@pytest.mark.parametrize("payload", [b"21.5", "text", [1], {"a": {"b": 1}}, 21.5, b""])
async def test_what_is_no_state_is_not_sent(payload: Any) -> None:
    async with broker() as server, opened(server) as bus:
        with pytest.raises(PublishFailed) as caught:
            await bus.publish("state", payload)
        assert caught.value.outcome is Outcome.NOT_SENT
        assert caught.value.topic == "state"
        assert "DeviceState" in caught.value.hint
        assert not server.errors
        await bus.publish("state", {"a": 1})


async def test_a_state_that_becomes_too_long() -> None:
    async with broker() as server, opened(server) as bus:
        # As JSON it fits; with what the platform wants around it, it does not.
        with pytest.raises(PayloadTooLarge) as caught:
            await bus.publish("state", {"a": "x" * (262_144 - 9)})
        assert caught.value.limit == 262_144
        await bus.publish("mine", b"x" * 262_144)
        with pytest.raises(PayloadTooLarge):
            await bus.publish("mine", b"x" * 262_145)


async def test_states_of_another_device() -> None:
    async with broker() as server, opened(server) as bus, opened(server, B) as other:
        async with other.subscribe(state(A), DeviceState) as states:
            await bus.publish("state", {"a": 1})
            message = await states.get(timeout=5)
        assert message.topic == state(A)
        assert message.payload.data == {"a": 1}


# --- commands -------------------------------------------------------------------------------


async def test_commands_are_messages() -> None:
    async with broker() as server, opened(server) as bus:
        async with bus.subscribe("command", DeviceCommand) as commands:
            assert await server.send_command(A, "start", {"at": WHEN, "n": [1]}, WHEN) == 1
            assert await server.send_command(A, "stop") == 1
            message = await commands.get(timeout=5)
            assert message.topic == "command"
            assert message.payload == DeviceCommand(
                "start", {"at": "2026-03-01T12:30:00Z", "n": [1]}, WHEN
            )
            assert message.time == WHEN.timestamp()
            assert (await commands.get(timeout=5)).payload.name == "stop"


async def test_a_command_that_cannot_be_read_ends_nothing() -> None:
    async with broker() as server, opened(server) as bus:
        async with bus.subscribe("command", DeviceCommand, on_decode_error="skip") as commands:
            for payload in (b"", b"\xff", b"null", b"[]", b'{"payload":1}', b"[" * 100_000):
                assert server.publish(command(A), payload) == 1
            await server.send_command(A, "start")
            assert (await commands.get(timeout=5)).payload.name == "start"
            assert commands.stats.received == 7
        assert bus.status is Status.ONLINE


async def test_commands_are_the_platform_s_to_publish() -> None:
    async with broker() as server, opened(server) as bus:
        for topic in ("command", command(B)):
            with pytest.raises(PublishNotAuthorized) as caught:
                await bus.publish(topic, {"name": "x"})
            assert caught.value.outcome is Outcome.NOT_SENT
            assert "REST" in caught.value.hint
        assert bus.status is Status.ONLINE


# --- gateways -------------------------------------------------------------------------------


async def test_a_gateway_and_its_peripherals() -> None:
    async with broker() as server:
        async with opened(server, GATEWAY, peripherals=[PERIPHERAL]) as bus:
            async with (
                bus.subscribe(f"{PERIPHERAL}/command", DeviceCommand) as short,
                bus.subscribe(command(FLOATING), DeviceCommand) as long,
            ):
                await bus.publish(f"{PERIPHERAL}/state", {"a": 1})
                await bus.publish(state(FLOATING), {"b": 2})
                assert (await server.wait_state(PERIPHERAL))[0].data == {"a": 1}
                assert (await server.wait_state(FLOATING))[0].data == {"b": 2}
                await server.send_command(PERIPHERAL, "one")
                await server.send_command(FLOATING, "two")
                first, second = await short.get(timeout=5), await long.get(timeout=5)
        assert (first.topic, first.payload.name) == (f"{PERIPHERAL}/command", "one")
        assert (second.topic, second.payload.name) == (command(FLOATING), "two")


async def test_an_agent_s_topics() -> None:
    async with broker() as server, opened(server, EDGE) as bus:
        async with bus.subscribe(f"losant/{EDGE}/toAgent/#") as asked:
            await bus.publish(f"losant/{EDGE}/fromAgent/hello", {"bundle": "nullVersion"})
            server.publish(f"losant/{EDGE}/toAgent/flows", b"\0asm")
            assert (await asked.get(timeout=5)).payload == b"\0asm"
        with pytest.raises(PublishNotAuthorized):
            await bus.publish(f"losant/{EDGE}/toAgent/flows", b"x")


# --- what the platform refuses -----------------------------------------------------------------


async def test_wrong_credentials() -> None:
    async with broker() as server:
        for url in (url_of(server, B, "kR"), server.url_for(A, "kA", "wrong")):
            with pytest.raises(AuthenticationFailed) as caught:
                await connect(url).open()
            assert caught.value.backend == "losant"
            assert caught.value.retryable is False
            assert "access key" in caught.value.hint


async def test_a_port_that_wants_something_else(authority: Authority) -> None:
    certificate = authority.issue("localhost")
    files = {"certfile": certificate.certfile, "keyfile": certificate.keyfile}
    async with broker(**files) as server, asyncio.timeout(10):
        with pytest.raises(ConnectError) as plain:
            await connect(url_of(server), secure=False).open()
    async with broker() as server, asyncio.timeout(10):
        with pytest.raises(ConnectError) as encrypted:
            await connect(url_of(server), secure=True).open()
    for caught in (plain, encrypted):
        assert caught.value.backend == "losant"
        assert "mqtt" not in f"{caught.value.hint}".replace("MQTT", "")
        assert "TLS" in caught.value.hint


async def test_errors_name_the_backend_and_the_topic_as_it_is_called() -> None:
    async with broker() as server, opened(server, reconnect=False) as bus:
        backend = bus.native(LosantBackend)
        backend.driver.abort()
        for qos in (0, 1):
            with pytest.raises(NotConnected) as caught:
                await backend.publish(OutFrame(topic="state", payload=b'{"a":1}', qos=qos))
            assert (caught.value.backend, caught.value.topic) == ("losant", "state")
        with pytest.raises(NotConnected) as caught:
            await backend.subscribe(WireSub(1, "command"))
        assert (caught.value.backend, caught.value.topic) == ("losant", "command")


async def test_a_refused_subscription() -> None:
    async with broker() as server, opened(server, key="kA") as bus:
        with pytest.raises(SubscribeNotAuthorized) as caught:
            await bus.subscribe("mine/#").__aenter__()
        assert caught.value.topic == "mine/#"
        assert "access key" in caught.value.hint
        assert bus.status is Status.ONLINE


async def test_a_refused_message_is_found_out_by_sending_it_again() -> None:
    """The platform says nothing and hangs up: three times is no accident."""
    patient: dict[str, Any] = {"offline": "buffer", **SOON}
    async with broker() as server, opened(server, key="kA", **patient) as bus, told(bus) as events:
        with pytest.raises(PublishNotAuthorized) as caught:
            await bus.publish("mine/x", b"1", timeout=10)
        assert caught.value.outcome is Outcome.REJECTED
        assert caught.value.topic == "mine/x"
        assert "connection log" in caught.value.hint
        assert any(isinstance(each, Notice) for each in events)
        await bus.publish("state", {"a": 1}, timeout=5)
        reasons = [each.get("disconnectReason") for each in server.connection_log(A)]
        assert reasons.count("Publish Error - Not allowed to publish to mine/x") == 2


async def test_what_ended_the_connection_is_told_as_well_as_it_is_known() -> None:
    async with broker() as server, opened(server, key="kA", **SOON) as bus, told(bus) as events:
        await bus.publish("mine/x", b"1", qos=0)
        await eventually(lambda: errors(events), what="the connection ends")
        (error, *_) = errors(events)
        assert "right after a message to 'mine/x'" in str(error)
        assert "connection log" in str(error)
        assert error.backend == "losant"
        await bus.wait_for(Status.ONLINE, timeout=5)


async def test_a_forbidden_message_again_and_again_is_no_takeover() -> None:
    async with broker() as server, opened(server, key="kA", **SOON) as bus, told(bus) as events:
        for count in range(1, 6):
            await bus.wait_for(Status.ONLINE, timeout=5)
            await bus.publish("mine/x", b"1", qos=0)
            await lost(events, count)
        await bus.wait_for(Status.ONLINE, timeout=5)
        assert not any("connect elsewhere" in each.hint for each in errors(events))


async def test_two_clients_with_one_device() -> None:
    async with broker() as server, opened(server, **SOON) as one, told(one) as events:
        async with opened(server, **SOON) as two:
            await eventually(
                lambda: any(
                    "same device connect elsewhere" in each.hint for each in errors(events)
                ),
                what="it says what it looks like",
            )
            # The platform has no word for it, so none of them gives up.
            assert Status.FAILED not in (one.status, two.status)
        await one.wait_for(Status.ONLINE, timeout=20)
        await one.publish("state", {"a": 1})


async def test_quality_of_service_two() -> None:
    async with broker() as server, opened(server) as bus:
        with pytest.raises(NotSupported, match="qos=1"):
            await bus.publish("mine", b"x", qos=2)
        assert bus.status is Status.ONLINE


@pytest.mark.parametrize(
    "options",
    [{"retain": True}, {"ttl": 60}, {"headers": {"a": "b"}}, {"content_type": "text/plain"}],
)
async def test_what_a_message_cannot_have(options: dict[str, Any]) -> None:
    async with broker() as server, opened(server) as bus:
        with pytest.raises(NotSupported) as caught:
            await bus.publish("state", {"a": 1}, **options)
        assert caught.value.why
        assert caught.value.hint


# --- limits and bans ---------------------------------------------------------------------------

TIGHT = Rules(per_topic=(3, 15.0))


async def test_a_ban_is_told_with_when_to_come_back() -> None:
    async with broker(throttle=True, rules=TIGHT) as server:
        async with opened(server, **SOON) as bus, told(bus) as events:
            for number in range(4):
                await bus.publish("state", {"a": number}, qos=0)
            await eventually(
                lambda: any(isinstance(each, LosantThrottled) for each in errors(events))
            )
            throttled = next(each for each in errors(events) if isinstance(each, LosantThrottled))
        assert throttled.retry_after == 30
        assert throttled.retryable
        assert throttled.reason == 3
        assert "banned" in str(throttled)
        assert throttled.backend == "losant"


async def test_the_guard_refuses_before_the_platform_bans() -> None:
    clock = VirtualClock()
    async with broker() as server, opened(server, rate_guard=True, clock=clock) as bus:
        for number in range(30):
            await bus.publish("state", {"a": number}, timeout=1)
        with pytest.raises(RateLimited) as caught:
            await bus.publish("state", {"a": 30}, timeout=1)
        assert caught.value.retry_after == 15.5
        await bus.publish("mine", b"another topic", timeout=1)
        waiting = asyncio.create_task(bus.publish("state", {"a": 30}, timeout=20))
        await eventually(lambda: clock.sleepers, what="it waits")
        assert not waiting.done()
        await clock.advance(15.6)
        assert (await waiting).confirmed_by is ConfirmedBy.BROKER


async def test_what_was_kept_leaves_no_faster_than_the_limits_allow() -> None:
    clock = VirtualClock()
    patient: dict[str, Any] = {"rate_guard": True, "clock": clock, "reconnect_max": 1.0}
    async with broker() as server, opened(server, **patient, offline="buffer") as bus:
        await server.stop()
        await eventually(lambda: bus.status is not Status.ONLINE)
        for number in range(40):
            await bus.publish("state", {"a": number}, confirm="nobody")
        await server.start()
        await clock.asleep()
        await clock.advance_to_next()
        await eventually(lambda: bus.stats.offline == 10)
        await clock.asleep()
        await clock.advance(15.4)
        assert bus.stats.offline == 10
        await clock.advance(0.2)
        await eventually(lambda: bus.stats.offline == 0)


async def test_what_is_sent_again_counts_again() -> None:
    clock = VirtualClock()
    patient: dict[str, Any] = {"rate_guard": True, "clock": clock, "reconnect_max": 1.0}
    async with broker() as server, opened(server, **patient) as bus, told(bus) as events:
        backend = bus.native(LosantBackend)
        server.pause()
        sent = [
            asyncio.create_task(bus.publish("state", {"a": number}, timeout=10))
            for number in range(10)
        ]
        await eventually(lambda: backend.connection.unfinished == 10)
        server.disconnect(A)
        server.resume()
        await lost(events, 1)
        await clock.advance(5)
        await asyncio.wait_for(asyncio.gather(*sent), 5)
        assert backend.connection.stats.resent == 10
        for number in range(10):
            await bus.publish("state", {"b": number}, timeout=1)
        more = asyncio.create_task(bus.publish("state", {"c": 1}, timeout=20))
        await eventually(lambda: clock.sleepers, what="the 31st waits")
        assert not more.done()
        await clock.advance(15.6)
        await asyncio.wait_for(more, 5)


async def test_a_loss_after_too_much_is_waited_out() -> None:
    clock = VirtualClock()
    async with broker() as server:
        async with (
            opened(server, rate_guard=True, clock=clock, reconnect_max=5.0) as bus,
            told(bus) as events,
        ):
            for number in range(30):
                await bus.publish("state", {"a": number}, timeout=1)
            server.disconnect(A)
            await eventually(lambda: errors(events))
            throttled = errors(events)[0]
            assert isinstance(throttled, LosantThrottled)
            assert throttled.retry_after == 30
            visits = len(server.connection_log(A))
            for _ in range(4):  # nobody knocks while the ban lasts
                await clock.advance(6)
            assert len(server.connection_log(A)) == visits
            online = asyncio.create_task(bus.wait_for(Status.ONLINE, timeout=10))
            assert not online.done()
            while not online.done():
                await clock.advance(3)
            await online
            assert len(server.connection_log(A)) == visits + 1


# --- secrets, wills, transports ------------------------------------------------------------------


async def test_no_secret_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key, word = "very-private-key", "very-private-secret"
    keys = [AccessKey(key, word)]
    async with LosantServer(devices={A: DeviceSpec()}, keys=keys) as server:
        url = server.url_for(A)
        bus = connect(url, access_key=Secret(key), access_secret=Secret(word))
        async with asyncio.timeout(10), bus:
            texts = [repr(bus), str(bus), repr(bus.native(LosantBackend)), str(server.describe())]
            with pytest.raises(PublishFailed) as failed:
                await bus.publish("state", b"x")
            texts += [repr(failed.value), str(failed.value)]
        with pytest.raises(AuthenticationFailed) as refused:
            await connect(url, access_key=Secret(key), access_secret=Secret(word + "!")).open()
        texts += [repr(refused.value), str(refused.value), repr(refused.value.__cause__)]
        texts.append(repr(LosantOptions(access_key=Secret(key), access_secret=Secret(word))))
    texts.append(caplog.text)
    for text in texts:
        assert key not in text
        assert word not in text


async def test_a_will_tells_the_state() -> None:
    will = {"topic": "state", "payload": json.dumps({"online": False})}
    async with broker() as server, opened(server, will=will, reconnect=False) as bus:
        before = dt.datetime.now(dt.UTC).timestamp()
        bus.native(LosantBackend).driver.abort()
        (stored,) = await server.wait_state(A)
        assert stored.data == {"online": False}
        assert stored.ms >= int(before * 1000)


@pytest.mark.parametrize("scheme", ["losant", "losant+ws"])
async def test_tls_and_websockets(authority: Authority, scheme: str) -> None:
    certificate = authority.issue("localhost")
    files = {"certfile": certificate.certfile, "keyfile": certificate.keyfile}
    async with broker(**files) as server, asyncio.timeout(10):
        url = url_of(server).replace("losant://", f"{scheme}://")
        assert "secure" not in url
        async with connect(url, ca_file=authority.cafile) as bus:
            await bus.publish("state", {"a": 1})
            await server.wait_state(A)
    async with broker() as server, asyncio.timeout(10):
        url = url_of(server).replace("losant://", f"{scheme}://")
        async with connect(url) as bus:
            await bus.publish("state", {"a": 1})
            await server.wait_state(A)


async def test_a_peripheral_of_another_gateway() -> None:
    async with broker() as server, opened(server, GATEWAY, **SOON) as bus:
        with pytest.raises(PublishNotAuthorized):
            await bus.publish(state(OTHER_PERIPHERAL), {"a": 1}, timeout=10)
