"""SUBSCRIBE, UNSUBSCRIBE and PINGREQ, byte by byte, and their answers."""

from __future__ import annotations

from pubsub_mqtt.connection import Subscribe
from pubsub_mqtt.errors import ProtocolError
from tests.mqtt.lines import (
    Line,
)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


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
