"""An SQLite file that a broker writes behind its back, without holding up its event loop.

A broker answers from memory. What must survive it goes to a `Journal`, which writes from a
thread of its own and flushes many changes at once; a caller that must not lose one waits for
`Journal.settled` before saying that it is kept. After a crash, ``kill -9`` included, the file has
everything that was settled.

Each file carries the mark of its server and the number of its format, in SQLite's
``application_id`` and ``user_version``. A file of another program, of another server or of a newer
format is refused, and stays as it is.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from pubsub_core.errors import ConnectError

__all__ = ["Done", "Journal", "Store"]

logger = logging.getLogger("pubsub_mqtt.server.endpoint")

T = TypeVar("T")

Done: TypeAlias = Callable[[BaseException | None], None]
_Change: TypeAlias = tuple[str, Sequence[Any]]

_TURN: Final = 10_000
_STOP: Final = 5.0

# FULL: a commit returns when the disk has it, so what is settled is kept.
_PREPARE: Final = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
"""


class Journal:
    """One file, which only one broker may use at a time; readable by its owner alone.

    Args:
        schema: Statements that create the tables where they are missing.
        version: Number of the schema's format, from 1. It grows when an older program could no
            longer use the file.
        backend: Name for errors, and whose files these are.
        max_waiting: Changes that may wait for the disk; see `is_full`.
    """

    def __init__(
        self,
        path: str | Path,
        schema: str,
        *,
        version: int,
        backend: str,
        max_waiting: int = 100_000,
    ) -> None:
        self.path = Path(path)
        self._schema = schema
        self._version = version
        self._mark = zlib.crc32(f"pubsub_core {backend}".encode()) & 0x7FFF_FFFF
        self._backend = backend
        self._max_waiting = max_waiting
        self._queue: queue.SimpleQueue[_Change | Done | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_open(self) -> bool:
        """Whether changes are taken."""
        return self._thread is not None

    @property
    def is_full(self) -> bool:
        """Whether the disk is so far behind that nothing more should be given to it."""
        return self._queue.qsize() > self._max_waiting

    async def open(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Open the file, or create it, and return what *read* makes of it in another thread.

        Raises:
            ConnectError: It is another program's file or of a newer format, and was left as it
                is; or another broker uses it.
        """
        self._loop = asyncio.get_running_loop()
        try:
            database, found = await asyncio.to_thread(self._open, read)
        except (OSError, sqlite3.Error, ValueError) as exc:
            raise ConnectError(
                f"cannot use {self.path} to store what must be kept: {exc}",
                hint="give another path; only one broker may use a file",
                backend=self._backend,
            ) from exc
        self._thread = threading.Thread(
            target=self._work, args=(database,), name=f"pubsub-{self._backend}-store", daemon=True
        )
        self._thread.start()
        return found

    def _open(self, read: Callable[[sqlite3.Connection], T]) -> tuple[sqlite3.Connection, T]:
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            self._check()
        database = sqlite3.connect(self.path, timeout=1.0, check_same_thread=False)
        try:
            # In one transaction, so that a crash leaves a file that is ours or an empty one.
            database.executescript(
                f"{_PREPARE} BEGIN IMMEDIATE; PRAGMA application_id = {self._mark};"
                f" PRAGMA user_version = {self._version}; {self._schema} COMMIT;"
            )
            found = read(database)
            database.commit()
        except BaseException:
            database.close()
            raise
        return database, found

    def _check(self) -> None:
        """Raise where the file must not be written to.

        Opening a file for writing can already change it: SQLite rolls back what a crash left and
        the journal mode is part of the header. So this looks without writing. Without a log
        beside the file, ``immutable`` also keeps SQLite from creating one.

        Raises:
            ValueError: It is another program's file, or of a newer format.
        """
        if not self.path.stat().st_size:
            return
        log = self.path.with_name(self.path.name + "-wal")
        alone = not log.exists() or not log.stat().st_size
        uri = self.path.absolute().as_uri() + ("?mode=ro&immutable=1" if alone else "?mode=ro")
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=1.0)) as database:
            (mark,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            tables = _tables(database)
        if mark == self._mark:
            if version > self._version:
                raise ValueError(
                    f"it has format {version}, written by a newer version of this server, and "
                    f"this one reads up to {self._version}"
                )
            return
        # Files of version 0.1.0 have no mark, nor has an empty file.
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.executescript(self._schema)
            if not (mark or version) and tables <= _tables(database):
                return
        raise ValueError(f"it is a database of something else than this {self._backend} server")

    def write(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Have one change written; ignored while the file is not open."""
        if self._thread is not None:
            self._queue.put((statement, values))

    def settled(self, done: Done) -> bool:
        """Return True when no file is open; else call *done* once the disk has all so far.

        *done* is called in the event loop, with what went wrong or None.
        """
        if self._thread is None:
            return True
        self._queue.put(done)
        return False

    async def close(self) -> None:
        """Write what waits and close the file; gives up after some seconds."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._queue.put(None)
        await asyncio.to_thread(thread.join, _STOP)
        if thread.is_alive():
            logger.error("%s could not be written within %g s", self.path, _STOP)

    def _work(self, database: sqlite3.Connection) -> None:
        running = True
        # An error stays until a waiter was told of it: the change that failed may have stood in
        # an earlier turn than the waiter.
        error: BaseException | None = None
        while running:
            items = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(items) < _TURN:
                    items.append(self._queue.get_nowait())
            running = None not in items
            waiting: list[Done] = []
            try:
                for item in items:
                    if callable(item):
                        waiting.append(item)
                    elif item is not None:
                        statement, values = item
                        database.execute(statement, values)
                database.commit()
            except (sqlite3.Error, ValueError, OverflowError) as exc:
                error = exc
                logger.exception("%s could not be written", self.path)
                with contextlib.suppress(sqlite3.Error):
                    database.rollback()
                waiting = [each for each in items if callable(each)]
            if waiting and self._loop is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(_tell, waiting, error)
                error = None
        database.close()


class Store(abc.ABC):
    """The memory of a broker, and its file where there is a path.

    A broker answers from memory; without a path everything is gone when it stops. Every method is
    called in the broker's event loop. Subclasses have the content, and `clear` and `read` it.

    Attributes:
        path: The SQLite file, or None.
        journal: Writes it, or None.
    """

    def __init__(self, path: str | Path | None, schema: str, *, version: int, backend: str) -> None:
        self.path = None if path is None else Path(path)
        self.journal: Journal | None = None
        if path is not None:
            self.journal = Journal(path, schema, version=version, backend=backend)

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget everything that is in memory."""

    @abc.abstractmethod
    def read(self, database: sqlite3.Connection) -> None:
        """Fill the memory from the file; called in another thread, while the loop waits for it."""

    async def open(self) -> None:
        """Begin empty, or with the content of the file, which is created where it is missing.

        Raises:
            ConnectError: It is another program's file, of a newer format, or in use.
        """
        self.clear()
        if self.journal is not None:
            await self.journal.open(self.read)

    async def close(self) -> None:
        """Write queued changes, let go of the file, and forget; gives up after some seconds."""
        if self.journal is not None:
            await self.journal.close()
        self.clear()

    def settled(self, done: Done) -> bool:
        """Return whether all changes so far are safe; else call *done* once they are.

        *done* is called in the event loop, with the error or None. Without a file nothing ever
        becomes safer, so the answer is True.
        """
        return self.journal is None or self.journal.settled(done)

    def write(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Have a change written where there is a file, in the words of SQL."""
        if self.journal is not None:
            self.journal.write(statement, values)


def _tables(database: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(database.execute("SELECT name, sql FROM sqlite_master"))


def _tell(waiting: list[Done], error: BaseException | None) -> None:
    for done in waiting:
        done(error)
