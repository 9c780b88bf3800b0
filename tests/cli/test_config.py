from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke, records

FILE = """\
[bus.main]
url = "mqtt://broker.example:1884?keepalive=20"
qos = 0
password = { env = "CLI_TEST_PASSWORD" }

[bus.literal]
url = "mqtt://bob:canary-7@broker.example"

[profile.test.bus.main]
url = "memory://"
"""


@pytest.fixture
def file(invoke: Invoke, tmp_path: Path) -> Path:
    path = tmp_path / "pubsub.toml"
    path.write_text(FILE)
    path.chmod(0o600)
    return path


@pytest.mark.usefixtures("file")
def test_each_value_has_its_source_and_no_secret_is_shown(invoke: Invoke) -> None:
    result = invoke(
        *("config", "explain", "main", "--json", "-o", "drain=3"),
        CLI_TEST_PASSWORD="canary-8",
        PUBSUB_BUS_MAIN_TIMEOUT="7",
    )
    assert result.exit_code == 0
    found = {record["option"]: record for record in records(result.stdout)}
    assert found["qos"]["value"] == "0"
    assert found["qos"]["kind"] == "file"
    assert found["qos"]["source"].endswith("bus.main.qos")
    assert found["timeout"]["kind"] == "environment"
    assert "PUBSUB_BUS_MAIN_TIMEOUT" in found["timeout"]["source"]
    assert found["drain"]["kind"] == "argument"
    assert found["buffer"]["kind"] == "default"
    assert found["keepalive"]["value"] == "20"
    assert found["password"]["value"].startswith("***")
    for form in ((), ("--all",), ("--json",)):
        assert "canary" not in invoke("config", "explain", *form).output


@pytest.mark.usefixtures("file")
def test_a_profile_lies_over_the_file(invoke: Invoke) -> None:
    shown = invoke("--profile", "test", "config", "explain", "main")
    assert "memory://" in shown.stdout
    assert "profile.test.bus.main" in shown.stdout
    same = invoke("config", "explain", "main", PUBSUB_PROFILE="test")
    assert same.stdout == shown.stdout


def test_lint_tells_all_faults_and_exits_with_2(invoke: Invoke, file: Path) -> None:
    file.write_text('[bus.a]\nurl = "mqtt://h"\nkeepalve = 5\n[bus.b]\nurl = "nosuch://h"\n')
    result = invoke("config", "lint", "--json")
    assert result.exit_code == 2
    found = records(result.stdout)
    problems = [record for record in found if record["type"] == "problem"]
    assert any("keepalve" in record["message"] for record in problems)
    assert any("nosuch" in record["message"] for record in problems)
    assert found[-1]["type"] == "verdict"
    assert found[-1]["errors"] == 2
    assert "keepalive" in invoke("config", "lint").stdout


@pytest.mark.usefixtures("file")
def test_lint_warns_without_failing(invoke: Invoke) -> None:
    result = invoke("config", "lint", "--json", CLI_TEST_PASSWORD="x")
    assert result.exit_code == 0
    assert "canary" not in result.output


def test_lint_of_nothing(invoke: Invoke) -> None:
    result = invoke("config", "lint")
    assert result.exit_code == 0
    assert "nothing to complain about" in result.stdout


def test_a_file_that_is_no_toml(invoke: Invoke, file: Path) -> None:
    file.write_text("[bus.a\n")
    result = invoke("config", "explain")
    assert result.exit_code == 2
    assert "pubsub.toml" in result.stderr


def test_a_missing_file(invoke: Invoke) -> None:
    result = invoke("--config", "absent.toml", "config", "lint")
    assert result.exit_code == 2
    assert "absent.toml" in result.stderr


def test_the_schema_knows_the_options_of_the_backends(invoke: Invoke) -> None:
    text = invoke("config", "schema", "--json").stdout
    assert text.count("\n") == 1
    assert json.loads(text)["$schema"].startswith("https://json-schema.org/")
    assert "keepalive" in text
    assert json.loads(invoke("config", "schema").stdout) == json.loads(text)
