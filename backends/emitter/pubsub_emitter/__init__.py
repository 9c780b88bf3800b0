"""Emitter for pubsub_core: a client with the names of ``emitter-io``, keys, and a broker.

Names are imported when they are used, so that reading a key needs neither paho-mqtt nor a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pubsub_core.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "client": ("Client", "Emitter", "EmitterMessage", "HistoryMessage", "Reply", "connect"),
        "errors": (
            "BadRequestError",
            "EmitterError",
            "ForbiddenError",
            "NotFoundError",
            "UnauthorizedError",
        ),
        "keys": ("InvalidKey", "InvalidLicense", "InvalidTarget", "Key", "License", "Permission"),
        "server": ("EmitterServer",),
    },
)
