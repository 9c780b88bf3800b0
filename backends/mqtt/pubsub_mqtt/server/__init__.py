"""MQTT brokers for development and tests, and `endpoint`, on which other services' are built.

Nothing is imported until it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pubsub_core.lazy import lazy_names

if TYPE_CHECKING:
    from .amqtt import AmqttServer
    from .mosquitto import MosquittoServer, find_mosquitto
    from .mqtt import MQTTServer
    from .tls import ServerTLS

__all__ = ["AmqttServer", "MQTTServer", "MosquittoServer", "ServerTLS", "find_mosquitto"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "amqtt": ["AmqttServer"],
        "mosquitto": ["MosquittoServer", "find_mosquitto"],
        "mqtt": ["MQTTServer"],
        "tls": ["ServerTLS"],
    },
)
