"""Publish and subscribe, with typed messages.

    python quickstart.py

``pubsub.toml`` beside this file says that the broker is memory. On an MQTT broker, which
``pubsub serve mqtt --port 1883`` starts, the same program runs with::

    PUBSUB_BUS_MAIN_URL=mqtt://localhost python quickstart.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pubsub_core import connect


@dataclass
class Reading:
    celsius: float


async def main() -> None:
    async with connect("main") as bus:
        # Entering the block returns when the broker has confirmed the subscription.
        async with bus.subscribe("example/{device}/temp", Reading) as readings:
            receipt = await bus.publish("example/oven/temp", Reading(81.5))
            print("confirmed by the", receipt.confirmed_by)
            message = await readings.get(timeout=5)
            print(message.topic, message.params["device"], message.payload.celsius)


if __name__ == "__main__":
    asyncio.run(main())
