"""One subscription of a bus, as a program holds it: an ``async for`` or a handler at work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypedDict, TypeVar

from .config.bus_options import OverflowPolicy
from .config.options import unknown_option
from .errors import BadType
from .interfaces import HistoryQuery
from .message import Message

__all__ = [
    "DecodePolicy",
    "Handler",
    "HandlerOptions",
    "SubscribeOptions",
    "Subscription",
    "SubscriptionStats",
    "check_names",
    "check_number",
]

T = TypeVar("T")

Handler: TypeAlias = Callable[[Any], Any]
"""Called with a `Message` (or a `Gap`, for ``gaps=True``). Plain functions run in a thread."""

DecodePolicy: TypeAlias = Literal["raise", "skip", "dead_letter"]


class HandlerOptions(TypedDict, total=False):
    """Options of a subscription whose handler is given otherwise, as by `App.on`.

    Attributes:
        group: Share group: each message goes to one of its members.
        qos: Highest quality of service to receive with; the bus's default otherwise.
        buffer: Most messages that wait; the bus's default otherwise.
        buffer_bytes: Most payload bytes that wait; the bus's default otherwise.
        overflow: ``drop_oldest``, ``drop_newest``, ``latest`` (only the newest of each topic
            waits), ``error`` (the subscription ends) or ``block`` (the broker waits,
            capability ``flow_control``); the bus's default otherwise.
        ack: ``auto``: a message counts as handled when the handler returns, or when the next
            one is asked for. ``manual`` leaves acknowledging to `Message.ack`.
        replay: Begin with so many stored messages (capability ``replay``).
        gaps: Each hole appears in the stream as a `Gap`.
        codec: Name of a codec for this subscription.
        on_decode_error: ``raise`` (from the iterator; handlers log), ``skip`` or
            ``dead_letter``.
        dead_letter: Topic for messages that could not be decoded or whose handler raised.
    """

    group: str | None
    qos: int | None
    buffer: int | None
    buffer_bytes: int | None
    overflow: OverflowPolicy | None
    ack: Literal["auto", "manual"]
    replay: int | HistoryQuery | None
    gaps: bool
    codec: str | None
    on_decode_error: DecodePolicy
    dead_letter: str | None


class SubscribeOptions(HandlerOptions, total=False):
    """Options of `Bus.subscribe`: those of `HandlerOptions`, and the handler.

    Attributes:
        handler: Called with each message instead of iterating: an async function, or a plain
            one, which runs in a thread. An error that it raises is logged and counted.
    """

    handler: Handler | None


def check_names(options: Mapping[str, Any], known: type[HandlerOptions], call: str) -> None:
    """Refuse a name that is no option of *call*, as a type checker would.

    Raises:
        BadOption: There is one.
    """
    for name in options:
        if name not in known.__annotations__:
            raise unknown_option(name, known.__annotations__, place=f"{call}({name}=)")


def check_number(name: str, value: object) -> None:
    """Refuse what a type checker would: neither a number nor None.

    Raises:
        BadType: It is something else.
    """
    if value is not None and not isinstance(value, (int, float)):
        raise BadType(f"{name}={value!r:.40}", hint="pass a number, or None", option=name)


@dataclass(frozen=True, slots=True)
class SubscriptionStats:
    """Counters of one subscription.

    Attributes:
        received: Messages that arrived for it.
        delivered: Messages its consumer got.
        dropped: Messages its overflow policy dropped.
        dropped_bytes: Payload bytes of these.
        failed: Messages whose decoding or handler raised.
        buffered: Messages waiting now.
        buffered_bytes: Payload bytes waiting now.
    """

    received: int = 0
    delivered: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    failed: int = 0
    buffered: int = 0
    buffered_bytes: int = 0

    @property
    def overflowed(self) -> int:
        """The same as *dropped*, by the name that `BusStats` has for it."""
        return self.dropped


class _Subscriber(Protocol):
    """The inner half, which the bus holds."""

    @property
    def filter(self) -> str: ...
    @property
    def ack(self) -> Literal["auto", "manual"]: ...
    @property
    def active(self) -> bool: ...
    @property
    def stats(self) -> SubscriptionStats: ...
    async def enter(self) -> None: ...
    async def close(self, *, failed: bool = False) -> None: ...
    async def drain(self, timeout: float | None) -> bool: ...
    def next(self) -> Coroutine[Any, Any, Message[Any]]: ...
    async def get(self, timeout: float | None) -> Message[Any]: ...


class Subscription(Generic[T]):
    """A subscription of one bus: an async iterator of messages, or a handler at work.

    Made by `Bus.subscribe`. Entering it with ``async with``, or awaiting it, returns when the
    broker has confirmed it; leaving the block, or `close`, ends it. Iterating yields each
    `Message`, and each `Gap` with ``gaps=True``. A wait that is cancelled loses nothing.
    """

    # The bus knows the subscriber only, and this object weakly where it is iterated: so it
    # goes when its program drops it, and that can be noticed.
    __slots__ = ("__weakref__", "_subscriber")

    def __init__(self, subscriber: _Subscriber) -> None:
        self._subscriber = subscriber

    @property
    def filter(self) -> str:
        """The filter as it was given, captures included."""
        return self._subscriber.filter

    @property
    def ack(self) -> Literal["auto", "manual"]:
        """Who acknowledges: the subscription after handling, or the consumer itself."""
        return self._subscriber.ack

    @property
    def active(self) -> bool:
        """Whether it is in place and can still receive."""
        return self._subscriber.active

    @property
    def stats(self) -> SubscriptionStats:
        """The counters, as they are now."""
        return self._subscriber.stats

    def __repr__(self) -> str:
        return f"<Subscription {self.filter!r} buffered={self.stats.buffered}>"

    def __await__(self) -> Generator[Any, None, Subscription[T]]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Subscription[T]:
        await self._subscriber.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._subscriber.close(failed=exc_type is not None)

    async def close(self) -> None:
        """End the subscription; nothing is delivered after this returns. Idempotent.

        The message that was iterated to last counts as handled.

        Safe from within its own handler, which is then left to finish.
        """
        await self._subscriber.close()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more messages; return when the handler is done with those that wait.

        An iterator ends after those that wait; without a handler this returns at once.
        `close` afterwards takes the subscription away from the broker.

        Returns:
            False when the handler was not done within *timeout* seconds; it goes on.
        """
        return await self._subscriber.drain(timeout)

    def __aiter__(self) -> AsyncIterator[Message[T]]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Message[T]]:
        # The subscriber's own coroutine: one more around it would cost each message.
        # With gaps=True it yields Gap as well; typing every loop for that would burden
        # the many who do not ask for gaps.
        return self._subscriber.next()

    async def get(self, timeout: float | None = None) -> Message[T]:
        """Return the next message, waiting at most *timeout* seconds.

        Raises:
            OperationTimeout: Nothing came in time; nothing is lost.
            BusClosed: The subscription has ended.
        """
        return await self._subscriber.get(timeout)
