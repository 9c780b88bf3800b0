from __future__ import annotations

import asyncio
import socket
from typing import ClassVar

import pytest

from pubsub_core.errors import ConnectError
from pubsub_core.servers import ServerShell, url_of
from pubsub_emitter.server import EmitterServer
from pubsub_losant.server import LosantServer
from pubsub_messagebus.server import MessageBusServer
from pubsub_mqtt.server import AmqttServer, MosquittoServer, MQTTServer


class Small(ServerShell):
    backend: ClassVar[str] = "small"
    scheme: ClassVar[str] = "small"
    server: asyncio.Server | None = None

    @property
    def running(self) -> bool:
        return self.server is not None

    async def start(self) -> None:
        try:
            self.server = await asyncio.start_server(lambda _, w: w.close(), self.host, self.port)
        except OSError as exc:
            raise self.cannot_listen(exc) from exc
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.close()
            await server.wait_closed()


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "a://127.0.0.1:5"), ("::1", "a://[::1]:5"), ("h", "a://h:5")]
)
def test_an_address_of_ipv6_has_brackets_in_a_url(host: str, url: str) -> None:
    assert url_of("a", host, 5) == url


async def test_a_server_listens_as_long_as_the_block_lasts_and_keeps_its_port() -> None:
    server = Small()
    assert (server.port, server.running, server.describe()) == (0, False, {})
    async with server as entered:
        assert entered is server
        assert server.running
        port = server.port
        assert server.url == f"small://127.0.0.1:{port}"
        await server.restart()
        assert (server.running, server.port) == (True, port)
    assert not server.running


@pytest.mark.parametrize(
    "kind", [Small, AmqttServer, EmitterServer, LosantServer, MessageBusServer]
)
async def test_a_port_that_is_taken_is_named(kind: type[Small]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = kind(port=port)
        with pytest.raises(ConnectError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            await server.start()
    assert caught.value.backend == server.backend
    assert not server.running


@pytest.mark.parametrize(
    "kind",
    [AmqttServer, EmitterServer, LosantServer, MessageBusServer, MosquittoServer, MQTTServer],
)
def test_every_embedded_server_has_the_shell(kind: type[ServerShell]) -> None:
    assert issubclass(kind, ServerShell)
    for name in ("__aenter__", "__aexit__"):
        assert getattr(kind, name) is getattr(ServerShell, name)
