"""The interfaces of a backend: one `Backend`, and a small one for each optional power.

A backend is wire work only: one session with one broker, and the translation of topics.
The core owns retry, resubscription, routing, buffers, codecs, limits and events. Authors of
backends need this module and `pubsub_core.testing`.

Rules that hold for every method:

* Topics and filters are core topics; `backend.py` is where they become the broker's.
* Errors are those of `pubsub_core.errors`, raised ``from`` the native one. A failed publish
  carries its `Outcome`. Cancellation passes untouched, and leaves nothing behind.
* Nothing of a user runs inside a backend: frames, interest and losses go to the `Sink`,
  whose methods never block and may be called from any thread.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, Protocol, TypeAlias, runtime_checkable

import msgspec

from .capabilities import Cap, Guarantees, Limits, Support
from .clock import Clock, SystemClock
from .errors import NotSupported
from .events import InterestEvent, Notice
from .message import InFrame, Member, OutFrame, Receipt, Verdict
from .secrets import Secret

__all__ = [
    "API_VERSION",
    "EVERYTHING",
    "Address",
    "AuthorizationRequest",
    "Backend",
    "BackendContext",
    "BackendInfo",
    "DevServer",
    "Endpoint",
    "Entitlements",
    "Everything",
    "HasAcknowledgement",
    "HasAuthorization",
    "HasHistory",
    "HasNotifications",
    "HasPresence",
    "HasRetained",
    "HasUnicast",
    "HistoryQuery",
    "SessionFacts",
    "Sink",
    "Watch",
    "WatchKind",
    "WireSub",
]

API_VERSION = (1, 0)
"""Version of this contract: a backend with another major number is refused."""


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's address as a URL gave it. Its repr holds no password.

    Attributes:
        scheme: Lower case, e.g. ``mqtts``.
        host: As written, case kept; without the brackets of an IPv6 literal. May be ``""``.
        port: None when the URL has none.
        path: With its leading ``/``, percent-decoded, or ``""``.
    """

    scheme: str
    host: str = ""
    port: int | None = None
    path: str = ""
    username: str | None = None
    password: Secret | None = None

    def __str__(self) -> str:
        """Return the URL without credentials and options."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """The announcement of a backend, readable without importing the broker's client library.

    Attributes:
        name: Lower case, e.g. ``mqtt``.
        schemes: URL schemes it answers to, lower case.
        factory: ``module:Class`` of the `Backend`, imported when a URL is opened.
        capabilities: The most it can do; a missing entry means ``none``.
        options: A dataclass whose fields are the backend's options. It validates the URL's
            query and TOML alike and feeds help and schema; ``metadata["help"]`` of a field
            is its one-line help.
        install: Command that installs the factory's dependencies.
        dev_server: ``module:Class`` of an embedded `DevServer`, or ``""``.
        api: Version of the contract it was written for.
        about: One line for people.
    """

    name: str
    schemes: tuple[str, ...]
    factory: str
    capabilities: Mapping[Cap, Support]
    guarantees: Guarantees
    limits: Limits
    options: type[Any]
    install: str = ""
    dev_server: str = ""
    api: tuple[int, int] = API_VERSION
    about: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The socket that a backend connects to, defaults filled in.

    Attributes:
        host: Host name or address; of a local socket its path, with *port* None.
        tls: Whether the connection is encrypted.
    """

    host: str
    port: int | None
    tls: bool = False


@dataclass(frozen=True, slots=True)
class BackendContext:
    """The arguments of a backend.

    Attributes:
        info: Its own announcement.
        address: Where the broker is.
        options: An instance of ``info.options``, validated.
        bus: Name of the bus, for logs.
    """

    info: BackendInfo
    address: Address
    options: Any
    clock: Clock = field(default_factory=SystemClock)
    bus: str = ""


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """Facts about a new session.

    Attributes:
        resumed: The broker kept our subscriptions and the messages published meanwhile.
        client_id: Our identifier at the broker, or ``""``.
        server: The broker's own name and version as it tells them, or ``""``.
    """

    resumed: bool = False
    client_id: str = ""
    server: str = ""


class WireSub(msgspec.Struct, frozen=True):
    """One subscription at the broker. The core keeps one per filter and group.

    Attributes:
        id: Small positive number, unique within the bus and kept when the same filter is
            subscribed again with another quality of service. A broker that echoes
            subscription identifiers (MQTT 5) can use it as it is.
        filter: Plain filter with ``+`` and ``#``, without captures.
        group: Share group, or None.
        qos: Highest quality of service that any local subscription asked for.
        echo: Whether messages of this very client are wanted.
        manual_ack: Whether some local subscription decides about each message itself.
    """

    id: int
    filter: str
    group: str | None = None
    qos: int = 1
    echo: bool = True
    manual_ack: bool = False


class WatchKind(StrEnum):
    """Which of the two views on interest a watch is."""

    PRESENCE = "presence"
    NOTIFICATIONS = "notifications"


class Watch(msgspec.Struct, frozen=True):
    """One view on interest that a program holds open.

    Attributes:
        id: Unique within the bus, never used again.
        filter: Topic (presence) or filter (notifications).
    """

    id: int
    kind: WatchKind
    filter: str


class HistoryQuery(msgspec.Struct, frozen=True):
    """Which stored messages are wanted; both ends are inclusive.

    Attributes:
        last: At most that many, the newest; None for all.
        since: Unix seconds, or None.
        until: Unix seconds, or None.
    """

    last: int | None = None
    since: float | None = None
    until: float | None = None


class Everything(enum.Enum):
    """The type of `EVERYTHING`."""

    EVERYTHING = "everything"


EVERYTHING: Final = Everything.EVERYTHING
"""Held by a client that may see every part of a message, whatever the part needs."""

Entitlements: TypeAlias = frozenset[int] | Everything
"""The entitlements of a client with a right."""


class AuthorizationRequest(msgspec.Struct, frozen=True):
    """The broker asks which parts of *topic* the *member* may see.

    Attributes:
        tag: For the backend's own use, to answer.
    """

    member: Member
    topic: str
    tag: object = None

    @property
    def user(self) -> str:
        """User name of the client, as the broker tells it, or ``""``."""
        return self.member.name


class Sink(Protocol):
    """Takes everything that arrives from a backend. One per session; a dead session's sink is deaf.

    Every method may be called from any thread and returns at once.
    """

    def deliver(self, frame: InFrame) -> None:
        """Hand over one message."""
        ...

    def interest(self, event: InterestEvent) -> None:
        """Report a change of interest, for a watch that is open."""
        ...

    def authorization(self, request: AuthorizationRequest) -> None:
        """Ask which parts a client may see."""
        ...

    def notice(self, notice: Notice) -> None:
        """Report something that belongs to no call."""
        ...

    def sent_again(self, topic: str) -> None:
        """Report that a message of an earlier session was sent again.

        For brokers with a rate limit, which counts it again.
        """
        ...

    def lost(self, error: BaseException) -> None:
        """Report that the session ended; call it once. The core decides what happens next."""
        ...


class Backend(abc.ABC):
    """One session with one broker.

    The same object is opened again after a lost session, so it can keep state that must survive:
    a client id, messages that wait for their acknowledgement.
    """

    topic_defaults: Callable[[str], tuple[int | None, bool | None]] | None = None
    """Quality of service and retain flag of a publish that does not say, by topic.

    For backends whose options have such defaults; None in either place leaves the bus's own.
    """

    def __init__(self, context: BackendContext) -> None:
        self.context = context

    @abc.abstractmethod
    async def open(self, sink: Sink) -> SessionFacts:
        """Make one session; no retry. Deliveries may begin before this returns.

        Raises:
            ConnectError: With ``retryable`` set where it is known.
        """

    async def restored(self) -> None:
        """Called when the subscriptions are restored: send the publishes held until then."""
        return

    async def drop(self) -> None:
        """End the current session at once, as if it had been lost; `open` may follow.

        Called when a session could not be restored. The sink needs no `Sink.lost`.
        """
        await self.close(drain=0.0)

    @abc.abstractmethod
    async def close(self, *, drain: float) -> None:
        """End the session; flush acknowledged work for at most *drain* seconds.

        Idempotent, legal in any state, raises nothing for a dead link, leaves no task,
        thread or socket. Publishes that still wait end with a definite outcome.
        """

    @abc.abstractmethod
    async def publish(self, out: OutFrame) -> Receipt:
        """Send one message and return when it is as confirmed as the backend declares.

        Calls may overlap; they are sent in the order of the calls. When the session is
        lost meanwhile a backend may keep the message, send it again in the next session
        and return then.

        Raises:
            PublishFailed: With its outcome.
            NotConnected: There is no session and the message was not kept.
        """

    def try_publish(self, out: OutFrame) -> Receipt | None:
        """Publish at once if that needs no waiting; None lets the core call `publish`.

        For backends where a publish is confirmed without waiting. It must not overtake
        messages that `publish` still holds, and raises what `publish` raises.
        """
        return None

    @abc.abstractmethod
    async def subscribe(self, want: WireSub) -> int:
        """Subscribe and return the granted quality of service once the broker confirmed.

        Called again for the same id to change its quality of service. It may deliver more
        than the filter says: the core filters again.

        Raises:
            SubscribeFailed: The broker refused.
        """

    @abc.abstractmethod
    async def unsubscribe(self, want: WireSub) -> None:
        """Drop a subscription and return once the broker confirmed."""

    async def repeat_retained(self, want: WireSub) -> None:
        """Deliver the retained messages of an existing subscription once more.

        For a local subscription that joins one already in place; the core gives each
        retained message only to those that have not had it. For brokers that keep no retained
        messages the default will do.
        """
        return

    async def probe(self) -> Mapping[Cap, Support]:
        """Return the real support of this server and these credentials; see `effective`."""
        return {}

    @property
    def keeps_history(self) -> bool:
        """Whether ``history`` has every message, so that it fills the hole of an outage."""
        return True

    @property
    def endpoint(self) -> Endpoint | None:
        """Where `open` will connect to, for ``pubsub doctor``; None where no socket is used."""
        return None

    @property
    def limits(self) -> Limits:
        """The limits of the current session; the declared ones unless the broker said less."""
        return self.context.info.limits

    @property
    def guarantees(self) -> Guarantees:
        """The guarantees with the given options; the declared ones unless overridden."""
        return self.context.info.guarantees

    def to_wire(self, topic: str) -> str:
        """Translate a core topic to the broker's name; with `from_wire` a bijection."""
        return topic

    def from_wire(self, name: str) -> str:
        """Translate the broker's name of a topic to the core's."""
        return name

    async def ping(self) -> float:
        """Return the seconds that a round trip to the broker takes."""
        raise NotSupported(
            Cap.PING, why="the protocol has no round trip", backend=self.context.info.name
        )

    def pause(self) -> bool:
        """Stop the flow of messages; return whether it really stops (``flow_control``).

        The link must stay alive meanwhile.
        """
        return False

    def resume(self) -> None:
        """Resume the flow of messages."""
        return

    @property
    def native(self) -> object:
        """The backend's own client, for `Bus.native`."""
        return self


@runtime_checkable
class HasPresence(Protocol):
    """Capability ``presence``."""

    async def watch_presence(self, watch: Watch) -> Sequence[Member]:
        """Report changes to the sink from now on; return who is there.

        A change may be reported before this returns: the core reconciles by member id.

        Raises:
            NotAuthorized: These credentials may not look.
        """
        ...

    async def unwatch_presence(self, watch: Watch) -> None:
        """Stop reporting."""
        ...

    async def members(self, topic: str) -> Sequence[Member]:
        """Return who is subscribed to *topic* now."""
        ...


@runtime_checkable
class HasNotifications(Protocol):
    """Capability ``notifications``."""

    async def watch_notifications(self, watch: Watch) -> None:
        """Report the existing interest as ``joined`` events, then every change.

        Report ``synced`` in between where the broker marks the end of the existing ones.
        """
        ...

    async def unwatch_notifications(self, watch: Watch) -> None:
        """Stop reporting."""
        ...


@runtime_checkable
class HasHistory(Protocol):
    """Capability ``history``; the core builds ``replay`` on it."""

    def history(self, filter: str, query: HistoryQuery) -> AsyncIterator[InFrame]:
        """Yield stored messages that match, oldest first, marked ``replay``."""
        ...


@runtime_checkable
class HasRetained(Protocol):
    """Capability ``retained``."""

    async def last(self, topic: str) -> InFrame | None:
        """Return the retained message of *topic*, or None."""
        ...


@runtime_checkable
class HasUnicast(Protocol):
    """Capability ``unicast``."""

    async def send_to(self, member: str, out: OutFrame) -> Receipt:
        """Send to the one member with that id, which must be subscribed to the topic."""
        ...


@runtime_checkable
class HasAcknowledgement(Protocol):
    """Capability ``ack``."""

    def settle(self, tag: object, verdict: Verdict) -> None:
        """Act on the decision about the frame with that tag; never blocks.

        A tag of an earlier session is ignored.
        """
        ...


@runtime_checkable
class HasAuthorization(Protocol):
    """Capability ``authorization``.

    Nobody is shown anything before an answer, and nothing here answers by itself.
    """

    async def watch_authorizations(self, filter: str) -> None:
        """Ask the sink about clients that want topics matching *filter*.

        Called again in each session, and perhaps twice for one filter. Keep questions that the
        broker asked earlier in the session until then: a client may have waited longer than we.
        """
        ...

    async def unwatch_authorizations(self, filter: str) -> None:
        """Stop asking."""
        ...

    async def authorize(
        self, request: AuthorizationRequest, entitlements: Entitlements | None
    ) -> None:
        """Answer: the entitlements held, `EVERYTHING`, or None for no right at all.

        Return once the broker acts on it, where that can be known. The same request may be
        answered again later, which replaces the earlier answer.

        Raises:
            ValueError: The broker cannot carry these entitlements.
            NotConnected: There is no session.
        """
        ...


class DevServer(Protocol):
    """An embedded server for development and tests: loopback and a free port by default."""

    backend: ClassVar[str]
    """Name of the backend that speaks to it."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None: ...

    async def start(self) -> None:
        """Listen; afterwards `url` and `port` are known."""
        ...

    async def stop(self) -> None:
        """Stop; returns within a few seconds in any state."""
        ...

    @property
    def url(self) -> str:
        """URL to connect to."""
        ...

    @property
    def host(self) -> str:
        """Address it listens on."""
        ...

    @property
    def port(self) -> int:
        """Port it listens on."""
        ...

    def describe(self) -> Mapping[str, object]:
        """More for the start line, e.g. credentials the server made itself."""
        ...
