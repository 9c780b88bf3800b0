"""The cases of the contract, in their order."""

from __future__ import annotations

from pubsub_core.testing.case import Case, cases_of

from . import (
    ack,
    delivery,
    facade,
    interest,
    lifecycle,
    metadata,
    outage,
    pressure,
    registration,
    storage,
    topics,
)

__all__ = ["CASES"]

CASES: tuple[Case, ...] = tuple(
    found
    for module in (
        registration,
        lifecycle,
        delivery,
        topics,
        metadata,
        ack,
        pressure,
        outage,
        interest,
        storage,
        facade,
    )
    for found in cases_of(vars(module).values())
)
"""Every case; the audit of the errors comes last."""
