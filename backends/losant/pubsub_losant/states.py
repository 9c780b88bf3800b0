"""State as the platform wants it, byte for byte as ``losant-mqtt`` sends it; no I/O.

One state is ``{"data": {…}, "time": …}``; several may travel as an array in one message.

Sources: losant-mqtt 1.2.1, ``device.py`` (keys sorted, ASCII, its separators); Losant's JSON
schema of device state (``flowVersion``, ``meta``); losant-mqtt-js for dates as values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from .times import format_date, platform_time

__all__ = ["encode_state", "extended", "join_states"]


def extended(value: object) -> object:
    """Return the form for a value that JSON does not know: ``{"$date": …}`` for a datetime.

    Raises:
        TypeError: There is nothing for it.
    """
    if isinstance(value, datetime):
        return {"$date": format_date(value)}
    raise TypeError(f"{type(value).__name__} cannot be sent; use numbers, text, booleans")


_encode = json.JSONEncoder(sort_keys=True, allow_nan=False, default=extended).encode


def encode_state(
    state: Mapping[str, Any],
    time_like: Any = None,
    *,
    now: int,
    flow_version: str | None = None,
    meta: Any = None,
) -> str:
    """Return the text of one state.

    Args:
        state: Attribute names and values.
        time_like: See `platform_time`.
        now: Milliseconds since 1970.
        flow_version: Of the workflow that is to take it; left out when None.
        meta: Any JSON value that travels beside it; left out when None.

    Raises:
        TypeError: *state* is no mapping, or holds a value that JSON has no form for.
        ValueError: A value is NaN or infinite, or the time is impossible.
    """
    if not isinstance(state, dict):
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] # users pass anything
            raise TypeError(f"a state is a mapping of names to values, not {type(state).__name__}")
        state = dict(state)
    moment = platform_time(time_like, now)
    if flow_version is None and meta is None and type(moment) is int:
        # By far the most common form; the same bytes for half the work.
        return f'{{"data": {_encode(state)}, "time": {moment}}}'
    body: dict[str, Any] = {"time": moment, "data": state}
    if flow_version is not None:
        body["flowVersion"] = flow_version
    if meta is not None:
        body["meta"] = meta
    return _encode(body)


def join_states(states: Iterable[str]) -> str:
    """Return the text of several states that travel in one message."""
    return f"[{', '.join(states)}]"
