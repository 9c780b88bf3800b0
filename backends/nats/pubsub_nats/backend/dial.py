"""From an address to a connection that the server has let in.

The server speaks first, in plain text unless it was told otherwise, and TLS comes after its INFO.
So where TLS is wanted nothing of ours goes out before the handshake: a server that does not
offer it, or somebody in between who took the offer away, gets no CONNECT at all.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, cast

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    ServerRefused,
    TLSProblem,
)
from pubsub_core.interfaces import Address
from pubsub_core.threads import in_thread
from pubsub_nats.credentials import connect_fields
from pubsub_nats.errors import fatal, printable
from pubsub_nats.options import HostPort, NatsOptions
from pubsub_nats.protocol import ProtocolError, encode_connect
from pubsub_nats.websocket import WebSocket, WebSocketRejected

from .connection import Connection, Owner

__all__ = ["Dialer"]

_LANG = "python-pubsub-core"


@dataclass(frozen=True, slots=True)
class Dialer:
    """How to reach and enter the servers of one bus.

    Attributes:
        name: What the server shows as the name of the connection.
        tls: Whether TLS is asked for, so that a server without it is refused.
    """

    address: Address
    options: NatsOptions
    name: str
    tls: bool
    websocket: bool

    async def connect(self, server: HostPort, owner: Owner) -> Connection:
        """Return a connection that the server has let in; leave nothing behind otherwise.

        Raises:
            ConnectError: See its subclasses.
            BadOption: The credentials cannot be used.
        """
        framing = WebSocket(str(server), self.address.path) if self.websocket else None
        connection = Connection(owner, framing)
        try:
            await self._enter(server, connection)
        except BaseException as error:
            connection.fail(error)
            if connection.transport is not None:
                await asyncio.wait([connection.closed], timeout=1)
            raise
        return connection

    async def _enter(self, server: HostPort, connection: Connection) -> None:
        first = self.options.tls_first or (self.websocket and self.tls)
        context = await in_thread(self._context, name="pubsub-nats-tls") if self.tls else None
        await self._dial(server, connection, context if first else None)
        if self.websocket:
            await self._upgraded(server, connection)
        await self._done(server, connection, connection.greeted)
        if not first and not self.websocket:
            await self._start_tls(server, connection, context)
        info = connection.info
        nonce = _text(info.get("nonce"))
        if self.options.credentials is None:
            fields = connect_fields(self.options, self.address, nonce)
        else:
            fields = await in_thread(
                lambda: connect_fields(self.options, self.address, nonce), name="pubsub-nats-file"
            )
        connection.write(encode_connect({**self._about(info), **fields}))
        await self._done(server, connection, connection.ping())

    def _about(self, info: Mapping[str, Any]) -> dict[str, object]:
        headers = info.get("headers") is True
        return {
            "verbose": False,
            "pedantic": False,
            "headers": headers,
            "no_responders": headers,
            "protocol": 1,
            "echo": True,
            "name": self.name,
            "lang": _LANG,
            "version": "1",
        }

    # --- steps -----------------------------------------------------------------------------

    async def _dial(
        self, server: HostPort, connection: Connection, context: ssl.SSLContext | None
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(
                lambda: connection,
                server.host,
                server.port,
                ssl=context,
                server_hostname=None if context is None else self._verified(server),
            )
        except ssl.SSLError as error:
            raise self._tls_problem(server, error) from error
        except OSError as error:
            if context is not None and isinstance(error, ConnectionError) and not error.errno:
                raise self._no_tls_first(server) from error
            raise ConnectError(
                f"cannot connect to {server}: "
                f"{error.strerror or str(error) or type(error).__name__}",
                hint="is a NATS server running there?",
                backend="nats",
            ) from error

    async def _upgraded(self, server: HostPort, connection: Connection) -> None:
        framing, transport = connection.framing, connection.transport
        if framing is not None and transport is not None:
            transport.write(framing.request())
        await self._done(server, connection, connection.upgraded)

    async def _start_tls(
        self, server: HostPort, connection: Connection, context: ssl.SSLContext | None
    ) -> None:
        info = connection.info
        if context is None:
            if info.get("tls_required") is not True:
                return
            context = await in_thread(self._context, name="pubsub-nats-tls")
        elif not (info.get("tls_required") or info.get("tls_available")):
            raise TLSProblem(
                f"{server} offers no TLS, so it was told nothing",
                hint="configure tls at the server, or use nats:// without options for TLS",
                backend="nats",
            )
        transport = connection.transport
        if transport is None or connection.pending or connection.controls > 1:
            # A server waits for the handshake after its INFO; these bytes are somebody else's.
            raise TLSProblem(
                f"{server} sent more before the handshake than a NATS server does",
                hint="somebody may be in between",
                backend="nats",
            )
        loop = asyncio.get_running_loop()
        try:
            over = await loop.start_tls(
                transport, connection, context, server_hostname=self._verified(server)
            )
        except ssl.SSLError as error:
            raise self._tls_problem(server, error) from error
        except OSError as error:
            raise TLSProblem(
                f"{server} ended the TLS handshake: {error.strerror or type(error).__name__}",
                hint="does it want a client certificate, or tls_first?",
                backend="nats",
            ) from error
        if over is None:  # the connection ended meanwhile
            raise self._ended(server, connection)
        connection.over_tls(over)

    async def _done(
        self, server: HostPort, connection: Connection, waiting: asyncio.Future[None]
    ) -> None:
        try:
            await asyncio.wait([waiting, connection.closed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            succeeded = waiting.done() and not waiting.cancelled() and waiting.exception() is None
            waiting.cancel()
        if not succeeded:
            raise self._ended(server, connection) from connection.error

    # --- what went wrong ---------------------------------------------------------------------

    def _ended(self, server: HostPort, connection: Connection) -> ConnectError:
        cause, text = connection.error, connection.last_error
        if text:
            return fatal(text, str(server))
        if isinstance(cause, ssl.SSLError):
            return self._tls_problem(server, cause)
        if isinstance(cause, WebSocketRejected):
            error = AuthenticationFailed if cause.status in (401, 403) else ServerRefused
            return error(
                f"{server} refused the WebSocket {self.address.path or '/'!r}: {cause}",
                hint="look at the port; the server's websocket has one of its own",
                backend="nats",
                retryable=cause.status >= 500 or cause.status == 429,
            )
        if isinstance(cause, ProtocolError):
            return ConnectError(
                f"{server} is no NATS server: {cause}",
                hint="look at the port"
                + ("" if self.tls else "; one that begins with TLS needs tls_first"),
                backend="nats",
                retryable=False,
            )
        certificate = connection.info.get("tls_verify") is True and not self.options.cert_file
        why = "" if cause is None else f": {printable(str(cause)) or type(cause).__name__}"
        if certificate:
            return TLSProblem(
                f"{server} wants a client certificate{why}",
                hint="name cert_file and key_file",
                backend="nats",
            )
        return ConnectError(
            f"{server} closed the connection{why}",
            hint="look at the port; the server's websocket has one of its own"
            if self.websocket
            else "look at its log; a server with handshake_first needs tls_first",
            backend="nats",
        )

    def _tls_problem(self, server: HostPort, error: ssl.SSLError) -> TLSProblem:
        why = getattr(error, "verify_message", "") or error.reason or error
        return TLSProblem(
            f"TLS with {server} failed: {why}",
            hint="look at the certificate, the host name, ca_file and cert_file",
            backend="nats",
        )

    def _no_tls_first(self, server: HostPort) -> TLSProblem:
        return TLSProblem(
            f"{server} ended the TLS handshake",
            hint="does it begin in plain text? then leave tls_first out",
            backend="nats",
        )

    # --- TLS ---------------------------------------------------------------------------------

    def _verified(self, server: HostPort) -> str:
        """Return the name that the certificate must hold."""
        # A cluster tells its other servers by address; their certificate has the name.
        configured = self.address.host
        if server.host != configured and _is_address(server.host):
            return configured or server.host
        return server.host

    def _context(self) -> ssl.SSLContext:
        options = self.options
        if options.ssl_context is not None:
            return cast("ssl.SSLContext", options.ssl_context)
        files = f"ca_file {options.ca_file!r}"
        try:
            context = ssl.create_default_context(cafile=options.ca_file)
            if options.cert_file:
                files = f"cert_file {options.cert_file!r}"
                if options.key_file:
                    files += f", key_file {options.key_file!r}"
                # Without a password OpenSSL would ask for one at the terminal.
                context.load_cert_chain(options.cert_file, options.key_file, "")
        except (OSError, ValueError) as error:
            # OpenSSL's own text names no file.
            why: object = error
            if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
                why = error.strerror or error
            raise TLSProblem(
                f"{files} cannot be used: {why}",
                hint="name files in PEM that this process may read, with a key without password",
                backend="nats",
            ) from error
        if options.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
