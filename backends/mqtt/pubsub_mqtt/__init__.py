"""MQTT for pubsub_core: any broker that speaks 3.1.1 or 5, and a client with amqtt's names.

Names are imported when they are used, so that announcing the backend needs no paho-mqtt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pubsub_core.lazy import lazy_names

if TYPE_CHECKING:
    from .backend import MQTTBackend
    from .client import (
        QOS_0,
        QOS_1,
        QOS_2,
        AMQTTError,
        ClientError,
        ClientException,
        ConnectError,
        ConnectException,
        MQTTClient,
        MQTTError,
        ProtocolHandlerError,
    )
    from .errors import CredentialsRefused, ProtocolError
    from .options import MQTTOptions, TopicDefaults, WillOptions
    from .server import AmqttServer, MosquittoServer, MQTTServer

__all__ = [
    "QOS_0",
    "QOS_1",
    "QOS_2",
    "AMQTTError",
    "AmqttServer",
    "ClientError",
    "ClientException",
    "ConnectError",
    "ConnectException",
    "CredentialsRefused",
    "MQTTBackend",
    "MQTTClient",
    "MQTTError",
    "MQTTOptions",
    "MQTTServer",
    "MosquittoServer",
    "ProtocolError",
    "ProtocolHandlerError",
    "TopicDefaults",
    "WillOptions",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "backend": ["MQTTBackend"],
        "client": [
            "QOS_0",
            "QOS_1",
            "QOS_2",
            "AMQTTError",
            "ClientError",
            "ClientException",
            "ConnectError",
            "ConnectException",
            "MQTTClient",
            "MQTTError",
            "ProtocolHandlerError",
        ],
        "errors": ["CredentialsRefused", "ProtocolError"],
        "options": ["MQTTOptions", "TopicDefaults", "WillOptions"],
        "server": ["AmqttServer", "MQTTServer", "MosquittoServer"],
    },
)
