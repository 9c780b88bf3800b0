"""Core mode on a real server: refusals, limits, loss, echo, groups and what has no topic."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import Cap, connect
from pubsub_core.errors import (
    InvalidFilter,
    InvalidTopic,
    LimitReached,
    NotConnected,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
    SubscribeNotAuthorized,
)
from pubsub_core.events import Notice, Status
from pubsub_core.message import Receipt
from pubsub_core.testing.proxy import FaultProxy
from pubsub_nats.server import NatsServer
from tests.servers import eventually, run

from .fake import INFO, fake, pong
from .world import USERS, Raw, backend, settled

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "data" / "nats_vectors.json").read_text()
)
SOON: dict[str, Any] = {"reconnect_first": 0.01, "reconnect_max": 0.1}


@pytest.fixture(scope="module")
def guarded() -> Iterator[NatsServer]:
    started = NatsServer(config=USERS)
    run(started.start())
    yield started
    run(started.stop())


# --- matching --------------------------------------------------------------------------------


async def test_the_server_matches_as_the_core_does_and_never_twice(server: NatsServer) -> None:
    raw = await Raw.connect(server.port)
    async with connect(server.url) as bus:
        for vector in VECTORS["match"]:
            if vector["filter"].startswith("$"):
                with pytest.raises(InvalidFilter):
                    await bus.subscribe(vector["filter"]).__aenter__()
                continue
            async with bus.subscribe(vector["filter"]) as messages:
                # Not through a bus, which refuses the topics that begin with "$".
                await raw.publish(vector["subject"].encode())
                await bus.ping()
                expected = vector["core_delivers"] and not vector["topic"].startswith("$")
                assert messages.stats.received == int(expected), vector
    raw.close()


async def test_reserved_traffic_is_never_a_message(server: NatsServer) -> None:
    raw = await Raw.connect(server.port)
    async with connect(server.url) as bus, bus.subscribe("#") as messages:
        notices = _notices(bus)
        for vector in VECTORS["subjects_without_topic"]:
            subject = vector.get("subject")
            if subject is not None and subject[0] in "$_":
                await raw.publish(subject.encode())
        await bus.ping()
        assert messages.stats.received == 0
        assert backend(bus).unmapped > 5
        assert not notices, "the server's own traffic is no news"
        await raw.publish(b"a/b")
        await raw.publish(b"a.\xff")
        await raw.publish(b"a\x0bb", b"vt")
        assert (await messages.get(timeout=5)).topic == "a\x0bb"
        assert messages.stats.received == 1
        await eventually(lambda: len(notices) == 1)
        assert "a/b" in notices[0].text
    raw.close()


def _notices(bus: Any) -> list[Notice]:
    found: list[Notice] = []
    stream = bus.events()

    async def collect() -> None:
        async for event in stream:
            if isinstance(event, Notice):
                found.append(event)  # noqa: PERF401 - it grows one by one

    task = asyncio.ensure_future(collect())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return found


@pytest.mark.parametrize("topic", ["a b", "a/*", ">", "$JS/API/STREAM/DELETE/x", "_INBOX/x"])
async def test_impossible_topics_never_leave(server: NatsServer, topic: str) -> None:
    async with connect(server.url) as bus:
        with pytest.raises(InvalidTopic):
            await bus.publish(topic, b"x")
        with pytest.raises(InvalidFilter):
            await bus.subscribe(topic).__aenter__()
        await bus.publish("a", b"x")


async def test_a_prefix_is_a_namespace(server: NatsServer) -> None:
    async with connect(server.url, prefix="app/x") as bus, connect(server.url) as plain:
        async with bus.subscribe("#") as inside, plain.subscribe("app/x/a/b") as outside:
            await bus.publish("a/b", b"1")
            assert (await outside.get(timeout=5)).payload == b"1"
            await plain.publish("app/x/c", b"2")
            await plain.publish("app/y/c", b"3")
            got = [await inside.get(timeout=5) for _ in range(2)]
            assert [m.topic for m in got] == ["a/b", "c"]
            await plain.ping()
            await bus.ping()
            assert inside.stats.received == 2


# --- refusals --------------------------------------------------------------------------------


async def test_refusals_hit_their_own_operation(guarded: NatsServer) -> None:
    url = guarded.url.replace("//", "//some:some@")
    async with connect(url) as bus:
        async with bus.subscribe("a/#") as messages:
            topics = ["a/x", "no/Abc", "a/X", "a/x", 'no/q"q\\', "a/y"]
            results = await settled(*(bus.publish(topic, b"1") for topic in topics))
            assert [isinstance(each, Receipt) for each in results] == [
                True, False, False, True, False, True,
            ]  # fmt: skip
            for topic, error in zip(topics, results, strict=True):
                if isinstance(error, Exception):
                    assert isinstance(error, PublishNotAuthorized)
                    assert error.topic == topic
                    assert error.outcome is Outcome.REJECTED
            assert [(await messages.get(timeout=5)).topic for _ in range(3)] == [
                "a/x", "a/x", "a/y",
            ]  # fmt: skip
        wanted = [bus.subscribe(wanted) for wanted in ("b", "no/#", "c")]
        found = await settled(*(each.__aenter__() for each in wanted))
        assert isinstance(found[1], SubscribeNotAuthorized)
        assert found[1].topic == "no/#"
        with pytest.raises(SubscribeNotAuthorized, match="workers"):
            await bus.subscribe("q/x", group="workers").__aenter__()
        async with bus.subscribe("q/x") as plain:
            await bus.publish("q/x", b"1")
            await plain.get(timeout=5)
        await bus.publish("b", b"2")
        assert (await wanted[0].get(timeout=5)).payload == b"2"
        for each in wanted:
            await each.close()
        assert bus.stats.sessions == 1


async def test_too_many_subscriptions() -> None:
    async with NatsServer(config="max_subscriptions: 3", jetstream=False) as server:
        async with connect(server.url) as bus:
            wanted = [bus.subscribe(f"n/{n}") for n in range(5)]
            found = await settled(*(each.__aenter__() for each in wanted))
            assert [isinstance(each, LimitReached) for each in found] == [False] * 3 + [True] * 2
            await wanted[0].close()
            async with bus.subscribe("other") as messages:
                await bus.publish("other", b"x")
                await messages.get(timeout=5)
            for each in wanted[1:3]:
                await each.close()


# --- limits ----------------------------------------------------------------------------------


async def test_headers_count_for_the_limit() -> None:
    async with NatsServer(config="max_payload: 2000", jetstream=False) as server:
        async with connect(server.url) as bus, bus.subscribe("a") as messages:
            assert bus.limits.max_payload == 2000
            size = 2000 - len(b"NATS/1.0\r\nk: v\r\n\r\n")
            await bus.publish("a", bytes(size), headers={"k": "v"})
            assert len((await messages.get(timeout=5)).payload) == size
            await bus.publish("a", bytes(2000))
            assert len((await messages.get(timeout=5)).payload) == 2000
            with pytest.raises(PayloadTooLarge) as caught:
                await bus.publish("a", bytes(size + 1), headers={"k": "v"})
            assert (caught.value.size, caught.value.limit) == (2001, 2000)
            await bus.publish("a", b"alive")
            assert (await messages.get(timeout=5)).payload == b"alive"
            assert bus.stats.sessions == 1


async def test_a_limit_that_is_lowered_counts_at_once() -> None:
    async with fake(INFO, pong) as server, connect(f"nats://127.0.0.1:{server.port}") as bus:
        await bus.publish("a", bytes(100))
        server.writers[0].write(INFO.replace(b"1048576", b"10"))
        await bus.ping()
        with pytest.raises(PayloadTooLarge):
            await bus.publish("a", bytes(11))
        await bus.publish("a", bytes(10))


async def test_a_server_without_headers() -> None:
    async with NatsServer(config="no_header_support: true", jetstream=False) as server:
        async with connect(server.url) as bus:
            for cap in (Cap.HEADERS, Cap.CONTENT_TYPE, Cap.TTL, Cap.ECHO_CONTROL):
                assert not bus.supports(cap)
            with pytest.raises(NotSupported):
                await bus.publish("a", b"x", headers={"a": "b"})
            async with bus.subscribe("a", dict[str, int]) as messages:
                await bus.publish("a", {"x": 1})
                assert (await messages.get(timeout=5)).payload == {"x": 1}


# --- confirming ------------------------------------------------------------------------------


async def test_one_ping_confirms_all_publishes_of_a_turn() -> None:
    async with fake(INFO, pong) as server, connect(f"nats://127.0.0.1:{server.port}") as bus:
        before = server.heard
        receipts = await asyncio.gather(*(bus.publish("a", b"%d" % n) for n in range(1000)))
        assert len(receipts) == 1000
        lines = server.heard.removeprefix(before).split(b"\r\n")
        assert lines.count(b"PING") == 1
        assert [line for line in lines if line.isdigit()] == [b"%d" % n for n in range(1000)]


async def test_a_loss_tells_what_was_sent_and_what_was_not() -> None:
    silent = False

    def answer(line: bytes) -> bytes:
        return b"" if silent else pong(line)

    async with fake(INFO, answer) as server:
        async with connect(f"nats://127.0.0.1:{server.port}", reconnect=False) as bus:
            await bus.ping()
            silent = True
            sent = [asyncio.ensure_future(bus.publish("a", b"%d" % n)) for n in range(3)]
            await eventually(lambda: b"\r\n2\r\n" in server.heard)
            server.writers[0].transport.abort()
            for error in await settled(*sent):
                assert isinstance(error, PublishFailed)
                assert error.outcome is Outcome.UNKNOWN
            with pytest.raises(Exception) as caught:
                await bus.publish("a", b"late")
            assert getattr(caught.value, "outcome", Outcome.NOT_SENT) is Outcome.NOT_SENT


async def test_what_was_not_written_is_kept_for_the_next_session(server: NatsServer) -> None:
    async with connect(server.url, offline="buffer", **SOON) as bus:
        async with bus.subscribe("a") as messages:
            connection = backend(bus)._connection
            assert connection is not None
            connection.fail(ConnectionResetError("cut by the test"))
            # In the same turn of the loop: accepted, never written.
            receipt = await bus.publish("a", b"kept")
            assert receipt.topic == "a"
            assert (await messages.get(timeout=5)).payload == b"kept"
            assert bus.stats.sessions == 2


async def test_a_cancelled_publish_leaves_the_others(server: NatsServer) -> None:
    async with connect(server.url) as bus, bus.subscribe("a") as messages:
        for turns in range(6):
            first = asyncio.ensure_future(bus.publish("a", b"first"))
            second = asyncio.ensure_future(bus.publish("a", b"second"))
            for _ in range(turns):
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])
            assert (await second).topic == "a"
            while (await messages.get(timeout=5)).payload != b"second":
                pass
        await bus.ping()


async def test_a_cancelled_subscribe_leaves_no_number(server: NatsServer) -> None:
    async with connect(server.url) as bus:
        for turns in range(8):
            subscribing = asyncio.ensure_future(bus.subscribe(f"n/{turns}/#").__aenter__())
            for _ in range(turns):
                await asyncio.sleep(0)
            subscribing.cancel()
            found = (await settled(subscribing))[0]
            if not isinstance(found, BaseException):
                await found.close()
        await eventually(lambda: not backend(bus)._subs)
        async with bus.subscribe("b") as messages:
            await bus.publish("b", b"x")
            await messages.get(timeout=5)


# --- sessions --------------------------------------------------------------------------------


async def test_a_silent_link_is_noticed_while_publishing(server: NatsServer) -> None:
    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        async with connect(
            f"nats://127.0.0.1:{proxy.port}", keepalive=0.3, offline="buffer", **SOON
        ) as bus:
            await bus.publish("a", b"x")
            proxy.blackhole(True)

            async def publish() -> None:
                while True:
                    await settled(bus.publish("a", b"x", timeout=0.05))

            sending = asyncio.ensure_future(publish())
            await eventually(lambda: bus.status is not Status.ONLINE, within=10)
            sending.cancel()
            await asyncio.wait([sending])
            proxy.blackhole(False)
            await eventually(lambda: bus.status is Status.ONLINE, within=10)
            await bus.publish("a", b"y")
    finally:
        await proxy.stop()


async def test_a_server_that_will_go_is_left_between_two_messages() -> None:
    async with NatsServer(cluster=2, jetstream=False) as server:
        async with connect(server.urls[0], offline="buffer", **SOON) as bus:
            await eventually(lambda: len(backend(bus)._servers) == 2, within=10)
            async with bus.subscribe("a") as messages:
                pid = server.pids[0]
                assert pid is not None
                os.kill(pid, signal.SIGUSR2)
                sent = 0
                while bus.stats.sessions < 2:
                    await bus.publish("a", b"%d" % sent)
                    sent += 1
                await bus.publish("a", b"end")
                got: list[bytes] = []
                while not got or got[-1] != b"end":
                    got.append((await messages.get(timeout=5)).payload)
                assert backend(bus)._server.port == int(server.urls[1].rpartition(":")[2])


async def test_malformed_bytes_end_the_session_and_it_comes_back() -> None:
    async with fake(INFO, pong) as server:
        async with connect(f"nats://127.0.0.1:{server.port}", **SOON) as bus:
            server.writers[0].write(b"WHAT\r\n")
            await eventually(lambda: bus.stats.sessions == 2)
            await bus.publish("a", b"x")


async def test_the_server_says_who_we_are(server: NatsServer) -> None:
    async with connect(server.url) as one, connect(server.url) as two:
        facts = [bus._engine.session.facts for bus in (one, two)]
        assert facts[0].server.startswith("nats-server 2.")
        assert facts[0].client_id != facts[1].client_id


async def test_closing_flushes_what_was_published(server: NatsServer) -> None:
    async with connect(server.url) as other, other.subscribe("a") as messages:
        bus = await connect(server.url)
        sending = [asyncio.ensure_future(bus.publish("a", b"%d" % n)) for n in range(50)]
        await asyncio.sleep(0)
        await bus.close()
        results = await settled(*sending)
        for n, result in enumerate(results):
            if isinstance(result, Receipt):
                assert (await messages.get(timeout=5)).payload == b"%d" % n
            else:
                assert isinstance(result, PublishFailed | NotConnected)


# --- groups, echo ----------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["g", "g.x", "gü", "g*", "with space", "50%"])
async def test_one_member_of_a_group_gets_each_message(server: NatsServer, group: str) -> None:
    async with connect(server.url) as one, connect(server.url) as two:
        async with (
            one.subscribe("work/#", group=group) as first,
            two.subscribe("work/#", group=group) as second,
        ):
            for n in range(40):
                await one.publish("work" if n % 2 else "work/x", b"%d" % n)
            await two.ping()
            await eventually(lambda: first.stats.received + second.stats.received == 40)
            assert first.stats.received
            assert second.stats.received


async def test_a_message_that_came_too_late_is_dropped(server: NatsServer) -> None:
    raw = await Raw.connect(server.port)
    header = b"NATS/1.0\r\nPubsub-Expires: 1000.5\r\n\r\n"
    async with connect(server.url) as bus, bus.subscribe("a") as messages:
        await raw.send(
            b"HPUB a %d %d\r\n%b%b\r\n" % (len(header), len(header) + 4, header, b"late")
        )
        await bus.publish("a", b"x", ttl=30)
        message = await messages.get(timeout=5)
        assert message.payload == b"x"
        assert message.expires_in is not None
        assert 20 < message.expires_in <= 30
        assert not message.headers
    raw.close()
