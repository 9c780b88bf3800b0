"""The way out: check and encode a message, keep the limits, send it or keep it.

Everything that can be known to be wrong is found here, before anything is sent. While there
is no session, the offline policy decides: raise, buffer within bounds, or drop and count.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from pubsub_core.capabilities import Cap, ConfirmedBy, Guarantees, Limits, Support
from pubsub_core.clock import Clock
from pubsub_core.codecs import CodecSet
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import (
    BadOption,
    BadType,
    NotConnected,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishTimeout,
    PubSubError,
    RateLimited,
)
from pubsub_core.events import Status
from pubsub_core.interfaces import Backend
from pubsub_core.message import NO_HEADERS, Headers, OutFrame, Part, Receipt
from pubsub_core.pacing import RateGuard
from pubsub_core.stats import BusStats
from pubsub_core.subscription import check_number
from pubsub_core.topics import check_limits, validate_topic

from .deadlines import Deadlines
from .outbox import Outbox, Waiting
from .session import Session

__all__ = ["Publisher", "checked_headers"]


def checked_headers(given: Mapping[str, str] | Iterable[tuple[str, str]]) -> Headers:
    """Return *given* as headers; a value never appears in an error.

    Raises:
        BadType: It is something else, or a name or a value is no text.
    """
    try:
        headers = Headers(given)
    except (TypeError, ValueError):
        raise BadType(
            "headers= takes a mapping, or pairs, of names and values", option="headers"
        ) from None
    for name, value in headers.pairs:
        for each in (name, value):
            if not isinstance(each, str):  # pyright: ignore[reportUnnecessaryIsInstance] # callers without types
                raise BadType(
                    f"header {name!r} has a {type(each).__name__}", hint="names and values are str"
                )
    return headers


class Publisher:
    """Publishes for one bus.

    Attributes:
        capabilities: Those of the current session; set by the engine.
        limits: Those of the current session; set with `set_limits`.
    """

    def __init__(
        self,
        backend: Backend,
        session: Session,
        options: BusOptions,
        codecs: CodecSet,
        clock: Clock,
        stats: BusStats,
        need: Callable[[Cap], None],
        spawn: Callable[[Coroutine[Any, Any, Any], str], asyncio.Task[Any]],
    ) -> None:
        self._backend = backend
        self._name = backend.context.info.name
        self._session = session
        self._options = options
        self._codecs = codecs
        self._clock = clock
        self._stats = stats
        self._need = need
        self._spawn = spawn
        self._outbox = Outbox(
            messages=options.offline_messages,
            bytes=options.offline_bytes,
            overflow=options.offline_overflow,
            age=options.offline_age,
            clock=clock,
        )
        self._flushes: set[asyncio.Task[Any]] = set()
        self._deadlines = Deadlines(options.timeout)
        self._rate: RateGuard | None = None
        self._qos = options.qos
        self._echo = options.echo
        self._most: int | None = None
        self._special_topics = False
        self._topic_defaults = backend.topic_defaults
        self.capabilities: Mapping[Cap, Support] = {}
        self.limits = Limits()
        self.set_limits(backend.limits)

    def set_limits(self, limits: Limits) -> None:
        """Keep to the limits of a new session."""
        plain = Limits()
        self._special_topics = (
            limits.max_levels is not None
            or bool(limits.forbidden_characters)
            or not limits.allow_empty_levels
            or limits.max_topic_bytes != plain.max_topic_bytes
        )
        if limits != self.limits:
            rate = RateGuard(limits, self._clock)
            self._rate = rate if rate.needed else None
        self.limits = limits
        self._most = limits.max_payload

    def check_filter(self, filter: str) -> None:
        """Raise InvalidFilter for a plain filter that this broker cannot carry."""
        if self._special_topics:
            check_limits(filter, self.limits, self._name, is_filter=True)

    def frame(
        self,
        topic: str,
        payload: Any,
        *,
        qos: int | None = None,
        retain: bool | None = None,
        ttl: float | None = None,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        content_type: str | None = None,
        codec: str | None = None,
        parts: Sequence[Part] | None = None,
    ) -> OutFrame:
        """Check and encode one message; see `Bus.publish`."""
        try:
            validate_topic(topic)
            if self._topic_defaults is not None:
                default_qos, default_retain = self._topic_defaults(topic)
                qos = default_qos if qos is None else qos
                retain = default_retain if retain is None else retain
            if self._special_topics:
                check_limits(topic, self.limits, self._name)
            if type(payload) is bytes and codec is None:
                if (
                    qos is None
                    and ttl is None
                    and headers is None
                    and content_type is None
                    and parts is None
                    and not retain
                    and (self._most is None or len(payload) <= self._most)
                ):
                    return OutFrame(topic=topic, payload=payload, qos=self._qos, echo=self._echo)
                data, encoded_type = payload, None
            else:
                data, encoded_type = self._codecs.encode(payload, topic=topic, codec=codec)
            encoded: tuple[Part, ...] = ()
            if parts is not None:
                self._need(Cap.ENTITLEMENTS)
                encoded = tuple(
                    Part(
                        self._codecs.encode(part.data, topic=topic, codec=codec)[0],
                        part.entitlements,
                    )
                    for part in parts
                )
                data = encoded[0].data if encoded else b""
            if self.limits.max_payload is not None:
                size = sum(len(part.data) for part in encoded) if encoded else len(data)
                if size > self.limits.max_payload:
                    raise PayloadTooLarge(
                        size=size, limit=self.limits.max_payload, backend=self._name, topic=topic
                    )
            if content_type is not None:
                if not isinstance(content_type, str):  # pyright: ignore[reportUnnecessaryIsInstance] # callers without types
                    raise BadType(
                        f"content_type={content_type!r}",
                        hint="pass a str such as 'image/png'",
                        option="content_type",
                    )
                self._need(Cap.CONTENT_TYPE)
            elif encoded_type is not None and self.capabilities[Cap.CONTENT_TYPE]:
                content_type = encoded_type
            if headers:
                self._need(Cap.HEADERS)
            if ttl is not None:
                try:
                    usable = 0 < ttl < math.inf
                except TypeError:
                    usable = False
                if not usable:
                    raise BadOption(
                        f"ttl={ttl!r}",
                        hint="pass seconds above 0, or None to keep it",
                        option="ttl",
                    )
                self._need(Cap.TTL)
            if retain:
                self._need(Cap.RETAINED)
            if qos is None:
                qos = self._options.qos
            elif qos not in (0, 1, 2):
                raise BadOption(f"qos={qos!r}", hint="pass 0, 1 or 2", option="qos")
            return OutFrame(
                topic=topic,
                payload=data,
                qos=qos,
                retain=bool(retain),
                ttl=ttl,
                headers=checked_headers(headers) if headers else NO_HEADERS,
                content_type=content_type,
                echo=self._options.echo,
                parts=encoded,
            )
        except Exception:
            self._stats.failed += 1
            raise

    def send_now(self, out: OutFrame) -> Receipt | None:
        """Send one message if that needs no waiting at all; None where `send` must."""
        # `_may_pass`, without its call.
        if self._rate is not None or not self._session.online or self._outbox.busy:
            return None
        try:
            receipt = self._backend.try_publish(out)
        except NotConnected:
            return None  # lost just now, which the session has not noticed; `send` waits for it
        except PubSubError:
            self._stats.failed += 1
            raise
        if receipt is not None:
            self._stats.published += 1
        return receipt

    async def send(
        self, out: OutFrame, timeout: float | None, confirm: ConfirmedBy | str | None
    ) -> Receipt:
        """Send one message; without a session, follow the offline policy."""
        if confirm is not None:
            try:
                self._check_confirm(confirm, out.qos)
            except Exception:
                self._stats.failed += 1
                raise
        receipt = self.send_now(out)
        return receipt if receipt is not None else await self.send_later(out, timeout, confirm)

    async def send_later(
        self, out: OutFrame, timeout: float | None, confirm: ConfirmedBy | str | None
    ) -> Receipt:
        """The rest of `send`, after `send_now` returned None and *confirm* was checked."""
        try:
            receipt = await self._send_waiting(out, timeout, confirm)
        except PubSubError:
            self._stats.failed += 1
            raise
        if receipt is None:
            self._stats.dropped += 1
            return Receipt(out.topic, ConfirmedBy.NOBODY)
        self._stats.published += 1
        return receipt

    def need(self, cap: Cap) -> None:
        """Raise NotSupported, which counts as a failure, where the broker lacks *cap*."""
        try:
            self._need(cap)
        except NotSupported:
            self._stats.failed += 1
            raise

    async def counted(self, sending: Awaitable[Receipt]) -> Receipt:
        """Await *sending*, and count it as a publish."""
        try:
            receipt = await sending
        except PubSubError:
            self._stats.failed += 1
            raise
        self._stats.published += 1
        return receipt

    def online(self) -> None:
        """Send the messages that waited for a session."""
        if len(self._outbox):
            self._start_flush()

    async def drain(self, seconds: float) -> None:
        """Wait at most *seconds* until the offline buffer is sent in the current session."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self._outbox.busy and self._flushes and self._session.online:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await asyncio.wait(self._flushes, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def give_up(self, error: PubSubError | None) -> int:
        """End every wait: there will be no session, because of *error* or of closing.

        Return how many messages never left the offline buffer.
        """
        return self._outbox.fail(lambda out: self._closed(out) if error is None else error)

    def close(self) -> None:
        """Drop the timer of the deadlines; call it last."""
        self._deadlines.close()

    @property
    def waiting(self) -> int:
        """Messages that wait for a session now."""
        return len(self._outbox)

    @property
    def displaced(self) -> int:
        """Messages that the offline buffer's overflow policy dropped."""
        return self._outbox.dropped

    async def _send_waiting(
        self, out: OutFrame, timeout: float | None, confirm: ConfirmedBy | str | None
    ) -> Receipt | None:
        """Send *out* when that is possible; None when the offline policy dropped it."""
        # One timer does for all that have the usual time.
        if timeout is not None:
            check_number("timeout", timeout)
        deadlines = self._deadlines if timeout is None else Deadlines(timeout)
        waiting: Waiting | None = None
        sent = False
        try:
            with deadlines.wait():
                # What goes through the outbox gets its place when it leaves there. A place
                # taken here would be over by then, and a full outbox would leave at once.
                if self._rate is not None and self._may_pass:
                    await self.pace(out.topic, deadlines.seconds)
                if self._may_pass:
                    sent = True
                    try:
                        return await self._backend.publish(out)
                    except NotConnected:
                        # The session was lost just now and the backend did not keep it.
                        sent = False
                waiting = await self._offline(out)
                if waiting is None:
                    return None
                if confirm == ConfirmedBy.NOBODY and not self._session.online:
                    return Receipt(out.topic, ConfirmedBy.NOBODY)
                return await asyncio.shield(waiting.future)
        except TimeoutError as error:
            if isinstance(error, PubSubError):
                raise
            if waiting is not None:
                self._outbox.withdraw(waiting)
                sent = waiting.sent
            raise PublishTimeout(
                f"no confirmation of {out.topic!r} within {deadlines.seconds:g} s",
                outcome=Outcome.UNKNOWN if sent else Outcome.NOT_SENT,
                hint="raise timeout=, or look at bus.status",
                backend=self._name,
                topic=out.topic,
            ) from error
        except asyncio.CancelledError:
            if waiting is not None:
                self._outbox.withdraw(waiting)
            raise
        finally:
            if timeout is not None:
                deadlines.close()

    async def _offline(self, out: OutFrame) -> Waiting | None:
        session, policy = self._session, self._options.offline
        if session.status in (Status.FAILED, Status.CLOSED):
            raise session.not_connected()
        # While the outbox is being flushed the message must queue up behind it, whatever the
        # policy is: sent directly, it would overtake.
        if not (session.online and self._outbox.busy):
            if policy == "drop":
                return None
            if policy == "raise":
                raise session.not_connected()
        waiting = await self._outbox.put(out, self._name)
        if session.online:
            self._start_flush()
        return waiting

    def _start_flush(self) -> None:
        task = self._spawn(self._flush(), "flush")
        self._flushes.add(task)
        task.add_done_callback(self._flushes.discard)

    async def _flush(self) -> None:
        session = self._session
        # Without the last condition a second flush would spin and never let the first go on.
        while session.online and len(self._outbox) and not self._outbox.flushing:
            await self._outbox.flush(
                self._backend.publish, lambda: session.online, lambda: self._rate
            )

    @property
    def _may_pass(self) -> bool:
        """Whether a message can go to the backend and overtakes nothing by that."""
        return self._session.online and not self._outbox.busy

    def sent_again(self, topic: str) -> None:
        """Count a message that the backend sent once more: the broker counts it too."""
        if self._rate is not None:
            self._rate.note(topic)

    async def pace(self, topic: str, seconds: float) -> None:
        """Wait until the broker's rate limits allow a message to *topic*.

        Raises:
            RateLimited: That takes longer than *seconds*.
        """
        rate = self._rate
        if rate is None:
            return
        delay = rate.delay(topic)
        if delay > seconds:
            raise RateLimited(
                f"the broker's rate limit allows {topic!r} again in {delay:.1f} s",
                retry_after=delay,
                hint="publish less often, or pass a longer timeout=",
                backend=self._name,
                topic=topic,
            )
        delay = rate.reserve(topic)
        if delay > 0:
            await self._clock.sleep(delay)

    def _check_confirm(self, given: ConfirmedBy | str, qos: int) -> None:
        try:
            confirm = ConfirmedBy(given)
        except ValueError:
            known = ", ".join(ConfirmedBy)
            raise BadOption(
                f"confirm={given!r}", hint=f"pass one of {known}", option="confirm"
            ) from None
        guarantees: Guarantees = self._backend.guarantees
        if confirm is ConfirmedBy.BROKER and (
            guarantees.confirmed_by is not ConfirmedBy.BROKER or qos == 0
        ):
            raise NotSupported(
                "confirm",
                why="the broker confirms no publish"
                if qos
                else "the broker does not confirm quality of service 0",
                backend=self._name,
                hint="leave confirm= out" if qos else "publish with qos=1 or 2",
            )

    def _closed(self, out: OutFrame) -> PubSubError:
        return PublishFailed(
            f"the bus was closed before {out.topic!r} could be sent",
            outcome=Outcome.NOT_SENT,
            hint="publish it again on a new bus",
            backend=self._name,
            topic=out.topic,
        )
