"""MQTT for pubsub_core: any broker that speaks 3.1.1 or 5, and a client with amqtt's names.

Names are imported when they are used, so that announcing the backend needs no paho-mqtt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import MQTTBackend
    from .client import (
        QOS_0,
        QOS_1,
        QOS_2,
        ClientError,
        ClientException,
        ConnectError,
        ConnectException,
        MQTTClient,
    )
    from .errors import CredentialsRefused, ProtocolError
    from .options import MQTTOptions, TopicDefaults, WillOptions
    from .server import AmqttServer, MosquittoServer, MQTTServer

__all__ = [
    "QOS_0",
    "QOS_1",
    "QOS_2",
    "AmqttServer",
    "ClientError",
    "ClientException",
    "ConnectError",
    "ConnectException",
    "CredentialsRefused",
    "MQTTBackend",
    "MQTTClient",
    "MQTTOptions",
    "MQTTServer",
    "MosquittoServer",
    "ProtocolError",
    "TopicDefaults",
    "WillOptions",
]

_HOMES = {
    "QOS_0": "client",
    "QOS_1": "client",
    "QOS_2": "client",
    "AmqttServer": "server",
    "ClientError": "client",
    "ClientException": "client",
    "ConnectError": "client",
    "ConnectException": "client",
    "CredentialsRefused": "errors",
    "MQTTBackend": "backend",
    "MQTTClient": "client",
    "MQTTOptions": "options",
    "MQTTServer": "server",
    "MosquittoServer": "server",
    "ProtocolError": "errors",
    "TopicDefaults": "options",
    "WillOptions": "options",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
