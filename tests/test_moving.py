"""`docs/moving-to-0.2.md` tells where everything is that could be imported from 0.1."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

from tests.test_package import CHECKOUT

ROOT = Path(__file__).parent.parent
ROWS = [
    line.strip().strip("|").split(" | ")
    for line in (ROOT / "docs/moving-to-0.2.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| 0.1 ")
]
MODULES = (ROOT / "tests/data/modules_0_1.txt").read_text().split()


def paths(cell: str) -> list[str]:
    """Return the dotted paths of a cell; `.name` stands beside the path before it."""
    found: list[str] = []
    for text in re.findall(r"`(\.?[a-z_][\w.]*)`", cell):
        if text.startswith("pubsub_"):
            found.append(text)
        elif text.startswith(".") and found:
            package = found[0].split(".")[0]
            beside = found[-1].rsplit(".", 1)[0]
            found.append((beside if beside != package or "." in found[-1] else package) + text)
    return found


def exists(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not CHECKOUT, reason="the tests of a checkout")

OLD = {path for row in ROWS for path in paths(row[0])}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_0_1_is_where_it_was_or_in_the_table(module: str) -> None:
    assert exists(module) or module in OLD


@pytest.mark.parametrize("path", sorted({each for row in ROWS for each in paths(row[-1])}))
def test_a_new_path_of_the_table_can_be_imported(path: str) -> None:
    assert exists(path) or pkgutil.resolve_name(path) is not None
