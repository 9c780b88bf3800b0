"""Publishing stays below a broker's rate limits; reconnecting is neither slow nor hasty."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from pubsub_core.capabilities import Limits
from pubsub_core.pacing import Backoff, RateGuard, Window, Windows
from pubsub_core.testing.clock import VirtualClock


def test_without_limits_no_guard_is_needed() -> None:
    assert not RateGuard(Limits(), VirtualClock()).needed


def test_the_first_ones_pass_and_the_next_waits() -> None:
    guard = RateGuard(Limits(rate=(3, 15.0)), VirtualClock())
    assert [guard.reserve("a") for _ in range(4)] == [0, 0, 0, 15]


def test_topics_have_their_own_limit() -> None:
    guard = RateGuard(Limits(rate_per_topic=(1, 10.0)), VirtualClock())
    assert guard.reserve("a") == 0
    assert guard.reserve("b") == 0
    assert guard.delay("a") == 10


def test_what_the_backend_sent_again_counts_too() -> None:
    guard = RateGuard(Limits(rate=(3, 15.0), rate_per_topic=(2, 15.0)), VirtualClock())
    guard.note("a")
    assert guard.reserve("a") == 0
    assert (guard.delay("a"), guard.delay("b")) == (15, 0)
    guard.note("b")
    assert guard.delay("b") == 15


def test_windows_do_not_grow_and_remember_the_topics_that_are_in_use() -> None:
    window = Window(3, 1.0)
    for number in range(1000):
        window.note(number * 0.1)
    assert len(window._times) == 3
    windows = Windows(None, (30, 15.0))
    for number in range(10_000):
        windows.note(f"device {number}", float(number))
    for number in range(30):
        windows.note("device 0", 20_000.0 + number / 10)
    windows.note("one more", 20_003.0)
    assert windows.delay("device 0", 20_003.0) > 0
    assert windows.delay("device 1", 20_003.0) == 0
    assert len(windows._topics) == 10_000


def test_windows_are_full_when_one_topic_or_all_together_are() -> None:
    windows = Windows((3, 15.0), (2, 15.0))
    windows.note("a", 0.0)
    assert not windows.full(0.0)
    windows.note("a", 1.0)
    assert windows.full(14.9)
    assert not windows.full(15.0)
    windows.note("b", 15.0)
    assert not windows.full(15.0)
    windows.note("c", 15.5)
    assert windows.full(15.5)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.integers(1, 5))
@example(
    [0.610826463606612, 0, 0, 0, 0.610826463606612, 0.32550600716991457, 0.020652247794946486,
     1.1907502032772923],
    2,
)  # fmt: skip
def test_no_window_ever_holds_more_than_the_limit(pauses: list[float], count: int) -> None:
    clock = VirtualClock()
    guard = RateGuard(Limits(rate=(count, 4.0)), clock)
    sent: list[float] = []
    for pause in pauses:
        clock._elapsed += pause
        sent.append(clock.monotonic() + guard.reserve("a"))
    # Each moment is now and the wait added up, which rounds.
    assert all(later - earlier >= -1e-9 for earlier, later in pairwise(sent))
    for index in range(len(sent) - count):
        assert sent[index + count] - sent[index] >= 4.0 - 1e-9


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=200), st.floats(10, 1e6))
def test_backoff_stays_within_its_bound(draws: list[float], outage: float) -> None:
    remaining = iter([*draws, *[0.999] * 200])
    backoff = Backoff(0.5, 30.0, rng=lambda: next(remaining))
    for attempt in range(200):
        bound = min(30.0, 0.5 * 2.0**attempt)
        assert backoff.bound(outage) == bound
        assert 0 <= backoff.next(outage) <= bound


def test_backoff_first_try_comes_within_half_a_second() -> None:
    assert Backoff(0.5, 30.0, rng=lambda: 0.9999).next() < 0.5


def test_backoff_keeps_short_outages_short() -> None:
    """An outage of ten seconds at most is noticed to be over within two."""
    backoff = Backoff(0.5, 30.0, rng=lambda: 0.9999)
    outage = 0.0
    while outage < 10:
        delay = backoff.next(outage)
        assert delay < 2
        outage += delay


def test_backoff_spreads_evenly_from_zero() -> None:
    assert Backoff(0.5, 30.0, rng=lambda: 0.0).next() == 0.0
    assert Backoff(0.5, 30.0, rng=lambda: 0.5).next() == 0.25
