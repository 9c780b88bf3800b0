"""Values as they would be written, with where each comes from, and no secret shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any, cast

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Reference, Secret, looks_secret, mask_url, parse_reference

from .answers import Explained, Source, SourceKind
from .bus_options import BusOptions
from .document import is_list, is_table, reference_in_text
from .layers import Plan
from .options import accepts_text, field_types, inner_type, is_secret, structured

__all__ = ["explain", "reference_of"]

_MASK = "***"


def explain(plan: Plan) -> list[Explained]:
    """Tell each value of a bus and where it comes from."""
    rows = [Explained("url", _shown_url(plan.url.value), plan.url.source)]
    for owner in (BusOptions, plan.info.options):
        for key, wanted in field_types(owner).items():
            found = plan.values.get(key)
            if found is None:
                rows.append(Explained(key, _default(owner, key), Source(SourceKind.DEFAULT)))
            else:
                hidden = inner_type(owner, key)[1]
                rows.append(
                    Explained(key, _shown(found.value, wanted, hidden=hidden), found.source)
                )
    known = {row.key for row in rows}
    rows += [
        Explained(key, _MASK, found.source, f"unknown: no option of {plan.info.name} or a bus")
        for key, found in plan.values.items()
        if key not in known
    ]
    rows += [
        Explained(
            key,
            _shown(found.value, found.wanted, hidden=found.hidden),
            found.source,
            f"set aside: it is for {found.owner}, and the nearest url chose {plan.info.name}",
        )
        for key, found in plan.set_aside.items()
    ]
    return rows


def _shown_url(value: Any) -> str:
    if isinstance(value, str):
        value = reference_in_text(value)
    if isinstance(value, str):
        return mask_url(value)
    return _shown(value, str, hidden=True)


def _shown(value: Any, wanted: Any, *, hidden: bool) -> str:
    """Write a value as TOML would, its secrets masked and its references told."""
    reference = reference_of(value, wanted)
    if reference is not None:
        return f"{_MASK} ({reference})"
    if wanted is not None and not accepts_text(wanted):
        value = structured(value)
    if hidden or isinstance(value, Secret) or _wants_secret(wanted):
        return _MASK
    if isinstance(value, str) and wanted is not None and is_secret(wanted):
        return _MASK  # no table, though it should be one with secrets in it
    if is_table(value):
        parts: list[str] = []
        for key, item in value.items():
            inner, masked = inner_type(wanted, key)
            parts.append(f"{key} = {_shown(item, inner, hidden=masked)}")
        return "{" + ", ".join(parts) + "}"
    if is_list(value):
        inner = inner_type(wanted)[0]
        return "[" + ", ".join(_shown(item, inner, hidden=False) for item in value) + "]"
    return _written(value)


def reference_of(value: Any, wanted: Any) -> Reference | None:
    """Return the reference that stands where text is wanted, if one does."""
    if wanted is not None and not accepts_text(wanted):
        return None
    if isinstance(value, str):
        value = reference_in_text(value)
    if not is_table(value):
        return None
    try:
        return parse_reference(value, place="reference")
    except BadOption:
        return None


def _wants_secret(wanted: Any) -> bool:
    return wanted is not None and is_secret(wanted) and accepts_text(wanted)


def _written(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return mask_url(value)
        case _ if is_table(value):
            parts = (
                f"{key} = {_MASK if looks_secret(str(key)) else _written(item)}"
                for key, item in value.items()
            )
            return "{" + ", ".join(parts) + "}"
        case list() | tuple():
            return "[" + ", ".join(_written(item) for item in cast("Iterable[Any]", value)) + "]"
        case int() | float():
            return str(value)
        case _:
            # Something given in code: its repr is its own affair, a mask of secrets included.
            return mask_url(repr(value))


def _default(cls: type[Any], key: str) -> str:
    for each in fields(cls):
        if each.name == key:
            value = each.default
            if value is MISSING and each.default_factory is not MISSING:
                value = each.default_factory()
            return "" if value is MISSING or value is None else _written(value)
    return ""
