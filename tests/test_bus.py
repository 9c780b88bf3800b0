"""What a bus does beyond the conformance suite: patience, ownership, offline, orphans."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core import (
    BadOption,
    Bus,
    BusClosed,
    Cap,
    ConfigError,
    EncodeFailed,
    Gap,
    GapReason,
    InvalidTopic,
    Message,
    NotConnected,
    NotSupported,
    OperationTimeout,
    Origin,
    Outcome,
    Overflow,
    PayloadTooLarge,
    PublishFailed,
    PublishTimeout,
    PubSubError,
    RateLimited,
    Receipt,
    Status,
    SubscriptionOverflow,
    UnknownBackend,
    WrongLoop,
    connect,
    sync,
)
from pubsub_core.memory import Space
from pubsub_core.memory.backend import MemoryBackend
from pubsub_core.message import OutFrame
from pubsub_core.middleware import CallNext, Context
from pubsub_core.testing.clock import VirtualClock
from pubsub_mqtt.server import MosquittoServer


@pytest.fixture
def lab() -> str:
    """Return the URL of a space that no other test uses."""
    return f"memory://lab-{uuid.uuid4().hex}"


def space_of(url: str) -> Space:
    return Space.named(url.removeprefix("memory://"))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def test_what_is_refused_before_it_is_sent_counts_as_failed(lab: str) -> None:
    async def through(context: Context, call_next: CallNext) -> Any:
        return await call_next(context)

    async with connect(lab) as bus:
        for expected in (7, 14):
            refused: list[tuple[dict[str, Any], type[Exception]]] = [
                ({"topic": "a/#"}, InvalidTopic),
                ({"topic": "a", "payload": bytes(256 * 1024 * 1024 + 1)}, PayloadTooLarge),
                ({"topic": "a", "payload": object()}, EncodeFailed),
                ({"topic": "a", "qos": 3}, ValueError),
                ({"topic": "a", "ttl": -1}, ValueError),
                ({"topic": "a", "confirm": "everybody"}, ValueError),
                ({"topic": "a", "qos": 0, "confirm": "broker"}, NotSupported),
            ]
            for arguments, error in refused:
                with pytest.raises(error):
                    await bus.publish(**{"payload": b"", **arguments})
            assert bus.stats.failed == expected
            assert bus.stats.published == 0
            bus.use(through)  # once more behind a middleware


async def test_sending_to_a_member_counts_as_publishing_does(lab: str) -> None:
    async with connect(lab) as bus, connect(lab) as other, other.subscribe("a"):
        member = (await bus.members("a"))[0]
        with pytest.raises(InvalidTopic):
            await bus.send_to(member, "a/#")
        assert (bus.stats.published, bus.stats.failed) == (0, 1)
        await bus.send_to(member, "a", b"x")
        assert (bus.stats.published, bus.stats.failed) == (1, 1)
        with pytest.raises(PublishFailed, match="not subscribed"):
            await bus.send_to(member, "b", b"x")
        assert (bus.stats.published, bus.stats.failed) == (1, 2)
        space_of(lab).refuse(True)
        space_of(lab).disconnect_all()
        await bus.wait_for(Status.RECONNECTING, timeout=5)
        with pytest.raises(OperationTimeout):
            await bus.send_to(member, "a", b"x", timeout=0.05)
        assert (bus.stats.published, bus.stats.failed) == (1, 3)
        space_of(lab).refuse(False)


async def test_sending_to_a_member_keeps_the_rate(lab: str) -> None:
    clock = VirtualClock()
    async with (
        connect(lab, clock=clock, rate=2) as bus,
        connect(lab) as other,
        other.subscribe("a") as messages,
    ):
        member = (await bus.members("a"))[0]
        await bus.publish("a", b"0")
        await bus.send_to(member, "a", b"1")
        with pytest.raises(RateLimited) as caught:
            await bus.send_to(member, "a", b"2", timeout=0.5)
        assert caught.value.retry_after == 1.0
        late = asyncio.create_task(bus.send_to(member, "a", b"3"))
        await clock.asleep()
        await clock.advance(1.0)
        await late
        assert [(await messages.get(1)).payload for _ in range(3)] == [b"0", b"1", b"3"]


async def test_a_publish_that_has_to_wait_is_tried_at_once_one_time_only(
    lab: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def hesitate(self: MemoryBackend, out: OutFrame) -> None:
        nonlocal asked
        asked += 1

    monkeypatch.setattr(MemoryBackend, "try_publish", hesitate)
    async with connect(lab) as bus:
        await bus.publish("a", b"x")
        assert asked == 1
        await bus.publish("a", b"x", confirm="broker")
        assert asked == 2


async def test_sending_to_a_member_where_nobody_can_counts_as_failed(
    mosquitto: MosquittoServer,
) -> None:
    async with connect(mosquitto.url) as bus:
        with pytest.raises(NotSupported, match="unicast"):
            await bus.send_to("somebody", "a", b"x")
        assert (bus.stats.published, bus.stats.failed) == (0, 1)


# --- life --------------------------------------------------------------------------------


async def test_require_names_everything_that_is_missing_before_any_traffic(
    mosquitto: MosquittoServer,
) -> None:
    required = {Cap.ENTITLEMENTS, Cap.AUTHORIZATION, Cap.RETAINED}
    with pytest.raises(NotSupported) as caught:
        async with connect(mosquitto.url, require=required):
            raise AssertionError("must not open")
    assert caught.value.capability == "authorization, entitlements"
    assert "rights are for whole topics" in caught.value.why


async def test_an_option_of_the_backend_can_be_an_argument() -> None:
    async with connect("memory://", username="tom") as bus, bus.subscribe("a"):
        assert [member.name for member in await bus.members("a")] == ["tom"]


async def test_unknown_options_are_refused_with_a_suggestion() -> None:
    with pytest.raises(BadOption, match="usernam") as caught:
        await connect("memory://", usernam="tom")
    assert "username" in str(caught.value)


@pytest.mark.parametrize("where", ["memory://", "mqtt://localhost", "main"])
def test_names_of_options_are_checked_at_the_call(where: str) -> None:
    with pytest.raises(BadOption, match="argument qoss is not an option") as caught:
        connect(where, qoss=1)
    assert "did you mean 'qos'?" in str(caught.value)
    with pytest.raises(BadOption, match="argument qoss"):
        sync.connect(where, qoss=1)


def test_an_option_of_another_backend_is_refused_at_the_call_where_that_is_known() -> None:
    with pytest.raises(BadOption, match="argument keepalive is not an option of memory"):
        connect("memory://", keepalive=5)
    assert connect("main", keepalive=5).name == "main", "configuration decides"
    assert connect("main", url="memory://").name == "main"


async def test_names_of_subscribe_options_are_checked_at_the_call(lab: str) -> None:
    async with connect(lab) as bus:
        with pytest.raises(BadOption, match=r"subscribe\(qoss=\) is not an option") as caught:
            bus.subscribe("a", qoss=1)  # type: ignore[call-overload]
        assert "did you mean 'qos'?" in str(caught.value)


async def test_unknown_schemes_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownBackend, match="memory"):
        await connect("memori://")


async def test_middleware_must_be_registered() -> None:
    with pytest.raises(BadOption, match="registered: dedupe, retry, timeout"):
        await connect("memory://", middleware=("rety",))


async def test_opening_twice_is_an_error_and_closing_twice_is_not() -> None:
    bus = await connect("memory://")
    with pytest.raises(ConfigError, match="open already"):
        await bus.open()
    await bus.close()
    await bus.close()
    with pytest.raises(BusClosed):
        await bus.open()


async def test_before_opening_it_can_be_asked_but_not_used() -> None:
    bus = connect("memory://")
    assert bus.supports(Cap.HISTORY)
    assert bus.info.name == "memory"
    with pytest.raises(NotConnected, match="not open"):
        await bus.publish("a", b"")
    with pytest.raises(NotConnected, match="not open"):
        bus.subscribe("a")
    await bus.close()


async def test_use_from_another_thread_names_the_right_call() -> None:
    caught: list[BaseException] = []

    def elsewhere(bus: Any) -> None:
        try:
            asyncio.run(bus.publish("a", b""))
        except WrongLoop as error:
            caught.append(error)

    async with connect("memory://") as bus:
        thread = threading.Thread(target=elsewhere, args=(bus,))
        thread.start()
        await asyncio.to_thread(thread.join, 5)
    assert "pubsub_core.sync" in str(caught[0])


async def test_use_after_a_fork_is_told_in_the_child_and_harmless_for_the_parent() -> None:
    async with connect("memory://") as bus:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                bus.publish("a", b"").send(None)
            except WrongLoop as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        told = os.read(read, 1000).decode()
        os.close(read)
        assert status == 0
        assert "forked" in told
        assert isinstance(await bus.publish("a", b""), Receipt)


async def test_close_from_a_handler_ends_the_bus() -> None:
    bus = await connect("memory://")
    closed = asyncio.Event()

    async def handler(message: Message[bytes]) -> None:
        await bus.close(drain=1)
        closed.set()

    await bus.subscribe("a", handler=handler)
    await bus.publish("a", b"")
    async with asyncio.timeout(20):
        await closed.wait()
    assert bus.status is Status.CLOSED


async def test_a_handler_that_never_returns_is_given_up_after_the_drain() -> None:
    bus = await connect("memory://")
    started = asyncio.Event()

    async def handler(message: Message[bytes]) -> None:
        started.set()
        await asyncio.Event().wait()

    await bus.subscribe("a", handler=handler)
    await bus.publish("a", b"")
    async with asyncio.timeout(20):
        await started.wait()
        await bus.close(drain=0.01)
    assert bus.status is Status.CLOSED


async def test_handlers_may_publish_while_the_bus_drains() -> None:
    bus = await connect("memory://")
    answers: list[bytes] = []

    async def question(message: Message[bytes]) -> None:
        await asyncio.sleep(0)
        await bus.publish("answer", message.payload)

    async def answer(message: Message[bytes]) -> None:
        answers.append(message.payload)

    await bus.subscribe("answer", handler=answer)
    await bus.subscribe("question", handler=question)
    for number in range(3):
        await bus.publish("question", str(number))
    await bus.close(drain=5)
    assert bus.stats.failed == 0
    assert bus.stats.published == 6


async def test_wait_keeps_trying_to_make_the_first_session(lab: str) -> None:
    space_of(lab).refuse(True)
    opening = asyncio.ensure_future(_open(lab, wait=5.0))
    await asyncio.sleep(0)
    space_of(lab).refuse(False)
    async with asyncio.timeout(20):
        bus = await opening
    assert bus.status is Status.ONLINE
    await bus.close()


async def _open(url: str, **options: Any) -> Any:
    return await connect(url, **options)


async def test_status_events_begin_with_the_status_at_hand(lab: str) -> None:
    async with connect(lab) as bus:
        async with bus.events() as events:
            first = await anext(events)
            assert first.status is Status.ONLINE  # type: ignore[union-attr]  # it is a status
        assert await bus.wait_for(Status.ONLINE, timeout=20) is Status.ONLINE
        with pytest.raises(TimeoutError):
            await bus.wait_for(Status.FAILED, timeout=0.01)


# --- publishing --------------------------------------------------------------------------


async def test_bad_arguments_are_refused_before_anything_is_sent() -> None:
    async with connect("memory://") as bus:
        wrong: tuple[dict[str, Any], ...] = ({"qos": 3}, {"ttl": 0}, {"ttl": -1.0})
        for arguments in wrong:
            with pytest.raises(ValueError, match=next(iter(arguments))):
                await bus.publish("a", b"", **arguments)
        with pytest.raises(NotSupported, match="quality of service 0"):
            await bus.publish("a", b"", qos=0, confirm="broker")
        assert bus.stats.published == 0


async def test_too_large_a_payload_tells_both_numbers() -> None:
    async with connect("memory://") as bus:
        limit = bus.limits.max_payload
        assert limit is not None
        with pytest.raises(PayloadTooLarge) as caught:
            await bus.publish("a", bytes(limit + 1))
        assert (caught.value.size, caught.value.limit) == (limit + 1, limit)
        assert caught.value.outcome is Outcome.NOT_SENT


async def test_offline_raise_is_the_default(lab: str) -> None:
    async with connect(lab) as bus:
        await _cut(bus, lab)
        with pytest.raises(NotConnected, match="offline='buffer'"):
            await bus.publish("a", b"")
        assert bus.stats.failed == 1


async def test_offline_drop_counts(lab: str) -> None:
    async with connect(lab, offline="drop") as bus:
        await _cut(bus, lab)
        receipt = await bus.publish("a", b"")
        assert receipt.confirmed_by == "nobody"
        assert bus.stats.dropped == 1


async def test_offline_buffer_sends_in_order_once_there_is_a_session(lab: str) -> None:
    async with connect(lab) as reader, connect(lab, offline="buffer") as bus:
        await _cut(bus, lab)
        await until(lambda: reader.status is not Status.ONLINE)
        publishing = [asyncio.ensure_future(bus.publish("a", str(n))) for n in range(500)]
        await until(lambda: bus.stats.offline == 500)
        space_of(lab).refuse(False)
        async with asyncio.timeout(10):
            await reader.wait_for(Status.ONLINE)
            receipts = await asyncio.gather(*publishing)
        assert {receipt.confirmed_by for receipt in receipts} == {"broker"}
        stored = [message.payload async for message in reader.history("a")]
        assert stored == [str(n).encode() for n in range(500)]
        assert bus.stats.offline == 0


async def test_offline_buffer_is_bounded_and_says_so(lab: str) -> None:
    async with connect(lab, offline="buffer", offline_messages=2) as bus:
        await _cut(bus, lab)
        waiting = [asyncio.ensure_future(bus.publish("a", b"x", timeout=60)) for _ in range(2)]
        await until(lambda: bus.stats.offline == 2)
        with pytest.raises(Overflow, match="2 messages"):
            await bus.publish("a", b"x")
        for publish in waiting:
            publish.cancel()
        await asyncio.wait(waiting)


async def test_offline_overflow_drop_oldest_fails_the_oldest(lab: str) -> None:
    async with connect(
        lab, offline="buffer", offline_messages=1, offline_overflow="drop_oldest"
    ) as bus:
        await _cut(bus, lab)
        first = asyncio.ensure_future(bus.publish("a", b"1"))
        await until(lambda: bus.stats.offline == 1)
        second = asyncio.ensure_future(bus.publish("a", b"2"))
        with pytest.raises(Overflow):
            async with asyncio.timeout(20):
                await first
        space_of(lab).refuse(False)
        async with asyncio.timeout(20):
            assert (await second).confirmed_by == "broker"


async def test_offline_overflow_block_waits_for_room(lab: str) -> None:
    async with connect(lab, offline="buffer", offline_messages=1, offline_overflow="block") as bus:
        await _cut(bus, lab)
        publishing = [asyncio.ensure_future(bus.publish("a", str(n))) for n in range(3)]
        await until(lambda: bus.stats.offline == 1)
        space_of(lab).refuse(False)
        async with asyncio.timeout(10):
            await asyncio.gather(*publishing)
        stored = [message.payload async for message in bus.history("a")]
        assert stored == [b"0", b"1", b"2"]


async def test_a_publish_that_waits_offline_times_out_as_not_sent(lab: str) -> None:
    async with connect(lab, offline="buffer") as bus:
        await _cut(bus, lab)
        with pytest.raises(PublishTimeout) as caught:
            await bus.publish("a", b"", timeout=0.01)
        assert caught.value.outcome is Outcome.NOT_SENT
        space_of(lab).refuse(False)
        await bus.wait_for(Status.ONLINE, timeout=5)
        assert [message async for message in bus.history("a")] == []


async def test_what_waited_too_long_offline_is_not_sent_any_more(lab: str) -> None:
    clock = VirtualClock()
    async with connect(
        lab, clock=clock, offline="buffer", offline_age=10.0, reconnect_max=5.0
    ) as bus:
        await _cut(bus, lab)
        old = asyncio.ensure_future(bus.publish("a", b"old"))
        await until(lambda: bus.stats.offline == 1)
        await clock.advance(11)
        await until(lambda: clock.sleepers == 1)
        new = asyncio.ensure_future(bus.publish("a", b"new"))
        await until(lambda: bus.stats.offline == 2)
        space_of(lab).refuse(False)
        wake = clock.next_wake
        assert wake is not None
        await clock.advance(wake)
        with pytest.raises(PublishFailed, match="offline_age") as caught:
            async with asyncio.timeout(20):
                await old
        assert caught.value.outcome is Outcome.NOT_SENT
        async with asyncio.timeout(20):
            assert (await new).confirmed_by == "broker"
        assert bus.stats.dropped == 1
        assert [message.payload async for message in bus.history("a")] == [b"new"]


async def test_closing_ends_what_waits_offline_as_not_sent(lab: str) -> None:
    bus = await connect(lab, offline="buffer")
    await _cut(bus, lab)
    publishing = asyncio.ensure_future(bus.publish("a", b""))
    await until(lambda: bus.stats.offline == 1)
    await bus.close(drain=0)
    with pytest.raises(PublishFailed) as caught:
        await publishing
    assert caught.value.outcome is Outcome.NOT_SENT


async def test_confirm_nobody_returns_as_soon_as_it_is_kept(lab: str) -> None:
    async with connect(lab, offline="buffer") as bus:
        await _cut(bus, lab)
        receipt = await bus.publish("a", b"later", confirm="nobody")
        assert receipt.confirmed_by == "nobody"
        space_of(lab).refuse(False)
        await bus.wait_for(Status.ONLINE, timeout=5)
        await until(lambda: bus.stats.offline == 0)
        assert [message.payload async for message in bus.history("a")] == [b"later"]


# --- subscribing -------------------------------------------------------------------------


async def test_a_second_subscription_to_a_filter_gets_the_retained_message_alone() -> None:
    async with connect("memory://") as bus:
        await bus.publish("a/b", b"kept", retain=True)
        async with bus.subscribe("a/#") as first:
            assert (await first.get(timeout=20)).origin is Origin.RETAINED
            async with bus.subscribe("a/#") as second:
                assert (await second.get(timeout=20)).payload == b"kept"
                assert first.stats.received == 1


async def test_members_of_a_group_on_one_bus_take_turns() -> None:
    async with (
        connect("memory://") as bus,
        bus.subscribe("jobs", group="workers") as first,
        bus.subscribe("jobs", group="workers") as second,
    ):
        for number in range(10):
            await bus.publish("jobs", str(number))
        assert (first.stats.received, second.stats.received) == (5, 5)


async def test_a_group_and_a_plain_subscription_do_not_mix() -> None:
    async with connect("memory://") as bus:
        async with bus.subscribe("jobs/#", group="w") as group, bus.subscribe("jobs/#") as all_:
            await bus.publish("jobs/1", b"")
            assert (group.stats.received, all_.stats.received) == (1, 1)


async def test_a_raising_handler_is_logged_once_counted_and_the_next_message_handled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handled: list[bytes] = []

    async def handler(message: Message[bytes]) -> None:
        if message.payload == b"bad":
            raise ZeroDivisionError("in the handler")
        handled.append(message.payload)

    async with connect("memory://") as bus:
        subscription = await bus.subscribe("a", handler=handler)
        for payload in ("1", "bad", "2"):
            await bus.publish("a", payload)
        await until(lambda: handled == [b"1", b"2"])
        assert subscription.stats.failed == 1
        assert bus.stats.handler_failures == 1
    assert caplog.text.count("ZeroDivisionError: in the handler") == 1
    assert "Traceback" in caplog.text


async def test_a_plain_handler_runs_off_the_loop_and_in_order() -> None:
    threads: set[int] = set()
    handled: list[bytes] = []

    def handler(message: Message[bytes]) -> None:
        threads.add(threading.get_ident())
        handled.append(message.payload)

    async with connect("memory://") as bus:
        await bus.subscribe("a", handler=handler)
        for number in range(100):
            await bus.publish("a", str(number))
        await until(lambda: len(handled) == 100)
    assert handled == [str(number).encode() for number in range(100)]
    assert threading.get_ident() not in threads
    assert len(threads) == 1


async def test_a_blocking_handler_does_not_stop_the_loop_or_the_close() -> None:
    release = threading.Event()

    def handler(message: Message[bytes]) -> None:
        release.wait(30)

    bus = await connect("memory://")
    await bus.subscribe("slow", handler=handler)
    async with bus.subscribe("quick") as quick:
        await bus.publish("slow", b"")
        await bus.publish("quick", b"")
        await quick.get(timeout=20)
    async with asyncio.timeout(20):
        await bus.close(drain=0.01)
    release.set()


async def test_the_consumer_of_a_broken_stream_gets_the_reason() -> None:
    async with connect("memory://") as bus:
        async with bus.subscribe("a", buffer=1, overflow="error") as subscription:
            for _ in range(3):
                await bus.publish("a", b"")
            await subscription.get(timeout=20)
            with pytest.raises(SubscriptionOverflow):
                await subscription.get(timeout=20)


async def test_a_hole_is_marked_and_filled_from_history(lab: str) -> None:
    async with connect(lab, reconnect_first=0.01) as bus:
        async with bus.subscribe("a/#", gaps=True) as stream:
            await bus.publish("a/1", b"before")
            await _cut(bus, lab)
            writer = MemoryBackend(_context(lab))
            space_of(lab).publish(writer, _out("a/2", b"missed"))
            space_of(lab).refuse(False)
            await bus.wait_for(Status.ONLINE, timeout=5)
            await bus.publish("a/3", b"after")
            assert (await stream.get(timeout=20)).payload == b"before"
            gap: Any = await stream.get(timeout=20)
            assert isinstance(gap, Gap)
            assert (gap.reason, gap.recovered, gap.filter) == (
                GapReason.DISCONNECTED,
                True,
                "a/#",
            )
            assert (await stream.get(timeout=20)).payload == b"missed"
            assert (await stream.get(timeout=20)).payload == b"after"
            assert stream.stats.buffered == 0


async def test_what_a_resumed_session_delivers_early_waits_for_its_subscription(lab: str) -> None:
    """A program that restarts with its old session loses nothing before it subscribes."""
    async with connect(lab) as bus:
        router = bus._engine.subscriptions.router
        router.keep_orphans()
        router.route(_in("jobs/1", b"kept for us"))
        assert router.unrouted == 0
        async with bus.subscribe("other") as other, bus.subscribe("jobs/+") as jobs:
            assert (await jobs.get(timeout=20)).payload == b"kept for us"
            assert other.stats.received == 0


async def test_what_nobody_wants_of_an_earlier_session_is_given_up_and_counted(lab: str) -> None:
    async with connect(lab) as bus:
        router = bus._engine.subscriptions.router
        router.keep_orphans()
        for number in range(4097):
            router.route(_in(f"jobs/{number}", b""))
        assert router.unrouted == 1, "what is kept is bounded, and what is not is counted"
        assert router.drop_orphans() == 4096
        router.route(_in("jobs/late", b""))
        assert router.unrouted == 4098


async def test_a_cancelled_subscribe_leaves_nothing_at_the_broker(
    lab: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker may have accepted it before the cancellation came."""
    accepted = asyncio.Event()
    original = MemoryBackend.subscribe

    async def slow(self: MemoryBackend, want: Any) -> int:
        granted = await original(self, want)
        accepted.set()
        await asyncio.Event().wait()
        return granted

    monkeypatch.setattr(MemoryBackend, "subscribe", slow)
    async with connect(lab) as bus:
        subscribing = asyncio.ensure_future(bus.subscribe("a").__aenter__())
        async with asyncio.timeout(20):
            await accepted.wait()
        subscribing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await subscribing
        async with asyncio.timeout(20):
            while await bus.members("a"):
                await asyncio.sleep(0)


async def test_entering_twice_at_once_subscribes_once() -> None:
    async with connect("memory://") as bus:
        subscription = bus.subscribe("a")
        await asyncio.gather(subscription.__aenter__(), subscription.__aenter__())
        await bus.publish("a", b"x")
        assert subscription.stats.received == 1
        await subscription.close()


async def test_redelivery_after_the_deadline_is_flagged() -> None:
    clock = VirtualClock()
    async with connect("memory://", clock=clock, ack_timeout=30.0) as bus:
        async with bus.subscribe("a", ack="manual") as subscription:
            await bus.publish("a", b"x")
            first = await subscription.get(timeout=20)
            assert not first.redelivered
            await until(lambda: clock.sleepers == 1)
            await clock.advance(31)
            second = await subscription.get(timeout=20)
            assert second.redelivered
            await second.ack()
            await first.ack()


# --- what callers get wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"headers": {"a": 5}}, TypeError, "header 'a' has a int; names and values are str"),
        ({"headers": "abc"}, TypeError, "takes a mapping, or pairs"),
        ({"headers": 5}, TypeError, "takes a mapping, or pairs"),
        ({"headers": [("a",)]}, TypeError, "takes a mapping, or pairs"),
        ({"content_type": 5}, TypeError, "content_type=5; pass a str"),
        ({"ttl": float("nan")}, ValueError, "ttl=nan; pass seconds above 0"),
        ({"ttl": float("inf")}, ValueError, "ttl=inf; pass seconds above 0"),
        ({"ttl": "5"}, ValueError, "ttl='5'; pass seconds above 0"),
        (
            {"confirm": "brokr"},
            ValueError,
            "confirm='brokr'; pass one of broker, transport, nobody",
        ),
    ],
)
@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "middleware"])
async def test_what_a_publish_cannot_carry_is_named_before_anything_is_sent(
    options: dict[str, Any], error: type[Exception], says: str, middleware: bool
) -> None:
    async def passing(context: Any, call_next: Any) -> Any:
        return await call_next(context)

    async with connect("memory://") as bus:
        if middleware:
            bus.use(passing)
        with pytest.raises(error, match=re.escape(says)):
            await bus.publish("a", b"", **options)
        assert bus.stats.published == 0


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"handler": 5}, TypeError, "handler=5; pass a function"),
        ({"replay": -1}, ValueError, "replay=-1; pass 0 or more"),
        ({"codec": "jsn"}, BadOption, "did you mean 'json'?"),
    ],
)
async def test_what_a_subscription_cannot_be_is_named(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    async with connect("memory://") as bus:
        with pytest.raises(error, match=re.escape(says)):
            bus.subscribe("a", **options)


def test_a_required_capability_that_does_not_exist_is_named() -> None:
    with pytest.raises(BadOption, match=r"'histroy' is no capability.*'?history'?"):
        connect("memory://", require={"histroy"})  # type: ignore[arg-type]  # what is tested


async def test_what_the_offline_policy_drops_does_not_count_as_published(lab: str) -> None:
    async with connect(lab, offline="drop", reconnect_first=0.01) as bus:
        await _cut(bus, lab)
        await bus.publish("a", b"")
        assert (bus.stats.dropped, bus.stats.published) == (1, 0)
        space_of(lab).refuse(False)


async def test_a_wait_that_was_in_vain_says_for_what() -> None:
    async with connect("memory://") as bus, bus.subscribe("lab/{device}") as subscription:
        with pytest.raises(TimeoutError, match=r"no message of 'lab/\{device\}' within 0.01 s"):
            await subscription.get(timeout=0.01)


async def test_middleware_that_is_cancelled_loses_no_message() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(context: Any, call_next: Any) -> Any:
        if context.message is not None:
            entered.set()
            await leave.wait()
        return await call_next(context)

    async with connect("memory://") as bus:
        bus.use(slow)
        async with bus.subscribe("a") as subscription:
            await bus.publish("a", b"first")
            await bus.publish("a", b"second")
            waiting = asyncio.ensure_future(subscription.get())
            async with asyncio.timeout(20):
                await entered.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert subscription.stats.buffered == 2
            leave.set()
            assert (await subscription.get(timeout=20)).payload == b"first"
            assert (await subscription.get(timeout=20)).payload == b"second"


async def test_middleware_that_raises_ends_its_message_and_not_the_iteration() -> None:
    async def picky(context: Any, call_next: Any) -> Any:
        if context.message is not None and context.payload == b"bad":
            raise LookupError("not that one")
        return await call_next(context)

    async with connect("memory://", ack_timeout=30.0) as bus:
        bus.use(picky)
        async with bus.subscribe("a", ack="manual") as subscription:
            await bus.publish("a", b"bad")
            await bus.publish("a", b"good")
            with pytest.raises(LookupError):
                await subscription.get(timeout=20)
            good = await subscription.get(timeout=20)
            assert good.payload == b"good"
            await good.ack()
            assert subscription.stats.failed == 1
            backend = bus.native(MemoryBackend)
            assert not backend._unsettled, "the raised one was answered, so it is not sent again"


# --- helpers -----------------------------------------------------------------------------


async def _cut(bus: Any, url: str) -> None:
    space_of(url).refuse(True)
    space_of(url).disconnect_all()
    await until(lambda: bus.status is Status.RECONNECTING)


def _context(url: str) -> Any:
    from pubsub_core.interfaces import Address, BackendContext
    from pubsub_core.memory.options import MemoryOptions
    from pubsub_core.memory.plugin import INFO

    return BackendContext(INFO, Address("memory", url.removeprefix("memory://")), MemoryOptions())


def _out(topic: str, payload: bytes) -> Any:
    from pubsub_core.message import OutFrame

    return OutFrame(topic=topic, payload=payload)


def _in(topic: str, payload: bytes) -> Any:
    from pubsub_core.message import InFrame

    return InFrame(topic=topic, payload=payload)


# --- bad arguments ------------------------------------------------------------------------

_Call = Callable[[Bus, Any], Any]

_ARGUMENTS: dict[str, _Call] = {
    "publish topic": lambda bus, bad: bus.publish(bad, b""),
    "publish qos": lambda bus, bad: bus.publish("a", b"", qos=bad),
    "publish ttl": lambda bus, bad: bus.publish("a", b"", ttl=bad),
    "publish headers": lambda bus, bad: bus.publish("a", b"", headers=bad),
    "publish content_type": lambda bus, bad: bus.publish("a", b"", content_type=bad),
    "publish confirm": lambda bus, bad: bus.publish("a", b"", confirm=bad),
    "publish codec": lambda bus, bad: bus.publish("a", 1, codec=bad),
    "send_to member": lambda bus, bad: bus.send_to(bad, "a", b""),
    "history last": lambda bus, bad: anext(bus.history("a", last=bad)),
    "history since": lambda bus, bad: anext(bus.history("a", since=bad)),
    "history until": lambda bus, bad: anext(bus.history("a", until=bad)),
    "last topic": lambda bus, bad: bus.last(bad),
    "members topic": lambda bus, bad: bus.members(bad),
    "wait_for timeout": lambda bus, bad: bus.wait_for(Status.CLOSED, timeout=bad),
    "subscribe filter": lambda bus, bad: bus.subscribe(bad).__aenter__(),
    "presence topic": lambda bus, bad: bus.presence(bad).__aenter__(),
    "notifications filter": lambda bus, bad: bus.notifications(bad).__aenter__(),
    **{
        f"subscribe {name}": lambda bus, bad, name=name: (  # type: ignore[misc]  # bound early
            bus.subscribe("a", **{name: bad}).__aenter__()
        )
        for name in (
            *("ack", "buffer", "buffer_bytes", "codec", "dead_letter", "group", "handler"),
            *("on_decode_error", "overflow", "qos", "replay"),
        )
    },
}


@pytest.mark.parametrize("call", _ARGUMENTS.values(), ids=_ARGUMENTS)
async def test_a_bad_argument_is_a_pubsub_error(call: _Call, lab: str) -> None:
    async with connect(lab) as bus:
        for bad in (["a"], object(), b"\xff", {"a": 1}):
            with pytest.raises(PubSubError) as caught:
                await call(bus, bad)
            assert not isinstance(caught.value, NotConnected)
        assert (await bus.publish("a", b"x")).topic == "a"


@pytest.mark.parametrize("bad", [None, 7, ["mqtt://localhost"]])
def test_connect_takes_a_url_or_a_name(bad: Any) -> None:
    with pytest.raises(TypeError, match="URL or the name of a bus") as caught:
        connect(bad)
    assert isinstance(caught.value, BadOption)


async def test_a_wait_that_ends_is_an_error_of_the_tree(lab: str) -> None:
    async with connect(lab) as bus, bus.subscribe("a") as messages:
        with pytest.raises(OperationTimeout, match=r"no message of 'a' within 0\.01 s"):
            await messages.get(timeout=0.01)
        with pytest.raises(OperationTimeout, match="is online after"):
            await bus.wait_for(Status.CLOSED, timeout=0.01)


async def test_iterating_without_entering_says_how_to_enter(lab: str) -> None:
    async with connect(lab) as bus:
        messages = bus.subscribe("a", int)
        for _ in range(2):
            with pytest.raises(NotConnected, match=r"async with bus\.subscribe") as caught:
                await anext(messages)
            assert caught.value.retryable is False
        async with messages:
            await bus.publish("a", 1)
            assert (await anext(messages)).payload == 1
