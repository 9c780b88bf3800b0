"""Code that runs around every publish and every delivery: one onion for both directions.

A middleware is an async callable ``(context, call_next)``. It may change the context, call
*call_next* once, several times or not at all, and return its result or another. On
publishing the innermost call returns the `Receipt`; on receiving it runs the handler, or,
for a subscription that is iterated, lets the message into the iterator. A middleware that
does not call *call_next* on receiving drops the message.

Order: the first middleware is the outermost, in both directions.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias, cast
from weakref import WeakKeyDictionary

import msgspec

from .capabilities import Cap
from .clock import Clock, SystemClock
from .errors import (
    BadOption,
    BadType,
    HandlerFailed,
    OperationTimeout,
    Outcome,
    PublishTimeout,
    PubSubError,
    RateLimited,
)
from .message import NO_HEADERS, Headers, Message, Verdict
from .topics import validate_topic

__all__ = [
    "CallNext",
    "Context",
    "Dedupe",
    "Direction",
    "Middleware",
    "Retry",
    "Timeout",
    "builtin_middleware",
    "compose",
    "dead_letter_headers",
]

_log = logging.getLogger("pubsub_core")


class Direction(StrEnum):
    """Which way a message goes."""

    PUBLISH = "publish"
    RECEIVE = "receive"


@dataclass(slots=True, eq=False)
class Context:
    """One message on its way; a middleware may assign to any attribute.

    Attributes:
        topic: Topic published to, or the message's.
        payload: On publishing the value before it is encoded; on receiving the decoded one.
        headers: Headers to be sent, or those received.
        message: The message received; None on publishing.
        options: Other arguments of the publish, by name; empty on receiving.
        bus: The `Bus` it goes through; None only in tests of a middleware alone.
        subscription: The subscription it was received by; None on publishing.
        attempt: From 1; `Retry` counts it up.
        given_headers: Headers as the caller of a publish gave them; names may repeat.
    """

    direction: Direction
    topic: str
    payload: Any = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    message: Message[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    bus: Any = None
    subscription: Any = None
    attempt: int = 1
    given_headers: Headers = NO_HEADERS

    def headers_to_send(self) -> Headers:
        """Return `headers`; a name that no middleware assigned may repeat as it was given."""
        return _merged(self.given_headers, self.headers)

    def received(self) -> Message[Any]:
        """Return the message with the topic, payload and headers that middleware assigned.

        Its `Message.raw` stays as it arrived.

        Raises:
            ValueError: The context is of a publish.
        """
        message = self.message
        if message is None:
            raise BadOption(f"a publish to {self.topic!r} has no received message")
        headers = _merged(message.headers, self.headers)
        if headers is not message.headers:
            frame = msgspec.structs.replace(message.frame, headers=headers)
            message = msgspec.structs.replace(message, frame=frame)
        if self.payload is not message.payload or self.topic != message.topic:
            message = msgspec.structs.replace(message, topic=self.topic, payload=self.payload)
        return message


def _merged(given: Headers, wanted: Mapping[str, str]) -> Headers:
    """Return *wanted*, with every value of the names that are as they were in *given*."""
    if wanted == dict(given):
        return given
    pairs: list[tuple[str, str]] = []
    replaced: set[str] = set()
    for name, value in given.pairs:
        if name in replaced or name not in wanted:
            continue
        if wanted[name] == given[name]:
            pairs.append((name, value))
        else:
            replaced.add(name)
            pairs.append((name, wanted[name]))
    pairs += [(name, value) for name, value in wanted.items() if name not in given]
    return Headers(pairs)


CallNext: TypeAlias = Callable[[Context], Awaitable[Any]]
Middleware: TypeAlias = Callable[[Context, CallNext], Awaitable[Any]]


def compose(middlewares: Iterable[Middleware], terminal: CallNext) -> CallNext:
    """Return one callable that runs *middlewares*, outermost first, around *terminal*."""
    call = terminal
    for middleware in reversed(tuple(middlewares)):
        call = _around(middleware, call)
    return call


def _around(middleware: Middleware, call_next: CallNext) -> CallNext:
    def call(context: Context) -> Awaitable[Any]:
        return middleware(context, call_next)

    return call


def builtin_middleware() -> Mapping[str, Callable[..., Middleware]]:
    """Return the catalogue: factories by the names that ``pubsub.toml`` uses."""
    return {"dedupe": Dedupe, "retry": Retry, "timeout": Timeout}


def dead_letter_headers(
    topic: str, error: BaseException, *, attempts: int = 1, headers: Mapping[str, str] = NO_HEADERS
) -> Headers:
    """Return *headers* and those that describe a message that no handler could take.

    The error is named by its class alone: its text may quote the payload.
    """
    told = {
        "x-dead-letter-topic": topic,
        "x-dead-letter-error": type(error).__qualname__,
        "x-dead-letter-attempts": str(attempts),
    }
    kept = [(name, value) for name, value in Headers(headers).pairs if name not in told]
    return Headers([*kept, *told.items()])


class Retry:
    """Retry failures, after a growing and random delay.

    Receiving: the handler runs again, in its place in the order, so later messages of the
    subscription wait. After the last attempt the payload as it arrived is published to
    *dead_letter*, which counts as handled; without one the error goes on to the bus.

    Publishing: only errors that say that the same call can succeed later and that the
    message did not reach the broker; so a retry here never makes a duplicate.

    Errors whose `retryable` is False, such as `BusClosed`, are never tried again.

    Args:
        attempts: Calls in all, the first included.
        backoff: Bound of the first delay, in seconds.
        factor: Growth of the bound, each time.
        jitter: Wait a random time below the bound (full jitter) and not exactly that long.
        maximum: Limit of the bound, in seconds. A broker that says when to come back
            (`RateLimited`) is waited for longer.
        retry_on: Error classes of the handler that are tried again.
        dead_letter: Topic for messages that were not handled, or None.
    """

    def __init__(
        self,
        attempts: int = 3,
        *,
        backoff: float = 0.2,
        factor: float = 2.0,
        jitter: bool = True,
        maximum: float = 30.0,
        retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
        dead_letter: str | None = None,
    ) -> None:
        if attempts < 1:
            raise BadOption(
                f"attempts={attempts}",
                hint="the first call is one, so pass 1 or more",
                option="attempts",
            )
        if backoff < 0 or maximum < 0 or factor < 1:
            raise BadOption("backoff and maximum are seconds from 0, factor is 1 or more")
        classes = retry_on if isinstance(retry_on, tuple) else (retry_on,)
        for each in cast("tuple[type[BaseException], ...]", classes):
            if not issubclass(each, Exception):
                # Retrying CancelledError would swallow cancellation.
                raise BadType(
                    f"retry_on has {each.__qualname__}", hint="pass subclasses of Exception"
                )
        if dead_letter is not None:
            validate_topic(dead_letter)
        self.attempts = attempts
        self.backoff = backoff
        self.factor = factor
        self.jitter = jitter
        self.maximum = maximum
        self.retry_on = classes
        self.dead_letter = dead_letter

    async def __call__(self, context: Context, call_next: CallNext) -> Any:  # noqa: D102 - a Middleware
        again = self._again_out if context.direction is Direction.PUBLISH else self._again_in
        kept = _Kept(context)
        attempt = 1
        while True:
            try:
                return await call_next(context)
            except Exception as exc:
                if attempt >= self.attempts or not again(exc):
                    if await self._bury(context, kept, exc, attempt):
                        return None
                    raise
                error = exc
            delay = self._delay(attempt, error)
            _log.info(
                "%s of %r failed, attempt %d; next in %.3f s",
                context.direction.value,
                context.topic[:200],
                attempt,
                delay,
            )
            del error
            await _clock(context).sleep(delay)
            attempt += 1
            kept.restore(context)
            context.attempt = attempt

    def _delay(self, attempt: int, error: Exception) -> float:
        try:
            bound = min(self.maximum, self.backoff * self.factor ** (attempt - 1))
        except OverflowError:
            bound = self.maximum
        delay = random.uniform(0, bound) if self.jitter else bound  # noqa: S311 - no secret
        return max(delay, error.retry_after) if isinstance(error, RateLimited) else delay

    def _again_in(self, error: Exception) -> bool:
        raised = _raised(error)
        if isinstance(raised, PubSubError) and raised.retryable is False:
            return False
        return isinstance(raised, self.retry_on)

    def _again_out(self, error: Exception) -> bool:
        return (
            isinstance(error, PubSubError)
            and error.retryable is True
            and getattr(error, "outcome", Outcome.NOT_SENT) is Outcome.NOT_SENT
        )

    async def _bury(self, context: Context, kept: _Kept, error: Exception, attempts: int) -> bool:
        """Publish the message to the dead-letter topic; return whether that was done."""
        message, bus = kept.message, context.bus
        # A dead letter that fails in its own handler would come back without end.
        if (
            self.dead_letter is None
            or message is None
            or bus is None
            or message.topic == self.dead_letter
        ):
            return False
        extra: dict[str, Any] = {}
        if bus.supports(Cap.HEADERS):
            extra["headers"] = dead_letter_headers(
                message.topic, _raised(error), attempts=attempts, headers=message.headers
            )
        if message.content_type is not None and bus.supports(Cap.CONTENT_TYPE):
            extra["content_type"] = message.content_type
        try:
            await bus.publish(self.dead_letter, message.raw, **extra)
        except Exception as exc:  # noqa: BLE001 - the handler's error is the one to report
            error.add_note(f"and the dead letter was not published: {exc}")
            return False
        _log.warning(
            "%r was not handled after %d attempts (%s); published to %r",
            message.topic[:200],
            attempts,
            type(_raised(error)).__qualname__,
            self.dead_letter,
        )
        return True


class _Kept:
    """A context as it was, so that inner middleware does nothing twice."""

    __slots__ = ("headers", "message", "options", "payload", "topic")

    def __init__(self, context: Context) -> None:
        self.topic = context.topic
        self.payload = context.payload
        self.message = context.message
        self.headers = dict(context.headers)
        self.options = dict(context.options)

    def restore(self, context: Context) -> None:
        context.topic = self.topic
        context.payload = self.payload
        context.message = self.message
        context.headers = dict(self.headers)
        context.options = dict(self.options)


class Dedupe:
    """Drop a message that a subscription has received before. Publishing is untouched.

    Two messages are the same when topic and key are: the broker's message id, or what
    *key* says. Never the content, since two equal readings are two readings. A message
    without a key passes. A message is remembered once its handler succeeded (with
    ``ack="manual"`` once it was acknowledged), so a redelivery after a failure passes.

    Args:
        window: Seconds for which a message is remembered.
        key: Name of a header, or a function of the message that returns a key or None.
        maximum: Most messages remembered per subscription; the oldest are forgotten.
    """

    def __init__(
        self,
        window: float = 300.0,
        *,
        key: str | Callable[[Message[Any]], str | None] | None = None,
        maximum: int = 10_000,
    ) -> None:
        if window <= 0 or maximum < 1:
            raise BadOption("window is seconds above 0, maximum is 1 or more")
        self.window = window
        self.maximum = maximum
        self.dropped = 0
        self._key = _key_function(key)
        # Per subscription: one message that matches two of them reaches both.
        self._seen: WeakKeyDictionary[Any, OrderedDict[tuple[str, str], float]] = (
            WeakKeyDictionary()
        )
        self._default: OrderedDict[tuple[str, str], float] = OrderedDict()

    async def __call__(self, context: Context, call_next: CallNext) -> Any:  # noqa: D102 - a Middleware
        message = context.message
        if context.direction is Direction.PUBLISH or message is None:
            return await call_next(context)
        key = self._key(message)
        if key is None:
            return await call_next(context)
        seen = self._of(context.subscription)
        entry = (message.topic, key)
        now = _clock(context).monotonic()
        while seen and next(iter(seen.values())) <= now - self.window:
            seen.popitem(last=False)
        manual = _manual(context.subscription)
        if entry in seen:
            self.dropped += 1
            if manual:
                await message.ack()  # nobody else will see it
            return None
        # Same package; there is no public way to hear what becomes of a message.
        settle = message._settle  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        if settle is not None:

            def settled(verdict: Verdict) -> None:
                if verdict is Verdict.NACK:
                    seen.pop(entry, None)
                elif manual:
                    self._remember(seen, entry, now)
                settle(verdict)

            context.message = msgspec.structs.replace(message, _settle=settled)
        if manual and settle is not None:
            return await call_next(context)
        self._remember(seen, entry, now)
        try:
            return await call_next(context)
        except BaseException:
            seen.pop(entry, None)
            raise

    def _of(self, subscription: Any) -> OrderedDict[tuple[str, str], float]:
        if subscription is None:
            return self._default
        found = self._seen.get(subscription)
        if found is None:
            found = self._seen[subscription] = OrderedDict()
        return found

    def _remember(
        self, seen: OrderedDict[tuple[str, str], float], entry: tuple[str, str], now: float
    ) -> None:
        seen[entry] = now
        if len(seen) > self.maximum:
            seen.popitem(last=False)


def _key_function(
    key: str | Callable[[Message[Any]], str | None] | None,
) -> Callable[[Message[Any]], str | None]:
    if key is None:
        return lambda message: message.id
    if isinstance(key, str):
        return lambda message: message.headers.get(key)
    return key


class Timeout:
    """End a handler or a publish that takes too long.

    A handler ends with `TimeoutError`, which counts as its failure. A publish ends with
    `PublishTimeout` and the outcome ``unknown``. A plain function runs in a thread, which
    cannot be stopped: it is no longer waited for.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        if seconds <= 0:
            raise BadOption(f"seconds={seconds}", hint="pass a number above 0", option="seconds")
        self.seconds = seconds

    async def __call__(self, context: Context, call_next: CallNext) -> Any:  # noqa: D102 - a Middleware
        clock = _clock(context)
        if isinstance(clock, SystemClock):
            scope = asyncio.timeout(self.seconds)
            timer = None
        else:
            # A clock of a test: only it knows when the time is over.
            scope = asyncio.timeout(None)
            timer = asyncio.ensure_future(_expire(scope, clock, self.seconds))
        try:
            async with scope:
                return await call_next(context)
        except TimeoutError as exc:
            if not scope.expired():
                raise
            if context.direction is Direction.PUBLISH:
                raise PublishTimeout(
                    f"publish to {context.topic!r} took longer than {self.seconds:g} s",
                    outcome=Outcome.UNKNOWN,
                    topic=context.topic,
                ) from exc
            raise OperationTimeout(
                f"handling {context.topic!r} took longer than {self.seconds:g} s",
                topic=context.topic,
            ) from exc
        finally:
            if timer is not None:
                timer.cancel()


async def _expire(scope: asyncio.Timeout, clock: Clock, seconds: float) -> None:
    await clock.sleep(seconds)
    scope.reschedule(asyncio.get_running_loop().time())


_SYSTEM_CLOCK: Final = SystemClock()


def _clock(context: Context) -> Clock:
    return _SYSTEM_CLOCK if context.bus is None else context.bus.clock


def _manual(subscription: Any) -> bool:
    return getattr(subscription, "ack", "auto") == "manual"


def _raised(error: BaseException) -> BaseException:
    """Return the handler's own exception."""
    if isinstance(error, HandlerFailed) and error.__cause__ is not None:
        return error.__cause__
    return error
