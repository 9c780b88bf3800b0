"""Commands: read and written as the platform does; no I/O.

A command is a JSON object with ``name``, and maybe ``payload`` and ``time``. Dates come as
extended JSON and become aware datetimes in UTC.

Sources: Losant's documentation of device commands and its JSON schema; losant-mqtt 1.2.1 and
losant-mqtt-js for the forms of ``$date`` and ``$undefined``.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final, cast

from .states import extended
from .times import decode_extended, format_date, from_epoch_ms

__all__ = ["ABSENT", "BadCommand", "encode_command", "parse_command"]


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()
"""A command without payload, which is not the same as the payload None."""


class BadCommand(ValueError):
    """A payload that is no command. The text says why and holds nothing of it."""


def _refuse_constant(name: str) -> Any:
    raise BadCommand(f"{name} is not JSON")


def _revive(found: dict[str, Any]) -> Any:
    if len(found) == 1:
        if "$date" in found:
            moment = decode_extended(found["$date"])
            return found if moment is None else moment
        if found.get("$undefined") is True:
            return None
    return found


def parse_command(payload: bytes) -> dict[str, Any]:
    """Return the command in *payload*; no key is required of it.

    ``{"$date": …}`` at any depth below the top becomes a datetime in UTC, and
    ``{"$undefined": true}`` None. A value that is no date stays as it is.

    Raises:
        BadCommand: It is no JSON object.
    """
    try:
        text = payload.decode()
        found: Any = json.loads(text, object_hook=_revive, parse_constant=_refuse_constant)
        if not isinstance(found, dict):
            found = json.loads(text)  # the top itself is not to be converted
    except BadCommand:
        raise
    except (ValueError, RecursionError) as exc:
        raise BadCommand(f"it is no JSON: {type(exc).__name__}") from None
    if not isinstance(found, dict):
        raise BadCommand("it is JSON, but no object")
    return cast("dict[str, Any]", found)


def encode_command(name: str, payload: Any = ABSENT, time: datetime | int | None = None) -> bytes:
    """Return the bytes the platform sends: that order, compact, a time with three digits.

    Args:
        name: 1 to 255 characters.
        payload: Any JSON value; left out when `ABSENT`.
        time: A datetime, or milliseconds since 1970; left out when None.

    Raises:
        ValueError: The name has not 1 to 255 characters, or a number is not finite.
        TypeError: The payload holds a value that JSON has no form for.
    """
    if not 1 <= len(name) <= 255:
        raise ValueError(f"a command's name has 1 to 255 characters, not {len(name)}")
    body: dict[str, Any] = {"name": name}
    if payload is not ABSENT:
        body["payload"] = payload
    if time is not None:
        moment = from_epoch_ms(time) if isinstance(time, int) else time
        body["time"] = {"$date": format_date(moment)}
    try:
        return _dump(body, ascii_only=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 cannot carry
        return _dump(body, ascii_only=True).encode()


def _dump(body: dict[str, Any], *, ascii_only: bool) -> str:
    return json.dumps(
        body, ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":"), default=extended
    )
