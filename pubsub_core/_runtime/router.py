"""Which subscriptions a frame is for, and which subscriptions the broker must know of.

Local subscriptions with the same filter and share group lean on one `Wire`: one
subscription at the broker, made for the first of them and dropped after the last.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from pubsub_core.interfaces import HasAcknowledgement, WireSub
from pubsub_core.message import InFrame, Origin, Verdict
from pubsub_core.subscription import Subscription
from pubsub_core.trie import HandlerTrie

from .buffer import Delivery

__all__ = ["Router", "Wire"]

_ORPHANS = 4096
# Looking up a member of an enumeration costs as much as making a frame in Python 3.11.
_RETAINED = Origin.RETAINED
_ACK = Verdict.ACK


class Wire:
    """One subscription at the broker and the local ones that lean on it.

    Attributes:
        want: What the broker is asked for.
        generation: Session in which the broker confirmed `asked`; 0 for none.
        tried: Session in which the broker was asked, whether or not it answered.
        asked: What the broker confirmed.
    """

    def __init__(self, want: WireSub) -> None:
        self.want = want
        self.subscriptions: list[Subscription[Any]] = []
        self.generation = 0
        self.tried = 0
        self.asked: WireSub | None = None
        self.granted = 0
        # The newest message it received, to find the place in a history.
        self.last: InFrame | None = None
        self._turn = 0
        # Who was there when the broker was asked, and so gets what it retained.
        self.served: list[Subscription[Any]] = []

    @property
    def key(self) -> tuple[str, str | None]:
        """Filter and group, which identify it."""
        return self.want.filter, self.want.group

    def confirmed(self, generation: int) -> bool:
        """Whether the broker has accepted exactly what is wanted, in that session."""
        return self.generation == generation and self.asked == self.want

    def targets(self) -> list[Subscription[Any]]:
        """Return who gets the next frame: all, or one member of a share group in turn."""
        subscriptions = self.subscriptions
        if self.want.group is None or len(subscriptions) < 2:
            return subscriptions
        self._turn = (self._turn + 1) % len(subscriptions)
        return [subscriptions[self._turn]]


class Router:
    """Routes frames to subscriptions; lives on the bus's event loop."""

    def __init__(self) -> None:
        self._wires: dict[tuple[str, str | None], Wire] = {}
        self._by_id: dict[int, Wire] = {}
        self._trie: HandlerTrie[Wire] = HandlerTrie("mqtt")
        self._ids = itertools.count(1)
        self._settle: Callable[[object, Verdict], None] | None = None
        self.orphans: deque[InFrame] | None = None
        self.received = 0
        self.unrouted = 0

    def bind(self, backend: object) -> None:
        """Take over the backend's way to settle frames."""
        self._settle = backend.settle if isinstance(backend, HasAcknowledgement) else None

    @property
    def wires(self) -> tuple[Wire, ...]:
        """All wires, oldest first."""
        return tuple(self._wires.values())

    def subscriptions(self) -> Iterator[Subscription[Any]]:
        """Yield every local subscription."""
        for wire in self.wires:
            yield from tuple(wire.subscriptions)

    def find(self, filter: str, group: str | None) -> Wire | None:
        """Return the wire for that filter and group, if there is one."""
        return self._wires.get((filter, group))

    def attach(self, subscription: Subscription[Any], *, echo: bool) -> Wire:
        """Add *subscription*; return its wire, whose `want` may have changed."""
        plain = subscription.topic_filter.filter
        wire = self._wires.get((plain, subscription.group))
        if wire is None:
            want = WireSub(
                id=next(self._ids),
                filter=plain,
                group=subscription.group,
                qos=subscription.qos,
                echo=echo,
                manual_ack=subscription.settings.ack == "manual",
            )
            wire = Wire(want)
            self._wires[wire.key] = wire
            self._by_id[want.id] = wire
            self._trie.add(plain, wire)
        else:
            manual = wire.want.manual_ack or subscription.settings.ack == "manual"
            wire.want = msgspec.structs.replace(
                wire.want, qos=max(wire.want.qos, subscription.qos), manual_ack=manual
            )
        # Replaced, not changed: a frame may be on its way through the old list.
        wire.subscriptions = [*wire.subscriptions, subscription]
        return wire

    def detach(self, subscription: Subscription[Any]) -> Wire | None:
        """Remove *subscription*; return its wire when that was the last one leaning on it."""
        wire = self._wires.get((subscription.topic_filter.filter, subscription.group))
        if wire is None or subscription not in wire.subscriptions:
            return None
        wire.subscriptions = [each for each in wire.subscriptions if each is not subscription]
        if wire.subscriptions:
            return None
        del self._wires[wire.key]
        del self._by_id[wire.want.id]
        self._trie.remove(wire.want.filter, wire)
        return wire

    def keep_orphans(self) -> None:
        """Keep what nobody wants yet, for subscriptions to come.

        A session that was resumed from an earlier run delivers before anybody could
        subscribe.
        """
        self.orphans = deque()

    def drop_orphans(self) -> int:
        """Give up what was kept and keep nothing more; return how many messages it was."""
        waiting, self.orphans = self.orphans or (), None
        for frame in waiting:
            self._unwanted(frame)
        return len(waiting)

    def adopt_orphans(self) -> None:
        """Route what was kept and is wanted now."""
        if not self.orphans:
            return
        waiting = list(self.orphans)
        self.orphans.clear()
        for frame in waiting:
            self.received -= 1
            self.route(frame)

    def route(self, frame: InFrame) -> None:
        """Put *frame* into the buffer of every subscription it is for."""
        self.received += 1
        ids = frame.subscriptions
        if ids is not None and self.orphans is not None:
            # An earlier process may have given the same number to another filter.
            by_topic = self._trie.match(frame.topic)
            if not all(self._by_id.get(i) in by_topic for i in ids):
                ids = None
        wires: Sequence[Wire]
        if ids is None:
            wires = self._trie.match(frame.topic)
        elif len(ids) == 1:
            wire = self._by_id.get(ids[0])
            wires = () if wire is None else (wire,)
        else:
            wires = [each for i in ids if (each := self._by_id.get(i)) is not None]
        if len(wires) == 1:
            wire = wires[0]
            wire.last = frame
            targets = wire.targets()
        else:
            targets = list[Subscription[Any]]()
            for wire in wires:
                wire.last = frame
                targets += wire.targets()
        if frame.origin is _RETAINED:
            targets = [each for each in targets if each.first_retained(frame.topic)]
        if not targets:
            self._discard(frame)
            return
        delivery = None
        if frame.tag is not None and self._settle is not None:
            delivery = Delivery(frame.tag, len(targets), self._settle)
        for subscription in targets:
            subscription.put(frame, delivery)

    def _discard(self, frame: InFrame) -> None:
        if self.orphans is not None and frame.origin is not _RETAINED:
            if len(self.orphans) == _ORPHANS:
                self._unwanted(self.orphans.popleft())
            self.orphans.append(frame)
            return
        self._unwanted(frame)

    def _unwanted(self, frame: InFrame) -> None:
        self.unrouted += 1
        if frame.tag is not None and self._settle is not None:
            self._settle(frame.tag, _ACK)
