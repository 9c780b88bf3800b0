"""The synchronous facade, middleware, counters, errors: cases 145 to 153."""

from __future__ import annotations

import asyncio
import inspect
import sys
from typing import Any

from pubsub_core import sync
from pubsub_core.bus import Bus
from pubsub_core.capabilities import Cap
from pubsub_core.errors import HandlerFailed, NotConnected, PubSubError, WrongLoop
from pubsub_core.message import Message
from pubsub_core.middleware import CallNext, Context, Direction, Retry
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.recorder import Recorder
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial

__all__: list[str] = []


@case(145)
async def sync_facade_signature_parity(t: Trial) -> None:
    """A bus and its synchronous twin have the same methods."""
    facade = inspect.signature(sync.connect)
    assert next(iter(facade.parameters)) == "where"
    twin = sync.SyncBus
    names = ("publish", "subscribe", "history", "last", "clear", "members", "authorize", "entitle")
    for name in (*names, "close", "ping"):
        assert callable(getattr(twin, name)), name
        ours = inspect.signature(getattr(Bus, name)).parameters
        theirs = inspect.signature(getattr(twin, name)).parameters
        missing = set(ours) - set(theirs) - {"handler"}
        assert not missing, f"{name} lacks {missing}"


@case(146)
async def sync_facade_roundtrip_and_threads(t: Trial) -> None:
    """The synchronous facade works, from several threads at once."""
    url, options = t.url(), t.options()

    def use() -> list[bytes]:
        import threading  # noqa: PLC0415

        with sync.connect(url, **options) as bus, bus.subscribe(t.topic()) as subscription:

            def publish(number: int) -> None:
                for index in range(5):
                    bus.publish(t.topic(), b"%d %d" % (number, index))

            threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(t.deadline)
            return [subscription.get(timeout=t.deadline).payload for _ in range(20)]

    got = await t.within(asyncio.to_thread(use), 20)
    assert sorted(got) == sorted(b"%d %d" % (n, index) for n in range(4) for index in range(5))


@case(147)
async def sync_inside_loop_refused(t: Trial) -> None:
    """The synchronous facade does not block a running event loop."""
    with t.raises(WrongLoop) as caught, sync.connect(t.url(), **t.options()):
        pass
    assert "await" in str(caught[0]) or "async" in str(caught[0])


@case(148)
async def middleware_order_and_short_circuit_both_directions(t: Trial) -> None:
    """The first middleware is the outermost both ways; one that does not go on, stops."""
    bus = await t.connect()
    trace: list[str] = []

    def layer(name: str) -> Any:
        async def around(context: Context, call_next: CallNext) -> Any:
            trace.append(f"{name} in {context.direction.value}")
            result = await call_next(context)
            trace.append(f"{name} out {context.direction.value}")
            return result

        return around

    async def gate(context: Context, call_next: CallNext) -> Any:
        if context.direction is Direction.RECEIVE and context.payload == b"drop":
            return None
        if context.direction is Direction.PUBLISH and context.payload == b"stop":
            raise NotConnected("stopped by the middleware", hint="do not publish that")
        if context.direction is Direction.PUBLISH and context.payload == b"change":
            context.payload = b"changed"
        return await call_next(context)

    bus.use(layer("outer"), layer("inner"), gate)
    handled: list[bytes] = []

    async def handler(message: Message[bytes]) -> None:
        trace.append("handler")
        handled.append(message.payload)

    await t.subscribed(bus, t.topic(), handler=handler)
    await t.within(bus.publish(t.topic(), b"x"))
    await t.eventually(lambda: len(trace) == 9, "the way through and back")
    publishing = [entry for entry in trace if entry.endswith("publish")]
    receiving = [entry for entry in trace if not entry.endswith("publish")]
    assert publishing == [
        "outer in publish",
        "inner in publish",
        "inner out publish",
        "outer out publish",
    ]
    assert receiving == [
        "outer in receive",
        "inner in receive",
        "handler",
        "inner out receive",
        "outer out receive",
    ]
    with t.raises(NotConnected):
        await t.within(bus.publish(t.topic(), b"stop"))
    iterated = await t.subscribed(bus, t.topic())
    for payload in (b"drop", b"change"):
        await t.within(bus.publish(t.topic(), payload))
    await t.eventually(lambda: handled == [b"x", b"changed"], "what passed the gate")
    assert (await t.get(iterated)).payload == b"changed"


@case(149)
@needs(Cap.HEADERS)
async def trace_context_crosses_when_headers_or_envelope(t: Trial) -> None:
    """A trace context that middleware puts into the headers is there on the other side."""
    sender, receiver = await t.connect(), await t.connect()
    context_id = f"00-{t.random.getrandbits(128):032x}-{t.random.getrandbits(64):016x}-01"
    seen: list[str] = []

    async def inject(context: Context, call_next: CallNext) -> Any:
        if context.direction is Direction.PUBLISH:
            context.headers["traceparent"] = context_id
        return await call_next(context)

    async def extract(context: Context, call_next: CallNext) -> Any:
        if context.direction is Direction.RECEIVE:
            seen.append(context.headers["traceparent"])
        return await call_next(context)

    sender.use(inject)
    receiver.use(extract)
    subscription = await t.subscribed(receiver, t.topic())
    await t.within(sender.publish(t.topic(), b"x", headers={"own": "kept"}))
    message = await t.get(subscription)
    assert seen == [context_id]
    assert message.headers["traceparent"] == context_id
    assert message.headers["own"] == "kept"


@case(150)
async def metrics_match_counts(t: Trial) -> None:
    """The counters agree with the events."""
    bus = await t.connect()
    bus.use(Retry(2, backoff=0.0))
    calls = 0

    async def handler(message: Message[bytes]) -> None:
        nonlocal calls
        calls += 1
        if message.payload == b"bad":
            raise RuntimeError("no")

    handling = await t.subscribed(bus, t.topic(), handler=handler)
    small = await t.subscribed(bus, t.topic("small"), buffer=2)
    for payload in (b"1", b"bad", b"2"):
        await t.within(bus.publish(t.topic(), payload))
    for number in range(5):
        await t.within(bus.publish(t.topic("small"), b"%d" % number))
    with t.raises(PubSubError):
        await t.within(bus.publish("a/+", b"x"))
    await t.eventually(lambda: calls == 4, "two handled, one tried twice")
    await t.eventually(lambda: small.stats.received == 5, "five messages")
    await t.eventually(lambda: handling.stats.delivered == 2, "two delivered")
    assert bus.stats.published == 8
    assert bus.stats.received == 8
    assert bus.stats.handler_failures == 1
    assert bus.stats.sessions == 1
    assert bus.stats.gaps == 0
    assert handling.stats.received == 3
    assert handling.stats.failed == 1
    assert small.stats.dropped == 3
    assert small.stats.buffered == 2


@case(152)
@needs(Need.NATIVE_ERRORS)
async def every_native_error_classified(t: Trial) -> None:
    """Each refusal that a server can send becomes the right error, with its cause."""
    for native in t.harness.native_errors:
        async with t.silent_server(native.reply) as port:
            with t.raises(PubSubError) as caught:
                await t.connect(port=port, connect_timeout=2.0, **native.options)
        error = caught[0]
        assert type(error) is not PubSubError, f"{native.name} was not classified"
        assert isinstance(error, native.error), f"{native.name} became {error!r}"
        if native.retryable is not None:
            assert error.retryable is native.retryable, f"{native.name}: {error.retryable}"
        assert error.backend == t.info.name, f"{native.name}: no backend in {error!r}"


@case(153, fast=False, alone=True)
async def cli_pub_sub_caps_doctor_smoke(t: Trial) -> None:
    """The command line reaches the broker."""
    for command in (["caps", t.url()], ["pub", t.url(), t.topic(), "x"]):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pubsub_core.cli",
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await t.within(process.communicate(), 30)
        assert process.returncode == 0, f"{command}: {out!r} {err!r}"


@case(151)
async def errors_carry_code_hint_backend(t: Trial) -> None:
    """Every error that the suite has met is complete."""
    bus = await t.connect()
    recorder = Recorder(bus)
    assert recorder.attempts == 0
    with t.raises(PubSubError):
        await t.within(bus.publish("", b"x"))
    codes: dict[str, type[PubSubError]] = {}
    for error in t.ledger.errors.values():
        kind = type(error)
        assert kind is not PubSubError, f"unclassified: {error!r}"
        assert error.code, f"no code: {error!r}"
        assert error.code != PubSubError.code, f"no code of its own: {error!r}"
        codes.setdefault(error.code, kind)
        assert str(error), f"no text: {error!r}"
        assert len(str(error)) < 2000, f"too long: {error!r}"
        assert error.retryable in (True, False, None)
        if not isinstance(error, HandlerFailed):
            told = error.hint or "; " in str(error)
            assert told, f"no remedy: {kind.__name__}: {error}"
    assert codes
