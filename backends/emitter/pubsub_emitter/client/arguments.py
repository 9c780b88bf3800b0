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
from pubsub_emitter.protocol import (
    OLDEST_TIME,
    SHARE,
    YOUNGEST_TIME,
    build_topic,
    is_link_name,
    is_option,
)
from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings, WebSocketTarget

__all__ = [
    "Options",
    "Payload",
    "Seconds",
    "Subscription",
    "checked_channel",
    "checked_group",
    "checked_key",
    "checked_link",
    "endpoint_of",
    "payload_bytes",
    "split_options",
    "subscription_topic",
    "unix_seconds",
]

Options: TypeAlias = Iterable[str] | Mapping[str, Any] | None
"""Results of ``with_…`` helpers in a list, tuple or set; or a dictionary of names and values."""

Seconds: TypeAlias = float | datetime

_FLAGS: Final = frozenset({"+r", "+0", "+1"})

Payload: TypeAlias = str | bytes | bytearray | float | None
"""Text is sent as UTF-8, a number as its text, and None as nothing."""


@dataclass(slots=True)
class Subscription:
    """A subscription, to be made again after a reconnect."""

    key: str
    channel: str
    group: str
    options: tuple[tuple[str, str], ...]


def checked_key(key: str, option: str = "key") -> str:
    """Return *key* as it is sent, without slashes around it.

    Raises:
        BadOption: Nothing is left of it, or it has a slash, after which the channel would begin.
    """
    text = key.strip("/")
    if not text or "/" in text:
        raise BadOption(
            f"{option} is {'no key: it has a slash within' if text else 'empty'}",
            option=option,
            hint="give the 32 characters that keygen returned",
            backend="emitter",
        )
    return text


def checked_group(group: str) -> str:
    """Return the name of a share group as it is sent, without slashes around it.

    Raises:
        BadOption: Nothing is left of it, so that every member would get every message, or it is
            more than one segment, so that the channel would be another one.
    """
    name = group.strip("/")
    if not name or any(character in name for character in "/+#*"):
        raise BadOption(
            f"share_group {group!r} is no name" if name else "share_group is empty",
            option="share_group",
            hint="use one segment of A-Z a-z 0-9 and $ - . : [ \\ ] ^ _ `; for an ordinary "
            "subscription call subscribe",
            backend="emitter",
        )
    return name


def checked_channel(channel: str) -> str:
    """Return *channel*; what else the broker refuses, the broker tells.

    Raises:
        BadOption: It is empty, or has an empty segment, which SUBSCRIBE drops: another channel
            would be meant, and of ``$share//jobs`` every channel.
    """
    inner = channel.strip("/")
    segments = inner.partition("/?")[0].split("/")
    incomplete = segments[0] == SHARE and len(segments) < 3
    if not all(segments) or incomplete:
        raise BadOption(
            f"channel {channel!r} "
            + ("has no channel after its group" if incomplete else "has an empty segment")
            if inner
            else "channel is empty",
            option="channel",
            hint="name every segment, as in demo/room/",
            backend="emitter",
        )
    return channel


def checked_link(name: str) -> str:
    """Return the name of a link.

    Raises:
        BadOption: It can be none: the broker takes what is longer for a key and a channel.
    """
    if not is_link_name(name):
        raise BadOption(
            "the name of a link is not one or two letters or digits",
            option="name",
            hint="use one like 'a0'",
            backend="emitter",
        )
    return name


def split_options(options: Options) -> tuple[frozenset[str], list[tuple[str, str]]]:
    """Return the flags of the packet, and the options of the channel.

    Raises:
        BadOption: One of them is no ``name=value`` of letters and digits, and no flag.
    """
    if options is None:
        return frozenset(), []
    flags: set[str] = set()
    query: list[tuple[str, str]] = []
    if isinstance(options, Mapping):
        given = cast("Mapping[str, Any]", options)
        query = [
            (name, str(int(value) if isinstance(value, bool) else value))
            for name, value in given.items()
        ]
    else:
        for option in [options] if isinstance(options, str) else options:
            if option in _FLAGS:
                flags.add(option)
            else:
                name, _, value = option.partition("=")
                query.append((name, value))
    for name, value in query:
        if not is_option(name, value):
            raise BadOption(
                f"option {name!r} has the value {value!r}" if name else "an option is empty",
                option="options",
                hint="use the with_… helpers, or name=value of letters and digits",
                backend="emitter",
            )
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
