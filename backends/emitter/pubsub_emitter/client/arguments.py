"""Arguments of the native client, and their form on the wire.

Options, payloads, channels to subscribe to, times and addresses, in every form that emitter-io
takes or documents.

Source: emitter-io 2.3.0, ``emitter/emitter.py``, and what paho-mqtt takes as a payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias, cast

from pubsub_core.errors import BadOption
from pubsub_emitter.protocol import OLDEST_TIME, YOUNGEST_TIME, build_topic
from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings, WebSocketTarget

__all__ = [
    "Options",
    "Payload",
    "Seconds",
    "Subscription",
    "endpoint_of",
    "payload_bytes",
    "split_options",
    "subscription_topic",
    "unix_seconds",
]

Options: TypeAlias = Iterable[str] | Mapping[str, Any] | None
"""Results of ``with_…`` helpers in a list, tuple or set; or a dictionary of names and values."""

Seconds: TypeAlias = float | datetime

Payload: TypeAlias = str | bytes | bytearray | float | None
"""Text is sent as UTF-8, a number as its text, and None as nothing."""


@dataclass(slots=True)
class Subscription:
    """A subscription, to be made again after a reconnect."""

    key: str
    channel: str
    group: str
    options: tuple[tuple[str, str], ...]


def split_options(options: Options) -> tuple[frozenset[str], list[tuple[str, str]]]:
    """Return the flags of the packet, and the options of the channel."""
    if not options:
        return frozenset(), []
    if isinstance(options, Mapping):
        given = cast("Mapping[str, Any]", options)
        return frozenset(), [
            (name, str(int(value) if isinstance(value, bool) else value))
            for name, value in given.items()
        ]
    if isinstance(options, str):
        options = [options]
    flags: set[str] = set()
    query: list[tuple[str, str]] = []
    for option in options:
        if option.startswith("+"):
            flags.add(option)
        else:
            name, _, value = option.partition("=")
            query.append((name, value))
    return frozenset(flags), query


def subscription_topic(wanted: Subscription) -> str:
    """Return the topic of a SUBSCRIBE.

    MQTT takes ``#`` only at the very end, where Emitter wants a slash; the broker adds it.
    """
    segments = wanted.channel.strip("/").split("/")
    if "#" in segments:
        if wanted.options or segments.index("#") != len(segments) - 1:
            raise ValueError(
                "'#' can only stand at the end of a channel, and without options; with the "
                "broker's default matching rule the channel before it gets everything below"
            )
        topic = build_topic(wanted.key, wanted.channel, group=wanted.group)
        return topic.removesuffix("/")
    return build_topic(wanted.key, wanted.channel, wanted.options, group=wanted.group)


def unix_seconds(when: Seconds) -> int:
    """Return the whole second of a time; datetimes without a zone are UTC.

    Raises:
        ValueError: Before 2018 or after 2066, which brokers ignore without a word.
    """
    if isinstance(when, datetime):
        aware = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        when = aware.timestamp()
    try:
        seconds = int(when)
    except OverflowError:
        raise ValueError(f"{when} is no time") from None
    if not OLDEST_TIME <= seconds <= YOUNGEST_TIME:
        raise ValueError(
            f"{seconds} is not between 2018-01-01 and 2066-01-01, so brokers ignore it"
        )
    return seconds


def payload_bytes(message: Payload) -> bytes:
    """Return what is sent.

    Raises:
        TypeError: It is nothing that can be.
    """
    if isinstance(message, str):
        return message.encode()
    if isinstance(message, (bytes, bytearray)):
        return bytes(message)
    if isinstance(message, (int, float)):
        return str(message).encode()
    if message is None:
        return b""
    raise TypeError(f"a message is text, bytes, a number or None, not {type(message).__name__}")


_SCHEMES: Final = {
    "mqtt": (False, False),
    "tcp": (False, False),
    "mqtts": (True, False),
    "ssl": (True, False),
    "emitter": (False, False),
    "emitters": (True, False),
    "ws": (False, True),
    "wss": (True, True),
}


def endpoint_of(
    host: str, port: int, *, secure: bool, websocket: bool, tls: TLSSettings
) -> BrokerAddress:
    """Return where a host, in any of the forms of `Client.connect`, is.

    Raises:
        BadOption: It has an unknown scheme, or a port that is none.
    """
    scheme, mark, rest = host.partition("://")
    if mark:
        if scheme.lower() not in _SCHEMES:
            raise BadOption(
                f"no scheme {scheme!r} in host",
                option="host",
                hint=f"use one of {', '.join(_SCHEMES)}",
                backend="emitter",
            )
        secure, websocket = _SCHEMES[scheme.lower()]
        host = rest
    host, _, path = host.partition("/")
    if host.startswith("["):
        host, _, after = host[1:].partition("]")
        given = after.removeprefix(":")
    elif host.count(":") == 1:
        host, _, given = host.partition(":")
    else:
        given = ""
    if given and not given.isdecimal():
        raise BadOption(f"no port {given!r} in host", option="host", backend="emitter")
    return BrokerAddress(
        host=host,
        port=int(given) if given else port,
        tls=tls if secure else None,
        websocket=WebSocketTarget(f"/{path}") if websocket else None,
    )
