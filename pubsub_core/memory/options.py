"""Options of ``memory://``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from pubsub_core.secrets import Secret

__all__ = ["MemoryOptions", "MemoryWill"]


@dataclass(frozen=True, slots=True)
class MemoryWill:
    """A message published for a bus whose session is lost, not for one that is closed."""

    topic: str
    payload: str = ""
    retain: bool = False


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """Options of ``memory://``. Times are seconds."""

    client_id: str = field(
        default="", metadata=_help("identity shown to others; made at random when empty")
    )
    username: str = field(default="", metadata=_help("user name shown to others"))
    password: Secret | None = field(
        default=None, metadata=_help("checked when the space was told to allow users only")
    )
    persistent: bool = field(
        default=False,
        metadata=_help("keep subscriptions and messages while the session is lost"),
    )
    ack_timeout: float = field(
        default=30.0, metadata=_help("redeliver messages that stay unacknowledged for so long")
    )
    history: int = field(
        default=10_000, metadata=_help("most messages the space stores; set by its first bus")
    )
    rate: Annotated[int, Meta(ge=1)] | None = field(
        default=None, metadata=_help("most messages a second, as some brokers allow")
    )
    guarded: tuple[str, ...] = field(
        default=(),
        metadata=_help("filters of the topics that nobody sees unless an authorizer lets them"),
    )
    will: MemoryWill | None = field(
        default=None, metadata=_help("message published when the session is lost")
    )
