"""The native client, with the interface of ``jetblack-messagebus-python3``."""

from __future__ import annotations

from pubsub_messagebus.handlers import (
    AuthorizationHandler,
    ClosedHandler,
    DataHandler,
    NotificationHandler,
)

from .callback_client import CallbackClient
from .client import Client

__all__ = [
    "AuthorizationHandler",
    "CallbackClient",
    "Client",
    "ClosedHandler",
    "DataHandler",
    "NotificationHandler",
]
