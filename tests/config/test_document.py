"""The file: where it is looked for, and what is wrong with it as a whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pubsub_core.config import Config, Source, SourceKind
from pubsub_core.errors import ConfigError
from pubsub_core.secrets import Secret
from tests.config.world import write
from tests.test_secrets import CANARY, told


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
