"""The fields of a dataclass of options, their types, and which of them are secret."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeGuard, Union, cast, get_args, get_origin

from pubsub_core.secrets import Secret, looks_secret

__all__ = [
    "accepts_table",
    "accepts_text",
    "bare_type",
    "field_types",
    "inner_type",
    "is_class",
    "is_hidden",
    "is_iterable",
    "is_plain",
    "is_secret",
    "is_table",
    "members",
]


def field_types(cls: type[Any]) -> Mapping[str, Any]:
    """Return name and type of every field that can be given, in order.

    Raises:
        TypeError: *cls* is no dataclass.
    """
    return _field_types(cast("Hashable", cls))


@functools.cache
def _field_types(cls: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return types.MappingProxyType(
        {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    )


def is_hidden(cls: type[Any], key: str) -> bool:
    """Return whether an option's value stays out of errors and explanations.

    So do secrets, options that are named like one, and fields declared with ``repr=False``.
    """
    if looks_secret(key):
        return True
    return any(
        field.name == key and (not field.repr or is_secret(field_types(cls)[key]))
        for field in dataclasses.fields(cls)
    )


def is_secret(wanted: Any) -> bool:
    """Return whether a `Secret` is in that type, also in a nested dataclass or table."""
    bare = bare_type(wanted)
    if bare is Secret:
        return True
    if is_class(bare) and dataclasses.is_dataclass(bare):
        return any(is_secret(inner) for inner in field_types(bare).values())
    return any(is_secret(inner) for inner in get_args(bare) if inner is not Ellipsis)


def inner_type(wanted: Any, key: str | None = None) -> tuple[Any, bool]:
    """Return the type of the value under *key* in a table (of an item, for None).

    The second value says whether it stays hidden for its name or declaration. The type is
    None where it is not known.
    """
    hidden = key is not None and looks_secret(key)
    for part in members(wanted):
        bare = bare_type(part)
        arguments = get_args(bare)
        if key is None:
            if get_origin(bare) in (tuple, list, set, frozenset, Sequence):
                return arguments[0], hidden
        elif is_class(bare) and dataclasses.is_dataclass(bare):
            declared = [field for field in dataclasses.fields(bare) if field.name == key]
            if declared:
                return field_types(bare).get(key), hidden or not declared[0].repr
        elif get_origin(bare) in (dict, Mapping) and len(arguments) == 2:
            return arguments[1], hidden
    return None, hidden


def accepts_text(wanted: Any) -> bool:
    """Return whether any text is a legal value of that type."""
    return any(bare_type(part) in (str, bytes, Secret, Any, object) for part in members(wanted))


def accepts_table(wanted: Any) -> bool:
    """Return whether a table or a list is a legal value of that type."""

    def one(bare: Any) -> bool:
        return (
            get_origin(bare) in (tuple, list, set, frozenset, Sequence, dict, Mapping)
            or bare in (dict, list, tuple)
            or (is_class(bare) and dataclasses.is_dataclass(bare))
        )

    return any(one(bare_type(part)) for part in members(wanted))


# --- types -----------------------------------------------------------------------------


def bare_type(wanted: Any) -> Any:
    """Return a type without its annotations."""
    return get_args(wanted)[0] if get_origin(wanted) is Annotated else wanted


# Guards rather than isinstance, after which pyright knows a class of unknown parameters.
def is_class(value: Any) -> TypeGuard[type[Any]]:
    """Whether *value* is a class."""
    return isinstance(value, type)


def is_table(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """Whether *value* is a table."""
    return isinstance(value, Mapping)


def is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether *value* can be iterated."""
    return isinstance(value, Iterable)


def is_plain(bare: type[Any]) -> bool:
    """Whether a text can say every value of that class."""
    return bare in (bool, int, float, str, bytes, type(None)) or issubclass(bare, enum.Enum)


def members(wanted: Any) -> tuple[Any, ...]:
    """Return the types of a union; of any other type itself."""
    bare = bare_type(wanted)
    return get_args(bare) if get_origin(bare) in (Union, types.UnionType) else (wanted,)
