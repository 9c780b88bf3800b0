"""What a backend's tests say of it, and what a test of the contract works with.

A `Harness` is data: where the broker is, how it is started, who may connect. A `Trial` is one
run of one case against it: it opens buses and closes them, gives unique topics, puts a
deadline on every wait, interrupts the session, and afterwards looks for what was left behind.

Every trial has an event loop of its own, made by `asyncio.Runner`; the server has another one,
in a thread, so that it goes on whatever a test does. So the suite needs pytest alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import random
import socket
import string
import threading
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
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from pubsub_core.bus import Bus, connect
from pubsub_core.capabilities import Cap, Level, Support, effective
from pubsub_core.errors import NotSupported, PubSubError
from pubsub_core.events import Status
from pubsub_core.interfaces import BackendInfo, DevServer, SessionFacts, Sink, WireSub
from pubsub_core.memory import Space
from pubsub_core.memory.backend import MemoryBackend
from pubsub_core.message import Message
from pubsub_core.plugins import registry
from pubsub_core.subscription import Subscription

from .case import Case, Mode, Need, mode
from .proxy import FaultProxy

__all__ = [
    "Harness",
    "Ledger",
    "Link",
    "MemoryLink",
    "NativeError",
    "Recorder",
    "ServerThread",
    "Trial",
]

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


@dataclass(frozen=True, slots=True)
class NativeError:
    """What a faulty server answers to the first bytes of a client, and what must come of it.

    Attributes:
        reply: Bytes that the server sends before it closes the connection.
        error: The error that connecting must raise.
        retryable: What the error must say of itself.
        options: Options that this reply needs, e.g. a protocol version.
    """

    name: str
    reply: bytes
    error: type[PubSubError]
    retryable: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Link(Protocol):
    """A way to the broker that can be interrupted."""

    @property
    def port(self) -> int | None:
        """Port to connect to instead of the server's; None to use the server's."""
        ...

    @property
    def swallowed(self) -> int:
        """Bytes that were lost while it was frozen."""
        ...

    async def open(self) -> None:
        """Make it ready."""
        ...

    def attach(self, bus: Bus) -> None:
        """Learn of a bus that goes through the link."""
        ...

    async def cut(self) -> None:
        """End every session that uses the link, without a goodbye. New ones are possible."""
        ...

    async def down(self) -> None:
        """End every session, and let none come up until `up`."""
        ...

    async def up(self) -> None:
        """Let sessions come up again."""
        ...

    async def freeze(self) -> None:
        """Pass nothing on in either direction, and close nothing."""
        ...

    async def thaw(self) -> None:
        """Pass everything on again; what was frozen is lost, the old connections with it."""
        ...

    async def close(self) -> None:
        """Give it up."""
        ...


class ProxyLink:
    """A `FaultProxy` in front of the server."""

    def __init__(self, host: str, port: int) -> None:
        self.proxy = FaultProxy(host, port)

    @property
    def port(self) -> int | None:
        return self.proxy.port

    @property
    def swallowed(self) -> int:
        """Bytes that the black hole took, both ways."""
        return sum(self.proxy.lost.values())

    async def open(self) -> None:
        await self.proxy.start()

    def attach(self, bus: Bus) -> None:
        """Know nothing: the connections pass through here."""

    async def cut(self) -> None:
        await self.proxy.cut()

    async def down(self) -> None:
        self.proxy.refuse(True)
        await self.proxy.cut()

    async def up(self) -> None:
        self.proxy.refuse(False)

    async def freeze(self) -> None:
        self.proxy.blackhole(True)

    async def thaw(self) -> None:
        self.proxy.blackhole(False)

    async def close(self) -> None:
        await self.proxy.stop()


class MemoryLink:
    """What a proxy would be for ``memory://``, as far as there is something to cut."""

    def __init__(self, trial: Trial) -> None:
        self._space = Space.named(trial.word)
        self._buses: list[Bus] = []

    @property
    def swallowed(self) -> int:
        """There is nothing to swallow."""
        return 0

    @property
    def port(self) -> int | None:
        """There is none."""
        return None

    async def open(self) -> None:
        """Let sessions come up."""
        self._space.refuse(False)

    def attach(self, bus: Bus) -> None:
        """Remember the bus: its session is what is cut."""
        self._buses.append(bus)

    async def cut(self) -> None:
        """End the sessions."""
        for bus in self._buses:
            if bus.status is Status.ONLINE:
                bus.native(MemoryBackend).cut(ConnectionResetError("the test cut the session"))

    async def down(self) -> None:
        """End the sessions, and refuse new ones in the whole space."""
        self._space.refuse(True)
        await self.cut()

    async def up(self) -> None:
        """Accept sessions again."""
        self._space.refuse(False)

    async def freeze(self) -> None:
        """Refuse: there is nothing that could fall silent."""
        raise NotImplementedError(Need.WIRE.value)

    async def thaw(self) -> None:
        """Refuse: there is nothing that could fall silent."""
        raise NotImplementedError(Need.WIRE.value)

    async def close(self) -> None:
        """Accept sessions again."""
        self._space.refuse(False)


LinkFactory = Callable[["Trial"], Link]


@dataclass(frozen=True, kw_only=True)
class Harness:
    """How the suite reaches one broker, and what it may expect of it.

    Attributes:
        url: Where the broker is. ``{port}`` becomes the server's port, ``{unique}`` a word
            that no other trial has.
        server: ``module:Class`` of a `DevServer`, started once for the test class; None for a
            broker that is already there.
        server_options: Keyword arguments of that class.
        restart: Whether the server can be restarted on the same port.
        options: Options of every bus.
        options_for: More options, for the one bus of a case that needs a capability (a
            client id and a session that persists, say).
        second_identity: URL or options of another user.
        unprivileged_identity: URL or options of a user who may connect, but neither publish
            nor subscribe to `denied` topics.
        wrong_identity: URL or options that the broker must refuse.
        authorizer_identity: URL or options of a user who may authorize on `guarded`.
        guarded: Topic that needs authorization.
        denied: Topic that the unprivileged identity may not use.
        keepalive: Options that make keepalive as short as it can be, and its seconds.
        rate: Options that limit the rate of publishing, where a limit is not a given.
        in_process: Whether the server runs in this process, so that the memory it takes
            cannot be told from the client's.
        client_modules: Top-level modules of the broker's client library.
        native_type: What `Bus.native` gives, as ``module:Class``; None to skip nothing but
            the positive half of that case.
        native_errors: Replies for the case that plays a faulty server.
        dollar: Whether clients may publish to topics that begin with ``$``.
        lacks: Capabilities that this server lacks although the protocol cannot tell, with
            the reason. Cases that need one are skipped, and say so.
        exempt: Cases that do not hold on this server, by name, with the reason. They are
            listed in `not_applicable` of the test class.
        link: Makes what interrupts sessions; a fault proxy where the URL has a port.
        prepare: Called with each trial before it begins, to set the broker up for it.
        unique: Makes a broker's topic of a name. Brokers that know few topics replace it.
        slow: Factor on every deadline.
        deadline: Seconds that one wait may take, before that factor.
    """

    url: str
    server: str | None = None
    server_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    restart: bool = False
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options_for: Mapping[Cap, Mapping[str, Any]] = field(
        default_factory=dict[Cap, Mapping[str, Any]]
    )
    second_identity: str | Mapping[str, Any] | None = None
    unprivileged_identity: str | Mapping[str, Any] | None = None
    wrong_identity: str | Mapping[str, Any] | None = None
    authorizer_identity: str | Mapping[str, Any] | None = None
    denied: str = "denied/{unique}"
    guarded: str = "guarded/{unique}"
    keepalive: tuple[Mapping[str, Any], float] | None = None
    rate: Mapping[str, Any] | None = None
    in_process: bool = False
    client_modules: tuple[str, ...] = ()
    native_type: str | None = None
    native_errors: tuple[NativeError, ...] = ()
    dollar: bool = True
    lacks: Mapping[Cap, str] = field(default_factory=dict[Cap, str])
    exempt: Mapping[str, str] = field(default_factory=dict[str, str])
    link: LinkFactory | None = None
    prepare: Callable[[Trial], None] | None = None
    unique: Callable[[str, str], str] = lambda prefix, name: f"{prefix}/{name}"
    slow: float = 1.0
    deadline: float = 5.0

    @property
    def scheme(self) -> str:
        """The URL's scheme."""
        return self.url.partition(":")[0]

    @property
    def info(self) -> BackendInfo:
        """What the backend announces."""
        return registry().by_scheme(self.scheme)

    @property
    def has_wire(self) -> bool:
        """Whether there is a TCP connection that a proxy can stand in."""
        return "{port}" in self.url or urlsplit(self.url).port is not None

    def missing(self, case: Case) -> str | None:
        """Return why *case* is not applicable, or None when it is."""
        if case.name in self.exempt:
            return self.exempt[case.name]
        declared = effective(self.info.capabilities, {})
        if any(is_missing(declared[cap]) for cap in case.caps):
            return None  # turned round, which needs nothing
        for need in case.needs:
            if not self._has(need):
                return need.value
        return None

    def _has(self, need: Need) -> bool:
        match need:
            case Need.CUT:
                return self.link is not None or self.has_wire
            case Need.WIRE:
                return self.has_wire
            case Need.RESTART:
                return self.restart
            case Need.UNPRIVILEGED:
                return self.unprivileged_identity is not None
            case Need.SECOND:
                return self.second_identity is not None
            case Need.AUTHORIZER:
                return self.authorizer_identity is not None
            case Need.BAD_CREDENTIALS:
                return self.wrong_identity is not None
            case Need.KEEPALIVE:
                return self.keepalive is not None
            case Need.CLIENT_LIBRARY:
                return bool(self.client_modules)
            case Need.RATE:
                return self.info.limits.rate is not None or self.rate is not None
            case Need.PAYLOAD_LIMIT:
                return self.info.limits.max_payload is not None
            case Need.DOLLAR:
                return self.dollar
            case Need.NATIVE_ERRORS:
                return bool(self.native_errors)


def load(path: str) -> Any:
    """Return the object that ``module:name`` means."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


_SERVER_DEADLINE = 200.0
"""Seconds that a server may take to start or stop: some are large, or installed first."""


class ServerThread:
    """A development server on an event loop of its own, in a thread.

    A test may block its loop, leave tasks or close it; the server does not notice, and what
    it holds is not mistaken for something the test left behind.
    """

    def __init__(self, server: DevServer) -> None:
        self.server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="conformance-server", daemon=True
        )

    def start(self) -> None:
        """Start thread and server; return once it listens."""
        self._thread.start()
        self._run(self.server.start())

    def stop(self) -> None:
        """Stop both."""
        try:
            self._run(self.server.stop())
            self._run(self._end_tasks())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def halt(self) -> None:
        """Take the server away: killed where it can be, stopped otherwise."""
        kill = getattr(self.server, "kill", None) or self.server.stop
        await self._call(kill())

    async def resume(self) -> None:
        """Bring it back on the same port."""
        await self._call(self.server.start())

    async def _end_tasks(self) -> None:
        # A server that is not ours may leave tasks behind, whose end would be told later.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    async def _call(self, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_SERVER_DEADLINE)


@dataclass
class Ledger:
    """What a test class remembers from one case to the next."""

    errors: dict[str, PubSubError] = field(default_factory=dict[str, PubSubError])
    support: dict[tuple[Cap, ...], dict[Cap, Support]] = field(
        default_factory=dict[tuple[Cap, ...], dict[Cap, Support]]
    )
    server: ServerThread | None = None
    restarted: bool = False


class Recorder:
    """Stands between a bus and its backend, and notes what goes over the wire.

    Attributes:
        subscribed: Every `WireSub` that was sent, in order.
        unsubscribed: Every `WireSub` that was dropped, in order.
        sinks: The sink of each session, in order.
        refuse: Raised instead of opening, while it is set.
        attempts: How often opening was tried.
    """

    def __init__(self, bus: Bus) -> None:
        backend: Any = bus._engine.backend  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - no public way to what is underneath
        self.subscribed: list[WireSub] = []
        self.unsubscribed: list[WireSub] = []
        self.sinks: list[Sink] = []
        self.refuse: BaseException | None = None
        self.attempts = 0
        self._open = backend.open
        self._subscribe = backend.subscribe
        self._unsubscribe = backend.unsubscribe
        backend.open = self._opening
        backend.subscribe = self._subscribing
        backend.unsubscribe = self._unsubscribing

    async def _opening(self, sink: Sink) -> SessionFacts:
        self.attempts += 1
        if self.refuse is not None:
            raise self.refuse
        self.sinks.append(sink)
        facts: SessionFacts = await self._open(sink)
        return facts

    async def _subscribing(self, want: WireSub) -> int:
        self.subscribed.append(want)
        granted: int = await self._subscribe(want)
        return granted

    async def _unsubscribing(self, want: WireSub) -> None:
        self.unsubscribed.append(want)
        await self._unsubscribe(want)


class Trial:
    """One run of one case.

    Attributes:
        random: Seeded; the seed is printed when the case fails.
        mode: The chosen mode, for cases with large and small numbers.
    """

    def __init__(self, harness: Harness, ledger: Ledger, case: Case, seed: int) -> None:
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
        """What the backend announces."""
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
            identity: URL or options of somebody else.
            link: What it goes through instead of straight to the server.
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
        """Return what the open bus supports, asked once per set of options."""
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


# --- what a trial must not leave behind ----------------------------------------------------


def _sockets() -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(entry.readlink())
                if target.startswith(("socket:", "pipe:", "anon_inode:")):
                    found.add(target)
    return found


def resources() -> dict[str, int]:
    """Return how many tasks, threads and descriptors there are now, for comparing."""
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "descriptors": len(_descriptors()),
    }


def _descriptors() -> list[str]:
    try:
        return [entry.name for entry in Path("/proc/self/fd").iterdir()]
    except OSError:
        return []


def resident_bytes() -> int:
    """Return the process's memory in bytes, or 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * 4096


async def perform(trials: list[Trial], work: Callable[[Trial], Awaitable[None]]) -> None:
    """Run *work* once per trial, all at the same time; fail for what is left behind."""
    complaints: list[str] = []

    def complain(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    asyncio.get_running_loop().set_exception_handler(complain)
    before = asyncio.all_tasks()
    if len(trials) == 1:
        await _one(trials[0], work)
    else:
        results = await asyncio.gather(
            *(_one(trial, work) for trial in trials), return_exceptions=True
        )
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            raise failures[0]
        for result in results:
            if result is not None:
                raise result  # pytest's skip is no Exception
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    if left:
        await asyncio.wait(left, timeout=1)
    named = sorted(repr(task) for task in left if not task.done())
    assert not named, f"tasks left behind: {named}"
    assert not complaints, f"reported to the event loop: {complaints}"


async def _one(trial: Trial, work: Callable[[Trial], Awaitable[None]]) -> None:
    limit = trial.case.deadline * trial.harness.slow
    scope = asyncio.timeout(limit)
    try:
        async with scope:
            await work(trial)
    except TimeoutError:
        if scope.expired():
            raise AssertionError(
                f"{trial.case.name} took more than {limit:g} s (seed {trial.seed})"
            ) from None
        raise
    finally:
        await trial.stack.aclose()


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast("int", probe.getsockname()[1])


def run(trials: Callable[[], Awaitable[None]], ledger: Ledger) -> None:
    """Run *trials* on a new event loop, and fail for threads and sockets left behind."""
    ledger.restarted = False
    threads = set(threading.enumerate())
    sockets = _sockets()
    with asyncio.Runner() as runner:
        runner.run(_await(trials))
    end = time.monotonic() + 2
    while True:
        late = [thread.name for thread in set(threading.enumerate()) - threads]
        # A server that was restarted may live in this process and has new sockets.
        opened = set[str]() if ledger.restarted else _sockets() - sockets
        if not late and not opened:
            return
        if time.monotonic() > end:
            break
        gc.collect()
        time.sleep(0.005)
    assert not late, f"threads left behind: {late}"
    assert not opened, f"descriptors left behind: {sorted(opened)}"


async def _await(work: Callable[[], Awaitable[None]]) -> None:
    await work()


def is_missing(support: Support) -> bool:
    """Whether the operation must be refused."""
    return support.level is Level.NONE
