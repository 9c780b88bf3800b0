"""The application itself: its decorators, and how it runs."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, TypeVar, Unpack

from pubsub_core.bus import Bus
from pubsub_core.config import Config
from pubsub_core.errors import BadType, ConfigError, WrongLoop
from pubsub_core.middleware import Middleware
from pubsub_core.subscription import HandlerOptions, check_names
from pubsub_core.topics import parse_filter

from .handlers import DeclaredAuthorizer, DeclaredHandler
from .parameters import MAIN, name_of
from .running import Buses, Declared, Running, signals

__all__ = ["App"]

F = TypeVar("F", bound=Callable[..., Any])


class App:
    """Handlers, middleware and hooks, and no broker until it runs.

    Args:
        strict: A handler that raises stops the application, and `run` raises `HandlerFailed`
            from it. Otherwise failures are logged and counted.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._declared = Declared()

    # --- declaring -----------------------------------------------------------------------

    def on(
        self,
        filter: str,
        *,
        bus: str = MAIN,
        type: Any = None,
        **options: Unpack[HandlerOptions],
    ) -> Callable[[F], F]:
        """Declare a handler of the messages that match *filter*; the function stays as it is.

        Handlers are async functions, or plain ones, which run in a thread of their own. A
        function may be declared several times.

        Args:
            filter: Topic filter, with captures.
            bus: Name of the bus to subscribe on.
            type: Type that payloads are decoded to; by default that of the parameter's
                annotation: ``T`` of ``Message[T]``, or that of ``payload``; else bytes.
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
            raise BadType('@app.on takes a topic filter: write @app.on("lab/+/temp")')
        parsed = parse_filter(filter)

        def declare(function: F) -> F:
            handler = DeclaredHandler(function, parsed, bus, type, options)
            # The types that a local function names may be local as well.
            handler.plan(_locals_of_caller())
            self._declared.handlers.append(handler)
            return function

        return declare

    def authorizer(
        self, filter: str, *, bus: str = MAIN, timeout: float | None = None
    ) -> Callable[[F], F]:
        """Declare a function that answers who may see the topics that match *filter*.

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
            raise BadType('@app.authorizer takes a topic filter: write @app.authorizer("LSE/#")')
        parsed = parse_filter(filter)

        def declare(function: F) -> F:
            authorizer = DeclaredAuthorizer(function, parsed, bus, timeout)
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
                f"middleware {name_of(function)} is no async function",
                hint="write: async def middleware(context, call_next)",
            )
        self.use(function)
        return function

    def on_start(self, function: F) -> F:
        """Declare a hook that runs when the buses are open, before any handler is called.

        Takes nothing, or buses in the ways that handlers do. When it raises, the
        application does not start.
        """
        self._declared.on_start.append(function)
        return function

    def on_stop(self, function: F) -> F:
        """Declare a hook that runs when the handlers have finished, while the buses are open.

        The last declared runs first; errors are logged.
        """
        self._declared.on_stop.append(function)
        return function

    @property
    def filters(self) -> tuple[tuple[str, str], ...]:
        """Bus name and filter of each handler, in the order of their declaration."""
        return tuple((handler.bus, handler.filter.text) for handler in self._declared.handlers)

    # --- running ---------------------------------------------------------------------------

    def bus(self, name: str = MAIN) -> Bus:
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

        After the first signal handlers finish the messages that have arrived, for at most
        *drain* seconds;
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
        with signals(running.interrupt):
            return await self._serve(running)

    async def serve(
        self,
        buses: Buses | None = None,
        *,
        config: Config | None = None,
        drain: float | None = None,
    ) -> int:
        """Run inside a running event loop, without signal handlers.

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


def _locals_of_caller() -> Mapping[str, Any]:
    """Return the local names where the function that calls this was called."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = None if frame is None else frame.f_back
    return {} if frame is None else frame.f_locals
