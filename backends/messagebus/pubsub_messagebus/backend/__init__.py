"""The backend that a bus uses for ``messagebus://``."""

from __future__ import annotations

from .backend import MessageBusBackend

__all__ = ["MessageBusBackend"]
