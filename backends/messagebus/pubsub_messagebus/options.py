"""Options of ``messagebus://``. Plain data. Times are seconds, sizes bytes."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any, Literal

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret

__all__ = ["MAX_PAYLOAD", "MessageBusOptions"]

MAX_PAYLOAD = 0xFFFFFF - 4 * (4 + 65536) - 64
"""Bytes of a payload that fit a message with the longest names."""


def _help(text: str, **more: object) -> dict[str, object]:
    return {"help": text, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageBusOptions:
    """Options of a connection to a distributor.

    `username` and `password` here win over those in the URL.
    """

    username: str | None = field(default=None, metadata=_help("wins over the URL's user"))
    password: Secret | None = field(default=None, metadata=_help("wins over the URL's password"))
    token: Secret | None = field(
        default=None, metadata=_help("log in with a token (a JWT) instead of a password")
    )
    impersonating: str | None = field(
        default=None, metadata=_help("user to count as, where the server allows it")
    )
    forwarded_for: str | None = field(
        default=None, metadata=_help("host to count as, where the server allows it")
    )
    application: str | None = field(
        default=None, metadata=_help("name of the program, for the server's metrics")
    )
    handshake: Literal["strings", "connection-string"] = field(
        default="connection-string",
        metadata=_help("strings: for servers up to 3.0; all later ones: connection-string"),
    )
    dialect: Literal["is_image", "content_type"] = field(
        default="is_image", metadata=_help("content_type: for servers from 6.0.0-alpha.6")
    )
    feed: str | None = field(
        default=None, metadata=_help("put every topic into this feed; default: the first level")
    )
    feeds: tuple[str, ...] = field(
        default=(), metadata=_help("names of feeds that have more than one level")
    )
    images: Literal["unicast", "always", "never"] = field(
        default="unicast",
        metadata=_help("which messages are sent as images, i.e. as the complete state"),
    )
    everyone: int | None = field(
        default=None,
        metadata=_help(
            "entitlement that stands for everybody; without it, parts with no entitlements "
            "reach nobody on feeds that need authorization"
        ),
    )
    keepalive: float = field(
        default=30.0,
        metadata=_help("ask the server for a sign of life after so long a silence; 0: never"),
    )
    ca_file: str | None = field(default=None, metadata=_help("certificate authorities, PEM"))
    cert_file: str | None = field(default=None, metadata=_help("client certificate, PEM"))
    key_file: str | None = field(default=None, metadata=_help("its key, PEM"))
    insecure_skip_verify: bool = field(
        default=False, metadata=_help("accept any certificate; for tests only")
    )
    ssl_context: Any = field(
        default=None,
        repr=False,
        metadata=_help("an ssl.SSLContext instead of the above; only in code", code_only=True),
    )

    def __post_init__(self) -> None:
        if self.keepalive < 0:
            raise self._bad("keepalive", self.keepalive, "seconds, 0 or more")
        if self.feed is not None and self.feeds:
            raise self._bad("feeds", self.feeds, "either feed or feeds")
        if any(not name or "//" in name or name.strip("/") != name for name in self.feeds):
            raise self._bad("feeds", self.feeds, "names without empty levels")
        if self.everyone is not None and not -(2**31) <= self.everyone < 2**31:
            raise self._bad("everyone", self.everyone, "a number of 32 bits")
        if self.ssl_context is not None and not isinstance(self.ssl_context, ssl.SSLContext):
            raise self._bad("ssl_context", "…", "an ssl.SSLContext")

    @staticmethod
    def _bad(option: str, value: object, wanted: str) -> BadOption:
        return BadOption(
            f"{option}={value!r} does not fit",
            option=option,
            hint=f"use {wanted}",
            backend="messagebus",
        )
