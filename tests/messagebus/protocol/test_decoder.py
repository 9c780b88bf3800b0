"""The wire protocol: recorded bytes, every fragmentation, malformed input, limits."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_messagebus.protocol import (
    DataPacket,
    Decoder,
    Dialect,
    ForwardedMulticastData,
    Message,
    MulticastData,
    ProtocolError,
    Side,
    SubscriptionRequest,
    Truncated,
    UnicastData,
    WireLimits,
    encode_authorization_response,
    encode_forwarded_multicast,
    encode_multicast,
    encode_packets,
    encode_string,
    encode_subscription_request,
    encode_unicast,
)
from tests.messagebus.vectors import (
    CAPTURES,
    EVERY,
    MALFORMED,
    MESSAGES,
    decode,
    drain,
    expected,
    plain,
    role_of,
)

# --- recorded bytes ------------------------------------------------------------------------


@pytest.mark.parametrize(("vector", "dialect"), EVERY)
def test_vector_decodes(vector: dict[str, Any], dialect: Dialect) -> None:
    wire = bytes.fromhex(vector["hex"])
    (message,) = decode(wire, role_of(wire), dialect)
    assert plain(message) == expected(vector["decoded"])
    assert type(message).__name__ == vector["message"]


@pytest.mark.parametrize(("vector", "dialect"), EVERY)
def test_vector_decodes_at_every_fragmentation(vector: dict[str, Any], dialect: Dialect) -> None:
    wire = bytes.fromhex(vector["hex"])
    want = expected(vector["decoded"])
    (slowly,) = decode(wire, role_of(wire), dialect, step=1)
    assert plain(slowly) == want
    for cut in range(1, min(len(wire), 400)):
        decoder = Decoder(role_of(wire), dialect=dialect)
        decoder.feed(wire[:cut])
        assert decoder.next_message() is None
        assert decoder.inside
        decoder.feed(wire[cut:])
        message = decoder.next_message()
        assert message is not None
        assert plain(message) == want
        assert decoder.next_message() is None


@pytest.mark.parametrize("dialect", ["is_image", "content_type"])
@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 1000, 1 << 30])
def test_all_vectors_in_one_stream(dialect: Dialect, role: Side, step: int) -> None:
    chosen = [
        vector
        for vector in MESSAGES
        if dialect in vector["dialects"] and role_of(bytes.fromhex(vector["hex"])) == role
    ]
    stream = bytes.fromhex("".join(vector["hex"] for vector in chosen))
    found = decode(stream, role, dialect, step=step)
    assert [plain(message) for message in found] == [
        expected(vector["decoded"]) for vector in chosen
    ]


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture["id"])
def test_capture_decodes(capture: dict[str, Any]) -> None:
    wire = bytes.fromhex(capture["hex"])
    for step in (1, 5, 1 << 30):
        (message,) = decode(wire, "client", capture["dialect"], step=step)
        assert plain(message) == expected(capture["decoded"])


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture["id"])
def test_what_caused_a_capture_decodes(capture: dict[str, Any]) -> None:
    wire = bytes.fromhex(capture.get("caused_by_hex") or "")
    if "invalid-utf8" in capture["id"]:
        # The original puts U+FFFD there; here it is a protocol error.
        with pytest.raises(ProtocolError, match="UTF-8"):
            decode(wire, "server", capture["dialect"])
    elif wire:
        decode(wire, "server", capture["dialect"], step=3)


# --- what the decoder gives a server to forward -----------------------------------------------


@pytest.mark.parametrize(("vector", "dialect"), EVERY)
def test_body_is_the_frame_without_its_type(vector: dict[str, Any], dialect: Dialect) -> None:
    wire = bytes.fromhex(vector["hex"])
    (message,) = decode(wire, role_of(wire), dialect, step=11)
    if isinstance(message, (MulticastData, UnicastData)):
        assert message.body == wire[1:]
        packets = message.data_packets
        assert message.entitled == any(packet.entitlements for packet in packets or ())


def test_body_is_brought_into_normal_form() -> None:
    vector = next(each for each in MALFORMED if each["id"] == "duplicate-entitlements")
    (message,) = decode(bytes.fromhex(vector["hex"]), "server")
    assert isinstance(message, MulticastData)
    assert message.data_packets == [DataPacket({-1, 2, 5}, b"d")]
    (again,) = decode(b"\x01" + message.body, "server")
    assert isinstance(again, MulticastData)
    assert again.data_packets == message.data_packets
    assert len(again.body) == len(bytes.fromhex(vector["hex"])) - 1 - 8

    (odd,) = decode(
        b"\x01" + encode_string("F") + encode_string("T") + b"\x07" + bytes(4), "server"
    )
    assert isinstance(odd, MulticastData)
    assert odd.flag is True
    assert odd.body == encode_multicast("F", "T", True, None)[1:]


# --- malformed input ---------------------------------------------------------------------


ROLES: tuple[Side, ...] = ("client", "server")


@pytest.mark.parametrize(
    ("vector", "role"),
    [
        pytest.param(vector, role, id=f"{vector['id']}-{role}")
        for vector in MALFORMED
        for role in ROLES
        if vector[role] != "n/a"
        and vector["id"]
        not in (
            "bool-dialect-sent-to-content-type-server",
            "null-auth-leading-zeros",  # the handshake's, not the decoder's
        )
    ],
)
def test_malformed(vector: dict[str, Any], role: Side) -> None:
    for step in (1, 4, 1 << 30):
        _check_malformed(vector, role, step)


def _check_malformed(vector: dict[str, Any], role: Side, step: int) -> None:
    reaction: str = vector[role]
    wire = bytes.fromhex(vector["hex"])
    decoder = Decoder(role)
    found: list[Message] = []
    error = None
    try:
        for at in range(0, len(wire), step):
            decoder.feed(wire[at : at + step])
            found += drain(decoder)
        decoder.eof()
        found += drain(decoder)
    except ProtocolError as caught:
        error = caught
    if error is not None:
        with pytest.raises(ProtocolError) as again:
            decoder.next_message()
        assert type(again.value) is type(error)
        assert str(again.value) == str(error)
    if role == "client" and wire[0] in (1, 2, 4, 5, 7):
        # Whatever it is, a client refuses its type.
        assert "only a server receives" in str(error)
    elif "disconnect" in reaction or "connection lost" in reaction:
        assert isinstance(error, Truncated)
    elif vector["id"] == "bool-2":
        assert error is None
        assert found == [SubscriptionRequest("F", "T", True)]
    elif "protocol error" in reaction:
        assert isinstance(error, ProtocolError)
        assert not isinstance(error, Truncated)
    else:
        assert error is None, reaction
        assert found


def test_good_messages_come_before_the_bad_bytes() -> None:
    decoder = Decoder("server")
    decoder.feed(encode_subscription_request("F", "T", True) * 2 + b"\x0b")
    assert decoder.next_message() == SubscriptionRequest("F", "T", True)
    assert decoder.next_message() == SubscriptionRequest("F", "T", True)
    for _ in range(2):
        with pytest.raises(ProtocolError, match="message type 11"):
            decoder.next_message()


def test_the_stream_of_a_package_that_counts_characters_is_refused_with_a_hint() -> None:
    decoder = Decoder("server")
    decoder.feed(bytes.fromhex("0500000001c3a9000000015401"))
    with pytest.raises(ProtocolError, match="count the characters"):
        decoder.next_message()


def test_a_listener_may_read_lengths_as_characters() -> None:
    topic = "éa"
    old = (
        b"\x01"
        b"\0\0\0\x01F"
        + len(topic).to_bytes(4, "big")
        + topic.encode()
        + b"\x01"
        + encode_packets([DataPacket(None, b"x")])
    )
    for step in (1, 2, 1 << 30):
        found = decode(old * 2, "server", step=step, string_length_unit="codepoints")
        assert len(found) == 2
        message = found[0]
        assert isinstance(message, MulticastData)
        assert message.topic == topic
        # What is forwarded counts bytes.
        assert message.body == encode_multicast("F", topic, True, [DataPacket(None, b"x")])[1:]


def test_eof_between_messages_is_no_error() -> None:
    decoder = Decoder("server")
    decoder.feed(encode_subscription_request("F", "T", True))
    decoder.eof()
    assert decoder.next_message() is not None
    assert decoder.next_message() is None


@given(st.binary(max_size=300), st.integers(1, 40), st.sampled_from(["client", "server"]))
def test_any_bytes_give_messages_or_one_protocol_error(data: bytes, step: int, role: Side) -> None:
    decoder = Decoder(role)
    try:
        for at in range(0, len(data), step):
            decoder.feed(data[at : at + step])
            drain(decoder)
        decoder.eof()
        drain(decoder)
    except ProtocolError:
        pass


@given(
    st.sampled_from(MESSAGES),
    st.integers(0, 400),
    st.integers(0, 255),
    st.integers(1, 17),
)
def test_a_changed_byte_gives_messages_or_one_protocol_error(
    vector: dict[str, Any], place: int, value: int, step: int
) -> None:
    wire = bytearray.fromhex(vector["hex"])
    wire[place % len(wire)] = value
    decoder = Decoder("server", dialect=vector["dialects"][0])
    try:
        for at in range(0, len(wire), step):
            decoder.feed(bytes(wire[at : at + step]))
            drain(decoder)
    except ProtocolError:
        pass


# --- any message, any cut ------------------------------------------------------------------

names = st.text(max_size=12)
numbers = st.integers(-(2**31), 2**31 - 1)
packets = st.none() | st.lists(
    st.builds(
        DataPacket,
        st.none() | st.sets(numbers, max_size=4),
        st.none() | st.binary(max_size=40),
    ),
    max_size=4,
)
frames = st.one_of(
    st.builds(encode_multicast, names, names, st.booleans(), packets),
    st.builds(encode_unicast, st.uuids(), names, names, st.booleans(), packets),
    st.builds(encode_subscription_request, names, names, st.booleans()),
    st.builds(
        encode_authorization_response,
        st.uuids(),
        names,
        names,
        st.booleans(),
        st.none() | st.sets(numbers, max_size=4),
    ),
)


@given(st.lists(frames, max_size=6), st.integers(1, 9))
def test_messages_survive_any_fragmentation(sent: list[bytes], step: int) -> None:
    stream = b"".join(sent)
    whole = [message for frame in sent for message in decode(frame, "server")]
    assert decode(stream, "server", step=step) == whole
    assert decode(stream, "server") == whole


@given(names, names, names, names, st.booleans(), packets)
def test_round_trip_with_the_losses_of_the_protocol(
    user: str, host: str, feed: str, topic: str, flag: bool, given_packets: list[DataPacket] | None
) -> None:
    wire = encode_forwarded_multicast(user, host, feed, topic, flag, given_packets)
    (message,) = decode(wire, "client")
    assert isinstance(message, ForwardedMulticastData)
    assert (message.user, message.host, message.feed, message.topic, message.flag) == (
        user,
        host,
        feed,
        topic,
        flag,
    )
    # None and empty are the same on the wire.
    want = [
        DataPacket(packet.entitlements or None, packet.data or None)
        for packet in given_packets or ()
    ]
    assert message.data_packets == (want or None)


# --- limits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wire",
    [
        b"\x05" + (65537).to_bytes(4, "big"),
        b"\x01" + bytes(8) + b"\0" + (65537).to_bytes(4, "big"),
        b"\x01" + bytes(8) + b"\0\0\0\0\x01" + (65537).to_bytes(4, "big"),
        b"\x01" + bytes(8) + b"\0\0\0\0\x01" + bytes(4) + (0x1000000).to_bytes(4, "big"),
        b"\x01" + bytes(8) + b"\0\0\0\0\x01" + bytes(4) + (0xFFFFFF).to_bytes(4, "big"),
        b"\x07" + bytes(16 + 8) + b"\x01" + (65537).to_bytes(4, "big"),
    ],
)
def test_a_length_above_its_limit_is_refused_before_anything_is_read(wire: bytes) -> None:
    tracemalloc.start()
    try:
        decoder = Decoder("server")
        decoder.feed(wire)
        with pytest.raises(ProtocolError, match="the most is"):
            decoder.next_message()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_limits_are_configurable() -> None:
    small = WireLimits(string=4, data=8, packets=1, entitlements=1, message=64)
    good = encode_multicast("FEED", "T", True, [DataPacket({1}, b"12345678")])
    assert len(decode(good, "server", limits=small)) == 1
    for bad in (
        encode_subscription_request("FEED5", "T", True),
        encode_multicast("F", "T", True, [DataPacket(None, b"123456789")]),
        encode_multicast("F", "T", True, [DataPacket(None, b"")] * 2),
        encode_multicast("F", "T", True, [DataPacket({1, 2}, b"")]),
    ):
        decoder = Decoder("server", limits=small)
        decoder.feed(bad)
        with pytest.raises(ProtocolError):
            decoder.next_message()


def _seconds(wire: bytes, step: int) -> float:
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        decode(wire, "server", step=step)
        best = min(best, time.thread_time() - began)
    return best


@pytest.mark.parametrize("size", [1, 100])
def test_a_large_message_in_small_pieces_costs_linear_time(size: int) -> None:
    # Ten times the bytes cost about ten times the time; a quadratic decoder costs a hundred.
    def message(total: int) -> bytes:
        if size == 1:
            return encode_multicast("F", "T", True, [DataPacket(None, bytes(total))])
        return encode_multicast("F", "T", True, [DataPacket({1}, bytes(size))] * (total // 112))

    small, large = message(700_000), message(7_000_000)
    assert _seconds(large, 1024) < 40 * max(_seconds(small, 1024), 0.001)


# --- what cannot be sent --------------------------------------------------------------------
