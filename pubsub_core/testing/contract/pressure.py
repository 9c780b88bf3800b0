"""Order, slow consumers, bounded buffers, rates: cases 87 to 99, without 88 and 89."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from pubsub_core.bus import Bus
from pubsub_core.capabilities import Cap, Order
from pubsub_core.errors import NotSupported, RateLimited, SubscriptionOverflow
from pubsub_core.events import Gap, GapReason
from pubsub_core.message import Message
from pubsub_core.subscription import Subscription
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.running import resident_bytes
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

__all__: list[str] = []


@case(87)
async def order_single_publisher_single_topic(t: Trial) -> None:
    """A thousand messages of one publisher to one topic arrive in their order."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic(), buffer=1100)
    handled: list[int] = []

    async def handler(message: Message[bytes]) -> None:
        handled.append(int(message.payload))

    await t.subscribed(bus, t.topic(), handler=handler, buffer=1100)
    for start in range(0, 1000, 50):
        # Calls may overlap; they are sent in the order of the calls.
        await t.all(bus.publish(t.topic(), b"%d" % (start + n)) for n in range(50))
    got = [int(message.payload) for message in await t.take(subscription, 1000, 10)]
    await t.eventually(lambda: len(handled) == 1000, "the handler ran a thousand times")
    if bus.guarantees.order is Order.NONE:
        assert sorted(got) == sorted(handled) == list(range(1000))
    else:
        assert got == list(range(1000))
        assert handled == list(range(1000))


@case(90)
async def slow_handler_does_not_delay_other_subscription(t: Trial) -> None:
    """A handler that never returns holds up nobody else."""
    bus = await t.connect()
    release = threading.Event()
    entered: list[str] = []

    async def forever(message: Message[bytes]) -> None:
        entered.append("async")
        await asyncio.Event().wait()

    def blocked(message: Message[bytes]) -> None:
        entered.append("plain")
        release.wait(20)

    await t.subscribed(bus, t.topic(), handler=forever)
    await t.subscribed(bus, t.topic(), handler=blocked)
    try:
        quick = await t.subscribed(bus, t.topic())
        for number in range(100):
            await t.within(bus.publish(t.topic(), b"%d" % number))
        got = await t.take(quick, 100)
        assert [int(message.payload) for message in got] == list(range(100))
        await t.eventually(lambda: sorted(entered) == ["async", "plain"], "both are inside")
    finally:
        release.set()


@case(91, fast=False)
@needs(Need.KEEPALIVE)
async def slow_handler_does_not_break_keepalive(t: Trial) -> None:
    """A handler may take longer than the broker waits for a sign of life."""
    assert t.harness.keepalive is not None
    options, seconds = t.harness.keepalive
    bus = await t.connect(**options)
    release = threading.Event()
    entered = threading.Event()

    def blocked(message: Message[bytes]) -> None:
        entered.set()
        release.wait(60)

    await t.subscribed(bus, t.topic(), handler=blocked)
    after = await t.subscribed(bus, t.topic("after"))
    await t.within(bus.publish(t.topic(), b"x"))
    await t.eventually(entered.is_set, "the handler is inside")
    try:
        # What is tested is that nothing happens for that long.
        await asyncio.sleep(2 * seconds + 1)
        assert bus.stats.sessions == 1, "the session was lost meanwhile"
        await t.within(bus.publish(t.topic("after"), b"alive"))
        assert (await t.get(after)).payload == b"alive"
    finally:
        release.set()


@case(92, alone=True)
async def buffer_bound_holds_in_bytes_and_count(t: Trial) -> None:
    """An unread subscription fills its buffer, and there is no second queue."""
    bus, publisher = await t.connect(), await t.connect()
    by_count = await t.subscribed(bus, t.topic(), buffer=10)
    by_bytes = await t.subscribed(bus, t.topic(), buffer=100_000, buffer_bytes=250_000)
    size, count = min(50_000, bus.limits.max_payload or 50_000), 400
    fit = 250_000 // size
    before = resident_bytes()
    for number in range(count):
        await t.within(publisher.publish(t.topic(), number.to_bytes(4, "big") + bytes(size - 4)))
    for subscription in (by_count, by_bytes):
        await t.until(subscription, lambda s: s.stats.received == count, "everything arrived", 20)
    assert by_count.stats.buffered == 10
    assert by_count.stats.buffered_bytes == 10 * size
    assert by_count.stats.dropped == count - 10
    assert by_count.stats.dropped_bytes == (count - 10) * size
    assert by_bytes.stats.buffered == fit
    assert by_bytes.stats.buffered_bytes == fit * size
    assert by_bytes.stats.dropped == count - fit
    if t.harness.has_wire and not t.harness.in_process:  # else the broker's memory counts too
        # 20 MB went through; twice what the buffers hold, and what the allocator keeps.
        assert resident_bytes() - before < 12 * 1024 * 1024
    assert len(await t.take(by_count, 10)) == 10
    assert len(await t.take(by_bytes, fit)) == fit


async def _flooded(
    t: Trial, overflow: str, topics: list[str], **options: Any
) -> tuple[Bus, Subscription[bytes]]:
    """Return a subscription with room for 5 that 12 messages were sent to."""
    bus = await t.connect()
    subscription = await t.subscribed(
        bus,
        t.topic(topics[0]) if len(topics) == 1 else t.topic("+"),
        buffer=5,
        overflow=overflow,
        **options,
    )
    for number in range(12):
        await t.within(bus.publish(t.topic(topics[number % len(topics)]), b"%d" % number))
    await t.eventually(
        lambda: subscription.stats.received == 12 or not subscription.active, "twelve messages"
    )
    return bus, subscription


async def _rest(t: Trial, subscription: Subscription[bytes]) -> list[Any]:
    items: list[Any] = []
    while subscription.stats.buffered:
        items.append(await t.get(subscription))
    return items


@case(93)
async def overflow_drop_oldest(t: Trial) -> None:
    """The newest survive, and the others are counted."""
    _, subscription = await _flooded(t, "drop_oldest", ["one"])
    assert subscription.stats.dropped == 7
    assert subscription.stats.dropped_bytes == 7
    assert [m.payload for m in await _rest(t, subscription)] == [b"7", b"8", b"9", b"10", b"11"]
    assert subscription.stats.delivered == 5


@case(94)
async def overflow_drop_newest(t: Trial) -> None:
    """The oldest survive, and the others are counted."""
    bus, subscription = await _flooded(t, "drop_newest", ["one"])
    assert subscription.stats.dropped == 7
    assert [m.payload for m in await _rest(t, subscription)] == [b"0", b"1", b"2", b"3", b"4"]
    await t.within(bus.publish(t.topic("one"), b"later"))
    assert (await t.get(subscription)).payload == b"later"


@case(95)
@needs(Cap.WILDCARDS)
async def overflow_latest_per_topic(t: Trial) -> None:
    """The last message of each topic survives."""
    _, subscription = await _flooded(t, "latest", ["a", "b", "c"])
    assert subscription.stats.dropped == 9
    survivors = {m.topic: m.payload for m in await _rest(t, subscription)}
    assert survivors == {t.topic("a"): b"9", t.topic("b"): b"10", t.topic("c"): b"11"}


@case(96)
async def overflow_error_ends_subscription(t: Trial) -> None:
    """Buffered messages can be read; then the subscription ends with an error."""
    bus, subscription = await _flooded(t, "error", ["one"])
    assert [m.payload for m in await _rest(t, subscription)] == [b"0", b"1", b"2", b"3", b"4"]
    with t.raises(SubscriptionOverflow) as caught:
        await t.get(subscription)
    assert caught[0].buffered == 5
    with t.raises(SubscriptionOverflow):
        await t.get(subscription)
    await t.within(subscription.close())
    fresh = await t.subscribed(bus, t.topic("one"))
    await t.within(bus.publish(t.topic("one"), b"again"))
    assert (await t.get(fresh)).payload == b"again"


@case(97)
async def overflow_block_refused_or_really_blocks(t: Trial) -> None:
    """Holding the broker back loses nothing; where it is impossible it is refused."""
    bus, publisher = await t.connect(), await t.connect()
    if not bus.supports(Cap.FLOW_CONTROL):
        with t.raises(NotSupported) as caught:
            await t.subscribed(bus, t.topic(), overflow="block")
        t.check_refusal(caught[0], [Cap.FLOW_CONTROL])
        return
    subscription = await t.subscribed(bus, t.topic(), buffer=5, overflow="block")
    count = 300
    most = 0

    async def publish() -> None:
        for number in range(count):
            await publisher.publish(t.topic(), b"%d" % number)

    sending = t.spawn(publish())
    got: list[int] = []
    while len(got) < count:
        got.append(int((await t.get(subscription)).payload))
        most = max(most, subscription.stats.buffered)
        await asyncio.sleep(0)
    await t.within(sending)
    assert got == list(range(count))
    assert subscription.stats.dropped == 0
    # What was already on its way when the flow stopped is kept as well.
    assert most < count, f"{most} of {count} messages were buffered: nothing was held back"


@case(98)
async def loss_reported_as_gap_at_the_right_place(t: Trial) -> None:
    """Who asks for gaps finds one where the messages are missing, with their number."""
    _, oldest = await _flooded(t, "drop_oldest", ["one"], gaps=True)
    first: Any = await t.get(oldest)
    assert isinstance(first, Gap)
    assert first.reason is GapReason.OVERFLOW
    assert first.lost == 7
    assert not first.recovered
    assert first.since <= first.until
    assert [m.payload for m in await _rest(t, oldest)] == [b"7", b"8", b"9", b"10", b"11"]
    bus, newest = await _flooded(t, "drop_newest", ["two"], gaps=True)
    assert [(await t.get(newest)).payload for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    gap: Any = await t.get(newest)
    assert isinstance(gap, Gap)
    assert gap.lost == 7
    await t.within(bus.publish(t.topic("two"), b"after"))
    assert (await t.get(newest)).payload == b"after"


@case(99)
@needs(Need.RATE)
async def rate_limit_delays_or_raises_before_the_broker_acts(t: Trial) -> None:
    """Publishing faster than the broker allows waits, or fails with the time to wait."""
    bus = await t.connect(**(t.harness.rate or {}))
    rate = bus.limits.rate
    assert rate is not None
    count, seconds = rate
    subscription = await t.subscribed(bus, t.topic(), buffer=2 * count + 10)
    began = time.monotonic()
    refused: RateLimited | None = None
    for number in range(count + 1):
        try:
            # Shorter than the rate makes one wait, and long enough for a busy machine.
            await bus.publish(t.topic(), b"%d" % number, timeout=seconds / 2)
        except RateLimited as error:
            refused = error
            break
    if refused is None:
        assert time.monotonic() - began >= seconds * 0.9
    else:
        t.note(refused)
        assert 0 < refused.retry_after <= seconds
        assert refused.outcome == "not_sent"
    assert subscription.stats.received <= count + 1
