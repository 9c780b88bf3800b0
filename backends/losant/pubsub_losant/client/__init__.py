"""The native API: devices with the names of ``losant-mqtt``, and the same with ``await``."""

from __future__ import annotations

from .async_device import AsyncDevice, AsyncGateway, AsyncPeripheral
from .device import Device, Gateway, Peripheral

__all__ = ["AsyncDevice", "AsyncGateway", "AsyncPeripheral", "Device", "Gateway", "Peripheral"]
