"""The development server: Losant's platform inside this process, for ``pubsub serve losant``."""

from __future__ import annotations

from .access import AccessKey, DeviceSpec
from .server import LosantServer

__all__ = ["AccessKey", "DeviceSpec", "LosantServer"]
