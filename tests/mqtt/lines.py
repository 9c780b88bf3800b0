"""A connection with the broker's end of its socket in hand: no loop, no server, no waiting."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from pubsub_core.errors import ConnectError
from pubsub_mqtt.connection import Connection, Outgoing, Session, SessionSettings
from pubsub_mqtt.connection.transport import BufferedSocket
from pubsub_mqtt.packets import Incoming

ACCEPT = bytes.fromhex("20 02 00 00")
ACCEPT_PRESENT = bytes.fromhex("20 02 01 00")
ACCEPT_5 = bytes.fromhex("20 03 00 00 00")
ACCEPT_5_PRESENT = bytes.fromhex("20 03 01 00 00")


class Line:
    """A `Connection` under test and the peer's socket.

    Attributes:
        now: What the connection takes for the time.
    """

    def __init__(self, *, backend: str = "mqtt", **settings: Any) -> None:
        settings.setdefault("client_id", "me")
        settings.setdefault("versions", (4,))
        self.now = 1000.0
        self.connection = Connection(
            SessionSettings(**settings), backend=backend, clock=lambda: self.now
        )
        self.peer: socket.socket | None = None
        self.messages: list[Incoming] = []
        self.sessions: list[Session] = []
        self.lost: list[ConnectError] = []
        self.done: list[Outgoing] = []
        self.notices: list[tuple[str, str, str]] = []
        self.connection.on_message = self.messages.append
        self.connection.on_session = self.sessions.append
        self.connection.on_lost = self.lost.append
        self.connection.on_notice = lambda *notice: self.notices.append(notice)

    def begin(self, *, read: bool = True) -> bytes:
        """Start a session; return the CONNECT, which the peer has read if *read* says so."""
        self.close_peer()
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.connection.begin(BufferedSocket(ours), where="broker.example:1883")
        if not read:
            self.connection.flush()
            return b""
        return self.sent()

    def open(self, accept: bytes | None = None, *, release: bool = True) -> None:
        """Start a session and accept it."""
        self.begin()
        if accept is None:
            accept = ACCEPT_5 if self.connection.version == 5 else ACCEPT
        self.say(accept)
        assert self.connection.connected
        if release:
            self.connection.release()

    def sent(self) -> bytes:
        """Return what the connection wrote since the last call."""
        self.connection.flush()
        assert self.peer is not None
        parts: list[bytes] = []
        while True:
            try:
                data = self.peer.recv(1 << 20)
            except BlockingIOError:
                break
            if not data:
                break
            parts.append(data)
            self.connection.flush()
        return b"".join(parts)

    def packets(self) -> list[bytes]:
        """Return what the connection wrote since the last call, packet by packet."""
        return split(self.sent())

    def say(self, data: bytes) -> None:
        """Let the broker say *data*."""
        assert self.peer is not None
        self.peer.sendall(data)
        self.connection.feed()

    def hang_up(self) -> None:
        """Let the broker close the stream."""
        self.close_peer()
        self.connection.feed()

    def publish(self, topic: str = "t", payload: bytes = b"", **options: Any) -> Outgoing:
        return self.connection.publish(topic, payload, on_done=self.done.append, **options)

    def close_peer(self) -> None:
        if self.peer is not None:
            self.peer.close()
            self.peer = None

    def close(self) -> None:
        self.connection.end()
        self.close_peer()


def split(data: bytes) -> list[bytes]:
    """Cut a stream into packets; none may be left incomplete."""
    packets: list[bytes] = []
    while data:
        length, shift, at = 0, 0, 1
        while True:
            length |= (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
        assert len(data) >= at + length, f"an incomplete packet {data!r}"
        packets.append(data[: at + length])
        data = data[at + length :]
    return packets


def packet_id(packet: bytes) -> int:
    """Return the packet id of a PUBLISH above QoS 0 of less than 128 bytes."""
    at = 4 + int.from_bytes(packet[2:4], "big")
    return int.from_bytes(packet[at : at + 2], "big")


@pytest.fixture
def lines() -> Iterator[type[Line]]:
    """Make lines that are closed after the test."""
    made: list[Line] = []

    class Kept(Line):
        def __init__(self, *, backend: str = "mqtt", **settings: Any) -> None:
            super().__init__(backend=backend, **settings)
            made.append(self)

    yield Kept
    for line in made:
        line.close()
