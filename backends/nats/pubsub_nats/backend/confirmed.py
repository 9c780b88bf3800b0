"""Publishes that a stream confirms: a window, one identifier for all attempts, and their order.

A message goes out with an identifier that every attempt keeps, so that the stream stores it
once. When a leader dies its cluster is silent or answers "nobody listens" for some seconds. Then
new messages wait, and the oldest one that has no answer is tried until it has: a leader is
there, and the others follow in their order. Tried one by one, each when it failed, later ones
overtook earlier ones in one of four runs.

Someone who merely subscribes hears each attempt; those who read the stream hear one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from pubsub_core.capabilities import ConfirmedBy
from pubsub_core.errors import NotConnected, Outcome, PublishFailed, PubSubError
from pubsub_core.message import Receipt
from pubsub_nats.errors import publish_denied
from pubsub_nats.jetstream import ApiError, parse_ack, publish_error
from pubsub_nats.protocol import Msg, encode_pub

from .connection import Connection

__all__ = ["ConfirmedPublisher"]

WINDOW = 256
"""Messages that may be without an answer; 100 are enough for the full rate."""
WINDOW_BYTES = 4 * 1024 * 1024

_BROKER = ConfirmedBy.BROKER
_SUSPICIOUS = 1.0
_FIRST_DELAY = 0.1
_LAST_DELAY = 1.0
_SILENCE = 2.0
_MARGIN = 5.0
_REFUSED = b"NATS/1.0 503"
# No leader; and, from 2.12 on, an attempt with the same identifier is under way.
_NOT_NOW = frozenset({10008, 10158})


class _Pending:
    """One message without an answer."""

    __slots__ = ("first", "frame", "future", "size", "subject", "topic")

    def __init__(
        self, topic: str, subject: bytes, frame: bytes, size: int, future: asyncio.Future[Receipt]
    ) -> None:
        self.topic = topic
        self.subject = subject
        self.frame = frame
        self.size = size
        self.future = future
        self.first: float | None = None


class ConfirmedPublisher:
    """What one bus publishes into streams; it outlives sessions.

    Args:
        session: What every identifier begins with.
        prefix: What the reply subjects begin with.

    Attributes:
        window: Seconds for which the stream knows an identifier.
    """

    def __init__(self, session: str, prefix: bytes) -> None:
        self._session = session.encode()
        self._prefix = prefix
        self._now = time.monotonic
        self.window = 120.0
        self._connection: Connection | None = None
        # By the token of the reply subject, oldest first.
        self._sent: dict[bytes, _Pending] = {}
        self._sent_bytes = 0
        self._queue: deque[tuple[bytes, _Pending]] = deque()
        self._number = 0
        self._probing: bytes | None = None
        self._delay = _FIRST_DELAY
        self._next = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._sent) + len(self._queue)

    # --- sessions ------------------------------------------------------------------------------

    def online(self, connection: Connection) -> None:
        """Send again what an earlier session left without an answer, before anything new."""
        self._connection = connection
        self._forget_cancelled()
        now = self._now()
        for token, pending in tuple(self._sent.items()):
            if pending.first is not None and now - pending.first > self.window - _MARGIN:
                # The stream may have forgotten the identifier, and would store it twice.
                self._fail(token, self._unknown(pending, "no session for too long"))
        if self._sent:
            self._suspect()
        else:
            self._pump()

    def offline(self) -> None:
        """Keep what has no answer for the next session."""
        self._connection = None
        self._probing = None
        self._stop_timer()

    def close(self) -> None:
        """Give everything up."""
        self.offline()
        for token, pending in tuple(self._sent.items()):
            self._fail(token, self._unknown(pending, "the bus was closed"))
        while self._queue:
            _, pending = self._queue.popleft()
            if not pending.future.done():
                pending.future.set_exception(
                    NotConnected(
                        f"{pending.topic!r} was not sent before the bus was closed",
                        hint="publish it again in a new bus",
                        backend="nats",
                        topic=pending.topic,
                    )
                )

    async def drain(self, seconds: float) -> None:
        """Return when everything has an answer, after so long at the latest."""
        waiting = [pending.future for pending in self._sent.values()]
        waiting += [pending.future for _, pending in self._queue]
        if waiting and seconds > 0:
            await asyncio.wait(waiting, timeout=seconds)

    # --- publishing ----------------------------------------------------------------------------

    def submit(
        self, topic: str, subject: bytes, payload: bytes, stream: str, lines: bytes = b""
    ) -> asyncio.Future[Receipt]:
        """Publish in the order of the calls; the future is done once *stream* has answered.

        Args:
            topic: For errors.
            subject: Where to.
            payload: The message.
            stream: Which must store it; another that covers the subject refuses.
            lines: Of the header block.
        """
        self._number += 1
        token = b"p%d" % self._number
        header = b"NATS/1.0\r\n%bNats-Expected-Stream: %b\r\nNats-Msg-Id: %b.%b\r\n\r\n" % (
            lines,
            stream.encode(),
            self._session,
            token,
        )
        frame = encode_pub(subject, payload, header, self._prefix + token)
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        pending = _Pending(topic, subject, frame, len(payload), future)
        if (
            self._queue
            or self._probing is not None
            or len(self._sent) >= WINDOW
            or self._sent_bytes >= WINDOW_BYTES
        ):
            self._queue.append((token, pending))
        else:
            self._send(token, pending)
        return future

    def _send(self, token: bytes, pending: _Pending) -> None:
        connection = self._connection
        if connection is None:
            self._queue.append((token, pending))
            return
        if pending.first is None:
            pending.first = self._now()
            self._sent[token] = pending
            self._sent_bytes += len(pending.frame)
        connection.write(pending.frame)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SUSPICIOUS, self._look)

    def _pump(self) -> None:
        while (
            self._queue
            and self._connection is not None
            and self._probing is None
            and len(self._sent) < WINDOW
            and self._sent_bytes < WINDOW_BYTES
        ):
            token, pending = self._queue.popleft()
            if not pending.future.done():
                self._send(token, pending)

    # --- answers -------------------------------------------------------------------------------

    def take(self, token: bytes, message: Msg) -> bool:
        """Take the answer to one publish; return whether *token* is of one."""
        pending = self._sent.get(token)
        if pending is None:
            return token.startswith(b"p")
        if message.header.startswith(_REFUSED):
            self._not_now(token)
            return True
        ack = parse_ack(message.payload)
        if ack is None:
            return True  # somebody who merely subscribes answered, too
        if ack.error is None:
            self._drop(token)
            if not pending.future.done():
                pending.future.set_result(Receipt(pending.topic, _BROKER, str(ack.seq)))
        elif ack.error.err_code in _NOT_NOW:
            self._not_now(token)
            return True
        else:
            error = ApiError(ack.error.code, ack.error.err_code, ack.error.description)
            self._fail(token, publish_error(error, pending.topic, pending.size))
        if self._probing is not None:
            if self._probing == token:
                self._recovered()
        elif self._queue:
            self._pump()
        return True

    def _not_now(self, token: bytes) -> None:
        """There is no leader, or it is still busy with an earlier attempt."""
        if self._probing == token:
            self._next = self._now() + self._delay
            self._arm(self._delay)
            self._delay = min(2 * self._delay, _LAST_DELAY)
        else:
            self._suspect()

    def denied(self, subject: bytes) -> None:
        """Fail what was published to *subject*: there will be no answer."""
        for token, pending in tuple(self._sent.items()):
            if pending.subject == subject:
                self._fail(token, publish_denied(pending.topic))
        if self._probing is not None and self._probing not in self._sent:
            self._recovered()
        self._pump()

    def _drop(self, token: bytes) -> None:
        pending = self._sent.pop(token)
        self._sent_bytes -= len(pending.frame)
        if not self._sent and self._timer is not None:
            self._stop_timer()

    def _fail(self, token: bytes, error: PubSubError) -> None:
        pending = self._sent[token]
        self._drop(token)
        if not pending.future.done():
            pending.future.set_exception(error)

    @staticmethod
    def _unknown(pending: _Pending, why: str) -> PublishFailed:
        return PublishFailed(
            f"{why}, so nobody knows whether {pending.topic!r} was stored",
            outcome=Outcome.UNKNOWN,
            hint="look at the history, or publish again if a duplicate does no harm",
            backend="nats",
            topic=pending.topic,
            retryable=True,
        )

    # --- no leader -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Look whether an answer is overdue; while there is no leader, try again."""
        self._timer = None
        self._forget_cancelled()
        if not self._sent:
            if self._probing is not None:
                self._recovered()
            else:
                self._pump()
            return
        now = self._now()
        if self._probing is None:
            oldest = next(iter(self._sent.values()))
            age = now - (oldest.first or now)
            if age >= _SUSPICIOUS:
                self._suspect()
            else:
                self._arm(_SUSPICIOUS - age)
        elif now >= self._next or self._probing not in self._sent:
            self._probe()
        else:
            self._arm(self._next - now)

    def _suspect(self) -> None:
        """Hold what is new, and try the oldest message until it has an answer."""
        if self._probing is None and self._connection is not None:
            self._delay = _FIRST_DELAY
            self._probe()

    def _probe(self) -> None:
        now = self._now()
        while self._sent:
            token, pending = next(iter(self._sent.items()))
            if pending.first is not None and now - pending.first > self.window - _MARGIN:
                self._fail(token, self._unknown(pending, "no leader for too long"))
                continue
            self._probing = token
            self._next = now + _SILENCE
            self._send(token, pending)
            self._arm(_SILENCE)
            return
        self._recovered()

    def _recovered(self) -> None:
        """There is a leader: send the rest again, in order, and go on."""
        self._probing = None
        for pending in self._sent.values():
            if self._connection is not None:
                self._connection.write(pending.frame)
        if self._sent:
            self._arm(_SILENCE)
        self._pump()

    def _forget_cancelled(self) -> None:
        for token, pending in tuple(self._sent.items()):
            if pending.future.done():
                self._drop(token)

    def _arm(self, delay: float) -> None:
        self._stop_timer()
        if self._sent:
            self._timer = asyncio.get_running_loop().call_later(max(delay, 0.01), self._look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
