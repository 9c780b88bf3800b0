"""Answers to ``mqtt://``, ``mqtts://``, ``ws://``, ``wss://`` and ``mqtt+unix://``.

Plain data: importing this imports neither paho-mqtt nor a broker. What is declared here is
the most an MQTT 5 broker allows; `MQTTBackend.probe` lowers it for the broker that answers.
"""

from __future__ import annotations

from pubsub_core.capabilities import (
    Cap,
    ConfirmedBy,
    Delivery,
    Duplicates,
    Durability,
    Guarantees,
    Limits,
    Order,
    Redelivery,
    Support,
)
from pubsub_core.hookspecs import hookimpl
from pubsub_core.interfaces import BackendInfo

from .options import MAX_PACKET, MQTTOptions

__all__ = ["GUARANTEES", "INFO", "LIMITS", "pubsub_backends"]

# Remaining length less topic, packet id and an empty property block.
_MAX_PAYLOAD = MAX_PACKET - (2 + 65535) - 2 - 1

GUARANTEES = Guarantees(
    confirmed_by=ConfirmedBy.BROKER,
    delivery=Delivery.AT_LEAST_ONCE,
    redelivery=Redelivery.NEVER,
    order=Order.PER_PUBLISHER_AND_TOPIC,
    duplicates=Duplicates.AFTER_RECONNECT,
    durability=Durability.DEPENDS_ON_BROKER,
    note=(
        "The broker's confirmation means that it took the message, not that anybody got it; "
        "brokers drop what exceeds a slow subscriber's queue (1,000 messages at Mosquitto) "
        "without telling. A message arrives with the lower of the two qualities of service, "
        "published and subscribed. With clean_start=false, or session_expiry on MQTT 5, what "
        "was not acknowledged comes again after a reconnect."
    ),
)

LIMITS = Limits(
    max_payload=_MAX_PAYLOAD,
    max_topic_bytes=65535,
    max_levels=None,
    notes={
        "levels": "Mosquitto closes the connection over a topic of more than 200 levels",
        "characters": "brokers may close the connection over control characters in a topic",
        "in_flight": "100 unconfirmed publishes (option max_inflight), or what the broker says",
    },
)

INFO = BackendInfo(
    name="mqtt",
    schemes=("mqtt", "mqtts", "ws", "wss", "mqtt+unix", "tcp", "ssl"),
    factory="pubsub_mqtt.backend:MQTTBackend",
    capabilities={
        Cap.WILDCARDS: Support.native(),
        Cap.GROUPS: Support.native("shared subscriptions"),
        Cap.RETAINED: Support.native(),
        Cap.HISTORY: Support.none(
            "brokers keep the last message of a topic only", "bus.last() gives that one"
        ),
        Cap.REPLAY: Support.none(
            "brokers keep the last message of a topic only", "publish with retain=True"
        ),
        Cap.TTL: Support.native("message expiry"),
        Cap.HEADERS: Support.native("user properties"),
        Cap.CONTENT_TYPE: Support.native(),
        Cap.PRESENCE: Support.none("MQTT does not tell who is subscribed"),
        Cap.NOTIFICATIONS: Support.none("MQTT does not tell who subscribes"),
        Cap.UNICAST: Support.none(
            "messages go to topics, not to clients", "agree on a topic for each client"
        ),
        Cap.ACK: Support.native("PUBACK and PUBREC are sent when the message is settled"),
        Cap.NACK: Support.none("MQTT delivers again only after a reconnect"),
        Cap.REDELIVERY: Support.native("after a reconnect, in a persistent session"),
        Cap.FLOW_CONTROL: Support.native("the socket is not read while deliveries are paused"),
        Cap.ECHO_CONTROL: Support.native("no-local subscriptions"),
        Cap.REFUSAL_VISIBLE: Support.native("reason codes"),
        Cap.AUTH: Support.native(),
        Cap.PERSISTENT_SESSION: Support.native("with clean_start=false or session_expiry"),
        Cap.WILL: Support.native("option will"),
        Cap.SOURCE: Support.none("MQTT does not tell who published"),
        Cap.SOURCE_LOST: Support.none("MQTT does not tell", "agree on a will"),
        Cap.ENTITLEMENTS: Support.none("rights are for whole topics"),
        Cap.AUTHORIZATION: Support.none("the broker decides by itself"),
        Cap.PING: Support.native("PINGREQ"),
    },
    guarantees=GUARANTEES,
    limits=LIMITS,
    options=MQTTOptions,
    install="pip install 'paho-mqtt>=2.1,<3'",
    dev_server="pubsub_mqtt.server:MQTTServer",
    about="any MQTT broker, 3.1.1 or 5",
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Announce the MQTT backend."""
    return [INFO]
