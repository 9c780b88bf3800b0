"""`Device` against a broker that answers only as told."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_losant import (
    Device,
    LosantAuthError,
    LosantConnectError,
    LosantError,
    LosantProtocolError,
)
from pubsub_mqtt.connection import Connection
from pubsub_mqtt.connection.dial import dial_steps
from tests.losant.support import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Events,
    ScriptedBroker,
    command,
    connected,
    in_thread,
    make,
    publish,
    scripted,
    turn_until,
    wait_until,
)
from tests.losant.vectors import (
    DEVICE,
    ERRORS,
    NOW,
    VECTORS,
    by_id,
    local_zone,
    payload_of,
    python_time,
    python_value,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

WIRE = VECTORS["wire"]


# --- connecting --------------------------------------------------------------------------


@pytest.mark.parametrize("websocket", [False, True], ids=["tcp", "websockets"])
def test_the_packets_are_byte_for_byte_those_of_the_vectors(websocket: bool) -> None:
    with scripted(websocket=websocket) as broker:
        with connected(broker) as (device, _):
            assert device.send_state({"t": 1}, 1234) is True
            wait_until(lambda: broker.of(PUBLISH))
        wait_until(lambda: broker.of(DISCONNECT))
        assert [packet.raw.hex() for packet in broker.packets] == [
            WIRE["connect_hex"],
            WIRE["subscribe_command_mid1_hex"],
            WIRE["publish_state_hex"],
            WIRE["disconnect_hex"],
        ]
        assert broker.paths == (["/mqtt"] if websocket else [""])


@pytest.mark.parametrize("case", VECTORS["endpoints"], ids=repr)
def test_each_transport_dials_the_port_of_the_platform(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _dialled(monkeypatch, case["secure"], case["transport"]) == (case["host"], case["port"])


def _dialled(
    monkeypatch: pytest.MonkeyPatch, secure: bool, transport: Any, **options: Any
) -> tuple[str, int]:
    found: list[tuple[str, int]] = []

    def resolve(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        found.append((host, port))
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(socket.gaierror):
            Device(DEVICE, "AK", "SEC", secure, transport, **options).connect(blocking=False)
    (address,) = found
    return address


def test_the_endpoint_is_a_class_attribute_an_argument_or_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOSANT_MQTT_ENDPOINT", "broker.env.example")
    assert _dialled(monkeypatch, True, "tcp") == ("broker.env.example", 8883)
    assert _dialled(monkeypatch, True, "tcp", host="broker.own.example", port=99) == (
        "broker.own.example",
        99,
    )
    monkeypatch.setattr(Device, "mqtt_endpoint", "broker.private.example")
    assert _dialled(monkeypatch, False, "tcp") == ("broker.private.example", 1883)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("a b", "k", "s"), {}),
        ((DEVICE, "", "s"), {}),
        ((DEVICE, "k", None), {}),
        ((DEVICE, None, None), {}),
        ((DEVICE, "k", "s", True, "udp"), {}),
        ((DEVICE, "k", "s"), {"qos": 2}),
        ((DEVICE, "k", "s"), {"rate_guard": "often"}),
        ((DEVICE, "k", "s"), {"keep_alive": 0}),
        ((DEVICE, "k", "s"), {"reconnect_min": 5.0, "reconnect_max": 1.0}),
        ((DEVICE, "k", "s", False), {"cafile": "ca.pem"}),
    ],
)
def test_the_constructor_refuses_what_cannot_be(
    arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"."):
        Device(*arguments, **options)


def test_a_device_shows_neither_key_nor_secret() -> None:
    device = Device(DEVICE, "the-access-key", "the-access-secret")
    shown = repr(device) + str(vars(device)).replace("the-access-key", "", 1)
    assert DEVICE in repr(device)
    assert "the-access" not in shown


def test_it_subscribes_after_every_connack_and_before_the_event() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        assert broker.of(SUBSCRIBE)[0].filters == [(f"losant/{DEVICE}/command", 0)]
        broker.cut()
        turn_until(device, lambda: "reconnect" in events.names)
        kinds = [(packet.type, packet.connection) for packet in broker.packets]
        assert kinds == [(CONNECT, 1), (SUBSCRIBE, 1), (CONNECT, 2), (SUBSCRIBE, 2)]


def test_connect_is_told_once_then_reconnect_and_anew_after_close() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        for count in (1, 2):
            broker.cut()
            turn_until(device, lambda wanted=count: events.names.count("reconnect") == wanted)  # type: ignore[misc] # mypy infers no default
        device.close()
        device.connect(blocking=False)
        turn_until(device, lambda: events.names.count("connect") == 2)
        told = [name for name in events.names if name != "disconnect"]
        assert told == ["connect", "reconnect", "reconnect", "close", "connect"]


def test_connect_while_connecting_or_connected_does_nothing() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        device.connect(blocking=False)
        device.connect()
        assert len(broker.accepted) == 1


def test_close_is_told_once_in_the_calling_thread() -> None:
    threads: list[threading.Thread] = []
    with scripted() as broker, connected(broker) as (device, events):
        device.add_event_observer("close", lambda _: threads.append(threading.current_thread()))
        device.close()
        assert events.names == ["connect", "close"]
        device.close()
        device.loop(0)
        assert events.names == ["connect", "close"]
        assert threads == [threading.current_thread()]
        wait_until(lambda: broker.of(DISCONNECT))
    Device(DEVICE, "AK", "SEC").close()


def test_a_loss_tells_disconnect_with_the_reason_and_not_close() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        device.publish("alerts/1", "x")
        wait_until(lambda: broker.of(PUBLISH))
        broker.cut()
        turn_until(device, lambda: "disconnect" in events.names)
        ((reason,),) = events.of("disconnect")
        assert "closed the connection" in reason
        assert "alerts/1" in reason, "what was sent last may be why"
        assert "close" not in events.names


def test_a_close_while_the_link_is_down_is_a_close() -> None:
    with (
        scripted() as broker,
        connected(broker, reconnect_min=5.0, reconnect_max=5.0) as (
            device,
            events,
        ),
    ):
        broker.cut()
        turn_until(device, lambda: "disconnect" in events.names)
        device.close()
        assert events.names == ["connect", "disconnect", "close"]
        device.loop(0.05)
        assert len(broker.accepted) == 1
        assert device.is_connected() is False


def test_a_refused_first_connect_is_raised_as_it_is_and_leaves_a_clean_object() -> None:
    with scripted() as broker:
        broker.stop()
        device = make(broker)
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                device.connect(blocking=False)
            with pytest.raises(ConnectionRefusedError):
                device.connect()
        assert device.is_connected() is False
        broker.start()
        events = Events().watch(device)
        device.connect(blocking=False)
        turn_until(device, lambda: "connect" in events.names)
        device.close()


def test_the_first_dial_is_tried_again_on_request() -> None:
    with scripted() as broker:
        broker.stop()
        device = make(broker, retry_first=True)
        events = Events().watch(device)
        device.connect(blocking=False)
        device.loop(0.05)
        broker.start()
        turn_until(device, lambda: events.names == ["connect"])
        device.close()


def test_a_silent_port_is_a_timeout() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        device = Device(
            DEVICE,
            "AK",
            "SEC",
            secure=False,
            transport="websockets",
            host="127.0.0.1",
            port=listener.getsockname()[1],
            connect_timeout=0.2,
        )
        with pytest.raises(TimeoutError):
            device.connect()


def test_a_refused_websocket_is_raised() -> None:
    with scripted(websocket=True, reject=404) as broker:
        device = make(broker)
        with pytest.raises(LosantConnectError, match="404"):
            device.connect(blocking=False)


def test_a_broker_that_never_answers_connect_is_tried_again() -> None:
    with scripted() as broker:
        broker.connacks.append(None)
        device = make(broker, connect_timeout=0.1)
        events = Events().watch(device)
        device.connect(blocking=False)
        turn_until(device, lambda: "connect" in events.names)
        assert len(broker.accepted) >= 2  # on a busy machine the second answer may be late, too
        device.close()


@pytest.mark.parametrize("blocking", [False, True], ids=["loop", "blocking"])
@pytest.mark.parametrize("case", VECTORS["connack"], ids=lambda case: f"code {case['rc']}")
def test_each_connack_code_has_its_consequence(case: dict[str, Any], blocking: bool) -> None:
    code = case["rc"]
    with scripted() as broker:
        broker.connacks.append(bytes((0x20, 2, 0, code)))
        device = make(broker)
        events = Events().watch(device)
        if code in {0, 3, 6}:
            if blocking:
                with in_thread(device):
                    wait_until(lambda: "connect" in events.names)
            else:
                device.connect(blocking=False)
                turn_until(device, lambda: "connect" in events.names)
                device.close()
            assert len(broker.of(CONNECT)) == (1 if code == 0 else 2)
            if code == 6:
                assert isinstance(events.of("error")[0][0], LosantProtocolError)
            return

        def run() -> None:
            device.connect(blocking=blocking)
            turn_until(device, lambda: False)

        with pytest.raises(LosantError) as caught:
            run()
        if code == 1:
            assert isinstance(caught.value, LosantConnectError)
            assert caught.value.return_code == 1
        else:
            assert isinstance(caught.value, LosantAuthError)
            assert str(caught.value) == f"Invalid Losant credentials - error code {code}"
        assert events.names == ["error"]
        assert device.is_connected() is False
        device.loop(0.1)
        assert len(broker.accepted) == 1, "trying again does not help"
        device.connect(blocking=False)
        turn_until(device, lambda: "connect" in events.names)
        device.close()


# --- the loop ----------------------------------------------------------------------------


def test_loop_of_a_device_that_never_connected_returns_at_once() -> None:
    watch = Stopwatch()
    Device(DEVICE, "AK", "SEC").loop(5)
    assert watch.seconds < 0.5


def test_loop_in_blocking_mode_raises_the_text_of_old() -> None:
    with scripted() as broker:
        device = make(broker)
        events = Events().watch(device)
        with in_thread(device):
            wait_until(lambda: "connect" in events.names)
            with pytest.raises(LosantError) as caught:
                device.loop()
            assert str(caught.value) == "Connection in blocking mode, don't call loop"
        device.loop(0)  # closed: allowed again


def test_loop_waits_no_longer_than_asked() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        began, watch = time.monotonic(), Stopwatch()
        device.loop(0.1)
        assert watch.seconds < 1
        assert time.monotonic() - began > 0.08


def test_loop_waits_no_longer_than_asked_while_it_dials(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted() as broker, connected(broker) as (device, events):
        silent = socket.create_server(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        away = Device(DEVICE, "AK", "SEC", False, "websockets", host="127.0.0.1", port=port)
        monkeypatch.setattr(device, "_endpoint", away._target())
        broker.cut()
        turn_until(device, lambda: "disconnect" in events.names)
        with silent:
            silent.settimeout(5)
            deadline = time.monotonic() + 0.3
            while time.monotonic() < deadline:
                watch = Stopwatch()
                device.loop(0.02)
                assert watch.seconds < 1
            peer, _ = silent.accept()  # it had dialled, and waits for the answer still
            with peer:
                peer.settimeout(5)
                assert peer.recv(100).startswith(b"GET /mqtt")
                device.close()


@pytest.mark.slow
def test_a_broker_away_for_three_seconds_costs_three_dials_and_no_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dials: list[float] = []

    def counted(*args: Any) -> Any:
        dials.append(time.monotonic())
        return dial_steps(*args)

    monkeypatch.setattr("pubsub_losant.client.device.dial_steps", counted)
    with scripted() as broker:
        with connected(broker, reconnect_min=1.0, reconnect_max=30.0) as (device, events):
            broker.stop()
            dials.clear()
            cpu, began = time.thread_time(), time.monotonic()
            while time.monotonic() - began < 3:
                device.loop(0.1)
            assert len(dials) <= 3
            assert time.thread_time() - cpu < 0.15
            broker.start()
            turn_until(device, lambda: "reconnect" in events.names, within=6)


def test_the_system_ends_a_link_whose_peer_takes_nothing_for_two_keep_alives() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        with socket.socket(fileno=os.dup(device._connection.socket.fileno())) as same:
            milliseconds = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert milliseconds == 30_000


def test_short_sessions_are_tried_again_for_ever() -> None:
    """The platform closes them over a forbidden topic, too: nobody need have taken the id."""
    with scripted() as broker, connected(broker) as (device, events):
        for _ in range(6):
            events.seen.clear()
            broker.cut()
            turn_until(device, lambda: "reconnect" in events.names)
            assert events.names == ["disconnect", "reconnect"]


def _resolve_to(patch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    patch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_each_address_of_a_name_has_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        scripted(websocket=True) as broker,
        socket.socket() as silent,
        contextlib.ExitStack() as full,
    ):
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(4):  # more than it keeps: the next get no answer at all
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        _resolve_to(monkeypatch, silent.getsockname(), ("127.0.0.1", broker.port))
        device = make(broker, connect_timeout=1.0)
        device.connect(blocking=False)
        turn_until(device, device.is_connected)
        device.close()


def test_of_several_addresses_the_first_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted() as broker, socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))  # nobody listens there
        unusable = ("255.255.255.255", 1)  # TCP has no broadcast
        _resolve_to(monkeypatch, refusing.getsockname(), unusable)
        with pytest.raises(ConnectionRefusedError):
            make(broker).connect()
        _resolve_to(monkeypatch, unusable, refusing.getsockname())
        with pytest.raises(OSError) as caught:
            make(broker).connect()
        assert not isinstance(caught.value, ConnectionRefusedError)


@pytest.mark.slow
def test_a_dead_peer_is_noticed_within_two_keep_alives() -> None:
    began = time.monotonic()
    with scripted() as broker, connected(broker, keep_alive=1) as (device, events):
        broker.pingresp = False
        watch = Stopwatch()
        turn_until(device, lambda: "disconnect" in events.names)
        assert watch.seconds < 4
        assert time.monotonic() - began > 1.5
        assert len(broker.of(PINGREQ)) == 1
        ((reason,),) = events.of("disconnect")
        assert "did not answer" in reason
        broker.pingresp = True
        turn_until(device, lambda: "reconnect" in events.names)


@pytest.mark.slow
def test_it_pings_after_a_keep_alive_of_silence_and_not_while_it_sends() -> None:
    with scripted() as broker, connected(broker, keep_alive=1) as (device, _):
        began = time.monotonic()
        while time.monotonic() - began < 2.2:
            device.send_state({"a": 1})
            device.loop(0.1)
        assert not broker.of(PINGREQ)
        last = broker.of(PUBLISH)[-1].at
        turn_until(device, lambda: broker.of(PINGREQ))
        assert 0.8 < broker.of(PINGREQ)[0].at - last < 2


def test_the_keep_alive_is_fifteen_seconds_by_default() -> None:
    with scripted() as broker, connected(broker):
        assert int.from_bytes(broker.of(CONNECT)[0].body[8:10], "big") == 15


def test_close_of_another_thread_ends_a_blocking_connect_at_once() -> None:
    with scripted() as broker:
        device = make(broker)
        events = Events().watch(device)
        with in_thread(device) as thread:
            wait_until(lambda: "connect" in events.names)
            watch = Stopwatch()
            device.close()
            thread.join(2)
            assert not thread.is_alive()
            assert watch.seconds < 1
            assert thread.failures == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("phase", ["dial", "connack", "delay"])
def test_close_of_another_thread_ends_a_blocking_connect_in_any_phase(phase: str) -> None:
    with scripted(connack=None if phase == "connack" else b"\x20\x02\x00\x03") as broker:
        listener = socket.create_server(("127.0.0.1", 0))
        options: dict[str, Any] = {"reconnect_min": 30.0, "reconnect_max": 30.0}
        if phase == "dial":  # a WebSocket that gets no answer
            options |= {"transport": "websockets", "port": listener.getsockname()[1]}
            device = Device(DEVICE, "AK", "SEC", False, host="127.0.0.1", **options)
        else:
            device = make(broker, **options)
        with listener, in_thread(device) as thread:
            if phase == "dial":
                peer, _ = listener.accept()
            else:
                wait_until(lambda: broker.of(CONNECT))
                peer = None
            watch = Stopwatch()
            device.close()
            thread.join(2)
            assert not thread.is_alive()
            assert watch.seconds < 1
            if peer is not None:
                peer.close()


@pytest.mark.parametrize("phase", ["dial", "connack", "session", "delay"])
def test_a_close_just_before_the_loop_waits_is_not_missed(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the decision for how long to wait and the wait itself nobody polls yet."""
    with (
        scripted(connack=None if phase == "connack" else b"\x20\x02\x00\x00") as broker,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        options: dict[str, Any] = {"reconnect_min": 30.0, "reconnect_max": 30.0}
        if phase == "dial":
            options |= {"transport": "websockets", "port": silent.getsockname()[1]}
        device = make(broker, connect_timeout=30.0, **options)
        poll: Callable[..., list[int]] = device._poll
        closer = threading.Thread(target=device.close)

        def late(*args: Any) -> list[int]:
            reached = {
                "dial": list(args[0].values()) == [select.POLLIN],
                "connack": device._connection.connecting,
                "session": device.is_connected(),
                "delay": device._retry_at is not None,
            }
            if phase == "delay" and device.is_connected():
                broker.cut()
            elif reached[phase] and closer.ident is None:
                closer.start()
                closer.join(5)
            return poll(*args)

        monkeypatch.setattr(device, "_poll", late)
        with in_thread(device) as thread:
            thread.join(10)
            assert not thread.is_alive()
            assert thread.failures == []  # type: ignore[attr-defined]


def test_what_does_not_fit_the_socket_just_before_the_loop_waits_wakes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with scripted() as broker, connected(broker, keep_alive=30) as (device, _):
        poll: Callable[..., list[int]] = device._poll
        broker.reads = False

        def fill() -> None:
            while device.send_state({"text": "x" * 200_000}):
                pass

        def late(*args: Any) -> list[int]:
            if not device.stats["dropped"]:
                sender = threading.Thread(target=fill)
                sender.start()
                sender.join(5)
            return poll(*args)

        monkeypatch.setattr(device, "_poll", late)
        watch = Stopwatch()
        device.loop(10)
        assert watch.seconds < 8, "it waited for something else than room"
        assert device._connection.wants_write


@pytest.mark.parametrize("blocking", [False, True], ids=["loop", "blocking"])
def test_close_in_an_observer_happens_after_it_returned(blocking: bool) -> None:
    with scripted() as broker:
        device = make(broker)
        order: list[str] = []
        threads: set[int] = set()

        def on_command(each: Device, _: Any) -> None:
            each.close()
            order.append("observer")
            assert each.is_connected() is False
            assert each.send_state({"a": 1}) is False
            threads.add(threading.get_ident())

        def on_close(_: Device) -> None:
            order.append("close")
            threads.add(threading.get_ident())

        device.add_event_observer("command", on_command)
        device.add_event_observer("close", on_close)
        events = Events().watch(device, "connect")
        if blocking:
            with in_thread(device) as thread:
                wait_until(lambda: events.names)
                broker.send(command('{"name":"stop"}') * 2)
                thread.join(5)
                assert not thread.is_alive()
        else:
            device.connect(blocking=False)
            turn_until(device, lambda: events.names)
            broker.send(command('{"name":"stop"}') * 2)
            turn_until(device, lambda: "close" in order)
        assert order == ["observer", "close"]
        assert len(threads) == 1
        wait_until(lambda: broker.of(DISCONNECT))


def test_a_device_can_be_connected_again_by_its_close_observer() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        again: list[int] = []

        def on_close(each: Device) -> None:
            if not again:
                again.append(1)
                each.connect(blocking=False)

        device.add_event_observer("close", on_close)
        device.close()
        turn_until(device, lambda: events.names.count("connect") == 2)


def test_a_device_whose_observer_was_interrupted_can_be_closed() -> None:
    with scripted() as broker, connected(broker) as (device, events):

        def interrupted(each: Device, _: Any) -> None:
            each.close()
            raise KeyboardInterrupt

        device.add_event_observer("command", interrupted)
        broker.send(command('{"name":"stop"}'))
        with pytest.raises(KeyboardInterrupt):
            turn_until(device, lambda: False)
        device.close()
        assert events.names[-1] == "close"
        wait_until(lambda: broker.of(DISCONNECT))


def test_a_dial_that_was_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts = [True]

    def interrupted(*args: Any) -> Any:
        if interrupts.pop():
            monkeypatch.setattr("pubsub_losant.client.device.dial_steps", dial_steps)
            raise KeyboardInterrupt
        yield

    with scripted() as broker, connected(broker) as (device, events):
        monkeypatch.setattr("pubsub_losant.client.device.dial_steps", interrupted)
        broker.cut()
        with pytest.raises(KeyboardInterrupt):
            turn_until(device, lambda: False)
        turn_until(device, lambda: "reconnect" in events.names)


def test_two_threads_that_loop_do_not_meet() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        seen: list[threading.Thread] = []
        both: list[bool] = []
        inside: list[int] = []

        def observe(*_: Any) -> None:
            inside.append(1)
            both.append(len(inside) > 1)
            seen.append(threading.current_thread())
            time.sleep(0.001)
            inside.pop()

        device.add_event_observer("command", observe)
        done = threading.Event()

        def turn() -> None:
            while not done.is_set():
                device.loop(0.01)

        threads = [threading.Thread(target=turn) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(50):
            broker.send(command(f'{{"name":"{number}"}}'))
        wait_until(lambda: len(seen) == 50)
        done.set()
        for thread in threads:
            thread.join(5)
        assert not any(both)


def test_a_device_creates_no_thread() -> None:
    with scripted() as broker:
        before = set(threading.enumerate())
        with connected(broker) as (device, events):
            device.send_state({"a": 1})
            broker.cut()
            turn_until(device, lambda: "reconnect" in events.names)
            ours = {each for each in threading.enumerate() if each not in before}
            assert all("_serve" in each.name for each in ours), ours


# --- observers ---------------------------------------------------------------------------


@by_id("command")
def test_every_command_is_told_or_dropped_and_the_connection_goes_on(
    case: dict[str, Any], command_device: tuple[ScriptedBroker, Device, Events]
) -> None:
    broker, device, events = command_device
    events.seen.clear()
    bad = device.stats["bad_commands"]
    broker.send(publish(case["topic"], payload_of(case)) + command('{"name":"after"}'))
    turn_until(device, lambda: ("command", {"name": "after"}) in events.seen)
    if case["ours"]["event"]:
        wanted = python_value(case["ours"]["command"])
        assert events.seen == [("command", wanted), ("command", {"name": "after"})]
    else:
        assert events.seen == [("command", {"name": "after"})]
        assert device.stats["bad_commands"] == bad + (1 if payload_of(case) else 0)
    assert device.is_connected()
    assert device.send_state({"a": 1})


@pytest.fixture(scope="module")
def command_device() -> Any:
    with scripted() as broker, connected(broker) as (device, events):
        yield broker, device, events


def test_a_bad_command_is_logged_without_its_content(caplog: pytest.LogCaptureFixture) -> None:
    with scripted() as broker, connected(broker) as (device, _):
        with caplog.at_level(logging.WARNING, "pubsub_losant"):
            broker.send(command("my-password"))
            turn_until(device, lambda: device.stats["bad_commands"])
        assert f"losant/{DEVICE}/command of 11 bytes" in caplog.text
        assert "my-password" not in caplog.text


def test_a_command_at_qos_1_is_acknowledged() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        at_0 = command('{"name":"x"}')
        topic_end = 2 + 2 + at_0[3]
        body = at_0[2:topic_end] + b"\x00\x07" + at_0[topic_end:]
        broker.send(b"\x32" + bytes([len(body)]) + body)
        turn_until(device, lambda: events.of("command"))
        wait_until(lambda: broker.of(PUBACK))
        assert broker.of(PUBACK)[0].packet_id == b"\x00\x07"


def test_an_observer_that_raises_stops_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    with scripted() as broker, connected(broker) as (device, events):
        calls: list[str] = []

        def broken(_: Device, found: dict[str, Any]) -> None:
            calls.append(found["name"])
            raise RuntimeError("boom")

        device.add_event_observer("command", broken)
        later = Events().watch(device, "command")
        broker.send(command('{"name":"1"}') + command('{"name":"2"}'))
        turn_until(device, lambda: len(later.seen) == 2)
        turn_until(device, lambda: len(events.of("error")) == 2)
        assert calls == ["1", "2"], "no message is told twice"
        assert str(events.of("error")[0][0]) == "boom"
        assert "boom" in caplog.text


def test_what_an_observer_raised_is_raised_on_request_when_all_were_told() -> None:
    with scripted() as broker, connected(broker, raise_observer_errors=True) as (device, _):

        def broken(*_: Any) -> None:
            raise RuntimeError("boom")

        device.add_event_observer("command", broken)
        later = Events().watch(device, "command")
        broker.send(command('{"name":"1"}') + command('{"name":"2"}'))
        for count in (1, 2):
            with pytest.raises(RuntimeError, match="boom"):
                turn_until(device, lambda: False)
            assert len(later.seen) == count


def test_a_blocking_connect_that_an_observer_ended_can_go_on() -> None:
    with scripted() as broker:
        device = make(broker, raise_observer_errors=True)
        failing = [True]

        def observe(each: Device) -> None:
            if failing.pop():
                raise RuntimeError("boom")

        device.add_event_observer("connect", observe)
        with pytest.raises(RuntimeError, match="boom"):
            device.connect()
        device.add_event_observer("command", lambda each, _: each.close())
        broker.send(command('{"name":"stop"}'))
        device.connect()
        assert len(broker.accepted) == 1


def test_an_observer_that_removes_itself_hides_nobody() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        calls: list[str] = []

        def once(each: Device, _: Any) -> None:
            calls.append("once")
            each.remove_event_observer("command", once)

        device.add_event_observer("command", once)
        device.add_event_observer("command", lambda *_: calls.append("second"))
        broker.send(command('{"name":"1"}') + command('{"name":"2"}'))
        turn_until(device, lambda: calls.count("second") == 2)
        assert calls == ["once", "second", "second"]


def test_observers_are_kept_in_order_and_as_often_as_they_were_added() -> None:
    device = Device(DEVICE, "AK", "SEC")

    def observer(*_: Any) -> None:
        raise AssertionError

    for _ in range(2):
        device.add_event_observer("command", observer)
    for _ in range(2):
        device.remove_event_observer("command", observer)
    with pytest.raises(ValueError, match="not in list"):
        device.remove_event_observer("command", observer)
    device.remove_event_observer("nothing", observer)
    device.add_event_observer("nothing", observer)
    with pytest.raises(ValueError, match="no event"):
        Device(DEVICE, "AK", "SEC", strict=True).add_event_observer("nothing", observer)


def test_connect_waits_for_the_answer_to_subscribe_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pubsub_losant.client.device_base._SUBACK_PATIENCE", 0.3)
    with scripted(suback=False) as broker:
        device = make(broker)
        events = Events().watch(device)
        device.connect(blocking=False)
        turn_until(device, device.is_connected)
        began = time.monotonic()
        assert not events.names
        turn_until(device, lambda: events.names == ["connect"])
        assert time.monotonic() - began > 0.2
        assert "no answer to SUBSCRIBE" in caplog.text
        device.close()


def test_a_refused_subscription_is_an_error_event() -> None:
    with scripted(suback_code=0x80) as broker, connected(broker) as (_, events):
        assert events.names == ["error", "connect"]
        assert f"losant/{DEVICE}/command" in str(events.of("error")[0][0])


# --- sending -----------------------------------------------------------------------------


@by_id("time_like")
def test_every_time_like_goes_over_the_wire_as_the_vectors_say(
    case: dict[str, Any],
    command_device: tuple[ScriptedBroker, Device, Events],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker, device, _ = command_device
    broker.packets.clear()
    monkeypatch.setattr("pubsub_losant.client.device_base.now_ms", lambda: NOW)
    with local_zone(case["tz_env"], monkeypatch):
        given = python_time(case["input"])
        if "error" in case["ours"]:
            with pytest.raises(ERRORS[case["ours"]["error"]]):
                device.send_state({"a": 1}, given)
            return
        assert device.send_state({"a": 1}, given) is True
    wait_until(lambda: broker.of(PUBLISH))
    assert broker.of(PUBLISH)[0].payload.decode() == case["ours"]["payload"]


@by_id("state")
def test_every_state_goes_over_the_wire_as_the_vectors_say(
    case: dict[str, Any], command_device: tuple[ScriptedBroker, Device, Events]
) -> None:
    broker, device, _ = command_device
    broker.packets.clear()
    state = python_value(case["state"])
    if "error" in case["ours"]:
        with pytest.raises(ERRORS[case["ours"]["error"]]):
            device.send_state(state, case["time_like"])
        return
    assert device.send_state(state, case["time_like"]) is True
    wait_until(lambda: broker.of(PUBLISH))
    (sent,) = broker.of(PUBLISH)
    assert sent.raw[0] == 0x30, "QoS 0, no RETAIN"
    assert sent.topic == case["topic"]
    assert sent.payload.decode() == case["ours"]["payload"]


def test_send_state_tells_the_truth_in_each_phase() -> None:
    with scripted(connack=None) as broker:
        device = make(broker, reconnect_min=5.0, reconnect_max=5.0)
        assert device.send_state({"a": 1}) is False
        device.connect(blocking=False)
        wait_until(lambda: broker.of(CONNECT))
        assert device.send_state({"a": 1}) is False
        assert device.is_connected() is False
        broker.send(b"\x20\x02\x00\x00")
        turn_until(device, device.is_connected)
        assert device.send_state({"a": 1}) is True
        broker.cut()
        turn_until(device, lambda: not device.is_connected())
        assert device.send_state({"a": 1}) is False
        device.close()
        assert device.send_state({"a": 1}) is False


def test_nothing_is_published_before_connack() -> None:
    with scripted(connack=None) as broker:
        device = make(broker)
        events = Events().watch(device)
        device.connect(blocking=False)
        device.send_state({"a": 1})
        turn_until(device, lambda: broker.packets)
        device.loop(0.05)
        assert [packet.type for packet in broker.packets] == [CONNECT]
        broker.send(b"\x20\x02\x00\x00")
        turn_until(device, lambda: events.names)
        assert not broker.of(PUBLISH)
        device.close()


def test_states_of_eight_threads_are_whole_packets() -> None:
    with scripted() as broker:
        device = make(broker)
        events = Events().watch(device)
        with in_thread(device):
            wait_until(lambda: "connect" in events.names)
            results: list[bool] = []

            def send(number: int) -> None:
                results.extend(device.send_state({"n": number, "i": i}) for i in range(100))

            threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert results == [True] * 800
            wait_until(lambda: len(broker.of(PUBLISH)) == 800, within=10)
        found = [json.loads(packet.payload)["data"] for packet in broker.of(PUBLISH)]
        for number in range(8):
            mine = [each["i"] for each in found if each["n"] == number]
            assert mine == list(range(100))


def test_a_payload_over_256_kib_is_refused_here() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        room = 262_144 - len('{"data": {"a": ""}, "time": 1}')
        assert device.send_state({"a": "x" * room}, 1) is True
        with pytest.raises(ValueError, match="262145"):
            device.send_state({"a": "x" * (room + 1)}, 1)
        with pytest.raises(ValueError, match="262145"):
            device.publish("a", b"x" * 262_145)
        turn_until(device, lambda: broker.of(PUBLISH))
        assert len(broker.of(PUBLISH)[0].payload) == 262_144


def test_several_states_are_one_message() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        assert device.send_states([({"a": 1}, 5), ({"a": 2}, 6)]) is True
        wait_until(lambda: broker.of(PUBLISH))
        assert broker.of(PUBLISH)[0].payload == (
            b'[{"data": {"a": 1}, "time": 5}, {"data": {"a": 2}, "time": 6}]'
        )
        with pytest.raises(ValueError, match="no state"):
            device.send_states([])


def test_hello_goes_to_the_agents_topic() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        assert device.send_hello("b1", compiler_options={"gzip": True}) is True
        wait_until(lambda: broker.of(PUBLISH))
        assert broker.of(PUBLISH)[0].topic == f"losant/{DEVICE}/fromAgent/hello"
        assert json.loads(broker.of(PUBLISH)[0].payload)["bundle"] == "b1"


def test_a_stalled_broker_does_not_take_states_without_bound() -> None:
    with scripted() as broker, connected(broker) as (device, _):
        broker.reads = False
        state = {"a": "x" * 200_000}
        accepted = 0
        while device.send_state(state) and accepted < 200:
            accepted += 1
        assert accepted < 200, "the truth is that nobody takes them"
        assert device.stats["dropped"] == 1


# --- custom topics -----------------------------------------------------------------------


def test_custom_topics_are_subscribed_again_after_a_reconnect() -> None:
    with scripted() as broker, connected(broker) as (device, events):
        told = Events().watch(device, "message")
        device.subscribe("alerts/#")
        device.subscribe("alerts/#")
        turn_until(device, lambda: len(broker.of(SUBSCRIBE)) == 2)
        broker.send(publish("alerts/1", b"\xff"))
        turn_until(device, lambda: told.seen)
        assert told.seen == [("message", "alerts/1", b"\xff")]
        broker.cut()
        turn_until(device, lambda: "reconnect" in events.names)
        again = [packet.filters for packet in broker.of(SUBSCRIBE) if packet.connection == 2]
        assert again == [[(f"losant/{DEVICE}/command", 0)], [("alerts/#", 0)]]
        device.unsubscribe("alerts/#")
        turn_until(device, lambda: broker.of(UNSUBSCRIBE))
        assert device.publish("alerts/2", "é") is True
        wait_until(lambda: broker.of(PUBLISH))
        assert broker.of(PUBLISH)[0].payload == "é".encode()


@pytest.mark.parametrize("topic", [f"losant/{DEVICE}/state", "losantx", "$SYS/a", "a/#", ""])
def test_topics_that_the_platform_punishes_are_refused_here(topic: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Device(DEVICE, "AK", "SEC").publish(topic, b"x")


def test_states_of_other_devices_can_be_subscribed_to_and_other_losant_topics_not() -> None:
    device = Device(DEVICE, "AK", "SEC")
    device.subscribe("losant/other/state")
    for topic in ("losant/#", "losant/x/fromAgent/hello", "losant"):
        with pytest.raises(ValueError, match="no topic"):
            device.subscribe(topic)


@pytest.mark.slow
def test_it_works_without_setuptools() -> None:
    program = (
        "import sys; sys.modules['setuptools'] = sys.modules['pkg_resources'] = None\n"
        "from pubsub_losant import Device, AsyncDevice\n"
        "device = Device('my-device-id', 'k', 's', secure=False, host='127.0.0.1', port=1)\n"
        "try: device.connect()\n"
        "except ConnectionRefusedError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_a_burst_of_another_thread_takes_few_calls_to_the_system_and_keeps_its_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    flush = Connection.flush

    def counted(self: Connection) -> bool:
        nonlocal calls
        calls += 1
        return flush(self)

    with scripted() as broker:
        device = make(broker)
        events = Events().watch(device, "connect")
        with in_thread(device):
            wait_until(lambda: events.names)
            monkeypatch.setattr(Connection, "flush", counted)
            for number in range(2000):
                assert device.send_state({"n": number}, 1)
            wait_until(lambda: len(broker.of(PUBLISH)) == 2000)
            device.close()
    sent = [json.loads(packet.payload)["data"]["n"] for packet in broker.of(PUBLISH)]
    assert sent == list(range(2000))
    assert calls < 2000


def test_a_burst_does_not_wait_for_an_observer() -> None:
    busy, done = threading.Event(), threading.Event()

    def on_command(*_: object) -> None:
        busy.set()
        done.wait(10)

    with scripted() as broker:
        device = make(broker)
        device.add_event_observer("command", on_command)
        events = Events().watch(device, "connect")
        with in_thread(device):
            wait_until(lambda: events.names)
            broker.send(command('{"name":"think"}'))
            assert busy.wait(5)
            for number in range(100):
                assert device.send_state({"n": number}, 1)
            wait_until(lambda: len(broker.of(PUBLISH)) == 100)
            assert not done.is_set()
            done.set()
            device.close()
