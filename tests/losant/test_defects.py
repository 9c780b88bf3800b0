"""What is wrong in losant-mqtt 1.2.1, each by name, and is not here."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import inspect
import json
import math
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pubsub_losant
from pubsub_losant import Device, Gateway, LosantAuthError, LosantConnectError
from pubsub_mqtt.connection.dial import dial_steps
from tests.losant.support import (
    CONNECT,
    PUBLISH,
    SUBSCRIBE,
    Events,
    command,
    connected,
    make,
    scripted,
    turn_until,
    wait_until,
)
from tests.losant.vectors import DEVICE, local_zone

pytestmark = pytest.mark.usefixtures("no_leaks")

COMMAND = f"losant/{DEVICE}/command"


def test_send_state_returns_true_when_connected() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        assert device.send_state({"a": 1}) is True


@pytest.mark.slow
def test_importing_needs_no_pkg_resources() -> None:
    program = (
        "import sys; sys.modules['pkg_resources'] = None; import pubsub_losant.client; print('ok')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout == "ok\n", done.stderr


def test_it_lives_with_the_paho_of_today() -> None:
    assert int(importlib.metadata.version("paho-mqtt").partition(".")[0]) >= 2
    with scripted() as broker, connected(broker) as (device, _):
        assert device.is_connected()


def test_no_root_certificate_is_pinned() -> None:
    folder = Path(str(pubsub_losant.__file__)).parent
    for path in folder.rglob("*"):
        assert path.suffix not in {".pem", ".crt", ".cer"}
        if path.suffix == ".py":
            assert "BEGIN CERTIFICATE" not in path.read_text()
    trusted = ssl.create_default_context().cert_store_stats()
    device = Device(DEVICE, "AK", "SEC")
    assert device._tls.build().cert_store_stats() == trusted


def test_no_busy_loop_while_the_broker_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    dials: list[float] = []

    def counted(*args: Any) -> Any:
        dials.append(time.monotonic())
        return dial_steps(*args)

    with scripted() as broker:
        with connected(broker, reconnect_min=0.2, reconnect_max=0.2) as (device, events):
            broker.stop()
            turn_until(device, lambda: "disconnect" in events.names)
            monkeypatch.setattr("pubsub_losant.client.device.dial_steps", counted)
            began, turns, cpu = time.monotonic(), 0, time.thread_time()
            while time.monotonic() - began < 0.45:
                device.loop(0.05)
                turns += 1
            assert len(dials) <= 3
            assert turns < 20
            assert time.thread_time() - cpu < 0.1


def test_one_tcp_connection_per_attempt() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        for count in range(1, 4):
            broker.cut()
            turn_until(device, lambda wanted=count: events.names.count("reconnect") == wanted)  # type: ignore[misc] # mypy infers no default
        assert len(broker.accepted) == len(broker.of(CONNECT)) == 4


def test_a_failed_first_connect_leaves_a_usable_object() -> None:
    with scripted() as broker:
        broker.stop()
        device = make(broker)
        with pytest.raises(ConnectionRefusedError):
            device.connect(blocking=False)
        broker.start()
        device.connect(blocking=False)
        turn_until(device, device.is_connected)
        device.close()


def test_a_device_closed_while_offline_stays_closed() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        broker.stop()
        turn_until(device, lambda: "disconnect" in events.names)
        device.close()
        broker.start()
        before = len(broker.accepted)
        for _ in range(5):
            device.loop(0.03)
        assert len(broker.accepted) == before
        assert events.names[-1] == "close"


def test_is_connected_is_a_bool_in_every_phase() -> None:
    with scripted() as broker:
        device = make(broker)
        assert device.is_connected() is False
        device.connect(blocking=False)
        assert device.is_connected() is False
        turn_until(device, device.is_connected)
        assert device.is_connected() is True
        device.close()
        assert device.is_connected() is False


@pytest.mark.parametrize("payload", [b"not json", b"\xff\xfe", b'{"a":NaN}', b"[1]"])
def test_a_malformed_command_does_not_kill_the_loop(payload: bytes) -> None:
    with scripted() as broker, connected(broker) as (device, events):
        broker.send(command(payload) + command('{"name":"after"}'))
        turn_until(device, lambda: events.of("command"))
        assert events.of("command") == [({"name": "after"},)]


@pytest.mark.parametrize(
    "date",
    [
        '"2016-06-01T01:09:51Z"',
        '"2016-06-01T01:09:51.0000000Z"',
        "1464743391000",
        '{"$numberLong":"1464743391000"}',
    ],
)
def test_every_form_of_a_date_in_a_command_is_read(date: str) -> None:
    with scripted() as broker, connected(broker) as (device, events):
        broker.send(command(f'{{"name":"n","time":{{"$date":{date}}}}}'))
        turn_until(device, lambda: events.of("command"))
        at = dt.datetime(2016, 6, 1, 1, 9, 51, tzinfo=dt.UTC)
        assert events.of("command") == [({"name": "n", "time": at},)]


def test_a_null_command_calls_no_observer_without_its_argument() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        broker.send(command("null") + command('{"name":"after"}'))
        turn_until(device, lambda: events.of("command"))
        assert events.of("command") == [({"name": "after"},)]
        assert device.stats["bad_commands"] == 1


def test_a_raising_observer_makes_no_poison_message() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        calls: list[str] = []

        def broken(_: Device, found: dict[str, Any]) -> None:
            calls.append(found["name"])
            raise RuntimeError

        device.add_event_observer("command", broken)
        broker.send(command('{"name":"1"}'))
        turn_until(device, lambda: calls)
        device.loop(0.05)
        broker.send(command('{"name":"2"}'))
        turn_until(device, lambda: len(calls) > 1)
        assert calls == ["1", "2"]
        assert len(events.of("error")) >= 1


def test_observers_may_change_while_they_are_called() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        calls: list[str] = []

        def first(each: Device, _: Any) -> None:
            each.remove_event_observer("command", first)
            each.add_event_observer("command", lambda *_: calls.append("new"))

        device.add_event_observer("command", first)
        device.add_event_observer("command", lambda *_: calls.append("second"))
        broker.send(command('{"name":"1"}'))
        turn_until(device, lambda: calls)
        assert calls == ["second"]


def _sent(state: dict[str, Any], time_like: Any) -> Any:
    with scripted() as broker, connected(broker) as (device, _):
        assert device.send_state(state, time_like) is True
        wait_until(lambda: broker.of(PUBLISH))
        return json.loads(broker.of(PUBLISH)[0].payload)["time"]


def test_gmtime_is_not_shifted_by_the_local_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_zone("America/New_York", monkeypatch):
        assert _sent({"a": 1}, time.gmtime(1476479740)) == 1476479740000


def test_the_epoch_is_a_time_and_not_now() -> None:
    assert _sent({"a": 1}, dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_invalid_json_is_sent(value: float) -> None:
    with scripted() as broker, connected(broker) as (device, _):
        with pytest.raises(ValueError, match=r"."):
            device.send_state({"a": value})
        with pytest.raises(ValueError, match=r"."):
            device.send_state({"a": 1}, value)
        assert not broker.of(PUBLISH)


def test_a_refused_protocol_is_not_answered_with_an_older_one() -> None:
    with scripted(connack=b"\x20\x02\x00\x01") as broker:
        with pytest.raises(LosantConnectError):
            make(broker).connect()
        (only,) = broker.of(CONNECT)
        assert only.body[:7] == b"\x00\x04MQTT\x04"


def test_no_state_goes_out_before_connack() -> None:
    with scripted(connack=None) as broker:
        device = make(broker)
        device.connect(blocking=False)
        wait_until(lambda: broker.of(CONNECT))
        assert device.send_state({"a": 1}) is False
        device.loop(0.05)
        assert not broker.of(PUBLISH)
        device.close()


def test_wrong_credentials_are_not_dialled_again_by_every_loop() -> None:
    with scripted(connack=b"\x20\x02\x00\x05") as broker:
        device = make(broker)
        device.connect(blocking=False)
        with pytest.raises(LosantAuthError):
            turn_until(device, lambda: False)
        for _ in range(3):
            device.loop(0.02)
        assert len(broker.accepted) == 1


def test_there_are_qos_1_an_offline_buffer_gateways_and_any_port() -> None:
    with scripted() as broker:
        with connected(broker, Gateway, qos=1, buffer_offline=5) as (gateway, events):
            assert gateway.send_state({"a": 1})
            wait_until(lambda: broker.of(PUBLISH))
            assert broker.of(PUBLISH)[0].raw[0] == 0x32
            assert gateway.add_peripheral("my-peripheral").send_state({"a": 1})
            broker.cut()
            turn_until(gateway, lambda: "disconnect" in events.names)
            assert gateway.send_state({"a": 2})
            turn_until(gateway, lambda: len(broker.of(PUBLISH)) >= 3)


def test_connect_is_told_when_commands_are_subscribed() -> None:
    with scripted(suback=False) as broker:
        device = make(broker)
        events = Events().watch(device)
        device.connect(blocking=False)
        turn_until(device, lambda: broker.of(SUBSCRIBE))
        device.loop(0.05)
        assert events.names == []
        broker.send(b"\x90\x03" + broker.of(SUBSCRIBE)[0].packet_id + b"\x00")
        turn_until(device, lambda: events.names == ["connect"])
        device.close()


def test_every_name_argument_and_default_is_that_of_the_original() -> None:
    def shown(function: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(each.name, each.default) for each in found if each.kind is not each.KEYWORD_ONLY]

    none = inspect.Parameter.empty
    assert shown(Device) == [
        ("device_id", none),
        ("key", none),
        ("secret", none),
        ("secure", True),
        ("transport", "tcp"),
    ]
    assert shown(Device.connect)[1:] == [("blocking", True)]
    assert shown(Device.loop)[1:] == [("timeout", 1)]
    assert shown(Device.send_state)[1:] == [("state", none), ("time_like", None)]
    for name in ("add_event_observer", "remove_event_observer"):
        assert shown(getattr(Device, name))[1:] == [("event_name", none), ("observer", none)]
    assert shown(Device.close)[1:] == shown(Device.is_connected)[1:] == []
    assert Device.mqtt_endpoint == "broker.losant.com"
