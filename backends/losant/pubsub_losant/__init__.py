"""Losant for pubsub_core: a client with the names of ``losant-mqtt``, and a broker for tests.

Names are imported when they are used, so that a device needs no server and a server no device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pubsub_core.lazy import lazy_names

if TYPE_CHECKING:
    from .backend import DeviceCommand, DeviceState
    from .client import AsyncDevice, AsyncGateway, AsyncPeripheral, Device, Gateway, Peripheral
    from .errors import (
        LosantAuthError,
        LosantConnectError,
        LosantError,
        LosantProtocolError,
        LosantThrottled,
        LosantTLSError,
    )
    from .server import AccessKey, DeviceSpec, LosantServer

__all__ = [
    "AccessKey",
    "AsyncDevice",
    "AsyncGateway",
    "AsyncPeripheral",
    "Device",
    "DeviceCommand",
    "DeviceSpec",
    "DeviceState",
    "Gateway",
    "LosantAuthError",
    "LosantConnectError",
    "LosantError",
    "LosantProtocolError",
    "LosantServer",
    "LosantTLSError",
    "LosantThrottled",
    "Peripheral",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "backend": ("DeviceCommand", "DeviceState"),
        "client": (
            "AsyncDevice",
            "AsyncGateway",
            "AsyncPeripheral",
            "Device",
            "Gateway",
            "Peripheral",
        ),
        "errors": (
            "LosantAuthError",
            "LosantConnectError",
            "LosantError",
            "LosantProtocolError",
            "LosantTLSError",
            "LosantThrottled",
        ),
        "server": ("AccessKey", "DeviceSpec", "LosantServer"),
    },
)
