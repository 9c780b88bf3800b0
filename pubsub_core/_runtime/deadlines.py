"""One timer for many waits of the same length.

`asyncio.timeout` makes a timer for each wait and cancels it again, which is most of what a
publish with a confirmation costs here. Waits that are all allowed the same time end in the
order in which they began, so one timer, for the oldest of them, does for all.

A wait ends as it does in `asyncio.timeout`: the task is cancelled, and that cancellation, but
no other, becomes a `TimeoutError`.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

__all__ = ["Deadlines"]


class Deadlines:
    """Makes deadlines that are *seconds* away; for one event loop.

    Attributes:
        seconds: Length of each wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._loop = asyncio.get_running_loop()
        # Ordered by their end, as all are equally long.
        self._waits: dict[_Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._waits)

    def wait(self) -> _Wait:
        """Return a context manager that ends the current task's waiting in it."""
        return _Wait(self)

    def close(self) -> None:
        """Drop the timer, as soon as no wait needs it."""
        self._closed = True
        if not self._waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- what a wait calls -------------------------------------------------------------

    def begin(self, wait: _Wait) -> float:
        """Start *wait*; return the loop time at which it must end."""
        when = self._loop.time() + self.seconds
        self._waits[wait] = None
        # Left in place when the wait is over: the next one begins too soon to make a new one.
        if self._timer is None:
            self._timer = self._loop.call_at(when, self._due)
        return when

    def end(self, wait: _Wait) -> None:
        """Forget *wait*, which is over."""
        self._waits.pop(wait, None)
        if self._closed:
            self.close()

    def _due(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._waits:
            oldest = next(iter(self._waits))
            if oldest.when > now:
                self._timer = self._loop.call_at(oldest.when, self._due)
                return
            del self._waits[oldest]
            oldest.expire()


class _Wait:
    """One wait; see `Deadlines.wait`. For one use."""

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_task", "when")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._expired = False
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self.when = 0.0

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a deadline needs a task to end")
        self._task = task
        self._cancelling = task.cancelling()
        self.when = self._deadlines.begin(self)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._deadlines.end(self)
        task, self._task = self._task, None
        if self._expired and task is not None:
            # A cancellation from elsewhere counts for more than ours.
            ours = task.uncancel() <= self._cancelling
            if ours and exc_type is asyncio.CancelledError:
                raise TimeoutError from exc

    def expire(self) -> None:
        """End it: the time is up."""
        if self._task is not None:
            self._expired = True
            self._task.cancel()
