"""Publishing and subscribing: cases 26 to 50."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pubsub_core.capabilities import Cap, ConfirmedBy
from pubsub_core.errors import PayloadTooLarge
from pubsub_core.message import Message
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.recorder import Recorder
from pubsub_core.testing.running import resident_bytes
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

__all__: list[str] = []

_LARGE = 256 * 1024


@dataclass
class _Inner:
    name: str
    values: list[float]


@dataclass
class _Reading:
    celsius: float
    place: str
    inner: _Inner
    tags: dict[str, int] = field(default_factory=dict[str, int])
    note: str | None = None


def _reading() -> _Reading:
    return _Reading(81.5, "Zürich, 高", _Inner("o'ne\n", [0.1, -2.0]), {"a": 1}, None)


@case(26)
async def roundtrip_bytes(t: Trial) -> None:
    """Payloads of all sizes, up to the limit, arrive as they were."""
    bus = await t.connect()
    limit = bus.limits.max_payload
    largest = _LARGE if limit is None else min(limit - 1, _LARGE)
    subscription = await t.subscribed(bus, t.topic())
    for size in (0, 1, 2, 127, 128, 1024, 16_383, 16_384, 65_535, largest):
        if size > largest:
            continue
        payload = t.random.randbytes(size)
        await t.within(bus.publish(t.topic(), payload))
        message = await t.get(subscription)
        assert message.payload == payload, f"{size} bytes were altered"
        assert message.raw == payload
        assert message.topic == t.topic()


@case(27)
async def roundtrip_hostile_payloads(t: Trial) -> None:
    """Bytes that look like something else stay what they are."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    for payload in (
        b"\0",
        b"\0" * 100,
        b"\xff\xfe\x80",
        b"\xed\xa0\x80",
        b'{"a": 1}',
        b"null",
        b"123",
        b"emitter/presence/",
        b"$SYS/#",
        b"\r\n\r\nGET / HTTP/1.1",
        b"\x30\x0c\x00\x01a",
        "É\u202e\U0001f600".encode(),
    ):
        await t.within(bus.publish(t.topic(), payload))
        message = await t.get(subscription)
        assert message.payload == payload
        assert type(message.payload) is bytes


@case(28)
async def roundtrip_json_dataclass_pydantic(t: Trial) -> None:
    """Typed values come back equal and of their type."""
    bus = await t.connect()
    values = await t.subscribed(bus, t.topic("reading"), _Reading)
    await t.within(bus.publish(t.topic("reading"), _reading()))
    message = await t.get(values)
    assert message.payload == _reading()
    assert type(message.payload) is _Reading
    plain = await t.subscribed(bus, t.topic("plain"), dict[str, list[int]])
    await t.within(bus.publish(t.topic("plain"), {"a": [1, 2], "ü": []}))
    assert (await t.get(plain)).payload == {"a": [1, 2], "ü": []}
    text = await t.subscribed(bus, t.topic("text"), str)
    await t.within(bus.publish(t.topic("text"), "grüße \U0001f600"))
    assert (await t.get(text)).payload == "grüße \U0001f600"
    if importlib.util.find_spec("pydantic") is None:
        return
    import pydantic  # noqa: PLC0415 - optional

    model: Any = pydantic.create_model("Model", celsius=(float, ...), place=(str, "here"))
    models = await t.subscribed(bus, t.topic("model"), model)
    await t.within(bus.publish(t.topic("model"), model(celsius=1.5)))
    assert (await t.get(models)).payload == model(celsius=1.5, place="here")


@case(29)
async def hundred_messages_all_arrive(t: Trial) -> None:
    """A hundred messages arrive, each with its payload and topic."""
    bus = await t.connect()
    topics = [t.topic(f"n{number}") for number in range(10)]
    subscriptions = [await t.subscribed(bus, topic) for topic in topics]
    for number in range(100):
        await t.within(bus.publish(topics[number % 10], b"%d" % number))
    for index, subscription in enumerate(subscriptions):
        messages = await t.take(subscription, 10)
        assert [message.payload for message in messages] == [
            b"%d" % number for number in range(index, 100, 10)
        ]
        assert {message.topic for message in messages} == {topics[index]}


@case(30)
async def two_subscribers_both_get_all(t: Trial) -> None:
    """Every subscriber gets every message, on one bus and on another."""
    bus, other = await t.connect(), await t.connect()
    subscriptions = [
        await t.subscribed(bus, t.topic()),
        await t.subscribed(bus, t.topic()),
        await t.subscribed(other, t.topic()),
    ]
    sent = [b"%d" % number for number in range(50)]
    for payload in sent:
        await t.within(bus.publish(t.topic(), payload))
    for subscription in subscriptions:
        assert [m.payload for m in await t.take(subscription, 50)] == sent


@case(31)
async def two_handlers_same_filter_one_wire_subscription(t: Trial) -> None:
    """The broker learns of a filter once, however many listen to it."""
    bus = await t.connect()
    recorder = Recorder(bus)
    seen: list[str] = []

    async def first(message: Message[bytes]) -> None:
        seen.append("first")

    async def second(message: Message[bytes]) -> None:
        seen.append("second")

    one = await t.subscribed(bus, t.topic(), handler=first)
    two = await t.subscribed(bus, t.topic(), handler=second)
    assert len(recorder.subscribed) == 1
    await t.within(bus.publish(t.topic(), b"x"))
    await t.eventually(lambda: sorted(seen) == ["first", "second"], "both handlers ran once")
    await t.within(one.close())
    assert not recorder.unsubscribed
    await t.within(two.close())
    assert len(recorder.unsubscribed) == 1


@case(32)
async def removing_one_handler_keeps_the_other(t: Trial) -> None:
    """A subscription that ends takes no other with it."""
    bus = await t.connect()
    one = await t.subscribed(bus, t.topic())
    two = await t.subscribed(bus, t.topic())
    await t.within(one.close())
    await t.within(bus.publish(t.topic(), b"still"))
    assert (await t.get(two)).payload == b"still"
    assert one.stats.received == 0


@case(33)
async def unsubscribe_stops_delivery(t: Trial) -> None:
    """Nothing is delivered after closing a subscription has returned."""
    bus, other = await t.connect(), await t.connect()
    after: list[bytes] = []
    closed = False

    async def handler(message: Message[bytes]) -> None:
        if closed:
            after.append(message.payload)

    subscription = await t.subscribed(bus, t.topic(), handler=handler)
    witness = await t.subscribed(other, t.topic())
    sends = [asyncio.create_task(other.publish(t.topic(), b"%d" % n)) for n in range(50)]
    await t.eventually(lambda: subscription.stats.received > 0, "traffic")
    await t.within(subscription.close())
    closed = True
    received = subscription.stats.received
    await t.all(sends)
    await t.within(other.publish(t.topic(), b"after"))
    await t.take(witness, 51)
    await t.within(bus.publish(t.topic(), b"again"))
    await t.take(witness, 1)
    assert after == []
    assert subscription.stats.received == received


@case(34)
async def resubscribe_after_unsubscribe(t: Trial) -> None:
    """A filter that was given up works again at once."""
    bus = await t.connect()
    for number in range(5):
        subscription = await t.subscribed(bus, t.topic())
        await t.within(bus.publish(t.topic(), b"%d" % number))
        assert (await t.get(subscription)).payload == b"%d" % number
        await t.within(subscription.close())


@case(35)
async def topics_do_not_cross(t: Trial) -> None:
    """Many messages on two topics stay on their topics."""
    bus = await t.connect()
    left = await t.subscribed(bus, t.topic("left"))
    right = await t.subscribed(bus, t.topic("right"))
    for number in range(200):
        name = "left" if number % 2 else "right"
        await t.within(bus.publish(t.topic(name), f"{name} {number}".encode()))
    for name, subscription in (("left", left), ("right", right)):
        for message in await t.take(subscription, 100):
            assert message.topic == t.topic(name)
            assert message.payload.startswith(name.encode())


@case(36)
async def subscribe_returns_after_broker_confirms(t: Trial) -> None:
    """A message that another client publishes right after subscribing is received."""
    bus, other = await t.connect(), await t.connect()
    for number in range(20):
        topic = t.topic(f"n{number}")
        async with bus.subscribe(topic) as subscription:
            await t.within(other.publish(topic, b"%d" % number))
            assert (await t.get(subscription)).payload == b"%d" % number


@case(37)
async def subscribe_same_filter_concurrently(t: Trial) -> None:
    """Twenty tasks that want the same filter cause one subscription at the broker."""
    bus = await t.connect()
    recorder = Recorder(bus)
    subscriptions = await t.all(t.subscribed(bus, t.topic()) for _ in range(20))
    assert len(recorder.subscribed) == 1
    await t.within(bus.publish(t.topic(), b"x"))
    for subscription in subscriptions:
        assert (await t.get(subscription)).payload == b"x"
    await t.all(subscription.close() for subscription in subscriptions)
    assert len(recorder.unsubscribed) == 1


@case(38, alone=True, deadline=60)
async def dynamic_subscribe_1000_filters(t: Trial) -> None:
    """A thousand filters are subscribed, used and dropped in bounded time and memory."""
    bus = await t.connect()
    before = resident_bytes()
    watch = Stopwatch()
    subscriptions = [await t.subscribed(bus, t.topic(f"n{number}")) for number in range(1000)]
    picked = t.random.sample(range(1000), 50)
    for number in picked:
        await t.within(bus.publish(t.topic(f"n{number}"), b"%d" % number))
    for number in picked:
        assert (await t.get(subscriptions[number])).payload == b"%d" % number
    assert resident_bytes() - before < 64 * 1024 * 1024
    await t.all((subscription.close() for subscription in subscriptions), 20)
    assert watch.seconds < 20 * t.harness.slow
    again = await t.subscribed(bus, t.topic("n1"))
    await t.within(bus.publish(t.topic("n1"), b"x"))
    await t.get(again)


@case(39)
async def publish_concurrently_from_100_tasks(t: Trial) -> None:
    """None is lost and none is mixed up."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic(), buffer=2000)

    async def publish(task: int) -> None:
        for number in range(10):
            await bus.publish(t.topic(), f"{task} {number} ".encode() + b"x" * (task * 7))

    await t.all((publish(task) for task in range(100)), 15)
    counted = Counter(message.payload for message in await t.take(subscription, 1000, 15))
    assert counted == Counter(
        f"{task} {number} ".encode() + b"x" * (task * 7)
        for task in range(100)
        for number in range(10)
    )


@case(40)
async def publish_inside_handler(t: Trial) -> None:
    """A handler may publish and wait for the confirmation."""
    bus = await t.connect()
    confirmed: list[ConfirmedBy] = []

    async def handler(message: Message[bytes]) -> None:
        receipt = await bus.publish(t.topic("answer"), b"re: " + message.payload)
        confirmed.append(receipt.confirmed_by)

    answers = await t.subscribed(bus, t.topic("answer"))
    await t.subscribed(bus, t.topic("question"), handler=handler)
    for number in range(30):
        await t.within(bus.publish(t.topic("question"), b"%d" % number))
    got = await t.take(answers, 30)
    assert [message.payload for message in got] == [b"re: %d" % number for number in range(30)]
    await t.eventually(lambda: len(confirmed) == 30, "thirty receipts")


@case(41)
async def subscribe_inside_handler(t: Trial) -> None:
    """A handler may subscribe, and may end its own subscription."""
    bus = await t.connect()
    got: list[bytes] = []
    own: Any = None
    calls = 0

    async def inner(message: Message[bytes]) -> None:
        got.append(message.payload)

    async def outer(message: Message[bytes]) -> None:
        nonlocal calls
        calls += 1
        await bus.subscribe(t.topic("inner"), handler=inner)
        await bus.publish(t.topic("inner"), b"from within")
        await own.close()

    own = await t.subscribed(bus, t.topic("outer"), handler=outer)
    await t.within(bus.publish(t.topic("outer"), b"x"))
    await t.eventually(lambda: got == [b"from within"], "the inner handler ran")
    await t.eventually(lambda: not own.active, "the outer subscription ended")
    witness = await t.subscribed(bus, t.topic("outer"))
    await t.within(bus.publish(t.topic("outer"), b"y"))
    await t.get(witness)
    assert calls == 1


@case(42)
async def handler_exception_does_not_stop_subscription(t: Trial) -> None:
    """A handler's error is reported once, and the next message is handled."""
    bus = await t.connect()
    handled: list[bytes] = []
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and str(record.exc_info[1]) == t.word:
                records.append(record)

    async def handler(message: Message[bytes]) -> None:
        if message.payload == b"bad":
            raise RuntimeError(t.word)
        handled.append(message.payload)

    log = logging.getLogger("pubsub_core")
    keep = Keep()
    log.addHandler(keep)
    try:
        subscription = await t.subscribed(bus, t.topic(), handler=handler)
        for payload in (b"1", b"bad", b"2", b"3"):
            await t.within(bus.publish(t.topic(), payload))
        await t.eventually(lambda: handled == [b"1", b"2", b"3"], "the other messages")
    finally:
        log.removeHandler(keep)
    assert len(records) == 1
    assert records[0].levelno >= logging.ERROR
    assert subscription.stats.failed == 1
    assert subscription.active


@case(43)
async def handler_cancellation_is_clean(t: Trial) -> None:
    """A handler that is cancelled cleans up; one that cancels itself harms nobody."""
    bus = await t.connect()
    cleaned, started = asyncio.Event(), asyncio.Event()

    async def waiting(message: Message[bytes]) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    subscription = await t.subscribed(bus, t.topic("one"), handler=waiting)
    await t.within(bus.publish(t.topic("one"), b"x"))
    await t.within(started.wait())
    await t.within(subscription.close())
    assert cleaned.is_set()
    handled: list[bytes] = []

    async def gives_up(message: Message[bytes]) -> None:
        if message.payload == b"cancel":
            raise asyncio.CancelledError
        handled.append(message.payload)

    await t.subscribed(bus, t.topic("two"), handler=gives_up)
    for payload in (b"cancel", b"go on"):
        await t.within(bus.publish(t.topic("two"), payload))
    await t.eventually(lambda: handled == [b"go on"], "the next message is handled")


@case(44)
async def callback_async_and_sync_handlers(t: Trial) -> None:
    """Async handlers run on the loop; plain ones do not, and cannot block it."""
    bus = await t.connect()
    here = threading.get_ident()
    threads: dict[str, int] = {}
    release = threading.Event()

    async def asynchronous(message: Message[bytes]) -> None:
        threads["async"] = threading.get_ident()

    def plain(message: Message[bytes]) -> None:
        threads["plain"] = threading.get_ident()
        release.wait(10)

    await t.subscribed(bus, t.topic(), handler=asynchronous)
    blocked = await t.subscribed(bus, t.topic(), handler=plain)
    try:
        await t.within(bus.publish(t.topic(), b"x"))
        await t.eventually(lambda: len(threads) == 2, "both handlers ran")
        assert threads["async"] == here
        assert threads["plain"] != here
        probe = await t.subscribed(bus, t.topic("probe"))
        await t.within(bus.publish(t.topic("probe"), b"alive"))
        await t.get(probe)
    finally:
        release.set()
    await t.eventually(lambda: blocked.stats.delivered == 1, "the plain handler returned")


@case(45)
async def message_is_immutable_and_reusable_after_handler(t: Trial) -> None:
    """A message can be kept, and nobody can change it."""
    bus = await t.connect()
    kept: list[Message[bytes]] = []

    async def handler(message: Message[bytes]) -> None:
        kept.append(message)

    await t.subscribed(bus, t.topic(), handler=handler)
    for number in range(10):
        await t.within(bus.publish(t.topic(), b"%d" % number))
    await t.eventually(lambda: len(kept) == 10, "ten messages")
    await t.within(bus.close())
    assert [message.payload for message in kept] == [b"%d" % number for number in range(10)]
    for name in ("topic", "payload", "params", "frame"):
        with t.raises(AttributeError, TypeError):
            setattr(kept[0], name, None)
    assert kept[0].topic == t.topic()
    assert str(len(kept[0].raw)) in repr(kept[0])


@case(46)
async def publish_to_topic_without_subscribers_succeeds(t: Trial) -> None:
    """That nobody listens is no error."""
    bus = await t.connect()
    receipt = await t.within(bus.publish(t.topic("nobody"), b"x"))
    assert receipt.topic == t.topic("nobody")
    assert receipt.subscribers in (None, 0)


@case(47)
@needs(Need.PAYLOAD_LIMIT)
async def payload_over_limit_fails_before_sending(t: Trial) -> None:
    """A payload too large for the broker is refused here, with both numbers."""
    bus = await t.connect()
    limit = bus.limits.max_payload
    assert limit is not None
    subscription = await t.subscribed(bus, t.topic())
    with t.raises(PayloadTooLarge) as caught:
        await t.within(bus.publish(t.topic(), bytes(limit + 1)), 30)
    assert caught[0].size == limit + 1
    assert caught[0].limit == limit
    assert str(limit) in str(caught[0])
    assert caught[0].outcome == "not_sent"
    await t.within(bus.publish(t.topic(), b"fits"))
    assert (await t.get(subscription)).payload == b"fits"


@case(48)
@needs(Cap.ECHO_CONTROL)
async def own_messages_follow_echo_option(t: Trial) -> None:
    """With echo off a bus does not hear itself; others do."""
    mute = await t.connect(echo=False)
    other = await t.connect()
    own = await t.subscribed(mute, t.topic())
    foreign = await t.subscribed(other, t.topic())
    await t.within(mute.publish(t.topic(), b"mine"))
    assert (await t.get(foreign)).payload == b"mine"
    await t.within(other.publish(t.topic(), b"theirs"))
    assert (await t.get(own)).payload == b"theirs"
    # With echo on the same bus hears itself.
    await t.within(other.publish(t.topic(), b"loud"))
    assert [m.payload for m in await t.take(foreign, 2)] == [b"theirs", b"loud"]
    assert (await t.get(own)).payload == b"loud"


@case(49)
async def ids_and_times_present_and_sane(t: Trial) -> None:
    """Times are those of now, and ids, where there are any, differ."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    began = time.time()
    for number in range(20):
        await t.within(bus.publish(t.topic(), b"%d" % number))
    messages = await t.take(subscription, 20)
    ended = time.time()
    for message in messages:
        assert began - 2 <= message.time <= ended + 2
        assert message.origin.live or message.origin == "unknown"
        assert not message.redelivered
    assert [m.time for m in messages] == sorted(m.time for m in messages)
    ids = [message.id for message in messages if message.id is not None]
    assert len(ids) in (0, 20)
    assert len(set(ids)) == len(ids)


@case(50)
@needs(Cap.SOURCE)
async def source_identity_present_when_declared(t: Trial) -> None:
    """A message tells who published it, and different clients differ."""
    bus, one, two = await t.connect(), await t.connect(), await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    await t.within(one.publish(t.topic(), b"1"))
    await t.within(two.publish(t.topic(), b"2"))
    await t.within(one.publish(t.topic(), b"3"))
    first, second, third = await t.take(subscription, 3)
    assert first.source is not None
    assert second.source is not None
    assert third.source is not None
    assert first.source.id
    assert first.source == third.source
    assert first.source.id != second.source.id
