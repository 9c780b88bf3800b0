"""Back-off, the platform's limits kept at home, the offline buffer, and QoS 1."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from pubsub_losant.pacing_rules import BAN, Backoff, is_suspect, own_windows
from tests.losant.support import (
    PUBLISH,
    Events,
    Packet,
    ScriptedBroker,
    connected,
    limits_within,
    make,
    scripted,
    turn_until,
    wait_until,
)
from tests.losant.vectors import VECTORS

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_delays_double_up_to_thirty_seconds() -> None:
    backoff = Backoff(1.0, 30.0, spread=lambda: 1.0)
    assert [backoff.next() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]


def test_delays_begin_anew_after_a_minute_of_connection() -> None:
    backoff = Backoff(1.0, 30.0, spread=lambda: 1.0)
    assert [backoff.next(59.9), backoff.next(59.9), backoff.next(60.0)] == [1, 2, 1]


def test_delays_are_spread_by_a_fifth() -> None:
    found = [Backoff(1.0, 30.0).next() for _ in range(500)]
    assert 0.8 <= min(found) < 0.85
    assert 1.15 < max(found) <= 1.2


RULES = VECTORS["dev_broker_throttle"]["rules"]


@pytest.mark.parametrize("case", VECTORS["dev_broker_throttle"]["cases"], ids=lambda c: c["id"])
def test_what_the_guard_lets_go_the_platform_never_punishes(case: dict[str, Any]) -> None:
    if "send_rate_per_s" in case:
        wanted = [n / case["send_rate_per_s"] for n in range(case["duration_s"] * 3)]
    else:
        wanted = [at for at, count in case.get("send", [[0, 100]]) for _ in range(count)]
    windows = own_windows()
    sent: list[float] = []
    for at in wanted:
        if not windows.delay("t", at):
            windows.note("t", at)
            sent.append(at)
    count, seconds = RULES["per_topic"]
    for first, last in zip(sent, sent[count:], strict=False):
        assert last - first >= seconds
    assert len(sent) >= min(len(wanted), count)


def test_the_connection_has_a_limit_of_its_own() -> None:
    windows = own_windows()
    for number in range(300):
        assert not windows.delay(str(number), 0.0)
        windows.note(str(number), 0.0)
    assert windows.delay("another", 0.0) > 15
    assert is_suspect(windows, 1.0)
    assert not is_suspect(windows, 15.1)


def test_the_31st_state_within_15_seconds_is_dropped_and_told() -> None:
    with scripted() as broker, connected(broker, rate_guard="drop") as (device, _):
        told = Events().watch(device, "throttled")
        assert [device.send_state({"n": n}) for n in range(31)] == [True] * 30 + [False]
        assert device.publish("custom", b"x") is True, "the limit counts for each topic"
        device.loop(0)
        (((seconds,)),) = told.of("throttled")
        assert 14 < seconds <= 15.5
        wait_until(lambda: len(broker.of(PUBLISH)) == 31)
        assert device.stats["throttled"] == 1


def test_the_guard_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    limits_within(monkeypatch, 0.3)
    with scripted() as broker, connected(broker, rate_guard="wait") as (device, _):
        began = time.monotonic()
        assert all(device.send_state({"n": n}) for n in range(61))
        assert time.monotonic() - began > 0.5
        wait_until(lambda: len(broker.of(PUBLISH)) == 61)
        found = [json.loads(packet.payload)["data"]["n"] for packet in broker.of(PUBLISH)]
        assert found == list(range(61))


def test_close_ends_what_waits_for_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    limits_within(monkeypatch, 15.0)
    with scripted() as broker, connected(broker, rate_guard="wait") as (device, _):
        results: list[bool] = []
        for n in range(30):
            device.send_state({"n": n})
        thread = threading.Thread(target=lambda: results.append(device.send_state({"n": 30})))
        thread.start()
        wait_until(lambda: device.stats["throttled"])
        device.close()
        thread.join(5)
        assert results == [False]


@pytest.mark.parametrize(
    ("host", "guard", "expected"),
    [
        ("broker.losant.com", None, "drop"),
        ("broker.losant.com", "off", "off"),
        ("broker.eu.losant.com", None, "drop"),
        ("Broker.Losant.com.", None, "drop"),
        ("losant.com.example", None, "off"),
        ("127.0.0.1", None, "off"),
        ("127.0.0.1", "wait", "wait"),
    ],
)
def test_the_guard_is_on_for_the_platform_only(host: str, guard: Any, expected: str) -> None:
    with scripted() as broker:
        device = make(broker, host=host, rate_guard=guard)
        device._open()
        assert device._guard == expected
        device._over()


def test_after_a_loss_that_may_be_a_ban_it_waits_for_it_to_end() -> None:
    with scripted() as broker, connected(broker, rate_guard="off") as (device, events):
        for n in range(31):
            device.send_state({"n": n})
        wait_until(lambda: len(broker.of(PUBLISH)) == 31)
        broker.cut()
        turn_until(device, lambda: "disconnect" in events.names)
        assert device._retry_at is not None
        assert device._retry_at - time.monotonic() > BAN - 1


# --- the offline buffer ------------------------------------------------------------------


def _numbers(packets: list[Packet]) -> list[list[int]]:
    return [[each["data"]["n"] for each in json.loads(packet.payload)] for packet in packets]


def _flat(found: list[list[int]]) -> list[int]:
    return [each for some in found for each in some]


def _down(broker: ScriptedBroker, device: Any, events: Events) -> None:
    broker.connack = b"\x20\x02\x00\x03"
    broker.cut()
    turn_until(device, lambda: "disconnect" in events.names)


def test_the_newest_states_are_kept_in_order_and_sent_as_arrays() -> None:
    with scripted() as broker, connected(broker, buffer_offline=250) as (device, events):
        _down(broker, device, events)
        assert all(device.send_state({"n": n}, 1000 + n) for n in range(300))
        assert device.stats["dropped"] == 50
        broker.connack = b"\x20\x02\x00\x00"
        turn_until(device, lambda: len(broker.of(PUBLISH)) == 3)
        found = _numbers(broker.of(PUBLISH))
        assert [len(each) for each in found] == [100, 100, 50]
        assert _flat(found) == list(range(50, 300))
        first = json.loads(broker.of(PUBLISH)[0].payload)[0]
        assert first == {"data": {"n": 50}, "time": 1050}


def test_what_is_kept_keeps_the_time_at_which_it_was_given() -> None:
    with scripted() as broker, connected(broker, buffer_offline=5) as (device, events):
        _down(broker, device, events)
        before = time.time_ns() // 1_000_000
        device.send_state({"n": 1})
        after = time.time_ns() // 1_000_000
        broker.connack = b"\x20\x02\x00\x00"
        turn_until(device, lambda: broker.of(PUBLISH))
        (kept,) = json.loads(broker.of(PUBLISH)[0].payload)
        assert before <= kept["time"] <= after


def test_arrays_stay_below_the_largest_payload() -> None:
    with scripted() as broker, connected(broker, buffer_offline=9) as (device, events):
        _down(broker, device, events)
        for n in range(9):
            assert device.send_state({"n": n, "text": "x" * 60_000})
        broker.connack = b"\x20\x02\x00\x00"
        turn_until(device, lambda: len(broker.of(PUBLISH)) == 3)
        assert _flat(_numbers(broker.of(PUBLISH))) == list(range(9))
        assert all(len(packet.payload) <= 262_144 for packet in broker.of(PUBLISH))


def test_a_state_that_fits_in_no_array_is_sent_by_itself_and_once() -> None:
    largest = 262_144 - len('{"data": {"text": ""}, "time": 1000}')
    with scripted() as broker, connected(broker, buffer_offline=9) as (device, events):
        _down(broker, device, events)
        sizes = (1, largest, largest - 2, largest - 1, 1)
        for size in sizes:
            assert device.send_state({"text": "x" * size}, 1000)
        broker.connack = b"\x20\x02\x00\x00"
        turn_until(device, lambda: len(broker.of(PUBLISH)) == 5)
        device.send_state({"text": "last"}, 1000)
        turn_until(device, lambda: len(broker.of(PUBLISH)) == 6)
        found = [json.loads(packet.payload) for packet in broker.of(PUBLISH)]
        assert [type(each) for each in found] == [list, dict, list, dict, list, dict]
        whole = [each[0] if isinstance(each, list) else each for each in found[:5]]
        assert [len(each["data"]["text"]) for each in whole] == list(sizes)
        assert all(len(packet.payload) <= 262_144 for packet in broker.of(PUBLISH))


def test_the_buffer_keeps_to_the_limits_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    limits_within(monkeypatch, 0.4)
    with scripted() as broker:
        with connected(broker, buffer_offline=150, rate_guard="drop") as (device, events):
            for n in range(29):
                device.send_state({"n": n})
            wait_until(lambda: len(broker.of(PUBLISH)) == 29)
            _down(broker, device, events)
            device._retry_at = time.monotonic()  # not the half minute of a suspected ban
            broker.packets.clear()
            for n in range(150):
                device.send_state({"n": n})
            broker.connack = b"\x20\x02\x00\x00"
            turn_until(device, device.is_connected)
            assert device.send_state({"n": 150}) is True, "kept behind those that wait"
            assert device.publish("custom", b"[]") is True, "which hold up nothing else"
            turn_until(device, lambda: len(broker.of(PUBLISH)) == 3)
        assert _flat(_numbers(broker.of(PUBLISH))) == list(range(151))


def test_without_a_buffer_a_state_is_refused_while_offline() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        _down(broker, device, events)
        assert device.send_state({"n": 1}) is False
        broker.connack = b"\x20\x02\x00\x00"
        turn_until(device, lambda: "reconnect" in events.names)
        assert not broker.of(PUBLISH)


# --- QoS 1 -------------------------------------------------------------------------------


def test_a_state_at_qos_1_is_sent_again_until_it_is_acknowledged() -> None:
    with scripted(puback=False) as broker, connected(broker, qos=1) as (device, events):
        assert device.send_state({"n": 1}, 5) is True
        wait_until(lambda: broker.of(PUBLISH))
        assert broker.of(PUBLISH)[0].raw[0] == 0x32
        broker.puback = True
        broker.cut()
        turn_until(device, lambda: "reconnect" in events.names)
        turn_until(device, lambda: len(broker.of(PUBLISH)) == 2)
        again = broker.of(PUBLISH)[1]
        assert again.raw[0] == 0x3A, "DUP"
        assert again.payload == broker.of(PUBLISH)[0].payload
        turn_until(device, lambda: not device._connection.unfinished)


def test_the_quality_of_one_message_can_differ() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        assert device.publish("a", b"x", qos=1) is True
        wait_until(lambda: broker.of(PUBLISH))
        assert broker.of(PUBLISH)[0].raw[0] == 0x32
        with pytest.raises(ValueError, match="QoS"):
            device.publish("a", b"x", qos=2)
