"""One login at a distributor: what is sent, what is confirmed, what runs beside it.

Nothing is acknowledged, but the distributor acts on the messages of one client in order and
tells it of its own subscriptions. So a *fence*, a subscription to a private feed that comes
back, proves that everything sent before it was acted on. It shows that the login succeeded,
and our own identifier; it confirms subscriptions, delimits listings, and is the sign of life.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Any

from pubsub_core.errors import NotConnected
from pubsub_core.interfaces import Address, Sink
from pubsub_messagebus.protocol import (
    FENCE_FEEDS,
    ForwardedSubscriptionRequest,
    encode_notification_request,
    encode_subscription_request,
)

from .link import Link

__all__ = ["Session", "not_connected"]


class Session:
    """One connection after the handshake was sent.

    Attributes:
        client_id: Our own identifier, once a fence has come back.
        online: Whether the core knows of it.
        over: Whether it has ended; it sends nothing more.
    """

    def __init__(self, link: Link, sink: Sink, address: Address, *, backend: str) -> None:
        self.link = link
        self.sink = sink
        self.client_id = uuid.UUID(int=0)
        self.online = False
        self.over = False
        self._address = address
        self._backend = backend
        self._feed = f"{FENCE_FEEDS}{uuid.uuid4()}"
        self._number = 0
        self._fences: dict[str, asyncio.Future[None]] = {}
        self._next: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

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

        Raises:
            NotConnected: The session ended before.
        """
        if self.over:
            raise self.not_connected()
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
        self._number += 1
        feed = f"{self._feed}/{self._number}"
        self._fences[feed] = fence
        self.link.write(
            encode_notification_request(feed, True) + encode_subscription_request(feed, "x", True)
        )

    def pass_fence(self, message: ForwardedSubscriptionRequest) -> bool:
        """Whether the message is about a fence; if it is ours, who waited for it goes on."""
        if not message.feed.startswith(FENCE_FEEDS):
            return False
        fence = self._fences.pop(message.feed, None)
        if fence is not None and message.is_add:
            self.client_id = message.client_id
            self.link.write(
                encode_subscription_request(message.feed, "x", False)
                + encode_notification_request(message.feed, False)
            )
            if not fence.done():
                fence.set_result(None)
        return True

    async def keep_alive(self, seconds: float) -> None:
        """Ask for a sign of life after so long a silence, and end the link without one."""
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            await asyncio.sleep(seconds)
            if self.link.heard_at > asked:
                continue
            try:
                async with asyncio.timeout(seconds / 2):
                    await self.confirm()
            except TimeoutError:
                self.link.fail(ConnectionError(f"no sign of life for {1.5 * seconds:g} s"))
                return
            except NotConnected:
                return

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run *work* beside; it ends with the session."""
        task = asyncio.create_task(work, name=f"pubsub messagebus {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def end(self) -> None:
        """End it for everybody who waits; the link is left alone."""
        self.over = True
        self.online = False
        fences = list(self._fences.values())
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
        """Make the error for what came too late."""
        return not_connected(self._address, self._backend)


def not_connected(address: Address, backend: str) -> NotConnected:
    """Make the error for what needs a session."""
    return NotConnected(
        f"no session with {address}", hint="wait until the bus is online", backend=backend
    )
