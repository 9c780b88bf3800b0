"""The distributor as a state machine: who gets which bytes. No socket, clock or loop.

Tell it each event (`Broker.connected`, `received`, `disconnected`, `heartbeat`), and it returns
the frames to write and their connections, in order. It holds all state, so tests can drive it
through any sequence. Dicts keep insertion order, and so does everything that is sent.

Feeds and topics match by equality. Nothing is stored for absent clients.

Source: jetblack-messagebus 3.0.0 to 6.0 (``SubscriptionManager``, ``NotificationManager``,
``PublisherManager``, ``InteractorManager``), without its known defects: the README of this
backend lists every deliberate difference.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Final, TypeAlias

from pubsub_messagebus.protocol import (
    ADMIN_FEED,
    FENCE_FEEDS,
    HEARTBEAT,
    HEARTBEAT_TOPIC,
    AuthorizationResponse,
    Dialect,
    Message,
    MulticastData,
    NotificationRequest,
    ProtocolError,
    SubscriptionRequest,
    UnicastData,
    encode_authorization_request,
    encode_string,
    notice,
)

from .counters import BrokerStats, InteractorView, Traffic, count_feed
from .frames import Frames
from .interactors import Identity, Interactor, Key, Subscription
from .roles import Policy, Role

__all__ = ["Broker", "Effects"]

logger = logging.getLogger("pubsub_messagebus.server.broker")

Effects: TypeAlias = list[tuple[Hashable, bytes]]
"""Frames and the connections to write them to, in order."""

MAX_PENDING = 10_000
"""Most requests that wait for an authorizer, on the whole server."""

MAX_INTERESTS = 1_000_000
"""Most subscriptions, listenings and remembered rights of one connection."""


MAX_FENCES = 1000
"""Subscriptions and listenings of one connection on fences, which need no role."""

# As plain numbers: `&` of an enum makes an object each time.
_SUBSCRIBE: Final = int(Role.SUBSCRIBE)
_PUBLISH: Final = int(Role.PUBLISH)
_NOTIFY: Final = int(Role.NOTIFY)
_AUTHORIZE: Final = int(Role.AUTHORIZE)


def _is_fence(feed: str) -> bool:
    return feed.startswith(FENCE_FEEDS)


class Broker:
    """Routes between connections, which are any hashable objects of the caller.

    A caller must write the effects of one call before those of the next.

    A client is in one of four states on each feed and topic; an event moves it:

    ========== ============================== =====================================
    state      kept in                        left by
    ========== ============================== =====================================
    none       nowhere                        add: pending where an authorizer is
                                              needed and has not granted yet, else
                                              subscribed
    pending    `Interactor.pending`, and here grant: subscribed; denial: denied;
               for authorizers that come      as many removes as adds: none
    subscribed `Interactor.subscriptions`,    as many removes as adds: none;
               and here by feed and topic     revocation: denied
    denied     `Interactor.denied`            grant: subscribed, with the adds that
                                              were denied; add: pending; as many
                                              removes as adds: none
    ========== ============================== =====================================

    Beside them `Interactor.granted` remembers rights for the life of a connection, so that a
    client which unsubscribes and comes back is not asked about again. A denial is never
    remembered as a right: the original remembers it as one with no entitlements, and the next
    add then subscribes.

    Fences are private: nobody is told of another client's, and nobody publishes there.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        max_pending: int = MAX_PENDING,
        max_interests: int = MAX_INTERESTS,
    ) -> None:
        self.policy = Policy() if policy is None else policy
        self.stats = BrokerStats()
        self.ended = Traffic()
        """The traffic of connections that are gone."""
        self._max_pending = max_pending
        self._max_interests = max_interests
        self._clients: dict[Hashable, Interactor] = {}
        self._by_id: dict[bytes, Interactor] = {}
        # feed → topic → subscriber. Empty dicts are removed, so that a listing is in the order
        # of first subscription, and hostile names leave nothing behind.
        self._feeds: dict[str, dict[str, dict[Interactor, Subscription]]] = {}
        self._listeners: dict[str, dict[Interactor, None]] = {}
        self._publishers: dict[Key, dict[Interactor, None]] = {}
        self._pending: dict[tuple[Interactor, str, str], None] = {}

    # --- events -----------------------------------------------------------------------

    def connected(
        self,
        conn: Hashable,
        identity: Identity,
        *,
        dialect: Dialect = "is_image",
        client_id: uuid.UUID | None = None,
    ) -> Effects:
        """Add a connection; an authorizer is asked at once about everything pending."""
        if conn in self._clients:
            raise ValueError("this connection is already there")
        client = Interactor(
            conn, identity, self.policy, dialect=dialect, identifier=client_id or uuid.uuid4()
        )
        self._clients[conn] = client
        self._by_id[client.id_bytes] = client
        self.stats.clients = len(self._clients)
        effects: Effects = []
        for subscriber, feed, topic in self._pending:
            if client.roles(feed) & _AUTHORIZE:
                self._ask(client, subscriber, feed, topic, effects)
        return effects

    def received(self, conn: Hashable, message: Message) -> Effects:
        """Act on one message of *conn*; a message of an unknown connection does nothing.

        Raises:
            ProtocolError: The connection asks for more than one may hold; close it.
        """
        client = self._clients.get(conn)
        if client is None:
            return []
        self.stats.received += 1
        client.traffic.reads += 1
        if isinstance(message, MulticastData):
            return self._multicast(client, message)
        if isinstance(message, UnicastData):
            return self._unicast(client, message)
        if isinstance(message, SubscriptionRequest):
            if message.is_add:
                return self._subscribe(client, message.feed, message.topic)
            return self._unsubscribe(client, message.feed, message.topic)
        if isinstance(message, NotificationRequest):
            return self._listen(client, message.feed, message.is_add)
        if isinstance(message, AuthorizationResponse):
            return self._authorize(client, message)
        self._ignore(client, f"sent a {type(message).__name__}, which is for clients")
        return []

    def disconnected(self, conn: Hashable) -> Effects:
        """Remove a connection: stale notices first, then the removals.

        The order is the original's. Its own listenings go first, so that it is told nothing
        of its own end.
        """
        client = self._clients.pop(conn, None)
        if client is None:
            return []
        del self._by_id[client.id_bytes]
        self.ended.add(client.traffic)
        self.stats.clients = len(self._clients)
        for feed, topic in client.pending:
            del self._pending[client, feed, topic]
        self.stats.pending = len(self._pending)
        for feed in client.listening:
            self._drop_listener(client, feed)
        effects: Effects = []
        for key in client.published:
            publishers = self._publishers[key]
            del publishers[client]
            if publishers:
                continue
            del self._publishers[key]
            self._tell_stale(client, key, effects)
        # All are removed before the first is told: a listener that answers a removal finds the
        # state that it was told of.
        for feed, topic in client.subscriptions:
            self._remove(client, feed, topic)
        for feed, topic in client.subscriptions:
            self._notify(client, feed, topic, False, effects)
        return effects

    def heartbeat(self) -> Effects:
        """Publish the heartbeat to its subscribers."""
        subscribers = self._feeds.get(ADMIN_FEED, {}).get(HEARTBEAT_TOPIC, {})
        return [(client.conn, HEARTBEAT[client.dialect]) for client in subscribers]

    # --- looking in --------------------------------------------------------------------

    def client_id(self, conn: Hashable) -> uuid.UUID:
        """Return the identifier that others know a connection by."""
        return self._clients[conn].id

    def names(self, conn: Hashable) -> tuple[str, str, str]:
        """Return host, user and application of a connection, as most feeds see them."""
        client = self._clients[conn]
        user, host = client.names()
        return host, user, client.identity.application

    def subscribers(self, feed: str, topic: str) -> dict[Hashable, int]:
        """Return the subscribers, and how often each added."""
        found = self._feeds.get(feed, {}).get(topic, {})
        return {client.conn: subscription.count for client, subscription in found.items()}

    def interactors(self) -> Iterator[InteractorView]:
        """Return every connection and its counters."""
        for client in self._clients.values():
            user, host = client.names()
            subscriptions: dict[str, int] = {}
            for feed, count in Counter(feed for feed, _ in client.subscriptions).items():
                count_feed(subscriptions, feed, count)
            listening: dict[str, int] = {}
            for feed in client.listening:
                count_feed(listening, feed)
            yield InteractorView(
                client.conn,
                client.id,
                user,
                host,
                client.identity.application,
                client.traffic,
                subscriptions,
                listening,
            )

    @property
    def empty(self) -> bool:
        """Whether no state is left."""
        return not (
            self._clients
            or self._by_id
            or self._feeds
            or self._listeners
            or self._publishers
            or self._pending
        )

    # --- data --------------------------------------------------------------------------

    def _multicast(self, client: Interactor, message: MulticastData) -> Effects:
        feed, topic = message.feed, message.topic
        if not self._may_publish(client, feed):
            return []
        self.stats.multicast += 1
        count_feed(client.traffic.multicast, feed)
        topics = self._feeds.get(feed)
        subscribers = topics.get(topic) if topics is not None else None
        if not subscribers:
            return []
        # Noted only now: without subscribers nobody would miss this publisher.
        self._note_publisher(client, (feed, topic))
        frames = Frames(8, client.head(feed), message)
        effects: Effects = []
        for subscriber, subscription in subscribers.items():
            if subscription.entitlements is None:
                frame = frames.whole(subscriber.dialect)
            else:
                frame = frames.filtered(subscriber.dialect, subscription.entitlements)
            effects.append((subscriber.conn, frame))
        self.stats.delivered += len(effects)
        return effects

    def _unicast(self, client: Interactor, message: UnicastData) -> Effects:
        feed, topic = message.feed, message.topic
        if not self._may_publish(client, feed):
            return []
        self.stats.unicast += 1
        count_feed(client.traffic.unicast, feed)
        target = self._by_id.get(message.client_id.bytes_le)
        subscription = target.subscriptions.get((feed, topic)) if target is not None else None
        if target is None or subscription is None:
            return []
        self._note_publisher(client, (feed, topic))
        frames = Frames(9, client.head(feed), message)
        if subscription.entitlements is None:
            frame = frames.whole(target.dialect)
        else:
            frame = frames.filtered(target.dialect, subscription.entitlements)
        self.stats.delivered += 1
        return [(target.conn, frame)]

    def _may_publish(self, client: Interactor, feed: str) -> bool:
        reserved = feed == ADMIN_FEED or feed.startswith(FENCE_FEEDS)
        if reserved or not client.roles(feed) & _PUBLISH:
            self._ignore(client, f"may not publish to {feed!r:.200}")
            return False
        return True

    def _note_publisher(self, client: Interactor, key: Key) -> None:
        if key not in client.published:
            client.published[key] = None
            self._publishers.setdefault(key, {})[client] = None

    def _tell_stale(self, publisher: Interactor, key: Key, effects: Effects) -> None:
        feed, topic = key
        for subscriber in self._feeds.get(feed, {}).get(topic, {}):
            if subscriber is not publisher:
                self.stats.stale_notices += 1
                effects.append((subscriber.conn, notice(feed, topic, subscriber.dialect)))

    # --- subscriptions -----------------------------------------------------------------

    def _subscribe(self, client: Interactor, feed: str, topic: str) -> Effects:
        if not self._may(client, feed, _SUBSCRIBE, "subscribe to"):
            return []
        key = (feed, topic)
        effects: Effects = []
        subscription = client.subscriptions.get(key)
        if subscription is not None:
            subscription.count += 1
            self._notify(client, feed, topic, True, effects)
        elif not self.policy.authorization_required(feed):
            self._check_room(client, feed)
            self._add(client, key, Subscription(1, None), effects)
        elif key in client.granted:
            self._add(client, key, Subscription(1, client.granted[key]), effects)
        elif key in client.pending:
            client.pending[key] += 1
        else:
            self._check_room(client, feed)
            if len(self._pending) >= self._max_pending:
                self._ignore(client, "too many requests wait for an authorizer")
                return []
            client.denied.pop(key, None)
            client.pending[key] = 1
            self._pending[client, feed, topic] = None
            self.stats.pending = len(self._pending)
            for authorizer in self._clients.values():
                if authorizer.roles(feed) & _AUTHORIZE:
                    self._ask(authorizer, client, feed, topic, effects)
        return effects

    def _unsubscribe(self, client: Interactor, feed: str, topic: str) -> Effects:
        if not self._may(client, feed, _SUBSCRIBE, "subscribe to"):
            return []
        key = (feed, topic)
        effects: Effects = []
        subscription = client.subscriptions.get(key)
        if subscription is not None:
            subscription.count -= 1
            if not subscription.count:
                del client.subscriptions[key]
                client.fences -= _is_fence(feed)
                self._remove(client, feed, topic)
            self._notify(client, feed, topic, False, effects)
        elif key in client.pending:
            client.pending[key] -= 1
            if not client.pending[key]:
                self._forget_pending(client, key)
        elif key in client.denied:
            client.denied[key] -= 1
            if not client.denied[key]:
                del client.denied[key]
        return effects

    def _add(
        self, client: Interactor, key: Key, subscription: Subscription, effects: Effects
    ) -> None:
        feed, topic = key
        client.subscriptions[key] = subscription
        # Recorded before listeners are told: an image sent in answer must find its target.
        self._feeds.setdefault(feed, {}).setdefault(topic, {})[client] = subscription
        self.stats.subscriptions += 1
        self._notify(client, feed, topic, True, effects)

    def _remove(self, client: Interactor, feed: str, topic: str) -> None:
        topics = self._feeds[feed]
        subscribers = topics[topic]
        del subscribers[client]
        self.stats.subscriptions -= 1
        if not subscribers:
            del topics[topic]
            if not topics:
                del self._feeds[feed]

    def _may(self, client: Interactor, feed: str, role: int, what: str) -> bool:
        """Whether a client may do that on a feed; otherwise it is ignored, as everywhere.

        Fences are for everybody who is logged in: without them a client of few roles cannot
        even learn that it is. They tell a client nothing but its own subscriptions, so they
        are no way around the roles.
        """
        if client.roles(feed) & role or _is_fence(feed):
            return True
        self._ignore(client, f"may not {what} {feed!r:.200}")
        return False

    def _check_room(self, client: Interactor, feed: str) -> None:
        if client.interests >= self._max_interests:
            raise ProtocolError(f"more than {self._max_interests} subscriptions of one connection")
        if _is_fence(feed):
            if client.fences >= MAX_FENCES:
                raise ProtocolError(f"more than {MAX_FENCES} fences of one connection at a time")
            client.fences += 1

    # --- notifications -----------------------------------------------------------------

    def _listen(self, client: Interactor, feed: str, is_add: bool) -> Effects:
        if not self._may(client, feed, _NOTIFY, "be notified of"):
            return []
        if not is_add:
            if feed in client.listening:
                del client.listening[feed]
                client.fences -= _is_fence(feed)
                self._drop_listener(client, feed)
            return []
        if feed in client.listening:
            return []
        self._check_room(client, feed)
        client.listening[feed] = None
        self._listeners.setdefault(feed, {})[client] = None
        self.stats.listeners += 1
        effects: Effects = []
        for topic, subscribers in self._feeds.get(feed, {}).items():
            for subscriber in subscribers:
                if subscriber is client or not _is_fence(feed):
                    effects.append((client.conn, self._told(subscriber, feed, topic, True)))
        self._count_told(client, feed, len(effects))
        return effects

    def _drop_listener(self, client: Interactor, feed: str) -> None:
        listeners = self._listeners[feed]
        del listeners[client]
        self.stats.listeners -= 1
        if not listeners:
            del self._listeners[feed]

    def _notify(
        self, subscriber: Interactor, feed: str, topic: str, is_add: bool, effects: Effects
    ) -> None:
        listeners = self._listeners.get(feed)
        if listeners and _is_fence(feed):
            listeners = {subscriber: None} if subscriber in listeners else None
        if listeners:
            frame = self._told(subscriber, feed, topic, is_add)
            for listener in listeners:
                effects.append((listener.conn, frame))
                self._count_told(listener, feed, 1)

    def _count_told(self, listener: Interactor, feed: str, count: int) -> None:
        self.stats.notifications += count
        if count:
            count_feed(listener.traffic.told, feed, count)

    def _told(self, subscriber: Interactor, feed: str, topic: str, is_add: bool) -> bytes:
        return b"".join(
            (
                b"\x03",
                subscriber.head(feed),
                subscriber.id_bytes,
                encode_string(feed),
                encode_string(topic),
                b"\x01" if is_add else b"\0",
            )
        )

    # --- authorization -----------------------------------------------------------------

    def _ask(
        self, authorizer: Interactor, client: Interactor, feed: str, topic: str, effects: Effects
    ) -> None:
        user, host = client.names(feed)
        self.stats.authorization_requests += 1
        authorizer.traffic.authorization_requests += 1
        effects.append(
            (authorizer.conn, encode_authorization_request(client.id, host, user, feed, topic))
        )

    def _authorize(self, authorizer: Interactor, message: AuthorizationResponse) -> Effects:
        feed, topic = key = (message.feed, message.topic)
        if not authorizer.roles(feed) & _AUTHORIZE:
            self._ignore(authorizer, f"may not authorize on {feed!r:.200}")
            return []
        client = self._by_id.get(message.client_id.bytes_le)
        # The original takes an answer from any client, about any other: a client could grant
        # itself everything.
        if client is None or not (
            key in client.pending or key in client.granted or key in client.denied
        ):
            self._ignore(authorizer, "answered a question that was not asked")
            return []
        self.stats.authorization_responses += 1
        authorizer.traffic.authorization_responses += 1
        effects: Effects = []
        subscription = client.subscriptions.get(key)
        if message.is_authorization_required and not message.entitlements:
            client.granted.pop(key, None)
            if subscription is not None:
                # Revoked. The subscription ends, and listeners learn it once; the original
                # tells the client and goes on delivering.
                client.denied[key] = subscription.count
                del client.subscriptions[key]
                self._remove(client, feed, topic)
                self._tell_not_entitled(client, feed, topic, effects)
                self._notify(client, feed, topic, False, effects)
            elif key in client.pending:
                client.denied[key] = client.pending[key]
                self._forget_pending(client, key)
                self._tell_not_entitled(client, feed, topic, effects)
            return effects
        entitlements = message.entitlements if message.is_authorization_required else None
        client.granted[key] = entitlements
        if subscription is not None:
            subscription.entitlements = entitlements
            return effects
        count = client.pending.get(key, 0) or client.denied.get(key, 0)
        if key in client.pending:
            self._forget_pending(client, key)
        client.denied.pop(key, None)
        if count:
            self._add(client, key, Subscription(count, entitlements), effects)
        return effects

    def _forget_pending(self, client: Interactor, key: Key) -> None:
        del client.pending[key]
        del self._pending[client, key[0], key[1]]
        self.stats.pending = len(self._pending)

    def _tell_not_entitled(
        self, client: Interactor, feed: str, topic: str, effects: Effects
    ) -> None:
        self.stats.not_entitled_notices += 1
        effects.append((client.conn, notice(feed, topic, client.dialect)))

    def _ignore(self, client: Interactor, why: str) -> None:
        self.stats.ignored += 1
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "%r on %r: %s", client.identity.user[:200], client.identity.host[:200], why
            )
