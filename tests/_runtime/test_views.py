"""PresenceView and notifications: snapshot, changes, balance, resynchronisation."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core._runtime.views import NotificationsView, PresenceView, View
from pubsub_core.errors import BusClosed, NotConnected
from pubsub_core.events import InterestEvent, InterestKind
from pubsub_core.interest import Presence
from pubsub_core.interfaces import Watch, WatchKind
from pubsub_core.message import Member


async def nothing(view: View) -> None:
    return None


def presence() -> PresenceView:
    return PresenceView(Watch(1, WatchKind.PRESENCE, "room"), nothing, nothing)


def notifications() -> NotificationsView:
    return NotificationsView(Watch(1, WatchKind.NOTIFICATIONS, "LSE/#"), nothing, nothing)


def joined(who: str, topic: str = "room") -> InterestEvent:
    return InterestEvent(InterestKind.JOINED, topic, Member(who))


def left(who: str, topic: str = "room", reason: str = "unsubscribed") -> InterestEvent:
    return InterestEvent(InterestKind.LEFT, topic, Member(who), reason)


SYNCED = InterestEvent(InterestKind.SYNCED, "LSE/#")


def told(view: View) -> list[str]:
    result = [
        f"{event.kind.value} {event.member.id if event.member else ''} {event.reason}".strip()
        for event in view._events
    ]
    view._events.clear()
    return result


def test_the_snapshot_is_there_before_any_change_is_told() -> None:
    view = presence()
    view.snapshot([Member("a"), Member("b")])
    assert [member.id for member in view.members.values()] == ["a", "b"]
    assert Presence(view).count == 2
    assert view.synced
    assert told(view) == []


def test_a_change_told_before_the_snapshot_counts_once() -> None:
    view = presence()
    view.apply(joined("a"))
    view.apply(joined("b"))
    view.apply(left("c"))
    view.snapshot([Member("a")])
    assert [member.id for member in view.members.values()] == ["a", "b"]
    assert told(view) == ["joined b"]


def test_repeated_changes_count_once() -> None:
    view = presence()
    view.snapshot([])
    for event in (joined("a"), joined("a"), left("a"), left("a")):
        view.apply(event)
    assert told(view) == ["joined a", "left a unsubscribed"]


def test_after_a_reconnect_the_differences_are_told() -> None:
    view = presence()
    view.snapshot([Member("a"), Member("b")])
    view.stale()
    view.apply(joined("d"))
    view.snapshot([Member("b"), Member("c")])
    assert told(view) == ["left a resync", "joined c", "resynced", "joined d"]
    assert {member.id for member in view.members.values()} == {"b", "c", "d"}


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from("abc"))),
    st.lists(st.tuples(st.booleans(), st.sampled_from("abc"))),
)
def test_presence_agrees_with_the_truth_wherever_the_snapshot_falls(
    before: list[tuple[bool, str]], after: list[tuple[bool, str]]
) -> None:
    truth: set[str] = set()
    view = presence()
    for joins, who in before:
        (truth.add if joins else truth.discard)(who)
    snapshot = [Member(who) for who in sorted(truth)]
    later: list[InterestEvent] = []
    for joins, who in after:
        (truth.add if joins else truth.discard)(who)
        later.append(joined(who) if joins else left(who))
    view.snapshot(snapshot)
    known = {member.id for member in snapshot}
    for event in later:
        view.apply(event)
    for event in view._events:
        assert event.member is not None
        (known.add if event.joined else known.discard)(event.member.id)
    assert {member.id for member in view.members.values()} == truth == known


def test_interest_is_balanced_over_repeated_subscriptions() -> None:
    view = notifications()
    for event in (joined("a", "LSE/VOD"), joined("a", "LSE/VOD"), left("a", "LSE/VOD")):
        view.apply(event)
    assert told(view) == ["joined a"]
    view.apply(left("a", "LSE/VOD"))
    assert told(view) == ["left a unsubscribed"]
    assert view.interest == {}


def test_a_member_that_dies_leaves_once_however_often_it_subscribed() -> None:
    view = notifications()
    view.apply(joined("a", "LSE/VOD"))
    view.apply(joined("a", "LSE/VOD"))
    view.apply(left("a", "LSE/VOD", reason="lost"))
    assert told(view) == ["joined a", "left a lost"]
    view.apply(left("a", "LSE/VOD"))
    assert told(view) == []


def test_existing_interest_is_told_before_synced() -> None:
    view = notifications()
    view.apply(joined("a", "LSE/VOD"))
    assert not view.synced
    view.apply(SYNCED)
    assert view.synced
    assert told(view) == ["joined a", "synced"]
    assert view.interest == {"LSE/VOD": (Member("a"),)}


def test_after_a_reconnect_only_differences_are_told() -> None:
    view = notifications()
    for event in (joined("a", "LSE/VOD"), joined("b", "LSE/BT"), SYNCED):
        view.apply(event)
    told(view)
    view.stale()
    for event in (joined("a", "LSE/VOD"), joined("c", "LSE/BT"), SYNCED):
        view.apply(event)
    assert told(view) == ["joined c", "left b resync", "synced"]


async def test_iterating_waits_and_ends_with_the_view() -> None:
    view = presence()
    view.snapshot([])
    waiting = asyncio.create_task(view.get(timeout=5))
    await asyncio.sleep(0)
    view.apply(joined("a"))
    assert (await waiting).joined
    with pytest.raises(TimeoutError):
        await view.get(timeout=0)
    view.end()
    assert [event async for event in Presence(view)] == []
    with pytest.raises(BusClosed):
        await view.get(timeout=5)


async def test_a_failure_is_raised_after_what_was_told() -> None:
    view = presence()
    view.snapshot([])
    view.apply(joined("a"))
    view.fail(NotConnected("gone"))
    assert (await view.get(timeout=5)).joined
    with pytest.raises(NotConnected):
        await view.get(timeout=5)


def test_changes_nobody_reads_are_bounded_and_the_hole_is_told() -> None:
    view = presence()
    view.snapshot([])
    for number in range(5000):
        view.apply(joined(str(number)))
    assert len(view._events) <= 4096
    assert view._events[0].kind is InterestKind.RESYNCED
    assert len(view.members) == 5000
    assert view.dropped > 0
