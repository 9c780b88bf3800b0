"""Announces ``lines://host:port``; imports nothing but the core."""

from __future__ import annotations

from dataclasses import dataclass

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

__all__ = ["INFO", "LinesOptions", "pubsub_backends"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinesOptions:
    """There is nothing to choose."""


INFO = BackendInfo(
    name="lines",
    schemes=("lines",),
    factory="pubsub_lines.backend:LinesBackend",
    capabilities={
        Cap.WILDCARDS: Support.native(),
        Cap.PING: Support.native("an empty request"),
        **{
            cap: Support.none("the protocol has nothing for it", "use another broker")
            for cap in Cap
            if cap not in (Cap.WILDCARDS, Cap.PING)
        },
    },
    guarantees=Guarantees(
        confirmed_by=ConfirmedBy.BROKER,
        delivery=Delivery.AT_MOST_ONCE,
        redelivery=Redelivery.NEVER,
        order=Order.PER_PUBLISHER,
        duplicates=Duplicates.NEVER,
        durability=Durability.NOTHING,
        note="A publish that was sent when the connection broke fails with the outcome "
        "'unknown'; it is not sent again.",
    ),
    limits=Limits(max_payload=1024 * 1024),
    options=LinesOptions,
    dev_server="pubsub_lines.server:LinesServer",
    about="An example: lines of JSON over TCP.",
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Answer to ``lines://``."""
    return [INFO]
