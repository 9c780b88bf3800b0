"""The in-process backend: ``memory://`` and ``memory://NAME``.

It is the reference for every other backend and what a program runs on in tests. Buses
with the same name in one process share a `Space`; a bus without a name has one of its own.
Nothing leaves the process and nothing survives it.

A space can also misbehave on purpose: `Space.disconnect_all`, `Space.refuse`, `Space.allow`.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets as _random
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .capabilities import (
    Cap,
    ConfirmedBy,
    Delivery,
    Duplicates,
    Durability,
    Guarantees,
    Limits,
    Order,
    Redelivery,
    Support,
)
from .clock import Clock
from .errors import (
    AuthenticationFailed,
    ConnectError,
    NotConnected,
    Outcome,
    PublishFailed,
    PublishNotAuthorized,
    SubscribeNotAuthorized,
)
from .events import InterestEvent, InterestKind
from .hookspecs import hookimpl
from .interfaces import (
    Backend,
    BackendContext,
    BackendInfo,
    HistoryQuery,
    SessionFacts,
    Sink,
    Watch,
    WatchKind,
    WireSub,
)
from .message import InFrame, Member, Origin, OutFrame, Receipt, Verdict
from .secrets import Secret
from .topics import overlap, parse_filter
from .trie import HandlerTrie

__all__ = ["MemoryBackend", "MemoryOptions", "MemoryWill", "Space", "pubsub_backends"]

_QUEUE = 10_000


@dataclass(frozen=True, slots=True)
class MemoryWill:
    """A message published for a bus whose session is lost, not for one that is closed."""

    topic: str
    payload: str = ""
    retain: bool = False


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """Options of ``memory://``. Times are seconds."""

    client_id: str = field(
        default="", metadata=_help("identity shown to others; made at random when empty")
    )
    username: str = field(default="", metadata=_help("user name shown to others"))
    password: Secret | None = field(
        default=None, metadata=_help("checked when the space was told to allow users only")
    )
    persistent: bool = field(
        default=False,
        metadata=_help("keep subscriptions and messages while the session is lost"),
    )
    ack_timeout: float = field(
        default=30.0, metadata=_help("redeliver what was not acknowledged for so long")
    )
    history: int = field(
        default=10_000, metadata=_help("most messages the space stores; set by its first bus")
    )
    will: MemoryWill | None = field(
        default=None, metadata=_help("message published when the session is lost")
    )


@dataclass(frozen=True, slots=True)
class _User:
    password: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


class _Subscription:
    """One wire subscription of one client."""

    __slots__ = ("client", "filter", "want")

    def __init__(self, client: MemoryBackend, want: WireSub) -> None:
        self.client = client
        self.want = want
        self.filter = want.filter


class _Group:
    """The members of one share group; each message goes to the next one that can take it."""

    __slots__ = ("_turn", "members")

    def __init__(self) -> None:
        self.members: list[_Subscription] = []
        self._turn = 0

    def pick(self) -> _Subscription | None:
        present = [member for member in self.members if member.client.sink is not None]
        if not present:
            return self.members[0] if self.members else None
        self._turn = (self._turn + 1) % len(present)
        return present[self._turn]


class Space:
    """What buses of one name share: subscriptions, stored messages, who is there.

    Thread-safe: buses of several event loops may share a space.
    """

    _named: dict[str, Space] = {}
    _names = threading.Lock()

    def __init__(self, name: str = "", *, history: int = 10_000) -> None:
        self.name = name
        self._lock = threading.RLock()
        self._trie: HandlerTrie[_Subscription | _Group] = HandlerTrie("mqtt")
        self._groups: dict[tuple[str, str], _Group] = {}
        self._clients: dict[str, MemoryBackend] = {}
        self._retained: dict[str, tuple[InFrame, float | None]] = {}
        self._history: deque[tuple[InFrame, float | None]] = deque(maxlen=history)
        self._watches: dict[tuple[str, int], tuple[MemoryBackend, Watch]] = {}
        self._users: dict[str, _User] = {}
        self._ids = itertools.count(1)
        self._refusing = False
        # Who receives a topic, worked out once and kept until a subscription changes.
        self._plans: dict[str, tuple[tuple[Any, ...], ...]] = {}

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
        with self._lock:
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
    ) -> None:
        """Let *username* in, with rights on these filters; anybody else is refused then."""
        self._users[username] = _User(password, tuple(publish), tuple(subscribe))

    # --- sessions ------------------------------------------------------------------------

    def enter(self, client: MemoryBackend) -> bool:
        """Begin a session; return whether an earlier one goes on."""
        if self._refusing:
            raise ConnectError(
                f"{client.context.address} refuses sessions",
                hint="call Space.refuse(False)",
                backend="memory",
            )
        user = self._users.get(client.options.username)
        if self._users:
            given = "" if client.options.password is None else client.options.password.reveal()
            if user is None or not _random.compare_digest(given.encode(), user.password.encode()):
                raise AuthenticationFailed(
                    f"{client.context.address} does not know that user name and password",
                    hint="check username and password",
                    backend="memory",
                )
        with self._lock:
            resumed = client.options.persistent and client.member.id in self._clients
            self._clients[client.member.id] = client
            return resumed

    def leave(self, client: MemoryBackend, reason: str) -> None:
        """End a session for good: subscriptions, watches and the wait for acks are gone."""
        with self._lock:
            if self._clients.pop(client.member.id, None) is None:
                return
            for subscription in tuple(client.subscriptions.values()):
                self.unsubscribe(client, subscription.want, reason)
            for key in [key for key in self._watches if key[0] == client.member.id]:
                del self._watches[key]

    def subscribe(self, client: MemoryBackend, want: WireSub) -> None:
        """Add a subscription, deliver retained values, tell who watches."""
        self._check(client, want.filter, "subscribe")
        with self._lock:
            old = client.subscriptions.get(want.id)
            if old is not None:
                old.want = want
                self._plans.clear()
                return
            before = self._present(client, want.filter)
            subscription = _Subscription(client, want)
            client.subscriptions[want.id] = subscription
            if want.group is None:
                self._trie.add(want.filter, subscription)
            else:
                key = (want.group, want.filter)
                group = self._groups.get(key)
                if group is None:
                    group = self._groups[key] = _Group()
                    self._trie.add(want.filter, group)
                group.members.append(subscription)
            self._plans.clear()
            self._tell(client, want.filter, InterestKind.JOINED, "", before)
            if want.group is None:
                self.give_retained(subscription)

    def unsubscribe(self, client: MemoryBackend, want: WireSub, reason: str) -> None:
        """Drop a subscription, tell who watches."""
        with self._lock:
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
            self._tell(
                client,
                want.filter,
                InterestKind.LEFT,
                reason,
                self._present(client, want.filter),
            )

    # --- messages ------------------------------------------------------------------------

    def publish(self, client: MemoryBackend, out: OutFrame) -> Receipt:
        """Store and deliver one message."""
        if self._users:
            self._check(client, out.topic, "publish")
        now = client.clock.time()
        with self._lock:
            number = next(self._ids)
            identity = str(number)
            expires = None if out.ttl is None else now + out.ttl
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
                subscriptions=(),
            )
            if out.retain:
                self._retain(frame, expires)
            self._history.append((frame, expires))
            plan = self._plans.get(out.topic)
            if plan is None:
                plan = self._plan(out.topic)
            count = 0
            for receiver, ids, manual, group in plan:
                if group is not None:
                    member = group.pick()
                    if member is None:
                        continue
                    receiver, ids, manual = (
                        member.client,
                        (member.want.id,),
                        member.want.manual_ack,
                    )
                if not out.echo and receiver is client:
                    continue
                count += 1
                receiver.take(frame, ids, out.qos if manual else 0, group)
            return Receipt(out.topic, ConfirmedBy.BROKER, identity, count)

    def send_to(self, client: MemoryBackend, member: str, out: OutFrame) -> Receipt:
        """Deliver to one client, if it is subscribed to the topic."""
        self._check(client, out.topic, "publish")
        with self._lock:
            receiver = self._clients.get(member)
            ids = (
                ()
                if receiver is None
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
            )
            receiver.take(frame, ids, 0, None)
            return Receipt(out.topic, ConfirmedBy.BROKER, identity, 1)

    def blocked(self, client: MemoryBackend, out: OutFrame) -> MemoryBackend | None:
        """Return a receiver of *out* that asked to be spared for now, if there is one."""
        with self._lock:
            for receiver, _, _, group in self._plans.get(out.topic) or self._plan(out.topic):
                if group is not None:
                    if group.members and all(each.client.paused for each in group.members):
                        return group.members[0].client
                elif receiver.paused and (out.echo or receiver is not client):
                    return receiver
        return None

    def stored(self, filter: str, query: HistoryQuery, clock: Clock) -> list[InFrame]:
        """Return stored messages, oldest first."""
        matches = parse_filter(filter).matches
        now = clock.time()
        result: list[InFrame] = []
        with self._lock:
            for frame, expires in reversed(self._history):
                if query.last is not None and len(result) >= query.last:
                    break
                if expires is not None and expires <= now:
                    continue
                if query.since is not None and frame.time < query.since:
                    break
                if query.until is not None and frame.time > query.until:
                    continue
                if matches(frame.topic):
                    result.append(_stored(frame, expires, now, Origin.REPLAY))
        result.reverse()
        return result

    def last(self, topic: str, clock: Clock) -> InFrame | None:
        """Return the retained value of *topic*."""
        now = clock.time()
        with self._lock:
            kept = self._retained.get(topic)
            if kept is None or (kept[1] is not None and kept[1] <= now):
                return None
            return _stored(kept[0], kept[1], now, Origin.RETAINED)

    def redeliver(self, subscription: _Subscription, group: _Group | None, frame: InFrame) -> None:
        """Deliver *frame* once more, in a share group to the next member."""
        with self._lock:
            if group is not None:
                subscription = group.pick() or subscription
            again = msgspec.structs.replace(frame, redelivered=True)
            subscription.client.take(again, (subscription.want.id,), 1, group)

    def _plan(self, topic: str) -> tuple[tuple[Any, ...], ...]:
        plain: dict[MemoryBackend, list[int]] = {}
        rows: list[tuple[Any, ...]] = []
        for target in self._trie.match(topic):
            if isinstance(target, _Group):
                rows.append((None, (), False, target))
            elif target.want.manual_ack:
                rows.append((target.client, (target.want.id,), True, None))
            else:
                plain.setdefault(target.client, []).append(target.want.id)
        rows = [(client, tuple(ids), False, None) for client, ids in plain.items()] + rows
        if len(self._plans) >= _QUEUE:
            self._plans.clear()
        plan = self._plans[topic] = tuple(rows)
        return plan

    def _retain(self, frame: InFrame, expires: float | None) -> None:
        if frame.payload:
            self._retained[frame.topic] = (frame, expires)
        else:
            self._retained.pop(frame.topic, None)

    def give_retained(self, subscription: _Subscription) -> None:
        """Deliver what is retained for a subscription."""
        matches = parse_filter(subscription.filter).matches
        now = subscription.client.clock.time()
        for topic, (frame, expires) in tuple(self._retained.items()):
            if expires is not None and expires <= now:
                del self._retained[topic]
            elif matches(topic):
                kept = _stored(frame, expires, now, Origin.RETAINED)
                subscription.client.take(kept, (subscription.want.id,), 0, None)

    def _check(self, client: MemoryBackend, topic: str, action: str) -> None:
        user = self._users.get(client.options.username)
        if user is None:
            return
        if action == "publish":
            if not any(parse_filter(each).matches(topic) for each in user.publish):
                raise PublishNotAuthorized(
                    f"{client.options.username!r} may not publish to {topic!r}",
                    hint="ask for the right to publish there",
                    backend="memory",
                    topic=topic,
                )
        elif not any(_covers(each, topic) for each in user.subscribe):
            raise SubscribeNotAuthorized(
                f"{client.options.username!r} may not subscribe to {topic!r}",
                hint="ask for the right to subscribe there",
                backend="memory",
                topic=topic,
            )

    # --- interest ------------------------------------------------------------------------

    def watch(self, client: MemoryBackend, watch: Watch) -> list[Member]:
        """Report interest to *client* from now on; return who is there."""
        with self._lock:
            self._watches[client.member.id, watch.id] = (client, watch)
            if watch.kind is WatchKind.PRESENCE:
                return self.members(watch.filter)
            for other in self._clients.values():
                for subscription in other.subscriptions.values():
                    if overlap(watch.filter, subscription.filter):
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

    def unwatch(self, client: MemoryBackend, watch: Watch) -> None:
        """Stop reporting."""
        with self._lock:
            self._watches.pop((client.member.id, watch.id), None)

    def members(self, topic: str) -> list[Member]:
        """Return who would receive a message published to *topic*."""
        with self._lock:
            return [
                client.member
                for client in self._clients.values()
                if any(
                    overlap(subscription.filter, topic)
                    for subscription in client.subscriptions.values()
                )
            ]

    def _present(self, client: MemoryBackend, filter: str) -> frozenset[tuple[str, int]]:
        """Return the presence watches that see *client* without the subscription *filter*."""
        return frozenset(
            key
            for key, (_, watch) in self._watches.items()
            if watch.kind is WatchKind.PRESENCE
            and overlap(watch.filter, filter)
            and any(
                overlap(watch.filter, subscription.filter)
                for subscription in client.subscriptions.values()
            )
        )

    def _tell(
        self,
        client: MemoryBackend,
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


class MemoryBackend(Backend):
    """One client of a space."""

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        options = context.options
        assert isinstance(options, MemoryOptions)
        self.options = options
        self.clock = context.clock
        self.space = Space.named(context.address.host, history=options.history)
        identity = options.client_id or f"memory-{_random.token_hex(6)}"
        self.member = Member(identity, options.username, socket.gethostname())
        self.sink: Sink | None = None
        self.subscriptions: dict[int, _Subscription] = {}
        self.paused = False
        self._unpaused = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tags = itertools.count(1)
        # What waits for an acknowledgement: subscription, group, frame, deadline.
        self._unsettled: dict[int, tuple[_Subscription, _Group | None, InFrame, float]] = {}
        self._returned: list[tuple[int, InFrame]] = []
        self._kept: deque[InFrame] = deque(maxlen=_QUEUE)
        self._timer: asyncio.Task[None] | None = None
        self._opened = False

    # --- Backend -------------------------------------------------------------------------

    async def open(self, sink: Sink) -> SessionFacts:
        """Enter the space."""
        self._loop = asyncio.get_running_loop()
        resumed = self.space.enter(self) and self._opened
        self._opened = True
        with self.space._lock:  # noqa: SLF001 - a space and its clients are one mechanism
            self.sink = sink
            while self._kept:
                sink.deliver(self._kept.popleft())
        return SessionFacts(
            resumed=resumed, client_id=self.member.id, server=f"memory space {self.space.name!r}"
        )

    async def restored(self) -> None:
        """Deliver again what was not acknowledged before the session was lost."""
        returned, self._returned = self._returned, []
        for identity, frame in returned:
            subscription = self.subscriptions.get(identity)
            if subscription is not None:
                self.space.redeliver(subscription, None, frame)

    async def drop(self) -> None:
        """End the session as if it had been lost."""
        self._end("lost")

    async def close(self, *, drain: float) -> None:
        """Leave the space."""
        self._end("closed")
        self.space.leave(self, "closed")
        self._opened = False
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.wait([self._timer])
            self._timer = None

    def try_publish(self, out: OutFrame) -> Receipt | None:
        """Publish, unless a receiver asked the flow to stop."""
        if self.sink is None:
            raise self._not_connected()
        if self.space.blocked(self, out) is not None:
            return None
        return self.space.publish(self, out)

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish; wait while a receiver with ``overflow="block"`` is full."""
        while (receiver := self.space.blocked(self, out)) is not None:
            await receiver.unpaused()
        receipt = self.try_publish(out)
        assert receipt is not None
        return receipt

    async def send_to(self, member: str, out: OutFrame) -> Receipt:
        """Send to one member."""
        if self.sink is None:
            raise self._not_connected()
        return self.space.send_to(self, member, out)

    async def subscribe(self, want: WireSub) -> int:
        """Subscribe in the space."""
        if self.sink is None:
            raise self._not_connected()
        self.space.subscribe(self, want)
        return want.qos

    async def unsubscribe(self, want: WireSub) -> None:
        """Unsubscribe in the space."""
        self.space.unsubscribe(self, want, "unsubscribed")

    async def repeat_retained(self, want: WireSub) -> None:
        """Deliver what is retained once more."""
        subscription = self.subscriptions.get(want.id)
        if subscription is not None:
            self.space.give_retained(subscription)

    async def ping(self) -> float:
        """Return 0: there is no way to go."""
        return 0.0

    def pause(self) -> bool:
        """Let publishers wait."""
        self.paused = True
        self._unpaused.clear()
        return True

    def resume(self) -> None:
        """Let publishers go on."""
        self.paused = False
        self._unpaused.set()

    async def unpaused(self) -> None:
        """Return when the flow may go on; callable from another loop's publisher."""
        if self._loop is asyncio.get_running_loop():
            await self._unpaused.wait()
        else:
            # Another loop owns the event; looking again soon is simpler than a bridge.
            await asyncio.sleep(0.001)

    # --- optional powers -------------------------------------------------------------------

    async def watch_presence(self, watch: Watch) -> Sequence[Member]:
        """Begin to report who is subscribed."""
        return self.space.watch(self, watch)

    async def unwatch_presence(self, watch: Watch) -> None:
        """Stop reporting."""
        self.space.unwatch(self, watch)

    async def members(self, topic: str) -> Sequence[Member]:
        """Return who is subscribed now."""
        return self.space.members(topic)

    async def watch_notifications(self, watch: Watch) -> None:
        """Begin to report who wants what."""
        self.space.watch(self, watch)

    async def unwatch_notifications(self, watch: Watch) -> None:
        """Stop reporting."""
        self.space.unwatch(self, watch)

    async def history(self, filter: str, query: HistoryQuery) -> AsyncIterator[InFrame]:
        """Yield stored messages."""
        for frame in self.space.stored(filter, query, self.clock):
            yield frame

    async def last(self, topic: str) -> InFrame | None:
        """Return the retained value."""
        return self.space.last(topic, self.clock)

    def settle(self, tag: object, verdict: Verdict) -> None:
        """Forget a message, or deliver it again."""
        assert isinstance(tag, int)
        waiting = self._unsettled.pop(tag, None)
        if waiting is None or verdict is not Verdict.NACK:
            return
        subscription, group, frame, _ = waiting
        if subscription.want.id in self.subscriptions or group is not None:
            self.space.redeliver(subscription, group, frame)

    # --- what the space calls ----------------------------------------------------------------

    def take(
        self, frame: InFrame, ids: tuple[int, ...], ack_qos: int, group: _Group | None
    ) -> None:
        """Receive one message; with *ack_qos* above 0 it waits for an acknowledgement."""
        sink = self.sink
        tag: int | None = None
        if ack_qos:
            tag = next(self._tags)
            subscription = self.subscriptions[ids[0]]
            deadline = self.clock.monotonic() + self.options.ack_timeout
            self._unsettled[tag] = (subscription, group, frame, deadline)
            self._watch_deadlines()
        # Rebuilt by hand: msgspec.structs.replace costs three times as much, per message.
        copy = InFrame(
            topic=frame.topic,
            payload=frame.payload,
            origin=frame.origin,
            qos=frame.qos,
            time=frame.time,
            headers=frame.headers,
            content_type=frame.content_type,
            expires_in=frame.expires_in,
            id=frame.id,
            source=frame.source,
            parts=frame.parts,
            redelivered=frame.redelivered,
            subscriptions=ids,
            tag=tag,
        )
        if sink is not None:
            sink.deliver(copy)
        elif self.options.persistent:
            self._kept.append(copy)

    def tell(self, event: InterestEvent) -> None:
        """Receive one change of interest."""
        if self.sink is not None:
            self.sink.interest(event)

    def cut(self, error: BaseException) -> None:
        """Lose the session; callable from any thread."""
        sink = self.sink
        if sink is not None:
            self._end("lost")
            sink.lost(error)

    # --- helpers -----------------------------------------------------------------------------

    def _end(self, reason: str) -> None:
        if self.sink is None:
            return
        self.sink = None
        will = self.options.will
        for subscription, group, frame, _ in self._unsettled.values():
            if group is not None and len(group.members) > 1:
                group.members.remove(subscription)
                self.space.redeliver(subscription, group, frame)
                group.members.append(subscription)
            elif reason == "lost":
                self._returned.append((subscription.want.id, frame))
        self._unsettled.clear()
        if reason == "lost":
            if will is not None:
                self.space.publish(
                    self,
                    OutFrame(topic=will.topic, payload=will.payload.encode(), retain=will.retain),
                )
            if not self.options.persistent:
                self.space.leave(self, "lost")

    def _watch_deadlines(self) -> None:
        loop = self._loop
        if loop is None or (self._timer is not None and not self._timer.done()):
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            self._start_timer()
        else:
            loop.call_soon_threadsafe(self._start_timer)

    def _start_timer(self) -> None:
        if self._timer is None or self._timer.done():
            self._timer = asyncio.create_task(self._expire(), name="pubsub memory redelivery")

    async def _expire(self) -> None:
        while self._unsettled:
            first = min(deadline for _, _, _, deadline in self._unsettled.values())
            await self.clock.sleep(max(0.001, first - self.clock.monotonic()))
            now = self.clock.monotonic()
            for tag, waiting in tuple(self._unsettled.items()):
                if waiting[3] <= now:
                    self.settle(tag, Verdict.NACK)

    def _not_connected(self) -> NotConnected:
        return NotConnected(
            f"no session with {self.context.address}",
            hint="wait until the bus is online",
            backend="memory",
        )


def _stored(frame: InFrame, expires: float | None, now: float, origin: Origin) -> InFrame:
    return msgspec.structs.replace(
        frame,
        origin=origin,
        expires_in=None if expires is None else expires - now,
        subscriptions=None,
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


INFO = BackendInfo(
    name="memory",
    schemes=("memory",),
    factory="pubsub_core.memory:MemoryBackend",
    about="In this process: the reference, and what programs run on in tests.",
    capabilities={
        **{
            cap: Support.native()
            for cap in Cap
            if cap not in (Cap.ENTITLEMENTS, Cap.AUTHORIZATION, Cap.SOURCE_LOST)
        },
        Cap.SOURCE_LOST: Support.none("publishers in one process do not vanish unnoticed"),
        Cap.ENTITLEMENTS: Support.none("everybody in this process may see everything"),
        Cap.AUTHORIZATION: Support.none("everybody in this process may see everything"),
    },
    guarantees=Guarantees(
        confirmed_by=ConfirmedBy.BROKER,
        delivery=Delivery.AT_LEAST_ONCE,
        redelivery=Redelivery.ON_NACK_OR_TIMEOUT,
        order=Order.PER_PUBLISHER,
        duplicates=Duplicates.AFTER_REDELIVERY,
        durability=Durability.NOTHING,
        note="At least once with ack='manual'; otherwise a message is handled when the "
        "handler returns. Everything is gone when the process ends.",
    ),
    limits=Limits(max_payload=256 * 1024 * 1024),
    options=MemoryOptions,
)


@hookimpl
def pubsub_backends() -> list[BackendInfo]:
    """Answer to ``memory://``."""
    return [INFO]
