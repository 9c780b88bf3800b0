"""Authorization: handlers that answer the broker's questions about other clients.

A right is only ever what a handler returned in time. One that raises, that is late, or that
returns something else is answered with a refusal, counted and told; so a defect here hides
data and never shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from .interfaces import AuthorizationRequest

__all__ = ["AuthorizationHandler", "Authorizer", "AuthorizerStats"]

AuthorizationHandler: TypeAlias = Callable[[AuthorizationRequest], Any]
"""Returns the entitlements held (a set of int), `EVERYTHING`, or None for no right at all; async
or plain."""


@dataclass(slots=True)
class AuthorizerStats:
    """Counters of one authorizer.

    Attributes:
        asked: Questions that were for it.
        granted: Answered with entitlements.
        refused: Answered with a refusal, failures included.
        failed: Of these, because the handler raised, was late or returned something else.
        dropped: Never answered: too many waited, or the session ended meanwhile.
    """

    asked: int = 0
    granted: int = 0
    refused: int = 0
    failed: int = 0
    dropped: int = 0


class _Answerer(Protocol):
    """The inner half, which the bus holds."""

    @property
    def filter(self) -> str: ...
    @property
    def timeout(self) -> float: ...
    @property
    def stats(self) -> AuthorizerStats: ...
    @property
    def waiting(self) -> int: ...
    async def enter(self) -> None: ...
    async def close(self) -> None: ...


class Authorizer:
    """Decides what others may see of the topics of one filter. Made by `Bus.authorize`.

    ``async with`` it or ``await`` it: it is in place when that returns, and again in every
    later session.
    """

    def __init__(self, answerer: _Answerer) -> None:
        self._answerer = answerer

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        await self._answerer.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Authorizer {self.filter!r} waiting={self._answerer.waiting}>"

    @property
    def filter(self) -> str:
        """The filter as it was given, captures included."""
        return self._answerer.filter

    @property
    def timeout(self) -> float:
        """Seconds that the handler has for one answer."""
        return self._answerer.timeout

    @property
    def stats(self) -> AuthorizerStats:
        """The counters."""
        return self._answerer.stats

    async def close(self) -> None:
        """Answer no more; rights that were given stay. Idempotent."""
        await self._answerer.close()
