"""One login at a distributor: sending, confirming, the sign of life.

Nothing is acknowledged; a `Fence` that comes back proves that everything sent before it was
acted on. It shows that the login succeeded, confirms subscriptions, delimits listings, and is
the sign of life.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine
from typing import Any
from uuid import UUID

from pubsub_core.clock import Clock
from pubsub_core.errors import NotConnected
from pubsub_core.interfaces import Address, Sink
from pubsub_messagebus.protocol import Fence, ForwardedSubscriptionRequest

from .link import Link

__all__ = ["Session", "not_connected"]


class Session:
    """One connection after the handshake was sent.

    Attributes:
        confirms: Whether fences come back. False from the moment that one was waited for in
            vain to the moment that one comes back after all; meanwhile nothing is confirmed.
        online: Whether the core knows of it.
        over: Whether it has ended; it sends nothing more.
    """

    def __init__(
        self, link: Link, sink: Sink, address: Address, clock: Clock, *, backend: str
    ) -> None:
        self.link = link
        self.sink = sink
        self.confirms = True
        self.online = False
        self.over = False
        self._address = address
        self._clock = clock
        self._backend = backend
        self._fence = Fence()
        self._fences: deque[asyncio.Future[None]] = deque()
        self._next: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def client_id(self) -> UUID:
        """Our own identifier, once a fence has come back."""
        return self._fence.client_id or UUID(int=0)

    def send(self, frame: bytes) -> None:
        """Write whole messages.

        Raises:
            NotConnected: The session is over.
        """
        if self.over:
            raise self.not_connected()
        self.link.write(frame)

    async def confirm(self) -> None:
        """Return when the distributor has acted on everything sent so far.

        Where fences do not come back, return at once.

        Raises:
            NotConnected: The session ended before.
        """
        if self.over:
            raise self.not_connected()
        if not self.confirms:
            return
        fence = self._next
        if fence is None:
            loop = asyncio.get_running_loop()
            fence = self._next = loop.create_future()
            # In the next turn, so that all who ask in this one share a fence.
            loop.call_soon(self._send_fence, fence)
        # Shielded, since others wait for the same one.
        await asyncio.shield(fence)
        if self.over:
            raise self.not_connected()

    def _send_fence(self, fence: asyncio.Future[None]) -> None:
        if self._next is not fence or self.over:
            return
        self._next = None
        self._fences.append(fence)
        self.link.write(self._fence.ask())

    def pass_fence(self, message: ForwardedSubscriptionRequest) -> bool:
        """Whether the message is about a fence; its waiters go on."""
        if not self._fence.owns(message):
            return False
        frames = self._fence.take(message)
        if frames is not None:
            self.link.write(frames)
            self.confirms = True
            fence = self._fences.popleft() if self._fences else None
            if fence is not None and not fence.done():
                fence.set_result(None)
        return True

    async def confirm_first(self, within: float) -> bool:
        """Wait so many seconds for the first fence; return whether it came back.

        Raises:
            NotConnected: The session ended before.
        """
        try:
            async with asyncio.timeout(within):
                await self.confirm()
        except TimeoutError:
            self.confirms = False
        return self.confirms

    async def keep_alive(self, seconds: float) -> None:
        """Ask for a sign of life after so long a silence, and end the link without one.

        A dead peer is noticed one and a half times as long after its last bytes. The silence
        is measured from those bytes: a look once per interval, as it was here first, noticed
        it up to an interval late.
        """
        clock, link = self._clock, self.link
        while True:
            wait = link.heard_at + seconds - clock.monotonic()
            if wait > 0:
                # Not less than a millisecond: the rest of a sum of floats may be too little
                # to move a clock at all.
                await clock.sleep(max(wait, 0.001))
                continue
            heard_at = link.heard_at
            if self.confirms:
                self.spawn(self._ask(), "sign of life")
            await clock.sleep(seconds / 2)
            # Any bytes are a sign of life. Without fences the kernel watches the link, see
            # `Link.watch`.
            if self.confirms and link.heard_at == heard_at:
                link.fail(ConnectionError(f"no sign of life for {1.5 * seconds:g} s"))
                return

    async def _ask(self) -> None:
        with contextlib.suppress(NotConnected):
            await self.confirm()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run *work* beside; it ends with the session."""
        task = asyncio.create_task(work, name=f"pubsub messagebus {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def end(self) -> None:
        """End it for all waiters; the link is left alone."""
        self.over = True
        self.online = False
        fences = list(self._fences)
        if self._next is not None:
            fences.append(self._next)
            self._next = None
        self._fences.clear()
        for fence in fences:
            if not fence.done():
                fence.set_result(None)
        for task in tuple(self._tasks):
            task.cancel()

    async def ended(self) -> None:
        """Return when no task of it runs any more."""
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=1)

    def not_connected(self) -> NotConnected:
        """Make the error for a call that came too late."""
        return not_connected(self._address, self._backend)


def not_connected(address: Address, backend: str) -> NotConnected:
    """Make the error for a call that needs a session."""
    return NotConnected(
        f"no session with {address}", hint="wait until the bus is online", backend=backend
    )
