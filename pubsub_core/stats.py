"""Counters of a bus, for people and for metrics."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BusStats"]


@dataclass(slots=True)
class BusStats:
    """Counters of one bus.

    Attributes:
        published: Publishes that succeeded.
        failed: Publishes that did not.
        received: Messages that the backend delivered.
        unrouted: Of these, messages that no subscription wanted any more.
        offline: Messages waiting for a session now.
        overflowed: Messages that arrived and were dropped by a subscription's overflow policy,
            ended subscriptions included.
        dropped: Publishes dropped by the offline policy, or by its overflow policy.
        handler_failures: Messages whose handler or decoding raised.
        dead_letters: Messages published to a dead-letter topic.
        sessions: Sessions that were online so far.
        gaps: Sessions that could not say that nothing is missing.
    """

    published: int = 0
    failed: int = 0
    received: int = 0
    unrouted: int = 0
    offline: int = 0
    overflowed: int = 0
    dropped: int = 0
    handler_failures: int = 0
    dead_letters: int = 0
    sessions: int = 0
    gaps: int = 0
