from __future__ import annotations

import pytest

from pubsub_losant.client.link import device_keepalive
from pubsub_mqtt.connection.keepalive import KeepaliveStep, Quiet, standard_keepalive


def quiet(
    inbound: float = 0.0,
    outbound: float = 0.0,
    pinged: float | None = None,
    *,
    keepalive: int = 60,
    reading: bool = True,
) -> Quiet:
    return Quiet(keepalive, inbound, outbound, pinged, reading)


@pytest.mark.parametrize(
    ("keepalive", "after"),
    [(60, 45.0), (4, 3.0), (3, 2.0), (2, 1.0), (1, 0.5)],
)
def test_the_standard_pings_a_quarter_early_and_at_least_a_second(
    keepalive: int, after: float
) -> None:
    early = after - 0.01
    assert not standard_keepalive(quiet(early, early, keepalive=keepalive)).ping
    assert standard_keepalive(quiet(0.0, after, keepalive=keepalive)).ping
    assert standard_keepalive(quiet(after, 0.0, keepalive=keepalive)).ping


def test_the_standard_asks_a_silent_peer_once() -> None:
    assert standard_keepalive(quiet(inbound=45.0, pinged=None)).ping
    assert not standard_keepalive(quiet(inbound=46.0, pinged=1.0)).ping
    # Something arrived after that question; it was the answer to it.
    assert standard_keepalive(quiet(inbound=45.0, pinged=50.0)).ping


def test_the_standard_gives_up_after_one_and_a_half_intervals() -> None:
    assert not standard_keepalive(quiet(inbound=89.9, pinged=44.9)).dead
    assert standard_keepalive(quiet(inbound=90.0, pinged=45.0)).dead == "was silent for 90.0 s"


def test_the_standard_forgives_silence_while_nothing_is_read() -> None:
    step = standard_keepalive(quiet(inbound=1000.0, outbound=10.0, reading=False))
    assert step == KeepaliveStep(35.0)


def test_the_standard_is_due_when_something_can_happen() -> None:
    assert standard_keepalive(quiet(inbound=10.0, outbound=20.0)).due == 25.0
    assert standard_keepalive(quiet(inbound=30.0, outbound=20.0)).due == 15.0
    assert standard_keepalive(quiet(inbound=60.0, outbound=15.0, pinged=15.0)).due == 30.0


def test_a_device_pings_only_when_it_sent_nothing() -> None:
    assert device_keepalive(quiet(inbound=1000.0, outbound=59.0)) == KeepaliveStep(1.0)
    assert device_keepalive(quiet(inbound=0.0, outbound=60.0)) == KeepaliveStep(60.0, ping=True)


def test_a_device_waits_one_interval_for_any_answer() -> None:
    assert device_keepalive(quiet(61.0, 1.0, pinged=1.0)) == KeepaliveStep(59.0)
    assert device_keepalive(quiet(120.0, 60.0, pinged=60.0)).dead == "did not answer for 60.0 s"
    answered = quiet(inbound=59.0, outbound=60.0, pinged=60.0)
    assert device_keepalive(answered) == KeepaliveStep(60.0, ping=True)
