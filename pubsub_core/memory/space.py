"""The state that buses of one name share: subscriptions, stored messages, clients."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import msgspec

from pubsub_core.capabilities import ConfirmedBy
from pubsub_core.errors import (
    ConnectError,
    NotAuthorized,
    Outcome,
    PublishFailed,
)
from pubsub_core.events import InterestEvent, InterestKind
from pubsub_core.interfaces import (
    AuthorizationRequest,
    Entitlements,
    HistoryQuery,
    Watch,
    WatchKind,
    WireSub,
)
from pubsub_core.keyed import BoundedCache
from pubsub_core.message import InFrame, Member, Origin, OutFrame, Receipt
from pubsub_core.topics import overlap, parse_filter
from pubsub_core.trie import HandlerTrie

from .client import Client, Group, LocalSub
from .rights import Rights, is_exact
from .users import Users

__all__ = ["Space"]

_MOST_PLANS = 10_000
# Looking up a member of an enumeration costs as much as making a frame in Python 3.11.
_BROKER = ConfirmedBy.BROKER


class _Route(NamedTuple):
    """Where a message of some topic goes: to a client's subscriptions, or to a group."""

    client: Client
    ids: tuple[int, ...]
    manual: bool
    group: Group | None


class Space:
    """The broker of the in-process backend.

    Thread-safe: buses of several event loops may share a space.
    """

    _named: ClassVar[dict[str, Space]] = {}
    _names: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str = "", *, history: int = 10_000) -> None:
        self.name = name
        self.lock = threading.RLock()
        self._trie: HandlerTrie[LocalSub | Group] = HandlerTrie("mqtt")
        self._groups: dict[tuple[str, str], Group] = {}
        self._clients: dict[str, Client] = {}
        self._retained: dict[str, tuple[InFrame, float | None]] = {}
        self._history: deque[tuple[InFrame, float | None]] = deque(maxlen=history)
        self._watches: dict[tuple[str, int], tuple[Client, Watch]] = {}
        self._users = Users()
        self._rights = Rights(self._users.may_authorize)
        # Whether any topic needs authorization, as every publish asks that.
        self._guarding = False
        self._ids = itertools.count(1)
        self._refusing = False
        # Ids of the clients that asked to be spared for now.
        self.paused: set[str] = set()
        # Who receives a topic, worked out once and kept until a subscription changes.
        self._plans = BoundedCache[str, tuple[_Route, ...]](_MOST_PLANS)

    @classmethod
    def named(cls, name: str, *, history: int = 10_000) -> Space:
        """Return the space of that name, made when first asked for; ``""`` is always new."""
        if not name:
            return cls(history=history)
        with cls._names:
            space = cls._named.get(name)
            if space is None:
                space = cls._named[name] = cls(name, history=history)
            return space

    @classmethod
    def forget(cls, name: str) -> None:
        """Let the next bus of that name start with an empty space."""
        with cls._names:
            cls._named.pop(name, None)

    # --- misbehaviour, for tests ---------------------------------------------------------

    def refuse(self, refusing: bool) -> None:
        """Refuse new sessions, or accept them again."""
        self._refusing = refusing

    def disconnect_all(self) -> None:
        """Cut every session, as a failing network would."""
        with self.lock:
            clients = [client for client in self._clients.values() if client.sink is not None]
        for client in clients:
            client.cut(ConnectionResetError("the space cut the session"))

    def allow(
        self,
        username: str,
        password: str = "",
        *,
        publish: Iterable[str] = ("#",),
        subscribe: Iterable[str] = ("#",),
        authorize: Iterable[str] = ("#",),
    ) -> None:
        """Let *username* in, with rights on these filters; anybody else is refused then."""
        self._users.allow(
            username, password, publish=publish, subscribe=subscribe, authorize=authorize
        )

    # --- guarded topics --------------------------------------------------------------------

    def guard(self, *filters: str) -> None:
        """Show nothing of these filters' topics unless an authorizer lets a client see it.

        The option ``guarded`` of a bus does the same for its whole space.
        """
        with self.lock:
            rights = self._rights
            open_before = [
                subscription
                for client in self._clients.values()
                for subscription in client.subscriptions.values()
                if is_exact(subscription.filter) and not rights.guards(subscription.filter)
            ]
            rights.guard(filters)
            self._guarding = rights.needed
            self._plans.clear()
            for client, topic in dict.fromkeys(
                (subscription.client, subscription.filter)
                for subscription in open_before
                if rights.guards(subscription.filter)
            ):
                self._tell_of(client, topic, InterestKind.LEFT)
                rights.want(client, topic)

    def shown(self, client: Client, frame: InFrame, *, tell: bool = False) -> InFrame | None:
        """Return the parts of *frame* that *client* may see; see `Rights.shown`."""
        if not self._guarding:
            return frame
        with self.lock:
            return self._rights.shown(client, frame, tell=tell)

    def watch_authorizations(self, client: Client, filter: str) -> None:
        """Ask *client* about those who want topics of *filter*, where it may answer."""
        with self.lock:
            self._rights.watch(client, filter)

    def unwatch_authorizations(self, client: Client, filter: str) -> None:
        """Ask no more."""
        with self.lock:
            self._rights.unwatch(client, filter)

    def authorize(
        self,
        authorizer: Client,
        request: AuthorizationRequest,
        held: Entitlements | None,
    ) -> None:
        """Act on an answer; one about a client that is gone, or that nobody asked, is ignored.

        The first right shows the client to others, and retained messages to it; a refusal
        hides the client.
        """
        topic = request.topic
        if not self._users.may_authorize(authorizer, topic):
            raise NotAuthorized(
                f"{authorizer.options.username!r} may not authorize on {topic!r}",
                hint="ask for the right to authorize there",
                backend="memory",
                topic=topic,
            )
        with self.lock:
            client = self._clients.get(request.member.id)
            if client is None:
                return
            before = self._rights.held(client, topic)
            present = self._present(client, topic)
            if not self._rights.answer(client, topic, held):
                return
            self._plans.clear()
            if before is None and held is not None:
                self._tell_of(client, topic, InterestKind.JOINED, present=present)
                for subscription in tuple(client.subscriptions.values()):
                    if subscription.want.group is None and parse_filter(
                        subscription.filter
                    ).matches(topic):
                        self.give_retained(subscription, topic)
            elif before is not None and held is None:
                self._tell_of(client, topic, InterestKind.LEFT, "not entitled")

    def end_session(self, client: Client) -> None:
        """Ask *client* nothing until it is back; its own rights stay until it leaves."""
        with self.lock:
            self._rights.end_session(client)

    def _visible(self, client: Client, filter: str) -> bool:
        """Whether others are told of *client*'s subscription to *filter*."""
        return not is_exact(filter) or self._rights.may_see(client, filter)

    def _tell_of(
        self,
        client: Client,
        topic: str,
        kind: InterestKind,
        reason: str = "",
        *,
        present: frozenset[tuple[str, int]] | None = None,
    ) -> None:
        """Tell who watches that *client*'s subscriptions to *topic* appear, or disappear."""
        if present is None:
            present = self._present(client, topic)
        for subscription in client.subscriptions.values():
            if subscription.filter == topic:
                self._tell(client, topic, kind, reason, present)
                # Presence tells of clients, not of subscriptions.
                present = frozenset(
                    key
                    for key, (_, watch) in self._watches.items()
                    if watch.kind is WatchKind.PRESENCE
                )

    # --- sessions ------------------------------------------------------------------------

    def enter(self, client: Client) -> bool:
        """Begin a session; return whether an earlier one goes on."""
        if self._refusing:
            raise ConnectError(
                f"{client.context.address} refuses sessions",
                hint="call Space.refuse(False)",
                backend="memory",
            )
        self._users.check_password(client)
        with self.lock:
            resumed = client.options.persistent and client.member.id in self._clients
            self._clients[client.member.id] = client
            if client.options.guarded:
                self.guard(*client.options.guarded)
            return resumed

    def leave(self, client: Client, reason: str) -> None:
        """End a session for good: subscriptions, watches and the wait for acks are gone."""
        with self.lock:
            if self._clients.pop(client.member.id, None) is None:
                return
            for subscription in tuple(client.subscriptions.values()):
                self.unsubscribe(client, subscription.want, reason)
            for key in [key for key in self._watches if key[0] == client.member.id]:
                del self._watches[key]
            self._rights.leave(client)

    def subscribe(self, client: Client, want: WireSub) -> None:
        """Add a subscription, deliver retained values, tell who watches."""
        self._users.check_subscribe(client, want.filter)
        with self.lock:
            old = client.subscriptions.get(want.id)
            if old is not None:
                old.want = want
                self._plans.clear()
                return
            rights = self._rights
            if self._guarding:
                rights.ask_again(client, parse_filter(want.filter))
            before = self._present(client, want.filter)
            subscription = LocalSub(client, want)
            client.subscriptions[want.id] = subscription
            if want.group is None:
                self._trie.add(want.filter, subscription)
            else:
                key = (want.group, want.filter)
                group = self._groups.get(key)
                if group is None:
                    group = self._groups[key] = Group()
                    self._trie.add(want.filter, group)
                group.members.append(subscription)
            self._plans.clear()
            if self._visible(client, want.filter):
                self._tell(client, want.filter, InterestKind.JOINED, "", before)
            else:
                rights.want(client, want.filter)
            if want.group is None:
                self.give_retained(subscription)

    def unsubscribe(self, client: Client, want: WireSub, reason: str) -> None:
        """Drop a subscription, tell who watches."""
        with self.lock:
            subscription = client.subscriptions.pop(want.id, None)
            if subscription is None:
                return
            if want.group is None:
                self._trie.remove(want.filter, subscription)
            else:
                key = (want.group, want.filter)
                group = self._groups[key]
                group.members.remove(subscription)
                if not group.members:
                    del self._groups[key]
                    self._trie.remove(want.filter, group)
            self._plans.clear()
            if self._visible(client, want.filter):
                self._tell(
                    client,
                    want.filter,
                    InterestKind.LEFT,
                    reason,
                    self._present(client, want.filter),
                )
            if self._guarding:
                wanted = [parse_filter(each.filter) for each in client.subscriptions.values()]
                self._rights.drop(client, lambda topic: any(each.matches(topic) for each in wanted))

    # --- messages ------------------------------------------------------------------------

    def publish(self, client: Client, out: OutFrame) -> Receipt:
        """Store and deliver one message."""
        topic, payload, ttl = out.topic, out.payload, out.ttl
        if self._users.known:
            self._users.check_publish(client, topic)
        now = client.time()
        member = client.member
        with self.lock:
            identity = str(next(self._ids))
            plan = self._plans.get(topic)
            if plan is None:
                plan = self._plan(topic)
            guarded = self._guarding and self._rights.guards(topic)
            frame: InFrame | None = None
            count = 0
            for receiver, ids, manual, group in plan:
                if group is not None:
                    count += self._publish_to_group(group, client, out, now, identity)
                    continue
                if receiver is client and not out.echo:
                    continue
                count += 1
                frame = InFrame(
                    topic=topic,
                    payload=payload,
                    qos=out.qos,
                    time=now,
                    headers=out.headers,
                    content_type=out.content_type,
                    expires_in=ttl,
                    id=identity,
                    source=member,
                    parts=out.parts,
                    subscriptions=ids,
                )
                if manual:
                    receiver.take(frame, manual=True)
                elif guarded or (sink := receiver.sink) is None:
                    receiver.take(frame)
                else:
                    sink.deliver(frame)
            if frame is None:
                frame = InFrame(
                    topic=topic,
                    payload=payload,
                    qos=out.qos,
                    time=now,
                    headers=out.headers,
                    content_type=out.content_type,
                    id=identity,
                    source=client.member,
                    parts=out.parts,
                )
            stored = (frame, None if ttl is None else now + ttl)
            if out.retain:
                if payload:
                    self._retained[topic] = stored
                else:
                    self._retained.pop(topic, None)
            self._history.append(stored)
            return Receipt(topic, _BROKER, identity, count)

    def _publish_to_group(
        self, group: Group, client: Client, out: OutFrame, now: float, identity: str
    ) -> int:
        members = self._allowed(group, out.topic)
        if not members:
            return 0
        member = group.pick(members)
        if member.client is client and not out.echo:
            return 0
        frame = InFrame(
            topic=out.topic,
            payload=out.payload,
            qos=out.qos,
            time=now,
            headers=out.headers,
            content_type=out.content_type,
            expires_in=out.ttl,
            id=identity,
            source=client.member,
            parts=out.parts,
            subscriptions=(member.want.id,),
        )
        member.client.take(frame, group, manual=member.want.manual_ack)
        return 1

    def send_to(self, client: Client, member: str, out: OutFrame) -> Receipt:
        """Deliver to one client, if it is subscribed to the topic."""
        self._users.check_publish(client, out.topic)
        with self.lock:
            receiver = self._clients.get(member)
            ids = (
                ()
                if receiver is None or not self._rights.may_see(receiver, out.topic)
                else tuple(
                    subscription.want.id
                    for subscription in receiver.subscriptions.values()
                    if parse_filter(subscription.filter).matches(out.topic)
                )
            )
            if receiver is None or not ids:
                raise PublishFailed(
                    f"that member is not subscribed to {out.topic!r}",
                    outcome=Outcome.REJECTED,
                    hint="take members from presence or notifications",
                    backend="memory",
                    topic=out.topic,
                    retryable=False,
                )
            identity = str(next(self._ids))
            frame = InFrame(
                topic=out.topic,
                payload=out.payload,
                origin=Origin.IMAGE,
                qos=out.qos,
                time=client.clock.time(),
                headers=out.headers,
                content_type=out.content_type,
                id=identity,
                source=client.member,
                parts=out.parts,
                subscriptions=ids,
            )
            receiver.take(frame)
            return Receipt(out.topic, _BROKER, identity, 1)

    def blocked(self, client: Client, out: OutFrame) -> Client | None:
        """Return a receiver of *out* that asked to be spared for now, if there is one."""
        with self.lock:
            for route in self._plans.get(out.topic) or self._plan(out.topic):
                if route.group is not None:
                    members = self._allowed(route.group, out.topic)
                    if members and all(member.client.paused for member in members):
                        return members[0].client
                elif route.client.paused and (out.echo or route.client is not client):
                    return route.client
        return None

    def stored(self, client: Client, filter: str, query: HistoryQuery) -> list[InFrame]:
        """Return the stored messages that *client* may see, oldest first."""
        matches = parse_filter(filter).matches
        now = client.time()
        result: list[InFrame] = []
        with self.lock:
            for frame, expires in reversed(self._history):
                if query.last is not None and len(result) >= query.last:
                    break
                if expires is not None and expires <= now:
                    continue
                if query.since is not None and frame.time < query.since:
                    break
                if query.until is not None and frame.time > query.until:
                    continue
                if matches(frame.topic) and (shown := self._rights.shown(client, frame)):
                    result.append(_stored(shown, expires, now, Origin.REPLAY))
        result.reverse()
        return result

    def last(self, client: Client, topic: str) -> InFrame | None:
        """Return the retained value of *topic*, as far as *client* may see it."""
        now = client.time()
        with self.lock:
            kept = self._retained.get(topic)
            if kept is None or (kept[1] is not None and kept[1] <= now):
                return None
            shown = self._rights.shown(client, kept[0])
            return None if shown is None else _stored(shown, kept[1], now, Origin.RETAINED)

    def redeliver(self, subscription: LocalSub, group: Group | None, frame: InFrame) -> None:
        """Deliver *frame* once more, in a share group to the next member."""
        with self.lock:
            if group is not None and (members := self._allowed(group, frame.topic)):
                subscription = group.pick(members)
            again = msgspec.structs.replace(
                frame, redelivered=True, subscriptions=(subscription.want.id,)
            )
            subscription.client.take(again, group, manual=True)

    def _allowed(self, group: Group, topic: str) -> list[LocalSub]:
        """Return the members of *group* that may see something of *topic*."""
        rights = self._rights
        if not rights.guards(topic):
            return group.members
        return [member for member in group.members if rights.may_see(member.client, topic)]

    def _plan(self, topic: str) -> tuple[_Route, ...]:
        plain: dict[Client, list[int]] = {}
        rest: list[_Route] = []
        rights = self._rights
        guarded = rights.guards(topic)
        for target in self._trie.match(topic):
            if guarded:
                # With wildcards nobody was asked about this topic yet.
                for each in target.members if isinstance(target, Group) else (target,):
                    rights.want(each.client, topic)
            if isinstance(target, Group):
                rest.append(_Route(target.members[0].client, (), False, target))
            elif guarded and not rights.may_see(target.client, topic):
                continue
            elif target.want.manual_ack:
                rest.append(_Route(target.client, (target.want.id,), True, None))
            else:
                plain.setdefault(target.client, []).append(target.want.id)
        routes = (_Route(client, tuple(ids), False, None) for client, ids in plain.items())
        return self._plans.keep(topic, (*routes, *rest))

    def give_retained(self, subscription: LocalSub, only: str | None = None) -> None:
        """Deliver retained messages to a subscription, of all topics or of one."""
        matches = parse_filter(subscription.filter if only is None else only).matches
        rights = self._rights
        now = subscription.client.clock.time()
        for topic, (frame, expires) in tuple(self._retained.items()):
            if expires is not None and expires <= now:
                del self._retained[topic]
            elif matches(topic):
                if rights.guards(topic):
                    rights.want(subscription.client, topic)
                kept = _stored(frame, expires, now, Origin.RETAINED)
                kept = msgspec.structs.replace(kept, subscriptions=(subscription.want.id,))
                subscription.client.take(kept)

    # --- interest ------------------------------------------------------------------------

    def watch(self, client: Client, watch: Watch) -> list[Member]:
        """Report interest to *client* from now on; return who is there."""
        # Who may not listen to a topic may not see who does.
        self._users.check_subscribe(client, watch.filter)
        with self.lock:
            self._watches[client.member.id, watch.id] = (client, watch)
            if watch.kind is WatchKind.PRESENCE:
                return self.members(watch.filter)
            for other in self._clients.values():
                for subscription in other.subscriptions.values():
                    if overlap(watch.filter, subscription.filter) and self._visible(
                        other, subscription.filter
                    ):
                        client.tell(
                            InterestEvent(
                                InterestKind.JOINED,
                                subscription.filter,
                                other.member,
                                watches=(watch.id,),
                            )
                        )
            client.tell(InterestEvent(InterestKind.SYNCED, watch.filter, watches=(watch.id,)))
            return []

    def unwatch(self, client: Client, watch: Watch) -> None:
        """Stop reporting."""
        with self.lock:
            self._watches.pop((client.member.id, watch.id), None)

    def look(self, client: Client, topic: str) -> list[Member]:
        """Return `members` to a client that may listen to *topic*."""
        self._users.check_subscribe(client, topic)
        return self.members(topic)

    def members(self, topic: str) -> list[Member]:
        """Return who would receive a message published to *topic*."""
        with self.lock:
            return [
                client.member
                for client in self._clients.values()
                if any(
                    overlap(subscription.filter, topic)
                    and self._visible(client, subscription.filter)
                    for subscription in client.subscriptions.values()
                )
            ]

    def _present(self, client: Client, filter: str) -> frozenset[tuple[str, int]]:
        """Return the presence watches that see *client* without the subscription *filter*."""
        return frozenset(
            key
            for key, (_, watch) in self._watches.items()
            if watch.kind is WatchKind.PRESENCE
            and overlap(watch.filter, filter)
            and any(
                overlap(watch.filter, subscription.filter)
                and self._visible(client, subscription.filter)
                for subscription in client.subscriptions.values()
            )
        )

    def _tell(
        self,
        client: Client,
        filter: str,
        kind: InterestKind,
        reason: str,
        present: frozenset[tuple[str, int]],
    ) -> None:
        for key, (watcher, watch) in tuple(self._watches.items()):
            if key not in present and overlap(watch.filter, filter):
                watcher.tell(
                    InterestEvent(kind, filter, client.member, reason, watches=(watch.id,))
                )


def _stored(frame: InFrame, expires: float | None, now: float, origin: Origin) -> InFrame:
    return msgspec.structs.replace(
        frame,
        origin=origin,
        expires_in=None if expires is None else expires - now,
        subscriptions=None,
    )
