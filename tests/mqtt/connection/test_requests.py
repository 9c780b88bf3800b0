"""SUBSCRIBE, UNSUBSCRIBE and PINGREQ, byte by byte, and their answers."""

from __future__ import annotations

from collections.abc import Callable

from pubsub_core.errors import ConnectError, NotConnected, SubscribeFailed
from pubsub_mqtt.connection import Subscribe
from pubsub_mqtt.connection.state import Request
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


def subscribed_twice(line: Line, end: Callable[[Line], None]) -> list[Request]:
    """Subscribe to two filters in each of three sessions, which *end* ends; the second waits."""
    done: list[Request] = []
    for _ in range(3):
        line.open()
        for name in ("answered", "waits"):
            try:
                line.connection.subscribe([Subscribe(name)], done.append)
            except SubscribeFailed:
                continue
        first = line.packets()[0]
        line.say(b"\x90\x03" + first[2:4] + b"\x00")
        end(line)
    return [request for request in done if request.filters == ("waits",)]


def test_a_filter_that_ends_two_sessions_is_given_up(lines: type[Line]) -> None:
    one, two = subscribed_twice(lines(), Line.hang_up)
    assert isinstance(one.error, NotConnected)
    assert isinstance(two.error, SubscribeFailed)
    assert two.error.retryable is False
    assert two.error.topic == "waits"


def test_a_filter_that_waits_long_or_at_a_broken_link_is_not_given_up(lines: type[Line]) -> None:
    def late(line: Line) -> None:
        line.now += 2
        line.hang_up()

    def broken(line: Line) -> None:
        line.connection.end(ConnectError("no route"))

    for end in (late, broken):
        waits = subscribed_twice(lines(), end)
        assert [type(request.error) for request in waits] == [NotConnected] * 3
