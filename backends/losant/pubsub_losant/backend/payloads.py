"""States and commands as a program of the core sees them: JSON that every type can take; no I/O.

A program publishes attributes, ``{"temperature": 21.5}``, or a `DeviceState` that says when they
were measured; what goes on the wire is the same as a `Device` sends. What comes from the wire
is JSON without the platform's extensions: ``{"$date": …}`` becomes RFC 3339 text, which typed
handlers take for a `datetime`, and an array of states becomes one message for each.

Sources: Losant's JSON schemas of device state and of commands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

import msgspec

from pubsub_losant.commands import BadCommand, parse_command
from pubsub_losant.states import encode_state, join_states
from pubsub_losant.times import decode_extended, epoch_ms, from_epoch_ms, read_date, resolve_time

__all__ = [
    "BadState",
    "DeviceCommand",
    "DeviceState",
    "Received",
    "read_command",
    "read_states",
    "write_states",
    "write_will",
]

_MEMBERS: Final = frozenset({"data", "time", "flowVersion", "meta"})
_MARK: Final = b'"$'

_UNWRITABLE: Final = (TypeError, ValueError, OverflowError, RecursionError)


class DeviceState(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"flow_version": "flowVersion"}
):
    """Attributes of a device at one moment.

    Attributes:
        data: Numbers, text and booleans by name.
        time: When it was so, without a zone in UTC; None for now. Numbers are seconds or
            milliseconds since 1970, negative ones milliseconds before now. What is received
            always has a datetime.
        flow_version: Of the workflow that is to take it.
        meta: Any JSON value that travels beside it.
    """

    data: dict[str, Any]
    time: datetime | float | None = None
    flow_version: str | None = None
    meta: Any = None


class DeviceCommand(msgspec.Struct, frozen=True, omit_defaults=True):
    """A command: the platform asks a device to do something.

    Attributes:
        time: When the platform sent it, in UTC.
    """

    name: str
    payload: Any = None
    time: datetime | None = None


class BadState(ValueError):
    """A value that cannot be sent as a state. The text has names of attributes, no values."""


class Received(NamedTuple):
    """One message for the core.

    Attributes:
        ms: Its own time in milliseconds since 1970, or None.
    """

    payload: bytes
    ms: int | None


# --- to the platform --------------------------------------------------------------------


def write_states(payload: bytes, now: int) -> bytes:
    """Return the wire's form of encoded attributes, a `DeviceState`, or a list of them.

    Args:
        payload: JSON.
        now: Milliseconds since 1970, for states without a time.

    Raises:
        BadState: It is something else, or has an attribute that is no number, text or boolean.
    """
    found = _decoded(payload)
    try:
        if isinstance(found, dict):
            return _encoded(found, now).encode()
        states = [_encoded(each, now) for each in found]
    except BadState:
        raise
    except _UNWRITABLE as exc:
        raise BadState(str(exc)) from None
    return join_states(states).encode()


def write_will(payload: bytes) -> bytes:
    """Return the wire's form of one state whose time is that of its arrival.

    Raises:
        BadState: As for `write_states`, or it says a time.
    """
    found = _decoded(payload)
    if not isinstance(found, dict):
        raise BadState("a will is one state")
    body = _members(found)
    if "time" in body:
        raise BadState("a will has the time at which the platform publishes it")
    return json.dumps(body, sort_keys=True, allow_nan=False).encode()


def _decoded(payload: bytes) -> dict[str, Any] | list[dict[str, Any]]:
    try:
        found: Any = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadState("it is no JSON") from None
    if isinstance(found, dict):
        return cast("dict[str, Any]", found)
    if isinstance(found, list) and found:
        items = _list(found)
        if all(isinstance(each, dict) for each in items):
            return cast("list[dict[str, Any]]", found)
    raise BadState("it is JSON, but neither an object nor a list of objects")


def _members(found: dict[str, Any]) -> dict[str, Any]:
    """Return the members of a state; a plain object has its attributes.

    An attribute is never an object, so an object with the key ``data`` that holds one can be
    nothing but a state.
    """
    whole = isinstance(found.get("data"), dict) and found.keys() <= _MEMBERS
    body = found if whole else {"data": found}
    for name, value in body["data"].items():
        if isinstance(value, list) or (isinstance(value, dict) and not _is_extended(value)):
            kind = "a list" if isinstance(value, list) else "an object"
            raise BadState(f"attribute {name[:64]!r} is {kind}, which the platform would drop")
    version = body.get("flowVersion")
    if version is not None and not isinstance(version, str):
        raise BadState("flowVersion is text")
    return body


def _is_extended(value: Any) -> bool:
    """Whether it is ``{"$date": …}`` or ``{"$undefined": true}``, which clients may send."""
    return len(value) == 1 and next(iter(value)) in ("$date", "$undefined")


def _encoded(found: dict[str, Any], now: int) -> str:
    body = _members(found)
    return encode_state(
        body["data"],
        _time_like(body.get("time")),
        now=now,
        flow_version=body.get("flowVersion"),
        meta=body.get("meta"),
    )


def _time_like(value: Any) -> Any:
    # A datetime was made text by the codec. Other text is the platform's to read.
    if isinstance(value, str):
        return read_date(value) or value
    return cast("list[Any]", value)


# --- from the platform --------------------------------------------------------------------


def read_states(payload: bytes, now: int) -> Sequence[Received]:
    """Return one message for each state; anything else comes back as it is.

    Args:
        payload: As it arrived.
        now: Milliseconds since 1970: the time of states without one.
    """
    try:
        found: Any = msgspec.json.decode(payload)
        items = _list(found) if isinstance(found, list) else [found]
        if items and all(isinstance(each, dict) for each in items):
            return [_read_state(each, now) for each in items]
    except (msgspec.DecodeError, *_UNWRITABLE):
        pass
    return (Received(payload, None),)


def _read_state(found: dict[str, Any], now: int) -> Received:
    ms = resolve_time(found.get("time"), now)
    body = {name: _plain(value) for name, value in found.items()}
    body["time"] = from_epoch_ms(ms)
    return Received(msgspec.json.encode(body), ms)


def read_command(payload: bytes) -> Received:
    """Return a command with dates as RFC 3339 text; anything else as it is.

    A command that has no dates but text is not touched.
    """
    try:
        command = parse_command(payload)
        time: Any = command.get("time")
        as_it_is = _MARK not in payload
        if isinstance(time, str):
            time = read_date(time)
        elif isinstance(time, int | float) and time > 1:  # True is no time
            time = command["time"] = from_epoch_ms(resolve_time(time, 0))
            as_it_is = False
        ms = epoch_ms(time) if isinstance(time, datetime) else None
        return Received(payload if as_it_is else msgspec.json.encode(command), ms)
    except (BadCommand, *_UNWRITABLE):
        return Received(payload, None)


def _plain(value: Any) -> Any:
    """Return a value without extended JSON."""
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value)
        if len(found) == 1:
            if "$date" in found:
                moment = decode_extended(found["$date"])
                return found if moment is None else moment
            if found.get("$undefined") is True:
                return None
        return {name: _plain(each) for name, each in found.items()}
    if isinstance(value, list):
        return [_plain(each) for each in _list(value)]
    return cast("list[Any]", value)


def _list(value: Any) -> list[Any]:
    """Return it typed as a list of anything."""
    return cast("list[Any]", value)
