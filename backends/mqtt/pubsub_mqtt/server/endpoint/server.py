"""The sockets of an endpoint: listening, TLS, HTTP and WebSocket by first byte, and stopping.

`EndpointServer` runs a `Dialect` in the running event loop. Bytes are read in large pieces, and
what a turn of the loop produced for a client leaves in one write, so a message to a hundred
clients costs a hundred system calls for all messages of that turn, not for each.

A publisher is not read for a moment while one of its receivers is behind, so that a fast
publisher does not cost a client of usual speed its connection. After `_GRACE` seconds without
relief that ends, and the slow client loses its connection or its messages instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pubsub_core.servers import ServerShell, url_of
from pubsub_mqtt.server.tls import ServerTLS

from .client import Client, Dialect, EndpointStats
from .journal import Store
from .profile import HttpRequest, HttpResponse
from .web import HTTP_METHODS, WebPeer

__all__ = ["EndpointServer"]

logger = logging.getLogger("pubsub_mqtt.server.endpoint")

_HIGH_WATER = 65_536
"""Bytes in asyncio's buffer of a client before the rest waits in ours, which has a bound."""

_LINGER = 1.0
"""Seconds that a peer has to read what was sent before its connection is dropped."""

_STOP = 0.5
_BACKLOG = 1024
_GRACE = 1.0
"""Seconds that a publisher waits for a receiver that is behind."""


class EndpointServer(ServerShell):
    """A server of one dialect; loopback and a free port unless told otherwise.

    It can be started again after `stop`, on the same port.

    Args:
        port: 0 for a free one; `port` is known once it was started.
        tls: Certificate and key; every connection is encrypted then.
        max_clients: Connections at the same time; more are closed at once, and counted.
        store: The broker's memory; open while the server runs.

    Attributes:
        tls: As it was given.
    """

    backend: ClassVar[str] = "mqtt"
    scheme: ClassVar[str] = "mqtt"
    tls_scheme: ClassVar[str] = "mqtts"

    def __init__(
        self,
        dialect: Dialect,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ServerTLS | None = None,
        max_clients: int = 10_000,
        store: Store | None = None,
    ) -> None:
        super().__init__(host=host, port=port)
        self.dialect = dialect
        self._store = store
        self.tls = tls
        self.stats = EndpointStats()
        self.max_clients = max_clients
        self.context: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self.pressing: set[_Link] = set()
        self.paused = False

    @property
    def url(self) -> str:
        """URL to connect to, without credentials."""
        return url_of(self.tls_scheme if self.tls else self.scheme, self.host, self.port)

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    def describe(self) -> Mapping[str, object]:
        """Return where its content is kept, if it has any."""
        store = self._store
        if store is None:
            return {}
        return {"store": "memory (volatile)" if store.path is None else str(store.path)}

    async def opened(self) -> None:
        """Called before it listens, with the store open."""

    async def start(self) -> None:
        """Listen.

        Raises:
            ConnectError: The port is taken, the address is not this machine's, or the file of the
                store cannot be used.
            TLSProblem: Certificate or key cannot be used.
        """
        if self._server is not None:
            return
        if self._store is not None:
            await self._store.open()
        try:
            await self.opened()
            await self._listen()
        except BaseException:
            if self._store is not None:
                await self._store.close()
            raise

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self.context = None
        if self.tls is not None:
            self.context = await asyncio.to_thread(self.tls.context, backend=self.backend)
        try:
            self._server = await loop.create_server(
                lambda: _Link(self),
                self.host,
                self.port,
                backlog=_BACKLOG,
            )
        except OSError as exc:
            raise self.cannot_listen(exc) from exc
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, end every connection, and close the store.

        Without a store it returns within a second in any state.
        """
        server, self._server = self._server, None
        self.paused = False
        if server is None:
            return
        server.close()
        links = list(self._links)
        for link in links:
            link.end("the server stopped")
        # asyncio ends a transport in the next turns of the loop.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP):
                await asyncio.gather(*(link.gone for link in links))
        if self._store is not None:
            await self._store.close()

    def pause(self) -> None:
        """Fall silent: nothing is read, answered or closed, and new connections wait.

        For tests of how clients notice a dead server.
        """
        self.paused = True
        for link in self._links:
            link.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self.paused = False
        for link in list(self._links):
            link.resume()

    def http(self, request: HttpRequest) -> HttpResponse:
        """Answer an HTTP request; a mistake in that answers 500."""
        try:
            return self.dialect.http(request)
        except Exception:
            logger.exception("an HTTP request could not be answered")
            return HttpResponse(500, b"Internal Server Error")

    @property
    def links(self) -> set[_Link]:
        """Connections at the moment, those without a CONNECT included."""
        return self._links


class _Link(asyncio.Protocol):
    """One connection: its transport, and who speaks on it.

    Attributes:
        gone: Done when nothing of the connection is left.
    """

    def __init__(self, server: EndpointServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._client: Client | None = None
        self._web: WebPeer | None = None
        self._begun = False
        self._paused = False
        self._flushing = False
        self._closing = False
        self._receiving = False
        self._timer: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        # TLS is negotiated by a task, so that its time counts and stopping can end it.
        self._securing: asyncio.Task[None] | None = None
        self._early: list[bytes] = []
        # Who is not read because of this one, and because of whom this one is not read.
        self._crowded_at: float | None = None
        self._holds: set[_Link] = set()
        self._held_by: set[_Link] = set()

    @property
    def client(self) -> Client | None:
        """Who speaks on it."""
        return self._client

    # --- asyncio ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        found = cast("asyncio.Transport", transport)
        self._transport = found
        server = self._server
        # Also a connection that was accepted just before the server stopped.
        if not server.running or len(server.links) >= server.max_clients:
            server.stats.turned_away += 1
            found.abort()
            return
        server.stats.connections += 1
        server.links.add(self)
        found.set_write_buffer_limits(high=_HIGH_WATER)
        sock = found.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = _name(found.get_extra_info("peername"))
        self._client = Client(
            server.dialect,
            server.stats,
            now=self._loop.time(),
            name=name,
            wake=self._wake,
            press=self._press,
        )
        self._tick()  # the handshake's deadline runs from the first byte on
        if server.paused and server.context is None:
            self.pause()
        if server.context is not None:
            # Nothing is read before the task's first step, which takes the reading over.
            self._securing = self._loop.create_task(self._secure(found, server.context))

    async def _secure(self, plain: asyncio.Transport, context: ssl.SSLContext) -> None:
        try:
            secured = await self._loop.start_tls(
                plain,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=self._server.dialect.profile.handshake,
                ssl_shutdown_timeout=_STOP,
            )
        except (OSError, ssl.SSLError) as exc:
            logger.debug("no TLS with %s: %s", self._client and self._client.name, type(exc))
            secured = None
        finally:
            self._securing = None
        if secured is None:
            plain.abort()
            self._server.stats.errors += not self._closing
            self.connection_lost(None)
            return
        secured.set_write_buffer_limits(high=_HIGH_WATER)
        self._transport = secured
        if self._server.paused:
            self.pause()
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        client = self._client
        if client is None or self._closing:
            return
        if self._securing is not None:
            # The last bytes of the handshake can bring the first of the stream, before
            # `start_tls` has returned the transport that an answer would need.
            self._early.append(data)
            return
        if not self._begun:
            self._begun = True
            if self._server.dialect.profile.sniff and data[0] in HTTP_METHODS:
                self._web = WebPeer(self._server.dialect.profile, self._server.http)
        web = self._web
        if web is not None:
            payload, reply = web.receive(data)
            if reply:
                self._write(reply)
                self._check_replies()
            data = payload
        accepted = client.packet is not None
        if data:
            # Filled while the dialect delivers: those receivers that this chunk overloaded.
            pressing = self._server.pressing
            self._receiving = True
            client.receive(data, self._loop.time())
            self._receiving = False
            if pressing:
                self._hold(pressing)
                pressing.clear()
        if not accepted and client.packet is not None:
            self._tick()  # keepalive has taken the place of the handshake's deadline
        if web is not None and web.done:
            client.close("the web peer is done")
        self._flush()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        # Not at once: asyncio calls this in the middle of sending, and a transport that is closed,
        # or breaks, in here tells its end twice (CPython 3.11: "Exception in callback").
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        for timer in (self._timer, self._linger):
            if timer is not None:
                timer.cancel()
        self._timer = self._linger = None
        self._release()
        self._server.links.discard(self)
        if not self.gone.done():
            self.gone.set_result(None)
        if self._client is not None:
            self._client.finish()

    # --- writing ------------------------------------------------------------------------

    def _wake(self) -> None:
        # What a client's own packets produce is flushed when all of them are done.
        if not self._flushing and not self._receiving:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        client = self._client
        if client is None or self._closing:
            return
        if self._server.paused:
            return
        while not self._paused:
            data = client.take()
            if not data:
                break
            self._write(data if self._web is None else self._web.frame(data))
        # At half, not at once: a publisher that is held and let go for each message would cost
        # two calls to the selector each time.
        if self._crowded_at is not None and client.queued * 2 <= client.crowded:
            self._crowded_at = None
            self._release()
        # A client that is to be closed gets what was queued, unless it does not read.
        if client.closed and (not client.queued or self._paused):
            self._close()

    def pause(self) -> None:
        """Read and write nothing."""
        if self._transport is not None and not self._closing:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read and write again; the silence meanwhile was ours."""
        if self._transport is None or self._closing:
            return
        if self._client is not None:
            self._client.touch(self._loop.time())
        if not self._held_by:
            self._transport.resume_reading()
        self._flush()

    # --- pressure -----------------------------------------------------------------------

    def _press(self) -> None:
        """More was sent to this client than it reads."""
        now = self._loop.time()
        if self._crowded_at is None:
            self._crowded_at = now
            self._loop.call_later(_GRACE, self._release)
        elif now - self._crowded_at > _GRACE:
            return  # it had its time; one that never reads must not stop its publishers
        self._server.pressing.add(self)

    def _hold(self, pressing: set[_Link]) -> None:
        """Read no more of this client until those that it pressed are relieved."""
        pressing.discard(self)  # one that publishes to itself would wait for itself
        if not pressing or self._closing or self._transport is None:
            return
        if not self._held_by:
            self._transport.pause_reading()
        self._held_by |= pressing
        for link in pressing:
            link.holds(self)

    def holds(self, other: _Link) -> None:
        """Remember who waits for this one."""
        self._holds.add(other)

    def _release(self) -> None:
        holds, self._holds = self._holds, set()
        for link in holds:
            link.relieved(self)

    def relieved(self, by: _Link) -> None:
        """Read again, unless others are still pressed."""
        if by not in self._held_by:
            return
        self._held_by.discard(by)
        if self._server.paused:
            return
        if not self._held_by and not self._closing and self._transport is not None:
            if self._client is not None:
                self._client.touch(self._loop.time())
            self._transport.resume_reading()

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None:
            self._transport.write(data)

    def _check_replies(self) -> None:
        """Close a client that asks for pongs and does not read them."""
        transport, client = self._transport, self._client
        most = self._server.dialect.profile.max_queue
        if transport is not None and transport.get_write_buffer_size() > most:
            if client is not None:
                client.give_up(f"more than {most} bytes")
            transport.abort()

    def _close(self) -> None:
        """Say goodbye, tell the dialect, and give the peer a moment to read what was sent."""
        transport = self._transport
        if self._closing or transport is None:
            return
        self._closing = True
        if self._web is not None:
            self._write(self._web.farewell())
        # Before the end of the handshake there is nothing to say goodbye with.
        if self._securing is not None:
            transport.abort()
        else:
            transport.close()
        self._linger = self._loop.call_later(_LINGER, transport.abort)
        if self._client is not None:
            self._client.finish()

    def end(self, reason: str) -> None:
        """Close at once, without waiting for the peer."""
        if self._client is not None:
            self._client.close(reason)
            self._client.finish()
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        client = self._client
        if client is None or self._closing:
            return
        # The silence of a client that is not read is ours, so its keepalive does not run.
        held = self._held_by or self._server.paused
        due = _GRACE if held else client.tick(self._loop.time())
        if due is not None:
            self._timer = self._loop.call_later(due, self._tick)


def _name(peer: Any) -> str:
    if peer:
        host, port = peer[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return "a local socket"
