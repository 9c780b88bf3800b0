"""Names of a package that are imported when they are first used.

A package with several doors, such as a backend's, exports names of all of them; with this, using
one door does not import the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of *package*, for PEP 562.

    Type checkers want the same imports below ``if TYPE_CHECKING:``.

    Args:
        package: Its ``__name__``.
        homes: Public names by the module, relative to *package*, that has them.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def find(name: str) -> Any:
        home = home_of.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home}"), name)

    return find, lambda: sorted(home_of)
