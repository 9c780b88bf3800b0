"""Capabilities, guarantees and limits of a broker, as plain data.

A backend declares `Support` per `Cap`, one `Guarantees` and one `Limits` in its
`BackendInfo`. The declaration is a ceiling: after connecting, a backend's ``probe()`` may
lower it for a certain server or credentials, never raise it. The conformance suite
proves each claim, and the tables in the documentation are made from this data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = [
    "AT_MOST_ONCE",
    "Cap",
    "ConfirmedBy",
    "Delivery",
    "Duplicates",
    "Durability",
    "Guarantees",
    "Level",
    "Limits",
    "Order",
    "Redelivery",
    "Support",
    "effective",
]


class Cap(StrEnum):
    """Something that some brokers can do and others cannot."""

    WILDCARDS = "wildcards"
    """Filters with ``+``, ``#`` and captures."""
    GROUPS = "groups"
    """Share groups: each message goes to one member."""
    RETAINED = "retained"
    """The last message of a topic is kept and given to new subscribers."""
    HISTORY = "history"
    """Earlier messages can be asked for."""
    REPLAY = "replay"
    """A subscription can start with earlier messages."""
    TTL = "ttl"
    """A message can expire."""
    HEADERS = "headers"
    """Names and values travel beside the payload."""
    CONTENT_TYPE = "content_type"
    """The payload's media type travels beside it."""
    PRESENCE = "presence"
    """Who is subscribed to a topic, and how that changes."""
    NOTIFICATIONS = "notifications"
    """A publisher is told of other clients' subscriptions."""
    UNICAST = "unicast"
    """A message can be addressed to one member."""
    ACK = "ack"
    """A message is acknowledged by its receiver."""
    NACK = "nack"
    """A receiver can give a message back for another delivery."""
    REDELIVERY = "redelivery"
    """A message that was not acknowledged is delivered again."""
    FLOW_CONTROL = "flow_control"
    """A slow subscriber can hold the broker back without losing messages."""
    ECHO_CONTROL = "echo_control"
    """A client can choose not to receive its own messages."""
    REFUSAL_VISIBLE = "refusal_visible"
    """A publish or subscribe that the broker refuses is reported to the caller."""
    AUTH = "auth"
    """The broker can check who connects."""
    PERSISTENT_SESSION = "persistent_session"
    """Subscriptions and undelivered messages survive a lost connection."""
    WILL = "will"
    """The broker publishes a last message for a client that vanishes."""
    SOURCE = "source"
    """A message tells who published it."""
    SOURCE_LOST = "source_lost"
    """Subscribers are told that the publisher of a topic went away."""
    ENTITLEMENTS = "entitlements"
    """Parts of a message reach only those entitled to them."""
    AUTHORIZATION = "authorization"
    """A client can be asked what other clients may see."""
    PING = "ping"
    """The round trip to the broker can be measured."""


class Level(StrEnum):
    """How a capability is there."""

    NATIVE = "native"
    """The broker has it."""
    EMULATED = "emulated"
    """Built here from other features; `Support.why` says how."""
    NONE = "none"
    """Not there; the operation raises `NotSupported`."""
    UNKNOWN = "unknown"
    """Depends on the server; the operation is tried."""


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a capability is there, and why. True when native or emulated.

    Attributes:
        level: See `Level`.
        why: One clause that a user can read: how it is done, or why it is missing.
        remedy: Advice where it is missing or unknown; may be empty.
    """

    level: Level
    why: str = ""
    remedy: str = ""

    def __bool__(self) -> bool:
        return self.level in (Level.NATIVE, Level.EMULATED)

    @classmethod
    def native(cls, why: str = "") -> Support:
        """Return: the broker has it."""
        return cls(Level.NATIVE, why)

    @classmethod
    def emulated(cls, why: str) -> Support:
        """Return: it is built here, in the way that *why* tells."""
        return cls(Level.EMULATED, why)

    @classmethod
    def none(cls, why: str, remedy: str = "") -> Support:
        """Return: it is not there, for the reason *why*."""
        return cls(Level.NONE, why, remedy)

    @classmethod
    def unknown(cls, why: str, remedy: str = "") -> Support:
        """Return: it depends, on what *why* tells."""
        return cls(Level.UNKNOWN, why, remedy)


_RANK = {Level.NONE: 0, Level.UNKNOWN: 1, Level.EMULATED: 2, Level.NATIVE: 3}


def effective(declared: Mapping[Cap, Support], probed: Mapping[Cap, Support]) -> dict[Cap, Support]:
    """Combine a declaration with the result of a probe, which can only lower it.

    UNKNOWN may be resolved by a probe in either direction: it was never a claim.
    """
    result = {cap: declared.get(cap, Support.none("not declared by this backend")) for cap in Cap}
    for cap, found in probed.items():
        ceiling = result[cap]
        if ceiling.level is Level.UNKNOWN or _RANK[found.level] <= _RANK[ceiling.level]:
            result[cap] = found
    return result


class ConfirmedBy(StrEnum):
    """Who said that a publish succeeded; never more than is known."""

    BROKER = "broker"
    """The broker acknowledged it."""
    TRANSPORT = "transport"
    """It was handed to the operating system; nobody acknowledged it."""
    NOBODY = "nobody"
    """It was accepted here and not yet sent."""


class Delivery(StrEnum):
    """How often a message reaches a subscriber that stays connected."""

    AT_MOST_ONCE = "at_most_once"
    AT_LEAST_ONCE = "at_least_once"
    EXACTLY_ONCE = "exactly_once"


class Redelivery(StrEnum):
    """When an unacknowledged message comes again."""

    NEVER = "never"
    AFTER_RECONNECT = "after_reconnect"
    ON_NACK_OR_TIMEOUT = "on_nack_or_timeout"


class Order(StrEnum):
    """The scope within which the order of first arrivals is kept."""

    NONE = "none"
    PER_PUBLISHER_AND_TOPIC = "per_publisher_and_topic"
    PER_PUBLISHER = "per_publisher"
    PER_TOPIC = "per_topic"


class Duplicates(StrEnum):
    """When a message may arrive twice."""

    NEVER = "never"
    AFTER_REDELIVERY = "after_redelivery"
    AFTER_RECONNECT = "after_reconnect"


class Durability(StrEnum):
    """The data that survives a restart of the broker."""

    NOTHING = "nothing"
    DEPENDS_ON_BROKER = "depends_on_broker"
    STORED_MESSAGES = "stored_messages"


@dataclass(frozen=True, slots=True)
class Guarantees:
    """The promises of a backend with its default settings; each field is proved by the suite.

    Attributes:
        confirmed_by: Who confirms a publish.
        delivery: To subscribers that stay connected and keep up.
        note: Facts beyond the enumerations, in one or two sentences.
    """

    confirmed_by: ConfirmedBy
    delivery: Delivery
    redelivery: Redelivery
    order: Order
    duplicates: Duplicates
    durability: Durability
    note: str = ""


AT_MOST_ONCE = Guarantees(
    confirmed_by=ConfirmedBy.BROKER,
    delivery=Delivery.AT_MOST_ONCE,
    redelivery=Redelivery.NEVER,
    order=Order.PER_PUBLISHER_AND_TOPIC,
    duplicates=Duplicates.AFTER_RECONNECT,
    durability=Durability.DEPENDS_ON_BROKER,
)
"""Promises of brokers that confirm each publish and deliver without acknowledgements.

Duplicates come from a publish whose confirmation was lost with the session.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and rates that the core enforces before anything is sent. None: no limit known.

    Attributes:
        max_payload: Bytes of the encoded payload.
        max_topic_bytes: UTF-8 bytes of a topic.
        max_levels: Levels of a topic or filter.
        forbidden_characters: Characters the broker cannot carry in a topic, beside those
            that no topic may hold.
        allow_empty_levels: Whether ``a//b`` and ``/a`` can be carried.
        rate: Messages and seconds: at most that many publishes in that time.
        rate_per_topic: The same for each topic.
        notes: Anything else a user should know, by name.
    """

    max_payload: int | None = None
    max_topic_bytes: int | None = 65535
    max_levels: int | None = None
    forbidden_characters: str = ""
    allow_empty_levels: bool = True
    rate: tuple[int, float] | None = None
    rate_per_topic: tuple[int, float] | None = None
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
