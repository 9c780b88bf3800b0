"""Opening and closing in every state: cases 11 to 25."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

from pubsub_core.capabilities import Cap
from pubsub_core.errors import (
    AuthenticationFailed,
    BusClosed,
    ConnectError,
    ConnectTimeout,
    NotConnected,
    PublishFailed,
    PubSubError,
)
from pubsub_core.events import Status, StatusChanged
from pubsub_core.message import Receipt
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.running import resources
from pubsub_core.testing.servers import free_port
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

__all__: list[str] = []


async def _settled(t: Trial, before: dict[str, int]) -> None:
    def gone() -> bool:
        now = resources()
        return all(now[name] <= before[name] for name in before)

    await t.eventually(gone, f"resources return to {before}; now {resources()}", 3)


@case(11, alone=True)
async def open_close(t: Trial) -> None:
    """A bus that was opened, used and closed leaves no task, thread or descriptor."""
    warm = await t.connect()
    await t.within(warm.close())
    before = resources()
    for _ in range(3):
        bus = await t.connect()
        subscription = await t.subscribed(bus, t.topic())
        await t.within(bus.publish(t.topic(), b"x"))
        await t.get(subscription)
        await t.within(bus.close())
        assert bus.status is Status.CLOSED
    await _settled(t, before)


@case(12)
async def close_is_idempotent(t: Trial) -> None:
    """Closing twice, and from several tasks at once, is harmless."""
    bus = await t.connect()
    await t.within(bus.close())
    await t.within(bus.close())
    other = await t.connect()
    await t.all(other.close() for _ in range(5))
    assert other.status is Status.CLOSED


@case(13)
async def close_before_open(t: Trial) -> None:
    """A bus that was never opened can be closed."""
    bus = t.bus()
    states = [bus.status]
    await t.within(bus.close())
    await t.within(bus.close())
    states.append(bus.status)
    assert states == [Status.NEW, Status.CLOSED]
    with t.raises(BusClosed):
        await t.within(bus.open())


@case(14)
async def use_after_close_raises_busclosed(t: Trial) -> None:
    """Everything that needs a session says that the bus is closed."""
    bus = await t.connect()
    support = bus.capabilities
    await t.within(bus.close())
    with t.raises(BusClosed):
        await t.within(bus.publish(t.topic(), b"x"))
    with t.raises(BusClosed):
        await t.subscribed(bus, t.topic())
    if support[Cap.HISTORY]:
        with t.raises(BusClosed):
            async for _ in bus.history(t.topic(), last=1):
                pass
    if support[Cap.RETAINED]:
        with t.raises(BusClosed):
            await t.within(bus.last(t.topic()))
    if support[Cap.PRESENCE]:
        with t.raises(BusClosed):
            async with bus.presence(t.topic()):
                pass
        with t.raises(BusClosed):
            await t.within(bus.members(t.topic()))
    if support[Cap.NOTIFICATIONS]:
        with t.raises(BusClosed):
            async with bus.notifications(t.topic()):
                pass


@case(15)
async def close_while_publishing(t: Trial) -> None:
    """Every publish under way ends, with an outcome."""
    bus = await t.connect()
    tasks = [asyncio.create_task(bus.publish(t.topic(), b"%d" % n)) for n in range(200)]
    await asyncio.sleep(0)
    await t.within(bus.close())
    results = await t.within(asyncio.gather(*tasks, return_exceptions=True))
    for result in results:
        if isinstance(result, Receipt):
            continue
        assert isinstance(result, PublishFailed | BusClosed | NotConnected), repr(result)
        t.note(result)
        if isinstance(result, PublishFailed):
            assert result.outcome


@case(16)
async def close_while_handler_runs(t: Trial) -> None:
    """Closing waits for a handler within its deadline, and cancels it after that."""
    bus = await t.connect()
    started, finished = asyncio.Event(), asyncio.Event()
    go = asyncio.Event()

    async def polite(message: object) -> None:
        started.set()
        await go.wait()
        finished.set()

    await t.subscribed(bus, t.topic(), handler=polite)
    await t.within(bus.publish(t.topic(), b"x"))
    await t.within(started.wait())
    closing = asyncio.create_task(bus.close(drain=t.deadline))
    await t.eventually(lambda: bus.status is Status.CLOSING, "closing")
    assert not finished.is_set()
    go.set()
    await t.within(closing)
    assert finished.is_set()

    bus = await t.connect()
    stubborn_started, cancelled = asyncio.Event(), asyncio.Event()

    async def stubborn(message: object) -> None:
        stubborn_started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await t.subscribed(bus, t.topic("second"), handler=stubborn)
    await t.within(bus.publish(t.topic("second"), b"x"))
    await t.within(stubborn_started.wait())
    watch = Stopwatch()
    await t.within(bus.close(drain=0.1))
    assert cancelled.is_set()
    assert watch.seconds < 2 * t.harness.slow


@case(17)
async def close_while_iterating(t: Trial) -> None:
    """A loop over a subscription ends without an error when the bus is closed."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    received: list[bytes] = []

    async def loop() -> str:
        async for message in subscription:
            received.append(message.payload)  # noqa: PERF401 - looked at meanwhile
        return "ended"

    task = asyncio.create_task(loop())
    await t.within(bus.publish(t.topic(), b"one"))
    await t.eventually(lambda: received == [b"one"], "the first message")
    await t.within(bus.close())
    assert await t.within(task) == "ended"


@case(18)
async def close_while_buffer_full(t: Trial) -> None:
    """A subscription that nobody reads does not hold up closing."""
    bus = await t.connect()
    policies = ["drop_oldest", "drop_newest", "error"]
    if bus.supports(Cap.FLOW_CONTROL):
        policies.append("block")
    for policy in policies:
        full = await t.subscribed(bus, t.topic(policy), buffer=2, overflow=policy)
        publisher = await t.connect()
        sends = [
            asyncio.create_task(publisher.publish(t.topic(policy), b"%d" % n)) for n in range(20)
        ]
        await t.until(full, lambda full: full.stats.buffered >= 2, "a full buffer")
        await t.within(publisher.close(drain=0.5))
        for result in await t.within(asyncio.gather(*sends, return_exceptions=True)):
            assert isinstance(result, Receipt | PubSubError), repr(result)
    watch = Stopwatch()
    await t.within(bus.close(drain=0.5))
    assert watch.seconds < 3 * t.harness.slow


@case(19)
@needs(Need.WIRE)
async def connect_refused_is_connecterror(t: Trial) -> None:
    """A port where nobody listens is a quick error that keeps its native cause."""
    watch = Stopwatch()
    with t.raises(ConnectError) as caught:
        await t.connect(port=free_port())
    assert watch.seconds < 3 * t.harness.slow
    assert caught[0].__cause__ is not None
    assert caught[0].retryable is True
    assert "127.0.0.1" in str(caught[0])


@case(20)
@needs(Cap.AUTH, Need.BAD_CREDENTIALS)
async def connect_bad_credentials(t: Trial) -> None:
    """Refused credentials are their own error, at once, and not tried again."""
    bus = t.bus(identity=t.harness.wrong_identity, wait=5)
    watch = Stopwatch()
    with t.raises(AuthenticationFailed) as caught:
        await t.within(bus.open())
    assert watch.seconds < 3 * t.harness.slow
    assert caught[0].retryable is False
    assert bus.status in (Status.FAILED, Status.CLOSED)


@case(21)
@needs(Need.WIRE)
async def connect_timeout_honoured(t: Trial) -> None:
    """A server that accepts and says nothing is given up after the stated time."""
    async with t.silent_server() as port:
        began, watch = time.monotonic(), Stopwatch()
        with t.raises(ConnectTimeout):
            await t.connect(port=port, connect_timeout=0.3)
        assert watch.seconds < 2 * t.harness.slow
        assert time.monotonic() - began > 0.2


@case(22, alone=True)
@needs(Need.WIRE)
async def cancel_connect_leaves_nothing(t: Trial) -> None:
    """Connecting can be cancelled half way."""
    async with t.silent_server() as port:
        warm = t.bus(port=port, connect_timeout=0.2)
        with contextlib.suppress(ConnectError):
            await t.within(warm.open())
        await t.within(warm.close())
        before = resources()
        for wait in (0.0, 0.001, 0.02, 0.1):
            bus = t.bus(port=port)
            task = asyncio.create_task(bus.open())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await asyncio.shield(task)
            task.cancel()
            with t.raises(asyncio.CancelledError):
                await t.within(task)
            await t.within(bus.close())
        await _settled(t, {name: before[name] for name in ("tasks", "threads")})
    await t.eventually(
        lambda: resources()["descriptors"] <= before["descriptors"], "descriptors are closed", 3
    )


@case(23)
async def two_buses_same_process_are_independent(t: Trial) -> None:
    """Closing one bus does nothing to another."""
    first, second = await t.connect(), await t.connect()
    one = await t.subscribed(first, t.topic())
    two = await t.subscribed(second, t.topic())
    await t.within(first.publish(t.topic(), b"both"))
    assert (await t.get(one)).payload == b"both"
    assert (await t.get(two)).payload == b"both"
    await t.within(first.close())
    await t.within(second.publish(t.topic(), b"alone"))
    assert (await t.get(two)).payload == b"alone"
    assert second.status is Status.ONLINE


@case(24)
async def open_in_two_event_loops_sequentially(t: Trial) -> None:
    """Nothing is bound to the loop that was there at import or at the first use."""

    async def use(number: int) -> None:
        inner = Trial(t.harness, t.ledger, t.case, t.seed + number)
        async with inner.stack:
            bus = await inner.connect()
            subscription = await inner.subscribed(bus, inner.topic())
            await inner.within(bus.publish(inner.topic(), b"%d" % number))
            assert (await inner.get(subscription)).payload == b"%d" % number

    failures: list[BaseException] = []

    def loops() -> None:
        try:
            for number in (1, 2):
                asyncio.run(use(number))
        except BaseException as error:  # noqa: BLE001 - told below, in the test's thread
            failures.append(error)

    thread = threading.Thread(target=loops, name="other-loops")
    thread.start()
    await t.eventually(lambda: not thread.is_alive(), "two loops ran", 15)
    assert not failures, repr(failures)


@case(25)
async def status_and_events_sequence(t: Trial) -> None:
    """The states come in order, each once, and the events tell exactly them."""
    bus = t.bus()
    assert bus.status is Status.NEW
    seen = t.watch(bus, StatusChanged)
    await t.within(bus.open())
    assert await t.within(bus.wait_for(Status.ONLINE)) is Status.ONLINE
    await t.within(bus.close())
    await t.eventually(lambda: seen[-1].status is Status.CLOSED, "the last event")
    assert [event.status for event in seen] == [
        Status.NEW,
        Status.CONNECTING,
        Status.ONLINE,
        Status.CLOSING,
        Status.CLOSED,
    ]
