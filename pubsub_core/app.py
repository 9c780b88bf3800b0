"""An application: handlers declared once, run on whatever brokers the configuration says.

::

    app = App()

    @app.on("lab/{device}/temp")
    async def watch(message: Message[Reading], device: str, bus: Bus) -> None:
        if message.payload.celsius > 90:
            await bus.publish(f"alerts/{device}", "hot")

    if __name__ == "__main__":
        sys.exit(app.run())

What a handler's parameters get is decided when the application starts, not per message, and
a parameter that nothing fits is an error then:

=========================================  ================================================
parameter                                  gets
=========================================  ================================================
annotated ``Message`` or ``Message[T]``    the message, its payload decoded to ``T``
annotated ``Bus`` or ``SyncBus``           the handler's bus if it is called ``bus``, else
                                           the bus of that name; async handlers take
                                           ``Bus``, plain ones ``SyncBus``
named as a capture of the filter           what it captured, converted to the annotation
named ``message`` or ``msg``               the message
named ``payload``                          the payload, decoded to the annotation
named ``bus``                              the handler's bus
with a default value                       its default
=========================================  ================================================

An authorizer's parameters get buses and captures in the same way, and the request if they are
annotated ``AuthorizationRequest`` or called ``request``.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import inspect
import logging
import signal
import types
import typing
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, TypeVar, Union, Unpack, cast, get_args, get_origin

import msgspec

from .authorization import Authorizer
from .bus import Bus, connect
from .config import Config
from .errors import ConfigError, HandlerFailed, PubSubError, WrongLoop
from .events import Gap, Status
from .interfaces import AuthorizationRequest
from .message import Message
from .middleware import Middleware
from .subscription import HandlerOptions, Subscription, check_names
from .sync import SyncBus, marked, wrap
from .threads import in_thread, is_async
from .topics import TopicFilter, parse_filter

__all__ = ["App", "Running"]

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("pubsub_core")

_MAIN: Final = "main"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_KEPT_ERRORS: Final = 100
# After the second signal, and for hooks when the time for draining is used up.
_GRACE: Final = 1.0

Buses = Mapping[str, str] | Iterable[str]


class App:
    """Handlers, middleware and hooks, and no broker until it runs.

    Args:
        strict: A handler that raises stops the application, and `run` raises `HandlerFailed`
            from it. Otherwise failures are logged and counted.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._declared = _Declared()

    # --- declaring -----------------------------------------------------------------------

    def on(
        self,
        filter: str,
        *,
        bus: str = _MAIN,
        type: Any = None,
        **options: Unpack[HandlerOptions],
    ) -> Callable[[F], F]:
        """Declare a handler of the messages that match *filter*; the function stays as it is.

        Handlers are async functions, or plain ones, which run in a thread of their own. A
        function may be declared several times.

        Args:
            filter: Topic filter, with captures.
            bus: Name of the bus to subscribe on.
            type: What payloads are decoded to; by default what the parameter's annotation
                says: ``T`` of ``Message[T]``, or that of ``payload``; else bytes.
            options: Those of `Bus.subscribe` but ``handler``; see `HandlerOptions`. With
                ``gaps`` the handler is also called with each `Gap`, in the message's place;
                it may then take nothing else but buses.

        Raises:
            InvalidFilter: The filter is not one.
            BadOption: There is no such option.
            ConfigError: Nothing fits a parameter of the function.
        """
        check_names(options, HandlerOptions, "on")
        if not isinstance(filter, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError('@app.on takes a topic filter: write @app.on("lab/+/temp")')
        parsed = parse_filter(filter)

        def declare(function: F) -> F:
            handler = _Handler(function, parsed, bus, type, options)
            # The types that a local function names may be local as well.
            handler.plan(_locals_of_caller())
            self._declared.handlers.append(handler)
            return function

        return declare

    def authorizer(
        self, filter: str, *, bus: str = _MAIN, timeout: float | None = None
    ) -> Callable[[F], F]:
        """Declare what answers who may see the topics that match *filter*.

        The function, async or plain, takes the request, captures of the filter and buses. It
        returns the entitlements that the client holds (a set of int), `EVERYTHING` for all
        parts whatever they need, or None for no right at all. A client whose answer fails or
        is late is refused. A bus whose broker asks nobody keeps the application from starting.

        Args:
            filter: Topic filter, with captures.
            bus: Name of the bus.
            timeout: Seconds for one answer; the bus's default otherwise.

        Raises:
            InvalidFilter: The filter is not one.
            ConfigError: Nothing fits a parameter of the function.
        """
        if not isinstance(filter, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError('@app.authorizer takes a topic filter: write @app.authorizer("LSE/#")')
        parsed = parse_filter(filter)

        def declare(function: F) -> F:
            authorizer = _Authorizer(function, parsed, bus, timeout)
            authorizer.plan(_locals_of_caller())
            self._declared.authorizers.append(authorizer)
            return function

        return declare

    def use(self, *middleware: Middleware, bus: str | None = None) -> None:
        """Add middleware for both directions, on one *bus* or on all; outermost first."""
        self._declared.middleware.extend((each, bus) for each in middleware)

    def middleware(self, function: Middleware) -> Middleware:
        """Declare an async function ``(context, call_next)`` as middleware of all buses."""
        if not inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"middleware {_name(function)} is no async function",
                hint="write: async def middleware(context, call_next)",
            )
        self.use(function)
        return function

    def on_start(self, function: F) -> F:
        """Declare what runs when the buses are open, before any handler is called.

        Takes nothing, or buses in the ways that handlers do. When it raises, the
        application does not start.
        """
        self._declared.on_start.append(function)
        return function

    def on_stop(self, function: F) -> F:
        """Declare what runs when the handlers have finished, while the buses are open.

        These run last declared first; what they raise is logged.
        """
        self._declared.on_stop.append(function)
        return function

    @property
    def filters(self) -> tuple[tuple[str, str], ...]:
        """Bus name and filter of each handler, in the order of their declaration."""
        return tuple((handler.bus, handler.filter.text) for handler in self._declared.handlers)

    # --- running ---------------------------------------------------------------------------

    def bus(self, name: str = _MAIN) -> Bus:
        """Return an open bus while the application runs.

        Raises:
            ConfigError: It is not running, or has no such bus.
        """
        running = self._declared.running
        if running is None:
            raise ConfigError(
                f"bus {name!r} is open only while the application runs",
                hint="call this from a handler or hook, or connect() a bus of your own",
            )
        return running.bus(name)

    def stop(self) -> None:
        """Let the application stop as after a first signal; from any thread."""
        if self._declared.running is not None:
            self._declared.running.stop()

    def run(
        self,
        buses: Buses | None = None,
        *,
        config: Config | None = None,
        drain: float | None = None,
    ) -> int:
        """Run until SIGTERM or SIGINT, then stop taking messages, finish, and return.

        The first signal lets handlers finish what has arrived, for at most *drain* seconds;
        a second one stops at once.

        Args:
            buses: URLs by the names that handlers use, instead of the configuration's; or
                names of further buses to open.
            config: A configuration instead of the one that is found.
            drain: Seconds; the longest ``drain`` option of the buses by default.

        Returns:
            An exit code for `sys.exit`: 0 when everything that had arrived was handled, 1
            when the stop was cut short. An application that cannot start, or that loses a
            bus for good, raises.

        Raises:
            ConfigError: A bus or a handler is wrong; all buses are closed again.
            ConnectError: A bus could not be opened, or ended for good.
            HandlerFailed: A handler raised, with ``strict``.
            WrongLoop: Called inside a running event loop.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise WrongLoop(
                "app.run() was called inside a running event loop, which it would block",
                hint="use `await app.serve()`",
            )
        try:
            with asyncio.Runner() as runner:
                return runner.run(self._main(buses, config, drain))
        except KeyboardInterrupt:  # before the handlers were in place, or after a third signal
            return 1

    async def _main(self, buses: Buses | None, config: Config | None, drain: float | None) -> int:
        running = Running(self._declared, buses, config, drain, strict=self.strict)
        with _signals(running.interrupt):
            return await self._serve(running)

    async def serve(
        self,
        buses: Buses | None = None,
        *,
        config: Config | None = None,
        drain: float | None = None,
    ) -> int:
        """Do what `run` does inside a running event loop, without signal handlers.

        Ends after `stop`, or when cancelled, which drains before it passes on; a second
        cancellation stops at once.
        """
        return await self._serve(Running(self._declared, buses, config, drain, strict=self.strict))

    async def _serve(self, running: Running) -> int:
        if await running.start():
            try:
                await running.wait()
            finally:
                await running.finish()
        running.check()
        return running.code

    @contextlib.asynccontextmanager
    async def running(
        self,
        buses: Buses | None = None,
        *,
        config: Config | None = None,
        drain: float | None = None,
    ) -> AsyncGenerator[Running, None]:
        """Run the application for the length of a block, e.g. in a test.

        Example:
            >>> async def test() -> None:
            ...     async with app.running({"main": "memory://"}) as running:
            ...         await running.bus().publish("lab/oven/temp", b"99")
        """
        running = Running(self._declared, buses, config, drain, strict=self.strict)
        await running.start()
        try:
            yield running
        finally:
            await running.finish()
        running.check()


@dataclass(slots=True)
class _Declared:
    """What an application consists of, and its run at hand."""

    handlers: list[_Handler] = field(default_factory=list["_Handler"])
    authorizers: list[_Authorizer] = field(default_factory=list["_Authorizer"])
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
        declared: list[_Planned] = [*self.handlers, *self.authorizers]
        names = [each.bus for each in declared]
        names += [name for each in declared for name in each.other_buses()]
        names += [bus for _, bus in self.middleware if bus is not None]
        return {name: given.get(name, name) for name in names} | given or {_MAIN: _MAIN}


class Running:
    """One run of an application. Made by `App.running`.

    Attributes:
        errors: The failures of handlers so far, at most the last hundred.
        code: Exit code; 1 when the stop was cut short.
    """

    def __init__(
        self,
        declared: _Declared,
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
        self._buses: dict[str, Bus] = {}
        self._subscriptions: list[Subscription[Any]] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._opening: asyncio.Task[None] | None = None
        self._finished = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- what users call -----------------------------------------------------------------

    def bus(self, name: str = _MAIN) -> Bus:
        """Return an open bus.

        Raises:
            ConfigError: The application has none of that name.
        """
        try:
            return self._buses[name]
        except KeyError:
            raise ConfigError(
                f"the application has no bus {name!r}",
                hint=f"it has: {', '.join(sorted(self._buses)) or 'none yet'}; name others in "
                "run(buses=…)",
            ) from None

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

    # --- what the application calls ------------------------------------------------------

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
        """Raise what ended the application, if anything did."""
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
        # A handler's own subscription may need the answer of an authorizer here.
        for authorizer in self._declared.authorizers:
            await authorizer.authorize(self)
        for handler in self._declared.handlers:
            subscription = handler.subscribe(self)
            self._subscriptions.append(subscription)
            await subscription
        _log.info("running on %s", ", ".join(map(str, self._buses.values())))

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
                _log.exception("the on_stop hook %s failed", _name(hook))
        await self._close_buses(max(0.0, deadline - loop.time()))

    async def _cut_short(self, draining: asyncio.Task[None]) -> None:
        self.code = 1
        _log.warning("stopping at once; what was not finished is abandoned")
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
        arguments = _Arguments(_fillers(hook, None, plain=plain, namespace=None)[0], self, _MAIN)
        if plain:
            result = await in_thread(lambda: arguments.call(hook, None), name="pubsub-hook")
            if inspect.isawaitable(result):
                await result
        else:
            await arguments.call(hook, None)


def _locals_of_caller() -> Mapping[str, Any]:
    """Return the local names where the function that calls this was called."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = None if frame is None else frame.f_back
    return {} if frame is None else frame.f_locals


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextlib.contextmanager
def _signals(act: Callable[[], None]) -> Generator[None, None, None]:
    """Let SIGTERM and SIGINT call *act* on the running loop; then restore what was there."""
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}
    try:
        for each in _SIGNALS:
            previous = signal.getsignal(each)
            # Elsewhere than on the main thread signals stay whoever's they are.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(each, act)
                before[each] = previous
        yield
    finally:
        for each, previous in before.items():
            loop.remove_signal_handler(each)
            if previous is not None:
                signal.signal(each, previous)


# --- what a handler's parameters get -------------------------------------------------------

_Kind = Literal["message", "payload", "capture", "bus", "request"]


@dataclass(frozen=True, slots=True)
class _Filler:
    """What one parameter gets.

    Attributes:
        keyword: Whether it can only be passed by name.
        source: Name of the capture or of the bus; ``""`` for the handler's own bus.
        annotation: Type to convert or decode to; None for none.
    """

    name: str
    kind: _Kind
    keyword: bool
    source: str = ""
    annotation: Any = None
    sync: bool = False


class _Planned(abc.ABC):
    """A declared function, and what its parameters get."""

    role: ClassVar[str]

    def __init__(self, function: Callable[..., Any], filter: TopicFilter, bus: str) -> None:
        self.function = function
        self.filter = filter
        self.bus = bus
        self.fillers: tuple[_Filler, ...] | None = None

    @abc.abstractmethod
    def _plan(self, namespace: Mapping[str, Any] | None) -> tuple[_Filler, ...]: ...

    def plan(self, namespace: Mapping[str, Any] | None) -> None:
        """Decide what each parameter gets, once; an unknown name may wait for the start.

        Args:
            namespace: Names beside the module's; None for the last attempt.
        """
        if self.fillers is not None:
            return
        if inspect.isgeneratorfunction(self.function) or inspect.isasyncgenfunction(self.function):
            raise ConfigError(
                f"{self.role} {_name(self.function)} yields",
                hint="publish or return instead of yielding",
            )
        try:
            self.fillers = self._plan(namespace)
        except NameError as exc:
            if namespace is None:
                raise ConfigError(
                    f"an annotation of {self.role} {_name(self.function)} cannot be resolved: "
                    f"{exc}",
                    hint=f"define the name in the {self.role}'s module, or leave it out",
                ) from exc

    def other_buses(self) -> list[str]:
        """Return names of buses that its parameters ask for."""
        self.plan(None)
        return [each.source for each in self.fillers or () if each.kind == "bus" and each.source]


class _Handler(_Planned):
    """One declaration of a handler."""

    role = "handler"

    def __init__(
        self,
        function: Callable[..., Any],
        filter: TopicFilter,
        bus: str,
        type: Any,
        options: HandlerOptions,
    ) -> None:
        super().__init__(function, filter, bus)
        self.type = type
        self.options = options
        self.found_type: Any = bytes

    def _plan(self, namespace: Mapping[str, Any] | None) -> tuple[_Filler, ...]:
        fillers, self.found_type = _fillers(
            self.function,
            self.filter,
            plain=not is_async(self.function),
            namespace=namespace,
            gaps=self.options.get("gaps", False),
            given_type=self.type,
        )
        return fillers

    def subscribe(self, running: Running) -> Subscription[Any]:
        """Return the subscription, not yet entered."""
        self.plan(None)
        return running.bus(self.bus).subscribe(
            self.filter.text,
            self.type if self.type is not None else self.found_type,
            handler=self._bound(self.fillers or (), running),
            **self.options,
        )

    def _bound(self, fillers: tuple[_Filler, ...], running: Running) -> Callable[[Any], Any]:
        function = self.function
        if [each.kind for each in fillers] == ["message"] and not fillers[0].keyword:
            return marked(function, running.bus(self.bus))
        arguments = _Arguments(fillers, running, self.bus)

        # The bus tells the two kinds apart, and runs the plain one in a thread.
        async def handle(message: Any) -> None:
            await arguments.call(function, message)

        def handle_plainly(message: Any) -> Any:
            return arguments.call(function, message)

        return handle if is_async(function) else marked(handle_plainly, running.bus(self.bus))


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question as parameters see it: in the place of a message."""

    request: AuthorizationRequest
    params: Mapping[str, str]

    @property
    def topic(self) -> str:
        return self.request.topic


class _Authorizer(_Planned):
    """One declaration of an authorizer."""

    role = "authorizer"

    def __init__(
        self,
        function: Callable[..., Any],
        filter: TopicFilter,
        bus: str,
        timeout: float | None,
    ) -> None:
        super().__init__(function, filter, bus)
        self.timeout = timeout

    def _plan(self, namespace: Mapping[str, Any] | None) -> tuple[_Filler, ...]:
        plain = not is_async(self.function)
        return _fillers(
            self.function, self.filter, plain=plain, namespace=namespace, role=self.role
        )[0]

    async def authorize(self, running: Running) -> Authorizer:
        """Put it in place."""
        self.plan(None)
        bus = running.bus(self.bus)
        arguments = _Arguments(self.fillers or (), running, self.bus)
        function, params = self.function, self.filter.params

        async def answer(request: AuthorizationRequest) -> Any:
            return await arguments.call(function, _Asked(request, params(request.topic)))

        def answer_plainly(request: AuthorizationRequest) -> Any:
            return arguments.call(function, _Asked(request, params(request.topic)))

        handler = answer if is_async(function) else marked(answer_plainly, bus)
        return await bus.authorize(self.filter.text, handler, timeout=self.timeout)


class _Arguments:
    """Fills parameters; everything but the message is at hand before the first one."""

    def __init__(self, fillers: tuple[_Filler, ...], running: Running, own: str) -> None:
        made = [(each, _value(each, running, own)) for each in fillers]
        self._positional = [value for each, value in made if not each.keyword]
        self._keyword = {each.name: value for each, value in made if each.keyword}

    def call(self, function: Callable[..., Any], message: Any) -> Any:
        """Call *function* for *message*."""
        return function(
            *[value(message) for value in self._positional],
            **{name: value(message) for name, value in self._keyword.items()},
        )


def _value(filler: _Filler, running: Running, own: str) -> Callable[[Any], Any]:
    match filler.kind:
        case "message":
            return lambda message: message
        case "payload":
            return lambda message: message.payload
        case "request":
            return lambda asked: asked.request
        case "bus":
            bus = running.bus(filler.source or _own_bus(running, own))
            given = wrap(bus) if filler.sync else bus
            return lambda _: given
        case "capture":
            name, wanted = filler.source, filler.annotation
            if wanted is None:
                return lambda message: message.params[name]
            return functools.partial(_converted, name, wanted)


def _own_bus(running: Running, own: str) -> str:
    # A hook belongs to no bus; where there is only one, that is the one it means.
    if own not in running.buses and len(running.buses) == 1:
        return next(iter(running.buses))
    return own


def _converted(name: str, wanted: Any, message: Message[Any]) -> Any:
    try:
        return msgspec.convert(message.params[name], wanted, strict=False)
    except msgspec.ValidationError:
        raise ValueError(
            f"{{{name}}} of {message.topic!r} is no {getattr(wanted, '__name__', wanted)}"
        ) from None


def _fillers(
    function: Callable[..., Any],
    filter: TopicFilter | None,
    *,
    plain: bool,
    namespace: Mapping[str, Any] | None,
    gaps: bool = False,
    given_type: Any = None,
    role: str = "handler",
) -> tuple[tuple[_Filler, ...], Any]:
    """Return what *function*'s parameters get, and the payload type they ask for.

    A *filter* of None is that of a hook, which can take buses only; an authorizer takes a
    request, and neither message nor payload.
    """
    hints = _hints(function, namespace)
    captures = () if filter is None else tuple(filter.captures)
    found: list[_Filler] = []
    types_found: list[Any] = []
    for place, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = hints.get(name, parameter.empty)
        has_default = parameter.default is not parameter.empty
        filler = _filler(
            name, annotation, captures, hook=filter is None, asked=role == "authorizer"
        )
        if filler is None:
            if has_default:
                continue
            raise _unfillable(function, name, filter, role)
        # What comes after a parameter that keeps its default can only be passed by name.
        keyword = parameter.kind is parameter.KEYWORD_ONLY or place != len(found)
        if keyword and parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        filler = _Filler(name, filler.kind, keyword, filler.source, filler.annotation, sync=plain)
        if filler.kind == "bus":
            _check_bus(function, name, annotation, plain=plain)
        if filler.kind == "capture" and filler.annotation is not None:
            _check_capture(function, filler)
        if filler.kind in ("message", "payload") and filler.annotation is not None:
            types_found.append(filler.annotation)
        found.append(filler)
    if gaps and any(each.kind in ("payload", "capture") for each in found):
        raise ConfigError(
            f"handler {_name(function)} is called with a Gap as well (gaps=True), which has no "
            "payload and no captures",
            hint="take one parameter `message: Message[...] | Gap` and read message.params",
        )
    if given_type is None and any(each != types_found[0] for each in types_found[1:]):
        raise ConfigError(
            f"handler {_name(function)} asks for payloads of different types: "
            f"{', '.join(map(str, types_found))}",
            hint="annotate one of them, or pass type=",
        )
    return tuple(found), types_found[0] if types_found else bytes


def _filler(
    name: str, annotation: Any, captures: tuple[str, ...], *, hook: bool, asked: bool
) -> _Filler | None:
    bare = annotation is inspect.Parameter.empty
    if not bare and _is_bus(annotation):
        return _Filler(name, "bus", False, "" if name == "bus" else name)
    if name == "bus" and bare and "bus" not in captures:
        return _Filler(name, "bus", False)
    if hook:
        return None
    if asked and (annotation is AuthorizationRequest or (name == "request" and bare)):
        return _Filler(name, "request", False)
    if not bare and not asked:
        is_message, payload_type = _message_type(annotation)
        if is_message:
            return _Filler(name, "message", False, annotation=payload_type)
    if name in captures:
        wanted = None if bare or annotation in (str, Any, object) else annotation
        return _Filler(name, "capture", False, name, wanted)
    if asked:
        return None
    if name in ("message", "msg") and bare:
        return _Filler(name, "message", False)
    if name == "payload":
        return _Filler(name, "payload", False, annotation=None if bare else annotation)
    return None


def _is_bus(annotation: Any) -> bool:
    return annotation is Bus or annotation is SyncBus


def _message_type(annotation: Any) -> tuple[bool, Any]:
    """Return whether *annotation* is a message (or a gap), and of what payload type."""
    origin = get_origin(annotation)
    if annotation is Message:
        return True, None
    if origin is Message:
        return True, get_args(annotation)[0]
    if origin in (Union, types.UnionType):
        parts = [each for each in get_args(annotation) if each is not Gap]
        if len(parts) == 1:
            return _message_type(parts[0])
    return False, None


def _hints(function: Callable[..., Any], namespace: Mapping[str, Any] | None) -> dict[str, Any]:
    target: Any = inspect.unwrap(function)
    while isinstance(target, functools.partial):
        target = inspect.unwrap(cast("Any", target).func)
    if not inspect.isroutine(target):
        target = type(target).__call__
    return typing.get_type_hints(
        target, localns=dict(namespace) if namespace else None, include_extras=True
    )


def _check_bus(function: Callable[..., Any], name: str, annotation: Any, *, plain: bool) -> None:
    wanted = SyncBus if plain else Bus
    if annotation is not inspect.Parameter.empty and annotation is not wanted:
        kind = "plain, so it runs in a thread and" if plain else "async and"
        raise ConfigError(
            f"parameter {name!r} of {_name(function)} is a {annotation.__name__}; the function "
            f"is {kind} gets a {wanted.__name__}",
            hint=f"annotate it with {wanted.__name__}, or make the function "
            f"{'async' if plain else 'plain'}",
        )


def _check_capture(function: Callable[..., Any], filler: _Filler) -> None:
    try:
        info = msgspec.inspect.type_info(filler.annotation)
        fits = not isinstance(info, msgspec.inspect.CustomType)
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"parameter {filler.name!r} of handler {_name(function)} is a capture, and text "
            f"cannot be converted to {filler.annotation}",
            hint="annotate it with str, int, an enum, UUID … and convert it yourself otherwise",
        )


def _unfillable(
    function: Callable[..., Any], name: str, filter: TopicFilter | None, role: str
) -> ConfigError:
    if filter is None:
        return ConfigError(
            f"nothing fits parameter {name!r} of hook {_name(function)}",
            hint="hooks take nothing, `bus`, or parameters annotated Bus or SyncBus",
        )
    captures = ", ".join(filter.captures) or "none"
    return ConfigError(
        f"nothing fits parameter {name!r} of {role} {_name(function)}; "
        f"{filter.text!r} captures: {captures}",
        hint="name it after a capture, `request` or `bus`, annotate it with AuthorizationRequest, "
        "or give it a default"
        if role == "authorizer"
        else "name it after a capture, `payload`, `message` or `bus`, annotate it with "
        "Message[...], or give it a default",
    )


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = cast("Any", function).func
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name.rsplit("<locals>.", maxsplit=1)[-1]
