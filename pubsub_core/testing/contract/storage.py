"""History, last values, share groups, entitlements: cases 126 to 144, without 136 to 139."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from pubsub_core.authorization import Authorizer
from pubsub_core.bus import Bus
from pubsub_core.capabilities import Cap
from pubsub_core.errors import HandlerFailed, NotSupported
from pubsub_core.events import Notice, Status
from pubsub_core.interfaces import EVERYTHING, AuthorizationRequest
from pubsub_core.message import Message, Origin, Part
from pubsub_core.subscription import Subscription
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.links import Link
from pubsub_core.testing.servers import load
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

__all__: list[str] = []


async def _stored(t: Trial, bus: Any, count: int) -> None:
    for number in range(count):
        await t.within(bus.publish(t.topic(), b"%d" % number))


async def _history(bus: Any, filter: str, **query: Any) -> list[Message[bytes]]:
    return [message async for message in bus.history(filter, **query)]


@case(126)
@needs(Cap.HISTORY)
async def history_last_n_in_order(t: Trial) -> None:
    """The newest messages are given, the oldest of them first."""
    bus = await t.connect()
    await _stored(t, bus, 10)
    got = await t.within(_history(bus, t.topic(), last=4))
    assert [message.payload for message in got] == [b"6", b"7", b"8", b"9"]
    assert {message.topic for message in got} == {t.topic()}
    everything = await t.within(_history(bus, t.topic(), last=1000))
    assert [int(message.payload) for message in everything] == list(range(10))
    assert await t.within(_history(bus, t.topic("empty"), last=5)) == []


@case(127)
@needs(Cap.HISTORY)
async def history_time_window(t: Trial) -> None:
    """Both ends of a time window count."""
    bus = await t.connect()
    for number in range(5):
        await t.within(bus.publish(t.topic(), b"%d" % number))
        before = bus.clock.time()
        await t.until(before, lambda b: bus.clock.time() > b, "the clock goes on")
    times = {m.payload: m.time for m in await t.within(_history(bus, t.topic(), last=10))}
    assert len(times) == 5
    got = await t.within(_history(bus, t.topic(), since=times[b"1"], until=times[b"3"]))
    payloads = [message.payload for message in got]
    expected = [name for name, at in times.items() if times[b"1"] <= at <= times[b"3"]]
    assert payloads == sorted(expected)
    assert {b"1", b"2", b"3"} <= set(payloads)
    assert await t.within(_history(bus, t.topic(), since=times[b"4"] + 3600)) == []


@case(128)
@needs(Cap.HISTORY)
async def history_paging_complete(t: Trial) -> None:
    """A long history comes complete, without repetitions, however it is fetched."""
    bus = await t.connect()
    count = t.count(500, 3000)
    for start in range(0, count, 100):
        await t.all(bus.publish(t.topic(), b"%d" % (start + n)) for n in range(100))
    got = await t.within(_history(bus, t.topic(), last=count), 20)
    assert [int(message.payload) for message in got] == list(range(count))
    ids = [message.id for message in got]
    assert len(set(ids)) == count or set(ids) == {None}


@case(129)
@needs(Cap.REPLAY)
async def replay_then_live_without_gap_or_duplicate(t: Trial) -> None:
    """Messages published while a subscription changes from old to live arrive once."""
    bus, publisher = await t.connect(), await t.connect()
    published = 0
    go_on = True

    async def publish() -> None:
        nonlocal published
        while go_on:
            await publisher.publish(t.topic(), b"%d" % published)
            published += 1
            await asyncio.sleep(0)

    sending = t.spawn(publish())
    await t.eventually(lambda: published > 50, "traffic")
    subscription = await t.subscribed(bus, t.topic(), replay=1_000_000, buffer=100_000)
    since = published
    await t.eventually(lambda: published > since + 50, "more traffic")
    go_on = False
    await t.within(sending)
    got = [int(message.payload) for message in await t.take(subscription, published)]
    assert got == list(range(published))
    assert subscription.stats.buffered == 0


@case(130)
@needs(Cap.REPLAY)
async def replayed_messages_marked(t: Trial) -> None:
    """Old messages are told from live ones."""
    bus = await t.connect()
    await _stored(t, bus, 5)
    for message in await t.within(_history(bus, t.topic(), last=5)):
        assert message.origin is Origin.REPLAY
    subscription = await t.subscribed(bus, t.topic(), replay=3)
    old = await t.take(subscription, 3)
    assert [message.payload for message in old] == [b"2", b"3", b"4"]
    assert {message.origin for message in old} == {Origin.REPLAY}
    assert not any(message.origin.live for message in old)
    await t.within(bus.publish(t.topic(), b"new"))
    assert (await t.get(subscription)).origin is Origin.LIVE


@case(131)
@needs(Cap.REPLAY)
async def new_subscriber_receives_old(t: Trial) -> None:
    """A later subscriber gets earlier messages, when it asks for them."""
    publisher = await t.connect()
    await _stored(t, publisher, 5)
    late = await t.connect()
    subscription = await t.subscribed(late, t.topic(), replay=10)
    got = await t.take(subscription, 5)
    assert [int(message.payload) for message in got] == list(range(5))
    plain = await t.subscribed(late, t.topic())
    await t.within(publisher.publish(t.topic(), b"live"))
    assert (await t.get(plain)).payload == b"live"
    assert plain.stats.received == 1


@case(132)
@needs(Cap.RETAINED)
async def last_value_and_clear(t: Trial) -> None:
    """The last value is kept, given to newcomers, replaced and cleared."""
    bus = await t.connect()
    assert await t.within(bus.last(t.topic())) is None
    await t.within(bus.publish(t.topic(), b"one", retain=True))
    await t.within(bus.publish(t.topic(), b"two", retain=True))
    await t.within(bus.publish(t.topic(), b"passing"))
    last = await t.within(bus.last(t.topic()))
    assert last is not None
    assert last.payload == b"two"
    assert last.topic == t.topic()
    assert last.origin is Origin.RETAINED
    late = await t.connect()
    newcomer = await t.subscribed(late, t.topic())
    message = await t.get(newcomer)
    assert message.payload == b"two"
    assert message.origin is Origin.RETAINED
    # A second subscription to the same filter gets it as well.
    second = await t.subscribed(late, t.topic())
    assert (await t.get(second)).payload == b"two"
    await t.within(bus.clear(t.topic()))
    assert await t.within(bus.last(t.topic())) is None
    fresh = await t.connect()
    after = await t.subscribed(fresh, t.topic())
    await t.within(bus.publish(t.topic(), b"live"))
    message = await t.get(after)
    assert message.payload == b"live"
    assert message.origin is Origin.LIVE


async def _taken(t: Trial, members: list[Any]) -> Counter[bytes]:
    """Return how often each payload came to one of the members."""
    got: Counter[bytes] = Counter()
    for member in members:
        got.update(message.payload for message in await t.take(member, member.stats.received))
    return got


@case(133)
@needs(Cap.GROUPS)
async def group_each_message_once(t: Trial) -> None:
    """Three members of a group share 300 messages; each goes to one of them."""
    buses = await t.all(t.connect() for _ in range(3))
    members = [await t.subscribed(bus, t.topic(), group="workers", buffer=400) for bus in buses]
    publisher = await t.connect()
    everybody = await t.subscribed(publisher, t.topic(), buffer=400)
    for start in range(0, 300, 50):
        await t.all(publisher.publish(t.topic(), b"%d" % (start + n)) for n in range(50))
    await t.eventually(
        lambda: sum(member.stats.received for member in members) >= 300, "300 messages"
    )
    await t.take(everybody, 300)
    got = await _taken(t, members)
    assert got == Counter(b"%d" % number for number in range(300))
    assert all(member.stats.received > 0 for member in members), "a member got nothing"


@case(134)
@needs(Cap.GROUPS, Need.CUT)
async def group_member_dies_others_take_over(t: Trial) -> None:
    """When a member vanishes the others get what is published after that."""
    link = await t.link()
    stays, publisher = await t.connect(), await t.connect()
    dies = await t.connect(link=link, reconnect=False)
    staying = await t.subscribed(stays, t.topic(), group="workers", buffer=500)
    dying = await t.subscribed(dies, t.topic(), group="workers", buffer=500)
    for number in range(20):
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    await t.eventually(
        lambda: staying.stats.received + dying.stats.received == 20, "twenty messages"
    )
    await t.within(link.cut())
    await t.eventually(lambda: dies.status == "failed", "the member is dead")
    # The broker may notice later than the member itself; what it gave the dead one is lost.
    received = staying.stats.received
    taken_over = 0
    for number in range(2000):
        await t.within(publisher.publish(t.topic(), b"after %d" % number))
        for _ in range(20):  # the broker confirms before it delivers, or after that
            if staying.stats.received > received:
                break
            await asyncio.sleep(0.005)
        taken_over = taken_over + 1 if staying.stats.received > received else 0
        received = staying.stats.received
        if taken_over >= 20:
            break
    assert taken_over >= 20, "nobody took over"


@case(135)
@needs(Cap.GROUPS)
async def two_groups_both_get_all(t: Trial) -> None:
    """Every group gets every message."""
    buses = await t.all(t.connect() for _ in range(4))
    left = [await t.subscribed(bus, t.topic(), group="left") for bus in buses[:2]]
    right = [await t.subscribed(bus, t.topic(), group="right") for bus in buses[2:]]
    publisher = await t.connect()
    for number in range(60):
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    for group in (left, right):
        await t.until(
            group, lambda g: sum(member.stats.received for member in g) >= 60, "60 messages"
        )
        assert await _taken(t, group) == Counter(b"%d" % number for number in range(60))


def _parts() -> list[Part]:
    return [
        Part(b"for everybody"),
        Part(b"for one", entitlements=frozenset({1})),
        Part(b"for two", entitlements=frozenset({2})),
    ]


async def _warden(
    t: Trial, held: set[int] | None, link: Link | None = None
) -> tuple[Bus, Authorizer, list[AuthorizationRequest]]:
    """Return a bus whose authorizer gives everybody *held*, and the questions it had."""
    asked: list[AuthorizationRequest] = []

    async def answer(request: AuthorizationRequest) -> set[int] | None:
        asked.append(request)
        return held

    bus = await t.connect(
        identity=t.harness.authorizer_identity, caps=[Cap.ENTITLEMENTS], link=link
    )
    authorizer = await t.within(bus.authorize(t.guarded, answer).__aenter__())
    return bus, authorizer, asked


async def _answered(t: Trial, authorizer: Authorizer, count: int = 1) -> None:
    stats = authorizer.stats
    await t.until(stats, lambda s: s.granted + s.refused == count, "the authorizer answers")


async def _passed(t: Trial, publisher: Bus, *readers: Bus) -> None:
    """Return when what was published has passed the broker, as something after it has."""
    for reader in readers:
        subscription = await t.subscribed(reader, t.topic())
        await t.within(publisher.publish(t.topic(), b"after"))
        assert (await t.get(subscription)).payload == b"after"


async def _read(t: Trial, subscription: Subscription[bytes]) -> list[bytes]:
    return [part.data for part in (await t.get(subscription)).parts]


@case(140)
@needs(Cap.ENTITLEMENTS, Cap.AUTHORIZATION, Need.SECOND, Need.AUTHORIZER)
async def entitled_parts_only(t: Trial) -> None:
    """A subscriber gets the parts that it is entitled to, and no others."""
    warden, authorizer, asked = await _warden(t, {1})
    publisher = await t.connect(caps=[Cap.ENTITLEMENTS])
    reader = await t.connect(identity=t.harness.second_identity, caps=[Cap.ENTITLEMENTS])
    subscription = await t.subscribed(reader, t.guarded)
    await _answered(t, authorizer)
    assert [request.topic for request in asked] == [t.guarded]
    assert asked[0].member.id
    await t.within(publisher.publish(t.guarded, parts=_parts()))
    assert await _read(t, subscription) == [b"for everybody", b"for one"]
    await t.within(warden.close())
    await t.within(publisher.publish(t.guarded, parts=_parts()[1:]))
    assert await _read(t, subscription) == [b"for one"]


@case(141)
@needs(Cap.ENTITLEMENTS, Cap.AUTHORIZATION, Need.SECOND, Need.AUTHORIZER)
async def not_entitled_is_told(t: Trial) -> None:
    """A subscriber without any right is told so, and so is one whose authorizer fails."""
    warden, authorizer, _ = await _warden(t, None)
    publisher = await t.connect(caps=[Cap.ENTITLEMENTS])
    reader = await t.connect(identity=t.harness.second_identity, caps=[Cap.ENTITLEMENTS])
    told = t.watch(reader, Notice)
    subscription = await t.subscribed(reader, t.guarded)
    await t.eventually(
        lambda: [(notice.kind, notice.topic) for notice in told] == [("not_entitled", t.guarded)],
        "the subscriber is told",
    )
    await t.within(publisher.publish(t.guarded, parts=_parts()))
    await t.within(authorizer.close())

    async def broken(request: AuthorizationRequest) -> set[int]:
        raise LookupError(request.topic)

    failing = await t.within(warden.authorize(t.guarded, broken).__aenter__())
    failures: list[HandlerFailed] = []
    warden.on_handler_failure(failures.append)
    other = await t.connect(identity=t.harness.second_identity, caps=[Cap.ENTITLEMENTS])
    told_too = t.watch(other, Notice)
    second = await t.subscribed(other, t.guarded)
    await t.eventually(lambda: len(told_too) == 1, "the other subscriber is told")
    assert told_too[0].kind == "not_entitled"
    await t.within(publisher.publish(t.guarded, parts=_parts()))
    await _passed(t, publisher, reader, other)
    assert (subscription.stats.received, second.stats.received) == (0, 0)
    assert failing.stats.failed == 1
    assert [type(failure.__cause__) for failure in failures] == [LookupError]


@case(142)
@needs(Cap.ENTITLEMENTS, Cap.AUTHORIZATION, Need.SECOND, Need.AUTHORIZER)
async def entitlements_change_live(t: Trial) -> None:
    """Giving and taking an entitlement takes effect while the subscription goes on."""
    warden, authorizer, asked = await _warden(t, {1})
    publisher = await t.connect(caps=[Cap.ENTITLEMENTS])
    reader = await t.connect(identity=t.harness.second_identity, caps=[Cap.ENTITLEMENTS])
    told = t.watch(reader, Notice)
    subscription = await t.subscribed(reader, t.guarded)
    await _answered(t, authorizer)
    for held, seen in (
        ({1}, [b"for everybody", b"for one"]),
        ({1, 2}, [b"for everybody", b"for one", b"for two"]),
        ({2}, [b"for everybody", b"for two"]),
        (EVERYTHING, [b"for everybody", b"for one", b"for two"]),
    ):
        await t.within(warden.entitle(asked[0], held))
        await t.within(publisher.publish(t.guarded, parts=_parts()))
        assert await _read(t, subscription) == seen
    await t.within(warden.entitle(asked[0], None))
    await t.within(publisher.publish(t.guarded, parts=_parts()))
    await t.eventually(
        lambda: [notice.kind for notice in told] == ["not_entitled"], "the subscriber is told"
    )
    await _passed(t, publisher, reader)
    await t.within(warden.entitle(asked[0], {1}))
    await t.within(publisher.publish(t.guarded, parts=_parts()[1:]))
    # The first thing to come is what was published once there was a right again.
    assert await _read(t, subscription) == [b"for one"]


@case(143)
@needs(Cap.ENTITLEMENTS, Cap.AUTHORIZATION, Need.SECOND, Need.AUTHORIZER, Need.CUT)
async def authorizer_gone_denies(t: Trial) -> None:
    """Without an authorizer nobody gets anything that needs one; it comes back, and they do."""
    link = await t.link()
    warden, authorizer, _ = await _warden(t, {1}, link)
    publisher = await t.connect(caps=[Cap.ENTITLEMENTS])
    reader = await t.connect(identity=t.harness.second_identity, caps=[Cap.ENTITLEMENTS])
    await t.within(link.down())
    await t.within(warden.wait_for(Status.RECONNECTING))
    subscription = await t.subscribed(reader, t.guarded)
    await t.within(publisher.publish(t.guarded, parts=_parts()))
    await _passed(t, publisher, reader)
    assert subscription.stats.received == 0
    assert authorizer.stats.asked == 0
    await t.within(link.up())
    await _answered(t, authorizer)
    await t.within(publisher.publish(t.guarded, parts=_parts()[1:]))
    assert await _read(t, subscription) == [b"for one"]


@case(144)
async def native_access_typed_and_refused_for_others(t: Trial) -> None:
    """The client below is given by its type; any other type is a clear error."""
    bus = await t.connect()

    class Foreign:
        """A client of some other broker."""

    with t.raises(NotSupported, TypeError) as caught:
        bus.native(Foreign)
    assert "Foreign" in str(caught[0])
    if t.harness.native_type is not None:
        native: type[Any] = load(t.harness.native_type)
        assert isinstance(bus.native(native), native)
