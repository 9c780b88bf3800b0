"""Libraries that only some servers need, and how to install them."""

from __future__ import annotations

import importlib
from typing import Any, Final

from pubsub_core.errors import MissingDependency

__all__ = ["INSTALL", "load_extra"]

INSTALL: Final = "pip install 'pubsub-core[messagebus-server]'"


def load_extra(name: str, what: str) -> Any:
    """Import the module *name*, which *what* needs.

    Raises:
        MissingDependency: It is not installed; the hint is the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"{what} needs {name}", hint=INSTALL, backend="messagebus"
        ) from error
