"""`AsyncDevice` and `AsyncGateway` against a broker that answers only as told."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_core.errors import WrongLoop
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_losant import (
    AsyncDevice,
    AsyncGateway,
    LosantAuthError,
    LosantConnectError,
    LosantError,
)
from tests.losant.support import (
    CONNECT,
    DISCONNECT,
    PUBLISH,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Events,
    ScriptedBroker,
    command,
    limits_within,
    make,
    publish,
    scripted,
)
from tests.losant.vectors import DEVICE, VECTORS, by_id, payload_of, python_value
from tests.servers import eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

WIRE = VECTORS["wire"]
ONE = "c1c1c1c1c1c1c1c1c1c1c1c1"


@pytest.fixture(autouse=True)
async def in_time() -> AsyncIterator[None]:
    """Nothing here takes long: whatever waits for ever is a failure."""
    task = asyncio.current_task()
    assert task is not None
    handle = asyncio.get_running_loop().call_later(20, task.cancel)
    yield
    handle.cancel()


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    with scripted() as found:
        yield found


@asynccontextmanager
async def opened(
    broker: ScriptedBroker, kind: type[Any] = AsyncDevice, **options: Any
) -> AsyncIterator[tuple[Any, Events]]:
    device = make(broker, kind, **options)
    events = Events().watch(device)
    async with asyncio.timeout(15), device:
        yield device, events


async def next_of(iterator: AsyncIterator[Any]) -> Any:
    async with asyncio.timeout(5):
        return await anext(iterator)


@pytest.mark.parametrize("websocket", [False, True], ids=["tcp", "websockets"])
async def test_the_packets_are_byte_for_byte_those_of_the_vectors(websocket: bool) -> None:
    with scripted(websocket=websocket) as broker:
        async with opened(broker) as (device, _):
            assert await device.send_state({"t": 1}, 1234) is True
            await eventually(lambda: broker.of(PUBLISH))
        await eventually(lambda: broker.of(DISCONNECT))
        assert [packet.raw.hex() for packet in broker.packets] == [
            WIRE["connect_hex"],
            WIRE["subscribe_command_mid1_hex"],
            WIRE["publish_state_hex"],
            WIRE["disconnect_hex"],
        ]


async def test_events_come_as_those_of_a_device(broker: ScriptedBroker) -> None:
    async with opened(broker) as (device, events):
        assert events.names == ["connect"]
        broker.cut()
        await eventually(lambda: "reconnect" in events.names)
        assert device.is_connected() is True
    assert events.names == ["connect", "disconnect", "reconnect", "close"]
    assert device.is_connected() is False
    await device.close()
    async with asyncio.timeout(5):
        await device.connect()
        await device.connect()
        await device.close()
    assert events.names[4:] == ["connect", "close"]


@by_id("command")
async def test_every_command_is_iterated_or_dropped(
    case: dict[str, Any], broker: ScriptedBroker
) -> None:
    async with opened(broker) as (device, _):
        broker.send(publish(case["topic"], payload_of(case)) + command('{"name":"after"}'))
        found = await next_of(device.commands())
        if case["ours"]["event"]:
            assert found == python_value(case["ours"]["command"])
            found = await next_of(device.commands())
        assert found == {"name": "after"}
        assert device.is_connected()


async def test_a_cancelled_wait_loses_no_command(broker: ScriptedBroker) -> None:
    async with opened(broker) as (device, _):
        commands = device.commands()
        for number in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005):
                    await anext(commands)
            broker.send(command(f'{{"name":"{number}"}}'))
            assert await next_of(commands) == {"name": str(number)}


async def test_the_iteration_ends_with_close_and_begins_anew(broker: ScriptedBroker) -> None:
    async with opened(broker) as (device, events):
        broker.send(command('{"name":"1"}'))
        await eventually(lambda: events.of("command"))
        waiting = asyncio.create_task(anext(device.commands()))
        assert await waiting == {"name": "1"}
        ended = asyncio.create_task(_all(device.commands()))
        await asyncio.sleep(0)
    assert await ended == []
    async with asyncio.timeout(10), device:
        broker.send(command('{"name":"2"}'))
        assert await next_of(device.commands()) == {"name": "2"}


async def _all(iterator: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in iterator]


async def test_commands_that_nobody_takes_do_not_pile_up(broker: ScriptedBroker) -> None:
    async with opened(broker) as (device, _):
        broker.send(b"".join(command(f'{{"name":"{n}"}}') for n in range(1100)))
        await eventually(lambda: device.stats["commands"] == 1100)
        await eventually(lambda: device.stats["unread_dropped"] == 100)
        assert await next_of(device.commands()) == {"name": "100"}


async def test_refused_credentials_are_raised_and_not_tried_again(broker: ScriptedBroker) -> None:
    broker.connack = b"\x20\x02\x00\x05"
    device = make(broker, AsyncDevice)
    with pytest.raises(LosantAuthError, match=r"^Invalid Losant credentials - error code 5$"):
        await device.connect()
    assert len(broker.accepted) == 1
    assert device.is_connected() is False


async def test_credentials_refused_later_end_the_iteration_with_the_error(
    broker: ScriptedBroker,
) -> None:
    async with opened(broker) as (device, events):
        waiting = asyncio.create_task(anext(device.commands()))
        broker.connack = b"\x20\x02\x00\x04"
        broker.cut()
        with pytest.raises(LosantAuthError):
            await waiting
        await eventually(lambda: "error" in events.names)
        assert await device.send_state({"a": 1}) is False
    assert "close" not in events.names, "it did not close: it was given up"


async def test_a_busy_broker_is_tried_again(broker: ScriptedBroker) -> None:
    broker.connacks.extend([b"\x20\x02\x00\x03", b"\x20\x02\x00\x03"])
    async with opened(broker):
        assert len(broker.of(CONNECT)) == 3


async def test_a_refused_first_dial_is_raised_as_it_is(broker: ScriptedBroker) -> None:
    broker.stop()
    device = make(broker, AsyncDevice)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            await device.connect()
    broker.start()
    async with asyncio.timeout(5), device:
        assert device.is_connected()


async def test_the_first_dial_is_tried_again_on_request(broker: ScriptedBroker) -> None:
    broker.stop()
    device = make(broker, AsyncDevice, retry_first=True)
    connecting = asyncio.create_task(device.connect())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await asyncio.shield(connecting)
    broker.start()
    await connecting
    await device.close()


async def test_a_silent_broker_is_tried_again(broker: ScriptedBroker) -> None:
    broker.connacks.append(None)
    async with opened(broker, connect_timeout=0.1):
        # A busy machine may answer the second too late as well.
        assert len(broker.of(CONNECT)) >= 2


async def test_a_cancelled_connect_leaves_nothing_open(broker: ScriptedBroker) -> None:
    broker.connack = None
    device = make(broker, AsyncDevice)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await device.connect()
    broker.connack = b"\x20\x02\x00\x00"
    async with asyncio.timeout(5), device:
        assert device.is_connected()


async def test_close_ends_a_connect_of_another_task(broker: ScriptedBroker) -> None:
    broker.connack = None
    device = make(broker, AsyncDevice)
    connecting = asyncio.create_task(device.connect())
    await eventually(lambda: broker.of(CONNECT))
    await device.close()
    with pytest.raises(LosantConnectError, match="closed"):
        await connecting


async def test_send_state_tells_the_truth(broker: ScriptedBroker) -> None:
    device = make(broker, AsyncDevice, reconnect_min=5.0, reconnect_max=5.0)
    assert await device.send_state({"a": 1}) is False
    async with asyncio.timeout(10), device:
        assert await device.send_state({"a": 1}) is True
        with pytest.raises(TypeError):
            await device.send_state(None)
        with pytest.raises(ValueError, match="262"):
            await device.send_state({"a": "x" * 262_144})
        broker.cut()
        await eventually(lambda: not device.is_connected())
        assert await device.send_state({"a": 1}) is False
    assert await device.send_state({"a": 1}) is False


async def test_at_qos_1_a_state_is_sent_when_it_is_acknowledged(broker: ScriptedBroker) -> None:
    broker.puback = False
    async with opened(broker, qos=1) as (device, events):
        sending = asyncio.create_task(device.send_state({"a": 1}))
        await eventually(lambda: broker.of(PUBLISH))
        assert not sending.done()
        broker.puback = True
        broker.cut()
        await eventually(lambda: "reconnect" in events.names)
        assert await sending is True


async def test_at_qos_1_a_state_that_close_overtook_was_not_sent(broker: ScriptedBroker) -> None:
    broker.puback = False
    async with opened(broker, qos=1) as (device, _):
        sending = asyncio.create_task(device.send_state({"a": 1}))
        await eventually(lambda: broker.of(PUBLISH))
        await device.close(drain=0.05)
        assert await sending is False


async def test_at_qos_1_a_state_that_a_refusal_overtook_was_not_sent(
    broker: ScriptedBroker,
) -> None:
    broker.puback = False
    async with opened(broker, qos=1) as (device, events):
        sending = asyncio.create_task(device.send_state({"a": 1}))
        await eventually(lambda: broker.of(PUBLISH))
        broker.connack = b"\x20\x02\x00\x05"
        broker.cut()
        async with asyncio.timeout(5):
            assert await sending is False
        assert isinstance(events.of("error")[0][0], LosantAuthError)


async def test_states_are_kept_while_offline(broker: ScriptedBroker) -> None:
    async with opened(broker, buffer_offline=150) as (device, events):
        broker.connack = b"\x20\x02\x00\x03"
        broker.cut()
        await eventually(lambda: "disconnect" in events.names)
        for n in range(200):
            assert await device.send_state({"n": n}) is True
        broker.connack = b"\x20\x02\x00\x00"
        await eventually(lambda: len(broker.of(PUBLISH)) == 2)
        found = [each for packet in broker.of(PUBLISH) for each in json.loads(packet.payload)]
        assert [each["data"]["n"] for each in found] == list(range(50, 200))


async def test_the_guard_drops_or_waits(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(broker, rate_guard="drop") as (device, _):
        assert [await device.send_state({"n": n}) for n in range(31)] == [True] * 30 + [False]
    limits_within(monkeypatch, 0.3)
    async with opened(broker, rate_guard="wait") as (device, _):
        began = time.monotonic()
        assert all([await device.send_state({"n": n}) for n in range(31)])
        assert time.monotonic() - began > 0.2


async def test_close_ends_what_waits_for_the_guard(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_within(monkeypatch, 2.0)
    async with opened(broker, rate_guard="wait", buffer_offline=5) as (device, events):
        waits = asyncio.Event()
        device.add_event_observer("throttled", lambda device, seconds: waits.set())
        for n in range(30):
            assert await device.send_state({"n": n}) is True
        sending = asyncio.create_task(device.send_state({"n": 30}))
        await waits.wait()
        await device.close()
        assert await sending is False
        await device.connect()
        assert await device.send_state({"n": 31}) is True
        await eventually(lambda: broker.packets[-1].type == PUBLISH)
        found = [json.loads(packet.payload) for packet in broker.of(PUBLISH)]
        assert 30 not in [each["data"]["n"] for each in found]
    assert "error" not in events.names


async def test_custom_topics_hello_and_batches(broker: ScriptedBroker) -> None:
    async with opened(broker) as (device, events):
        await device.subscribe("alerts/#")
        broker.send(publish("alerts/1", b"\xff"))
        assert await next_of(device.messages()) == ("alerts/1", b"\xff")
        broker.cut()
        await eventually(lambda: "reconnect" in events.names)
        assert broker.of(SUBSCRIBE)[-1].filters == [("alerts/#", 0)]
        await device.unsubscribe("alerts/#")
        await eventually(lambda: broker.of(UNSUBSCRIBE))
        assert await device.publish("alerts/2", "x", qos=1) is True
        assert await device.send_hello() is True
        assert await device.send_states([({"a": 1}, 5), ({"a": 2}, 6)]) is True
        await eventually(lambda: len(broker.of(PUBLISH)) == 3)
        assert [packet.topic for packet in broker.of(PUBLISH)] == [
            "alerts/2",
            f"losant/{DEVICE}/fromAgent/hello",
            f"losant/{DEVICE}/state",
        ]
        for topic in ("losant/#", f"losant/{DEVICE}/fromAgent/hello"):
            with pytest.raises(ValueError, match="no topic"):
                await device.subscribe(topic)


async def test_a_refused_subscription_is_raised(broker: ScriptedBroker) -> None:
    async with opened(broker) as (device, events):
        broker.suback_code = 0x80
        with pytest.raises(LosantError, match="alerts"):
            await device.subscribe("alerts/#")
        await eventually(lambda: events.of("error"))


async def test_an_observer_may_be_a_coroutine_and_may_fail(broker: ScriptedBroker) -> None:
    async with opened(broker) as (device, events):
        told: list[str] = []

        async def slowly(_: AsyncDevice, found: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            told.append(found["name"])
            raise RuntimeError("boom")

        def broken(*_: Any) -> None:
            raise RuntimeError("bang")

        device.add_event_observer("command", broken)
        device.add_event_observer("command", slowly)
        broker.send(command('{"name":"1"}'))
        await eventually(lambda: len(events.of("error")) == 2)
        assert told == ["1"]
        assert {str(error) for (error,) in events.of("error")} == {"bang", "boom"}


async def test_a_coroutine_observer_can_close_the_device(broker: ScriptedBroker) -> None:
    device = make(broker, AsyncDevice)

    async def stop(each: AsyncDevice, _: dict[str, Any]) -> None:
        await each.close()

    device.add_event_observer("command", stop)
    async with asyncio.timeout(10):
        await device.connect()
        broker.send(command('{"name":"stop"}'))
        assert await _all(device.commands()) in ([], [{"name": "stop"}])
    assert device.is_connected() is False


async def test_what_an_observer_raised_reaches_the_loop_on_request(broker: ScriptedBroker) -> None:
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
    async with opened(broker, raise_observer_errors=True) as (device, _):
        device.add_event_observer("command", lambda *_: 1 / 0)
        broker.send(command('{"name":"1"}'))
        await eventually(lambda: seen)
        assert isinstance(seen[0]["exception"], ZeroDivisionError)


async def test_a_gateway_speaks_for_its_peripherals(broker: ScriptedBroker) -> None:
    async with opened(broker, AsyncGateway) as (gateway, events):
        peripheral = await gateway.add_peripheral(ONE)
        assert await gateway.add_peripheral(ONE) is peripheral
        assert gateway.peripherals == (peripheral,)
        told = Events().watch(peripheral)
        broker.send(command('{"name":"hers"}', ONE) + command('{"name":"own"}'))
        assert await next_of(peripheral.commands()) == {"name": "hers"}
        assert await next_of(gateway.commands()) == {"name": "own"}
        assert told.of("command") == [({"name": "hers"},)]
        assert await peripheral.send_state({"a": 1}, 5) is True
        assert await peripheral.send_states([({"a": 1}, 5)]) is True
        await eventually(lambda: len(broker.of(PUBLISH)) == 2)
        assert {packet.topic for packet in broker.of(PUBLISH)} == {f"losant/{ONE}/state"}
        broker.cut()
        await eventually(lambda: "reconnect" in events.names)
        assert broker.of(SUBSCRIBE)[-1].filters == [(f"losant/{ONE}/command", 0)]
        await gateway.remove_peripheral(ONE)
        assert await _all(peripheral.commands()) == []
        assert await peripheral.send_state({"a": 1}) is False
        await eventually(lambda: broker.of(UNSUBSCRIBE))
        with pytest.raises(ValueError, match="own peripheral"):
            await gateway.add_peripheral(DEVICE)
    assert told.names == ["command", "reconnect"]


async def test_the_system_ends_a_link_whose_peer_takes_nothing_for_two_keep_alives(
    broker: ScriptedBroker,
) -> None:
    async with opened(broker) as (device, _):
        with socket.socket(fileno=os.dup(device._connection.socket.fileno())) as same:
            milliseconds = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert milliseconds == 30_000


@pytest.mark.slow
async def test_a_dead_peer_is_noticed_within_two_keep_alives(broker: ScriptedBroker) -> None:
    began = time.monotonic()
    async with opened(broker, keep_alive=1) as (_, events):
        broker.pingresp = False
        watch = Stopwatch()
        await eventually(lambda: "disconnect" in events.names)
        assert watch.seconds < 4
        assert time.monotonic() - began > 1.5


async def test_connect_is_told_late_when_subscribe_gets_no_answer(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_losant.client.device_base._SUBACK_PATIENCE", 0.2)
    broker.suback = False
    began = time.monotonic()
    async with opened(broker) as (_, events):
        assert events.names == ["connect"]
        assert time.monotonic() - began > 0.15


async def test_a_device_of_one_event_loop_is_refused_in_another(broker: ScriptedBroker) -> None:
    async with opened(broker, AsyncGateway) as (device, events):
        calls: list[Callable[[], Any]] = [
            device.connect, device.close, lambda: anext(device.commands()),
            lambda: device.send_state({"a": 1}), lambda: device.publish("my/topic", b"x"),
            lambda: device.subscribe("my/topic"), lambda: device.unsubscribe("my/topic"),
            lambda: device.add_peripheral(ONE), lambda: device.remove_peripheral(ONE),
        ]  # fmt: skip

        async def elsewhere() -> None:
            for call in calls:
                with pytest.raises(WrongLoop, match="another event loop"):
                    async with asyncio.timeout(5):
                        await call()

        before = len(broker.packets)
        await asyncio.to_thread(asyncio.run, elsewhere())
        assert len(broker.packets) == before
        assert device.is_connected()
        assert await device.send_state({"a": 1}) is True
    assert events.names == ["connect", "close"]
    async with asyncio.timeout(5):
        await asyncio.to_thread(asyncio.run, device.close())  # nothing, once it is closed
