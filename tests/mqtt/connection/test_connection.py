"""A session from CONNECT to its end, byte by byte; the seams; and whose errors these are."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from pubsub_core.config.options import build, parse_url
from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    NotConnected,
    PayloadTooLarge,
    PublishFailed,
    PubSubError,
    ServerRefused,
    TakenOver,
)
from pubsub_core.interfaces import BackendContext
from pubsub_core.plugins import registry
from pubsub_core.secrets import Secret
from pubsub_mqtt.backend.connection_backend import ConnectionBackend
from pubsub_mqtt.connection import Outgoing, Request, Subscribe, Will
from pubsub_mqtt.connection.keepalive import KeepaliveStep, Quiet
from pubsub_mqtt.errors import ProtocolError
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


# --- CONNECT ---------------------------------------------------------------------------


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


# --- CONNACK ---------------------------------------------------------------------------


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


# --- keepalive -------------------------------------------------------------------------


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


# --- takeover --------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("reset", [False, True])
def test_short_lives_are_tried_again_and_say_what_they_look_like(
    lines: type[Line], version: int, reset: bool
) -> None:
    line = lines(client_id="shared", versions=(version,))
    for _ in range(4):
        line.open()
        line.now += 0.5
        if reset:  # as where the broker crashed with our bytes unread
            line.publish("t")
            line.connection.flush()
        line.hang_up()
    assert not any(isinstance(error, TakenOver) for error in line.lost)
    assert all(error.retryable is not False for error in line.lost)
    assert [("shared" in str(error)) for error in line.lost] == [False, False, True, True]
    assert "3 times within 60 s" in str(line.lost[2])
    assert "another client" in line.lost[2].hint
    assert "crash" in line.lost[2].hint


def test_a_word_of_the_broker_counts_apart_from_its_silence(lines: type[Line]) -> None:
    line = lines(client_id="shared", versions=(5,))
    for _ in range(2):
        line.open()
        line.hang_up()
        line.open()
        line.say(unhex("e0 01 8e"))
    assert not any(isinstance(error, TakenOver) for error in line.lost)
    line.open()
    line.say(unhex("e0 01 8e"))
    assert isinstance(line.lost[-1], TakenOver)


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


# --- whose errors these are ------------------------------------------------------------


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


# --- topics that hold a key ------------------------------------------------------------


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


# --- requests --------------------------------------------------------------------------


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


# --- resending, short lives, keepalive -------------------------------------------------


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


def test_short_lives_may_be_a_taken_identifier_where_the_policy_says_so(
    lines: type[Line],
) -> None:
    own, random = lines(), lines(client_id=None)
    for line in (own, random):
        cut_short(line, 3)
    assert own.connection.flapping
    assert not random.connection.flapping


def test_a_policy_can_see_another_reason_for_a_short_life(lines: type[Line]) -> None:
    line = lines()
    asked: list[bool] = []

    def policy() -> bool:
        asked.append(True)
        return False

    line.connection.short_life_policy = policy
    cut_short(line, 4)
    assert len(asked) == 4
    assert not line.connection.flapping


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
