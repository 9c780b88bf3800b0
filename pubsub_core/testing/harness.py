"""A backend's broker, as its tests describe it: URL, server, identities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pubsub_core.capabilities import Cap, Level, Support, effective
from pubsub_core.errors import PubSubError
from pubsub_core.interfaces import BackendInfo
from pubsub_core.plugins import registry

from .links import Link
from .terms import Need, Terms

__all__ = ["Harness", "NativeError", "is_missing"]


@dataclass(frozen=True, slots=True)
class NativeError:
    """A faulty server's answer to the first bytes of a client, and the error that must follow.

    Attributes:
        reply: Bytes that the server sends before it closes the connection.
        error: The error that connecting must raise.
        retryable: The error's own `retryable`.
        options: Options that this reply needs, e.g. a protocol version.
    """

    name: str
    reply: bytes
    error: type[PubSubError]
    retryable: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Harness:
    """How the suite reaches one broker, and the expectations of it.

    Attributes:
        url: Where the broker is. ``{port}`` becomes the server's port, ``{unique}`` a word
            that no other trial has.
        server: ``module:Class`` of a `DevServer`, started once for the test class; None for a
            broker that is already there.
        server_options: Keyword arguments of that class.
        restart: Whether the server can be restarted on the same port.
        options: Options of every bus.
        options_for: More options, for the one bus of a case that needs a capability (a
            client id and a session that persists, say).
        second_identity: URL or options of another user.
        unprivileged_identity: URL or options of a user who may connect, but neither publish
            nor subscribe to `denied` topics.
        wrong_identity: URL or options that the broker must refuse.
        authorizer_identity: URL or options of a user who may authorize on `guarded`.
        guarded: Topic that needs authorization.
        denied: Topic that the unprivileged identity may not use.
        keepalive: Options that make keepalive as short as it can be, and its seconds.
        rate: Options that limit the rate of publishing, where a limit is not a given.
        in_process: Whether the server runs in this process, so that the memory it takes
            cannot be told from the client's.
        client_modules: Top-level modules of the broker's client library.
        native_type: Class that `Bus.native` gives, as ``module:Class``; None to skip nothing but
            the positive half of that case.
        native_errors: Replies for the case that plays a faulty server.
        dollar: Whether clients may publish to topics that begin with ``$``.
        lacks: Capabilities that this server lacks although the protocol cannot tell, with
            the reason. Cases that need one are skipped, and say so.
        exempt: Cases that do not hold on this server, by name, with the reason. They are
            listed in `not_applicable` of the test class.
        link: Makes the `Link` of a trial; a fault proxy by default, where the URL has a port.
        prepare: Called with each trial before it begins, to set the broker up for it.
        unique: Makes a broker's topic of a name. Brokers that know few topics replace it.
        slow: Factor on every deadline.
        deadline: Seconds that one wait may take, before that factor.
    """

    # `link` and `prepare` take a `Trial`, which knows this class; not the other way round.

    url: str
    server: str | None = None
    server_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    restart: bool = False
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options_for: Mapping[Cap, Mapping[str, Any]] = field(
        default_factory=dict[Cap, Mapping[str, Any]]
    )
    second_identity: str | Mapping[str, Any] | None = None
    unprivileged_identity: str | Mapping[str, Any] | None = None
    wrong_identity: str | Mapping[str, Any] | None = None
    authorizer_identity: str | Mapping[str, Any] | None = None
    denied: str = "denied/{unique}"
    guarded: str = "guarded/{unique}"
    keepalive: tuple[Mapping[str, Any], float] | None = None
    rate: Mapping[str, Any] | None = None
    in_process: bool = False
    client_modules: tuple[str, ...] = ()
    native_type: str | None = None
    native_errors: tuple[NativeError, ...] = ()
    dollar: bool = True
    lacks: Mapping[Cap, str] = field(default_factory=dict[Cap, str])
    exempt: Mapping[str, str] = field(default_factory=dict[str, str])
    link: Callable[[Any], Link] | None = None
    prepare: Callable[[Any], None] | None = None
    unique: Callable[[str, str], str] = lambda prefix, name: f"{prefix}/{name}"
    slow: float = 1.0
    deadline: float = 5.0

    @property
    def scheme(self) -> str:
        """The URL's scheme."""
        return self.url.partition(":")[0]

    @property
    def info(self) -> BackendInfo:
        """The backend's announcement."""
        return registry().by_scheme(self.scheme)

    @property
    def has_wire(self) -> bool:
        """Whether there is a TCP connection that a proxy can stand in."""
        return "{port}" in self.url or urlsplit(self.url).port is not None

    def missing(self, case: Terms) -> str | None:
        """Return why *case* is not applicable, or None when it is."""
        if case.name in self.exempt:
            return self.exempt[case.name]
        declared = effective(self.info.capabilities, {})
        if any(is_missing(declared[cap]) for cap in case.caps):
            return None  # turned round, which needs nothing
        for need in case.needs:
            if not self._has(need):
                return need.value
        return None

    def _has(self, need: Need) -> bool:
        match need:
            case Need.CUT:
                return self.link is not None or self.has_wire
            case Need.WIRE:
                return self.has_wire
            case Need.RESTART:
                return self.restart
            case Need.UNPRIVILEGED:
                return self.unprivileged_identity is not None
            case Need.SECOND:
                return self.second_identity is not None
            case Need.AUTHORIZER:
                return self.authorizer_identity is not None
            case Need.BAD_CREDENTIALS:
                return self.wrong_identity is not None
            case Need.KEEPALIVE:
                return self.keepalive is not None
            case Need.CLIENT_LIBRARY:
                return bool(self.client_modules)
            case Need.RATE:
                return self.info.limits.rate is not None or self.rate is not None
            case Need.PAYLOAD_LIMIT:
                return self.info.limits.max_payload is not None
            case Need.DOLLAR:
                return self.dollar
            case Need.NATIVE_ERRORS:
                return bool(self.native_errors)


def is_missing(support: Support) -> bool:
    """Whether the operation must be refused."""
    return support.level is Level.NONE
