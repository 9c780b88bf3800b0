"""A dead link is noticed in time, and nothing a program does stops the keepalive.

No user code runs on a network path: handlers that never return, or block their thread, cost
their own subscription and nothing else. Connecting does its blocking work in threads.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_core import Bus, Message, Status, connect
from pubsub_core.errors import ConnectError, PubSubError
from pubsub_core.events import StatusChanged
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer
from tests.servers import Authority

from .support import SOON, Lag, online, opened, resumed, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

KEEPALIVE = 1
NOTICED = 1.5 * KEEPALIVE + 1.0
SLACK = 0.5
"""For a machine that has other things to do."""


@asynccontextmanager
async def linked(server: MosquittoServer, **options: Any) -> AsyncIterator[tuple[FaultProxy, Bus]]:
    async with (
        FaultProxy(server.host, server.port) as proxy,
        opened(f"mqtt://127.0.0.1:{proxy.port}", keepalive=KEEPALIVE, **SOON, **options) as bus,
    ):
        yield proxy, bus


async def notice(bus: Bus) -> float:
    """Return the seconds until the loss is noticed."""
    began = time.monotonic()
    async with bus.events() as events:
        async with asyncio.timeout(NOTICED + 5):
            async for event in events:
                if isinstance(event, StatusChanged) and event.status is Status.RECONNECTING:
                    break
    return time.monotonic() - began


async def test_a_half_open_link_is_noticed(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """Silent, while publishing QoS 0 without pause, and while a full link takes no more."""

    async def idle(version: str, direction: Direction) -> float:
        async with linked(mosquitto, protocol=version) as (proxy, bus):
            await soon(bus.publish(unique(), b"x"))
            proxy.blackhole(True, direction)
            return await notice(bus)

    async def publishing(
        version: str, payload: bytes, fault: Callable[[FaultProxy], None]
    ) -> float:
        async with linked(mosquitto, protocol=version) as (proxy, bus):
            stopping = False

            async def publish() -> None:
                while not stopping:
                    try:
                        await bus.publish(unique(), payload, qos=0)
                    except PubSubError:
                        return
                    await asyncio.sleep(0.001)

            task = asyncio.create_task(publish())
            await until(lambda: bus.stats.published > 20, "traffic")
            fault(proxy)
            took = await notice(bus)
            stopping = True
            await soon(task)
            return took

    took = await soon(
        asyncio.gather(
            idle("3.1.1", Direction.BOTH),
            idle("5", Direction.BOTH),
            idle("5", Direction.DOWN),
            publishing("3.1.1", b"x", lambda proxy: proxy.blackhole()),
            publishing("5", b"x", lambda proxy: proxy.blackhole()),
            publishing("5", b"x" * 50_000, lambda proxy: proxy.stall()),
        )
    )
    assert max(took) <= NOTICED + SLACK, took


async def test_a_link_that_only_loses_what_we_send_is_noticed(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """The broker's messages still come, so the link looks alive: the broker ends it."""
    async with opened(mosquitto.url) as other, linked(mosquitto) as (proxy, bus):
        async with bus.subscribe(unique()) as subscription:
            proxy.blackhole(True, Direction.UP)
            noticing = asyncio.create_task(notice(bus))
            while not noticing.done():
                await soon(other.publish(unique(), b"x"))
                await asyncio.sleep(0.02)
            # Mosquitto allows one and a half times the keepalive, and looks once a second.
            assert noticing.result() <= 1.5 * KEEPALIVE + 2 + SLACK
            assert subscription.stats.received > 0


async def test_handlers_that_never_return_do_not_stop_the_keepalive(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    """One awaits for ever, one blocks its thread: three intervals later all is well."""
    release = threading.Event()
    stuck: list[str] = []

    async def awaits(message: Message[bytes]) -> None:
        stuck.append("awaits")
        await asyncio.get_running_loop().create_future()

    def blocks(message: Message[bytes]) -> None:
        stuck.append("blocks")
        release.wait(30)

    async with linked(mosquitto, protocol="3.1.1") as (_, bus):
        pings = bus.native(MQTTBackend).connection.stats
        async with bus.subscribe(unique("a"), handler=awaits):
            async with bus.subscribe(unique("b"), handler=blocks):
                async with bus.subscribe(unique("c")) as lively:
                    try:
                        for name in "ab":
                            await soon(bus.publish(unique(name), b"x"))
                        await until(lambda: len(stuck) == 2, "both handlers are stuck")
                        before = pings.pings
                        await until(lambda: pings.pings >= before + 4, "pings", 10)
                        assert bus.status is Status.ONLINE
                        assert bus.stats.sessions == 1
                        await soon(bus.publish(unique("c"), b"x"))
                        assert (await soon(lively.get())).payload == b"x"
                    finally:
                        release.set()


# --- the event loop ---------------------------------------------------------------------

GROSS = 0.4
"""Far above what is promised (50 ms), far below what blocking would take: half a second."""


async def test_connecting_never_holds_the_loop(
    mosquitto_tls: MosquittoServer,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name server, certificates and configuration files that take half a second each."""
    real = socket.getaddrinfo
    slow: list[str] = []

    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        slow.append(threading.current_thread().name)
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    from pubsub_core.config import Config
    from pubsub_mqtt.connection.address import TLSSettings

    load, build = Config.load, TLSSettings.build

    def slowly_load(cls: type[Config], *arguments: Any, **options: Any) -> Any:
        slow.append(threading.current_thread().name)
        time.sleep(0.5)
        return load(*arguments, **options)

    def slowly_build(self: TLSSettings) -> Any:
        slow.append(threading.current_thread().name)
        time.sleep(0.5)
        return build(self)

    monkeypatch.setattr(Config, "load", classmethod(slowly_load))
    monkeypatch.setattr(TLSSettings, "build", slowly_build)
    async with Lag() as lag:
        url = f"mqtts://localhost:{mosquitto_tls.port}"
        async with opened(url, ca_file=authority.cafile, **SOON) as bus:
            await soon(bus.ping())
            await soon(mosquitto_cut(bus))
            await resumed(bus, 1)
    assert len(slow) >= 5  # configuration, certificates and name; the last two once more
    assert threading.current_thread().name not in slow
    assert lag.worst < GROSS


async def mosquitto_cut(bus: Bus) -> None:
    """Break the link below the bus."""
    connection = bus.native(MQTTBackend).connection
    connection.end(ConnectError("cut by the test", backend="mqtt"))


async def test_peers_that_say_nothing_do_not_hold_the_loop() -> None:
    """A port that accepts and is silent: during TCP, TLS and CONNACK the loop comes round."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        async with Lag() as lag:
            for scheme in ("mqtt", "mqtts", "ws", "wss"):
                with pytest.raises(ConnectError):
                    await soon(
                        connect(f"{scheme}://127.0.0.1:{port}", connect_timeout=0.2).open(), 5
                    )
    assert lag.worst < GROSS


async def test_faults_do_not_hold_the_loop(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with Lag() as lag, linked(mosquitto) as (proxy, bus):

        async def drop() -> None:
            proxy.drop_after(3, Direction.DOWN)

        for fault in (
            proxy.cut,
            lambda: proxy.cut(reset=False),
            drop,
        ):
            sessions = bus.stats.sessions
            await soon(fault())
            publishing = asyncio.create_task(bus.publish(unique(), b"x"))
            await resumed(bus, sessions)
            await soon(asyncio.wait([publishing]))
            publishing.exception()
        await online(bus)
    assert lag.worst < GROSS
