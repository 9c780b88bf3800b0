"""Who may see what: authorizers of a bus and of an application, on a real distributor."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import (
    App,
    AuthorizationRequest,
    Authorizer,
    Bus,
    BusClosed,
    ConfigError,
    HandlerFailed,
    InvalidFilter,
    NotSupported,
    Part,
    Status,
    connect,
    sync,
)
from pubsub_core._runtime import questions
from pubsub_core.events import Notice
from pubsub_core.testing import FaultProxy
from pubsub_core.testing.servers import ServerThread
from pubsub_messagebus import BasicAuthenticator, CallbackClient
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.roles import FeedPolicy, Policy, Role, RoleChange
from pubsub_mqtt.server import MosquittoServer
from tests.servers import eventually

PASSWORDS = Path(__file__).parent / "data" / "messagebus_passwords.json"
PARTS = [
    Part(b"one", entitlements=frozenset({1})),
    Part(b"two", entitlements=frozenset({2})),
    Part(b"both", entitlements=frozenset({1, 2})),
]


def make_server() -> MessageBusServer:
    """Return a distributor whose feed AUTH needs authorization, which only tester may give."""
    policy = Policy(
        feeds={
            "AUTH": FeedPolicy(
                is_authorized=True,
                change=RoleChange(deny=Role.AUTHORIZE),
                users={("*", "tester"): RoleChange(allow=Role.AUTHORIZE)},
            )
        }
    )
    return MessageBusServer(password_file=str(PASSWORDS), policy=policy)


@pytest.fixture
async def server() -> AsyncIterator[MessageBusServer]:
    async with make_server() as running:
        yield running


def bus_of(port: int, user: str = "guest", **options: Any) -> Bus:
    return connect(f"messagebus://{user}:right@127.0.0.1:{port}", **options)


@asynccontextmanager
async def notices(bus: Bus) -> AsyncIterator[list[tuple[str, str]]]:
    """Collect the notices of *bus*, as kind and topic."""
    found: list[tuple[str, str]] = []
    async with bus.events() as events:

        async def listen() -> None:
            async for event in events:
                if isinstance(event, Notice):
                    found.append((event.kind, event.topic))  # noqa: PERF401 - one by one

        task = asyncio.create_task(listen())
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.wait([task])


async def parts_of(subscription: Any) -> list[bytes]:
    return [part.data for part in (await subscription.get(5)).parts]


async def test_a_subscriber_gets_the_parts_it_is_entitled_to(server: MessageBusServer) -> None:
    asked: list[AuthorizationRequest] = []

    async def entitle(request: AuthorizationRequest) -> set[int] | None:
        asked.append(request)
        return {"guest": {1}, "tester": {1, 2}}.get(request.user)

    async with (
        bus_of(server.port, "tester") as warden,
        bus_of(server.port) as guest,
        warden.authorize("AUTH/#", entitle) as authorizer,
    ):
        async with guest.subscribe("AUTH/T") as some, warden.subscribe("AUTH/T") as all_of_them:
            await eventually(lambda: authorizer.stats.granted == 2)
            await warden.publish("AUTH/T", parts=PARTS)
            assert await parts_of(some) == [b"one"]
            assert await parts_of(all_of_them) == [b"one", b"two", b"both"]
        assert {(request.user, request.topic) for request in asked} == {
            ("guest", "AUTH/T"),
            ("tester", "AUTH/T"),
        }
        assert asked[0].member.host
        assert authorizer.filter == "AUTH/#"
        stats = authorizer.stats
        assert (stats.asked, stats.refused, stats.failed, stats.dropped) == (2, 0, 0, 0)


async def test_rights_change_while_the_subscription_goes_on(server: MessageBusServer) -> None:
    asked: list[AuthorizationRequest] = []

    def entitle(request: AuthorizationRequest) -> list[int]:
        assert threading.current_thread() is not threading.main_thread()
        asked.append(request)
        return [1]

    async with (
        bus_of(server.port, "tester") as warden,
        bus_of(server.port) as guest,
        warden.authorize("AUTH/T", entitle) as authorizer,
        notices(guest) as told,
        guest.subscribe("AUTH/T") as messages,
    ):
        await eventually(lambda: authorizer.stats.granted)
        for held, seen in (({1, 2}, [b"one", b"two", b"both"]), ([2], [b"two"])):
            await warden.entitle(asked[0], held)
            await warden.publish("AUTH/T", parts=PARTS)
            assert await parts_of(messages) == seen
        await warden.entitle(asked[0], None)
        await eventually(lambda: told == [("not_entitled", "AUTH/T")])
        assert not server.broker.subscribers("AUTH", "T")
        with pytest.raises(TypeError, match="set of int"):
            await warden.entitle(asked[0], "12")  # type: ignore[arg-type]  # what is under test
        with pytest.raises(ValueError, match="entitlement"):
            await warden.entitle(asked[0], {2**40})


async def raises(request: AuthorizationRequest) -> set[int]:
    raise LookupError("canary")


def raises_plainly(request: AuthorizationRequest) -> set[int]:
    raise LookupError("canary")


async def hangs(request: AuthorizationRequest) -> set[int]:
    await asyncio.sleep(3600)
    return {1, 2}


async def grants_too_late(request: AuthorizationRequest) -> set[int]:
    # What is under test: it goes on although it was told to end.
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(3600)
    return {1, 2}


async def cancels(request: AuthorizationRequest) -> set[int]:
    raise asyncio.CancelledError


async def says_yes(request: AuthorizationRequest) -> Any:
    return True


async def too_large(request: AuthorizationRequest) -> set[int]:
    return {1, 2**40}


@pytest.mark.parametrize(
    "handler",
    [raises, raises_plainly, hangs, grants_too_late, cancels, says_yes, too_large],
)
async def test_a_handler_that_fails_is_answered_with_a_refusal(
    server: MessageBusServer, handler: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with bus_of(server.port, "tester") as warden, bus_of(server.port) as guest:
        failures: list[HandlerFailed] = []
        warden.on_handler_failure(failures.append)
        patience = 0.05 if handler in (hangs, grants_too_late) else 20.0
        async with (
            warden.authorize("AUTH/#", handler, timeout=patience) as authorizer,
            notices(warden) as events,
            notices(guest) as told,
            guest.subscribe("AUTH/T") as messages,
        ):
            await eventually(lambda: told == [("not_entitled", "AUTH/T")])
            await eventually(lambda: authorizer.stats.refused == 1)
            await warden.publish("AUTH/T", parts=PARTS)
            await guest.ping()
            assert messages.stats.received == 0
            assert not server.broker.subscribers("AUTH", "T")
            assert authorizer.stats.failed == 1
            assert authorizer.stats.granted == 0
            assert ("authorization_failed", "AUTH/T") in events
            assert [(failure.topic, failure.filter) for failure in failures] == [
                ("AUTH/T", "AUTH/#")
            ]
            assert failures[0].__cause__ is not None
            assert warden.stats.handler_failures == 1
    assert "deciding who may see 'AUTH/T' failed" in caplog.text


async def test_one_slow_answer_holds_up_no_other(server: MessageBusServer) -> None:
    release = asyncio.Event()

    async def entitle(request: AuthorizationRequest) -> set[int]:
        if request.topic == "AUTH/slow":
            await release.wait()
        return {1}

    async with (
        bus_of(server.port, "tester") as warden,
        bus_of(server.port) as guest,
        warden.authorize("AUTH/#", entitle),
        guest.subscribe("AUTH/slow"),
        guest.subscribe("AUTH/quick"),
    ):
        await eventually(lambda: server.broker.subscribers("AUTH", "quick"))
        assert not server.broker.subscribers("AUTH", "slow")
        release.set()
        await eventually(lambda: server.broker.subscribers("AUTH", "slow"))


async def test_who_waited_before_the_authorizer_came_is_asked_about(
    server: MessageBusServer,
) -> None:
    async def entitle(request: AuthorizationRequest) -> set[int]:
        return {1}

    async with bus_of(server.port) as guest, guest.subscribe("AUTH/T") as messages:
        # The distributor asks a client as soon as that is connected; nobody is there yet.
        async with bus_of(server.port, "tester") as warden:
            await warden.ping()
            async with warden.authorize("AUTH/other", entitle) as other:
                await warden.ping()
                assert other.stats.asked == 0
                async with warden.authorize("AUTH/T", entitle) as authorizer:
                    await eventually(lambda: authorizer.stats.granted == 1)
                    await warden.publish("AUTH/T", parts=PARTS)
                    assert await parts_of(messages) == [b"one"]


async def test_after_a_reconnect_it_answers_again(server: MessageBusServer) -> None:
    async def entitle(request: AuthorizationRequest) -> set[int]:
        return {1}

    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        async with (
            bus_of(proxy.port, "tester", reconnect_first=0.01) as warden,
            bus_of(server.port) as guest,
            warden.authorize("AUTH/#", entitle) as authorizer,
        ):
            proxy.refuse(True)
            await proxy.cut()
            await warden.wait_for(Status.RECONNECTING, timeout=5)
            async with guest.subscribe("AUTH/T") as messages:
                await guest.publish("AUTH/T", parts=PARTS)  # nobody may see that
                await guest.ping()
                assert messages.stats.received == 0
                proxy.refuse(False)
                await eventually(lambda: authorizer.stats.granted == 1)
                await guest.publish("AUTH/T", parts=PARTS[1:] + PARTS[:1])
                assert await parts_of(messages) == [b"one"]
                assert messages.stats.received == 1
    finally:
        await proxy.stop()


async def test_the_first_that_matches_answers_and_a_closed_one_does_not(
    server: MessageBusServer,
) -> None:
    async def one(request: AuthorizationRequest) -> set[int]:
        return {1}

    async def two(request: AuthorizationRequest) -> set[int]:
        return {2}

    async with (
        bus_of(server.port, "tester") as warden,
        bus_of(server.port) as guest,
        warden.authorize("AUTH/{name}", two) as second,
    ):
        first = await warden.authorize("AUTH/#", one)
        async with guest.subscribe("AUTH/T") as messages:
            await eventually(lambda: second.stats.granted == 1)
            await warden.publish("AUTH/T", parts=PARTS)
            assert await parts_of(messages) == [b"two"]
        async with guest.subscribe("AUTH/deep/er") as messages:
            await eventually(lambda: first.stats.granted == 1)
        await first.close()
        await first.close()
        async with guest.subscribe("AUTH/deep/er/still") as messages:
            await warden.ping()
            await guest.publish("AUTH/deep/er/still", parts=PARTS)
            await guest.ping()
            assert messages.stats.received == 0
        assert (first.stats.asked, second.stats.asked) == (1, 1)


async def test_names_that_are_no_topics_harm_nobody(server: MessageBusServer) -> None:
    """Another client may ask for any text, and topics are literal on this bus."""

    async def entitle(request: AuthorizationRequest) -> set[int] | None:
        return {1} if request.topic == "AUTH/fine" else None

    hostile = ["a/#/b", "#", "+", "a+b", "\0", "", "/", "{x}", "a\nb"]
    guest = await CallbackClient.create(
        "127.0.0.1", server.port, authenticator=BasicAuthenticator("guest", "right")
    )
    async with (
        guest,
        bus_of(server.port, "tester") as warden,
        warden.authorize("AUTH/#", entitle) as authorizer,
        warden.notifications("OTHER/#") as interest,
        notices(warden) as events,
    ):
        for name in hostile:
            await guest.add_subscription("AUTH", name)
            await guest.add_subscription("OTHER", name)
        await guest.add_subscription("AUTH", "fine")
        await eventually(lambda: authorizer.stats.granted == 1)
        await eventually(lambda: authorizer.stats.refused == len(hostile))
        await eventually(lambda: len(interest.interest) == len(hostile))
        assert authorizer.stats.failed == 0
        assert warden.stats.sessions == 1
        assert events == []


async def test_the_last_answer_is_to_the_last_question(server: MessageBusServer) -> None:
    """Questions about one client and topic are answered in their order, one at a time."""
    running: list[int] = []
    most: list[int] = []
    answers = iter([{1}, {2}])
    release = asyncio.Event()

    async def entitle(request: AuthorizationRequest) -> set[int]:
        running.append(1)
        most.append(len(running))
        await release.wait()
        running.pop()
        return next(answers)

    async with (
        bus_of(server.port, "tester") as warden,
        bus_of(server.port) as guest,
        warden.authorize("AUTH/#", entitle) as authorizer,
    ):
        first = await guest.subscribe("AUTH/T")
        await eventually(lambda: authorizer.stats.asked == 1)
        await first.close()
        async with guest.subscribe("AUTH/T") as messages:
            await eventually(lambda: authorizer.stats.asked == 2)
            release.set()
            await eventually(lambda: authorizer.stats.granted == 2)
            await warden.publish("AUTH/T", parts=PARTS)
            assert await parts_of(messages) == [b"two"]
    assert most == [1, 1]


async def test_what_waits_is_bounded_and_what_is_dropped_stays_closed(
    server: MessageBusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_AT_ONCE", 1)
    monkeypatch.setattr(questions, "_MOST_WAITING", 3)
    release = asyncio.Event()

    async def entitle(request: AuthorizationRequest) -> set[int]:
        await release.wait()
        return {1}

    async with (
        bus_of(server.port, "tester") as warden,
        bus_of(server.port) as guest,
        warden.authorize("AUTH/#", entitle) as authorizer,
        notices(warden) as events,
        AsyncExitStack() as stack,
    ):

        def was_asked(times: int) -> bool:
            return authorizer.stats.asked == times

        for number in range(6):
            await stack.enter_async_context(guest.subscribe(f"AUTH/{number}"))
            # One is being answered before the others come.
            await eventually(functools.partial(was_asked, number + 1))
        assert authorizer.stats.dropped == 2
        assert events == [("authorization_dropped", f"AUTH/{number}") for number in (4, 5)]
        release.set()
        await eventually(lambda: authorizer.stats.granted == 4)
        allowed = [bool(server.broker.subscribers("AUTH", str(number))) for number in range(6)]
        assert allowed == [True] * 4 + [False] * 2


async def test_closing_ends_handlers_and_what_waits(server: MessageBusServer) -> None:
    ended: list[str] = []

    async def entitle(request: AuthorizationRequest) -> set[int]:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(request.topic)
        return {1}

    async with bus_of(server.port) as guest:
        warden = await bus_of(server.port, "tester")
        authorizer = await warden.authorize("AUTH/#", entitle)
        async with guest.subscribe("AUTH/T"):
            await eventually(lambda: authorizer.stats.asked == 1)
            async with asyncio.timeout(5):
                await warden.close()
            assert ended == ["AUTH/T"]
            assert not server.broker.subscribers("AUTH", "T")
        with pytest.raises(BusClosed):
            warden.authorize("AUTH/#", entitle)


async def test_an_authorizer_may_be_closed_by_its_own_handler(server: MessageBusServer) -> None:
    made: list[Authorizer] = []

    async def entitle(request: AuthorizationRequest) -> set[int]:
        await made[0].close()
        return {1}

    async with bus_of(server.port, "tester") as warden, bus_of(server.port) as guest:
        made.append(await warden.authorize("AUTH/#", entitle))
        async with guest.subscribe("AUTH/T"):
            await eventually(lambda: server.broker.subscribers("AUTH", "T"))
            assert made[0].stats.granted == 1


async def test_what_cannot_be_an_authorizer_is_refused(
    server: MessageBusServer, mosquitto: MosquittoServer
) -> None:
    async with bus_of(server.port) as bus:
        with pytest.raises(InvalidFilter):
            bus.authorize("a/#/b", raises)
        with pytest.raises(TypeError, match="handler"):
            bus.authorize("a/#", {1})  # type: ignore[arg-type]  # what is under test
        with pytest.raises(ValueError, match="timeout"):
            bus.authorize("a/#", raises, timeout=0)
    async with connect(mosquitto.url) as other:
        with pytest.raises(NotSupported, match="authorization") as caught:
            other.authorize("a/#", raises)
        assert caught.value.alternatives == ("memory", "messagebus")
        with pytest.raises(NotSupported, match="authorization"):
            await other.entitle(AuthorizationRequest(None, "a"), {1})  # type: ignore[arg-type]


# --- an application ----------------------------------------------------------------------------


async def test_an_application_authorizes(server: MessageBusServer) -> None:
    app = App()
    seen: list[Any] = []

    @app.authorizer("AUTH/{ticker}/{level}")
    async def entitle(
        ticker: str, request: AuthorizationRequest, level: int, bus: Bus
    ) -> set[int] | None:
        seen.append((ticker, level, request.user, bus.name))
        return {level} if ticker == "VOD" else None

    @app.authorizer("AUTH/plain")
    def plain(request, other: str = "kept"):  # type: ignore[no-untyped-def]  # by name alone
        seen.append((request.topic, other))
        return {2}

    @app.on("AUTH/plain")
    async def own(message: Any = None) -> None: ...

    assert app.filters == (("main", "AUTH/plain"),)
    url = f"messagebus://tester:right@127.0.0.1:{server.port}"
    async with app.running({"main": url}) as running, bus_of(server.port) as guest:
        async with (
            guest.subscribe("AUTH/VOD/2") as messages,
            guest.subscribe("AUTH/plain"),
            guest.subscribe("AUTH/VOD/x"),
        ):
            await eventually(lambda: server.broker.subscribers("AUTH", "VOD/2"))
            await eventually(lambda: len(server.broker.subscribers("AUTH", "plain")) == 2)
            await running.bus().publish("AUTH/VOD/2", parts=PARTS)
            assert await parts_of(messages) == [b"two"]
            # A capture that cannot be converted is a failure as any other.
            await eventually(lambda: len(running.errors) == 1)
            assert running.errors[0].topic == "AUTH/VOD/x"
            assert not server.broker.subscribers("AUTH", "VOD/x")
    assert ("VOD", 2, "guest", running.buses["main"].name) in seen
    assert ("AUTH/plain", "kept") in seen


async def test_a_strict_application_stops_at_a_failed_authorizer(server: MessageBusServer) -> None:
    app = App(strict=True)
    app.authorizer("AUTH/#", timeout=0.05)(hangs)
    url = f"messagebus://tester:right@127.0.0.1:{server.port}"

    async def run() -> None:
        async with app.running({"main": url}) as running, bus_of(server.port) as guest:
            async with guest.subscribe("AUTH/T"), asyncio.timeout(20):
                await running.wait()

    with pytest.raises(HandlerFailed) as caught:
        await run()
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_an_application_does_not_start_where_nobody_is_asked(
    mosquitto: MosquittoServer,
) -> None:
    app = App()
    app.authorizer("a/#")(raises)
    with pytest.raises(NotSupported, match="authorization"):
        await app.serve({"main": mosquitto.url})


def test_mistakes_in_a_declaration_are_told_at_once() -> None:
    app = App()
    with pytest.raises(TypeError, match="topic filter"):
        app.authorizer(raises)  # type: ignore[arg-type]  # what is under test
    with pytest.raises(InvalidFilter):
        app.authorizer("a/#/b")

    async def misspelt(reqest: AuthorizationRequest, tikcer: str) -> None: ...

    with pytest.raises(ConfigError, match="'tikcer' of authorizer misspelt") as caught:
        app.authorizer("a/{ticker}")(misspelt)
    assert "request" in caught.value.hint

    async def wants_a_message(payload: bytes) -> None: ...

    with pytest.raises(ConfigError, match="'payload' of authorizer"):
        app.authorizer("a/{ticker}")(wants_a_message)

    async def yields(request: AuthorizationRequest) -> Any:
        yield {1}

    with pytest.raises(ConfigError, match="authorizer yields"):
        app.authorizer("a/#")(yields)

    async def generous(request: AuthorizationRequest, also: set[int]) -> set[int]:
        return also

    app.authorizer("a/#")(functools.partial(generous, also={1}))


# --- without async -------------------------------------------------------------------------


@contextmanager
def served() -> Iterator[MessageBusServer]:
    running = make_server()
    thread = ServerThread(running)
    thread.start()
    try:
        yield running
    finally:
        thread.stop()


def test_the_same_without_async() -> None:
    asked: list[AuthorizationRequest] = []

    def entitle(request: AuthorizationRequest) -> set[int]:
        asked.append(request)
        return {1}

    with served() as server:
        url = "messagebus://{}:right@127.0.0.1:" + str(server.port)
        with (
            sync.connect(url.format("tester")) as warden,
            sync.connect(url.format("guest")) as guest,
            warden.authorize("AUTH/#", entitle, timeout=5) as authorizer,
            guest.subscribe("AUTH/T") as messages,
        ):
            warden.call(eventually, lambda: authorizer.stats.granted)
            warden.publish("AUTH/T", parts=PARTS)
            assert [part.data for part in messages.get(timeout=5).parts] == [b"one"]
            warden.entitle(asked[0], {2})
            warden.publish("AUTH/T", parts=PARTS)
            assert [part.data for part in messages.get(timeout=5).parts] == [b"two"]
            assert (authorizer.filter, authorizer.timeout) == ("AUTH/#", 5)
