"""Stored messages, bans and, in a file, the license of an Emitter broker.

`Storage` answers from memory. With a file it has every change written by a `Journal`; a broker
confirms a message only after `Storage.settled`.

Source: emitter-io/emitter, ``internal/provider/storage`` and ``internal/message/id.go``, for
what a query returns. Messages come strictly oldest first here, where Go's order within a
second is undefined.
"""

from __future__ import annotations

import asyncio
import operator
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pubsub_core.errors import ConnectError
from pubsub_emitter.keys import hash_text
from pubsub_emitter.protocol import MAX_PACKET, SHARE, MessageId
from pubsub_mqtt.server.endpoint.journal import Store

__all__ = ["Storage", "StorageFull", "Stored"]

_MAX_BYTES: Final = 256 * 1_048_576
_OVERHEAD: Final = 300
_SWEEP: Final = 2048
_ONE: Final = "[^/]+"  # any one segment

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS messages (
    counter INTEGER PRIMARY KEY,
    contract INTEGER,
    time INTEGER,
    expires INTEGER,
    channel TEXT,
    payload BLOB
);
CREATE TABLE IF NOT EXISTS bans (key TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
"""
_FORMAT: Final = 1


class StorageFull(Exception):
    """There is no room for another message."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One message.

    Attributes:
        time: Unix seconds at which it was published.
        counter: Running number; orders messages of one second.
        expires: Unix seconds from which on it is gone.
    """

    channel: str
    payload: bytes
    time: int
    counter: int
    expires: int

    def id(self, contract: int, process: int) -> MessageId:
        """Return the identifier that clients see."""
        parts = self.channel[:-1].split("/")
        words = [contract, *map(hash_text, parts)]
        tail = b"".join(word.to_bytes(4, "big") for word in words)
        return MessageId(contract ^ words[1], self.time, self.counter, process, tail)


class Storage(Store):
    """Stored messages and bans.

    Attributes:
        license: Text of the license that the file remembers, or ``""``.
        process: Random number that is part of message ids.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_bytes: int = _MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(path, _SCHEMA, version=_FORMAT, backend="emitter")
        self.license = ""
        self.process = secrets.randbits(32)
        self._clock = clock
        self._max_bytes = max_bytes
        self._bytes = 0
        self._counter = 0
        self._since_sweep = 0
        # By contract and first segment, oldest first.
        self._messages: dict[tuple[int, str], list[Stored]] = {}
        self._banned: set[str] = set()

    def read(self, database: sqlite3.Connection) -> None:
        """Fill the memory from the file."""
        database.execute("DELETE FROM messages WHERE expires <= ?", (int(self._clock()),))
        rows: Iterator[tuple[int, int, int, int, str, bytes]] = database.execute(
            "SELECT counter, contract, time, expires, channel, payload FROM messages "
            "ORDER BY counter"
        )
        for counter, contract, when, expires, channel, payload in rows:
            self._put(contract, Stored(channel, bytes(payload), when, counter, expires))
            self._counter = counter
        self._banned.update(key for (key,) in database.execute("SELECT key FROM bans"))
        facts: dict[str, str] = dict(database.execute("SELECT name, value FROM facts"))
        self.license = facts.get("license", "")
        self._counter = max(self._counter, int(facts.get("counter", 0)))

    async def remember_license(self, text: str) -> None:
        """Have the file keep the license, so that keys stay valid when the broker starts again.

        Raises:
            ConnectError: The file cannot be written.
        """
        self.license = text
        self.write("INSERT OR REPLACE INTO facts VALUES ('license', ?)", (text,))
        kept: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            if not kept.done():
                kept.set_result(error)

        if not self.settled(done) and (error := await kept) is not None:
            raise ConnectError(
                f"cannot write to {self.path}: {error}",
                hint="make room for it, or give another path",
                backend="emitter",
            ) from error

    async def close(self) -> None:
        """Write queued changes, let go of the file, and forget."""
        if self.journal is not None and self.journal.is_open:
            # Numbers of expired messages must not be given out again.
            last = str(self._counter)
            self.write("INSERT OR REPLACE INTO facts VALUES ('counter', ?)", (last,))
        await super().close()

    # --- messages ---------------------------------------------------------------------

    def store(self, contract: int, channel: str, payload: bytes, ttl: int) -> Stored:
        """Keep a message for *ttl* seconds.

        Raises:
            StorageFull: There is no room, also not after expired messages were dropped, or the
                disk is too far behind.
        """
        self._check()
        now = int(self._clock())
        size = _size(channel, payload)
        self._since_sweep += 1
        if self._since_sweep >= _SWEEP or self._bytes + size > self._max_bytes:
            self._sweep(now)
        if self._bytes + size > self._max_bytes:
            raise StorageFull(f"{self._bytes} of {self._max_bytes} bytes are taken")
        self._counter += 1
        message = Stored(channel, payload, now, self._counter, now + ttl)
        self._put(contract, message)
        self.write(
            "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?)",
            (message.counter, contract, now, message.expires, channel, payload),
        )
        return message

    def query(
        self,
        contract: int,
        channel: str,
        *,
        last: int,
        since: int | None = None,
        until: int | None = None,
        before: MessageId | None = None,
    ) -> list[Stored]:
        """Return the newest *last* messages under *channel*, oldest first.

        A channel covers everything below it; ``+`` and ``#`` are one segment each. Nothing is
        found for a share group, or where the first segment is a wildcard. What is returned
        fits into one packet.
        """
        segments = channel[:-1].split("/")
        first = segments[0]
        if first in ("+", "#", "*", SHARE) or "*" in segments:
            return []
        now = self._clock()
        covers = _covering(segments)
        found: list[Stored] = []
        size = 0
        if last <= 0:
            return found
        for message in reversed(self._messages.get((contract, first), ())):
            if (
                not covers(message.channel)
                or message.expires <= now
                or (until is not None and message.time > until)
                or (since is not None and message.time < since)
                or (before is not None and (message.time, message.counter) >= before.age)
            ):
                continue
            size += 20 + 4 * message.channel.count("/") + len(message.channel)
            size += len(message.payload)
            if size > MAX_PACKET:
                break
            found.append(message)
            if len(found) >= last:
                break
        found.reverse()
        return found

    def __len__(self) -> int:
        """Return how many messages are kept, expired ones perhaps included."""
        return sum(map(len, self._messages.values()))

    def _put(self, contract: int, message: Stored) -> None:
        place = contract, message.channel.partition("/")[0]
        self._messages.setdefault(place, []).append(message)
        self._bytes += _size(message.channel, message.payload)

    def _sweep(self, now: float) -> None:
        """Drop expired messages.

        Called once in 2,048 messages and when there is no room. Queries skip expired messages
        anyway, and a look at all of them with each new one would make storing quadratic.
        """
        self._since_sweep = 0
        self._bytes = 0
        for place, messages in list(self._messages.items()):
            kept = [message for message in messages if message.expires > now]
            if kept:
                self._messages[place] = kept
                self._bytes += sum(_size(each.channel, each.payload) for each in kept)
            else:
                del self._messages[place]
        self.write("DELETE FROM messages WHERE expires <= ?", (int(now),))

    # --- bans -------------------------------------------------------------------------

    def is_banned(self, key: str) -> bool:
        """Whether that key, by its text, was banned."""
        return key in self._banned

    def ban(self, key: str, *, banned: bool) -> None:
        """Ban a key or lift its ban; at once."""
        if banned:
            self._banned.add(key)
            self.write("INSERT OR IGNORE INTO bans VALUES (?)", (key,))
        else:
            self._banned.discard(key)
            self.write("DELETE FROM bans WHERE key = ?", (key,))

    def _check(self) -> None:
        """Raise `StorageFull` where changes cannot be written as fast as they come."""
        if self.journal is not None and self.journal.is_full:
            raise StorageFull("the disk is too far behind")

    def clear(self) -> None:
        """Forget everything that is in memory."""
        self._messages.clear()
        self._banned.clear()
        self._bytes = self._counter = 0


def _size(channel: str, payload: bytes) -> int:
    return len(channel) + len(payload) + _OVERHEAD


def _covering(segments: Sequence[str]) -> Callable[[str], object]:
    """Return a predicate: whether the filter matches a stored channel or one above it.

    A query asks it for every stored message, so it is a C function in both cases.
    """
    if "+" not in segments and "#" not in segments:
        return operator.methodcaller("startswith", "/".join(segments) + "/")
    words = (_ONE if segment in {"+", "#"} else re.escape(segment) for segment in segments)
    return re.compile("/".join(words) + "/").match
