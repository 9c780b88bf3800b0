"""For a bus: an Emitter broker as the core sees it."""

from __future__ import annotations

from .backend import EmitterBackend

__all__ = ["EmitterBackend"]
