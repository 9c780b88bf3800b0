"""`MQTTClient`: MQTT for asyncio on its own, with the names of amqtt's client."""

from __future__ import annotations

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
from .config import ClientConfig
from .messages import IncomingApplicationMessage, OutgoingApplicationMessage

__all__ = [
    "QOS_0",
    "QOS_1",
    "QOS_2",
    "AMQTTError",
    "ClientConfig",
    "ClientError",
    "ClientException",
    "ConnectError",
    "ConnectException",
    "IncomingApplicationMessage",
    "MQTTClient",
    "MQTTError",
    "OutgoingApplicationMessage",
    "ProtocolHandlerError",
]
