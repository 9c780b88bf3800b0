"""One MQTT connection, for the client side: packets and outcomes, dialling, and two drivers.

`connection` knows paho-mqtt and no event loop; `asyncio_driver` and `blocking_driver` drive it.
Backends of services that speak MQTT are built on this room and on
`pubsub_mqtt.backend.connection_backend`.
"""

from __future__ import annotations

from .connection import Connection
from .session_data import Session, SessionSettings, Subscribe, Will
from .state import Outgoing, Request

__all__ = [
    "Connection",
    "Outgoing",
    "Request",
    "Session",
    "SessionSettings",
    "Subscribe",
    "Will",
]
