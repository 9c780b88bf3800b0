"""What a service over MQTT replaces in its connection, and that errors are in its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from pubsub_core.config.options import build, parse_url
from pubsub_core.errors import NotConnected, PayloadTooLarge, PublishFailed, PubSubError, TakenOver
from pubsub_core.interfaces import BackendContext
from pubsub_core.plugins import registry
from pubsub_mqtt.backend.connection_backend import ConnectionBackend
from pubsub_mqtt.connection import Outgoing, Request, Subscribe
from pubsub_mqtt.connection.keepalive import KeepaliveStep, Quiet
from tests.mqtt.lines import ACCEPT, ACCEPT_PRESENT, Line, packet_id


def raised(call: Callable[[], object]) -> PubSubError:
    with pytest.raises(PubSubError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "said",
    [
        "20 02 00 04",  # bad credentials
        "20 02 00 03",  # not now
        "20 02 00",  # malformed, once it is complete
        "15 03",  # a TLS alert
        "20 02 00 00 d0 01 00",  # malformed PINGRESP
        "20 02 00 00 30 01 00",  # malformed PUBLISH
        "20 02 00 00 62 02 00 01 40 02 00 05 10 00",  # CONNECT from a broker
    ],
)
def test_a_session_that_ends_says_whose_it_was(lines: type[Line], said: str) -> None:
    line = lines(backend="acme")
    line.begin()
    line.say(bytes.fromhex(said))
    if not line.lost:
        line.hang_up()
    (error,) = line.lost
    assert error.backend == "acme"


@pytest.mark.parametrize("reason", [0x80, 0x87, 0x8E, 0x95])
def test_a_disconnect_of_the_broker_says_whose_session_it_was(
    lines: type[Line], reason: int
) -> None:
    line = lines(backend="acme", versions=(5,))
    line.open()
    line.say(bytes((0xE0, 1, reason)))
    assert line.lost[0].backend == "acme"


def test_calls_without_a_session_say_whose_it_is(lines: type[Line]) -> None:
    connection = lines(backend="acme").connection
    for call in (
        lambda: connection.ping(lambda error: None),
        lambda: connection.publish("t", b""),
        lambda: connection.publish_now("t", b""),
        lambda: connection.subscribe([Subscribe("t")], lambda request: None),
        lambda: connection.unsubscribe(["t"], lambda request: None),
        lambda: connection.ask("t", b"", lambda out: None, shown="a request"),
        lambda: connection.subscribe_verbatim("t", lambda request: None),
    ):
        error = raised(call)
        assert isinstance(error, NotConnected)
        assert error.backend == "acme"


def test_what_waits_when_a_session_ends_is_told_whose_it_was(lines: type[Line]) -> None:
    line = lines(backend="acme")
    line.open()
    told: list[PubSubError | None] = []
    requests: list[Request] = []
    line.connection.ping(told.append)
    line.connection.subscribe([Subscribe("t")], requests.append)
    line.publish(qos=1)
    line.hang_up()
    line.connection.fail_pending()
    told += [requests[0].error, line.done[0].error]
    assert [error.backend for error in told if error is not None] == ["acme"] * 3


def test_refusals_of_the_broker_say_whose_call_it_was(lines: type[Line]) -> None:
    line = lines(backend="acme", versions=(5,))
    line.open()
    line.publish(qos=1)
    identifier = packet_id(line.packets()[0])
    line.say(b"\x40\x03" + identifier.to_bytes(2, "big") + b"\x87")
    requests: list[Request] = []
    line.connection.subscribe([Subscribe("t")], requests.append)
    (packet,) = line.packets()
    line.say(b"\x90\x04" + packet[2:4] + b"\x00\x87")
    refused = line.connection.refusal(requests[0])
    assert line.done[0].error is not None
    assert refused is not None
    assert (line.done[0].error.backend, refused.backend) == ("acme", "acme")


@pytest.mark.parametrize(
    "url",
    ["mqtt://host", "emitter://host?key=abc", "losant://key:secret@575ecf887ae143cd83dc4aa2"],
)
async def test_a_backend_without_a_session_names_itself(url: str) -> None:
    address, query = parse_url(url)
    info = registry().by_name(address.scheme)
    assert info.options is not None
    options = build(info.options, query, where="test", backend=info.name)
    module, _, name = info.factory.partition(":")
    backend = getattr(importlib.import_module(module), name)(BackendContext(info, address, options))
    assert isinstance(backend, ConnectionBackend)
    with pytest.raises(NotConnected) as caught:
        await backend.ping()
    assert caught.value.backend == info.name


# --- topics that hold a key -----------------------------------------------------------------


def test_errors_call_a_topic_as_they_were_told_to(lines: type[Line]) -> None:
    line = lines(versions=(5,))
    line.begin()
    line.say(bytes.fromhex("20 08 00 00 05 27 00000020"))  # packets of 32 bytes at most
    line.connection.release()
    for call in (
        lambda: line.connection.publish("key/a", b"x" * 40, shown="a"),
        lambda: line.connection.publish_now("key/a", b"x" * 40, shown="a"),
        lambda: line.connection.ask("key/a", b"x" * 40, lambda out: None, shown="a"),
    ):
        error = raised(call)
        assert isinstance(error, PayloadTooLarge)
        assert error.topic == "a"
        assert "key" not in str(error)
    out = line.publish("key/a", b"x", qos=1, shown="a")
    assert line.sent().startswith(b"\x32\x0b\x00\x05key/a")
    line.hang_up()
    line.connection.fail_pending()
    assert out.topic == "a"
    assert "key" not in f"{out!r} {out.error}"


def test_a_call_without_a_session_does_not_show_the_wire_either(lines: type[Line]) -> None:
    error = raised(lambda: lines().connection.publish("key/a", b"", shown="a"))
    assert error.topic == "a"


# --- requests -------------------------------------------------------------------------------


def test_a_request_goes_past_gate_and_window(lines: type[Line]) -> None:
    line = lines(max_inflight=1)
    line.open(release=False)
    line.publish(qos=1)
    assert line.packets() == []
    line.connection.release()
    assert len(line.packets()) == 1
    asked: list[Outgoing] = []
    out = line.connection.ask("t", b"", asked.append, shown="a request")
    (packet,) = line.packets()
    assert packet[0] == 0x32
    assert packet_id(packet) == out.packet_id
    line.say(b"\x40\x02" + out.packet_id.to_bytes(2, "big"))
    assert asked == [out]


def test_a_filter_goes_out_verbatim_and_is_not_kept(lines: type[Line]) -> None:
    line = lines()
    line.open()
    done: list[Request] = []
    request = line.connection.subscribe_verbatim("key/#/?last=0", done.append)
    identifier = request.packet_id.to_bytes(2, "big")
    assert line.sent() == b"\x82\x12" + identifier + b"\x00\x0dkey/#/?last=0\x00"
    assert request.filters == ("",)
    line.say(b"\x90\x03" + identifier + b"\x00")
    assert done == [request]
    assert request.codes == (0,)


# --- resending, short lives, keepalive ------------------------------------------------------


def test_each_message_that_is_sent_again_is_told_just_before(lines: type[Line]) -> None:
    line = lines(max_inflight=2, clean_start=False)
    line.open()
    told: list[str] = []
    line.connection.on_resend = told.append
    for topic in ("a", "b"):
        line.publish(topic, qos=1)
    assert told == []
    line.hang_up()
    line.open(ACCEPT_PRESENT, release=False)
    assert told == []
    line.connection.release()
    assert told == ["a", "b"]


def cut_short(line: Line, count: int) -> None:
    for _ in range(count):
        line.open()
        line.hang_up()


def test_short_lives_are_a_taken_identifier_where_the_policy_says_so(lines: type[Line]) -> None:
    own, random = lines(), lines(client_id=None)
    for line in (own, random):
        cut_short(line, 3)
    assert isinstance(own.lost[-1], TakenOver)
    assert not any(isinstance(error, TakenOver) for error in random.lost)


def test_a_policy_can_see_another_reason_for_a_short_life(lines: type[Line]) -> None:
    line = lines()
    asked: list[bool] = []

    def policy() -> bool:
        asked.append(True)
        return False

    line.connection.short_life_policy = policy
    cut_short(line, 4)
    assert len(asked) == 4
    assert not any(isinstance(error, TakenOver) for error in line.lost)


def test_a_keepalive_policy_sees_how_quiet_it_is_and_is_obeyed(lines: type[Line]) -> None:
    line = lines(keepalive=60)
    steps = [KeepaliveStep(7.0, ping=True), KeepaliveStep(5.0), KeepaliveStep(0.0, dead="is gone")]
    seen: list[Quiet] = []

    def policy(quiet: Quiet) -> KeepaliveStep:
        seen.append(quiet)
        return steps[len(seen) - 1]

    line.connection.keepalive_policy = policy
    line.open(ACCEPT)
    line.now += 3
    assert line.connection.tick() == 7.0
    assert line.sent() == b"\xc0\x00"
    line.now += 2
    assert line.connection.tick() == 5.0
    assert line.connection.tick() is None
    assert seen[0] == Quiet(60, 3.0, 3.0, None, True)
    assert seen[1] == Quiet(60, 5.0, 2.0, 2.0, True)
    assert str(line.lost[0].args[0]).endswith("is gone")


def test_a_publish_that_cannot_be_carried_has_an_outcome(lines: type[Line]) -> None:
    line = lines(versions=(5,), backend="acme")
    line.begin()
    line.say(bytes.fromhex("20 05 00 00 02 24 00"))  # QoS 0 only
    error = raised(lambda: line.connection.publish("t", b"", qos=1))
    assert isinstance(error, PublishFailed)
    assert error.backend == "acme"
