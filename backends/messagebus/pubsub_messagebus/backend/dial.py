"""Connecting: TLS, the handshake, and errors that say what to do."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Final, cast

from pubsub_core.clock import Clock
from pubsub_core.errors import BadOption, ConnectError, TLSProblem
from pubsub_core.interfaces import Address, Endpoint
from pubsub_core.secrets import Secret
from pubsub_messagebus.options import MessageBusOptions
from pubsub_messagebus.protocol import Decoder, basic_handshake, token_handshake

from .link import Link, Receiver

__all__ = ["WANTS_CERTIFICATE", "WANTS_TLS", "Dialler", "tls_error"]

logger = logging.getLogger("pubsub_messagebus.backend")

WANTS_TLS = " (a port that wants TLS is messagebus+tls://)"
WANTS_CERTIFICATE = " (one that wants a client certificate needs cert_file)"
_DEFAULT_PORT = 9001

# By the code of OpenSSL's x509_vfy.h.
_REMEDIES: Final = {
    9: "it is not valid yet: check the clock of this machine",
    10: "the server needs a new one, or the clock of this machine is wrong",
    18: "name it with ca_file, if it is the right one",
    19: "name the certificate of its authority with ca_file",
    20: "name the certificate of its authority with ca_file",
    23: "it was revoked; the server needs a new one",
    62: "use the host name that is in the certificate",
    64: "use a host name that is in the certificate instead of the address",
}
_OTHER_REMEDY: Final = "check the host name, or name the right authority with ca_file"


def tls_error(error: ssl.SSLError, address: Address, *, backend: str) -> TLSProblem:
    """Return the error for a fault of TLS, with its remedy."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TLSProblem(
            f"the certificate of {address} was refused: {error.verify_message}",
            hint=_REMEDIES.get(error.verify_code, _OTHER_REMEDY),
            backend=backend,
        )
    return TLSProblem(
        f"TLS with {address} failed: {error.reason or error}",
        hint="check that the port speaks TLS, its version, and cert_file if the server wants a "
        "client certificate",
        backend=backend,
    )


class Dialler:
    """Connects to one distributor and logs in.

    Attributes:
        endpoint: Where it connects to.
        logs_in: Whether it sends credentials.
    """

    def __init__(
        self, address: Address, options: MessageBusOptions, clock: Clock, *, backend: str
    ) -> None:
        self._address = address
        self._options = options
        self._clock = clock
        self._backend = backend
        if not address.host:
            raise BadOption(
                f"{address} names no host", hint="messagebus://localhost", backend=backend
            )
        if address.path not in ("", "/"):
            raise BadOption(
                f"the path {address.path!r} means nothing for {address.scheme}://",
                hint="leave it out; feeds are the first level of topics",
                backend=backend,
            )
        self._port = _DEFAULT_PORT if address.port is None else address.port
        self.endpoint = Endpoint(address.host, self._port, address.scheme == "messagebus+tls")
        # Made now to refuse credentials that cannot be sent, and again for each connection:
        # kept bytes would show the password wherever variables are printed.
        self.logs_in = bool(self._handshake())
        self._warned = False

    def _handshake(self) -> bytes:
        options, address = self._options, self._address
        username = options.username if options.username is not None else address.username
        password = options.password if options.password is not None else address.password
        try:
            if options.token is not None:
                return token_handshake(
                    options.token,
                    options.impersonating,
                    options.forwarded_for,
                    options.application,
                    form=options.handshake,
                )
            if username is None:
                return b""
            return basic_handshake(
                username,
                Secret("") if password is None else password,
                options.impersonating,
                options.forwarded_for,
                options.application,
                form=options.handshake,
            )
        except ValueError as error:
            why = str(error)
        raise BadOption(why, option="handshake", backend=self._backend)

    async def connect(self, receiver: Receiver) -> Link:
        """Connect; the handshake goes with the first messages.

        Raises:
            ConnectError: Nobody answers there.
            TLSProblem: A file cannot be used, or the certificate is not accepted.
        """
        host = self.endpoint.host
        # In a thread: reading the system's authorities takes long enough to hold up the loop.
        context = await asyncio.to_thread(self._ssl_context) if self.endpoint.tls else None
        decoder = Decoder("client", dialect=self._options.dialect)
        try:
            _, link = await asyncio.get_running_loop().create_connection(
                lambda: Link(receiver, decoder, self._clock.monotonic),
                host,
                self._port,
                ssl=context,
                server_hostname=None if context is None else host,
            )
        except ssl.SSLError as error:
            raise tls_error(error, self._address, backend=self._backend) from error
        except OSError as error:
            hung_up = isinstance(error, ConnectionResetError) and context is not None
            raise ConnectError(
                f"cannot connect to {self._address}: "
                f"{error.strerror or str(error) or type(error).__name__}",
                hint="does that port speak TLS? one without it wants messagebus://"
                if hung_up
                else "is the distributor running there?",
                backend=self._backend,
            ) from error
        link.log_in(self._handshake())
        return link

    def _ssl_context(self) -> ssl.SSLContext:
        options = self._options
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
        except OSError as error:
            # OpenSSL's own text names no file.
            why = error if isinstance(error, ssl.SSLError) else error.strerror or error
            raise TLSProblem(
                f"{files} cannot be used: {why}",
                hint="name files in PEM that this process may read",
                backend=self._backend,
            ) from error
        if options.insecure_skip_verify and not self._warned:
            self._warned = True
            logger.warning(
                "insecure_skip_verify is on: the certificate of %s is not checked, so anybody "
                "on the way can read and change everything",
                self._address,
            )
        if options.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
