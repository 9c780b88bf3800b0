"""States and commands between a program of the core and the wire."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import msgspec
import pytest

from pubsub_losant import DeviceCommand, DeviceState
from pubsub_losant.backend.payloads import (
    BadState,
    Received,
    read_command,
    read_states,
    write_states,
    write_will,
)
from pubsub_losant.states import encode_state
from tests.losant.vectors import NOW, VECTORS, by_id, payload_of, python_value

WHEN = dt.datetime(2026, 3, 1, 12, 30, 0, 250_000, tzinfo=dt.UTC)
WHEN_MS = 1_772_368_200_250


def written(value: Any) -> Any:
    return json.loads(write_states(msgspec.json.encode(value), NOW))


class Start(msgspec.Struct):
    at: dt.datetime


class StartCommand(msgspec.Struct):
    payload: Start


# --- to the platform --------------------------------------------------------------------


def test_attributes_get_the_time_and_are_the_bytes_of_a_device() -> None:
    state = {"temperature": 21.5, "on": True, "name": "Küche", "count": 3}
    assert write_states(msgspec.json.encode(state), NOW) == encode_state(state, now=NOW).encode()


@pytest.mark.parametrize(
    ("time", "sent"),
    [
        (None, NOW),
        (WHEN, WHEN_MS),
        (WHEN.replace(tzinfo=None), WHEN_MS),
        (WHEN.astimezone(dt.timezone(dt.timedelta(hours=2))), WHEN_MS),
        (1_772_368_200, 1_772_368_200),
        (1_772_368_200.25, WHEN_MS),
        (-60_000, -60_000),
        (0, NOW),
    ],
)
def test_a_state_with_a_time(time: Any, sent: int) -> None:
    assert written(DeviceState({"a": 1}, time)) == {"data": {"a": 1}, "time": sent}


def test_everything_that_a_state_can_say() -> None:
    state = DeviceState({"a": "x"}, WHEN, flow_version="v2", meta={"by": ["me"]})
    assert written(state) == {
        "data": {"a": "x"},
        "time": WHEN_MS,
        "flowVersion": "v2",
        "meta": {"by": ["me"]},
    }


@pytest.mark.parametrize(
    ("time", "sent"),
    [
        ({"$date": "2026-03-01T12:30:00.250Z"}, {"$date": "2026-03-01T12:30:00.250Z"}),
        ("yesterday", "yesterday"),
        ("2026-03-01T12:30:00.250999", WHEN_MS),
    ],
)
def test_times_in_the_platform_s_own_forms(time: Any, sent: Any) -> None:
    assert written({"data": {"a": 1}, "time": time})["time"] == sent


def test_several_states_are_one_array() -> None:
    assert written([DeviceState({"a": 1}, WHEN), {"a": 2}]) == [
        {"data": {"a": 1}, "time": WHEN_MS},
        {"data": {"a": 2}, "time": NOW},
    ]


def test_attributes_may_be_called_as_members_are() -> None:
    assert written({"data": 5, "time": 7, "meta": "x"})["data"] == {
        "data": 5,
        "time": 7,
        "meta": "x",
    }


def test_values_in_extended_json_are_the_platform_s() -> None:
    value = {"since": {"$date": "2026-03-01T12:30:00.250Z"}, "gone": {"$undefined": True}}
    assert written(value)["data"] == value


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b'{"a": NaN}', "no JSON"),
        (b"21.5", "neither an object"),
        (b'"text"', "neither an object"),
        (b"[]", "neither an object"),
        (b"[1]", "neither an object"),
        (b'{"a": {"b": 1}}', "attribute 'a' is an object"),
        (b'{"a": [1]}', "attribute 'a' is a list"),
        (b'{"data": {"a": 1}, "other": 2}', "attribute 'data' is an object"),
        (b'{"data": {"a": 1}, "time": true}', "not True or False"),
        (b'{"data": {"a": 1}, "time": "1969-12-31T00:00:00Z"}', "before 1970"),
        (b'{"data": {"a": 1}, "time": [1]}', "no time"),
        (b'{"data": {"a": 1}, "flowVersion": 2}', "flowVersion is text"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_state(payload: bytes, says: str) -> None:
    with pytest.raises(BadState, match=says):
        write_states(payload, NOW)


def test_a_refusal_holds_no_value() -> None:
    with pytest.raises(BadState) as caught:
        write_states(b'{"a": ["very private"]}', NOW)
    assert "private" not in str(caught.value)


def test_a_will_has_no_time() -> None:
    assert json.loads(write_will(b'{"online": false}')) == {"data": {"online": False}}
    with pytest.raises(BadState, match="time"):
        write_will(b'{"data": {"online": false}, "time": 5}')
    with pytest.raises(BadState, match="one state"):
        write_will(b'[{"online": false}]')


# --- from the platform --------------------------------------------------------------------


def test_a_state_comes_back_as_it_was_published() -> None:
    state = DeviceState({"a": 1.5, "b": "x"}, WHEN, flow_version="v", meta=[1])
    (found,) = read_states(write_states(msgspec.json.encode(state), NOW), NOW)
    assert msgspec.json.decode(found.payload, type=DeviceState) == state
    assert found.ms == WHEN_MS


@pytest.mark.parametrize(
    "case", VECTORS["dev_broker_state_time"]["cases"], ids=lambda case: repr(case["time"])
)
def test_received_states_have_the_time_that_the_platform_reads(case: dict[str, Any]) -> None:
    (found,) = read_states(json.dumps({"data": {"a": 1}, "time": case["time"]}).encode(), NOW)
    state = msgspec.json.decode(found.payload, type=DeviceState)
    assert isinstance(state.time, dt.datetime)
    if "ms" in case:  # the others are too old or too new for the platform
        assert found.ms == case["ms"]
        assert state.time == dt.datetime.fromtimestamp(case["ms"] / 1000, dt.UTC)


def test_an_array_is_one_message_for_each_state() -> None:
    sent = write_states(msgspec.json.encode([{"a": 1}, DeviceState({"a": 2}, WHEN)]), NOW)
    states = [
        msgspec.json.decode(each.payload, type=DeviceState) for each in read_states(sent, NOW)
    ]
    assert [each.data["a"] for each in states] == [1, 2]
    assert states[1].time == WHEN


@pytest.mark.parametrize("payload", [b"", b"\xff\x00", b"7", b"[]", b"[1]", b"{", b"[" * 100_000])
def test_what_came_and_is_no_state_stays(payload: bytes) -> None:
    assert list(read_states(payload, NOW)) == [Received(payload, None)]


@by_id("command")
def test_every_command_of_the_vectors(case: dict[str, Any]) -> None:
    payload = payload_of(case)
    found = read_command(payload)
    if not case["ours"]["event"]:
        assert found == Received(payload, None)
        return
    wanted = python_value(case["ours"]["command"])
    # Dates are text here, for whoever decodes: what is compared is the text of both.
    same = json.loads(msgspec.json.encode(wanted))
    got = json.loads(found.payload)
    if isinstance(wanted.get("time"), int | float) and not isinstance(wanted["time"], bool):
        same["time"] = got["time"]
        assert isinstance(msgspec.convert(got["time"], dt.datetime), dt.datetime)
    assert got == same


def test_a_command_for_a_typed_handler() -> None:
    payload = b'{"name":"start","payload":{"at":{"$date":1772368200250}},"time":1772368200250}'
    command = msgspec.json.decode(read_command(payload).payload, type=DeviceCommand)
    assert command == DeviceCommand("start", {"at": "2026-03-01T12:30:00.250000Z"}, WHEN)
    assert read_command(payload).ms == WHEN_MS

    typed = msgspec.json.decode(read_command(payload).payload, type=StartCommand)
    assert typed.payload.at == WHEN


def test_a_command_without_dates_is_not_touched() -> None:
    payload = b'{ "name" : "x",  "payload": [1.0, 1e2] }'
    assert read_command(payload) == Received(payload, None)
