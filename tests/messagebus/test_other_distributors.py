"""Our client and backend against a distributor that is looked at from outside only.

The embedded one always; another one where ``PUBSUB_MESSAGEBUS_URL`` names it, e.g. the
original: ``messagebus://user:password@host:9001?handshake=strings&dialect=is_image``. Names of
feeds are new in each run, waits are long, and nothing is expected in which the original
differs. The login needs all roles but that of an authorizer, on every feed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from pubsub_core.bus import connect
from pubsub_core.events import Notice
from pubsub_core.message import Origin
from pubsub_messagebus import BasicAuthenticator, CallbackClient, DataPacket
from pubsub_messagebus.server import MessageBusServer

VARIABLE = "PUBSUB_MESSAGEBUS_URL"
GIVEN = os.environ.get(VARIABLE, "")

WITHIN = 20.0
"""The original needs up to a second for the first message of each connection."""


@pytest.fixture(
    params=[
        "embedded",
        pytest.param(
            "real",
            marks=pytest.mark.skipif(
                not GIVEN, reason=f"{VARIABLE} is not set; only the embedded distributor is asked"
            ),
        ),
    ]
)
async def url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    if request.param == "real":
        yield GIVEN
        return
    async with MessageBusServer() as server:
        yield server.url


@pytest.fixture
def feed() -> str:
    return f"test-{uuid.uuid4()}"


class Peer:
    """A native client, and what it was told."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._query = {name: values[-1] for name, values in parse_qs(self._url.query).items()}
        dialect = self._query.get("dialect", "is_image")
        self.image: Any = True if dialect == "is_image" else "image"
        self.delta: Any = False if dialect == "is_image" else ""
        self.notice: Any = True if dialect == "is_image" else ""
        self.data: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self.interest: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        told, query = self._url, self._query
        options: dict[str, Any] = {"dialect": query.get("dialect", "is_image")}
        if told.username:
            options["authenticator"] = BasicAuthenticator(
                unquote(told.username),
                unquote(told.password or ""),
                handshake=query.get("handshake", "connection-string"),  # type: ignore[arg-type]
            )
        self.client = await CallbackClient.create(
            told.hostname or "localhost", told.port or 9001, connect_timeout=WITHIN, **options
        )

        async def on_data(*arguments: Any) -> None:
            self.data.put_nowait(arguments)

        async def on_interest(*arguments: Any) -> None:
            self.interest.put_nowait(arguments)

        self.client.data_handlers.append(on_data)
        self.client.notification_handlers.append(on_interest)
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def sync(self) -> uuid.UUID:
        async with asyncio.timeout(WITHIN):
            return await self.client.sync()

    async def next_data(self) -> tuple[Any, ...]:
        async with asyncio.timeout(WITHIN):
            return await self.data.get()

    async def next_interest(self) -> tuple[Any, ...]:
        async with asyncio.timeout(WITHIN):
            return await self.interest.get()


# --- the client ----------------------------------------------------------------------------


async def test_data_arrives_in_order_with_its_parts_and_its_sender(url: str, feed: str) -> None:
    async with Peer(url) as subscriber, Peer(url) as publisher:
        await subscriber.client.add_subscription(feed, "T")
        await subscriber.sync()
        packets = [DataPacket({1, -2}, b"one"), DataPacket(None, b"two"), DataPacket(None, None)]
        await publisher.client.publish(feed, "T", publisher.image, packets)
        for number in range(200):
            packet = DataPacket(None, str(number).encode())
            await publisher.client.publish(feed, "T", publisher.delta, [packet])
        user, host, *where, found, flag = await subscriber.next_data()
        assert user
        assert host
        assert where == [feed, "T"]
        assert (found, flag) == (packets, publisher.image)
        for number in range(200):
            assert (await subscriber.next_data())[4] == [DataPacket(None, str(number).encode())]


@pytest.mark.parametrize("size", [0, 1, 1_000_000])
async def test_sizes_and_accents(url: str, feed: str, size: int) -> None:
    async with Peer(url) as subscriber, Peer(url) as publisher:
        topic = "Übung/€/🐍"
        await subscriber.client.add_subscription(feed, topic)
        await subscriber.sync()
        data = bytes(range(256)) * (size // 256) or bytes(size)
        await publisher.client.publish(feed, topic, publisher.delta, [DataPacket(None, data)])
        found = await subscriber.next_data()
        assert found[3] == topic
        assert found[4] == [DataPacket(None, data or None)]


async def test_names_are_compared_and_not_matched(url: str, feed: str) -> None:
    async with Peer(url) as subscriber, Peer(url) as publisher:
        for topic in ("*", ".*", "#", "T", ""):
            await subscriber.client.add_subscription(feed, topic)
        await subscriber.sync()
        for topic in ("other", "T/x", "*", "t", "T", ""):
            await publisher.client.publish(feed, topic, publisher.delta, None)
        topics = [(await subscriber.next_data())[3] for _ in range(3)]
        assert topics == ["*", "T", ""]
        await subscriber.sync()
        await publisher.sync()
        assert subscriber.data.empty()


async def test_an_image_reaches_the_newcomer_alone(url: str, feed: str) -> None:
    async with Peer(url) as publisher, Peer(url) as first, Peer(url) as second:
        await publisher.client.add_notification(feed)
        await publisher.sync()
        for newcomer in (first, second):
            await newcomer.client.add_subscription(feed, "T")
            client_id, _, _, *what = await publisher.next_interest()
            assert what == [feed, "T", True]
            assert client_id == await newcomer.sync()
            image = [DataPacket(None, b"image")]
            await publisher.client.send(client_id, feed, "T", publisher.image, image)
            assert (await newcomer.next_data())[4:] == (image, publisher.image)
        await publisher.client.publish(feed, "T", publisher.delta, [DataPacket(None, b"delta")])
        for each in (first, second):
            assert (await each.next_data())[4] == [DataPacket(None, b"delta")]


async def test_who_was_there_comes_first_and_who_leaves_is_told(url: str, feed: str) -> None:
    async with Peer(url) as early, Peer(url) as listener:
        for topic in ("A", "B"):
            await early.client.add_subscription(feed, topic)
        early_id = await early.sync()
        await listener.client.add_notification(feed)
        found = [await listener.next_interest() for _ in range(2)]
        assert {(each[0], each[4], each[5]) for each in found} == {
            (early_id, "A", True),
            (early_id, "B", True),
        }
        async with Peer(url) as late:
            await late.client.add_subscription(feed, "C")
            late_id, _, _, _, topic, is_add = await listener.next_interest()
            assert (late_id, topic, is_add) == (await late.sync(), "C", True)
        gone = await listener.next_interest()
        assert (gone[0], gone[4], gone[5]) == (late_id, "C", False)


async def test_subscribers_are_told_when_the_last_publisher_leaves(url: str, feed: str) -> None:
    async with Peer(url) as subscriber:
        await subscriber.client.add_subscription(feed, "T")
        await subscriber.sync()
        async with Peer(url) as staying:
            async with Peer(url) as leaving:
                for each in (staying, leaving):
                    await each.client.publish(feed, "T", each.delta, None)
                    await each.sync()
            for _ in range(2):
                assert (await subscriber.next_data())[0]
            await staying.client.publish(feed, "T", staying.delta, [DataPacket(None, b"x")])
            assert (await subscriber.next_data())[4] == [DataPacket(None, b"x")]
        assert await subscriber.next_data() == ("", "", feed, "T", None, subscriber.notice)


# --- the backend ---------------------------------------------------------------------------


async def test_a_bus_publishes_and_subscribes(url: str, feed: str) -> None:
    async with connect(url) as one, connect(url) as two:
        async with one.subscribe(f"{feed}/VOD/bid", str) as messages:
            for number in range(100):
                await two.publish(f"{feed}/VOD/bid", str(number))
            for number in range(100):
                message = await messages.get(WITHIN)
                assert (message.topic, message.payload) == (f"{feed}/VOD/bid", str(number))
        async with asyncio.timeout(WITHIN):
            assert await one.ping() > 0


async def test_a_bus_is_a_select_feed(url: str, feed: str) -> None:
    async with connect(url) as publisher, connect(url) as subscriber:
        async with publisher.notifications(f"{feed}/#") as interest:
            async with subscriber.subscribe(f"{feed}/T") as messages:
                event = await interest.get(WITHIN)
                while not event.joined:
                    event = await interest.get(WITHIN)
                assert event.topic == f"{feed}/T"
                assert event.member is not None
                await publisher.send_to(event.member, f"{feed}/T", b"image")
                await publisher.publish(f"{feed}/T", b"delta")
                image, delta = await messages.get(WITHIN), await messages.get(WITHIN)
                assert (image.payload, delta.payload) == (b"image", b"delta")
                assert delta.origin is Origin.LIVE
                if "dialect=content_type" not in url:  # which cannot say it
                    assert image.origin is Origin.IMAGE
            while event.joined:
                event = await interest.get(WITHIN)
            assert event.left
        async with publisher.presence(f"{feed}/P") as presence:
            async with subscriber.subscribe(f"{feed}/P"):
                async with asyncio.timeout(WITHIN):
                    while presence.count != 1:
                        await anext(aiter(presence))


async def test_a_bus_tells_when_a_listed_subscriber_leaves(url: str, feed: str) -> None:
    async with connect(url) as bus, Peer(url) as early:
        for topic in ("A", "B"):
            await early.client.add_subscription(feed, topic)
        await early.sync()
        async with bus.notifications(f"{feed}/#") as interest:

            async def told(count: int) -> list[tuple[str, str]]:
                seen = [await interest.get(WITHIN) for _ in range(count)]
                return sorted((event.kind.value, event.topic) for event in seen)

            assert await told(3) == [
                ("joined", f"{feed}/A"),
                ("joined", f"{feed}/B"),
                ("synced", f"{feed}/#"),
            ]
            # The original goes on listing it until its connection ends.
            await early.client.remove_subscription(feed, "A")
            assert await told(1) == [("left", f"{feed}/A")]
            await early.client.add_subscription(feed, "A")
            assert await told(1) == [("joined", f"{feed}/A")]
            await early.client.aclose()
            assert await told(2) == [("left", f"{feed}/A"), ("left", f"{feed}/B")]


async def test_a_bus_tells_of_a_publisher_that_left(url: str, feed: str) -> None:
    async with connect(url) as subscriber:
        async with subscriber.events() as events, subscriber.subscribe(f"{feed}/T") as messages:
            async with connect(url) as publisher:
                await publisher.publish(f"{feed}/T", b"x")
                await messages.get(WITHIN)
            async with asyncio.timeout(WITHIN):
                async for event in events:
                    if isinstance(event, Notice):
                        assert (event.kind, event.topic) == ("source_lost", f"{feed}/T")
                        break


# --- the way to another one ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["is_image", "content_type"])
def test_these_tests_find_a_distributor_of_another_process(dialect: str) -> None:
    serve = [sys.executable, "-m", "pubsub_core.cli", "serve", "messagebus", "--json"]
    server = subprocess.Popen(
        [*serve, "--option", f"dialect={dialect}"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert ready["dialect"] == dialect
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-q", "-k", "real", __file__],
            env={**os.environ, VARIABLE: ready["url"]},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert "12 passed" in done.stdout
        assert "skipped" not in done.stdout
    finally:
        server.terminate()
        server.wait(10)
        assert server.stdout is not None
        server.stdout.close()
