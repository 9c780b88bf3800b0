"""Applications: what handlers get, how they start and how they stop."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import functools
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest

from pubsub_core.app import App, Running
from pubsub_core.bus import Bus, connect
from pubsub_core.config import Config
from pubsub_core.errors import (
    BadOption,
    BusClosed,
    ConfigError,
    ConnectError,
    HandlerFailed,
    InvalidFilter,
    PubSubError,
    WrongLoop,
)
from pubsub_core.events import Gap, Notice, Status
from pubsub_core.memory import Space
from pubsub_core.message import Message
from pubsub_core.middleware import CallNext, Context, Direction, Retry
from pubsub_core.sync import SyncBus
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.server import MosquittoServer
from tests.servers import SLOW_STEPS_UNTOLD

WITHIN = 20.0

pytestmark = pytest.mark.usefixtures("no_leaks")

_names = itertools.count()


@pytest.fixture
def url() -> str:
    return f"memory://app{os.getpid()}-{next(_names)}"


@dataclasses.dataclass
class Reading:
    celsius: float


class Lamp(TypedDict):
    on: bool


class Color(enum.Enum):
    RED = "red"


async def eventually(condition: Callable[[], object]) -> None:
    """Fail unless *condition* becomes true in time."""
    async with asyncio.timeout(WITHIN):
        while not condition():
            await asyncio.sleep(0.001)


async def feed(app: App, url: str, *messages: tuple[str, Any], until: Callable[[], object]) -> None:
    """Run *app*, publish *messages*, and stop when *until* is true."""
    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        for topic, payload in messages:
            await running.bus().publish(topic, payload)
        await eventually(until)
    assert running.errors == []
    assert running.code == 0


# --- what handlers get ------------------------------------------------------------------


async def test_a_handler_gets_message_captures_and_bus(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("lab/{device}/temp")
    async def watch(message: Message[Reading], device: str, bus: Bus) -> None:
        got.append((message.payload, device, message.topic))
        await bus.publish(f"alerts/{device}", "hot")

    @app.on("alerts/{device}")
    async def alert(payload: str, device: str) -> None:
        got.append((payload, device))

    await feed(app, url, ("lab/oven/temp", Reading(99.0)), until=lambda: len(got) == 2)
    assert got == [(Reading(99.0), "oven", "lab/oven/temp"), ("hot", "oven")]


async def test_a_plain_handler_runs_in_a_thread_with_a_synchronous_bus(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("in/{n}")
    def handle(n: int, bus: SyncBus) -> None:
        got.append(threading.current_thread())
        bus.publish("out", n + 1)
        with bus.subscribe("nested", int) as nested:
            bus.publish("nested", 5)
            got.append(nested.get(timeout=WITHIN).payload)

    @app.on("out")
    async def out(payload: int) -> None:
        got.append(payload)

    await feed(app, url, ("in/41", b""), until=lambda: len(got) == 3)
    assert got[0] is not threading.main_thread()
    assert set(got[1:]) == {42, 5}


async def test_a_handler_may_publish_and_subscribe(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("ask")
    async def ask(bus: Bus) -> None:
        async with bus.subscribe("answer", str) as answers:
            await bus.publish("answer", "yes")
            got.append((await answers.get(timeout=WITHIN)).payload)

    await feed(app, url, ("ask", b""), until=lambda: got)
    assert got == ["yes"]


@pytest.mark.parametrize(
    ("annotation", "payload", "expected"),
    [
        (Message, b"1", b"1"),
        (Message[bytes], b"1", b"1"),
        (Message[int], b"1", 1),
        (Message[Lamp], b'{"on":true}', {"on": True}),
        (Message[Reading] | Gap, b'{"celsius":1}', Reading(1.0)),
        (Message[Any], b"[1]", [1]),
        (Message[Reading | None], b"null", None),
    ],
)
async def test_the_annotation_says_what_payloads_are_decoded_to(
    url: str, annotation: Any, payload: bytes, expected: Any
) -> None:
    app, got = App(), list[Any]()

    async def handle(message: Any) -> None:
        got.append(message.payload)

    handle.__annotations__["message"] = annotation
    app.on("a")(handle)
    await feed(app, url, ("a", payload), until=lambda: got)
    assert got == [expected]


async def test_type_overrides_the_annotation(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("a", type=dict)
    async def handle(message: Message[Reading], payload: Any) -> None:
        got.append((message.payload, payload))

    await feed(app, url, ("a", Reading(1.5)), until=lambda: got)
    assert got == [({"celsius": 1.5}, {"celsius": 1.5})]


async def test_captures_are_converted_to_their_annotation(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("{a}/{b}/{c}/{d}/{rest:path}")
    async def handle(
        a: int, b: Color, c: uuid.UUID, d: Any, rest: str, *, e: int = 3, **more: Any
    ) -> None:
        got.append((a, b, c, d, rest, e, more))

    identity = uuid.uuid4()
    await feed(app, url, (f"7/red/{identity}/x/y/z", b""), until=lambda: got)
    assert got == [(7, Color.RED, identity, "x", "y/z", 3, {})]


async def test_a_capture_that_does_not_convert_fails_the_handler(url: str) -> None:
    app = App()

    @app.on("n/{number}")
    async def handle(number: int) -> None:
        raise AssertionError("not called")

    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        await running.bus().publish("n/seven", b"")
        await eventually(lambda: running.errors)
    assert str(running.errors[0].__cause__) == "{number} of 'n/seven' is no int"


async def test_parameters_can_come_in_any_order_and_kind(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("x/{b}")
    async def handle(bus, /, skipped=1, *, message, b):  # type: ignore[no-untyped-def]  # names alone must do
        got.append((type(bus), skipped, message.payload, b))

    await feed(app, url, ("x/y", b"z"), until=lambda: got)
    assert got == [(Bus, 1, b"z", "y")]


async def test_methods_partials_and_callable_objects_are_handlers(url: str) -> None:
    app, got = App(), list[Any]()

    class Service:
        @staticmethod
        async def work(tag: str, payload: int) -> None:
            got.append((tag, payload))

        async def method(self, payload: int) -> None:
            got.append(("method", payload))

        async def __call__(self, payload: int) -> None:
            got.append(("call", payload))

    app.on("a")(Service().method)
    app.on("a")(Service())
    app.on("a")(functools.partial(Service.work, "partial"))
    await feed(app, url, ("a", b"1"), until=lambda: len(got) == 3)
    assert sorted(got) == [("call", 1), ("method", 1), ("partial", 1)]


async def test_a_plain_wrapper_of_an_async_function_is_a_handler_and_a_hook(url: str) -> None:
    """Nothing about it says that it returns something to await."""
    app, got = App(), list[Any]()

    async def work(message: Message[bytes]) -> None:
        got.append(message.payload)

    async def prepare() -> None:
        got.append("started")

    class WithMessage:
        func = staticmethod(work)

        def __call__(self, message: Message[bytes]) -> Any:
            return self.func(message)

    class WithMessageAndBus:
        func = staticmethod(work)

        def __call__(self, message: Message[bytes], bus: SyncBus) -> Any:
            return self.func(message)

    class Hook:
        func = staticmethod(prepare)

        def __call__(self) -> Any:
            return self.func()

    app.on("a")(WithMessage())
    app.on("a")(WithMessageAndBus())
    app.on_start(Hook())
    await feed(app, url, ("a", b"1"), until=lambda: len(got) == 3)
    assert got[0] == "started"


async def test_a_function_can_be_declared_twice_and_stays_itself(url: str) -> None:
    app, got = App(), list[str]()

    @app.on("a")
    @app.on("b")
    async def handle(message: Message[bytes]) -> None:
        got.append(message.topic)

    await handle(Message("direct", b"", {}, None))  # type: ignore[arg-type]  # no frame is read
    await feed(app, url, ("a", b""), ("b", b""), until=lambda: len(got) == 3)
    assert set(got) == {"direct", "a", "b"}
    assert app.filters == (("main", "b"), ("main", "a"))


async def test_options_reach_the_subscription(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("job", ack="manual", group="workers", dead_letter="dead", codec="msgpack")
    async def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if len(got) == 1:
            message.nack()
        else:
            message.ack()

    @app.on("raw", on_decode_error="dead_letter", dead_letter="dead")
    async def raw(payload: int) -> None:
        got.append(payload)

    @app.on("dead")
    async def dead(payload: bytes) -> None:
        got.append(payload)

    await feed(app, url, ("job", b"\x05"), ("raw", b"x"), until=lambda: len(got) == 3)
    assert got.count(5) == 2
    assert b"x" in got


def test_an_unknown_option_is_refused_where_it_is_declared() -> None:
    app = App()
    for name in ("qoss", "handler"):
        with pytest.raises(BadOption, match=rf"on\({name}=\) is not an option"):
            app.on("a", **{name: 1})  # type: ignore[arg-type]
    assert app.filters == ()


async def test_a_gap_comes_in_the_messages_place(url: str) -> None:
    app, got = App(), list[Any]()
    blocked, release = asyncio.Event(), asyncio.Event()

    @app.on("a", gaps=True, buffer=1, overflow="drop_newest")
    async def handle(message: Message[int] | Gap) -> None:
        got.append(message)
        blocked.set()
        await release.wait()

    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        for number in range(4):
            await running.bus().publish("a", number)
            await blocked.wait()
        release.set()
        await eventually(lambda: any(isinstance(each, Gap) for each in got))
    gap = next(each for each in got if isinstance(each, Gap))
    assert gap.lost == 2


# --- what handlers cannot get -----------------------------------------------------------


def refused(function: Any, filter: str = "lab/{device}/{rest:path}", **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        App().on(filter, **options)(function)
    return str(caught.value)


def test_a_parameter_that_nothing_fits_is_refused_at_once() -> None:
    async def handle(message: Message[int], devise: str) -> None: ...

    text = refused(handle)
    assert "'devise'" in text
    assert "'test_a_parameter" not in text
    assert "handler handle" in text
    assert "captures: device, rest" in text


def test_a_payload_type_needs_the_name_payload() -> None:
    async def handle(reading: Reading) -> None: ...

    assert "nothing fits parameter 'reading'" in refused(handle, "a")


def test_the_kind_of_bus_must_fit_the_kind_of_function() -> None:
    async def on_loop(bus: SyncBus) -> None: ...

    def in_thread(bus: Bus) -> None: ...

    assert "async and gets a Bus" in refused(on_loop)
    assert "plain, so it runs in a thread and gets a SyncBus" in refused(in_thread)


def test_contradicting_payload_types_are_refused() -> None:
    async def handle(message: Message[int], payload: str) -> None: ...

    assert "different types" in refused(handle)


def test_a_capture_cannot_be_any_class() -> None:
    async def handle(device: App) -> None: ...

    assert "text cannot be converted" in refused(handle)


def test_gaps_have_no_captures_and_no_payload() -> None:
    async def handle(message: Message[int] | Gap, device: str) -> None: ...

    assert "no captures" in refused(handle, gaps=True)


def test_a_generator_is_no_handler() -> None:
    async def handle() -> Any:
        yield 1

    assert "handler handle yields" in refused(handle)


def test_bad_filters_and_forgotten_parentheses_are_refused() -> None:
    app = App()
    with pytest.raises(InvalidFilter):
        app.on("a/#/b")
    with pytest.raises(TypeError, match="takes a topic filter"):

        @app.on  # type: ignore[arg-type]  # that is the test
        async def handle() -> None: ...


async def test_a_name_that_is_defined_later_is_found_at_the_start(url: str) -> None:
    app, got = App(), list[Any]()

    async def handle(message: Message[LaterType]) -> None:  # type: ignore[name-defined] # noqa: F821 - defined below
        got.append(message.payload)

    app.on("a")(handle)
    handle.__globals__["LaterType"] = int
    try:
        await feed(app, url, ("a", b"5"), until=lambda: got)
    finally:
        del handle.__globals__["LaterType"]
    assert got == [5]


async def test_a_name_that_never_comes_is_an_error_at_the_start(url: str) -> None:
    app = App()

    @app.on("a")
    async def handle(message: Message[NeverDefined]) -> None: ...  # type: ignore[name-defined] # noqa: F821 - that is the test

    with pytest.raises(ConfigError, match="NeverDefined"):
        await app.serve({"main": url})


async def test_types_local_to_a_function_are_found(url: str) -> None:
    @dataclasses.dataclass
    class Local:
        n: int

    app, got = App(), list[Any]()

    @app.on("a")
    async def handle(message: Message[Local]) -> None:
        got.append(message.payload)

    await feed(app, url, ("a", b'{"n":1}'), until=lambda: got)
    assert got == [Local(1)]


async def test_a_type_the_codec_cannot_make_is_an_error_at_the_start(url: str) -> None:
    app = App()

    @app.on("a")
    async def handle(message: Message[threading.Thread]) -> None: ...

    with pytest.raises(BadOption, match="cannot decode"):
        await app.serve({"main": url})


# --- several buses ----------------------------------------------------------------------


async def test_handlers_can_belong_to_several_buses(url: str) -> None:
    app, got = App(), list[Any]()

    @app.on("up/{name}", bus="edge")
    async def up(message: Message[bytes], name: str, bus: Bus, cloud: Bus) -> None:
        assert bus is app.bus("edge")
        await cloud.publish(f"site7/{name}", message.raw)

    @app.on("site7/#", bus="cloud")
    async def down(message: Message[bytes]) -> None:
        got.append(message.topic)

    buses = {"edge": url, "cloud": url + "-cloud"}
    async with asyncio.timeout(WITHIN), app.running(buses) as running:
        assert set(running.buses) == {"edge", "cloud"}
        await running.bus("edge").publish("up/a", b"")
        await eventually(lambda: got)
    assert got == ["site7/a"]


async def test_only_named_buses_are_opened_from_the_configuration(tmp_path: Path, url: str) -> None:
    file = tmp_path / "pubsub.toml"
    file.write_text(
        f'[bus.main]\nurl = "{url}"\n[bus.other]\nurl = "{url}-o"\n'
        '[bus.broken]\nurl = "mqtt://127.0.0.1:1"\n'
    )
    config = Config.load(file, environ={})
    app = App()
    app.on("a")(_nothing)
    async with asyncio.timeout(WITHIN), app.running(config=config) as running:
        assert list(running.buses) == ["main"]
    async with asyncio.timeout(WITHIN), app.running(["other"], config=config) as running:
        assert set(running.buses) == {"main", "other"}
        with pytest.raises(ConfigError, match="no bus 'broken'; it has: main, other"):
            running.bus("broken")


async def _nothing() -> None: ...


async def test_a_bus_is_at_hand_only_while_it_runs(url: str) -> None:
    app = App()
    with pytest.raises(ConfigError, match="only while the application runs"):
        app.bus()
    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        assert app.bus() is running.bus()
    with pytest.raises(ConfigError):
        app.bus()
    with pytest.raises(BusClosed):
        await running.bus().publish("a", b"")


async def test_the_same_application_runs_on_a_real_broker(
    mosquitto: MosquittoServer, unique: Callable[[str], str]
) -> None:
    app, got = App(strict=True), list[Any]()
    prefix = unique("app")

    @app.on(prefix + "/{device}/temp")
    async def watch(message: Message[Reading], device: str, bus: Bus) -> None:
        await bus.publish(f"{prefix}/alerts/{device}", f"{message.payload.celsius:g}")

    @app.on(prefix + "/alerts/{device}")
    def alert(payload: str, device: str, bus: SyncBus) -> None:
        got.append((payload, device))
        if len(got) == 1:
            bus.publish(f"{prefix}/fridge/temp", Reading(3.0))

    async with asyncio.timeout(WITHIN), app.running({"main": mosquitto.url}) as running:
        await running.bus().publish(f"{prefix}/oven/temp", Reading(99.5))
        await eventually(lambda: len(got) == 2)
    assert got == [("99.5", "oven"), ("3", "fridge")]
    assert running.code == 0


# --- middleware and hooks ---------------------------------------------------------------


async def test_middleware_of_the_application_is_on_every_bus(url: str) -> None:
    app, steps, got = App(), list[str](), list[Any]()

    @app.middleware
    async def stamp(context: Context, call_next: CallNext) -> Any:
        steps.append(f"{context.direction} {context.topic}")
        if context.direction is Direction.PUBLISH:
            context.headers["site"] = "7"
        return await call_next(context)

    async def only_edge(context: Context, call_next: CallNext) -> Any:
        steps.append(f"edge {context.topic}")
        return await call_next(context)

    app.use(only_edge, bus="edge")

    @app.on("a")
    async def main(message: Message[bytes]) -> None:
        got.append(message.headers["site"])

    async with (
        asyncio.timeout(WITHIN),
        app.running({"main": url, "edge": url + "-edge"}) as running,
    ):
        await running.bus().publish("a", b"")
        await running.bus("edge").publish("b", b"")
        await eventually(lambda: got)
    assert got == ["7"]
    assert sorted(steps) == ["edge b", "publish a", "publish b", "receive a"]


def test_middleware_must_be_async() -> None:
    with pytest.raises(ConfigError, match="no async function"):
        App().middleware(lambda context, call_next: call_next(context))


async def test_retried_failures_are_no_failures_of_the_application(url: str) -> None:
    app, calls = App(strict=True), list[int]()
    app.use(Retry(3, backoff=0.001))

    @app.on("a")
    async def handle(message: Message[bytes]) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise ValueError("not yet")

    await feed(app, url, ("a", b""), until=lambda: len(calls) == 3)


async def test_hooks_run_around_the_handlers_with_open_buses(url: str) -> None:
    app, steps = App(), list[str]()
    release = asyncio.Event()

    @app.on_start
    async def first(bus: Bus) -> None:
        await bus.publish("hello", b"x", retain=True)
        steps.append("start")

    @app.on_start
    def second(bus: SyncBus) -> None:
        assert bus.last("hello") is not None
        steps.append("start in a thread")

    @app.on("a")
    async def handle(message: Message[bytes]) -> None:
        steps.append("begin")
        await release.wait()
        steps.append("end")

    @app.on_stop
    async def last(main: Bus) -> None:
        await main.publish("bye", b"")
        steps.append("stop, declared first")

    @app.on_stop
    async def before_last() -> None:
        steps.append("stop, declared last")

    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        await running.bus().publish("a", b"")
        await eventually(lambda: "begin" in steps)
        asyncio.get_running_loop().call_soon(release.set)
    assert steps == [
        "start",
        "start in a thread",
        "begin",
        "end",
        "stop, declared last",
        "stop, declared first",
    ]
    assert running.code == 0


def slow_to_subscribe(bus: Bus, filter: str, go_on: Callable[[], object]) -> list[bool]:
    """Let the broker confirm *filter* only when *go_on* is true, or much else has run.

    The list gets which of the two it was.
    """
    backend: Any = bus._engine.backend
    plain = backend.subscribe
    went_on: list[bool] = []

    async def subscribe(want: Any) -> int:
        if want.filter == filter:
            for _ in range(1000):
                if go_on():
                    break
                await asyncio.sleep(0)
            went_on.append(bool(go_on()))
        granted: int = await plain(want)
        return granted

    backend.subscribe = subscribe
    return went_on


async def test_what_a_handler_publishes_at_once_finds_the_others_subscribed(url: str) -> None:
    app, got = App(), list[bytes]()

    @app.on_start
    async def prepare(bus: Bus) -> None:
        slow_to_subscribe(bus, "answers", lambda: False)
        await bus.publish("questions", b"?", retain=True)

    @app.on("questions")
    async def answer(message: Message[bytes], bus: Bus) -> None:
        await bus.publish("answers", b"!")

    @app.on("answers")
    async def take(payload: bytes) -> None:
        got.append(payload)

    await feed(app, url, until=lambda: got == [b"!"])


@pytest.mark.parametrize("overflow", ["block", "drop_oldest"])
@pytest.mark.parametrize("retained", [True, False])
async def test_a_handler_with_a_full_buffer_waits_for_no_other(
    url: str, overflow: Any, retained: bool
) -> None:
    app, got, flowed = App(), list[bytes](), list[list[bool]]()

    async def flood(bus: Bus) -> None:
        for number in range(3):
            await bus.publish(f"flood/{number}", b"%d" % number, retain=retained)

    @app.on_start
    async def prepare(bus: Bus) -> None:
        flooding: list[asyncio.Task[None]] = []

        def go_on() -> bool:
            if not flooding and not retained:
                flooding.append(asyncio.create_task(flood(bus)))
            return bool(got)

        # As at a broker that is not read while a buffer holds it back.
        flowed.append(slow_to_subscribe(bus, "other", go_on))
        if retained:
            await flood(bus)

    @app.on("flood/+", buffer=2, overflow=overflow)
    async def take(payload: bytes) -> None:
        got.append(payload)

    @app.on("other")
    async def other(payload: bytes) -> None: ...

    kept = [b"0", b"1", b"2"] if overflow == "block" else [b"1", b"2"]
    await feed(app, url, until=lambda: got == kept)
    assert flowed == [[True]]


async def test_a_start_hook_that_raises_closes_everything(url: str) -> None:
    app, buses = App(), list[Bus]()

    @app.on_start
    async def fail(bus: Bus) -> None:
        buses.append(bus)
        raise RuntimeError("no database")

    with pytest.raises(RuntimeError, match="no database"):
        await app.serve({"main": url})
    assert buses[0].status is Status.CLOSED


async def test_a_stop_hook_that_raises_or_hangs_does_not_stop_the_stopping(url: str) -> None:
    app, steps = App(), list[str]()

    @app.on_stop
    async def fine() -> None:
        steps.append("fine")

    @app.on_stop
    async def failing() -> None:
        raise RuntimeError("oops")

    @app.on_stop
    async def hanging() -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(WITHIN), app.running({"main": url}, drain=0.05) as running:
        pass
    assert steps == ["fine"]
    assert running.code == 1


async def test_a_hook_cannot_take_anything(url: str) -> None:
    app = App()

    @app.on_start
    async def hook(message: Message[bytes]) -> None: ...

    with pytest.raises(ConfigError, match="parameter 'message' of hook hook"):
        await app.serve({"main": url})


# --- failing ----------------------------------------------------------------------------


async def test_a_raising_handler_is_noted_and_the_next_message_comes(url: str) -> None:
    app, got = App(), list[int]()

    @app.on("a")
    async def handle(payload: int) -> None:
        if payload == 1:
            raise ValueError("one")
        got.append(payload)

    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        await running.bus().publish("a", 1)
        await running.bus().publish("a", 2)
        await eventually(lambda: got)
    assert got == [2]
    assert [repr(error.__cause__) for error in running.errors] == ["ValueError('one')"]
    assert running.code == 0


@pytest.mark.parametrize("plain", [False, True])
async def test_strict_applications_stop_with_the_handlers_error(url: str, plain: bool) -> None:
    app = App(strict=True)

    async def handle(message: Message[bytes]) -> None:
        raise ValueError("one")

    def handle_plainly(message: Message[bytes]) -> None:
        raise ValueError("one")

    app.on("a")(handle_plainly if plain else handle)

    @app.on_start
    async def publish(bus: Bus) -> None:
        await bus.publish("a", b"x", retain=True)

    async with asyncio.timeout(WITHIN):
        with pytest.raises(HandlerFailed) as caught:
            await app.serve({"main": url})
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.filter == "a"


async def test_a_bus_that_cannot_be_opened_closes_the_others(url: str) -> None:
    app, seen = App(), list[Running]()
    app.on("a")(_nothing)
    app.on("a", bus="edge")(_nothing)
    async with asyncio.timeout(WITHIN):
        with pytest.raises(ConnectError):
            async with app.running({"main": url, "edge": "mqtt://127.0.0.1:1"}) as running:
                seen.append(running)
    assert seen == []
    with pytest.raises(ConfigError, match="only while"):
        app.bus()


async def test_an_unknown_bus_is_a_configuration_error(tmp_path: Path) -> None:
    file = tmp_path / "pubsub.toml"
    file.write_text('[bus.main]\nurl = "memory://"\n')
    app = App()
    app.on("a", bus="mian")(_nothing)
    with pytest.raises(ConfigError, match="mian"):
        await app.serve(config=Config.load(file, environ={}))


async def test_a_bus_that_the_program_closes_ends_the_application(url: str) -> None:
    app = App()

    @app.on("stop")
    async def stop(bus: Bus) -> None:
        await bus.close()

    @app.on_start
    async def begin(bus: Bus) -> None:
        await bus.publish("stop", b"now", retain=True)

    async with asyncio.timeout(WITHIN):
        assert await app.serve({"main": url}) == 0


async def test_an_application_runs_once_at_a_time(url: str) -> None:
    app = App()
    async with asyncio.timeout(WITHIN), app.running({"main": url}):
        with pytest.raises(ConfigError, match="runs already"):
            await app.serve({"main": url})
        assert app.bus().status is Status.ONLINE
    async with asyncio.timeout(WITHIN), app.running({"main": url}):
        pass


async def test_run_inside_a_loop_names_the_call_that_works() -> None:
    with pytest.raises(WrongLoop, match=r"await app\.serve\(\)"):
        App().run()


# --- stopping ---------------------------------------------------------------------------


async def test_what_has_arrived_is_handled_before_the_end(url: str) -> None:
    app, got = App(), list[int]()

    @app.on("n")
    async def handle(payload: int) -> None:
        await asyncio.sleep(0)
        got.append(payload)

    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        for number in range(200):
            await running.bus().publish("n", number)
    assert got == list(range(200))
    assert running.code == 0


async def test_a_drain_is_bounded_and_says_that_it_was_cut_short(url: str) -> None:
    app, begun = App(), asyncio.Event()

    @app.on("n")
    async def handle(payload: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    watch = Stopwatch()
    async with asyncio.timeout(WITHIN), app.running({"main": url}, drain=0.1) as running:
        await running.bus().publish("n", 1)
        await begun.wait()
    assert running.code == 1
    assert watch.seconds < 5


@pytest.mark.parametrize("plain", [False, True])
async def test_a_handler_may_stop_the_application(url: str, plain: bool) -> None:
    app = App()

    async def stop(message: Message[bytes]) -> None:
        app.stop()

    def stop_plainly(message: Message[bytes]) -> None:
        app.stop()

    app.on("stop")(stop_plainly if plain else stop)

    @app.on_start
    async def begin(bus: Bus) -> None:
        await bus.publish("stop", b"now", retain=True)

    async with asyncio.timeout(WITHIN):
        assert await app.serve({"main": url}) == 0


async def test_a_cancelled_service_drains_first(url: str) -> None:
    app, got, go_on = App(), list[str](), asyncio.Event()

    @app.on("n")
    async def handle(message: Message[bytes]) -> None:
        got.append("begin")
        await go_on.wait()
        got.append("end")

    async with asyncio.timeout(WITHIN):
        task = asyncio.create_task(app.serve({"main": url}))
        await eventually(lambda: app._declared.running is not None and _online(app))
        running = app._declared.running
        assert running is not None
        await app.bus().publish("n", b"")
        await eventually(lambda: got)
        task.cancel()
        await eventually(lambda: running._finished)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert got == ["begin", "end"]


def _online(app: App) -> bool:
    try:
        return app.bus().stats is not None and bool(app._declared.running._subscriptions)  # type: ignore[union-attr]  # it runs
    except PubSubError:
        return False


async def test_a_second_cancellation_stops_at_once(url: str) -> None:
    app, begun = App(), asyncio.Event()

    @app.on("n")
    async def handle(message: Message[bytes]) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(WITHIN):
        task = asyncio.create_task(app.serve({"main": url}, drain=3600))
        await eventually(lambda: app._declared.running is not None and _online(app))
        bus = app.bus()
        await bus.publish("n", b"")
        await begun.wait()
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bus.status is Status.CLOSED


async def test_an_application_starts_offline_with_wait_false(url: str, tmp_path: Path) -> None:
    app, got = App(), list[bytes]()
    arrived = asyncio.Event()

    @app.on("a")
    async def take(payload: bytes) -> None:
        got.append(payload)
        arrived.set()

    space = Space.named(url.removeprefix("memory://"))
    space.refuse(True)
    toml = tmp_path / "pubsub.toml"
    toml.write_text(f'[bus.main]\nurl = "{url}"\nwait = false\nreconnect_max = 0.05\n')
    config = Config.load(toml)
    async with asyncio.timeout(WITHIN), app.running(config=config) as running:
        assert running.bus().status is not Status.ONLINE
        space.refuse(False)
        async with connect(url) as other:
            # The handler is subscribed some time after its bus is back.
            while not arrived.is_set():
                await other.publish("a", b"x")
                await asyncio.sleep(0)
    assert got
    assert running.code == 0
    Space.forget(url.removeprefix("memory://"))


async def test_what_a_slow_handler_cannot_take_is_counted_logged_and_told(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, handled = App(), list[int]()
    busy, go_on = asyncio.Event(), asyncio.Event()

    @app.on("a")
    async def slow(payload: int) -> None:
        handled.append(payload)
        busy.set()
        await go_on.wait()

    async with asyncio.timeout(WITHIN), app.running({"main": url}) as running:
        bus = running.bus()
        async with bus.events() as events:
            await bus.publish("a", 0)
            await busy.wait()
            for number in range(1, 5000):
                await bus.publish("a", number)
            go_on.set()
            told = await anext(each async for each in events if isinstance(each, Notice))
    assert len(handled) + bus.stats.overflowed == 5000
    assert bus.stats.overflowed == 5000 - 1 - bus.options.buffer
    assert told.kind == "overflow"
    assert str(bus.stats.overflowed) in told.text
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == [told.text]


async def test_stopping_while_connecting_is_a_clean_end() -> None:
    app = App()
    app.on("a")(_nothing)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        app.stop()  # somebody wants a session, and is never answered
        await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(WITHIN), server:
        assert await app.serve({"main": f"mqtt://127.0.0.1:{port}"}) == 0


# --- as a program -----------------------------------------------------------------------


def run_program(text: str, *signals: signal.Signals) -> tuple[int, str, str]:
    """Run a program with an `app`; after each line ``ready`` send the next signal."""
    program = (
        SLOW_STEPS_UNTOLD + "import asyncio, sys, time\n"
        "from pubsub_core.app import App\n"
        "from pubsub_core.bus import Bus\n"
        "from pubsub_core.message import Message\n"
        "app = App()\n"
        "@app.on_start\n"
        "async def begin(bus: Bus):\n"
        "    await bus.publish('start', b'x', retain=True)\n"
        + textwrap.dedent(text)
        + "\ncode = app.run({'main': 'memory://'}, drain=DRAIN)\n"
        "print('code', code)\n"
        "sys.exit(code)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        assert process.stdout is not None
        for each in signals:
            line = process.stdout.readline()
            lines.append(line)
            assert line.startswith("ready"), process.stderr.read() if process.stderr else ""
            process.send_signal(each)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    return process.returncode, "".join(lines) + out, err


DRAINING = """
    DRAIN = 10
    @app.on("start")
    async def handle(message: Message[bytes]):
        print("ready", flush=True)
        while not app._declared.running._stopping.is_set():
            await asyncio.sleep(0.005)
        print("handled", flush=True)
    @app.on_stop
    async def bye():
        print("bye", flush=True)
"""

STUCK = """
    DRAIN = 3600
    @app.on("start")
    async def handle(message: Message[bytes]):
        print("ready", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("given up", flush=True)
    @app.on("start")
    def handle_plainly(message: Message[bytes]):
        time.sleep(60)
    import threading
    def tell():
        while not app._declared.running._stopping.is_set():
            time.sleep(0.01)
        print("ready again", flush=True)
    threading.Thread(target=lambda: (time.sleep(0.2), tell()), daemon=True).start()
"""


@pytest.mark.parametrize("each", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains(each: signal.Signals) -> None:
    code, out, err = run_program(DRAINING, each)
    assert (code, out) == (0, "ready\nhandled\nbye\ncode 0\n"), err
    assert err == ""


def test_the_second_signal_stops_at_once() -> None:
    watch = Stopwatch()
    code, out, err = run_program(STUCK, signal.SIGINT, signal.SIGTERM)
    assert (code, out) == (1, "ready\nready again\ngiven up\ncode 1\n"), err
    assert "Traceback" not in err
    assert watch.seconds < 15


def test_signal_handlers_are_restored() -> None:
    code, out, err = run_program(
        """
        DRAIN = 1
        import signal
        before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        @app.on("start")
        async def handle(message: Message[bytes]):
            app.stop()
        assert app.run({"main": "memory://"}) == 0
        assert before == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        """
    )
    assert (code, out) == (0, "code 0\n"), err


def test_an_application_can_run_in_a_thread_without_signals() -> None:
    code, out, err = run_program(
        """
        DRAIN = 1
        import threading
        @app.on("start")
        async def handle(message: Message[bytes]):
            app.stop()
        codes = []
        thread = threading.Thread(target=lambda: codes.append(app.run({"main": "memory://"})))
        thread.start()
        thread.join(10)
        print(codes)
        """
    )
    assert (code, out) == (0, "[0]\ncode 0\n"), err
