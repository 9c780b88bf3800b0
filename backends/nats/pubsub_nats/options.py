"""Options of ``nats://``. Plain data. Times are seconds, sizes bytes."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pubsub_core.errors import BadOption, InvalidFilter, InvalidTopic
from pubsub_core.secrets import Secret

from .subjects import subject_of, subjects_of

__all__ = ["DEFAULT_PORT", "HostPort", "NatsOptions", "host_port"]

DEFAULT_PORT = 4222

# With room for the names of the streams beside it, of which 255 are allowed.
_STREAM = re.compile(r"[^\s.*>/\\]{1,200}")


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

    stream: str | None = field(
        default=None,
        metadata=_help("stream of JetStream that confirms what is published and that is read"),
    )
    subjects: tuple[str, ...] = field(
        default=(),
        metadata=_help("topic filters of the stream when it is made; all, where there is a prefix"),
    )
    create: bool = field(default=False, metadata=_help("make the stream where it is missing"))
    storage: Literal["file", "memory"] = field(
        default="file", metadata=_help("of a stream that is made")
    )
    replicas: int = field(default=1, metadata=_help("of a stream that is made; a cluster wants 3"))
    max_age: float = field(
        default=0.0, metadata=_help("seconds that a stream that is made keeps messages; 0: always")
    )
    max_bytes: int = field(default=0, metadata=_help("that a stream that is made keeps; 0: all"))
    max_msgs: int = field(default=0, metadata=_help("that a stream that is made keeps; 0: all"))
    discard: Literal["old", "new"] = field(
        default="old", metadata=_help("which messages a full stream that is made gives up")
    )
    duplicate_window: float = field(
        default=120.0,
        metadata=_help("seconds for which a stream that is made recognises a repeated message"),
    )
    client_id: str | None = field(
        default=None,
        metadata=_help("name under which the stream keeps this program's subscriptions"),
    )
    session_expiry: float = field(
        default=3600.0,
        metadata=_help("seconds that such subscriptions, and groups, survive without a reader"),
    )
    presence: bool = field(
        default=False,
        metadata=_help("tell others what is subscribed here, and see it of them; server 2.11"),
    )
    presence_ttl: float = field(
        default=10.0, metadata=_help("seconds after which one that vanished is gone; 1 at least")
    )
    ack_wait: float = field(
        default=30.0,
        metadata=_help("seconds after which a message without an acknowledgement comes again"),
    )
    max_deliver: int = field(
        default=0, metadata=_help("how often such a message comes at most; 0: until it is settled")
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

        self._check_stream()

    def _check_stream(self) -> None:
        if self.stream is None:
            given = [
                name
                for name in ("subjects", "create", "client_id", "presence")
                if getattr(self, name)
            ]
            if given:
                raise _bad(given[0], getattr(self, given[0]), "it together with stream=")
            return
        if not _STREAM.fullmatch(self.stream):
            raise _bad("stream", self.stream, "1 to 200 characters without white space and . * > /")
        for each in self.subjects:
            try:
                subjects_of(each)
            except InvalidFilter as error:
                raise _bad("subjects", each, f"topic filters: {error.message}") from error
        if self.create and not self.subjects and not self.prefix:
            # The server allows no stream over everything.
            raise _bad("create", True, "subjects= or prefix= beside it")
        for name in ("duplicate_window", "session_expiry", "ack_wait"):
            if not getattr(self, name) > 0:
                raise _bad(name, getattr(self, name), "seconds above 0")
        for name in ("max_age", "max_bytes", "max_msgs", "max_deliver"):
            if getattr(self, name) < 0:
                raise _bad(name, getattr(self, name), "0 or more")
        if not 1 <= self.replicas <= 5:
            raise _bad("replicas", self.replicas, "1 to 5, odd in a cluster")
        if not self.presence_ttl >= 1:
            raise _bad("presence_ttl", self.presence_ttl, "seconds, 1 or more")
        if self.client_id == "":
            raise _bad("client_id", "", "a name, or leave it out")

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
