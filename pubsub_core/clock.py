"""Time as a thing that can be passed in, so that tests need not wait for it."""

from __future__ import annotations

import asyncio
import time as _time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """Time as the core and the backends use it. All values are seconds."""

    def time(self) -> float:
        """Return seconds since the Unix epoch; may jump."""
        ...

    def monotonic(self) -> float:
        """Return seconds since some fixed point; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait. Cancellation ends the wait."""
        ...


class SystemClock:
    """The machine's clock."""

    # Bound to the functions themselves: `time` is asked once per message.
    time = staticmethod(_time.time)
    monotonic = staticmethod(_time.monotonic)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)
