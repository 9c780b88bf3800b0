"""What leaves for publishes, byte by byte, and the outcome of each.

The bytes are written out by hand from MQTT 3.1.1 and 5.0, so a mistake made in both directions
cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pubsub_core.errors import (
    ConnectError,
    NotConnected,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
)
from pubsub_mqtt.errors import ProtocolError
from pubsub_mqtt.packets import NO_PROPERTIES, publish_properties
from tests.mqtt.lines import (
    ACCEPT,
    ACCEPT_PRESENT,
    Line,
    packet_id,
)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


# --- publishing ------------------------------------------------------------------------


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
    assert line.connection.pending(1) is out
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


# --- the window ------------------------------------------------------------------------


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


# --- resending -------------------------------------------------------------------------


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
    line.now += 60  # it is the message's own time that counts, not that of the session
    poison = line.publish("t", b"poison", qos=1)
    good = line.publish("t", b"good", qos=1)
    line.sent()
    line.hang_up()
    assert not poison.done
    line.now += 1
    line.open(ACCEPT_PRESENT)
    line.sent()
    line.hang_up()
    assert isinstance(poison.error, PublishFailed)
    assert poison.error.outcome is Outcome.UNKNOWN
    assert poison.error.retryable is False
    assert "'t' (6 bytes)" in str(poison.error)
    assert [(kind, topic) for kind, _, topic in line.notices] == [("publish_refused", "t")]
    line.open(ACCEPT_PRESENT)
    (packet,) = line.packets()
    assert packet.endswith(b"good")
    line.say(b"\x40\x02" + packet_id(packet).to_bytes(2, "big"))
    assert good.error is None


def reset(line: Line) -> None:
    """Let the broker leave what we wrote unread, which makes its close a reset."""
    line.connection.flush()
    line.close_peer()
    line.connection.feed()


def broken_pipe(line: Line) -> None:
    """Let the broker be gone when we write."""
    line.close_peer()
    line.connection.flush()


@pytest.mark.parametrize("end", [reset, broken_pipe])
@pytest.mark.parametrize("qos", [1, 2])
def test_any_way_of_hanging_up_counts(
    lines: type[Line], end: Callable[[Line], None], qos: int
) -> None:
    line = lines(client_id=None)
    line.open()
    before = line.publish("a", qos=1)  # the broker answers those before it
    line.say(b"\x40\x02" + packet_id(line.sent()).to_bytes(2, "big"))
    poison = line.publish("b", b"x" * 9000, qos=qos)
    behind = line.publish("c", qos=1)
    end(line)
    line.open()
    end(line)
    assert len(line.lost) == 2
    assert isinstance(poison.error, PublishFailed)
    assert "9000 bytes" in str(poison.error)
    assert before.error is None
    assert not behind.done


@pytest.mark.parametrize("properties", [NO_PROPERTIES, publish_properties(user=[("k", "v" * 300)])])
def test_the_size_is_that_of_the_payload(lines: type[Line], properties: bytes) -> None:
    line = lines(versions=(5,))
    poison = None
    for _ in range(2):
        line.open()
        poison = poison or line.publish("b", b"x" * 77, qos=1, properties=properties)
        line.sent()
        line.say(unhex("e0 01 95"))
    assert poison is not None
    assert "(77 bytes)" in str(poison.error)
    assert "reason 0x95" in str(poison.error)


def test_a_message_that_waited_long_for_its_answer_ended_nothing(lines: type[Line]) -> None:
    line = lines(client_id=None)
    out = None
    for _ in range(5):
        line.open()
        out = out or line.publish("t", b"x", qos=1)
        line.sent()
        line.now += 2
        line.hang_up()
    assert out is not None
    assert not out.done
    assert out.refusals == 0


def test_a_link_that_breaks_is_no_answer_of_the_broker(lines: type[Line]) -> None:
    line = lines(client_id=None)
    out = None
    for _ in range(5):
        line.open()
        out = out or line.publish("t", b"x", qos=1)
        line.sent()
        line.connection.end(ConnectError("no route"))
    assert out is not None
    assert not out.done
    assert out.refusals == 0


def test_what_the_broker_has_taken_is_not_suspected(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    taken = line.publish("t", b"taken", qos=2)
    poison = line.publish("t", b"poison", qos=1)
    line.say(b"\x50\x02" + packet_id(line.packets()[0]).to_bytes(2, "big"))
    line.sent()
    line.hang_up()
    line.open(ACCEPT_PRESENT)
    line.sent()
    line.hang_up()
    assert poison.done
    assert not taken.done
