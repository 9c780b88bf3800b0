"""What every backend over MQTT does with its connection, whatever its topics mean.

`MQTTBackend` is one of them; backends of services that speak MQTT with rules of their own are
others. Each adds how it publishes, subscribes and receives, and what it can do.
"""

from __future__ import annotations

from pubsub_core import interfaces
from pubsub_core.errors import ConnectError
from pubsub_core.events import Notice
from pubsub_core.interfaces import Backend, BackendContext, Sink
from pubsub_core.keyed import KeyedLocks

from .connection import Connection, Session
from .driver import AsyncioDriver
from .transport import Endpoint

__all__ = ["ConnectionBackend"]


class ConnectionBackend(Backend):
    """One session over an MQTT connection.

    Attributes:
        driver: Carries the session.
        connection: Window, outcomes and counters; outlives sessions.
    """

    def __init__(self, context: BackendContext, endpoint: Endpoint, connection: Connection) -> None:
        super().__init__(context)
        self._name = context.info.name
        self._endpoint = endpoint
        self.connection = connection
        self.driver = AsyncioDriver(connection)
        connection.on_notice = self._notice
        self.driver.on_lost = self._lost
        self._sink: Sink | None = None
        # One operation at a time for each filter: subscribing and leaving it, say.
        self._turns = KeyedLocks[str]()
        self._closed = False

    @property
    def endpoint(self) -> interfaces.Endpoint:
        """Where `open` connects to."""
        where = self._endpoint
        if where.unix_path:
            return interfaces.Endpoint(where.unix_path, None)
        return interfaces.Endpoint(where.host, where.port, where.tls is not None)

    @property
    def session(self) -> Session | None:
        """What the broker's CONNACK said, or None without a session."""
        return self.connection.session if self.connection.connected else None

    async def _dial(self, sink: Sink) -> Session:
        """Make one session; what arrives from now on goes to *sink*."""
        if self._closed:
            raise ConnectError("the backend was closed", backend=self._name, retryable=False)
        self._sink = sink
        return await self.driver.open(self._endpoint)

    async def restored(self) -> None:
        """Send what waited: first what the last session left unanswered, in its order."""
        self.connection.release()

    async def drop(self) -> None:
        """End the session as if it had been lost; unanswered publishes wait for the next."""
        self.driver.abort()

    async def close(self, *, drain: float) -> None:
        """Flush, say DISCONNECT, close; see `Backend.close`."""
        self._closed = True
        self._sink = None
        self.driver.resume()
        await self.driver.close(drain=drain)

    def _lost(self, error: ConnectError) -> None:
        if self._sink is not None:
            self._sink.lost(error)

    def _notice(self, kind: str, text: str, topic: str) -> None:
        if self._sink is not None:
            self._sink.notice(Notice(kind, text, topic))

    async def ping(self) -> float:
        """Return the seconds between PINGREQ and PINGRESP."""
        return await self.driver.ping()
