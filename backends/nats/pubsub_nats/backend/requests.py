"""Requests over a connection: one subscription for every answer, and who waits for which."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from pubsub_nats.headers import parse_block
from pubsub_nats.jetstream import ApiError, Position, parse_answer, parse_position
from pubsub_nats.protocol import Msg, encode_pub, encode_sub

from .connection import Connection, Denied, Lost

__all__ = ["INBOX", "Requests", "Taker"]

INBOX = 1
"""Number of the one subscription for answers; others are larger."""

_ANSWER = 5.0
_AGAIN = 0.25
Taker = Callable[[Msg, Position | None], None]
"""Takes a message, and where it stands in a stream if a consumer delivered it."""

# There is no answer at all while a cluster has no leader, and one of these soon after.
_TRANSIENT = frozenset({10008})


class Requests:
    """The inbox of one publisher; its name stays the same over reconnects.

    So a confirmation that was meant for an earlier session is as good in this one.

    Attributes:
        prefix: What every reply subject begins with.
    """

    def __init__(self, session: str) -> None:
        self.prefix = f"_INBOX.{session}.".encode()
        self._skip = len(self.prefix)
        self._takers: dict[bytes, Callable[[Msg], None]] = {}
        self._waiting: dict[asyncio.Future[Msg], bytes] = {}
        self._tokens = itertools.count(1)
        self._deliveries: dict[int, Taker] = {}
        self._sids = itertools.count(INBOX + 1)
        self._connection: Connection | None = None

    async def open(self, connection: Connection) -> None:
        """Listen on *connection* from now on.

        Raises:
            Denied: The server does not let us.
            Lost: It ended.
        """
        await connection.subscribe(self.prefix + b"*", INBOX)
        self._connection = connection

    def lost(self) -> None:
        """End every wait."""
        self._connection = None
        self._deliveries.clear()
        for future in self._waiting:
            if not future.done():
                future.set_exception(Lost("the connection ended"))

    def denied(self, subject: bytes) -> None:
        """Fail the requests to *subject*: nobody will answer them."""
        for future, asked in self._waiting.items():
            if asked == subject and not future.done():
                future.set_exception(Denied)

    # --- answers -----------------------------------------------------------------------------

    def _listen(self, taker: Callable[[Msg], None]) -> bytes:
        """Give what comes to a new reply subject to *taker*; return that subject."""
        token = b"r%d" % next(self._tokens)
        self._takers[token] = taker
        return self.prefix + token

    def _ignore(self, reply: bytes) -> None:
        self._takers.pop(reply[self._skip :], None)

    def take(self, message: Msg) -> None:
        """Give one message to whom it is for."""
        # A delivery bears the subject that it was published to, so its number tells.
        if message.sid == INBOX:
            answered = self._takers.get(message.subject[self._skip :])
            if answered is not None:
                answered(message)
        elif (taker := self._deliveries.get(message.sid)) is not None:
            taker(message, parse_position(message.reply))

    # --- deliveries ----------------------------------------------------------------------------

    def receive(self, taker: Taker) -> tuple[bytes, int]:
        """Give what comes to a new subject to *taker*; return subject and subscription.

        A consumer that sends on its own looks for a subscription to exactly its subject: one
        with a wildcard is no interest to it. And one that was asked gives up when the subject is
        dropped, so that what is given back then does not come here again.
        """
        connection = self._connection
        if connection is None:
            raise Lost("no session")
        sid = next(self._sids)
        subject = self.prefix + b"d.%d" % sid
        self._deliveries[sid] = taker
        connection.write(encode_sub(subject, sid))
        return subject, sid

    def drop(self, sid: int) -> None:
        """Receive no longer."""
        if self._deliveries.pop(sid, None) is not None and self._connection is not None:
            self._connection.unsubscribe(sid)

    # --- asking ------------------------------------------------------------------------------

    async def ask(
        self, subject: bytes, payload: bytes, header: bytes = b"", *, timeout: float = _ANSWER
    ) -> Msg:
        """Return the answer to one request.

        Raises:
            TimeoutError: There was none. An unknown subject of the API is never answered.
            Denied: The server's permissions forbid the request.
            Lost: The connection ended.
        """
        connection = self._connection
        if connection is None:
            raise Lost("no session")
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

        def answered(message: Msg) -> None:
            if not future.done():
                future.set_result(message)

        reply = self._listen(answered)
        self._waiting[future] = subject
        try:
            connection.write(encode_pub(subject, payload, header, reply))
            async with asyncio.timeout(timeout):
                return await future
        finally:
            self._ignore(reply)
            del self._waiting[future]

    async def api(self, name: str, body: Mapping[str, object] | None = None) -> Mapping[str, Any]:
        """Return the answer of JetStream's API; ask again while there is no leader.

        Ends by the deadline of the caller.

        Raises:
            ApiError: It is an error.
            Denied: The server's permissions forbid it.
            Lost: The connection ended.
        """
        payload = b"" if body is None else json.dumps(body).encode()
        subject = f"$JS.API.{name}".encode()
        while True:
            try:
                return self._answer(await self.ask(subject, payload))
            except TimeoutError:
                continue
            except ApiError as error:
                if error.number not in _TRANSIENT:
                    raise
            await asyncio.sleep(_AGAIN)

    @staticmethod
    def _answer(message: Msg) -> Mapping[str, Any]:
        if message.header and (status := parse_block(message.header).status):
            raise ApiError(status, 0, "nobody answers")
        return parse_answer(message.payload)

    def tell(self, name: str) -> None:
        """Send a request whose answer nobody needs, where there is a session."""
        if self._connection is not None:
            self._connection.write(encode_pub(f"$JS.API.{name}".encode(), b""))
