"""What the packages look like from outside: names, what an import brings, typing, licence."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pubsub_core

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (ROOT / "backends").is_dir()


def _packages() -> tuple[str, ...]:
    """Return the names of our packages, the core first."""
    if CHECKOUT:
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        targets = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        names = {Path(target).name for target in targets}
    else:
        files = importlib.metadata.files("pubsub-core") or []
        names = {file.parts[0] for file in files if file.name == "__init__.py"}
    assert "pubsub_core" in names
    return ("pubsub_core", *sorted(names - {"pubsub_core"}))


PACKAGES = _packages()
# In a checkout, where the sources are; in the test of the wheel, where it is installed.
FOLDERS = [
    Path(importlib.import_module(name).__path__[0])  # pyright: ignore[reportUnknownArgumentType]
    for name in PACKAGES
]


def _modules() -> Iterator[str]:
    for name in PACKAGES:
        package = importlib.import_module(name)
        yield name
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not found.name.endswith("__main__"):  # it would run
                yield found.name


MODULES = sorted(_modules())


# --- names -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_all_is_there_sorted_and_true(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "__all__"), f"{name} has no __all__"
    names: list[str] = module.__all__
    assert names == sorted(names, key=_order), f"{name}.__all__ is not sorted"
    assert len(set(names)) == len(names)
    for each in names:
        assert hasattr(module, each), f"{name}.__all__ names {each}, which is not there"


def _order(name: str) -> tuple[int, str]:
    # As ruff sorts: constants, classes, everything else.
    if name.isupper():
        return (0, name)
    return (1 if name[:1].isupper() else 2, name)


def test_every_name_of_the_core_is_what_its_module_has() -> None:
    # As the linter wants them: constants, classes, functions.
    assert pubsub_core.__all__ == sorted(
        pubsub_core.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    for name in pubsub_core.__all__:
        value = getattr(pubsub_core, name)
        home = importlib.import_module(value.__module__)
        assert getattr(home, name) is value
        assert name in home.__all__, f"{home.__name__}.__all__ lacks {name}"


def test_all_public_names_of_the_core_are_exported() -> None:
    exported = set(pubsub_core.__all__)
    for name in ("capabilities", "errors", "events"):
        module = importlib.import_module(f"pubsub_core.{name}")
        missing = {
            each
            for each in module.__all__
            if isinstance(getattr(module, each), type) and each not in exported
        }
        assert not missing, f"pubsub_core lacks {sorted(missing)} of {name}"


def test_the_version_is_the_distribution_s() -> None:
    assert pubsub_core.__version__ == importlib.metadata.version("pubsub-core")


# --- imports -----------------------------------------------------------------------------

_LEFT_OUT = ("amqtt", "paho", "pydantic", "rich", "typer", "wsproto")


@pytest.mark.parametrize(
    "statement",
    [
        "import pubsub_core",
        "from pubsub_core import *",
        "import pubsub_core.sync, pubsub_core.app, pubsub_core.middleware",
        *(f"import {name}" for name in PACKAGES[1:]),
        "import pubsub_core.plugins; assert pubsub_core.plugins.registry().infos",
    ],
)
def test_importing_brings_nothing_that_is_not_needed(statement: str) -> None:
    left_out = set(_LEFT_OUT)
    if "registry" not in statement:  # which reads the announcements
        left_out |= {name for name in PACKAGES[1:] if name not in statement}
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=Path(sys.prefix),
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded & set(PACKAGES)
    assert not loaded & left_out


# --- what is shipped -----------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=PACKAGES)
def test_packages_say_that_they_are_typed(folder: Path) -> None:
    assert (folder / "py.typed").is_file()


def test_the_licence_is_said_and_shipped() -> None:
    metadata = importlib.metadata.metadata("pubsub-core")
    assert metadata["License-Expression"] == "Apache-2.0"
    files = importlib.metadata.files("pubsub-core") or []
    (licence,) = (file for file in files if file.name == "LICENSE")
    assert "Apache License" in licence.read_text()


def test_entry_points_and_script_lead_somewhere() -> None:
    points = [
        point
        for point in importlib.metadata.distribution("pubsub-core").entry_points
        if point.group in ("pubsub_core", "console_scripts")
    ]
    assert {point.name for point in points} >= {"memory", "mqtt", "pubsub"}
    for point in points:
        assert point.load() is not None


@pytest.mark.skipif(not CHECKOUT, reason="looks at the checkout")
def test_every_folder_of_a_backend_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packaged = {
        ROOT / each for each in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    }
    assert packaged == {ROOT / "pubsub_core", *ROOT.glob("backends/*/pubsub_*")}
    shown = {ROOT / each for each in settings["tool"]["hatch"]["build"]["dev-mode-dirs"]}
    assert {folder.parent for folder in packaged} == {path.resolve() for path in shown}


# Index hosts and the machines of whoever wrote a line have no place in what others clone.
_PRIVATE = re.compile(
    r"https?://[\w.-]*(?:pypi\.org|pythonhosted|npmjs|artifactory|nexus)|--index-url"
    r"|/(?:home|root|Users|work)/\w|/tmp/\w",
)


@pytest.mark.skipif(not CHECKOUT, reason="looks at the checkout")
def test_no_file_names_an_index_or_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # no checkout of git, e.g. an unpacked source archive
        paths = [
            path
            for folder in (*PACKAGES, "backends", "tests", "docs", "examples", "scripts")
            for path in (ROOT / folder).rglob("*")
        ]
    found: list[str] = []
    for path in paths:
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in _PRIVATE.finditer(text)]
    assert not found
