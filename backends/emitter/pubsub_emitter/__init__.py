"""Emitter for pubsub_core: licenses and keys, the protocol, and a broker inside this process.

Names are imported when they are used, so that reading a key needs no server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .keys import InvalidKey, InvalidLicense, InvalidTarget, Key, License, Permission
    from .server import EmitterServer

__all__ = [
    "EmitterServer",
    "InvalidKey",
    "InvalidLicense",
    "InvalidTarget",
    "Key",
    "License",
    "Permission",
]

_HOMES = {
    "EmitterServer": "server",
    "InvalidKey": "keys",
    "InvalidLicense": "keys",
    "InvalidTarget": "keys",
    "Key": "keys",
    "License": "keys",
    "Permission": "keys",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
