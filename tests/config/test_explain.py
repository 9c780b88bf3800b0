"""Each value with its source, and no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from pubsub_core.config import Config, Explained, Source, SourceKind
from pubsub_core.errors import ConfigError
from tests.config.world import loaded
from tests.test_secrets import CANARY


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
