"""The blocking driver with real brokers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    ConnectTimeout,
)
from pubsub_core.secrets import Secret
from pubsub_core.testing.proxy import FaultProxy
from pubsub_mqtt.connection import Session, SessionSettings, Subscribe
from pubsub_mqtt.connection.blocking_driver import BlockingDriver
from pubsub_mqtt.packets import Incoming
from pubsub_mqtt.server import MosquittoServer
from tests.mqtt.drivers import HOST, tcp
from tests.servers import eventually

pytestmark = pytest.mark.usefixtures("no_leaks")


def blocking(port: int, **settings: Any) -> BlockingDriver:
    settings.setdefault("versions", (5, 4))
    return BlockingDriver(SessionSettings(**settings), tcp(port), backend="mqtt", timeout=5)


async def off_loop(function: Callable[[], None]) -> None:
    """Run a test that has no loop in a thread that ends with it."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    await eventually(lambda: not thread.is_alive(), within=20)
    if failures:
        raise failures[0]


async def test_blocking_loop_start(mosquitto: MosquittoServer, unique: Callable[..., str]) -> None:
    topic = unique()

    def work() -> None:
        made = blocking(mosquitto.port)
        got: list[bytes] = []
        everything = threading.Event()

        def received(message: Incoming) -> None:
            got.append(message.payload)
            if message.payload == b"0":
                made.publish(topic, b"from the callback", qos=1)
            if len(got) == 4:
                everything.set()

        made.on_message = received
        made.on_session = lambda session: None
        made.connect()
        made.loop_start()
        try:
            subscribed = threading.Event()
            made.subscribe(Subscribe(topic, 2), on_done=lambda request: subscribed.set())
            assert subscribed.wait(5)
            answered = threading.Event()
            for qos in (0, 1):
                made.publish(topic, b"%d" % qos, qos=qos)
            made.publish(topic, b"2", qos=2, on_done=lambda out: answered.set())
            assert answered.wait(5)
            assert everything.wait(5)
        finally:
            made.disconnect()
            made.loop_stop()

    await off_loop(work)


async def test_blocking_loop_forever_reconnects(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with FaultProxy(HOST, mosquitto.port) as proxy:
        made = blocking(proxy.port)
        sessions: list[Session] = []
        lost: list[ConnectError] = []
        made.on_session = sessions.append
        made.on_lost = lost.append

        def work() -> None:
            made.connect()
            made.loop_forever()

        thread = threading.Thread(target=work)
        thread.start()
        await eventually(lambda: len(sessions) == 1)
        await proxy.cut()
        await eventually(lambda: len(lost) >= 1)
        await eventually(lambda: len(sessions) == 2)
        assert made.connection.connected
        made.disconnect()
        await eventually(lambda: not thread.is_alive())


async def test_blocking_refusal(mosquitto_users: MosquittoServer) -> None:
    def work() -> None:
        made = blocking(mosquitto_users.port, username="alice", password=Secret("wrong"))
        with pytest.raises(AuthenticationFailed):
            made.connect()
        made.disconnect()

    await off_loop(work)


async def test_blocking_timeout(silent: int) -> None:
    def work() -> None:
        made = BlockingDriver(
            SessionSettings(versions=(4,)), tcp(silent), backend="mqtt", timeout=0.3
        )
        with pytest.raises(ConnectTimeout):
            made.connect()
        made.disconnect()

    await off_loop(work)
