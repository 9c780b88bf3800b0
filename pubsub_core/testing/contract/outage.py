"""Lost sessions and reconnecting: cases 100 to 112."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from pubsub_core.capabilities import Cap, ConfirmedBy, Delivery, Order
from pubsub_core.errors import (
    AuthenticationFailed,
    NotConnected,
    Overflow,
    PublishFailed,
    PubSubError,
)
from pubsub_core.events import Gap, GapReason, Status, StatusChanged
from pubsub_core.message import InFrame, Message
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.clock import VirtualClock
from pubsub_core.testing.recorder import Recorder
from pubsub_core.testing.running import resident_bytes, resources
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

__all__: list[str] = []

SOON = {"reconnect_first": 0.02, "reconnect_max": 0.2}
"""Options of a bus that comes back quickly."""


async def _offline(t: Trial, bus: Any) -> None:
    await t.eventually(lambda: bus.status is Status.RECONNECTING, "the loss is noticed")


def _by_broker(confirmed: dict[int, ConfirmedBy], bus: Any) -> set[int]:
    """Return what the broker confirmed: everything, where the backend declares that."""
    found = {number for number, by in confirmed.items() if by is ConfirmedBy.BROKER}
    if bus.guarantees.confirmed_by is ConfirmedBy.BROKER:
        assert found == set(confirmed), "a receipt says less than is declared"
    return found


async def _online(t: Trial, bus: Any, seconds: float = 10) -> None:
    await t.eventually(lambda: bus.status is Status.ONLINE, "the session is back", seconds)


@case(100, outage=True, deadline=120)
@needs(Need.CUT)
async def restart_broker_during_traffic(t: Trial) -> None:
    """Two outages in the middle of traffic lose no publish, and keep the order of arrivals.

    A receipt counts for what it says: of what the operating system took, nothing is known.
    """
    link = await t.link()
    publisher = await t.connect(link=link, offline="buffer", **SOON)
    count = t.count(600, 10_000)
    bus = await t.connect(link=link, buffer=count + 10, **SOON)
    handled: list[int] = []

    async def handler(message: Message[bytes]) -> None:
        handled.append(int(message.payload))

    await t.subscribed(bus, t.topic(), handler=handler, buffer=count + 10)
    started: set[int] = set()
    confirmed: dict[int, ConfirmedBy] = {}
    failures: list[PubSubError] = []
    exposed: set[int] = set()
    down = False

    async def one(number: int) -> None:
        started.add(number)
        if down:
            exposed.add(number)
        try:
            receipt = await publisher.publish(t.topic(), b"%d" % number)
        except PubSubError as error:
            failures.append(error)
        else:
            confirmed[number] = receipt.confirmed_by

    async def publish() -> None:
        window: set[asyncio.Task[None]] = set()
        for number in range(count):
            window.add(asyncio.create_task(one(number)))
            if len(window) >= 50:
                _, window = await asyncio.wait(window, return_when=asyncio.FIRST_COMPLETED)
            elif number % 10 == 0:
                await asyncio.sleep(0)
        await asyncio.wait(window)

    sending = t.spawn(publish())
    for share in (3, 2):
        await t.until(share, lambda share: len(confirmed) > count // share, "traffic", 60)
        down = True
        # What is on its way at this moment may die with the broker, or with the connection.
        exposed |= started - set(handled)
        async with t.outage(link):
            await _offline(t, bus)
            await _offline(t, publisher)
        await _online(t, bus)
        await _online(t, publisher)
        down = False
    await t.within(sending, 90)
    assert not failures, (
        f"{len(failures)} publishes failed although they were kept: {failures[0]!r}"
    )
    await t.within(publisher.publish(t.topic(), b"-1"))
    await t.eventually(lambda: -1 in handled, "the last message", 30)
    assert len(confirmed) == count
    owed = _by_broker(confirmed, bus)
    if bus.guarantees.delivery is not Delivery.AT_MOST_ONCE:
        owed = set(confirmed)
    lost = sorted(owed - exposed - set(handled))
    assert not lost, f"{len(lost)} messages were lost outside of the outages: {lost[:10]}"
    assert bus.stats.sessions == 3
    assert publisher.stats.sessions == 3
    if bus.guarantees.order is not Order.NONE:
        firsts = list(dict.fromkeys(handled))
        assert firsts == [*sorted(set(handled) - {-1}), -1], "first arrivals lost their order"


@case(101, outage=True, deadline=60)
@needs(Need.CUT)
async def all_subscriptions_restored(t: Trial) -> None:
    """After an outage every filter is back before ``online`` is told, and none twice."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    other = await t.connect(**({} if not t.harness.restart else SOON))
    recorder = Recorder(bus)
    filters = [t.topic(f"n{number}") for number in range(200)]
    subscriptions = await t.all((t.subscribed(bus, wanted) for wanted in filters), 15)
    before = len(recorder.subscribed)
    assert before == 200
    async with t.outage(link):
        await _offline(t, bus)
    await _online(t, bus)
    await _online(t, other)
    restored = Counter(want.filter for want in recorder.subscribed[before:])
    assert set(restored.values()) <= {1}, "a filter was subscribed twice"
    assert set(restored) in (set(), set(filters)), "some filters were restored, some were not"
    for wanted in filters:
        await t.within(other.publish(wanted, wanted.encode()))
    for wanted, subscription in zip(filters, subscriptions, strict=True):
        assert (await t.get(subscription)).payload == wanted.encode()
    await t.within(other.publish(filters[0], b"last"))
    assert (await t.get(subscriptions[0])).payload == b"last"
    assert {subscription.stats.received for subscription in subscriptions[1:]} == {1}


@case(102, outage=True)
@needs(Need.CUT)
async def subscribe_while_offline_takes_effect_later(t: Trial) -> None:
    """A subscription made without a session is in place when there is one again."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    await t.within(link.down())
    await _offline(t, bus)
    subscribing = asyncio.create_task(t.subscribed(bus, t.topic()))
    for _ in range(5):
        await asyncio.sleep(0)
    await t.within(link.up())
    subscription = await t.within(subscribing, 10)
    await _online(t, bus)
    await t.within(bus.publish(t.topic(), b"x"))
    assert (await t.get(subscription)).payload == b"x"


@case(103, outage=True)
@needs(Need.CUT)
async def unsubscribe_while_offline_is_not_restored(t: Trial) -> None:
    """A subscription given up without a session does not come back."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    kept = await t.subscribed(bus, t.topic("kept"))
    dropped = await t.subscribed(bus, t.topic("dropped"))
    recorder = Recorder(bus)
    await t.within(link.down())
    await _offline(t, bus)
    await t.within(dropped.close())
    await t.within(link.up())
    await _online(t, bus)
    assert t.topic("dropped") not in [want.filter for want in recorder.subscribed]
    await t.within(bus.publish(t.topic("dropped"), b"x"))
    await t.within(bus.publish(t.topic("kept"), b"x"))
    assert (await t.get(kept)).payload == b"x"
    assert dropped.stats.received == 0
    assert bus.stats.unrouted == 0


@case(104, outage=True)
@needs(Need.CUT)
async def offline_policy_raise_buffer_drop(t: Trial) -> None:
    """Without a session a publish fails, is kept within bounds, or is dropped and counted."""
    link = await t.link()
    receiver = await t.connect()
    subscription = await t.subscribed(receiver, t.topic())
    raising = await t.connect(link=link, **SOON)
    keeping = await t.connect(link=link, offline="buffer", offline_messages=3, **SOON)
    by_bytes = await t.connect(
        link=link, offline="buffer", offline_bytes=10, offline_overflow="drop_oldest", **SOON
    )
    dropping = await t.connect(link=link, offline="drop", **SOON)
    await t.within(link.down())
    for bus in (raising, keeping, by_bytes, dropping):
        await _offline(t, bus)
    with t.raises(NotConnected):
        await t.within(raising.publish(t.topic(), b"lost"))
    waiting = [asyncio.create_task(keeping.publish(t.topic(), b"k%d" % n)) for n in range(3)]
    await t.eventually(lambda: keeping.stats.offline == 3, "three messages are kept")
    with t.raises(Overflow) as caught:
        await t.within(keeping.publish(t.topic(), b"k3"))
    assert caught[0].outcome == "not_sent"
    displaced = [asyncio.create_task(by_bytes.publish(t.topic(), b"12345%d" % n)) for n in (1, 2)]
    await t.within(dropping.publish(t.topic(), b"dropped"))
    assert dropping.stats.dropped == 1
    await t.within(link.up())
    for bus in (raising, keeping, by_bytes, dropping):
        await _online(t, bus)
    for receipt in await t.all(waiting):
        assert receipt.topic == t.topic()
    results = await t.within(asyncio.gather(*displaced, return_exceptions=True))
    assert isinstance(results[0], Overflow | PublishFailed)
    assert not isinstance(results[1], BaseException)
    await t.within(raising.publish(t.topic(), b"end"))
    got = [message.payload for message in await t.take(subscription, 5)]
    assert [payload for payload in got if payload.startswith(b"k")] == [b"k0", b"k1", b"k2"]
    assert sorted(got) == [b"123452", b"end", b"k0", b"k1", b"k2"]


@case(105, outage=True)
@needs(Need.CUT)
async def gap_event_after_disconnect(t: Trial) -> None:
    """The first thing in the stream after an outage says that messages may be missing."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    gaps = t.watch(bus, Gap)
    telling = await t.subscribed(bus, t.topic(), gaps=True)
    silent = await t.subscribed(bus, t.topic())
    await t.within(bus.publish(t.topic(), b"before"))
    began = bus.clock.time()
    assert (await t.get(telling)).payload == b"before"
    await t.within(link.down())
    await _offline(t, bus)
    await t.within(link.up())
    await _online(t, bus)
    await t.within(bus.publish(t.topic(), b"after"))
    gap: Any = await t.get(telling)
    assert isinstance(gap, Gap), f"expected a gap, got {gap!r}"
    assert gap.reason is GapReason.DISCONNECTED
    assert gap.recovered == bool(bus.supports(Cap.HISTORY))
    assert began - 1 <= gap.since <= gap.until <= bus.clock.time() + 1
    if not gap.recovered:
        assert gap.lost is None
    assert (await t.get(telling)).payload == b"after"
    assert [m.payload for m in await t.take(silent, 2)] == [b"before", b"after"]
    await t.eventually(lambda: len(gaps) == 1, "one gap among the events of the bus")


@case(106, outage=True)
@needs(Cap.HISTORY, Need.CUT)
async def gap_filled_from_history_without_duplicates(t: Trial) -> None:
    """Where there is a history, missed messages are delivered, once and in order."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    publisher = await t.connect()
    subscription = await t.subscribed(bus, t.topic(), gaps=True)
    for number in range(5):
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    before = await t.take(subscription, 5)
    await t.within(link.down())
    await _offline(t, bus)
    for number in range(5, 15):
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    await t.within(link.up())
    await _online(t, bus)
    for number in range(15, 20):
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    gap: Any = await t.get(subscription)
    assert isinstance(gap, Gap)
    assert gap.recovered
    after = await t.take(subscription, 15)
    got = [int(message.payload) for message in [*before, *after]]
    assert got == list(range(20))
    assert [m.origin for m in after[:10]] == ["replay"] * 10
    assert all(message.origin.live for message in after[10:])


@case(107, outage=True, fast=False)
@needs(Need.WIRE, Need.KEEPALIVE)
async def half_open_connection_detected(t: Trial) -> None:
    """A peer that fell silent is noticed within 1.5 times keepalive and a second."""
    assert t.harness.keepalive is not None
    options, seconds = t.harness.keepalive
    link = await t.link()
    bus = await t.connect(link=link, **options, **SOON)
    await t.within(bus.publish(t.topic(), b"x"))
    await t.within(link.freeze())
    watch = Stopwatch()
    limit = 1.5 * seconds + 1
    await t.eventually(lambda: bus.status is not Status.ONLINE, "the silence is noticed", 4 * limit)
    assert watch.seconds <= (limit + 0.25) * t.harness.slow
    await t.within(link.thaw())
    await _online(t, bus)
    await t.within(bus.publish(t.topic(), b"y"))


@case(108, outage=True, alone=True, deadline=120)
@needs(Need.CUT)
async def flapping_100_times_leaks_nothing(t: Trial) -> None:
    """A hundred lost sessions leave tasks, threads, descriptors and memory as they were."""
    link = await t.link()
    bus = await t.connect(link=link, reconnect_first=0.001, reconnect_max=0.01)
    subscription = await t.subscribed(bus, t.topic())

    async def flap(times: int) -> None:
        for number in range(times):
            sessions = bus.stats.sessions
            await t.within(link.cut())
            await t.until(sessions, lambda sessions: bus.stats.sessions > sessions, "a new session")
            await _online(t, bus)
            await t.within(bus.publish(t.topic(), b"%d" % number))
            while (await t.get(subscription)).payload != b"%d" % number:
                pass

    await flap(10)
    before, memory = resources(), resident_bytes()
    await flap(t.count(30, 100))
    await t.eventually(
        lambda: all(resources()[name] <= before[name] + 1 for name in before),
        f"resources stay at {before}",
    )
    assert resident_bytes() - memory < 8 * 1024 * 1024


@case(109, outage=True)
@needs(Need.CUT)
async def backoff_is_jittered_and_capped(t: Trial) -> None:
    """Delays are random, grow, and stay below the bound."""
    clock = VirtualClock(start=time.time())
    link = await t.link()
    bus = await t.connect(link=link, clock=clock, reconnect_first=0.5, reconnect_max=8.0)
    changes = t.watch(bus, StatusChanged)

    def delays() -> list[float]:
        return [event.retry_in for event in changes if event.retry_in is not None]

    recorder = Recorder(bus)
    await t.within(link.down())
    recorder.refuse = NotConnected("the network is away")
    await t.eventually(lambda: len(delays()) == 1, "the first delay")
    while len(delays()) < 40:
        before = len(delays())
        # A backend's own watchdogs may sleep on the same clock.
        await t.within(clock.advance(min(clock.next_wake or 0.01, 8.0)))
        await t.until(before, lambda b: len(delays()) > b or clock.sleepers > 0, "an attempt")
    told = delays()
    assert told[0] <= 0.5, "the first attempt comes within half a second"
    assert max(told) <= 8.0
    assert max(told) > 2.0, "the bound does not grow"
    late = told[15:]
    assert len({round(delay, 6) for delay in late}) > 20, "the delays are not random"
    assert min(late) < 4.0, "half of the bound is never undercut: no full jitter"
    recorder.refuse = None
    await t.within(link.up())
    for _ in range(200):
        if bus.status is Status.ONLINE:
            break
        await t.within(clock.advance(0.5))
        await asyncio.sleep(0.005)
    assert bus.status is Status.ONLINE


@case(110, outage=True)
@needs(Need.CUT)
async def stale_frames_of_old_session_ignored(t: Trial) -> None:
    """Late deliveries of a dead session do not mix with the new one."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    recorder = Recorder(bus)
    subscription = await t.subscribed(bus, t.topic())
    for _ in range(2):
        sessions = bus.stats.sessions
        await t.within(link.cut())
        await t.until(sessions, lambda s: bus.stats.sessions > s, "a new session")
        await _online(t, bus)
    old, new = recorder.sinks[-2:]
    assert old is not new
    sessions = bus.stats.sessions
    old.deliver(InFrame(topic=t.topic(), payload=b"stale"))
    old.lost(ConnectionError("late news of an old session"))
    await t.within(bus.publish(t.topic(), b"fresh"))
    assert (await t.get(subscription)).payload == b"fresh"
    assert subscription.stats.received == 1
    assert bus.status is Status.ONLINE
    assert bus.stats.sessions == sessions


@case(111, outage=True)
@needs(Need.CUT)
async def no_retry_on_permanent_error(t: Trial) -> None:
    """Credentials that are refused while reconnecting end the attempts."""
    link = await t.link()
    bus = await t.connect(link=link, **SOON)
    subscription = await t.subscribed(bus, t.topic())
    recorder = Recorder(bus)
    recorder.refuse = AuthenticationFailed("refused now", hint="check the password")
    await t.within(link.cut())
    await t.eventually(lambda: bus.status is Status.FAILED, "the bus gives up")
    assert recorder.attempts == 1
    with t.raises(AuthenticationFailed):
        await t.within(bus.publish(t.topic(), b"x"))
    with t.raises(AuthenticationFailed):
        await t.get(subscription)
    assert recorder.attempts == 1
    await t.within(bus.close())


@case(112, outage=True, fast=False)
@needs(Need.WIRE, Need.KEEPALIVE)
async def network_partition_and_heal(t: Trial) -> None:
    """A network that swallows everything and comes back loses nothing the broker confirmed.

    Nor, whoever confirms, what was published once it had come back.
    """
    assert t.harness.keepalive is not None
    options, seconds = t.harness.keepalive
    link = await t.link()
    receiver = await t.connect()
    subscription = await t.subscribed(receiver, t.topic(), buffer=5000)
    bus = await t.connect(link=link, offline="buffer", **options, **SOON)
    confirmed: dict[int, ConfirmedBy] = {}

    async def publish() -> None:
        for number in range(10_000):
            confirmed[number] = (await bus.publish(t.topic(), b"%d" % number)).confirmed_by
            await asyncio.sleep(0.002)

    sending = t.spawn(publish())
    await t.eventually(lambda: len(confirmed) > 50, "traffic")
    await t.within(link.freeze())
    await t.eventually(
        lambda: bus.status is not Status.ONLINE, "the partition is noticed", 6 * seconds + 4
    )
    held = len(confirmed)
    await t.within(link.thaw())
    await _online(t, bus)
    # One publish may have begun before; the receipts are in the order of the numbers.
    healed = max(confirmed) + 2
    await t.eventually(lambda: len(confirmed) > max(held, healed) + 50, "traffic again")
    sending.cancel()
    await asyncio.wait([sending])
    last = max(confirmed)
    got: list[int] = []
    while last not in got:
        got.append(int((await t.get(subscription)).payload))
    assert set(confirmed) == set(range(last + 1))
    owed = _by_broker(confirmed, bus) | set(range(healed, last + 1))
    lost = sorted(owed - set(got))
    assert not lost, f"{len(lost)} messages were lost that were owed: {lost[:10]}"
    firsts = list(dict.fromkeys(got))
    assert firsts == sorted(firsts), "first arrivals lost their order"
