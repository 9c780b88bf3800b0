"""All faults at once, without connecting."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pubsub_core.config import Config, Finding
from tests.config.world import loaded


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
