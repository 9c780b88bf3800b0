"""The native API: a client with the names of ``emitter-io``, 2.x and 1.x."""

from __future__ import annotations

from .client import Client, HistoryMessage, Options
from .compat import Emitter, connect
from .message import EmitterMessage
from .reply import Reply

__all__ = [
    "Client",
    "Emitter",
    "EmitterMessage",
    "HistoryMessage",
    "Options",
    "Reply",
    "connect",
]
