"""The in-process backend: ``memory://`` and ``memory://NAME``.

It is the reference for every other backend, and programs run on it in tests. Buses
with the same name in one process share a `Space`; a bus without a name has one of its own.
Nothing leaves the process and nothing survives it.

A space can also misbehave on purpose: `Space.disconnect_all`, `Space.refuse`, `Space.allow`.
"""

from .options import MemoryOptions, MemoryWill
from .space import Space

__all__ = ["MemoryOptions", "MemoryWill", "Space"]
