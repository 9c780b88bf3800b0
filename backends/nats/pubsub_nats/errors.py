"""The server's words for what went wrong, as errors of the core.

Source: the texts were seen on nats-server 2.9.10 and 2.15.1, or read in its source.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    ConnectTimeout,
    Outcome,
    PayloadTooLarge,
    PublishNotAuthorized,
    ServerRefused,
    SubscribeNotAuthorized,
)

from .protocol import unquote

__all__ = [
    "Refusal",
    "fatal",
    "payload_too_large",
    "printable",
    "publish_denied",
    "refusal",
    "subscribe_denied",
]

_SHOWN = 200
_DENIED = re.compile(
    r'permissions violation for (publish|subscription) to "((?:[^"\\]|\\.)*)"'
    r'(?: using queue "((?:[^"\\]|\\.)*)")?',
    re.IGNORECASE | re.DOTALL,
)
_TOO_MANY = "maximum subscriptions exceeded"


class Refusal(NamedTuple):
    """An operation that the server refused; the session goes on.

    Attributes:
        kind: ``publish``, ``subscription``, or ``limit`` for one subscription too many.
    """

    kind: str
    subject: bytes = b""
    queue: bytes = b""


def refusal(text: str) -> Refusal | None:
    """Return what an error refuses, or None where it concerns the whole connection."""
    found = _DENIED.match(text)
    if found is not None:
        return Refusal(
            found[1].lower(), unquote(found[2]).encode(), unquote(found[3] or "").encode()
        )
    if text.lower().startswith(_TOO_MANY):
        return Refusal("limit")
    return None


def printable(text: str) -> str:
    """Return *text* of a peer as it may be shown: short, and on one line."""
    short = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return "".join(each if each.isprintable() else "·" for each in short)


def fatal(text: str, where: str) -> ConnectError:
    """Return the error for a text after which the server closes the connection."""
    lower = text.lower()
    if lower.startswith(("authorization violation", "user authentication", "account auth")):
        return AuthenticationFailed(
            f"{where} refused the credentials: {printable(text)}",
            hint="look at user name, password, token, nkey_seed or credentials, and whether "
            "they expired",
            backend="nats",
        )
    if lower.startswith("authentication timeout"):
        return ConnectTimeout(
            f"{where} waited for the credentials in vain",
            hint="is one of the machines overloaded?",
            backend="nats",
        )
    if lower.startswith("maximum connections exceeded"):
        return ServerRefused(
            f"{where} has as many connections as it may",
            hint="raise max_connections there, or close others",
            backend="nats",
            retryable=True,
        )
    return ConnectError(
        f"{where} ended the session: {printable(text)}",
        hint="look at the server's log",
        backend="nats",
    )


def publish_denied(topic: str) -> PublishNotAuthorized:
    """Return the error for a publish that the server's permissions deny."""
    return PublishNotAuthorized(
        f"the server's permissions deny publishing to {topic!r}",
        outcome=Outcome.REJECTED,
        hint="ask for the right to publish there",
        backend="nats",
        topic=topic,
    )


def subscribe_denied(filter: str, group: str | None = None) -> SubscribeNotAuthorized:
    """Return the error for a subscription that the server's permissions deny."""
    queue = "" if group is None else f" in the group {group!r}"
    return SubscribeNotAuthorized(
        f"the server's permissions deny subscribing to {filter!r}{queue}",
        hint="ask for the right to subscribe there",
        backend="nats",
        topic=filter,
    )


def payload_too_large(size: int, limit: int, topic: str) -> PayloadTooLarge:
    """Return the error for a payload that is too large together with its headers."""
    return PayloadTooLarge(
        size=size,
        limit=limit,
        hint="headers count as well; send less, or raise max_payload at the server",
        backend="nats",
        topic=topic,
    )
