"""What becomes of state messages: times, shapes, types."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_losant.server.state_intake import MAX_TEXT, convert, number_text, read_states
from tests.losant.vectors import NOW, VECTORS

CASES: list[dict[str, Any]] = VECTORS["dev_broker_state_time"]["cases"]


@pytest.mark.parametrize("case", CASES, ids=[json.dumps(case["time"]) for case in CASES])
def test_the_times_of_the_vectors(case: dict[str, Any]) -> None:
    payload = json.dumps({"data": {"a": 1}, "time": case["time"]}).encode()
    states, reasons = read_states(payload, NOW)
    if "ignored" in case:
        assert states == []
        assert reasons == ["it is " + case["ignored"].replace("24 h", "a day")]
    else:
        assert [each.ms for each in states] == [case["ms"]]
        assert reasons == []


def test_a_state_without_time_is_now() -> None:
    (state,), _ = read_states(b'{"data":{"a":1},"meta":{"x":[1]},"flowVersion":"v1"}', NOW)
    assert (state.ms, state.data, state.meta, state.flow_version) == (
        NOW,
        {"a": 1},
        {"x": [1]},
        "v1",
    )


@pytest.mark.parametrize("payload", [
    b'{"time":{"$date":"2023-11-14T22:13:20.000Z"},"data":{"temperature":72}}',  # npm
    b'{"time":1700000000000,"data":{"temperature":72}}',  # Ruby
    b'{"data": {"temperature": 72}, "time": 1700000000000}',  # Python
])  # fmt: skip
def test_the_forms_of_all_clients_are_taken(payload: bytes) -> None:
    (state,), reasons = read_states(payload, NOW + 5)
    assert (state.ms, state.data, reasons) == (NOW, {"temperature": 72}, [])


def test_of_an_array_each_state_stands_for_itself() -> None:
    payload = json.dumps([
        {"data": {"a": 1}, "time": NOW},
        {"data": {"a": 2}, "time": 1},
        {"dta": {"a": 3}},
        [],
        {"data": {"a": 4}, "time": NOW + 1, "more": 1},
        {"data": {"a": 5}, "time": NOW + 2},
    ]).encode()  # fmt: skip
    states, reasons = read_states(payload, NOW)
    assert [(each.ms, each.data) for each in states] == [(NOW, {"a": 1}), (NOW + 2, {"a": 5})]
    assert len(reasons) == 4


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"nonsense", b"\xff", b"\xef\xbb\xbf{}", b"null", b"1", b"{}", b"[]", b'{"data":1}',
        b'{"data":[]}', b'{"data":null}', b'{"data":{},"x":1}', b'{"data":{"a":NaN}}', b"[" * 5000,
        b'{"data":{"a":1e999}}', b'{"data":{"a":"\\ud800"}}', b'{"data":{"a":1},"flowVersion":""}',
        b'{"data":{"a":1},"flowVersion":1}', b'{"data":{"a":1}} x',
        b"[" + b'{"data":{}},' * 1000 + b'{"data":{}}]',
        b'{"data":{"a":' + b"1" * 5000 + b"}}", b'{"data":{"a":1},"time":' + b"9" * 60 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_state_is_left_out_with_a_reason(payload: bytes) -> None:
    states, reasons = read_states(payload, NOW)
    assert states == []
    assert len(reasons) == 1
    assert reasons[0]


def test_only_good_names_of_registered_attributes_are_kept() -> None:
    data = {"a": 1, "b": "2", "c": True, "other": 1, "no good": 1, "": 1, "x" * 256: 1}
    (state,), _ = read_states(json.dumps({"data": data}).encode(), NOW)
    assert state.data == {"a": 1, "b": "2", "c": True, "other": 1}
    assert set(state.dropped) == {"no good", "", "x" * 256}
    (state,), _ = read_states(
        json.dumps({"data": data}).encode(), NOW, {"a": "string", "b": "number", "c": "number"}
    )
    assert state.data == {"a": "1", "b": 2}
    assert "c" in state.dropped
    (state,), _ = read_states(b'{"data":{"z":1}}', NOW, {})
    assert state.data == {}


@pytest.mark.parametrize(("value", "kind", "kept"), [
    (1, "number", 1), (1.5, "number", 1.5), (" 21.50 ", "number", 21.5), ("-3", "number", -3),
    ("1e3", "number", 1000.0), (".5", "number", 0.5), ("0x10", "number", None),
    ("nan", "number", None), ("", "number", None), ("1_0", "number", None), (True, "number", None),
    ("9" * 500, "number", None), ("1e999", "number", None), (2**80, "number", float(2**80)),
    (10**400, "number", None), (True, "boolean", True), ("TRUE", "boolean", True),
    ("False", "boolean", False), (0, "boolean", False), (1.0, "boolean", True),
    (2, "boolean", None), ("1", "boolean", None), ("text", "string", "text"),
    (1, "string", "1"), (1.0, "string", "1"), (0.5, "string", "0.5"), (True, "string", "true"),
    ("x" * MAX_TEXT, "string", "x" * MAX_TEXT), ("x" * (MAX_TEXT + 1), "string", None),
    ("é" * 40_000, "string", None), ("1,2", "gps", "1,2"), (1, "gps", None),
    ("raw", "blob", "raw"), (True, "blob", None), (None, "string", None), ([], "string", None),
    ({}, "number", None), ({"$undefined": True}, "string", None), (None, None, None),
    ([1], None, None), ("text", None, "text"), (False, None, False), (2, None, 2),
    ("x" * (MAX_TEXT + 1), None, None),
])  # fmt: skip
def test_values_take_the_type_of_their_attribute(value: Any, kind: Any, kept: Any) -> None:
    found = convert(value, kind)
    assert found == kept
    assert type(found) is type(kept)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_text_of_a_number_is_that_number(number: float) -> None:
    text = number_text(number)
    assert float(text) == number
    assert len(text.lstrip("-").replace(".", "").strip("0")) <= 22


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["data", "time", "meta", "flowVersion", "$date", "$numberLong", "a"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_json_is_too_strange_and_everything_kept_can_be_written(value: Any) -> None:
    for payload in (json.dumps(value), json.dumps({"data": {"a": value}, "time": value})):
        states, _ = read_states(payload.encode(), NOW)
        for state in states:
            assert abs(state.ms - NOW) <= 30 * 86_400_000
            assert msgspec.json.decode(msgspec.json.encode(state.data)) == state.data
            assert all(
                math.isfinite(each) for each in state.data.values() if isinstance(each, float)
            )


@given(st.binary(max_size=60))
def test_no_bytes_are_too_strange(payload: bytes) -> None:
    states, reasons = read_states(payload, NOW)
    assert states or reasons
