"""A server of a few lines, which says what a test wants and keeps what it hears."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

INFO = b'INFO {"server_id":"F","version":"2.15.1","max_payload":1048576,"headers":true}\r\n'

Answer = Callable[[bytes], bytes]


class FakeServer:
    """Greets, and answers each line with what *answer* makes of it.

    Attributes:
        heard: Everything that clients sent.
        ended: Set when a client has gone.
    """

    def __init__(self, greeting: bytes, answer: Answer) -> None:
        self._greeting = greeting
        self._answer = answer
        self.heard = b""
        self.ended = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        writer.write(self._greeting)
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self.heard += line
                answer = self._answer(line)
                if answer:
                    writer.write(answer)
        writer.transport.abort()
        self.ended.set()


def pong(line: bytes) -> bytes:
    return b"PONG\r\n" if line == b"PING\r\n" else b""


@contextlib.asynccontextmanager
async def fake(greeting: bytes = INFO, answer: Answer = pong) -> AsyncGenerator[FakeServer, None]:
    server = FakeServer(greeting, answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for writer in server.writers:
            writer.transport.abort()
        await listening.wait_closed()
