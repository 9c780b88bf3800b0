"""Options in words for people, and as JSON Schema for editors."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import msgspec

from pubsub_core.secrets import Secret

from .fields import bare_type, field_types, is_class, is_hidden, is_plain, is_secret, is_table

__all__ = [
    "FieldHelp",
    "choices_of",
    "describe_type",
    "field_help",
    "json_schema",
    "reference_schema",
]

_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    bytes: "text",
    Secret: 'text or a reference such as {env = "NAME"}',
    types.NoneType: "nothing",
    Any: "any value",
    object: "any value",
}


def describe_type(wanted: Any) -> str:
    """Say in words what is expected: ``a whole number from 0 to 2``."""
    bare = bare_type(wanted)
    origin = get_origin(bare)
    arguments = get_args(bare)
    if origin in (Union, types.UnionType):
        parts = [part for part in arguments if part is not types.NoneType]
        return " or ".join(dict.fromkeys(describe_type(part) for part in parts))
    if bare in _WORDS:
        return _WORDS[bare] + _bounds(wanted)
    choices = choices_of(bare)
    if choices:
        return f"one of {', '.join(choices)}" if len(choices) > 1 else repr(choices[0])
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return f"a list of {len(arguments)}: {', '.join(describe_type(a) for a in arguments)}"
    if origin in (tuple, list, set, frozenset, Sequence):
        return f"a list, each item {describe_type(arguments[0])}"
    if origin in (dict, Mapping) or bare in (dict, Mapping):
        return "a table" + (f", each value {describe_type(arguments[1])}" if arguments else "")
    if is_class(bare):
        if dataclasses.is_dataclass(bare):
            return f"a table with {', '.join(field_types(bare))}"
        if issubclass(bare, Path):
            return "a path"
        return f"{bare.__module__}.{bare.__qualname__}, which only code can give"
    return str(bare)


def _bounds(wanted: Any) -> str:
    text = ""
    for meta in get_args(wanted)[1:] if get_origin(wanted) is Annotated else ():
        if isinstance(meta, msgspec.Meta):
            if meta.ge is not None and meta.le is not None:
                text += f" from {meta.ge} to {meta.le}"
                continue
            limits = [
                ("not below", meta.ge),
                ("above", meta.gt),
                ("not above", meta.le),
                ("below", meta.lt),
            ]
            text += "".join(f" {word} {limit}" for word, limit in limits if limit is not None)
            if meta.min_length:
                text += f" of at least {meta.min_length} characters"
            if meta.max_length is not None:
                text += f" of at most {meta.max_length} characters"
    return text


def choices_of(wanted: Any) -> list[str]:
    """Return the legal texts of a `Literal` or an enumeration; nothing for other types."""
    bare = bare_type(wanted)
    if get_origin(bare) is Literal:
        return [str(choice) for choice in get_args(bare)]
    if is_class(bare) and issubclass(bare, enum.Enum):
        return [str(member.value) for member in bare]
    return []


class FieldHelp(NamedTuple):
    """One option, for people.

    Attributes:
        type: In words.
        default: As it would be written, ``""`` for none, ``***`` never: a secret has none.
        required: Whether it has no default.
        secret: Whether its value is masked.
    """

    name: str
    type: str
    default: str
    help: str
    required: bool
    secret: bool


def field_help(cls: type[Any]) -> tuple[FieldHelp, ...]:
    """Describe each option of a dataclass; the help is ``metadata["help"]``.

    In order, inherited ones last.
    """
    rows: list[FieldHelp] = []
    inherited = {
        field.name
        for base in cls.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    for field in sorted(dataclasses.fields(cls), key=lambda each: each.name in inherited):
        if not field.init:
            continue
        wanted = field_types(cls)[field.name]
        secret = is_hidden(cls, field.name)
        default = _default(field)
        rows.append(
            FieldHelp(
                field.name,
                describe_type(wanted),
                "" if secret or default in (None, dataclasses.MISSING) else _written(default),
                str(field.metadata.get("help", "")),
                default is dataclasses.MISSING,
                secret,
            )
        )
    return tuple(rows)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _written(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case enum.Enum():
            return str(value.value)
        case str():
            return value
        case tuple() | list() | set() | frozenset():
            return ", ".join(_written(item) for item in cast("Iterable[Any]", value))
        case Mapping() if not value:
            return ""
        case _:
            return str(value)


# --- JSON Schema -------------------------------------------------------------------------


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a table that `build` accepts for *cls*.

    Fields that only code can give (of a type that no text can say, or declared with
    ``metadata={"code_only": True}``) are left out. Where a secret may stand, the schema refers
    to ``#/$defs/reference``, which is included.
    """
    schema = _dataclass_schema(cls)
    return {**schema, "$defs": {"reference": reference_schema()}}


def reference_schema() -> dict[str, Any]:
    """Return the JSON Schema of a reference to a secret."""
    text = {"type": "string", "minLength": 1}
    return {
        "description": "where a secret is kept",
        "type": "object",
        "anyOf": [
            {
                "properties": {
                    "command": {"type": "array", "items": text, "minItems": 1},
                    "timeout": {"type": "number", "exclusiveMinimum": 0},
                },
                "required": ["command"],
                "additionalProperties": False,
            },
            {
                "minProperties": 1,
                "maxProperties": 1,
                "propertyNames": {"not": {"const": "command"}},
                "additionalProperties": text,
            },
        ],
    }


def _dataclass_schema(cls: type[Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    for field in dataclasses.fields(cls):
        wanted = field_types(cls).get(field.name)
        schema = _schema(wanted) if field.init else None
        if schema is None or field.metadata.get("code_only"):
            continue
        default = _default(field)
        if default is dataclasses.MISSING:
            required.append(field.name)
        elif default is not None and not is_secret(wanted):
            schema = {**schema, "default": _plain(default)}
        if field.metadata.get("help"):
            schema = {"description": str(field.metadata["help"]), **schema}
        properties[field.name] = schema
    made: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        made["required"] = required
    return {**made, "additionalProperties": False}


def _schema(wanted: Any) -> dict[str, Any] | None:
    """Return the schema of one value, or None where no text can say it."""
    bare = bare_type(wanted)
    origin = get_origin(bare)
    arguments = get_args(bare)
    reference = {"$ref": "#/$defs/reference"}
    if bare is Any or bare is object:
        return {}
    if origin in (Union, types.UnionType):
        parts = [_schema(part) for part in arguments if part is not types.NoneType]
        legal = [part for part in parts if part is not None]
        return legal[0] if len(legal) == 1 else {"anyOf": legal} if legal else None
    if bare is Secret:
        return {"anyOf": [{"type": "string"}, reference]}
    if is_class(bare) and dataclasses.is_dataclass(bare):
        return _dataclass_schema(bare)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        items = [_schema(item) or {} for item in arguments]
        return {
            "type": "array",
            "prefixItems": items,
            "minItems": len(items),
            "maxItems": len(items),
        }
    if origin in (tuple, list, set, frozenset, Sequence):
        return {"type": "array", "items": _schema(arguments[0]) or {}}
    if origin in (dict, Mapping) or bare in (dict, Mapping):
        inner = _schema(arguments[1]) if len(arguments) == 2 else {}
        return {"type": "object", "additionalProperties": inner if inner is not None else {}}
    if is_class(bare):
        if issubclass(bare, Path) or bare is bytes:
            return {"type": "string"}
        if not is_plain(bare):
            return None
    made = msgspec.json.schema(wanted)
    if "$ref" in made:  # an enumeration; msgspec puts it beside, we want it in place
        made = cast("dict[str, Any]", next(iter(made["$defs"].values())))
        made = {key: value for key, value in made.items() if key == "enum"}
    if bare is str:
        return {"anyOf": [made, reference]}
    return made


def _plain(value: Any) -> Any:
    match value:
        case enum.Enum():
            return value.value
        case bool() | int() | float() | str() | None:
            return value
        case Path():
            return str(value)
        case bytes():
            return value.decode(errors="replace")
        case _ if is_table(value):
            return {str(key): _plain(item) for key, item in value.items()}
        case tuple() | list():
            return [_plain(item) for item in cast("Iterable[Any]", value)]
        case set() | frozenset():
            return sorted(_plain(item) for item in cast("Iterable[Any]", value))
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {
                field.name: _plain(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if getattr(value, field.name) is not None
            }
        case _:
            return str(value)
