"""The command that keeps a password file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pubsub_messagebus import passwords
from pubsub_messagebus.server.authenticators import (
    PasswordFile,
)


def test_the_command_adds_and_removes_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "passwords.json"
    monkeypatch.setattr("sys.stdin", io.StringIO("right\n"))
    assert passwords.main([str(path), "add", "tom"]) == 0
    assert PasswordFile(path).verify("tom", "right")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert passwords.main([str(path), "add", "dick"]) == 1
    assert "empty" in capsys.readouterr().err
    assert passwords.main([str(path), "remove", "tom"]) == 0
    assert passwords.main([str(path), "remove", "tom"]) == 1
    assert "no user" in capsys.readouterr().err
