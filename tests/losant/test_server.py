"""`LosantServer` on real sockets: connecting, rights, states, commands, the log, throttle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pubsub_core.errors import BadOption, ConnectError, OperationTimeout
from pubsub_core.interfaces import DevServer
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_losant import AccessKey, DeviceSpec, LosantServer
from pubsub_losant.commands import ABSENT
from pubsub_losant.server.storage import State
from pubsub_mqtt.server.endpoint.packets import (
    REFUSED,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Unsubscribe,
    WillMessage,
    encode,
)
from tests.losant.application import (
    DEVICES,
    EDGE,
    FLOATING,
    GATEWAY,
    KEYS,
    PERIPHERAL,
    A,
    B,
    Peer,
    broker,
    command,
    ended,
    refused,
    secret,
    sign_in,
    state,
)
from tests.losant.vectors import VECTORS
from tests.mqtt.server.endpoint.wire import WebWire, Wire
from tests.servers import Authority, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")


class Clock:
    """Unix seconds that stand still unless told otherwise."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# --- starting and telling -------------------------------------------------------------------


async def test_without_configuration_there_is_one_device_and_a_key_for_it() -> None:
    server: DevServer = LosantServer()
    await server.start()
    try:
        assert server.backend == "losant"
        told = server.describe()
        assert "volatile" in str(told["store"])
        parts = urlsplit(server.url)
        assert parts.scheme == "losant"
        assert parts.netloc.rpartition("@")[2] == f"{told['device_id']}:{server.port}"
        assert (parts.username, parts.password) == (told["access_key"], told["access_secret"])
        assert parse_qs(parts.query) == {"endpoint": ["127.0.0.1"], "secure": ["false"]}
        connect = Connect(str(told["device_id"]), parts.username, str(parts.password).encode(), 15)
        async with Wire.connected(server.port, connect) as wire:
            await wire.send(Subscribe(1, ((f"losant/{told['device_id']}/command", 0), ("my/#", 0))))
            assert await wire.next() == SubAck(1, (0, 0))
    finally:
        await server.stop()


async def test_a_given_secret_is_not_told() -> None:
    async with broker(ws_port=0) as server:
        told = server.describe()
        assert told["devices"] == len(DEVICES)
        assert told["ws_port"] == server.ws_port != server.port
        text = f"{told} {server.url}"
        assert "secret of" not in text
        assert "'kA'" not in text  # a secret that the server made may contain the letters
        assert "//kA:" not in text
        assert server.url_for(A, "kA", "a/b").startswith(f"losant://kA:a%2Fb@{A}:{server.port}?")


def test_options_that_do_not_fit_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"certfile": "x"}, {"keyfile": "x"}, {"tls_port": 0}, {"keys": KEYS},
        {"config": "/nonexistent/file.toml"}, {"devices": {}, "keys": KEYS},
        {"devices": DEVICES, "keys": "text"},
        {"devices": DEVICES, "keys": [AccessKey("operator", "x")]},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(BadOption):
            LosantServer(**options)


async def test_a_taken_port_leaves_nothing_open() -> None:
    async with broker() as server:
        taken: list[dict[str, Any]] = [{"port": server.port}, {"ws_port": server.port}]
        for options in taken:
            other = LosantServer(**options)
            with pytest.raises(ConnectError):
                await other.start()


async def test_it_starts_again_on_the_same_ports_and_has_forgotten() -> None:
    async with broker(ws_port=0) as server, Peer.connected(server) as peer:
        ports = server.port, server.ws_port
        await peer.publish(state(), {"data": {"a": 1}})
        await server.wait_state(A)
        await server.restart()
        assert await peer.wire.closed() == []
        assert (server.port, server.ws_port) == ports
        assert server.states(A) == []
        async with Peer.connected(server) as again:
            assert await again.messages() == []


# --- connecting -------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[LosantServer]:
    async with broker() as server:
        yield server


REFUSED_CONNECTS = {
    "no client id": (Connect("", "kA", secret("kA")), 2),
    "clean session 0": (Connect(A, "kA", secret("kA"), clean_session=False), 5),
    "wrong secret": (Connect(A, "kA", b"secret of kR"), 5),
    "unknown key": (Connect(A, "kX", secret("kA")), 5),
    "no secret": (Connect(A, "kA"), 5),
    "no user name": (Connect(A), 5),
    "unknown device": (sign_in("9" * 24), 5),
    "id in upper case": (sign_in(A.upper()), 5),
    "peripheral": (sign_in(PERIPHERAL), 5),
    "floating": (sign_in(FLOATING), 5),
    "restricted key": (sign_in(B, "kR"), 5),
    "will with qos 2": (sign_in(will=WillMessage(state(), b"x", qos=2)), 5),
    "will with retain": (sign_in(will=WillMessage(state(), b"x", retain=True)), 5),
    "will elsewhere": (sign_in(will=WillMessage(state(B), b"x")), 5),
    "mqtt 5": (Connect("", protocol="MQTT", level=5), 1),
    "mqtt 3.1": (Connect(A, "kA", secret("kA"), protocol="MQIsdp", level=3), 1),
    "operator with a wrong secret": (Connect("op", "operator", b"wrong"), 5),
    "operator without secret": (Connect("op", "operator"), 5),
}


@pytest.mark.parametrize("name", REFUSED_CONNECTS)
async def test_a_refused_connect_has_its_code_and_disturbs_nobody(
    name: str, server: LosantServer
) -> None:
    connect, code = REFUSED_CONNECTS[name]
    async with Peer.connected(server) as a, Peer.connected(server, sign_in(B)) as b:
        assert await refused(server, connect) == code
        for peer in (a, b):
            assert await peer.messages() == []
        assert server.is_connected(A)
        assert [each["connected"] for each in server.connection_log(A)] == [1]
        await eventually(lambda: len(server.rejections) == 1)
        assert (server.rejections[0].code, server.rejections[0].address) == (code, "127.0.0.1")
        assert server.rejections[0].reason


async def test_a_packet_that_is_no_connect_is_closed_without_an_answer(
    server: LosantServer,
) -> None:
    for data in (encode(PingReq()), b"\x10\x03\x00\x00\x00", b"\xff" * 9):
        wire = await Wire.open(server.port)
        await wire.send(data)
        assert await wire.closed() == []
        wire.close()
    await eventually(lambda: len(server.rejections) == 3)
    assert {each.code for each in server.rejections} == {None}


async def test_another_protocol_name_is_refused_with_its_code(server: LosantServer) -> None:
    wire = await Wire.open(server.port)
    await wire.send(bytes.fromhex("100c00044d5151540402003c0000"))
    assert await wire.closed() == [ConnAck(1)]
    wire.close()


async def test_a_second_connection_ends_the_first_and_the_log_has_both(
    server: LosantServer,
) -> None:
    will = WillMessage(state(), b'{"data":{"gone":true}}')
    async with Peer.connected(server, sign_in(will=will)) as old:
        await old.subscribe(command())
        await old.publish(state(), {"data": {"a": 1}})
        assert await server.send_command(A, "start") == 1
        assert len(await old.messages()) == 1
        async with Peer.connected(server) as new:
            assert await old.wire.closed() == []
            log = server.connection_log(A)
            assert [each["connected"] for each in log] == [1, 0, 1]
            assert log[1] == {
                "connected": 0,
                "time": log[1]["time"],
                "disconnectReason": "Duplicate connection",
                "messagesFromClient": 1,
                "messagesToClient": 1,
            }
            assert list(log[0]) == ["connected", "time", "method", "ipAddress"]
            assert (log[0]["method"], log[0]["ipAddress"]) == ("mqtt", "127.0.0.1")
            assert server.last_state(A)["gone"][0] is True
            assert await server.send_command(A, "start") == 0  # the new one has not subscribed
            assert await new.messages() == []
            assert server.is_connected(A)


async def test_several_clients_can_be_one_device_where_that_is_wanted() -> None:
    async with (
        broker(one_connection=False) as server,
        Peer.connected(server) as one,
        Peer.connected(server) as two,
    ):
        for peer in (one, two):
            assert await peer.subscribe(command()) == (0,)
        assert await server.send_command(A, "x") == 2
        one.wire.close()
        await eventually(lambda: len(server.connection_log(A)) == 3)
        assert server.is_connected(A)


async def test_a_will_needs_its_right_at_the_end_as_well(server: LosantServer) -> None:
    will = WillMessage(state(PERIPHERAL), b'{"data":{"alive":false}}')
    for allowed in (True, False):
        async with Peer.connected(server, sign_in(GATEWAY, will=will)) as gateway:
            if not allowed:
                server.registry.devices[PERIPHERAL] = DeviceSpec("peripheral", gateway_id=A)
            gateway.wire.close()
            await server.wait_disconnected(GATEWAY)
        assert len(server.states(PERIPHERAL)) == 1


@pytest.mark.slow
async def test_a_silent_device_is_dropped_and_its_will_published(server: LosantServer) -> None:
    will = WillMessage(state(), b'{"data":{"alive":false}}')
    began = time.monotonic()
    async with (
        Peer.connected(server, sign_in(B, keepalive=0)) as watcher,
        Peer.connected(server, sign_in(keepalive=1, will=will)) as peer,
    ):
        await watcher.subscribe(state())
        watch = Stopwatch()
        assert await peer.wire.closed() == []
        assert watch.seconds <= 2.5
        assert time.monotonic() - began >= 1.4
        assert (await ended(server))["disconnectReason"] == "Keepalive timeout"
        assert await watcher.messages() == [(state(), b'{"data":{"alive":false}}')]
        assert server.last_state(A)["alive"][0] is False


# --- rights -----------------------------------------------------------------------------------

ACL: list[dict[str, Any]] = VECTORS["dev_broker_acl"]["cases"]


async def test_the_rights_of_the_vectors_on_the_wire(server: LosantServer) -> None:
    for case in ACL:
        client, key, topic = case["client"], case["key"], case["topic"]
        if case["action"] == "connect" and not case["allow"]:
            assert await refused(server, sign_in(client, key)) == 5, case
            continue
        async with Peer.connected(server, sign_in(client, key)) as peer:
            if case["action"] == "subscribe":
                wanted = 0 if case["allow"] else REFUSED
                assert await peer.subscribe(topic) == (wanted,), case
                assert await peer.messages() == []
            elif case["action"] == "publish":
                await peer.publish(topic, {"data": {"a": 1}})
                if case["allow"]:
                    assert await peer.messages() == [], case
                else:
                    assert await peer.wire.closed() == [], case
                    reason = (await ended(server, client))["disconnectReason"]
                    assert reason == f"Publish Error - Not allowed to publish to {topic}"
        await server.wait_disconnected(client)


async def test_a_forbidden_filter_is_refused_beside_allowed_ones(server: LosantServer) -> None:
    async with Peer.connected(server, sign_in(A, "kAll")) as peer:
        codes = await peer.subscribe("my/#", "losant/#", command(), "$SYS/#", qos=1)
        assert codes == (0, REFUSED, 0, REFUSED)
        await peer.publish("my/topic", b"\x00\xff", qos=1)
        assert await peer.wire.next() == Publish("my/topic", b"\x00\xff")
        assert await peer.wire.next() == PubAck(2)
        await peer.wire.send(Unsubscribe(9, ("my/#", "never/there")))
        assert len(await peer.settled()) == 1
        await peer.publish("my/topic")
        assert await peer.messages() == []


async def test_a_connection_has_a_bound_on_filters_and_levels(server: LosantServer) -> None:
    async with Peer.connected(server, sign_in(A, "kAll")) as peer:
        for batch in range(10):
            assert set(await peer.subscribe(*(f"t/{batch}/{n}" for n in range(100)))) == {0}
        assert await peer.subscribe("one/more", "t/0/0", "a/" * 200) == (REFUSED, 0, REFUSED)


# --- restrictions -----------------------------------------------------------------------------

BROKEN_RULES = {
    "Publish Error - QoS 2 not supported": encode(Publish(state(), b"{}", 2, packet_id=1)),
    "Publish Error - Retain not supported": encode(Publish(state(), b"{}", retain=True)),
    "Publish Error - Payload too large": encode(Publish(state(), bytes(262_145))),
    "Protocol Error": b"\x30\x03\x00\x09a",
    f"Publish Error - Not allowed to publish to {state(B)}": encode(Publish(state(B), b"{}")),
    f"Publish Error - Not allowed to publish to losant/{A}/fromAgent/hello": encode(
        Publish(f"losant/{A}/fromAgent/hello", b"{}")
    ),
}


@pytest.mark.parametrize("reason", BROKEN_RULES)
async def test_who_breaks_a_rule_is_closed_and_the_log_says_why(
    reason: str, server: LosantServer
) -> None:
    async with Peer.connected(server) as peer:
        await peer.wire.send(BROKEN_RULES[reason], Publish(state(), b'{"data":{"after":1}}'))
        assert await peer.wire.closed() == []
        assert (await ended(server))["disconnectReason"] == reason
        assert server.states(A) == []


async def test_a_packet_far_too_large_is_refused_on_its_header(server: LosantServer) -> None:
    async with Peer.connected(server) as peer:
        await peer.wire.send(b"\x30\xff\xff\xff\x7f")
        assert await peer.wire.closed() == []
        assert (await ended(server))["disconnectReason"] == "Publish Error - Payload too large"


async def test_the_largest_payload_and_not_being_strict(server: LosantServer) -> None:
    async with Peer.connected(server) as peer:
        head, tail = b'{"data":{"a":1},"meta":"', b'"}'
        await peer.publish(state(), head + b"x" * (262_144 - len(head + tail)) + tail)
        await server.wait_state(A)
    async with broker(strict=False) as other:
        connect = Connect(A, "kA", secret("kA"), clean_session=False)
        async with Peer.connected(other, connect) as peer:
            await peer.wire.send(
                Publish(state(), b'{"data":{"a":1}}', 2, packet_id=1),
                Publish(state(), b'{"data":{"b":1}}', retain=True),
            )
            await eventually(lambda: set(other.last_state(A)) == {"a", "b"})


# --- states -----------------------------------------------------------------------------------


async def test_states_are_stored_merged_and_delivered_as_they_were() -> None:
    clock = Clock()
    now = int(clock.now * 1000)
    async with (
        broker(clock=clock) as server,
        Peer.connected(server) as peer,
        Peer.connected(server, sign_in(B)) as watcher,
    ):
        seen: list[tuple[str, State]] = []
        server.on_state.append(lambda device, state: seen.append((device, state)))
        await watcher.subscribe(state())
        payloads = [
            b'{"data": {"one": "two"}, "time": 1700000000000}',
            b'{"data":{"three":3},"time":1700000000000,"meta":{"x":1}}',
            b'[{"data":{"one":"older"},"time":-60000},{"data":{"one":"old"},"time":1}]',
            b'{"data":{"x":null}}',
        ]
        for payload in payloads:
            await peer.publish(state(), payload)
        await peer.publish(state(), b"nonsense")
        await peer.publish(state(), b'{"data":{"one":1},"time":1600000000}')
        await peer.settled()
        assert [(each.ms, each.data) for each in server.states(A)] == [
            (now - 60_000, {"one": "older"}),
            (now, {"one": "two", "three": 3}),
        ]
        assert await server.wait_state(A, 3, 0.1) == server.states(A)  # two of them are one
        assert server.states(A)[1].meta == {"x": 1}
        assert server.states(A, until=now - 1)[0].data == {"one": "older"}
        assert server.last_state(A) == {"one": ("two", now), "three": (3, now)}
        assert await watcher.messages() == [(state(), each) for each in payloads]
        assert [device for device, _ in seen] == [A, A, A]
        assert [each.reason for each in server.errors] == [
            "it is older than 30 days",
            "attributes not kept: x",
            "it is no JSON",
            "it is older than 30 days",
        ]
        assert {(each.device_id, each.topic) for each in server.errors} == {(A, state())}


async def test_a_gateway_sends_for_its_peripherals_and_gets_their_commands(
    server: LosantServer,
) -> None:
    async with Peer.connected(server, sign_in(GATEWAY)) as gateway:
        assert await gateway.subscribe(command(PERIPHERAL), command(FLOATING)) == (0, 0)
        for device_id in (PERIPHERAL, FLOATING):
            await gateway.publish(state(device_id), {"data": {"a": device_id}})
            await server.wait_state(device_id)
            assert server.last_state(device_id)["a"][0] == device_id
            assert await server.send_command(device_id, "open") == 1
        assert [topic for topic, _ in await gateway.messages()] == [
            command(PERIPHERAL), command(FLOATING),
        ]  # fmt: skip


async def test_an_edge_device_says_hello(server: LosantServer) -> None:
    async with Peer.connected(server, sign_in(EDGE)) as edge:
        assert await edge.subscribe(f"losant/{EDGE}/toAgent/#") == (0,)
        await edge.publish(f"losant/{EDGE}/fromAgent/hello", {"bundle": "nullVersion"})
        assert server.publish(f"losant/{EDGE}/toAgent/flows", b"\0asm") == 1
        assert await edge.messages() == [(f"losant/{EDGE}/toAgent/flows", b"\0asm")]


async def test_a_hook_that_fails_harms_nobody(
    server: LosantServer, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device_id: str, state: State) -> None:
        raise RuntimeError("a mistake in the test's hook")

    server.on_state.append(fail)
    async with Peer.connected(server) as peer:
        await peer.publish(state(), {"data": {"a": 1}})
        await server.wait_state(A)
        assert await peer.messages() == []
    assert "a hook for states failed" in caplog.text


# --- commands ---------------------------------------------------------------------------------


async def test_a_command_has_exactly_these_bytes() -> None:
    clock = Clock(1464743391.145)
    async with broker(clock=clock) as server:
        assert await server.send_command(A, "early") == 0
        async with Peer.connected(server) as peer:
            await peer.subscribe(command())
            assert await server.send_command(A, "start", {"one": [2, 3]}) == 1
            assert await server.send_command(A, "stop", time=1464743391.0) == 1
            assert await server.send_command(A, "none", None) == 1
            assert await peer.messages() == [
                (command(), each)
                for each in (
                    (
                        b'{"name":"start","payload":{"one":[2,3]},'
                        b'"time":{"$date":"2016-06-01T01:09:51.145Z"}}'
                    ),
                    b'{"name":"stop","time":{"$date":"2016-06-01T01:09:51.000Z"}}',
                    b'{"name":"none","payload":null,"time":{"$date":"2016-06-01T01:09:51.145Z"}}',
                )
            ]
        history = server.command_history(A)
        assert [(each.name, each.receivers) for each in history] == [
            ("early", 0), ("start", 1), ("stop", 1), ("none", 1),
        ]  # fmt: skip


async def test_a_command_that_does_not_fit_is_refused(server: LosantServer) -> None:
    for name, payload, device_id in (
        ("", ABSENT, A), ("x" * 256, ABSENT, A), ("x", ABSENT, "nobody"), ("x", "y" * 300_000, A),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            await server.send_command(device_id, name, payload)
    assert server.command_history(A) == []


async def test_the_operator_sends_commands_and_sees_everything(server: LosantServer) -> None:
    parts = urlsplit(server.operator_url)
    sign = Connect("op", parts.username, str(parts.password).encode())
    async with (
        Peer.connected(server) as device,
        Peer.connected(server, sign) as operator,
        Peer.connected(server, Connect("op", "operator", sign.password)) as second,
    ):
        await device.subscribe(command())
        assert await operator.subscribe("losant/+/state", "$SYS/#") == (0, REFUSED)
        await device.publish(state(), b'{"data":{"a":1}}')
        await device.settled()
        assert await operator.messages() == [(state(), b'{"data":{"a":1}}')]
        await operator.publish(command(), {"name": "go", "payload": {"$date": 0}}, qos=1)
        assert await operator.wire.next() == PubAck(2)
        ((_, payload),) = await device.messages()
        found = json.loads(payload)
        assert found["name"] == "go"
        assert found["payload"] == {"$date": "1970-01-01T00:00:00.000Z"}
        assert server.command_history(A)[0].receivers == 1
        await second.publish(state(PERIPHERAL), {"data": {"b": 2}})
        await second.settled()
        assert server.last_state(PERIPHERAL)["b"][0] == 2
        assert [each["connected"] for each in server.connection_log(A)] == [1]


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        (command(), b"start"), (command(), b"[]"), (command(), b"{}"), (command(), b'{"name":1}'),
        (command(), b'{"name":""}'), (command(), b'{"name":"x","other":1}'),
        (command("nobody"), b'{"name":"x"}'), (state("nobody"), b"{}"), ("$SYS/x", b""),
    ],
)  # fmt: skip
async def test_what_the_operator_gets_wrong_closes_its_connection(
    topic: str, payload: bytes, server: LosantServer
) -> None:
    parts = urlsplit(server.operator_url)
    sign = Connect("op", parts.username, str(parts.password).encode())
    async with Peer.connected(server, sign) as operator:
        await operator.publish(topic, payload, qos=1)
        assert await operator.wire.closed() == []
    assert server.command_history(A) == []


async def test_the_operator_is_let_in_from_this_machine_only(
    server: LosantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = urlsplit(server.operator_url)
    sign = Connect("op", parts.username, str(parts.password).encode())
    for address in ("203.0.113.7", "2001:db8::1", ""):
        monkeypatch.setattr("pubsub_losant.server.broker._address", lambda client, it=address: it)
        assert await refused(server, sign) == 5
        assert "not on this machine" in server.rejections[-1].reason


# --- throttle ---------------------------------------------------------------------------------


async def test_one_message_too_many_ends_the_connection_and_bans_the_device() -> None:
    clock = Clock()
    async with broker(throttle=True, clock=clock) as server:
        async with Peer.connected(server) as peer:
            for number in range(31):
                await peer.publish(state(), {"data": {"n": number}})
            assert await peer.wire.closed() == []
        assert (await ended(server))["disconnectReason"] == f"Throttled - {state()}"
        assert server.last_state(A)["n"][0] == 29
        clock.now += 29
        assert await refused(server, sign_in()) == 3
        async with Peer.connected(server, sign_in(B)) as other:  # nobody else is punished
            assert await other.messages() == []
        clock.now += 1.1
        async with Peer.connected(server) as peer:
            assert await peer.messages() == []


async def test_commands_beyond_the_limit_are_dropped_and_the_device_stays() -> None:
    async with broker(throttle=True, clock=Clock()) as server, Peer.connected(server) as peer:
        await peer.subscribe(command())
        sent = [await server.send_command(A, "x") for _ in range(40)]
        assert sent == [1] * 30 + [0] * 10
        assert server.throttled == 10
        assert len(await peer.messages()) == 30
        assert server.is_connected(A)


async def test_new_connections_beyond_the_limit_are_refused_without_a_ban() -> None:
    from pubsub_losant.server.throttle import Rules

    clock = Clock()
    rules = Rules(new_connections=(2, 15.0))
    async with broker(throttle=True, clock=clock, rules=rules) as server:
        for _ in range(2):
            async with Peer.connected(server):
                pass
        assert await refused(server, sign_in(B)) == 3
        clock.now += 15
        async with Peer.connected(server, sign_in(B)):
            pass


# --- the log ----------------------------------------------------------------------------------


async def test_every_end_has_its_reason() -> None:
    async with broker() as server:
        async with Peer.connected(server) as peer:
            await peer.wire.send(Disconnect())
            await peer.wire.closed()
        assert (await ended(server))["disconnectReason"] == "Client Disconnected"
        async with Peer.connected(server):
            pass
        assert (await ended(server))["disconnectReason"] == "Connection Lost"
        for abrupt in (True, False):
            async with Peer.connected(server) as peer:
                assert server.disconnect(A, abrupt=abrupt) == 1
                await peer.wire.closed()
            assert (await ended(server))["disconnectReason"] == "Disconnected by operator"
        async with Peer.connected(server):
            server.disconnect(A, "Maintenance", abrupt=False)
        assert (await ended(server))["disconnectReason"] == "Maintenance"
        assert server.disconnect("nobody") == 0


async def test_stopping_is_in_the_log_of_the_file(tmp_path: Any) -> None:
    async with broker(store=tmp_path / "store") as server:
        async with Peer.connected(server) as peer:
            await server.stop()
            await peer.wire.closed()
    async with broker(store=tmp_path / "store") as server:
        assert server.connection_log(A)[0]["disconnectReason"] == "Broker stopped"


async def test_a_will_is_published_unless_the_device_said_goodbye(server: LosantServer) -> None:
    will = WillMessage("my/will", b"gone")
    connect = sign_in(A, "kAll", will=will)
    async with Peer.connected(server, sign_in(B, "kAll")) as watcher:
        await watcher.subscribe("my/#")
        async with Peer.connected(server, connect) as peer:
            await peer.wire.send(Disconnect())
            await peer.wire.closed()
        assert await watcher.messages() == []
        async with Peer.connected(server, connect):
            pass
        await server.wait_disconnected(A)
        assert await watcher.messages() == [("my/will", b"gone")]


# --- what tests want to do ----------------------------------------------------------------------


async def test_waiting_and_not_waiting_for_ever(server: LosantServer) -> None:
    for waiting in (
        server.wait_connected(A, 0.01),
        server.wait_connected(A, 0.01, subscribed=True),
        server.wait_state(A, 1, 0.01),
    ):
        with pytest.raises(OperationTimeout):
            await waiting
    task = asyncio.create_task(server.wait_connected(A, subscribed=True))
    async with Peer.connected(server) as peer:
        await peer.subscribe(command())
        await task
        with pytest.raises(OperationTimeout):
            await server.wait_disconnected(A, 0.01)


async def test_refusing_the_next_and_falling_silent() -> None:
    async with broker(ws_port=0) as server:
        server.refuse_next(4)
        server.refuse_next()
        assert await refused(server, sign_in()) == 4
        assert await refused(server, sign_in()) == 3
        async with Peer.connected(server) as peer:
            server.pause()
            await peer.wire.send(PingReq())
            late = await Wire.open(server.ws_port)
            with pytest.raises(TimeoutError):
                await peer.wire.next(within=0.2)
            late.close()
            server.resume()
            assert await peer.wire.next() == PingResp()


# --- listeners ----------------------------------------------------------------------------------


async def over_websocket(port: int, path: str, tls: ssl.SSLContext | None = None) -> list[Packet]:
    """Connect and subscribe in frames that cut packets; return the answers."""
    peer = await WebWire.open(port, path, tls=tls)
    assert peer.subprotocol == "mqtt"
    data = encode(sign_in()) + encode(Subscribe(1, ((command(), 0),)))
    await peer.send(*(data[at : at + 10] for at in range(0, len(data), 10)))
    found = [await peer.next(), await peer.next()]
    peer.wire.close()
    return found


@pytest.mark.parametrize("path", ["/", "/mqtt"])
async def test_websocket_on_the_same_port_and_on_its_own(path: str) -> None:
    async with broker(ws_port=0) as server:
        for port in (server.port, server.ws_port):
            assert await over_websocket(port, path) == [ConnAck(0), SubAck(1, (0,))]
            await server.wait_disconnected(A)
        # The extra port is one more door to the same house.
        async with Peer.connected(server, port=server.ws_port) as peer:
            await peer.subscribe(command())
            assert await server.send_command(A, "x") == 1
            assert server.stats.clients == 1


async def test_tls_on_every_port_or_on_one_of_its_own(authority: Authority) -> None:
    certificate = authority.issue("losant")
    context = ssl.create_default_context(cafile=authority.cafile)
    files: dict[str, Any] = {"certfile": certificate.certfile, "keyfile": certificate.keyfile}
    async with broker(ws_port=0, **files) as server:
        assert "secure" not in server.url
        assert server.operator_url.startswith("mqtts://")
        assert server.tls_port == server.port
        async with Wire.connected(server.port, sign_in(), tls=context):
            await server.wait_connected(A)
        answers = await over_websocket(server.ws_port, "/mqtt", context)
        assert answers == [ConnAck(0), SubAck(1, (0,))]
    async with broker(tls_port=0, **files) as server:
        assert "secure=false" in server.url
        async with Wire.connected(server.tls_port, sign_in(), tls=context):
            await server.wait_connected(A)
        async with Peer.connected(server) as peer:
            assert await peer.messages() == []


async def test_ipv6_where_the_machine_has_it() -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    async with LosantServer(host="::1") as server:
        assert "endpoint=::1" in server.url
        assert "@[::1]:" in server.operator_url


async def test_keys_and_devices_may_change_while_it_runs(server: LosantServer) -> None:
    assert await refused(server, sign_in("later")) == 5
    server.registry.devices["later"] = DeviceSpec()
    server.registry.keys["new"] = AccessKey("new", "secret of new")
    async with Peer.connected(server, sign_in("later", "new")) as peer:
        assert await peer.messages() == []
