"""Two things that programs keep by key: results within a bound, and one lock for each name.

Both are for the core and for authors of backends and plugins.

`BoundedCache` holds results that can be had again, whatever a peer sends to fill it::

    self._topics = BoundedCache[bytes, str](4096)

    topic = self._topics.get(raw) or self._topics.keep(raw, parse(raw))

`KeyedLocks` keeps operations on one name apart and lets those on different names overlap::

    async with self._locks.of(filter):
        ...
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Hashable
from typing import Generic, TypeVar

__all__ = ["BoundedCache", "KeyedLocks"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """Results by key; forgets all of them before it would hold more than *most*.

    Several threads may share one: a result may then be computed twice.

    Attributes:
        get: As a dictionary's.
        pop: As a dictionary's.
        clear: As a dictionary's.
    """

    __slots__ = ("_kept", "_most", "clear", "get", "pop")

    # Forgetting all costs less over time than an order of use, which an OrderedDict updates
    # on each hit: it took twice as long, and what is in use is back after one miss each.
    # Not a subclass of dict: `update` would go past the bound, and an overridden
    # `__setitem__` takes 400 ns where `keep` takes 40.

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[K, V] = {}
        # The dictionary's own, so that a hit enters no function of Python's.
        self.get = self._kept.get
        self.pop = self._kept.pop
        self.clear = self._kept.clear

    def __len__(self) -> int:
        """Return how many results are kept."""
        return len(self._kept)

    def keep(self, key: K, value: V) -> V:
        """Keep *value* under *key* and return it."""
        kept = self._kept
        if len(kept) >= self._most:
            kept.clear()
        kept[key] = value
        return value


class _Lock:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class KeyedLocks(Generic[K]):
    """One lock for each name; a name costs nothing once its last user has left."""

    __slots__ = ("_locks",)

    def __init__(self) -> None:
        self._locks: dict[K, _Lock] = {}

    def __len__(self) -> int:
        """Return how many names are held or waited for."""
        return len(self._locks)

    @contextlib.asynccontextmanager
    async def of(self, key: K) -> AsyncGenerator[None]:
        """Hold *key* alone; callers take turns in the order of their calls."""
        entry = self._locks.get(key)
        if entry is None:
            entry = self._locks[key] = _Lock()
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            # Users, not `lock.locked()`: between release and the next waiter's turn the lock
            # is free, and a second one for the same name would let two callers in.
            entry.users -= 1
            if not entry.users:
                del self._locks[key]
