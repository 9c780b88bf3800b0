"""Blocking work beside the event loop, on threads that end with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


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
            return  # the loop is closed; nobody waits

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        return await future
    finally:
        if future.done() and not future.cancelled():
            thread.join()
