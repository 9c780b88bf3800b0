"""Answers to ``nats://``, ``nats+tls://``, ``nats+ws://`` and ``nats+wss://``; plain data."""

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

from .options import NatsOptions
from .subjects import FORBIDDEN, MAX_SUBJECT

__all__ = ["INFO", "pubsub_backends"]

_HEADER = "a header, which other clients of NATS see as one"

INFO = BackendInfo(
    name="nats",
    schemes=("nats", "nats+tls", "nats+ws", "nats+wss"),
    factory="pubsub_nats.backend:NatsBackend",
    about="NATS: fast, clustered, and one with the MQTT devices of the same server",
    install="pip install 'pubsub-core[nats]'",
    capabilities={
        Cap.WILDCARDS: Support.native(),
        Cap.GROUPS: Support.native("queue groups"),
        Cap.RETAINED: Support.emulated("a second stream of last values, with stream="),
        Cap.HISTORY: Support.native("with stream="),
        Cap.REPLAY: Support.native("with stream="),
        Cap.TTL: Support.native("with stream= and nats-server 2.11; else the receiver drops it"),
        Cap.HEADERS: Support.native(),
        Cap.CONTENT_TYPE: Support.emulated(_HEADER),
        Cap.PRESENCE: Support.emulated("a key of each client, with stream= and presence=true"),
        Cap.NOTIFICATIONS: Support.emulated("a key of each client, with stream= and presence=true"),
        Cap.UNICAST: Support.none("the server knows subjects, not members"),
        Cap.ACK: Support.native("with stream="),
        Cap.NACK: Support.native("with stream="),
        Cap.REDELIVERY: Support.native("with stream="),
        Cap.FLOW_CONTROL: Support.native("with stream="),
        Cap.ECHO_CONTROL: Support.emulated("a header says who published"),
        Cap.REFUSAL_VISIBLE: Support.native(),
        Cap.AUTH: Support.native(),
        Cap.PERSISTENT_SESSION: Support.native("with stream= and client_id="),
        Cap.WILL: Support.none("nothing is published for a client"),
        Cap.SOURCE: Support.none("the server tells nobody who published"),
        Cap.SOURCE_LOST: Support.none("the server tells nobody who is gone"),
        Cap.ENTITLEMENTS: Support.none("rights are those of a subject"),
        Cap.AUTHORIZATION: Support.none("the server asks no client"),
        Cap.PING: Support.native(),
    },
    guarantees=Guarantees(
        confirmed_by=ConfirmedBy.BROKER,
        delivery=Delivery.AT_MOST_ONCE,
        redelivery=Redelivery.NEVER,
        order=Order.PER_PUBLISHER,
        duplicates=Duplicates.NEVER,
        durability=Durability.NOTHING,
        note="A receipt says that the server read the message, allowed it and passed it to those "
        "who listened; it stores nothing. With stream= a receipt says that the message is stored, "
        "delivery is at least once and what is stored survives.",
    ),
    limits=Limits(
        max_payload=1024 * 1024,
        max_topic_bytes=MAX_SUBJECT,
        forbidden_characters=FORBIDDEN,
        notes={
            "max_payload": "headers count as well; the server tells its own limit",
            "topics": "no level is * or >; the first begins with no $ and is none of _INBOX, "
            "_R_, _GR_",
        },
    ),
    options=NatsOptions,
    dev_server="pubsub_nats.server:NatsServer",
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Announce the NATS backend."""
    return [INFO]
