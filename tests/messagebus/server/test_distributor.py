"""The distributor on real sockets: handshakes, hostile bytes, slow readers, the end."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path

import pytest

from pubsub_core.bus import connect
from pubsub_core.errors import BadOption, ConnectError
from pubsub_messagebus.protocol import (
    HEARTBEAT,
    DataPacket,
    Decoder,
    ForwardedMulticastData,
    basic_handshake,
)
from pubsub_messagebus.server import ListenerOptions, MessageBusServer
from tests.messagebus.raw import Raw
from tests.servers import Authority, LeakCheck, eventually


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
