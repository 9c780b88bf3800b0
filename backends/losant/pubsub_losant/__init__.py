"""Losant for pubsub_core: a client with the names of ``losant-mqtt``, and a broker for tests.

Names are imported when they are used, so that a device needs no server and a server no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aio import AsyncDevice, AsyncGateway, AsyncPeripheral
    from .device import Device, Gateway, Peripheral
    from .errors import (
        LosantAuthError,
        LosantConnectError,
        LosantError,
        LosantProtocolError,
        LosantThrottled,
        LosantTLSError,
    )
    from .payloads import DeviceCommand, DeviceState
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

_HOMES = {
    "AccessKey": "server",
    "AsyncDevice": "aio",
    "AsyncGateway": "aio",
    "AsyncPeripheral": "aio",
    "Device": "device",
    "DeviceCommand": "payloads",
    "DeviceSpec": "server",
    "DeviceState": "payloads",
    "Gateway": "device",
    "LosantAuthError": "errors",
    "LosantConnectError": "errors",
    "LosantError": "errors",
    "LosantProtocolError": "errors",
    "LosantServer": "server",
    "LosantTLSError": "errors",
    "LosantThrottled": "errors",
    "Peripheral": "device",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
