"""Quick acknowledgement: for servers that write field by field, and for no other."""

from __future__ import annotations

import asyncio
import socket
import uuid
from typing import Any

from pubsub_messagebus.backend.link import Link
from pubsub_messagebus.protocol import Decoder, encode_forwarded_subscription
from pubsub_messagebus.sockets import Acknowledger
from tests.messagebus.backend.test_session import Deaf, Wire

MESSAGE = encode_forwarded_subscription("u", "h", uuid.uuid4(), "F", "T", True)


class Counting:
    """A socket that counts what is set."""

    def __init__(self, *, broken: bool = False) -> None:
        self.options: list[tuple[int, int, int]] = []
        self._broken = broken

    def setsockopt(self, *option: int) -> None:
        if self._broken:
            raise OSError("the socket is closed")
        self.options.append(option)  # type: ignore[arg-type]  # three of them


def test_whole_messages_and_large_ones_cost_nothing() -> None:
    sock = Counting()
    acknowledger = Acknowledger(sock)
    for size, inside in ((500, False), (3, False), (65536, True), (1460, True)):
        acknowledger.arrived(size, inside=inside)
    assert not sock.options


def test_from_the_first_field_that_comes_alone_every_arrival_is_acknowledged() -> None:
    sock = Counting()
    acknowledger = Acknowledger(sock)
    acknowledger.arrived(1, inside=True)
    acknowledger.arrived(40, inside=False)
    assert sock.options == [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)] * 2
    Acknowledger(Counting(broken=True)).arrived(1, inside=True)
    Acknowledger(None).arrived(1, inside=True)


async def test_the_backend_and_its_link_notice_such_a_server() -> None:
    sock = Counting()

    class Taking(Deaf):
        def take(self, link: Any, message: Any) -> None:
            taken.append(message)

    class Connected(Wire):
        def get_extra_info(self, name: str) -> Any:
            return sock if name == "socket" else None

    taken: list[Any] = []
    link = Link(Taking(), Decoder("client"), asyncio.get_running_loop().time)
    link.connection_made(Connected())  # type: ignore[arg-type]  # stands in for a transport
    link.data_received(MESSAGE * 3)
    assert not sock.options
    for at in range(0, len(MESSAGE), 4):
        link.data_received(MESSAGE[at : at + 4])
    assert len(taken) == 4
    assert len(sock.options) == len(range(0, len(MESSAGE), 4))
