"""Options of the MQTT backend. Plain data: importing this module imports no MQTT library.

Names follow amqtt's and paho's where they have one. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret

from .errors import as_ours

__all__ = [
    "DEFAULT_MAX_PACKET",
    "MAX_PACKET",
    "NAME",
    "MQTTOptions",
    "ProtocolName",
    "TopicDefaults",
    "TransportOptions",
    "WillOptions",
]

NAME: Final = "mqtt"
"""Name of the backend for plain MQTT, in its errors."""

ProtocolName = Literal["auto", "5", "3.1.1"]

MAX_PACKET = 268_435_455
"""The longest remaining length MQTT can express (3.1.1 section 2.2.3)."""

DEFAULT_MAX_PACKET = 64 * 1024 * 1024
"""Longest incoming packet, unless the options say otherwise."""

_NEVER = 0xFFFF_FFFF


def _help(text: str, **more: object) -> dict[str, object]:
    return {"help": text, **more}


def _bad(option: str, value: object, wanted: str) -> BadOption:
    return BadOption(
        f"{option}={value!r} does not fit", option=option, hint=f"use {wanted}", backend=NAME
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicDefaults:
    """Defaults for publishing to topics that match a filter; None leaves the bus's own."""

    qos: int | None = None
    retain: bool | None = None

    def __post_init__(self) -> None:
        if self.qos is not None and self.qos not in (0, 1, 2):
            raise _bad("topics.qos", self.qos, "0, 1 or 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class WillOptions:
    """The message that the broker publishes when this client vanishes.

    Attributes:
        payload: Text is sent as UTF-8.
        delay: Seconds the broker waits before it publishes the will (MQTT 5).
    """

    topic: str
    payload: str | bytes = field(default="", repr=False)
    qos: int = 0
    retain: bool = False
    delay: int = 0

    def __post_init__(self) -> None:
        topic = self.topic
        if not topic or "+" in topic or "#" in topic or "\0" in topic or len(topic) > 65535:
            raise _bad("will.topic", topic[:200], "a topic without wildcards")
        if self.qos not in (0, 1, 2):
            raise _bad("will.qos", self.qos, "0, 1 or 2")
        if not 0 <= self.delay <= _NEVER:
            raise _bad("will.delay", self.delay, "seconds, 0 or more")

    @property
    def data(self) -> bytes:
        """The payload as bytes."""
        return self.payload.encode() if isinstance(self.payload, str) else bytes(self.payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportOptions:
    """What can be said about the way to a broker: certificates, WebSocket, TCP.

    The options of every backend over MQTT have these.
    """

    ca_file: str | None = field(default=None, metadata=_help("PEM file of trusted CAs"))
    ca_path: str | None = field(default=None, metadata=_help("folder of hashed CA files"))
    ca_data: str | None = field(default=None, repr=False, metadata=_help("trusted CAs as PEM text"))
    cert_file: str | None = field(default=None, metadata=_help("our certificate, PEM"))
    key_file: str | None = field(default=None, metadata=_help("our private key, PEM"))
    key_password: Secret | None = field(default=None, metadata=_help("password of the private key"))
    insecure_skip_verify: bool = field(
        default=False,
        metadata=_help("accept any certificate: anybody can be the broker; warns once"),
    )
    tls_min_version: Literal["1.2", "1.3"] = field(
        default="1.2", metadata=_help("oldest TLS that is accepted")
    )
    ssl_context: Any = field(
        default=None,
        repr=False,
        metadata=_help("an ssl.SSLContext, used as it is; only in code", code_only=True),
    )
    ws_path: str | None = field(
        default=None, metadata=_help("WebSocket path; wins over the URL's; default: /mqtt")
    )
    ws_headers: Mapping[str, str] = field(
        default_factory=dict[str, str],
        repr=False,
        metadata=_help("more headers of the WebSocket request"),
    )
    tcp_nodelay: bool = field(
        default=True, metadata=_help("send small packets at once instead of collecting them")
    )

    def mqtt(self, *, backend: str, **more: Any) -> MQTTOptions:
        """Return the options of the MQTT connection below.

        Args:
            backend: Whose options these are, for errors.
            **more: What these options say in other words, or what is no option here; what has
                the same name is taken over.
        """
        known = [each.name for each in fields(MQTTOptions)]
        taken = {name: getattr(self, name) for name in known if hasattr(self, name)}
        try:
            return MQTTOptions(**{**taken, **more})
        except BadOption as exc:
            as_ours(exc, backend)
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class MQTTOptions(TransportOptions):
    """What can be said about a connection to an MQTT broker.

    `username` and `password` here win over those in the URL, so that a file can name an
    address once and secrets stay out of it.
    """

    client_id: str | None = field(
        default=None,
        metadata=_help("identifier at the broker; default: random; empty: the broker chooses"),
    )
    username: str | None = field(default=None, metadata=_help("wins over the URL's user"))
    password: Secret | None = field(default=None, metadata=_help("wins over the URL's password"))
    keepalive: int = field(
        default=60,
        metadata=_help("seconds; the peer is dead after 1.5 times that in silence; 0: never"),
    )
    protocol: ProtocolName = field(
        default="auto", metadata=_help("auto: MQTT 5, and once 3.1.1 where that is refused")
    )
    clean_start: bool = field(
        default=True,
        metadata=_help("false: continue the session of this client_id, and leave one behind"),
    )
    session_expiry: int | None = field(
        default=None,
        metadata=_help(
            "seconds the broker keeps a lost session (MQTT 5); default: 0, or without end "
            "with clean_start=false"
        ),
    )
    max_inflight: int = field(
        default=100, metadata=_help("most publishes above QoS 0 that wait for the broker")
    )
    receive_maximum: int | None = field(
        default=None,
        metadata=_help("most messages above QoS 0 the broker may send unacknowledged (MQTT 5)"),
    )
    max_packet_size: int = field(
        default=DEFAULT_MAX_PACKET, metadata=_help("longest incoming packet")
    )
    will: WillOptions | None = field(
        default=None, metadata=_help("{topic, payload, qos, retain, delay}: the last will")
    )
    topics: Mapping[str, TopicDefaults] = field(
        default_factory=dict[str, TopicDefaults],
        metadata=_help("filter → {qos, retain}: publish defaults; the longest filter wins"),
    )
    default_retain: bool = field(
        default=False, metadata=_help("retain flag of a publish that does not say")
    )
    strict_utf8: bool = field(
        default=False,
        metadata=_help("refuse topics with control characters and noncharacters"),
    )
    shared_subscriptions: bool | None = field(
        default=None,
        metadata=_help("whether an MQTT 3.1.1 broker has share groups; it cannot be asked"),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.keepalive <= 65535:
            raise _bad("keepalive", self.keepalive, "seconds from 0 to 65535")
        if self.session_expiry is not None and not 0 <= self.session_expiry <= _NEVER:
            raise _bad("session_expiry", self.session_expiry, "seconds, 0 or more")
        if not 1 <= self.max_inflight <= 65535:
            raise _bad("max_inflight", self.max_inflight, "1 to 65535")
        if self.receive_maximum is not None and not 1 <= self.receive_maximum <= 65535:
            raise _bad("receive_maximum", self.receive_maximum, "1 to 65535")
        if not 16 <= self.max_packet_size <= MAX_PACKET:
            raise _bad("max_packet_size", self.max_packet_size, f"16 to {MAX_PACKET}")
        if self.client_id is not None and len(self.client_id.encode(errors="replace")) > 65535:
            raise _bad("client_id", "…", "at most 65535 bytes")
        if not self.clean_start and not self.client_id:
            raise BadOption(
                "clean_start=false without a client_id: nobody could find that session again",
                option="clean_start",
                hint="set client_id",
                backend=NAME,
            )
        if self.ssl_context is not None and not isinstance(self.ssl_context, ssl.SSLContext):
            raise _bad("ssl_context", type(self.ssl_context).__name__, "an ssl.SSLContext")
        if self.key_file is not None and self.cert_file is None:
            raise BadOption(
                "key_file without cert_file",
                option="key_file",
                hint="set cert_file as well",
                backend=NAME,
            )

    @property
    def expiry(self) -> int:
        """Seconds the broker keeps the session (MQTT 5)."""
        if self.session_expiry is not None:
            return self.session_expiry
        return 0 if self.clean_start else _NEVER
