"""From a synchronous command to the asynchronous bus, and back out on every path.

Ctrl-C and SIGTERM cancel the command's task, so the bus is closed as it should be; a second
one ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import typer

from pubsub_core.bus import Bus
from pubsub_core.events import Status, StatusChanged

from .exits import ExitCode
from .options import Settings, pairs
from .output import Output

__all__ = ["deadline", "open_bus", "run", "watching_status"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run *main* on a new event loop.

    Raises:
        KeyboardInterrupt: After a Ctrl-C, once everything is closed.
        typer.Exit: With 143, after a SIGTERM.
    """
    terminated = False

    async def supervised() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def stop() -> None:
            nonlocal terminated
            terminated = True
            loop.remove_signal_handler(signal.SIGTERM)
            if task is not None:
                task.cancel()

        # Not on Windows, and not off the main thread.
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(signal.SIGTERM, stop)
        return await main

    try:
        return asyncio.run(supervised())
    except asyncio.CancelledError:
        if terminated:
            raise typer.Exit(ExitCode.TERMINATED) from None
        raise


@contextlib.asynccontextmanager
async def open_bus(
    settings: Settings, where: str, overrides: list[str] | None = None, **options: Any
) -> AsyncGenerator[Bus, None]:
    """Open *where* with the current configuration; ``-o`` wins over *options*."""
    given: dict[str, Any] = {**options, **pairs(overrides, option="--option")}
    async with Bus(where, config=settings.load(), options=given) as bus:
        yield bus


@contextlib.asynccontextmanager
async def watching_status(bus: Bus, output: Output) -> AsyncGenerator[None, None]:
    """Tell about a lost and a renewed connection while the block runs."""

    async def tell() -> None:
        lost = False
        async with bus.events() as events:
            async for event in events:
                if not isinstance(event, StatusChanged):
                    continue
                if event.status is Status.RECONNECTING and not lost:
                    lost = True
                    why = f": {event.error}" if event.error else ""
                    output.note(f"connection lost{why}", kind="status", status="reconnecting")
                elif event.status is Status.ONLINE and lost:
                    lost = False
                    output.note("connected again", kind="status", status="online")

    task = asyncio.create_task(tell(), name="pubsub-status")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def deadline(seconds: float | None) -> AsyncGenerator[asyncio.Timeout, None]:
    """End the block quietly after *seconds*; ``expired()`` tells whether that happened."""
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            yield timeout
    except TimeoutError:
        if not timeout.expired():
            raise
