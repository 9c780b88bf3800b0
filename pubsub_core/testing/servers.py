"""A development server in a thread of its own."""

from __future__ import annotations

import asyncio
import importlib
import socket
import threading
from collections.abc import Coroutine
from typing import Any, cast

from pubsub_core.interfaces import DevServer

__all__ = ["ServerThread", "free_port", "load"]

_DEADLINE = 200.0
"""Seconds that a server may take to start or stop: some are large, or installed first."""


class ServerThread:
    """A development server on an event loop of its own, in a thread.

    A test may block its loop, leave tasks or close it; the server does not notice, and its
    resources are not mistaken for something the test left behind.
    """

    def __init__(self, server: DevServer) -> None:
        self.server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="conformance-server", daemon=True
        )

    def start(self) -> None:
        """Start thread and server; return once it listens."""
        self._thread.start()
        self._run(self.server.start())

    def stop(self) -> None:
        """Stop both."""
        try:
            self._run(self.server.stop())
            self._run(self._end_tasks())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def halt(self) -> None:
        """Take the server away: killed where it can be, stopped otherwise."""
        kill = getattr(self.server, "kill", None) or self.server.stop
        await self._call(kill())

    async def resume(self) -> None:
        """Bring it back on the same port."""
        await self._call(self.server.start())

    async def _end_tasks(self) -> None:
        # A server that is not ours may leave tasks behind, whose end would be told later.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    async def _call(self, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_DEADLINE)


def load(path: str) -> Any:
    """Return the object that ``module:name`` means."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast("int", probe.getsockname()[1])
