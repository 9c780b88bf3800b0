"""Announces ``memory://``; imports nothing that costs."""

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

from .options import MemoryOptions

__all__ = ["INFO", "pubsub_backends"]

INFO = BackendInfo(
    name="memory",
    schemes=("memory",),
    factory="pubsub_core.memory.backend:MemoryBackend",
    about="In this process: the reference, and the broker of tests.",
    capabilities={
        **{cap: Support.native() for cap in Cap if cap is not Cap.SOURCE_LOST},
        Cap.SOURCE_LOST: Support.none("publishers in one process do not vanish unnoticed"),
        Cap.ENTITLEMENTS: Support.native("on the topics of the option guarded"),
    },
    guarantees=Guarantees(
        confirmed_by=ConfirmedBy.BROKER,
        delivery=Delivery.AT_LEAST_ONCE,
        redelivery=Redelivery.ON_NACK_OR_TIMEOUT,
        order=Order.PER_PUBLISHER,
        duplicates=Duplicates.AFTER_REDELIVERY,
        durability=Durability.NOTHING,
        note="At least once with ack='manual'; otherwise a message is handled when the "
        "handler returns. Everything is gone when the process ends.",
    ),
    limits=Limits(max_payload=256 * 1024 * 1024),
    options=MemoryOptions,
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Answer to ``memory://``."""
    return [INFO]
