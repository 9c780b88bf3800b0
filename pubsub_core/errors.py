"""Every error that a user of the library can meet, in one tree.

    PubSubError                      code, backend, topic, retryable, hint
    ├─ ConfigError                   the program or its configuration is wrong
    │  ├─ UnknownBackend             no installed backend answers to that scheme
    │  ├─ MissingDependency          the backend is here, its client library is not
    │  ├─ BadOption                  an option is unknown or has a bad value; a ValueError
    │  │  └─ BadType                 its value is of the wrong type; a TypeError as well
    │  └─ PluginError                a plugin failed to load
    ├─ ConnectError                  no session with the broker
    │  ├─ ConnectTimeout
    │  ├─ TLSProblem                 certificate, host name or protocol version
    │  ├─ AuthenticationFailed
    │  ├─ ServerRefused              the broker answered, and said no
    │  └─ TakenOver                  another client keeps connecting with our client id
    ├─ NotConnected                  the session is down and the offline policy is "raise"
    ├─ BusClosed                     used after close()
    ├─ OperationTimeout              any other request that was not answered in time
    ├─ WrongLoop                     used from another event loop, thread or process
    ├─ InvalidTopic, InvalidFilter   level and character are attributes
    ├─ NotAuthorized                 base of the two refusals below
    ├─ PublishFailed                 outcome: rejected, not_sent or unknown
    │  ├─ PublishNotAuthorized
    │  ├─ PayloadTooLarge            size, limit
    │  ├─ RateLimited                retry_after
    │  ├─ PublishTimeout
    │  └─ Overflow                   the offline buffer is full
    ├─ SubscribeFailed
    │  ├─ SubscribeNotAuthorized
    │  └─ LimitReached
    ├─ SubscriptionOverflow          a subscription with overflow="error" fell behind
    ├─ NotSupported                  capability, why, alternatives
    ├─ EncodeFailed, DecodeFailed    DecodeFailed keeps the raw bytes
    └─ HandlerFailed                 a handler raised; the cause is its exception

A backend raises these at its edge, ``from`` the native error. Cancellation is never
wrapped. Texts name the thing that is wrong and what to do about it; they hold no payload,
no secret and no key.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import ClassVar

__all__ = [
    "AuthenticationFailed",
    "BadOption",
    "BadType",
    "BusClosed",
    "ConfigError",
    "ConnectError",
    "ConnectTimeout",
    "DecodeFailed",
    "EncodeFailed",
    "HandlerFailed",
    "InvalidFilter",
    "InvalidTopic",
    "LimitReached",
    "MissingDependency",
    "NotAuthorized",
    "NotConnected",
    "NotSupported",
    "OperationTimeout",
    "Outcome",
    "Overflow",
    "PayloadTooLarge",
    "PluginError",
    "PubSubError",
    "PublishFailed",
    "PublishNotAuthorized",
    "PublishTimeout",
    "RateLimited",
    "ServerRefused",
    "SubscribeFailed",
    "SubscribeNotAuthorized",
    "SubscriptionOverflow",
    "TLSProblem",
    "TakenOver",
    "UnknownBackend",
    "WrongLoop",
]


class Outcome(StrEnum):
    """The fate of a message whose publish failed."""

    REJECTED = "rejected"
    """The broker saw it and refused it. Publishing it again will not help."""
    NOT_SENT = "not_sent"
    """It never left this process. Publishing it again cannot duplicate it."""
    UNKNOWN = "unknown"
    """It may or may not have arrived. Publishing it again may duplicate it."""


class PubSubError(Exception):
    """Base of every error of this library.

    Attributes:
        code: A stable string for programs and documentation, one per class.
        hint: The remedy; part of ``str()``.
        backend: Name of the backend concerned, or ``""``.
        topic: Topic or filter concerned, or ``""``. Never holds a key.
        retryable: Whether the same call can succeed later; None when that is unknown.
    """

    code: ClassVar[str] = "error"
    retryable: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        backend: str = "",
        topic: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.backend = backend
        self.topic = topic
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


# --- configuration ---------------------------------------------------------------------


class ConfigError(PubSubError):
    """The program or its configuration is wrong; nothing was sent."""

    code = "config"
    retryable = False


class UnknownBackend(ConfigError):
    """No installed backend answers to this scheme or name."""

    code = "unknown_backend"


class MissingDependency(ConfigError):
    """A backend's client library is not installed; the hint is the install line."""

    code = "missing_dependency"


class BadOption(ConfigError, ValueError):
    """An option or argument is unknown, or its value does not fit.

    Attributes:
        option: Where the option stands, e.g. ``bus.main.keepalive`` or ``?keepalive=``.
    """

    code = "bad_option"

    def __init__(
        self, message: str, *, option: str = "", hint: str = "", backend: str = ""
    ) -> None:
        super().__init__(message, hint=hint, backend=backend)
        self.option = option


class BadType(BadOption, TypeError):
    """A value of another type was expected."""

    code = "bad_type"


class PluginError(ConfigError):
    """A plugin could not be loaded, or breaks the contract; the cause is kept.

    Attributes:
        plugin: Name of the entry point.
        distribution: Name and version of the package that brought it, or ``""``.
    """

    code = "plugin"

    def __init__(
        self, message: str, *, plugin: str = "", distribution: str = "", hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.plugin = plugin
        self.distribution = distribution


# --- connecting ------------------------------------------------------------------------


class ConnectError(PubSubError):
    """No session with the broker could be made, or it was lost for good."""

    code = "connect"
    retryable = True


class ConnectTimeout(ConnectError, TimeoutError):
    """The broker did not answer in time."""

    code = "connect_timeout"


class TLSProblem(ConnectError):
    """Certificate chain, host name or protocol version was refused."""

    code = "tls"
    retryable = False


class AuthenticationFailed(ConnectError):
    """The broker refused the credentials. Never retried by the session."""

    code = "authentication"
    retryable = False


class ServerRefused(ConnectError):
    """The broker answered and refused the session for another reason.

    Attributes:
        reason: The broker's own code, e.g. a CONNACK return code; None where it has none.
    """

    code = "server_refused"

    def __init__(
        self,
        message: str,
        *,
        reason: int | None = None,
        hint: str = "",
        backend: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, hint=hint, backend=backend, retryable=retryable)
        self.reason = reason


class TakenOver(ConnectError):
    """The broker says that another client takes our client id again and again; we stopped."""

    code = "taken_over"
    retryable = False


class NotConnected(PubSubError):
    """The session is down. Nothing was sent."""

    code = "not_connected"
    retryable = True


class BusClosed(PubSubError):
    """The bus was closed; open a new one."""

    code = "closed"
    retryable = False


class OperationTimeout(PubSubError, TimeoutError):
    """The broker did not answer a request in time; it may have carried it out."""

    code = "timeout"
    retryable = True


class WrongLoop(PubSubError):
    """An object bound to one event loop was used from another loop, thread or process."""

    code = "wrong_loop"
    retryable = False


# --- topics ----------------------------------------------------------------------------


class InvalidTopic(PubSubError, ValueError):
    """A topic that cannot be published to.

    Attributes:
        level: Index of the offending level, from 0; None when the whole text is at fault.
        character: The offending character, or ``""``.
        reason: A stable word for the rule that was broken, e.g. ``wildcard``.
    """

    code = "invalid_topic"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        topic: str = "",
        level: int | None = None,
        character: str = "",
        reason: str = "",
        hint: str = "",
        backend: str = "",
    ) -> None:
        super().__init__(message, hint=hint, backend=backend, topic=topic)
        self.level = level
        self.character = character
        self.reason = reason


class InvalidFilter(InvalidTopic):
    """A topic filter that cannot be subscribed to; attributes as `InvalidTopic`."""

    code = "invalid_filter"


# --- publishing and subscribing --------------------------------------------------------


class NotAuthorized(PubSubError):
    """The broker refused the operation for lack of rights."""

    code = "not_authorized"
    retryable = False


class PublishFailed(PubSubError):
    """A publish did not succeed.

    Attributes:
        outcome: The fate of the message; see `Outcome`.
        reason: The broker's own code, or None.
    """

    code = "publish_failed"

    def __init__(
        self,
        message: str,
        *,
        outcome: Outcome = Outcome.UNKNOWN,
        reason: int | None = None,
        hint: str = "",
        backend: str = "",
        topic: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, hint=hint, backend=backend, topic=topic, retryable=retryable)
        self.outcome = outcome
        self.reason = reason


class PublishNotAuthorized(PublishFailed, NotAuthorized):
    """The broker refused this publish; the outcome is ``rejected``."""

    code = "not_authorized"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        outcome: Outcome = Outcome.REJECTED,
        reason: int | None = None,
        hint: str = "",
        backend: str = "",
        topic: str = "",
    ) -> None:
        super().__init__(
            message, outcome=outcome, reason=reason, hint=hint, backend=backend, topic=topic
        )


class PayloadTooLarge(PublishFailed):
    """The payload exceeds the limit of the broker, or ours for it. Nothing was sent.

    Attributes:
        size: Size of the encoded payload in bytes.
        limit: The most that is accepted, in bytes.
    """

    code = "payload_too_large"
    retryable = False

    def __init__(
        self, *, size: int, limit: int, hint: str = "", backend: str = "", topic: str = ""
    ) -> None:
        super().__init__(
            f"payload of {size} bytes for {topic!r}, the limit is {limit}",
            outcome=Outcome.NOT_SENT,
            hint=hint or "send less, or raise the limit if the broker allows more",
            backend=backend,
            topic=topic,
        )
        self.size = size
        self.limit = limit


class RateLimited(PublishFailed):
    """The broker's rate limit would be exceeded. Nothing was sent.

    Attributes:
        retry_after: Seconds until the same publish would be accepted.
    """

    code = "rate_limited"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        retry_after: float,
        hint: str = "",
        backend: str = "",
        topic: str = "",
    ) -> None:
        super().__init__(message, outcome=Outcome.NOT_SENT, hint=hint, backend=backend, topic=topic)
        self.retry_after = retry_after


class PublishTimeout(PublishFailed, TimeoutError):
    """No confirmation arrived within the deadline; see `outcome`."""

    code = "publish_timeout"
    retryable = True


class Overflow(PublishFailed):
    """The offline buffer is full; this message was not kept."""

    code = "overflow"
    retryable = True

    def __init__(self, message: str, *, hint: str = "", backend: str = "", topic: str = "") -> None:
        super().__init__(message, outcome=Outcome.NOT_SENT, hint=hint, backend=backend, topic=topic)


class SubscribeFailed(PubSubError):
    """The broker did not accept a subscription.

    Attributes:
        reason: The broker's own code, or None.
    """

    code = "subscribe_failed"

    def __init__(
        self,
        message: str,
        *,
        reason: int | None = None,
        hint: str = "",
        backend: str = "",
        topic: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, hint=hint, backend=backend, topic=topic, retryable=retryable)
        self.reason = reason


class SubscribeNotAuthorized(SubscribeFailed, NotAuthorized):
    """The broker refused this subscription for lack of rights."""

    code = "not_authorized"
    retryable = False


class LimitReached(SubscribeFailed):
    """The broker, or our limit for it, allows no further subscription."""

    code = "limit_reached"


class SubscriptionOverflow(PubSubError):
    """A subscription with ``overflow="error"`` fell behind and was ended.

    Attributes:
        buffered: Messages that were waiting when the buffer was full.
    """

    code = "subscription_overflow"
    retryable = True

    def __init__(self, message: str, *, buffered: int, hint: str = "", topic: str = "") -> None:
        super().__init__(message, hint=hint, topic=topic)
        self.buffered = buffered


class NotSupported(PubSubError):
    """The backend cannot do this.

    Attributes:
        capability: The missing capability, a value of `pubsub_core.Cap`.
        why: The reason, in the broker's terms.
        alternatives: Names of installed backends that can.
    """

    code = "not_supported"
    retryable = False

    def __init__(
        self,
        capability: str,
        *,
        why: str,
        backend: str = "",
        hint: str = "",
        topic: str = "",
        alternatives: Iterable[str] = (),
    ) -> None:
        self.capability = str(capability)
        self.why = why
        self.alternatives = tuple(alternatives)
        if not hint:
            able = ", ".join(self.alternatives)
            hint = (
                f"installed backends that can: {able}"
                if able
                else "no installed backend can; `pubsub caps` lists who can do what"
            )
        super().__init__(
            f"{backend or 'this backend'} has no {self.capability}: {why}",
            hint=hint,
            backend=backend,
            topic=topic,
        )


# --- payloads and handlers -------------------------------------------------------------


class EncodeFailed(PubSubError):
    """A value could not be turned into bytes. Nothing was sent."""

    code = "encode"
    retryable = False


class DecodeFailed(PubSubError):
    """Received bytes could not be turned into the type asked for.

    Attributes:
        raw: The bytes as they arrived. Not part of ``str()``.
        content_type: As declared by the publisher, or None.
    """

    code = "decode"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        raw: bytes,
        content_type: str | None = None,
        hint: str = "",
        topic: str = "",
    ) -> None:
        super().__init__(message, hint=hint, topic=topic)
        self.raw = raw
        self.content_type = content_type


class HandlerFailed(PubSubError):
    """A handler raised; ``__cause__`` is its exception.

    Attributes:
        filter: Filter of the subscription whose handler raised.
        attempt: Which attempt this was, from 1.
    """

    code = "handler"

    def __init__(self, message: str, *, filter: str, topic: str = "", attempt: int = 1) -> None:
        super().__init__(message, topic=topic)
        self.filter = filter
        self.attempt = attempt
