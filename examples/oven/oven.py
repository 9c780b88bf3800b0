"""Handlers that know no broker; ``pubsub.toml`` beside this file says which one it is.

    PUBSUB_PROFILE=test python oven.py      in memory
    pubsub serve mqtt --port 1883 &         a broker for development
    python oven.py                          on that broker, until Ctrl-C

With a broker, readings can come from another shell, and alarms go there::

    pubsub sub mqtt://localhost 'alarms/#'
    pubsub pub mqtt://localhost lab/kiln/temp '{"celsius": 120}'
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

from pubsub_core import App, Bus, Message
from pubsub_core.middleware import CallNext, Context, Direction

log = logging.getLogger("oven")
app = App()


@dataclass
class Reading:
    celsius: float


@dataclass
class Alarm:
    device: str
    celsius: float


@app.on("lab/{device}/temp")
async def watch(message: Message[Reading], device: str, bus: Bus) -> None:
    celsius = message.payload.celsius
    log.info("%s has %.1f °C (%s)", device, celsius, message.origin)
    if celsius > 90:
        await bus.publish(f"alarms/{device}", Alarm(device, celsius))


@app.on("alarms/#")
def ring(payload: Alarm) -> None:
    """A plain function; it may block, since it runs in a thread of its own."""
    print(f"{payload.device} is too hot: {payload.celsius:g} °C", flush=True)
    if "ONCE" in os.environ:
        app.stop()


@app.middleware
async def count(context: Context, call_next: CallNext) -> object:
    """Runs around every message in both directions."""
    if context.direction is Direction.PUBLISH:
        log.info("publishing to %s", context.topic)
    return await call_next(context)


@app.on_start
async def measure(bus: Bus) -> None:
    # Handlers are subscribed after this; a retained message waits for them.
    await bus.publish("lab/oven/temp", Reading(95.0), retain=True)


@app.on_stop
async def clean_up(bus: Bus) -> None:
    await bus.clear("lab/oven/temp")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(app.run())
