"""Messages, headers, receipts, members, and the frames below them.

A subscriber holds a `Message`. Below it, a backend hands an `InFrame` to the core, and the
core an `OutFrame` to a backend; both speak core topics, never
the broker's. All of them are immutable msgspec structs, which are made several
times faster than dataclasses: one is made per message. Frames and receipts are left out of
cyclic garbage collection (``gc=False``), since nothing they hold refers back to them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, Generic, TypeAlias, TypeVar, cast

import msgspec

from .capabilities import ConfirmedBy

__all__ = [
    "NO_HEADERS",
    "Headers",
    "InFrame",
    "Member",
    "Message",
    "Origin",
    "OutFrame",
    "Part",
    "Receipt",
    "Verdict",
]

T_co = TypeVar("T_co", covariant=True)


class Origin(StrEnum):
    """How a message came to a subscriber."""

    LIVE = "live"
    """Published while the subscription was in place."""
    REPLAY = "replay"
    """Stored by the broker and asked for."""
    IMAGE = "image"
    """The complete state of a topic, sent to this subscriber by a publisher."""
    RETAINED = "retained"
    """The last value of the topic, given by the broker on subscribing."""
    UNKNOWN = "unknown"
    """The broker mixes old and live messages and does not mark them."""

    @property
    def live(self) -> bool:
        """Whether the message is certainly not an old one."""
        return self is Origin.LIVE


class Headers(Mapping[str, str]):
    """Names and values beside the payload: ordered, case-sensitive, names may repeat.

    As a mapping it gives the last value of a name; `get_all` gives every one.
    """

    __slots__ = ("_map", "_pairs")

    def __init__(self, pairs: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> None:
        if isinstance(pairs, Headers):
            pairs = pairs.pairs
        elif isinstance(pairs, Mapping):
            pairs = cast("Mapping[str, str]", pairs).items()
        self._pairs = tuple((name, value) for name, value in pairs)
        self._map = dict(self._pairs)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All names and values in the order they were given."""
        return self._pairs

    def get_all(self, name: str) -> list[str]:
        """Return every value of *name*, in order."""
        return [value for key, value in self._pairs if key == name]

    def __getitem__(self, name: str) -> str:
        return self._map[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Headers):
            return self._pairs == other._pairs
        return isinstance(other, Mapping) and self._map == other

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        return f"Headers({list(self._pairs)!r})"


NO_HEADERS = Headers()
"""The headers of a message without any."""


class Member(msgspec.Struct, frozen=True):
    """A client of the broker, as others see it.

    Attributes:
        id: The broker's identifier of the connection; it changes on reconnecting where
            the broker says so.
        name: User name as the broker tells it, or ``""``.
        host: Host as the broker tells it, or ``""``.
    """

    id: str
    name: str = ""
    host: str = ""


class Part(msgspec.Struct, frozen=True):
    """One part of a message whose parts need different entitlements.

    Attributes:
        data: The value on publishing, bytes when received.
        entitlements: A subscriber must hold them to receive this part; empty for everyone.
    """

    data: Any
    entitlements: frozenset[int] = frozenset()


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The facts of a publish that did not fail.

    Attributes:
        topic: As published.
        confirmed_by: Who said so; see `ConfirmedBy`.
        id: The broker's identifier of the message, where it has one.
        subscribers: Receivers the broker had for it; 0 means nobody, None that the broker
            does not tell.
    """

    topic: str
    confirmed_by: ConfirmedBy
    id: str | None = None
    subscribers: int | None = None


class Verdict(StrEnum):
    """A subscriber's decision about a message that waits for acknowledgement."""

    ACK = "ack"
    """Done; the broker may forget it."""
    NACK = "nack"
    """Deliver it again, to this or another subscriber."""
    REJECT = "reject"
    """Do not deliver it again; it was not handled."""


class InFrame(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message as a backend hands it to the core.

    Attributes:
        topic: Core topic, translated from the wire.
        payload: As it arrived.
        qos: Quality of service of this delivery.
        time: Unix seconds; when the broker says it was published, else when it arrived.
        expires_in: Seconds left of its ttl, where the broker tells.
        id: The broker's identifier, where it has one. Unique within a topic.
        source: Who published it, where the broker tells.
        parts: Parts with entitlements; `payload` is then the first part's data.
        redelivered: The broker says it may have been delivered before.
        subscriptions: Ids of the `WireSub` this copy is for; None when the broker does not
            tell, and the core matches the topic itself.
        tag: Whatever the backend needs to settle it; None when nothing waits for that.
        native: The client library's own object, for `Message.native`.
    """

    topic: str
    payload: bytes
    origin: Origin = Origin.LIVE
    qos: int = 0
    time: float = 0.0
    headers: Headers = NO_HEADERS
    content_type: str | None = None
    expires_in: float | None = None
    id: str | None = None
    source: Member | None = None
    parts: tuple[Part, ...] = ()
    redelivered: bool = False
    subscriptions: tuple[int, ...] | None = None
    tag: object = None
    native: object = None


class OutFrame(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message as the core hands it to a backend: checked, encoded, complete.

    Attributes:
        topic: Core topic, valid for this backend.
        qos: Quality of service asked for.
        ttl: Seconds after which it may be forgotten, or None.
        echo: Whether the publishing client's own subscriptions may receive it.
        parts: Encoded parts with entitlements, or empty.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    ttl: float | None = None
    headers: Headers = NO_HEADERS
    content_type: str | None = None
    echo: bool = True
    parts: tuple[Part, ...] = ()


class _Done:
    """An awaitable that has nothing to wait for."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


_DONE = _Done()

Settle: TypeAlias = Callable[[Verdict], None]


class Message(msgspec.Struct, Generic[T_co], frozen=True):
    """One message as a subscriber holds it. Immutable; safe to keep after the handler.

    Attributes:
        topic: The real topic it was published to, never the filter.
        payload: Decoded to the type the subscription asked for, or bytes.
        params: The texts that the filter's captures matched, by name.
        frame: The backend's delivery; the other attributes are read from it.
    """

    topic: str
    payload: T_co
    params: Mapping[str, str]
    frame: InFrame
    _settle: Settle | None = None

    @property
    def raw(self) -> bytes:
        """The payload as it arrived."""
        return self.frame.payload

    @property
    def origin(self) -> Origin:
        """How it came here; see `Origin`."""
        return self.frame.origin

    @property
    def qos(self) -> int:
        """Quality of service it was delivered with, which may be less than asked for."""
        return self.frame.qos

    @property
    def time(self) -> float:
        """Unix seconds: when published where the broker tells, else when received."""
        return self.frame.time

    @property
    def headers(self) -> Headers:
        """Names and values beside the payload."""
        return self.frame.headers

    @property
    def content_type(self) -> str | None:
        """The payload's media type, where the publisher gave one."""
        return self.frame.content_type

    @property
    def expires_in(self) -> float | None:
        """Seconds that were left of its ttl when it arrived, where the broker tells."""
        return self.frame.expires_in

    @property
    def id(self) -> str | None:
        """The broker's identifier of the message, where it has one."""
        return self.frame.id

    @property
    def source(self) -> Member | None:
        """Who published it, where the broker tells."""
        return self.frame.source

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts with entitlements, where the publisher sent several."""
        return self.frame.parts

    @property
    def redelivered(self) -> bool:
        """Whether the broker says that it may have been delivered before."""
        return self.frame.redelivered

    @property
    def native(self) -> object:
        """The client library's own object, or None."""
        return self.frame.native

    # The three take effect when called; awaiting them is for uniformity. So plain handlers
    # and the synchronous API use the very same messages.

    def ack(self) -> Awaitable[None]:
        """Say that the message is handled. Twice is harmless; so is it where nothing waits."""
        return self._decide(Verdict.ACK)

    def nack(self) -> Awaitable[None]:
        """Give the message back for another delivery.

        Raises:
            NotSupported: The backend cannot deliver it again (capability ``nack``).
        """
        return self._decide(Verdict.NACK)

    def reject(self) -> Awaitable[None]:
        """Say that the message was not handled and shall not come again.

        Raises:
            NotSupported: The backend has no acknowledgement.
        """
        return self._decide(Verdict.REJECT)

    def _decide(self, verdict: Verdict) -> Awaitable[None]:
        if self._settle is not None:
            self._settle(verdict)
        return _DONE

    def __repr__(self) -> str:
        # The payload may be personal or secret, and repr ends up in logs.
        return (
            f"<Message {self.topic!r} {len(self.frame.payload)} bytes "
            f"origin={self.frame.origin.value} qos={self.frame.qos}>"
        )
