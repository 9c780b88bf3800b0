"""`Journal`: what is settled is in the file, and what went wrong is told."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pubsub_core.errors import ConnectError
from pubsub_mqtt.server.endpoint.journal import Journal, Store

pytestmark = pytest.mark.usefixtures("no_leaks")

SCHEMA = "CREATE TABLE IF NOT EXISTS kept (number INTEGER PRIMARY KEY);"
INSERT = "INSERT INTO kept VALUES (?)"


def numbers(database: sqlite3.Connection) -> list[int]:
    return [number for (number,) in database.execute("SELECT number FROM kept ORDER BY number")]


async def settled(journal: Journal) -> BaseException | None:
    """Return what went wrong with the changes so far."""
    told: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    if journal.settled(told.set_result):
        return None
    async with asyncio.timeout(5):
        return await told


async def test_what_was_written_is_read_again_and_belongs_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, SCHEMA, version=3, backend="tester")
    assert await settled(journal) is None  # nothing is open, so nothing waits
    journal.write(INSERT, (0,))
    assert await journal.open(numbers) == []
    for number in range(1, 30):
        journal.write(INSERT, (number,))
    assert await settled(journal) is None
    journal.write(INSERT, (30,))
    await journal.close()
    await journal.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await journal.open(numbers) == list(range(1, 31))
    assert journal.is_open
    await journal.close()
    assert not journal.is_open


async def test_an_error_is_told_to_the_next_who_waits_and_to_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "journal", SCHEMA, version=3, backend="tester")
    await journal.open(numbers)
    journal.write(INSERT, (1,))
    assert await settled(journal) is None
    journal.write(INSERT, (1,))
    # Not in the turn of whoever waits: it must be told all the same.
    async with asyncio.timeout(5):
        while "could not be written" not in caplog.text:
            await asyncio.sleep(0.005)
    assert isinstance(await settled(journal), sqlite3.IntegrityError)
    journal.write(INSERT, (2,))
    assert await settled(journal) is None
    await journal.close()
    assert await journal.open(numbers) == [1, 2]
    await journal.close()


async def test_a_disk_that_falls_behind_is_full_until_it_has_caught_up(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", SCHEMA, version=3, backend="tester", max_waiting=5)
    # A disk that is slow: sqlite asks this function in the journal's thread.
    go_on = threading.Event()

    def read(database: sqlite3.Connection) -> None:
        database.create_function("slowly", 0, lambda: go_on.wait(5))

    await journal.open(read)
    journal.write("SELECT slowly()")
    async with asyncio.timeout(5):
        number = 0
        while not journal.is_full:
            number += 1
            journal.write(INSERT, (number,))
            await asyncio.sleep(0)
    go_on.set()
    assert await settled(journal) is None
    assert not journal.is_full
    await journal.close()
    assert await journal.open(numbers) == list(range(1, number + 1))
    await journal.close()


async def test_what_is_no_journal_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("no database " * 100)
    journal = Journal(path, SCHEMA, version=3, backend="tester")
    with pytest.raises(ConnectError, match="text") as caught:
        await journal.open(numbers)
    assert caught.value.backend == "tester"
    assert not journal.is_open
    assert path.read_text() == "no database " * 100


def files(folder: Path) -> dict[str, bytes]:
    """Return what is in every file but the index of the log, which SQLite may rebuild."""
    return {each.name: each.read_bytes() for each in folder.iterdir() if "-shm" not in each.name}


@pytest.mark.parametrize(
    ("statements", "why"),
    [
        ("CREATE TABLE theirs (number INTEGER)", "something else"),
        ("PRAGMA application_id = 77", "something else"),
        ("PRAGMA user_version = 1", "something else"),
        ("CREATE TABLE kept (name TEXT)", "something else"),  # a table of the same name
        (f"{SCHEMA} CREATE TABLE more (number INTEGER)", "something else"),
    ],
)
async def test_another_programs_database_is_refused_and_left_as_it_is(
    tmp_path: Path, statements: str, why: str
) -> None:
    path = tmp_path / "odd name?#%"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(statements)
    before = files(tmp_path)
    journal = Journal(path, SCHEMA, version=3, backend="tester")
    with pytest.raises(ConnectError, match=f"{why} than this tester server; give another path"):
        await journal.open(numbers)
    assert not journal.is_open
    assert files(tmp_path) == before


async def test_a_newer_format_and_another_servers_file_are_refused_and_left_as_they_are(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal"
    newer = Journal(path, SCHEMA, version=4, backend="tester")
    await newer.open(numbers)
    await newer.close()
    before = files(tmp_path)
    with pytest.raises(ConnectError, match=r"has format 4.* reads up to 3"):
        await Journal(path, SCHEMA, version=3, backend="tester").open(numbers)
    with pytest.raises(ConnectError, match="something else than this other server"):
        await Journal(path, SCHEMA, version=4, backend="other").open(numbers)
    assert files(tmp_path) == before


CRASHED = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.executescript("PRAGMA journal_mode = WAL; CREATE TABLE theirs (number INTEGER);")
os._exit(0)
"""


async def test_what_a_crashed_program_left_is_not_written_back_either(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    subprocess.run([sys.executable, "-c", CRASHED, str(path)], check=True)
    before = files(tmp_path)
    assert before["theirs-wal"]  # the only place that has the table
    with pytest.raises(ConnectError, match="something else"):
        await Journal(path, SCHEMA, version=3, backend="tester").open(numbers)
    assert files(tmp_path) == before


@pytest.mark.parametrize("statements", ["", "PRAGMA journal_mode = WAL", SCHEMA])
async def test_an_empty_file_and_one_without_a_mark_become_ours(
    tmp_path: Path, statements: str
) -> None:
    path = tmp_path / "journal"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(statements)
    path.touch()
    journal = Journal(path, SCHEMA, version=3, backend="tester")
    assert await journal.open(numbers) == []
    await journal.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)
        assert database.execute("PRAGMA application_id").fetchone() != (0,)


class Numbers(Store):
    """A store with one kind of content."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, SCHEMA, version=3, backend="tester")
        self.found: list[int] = []

    def clear(self) -> None:
        self.found.clear()

    def read(self, database: sqlite3.Connection) -> None:
        self.found += numbers(database)


async def test_a_store_forgets_without_a_file_and_remembers_with_one(tmp_path: Path) -> None:
    for path, kept in ((None, []), (tmp_path / "store", [7])):
        store = Numbers(path)
        await store.open()
        store.found.append(7)
        store.write(INSERT, (7,))
        told: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        assert store.settled(told.set_result) is (path is None)
        if path is not None:
            async with asyncio.timeout(5):
                assert await told is None
        await store.close()
        assert store.found == []
        await store.open()
        assert store.found == kept
        await store.close()
