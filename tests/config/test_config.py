"""Named buses: layers, profiles, secrets by reference, and errors that name their place."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pubsub_core.capabilities import Cap
from pubsub_core.codecs import CodecRule
from pubsub_core.config import Config, Explained, Finding, Source, SourceKind
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import BadOption, ConfigError, PluginError, UnknownBackend
from pubsub_core.hookspecs import hookimpl
from pubsub_core.interfaces import BackendInfo
from pubsub_core.plugins import Registry, use_registry
from pubsub_core.secrets import Secret
from tests.test_plugins import ACME as TEMPLATE
from tests.test_secrets import CANARY, told


@dataclass(frozen=True)
class Auth:
    user: str = ""
    password: Secret | None = None


@dataclass(frozen=True)
class AcmeOptions:
    keepalive: int = 60
    client_id: str | None = None
    password: Secret | None = None
    keys: Mapping[str, Secret] = field(default_factory=dict[str, Secret])
    auth: Auth | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True)
class MemoryOptions:
    history: int = 100
    client_id: str = ""
    password: Secret | None = None


ACME = replace(TEMPLATE, name="acme", schemes=("acme", "acmes", "acme+ws"), options=AcmeOptions)
MEMORY = replace(TEMPLATE, name="memory", schemes=("memory",), options=MemoryOptions)


class Plugin:
    @hookimpl
    def pubsub_backends(self) -> list[BackendInfo]:
        return [ACME, MEMORY]

    @hookimpl
    def pubsub_secret(self, kind: str, ref: str) -> str | None:
        return f"{CANARY}:{ref}" if kind == "keyring" else None


class Broken:
    @hookimpl
    def pubsub_backends(self) -> list[BackendInfo]:
        raise ImportError("no libbroken")


@pytest.fixture(autouse=True)
def installed() -> Iterator[Registry]:
    with use_registry(Registry.from_plugins({"test": Plugin(), "broken": Broken()})) as registry:
        yield registry


FILE = """
[bus.main]
url = "acme://broker:1883?keepalive=30"
qos = 0
client_id = "from-file"
password = { env = "BROKER_PW" }

[[bus.main.codecs]]
match = "cam/#"
codec = "bytes"

[bus.edge]
url = "acmes://edge"

[profile.test.bus.main]
url = "memory://"

[profile.staging.bus.main]
url = "acme://staging"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pubsub.toml"
    path.write_text(FILE)
    path.chmod(0o600)
    return path


def loaded(text: str, tmp_path: Path, *, mode: int = 0o600, **environ: str) -> Config:
    path = tmp_path / "pubsub.toml"
    path.write_text(textwrap.dedent(text))
    path.chmod(mode)
    return Config.load(path, environ=environ)


# --- finding the file ------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory, program and home without any pubsub.toml; returns their parent."""
    for name in ("cwd", "program", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program" / "app.py")])
    return tmp_path


def write(path: Path, host: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[bus.main]\nurl = "acme://{host}"\n')
    return path


def test_the_file_is_looked_for_in_order(nowhere: Path) -> None:
    environ = {"HOME": str(nowhere / "home")}
    places = [
        (nowhere / "home/.config/pubsub/pubsub.toml", "user"),
        (nowhere / "cwd/pubsub.toml", "cwd"),
        (nowhere / "program/pubsub.toml", "program"),
    ]
    for path, host in places:
        write(path, host)
        config = Config.load(environ=environ)
        assert config.bus("main").address.host == host
        assert config.path == path
    named = write(nowhere / "elsewhere.toml", "named")
    environ["PUBSUB_CONFIG"] = str(named)
    assert Config.load(environ=environ).bus("main").address.host == "named"
    given = write(nowhere / "given.toml", "given")
    assert Config.load(given, environ=environ).bus("main").address.host == "given"


def test_the_user_folder_follows_xdg(nowhere: Path) -> None:
    write(nowhere / "xdg/pubsub/pubsub.toml", "xdg")
    config = Config.load(environ={"XDG_CONFIG_HOME": str(nowhere / "xdg"), "HOME": "/none"})
    assert config.bus("main").address.host == "xdg"


def test_without_a_file_buses_come_from_the_environment(nowhere: Path) -> None:
    config = Config.load(environ={"PUBSUB_BUS_MAIN_URL": "memory://lab"})
    assert config.path is None
    assert config.buses() == ("main",)
    assert config.bus("main").address.host == "lab"


def test_a_deleted_current_directory_is_no_obstacle(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (nowhere / "gone").mkdir()
    monkeypatch.chdir(nowhere / "gone")
    (nowhere / "gone").rmdir()
    assert Config.load(environ={}).buses() == ()
    monkeypatch.chdir(nowhere)


@pytest.mark.parametrize("by_argument", [True, False])
def test_a_named_file_that_is_not_there(nowhere: Path, by_argument: bool) -> None:
    path = nowhere / "missing.toml"
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.toml: No such file"):
        Config.load(path if by_argument else None, environ={"PUBSUB_CONFIG": str(path)}).bus("main")


def test_a_url_needs_no_file_and_reads_none(nowhere: Path) -> None:
    (nowhere / "cwd/pubsub.toml").write_text("this is no TOML")
    config = Config.load(environ={"PUBSUB_PROFILE": "absent"})
    bus = config.bus("acme://tom:pw@h:1?keepalive=5&qos=0", {"timeout": 3})
    assert bus.name == "acme://h:1"
    assert (bus.address.username, bus.address.password) == ("tom", Secret("pw"))
    assert (bus.options.keepalive, bus.bus.qos, bus.bus.timeout) == (5, 0, 3.0)
    assert bus.sources["keepalive"] == Source(SourceKind.ARGUMENT, "?keepalive=")
    assert bus.sources["timeout"] == Source(SourceKind.ARGUMENT, "argument timeout")
    with pytest.raises(ConfigError, match="not TOML"):
        config.bus("main")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[bus.main]\nurl = "acme://h\n', ":2:16"),
        ("[bus.main\n", ":1:10"),
        ("[bus.main]\nqos = \n", ":2:7"),
        ("[bus.main]\r\nqos = 0\r\nqos == 1\r\n", ":3:"),
        ("[bus.main]\nqos = [1,\n", ":2:"),
    ],
)
def test_a_syntax_error_names_file_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "pubsub.toml"
    path.write_bytes(f'secret = "{CANARY}"\n'.encode() + text.encode())
    line = int(place.split(":")[1]) + 1
    with pytest.raises(ConfigError) as caught:
        Config.load(path, environ={})
    column = place.split(":")[2]
    assert f"{path}:{line}:{column}" in str(caught.value)
    assert re.search(rf"line {line}, column \d+", str(caught.value))
    assert CANARY not in told(caught.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pubsub.toml"
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="byte 5 is not UTF-8"):
        Config.load(path, environ={})


def test_a_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "pubsub.toml"
    path.write_text("a = " + "[" * 20_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        Config.load(path, environ={})
    deep = Config(environ={"PUBSUB_BUS_MAIN": "{a = " + "[" * 20_000})
    with pytest.raises(ConfigError, match="nested too deeply"):
        deep.bus("main")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "pubsub.toml"
    path.write_bytes(b'\xef\xbb\xbf[bus.main]\r\nurl = "memory://"\r\n')
    assert Config.load(path, environ={}).buses() == ("main",)


# --- values ----------------------------------------------------------------------------


def test_a_bus_of_the_file(file: Path) -> None:
    bus = Config.load(file, environ={"BROKER_PW": CANARY}).bus("main")
    assert bus.name == "main"
    assert bus.info is ACME
    assert str(bus.address) == "acme://broker:1883"
    assert bus.options == AcmeOptions(30, "from-file", Secret(CANARY))
    assert bus.bus == BusOptions(qos=0, codecs=(CodecRule("cam/#", "bytes"),))
    assert bus.sources["url"] == Source(SourceKind.FILE, "bus.main.url", str(file))
    assert str(bus.sources["qos"]) == f"{file}: bus.main.qos"
    assert bus.sources["keepalive"].place == "?keepalive= in bus.main.url"
    assert bus.sources["timeout"] == Source(SourceKind.DEFAULT)
    assert set(bus.sources) == {
        "url",
        *BusOptions.__dataclass_fields__,
        *AcmeOptions.__dataclass_fields__,
    }


def test_each_layer_beats_the_next(tmp_path: Path) -> None:
    text = """
        [bus.main]
        url = "acme://h?keepalive=1"
        {file}
        [profile.p.bus.main]
        {profile}
    """
    environ: dict[str, Any] = {"PUBSUB_PROFILE": "p"}
    blank = {"file": "", "profile": ""}
    seen: list[tuple[int, SourceKind]] = []

    def look(overrides: Mapping[str, Any]) -> None:
        bus = loaded(text.format(**blank), tmp_path, **environ).bus("main", overrides)
        seen.append((bus.options.keepalive, bus.sources["keepalive"].kind))

    look({})
    blank["file"] = "keepalive = 2"
    look({})
    blank["profile"] = "keepalive = 3"
    look({})
    environ["PUBSUB_BUS_MAIN"] = "{keepalive = 4}"
    look({})
    environ["PUBSUB_BUS_MAIN_KEEPALIVE"] = "5"
    look({})
    look({"keepalive": 6})
    assert seen == [
        (1, SourceKind.FILE),
        (2, SourceKind.FILE),
        (3, SourceKind.PROFILE),
        (4, SourceKind.ENVIRONMENT),
        (5, SourceKind.ENVIRONMENT),
        (6, SourceKind.ARGUMENT),
    ]


def test_a_nearer_url_takes_its_query_with_it_and_drops_the_other(file: Path) -> None:
    environ = {"PUBSUB_BUS_MAIN_URL": "acme://other?qos=2", "BROKER_PW": "x"}
    bus = Config.load(file, environ=environ).bus("main")
    assert bus.bus.qos == 2  # nearer than the file's own qos
    assert bus.options.keepalive == 60  # the file's query went with the file's URL
    assert bus.options.client_id == "from-file"
    assert bus.sources["qos"].place == "?qos= in PUBSUB_BUS_MAIN_URL"
    assert bus.sources["qos"].kind is SourceKind.ENVIRONMENT


def test_values_are_replaced_whole(tmp_path: Path) -> None:
    config = loaded(
        """
        [bus.main]
        url = "acme://h"
        auth = {user = "tom", password = "a"}
        [profile.p.bus.main.auth]
        user = "ann"
        """,
        tmp_path,
        PUBSUB_PROFILE="p",
    )
    assert config.bus("main").options.auth == Auth("ann")


def test_environment_values_are_converted(tmp_path: Path) -> None:
    config = loaded(
        '[bus.main]\nurl = "acme://h"\n[bus.main-2]\nurl = "acme://h2"\n',
        tmp_path,
        PUBSUB_BUS_MAIN_ECHO="off",
        PUBSUB_BUS_MAIN_REQUIRE="history, presence",
        PUBSUB_BUS_MAIN_CODECS='[{match = "a/#", codec = "bytes"}]',
        PUBSUB_BUS_MAIN_AUTH='{user = "tom", password = {env = "PW"}}',
        PUBSUB_BUS_MAIN_PASSWORD='{env = "PW"}',
        PUBSUB_BUS_MAIN_CLIENT_ID="{not toml}",
        PUBSUB_BUS_MAIN_2_QOS="2",
        PW="pw",
    )
    bus = config.bus("main")
    assert bus.bus.echo is False
    assert bus.bus.require == (Cap.HISTORY, Cap.PRESENCE)
    assert bus.bus.codecs == (CodecRule("a/#", "bytes"),)
    assert bus.options == AcmeOptions(
        client_id="{not toml}", password=Secret("pw"), auth=Auth("tom", Secret("pw"))
    )
    assert bus.bus.qos == 1
    assert config.bus("main-2").bus.qos == 2


def test_buses_can_come_from_the_environment_alone() -> None:
    config = Config(
        environ={
            "PUBSUB_BUS_MAIN": '{url = "memory://lab", history = 5}',
            "PUBSUB_BUS_COLD_STORE_URL": "acme://h",
            "PUBSUB_BUS_COLD_STORE_CLIENT_ID": "c",
        }
    )
    assert set(config.buses()) == {"main", "cold_store"}
    assert config.bus("main").options == MemoryOptions(history=5)
    assert config.bus("main").sources["history"].place == "PUBSUB_BUS_MAIN.history"
    assert config.bus("cold_store").options == AcmeOptions(client_id="c")


def test_native_overrides(file: Path) -> None:
    config = Config.load(file, environ={})
    overrides = {"password": Secret("x"), "require": {Cap.HISTORY}, "auth": Auth("tom")}
    bus = config.bus("main", overrides)
    assert bus.options.password == Secret("x")
    assert bus.options.auth == Auth("tom")
    assert bus.bus.require == (Cap.HISTORY,)
    assert overrides.keys() == {"password", "require", "auth"}


def test_a_profile_can_add_a_bus(tmp_path: Path) -> None:
    text = '[profile.p.bus.extra]\nurl = "memory://"\n'
    assert loaded(text, tmp_path).buses() == ()
    config = loaded(text, tmp_path, PUBSUB_PROFILE="p")
    assert config.buses() == ("extra",)
    assert config.bus("extra").sources["url"].kind is SourceKind.PROFILE


def test_data_instead_of_a_file() -> None:
    config = Config({"bus": {"main": {"url": "memory://", "qos": 2}}}, environ={})
    assert config.bus("main").bus.qos == 2


# --- a profile that changes the backend ------------------------------------------------


@pytest.mark.parametrize("way", ["argument", "variable", "url", "table"])
def test_one_word_turns_the_same_program_to_memory(file: Path, way: str) -> None:
    """Neither the old options nor an absent secret may stand in the way."""
    environ = {
        "argument": {},
        "variable": {"PUBSUB_PROFILE": "test"},
        "url": {"PUBSUB_BUS_MAIN_URL": "memory://"},
        "table": {"PUBSUB_BUS_MAIN": '{url = "memory://"}'},
    }[way]
    config = Config.load(file, environ=environ, profile="test" if way == "argument" else None)
    # The program itself gives an option that only the file's backend knows.
    bus = config.bus("main", {"keepalive": 5, "timeout": 3})
    assert bus.info is MEMORY
    assert bus.options == MemoryOptions()
    assert bus.bus.qos == 0
    assert bus.bus.timeout == 3.0
    assert bus.bus.codecs == (CodecRule("cam/#", "bytes"),)
    assert set(bus.set_aside) == {"client_id", "password", "keepalive"}
    assert bus.set_aside["password"].place == "bus.main.password"


def test_a_profile_with_the_same_backend_keeps_everything(file: Path) -> None:
    bus = Config.load(file, profile="staging", environ={"BROKER_PW": "pw"}).bus("main")
    assert str(bus.address) == "acme://staging"
    assert bus.options == AcmeOptions(60, "from-file", Secret("pw"))
    assert bus.set_aside == {}


def test_options_beside_the_new_url_are_for_the_new_backend(tmp_path: Path) -> None:
    text = """
        [bus.main]
        url = "acme://h"
        client_id = "old"
        [profile.test.bus.main]
        url = "memory://"
        client_id = "new"
        history = 7
    """
    config = loaded(text, tmp_path, PUBSUB_PROFILE="test")
    assert config.bus("main").options == MemoryOptions(7, "new")
    back = loaded(text, tmp_path, PUBSUB_PROFILE="test", PUBSUB_BUS_MAIN_URL="acme://third")
    # Two changes: what is for memory goes, and the profile's client_id hides the file's.
    assert back.bus("main").options == AcmeOptions()
    assert set(back.bus("main").set_aside) == {"client_id", "history"}


def test_what_nobody_knows_stays_an_error_after_a_change(tmp_path: Path) -> None:
    config = loaded(
        """
        [bus.main]
        url = "acme://h"
        keepaliv = 5
        [profile.test.bus.main]
        url = "memory://"
        """,
        tmp_path,
        PUBSUB_PROFILE="test",
    )
    with pytest.raises(BadOption, match=r"bus\.main\.keepaliv is no option of memory"):
        config.bus("main")


def test_the_query_of_the_new_url_is_strict(file: Path) -> None:
    config = Config.load(file, environ={"PUBSUB_BUS_MAIN_URL": "memory://?keepalive=5"})
    with pytest.raises(BadOption, match="keepalive= in PUBSUB_BUS_MAIN_URL is no option of memory"):
        config.bus("main")


@pytest.mark.parametrize("url", ['"kafka://h"', '{env = "KAFKA_URL"}', '{file = "/none"}'])
def test_a_replaced_backend_that_is_not_known_here(tmp_path: Path, url: str) -> None:
    text = f"""
        [bus.main]
        url = {url}
        partitions = 5
        history = 9
        [profile.test.bus.main]
        url = "memory://"
    """
    bus = loaded(text, tmp_path, PUBSUB_PROFILE="test").bus("main")
    assert bus.options == MemoryOptions(history=9)
    assert set(bus.set_aside) == {"partitions"}
    with pytest.raises(BadOption, match="argument partitions"):
        loaded(text, tmp_path, PUBSUB_PROFILE="test").bus("main", {"partitions": 1})


# --- secrets ---------------------------------------------------------------------------


def test_secrets_by_reference(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("from-file\n")
    config = loaded(
        f"""
        [bus.main]
        url = {{env = "BROKER_URL"}}
        client_id = {{env = "CLIENT"}}
        password = {{file = "pw"}}
        [bus.main.keys]
        "chat/#" = {{command = [{json.dumps(sys.executable)}, "-c", "print('from-command')"]}}
        "lab/#" = {{keyring = "lab"}}
        [bus.main.auth]
        password = {{env = "PW"}}
        """,
        tmp_path,
        BROKER_URL=f"acme://tom:{quote(CANARY, safe='')}@h?keepalive=7",
        CLIENT="c1",
        PW="from-env",
    )
    bus = config.bus("main")
    assert bus.address.password == Secret(CANARY)
    assert bus.options == AcmeOptions(
        7,
        "c1",
        Secret("from-file"),
        {"chat/#": Secret("from-command"), "lab/#": Secret(f"{CANARY}:lab")},
        Auth("", Secret("from-env")),
    )
    assert CANARY not in repr(bus)


def test_a_secret_is_fetched_when_its_bus_is_built(file: Path) -> None:
    config = Config.load(file, environ={})
    assert config.bus("edge").info is ACME
    assert config.explain("main")
    with pytest.raises(ConfigError) as caught:
        config.bus("main")
    text = str(caught.value)
    assert f"{file}: bus.main.password: environment variable BROKER_PW is not set" in text
    assert "set it, or change bus.main.password" in text


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ('{env = "A", file = "b"}', r"a table with env, file is no reference"),
        ("{}", "a table with no keys is no reference"),
        (f'{{literal = "{CANARY}"}}', "no installed plugin resolves a secret of kind 'literal'"),
        ("5", "expected text or a reference"),
        (f'["{CANARY}"]', "expected text or a reference"),
    ],
)
def test_a_bad_reference_names_its_place(tmp_path: Path, reference: str, problem: str) -> None:
    config = loaded(f'[bus.main]\nurl = "acme://h"\npassword = {reference}\n', tmp_path)
    with pytest.raises(ConfigError, match=problem) as caught:
        config.bus("main")
    assert f"{tmp_path / 'pubsub.toml'}: bus.main.password" in str(caught.value)
    assert CANARY not in told(caught.value)


def test_no_command_is_run_for_a_file_that_everybody_can_write(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    text = f"""
        [bus.main]
        url = "acme://h"
        password = {{command = ["touch", {json.dumps(str(ran))}]}}
    """
    config = loaded(text, tmp_path, mode=0o666, PATH=os.environ["PATH"])
    with pytest.raises(ConfigError, match="everybody can write; chmod o-w"):
        config.bus("main")
    assert not ran.exists()
    config = loaded(text, tmp_path, mode=0o600, PATH=os.environ["PATH"])
    with pytest.raises(ConfigError, match="printed nothing"):
        config.bus("main")
    assert ran.exists()


def test_nothing_of_a_configuration_shows_its_secrets(tmp_path: Path) -> None:
    text = f"""
        [bus.main]
        url = "acme://tom:{CANARY}@h?password={CANARY}"
        password = "{CANARY}"
        headers = {{authorization = "{CANARY}"}}
        auth = {{user = "tom", password = "{CANARY}"}}
        keys = {{"chat/#" = "{CANARY}"}}
    """
    config = loaded(text.replace(CANARY, "canary-7f3a"), tmp_path, mode=0o644)
    canary = "canary-7f3a"
    bus = config.bus("main", {"password": canary})
    shown = [
        repr(config),
        str(config),
        repr(bus),
        str(bus),
        repr(config.explain("main", {"password": canary})),
        repr(config.lint()),
        "\n".join(map(str, config.lint())),
        json.dumps(config.schema()),
    ]
    for text in shown:
        assert canary not in text


# --- errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "suggestion"),
    [
        ("[buss.main]\n", "[buss] is no table", "did you mean 'bus'?"),
        ('[bus.main]\nurl = "acme://h"\nkepalive = 1\n', "bus.main.kepalive", "'keepalive'"),
        ('[bus.main]\nurl = "acme://h"\nofline = 1\n', "bus.main.ofline", "'offline'"),
        (
            '[bus.main]\nurl = "acme://h"\n[bus.main.auth]\npasword = "x"\n',
            "bus.main.auth.pasword",
            "'password'",
        ),
        (
            '[bus.main]\nurl = "acme://h"\n[[bus.main.codecs]]\nmatch = "a"\ncodek = "x"\n',
            "bus.main.codecs[0].codek",
            "'codec'",
        ),
        ("[profile.p]\nbuss = {}\n", "profile.p.buss", "'bus'"),
        (
            '[bus.main]\nurl = "acme://h"\n[profile.p.bus.main]\nkepalive = 1\n',
            "profile.p.bus.main.kepalive",
            "'keepalive'",
        ),
        ('[bus.main]\nurl = "acme://h?kepalive=1"\n', "?kepalive= in bus.main.url", "'keepalive'"),
    ],
)
def test_an_unknown_key_is_refused_at_every_level(
    tmp_path: Path, text: str, place: str, suggestion: str
) -> None:
    config = loaded(text, tmp_path, PUBSUB_PROFILE="p" if "profile" in text else "")
    with pytest.raises(BadOption) as caught:
        config.bus("main")
    assert place in str(caught.value)
    assert suggestion in str(caught.value)


def test_an_unknown_key_in_the_environment_and_in_code(file: Path) -> None:
    environ = {"BROKER_PW": "x", "PUBSUB_BUS_MAIN_KEPALIVE": CANARY}
    with pytest.raises(BadOption, match="PUBSUB_BUS_MAIN_KEPALIVE is no option") as caught:
        Config.load(file, environ=environ).bus("main")
    assert "did you mean 'keepalive'?" in str(caught.value)
    assert CANARY not in told(caught.value)
    with pytest.raises(BadOption, match="argument kepalive is no option") as caught:
        Config.load(file, environ={"BROKER_PW": "x"}).bus("main", {"kepalive": CANARY})
    assert CANARY not in told(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("bus = 5\n", "bus must be a table; write [bus.NAME]"),
        ("[bus]\nmain = 5\n", "bus.main must be a table"),
        ('[bus."a b"]\nurl = "memory://"\n[bus.main]\n', "bus.main.url is missing"),
        ("profile = 1\n[bus.main]\n", "profile must be a table"),
        ("[profile]\np = 1\n[bus.main]\n", "profile.p must be a table"),
        ("[profile.p]\nbus = 1\n", "profile.p.bus must be a table"),
        ("[bus.main]\nqos = 1\n", "bus.main.url is missing; write url ="),
        ("[bus.main]\nurl = 5\n", "bus.main.url: expected a URL"),
        ('[bus.main]\nurl = ""\n', "bus.main.url: expected a URL"),
        ('[bus.main]\nurl = "broker"\n', "bus.main.url: this is no URL"),
        ('[bus.main]\nurl = "acme://h:port"\n', "bus.main.url: the acme:// URL has a port"),
        ('[bus.main]\nurl = "acme://h"\nqos = 3\n', "bus.main.qos: expected a whole number from"),
    ],
)
def test_a_bad_shape_names_its_place(tmp_path: Path, text: str, problem: str) -> None:
    config = loaded(text, tmp_path, PUBSUB_PROFILE="p" if "p" in text.split() else "")
    config.profile = "p" if "[profile" in text else None
    with pytest.raises(BadOption) as caught:
        config.bus("main")
    assert f"{tmp_path / 'pubsub.toml'}: {problem}" in str(caught.value)


def test_a_fault_in_one_bus_leaves_the_others_alone(tmp_path: Path) -> None:
    config = loaded(
        '[bus]\nbroken = 5\n[bus.main]\nurl = "memory://"\n[profile]\nq = 1\n', tmp_path
    )
    assert config.bus("main").info is MEMORY


def test_a_profile_that_is_not_there(file: Path) -> None:
    config = Config.load(file, environ={"PUBSUB_PROFILE": "tset"})
    with pytest.raises(ConfigError) as caught:
        config.bus("main")
    text = str(caught.value)
    assert f"there is no profile 'tset' in {file}" in text
    assert "did you mean 'test'? known: test, staging" in text


def test_a_bus_that_is_not_there_suggests_and_says_where_it_looked(
    file: Path, nowhere: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(file, environ={}).bus("mian")
    text = str(caught.value)
    assert f"there is no bus 'mian' in {file}" in text
    assert "did you mean 'main'? known: main, edge" in text
    assert "PUBSUB_BUS_MIAN_URL" in text
    with pytest.raises(ConfigError) as caught:
        Config.load(environ={"HOME": "/h"}).bus("memory")
    text = str(caught.value)
    assert str(nowhere / "cwd/pubsub.toml") in text
    assert "/h/.config/pubsub/pubsub.toml" in text
    assert "for the backend write memory://" in text


@pytest.mark.parametrize("where", [f"acme:tom:{CANARY}@h", "", "a b", f"tom:{CANARY}@h"])
def test_what_is_neither_name_nor_url_is_not_repeated(where: str) -> None:
    with pytest.raises(ConfigError, match="neither the name of a bus nor a URL") as caught:
        Config(environ={}).bus(where)
    assert CANARY not in told(caught.value)


def test_an_unknown_scheme_names_the_key_and_the_failed_plugins(tmp_path: Path) -> None:
    config = loaded(f'[bus.main]\nurl = "acmee://tom:{"x" * 9}@h"\n', tmp_path)
    with pytest.raises(UnknownBackend) as caught:
        config.bus("main")
    text = str(caught.value)
    assert "bus.main.url: no installed backend answers to acmee://" in text
    assert "did you mean 'acme'?" in text
    assert "no libbroken" in text
    assert "x" * 9 not in told(caught.value)
    with pytest.raises(PluginError, match="no libbroken"):
        Config(environ={}).bus("broken://h")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("memory://", "no inline table"),
        (f'{{url = "{CANARY}"', "no inline table"),
        ("[1]", "no inline table"),
    ],
)
def test_a_bad_inline_table(file: Path, value: str, problem: str) -> None:
    config = Config.load(file, environ={"PUBSUB_BUS_MAIN": value})
    with pytest.raises(ConfigError, match=problem) as caught:
        config.bus("main")
    assert "PUBSUB_BUS_MAIN_URL=memory://" in str(caught.value)
    assert CANARY not in told(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f'url = "acme://tom:{CANARY}@h"',
        f'url = "acme://tom:1?{CANARY}@h"',
        f'url = "acme://h?password={CANARY}&password={CANARY}"',
        f'url = "acme://h"\npassword = ["{CANARY}"]',
        f'url = "acme://h"\npasswrd = "{CANARY}"',
        f'url = "acme://h"\nauth = "{CANARY}"',
        f'url = "acme://h"\nauth = {{user = ["{CANARY}"], password = "{CANARY}"}}',
        f'url = "acme://h"\nkeys = {{a = 5, b = "{CANARY}"}}',
        f'url = "acme://h"\nheaders = {{a = ["{CANARY}"]}}',
    ],
)
def test_no_error_shows_a_secret(tmp_path: Path, text: str) -> None:
    config = loaded(f"[bus.main]\n{text}\n", tmp_path)
    with pytest.raises(ConfigError) as caught:
        config.bus("main")
    assert CANARY not in told(caught.value)
    assert CANARY not in str(config.lint())


# --- explain ---------------------------------------------------------------------------


def test_explain_gives_value_and_source(file: Path) -> None:
    config = Config.load(file, environ={"PUBSUB_BUS_MAIN_TIMEOUT": "5"})
    rows = {row.key: row for row in config.explain("main", {"echo": False})}
    assert next(iter(rows)) == "url"
    assert rows["url"].value == "acme://broker:1883?keepalive=30"
    assert rows["qos"] == Explained("qos", "0", Source(SourceKind.FILE, "bus.main.qos", str(file)))
    assert rows["keepalive"].value == "30"
    assert str(rows["keepalive"].source) == f"{file}: ?keepalive= in bus.main.url"
    assert (rows["timeout"].value, str(rows["timeout"].source)) == (
        "5",
        "PUBSUB_BUS_MAIN_TIMEOUT",
    )
    assert (rows["echo"].value, str(rows["echo"].source)) == ("false", "argument echo")
    assert (rows["drain"].value, str(rows["drain"].source)) == ("10.0", "default")
    assert rows["password"].value == "*** (env BROKER_PW)"
    assert rows["codecs"].value == "[{match = cam/#, codec = bytes}]"
    assert all(row.note == "" for row in rows.values())


def test_explain_shows_what_was_set_aside(file: Path) -> None:
    rows = {row.key: row for row in Config.load(file, environ={}, profile="test").explain("main")}
    assert rows["url"].value == "memory://"
    assert rows["url"].source.place == "profile.test.bus.main.url"
    aside = [
        row for row in Config.load(file, environ={}, profile="test").explain("main") if row.note
    ]
    assert {row.key: row.value for row in aside} == {
        "client_id": "from-file",
        "password": "*** (env BROKER_PW)",
    }
    assert aside[0].note == "set aside: it is for acme, and the nearest url chose memory"


def test_explain_marks_what_nobody_knows(tmp_path: Path) -> None:
    config = loaded(f'[bus.main]\nurl = "acme://h"\nkepalive = "{CANARY}"\n', tmp_path)
    (row,) = [row for row in config.explain("main") if row.note]
    assert (row.key, row.value) == ("kepalive", "***")
    assert row.note.startswith("unknown")


def test_explain_masks(tmp_path: Path) -> None:
    config = loaded(
        """
        [bus.main]
        url = "acme://tom:canary@h?password=canary"
        headers = {authorization = "canary"}
        keys = {"chat/#" = "canary", "lab/#" = {command = ["vault", "canary"]}}
        auth = {user = "tom", password = "canary"}
        client_id = {file = "/etc/id"}
        """,
        tmp_path,
        PUBSUB_BUS_MAIN_PASSWORD='{file = "/run/pw"}',
        PUBSUB_BUS_TEXT="{url = 'acme://h', auth = '{user = \"tom\", password = \"canary\"}'}",
        PUBSUB_BUS_TEXT_KEYS='{chat = "canary"}',
        PUBSUB_BUS_BAD="{url = 'acme://h', auth = 'tom, canary', keys = ['canary']}",
        PUBSUB_PROFILE="",
    )
    assert "canary" not in str(config.explain("text"))
    assert "canary" not in str(config.explain("bad"))
    rows = {row.key: row.value for row in config.explain("main")}
    assert "canary" not in str(rows)
    assert rows["url"] == "acme://***@h?password=***"
    assert rows["headers"] == "***"
    assert rows["auth"] == "{user = tom, password = ***}"
    assert rows["keys"] == "***"
    assert rows["password"] == "*** (file /run/pw)"
    assert rows["client_id"] == "*** (file /etc/id)"


def test_explain_of_a_url() -> None:
    rows = {row.key: row for row in Config(environ={}).explain("acme://tom:pw@h?qos=0")}
    assert rows["url"].value == "acme://***@h?qos=0"
    assert rows["qos"].source.place == "?qos="


def test_explain_follows_a_url_only_into_the_environment(tmp_path: Path) -> None:
    text = '[bus.main]\nurl = {env = "U"}\n'
    config = loaded(text, tmp_path, U="acme://h")
    assert config.explain("main")[0].value == "*** (env U)"
    config = loaded('[bus.main]\nurl = {command = ["false"]}\n', tmp_path)
    with pytest.raises(ConfigError, match=r"kept elsewhere \(command false\)"):
        config.explain("main")


# --- lint ------------------------------------------------------------------------------


def test_lint_finds_nothing_wrong_with_what_is_right(file: Path) -> None:
    assert Config.load(file, environ={"BROKER_PW": "x"}).lint() == []


def test_lint_tells_everything_at_once(tmp_path: Path) -> None:
    config = loaded(
        """
        [bridge]
        from = "a"
        [bus.main]
        url = "acme://h"
        kepalive = 1
        qos = 9
        keepalive = "soon"
        auth = {usr = "x"}
        [bus.bad]
        url = "kafka://h"
        [bus.empty]
        qos = 0
        [bus]
        flat = 5
        [profile.p.bus.main]
        ofline = "buffer"
        """,
        tmp_path,
        PUBSUB_BUS_MAIN_TIMEOUT="never",
    )
    found = config.lint()
    assert {finding.severity for finding in found} == {"error"}
    assert {finding.place for finding in found} == {
        "[bridge]",
        "bus.flat",
        "bus.main.kepalive",
        "PUBSUB_BUS_MAIN_TIMEOUT",
        "bus.main.qos",
        "bus.main.keepalive",
        "bus.main.auth.usr",
        "bus.bad.url",
        "bus.empty.url",
        "profile.p.bus.main.ofline",
    }
    assert len(found) == 10
    assert any("no installed backend answers to kafka://" in finding.message for finding in found)


def test_lint_of_a_file_that_is_no_toml(nowhere: Path) -> None:
    (nowhere / "cwd/pubsub.toml").write_text("[bus")
    (finding,) = Config.load(environ={}).lint()
    assert finding.severity == "error"
    assert "not TOML" in finding.message


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o644])
def test_lint_warns_of_literal_secrets_that_others_can_read(tmp_path: Path, mode: int) -> None:
    config = loaded(
        """
        [bus.main]
        url = "acme://tom:pw@h"
        password = "pw"
        keys = {"chat/#" = "pw", "lab/#" = {env = "HOME"}}
        headers = {accept = "x"}
        [bus.fine]
        url = "acme://tom@h"
        password = {env = "HOME"}
        client_id = "c"
        [profile.p.bus.main]
        auth = {password = "pw"}
        """,
        tmp_path,
        mode=mode,
        HOME="/h",
    )
    found = config.lint()
    readable = bool(mode & 0o044)
    assert [finding.place for finding in found] == (
        [
            "bus.main.url",
            "bus.main.password",
            "bus.main.keys",
            "bus.main.headers",
            "profile.p.bus.main.auth",
        ]
        if readable
        else []
    )
    for finding in found:
        assert finding.severity == "warning"
        assert "others can read" in finding.message
        assert f"chmod 600 {tmp_path / 'pubsub.toml'}" in finding.hint


def test_lint_runs_no_command_and_warns_of_missing_secrets(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = loaded(
        f"""
        [bus.main]
        url = "acme://h"
        password = {{env = "BROKER_PW"}}
        [bus.main.keys]
        a = {{file = "missing"}}
        b = {{command = ["touch", {json.dumps(str(ran))}]}}
        c = {{keyring = "x"}}
        [bus.other]
        url = {{env = "OTHER_URL"}}
        """,
        tmp_path,
        PATH=os.environ["PATH"],
    )
    found = config.lint()
    assert {finding.severity for finding in found} == {"warning"}
    text = "\n".join(map(str, found))
    assert "BROKER_PW is not set" in text
    assert f"cannot take a secret from file {tmp_path / 'missing'}" in text
    assert "OTHER_URL is not set" in text
    assert len(found) == 3
    assert not ran.exists()


def test_lint_warns_of_variables_that_mean_nothing(tmp_path: Path) -> None:
    config = loaded(
        '[bus.a-b]\nurl = "memory://"\n[bus.a_b]\nurl = "memory://"\n',
        tmp_path,
        PUBSUB_BUS_MIAN_QOS="1",
        PUBSUB_PROFIL="test",
        PUBSUB_UNRELATED="1",
    )
    found = {finding.place: str(finding) for finding in config.lint()}
    assert found.keys() == {"PUBSUB_BUS_MIAN_QOS", "PUBSUB_PROFIL", "bus.a_b"}
    assert "belongs to no known bus; known: a-b, a_b" in found["PUBSUB_BUS_MIAN_QOS"]
    assert "did you mean PUBSUB_PROFILE?" in found["PUBSUB_PROFIL"]
    assert "share the variables PUBSUB_BUS_A_B" in found["bus.a_b"]


def test_lint_checks_the_chosen_profile(file: Path) -> None:
    (finding,) = Config.load(file, environ={"PUBSUB_PROFILE": "tset", "BROKER_PW": "x"}).lint()
    assert finding.place == "PUBSUB_PROFILE"
    assert "did you mean 'test'?" in finding.hint


def test_a_bus_that_profiles_complete_is_no_fault(tmp_path: Path) -> None:
    text = '[bus.main]\nqos = 0\n[profile.p.bus.main]\nurl = "memory://"\n'
    assert loaded(text, tmp_path).lint() == []


def test_a_finding_as_text() -> None:
    assert str(Finding("error", "p", "broken", "mend it")) == "error: broken; mend it"


# --- schema ----------------------------------------------------------------------------


def test_the_schema_is_assembled_from_all_backends() -> None:
    schema = Config(environ={}).schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"bus", "profile"}
    definitions = schema["$defs"]
    assert set(definitions) == {"backend-acme", "backend-memory", "bus", "reference"}
    assert set(definitions["backend-acme"]["properties"]) == {*AcmeOptions.__dataclass_fields__}
    bus = definitions["bus"]
    assert set(bus["properties"]) == {"url", *BusOptions.__dataclass_fields__}
    assert bus["unevaluatedProperties"] is False
    choice = bus["allOf"][0]
    pattern = choice["if"]["properties"]["url"]["pattern"]
    assert choice["then"] == {"$ref": "#/$defs/backend-acme"}
    for url in ("acme://h", "acmes://h", "acme+ws://h"):
        assert re.search(pattern, url)
    for url in ("memory://", "acmee://h", "xacme://h"):
        assert not re.search(pattern, url)


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = Config(environ={}).schema()
    text = json.dumps(schema)
    targets = set(re.findall(r'"\$ref": "#/\$defs/([^"]+)"', text))
    assert targets <= set(schema["$defs"])
    assert "reference" in targets


# --- the documentation -----------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_file_that_is_shown_works(tmp_path: Path) -> None:
    (text,) = blocks(PAGE, "toml")
    with use_registry(Registry.load_installed({})):
        config = loaded(text, tmp_path, BROKER_PASSWORD=CANARY)
        assert config.lint() == []
        bus = config.bus("main")
        assert str(bus.address) == "mqtts://broker.example"
        assert bus.options.password == Secret(CANARY)
        assert loaded(text, tmp_path, PUBSUB_PROFILE="test").bus("main").info.name == "memory"


def test_the_code_that_is_shown_runs() -> None:
    _, code = blocks(PAGE, "python")
    with use_registry(Registry.load_installed({})):
        exec(compile(code, "configuration.md", "exec"), {})
