"""One session with a broker of lines.

Each line is a JSON object. A request has an ``id`` and is answered by ``{"done": id}``; messages
come as ``{"topic": …, "payload": …}``, the payload in base64.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from typing import Any

from pubsub_core.capabilities import ConfirmedBy
from pubsub_core.errors import ConnectError, NotConnected, Outcome, PublishFailed
from pubsub_core.interfaces import Backend, BackendContext, Endpoint, SessionFacts, Sink, WireSub
from pubsub_core.message import InFrame, OutFrame, Receipt

__all__ = ["LinesBackend"]

DEFAULT_PORT = 7300
LIMIT = 4 * 1024 * 1024
"""Longest line that is read."""


class LinesBackend(Backend):
    """Wire work only: what is lost, tried again or filtered is the core's business."""

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._ids = 0

    @property
    def endpoint(self) -> Endpoint:
        """The socket that `open` connects to."""
        address = self.context.address
        return Endpoint(address.host or "localhost", address.port or DEFAULT_PORT)

    async def open(self, sink: Sink) -> SessionFacts:
        """Connect once; the core tries again."""
        host, port = self.endpoint.host, self.endpoint.port
        try:
            reader, self._writer = await asyncio.open_connection(host, port, limit=LIMIT)
        except OSError as exc:
            raise ConnectError(
                f"no connection to {host}:{port}: {exc.strerror or exc}",
                hint="check that the server runs there",
                backend="lines",
                retryable=True,
            ) from exc
        self._reader_task = asyncio.create_task(self._read(reader, sink), name="lines reader")
        try:
            # Whoever accepts connections need not be a server of lines, nor be awake.
            await self._request(do="hello")
        except BaseException:  # a deadline of the core's, too: nothing may be left behind
            await self.close(drain=0.0)
            raise
        return SessionFacts(server="lines")

    async def close(self, *, drain: float) -> None:
        """End the session in any state; waits for answers as long as *drain* allows."""
        waiting = list(self._waiting.values())
        if waiting and drain:
            await asyncio.wait(waiting, timeout=drain)
        writer, self._writer = self._writer, None
        task, self._reader_task = self._reader_task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._give_up()
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def publish(self, out: OutFrame) -> Receipt:
        """Return when the broker has answered."""
        payload = base64.b64encode(out.payload).decode()
        await self._request(do="publish", topic=out.topic, payload=payload)
        return Receipt(out.topic, ConfirmedBy.BROKER)

    async def subscribe(self, want: WireSub) -> int:
        """Return the quality of service once the broker has answered; there is only one."""
        await self._request(do="subscribe", filter=want.filter)
        return 0

    async def unsubscribe(self, want: WireSub) -> None:
        """Return once the broker has answered."""
        await self._request(do="unsubscribe", filter=want.filter)

    async def ping(self) -> float:
        """Return the seconds of a round trip."""
        began = time.perf_counter()
        await self._request(do="ping")
        return time.perf_counter() - began

    async def _request(self, **request: str) -> None:
        writer = self._writer
        if writer is None:
            raise NotConnected("there is no session", backend="lines")
        self._ids += 1
        identity = self._ids
        done = self._waiting[identity] = asyncio.get_running_loop().create_future()
        try:
            # Written at once, so that messages leave in the order of the calls.
            writer.write(json.dumps({"id": identity, **request}).encode() + b"\n")
            await done
        except ConnectionError as exc:
            raise PublishFailed(
                "the session ended before the broker answered",
                outcome=Outcome.UNKNOWN,
                hint="publish again if a duplicate does no harm",
                backend="lines",
                topic=request.get("topic", ""),
            ) from exc
        finally:
            self._waiting.pop(identity, None)

    async def _read(self, reader: asyncio.StreamReader, sink: Sink) -> None:
        error: Exception = ConnectionError("the server closed the connection")
        try:
            while line := await reader.readline():
                self._take(json.loads(line), sink)
        except (OSError, ValueError) as exc:
            error = exc
        self._writer, writer = None, self._writer
        if writer is not None:
            writer.close()
        self._give_up()
        sink.lost(ConnectError(f"the session ended: {error}", backend="lines", retryable=True))

    def _take(self, line: dict[str, Any], sink: Sink) -> None:
        if "done" in line:
            done = self._waiting.get(line["done"])
            if done is not None and not done.done():
                done.set_result(None)
        else:
            payload = base64.b64decode(line["payload"])
            sink.deliver(InFrame(topic=line["topic"], payload=payload, time=time.time()))

    def _give_up(self) -> None:
        for done in self._waiting.values():
            if not done.done():
                done.set_exception(ConnectionError("the session ended"))
