"""A messagebus distributor inside this process: the `Broker`, and sockets around it.

One server can have several listeners, each with its dialect, over one routing core. Every
listener takes both forms of the handshake. It listens on loopback and a free port unless told
otherwise.

The cost of a peer is bounded: a handshake has a deadline and a size, a message has limits
that are checked on its header, a slow consumer is disconnected, and one connection's burst
yields to the others. An error concerns one connection only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import ssl
from collections.abc import Mapping
from dataclasses import asdict
from typing import ClassVar, Final, Literal

from pubsub_core.errors import BadOption
from pubsub_core.servers import ServerShell, url_of
from pubsub_messagebus.protocol import DEFAULT_LIMITS, Dialect, WireLimits

from .authenticators import (
    NullServerAuthenticator,
    PasswordFileAuthenticator,
    ServerAuthenticator,
)
from .broker import Broker, Effects
from .config import ServerConfig
from .connection import STOP_DEADLINE, Connection, ListenerOptions, QueueBounds
from .counters import Faults, InteractorCounts, ServerStats, Snapshot
from .interactors import Identity
from .metrics import MetricsExporter
from .peers import PeerNames
from .roles import Policy
from .turns import Turns

__all__ = ["MessageBusServer"]

logger = logging.getLogger("pubsub_messagebus.server")

_BACKLOG: Final = 1024


class MessageBusServer(ServerShell):
    """A messagebus distributor.

    Args:
        port: 0 for a free one. It stays the same when the server is started again.
        dialect: Of this listener; `add_listener` makes more, with other dialects.
        handshake: Which form is taken; ``auto`` recognises both.
        config: Path of a TOML or JSON file; see `pubsub_messagebus.server.config`. Arguments
            win over it.
        password_file: Users must log in; see `pubsub_messagebus.passwords`.
        authenticator: Anything else that checks credentials; wins over *password_file*.
        policy: Roles and where authorization is needed; wins over the file's.
        heartbeat_interval: Seconds; 0 for none.
        certfile: With *keyfile*, PEM: makes it a TLS listener.
        cafile: Authority of client certificates, which are required then.
        ssl_context: Instead of the three.
        resolve_hosts: Show the names of peers instead of their addresses.
        handshake_timeout: Seconds for a whole handshake.
        slow_consumer: Whether a connection whose queue is full is disconnected.
        max_queued_bytes: How much may be queued for one connection.
        max_queued_frames: How many frames may be.
        metrics_port: Answer ``GET /metrics`` there, in Prometheus' text format; 0 for a free
            one, None for none.
        metrics_host: Where it listens.
    """

    backend: ClassVar[str] = "messagebus"
    scheme: ClassVar[str] = "messagebus"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        dialect: Dialect = "is_image",
        handshake: Literal["auto", "strings", "connection-string"] = "auto",
        config: str = "",
        password_file: str = "",
        authenticator: ServerAuthenticator | None = None,
        policy: Policy | None = None,
        heartbeat_interval: float | None = None,
        certfile: str = "",
        keyfile: str = "",
        cafile: str = "",
        ssl_context: ssl.SSLContext | None = None,
        resolve_hosts: bool = False,
        handshake_timeout: float = 10.0,
        slow_consumer: Literal["disconnect", "unbounded"] = "disconnect",
        max_queued_bytes: int = 64 * 1024 * 1024,
        max_queued_frames: int = 100_000,
        string_length_unit: Literal["bytes", "codepoints"] = "bytes",
        limits: WireLimits = DEFAULT_LIMITS,
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
    ) -> None:
        super().__init__(host=host, port=port)
        if config:
            told = ServerConfig.load(config)
            policy = policy or told.policy
            if heartbeat_interval is None:
                heartbeat_interval = told.heartbeat_interval
            if authenticator is None and not password_file:
                authenticator = told.authenticator()
            if not certfile and ssl_context is None:
                certfile, keyfile, cafile = told.certfile, told.keyfile, told.cafile
            if metrics_port is None:
                metrics_port = told.metrics_port
        if authenticator is None:
            authenticator = (
                PasswordFileAuthenticator(password_file)
                if password_file
                else NullServerAuthenticator()
            )
        if ssl_context is None and certfile:
            ssl_context = _server_context(certfile, keyfile, cafile)
        self.authenticator = authenticator
        self.limits = limits
        self.handshake_timeout = handshake_timeout
        self.queue = (
            QueueBounds(max_queued_bytes, max_queued_frames)
            if slow_consumer == "disconnect"
            else QueueBounds()
        )
        self.peers = PeerNames(resolve=resolve_hosts)
        self.broker = Broker(policy)
        self.count = ServerStats()
        self.turns = Turns()
        self.faults = Faults()
        self._written_before = 0
        self._heartbeats = 0
        self._logins = 0
        self.connections: dict[Connection, None] = {}
        self.sockets: set[Connection] = set()
        self._drained = asyncio.Event()
        self._stopping = False
        self._heartbeat_interval = heartbeat_interval or 0.0
        self._metrics = (
            None
            if metrics_port is None
            else MetricsExporter(self.snapshot, metrics_host, metrics_port)
        )
        self._listeners: list[ListenerOptions] = [
            ListenerOptions(
                host=host,
                port=port,
                dialect=dialect,
                handshake=handshake,
                ssl=ssl_context,
                string_length_unit=string_length_unit,
            )
        ]
        self._ports: list[int] = []
        self._servers: list[asyncio.Server] = []
        self._beating: asyncio.Task[None] | None = None

    # --- DevServer ---------------------------------------------------------------------

    def add_listener(self, options: ListenerOptions) -> int:
        """Add a listener before the start; return its number, for `ports`."""
        self._listeners.append(options)
        return len(self._listeners) - 1

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports of all listeners, in the order they were added."""
        return tuple(self._ports)

    @property
    def url(self) -> str:
        """URL to connect to, without credentials."""
        first = self._listeners[0]
        scheme = "messagebus+tls" if first.ssl is not None else "messagebus"
        query = "?dialect=content_type" if first.dialect == "content_type" else ""
        return url_of(scheme, self.host, self.port) + query

    @property
    def metrics_url(self) -> str:
        """Where the metrics are, or nothing without them; the port is known after `start`."""
        return "" if self._metrics is None else self._metrics.url

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return bool(self._servers)

    def describe(self) -> Mapping[str, object]:
        """Return how clients must log in, the further listeners, and where metrics are."""
        found: dict[str, object] = {
            "dialect": self._listeners[0].dialect,
            "authentication": self.authenticator.handshake,
        }
        if len(self._listeners) > 1:
            found["ports"] = self.ports
        if self._metrics is not None:
            found["metrics"] = self._metrics.url
        return found

    def stats(self) -> dict[str, int]:
        """Return all counters, the metrics' sums among them."""
        count = self.count
        connections = tuple(self.connections)
        # Everything is acted on as it is read, except that a burst yields to others.
        count.events_queue_length = sum(each.busy for each in connections)
        broker = self.broker.stats
        ended = self._logins - broker.clients
        count.events_dequeued = self._logins + ended + broker.received + self._heartbeats
        count.events_enqueued = count.events_dequeued + count.events_queue_length
        count.write_queue_length = sum(each.waiting for each in connections)
        return {**asdict(count), **asdict(broker)}

    def snapshot(self) -> Snapshot:
        """Return all numbers by connection, for metrics."""
        stats = self.stats()
        counts = [
            InteractorCounts(view, view.conn.written, view.conn.waiting)
            for view in self.broker.interactors()
            if isinstance(view.conn, Connection)  # always; the broker takes any hashable
        ]
        return Snapshot(
            interactors=counts,
            ended=self.broker.ended,
            ended_written=self._written_before,
            faults=self.faults,
            events_enqueued=stats["events_enqueued"],
            events_dequeued=stats["events_dequeued"],
            events_queue_length=stats["events_queue_length"],
        )

    async def start(self) -> None:
        """Listen; afterwards `url` and `port` are known.

        Raises:
            ConnectError: A port is taken, or an address is not this machine's.
        """
        if self._servers:
            return
        loop = asyncio.get_running_loop()
        self._stopping = False
        self._drained = asyncio.Event()
        self.turns = Turns()
        ports: list[int] = []
        try:
            for number, listener in enumerate(self._listeners):
                wanted = self._ports[number] if number < len(self._ports) else listener.port
                try:
                    server = await loop.create_server(
                        lambda listener=listener: Connection(self, listener),
                        listener.host,
                        wanted,
                        ssl=listener.ssl,
                        ssl_handshake_timeout=self.handshake_timeout if listener.ssl else None,
                        backlog=_BACKLOG,
                    )
                except OSError as exc:
                    raise self.cannot_listen(exc, host=listener.host, port=wanted) from exc
                self._servers.append(server)
                ports.append(server.sockets[0].getsockname()[1])
            if self._metrics is not None:
                await self._metrics.start()
        except BaseException:
            await self.stop()
            raise
        self._ports = ports
        self.port = ports[0]
        if not isinstance(self.authenticator, NullServerAuthenticator):
            # The first login need not wait for a thread to start.
            await loop.run_in_executor(None, int)
        if self._heartbeat_interval > 0:
            self._beating = loop.create_task(self._beat(), name="messagebus heartbeat")

    async def stop(self) -> None:
        """Stop; connections have a short time to read their queues."""
        await self._stop(abort=False)

    async def kill(self) -> None:
        """Stop as a crash would: every connection is reset."""
        await self._stop(abort=True)

    async def _stop(self, *, abort: bool) -> None:
        self._stopping = True
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        if self._metrics is not None:
            await self._metrics.stop()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
            self._beating = None
        waiting = [
            task
            for connection in self.connections
            if (task := connection.authentication) is not None
        ]
        for connection in tuple(self.connections):
            connection.end(abort=abort)
        if waiting:
            await asyncio.wait(waiting, timeout=STOP_DEADLINE)
        for server in servers:
            await server.wait_closed()
        for _ in range(2):
            if self.sockets:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_DEADLINE):
                        await self._drained.wait()
            for connection in tuple(self.sockets):
                connection.end(abort=True)

    async def restart(self) -> None:
        """Stop, and start on the same ports."""
        await self.kill()
        await self.start()

    # --- for connections ------------------------------------------------------------------

    def opened(self, connection: Connection) -> bool:
        """Learn of a socket; return whether it may stay."""
        self.count.accepted += 1
        self.sockets.add(connection)
        self._drained.clear()
        if self._stopping or self.turns.full:
            self.count.turned_away += not self._stopping
            return False
        self.connections[connection] = None
        self.count.connections = len(self.connections)
        return True

    def closed(self, connection: Connection) -> None:
        """Learn that a socket is gone."""
        self.sockets.discard(connection)
        if not self.sockets:
            self._drained.set()

    def admit(self, connection: Connection, identity: Identity, dialect: Dialect) -> None:
        """Take in a connection that has logged in."""
        self._logins += 1
        self.deliver(self.broker.connected(connection, identity, dialect=dialect))

    def ended(self, connection: Connection) -> None:
        """Learn that a connection acts on nothing more."""
        self.connections.pop(connection, None)
        self.count.connections = len(self.connections)

    def leave(self, connection: Connection, *, fault: bool) -> None:
        """Take out a connection that was admitted, and tell the others."""
        if fault:
            self.count.interactor_faults += 1
            self.faults.note(self.broker.names(connection))
        self._written_before += connection.written
        self.deliver(self.broker.disconnected(connection))

    def deliver(self, effects: Effects) -> None:
        """Queue frames; connections that hold too much are ended."""
        for connection, frame in effects:
            # This server gives its broker nothing but its own connections; a check would be
            # paid for every delivery.
            if not connection.write(frame):  # type: ignore[attr-defined]
                self._too_slow(connection)  # type: ignore[arg-type]

    def _too_slow(self, connection: Connection) -> None:
        self.count.slow_consumers += 1
        logger.warning("%s: does not read, and is disconnected", connection.peer)
        connection.doom()
        self.turns.end(connection, fault=True)

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for beat in itertools.count(1):
            await asyncio.sleep(max(0.0, began + beat * self._heartbeat_interval - loop.time()))
            self._heartbeats += 1
            self.deliver(self.broker.heartbeat())


def _server_context(certfile: str, keyfile: str, cafile: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile or None)
        if cafile:
            context.load_verify_locations(cafile)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise BadOption(
            f"the certificate {certfile} cannot be used: {error}",
            option="certfile",
            backend="messagebus",
        ) from error
    return context
