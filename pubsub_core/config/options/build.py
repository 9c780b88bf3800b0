"""The dataclass of options from texts (URL, environment) and native values (TOML, Python).

The conversion of single values is msgspec's, in its lax mode; this module adds places,
suggestions, secrets, nested dataclasses with strict keys, and the words that people write
for a boolean. No error holds a secret.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import msgspec

from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import BadOption, PubSubError
from pubsub_core.plugins import clashes
from pubsub_core.secrets import Secret, mask_url, redact

from .describe import choices_of, describe_type
from .fields import (
    accepts_text,
    bare_type,
    field_types,
    is_class,
    is_hidden,
    is_iterable,
    is_plain,
    is_secret,
    is_table,
    members,
)

__all__ = ["Resolve", "build", "split", "structured", "unknown_option"]

T = TypeVar("T")

Resolve = Callable[[Mapping[str, Any], str], Secret]
"""Turns a reference such as ``{env = "NAME"}`` at a place into the secret."""

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


def split(
    values: Mapping[str, Any],
    cls: type[Any],
    *,
    backend: str = "",
    where: str = "",
    places: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide values between `BusOptions` and a backend's options.

    Raises:
        BadOption: A key belongs to neither.
        ValueError: The backend's options repeat names of `BusOptions`.
    """
    taken = clashes(cls)
    if taken:
        raise ValueError(f"{cls.__name__} repeats options of every bus: {', '.join(taken)}")
    general = field_types(BusOptions)
    bus = {key: value for key, value in values.items() if key in general}
    own = {key: value for key, value in values.items() if key in field_types(cls)}
    for key in values:
        if key not in bus and key not in own:
            raise unknown_option(
                key,
                [*field_types(cls), *general],
                place=_place(key, where, places),
                backend=backend,
            )
    return bus, own


def unknown_option(
    key: str, legal: Iterable[str], *, place: str, backend: str = "", what: str = "option"
) -> BadOption:
    """Make the error for an unknown key; its value is not shown."""
    names = list(legal)
    near = difflib.get_close_matches(key, names, 1, 0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    owner = f" of {backend}" if backend else ""
    article = "an" if what[0] in "aeiou" else "a"
    return BadOption(
        f"{place} is not {article} {what}{owner}",
        option=place,
        hint=f"{hint}legal here: {', '.join(names)}" if names else "nothing can be given here",
        backend=backend,
    )


def build(
    cls: type[T],
    values: Mapping[str, Any],
    *,
    where: str = "",
    backend: str = "",
    places: Mapping[str, str] | None = None,
    resolve: Resolve | None = None,
) -> T:
    """Make the dataclass *cls* from *values*; a field without one keeps its default.

    Texts are converted to the type of their field: numbers, booleans (true, yes, on, 1 and their
    opposites), enumerations, paths, lists (``a,b`` or ``["a", "b"]``) and tables
    (``{name = "value"}``, both as in TOML). ``none`` stands for None where None is legal and
    text is not. Native values must fit. A field of
    type `Secret` takes text, a `Secret` or a reference; a field of type ``str`` takes a
    reference too.

    Args:
        cls: A dataclass; nested dataclasses are built from tables, with strict keys too.
        values: By field name.
        where: Prefix of the key in errors, e.g. ``bus.main``.
        backend: Name of the backend, for errors.
        places: Where single keys stand, instead of ``where.key``.
        resolve: Resolves references; without it they are errors.

    Raises:
        BadOption: A key is unknown, missing, or has a bad value. Its value is shown only
            where it cannot be a secret.
    """
    return _Builder(backend, resolve).dataclass(cls, values, where, places)


def _place(key: str, where: str, places: Mapping[str, str] | None) -> str:
    if places and key in places:
        return places[key]
    return f"{where}.{key}" if where else key


class _Builder:
    def __init__(self, backend: str, resolve: Resolve | None) -> None:
        self._backend = backend
        self._resolve = resolve

    def dataclass(
        self,
        cls: type[T],
        values: Mapping[str, Any],
        where: str,
        places: Mapping[str, str] | None = None,
    ) -> T:
        known = field_types(cls)
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            place = _place(key, where, places)
            if key not in known:
                raise unknown_option(key, known, place=place, backend=self._backend)
            arguments[key] = self.value(value, known[key], place, hidden=is_hidden(cls, key))
        for field in dataclasses.fields(cast("Any", cls)):
            if (
                field.init
                and field.name not in arguments
                and field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                place = _place(field.name, where, places)
                raise BadOption(
                    f"{place} is missing",
                    option=place,
                    hint=f"give {describe_type(known[field.name])}",
                    backend=self._backend,
                )
        problem, hint, place = "", "", where
        try:
            return cls(**arguments)
        except BadOption as exc:
            # The class knows its field, not where that stands.
            key = exc.option.partition(".")[0]
            place = _place(key, where, places) if key in known else where
            problem, hint = exc.message, exc.hint
        except PubSubError:
            raise
        except (TypeError, ValueError) as exc:
            problem = str(exc)
        # Raised here, so that no frame with the arguments hangs on to it.
        secrets = [value for value in arguments.values() if isinstance(value, Secret)]
        raise BadOption(
            f"{place or cls.__name__}: {redact(problem, secrets)}",
            option=place,
            hint=redact(hint, secrets),
            backend=self._backend,
        )

    def value(self, value: Any, wanted: Any, place: str, *, hidden: bool = False) -> Any:
        """Convert one value, or raise; *hidden* keeps it out of the error."""
        bare = bare_type(wanted)
        origin = get_origin(bare)
        if bare is Any or bare is object:
            return value
        if origin in (Union, types.UnionType):
            return self._union(value, wanted, get_args(bare), place, hidden=hidden)
        if bare is Secret:
            return self._secret(value, wanted, place)
        if isinstance(value, Secret):
            # Given in code for an option that is not secret; its text stays out of errors.
            return self.value(value.reveal(), wanted, place, hidden=True)
        if dataclasses.is_dataclass(bare) and is_class(bare):
            if isinstance(value, bare):
                return value
            value = structured(value)
            if isinstance(value, Mapping):
                return self.dataclass(bare, cast("Mapping[str, Any]", value), place)
            raise self._bad(value, wanted, place, hidden=hidden)
        if origin in (tuple, list, frozenset, set, Sequence):
            return self._items(value, wanted, place, hidden=hidden)
        if origin in (dict, Mapping) or bare in (dict, Mapping):
            return self._table(value, wanted, place, hidden=hidden)
        if bare is str and isinstance(value, Mapping):
            return self._reference(cast("Mapping[str, Any]", value), wanted, place).reveal()
        return self._leaf(value, wanted, place, hidden=hidden)

    def _leaf(self, value: Any, wanted: Any, place: str, *, hidden: bool) -> Any:
        bare = bare_type(wanted)
        if bare is bool and isinstance(value, str):
            word = value.strip().lower()
            if word in _TRUE:
                return True
            if word in _FALSE:
                return False
            raise self._bad(value, wanted, place, hidden=hidden)
        if is_class(bare):
            if issubclass(bare, Path):
                if isinstance(value, (str, Path)) and str(value):
                    return bare(value).expanduser()
                raise self._bad(value, wanted, place, hidden=hidden)
            if bare is bytes and isinstance(value, (str, bytes)):
                return value.encode() if isinstance(value, str) else value
            if issubclass(bare, enum.Enum) and isinstance(value, bare):
                return value
            if not is_plain(bare):
                # Something that only code can give, an ssl.SSLContext for instance.
                if isinstance(value, bare):
                    return value
                raise self._bad(value, wanted, place, hidden=hidden)
        failed = False
        made: Any = None
        try:
            made = msgspec.convert(value, wanted, strict=False)
        except (msgspec.ValidationError, TypeError, ValueError):
            failed = True
        if failed or (isinstance(made, float) and not math.isfinite(made)):
            raise self._bad(value, wanted, place, hidden=hidden)
        return made

    def _union(
        self, value: Any, wanted: Any, members: tuple[Any, ...], place: str, *, hidden: bool
    ) -> Any:
        others = [member for member in members if member is not types.NoneType]
        if len(others) < len(members) and (
            value is None
            or (
                isinstance(value, str)
                and value.strip().lower() in ("none", "null")
                and not any(accepts_text(member) for member in others)
            )
        ):
            return None
        if len(others) == 1:
            return self.value(value, others[0], place, hidden=hidden)
        if any(bare_type(member) is bool for member in others):
            # 1 is the number where a number is legal as well.
            word = value.strip().lower() if isinstance(value, str) else value
            if isinstance(word, str) and word in (_TRUE | _FALSE) - {"0", "1"}:
                return word in _TRUE
            if isinstance(value, bool):
                return value
            others = [member for member in others if bare_type(member) is not bool]
        hidden = hidden or is_secret(wanted)
        for member in others:
            with_failure = False
            made: Any = None
            try:
                made = self.value(value, member, place, hidden=hidden)
            except BadOption:
                with_failure = True
            if not with_failure:
                return made
        raise self._bad(value, wanted, place, hidden=hidden)

    def _secret(self, value: Any, wanted: Any, place: str) -> Secret:
        if isinstance(value, Secret):
            return value
        if isinstance(value, str):
            return Secret(value)
        if isinstance(value, Mapping):
            return self._reference(cast("Mapping[str, Any]", value), wanted, place)
        raise self._bad(value, wanted, place, hidden=True)

    def _reference(self, value: Mapping[str, Any], wanted: Any, place: str) -> Secret:
        if self._resolve is None:
            raise self._bad(value, wanted, place, hidden=True)
        return self._resolve(value, place)

    def _items(self, value: Any, wanted: Any, place: str, *, hidden: bool) -> Any:
        bare = bare_type(wanted)
        origin: Any = get_origin(bare)
        items = get_args(bare)
        value = structured(value)
        if isinstance(value, str):
            parts: list[Any] = [part.strip() for part in value.split(",")] if value else []
        elif is_iterable(value) and not isinstance(value, (bytes, Mapping)):
            parts = list(value)
        else:
            raise self._bad(value, wanted, place, hidden=hidden)
        if origin is tuple and not (len(items) == 2 and items[1] is Ellipsis):
            if len(parts) != len(items):
                raise self._bad(value, wanted, place, hidden=hidden)
            kinds: Sequence[Any] = items
        else:
            kinds = [items[0]] * len(parts)
        made = [
            self.value(part, kind, f"{place}[{index}]", hidden=hidden)
            for index, (part, kind) in enumerate(zip(parts, kinds, strict=True))
        ]
        rebuild = cast("Callable[[Iterable[Any]], Any]", tuple if origin is Sequence else origin)
        return rebuild(made)

    def _table(self, value: Any, wanted: Any, place: str, *, hidden: bool) -> dict[str, Any]:
        value = structured(value)
        if not is_table(value):
            raise self._bad(value, wanted, place, hidden=hidden)
        arguments = get_args(bare_type(wanted))
        key_type, value_type = arguments if len(arguments) == 2 else (str, Any)
        return {
            self.value(key, key_type, f"{place} (a key)"): self.value(
                item, value_type, f"{place}.{_toml_key(str(key))}", hidden=hidden
            )
            for key, item in value.items()
        }

    def _bad(self, value: Any, wanted: Any, place: str, *, hidden: bool) -> BadOption:
        hidden = hidden or is_secret(wanted)
        return BadOption(
            f"{place}: expected {describe_type(wanted)}, got {_shown(value, hidden=hidden)}",
            option=place,
            hint=_nearest(value, wanted) if not hidden else "",
            backend=self._backend,
        )


def structured(value: Any) -> Any:
    """Read text that looks like a TOML list or table as one; else return it as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith(("[", "{"))):
        return value
    try:
        return tomllib.loads(f"value = {value.strip()}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return value


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else f'"{key}"'


def _shown(value: Any, *, hidden: bool) -> str:
    match value:
        case None | bool() | int() | float() if not hidden:
            return repr(value)
        case str() if not hidden:
            text = mask_url(value)
            return repr(text if len(text) <= 60 else f"{text[:60]}…")
        case str():
            return "a text that is not shown"
        case Mapping():
            return "a table"
        case list() | tuple() | set() | frozenset():
            return "a list"
        case _:
            return f"a value of type {type(cast('object', value)).__name__}"


def _nearest(value: Any, wanted: Any) -> str:
    choices = [choice for part in members(wanted) for choice in choices_of(part)]
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value.lower(), choices, 1)
    return f"did you mean {near[0]!r}?" if near else ""
