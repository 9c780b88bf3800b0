"""What every server with a store of its own has to refuse."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from pubsub_core.errors import ConnectError
from pubsub_core.interfaces import DevServer

__all__ = ["check_refusals"]


async def check_refusals(path: Path, server: Callable[[], DevServer]) -> None:
    """Start *server* on its own file made newer, and on one of something else.

    Args:
        path: The store that *server* uses; not there yet.
    """
    for change, why in (
        ("PRAGMA user_version = 99", "has format 99, written by a newer version"),
        ("PRAGMA application_id = 99", "is a database of something else"),
    ):
        started = server()
        await started.start()
        await started.stop()
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(change)
        before = path.read_bytes()
        with pytest.raises(ConnectError, match=why):
            await server().start()
        assert path.read_bytes() == before
        assert [each.name for each in path.parent.iterdir()] == [path.name]
        path.unlink()
