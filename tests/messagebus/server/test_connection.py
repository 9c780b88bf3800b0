"""Connections to a distributor: handshakes, hostile bytes, slow readers, every kind of end."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pubsub_messagebus.protocol import (
    DataPacket,
    ForwardedMulticastData,
    ForwardedSubscriptionRequest,
    HandshakeForm,
    basic_handshake,
    encode_notification_request,
    encode_subscription_request,
    token_handshake,
)
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import (
    CallableServerAuthenticator,
    Refused,
    User,
)
from tests.messagebus.raw import Raw
from tests.messagebus.vectors import MALFORMED, MALFORMED_HANDSHAKES
from tests.servers import eventually

# The first bytes of a connection, and the wrong dialect, have tests of their own.
HARMFUL = [
    vector
    for vector in MALFORMED
    if vector["server"] != "n/a"
    and vector["id"] not in ("null-auth-leading-zeros", "bool-dialect-sent-to-content-type-server")
]


def malformed(name: str) -> bytes:
    (found,) = (vector["hex"] for vector in MALFORMED if vector["id"] == name)
    return bytes.fromhex(found)


def connections_of(server: MessageBusServer) -> int:
    return sum(
        isinstance(each, asyncio.Protocol) and getattr(each, "_server", None) is server
        for each in gc.get_objects()
    )


@pytest.mark.parametrize(
    "handshake",
    [
        basic_handshake("tom", "tomsPassword"),
        basic_handshake("tom", "tomsPassword", form="connection-string"),
    ],
)
async def test_both_handshakes_on_one_port_with_messages_in_one_segment(
    passwords: Path, handshake: bytes
) -> None:
    async with MessageBusServer(password_file=str(passwords)) as server:
        async with Raw(server.port) as client:
            client.send(
                handshake,
                encode_notification_request("F", True),
                *(encode_subscription_request("F", str(number), True) for number in range(100)),
            )
            told = await client.take(100)
            assert [message.topic for message in told] == [str(n) for n in range(100)]  # type: ignore[union-attr]
            assert {message.user for message in told} == {"tom"}  # type: ignore[union-attr]


async def test_every_byte_of_a_handshake_may_come_alone(passwords: Path) -> None:
    async with MessageBusServer(password_file=str(passwords)) as server:
        async with Raw(server.port) as client:
            for byte in basic_handshake("tom", "tomsPassword", form="connection-string"):
                client.send(bytes((byte,)))
                await client.writer.drain()
                await asyncio.sleep(0)
            await client.fence()


@pytest.mark.parametrize("vector", MALFORMED_HANDSHAKES, ids=lambda vector: vector["id"])
async def test_malformed_handshakes(
    vector: dict[str, Any], passwords: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    patience = 5 if "accept" in vector["server"] else 0.3
    async with MessageBusServer(password_file=str(passwords), handshake_timeout=patience) as server:
        async with Raw(server.port) as client:
            client.send(bytes.fromhex(vector["hex"]))
            if "accept" in vector["server"]:
                await client.fence()
            else:
                assert await client.closed(within=1.5) == b""
                await eventually(lambda: not server.connections)
                assert server.count.refused + server.count.timeouts == 1
    assert "tomsPassword" not in caplog.text
    assert "wrong" not in caplog.text.replace("wrong user name or password", "")


async def test_a_dribbled_handshake_has_a_deadline(passwords: Path) -> None:
    async with MessageBusServer(password_file=str(passwords), handshake_timeout=0.3) as server:
        async with Raw(server.port) as client:
            dribble = asyncio.ensure_future(client.closed())
            for byte in basic_handshake("tom" * 100, "x"):
                client.send(bytes((byte,)))
                await asyncio.wait([dribble], timeout=0.05)
                if dribble.done():
                    break
            else:
                pytest.fail("every byte was waited for")
            assert await dribble == b""
            assert server.count.timeouts == 1


async def test_without_authentication_one_empty_string_is_passed_over() -> None:
    vector = next(each for each in MALFORMED if each["id"] == "null-auth-leading-zeros")
    async with MessageBusServer(handshake_timeout=0.1) as server:
        async with Raw(server.port) as client:
            client.send(bytes.fromhex(vector["hex"]))
            await client.fence()
            assert list(server.broker.subscribers("F", "T").values()) == [1]
        async with Raw(server.port) as dribbling:
            dribbling.send(b"\0\0")
            assert await dribbling.closed() == b""
        # Who only waits for data need not say anything.
        async with Raw(server.port) as silent:
            async with Raw(server.port) as other:
                await other.fence()
            with pytest.raises(TimeoutError):
                await silent.closed(within=0.25)


async def test_authenticators_of_ones_own() -> None:
    async def check(credentials: Any) -> User:
        if credentials.token.reveal() == "broken":
            raise RuntimeError("a fault of the authenticator")
        if credentials.token.reveal() != "good":
            raise Refused("not that one")
        return User("somebody", "OWN")

    authenticator = CallableServerAuthenticator(check, handshake="token")
    async with MessageBusServer(authenticator=authenticator) as server:
        forms: tuple[HandshakeForm, ...] = ("strings", "connection-string")
        for form in forms:
            async with Raw(server.port) as client:
                client.send(token_handshake("good", form=form))
                await client.fence()
        for token in ("bad", "broken"):
            async with Raw(server.port) as client:
                client.send(token_handshake(token))
                assert await client.closed() == b""
        assert server.count.refused == 2


@pytest.mark.parametrize("vector", HARMFUL, ids=lambda vector: vector["id"])
async def test_malformed_frames_harm_only_their_sender(vector: dict[str, Any]) -> None:
    async with MessageBusServer() as server:
        async with Raw(server.port) as watcher, Raw(server.port) as hostile:
            watcher.send(encode_notification_request("mine", True))
            hostile.add("mine", "T")
            assert (await watcher.next()).is_add
            hostile.send(bytes.fromhex(vector["hex"]))
            reaction: str = vector["server"]
            if "close" in reaction:
                assert await hostile.closed() == b""
                assert (await watcher.next()).is_add is False
                assert server.count.protocol_errors == 1
            elif "disconnect" in reaction:
                hostile.writer.write_eof()
                assert (await watcher.next()).is_add is False
                assert await hostile.closed() == b""
            else:
                await hostile.fence()
                assert server.count.protocol_errors == 0
            await watcher.fence()


async def test_the_wrong_dialect_harms_only_its_sender() -> None:
    wire = malformed("bool-dialect-sent-to-content-type-server")
    async with MessageBusServer(dialect="content_type") as server:
        async with (
            Raw(server.port, dialect="content_type") as good,
            Raw(server.port, dialect="content_type") as wrong,
        ):
            good.add()
            await good.fence()
            wrong.send(wire * 10)
            wrong.writer.write_eof()
            await wrong.closed()
            good.publish(packets=[DataPacket(None, b"x")])
            while (message := await good.next()).data_packets != [DataPacket(None, b"x")]:
                assert message.feed == "F"


@pytest.mark.parametrize("how", ["reset", "close", "half-close", "inside a frame"])
async def test_every_end_of_a_connection_is_the_same(how: str) -> None:
    async with MessageBusServer() as server:
        async with Raw(server.port) as observer, Raw(server.port) as leaving:
            observer.add("F", "A")
            observer.send(encode_notification_request("F", True))
            leaving.add("F", "Z")
            await observer.take(2)
            leaving.publish("F", "A")
            await leaving.fence()
            await observer.next()
            match how:
                case "reset":
                    leaving.reset()
                case "close":
                    leaving.writer.close()
                case "half-close":
                    leaving.writer.write_eof()
                case _:
                    leaving.send(b"\x05\0\0\0\x01")
                    await leaving.writer.drain()
                    leaving.writer.write_eof()
            stale, removed = await observer.take(2)
            assert isinstance(stale, ForwardedMulticastData)
            assert (stale.user, stale.topic, stale.data_packets) == ("", "A", None)
            assert isinstance(removed, ForwardedSubscriptionRequest)
            assert (removed.topic, removed.is_add) == ("Z", False)


async def test_a_subscriber_that_stops_reading_is_disconnected_and_others_are_not() -> None:
    size, count = 10_000, 1_500
    async with MessageBusServer(max_queued_bytes=1024 * 1024) as server:
        async with Raw(server.port) as stalled, Raw(server.port) as fast:
            async with Raw(server.port) as publisher:
                for client in (stalled, fast):
                    client.add()
                    await client.fence()
                stalled.writer.transport.pause_reading()  # type: ignore[attr-defined]
                publisher.send(encode_notification_request("F", True))
                await publisher.next()
                await publisher.next()
                tracemalloc.start()
                for _ in range(count // 100):
                    for _ in range(100):
                        publisher.publish(packets=[DataPacket(None, bytes(size))])
                    async with asyncio.timeout(20):
                        assert len(await fast.take(100)) == 100
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                # 15 MB were published; only what may be queued was kept.
                assert peak < 9_000_000
                assert (await publisher.next()).is_add is False
                assert server.count.slow_consumers == 1


async def test_a_slow_consumer_may_be_kept() -> None:
    async with MessageBusServer(slow_consumer="unbounded", max_queued_bytes=1000) as server:
        async with Raw(server.port) as slow, Raw(server.port) as publisher:
            slow.add()
            await slow.fence()
            slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(200):
                publisher.publish(packets=[DataPacket(None, bytes(50_000))])
            await publisher.fence()
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert len(await slow.take(200)) == 200
            assert server.count.slow_consumers == 0


async def test_small_messages_are_not_held_back() -> None:
    async with MessageBusServer() as server, Raw(server.port) as client:
        await client.fence()
        (connection,) = server.connections
        assert connection.transport is not None
        raw = connection.transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("login", [False, True])
async def test_what_was_wrong_is_let_go_without_a_garbage_collector(
    login: bool, passwords: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Each may have sent much before; a collection of what is old may be long in coming.
    caplog.set_level(logging.CRITICAL, "pubsub_messagebus")  # pytest keeps what is logged
    vectors = MALFORMED_HANDSHAKES if login else MALFORMED
    async with MessageBusServer(password_file=str(passwords) if login else "") as server:
        gc.disable()
        try:
            async with Raw(server.port):
                await eventually(lambda: connections_of(server) == 1)
            for vector in vectors:
                async with Raw(server.port) as client:
                    client.send(bytes.fromhex(vector["hex"]))
                    client.writer.write_eof()
                    await client.closed()
            count = server.count
            assert count.protocol_errors + count.refused > 5
            await eventually(lambda: connections_of(server) == 0, what="nothing is left")
        finally:
            gc.enable()
