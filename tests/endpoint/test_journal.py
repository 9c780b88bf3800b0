"""`Journal`: what is settled is in the file, and what went wrong is told."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from pubsub_core.errors import ConnectError
from pubsub_mqtt.endpoint.journal import Journal

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
    journal = Journal(path, SCHEMA, backend="tester")
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
    journal = Journal(tmp_path / "journal", SCHEMA, backend="tester")
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
    journal = Journal(tmp_path / "journal", SCHEMA, backend="tester", max_waiting=5)
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
    journal = Journal(path, SCHEMA, backend="tester")
    with pytest.raises(ConnectError, match="text") as caught:
        await journal.open(numbers)
    assert caught.value.backend == "tester"
    assert not journal.is_open
    assert path.read_text() == "no database " * 100
