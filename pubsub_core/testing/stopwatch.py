"""A clock for promises in seconds, which other work on the machine does not make fail.

A test that bounds the time of the wall fails on a busy machine. Where an event can be waited for,
or steps or processor time be counted, that is better; `Stopwatch` is for what is left, e.g. that
closing takes no longer than the drain it was given.

Source: Linux, ``Documentation/scheduler/sched-stats.rst``: the second number of a thread's
``schedstat`` is the nanoseconds in which it could have run and waited for a processor.
"""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["Stopwatch", "waited"]

_THREADS = Path("/proc/self/task")


def waited() -> float:
    """Return the seconds that this process's threads have waited for a processor so far.

    Those of threads that ended meanwhile are left out. Zero where the system does not tell.
    """
    total = 0
    try:
        for thread in _THREADS.iterdir():
            # All threads count: one that waits while it has the interpreter lock stops the others.
            try:
                total += int((thread / "schedstat").read_bytes().split()[1])
            except (OSError, IndexError, ValueError):  # it ended, or the kernel keeps no account
                continue
    except OSError:
        return 0.0
    return total / 1e9


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._waited = waited()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far, without those in which this process waited for a processor."""
        passed = time.monotonic() - self._began
        return max(0.0, passed - max(0.0, waited() - self._waited))
