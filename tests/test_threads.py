"""Which functions run on the loop, and what becomes of the others."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core.threads import HandlerThread, is_async

pytestmark = pytest.mark.usefixtures("no_leaks")


async def work(message: Any) -> Any:
    return message, threading.get_ident()


def plain(message: Any) -> Any:
    return message, threading.get_ident()


def hidden(message: Any) -> Any:
    return work(message)


class Called:
    async def __call__(self, message: Any) -> Any:
        return await work(message)

    async def method(self, message: Any) -> Any:
        return await work(message)


class Wrapper:
    """Keeps a function as ``func``, as many decorators do, and is plain itself."""

    def __init__(self, func: Callable[[Any], Any]) -> None:
        self.func = func

    def __call__(self, message: Any) -> Any:
        return self.func(message)


class Blocking(Wrapper):
    """A plain wrapper that runs the async function to its end itself."""

    def __call__(self, message: Any) -> Any:
        return asyncio.run(self.func(message)), threading.get_ident()


class AsyncWrapper(Wrapper):
    """An async wrapper of a plain function."""

    async def __call__(self, message: Any) -> Any:
        return self.func(message)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (work, True),
        (functools.partial(work), True),
        (functools.partial(functools.partial(work)), True),
        (Called(), True),
        (functools.partial(Called()), True),
        (Called().method, True),
        (AsyncWrapper(plain), True),
        (plain, False),
        (functools.partial(plain), False),
        (print, False),
        (Called, False),
        (Wrapper(plain), False),
        (Wrapper(work), False),
        (Blocking(work), False),
        (hidden, False),
    ],
)
def test_the_call_itself_decides(function: Callable[[Any], Any], expected: bool) -> None:
    assert is_async(function) is expected


async def test_what_a_plain_function_returns_to_await_is_awaited_on_the_loop() -> None:
    thread = HandlerThread("test")
    here = threading.get_ident()
    try:
        for function in (Wrapper(work), hidden):
            assert await thread.call(function, 1) == (1, here)
        (_, inner), outer = await thread.call(Blocking(work), 1)
        assert inner == outer != here
        message, ran_in = await thread.call(Wrapper(plain), 1)
        assert message == 1
        assert ran_in != here
    finally:
        thread.stop()


async def test_a_coroutine_that_comes_too_late_is_closed() -> None:
    """Never awaited, it would warn, and warnings are errors here."""
    thread = HandlerThread("test")
    begun, go_on, done = asyncio.Event(), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(message: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(5)
        return work(message)

    async def next_one(message: Any) -> None:
        done.set()

    try:
        calling = asyncio.ensure_future(thread.call(slow, 1))
        await begun.wait()
        calling.cancel()
        await asyncio.wait([calling])
        go_on.set()
        await thread.call(Wrapper(next_one), 2)
        assert done.is_set()
    finally:
        thread.stop()
