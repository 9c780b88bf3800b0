"""The variables ``PUBSUB_BUS_…``, sorted to buses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["PREFIX", "VARIABLES", "Variables", "sort_variables", "variable_form"]

PREFIX = "PUBSUB_BUS_"
VARIABLES = ("PUBSUB_CONFIG", "PUBSUB_PLUGINS", "PUBSUB_PROFILE", "PUBSUB_STRICT_PLUGINS")
"""The others that mean something."""


@dataclass(slots=True)
class Variables:
    """The variables ``PUBSUB_BUS_…``, by bus name.

    Attributes:
        tables: The inline table that a variable for the whole bus holds, as a text.
        values: Texts of single keys.
        places: The variable of each of these keys.
        stray: Variables that belong to no bus.
    """

    tables: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    values: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]], repr=False)
    places: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    stray: list[str] = field(default_factory=list[str])


def variable_form(name: str) -> str:
    """Return a bus's name as it stands in a variable's."""
    return re.sub(r"[^A-Za-z0-9]", "_", name).upper()


def sort_variables(environ: Mapping[str, str], named: Iterable[str]) -> Variables:
    """Sort the variables ``PUBSUB_BUS_…`` to buses.

    Names and keys may both hold ``_``, so the longest known name wins. A variable that ends
    in ``_URL``, or holds an inline table, makes a bus known that stands in no file.
    """
    rest = {
        variable.removeprefix(PREFIX): value
        for variable, value in sorted(environ.items())
        if variable.startswith(PREFIX) and len(variable) > len(PREFIX)
    }
    forms = {variable_form(name): name for name in reversed([*named])}
    for suffix in rest:
        base = suffix.removesuffix("_URL")
        if base != suffix and base:
            forms.setdefault(base, base.lower())
    # Once every URL is known: a table may be the value of one key, such as a password's reference.
    for suffix, value in rest.items():
        if value.lstrip().startswith("{") and suffix not in forms and not _owner(suffix, forms):
            forms.setdefault(suffix, suffix.lower())
    made = Variables()
    for suffix, value in rest.items():
        if suffix in forms:
            made.tables[forms[suffix]] = value
            continue
        owner = _owner(suffix, forms)
        if owner is None:
            made.stray.append(PREFIX + suffix)
            continue
        name = forms[owner]
        key = suffix[len(owner) + 1 :].lower()
        made.values.setdefault(name, {})[key] = value
        made.places.setdefault(name, {})[key] = PREFIX + suffix
    return made


def _owner(suffix: str, forms: Iterable[str]) -> str | None:
    owners = [
        form for form in forms if suffix.startswith(f"{form}_") and len(suffix) > len(form) + 1
    ]
    return max(owners, key=len, default=None)
