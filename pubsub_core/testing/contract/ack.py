"""Confirmation, acknowledgement, redelivery, retry: cases 72 to 86."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pubsub_core.capabilities import Cap, ConfirmedBy, Order
from pubsub_core.errors import (
    BusClosed,
    InvalidTopic,
    NotAuthorized,
    NotConnected,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishTimeout,
    PubSubError,
)
from pubsub_core.message import Message, Receipt
from pubsub_core.middleware import Retry
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.clock import VirtualClock
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

__all__: list[str] = []

_SURE = {ConfirmedBy.NOBODY: 0, ConfirmedBy.TRANSPORT: 1, ConfirmedBy.BROKER: 2}


@case(72)
async def publish_confirmed_by_as_declared(t: Trial) -> None:
    """A receipt says as declared, and no more than the quality of service gives."""
    bus = await t.connect()
    receipt = await t.within(bus.publish(t.topic(), b"x"))
    assert isinstance(receipt, Receipt)
    assert receipt.topic == t.topic()
    assert receipt.confirmed_by is bus.guarantees.confirmed_by
    for qos in (0, 1, 2):
        try:
            receipt = await t.within(bus.publish(t.topic(), b"x", qos=qos))
        except NotSupported as error:
            assert qos == 2, "quality of service 0 and 1 are for everybody"
            t.check_refusal(error, list(Cap))
            continue
        assert _SURE[receipt.confirmed_by] <= _SURE[bus.guarantees.confirmed_by]
    if bus.guarantees.confirmed_by is ConfirmedBy.BROKER:
        receipt = await t.within(bus.publish(t.topic(), b"x", confirm="broker"))
        assert receipt.confirmed_by is ConfirmedBy.BROKER
    else:
        with t.raises(PubSubError):
            await t.within(bus.publish(t.topic(), b"x", confirm="broker"))


@case(73)
@needs(Cap.REFUSAL_VISIBLE, Need.UNPRIVILEGED)
async def publish_refused_raises_notauthorized(t: Trial) -> None:
    """A publish that the broker refuses is an error whose outcome is ``rejected``."""
    bus = await t.connect(identity=t.harness.unprivileged_identity)
    denied = t.harness.denied.replace("{unique}", t.word)
    with t.raises(NotAuthorized) as caught:
        await t.within(bus.publish(denied, b"x"))
    assert isinstance(caught[0], PublishFailed)
    assert caught[0].outcome is Outcome.REJECTED
    assert caught[0].topic == denied
    assert caught[0].retryable is False
    # The connection survives it.
    assert (await t.within(bus.publish(t.topic(), b"x"))).topic == t.topic()


@case(74, outage=True)
@needs(Need.WIRE)
async def publish_outcome_unknown_on_cut(t: Trial) -> None:
    """Cut between sending and confirmation, the outcome of a publish is unknown."""
    link = await t.link()
    bus = await t.connect(link=link, reconnect=False)
    if bus.guarantees.confirmed_by is not ConfirmedBy.BROKER:
        await t.within(bus.publish(t.topic(), b"x"))
        return
    await t.within(link.freeze())
    payload = b"x" * 500  # more than anything that a session says of itself
    publishing = asyncio.create_task(bus.publish(t.topic(), payload))
    await t.eventually(lambda: link.swallowed > len(payload), "the message is on its way")
    assert not publishing.done()
    await t.within(link.thaw())
    await t.within(link.cut())
    with t.raises(PublishFailed) as caught:
        await t.within(publishing)
    assert caught[0].outcome is Outcome.UNKNOWN
    slow = await t.connect(link=link)
    await t.within(link.freeze())
    with t.raises(PublishTimeout) as late:
        await t.within(slow.publish(t.topic(), b"x", timeout=0.2))
    assert late[0].outcome is Outcome.UNKNOWN
    assert isinstance(late[0], TimeoutError)
    await t.within(link.thaw())


@case(75)
@needs(Cap.REFUSAL_VISIBLE, Need.UNPRIVILEGED)
async def subscribe_refused_raises_notauthorized(t: Trial) -> None:
    """A subscription that the broker refuses is an error, and nothing else suffers."""
    bus = await t.connect(identity=t.harness.unprivileged_identity)
    denied = t.harness.denied.replace("{unique}", t.word)
    with t.raises(NotAuthorized) as caught:
        await t.subscribed(bus, denied)
    assert caught[0].topic == denied
    allowed = await t.subscribed(bus, t.topic())
    await t.within(bus.publish(t.topic(), b"x"))
    await t.get(allowed)


@case(76)
@needs(Cap.ACK)
async def ack_prevents_redelivery(t: Trial) -> None:
    """An acknowledged message does not come again."""
    bus, publisher = await t.connect(), await t.connect()
    subscription = await t.subscribed(bus, t.topic(), ack="manual")
    for number in range(10):
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    for number in range(10):
        message = await t.get(subscription)
        assert message.payload == b"%d" % number
        assert not message.redelivered
        await message.ack()
    await t.within(publisher.publish(t.topic(), b"last"))
    message = await t.get(subscription)
    assert message.payload == b"last"
    await message.ack()
    assert subscription.stats.received == 11


@case(77)
@needs(Cap.NACK)
async def nack_redelivers(t: Trial) -> None:
    """A message given back comes again, marked."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic(), ack="manual")
    await t.within(bus.publish(t.topic(), b"again"))
    first = await t.get(subscription)
    assert not first.redelivered
    await first.nack()
    second = await t.get(subscription)
    assert second.payload == b"again"
    assert second.redelivered
    await second.ack()
    await t.within(bus.publish(t.topic(), b"next"))
    third = await t.get(subscription)
    assert third.payload == b"next"
    await third.ack()


@case(78)
@needs(Cap.NACK)
async def nack_refused_where_impossible(t: Trial) -> None:
    """Giving back works, or is refused; it is never ignored."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic(), ack="manual")
    await t.within(bus.publish(t.topic(), b"x"))
    message = await t.get(subscription)
    await message.nack()
    again = await t.get(subscription)
    assert again.redelivered
    await again.reject()


@case(79)
@needs(Cap.ACK)
async def double_ack_harmless(t: Trial) -> None:
    """Acknowledging twice, late, or without need does nothing."""
    bus = await t.connect()
    manual = await t.subscribed(bus, t.topic(), ack="manual")
    automatic = await t.subscribed(bus, t.topic("auto"))
    for number in range(3):
        await t.within(bus.publish(t.topic(), b"%d" % number))
    messages = await t.take(manual, 3)
    for message in [*messages, *reversed(messages)]:
        await message.ack()
    await t.within(bus.publish(t.topic("auto"), b"x"))
    message = await t.get(automatic)
    await message.ack()
    await message.ack()
    await t.within(bus.publish(t.topic(), b"after"))
    after = await t.get(manual)
    assert after.payload == b"after"
    await t.within(bus.close())
    await after.ack()


@case(80, outage=True)
@needs(Cap.ACK, Cap.REDELIVERY, Need.CUT)
async def no_ack_then_reconnect_redelivers_flagged(t: Trial) -> None:
    """An unacknowledged message comes again in the next session, marked."""
    link = await t.link()
    bus = await t.connect(link=link, caps=[Cap.REDELIVERY], reconnect_first=0.01)
    publisher = await t.connect()
    subscription = await t.subscribed(bus, t.topic(), ack="manual")
    for number in range(3):
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    messages = await t.take(subscription, 3)
    await messages[0].ack()
    # The acknowledgement reaches the broker before a message that is sent after it.
    await t.within(publisher.publish(t.topic(), b"3"))
    fourth = await t.get(subscription)
    await fourth.ack()
    await t.within(bus.publish(t.topic("fence"), b"x"))
    generation = bus.stats.sessions
    await t.within(link.cut())
    await t.eventually(lambda: bus.stats.sessions > generation, "a new session")
    again = await t.take(subscription, 2)
    assert [message.payload for message in again] == [b"1", b"2"]
    assert all(message.redelivered for message in again)
    for message in again:
        await message.ack()


@case(81)
@needs(Cap.ACK, Cap.NACK)
async def no_ack_blocks_next_when_ordered(t: Trial) -> None:
    """Where a topic keeps its order, a message given back comes before the later ones."""
    bus = await t.connect()
    if bus.guarantees.order is Order.NONE:
        return
    subscription = await t.subscribed(bus, t.topic(), ack="manual")
    for number in range(4):
        await t.within(bus.publish(t.topic(), b"%d" % number))
    first = await t.get(subscription)
    assert first.payload == b"0"
    await first.nack()
    seen: list[bytes] = []
    firsts: list[bytes] = []
    while b"3" not in seen or b"0" not in seen:
        message = await t.get(subscription)
        seen.append(message.payload)
        if not message.redelivered:
            firsts.append(message.payload)
        await message.ack()
    assert firsts == [b"1", b"2", b"3"], "first arrivals lost their order"
    assert seen.count(b"0") == 1


@case(82)
async def resend_on_handler_error_by_policy(t: Trial) -> None:
    """A handler that fails is tried again, as often and as late as the policy says."""
    clock = VirtualClock(start=time.time())
    bus = await t.connect(clock=clock)
    bus.use(Retry(3, backoff=10.0, factor=2.0, jitter=False))
    attempts: list[float] = []
    done: list[bytes] = []

    async def handler(message: Message[bytes]) -> None:
        attempts.append(clock.monotonic())
        if len(attempts) < 3:
            raise RuntimeError("not yet")
        done.append(message.payload)

    subscription = await t.subscribed(bus, t.topic(), handler=handler)
    await t.within(bus.publish(t.topic(), b"x"))
    await t.eventually(lambda: len(attempts) == 1, "the first attempt")
    while len(attempts) < 3:
        before = len(attempts)
        await t.within(clock.advance(9.9))
        assert len(attempts) == before or attempts[-1] - attempts[-2] >= 9.9
        await t.within(clock.advance(0.2))
    await t.eventually(lambda: done == [b"x"], "the third attempt")
    assert 10 <= attempts[1] - attempts[0] < 11
    assert 20 <= attempts[2] - attempts[1] < 21
    await t.eventually(lambda: subscription.stats.delivered == 1, "it counts as delivered")
    assert subscription.stats.failed == 0


@case(83)
async def dead_letter_receives_original(t: Trial) -> None:
    """A message that no handler could take arrives unchanged at the dead-letter topic."""
    bus = await t.connect()
    bus.use(Retry(2, backoff=0.0, dead_letter=t.topic("dead")))
    headers = {"name": "value"} if bus.supports(Cap.HEADERS) else None

    async def handler(message: Message[bytes]) -> None:
        raise LookupError("secret detail")

    dead = await t.subscribed(bus, t.topic("dead"))
    await t.subscribed(bus, t.topic("work"), handler=handler)
    await t.within(bus.publish(t.topic("work"), b"\0original\xff", headers=headers))
    message = await t.get(dead)
    assert message.payload == b"\0original\xff"
    if headers is not None:
        assert message.headers["name"] == "value"
        values = " ".join(message.headers.values())
        assert t.topic("work") in values
        assert "LookupError" in values
        assert "secret detail" not in values


@case(84)
async def shutdown_does_not_dead_letter_untouched_messages(t: Trial) -> None:
    """Messages that no handler saw are not buried when the bus is closed."""
    bus, witness = await t.connect(), await t.connect()
    bus.use(Retry(1, dead_letter=t.topic("dead")))
    dead = await t.subscribed(witness, t.topic("dead"))
    started = asyncio.Event()

    async def handler(message: Message[bytes]) -> None:
        started.set()
        await asyncio.Event().wait()

    subscription = await t.subscribed(bus, t.topic(), handler=handler)
    for number in range(20):
        await t.within(witness.publish(t.topic(), b"%d" % number))
    await t.within(started.wait())
    await t.eventually(lambda: subscription.stats.received == 20, "a full buffer")
    await t.within(bus.close(drain=0.05))
    await t.within(witness.publish(t.topic("dead"), b"sentinel"))
    assert (await t.get(dead)).payload == b"sentinel"


@case(85)
async def batch_publish_partial_failure_lists_items(t: Trial) -> None:
    """Of several publishes each has its own result, in order, and good ones are sent."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    items: list[tuple[str, Any]] = [
        (t.topic(), b"1"),
        (t.topic("+"), b"wildcard"),
        (t.topic(), b"2"),
        ("", b"empty"),
        (t.topic(), b"3"),
    ]
    if bus.limits.max_payload is not None and bus.limits.max_payload < 100_000_000:
        items.append((t.topic(), bytes(bus.limits.max_payload + 1)))
    results = await t.within(bus.publish_many(items))
    assert len(results) == len(items)
    for (topic, payload), result in zip(items, results, strict=True):
        if topic == t.topic() and len(payload) < 10:
            assert isinstance(result, Receipt)
            assert result.topic == topic
        else:
            assert isinstance(result, InvalidTopic | PayloadTooLarge)
            t.note(result)
    assert [m.payload for m in await t.take(subscription, 3)] == [b"1", b"2", b"3"]
    assert await t.within(bus.publish_many([])) == []
    await t.within(bus.close())
    closed = await t.within(asyncio.gather(bus.publish_many(items), return_exceptions=True))
    assert isinstance(closed[0], BusClosed) or all(
        isinstance(each, BusClosed | InvalidTopic | PayloadTooLarge | NotConnected)
        for each in closed[0]  # type: ignore[union-attr]  # a list where it is no BusClosed
    )


@case(86, deadline=60)
async def none_lost_at_declared_rate(t: Trial) -> None:
    """At the declared rate, or a modest one, nothing is lost."""
    bus, publisher = await t.connect(), await t.connect()
    seconds = t.count(1, 10)
    rate = bus.limits.rate
    each = 400.0 if rate is None else rate[0] / rate[1]
    if bus.limits.rate_per_topic is not None:
        each = min(each, bus.limits.rate_per_topic[0] / bus.limits.rate_per_topic[1])
    count = max(1, int(each * seconds))
    subscription = await t.subscribed(bus, t.topic(), buffer=count + 10)
    began = time.monotonic()
    for number in range(count):
        late = began + number / each - time.monotonic()
        if late > 0:
            await asyncio.sleep(late)
        await t.within(publisher.publish(t.topic(), b"%d" % number))
    got = await t.take(subscription, count)
    assert [int(message.payload) for message in got] == list(range(count))
    assert subscription.stats.dropped == 0
