"""The distributor as a state machine: who gets which bytes. No socket, clock or loop.

Feed it what happens (`Broker.connected`, `received`, `disconnected`, `heartbeat`) and it
returns what is to be written to whom, in order. All state is here, so it can be driven by
tests through any sequence. Dicts keep insertion order, and so does everything that is sent.

Feeds and topics are matched by equality; nothing is stored for those who are not there.

Source: jetblack-messagebus 3.0.0 to 6.0 (``SubscriptionManager``, ``NotificationManager``,
``PublisherManager``, ``InteractorManager``), without its known defects: the README of this
backend lists every deliberate difference.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from pubsub_messagebus.protocol import (
    ADMIN_FEED,
    FENCE_FEEDS,
    HEARTBEAT,
    HEARTBEAT_TOPIC,
    AuthorizationResponse,
    DataPacket,
    Dialect,
    Flag,
    Message,
    MulticastData,
    NotificationRequest,
    ProtocolError,
    SubscriptionRequest,
    UnicastData,
    encode_authorization_request,
    encode_flag,
    encode_packets,
    encode_string,
    notice,
)

from .roles import Permissions, Policy, Role

__all__ = ["Broker", "BrokerStats", "Effects", "Identity", "Member", "Traffic"]

logger = logging.getLogger("pubsub_messagebus.server.broker")

Effects: TypeAlias = list[tuple[Hashable, bytes]]
"""What is to be written to which connection, in order."""

_Key: TypeAlias = tuple[str, str]

MAX_PENDING = 10_000
"""Requests that may wait for an authorizer, on the whole server."""

MAX_INTERESTS = 1_000_000
"""Subscriptions, listenings and remembered rights of one connection."""

MAX_COUNTED_FEEDS = 1000
"""Feeds that are counted one by one for a connection; the names are its choice."""

MAX_COUNTED_NAME = 200
"""Characters of the names of those feeds; what is counted outlives who chose them."""

OTHER_FEEDS = "…"
"""What the others are counted under."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a connection is, after authentication.

    Attributes:
        method: ``NULL``, ``BASIC``, ``JWT``, ``LDAP`` or an authenticator's own word.
        impersonating: Counts instead of *user* on feeds where that is allowed.
        forwarded_for: Counts instead of *host* on feeds where that is allowed.
        permissions: What the authenticator knows of this user's rights, or None.
    """

    user: str = "nobody"
    host: str = "localhost"
    method: str = "NULL"
    impersonating: str = ""
    forwarded_for: str = ""
    application: str = "unspecified"
    permissions: Permissions | None = None


@dataclass(slots=True)
class BrokerStats:
    """What happened so far, and what is there now.

    Attributes:
        delivered: Data messages handed to a subscriber, notices not counted.
        ignored: Requests that were dropped for lack of a role or of sense.
    """

    received: int = 0
    multicast: int = 0
    unicast: int = 0
    delivered: int = 0
    notifications: int = 0
    stale_notices: int = 0
    not_entitled_notices: int = 0
    authorization_requests: int = 0
    authorization_responses: int = 0
    ignored: int = 0
    clients: int = 0
    subscriptions: int = 0
    listeners: int = 0
    pending: int = 0


def _by_feed() -> dict[str, int]:
    return {}


@dataclass(slots=True)
class Traffic:
    """What went through one connection; the last three by feed.

    Attributes:
        told: Notifications that it was sent.
    """

    reads: int = 0
    authorization_requests: int = 0
    authorization_responses: int = 0
    told: dict[str, int] = field(default_factory=_by_feed)
    unicast: dict[str, int] = field(default_factory=_by_feed)
    multicast: dict[str, int] = field(default_factory=_by_feed)

    def add(self, other: Traffic) -> None:
        """Count what *other* counted as well."""
        self.reads += other.reads
        self.authorization_requests += other.authorization_requests
        self.authorization_responses += other.authorization_responses
        for own, more in (
            (self.told, other.told),
            (self.unicast, other.unicast),
            (self.multicast, other.multicast),
        ):
            for feed, count in more.items():
                _count(own, feed, count)


def _count(counted: dict[str, int], feed: str, more: int = 1) -> None:
    if feed not in counted and (len(counted) >= MAX_COUNTED_FEEDS or len(feed) > MAX_COUNTED_NAME):
        feed = OTHER_FEEDS
    counted[feed] = counted.get(feed, 0) + more


@dataclass(frozen=True, slots=True)
class Member:
    """One connection as `Broker.members` shows it.

    Attributes:
        user: The effective one on feeds that are not listed; likewise *host*.
        subscriptions: How many topics, by feed.
        listening: Feeds of which it is told.
    """

    conn: Hashable
    id: uuid.UUID
    user: str
    host: str
    application: str
    traffic: Traffic
    subscriptions: dict[str, int]
    listening: dict[str, int]


class _Subscription:
    """One connection's subscription to one topic.

    Attributes:
        count: How often it was added.
        entitlements: None where packets are not filtered.
    """

    __slots__ = ("count", "entitlements")

    def __init__(self, count: int, entitlements: frozenset[int] | None) -> None:
        self.count = count
        self.entitlements = entitlements


class _Client:
    """One connection."""

    __slots__ = (
        "conn",
        "denied",
        "dialect",
        "granted",
        "head",
        "heads",
        "id",
        "id_bytes",
        "identity",
        "listening",
        "pending",
        "published",
        "roles",
        "subscriptions",
        "traffic",
        "usual_roles",
    )

    def __init__(
        self, conn: Hashable, identity: Identity, dialect: Dialect, identifier: uuid.UUID
    ) -> None:
        self.conn = conn
        self.identity = identity
        self.dialect: Dialect = dialect
        self.id = identifier
        self.id_bytes = identifier.bytes_le
        # User and host as they stand in forwarded messages: usually, and on listed feeds.
        self.head = b""
        self.heads: dict[str, bytes] = {}
        self.usual_roles = Role.NONE
        self.roles: dict[str, Role] = {}
        self.subscriptions: dict[_Key, _Subscription] = {}
        self.listening: dict[str, None] = {}
        self.published: dict[_Key, None] = {}
        # Rights that this connection holds, subscribed or not; None is unfiltered.
        self.granted: dict[_Key, frozenset[int] | None] = {}
        # Adds that wait for an answer, or got a no for one.
        self.pending: dict[_Key, int] = {}
        self.denied: dict[_Key, int] = {}
        self.traffic = Traffic()

    @property
    def interests(self) -> int:
        return (
            len(self.subscriptions)
            + len(self.listening)
            + len(self.granted)
            + len(self.pending)
            + len(self.denied)
        )


class Broker:
    """Routes between connections, which are any hashable objects of the caller.

    A caller must write the effects of one call before those of the next.
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
        """What went through connections that are gone."""
        self._max_pending = max_pending
        self._max_interests = max_interests
        self._clients: dict[Hashable, _Client] = {}
        self._by_id: dict[bytes, _Client] = {}
        # feed → topic → subscriber; empty ones are removed, so the order is that of the
        # first subscription of those that are there.
        self._feeds: dict[str, dict[str, dict[_Client, _Subscription]]] = {}
        self._listeners: dict[str, dict[_Client, None]] = {}
        self._publishers: dict[_Key, dict[_Client, None]] = {}
        self._pending: dict[tuple[_Client, str, str], None] = {}

    # --- what happens ------------------------------------------------------------------

    def connected(
        self,
        conn: Hashable,
        identity: Identity,
        *,
        dialect: Dialect = "is_image",
        client_id: uuid.UUID | None = None,
    ) -> Effects:
        """Take a connection in; it may be asked at once for what waits for an authorizer."""
        if conn in self._clients:
            raise ValueError("this connection is already there")
        client = _Client(conn, identity, dialect, client_id or uuid.uuid4())
        self._describe(client)
        self._clients[conn] = client
        self._by_id[client.id_bytes] = client
        self.stats.clients = len(self._clients)
        effects: Effects = []
        for subscriber, feed, topic in self._pending:
            if self._roles(client, feed) & Role.AUTHORIZE:
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
        """Take a connection out: stale notices first, then the removals."""
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
        for feed, topic in client.subscriptions:
            self._remove(client, feed, topic)
        for feed, topic in client.subscriptions:
            self._notify(client, feed, topic, False, effects)
        return effects

    def heartbeat(self) -> Effects:
        """Publish the sign of life to those who subscribed to it."""
        subscribers = self._feeds.get(ADMIN_FEED, {}).get(HEARTBEAT_TOPIC, {})
        return [(client.conn, HEARTBEAT[client.dialect]) for client in subscribers]

    # --- looking in --------------------------------------------------------------------

    def client_id(self, conn: Hashable) -> uuid.UUID:
        """Return the identifier that others know a connection by."""
        return self._clients[conn].id

    def names(self, conn: Hashable) -> tuple[str, str, str]:
        """Return host, user and application of a connection, as most feeds see them."""
        client = self._clients[conn]
        user, host = self._effective(client, None)
        return host, user, client.identity.application

    def subscribers(self, feed: str, topic: str) -> dict[Hashable, int]:
        """Return who is subscribed, and how often each added."""
        found = self._feeds.get(feed, {}).get(topic, {})
        return {client.conn: subscription.count for client, subscription in found.items()}

    def members(self) -> Iterator[Member]:
        """Return everybody who is connected, and what they did."""
        for client in self._clients.values():
            user, host = self._effective(client, None)
            subscriptions: dict[str, int] = {}
            for feed, count in Counter(feed for feed, _ in client.subscriptions).items():
                _count(subscriptions, feed, count)
            listening: dict[str, int] = {}
            for feed in client.listening:
                _count(listening, feed)
            yield Member(
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
        """Whether nothing at all is kept."""
        return not (
            self._clients
            or self._by_id
            or self._feeds
            or self._listeners
            or self._publishers
            or self._pending
        )

    # --- data --------------------------------------------------------------------------

    def _multicast(self, client: _Client, message: MulticastData) -> Effects:
        feed, topic = message.feed, message.topic
        if not self._may_publish(client, feed):
            return []
        self.stats.multicast += 1
        _count(client.traffic.multicast, feed)
        topics = self._feeds.get(feed)
        subscribers = topics.get(topic) if topics is not None else None
        if not subscribers:
            return []
        self._note_publisher(client, (feed, topic))
        frames = _Frames(8, self._head(client, feed), message)
        effects: Effects = []
        for subscriber, subscription in subscribers.items():
            if subscription.entitlements is None:
                frame = frames.whole(subscriber.dialect)
            else:
                frame = frames.filtered(subscriber.dialect, subscription.entitlements)
            effects.append((subscriber.conn, frame))
        self.stats.delivered += len(effects)
        return effects

    def _unicast(self, client: _Client, message: UnicastData) -> Effects:
        feed, topic = message.feed, message.topic
        if not self._may_publish(client, feed):
            return []
        self.stats.unicast += 1
        _count(client.traffic.unicast, feed)
        target = self._by_id.get(message.client_id.bytes_le)
        subscription = target.subscriptions.get((feed, topic)) if target is not None else None
        if target is None or subscription is None:
            return []
        self._note_publisher(client, (feed, topic))
        frames = _Frames(9, self._head(client, feed), message)
        if subscription.entitlements is None:
            frame = frames.whole(target.dialect)
        else:
            frame = frames.filtered(target.dialect, subscription.entitlements)
        self.stats.delivered += 1
        return [(target.conn, frame)]

    def _may_publish(self, client: _Client, feed: str) -> bool:
        reserved = feed == ADMIN_FEED or feed.startswith(FENCE_FEEDS)
        if reserved or not self._roles(client, feed) & Role.PUBLISH:
            self._ignore(client, f"may not publish to {feed!r:.200}")
            return False
        return True

    def _note_publisher(self, client: _Client, key: _Key) -> None:
        if key not in client.published:
            client.published[key] = None
            self._publishers.setdefault(key, {})[client] = None

    def _tell_stale(self, publisher: _Client, key: _Key, effects: Effects) -> None:
        feed, topic = key
        for subscriber in self._feeds.get(feed, {}).get(topic, {}):
            if subscriber is not publisher:
                self.stats.stale_notices += 1
                effects.append((subscriber.conn, notice(feed, topic, subscriber.dialect)))

    # --- subscriptions -----------------------------------------------------------------

    def _subscribe(self, client: _Client, feed: str, topic: str) -> Effects:
        if not self._roles(client, feed) & Role.SUBSCRIBE:
            self._ignore(client, f"may not subscribe to {feed!r:.200}")
            return []
        key = (feed, topic)
        effects: Effects = []
        subscription = client.subscriptions.get(key)
        if subscription is not None:
            subscription.count += 1
            self._notify(client, feed, topic, True, effects)
        elif not self.policy.authorization_required(feed):
            self._check_room(client)
            self._add(client, key, _Subscription(1, None), effects)
        elif key in client.granted:
            self._add(client, key, _Subscription(1, client.granted[key]), effects)
        elif key in client.pending:
            client.pending[key] += 1
        else:
            self._check_room(client)
            if len(self._pending) >= self._max_pending:
                self._ignore(client, "too many requests wait for an authorizer")
                return []
            client.denied.pop(key, None)
            client.pending[key] = 1
            self._pending[client, feed, topic] = None
            self.stats.pending = len(self._pending)
            for authorizer in self._clients.values():
                if self._roles(authorizer, feed) & Role.AUTHORIZE:
                    self._ask(authorizer, client, feed, topic, effects)
        return effects

    def _unsubscribe(self, client: _Client, feed: str, topic: str) -> Effects:
        if not self._roles(client, feed) & Role.SUBSCRIBE:
            self._ignore(client, f"may not subscribe to {feed!r:.200}")
            return []
        key = (feed, topic)
        effects: Effects = []
        subscription = client.subscriptions.get(key)
        if subscription is not None:
            subscription.count -= 1
            if not subscription.count:
                del client.subscriptions[key]
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
        self, client: _Client, key: _Key, subscription: _Subscription, effects: Effects
    ) -> None:
        feed, topic = key
        client.subscriptions[key] = subscription
        # Recorded before anybody is told: an image sent in answer must find its target.
        self._feeds.setdefault(feed, {}).setdefault(topic, {})[client] = subscription
        self.stats.subscriptions += 1
        self._notify(client, feed, topic, True, effects)

    def _remove(self, client: _Client, feed: str, topic: str) -> None:
        topics = self._feeds[feed]
        subscribers = topics[topic]
        del subscribers[client]
        self.stats.subscriptions -= 1
        if not subscribers:
            del topics[topic]
            if not topics:
                del self._feeds[feed]

    def _check_room(self, client: _Client) -> None:
        if client.interests >= self._max_interests:
            raise ProtocolError(f"more than {self._max_interests} subscriptions of one connection")

    # --- notifications -----------------------------------------------------------------

    def _listen(self, client: _Client, feed: str, is_add: bool) -> Effects:
        if not self._roles(client, feed) & Role.NOTIFY:
            self._ignore(client, f"may not be notified of {feed!r:.200}")
            return []
        if not is_add:
            if feed in client.listening:
                del client.listening[feed]
                self._drop_listener(client, feed)
            return []
        if feed in client.listening:
            return []
        self._check_room(client)
        client.listening[feed] = None
        self._listeners.setdefault(feed, {})[client] = None
        self.stats.listeners += 1
        effects: Effects = []
        for topic, subscribers in self._feeds.get(feed, {}).items():
            for subscriber in subscribers:
                effects.append((client.conn, self._told(subscriber, feed, topic, True)))
        self._count_told(client, feed, len(effects))
        return effects

    def _drop_listener(self, client: _Client, feed: str) -> None:
        listeners = self._listeners[feed]
        del listeners[client]
        self.stats.listeners -= 1
        if not listeners:
            del self._listeners[feed]

    def _notify(
        self, subscriber: _Client, feed: str, topic: str, is_add: bool, effects: Effects
    ) -> None:
        listeners = self._listeners.get(feed)
        if listeners:
            frame = self._told(subscriber, feed, topic, is_add)
            for listener in listeners:
                effects.append((listener.conn, frame))
                self._count_told(listener, feed, 1)

    def _count_told(self, listener: _Client, feed: str, count: int) -> None:
        self.stats.notifications += count
        if count:
            _count(listener.traffic.told, feed, count)

    def _told(self, subscriber: _Client, feed: str, topic: str, is_add: bool) -> bytes:
        return b"".join(
            (
                b"\x03",
                self._head(subscriber, feed),
                subscriber.id_bytes,
                encode_string(feed),
                encode_string(topic),
                b"\x01" if is_add else b"\0",
            )
        )

    # --- authorization -----------------------------------------------------------------

    def _ask(
        self, authorizer: _Client, client: _Client, feed: str, topic: str, effects: Effects
    ) -> None:
        user, host = self._effective(client, feed)
        self.stats.authorization_requests += 1
        authorizer.traffic.authorization_requests += 1
        effects.append(
            (authorizer.conn, encode_authorization_request(client.id, host, user, feed, topic))
        )

    def _authorize(self, authorizer: _Client, message: AuthorizationResponse) -> Effects:
        feed, topic = key = (message.feed, message.topic)
        if not self._roles(authorizer, feed) & Role.AUTHORIZE:
            self._ignore(authorizer, f"may not authorize on {feed!r:.200}")
            return []
        client = self._by_id.get(message.client_id.bytes_le)
        if client is None or not (
            key in client.pending or key in client.granted or key in client.denied
        ):
            self._ignore(authorizer, "authorized what nobody asked for")
            return []
        self.stats.authorization_responses += 1
        authorizer.traffic.authorization_responses += 1
        effects: Effects = []
        subscription = client.subscriptions.get(key)
        if message.is_authorization_required and not message.entitlements:
            client.granted.pop(key, None)
            if subscription is not None:
                # Revoked: the end of the subscription, which its listeners learn once.
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
            self._add(client, key, _Subscription(count, entitlements), effects)
        return effects

    def _forget_pending(self, client: _Client, key: _Key) -> None:
        del client.pending[key]
        del self._pending[client, key[0], key[1]]
        self.stats.pending = len(self._pending)

    def _tell_not_entitled(self, client: _Client, feed: str, topic: str, effects: Effects) -> None:
        self.stats.not_entitled_notices += 1
        effects.append((client.conn, notice(feed, topic, client.dialect)))

    # --- who is who --------------------------------------------------------------------

    def _describe(self, client: _Client) -> None:
        """Work out roles and names once, usually and for each listed feed."""
        client.head, client.usual_roles = self._described(client, None)
        listed: Iterable[str] = self.policy.feeds
        if client.identity.permissions:
            listed = {**self.policy.feeds, **client.identity.permissions}
        for feed in listed:
            client.heads[feed], client.roles[feed] = self._described(client, feed)

    def _described(self, client: _Client, feed: str | None) -> tuple[bytes, Role]:
        user, host = self._effective(client, feed)
        roles = self.policy.roles(feed or "", user, host, client.identity.permissions)
        if feed is None and ("" in self.policy.feeds or "" in (client.identity.permissions or ())):
            # The feed without a name is listed; what is usual is what an unlisted one has.
            roles = self.policy.change.apply(Role.NONE)
        return encode_string(user) + encode_string(host), roles

    def _effective(self, client: _Client, feed: str | None) -> tuple[str, str]:
        identity = client.identity
        policy = self.policy
        if feed is not None and feed in policy.feeds:
            impersonate, proxy = policy.may_impersonate(feed), policy.may_proxy(feed)
        else:
            impersonate, proxy = policy.is_impersonation_allowed, policy.is_proxy_allowed
        user = identity.impersonating if impersonate and identity.impersonating else identity.user
        host = identity.forwarded_for if proxy and identity.forwarded_for else identity.host
        return user, host

    def _head(self, client: _Client, feed: str) -> bytes:
        return client.heads.get(feed, client.head) if client.heads else client.head

    def _roles(self, client: _Client, feed: str) -> Role:
        return client.roles.get(feed, client.usual_roles) if client.roles else client.usual_roles

    def _ignore(self, client: _Client, why: str) -> None:
        self.stats.ignored += 1
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "%r on %r: %s", client.identity.user[:200], client.identity.host[:200], why
            )


class _Frames:
    """The forms in which one data message reaches its subscribers, each made once."""

    __slots__ = ("_cached", "_dialect", "_front", "_message", "_packets", "_whole")

    def __init__(self, kind: int, head: bytes, message: MulticastData | UnicastData) -> None:
        self._message = message
        self._front = bytes((kind,)) + head
        self._dialect: Dialect = "is_image" if isinstance(message.flag, bool) else "content_type"
        self._whole: dict[Dialect, bytes] = {}
        self._cached: dict[tuple[Dialect, tuple[int, ...]], bytes] = {}
        self._packets: list[DataPacket] | None = None

    def whole(self, dialect: Dialect) -> bytes:
        frame = self._whole.get(dialect)
        if frame is None:
            message = self._message
            if dialect == self._dialect:
                frame = self._front + message.body
            else:
                frame = self._beginning(dialect) + message.body[message.at :]
            self._whole[dialect] = frame
        return frame

    def filtered(self, dialect: Dialect, held: frozenset[int]) -> bytes:
        """Return the packets that need something and no more than *held*, maybe none."""
        if self._packets is None:
            self._packets = self._message.data_packets or []
        passing = tuple(
            index
            for index, packet in enumerate(self._packets)
            if packet.entitlements is not None and packet.entitlements <= held
        )
        frame = self._cached.get((dialect, passing))
        if frame is None:
            packets = encode_packets([self._packets[index] for index in passing])
            frame = self._cached[dialect, passing] = self._beginning(dialect) + packets
        return frame

    def _beginning(self, dialect: Dialect) -> bytes:
        message = self._message
        flag: Flag = message.flag
        if dialect == self._dialect:
            return self._front + message.body[: message.at]
        # Neither dialect can say what the other says.
        flag = False if dialect == "is_image" else ""
        names = encode_string(message.feed) + encode_string(message.topic)
        identifier = message.client_id.bytes_le if isinstance(message, UnicastData) else b""
        return self._front + identifier + names + encode_flag(flag, dialect)
