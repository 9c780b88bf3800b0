"""Reading what a stream holds: by a consumer that is asked page by page, oldest first.

One way for all servers: newer ones answer a question for many messages without a consumer, older
ones do not, and a consumer reads a long history as fast.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import heapq
import json
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple

from pubsub_core.interfaces import HistoryQuery
from pubsub_nats.headers import parse_block
from pubsub_nats.jetstream import ApiError, Position
from pubsub_nats.protocol import Msg, encode_pub

from .connection import Lost
from .consumers import Host

__all__ = ["Stored", "newest", "read", "read_last_of_each"]

_PAGE = 500
_SECOND = 1_000_000_000
_IDLE = 30.0
_PATIENCE = 5.0
_EARLY = 0.001
_LAG = 0.1


class Stored(NamedTuple):
    """One stored message and where it stands."""

    message: Msg
    position: Position


async def newest(host: Host, stream: str, subject: str) -> Stored | None:
    """Return the newest message of *subject*, as the leader of the stream has it."""
    try:
        found = await host.requests.api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject})
    except ApiError as error:
        if error.number == 10037:
            return None
        raise
    told: Mapping[str, Any] = found["message"]
    header, payload = (base64.b64decode(told.get(name) or "") for name in ("hdrs", "data"))
    message = Msg(str(told["subject"]).encode(), 0, b"", header, payload)
    return Stored(message, Position(1, int(told["seq"]), 0, _seconds(str(told["time"])), 0))


class _Reader:
    """One consumer of one subject that is read to its end.

    One for each subject: before 2.10 a consumer has one filter, and 2.10 finds nothing where it
    has several and the newest message is of the first.
    """

    def __init__(self, host: Host, stream: str, subject: str) -> None:
        self._host = host
        self._stream = stream
        self._subject = subject
        self._name = ""
        self._arrived: asyncio.Queue[tuple[Msg, Position | None]] = asyncio.Queue()
        self._first = 0
        self._since = 0.0
        self.pending = 0

    async def open(self, *, policy: str, first: int = 0, since: float = 0.0) -> None:
        """Begin there; `pending` is then how many there are.

        Args:
            policy: The server's word for where to begin.
            first: Number of the first message, where that is the policy.
            since: Unix seconds, where that is the policy.
        """
        self._first, self._since = first, since
        name = self._name = self._host.unique()
        config: dict[str, object] = {
            "name": name,
            "filter_subject": self._subject,
            "deliver_policy": policy,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": round(_IDLE * _SECOND),
        }
        if first:
            config["opt_start_seq"] = first
        if since:
            config["opt_start_time"] = _rfc3339(since)
        made = await self._host.requests.api(
            f"CONSUMER.CREATE.{self._stream}.{name}.{self._subject}",
            {"stream_name": self._stream, "config": config},
        )
        self.pending = int(made.get("num_pending", 0))

    def close(self) -> None:
        """Drop the consumer."""
        if self._name:
            self._host.requests.tell(f"CONSUMER.DELETE.{self._stream}.{self._name}")
            self._name = ""

    async def messages(self) -> AsyncGenerator[Stored, None]:
        """Yield every message until there is no more, on the leader either."""
        reply, sid = self._host.requests.receive(self._take)
        last = 0
        try:
            while True:
                self._next(reply, _PAGE)
                for _ in range(_PAGE):
                    stored = await self._one()
                    if stored is None:
                        break
                    last = stored.position.stream
                    yield stored
                else:
                    continue
                if await self._complete(last):
                    return
                await asyncio.sleep(_LAG)
        finally:
            self._host.requests.drop(sid)

    async def _complete(self, last: int) -> bool:
        """Whether the leader has nothing behind *last*, which was the last one here.

        The consumer is on some node of a cluster, which may have come back a moment ago and lack
        what the others have stored meanwhile.
        """
        if not self._host.replicated:
            return True
        found = await newest(self._host, self._stream, self._subject)
        return (
            found is None
            or found.position.stream <= last
            or found.position.stream < self._first
            or found.position.time < self._since
        )

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
    readers = [_Reader(host, stream, subject) for subject in subjects]
    try:
        for reader in readers:
            await _begin(reader, query, last_sequence)
        found = _merged([reader.messages() for reader in readers])
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
        await reader.open(policy="by_start_time", since=max(query.since - _EARLY, _EARLY))
    elif query.last is not None and query.until is None:
        await _count_back(reader, query.last, last_sequence)
    else:
        await reader.open(policy="all")


async def _count_back(reader: _Reader, count: int, last_sequence: int) -> None:
    """Open *reader* where about *count* messages are left; nothing tells where that is."""
    back = count
    while True:
        first = last_sequence - back + 1
        if first <= 1:
            await reader.open(policy="all")
            return
        await reader.open(policy="by_start_sequence", first=first)
        if reader.pending >= count:
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
        reader = _Reader(host, stream, subject)
        # A node that catches up meanwhile sends what is newer as well.
        found: dict[bytes, Stored] = {}
        try:
            await reader.open(policy="last_per_subject")
            async for stored in reader.messages():
                found[stored.message.subject] = stored
        finally:
            reader.close()
        for stored in found.values():
            yield stored


def _rfc3339(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, dt.UTC).isoformat().replace("+00:00", "Z")


def _seconds(text: str) -> float:
    """Return the Unix seconds of a time with up to nine digits behind the point."""
    whole, _, rest = text.removesuffix("Z").partition(".")
    moment = dt.datetime.fromisoformat(f"{whole}+00:00").timestamp()
    return moment + (float(f"0.{rest}") if rest.isdigit() else 0.0)
