"""Limits and bans: the vectors on a timeline, without waiting."""

from __future__ import annotations

from typing import Any

import pytest

from pubsub_losant.server.throttle import Meter, Rules, Throttle
from tests.losant.vectors import VECTORS

SECTION: dict[str, Any] = VECTORS["dev_broker_throttle"]
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in SECTION["cases"]}


def test_the_rules_are_those_of_the_vectors() -> None:
    rules, wanted = Rules(), SECTION["rules"]
    assert list(rules.per_topic) == wanted["per_topic"]
    assert list(rules.per_connection) == wanted["per_connection"]
    assert list(rules.new_connections) == wanted["new_connections_per_application"]
    assert rules.ban == wanted["ban_initial_s"]
    assert rules.factor == wanted["ban_factor"]
    assert rules.forgiven == wanted["ban_window_s"]
    assert rules.longest == wanted["ban_max_s"]


def first_refusal(sends: list[tuple[float, int]]) -> float | None:
    meter = Meter(Rules())
    for at, count in sends:
        for _ in range(count):
            if not meter.incoming("losant/x/state", at):
                return at
    return None


@pytest.mark.parametrize("name", ["exact", "over", "sliding", "window_passed"])
def test_messages_beyond_the_limit_of_a_topic(name: str) -> None:
    case = CASES[name]
    assert first_refusal(case["send"]) == case["disconnect_at"]


@pytest.mark.parametrize("name", ["two_per_second", "three_per_second"])
def test_a_steady_rate(name: str) -> None:
    case = CASES[name]
    rate = case["send_rate_per_s"]
    sends = [(number / rate, 1) for number in range(case["duration_s"] * rate)]
    wanted = case.get("disconnect_at_about")
    assert first_refusal(sends) == (None if wanted is None else pytest.approx(wanted, abs=0.5))


def test_each_topic_and_direction_counts_by_itself_and_the_connection_in_all() -> None:
    meter = Meter(Rules())
    for peripheral in range(10):
        for _ in range(30):
            assert meter.incoming(f"losant/{peripheral}/state", 0.0)
    assert not meter.incoming("losant/one more/state", 0.0)
    assert meter.outgoing("losant/0/state", 0.0)
    assert meter.incoming("losant/0/state", 15.1)


@pytest.mark.parametrize("name", ["over", "second_violation_within_15min", "reset_after_15min_ok"])
def test_the_length_of_bans(name: str) -> None:
    case = CASES[name]
    throttle = Throttle()
    wanted = case["ban_s"] if isinstance(case["ban_s"], list) else [case["ban_s"]]
    times = case.get("violation_at", [0])
    assert [throttle.violate("x", at) for at in times] == wanted
    assert throttle.banned("another", times[-1]) == 0


def test_the_series_of_bans_when_each_follows_the_last() -> None:
    throttle = Throttle()
    now, found = 0.0, []
    for _ in CASES["ban_series"]["ban_s"]:
        found.append(throttle.violate("x", now))
        now += found[-1] + 100  # after the ban, and before it is forgotten
    assert found == CASES["ban_series"]["ban_s"]


@pytest.mark.parametrize("name", ["connect_during_ban", "connect_after_ban"])
def test_a_ban_ends(name: str) -> None:
    case = CASES[name]
    throttle = Throttle()
    throttle.violate("x", case["violation_at"][0])
    assert (throttle.banned("x", case["connect_at"]) == 0) is case["accepted"]


def test_new_connections_of_all_devices_are_counted_together() -> None:
    throttle = Throttle()
    assert all(throttle.connect(0.0) for _ in range(300))
    assert not throttle.connect(14.9)
    assert throttle.connect(15.0)
