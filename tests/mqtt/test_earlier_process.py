"""A session that an earlier process left: what the broker kept reaches the new one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core import connect
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
