"""MQTT's answers as errors of the core: one table for each packet that can refuse.

Sources: MQTT 3.1.1 sections 3.2.2.3 (CONNACK return codes) and 3.9.3 (SUBACK), MQTT 5.0
section 2.4 (reason codes).
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import TypeVar

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    ConnectTimeout,
    LimitReached,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
    PubSubError,
    ServerRefused,
    SubscribeFailed,
    SubscribeNotAuthorized,
    TLSProblem,
)

__all__ = [
    "REASONS",
    "CredentialsRefused",
    "ProtocolError",
    "as_ours",
    "connack_error",
    "dial_error",
    "disconnect_error",
    "early_end_hint",
    "printable",
    "publish_error",
    "subscribe_error",
]

_Error = TypeVar("_Error", bound=PubSubError)

_MAX_LOGGED = 200

REASONS = {
    0x00: "success",
    0x04: "disconnect with will message",
    0x10: "no matching subscribers",
    0x11: "no subscription existed",
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8C: "bad authentication method",
    0x8D: "keep alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x91: "packet identifier in use",
    0x92: "packet identifier not found",
    0x93: "receive maximum exceeded",
    0x94: "topic alias invalid",
    0x95: "packet too large",
    0x96: "message rate too high",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "quality of service not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA0: "maximum connect time",
    0xA1: "subscription identifiers not supported",
    0xA2: "wildcard subscriptions not supported",
}
"""MQTT 5.0 reason codes and their names (section 2.4)."""

_CONNACK_311 = {
    1: "unacceptable protocol version",
    2: "client identifier rejected",
    3: "server unavailable",
    4: "bad user name or password",
    5: "not authorized",
}

# Another attempt can succeed without anybody changing anything.
_TRANSIENT = frozenset({0x88, 0x89, 0x8B, 0x8D, 0x93, 0x96, 0x97, 0x98, 0x9F, 0xA0})


class ProtocolError(ConnectError):
    """The peer sent something that MQTT does not allow; the session was ended.

    Attributes:
        reason: MQTT 5.0 reason code that names the offence.
    """

    code = "mqtt_protocol"
    retryable = True

    def __init__(self, message: str, *, reason: int = 0x82) -> None:
        super().__init__(message, hint="check that the address leads to an MQTT broker")
        self.reason = reason


class CredentialsRefused(AuthenticationFailed):
    """The broker's CONNACK refused the credentials.

    Attributes:
        reason: Return code (3.1.1) or reason code (5.0).
    """

    def __init__(self, message: str, *, reason: int, hint: str = "", backend: str = "") -> None:
        super().__init__(message, hint=hint, backend=backend)
        self.reason = reason


def as_ours(error: _Error, backend: str, topic: str | None = None) -> _Error:
    """Name an error of a lower layer, which knows neither the backend nor its topics.

    Args:
        error: Raised by a decoder, a socket or a connection.
        backend: Whose connection it is.
        topic: The topic as the caller knows it; None leaves what the error says.
    """
    error.backend = backend
    if topic is not None:
        error.topic = topic
    return error


def printable(text: str) -> str:
    """Return text from a peer, fit for a log line: escaped, at most 200 characters."""
    shown = text[: _MAX_LOGGED + 1].encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= _MAX_LOGGED else shown[: _MAX_LOGGED - 1] + "…"


def _name(code: int) -> str:
    return REASONS.get(code, "unknown reason")


def _with_text(text: str, said: str) -> str:
    return f"{text}: {printable(said)}" if said else text


def connack_error(
    code: int, *, version: int, backend: str, said: str = "", client_id: str = ""
) -> ConnectError:
    """Return the error for a CONNACK that refuses.

    Args:
        code: Return code (3.1.1) or reason code (5.0); never 0.
        version: Protocol level of our CONNECT, 4 or 5.
        backend: Whose connection it is.
        said: The broker's reason string.
        client_id: The identifier that was refused, for the text.
    """
    # A broker without MQTT 5 answers a level 5 CONNECT with the return codes of 3.1.1.
    if version < 5 or code < 0x80:
        name = _CONNACK_311.get(code, "unknown return code")
        text = f"the broker refused the connection with return code {code} ({name})"
        code311 = code
    else:
        text = f"the broker refused the connection with reason 0x{code:02X} ({_name(code)})"
        code311 = {0x84: 1, 0x85: 2, 0x86: 4, 0x87: 5, 0x8A: 5, 0x8C: 5}.get(code, 0)
    text = _with_text(text, said)
    if code311 in (4, 5):
        return CredentialsRefused(
            text,
            reason=code,
            hint="check username and password, and what they may do",
            backend=backend,
        )
    if code311 == 1:
        hint = "set protocol to what the broker speaks: '3.1.1' or '5'"
    elif code311 == 2:
        hint = f"choose another client_id than {printable(client_id)!r}"
    else:
        later = code in _TRANSIENT or code == 3
        hint = "try again later" if later else "the broker's log says more"
    return ServerRefused(
        text,
        reason=code,
        hint=hint,
        backend=backend,
        retryable=code == 3 if version < 5 or code < 0x80 else code in _TRANSIENT,
    )


def disconnect_error(code: int, *, backend: str, said: str = "") -> ConnectError:
    """Return the error for a DISCONNECT that the broker sent (MQTT 5.0 section 3.14)."""
    text = _with_text(f"the broker ended the session: reason 0x{code:02X} ({_name(code)})", said)
    if code == 0x87:
        return AuthenticationFailed(text, hint="check the rights of this user", backend=backend)
    permanent = {0x8C, 0x9C, 0x9D, 0x8A}
    return ServerRefused(
        text,
        reason=code,
        hint="the broker's log says more",
        backend=backend,
        retryable=code not in permanent,
    )


def publish_error(
    code: int, *, topic: str, size: int, backend: str, said: str = ""
) -> PublishFailed:
    """Return the error for a PUBACK or PUBREC with a failure code (MQTT 5.0 only)."""
    text = _with_text(
        f"the broker refused the message for {topic!r}: reason 0x{code:02X} ({_name(code)})", said
    )
    if code == 0x87:
        return PublishNotAuthorized(
            text, reason=code, hint="this user may not publish there", backend=backend, topic=topic
        )
    if code == 0x95:
        too_large = PayloadTooLarge(size=size, limit=size - 1, backend=backend, topic=topic)
        too_large.outcome = Outcome.REJECTED
        too_large.reason = code
        return too_large
    retryable = {0x90: False, 0x99: False, 0x91: True, 0x96: True, 0x97: True}.get(code)
    return PublishFailed(
        text,
        outcome=Outcome.REJECTED,
        reason=code,
        hint="publish more slowly" if code in (0x96, 0x97) else "the broker's log says more",
        backend=backend,
        topic=topic,
        retryable=retryable,
    )


def subscribe_error(code: int, *, filter: str, backend: str, said: str = "") -> SubscribeFailed:
    """Return the error for a filter that a SUBACK refused."""
    text = _with_text(
        f"the broker refused the subscription to {filter!r}: reason 0x{code:02X} ({_name(code)})",
        said,
    )
    if code == 0x87:
        return SubscribeNotAuthorized(
            text, reason=code, hint="this user may not read there", backend=backend, topic=filter
        )
    if code == 0x97:
        return LimitReached(
            text, reason=code, hint="subscribe to less", backend=backend, topic=filter
        )
    hints = {
        0x80: "3.1.1 brokers do not say why; most often this user may not read there",
        0x9E: "the broker has no share groups; drop group=",
        0xA2: "the broker takes exact topics only",
    }
    return SubscribeFailed(
        text,
        reason=code,
        hint=hints.get(code, "the broker's log says more"),
        backend=backend,
        topic=filter,
        retryable={0x8F: False, 0x9E: False, 0xA2: False, 0xA1: False}.get(code),
    )


def early_end_hint(secure: bool) -> str:
    """Return what to do when a peer hangs up before it has said anything."""
    if secure:
        return "does that port speak TLS? one without it wants mqtt:// or ws://"
    return (
        "does that port want TLS (mqtts://, wss://)? or it speaks another protocol, or refuses "
        "this client"
    )


def dial_error(
    error: BaseException, where: str, *, backend: str, secure: bool | None = None
) -> ConnectError:
    """Return the error for a failure before or below MQTT: DNS, TCP, TLS, a lost link.

    Args:
        error: What was raised.
        where: The address, without credentials.
        backend: Whose connection it is. Sockets, TLS and WebSocket do not know; an error of
            theirs is named here.
        secure: Where the peer was reached and has said nothing yet, whether TLS was used.

    Returns:
        *error* itself where it says already what happened, else a new one caused by it.
    """
    if isinstance(error, ConnectError):
        return as_ours(error, backend)
    found = as_ours(_dial_error(error, where, secure), backend)
    found.__cause__ = error
    return found


def _dial_error(error: BaseException, where: str, secure: bool | None) -> ConnectError:
    hung_up = isinstance(error, (ConnectionResetError, ConnectionAbortedError, BrokenPipeError))
    if isinstance(error, ssl.SSLCertVerificationError):
        return TLSProblem(
            f"the certificate of {where} was refused: {printable(error.verify_message)}",
            hint="check the host name, or name the right CA with ca_file",
        )
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        hint = "" if secure is None else early_end_hint(secure)
        return ConnectError(f"{where} closed the TLS connection", hint=hint)
    if isinstance(error, ssl.SSLError):
        # An alert from the peer during the handshake comes as this, too: a missing client
        # certificate, an old protocol version, or a port that does not speak TLS.
        return TLSProblem(
            f"TLS with {where} failed: {printable(str(error.reason or error))}",
            hint="check that the port speaks TLS, its version, and the client certificate",
        )
    if isinstance(error, TimeoutError):
        return ConnectTimeout(f"{where} did not answer in time")
    if isinstance(error, socket.gaierror):
        return ConnectError(
            f"the name in {where} cannot be resolved: {error.strerror}",
            hint="check the host name",
        )
    if isinstance(error, OSError):
        # asyncio writes the address into the text; the code alone is enough and sure to hold
        # nothing else.
        why = errno.errorcode.get(error.errno or 0, "") or type(error).__name__
        return ConnectError(
            f"no connection to {where}: {printable(error.strerror or str(error))} ({why})",
            hint="check that the broker runs and listens there"
            if secure is None or not hung_up
            else early_end_hint(secure),
        )
    return ConnectError(f"no connection to {where}: {type(error).__name__}")
