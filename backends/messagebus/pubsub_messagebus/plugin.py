"""Answers to ``messagebus://``, ``messagebus+tls://`` and ``jetblack://``; plain data."""

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

from .options import MAX_PAYLOAD, MessageBusOptions

__all__ = ["INFO", "pubsub_backends"]

_NOTHING_STORED = "the distributor stores nothing"

INFO = BackendInfo(
    name="messagebus",
    schemes=("messagebus", "messagebus+tls", "jetblack"),
    factory="pubsub_messagebus.backend:MessageBusBackend",
    about="a jetblack messagebus: feeds, images on demand, entitlements",
    capabilities={
        Cap.WILDCARDS: Support.none(
            "the distributor compares names", "subscribe to each topic, or watch notifications"
        ),
        Cap.GROUPS: Support.none("every subscriber gets every message"),
        Cap.RETAINED: Support.none(
            _NOTHING_STORED, "watch notifications, and send newcomers an image with send_to()"
        ),
        Cap.HISTORY: Support.none(_NOTHING_STORED),
        Cap.REPLAY: Support.none(
            _NOTHING_STORED, "watch notifications, and send newcomers an image with send_to()"
        ),
        Cap.TTL: Support.none(_NOTHING_STORED),
        Cap.HEADERS: Support.none("a message carries packets only", "put them into the payload"),
        Cap.CONTENT_TYPE: Support.native("in the dialect content_type"),
        Cap.PRESENCE: Support.emulated("derived from the notifications of the feed"),
        Cap.NOTIFICATIONS: Support.native(),
        Cap.UNICAST: Support.native("to a member that is subscribed to the topic"),
        Cap.ACK: Support.none("messages are not acknowledged"),
        Cap.NACK: Support.none("messages are not acknowledged"),
        Cap.REDELIVERY: Support.none("messages are sent once"),
        Cap.FLOW_CONTROL: Support.none("the distributor queues for a slow client, or drops it"),
        Cap.ECHO_CONTROL: Support.none("a subscribed publisher gets its own messages"),
        Cap.REFUSAL_VISIBLE: Support.none("unauthorized requests are silently ignored"),
        Cap.AUTH: Support.native(),
        Cap.PERSISTENT_SESSION: Support.none(_NOTHING_STORED),
        Cap.WILL: Support.none(
            "nothing is published for a client", "its subscribers get the notice source_lost"
        ),
        Cap.SOURCE: Support.native("user and host of the publisher"),
        Cap.SOURCE_LOST: Support.native("stale topics"),
        Cap.ENTITLEMENTS: Support.native("on feeds that need authorization"),
        Cap.AUTHORIZATION: Support.native(),
        Cap.PING: Support.emulated("a private subscription that comes back as a notification"),
    },
    guarantees=Guarantees(
        confirmed_by=ConfirmedBy.TRANSPORT,
        delivery=Delivery.AT_MOST_ONCE,
        redelivery=Redelivery.NEVER,
        order=Order.PER_PUBLISHER,
        duplicates=Duplicates.NEVER,
        durability=Durability.NOTHING,
        note="Nothing is acknowledged: a receipt says that the operating system took the "
        "message. Unauthorized requests are silently ignored.",
    ),
    limits=Limits(
        max_payload=MAX_PAYLOAD,
        max_topic_bytes=65535,
        allow_empty_levels=False,
        notes={"entitlements": "numbers of 32 bits, at most 65,536 of them on a part"},
    ),
    options=MessageBusOptions,
    dev_server="pubsub_messagebus.server:MessageBusServer",
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Announce the messagebus backend."""
    return [INFO]
