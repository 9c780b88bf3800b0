"""What a broker sees, byte by byte, and what becomes of the bytes it sends.

The bytes are written out by hand from MQTT 3.1.1 and 5.0, so a mistake made in both
directions cannot hide.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.client import Client

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    NotConnected,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
    ServerRefused,
    TakenOver,
)
from pubsub_core.secrets import Secret
from pubsub_mqtt.connection import Subscribe, Will
from pubsub_mqtt.connection.paho_client import PahoClient
from pubsub_mqtt.errors import ProtocolError
from pubsub_mqtt.packets import PublishProperties, publish_properties
from tests.mqtt.lines import (
    ACCEPT,
    ACCEPT_5,
    ACCEPT_5_PRESENT,
    ACCEPT_PRESENT,
    Line,
    packet_id,
)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


# --- CONNECT --------------------------------------------------------------------------


def test_connect_minimal(lines: type[Line]) -> None:
    assert lines(keepalive=60).begin() == unhex("10 0e 0004 4d515454 04 02 003c 0002 6d65")


def test_connect_keepalive_is_exact_and_may_be_zero(lines: type[Line]) -> None:
    assert lines(keepalive=10).begin()[10:12] == b"\x00\x0a"
    assert lines(keepalive=0).begin()[10:12] == b"\x00\x00"


def test_connect_empty_client_id(lines: type[Line]) -> None:
    assert lines(client_id="").begin() == unhex("10 0c 0004 4d515454 04 02 003c 0000")


def test_connect_unclean(lines: type[Line]) -> None:
    assert lines(clean_start=False).begin() == unhex("10 0e 0004 4d515454 04 00 003c 0002 6d65")


def test_connect_user_and_password(lines: type[Line]) -> None:
    line = lines(username="joe", password=Secret("p:w"))
    assert line.begin() == unhex("10 18 0004 4d515454 04 c2 003c 0002 6d65 0003 6a6f65 0003 703a77")


def test_connect_password_alone_gets_an_empty_user(lines: type[Line]) -> None:
    assert lines(password=Secret("x")).begin() == unhex(
        "10 13 0004 4d515454 04 c2 003c 0002 6d65 0000 0001 78"
    )


@pytest.mark.parametrize(
    ("qos", "retain", "flags"),
    [(0, False, "06"), (1, False, "0e"), (2, False, "16"), (0, True, "26"), (2, True, "36")],
)
def test_connect_will(lines: type[Line], qos: int, retain: bool, flags: str) -> None:
    line = lines(will=Will("w", b"bye", qos, retain))
    assert line.begin() == unhex(
        f"10 16 0004 4d515454 04 {flags} 003c 0002 6d65 0001 77 0003 627965"
    )


def test_connect_5_with_everything(lines: type[Line]) -> None:
    line = lines(
        versions=(5,),
        clean_start=False,
        expiry=3600,
        receive_maximum=10,
        max_packet_size=65536,
        will=Will("w", b"bye", 1, retain=False, delay=5),
        username="joe",
    )
    assert line.begin() == unhex(
        "10 2f 0004 4d515454 05 8c 003c"
        "0d 11 00000e10 21 000a 27 00010000"
        "0002 6d65"
        "05 18 00000005 0001 77 0003 627965"
        "0003 6a6f65"
    )


def test_connect_5_begins_clean_once_and_then_continues(lines: type[Line]) -> None:
    line = lines(versions=(5,), expiry=60)
    assert line.begin()[9] == 0x02
    line.say(ACCEPT_5)
    line.hang_up()
    assert line.begin()[9] == 0x00


def test_connect_5_without_expiry_begins_clean_every_time(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    line.hang_up()
    assert line.begin()[9] == 0x02


def test_random_client_ids_differ_and_stay(lines: type[Line]) -> None:
    one, two = lines(client_id=None), lines(client_id=None)
    first = one.begin()
    assert b"pubsub-" in first
    assert first != two.begin()
    one.say(ACCEPT)
    one.hang_up()
    assert one.begin() == first


def test_a_client_id_that_the_broker_chose_is_used_again(lines: type[Line]) -> None:
    line = lines(client_id="", versions=(5,))
    line.begin()
    line.say(unhex("20 09 00 00 06 12 0003 616263"))
    assert line.sessions[0].client_id == "abc"
    line.hang_up()
    assert line.begin().endswith(b"\x00\x03abc")


# --- CONNACK --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        (1, ServerRefused, False),
        (2, ServerRefused, False),
        (3, ServerRefused, True),
        (4, AuthenticationFailed, False),
        (5, AuthenticationFailed, False),
    ],
)
def test_connack_codes_of_311(
    lines: type[Line], code: int, kind: type[ConnectError], retryable: bool
) -> None:
    line = lines()
    line.begin()
    line.say(bytes((0x20, 2, 0, code)))
    (error,) = line.lost
    assert type(error).__mro__[:-1].count(kind) == 1
    assert error.retryable is retryable
    assert getattr(error, "reason", None) == code
    assert not line.connection.connected


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        (0x80, ServerRefused, False),
        (0x85, ServerRefused, False),
        (0x86, AuthenticationFailed, False),
        (0x87, AuthenticationFailed, False),
        (0x88, ServerRefused, True),
        (0x89, ServerRefused, True),
        (0x8A, AuthenticationFailed, False),
        (0x9F, ServerRefused, True),
    ],
)
def test_connack_codes_of_5(
    lines: type[Line], code: int, kind: type[ConnectError], retryable: bool
) -> None:
    line = lines(versions=(5,))
    line.begin()
    line.say(bytes((0x20, 3, 0, code, 0)))
    (error,) = line.lost
    assert isinstance(error, kind)
    assert error.retryable is retryable
    assert getattr(error, "reason", None) == code


def test_a_reason_string_is_told_escaped_and_cut(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.begin()
    said = b"no\nway" + b"!" * 300
    properties = b"\x1f" + len(said).to_bytes(2, "big") + said
    body = b"\x00\x87" + b"\xb5\x02" + properties
    assert len(properties) == 309
    line.say(b"\x20" + b"\xb9\x02" + body)
    text = str(line.lost[0])
    assert "no\\nway" in text
    assert "!" * 250 not in text


def test_connack_of_5_tells_the_broker_s_limits(lines: type[Line]) -> None:
    line = lines(versions=(5,), keepalive=60)
    line.begin()
    line.say(unhex("20 18 00 00 15 13 0005 21 0014 24 01 25 00 27 00010000 28 00 29 00 2a 00"))
    session = line.sessions[0]
    assert session.keepalive == 5
    assert session.window == 20
    assert session.maximum_qos == 1
    assert session.retain is False
    assert session.max_packet_size == 65536
    assert session.wildcards is False
    assert session.identifiers is False
    assert session.shared is False


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        unhex("30 03 00 01 61"),  # PUBLISH before CONNACK
        unhex("20 03 00 00 00"),  # a CONNACK of MQTT 5
        unhex("20 01 00"),
        unhex("20 ff ff ff ff 7f"),
        unhex("d0 00"),
        b"\x16\x03\x01\x02\x00\x01" + b"\x00" * 0x301,  # TLS
    ],
)
def test_garbage_instead_of_connack(lines: type[Line], garbage: bytes) -> None:
    line = lines()
    line.begin()
    line.say(garbage)
    (error,) = line.lost
    assert isinstance(error, ProtocolError)
    assert not line.connection.connecting


def test_a_closed_stream_instead_of_connack(lines: type[Line]) -> None:
    line = lines()
    line.begin()
    line.hang_up()
    assert type(line.lost[0]) is ConnectError
    assert line.lost[0].retryable is True


def test_a_refused_version_is_tried_lower_once(lines: type[Line]) -> None:
    line = lines(versions=(5, 4))
    assert line.begin()[8] == 5
    line.say(unhex("20 02 00 01"))
    assert line.connection.try_older(line.lost[0])
    assert line.begin()[8] == 4
    line.say(unhex("20 02 00 01"))
    assert not line.connection.try_older(line.lost[1])


def test_an_accepted_version_is_never_lowered(lines: type[Line]) -> None:
    line = lines(versions=(5, 4))
    line.open()
    line.hang_up()
    line.begin()
    line.hang_up()
    assert not line.connection.try_older(line.lost[1])
    assert line.begin()[8] == 5


def test_a_fallback_without_success_is_forgotten(lines: type[Line]) -> None:
    line = lines(versions=(5, 4))
    line.begin()
    line.hang_up()
    assert line.connection.try_older(line.lost[0])
    line.begin()
    line.hang_up()
    line.connection.first_version()
    assert line.begin()[8] == 5


# --- publishing -----------------------------------------------------------------------


def test_publish_bytes(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.publish("a/b", b"hi")
    line.publish("a/b", b"hi", qos=1, retain=True)
    line.publish("a/b", b"", qos=2)
    assert line.packets() == [
        unhex("30 07 0003 612f62 6869"),
        unhex("33 09 0003 612f62 0001 6869"),
        unhex("34 07 0003 612f62 0002"),
    ]


def test_publish_now_is_the_same_bytes(lines: type[Line]) -> None:
    line = lines()
    line.open()
    assert line.connection.publish_now("a/b", b"hi", retain=True)
    assert line.sent() == unhex("31 07 0003 612f62 6869")


def test_publish_5_bytes(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    properties = publish_properties(expiry=1.2, content_type="t/x", user=[("k", "v"), ("k", "ü")])
    line.publish("a", b"!", qos=1, properties=properties)
    line.publish("a", b"!")
    assert line.packets() == [
        unhex("32 21 0001 61 0001 1a 02 00000002 03 0003 742f78 26 0001 6b 0001 76 26 0001 6b 0002")
        + "ü".encode()
        + b"!",
        unhex("30 05 0001 61 00 21"),
    ]


@pytest.mark.parametrize("size", [0, 1, 120, 121, 16_370, 16_384, 262_145, 2_097_160])
def test_publish_lengths(lines: type[Line], size: int) -> None:
    line = lines()
    line.open()
    payload = b"x" * size
    line.publish("t", payload, qos=1)
    (packet,) = line.packets()
    assert packet.endswith(b"\x00\x01t\x00\x01" + payload)


def test_puback_ends_qos_1(lines: type[Line]) -> None:
    line = lines()
    line.open()
    out = line.publish(qos=1)
    assert not out.done
    assert line.connection.pending(1) is None or out.packet_id == 1
    line.sent()
    line.say(unhex("40 02 0001"))
    assert line.done == [out]
    assert out.error is None


def test_qos_2_takes_four_packets(lines: type[Line]) -> None:
    line = lines()
    line.open()
    out = line.publish(qos=2)
    line.sent()
    line.say(unhex("50 02 0001"))
    assert line.sent() == unhex("62 02 0001")
    assert not out.done
    line.say(unhex("70 02 0001"))
    assert line.done == [out]
    assert out.error is None


def test_a_repeated_pubrec_gets_its_pubrel_again(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.publish(qos=2)
    line.sent()
    line.say(unhex("50 02 0001 50 02 0001"))
    assert line.sent() == unhex("62 02 0001 62 02 0001")


def test_acknowledgements_may_come_in_any_order(lines: type[Line]) -> None:
    line = lines()
    line.open()
    first, second, third = (line.publish(qos=1) for _ in range(3))
    line.sent()
    line.say(unhex("40 02 0003 40 02 0001 40 02 0002"))
    assert line.done == [third, first, second]


def test_unknown_acknowledgements_are_counted_and_ignored(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.say(unhex("40 02 0007 50 02 0007 70 02 0007 90 03 0007 00 b0 02 0007"))
    assert line.connection.connected
    assert line.connection.stats.unknown_acks == 5
    assert line.sent() == b""


@pytest.mark.parametrize("ack", ["50 02 0001", "70 02 0001"])
def test_an_acknowledgement_of_the_wrong_phase_is_ignored_under_311(
    lines: type[Line], ack: str
) -> None:
    line = lines()
    line.open()
    out = line.publish(qos=1)
    line.sent()
    line.say(unhex(ack))
    assert line.connection.connected
    assert line.connection.stats.wrong_phase_acks == 1
    assert not out.done


def test_a_puback_completes_qos_2_under_311(lines: type[Line]) -> None:
    # RabbitMQ 3.10 lowers the quality of service, and says no more than this.
    line = lines()
    line.open()
    # More than the window of QoS 2 holds, and one of QoS 1 behind them.
    outs = [line.publish(qos=2) for _ in range(25)] + [line.publish(qos=1)]
    for number in range(1, 27):
        line.say(b"\x40\x02" + number.to_bytes(2, "big"))
    assert line.done == outs
    assert [out.error for out in outs] == [None] * 26


def test_a_puback_after_pubrec_completes_nothing(lines: type[Line]) -> None:
    line = lines()
    line.open()
    out = line.publish(qos=2)
    line.say(unhex("50 02 0001 40 02 0001"))
    assert not out.done
    assert line.connection.stats.wrong_phase_acks == 1
    line.say(unhex("70 02 0001"))
    assert line.done == [out]


@pytest.mark.parametrize(("qos", "ack"), [(1, "50 02 0001"), (1, "70 02 0001"), (2, "40 02 0001")])
def test_an_acknowledgement_of_the_wrong_phase_ends_a_session_of_5(
    lines: type[Line], qos: int, ack: str
) -> None:
    line = lines(versions=(5,))
    line.open()
    line.publish(qos=qos)
    line.sent()
    line.say(unhex(ack))
    assert isinstance(line.lost[0], ProtocolError)
    assert line.sent() == unhex("e0 01 82")


def test_puback_reasons_become_typed_refusals(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    for _ in range(4):
        line.publish("secret", b"12345", qos=1)
    line.sent()
    line.say(unhex("40 03 0001 87 40 03 0002 95 40 03 0003 97 40 04 0004 10 00"))
    denied, large, quota, nobody = (out.error for out in line.done)
    assert isinstance(denied, PublishNotAuthorized)
    assert denied.outcome is Outcome.REJECTED
    assert denied.reason == 0x87
    assert isinstance(large, PayloadTooLarge)
    assert large.outcome is Outcome.REJECTED
    assert isinstance(quota, PublishFailed)
    assert quota.retryable is True
    assert nobody is None
    assert line.done[3].reason == 0x10


def test_a_pubrec_that_refuses_ends_the_message(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    out = line.publish(qos=2)
    line.sent()
    line.say(unhex("50 09 0001 87 05 1f 0002") + b"no")
    assert isinstance(out.error, PublishNotAuthorized)
    assert "no" in str(out.error)
    assert line.sent() == b"", "no PUBREL for a message that was refused"


def test_a_packet_the_broker_would_not_take_is_refused_before_it_is_sent(
    lines: type[Line],
) -> None:
    line = lines(versions=(5,))
    line.begin()
    line.say(unhex("20 08 00 00 05 27 00000014"))
    line.connection.release()
    line.publish("t", b"x" * 12, qos=1)  # exactly 20 bytes
    assert len(line.sent()) == 20
    with pytest.raises(PayloadTooLarge) as caught:
        line.publish("t", b"x" * 13, qos=1)
    assert caught.value.limit == 12
    assert caught.value.size == 13
    assert line.sent() == b""


def test_what_the_broker_cannot_do_is_refused_before_it_is_sent(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.begin()
    line.say(unhex("20 07 00 00 04 24 00 25 00"))
    line.connection.release()
    with pytest.raises(PublishFailed, match="QoS 1") as caught:
        line.publish(qos=1)
    assert caught.value.outcome is Outcome.NOT_SENT
    with pytest.raises(PublishFailed, match="retained") as caught:
        line.publish(retain=True)
    assert caught.value.outcome is Outcome.NOT_SENT


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "x" * 65536])
def test_a_header_that_mqtt_cannot_carry_is_refused(value: str) -> None:
    with pytest.raises(PublishFailed, match="header 'name' h") as caught:
        publish_properties(user=[("first", "x"), ("name", value)])
    assert caught.value.outcome is Outcome.NOT_SENT
    assert caught.value.retryable is False
    with pytest.raises(PublishFailed, match="the header name '") as caught:
        publish_properties(user=[("first", "x"), (value, "name")])
    assert len(str(caught.value)) < 200
    str(caught.value).encode()  # whatever the name holds, the error can be logged


# --- the window -----------------------------------------------------------------------


def test_the_window_is_respected_in_the_order_of_the_calls(lines: type[Line]) -> None:
    line = lines(max_inflight=2)
    line.open()
    for number in range(5):
        line.publish("t", bytes((number,)), qos=1)
    assert [packet[-1] for packet in line.packets()] == [0, 1]
    line.say(unhex("40 02 0002"))
    assert [packet[-1] for packet in line.packets()] == [2]
    line.say(unhex("40 02 0001"))
    assert [packet[-1] for packet in line.packets()] == [3]


def test_the_broker_s_receive_maximum_counts(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.begin()
    line.say(unhex("20 06 00 00 03 21 0003"))
    line.connection.release()
    for _ in range(10):
        line.publish(qos=1)
    assert len(line.packets()) == 3


def test_qos_2_stays_below_what_a_311_broker_may_stand(lines: type[Line]) -> None:
    line = lines(max_inflight=100)
    line.open()
    for _ in range(50):
        line.publish(qos=2)
    assert len(line.packets()) == 19
    line.say(unhex("50 02 0001"))
    assert line.packets() == [unhex("62 02 0001")], "PUBREC does not free the place"
    line.say(unhex("70 02 0001"))
    assert len(line.packets()) == 1


def test_qos_0_does_not_overtake_what_waits(lines: type[Line]) -> None:
    line = lines(max_inflight=1)
    line.open()
    line.publish("t", b"1", qos=1)
    line.publish("t", b"2", qos=1)
    line.publish("t", b"3", qos=0)
    assert not line.connection.publish_now("t", b"4")
    assert [packet[-1:] for packet in line.packets()] == [b"1"]
    line.say(unhex("40 02 0001"))
    assert [packet[-1:] for packet in line.packets()] == [b"2", b"3"]


def test_an_abandoned_message_keeps_its_packet_id(lines: type[Line]) -> None:
    line = lines(max_inflight=2)
    line.open()
    first = line.publish(qos=1)
    line.publish(qos=1)
    third = line.publish(qos=1)
    line.sent()
    line.connection.abandon(first)
    line.publish(qos=1)
    assert line.sent() == b"", "its place in the window is still taken"
    assert line.connection.pending(1) is first
    line.say(unhex("40 02 0001"))
    assert first not in line.done
    assert third.packet_id == 3
    assert len(line.packets()) == 1


def test_an_abandoned_message_that_waits_is_never_sent(lines: type[Line]) -> None:
    line = lines(max_inflight=1)
    line.open()
    line.publish("t", b"1", qos=1)
    second = line.publish("t", b"2", qos=1)
    line.publish("t", b"3", qos=1)
    line.connection.abandon(second)
    line.say(unhex("40 02 0001"))
    assert [packet[-1:] for packet in line.packets()] == [b"1", b"3"]


def test_packet_ids_go_round_and_skip_those_in_use(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.publish(qos=1)
    line.sent()
    for number in range(2, 65536):
        line.publish(qos=1)
        line.connection.flush()
        line.sent()
        line.say(bytes((0x40, 2)) + number.to_bytes(2, "big"))
    out = line.publish(qos=1)
    assert out.packet_id == 2


# --- resending ------------------------------------------------------------------------


def test_unanswered_publishes_are_sent_again_in_order(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    for number in range(3):
        line.publish("t", bytes((number,)), qos=1)
    line.sent()
    line.hang_up()
    line.open(ACCEPT_PRESENT, release=False)
    line.publish("t", b"\x09", qos=1)
    assert line.sent() == b"", "nothing goes before the subscriptions are back"
    line.connection.release()
    packets = line.packets()
    assert [packet[0] for packet in packets] == [0x3A, 0x3A, 0x3A, 0x32]
    assert [packet_id(packet) for packet in packets] == [1, 2, 3, 4]
    assert [packet[-1] for packet in packets] == [0, 1, 2, 9]
    line.say(unhex("40 02 0001 40 02 0002 40 02 0003 40 02 0004"))
    assert [out.error for out in line.done] == [None] * 4


def test_pubrel_is_resumed(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    out = line.publish("t", b"x", qos=2)
    line.sent()
    line.say(unhex("50 02 0001"))
    line.sent()
    line.hang_up()
    line.open(ACCEPT_PRESENT)
    assert line.sent() == unhex("62 02 0001")
    line.say(unhex("70 02 0001"))
    assert out.error is None
    assert line.done == [out]


def test_in_a_new_session_qos_2_starts_over(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    line.publish("t", b"x", qos=2)
    line.sent()
    line.say(unhex("50 02 0001"))
    line.hang_up()
    line.open(ACCEPT)
    assert line.sent() == unhex("3c 06 0001 74 0001 78")


def test_replay_stays_within_the_window(lines: type[Line]) -> None:
    line = lines(versions=(5,), expiry=60)
    line.open()
    for number in range(10):
        line.publish("t", bytes((number,)), qos=1)
    assert len(line.packets()) == 10
    line.hang_up()
    line.begin()
    line.say(unhex("20 06 01 00 03 21 0002"))
    line.connection.release()
    seen: list[int] = []
    while packets := line.packets():
        assert len(packets) <= 2
        for packet in packets:
            seen.append(packet[-1])
            line.say(bytes((0x40, 2)) + packet_id(packet).to_bytes(2, "big"))
    assert seen == list(range(10))
    assert len(line.done) == 10


def test_a_replay_that_is_interrupted_keeps_its_order(lines: type[Line]) -> None:
    line = lines(versions=(5,), expiry=60, client_id=None)
    line.open()
    for number in range(6):
        line.publish("t", bytes((number,)), qos=1)
    line.sent()
    seen: list[int] = []
    for _ in range(6):
        line.now += 100
        line.connection.end()
        line.begin()
        line.say(unhex("20 06 01 00 03 21 0002"))
        line.connection.release()
        first, *_ = line.packets()
        seen.append(first[-1])
        line.say(bytes((0x40, 2)) + packet_id(first).to_bytes(2, "big"))
    assert seen == list(range(6))
    assert line.connection.unfinished == 0


def test_qos_0_fails_with_the_session_and_says_what_is_known(lines: type[Line]) -> None:
    line = lines()
    line.open(release=False)
    waiting = line.publish("t", b"1")
    line.connection.release()
    line.connection.flush()
    assert waiting.error is None
    assert waiting.done
    line.publish("t", b"2")  # in the buffer, never flushed
    line.hang_up()
    (error,) = [out.error for out in line.done[1:]]
    assert isinstance(error, PublishFailed)
    assert error.outcome is Outcome.NOT_SENT


def test_qos_0_half_sent_is_unknown(lines: type[Line]) -> None:
    line = lines()
    line.open()
    out = line.publish("t", b"x" * 8_000_000)
    line.connection.flush()
    assert not out.done
    line.connection.end()
    assert isinstance(out.error, PublishFailed)
    assert out.error.outcome is Outcome.UNKNOWN


def test_closing_gives_every_publish_its_outcome(lines: type[Line]) -> None:
    line = lines(max_inflight=1)
    line.open()
    sent = line.publish(qos=1)
    waiting = line.publish(qos=1)
    line.sent()
    line.connection.end()
    line.connection.fail_pending()
    assert isinstance(sent.error, PublishFailed)
    assert sent.error.outcome is Outcome.UNKNOWN
    assert isinstance(waiting.error, PublishFailed)
    assert waiting.error.outcome is Outcome.NOT_SENT
    assert line.connection.unfinished == 0


def test_nothing_follows_a_disconnect(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.say(unhex("32 06 0001 74 0005 78"))
    line.publish(qos=1)
    line.sent()
    line.connection.disconnect()
    with pytest.raises(NotConnected):
        line.publish()
    with pytest.raises(NotConnected):
        line.connection.publish_now("t", b"")
    line.connection.settle(line.messages[0].serial)
    line.say(unhex("40 02 0001"))
    assert line.done[0].error is None, "answers still count"
    assert line.sent() == unhex("e0 00")


def test_an_abandoned_message_is_forgotten_with_the_broker_s_session(
    lines: type[Line],
) -> None:
    line = lines(clean_start=False)
    line.open()
    out = line.publish("t", b"x", qos=1)
    line.sent()
    line.connection.abandon(out)
    line.hang_up()
    line.open(ACCEPT_PRESENT)
    assert line.sent()[0] == 0x3A, "the broker waits for it"
    line.hang_up()
    line.open(ACCEPT)
    assert line.sent() == b""
    assert line.connection.unfinished == 0


def test_a_message_that_ends_each_session_is_given_up(lines: type[Line]) -> None:
    line = lines(clean_start=False, client_id=None)
    line.open()
    poison = line.publish("t", b"poison", qos=1)
    good = line.publish("t", b"good", qos=1)
    line.sent()
    line.hang_up()
    for _ in range(2):
        assert not poison.done
        line.now += 1
        line.open(ACCEPT_PRESENT)
        line.sent()
        line.hang_up()
    assert isinstance(poison.error, PublishFailed)
    assert poison.error.outcome is Outcome.UNKNOWN
    assert line.notices[0][0] == "publish_refused"
    line.open(ACCEPT_PRESENT)
    (packet,) = line.packets()
    assert packet.endswith(b"good")
    line.say(b"\x40\x02" + packet_id(packet).to_bytes(2, "big"))
    assert good.error is None


# --- subscribing ----------------------------------------------------------------------


def test_subscribe_bytes(lines: type[Line]) -> None:
    line = lines()
    line.open()
    request = line.connection.subscribe([Subscribe("a/+", 1), Subscribe("b", 2)], lambda _: None)
    assert line.sent() == unhex("82 0c 0001 0003 612f2b 01 0001 62 02")
    line.say(unhex("90 04 0001 01 80"))
    assert request.codes == (1, 0x80)
    assert line.connection.refusal(request, 0) is None
    refused = line.connection.refusal(request, 1)
    assert refused is not None
    assert refused.reason == 0x80
    assert refused.topic == "b"


def test_subscribe_5_bytes(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.open()
    line.connection.subscribe(
        [Subscribe("a", 1, no_local=True, retain_handling=2, identifier=300)], lambda _: None
    )
    assert line.sent() == unhex("82 0a 0001 03 0b ac02 0001 61 25")


def test_unsubscribe_bytes(lines: type[Line]) -> None:
    line = lines()
    line.open()
    done: list[object] = []
    line.connection.unsubscribe(["a/+"], done.append)
    assert line.sent() == unhex("a2 07 0001 0003 612f2b")
    line.say(unhex("b0 02 0001"))
    assert len(done) == 1


def test_a_suback_with_too_few_codes_is_a_protocol_error(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.connection.subscribe([Subscribe("a", 1), Subscribe("b", 2)], lambda _: None)
    line.say(unhex("90 03 0001 01"))
    assert isinstance(line.lost[0], ProtocolError)


def test_requests_and_publishes_share_the_packet_ids(lines: type[Line]) -> None:
    line = lines()
    line.open()
    line.publish(qos=1)
    line.connection.subscribe([Subscribe("a")], lambda _: None)
    out = line.publish(qos=1)
    assert out.packet_id == 3


# --- receiving ------------------------------------------------------------------------


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


# --- pausing --------------------------------------------------------------------------


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


# --- keepalive ------------------------------------------------------------------------


def test_a_ping_goes_out_after_three_quarters_of_the_keepalive(lines: type[Line]) -> None:
    line = lines(keepalive=8)
    line.open()
    assert line.connection.tick() == pytest.approx(6.0)
    line.now += 5.9
    line.connection.tick()
    assert line.sent() == b""
    line.now += 0.1
    line.connection.tick()
    assert line.sent() == unhex("c0 00")
    line.say(unhex("d0 00"))
    assert line.connection.tick() == pytest.approx(6.0)


@pytest.mark.parametrize(("keepalive", "after"), [(2, 1.0), (3, 2.0), (60, 45.0), (1, 0.5)])
def test_a_ping_leaves_at_least_a_second(lines: type[Line], keepalive: int, after: float) -> None:
    line = lines(keepalive=keepalive)
    line.open()
    assert line.connection.tick() == pytest.approx(after)


def test_sending_puts_the_ping_off_only_while_the_broker_answers(lines: type[Line]) -> None:
    line = lines(keepalive=8)
    line.open()
    for _ in range(12):
        line.now += 0.5
        line.connection.publish_now("t", b"x")
        line.sent()
        line.connection.tick()
    assert line.connection.stats.pings == 1, "nothing came in for six seconds"
    line.now = 1000.0 + 12.0
    line.connection.tick()
    (error,) = line.lost
    assert error.retryable is True
    assert "silent" in str(error)


def test_a_silent_peer_is_dead_after_one_and_a_half_intervals(lines: type[Line]) -> None:
    line = lines(keepalive=8)
    line.open()
    while not line.lost:
        due = line.connection.tick()
        line.sent()
        line.now += due or 0.0
    assert line.now - 1000.0 == pytest.approx(12.0, abs=0.5)


def test_keepalive_zero_never_gives_up(lines: type[Line]) -> None:
    line = lines(keepalive=0)
    line.open()
    line.now += 1e6
    assert line.connection.tick() is None
    assert line.lost == []


def test_nobody_is_dead_while_nobody_listens(lines: type[Line]) -> None:
    line = lines(keepalive=8)
    line.open()
    line.connection.pause()
    packet = b"\x30" + unhex("83 80 80 01") + b"\x00\x01t" + b"x" * 2_097_152
    line.connection.on_message = lambda message: None
    assert line.peer is not None
    line.peer.setblocking(True)
    for start in range(0, len(packet), 32768):
        line.say(packet[start : start + 32768])
    assert not line.connection.reading
    line.now += 100
    line.connection.tick()
    assert line.lost == []
    assert line.connection.stats.pings == 1, "the broker must not take us for dead"
    line.connection.resume()
    line.connection.tick()
    assert line.lost == []


def test_pings_are_answered_in_order(lines: type[Line]) -> None:
    line = lines()
    line.open()
    answers: list[object] = []
    line.connection.ping(answers.append)
    line.connection.ping(answers.append)
    line.say(unhex("d0 00"))
    assert answers == [None]
    line.hang_up()
    assert isinstance(answers[1], ConnectError)


# --- takeover -------------------------------------------------------------------------


def test_three_short_lives_are_a_takeover(lines: type[Line]) -> None:
    line = lines(client_id="shared")
    for _ in range(3):
        line.open()
        line.now += 0.5
        line.hang_up()
    assert [type(error) for error in line.lost] == [ConnectError, ConnectError, TakenOver]
    assert line.lost[2].retryable is False
    assert "shared" in str(line.lost[2])


def test_three_takeovers_that_the_broker_tells(lines: type[Line]) -> None:
    line = lines(versions=(5,), client_id=None)
    for _ in range(3):
        line.open()
        line.now += 15
        line.say(unhex("e0 01 8e"))
    assert isinstance(line.lost[0], ServerRefused)
    assert line.lost[0].retryable is True
    assert isinstance(line.lost[2], TakenOver)


def test_losses_far_apart_are_no_takeover(lines: type[Line]) -> None:
    line = lines(client_id="shared")
    for _ in range(5):
        line.open()
        line.now += 31
        line.hang_up()
    assert {type(error) for error in line.lost} == {ConnectError}


def test_a_random_client_id_is_not_taken_over_by_a_flapping_link(lines: type[Line]) -> None:
    line = lines(client_id=None)
    for _ in range(10):
        line.open()
        line.now += 0.1
        line.hang_up()
    assert {type(error) for error in line.lost} == {ConnectError}


# --- paho -----------------------------------------------------------------------------


def test_paho_still_calls_what_is_replaced_here() -> None:
    """paho's private methods that `PahoClient` overrides, and how paho calls them."""
    for name in (
        "_create_socket",
        "_packet_queue",
        "_packet_read",
        "_packet_write",
        "_mid_generate",
        "_messages_reconnect_reset",
        "_check_keepalive",
        "want_write",
    ):
        ours = inspect.signature(getattr(PahoClient, name))
        theirs = inspect.signature(getattr(Client, name))
        assert list(ours.parameters) == list(theirs.parameters), name
    assert "self._create_socket()" in inspect.getsource(Client.reconnect)
    assert "_send_connect(self._keepalive)" in inspect.getsource(Client.reconnect)
    assert "self._packet_read()" in inspect.getsource(Client.loop_read)
    assert "self._packet_write()" in inspect.getsource(Client.loop_write)
    assert "self._check_keepalive()" in inspect.getsource(Client.loop_misc)
    for name in ("_send_connect", "_send_subscribe", "_send_unsubscribe", "_send_disconnect"):
        assert "self._packet_queue(" in inspect.getsource(getattr(Client, name)), name
    for name in ("_packet_handle", "_handle_connack", "_handle_suback", "_handle_unsuback"):
        assert hasattr(Client, name), name


def test_paho_s_own_store_stays_empty(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    for _ in range(10):
        line.publish(qos=1)
        line.publish(qos=2)
    client = line.connection.paho
    assert client is not None
    assert len(client._out_messages) == 0
    assert len(client._in_messages) == 0


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


def test_no_secret_is_printed(lines: type[Line], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    line = lines(username="joe", password=Secret("canary-4711"), versions=(5,))
    line.begin()
    line.say(unhex("20 03 00 86 00"))
    text = caplog.text + repr(line.connection.settings) + str(line.lost[0]) + repr(line.lost[0])
    assert "canary-4711" not in text


def test_accept_constants_are_what_they_say() -> None:
    assert (ACCEPT[2], ACCEPT_PRESENT[2], ACCEPT_5[2], ACCEPT_5_PRESENT[2]) == (0, 1, 0, 1)


def test_a_reset_after_connect_leads_to_311(lines: type[Line]) -> None:
    """A peer that closes with our CONNECT unread resets the connection."""
    line = lines(versions=(5, 4))
    line.begin(read=False)
    line.hang_up()
    (error,) = line.lost
    assert isinstance(error.__cause__, ConnectionResetError)
    assert line.connection.try_older(error)
    assert line.connection.version == 4
