from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pubsub_core.errors import ConnectError
from pubsub_core.plugins import registry
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.server import MosquittoServer
from tests.cli.conftest import DEADLINE, Invoke, Spawn, clean_environment, records


def by_event(found: list[dict[str, Any]], backend: str) -> dict[str, list[dict[str, Any]]]:
    events: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        if record["type"] == "demo" and record["backend"] == backend:
            events.setdefault(record["event"], []).append(record)
    return events


def results(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["backend"]: record for record in found if record["type"] == "result"}


def test_the_same_application_on_every_broker_within_30_seconds(spawn: Spawn) -> None:
    watch = Stopwatch()
    child = spawn("demo", "--json")
    assert child.end() == 0, child.stderr
    assert watch.seconds < 30
    found = records(b"".join(child.rest()).decode())
    ended = results(found)
    able = {info.name for info in registry().infos if info.dev_server} | {"memory"}
    assert set(ended) == able
    for backend, result in ended.items():
        assert result["status"] == "ok"
        assert (result["sent"], result["received"]) == (3, 2)
        events = by_event(found, backend)
        assert len(events["server"]) == 1
        assert [each["payload"]["celsius"] for each in events["sent"]] == [20.5, 81.5, 95.0]
        assert [each["payload"]["celsius"] for each in events["received"]] == [81.5, 95.0]
        assert len(events["app"]) == 3
        tried = {each["capability"] for name in ("can", "cannot") for each in events.get(name, [])}
        assert {"history", "presence", "retained", "wildcards", "groups"} <= tried


def test_who_came_and_went_where_the_broker_tells(invoke: Invoke) -> None:
    found = records(invoke("demo", "memory", "--json").stdout)
    events = by_event(found, "memory")
    assert [each["topic"] for each in events["joined"]] == ["demo/oven"]
    assert [each["topic"] for each in events["left"]] == ["demo/oven"]
    assert "cannot" not in events


@pytest.mark.usefixtures("mosquitto_installed")
def test_what_a_broker_cannot_do_has_its_reason(invoke: Invoke) -> None:
    found = records(invoke("demo", "mqtt", "--json").stdout)
    cannot = {each["capability"]: each["why"] for each in by_event(found, "mqtt")["cannot"]}
    assert {"history", "presence", "notifications"} <= set(cannot)
    assert all(cannot.values())
    result = results(found)["mqtt"]
    for name, level in result["capabilities"].items():
        if level == "none":
            assert result["why_not"][name]


def test_for_people(invoke: Invoke) -> None:
    result = invoke("demo")
    assert result.exit_code == 0
    for words in ("81.5 °C is too hot", "why not", "✓ memory", "✓ mqtt"):
        assert words in result.stdout


@pytest.mark.slow
def test_on_amqtt_where_mosquitto_is_missing(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("amqtt", reason="amqtt is not installed")
    monkeypatch.setattr("pubsub_mqtt.server.mqtt.find_mosquitto", lambda: None)
    result = invoke("demo", "mqtt", "--json")
    assert result.exit_code == 0, result.output
    ended = results(records(result.stdout))["mqtt"]
    assert "amqtt" in ended["server"]
    assert ended["received"] == 2


class Unstartable:
    backend: ClassVar[str] = "mqtt"

    def __init__(self, *, host: str, port: int) -> None:
        self.host, self.port, self.url = host, port, ""

    async def start(self) -> None:
        raise ConnectError("no room at the inn", hint="try the stable")

    async def stop(self) -> None:
        return None


def test_a_server_that_cannot_start_does_no_harm(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry(), "load_dev_server", lambda _: Unstartable)
    result = invoke("demo", "--json")
    assert result.exit_code == 0
    ended = results(records(result.stdout))
    assert ended["memory"]["status"] == "ok"
    assert ended["mqtt"]["status"] == "unavailable"
    assert "no room" in ended["mqtt"]["reason"]
    assert "stable" in ended["mqtt"]["reason"]
    assert "no room" in invoke("demo").stdout
    # Nothing worked at all: that is a failure.
    assert invoke("demo", "mqtt").exit_code == 1


class Deaf(Unstartable):
    """Starts, and there is no broker where it says."""

    async def start(self) -> None:
        self.url = "mqtt://127.0.0.1:1"

    def describe(self) -> dict[str, object]:
        return {}


def test_an_application_that_fails_on_a_broker_is_code_1(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry(), "load_dev_server", lambda _: Deaf)
    result = invoke("demo", "--json")
    assert result.exit_code == 1
    ended = results(records(result.stdout))
    assert ended["mqtt"]["status"] == "failed"
    assert ended["mqtt"]["reason"]
    assert ended["memory"]["status"] == "ok"


def test_the_users_configuration_does_not_matter(invoke: Invoke) -> None:
    result = invoke("demo", "memory", PUBSUB_BUS_MAIN_QOS="nonsense", PUBSUB_PROFILE="none")
    assert result.exit_code == 0, result.output


def test_ctrl_c(spawn: Spawn) -> None:
    child = spawn("demo", "--json")
    child.record()
    assert child.end(signal.SIGINT) == 130
    assert b"Traceback" not in child.stderr


@pytest.mark.slow
def test_the_application_file_runs_by_itself(
    mosquitto: MosquittoServer, invoke: Invoke, tmp_path: Path
) -> None:
    app = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "pubsub_core.cli.demo_app"],
        cwd=tmp_path,
        env=clean_environment(PUBSUB_BUS_MAIN_URL=mosquitto.url),
        stderr=subprocess.PIPE,
    )
    assert app.stderr is not None
    try:
        # An alarm comes only from the application; readings are sent until it is there.
        deadline = time.monotonic() + DEADLINE
        with subprocess.Popen(
            [
                *(sys.executable, "-m", "pubsub_core.cli", "sub", mosquitto.url, "demo/alarm"),
                *("-n", "1", "--json", "--quiet"),
            ],
            stdout=subprocess.PIPE,
            env=clean_environment(),
        ) as alarms:
            while alarms.poll() is None and time.monotonic() < deadline:
                invoke("pub", mosquitto.url, "demo/oven", '{"celsius": 99.5}')
            assert alarms.stdout is not None
            (alarm,) = records(alarms.stdout.read().decode())
        assert alarm["payload"] == '{"device":"oven","celsius":99.5}'
        app.send_signal(signal.SIGTERM)
        assert app.wait(DEADLINE) == 0
        assert b"Traceback" not in app.stderr.read()
    finally:
        app.kill()
        app.wait(DEADLINE)
        app.stderr.close()
