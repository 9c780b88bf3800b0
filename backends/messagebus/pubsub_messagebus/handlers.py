"""Types of the coroutine functions that a program gives to the client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from .protocol import DataPacket

__all__ = ["AuthorizationHandler", "ClosedHandler", "DataHandler", "NotificationHandler"]

DataHandler = Callable[[str, str, str, str, list[DataPacket] | None, Any], Awaitable[None]]
"""``(user, host, feed, topic, data_packets, is_image)``."""
NotificationHandler = Callable[[UUID, str, str, str, str, bool], Awaitable[None]]
"""``(client_id, user, host, feed, topic, is_add)``."""
AuthorizationHandler = Callable[[UUID, str, str, str, str], Awaitable[None]]
"""``(client_id, host, user, feed, topic)``: here the host comes first."""
ClosedHandler = Callable[[bool], Awaitable[None]]
"""``(is_faulted)``."""
