"""The endpoint on real sockets: what it answers, what it closes, and what it survives."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from wsproto import events as ws

from pubsub_core.errors import ConnectError, TLSProblem
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.server import ServerTLS
from pubsub_mqtt.server.endpoint import (
    Client,
    Ending,
    EndpointServer,
    EndpointStats,
    Leniency,
    Profile,
)
from pubsub_mqtt.server.endpoint.packets import (
    ConnAck,
    Connect,
    Disconnect,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
    WillMessage,
    encode,
)
from tests.mqtt.server.endpoint.wire import DEADLINE, SmallDialect, WebWire, Wire
from tests.servers import Authority, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextlib.asynccontextmanager
async def serving(
    profile: Profile | None = None, **options: Any
) -> AsyncIterator[tuple[EndpointServer, SmallDialect]]:
    dialect = SmallDialect(profile)
    async with EndpointServer(dialect, **options) as server:
        yield server, dialect


def memory() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _stop_reading(wire: Wire) -> None:
    stream: Any = wire.reader  # asyncio has no public way
    stream._transport.pause_reading()


def _read_again(wire: Wire) -> None:
    stream: Any = wire.reader
    stream._transport.resume_reading()


# --- answers ---------------------------------------------------------------------------


async def test_publish_subscribe_and_their_acknowledgements() -> None:
    async with serving() as (server, dialect), Wire.connected(server.port) as wire:
        await wire.send(Subscribe(1, (("a/+", 0), ("b", 2))))
        assert await wire.next() == SubAck(1, (0, 2))
        await wire.send(Publish("a/x", b"0"), Publish("a/y", b"1", 1, packet_id=7))
        assert await wire.next() == Publish("a/x", b"0")
        assert await wire.next() == Publish("a/y", b"1")
        assert await wire.next() == PubAck(7)
        await wire.send(Unsubscribe(2, ("a/+",)), Publish("a/x", b"2"), PingReq())
        assert await wire.next() == UnsubAck(2)
        assert await wire.next() == PingResp()
        assert [each.payload for each in dialect.published] == [b"0", b"1", b"2"]


async def test_a_message_at_qos_2_is_taken_once_however_often_it_is_sent() -> None:
    async with serving() as (server, dialect), Wire.connected(server.port) as wire:
        await wire.send(Publish("t", b"x", 2, packet_id=5))
        assert await wire.next() == PubRec(5)
        await wire.send(Publish("t", b"x", 2, duplicate=True, packet_id=5), PubRel(5))
        assert await wire.next() == PubRec(5)
        assert await wire.next() == PubComp(5)
        assert len(dialect.published) == 1
        await wire.send(Publish("t", b"y", 2, packet_id=5))
        assert await wire.next() == PubRec(5)
        assert len(dialect.published) == 2


async def test_a_message_sent_again_is_not_acknowledged_before_it_is_taken() -> None:
    async with serving() as (server, dialect), Wire.connected(server.port) as wire:
        dialect.hold = True
        message = Publish("t", b"x", 2, packet_id=5)
        await wire.send(message, Publish("t", b"x", 2, duplicate=True, packet_id=5), PingReq())
        assert await wire.next() == PingResp()
        ((client, packet),) = dialect.held
        client.acknowledge(packet)
        assert await wire.next() == PubRec(5)
        await wire.send(PingReq())
        assert await wire.next() == PingResp()


async def test_acknowledgements_wait_for_the_dialect_and_keep_their_order() -> None:
    async with serving() as (server, dialect), Wire.connected(server.port) as wire:
        dialect.hold = True
        await wire.send(*(Publish("t", b"", 1, packet_id=n) for n in (1, 2, 3)), PingReq())
        assert await wire.next() == PingResp()
        for client, packet in reversed(dialect.held):
            client.acknowledge(packet)
        assert [await wire.next() for _ in range(3)] == [PubAck(1), PubAck(2), PubAck(3)]


async def test_acknowledgements_of_packets_that_were_never_sent_are_ignored() -> None:
    async with serving() as (server, _), Wire.connected(server.port) as wire:
        await wire.send(PubAck(9), PubRec(9), PubComp(9), PubRel(9), PingReq())
        assert await wire.next() == PubComp(9)
        assert await wire.next() == PingResp()


@pytest.mark.parametrize("code", [2, 3, 4, 5])
async def test_a_refused_connect_gets_its_code_and_is_closed(code: int) -> None:
    async with serving() as (server, dialect):
        dialect.refuse = code
        wire = await Wire.open(server.port)
        await wire.send(Connect("c"), Publish("t", b"too early"))
        assert await wire.closed() == [ConnAck(code)]
        wire.close()
        assert server.stats.refused == 1
        assert not dialect.published


async def test_another_protocol_level_is_answered_with_code_1() -> None:
    async with serving() as (server, _):
        for level in (5, 9, 3):
            wire = await Wire.open(server.port)
            await wire.send(Connect("c", level=level))
            assert await wire.closed() == [ConnAck(1)]
            wire.close()


async def test_version_3_1_where_the_dialect_takes_it() -> None:
    profile = Profile(levels=frozenset({("MQTT", 4), ("MQIsdp", 3)}))
    async with serving(profile) as (server, _):
        async with Wire.connected(server.port, Connect("c", protocol="MQIsdp", level=3)) as wire:
            await wire.send(PingReq())
            assert await wire.next() == PingResp()


async def test_the_dialect_decides_about_a_second_client_of_the_same_name() -> None:
    async with serving() as (server, dialect):
        async with Wire.connected(server.port) as first, Wire.connected(server.port) as second:
            await first.send(PingReq())
            assert await first.next() == PingResp()
            dialect.take_over = True
            async with Wire.connected(server.port) as third:
                assert await second.closed() == []
                for stays in (first, third):
                    await stays.send(PingReq())
                    assert await stays.next() == PingResp()
                assert [name for name, _, _ in dialect.gone] == ["tester"]


async def test_a_publisher_waits_for_a_reader_of_usual_speed_and_not_for_a_stopped_one() -> None:
    async with serving(Profile(max_queue=4_000_000)) as (server, _):
        async with (
            Wire.connected(server.port, Connect("reader")) as reader,
            Wire.connected(server.port, Connect("publisher", keepalive=1)) as publisher,
        ):
            await reader.send(Subscribe(1, (("t", 0),)))
            assert await reader.next() == SubAck(1, (0,))
            _stop_reading(reader)
            packets = [Publish("t", bytes(8000)) for _ in range(900)]
            async with asyncio.TaskGroup() as group:
                group.create_task(publisher.send(*packets, PingReq()))
                with pytest.raises(TimeoutError):
                    await publisher.next(within=0.2)
                _read_again(reader)
                answer = group.create_task(publisher.next())
                for _ in range(900):
                    await reader.next()
                assert await answer == PingResp()
            assert server.stats.slow_readers == 0


async def test_the_end_of_a_client_is_told_once_and_how_it_was() -> None:
    async with serving() as (server, dialect):
        will = WillMessage("w", b"bye")
        async with Wire.connected(server.port, Connect("clean", will=will)) as wire:
            await wire.send(Disconnect())
            assert await wire.closed() == []
        async with Wire.connected(server.port, Connect("gone", will=will)):
            pass
        await eventually(lambda: len(dialect.gone) == 2)
        assert [(name, clean) for name, clean, _ in dialect.gone] == [
            ("clean", True),
            ("gone", False),
        ]
        assert server.stats.clients == 0


async def test_nothing_that_follows_disconnect_is_acted_on() -> None:
    async with serving() as (server, dialect), Wire.connected(server.port) as wire:
        await wire.send(Disconnect(), Publish("t", b"late"))
        assert await wire.closed() == []
        assert not dialect.published


# --- deadlines and limits ----------------------------------------------------------------


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with serving(Profile(handshake=0.1)) as (server, _):
        wire = await Wire.open(server.port)
        assert await wire.closed() == []
        assert server.stats.late == 1
        wire.close()


async def test_a_connect_in_single_bytes_has_no_more_time_than_another() -> None:
    async with serving(Profile(handshake=0.1)) as (server, _):
        wire = await Wire.open(server.port)

        async def dribble() -> None:
            for byte in encode(Connect("x" * 2000)):
                wire.writer.write(bytes((byte,)))
                await asyncio.sleep(0.01)

        task = asyncio.create_task(dribble())
        assert await wire.closed() == []
        assert not task.done()
        task.cancel()
        wire.close()


async def test_a_slow_http_request_has_no_more_time_than_connect() -> None:
    async with serving(Profile(handshake=0.1)) as (server, _):
        wire = await Wire.open(server.port)
        await wire.send(b"GET / HTTP/1.1\r\n")
        async with asyncio.timeout(DEADLINE):
            assert await wire.reader.read() == b""
        wire.close()


async def test_the_default_handshake_deadline_is_ten_seconds() -> None:
    assert Profile().handshake == 10.0
    assert Profile().max_early_packet == 65_536


def accepted(profile: Profile | None = None, *, keepalive: int = 0) -> Client:
    """A client whose CONNECT came at second 0; time is what the test says."""
    client = Client(SmallDialect(profile), EndpointStats(), now=0.0)
    assert client.tick(0.0) == client.dialect.profile.handshake
    client.receive(encode(Connect("c", keepalive=keepalive)), 0.0)
    assert client.take() == encode(ConnAck(0))
    return client


def test_a_silent_client_is_closed_after_one_and_a_half_times_its_keepalive() -> None:
    client = accepted(keepalive=10)
    assert client.tick(0.0) == 15.0
    assert client.tick(14.75) == 0.25
    assert client.tick(15.0) is None
    assert client.closed
    assert client.reason == "it was silent for 15.0 s"
    assert client.stats.silent == 1


def test_a_client_that_pings_stays_and_one_without_keepalive_has_the_profiles_time() -> None:
    pinging = accepted(Profile(idle=40.0), keepalive=10)
    for now in range(0, 1000, 14):
        assert pinging.tick(now) is not None
        pinging.receive(encode(PingReq()), now)
        assert pinging.take() == encode(PingResp())
    idle = accepted(Profile(idle=40.0))
    assert idle.tick(39.5) == 0.5
    assert idle.tick(40.0) is None
    assert idle.closed
    endless = accepted(Profile(idle=None))
    assert endless.tick(1e9) is None
    assert not endless.closed


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_connect_in_pieces_is_accepted(size: int) -> None:
    client = Client(SmallDialect(), EndpointStats(), now=0.0)
    data = encode(Connect("x" * 50))
    for start in range(0, len(data), size):
        assert client.take() == b""
        client.receive(data[start : start + size], start / 100)
    assert client.take() == encode(ConnAck(0))
    assert not client.closed


def test_a_handshake_has_no_more_time_however_slowly_it_comes() -> None:
    client = Client(SmallDialect(), EndpointStats(), now=0.0)
    for second, byte in enumerate(encode(Connect("x" * 50))[:10]):
        assert client.tick(second) == 10.0 - second
        client.receive(bytes((byte,)), second)
    assert client.tick(10.0) is None
    assert client.closed
    assert (client.stats.late, client.stats.clients) == (1, 0)


@pytest.mark.slow
async def test_the_server_asks_for_what_is_due_when_it_is() -> None:
    async with serving() as (server, dialect):
        async with (
            Wire.connected(server.port, Connect("silent", keepalive=1)) as silent,
            Wire.connected(server.port, Connect("pings", keepalive=1)) as pings,
        ):
            closed = asyncio.create_task(silent.closed())
            while not closed.done():
                await pings.send(PingReq())
                assert await pings.next() == PingResp()
                await asyncio.sleep(0.05)
            assert closed.result() == []
            assert server.stats.silent == 1
            await eventually(lambda: [name for name, _, _ in dialect.gone] == ["silent"])


def test_half_a_packet_does_not_keep_a_client_alive() -> None:
    client = accepted(keepalive=10)
    for second, byte in enumerate(encode(Publish("t", bytes(5000)))[:15]):
        assert client.tick(second) == 15.0 - second
        client.receive(bytes((byte,)), second)
    assert client.tick(15.0) is None
    assert client.closed


async def test_a_packet_over_the_limit_is_refused_on_its_header() -> None:
    async with serving(Profile(max_packet=65_536)) as (server, dialect):
        async with Wire.connected(server.port) as wire:
            await wire.send(Publish("t", bytes(65_536 - 3)))
            await wire.send(bytes.fromhex("30818004"))  # 65537, and nothing of it
            assert await wire.closed() == []
            assert len(dialect.published) == 1


async def test_a_large_packet_before_connect_is_refused_on_its_header() -> None:
    async with serving() as (server, _):
        wire = await Wire.open(server.port)
        await wire.send(bytes.fromhex("10ffffff7f"))
        assert await wire.closed() == []
        assert server.stats.late == 0
        wire.close()


async def test_more_clients_than_allowed_are_turned_away() -> None:
    async with serving(max_clients=2) as (server, _):
        async with Wire.connected(server.port), Wire.connected(server.port):
            wire = await Wire.open(server.port)
            assert await wire.closed() == []
            wire.close()
            assert server.stats.turned_away == 1
        await eventually(lambda: not server.links)
        async with Wire.connected(server.port):
            assert len(server.links) == 1


async def test_too_many_filters_in_one_packet_close_the_client() -> None:
    async with serving(Profile(max_filters=3)) as (server, _):
        async with Wire.connected(server.port) as wire:
            await wire.send(Subscribe(1, tuple((f"f{n}", 0) for n in range(4))))
            assert await wire.closed() == []


async def test_too_many_messages_that_wait_for_pubrel_close_the_client() -> None:
    async with serving(Profile(max_received=3)) as (server, dialect):
        async with Wire.connected(server.port) as wire:
            await wire.send(*(Publish("t", b"", 2, packet_id=n) for n in range(1, 6)))
            assert await wire.closed() == [PubRec(1), PubRec(2), PubRec(3)]
            assert len(dialect.published) == 3


# --- malformed packets --------------------------------------------------------------------

AFTER_CONNECT = {
    "a length of five bytes": "30ffffffff01",
    "qos 3": "3605000161000178",
    "dup at qos 0": "3803000161",
    "nul in a topic": "3003000100",
    "bad utf-8": "30040002c328",
    "subscribe without filters": "82020001",
    "subscribe with qos 3": "8206000100016103",
    "subscribe with wrong flags": "8006000100016100",
    "a second connect": encode(Connect("again")).hex(),
    "type 0": "0000",
    "type 15": "f000",
    "pubrel with wrong flags": "60020001",
    "packet id 0": "32050001610000",
    "connack from a client": "20020000",
    "unsubscribe without filters": "a2020001",
    "suback from a client": "9003000100",
    "pingresp from a client": "d000",
    "pingreq with a body": "c00100",
    "a wildcard in a topic": encode(Publish("a/+")).hex(),
    "the other wildcard in a topic": encode(Publish("#")).hex(),
    "an empty topic": encode(Publish("")).hex(),
    "a control code in a topic": encode(Publish("a\x07b")).hex(),
    "no character in a topic": encode(Publish("a\uffffb")).hex(),
    "a filter beyond its wildcard": encode(Subscribe(1, (("a/#/b", 0),))).hex(),
    "a filter with half a wildcard": encode(Subscribe(1, (("a+", 0),))).hex(),
    "an empty filter": encode(Unsubscribe(1, ("",))).hex(),
    "a control code in a filter": encode(Subscribe(1, (("a\x9f", 0),))).hex(),
}
FIRST = {
    "publish": encode(Publish("t")).hex(),
    "pingreq": "c000",
    "another protocol": "100c00044d5151540402003c0000",
    "the reserved flag": "100c00044d5154540403003c0000",
    "a tls hello": "16030100c8010000c40303" + "00" * 200,
    "nul in the client id": "100d00044d5154540402003c000100",
    "a will without a topic": encode(Connect("c", will=WillMessage("", b""))).hex(),
    "nothing of mqtt": "ff" * 20,
    "a length of five bytes": "10ffffffff01",
}


@pytest.mark.parametrize("wire", AFTER_CONNECT.values(), ids=AFTER_CONNECT.keys())
async def test_a_malformed_packet_closes_its_client_and_no_other(wire: str) -> None:
    async with serving() as (server, dialect):
        async with Wire.connected(server.port) as good, Wire.connected(server.port) as bad:
            await bad.send(Publish("before"), bytes.fromhex(wire), Publish("after"))
            assert await bad.closed() == []
            assert [each.topic for each in dialect.published] == ["before"]
            assert server.stats.errors == 1
            await good.send(PingReq())
            assert await good.next() == PingResp()


@pytest.mark.parametrize("wire", FIRST.values(), ids=FIRST.keys())
async def test_a_malformed_first_packet_is_refused_at_once(wire: str) -> None:
    async with serving() as (server, dialect):
        peer = await Wire.open(server.port)
        await peer.send(bytes.fromhex(wire))
        assert await peer.closed() == []
        peer.close()
        assert not dialect.gone
        assert server.stats.late == 0, "it waited for the deadline of the handshake"


async def test_a_dialect_may_take_any_text_as_a_topic() -> None:
    async with serving(Profile(leniency=Leniency(names=True))) as (server, dialect):
        async with Wire.connected(server.port) as wire:
            for topic in ("", "a/+", "#", "a\x07"):
                await wire.send(Publish(topic))
            await wire.send(PingReq())
            assert await wire.next() == PingResp()
            assert [each.topic for each in dialect.published] == ["", "a/+", "#", "a\x07"]


async def test_a_dialect_may_forgive_wrong_flags() -> None:
    async with serving(Profile(leniency=Leniency(subscribe_flags=True))) as (server, _):
        async with Wire.connected(server.port) as wire:
            await wire.send(bytes.fromhex(AFTER_CONNECT["subscribe with wrong flags"]))
            assert await wire.next() == SubAck(1, (0,))


async def test_a_mistake_in_the_dialect_closes_one_client_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as (server, _):
        async with Wire.connected(server.port) as bad, Wire.connected(server.port) as good:
            await bad.send(Publish("crash"))
            assert await bad.closed() == []
            await good.send(PingReq())
            assert await good.next() == PingResp()
    assert "a mistake in the dialect" in caplog.text


@pytest.mark.parametrize("count", [200, pytest.param(1500, marks=pytest.mark.slow)])
async def test_random_and_mutated_frames_kill_nothing(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = random.Random(20)
    good = [
        encode(each)
        for each in (
            Publish("a/b", b"x", 1, packet_id=3),
            Subscribe(1, (("a/#", 0),)),
            Unsubscribe(2, ("a/#",)),
            Connect("c", "u", b"p", will=WillMessage("w", b"x")),
            PingReq(),
            PubRel(3),
        )
    ]
    before = memory()
    async with serving(Profile(handshake=2)) as (server, _):
        for number in range(count):
            wire = await Wire.open(server.port)
            if number % 4:
                await wire.send(Connect("fuzz"))
            data = bytearray(source.choice(good) * 2)
            for _ in range(source.randint(0, 4)):
                data[source.randrange(len(data))] = source.randrange(256)
            if number % 7 == 0:
                data = bytearray(source.randbytes(60))
            wire.writer.write(bytes(data))
            wire.writer.close()
        await eventually(lambda: not server.links)
        async with Wire.connected(server.port) as wire:
            await wire.send(PingReq())
            assert await wire.next() == PingResp()
    assert memory() - before < 20_000_000
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_half_sent_connects_do_not_hinder_a_good_client() -> None:
    async with serving() as (server, _):
        half = encode(Connect("x" * 50))[:20]
        wires: list[Wire] = []
        for _ in range(100):
            wires.append(await Wire.open(server.port))
            wires[-1].writer.write(half)
        async with Wire.connected(server.port) as wire:
            await wire.send(PingReq())
            assert await wire.next() == PingResp()
            assert (len(server.links), server.stats.clients) == (101, 1)
        for wire in wires:
            wire.close()
        await eventually(lambda: not server.links)


# --- slow readers ---------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher is held up for a moment only because of a reader that has stopped."""
    monkeypatch.setattr("pubsub_mqtt.server.endpoint.server._GRACE", 0.05)


async def test_a_reader_that_stops_is_closed_and_the_others_get_everything() -> None:
    profile = Profile(max_queue=2_000_000)
    async with serving(profile) as (server, dialect):
        async with (
            Wire.connected(server.port, Connect("stopped")) as stopped,
            Wire.connected(server.port, Connect("fast")) as fast,
            Wire.connected(server.port, Connect("publisher")) as publisher,
        ):
            for wire in (stopped, fast):
                await wire.send(Subscribe(1, (("t", 0),)))
                assert await wire.next() == SubAck(1, (0,))
            _stop_reading(stopped)
            before = memory()
            count = 3000

            async def read() -> int:
                for number in range(count):
                    packet = await fast.next()
                    assert isinstance(packet, Publish)
                    assert int(packet.payload[:8]) == number
                return count

            reading = asyncio.create_task(read())
            for number in range(count):
                await publisher.send(Publish("t", b"%08d" % number + bytes(8000)))
            async with asyncio.timeout(40):
                assert await reading == count
            assert server.stats.slow_readers == 1
            assert server.stats.dropped == 1
            assert [name for name, _, _ in dialect.gone] == ["stopped"]
            assert memory() - before < 64_000_000


@pytest.mark.usefixtures("impatient")
async def test_a_dialect_may_drop_instead_and_every_loss_is_counted() -> None:
    profile = Profile(max_queue=100_000, slow_reader="drop")
    async with serving(profile) as (server, dialect):
        async with (
            Wire.connected(server.port, Connect("slow")) as slow,
            Wire.connected(server.port, Connect("publisher")) as publisher,
        ):
            await slow.send(Subscribe(1, (("t", 0),)))
            assert await slow.next() == SubAck(1, (0,))
            _stop_reading(slow)
            count = 2000
            for number in range(count):
                await publisher.send(Publish("t", b"%08d" % number + bytes(8000)))
            await publisher.send(PingReq())
            assert await publisher.next() == PingResp()
            dropped = server.stats.dropped
            assert dropped > 0
            _read_again(slow)
            await slow.send(PingReq())
            received = len(await slow.until(PingResp()))
            assert received + dropped == count
            assert not dialect.gone


async def test_a_connection_is_not_closed_while_asyncio_sends_on_it() -> None:
    """Its transport would tell twice that it is lost."""
    async with serving() as (server, _), Wire.connected(server.port) as wire:
        (link,) = server.links
        transport = link._transport
        assert transport is not None
        link.pause_writing()
        assert link.client is not None
        link.client.close("enough")
        link.resume_writing()
        assert not transport.is_closing()
        assert await wire.closed() == []


@pytest.mark.parametrize("packet", [PingReq(), Publish("t", b"", 1, packet_id=1)])
def test_a_client_that_asks_and_does_not_read_the_answers_is_closed(
    packet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_mqtt.server.endpoint.client._ANSWERS", 2000)
    stats = EndpointStats()
    client = Client(SmallDialect(), stats, now=0.0)
    client.receive(encode(Connect("asking")), 0.0)
    assert client.take()
    data = encode(packet) * 400
    for _ in range(20):  # who reads may ask for ever
        client.receive(data, 0.0)
        while client.take():
            pass
    assert not client.closed
    for _ in range(6):
        client.receive(data, 0.0)
    assert client.ending == Ending.SLOW
    assert client.queued == 0
    assert stats.slow_readers == 1


async def test_a_client_that_asks_for_pongs_and_does_not_read_them_is_closed() -> None:
    async with serving(Profile(max_queue=100_000, handshake=60)) as (server, _):
        peer = await WebWire.open(server.port)
        _stop_reading(peer.wire)
        before = memory()
        ping = b"\x89\xfd" + bytes(4) + bytes(125)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                await peer.wire.send(ping * 500)
        await eventually(lambda: not server.links)
        assert server.stats.slow_readers == 1
        assert memory() - before < 16_000_000
        peer.wire.close()


async def test_ten_thousand_filters_come_and_go() -> None:
    async with serving() as (server, dialect), Wire.connected(server.port) as wire:
        for start in range(0, 10_000, 500):
            filters = tuple((f"a/+/{n}/#", 0) for n in range(start, start + 500))
            await wire.send(Subscribe(1, filters))
            assert isinstance(await wire.next(), SubAck)
        assert len(dialect.trie) == 10_000
        await wire.send(Publish("a/x/5000/y", b"found"))
        assert await wire.next() == Publish("a/x/5000/y", b"found")
        for start in range(0, 10_000, 500):
            await wire.send(Unsubscribe(1, tuple(f"a/+/{n}/#" for n in range(start, start + 500))))
            assert await wire.next() == UnsubAck(1)
        assert len(dialect.trie) == 0


# --- starting and stopping --------------------------------------------------------------------


async def test_port_0_is_a_free_one_that_stays_the_same() -> None:
    async with serving() as (server, _):
        port = server.port
        assert port > 0
        assert server.url == f"mqtt://127.0.0.1:{port}"
        async with Wire.connected(port) as wire:
            await server.restart()
            assert await wire.closed() == []
        assert server.port == port
        async with Wire.connected(port):
            pass


async def test_a_port_in_use_is_an_error_that_says_so() -> None:
    async with serving() as (server, _):
        other = EndpointServer(SmallDialect(), port=server.port)
        with pytest.raises(ConnectError, match=str(server.port)):
            await other.start()
        await other.stop()


async def test_stop_returns_within_a_second_whatever_the_clients_do() -> None:
    async with serving(Profile(max_queue=50_000_000)) as (server, dialect):
        silent = await Wire.open(server.port)
        half = await Wire.open(server.port)
        await half.send(encode(Connect("x"))[:5])
        web = await Wire.open(server.port)
        await web.send(b"GET / HTTP/1.1\r\n")
        async with Wire.connected(server.port, Connect("stopped")) as stopped:
            await stopped.send(Subscribe(1, (("t", 0),)))
            assert await stopped.next() == SubAck(1, (0,))
            _stop_reading(stopped)
            for _ in range(100):
                await stopped.send(Publish("t", bytes(60_000)))
            await eventually(lambda: len(dialect.published) == 100)
            watch = Stopwatch()
            await server.stop()
            await server.stop()
            assert watch.seconds < 1
            assert len(dialect.gone) == 1
        for wire in (silent, half, web):
            wire.close()


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def tls(authority: Authority) -> tuple[ServerTLS, ssl.SSLContext]:
    certificate = authority.issue("endpoint")
    context = ssl.create_default_context(cafile=authority.cafile)
    return ServerTLS(certificate.certfile, certificate.keyfile), context


async def test_tls_and_what_is_not_tls(tls: tuple[ServerTLS, ssl.SSLContext]) -> None:
    settings, context = tls
    async with serving(tls=settings) as (server, _):
        assert server.url.startswith("mqtts://")
        async with Wire.connected(server.port, tls=context) as wire:
            await wire.send(PingReq())
            assert await wire.next() == PingResp()
        plain = await Wire.open(server.port)
        await plain.send(Connect("plain"))
        async with asyncio.timeout(DEADLINE):  # an alert of TLS may come first
            with contextlib.suppress(ConnectionError):
                await plain.reader.read()
        plain.close()
        await eventually(lambda: not server.links)
    async with serving(Profile(handshake=0.1), tls=settings) as (server, _):
        silent = await Wire.open(server.port)
        assert await silent.closed() == []
        silent.close()
        await eventually(lambda: not server.links)


async def test_a_half_open_tls_handshake_does_not_hold_up_stop(
    tls: tuple[ServerTLS, ssl.SSLContext],
) -> None:
    async with serving(tls=tls[0]) as (server, _):
        wire = await Wire.open(server.port)
        await eventually(lambda: len(server.links) == 1)
        watch = Stopwatch()
        await server.stop()
        assert watch.seconds < 1
        wire.close()


async def test_certificate_files_that_are_not_there_are_an_error() -> None:
    server = EndpointServer(SmallDialect(), tls=ServerTLS("/nonexistent.crt", "/nonexistent.key"))
    with pytest.raises(TLSProblem, match="nonexistent"):
        await server.start()


# --- HTTP and WebSocket ------------------------------------------------------------------------


async def test_http_is_answered_on_the_same_port() -> None:
    async with serving() as (server, _):
        for sent, status, body in (
            (b"GET /x?y=1 HTTP/1.1\r\nHost: h\r\n\r\n", b" 200 ", b"GET /x"),
            (b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", b" 200 ", b"abc"),
            (b"HEAD /x HTTP/1.1\r\nHost: h\r\n\r\n", b" 200 ", b"close\r\n\r\n"),
            (b"GET /crash HTTP/1.1\r\nHost: h\r\n\r\n", b" 500 ", b"Internal"),
            (b"GET\r\n\r\n", b" 400 ", b"Bad Request"),
            (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000, b" 431 ", b""),
            (
                b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999\r\n\r\n" + bytes(99_999),
                b" 413 ",
                b"",
            ),
        ):
            wire = await Wire.open(server.port)
            wire.writer.write(sent)
            async with asyncio.timeout(DEADLINE):
                answer = b""
                with contextlib.suppress(ConnectionError):
                    while chunk := await wire.reader.read(65536):
                        answer += chunk
            assert status in answer.partition(b"\r\n")[0], sent[:40]
            assert answer.endswith(body) or body in answer
            wire.close()


async def test_mqtt_over_websocket_on_any_path_and_in_any_frames() -> None:
    async with serving() as (server, _):
        for path in ("/", "/mqtt", "/x/y"):
            peer = await WebWire.open(server.port, path)
            assert peer.subprotocol == "mqtt"
            data = encode(Connect("ws")) + encode(Subscribe(1, (("t", 0),))) + encode(PingReq())
            for cut in (data[:3], data[3:20], data[20:]):
                await peer.wire.send(peer.machine.send(ws.BytesMessage(data=cut)))
            assert await peer.next() == ConnAck(0)
            assert await peer.next() == SubAck(1, (0,))
            assert await peer.next() == PingResp()
            async with Wire.connected(server.port) as other:
                await other.send(Publish("t", b"from tcp"))
                assert await peer.next() == Publish("t", b"from tcp")
            await peer.wire.send(peer.machine.send(ws.CloseConnection(code=1000)))
            async with asyncio.timeout(DEADLINE):
                while peer.closed is None:
                    await peer.pump()
            peer.wire.close()
        await eventually(lambda: not server.links)


async def test_the_subprotocol_is_the_first_that_both_know_or_none() -> None:
    async with serving(Profile(subprotocols=("mqttv3.1", "mqtt"))) as (server, _):
        for offered, chosen in (
            (("mqtt", "mqttv3.1"), "mqttv3.1"),
            (("other", "mqtt"), "mqtt"),
            (("other",), None),
            ((), None),
        ):
            peer = await WebWire.open(server.port, "/", offered)
            assert peer.subprotocol == chosen
            peer.wire.close()


async def test_text_frames_where_the_dialect_takes_them() -> None:
    for allowed in (True, False):
        async with serving(Profile(text_frames=allowed)) as (server, _):
            peer = await WebWire.open(server.port)
            text = encode(Connect("t")).decode()
            await peer.wire.send(peer.machine.send(ws.TextMessage(data=text)))
            if allowed:
                assert await peer.next() == ConnAck(0)
            else:
                while peer.closed is None:
                    await peer.pump()
                assert peer.closed == 1003
            peer.wire.close()


async def test_a_websocket_ping_is_answered_and_a_bad_frame_closes() -> None:
    async with serving() as (server, _):
        peer = await WebWire.open(server.port)
        await peer.wire.send(peer.machine.send(ws.Ping(payload=b"x")))
        async with asyncio.timeout(DEADLINE):
            assert b"x" in await peer.wire.reader.read(100)
        await peer.wire.send(b"\x82\x05hello")  # a client's frame without a mask
        async with asyncio.timeout(DEADLINE):
            while await peer.wire.reader.read(100):
                pass
        peer.wire.close()


async def test_an_upgrade_that_is_none_is_refused() -> None:
    async with serving() as (server, _):
        key = base64.b64encode(bytes(16)).decode()
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        old = f"{upgrade}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 7\r\n"
        for headers in (upgrade, old):
            wire = await Wire.open(server.port)
            await wire.send(f"GET / HTTP/1.1\r\nHost: h\r\n{headers}\r\n".encode())
            async with asyncio.timeout(DEADLINE):
                assert b" 400 " in (await wire.reader.read()).partition(b"\r\n")[0]
            wire.close()


async def test_without_sniffing_http_is_no_mqtt() -> None:
    async with serving(Profile(sniff=False)) as (server, _):
        wire = await Wire.open(server.port)
        await wire.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await wire.closed() == []
        assert server.stats.late == 0
        wire.close()


# --- another implementation ---------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "websockets"])
@pytest.mark.parametrize("level", [paho.MQTTv311, paho.MQTTv31])
async def test_paho_speaks_with_the_endpoint(transport: Any, level: Any) -> None:
    profile = Profile(levels=frozenset({("MQTT", 4), ("MQIsdp", 3)}))
    async with serving(profile) as (server, _):
        loop = asyncio.get_running_loop()
        received: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        subscribed = asyncio.Event()
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="p", protocol=level, transport=transport
        )

        def on_message(_client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
            item = (message.topic, bytes(message.payload))
            loop.call_soon_threadsafe(received.put_nowait, item)

        def on_connect(client: paho.Client, *_: Any) -> None:
            client.subscribe("a/#", 1)

        def on_subscribe(*_: Any) -> None:
            loop.call_soon_threadsafe(subscribed.set)

        client.on_message = on_message
        client.on_connect = on_connect
        client.on_subscribe = on_subscribe
        await asyncio.to_thread(client.connect, "127.0.0.1", server.port, 5)
        client.loop_start()
        try:
            async with asyncio.timeout(10):
                await subscribed.wait()
                infos = [client.publish("a/b", b"%d" % n, qos=n % 3) for n in range(30)]
                found = [await received.get() for _ in range(30)]
                for info in infos:
                    await asyncio.to_thread(info.wait_for_publish, 5)
                    assert info.is_published()
            assert found == [("a/b", b"%d" % n) for n in range(30)]
        finally:
            client.disconnect()
            await asyncio.to_thread(client.loop_stop)


# --- what dialects are told, and a server that falls silent --------------------------------


class Told(SmallDialect):
    """Remembers how connections ended."""

    def __init__(self, profile: Profile | None = None) -> None:
        super().__init__(profile)
        self.endings: list[Ending | None] = []

    def disconnected(self, client: Client, *, clean: bool) -> None:
        super().disconnected(client, clean=clean)
        self.endings.append(client.ending)

    def rejected(self, client: Client) -> None:
        self.endings.append(client.ending)


@pytest.mark.slow
async def test_the_kind_of_ending_is_told_with_the_reason() -> None:
    dialect = Told(Profile(max_packet=1000, handshake=1.0))
    async with EndpointServer(dialect) as server:
        async with Wire.connected(server.port) as wire:
            await wire.send(Disconnect())
            await wire.closed()
        async with Wire.connected(server.port) as wire:
            await wire.send(Publish("a", bytes(1001)))
            await wire.closed()
        async with Wire.connected(server.port) as wire:
            await wire.send(Connect("again"))
            await wire.closed()
        async with Wire.connected(server.port, Connect("still", keepalive=1)) as wire:
            await wire.closed()
        async with Wire.connected(server.port):
            pass
        await eventually(lambda: len(dialect.endings) == 5)
        wire = await Wire.open(server.port)
        await wire.send(Connect("old", protocol="MQTT", level=3))
        await wire.closed()
        wire.close()
        wire = await Wire.open(server.port)
        await wire.closed()
        wire.close()
    assert dialect.endings == [
        Ending.DISCONNECT, Ending.TOO_LARGE, Ending.PROTOCOL, Ending.SILENT, Ending.LOST,
        Ending.REFUSED, Ending.LATE,
    ]  # fmt: skip


@pytest.mark.slow
async def test_a_paused_server_answers_nobody_and_closes_nobody() -> None:
    async with (
        EndpointServer(SmallDialect()) as server,
        Wire.connected(server.port, Connect("early", keepalive=1)) as early,
    ):
        server.pause()
        await early.send(PingReq())
        late = await Wire.open(server.port)
        await late.send(Connect("late"))
        for wire in (early, late):
            with pytest.raises(TimeoutError):
                await wire.next(within=0.9)
        server.resume()
        assert await early.next() == PingResp()
        assert await late.next() == ConnAck(0)
        late.close()


async def test_another_protocol_is_answered_where_the_dialect_says_so() -> None:
    async with serving(Profile(answer_other_names=True)) as (server, _):
        wire = await Wire.open(server.port)
        await wire.send(bytes.fromhex(FIRST["another protocol"]))
        assert await wire.closed() == [ConnAck(1)]
        wire.close()
