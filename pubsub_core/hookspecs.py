"""The hooks of a plugin. Registration only: nothing here runs per message.

A plugin is a module named by an entry point of the group ``pubsub_core``; it implements
any of these hooks with `hookimpl`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

from .interfaces import BackendInfo

__all__ = ["PROJECT", "Hooks", "hookimpl", "hookspec"]

PROJECT = "pubsub_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """The hooks, a name and a sentence each."""

    @hookspec
    def pubsub_backends(self) -> list[BackendInfo]:
        """Announce backends; must not import their client libraries."""
        raise AssertionError("a specification is not called")

    @hookspec
    def pubsub_codecs(self) -> list[Any]:
        """Announce codecs: objects with `pubsub_core.codecs.Codec`'s methods."""
        raise AssertionError("a specification is not called")

    @hookspec
    def pubsub_middleware(self) -> dict[str, Callable[..., Any]]:
        """Announce middleware factories by the names that pubsub.toml uses."""
        raise AssertionError("a specification is not called")

    @hookspec(firstresult=True)
    def pubsub_secret(self, kind: str, ref: str) -> str | None:
        """Resolve a secret reference of a kind you know; None for other kinds."""
        raise AssertionError("a specification is not called")

    @hookspec
    def pubsub_commands(self, cli: Any) -> None:
        """Add sub-commands to the ``pubsub`` command (a typer application)."""
