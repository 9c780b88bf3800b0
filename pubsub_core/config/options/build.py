"""Options as one dataclass: from a URL, from TOML and from arguments, to help and schema.

`parse_url` splits a URL into an `Address` and the options in its query. `build` makes the
frozen dataclass of options from texts (URL, environment) and native values (TOML, Python)
alike. `field_help` and `json_schema` describe the same dataclass to people and to editors.

The conversion of single values is msgspec's, in its lax mode; what is added here are places,
suggestions, secrets, nested dataclasses with strict keys, and the words that people write
for a boolean. No error holds a secret or any part of a URL's credentials.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

import msgspec

from .errors import BadOption, PubSubError
from .interfaces import Address
from .secrets import Secret, looks_secret, mask_url, redact
from .settings import BusOptions

__all__ = [
    "FieldHelp",
    "Resolve",
    "accepts_table",
    "accepts_text",
    "build",
    "clashes",
    "describe_type",
    "field_help",
    "field_types",
    "inner_type",
    "is_hidden",
    "is_secret",
    "json_schema",
    "parse_url",
    "reference_schema",
    "split",
    "structured",
    "unknown_option",
]

T = TypeVar("T")

Resolve = Callable[[Mapping[str, Any], str], Secret]
"""Turns a reference such as ``{env = "NAME"}`` at a place into the secret."""

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_RESERVED = "url"

# --- URLs ------------------------------------------------------------------------------

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENCODE = (
    "percent-encode what is special in a user name or password "
    "(/ is %2F, @ is %40, # is %23, ? is %3F, % is %25)"
)


class _Fault(NamedTuple):
    """What is wrong with a URL.

    It is returned, not raised: the frames and the context of an exception would lead to the
    URL with its password.
    """

    problem: str
    hint: str = _ENCODE
    option: str = "url"


def parse_url(url: str) -> tuple[Address, dict[str, str]]:
    """Split a URL into where the broker is and the options of its query.

    The scheme becomes lower case; the host keeps its case and loses the brackets of an IPv6
    literal. User, password, path and query are percent-decoded; ``+`` stays ``+``.

    Raises:
        BadOption: It is no URL. The text shows no part that can hold a credential.
    """
    parsed = _parse_url(url)
    if isinstance(parsed, _Fault):
        raise BadOption(parsed.problem, hint=parsed.hint, option=parsed.option)
    return parsed


def _parse_url(url: str) -> tuple[Address, dict[str, str]] | _Fault:
    found = _URL.fullmatch(url)
    if found is None:
        return _Fault("this is no URL", "write SCHEME://HOST:PORT, for example mqtt://localhost")
    scheme = found[1].lower()
    rest = found[2]
    label = f"the {scheme}:// URL"
    if re.search(r"[\s\x00-\x1f\x7f]", rest):
        return _Fault(f"{label} has a space or control character", "percent-encode it: %20")
    if "#" in rest:
        return _Fault(f"{label} has a fragment (#…), which has no meaning here")
    if _BAD_PERCENT.search(rest):
        return _Fault(f"{label} has a % that two hexadecimal digits do not follow")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    # "user:12/34@host" would otherwise be host "user", port 12 and a path with the password.
    if authority and "@" in path:
        return _Fault(f"{label} has an @ after the first /")
    try:
        address = _parse_authority(scheme, label, authority, _unquote(slash + path))
        options = _parse_query(label, query)
    except UnicodeDecodeError:
        return _Fault(f"{label} has percent-encoded bytes that are not UTF-8")
    if isinstance(address, _Fault):
        return address
    if isinstance(options, _Fault):
        return options
    return address, options


def _unquote(text: str) -> str:
    if "%" not in text:
        return text
    # urllib's unquote replaces bad UTF-8; here it is an error.
    data = re.sub(rb"%([0-9A-Fa-f]{2})", lambda hit: bytes.fromhex(hit[1].decode()), text.encode())
    return data.decode()


def _parse_authority(scheme: str, label: str, authority: str, path: str) -> Address | _Fault:
    userinfo, at, location = authority.rpartition("@")
    user, colon, password = userinfo.partition(":")
    if location.startswith("["):
        host, bracket, after = location[1:].partition("]")
        if not bracket or ":" not in host:
            return _Fault(f"{label} has a [ without an IPv6 address and ]", "write [::1]:1883")
        if after and not after.startswith(":"):
            return _Fault(f"{label} has text between ] and the port", "write [::1]:1883")
        port_text = after[1:] if after else None
    else:
        host, separator, port_text = location.partition(":")
        if ":" in port_text:
            return _Fault(
                f"{label} has more than one : in its host", "write an IPv6 address as [::1]"
            )
        port_text = port_text if separator else None
    port = None
    if port_text:
        if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5):
            return _Fault(f"{label} has a port that is no number")
        port = int(port_text)
        if not 1 <= port <= 65535:
            return _Fault(f"{label} has port {port}", "a port is a number from 1 to 65535")
    if port is not None and not host:
        return _Fault(f"{label} has a port and no host", f"write {scheme}://HOST:{port}")
    host, user, password = _unquote(host), _unquote(user), _unquote(password)
    if _CONTROL.search(host + user + path):
        return _Fault(f"{label} has a control character in user name, host or path", "remove it")
    return Address(
        scheme=scheme,
        host=host,
        port=port,
        path=path,
        username=user if at and user else None,
        password=Secret(password) if colon else None,
    )


def _parse_query(label: str, query: str) -> dict[str, str] | _Fault:
    options: dict[str, str] = {}
    for number, pair in enumerate(query.split("&") if query else (), 1):
        key, equals, value = pair.partition("=")
        # Neither text is shown: without a "=", it may be the tail of a password with a "?".
        if not equals:
            return _Fault(f"option {number} of {label} has no value", "write ?NAME=VALUE&…")
        if not key:
            return _Fault(f"option {number} of {label} has no name", "write ?NAME=VALUE&…")
        key = _unquote(key)
        if key in options:
            return _Fault(f"{label} has {key!r} twice", "give each option once", f"?{key}=")
        options[key] = _unquote(value)
    return options


# --- building --------------------------------------------------------------------------


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


def clashes(cls: type[Any]) -> tuple[str, ...]:
    """Return the options of a backend that every bus has too, which would be ambiguous."""
    return tuple(name for name in field_types(cls) if name in {*_bus_names(), _RESERVED})


def _bus_names() -> Iterable[str]:
    return field_types(BusOptions)


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
    bus = {key: value for key, value in values.items() if key in _bus_names()}
    own = {key: value for key, value in values.items() if key in field_types(cls)}
    for key in values:
        if key not in bus and key not in own:
            raise unknown_option(
                key,
                [*field_types(cls), *_bus_names()],
                place=_place(key, where, places),
                backend=backend,
            )
    return bus, own


def unknown_option(
    key: str, legal: Iterable[str], *, place: str, backend: str = "", what: str = "option"
) -> BadOption:
    """Make the error for a key that nobody knows; its value is not shown."""
    names = list(legal)
    near = difflib.get_close_matches(key, names, 1, 0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    owner = f" of {backend}" if backend else ""
    return BadOption(
        f"{place} is no {what}{owner}",
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
    """Make the dataclass *cls* from *values*; what is not given keeps its default.

    Texts are converted to what a field wants: numbers, booleans (true, yes, on, 1 and their
    opposites), enumerations, paths, lists (``a,b`` or ``["a", "b"]``) and tables
    (``{name = "value"}``, both as in TOML). ``none`` stands for None where None is legal and
    text is not. Native values must fit. A field of
    type `Secret` takes text, a `Secret` or a reference; a field of type ``str`` takes a
    reference too.

    Args:
        cls: A dataclass; nested dataclasses are built from tables, with strict keys too.
        values: By field name.
        where: What stands before the key in errors, e.g. ``bus.main``.
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
        bare = _bare(wanted)
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
        if dataclasses.is_dataclass(bare) and _is_class(bare):
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
        bare = _bare(wanted)
        if bare is bool and isinstance(value, str):
            word = value.strip().lower()
            if word in _TRUE:
                return True
            if word in _FALSE:
                return False
            raise self._bad(value, wanted, place, hidden=hidden)
        if _is_class(bare):
            if issubclass(bare, Path):
                if isinstance(value, (str, Path)) and str(value):
                    return bare(value).expanduser()
                raise self._bad(value, wanted, place, hidden=hidden)
            if bare is bytes and isinstance(value, (str, bytes)):
                return value.encode() if isinstance(value, str) else value
            if issubclass(bare, enum.Enum) and isinstance(value, bare):
                return value
            if not _is_plain(bare):
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
        if any(_bare(member) is bool for member in others):
            # 1 is the number where a number is legal as well.
            word = value.strip().lower() if isinstance(value, str) else value
            if isinstance(word, str) and word in (_TRUE | _FALSE) - {"0", "1"}:
                return word in _TRUE
            if isinstance(value, bool):
                return value
            others = [member for member in others if _bare(member) is not bool]
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
        bare = _bare(wanted)
        origin: Any = get_origin(bare)
        items = get_args(bare)
        value = structured(value)
        if isinstance(value, str):
            parts: list[Any] = [part.strip() for part in value.split(",")] if value else []
        elif _is_iterable(value) and not isinstance(value, (bytes, Mapping)):
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
        if not _is_table(value):
            raise self._bad(value, wanted, place, hidden=hidden)
        arguments = get_args(_bare(wanted))
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


def _bare(wanted: Any) -> Any:
    """Return a type without its annotations."""
    return get_args(wanted)[0] if get_origin(wanted) is Annotated else wanted


# Guards rather than isinstance, after which pyright knows a class of unknown parameters.
def _is_class(value: Any) -> TypeGuard[type[Any]]:
    return isinstance(value, type)


def _is_table(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def _is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    return isinstance(value, Iterable)


def _is_plain(bare: type[Any]) -> bool:
    return bare in (bool, int, float, str, bytes, type(None)) or issubclass(bare, enum.Enum)


def _parts(wanted: Any) -> tuple[Any, ...]:
    bare = _bare(wanted)
    return get_args(bare) if get_origin(bare) in (Union, types.UnionType) else (wanted,)


def is_secret(wanted: Any) -> bool:
    """Return whether a `Secret` is in that type, also in a nested dataclass or table."""
    bare = _bare(wanted)
    if bare is Secret:
        return True
    if _is_class(bare) and dataclasses.is_dataclass(bare):
        return any(is_secret(inner) for inner in field_types(bare).values())
    return any(is_secret(inner) for inner in get_args(bare) if inner is not Ellipsis)


def inner_type(wanted: Any, key: str | None = None) -> tuple[Any, bool]:
    """Return the type of what is under *key* in a table (of an item, for None).

    The second value says whether it stays hidden for its name or declaration. The type is
    None where it is not known.
    """
    hidden = key is not None and looks_secret(key)
    for part in _parts(wanted):
        bare = _bare(part)
        arguments = get_args(bare)
        if key is None:
            if get_origin(bare) in (tuple, list, set, frozenset, Sequence):
                return arguments[0], hidden
        elif _is_class(bare) and dataclasses.is_dataclass(bare):
            declared = [field for field in dataclasses.fields(bare) if field.name == key]
            if declared:
                return field_types(bare).get(key), hidden or not declared[0].repr
        elif get_origin(bare) in (dict, Mapping) and len(arguments) == 2:
            return arguments[1], hidden
    return None, hidden


def accepts_text(wanted: Any) -> bool:
    """Return whether any text is a legal value of that type."""
    return any(_bare(part) in (str, bytes, Secret, Any, object) for part in _parts(wanted))


def accepts_table(wanted: Any) -> bool:
    """Return whether a table or a list is a legal value of that type."""

    def one(bare: Any) -> bool:
        return (
            get_origin(bare) in (tuple, list, set, frozenset, Sequence, dict, Mapping)
            or bare in (dict, list, tuple)
            or (_is_class(bare) and dataclasses.is_dataclass(bare))
        )

    return any(one(_bare(part)) for part in _parts(wanted))


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


def _choices(wanted: Any) -> list[str]:
    bare = _bare(wanted)
    if get_origin(bare) is Literal:
        return [str(choice) for choice in get_args(bare)]
    if _is_class(bare) and issubclass(bare, enum.Enum):
        return [str(member.value) for member in bare]
    return []


def _nearest(value: Any, wanted: Any) -> str:
    choices = [choice for part in _parts(wanted) for choice in _choices(part)]
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value.lower(), choices, 1)
    return f"did you mean {near[0]!r}?" if near else ""


# --- describing ------------------------------------------------------------------------

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
    """Say what is expected, in words: ``a whole number from 0 to 2``."""
    bare = _bare(wanted)
    origin = get_origin(bare)
    arguments = get_args(bare)
    if origin in (Union, types.UnionType):
        parts = [part for part in arguments if part is not types.NoneType]
        return " or ".join(dict.fromkeys(describe_type(part) for part in parts))
    if bare in _WORDS:
        return _WORDS[bare] + _bounds(wanted)
    choices = _choices(bare)
    if choices:
        return f"one of {', '.join(choices)}" if len(choices) > 1 else repr(choices[0])
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return f"a list of {len(arguments)}: {', '.join(describe_type(a) for a in arguments)}"
    if origin in (tuple, list, set, frozenset, Sequence):
        return f"a list, each item {describe_type(arguments[0])}"
    if origin in (dict, Mapping) or bare in (dict, Mapping):
        return "a table" + (f", each value {describe_type(arguments[1])}" if arguments else "")
    if _is_class(bare):
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

    In order, but what it inherits comes last.
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
    bare = _bare(wanted)
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
    if _is_class(bare) and dataclasses.is_dataclass(bare):
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
    if _is_class(bare):
        if issubclass(bare, Path) or bare is bytes:
            return {"type": "string"}
        if not _is_plain(bare):
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
        case _ if _is_table(value):
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
