"""The development server: an Emitter broker inside this process, for ``pubsub serve emitter``."""

from __future__ import annotations

from .server import EmitterServer

__all__ = ["EmitterServer"]
