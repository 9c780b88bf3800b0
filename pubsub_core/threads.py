"""Blocking work beside the event loop, on threads that end with it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["HandlerThread", "in_thread", "is_async"]

T = TypeVar("T")

# An idle thread ends within microseconds; the bound is for a machine that stands still.
_IDLE_JOIN = 1.0


async def in_thread(function: Callable[[], T], *, name: str = "pubsub") -> T:
    """Run *function* on a thread of its own and return its result.

    Not the loop's default executor: its threads stay, and a program that closed everything
    would still own them. When cancelled the thread is left to finish, unheard; it is a
    daemon, so a call that never returns does not keep the process alive.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def resolve(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T is None
        else:
            future.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function()
        except BaseException as exc:  # noqa: BLE001 - raised again where it is awaited
            error = exc
        try:
            loop.call_soon_threadsafe(resolve, result, error)
        except RuntimeError:
            return  # the loop is closed, and the caller gone with it

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        return await future
    finally:
        if future.done() and not future.cancelled():
            thread.join()


def is_async(function: Callable[..., Any]) -> bool:
    """Whether *function* is to be called on the event loop: its call itself is async.

    Looks through partials and at ``__call__`` of instances. A plain callable that returns
    something to await is not async: nothing tells so before it is called, least of all an
    async function in an attribute of it. It runs in a thread like any plain one, and
    `HandlerThread.call` awaits what it returned.
    """
    target: Any = function
    while isinstance(target, functools.partial):
        target = cast("Any", target).func
    return inspect.iscoroutinefunction(target) or (
        not inspect.isroutine(target) and inspect.iscoroutinefunction(type(target).__call__)
    )


class HandlerThread:
    """One daemon thread that runs a plain handler's calls in order.

    A daemon, because a handler that never returns must not keep the process alive.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[
            tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Callable[[Any], Any], Any] | None
        ] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False

    async def call(self, handler: Callable[[Any], Any], argument: Any) -> Any:
        """Run ``handler(argument)`` after the calls before it; return its result.

        Where it returns something to await, as a plain wrapper of an async function does,
        that is awaited here, on the loop.
        """
        result = await self._submit(handler, argument)
        return await result if inspect.isawaitable(result) else result

    def _submit(self, handler: Callable[[Any], Any], argument: Any) -> asyncio.Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._calls.put((loop, future, handler, argument))
        return future

    def stop(self) -> None:
        """End the thread after the current call; wait for it only if it is idle."""
        if self._thread is not None:
            self._calls.put(None)
            if not self._busy:
                self._thread.join(_IDLE_JOIN)

    def _run(self) -> None:
        while True:
            self._busy = False
            call = self._calls.get()
            if call is None:
                return
            self._busy = True
            loop, future, handler, argument = call
            result: Any = None
            error: BaseException | None = None
            try:
                result = handler(argument)
            except StopIteration as exc:
                # A future refuses this one; a coroutine would turn it into the same.
                error = RuntimeError("the handler raised StopIteration")
                error.__cause__ = exc
            except BaseException as exc:  # noqa: BLE001 - raised where the future is awaited
                error = exc
            try:
                loop.call_soon_threadsafe(_resolve, future, result, error)
            except RuntimeError:  # the loop was closed while the handler ran
                return


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        if inspect.iscoroutine(result):
            result.close()  # its caller has given up
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
