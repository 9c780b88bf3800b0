"""Running trials, and finding leftovers.

Every run has an event loop of its own, made by `asyncio.Runner`; the server has another one,
in a thread, so that it goes on whatever a test does. So the suite needs pytest alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from .trial import Ledger, Trial

__all__ = ["perform", "resident_bytes", "resources", "run"]


def run(trials: Callable[[], Awaitable[None]], ledger: Ledger) -> None:
    """Run *trials* on a new event loop, and fail for threads and sockets left behind."""
    ledger.restarted = False
    threads = set(threading.enumerate())
    sockets = _sockets()
    with asyncio.Runner() as runner:
        runner.run(_await(trials))
    end = time.monotonic() + 2
    while True:
        late = [thread.name for thread in set(threading.enumerate()) - threads]
        # A server that was restarted may live in this process: it has new sockets, and its loop
        # an executor.
        if ledger.restarted:
            late = [name for name in late if not name.startswith("asyncio_")]
        opened = set[str]() if ledger.restarted else _sockets() - sockets
        if not late and not opened:
            return
        if time.monotonic() > end:
            break
        gc.collect()
        time.sleep(0.005)
    assert not late, f"threads left behind: {late}"
    assert not opened, f"descriptors left behind: {sorted(opened)}"


async def _await(work: Callable[[], Awaitable[None]]) -> None:
    await work()


async def perform(trials: list[Trial], work: Callable[[Trial], Awaitable[None]]) -> None:
    """Run *work* once per trial, all at the same time; fail for leftovers."""
    complaints: list[str] = []

    def complain(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    asyncio.get_running_loop().set_exception_handler(complain)
    before = asyncio.all_tasks()
    if len(trials) == 1:
        await _one(trials[0], work)
    else:
        results = await asyncio.gather(
            *(_one(trial, work) for trial in trials), return_exceptions=True
        )
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            raise failures[0]
        for result in results:
            if result is not None:
                raise result  # pytest's skip is no Exception
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    if left:
        await asyncio.wait(left, timeout=1)
    named = sorted(repr(task) for task in left if not task.done())
    assert not named, f"tasks left behind: {named}"
    assert not complaints, f"reported to the event loop: {complaints}"


async def _one(trial: Trial, work: Callable[[Trial], Awaitable[None]]) -> None:
    limit = trial.case.deadline * trial.harness.slow
    scope = asyncio.timeout(limit)
    try:
        async with scope:
            await work(trial)
    except TimeoutError:
        if scope.expired():
            raise AssertionError(
                f"{trial.case.name} took more than {limit:g} s (seed {trial.seed})"
            ) from None
        raise
    finally:
        await trial.stack.aclose()


# --- resources -----------------------------------------------------------------------------


def resources() -> dict[str, int]:
    """Return how many tasks, threads and descriptors there are now, for comparing."""
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "descriptors": len(_descriptors()),
    }


def resident_bytes() -> int:
    """Return the process's memory in bytes, or 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * 4096


def _descriptors() -> list[str]:
    try:
        return [entry.name for entry in Path("/proc/self/fd").iterdir()]
    except OSError:
        return []


def _sockets() -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(entry.readlink())
                if target.startswith(("socket:", "pipe:", "anon_inode:")):
                    found.add(target)
    return found
