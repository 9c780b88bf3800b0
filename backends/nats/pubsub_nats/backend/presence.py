"""Who is there, and what they want: one key per client in a stream that forgets.

Each client writes its filters under a key of its own, again whenever they change and a few
times within the key's time to live. One that vanishes stops writing: the server removes its key and
leaves a marker, which tells everyone who watches. So members are known on every node of a
cluster, and for as long as the time to live after they were gone.

Source: NATS ADR-43 (per-message TTL, delete markers); seen on nats-server 2.11 to 2.15: a client
that was killed is told of 3.0 s after its last write at a time to live of 3 s.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from pubsub_core.errors import InvalidFilter
from pubsub_core.events import InterestEvent, InterestKind
from pubsub_core.interfaces import Watch, WatchKind, WireSub
from pubsub_core.message import Member, Receipt
from pubsub_core.topics import overlap, parse_filter
from pubsub_nats.headers import encode_lines, parse_block
from pubsub_nats.jetstream import TTL, Position, whole_seconds
from pubsub_nats.protocol import Msg

from .confirmed import ConfirmedPublisher
from .connection import Connection
from .consumers import Host, PushConsumer, Tag
from .history import read_last_of_each
from .requests import Requests

__all__ = ["MARKER", "Presence"]

logger = logging.getLogger("pubsub_nats")

MARKER = 5.0
"""Seconds for which the server's word that a key has expired is kept."""

_MOST_FILTERS = 100_000
_CLOSED = "Pubsub-Closed"


class _Entry(NamedTuple):
    """What one client says of itself.

    Attributes:
        sequence: Of the message that says so; later ones win.
    """

    sequence: int
    member: Member
    filters: frozenset[str]
    reason: str = ""


class Presence:
    """One client's key, and its view of the others'.

    It is the host of its consumer: what that delivers are the keys of the clients.

    Args:
        host: The stream mode that this belongs to.
        session: Our own key.
        name: Our user name, for others to see.
        ttl: Seconds after which a client that stopped writing is gone.
    """

    def __init__(
        self, host: Host, publisher: ConfirmedPublisher, session: str, name: str, ttl: float
    ) -> None:
        self._host = host
        self._publisher = publisher
        self._session = session
        self._name = name
        self._ttl = ttl
        self.stream = f"KV_{host.stream}_who"
        self._prefix = f"$KV.{host.stream}_who."
        self._filters: list[str] = []
        self._version = 0
        self._told = 0
        self._lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Future[Receipt] | None = None
        self._entries: dict[str, _Entry] = {}
        self._watches: dict[int, Watch] = {}
        self._consumer: PushConsumer | None = None
        self._beginning = asyncio.Lock()
        self._tell: Callable[[InterestEvent], None] | None = None

    # --- as a host -----------------------------------------------------------------------------

    @property
    def requests(self) -> Requests:
        """The inbox."""
        return self._host.requests

    @property
    def connection(self) -> Connection | None:
        """The session at hand."""
        return self._host.connection

    @property
    def replicated(self) -> bool:
        """As the main stream."""
        return self._host.replicated

    @property
    def paused(self) -> bool:
        """Never: who is there is not held back with the messages."""
        return False

    def unique(self) -> str:
        """Return a name that nobody else has."""
        return self._host.unique()

    def spawn(self, work: Any, name: str) -> asyncio.Task[Any]:
        """Run *work* in a task that ends with the session."""
        return self._host.spawn(work, name)

    def deliver(
        self, message: Msg, position: Position, want: WireSub, *, replay: bool, tag: Tag | None
    ) -> bool:
        """Take what one client says of itself, or the server of it."""
        self._apply(message, position)
        return True

    # --- the stream ------------------------------------------------------------------------------

    def configuration(self, replicas: int) -> Mapping[str, object]:
        """Return what the stream is made from; servers before 2.11 do not know all of it."""
        return {
            "name": self.stream,
            "subjects": [f"{self._prefix}>"],
            "storage": "memory",
            "num_replicas": replicas,
            "max_msgs_per_subject": 1,
            "discard": "new",
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "allow_msg_ttl": True,
            "subject_delete_marker_ttl": round(MARKER * 1e9),
        }

    @staticmethod
    def usable(config: Mapping[str, Any]) -> bool:
        """Whether the server took what this needs."""
        return bool(config.get("allow_msg_ttl") and config.get("subject_delete_marker_ttl"))

    # --- our own key -----------------------------------------------------------------------------

    async def announce(self, filters: Sequence[str], *, now: bool) -> None:
        """Say that these are our filters now; return when others can see it.

        Not *now*, before a session is complete, `online` says it.
        """
        self._filters = list(filters)[:_MOST_FILTERS]
        if not now:
            return
        self._version += 1
        wanted = self._version
        async with self._lock:
            if self._told >= wanted:
                return  # somebody said it along with their own
            told = self._version
            await self._write()
            self._told = told
        self._beat_later()

    def online(self) -> None:
        """Say in a new session what was said in the last one."""
        if self._filters:
            self._host.spawn(self._again(), "presence")

    async def _again(self) -> None:
        await self._write()
        self._beat_later()

    def leave(self) -> None:
        """Say that we go, where there is still somebody to tell."""
        if self._filters and self._host.connection is not None:
            self._filters = []
            self._write(closed=True)
        self._stop()

    def lost(self) -> None:
        """Forget the session; the key stays as long as its time to live."""
        self._stop()
        self._entries.clear()
        self._watches.clear()
        self._consumer = None

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat_later(self) -> None:
        self._stop()
        if self._filters:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._ttl / 3, self._beat)

    def _beat(self) -> None:
        if self._host.connection is not None:
            # While there is no leader one that waits is enough.
            if self._beating is None or self._beating.done():
                self._beating = self._write()
            self._beat_later()

    def _write(self, *, closed: bool = False) -> asyncio.Future[Receipt]:
        if self._filters:
            said = {
                "name": self._name,
                "host": socket.gethostname(),
                "filters": self._filters,
            }
            payload = json.dumps(said, separators=(",", ":")).encode()
            pairs = [(TTL, whole_seconds(self._ttl))]
        else:
            payload = b""
            pairs = [
                ("KV-Operation", "PURGE"),
                ("Nats-Rollup", "sub"),
                (TTL, whole_seconds(MARKER)),
            ]
            if closed:
                pairs.append((_CLOSED, "1"))

        subject = f"{self._prefix}{self._session}".encode()
        lines = encode_lines(pairs)
        future = self._publisher.submit("presence", subject, payload, self.stream, lines)
        future.add_done_callback(_seen)
        return future

    # --- the others ------------------------------------------------------------------------------

    async def members(self, topic: str) -> list[Member]:
        """Return who is subscribed to *topic* now."""
        entries = await self._read()
        return [each.member for each in entries.values() if _wants(each, topic)]

    async def watch(self, watch: Watch, tell: Callable[[InterestEvent], None]) -> list[Member]:
        """Tell changes from now on; return who is there."""
        self._tell = tell
        async with self._beginning:
            if self._consumer is None:
                await self._begin()
        # The two steps without a wait in between: what is told next is a change to this.
        self._watches[watch.id] = watch
        if watch.kind is WatchKind.PRESENCE:
            return [each.member for each in self._entries.values() if _wants(each, watch.filter)]
        for entry in self._entries.values():
            for wanted in sorted(entry.filters):
                if overlap(wanted, watch.filter):
                    self._event(InterestKind.JOINED, wanted, entry.member, "", watch.id)
        tell(InterestEvent(InterestKind.SYNCED, watch.filter, watches=(watch.id,)))
        return []

    def unwatch(self, watch: Watch) -> None:
        """Tell no more."""
        self._watches.pop(watch.id, None)
        if not self._watches and self._consumer is not None:
            self._consumer.stop(leave=False)
            self._consumer = None
            self._entries.clear()

    async def _begin(self) -> None:
        info = await self.requests.api(f"STREAM.INFO.{self.stream}")
        last = int(info["state"].get("last_seq", 0))
        entries = await self._read()
        for key, entry in entries.items():
            self._entries[key] = entry
        consumer = PushConsumer(self, WireSub(id=0, filter="#"), [f"{self._prefix}>"])
        await consumer.start_from(last + 1)
        self._consumer = consumer

    async def _read(self) -> dict[str, _Entry]:
        found: dict[str, _Entry] = {}
        reading = read_last_of_each(self, self.stream, [f"{self._prefix}>"])
        try:
            async for stored in reading:
                key, entry = self._entry(stored.message, stored.position)
                if entry.filters:
                    found[key] = entry
        finally:
            await reading.aclose()
        return found

    def _entry(self, message: Msg, position: Position) -> tuple[str, _Entry]:
        key = message.subject.decode("utf-8", "replace").removeprefix(self._prefix)
        said: Any = None
        block = parse_block(message.header)
        reason = "closed" if block.get(_CLOSED) is not None else "unsubscribed"
        if block.get("Nats-Marker-Reason") is not None:
            reason = "lost"
        elif block.get("KV-Operation") is None:
            try:
                said = json.loads(message.payload)
            except (ValueError, RecursionError):
                said = None
        about = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
        filters = _filters(about.get("filters"))
        member = Member(key, str(about.get("name", "")), str(about.get("host", "")))
        return key, _Entry(position.stream, member, filters, "" if filters else reason)

    def _apply(self, message: Msg, position: Position) -> None:
        key, new = self._entry(message, position)
        old = self._entries.get(key)
        if old is not None and old.sequence >= new.sequence:
            return
        if new.filters:
            self._entries[key] = new
        else:
            self._entries.pop(key, None)
        before = frozenset[str]() if old is None else old.filters
        if before == new.filters:
            return
        member = new.member if old is None or new.filters else old.member
        reason = new.reason or "unsubscribed"
        for watch in tuple(self._watches.values()):
            if watch.kind is WatchKind.PRESENCE:
                was = any(overlap(each, watch.filter) for each in before)
                now = any(overlap(each, watch.filter) for each in new.filters)
                if was != now:
                    kind = InterestKind.JOINED if now else InterestKind.LEFT
                    self._event(kind, watch.filter, member, "" if now else reason, watch.id)
                continue
            for each in sorted(new.filters - before):
                if overlap(each, watch.filter):
                    self._event(InterestKind.JOINED, each, member, "", watch.id)
            for each in sorted(before - new.filters):
                if overlap(each, watch.filter):
                    self._event(InterestKind.LEFT, each, member, reason, watch.id)

    def _event(
        self, kind: InterestKind, topic: str, member: Member, reason: str, watch: int
    ) -> None:
        if self._tell is not None:
            self._tell(InterestEvent(kind, topic, member, reason, watches=(watch,)))


def _filters(said: object) -> frozenset[str]:
    """Return the filters that somebody says to have; what is none of ours is left out."""
    found: set[str] = set()
    for each in cast("list[object]", said) if isinstance(said, list) else ():
        if isinstance(each, str):
            try:
                parse_filter(each)
            except InvalidFilter:
                continue
            found.add(each)
    return frozenset(found)


def _wants(entry: _Entry, topic: str) -> bool:
    return any(overlap(each, topic) for each in entry.filters)


def _seen(future: asyncio.Future[Receipt]) -> None:
    """Look at the outcome, for those that nobody waits for."""
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.info("presence could not be told: %s", error)
