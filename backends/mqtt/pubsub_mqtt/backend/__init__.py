"""For a bus: `MQTTBackend`, and the base of every backend over MQTT."""

from __future__ import annotations

from .connection_backend import ConnectionBackend
from .mqtt import MQTTBackend

__all__ = ["ConnectionBackend", "MQTTBackend"]
