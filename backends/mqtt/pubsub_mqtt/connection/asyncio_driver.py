"""Drives a `Connection` in an asyncio event loop, for backends and asyncio clients.

It dials without ever blocking the loop (names are resolved and certificates loaded in a thread),
watches the socket with the selector, reads and writes once per turn, and turns the connection's
callbacks into awaits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from pubsub_core.errors import (
    ConnectError,
    ConnectTimeout,
    MissingDependency,
    NotConnected,
)
from pubsub_core.threads import in_thread
from pubsub_mqtt.errors import as_ours, dial_error
from pubsub_mqtt.packets import NO_PROPERTIES

from .address import BrokerAddress
from .connection import Connection
from .dial import Call, Wait, dial_steps
from .session_data import Session, Subscribe
from .state import Outgoing, Request
from .transport import BufferedSocket

__all__ = ["AsyncioDriver", "dial"]

logger = logging.getLogger("pubsub_mqtt")

_HIGH_WATER: Final = 262_144
"""Bytes that may wait for the operating system before `AsyncioDriver.drain` waits."""

_LINGER: Final = 0.5
"""Seconds that the broker has to close after DISCONNECT."""

# Not the executor of the loop, whose shutdown waits for a name server that never answers.
_THREAD: Final = "pubsub-mqtt-dial"
_AT_ONCE: Final = 128
"""Publishes in a row that leave without a turn of the loop. Without a bound a program that
publishes in a loop, and never has to wait, would read no message and no PINGRESP."""


async def _ready(wait: Wait) -> list[int]:
    """Return the descriptors of *wait* that are ready."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    found: list[int] = []

    def ready(descriptor: int) -> None:
        found.append(descriptor)
        _resolve(waiter)

    timer = None
    try:
        for descriptor in wait.reads:
            loop.add_reader(descriptor, ready, descriptor)
        for descriptor in wait.writes:
            loop.add_writer(descriptor, ready, descriptor)
        if wait.until is not None:
            timer = loop.call_later(wait.until - time.monotonic(), _resolve, waiter)
        await waiter
    finally:
        for descriptor in wait.reads:
            loop.remove_reader(descriptor)
        for descriptor in wait.writes:
            loop.remove_writer(descriptor)
        if timer is not None:
            timer.cancel()
    return found


async def dial(broker: BrokerAddress) -> BufferedSocket:
    """Connect without blocking the loop. Cancelling it closes what was opened.

    Raises:
        OSError: As the operating system says.
        ConnectError: TLS settings or the WebSocket handshake are at fault.
    """
    steps = dial_steps(broker)
    answer: object = None
    try:
        while True:
            step = steps.send(answer)
            if isinstance(step, Call):
                answer = await in_thread(step.work, name=_THREAD)
            else:
                answer = await _ready(step)
    except StopIteration as done:
        sock: BufferedSocket = done.value
        return sock
    finally:
        steps.close()


class AsyncioDriver:
    """Drives one `Connection` in the running event loop; one session at a time.

    Set `on_lost`, and `Connection.on_message` and `Connection.on_notice`, before `open`.
    The order of a session: `open`, subscribe what is wanted, `Connection.release` to let
    publishes go, and in the end `close`. After `on_lost` the same driver can `open` again;
    publishes above QoS 0 that had no answer go out again after `release`.

    Attributes:
        on_lost: Called once when a session that `open` returned has ended by itself.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.on_lost: Callable[[ConnectError], None] = lambda error: None
        connection.wake = self._wake
        connection.on_close = self._detach
        connection.on_lost = self._lost
        connection.on_session = self._accepted
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Future[Session] | None = None
        self._descriptor = -1
        self._reading = False
        self._writing = False
        self._timer: asyncio.TimerHandle | None = None
        self._drained: deque[asyncio.Future[None]] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._closes = 0
        self._closing = asyncio.Lock()
        self._at_once = 0

    # --- sessions ---------------------------------------------------------------------

    async def open(self, broker: BrokerAddress, *, timeout: float | None = None) -> Session:
        """Make one session; try an older protocol version where the settings allow.

        *timeout* is seconds for all of it, from the name to CONNACK.

        Raises:
            ConnectError: Typed by what went wrong; nothing is left open.
        """
        connection = self.connection
        self._loop = asyncio.get_running_loop()
        closes = self._closes
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return await self._attempt(broker, closes)
                    except ConnectError as error:
                        if not connection.try_older(error):
                            raise
        except ConnectError:
            connection.first_version()
            raise
        except TimeoutError as exc:
            connection.end()
            connection.first_version()
            raise ConnectTimeout(
                f"no session with {broker} within {timeout:g} s",
                hint="check host and port, or raise the timeout",
                backend=connection.backend,
            ) from exc
        except BaseException:
            connection.end()
            connection.first_version()
            raise

    async def _attempt(self, broker: BrokerAddress, closes: int) -> Session:
        try:
            sock = await dial(broker)
        except (MissingDependency, ConnectError) as exc:
            as_ours(exc, self.connection.backend)
            raise
        except (OSError, ValueError) as exc:
            raise dial_error(
                exc,
                str(broker),
                backend=self.connection.backend,
                secure=broker.tls is not None,
            ) from exc
        if closes != self._closes:
            # `close` while the dial was in a thread, where nothing could cancel it.
            sock.close()
            raise self._closed_meanwhile()
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._opening = loop.create_future()
        self._descriptor = sock.fileno()
        self._writing = False
        try:
            self.connection.begin(sock, where=str(broker))
        except BaseException:
            self._detach(sock)
            sock.close()
            raise
        self._watch()
        if sock.pending():
            # The WebSocket handshake brought the first bytes along: no selector tells of them.
            loop.call_soon(self._readable)
        try:
            return await self._opening
        finally:
            self._opening = None

    async def close(self, *, drain: float = 0.0, reason: int = 0) -> None:
        """End the session in good order; legal in any state.

        Waits up to *drain* seconds for publishes that have no answer yet, then says
        DISCONNECT. Publishes still unfinished fail, with outcome unknown where they were
        sent. *reason* is the reason code of the DISCONNECT (MQTT 5).
        """
        connection = self.connection
        loop = asyncio.get_running_loop()
        async with self._closing:  # a second caller waits, and finds it done
            try:
                if connection.connected:
                    deadline = loop.time() + drain
                    if drain > 0:
                        connection.release()
                        await self._finished(drain)
                    if connection.connected:
                        connection.disconnect(reason)
                        await self._goodbye(max(deadline - loop.time(), _LINGER))
            finally:
                self.abort()
                connection.fail_pending()

    async def _finished(self, seconds: float) -> None:
        if not self.connection.unfinished:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle.append(waiter)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await waiter

    async def _goodbye(self, seconds: float) -> None:
        """Send what waits and the end of the stream; let the broker close first.

        Closing a socket with unread input resets the connection, and the broker could
        miss the DISCONNECT and publish the will.
        """
        connection = self.connection
        sock = connection.socket
        if sock is None:
            return
        try:
            async with asyncio.timeout(seconds):
                await self.drain(0)
            async with asyncio.timeout(_LINGER):
                if connection.socket is not sock:
                    return
                self._detach(sock)
                sock.finish()
                while not sock.ended():
                    await _ready(Wait(reads=(sock.fileno(),)))
        except (TimeoutError, OSError, NotConnected):
            pass

    def abort(self) -> None:
        """End the session without DISCONNECT, as if the link had broken; `on_lost` is not called.

        Publishes above QoS 0 are kept for the next session.
        """
        self._closes += 1
        self.connection.end()
        if self._opening is not None and not self._opening.done():
            self._opening.set_exception(self._closed_meanwhile())

    def _closed_meanwhile(self) -> ConnectError:
        return ConnectError(
            "the connection was closed while it was being made",
            backend=self.connection.backend,
            retryable=False,
        )

    def _accepted(self, session: Session) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.set_result(session)
        self._tick()

    def _lost(self, error: ConnectError) -> None:
        if self._opening is not None:
            # Also when CONNACK and the end came in one read: `open` has not returned yet.
            if self._opening.done():
                opened, self._opening = self._opening, None
                if not opened.cancelled():
                    self.on_lost(error)
            else:
                self._opening.set_exception(error)
            return
        logger.debug("the session was lost: %s", error)
        self.on_lost(error)

    def _detach(self, sock: BufferedSocket) -> None:
        loop, descriptor = self._loop, self._descriptor
        if loop is None or descriptor < 0:
            return
        self._descriptor = -1
        if not loop.is_closed():
            loop.remove_reader(descriptor)
            loop.remove_writer(descriptor)
        self._reading = self._writing = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        _resolve_all(self._drained)
        _resolve_all(self._idle)

    # --- the selector -----------------------------------------------------------------

    def _watch(self) -> None:
        """Read the socket, unless the connection has enough."""
        loop = self._loop
        if loop is None or self._descriptor < 0:
            return
        wanted = self.connection.reading
        if wanted and not self._reading:
            loop.add_reader(self._descriptor, self._readable)
        elif not wanted and self._reading:
            loop.remove_reader(self._descriptor)
        self._reading = wanted

    def _readable(self) -> None:
        # One read per turn: reading until the socket is empty would keep the loop from
        # everything else while a fast publisher is at work.
        connection = self.connection
        connection.feed()
        sock = connection.socket
        if sock is None or self._loop is None:
            return
        if not connection.reading:
            self._watch()
        elif sock.pending():
            self._loop.call_soon(self._readable)
        if self._idle and not connection.unfinished:
            _resolve_all(self._idle)

    def _wake(self) -> None:
        # At the end of this turn, so that all packets of it leave in one call to the system.
        # Not while the socket is full: then the selector says when.
        if self._loop is not None and self._descriptor >= 0 and not self._writing:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        connection = self.connection
        if self._descriptor < 0:
            return
        empty = connection.flush()
        loop, descriptor = self._loop, self._descriptor
        if loop is None or descriptor < 0:
            return
        if empty:
            if self._writing:
                self._writing = False
                loop.remove_writer(descriptor)
        elif not self._writing:
            self._writing = True
            loop.add_writer(descriptor, self._flush)
        if self._drained and connection.unsent <= _HIGH_WATER // 4:
            _resolve_all(self._drained)
        if self._idle and not connection.unfinished:
            _resolve_all(self._idle)

    def _tick(self) -> None:
        self._timer = None
        due = self.connection.tick()
        if due is not None and self._loop is not None:
            self._timer = self._loop.call_later(due, self._tick)

    # --- what users of the driver do ----------------------------------------------------

    async def drain(self, below: int = _HIGH_WATER) -> None:
        """Wait until at most *below* bytes wait for the operating system.

        Raises:
            NotConnected: The session ended meanwhile.
        """
        connection = self.connection
        generation = connection.generation
        while connection.unsent > below or (below == 0 and connection.wants_write):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._drained.append(waiter)
            await waiter
            if connection.socket is None or connection.generation != generation:
                raise NotConnected("the session ended meanwhile", backend=connection.backend)

    def try_publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        shown: str | None = None,
    ) -> bool | None:
        """Hand a QoS 0 message to the operating system at once, if nothing waits before it.

        Returns:
            True when all of it went, False when some of it waits in the buffer, None when
            nothing was done: it has to wait, or it is time to let the loop read.

        Raises:
            NotConnected, PublishFailed: As `Connection.publish`.
        """
        connection = self.connection
        sock = connection.socket
        if sock is not None and not sock.idle:
            return None
        self._at_once += 1
        if self._at_once >= _AT_ONCE:
            self._at_once = 0
            return None
        if not connection.publish_now(
            topic, payload, retain=retain, properties=properties, shown=shown
        ):
            return None
        return connection.push()

    def submit(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        shown: str | None = None,
    ) -> Outgoing:
        """Begin to publish; the `Outgoing.tag` is a future to be given to `outcome`.

        Its `Outgoing.packet_id` is 0 while it is queued, and known before the answer.

        Raises:
            NotConnected, PublishFailed: As `Connection.publish`.
        """
        out = self.connection.publish(
            topic,
            payload,
            qos=qos,
            retain=retain,
            properties=properties,
            shown=shown,
            on_done=_wake_publisher,
        )
        # Not asyncio.get_running_loop(), which makes a system call on Python 3.11.
        loop = self._loop
        out.tag = (
            asyncio.get_running_loop().create_future() if loop is None else loop.create_future()
        )
        return out

    async def outcome(self, out: Outgoing) -> Outgoing:
        """Wait for what becomes of a message that was submitted.

        At QoS 0 that is known when the operating system has it, above when the broker
        answered, in this session or a later one. Cancelling it gives up waiting; see
        `Connection.abandon`.

        Raises:
            PublishFailed: With its outcome.
        """
        try:
            await out.tag
        except asyncio.CancelledError:
            self.connection.abandon(out)
            raise
        if out.error is not None:
            raise out.error
        return out

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        on_sent: Callable[[Outgoing], None] | None = None,
    ) -> Outgoing:
        """Publish, and return when the outcome is known; see `submit` and `outcome`.

        *on_sent* is called in between, before there can be an answer.
        """
        out = self.submit(topic, payload, qos=qos, retain=retain, properties=properties)
        if on_sent is not None:
            on_sent(out)
        return await self.outcome(out)

    async def subscribe(self, *wants: Subscribe) -> Request:
        """Send one SUBSCRIBE and return when the broker answered; see `Connection.refusal`.

        Raises:
            NotConnected: There is no session, or it ended before the answer.
            SubscribeFailed: A filter that cannot be sent.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        request = self.connection.subscribe(wants, lambda done: _resolve(waiter))
        await waiter
        if request.error is not None:
            raise request.error
        return request

    async def unsubscribe(self, *filters: str) -> Request:
        """Send one UNSUBSCRIBE and return when the broker answered."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        request = self.connection.unsubscribe(filters, lambda done: _resolve(waiter))
        await waiter
        if request.error is not None:
            raise request.error
        return request

    async def ping(self) -> float:
        """Return the seconds from PINGREQ to PINGRESP."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[ConnectError | None] = loop.create_future()

        def answered(error: ConnectError | None) -> None:
            if not waiter.done():
                waiter.set_result(error)

        began = loop.time()
        self.connection.ping(answered)
        error = await waiter
        if error is not None:
            raise NotConnected(
                "the session ended before the broker answered", backend=self.connection.backend
            ) from error
        return loop.time() - began

    def pause(self) -> None:
        """Deliver no more messages; see `Connection.pause`."""
        self.connection.pause()

    def resume(self) -> None:
        """Deliver again."""
        self.connection.resume()
        if not self._reading:
            self._watch()
            if self._loop is not None and self._descriptor >= 0:
                self._loop.call_soon(self._readable_again)

    def _readable_again(self) -> None:
        # Input that TLS holds back does not wake the selector.
        if self._descriptor >= 0 and self._reading:
            self._readable()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _resolve_all(waiters: deque[asyncio.Future[None]]) -> None:
    while waiters:
        _resolve(waiters.popleft())


def _wake_publisher(out: Outgoing) -> None:
    waiter = out.tag
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
