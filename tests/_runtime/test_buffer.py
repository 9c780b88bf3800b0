"""The queue of a subscription: bounds, overflow policies, gaps, replay, cancellation."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core._runtime.buffer import Buffer, Settlement, SubscriptionSettings
from pubsub_core.errors import SubscriptionOverflow
from pubsub_core.events import Gap, GapReason
from pubsub_core.interfaces import HistoryQuery
from pubsub_core.message import InFrame, Verdict
from pubsub_core.stats import BusStats


@dataclass
class Flow:
    """What the buffer told: that the flow must stop or go on, and episodes of dropping."""

    log: list[str] = field(default_factory=list)
    told: list[tuple[int, float]] = field(default_factory=list)
    now: float = 5.0


def buffer_of(flow: Flow | None = None, **settings: Any) -> Buffer:
    flow = flow or Flow()
    complete = {"buffer": 3, "buffer_bytes": 1000, "overflow": "drop_oldest", **settings}
    return Buffer(
        "a/#",
        SubscriptionSettings(**complete),
        stats=BusStats(),
        now=lambda: flow.now,
        pause=lambda: flow.log.append("pause"),
        unpause=lambda: flow.log.append("unpause"),
        report=lambda lost, seconds: flow.told.append((lost, seconds)),
    )


def frame(payload: str, topic: str = "a/b", id: str | None = None) -> InFrame:
    return InFrame(topic=topic, payload=payload.encode(), id=id)


def fill(buffer: Buffer, payloads: str, topic: str = "a/b") -> None:
    for payload in payloads:
        buffer.put(frame(payload, topic), None)


def drain(buffer: Buffer) -> list[str]:
    items: list[str] = []
    while buffer.ready:
        item = buffer.pop()
        items.append(f"gap {item.lost}" if isinstance(item, Gap) else item[0].payload.decode())
    return items


def test_messages_come_out_in_order() -> None:
    buffer = buffer_of()
    fill(buffer, "abc")
    assert drain(buffer) == ["a", "b", "c"]
    assert (buffer.received, buffer.dropped, len(buffer), buffer.bytes) == (3, 0, 0, 0)


def test_drop_oldest_keeps_the_newest() -> None:
    buffer = buffer_of()
    fill(buffer, "abcde")
    assert drain(buffer) == ["c", "d", "e"]
    assert (buffer.received, buffer.dropped, buffer.dropped_bytes) == (5, 2, 2)


def test_drop_newest_keeps_the_oldest() -> None:
    buffer = buffer_of(overflow="drop_newest")
    fill(buffer, "abcde")
    assert drain(buffer) == ["a", "b", "c"]
    assert buffer.dropped == 2


def test_latest_keeps_one_message_of_each_topic() -> None:
    buffer = buffer_of(overflow="latest")
    for payload, topic in (("1", "x"), ("2", "y"), ("3", "x"), ("4", "x")):
        buffer.put(frame(payload, topic), None)
    assert drain(buffer) == ["4", "2"]
    assert buffer.dropped == 2
    fill(buffer, "5", "x")
    assert drain(buffer) == ["5"]


def test_latest_with_more_topics_than_room_drops_the_oldest() -> None:
    buffer = buffer_of(overflow="latest")
    for topic in "vwxyz":
        buffer.put(frame(topic, topic), None)
    assert drain(buffer) == ["x", "y", "z"]


def test_dropping_the_oldest_again_and_again_is_one_episode() -> None:
    flow = Flow()
    buffer = buffer_of(flow, buffer=2)
    fill(buffer, "abcde")
    assert flow.told == []
    drain(buffer)
    assert flow.told == [(3, 0.0)]


async def test_error_ends_after_what_waits_was_taken() -> None:
    buffer = buffer_of(overflow="error")
    fill(buffer, "abcd")
    assert not buffer.open
    assert drain(buffer) == ["a", "b", "c"]
    with pytest.raises(SubscriptionOverflow) as caught:
        await buffer.take()
    assert caught.value.buffered == 3


def test_block_stops_the_flow_once_and_releases_it_at_half() -> None:
    flow = Flow()
    buffer = buffer_of(flow, buffer=4, overflow="block")
    fill(buffer, "abcdef")
    assert flow.log == ["pause"]
    assert buffer.dropped == 0
    for _ in range(3):
        buffer.pop()
    assert flow.log == ["pause"]
    buffer.pop()
    assert flow.log == ["pause", "unpause"]
    assert drain(buffer) == ["e", "f"]


def test_bytes_are_bounded_too() -> None:
    buffer = buffer_of(buffer=100, buffer_bytes=10)
    for payload in ("aaaa", "bbbb", "cccc"):
        buffer.put(frame(payload), None)
    assert buffer.bytes <= 10
    assert drain(buffer) == ["bbbb", "cccc"]


@pytest.mark.parametrize("overflow", ["drop_oldest", "drop_newest", "latest", "error", "block"])
def test_one_message_always_fits_an_empty_buffer(overflow: str) -> None:
    flow = Flow()
    buffer = buffer_of(flow, buffer_bytes=10, overflow=overflow)
    buffer.put(frame("x" * 11), None)
    assert drain(buffer) == ["x" * 11]
    assert (buffer.dropped, flow.log) == (0, [])


@pytest.mark.parametrize(
    ("overflow", "kept"),
    [("drop_oldest", ["x" * 11]), ("latest", ["x" * 11]), ("drop_newest", ["a", "b"])],
)
def test_a_message_larger_than_the_bound_follows_the_policy(overflow: str, kept: list[str]) -> None:
    buffer = buffer_of(buffer_bytes=10, overflow=overflow)
    for payload, topic in (("a", "s"), ("b", "t"), ("x" * 11, "s")):
        buffer.put(frame(payload, topic), None)
    assert drain(buffer) == kept


def test_latest_marks_each_hole_where_the_newer_message_stands() -> None:
    buffer = buffer_of(overflow="latest", gaps=True)
    for payload, topic in (("1", "x"), ("2", "y"), ("3", "x"), ("4", "x")):
        buffer.put(frame(payload, topic), None)
    assert drain(buffer) == ["gap 2", "4", "2"]
    assert len(buffer) == 0
    fill(buffer, "5", "x")
    assert drain(buffer) == ["5"]


def test_latest_counts_what_a_dropped_message_had_replaced() -> None:
    buffer = buffer_of(overflow="latest", gaps=True)
    for topic in "vvwxyz":
        buffer.put(frame(topic, topic), None)
    assert drain(buffer) == ["gap 3", "x", "y", "z"]  # v twice, and w


def test_dropping_is_told_once_when_there_is_room_again() -> None:
    flow = Flow()
    buffer = buffer_of(flow, buffer=4)
    fill(buffer, "abcdefg")
    flow.now = 7.0
    buffer.pop()
    assert flow.told == []
    buffer.pop()
    assert flow.told == [(3, 2.0)]
    fill(buffer, "hij")
    buffer.end(None)
    assert flow.told == [(3, 2.0), (1, 0.0)]


def test_dropping_that_goes_on_is_told_all_the_same() -> None:
    flow = Flow()
    buffer = buffer_of(flow, overflow="drop_newest")
    for second in range(100):
        flow.now = float(second)
        fill(buffer, "a" * 100)
    told = [lost for lost, _ in flow.told]
    assert sum(told) > 9000
    assert 5 <= len(told) <= 10
    buffer.end(None)
    assert sum(lost for lost, _ in flow.told) == buffer.dropped == 9997


def test_what_latest_replaces_is_counted_and_no_episode() -> None:
    flow = Flow()
    buffer = buffer_of(flow, overflow="latest")
    fill(buffer, "abc")
    buffer.end(None)
    assert (buffer.dropped, flow.told) == (2, [])


def test_a_gap_stands_where_messages_were_dropped() -> None:
    oldest = buffer_of(gaps=True)
    fill(oldest, "abcde")
    assert drain(oldest) == ["gap 2", "c", "d", "e"]
    newest = buffer_of(gaps=True, overflow="drop_newest")
    fill(newest, "abcde")
    newest.pop()
    fill(newest, "f")
    assert drain(newest) == ["b", "c", "gap 2", "f"]


def test_a_gap_of_the_session_keeps_its_place_beside_dropped_messages() -> None:
    buffer = buffer_of(gaps=True)
    fill(buffer, "ab")
    buffer.put_gap(Gap(GapReason.DISCONNECTED, None, False, 1.0, 2.0))
    fill(buffer, "cd")
    assert drain(buffer) == ["gap 1", "b", "gap None", "c", "d"]


def test_gaps_do_not_take_the_room_of_messages() -> None:
    buffer = buffer_of(gaps=True)
    for _ in range(5):
        buffer.put_gap(Gap(GapReason.DISCONNECTED, None, False, 1.0, 2.0))
    fill(buffer, "abc")
    assert len(buffer) == 3
    assert buffer.dropped == 0


def test_dropped_messages_are_settled() -> None:
    settled: list[tuple[object, Verdict]] = []

    def delivery(tag: str) -> Settlement:
        return Settlement(tag, 1, lambda tag, verdict: settled.append((tag, verdict)))

    buffer = buffer_of(buffer=1)
    buffer.put(frame("a"), delivery("a"))
    buffer.put(frame("b"), delivery("b"))
    assert settled == [("a", Verdict.REJECT)]
    buffer.end(Verdict.NACK)
    assert settled[1:] == [("b", Verdict.NACK)]
    buffer.put(frame("c"), delivery("c"))
    assert settled[2:] == [("c", Verdict.ACK)]


def test_what_arrives_or_waits_while_a_bus_closes_stays_with_the_broker() -> None:
    settled: list[object] = []
    buffer = buffer_of()
    for tag in ("waits", "late"):
        buffer.put(frame(tag), Settlement(tag, 1, lambda tag, _: settled.append(tag)))
        buffer.finish()
    assert drain(buffer) == ["waits"]
    other = buffer_of()
    other.put(frame("waits"), Settlement("waits", 1, lambda tag, _: settled.append(tag)))
    other.end(None)
    other.put(frame("late"), Settlement("late", 1, lambda tag, _: settled.append(tag)))
    assert not other.ready
    assert settled == []


@pytest.mark.parametrize(
    ("verdicts", "final"),
    [
        ([Verdict.ACK, Verdict.ACK], Verdict.ACK),
        ([Verdict.ACK, Verdict.REJECT], Verdict.REJECT),
        ([Verdict.REJECT, Verdict.ACK], Verdict.REJECT),
        ([Verdict.REJECT, Verdict.NACK], Verdict.NACK),
        ([Verdict.NACK, Verdict.ACK], Verdict.NACK),
        ([Verdict.NACK, Verdict.REJECT], Verdict.NACK),
    ],
)
def test_a_frame_for_several_is_settled_once_with_the_worst(
    verdicts: list[Verdict], final: Verdict
) -> None:
    settled: list[Verdict] = []
    delivery = Settlement(1, len(verdicts), lambda tag, verdict: settled.append(verdict))
    for verdict in verdicts[:-1]:
        delivery.decide(verdict)
        assert settled == []
    delivery.decide(verdicts[-1])
    assert settled == [final]


def test_replay_comes_first_and_no_message_twice() -> None:
    buffer = buffer_of(buffer=10)
    buffer.hold()
    buffer.put(frame("3", id="3"), None)
    buffer.put(frame("4", id="4"), None)
    assert not buffer.ready
    buffer.replay([frame("1", id="1"), frame("2", id="2"), frame("3", id="3")])
    fill(buffer, "5")
    assert drain(buffer) == ["1", "2", "3", "4", "5"]


def test_what_is_held_is_bounded() -> None:
    buffer = buffer_of()
    buffer.hold()
    fill(buffer, "abcde")
    buffer.replay([])
    assert drain(buffer) == ["c", "d", "e"]
    assert (buffer.received, buffer.dropped) == (5, 2)


async def test_a_cancelled_take_loses_nothing() -> None:
    buffer = buffer_of()
    for number in range(50):
        taking = asyncio.create_task(buffer.take())
        await asyncio.sleep(0)
        buffer.put(frame(str(number)), None)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert drain(buffer) == [str(number)]


async def test_a_cancelled_wake_up_goes_to_the_next_who_waits() -> None:
    buffer = buffer_of()
    first, second = asyncio.create_task(buffer.take()), asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    buffer.put(frame("a"), None)
    first.cancel()
    async with asyncio.timeout(5):
        item = await second
    assert isinstance(item, tuple)
    assert item[0].payload == b"a"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_finish_lets_the_rest_be_taken_then_ends() -> None:
    buffer = buffer_of()
    fill(buffer, "a")
    buffer.finish()
    fill(buffer, "b")
    assert drain(buffer) == ["a"]
    assert await buffer.take() is None


@pytest.mark.parametrize(
    "settings",
    [
        {"buffer": 0},
        {"buffer_bytes": 0},
        {"overflow": "explode"},
        {"on_decode_error": "guess"},
        {"on_decode_error": "dead_letter"},
        {"ack": "perhaps"},
        {"qos": 3},
        {"group": ""},
        {"group": "a/b"},
        {"replay": HistoryQuery(last=-1)},
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any]) -> None:
    complete = {"buffer": 1, "buffer_bytes": 1, "overflow": "drop_oldest", **settings}
    with pytest.raises(ValueError, match=next(iter(settings))):
        SubscriptionSettings(**complete)


@given(
    st.sampled_from(["drop_oldest", "drop_newest", "latest"]),
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 12)) | st.none(), max_size=80),
)
def test_bounds_hold_and_every_message_is_accounted_for(
    overflow: str, steps: list[tuple[str, int] | None]
) -> None:
    buffer = buffer_of(buffer=4, buffer_bytes=20, overflow=overflow)
    taken = 0
    for step in steps:
        if step is None:
            if buffer.ready:
                buffer.pop()
                taken += 1
        else:
            buffer.put(InFrame(topic=step[0], payload=b"." * step[1]), None)
        assert len(buffer) <= 4
        assert 0 <= buffer.bytes <= 20
        assert buffer.received == taken + buffer.dropped + len(buffer)
