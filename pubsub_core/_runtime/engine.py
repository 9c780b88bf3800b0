"""The engine of one open bus: it opens, closes and owns the parts.

A `Bus` is what a program holds; the engine is what the parts see. The session reports to it,
subscribers and answerers ask it, and it ends everything in order when the bus is closed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar, cast

from pubsub_core.capabilities import Cap, Level, Support, effective
from pubsub_core.clock import Clock
from pubsub_core.codecs import CodecSet
from pubsub_core.config import BusConfig
from pubsub_core.errors import BadOption, HandlerFailed, NotSupported, OperationTimeout, PubSubError
from pubsub_core.events import BusEvent, InterestEvent, Notice, Status, StatusChanged
from pubsub_core.interfaces import (
    AuthorizationRequest,
    Backend,
    BackendContext,
    Entitlements,
    HasAuthorization,
    SessionFacts,
)
from pubsub_core.message import InFrame, Receipt, Verdict
from pubsub_core.middleware import (
    CallNext,
    Context,
    Middleware,
    builtin_middleware,
    compose,
    dead_letter_headers,
)
from pubsub_core.plugins import Registry
from pubsub_core.stats import BusStats

from .broker_subscriptions import BrokerSubscriptions
from .delivery import Subscriber
from .hub import EventHub
from .outage_log import OutageLog
from .publisher import Publisher
from .questions import Questions
from .session import Session
from .views import Views

__all__ = ["Engine"]

T = TypeVar("T")

logger = logging.getLogger("pubsub_core")


class Engine:
    """The parts of one open bus; lives on the event loop that opened it."""

    def __init__(
        self,
        config: BusConfig,
        backend_class: type[Backend],
        registry: Registry,
        clock: Clock,
        hub: EventHub,
        middleware: Iterable[Middleware],
        listeners: list[Callable[[HandlerFailed], None]],
        bus: object,
    ) -> None:
        # Only handed on, to middleware.
        self.bus = bus
        self.name = config.name
        self.info = config.info
        self.options = options = config.bus
        self.clock = clock
        self._registry = registry
        self._hub = hub
        self._listeners = listeners
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lost_at: float | None = None
        self._outages = OutageLog(config.name, str(config.address), clock)
        self._stats = BusStats()
        self._middleware: list[Middleware] = []
        self.publish_chain: CallNext | None = None
        self.codecs = CodecSet(options.codec, options.codecs, registry.codecs())
        self.capabilities: Mapping[Cap, Support] = effective(config.info.capabilities, {})
        self.can_nack = False
        self.handlers_run = asyncio.Event()
        self.handlers_run.set()
        if not options.echo:
            self.need(Cap.ECHO_CONTROL)
        self.use(*self._named(options.middleware), *middleware)
        self.backend = backend_class(
            BackendContext(config.info, config.address, config.options, clock, config.name)
        )
        self.session = Session(self.backend, options, clock, self, config.name)
        self.publisher = Publisher(
            self.backend,
            self.session,
            options,
            self.codecs,
            clock,
            self._stats,
            self.need,
            self.spawn,
        )
        self.publisher.capabilities = self.capabilities
        self.subscriptions = BrokerSubscriptions(
            self.backend, self.session, options, clock, self._stats, self
        )
        self.views = Views(self.backend)
        self.questions = Questions(self.backend)

    def _named(self, names: Iterable[str]) -> list[Middleware]:
        known = {**builtin_middleware(), **self._registry.middleware()}
        for name in names:
            if name not in known:
                raise BadOption(
                    f"no middleware is called {name!r}",
                    option="middleware",
                    hint=f"registered: {', '.join(sorted(known))}",
                )
        return [known[name]() for name in names]

    @property
    def counters(self) -> BusStats:
        """The counters that the parts keep."""
        return self._stats

    @property
    def stats(self) -> BusStats:
        """The counters, as they are now."""
        return dataclasses.replace(
            self._stats,
            received=self.subscriptions.router.received,
            unrouted=self.subscriptions.router.unrouted,
            offline=self.publisher.waiting,
            dropped=self._stats.dropped + self.publisher.displaced,
        )

    # --- life --------------------------------------------------------------------------

    async def start(self, require: Iterable[Cap]) -> None:
        """Make the first session, and check that it has the required capabilities."""
        await self.session.start()
        if not self.options.echo:
            self.need(Cap.ECHO_CONTROL)  # once more: this very broker may lack it
        missing = [
            cap for cap in sorted({*require, *self.options.require}) if not self.capabilities[cap]
        ]
        if missing:
            reasons = ", ".join(
                f"{cap} ({self.capabilities[cap].why or self.capabilities[cap].level})"
                for cap in missing
            )
            raise NotSupported(
                ", ".join(missing),
                why=f"bus {self.name!r} requires what this broker lacks: {reasons}",
                backend=self.info.name,
                alternatives=self._alternatives(*missing),
            )

    async def close(
        self, drain: float, caller: asyncio.Task[Any] | None, stop_intake: Callable[[], None]
    ) -> None:
        """End everything: handlers, publishes, session, tasks, in that order.

        Args:
            drain: Seconds for what is under way.
            caller: The task that closes; it is not waited for.
            stop_intake: Called once handlers are done: until then they may publish.
        """
        session = self.session
        deadline = self._loop.time() + drain
        session.closing()
        subscribers = list(self.subscriptions.router.subscribers())
        handlers = {
            subscriber.handler_task
            for subscriber in subscribers
            if subscriber.handler_task is not None
        } - {caller}
        for subscriber in subscribers:
            if subscriber.handler_task is None:
                subscriber.abandon()
            else:
                subscriber.buffer.finish()
        if handlers:
            await asyncio.wait(handlers, timeout=drain)
        stop_intake()
        for subscriber in subscribers:
            subscriber.abandon()
        self.views.end()
        await self.questions.end(caller)
        await asyncio.gather(*(each.stop_handler(caller) for each in subscribers))
        await self.publisher.drain(deadline - self._loop.time())
        await session.stop_trying()
        if abandoned := self.publisher.give_up(None):
            logger.warning("bus %r: closed with %d messages not sent", self.name, abandoned)
        try:
            await self.backend.close(drain=max(0.0, deadline - self._loop.time()))
        except Exception:
            # A dead link must not make closing fail; a defect must not be hidden either.
            logger.exception("bus %r: closing the backend failed", self.name)
        await self._end_tasks(caller)
        self.publisher.close()
        session.closed()

    async def _end_tasks(self, caller: asyncio.Task[Any] | None) -> None:
        tasks = {task for task in self._tasks if not task.done()}
        tasks -= {caller, asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run *work* in a task that ends with the bus."""
        task = asyncio.create_task(work, name=f"pubsub {self.name} {name}")
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, PubSubError):
                logger.info("%s: %s", task.get_name(), error)
            else:
                logger.error("%s failed", task.get_name(), exc_info=error)

    # --- capabilities and requests -------------------------------------------------------

    def can(self, cap: Cap) -> bool:
        """Whether the current session has *cap*."""
        return bool(self.capabilities[cap])

    def need(self, cap: Cap) -> None:
        """Raise NotSupported where the broker is known to lack *cap*."""
        support = self.capabilities[cap]
        if support.level is Level.NONE:
            raise NotSupported(
                cap,
                why=support.why,
                backend=self.info.name,
                hint=support.remedy,
                alternatives=self._alternatives(cap),
            )

    def _alternatives(self, *caps: Cap) -> tuple[str, ...]:
        able = set(self._registry.alternatives(caps[0]))
        for cap in caps[1:]:
            able &= set(self._registry.alternatives(cap))
        return tuple(sorted(able - {self.info.name}))

    async def request(
        self, call: Callable[[], Awaitable[T]], what: str, timeout: float | None = None
    ) -> T:
        """Run one request in a session, within a deadline."""
        seconds = self.options.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                await self.session.wait_online()
                return await call()
        except TimeoutError as error:
            if isinstance(error, PubSubError):
                raise
            raise OperationTimeout(
                f"{what}: no answer within {seconds:g} s",
                hint="look at bus.status, or raise the bus's timeout",
                backend=self.info.name,
            ) from error

    # --- middleware ----------------------------------------------------------------------

    def use(self, *middleware: Middleware) -> None:
        """Add middleware for both directions; the first one added is the outermost."""
        self._middleware.extend(middleware)
        if self._middleware:
            self.publish_chain = compose(self._middleware, self._publish)

    def receive_chain(self, terminal: CallNext) -> CallNext | None:
        """Return the middleware around *terminal*, or None where there is none."""
        return compose(self._middleware, terminal) if self._middleware else None

    async def _publish(self, context: Context) -> Receipt:
        options = dict(context.options)
        timeout, confirm = options.pop("timeout", None), options.pop("confirm", None)
        out = self.publisher.frame(
            context.topic, context.payload, headers=context.headers_to_send() or None, **options
        )
        return await self.publisher.send(out, timeout, confirm)

    # --- what subscribers and answerers ask ----------------------------------------------

    def on_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call *function* on the bus's loop: now, if this is it."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            function(*arguments)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def check_verdict(self, verdict: Verdict) -> None:
        """Raise NotSupported for a verdict that the broker cannot follow."""
        if verdict is Verdict.NACK:
            self.need(Cap.NACK)
        elif verdict is Verdict.REJECT:
            self.need(Cap.ACK)

    def pause(self, subscriber: Subscriber) -> None:
        """Hold the broker back until *subscriber* has room."""
        self.subscriptions.pause(subscriber)

    def unpause(self, subscriber: Subscriber) -> None:
        """Let the broker go on, once no other subscriber is full."""
        self.subscriptions.unpause(subscriber)

    def dead_letter(self, topic: str, frame: InFrame, error: BaseException) -> None:
        """Publish a message that could not be handled to *topic*."""
        self._stats.dead_letters += 1
        options: dict[str, Any] = {}
        if self.capabilities[Cap.HEADERS]:
            options["headers"] = dead_letter_headers(frame.topic, error, headers=frame.headers)
        if frame.content_type is not None and self.capabilities[Cap.CONTENT_TYPE]:
            options["content_type"] = frame.content_type

        async def bury() -> None:
            try:
                out = self.publisher.frame(topic, frame.payload, **options)
                await self.publisher.send(out, None, None)
            except PubSubError as failure:
                # Its text says it all; the traceback would lead into our own code.
                logger.warning("a dead letter for %r was not published: %s", topic, failure)

        self.spawn(bury(), "dead letter")

    def handler_failed(self, error: HandlerFailed) -> None:
        """Count a failure, and tell the listeners."""
        self._stats.handler_failures += 1
        for listener in self._listeners:
            listener(error)

    # --- what the session reports --------------------------------------------------------

    @property
    def route(self) -> Callable[[InFrame], None]:
        """Routes one frame."""
        return self.subscriptions.router.route

    def interest(self, event: InterestEvent) -> None:
        """Pass a change of interest to its views."""
        self.views.route(event)

    def authorization(self, request: AuthorizationRequest) -> None:
        """Pass a question to its answerer; report one that has none."""
        if not self.questions.route(request):
            text = "a client waits for authorization, and no authorizer here is for that topic"
            self.note(Notice("authorization", text, topic=request.topic))

    async def authorize(
        self, request: AuthorizationRequest, entitlements: Entitlements | None
    ) -> None:
        """Answer a question of the current session."""
        async with asyncio.timeout(self.options.timeout):
            await cast("HasAuthorization", self.backend).authorize(request, entitlements)

    def sent_again(self, topic: str) -> None:
        """Count a message that the backend sent once more."""
        self.publisher.sent_again(topic)

    def notice(self, notice: Notice) -> None:
        """Report a notice to the event streams."""
        self.note(notice)

    def note(self, event: BusEvent) -> None:
        """Report an event to the event streams."""
        if isinstance(event, StatusChanged):
            logger.debug("bus %r: %s", self.name, event.status.value)
        self._outages.note(event)
        self._hub.put(event)

    def status_changed(self, event: StatusChanged) -> None:
        """Pass a change of status on, and act on it."""
        if event.status is Status.RECONNECTING and self._lost_at is None:
            self._lost_at = self.clock.time()
            self.views.stale()
        elif event.status is Status.ONLINE:
            self._stats.sessions += 1
            self._lost_at = None
            self.publisher.online()
        elif event.status is Status.FAILED and event.error is not None:
            self.publisher.give_up(event.error)
            for subscriber in self.subscriptions.router.subscribers():
                subscriber.buffer.fail(event.error)
            self.views.fail(event.error)
        self.note(event)

    async def restore(self, facts: SessionFacts, generation: int) -> None:
        """Restore everything in a new session; see `SessionOwner`."""
        self.capabilities = effective(self.info.capabilities, await self.backend.probe())
        self.can_nack = bool(self.capabilities[Cap.NACK])
        self.publisher.capabilities = self.capabilities
        self.publisher.set_limits(self.backend.limits)
        await self.subscriptions.restore(facts, generation, self._lost_at)
        await self.views.restore()
        await self.questions.restore()
