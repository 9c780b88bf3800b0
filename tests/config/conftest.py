"""Every test here has the backends of `world`, and none of those that are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pubsub_core.plugins import Registry, use_registry
from tests.config.world import FILE, Broken, Plugin


@pytest.fixture(autouse=True)
def installed() -> Iterator[Registry]:
    with use_registry(Registry.from_plugins({"test": Plugin(), "broken": Broken()})) as registry:
        yield registry


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pubsub.toml"
    path.write_text(FILE)
    path.chmod(0o600)
    return path


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory, program and home without any pubsub.toml; returns their parent."""
    for name in ("cwd", "program", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program" / "app.py")])
    return tmp_path
