"""`Device` and `AsyncDevice` at the real platform, for whoever has a device there.

Set ``PUBSUB_LOSANT_DEVICE_ID``, ``PUBSUB_LOSANT_KEY`` and ``PUBSUB_LOSANT_SECRET``; for a
dedicated installation ``PUBSUB_LOSANT_HOST`` as well. Each test sends at most three states,
far below the platform's 30 messages in 15 seconds.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from pubsub_losant import AsyncDevice, Device, LosantAuthError
from tests.losant.support import Events, turn_until

NAMES = ("PUBSUB_LOSANT_DEVICE_ID", "PUBSUB_LOSANT_KEY", "PUBSUB_LOSANT_SECRET")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(not os.environ.get(name) for name in NAMES),
        reason=f"needs a device of the platform: set {', '.join(NAMES)}",
    ),
]


def _arguments(**options: Any) -> tuple[tuple[str, str, str], dict[str, Any]]:
    host = os.environ.get("PUBSUB_LOSANT_HOST")
    device_id, key, secret = (os.environ[name] for name in NAMES)
    return (device_id, key, secret), {"host": host, **options}


@pytest.mark.parametrize("transport", ["tcp", "websockets"])
@pytest.mark.parametrize("secure", [True, False], ids=["tls", "clear"])
def test_a_device_sends_a_state_and_stays_connected(transport: str, secure: bool) -> None:
    positional, options = _arguments(secure=secure, transport=transport)
    device = Device(*positional, **options)
    events = Events().watch(device)
    device.connect(blocking=False)
    try:
        turn_until(device, lambda: "connect" in events.names, within=15)
        assert device.send_state({"pubsub_test": 1}) is True
        for _ in range(20):  # a refused publish would end the connection
            device.loop(0.1)
        assert device.is_connected()
    finally:
        device.close()
    assert events.names == ["connect", "close"]


def test_wrong_credentials_are_refused() -> None:
    (device_id, key, _), options = _arguments()
    device = Device(device_id, key, "not-the-secret", **options)
    with pytest.raises(LosantAuthError):
        device.connect()


async def test_an_async_device_sends_states() -> None:
    positional, options = _arguments(qos=1)
    async with asyncio.timeout(20), AsyncDevice(*positional, **options) as device:
        assert await device.send_states([({"pubsub_test": n}, -1000 * n) for n in range(3)])
