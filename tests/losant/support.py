"""A broker in a thread that answers only as told, and what tests of the clients share."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    RejectConnection,
    Request,
)

from pubsub_losant import Device
from tests.losant.vectors import DEVICE

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 4, 8, 10, 12, 14

ACCEPT = b"\x20\x02\x00\x00"


def publish(topic: str, payload: bytes) -> bytes:
    """Return a PUBLISH at QoS 0."""
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name + payload
    size, length = len(body), b""
    while True:
        size, digit = divmod(size, 128)
        length += bytes([digit | (128 if size else 0)])
        if not size:
            return b"\x30" + length + body


def command(payload: bytes | str, device_id: str = DEVICE) -> bytes:
    """Return a command as it is on the wire."""
    data = payload.encode() if isinstance(payload, str) else payload
    return publish(f"losant/{device_id}/command", data)


@dataclass(frozen=True)
class Packet:
    """One packet of the client.

    Attributes:
        raw: All of it.
        connection: Number of the connection, from 1.
    """

    raw: bytes
    body: bytes
    connection: int
    at: float

    @property
    def type(self) -> int:
        return self.raw[0] >> 4

    @property
    def topic(self) -> str:
        """Topic of a PUBLISH."""
        return self.body[2 : 2 + int.from_bytes(self.body[:2], "big")].decode()

    @property
    def payload(self) -> bytes:
        """Payload of a PUBLISH."""
        start = 2 + int.from_bytes(self.body[:2], "big")
        return self.body[start + (2 if self.raw[0] & 6 else 0) :]

    @property
    def packet_id(self) -> bytes:
        if self.type == PUBLISH:
            start = 2 + int.from_bytes(self.body[:2], "big")
            return self.body[start : start + 2]
        return self.body[:2]

    @property
    def filters(self) -> list[tuple[str, int]]:
        """What a SUBSCRIBE asks for."""
        found, at = [], 2
        while at < len(self.body):
            size = int.from_bytes(self.body[at : at + 2], "big")
            found.append((self.body[at + 2 : at + 2 + size].decode(), self.body[at + 2 + size]))
            at += size + 3
        return found


class _Stream:
    """Bytes of one connection, out of WebSocket frames where there are any."""

    def __init__(self, sock: socket.socket, *, websocket: bool) -> None:
        self._sock = sock
        self._machine = WSConnection(ConnectionType.SERVER) if websocket else None
        self.path = ""
        self._buffer = b""

    def handshake(self, reject: int) -> bool:
        machine = self._machine
        if machine is None:
            return True
        while True:
            machine.receive_data(self._sock.recv(65536))
            for event in machine.events():
                if isinstance(event, Request):
                    self.path = event.target
                    assert "mqtt" in event.subprotocols
                    if reject:
                        self._sock.sendall(machine.send(RejectConnection(status_code=reject)))
                        return False
                    self._sock.sendall(machine.send(AcceptConnection(subprotocol="mqtt")))
                    return True

    def exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = self._sock.recv(65536)
            if not data:
                raise EOFError
            if self._machine is None:
                self._buffer += data
                continue
            self._machine.receive_data(data)
            for event in self._machine.events():
                if isinstance(event, BytesMessage):
                    self._buffer += bytes(event.data)
                elif isinstance(event, Ping):
                    self._sock.sendall(self._machine.send(event.response()))
                elif isinstance(event, CloseConnection):
                    raise EOFError
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def send(self, data: bytes) -> None:
        if self._machine is not None:
            data = self._machine.send(BytesMessage(data=data))
        self._sock.sendall(data)


@dataclass
class ScriptedBroker:
    """What it answers can be changed while it runs.

    Attributes:
        connacks: Answers to the next CONNECTs, before *connack*; None is silence.
        hangs_up: Close a connection as soon as it was accepted by the system.
    """

    tls: ssl.SSLContext | None = None
    websocket: bool = False
    reject: int = 0
    connack: bytes | None = ACCEPT
    connacks: deque[bytes | None] = field(default_factory=deque)
    suback: bool = True
    suback_code: int = 0
    puback: bool = True
    pingresp: bool = True
    hangs_up: bool = False
    reads: bool = True
    packets: list[Packet] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    tls_errors: list[Exception] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._streams: list[tuple[_Stream, socket.socket]] = []
        self._sockets: list[socket.socket] = []
        self._acceptor: threading.Thread | None = None
        self._listener: socket.socket | None = None

    def start(self) -> None:
        listener = self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        listener, self._listener = self._listener, None
        if listener is None or self._acceptor is None:
            return
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        self._acceptor.join(5)
        assert not self._acceptor.is_alive()
        self.cut()
        for sock in self._sockets:  # those that are in the middle of a handshake, too
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()
        for sock in self._sockets:
            sock.close()
        self._threads.clear()
        self._sockets.clear()

    def _spawn(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.accepted.append(time.monotonic())
            if self.hangs_up:
                sock.close()
                continue
            self._sockets.append(sock)
            self._spawn(self._serve, sock, len(self.accepted))

    def _serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, EOFError):
            if self.tls is not None:
                try:
                    sock = self.tls.wrap_socket(sock, server_side=True)
                    self._sockets.append(sock)
                except OSError as exc:
                    self.tls_errors.append(exc)
                    sock.close()
                    return
            stream = _Stream(sock, websocket=self.websocket)
            self._streams.append((stream, sock))
            if stream.handshake(self.reject):
                self.paths.append(stream.path)
                while self.reads:
                    self._one(stream, number)
        if self.reads:
            sock.close()

    def _one(self, stream: _Stream, number: int) -> None:
        raw = stream.exactly(1)
        size = shift = 0
        while True:
            byte = stream.exactly(1)
            raw += byte
            size |= (byte[0] & 127) << shift
            shift += 7
            if byte[0] < 128:
                break
        body = stream.exactly(size)
        packet = Packet(raw + body, body, number, time.monotonic())
        answer = self._answer(packet)
        self.packets.append(packet)
        if answer:
            stream.send(answer)
        if packet.type == DISCONNECT:
            raise EOFError

    def _answer(self, packet: Packet) -> bytes | None:
        match packet.type:
            case 1:
                return self.connacks.popleft() if self.connacks else self.connack
            case 3 if packet.raw[0] & 6 and self.puback:
                return b"\x40\x02" + packet.packet_id
            case 8 if self.suback:
                codes = bytes([self.suback_code]) * len(packet.filters)
                return b"\x90" + bytes([2 + len(codes)]) + packet.packet_id + codes
            case 10:
                return b"\xb0\x02" + packet.packet_id
            case 12 if self.pingresp:
                return b"\xd0\x00"
            case _:
                return None

    def of(self, kind: int) -> list[Packet]:
        """Return the packets of a type so far."""
        return [packet for packet in self.packets if packet.type == kind]

    def send(self, data: bytes) -> None:
        """Send bytes to the last client."""
        self._streams[-1][0].send(data)

    def cut(self) -> None:
        """End every connection."""
        streams, self._streams = self._streams, []
        for _, sock in streams:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


@contextmanager
def scripted(**options: Any) -> Iterator[ScriptedBroker]:
    broker = ScriptedBroker(**options)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def make(broker: ScriptedBroker, kind: type[Any] = Device, **options: Any) -> Any:
    """Return a device that dials *broker*, quick to try again."""
    usual: dict[str, Any] = {
        "secure": broker.tls is not None,
        "transport": "websockets" if broker.websocket else "tcp",
        "host": "127.0.0.1",
        "port": broker.port,
        "reconnect_min": 0.02,
        "reconnect_max": 0.05,
    }
    return kind(DEVICE, "AK", "SEC", **{**usual, **options})


def limits_within(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the limits of devices that are made from now on count for so long only."""
    patch.setattr("pubsub_losant.pacing_rules.RATE", (300, seconds))
    patch.setattr("pubsub_losant.pacing_rules.RATE_PER_TOPIC", (30, seconds))
    patch.setattr("pubsub_losant.pacing_rules.MARGIN", 0.0)


@dataclass
class Events:
    """Every event of a device, in order."""

    seen: list[tuple[Any, ...]] = field(default_factory=list)

    def watch(self, device: Any, *names: str) -> Events:
        for name in names or ("connect", "reconnect", "close", "command", "disconnect", "error"):
            device.add_event_observer(name, self._observer(name, device))
        return self

    def _observer(self, name: str, subject: Any) -> Callable[..., None]:
        def observe(device: Any, *args: Any) -> None:
            assert device is subject
            self.seen.append((name, *args))

        return observe

    @property
    def names(self) -> list[str]:
        return [each[0] for each in self.seen]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [each[1:] for each in self.seen if each[0] == name]


def turn_until(device: Device, condition: Callable[[], object], *, within: float = 20.0) -> None:
    """Run the loop until *condition* is true."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s"
        device.loop(0.02)


def wait_until(condition: Callable[[], object], *, within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s"
        time.sleep(0.002)


@contextmanager
def connected(
    broker: ScriptedBroker, kind: type[Any] = Device, **options: Any
) -> Iterator[tuple[Any, Events]]:
    """A device in non-blocking mode whose ``connect`` was told, and all its events."""
    device = make(broker, kind, **options)
    events = Events().watch(device)
    device.connect(blocking=False)
    try:
        turn_until(device, lambda: "connect" in events.names)
        yield device, events
    finally:
        device.close()


@contextmanager
def in_thread(device: Device) -> Iterator[threading.Thread]:
    """A blocking ``connect`` in a thread of its own, closed in the end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            device.connect()
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.failures = failures  # type: ignore[attr-defined] # for the test to look at
    thread.start()
    try:
        yield thread
    finally:
        device.close()
        thread.join(5)
        assert not thread.is_alive()
