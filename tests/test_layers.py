"""Who may import whom, inherit from whom and see whose privates; no circle anywhere.

``docs/design.md`` draws the rooms; here they are data. ``tests/layers.py`` reads the sources.
"""

from __future__ import annotations

import ast
import gc
from pathlib import Path

import pytest

from tests.layers import Backend, Package, Rules, Sources, violations
from tests.test_package import CHECKOUT, FOLDERS, PACKAGES, ROOT

CORE = Package(
    "pubsub_core",
    layers=(
        # Words, and small tools that know nothing else.
        ("message", "topics", "trie", "errors", "capabilities", "events", "keyed", "lazy"),
        # What authors of backends and plugins import.
        ("interfaces", "hookspecs", "plugins", "codecs", "middleware", "secrets", "clock",
         "threads", "pacing", "servers"),
        # Text and environment become options; the backend that lives here.
        ("config", "memory"),
        # Handles that a program gets from a bus.
        ("subscription", "interest", "authorization", "eventstream", "stats"),
        ("_runtime",),
        ("bus",),
        ("sync", "app"),
        ("testing", "cli"),
    ),
    private={"_runtime": ("bus",), "memory": ("testing",), "testing": (), "cli": ()},
)  # fmt: skip

DOORS = ("backend", "client", "server")

MQTT = (
    "options", "errors", "packets", "connection", "backend.connection_backend",
    "server.tls", "server.endpoint",
)  # fmt: skip
"""What backends over MQTT use of it."""

RULES = Rules(
    core=CORE,
    open=(*CORE.layers[0], *CORE.layers[1], "config"),
    backends=(
        Backend("pubsub_emitter", DOORS, others={"pubsub_mqtt": MQTT}),
        Backend("pubsub_losant", DOORS, others={"pubsub_mqtt": MQTT}),
        Backend("pubsub_messagebus", DOORS),
        Backend("pubsub_mqtt", DOORS),
        Backend("pubsub_nats", DOORS),
    ),
    exceptions={
        ("pubsub_core.cli.demo_app", "pubsub_core"): "a program as users write them",
        ("pubsub_messagebus.passwords", "pubsub_messagebus.server.authenticators"): "a command",
        ("pubsub_emitter.compat", "pubsub_emitter.client.compat"): "an import path that stays",
    },
)


def test_every_arrow_points_the_right_way() -> None:
    gc.disable()  # which looks through all the trees again and again, half of the time
    try:
        found = violations(Sources(FOLDERS), RULES)
    finally:
        gc.enable()
    assert found == [], "see the rooms in docs/design.md"


def test_every_package_has_a_rule() -> None:
    ruled = {RULES.core.name, *(backend.name for backend in RULES.backends)}
    assert set(PACKAGES) <= ruled


@pytest.mark.skipif(not CHECKOUT, reason="looks at the checkout")
def test_nothing_is_imported_through_the_folder_of_backends() -> None:
    paths = [path for folder in FOLDERS for path in folder.rglob("*.py")]
    for name in ("tests", "examples", "benchmarks", "scripts"):
        paths += sorted((ROOT / name).rglob("*.py"))
    found: list[str] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if "backends" not in text:  # few say it, and parsing all takes seconds
            continue
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Import(names=[ast.alias(name=name), *_]):
                    pass
                case ast.ImportFrom(module=str(name), level=0):
                    pass
                case _:
                    continue
            if name.partition(".")[0] == "backends":
                found.append(f"{path} imports {name}")
    assert not found


# --- violations are found -------------------------------------------------------------------

PLANTED = Rules(
    core=Package(
        "core",
        layers=(("words",), ("tools",), ("_inner",), ("top",)),
        private={"_inner": ("top",)},
    ),
    open=("words", "tools"),
    backends=(
        Backend("one", ("backend", "client", "server"), shared=("client.old",)),
        Backend("two", ("backend", "client", "server"), others={"one": ("server.shell", "base")}),
    ),
    exceptions={("core.top", "core.extra"): "a test of exceptions"},
)

SOUND = {
    "core/__init__.py": "from .top import Top",
    "core/words.py": "__all__ = ['Word']\nclass Word: _letters = ()",
    "core/tools.py": "from .words import Word\n__all__ = ['Tool']\n"
    "class Tool:\n    def __init__(self): self._edge = Word()\n    def _cut(self): ...",
    "core/_inner/__init__.py": "",
    "core/_inner/engine.py": "from core.tools import Tool",
    "core/top.py": "from core._inner.engine import Tool\nclass Top(Tool):\n    _cut = None",
    "one/__init__.py": "from .backend import Backend\nfrom .client import Client",
    "one/base.py": "from core.words import Word\n__all__ = ['Base']\n"
    "class Base(Word):\n    def _dial(self): ...",
    "one/backend.py": "from .base import Base\n__all__ = ['Backend']\n"
    "class Backend(Base):\n    def _dial(self): super()._dial()",
    "one/client/__init__.py": "from .main import Client",
    "one/client/main.py": "from ..base import Base as Client\nfrom .old import x",
    "one/client/old.py": "x = 1",
    "one/server/__init__.py": "",
    "one/server/shell.py": "__all__ = ['Shell']\nclass Shell: ...",
    "two/__init__.py": "",
    "two/backend.py": "from one.base import Base\nclass Mine(Base):\n    def call(self): ...",
    "two/server.py": "from one.server.shell import Shell",
}
"""A small house where everything is as it should be."""


def planted(folder: Path, files: dict[str, str]) -> list[str]:
    for name, text in (SOUND | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    packages = sorted({name.partition("/")[0] for name in SOUND | files})
    return violations(Sources(folder / name for name in packages), PLANTED)


def test_a_sound_house_has_no_violations(tmp_path: Path) -> None:
    assert planted(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {"core/words.py": "from core.tools import Tool\n__all__ = ['Word']\nclass Word: ..."},
            ["circle: core.tools, core.words", "core.words imports core.tools: upward"],
            id="upward",
        ),
        pytest.param(
            {"core/words.py": "__all__ = ['Word']\ndef f():\n    import importlib\n"
             "    importlib.import_module('core.top')\n"},
            ["circle: core._inner.engine, core.tools, core.top, core.words",
             "core.words imports core.top: upward"],
            id="upward-late",
        ),
        pytest.param(
            {"core/tools.py": "from core import Top\n__all__ = ['Tool']\nclass Tool: ..."},
            ["circle: core, core._inner.engine, core.tools, core.top",
             "core.tools imports core: the package imports its rooms, not they the package"],
            id="from-its-own-package",
        ),
        pytest.param(
            {"core/words.py": "import one.base\n__all__ = ['Word']"},
            ["circle: core.words, one.base",
             "core.words imports one.base: the core knows no backend"],
            id="core-to-backend",
        ),
        pytest.param(
            {"core/extra.py": ""}, ["core.extra has no room"], id="no-room",
        ),
        pytest.param(
            {"core/top.py": "from core import _inner\nimport core.extra",
             "core/extra.py": "import core._inner.engine"},
            ["core.extra has no room",
             "core.extra imports core._inner.engine: only top may"],
            id="private-room",
        ),
        pytest.param(
            {"two/client.py": "from core.top import Top"},
            ["two.client imports Top of core.top, which its __all__ does not name",
             "two.client imports core.top: it is not for backends"],
            id="closed-room",
        ),
        pytest.param(
            {"one/client/main.py": "from one.backend import Backend"},
            ["one.client.main imports one.backend: from door client to door backend"],
            id="door-to-door",
        ),
        pytest.param(
            {"one/base.py": "def f():\n    from .server import shell\n__all__ = ['Base']\n"
             "class Base: ..."},
            ["one.base imports one.server.shell: from what is shared to door server"],
            id="shared-to-door",
        ),
        pytest.param(
            {"two/client.py": "from one.client.main import Client\nfrom one.server import shell"},
            ["two.client imports Client of one.client.main, which its __all__ does not name",
             "two.client imports one.client.main: no door between the two",
             "two.client imports one.server.shell: only from door server"],
            id="to-another-backend",
        ),
        pytest.param(
            {"one/base.py": "from core.words import Word\n__all__ = []\n"
             "class Base(Word):\n    def _dial(self): ..."},
            ["two.backend imports Base of one.base, which its __all__ does not name"],
            id="not-in-all",
        ),
        pytest.param(
            {"two/client.py": "from core import _inner"},
            ["two.client imports core._inner, which is private",
             "two.client imports core._inner: it is not for backends"],
            id="private-module",
        ),
        pytest.param(
            {"one/server/__init__.py": "from typing import TYPE_CHECKING\n"
             "if TYPE_CHECKING:\n    from .tls import Tls\n",
             "one/server/tls.py": "from one.server.web import web",
             "one/server/web.py": "from one.server import Tls\nweb = 1"},
            ["circle: one.server, one.server.tls, one.server.web"],
            id="circle-for-types",
        ),
        pytest.param(
            {"two/backend.py": "from one.base import Base\nclass Mine(Base):\n"
             "    async def _dial(self): ..."},
            ["two.backend.Mine overrides one.base.Base._dial, which is private"],
            id="override",
        ),
        pytest.param(
            {"two/backend.py": "import one.base\nclass Between(one.base.Base): ...\n"
             "class Mine(Between):\n    def __init__(self):\n        self._dial = None\n"},
            ["two.backend.Mine overrides one.base.Base._dial, which is private"],
            id="override-by-assignment",
        ),
        pytest.param(
            {"two/backend.py": "from one.base import Base\nclass Mine(Base):\n"
             "    def a(self): return self._dial()\n    def b(self): return super()._letters"},
            ["two.backend.Mine uses core.words.Word._letters, which is private",
             "two.backend.Mine uses one.base.Base._dial, which is private"],
            id="inherited",
        ),
        pytest.param(
            {"two/server.py": "import one.base as b\nfrom core import tools\n"
             "def f(x, tool):\n    b._hidden()\n    getattr(x, '_dial')\n    tool._edge = 1\n"
             "    x._asdict()"},
            ["two.server uses b._hidden, which is private",
             "two.server uses getattr(x, '_dial'), which is private",
             "two.server uses tool._edge, which is private"],
            id="reached",
        ),
        pytest.param(
            {"three/__init__.py": "import core.words"},
            ["three is a package that no rule names"],
            id="unruled",
        ),
    ],
)  # fmt: skip
def test_a_violation_is_found(tmp_path: Path, files: dict[str, str], expected: list[str]) -> None:
    assert planted(tmp_path, files) == expected


def test_an_exception_is_for_one_arrow(tmp_path: Path) -> None:
    files = {"core/extra.py": "from core.top import Top"}
    both = planted(tmp_path, files)
    files["core/top.py"] = "import core.extra\nTop = None"
    assert planted(tmp_path, files) == ["circle: core.extra, core.top", *both]
