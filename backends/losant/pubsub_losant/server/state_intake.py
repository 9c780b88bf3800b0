"""State messages: their shape, their time, and the types of attributes; no I/O.

A message is one state or an array of them. Values that do not fit are left out, and the reasons
are returned: a device gets no answer, so a broker keeps them for its user. How values are converted
to the type of their attribute is decided here; the platform documents the types only.

Sources: Losant's JSON schema of device state, and its documentation of attributes (names, types,
64 KiB of text) and of state times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, TypeAlias, cast

import msgspec

from pubsub_core.keyed import BoundedCache
from pubsub_losant.times import FUTURE_LIMIT, PAST_LIMIT, resolve_time

from .access import AttributeType

__all__ = ["MAX_BATCH", "MAX_TEXT", "Intake", "Value", "convert", "number_text", "read_states"]

Value: TypeAlias = str | float | int | bool

MAX_BATCH: Final = 1000
"""States in one message."""

MAX_TEXT: Final = 65_536
"""Bytes of a text attribute."""

_NAME: Final = re.compile(r"[0-9a-zA-Z_-]{1,255}", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_MAX_DIGITS: Final = 400
_WHOLE: Final = 2**63
_MAX_NAMES: Final = 4096
_names: Final = BoundedCache[str, bool](_MAX_NAMES)


class _State(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One state as it travels."""

    data: dict[str, Any]
    time: Any = None
    flow_version: str | None = msgspec.field(name="flowVersion", default=None)
    meta: Any = None


@dataclass(slots=True)
class Intake:
    """One state that was accepted.

    Attributes:
        ms: When it was, in milliseconds since 1970.
        data: The attributes that are kept; may be empty.
        dropped: Names of attributes that were not kept.
    """

    ms: int
    data: dict[str, Value]
    meta: Any = None
    flow_version: str | None = None
    dropped: tuple[str, ...] = ()


_decode_one: Final = msgspec.json.Decoder(_State).decode
_decode_any: Final = msgspec.json.Decoder(Any).decode


def read_states(
    payload: bytes, now: int, attributes: Mapping[str, AttributeType] | None = None
) -> tuple[list[Intake], list[str]]:
    """Return the states in a message, and why others in it were left out.

    Args:
        payload: The bytes of the message.
        now: Milliseconds since 1970.
        attributes: Types by attribute, or None to take every attribute.
    """
    try:
        return [_take(_decode_one(payload), now, attributes)], []
    except _LeftOut as exc:
        return [], [str(exc)]
    except msgspec.ValidationError:
        pass  # an array, or a mistake that the slow way finds
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [], ["it is no JSON"]
    try:
        found = _decode_any(payload)
    except msgspec.ValidationError:
        return [], ["a number is out of range"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return [], ["it is no JSON"]
    items = cast("list[object]", found) if isinstance(found, list) else [found]
    if not 1 <= len(items) <= MAX_BATCH:
        return [], [f"an array of {len(items)} states; 1 to {MAX_BATCH} are allowed"]
    states: list[Intake] = []
    reasons: list[str] = []
    for item in items:
        try:
            states.append(_take(msgspec.convert(item, _State), now, attributes))
        except (_LeftOut, msgspec.ValidationError) as exc:
            reasons.append(_reason(exc))
    return states, reasons


class _LeftOut(Exception):
    """A state is not taken."""


def _reason(error: Exception) -> str:
    if isinstance(error, _LeftOut):
        return str(error)
    # Field names of the peer may stand in msgspec's text; they are cut, and escaped for logs.
    return f"it has not the shape of a state: {ascii(str(error))[1:-1][:200]}"


def _take(state: _State, now: int, attributes: Mapping[str, AttributeType] | None) -> Intake:
    ms = now if state.time is None else resolve_time(state.time, now)
    if ms < now - PAST_LIMIT:
        raise _LeftOut("it is older than 30 days")
    if ms > now + FUTURE_LIMIT:
        raise _LeftOut("it is more than a day ahead")
    if state.flow_version is not None and not 1 <= len(state.flow_version) <= 255:
        raise _LeftOut("its flowVersion has not 1 to 255 characters")
    data: dict[str, Value] = {}
    dropped: list[str] = []
    for name, value in state.data.items():
        kept: Value | None = None
        if _names.get(name) or _is_name(name):
            if attributes is None:
                kept = value if type(value) in (bool, float) else convert(value, None)
            elif name in attributes:
                kept = convert(value, attributes[name])
        if kept is None:
            dropped.append(name)
        else:
            data[name] = kept
    return Intake(ms, data, state.meta, state.flow_version, tuple(dropped))


def _is_name(name: str) -> bool:
    """Whether an attribute may have that name; good names are remembered, in bounds."""
    if _NAME.fullmatch(name) is None:
        return False
    return _names.keep(name, True)


def convert(value: Any, kind: AttributeType | None) -> Value | None:
    """Return a received value as its attribute's type has it; None when it has no such form.

    Without a type numbers, booleans and texts stay as they are.

    >>> convert("21.5", "number"), convert(21.0, "string"), convert("True", "boolean")
    (21.5, '21', True)
    """
    if isinstance(value, dict | list) or value is None:
        return None
    match kind:
        case "number":
            return _number(value)
        case "boolean":
            return _boolean(value)
        case "string":
            return _text(_spelled(value))
        case "gps" | "blob":
            return value if isinstance(value, str) else None
        case None:
            return _text(value) if isinstance(value, str) else _plain(value)


def _plain(value: Any) -> Value | None:
    return value if isinstance(value, bool) else _number(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip(" \t\r\n")
        if len(text) > _MAX_DIGITS or _NUMBER.fullmatch(text) is None:
            return None
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if isinstance(value, int) and not -_WHOLE <= value < _WHOLE:
        try:
            value = float(value)
        except OverflowError:
            return None
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    return None


def _boolean(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return bool(value) if value in (0, 1) else None


def _spelled(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    number = _number(value)
    return None if number is None else number_text(number)


def _text(text: str | None) -> str | None:
    if text is None or len(text) > MAX_TEXT or len(text.encode()) > MAX_TEXT:
        return None
    return text


def number_text(number: float) -> str:
    """Return the shortest decimal text of a number, as JavaScript spells it.

    >>> number_text(21.0), number_text(0.00001), number_text(1e21), number_text(1.5e-7)
    ('21', '0.00001', '1e+21', '1.5e-7')
    """
    if isinstance(number, int):
        return str(number)
    size = abs(number)
    if size >= 1e21 or 0 < size < 1e-6:
        mantissa, _, exponent = repr(number).partition("e")
        sign = "-" if exponent.startswith("-") else "+"
        return f"{mantissa.removesuffix('.0')}e{sign}{exponent.lstrip('+-').lstrip('0')}"
    if number.is_integer():
        return str(int(number))
    return repr(number) if size >= 1e-4 or not size else f"{Decimal(repr(number)):f}"
