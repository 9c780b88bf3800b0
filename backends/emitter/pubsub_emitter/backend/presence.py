"""Presence and notifications, from Emitter's presence requests and events.

The broker lists on request the clients that would get a message on a channel, and reports
subscriptions to that channel and, with its own matching rule, to channels below. List and reports
differ: the list has subscribers of wildcards and of channels above, whose leaving is not reported,
and a client that unsubscribes from one channel may stay in it through another. So a member that
unsubscribes is looked up before it counts as gone, and members are compared with the list from
time to time. The list has one member of a share group, a random one each time. So a later list adds
no member, and a member is gone only when two lists in a row lack it.

Source: emitter-io/emitter, ``internal/service/presence``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, cast

from pubsub_core.errors import NotAuthorized, NotConnected, PubSubError
from pubsub_core.events import InterestEvent, InterestKind
from pubsub_core.interfaces import Watch, WatchKind
from pubsub_core.message import Member
from pubsub_core.topics import overlap
from pubsub_emitter.protocol import split_share

__all__ = ["Interest", "member_of"]

logger = logging.getLogger("pubsub_emitter.backend")

_MISSED: Final = 2

Ask = Callable[[str, bool, "bool | None"], Awaitable[Mapping[str, Any]]]
"""Makes a presence request: channel, whether the status is wanted, changes on, off or as is."""


def member_of(found: object) -> Member | None:
    """Return the member that a presence answer or event tells of."""
    if not isinstance(found, Mapping):
        return None
    fields = cast("Mapping[str, object]", found)
    identity = fields.get("id")
    name = fields.get("username")
    if not isinstance(identity, str) or not identity:
        return None
    return Member(identity, name if isinstance(name, str) else "")


def members_of(answer: Mapping[str, Any]) -> list[Member]:
    """Return the members that a presence answer lists."""
    who: object = answer.get("who")
    if not isinstance(who, list):
        return []
    found = map(member_of, cast("list[object]", who))
    return [member for member in found if member is not None]


class _Room:
    """One topic whose presence somebody watches."""

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.watches: dict[int, Watch] = {}
        self.members: dict[str, Member] = {}
        # How often a member was missing in the broker's list.
        self.missing: dict[str, int] = {}
        self.leaving: set[str] = set()
        self.checking: asyncio.Task[None] | None = None


class Interest:
    """All watches of one session.

    Args:
        ask: Makes a presence request.
        channels: Channels to listen on for a filter.
        tell: Takes each change.
        spawn: Runs something beside, until the session ends.
        refresh: Seconds between comparisons, 0 for none.
    """

    def __init__(
        self,
        ask: Ask,
        channels: Callable[[str], Sequence[str]],
        tell: Callable[[InterestEvent], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        refresh: float,
    ) -> None:
        self._ask = ask
        self._channels = channels
        self._tell = tell
        self._spawn = spawn
        self._refresh = refresh
        self._rooms: dict[str, _Room] = {}
        self._notes: dict[int, Watch] = {}
        # Which watches need the changes of a channel.
        self._listening: dict[str, set[int]] = {}
        self._comparing: asyncio.Task[None] | None = None

    def reset(self) -> None:
        """Forget everything: the broker has, too."""
        self._rooms.clear()
        self._notes.clear()
        self._listening.clear()
        self._comparing = None

    async def members(self, topic: str) -> list[Member]:
        """Return whom the broker lists now."""
        return members_of(await self._ask(f"{topic}/", True, None))

    # --- watching -------------------------------------------------------------------------

    async def watch_presence(self, watch: Watch) -> Sequence[Member]:
        """Tell who comes and goes on one topic; return who is there."""
        channel = f"{watch.filter}/"
        room = self._rooms.get(channel)
        if room is None:
            room = self._rooms[channel] = _Room(channel)
        room.watches[watch.id] = watch
        try:
            answer = await self._listen(channel, watch.id, status=True)
        except BaseException:
            self._leave_room(watch)
            raise
        for member in members_of(answer):
            room.members.setdefault(member.id, member)
        if self._refresh and self._comparing is None:
            self._comparing = self._spawn(self._compare(), "presence")
        return tuple(room.members.values())

    async def watch_notifications(self, watch: Watch) -> None:
        """Tell who is subscribed, as far as the broker can say, and then every change."""
        exact = "+" not in watch.filter and "#" not in watch.filter
        self._notes[watch.id] = watch
        begun: list[str] = []
        try:
            for channel in self._channels(watch.filter):
                answer = await self._listen(channel, watch.id, status=exact)
                begun.append(channel)
                for member in members_of(answer):
                    self._event(InterestKind.JOINED, watch.filter, member, (watch.id,))
        except BaseException:
            self._notes.pop(watch.id, None)
            for channel in begun:
                self._listen_no_more(channel, watch.id)
            raise
        self._tell(InterestEvent(InterestKind.SYNCED, watch.filter, watches=(watch.id,)))

    async def unwatch(self, watch: Watch) -> None:
        """Stop telling."""
        if watch.kind is WatchKind.PRESENCE:
            self._leave_room(watch)
        self._notes.pop(watch.id, None)
        for channel in [name for name, ids in self._listening.items() if watch.id in ids]:
            if self._forget(channel, watch.id):
                await self._ask(channel, False, False)

    async def _listen(self, channel: str, identity: int, *, status: bool) -> Mapping[str, Any]:
        ids = self._listening.setdefault(channel, set())
        ids.add(identity)
        try:
            return await self._ask(channel, status, True)
        except (NotAuthorized, NotConnected):
            self._forget(channel, identity)
            raise
        except BaseException:
            self._listen_no_more(channel, identity)
            raise

    def _listen_no_more(self, channel: str, identity: int) -> None:
        """Undo a listening that came to nothing, without waiting: the caller is on its way out."""
        if self._forget(channel, identity):
            self._spawn(self._stop(channel), "presence")

    def _forget(self, channel: str, identity: int) -> bool:
        """Note that a watch needs *channel* no more; return whether none does now."""
        ids = self._listening.get(channel)
        if ids is None:
            return False  # the session has ended, and took it along
        ids.discard(identity)
        if ids:
            return False
        del self._listening[channel]
        return True

    async def _stop(self, channel: str) -> None:
        try:
            if channel not in self._listening:
                await self._ask(channel, False, False)
        except PubSubError as error:
            logger.debug("changes of %r could not be stopped: %s", channel, error)

    def _leave_room(self, watch: Watch) -> None:
        channel = f"{watch.filter}/"
        room = self._rooms.get(channel)
        if room is None:
            return
        room.watches.pop(watch.id, None)
        if not room.watches:
            del self._rooms[channel]

    # --- changes --------------------------------------------------------------------------

    def event(self, body: Mapping[str, Any]) -> None:
        """Take an event from the broker."""
        member = member_of(body.get("who"))
        channel: object = body.get("channel")
        kind = {"subscribe": InterestKind.JOINED, "unsubscribe": InterestKind.LEFT}.get(
            str(body.get("event"))
        )
        if member is None or kind is None or not isinstance(channel, str):
            return
        room = self._rooms.get(channel)
        if room is not None:
            self._changed(room, member, kind)
        _, inner = split_share(channel)
        topic = inner.removesuffix("/")
        if not topic:
            return
        watches = tuple(
            identity for identity, watch in self._notes.items() if overlap(watch.filter, topic)
        )
        if watches:
            self._event(kind, topic, member, watches)

    def _changed(self, room: _Room, member: Member, kind: InterestKind) -> None:
        room.missing.pop(member.id, None)
        if kind is InterestKind.JOINED:
            room.leaving.discard(member.id)
            if member.id not in room.members:
                room.members[member.id] = member
                self._event(kind, room.channel[:-1], member, tuple(room.watches))
        elif member.id in room.members:
            room.leaving.add(member.id)
            if room.checking is None:
                room.checking = self._spawn(self._check(room), "presence")
        else:
            # It may stand in a list that is on its way to us, made before it left.
            self._event(kind, room.channel[:-1], member, tuple(room.watches))

    async def _check(self, room: _Room) -> None:
        """Find out whether those who unsubscribed still get messages another way."""
        try:
            while room.leaving:
                asked = set(room.leaving)
                answer = await self._ask(room.channel, True, None)
                there = {member.id for member in members_of(answer)}
                for identity in asked & room.leaving:
                    room.leaving.discard(identity)
                    if identity not in there:
                        self._gone(room, identity, "")
        except PubSubError as error:
            # Without an answer the event alone must do.
            if not isinstance(error, NotConnected):
                for identity in tuple(room.leaving):
                    self._gone(room, identity, "")
            room.leaving.clear()
        finally:
            room.checking = None

    def _gone(self, room: _Room, identity: str, reason: str) -> None:
        member = room.members.pop(identity, None)
        room.missing.pop(identity, None)
        if member is not None:
            watches = tuple(room.watches)
            self._event(InterestKind.LEFT, room.channel[:-1], member, watches, reason)

    async def _compare(self) -> None:
        """Notice who left without being told of, from time to time."""
        while True:
            await asyncio.sleep(self._refresh)
            for room in tuple(self._rooms.values()):
                try:
                    answer = await self._ask(room.channel, True, None)
                except NotConnected:
                    return
                except PubSubError as error:
                    logger.info("presence of %r cannot be compared: %s", room.channel, error)
                    continue
                there = {member.id for member in members_of(answer)}
                for identity in tuple(room.members):
                    if identity in there:
                        room.missing.pop(identity, None)
                        continue
                    room.missing[identity] = room.missing.get(identity, 0) + 1
                    if room.missing[identity] >= _MISSED:
                        self._gone(room, identity, "resync")

    def _event(
        self,
        kind: InterestKind,
        topic: str,
        member: Member,
        watches: tuple[int, ...],
        reason: str = "",
    ) -> None:
        self._tell(InterestEvent(kind, topic, member, reason=reason, watches=watches))
