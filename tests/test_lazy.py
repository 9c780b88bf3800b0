"""`pubsub_core.lazy`: a package's names come from their homes, when they are used."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from pubsub_core.lazy import lazy_names


def test_a_name_comes_from_its_home_and_no_other_is_imported(tmp_path: Path) -> None:
    package = tmp_path / "lazy_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pubsub_core.lazy import lazy_names\n"
        "__getattr__, __dir__ = lazy_names(__name__, {'one': ('a', 'b'), 'two.deep': ('c',)})\n"
    )
    (package / "one.py").write_text("a, b = 1, 2\n")
    (package / "two").mkdir()
    (package / "two" / "__init__.py").write_text("")
    (package / "two" / "deep.py").write_text("c = 3\n")
    program = (
        "import sys, lazy_package as it\n"
        "assert dir(it) == ['a', 'b', 'c'], dir(it)\n"
        "assert 'lazy_package.one' not in sys.modules\n"
        "from lazy_package import c\n"
        "assert (c, it.a, it.b) == (3, 1, 2)\n"
    )
    path = f"sys.path.insert(0, {str(tmp_path)!r})\n"
    subprocess.run([sys.executable, "-c", f"import sys\n{path}{program}"], check=True)


def test_another_name_is_an_attribute_error_that_names_the_package() -> None:
    module = types.ModuleType("somewhere")
    module.__getattr__, _ = lazy_names("somewhere", {"one": ("a",)})  # type: ignore[method-assign]
    with pytest.raises(AttributeError, match="module 'somewhere' has no attribute 'b'"):
        _ = module.b
