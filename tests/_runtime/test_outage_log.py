"""The lines about an outage: one when it begins, few while it lasts, one when it is over."""

from __future__ import annotations

import logging

import pytest

from pubsub_core._runtime.outage_log import OutageLog
from pubsub_core.errors import AuthenticationFailed, ConnectError
from pubsub_core.events import Gap, GapReason, Status, StatusChanged
from pubsub_core.testing.clock import VirtualClock

RESET = ConnectError("the peer reset the connection")


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pubsub_core")


def gap(*, recovered: bool) -> Gap:
    return Gap(GapReason.DISCONNECTED, None, recovered, 0.0, 1.0)


def retry(seconds: float) -> StatusChanged:
    return StatusChanged(Status.RECONNECTING, error=RESET, retry_in=seconds)


async def test_an_outage_is_a_line_at_its_beginning_and_one_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = VirtualClock()
    log = OutageLog("main", "mqtt://localhost", clock)
    log.note(retry(0.3))
    await clock.advance(12)
    log.note(gap(recovered=False))
    log.note(StatusChanged(Status.ONLINE, generation=2))
    lost, back = caplog.messages
    assert "'main': lost mqtt://localhost" in lost
    assert str(RESET) in lost
    assert "back at mqtt://localhost after 12.0 s; messages may be missing" in back


async def test_attempts_are_told_as_their_interval_doubles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = OutageLog("main", "mqtt://localhost", VirtualClock())
    log.note(retry(0.1))
    for seconds in (0.5, 2.0, 3.0, 1.0, 4.0, 7.9, 8.0, 8.0, 8.0):
        log.note(retry(seconds))
    told = [record.args[3] for record in caplog.records[1:]]  # type: ignore[index]  # a tuple
    assert told == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("recovered", "text"), [(True, "no message is missing"), (False, "messages may be missing")]
)
def test_the_end_says_what_was_missed(
    caplog: pytest.LogCaptureFixture, recovered: bool, text: str
) -> None:
    log = OutageLog("main", "memory://", VirtualClock())
    log.note(retry(0.1))
    log.note(gap(recovered=recovered))
    log.note(StatusChanged(Status.ONLINE, generation=2))
    assert text in caplog.messages[-1]


def test_a_first_session_leaves_no_line(caplog: pytest.LogCaptureFixture) -> None:
    log = OutageLog("main", "memory://", VirtualClock())
    for status in (Status.CONNECTING, Status.ONLINE, Status.CLOSING, Status.CLOSED):
        log.note(StatusChanged(status))
    assert caplog.messages == []


def test_giving_up_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    log = OutageLog("main", "memory://", VirtualClock())
    log.note(StatusChanged(Status.FAILED, error=AuthenticationFailed("bad password")))
    assert "gave up memory://: bad password" in caplog.messages[-1]
