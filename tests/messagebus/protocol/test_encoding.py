"""Encoders: recorded bytes, and what cannot be sent."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from pubsub_messagebus.protocol import (
    DataPacket,
    Dialect,
    encode_int_set,
    encode_multicast,
    encode_subscription_request,
    encode_unicast,
    notice,
)
from tests.messagebus.vectors import (
    CAPTURES,
    EVERY,
    decode,
    encode,
    expected,
    plain,
    role_of,
)

TEXT: Any = "text"


TEXTS: Any = {"1"}


@pytest.mark.parametrize(("vector", "dialect"), EVERY)
def test_vector_encodes(vector: dict[str, Any], dialect: Dialect) -> None:
    wire = encode(vector["type"], vector["fields"], dialect)
    assert len(wire) == vector["bytes"]
    if wire.hex() != vector["hex"]:  # the order within a set is free
        (ours,) = decode(wire, role_of(wire), dialect)
        assert plain(ours) == expected(vector["decoded"])
        assert sorted(wire) == sorted(bytes.fromhex(vector["hex"]))


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture["id"])
def test_capture_encodes(capture: dict[str, Any]) -> None:
    wire = bytes.fromhex(capture["hex"])
    fields = {name: value for name, value in capture["decoded"].items() if name != "message"}
    ours = encode(wire[0], fields, capture["dialect"])
    (message,) = decode(ours, "client", capture["dialect"])
    assert plain(message) == expected(capture["decoded"])
    assert len(ours) == len(wire)


def test_string_length_counts_bytes_not_characters() -> None:
    wire = encode_subscription_request("café", "", True)
    assert wire == b"\x05\x00\x00\x00\x05caf\xc3\xa9\x00\x00\x00\x00\x01"


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (encode_multicast, ("F", "T", False, [DataPacket({2**40}, b"x")]), ValueError),
        (encode_multicast, ("F", "T", False, [DataPacket(TEXTS, b"x")]), TypeError),
        (encode_multicast, ("F", "T", False, [DataPacket(None, TEXT)]), TypeError),
        (encode_multicast, ("F", "T", False, [b"x"]), TypeError),
        (encode_multicast, (b"F", "T", False, None), TypeError),
        (encode_multicast, ("\ud800", "T", False, None), ValueError),
        (encode_multicast, ("F" * 65537, "T", False, None), ValueError),
        (encode_multicast, ("é" * 32769, "T", False, None), ValueError),
        (encode_multicast, ("F", "T", "text/plain", None), TypeError),
        (encode_multicast, ("F", "T", True, None, "content_type"), TypeError),
        (encode_multicast, ("F", "T", True, [DataPacket(None, bytes(0x1000000))]), ValueError),
        (encode_multicast, ("F", "T", True, [DataPacket(None, bytes(0xFFFFFF))]), ValueError),
        (encode_multicast, ("F", "T", True, [DataPacket(None, None)] * 65537), ValueError),
        (encode_unicast, ("not a uuid", "F", "T", False, None), TypeError),
        (encode_int_set, (range(65537),), ValueError),
        (encode_int_set, ("12",), TypeError),
    ],
)
def test_what_cannot_be_sent_is_refused_whole(
    function: Any, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        function(*arguments)


def test_packets_look_as_in_the_packages() -> None:
    packet = DataPacket({1}, b"x")
    assert str(packet) == "entitlements={1},data=b'x'"
    assert repr(packet) == "DataPacket({1}, b'x')"
    assert packet == DataPacket({1}, b"x")
    packet.data = None
    assert packet != DataPacket({1}, b"x")


def test_uuid_is_in_the_order_of_net() -> None:
    wire = encode_unicast(UUID("00112233-4455-6677-8899-aabbccddeeff"), "F", "T", False, None)
    assert wire[1:17].hex() == "33221100554477668899aabbccddeeff"


def test_a_stale_notice_has_the_bytes_of_the_specification() -> None:
    assert notice("TEST", "FOO").hex() == (
        "080000000000000000000000045445535400000003464f4f0100000000"
    )
