"""Who may do what on which feed, and where authorization is required: plain data.

The meanings are those of the original's configuration. `Policy.from_mapping` reads its JSON
keys (``isAuthorizationRequired``) and their Python names (``is_authorization_required``)
alike, so a file of the original can be taken as it is, or written as TOML.

Source: jetblack-messagebus ``DistributorConfig``, ``FeedRoleConfig`` and ``RoleManager``,
3.0.0 to 6.0.
"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from pathlib import Path
from typing import Any, Self

from pubsub_core.errors import BadOption

from .protocol import ADMIN_FEED, FENCE_FEEDS

__all__ = ["FeedPolicy", "Permissions", "Policy", "Role", "RoleChange", "load_mapping"]


class Role(IntFlag):
    """What a client may do on a feed."""

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
"""What an authenticator may say of one user: by feed and host pattern (``*``, ``?``)."""


@dataclass(frozen=True, slots=True)
class FeedPolicy:
    """What is different on one feed.

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
        """Return what that user on that host may do on *feed*; each step overrides the last."""
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
        """Read what a file says; keys that are not about roles are passed over.

        Raises:
            BadOption: A value does not fit.
        """
        reader = _Reader(values, "")
        feeds: dict[str, FeedPolicy] = {}
        for name, listed in reader.table("feedRoles").items():
            each = _Reader(listed, f"feedRoles.{name}")
            users: dict[tuple[str, str], RoleChange] = {}
            for host, by_user in each.table("interactorRoles").items():
                for user, change in _Reader(by_user, f"{each.place}.{host}").values.items():
                    users[host, user] = _Reader(change, f"{each.place}.{host}.{user}").change()
            feeds[name] = FeedPolicy(
                is_authorized=each.flag("isAuthorized"),
                is_impersonation_allowed=each.flag("isImpersonationAllowed"),
                is_proxy_allowed=each.flag("isProxyAllowed"),
                change=each.change(),
                users=users,
            )
        allow = reader.roles("allow", default=Role.ALL)
        return cls(
            change=RoleChange(allow, reader.roles("deny")),
            is_authorization_required=reader.flag("isAuthorizationRequired"),
            is_impersonation_allowed=reader.flag("isImpersonationAllowed"),
            is_proxy_allowed=reader.flag("isProxyAllowed"),
            feeds=feeds,
        )


class _Reader:
    """One table of a file, under the original's names or Python's."""

    def __init__(self, values: object, place: str) -> None:
        if not isinstance(values, Mapping):
            raise BadOption(f"{place} is no table", option=place, backend="messagebus")
        self.values: Mapping[str, Any] = {str(k): v for k, v in values.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        self.place = place

    def get(self, name: str) -> Any:
        snake = re.sub(r"(?<=[a-z])([A-Z])", lambda found: "_" + found[1].lower(), name)
        return self.values.get(name, self.values.get(snake))

    def table(self, name: str) -> Mapping[str, Any]:
        value = self.get(name)
        return {} if value is None else _Reader(value, self._at(name)).values

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._bad(name, value, "true or false")
        return value

    def roles(self, name: str, default: Role = Role.NONE) -> Role:
        value = self.get(name)
        if value is None:
            return default
        names: Iterable[Any] = value.split(",") if isinstance(value, str) else value
        found = Role.NONE
        try:
            for each in names:
                found |= Role[str(each).strip().upper()]
        except (KeyError, TypeError):
            choice = ", ".join(role for role in Role.__members__)
            raise self._bad(name, value, f"a list of {choice}") from None
        return found

    def change(self) -> RoleChange:
        return RoleChange(self.roles("allow"), self.roles("deny"))

    def _at(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def _bad(self, name: str, value: object, wanted: str) -> BadOption:
        return BadOption(
            f"{self._at(name)}={value!r} does not fit",
            option=self._at(name),
            hint=f"use {wanted}",
            backend="messagebus",
        )


def load_mapping(path: str | Path) -> dict[str, Any]:
    """Read a TOML or JSON file; a section ``distributor`` stands for the whole.

    Raises:
        BadOption: It is not there, or is not what its name says.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        values: Any = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise BadOption(
            f"{file} cannot be read: {error.strerror}", option="config", backend="messagebus"
        ) from error
    except ValueError as error:
        raise BadOption(
            f"{file} is not valid: {error}", option="config", backend="messagebus"
        ) from error
    return dict(_Reader(values.get("distributor", values), str(file)).values)
