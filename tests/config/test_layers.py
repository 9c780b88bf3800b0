"""Layers, profiles, secrets by reference, and errors that name their place."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pubsub_core.capabilities import Cap
from pubsub_core.codecs import CodecRule
from pubsub_core.config import Config, Source, SourceKind
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import BadOption, ConfigError, PluginError, UnknownBackend
from pubsub_core.secrets import Secret
from tests.config.world import ACME, MEMORY, AcmeOptions, Auth, MemoryOptions, loaded
from tests.test_secrets import CANARY, told

# --- values -----------------------------------------------------------------------------


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


# --- a profile that changes the backend -------------------------------------------------


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
    with pytest.raises(BadOption, match=r"bus\.main\.keepaliv is not an option of memory"):
        config.bus("main")


def test_the_query_of_the_new_url_is_strict(file: Path) -> None:
    config = Config.load(file, environ={"PUBSUB_BUS_MAIN_URL": "memory://?keepalive=5"})
    with pytest.raises(
        BadOption, match="keepalive= in PUBSUB_BUS_MAIN_URL is not an option of memory"
    ):
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


# --- secrets ----------------------------------------------------------------------------


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
        ('{env = "A", file = "b"}', r"a table with env, file is not a reference"),
        ("{}", "a table with no keys is not a reference"),
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


# --- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "suggestion"),
    [
        ("[buss.main]\n", "[buss] is not a table", "did you mean 'bus'?"),
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
    with pytest.raises(BadOption, match="PUBSUB_BUS_MAIN_KEPALIVE is not an option") as caught:
        Config.load(file, environ=environ).bus("main")
    assert "did you mean 'keepalive'?" in str(caught.value)
    assert CANARY not in told(caught.value)
    with pytest.raises(BadOption, match="argument kepalive is not an option") as caught:
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
        ('[bus.main]\nurl = "broker"\n', "bus.main.url: this is not a URL"),
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
        ("memory://", "not an inline table"),
        (f'{{url = "{CANARY}"', "not an inline table"),
        ("[1]", "not an inline table"),
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
