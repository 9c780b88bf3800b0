"""What the contract cannot ask: feeds, images, balanced interest, entitlements, notices."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pubsub_core.bus import Bus, connect
from pubsub_core.capabilities import Cap
from pubsub_core.errors import (
    AuthenticationFailed,
    BadOption,
    InvalidFilter,
    NotSupported,
    PublishFailed,
)
from pubsub_core.events import Notice
from pubsub_core.interfaces import EVERYTHING, AuthorizationRequest
from pubsub_core.message import Origin, Part
from pubsub_messagebus import CallbackClient
from pubsub_messagebus.backend import MessageBusBackend
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.roles import FeedPolicy, Policy, Role, RoleChange
from tests.messagebus.vectors import PASSWORDS
from tests.servers import eventually


@pytest.fixture
async def server() -> AsyncIterator[MessageBusServer]:
    feeds = {
        "AUTH": FeedPolicy(
            is_authorized=True,
            change=RoleChange(deny=Role.AUTHORIZE),
            users={("*", "tester"): RoleChange(allow=Role.AUTHORIZE)},
        )
    }
    policy = Policy(feeds=feeds)
    async with MessageBusServer(password_file=str(PASSWORDS), policy=policy) as running:
        yield running


def bus_of(server: MessageBusServer, user: str = "guest", **options: Any) -> Bus:
    return connect(f"messagebus://{user}:right@127.0.0.1:{server.port}", **options)


async def within(work: Any, seconds: float = 5) -> Any:
    async with asyncio.timeout(seconds):
        return await work


async def test_topics_are_feeds_and_topics(server: MessageBusServer) -> None:
    client = await CallbackClient.create("127.0.0.1", server.port)
    await client.aclose()
    async with bus_of(server) as bus, bus_of(server, feeds=("NYSE/L2",)) as deep:
        async with bus_of(server, feed="ONE") as one:
            async with (
                bus.subscribe("LSE/VOD/bid"),
                bus.subscribe("LSE"),
                deep.subscribe("NYSE/L2/IBM"),
                deep.subscribe("NYSE/L2"),
                one.subscribe("a/b"),
            ):
                for feed, topic in (
                    ("LSE", "VOD/bid"),
                    ("LSE", ""),
                    ("NYSE/L2", "IBM"),
                    ("NYSE/L2", ""),
                    ("ONE", "a/b"),
                ):
                    assert len(server.broker.subscribers(feed, topic)) == 1
                # Each mapping leads back.
                for holder, topic in (
                    (bus, "LSE/VOD/bid"),
                    (bus, "LSE"),
                    (deep, "NYSE/L2/IBM"),
                    (deep, "NYSE/L2"),
                    (one, "a/b"),
                ):
                    native = holder.native(MessageBusBackend)
                    assert native.topic_of(*native.pair(topic)) == topic


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"feed": "F", "feeds": ("A",)}, "feeds"),
        ({"feeds": ("A//B",)}, "feeds"),
        ({"keepalive": -1}, "keepalive"),
        ({"everyone": 2**40}, "everyone"),
        ({"username": "a;b", "password": "x"}, "handshake"),
    ],
)
async def test_bad_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises(BadOption) as caught:
        await connect("messagebus://127.0.0.1:1", **options)
    assert name in caught.value.option


async def test_select_feed_an_image_reaches_the_newcomer_alone(server: MessageBusServer) -> None:
    async with bus_of(server) as publisher, bus_of(server) as first, bus_of(server) as second:
        async with publisher.notifications("LSE/#") as interest:
            async with first.subscribe("LSE/VOD") as one:
                event = await interest.get(5)
                while not event.joined:
                    event = await interest.get(5)
                assert event.topic == "LSE/VOD"
                assert event.member is not None
                await publisher.send_to(event.member, event.topic, b"image")
                image = await one.get(5)
                assert (image.payload, image.origin) == (b"image", Origin.IMAGE)
                await publisher.publish("LSE/VOD", b"delta")
                delta = await one.get(5)
                assert (delta.payload, delta.origin) == (b"delta", Origin.LIVE)
                async with second.subscribe("LSE/VOD") as two:
                    event = await interest.get(5)
                    assert event.member is not None
                    await publisher.send_to(event.member, event.topic, b"image 2")
                    assert (await two.get(5)).payload == b"image 2"
                    await first.ping()
                    assert one.stats.received == 2
            left = [await interest.get(5) for _ in range(2)]
            assert all(event.left for event in left)
            assert not interest.interest


async def test_a_publisher_has_a_name_and_a_host(server: MessageBusServer) -> None:
    async with bus_of(server, "tester") as one, bus_of(server, "guest") as two:
        async with two.subscribe("F/T") as messages:
            sources = []
            for bus in (one, two):
                await bus.publish("F/T", b"x")
                sources.append((await messages.get(5)).source)
        assert sources[0] is not None
        assert sources[1] is not None
        assert (sources[0].name, sources[1].name) == ("tester", "guest")
        assert sources[0].host == sources[1].host
        assert sources[0].id != sources[1].id


async def test_a_watch_over_all_feeds_is_refused(server: MessageBusServer) -> None:
    async with bus_of(server) as bus:
        with pytest.raises(InvalidFilter, match="one at a time"):
            async with bus.notifications("#"):
                pass
        with pytest.raises(NotSupported, match="notifications"):
            await bus.subscribe("LSE/#")
        with pytest.raises(PublishFailed, match="no member id"):
            await bus.send_to("somebody", "LSE/VOD", b"x")


# --- entitlements ----------------------------------------------------------------------------


async def authorizing(server: MessageBusServer, rights: dict[str, Any]) -> CallbackClient:
    """Return a native client that answers by user name."""
    from pubsub_messagebus import BasicAuthenticator

    client = await CallbackClient.create(
        "127.0.0.1", server.port, authenticator=BasicAuthenticator("tester", "right")
    )

    async def answer(client_id: uuid.UUID, host: str, user: str, feed: str, topic: str) -> None:
        await client.authorize(client_id, feed, topic, True, rights.get(user))

    client.authorization_handlers.append(answer)
    return client


async def test_parts_reach_those_entitled_to_them(server: MessageBusServer) -> None:
    parts = [
        Part(b"for everybody"),
        Part(b"for one", entitlements=frozenset({1})),
        Part(b"for two", entitlements=frozenset({2})),
    ]
    async with await authorizing(server, {"guest": {0, 1}}) as authorizer:
        await within(authorizer.sync())
        async with bus_of(server, everyone=0) as reader, bus_of(server, everyone=0) as publisher:
            async with reader.subscribe("AUTH/T") as messages:
                await eventually(lambda: server.broker.subscribers("AUTH", "T"))
                await publisher.publish("AUTH/T", parts=parts)
                message = await messages.get(5)
                assert list(message.parts) == parts[:2]
                assert message.payload == b"for everybody"
                # It changes while the subscription goes on.
                client_id = reader.native(MessageBusBackend).client_id
                await authorizer.authorize(client_id, "AUTH", "T", True, {0, 2})
                await within(authorizer.sync())
                await publisher.publish("AUTH/T", parts=parts)
                assert list((await messages.get(5)).parts) == [parts[0], parts[2]]
                await publisher.publish("AUTH/T", b"plain")
                assert (await messages.get(5)).payload == b"plain"


async def test_a_stale_publisher_and_a_missing_right_are_told_apart(
    server: MessageBusServer,
) -> None:
    rights: dict[str, Any] = {"guest": {1}}
    async with await authorizing(server, rights) as authorizer:
        await within(authorizer.sync())
        async with bus_of(server) as reader:
            told: list[tuple[str, str]] = []

            def note(event: Notice) -> None:
                told.append((event.kind, event.topic))

            async def listen() -> None:
                async with reader.events() as events:
                    async for event in events:
                        if isinstance(event, Notice):
                            note(event)

            listening = asyncio.create_task(listen())
            await asyncio.sleep(0)
            async with reader.subscribe("AUTH/granted"), reader.subscribe("F/T") as plain:
                await eventually(lambda: server.broker.subscribers("AUTH", "granted"))
                publisher = bus_of(server)
                await publisher.open()
                secret = [Part(b"x", entitlements=frozenset({9}))]
                await publisher.publish("AUTH/granted", parts=secret)
                await eventually(lambda: told == [("not_entitled", "AUTH/granted")])
                await publisher.publish("F/T", b"x")
                await plain.get(5)
                told.clear()
                await publisher.close()
                await eventually(lambda: len(told) == 2)
                assert sorted(told) == [("source_lost", "AUTH/granted"), ("source_lost", "F/T")]
                told.clear()
                rights["guest"] = None
                async with reader.subscribe("AUTH/refused"):
                    await eventually(lambda: told == [("not_entitled", "AUTH/refused")])
                told.clear()
                client_id = reader.native(MessageBusBackend).client_id
                await authorizer.authorize(client_id, "AUTH", "granted", True, None)
                await eventually(lambda: told == [("not_entitled", "AUTH/granted")])
            listening.cancel()
            await asyncio.wait([listening])


async def test_the_native_side_authorizes_too(server: MessageBusServer) -> None:
    async with bus_of(server, "tester") as authorizer, bus_of(server) as reader:
        native = authorizer.native(MessageBusBackend)

        async def answer(client_id: uuid.UUID, host: str, user: str, feed: str, topic: str) -> None:
            native.answer(client_id, feed, topic, True, {1} if user == "guest" else None)

        native.authorization_handlers.append(answer)
        async with reader.subscribe("AUTH/T") as messages:
            await eventually(lambda: server.broker.subscribers("AUTH", "T"))
            await authorizer.publish("AUTH/T", parts=[Part(b"x", entitlements=frozenset({1}))])
            assert (await messages.get(5)).parts == (Part(b"x", frozenset({1})),)


async def test_a_server_may_require_authorization_for_everything() -> None:
    policy = Policy(is_authorization_required=True)
    async with MessageBusServer(policy=policy) as server:
        async with await CallbackClient.create("127.0.0.1", server.port) as client:
            assert await within(client.sync())
        # A bus opens, measures and subscribes through the same fence.
        async with connect(server.url) as warden, connect(server.url, keepalive=0.05) as reader:
            assert await reader.ping() < 5

            async def decide(request: AuthorizationRequest) -> Any:
                return EVERYTHING if request.topic == "F/T" else None

            async with (
                warden.authorize("#", decide) as authorizer,
                reader.subscribe("F/T") as messages,
                reader.subscribe("F/U") as nothing,
            ):
                stats = authorizer.stats
                await eventually(lambda: (stats.granted, stats.refused) == (1, 1))
                assert stats.asked == 2
                parts = [Part(b"open"), Part(b"closed", entitlements=frozenset({1}))]
                await warden.publish("F/U", parts=parts)
                await warden.publish("F/T", parts=parts)
                assert (await messages.get(5)).parts == tuple(parts)
                assert nothing.stats.received == 0


# --- sessions ----------------------------------------------------------------------------------


async def test_wrong_credentials_are_known_at_once(server: MessageBusServer) -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        await connect(f"jetblack://guest:canary@127.0.0.1:{server.port}")
    assert "canary" not in str(caught.value)


async def test_what_the_dialect_has_decides_about_content_types(server: MessageBusServer) -> None:
    async with bus_of(server) as bus:
        assert not bus.supports(Cap.CONTENT_TYPE)
    async with MessageBusServer(dialect="content_type") as modern:
        async with connect(modern.url) as bus:
            assert bus.supports(Cap.CONTENT_TYPE)
            async with bus.subscribe("F/T") as messages:
                await bus.publish("F/T", b"{}", content_type="application/json")
                assert (await messages.get(5)).content_type == "application/json"


async def test_a_closed_bus_leaves_nothing_at_the_server(server: MessageBusServer) -> None:
    async with bus_of(server) as bus:
        async with bus.subscribe("F/T"), bus.notifications("F/#"), bus.presence("F/T"):
            pass
        await bus.ping()
        await bus.ping()
        stats = server.stats()
        # The fences' own feed is listened to until the connection ends.
        assert (stats["subscriptions"], stats["listeners"]) == (0, 1)
    await eventually(lambda: not server.connections)
