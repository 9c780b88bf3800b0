"""NATS as the core sees it: the one place where core words become the server's."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import secrets
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from typing import Any, NamedTuple, cast
from urllib.parse import quote

from pubsub_core.capabilities import (
    Cap,
    ConfirmedBy,
    Guarantees,
    Limits,
    Support,
)
from pubsub_core.errors import (
    BadOption,
    ConnectError,
    LimitReached,
    NotConnected,
    NotSupported,
    OperationTimeout,
    Outcome,
    PublishFailed,
    PubSubError,
)
from pubsub_core.events import InterestEvent, Notice
from pubsub_core.interfaces import (
    Backend,
    BackendContext,
    Endpoint,
    HistoryQuery,
    SessionFacts,
    Sink,
    Watch,
    WireSub,
)
from pubsub_core.message import (
    NO_HEADERS,
    Headers,
    InFrame,
    Member,
    Origin,
    OutFrame,
    Receipt,
    Verdict,
)
from pubsub_nats.errors import (
    fatal,
    payload_too_large,
    printable,
    publish_denied,
    subscribe_denied,
)
from pubsub_nats.headers import (
    CONTENT_TYPE,
    EXPIRES,
    FROM,
    encode_block,
    encode_user,
    parse_block,
    user_pairs,
)
from pubsub_nats.jetstream import TTL, ApiError, parse_ttl
from pubsub_nats.options import DEFAULT_PORT, HostPort, NatsOptions, host_port
from pubsub_nats.protocol import Msg, encode_pub
from pubsub_nats.subjects import Subjects

from .connection import Connection, Denied, LimitExceeded, Lost, Unsent
from .consumers import Tag
from .dial import Dialer
from .modes import CORE, DURABLE, IN_MEMORY, NAME_A_STREAM, NOTHING_STORED
from .presence import Presence
from .stream import RESERVE, StreamMode

__all__ = ["NatsBackend"]

logger = logging.getLogger("pubsub_nats")

_TLS = frozenset({"nats+tls", "nats+wss"})
_WEBSOCKET = frozenset({"nats+ws", "nats+wss"})
_MOST_SERVERS = 1000
_PORTS = {"nats+ws": 80, "nats+wss": 443}
_BROKER = ConfirmedBy.BROKER
_NO_HEADERS = "this server, or its configuration, carries no headers"
_NEED_HEADERS = (Cap.HEADERS, Cap.CONTENT_TYPE, Cap.TTL, Cap.ECHO_CONTROL)


class _Sub(NamedTuple):
    """One subscription at the server: `WireSub` and the ids that a frame for it carries."""

    want: WireSub
    ids: tuple[int]


class NatsBackend(Backend):
    """One session with a NATS server.

    Attributes:
        session: Our own word for this publisher; it stays the same over reconnects.
        unmapped: Messages that were dropped because their subject has no topic.
    """

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        options = context.options
        if not isinstance(options, NatsOptions):
            raise TypeError(f"options are a {type(options).__name__}, not NatsOptions")
        self._options = options
        address = context.address
        websocket = address.scheme in _WEBSOCKET
        if not address.host:
            raise BadOption(f"{address} names no host", hint="nats://localhost", backend="nats")
        if address.path not in ("", "/") and not websocket:
            raise BadOption(
                f"the path {address.path!r} means nothing for {address.scheme}://",
                hint="leave it out; prefix= makes a namespace",
                backend="nats",
            )
        if address.scheme == "nats+ws" and options.asks_for_tls:
            raise BadOption(
                "nats+ws:// has no TLS, and an option asks for it",
                hint="use nats+wss://",
                backend="nats",
            )
        port = _PORTS.get(address.scheme, DEFAULT_PORT) if address.port is None else address.port
        self._home = HostPort(address.host, port)
        self._configured = [self._home, *map(host_port, options.servers)]
        self._servers = list(self._configured)
        self._turn = 0
        self._dialer = Dialer(
            address,
            options,
            context.bus or "pubsub",
            tls=address.scheme in _TLS or options.asks_for_tls,
            websocket=websocket,
        )
        self._subjects = Subjects(options.prefix)
        self._time = context.clock.time
        self._connection: Connection | None = None
        self._server: HostPort = self._home
        self._sink: Sink | None = None
        self._subs: dict[int, _Sub] = {}
        self._max_payload = 0
        self._noticed = False
        self._opening = False
        self.session = secrets.token_urlsafe(12)
        self.unmapped = 0
        self._stream: StreamMode | None = None
        if options.stream is not None:
            self._stream = StreamMode(
                options, self._subjects, self.session, self._user(), self._made, self._pairs
            )

    # --- sessions ------------------------------------------------------------------------

    @property
    def endpoint(self) -> Endpoint:
        """Where `open` connects to next."""
        server = self._servers[self._turn % len(self._servers)]
        return Endpoint(server.host, server.port, self._dialer.tls)

    async def open(self, sink: Sink) -> SessionFacts:
        """Connect to the first server that can be reached, and log in; each is tried once."""
        self._forget()
        self._sink = sink
        connection = self._connection = await self._dial()
        if self._options.keepalive:
            connection.keep_alive(self._options.keepalive)
        info = connection.info
        resumed = False
        if self._stream is not None:
            resumed = await self._open_stream(self._stream, connection, sink)
        return SessionFacts(
            resumed=resumed,
            client_id=f"{info.get('server_id', '')}-{info.get('client_id', 0)}",
            server=f"nats-server {printable(str(info.get('version', '')))}",
        )

    async def _open_stream(self, stream: StreamMode, connection: Connection, sink: Sink) -> bool:
        self._opening = True
        try:
            return await stream.open(connection, sink)
        except BaseException as error:
            self._forget()
            await connection.close(0.0)
            if isinstance(error, Lost):
                raise self._loss(connection) from error
            raise
        finally:
            self._opening = False

    async def restored(self) -> None:
        """Send again what an earlier session left without an answer."""
        if self._stream is not None:
            self._stream.online()

    async def _dial(self) -> Connection:
        left = len(self._servers)
        while True:
            server = self._server = self._servers[self._turn % len(self._servers)]
            # The session after this one begins with another.
            self._turn += 1
            left -= 1
            try:
                return await self._dialer.connect(server, self)
            except ConnectError as error:
                if error.retryable is False or not left:
                    raise
                logger.info("bus %r: %s", self.context.bus, error)

    def _learn_servers(self, urls: object) -> None:
        """Know the cluster's other servers as it tells them now, in random order."""
        if not isinstance(urls, list) or self._dialer.websocket:
            return
        found: list[HostPort] = []
        for url in cast("list[object]", urls)[:_MOST_SERVERS]:
            try:
                server = host_port(str(url))
            except ValueError:
                continue
            if server not in self._configured:
                found.append(server)
        random.shuffle(found)
        self._servers = [*self._configured, *found]

    def told(self, info: Mapping[str, Any]) -> None:
        """Take over what the server allows from now on."""
        limit = info.get("max_payload")
        self._max_payload = limit if isinstance(limit, int) else 0
        self._learn_servers(info.get("connect_urls"))

    def ended(self, connection: Connection) -> None:
        """Learn that a connection is over."""
        if connection is not self._connection:
            return
        sink = self._sink
        self._forget()
        if sink is not None and not self._opening:
            sink.lost(self._loss(connection))

    def _loss(self, connection: Connection) -> ConnectError:
        if connection.last_error:
            return fatal(connection.last_error, str(self._server))
        cause = connection.error
        error = ConnectError(f"lost {self._server}: {printable(str(cause))}", backend="nats")
        error.__cause__ = cause
        return error

    def _forget(self) -> Connection | None:
        connection, self._connection = self._connection, None
        self._sink = None
        self._subs.clear()
        self._noticed = False
        if self._stream is not None:
            self._stream.lost()
        return connection

    async def drop(self) -> None:
        """End the session as if it had been lost."""
        connection = self._forget()
        if connection is not None:
            await connection.close(0.0)

    async def close(self, *, drain: float) -> None:
        """End the session, after the server has acted upon what was sent."""
        connection, stream = self._connection, self._stream
        # What comes now is for nobody, but publishes still hear of their answer.
        self._sink = None
        try:
            if connection is not None:
                if stream is not None:
                    await stream.drain(drain)
                await connection.close(drain)
        finally:
            if self._connection is connection:
                self._forget()
            if stream is not None:
                await stream.close()

    async def probe(self) -> Mapping[Cap, Support]:
        """Lower what this server, or the choice of a stream or none, does not give."""
        found = {**CORE} if self._stream is None else self._stream.probe()
        if self._connection is not None and self._connection.info.get("headers") is not True:
            missing = Support.none(
                _NO_HEADERS, "nats-server 2.2 or later, without no_header_support"
            )
            found |= dict.fromkeys(_NEED_HEADERS, missing)
        return found

    @property
    def guarantees(self) -> Guarantees:
        """Those of the stream, or of core NATS."""
        stream = self._stream
        if stream is None:
            return super().guarantees
        return DURABLE if stream.durable else IN_MEMORY

    @property
    def keeps_history(self) -> bool:
        """Whether a stream has every message."""
        return self._stream is not None

    @property
    def limits(self) -> Limits:
        """The declared limits, with what this server allows."""
        declared = self.context.info.limits
        if not self._max_payload:
            return declared
        room = self._max_payload - (0 if self._stream is None else RESERVE)
        return dataclasses.replace(declared, max_payload=max(room, 0))

    async def ping(self) -> float:
        """Return the seconds of a round trip."""
        clock = self.context.clock
        began = clock.monotonic()
        try:
            await self._online().ping()
        except Lost as error:
            raise self._not_connected() from error
        return clock.monotonic() - began

    # --- topics ----------------------------------------------------------------------------

    def to_wire(self, topic: str) -> str:
        """Return the subject of a topic."""
        return self._subjects.subject(topic).decode()

    def from_wire(self, name: str) -> str:
        """Return the topic of a subject; the subject itself where it has none."""
        return self._subjects.topic(name.encode()) or name

    # --- publishing ------------------------------------------------------------------------

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish; return when the server has read it, allowed it and passed it on."""
        connection = self._online()
        if self._stream is not None:
            return await self._stream.publish(out, self._max_payload)
        subject, frame = self._frame(out)
        if connection.full:
            await connection.room()
        try:
            await connection.publish(frame, subject)
        except Denied:
            raise publish_denied(out.topic) from None
        except Unsent as error:
            raise self._not_connected() from error
        except Lost as error:
            raise PublishFailed(
                f"lost {self._server} before it confirmed {out.topic!r}",
                outcome=Outcome.UNKNOWN,
                hint="publish again if a duplicate does no harm",
                backend="nats",
                topic=out.topic,
                retryable=True,
            ) from error
        return Receipt(out.topic, _BROKER)

    def _frame(self, out: OutFrame) -> tuple[bytes, bytes]:
        subject = self._subjects.subject(out.topic)
        payload = out.payload
        header = b""
        if out.headers or out.content_type is not None or out.ttl is not None or not out.echo:
            header = encode_block(self._pairs(out))
        if len(header) + len(payload) > self._max_payload:
            raise payload_too_large(len(header) + len(payload), self._max_payload, out.topic)
        return subject, encode_pub(subject, payload, header)

    def _pairs(self, out: OutFrame) -> list[tuple[str, str]]:
        pairs = encode_user(out.headers.pairs)
        if out.content_type is not None:
            pairs.append((CONTENT_TYPE, " ".join(out.content_type.split())))
        if out.ttl is not None:
            pairs.append((EXPIRES, f"{self._time() + out.ttl:.6f}"))
        if not out.echo:
            pairs.append((FROM, self.session))
        return pairs

    def publish_denied(self, subject: bytes) -> None:
        """Learn that a publish was refused; behind those of core mode a PONG tells it."""
        if self._stream is not None:
            self._stream.requests.denied(subject)
            self._stream.publisher.denied(subject)

    # --- subscribing -----------------------------------------------------------------------

    async def subscribe(self, want: WireSub) -> int:
        """Subscribe; return when the server has."""
        connection = self._online()
        if self._stream is not None:
            try:
                await self._stream.subscribe(want)
            except Lost as error:
                raise self._not_connected() from error
            return 1
        subjects = self._subjects.filters(want.filter)
        sids = _sids(want)
        if sids[0] in self._subs:
            return 0
        queue = b"" if want.group is None else quote(want.group, safe=_SAFE).encode()
        waiting: list[asyncio.Future[None]] = []
        for sid, subject in zip(sids, subjects, strict=False):
            self._subs[sid] = _Sub(want, (want.id,))
            waiting.append(connection.subscribe(subject, sid, queue))
        try:
            await asyncio.wait(waiting)
            for each in waiting:
                each.result()
        except (Denied, LimitExceeded, Lost) as error:
            self._take_back(connection, sids, waiting)
            if isinstance(error, Denied):
                raise subscribe_denied(want.filter, want.group) from None
            if isinstance(error, LimitExceeded):
                raise LimitReached(
                    f"the server allows no further subscription, so none to {want.filter!r}",
                    hint="raise max_subscriptions there, or subscribe with wildcards",
                    backend="nats",
                    topic=want.filter,
                ) from None
            raise self._not_connected() from error
        except BaseException:
            self._take_back(connection, sids, waiting)
            raise
        return 0

    def _take_back(
        self, connection: Connection, sids: tuple[int, ...], waiting: list[asyncio.Future[None]]
    ) -> None:
        for each in waiting:
            if not each.cancel() and not each.cancelled():
                each.exception()
        if connection is not self._connection:
            return
        for sid in sids:
            if self._subs.pop(sid, None) is not None:
                connection.unsubscribe(sid)

    async def unsubscribe(self, want: WireSub) -> None:
        """Unsubscribe; return when the server has."""
        connection = self._connection
        if connection is None:
            return
        if self._stream is not None:
            with contextlib.suppress(Lost):
                await self._stream.unsubscribe(want)
            return
        for sid in _sids(want):
            if self._subs.pop(sid, None) is not None:
                connection.unsubscribe(sid)
        try:
            await connection.ping()
        except Lost:
            return  # with the connection the subscription is gone

    # --- stream mode ---------------------------------------------------------------------------

    async def repeat_retained(self, want: WireSub) -> None:
        """Deliver what is retained once more."""
        if self._stream is not None:
            with self._lost_is_not_connected():
                await self._stream.repeat_retained(want)

    async def history(self, filter: str, query: HistoryQuery) -> AsyncIterator[InFrame]:
        """Yield what the stream holds."""
        self._online()
        with self._lost_is_not_connected():
            found = self._streaming().history(filter, query)
            try:
                async for frame in found:
                    yield frame
            finally:
                await found.aclose()

    async def last(self, topic: str) -> InFrame | None:
        """Return the retained message of *topic*."""
        self._online()
        with self._lost_is_not_connected():
            return await self._streaming().last(topic)

    async def watch_presence(self, watch: Watch) -> Sequence[Member]:
        """Begin to tell who is subscribed; return who is."""
        with self._lost_is_not_connected():
            return await self._members().watch(watch, self._interest)

    async def unwatch_presence(self, watch: Watch) -> None:
        """Stop telling."""
        self._members().unwatch(watch)

    async def members(self, topic: str) -> Sequence[Member]:
        """Return who is subscribed now."""
        with self._lost_is_not_connected():
            return await self._members().members(topic)

    async def watch_notifications(self, watch: Watch) -> None:
        """Tell who wants what, and every change."""
        with self._lost_is_not_connected():
            await self._members().watch(watch, self._interest)

    async def unwatch_notifications(self, watch: Watch) -> None:
        """Stop telling."""
        self._members().unwatch(watch)

    def _members(self) -> Presence:
        self._online()
        presence = self._streaming().presence
        if presence is None:
            raise NotSupported(
                Cap.PRESENCE,
                why="a client's filters are told to nobody",
                hint="set presence=true",
                backend="nats",
            )
        return presence

    def _interest(self, event: InterestEvent) -> None:
        if self._sink is not None:
            self._sink.interest(event)

    def _user(self) -> str:
        """Return our user name; not one that is a token."""
        address = self.context.address
        if self._options.username is not None:
            return self._options.username
        return address.username or "" if address.password is not None else ""

    def settle(self, tag: object, verdict: Verdict) -> None:
        """Tell the consumer what became of a message."""
        if isinstance(tag, Tag):
            self._streaming().settle(tag, verdict)

    def pause(self) -> bool:
        """Hold the server back; in core mode it would cut us off."""
        if self._stream is None:
            return False
        self._stream.pause()
        return True

    def resume(self) -> None:
        """Let messages flow again."""
        if self._stream is not None:
            self._stream.resume()

    def _streaming(self) -> StreamMode:
        if self._stream is None:
            raise NotSupported(Cap.HISTORY, why=NOTHING_STORED, hint=NAME_A_STREAM, backend="nats")
        return self._stream

    @contextlib.contextmanager
    def _lost_is_not_connected(self) -> Generator[None, None, None]:
        try:
            yield
        except Lost as error:
            raise self._not_connected() from error
        except (ApiError, Denied) as error:
            raise PubSubError(
                f"the stream does not answer: {str(error) or 'the permissions deny it'}",
                hint="look at the stream and the user's permissions",
                backend="nats",
            ) from error
        except TimeoutError as error:
            raise OperationTimeout(
                "the stream stopped answering in the middle",
                hint="try again; its cluster may be choosing a leader",
                backend="nats",
            ) from error

    # --- what arrives ------------------------------------------------------------------------

    def message(self, message: Msg) -> None:
        """Hand one message over."""
        if self._stream is not None:
            self._stream.take(message)
            return
        sub, sink = self._subs.get(message.sid), self._sink
        if sub is None or sink is None:
            return  # unsubscribed meanwhile
        topic = self._subjects.topic(message.subject)
        if topic is not None and not message.header:
            sink.deliver(
                InFrame(
                    topic=topic, payload=message.payload, time=self._time(), subscriptions=sub.ids
                )
            )
            return
        frame = self._made(message, message.subject, time=self._time(), want=sub.want)
        if frame is not None:
            sink.deliver(frame)

    def _made(
        self,
        message: Msg,
        subject: bytes,
        *,
        time: float,
        want: WireSub | None,
        id: str | None = None,
        origin: Origin = Origin.LIVE,
        redelivered: bool = False,
        tag: object = None,
    ) -> InFrame | None:
        """Return the frame of a message that came, or was stored, at *time* (Unix seconds).

        None where it is for nobody: too late, our own, or on a subject that is no topic.
        """
        topic = self._subjects.topic(subject)
        if topic is None:
            self._unmapped(subject)
            return None
        headers, content_type, left = NO_HEADERS, None, None
        if message.header:
            block = parse_block(message.header)
            if want is not None and not want.echo and block.get(FROM) == self.session:
                return None
            expires = _number(block.get(EXPIRES))
            if expires is None and (ttl := parse_ttl(block.get(TTL))) is not None:
                expires = time + ttl
            if expires is not None:
                left = expires - self._time()
                if left <= 0:
                    return None
            pairs = user_pairs(block.pairs)
            headers = Headers(pairs) if pairs else NO_HEADERS
            content_type = block.get(CONTENT_TYPE)
        return InFrame(
            topic=topic,
            payload=message.payload,
            origin=origin,
            qos=0 if self._stream is None else 1,
            time=time,
            headers=headers,
            content_type=content_type,
            expires_in=left,
            id=id,
            redelivered=redelivered,
            subscriptions=None if want is None else (want.id,),
            tag=tag,
        )

    def _unmapped(self, subject: bytes) -> None:
        self.unmapped += 1
        first = subject.removeprefix(self._subjects.prefix.encode())
        # Inboxes and the server's own traffic; whoever listens to "#" hears them all.
        if self._noticed or first.startswith((b"$", b"_INBOX.", b"_R_.", b"_GR_.")):
            return
        self._noticed = True
        shown = printable(subject.decode("utf-8", "backslashreplace"))
        text = f"messages on {shown!r}, which is no topic, were dropped; `unmapped` counts them"
        logger.warning("bus %r: %s", self.context.bus, text)
        if self._sink is not None:
            self._sink.notice(Notice("unmapped", text))

    # --- helpers -----------------------------------------------------------------------------

    def _online(self) -> Connection:
        if self._connection is None:
            raise self._not_connected()
        return self._connection

    def _not_connected(self) -> NotConnected:
        return NotConnected(
            f"no session with {self._server}",
            hint="wait until the bus is online",
            backend="nats",
        )


# Anything but white space may stand in the name of a queue group.
_SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")


def _sids(want: WireSub) -> tuple[int, int]:
    """Return the numbers of the one or two subscriptions that *want* is; 1 is the inbox's."""
    return want.id * 2, want.id * 2 + 1


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return None
