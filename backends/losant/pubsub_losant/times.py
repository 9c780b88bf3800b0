"""Times: as a program gives them, as the wire has them, and as the platform reads them; no I/O.

On the wire a time is a number (milliseconds since 1970; seconds below 1e12; relative
milliseconds when negative), text, or extended JSON: ``{"$date": "2016-06-01T01:09:51.145Z"}``.

Sources: Losant's documentation of device state; the sources of the Python (``losant-mqtt``
1.2.1), JavaScript and Ruby clients for what they send and accept.
"""

from __future__ import annotations

import calendar
import math
import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeAlias, cast

__all__ = [
    "FUTURE_LIMIT",
    "PAST_LIMIT",
    "TimeLike",
    "decode_extended",
    "epoch_ms",
    "format_date",
    "from_epoch_ms",
    "platform_time",
    "read_date",
    "resolve_time",
    "within_limits",
]

TimeLike: TypeAlias = datetime | time.struct_time | int | float | str | dict[str, str] | None
"""The forms in which a program may give the time of a state."""

PAST_LIMIT: Final = 30 * 86_400_000
"""A state that is older by so many milliseconds is ignored."""

FUTURE_LIMIT: Final = 86_400_000
"""A state that is ahead by so many milliseconds is ignored."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_MS_FROM: Final = 1e12
"""Numbers from here on are milliseconds, smaller ones seconds."""

_DATE: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)"
    r"(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d+))?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?)?",
    re.ASCII,
)


# --- from a program to the wire -------------------------------------------------------


def epoch_ms(when: datetime) -> int:
    """Return milliseconds since 1970, rounded down; a time without a zone is UTC."""
    aware = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MILLISECOND


def from_epoch_ms(ms: int) -> datetime:
    """Return the moment, in UTC.

    Raises:
        OverflowError: It is not in the years 1 to 9999.
    """
    return _EPOCH + timedelta(milliseconds=ms)


def format_date(when: datetime) -> str:
    """Return ISO 8601 in UTC with exactly three digits of fraction, as JavaScript does."""
    aware = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return f"{aware.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"


def platform_time(time_like: Any, now: int) -> int | str | dict[str, str]:
    """Return the wire's form of a time that a program gave.

    Args:
        time_like: None for now; a `datetime` (without a zone it is UTC); what
            `time.gmtime` and its like return; seconds or milliseconds as a number; or what
            the platform reads by itself: text, a negative number, ``{"$date": text}``.
        now: Milliseconds since 1970.

    Raises:
        TypeError: That is no time.
        ValueError: Not a number, or before 1970, which the platform takes as relative.
    """
    if time_like is None:
        return now
    if isinstance(time_like, bool):
        raise TypeError("a time is not True or False")
    if isinstance(time_like, int):
        return time_like or now
    if isinstance(time_like, float):
        return _from_float(time_like, now)
    if isinstance(time_like, str):
        return time_like or now
    if isinstance(time_like, datetime):
        return _after_1970(epoch_ms(time_like))
    if isinstance(time_like, time.struct_time):
        return _after_1970(_from_struct(time_like) * 1000)
    if isinstance(time_like, dict):
        found = cast("dict[str, str]", time_like)
        if list(found) == ["$date"] and isinstance(found["$date"], str):  # pyright: ignore[reportUnnecessaryIsInstance] # users pass anything
            return found
        raise TypeError('of dictionaries only {"$date": text} is a time')
    raise TypeError(
        f"{type(time_like).__name__} is no time; give a datetime, a number, text or None for now"
    )


def _after_1970(ms: int) -> int:
    if ms < 0:
        raise ValueError("a time before 1970: the platform takes negative numbers as relative")
    return ms


def _from_float(value: float, now: int) -> int:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no time")
    if not value:
        return now
    return round(value * 1000) if 0 < value < _MS_FROM else round(value)


def _from_struct(value: time.struct_time) -> int:
    offset = cast("int | None", value.tm_gmtoff)  # a plain tuple of nine has none
    return int(time.mktime(value)) if offset is None else calendar.timegm(value) - offset


# --- from the wire --------------------------------------------------------------------


def read_date(text: str) -> datetime | None:
    """Return the moment an ISO 8601 text names, in UTC; None if it names none.

    A fraction may have any number of digits and is cut to microseconds. Without a zone it
    is UTC.
    """
    found = _DATE.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second, fraction, zone = found.groups()
    try:
        moment = datetime(
            int(year),
            int(month),
            int(day),
            int(hour or 0),
            int(minute or 0),
            int(second or 0),
            int((fraction or "0")[:6].ljust(6, "0")),
            tzinfo=UTC,
        )
        if zone and zone != "Z":
            hours, minutes = int(zone[1:3]), int(zone[3:].lstrip(":") or 0)
            if hours > 23 or minutes > 59:
                return None
            away = timedelta(hours=hours, minutes=minutes)
            moment = moment + away if zone[0] == "-" else moment - away
    except (ValueError, OverflowError):
        return None
    return moment


def decode_extended(value: Any) -> datetime | None:
    """Return the moment that the value of a ``$date`` names, in UTC; None if it names none."""
    if isinstance(value, str):
        return read_date(value)
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        digits = inner.get("$numberLong") if len(inner) == 1 else None
        if not isinstance(digits, str) or not re.fullmatch(r"-?[0-9]{1,18}", digits):
            return None
        value = int(digits)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    try:
        return from_epoch_ms(value)
    except OverflowError:
        return None


def resolve_time(value: Any, now: int) -> int:
    """Return the milliseconds since 1970 that the platform stores for a received ``time``.

    Absent (None) or unreadable is *now*; numbers below zero are relative to it.
    """
    if isinstance(value, dict):
        wrapped = cast("dict[str, Any]", value)
        moment = decode_extended(wrapped["$date"]) if list(wrapped) == ["$date"] else None
        return now if moment is None else epoch_ms(moment)
    if isinstance(value, str):
        moment = read_date(value.strip()) or _read_mail_date(value)
        return now if moment is None else epoch_ms(moment)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return now
    if value < 0:
        return now + round(value)
    return round(value * 1000) if value < _MS_FROM else round(value)


def _read_mail_date(text: str) -> datetime | None:
    """Read a date as in RFC 2822, which JavaScript reads as well."""
    try:
        moment = parsedate_to_datetime(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def within_limits(ms: int, now: int) -> bool:
    """Whether the platform keeps a state of that time: not too old, not too far ahead."""
    return now - PAST_LIMIT <= ms <= now + FUTURE_LIMIT
