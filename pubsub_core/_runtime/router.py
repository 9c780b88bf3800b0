"""Which subscribers a frame is for, and which subscriptions the broker must know of.

Subscribers with the same filter and share group lean on one `Route`: one subscription at the
broker, made for the first of them and dropped after the last.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from pubsub_core.interfaces import HasAcknowledgement, WireSub
from pubsub_core.message import InFrame, Origin, Verdict
from pubsub_core.trie import HandlerTrie

from .buffer import Settlement
from .delivery import Subscriber

__all__ = ["Route", "Router"]

_ORPHANS = 4096
# Looking up a member of an enumeration costs as much as making a frame in Python 3.11.
_RETAINED = Origin.RETAINED
_ACK = Verdict.ACK


class Route:
    """One subscription at the broker and the subscribers that lean on it.

    Attributes:
        want: The subscription as the broker shall have it.
        generation: Session in which the broker confirmed `asked`; 0 for none.
        tried: Session in which the broker was asked, whether or not it answered.
        asked: The subscription as the broker confirmed it.
        last: The newest frame that came this way, to find the place in a history.
        served: Subscribers that were there when the broker was asked, and so get what it
            retained.
    """

    def __init__(self, want: WireSub) -> None:
        self.want = want
        self.subscribers: list[Subscriber] = []
        self.generation = 0
        self.tried = 0
        self.asked: WireSub | None = None
        self.granted = 0
        self.last: InFrame | None = None
        self._turn = 0
        self.served: list[Subscriber] = []

    @property
    def key(self) -> tuple[str, str | None]:
        """Filter and group, which identify it."""
        return self.want.filter, self.want.group

    def confirmed(self, generation: int) -> bool:
        """Whether the broker has accepted exactly `want`, in that session."""
        return self.generation == generation and self.asked == self.want

    def targets(self) -> list[Subscriber]:
        """Return the receivers of the next frame: all, or one member of a share group."""
        subscribers = self.subscribers
        if self.want.group is None or len(subscribers) < 2:
            return subscribers
        self._turn = (self._turn + 1) % len(subscribers)
        return [subscribers[self._turn]]


class Router:
    """Routes frames to subscribers; lives on the bus's event loop."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, str | None], Route] = {}
        self._by_id: dict[int, Route] = {}
        self._trie: HandlerTrie[Route] = HandlerTrie("mqtt")
        self._ids = itertools.count(1)
        self._settle: Callable[[object, Verdict], None] | None = None
        self.orphans: deque[InFrame] | None = None
        self.received = 0
        self.unrouted = 0

    def bind(self, backend: object) -> None:
        """Settle frames through *backend*, where it can acknowledge."""
        self._settle = backend.settle if isinstance(backend, HasAcknowledgement) else None

    @property
    def routes(self) -> tuple[Route, ...]:
        """All routes, oldest first."""
        return tuple(self._routes.values())

    def subscribers(self) -> Iterator[Subscriber]:
        """Yield every subscriber."""
        for route in self.routes:
            yield from tuple(route.subscribers)

    def find(self, filter: str, group: str | None) -> Route | None:
        """Return the route for that filter and group, if there is one."""
        return self._routes.get((filter, group))

    def attach(self, subscriber: Subscriber, *, echo: bool) -> Route:
        """Add *subscriber*; return its route, whose `want` may have changed."""
        plain, settings = subscriber.topic_filter.filter, subscriber.settings
        manual = settings.ack == "manual"
        route = self._routes.get((plain, settings.group))
        if route is None:
            want = WireSub(
                id=next(self._ids),
                filter=plain,
                group=settings.group,
                qos=settings.qos,
                echo=echo,
                manual_ack=manual,
            )
            route = Route(want)
            self._routes[route.key] = route
            self._by_id[want.id] = route
            self._trie.add(plain, route)
        else:
            route.want = msgspec.structs.replace(
                route.want,
                qos=max(route.want.qos, settings.qos),
                manual_ack=route.want.manual_ack or manual,
            )
        # Replaced, not changed: a frame may be on its way through the old list.
        route.subscribers = [*route.subscribers, subscriber]
        return route

    def detach(self, subscriber: Subscriber) -> Route | None:
        """Remove *subscriber*; return its route when that was the last one leaning on it."""
        route = self._routes.get((subscriber.topic_filter.filter, subscriber.settings.group))
        if route is None or subscriber not in route.subscribers:
            return None
        route.subscribers = [each for each in route.subscribers if each is not subscriber]
        if route.subscribers:
            return None
        del self._routes[route.key]
        del self._by_id[route.want.id]
        self._trie.remove(route.want.filter, route)
        return route

    def keep_orphans(self) -> None:
        """Hold messages that have no subscriber yet, for subscriptions to come.

        A session that was resumed from an earlier run delivers before anybody could
        subscribe.
        """
        self.orphans = deque()

    def drop_orphans(self) -> int:
        """Give up the held messages and hold no more; return how many there were."""
        waiting, self.orphans = self.orphans or (), None
        for frame in waiting:
            self._unwanted(frame)
        return len(waiting)

    def adopt_orphans(self) -> None:
        """Deliver held messages that now have a subscriber."""
        if not self.orphans:
            return
        waiting = list(self.orphans)
        self.orphans.clear()
        for frame in waiting:
            self.received -= 1
            self.route(frame)

    def route(self, frame: InFrame) -> None:
        """Put *frame* into the buffer of every subscriber it is for; runs once per frame."""
        self.received += 1
        # A broker that names subscriptions by number has matched already; others are matched
        # here, which also corrects a broker that delivers more than the filters say.
        ids = frame.subscriptions
        if ids is not None and self.orphans is not None:
            # The session was resumed from an earlier process, which may have given the same
            # number to another filter; so the numbers have to agree with the topic.
            by_topic = self._trie.match(frame.topic)
            if not all(self._by_id.get(i) in by_topic for i in ids):
                ids = None
        routes: Sequence[Route]
        if ids is None:
            routes = self._trie.match(frame.topic)
        elif len(ids) == 1:
            route = self._by_id.get(ids[0])
            routes = () if route is None else (route,)
        else:
            routes = [each for i in ids if (each := self._by_id.get(i)) is not None]
        if len(routes) == 1:  # the common case, without a new list
            route = routes[0]
            route.last = frame
            targets = route.targets()
        else:
            targets = list[Subscriber]()
            for route in routes:
                route.last = frame
                targets += route.targets()
        if frame.origin is _RETAINED:
            targets = [each for each in targets if each.first_retained(frame.topic)]
        if not targets:
            self._discard(frame)
            return
        settlement = None
        if frame.tag is not None and self._settle is not None:
            settlement = Settlement(frame.tag, len(targets), self._settle)
        for subscriber in targets:
            subscriber.put(frame, settlement)

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
