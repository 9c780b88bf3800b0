"""Answers to ``losant://`` and ``losant+ws://``; plain data.

What the platform does not document is declared as missing, or said in a note.
"""

from __future__ import annotations

from dataclasses import replace

from pubsub_core.capabilities import AT_MOST_ONCE, Cap, Limits, Support
from pubsub_core.hookspecs import hookimpl
from pubsub_core.interfaces import BackendInfo

from .options import LosantOptions
from .pacing_rules import RATE, RATE_PER_TOPIC
from .topics import MAX_PAYLOAD

__all__ = ["INFO", "pubsub_backends"]

_CLEAN = "the platform has clean sessions only"
_PLAIN = "a message is its payload"

INFO = BackendInfo(
    name="losant",
    schemes=("losant", "losant+ws"),
    factory="pubsub_losant.backend:LosantBackend",
    about="a device of Losant: its state, its commands",
    capabilities={
        Cap.WILDCARDS: Support.native(
            "in topics of your own and below their first level; the platform's own topics are "
            "subscribed to by name"
        ),
        Cap.GROUPS: Support.none(
            "the platform takes no topic that begins with $",
            "subscribe with one device and share the work out in the program",
        ),
        Cap.RETAINED: Support.none(
            "the platform ends the connection over a retained message",
            "publish to state: the platform stores it, and its REST API gives the last one",
        ),
        Cap.HISTORY: Support.none(
            "MQTT gives what is sent now", "the platform's REST API has the states of a device"
        ),
        Cap.REPLAY: Support.none(
            "MQTT gives what is sent now", "the platform's REST API has the states of a device"
        ),
        Cap.TTL: Support.none("messages do not expire", "give a state its time"),
        Cap.HEADERS: Support.none(
            _PLAIN, "put them into the payload; DeviceState has time= and meta="
        ),
        Cap.CONTENT_TYPE: Support.none(_PLAIN, "agree on one for each topic"),
        Cap.PRESENCE: Support.none(
            "MQTT does not tell who is subscribed",
            "the platform's REST API has the connection log of a device",
        ),
        Cap.NOTIFICATIONS: Support.none(
            "MQTT does not tell who subscribes",
            "the platform's REST API has the connection log of a device",
        ),
        Cap.UNICAST: Support.none(
            "messages go to topics, not to clients",
            "a workflow or the REST API sends a command to one device",
        ),
        Cap.ACK: Support.none("deliveries have quality of service 0"),
        Cap.NACK: Support.none("deliveries have quality of service 0"),
        Cap.REDELIVERY: Support.none("a command that a device misses is not sent again"),
        Cap.FLOW_CONTROL: Support.none("the fate of messages for a slow reader is not documented"),
        Cap.ECHO_CONTROL: Support.none("a subscriber gets its own messages, too"),
        Cap.REFUSAL_VISIBLE: Support.none(
            "the platform ends the connection over a message that it refuses, without a word",
            "the connection log of the device has the reason",
        ),
        Cap.AUTH: Support.native("access key and secret, or a certificate"),
        Cap.PERSISTENT_SESSION: Support.none(_CLEAN),
        Cap.WILL: Support.native("option will; not retained"),
        Cap.SOURCE: Support.none(
            "only a topic tells who published", "the topic of a state has the device's id"
        ),
        Cap.SOURCE_LOST: Support.none("the platform does not tell", "agree on a will"),
        Cap.ENTITLEMENTS: Support.none("access keys are for whole topics"),
        Cap.AUTHORIZATION: Support.none("the platform decides by itself, from access keys"),
        Cap.PING: Support.native("PINGREQ"),
    },
    guarantees=replace(
        AT_MOST_ONCE,
        note=(
            "The confirmation means that the platform took the message; a state with attributes "
            "that it does not know is confirmed like any other. Commands that are sent while a "
            "device is away are lost. The platform stores states, and nothing else."
        ),
    ),
    limits=Limits(
        max_payload=MAX_PAYLOAD,
        max_topic_bytes=65535,
        rate=RATE,
        rate_per_topic=RATE_PER_TOPIC,
        notes={
            "rate": "kept at the platform and with rate_guard=true; who exceeds it is "
            "disconnected and banned for 30 seconds, and longer each time",
            "qos": "publish 0 or 1; deliveries have 0",
            "names": "of the topics that begin with losant only those of devices can be used",
            "state": "attributes are numbers, text up to 64 KiB and booleans; times from 30 days "
            "ago to one day ahead",
        },
    ),
    options=LosantOptions,
    install="pip install 'paho-mqtt>=2.1,<3'",
    dev_server="pubsub_losant.server:LosantServer",
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Announce the Losant backend."""
    return [INFO]
