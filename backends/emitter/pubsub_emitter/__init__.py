"""Emitter for pubsub_core: a client with the names of ``emitter-io``, keys, and a broker.

Names are imported when they are used, so that reading a key needs neither paho-mqtt nor a server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client, Emitter, EmitterMessage, HistoryMessage, Reply, connect
    from .errors import (
        BadRequestError,
        EmitterError,
        ForbiddenError,
        NotFoundError,
        UnauthorizedError,
    )
    from .keys import InvalidKey, InvalidLicense, InvalidTarget, Key, License, Permission
    from .server import EmitterServer

__all__ = [
    "BadRequestError",
    "Client",
    "Emitter",
    "EmitterError",
    "EmitterMessage",
    "EmitterServer",
    "ForbiddenError",
    "HistoryMessage",
    "InvalidKey",
    "InvalidLicense",
    "InvalidTarget",
    "Key",
    "License",
    "NotFoundError",
    "Permission",
    "Reply",
    "UnauthorizedError",
    "connect",
]

_HOMES = {
    "BadRequestError": "errors",
    "Client": "client",
    "Emitter": "client",
    "EmitterError": "errors",
    "EmitterMessage": "client",
    "EmitterServer": "server",
    "ForbiddenError": "errors",
    "HistoryMessage": "client",
    "InvalidKey": "keys",
    "InvalidLicense": "keys",
    "InvalidTarget": "keys",
    "Key": "keys",
    "License": "keys",
    "NotFoundError": "errors",
    "Permission": "keys",
    "Reply": "client",
    "UnauthorizedError": "errors",
    "connect": "client",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
