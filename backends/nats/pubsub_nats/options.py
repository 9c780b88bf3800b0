"""Options of ``nats://``. Plain data. Times are seconds, sizes bytes."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pubsub_core.errors import BadOption, InvalidTopic
from pubsub_core.secrets import Secret

from .subjects import subject_of

__all__ = ["DEFAULT_PORT", "HostPort", "NatsOptions", "host_port"]

DEFAULT_PORT = 4222


class HostPort(NamedTuple):
    """Where one server of a cluster listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def host_port(text: str) -> HostPort:
    """Return what ``host``, ``host:port`` or ``[::1]:port`` means.

    Raises:
        ValueError: It is none of these.
    """
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(text)
        port = port[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    number = DEFAULT_PORT if not port else int(port) if port.isdecimal() else 0
    if not host or not 0 < number < 65536 or any(each in host for each in "/@ ?#"):
        raise ValueError(text)
    return HostPort(host, number)


def _help(text: str, **more: object) -> dict[str, object]:
    return {"help": text, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsOptions:
    """What can be said about a connection to a NATS server.

    `username`, `password` and `token` here win over the URL's, whose user name without a
    password is a token.
    """

    servers: tuple[str, ...] = field(
        default=(), metadata=_help("more servers of the same cluster, as host:port")
    )
    prefix: str = field(
        default="", metadata=_help("topic that stands before all others, for a namespace")
    )
    username: str | None = field(default=None, metadata=_help("wins over the URL's user"))
    password: Secret | None = field(default=None, metadata=_help("wins over the URL's password"))
    token: Secret | None = field(default=None, metadata=_help("the server's auth_token"))
    nkey_seed: Secret | None = field(
        default=None, metadata=_help("seed (SU…) of the user's key; needs pubsub-core[nats]")
    )
    credentials: str | None = field(
        default=None,
        metadata=_help("file with a JWT and a seed (.creds); needs pubsub-core[nats]"),
    )
    tls_first: bool = field(
        default=False,
        metadata=_help("begin with TLS, as the server's handshake_first wants it (2.10 and later)"),
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
    keepalive: float = field(
        default=30.0,
        metadata=_help("ask the server for a sign of life after so long a silence; 0: never"),
    )

    def __post_init__(self) -> None:
        if self.keepalive < 0:
            raise _bad("keepalive", self.keepalive, "seconds, 0 or more")
        for each in self.servers:
            try:
                host_port(each)
            except ValueError:
                # Somebody may have written credentials into it.
                raise _bad("servers", "…", "host:port; options hold the credentials") from None
        if self.prefix:
            try:
                subject_of(self.prefix)
            except InvalidTopic as error:
                raise _bad("prefix", self.prefix, f"a topic: {error.message}") from error
            if any(each in self.prefix for each in "+#"):
                raise _bad("prefix", self.prefix, "a topic without wildcards")
        if self.key_file is not None and self.cert_file is None:
            raise _bad("key_file", self.key_file, "it together with cert_file")
        if self.ssl_context is not None and not isinstance(self.ssl_context, ssl.SSLContext):
            raise _bad("ssl_context", "…", "an ssl.SSLContext")
        kinds = {
            "username": self.username,
            "token": self.token,
            "nkey_seed": self.nkey_seed,
            "credentials": self.credentials,
        }
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise _bad(given[1], "…", f"either {' or '.join(given)}")

    @property
    def asks_for_tls(self) -> bool:
        """Whether some option makes sense with TLS only."""
        return bool(
            self.tls_first
            or self.ca_file
            or self.cert_file
            or self.insecure_skip_verify
            or self.ssl_context is not None
        )


def _bad(option: str, value: object, wanted: str) -> BadOption:
    return BadOption(
        f"{option}={value!r} does not fit", option=option, hint=f"use {wanted}", backend="nats"
    )
