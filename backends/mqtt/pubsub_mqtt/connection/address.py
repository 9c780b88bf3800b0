"""Where a broker listens and how it is reached: host, port, TLS, WebSocket.

`broker_address` makes one of a URL and the options of a backend; `pubsub_mqtt.connection.dial`
connects to it.

Source: MQTT 5.0 section 6 (MQTT over WebSocket).
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pubsub_core.errors import BadOption, TLSProblem
from pubsub_core.interfaces import Address
from pubsub_core.secrets import Secret
from pubsub_mqtt.errors import printable
from pubsub_mqtt.options import NAME, MQTTOptions

__all__ = ["BrokerAddress", "TLSSettings", "WebSocketTarget", "broker_address"]

logger = logging.getLogger("pubsub_mqtt")

_PORTS = {"mqtt": 1883, "tcp": 1883, "mqtts": 8883, "ssl": 8883, "ws": 80, "wss": 443}
_TLS = frozenset({"mqtts", "ssl", "wss"})
_WEBSOCKET = frozenset({"ws", "wss"})

_warned_insecure = False


@dataclass(frozen=True, slots=True)
class TLSSettings:
    """How the broker's certificate is checked and which one is ours.

    Attributes:
        context: Used as it is; everything else is then ignored.
    """

    ca_file: str | None = None
    ca_path: str | None = None
    ca_data: str | None = field(default=None, repr=False)
    cert_file: str | None = None
    key_file: str | None = None
    key_password: Secret | None = None
    insecure_skip_verify: bool = False
    min_version: str = "1.2"
    context: ssl.SSLContext | None = None

    def build(self) -> ssl.SSLContext:
        """Return the context. Reads files, so call it off the event loop.

        Raises:
            TLSProblem: A file is missing or does not hold what its option says.
        """
        if self.context is not None:
            return self.context
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks chain and host name
        context.minimum_version = (
            ssl.TLSVersion.TLSv1_3 if self.min_version == "1.3" else ssl.TLSVersion.TLSv1_2
        )
        self._trust(context)
        if self.cert_file is not None:
            # Without a password OpenSSL would ask for one at the terminal.
            password = self.key_password.reveal() if self.key_password else ""
            try:
                context.load_cert_chain(self.cert_file, self.key_file, password)
            except (OSError, ValueError) as exc:
                files = _named(cert_file=self.cert_file, key_file=self.key_file)
                raise TLSProblem(
                    f"our certificate in {files} cannot be used: {_why(exc)}",
                    hint="check cert_file, key_file and key_password",
                ) from exc
        if self.insecure_skip_verify:
            global _warned_insecure
            if not _warned_insecure:
                _warned_insecure = True
                logger.warning(
                    "insecure_skip_verify is on: certificates are not checked, so anybody on "
                    "the way can read and change everything"
                )
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _trust(self, context: ssl.SSLContext) -> None:
        if not (self.ca_file or self.ca_path or self.ca_data):
            context.load_default_certs()
            return
        if self.ca_path and not Path(self.ca_path).is_dir():
            # OpenSSL looks into the folder at the first handshake and says nothing before.
            raise TLSProblem(
                f"ca_path {self.ca_path!r} is not a folder",
                hint="name a folder of CA files hashed with `openssl rehash`",
            )
        try:
            context.load_verify_locations(self.ca_file, self.ca_path, self.ca_data)
        except (OSError, ValueError) as exc:
            files = _named(ca_file=self.ca_file, ca_path=self.ca_path)
            where = " and ".join(filter(None, (files, self.ca_data and "ca_data")))
            raise TLSProblem(
                f"the trusted CAs in {where} cannot be read: {_why(exc)}",
                hint="name a file of certificates in PEM that this process may read",
            ) from exc


def _named(**files: str | None) -> str:
    return ", ".join(f"{option} {path!r}" for option, path in files.items() if path)


def _why(error: Exception) -> str:
    # The text of an OSError has its number and, now and then, a path; OpenSSL's has its own.
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    return printable(str(error))


@dataclass(frozen=True, slots=True)
class WebSocketTarget:
    """What the WebSocket request asks for."""

    path: str = "/mqtt"
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens and how to talk to it.

    Attributes:
        host: Name or address; ignored when *unix_path* is set.
        unix_path: Path of a unix socket, or ``""``.
    """

    host: str = ""
    port: int = 1883
    unix_path: str = ""
    tls: TLSSettings | None = None
    websocket: WebSocketTarget | None = None
    nodelay: bool = True

    def __str__(self) -> str:
        if self.unix_path:
            return self.unix_path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def literal(self) -> bool:
        """Whether the host is an address, so that nothing needs resolving."""
        try:
            ipaddress.ip_address(self.host.partition("%")[0])
        except ValueError:
            return False
        return True

    @property
    def corks(self) -> bool:
        """Whether `BufferedSocket.push` may hold packets back."""
        return self.nodelay and not self.unix_path

    def prepare(self, sock: socket.socket) -> None:
        """Set the options of a new TCP socket."""
        if self.nodelay:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def broker_address(address: Address, options: MQTTOptions, *, backend: str = NAME) -> BrokerAddress:
    """Return where to connect to, defaults filled in.

    Raises:
        BadOption: The address lacks something, or has something that means nothing.
    """
    scheme = address.scheme
    if scheme == "mqtt+unix":
        if address.host or address.port is not None:
            raise BadOption(
                f"{address} names a host",
                hint="three slashes: mqtt+unix:///run/broker.sock",
                backend=backend,
            )
        if address.path in ("", "/"):
            raise BadOption(
                "mqtt+unix:// without the path of a socket",
                hint="mqtt+unix:///run/broker.sock",
                backend=backend,
            )
        return BrokerAddress(unix_path=address.path)
    if scheme not in _PORTS:
        raise BadOption(
            f"{scheme}:// is not an MQTT scheme", hint=f"use {', '.join(_PORTS)}", backend=backend
        )
    if not address.host:
        raise BadOption(
            f"{scheme}:// without a host", hint=f"{scheme}://localhost", backend=backend
        )
    websocket = None
    if scheme in _WEBSOCKET:
        path = options.ws_path if options.ws_path is not None else address.path or "/mqtt"
        if not path.startswith("/"):
            path = f"/{path}"
        websocket = WebSocketTarget(path, options.ws_headers)
    elif address.path not in ("", "/"):
        raise BadOption(
            f"the path {address.path!r} means nothing for {scheme}://",
            hint="leave it out; topics are arguments of publish and subscribe",
            backend=backend,
        )
    tls = None
    if scheme in _TLS:
        tls = TLSSettings(
            ca_file=options.ca_file,
            ca_path=options.ca_path,
            ca_data=options.ca_data,
            cert_file=options.cert_file,
            key_file=options.key_file,
            key_password=options.key_password,
            insecure_skip_verify=options.insecure_skip_verify,
            min_version=options.tls_min_version,
            context=options.ssl_context,
        )
    return BrokerAddress(
        host=address.host,
        port=_PORTS[scheme] if address.port is None else address.port,
        tls=tls,
        websocket=websocket,
        nodelay=options.tcp_nodelay,
    )
