"""A client made of nothing but packets, and a small dialect, for tests of endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Sequence

from wsproto import ConnectionType, WSConnection
from wsproto import events as ws

from pubsub_core.trie import HandlerTrie
from pubsub_mqtt.server.endpoint import Client, Dialect, HttpRequest, HttpResponse, Profile
from pubsub_mqtt.server.endpoint.packets import (
    ConnAck,
    Connect,
    Decoder,
    Packet,
    Publish,
    Subscribe,
    Unsubscribe,
    encode,
    encode_publish,
)

__all__ = ["DEADLINE", "SmallDialect", "WebWire", "Wire"]

DEADLINE = 20.0


class Wire:
    """One connection; every wait has a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.decoder = Decoder()

    @classmethod
    async def open(cls, port: int, *, tls: ssl.SSLContext | None = None) -> Wire:
        async with asyncio.timeout(DEADLINE):
            return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls))

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(
        cls,
        port: int,
        connect: Connect | None = None,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> AsyncIterator[Wire]:
        """Yield a connection whose CONNECT was accepted."""
        wire = await cls.open(port, tls=tls)
        try:
            await wire.send(connect or Connect("tester"))
            assert await wire.next() == ConnAck(0)
            yield wire
        finally:
            wire.close()

    def close(self) -> None:
        self.writer.transport.abort()

    async def send(self, *packets: Packet | bytes) -> None:
        self.writer.write(
            b"".join(each if isinstance(each, bytes) else encode(each) for each in packets)
        )
        async with asyncio.timeout(DEADLINE):
            await self.writer.drain()

    async def next(self, *, within: float = DEADLINE) -> Packet:
        """Return the next packet; EOFError when the server closed."""
        async with asyncio.timeout(within):
            while True:
                packet = self.decoder.next_packet()
                if packet is not None:
                    return packet
                try:
                    data = await self.reader.read(65536)
                except ConnectionError:
                    data = b""
                if not data:
                    raise EOFError
                self.decoder.receive(data)

    async def until(self, last: Packet) -> list[Packet]:
        """Return what arrives before *last*."""
        found: list[Packet] = []
        while (packet := await self.next()) != last:
            found.append(packet)
        return found

    async def closed(self, *, within: float = DEADLINE) -> list[Packet]:
        """Wait until the server closes; return the packets before that."""
        found: list[Packet] = []
        async with asyncio.timeout(within):
            with contextlib.suppress(EOFError):
                while True:
                    found.append(await self.next(within=within))
        return found


class WebWire:
    """A WebSocket client that carries packets in frames as it is told."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.machine = WSConnection(ConnectionType.CLIENT)
        self.accepted = False
        self.subprotocol: str | None = None
        self.closed: int | None = None

    @classmethod
    async def open(
        cls,
        port: int,
        path: str = "/",
        protocols: tuple[str, ...] = ("mqtt",),
        *,
        tls: ssl.SSLContext | None = None,
    ) -> WebWire:
        """Return a client whose upgrade was accepted."""
        found = cls(await Wire.open(port, tls=tls))
        request = ws.Request(host="h", target=path, subprotocols=list(protocols))
        await found.wire.send(found.machine.send(request))
        while not found.accepted:
            await found.pump()
        return found

    async def send(self, *frames: bytes | str) -> None:
        """Send each as a frame of its own; a text as a text frame."""
        for frame in frames:
            event = (
                ws.TextMessage(data=frame)
                if isinstance(frame, str)
                else ws.BytesMessage(data=frame)
            )
            await self.wire.send(self.machine.send(event))

    async def pump(self) -> bytes:
        """Take what arrives next; return the payload in it."""
        async with asyncio.timeout(DEADLINE):
            data = await self.wire.reader.read(65536)
        self.machine.receive_data(data or None)
        payload = b""
        for event in self.machine.events():
            match event:
                case ws.AcceptConnection():
                    self.accepted, self.subprotocol = True, event.subprotocol
                case ws.BytesMessage():
                    payload += bytes(event.data)
                case ws.CloseConnection():
                    self.closed = event.code
                case _:
                    pass
        return payload

    async def next(self) -> Packet:
        """Return the next packet."""
        while (packet := self.wire.decoder.next_packet()) is None:
            self.wire.decoder.receive(await self.pump())
        return packet


class SmallDialect(Dialect):
    """MQTT's matching, everybody may do everything, and what happened is kept.

    Attributes:
        refuse: Return code for the next CONNECTs.
        take_over: Whether a client closes the one with the same identifier.
        held: Messages that wait for `release`, when *hold* is set.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        self.profile = profile or Profile()
        self.trie: HandlerTrie[Client] = HandlerTrie()
        self.by_id: dict[str, Client] = {}
        self.refuse = 0
        self.take_over = False
        self.hold = False
        self.held: list[tuple[Client, Publish]] = []
        self.published: list[Publish] = []
        self.gone: list[tuple[str, bool, str]] = []

    def connect(self, client: Client, packet: Connect) -> int:
        if self.refuse:
            return self.refuse
        if self.take_over and packet.client_id in self.by_id:
            self.by_id[packet.client_id].close("somebody else has its identifier")
        self.by_id[packet.client_id] = client
        client.state = set[str]()
        return 0

    def publish(self, client: Client, packet: Publish) -> bool:
        self.published.append(packet)
        if packet.topic == "crash":
            raise RuntimeError("a mistake in the dialect")
        data = encode_publish(packet.topic, packet.payload)
        for other in self.trie.match(packet.topic):
            other.send(data)
        if self.hold:
            self.held.append((client, packet))
        return not self.hold

    def subscribe(self, client: Client, packet: Subscribe) -> Sequence[int]:
        for text, _ in packet.filters:
            self.trie.add(text, client)
            client.state.add(text)
        return [qos for _, qos in packet.filters]

    def unsubscribe(self, client: Client, packet: Unsubscribe) -> None:
        for text in packet.filters:
            self.trie.remove(text, client)
            client.state.discard(text)

    def disconnected(self, client: Client, *, clean: bool) -> None:
        for text in client.state:
            self.trie.remove(text, client)
        assert client.packet is not None
        self.gone.append((client.packet.client_id, clean, client.reason))

    def http(self, request: HttpRequest) -> HttpResponse:
        if request.path == "/crash":
            raise RuntimeError("a mistake in the dialect")
        return HttpResponse(200, f"{request.method} {request.path}".encode() + request.body)
