"""A password file for the distributor."""

from __future__ import annotations

from pathlib import Path

import pytest

from pubsub_messagebus.server.authenticators import PasswordFile


@pytest.fixture(scope="module")
def passwords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("passwords") / "passwords.json"
    file = PasswordFile(path)
    file.add("tom", "tomsPassword")
    file.add("sub", "pw")
    return path
