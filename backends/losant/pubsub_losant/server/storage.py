"""States, last values, commands and connection logs of the embedded broker's devices.

`Storage` answers from memory. With a file it has every change written by a `Journal`, and so
survives a crash. It is bounded: the oldest goes first, and the last value of each attribute stays.

Source: Losant's documentation of device state, for equal times and the composite last state; its
connection log, for the form of the entries.
"""

from __future__ import annotations

import bisect
import logging
import sqlite3
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from pubsub_mqtt.server.endpoint.journal import Store

from .state_intake import Value

__all__ = ["Command", "State", "Storage"]

logger = logging.getLogger("pubsub_losant.broker")

_MAX_STATES: Final = 10_000
_MAX_ENTRIES: Final = 1000
_MAX_BYTES: Final = 256 * 1_048_576
_OVERHEAD: Final = 400

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS states (
    device TEXT, ms INTEGER, received INTEGER, data TEXT, meta TEXT, flow_version TEXT,
    PRIMARY KEY (device, ms)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attributes (
    device TEXT, name TEXT, value TEXT, ms INTEGER, PRIMARY KEY (device, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS commands (
    number INTEGER PRIMARY KEY, device TEXT, ms INTEGER, receivers INTEGER, body BLOB
);
CREATE TABLE IF NOT EXISTS connections (number INTEGER PRIMARY KEY, device TEXT, entry TEXT);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
"""
_FORMAT: Final = 1


class State(msgspec.Struct, frozen=True, gc=False):
    """One state of a device.

    Attributes:
        ms: When it was, in milliseconds since 1970; no two states of a device have the same.
        data: Values by attribute.
        meta: Sent beside it, any JSON value.
        received_ms: When it, or the last state merged into it, arrived.
        size: About how many bytes it takes.
    """

    ms: int
    data: dict[str, Value]
    meta: Any = None
    flow_version: str | None = None
    received_ms: int = 0
    size: int = _OVERHEAD


class Command(msgspec.Struct, frozen=True):
    """One command that was sent.

    Attributes:
        ms: Its time, in milliseconds since 1970.
        body: The bytes as they were sent.
        receivers: How many connections it was sent to.
    """

    ms: int
    body: bytes
    receivers: int
    number: int = 0

    @property
    def name(self) -> str:
        """Its name."""
        name: str = msgspec.json.decode(self.body)["name"]
        return name


class _Device:
    """Everything about one device, oldest first."""

    __slots__ = ("bytes", "commands", "connections", "last", "states", "taken", "times")

    def __init__(self) -> None:
        self.states: list[State] = []
        self.times: list[int] = []
        self.last: dict[str, tuple[Value, int]] = {}
        self.commands: deque[Command] = deque()
        self.connections: deque[tuple[int, dict[str, Any]]] = deque()
        self.bytes = 0
        self.taken = 0


class Storage(Store):
    """States and histories of all devices, and credentials that the broker made.

    Args:
        path: The SQLite file, or None.
        max_states: States kept for each device.
        max_entries: Commands, and entries of the connection log, kept for each device.
        max_bytes: Bytes that all states may take together, about.

    Attributes:
        unsaved: Changes that the file lacks, since the disk was too far behind.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_states: int = _MAX_STATES,
        max_entries: int = _MAX_ENTRIES,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        super().__init__(path, _SCHEMA, version=_FORMAT, backend="losant")
        self._max_states = max_states
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._bytes = 0
        self._number = 0
        self._devices: dict[str, _Device] = {}
        self._facts: dict[str, str] = {}
        self.unsaved = 0

    # --- states -------------------------------------------------------------------------

    def add_state(
        self,
        device_id: str,
        ms: int,
        data: dict[str, Value],
        *,
        meta: Any = None,
        flow_version: str | None = None,
        received_ms: int = 0,
        size: int = 0,
    ) -> State:
        """Keep a state, or merge it into the one of the same millisecond; return the result.

        Args:
            device_id: Whose state it is.
            ms: When it was, in milliseconds since 1970.
            data: Values by attribute; of an existing state it replaces the same attributes.
            meta: Sent beside it, any JSON value.
            flow_version: Version of the workflow it is for.
            received_ms: When it arrived.
            size: About how many bytes it takes beside its overhead.
        """
        device = self._device(device_id)
        device.taken += 1
        state = State(ms, data, meta, flow_version, received_ms, size + _OVERHEAD)
        times = device.times
        if not times or ms > times[-1]:
            times.append(ms)
            device.states.append(state)
        else:
            at = bisect.bisect_left(times, ms)
            if times[at] == ms:
                state = _merged(device.states[at], state)
                device.bytes -= device.states[at].size
                self._bytes -= device.states[at].size
                device.states[at] = state
            else:
                times.insert(at, ms)
                device.states.insert(at, state)
        device.bytes += state.size
        self._bytes += state.size
        last = device.last
        for name, value in data.items():
            known = last.get(name)
            if known is None or known[1] <= ms:
                last[name] = value, ms
        self._write_state(device_id, state)
        if len(times) > self._max_states:
            self._drop(device_id, device, max(1, self._max_states // 100))
        if self._bytes > self._max_bytes:
            self._make_room()
        return state

    def states(
        self, device_id: str, *, since: int | None = None, until: int | None = None
    ) -> list[State]:
        """Return the states of a device, oldest first; both ends in milliseconds, inclusive."""
        device = self._devices.get(device_id)
        if device is None:
            return []
        start = 0 if since is None else bisect.bisect_left(device.times, since)
        stop = len(device.times) if until is None else bisect.bisect_right(device.times, until)
        return device.states[start:stop]

    def count(self, device_id: str) -> int:
        """Return how many states of a device are kept."""
        device = self._devices.get(device_id)
        return len(device.times) if device is not None else 0

    def taken(self, device_id: str) -> int:
        """Return how many states of a device were added, merged and dropped ones included."""
        device = self._devices.get(device_id)
        return device.taken if device is not None else 0

    def last_values(self, device_id: str) -> dict[str, tuple[Value, int]]:
        """Return the newest value of each attribute, with its milliseconds since 1970."""
        device = self._devices.get(device_id)
        return dict(device.last) if device is not None else {}

    def _drop(self, device_id: str, device: _Device, count: int) -> None:
        """Drop the oldest states; the newest value of an attribute stays."""
        gone = device.states[:count]
        del device.states[:count], device.times[:count]
        size = sum(state.size for state in gone)
        device.bytes -= size
        self._bytes -= size
        for state in gone:
            for name in state.data:
                value, ms = device.last[name]
                if ms == state.ms:
                    self.write(
                        "INSERT OR REPLACE INTO attributes VALUES (?, ?, ?, ?)",
                        (device_id, name, _text(value), ms),
                    )
        self.write("DELETE FROM states WHERE device = ? AND ms <= ?", (device_id, gone[-1].ms))

    def _make_room(self) -> None:
        """Drop the oldest quarter of the device that takes the most."""
        name, device = max(self._devices.items(), key=lambda item: item[1].bytes)
        if device.states:
            self._drop(name, device, (len(device.states) + 3) // 4)

    # --- histories ----------------------------------------------------------------------

    def add_command(self, device_id: str, ms: int, body: bytes, receivers: int) -> None:
        """Keep a command that was sent."""
        commands = self._device(device_id).commands
        self._number += 1
        command = Command(ms, body, receivers, self._number)
        commands.append(command)
        self.write(
            "INSERT INTO commands VALUES (?, ?, ?, ?, ?)",
            (command.number, device_id, ms, receivers, body),
        )
        if len(commands) > self._max_entries:
            gone = commands.popleft()
            self.write("DELETE FROM commands WHERE number = ?", (gone.number,))

    def commands(self, device_id: str) -> list[Command]:
        """Return the commands that were sent to a device, oldest first."""
        device = self._devices.get(device_id)
        return list(device.commands) if device is not None else []

    def add_connection(self, device_id: str, entry: dict[str, Any]) -> None:
        """Keep an entry of the connection log."""
        connections = self._device(device_id).connections
        self._number += 1
        connections.append((self._number, entry))
        self.write(
            "INSERT INTO connections VALUES (?, ?, ?)", (self._number, device_id, _text(entry))
        )
        if len(connections) > self._max_entries:
            number, _ = connections.popleft()
            self.write("DELETE FROM connections WHERE number = ?", (number,))

    def connections(self, device_id: str) -> list[dict[str, Any]]:
        """Return the connection log of a device, newest first."""
        device = self._devices.get(device_id)
        return [dict(entry) for _, entry in reversed(device.connections)] if device else []

    # --- facts --------------------------------------------------------------------------

    def fact(self, name: str) -> str:
        """Return the fact of that name, or ``""``."""
        return self._facts.get(name, "")

    def set_fact(self, name: str, value: str) -> None:
        """Remember something."""
        if self._facts.get(name) != value:
            self._facts[name] = value
            self.write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    # --- the file -----------------------------------------------------------------------

    def write(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Have a change written; dropped and counted where the disk is too far behind."""
        journal = self.journal
        if journal is None:
            return
        if journal.is_full:
            if not self.unsaved % 1000:
                logger.warning("%s cannot keep up: changes are in memory only", self.path)
            self.unsaved += 1
            return
        journal.write(statement, values)

    def _write_state(self, device_id: str, state: State) -> None:
        if self.journal is None:
            return
        self.write(
            "INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?, ?)",
            (
                device_id,
                state.ms,
                state.received_ms,
                _text(state.data),
                None if state.meta is None else _text(state.meta),
                state.flow_version,
            ),
        )

    def read(self, database: sqlite3.Connection) -> None:
        """Fill the memory from the file."""
        self._facts.update(database.execute("SELECT name, value FROM facts"))
        states: Iterator[tuple[str, int, int, str, str | None, str | None]] = database.execute(
            "SELECT device, ms, received, data, meta, flow_version FROM states ORDER BY device, ms"
        )
        for name, ms, received, data, meta, flow_version in states:
            self._restore(name, ms, received, data, meta, flow_version)
        attributes: Iterator[tuple[str, str, str, int]] = database.execute(
            "SELECT device, name, value, ms FROM attributes"
        )
        for name, attribute, value, ms in attributes:
            last = self._device(name).last
            if attribute not in last or last[attribute][1] < ms:
                last[attribute] = msgspec.json.decode(value), ms
        commands: Iterator[tuple[int, str, int, int, bytes]] = database.execute(
            "SELECT number, device, ms, receivers, body FROM commands ORDER BY number"
        )
        for number, name, ms, receivers, body in commands:
            self._device(name).commands.append(Command(ms, bytes(body), receivers, number))
            self._number = max(self._number, number)
        entries: Iterator[tuple[int, str, str]] = database.execute(
            "SELECT number, device, entry FROM connections ORDER BY number"
        )
        for number, name, entry in entries:
            self._device(name).connections.append((number, msgspec.json.decode(entry)))
            self._number = max(self._number, number)

    def _restore(
        self, name: str, ms: int, received: int, data: str, meta: str | None, flow: str | None
    ) -> None:
        device = self._device(name)
        size = len(data) + len(meta or "") + _OVERHEAD
        state = State(
            ms,
            msgspec.json.decode(data),
            None if meta is None else msgspec.json.decode(meta),
            flow,
            received,
            size,
        )
        device.taken += 1
        device.times.append(ms)
        device.states.append(state)
        device.bytes += size
        self._bytes += size
        for attribute, value in state.data.items():
            device.last[attribute] = value, ms

    def _device(self, device_id: str) -> _Device:
        found = self._devices.get(device_id)
        if found is None:
            found = self._devices[device_id] = _Device()
        return found

    def clear(self) -> None:
        """Forget everything that is in memory."""
        self._devices.clear()
        self._facts.clear()
        self._bytes = self._number = 0


def _merged(old: State, new: State) -> State:
    """Return both states as one; values of the new one win."""
    return State(
        old.ms,
        {**old.data, **new.data},
        new.meta if new.meta is not None else old.meta,
        new.flow_version if new.flow_version is not None else old.flow_version,
        new.received_ms,
        # The size of the replaced values is not known; repeated merging must not add up.
        max(old.size, new.size) if old.data.keys() >= new.data.keys() else old.size + new.size,
    )


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()
