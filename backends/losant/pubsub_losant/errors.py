"""Errors of the native client, and those that the backend adds to the core's.

    LosantError               base; a `PubSubError` like every error of this library
    ├─ LosantConnectError     no connection, or no session; also a `ConnectionError`
    ├─ LosantAuthError        the platform refused device id, key or secret
    ├─ LosantTLSError         the certificate or TLS itself; also an `ssl.SSLError`
    └─ LosantProtocolError    the peer does not speak MQTT 3.1.1

The backend raises the errors of the core, and one of its own:

    ServerRefused
    └─ LosantThrottled        the device is banned for a while

Errors of the operating system at the first dial (`ConnectionRefusedError`, `socket.gaierror`,
`TimeoutError`) are raised as they are, as ``losant-mqtt`` does. No text holds a key, a secret
or a payload.
"""

from __future__ import annotations

import ssl

from pubsub_core.errors import PubSubError, ServerRefused

__all__ = [
    "LosantAuthError",
    "LosantConnectError",
    "LosantError",
    "LosantProtocolError",
    "LosantTLSError",
    "LosantThrottled",
]


class LosantError(PubSubError):
    """Base of this client's own errors."""

    code = "losant"

    def __init__(self, message: str, *, hint: str = "", retryable: bool | None = None) -> None:
        super().__init__(message, hint=hint, backend="losant", retryable=retryable)


class LosantConnectError(LosantError, ConnectionError):
    """There is no session.

    Attributes:
        return_code: That of the CONNACK which refused, or 0.
    """

    code = "losant_connect"

    def __init__(
        self,
        message: str,
        *,
        return_code: int = 0,
        hint: str = "",
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, hint=hint, retryable=retryable)
        self.return_code = return_code


class LosantAuthError(LosantError):
    """Device id, access key or access secret were refused; trying again does not help.

    Its text is that of ``losant-mqtt``, for programs that compare it.

    Attributes:
        return_code: That of the CONNACK: 2, 4 or 5.
    """

    code = "losant_auth"
    retryable = False

    def __init__(self, return_code: int) -> None:
        super().__init__(f"Invalid Losant credentials - error code {return_code}", retryable=False)
        self.return_code = return_code


class LosantTLSError(LosantError, ssl.SSLError):
    """The certificate was refused, or TLS failed; trying again does not help."""

    code = "losant_tls"
    retryable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, retryable=False)

    def __str__(self) -> str:
        # ssl.SSLError would show its arguments.
        return PubSubError.__str__(self)


class LosantProtocolError(LosantError):
    """The peer sent a packet that MQTT 3.1.1 does not allow."""

    code = "losant_protocol"
    retryable = True


class LosantThrottled(ServerRefused):
    """The platform lets the device in again after a while: it is banned, or too much connects.

    The backend raises it; `Device` only waits longer before its next attempt.

    Attributes:
        retry_after: Seconds after which it may be accepted, as far as that is known.
    """

    code = "losant_throttled"
    retryable = True

    def __init__(
        self, message: str, *, retry_after: float, reason: int | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, reason=reason, hint=hint, backend="losant", retryable=True)
        self.retry_after = retry_after
