"""Who may do what on which feed, and where authorization is required: plain data.

The meanings are those of the original's configuration, and so are the keys, in its spelling
(``isAuthorizationRequired``) or in Python's (``is_authorization_required``).

Source: jetblack-messagebus ``DistributorConfig``, ``FeedRoleConfig`` and ``RoleManager``,
3.0.0 to 6.0.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Final, Self

from pubsub_messagebus.protocol import ADMIN_FEED, FENCE_FEEDS

from .table import Table, bad_value, entries, expand, load_file

__all__ = [
    "POLICY_KEYS",
    "FeedPolicy",
    "Permissions",
    "Policy",
    "Role",
    "RoleChange",
    "load_permissions",
]

ROLE_KEYS: Final = ("allow", "deny")
FEED_KEYS: Final = (
    *ROLE_KEYS,
    "is_authorized",
    "is_impersonation_allowed",
    "is_proxy_allowed",
    "interactor_roles",
)
POLICY_KEYS: Final = (
    *ROLE_KEYS,
    "is_authorization_required",
    "is_impersonation_allowed",
    "is_proxy_allowed",
    "feed_roles",
)
"""The keys about roles at the top of a configuration file, e.g. the original's ``feedRoles``."""


class Role(IntFlag):
    """A right of a client on a feed."""

    NONE = 0
    SUBSCRIBE = 1
    PUBLISH = 2
    NOTIFY = 4
    AUTHORIZE = 8
    ALL = 15


@dataclass(frozen=True, slots=True)
class RoleChange:
    """Sets what it allows, then clears what it denies."""

    allow: Role = Role.NONE
    deny: Role = Role.NONE

    def apply(self, roles: Role) -> Role:
        """Return *roles* after this step."""
        return (roles | self.allow) & ~self.deny


Permissions = Mapping[str, Mapping[str, RoleChange]]
"""Rights of one user, by feed and host pattern (``*``, ``?``)."""


@dataclass(frozen=True, slots=True)
class FeedPolicy:
    """Rules of one feed that differ from the server's.

    Attributes:
        users: By host and user; the host ``*`` is the fallback.
    """

    is_authorized: bool = False
    is_impersonation_allowed: bool = False
    is_proxy_allowed: bool = False
    change: RoleChange = RoleChange()
    users: Mapping[tuple[str, str], RoleChange] = field(
        default_factory=dict[tuple[str, str], RoleChange]
    )

    @classmethod
    def from_table(cls, table: Table) -> Self:
        """Read the table of one feed.

        Raises:
            BadOption: A value does not fit, or a key inside is unknown.
        """
        users: dict[tuple[str, str], RoleChange] = {}
        where = table.where("interactor_roles")
        for host, by_user in table.named("interactor_roles"):
            known = expand(host, f"{where}.{host}")
            for user, change in entries(by_user, f"{where}.{host}"):
                users[known, user] = _change(Table(change, f"{where}.{host}.{user}", ROLE_KEYS))
        return cls(
            is_authorized=table.flag("is_authorized"),
            is_impersonation_allowed=table.flag("is_impersonation_allowed"),
            is_proxy_allowed=table.flag("is_proxy_allowed"),
            change=_change(table),
            users=users,
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of a server; by default everybody may do everything.

    Attributes:
        change: Server-wide, before anything of a feed.
        is_authorization_required: On feeds that are not listed.
        is_impersonation_allowed: On feeds that are not listed; likewise `is_proxy_allowed`.
        feeds: The listed ones.
    """

    change: RoleChange = RoleChange(Role.ALL)
    is_authorization_required: bool = False
    is_impersonation_allowed: bool = False
    is_proxy_allowed: bool = False
    feeds: Mapping[str, FeedPolicy] = field(default_factory=dict[str, FeedPolicy])

    def authorization_required(self, feed: str) -> bool:
        """Whether subscribers of *feed* need an authorizer.

        Never for the heartbeat's feed and for fences, to which no client may publish.
        """
        if feed == ADMIN_FEED or feed.startswith(FENCE_FEEDS):
            return False
        listed = self.feeds.get(feed)
        return self.is_authorization_required if listed is None else listed.is_authorized

    def may_impersonate(self, feed: str) -> bool:
        """Whether a client counts as the user it names."""
        listed = self.feeds.get(feed)
        return self.is_impersonation_allowed if listed is None else listed.is_impersonation_allowed

    def may_proxy(self, feed: str) -> bool:
        """Whether a client counts as being on the host it names."""
        listed = self.feeds.get(feed)
        return self.is_proxy_allowed if listed is None else listed.is_proxy_allowed

    def roles(
        self, feed: str, user: str, host: str, permissions: Permissions | None = None
    ) -> Role:
        """Return the roles of that user on that host; each step overrides the one before."""
        roles = self.change.apply(Role.NONE)
        listed = self.feeds.get(feed)
        if listed is not None:
            roles = listed.change.apply(roles)
            entry = listed.users.get((host, user)) or listed.users.get(("*", user))
            if entry is not None:
                roles = entry.apply(roles)
        if permissions is not None and feed in permissions:
            for pattern, change in permissions[feed].items():
                if re.match(fnmatch.translate(pattern), host, re.IGNORECASE):
                    return change.apply(roles)
            return Role.NONE
        return roles

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the keys of a configuration file that are about roles; see `POLICY_KEYS`.

        Raises:
            BadOption: A value does not fit, or a key is unknown.
        """
        return cls.from_table(Table(values, "", POLICY_KEYS))

    @classmethod
    def from_table(cls, table: Table) -> Self:
        """Read the keys about roles; the caller reads the others.

        Raises:
            BadOption: A value does not fit, or a key inside is unknown.
        """
        feeds = {
            name: FeedPolicy.from_table(
                Table(listed, f"{table.where('feed_roles')}.{name}", FEED_KEYS)
            )
            for name, listed in table.named("feed_roles")
        }
        if feeds and "allow" not in table:
            # The original allows nothing then, and a file without any roles allows everything
            # here. A guess would open a server or close it, so neither is made.
            raise bad_value(
                "allow",
                f"missing beside {table.where('feed_roles')}",
                'write allow = ["All"], or ["None"] if only listed feeds may be used',
            )
        return cls(
            change=RoleChange(_roles(table, "allow", Role.ALL), _roles(table, "deny")),
            is_authorization_required=table.flag("is_authorization_required"),
            is_impersonation_allowed=table.flag("is_impersonation_allowed"),
            is_proxy_allowed=table.flag("is_proxy_allowed"),
            feeds=feeds,
        )


def load_permissions(path: str) -> dict[str, Permissions]:
    """Read the original's file of roles: by user, feed and host.

    Raises:
        BadOption: It is not there, a key is unknown, or a value does not fit.
    """
    return {
        user: {
            feed: {
                host: _change(Table(change, f"{user}.{feed}.{host}", ROLE_KEYS))
                for host, change in entries(hosts, f"{user}.{feed}")
            }
            for feed, hosts in entries(feeds, user)
        }
        for user, feeds in load_file(path).items()
    }


def _change(table: Table) -> RoleChange:
    return RoleChange(_roles(table, "allow"), _roles(table, "deny"))


def _roles(table: Table, name: str, default: Role = Role.NONE) -> Role:
    """Read a list of roles, or a text with commas; case does not count."""
    if name not in table:
        return default
    value = table.value(name)
    names: Iterable[Any] = value.split(",") if isinstance(value, str) else value
    found = Role.NONE
    try:
        for each in names:
            found |= Role[str(each).strip().upper()]
    except (KeyError, TypeError):
        choice = ", ".join(role.capitalize() for role in Role.__members__)
        raise bad_value(
            table.where(name), f"{value!r}, which does not fit", f"use a list of {choice}"
        ) from None
    return found
