"""The application that ``pubsub demo`` runs, unchanged, on one broker after the other.

It watches an oven and raises an alarm when it is too hot. Nothing here knows which broker it
is on: that is said by ``pubsub.toml``, the environment, or whoever starts it. To run it by
itself::

    PUBSUB_BUS_MAIN_URL=mqtt://localhost python -m pubsub_core.cli.demo_app
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pubsub_core import App, Bus, Message

__all__ = ["Alarm", "Reading", "app", "watch"]

TOO_HOT = 80.0

log = logging.getLogger("demo_app")
app = App()


@dataclass
class Reading:
    """A reading of the oven's thermometer."""

    celsius: float


@dataclass
class Alarm:
    """The application's answer to one that is too high."""

    device: str
    celsius: float


@app.on("demo/oven")
async def watch(message: Message[Reading], bus: Bus) -> None:
    """Raise an alarm for each reading that is too hot."""
    celsius = message.payload.celsius
    if celsius <= TOO_HOT:
        log.info("%s: %.1f °C is fine", message.topic, celsius)
        return
    log.info("%s: %.1f °C is too hot, raising an alarm", message.topic, celsius)
    await bus.publish("demo/alarm", Alarm("oven", celsius))


if __name__ == "__main__":
    app.run()
