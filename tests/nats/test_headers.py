"""Header blocks: what travels as it is, what goes as JSON, and what no user may say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_nats.headers import encode_block, encode_user, parse_block, user_pairs

Pairs = list[tuple[str, str]]


def travel(pairs: Pairs) -> Pairs:
    return user_pairs(parse_block(encode_block(encode_user(pairs))).pairs)


def test_plain_headers_look_as_others_write_them() -> None:
    assert encode_block(encode_user([("name", "ä b"), ("name", ""), ("Name", "2")])) == (
        "NATS/1.0\r\nname: ä b\r\nname: \r\nName: 2\r\n\r\n".encode()
    )


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [("a", "1"), ("a", "2"), ("A", "3"), ("b", "")],
        [("a", " outer spaces ")],
        [("a", "line\r\nbreak: x")],
        [("größe", "1")],
        [("a b", "1")],
        [("a:b", "1")],
        [("", "no name")],
        [("a", "\t")],
        [("Nats-Rollup", "all")],
        [("nats-msg-id", "1")],
        [("Nmqtt-Pub", "1")],
        [("Pubsub-Headers", "[]")],
        [("Pubsub-From", "me")],
        [("KV-Operation", "PURGE")],
        [("Content-Type", "mine")],
        [("a", "\ud800")],
    ],
    ids=repr,
)
def test_any_header_survives(pairs: Pairs) -> None:
    assert travel(pairs) == pairs


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=12)), max_size=5))
def test_every_header_survives(pairs: Pairs) -> None:
    assert travel(pairs) == pairs


@pytest.mark.parametrize(
    "name", ["Nats-Rollup", "NATS-TTL", "Nats-Expected-Stream", "KV-Operation"]
)
def test_no_header_of_a_user_is_an_order_to_the_server(name: str) -> None:
    block = encode_block(encode_user([("ok", "1"), (name, "sub")]))
    assert f"\n{name.lower()}:" not in block.decode().lower()


def test_private_headers_of_others_are_not_a_users() -> None:
    pairs = [("Nmqtt-Pub", "1"), ("Nats-Sequence", "7"), ("Pubsub-From", "x"), ("mine", "1")]
    assert user_pairs(pairs) == [("mine", "1")]


def test_a_status_is_read() -> None:
    assert parse_block(b"NATS/1.0 503\r\n\r\n")[:2] == (503, "")
    block = parse_block(b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 3\r\n\r\n")
    assert block == (100, "Idle Heartbeat", [("Nats-Last-Consumer", "3")])
    assert parse_block(b"NATS/1.0\r\na: b\r\n\r\n").status == 0


@pytest.mark.parametrize(
    ("wire", "pairs"),
    [
        (b"NATS/1.0\r\nA B: 1\r\n\r\n", [("A B", "1")]),
        (b"NATS/1.0\r\nno colon\r\nx: 1\r\n\r\n", [("x", "1")]),
        (b"NATS/1.0\r\n: nameless\r\nx:1\r\n\r\n", [("x", "1")]),
        (b"NATS/1.0\r\nx: \xff\r\n\r\n", [("x", "\ufffd")]),
        (b"HTTP/1.1 200\r\nx: 1\r\n\r\n", []),
        (b"NATS/1.0\r\nPubsub-Headers: [[1]]\r\n\r\n", []),
        (b'NATS/1.0\r\nPubsub-Headers: [["a","b"],["c"]]\r\n\r\n', []),
        (b"NATS/1.0\r\nPubsub-Headers: " + b"[" * 100_000 + b"\r\n\r\n", []),
    ],
)
def test_what_others_write_is_read_as_far_as_it_can_be(wire: bytes, pairs: Pairs) -> None:
    assert user_pairs(parse_block(wire).pairs) == pairs


@given(st.binary(max_size=200))
def test_no_block_raises(block: bytes) -> None:
    user_pairs(parse_block(b"NATS/1.0\r\n" + block).pairs)
    parse_block(block)
