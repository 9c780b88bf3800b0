"""The one queue between a backend and the consumer of a subscription.

It is bounded in messages and in bytes. Putting never waits; what happens when it is full is
the overflow policy's decision, every loss is counted, and is a `Gap` at its very place in the
stream for those who asked for gaps. Taking is safe to cancel: an item leaves the queue only in the
step that returns it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args

from pubsub_core.config.bus_options import BusOptions, OverflowPolicy
from pubsub_core.errors import BadOption, BadType, PubSubError, SubscriptionOverflow
from pubsub_core.events import Gap, GapReason
from pubsub_core.interfaces import HistoryQuery
from pubsub_core.message import InFrame, Verdict
from pubsub_core.stats import BusStats
from pubsub_core.subscription import DecodePolicy, SubscribeOptions, check_names
from pubsub_core.topics import validate_topic

__all__ = ["Buffer", "Item", "Settlement", "SubscriptionSettings"]

T = TypeVar("T")


_LATE = 10.0
"""Seconds during which a live copy of a message from the history may still arrive."""

_EPISODE = 10.0
"""Seconds after which an overflow is told although it goes on."""


class Settlement:
    """A frame that waits for a decision of every subscription that received it."""

    __slots__ = ("_remaining", "_settle", "_tag", "_verdict")

    def __init__(
        self, tag: object, receivers: int, settle: Callable[[object, Verdict], None]
    ) -> None:
        self._tag = tag
        self._remaining = receivers
        self._settle = settle
        self._verdict = Verdict.ACK

    def decide(self, verdict: Verdict) -> None:
        """Note one receiver's decision; the last one settles the frame with the worst."""
        if verdict is Verdict.NACK or self._verdict is Verdict.ACK:
            self._verdict = verdict
        self._remaining -= 1
        if self._remaining == 0:
            self._settle(self._tag, self._verdict)


Item = tuple[InFrame, Settlement | None]


class _Entry:
    """A waiting message that a newer one of its topic may replace.

    Attributes:
        replaced: How many it has replaced that nobody was told about.
        since: Unix seconds of the first of these.
    """

    __slots__ = ("frame", "replaced", "settlement", "since")

    def __init__(self, frame: InFrame, settlement: Settlement | None) -> None:
        self.frame = frame
        self.settlement = settlement
        self.replaced = 0
        self.since = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionSettings:
    """Options of one subscription, checked and complete; see `SubscribeOptions`."""

    buffer: int
    buffer_bytes: int
    overflow: OverflowPolicy
    group: str | None = None
    qos: int = 1
    ack: Literal["auto", "manual"] = "auto"
    replay: HistoryQuery | None = None
    gaps: bool = False
    on_decode_error: DecodePolicy = "raise"
    dead_letter: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadOption: One of them makes no sense.
            InvalidTopic: The dead-letter topic is none.
        """
        for name in ("buffer", "buffer_bytes", "qos"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise BadType(f"{name}={value!r}", hint="pass an int", option=name)
        if self.buffer < 1 or self.buffer_bytes < 1:
            raise BadOption(
                f"buffer={self.buffer}, buffer_bytes={self.buffer_bytes}",
                hint="pass 1 or more; a queue is never unbounded",
                option="buffer",
            )
        _check_word("overflow", self.overflow, OverflowPolicy)
        _check_word("ack", self.ack, Literal["auto", "manual"])
        _check_word("on_decode_error", self.on_decode_error, DecodePolicy)
        group = self.group
        if group is not None and not isinstance(group, str):  # pyright: ignore[reportUnnecessaryIsInstance] # callers without types
            raise BadType(f"group={group!r}", hint="pass a str", option="group")
        if group is not None and (not group or any(each in group for each in "/+#\0")):
            raise BadOption(
                f"group={group!r}", hint="pass a name without / + # and NUL", option="group"
            )
        if self.qos not in (0, 1, 2):
            raise BadOption(f"qos={self.qos!r}", hint="pass 0, 1 or 2", option="qos")
        if self.replay is not None and self.replay.last is not None and self.replay.last < 0:
            raise BadOption(f"replay={self.replay.last}", hint="pass 0 or more", option="replay")
        if self.dead_letter is not None:
            validate_topic(self.dead_letter)
        elif self.on_decode_error == "dead_letter":
            raise BadOption(
                "on_decode_error='dead_letter' needs dead_letter='a/topic'",
                option="on_decode_error",
            )

    @classmethod
    def of(cls, given: SubscribeOptions, defaults: BusOptions) -> Self:
        """Return *given*, with the bus's *defaults* where it says nothing.

        Raises:
            BadOption: It has an option that there is not, or a value that makes no sense.
        """
        check_names(given, SubscribeOptions, "subscribe")
        replay = given.get("replay")
        if replay is not None and not isinstance(replay, (int, HistoryQuery)):  # pyright: ignore[reportUnnecessaryIsInstance] # callers without types
            raise BadType(
                f"replay={replay!r}",
                hint="pass a number of messages, or a HistoryQuery",
                option="replay",
            )
        return cls(
            buffer=_or(given.get("buffer"), defaults.buffer),
            buffer_bytes=_or(given.get("buffer_bytes"), defaults.buffer_bytes),
            overflow=_or(given.get("overflow"), defaults.overflow),
            group=given.get("group"),
            qos=_or(given.get("qos"), defaults.qos),
            ack=given.get("ack", "auto"),
            replay=HistoryQuery(last=replay) if isinstance(replay, int) else replay,
            gaps=given.get("gaps", False),
            on_decode_error=given.get("on_decode_error", "raise"),
            dead_letter=given.get("dead_letter"),
        )


def _or(given: T | None, default: T) -> T:
    return default if given is None else given


def _check_word(name: str, value: str, words: Any) -> None:
    known = get_args(words)
    if value not in known:
        raise BadOption(f"{name}={value!r}", hint=f"pass one of {', '.join(known)}", option=name)


class Buffer:
    """The messages that wait for one subscription's consumer.

    Attributes:
        received: Messages put in, dropped ones included.
        dropped: Messages the overflow policy dropped.
        dropped_bytes: Payload bytes of these.
        bytes: Payload bytes waiting now.

    Args:
        name: The filter, for errors and gaps.
        stats: The bus's counters; drops are counted there too, and stay when the buffer goes.
        now: Returns Unix seconds.
        pause: Called when ``overflow="block"`` needs the broker to wait.
        unpause: Called when there is room again.
        report: Called once for each episode in which messages were dropped, with their number
            and the seconds that it lasted. An episode ends when half of the buffer is free or
            the buffer ends; a longer one is told every ten seconds. Messages that
            ``overflow="latest"`` replaced are no episode: the program asked for that.
    """

    def __init__(
        self,
        name: str,
        settings: SubscriptionSettings,
        *,
        stats: BusStats,
        now: Callable[[], float],
        pause: Callable[[], None],
        unpause: Callable[[], None],
        report: Callable[[int, float], None],
    ) -> None:
        self._name = name
        self._settings = settings
        self._most = settings.buffer
        self._most_bytes = settings.buffer_bytes
        self._stats = stats
        self._now = now
        self._pause = pause
        self._unpause = unpause
        self._report = report
        self._items: deque[Item | _Entry | Gap] = deque()
        self._gaps = 0
        # With overflow="latest": the one waiting entry of each topic.
        self._newest: dict[str, _Entry] | None = {} if settings.overflow == "latest" else None
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._held: list[Item] | None = None
        # What a history gave, and until when a live copy of it may still arrive.
        self._known: set[tuple[str, str]] = set()
        self._known_until = 0.0
        self._ended = False
        self._failure: PubSubError | None = None
        # Whether `put` must look at any of the above.
        self._special = self._newest is not None
        self._paused = False
        self._on_full: Callable[[], object] | None = None
        # Dropped in the present episode, and since when.
        self._lost = 0
        self._lost_since = 0.0
        # Whether `pop` must look at any of these: one flag keeps it cheap.
        self._was_full = False
        # Whether a message that comes too late is acknowledged. Unanswered ones would fill the
        # broker's window and so stop the other subscriptions of the bus.
        self._settles = True
        self.received = 0
        self.dropped = 0
        self.dropped_bytes = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._items) - self._gaps

    @property
    def ready(self) -> bool:
        """Whether there is anything to take without waiting."""
        return bool(self._items)

    @property
    def full(self) -> bool:
        """Whether there is no room for another message."""
        return len(self) >= self._most or self.bytes >= self._most_bytes

    @property
    def open(self) -> bool:
        """Whether it still takes messages."""
        return not self._ended and self._failure is None

    # --- putting -----------------------------------------------------------------------

    def put(self, frame: InFrame, settlement: Settlement | None) -> None:
        """Add one frame, by the overflow policy when it is full; never waits.

        Runs once per frame and subscriber. All rare states share the one flag `_special`, so
        that the common case asks once instead of five times.
        """
        if self._special and not self._put_specially(frame, settlement):
            return
        self.received += 1
        size = len(frame.payload)
        if (
            len(self._items) - self._gaps >= self._most or self.bytes + size > self._most_bytes
        ) and not self._make_room(frame, settlement, size):
            return
        if self._newest is None:
            self._items.append((frame, settlement))
        else:
            self._newest[frame.topic] = entry = _Entry(frame, settlement)
            self._items.append(entry)
        self.bytes += size
        if self._waiters:
            self._wake()

    def put_gap(self, gap: Gap) -> None:
        """Add a gap at this place of the stream, where gaps were asked for."""
        if self._settings.gaps and self.open:
            self._items.append(gap)
            self._gaps += 1
            self._wake()

    def hold(self) -> None:
        """Keep arriving frames aside until `replay`."""
        self._held = []
        self._special = True

    def replay(self, frames: Iterable[InFrame]) -> None:
        """Add stored *frames*, then those that arrived meanwhile, each message once."""
        held, self._held = self._held or [], None
        seen: set[tuple[str, str]] = set()
        for frame in frames:
            if frame.id is not None:
                seen.add((frame.topic, frame.id))
            self.put(frame, None)
        for frame, settlement in held:
            if frame.id is None or (frame.topic, frame.id) not in seen:
                self.put(frame, settlement)
            elif settlement is not None:
                settlement.decide(Verdict.ACK)

    def bridge(self, frames: Iterable[InFrame]) -> None:
        """Add stored *frames* that fill a gap, each once.

        One that was stored after the new session had subscribed also arrives live, sooner or
        later; that copy is then acknowledged and not added.
        """
        known: set[tuple[str, str]] = set()
        for frame in frames:
            self.put(frame, None)
            if frame.id is not None:
                known.add((frame.topic, frame.id))
        if known:
            self._known = known
            self._known_until = self._now() + _LATE
            self._special = True

    def end(self, verdict: Verdict | None) -> None:
        """Take and give nothing more; settle the waiting messages with *verdict*.

        With None nothing is settled any more: the broker still has the messages that were not
        handled, and gives them to the next session, if it keeps one.
        """
        if not self._ended:
            self.finish()
        self._tell_overflow()
        self._settles = verdict is not None
        waiting = [settlement for _, settlement in self._held or ()]
        self._held = None
        while self._items:
            item = self.pop()
            if not isinstance(item, Gap):
                waiting.append(item[1])
        if verdict is not None:
            for settlement in waiting:
                if settlement is not None:
                    settlement.decide(verdict)

    def finish(self) -> None:
        """Take nothing more; the waiting messages can still be taken.

        Messages that still arrive are not acknowledged: nothing here will handle them.
        """
        self._ended = self._special = True
        self._settles = False
        self._wake_all()

    def fail(self, error: PubSubError) -> None:
        """Take nothing more; the consumer raises *error* after the waiting messages."""
        if self.open:
            self._failure = error
            self._special = True
            self._tell_overflow()
            self._wake_all()

    def _put_specially(self, frame: InFrame, settlement: Settlement | None) -> bool:
        """Return whether `put` shall go on."""
        if not self.open:
            if settlement is not None and self._settles:
                settlement.decide(Verdict.ACK)
            return False
        if self._known and frame.id is not None and self._is_known(frame.topic, frame.id):
            if settlement is not None:
                settlement.decide(Verdict.ACK)
            return False
        if self._held is not None:
            self._held.append((frame, settlement))
            if len(self._held) > self._most:
                self.received += 1
                self._lose(*self._held.pop(0))
            return False
        if self._newest is not None and (older := self._newest.get(frame.topic)) is not None:
            size = self.bytes - len(older.frame.payload) + len(frame.payload)
            if size > self._most_bytes and len(self) > 1:
                # It needs the room of others, which `put` makes as for a new topic.
                self._remove(older)
                return True
            self._drop(older.frame, older.settlement)
            # The newer message takes the older one's place in the queue, so that a busy
            # topic cannot push a quiet one back again and again.
            self.received += 1
            self.bytes = size
            older.frame, older.settlement = frame, settlement
            if not older.replaced:
                older.since = self._now()
            older.replaced += 1
            return False
        return True

    def _remove(self, entry: _Entry) -> None:
        """Drop a waiting entry that a larger message of its topic displaces."""
        index = self._items.index(entry)
        del self._items[index]
        if self._newest is not None:
            del self._newest[entry.frame.topic]
        self.bytes -= len(entry.frame.payload)
        self._drop(entry.frame, entry.settlement)
        if self._settings.gaps:
            self._items.insert(index, self._gap(entry.replaced + 1, entry.since or None))
            self._gaps += 1

    def _is_known(self, topic: str, identity: str) -> bool:
        if self._now() > self._known_until:
            self._known.clear()
            self._special = self._newest is not None or self._held is not None
            return False
        known = (topic, identity) in self._known
        self._known.discard((topic, identity))
        return known

    # --- overflow ----------------------------------------------------------------------

    def on_full(self, call: Callable[[], object] | None) -> None:
        """Call *call* whenever a message finds no room, before anything is done about that."""
        self._on_full = call

    def _make_room(self, frame: InFrame, settlement: Settlement | None, size: int) -> bool:
        if self._on_full is not None:
            self._on_full()
        if not len(self):
            return True  # one message always fits, however large: nothing else could free room
        policy = self._settings.overflow
        if policy == "block":
            # The backend stops reading. Frames that it had read already are kept, above the
            # bound, rather than lost.
            if not self._paused:
                self._paused = self._was_full = True
                self._pause()
            return True
        if policy == "error":
            self.fail(
                SubscriptionOverflow(
                    f"the subscription to {self._name!r} fell behind with {len(self)} "
                    "messages waiting",
                    buffered=len(self),
                    hint="consume faster, raise buffer=, or choose another overflow policy",
                    topic=self._name,
                )
            )
            self._drop(frame, settlement)
            return False
        if policy == "drop_newest":
            self._lose(frame, settlement)
            self._gap_at_end()
            return False
        while len(self) and (len(self) >= self._most or self.bytes + size > self._most_bytes):
            self._drop_oldest()
        return True

    def _drop(self, frame: InFrame, settlement: Settlement | None) -> None:
        self.dropped += 1
        self.dropped_bytes += len(frame.payload)
        self._stats.overflowed += 1
        if settlement is not None:
            settlement.decide(Verdict.REJECT)

    def _lose(self, frame: InFrame, settlement: Settlement | None) -> None:
        """Drop a message that the program did not ask to lose."""
        self._drop(frame, settlement)
        self._was_full = True
        if not self._lost:
            self._lost_since = self._now()
        self._lost += 1
        # A clock is read a thousand times less often than messages may be dropped.
        if self._lost & 0x3FF == 0 and self._now() - self._lost_since >= _EPISODE:
            self._tell_overflow()

    def _tell_overflow(self) -> None:
        lost, self._lost = self._lost, 0
        if lost:
            self._report(lost, self._now() - self._lost_since)

    def _relieved(self) -> None:
        """Half of the buffer is free again."""
        self._was_full = False
        if self._paused:
            self._paused = False
            self._unpause()
        self._tell_overflow()

    def _drop_oldest(self) -> None:
        before: list[Gap] = []
        self._was_full = False  # taking one out to drop it is no relief
        while isinstance(item := self.pop(), Gap):
            before.append(item)
        self._lose(*item)
        if self._settings.gaps:
            if before and before[-1].reason is GapReason.OVERFLOW:
                before[-1] = self._gap((before[-1].lost or 0) + 1, before[-1].since)
            else:
                before.append(self._gap(1))
        self._items.extendleft(reversed(before))
        self._gaps += len(before)

    def _gap_at_end(self) -> None:
        if not self._settings.gaps:
            return
        last = self._items[-1] if self._items else None
        if isinstance(last, Gap) and last.reason is GapReason.OVERFLOW:
            self._items[-1] = self._gap((last.lost or 0) + 1, last.since)
        else:
            self._items.append(self._gap(1))
            self._gaps += 1
            self._wake()

    def _gap(self, lost: int, since: float | None = None) -> Gap:
        now = self._now()
        return Gap(GapReason.OVERFLOW, lost, False, since or now, now, self._name)

    # --- taking ------------------------------------------------------------------------

    def pop(self) -> Item | Gap:
        """Take the next item; only when `ready`."""
        item = self._items.popleft()
        if isinstance(item, Gap):
            self._gaps -= 1
            return item
        if isinstance(item, _Entry):
            if item.replaced and self._settings.gaps:
                # The hole is where the newer message took the place of the older ones.
                gap = self._gap(item.replaced, item.since)
                item.replaced = 0
                self._items.appendleft(item)
                return gap
            if self._newest is not None:
                del self._newest[item.frame.topic]
            item = (item.frame, item.settlement)
        self.bytes -= len(item[0].payload)
        if self._was_full and len(self) * 2 <= self._most and self.bytes * 2 <= self._most_bytes:
            self._relieved()
        return item

    def give_back(self, item: Item) -> None:
        """Put *item*, which was taken last, back at the front."""
        frame, settlement = item
        if self._ended and self._settles:
            if settlement is not None:
                settlement.decide(Verdict.REJECT)
        elif self._newest is None:
            self._items.appendleft(item)
            self.bytes += len(frame.payload)
        elif (newer := self._newest.get(frame.topic)) is not None:
            self._drop(frame, settlement)
            newer.replaced += 1
            newer.since = newer.since or self._now()
        else:
            self._newest[frame.topic] = entry = _Entry(frame, settlement)
            self._items.appendleft(entry)
            self.bytes += len(frame.payload)
        self._wake()

    async def take(self) -> Item | Gap | None:
        """Return the next item, waiting for it; None when there will be none.

        Raises:
            PubSubError: Why there will be none, after everything that waited was taken.
        """
        while not self._items:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return None
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                if waiter.done() and not waiter.cancelled():
                    # Cancelled in the very step in which it was woken: the wake-up belongs to
                    # the next one that waits, or an item would lie there with nobody woken.
                    self._wake()
                raise
        return self.pop()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        while self._waiters:
            self._wake()
