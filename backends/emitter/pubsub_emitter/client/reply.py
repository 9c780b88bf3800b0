"""The result of a call of the native client: the broker's answer, once it is there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, Final, Generic, Protocol, TypeVar, cast

from pubsub_emitter.errors import EmitterError

__all__ = ["Reply"]

T = TypeVar("T")

_SETTLING: Final = threading.Lock()
"""Held for the moment in which a reply gets its answer, or somebody begins to wait for one."""


class _Asking(Protocol):
    """The part of the client that a reply needs.

    Attributes:
        timeout: Seconds to wait for by default.
    """

    timeout: float

    def pump(self, reply: Reply[Any], timeout: float) -> None: ...


class Reply(Generic[T]):
    """The broker's answer. Wait for it, await it, or ignore it.

    It is a refusal's exception as well, so a program that ignores it sees refusals in
    `Client.on_error` only, as with the SDK.
    """

    __slots__ = ("_client", "_done", "_error", "_future", "_value", "what")

    def __init__(self, client: _Asking, what: str) -> None:
        self._client = client
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        # Made when somebody waits: it costs as much as sending a message does, and most
        # replies to messages are never looked at.
        self._future: concurrent.futures.Future[T] | None = None
        self.what = what

    def result(self, timeout: float | None = None) -> T:
        """Wait for the answer and return it.

        Where no loop runs in another thread, it runs here meanwhile.

        Args:
            timeout: Seconds; those of the client when None.

        Raises:
            EmitterError: The broker refused, or did not answer in time.
            NotConnected: The connection ended before the answer.
            PayloadTooLarge: It is longer than any broker takes; nothing was sent.
            RuntimeError: Called by a handler, whose thread the answer would come through.
        """
        limit = self._client.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        self._client.pump(self, limit)
        try:
            return self._waited_for().result(max(deadline - time.monotonic(), 0))
        except concurrent.futures.TimeoutError:
            pass
        raise EmitterError(
            f"no answer to {self.what} within {limit:g} s",
            hint="check that a loop runs and the broker is there",
            retryable=True,
        )

    def done(self) -> bool:
        """Whether the answer is there."""
        return self._done

    def add_done_callback(self, call: Callable[[Reply[T]], Any]) -> None:
        """Have *call* called with this reply when the answer is there."""
        self._waited_for().add_done_callback(lambda _: call(self))

    def exception(self) -> BaseException | None:
        """Return why it failed; None when it did not or is not done."""
        return self._error

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        try:
            async with asyncio.timeout(self._client.timeout):
                return await asyncio.shield(asyncio.wrap_future(self._waited_for()))
        except TimeoutError:
            pass
        raise EmitterError(
            f"no answer to {self.what} within {self._client.timeout:g} s", retryable=True
        )

    def resolve(self, value: T) -> None:
        """Give the answer; for the client."""
        self._settle(value, None)

    def fail(self, error: BaseException) -> None:
        """Give the failure; for the client."""
        self._settle(None, error)

    def _settle(self, value: T | None, error: BaseException | None) -> None:
        with _SETTLING:
            if self._done:
                return
            self._value = value
            self._error = error
            self._done = True
            future = self._future
        if future is not None:
            self._tell(future)

    def _waited_for(self) -> concurrent.futures.Future[T]:
        with _SETTLING:
            future = self._future
            if future is not None:
                return future
            future = self._future = concurrent.futures.Future()
            done = self._done
        if done:
            self._tell(future)
        return future

    def _tell(self, future: concurrent.futures.Future[T]) -> None:
        if self._error is not None:
            future.set_exception(self._error)
        else:
            future.set_result(cast("T", self._value))
