"""The suite itself: it finds defects, turns cases round, and hides nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pubsub_core.capabilities import Cap, Support
from pubsub_core.hookspecs import hookimpl
from pubsub_core.interfaces import BackendInfo
from pubsub_core.memory.plugin import INFO
from pubsub_core.plugins import Registry, use_registry
from pubsub_core.testing import Harness, Mode, Suite, suite
from pubsub_core.testing.contract import CASES
from pubsub_core.testing.terms import VARIABLE, mode
from tests.brokers import test_mqtt as test_brokers
from tests.conformance import (
    test_emitter,
    test_losant,
    test_memory,
    test_messagebus,
    test_mqtt,
    test_nats,
)

ROOT = Path(__file__).parents[2]

LISTED: dict[str, type[Suite]] = {
    "memory": test_memory.TestMemory,
    "MQTT 5 on Mosquitto": test_mqtt.TestMosquitto5,
    "MQTT 3.1.1 on Mosquitto": test_mqtt.TestMosquitto311,
    "MQTT 3.1.1 on amqtt": test_mqtt.TestAmqtt,
    "MQTT 3.1.1 on Mosquitto with copies": test_brokers.TestMosquittoCopies,
    "RabbitMQ": test_brokers.TestRabbitMQ,
    "MQTT 5 on ejabberd": test_brokers.TestEjabberd5,
    "MQTT 3.1.1 on ejabberd": test_brokers.TestEjabberd311,
    "aedes": test_brokers.TestAedes,
    "NATS's MQTT": test_brokers.TestNats,
    "messagebus": test_messagebus.TestMessageBus,
    "NATS": test_nats.TestNats,
    "NATS with a stream": test_nats.TestNatsStream,
    "Losant": test_losant.TestLosant,
    "Emitter": test_emitter.TestEmitter,
    "Emitter with MQTT's rule": test_emitter.TestEmitterMqtt,
}


def forged(factory: str, capabilities: Mapping[Cap, Support] | None = None) -> BackendInfo:
    return replace(
        INFO,
        name="liar",
        schemes=("liar",),
        factory=f"tests.conformance.liars:{factory}",
        capabilities={**INFO.capabilities, **(capabilities or {})},
    )


Announce = Callable[..., Suite]


@pytest.fixture
def announce() -> Iterator[Announce]:
    """Return a function that makes the tests of a forged backend."""
    with contextlib.ExitStack() as stack:

        def make(info: BackendInfo, deadline: float = 20.0) -> Suite:
            class Plugin:
                @hookimpl
                def pubsub_backends(self) -> list[BackendInfo]:
                    return [info]

            stack.enter_context(use_registry(Registry.from_plugins({"liar": Plugin()})))

            class Liar(suite("liar")):  # type: ignore[misc]  # the base is made at run time
                harness = Harness(url="liar://{unique}", deadline=deadline)

            made: Suite = Liar()
            return made

        yield make


def run(tests: Suite, name: str) -> None:
    getattr(tests, f"test_{name}")()


@pytest.mark.parametrize(
    ("defect", "case"),
    [
        ("Losing", "hundred_messages_all_arrive"),
        ("Duplicating", "two_subscribers_both_get_all"),
        ("Duplicating", "overlapping_filters_deliver_once_per_subscription"),
        ("Reordering", "order_single_publisher_single_topic"),
        ("Leaking", "open_close"),
        ("Deaf", "subscribe_returns_after_broker_confirms"),
        ("Raising", "history_last_n_in_order"),
    ],
)
def test_a_defect_is_found(announce: Announce, defect: str, case: str) -> None:
    tests = announce(forged(defect), 0.5)  # which some wait out
    with pytest.raises(AssertionError):
        run(tests, case)


def test_the_same_cases_pass_without_a_defect(announce: Announce) -> None:
    honest = replace(forged("Leaking"), factory="pubsub_core.memory.backend:MemoryBackend")
    tests = announce(honest)
    for case in (
        "hundred_messages_all_arrive",
        "two_subscribers_both_get_all",
        "overlapping_filters_deliver_once_per_subscription",
        "order_single_publisher_single_topic",
        "open_close",
        "subscribe_returns_after_broker_confirms",
        "history_last_n_in_order",
    ):
        run(tests, case)


def test_a_claim_without_a_method_is_found(announce: Announce) -> None:
    tests = announce(forged("Bare"))
    with pytest.raises(AssertionError, match="history: claimed True"):
        run(tests, "declared_caps_match_methods")


def test_a_method_without_a_claim_is_found(announce: Announce) -> None:
    info = forged("Losing", {Cap.HISTORY: Support.none("forgotten")})
    tests = announce(info)
    with pytest.raises(AssertionError, match="history: claimed False"):
        run(tests, "declared_caps_match_methods")


def test_a_missing_capability_turns_its_cases_round(announce: Announce) -> None:
    nothing = {cap: Support.none("not at this broker", "choose another") for cap in Cap}
    info = replace(forged("Losing", nothing), factory="pubsub_core.memory.backend:MemoryBackend")
    tests = announce(info)
    turned = 0
    for case in CASES:
        if case.caps and case.name not in tests.not_applicable and case.fast:
            run(tests, case.name)
            turned += 1
    assert turned > 30


def test_a_capability_that_only_this_server_lacks_is_skipped_with_its_reason() -> None:
    class Lacking(suite("memory")):  # type: ignore[misc]  # the base is made at run time
        harness = replace(test_memory.TestMemory.harness, lacks={Cap.HISTORY: "the disk is full"})

    with pytest.raises(pytest.skip.Exception, match="the disk is full"):
        run(Lacking(), "history_last_n_in_order")


def test_a_missing_capability_without_a_reason_is_found(announce: Announce) -> None:
    info = forged("Losing", {Cap.HISTORY: Support.none("")})
    tests = announce(info)
    with pytest.raises(AssertionError, match="without a reason"):
        run(tests, "history_last_n_in_order")


# --- what runs -----------------------------------------------------------------------------


def test_numbers_and_names_are_unique() -> None:
    assert len({case.number for case in CASES}) == len(CASES)
    assert len({case.name for case in CASES}) == len(CASES)
    assert CASES[-1].name == "errors_carry_code_hint_backend"
    assert all(case.body.__doc__ for case in CASES)


def test_every_case_is_a_method_or_listed_with_its_reason() -> None:
    for name, tests in LISTED.items():
        for case in CASES:
            reason = tests.not_applicable.get(case.name)
            method = getattr(tests, f"test_{case.name}")
            if reason is None and case.fast:
                assert callable(method), f"{name} does not run {case.name}"
            assert reason is None or len(reason) > 5


def test_modes_select_cases() -> None:
    chosen = {mode: {case.name for case in CASES if case.runs_in(mode)} for mode in Mode}
    assert chosen[Mode.FULL] == {case.name for case in CASES}
    assert chosen[Mode.QUICK] < chosen[Mode.DEFAULT] < chosen[Mode.FULL]
    assert chosen[Mode.OUTAGE] == {case.name for case in CASES if case.outage}
    assert not chosen[Mode.QUICK] & chosen[Mode.OUTAGE]


def test_the_documentation_lists_what_does_not_apply() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text()
    start, end = "<!-- not applicable -->\n", "<!-- end -->"
    written = text.partition(start)[2].partition(end)[0]
    assert written == table(), f"between the marks of docs/conformance.md belongs:\n{table()}"


def table() -> str:
    """Return the documentation's list of cases that do not apply."""
    numbers = {case.name: case.number for case in CASES}
    lines: list[str] = []
    for name, tests in LISTED.items():
        lines += ["", f"**{name}**", ""]
        by_reason: dict[str, list[str]] = {}
        for case, reason in tests.not_applicable.items():
            by_reason.setdefault(reason, []).append(f"`{case}` ({numbers[case]})")
        lines += [f"- {reason}: {', '.join(cases)}" for reason, cases in by_reason.items()]
        lines += [
            f"- lacks {cap}: {reason}; the cases that need it are skipped and say so"
            for cap, reason in tests.harness.lacks.items()
        ]
    return "\n".join([*lines, "", ""])


# --- in somebody else's tests -----------------------------------------------------------------

FOREIGN = """
from pubsub_core.testing import Harness, suite

class TestForeign(suite("memory")):
    harness = Harness(url="memory://{unique}")
"""


def foreign(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_foreign.py").write_text(FOREIGN)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            os.devnull,
            "--strict-markers",
            "-p",
            "no:cacheprovider",
            *arguments,
            str(folder / "test_foreign.py"),
        ],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


@pytest.mark.slow
def test_it_runs_with_pytest_alone(tmp_path: Path) -> None:
    done = foreign(tmp_path, "-p", "no:asyncio", "-k", "roundtrip or overflow or close")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_it_runs_beside_pytest_asyncio_in_strict_mode(tmp_path: Path) -> None:
    done = foreign(tmp_path, "-o", "asyncio_mode=strict", "-k", "topics")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("chosen", list(Mode))
def test_the_environment_selects_the_mode(chosen: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, chosen.value)

    class Chosen(suite("memory")):  # type: ignore[misc]  # the base is made at run time
        harness = test_memory.TestMemory.harness

    for case in CASES:
        there = callable(getattr(Chosen, f"test_{case.name}"))
        applies = case.name not in Chosen.not_applicable
        assert there == (applies and case.runs_in(chosen)), case.name


def test_a_mode_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "wrong")
    with pytest.raises(ValueError, match="choose one of default, quick"):
        mode()


@pytest.mark.slow
def test_the_plugin_brings_an_option_and_marks(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["pubsub_core.testing.plugin"]\n')
    done = foreign(tmp_path, "--collect-only", "--pubsub-suite=quick", "-m", "conformance")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_roundtrip_bytes" in done.stdout
    assert "test_all_subscriptions_restored" not in done.stdout


@pytest.mark.slow
def test_stress_repeats_a_case_with_printed_seeds(tmp_path: Path) -> None:
    done = foreign(tmp_path, "-s", "-k", "topics_do_not_cross", **{VARIABLE: "stress"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PUBSUB_SUITE_SEED=" in done.stdout
