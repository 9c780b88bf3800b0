"""Errors of the native client: one class for each kind of refusal."""

from __future__ import annotations

from pubsub_core.errors import PubSubError

__all__ = [
    "BadRequestError",
    "EmitterError",
    "ForbiddenError",
    "NotFoundError",
    "UnauthorizedError",
    "refusal",
]


class EmitterError(PubSubError):
    """The broker refused something, or did not answer. No key is ever in the text.

    Attributes:
        status: The broker's, as in HTTP; 0 when there was no answer.
    """

    code = "emitter"

    def __init__(
        self, message: str, *, status: int = 0, hint: str = "", retryable: bool | None = None
    ) -> None:
        super().__init__(message, hint=hint, backend="emitter", retryable=retryable)
        self.status = status


class BadRequestError(EmitterError):
    """Status 400: a channel, an option or a request is not well formed."""

    code = "emitter_bad_request"
    retryable = False


class UnauthorizedError(EmitterError):
    """Status 401: the key is expired, banned, or does not allow that on that channel."""

    code = "emitter_unauthorized"
    retryable = False


class ForbiddenError(EmitterError):
    """Status 403: a message to a channel with a wildcard."""

    code = "emitter_forbidden"
    retryable = False


class NotFoundError(EmitterError):
    """Status 404: the broker does not know that request, or that contract."""

    code = "emitter_not_found"
    retryable = False


_KINDS: dict[int, tuple[type[EmitterError], str]] = {
    400: (BadRequestError, "end the channel with '/', and use letters, digits and $ - . : _"),
    401: (UnauthorizedError, "check the key's channel, permissions and expiry"),
    403: (ForbiddenError, "publish to a channel without wildcards"),
    404: (NotFoundError, ""),
}


def refusal(status: int, message: str, what: str) -> EmitterError:
    """Return the error for a broker's answer to *what*."""
    kind, hint = _KINDS.get(status, (EmitterError, ""))
    return kind(f"{what} was refused: {message} ({status})", status=status, hint=hint)
