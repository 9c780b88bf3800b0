"""The working context of a test of the contract.

A `Trial` is one run of one case against a `Harness`: it opens buses and closes them, gives
unique topics, puts a deadline on every wait, interrupts the session, and notes the errors it
met.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import string
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
)
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from pubsub_core.bus import Bus, connect
from pubsub_core.capabilities import Cap, Support
from pubsub_core.errors import NotSupported, PubSubError
from pubsub_core.interfaces import BackendInfo
from pubsub_core.message import Message
from pubsub_core.subscription import Subscription

from .harness import Harness
from .links import Link, ProxyLink
from .servers import ServerThread
from .terms import Mode, Terms, mode

__all__ = ["Ledger", "Trial"]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


@dataclass
class Ledger:
    """Memory of a test class, from one case to the next."""

    errors: dict[str, PubSubError] = field(default_factory=dict[str, PubSubError])
    support: dict[tuple[Cap, ...], dict[Cap, Support]] = field(
        default_factory=dict[tuple[Cap, ...], dict[Cap, Support]]
    )
    server: ServerThread | None = None
    restarted: bool = False


class Trial:
    """One run of one case.

    Attributes:
        random: Seeded; the seed is printed when the case fails.
        mode: The chosen mode, for cases with large and small numbers.
    """

    def __init__(self, harness: Harness, ledger: Ledger, case: Terms, seed: int) -> None:
        self.harness = harness
        self.ledger = ledger
        self.case = case
        self.seed = seed
        self.random = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.mode = mode()
        self.word = "t" + "".join(self.random.choices(string.ascii_lowercase + "0123456789", k=9))
        self.stack = contextlib.AsyncExitStack()
        self.deadline = harness.deadline * harness.slow
        if harness.prepare is not None:
            harness.prepare(self)

    # --- where -------------------------------------------------------------------------

    @property
    def info(self) -> BackendInfo:
        """The backend's announcement."""
        return self.harness.info

    def topic(self, name: str = "topic") -> str:
        """Return a topic that no other trial uses."""
        return self.harness.unique(self.word, name)

    @property
    def guarded(self) -> str:
        """Topic that needs authorization, and that no other trial uses."""
        return self._filled(self.harness.guarded)

    def count(self, small: int, large: int) -> int:
        """Return *small*, or *large* in the thorough modes."""
        return large if self.mode in (Mode.FULL, Mode.OUTAGE) else small

    def url(
        self, *, link: Link | None = None, port: int | None = None, template: str | None = None
    ) -> str:
        """Return the broker's URL, through *link* or with another *port* where given."""
        text = template if template is not None else self.harness.url
        if port is None and link is not None:
            port = link.port
        if port is None and self.ledger.server is not None:
            port = self.ledger.server.server.port
        text = self._filled(text)
        if "{port}" in text:
            return text.replace("{port}", str(port))
        if port is None:
            return text
        parts = urlsplit(text)
        userinfo, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{userinfo}{at}127.0.0.1:{port}"))

    def _filled(self, value: T) -> T:
        if isinstance(value, str):
            return cast("T", value.replace("{unique}", self.word))
        return value

    # --- buses -------------------------------------------------------------------------

    def options(self, caps: Iterable[Cap] = ()) -> dict[str, Any]:
        """Return the options of every bus, and those that these capabilities need."""
        merged = dict(self.harness.options)
        for cap in caps:
            for name, value in self.harness.options_for.get(cap, {}).items():
                merged[name] = self._filled(value)
        return merged

    def bus(
        self,
        *,
        identity: str | Mapping[str, Any] | None = None,
        link: Link | None = None,
        port: int | None = None,
        query: str = "",
        caps: Iterable[Cap] = (),
        **options: Any,
    ) -> Bus:
        """Return a bus that was not opened yet; it is closed when the trial ends.

        Args:
            identity: URL or options of another user.
            link: The way to the server, instead of straight.
            port: Another port than the server's.
            query: Appended to the URL.
            caps: Capabilities whose `Harness.options_for` this bus gets as well.
            **options: Options of this bus.
        """
        template = identity if isinstance(identity, str) else None
        given = self.options(caps)
        if isinstance(identity, Mapping):
            given.update(identity)
        given.update(options)
        bus = connect(self.url(link=link, port=port, template=template) + query, **given)
        self.stack.push_async_callback(self._close, bus)
        if link is not None:
            link.attach(bus)
        return bus

    async def connect(self, **options: Any) -> Bus:
        """Return an open bus; arguments as those of `bus`."""
        bus = self.bus(**options)
        await self.within(bus.open())
        return bus

    async def subscribed(self, bus: Bus, filter: str, *args: Any, **options: Any) -> Any:
        """Return a subscription that the broker has confirmed."""
        subscription: Subscription[Any] = bus.subscribe(filter, *args, **options)
        await self.within(subscription.__aenter__())
        return subscription

    async def _close(self, bus: Bus) -> None:
        await self.within(bus.close(drain=0.5))

    # --- waiting -----------------------------------------------------------------------

    async def within(self, work: Awaitable[T], seconds: float | None = None) -> T:
        """Wait for *work*, with the deadline of every wait."""
        limit = self.deadline if seconds is None else seconds * self.harness.slow
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                return await work
        except TimeoutError:
            if scope.expired():
                raise AssertionError(f"no end within {limit:g} s: {work!r}") from None
            raise

    async def get(self, subscription: Subscription[T]) -> Message[T]:
        """Return the next message of a subscription."""
        return await self.within(subscription.get())

    async def take(
        self, subscription: Subscription[T], count: int, seconds: float | None = None
    ) -> list[Message[T]]:
        """Return the next *count* messages; failing, tell how many there were."""
        taken: list[Message[T]] = []
        limit = self.deadline if seconds is None else seconds * self.harness.slow
        try:
            async with asyncio.timeout(limit):
                while len(taken) < count:
                    taken.append(await subscription.get())
        except TimeoutError:
            raise AssertionError(
                f"{len(taken)} of {count} messages within {limit:g} s on {subscription!r}"
            ) from None
        return taken

    async def eventually(
        self, check: Callable[[], bool], what: str, seconds: float | None = None
    ) -> None:
        """Wait until *check* holds."""
        limit = self.deadline if seconds is None else seconds * self.harness.slow
        end = time.monotonic() + limit
        while not check():
            if time.monotonic() > end:
                raise AssertionError(f"not within {limit:g} s: {what}")
            await asyncio.sleep(0.002)

    async def until(
        self, value: T, check: Callable[[T], bool], what: str, seconds: float | None = None
    ) -> None:
        """Wait until *check* holds for *value*; for loops, whose variable changes."""
        await self.eventually(lambda: check(value), what, seconds)

    async def all(self, work: Iterable[Awaitable[T]], seconds: float | None = None) -> list[T]:
        """Wait for several things at once."""
        return list(await self.within(asyncio.gather(*work), seconds))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start *work*; it is cancelled when the trial ends."""
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task], timeout=self.deadline)
            if task.done() and not task.cancelled():
                task.exception()

        self.stack.push_async_callback(end)
        return task

    def watch(self, bus: Bus, kind: type[T]) -> list[T]:
        """Return a list that grows by every event of *bus* that is a *kind*."""
        found: list[T] = []
        stream = bus.events()

        async def collect() -> None:
            event: object
            async for event in stream:
                if isinstance(event, kind):
                    found.append(event)  # noqa: PERF401 - it must grow one by one

        self.spawn(collect())
        return found

    # --- errors ------------------------------------------------------------------------

    @contextlib.contextmanager
    def raises(self, *expected: type[E]) -> Generator[list[E], None, None]:
        """Expect one of these errors; the list holds it afterwards.

        Every error of the library that was met so is audited at the end of the suite.
        """
        caught: list[E] = []
        try:
            yield caught
        except expected as error:
            caught.append(error)
            if isinstance(error, PubSubError):
                self.note(error)
        else:
            names = " or ".join(kind.__name__ for kind in expected)
            raise AssertionError(f"nothing was raised; expected {names}")

    def note(self, error: PubSubError) -> None:
        """Keep an error for the audit."""
        self.ledger.errors.setdefault(f"{type(error).__name__}: {error}", error)

    # --- interruptions -----------------------------------------------------------------

    async def link(self) -> Link:
        """Return a way to the broker that can be interrupted."""
        link: Link
        if self.harness.link is not None:
            link = self.harness.link(self)
        elif self.ledger.server is not None:
            link = ProxyLink("127.0.0.1", self.ledger.server.server.port)
        else:
            parts = urlsplit(self._filled(self.harness.url))
            if parts.hostname is None or parts.port is None:
                raise AssertionError("the harness has neither a server, nor a port, nor a link")
            link = ProxyLink(parts.hostname, parts.port)
        await self.within(link.open())
        self.stack.push_async_callback(link.close)
        return link

    @contextlib.asynccontextmanager
    async def outage(self, link: Link) -> AsyncGenerator[None, None]:
        """Take the broker away for the length of the block: restarted where it can be.

        In mode stress other trials use the same server, and only the link goes down.
        """
        server = self.ledger.server
        if self.harness.restart and server is not None and self.mode is not Mode.STRESS:
            self.ledger.restarted = True
            await self.within(server.halt(), 10)
            try:
                yield
            finally:
                await self.within(server.resume(), 15)
        else:
            await self.within(link.down())
            try:
                yield
            finally:
                await self.within(link.up())

    @contextlib.asynccontextmanager
    async def silent_server(self, reply: bytes = b"") -> AsyncGenerator[int, None]:
        """Listen on a port, accept, send *reply* to the first bytes, and say nothing more."""
        writers: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await reader.read(1)
                if reply:
                    writer.write(reply)
                    await writer.drain()
                    writer.close()
                else:
                    while await reader.read(4096):
                        pass

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()
            await self.within(server.wait_closed())

    # --- capabilities ------------------------------------------------------------------

    async def support(self) -> dict[Cap, Support]:
        """Return the support of the open bus, asked once per set of options."""
        key = self.case.caps
        if key not in self.ledger.support:
            bus = await self.connect(caps=key)
            self.ledger.support[key] = {cap: bus.supports(cap) for cap in Cap}
            await self.within(bus.close())
        return self.ledger.support[key]

    def check_refusal(self, error: NotSupported, caps: Collection[Cap]) -> None:
        """Check that a refusal names the capability, the reason and the remedy."""
        self.note(error)
        names = {cap.value for cap in caps}
        assert error.capability in names, f"{error.capability!r} is none of {sorted(names)}"
        assert error.why, f"no reason in {error!r}"
        assert error.hint, f"no remedy in {error!r}"
        assert error.backend == self.info.name, f"backend {error.backend!r} in {error!r}"
