"""JetStream's words without sockets: acknowledgements, positions, names, durations, errors."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core.errors import (
    ConnectError,
    LimitReached,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    SubscribeFailed,
)
from pubsub_core.message import Verdict
from pubsub_nats.jetstream import (
    ApiError,
    ack_payload,
    consumer_name,
    covers,
    overlaps,
    parse_ack,
    parse_answer,
    parse_position,
    parse_ttl,
    publish_error,
    stream_error,
    subscribe_error,
    whole_seconds,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "nats_vectors.json").read_text()
)
ERRORS = {each["err_code"]: each for each in VECTORS["jetstream_errors"]}


def error(number: int) -> ApiError:
    return ApiError(ERRORS[number]["code"], number, ERRORS[number]["text"])


def test_an_answer_to_a_publish() -> None:
    ack = parse_ack(b'{"stream":"S","seq":7,"duplicate":true,"domain":"hub"}')
    assert ack is not None
    assert (ack.stream, ack.seq, ack.duplicate, ack.error) == ("S", 7, True, None)


def test_an_error_has_a_number_as_well_that_means_nothing() -> None:
    ack = parse_ack(
        b'{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},'
        b'"stream":"S","seq":0}'
    )
    assert ack is not None
    assert ack.error is not None
    assert ack.error.err_code == 10077


@pytest.mark.parametrize("payload", [b"", b"hello", b"[]", b"{}", b"\xff", b'{"seq":"x"}', b"1"])
def test_what_somebody_else_answers_is_no_acknowledgement(payload: bytes) -> None:
    assert parse_ack(payload) is None


@given(st.binary(max_size=80))
def test_no_answer_raises_anything_else(payload: bytes) -> None:
    parse_ack(payload)
    parse_position(payload)
    with contextlib.suppress(ApiError):
        parse_answer(payload)


def test_where_a_delivery_stands() -> None:
    plain = parse_position(b"$JS.ACK.S.c.2.17.5.1700000000500000000.3")
    assert plain is not None
    assert plain == (2, 17, 5, 1700000000.5, 3)
    for behind in (b"", b".token"):
        found = parse_position(b"$JS.ACK.hub.hash.S.c.2.17.5.1700000000500000000.3" + behind)
        assert found == plain


@pytest.mark.parametrize(
    "reply", [b"", b"_INBOX.a.b", b"$JS.FC.S.c.x", b"$JS.ACK.S.c.x.1.1.1.1", b"$JS.ACK.S.c.1.1"]
)
def test_other_replies_are_no_delivery(reply: bytes) -> None:
    assert parse_position(reply) is None


def test_what_settles_a_message() -> None:
    assert ack_payload(Verdict.ACK) == b"+ACK"
    assert ack_payload(Verdict.NACK) == b"-NAK"
    assert ack_payload(Verdict.NACK, 0.5) == b'-NAK {"delay": 500000000}'
    assert ack_payload(Verdict.REJECT) == b"+TERM"
    assert ack_payload(Verdict.ACK, working=True) == b"+WPI"


@pytest.mark.parametrize(("ttl", "text"), [(0.01, "1s"), (1, "1s"), (1.2, "2s"), (3600, "3600s")])
def test_durations_are_rounded_up(ttl: float, text: str) -> None:
    assert whole_seconds(ttl) == text
    assert parse_ttl(text) == float(text[:-1])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1500ms", 1.5), ("1h1m1s", 3661), ("never", None), ("", None), (None, None), ("1x", None),
     ("-1s", None), ("5", 5), ("²", None)],
)  # fmt: skip
def test_durations_of_others(text: str | None, seconds: float | None) -> None:
    assert parse_ttl(text) == seconds


@given(st.text(max_size=300), st.text(max_size=300))
def test_names_hold_nothing_that_the_server_refuses(group: str, about: str) -> None:
    name = consumer_name("g", group.encode("utf-8", "replace").decode(), "x")
    assert len(name) < 255
    assert not set(name) & set(" \t\n.*>/\\")
    assert consumer_name("g", "a", "b") != consumer_name("g", "ab", "")


@pytest.mark.parametrize("vector", VECTORS["match"], ids=lambda v: f"{v['filter']} {v['topic']}")
def test_subjects_match_as_the_server_matches(vector: dict[str, Any]) -> None:
    found = [covers(pattern, vector["subject"]) for pattern in vector["subjects"]]
    assert sum(found) == int(vector["server_delivers"])


TOKENS = st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=4)


@given(TOKENS, TOKENS, st.booleans(), st.booleans())
def test_overlap_is_symmetric_and_found_by_a_witness(
    one: list[str], other: list[str], more: bool, others: bool
) -> None:
    left = ".".join([*one, *([">"] if more else [])])
    right = ".".join([*other, *([">"] if others else [])])
    assert overlaps(left, right) == overlaps(right, left)
    size = max(len(one) + more, len(other) + others)
    witness = [
        next((each for each in pair if each not in ("*", "")), "x")
        for pair in (
            (one[i] if i < len(one) else "", other[i] if i < len(other) else "")
            for i in range(size)
        )
    ]
    subject = ".".join(witness)
    assert overlaps(left, right) == (covers(left, subject) and covers(right, subject))


def test_refused_publishes_say_what_to_do() -> None:
    for number, vector in ERRORS.items():
        if not vector["error"].startswith(("PublishFailed", "PayloadTooLarge")):
            continue
        found = publish_error(error(number), "a/b", 5)
        assert isinstance(found, PayloadTooLarge if number == 10054 else PublishFailed)
        assert found.outcome is Outcome.REJECTED
        assert found.retryable is vector["retryable"], vector
        assert found.topic == "a/b"
        assert found.hint


def test_streams_that_cannot_be_used_say_what_to_do() -> None:
    for number in (10002, 10023, 10026, 10027, 10028, 10039, 10047, 10052, 10059, 10065, 10074):
        found = stream_error(error(number), "S")
        assert isinstance(found, ConnectError)
        assert found.hint
        assert found.retryable is False
    assert stream_error(error(10008), "S").retryable is True
    assert stream_error(error(10059), "S", known=True).retryable is True
    assert stream_error(ApiError(503, 0, ""), "S").retryable is True


def test_refused_consumers_say_what_to_do() -> None:
    assert isinstance(subscribe_error(error(10026), "a"), LimitReached)
    found = subscribe_error(error(10093), "a/#")
    assert isinstance(found, SubscribeFailed)
    assert (found.topic, found.retryable) == ("a/#", False)
