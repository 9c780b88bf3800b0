"""The synchronous API: the same names, any thread, and no wait that never ends."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import sync
from pubsub_core.authorization import Authorizer
from pubsub_core.bus import Bus, connect
from pubsub_core.errors import (
    BusClosed,
    ConfigError,
    DecodeFailed,
    InvalidTopic,
    NotSupported,
    WrongLoop,
)
from pubsub_core.events import InterestKind, Status, StatusChanged
from pubsub_core.eventstream import EventStream
from pubsub_core.interest import Notifications, Presence
from pubsub_core.message import Message, Receipt
from pubsub_core.middleware import CallNext, Context
from pubsub_core.subscription import Subscription
from pubsub_core.sync import (
    SyncAuthorizer,
    SyncBus,
    SyncEventStream,
    SyncNotifications,
    SyncPresence,
    SyncSubscription,
)
from pubsub_mqtt.server import MosquittoServer
from tests.servers import SLOW_STEPS_UNTOLD

WITHIN = 20.0

_names = itertools.count()


@pytest.fixture
def url() -> str:
    return f"memory://sync{os.getpid()}-{next(_names)}"


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + WITHIN
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        for thread in left:
            thread.join(0.05)
    assert not left


def eventually(condition: Callable[[], object]) -> None:
    """Fail unless *condition* becomes true in time."""
    deadline = time.monotonic() + WITHIN
    checked = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        checked.wait(0.002)


# --- the same names ---------------------------------------------------------------------

# For applications, which listen to every failure and start their handlers together.
MACHINERY = {"hold_handlers", "on_handler_failure"}
EXTRA = {"call"}
PAIRS: list[tuple[type[Any], type[Any]]] = [
    (Bus, SyncBus),
    (Subscription, SyncSubscription),
    (Presence, SyncPresence),
    (Notifications, SyncNotifications),
    (EventStream, SyncEventStream),
    (Authorizer, SyncAuthorizer),
]


def public(cls: type[Any]) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize(("asynchronous", "synchronous"), PAIRS)
def test_every_name_has_its_counterpart(asynchronous: type[Any], synchronous: type[Any]) -> None:
    assert public(asynchronous) - MACHINERY - public(synchronous) == set()
    attributes = {"clock"} if asynchronous is Bus else set()
    assert public(synchronous) - public(asynchronous) - EXTRA == attributes - public(asynchronous)


@pytest.mark.parametrize(("asynchronous", "synchronous"), PAIRS)
def test_arguments_are_the_same(asynchronous: type[Any], synchronous: type[Any]) -> None:
    compared = 0
    for name in public(asynchronous) & public(synchronous):
        one, two = getattr(asynchronous, name), getattr(synchronous, name)
        if not callable(one):
            assert isinstance(one, property) == isinstance(two, property), name
            continue
        ours, theirs = inspect.signature(two), inspect.signature(one)
        assert list(ours.parameters.values()) == list(theirs.parameters.values()), name
        assert not inspect.iscoroutinefunction(two), name
        compared += 1
    assert compared


def test_connecting_takes_the_same_arguments() -> None:
    ours, theirs = inspect.signature(sync.connect), inspect.signature(connect)
    assert list(ours.parameters.values()) == list(theirs.parameters.values())


@pytest.mark.parametrize(("asynchronous", "synchronous"), PAIRS)
def test_what_can_be_entered_and_iterated_still_can(
    asynchronous: type[Any], synchronous: type[Any]
) -> None:
    for ours, theirs in (("__enter__", "__aenter__"), ("__next__", "__anext__")):
        assert hasattr(synchronous, ours) == hasattr(asynchronous, theirs)


# --- everyday use -----------------------------------------------------------------------


def test_a_message_goes_round(url: str) -> None:
    with sync.connect(url) as bus, bus.subscribe("lab/{device}/temp", float) as readings:
        receipt = bus.publish("lab/oven/temp", 81.5)
        message = readings.get(timeout=WITHIN)
        assert receipt.subscribers == 1
        assert (message.payload, message.params["device"]) == (81.5, "oven")
        assert readings.stats.delivered == 1
        assert readings.active
        statuses = [bus.status]
    statuses.append(bus.status)
    assert statuses == [Status.ONLINE, Status.CLOSED]
    assert not readings.active


def test_a_subscription_iterates_in_the_calling_thread(url: str) -> None:
    with sync.connect(url) as bus, bus.subscribe("n", int) as numbers:
        for number in range(5):
            bus.publish("n", number)
        received = []
        for message in numbers:
            received.append(message.payload)
            if len(received) == 5:
                break
    assert received == [0, 1, 2, 3, 4]


def test_a_wait_for_a_message_ends_in_time(url: str) -> None:
    with sync.connect(url) as bus, bus.subscribe("n") as numbers:
        with pytest.raises(TimeoutError):
            numbers.get(timeout=0.01)
        bus.publish("n", b"1")
        assert numbers.get(timeout=WITHIN).payload == b"1"


def test_many_threads_share_a_bus(url: str) -> None:
    with sync.connect(url) as bus, bus.subscribe("t/#", int, buffer=10_000) as received:
        threads = [
            threading.Thread(target=lambda n=n: [bus.publish(f"t/{n}", i) for i in range(50)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN)
        by_topic: dict[str, list[int]] = {}
        for _ in range(400):
            message = received.get(timeout=WITHIN)
            by_topic.setdefault(message.topic, []).append(message.payload)
    assert by_topic == {f"t/{n}": list(range(50)) for n in range(8)}


def test_handlers_run_in_a_thread_and_may_use_the_bus(url: str) -> None:
    with sync.connect(url) as bus, bus.subscribe("out", str) as out:
        threads: list[threading.Thread] = []

        def handler(message: Message[int]) -> None:
            threads.append(threading.current_thread())
            bus.publish("out", f"got {message.payload}")

        with bus.subscribe("in", int, handler=handler):
            bus.publish("in", 1)
            assert out.get(timeout=WITHIN).payload == "got 1"
    assert threads[0] is not threading.main_thread()


def test_an_async_handler_runs_on_the_loop(url: str) -> None:
    with sync.connect(url) as bus:
        done = threading.Event()
        names: list[str] = []

        async def handler(message: Message[bytes]) -> None:
            names.append(threading.current_thread().name)
            done.set()

        with bus.subscribe("in", handler=handler):
            bus.publish("in", b"1")
            assert done.wait(WITHIN)
    assert names == ["pubsub-sync"]


def test_a_message_is_acknowledged_without_await(url: str) -> None:
    with sync.connect(url) as bus, bus.subscribe("job", str, ack="manual") as jobs:
        bus.publish("job", "one")
        job = jobs.get(timeout=WITHIN)
        job.nack()
        again = jobs.get(timeout=WITHIN)
        assert again.payload == "one"
        assert again.redelivered
        again.ack()
        with pytest.raises(TimeoutError):
            jobs.get(timeout=0.02)


def test_history_retained_values_and_batches(url: str) -> None:
    with sync.connect(url) as bus:
        results = bus.publish_many((f"h/{n}", n) for n in range(3))
        assert [getattr(result, "topic", result) for result in results] == ["h/0", "h/1", "h/2"]
        assert [message.payload for message in bus.history("h/#", int)] == [0, 1, 2]
        assert [message.payload for message in bus.history("h/#", int, last=1)] == [2]
        bus.publish("state", "on", retain=True)
        last = bus.last("state", str)
        assert last is not None
        assert last.payload == "on"
        bus.clear("state")
        assert bus.last("state", str) is None


def test_a_history_that_is_not_read_to_its_end_is_closed(url: str) -> None:
    with sync.connect(url) as bus:
        bus.publish_many((f"h/{n}", n) for n in range(3))
        messages = bus.history("h/#", int)
        assert next(messages).payload == 0
        messages.close()  # type: ignore[attr-defined]  # it is a generator, typed as an iterator


def test_presence_and_notifications(url: str) -> None:
    with (
        sync.connect(url) as bus,
        sync.connect(url) as other,
        bus.presence("room") as room,
        bus.notifications("ro/#") as interest,
    ):
        assert room.members == ()
        with other.subscribe("room"), other.subscribe("ro/om"):
            assert room.get(timeout=WITHIN).kind is InterestKind.JOINED
            assert room.count == 1
            assert bus.members("room") == list(room.members)
            event = next(each for each in interest if each.member is not None)
            assert (event.topic, event.joined) == ("ro/om", True)
            assert "ro/om" in interest.interest
            other.send_to(next(iter(room.members)), "room", b"you")
        assert next(room).left
        assert room.synced
        assert (room.topic, interest.filter) == ("room", "ro/#")


def test_events_status_and_ping(url: str) -> None:
    with sync.connect(url) as bus, bus.events() as events:
        first = next(events)
        assert isinstance(first, StatusChanged)
        assert first.status is Status.ONLINE
        assert bus.wait_for(Status.ONLINE, timeout=WITHIN) is Status.ONLINE
        with pytest.raises(TimeoutError):
            bus.wait_for(Status.FAILED, timeout=0.01)
        assert bus.ping() >= 0
        assert bus.error is None
        events.close()
        assert list(events) == []


def test_middleware_stays_async(url: str) -> None:
    async def shout(context: Context, call_next: CallNext) -> Any:
        context.headers[context.direction.value] = "seen"
        return await call_next(context)

    with sync.connect(url) as bus:
        bus.use(shout)
        with bus.subscribe("a", str) as messages:
            bus.publish("a", "b")
            headers = messages.get(timeout=WITHIN).headers
    assert dict(headers) == {"publish": "seen", "receive": "seen"}


def test_async_functions_of_the_native_client_can_be_called(url: str) -> None:
    async def add(one: int, *, two: int) -> int:
        await asyncio.sleep(0)
        return one + two

    with sync.connect(url) as bus:
        assert bus.call(add, 1, two=2) == 3


def test_a_bus_can_be_looked_at(url: str) -> None:
    with sync.connect(url) as bus:
        assert bus.info.name == "memory"
        assert bus.capabilities
        assert bus.supports(next(iter(bus.capabilities))) is not None
        assert bus.guarantees is not None
        assert bus.limits is not None
        assert bus.stats.published == 0
        assert bus.clock.monotonic() > 0
        assert url in repr(bus)
        assert "'a'" in repr(bus.subscribe("a"))
        with pytest.raises(NotSupported):
            bus.native(SyncBus)


def test_everyday_use_over_a_real_broker(
    mosquitto: MosquittoServer, unique: Callable[[str], str]
) -> None:
    topic = unique("sync")
    with sync.connect(mosquitto.url) as bus:
        with bus.subscribe(f"{topic}/+", int) as numbers:
            results = bus.publish_many((f"{topic}/{n}", n) for n in range(20))
            assert {type(result) for result in results} == {Receipt}
            assert [numbers.get(timeout=WITHIN).payload for _ in range(20)] == list(range(20))
        assert 0 <= bus.ping() < WITHIN


# --- errors -----------------------------------------------------------------------------


def test_errors_come_as_they_are(url: str) -> None:
    with sync.connect(url) as bus:
        with pytest.raises(InvalidTopic):
            bus.publish("a/#", b"")
        with bus.subscribe("a", int) as numbers:
            bus.publish("a", b"x")
            with pytest.raises(DecodeFailed):
                numbers.get(timeout=WITHIN)


def test_a_failed_connect_leaves_no_thread() -> None:
    with pytest.raises(ConfigError):
        sync.connect("nowhere-such://x")


def test_a_closed_bus_says_so(url: str) -> None:
    bus = sync.connect(url)
    subscription = bus.subscribe("a")
    bus.close()
    bus.close()
    with pytest.raises(BusClosed):
        bus.publish("a", b"")
    with pytest.raises(BusClosed):
        subscription.get(timeout=WITHIN)
    subscription.close()


def test_the_thread_is_shared_and_ends_with_the_last_bus(url: str) -> None:
    def loops() -> int:
        return sum(thread.name == "pubsub-sync" for thread in threading.enumerate())

    one, two = sync.connect(url), sync.connect(url)
    assert loops() == 1
    one.close()
    assert loops() == 1
    two.publish("a", b"")
    two.close()
    assert loops() == 0
    with sync.connect(url):
        assert loops() == 1


def test_closing_ends_an_iteration_in_another_thread(url: str) -> None:
    bus = sync.connect(url)
    numbers = bus.subscribe("n")
    received: list[Any] = []
    reader = threading.Thread(target=lambda: received.extend(numbers))
    reader.start()
    bus.publish("n", b"1")
    eventually(lambda: numbers.stats.delivered)
    bus.close()
    reader.join(WITHIN)
    assert not reader.is_alive()
    assert [message.payload for message in received] == [b"1"]


def test_a_call_under_way_ends_when_the_loop_does(url: str) -> None:
    bus = sync.connect(url)
    begun = threading.Event()

    async def forever() -> None:
        begun.set()
        await asyncio.Event().wait()

    outcome: list[BaseException] = []

    def call() -> None:
        try:
            bus.call(forever)
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(WITHIN)
    bus.close()
    thread.join(WITHIN)
    assert not thread.is_alive()
    assert isinstance(outcome[0], BusClosed)


def test_a_handler_may_close_its_own_bus(url: str) -> None:
    bus = sync.connect(url)
    returned = threading.Event()

    def handler(message: Message[bytes]) -> None:
        bus.close()
        returned.set()

    bus.subscribe("stop", handler=handler)
    bus.publish("stop", b"")
    assert returned.wait(WITHIN)
    eventually(lambda: bus.status is Status.CLOSED)
    bus.close()


# --- waits that could never end -----------------------------------------------------------


async def test_inside_a_running_loop_the_async_call_is_named(url: str) -> None:
    with pytest.raises(WrongLoop, match="async with connect"):
        sync.connect(url)
    bus = await asyncio.to_thread(sync.connect, url)
    try:
        with pytest.raises(WrongLoop, match=r"await bus\.publish\(\.\.\.\)"):
            bus.publish("a", b"")
    finally:
        await asyncio.to_thread(bus.close)


def test_an_async_handler_cannot_block_its_own_loop(url: str) -> None:
    with sync.connect(url) as bus:
        outcome: list[BaseException] = []
        done = threading.Event()

        async def handler(message: Message[bytes]) -> None:
            try:
                bus.publish("b", b"")
            except BaseException as exc:
                outcome.append(exc)
            done.set()

        bus.subscribe("a", handler=handler)
        bus.publish("a", b"")
        assert done.wait(WITHIN)
        assert isinstance(outcome[0], WrongLoop)


async def test_a_view_of_an_async_bus_works_from_threads(url: str) -> None:
    async with asyncio.timeout(WITHIN), connect(url) as bus:
        view = sync.wrap(bus)
        with pytest.raises(WrongLoop):
            view.publish("a", b"")
        async with bus.subscribe("a", str) as messages:
            await asyncio.to_thread(view.publish, "a", "hi")
            assert (await messages.get(timeout=WITHIN)).payload == "hi"
        await asyncio.to_thread(view.close)
        assert bus.status is Status.CLOSED


# --- processes ----------------------------------------------------------------------------


def run_program(program: str, *, stop: signal.Signals | None = None) -> tuple[int, str, str]:
    """Run *program*; with *stop*, send that once it has printed ``ready``."""
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first = ""
        if stop is not None:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first == "ready\n"
            process.send_signal(stop)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    return process.returncode, first + out, err


def program(text: str) -> str:
    return (
        SLOW_STEPS_UNTOLD
        + "from pubsub_core import sync\nimport os, sys, time, threading\n"
        + textwrap.dedent(text)
    )


def test_a_program_that_forgets_to_close_ends_all_the_same() -> None:
    code, out, err = run_program(
        program(
            """
            bus = sync.connect("memory://")
            numbers = bus.subscribe("n")
            bus.subscribe("m", handler=lambda message: time.sleep(60))
            bus.publish("m", b"")
            threading.Thread(target=lambda: list(numbers), daemon=True).start()
            print("done")
            """
        )
    )
    assert (code, out) == (0, "done\n"), err
    assert "Traceback" not in err


def test_an_interrupt_leaves_a_wait_cleanly() -> None:
    code, out, err = run_program(
        program(
            """
            try:
                with sync.connect("memory://") as bus, bus.subscribe("n") as numbers:
                    print("ready", flush=True)
                    for message in numbers:
                        pass
            except KeyboardInterrupt:
                print(bus.status, threading.active_count())
            """
        ),
        stop=signal.SIGINT,
    )
    assert (code, out) == (0, "ready\nclosed 1\n"), err
    assert err == ""


def test_a_forked_child_is_told_and_the_parent_goes_on() -> None:
    code, out, err = run_program(
        program(
            """
            import gc
            from pubsub_core.errors import WrongLoop
            bus = sync.connect("memory://")
            numbers = bus.subscribe("n", int)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    bus.publish("n", 1)
                except WrongLoop as exc:
                    if "fork" in str(exc) and "sync.connect()" in str(exc):
                        code = 2
                try:
                    numbers.get(timeout=1)
                except WrongLoop:
                    code += 1
                bus.close()
                numbers.close()
                with sync.connect("memory://") as own, own.subscribe("n", int) as mine:
                    own.publish("n", 5)
                    code += mine.get(timeout=5).payload
                del bus, numbers
                gc.collect()
                sys.exit(code)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            bus.publish("n", 7)
            print(numbers.get(timeout=5).payload)
            bus.close()
            """
        )
    )
    assert (code, out) == (0, "8\n7\n"), err
    assert err == ""


def test_the_examples_of_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "app.md").read_text("utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 6
    for example in examples:
        code = compile(example, "docs/app.md", "exec", dont_inherit=True)
        exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out == "oven 81.5\nTrue\n"
