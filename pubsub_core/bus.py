"""The bus: publishing and subscribing, with any broker.

Configuration says which backend a bus uses; what runs inside an open bus is in
`pubsub_core._runtime`.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import os
from collections.abc import (
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast, overload

from ._runtime.buffer import SubscriptionSettings
from ._runtime.delivery import Subscriber
from ._runtime.engine import Engine
from ._runtime.hub import EventHub
from ._runtime.publisher import checked_headers
from ._runtime.questions import Answerer, entitlements_of
from ._runtime.views import NotificationsView, PresenceView, View
from .authorization import AuthorizationHandler, Authorizer
from .capabilities import Cap, ConfirmedBy, Guarantees, Limits, Support, effective
from .clock import Clock, SystemClock
from .config import BusConfig, Config
from .config.bus_options import BusOptions
from .config.options import field_types, unknown_option
from .errors import (
    BadOption,
    BadType,
    BusClosed,
    ConfigError,
    HandlerFailed,
    NotConnected,
    NotSupported,
    OperationTimeout,
    PubSubError,
    WrongLoop,
)
from .events import Status, StatusChanged
from .eventstream import EventStream
from .interest import Notifications, Presence
from .interfaces import (
    AuthorizationRequest,
    BackendInfo,
    Everything,
    HasHistory,
    HasPresence,
    HasRetained,
    HasUnicast,
    HistoryQuery,
    WatchKind,
)
from .message import InFrame, Member, Message, Part, Receipt
from .middleware import (
    Context,
    Direction,
    Middleware,
)
from .plugins import registry
from .stats import BusStats
from .subscription import SubscribeOptions, Subscription, check_number
from .threads import in_thread
from .topics import parse_filter, validate_topic

__all__ = ["Bus", "connect"]

T = TypeVar("T")
N = TypeVar("N")

logger = logging.getLogger("pubsub_core")

# The function that asyncio documents for libraries; it returns None outside of a loop.
_running_loop = asyncio._get_running_loop  # noqa: SLF001


class _Forks:
    """Counts forks, so that a bus can tell that it is in a child process."""

    count = 0

    @classmethod
    def forked(cls) -> None:
        cls.count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Forks.forked)


def connect(
    where: str,
    /,
    *,
    require: Iterable[Cap] = (),
    clock: Clock | None = None,
    config: Config | None = None,
    **options: Any,
) -> Bus:
    """Return a bus; ``async with`` it or ``await`` it to open it.

    Args:
        where: Name of a bus in ``pubsub.toml``, or a URL such as ``memory://``.
        require: Capabilities without which opening fails, before any traffic.
        clock: For tests: a clock instead of the machine's.
        config: A configuration instead of the one that is found.
        options: Options of the bus (`BusOptions`) or of its backend; they win over every
            other source.

    Raises:
        BadOption: Neither a bus nor the backend has an option of that name. Values are
            checked when the bus is opened.

    Example:
        >>> async def main() -> None:
        ...     async with connect("memory://") as bus:
        ...         async with bus.subscribe("lab/+/temp", float) as temperatures:
        ...             await bus.publish("lab/oven/temp", 81.5)
        ...             print((await temperatures.get(timeout=1)).payload)
        >>> asyncio.run(main())
        81.5
    """
    return Bus(where, require=require, clock=clock, config=config, options=options)


class Bus:
    """A connection to one broker. Made by `connect`; belongs to the event loop that opens it.

    Every method may be called from any task of that loop, handlers included. Use
    `pubsub_core.sync` from other threads.
    """

    def __init__(
        self,
        where: str,
        *,
        require: Iterable[Cap] = (),
        clock: Clock | None = None,
        config: Config | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(where, str):  # pyright: ignore[reportUnnecessaryIsInstance] # callers without types
            raise BadType(
                f"connect() takes a URL or the name of a bus, not {where!r:.40}",
                hint='write connect("mqtt://localhost")',
            )
        self._where = where
        self._require = frozenset(map(_known_cap, require))
        self.clock: Clock = clock or SystemClock()
        self._config = config
        self._overrides = dict(options or {})
        _check_names(where, self._overrides)
        self._resolved: BusConfig | None = None
        self._hub = EventHub()
        self._middleware: list[Middleware] = []
        self._listeners: list[Callable[[HandlerFailed], None]] = []
        self._open_engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _Forks.count
        self._accepting = False
        self._closing: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, Bus]:
        return self._opened().__await__()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _opened(self) -> Bus:
        await self.open()
        return self

    async def open(self) -> None:
        """Connect, as patiently as the option ``wait`` says.

        Raises:
            ConfigError: The bus, its options or its backend are wrong.
            ConnectError: There is no session.
            NotSupported: A required capability is missing; all that are missing are named.
            BusClosed: It was closed before; make a new one.
        """
        if self.status is not Status.NEW:
            if self.status in (Status.CLOSING, Status.CLOSED):
                raise self._closed_error()
            raise ConfigError(f"bus {self.name!r} is open already")
        self._loop = asyncio.get_running_loop()
        self._forks = _Forks.count
        try:
            # Configuration may read files and run commands for secrets; a backend may
            # import a large library.
            config = await in_thread(self._resolve, name="pubsub-config")
            backend_class = await in_thread(
                lambda: registry().load(config.info), name="pubsub-load"
            )
            self._open_engine = Engine(
                config,
                backend_class,
                registry(),
                self.clock,
                self._hub,
                self._middleware,
                self._listeners,
                self,
            )
            self._accepting = True
            await self._open_engine.start(self._require)
        except BaseException:
            await self.close(drain=0.0)
            raise

    async def close(self, *, drain: float | None = None) -> None:
        """End the bus: handlers finish, publishes end, the session is closed. Idempotent.

        Iterators end; handlers get *drain* seconds (the option ``drain`` by default) for
        buffered messages, then they are cancelled. Never raises for a dead link, and may be
        called from a handler, which is then left to finish by itself.
        """
        if self._loop is None:  # never opened
            self._hub.put(StatusChanged(Status.CLOSED))
            return
        self._check_loop()
        if self._closing is None:
            self._closing = asyncio.create_task(
                self._close(drain, asyncio.current_task()), name=f"pubsub close {self.name}"
            )
        await asyncio.shield(self._closing)

    async def _close(self, drain: float | None, caller: asyncio.Task[Any] | None) -> None:
        engine = self._open_engine
        if engine is None:
            self._hub.put(StatusChanged(Status.CLOSED))
        else:
            seconds = engine.options.drain if drain is None else drain
            await engine.close(seconds, caller, self._stop_intake)
        self._hub.end()

    def _stop_intake(self) -> None:
        self._accepting = False

    def _resolve(self) -> BusConfig:
        if self._resolved is None:
            config = self._config if self._config is not None else Config.load()
            self._resolved = config.bus(self._where, self._overrides)
        return self._resolved

    # --- what it is --------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<Bus {self.name!r} {self.status.value}>"

    @property
    def name(self) -> str:
        """Name in the configuration; for a URL its scheme, host and port."""
        return self._resolved.name if self._resolved is not None else _shown(self._where)

    @property
    def info(self) -> BackendInfo:
        """The announcement of the backend."""
        return self._resolve().info

    @property
    def status(self) -> Status:
        """Where the bus is in its life."""
        return self._hub.status.status

    @property
    def error(self) -> PubSubError | None:
        """Why the bus is reconnecting or failed, if it is."""
        return self._hub.status.error

    @property
    def capabilities(self) -> Mapping[Cap, Support]:
        """The capabilities of this broker: declared ones, lowered to those the session found."""
        engine = self._open_engine
        return effective(self.info.capabilities, {}) if engine is None else engine.capabilities

    @property
    def guarantees(self) -> Guarantees:
        """The guarantees of this broker."""
        engine = self._open_engine
        return self.info.guarantees if engine is None else engine.backend.guarantees

    @property
    def limits(self) -> Limits:
        """Sizes and rates that are kept here, before anything is sent."""
        engine = self._open_engine
        return self.info.limits if engine is None else engine.publisher.limits

    @property
    def stats(self) -> BusStats:
        """The counters, as they are now."""
        return BusStats() if self._open_engine is None else self._open_engine.stats

    @property
    def options(self) -> BusOptions:
        """The options of the bus, from whatever source they came."""
        return self._resolve().bus

    def supports(self, cap: Cap) -> Support:
        """Return whether this broker can do *cap*, and why not; true when it can."""
        return self.capabilities[_known_cap(cap)]

    def native(self, cls: type[N]) -> N:
        """Return the backend's own client, which must be a *cls*.

        Raises:
            NotSupported: This bus has another backend.
        """
        _check_class(cls)
        native = self._engine.backend.native
        if not isinstance(native, cls):
            raise NotSupported(
                "native",
                why=f"its client is {type(native).__module__}.{type(native).__qualname__}, "
                f"not {cls.__module__}.{cls.__qualname__}",
                backend=self.info.name,
                hint="ask for the class of this backend, or connect to another broker",
            )
        return native

    # --- publishing --------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        payload: Any = b"",
        *,
        qos: int | None = None,
        retain: bool | None = None,
        ttl: float | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        content_type: str | None = None,
        codec: str | None = None,
        confirm: ConfirmedBy | str | None = None,
        timeout: float | None = None,
        parts: Sequence[Part] | None = None,
    ) -> Receipt:
        """Publish one message and return a receipt, which says no more than is known.

        Args:
            topic: Where to; no wildcards.
            payload: bytes go as they are, text as UTF-8, anything else through the codec.
            qos: 0, 1 or 2; the bus's default otherwise.
            retain: Keep it as the topic's last value (capability ``retained``).
            ttl: Seconds after which it may be forgotten (capability ``ttl``).
            headers: Names and values beside the payload (capability ``headers``).
            content_type: Media type (capability ``content_type``).
            codec: Name of a codec, for this message.
            confirm: The least confirmation that counts as success; ``nobody`` returns as
                soon as a message is in the offline buffer.
            timeout: Deadline in seconds; the bus's default otherwise.
            parts: Parts with entitlements instead of a payload (capability
                ``entitlements``).

        Raises:
            PublishFailed: With `outcome`; its subclasses say more.
            NotConnected: There is no session and the offline policy is ``raise``.
            InvalidTopic: The topic is not one, or this broker cannot carry it.
            EncodeFailed: The payload does not fit its codec.
            NotSupported: The broker lacks a capability that this needs.
        """
        # What `_check_usable` does, without its two calls: this runs once per message.
        if not self._accepting or _running_loop() is not self._loop:
            self._check_usable()
        engine = self._open_engine or self._engine
        if engine.publish_chain is not None:
            given_headers = checked_headers(headers or ())
            context = Context(
                direction=Direction.PUBLISH,
                topic=topic,
                payload=payload,
                headers=dict(given_headers),
                given_headers=given_headers,
                options={
                    "qos": qos,
                    "retain": retain,
                    "ttl": ttl,
                    "content_type": content_type,
                    "codec": codec,
                    "confirm": confirm,
                    "timeout": timeout,
                    "parts": parts,
                },
                bus=self,
            )
            return cast("Receipt", await engine.publish_chain(context))
        publisher = engine.publisher
        out = publisher.frame(
            topic,
            payload,
            qos=qos,
            retain=retain,
            ttl=ttl,
            headers=headers,
            content_type=content_type,
            codec=codec,
            parts=parts,
        )
        if confirm is not None:
            return await publisher.send(out, timeout, confirm)
        # Where nothing has to wait, no further coroutine is made: that is half of the time.
        receipt = publisher.send_now(out)
        return receipt if receipt is not None else await publisher.send_later(out, timeout, None)

    async def publish_many(
        self, items: Iterable[tuple[str, Any]], **options: Any
    ) -> list[Receipt | PubSubError]:
        """Publish several messages at once; each has its own result, in the same order.

        One that fails does not stop the others. *options* are those of `publish`.
        """
        results = await asyncio.gather(
            *(self.publish(topic, payload, **options) for topic, payload in items),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, PubSubError):
                raise result
        return cast("list[Receipt | PubSubError]", results)

    async def send_to(
        self,
        member: Member | str,
        topic: str,
        payload: Any = b"",
        *,
        qos: int | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        content_type: str | None = None,
        codec: str | None = None,
        timeout: float | None = None,
        parts: Sequence[Part] | None = None,
    ) -> Receipt:
        """Send to one member, which must be subscribed to *topic* (capability ``unicast``).

        Members come from presence and notifications. Arguments and errors as `publish`.
        """
        self._check_usable()
        engine = self._engine
        engine.publisher.need(Cap.UNICAST)
        out = engine.publisher.frame(
            topic,
            payload,
            qos=qos,
            headers=headers,
            content_type=content_type,
            codec=codec,
            parts=parts,
        )
        identity = member.id if isinstance(member, Member) else member
        if not isinstance(identity, str):  # pyright: ignore[reportUnnecessaryIsInstance] # callers without types
            raise BadType(f"member={member!r:.40}", hint="pass a Member or its id", option="member")
        check_number("timeout", timeout)
        backend = cast("HasUnicast", engine.backend)
        patience = engine.options.timeout if timeout is None else timeout

        async def send() -> Receipt:
            await engine.publisher.pace(topic, patience)
            return await backend.send_to(identity, out)

        return await engine.publisher.counted(
            engine.request(send, f"sending to a member of {topic!r}", timeout)
        )

    async def clear(self, topic: str) -> Receipt:
        """Forget the retained value of *topic* (capability ``retained``)."""
        return await self.publish(topic, b"", retain=True)

    # --- subscribing -------------------------------------------------------------------

    @overload
    def subscribe(
        self, filter: str, **options: Unpack[SubscribeOptions]
    ) -> Subscription[bytes]: ...

    @overload
    def subscribe(
        self, filter: str, type: type[T], **options: Unpack[SubscribeOptions]
    ) -> Subscription[T]: ...

    def subscribe(
        self, filter: str, type: Any = bytes, **options: Unpack[SubscribeOptions]
    ) -> Subscription[Any]:
        """Subscribe; ``async with`` or ``await`` the result, which confirms it at the broker.

        Args:
            filter: Topic filter: ``+`` one level, ``#`` this level's parent and all below,
                ``{name}`` and ``{name:path}`` the same two, captured in ``message.params``.
            type: Type that payloads are decoded to; bytes by default.
            options: Those of `SubscribeOptions`: ``handler``, ``group``, ``qos``, ``buffer``,
                ``buffer_bytes``, ``overflow``, ``ack``, ``replay``, ``gaps``, ``codec``,
                ``on_decode_error`` and ``dead_letter``.

        Raises:
            InvalidFilter: The filter is not one.
            NotSupported: The broker lacks a capability that this needs.
            BadOption: There is no such option.
        """
        self._check_usable()
        if self.status in (Status.CLOSING, Status.CLOSED):
            raise self._closed_error()
        engine = self._engine
        settings = SubscriptionSettings.of(options, engine.options)
        parsed = parse_filter(filter)
        engine.publisher.check_filter(parsed.filter)
        if parsed.filter != parsed.text or "+" in parsed.filter or "#" in parsed.filter:
            engine.need(Cap.WILDCARDS)
        if settings.group is not None:
            engine.need(Cap.GROUPS)
        if settings.ack == "manual":
            engine.need(Cap.ACK)
        if settings.replay is not None:
            engine.need(Cap.REPLAY)
        if settings.overflow == "block":
            engine.need(Cap.FLOW_CONTROL)
        handler = options.get("handler")
        if handler is not None and not callable(handler):
            raise BadType(
                f"handler={handler!r}", hint="pass a function, async or plain", option="handler"
            )
        codec = options.get("codec")
        return Subscriber(
            engine,
            parsed,
            settings,
            decoder=engine.codecs.decoder(type, filter=parsed.filter, codec=codec),
            handler=handler,
            start=self._attach,
            stop=engine.subscriptions.detach,
        ).handle()

    async def _attach(self, subscriber: Subscriber) -> None:
        self._check_usable()
        await self._engine.subscriptions.attach(subscriber)

    # --- stored messages ---------------------------------------------------------------

    @overload
    def history(
        self,
        filter: str,
        *,
        last: int | None = None,
        since: float | None = None,
        until: float | None = None,
        codec: str | None = None,
    ) -> AsyncIterator[Message[bytes]]: ...

    @overload
    def history(
        self,
        filter: str,
        type: type[T],
        *,
        last: int | None = None,
        since: float | None = None,
        until: float | None = None,
        codec: str | None = None,
    ) -> AsyncIterator[Message[T]]: ...

    def history(
        self,
        filter: str,
        type: Any = bytes,
        *,
        last: int | None = None,
        since: float | None = None,
        until: float | None = None,
        codec: str | None = None,
    ) -> AsyncIterator[Message[Any]]:
        """Yield stored messages, oldest first (capability ``history``).

        Args:
            filter: Topic filter.
            type: Type that payloads are decoded to; bytes by default.
            last: At most that many, the newest ones.
            since: Unix seconds, inclusive.
            until: Unix seconds, inclusive.
            codec: Name of a codec.
        """
        self._check_usable()
        self._engine.need(Cap.HISTORY)
        parsed = parse_filter(filter)
        decoder = self._engine.codecs.decoder(type, filter=parsed.filter, codec=codec)
        for name, value in (("last", last), ("since", since), ("until", until)):
            check_number(name, value)
        if last is not None and last < 0:
            raise BadOption(f"last={last}", hint="pass 0 or more, or None for all", option="last")
        query = HistoryQuery(last=last, since=since, until=until)

        async def messages() -> AsyncIterator[Message[Any]]:
            async for frame in self._stored(parsed.filter, query):
                yield _decoded(frame, decoder, parsed.params(frame.topic))

        return messages()

    async def _stored(self, filter: str, query: HistoryQuery) -> AsyncIterator[InFrame]:
        await self._engine.request(_nothing, f"asking for the history of {filter!r}")
        backend = cast("HasHistory", self._engine.backend)
        async for frame in backend.history(filter, query):
            yield frame

    @overload
    async def last(self, topic: str, *, codec: str | None = None) -> Message[bytes] | None: ...

    @overload
    async def last(
        self, topic: str, type: type[T], *, codec: str | None = None
    ) -> Message[T] | None: ...

    async def last(
        self, topic: str, type: Any = bytes, *, codec: str | None = None
    ) -> Message[Any] | None:
        """Return the retained value of *topic*, or None (capability ``retained``)."""
        self._check_usable()
        validate_topic(topic)
        self._engine.need(Cap.RETAINED)
        backend = self._engine.backend
        if not isinstance(backend, HasRetained):
            raise NotSupported(
                Cap.RETAINED,
                why="the broker gives the last value to new subscriptions only",
                backend=self.info.name,
                hint="subscribe and look at message.origin",
            )
        decoder = self._engine.codecs.decoder(type, filter=topic, codec=codec)
        frame = await self._engine.request(
            lambda: backend.last(topic), f"asking for the last value of {topic!r}"
        )
        return None if frame is None else _decoded(frame, decoder, {})

    # --- interest ----------------------------------------------------------------------

    def presence(self, topic: str) -> Presence:
        """Return who is subscribed to *topic*, kept up to date (capability ``presence``).

        ``async with`` it: entering takes the snapshot, iterating tells the changes.
        """
        self._check_usable()
        self._engine.need(Cap.PRESENCE)
        watch = self._engine.views.watch(WatchKind.PRESENCE, parse_filter(topic).filter)
        return Presence(PresenceView(watch, self._open_view, self._close_view))

    async def members(self, topic: str) -> list[Member]:
        """Return who is subscribed to *topic* now (capability ``presence``)."""
        self._check_usable()
        self._engine.need(Cap.PRESENCE)
        validate_topic(topic)
        backend = cast("HasPresence", self._engine.backend)
        members = await self._engine.request(
            lambda: backend.members(topic), f"asking who is subscribed to {topic!r}"
        )
        return list(members)

    def notifications(self, filter: str) -> Notifications:
        """Return the interest in topics that match *filter* (capability ``notifications``).

        ``async with`` it and iterate: existing interest comes first, then every change.
        """
        self._check_usable()
        self._engine.need(Cap.NOTIFICATIONS)
        watch = self._engine.views.watch(WatchKind.NOTIFICATIONS, parse_filter(filter).filter)
        return Notifications(NotificationsView(watch, self._open_view, self._close_view))

    async def _open_view(self, view: View) -> None:
        self._check_usable()
        await self._engine.request(
            lambda: self._engine.views.open(view), f"watching {view.filter!r}"
        )

    async def _close_view(self, view: View) -> None:
        online = self._engine.session.online
        try:
            async with asyncio.timeout(self._engine.options.timeout):
                await self._engine.views.close(view, online=online)
        except (PubSubError, TimeoutError) as error:
            logger.info("ending the watch on %r: %s", view.filter, error)

    # --- authorization -----------------------------------------------------------------

    def authorize(
        self, filter: str, handler: AuthorizationHandler, *, timeout: float | None = None
    ) -> Authorizer:
        """Decide what other clients may see (capability ``authorization``).

        ``async with`` or ``await`` the result. Of several authorizers whose filters match,
        the first one answers. The broker must allow this client to authorize; one that does
        not, asks nothing.

        Args:
            filter: Which topics it answers for; ``#`` for all that do not begin with ``$``.
            handler: Called with each `AuthorizationRequest`: returns the entitlements that
                the client holds (a set of int), `EVERYTHING` for all parts whatever they
                need, or None for no right at all. An async function, or a plain one, which
                runs in a thread. One that raises, is late or returns anything else is
                answered with a refusal.
            timeout: Seconds that it has; the bus's default otherwise.

        Raises:
            InvalidFilter: The filter is not one.
            NotSupported: The broker asks no client.
        """
        self._check_usable()
        engine = self._engine
        engine.need(Cap.AUTHORIZATION)
        parsed = parse_filter(filter)
        if not callable(handler):
            raise BadType(
                f"handler={handler!r}", hint="pass a function, async or plain", option="handler"
            )
        check_number("timeout", timeout)
        if timeout is not None and timeout <= 0:
            raise BadOption(f"timeout={timeout!r}", hint="pass seconds above 0", option="timeout")
        return Authorizer(
            Answerer(
                engine,
                parsed,
                handler,
                engine.options.timeout if timeout is None else timeout,
                start=self._open_answerer,
                stop=self._close_answerer,
            )
        )

    async def _open_answerer(self, answerer: Answerer) -> None:
        self._check_usable()
        await self._engine.request(
            lambda: self._engine.questions.open(answerer), f"authorizing {answerer.filter!r}"
        )

    async def _close_answerer(self, answerer: Answerer) -> None:
        online = self._engine.session.online
        try:
            async with asyncio.timeout(self._engine.options.timeout):
                await self._engine.questions.close(answerer, online=online)
        except (PubSubError, TimeoutError) as error:
            logger.info("ending the authorizer of %r: %s", answerer.filter, error)

    async def entitle(
        self, request: AuthorizationRequest, entitlements: Iterable[int] | Everything | None
    ) -> None:
        """Change what the client of an earlier *request* may see; None takes every right.

        `EVERYTHING` shows it all parts, whatever they need.

        Takes effect at once, while the client's subscription goes on; a client that has gone
        since is no error.
        """
        self._check_usable()
        self._engine.need(Cap.AUTHORIZATION)
        held = entitlements_of(entitlements)
        await self._engine.request(
            lambda: self._engine.authorize(request, held),
            f"changing who may see {request.topic!r}",
        )

    # --- status, events, middleware ------------------------------------------------------

    def events(self) -> EventStream:
        """Return the events of the bus from now on, beginning with its status."""
        return EventStream(self._hub.queue())

    async def wait_for(self, *statuses: Status, timeout: float | None = None) -> Status:
        """Return when the status is one of *statuses*.

        Raises:
            OperationTimeout: It was not within *timeout* seconds.
            BusClosed: It never will be.
        """
        check_number("timeout", timeout)
        try:
            async with asyncio.timeout(timeout), self.events() as events:
                async for event in events:
                    if isinstance(event, StatusChanged) and event.status in statuses:
                        return event.status
        except TimeoutError as error:
            if timeout is None:
                raise
            raise OperationTimeout(
                f"bus {self.name!r} is {self.status} after {timeout:g} s",
                hint=f"it was to be {' or '.join(statuses)}",
            ) from error
        raise self._closed_error()

    async def ping(self) -> float:
        """Return the seconds of a round trip to the broker (capability ``ping``)."""
        self._check_usable()
        self._engine.need(Cap.PING)
        return await self._engine.request(self._engine.backend.ping, "a ping")

    def use(self, *middleware: Middleware) -> None:
        """Add middleware for both directions; the first one added is the outermost.

        Subscriptions use the middleware that was added before they were entered.
        """
        if self._open_engine is None:
            self._middleware.extend(middleware)
        else:
            self._open_engine.use(*middleware)

    def on_handler_failure(self, listener: Callable[[HandlerFailed], None]) -> None:
        """Call *listener* with each failure of a handler, or of decoding for one."""
        self._listeners.append(listener)

    @contextlib.contextmanager
    def hold_handlers(self) -> Generator[None, None, None]:
        """Let handlers that are subscribed in the block begin when it ends.

        So what one of them publishes finds all of them subscribed. A handler whose buffer is full
        ends the hold, since waiting longer would lose messages.
        """
        run = self._engine.handlers_run
        run.clear()
        try:
            yield
        finally:
            run.set()

    # --- helpers -----------------------------------------------------------------------

    @property
    def _engine(self) -> Engine:
        if self._open_engine is None:
            raise self._not_open()
        return self._open_engine

    def _not_open(self) -> PubSubError:
        if self.status is Status.CLOSED:
            return self._closed_error()
        return NotConnected(
            f"bus {self.name!r} is not open", hint="use `async with connect(...) as bus`"
        )

    def _closed_error(self) -> BusClosed:
        return BusClosed(f"bus {self.name!r} is closed", hint="open a new one with connect()")

    def _check_usable(self) -> None:
        if not self._accepting:
            raise self._not_open() if self._closing is None else self._closed_error()
        self._check_loop()

    def _check_loop(self) -> None:
        if self._forks != _Forks.count:
            raise WrongLoop(
                f"bus {self.name!r} was opened before this process was forked",
                hint="open a bus in the child",
            )
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not self._loop:
            raise WrongLoop(
                f"bus {self.name!r} belongs to another event loop",
                hint="use pubsub_core.sync from other threads, or open a bus in this loop",
            )


async def _nothing() -> None:
    return None


def _decoded(
    frame: InFrame,
    decoder: Callable[[str, bytes, str | None], Any] | None,
    params: Mapping[str, str],
) -> Message[Any]:
    payload: Any = frame.payload
    if decoder is not None:
        payload = decoder(frame.topic, payload, frame.content_type)
    return Message(frame.topic, payload, params, frame)


def _check_names(where: str, options: Mapping[str, Any]) -> None:
    """Raise BadOption for an argument that can be no option, whatever the configuration is."""
    ours = field_types(BusOptions)
    others = [name for name in options if name not in ours]
    if not others:
        return
    plugins = registry()
    scheme, is_url, _ = where.partition("://")
    legal = list(ours)
    if is_url:
        try:
            info = plugins.by_scheme(scheme)
        except PubSubError:
            return  # opening the bus reports the faulty URL
        backend = info.name
        legal = [*field_types(info.options), *legal]
    else:
        # Which backend it is stands in files, which are read when the bus is opened. A plugin
        # that failed to load may have any option.
        if plugins.failures:
            return
        backend = ""
        legal += ["url", *(name for each in plugins.infos for name in field_types(each.options))]
    for name in others:
        if name not in legal:
            raise unknown_option(
                name,
                dict.fromkeys(legal),
                place=f"argument {name}",
                backend=backend,
            )


def _check_class(cls: object) -> None:
    if not isinstance(cls, type):
        raise BadType(f"native({cls!r:.40})", hint="pass the class of the client")


def _known_cap(name: Cap | str) -> Cap:
    try:
        return Cap(name)
    except ValueError:
        near = difflib.get_close_matches(str(name), list(Cap), 1)
        meant = f"did you mean {near[0]!s}? " if near else ""
        raise BadOption(
            f"{name!r} is no capability",
            hint=f"{meant}known: {', '.join(Cap)}",
        ) from None


def _shown(where: str) -> str:
    """Return *where* without the parts of a URL that may be secret."""
    scheme, separator, rest = where.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if separator else where
