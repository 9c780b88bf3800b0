"""Channels, options, requests and errors, judged by what the Go broker answered."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_emitter import protocol
from pubsub_emitter.keys import hash_text
from pubsub_emitter.protocol import (
    BadRequest,
    Channel,
    Fault,
    HistoryRequest,
    InvalidChannel,
    KeybanRequest,
    KeygenRequest,
    LinkRequest,
    MessageId,
    PresenceRequest,
    build_topic,
    is_link_name,
    normalize_subscription,
    parse_channel,
    split_share,
)
from tests.emitter.vectors import MASTER_KEY, VECTORS

# --- channels --------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["channel_parse"], ids=lambda v: v["topic"])
def test_a_topic_is_taken_apart_as_the_broker_does(vector: dict[str, Any]) -> None:
    if vector["type"] == "invalid":
        with pytest.raises(InvalidChannel):
            parse_channel(vector["topic"])
        return
    channel = parse_channel(vector["topic"])
    assert channel.key == vector["key"]
    assert channel.name == vector["channel"]
    assert channel.is_static is (vector["type"] == "static")
    assert [f"{hash_text(part):08x}" for part in channel.segments] == vector["query_hex"]
    assert [list(pair) for pair in channel.options] == vector["options"]
    if "ttl" in vector:
        assert channel.ttl == vector["ttl"]
        assert channel.last == vector["last"]
        assert (channel.since or 0) == vector["from"]
        assert (channel.until or 0) == vector["until"]
        assert channel.excludes_publisher is vector["exclude_me"]


@pytest.mark.parametrize("vector", VECTORS["subscribe_normalize"], ids=lambda v: v["in"])
def test_a_subscription_is_normalised_as_the_broker_does(vector: dict[str, Any]) -> None:
    assert normalize_subscription(vector["in"]) == vector["out"]
    if vector.get("then") == "invalid":
        with pytest.raises(InvalidChannel):
            parse_channel(vector["out"])


@given(st.text(max_size=60))
def test_any_text_is_a_channel_or_refused(topic: str) -> None:
    try:
        channel = parse_channel(topic)
    except InvalidChannel:
        return
    assert topic.startswith(f"{channel.key}/{channel.name}")
    again = parse_channel(f"{channel.key}/{channel.name}{channel.query}")
    assert again == channel


def test_parsing_takes_linear_time() -> None:
    def took(topic: str) -> float:
        began = time.thread_time()  # what others do on the machine does not count
        with contextlib.suppress(InvalidChannel):
            assert parse_channel(topic).last is None  # the number is read, too
        return time.thread_time() - began

    # They take milliseconds; one step for each pair of characters would take minutes.
    for unit in ("k/" + "a/" * 32000, "k/" + "a" * 65000 + "!", "k/a/?" + "a=1&" * 16000 + "!"):
        assert took(unit) < 2
    assert took("k/a/?last=" + "9" * 65000) < 2


def test_the_repr_of_a_channel_has_no_key() -> None:
    channel = parse_channel(f"{MASTER_KEY}/a/?ttl=5")
    assert MASTER_KEY not in repr(channel)
    assert "a/" in repr(channel)
    with pytest.raises(InvalidChannel) as caught:
        parse_channel(f"{MASTER_KEY}/a b/")
    assert MASTER_KEY not in str(caught.value)


def test_a_share_group_is_split_from_its_channel() -> None:
    assert split_share("$share/g1/s/t/") == ("g1", "s/t/")
    assert split_share("$share/g1/") == ("g1", "")
    assert split_share("$share/") == (None, "$share/")
    assert split_share("s/") == (None, "s/")


def test_topics_are_built_clean() -> None:
    assert build_topic("/K/", "/a/b/") == "K/a/b/"
    assert build_topic("K", "a", [("ttl", "5"), ("me", "0")]) == "K/a/?ttl=5&me=0"
    assert build_topic("K", "a", group="/g1/") == "K/$share/g1/a/"
    assert build_topic("", "a/b", [("me", "0")]) == "a/b/?me=0"


def test_a_link_is_one_or_two_letters_or_digits() -> None:
    assert all(map(is_link_name, ["a", "a0", "Zz", "99"]))
    assert not any(map(is_link_name, ["", "abc", "a-", "é", "a\n", "٣"]))


# --- requests --------------------------------------------------------------------------


def test_field_names_match_in_any_case_and_unknown_ones_are_ignored() -> None:
    found = KeygenRequest.decode(b'{"KEY":"k","Channel":"a/","tYpe":"r","ttl":5,"more":[{}]}')
    assert found == KeygenRequest("k", "a/", "r", 5)


def test_null_and_missing_fields_leave_the_default() -> None:
    assert KeygenRequest.decode(b'{"key":null,"ttl":null}') == KeygenRequest()
    assert KeygenRequest.decode(b"null") == KeygenRequest()
    assert KeybanRequest.decode(b'{"secret":"s","target":"t"}') == KeybanRequest("s", "t", False)
    assert PresenceRequest.decode(b'{"key":"k","channel":"a"}') == PresenceRequest("k", "a/")
    assert PresenceRequest.decode(b'{"channel":"a/","status":false,"changes":null}') == (
        PresenceRequest("", "a/", status=False, changes=None)
    )


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{", b"[]", b'"x"', b"5", b'{"ttl":"5"}', b'{"ttl":5.5}', b'{"ttl":true}',
        b'{"ttl":2147483648}', b'{"ttl":-2147483649}', b'{"ttl":99999999999999999999999}',
        b'{"key":5}', b'{"key":{}}', b"\xff\xfe", b"[" * 20000,
    ],
)  # fmt: skip
def test_what_go_would_not_decode_is_a_bad_request(payload: bytes) -> None:
    with pytest.raises(BadRequest):
        KeygenRequest.decode(payload)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_request_or_refused(payload: bytes) -> None:
    for kind in (KeygenRequest, KeybanRequest, LinkRequest, PresenceRequest, HistoryRequest):
        try:
            kind.decode(payload)
        except BadRequest:
            continue


def test_a_link_request_ignores_what_old_clients_send_besides() -> None:
    body = b'{"key":"k","channel":"a/","name":"a0","private":true,"subscribe":true}'
    assert LinkRequest.decode(body) == LinkRequest("k", "a/", "a0", subscribe=True)
    with pytest.raises(BadRequest):
        LinkRequest.decode(b'{"subscribe":"yes"}')


# --- answers ---------------------------------------------------------------------------


def test_every_error_has_the_brokers_words() -> None:
    mine = {
        (fault.status, fault.message)
        for fault in vars(protocol).values()
        if isinstance(fault, Fault)
    }
    never_sent = {402, 501}
    theirs = {(v["status"], v["message"]) for v in VECTORS["errors"]}
    assert mine == {(status, text) for status, text in theirs if status not in never_sent}


def test_an_error_names_the_packet_it_is_about() -> None:
    body = protocol.UNAUTHORIZED.body(9)
    assert json.loads(body) == {
        "req": 9,
        "status": 401,
        "message": protocol.UNAUTHORIZED.message,
    }
    assert body.startswith(b'{"req":9,"status":401,')
    assert "req" not in json.loads(protocol.UNAUTHORIZED.body())


# --- message ids -----------------------------------------------------------------------


def test_a_message_id_of_the_go_broker_is_read() -> None:
    # From the documentation of emitter/history/.
    found = MessageId.parse("pQzJqu9IioD///+Owr03KUS6uzrhtnKQn+Yafg==")
    assert len(found.tail) == 12
    assert found.tail[:4].hex() == "44babb3a"
    assert str(found) == "pQzJqu9IioD///+Owr03KUS6uzrhtnKQn+Yafg=="
    assert found.counter == 0x71
    assert 1_700_000_000 < found.time < 1_900_000_000


@given(
    st.integers(0, 2**32 - 1),
    st.integers(protocol.TIME_ORIGIN, protocol.TIME_ORIGIN + 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=20),
)
def test_message_ids_survive_the_wire(
    bucket: int, when: int, counter: int, process: int, tail: bytes
) -> None:
    made = MessageId(bucket, when, counter, process, tail)
    assert MessageId.parse(str(made)) == made
    younger = MessageId(bucket, when, counter + 1, process, tail)
    assert younger.age > made.age
    if counter < 2**32 - 1:
        assert younger.to_bytes()[4:12] < made.to_bytes()[4:12]


def test_what_is_no_message_id_is_a_bad_request() -> None:
    for text in ("x", "AAAA", "%%%%", "é"):
        with pytest.raises(BadRequest):
            HistoryRequest.decode(json.dumps({"channel": "k/a/", "startFromID": text}).encode())


def test_a_channel_without_options_writes_none() -> None:
    assert Channel("k", "a/").query == ""
    assert parse_channel("k/a/?").query == ""
