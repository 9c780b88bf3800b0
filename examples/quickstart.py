"""Publish and subscribe, with typed messages, in memory.

    python quickstart.py
    python quickstart.py mqtt://localhost

The second line runs the same program on an MQTT broker; ``pubsub serve mqtt --port 1883``
starts one.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from pubsub_core import connect


@dataclass
class Reading:
    celsius: float


async def main(where: str) -> None:
    async with connect(where) as bus:
        # Entering the block returns when the broker has confirmed the subscription.
        async with bus.subscribe("example/{device}/temp", Reading) as readings:
            receipt = await bus.publish("example/oven/temp", Reading(81.5))
            print("confirmed by the", receipt.confirmed_by)
            message = await readings.get(timeout=5)
            print(message.topic, message.params["device"], message.payload.celsius)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "memory://"))
