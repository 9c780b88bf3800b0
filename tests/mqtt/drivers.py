"""A driver under test, and a port that says nothing."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pubsub_core.errors import (
    ConnectError,
)
from pubsub_mqtt.connection import Connection, Session, SessionSettings, Subscribe
from pubsub_mqtt.connection.address import BrokerAddress
from pubsub_mqtt.connection.asyncio_driver import AsyncioDriver
from pubsub_mqtt.connection.transport import BufferedSocket
from pubsub_mqtt.packets import Incoming
from tests.servers import eventually

HOST = "127.0.0.1"


class Peer:
    """A driver and what came of it."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("versions", (4,))
        self.connection = Connection(SessionSettings(**settings), backend="mqtt")
        self.driver = AsyncioDriver(self.connection)
        self.messages: list[Incoming] = []
        self.lost: list[ConnectError] = []
        self.connection.on_message = self._received
        self.driver.on_lost = self.lost.append
        self.settle = True

    def _received(self, message: Incoming) -> None:
        self.messages.append(message)
        if message.serial and self.settle:
            self.connection.settle(message.serial)

    async def open(self, endpoint: BrokerAddress, **options: Any) -> Session:
        options.setdefault("timeout", 5)
        session = await self.driver.open(endpoint, **options)
        self.connection.release()
        return session

    async def subscribe(self, filter: str, qos: int = 0) -> int:
        request = await self.driver.subscribe(Subscribe(filter, qos))
        refused = self.connection.refusal(request)
        if refused is not None:
            raise refused
        return request.codes[0]

    async def got(self, count: int, *, within: float = 5.0) -> list[Incoming]:
        await eventually(lambda: len(self.messages) >= count, within=within)
        return self.messages


@asynccontextmanager
async def peer(endpoint: BrokerAddress, **settings: Any) -> AsyncIterator[Peer]:
    made = Peer(**settings)
    await made.open(endpoint)
    try:
        yield made
    finally:
        async with asyncio.timeout(5):
            await made.driver.close(drain=1)


def tcp(port: int) -> BrokerAddress:
    return BrokerAddress(HOST, port)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts and says nothing."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


async def round_trip(endpoint: BrokerAddress, topic: str, **settings: Any) -> None:
    async with peer(endpoint, **settings) as made:
        await made.subscribe(topic, 2)
        for qos in (0, 1, 2):
            await made.driver.publish(topic, b"%d" % qos, qos=qos)
        await made.got(3)
        assert sorted(message.payload for message in made.messages) == [b"0", b"1", b"2"]


def held_back(sock: BufferedSocket) -> int:
    """Return how many bytes the system has taken and not sent yet (SIOCOUTQNSD, tcp(7))."""
    answer = fcntl.ioctl(sock.fileno(), 0x894B, bytes(4))
    return int.from_bytes(answer, sys.byteorder)
