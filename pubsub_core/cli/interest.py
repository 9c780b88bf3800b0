"""How ``pubsub presence`` and ``pubsub notifications`` tell of subscriptions."""

from __future__ import annotations

import datetime as dt
from typing import Any

from pubsub_core.events import InterestEvent
from pubsub_core.message import Member

from .output import Output, encode, escape
from .records import event_record
from .running import deadline

__all__ = ["describe_event", "follow", "member_name"]


def describe_event(event: InterestEvent) -> str:
    """Return one line for people."""
    parts = (event.kind.value, member_name(event.member), event.topic)
    why = f" ({event.reason})" if event.reason else ""
    return " ".join(part for part in parts if part) + why


async def follow(
    output: Output, writer: Any, events: Any, count: int | None, exit_after: float | None
) -> bool:
    """Print *events* until the *count*; return whether that, or the time, was reached."""
    seen = 0
    async with deadline(exit_after) as timeout:
        async for event in events:
            await writer.write(_line(output, event))
            seen += 1
            if count is not None and seen >= count:
                return True
    return count is None and timeout.expired()


def member_name(member: Member | None) -> str:
    """Return a member for people."""
    if member is None:
        return ""
    beside = ", ".join(part for part in (member.name, member.host) if part)
    return f"{member.id} ({beside})" if beside else member.id


def _line(output: Output, event: InterestEvent) -> bytes:
    if output.json:
        return encode(event_record(event)).encode() + b"\n"
    clock = dt.datetime.now().astimezone().strftime("%H:%M:%S")
    return f"{clock} {escape(describe_event(event))}\n".encode()
