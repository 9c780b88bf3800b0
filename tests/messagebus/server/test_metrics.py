"""The metrics endpoint: asked over HTTP, read by prometheus_client's own parser."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_messagebus.protocol import (
    DataPacket,
    basic_handshake,
    encode_authorization_response,
    encode_notification_request,
    encode_unicast,
)
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.counters import MAX_COUNTED_FEEDS, OTHER_FEEDS
from pubsub_messagebus.server.roles import FeedPolicy, Policy
from tests.messagebus.raw import Raw
from tests.messagebus.vectors import PASSWORDS
from tests.servers import LeakCheck, eventually

parser = pytest.importorskip(
    "prometheus_client.parser", reason="prometheus-client is not installed; messagebus-server"
)

NAMES = {
    "reads": "counter",
    "writes": "counter",
    "interactor_faults": "counter",
    "authorization_requests": "counter",
    "authorization_responses": "counter",
    "forwarded_subscriptions": "counter",
    "published_unicast_messages": "counter",
    "published_multicast_messages": "counter",
    "write_queue_length": "gauge",
    "interactors": "gauge",
    "notification_requests": "gauge",
    "subscriptions": "gauge",
    "events_enqueued": "counter",
    "events_dequeued": "counter",
    "events_queue_length": "gauge",
}


@pytest.fixture
async def server() -> AsyncIterator[MessageBusServer]:
    policy = Policy(feeds={"AUTH": FeedPolicy(is_authorized=True)})
    async with MessageBusServer(
        password_file=str(PASSWORDS), policy=policy, metrics_port=0
    ) as running:
        yield running


async def get(url: str) -> str:
    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(fetch)


async def scrape(server: MessageBusServer) -> dict[str, Any]:
    """Return the families, by name, as the library's parser reads them."""
    families = parser.text_string_to_metric_families(await get(server.metrics_url))
    return {family.name: family for family in families}


def values(family: Any, **labels: str) -> list[float]:
    return [
        sample.value
        for sample in family.samples
        if all(sample.labels[name] == value for name, value in labels.items())
    ]


async def test_names_types_and_labels_are_the_originals(server: MessageBusServer) -> None:
    text = await get(server.metrics_url)
    for name, kind in NAMES.items():
        assert f"# TYPE messagebus_{name} {kind}\n" in text
        assert f"# HELP messagebus_{name} " in text
    assert "_total" not in text
    assert set(await scrape(server)) == {f"messagebus_{name}" for name in NAMES}


async def test_every_number_is_counted_for_its_connection(server: MessageBusServer) -> None:
    host = socket.gethostname()
    async with Raw(server.port) as subscriber, Raw(server.port) as publisher:
        subscriber.send(basic_handshake("guest", "right"))
        publisher.send(
            basic_handshake("tester", "right", application="feed", form="connection-string"),
            encode_notification_request("F", True),
        )
        subscriber.add("F", "A")
        subscriber.add("F", "B")
        subscriber.add("AUTH", "T")
        asked = [await publisher.next() for _ in range(3)]
        client_id = next(message.client_id for message in asked)
        publisher.send(encode_authorization_response(client_id, "AUTH", "T", True, {1}))
        for _ in range(3):
            publisher.publish("F", "A", [DataPacket(None, b"x")])
        publisher.send(encode_unicast(client_id, "F", "B", True, None))
        await subscriber.take(5)  # a subscriber with all roles is asked as well
        found = await scrape(server)

        def of(name: str, **labels: str) -> list[float]:
            return values(found[f"messagebus_{name}"], **labels)

        pub = {"user": "tester", "host": host, "application": "feed"}
        sub = {"user": "guest", "host": host, "application": "unspecified", "id": str(client_id)}
        assert of("interactors", **pub) == of("interactors", **sub) == [1]
        assert of("reads", **sub) == [3]
        assert of("reads", **pub) == [6]
        assert of("writes", **sub) == [5]
        assert of("writes", **pub) == [3]
        assert of("authorization_requests", **pub) == [1]
        assert of("authorization_responses", **pub) == [1]
        assert of("forwarded_subscriptions", feed="F", **pub) == [2]
        assert of("published_multicast_messages", feed="F", **pub) == [3]
        assert of("published_unicast_messages", feed="F", **pub) == [1]
        assert of("notification_requests", feed="F", **pub) == [1]
        assert of("subscriptions", feed="F", **sub) == [2]
        assert of("subscriptions", feed="AUTH", **sub) == [1]
        assert of("write_queue_length", **sub) == [0]
        assert of("events_dequeued") == of("events_enqueued") == [11]
        assert of("events_queue_length") == [0]
        stats = server.stats()
        assert stats["received"] == sum(of("reads"))
        assert stats["frames_written"] == sum(of("writes"))
        assert stats["events_enqueued"] == 11


async def test_sums_do_not_fall_when_connections_end(server: MessageBusServer) -> None:
    async with Raw(server.port) as staying:
        staying.send(basic_handshake("guest", "right"))
        await staying.fence()
        async with Raw(server.port) as leaving:
            leaving.send(basic_handshake("tester", "right"))
            await leaving.fence()
            leaving.publish("F", "T")
            leaving.send(b"\xff")
            await leaving.closed()
        await eventually(lambda: server.stats()["clients"] == 1)
        found = await scrape(server)
        gone = {"host": "", "user": "", "id": "", "application": ""}
        assert values(found["messagebus_reads"], **gone) == [5]
        assert values(found["messagebus_writes"], **gone) == [2]
        assert values(found["messagebus_published_multicast_messages"], feed="F", **gone) == [1]
        assert values(found["messagebus_interactor_faults"], user="tester", id="") == [1]
        assert [s.labels["user"] for s in found["messagebus_interactors"].samples] == ["guest"]
        assert server.stats()["interactor_faults"] == 1


async def test_a_client_cannot_make_series_without_end(server: MessageBusServer) -> None:
    async with Raw(server.port) as client:
        client.send(basic_handshake("guest", "right"))
        # A name that is too long to be kept is among the others, and they are one of the series.
        for number in ["x" * 1000, *range(MAX_COUNTED_FEEDS + 49)]:
            client.publish(f'quoted "{number}"\n\\', "T")
            client.add(f"F{number}", "T")
        await client.fence()
        found = await scrape(server)
        counted = found["messagebus_published_multicast_messages"]
        assert len(counted.samples) == MAX_COUNTED_FEEDS
        assert max(len(sample.labels["feed"]) for sample in counted.samples) < 100
        assert values(counted, feed=OTHER_FEEDS) == [51]
        assert values(counted, feed='quoted "7"\n\\') == [1]
        assert sum(values(found["messagebus_subscriptions"])) == MAX_COUNTED_FEEDS + 50
        assert len(found["messagebus_subscriptions"].samples) == MAX_COUNTED_FEEDS


async def test_other_requests_are_refused(
    server: MessageBusServer, caplog: pytest.LogCaptureFixture
) -> None:
    base = server.metrics_url.removesuffix("/metrics")
    port = int(base.rpartition(":")[2])
    for path, method, status in (("/", "GET", 404), ("/metrics", "POST", 405)):
        request = urllib.request.Request(base + path, method=method)

        def fetch(request: urllib.request.Request = request) -> None:
            urllib.request.urlopen(request, timeout=5).close()

        with pytest.raises(urllib.error.HTTPError) as caught:
            await asyncio.to_thread(fetch)
        assert caught.value.code == status
        caught.value.close()

    def head() -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("HEAD", "/metrics")
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read()
        finally:
            connection.close()

    assert await asyncio.to_thread(head) == b""
    for wire in (b"\x00\xff\r\n\r\n", b"GET /" + b"x" * 100_000):
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(wire)
            with contextlib.suppress(ConnectionResetError):  # more came than was read
                assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()
    await get(server.metrics_url)
    assert "asyncio" not in {record.name for record in caplog.records}


async def test_it_ends_with_its_server_and_keeps_its_port() -> None:
    leaks = LeakCheck()
    server = MessageBusServer(metrics_port=0)
    await server.start()
    url = server.metrics_url
    assert server.describe()["metrics"] == url
    assert url.startswith("http://127.0.0.1:")
    async with asyncio.timeout(5):
        port = int(url.removesuffix("/metrics").rpartition(":")[2])
        _, waiting = await asyncio.open_connection("127.0.0.1", port)
    await server.restart()
    assert server.metrics_url == url
    await get(url)
    await server.stop()
    waiting.close()
    await leaks.check()
    assert MessageBusServer().metrics_url == ""


async def test_the_configuration_of_the_original(tmp_path: Path) -> None:
    path = tmp_path / "appsettings.json"
    path.write_text('{"distributor": {"prometheus": {"isEnabled": true, "port": 0}}}')
    async with MessageBusServer(config=str(path)) as server:
        assert await get(server.metrics_url)
    path.write_text('{"distributor": {"prometheus": {"isEnabled": false, "port": 0}}}')
    assert MessageBusServer(config=str(path)).metrics_url == ""
