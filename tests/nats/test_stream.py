"""Stream mode on one node: confirmations, consumers, history, retained values, faults."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import nats
import pytest

from pubsub_core import Bus, Cap, connect
from pubsub_core.errors import (
    BadOption,
    ConnectError,
    LimitReached,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
    SubscribeFailed,
    SubscribeNotAuthorized,
)
from pubsub_core.events import Gap, Status
from pubsub_core.message import Origin, Receipt, Verdict
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_nats.backend.consumers import PullConsumer, PushConsumer
from pubsub_nats.options import NatsOptions
from pubsub_nats.server import NatsServer
from tests.servers import eventually, run

from .world import USERS, Raw, backend, settled

SOON: dict[str, Any] = {"reconnect_first": 0.01, "reconnect_max": 0.1}
_streams = itertools.count(1)


@pytest.fixture
def stream() -> str:
    return f"T{next(_streams)}"


def at(server: NatsServer | int, stream: str, **options: Any) -> Bus:
    port = server if isinstance(server, int) else server.port
    given = {"stream": stream, "prefix": stream.lower(), "create": True, **SOON, **options}
    return connect(f"nats://127.0.0.1:{port}", **given)


def consumers(bus: Bus) -> list[Any]:
    found = backend(bus)._stream
    assert found is not None
    return [each for group in found._consumers.values() for each in group]


@pytest.fixture
async def theirs(server: NatsServer) -> AsyncIterator[Any]:
    client = await nats.connect(server.url)
    yield client
    await client.close()


async def names(theirs: Any, stream: str) -> list[str]:
    return [each.name for each in await theirs.jetstream(timeout=30).consumers_info(stream)]


# --- publishing ----------------------------------------------------------------------------


async def test_a_receipt_has_the_number_of_the_message(
    server: NatsServer, stream: str, theirs: Any
) -> None:
    async with at(server, stream) as bus:
        receipts = [await bus.publish("a/b", b"%d" % n) for n in range(3)]
        assert [receipt.id for receipt in receipts] == ["1", "2", "3"]
        message = await theirs.jetstream(timeout=30).get_msg(stream, 2)
        assert (message.subject, message.data) == (f"{stream.lower()}.a.b", b"1")


async def test_what_the_stream_does_not_cover_is_refused_at_once(
    server: NatsServer, stream: str
) -> None:
    async with (
        at(server, stream, prefix="", subjects=("in/#",)) as bus,
        connect(server.url) as core,
    ):
        async with core.subscribe("#"):
            with pytest.raises(PublishFailed) as caught:
                await bus.publish("out", b"x", timeout=60)
            assert caught.value.outcome is Outcome.REJECTED
            assert caught.value.retryable is False
            assert "in.>" in caught.value.hint
        with pytest.raises(SubscribeFailed, match="covers nothing"):
            await bus.subscribe("out/#").__aenter__()
        assert (await bus.publish("in/x", b"x")).id == "1"


async def test_a_repeated_message_is_stored_once(server: NatsServer, stream: str) -> None:
    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        async with at(proxy.port, stream, keepalive=0.3, offline="buffer") as bus:
            await bus.publish("a", b"first")
            # Answers are lost, what was sent is not.
            sent: list[asyncio.Task[Receipt]] = []
            for turn in range(3):
                proxy.blackhole(True, Direction.DOWN)
                sessions = bus.stats.sessions
                sent += [
                    asyncio.ensure_future(bus.publish("a", b"%d %d" % (turn, n))) for n in range(50)
                ]
                await eventually(lambda: bus.status is Status.RECONNECTING, within=20)
                proxy.blackhole(False)
                await eventually(lambda s=sessions: bus.stats.sessions > s, within=20)  # type: ignore[misc]
            receipts = await asyncio.gather(*sent)
            assert len({receipt.id for receipt in receipts}) == 150
        async with at(server, stream) as bus:
            got = [m.payload async for m in bus.history("a", last=1000)]
            assert got == [
                b"first",
                *(b"%d %d" % (turn, n) for turn in range(3) for n in range(50)),
            ]
    finally:
        await proxy.stop()


async def test_after_the_window_nobody_knows(server: NatsServer, stream: str) -> None:
    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        # Five seconds of it are kept as a margin.
        async with at(
            proxy.port, stream, duplicate_window=5.2, keepalive=0.2, offline="buffer"
        ) as bus:
            await bus.publish("a", b"first")
            proxy.refuse(True)
            proxy.blackhole(True)
            sending = asyncio.ensure_future(bus.publish("a", b"lost"))
            await eventually(lambda: bus.status is Status.RECONNECTING, within=20)
            await asyncio.wait([sending], timeout=0.5)
            proxy.blackhole(False)
            proxy.refuse(False)
            (error,) = await settled(sending)
            assert isinstance(error, PublishFailed)
            assert error.outcome is Outcome.UNKNOWN
            assert (await bus.publish("a", b"next")).topic == "a"
    finally:
        await proxy.stop()


async def test_kill_after_the_receipts_loses_nothing(stream: str) -> None:
    async with NatsServer() as server:
        async with at(server, stream, offline="buffer") as bus:
            for start in range(0, 1500, 500):
                await asyncio.gather(*(bus.publish("a", b"%d" % (start + n)) for n in range(500)))
            await server.kill()
            await server.start()
            await eventually(lambda: bus.stats.sessions == 2, within=10)
            got = [int(m.payload) async for m in bus.history("a", last=2000)]
            assert got == list(range(1500))


async def test_full_streams_refuse_and_say_so(server: NatsServer, stream: str) -> None:
    async with at(server, stream, max_msgs=3, discard="new") as bus:
        for n in range(3):
            await bus.publish("a", b"%d" % n)
        with pytest.raises(PublishFailed, match="10077") as caught:
            await bus.publish("a", b"3")
        assert caught.value.outcome is Outcome.REJECTED
        assert caught.value.retryable is True
    async with at(server, f"{stream}old", max_msgs=3) as bus:
        for n in range(5):
            await bus.publish("a", b"%d" % n)
        assert [m.payload async for m in bus.history("a", last=9)] == [b"2", b"3", b"4"]


async def test_a_server_without_room_refuses(stream: str) -> None:
    async with NatsServer(config="jetstream { max_file: 200KB }") as server:
        async with at(server, stream) as bus:
            failed: Any = None
            for _ in range(20):
                (failed,) = await settled(bus.publish("a", bytes(50_000)))
                if isinstance(failed, Exception):
                    break
            assert isinstance(failed, PublishFailed)
            assert failed.outcome is Outcome.REJECTED
            assert failed.retryable is True
            assert bus.stats.sessions == 1


async def test_headers_of_users_are_no_orders_to_the_stream(
    server: NatsServer, stream: str
) -> None:
    async with at(server, stream) as bus, bus.subscribe("#") as messages:
        given = {"Nats-Rollup": "all", "Nats-Msg-Id": "1", "Nats-Expected-Stream": "X"}
        await bus.publish("a", b"1")
        for _ in range(2):
            await bus.publish("a", b"2", headers=given)
        got = [await messages.get(timeout=5) for _ in range(3)]
        assert [dict(m.headers) for m in got] == [{}, given, given]
        assert len([m async for m in bus.history("a", last=10)]) == 3


async def test_the_largest_message(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus, bus.subscribe("a") as messages:
        limit = bus.limits.max_payload
        assert limit is not None
        await bus.publish("a", bytes(limit))
        assert len((await messages.get(timeout=10)).payload) == limit
        with pytest.raises(PayloadTooLarge):
            await bus.publish("a", bytes(limit), headers={"k": "v"})
        await bus.publish("a", b"alive")
        assert bus.stats.sessions == 1


# --- streams that cannot be used ---------------------------------------------------------------


async def refused(bus: Bus) -> Any:
    with pytest.raises(ConnectError) as caught:
        await bus.open()
    await bus.close()
    assert caught.value.hint
    return caught.value


async def test_streams_that_cannot_be_used(server: NatsServer, stream: str, theirs: Any) -> None:
    error = await refused(at(server, stream, create=False))
    assert (error.retryable, "create=true" in error.hint) == (False, True)
    async with at(server, stream):
        pass
    error = await refused(at(server, f"{stream}other", prefix=f"{stream.lower()}/deeper"))
    assert "10065" in str(error)
    assert error.retryable is False
    error = await refused(at(server, f"{stream}three", replicas=3))
    assert "10074" in str(error)
    stream_api = theirs.jetstream(timeout=30)
    await stream_api.add_stream(name=f"{stream}mute", subjects=[f"{stream}mute"], no_ack=True)
    error = await refused(at(server, f"{stream}mute"))
    assert "no_ack" in error.hint


async def test_a_server_without_jetstream(stream: str) -> None:
    async with NatsServer(jetstream=False) as server:
        error = await refused(at(server, stream))
        assert "jetstream" in error.hint


async def test_an_account_without_jetstream(stream: str) -> None:
    config = """
    accounts {
      A {
        users: [ { user: a, password: a } ]
      }
    }
    """
    async with NatsServer(config=config) as server:
        url = server.url.replace("//", "//a:a@")
        error = await refused(connect(url, stream=stream, prefix="p", create=True))
        assert error.retryable is False or "jetstream" in error.hint


@pytest.fixture(scope="module")
def guarded() -> Iterator[NatsServer]:
    started = NatsServer(config=USERS)
    run(started.start())
    yield started
    run(started.stop())


async def test_denied_operations_fail_within_a_round_trip(guarded: NatsServer, stream: str) -> None:
    options: dict[str, Any] = {
        "stream": stream,
        "subjects": ("a/#", "no/#"),
        "create": True,
    }
    async with connect(guarded.url.replace("//", "//all:all@"), **options):
        pass
    async with connect(guarded.url.replace("//", "//some:some@"), timeout=60, **options) as bus:
        results = await settled(
            *(bus.publish(topic, b"x") for topic in ("a/1", "a/X", "no/1", "a/2"))
        )
        assert [type(each) for each in results] == [
            Receipt, PublishNotAuthorized, PublishNotAuthorized, Receipt,
        ]  # fmt: skip
        with pytest.raises(SubscribeNotAuthorized):
            await bus.subscribe("a/#").__aenter__()
        assert (await bus.publish("a/3", b"x")).id == "3"
        assert bus.stats.sessions == 1


@pytest.mark.parametrize(
    "options",
    [
        {"create": True},
        {"subjects": ("a",)},
        {"client_id": "x"},
        {"stream": "a.b"},
        {"stream": "a b"},
        {"stream": "S", "create": True},
        {"stream": "S", "subjects": ("$JS/#",)},
        {"stream": "S", "replicas": 0},
        {"stream": "S", "ack_wait": 0.0},
        {"stream": "S", "max_deliver": -1},
        {"stream": "S", "client_id": ""},
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        NatsOptions(**options)


async def test_without_a_stream_there_is_a_remedy(server: NatsServer) -> None:
    async with connect(server.url) as bus:
        for cap in (Cap.HISTORY, Cap.RETAINED, Cap.ACK, Cap.FLOW_CONTROL, Cap.PERSISTENT_SESSION):
            assert "stream=" in bus.supports(cap).remedy
        with pytest.raises(NotSupported, match="stream="):
            await bus.subscribe("a", ack="manual").__aenter__()


# --- reading -------------------------------------------------------------------------------


async def test_a_lost_session_leaves_no_hole(server: NatsServer, stream: str) -> None:
    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        async with at(server, stream) as publisher, at(proxy.port, stream) as bus:
            async with bus.subscribe("a/#", gaps=True, buffer=5000) as messages:
                sent = 0
                for _ in range(5):
                    for _ in range(20):
                        await publisher.publish("a/x" if sent % 2 else "a", b"%d" % sent)
                        sent += 1
                    sessions = bus.stats.sessions
                    await proxy.cut()
                    await eventually(lambda s=sessions: bus.stats.sessions > s)  # type: ignore[misc]
                await publisher.publish("a", b"%d" % sent)
                got: list[int] = []
                gaps: list[Gap] = []
                while len(got) <= sent:
                    each: Any = await messages.get(timeout=5)
                    if isinstance(each, Gap):
                        gaps.append(each)
                    else:
                        got.append(int(each.payload))
                assert got == list(range(sent + 1))
                assert all(gap.recovered for gap in gaps)
    finally:
        await proxy.stop()


async def test_what_was_purged_meanwhile_is_told(
    server: NatsServer, stream: str, theirs: Any
) -> None:
    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        async with at(server, stream) as publisher, at(proxy.port, stream) as bus:
            async with bus.subscribe("a") as messages:
                await publisher.publish("a", b"1")
                assert (await messages.get(timeout=5)).payload == b"1"
                proxy.refuse(True)
                await proxy.cut()
                await eventually(lambda: bus.status is Status.RECONNECTING)
                for n in range(5):
                    await publisher.publish("a", b"gone %d" % n)
                await theirs.jetstream(timeout=30).purge_stream(stream)
                await publisher.publish("a", b"2")
                proxy.refuse(False)
                await eventually(lambda: bus.stats.sessions == 2)
                assert not bus._engine.session.facts.resumed
                assert (await messages.get(timeout=5)).payload == b"2"
    finally:
        await proxy.stop()


async def test_a_consumer_that_vanishes_is_made_again(
    server: NatsServer, stream: str, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_nats.backend.consumers.HEARTBEAT", 0.2)
    monkeypatch.setattr("pubsub_nats.backend.stream.HEARTBEAT", 0.2)
    async with at(server, stream) as bus, at(server, stream) as publisher:
        async with (
            bus.subscribe("#", buffer=1000) as plain,
            bus.subscribe("+", ack="manual") as manual,
        ):
            await publisher.publish("a", b"0")
            await manual.get(timeout=5)
            await plain.get(timeout=5)
            for name in await names(theirs, stream):
                await theirs.jetstream(timeout=30).delete_consumer(stream, name)
            for n in range(1, 50):
                await publisher.publish("a", b"%d" % n)
            got = [int((await plain.get(timeout=10)).payload) for _ in range(49)]
            assert got == list(range(1, 50))
            again: set[int] = set()
            while len(again) < 50:
                message = await manual.get(timeout=10)
                again.add(int(message.payload))
                await message.ack()
            assert bus.stats.sessions == 1


async def test_a_hole_is_noticed_and_filled(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus, bus.subscribe("a", buffer=1000) as messages:
        (consumer,) = consumers(bus)
        assert isinstance(consumer, PushConsumer)
        deliveries = consumer._host.requests._deliveries
        sid, taker = consumer._sid, consumer.take

        def lossy(message: Any, position: Any) -> None:
            if position is None or position.consumer != 2:  # that one is lost on the way
                taker(message, position)

        deliveries[sid] = lossy
        for n in range(20):
            await bus.publish("a", b"%d" % n)
        got = [int((await messages.get(timeout=5)).payload) for _ in range(20)]
        assert got == list(range(20))


async def test_pausing_holds_the_server_back(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus, at(server, stream) as publisher:
        async with bus.subscribe("a", buffer=10, overflow="block") as messages:
            for start in range(0, 3000, 100):
                await asyncio.gather(
                    *(
                        publisher.publish("a", b"%06d" % (start + n) + bytes(20_000))
                        for n in range(100)
                    )
                )
            await bus.ping()
            held = messages.stats.received
            assert held < 3000, "everything came although nobody read"
            got = [int((await messages.get(timeout=10)).payload[:6]) for _ in range(3000)]
            assert got == list(range(3000))
            assert messages.stats.dropped == 0
            assert bus.stats.sessions == 1


async def test_plain_subscriptions_leave_no_consumer(
    server: NatsServer, stream: str, theirs: Any
) -> None:
    async with at(server, stream) as bus:
        async with bus.subscribe("a/#"), bus.subscribe("b", ack="manual"):
            assert len(await names(theirs, stream)) == 2
        await bus.ping()
        assert await names(theirs, stream) == []
        async with bus.subscribe("c"):
            await bus.close()
    assert await names(theirs, stream) == []


async def test_many_subscriptions(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus:
        wanted = [bus.subscribe(f"n/{n}") for n in range(1500)]
        await asyncio.gather(*(each.__aenter__() for each in wanted))
        await bus.publish("n/1499", b"x")
        assert (await wanted[-1].get(timeout=5)).payload == b"x"
        assert wanted[0].stats.received == 0


async def test_echo_is_off_for_deliveries_too(server: NatsServer, stream: str) -> None:
    async with at(server, stream, echo=False) as mute, at(server, stream) as other:
        async with mute.subscribe("a") as own, mute.subscribe("a", group="g") as shared:
            await mute.publish("a", b"mine")
            await other.publish("a", b"theirs")
            assert (await own.get(timeout=5)).payload == b"theirs"
            assert (await shared.get(timeout=5)).payload == b"theirs"
            await mute.ping()
            assert own.stats.received == shared.stats.received == 1


# --- acknowledging ---------------------------------------------------------------------------


async def test_what_is_not_settled_comes_again_until_the_limit(
    server: NatsServer, stream: str
) -> None:
    async with at(server, stream, ack_wait=0.3, max_deliver=3) as bus:
        async with bus.subscribe("a", ack="manual") as messages:
            await bus.publish("a", b"x")
            flags = [(await messages.get(timeout=5)).redelivered for _ in range(3)]
            assert flags == [False, True, True]
            await bus.publish("a", b"end")
            message = await messages.get(timeout=5)
            assert message.payload == b"end"
            await message.ack()


async def test_what_is_forgotten_blocks_nothing(
    server: NatsServer, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_nats.backend.stream.HEARTBEAT", 0.1)
    async with at(server, stream, ack_wait=0.5) as bus:
        async with bus.subscribe("a", ack="manual", buffer=10_000) as messages:
            await asyncio.gather(*(bus.publish("a", b"%d" % n) for n in range(600)))
            # More than the window, and nobody says a word about the first ones.
            for _ in range(256):
                await messages.get(timeout=10)
            seen: set[int] = set()
            while len(seen) < 600:
                message = await messages.get(timeout=10)
                seen.add(int(message.payload))
                await message.ack()


async def test_looking_for_a_consumer_gives_nothing_back(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus, bus.subscribe("a", ack="manual") as messages:
        await bus.publish("a", b"1")
        message = await messages.get(timeout=5)
        (consumer,) = consumers(bus)
        consumer.again("the test says so")
        await consumer._working
        await bus.publish("a", b"2")
        assert (await messages.get(timeout=5)).payload == b"2"
        await message.ack()
        await bus.publish("a", b"3")
        assert (await messages.get(timeout=5)).payload == b"3"
        assert messages.stats.received == 3


async def test_given_back_with_a_delay_and_kept_while_working(
    server: NatsServer, stream: str
) -> None:
    async with at(server, stream, ack_wait=0.6) as bus:
        async with bus.subscribe("a", ack="manual") as messages:
            found = backend(bus)._stream
            assert found is not None
            loop = asyncio.get_running_loop()
            await bus.publish("a", b"x")
            message = await messages.get(timeout=5)
            tag: Any = message.frame.tag
            began = loop.time()
            found.settle(tag, Verdict.NACK, 0.3)
            again = await messages.get(timeout=5)
            assert loop.time() - began >= 0.29
            tag = again.frame.tag
            # Told four times within its time, the server goes on waiting for twice as long.
            for _ in range(4):
                await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0.3))])
                tag.consumer.working(tag)
            await bus.ping()
            assert messages.stats.received == 2
            await again.ack()


async def test_rejected_messages_are_gone(server: NatsServer, stream: str, theirs: Any) -> None:
    heard = await theirs.subscribe(f"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{stream}.*")
    await theirs.flush()
    async with at(server, stream) as bus, bus.subscribe("a", ack="manual") as messages:
        await bus.publish("a", b"x")
        await (await messages.get(timeout=5)).reject()
        told = json.loads((await heard.next_msg(timeout=5)).data)
        assert told["stream_seq"] == 1


async def test_a_subscription_may_begin_to_acknowledge(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus, at(server, stream) as publisher:
        async with bus.subscribe("a", buffer=1000) as plain:
            for n in range(10):
                await publisher.publish("a", b"%d" % n)
            sending = asyncio.ensure_future(_publish(publisher, range(10, 60)))
            async with bus.subscribe("a", ack="manual") as manual:
                await sending
                assert isinstance(consumers(bus)[0], PullConsumer)
                got = [int((await plain.get(timeout=5)).payload) for _ in range(60)]
                assert sorted(set(got)) == list(range(60))
                while (await manual.get(timeout=5)).payload != b"59":
                    pass


async def _publish(bus: Bus, numbers: range) -> None:
    for n in numbers:
        await bus.publish("a", b"%d" % n)


# --- groups and sessions ---------------------------------------------------------------------


async def test_a_killed_members_messages_come_to_another(server: NatsServer, stream: str) -> None:
    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        options = {"ack_wait": 1.0}
        async with (
            at(server, stream, **options) as one,
            at(proxy.port, stream, reconnect=False, **options) as two,
        ):
            async with one.subscribe("a/#", group="g", ack="manual") as stays:
                dies = await two.subscribe("a/#", group="g", ack="manual").__aenter__()
                for n in range(40):
                    await one.publish("a/x" if n % 2 else "a", b"%d" % n)
                await eventually(lambda: stays.stats.received + dies.stats.received == 40)
                assert dies.stats.received
                await proxy.cut()
                got: set[int] = set()
                while len(got) < 40:
                    message = await stays.get(timeout=5)
                    got.add(int(message.payload))
                    await message.ack()
    finally:
        await proxy.stop()


async def test_a_group_survives_its_members_and_ends_some_time(
    server: NatsServer, stream: str, theirs: Any
) -> None:
    async with at(server, stream, session_expiry=1.0) as publisher:
        async with at(server, stream, session_expiry=1.0) as bus:
            async with bus.subscribe("a", group="g") as jobs:
                await publisher.publish("a", b"1")
                assert (await jobs.get(timeout=5)).payload == b"1"
        await publisher.publish("a", b"2")
        async with at(server, stream, session_expiry=1.0) as bus:
            async with bus.subscribe("a", group="g") as jobs:
                assert (await jobs.get(timeout=5)).payload == b"2"
        while await names(theirs, stream):
            pass


async def test_a_session_survives_its_process(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as publisher:
        async with at(server, stream, client_id="me") as bus:
            assert not bus._engine.session.facts.resumed
            async with bus.subscribe("a/#") as messages:
                await publisher.publish("a", b"0")
                message = await messages.get(timeout=5)
                assert message.payload == b"0"
                await message.ack()
                await bus.close()
        for n in range(1, 6):
            await publisher.publish("a/x" if n % 2 else "a", b"%d" % n)
        async with at(server, stream, client_id="me") as bus:
            assert bus._engine.session.facts.resumed
            async with bus.subscribe("a/#") as messages:
                got = [(await messages.get(timeout=5)).payload for _ in range(5)]
                assert got == [b"1", b"2", b"3", b"4", b"5"]
        async with at(server, stream, client_id="me") as bus:
            # Given up on purpose, it does not come back.
            assert not bus._engine.session.facts.resumed


# --- stored values ---------------------------------------------------------------------------


async def test_history_by_every_measure(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus:
        for start in range(0, 2000, 250):
            await asyncio.gather(
                *(
                    bus.publish("rare" if n % 500 == 0 else "often/x", b"%d" % n)
                    for n in range(start, start + 250)
                )
            )
        everything = [m async for m in bus.history("#")]
        assert [int(m.payload) for m in everything] == list(range(2000))
        assert [int(m.payload) async for m in bus.history("rare", last=3)] == [500, 1000, 1500]
        assert [int(m.payload) async for m in bus.history("often/#", last=2)] == [1998, 1999]
        assert [int(m.payload) async for m in bus.history("rare", last=99)] == [0, 500, 1000, 1500]
        middle = [m async for m in bus.history("#", since=everything[1000].time, last=5)]
        assert [int(m.payload) for m in middle] == list(range(1995, 2000))
        early = [m async for m in bus.history("#", until=everything[10].time)]
        assert [m.id for m in early][:11] == [m.id for m in everything][:11]
        assert early[-1].time <= everything[10].time
        assert [m async for m in bus.history("nothing", last=5)] == []
        async for message in bus.history("#"):
            assert message.payload == b"0"
            break
        await bus.publish("often/x", b"after")


async def test_retained_values(server: NatsServer, stream: str, theirs: Any) -> None:
    async with at(server, stream) as bus:
        for n in range(300):
            await bus.publish(f"v/{n}", b"old", retain=True)
            await bus.publish(f"v/{n}", b"%d" % n, retain=True, headers={"n": str(n)})
        await bus.clear("v/7")
        async with at(server, stream) as late, late.subscribe("v/#", buffer=1000) as messages:
            got = [await messages.get(timeout=5) for _ in range(299)]
            assert {m.topic: m.payload for m in got} == {
                f"v/{n}": b"%d" % n for n in range(300) if n != 7
            }
            assert {m.origin for m in got} == {Origin.RETAINED}
            assert dict(got[0].headers)
            await bus.publish("v/1", b"live", retain=True)
            assert (await messages.get(timeout=5)).origin is Origin.LIVE
        # What their tools see as a key-value store.
        values = await theirs.jetstream(timeout=30).key_value(f"{stream}_last")
        assert (await values.get(f"{stream.lower()}.v.1")).value == b"live"


async def test_expired_messages_are_gone(server: NatsServer, stream: str, theirs: Any) -> None:
    async with at(server, stream) as bus:
        assert bus.supports(Cap.TTL).level == "native"
        await bus.publish("a", b"short", ttl=0.2, retain=True)
        await bus.publish("a", b"long", ttl=60)
        last = await bus.last("a")
        assert last is not None
        assert last.expires_in is not None
        assert 0 < last.expires_in <= 0.2
        while (await bus.last("a")) is not None:
            pass
        (message,) = [m async for m in bus.history("a", last=5)]
        assert message.payload == b"long"
        assert message.expires_in is not None
        assert 50 < message.expires_in <= 60
        # The server removes it itself, after whole seconds.
        while (await theirs.jetstream(timeout=30).stream_info(stream)).state.messages > 1:
            pass


async def test_devices_are_stored_as_well(server: NatsServer, stream: str) -> None:
    raw = await Raw.connect(server.port)
    async with at(server, stream) as bus, bus.subscribe("a") as messages:
        header = b"NATS/1.0\r\nNmqtt-Pub: 1\r\n\r\n"
        subject = f"{stream.lower()}.a".encode()
        await raw.send(
            b"HPUB %b %d %d\r\n%b%b\r\n" % (subject, len(header), len(header) + 1, header, b"x")
        )
        message = await messages.get(timeout=5)
        assert message.payload == b"x"
        assert not message.headers
        assert message.id == "1"
    raw.close()


# --- life ----------------------------------------------------------------------------------


async def test_closing_on_a_dead_link_is_bounded(server: NatsServer, stream: str) -> None:
    proxy = FaultProxy("127.0.0.1", server.port)
    await proxy.start()
    try:
        before = asyncio.all_tasks()
        bus = at(proxy.port, stream)
        await bus.open()
        await bus.subscribe("a").__aenter__()
        proxy.blackhole(True)
        sending = asyncio.ensure_future(bus.publish("a", b"x"))
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await bus.close(drain=0.2)
        (error,) = await settled(sending)
        assert isinstance(error, PublishFailed)
        assert error.outcome is Outcome.UNKNOWN
        await eventually(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})
    finally:
        await proxy.stop()


async def test_cancelled_operations_leave_nothing(server: NatsServer, stream: str) -> None:
    async with at(server, stream) as bus:
        requests = backend(bus)._stream.requests  # type: ignore[union-attr]
        for turns in range(12):
            operations = [
                asyncio.ensure_future(bus.publish("a", b"x", retain=True)),
                asyncio.ensure_future(bus.last("a")),
                asyncio.ensure_future(bus.subscribe(f"n/{turns}").__aenter__()),
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            for each in operations:
                each.cancel()
            for found in await settled(*operations):
                if hasattr(found, "close"):
                    await found.close()
        await eventually(lambda: not requests._waiting)
        await eventually(lambda: not consumers(bus))
        await eventually(lambda: not requests._deliveries)
        await eventually(lambda: not requests._takers)
        assert (await bus.publish("a", b"y")).topic == "a"


async def test_a_stream_that_allows_few_consumers(
    server: NatsServer, stream: str, theirs: Any
) -> None:
    await theirs.jetstream(timeout=30).add_stream(
        name=stream, subjects=[f"{stream.lower()}.>"], max_consumers=2
    )
    async with at(server, stream) as bus:
        async with bus.subscribe("a"), bus.subscribe("b") as messages:
            with pytest.raises(LimitReached) as caught:
                await bus.subscribe("c").__aenter__()
            assert "max_consumers" in caught.value.hint
            await bus.publish("b", b"x")
            assert (await messages.get(timeout=5)).payload == b"x"
        async with bus.subscribe("c"):
            pass


async def test_another_stream_that_covers_the_topic_is_noticed(
    server: NatsServer, stream: str, theirs: Any
) -> None:
    jetstream = theirs.jetstream(timeout=30)
    await jetstream.add_stream(name=stream, subjects=[f"{stream.lower()}.>"])
    async with at(server, stream) as bus:
        assert bus.supports(Cap.TTL).level == "emulated"
        await bus.publish("a", b"1")
        await jetstream.update_stream(name=stream, subjects=[f"{stream.lower()}.b"])
        await jetstream.add_stream(name=f"{stream}X", subjects=[f"{stream.lower()}.a"])
        with pytest.raises(PublishFailed, match="10060") as caught:
            await bus.publish("a", b"2")
        assert caught.value.outcome is Outcome.REJECTED
        assert (await jetstream.stream_info(f"{stream}X")).state.messages == 0
        await jetstream.delete_stream(f"{stream}X")
