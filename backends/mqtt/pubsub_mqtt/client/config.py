"""The configuration dictionary of `pubsub_mqtt.MQTTClient`, checked.

Keys and sections are those of amqtt's ``ClientConfig`` (0.12, ``contexts.py``), so that a
dictionary written for amqtt fits; the defaults differ where amqtt's lose messages or give up.
A key or a type that does not fit is a `pubsub_core.errors.BadOption` with its path.
"""

from __future__ import annotations

import logging
import ssl
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pubsub_core.config.options import build
from pubsub_core.errors import BadOption, InvalidFilter
from pubsub_core.secrets import Secret
from pubsub_core.topics import validate_filter
from pubsub_mqtt.options import NAME, MQTTOptions, ProtocolName, TopicDefaults, WillOptions

__all__ = ["ClientConfig", "ConnectionConfig", "TopicConfig", "WillConfig"]

logger = logging.getLogger("pubsub_mqtt.client")


def _check_qos(option: str, qos: int) -> None:
    if qos not in (0, 1, 2):
        raise BadOption(f"{option} is {qos}", option=option, hint="use 0, 1 or 2", backend=NAME)


def _path(given: str | Path | None) -> str | None:
    return None if given is None else str(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """Where the broker is, and how its certificate is checked.

    Attributes:
        uri: As for `MQTTClient.connect`, which wins.
        cafile: PEM file of trusted authorities; the system's when none is given.
        capath: Folder of hashed authority files.
        cadata: Trusted authorities as PEM text.
        certfile: Our certificate, PEM.
        keyfile: Our private key, PEM.
        ssl_context: Used as it is, instead of everything else.
    """

    uri: str | None = field(default=None, repr=False)  # it may hold a password
    cafile: str | Path | None = None
    capath: str | Path | None = None
    cadata: str | None = field(default=None, repr=False)
    certfile: str | Path | None = None
    keyfile: str | Path | None = None
    key_password: Secret | None = None
    ssl_context: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.certfile is None and self.keyfile is not None:
            raise BadOption(
                "connection.keyfile without connection.certfile",
                option="connection.keyfile",
                hint="give both",
                backend=NAME,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicConfig:
    """Defaults for publishing to one topic, or to topics that match a filter."""

    qos: int | None = None
    retain: bool | None = None

    def __post_init__(self) -> None:
        if self.qos is not None:
            _check_qos("topics.qos", self.qos)


@dataclass(frozen=True, slots=True, kw_only=True)
class WillConfig:
    """What the broker publishes when this client vanishes.

    Attributes:
        message: Text is sent as UTF-8.
        delay: Seconds that the broker waits before (MQTT 5).
    """

    topic: str
    message: str | bytes = field(default=b"", repr=False)
    qos: int = 0
    retain: bool = False
    delay: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How an `MQTTClient` behaves. Times are seconds, sizes bytes.

    Attributes:
        keep_alive: Sent to the broker as it is; a peer is dead after 1.5 times that in
            silence. 0 turns it off.
        ping_delay: Legal and without effect: pings are sent in time for every keep alive.
        connection_timeout: For a whole attempt, up to and including CONNACK.
        request_timeout: How long publish, subscribe, unsubscribe and ping may take, with the time
            without a connection.
        reconnect_retries: Attempts after a failed one; negative for no end. None: a lost
            connection is renewed without end, but the first one is tried only once.
        reconnect_max_interval: Bound of the random delay between attempts.
        topics: Topic or filter → {qos, retain}; where several match, an exact topic wins and
            then the longest filter, for each of the two.
        broker: Old name of `connection`.
        offline: What publish does without a connection: ``buffer`` waits for the next one, in
            order and bounded; ``raise`` and ``drop`` do at once what they say.
        incoming_messages: Received messages that wait for `deliver_message`; at that many
            reading from the network stops.
        subscribe_errors: Whether a refused filter raises. amqtt returns its code 0x80, and so
            does this client; without the option a warning is logged as well.
        plugins: amqtt's plugins are not run; a warning says so.
    """

    keep_alive: int = 60
    ping_delay: int = 1
    default_qos: int = 0
    default_retain: bool = False
    auto_reconnect: bool = True
    connection_timeout: float = 10.0
    request_timeout: float = 30.0
    reconnect_retries: int | None = None
    reconnect_max_interval: float = 30.0
    cleansession: bool = True
    topics: Mapping[str, TopicConfig] = field(default_factory=dict[str, TopicConfig])
    broker: ConnectionConfig | None = None
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)
    plugins: Any = None
    check_hostname: bool = True
    verify_cert: bool = True
    will: WillConfig | None = None
    protocol: ProtocolName = "3.1.1"
    max_inflight: int = 100
    session_expiry: int | None = None
    offline: Literal["raise", "buffer", "drop"] = "buffer"
    offline_messages: int = 10_000
    offline_bytes: int = 16 * 1024 * 1024
    incoming_messages: int = 1000
    subscribe_errors: bool = False

    def __post_init__(self) -> None:
        _check_qos("default_qos", self.default_qos)
        for option in ("connection_timeout", "request_timeout", "reconnect_max_interval"):
            if getattr(self, option) <= 0:
                raise BadOption(
                    f"{option} is {getattr(self, option)}",
                    option=option,
                    hint="use more than 0 seconds",
                    backend=NAME,
                )
        for option in ("incoming_messages", "offline_messages", "offline_bytes"):
            if getattr(self, option) < 1:
                raise BadOption(
                    f"{option} is {getattr(self, option)}",
                    option=option,
                    hint="use 1 or more",
                    backend=NAME,
                )
        for name in self.topics:
            try:
                validate_filter(name)
            except InvalidFilter as exc:
                raise BadOption(
                    f"topics has {name!r}, which is neither a topic nor a filter",
                    option="topics",
                    hint=exc.message,
                    backend=NAME,
                ) from exc
        if self.check_hostname and not self.verify_cert:
            raise BadOption(
                "verify_cert=False with check_hostname: a name cannot be checked in a "
                "certificate that is not",
                option="verify_cert",
                hint="set check_hostname=False too, and know that anybody can be the broker then",
                backend=NAME,
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> ClientConfig:
        """Return the configuration that the dictionary means.

        Raises:
            BadOption: A key is unknown or a value does not fit; the path is in the text.
        """
        given = {key: value for key, value in (values or {}).items() if value is not None}
        # The will is checked by the options of the connection, whose words are others.
        config = build(cls, given, where="config", backend=NAME)
        if config.broker is not None:
            warnings.warn(
                "the section 'broker' is called 'connection' now", DeprecationWarning, stacklevel=3
            )
        if config.plugins:
            logger.warning("plugins of amqtt are not run by this client; drop them")
        config.options(client_id="check")
        return config

    @property
    def where(self) -> ConnectionConfig:
        """The connection, by its new or its old name."""
        return self.broker if self.broker is not None else self.connection

    def options(
        self,
        *,
        client_id: str,
        cleansession: bool | None = None,
        cafile: str | Path | None = None,
        capath: str | Path | None = None,
        cadata: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> MQTTOptions:
        """Return the options of a connection; arguments that are given win."""
        where = self.where
        context = where.ssl_context
        if context is not None and not isinstance(context, ssl.SSLContext):
            raise BadOption(
                f"connection.ssl_context is a {type(context).__name__}",
                option="connection.ssl_context",
                hint="use an ssl.SSLContext",
                backend=NAME,
            )
        will = self.will
        return MQTTOptions(
            client_id=client_id,
            keepalive=self.keep_alive,
            protocol=self.protocol,
            clean_start=self.cleansession if cleansession is None else cleansession,
            session_expiry=self.session_expiry,
            max_inflight=self.max_inflight,
            will=None
            if will is None
            else WillOptions(
                topic=will.topic,
                payload=will.message,
                qos=will.qos,
                retain=will.retain,
                delay=will.delay,
            ),
            topics={
                name: TopicDefaults(qos=topic.qos, retain=topic.retain)
                for name, topic in self.topics.items()
            },
            ca_file=_path(cafile or where.cafile),
            ca_path=_path(capath or where.capath),
            ca_data=cadata or where.cadata,
            cert_file=_path(where.certfile),
            key_file=_path(where.keyfile),
            key_password=where.key_password,
            insecure_skip_verify=not self.verify_cert,
            ssl_context=context,
            ws_headers=dict(headers or {}),
        )
