"""For a bus: a Losant device as the core sees it."""

from __future__ import annotations

from .backend import LosantBackend
from .payloads import DeviceCommand, DeviceState

__all__ = ["DeviceCommand", "DeviceState", "LosantBackend"]
