"""The development server: a messagebus distributor inside this process."""

from __future__ import annotations

from .distributor import ListenerOptions, MessageBusServer, ServerStats

__all__ = ["ListenerOptions", "MessageBusServer", "ServerStats"]
