"""What goes over the wire, without a wire: times, states, commands, topics."""

from __future__ import annotations

import datetime as dt
import json
import time
from typing import Any

import pytest

from pubsub_losant.commands import ABSENT, BadCommand, encode_command, parse_command
from pubsub_losant.errors import (
    LosantAuthError,
    LosantConnectError,
    LosantError,
    LosantProtocolError,
    LosantTLSError,
)
from pubsub_losant.states import encode_state, join_states
from pubsub_losant.times import (
    epoch_ms,
    format_date,
    platform_time,
    read_date,
    resolve_time,
    within_limits,
)
from pubsub_losant.topics import (
    check_custom_topic,
    check_device_id,
    command_topic,
    encode_hello,
    hello_topic,
    split_topic,
    state_topic,
)

from .vectors import (
    DEVICE,
    ERRORS,
    NOW,
    VECTORS,
    by_id,
    local_zone,
    payload_of,
    python_time,
    python_value,
)


@by_id("time_like")
def test_every_time_is_sent_as_the_vectors_say_in_both_zones(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_zone(case["tz_env"], monkeypatch):
        given = python_time(case["input"])
        if "error" in case["ours"]:
            with pytest.raises(ERRORS[case["ours"]["error"]]):
                platform_time(given, NOW)
            return
        found = platform_time(given, NOW)
        assert found == case["ours"]["time"]
        assert type(found) is type(case["ours"]["time"])
        assert encode_state({"a": 1}, given, now=NOW) == case["ours"]["payload"]


@by_id("state")
def test_every_state_is_encoded_as_the_vectors_say(case: dict[str, Any]) -> None:
    state = python_value(case["state"])
    if "error" in case["ours"]:
        with pytest.raises(ERRORS[case["ours"]["error"]]):
            encode_state(state, case["time_like"], now=NOW)
    else:
        assert encode_state(state, case["time_like"], now=NOW) == case["ours"]["payload"]


def test_flow_version_and_meta_are_sent_only_when_given() -> None:
    text = encode_state({"a": 1}, 5, now=NOW, flow_version="v2", meta={"why": None})
    assert text == '{"data": {"a": 1}, "flowVersion": "v2", "meta": {"why": null}, "time": 5}'


def test_several_states_are_one_array() -> None:
    assert json.loads(join_states(['{"a": 1}', '{"b": 2}'])) == [{"a": 1}, {"b": 2}]


@by_id("command")
def test_every_command_payload_is_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    if not case["ours"]["event"]:
        with pytest.raises(BadCommand):
            parse_command(payload_of(case))
        return
    found = parse_command(payload_of(case))
    wanted = python_value(case["ours"]["command"])
    assert found == wanted
    _same_zones(found, wanted)


def _same_zones(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dt.datetime):
        assert found.tzinfo is dt.UTC
    elif isinstance(wanted, dict):
        for name, value in wanted.items():
            _same_zones(found[name], value)
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            _same_zones(one, other)


@pytest.mark.parametrize(
    "payload", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b'{"a":1} x']
)
def test_a_hostile_command_payload_is_only_bad(payload: bytes) -> None:
    with pytest.raises(BadCommand):
        parse_command(payload)


@pytest.mark.parametrize(
    "text",
    [
        '{"$date":"2016-06-01T01:09:51.145Z"}',
        '{"$date":{"$numberLong":"5"}}',
        '{"$undefined":true}',
    ],
)
def test_the_command_itself_is_never_converted(text: str) -> None:
    assert parse_command(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "date",
    ["true", "1.5", "null", '{"$numberLong":5}', '{"$numberLong":"x"}', "99999999999999999999"],
)
def test_a_date_that_is_none_stays_as_it_is(date: str) -> None:
    text = f'{{"name":"n","time":{{"$date":{date}}}}}'
    assert parse_command(text.encode()) == json.loads(text)


def test_a_command_is_written_as_the_platform_does() -> None:
    at = dt.datetime(2016, 6, 1, 1, 9, 51, 145_999, tzinfo=dt.UTC)
    assert encode_command("start", {"one": [2, 3]}, at) == (
        b'{"name":"start","payload":{"one":[2,3]},"time":{"$date":"2016-06-01T01:09:51.145Z"}}'
    )
    assert encode_command("é", ABSENT) == '{"name":"é"}'.encode()
    assert encode_command("n", None, 0) == (
        b'{"name":"n","payload":null,"time":{"$date":"1970-01-01T00:00:00.000Z"}}'
    )
    assert json.loads(encode_command("n", "\ud800")) == {"name": "n", "payload": "\ud800"}


@pytest.mark.parametrize("name", ["", "x" * 256])
def test_a_command_needs_a_name_of_1_to_255_characters(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 255"):
        encode_command(name)


def test_what_was_written_as_a_command_is_read_back() -> None:
    at = dt.datetime(2016, 6, 1, 1, 9, 51, 145_000, tzinfo=dt.UTC)
    found = parse_command(encode_command("n", {"when": at}, at))
    assert found == {"name": "n", "payload": {"when": at}, "time": at}


@pytest.mark.parametrize("case", VECTORS["dev_broker_state_time"]["cases"], ids=repr)
def test_a_received_time_is_read_as_the_platform_does(case: dict[str, Any]) -> None:
    found = resolve_time(case["time"], NOW)
    if "ignored" in case:
        assert not within_limits(found, NOW)
    else:
        assert found == case["ms"]
        assert within_limits(found, NOW)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), [], {}, {"$date": "x"}, {"$date": 1, "x": 2}, "Tue, 99"]
)
def test_a_received_time_that_cannot_be_read_is_now(value: Any) -> None:
    assert resolve_time(value, NOW) == NOW


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2016-06-01", 1464739200000),
        ("2016-06-01T01:09Z", 1464743340000),
        ("2016-06-01 01:09:51+01", 1464739791000),
        ("2016-02-30T00:00:00Z", None),
        ("2016-06-01T01:09:51+24:00", None),
        ("0001-01-01T00:00:00+01:00", None),
        ("2016-06-01T01:09:51.Z", None),
        ("²016-06-01T01:09:51Z", None),
    ],
)
def test_dates_as_text(text: str, ms: int | None) -> None:
    found = read_date(text)
    assert (None if found is None else epoch_ms(found)) == ms


def test_a_mail_date_without_a_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_zone("Asia/Tokyo", monkeypatch):
        assert resolve_time("Tue, 14 Nov 2023 22:13:20 -0000", 0) == 1_700_000_000_000
        assert resolve_time("14 Nov 2023 22:13:20", 0) == 1_700_000_000_000


def test_a_state_may_be_30_days_old_and_a_day_ahead() -> None:
    day = 86_400_000
    assert within_limits(NOW - 30 * day, NOW)
    assert within_limits(NOW + day, NOW)
    assert not within_limits(NOW - 30 * day - 1, NOW)
    assert not within_limits(NOW + day + 1, NOW)


def test_a_written_date_has_three_digits_and_is_utc() -> None:
    zone = dt.timezone(dt.timedelta(hours=2))
    assert format_date(dt.datetime(2016, 6, 1, 3, 0, 0, 999, zone)) == "2016-06-01T01:00:00.000Z"
    assert format_date(dt.datetime(7, 1, 1)) == "0007-01-01T00:00:00.000Z"  # noqa: DTZ001 # naive is UTC


def test_a_struct_time_before_1970_is_refused() -> None:
    with pytest.raises(ValueError, match="1970"):
        platform_time(time.gmtime(-5), NOW)


@pytest.mark.parametrize("case", VECTORS["topics"], ids=lambda case: case["device_id"])
def test_topics(case: dict[str, Any]) -> None:
    device = check_device_id(case["device_id"])
    assert state_topic(device) == case["state"]
    assert command_topic(device) == case["command"]
    assert hello_topic(device) == case.get("hello", hello_topic(device))
    assert split_topic(state_topic(device)) == (device, "state")
    assert split_topic(hello_topic(device)) == (device, "fromAgent/hello")


@pytest.mark.parametrize("topic", ["losant", "losant/", "losant/x", "losant//state", "a/b/state"])
def test_what_is_no_topic_of_a_device(topic: str) -> None:
    assert split_topic(topic) is None


@pytest.mark.parametrize(
    "case", VECTORS["bad_device_ids"], ids=lambda case: repr(case["device_id"])
)
def test_a_bad_device_id_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="device id"):
        check_device_id(case["device_id"])


@pytest.mark.parametrize("topic", ["losant/x/command", "losant", "losantx", "$SYS/x"])
def test_the_platforms_topics_are_no_custom_topics(topic: str) -> None:
    with pytest.raises(ValueError, match="begins with"):
        check_custom_topic(topic)
    assert check_custom_topic("alerts/1") == "alerts/1"


def test_hello_has_the_order_of_the_agents() -> None:
    assert encode_hello(compiler_options={"exportMemory": True, "traceLevel": 2}) == (
        b'{"service": "embeddedWorkflowAgent", "version": "1.0.0", "bundle": "nullVersion", '
        b'"compilerOptions": {"exportMemory": true, "traceLevel": 2}}'
    )
    assert b"compilerOptions" not in encode_hello("b1")
    assert DEVICE in hello_topic(DEVICE)


def test_every_error_is_a_losant_error_and_what_existing_programs_catch() -> None:
    for kind in (LosantConnectError, LosantAuthError, LosantTLSError, LosantProtocolError):
        assert issubclass(kind, LosantError)
    assert issubclass(LosantConnectError, ConnectionError)
    assert issubclass(LosantTLSError, OSError)
    assert str(LosantAuthError(4)) == "Invalid Losant credentials - error code 4"
    assert str(LosantTLSError("no", hint="do this")) == "no; do this"
    assert LosantConnectError("no", return_code=3).return_code == 3
