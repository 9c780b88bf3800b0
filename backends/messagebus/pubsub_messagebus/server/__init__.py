"""The development server: a messagebus distributor inside this process."""

from __future__ import annotations

from .connection import ListenerOptions
from .counters import ServerStats
from .distributor import MessageBusServer

__all__ = ["ListenerOptions", "MessageBusServer", "ServerStats"]
