"""The messagebus (jetblack-messagebus): a client like its SDK's, a backend, a distributor.

``from pubsub_messagebus import CallbackClient, DataPacket`` replaces
``from jetblack_messagebus import …``.
"""

from __future__ import annotations

from .authentication import (
    Authenticator,
    BasicAuthenticator,
    NullAuthenticator,
    TokenAuthenticator,
)
from .client import (
    AuthorizationHandler,
    CallbackClient,
    Client,
    ClosedHandler,
    DataHandler,
    NotificationHandler,
)
from .protocol import DataPacket, ProtocolError

__all__ = [
    "Authenticator",
    "AuthorizationHandler",
    "BasicAuthenticator",
    "CallbackClient",
    "Client",
    "ClosedHandler",
    "DataHandler",
    "DataPacket",
    "NotificationHandler",
    "NullAuthenticator",
    "ProtocolError",
    "TokenAuthenticator",
]
