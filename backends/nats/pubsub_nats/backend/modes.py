"""What core NATS lacks, and what a stream guarantees: the two modes of one backend."""

from __future__ import annotations

import dataclasses

from pubsub_core.capabilities import (
    Cap,
    ConfirmedBy,
    Delivery,
    Duplicates,
    Durability,
    Guarantees,
    Order,
    Redelivery,
    Support,
)

__all__ = ["CORE", "DURABLE", "IN_MEMORY", "NAME_A_STREAM", "NOTHING_STORED"]

NOTHING_STORED = "core NATS stores nothing"
NAME_A_STREAM = "name a stream with stream="
_ONCE = "core NATS sends a message once"

CORE = {
    **dict.fromkeys(
        (Cap.RETAINED, Cap.HISTORY, Cap.REPLAY, Cap.PERSISTENT_SESSION),
        Support.none(NOTHING_STORED, NAME_A_STREAM),
    ),
    **dict.fromkeys((Cap.ACK, Cap.NACK, Cap.REDELIVERY), Support.none(_ONCE, NAME_A_STREAM)),
    **dict.fromkeys(
        (Cap.PRESENCE, Cap.NOTIFICATIONS),
        Support.none(
            "the server tells nobody who is subscribed", f"{NAME_A_STREAM} and presence=true"
        ),
    ),
    Cap.TTL: Support.emulated("the receiver drops what came too late, by its own clock"),
    Cap.FLOW_CONTROL: Support.none(
        "the server buffers 64 MiB for a slow client, then cuts it off", NAME_A_STREAM
    ),
}
"""What a bus without a stream lacks."""

DURABLE = Guarantees(
    confirmed_by=ConfirmedBy.BROKER,
    delivery=Delivery.AT_LEAST_ONCE,
    redelivery=Redelivery.ON_NACK_OR_TIMEOUT,
    order=Order.PER_PUBLISHER_AND_TOPIC,
    duplicates=Duplicates.AFTER_REDELIVERY,
    durability=Durability.STORED_MESSAGES,
    note="A receipt says that the stream has stored the message. With one replica a power failure "
    "may take the last two minutes: use replicas=3, or sync_interval: always at the server.",
)
IN_MEMORY = dataclasses.replace(
    DURABLE,
    durability=Durability.NOTHING,
    note="A receipt says that the stream has the message, in the memory of its servers.",
)
