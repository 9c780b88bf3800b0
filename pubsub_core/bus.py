"""The bus: what a program publishes to and subscribes with, whatever the broker is.

A bus ties the rooms together: configuration says which backend, the session engine keeps it
connected, the router brings messages to subscriptions, codecs and middleware shape them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, overload

from .buffer import DecodePolicy, SubscriptionSettings
from .capabilities import Cap, ConfirmedBy, Guarantees, Level, Limits, Support, effective
from .clock import Clock, SystemClock
from .codecs import CodecSet
from .config import BusConfig, Config
from .errors import (
    BadOption,
    BusClosed,
    ConfigError,
    HandlerFailed,
    NotConnected,
    NotSupported,
    OperationTimeout,
    PubSubError,
    WrongLoop,
)
from .events import BusEvent, InterestEvent, Notice, Status, StatusChanged
from .eventstream import EventStream
from .interest import InterestView, Notifications, Presence, Views
from .interfaces import (
    AuthorizationRequest,
    Backend,
    BackendContext,
    BackendInfo,
    HasHistory,
    HasPresence,
    HasRetained,
    HasUnicast,
    HistoryQuery,
    SessionFacts,
    WatchKind,
)
from .message import InFrame, Member, Message, Part, Receipt, Verdict
from .middleware import (
    CallNext,
    Context,
    Direction,
    Middleware,
    builtin_middleware,
    compose,
    dead_letter_headers,
)
from .plugins import Registry, registry
from .publisher import Publisher
from .session import Session
from .settings import BusOptions, OverflowPolicy
from .stats import BusStats
from .subscription import Handler, Subscription
from .threads import in_thread
from .topics import parse_filter, validate_topic
from .wiring import Wiring

if TYPE_CHECKING:
    from collections.abc import Awaitable

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
        self._where = where
        self._require = frozenset(require)
        self.clock: Clock = clock or SystemClock()
        self._config = config
        self._overrides = dict(options or {})
        self._resolved: BusConfig | None = None
        self._registry: Registry | None = None
        self._backend_object: Backend | None = None
        self._session: Session | None = None
        self._codecs = CodecSet()
        self._options = BusOptions()
        self._wiring_object: Wiring | None = None
        self._views_object: Views | None = None
        self._middleware: list[Middleware] = []
        self._publish_chain: CallNext | None = None
        self._capabilities: Mapping[Cap, Support] = {}
        self._publisher_object: Publisher | None = None
        self._streams: list[EventStream] = []
        self._status = StatusChanged(Status.NEW)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forks = _Forks.count
        self._accepting = False
        self._closing: asyncio.Task[None] | None = None
        self._lost_at: float | None = None
        self._failure_listeners: list[Callable[[HandlerFailed], None]] = []
        self.can_nack = False
        self._stats = BusStats()

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
        if self._status.status is not Status.NEW:
            if self._status.status in (Status.CLOSING, Status.CLOSED):
                raise self._closed_error()
            raise ConfigError(f"bus {self.name!r} is open already")
        self._loop = asyncio.get_running_loop()
        self._forks = _Forks.count
        try:
            if self._resolved is None:
                # Configuration may read files and run commands for secrets.
                self._resolved = await in_thread(self._resolve, name="pubsub-config")
            backend_class = await in_thread(self._load, name="pubsub-load")
            self._build(backend_class)
            self._accepting = True
            await self._the_session.start()
            self._check_required()
        except BaseException:
            await self.close(drain=0.0)
            raise

    async def close(self, *, drain: float | None = None) -> None:
        """End the bus: handlers finish, publishes end, the session is closed. Idempotent.

        Iterators end; handlers get *drain* seconds (the option ``drain`` by default) for
        what is buffered, then they are cancelled. Never raises for a dead link, and may be
        called from a handler, which is then left to finish by itself.
        """
        if self._loop is None:  # never opened
            self.note(StatusChanged(Status.CLOSED))
            return
        self._check_loop()
        if self._closing is None:
            seconds = self._options.drain if drain is None else drain
            self._closing = asyncio.create_task(
                self._close(seconds, asyncio.current_task()), name=f"pubsub close {self.name}"
            )
        await asyncio.shield(self._closing)

    async def _close(self, drain: float, caller: asyncio.Task[Any] | None) -> None:
        session = self._session
        if session is None:
            self.note(StatusChanged(Status.CLOSED))
            return
        deadline = asyncio.get_running_loop().time() + drain
        session.closing()
        subscriptions = list(self._wiring.router.subscriptions())
        handlers = {
            subscription.handler_task
            for subscription in subscriptions
            if subscription.handler_task is not None
        } - {caller}
        for subscription in subscriptions:
            if subscription.handler_task is None:
                subscription.abandon()
            else:
                subscription.buffer.finish()
        if handlers:
            await asyncio.wait(handlers, timeout=drain)
        self._accepting = False
        for subscription in subscriptions:
            subscription.abandon()
        self._views.end()
        await asyncio.gather(*(each.stop_handler(caller) for each in subscriptions))
        await self._publisher.drain(deadline - asyncio.get_running_loop().time())
        await session.stop_trying()
        if abandoned := self._publisher.give_up(None):
            logger.warning("bus %r: closed with %d messages not sent", self.name, abandoned)
        try:
            await self._backend.close(drain=max(0.0, deadline - asyncio.get_running_loop().time()))
        except Exception:
            # A dead link must not make closing fail; a defect must not be hidden either.
            logger.exception("bus %r: closing the backend failed", self.name)
        await self._end_tasks(caller)
        session.closed()
        for stream in tuple(self._streams):
            stream.close()

    async def _end_tasks(self, caller: asyncio.Task[Any] | None) -> None:
        tasks = {task for task in self._tasks if not task.done() and task is not caller} - {
            asyncio.current_task()
        }
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _resolve(self) -> BusConfig:
        config = self._config if self._config is not None else Config.load()
        return config.bus(self._where, self._overrides)

    def _load(self) -> type[Backend]:
        self._registry = registry()
        return self._registry.load(self.info)

    def _build(self, backend_class: type[Backend]) -> None:
        resolved = self._resolved
        if resolved is None:
            raise self._not_open()
        options = self._options = resolved.bus
        reg = self._registry or registry()
        self._codecs = CodecSet(options.codec, options.codecs, reg.codecs())
        named = {**builtin_middleware(), **reg.middleware()}
        for name in options.middleware:
            if name not in named:
                raise BadOption(
                    f"no middleware is called {name!r}",
                    option="middleware",
                    hint=f"registered: {', '.join(sorted(named))}",
                )
            self.use(named[name]())
        info = resolved.info
        self._capabilities = effective(info.capabilities, {})
        if not options.echo:
            self._need(Cap.ECHO_CONTROL)
        self._backend_object = backend_class(
            BackendContext(info, resolved.address, resolved.options, self.clock, resolved.name)
        )
        self._session = Session(self._backend_object, options, self.clock, self, resolved.name)
        self._publisher_object = Publisher(
            self._backend_object,
            self._session,
            options,
            self._codecs,
            self.clock,
            self._stats,
            self._need,
            self.spawn,
        )
        self._publisher_object.capabilities = self._capabilities
        self._wiring_object = Wiring(
            self._backend_object, self._session, options, self.clock, self._stats, self
        )
        self._views_object = Views(self._backend_object)

    def _check_required(self) -> None:
        if not self._options.echo:
            self._need(Cap.ECHO_CONTROL)  # once more: the broker at hand may lack it
        missing = [
            cap
            for cap in sorted(self._require | set(self._options.require))
            if not self._capabilities[cap]
        ]
        if missing:
            reasons = ", ".join(
                f"{cap} ({self._capabilities[cap].why or self._capabilities[cap].level})"
                for cap in missing
            )
            raise NotSupported(
                ", ".join(missing),
                why=f"bus {self.name!r} requires what this broker lacks: {reasons}",
                backend=self.info.name,
                alternatives=self._alternatives(*missing),
            )

    # --- what it is --------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<Bus {self.name!r} {self.status.value}>"

    @property
    def name(self) -> str:
        """Name in the configuration; for a URL its scheme, host and port."""
        return self._resolved.name if self._resolved is not None else _shown(self._where)

    @property
    def info(self) -> BackendInfo:
        """What the backend announces."""
        if self._resolved is None:
            self._resolved = self._resolve()
        return self._resolved.info

    @property
    def status(self) -> Status:
        """Where the bus is in its life."""
        return self._status.status

    @property
    def error(self) -> PubSubError | None:
        """Why the bus is reconnecting or failed, if it is."""
        return self._status.error

    @property
    def capabilities(self) -> Mapping[Cap, Support]:
        """What this broker can do: declared, and lowered by what the session found."""
        return self._capabilities or effective(self.info.capabilities, {})

    @property
    def guarantees(self) -> Guarantees:
        """What this broker promises."""
        if self._backend_object is not None:
            return self._backend_object.guarantees
        return self.info.guarantees

    @property
    def limits(self) -> Limits:
        """Sizes and rates that are kept here, before anything is sent."""
        return self.info.limits if self._publisher_object is None else self._publisher.limits

    @property
    def stats(self) -> BusStats:
        """The counters, as they are now."""
        router = None if self._wiring_object is None else self._wiring_object.router
        publisher = self._publisher_object
        return dataclasses.replace(
            self._stats,
            received=0 if router is None else router.received,
            unrouted=0 if router is None else router.unrouted,
            offline=0 if publisher is None else publisher.waiting,
            dropped=self._stats.dropped + (0 if publisher is None else publisher.displaced),
        )

    def supports(self, cap: Cap) -> Support:
        """Return whether this broker can do *cap*, and why not; true when it can."""
        return self.capabilities[Cap(cap)]

    def native(self, cls: type[N]) -> N:
        """Return the backend's own client, which must be a *cls*.

        Raises:
            NotSupported: This bus has another backend.
        """
        native = self._backend.native
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
        """Publish one message and return what is known about it.

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
            NotSupported: The broker lacks what was asked for.
        """
        # What `_check_usable` does, without its two calls: this runs once per message.
        if not self._accepting or _running_loop() is not self._loop:
            self._check_usable()
        if self._publish_chain is not None:
            context = Context(
                direction=Direction.PUBLISH,
                topic=topic,
                payload=payload,
                headers=dict(headers or {}),
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
            return cast("Receipt", await self._publish_chain(context))
        publisher = self._publisher_object or self._publisher
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
        receipt = publisher.send_now(out) if confirm is None else None
        return await publisher.send(out, timeout, confirm) if receipt is None else receipt

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
        self._need(Cap.UNICAST)
        out = self._publisher.frame(
            topic,
            payload,
            qos=qos,
            headers=headers,
            content_type=content_type,
            codec=codec,
            parts=parts,
        )
        identity = member.id if isinstance(member, Member) else member
        backend = cast("HasUnicast", self._backend)
        return await self._request(
            lambda: backend.send_to(identity, out), f"sending to a member of {topic!r}", timeout
        )

    async def clear(self, topic: str) -> Receipt:
        """Forget the retained value of *topic* (capability ``retained``)."""
        return await self.publish(topic, b"", retain=True)

    # --- subscribing -------------------------------------------------------------------

    @overload
    def subscribe(
        self,
        filter: str,
        *,
        handler: Handler | None = None,
        group: str | None = None,
        qos: int | None = None,
        buffer: int | None = None,
        buffer_bytes: int | None = None,
        overflow: OverflowPolicy | None = None,
        ack: Literal["auto", "manual"] = "auto",
        replay: int | HistoryQuery | None = None,
        gaps: bool = False,
        codec: str | None = None,
        on_decode_error: DecodePolicy = "raise",
        dead_letter: str | None = None,
    ) -> Subscription[bytes]: ...

    @overload
    def subscribe(
        self,
        filter: str,
        type: type[T],
        *,
        handler: Handler | None = None,
        group: str | None = None,
        qos: int | None = None,
        buffer: int | None = None,
        buffer_bytes: int | None = None,
        overflow: OverflowPolicy | None = None,
        ack: Literal["auto", "manual"] = "auto",
        replay: int | HistoryQuery | None = None,
        gaps: bool = False,
        codec: str | None = None,
        on_decode_error: DecodePolicy = "raise",
        dead_letter: str | None = None,
    ) -> Subscription[T]: ...

    def subscribe(
        self,
        filter: str,
        type: Any = bytes,
        *,
        handler: Handler | None = None,
        group: str | None = None,
        qos: int | None = None,
        buffer: int | None = None,
        buffer_bytes: int | None = None,
        overflow: OverflowPolicy | None = None,
        ack: Literal["auto", "manual"] = "auto",
        replay: int | HistoryQuery | None = None,
        gaps: bool = False,
        codec: str | None = None,
        on_decode_error: DecodePolicy = "raise",
        dead_letter: str | None = None,
    ) -> Subscription[Any]:
        """Subscribe; ``async with`` or ``await`` the result, which confirms it at the broker.

        Args:
            filter: Topic filter: ``+`` one level, ``#`` this level's parent and all below,
                ``{name}`` and ``{name:path}`` the same two, captured in ``message.params``.
            type: What payloads are decoded to; bytes by default.
            handler: Called with each message instead of iterating: an async function, or a
                plain one, which runs in a thread. What it raises is logged and counted.
            group: Share group: each message goes to one of its members.
            qos: Highest quality of service to receive with.
            buffer: Most messages that wait.
            buffer_bytes: Most payload bytes that wait.
            overflow: ``drop_oldest``, ``drop_newest``, ``latest`` (only the newest of each
                topic waits), ``error`` (the subscription ends) or ``block`` (the broker
                waits, capability ``flow_control``).
            ack: ``manual`` leaves acknowledging to `Message.ack`; otherwise a message counts
                as handled when the handler returns, or when the next one is asked for.
            replay: Begin with so many stored messages (capability ``replay``).
            gaps: Let each hole appear in the stream as a `Gap`.
            codec: Name of a codec for this subscription.
            on_decode_error: ``raise`` (from the iterator; handlers log), ``skip`` or
                ``dead_letter``.
            dead_letter: Topic for messages that could not be decoded or whose handler
                raised.

        Raises:
            InvalidFilter: The filter is not one.
            NotSupported: The broker lacks what was asked for.
        """
        self._check_usable()
        if self.status in (Status.CLOSING, Status.CLOSED):
            raise self._closed_error()
        parsed = parse_filter(filter)
        self._publisher.check_name(parsed.filter)
        if parsed.filter != parsed.text or "+" in parsed.filter or "#" in parsed.filter:
            self._need(Cap.WILDCARDS)
        if group is not None:
            self._need(Cap.GROUPS)
            _check_group(group)
        if ack == "manual":
            self._need(Cap.ACK)
        elif ack != "auto":
            raise ValueError(f"ack={ack!r}; pass 'auto' or 'manual'")
        if replay is not None:
            self._need(Cap.REPLAY)
        if qos is not None and qos not in (0, 1, 2):
            raise ValueError(f"qos={qos!r}; pass 0, 1 or 2")
        if dead_letter is not None:
            validate_topic(dead_letter)
        options = self._options
        settings = SubscriptionSettings(
            buffer=options.buffer if buffer is None else buffer,
            buffer_bytes=options.buffer_bytes if buffer_bytes is None else buffer_bytes,
            overflow=options.overflow if overflow is None else overflow,
            ack=ack,
            gaps=gaps,
            on_decode_error=on_decode_error,
            dead_letter=dead_letter,
        )
        settings.check()
        if settings.overflow == "block":
            self._need(Cap.FLOW_CONTROL)
        query = HistoryQuery(last=replay) if isinstance(replay, int) else replay
        wiring = self._wiring
        return Subscription(
            self,
            parsed,
            group=group,
            qos=options.qos if qos is None else qos,
            settings=settings,
            decoder=self._codecs.decoder(type, filter=parsed.filter, codec=codec),
            handler=handler,
            start=lambda subscription: self._attach(subscription, query),
            stop=wiring.detach,
        )

    async def _attach(self, subscription: Subscription[Any], replay: HistoryQuery | None) -> None:
        self._check_usable()
        await self._wiring.attach(subscription, replay)

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
            type: What payloads are decoded to.
            last: At most that many, the newest ones.
            since: Unix seconds, inclusive.
            until: Unix seconds, inclusive.
            codec: Name of a codec.
        """
        self._check_usable()
        self._need(Cap.HISTORY)
        parsed = parse_filter(filter)
        decoder = self._codecs.decoder(type, filter=parsed.filter, codec=codec)
        if last is not None and last < 0:
            raise ValueError(f"last={last}; pass 0 or more, or None for all")
        query = HistoryQuery(last=last, since=since, until=until)

        async def messages() -> AsyncIterator[Message[Any]]:
            async for frame in self._stored(parsed.filter, query):
                yield _decoded(frame, decoder, parsed.params(frame.topic))

        return messages()

    async def _stored(self, filter: str, query: HistoryQuery) -> AsyncIterator[InFrame]:
        await self._request(_nothing, f"asking for the history of {filter!r}", None)
        backend = cast("HasHistory", self._backend)
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
        self._need(Cap.RETAINED)
        backend = self._backend
        if not isinstance(backend, HasRetained):
            raise NotSupported(
                Cap.RETAINED,
                why="the broker gives the last value to new subscriptions only",
                backend=self.info.name,
                hint="subscribe and look at message.origin",
            )
        decoder = self._codecs.decoder(type, filter=topic, codec=codec)
        frame = await self._request(
            lambda: backend.last(topic), f"asking for the last value of {topic!r}", None
        )
        return None if frame is None else _decoded(frame, decoder, {})

    # --- interest ----------------------------------------------------------------------

    def presence(self, topic: str) -> Presence:
        """Return who is subscribed to *topic*, kept up to date (capability ``presence``).

        ``async with`` it: entering takes the snapshot, iterating tells the changes.
        """
        self._check_usable()
        self._need(Cap.PRESENCE)
        watch = self._views.watch(WatchKind.PRESENCE, parse_filter(topic).filter)
        return Presence(watch, self._open_view, self._close_view)

    async def members(self, topic: str) -> list[Member]:
        """Return who is subscribed to *topic* now (capability ``presence``)."""
        self._check_usable()
        self._need(Cap.PRESENCE)
        backend = cast("HasPresence", self._backend)
        members = await self._request(
            lambda: backend.members(topic), f"asking who is subscribed to {topic!r}", None
        )
        return list(members)

    def notifications(self, filter: str) -> Notifications:
        """Return who subscribes to what matches *filter* (capability ``notifications``).

        ``async with`` it and iterate: existing interest comes first, then every change.
        """
        self._check_usable()
        self._need(Cap.NOTIFICATIONS)
        watch = self._views.watch(WatchKind.NOTIFICATIONS, parse_filter(filter).filter)
        return Notifications(watch, self._open_view, self._close_view)

    async def _open_view(self, view: InterestView) -> None:
        self._check_usable()
        await self._request(lambda: self._views.open(view), f"watching {view.watch.filter!r}", None)

    async def _close_view(self, view: InterestView) -> None:
        online = self._the_session.online
        try:
            async with asyncio.timeout(self._options.timeout):
                await self._views.close(view, online=online)
        except (PubSubError, TimeoutError) as error:
            logger.info("ending the watch on %r: %s", view.watch.filter, error)

    # --- status, events, middleware ------------------------------------------------------

    def events(self) -> EventStream:
        """Return what happens to the bus from now on, beginning with its status."""
        stream = EventStream(self._status, self._forget)
        if self.status is Status.CLOSED:
            stream.close()
        else:
            self._streams.append(stream)
        return stream

    async def wait_for(self, *statuses: Status, timeout: float | None = None) -> Status:
        """Return when the status is one of *statuses*.

        Raises:
            TimeoutError: It was not within *timeout* seconds.
            BusClosed: It never will be.
        """
        async with asyncio.timeout(timeout), self.events() as events:
            async for event in events:
                if isinstance(event, StatusChanged) and event.status in statuses:
                    return event.status
        raise self._closed_error()

    async def ping(self) -> float:
        """Return the seconds of a round trip to the broker (capability ``ping``)."""
        self._check_usable()
        self._need(Cap.PING)
        return await self._request(self._backend.ping, "a ping", None)

    def use(self, *middleware: Middleware) -> None:
        """Add middleware for both directions; the first one added is the outermost.

        Subscriptions use what was added before they were entered.
        """
        self._middleware.extend(middleware)
        self._publish_chain = compose(self._middleware, self._publish_terminal)

    async def _publish_terminal(self, context: Context) -> Receipt:
        options = dict(context.options)
        timeout, confirm = options.pop("timeout", None), options.pop("confirm", None)
        out = self._publisher.frame(
            context.topic, context.payload, headers=context.headers or None, **options
        )
        return await self._publisher.send(out, timeout, confirm)

    # --- what subscriptions ask of their bus ---------------------------------------------

    def receive_chain(self, terminal: CallNext) -> CallNext | None:
        """Return the middleware around *terminal*, or None where there is none."""
        return compose(self._middleware, terminal) if self._middleware else None

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run *work* in a task that the bus ends when it is closed."""
        task = asyncio.create_task(work, name=f"pubsub {self.name} {name}")
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def on_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call *function* on the bus's loop: now, if this is it."""
        loop = self._loop
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is loop:
            function(*arguments)
        elif loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *arguments)

    def check_verdict(self, verdict: Verdict) -> None:
        """Raise NotSupported for a verdict that the broker cannot follow."""
        if verdict is Verdict.NACK:
            self._need(Cap.NACK)
        elif verdict is Verdict.REJECT:
            self._need(Cap.ACK)

    def pause(self, subscription: Subscription[Any]) -> None:
        """Hold the broker back until *subscription* has room."""
        self._wiring.pause(subscription)

    def unpause(self, subscription: Subscription[Any]) -> None:
        """Say that *subscription* has room again."""
        self._wiring.unpause(subscription)

    def can(self, cap: Cap) -> bool:
        """Whether the session at hand has *cap*."""
        return bool(self._capabilities[cap])

    def dead_letter(self, topic: str, frame: InFrame, error: BaseException) -> None:
        """Publish a message that nobody could handle to *topic*."""
        self._stats.dead_letters += 1
        options: dict[str, Any] = {}
        if self._capabilities[Cap.HEADERS]:
            options["headers"] = dead_letter_headers(frame.topic, error, headers=frame.headers)
        if frame.content_type is not None and self._capabilities[Cap.CONTENT_TYPE]:
            options["content_type"] = frame.content_type

        async def bury() -> None:
            try:
                await self.publish(topic, frame.payload, **options)
            except PubSubError as failure:
                # Its text says it all; the traceback would lead into our own code.
                logger.warning("a dead letter for %r was not published: %s", topic, failure)

        self.spawn(bury(), "dead letter")

    def handler_failed(self, error: HandlerFailed) -> None:
        """Count a failure; with ``strict`` applications it ends the program."""
        self._stats.handler_failures += 1
        for listener in self._failure_listeners:
            listener(error)

    def on_handler_failure(self, listener: Callable[[HandlerFailed], None]) -> None:
        """Call *listener* with each failure of a handler or of decoding for one."""
        self._failure_listeners.append(listener)

    # --- what the session engine asks of its owner ---------------------------------------

    @property
    def route(self) -> Callable[[InFrame], None]:
        """What routes one frame."""
        return self._wiring.router.route

    def interest(self, event: InterestEvent) -> None:
        """Bring a change of interest to the views it is for."""
        self._views.route(event)

    def authorization(self, request: AuthorizationRequest) -> None:
        """Note a question nobody here can answer yet."""
        self.note(Notice("authorization", "a client waits for authorization", topic=request.topic))

    def notice(self, notice: Notice) -> None:
        """Pass a notice on to who listens."""
        self.note(notice)

    def status_changed(self, event: StatusChanged) -> None:
        """Pass a change of status on, and send what waited for a session."""
        if event.status is Status.RECONNECTING and self._lost_at is None:
            self._lost_at = self.clock.time()
            self._views.stale()
        if event.status is Status.ONLINE:
            self._stats.sessions += 1
            self._lost_at = None
            self._publisher.online()
        if event.status is Status.FAILED and event.error is not None:
            self._publisher.give_up(event.error)
            for subscription in self._wiring.router.subscriptions():
                subscription.buffer.fail(event.error)
            self._views.fail(event.error)
        self.note(event)

    async def restore(self, facts: SessionFacts, generation: int) -> None:
        """Bring everything back in a new session; see `SessionOwner`."""
        backend = self._backend
        probed = await backend.probe()
        self._capabilities = effective(self.info.capabilities, probed)
        self._publisher.capabilities = self._capabilities
        self._publisher.set_limits(backend.limits)
        self.can_nack = bool(self._capabilities[Cap.NACK])
        await self._wiring.restore(facts, generation, self._lost_at)
        await self._views.restore()

    # --- helpers -----------------------------------------------------------------------

    @property
    def _backend(self) -> Backend:
        if self._backend_object is None:
            raise self._not_open()
        return self._backend_object

    @property
    def _publisher(self) -> Publisher:
        if self._publisher_object is None:
            raise self._not_open()
        return self._publisher_object

    @property
    def _wiring(self) -> Wiring:
        if self._wiring_object is None:
            raise self._not_open()
        return self._wiring_object

    @property
    def _views(self) -> Views:
        if self._views_object is None:
            raise self._not_open()
        return self._views_object

    @property
    def _the_session(self) -> Session:
        if self._session is None:
            raise self._not_open()
        return self._session

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

    def _need(self, cap: Cap) -> None:
        support = self._capabilities[cap]
        if support.level is Level.NONE:
            raise NotSupported(
                cap,
                why=support.why,
                backend=self.info.name,
                hint=support.remedy,
                alternatives=self._alternatives(cap),
            )

    def _alternatives(self, *caps: Cap) -> tuple[str, ...]:
        reg = self._registry or registry()
        names = [set(reg.alternatives(cap)) for cap in caps]
        return tuple(sorted(set.intersection(*names) - {self.info.name})) if names else ()

    async def _request(
        self, call: Callable[[], Awaitable[T]], what: str, timeout: float | None
    ) -> T:
        """Run one request in a session, within a deadline."""
        seconds = self._options.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                await self._the_session.wait_online()
                return await call()
        except TimeoutError as error:
            if isinstance(error, PubSubError):
                raise
            raise OperationTimeout(
                f"{what}: no answer within {seconds:g} s",
                hint="look at bus.status, or raise the bus's timeout",
                backend=self.info.name,
            ) from error

    def note(self, event: BusEvent) -> None:
        """Tell an event to who listens."""
        if isinstance(event, StatusChanged):
            self._status = event
            logger.debug("bus %r: %s", self.name, event.status.value)
        for stream in tuple(self._streams):
            stream.put(event)

    def _forget(self, stream: EventStream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, PubSubError):
                logger.info("%s: %s", task.get_name(), error)
            else:
                logger.error("%s failed", task.get_name(), exc_info=error)


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


def _check_group(group: str) -> None:
    if not group or any(character in group for character in "/+#\0"):
        raise ValueError(f"group={group!r}; pass a name without / + # and NUL")


def _shown(where: str) -> str:
    """Return *where* without what may be secret in a URL."""
    scheme, separator, rest = where.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if separator else where
