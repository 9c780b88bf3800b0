from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core.cli.bench import Figures, percentile
from pubsub_mqtt.server import MosquittoServer
from tests.cli.conftest import Invoke, records


def measured(invoke: Invoke, *arguments: str) -> dict[str, Any]:
    result = invoke("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    (record,) = records(result.stdout)
    return record


def test_memory(invoke: Invoke) -> None:
    record = measured(invoke, "memory://", "-n", "500")
    assert record["sent"] == record["received"] == 500
    assert record["lost"] == record["duplicates"] == record["inversions"] == 0
    latency = record["latency_ms"]
    order = [latency[name] for name in ("min", "p50", "p90", "p99", "p999", "max")]
    assert order == sorted(order)
    assert order[0] > 0
    assert record["publish_per_second"] > 0


@pytest.mark.parametrize("qos", ["0", "1", "2"])
def test_mqtt(invoke: Invoke, mosquitto: MosquittoServer, qos: str) -> None:
    record = measured(invoke, mosquitto.url, "-n", "300", "--qos", qos, "--size", "200")
    assert record["received"] == 300
    assert record["lost"] == record["inversions"] == 0
    assert (record["size"], record["qos"]) == (200, int(qos))


def test_a_rate_is_kept(invoke: Invoke) -> None:
    record = measured(invoke, "memory://", "-n", "20", "--rate", "100")
    assert record["seconds"] >= 0.19
    assert record["publish_per_second"] < 120


def test_the_table(invoke: Invoke) -> None:
    shown = invoke("bench", "memory://", "-n", "10")
    assert shown.exit_code == 0
    assert "out of order" in shown.stdout
    assert "p99" in shown.stdout


def test_a_refused_publish_is_the_error(
    invoke: Invoke, mosquitto_users: MosquittoServer, unique: Callable[[str], str]
) -> None:
    where = mosquitto_users.url.replace("//", "//bob:b@")
    topic = unique("refused")
    result = invoke("bench", where, "-n", "50", "--topic", topic, "-o", "protocol=5", "--json")
    assert result.exit_code == 1
    assert records(result.stderr)[-1]["code"] == "not_authorized"


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 0.999) == 100.0
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0], 0.5) == 3.0


def test_what_did_not_come_is_lost() -> None:
    figures = Figures("b", "memory", "t", 16, 1, sent=10, received=7)
    assert figures.lost == 3
    assert figures.record()["lost"] == 3
