"""What a session is asked for, and what the broker made of it: plain data.

Source: MQTT 5.0 sections 3.1 (CONNECT), 3.2 (CONNACK) and 3.8 (SUBSCRIBE).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from pubsub_core.errors import BadOption
from pubsub_core.interfaces import Address
from pubsub_core.secrets import Secret
from pubsub_mqtt.options import DEFAULT_MAX_PACKET, MAX_PACKET, NAME, MQTTOptions, ProtocolName

__all__ = [
    "ConnectionStats",
    "Session",
    "SessionSettings",
    "Subscribe",
    "Version",
    "Will",
    "random_client_id",
    "settings_of",
]

Version = Literal[4, 5]
"""Protocol level: 4 is MQTT 3.1.1."""

_VERSIONS: dict[ProtocolName, tuple[Version, ...]] = {"auto": (5, 4), "5": (5,), "3.1.1": (4,)}


@dataclass(frozen=True, slots=True)
class Will:
    """The message the broker publishes when the connection ends without DISCONNECT."""

    topic: str
    payload: bytes = field(default=b"", repr=False)
    qos: int = 0
    retain: bool = False
    delay: int = 0


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What CONNECT says, and our own limits.

    Attributes:
        client_id: None for a random one; ``""`` lets the broker choose.
        keepalive: Seconds; 0 switches the watchdog off, too.
        versions: Protocol levels to try, first to last: 5 and 4 (which is 3.1.1).
        clean_start: Begin without what an earlier session left. Under MQTT 5 this counts
            for the first session of a connection; later ones continue when the session
            does not expire at once.
        expiry: Seconds the broker keeps the session after the connection ended (MQTT 5).
        receive_maximum: Bound of unacknowledged messages to us (MQTT 5), or None.
        max_packet_size: Longest packet we accept.
        max_inflight: Bound of our own unacknowledged messages.
    """

    client_id: str | None = None
    username: str | None = None
    password: Secret | None = None
    keepalive: int = 60
    versions: tuple[Version, ...] = (5, 4)
    clean_start: bool = True
    expiry: int = 0
    receive_maximum: int | None = None
    max_packet_size: int = DEFAULT_MAX_PACKET
    max_inflight: int = 100
    will: Will | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """What the broker's CONNACK says.

    Attributes:
        present: The broker continues an earlier session of this client identifier.
        keepalive: In force: the broker's, where it sets one.
        window: Most publishes above QoS 0 that may wait for the broker.
        max_packet_size: Longest packet the broker accepts.
        shared: Whether there are share groups; None where the broker cannot tell.
        identifiers: Whether deliveries name the subscription they are for.
    """

    version: Version
    present: bool
    client_id: str
    keepalive: int
    window: int
    max_packet_size: int = MAX_PACKET
    maximum_qos: int = 2
    retain: bool = True
    wildcards: bool = True
    shared: bool | None = None
    identifiers: bool = False
    expiry: int = 0


@dataclass(frozen=True, slots=True)
class Subscribe:
    """One filter of a SUBSCRIBE.

    Attributes:
        filter: As it goes on the wire, with any ``$share/name/`` in front.
        no_local: Do not deliver what this client publishes (MQTT 5).
        retain_handling: 0 send retained messages, 1 only for a new subscription, 2 never
            (MQTT 5).
        identifier: Subscription identifier, or 0 for none (MQTT 5).
    """

    filter: str
    qos: int = 0
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0
    identifier: int = 0


@dataclass(slots=True)
class ConnectionStats:
    """Counters that only grow."""

    sessions: int = 0
    packets_in: int = 0
    packets_out: int = 0
    bytes_in: int = 0
    unknown_acks: int = 0
    wrong_phase_acks: int = 0
    duplicates: int = 0
    resent: int = 0
    refused_replays: int = 0
    pings: int = 0


def settings_of(address: Address, options: MQTTOptions, *, backend: str = NAME) -> SessionSettings:
    """Return what CONNECT will say; credentials of the options win over the address's.

    Raises:
        BadOption: A text that no CONNECT can carry. The error names the option, never the text.
    """
    will = None
    if options.will is not None:
        will = Will(
            options.will.topic,
            options.will.data,
            options.will.qos,
            options.will.retain,
            options.will.delay,
        )
    username = options.username if options.username is not None else address.username
    password = options.password if options.password is not None else address.password
    _check_text("client_id", options.client_id, backend)
    _check_text("username", username, backend)
    _check_text("password", None if password is None else password.reveal(), backend, binary=True)
    return SessionSettings(
        client_id=options.client_id,
        username=username,
        password=password,
        keepalive=options.keepalive,
        versions=_VERSIONS[options.protocol],
        clean_start=options.clean_start,
        expiry=options.expiry,
        receive_maximum=options.receive_maximum,
        max_packet_size=options.max_packet_size,
        max_inflight=options.max_inflight,
        will=will,
    )


def random_client_id() -> str:
    """Return a random identifier: 19 characters, as short as old brokers want it."""
    return f"pubsub-{secrets.token_hex(6)}"


def _check_text(option: str, text: str | None, backend: str, *, binary: bool = False) -> None:
    """Refuse what MQTT cannot carry in a string, or with *binary* in its binary data."""
    if text is None:
        return
    try:
        data = text.encode()
    except UnicodeEncodeError:
        why, hint = (
            "has a lone surrogate",
            "decode received bytes as UTF-8, without surrogateescape",
        )
    else:
        if len(data) > 65535:
            why, hint = f"has {len(data)} bytes", "MQTT carries at most 65535"
        elif b"\0" in data and not binary:
            why, hint = "has a NUL", "MQTT allows none in a string"
        else:
            return
    raise BadOption(f"{option} {why}", option=option, hint=hint, backend=backend)
