"""The broker's record of one connection, which the original calls an interactor."""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from pubsub_messagebus.protocol import Dialect, encode_string

from .counters import Traffic
from .roles import Permissions, Policy, Role

__all__ = ["Identity", "Interactor", "Key", "Subscription"]

Key: TypeAlias = tuple[str, str]
"""Feed and topic."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a connection is, after authentication.

    Attributes:
        method: ``NULL``, ``BASIC``, ``JWT``, ``LDAP`` or an authenticator's own word.
        impersonating: Counts instead of *user* on feeds where that is allowed.
        forwarded_for: Counts instead of *host* on feeds where that is allowed.
        permissions: This user's rights as the authenticator knows them, or None.
    """

    user: str = "nobody"
    host: str = "localhost"
    method: str = "NULL"
    impersonating: str = ""
    forwarded_for: str = ""
    application: str = "unspecified"
    permissions: Permissions | None = None


class Subscription:
    """One connection's subscription to one topic.

    Attributes:
        count: How often it was added.
        entitlements: None where packets are not filtered.
    """

    __slots__ = ("count", "entitlements")

    def __init__(self, count: int, entitlements: frozenset[int] | None) -> None:
        self.count = count
        self.entitlements = entitlements


class Interactor:
    """One connection after login: its names, roles, interests and counters.

    Names and roles depend on the feed. They are worked out once, for what is usual and for
    each listed feed, since every message needs them. Roles are plain numbers: ``&`` of an
    `enum.Flag` makes an object, which was 6 to 10 % of the profile of a busy server.

    Attributes:
        subscriptions: By feed and topic.
        listening: Feeds whose subscriptions it is told of.
        published: Topics whose subscribers are told when it goes.
        granted: Rights that it holds, subscribed or not; None is unfiltered.
        pending: How many adds wait for an answer.
        denied: How many adds were answered with a no.
        fences: How many of its subscriptions and listenings are on fences.
    """

    __slots__ = (
        "_head",
        "_heads",
        "_policy",
        "_roles",
        "_usual",
        "conn",
        "denied",
        "dialect",
        "fences",
        "granted",
        "id",
        "id_bytes",
        "identity",
        "listening",
        "pending",
        "published",
        "subscriptions",
        "traffic",
    )

    def __init__(
        self,
        conn: Hashable,
        identity: Identity,
        policy: Policy,
        *,
        dialect: Dialect,
        identifier: uuid.UUID,
    ) -> None:
        self.conn = conn
        self.identity = identity
        self.dialect: Dialect = dialect
        self.id = identifier
        self.id_bytes = identifier.bytes_le
        self.subscriptions: dict[Key, Subscription] = {}
        self.listening: dict[str, None] = {}
        self.published: dict[Key, None] = {}
        self.granted: dict[Key, frozenset[int] | None] = {}
        self.pending: dict[Key, int] = {}
        self.denied: dict[Key, int] = {}
        self.fences = 0
        self.traffic = Traffic()
        self._policy = policy
        self._head, self._usual = self._describe(None)
        self._heads: dict[str, bytes] = {}
        self._roles: dict[str, int] = {}
        listed: Iterable[str] = {**policy.feeds, **(identity.permissions or {})}
        for feed in listed:
            self._heads[feed], self._roles[feed] = self._describe(feed)

    @property
    def interests(self) -> int:
        """The number of entries that are kept for it."""
        return (
            len(self.subscriptions)
            + len(self.listening)
            + len(self.granted)
            + len(self.pending)
            + len(self.denied)
        )

    def roles(self, feed: str) -> int:
        """Return its roles on *feed*, as a number of `Role`."""
        return self._roles.get(feed, self._usual) if self._roles else self._usual

    def head(self, feed: str) -> bytes:
        """Return its user and host as they stand in messages that are forwarded on *feed*."""
        return self._heads.get(feed, self._head) if self._heads else self._head

    def names(self, feed: str | None = None) -> tuple[str, str]:
        """Return its user and host as others see them on *feed*; None is one not listed."""
        identity, policy = self.identity, self._policy
        if feed is not None and feed in policy.feeds:
            impersonate, proxy = policy.may_impersonate(feed), policy.may_proxy(feed)
        else:
            impersonate, proxy = policy.is_impersonation_allowed, policy.is_proxy_allowed
        user = identity.impersonating if impersonate and identity.impersonating else identity.user
        host = identity.forwarded_for if proxy and identity.forwarded_for else identity.host
        return user, host

    def _describe(self, feed: str | None) -> tuple[bytes, int]:
        user, host = self.names(feed)
        policy, permissions = self._policy, self.identity.permissions
        if feed is None:
            # The feed without a name may be listed, so it cannot stand for one that is not.
            roles = policy.change.apply(Role.NONE)
        else:
            roles = policy.roles(feed, user, host, permissions)
        return encode_string(user) + encode_string(host), int(roles)
