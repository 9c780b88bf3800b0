"""The broker itself, for development and tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, ClassVar, cast

from pubsub_core.servers import ServerShell
from pubsub_core.trie import HandlerTrie

from .backend import LIMIT

__all__ = ["LinesServer"]


class LinesServer(ServerShell):
    """Lines of JSON on loopback; the shell brings URL, ``async with`` and restart."""

    backend: ClassVar[str] = "lines"
    scheme: ClassVar[str] = "lines"

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(host=host, port=port)
        self._server: asyncio.Server | None = None
        self._trie: HandlerTrie[asyncio.StreamWriter] = HandlerTrie()
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    async def start(self) -> None:
        """Listen, on the same port as before when started again."""
        if self._server is not None:
            return
        try:
            self._server = await asyncio.start_server(
                self._serve, self.host, self.port, limit=LIMIT
            )
        except OSError as exc:
            raise self.cannot_listen(exc) from exc
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and end every connection."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        serving = list(self._clients)
        for writer in self._clients.values():
            writer.transport.abort()
        if serving:
            await asyncio.wait(serving)
        await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._clients[task] = writer
        filters: set[str] = set()
        try:
            while line := await reader.readline():
                self._answer(json.loads(line), writer, filters)
                await writer.drain()
        except (OSError, ValueError, KeyError):
            pass  # what a client breaks is its own connection
        finally:
            for each in filters:
                self._trie.remove(each, writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            del self._clients[task]

    def _answer(
        self, request: dict[str, Any], writer: asyncio.StreamWriter, filters: set[str]
    ) -> None:
        match request["do"]:
            case "subscribe":
                self._trie.add(request["filter"], writer)
                filters.add(request["filter"])
            case "unsubscribe":
                self._trie.remove(request["filter"], writer)
                filters.discard(request["filter"])
            case "publish":
                message = {"topic": request["topic"], "payload": request["payload"]}
                line = json.dumps(message).encode() + b"\n"
                for receiver in dict.fromkeys(self._trie.match(request["topic"])):
                    receiver.write(line)
            case _:
                pass
        writer.write(json.dumps({"done": request["id"]}).encode() + b"\n")
