"""A session that an earlier process left: what the broker kept reaches the new one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core import ConnectError, Notice, Status, connect
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("drawn", [(1, 9), (9, 1), (5, 5)], ids=["above", "below", "same"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_subscription_identifiers_of_an_earlier_process_are_not_taken_for_ours(
    mosquitto: MosquittoServer,
    unique: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    drawn: tuple[int, int],
    protocol: str,
) -> None:
    numbers = iter(drawn)
    monkeypatch.setattr("secrets.randbelow", lambda bound: next(numbers))
    options: dict[str, Any] = {
        "client_id": unique("").strip("/"),
        "clean_start": False,
        "protocol": protocol,
    }
    async with asyncio.timeout(20):
        async with connect(mosquitto.url, **options) as bus:
            await bus.subscribe(unique("a/#"))
            await bus.subscribe(unique("b/#"))
        async with connect(mosquitto.url) as bus:
            await bus.publish(unique("a/x"), b"for a")
            await bus.publish(unique("b/x"), b"for b")
        async with connect(mosquitto.url, **options) as bus:
            async with bus.subscribe(unique("b/#")) as one, bus.subscribe(unique("a/#")) as two:
                assert (await one.get(timeout=5)).payload == b"for b"
                assert (await two.get(timeout=5)).payload == b"for a"
                await bus.publish(unique("a/y"), b"live")
                assert (await two.get(timeout=5)).payload == b"live"
        async with connect(mosquitto.url, client_id=options["client_id"]):
            pass  # the broker forgets the session


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_what_nobody_subscribes_to_again_does_not_hold_the_rest_back(
    mosquitto: MosquittoServer,
    unique: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
) -> None:
    """Without an answer they would fill the broker's window, 20 messages at Mosquitto."""
    monkeypatch.setattr("pubsub_core._runtime.broker_subscriptions._ORPHANS_WAIT", 0.2)
    options: dict[str, Any] = {
        "client_id": unique("").strip("/"),
        "clean_start": False,
        "protocol": protocol,
    }
    async with asyncio.timeout(20):
        async with connect(mosquitto.url, **options) as bus:
            await bus.subscribe(unique("old/#"))
        async with connect(mosquitto.url, **options) as bus, connect(mosquitto.url) as other:
            async with bus.subscribe(unique("new")) as new, bus.events() as events:
                for number in range(50):
                    await other.publish(unique(f"old/{number}"), b"for nobody")
                await other.publish(unique("new"), b"for us")
                assert (await new.get(timeout=10)).payload == b"for us"
                assert bus.stats.unrouted == 50
                async for event in events:
                    if isinstance(event, Notice):
                        assert event.kind == "unwanted"
                        break
        async with connect(mosquitto.url, client_id=options["client_id"]):
            pass  # the broker forgets the session


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_subscription_ended_while_offline_is_ended_at_the_broker_too(
    mosquitto: MosquittoServer, unique: Callable[[str], str], protocol: str
) -> None:
    options: dict[str, Any] = {
        "client_id": unique("").strip("/"),
        "clean_start": False,
        "protocol": protocol,
        "reconnect_first": 0.3,
    }
    async with asyncio.timeout(20):
        async with connect(mosquitto.url, **options) as bus, connect(mosquitto.url) as other:
            ended = await bus.subscribe(unique("ended"))
            kept = await bus.subscribe(unique("kept"))
            bus.native(MQTTBackend).connection.end(ConnectError("cut by the test"))
            await bus.wait_for(Status.RECONNECTING)
            await ended.close()
            await bus.wait_for(Status.ONLINE)
            await other.publish(unique("ended"), b"for nobody")
            await other.publish(unique("kept"), b"for us")
            assert (await kept.get(timeout=5)).payload == b"for us"
            assert bus.stats.unrouted == 0
        async with connect(mosquitto.url, client_id=options["client_id"]):
            pass  # the broker forgets the session
