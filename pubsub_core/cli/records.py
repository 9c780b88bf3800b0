"""The JSON that commands print of messages, gaps, members and interest, as documented."""

from __future__ import annotations

from typing import Any

from pubsub_core.events import Gap, InterestEvent
from pubsub_core.message import Member, Message

from .output import payload_record

__all__ = ["event_record", "gap_record", "member_record", "message_record"]


def message_record(message: Message[Any]) -> dict[str, Any]:
    """Return the documented JSON keys of a message."""
    return {
        "type": "message",
        "topic": message.topic,
        **payload_record(message.raw),
        "params": dict(message.params),
        "origin": message.origin.value,
        "qos": message.qos,
        "time": message.time,
        "headers": [list(pair) for pair in message.headers.pairs],
        "content_type": message.content_type,
        "id": message.id,
        "source": member_record(message.source),
        "redelivered": message.redelivered,
        "expires_in": message.expires_in,
    }


def gap_record(gap: Gap) -> dict[str, Any]:
    """Return the documented JSON keys of a gap."""
    return {
        "type": "gap",
        "reason": gap.reason.value,
        "lost": gap.lost,
        "recovered": gap.recovered,
        "since": gap.since,
        "until": gap.until,
    }


def event_record(event: InterestEvent) -> dict[str, Any]:
    """Return the documented JSON keys of an event of interest."""
    return {
        "type": "interest",
        "kind": event.kind.value,
        "topic": event.topic,
        "member": member_record(event.member),
        "reason": event.reason,
    }


def member_record(member: Member | None) -> dict[str, Any] | None:
    """Return the documented JSON keys of a member."""
    if member is None:
        return None
    return {"id": member.id, "name": member.name, "host": member.host}
