"""Drives a `Connection` with paho-mqtt's own loops, for programs without an event loop.

`loop`, `loop_start` and `loop_forever` are paho's, over the same connection.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pubsub_core.errors import (
    ConnectError,
    ConnectTimeout,
    MissingDependency,
    NotConnected,
)
from pubsub_mqtt.errors import as_ours, dial_error
from pubsub_mqtt.packets import NO_PROPERTIES, Incoming

from .address import BrokerAddress
from .connection import Connection
from .dial import dial_blocking
from .paho_client import PahoClient
from .session_data import Session, SessionSettings, Subscribe
from .state import Outgoing, Request
from .transport import BufferedSocket

__all__ = ["BlockingDriver"]

logger = logging.getLogger("pubsub_mqtt")

_Done = TypeVar("_Done", Outgoing, Request)


def _ignore(_: object) -> None:
    """The callback of a program that set none."""


class _SharedConnection(Connection):
    """A `Connection` for several threads: one lock, and callbacks only after it is free."""

    def __init__(self, settings: SessionSettings, *, backend: str) -> None:
        super().__init__(settings, backend=backend)
        self.lock = threading.RLock()
        self.events: deque[Callable[[], None]] = deque()

    def feed(self) -> None:
        """See `Connection.feed`; callbacks follow it."""
        with self.lock:
            super().feed()
        self.dispatch()

    def flush(self) -> bool:
        """See `Connection.flush`; callbacks follow it."""
        with self.lock:
            empty = super().flush()
        self.dispatch()
        return empty

    def tick(self) -> float | None:
        """See `Connection.tick`; callbacks follow it."""
        with self.lock:
            due = super().tick()
        self.dispatch()
        return due

    def dispatch(self) -> None:
        """Make the callbacks that wait, in this thread and without the lock."""
        while True:
            try:
                event = self.events.popleft()
            except IndexError:
                return
            try:
                event()
            except Exception:
                logger.exception("a callback failed")


class BlockingDriver:
    """Drives a `Connection` with paho-mqtt's loops, for programs without an event loop.

    `loop`, `loop_start`, `loop_stop` and `loop_forever` are paho's, and reconnect as paho
    does: after 1, 2, 4 … up to 120 s, but not after refused credentials. Every method may be called
    from any thread. The callbacks are called in the thread that runs the loop and hold no
    lock, so they may call everything here; what they raise is logged.

    Attributes:
        on_session: A session began; subscribe here. Publishes are released afterwards.
        on_message: A message arrived; it is acknowledged when this returns.
        on_lost: The session, or an attempt at one, ended.
    """

    def __init__(
        self,
        settings: SessionSettings,
        broker: BrokerAddress,
        *,
        backend: str,
        timeout: float = 10.0,
    ) -> None:
        self.connection = _SharedConnection(settings, backend=backend)
        self.broker = broker
        self.timeout = timeout
        self.on_session: Callable[[Session], None] = _ignore
        self.on_message: Callable[[Incoming], None] = _ignore
        self.on_lost: Callable[[ConnectError], None] = _ignore
        self._failure: ConnectError | None = None
        connection = self.connection
        connection.dial = self._dial
        connection.wake = self._wake
        connection.on_session = self._accepted
        connection.on_message = self._received
        connection.on_lost = self._lost

    def connect(self) -> Session:
        """Make the first session; call one of the loops afterwards.

        Raises:
            ConnectError: Typed by what went wrong; nothing is left open.
        """
        connection = self.connection
        while True:
            try:
                return self._connect()
            except ConnectError as error:
                if not connection.try_older(error):
                    connection.first_version()
                    raise

    def _connect(self) -> Session:
        connection = self.connection
        try:
            sock = dial_blocking(self.broker, self.timeout)
        except (MissingDependency, ConnectError) as exc:
            as_ours(exc, connection.backend)
            raise
        except (OSError, ValueError) as exc:
            raise self._dial_error(exc) from exc
        self._failure = None
        with connection.lock:
            connection.begin(sock, where=str(self.broker))
        deadline = time.monotonic() + self.timeout
        try:
            while connection.connecting:
                left = deadline - time.monotonic()
                if left <= 0:
                    connection.end()
                    raise ConnectTimeout(
                        f"no session with {self.broker} within {self.timeout:g} s",
                        hint="check host and port, or raise the timeout",
                        backend=connection.backend,
                    )
                self.paho.loop(min(left, 0.1))
            session = connection.session
        finally:
            self.paho.rest()
        if session is not None and connection.connected:
            return session
        if self._failure is not None:
            raise self._failure
        raise ConnectError(f"no session with {self.broker}", backend=connection.backend)

    @property
    def paho(self) -> PahoClient:
        """Paho's client of this session, for its loops."""
        client = self.connection.paho
        if client is None:
            raise NotConnected("connect first", backend=self.connection.backend)
        return client

    def loop(self, timeout: float = 1.0) -> int:
        """Do what is due, waiting up to *timeout* seconds for it; return paho's error code."""
        return int(self.paho.loop(timeout))

    def loop_start(self) -> None:
        """Run the loop in a thread until `loop_stop`."""
        self.paho.loop_start()

    def loop_stop(self) -> None:
        """Stop the thread; the session stays."""
        self.paho.loop_stop()

    def loop_forever(self) -> None:
        """Run the loop here until `disconnect` is called."""
        paho = self.paho
        # Makes what wakes the loop: without it, what other threads send waits up to a second.
        paho.loop(0)
        try:
            paho.loop_forever()
        finally:
            paho.rest()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        on_done: Callable[[Outgoing], None] = _ignore,
    ) -> Outgoing:
        """Send a message; *on_done* is called in the loop's thread. See `Connection.publish`."""
        with self.connection.lock:
            return self.connection.publish(
                topic,
                payload,
                qos=qos,
                retain=retain,
                properties=properties,
                on_done=self._later(on_done),
            )

    def subscribe(
        self, *wants: Subscribe, on_done: Callable[[Request], None] | None = None
    ) -> Request:
        """Send one SUBSCRIBE; see `Connection.subscribe`."""
        with self.connection.lock:
            return self.connection.subscribe(wants, self._later(on_done))

    def unsubscribe(
        self, *filters: str, on_done: Callable[[Request], None] | None = None
    ) -> Request:
        """Send one UNSUBSCRIBE; see `Connection.unsubscribe`."""
        with self.connection.lock:
            return self.connection.unsubscribe(filters, self._later(on_done))

    def _later(self, on_done: Callable[[_Done], None] | None) -> Callable[[_Done], None]:
        events = self.connection.events

        def done(what: _Done) -> None:
            if on_done is not None:
                events.append(partial(on_done, what))

        return done

    def disconnect(self) -> None:
        """Say DISCONNECT and end the session; the loops return. Legal in any state."""
        connection = self.connection
        with connection.lock:
            client = connection.paho
            if client is None:
                return
            if connection.connected:
                client.disconnect()
                deadline = time.monotonic() + 1.0
                while not connection.flush() and time.monotonic() < deadline:
                    sock = connection.socket
                    if sock is None:
                        break
                    select.select([], [sock], [], 0.05)
            connection.end()
            connection.fail_pending()
            client.disconnect()
        connection.dispatch()

    # --- callbacks --------------------------------------------------------------------

    def _dial(self) -> BufferedSocket:
        # paho's loops retry after OSError and die of anything else.
        try:
            return dial_blocking(self.broker, self.timeout)
        except (OSError, ValueError, ConnectError) as exc:
            error = self._dial_error(exc)
            self._lost(error)
            self.connection.dispatch()
            raise ConnectionError(str(error)) from exc

    def _dial_error(self, error: BaseException) -> ConnectError:
        secure = self.broker.tls is not None
        return dial_error(error, str(self.broker), backend=self.connection.backend, secure=secure)

    def _wake(self) -> None:
        client = self.connection.paho
        if client is not None:
            client.wake()

    def _accepted(self, session: Session) -> None:
        def announce() -> None:
            try:
                self.on_session(session)
            finally:
                with self.connection.lock:
                    self.connection.release()

        self.connection.events.append(announce)

    def _received(self, message: Incoming) -> None:
        def hand_over() -> None:
            try:
                self.on_message(message)
            finally:
                if message.serial:
                    with self.connection.lock:
                        self.connection.settle(message.serial)

        self.connection.events.append(hand_over)

    def _lost(self, error: ConnectError) -> None:
        self._failure = error
        if error.retryable is False and self.connection.paho is not None:
            self.connection.paho.disconnect()  # ends paho's loops, which would retry
        self.connection.events.append(lambda: self.on_lost(error))
