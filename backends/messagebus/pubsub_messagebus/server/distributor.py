"""A messagebus distributor inside this process: the `Broker`, and sockets around it.

One server can have several listeners, each with its dialect, over one routing core. Every
listener takes both forms of the handshake. It listens on loopback and a free port unless told
otherwise.

What a peer can cost is bounded: a handshake has a deadline and a size, a message has limits
that are checked on its header, a slow consumer is disconnected, and one connection's burst
yields to the others. An error concerns one connection only.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ipaddress
import itertools
import logging
import socket
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from pubsub_core.errors import BadOption, PubSubError
from pubsub_messagebus.protocol import (
    DEFAULT_LIMITS,
    Credentials,
    Decoder,
    Dialect,
    HandshakeDecoder,
    HandshakeForm,
    LengthUnit,
    ProtocolError,
    WireLimits,
)

from .authenticators import (
    NullServerAuthenticator,
    PasswordFileAuthenticator,
    Refused,
    ServerAuthenticator,
)
from .broker import MAX_COUNTED_NAME, Broker, Effects, Identity
from .config import ServerConfig
from .metrics import MetricsEndpoint
from .roles import Policy

__all__ = ["ListenerOptions", "MessageBusServer", "ServerStats"]

logger = logging.getLogger("pubsub_messagebus.server")

START_BACKLOG = 1024
STOP_DEADLINE = 2.0
"""Seconds in which connections may take what was queued for them when the server stops."""

MAX_FAULTY = 1000
"""Peers whose faults are counted one by one; those of the others are counted together."""

# How long one connection's burst may keep the others waiting, in seconds, and after how many
# messages and deliveries the clock is looked at. Who fans out alone may go on a little: writing
# many messages to a connection costs hardly more than writing one.
_TURN = 0.005
_LOOK = 64
_FANNED_OUT = range(1000, 20_000)
# While bursts wait: what has just arrived may take so long each, and then the bursts together.
_SHORT_TURN = 0.0005
_ROUND = 0.02
# What has arrived is acted upon even if its sender has gone. So connections would pile up that
# come faster than their bursts can be worked off, each with up to 256 KiB that were read. With
# so many waiting, no more are taken.
_CROWD = 200
_WRITE_AT_ONCE = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerOptions:
    """One more listener.

    Attributes:
        ssl: Makes it a TLS listener.
        string_length_unit: ``codepoints`` for sites full of old Python clients.
    """

    host: str = "127.0.0.1"
    port: int = 0
    dialect: Dialect = "is_image"
    handshake: HandshakeForm | Literal["auto"] = "auto"
    ssl: ssl.SSLContext | None = None
    string_length_unit: LengthUnit = "bytes"


@dataclass(slots=True)
class ServerStats:
    """What the connections did; `Broker.stats` counts what was routed.

    Attributes:
        turned_away: Connections closed at once, because too many wait for their turn.
        refused: Connections closed for their credentials.
        timeouts: Connections closed because the handshake took too long.
        protocol_errors: Connections closed for what they sent.
        slow_consumers: Connections closed because they did not read.
        interactor_faults: Connections that ended, after login, for anything but a close.
        events_enqueued: Connects, disconnects, messages and heartbeats that arrived.
        write_queue_length: Messages that wait to be written, on all connections.
    """

    accepted: int = 0
    connections: int = 0
    turned_away: int = 0
    refused: int = 0
    timeouts: int = 0
    protocol_errors: int = 0
    slow_consumers: int = 0
    interactor_faults: int = 0
    events_enqueued: int = 0
    events_dequeued: int = 0
    events_queue_length: int = 0
    write_queue_length: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    frames_written: int = 0


class _Turns:
    """Whose turn it is when there is more to do than at once can be done.

    Every connection acts upon what it reads when it arrives. What is too much for one turn is a
    burst, which waits here for the next; so those who send little never wait behind all who
    send much. The ends of many connections wait here as well: each is told to others.
    """

    def __init__(self) -> None:
        self._bursts = collections.deque[_Connection]()
        self._endings = collections.deque[tuple[_Connection, bool]]()
        self._scheduled = False

    @property
    def waiting(self) -> bool:
        """Whether bursts wait."""
        return bool(self._bursts)

    @property
    def first(self) -> float:
        """How long a connection may act upon what has just arrived."""
        return _SHORT_TURN if self._bursts else _TURN

    @property
    def full(self) -> bool:
        """Whether so many wait that a new connection would make it worse."""
        return len(self._bursts) >= _CROWD

    def again(self, connection: _Connection) -> None:
        """Let a connection go on with its burst when the others had a turn."""
        self._bursts.append(connection)
        self._schedule()

    def end(self, connection: _Connection, *, fault: bool) -> None:
        """End a lost connection or a slow one soon."""
        self._endings.append((connection, fault))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        self._scheduled = False
        clock = asyncio.get_running_loop().time
        until = clock() + _ROUND
        # Each once, and one at least.
        for number in range(len(self._bursts)):
            if number and clock() > until:
                break
            self._bursts.popleft().proceed()
        for number in range(len(self._endings)):
            if number and clock() > until:
                break
            connection, fault = self._endings.popleft()
            connection.end(abort=True, fault=fault)
        if self._bursts or self._endings:
            self._schedule()


class _Connection(asyncio.Protocol):
    """One client: bytes to messages, frames to bytes. asyncio has set TCP_NODELAY."""

    def __init__(self, server: MessageBusServer, listener: ListenerOptions) -> None:
        self._server = server
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.peer = "?"
        self._host = ""
        self._handshake: HandshakeDecoder | None = HandshakeDecoder(
            server.authenticator.handshake,
            form=listener.handshake,
            limits=server.limits,
            string_length_unit=listener.string_length_unit,
        )
        self._deadline: asyncio.TimerHandle | None = None
        self._authenticating: asyncio.Task[None] | None = None
        self.decoder: Decoder | None = None
        self._early: list[bytes] = []
        self._busy = False
        self._paused = False
        self._frames = collections.deque[bytes]()
        self._queued = 0
        self.written = 0
        self._flushing = False
        self._ended = False
        self._doomed = False
        self.online = False

    # --- asyncio.Protocol --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or close at once while the server stops."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP always is
        self.transport = transport
        server = self._server
        server.count.accepted += 1
        server.sockets.add(self)
        server.drained.clear()
        if server.stopping or server.turns.full:
            server.count.turned_away += not server.stopping
            self._ended = True
            transport.abort()
            return
        server.connections[self] = None
        server.count.connections = len(server.connections)
        address: Any = transport.get_extra_info("peername")
        host = str(address[0]) if address else ""
        self.peer = f"{host}:{address[1]}" if address else "?"
        self._host = host
        transport.set_write_buffer_limits(high=_WRITE_AT_ONCE)
        if server.authenticator.handshake == "null":
            # There may be no first byte at all: who only listens to notices sends nothing.
            self._begin_authentication(Credentials("null"))
        else:
            self._deadline = self._loop.call_later(server.handshake_timeout, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the handshake or of messages."""
        if self._ended:
            return
        self._server.count.bytes_read += len(data)
        if self._handshake is not None:
            self._shake(data)
        elif self.decoder is None or self._busy:
            self._early.append(data)
        else:
            self.decoder.feed(data)
            self._work(self._server.turns.first)

    def eof_received(self) -> bool:
        """End, whether between messages or inside one."""
        if self._ended:
            return False
        handshake = self._handshake
        if (handshake is not None and handshake.inside) or (
            self.decoder is not None and self.decoder.inside and not self._busy
        ):
            logger.info("%s: the stream ended inside a message", self.peer)
            self.end(fault=True)
        self.end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after a close or a reset."""
        if self._ended or not self.online:
            self.end()
        elif not self._doomed:
            self.doom()
            self._server.turns.end(self, fault=exc is not None)
        self._server.sockets.discard(self)
        if not self._server.sockets:
            self._server.drained.set()

    def pause_writing(self) -> None:
        """Keep frames here until the peer reads again."""
        self._paused = True

    def resume_writing(self) -> None:
        """Go on writing."""
        self._paused = False
        # Not at once: asyncio calls this in the middle of sending, and a transport that breaks in
        # here tells its end twice (CPython 3.11: "Exception in callback").
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    # --- the handshake -----------------------------------------------------------------

    def _shake(self, data: bytes) -> None:
        handshake = self._handshake
        if handshake is None:
            return
        handshake.feed(data)
        try:
            credentials = handshake.next_credentials()
        except ProtocolError as error:
            self._server.count.refused += 1
            logger.warning("%s: refused: %s", self.peer, error)
            self.end()
            return
        if credentials is None:
            if self._server.authenticator.handshake == "null" and self._deadline is None:
                self._deadline = self._loop.call_later(
                    self._server.handshake_timeout, self._too_slow
                )
            return
        self._handshake = None
        if handshake.rest:
            self._early.insert(0, handshake.rest)
        if self.online:
            self._stop_deadline()
            self._work(self._server.turns.first)
            return
        self._begin_authentication(credentials)

    def _begin_authentication(self, credentials: Credentials) -> None:
        server = self._server
        if isinstance(server.authenticator, NullServerAuthenticator):
            self._admit(Identity(host=server.host_name(self._host)))
            return
        assert self.transport is not None  # noqa: S101 - made
        self.transport.pause_reading()
        self._authenticating = self._loop.create_task(
            self._authenticate(credentials), name=f"messagebus authentication {self.peer}"
        )

    async def _authenticate(self, credentials: Credentials) -> None:
        server = self._server
        try:
            user = await server.authenticator.authenticate(credentials)
            host = await server.resolve(self._host)
        except Refused as error:
            server.count.refused += 1
            logger.warning("%s: refused: %s", self.peer, error)
            self.end()
            return
        except PubSubError as error:
            server.count.refused += 1
            logger.error("%s: authentication failed: %s", self.peer, error)  # noqa: TRY400 - one line for one peer
            self.end()
            return
        except Exception:
            server.count.refused += 1
            logger.exception("%s: the authenticator failed", self.peer)
            self.end()
            return
        finally:
            self._authenticating = None
        if self._ended:
            return
        identity = Identity(
            user=user.name,
            host=host,
            method=user.method,
            impersonating=credentials.impersonating,
            forwarded_for=credentials.forwarded_for,
            application=credentials.application,
            permissions=user.permissions,
        )
        self._admit(identity)
        if self._may_read and self.transport is not None:
            self.transport.resume_reading()

    def _admit(self, identity: Identity) -> None:
        if self._server.authenticator.handshake != "null":
            self._stop_deadline()
        self.decoder = Decoder(
            "server",
            dialect=self._listener.dialect,
            limits=self._server.limits,
            string_length_unit=self._listener.string_length_unit,
        )
        self.online = True
        self._server.admit(self, identity, self._listener.dialect)
        if self._handshake is None:
            self._work(self._server.turns.first)

    def _too_slow(self) -> None:
        self._server.count.timeouts += 1
        logger.warning("%s: no handshake within the deadline", self.peer)
        self.end()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # --- messages in -------------------------------------------------------------------

    def _work(self, turn: float) -> None:
        """Act on complete messages; after a long burst let others have a turn."""
        decoder = self.decoder
        if decoder is None or self._ended:
            return
        early, self._early = self._early, []
        for data in early:
            decoder.feed(data)
        server = self._server
        received = server.broker.received
        deliver = server.deliver
        clock = self._loop.time
        until = clock() + turn
        done, look = 0, _LOOK
        self._busy = False
        try:
            while True:
                message = decoder.next_message()
                if message is None:
                    return
                result = received(self, message)
                done += 1
                if result:
                    deliver(result)
                    if self._doomed:
                        return
                    done += len(result)
                if done >= look:
                    look = done + _LOOK
                    if clock() > until and (server.turns.waiting or done not in _FANNED_OUT):
                        break
        except ProtocolError as error:
            server.count.protocol_errors += 1
            logger.warning("%s: protocol error: %s", self.peer, error)
            self.end(fault=True)
            return
        self._busy = True
        if self.transport is not None:
            self.transport.pause_reading()
        server.turns.again(self)

    def proceed(self) -> None:
        """Take another turn, and read on when nothing is left."""
        if self._ended or self._doomed or self.transport is None:
            return
        self._work(_TURN)
        if self._may_read:
            self.transport.resume_reading()

    @property
    def _may_read(self) -> bool:
        return not (self._busy or self._ended or self._authenticating is not None)

    # --- frames out --------------------------------------------------------------------

    def write(self, frame: bytes) -> bool:
        """Queue a frame; return False when the connection holds more than it may."""
        if self._doomed:
            return True
        self._frames.append(frame)
        self._queued += len(frame)
        if not self._flushing and not self._paused:
            self._flushing = True
            self._loop.call_soon(self._flush)
        server = self._server
        if server.slow_consumer != "disconnect":
            return True
        return self._queued <= server.max_queued_bytes and len(self._frames) <= (
            server.max_queued_frames
        )

    def doom(self) -> None:
        """Give up what is queued, and act upon nothing more."""
        self._doomed = True
        self._frames.clear()
        self._queued = 0
        self._busy = True
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def _flush(self) -> None:
        self._flushing = False
        transport = self.transport
        frames = self._frames
        if transport is None or self._ended:
            return
        while frames and not self._paused:
            batch: list[bytes] = []
            if self._queued <= _WRITE_AT_ONCE:
                batch.extend(frames)
                frames.clear()
            else:
                size = 0
                while frames and size < _WRITE_AT_ONCE:
                    frame = frames.popleft()
                    size += len(frame)
                    batch.append(frame)
            data = b"".join(batch)
            self._queued -= len(data)
            self.written += len(batch)
            self._server.count.frames_written += len(batch)
            self._server.count.bytes_written += len(data)
            transport.write(data)

    # --- the end -----------------------------------------------------------------------

    def end(self, *, abort: bool = False, fault: bool = False) -> None:
        """Leave the broker, then close. What the peer was sent before may still reach it."""
        if self._ended:
            if abort and self.transport is not None:
                self.transport.abort()
            return
        # Whole frames only: what is queued here has not begun.
        if not abort:
            self._paused = False
            self._flush()
        self._ended = True
        self._stop_deadline()
        self._frames.clear()
        self._queued = 0
        server = self._server
        server.connections.pop(self, None)
        server.count.connections = len(server.connections)
        if self._authenticating is not None:
            self._authenticating.cancel()
        if self.transport is not None:
            if abort:
                self.transport.abort()
            else:
                self.transport.close()
                if self.transport.get_write_buffer_size():
                    # The peer may never read it.
                    self._loop.call_later(STOP_DEADLINE, self._give_up)
        if self.online:
            self.online = False
            if fault:
                server.note_fault(self)
            server.written_before += self.written
            server.deliver(server.broker.disconnected(self))

    @property
    def waiting(self) -> int:
        """Messages that wait to be written."""
        return len(self._frames)

    @property
    def busy(self) -> bool:
        """Whether messages wait for their turn."""
        return self._busy

    @property
    def authentication(self) -> asyncio.Task[None] | None:
        """The task that checks credentials, while it does."""
        return self._authenticating

    def _give_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class MessageBusServer:
    """A messagebus distributor.

    Args:
        port: 0 for a free one. It stays the same when the server is started again.
        dialect: Of this listener; `add_listener` makes more, with other dialects.
        handshake: Which form is taken; ``auto`` recognises both.
        config: Path of a TOML or JSON file; see `pubsub_messagebus.server.config`. What is given
            here wins.
        password_file: Users must log in; see `pubsub_messagebus.passwords`.
        authenticator: Anything else that checks credentials; wins over *password_file*.
        policy: Roles and where authorization is needed; wins over the file's.
        heartbeat_interval: Seconds; 0 for none.
        certfile: With *keyfile*, PEM: makes it a TLS listener.
        cafile: Authority of client certificates, which are required then.
        ssl_context: Instead of the three.
        resolve_hosts: Show the names of peers instead of their addresses.
        handshake_timeout: Seconds for a whole handshake.
        slow_consumer: What happens to a connection that does not read what is queued for it.
        max_queued_bytes: How much may be queued for one connection.
        max_queued_frames: How many frames may be.
        metrics_port: Answer ``GET /metrics`` there, in Prometheus' text format; 0 for a free
            one, None for none.
        metrics_host: Where it listens.
    """

    backend: ClassVar[str] = "messagebus"

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
        self.slow_consumer: Literal["disconnect", "unbounded"] = slow_consumer
        self.max_queued_bytes = max_queued_bytes
        self.max_queued_frames = max_queued_frames
        self.broker = Broker(policy)
        self.count = ServerStats()
        self.turns = _Turns()
        self.faults: dict[tuple[str, str, str], int] = {}
        self.written_before = 0
        self._heartbeats = 0
        self._logins = 0
        self.connections: dict[_Connection, None] = {}
        self.sockets: set[_Connection] = set()
        self.drained = asyncio.Event()
        self.stopping = False
        self._resolve_hosts = resolve_hosts
        self._heartbeat_interval = heartbeat_interval or 0.0
        self._metrics = (
            None if metrics_port is None else MetricsEndpoint(self, metrics_host, metrics_port)
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
        self._local_name = socket.gethostname()
        self._names = collections.OrderedDict[str, str]()

    # --- DevServer ---------------------------------------------------------------------

    def add_listener(self, options: ListenerOptions) -> int:
        """Add a listener before the start; return its number, for `ports`."""
        self._listeners.append(options)
        return len(self._listeners) - 1

    @property
    def host(self) -> str:
        """As it was given."""
        return self._listeners[0].host

    @property
    def port(self) -> int:
        """The first listener's port, known once it was started."""
        return self._ports[0] if self._ports else self._listeners[0].port

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports of all listeners, in the order they were added."""
        return tuple(self._ports)

    @property
    def url(self) -> str:
        """URL to connect to, without credentials."""
        first = self._listeners[0]
        scheme = "messagebus+tls" if first.ssl is not None else "messagebus"
        host = f"[{first.host}]" if ":" in first.host else first.host
        query = "?dialect=content_type" if first.dialect == "content_type" else ""
        return f"{scheme}://{host}:{self.port}{query}"

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
        """Return a snapshot of all counters, the metrics' sums among them."""
        count, broker = self.count, self.broker
        connections = tuple(self.connections)
        # Everything is acted upon as it is read, except that a burst yields to others.
        count.events_queue_length = sum(each.busy for each in connections)
        here = broker.stats.clients
        count.events_dequeued = 2 * self._logins - here + broker.stats.received + self._heartbeats
        count.events_enqueued = count.events_dequeued + count.events_queue_length
        count.write_queue_length = sum(each.waiting for each in connections)
        return {**asdict(count), **asdict(broker.stats)}

    async def start(self) -> None:
        """Listen; afterwards `url` and `port` are known."""
        if self._servers:
            return
        loop = asyncio.get_running_loop()
        self.stopping = False
        self.drained = asyncio.Event()
        self.turns = _Turns()
        ports: list[int] = []
        try:
            for number, listener in enumerate(self._listeners):
                wanted = self._ports[number] if number < len(self._ports) else listener.port
                server = await loop.create_server(
                    lambda listener=listener: _Connection(self, listener),
                    listener.host,
                    wanted,
                    ssl=listener.ssl,
                    ssl_handshake_timeout=self.handshake_timeout if listener.ssl else None,
                    backlog=START_BACKLOG,
                )
                self._servers.append(server)
                ports.append(server.sockets[0].getsockname()[1])
            if self._metrics is not None:
                await self._metrics.start()
        except BaseException:
            await self.stop()
            raise
        self._ports = ports
        if not isinstance(self.authenticator, NullServerAuthenticator):
            # The first login need not wait for a thread to start.
            await loop.run_in_executor(None, int)
        if self._heartbeat_interval > 0:
            self._beating = loop.create_task(self._beat(), name="messagebus heartbeat")

    async def stop(self) -> None:
        """Stop; connections get what was queued for them, within a short time."""
        await self._stop(abort=False)

    async def kill(self) -> None:
        """Stop as a crash would: every connection is reset."""
        await self._stop(abort=True)

    async def _stop(self, *, abort: bool) -> None:
        self.stopping = True
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
                        await self.drained.wait()
            for connection in tuple(self.sockets):
                connection.end(abort=True)

    async def restart(self) -> None:
        """Stop, and start on the same ports."""
        await self.kill()
        await self.start()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    # --- what connections ask ------------------------------------------------------------

    def admit(self, connection: _Connection, identity: Identity, dialect: Dialect) -> None:
        """Take in a connection that has logged in."""
        self._logins += 1
        self.deliver(self.broker.connected(connection, identity, dialect=dialect))

    def deliver(self, effects: Effects) -> None:
        """Queue frames; connections that hold too much are ended."""
        for connection, frame in effects:
            # Everything that this server gives to its broker is a connection of its own.
            if not connection.write(frame):  # type: ignore[attr-defined]
                self._too_slow(connection)  # type: ignore[arg-type]

    def _too_slow(self, connection: _Connection) -> None:
        self.count.slow_consumers += 1
        logger.warning("%s: does not read, and is disconnected", connection.peer)
        connection.doom()
        self.turns.end(connection, fault=True)

    def written_to(self, connection: object) -> int:
        """Return how many messages were written to a connection."""
        return connection.written if isinstance(connection, _Connection) else 0

    def waiting_for(self, connection: object) -> int:
        """Return how many messages wait until a connection takes them."""
        return connection.waiting if isinstance(connection, _Connection) else 0

    def note_fault(self, connection: _Connection) -> None:
        """Count the end of a connection that did not simply close."""
        self.count.interactor_faults += 1
        names = self.broker.names(connection)
        if names not in self.faults and (
            len(self.faults) >= MAX_FAULTY or max(map(len, names)) > MAX_COUNTED_NAME
        ):
            names = ("", "", "")
        self.faults[names] = self.faults.get(names, 0) + 1

    def host_name(self, address: str) -> str:
        """Return how others see a peer: this machine's name for loopback."""
        try:
            local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        except ValueError:
            local = False
        return self._local_name if local else self._names.get(address, address)

    async def resolve(self, address: str) -> str:
        """Return `host_name`, after asking the name service where that is wanted."""
        name = self.host_name(address)
        if not self._resolve_hosts or name != address:
            return name
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2):
                name = (await asyncio.get_running_loop().getnameinfo((address, 0)))[0]
        self._names[address] = name
        while len(self._names) > 1024:
            self._names.popitem(last=False)
        return name

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
