"""Plugins are loaded one by one; what fails is kept, named, and harms nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import threading
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.capabilities import (
    Cap,
    ConfirmedBy,
    Delivery,
    Duplicates,
    Durability,
    Guarantees,
    Limits,
    Order,
    Redelivery,
    Support,
)
from pubsub_core.config import Config
from pubsub_core.errors import (
    ConfigError,
    MissingDependency,
    NotSupported,
    PluginError,
    UnknownBackend,
)
from pubsub_core.hookspecs import Hooks, hookimpl
from pubsub_core.interfaces import API_VERSION, Backend, BackendInfo
from pubsub_core.plugins import (
    GROUP,
    Registry,
    load_object,
    registry,
    reset_registry,
    use_registry,
)
from tests.test_secrets import CANARY, told


@dataclass(frozen=True)
class AcmeOptions:
    speed: int = 1


GUARANTEES = Guarantees(
    ConfirmedBy.NOBODY,
    Delivery.AT_MOST_ONCE,
    Redelivery.NEVER,
    Order.NONE,
    Duplicates.NEVER,
    Durability.NOTHING,
)
ACME = BackendInfo(
    name="acme",
    schemes=("acme", "acmes"),
    factory="pubsub_acme.backend:AcmeBackend",
    capabilities={
        Cap.HISTORY: Support.native(),
        Cap.PRESENCE: Support.emulated("with wills"),
        Cap.GROUPS: Support.unknown("depends"),
        Cap.UNICAST: Support.none("no"),
    },
    guarantees=GUARANTEES,
    limits=Limits(),
    options=AcmeOptions,
    install="pip install pubsub-acme[client]",
)
OTHER = replace(ACME, name="other", schemes=("other",), capabilities={})


class Plugin:
    """A plugin that announces backends."""

    def __init__(self, *infos: Any) -> None:
        self.infos = list(infos)

    @hookimpl
    def pubsub_backends(self) -> list[Any]:
        return self.infos


class FakeDistribution:
    def __init__(self, name: str | None, version: str | None) -> None:
        self.name = name
        self.version = version


class FakeEntryPoint:
    """What the loop needs of `importlib.metadata.EntryPoint`."""

    def __init__(
        self,
        name: str,
        plugin: object,
        distribution: str | None = "pubsub-x",
        version: str | None = "1.0",
    ) -> None:
        self.name = name
        self.dist = FakeDistribution(distribution, version)
        self._plugin = plugin
        self.loaded = 0

    def load(self) -> object:
        self.loaded += 1
        if isinstance(self._plugin, BaseException):
            raise self._plugin
        return self._plugin


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Replace the installed entry points for one test."""
    monkeypatch.delenv("PUBSUB_PLUGINS", raising=False)
    monkeypatch.delenv("PUBSUB_STRICT_PLUGINS", raising=False)

    def put(*points: FakeEntryPoint) -> None:
        def entry_points(*, group: str) -> list[FakeEntryPoint]:
            assert group == GROUP
            return list(points)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        reset_registry()

    yield put
    monkeypatch.undo()
    reset_registry()


# --- finding ---------------------------------------------------------------------------


def test_what_this_distribution_brings_is_installed() -> None:
    found = Registry.load_installed({})
    assert found.by_scheme("memory").name == "memory"
    assert found.by_scheme("mqtts").name == "mqtt"
    assert found.by_scheme("jetblack").name == "messagebus"
    assert found.by_scheme("losant").name == "losant"
    assert {record.name for record in found.plugins if record.distribution == "pubsub-core"} == {
        "emitter",
        "losant",
        "memory",
        "messagebus",
        "mqtt",
        "nats",
    }
    assert found.failures == ()


def test_a_backend_is_found_by_name_and_scheme_in_any_case(install: Install) -> None:
    install(FakeEntryPoint("acme", Plugin(ACME), "pubsub-acme", "2.1"))
    found = registry()
    assert found.by_name("acme") is ACME
    assert found.by_scheme("acmes") is ACME
    assert found.by_scheme("ACME") is ACME
    assert found.infos == (ACME,)
    (record,) = found.plugins
    assert (record.name, record.origin, record.backends, record.error) == (
        "acme",
        "pubsub-acme 2.1",
        (ACME,),
        None,
    )


def test_a_module_can_be_a_plugin() -> None:
    module = types.ModuleType("pubsub_acme.plugin")

    @hookimpl
    def pubsub_backends() -> list[BackendInfo]:
        return [ACME]

    module.pubsub_backends = pubsub_backends  # type: ignore[attr-defined] # made by hand
    assert Registry.from_plugins({"acme": module}).by_scheme("acme") is ACME


def test_the_registry_is_loaded_once_from_any_thread(install: Install) -> None:
    point = FakeEntryPoint("acme", Plugin(ACME))
    install(point)
    found: list[Registry] = []
    threads = [threading.Thread(target=lambda: found.append(registry())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert point.loaded == 1


def test_a_registry_can_be_replaced_and_comes_back(install: Install) -> None:
    install(FakeEntryPoint("acme", Plugin(ACME)))
    before = registry()
    with use_registry(Registry.from_plugins({"other": Plugin(OTHER)})) as mine:
        assert registry() is mine
        assert registry().infos == (OTHER,)
    assert registry() is before
    reset_registry()
    assert registry() is not before


def test_alternatives_are_those_that_declare_it() -> None:
    found = Registry.from_plugins({"acme": Plugin(ACME), "other": Plugin(OTHER)})
    assert found.alternatives(Cap.HISTORY) == ("acme",)
    assert found.alternatives(Cap.PRESENCE) == ("acme",)
    assert found.alternatives(Cap.GROUPS) == ()
    assert found.alternatives(Cap.UNICAST) == ()
    assert found.alternatives(Cap.WILL) == ()


# --- failures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [ImportError("no libfoo"), RuntimeError("boom"), SyntaxError("bad"), SystemExit(3)]
)
def test_a_broken_plugin_harms_only_itself(install: Install, failure: BaseException) -> None:
    install(
        FakeEntryPoint("acme", failure, "pubsub-acme", "2.1"),
        FakeEntryPoint("other", Plugin(OTHER), "pubsub-other", "1.0"),
    )
    found = registry()
    assert found.by_scheme("other") is OTHER
    (error,) = found.failures
    assert (error.plugin, error.distribution) == ("acme", "pubsub-acme 2.1")
    assert error.__cause__ is failure
    assert "plugin 'acme' (pubsub-acme 2.1) failed to load" in str(error)
    assert type(failure).__name__ in str(error)
    record = next(record for record in found.plugins if record.name == "acme")
    assert record.error is error


@pytest.mark.parametrize("asked", ["acme", "acmes", "acme+ws", "ACME"])
def test_asking_for_a_broken_plugins_scheme_raises_its_failure(
    install: Install, asked: str
) -> None:
    failure = ImportError("no libfoo")
    install(FakeEntryPoint("acme", failure, "pubsub-acme", "2.1"))
    for _ in range(2):  # and again: the kept error is not worn out by being raised
        with pytest.raises(PluginError, match="no libfoo") as caught:
            registry().by_scheme(asked)
        assert caught.value.__cause__ is failure
        assert caught.value is not registry().failures[0]
    with pytest.raises(PluginError, match="no libfoo"):
        registry().by_name("acme")


def test_a_scheme_nobody_serves_mentions_the_failures(install: Install) -> None:
    install(
        FakeEntryPoint("acme", ImportError("no libfoo"), "pubsub-acme", "2.1"),
        FakeEntryPoint("other", Plugin(OTHER)),
    )
    with pytest.raises(UnknownBackend) as caught:
        registry().by_scheme("othr", place="bus.main.url")
    text = str(caught.value)
    assert text.startswith("bus.main.url: no installed backend answers to othr://")
    assert "did you mean 'other'?" in text
    assert "installed: other (other)" in text
    assert "plugins that failed: plugin 'acme' (pubsub-acme 2.1) failed to load" in text
    assert "no libfoo" in text


def test_an_unknown_name_suggests() -> None:
    found = Registry.from_plugins({"acme": Plugin(ACME)})
    with pytest.raises(UnknownBackend, match=r"called 'acm'; did you mean 'acme'\?"):
        found.by_name("acm")


def test_nothing_installed_says_so() -> None:
    with pytest.raises(UnknownBackend, match="installed: none"):
        Registry().by_scheme("mqtt")


def test_a_backend_that_is_known_to_exist_comes_with_its_install_line() -> None:
    found = Registry.from_plugins(
        {"acme": Plugin(ACME)}, available={"kafka": "pip install pubsub-kafka"}
    )
    with pytest.raises(UnknownBackend, match="to install; pip install pubsub-kafka"):
        found.by_scheme("kafka")
    with pytest.raises(UnknownBackend, match=r"did you mean 'kafka'\?"):
        found.by_scheme("kafk")


class Misspelt:
    @hookimpl
    def pubsub_backend(self) -> list[BackendInfo]:
        return [ACME]


class WrongArguments:
    @hookimpl
    def pubsub_secret(self, name: str) -> str | None:
        return name


class Unmarked:
    def pubsub_backends(self) -> list[BackendInfo]:
        return [ACME]


class Empty:
    pass


class Raising:
    @hookimpl
    def pubsub_backends(self) -> list[BackendInfo]:
        raise KeyError("VERSION")


class NoList:
    @hookimpl
    def pubsub_backends(self) -> BackendInfo:
        return ACME


class BadCodec:
    @hookimpl
    def pubsub_codecs(self) -> list[Any]:
        return [object()]


class BadMiddleware:
    @hookimpl
    def pubsub_middleware(self) -> dict[str, Any]:
        return {"trace": "not callable"}


@pytest.mark.parametrize(
    ("plugin", "problem"),
    [
        (Misspelt(), "unknown hook 'pubsub_backend'"),
        (WrongArguments(), "name"),
        (Unmarked(), "pubsub_backends without @hookimpl"),
        (Empty(), "implements no hook; hooks are pubsub_backends"),
        (Raising(), "failed to load: KeyError: 'VERSION'"),
        (NoList(), "pubsub_backends gave BackendInfo, not list"),
        (Plugin("acme"), "pubsub_backends gave str, not BackendInfo"),
        (BadCodec(), "codec object without name, encode, decode"),
        (BadMiddleware(), "middleware 'trace', which cannot be called"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_refused(plugin: object, problem: str) -> None:
    found = Registry.from_plugins({"acme": plugin, "other": Plugin(OTHER)})
    assert found.infos == (OTHER,)
    (error,) = found.failures
    assert problem in str(error)
    with pytest.raises(PluginError) as caught:
        found.by_scheme("acme")
    assert problem in str(caught.value)


@dataclass(frozen=True)
class Clashing:
    qos: int = 0


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        (replace(ACME, api=(API_VERSION[0] + 1, 0)), "it was written for contract 2.0, this is"),
        (replace(ACME, api=(API_VERSION[0], API_VERSION[1] + 1)), "upgrade pubsub-core"),
        (replace(ACME, schemes=("acme", "Acmes")), "scheme 'Acmes' is not lower case"),
        (replace(ACME, schemes=("acme", "a_b")), "scheme 'a_b'"),
        (replace(ACME, schemes=()), "answers to no scheme"),
        (replace(ACME, name="Acme"), "a name is lower case"),
        (replace(ACME, factory="pubsub_acme.backend"), "not module:Class"),
        (replace(ACME, factory=""), "no factory"),
        (replace(ACME, dev_server="server"), "not module:Class"),
        (replace(ACME, options=dict), "options must be a dataclass"),
        (replace(ACME, options=Clashing), "qos are names of every bus's own options"),
    ],
)
def test_an_announcement_that_cannot_work_is_refused_alone(info: BackendInfo, problem: str) -> None:
    found = Registry.from_plugins({"two": Plugin(info, OTHER)})
    assert found.infos == (OTHER,)
    assert problem in str(found.failures[0])
    assert found.plugins[0].backends == (OTHER,)
    with pytest.raises(PluginError) as caught:
        found.by_name(info.name)
    assert problem in str(caught.value)
    if info.schemes:
        with pytest.raises(PluginError):
            found.by_scheme(info.schemes[0])


@pytest.mark.parametrize(
    ("second", "taken"),
    [
        (replace(OTHER, name="acme"), "the name is taken by"),
        (replace(OTHER, schemes=("other", "acmes")), "acmes:// is taken by"),
    ],
)
def test_the_first_of_two_wins_and_both_are_named(
    install: Install, second: BackendInfo, taken: str
) -> None:
    install(
        FakeEntryPoint("z", Plugin(second), "pubsub-zeta", "9"),
        FakeEntryPoint("a", Plugin(ACME), "pubsub-alpha", "1"),
    )
    found = registry()
    assert found.infos == (ACME,)
    text = str(found.failures[0])
    assert "plugin 'z' (pubsub-zeta 9)" in text
    assert f"{taken} plugin 'a' (pubsub-alpha 1)" in text
    assert "PUBSUB_PLUGINS" in text


def test_this_distributions_plugins_come_first(install: Install) -> None:
    install(
        FakeEntryPoint("a", Plugin(replace(OTHER, schemes=("acme",))), "aaa", "1"),
        FakeEntryPoint("z", Plugin(ACME), "pubsub_core", "0.1"),
    )
    assert registry().by_scheme("acme") is ACME


def test_two_plugins_of_one_name(install: Install) -> None:
    install(
        FakeEntryPoint("acme", Plugin(ACME), "pubsub-alpha", "1"),
        FakeEntryPoint("acme", Plugin(OTHER), "pubsub-beta", "2"),
    )
    assert registry().infos == (ACME,)
    assert registry().by_name("acme") is ACME
    text = str(registry().failures[0])
    assert "(pubsub-beta 2) has the name of plugin 'acme' (pubsub-alpha 1)" in text


def test_damaged_metadata_is_no_obstacle(install: Install) -> None:
    install(
        FakeEntryPoint("acme", Plugin(ACME), None, None),
        FakeEntryPoint("other", Plugin(OTHER), "x", "1"),
    )
    assert registry().infos == (ACME, OTHER)


# --- environment -----------------------------------------------------------------------


def test_plugins_can_be_restricted(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = FakeEntryPoint("acme", Plugin(ACME))
    install(left_out, FakeEntryPoint("other", Plugin(OTHER)))
    monkeypatch.setenv("PUBSUB_PLUGINS", " other, ")
    assert registry().infos == (OTHER,)
    assert left_out.loaded == 0
    with pytest.raises(UnknownBackend, match="left out by PUBSUB_PLUGINS: acme"):
        registry().by_scheme("acme")


def test_restricting_to_what_is_not_there_is_a_failure(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(FakeEntryPoint("acme", Plugin(ACME)))
    monkeypatch.setenv("PUBSUB_PLUGINS", "acm")
    with pytest.raises(PluginError, match=r"PUBSUB_PLUGINS names 'acm'.*did you mean 'acme'"):
        registry().by_name("acm")


def test_an_empty_restriction_is_none(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(FakeEntryPoint("acme", Plugin(ACME)))
    monkeypatch.setenv("PUBSUB_PLUGINS", "")
    assert registry().infos == (ACME,)


@pytest.mark.parametrize("word", ["1", "true", "yes"])
def test_strict_raises_the_failure(
    install: Install, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    install(FakeEntryPoint("acme", ImportError("no libfoo")), FakeEntryPoint("o", Plugin(OTHER)))
    monkeypatch.setenv("PUBSUB_STRICT_PLUGINS", word)
    with pytest.raises(PluginError, match="no libfoo"):
        registry()


@pytest.mark.parametrize("word", ["", "0", "False", "no", "off"])
def test_strict_can_be_off(install: Install, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    install(FakeEntryPoint("acme", ImportError("no libfoo")))
    monkeypatch.setenv("PUBSUB_STRICT_PLUGINS", word)
    assert len(registry().failures) == 1


def test_strict_lists_all_failures() -> None:
    found = Registry.from_plugins({"a": Empty(), "b": Misspelt()})
    with pytest.raises(PluginError, match=r"2 plugins failed: plugin 'a'.*plugin 'b'") as caught:
        found.raise_failures()
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    Registry.from_plugins({"c": Plugin(ACME)}).raise_failures()


# --- other hooks -----------------------------------------------------------------------


class FakeCodec:
    name = "upper"
    content_type = "text/upper"

    def encode(self, value: Any) -> bytes:
        return str(value).upper().encode()

    def decode(self, data: bytes, type: Any) -> Any:
        return data.decode().lower()


def trace() -> None:
    """A middleware factory."""


class Extras:
    def __init__(self, secrets: Mapping[str, str] | None = None) -> None:
        self.codec = FakeCodec()
        self.secrets = secrets or {}

    @hookimpl
    def pubsub_codecs(self) -> list[Any]:
        return [self.codec]

    @hookimpl
    def pubsub_middleware(self) -> dict[str, Any]:
        return {"trace": trace}

    @hookimpl
    def pubsub_secret(self, kind: str, ref: str) -> str | None:
        return self.secrets.get(f"{kind}:{ref}")

    @hookimpl
    def pubsub_commands(self, cli: Any) -> None:
        cli.append("extras")


def test_codecs_and_middleware_are_collected() -> None:
    plugin = Extras()
    found = Registry.from_plugins({"extras": plugin, "acme": Plugin(ACME)})
    assert found.codecs() == (plugin.codec,)
    assert found.middleware() == {"trace": trace}


def test_middleware_of_one_name_clashes_and_the_first_stays() -> None:
    found = Registry.from_plugins({"a": Extras(), "b": Extras()})
    assert found.middleware() == {"trace": trace}
    assert "plugin 'b' brings middleware 'trace', which plugin 'a' brings already" in str(
        found.failures[0]
    )


def test_secrets_are_asked_of_each_plugin_in_turn() -> None:
    found = Registry.from_plugins(
        {"a": Extras(), "b": Extras({"keyring:x": CANARY}), "acme": Plugin(ACME)}
    )
    assert found.resolve_secret("keyring", "x") == CANARY
    assert found.resolve_secret("keyring", "y") is None
    assert found.resolve_secret("vault", "x") is None


class LeakySecret:
    @hookimpl
    def pubsub_secret(self, kind: str, ref: str) -> str | None:
        raise RuntimeError(f"vault answered {CANARY}")


class WrongSecret:
    @hookimpl
    def pubsub_secret(self, kind: str, ref: str) -> Any:
        return {"value": CANARY}


@pytest.mark.parametrize(
    ("plugin", "problem"),
    [(LeakySecret(), "failed with RuntimeError"), (WrongSecret(), "answered with dict, not text")],
)
def test_a_failing_secret_plugin_tells_no_secret(plugin: object, problem: str) -> None:
    found = Registry.from_plugins({"vault": plugin})
    with pytest.raises(ConfigError, match=problem) as caught:
        found.resolve_secret("vault", "x")
    assert CANARY not in told(caught.value)


class BrokenCommands:
    @hookimpl
    def pubsub_commands(self, cli: Any) -> None:
        raise ValueError("no group")


def test_commands_of_one_plugin_do_not_harm_those_of_another() -> None:
    found = Registry.from_plugins({"bad": BrokenCommands(), "good": Extras()})
    cli: list[str] = []
    (error,) = found.add_commands(cli)
    assert cli == ["extras"]
    assert "plugin 'bad'" in str(error)
    assert "ValueError: no group" in str(error)


# --- importing -------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `pubsub_acme` that a test fills."""
    folder = tmp_path / "pubsub_acme"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "pubsub_acme"]:
        del sys.modules[name]


LOADED = Registry.from_plugins({"acme": Plugin(replace(ACME, dev_server="pubsub_acme.dev:Server"))})
BACKEND = """
from pubsub_core.interfaces import Backend
class AcmeBackend(Backend):
    pass
"""


def test_the_factory_is_imported_when_asked_for(package: Path) -> None:
    (package / "backend.py").write_text(BACKEND)
    assert "pubsub_acme.backend" not in sys.modules
    factory = LOADED.load(LOADED.by_name("acme"))
    assert issubclass(factory, Backend)
    assert factory.__name__ == "AcmeBackend"


def test_a_missing_library_comes_with_its_install_line(package: Path) -> None:
    (package / "backend.py").write_text("import acme_client_that_is_not_there\n" + BACKEND)
    with pytest.raises(MissingDependency) as caught:
        LOADED.load(LOADED.by_name("acme"))
    text = str(caught.value)
    assert "backend 'acme' cannot import 'acme_client_that_is_not_there'" in text
    assert text.endswith("; pip install pubsub-acme[client]")
    assert caught.value.backend == "acme"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_library_that_is_too_old_counts_as_missing(package: Path) -> None:
    (package / "backend.py").write_text("from json import not_there_yet\n" + BACKEND)
    with pytest.raises(MissingDependency, match="not_there_yet"):
        LOADED.load(LOADED.by_name("acme"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "No module named 'pubsub_acme.backend'"),
        ("from pubsub_acme import gone\n", "cannot import name 'gone'"),
        ("import pubsub_acme.gone\n", "No module named 'pubsub_acme.gone'"),
        ("raise RuntimeError('boom')\n", "RuntimeError: boom"),
        ("def broken(:\n", "SyntaxError"),
        ("x = 1\n", "AttributeError"),
        ("class AcmeBackend: pass\n", "is not a subclass of Backend"),
        ("AcmeBackend = 5\n", "is not a subclass of Backend"),
    ],
)
def test_a_backends_own_fault_is_a_plugin_error(
    package: Path, source: str | None, problem: str
) -> None:
    if source is not None:
        (package / "backend.py").write_text(source)
    with pytest.raises(PluginError) as caught:
        LOADED.load(LOADED.by_name("acme"))
    assert problem in str(caught.value)
    assert "plugin 'acme'" in str(caught.value)


def test_the_embedded_server_is_imported_the_same_way(package: Path) -> None:
    (package / "dev.py").write_text("class Server: pass\n")
    assert LOADED.load_dev_server(LOADED.by_name("acme")).__name__ == "Server"
    (package / "dev.py").write_text("import acme_client_that_is_not_there\n")
    del sys.modules["pubsub_acme.dev"]
    importlib.invalidate_caches()
    with pytest.raises(MissingDependency):
        Registry.from_plugins({"a": Plugin(LOADED.infos[0])}).load_dev_server(LOADED.infos[0])


def test_a_backend_without_a_server_names_those_that_have_one() -> None:
    found = Registry.from_plugins({"a": Plugin(OTHER), "b": Plugin(*LOADED.infos)})
    with pytest.raises(NotSupported, match="no embedded server; installed backends that can: acme"):
        found.load_dev_server(OTHER)


def test_load_object() -> None:
    assert load_object("pubsub_core.errors:PluginError") is PluginError
    assert load_object("pubsub_core.capabilities:Cap.HISTORY") is Cap.HISTORY
    with pytest.raises(ValueError, match="not of the form module:name"):
        load_object("pubsub_core.errors")
    with pytest.raises(AttributeError):
        load_object("pubsub_core.errors:Nothing")


# --- the documentation, on a package that is really installed --------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_plugin_that_is_shown_works(package: Path) -> None:
    (table,) = blocks("toml")
    plugin, code = blocks("python")
    points: dict[str, str] = tomllib.loads(table)["project"]["entry-points"][GROUP]
    (package / "plugin.py").write_text(plugin)
    metadata = package.parent / "pubsub_acme-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pubsub-acme\nVersion: 1.2\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
    importlib.invalidate_caches()
    found = Registry.load_installed({})
    info = found.by_scheme("acmes")
    assert info.name == "acme"
    record = next(record for record in found.plugins if record.name == "acme")
    assert record.origin == "pubsub-acme 1.2"
    assert "pubsub_acme.backend" not in sys.modules
    with pytest.raises(PluginError, match=r"plugin 'acme' \(pubsub-acme 1\.2\)"):
        found.load(info)  # the page shows no backend.py
    with use_registry(found):
        bus = Config(environ={}).bus("acme://h?heartbeat=2", {"token": CANARY})
        assert bus.options.heartbeat == 2.0
        assert CANARY not in repr(bus)
        exec(compile(code, "plugins.md", "exec"), {})
    assert "acme" not in {
        info.name for info in Registry.load_installed({"PUBSUB_PLUGINS": "memory"}).infos
    }


def test_the_table_of_hooks_is_current() -> None:
    table = PAGE.partition("## Hooks")[2].partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    hooks = {name: hook.__doc__ for name, hook in vars(Hooks).items() if name.startswith("pubsub_")}
    assert rows == [*hooks.items()]
