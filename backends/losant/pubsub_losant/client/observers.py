"""Events of a device, and the functions that are called with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

__all__ = ["EVENTS", "Observer", "Observers", "PeripheralCore"]

Observer = Callable[..., Any]
"""Called with the device and the values of the event."""

EVENTS: Final = frozenset(
    {"connect", "reconnect", "close", "command", "disconnect", "error", "throttled", "message"}
)
"""Those of ``losant-mqtt`` are the first four."""


class Observers:
    """Who wants to be told about which event of one device."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._lists: dict[str, list[Observer]] = {}

    def add(self, name: str, observer: Observer) -> None:
        """Add at the end; the same one may be there several times."""
        if self._strict and name not in EVENTS:
            raise ValueError(f"no event {name!r}; there are {', '.join(sorted(EVENTS))}")
        self._lists.setdefault(name, []).append(observer)

    def remove(self, name: str, observer: Observer) -> None:
        """Remove the first such one; ValueError if there is none, nothing for unknown events."""
        if name in self._lists:
            self._lists[name].remove(observer)

    def of(self, name: str) -> tuple[Observer, ...]:
        """Return a copy: an observer may remove itself while all are called."""
        return tuple(self._lists.get(name, ()))


class PeripheralCore:
    """A device behind a gateway, for threads and for asyncio."""

    def __init__(self, device_id: str, observers: Observers) -> None:
        self.device_id = device_id
        self._observers = observers

    @property
    def id(self) -> str:
        """The id of the device."""
        return self.device_id

    def add_event_observer(self, event_name: str, observer: Observer) -> None:
        """See `Device.add_event_observer`."""
        self._observers.add(event_name, observer)

    def remove_event_observer(self, event_name: str, observer: Observer) -> None:
        """See `Device.remove_event_observer`."""
        self._observers.remove(event_name, observer)

    def __repr__(self) -> str:
        return f"<pubsub_losant.{type(self).__name__} {self.device_id}>"
