"""Presence and notifications: cases 113 to 125, without 122 to 124."""

from __future__ import annotations

import asyncio
from typing import Any

from pubsub_core.capabilities import Cap
from pubsub_core.errors import NotAuthorized
from pubsub_core.events import InterestEvent, InterestKind, Notice
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

from .outage import SOON

__all__: list[str] = []


async def _next(t: Trial, view: Any, *kinds: InterestKind) -> InterestEvent:
    """Return the next event of one of these kinds."""
    while True:
        event: InterestEvent = await t.within(view.__anext__())
        if event.kind in kinds:
            return event


async def _enter(t: Trial, view: Any) -> Any:
    entered = await t.within(view.__aenter__())
    t.stack.push_async_callback(view.__aexit__, None, None, None)
    return entered


@case(113)
@needs(Cap.PRESENCE)
async def presence_lists_subscribers(t: Trial) -> None:
    """Subscribers are listed, oneself too, under an id that stays."""
    bus, other = await t.connect(), await t.connect()
    assert list(await t.within(bus.members(t.topic()))) == []
    await t.subscribed(bus, t.topic())
    await t.subscribed(other, t.topic())
    members = list(await t.within(bus.members(t.topic())))
    again = list(await t.within(other.members(t.topic())))
    assert len({member.id for member in members}) == 2
    assert {member.id for member in members} == {member.id for member in again}
    room = await _enter(t, bus.presence(t.topic()))
    assert room.count == 2
    assert {member.id for member in room.members} == {member.id for member in members}
    assert room.synced


@case(114)
@needs(Cap.PRESENCE)
async def presence_snapshot_then_changes_no_race(t: Trial) -> None:
    """Members that join while a watch begins are seen once."""
    bus = await t.connect()
    others = await t.all(t.connect() for _ in range(10))
    joining = [asyncio.create_task(t.subscribed(other, t.topic())) for other in others[:5]]
    room = await _enter(t, bus.presence(t.topic()))
    first = {member.id for member in room.members}
    joining += [asyncio.create_task(t.subscribed(other, t.topic())) for other in others[5:]]
    await t.all(joining)
    await t.eventually(lambda: room.count == 10, "ten members")
    joined: list[str] = []
    while len(first) + len(joined) < 10:
        event = await _next(t, room, InterestKind.JOINED)
        assert event.member is not None
        joined.append(event.member.id)
    assert not first & set(joined), "a member of the snapshot joined once more"
    assert len(set(joined)) == len(joined), "a member joined twice"


@case(115)
@needs(Cap.PRESENCE, Need.CUT)
async def presence_join_and_leave_events(t: Trial) -> None:
    """Joining, unsubscribing, closing and vanishing are told, with a reason where known."""
    link = await t.link()
    bus = await t.connect()
    room = await _enter(t, bus.presence(t.topic()))
    other = await t.connect()
    subscription = await t.subscribed(other, t.topic())
    joined = await _next(t, room, InterestKind.JOINED)
    assert joined.joined
    assert joined.member is not None
    await t.within(subscription.close())
    left = await _next(t, room, InterestKind.LEFT)
    assert left.left
    assert left.member is not None
    assert left.member.id == joined.member.id
    assert left.reason in ("unsubscribed", "")
    closing = await t.connect()
    await t.subscribed(closing, t.topic())
    await _next(t, room, InterestKind.JOINED)
    await t.within(closing.close())
    assert (await _next(t, room, InterestKind.LEFT)).reason in ("closed", "unsubscribed", "")
    vanishing = await t.connect(link=link, reconnect=False)
    await t.subscribed(vanishing, t.topic())
    await _next(t, room, InterestKind.JOINED)
    await t.within(link.cut())
    assert (await _next(t, room, InterestKind.LEFT)).reason in ("lost", "closed", "")
    await t.eventually(lambda: room.count == 0, "an empty room")


@case(116)
@needs(Cap.PRESENCE)
async def presence_no_duplicate_events(t: Trial) -> None:
    """However often a member subscribes, it joins once and leaves once."""
    bus, other = await t.connect(), await t.connect()
    room = await _enter(t, bus.presence(t.topic()))
    subscriptions = [await t.subscribed(other, t.topic()) for _ in range(3)]
    if bus.supports(Cap.WILDCARDS):
        subscriptions.append(await t.subscribed(other, t.topic() + "/#"))
    for subscription in subscriptions:
        await t.within(subscription.close())
    last = await t.connect()
    await t.subscribed(last, t.topic())
    events = [await _next(t, room, InterestKind.JOINED, InterestKind.LEFT) for _ in range(3)]
    assert [event.kind for event in events] == [
        InterestKind.JOINED,
        InterestKind.LEFT,
        InterestKind.JOINED,
    ]
    assert room.count == 1


@case(117, outage=True)
@needs(Cap.PRESENCE, Need.CUT)
async def presence_restored_after_reconnect(t: Trial) -> None:
    """After an outage the view is compared: who vanished meanwhile leaves, who came joins."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    staying, leaving, coming = await t.all(t.connect() for _ in range(3))
    await t.subscribed(staying, t.topic())
    gone = await t.subscribed(leaving, t.topic())
    mine = await t.subscribed(bus, t.topic())
    room = await _enter(t, bus.presence(t.topic()))
    before = {member.id for member in room.members}
    assert len(before) == 3
    sessions = bus.stats.sessions
    await t.within(link.down())
    await t.eventually(lambda: bus.status == "reconnecting", "the loss is noticed")
    await t.within(gone.close())
    await t.subscribed(coming, t.topic())
    await t.within(link.up())
    await t.eventually(lambda: bus.stats.sessions > sessions, "a new session", 10)
    events: list[InterestEvent] = []
    while not events or events[-1].kind is not InterestKind.RESYNCED:
        events.append(await _next(t, room, *InterestKind))
    joined = [event.member.id for event in events if event.joined and event.member]
    left = [event.member.id for event in events if event.left and event.member]
    assert len(joined) == len(set(joined))
    assert len(left) == len(set(left))
    await t.eventually(lambda: room.count == 3, "three members again")
    after = {member.id for member in await t.within(bus.members(t.topic()))}
    assert {member.id for member in room.members} == after
    assert before - after <= set(left)
    assert after - before <= set(joined)
    await t.within(staying.publish(t.topic(), b"x"))
    await t.get(mine)


@case(118)
@needs(Cap.PRESENCE)
async def presence_two_connections_one_identity(t: Trial) -> None:
    """Two connections of one user are two members, and one leaving leaves the other."""
    bus = await t.connect()
    one, two = await t.connect(), await t.connect()
    room = await _enter(t, bus.presence(t.topic()))
    first = await t.subscribed(one, t.topic())
    await t.subscribed(two, t.topic())
    await t.eventually(lambda: room.count == 2, "two members")
    assert len({member.name for member in room.members}) == 1
    await t.within(first.close())
    await t.eventually(lambda: room.count == 1, "one member")
    assert len(list(await t.within(bus.members(t.topic())))) == 1


@case(119)
@needs(Cap.PRESENCE, Need.UNPRIVILEGED)
async def presence_denied_is_notauthorized(t: Trial) -> None:
    """Who may not look is told so."""
    bus = await t.connect(identity=t.harness.unprivileged_identity)
    denied = t.harness.denied.replace("{unique}", t.word)
    with t.raises(NotAuthorized):
        await t.within(bus.members(denied))
    with t.raises(NotAuthorized):
        async with bus.presence(denied):
            pass


@case(120)
@needs(Cap.NOTIFICATIONS)
async def notification_replays_existing_then_live(t: Trial) -> None:
    """A watch begins with the interest that exists, and goes on with every change."""
    bus, other = await t.connect(), await t.connect()
    existing = [await t.subscribed(other, t.topic(f"n{number}")) for number in range(3)]
    wildcards = bool(bus.supports(Cap.WILDCARDS))
    watch = await _enter(t, bus.notifications(t.topic("#") if wildcards else t.topic("n0")))
    expected = {t.topic(f"n{number}") for number in range(3 if wildcards else 1)}
    told = {(await _next(t, watch, InterestKind.JOINED)).topic for _ in expected}
    assert told == expected
    live = t.topic("n9") if wildcards else t.topic("n0")
    fresh = await t.connect()
    await t.subscribed(fresh, live)
    event = await _next(t, watch, InterestKind.JOINED)
    assert event.topic == live
    assert event.member is not None
    assert event.member.id
    await t.within(existing[0].close())
    event = await _next(t, watch, InterestKind.LEFT)
    assert event.topic == t.topic("n0")


@case(121)
@needs(Cap.NOTIFICATIONS, Need.CUT)
async def notification_counts_balanced(t: Trial) -> None:
    """Who subscribes twice and dies once leaves nothing of its demand."""
    link = await t.link()
    bus = await t.connect()
    watch = await _enter(t, bus.notifications(t.topic()))
    dying = await t.connect(link=link, reconnect=False)
    await t.subscribed(dying, t.topic())
    await t.subscribed(dying, t.topic())
    joined = await _next(t, watch, InterestKind.JOINED)
    staying = await t.connect()
    await t.subscribed(staying, t.topic())
    second = await _next(t, watch, InterestKind.JOINED)
    assert joined.member is not None
    assert second.member is not None
    assert second.member.id != joined.member.id, "one member joined twice"
    await t.within(link.cut())
    left = await _next(t, watch, InterestKind.LEFT)
    assert left.member is not None
    assert left.member.id == joined.member.id
    assert [member.id for member in watch.interest[t.topic()]] == [second.member.id]


@case(125)
@needs(Cap.SOURCE_LOST, Need.CUT)
async def source_lost_when_publisher_dies(t: Trial) -> None:
    """A subscriber is told when the publisher of a topic vanishes."""
    link = await t.link()
    bus = await t.connect()
    notices = t.watch(bus, Notice)
    subscription = await t.subscribed(bus, t.topic())
    publisher = await t.connect(link=link, reconnect=False)
    await t.within(publisher.publish(t.topic(), b"x"))
    await t.get(subscription)
    await t.within(link.cut())
    await t.eventually(lambda: bool(notices), "the loss is told")
    assert notices[0].kind == "source_lost"
    assert notices[0].topic == t.topic()
