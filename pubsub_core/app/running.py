"""One run of an application: opening its buses, draining them, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import signal
import types
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

from pubsub_core.bus import Bus, connect
from pubsub_core.config import Config
from pubsub_core.errors import BusClosed, ConfigError, HandlerFailed, PubSubError
from pubsub_core.events import Status
from pubsub_core.middleware import Middleware
from pubsub_core.subscription import Subscription
from pubsub_core.threads import in_thread, is_async

from .handlers import DeclaredAuthorizer, DeclaredHandler, Planned
from .parameters import MAIN, Arguments, OpenBuses, fillers_of, name_of

__all__ = ["Buses", "Declared", "Running", "signals"]

_log = logging.getLogger("pubsub_core")

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_KEPT_ERRORS: Final = 100
# After the second signal, and for hooks when the time for draining is used up.
_GRACE: Final = 1.0

Buses: TypeAlias = Mapping[str, str] | Iterable[str]
"""URLs by name, or names of buses in the configuration."""


@dataclass(slots=True)
class Declared:
    """The parts of an application, and its current run."""

    handlers: list[DeclaredHandler] = field(default_factory=list["DeclaredHandler"])
    authorizers: list[DeclaredAuthorizer] = field(default_factory=list["DeclaredAuthorizer"])
    middleware: list[tuple[Middleware, str | None]] = field(
        default_factory=list[tuple[Middleware, str | None]]
    )
    on_start: list[Callable[..., Any]] = field(default_factory=list[Callable[..., Any]])
    on_stop: list[Callable[..., Any]] = field(default_factory=list[Callable[..., Any]])
    running: Running | None = None

    def targets(self, buses: Buses | None) -> dict[str, str]:
        """Return where each bus is: a URL, or its name in the configuration."""
        if isinstance(buses, Mapping):
            given = dict(cast("Mapping[str, str]", buses))
        else:
            given = {name: name for name in buses or ()}
        declared: list[Planned] = [*self.handlers, *self.authorizers]
        names = [each.bus for each in declared]
        names += [name for each in declared for name in each.other_buses()]
        names += [bus for _, bus in self.middleware if bus is not None]
        return {name: given.get(name, name) for name in names} | given or {MAIN: MAIN}


class Running:
    """One run of an application. Made by `App.running`.

    Attributes:
        errors: The failures of handlers so far, at most the last hundred.
        code: Exit code; 1 when the stop was cut short.
    """

    def __init__(
        self,
        declared: Declared,
        buses: Buses | None,
        config: Config | None,
        drain: float | None,
        *,
        strict: bool,
    ) -> None:
        self.errors: list[HandlerFailed] = []
        self.code = 0
        self._declared = declared
        self._strict = strict
        self._config = config
        self._drain = drain
        self._targets = declared.targets(buses)
        self._buses = OpenBuses()
        self._subscriptions: list[Subscription[Any]] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._opening: asyncio.Task[None] | None = None
        self._finished = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- for programs --------------------------------------------------------------------

    def bus(self, name: str = MAIN) -> Bus:
        """Return an open bus.

        Raises:
            ConfigError: The application has none of that name.
        """
        return self._buses.named(name)

    @property
    def buses(self) -> Mapping[str, Bus]:
        """The open buses by name."""
        return types.MappingProxyType(self._buses)

    def stop(self) -> None:
        """Stop as after a first signal: take no more, finish, close. From any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._stopping.set()
        if self._opening is not None:
            self._opening.cancel()

    def interrupt(self) -> None:
        """Act as a signal does: the first call stops, a second one stops at once."""
        if not self._stopping.is_set():
            _log.info("stopping; interrupt again to stop at once")
            self._stop()
        else:
            self._at_once.set()

    # --- for the application -------------------------------------------------------------

    async def start(self) -> bool:
        """Open everything; return whether it runs, False when it was stopped meanwhile."""
        if self._declared.running is not None:
            raise ConfigError(
                "the application runs already", hint="make a second App for a second run"
            )
        self._declared.running = self
        self._loop = asyncio.get_running_loop()
        opening = self._opening = asyncio.create_task(self._start(), name="pubsub app start")
        try:
            await opening
        except BaseException as exc:
            self._finished = True
            await self._close_buses(0.0)
            self._declared.running = None
            stopped = self._stopping.is_set() and opening.cancelled()
            if stopped and isinstance(exc, asyncio.CancelledError) and not _cancelling():
                return False
            raise
        finally:
            self._opening = None
        return True

    async def wait(self) -> None:
        """Return when the application is to stop."""
        await self._stopping.wait()

    async def finish(self) -> None:
        """Drain, run the hooks, close; at once when interrupted or cancelled again."""
        if self._finished:
            return
        self._finished = True
        self._stopping.set()
        draining = asyncio.create_task(self._finish(), name="pubsub app finish")
        at_once = asyncio.create_task(self._at_once.wait(), name="pubsub app interrupt")
        try:
            await asyncio.wait((draining, at_once), return_when=asyncio.FIRST_COMPLETED)
        finally:
            at_once.cancel()
            try:
                if draining.done():
                    draining.result()
                else:
                    await self._cut_short(draining)
            finally:
                self._declared.running = None

    def check(self) -> None:
        """Raise the error that ended the application, if one did."""
        if self._failure is not None:
            raise self._failure

    # --- starting --------------------------------------------------------------------------

    async def _start(self) -> None:
        for declared in (*self._declared.handlers, *self._declared.authorizers):
            declared.plan(None)
        for name, where in self._targets.items():
            bus = self._buses[name] = connect(where, config=self._config)
            bus.use(*(each for each, only in self._declared.middleware if only in (None, name)))
            bus.on_handler_failure(self._handler_failed)
        await self._open_buses()
        for hook in self._declared.on_start:
            await self._run_hook(hook)
        for name, bus in self._buses.items():
            self._watchers.append(
                asyncio.create_task(self._watch(name, bus), name=f"pubsub app watch {name}")
            )
        online = {name for name, bus in self._buses.items() if bus.status is Status.ONLINE}
        await self._subscribe(online)
        for name in self._buses.keys() - online:  # with wait=false
            self._watchers.append(
                asyncio.create_task(self._subscribe_late(name), name=f"pubsub app start {name}")
            )
        _log.info("running on %s", ", ".join(map(str, self._buses.values())))

    async def _subscribe(self, names: Container[str]) -> None:
        # A handler's own subscription may need the answer of an authorizer here.
        for authorizer in self._declared.authorizers:
            if authorizer.bus in names:
                await authorizer.authorize(self._buses)
        with contextlib.ExitStack() as held:
            # Else what the first handler publishes, on a retained message say, would be sent
            # before the handler that it is for is subscribed.
            for name, bus in self._buses.items():
                if name in names:
                    held.enter_context(bus.hold_handlers())
            for handler in self._declared.handlers:
                if handler.bus in names:
                    subscription = handler.subscribe(self._buses)
                    self._subscriptions.append(subscription)
                    await subscription

    async def _subscribe_late(self, name: str) -> None:
        """Start the handlers of a bus that was opened offline, once it has a session."""
        bus = self._buses[name]
        try:
            if await bus.wait_for(Status.ONLINE, Status.FAILED, Status.CLOSED) is Status.ONLINE:
                await self._subscribe({name})
        except BusClosed:
            return  # `_watch` has seen it too
        except PubSubError as error:
            _log.error("the handlers of bus %r cannot start: %s", name, error)
            self._failure = self._failure or error
            self._stop()

    async def _open_buses(self) -> None:
        # All at once, and the first failure ends the others' attempts.
        tasks = [asyncio.create_task(bus.open()) for bus in self._buses.values()]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        failures = [task.exception() for task in tasks if not task.cancelled()]
        errors = [failure for failure in failures if failure is not None]
        for other in errors[1:]:
            errors[0].add_note(f"and: {other}")
        if errors:
            raise errors[0]

    async def _watch(self, name: str, bus: Bus) -> None:
        with contextlib.suppress(PubSubError):  # BusClosed: by us, or by the program itself
            await bus.wait_for(Status.FAILED, Status.CLOSED)
        if not self._stopping.is_set():
            if bus.status is Status.FAILED:
                _log.error("bus %r ended for good: %s", name, bus.error)
                self._failure = self._failure or bus.error
            self._stop()

    def _handler_failed(self, error: HandlerFailed) -> None:
        self.errors.append(error)
        del self.errors[:-_KEPT_ERRORS]
        if self._strict:
            self._failure = self._failure or error
            self._stop()

    # --- stopping --------------------------------------------------------------------------

    async def _finish(self) -> None:
        loop = asyncio.get_running_loop()
        seconds = self._seconds()
        deadline = loop.time() + seconds
        drained = await asyncio.gather(*(each.drain(seconds) for each in self._subscriptions))
        if late := drained.count(False):
            self.code = 1
            _log.warning("%d handlers did not finish within %g s", late, seconds)
        for hook in reversed(self._declared.on_stop):
            try:
                async with asyncio.timeout_at(max(deadline, loop.time() + _GRACE)):
                    await self._run_hook(hook)
            except Exception:  # noqa: BLE001 - logged; the other hooks and buses have their turn
                self.code = 1
                _log.exception("the on_stop hook %s failed", name_of(hook))
        await self._close_buses(max(0.0, deadline - loop.time()))

    async def _cut_short(self, draining: asyncio.Task[None]) -> None:
        self.code = 1
        _log.warning("stopping at once; unfinished messages are abandoned")
        draining.cancel()
        await asyncio.wait((draining,))
        # A close that had begun already keeps its own deadline; it is not waited for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                await self._close_buses(0.0)

    async def _close_buses(self, drain: float) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        closing = [asyncio.ensure_future(bus.close(drain=drain)) for bus in self._buses.values()]
        closing += self._watchers
        if closing:
            await asyncio.wait(closing)
        for task in closing:
            if not task.cancelled() and task.exception() is not None:
                self.code = 1
                _log.error("closing failed", exc_info=task.exception())

    def _seconds(self) -> float:
        if self._drain is not None:
            return self._drain
        options = [bus.options for bus in self._buses.values()]
        return max((each.drain for each in options), default=0.0)

    async def _run_hook(self, hook: Callable[..., Any]) -> None:
        plain = not is_async(hook)
        arguments = Arguments(
            fillers_of(hook, None, plain=plain, namespace=None)[0], self._buses, MAIN
        )
        if plain:
            result = await in_thread(lambda: arguments.call(hook, None), name="pubsub-hook")
            if inspect.isawaitable(result):
                await result
        else:
            await arguments.call(hook, None)


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextlib.contextmanager
def signals(act: Callable[[], None]) -> Generator[None, None, None]:
    """Let SIGTERM and SIGINT call *act* on the running loop; then restore their handlers."""
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}
    try:
        for each in _SIGNALS:
            previous = signal.getsignal(each)
            # Off the main thread, signals keep their handlers.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(each, act)
                before[each] = previous
        yield
    finally:
        for each, previous in before.items():
            loop.remove_signal_handler(each)
            if previous is not None:
                signal.signal(each, previous)
