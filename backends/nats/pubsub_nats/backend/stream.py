"""Stream mode: what a bus does with one stream of JetStream.

Publishes are confirmed by the stream, subscriptions are consumers of it, and beside it stands a
second one for retained values, which has the shape that NATS tools know as a key-value store.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

from pubsub_core.capabilities import Cap, Support
from pubsub_core.errors import (
    ConnectError,
    Outcome,
    PublishFailed,
    SubscribeFailed,
)
from pubsub_core.interfaces import HistoryQuery, Sink, WireSub
from pubsub_core.keyed import BoundedCache
from pubsub_core.message import InFrame, Origin, OutFrame, Receipt, Verdict
from pubsub_nats.errors import payload_too_large, subscribe_denied
from pubsub_nats.headers import encode_lines, parse_block
from pubsub_nats.jetstream import (
    TTL,
    ApiError,
    Position,
    ack_payload,
    consumer_name,
    covers,
    overlaps,
    stream_error,
    subscribe_error,
    whole_seconds,
)
from pubsub_nats.options import NatsOptions
from pubsub_nats.protocol import Msg
from pubsub_nats.subjects import Subjects

from .confirmed import ConfirmedPublisher
from .connection import Connection, Denied, Lost
from .consumers import HEARTBEAT, Consumer, PullConsumer, PushConsumer, Tag
from .history import Stored, newest, read, read_last_of_each
from .presence import Presence
from .requests import Requests

__all__ = ["RESERVE", "FrameMaker", "StreamMode"]

logger = logging.getLogger("pubsub_nats")

RESERVE = 512
"""Bytes of a message that our own headers may take."""

_PURGE = b"KV-Operation: PURGE\r\nNats-Rollup: sub\r\n"
_SECOND = 1_000_000_000
_MANY_CONSUMERS = 100_000
_KEPT = 10_000

FrameMaker = Callable[..., InFrame | None]
"""Makes a frame of a message: subject, payload, header block, and what is known beside."""


class StreamMode:
    """The stream of one bus; it outlives sessions.

    Attributes:
        requests: The inbox.
        connection: The session at hand.
        paused: Whether nothing more is wanted for now.
        replicated: Whether several nodes have the stream.
        ttl: Whether the stream removes what has expired by itself.
        retained: Whether the stream for retained values is there.
    """

    def __init__(
        self,
        options: NatsOptions,
        subjects: Subjects,
        session: str,
        name: str,
        frame: FrameMaker,
        pairs: Callable[[OutFrame], list[tuple[str, str]]],
    ) -> None:
        self._options = options
        self._subjects = subjects
        self._session = session
        self._frame = frame
        self._pairs = pairs
        self.stream = options.stream or ""
        self._values = f"KV_{self.stream}_last"
        self._value_prefix = f"$KV.{self.stream}_last."
        self.requests = Requests(session)
        self.publisher = ConfirmedPublisher(session, self.requests.prefix)
        self.presence: Presence | None = None
        if options.presence:
            self.presence = Presence(self, self.publisher, session, name, options.presence_ttl)
        self.watchable = False
        self.connection: Connection | None = None
        self.sink: Sink | None = None
        self.paused = False
        self.ttl = False
        self.retained = False
        self.durable = options.storage == "file"
        self.replicated = False
        self._known = False
        # Whether a session is complete: before that nothing is published.
        self._live = False
        self._patterns: tuple[str, ...] = ()
        self._covered = BoundedCache[bytes, bool](_KEPT)
        self._consumers: dict[int, list[Consumer]] = {}
        self._several = True
        self._names = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    # --- sessions ------------------------------------------------------------------------------

    async def open(self, connection: Connection, sink: Sink) -> bool:
        """Find or make the stream; return whether every subscription goes on without a hole.

        Raises:
            ConnectError: The stream cannot be used.
        """
        self.sink = sink
        try:
            await self.requests.open(connection)
            self.connection = connection
            info = await self._find(self.stream, self._configuration)
            self._learn(info)
            self.retained = await self._find_values()
            self.watchable = await self._find_members()
            resumed = await self._resume(info["state"])
        except Denied:
            raise ConnectError(
                f"the server's permissions deny what the stream {self.stream!r} needs",
                hint="allow publishing to $JS.API.> and subscribing to _INBOX.>",
                backend="nats",
                retryable=False,
            ) from None
        except ApiError as error:
            raise stream_error(error, self.stream, known=self._known) from error
        self._known = True
        self._timer = asyncio.get_running_loop().call_later(HEARTBEAT, self._look)
        return resumed

    def online(self) -> None:
        """Send what waited for a session."""
        if self.connection is not None:
            self._live = True
            self.publisher.online(self.connection)
            if self.presence is not None and self.watchable:
                self.presence.online()

    def lost(self) -> None:
        """Keep what goes on in the next session."""
        self.connection = None
        self.sink = None
        self.paused = False
        self._live = False
        self.requests.lost()
        if self.presence is not None:
            self.presence.lost()
        self.publisher.offline()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    async def drain(self, seconds: float) -> None:
        """Wait for what has no answer yet; give back what nobody will handle."""
        if self.presence is not None:
            self.presence.leave()
        await self.publisher.drain(seconds)
        if self.connection is not None:
            for consumers in self._consumers.values():
                for each in consumers:
                    each.stop(leave=each.want.group is not None or self._persistent)

    async def close(self) -> None:
        """Give everything up."""
        self.lost()
        self._consumers.clear()
        self.publisher.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)

    @property
    def _persistent(self) -> bool:
        return self._options.client_id is not None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(HEARTBEAT, self._look)
        for consumers in self._consumers.values():
            for each in consumers:
                each.look(loop.time())

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run *work* in a task that ends with the session."""
        task = asyncio.create_task(work, name=f"pubsub nats {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def unique(self) -> str:
        """Return a name that nobody else has."""
        return f"{self._session}{next(self._names)}"

    # --- the stream --------------------------------------------------------------------------

    async def _find(
        self, name: str, configuration: Callable[[], Mapping[str, object]]
    ) -> Mapping[str, Any]:
        """Return what the server tells of a stream, made if it is missing and may be made."""
        try:
            return await self.requests.api(f"STREAM.INFO.{name}")
        except ApiError as error:
            if error.number != 10059 or not self._options.create:
                raise
        try:
            return await self.requests.api(f"STREAM.CREATE.{name}", configuration())
        except ApiError as error:
            if error.number != 10058:  # somebody else made it in between
                raise
            return await self.requests.api(f"STREAM.INFO.{name}")

    async def _find_values(self) -> bool:
        try:
            await self._find(self._values, self._values_configuration)
        except (ApiError, Denied) as error:
            logger.info("no stream for retained values: %s", error)
            return False
        return True

    async def _find_members(self) -> bool:
        presence = self.presence
        if presence is None:
            return False
        replicas = self._options.replicas
        try:
            found = await self._find(presence.stream, lambda: presence.configuration(replicas))
        except (ApiError, Denied) as error:
            logger.info("no stream for presence: %s", error)
            return False
        return presence.usable(found["config"])

    def _configuration(self) -> Mapping[str, object]:
        options = self._options
        config: dict[str, object] = {
            "name": self.stream,
            "subjects": [
                subject.decode()
                for wanted in options.subjects or ("#",)
                for subject in self._subjects.filters(wanted)
            ],
            "max_consumers": _MANY_CONSUMERS,
            "discard": options.discard,
            "duplicate_window": round(options.duplicate_window * _SECOND),
            "max_age": round(options.max_age * _SECOND),
            "max_bytes": options.max_bytes or -1,
            "max_msgs": options.max_msgs or -1,
            "allow_direct": True,
            # Servers before 2.11 do not know it, and 2.11 tells that it has it.
            "allow_msg_ttl": True,
        }
        return config | self._placement()

    def _values_configuration(self) -> Mapping[str, object]:
        return {
            "name": self._values,
            "subjects": [f"{self._value_prefix}>"],
            "max_consumers": _MANY_CONSUMERS,
            "max_msgs_per_subject": 1,
            "discard": "new",
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "deny_delete": True,
            "allow_msg_ttl": True,
        } | self._placement()

    def _placement(self) -> dict[str, object]:
        return {"storage": self._options.storage, "num_replicas": self._options.replicas}

    def _learn(self, info: Mapping[str, Any]) -> None:
        config: Mapping[str, Any] = info["config"]
        if config.get("no_ack") or config.get("sealed"):
            raise ConnectError(
                f"the stream {self.stream!r} takes or confirms no messages",
                hint="it is sealed or has no_ack; use another",
                backend="nats",
                retryable=False,
            )
        self._patterns = tuple(config.get("subjects") or ())
        self._covered.clear()
        self.ttl = config.get("allow_msg_ttl") is True
        self.durable = config.get("storage") == "file"
        self.replicated = int(config.get("num_replicas", 1)) > 1
        window = int(config.get("duplicate_window", 0)) / _SECOND
        self.publisher.window = window

    async def _resume(self, state: Mapping[str, Any]) -> bool:
        """Let every subscription go on behind what it had; return whether all could."""
        consumers = [each for found in self._consumers.values() for each in found]
        if not consumers:
            return await self._earlier()
        first, last = int(state.get("first_seq", 0)), int(state.get("last_seq", 0))
        # Purged, or another stream of that name: what was missed is not there.
        if any(not first <= each.last + 1 <= last + 1 for each in consumers):
            self._consumers.clear()
            return False
        results = await asyncio.gather(
            *(each.resume(last) for each in consumers), return_exceptions=True
        )
        for result in results:
            if isinstance(result, (Lost, asyncio.CancelledError)):
                raise result
        if all(result is True for result in results):
            return True
        for each in consumers:
            each.stop(leave=True)
        self._consumers.clear()
        return False

    async def _earlier(self) -> bool:
        """Whether an earlier process left subscriptions of this client."""
        if self._options.client_id is None or self._known:
            return False
        begin = consumer_name("s", self._options.client_id) + "-"
        offset = 0
        while True:
            found = await self.requests.api(f"CONSUMER.NAMES.{self.stream}", {"offset": offset})
            names: list[str] = found.get("consumers") or []
            if any(name.startswith(begin) for name in names):
                return True
            offset += len(names)
            if not names or offset >= int(found.get("total", 0)):
                return False

    def probe(self) -> dict[Cap, Support]:
        """Tell what this stream lacks."""
        found: dict[Cap, Support] = {}
        if not self.retained:
            found[Cap.RETAINED] = Support.none(
                f"there is no stream {self._values!r}", "set create=true, or create it"
            )
        if not self.ttl:
            found[Cap.TTL] = Support.emulated("the receiver drops what came too late")
        if not self.watchable:
            why, remedy = "a client's filters are told to nobody", "set presence=true"
            if self.presence is not None:
                why = f"the stream {self.presence.stream!r} is missing, or the server too old"
                remedy = "set create=true, and use nats-server 2.11 or later"
            found[Cap.PRESENCE] = found[Cap.NOTIFICATIONS] = Support.none(why, remedy)
        if not self._persistent:
            found[Cap.PERSISTENT_SESSION] = Support.none(
                "a session that survives needs a name", "set client_id="
            )
        return found

    # --- publishing ----------------------------------------------------------------------------

    def covered(self, subject: bytes) -> bool:
        """Whether the stream stores what is published to *subject*."""
        found = self._covered.get(subject)
        if found is None:
            text = subject.decode()
            found = self._covered.keep(
                subject, any(covers(pattern, text) for pattern in self._patterns)
            )
        return found

    async def publish(self, out: OutFrame, limit: int) -> Receipt:
        """Publish; return when the stream has stored it.

        Args:
            out: The message.
            limit: Bytes of payload and headers that the server takes.
        """
        subject = self._subjects.subject(out.topic)
        if not self.covered(subject):
            raise PublishFailed(
                f"the stream {self.stream!r} does not cover {out.topic!r}",
                outcome=Outcome.REJECTED,
                hint=f"its subjects are {', '.join(self._patterns) or 'none'}; add one there, or "
                "use a bus without stream=",
                backend="nats",
                topic=out.topic,
                retryable=False,
            )
        lines = self._lines(out)
        if len(out.payload) + len(lines) + RESERVE > limit:
            raise payload_too_large(len(out.payload) + len(lines) + RESERVE, limit, out.topic)
        submit = self.publisher.submit
        if not out.retain:
            return await submit(out.topic, subject, out.payload, self.stream, lines)
        value = self._value_prefix.encode() + subject
        # A write and not a purge, so that whoever watches learns of it.
        kept = lines if out.payload else lines + _PURGE
        waiting = [
            submit(out.topic, value, out.payload, self._values, kept),
            submit(out.topic, subject, out.payload, self.stream, lines),
        ]
        try:
            await asyncio.wait(waiting)
            waiting[0].result()
            return waiting[1].result()
        finally:
            for each in waiting:
                if not each.cancel() and not each.cancelled():
                    each.exception()

    def _lines(self, out: OutFrame) -> bytes:
        """Return the lines of the header block that are the message's own."""
        if not (out.headers or out.content_type is not None or out.ttl is not None) and out.echo:
            return b""
        pairs = self._pairs(out)
        if out.ttl is not None and self.ttl:
            pairs.append((TTL, whole_seconds(out.ttl)))
        return encode_lines(pairs)

    # --- subscribing ---------------------------------------------------------------------------

    async def subscribe(self, want: WireSub) -> None:
        """Make the consumers of one subscription; then deliver what is retained for it."""
        old = self._consumers.get(want.id)
        if old is not None and all(each.want.manual_ack == want.manual_ack for each in old):
            for each in old:
                each.want = want
            return
        subjects = [subject.decode() for subject in self._subjects.filters(want.filter)]
        wanted = [
            subject
            for subject in subjects
            if any(overlaps(subject, pattern) for pattern in self._patterns)
        ]
        if not wanted:
            raise SubscribeFailed(
                f"the stream {self.stream!r} covers nothing of {want.filter!r}",
                hint=f"its subjects are {', '.join(self._patterns) or 'none'}; add one there, or "
                "use a bus without stream=",
                backend="nats",
                topic=want.filter,
                retryable=False,
            )
        for each in old or ():
            each.mute()
        last = None if old is None else min(each.last for each in old)
        try:
            made = await self._named(lambda: self._make(want, wanted, last), want)
        except BaseException:
            for each in old or ():
                each.again("its successor was refused")
            raise
        self._consumers[want.id] = made
        for each in old or ():
            each.stop(leave=False)
        if old is None:
            await self._announce()
        if old is None and want.group is None and self.retained:
            await self._named(lambda: self.repeat_retained(want), want)

    async def _named(self, call: Callable[[], Awaitable[Any]], want: WireSub) -> Any:
        try:
            return await call()
        except Denied:
            raise subscribe_denied(want.filter, want.group) from None
        except ApiError as error:
            raise subscribe_error(error, want.filter) from error

    async def _make(self, want: WireSub, subjects: list[str], last: int | None) -> list[Consumer]:
        made: list[Consumer] = []
        if last is None and self.replicated and want.group is None and not self._persistent:
            # "New" means what the consumer's node has, which may lag behind.
            info = await self.requests.api(f"STREAM.INFO.{self.stream}")
            last = int(info["state"].get("last_seq", 0))
        sets = [subjects] if self._several else [[subject] for subject in subjects]
        try:
            for some in sets:
                consumer = self._new(want, some)
                made.append(consumer)
                complete = await (
                    consumer.start() if last is None else consumer.start_from(last + 1)
                )
                if not complete:
                    # Before 2.10 a consumer has one filter; it was dropped again.
                    self._several = False
                    return await self._make(want, subjects, last)
        except BaseException:
            for each in made:
                each.stop(leave=want.group is not None)
            raise
        return made

    def _new(self, want: WireSub, subjects: list[str]) -> PushConsumer | PullConsumer:
        options = self._options
        name = ""
        # Several subjects of one filter are one consumer, or with old servers one for each.
        about = " ".join(subjects)
        if want.group is not None:
            name = consumer_name("g", f"{want.group}\0{about}")
        elif options.client_id is not None:
            name = consumer_name("s", options.client_id, about)
        elif not want.manual_ack:
            return PushConsumer(self, want, subjects)
        return PullConsumer(
            self,
            want,
            subjects,
            name=name,
            ack_wait=options.ack_wait,
            max_deliver=options.max_deliver,
            idle=options.session_expiry,
        )

    async def unsubscribe(self, want: WireSub) -> None:
        """Drop the consumers of one subscription; return when the server has acted on it."""
        for each in self._consumers.pop(want.id, ()):
            each.stop(leave=want.group is not None)
        connection = self.connection
        if connection is not None:
            await self._announce()
            await connection.ping()

    async def _announce(self) -> None:
        if self.presence is not None and self.watchable:
            filters = {found[0].want.filter for found in self._consumers.values()}
            await self.presence.announce(sorted(filters), now=self._live)

    def settle(self, tag: Tag, verdict: Verdict, delay: float = 0.0) -> None:
        """Act on a subscriber's decision."""
        tag.consumer.settle(tag, ack_payload(verdict, delay))

    def pause(self) -> None:
        """Answer no question of flow control, and ask for nothing."""
        self.paused = True

    def resume(self) -> None:
        """Give the answers, and ask."""
        self.paused = False
        for consumers in self._consumers.values():
            for each in consumers:
                each.resumed_flow()

    # --- what arrives --------------------------------------------------------------------------

    def take(self, message: Msg) -> None:
        """Take what came to the inbox."""
        prefix = self.requests.prefix
        if not (
            message.subject.startswith(prefix)
            and self.publisher.take(message.subject[len(prefix) :], message)
        ):
            self.requests.take(message)

    def deliver(
        self, message: Msg, position: Position, want: WireSub, *, replay: bool, tag: Tag | None
    ) -> bool:
        """Hand a message over; return False where it is for nobody."""
        sink = self.sink
        if sink is None:
            return True  # it comes again
        frame = self._frame(
            message,
            message.subject,
            time=position.time,
            id=str(position.stream),
            want=want,
            origin=Origin.REPLAY if replay else Origin.LIVE,
            redelivered=position.delivered > 1,
            tag=tag,
        )
        if frame is None:
            return False
        sink.deliver(frame)
        return True

    # --- what is stored ------------------------------------------------------------------------

    async def history(self, filter: str, query: HistoryQuery) -> AsyncGenerator[InFrame, None]:
        """Yield stored messages, oldest first."""
        subjects = [subject.decode() for subject in self._subjects.filters(filter)]
        wanted = [
            subject
            for subject in subjects
            if any(overlaps(subject, pattern) for pattern in self._patterns)
        ]
        if not wanted:
            return
        info = await self.requests.api(f"STREAM.INFO.{self.stream}")
        last = int(info["state"].get("last_seq", 0))
        found = read(self, self.stream, wanted, query, last_sequence=last)
        try:
            async for stored in found:
                frame = self._stored(stored, Origin.REPLAY, stored.message.subject, "")
                if frame is not None:
                    yield frame
        finally:
            await found.aclose()

    def _stored(
        self, stored: Stored, origin: Origin, subject: bytes, mark: str, want: WireSub | None = None
    ) -> InFrame | None:
        return self._frame(
            stored.message,
            subject,
            time=stored.position.time,
            id=f"{mark}{stored.position.stream}",
            want=want,
            origin=origin,
        )

    async def last(self, topic: str) -> InFrame | None:
        """Return the retained message of *topic*."""
        found = await newest(
            self, self._values, self._value_prefix + self._subjects.subject(topic).decode()
        )
        return None if found is None else self._value(found, None)

    async def repeat_retained(self, want: WireSub) -> None:
        """Deliver what is retained for a subscription."""
        if not self.retained:
            return
        subjects = [subject.decode() for subject in self._subjects.filters(want.filter)]
        async for frame in self._values_of(subjects, want):
            if self.sink is not None:
                self.sink.deliver(frame)

    async def _values_of(
        self, subjects: list[str], want: WireSub | None
    ) -> AsyncGenerator[InFrame, None]:
        found = read_last_of_each(
            self, self._values, [self._value_prefix + subject for subject in subjects]
        )
        try:
            async for stored in found:
                frame = self._value(stored, want)
                if frame is not None:
                    yield frame
        finally:
            await found.aclose()

    def _value(self, stored: Stored, want: WireSub | None) -> InFrame | None:
        block = parse_block(stored.message.header)
        if block.get("KV-Operation") or block.get("Nats-Marker-Reason"):
            return None  # it was cleared, or has expired
        subject = stored.message.subject[len(self._value_prefix) :]
        return self._stored(stored, Origin.RETAINED, subject, "r", want)
