"""One client of a space, as the core sees it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

import msgspec

from pubsub_core.capabilities import Limits
from pubsub_core.errors import BadOption, InvalidFilter, NotConnected
from pubsub_core.events import InterestEvent, Notice
from pubsub_core.interfaces import (
    AuthorizationRequest,
    Backend,
    BackendContext,
    Entitlements,
    HistoryQuery,
    SessionFacts,
    Sink,
    Watch,
    WireSub,
)
from pubsub_core.message import InFrame, Member, OutFrame, Receipt, Verdict
from pubsub_core.topics import parse_filter

from .client import Group, LocalSub
from .options import MemoryOptions
from .space import Space

__all__ = ["MemoryBackend"]

_MOST_KEPT = 10_000


class MemoryBackend(Backend):
    """One client of a space."""

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        options: MemoryOptions = context.options
        self.options = options
        try:
            for each in options.guarded:
                parse_filter(each)
        except InvalidFilter as error:
            raise BadOption(
                str(error), option="guarded", hint="name topic filters", backend="memory"
            ) from error
        self.clock = context.clock
        self.time = context.clock.time
        self.space = Space.named(context.address.host, history=options.history)
        identity = options.client_id or f"memory-{secrets.token_hex(6)}"
        self.member = Member(identity, options.username, socket.gethostname())
        self.sink: Sink | None = None
        self.subscriptions: dict[int, LocalSub] = {}
        self.paused = False
        self._unpaused = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tags = itertools.count(1)
        # Messages that wait for an acknowledgement: subscription, group, frame, deadline.
        self._unsettled: dict[int, tuple[LocalSub, Group | None, InFrame, float]] = {}
        self._returned: list[tuple[int, InFrame]] = []
        self._kept: deque[InFrame] = deque(maxlen=_MOST_KEPT)
        self._timer: asyncio.Task[None] | None = None
        self._opened = False
        self._blocked: set[asyncio.Future[None]] = set()

    @property
    def limits(self) -> Limits:
        """The declared limits, and the option rate."""
        declared, rate = self.context.info.limits, self.options.rate
        return declared if rate is None else dataclasses.replace(declared, rate=(rate, 1.0))

    # --- Backend -------------------------------------------------------------------------

    async def open(self, sink: Sink) -> SessionFacts:
        """Enter the space."""
        self._loop = asyncio.get_running_loop()
        resumed = self.space.enter(self) and self._opened
        self._opened = True
        with self.space.lock:
            self.sink = sink
            while self._kept:
                # Rights may have gone meanwhile.
                frame = self.space.shown(self, self._kept.popleft())
                if frame is not None:
                    sink.deliver(frame)
        return SessionFacts(
            resumed=resumed, client_id=self.member.id, server=f"memory space {self.space.name!r}"
        )

    async def restored(self) -> None:
        """Redeliver messages that were unacknowledged when the session was lost."""
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
        space = self.space
        if space.paused and space.blocked(self, out) is not None:
            return None
        return space.publish(self, out)

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish; wait while a receiver with ``overflow="block"`` is full."""
        while (receiver := self.space.blocked(self, out)) is not None:
            if self.sink is None:
                break
            # A task of its own, so that the end of this session can end the wait.
            waiting = asyncio.ensure_future(receiver.unpaused())
            self._blocked.add(waiting)
            try:
                await asyncio.wait([waiting])
            finally:
                self._blocked.discard(waiting)
                waiting.cancel()
        if self.sink is None:
            raise self._not_connected()
        return self.space.publish(self, out)

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
        """Deliver retained messages once more."""
        subscription = self.subscriptions.get(want.id)
        if subscription is not None:
            self.space.give_retained(subscription)

    async def ping(self) -> float:
        """Return 0: there is no way to go."""
        return 0.0

    def pause(self) -> bool:
        """Let publishers wait."""
        self.paused = True
        self.space.paused.add(self.member.id)
        self._unpaused.clear()
        return True

    def resume(self) -> None:
        """Let publishers go on."""
        self.paused = False
        self.space.paused.discard(self.member.id)
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
        return self.space.look(self, topic)

    async def watch_notifications(self, watch: Watch) -> None:
        """Begin to report subscriptions."""
        self.space.watch(self, watch)

    async def unwatch_notifications(self, watch: Watch) -> None:
        """Stop reporting."""
        self.space.unwatch(self, watch)

    async def history(self, filter: str, query: HistoryQuery) -> AsyncIterator[InFrame]:
        """Yield stored messages."""
        for frame in self.space.stored(self, filter, query):
            yield frame

    async def last(self, topic: str) -> InFrame | None:
        """Return the retained value."""
        return self.space.last(self, topic)

    async def watch_authorizations(self, filter: str) -> None:
        """Ask the sink about clients that want topics matching *filter*."""
        if self.sink is None:
            raise self._not_connected()
        self.space.watch_authorizations(self, filter)

    async def unwatch_authorizations(self, filter: str) -> None:
        """Stop asking."""
        self.space.unwatch_authorizations(self, filter)

    async def authorize(
        self, request: AuthorizationRequest, entitlements: Entitlements | None
    ) -> None:
        """Answer; an empty set shows the parts that need no entitlement."""
        if self.sink is None:
            raise self._not_connected()
        self.space.authorize(self, request, entitlements)

    def settle(self, tag: object, verdict: Verdict) -> None:
        """Forget a message, or deliver it again."""
        waiting = self._unsettled.pop(cast("int", tag), None)
        if waiting is None or verdict is not Verdict.NACK:
            return
        subscription, group, frame, _ = waiting
        if subscription.want.id in self.subscriptions or group is not None:
            self.space.redeliver(subscription, group, frame)

    # --- for the space ----------------------------------------------------------------------

    def take(self, frame: InFrame, group: Group | None = None, *, manual: bool = False) -> None:
        """Receive the visible part of one message; a *manual* one waits for an ack."""
        whole = frame
        shown = self.space.shown(self, whole, tell=True)
        if shown is None:
            return
        frame = shown
        if manual:
            # The next receiver may see other parts of it.
            frame = msgspec.structs.replace(frame, tag=self._await_settling(whole, group))
        sink = self.sink
        if sink is not None:
            sink.deliver(frame)
        elif self.options.persistent:
            self._kept.append(frame)

    def _await_settling(self, frame: InFrame, group: Group | None) -> int:
        (identity,) = frame.subscriptions or (0,)
        tag = next(self._tags)
        deadline = self.clock.monotonic() + self.options.ack_timeout
        subscription = self.subscriptions[identity]
        self._unsettled[tag] = (subscription, group, frame, deadline)
        self._watch_deadlines()
        return tag

    def tell(self, event: InterestEvent) -> None:
        """Receive one change of interest."""
        if self.sink is not None:
            self.sink.interest(event)

    def note(self, notice: Notice) -> None:
        """Receive a notice."""
        if self.sink is not None:
            self.sink.notice(notice)

    def ask(self, request: AuthorizationRequest) -> None:
        """Receive a question about another client."""
        if self.sink is not None:
            self.sink.authorization(request)

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
        self.space.end_session(self)
        self._on_loop(self._let_go)
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
        if self._timer is None or self._timer.done():
            self._on_loop(self._start_timer)

    def _let_go(self) -> None:
        """Let those go on who wait for this client to unpause, and end its own waits."""
        self.resume()
        for waiting in tuple(self._blocked):
            waiting.cancel()

    def _on_loop(self, function: Callable[[], None]) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            function()
        else:
            loop.call_soon_threadsafe(function)

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
