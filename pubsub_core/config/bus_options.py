"""Options that every bus has, whatever its backend.

They can stand in the URL's query, in ``pubsub.toml``, in the environment, or be arguments
of `pubsub_core.connect`; a backend's own options stand beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from pubsub_core.capabilities import Cap
from pubsub_core.codecs import CodecRule

__all__ = ["BusOptions", "OfflineOverflow", "OfflinePolicy", "OverflowPolicy"]

OverflowPolicy = Literal["drop_oldest", "drop_newest", "latest", "error", "block"]
OfflinePolicy = Literal["raise", "buffer", "drop"]
OfflineOverflow = Literal["error", "block", "drop_oldest", "drop_newest"]

_Seconds = Annotated[float, Meta(ge=0)]
_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(ge=1)]


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, slots=True, kw_only=True)
class BusOptions:
    """Options of a bus. Times are seconds, sizes bytes."""

    wait: bool | _Seconds = field(
        default=True,
        metadata=_help(
            "true: the first session must come up at once; seconds: keep trying that long; "
            "false: start offline"
        ),
    )
    connect_timeout: _Positive = field(
        default=10.0, metadata=_help("deadline of one attempt to make a session")
    )
    timeout: _Positive = field(
        default=30.0, metadata=_help("default deadline of publish, subscribe and requests")
    )
    drain: _Seconds = field(default=10.0, metadata=_help("how long close() may take"))
    qos: Annotated[int, Meta(ge=0, le=2)] = field(
        default=1, metadata=_help("default quality of service, 0, 1 or 2")
    )
    echo: bool = field(
        default=True, metadata=_help("false: do not receive this bus's own messages")
    )
    codec: str = field(
        default="json",
        metadata=_help("codec of values that are neither bytes nor text: json, msgpack, …"),
    )
    codecs: tuple[CodecRule, ...] = field(
        default=(), metadata=_help("rules {match, codec}; the first that matches wins")
    )
    offline: OfflinePolicy = field(
        default="raise", metadata=_help("how publish acts while there is no session")
    )
    offline_messages: _Count = field(
        default=10_000, metadata=_help("most messages queued while offline='buffer'")
    )
    offline_bytes: _Count = field(
        default=16 * 1024 * 1024, metadata=_help("most payload bytes queued while offline='buffer'")
    )
    offline_age: _Positive | None = field(
        default=None, metadata=_help("discard messages queued longer than this")
    )
    offline_overflow: OfflineOverflow = field(
        default="error", metadata=_help("policy for a full offline buffer")
    )
    buffer: _Count = field(default=1024, metadata=_help("most messages a subscription keeps"))
    buffer_bytes: _Count = field(
        default=16 * 1024 * 1024, metadata=_help("most payload bytes a subscription keeps")
    )
    overflow: OverflowPolicy = field(
        default="drop_oldest", metadata=_help("policy for a full buffer of a subscription")
    )
    reconnect: bool = field(default=True, metadata=_help("make a new session when one is lost"))
    reconnect_first: _Seconds = field(
        default=0.5, metadata=_help("bound of the first, random delay before reconnecting")
    )
    reconnect_max: _Positive = field(
        default=30.0, metadata=_help("bound of the delay, which doubles up to it")
    )
    require: tuple[Cap, ...] = field(
        default=(), metadata=_help("capabilities without which connecting fails")
    )
    middleware: tuple[str, ...] = field(
        default=(), metadata=_help("names of registered middleware, outermost first")
    )
