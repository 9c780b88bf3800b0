"""The onion: its order, and the catalogue of retry, dedupe and timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from pubsub_core.bus import connect
from pubsub_core.capabilities import Cap, ConfirmedBy, Support
from pubsub_core.errors import (
    BadOption,
    BusClosed,
    HandlerFailed,
    InvalidTopic,
    NotConnected,
    Outcome,
    PublishFailed,
    PublishTimeout,
    RateLimited,
)
from pubsub_core.message import Headers, InFrame, Message, Receipt, Verdict
from pubsub_core.middleware import (
    CallNext,
    Context,
    Dedupe,
    Direction,
    Middleware,
    Retry,
    Timeout,
    builtin_middleware,
    compose,
)


class QuickClock:
    """Time passes only by sleeping, and at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class StoppedClock(QuickClock):
    """Sleepers wait until somebody lets the time pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await self.passed.wait()


class FakeBus:
    """Clock, capabilities and a record of what was published."""

    def __init__(self, *able: Cap, error: Exception | None = None) -> None:
        self.clock = QuickClock()
        self.published: list[tuple[str, bytes, dict[str, Any]]] = []
        self._able = able
        self._error = error

    def supports(self, cap: Cap) -> Support:
        return Support.native() if cap in self._able else Support.none("a fake")

    async def publish(self, topic: str, payload: bytes, **options: Any) -> Receipt:
        if self._error is not None:
            raise self._error
        self.published.append((topic, payload, options))
        return Receipt(topic, ConfirmedBy.BROKER)


class FakeSubscription:
    """Can be referenced weakly, as a real one."""

    ack = "auto"


class ManualSubscription(FakeSubscription):
    ack = "manual"


def incoming(
    bus: FakeBus,
    *,
    topic: str = "lab/x",
    id: str | None = None,
    headers: Mapping[str, str] = {},
    content_type: str | None = None,
    subscription: object = None,
    settle: Callable[[Verdict], None] | None = None,
) -> Context:
    frame = InFrame(
        topic=topic, payload=b"raw", id=id, headers=Headers(headers), content_type=content_type
    )
    message: Message[Any] = Message(topic, {"decoded": True}, {}, frame, settle)
    return Context(
        Direction.RECEIVE,
        topic,
        message.payload,
        dict(headers),
        message=message,
        bus=bus,
        subscription=subscription,
    )


def outgoing(bus: FakeBus) -> Context:
    return Context(Direction.PUBLISH, "lab/x", b"p", bus=bus)


class Terminal:
    """Fails as told, then returns; counts its calls."""

    def __init__(self, *errors: BaseException, result: object = "done") -> None:
        self.errors = list(errors)
        self.result = result
        self.calls = 0
        self.contexts: list[tuple[Any, dict[str, str], int]] = []

    async def __call__(self, context: Context) -> Any:
        self.calls += 1
        self.contexts.append((context.payload, dict(context.headers), context.attempt))
        if self.errors:
            raise self.errors.pop(0)
        return self.result


# --- composing --------------------------------------------------------------------------


@pytest.mark.parametrize("direction", list(Direction))
async def test_the_first_middleware_is_the_outermost_in_both_directions(
    direction: Direction,
) -> None:
    steps: list[str] = []

    def named(name: str) -> Middleware:
        async def middleware(context: Context, call_next: CallNext) -> Any:
            steps.append(f"{name} in")
            result = await call_next(context)
            steps.append(f"{name} out")
            return [name, result]

        return middleware

    call = compose([named("a"), named("b")], Terminal())
    assert await call(Context(direction, "t")) == ["a", ["b", "done"]]
    assert steps == ["a in", "b in", "b out", "a out"]


async def test_a_middleware_that_does_not_call_on_stops_the_message() -> None:
    async def stop(context: Context, call_next: CallNext) -> Any:
        return None

    terminal = Terminal()
    assert await compose([stop], terminal)(Context(Direction.RECEIVE, "t")) is None
    assert terminal.calls == 0


def test_nothing_around_a_terminal_costs_nothing() -> None:
    terminal = Terminal()
    assert compose([], terminal) is terminal


def test_the_catalogue_can_be_made_by_name() -> None:
    made = {name: factory() for name, factory in builtin_middleware().items()}
    assert {name: type(each) for name, each in made.items()} == {
        "dedupe": Dedupe,
        "retry": Retry,
        "timeout": Timeout,
    }


def test_a_received_message_has_what_middleware_assigned() -> None:
    context = incoming(FakeBus(), headers={"a": "1"})
    assert context.message is not None
    assert context.received() is context.message
    context.payload = "new"
    context.topic = "other"
    context.headers["b"] = "2"
    message = context.received()
    assert (message.topic, message.payload, message.raw) == ("other", "new", b"raw")
    assert dict(message.headers) == {"a": "1", "b": "2"}
    with pytest.raises(ValueError, match="no received message"):
        outgoing(FakeBus()).received()


# --- retry: receiving -------------------------------------------------------------------


async def test_a_handler_is_tried_again_and_told_the_attempt() -> None:
    bus = FakeBus()
    terminal = Terminal(ValueError(), KeyError())
    retry = Retry(3, backoff=0.5, jitter=False)
    assert await retry(incoming(bus), terminal) == "done"
    assert [attempt for _, _, attempt in terminal.contexts] == [1, 2, 3]
    assert bus.clock.slept == [0.5, 1.0]


async def test_the_error_goes_on_after_the_last_attempt() -> None:
    terminal = Terminal(ValueError("one"), ValueError("two"))
    with pytest.raises(ValueError, match="two"):
        await Retry(2)(incoming(FakeBus()), terminal)
    assert terminal.calls == 2


async def test_delays_are_bounded_and_fully_jittered() -> None:
    bus = FakeBus()
    terminal = Terminal(*[ValueError() for _ in range(199)])
    await Retry(200, backoff=1, factor=3, maximum=20)(incoming(bus), terminal)
    delays = bus.clock.slept
    assert len(delays) == 199
    assert 0 <= delays[0] <= 1
    assert 0 <= delays[1] <= 3
    assert all(0 <= delay <= 20 for delay in delays)
    # 190 draws from [0, 20): both ends and the middle are reached, short of a miracle.
    assert min(delays[9:]) < 2
    assert max(delays[9:]) > 18
    assert 7 < sum(delays[9:]) / len(delays[9:]) < 13


async def test_a_very_large_exponent_is_no_problem() -> None:
    bus = FakeBus()
    terminal = Terminal(*[ValueError() for _ in range(1100)])
    await Retry(1101, factor=10.0, jitter=False)(incoming(bus), terminal)
    assert bus.clock.slept[-1] == 30.0


async def test_only_chosen_errors_are_tried_again() -> None:
    terminal = Terminal(KeyError("no"))
    with pytest.raises(KeyError):
        await Retry(3, retry_on=ValueError)(incoming(FakeBus()), terminal)
    assert terminal.calls == 1


async def test_a_wrapped_handler_error_is_judged_by_its_cause() -> None:
    wrapped = HandlerFailed("failed", filter="#")
    wrapped.__cause__ = ValueError()
    terminal = Terminal(wrapped)
    assert await Retry(2, retry_on=ValueError)(incoming(FakeBus()), terminal) == "done"


async def test_what_cannot_succeed_later_is_not_tried_again() -> None:
    terminal = Terminal(BusClosed("closed"))
    with pytest.raises(BusClosed):
        await Retry(5)(incoming(FakeBus()), terminal)
    assert terminal.calls == 1


async def test_inner_middleware_starts_from_the_same_context_each_time() -> None:
    async def stamp(context: Context, call_next: CallNext) -> Any:
        context.headers["n"] = context.headers.get("n", "") + "x"
        context.payload = [context.payload]
        return await call_next(context)

    terminal = Terminal(ValueError(), ValueError())
    context = incoming(FakeBus(), headers={"a": "1"})
    await compose([Retry(3), stamp], terminal)(context)
    assert [(payload, headers) for payload, headers, _ in terminal.contexts] == [
        ([{"decoded": True}], {"a": "1", "n": "x"})
    ] * 3


async def test_cancellation_is_never_swallowed() -> None:
    bus, terminal = FakeBus(), Terminal(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await Retry(3, dead_letter="dead")(incoming(bus), terminal)
    assert terminal.calls == 1
    assert bus.published == []


async def test_cancellation_ends_the_wait_between_attempts() -> None:
    bus = FakeBus()
    bus.clock = clock = StoppedClock()
    task = asyncio.create_task(_run(Retry(3)(incoming(bus), Terminal(ValueError()))))
    async with asyncio.timeout(5):
        while not clock.slept:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def _run(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


# --- retry: dead letters ----------------------------------------------------------------


async def test_an_exhausted_message_is_published_as_it_arrived_and_counts_as_handled() -> None:
    bus = FakeBus(Cap.HEADERS, Cap.CONTENT_TYPE)
    context = incoming(bus, headers={"a": "1"}, content_type="application/json")
    assert (
        await Retry(2, dead_letter="dead/lab")(
            context, Terminal(ValueError("s3cret"), ValueError("s3cret"))
        )
        is None
    )
    assert bus.published == [
        (
            "dead/lab",
            b"raw",
            {
                "headers": {
                    "a": "1",
                    "x-dead-letter-topic": "lab/x",
                    "x-dead-letter-error": "ValueError",
                    "x-dead-letter-attempts": "2",
                },
                "content_type": "application/json",
            },
        )
    ]


async def passes(context: Context, call_next: CallNext) -> Any:
    return await call_next(context)


async def changes(context: Context, call_next: CallNext) -> Any:
    context.headers["new"] = "5"
    context.headers["once"] = "6"
    context.headers.pop("gone", None)
    return await call_next(context)


REPEATED = [("twice", "1"), ("once", "2"), ("gone", "3"), ("twice", "4"), ("twice", "1")]
CHANGED = [("twice", "1"), ("once", "6"), ("twice", "4"), ("twice", "1"), ("new", "5")]


@pytest.mark.parametrize(("middleware", "expected"), [(passes, REPEATED), (changes, CHANGED)])
@pytest.mark.parametrize("publishing", [True, False])
async def test_a_header_that_nobody_assigned_may_repeat(
    middleware: Middleware, expected: list[tuple[str, str]], publishing: bool
) -> None:
    """The context's headers are a dict; that is no reason to lose the others."""
    async with connect("memory://headers") as sender, connect("memory://headers") as receiver:
        (sender if publishing else receiver).use(middleware)
        async with receiver.subscribe("a") as messages:
            await sender.publish("a", b"x", headers=REPEATED)
            message = await messages.get(5)
            assert list(message.headers.pairs) == expected
            assert message.headers.get_all("twice") == ["1", "4", "1"]


async def test_a_dead_letter_keeps_headers_that_repeat() -> None:
    async def fail(message: Message[bytes]) -> None:
        raise ValueError

    async with connect("memory://buried") as bus:
        bus.use(Retry(1, dead_letter="dead/retried"))
        async with bus.subscribe("dead/#") as dead:
            async with bus.subscribe("a", handler=fail):
                await bus.publish("a", b"x", headers=REPEATED)
                message = await dead.get(5)
                assert message.headers.get_all("twice") == ["1", "4", "1"]
                assert message.headers["x-dead-letter-topic"] == "a"


async def test_where_no_headers_travel_the_payload_goes_alone() -> None:
    bus = FakeBus()
    context = incoming(bus, headers={"a": "1"}, content_type="text/plain")
    await Retry(1, dead_letter="dead")(context, Terminal(ValueError()))
    assert bus.published == [("dead", b"raw", {})]


async def test_a_dead_letter_that_fails_is_not_published_again() -> None:
    bus = FakeBus()
    with pytest.raises(ValueError, match="boom"):
        await Retry(1, dead_letter="dead")(
            incoming(bus, topic="dead"), Terminal(ValueError("boom"))
        )
    assert bus.published == []


async def test_an_unpublished_dead_letter_is_not_handled() -> None:
    bus = FakeBus(error=NotConnected("offline"))
    with pytest.raises(ValueError, match="boom") as caught:
        await Retry(1, dead_letter="dead")(incoming(bus), Terminal(ValueError("boom")))
    assert "the dead letter was not published: offline" in caught.value.__notes__[0]


# --- retry: publishing ------------------------------------------------------------------


def _failed(outcome: Outcome, *, retryable: bool | None = True) -> PublishFailed:
    return PublishFailed("no", outcome=outcome, retryable=retryable)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (NotConnected("offline"), True),
        (_failed(Outcome.NOT_SENT), True),
        (_failed(Outcome.UNKNOWN), False),
        (_failed(Outcome.REJECTED), False),
        (_failed(Outcome.NOT_SENT, retryable=False), False),
        (PublishFailed("nobody knows", outcome=Outcome.NOT_SENT), False),
        (PublishTimeout("late"), False),
        (BusClosed("closed"), False),
        (InvalidTopic("bad"), False),
        (ValueError("of a middleware"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_a_publish_is_tried_again_only_when_that_cannot_duplicate(
    error: Exception, again: bool
) -> None:
    bus = FakeBus()
    terminal = Terminal(error, result="receipt")
    call = Retry(2, dead_letter="dead")(outgoing(bus), terminal)
    if again:
        assert await call == "receipt"
    else:
        with pytest.raises(type(error)):
            await call
    assert terminal.calls == (2 if again else 1)
    assert bus.published == []


async def test_a_rate_limit_is_waited_for() -> None:
    bus = FakeBus()
    terminal = Terminal(RateLimited("slow down", retry_after=40))
    await Retry(2, backoff=0.1)(outgoing(bus), terminal)
    assert bus.clock.slept == [40]


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"backoff": -1},
        {"factor": 0.5},
        {"maximum": -1},
        {"dead_letter": "a/#"},
        {"dead_letter": ""},
    ],
)
def test_retry_refuses_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Retry(**options)


def test_retry_refuses_to_catch_cancellation() -> None:
    with pytest.raises(TypeError, match="CancelledError"):
        Retry(retry_on=asyncio.CancelledError)  # type: ignore[arg-type]  # that is the test


# --- dedupe -----------------------------------------------------------------------------


async def test_a_message_seen_before_is_dropped_and_counted() -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe()
    subscription = FakeSubscription()
    for number in ("1", "2", "1", "2", "1"):
        await dedupe(incoming(bus, id=number, subscription=subscription), terminal)
    assert terminal.calls == 2
    assert dedupe.dropped == 3


async def test_equal_content_is_no_reason_to_drop() -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe()
    for _ in range(3):
        await dedupe(incoming(bus), terminal)
    assert terminal.calls == 3


async def test_an_id_counts_within_its_topic() -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe()
    await dedupe(incoming(bus, id="1", topic="a"), terminal)
    await dedupe(incoming(bus, id="1", topic="b"), terminal)
    assert terminal.calls == 2


async def test_each_subscription_gets_its_copy() -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe()
    one, two = FakeSubscription(), FakeSubscription()
    for subscription in (one, two, one, two):
        await dedupe(incoming(bus, id="1", subscription=subscription), terminal)
    assert terminal.calls == 2


@pytest.mark.parametrize("key", ["msg-id", lambda message: message.headers.get("msg-id")])
async def test_the_key_can_be_a_header_or_a_function(key: Any) -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe(key=key)
    for value in ("x", "y", "x"):
        await dedupe(incoming(bus, id="same", headers={"msg-id": value}), terminal)
    await dedupe(incoming(bus, id="same"), terminal)
    await dedupe(incoming(bus, id="same"), terminal)
    assert terminal.calls == 4


async def test_a_message_is_forgotten_after_the_window_and_beyond_the_maximum() -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe(10, maximum=2)
    await dedupe(incoming(bus, id="1"), terminal)
    bus.clock.now += 9.9
    await dedupe(incoming(bus, id="1"), terminal)
    assert terminal.calls == 1
    bus.clock.now += 0.1
    await dedupe(incoming(bus, id="1"), terminal)
    assert terminal.calls == 2
    for number in ("2", "3", "1"):
        await dedupe(incoming(bus, id=number), terminal)
    assert terminal.calls == 5


@pytest.mark.parametrize("error", [ValueError(), asyncio.CancelledError()])
async def test_a_redelivery_after_a_failure_passes(error: BaseException) -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(error), Dedupe()
    with pytest.raises(type(error)):
        await dedupe(incoming(bus, id="1"), terminal)
    await dedupe(incoming(bus, id="1"), terminal)
    await dedupe(incoming(bus, id="1"), terminal)
    assert terminal.calls == 2


async def test_a_message_given_back_passes_again() -> None:
    bus, dedupe, verdicts = FakeBus(), Dedupe(), list[Verdict]()
    handled = 0

    async def handler(context: Context) -> None:
        nonlocal handled
        handled += 1
        assert context.message is not None
        if handled == 1:
            await context.message.nack()

    for _ in range(3):
        await dedupe(incoming(bus, id="1", settle=verdicts.append), handler)
    assert handled == 2
    assert verdicts == [Verdict.NACK]


async def test_with_manual_acknowledgement_only_acknowledged_messages_are_remembered() -> None:
    bus, dedupe, verdicts = FakeBus(), Dedupe(), list[Verdict]()
    subscription = ManualSubscription()
    handled = 0

    async def handler(context: Context) -> None:
        nonlocal handled
        handled += 1
        assert context.message is not None
        if handled == 2:
            await context.message.ack()

    for _ in range(3):
        context = incoming(bus, id="1", subscription=subscription, settle=verdicts.append)
        await dedupe(context, handler)
    assert handled == 2
    # The third was dropped, and acknowledged for want of anybody else who would.
    assert verdicts == [Verdict.ACK, Verdict.ACK]


async def test_publishing_is_untouched_by_dedupe() -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe()
    await dedupe(outgoing(bus), terminal)
    await dedupe(outgoing(bus), terminal)
    assert terminal.calls == 2


async def test_dedupe_does_not_keep_subscriptions_alive() -> None:
    bus, terminal, dedupe = FakeBus(), Terminal(), Dedupe()
    subscription = FakeSubscription()
    await dedupe(incoming(bus, id="1", subscription=subscription), terminal)
    assert len(dedupe._seen) == 1
    del subscription
    assert len(dedupe._seen) == 0


@pytest.mark.parametrize("options", [{"window": 0}, {"maximum": 0}])
def test_dedupe_refuses_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Dedupe(**options)


# --- timeout ----------------------------------------------------------------------------


async def _forever(context: Context) -> None:
    await asyncio.Event().wait()


async def test_a_handler_that_takes_too_long_fails() -> None:
    context = Context(Direction.RECEIVE, "lab/x")
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError, match=r"handling 'lab/x' took longer than 0.01 s"):
            await Timeout(0.01)(context, _forever)


async def test_a_publish_that_takes_too_long_has_an_unknown_outcome() -> None:
    async with asyncio.timeout(5):
        with pytest.raises(PublishTimeout) as caught:
            await Timeout(0.01)(Context(Direction.PUBLISH, "lab/x"), _forever)
    assert caught.value.outcome is Outcome.UNKNOWN
    assert caught.value.topic == "lab/x"


async def test_a_timeout_follows_the_clock_of_the_bus() -> None:
    bus = FakeBus()
    bus.clock = clock = StoppedClock()
    task = asyncio.create_task(_run(Timeout(3600)(incoming(bus), _forever)))
    async with asyncio.timeout(5):
        while not clock.slept:
            await asyncio.sleep(0)
        assert clock.slept == [3600]
        clock.passed.set()
        with pytest.raises(TimeoutError):
            await task


@pytest.mark.parametrize("quick", [True, False])
async def test_in_time_a_timeout_changes_nothing_and_leaves_nothing(quick: bool) -> None:
    bus = FakeBus()
    bus.clock = StoppedClock()
    context = incoming(bus) if quick else Context(Direction.RECEIVE, "t")
    assert await Timeout(60)(context, Terminal()) == "done"
    with pytest.raises(TimeoutError, match="its own"):
        await Timeout(60)(context, Terminal(TimeoutError("its own")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_cancellation_passes_through_a_timeout() -> None:
    task = asyncio.create_task(_run(Timeout(60)(Context(Direction.RECEIVE, "t"), _forever)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_timeout_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError):
        Timeout(0)


# --- on a bus -----------------------------------------------------------------------------


async def test_the_catalogue_can_be_named_in_the_options_of_a_bus() -> None:
    calls: list[int] = []

    async def fail_once(message: Message[int]) -> None:
        calls.append(message.payload)
        if len(calls) == 1:
            raise ValueError("once")

    options: dict[str, Any] = {"middleware": ("retry", "dedupe", "timeout")}
    async with asyncio.timeout(10), connect("memory://", **options) as bus:
        async with bus.subscribe("named", int, handler=fail_once):
            await bus.publish("named", 7)
            while len(calls) < 2:
                await asyncio.sleep(0.001)
    assert calls == [7, 7]
    assert bus.stats.handler_failures == 0


async def test_an_unknown_name_comes_with_those_that_are_known() -> None:
    with pytest.raises(BadOption, match=r"dedupe.*retry.*timeout"):
        await connect("memory://", middleware=("rety",))


async def test_what_middleware_assigns_reaches_iterators_and_handlers() -> None:
    async def shout(context: Context, call_next: CallNext) -> Any:
        if context.direction is Direction.RECEIVE:
            context.payload = context.payload.upper()
        return await call_next(context)

    got: list[str] = []

    async def handle(message: Message[str]) -> None:
        got.append(message.payload)

    async with asyncio.timeout(10), connect("memory://") as bus:
        bus.use(shout)
        async with (
            bus.subscribe("shout", str) as messages,
            bus.subscribe("shout", str, handler=handle),
        ):
            await bus.publish("shout", "hi")
            message = await messages.get(timeout=5)
            while not got:
                await asyncio.sleep(0.001)
    assert (message.payload, message.raw, got) == ("HI", b"hi", ["HI"])


async def test_a_dead_letter_travels_over_a_real_bus() -> None:
    async def fail(message: Message[int]) -> None:
        raise ValueError("never")

    async with asyncio.timeout(10), connect("memory://") as bus:
        bus.use(Retry(2, backoff=0.001, dead_letter="dead/jobs"))
        async with (
            bus.subscribe("dead/#") as dead,
            bus.subscribe("jobs", int, handler=fail),
        ):
            await bus.publish("jobs", 5, headers={"a": "1"})
            letter = await dead.get(timeout=5)
    assert letter.payload == b"5"
    assert dict(letter.headers) == {
        "a": "1",
        "x-dead-letter-topic": "jobs",
        "x-dead-letter-error": "ValueError",
        "x-dead-letter-attempts": "2",
    }
    assert bus.stats.handler_failures == 0


async def test_dedupe_gives_each_subscription_its_copy_on_a_real_bus() -> None:
    async with asyncio.timeout(10), connect("memory://") as bus:
        bus.use(dedupe := Dedupe(key="id"))
        async with bus.subscribe("twice/#", int) as one, bus.subscribe("twice/+", int) as two:
            for number, key in ((1, "a"), (2, "a"), (3, "b")):
                await bus.publish("twice/x", number, headers={"id": key})
            for subscription in (one, two):
                received = [(await subscription.get(timeout=5)).payload for _ in range(2)]
                assert received == [1, 3]
    assert dedupe.dropped == 2
