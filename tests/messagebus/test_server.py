"""The distributor on real sockets: handshakes, hostile bytes, slow readers, the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
import ssl
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.bus import connect
from pubsub_core.errors import BadOption, ConnectError
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_messagebus.protocol import (
    HEARTBEAT,
    DataPacket,
    Decoder,
    ForwardedMulticastData,
    ForwardedSubscriptionRequest,
    HandshakeForm,
    basic_handshake,
    encode_notification_request,
    encode_subscription_request,
    notice,
    token_handshake,
)
from pubsub_messagebus.server import ListenerOptions, MessageBusServer
from pubsub_messagebus.server.authenticators import (
    CallableServerAuthenticator,
    PasswordFile,
    Refused,
    User,
)
from tests.servers import Authority, LeakCheck, eventually

from .raw import Raw
from .vectors import MALFORMED, MALFORMED_HANDSHAKES


@pytest.fixture(scope="module")
def passwords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("passwords") / "passwords.json"
    file = PasswordFile(path)
    file.add("tom", "tomsPassword")
    file.add("sub", "pw")
    return path


async def test_two_clients_exchange_data() -> None:
    async with MessageBusServer() as server:
        assert server.url == f"messagebus://127.0.0.1:{server.port}"
        async with Raw(server.port) as subscriber, Raw(server.port) as publisher:
            subscriber.add()
            await subscriber.fence()
            publisher.publish(packets=[DataPacket({1}, b"one"), DataPacket(None, b"two")])
            message = await subscriber.next()
            assert isinstance(message, ForwardedMulticastData)
            assert message.data_packets == [DataPacket({1}, b"one"), DataPacket(None, b"two")]
            assert (message.user, message.host) == ("nobody", socket.gethostname())


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


# The first bytes of a connection, and the wrong dialect, have tests of their own.
HARMFUL = [
    vector
    for vector in MALFORMED
    if vector["server"] != "n/a"
    and vector["id"] not in ("null-auth-leading-zeros", "bool-dialect-sent-to-content-type-server")
]


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


def malformed(name: str) -> bytes:
    (found,) = (vector["hex"] for vector in MALFORMED if vector["id"] == name)
    return bytes.fromhex(found)


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


async def test_heartbeats_come_at_their_interval_with_their_bytes() -> None:
    async with MessageBusServer(heartbeat_interval=0.05) as server:
        async with Raw(server.port) as client:
            client.add("__admin__", "heartbeat")
            async with asyncio.timeout(5):
                found = await client.reader.readexactly(3 * len(HEARTBEAT["is_image"]))
            assert found == HEARTBEAT["is_image"] * 3
    async with MessageBusServer() as server:
        async with Raw(server.port) as client:
            client.add("__admin__", "heartbeat")
            await client.fence()
            with pytest.raises(TimeoutError):
                await client.closed(within=0.12)


async def test_listeners_of_two_dialects_share_one_core() -> None:
    server = MessageBusServer()
    number = server.add_listener(ListenerOptions(dialect="content_type"))
    async with server:
        async with (
            Raw(server.port) as old,
            Raw(server.ports[number], dialect="content_type") as new,
        ):
            old.add()
            new.add()
            await old.fence()
            await new.fence()
            new.publish(packets=[DataPacket(None, b"x")])
            for client, flag in ((old, False), (new, "")):
                message = await client.next()
                assert message.flag == flag
                assert message.data_packets == [DataPacket(None, b"x")]


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own, theirs = authority.issue("server"), authority.issue("client", client=True)
    server = MessageBusServer(certfile=own.certfile, keyfile=own.keyfile, cafile=authority.cafile)
    async with server:
        assert server.url.startswith("messagebus+tls://")
        context = ssl.create_default_context(cafile=authority.cafile)
        context.load_cert_chain(theirs.certfile, theirs.keyfile)
        async with Raw(server.port, ssl=context) as client:
            await client.fence()
        stranger = ssl.create_default_context(cafile=authority.cafile)
        async with Raw(server.port, ssl=stranger) as client:
            with pytest.raises((ssl.SSLError, AssertionError, ConnectionError)):
                await client.fence()
    with pytest.raises(BadOption, match="certificate"):
        MessageBusServer(certfile=str(tmp_path / "missing.crt"))


async def test_tls_and_plain_mixed_up_is_guessed(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("server")
    async with (
        MessageBusServer() as plain,
        MessageBusServer(certfile=own.certfile, keyfile=own.keyfile) as secure,
        asyncio.timeout(10),
    ):
        with pytest.raises(ConnectError, match="does that port speak TLS"):
            await connect(f"messagebus+tls://127.0.0.1:{plain.port}", ca_file=authority.cafile)
        for user in ("", "tester:right@"):
            with pytest.raises(ConnectError, match="wants TLS is messagebus\\+tls://"):
                await connect(f"messagebus://{user}127.0.0.1:{secure.port}")


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


async def test_a_flood_leaves_turns_to_others() -> None:
    async with MessageBusServer() as server:
        async with Raw(server.port) as flooding, Raw(server.port) as other:
            flooding.send(encode_subscription_request("F", "T", True) * 30_000)
            watch = Stopwatch()
            await other.fence()
            assert watch.seconds < 1
            await flooding.fence()
            assert list(server.broker.subscribers("F", "T").values()) == [30_000]


async def test_more_bursts_than_can_be_worked_off_at_once() -> None:
    burst = encode_subscription_request("F", "T", True) * 3000
    async with MessageBusServer() as server:
        async with Raw(server.port) as established:
            await established.fence()
            flooding = [await Raw(server.port).__aenter__() for _ in range(60)]
            for client in flooding:
                client.send(burst)
            watch = Stopwatch()
            await established.fence()
            assert watch.seconds < 2
            # What they sent counts, although they have gone.
            for client in flooding:
                await client.__aexit__()
            async with Raw(server.port) as late:
                await late.fence()
            await eventually(lambda: server.stats()["received"] >= 60 * 3000, within=20)
            await eventually(lambda: server.stats()["clients"] == 1)
            assert server.stats()["subscriptions"] == 0


@pytest.mark.slow
async def test_newcomers_do_not_wait_for_all_who_are_busy() -> None:
    # So much that the trips of a newcomer take far less than half of the work.
    count, each = 60, 20_000
    burst = encode_subscription_request("F", "T", True) * each
    async with MessageBusServer() as server, contextlib.AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(Raw(server.port)) for _ in range(count)]
        for client in busy:
            client.send(burst)
        await eventually(lambda: server.stats()["received"] > count * each / 20, within=40)
        async with Raw(server.port) as newcomer:
            await newcomer.fence(40)
        assert server.stats()["received"] < count * each / 2
        for client in busy:
            client.reset()


async def test_newcomers_are_turned_away_while_too_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pubsub_messagebus.server.turns._CROWD", 3)
    monkeypatch.setattr("pubsub_messagebus.server.turns._ROUND", 0)  # one of those who wait
    burst = encode_subscription_request("F", "T", True) * 15_000
    async with MessageBusServer() as server, contextlib.AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(Raw(server.port)) for _ in range(10)]
        for client in busy:
            client.send(burst)
        while not server.turns.full:
            await asyncio.sleep(0)
        async with Raw(server.port) as newcomer:
            assert await newcomer.closed() == b""
        assert server.stats()["turned_away"] == 1
        for client in busy:
            await client.fence(20)
        async with Raw(server.port) as late:
            await late.fence()
        assert list(server.broker.subscribers("F", "T").values()) == [15_000] * 10


async def test_what_came_with_a_login_waits_for_its_turns_like_any_burst(passwords: Path) -> None:
    # More than one turn's work behind the handshake, and more of it than is read at once.
    burst = encode_subscription_request("F", "T", True) * 60_000
    async with MessageBusServer(password_file=str(passwords)) as server:
        async with Raw(server.port) as client:
            client.send(basic_handshake("tom", "tomsPassword"), burst)
            await client.fence()
            assert list(server.broker.subscribers("F", "T").values()) == [60_000]


async def test_many_half_handshakes_do_not_keep_a_good_client_out(passwords: Path) -> None:
    async with MessageBusServer(password_file=str(passwords)) as server:
        half = [await Raw(server.port).__aenter__() for _ in range(200)]
        for client in half:
            client.send(basic_handshake("tom", "x")[:9])
        async with Raw(server.port) as good:
            good.send(basic_handshake("tom", "tomsPassword"))
            await good.fence()
            assert server.count.timeouts == 0, "it waited until the others were given up"
        for client in half:
            await client.__aexit__()


async def test_stopping_closes_every_socket_and_leaves_no_task(passwords: Path) -> None:
    leaks = LeakCheck()
    server = MessageBusServer(password_file=str(passwords), heartbeat_interval=0.01)
    await server.start()
    port = server.port
    clients = [await Raw(port).__aenter__() for _ in range(5)]
    clients[0].send(basic_handshake("tom", "tomsPassword"))
    await clients[0].fence()
    clients[1].send(basic_handshake("tom", "tomsPassword")[:5])
    clients[2].send(basic_handshake("tom", "wrong"))
    await server.stop()
    await server.stop()
    for client in clients:
        assert await client.closed() == b""
        await client.__aexit__()
    assert not server.running
    assert server.broker.empty
    with pytest.raises(ConnectionError):
        await Raw(port).__aenter__()
    # The same port again.
    await server.start()
    assert server.port == port
    await server.restart()
    async with Raw(port) as client:
        client.send(basic_handshake("tom", "tomsPassword"))
        await client.fence()
    await server.stop()
    await eventually(lambda: not leaks.leaks(), what="nothing is left")


def connections_of(server: MessageBusServer) -> int:
    return sum(
        isinstance(each, asyncio.Protocol) and getattr(each, "_server", None) is server
        for each in gc.get_objects()
    )


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


async def test_what_was_queued_reaches_its_reader_when_the_server_stops() -> None:
    server = MessageBusServer()
    await server.start()
    async with Raw(server.port) as subscriber, Raw(server.port) as publisher:
        subscriber.add()
        await subscriber.fence()
        for _ in range(500):
            publisher.publish(packets=[DataPacket(None, bytes(1000))])
        await publisher.fence()
        stopping = asyncio.ensure_future(server.stop())
        received = await subscriber.closed()
        await stopping
    decoder = Decoder("client")
    decoder.feed(received)
    decoder.eof()
    count = 0
    while decoder.next_message() is not None:
        count += 1
    assert count >= 500
    assert received.startswith(b"\x08")


async def test_statistics() -> None:
    async with MessageBusServer() as server:
        async with Raw(server.port) as client:
            client.add()
            client.publish()
            await client.fence()
            stats = server.stats()
            assert stats["connections"] == stats["clients"] == 1
            assert stats["subscriptions"] == 1
            assert stats["multicast"] == stats["delivered"] == 1
            assert stats["bytes_written"] > 0
        await eventually(lambda: server.stats()["connections"] == 0)


async def test_a_configuration_file_of_the_original(tmp_path: Path, passwords: Path) -> None:
    config = tmp_path / "appsettings.json"
    config.write_text(
        json.dumps(
            {
                "distributor": {
                    "heartbeatInterval": "00:00:00.05",
                    "isAuthorizationRequired": False,
                    "allow": ["All"],
                    "feedRoles": {"locked": {"deny": ["Publish"]}},
                }
            }
        )
    )
    async with MessageBusServer(config=str(config)) as server:
        async with Raw(server.port) as client:
            client.add("locked", "T")
            client.publish("locked", "T")
            client.add("__admin__", "heartbeat")
            assert (await client.next()).feed == "__admin__"
    toml = tmp_path / "bus.toml"
    toml.write_text(
        f'password_file = "{passwords}"\nallow = ["Subscribe", "Publish", "Notify"]\n'
        "[feed_roles.locked]\nis_authorized = true\n"
    )
    server = MessageBusServer(config=str(toml))
    assert server.authenticator.handshake == "basic"
    assert server.broker.policy.authorization_required("locked")
    for text in ("allow = 3", 'allow = ["Everything"]', "feed_roles = 1", "is_proxy_allowed = 1"):
        toml.write_text(text)
        with pytest.raises(BadOption):
            MessageBusServer(config=str(toml))
    with pytest.raises(BadOption, match="cannot be read"):
        MessageBusServer(config=str(tmp_path / "missing.toml"))


def test_a_stale_notice_has_the_bytes_of_the_specification() -> None:
    assert notice("TEST", "FOO").hex() == (
        "080000000000000000000000045445535400000003464f4f0100000000"
    )
