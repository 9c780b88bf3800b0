"""Sizes, times and rules of a service, and HTTP on its port: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .packets import STRICT, Leniency

__all__ = ["HttpRequest", "HttpResponse", "Profile"]


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes, times and rules of a service.

    Attributes:
        levels: Protocol names and levels that are accepted. Another level is answered with
            return code 1.
        answer_other_names: Whether a CONNECT with another protocol name is answered so, too,
            before it is closed.
        max_packet: Largest remaining length once CONNECT was accepted.
        max_early_packet: The same before that.
        handshake: Seconds from the connection to the end of CONNECT, TLS and WebSocket included.
        idle: Seconds of silence that a client without keepalive may keep; None for no limit.
        max_queue: Bytes that may wait for a client that does not read.
        slow_reader: What happens beyond: the client is closed, or what does not fit is
            dropped. Both are counted.
        max_received: Messages at QoS 2 that may wait for their PUBREL.
        max_filters: Filters in one SUBSCRIBE or UNSUBSCRIBE.
        sniff: Whether the first byte tells HTTP and WebSocket from MQTT on the same port.
        subprotocols: WebSocket subprotocols, the preferred first. A client that offers none
            of them is accepted without.
        text_frames: Whether WebSocket text frames are taken for bytes.
        leniency: What is forgiven in packets.
    """

    levels: frozenset[tuple[str, int]] = frozenset({("MQTT", 4)})
    answer_other_names: bool = False
    max_packet: int = 1_048_576
    max_early_packet: int = 65_536
    handshake: float = 10.0
    idle: float | None = None
    max_queue: int = 16 * 1_048_576
    slow_reader: Literal["close", "drop"] = "close"
    max_received: int = 4096
    max_filters: int = 1000
    sniff: bool = True
    subprotocols: tuple[str, ...] = ("mqtt",)
    text_frames: bool = False
    leniency: Leniency = STRICT


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request that is no WebSocket upgrade.

    Attributes:
        path: Without the query, which is in *query*.
        headers: Names in lower case.
    """

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """An answer; the connection is closed after it."""

    status: int = 200
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
