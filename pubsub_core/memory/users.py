"""Users of a space and their rights; without users, everybody may do everything."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from pubsub_core.errors import (
    AuthenticationFailed,
    PublishNotAuthorized,
    SubscribeNotAuthorized,
)
from pubsub_core.topics import parse_filter

from .client import Client

__all__ = ["Users"]


@dataclass(frozen=True, slots=True)
class _User:
    password: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    authorize: tuple[str, ...]


class Users:
    """The users of a space, by name.

    Attributes:
        known: Empty while everybody may do everything; a publish looks at this alone.
    """

    def __init__(self) -> None:
        self.known: dict[str, _User] = {}

    def allow(
        self,
        username: str,
        password: str,
        *,
        publish: Iterable[str],
        subscribe: Iterable[str],
        authorize: Iterable[str],
    ) -> None:
        """Let *username* in, with rights on these filters; anybody else is refused then."""
        self.known[username] = _User(password, tuple(publish), tuple(subscribe), tuple(authorize))

    def check_password(self, client: Client) -> None:
        """Refuse a client that may not enter.

        Raises:
            AuthenticationFailed: There are users, and it is none of them.
        """
        if not self.known:
            return
        user = self.known.get(client.options.username)
        given = "" if client.options.password is None else client.options.password.reveal()
        if user is None or not secrets.compare_digest(given.encode(), user.password.encode()):
            raise AuthenticationFailed(
                f"{client.context.address} does not know that user name and password",
                hint="check username and password",
                backend="memory",
            )

    def check_publish(self, client: Client, topic: str) -> None:
        """Refuse a publish without the right to it.

        Raises:
            PublishNotAuthorized: *client* may not publish to *topic*.
        """
        user = self.known.get(client.options.username)
        if user is not None and not any(parse_filter(each).matches(topic) for each in user.publish):
            raise PublishNotAuthorized(
                f"{client.options.username!r} may not publish to {topic!r}",
                hint="ask for the right to publish there",
                backend="memory",
                topic=topic,
            )

    def check_subscribe(self, client: Client, filter: str) -> None:
        """Refuse a subscription, or a look at one, without the right to it.

        Raises:
            SubscribeNotAuthorized: *client* may not subscribe to *filter*.
        """
        user = self.known.get(client.options.username)
        if user is not None and not any(_covers(each, filter) for each in user.subscribe):
            raise SubscribeNotAuthorized(
                f"{client.options.username!r} may not subscribe to {filter!r}",
                hint="ask for the right to subscribe there",
                backend="memory",
                topic=filter,
            )

    def may_authorize(self, client: Client, topic: str) -> bool:
        """Whether *client* may decide who sees *topic*."""
        if not self.known:
            return True
        user = self.known.get(client.options.username)
        return user is not None and any(
            parse_filter(each).matches(topic) for each in user.authorize
        )


def _covers(granted: str, wanted: str) -> bool:
    """Whether every topic that *wanted* can match is matched by *granted*."""
    have, want = granted.split("/"), wanted.split("/")
    for index, level in enumerate(have):
        if level == "#":
            return True
        if index >= len(want) or want[index] == "#":
            return False
        if level != "+" and level != want[index]:
            return False
    return len(have) == len(want)
