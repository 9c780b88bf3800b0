"""A distributor that does as the original does, where ours does better; and a restrictive policy.

Written after the original's sources, 5.1.1, and what was observed of it at three versions:

* a subscription that is added once and removed once stays until the connection ends, and is
  listed; every removal is told, whether or not there was something to remove;
* the role Notify is not enforced, and fences are feeds like any other: a client that may not
  subscribe to feeds that are not listed never sees one come back;
* where authorization is required, it is required of fences as well;
* who fails to log in is kept on the line, and told nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import Refused, ServerAuthenticator, User
from pubsub_messagebus.server.broker import Broker, Effects
from pubsub_messagebus.server.interactors import Interactor
from pubsub_messagebus.server.roles import FeedPolicy, Policy, Role, RoleChange

__all__ = ["RESTRICTIVE", "OriginalBroker", "original"]

RESTRICTIVE = Policy(
    change=RoleChange(Role.NONE, Role.ALL),
    feeds={"OPEN": FeedPolicy(change=RoleChange(Role.ALL))},
)
"""As the file of the original that is shipped for users with passwords: one feed is open."""


class _OriginalPolicy(Policy):
    def authorization_required(self, feed: str) -> bool:
        listed = self.feeds.get(feed)
        return self.is_authorization_required if listed is None else listed.is_authorized


class OriginalBroker(Broker):
    """Routes as the original does."""

    def __init__(self, policy: Policy | None = None) -> None:
        told = Policy() if policy is None else policy
        fields = {each.name: getattr(told, each.name) for each in dataclasses.fields(told)}
        super().__init__(_OriginalPolicy(**fields))

    def _may(self, client: Interactor, feed: str, role: int, what: str) -> bool:
        return bool(role == Role.NOTIFY or client.roles(feed) & role)

    def _subscribe(self, client: Interactor, feed: str, topic: str) -> Effects:
        effects = super()._subscribe(client, feed, topic)
        subscription = client.subscriptions.get((feed, topic))
        if subscription is not None and (feed, topic) not in client.granted:
            # The first add goes another way than the others, and is not counted.
            client.granted[feed, topic] = None
            subscription.count -= 1
        return effects

    def _unsubscribe(self, client: Interactor, feed: str, topic: str) -> Effects:
        if not self._may(client, feed, Role.SUBSCRIBE, ""):
            return []
        subscription = client.subscriptions.get((feed, topic))
        if subscription is not None:
            subscription.count -= 1
            if not subscription.count:
                del client.subscriptions[feed, topic]
                self._remove(client, feed, topic)
        effects: Effects = []
        self._notify(client, feed, topic, False, effects)
        return effects


class _Silent(ServerAuthenticator):
    """Never answers those whom another one refuses."""

    def __init__(self, inner: ServerAuthenticator) -> None:
        self._inner = inner
        self.handshake = inner.handshake

    async def authenticate(self, credentials: Any) -> User:
        import asyncio

        try:
            return await self._inner.authenticate(credentials)
        except Refused:
            await asyncio.get_running_loop().create_future()
            raise


def original(policy: Policy | None = None, **options: Any) -> MessageBusServer:
    """Return a distributor that does as the original does; it is not started."""
    server = MessageBusServer(**options)
    server.broker = OriginalBroker(policy)
    if server.authenticator.handshake != "null":
        server.authenticator = _Silent(server.authenticator)
    return server
