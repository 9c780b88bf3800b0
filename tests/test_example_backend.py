"""The example of a backend passes the contract, and its document quotes it as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "backend"
DOCUMENT = ROOT / "docs" / "writing-a-backend.md"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a folder in which the example is installed as pip would, without its network."""
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    metadata = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    points = [f"{key} = {value}" for key, value in project["entry-points"]["pubsub_core"].items()]
    text = "[pubsub_core]\n" + "\n".join(points) + "\n"
    (metadata / "entry_points.txt").write_text(text, encoding="utf-8")
    return tmp_path


def _run(folder: Path, *command: str, timeout: float, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PUBSUB_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


_PYTEST = ("pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.slow
def test_the_contract_without_outages(installed: Path) -> None:
    out = _run(installed, *_PYTEST, timeout=55, PUBSUB_SUITE="quick")
    assert re.search(r"^\d{2,} passed", out, re.MULTILINE), out


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_contract_in_full(installed: Path) -> None:
    out = _run(installed, *_PYTEST, timeout=190, PUBSUB_SUITE="full")
    assert re.search(r"^\d{3,} passed", out, re.MULTILINE), out


def test_the_command_works_with_it(installed: Path) -> None:
    out = _run(installed, "pubsub_core.cli", "demo", "lines", "--json", timeout=30)
    assert '"status":"ok"' in out.replace(" ", "")


def test_the_document_quotes_the_example_as_it_is() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for pattern in ("**/*.py", "pyproject.toml")
        for path in EXAMPLE.glob(pattern)
    )
    text = DOCUMENT.read_text(encoding="utf-8")
    quotes = re.findall(r"^```(?:python|toml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(quotes) >= 8
    for quote in quotes:
        assert quote.rstrip("\n") in sources, textwrap.indent(quote, "    ")
