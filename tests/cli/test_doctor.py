from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.cli.doctor import Outcome, _clock
from pubsub_mqtt.server import MosquittoServer
from tests.cli.conftest import Invoke, records
from tests.servers import Authority

STEPS = "config backend resolve tcp tls login round_trip ping clock".split()  # noqa: SIM905 - a list of words reads best


def steps(text: str) -> dict[str, dict[str, Any]]:
    found = [record for record in records(text) if record["type"] == "step"]
    assert [record["step"] for record in found] == STEPS
    for record in found:
        if record["status"] == "failed":
            assert record["detail"], record
            assert record["remedy"], record
        if record["status"] == "skipped":
            assert record["detail"], record
    return {record["step"]: record for record in found}


def status(text: str) -> dict[str, str]:
    return {name: step["status"] for name, step in steps(text).items()}


def test_all_is_well(invoke: Invoke, mosquitto: MosquittoServer) -> None:
    result = invoke("doctor", mosquitto.url, "--json")
    assert result.exit_code == 0
    found = steps(result.stdout)
    assert {name for name, step in found.items() if step["status"] == "ok"} == {*STEPS} - {"tls"}
    assert found["tls"]["status"] == "skipped"
    assert "127.0.0.1" in found["resolve"]["detail"]
    assert found["round_trip"]["ms"] > 0
    verdict = records(result.stdout)[-1]
    assert verdict["type"] == "verdict"
    assert verdict["status"] == "ok"
    assert verdict["failed"] == []
    shown = invoke("doctor", mosquitto.url)
    assert shown.exit_code == 0
    assert "everything works" in shown.stdout


def test_memory_has_no_socket(invoke: Invoke) -> None:
    result = invoke("doctor", "memory://", "--json")
    assert result.exit_code == 0
    found = status(result.stdout)
    assert found["tcp"] == found["resolve"] == found["tls"] == "skipped"
    assert found["round_trip"] == "ok"


def test_a_wrong_option_fails_the_configuration(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "pubsub.toml").write_text('[bus.main]\nurl = "mqtt://localhost"\nkeepalve = 5\n')
    result = invoke("doctor", "main", "--json")
    assert result.exit_code == 2
    found = steps(result.stdout)
    assert found["config"]["status"] == "failed"
    assert "keepalive" in found["config"]["remedy"]
    assert {step["status"] for name, step in found.items() if name != "config"} == {"skipped"}
    assert records(result.stdout)[-1]["failed"] == ["config"]


def test_an_unknown_host_fails_to_resolve(invoke: Invoke) -> None:
    result = invoke("doctor", "mqtt://no-such-host.invalid", "--json")
    assert result.exit_code == 3
    found = status(result.stdout)
    assert found["resolve"] == "failed"
    assert found["tcp"] == found["login"] == "skipped"


def test_a_closed_port_fails_tcp(invoke: Invoke) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    result = invoke("doctor", f"mqtt://127.0.0.1:{port}", "--json")
    assert result.exit_code == 3
    found = steps(result.stdout)
    assert found["resolve"]["status"] == "ok"
    assert found["tcp"]["status"] == "failed"
    assert "start the broker" in found["tcp"]["remedy"]


def test_a_silent_server_fails_the_login(invoke: Invoke) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        result = invoke("doctor", f"mqtt://127.0.0.1:{port}", "--timeout", "0.5", "--json")
    assert result.exit_code == 3
    found = status(result.stdout)
    assert found["tcp"] == "ok"
    assert found["login"] == "failed"
    assert found["round_trip"] == "skipped"


def test_tls_that_is_verified(
    invoke: Invoke, mosquitto_tls: MosquittoServer, authority: Authority
) -> None:
    result = invoke("doctor", mosquitto_tls.url, "-o", f"ca_file={authority.cafile}", "--json")
    assert result.exit_code == 0, result.stdout
    tls = steps(result.stdout)["tls"]
    assert tls["status"] == "ok"
    assert "verified" in tls["detail"]


def test_tls_with_an_unknown_authority(invoke: Invoke, mosquitto_tls: MosquittoServer) -> None:
    result = invoke("doctor", mosquitto_tls.url, "--json")
    assert result.exit_code == 3
    found = status(result.stdout)
    assert found["tcp"] == "ok"
    assert found["tls"] == "failed"
    assert found["login"] == "skipped"


def test_tls_that_is_not_verified_is_told(invoke: Invoke, mosquitto_tls: MosquittoServer) -> None:
    result = invoke("doctor", mosquitto_tls.url, "-o", "insecure_skip_verify=true", "--json")
    assert result.exit_code == 0
    assert "nothing is verified" in steps(result.stdout)["tls"]["detail"]


def test_wrong_credentials_fail_the_login(invoke: Invoke, mosquitto_users: MosquittoServer) -> None:
    where = mosquitto_users.url.replace("//", "//alice:canary-7@")
    result = invoke("doctor", where, "--json", PUBSUB_DEBUG="1")
    assert result.exit_code == 3
    assert "canary-7" not in result.output
    found = status(result.stdout)
    assert found["tcp"] == "ok"
    assert found["login"] == "failed"


def test_missing_rights_fail_the_round_trip(
    invoke: Invoke, mosquitto_users: MosquittoServer, unique: Callable[[str], str]
) -> None:
    where = mosquitto_users.url.replace("//", "//bob:b@")
    result = invoke("doctor", where, "-o", "protocol=5", "--timeout", "1", "--json")
    assert result.exit_code in (1, 5)
    found = steps(result.stdout)
    assert found["login"]["status"] == "ok"
    assert found["round_trip"]["status"] == "failed"
    assert "--topic" in found["round_trip"]["remedy"]
    allowed = invoke("doctor", where, "--topic", f"bob/{unique('x')}", "--json")
    assert allowed.exit_code == 0


@pytest.mark.parametrize(
    ("told", "outcome", "words"),
    [
        (100.5, Outcome.OK, "agrees"),
        (98.0, Outcome.OK, "behind"),
        (104.0, Outcome.OK, "ahead"),
        (40.0, Outcome.FAILED, "60.0 s behind"),
        (161.0, Outcome.FAILED, "60.0 s ahead of"),
    ],
)
def test_clocks(told: float, outcome: Outcome, words: str) -> None:
    step = _clock(told, 100.0, 101.0)
    assert step.outcome is outcome
    assert words in step.detail
    assert bool(step.remedy) is (outcome is Outcome.FAILED)
