"""The ``pubsub`` command.

One module per group of commands; `root` puts them together, `output` prints, `exits` says
how it went. Nothing of this is imported by ``import pubsub_core``.
"""

from __future__ import annotations

from .root import main

__all__ = ["main"]
