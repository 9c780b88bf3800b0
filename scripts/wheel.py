"""Builds the wheel, installs it elsewhere, and runs the core of the tests against it.

A folder that packaging forgets is invisible in a checkout, where everything is importable. So
the wheel is installed into a virtual environment of its own, and the tests are copied to a
folder that holds nothing else of the repository.

Usage: ``python scripts/wheel.py [--keep]``. Needs pip and access to the package index.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent

# What the core of the tests is: the contract in memory, and what everything stands on.
TESTS = (
    "conformance/test_memory.py",
    "test_trie.py",
    "test_topics.py",
    "test_codecs.py",
    "config",
    "test_package.py",
    "test_layers.py",
    "cli/test_memory.py",
    "cli/test_root.py",
)
NEEDS = (
    "cryptography",
    "hypothesis",
    "pydantic",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "pytest-xdist",
)

# Run by the new environment's Python, far from the repository.
LOAD = """
import importlib.metadata as metadata, sys
prefix = sys.prefix
points = [p for p in metadata.entry_points(group="pubsub_core")]
assert points, "no entry points"
for point in points:
    module = point.load()
    assert module.__file__.startswith(prefix), (point.name, module.__file__)
from pubsub_core.plugins import registry
found = registry()
assert not found.failures, found.failures
for info in found.infos:
    backend = found.load(info)
    assert sys.modules[backend.__module__].__file__.startswith(prefix), backend
    if info.dev_server:
        found.load_dev_server(info)
print("loaded:", ", ".join(f"{p.name} ({p.value})" for p in points))
"""


class Fault(Exception):
    """The wheel is not what it should be."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the wheel; return an exit code."""
    parser = argparse.ArgumentParser(description="Build the wheel and test it elsewhere.")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="pubsub-wheel-"))
    try:
        wheel = _build(work)
        _check_contents(wheel)
        python = _install(work, wheel)
        _run(python, "-I", "-c", LOAD, cwd=work)
        _run(python.with_name("pubsub"), "--version", cwd=work)
        _check_extras(python, cwd=work)
        _test(work, python)
    except (Fault, subprocess.CalledProcessError) as error:
        print(f"wheel: {error}", file=sys.stderr)
        return 1
    finally:
        if options.keep:
            print(f"wheel: kept {work}")
        else:
            shutil.rmtree(work)
    print(f"wheel: {wheel.name} is complete")
    return 0


def _run(*command: object, cwd: Path) -> None:
    # Nothing of the caller's environment may lead back into the repository.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PUBSUB_")) and name != "VIRTUAL_ENV"
    }
    subprocess.run([str(each) for each in command], check=True, cwd=cwd, env=environment)


def _check_extras(python: Path, cwd: Path) -> None:
    """Check what is said where an extra of ours is not installed."""
    tests = runpy.run_path(str(ROOT / "tests" / "messagebus" / "server" / "test_extras.py"))
    # Isolated from the environment, as everything else here.
    done = subprocess.run(
        [str(python), "-I", "-W", "ignore", "-c", tests["PROGRAM"]],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    if done.stdout.splitlines() != tests["WITHOUT_EXTRA"]:
        raise Fault(f"without the extra messagebus-server: {done.stdout}{done.stderr}")


def _build(work: Path) -> Path:
    out = work / "dist"
    _run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", out, ROOT, cwd=work
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def _check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    targets: list[str] = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    packages = {PurePosixPath(target).name: ROOT / target for target in targets}
    on_disk = {ROOT / "pubsub_core", *ROOT.glob("backends/*/pubsub_*")}
    if on_disk != set(packages.values()):
        missing = sorted(str(path) for path in on_disk ^ set(packages.values()))
        raise Fault(f"packages of the wheel and folders of the repository differ: {missing}")
    for package, folder in packages.items():
        if PurePosixPath(package, "py.typed") not in names:
            raise Fault(f"{package} has no py.typed")
        modules = {
            PurePosixPath(package, *path.relative_to(folder).parts) for path in folder.rglob("*.py")
        }
        if absent := sorted(str(path) for path in modules - set(names)):
            raise Fault(f"not in the wheel: {', '.join(absent)}")
    strangers = {
        name.parts[0]
        for name in names
        if name.parts[0] not in packages and not name.parts[0].endswith(".dist-info")
    }
    if strangers:
        raise Fault(f"in the wheel, but no package of ours: {', '.join(sorted(strangers))}")
    if tests := [str(name) for name in names if "tests" in name.parts]:
        raise Fault(f"tests are in the wheel: {', '.join(tests)}")
    if not any(name.match("*.dist-info/licenses/LICENSE") for name in names):
        raise Fault("the licence is not in the wheel")


def _install(work: Path, wheel: Path) -> Path:
    _run(sys.executable, "-m", "venv", work / "venv", cwd=work)
    python = work / "venv" / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", wheel, *NEEDS, cwd=work)
    return python


def _test(work: Path, python: Path) -> None:
    there = work / "elsewhere"
    # Tests share helpers, and run what the documents show.
    for name in ("tests", "docs"):
        shutil.copytree(ROOT / name, there / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The settings of pytest come along, the packages do not.
    shutil.copy(ROOT / "pyproject.toml", there)
    tests = [f"tests/{name}" for name in TESTS]
    _run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=there)


if __name__ == "__main__":
    sys.exit(main())
