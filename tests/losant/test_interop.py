"""Our clients and our broker together: what only both can show."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_losant import (
    AccessKey,
    AsyncDevice,
    AsyncGateway,
    Device,
    DeviceSpec,
    LosantAuthError,
    LosantServer,
)
from tests.losant.support import Events, wait_until
from tests.servers import eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

OWN, GATEWAY, PERIPHERAL = "a" * 24, "d" * 24, "c" * 24
DEVICES = {
    OWN: DeviceSpec(),
    GATEWAY: DeviceSpec("gateway"),
    PERIPHERAL: DeviceSpec("peripheral", gateway_id=GATEWAY),
}


@asynccontextmanager
async def served(**options: Any) -> AsyncIterator[LosantServer]:
    keys = [AccessKey("AK", "SEC", filter_type="all")]
    async with LosantServer(devices=DEVICES, keys=keys, **options) as server:
        yield server


def make(
    server: LosantServer, kind: Callable[..., Any] = AsyncDevice, name: str = OWN, **options: Any
) -> Any:
    usual: dict[str, Any] = {"secure": False, "host": "127.0.0.1", "port": server.port}
    usual |= {"reconnect_min": 0.02, "reconnect_max": 0.05}
    return kind(name, "AK", "SEC", **{**usual, **options})


@pytest.mark.parametrize("transport", ["tcp", "websockets"])
async def test_states_are_stored_and_commands_arrive(transport: str) -> None:
    async with served() as server, asyncio.timeout(10):
        async with make(server, transport=transport) as device:
            assert await device.send_state({"a": 1}, flow_version="v1", meta={"b": 2})
            (state,) = await server.wait_state(OWN)
            assert (state.data, state.meta, state.flow_version) == ({"a": 1}, {"b": 2}, "v1")
            assert await server.send_command(OWN, "go", {"n": 1}) == 1
            command = await anext(device.commands())
            assert (command["name"], command["payload"]) == ("go", {"n": 1})
        log = server.connection_log(OWN)
        assert log[0]["disconnectReason"] == "Client Disconnected"


async def test_a_device_in_a_thread_reconnects_after_the_broker_dropped_it() -> None:
    async with served() as server, asyncio.timeout(15):
        device = make(server, Device)
        events = Events().watch(device)
        thread = threading.Thread(target=device.connect)
        thread.start()
        try:
            await server.wait_connected(OWN, subscribed=True)
            await eventually(lambda: "connect" in events.names)
            server.disconnect(OWN)
            await eventually(lambda: "reconnect" in events.names)
            assert device.send_state({"a": 1}) is True
            await server.wait_state(OWN)
        finally:
            await asyncio.to_thread(device.close)
            await asyncio.to_thread(thread.join)
        assert events.names == ["connect", "disconnect", "reconnect", "close"]


async def test_wrong_credentials_are_refused() -> None:
    async with served() as server, asyncio.timeout(10):
        wrong = AsyncDevice(OWN, "AK", "no", secure=False, host="127.0.0.1", port=server.port)
        with pytest.raises(LosantAuthError, match="error code 5"):
            await wrong.connect()
        with pytest.raises(LosantAuthError):
            await make(server, name=PERIPHERAL).connect()


async def test_the_reason_names_a_publish_that_is_not_allowed() -> None:
    async with served() as server, asyncio.timeout(10):
        device = make(server)
        events = Events().watch(device)
        async with device:
            assert await device.send_hello()
            await eventually(lambda: "reconnect" in events.names)
            ((reason,),) = events.of("disconnect")
            assert f"losant/{OWN}/fromAgent/hello" in reason
        log = server.connection_log(OWN)
        assert any("Not allowed to publish" in each.get("disconnectReason", "") for each in log)


async def test_a_gateway_speaks_for_its_peripheral() -> None:
    async with served() as server, asyncio.timeout(10):
        async with make(server, AsyncGateway, GATEWAY) as gateway:
            peripheral = await gateway.add_peripheral(PERIPHERAL)
            assert await peripheral.send_state({"a": 1})
            await server.wait_state(PERIPHERAL)
            await server.send_command(PERIPHERAL, "go")
            assert (await anext(peripheral.commands()))["name"] == "go"


async def test_the_guard_keeps_a_device_from_being_banned() -> None:
    async with served(throttle=True) as server, asyncio.timeout(10):
        async with make(server, rate_guard="drop") as device:
            sent = [await device.send_state({"n": n}, 1_700_000_000_000 + n) for n in range(40)]
            assert sent == [True] * 30 + [False] * 10
            assert await device.publish("custom", b"x", qos=1) is True
            assert device.is_connected()
        assert server.connection_log(OWN)[0]["disconnectReason"] == "Client Disconnected"


async def test_what_was_kept_offline_is_stored_with_its_time() -> None:
    async with served() as server, asyncio.timeout(10):
        device = make(server, buffer_offline=500)
        events = Events().watch(device)
        async with device:
            await server.stop()
            await eventually(lambda: "disconnect" in events.names)
            for n in range(250):
                assert await device.send_state({"n": n}, -1000 * n)
            await server.start()
            await server.wait_state(OWN, 250)
        assert len(server.errors) == 0


async def test_a_custom_topic_connects_two_devices() -> None:
    async with served() as server, asyncio.timeout(10):
        async with make(server) as one, make(server, name=GATEWAY) as other:
            await other.subscribe("alerts/+")
            assert await one.publish("alerts/fire", "now", qos=1)
            assert await anext(other.messages()) == ("alerts/fire", b"now")


async def test_a_second_connection_of_the_same_device_takes_over_without_a_war() -> None:
    async with served() as server, asyncio.timeout(10):
        first = make(server, reconnect_min=5.0, reconnect_max=5.0)
        events = Events().watch(first)
        async with first, make(server) as second:
            await eventually(lambda: "disconnect" in events.names)
            assert second.is_connected()
            assert not first.is_connected()


def test_a_device_of_a_program_without_a_loop_hears_the_broker_close() -> None:
    """The broker runs in another thread's loop here, as it does beside a blocking test."""
    ready = threading.Event()
    stop: list[Callable[[], object]] = []
    found: list[LosantServer] = []

    async def serve() -> None:
        async with served() as server:
            done = asyncio.Event()
            loop = asyncio.get_running_loop()
            stop.append(lambda: loop.call_soon_threadsafe(done.set))
            found.append(server)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    device = make(found[0], Device, reconnect_min=5.0, reconnect_max=5.0)
    events = Events().watch(device)
    device.connect(blocking=False)

    def turn(name: str) -> bool:
        device.loop(0.02)
        return name in events.names

    wait_until(lambda: turn("connect"))
    assert device.send_state({"a": 1})
    stop[0]()
    wait_until(lambda: turn("disconnect"))
    device.close()
    thread.join(10)
    assert not thread.is_alive()
