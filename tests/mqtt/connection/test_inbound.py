"""Messages of a broker, byte by byte: what is delivered, and how it is acknowledged.

The bytes are written out by hand from MQTT 3.1.1 and 5.0, so a mistake made in both directions
cannot hide.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_core.errors import (
    ConnectError,
    ServerRefused,
)
from pubsub_mqtt.connection import Subscribe
from pubsub_mqtt.errors import ProtocolError
from pubsub_mqtt.packets import PublishProperties
from tests.mqtt.lines import (
    ACCEPT,
    ACCEPT_PRESENT,
    Line,
)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


# --- receiving -------------------------------------------------------------------------


def test_qos_1_is_acknowledged_when_it_is_settled(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.say(unhex("3b 07 0003 612f62 0005"))
    (message,) = line.messages
    assert (message.topic, message.payload, message.qos) == ("a/b", b"", 1)
    assert message.retain
    assert message.duplicate
    assert line.sent() == b""
    line.connection.settle(message.serial)
    assert line.sent() == unhex("40 02 0005")
    line.connection.settle(message.serial)
    assert line.sent() == b"", "twice is harmless"


def test_qos_2_is_acknowledged_when_it_is_settled(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.say(unhex("34 06 0001 74 0005 78"))
    (message,) = line.messages
    assert line.sent() == b""
    line.connection.settle(message.serial)
    assert line.sent() == unhex("50 02 0005")
    line.say(unhex("62 02 0005"))
    assert line.sent() == unhex("70 02 0005")


def test_qos_2_is_delivered_once_across_a_resumed_session(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    line.say(unhex("34 06 0001 74 0005 78"))
    (message,) = line.messages
    line.hang_up()
    line.open(ACCEPT_PRESENT)
    line.say(unhex("3c 06 0001 74 0005 78"))
    assert line.messages == [message], "it is not delivered again"
    assert line.sent() == b"", "and not acknowledged before it is settled"
    line.connection.settle(message.serial)
    assert line.sent() == unhex("50 02 0005")
    line.hang_up()
    line.open(ACCEPT_PRESENT)
    line.say(unhex("3c 06 0001 74 0005 78"))
    assert line.sent() == unhex("50 02 0005"), "settled before: acknowledged at once"
    line.say(unhex("62 02 0005"))
    assert line.sent() == unhex("70 02 0005")
    line.say(unhex("34 06 0001 74 0005 79"))
    assert [each.payload for each in line.messages] == [b"x", b"y"], "the id is free again"


def test_a_settled_message_waits_for_its_duplicate_to_be_acknowledged(
    lines: type[Line],
) -> None:
    line = lines(clean_start=False)
    line.open()
    line.say(unhex("34 06 0001 74 0005 78"))
    line.hang_up()
    line.open(ACCEPT_PRESENT)
    line.connection.settle(line.messages[0].serial)
    assert line.sent() == b""
    line.say(unhex("3c 06 0001 74 0005 78"))
    assert line.sent() == unhex("50 02 0005")
    assert len(line.messages) == 1


def test_a_new_session_forgets_what_was_received(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    line.say(unhex("34 06 0001 74 0005 78"))
    line.hang_up()
    line.open(ACCEPT)
    line.say(unhex("34 06 0001 74 0005 79"))
    assert [each.payload for each in line.messages] == [b"x", b"y"]
    line.connection.settle(line.messages[0].serial)
    assert line.sent() == b"", "an old tag must not acknowledge a new message"


def test_an_old_tag_of_qos_1_acknowledges_nothing(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    line.say(unhex("32 06 0001 74 0005 78"))
    line.hang_up()
    line.open(ACCEPT_PRESENT)
    line.say(unhex("3a 06 0001 74 0005 78"))
    old, new = line.messages
    assert new.duplicate
    line.connection.settle(old.serial)
    assert line.sent() == b""
    line.connection.settle(new.serial)
    assert line.sent() == unhex("40 02 0005")


def test_pubrel_for_an_unknown_message_is_answered(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.say(unhex("62 02 0009"))
    assert line.sent() == unhex("70 02 0009")
    five = lines(versions=(5,))
    five.open()
    five.say(unhex("62 02 0009"))
    assert five.sent() == unhex("70 03 0009 92")


def test_a_rejected_message_says_so_under_5(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    line.say(unhex("32 06 0001 74 0005 00") + unhex("34 06 0001 74 0006 00"))
    for message in line.messages:
        line.connection.settle(message.serial, refuse=True)
    assert line.sent() == unhex("40 03 0005 83 50 03 0006 83")
    line.say(unhex("34 06 0001 74 0006 00"))
    assert len(line.messages) == 3, "PUBREC with a failure ended it: the id is free"


def test_properties_of_a_message(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    line.say(
        unhex(
            "30 2e 0001 74 29"
            "01 01 02 0000000a 03 0003 742f78 08 0001 72 09 0002 0102 0b 05 0b ac02"
            "26 0001 6b 0001 31 26 0001 6b 0001 32"
        )
        + b"!"
    )
    assert line.lost == []
    (message,) = line.messages
    assert message.payload == b"!"
    assert message.properties == PublishProperties(
        expiry=10,
        content_type="t/x",
        user=(("k", "1"), ("k", "2")),
        subscriptions=(5, 300),
        response_topic="r",
        correlation=b"\x01\x02",
        utf8=True,
    )


@pytest.mark.parametrize(
    ("what", "packet"),
    [
        ("QoS 3", "36 06 0001 74 0001 78"),
        ("DUP with QoS 0", "38 04 0001 74 78"),
        ("packet id 0", "32 06 0001 74 0000 78"),
        ("no packet id", "32 03 0001 74"),
        ("topic beyond the packet", "30 03 0009 74"),
        ("no topic", "30 01 00"),
        ("empty topic", "30 03 0000 78"),
        ("wildcard", "30 05 0001 2b 7878"),
        ("NUL", "30 03 0001 00"),
        ("bad UTF-8", "30 04 0002 fffe"),
        ("PUBREL flags", "60 02 0001"),
        ("PUBACK flags", "41 02 0001"),
        ("PUBACK of one byte", "40 01 00"),
        ("PUBACK of three bytes", "40 03 0001 00"),
        ("type 0", "00 00"),
        ("type 15", "f0 00"),
        ("CONNECT", "10 00"),
        ("a second CONNACK", "20 02 00 00"),
        ("SUBSCRIBE", "82 05 0001 0001 61 00"),
        ("PINGREQ", "c0 00"),
        ("PINGRESP with a body", "d0 01 00"),
        ("DISCONNECT under 3.1.1", "e0 00"),
        ("SUBACK without codes", "90 01 00"),
        ("five length bytes", "30 ff ff ff ff 01"),
    ],
)
def test_malformed_packets_end_the_session(lines: type[Line], what: str, packet: str) -> None:
    line = lines()
    line.open()
    line.say(unhex("30 03 0001 74") + unhex(packet) + unhex("30 03 0001 74"))
    assert len(line.messages) == 1, "what came before counts, what comes after does not"
    (error,) = line.lost
    assert isinstance(error, ProtocolError), what
    assert error.retryable is True


def test_a_packet_above_the_limit_is_refused_on_its_header(lines: type[Line]) -> None:
    line = lines(versions=(5,), max_packet_size=1000)
    line.open()
    line.say(unhex("30 ff ff 7f"))
    (error,) = line.lost
    assert isinstance(error, ProtocolError)
    assert line.sent() == unhex("e0 01 95")


def test_more_unacknowledged_messages_than_allowed_end_the_session(lines: type[Line]) -> None:
    line = lines(versions=(5,), receive_maximum=2)
    line.open()
    for number in (1, 2, 3):
        line.say(unhex(f"32 06 0001 74 000{number} 00"))
    assert isinstance(line.lost[0], ProtocolError)
    assert line.sent() == unhex("e0 01 93")


@pytest.mark.parametrize(
    "body",
    [
        "0a",  # too short
        "02 0b",  # a number missing
        "05 0b ffffffff",
        "02 02 00",
        "03 26 0001",
        "04 26 0003 61",
        "03 23 0001",  # topic alias, which we do not allow
        "02 11 00",  # a property that PUBLISH has not
        "04 03 0002 ff fe",
        "ff ff ff ff 01",
    ],
)
def test_malformed_properties_end_the_session(lines: type[Line], body: str) -> None:
    line = lines(versions=(5,))
    line.open()
    data = b"\x00\x01t" + unhex(body)
    line.say(bytes((0x30, len(data))) + data)
    assert isinstance(line.lost[0], ProtocolError)
    assert line.messages == []


def test_too_many_headers_end_the_session(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    pairs = unhex("26 0000 0000") * 65
    data = b"\x00\x01t" + bytes((len(pairs) & 127 | 128, len(pairs) >> 7)) + pairs
    line.say(bytes((0x30, len(data) & 127 | 128, len(data) >> 7)) + data)
    assert isinstance(line.lost[0], ProtocolError)


def test_disconnect_of_the_broker_is_told(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    line.say(unhex("e0 02 8b 00"))
    (error,) = line.lost
    assert isinstance(error, ServerRefused)
    assert error.reason == 0x8B
    assert error.retryable is True


STREAM = (
    unhex("30 05 0003 612f62")
    + unhex("32 07 0003 612f62 0001")
    + unhex("d0 00")
    + b"\x30"
    + unhex("83 04")
    + b"\x00\x01t"
    + b"y" * 512
    + unhex("34 08 0003 612f62 0002 21")
)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(1, len(STREAM) - 1), max_size=12, unique=True))
def test_packets_survive_any_fragmentation(cuts: list[int]) -> None:
    line = Line()
    try:
        line.open()
        edges = [0, *sorted(cuts), len(STREAM)]
        for start, stop in itertools.pairwise(edges):
            line.say(STREAM[start:stop])
        assert line.lost == []
        assert [(each.topic, each.qos, len(each.payload)) for each in line.messages] == [
            ("a/b", 0, 0),
            ("a/b", 1, 0),
            ("t", 0, 512),
            ("a/b", 2, 1),
        ]
    finally:
        line.close()


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80), five=st.booleans())
def test_random_bytes_end_in_a_protocol_error_or_nothing(data: bytes, five: bool) -> None:
    line = Line(versions=(5,) if five else (4,))
    try:
        line.open()
        line.connection.subscribe([Subscribe("a")], lambda _: None)
        line.publish(qos=2)
        line.say(data or b"\x00")
        assert len(line.lost) <= 1
        assert all(isinstance(error, ConnectError) for error in line.lost)
    finally:
        line.close()


def test_a_raising_consumer_harms_nobody(
    lines: type[Line], caplog: pytest.LogCaptureFixture
) -> None:
    line = lines()
    line.open()
    seen: list[str] = []

    def consume(message: object) -> None:
        seen.append(getattr(message, "topic", ""))
        raise ValueError("defect")

    line.connection.on_message = consume
    line.say(unhex("30 03 0001 61 30 03 0001 62"))
    assert seen == ["a", "b"]
    assert line.connection.connected
    assert "defect" in caplog.text


# --- pausing ---------------------------------------------------------------------------


def test_a_paused_connection_delivers_nothing_but_reads_acknowledgements(
    lines: type[Line],
) -> None:
    line = lines()
    line.open()
    out = line.publish(qos=1)
    line.sent()
    line.connection.pause()
    line.say(unhex("30 03 0001 61 40 02 0001 30 03 0001 62"))
    assert line.messages == []
    assert out.done
    assert line.connection.reading
    line.connection.resume()
    assert [message.topic for message in line.messages] == ["a", "b"]


def test_what_a_paused_connection_keeps_is_bounded(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.connection.pause()
    packet = b"\x30" + unhex("83 80 02") + b"\x00\x01t" + b"x" * 32768
    for _ in range(33):
        assert line.connection.reading
        line.say(packet)
        if not line.connection.reading:
            break
    assert not line.connection.reading
    line.connection.resume()
    assert line.connection.reading
    assert 31 <= len(line.messages) <= 33


def test_a_consumer_may_pause_again_while_it_is_given_what_was_kept(
    lines: type[Line],
) -> None:
    line = lines()
    line.open()
    line.connection.pause()
    line.say(unhex("30 03 0001 61 30 03 0001 62 30 03 0001 63"))
    got: list[str] = []

    def one_at_a_time(message: object) -> None:
        got.append(getattr(message, "topic", ""))
        line.connection.pause()

    line.connection.on_message = one_at_a_time
    line.connection.resume()
    assert got == ["a"]
    line.connection.resume()
    assert got == ["a", "b"]
