"""Reading what a stream holds: by a consumer that is asked page by page, oldest first.

One way for all servers: newer ones answer a question for many messages without a consumer, older
ones do not, and a consumer reads a long history as fast.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import heapq
import json
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import NamedTuple

from pubsub_core.interfaces import HistoryQuery
from pubsub_nats.headers import parse_block
from pubsub_nats.jetstream import Position
from pubsub_nats.protocol import Msg, encode_pub

from .connection import Lost
from .consumers import Host

__all__ = ["Stored", "read", "read_last_of_each"]

_PAGE = 500
_SECOND = 1_000_000_000
_IDLE = 30.0
_PATIENCE = 5.0
_EARLY = 0.001


class Stored(NamedTuple):
    """One stored message and where it stands."""

    message: Msg
    position: Position


class _Reader:
    """One consumer that is read to its end."""

    def __init__(self, host: Host, stream: str, subjects: Sequence[str]) -> None:
        self._host = host
        self._stream = stream
        self._subjects = subjects
        self._name = ""
        self._arrived: asyncio.Queue[tuple[Msg, Position | None]] = asyncio.Queue()
        self.pending = 0
        self.complete = True

    async def open(self, start: Mapping[str, object]) -> None:
        """Begin there; `pending` is then how many there are."""
        name = self._name = self._host.unique()
        subject = f"CONSUMER.CREATE.{self._stream}.{name}"
        filters: dict[str, object] = {"filter_subjects": list(self._subjects)}
        if len(self._subjects) == 1:
            subject += f".{self._subjects[0]}"
            filters = {"filter_subject": self._subjects[0]}
        config = {
            "name": name,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": round(_IDLE * _SECOND),
            **filters,
            **start,
        }
        made = await self._host.requests.api(
            subject, {"stream_name": self._stream, "config": config}
        )
        self.pending = int(made.get("num_pending", 0))
        self.complete = len(self._subjects) == 1 or bool(made["config"].get("filter_subjects"))

    def close(self) -> None:
        """Drop the consumer."""
        if self._name:
            self._host.requests.tell(f"CONSUMER.DELETE.{self._stream}.{self._name}")
            self._name = ""

    async def messages(self) -> AsyncGenerator[Stored, None]:
        """Yield every message until the server says that there is no more.

        Not until none is said to be pending: for several filters 2.10 counts them wrong.
        """
        reply, sid = self._host.requests.receive(self._take)
        try:
            while True:
                self._next(reply, _PAGE)
                for _ in range(_PAGE):
                    stored = await self._one()
                    if stored is None:
                        return
                    yield stored
        finally:
            self._host.requests.drop(sid)

    def _take(self, message: Msg, position: Position | None) -> None:
        self._arrived.put_nowait((message, position))

    def _next(self, reply: bytes, count: int) -> None:
        connection = self._host.connection
        if connection is None:
            raise Lost("no session")
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}"
        body = json.dumps({"batch": count, "no_wait": True})
        connection.write(encode_pub(subject.encode(), body.encode(), reply=reply))

    async def _one(self) -> Stored | None:
        """Return the next message; None where the server says that there is none."""
        while True:
            try:
                if self._arrived.empty():
                    async with asyncio.timeout(_PATIENCE):
                        message, position = await self._arrived.get()
                else:
                    message, position = self._arrived.get_nowait()
            except TimeoutError:
                if self._host.connection is None:
                    raise Lost("the connection ended") from None
                raise
            if position is not None:
                return Stored(message, position)
            if parse_block(message.header).status >= 400:
                return None


async def read(
    host: Host, stream: str, subjects: Sequence[str], query: HistoryQuery, *, last_sequence: int
) -> AsyncGenerator[Stored, None]:
    """Yield what *query* asks for of *subjects*, oldest first."""
    if query.last is not None and query.last <= 0:
        return
    readers = [_Reader(host, stream, subjects)]
    try:
        await _begin(readers[0], query, last_sequence)
        if not readers[0].complete:
            # An old server took the first filter for all; then one reader for each.
            readers[0].close()
            readers = [_Reader(host, stream, [subject]) for subject in subjects]
            for reader in readers:
                await _begin(reader, query, last_sequence)
        found = (
            readers[0].messages()
            if len(readers) == 1
            else _merged([reader.messages() for reader in readers])
        )
        tail: deque[Stored] | None = None if query.last is None else deque(maxlen=query.last)
        async for stored in found:
            if stored.position.stream > last_sequence:
                break  # published since; where there is traffic, it would not end
            moment = stored.position.time
            if query.since is not None and moment < query.since:
                continue
            if query.until is not None and moment > query.until:
                break
            if tail is None:
                yield stored
            else:
                tail.append(stored)
        for stored in tail or ():
            yield stored
    finally:
        for reader in readers:
            reader.close()


async def _begin(reader: _Reader, query: HistoryQuery, last_sequence: int) -> None:
    if query.since is not None:
        # The server's times have nanoseconds, ours do not: begin early and compare.
        moment = max(query.since - _EARLY, 0.0)
        await reader.open({"deliver_policy": "by_start_time", "opt_start_time": _rfc3339(moment)})
    elif query.last is not None and query.until is None:
        await _count_back(reader, query.last, last_sequence)
    else:
        await reader.open({"deliver_policy": "all"})


async def _count_back(reader: _Reader, count: int, last_sequence: int) -> None:
    """Open *reader* where about *count* messages are left; nothing tells where that is."""
    back = count
    while True:
        first = last_sequence - back + 1
        if first <= 1:
            await reader.open({"deliver_policy": "all"})
            return
        await reader.open({"deliver_policy": "by_start_sequence", "opt_start_seq": first})
        if reader.pending >= count or not reader.complete:
            return
        reader.close()
        back *= 4


async def _merged(parts: list[AsyncGenerator[Stored, None]]) -> AsyncGenerator[Stored, None]:
    heap: list[tuple[int, int, Stored]] = []
    for number, part in enumerate(parts):
        if (stored := await anext(part, None)) is not None:
            heapq.heappush(heap, (stored.position.stream, number, stored))
    while heap:
        _, number, stored = heapq.heappop(heap)
        yield stored
        if (following := await anext(parts[number], None)) is not None:
            heapq.heappush(heap, (following.position.stream, number, following))


async def read_last_of_each(
    host: Host, stream: str, subjects: Sequence[str]
) -> AsyncGenerator[Stored, None]:
    """Yield the newest message of each subject that matches."""
    for subject in subjects:
        reader = _Reader(host, stream, [subject])
        try:
            await reader.open({"deliver_policy": "last_per_subject"})
            async for stored in reader.messages():
                yield stored
        finally:
            reader.close()


def _rfc3339(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, dt.UTC).isoformat().replace("+00:00", "Z")
