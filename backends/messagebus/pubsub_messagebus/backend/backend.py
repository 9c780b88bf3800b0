"""The messagebus as the core sees it: the one place where core words become its own.

The first level of a core topic is the feed, the rest the topic; ``a`` alone is feed ``a`` with
the topic without a name. Options name feeds of several levels, or one feed for everything.

Nothing is acknowledged, but the server acts on the messages of one client in order, and tells
it of its own subscriptions: a subscription to a private feed that comes back proves that
everything before was acted upon. That fence confirms subscriptions, logs in and measures.

Interest is counted by the server but told without counts, and the end of a connection is told
once however often it subscribed. Where a removal leaves a doubt, the feed's listing is asked
for anew and compared; so what is told here balances.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from pubsub_core import interfaces
from pubsub_core.capabilities import Cap, ConfirmedBy, Support
from pubsub_core.errors import (
    AuthenticationFailed,
    BadOption,
    ConnectError,
    InvalidFilter,
    NotConnected,
    Outcome,
    PublishFailed,
    TLSProblem,
)
from pubsub_core.events import InterestEvent, InterestKind, Notice
from pubsub_core.interfaces import (
    EVERYTHING,
    AuthorizationRequest,
    Backend,
    BackendContext,
    Entitlements,
    Everything,
    SessionFacts,
    Sink,
    Watch,
    WireSub,
)
from pubsub_core.keyed import BoundedCache
from pubsub_core.message import InFrame, Member, Origin, OutFrame, Part, Receipt
from pubsub_core.topics import TopicFilter, parse_filter
from pubsub_messagebus.handlers import AuthorizationHandler
from pubsub_messagebus.options import MessageBusOptions
from pubsub_messagebus.protocol import (
    ADMIN_FEED,
    FENCE_FEEDS,
    DataPacket,
    Decoder,
    Flag,
    ForwardedMulticastData,
    ForwardedSubscriptionRequest,
    ForwardedUnicastData,
    Message,
    ProtocolError,
    basic_handshake,
    encode_authorization_response,
    encode_multicast,
    encode_notification_request,
    encode_subscription_request,
    encode_unicast,
    token_handshake,
)
from pubsub_messagebus.protocol import AuthorizationRequest as WireAuthorizationRequest

__all__ = ["MessageBusBackend"]

logger = logging.getLogger("pubsub_messagebus.backend")

_DEFAULT_PORT = 9001
_HIGH = 1024 * 1024
_SOURCES = 4096
_WANTS_TLS = " (a port that wants TLS is messagebus+tls://)"
# As many as our own distributor lets wait.
_QUESTIONS = 10_000


class _Pair(NamedTuple):
    """The broker's name of a topic."""

    feed: str
    topic: str


class _Link(asyncio.Protocol):
    """One connection: bytes in, messages to the backend; frames out."""

    def __init__(self, backend: MessageBusBackend, decoder: Decoder) -> None:
        self._backend = backend
        self._decoder = decoder
        self.transport: asyncio.Transport | None = None
        self.room = asyncio.Event()
        self.room.set()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.heard = False
        self.error: BaseException | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH)

    def data_received(self, data: bytes) -> None:
        """Hand complete messages over."""
        self.heard = True
        decoder = self._decoder
        decoder.feed(data)
        take = self._backend.take
        try:
            while (message := decoder.next_message()) is not None:
                take(self, message)
        except ProtocolError as error:
            self.fail(error)

    def pause_writing(self) -> None:
        """Let publishers wait."""
        self.room.clear()

    def resume_writing(self) -> None:
        """Let publishers go on."""
        self.room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the end."""
        self.error = self.error or exc or ConnectionError("the distributor closed the connection")
        self.room.set()
        if not self.closed.done():
            self.closed.set_result(None)
        self._backend.ended(self)

    def write(self, data: bytes) -> None:
        """Write whole messages."""
        if self.transport is not None:
            self.transport.write(data)

    def fail(self, error: BaseException) -> None:
        """End at once, for this reason."""
        self.error = self.error or error
        if self.transport is not None:
            self.transport.abort()


class _FeedView:
    """Who is subscribed to what on one feed, as far as somebody watches.

    Attributes:
        known: Who is there, by topic and client id.
        counts: How often they subscribed, or None where only the listing told of them.
        window: The last word on each pair since a listing was asked for; None outside.
        muted: Between two listings nothing counts.
        dirty: A removal left a doubt.
    """

    def __init__(self, feed: str) -> None:
        self.feed = feed
        self.known: dict[tuple[str, uuid.UUID], Member] = {}
        self.counts: dict[tuple[str, uuid.UUID], int | None] = {}
        self.watches: dict[int, tuple[Watch, TopicFilter]] = {}
        self.window: dict[tuple[str, uuid.UUID], tuple[bool, Member]] | None = None
        self.muted = False
        self.dirty = False
        self.users = 0
        self.working: asyncio.Task[None] | None = None


class MessageBusBackend(Backend):
    """One session with a distributor.

    It is also what `Bus.native` gives: `multicast`, `unicast` and `answer` speak the
    broker's words, and `authorization_handlers` takes handlers of the native client.

    Attributes:
        client_id: Our own identifier in this session.
        authorization_handlers: Called when a client waits for authorization, with
            ``(client_id, host, user, feed, topic)``.
    """

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        options = context.options
        if not isinstance(options, MessageBusOptions):
            raise TypeError(f"options are a {type(options).__name__}, not MessageBusOptions")
        self._options = options
        self._name = context.info.name
        self._time = context.clock.time
        address = context.address
        if not address.host:
            raise BadOption(
                f"{address} names no host", hint="messagebus://localhost", backend=self._name
            )
        if address.path not in ("", "/"):
            raise BadOption(
                f"the path {address.path!r} means nothing for {address.scheme}://",
                hint="leave it out; feeds are the first level of topics",
                backend=self._name,
            )
        self._port = _DEFAULT_PORT if address.port is None else address.port
        self._endpoint = interfaces.Endpoint(
            address.host,
            self._port,
            address.scheme == "messagebus+tls",
        )
        self._handshake = self._make_handshake()
        self._proven = False
        self._feeds = tuple(sorted(options.feeds, key=len, reverse=True))
        self._link: _Link | None = None
        self._sink: Sink | None = None
        self._online = False
        self._closed = False
        self._pairs: dict[int, _Pair] = {}
        self._topics: dict[_Pair | tuple[str, str], str] = {}
        self._views: dict[str, _FeedView] = {}
        self._sources = BoundedCache[tuple[str, str], Member](_SOURCES)
        self._authorizing: dict[str, TopicFilter] = {}
        # What was asked before anybody here was there to answer; a new authorizer is asked
        # at once about every client that waits.
        self._questions: dict[tuple[uuid.UUID, str, str], WireAuthorizationRequest] = {}
        self._fence_name = ""
        self._fence_number = 0
        self._fences: dict[str, asyncio.Future[None]] = {}
        self._fence: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.client_id = uuid.UUID(int=0)
        self.authorization_handlers: list[AuthorizationHandler] = []

    def _make_handshake(self) -> bytes:
        options, address = self._options, self.context.address
        username = options.username if options.username is not None else address.username
        password = options.password if options.password is not None else address.password
        try:
            if options.token is not None:
                return token_handshake(
                    options.token.reveal(),
                    options.impersonating,
                    options.forwarded_for,
                    options.application,
                    form=options.handshake,
                )
            if username is None:
                return b""
            return basic_handshake(
                username,
                password.reveal() if password is not None else "",
                options.impersonating,
                options.forwarded_for,
                options.application,
                form=options.handshake,
            )
        except ValueError as error:
            raise BadOption(str(error), option="handshake", backend=self._name) from None

    # --- topics --------------------------------------------------------------------------

    def pair(self, topic: str) -> tuple[str, str]:
        """Return feed and topic of a core topic."""
        feed = self._options.feed
        if feed is not None:
            return feed, topic
        for name in self._feeds:
            if topic == name or topic.startswith(f"{name}/"):
                return name, topic[len(name) + 1 :]
        feed, _, rest = topic.partition("/")
        return feed, rest

    def topic_of(self, feed: str, topic: str) -> str:
        """Return the core topic of a feed and a topic."""
        if self._options.feed is not None and feed == self._options.feed:
            return topic
        return f"{feed}/{topic}" if topic else feed

    # --- sessions ------------------------------------------------------------------------

    @property
    def endpoint(self) -> interfaces.Endpoint:
        """Where `open` connects to."""
        return self._endpoint

    async def open(self, sink: Sink) -> SessionFacts:
        """Connect, log in, and wait until the server shows that it acts on what we send."""
        if self._closed:
            raise ConnectError("the backend was closed", backend=self._name, retryable=False)
        self._forget_session()
        self._sink = sink
        loop = asyncio.get_running_loop()
        context = self._ssl_context() if self._endpoint.tls else None
        decoder = Decoder("client", dialect=self._options.dialect)
        try:
            _, link = await loop.create_connection(
                lambda: _Link(self, decoder),
                self._endpoint.host,
                self._port,
                ssl=context,
                server_hostname=None if context is None else self._endpoint.host,
            )
        except ssl.SSLError as error:
            raise TLSProblem(
                f"TLS with {self.context.address} failed: {error.reason or error}",
                hint="look at the certificate, the host name and ca_file",
                backend=self._name,
            ) from error
        except OSError as error:
            hung_up = isinstance(error, ConnectionResetError) and context is not None
            raise ConnectError(
                f"cannot connect to {self.context.address}: "
                f"{error.strerror or str(error) or type(error).__name__}",
                hint="does that port speak TLS? one without it wants messagebus://"
                if hung_up
                else "is the distributor running there?",
                backend=self._name,
            ) from error
        self._link = link
        try:
            if self._handshake:
                link.write(self._handshake)
            await self._confirm()
        except NotConnected:
            self._link = None
            raise self._not_accepted(link) from link.error
        except BaseException:
            self._link = None
            link.fail(ConnectionError("given up"))
            raise
        self._online = True
        self._proven = True
        if self._options.keepalive:
            self._spawn(self._keep_alive(link), "keepalive")
        return SessionFacts(client_id=str(self.client_id), server="messagebus distributor")

    def _not_accepted(self, link: _Link) -> ConnectError:
        if isinstance(link.error, ProtocolError):
            return ConnectError(
                f"{self.context.address} does not speak the messagebus protocol: {link.error}",
                hint="look at the port and the option dialect",
                backend=self._name,
            )
        if self._handshake and not self._proven:
            # A server says nothing about credentials; it closes, before anything else.
            return AuthenticationFailed(
                f"{self.context.address} closed the connection after the handshake",
                hint="look at user name, password or token, and at the option handshake"
                f"{_WANTS_TLS if not self._endpoint.tls else ''}",
                backend=self._name,
            )
        return ConnectError(
            f"{self.context.address} closed the connection",
            hint=("does the server want a user name?" if not self._handshake else "")
            + ("" if self._endpoint.tls else _WANTS_TLS),
            backend=self._name,
        )

    def _ssl_context(self) -> ssl.SSLContext:
        options = self._options
        if options.ssl_context is not None:
            return cast("ssl.SSLContext", options.ssl_context)
        files = f"ca_file {options.ca_file!r}"
        try:
            context = ssl.create_default_context(cafile=options.ca_file)
            if options.cert_file:
                files = f"cert_file {options.cert_file!r}"
                if options.key_file:
                    files += f", key_file {options.key_file!r}"
                context.load_cert_chain(options.cert_file, options.key_file)
        except OSError as error:
            # OpenSSL's own text names no file.
            why = error if isinstance(error, ssl.SSLError) else error.strerror or error
            raise TLSProblem(
                f"{files} cannot be used: {why}",
                hint="name files in PEM that this process may read",
                backend=self._name,
            ) from error
        if options.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def ended(self, link: _Link) -> None:
        """Learn that a connection is over."""
        if link is not self._link:
            return
        was_online, sink = self._online, self._sink
        self._forget_session()
        if was_online and sink is not None:
            error = ConnectError(f"lost {self.context.address}: {link.error}", backend=self._name)
            error.__cause__ = link.error
            sink.lost(error)

    def _forget_session(self) -> None:
        self._link = None
        self._sink = None
        self._online = False
        self._pairs.clear()
        self._topics.clear()
        self._views.clear()
        self._authorizing.clear()
        self._questions.clear()
        fences = list(self._fences.values())
        if self._fence is not None:
            fences.append(self._fence)
        self._fences.clear()
        self._fence = None
        self._fence_name = f"{FENCE_FEEDS}{uuid.uuid4()}"
        for fence in fences:
            if not fence.done():
                fence.set_result(None)
        for task in tuple(self._tasks):
            task.cancel()

    async def drop(self) -> None:
        """End the session as if it had been lost."""
        link = self._link
        self._forget_session()
        if link is not None:
            link.fail(ConnectionError("dropped"))
            await asyncio.wait([link.closed], timeout=1)
        await self._end_tasks()

    async def close(self, *, drain: float) -> None:
        """Close, after what the transport holds was written."""
        self._closed = True
        link = self._link
        self._forget_session()
        if link is not None and link.transport is not None:
            link.transport.close()
            try:
                await asyncio.wait([link.closed], timeout=max(drain, 0.0))
            finally:
                if not link.closed.done():
                    link.transport.abort()
            await asyncio.wait([link.closed], timeout=1)
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=1)

    async def probe(self) -> Mapping[Cap, Support]:
        """Lower what the dialect does not have."""
        if self._options.dialect == "is_image":
            return {
                Cap.CONTENT_TYPE: Support.none(
                    "the dialect is_image has no content type", "dialect=content_type"
                )
            }
        return {}

    async def ping(self) -> float:
        """Return the seconds of a round trip through the fence."""
        clock = self.context.clock
        began = clock.monotonic()
        await self._confirm()
        return clock.monotonic() - began

    async def _keep_alive(self, link: _Link) -> None:
        seconds = self._options.keepalive
        while True:
            link.heard = False
            await asyncio.sleep(seconds)
            if link.heard:
                continue
            try:
                async with asyncio.timeout(seconds / 2):
                    await self._confirm()
            except TimeoutError:
                link.fail(ConnectionError(f"no sign of life for {1.5 * seconds:g} s"))
                return
            except NotConnected:
                return

    # --- the fence -----------------------------------------------------------------------

    async def _confirm(self) -> None:
        """Return when the server has acted on everything sent so far."""
        if self._link is None:
            raise self._not_connected()
        fence = self._fence
        if fence is None:
            loop = asyncio.get_running_loop()
            fence = self._fence = loop.create_future()
            loop.call_soon(self._send_fence, fence)
        link = self._link
        # Others wait for the same one.
        await asyncio.shield(fence)
        if self._link is not link:
            raise self._not_connected()

    def _send_fence(self, fence: asyncio.Future[None]) -> None:
        if self._fence is not fence or self._link is None:
            return
        self._fence = None
        self._fence_number += 1
        name = f"{self._fence_name}/{self._fence_number}"
        self._fences[name] = fence
        self._link.write(
            encode_notification_request(name, True) + encode_subscription_request(name, "x", True)
        )

    def _pass_fence(self, link: _Link, message: ForwardedSubscriptionRequest) -> None:
        fence = self._fences.pop(message.feed, None)
        if fence is None or not message.is_add:
            return
        self.client_id = message.client_id
        link.write(
            encode_subscription_request(message.feed, "x", False)
            + encode_notification_request(message.feed, False)
        )
        if not fence.done():
            fence.set_result(None)

    # --- publishing ------------------------------------------------------------------------

    def try_publish(self, out: OutFrame) -> Receipt | None:
        """Publish at once, unless the transport is full."""
        link = self._link
        if link is None or not self._online:
            raise self._not_connected()
        if not link.room.is_set():
            return None
        link.write(self._frame(out, None))
        return Receipt(out.topic, ConfirmedBy.TRANSPORT)

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish when the transport has room."""
        return await self._publish(out, None)

    async def send_to(self, member: str, out: OutFrame) -> Receipt:
        """Send to one subscriber of the topic; to anybody else nothing arrives."""
        try:
            target = uuid.UUID(member)
        except ValueError:
            raise PublishFailed(
                f"{member!r} is no member id",
                outcome=Outcome.NOT_SENT,
                hint="use the id of a Member that notifications or presence told of",
                backend=self._name,
                topic=out.topic,
                retryable=False,
            ) from None
        return await self._publish(out, target)

    async def _publish(self, out: OutFrame, target: uuid.UUID | None) -> Receipt:
        link = self._link
        if link is None or not self._online:
            raise self._not_connected()
        frame = self._frame(out, target)
        await link.room.wait()
        if self._link is not link:
            raise NotConnected(
                f"lost {self.context.address} before the message was sent",
                hint="wait until the bus is online",
                backend=self._name,
            )
        link.write(frame)
        return Receipt(out.topic, ConfirmedBy.TRANSPORT)

    def _frame(self, out: OutFrame, target: uuid.UUID | None) -> bytes:
        feed, topic = self.pair(out.topic)
        dialect = self._options.dialect
        flag: Flag
        if dialect == "content_type":
            flag = out.content_type or ""
        else:
            images = self._options.images
            flag = images == "always" or (images == "unicast" and target is not None)
        parts: Iterable[Part] = out.parts or (Part(out.payload),)
        everyone = self._options.everyone
        packets = [
            DataPacket(
                set(part.entitlements) or (None if everyone is None else {everyone}), part.data
            )
            for part in parts
        ]
        try:
            if target is None:
                return encode_multicast(feed, topic, flag, packets, dialect)
            return encode_unicast(target, feed, topic, flag, packets, dialect)
        except ValueError as error:
            raise PublishFailed(
                f"the message for {out.topic!r} cannot be sent: {error}",
                outcome=Outcome.NOT_SENT,
                backend=self._name,
                topic=out.topic,
                retryable=False,
            ) from error

    # --- subscribing -----------------------------------------------------------------------

    async def subscribe(self, want: WireSub) -> int:
        """Subscribe; return when the server has acted on it. It refuses in silence."""
        link = self._link
        if link is None:
            raise self._not_connected()
        if want.id not in self._pairs:
            pair = _Pair(*self.pair(want.filter))
            self._pairs[want.id] = pair
            self._topics[pair] = want.filter
            link.write(encode_subscription_request(pair.feed, pair.topic, True))
        await self._confirm()
        return 0

    async def unsubscribe(self, want: WireSub) -> None:
        """Unsubscribe; return when the server has acted on it."""
        link = self._link
        pair = self._pairs.pop(want.id, None)
        if link is None or pair is None:
            return
        self._topics.pop(pair, None)
        link.write(encode_subscription_request(pair.feed, pair.topic, False))
        with contextlib.suppress(NotConnected):
            await self._confirm()

    # --- what arrives ------------------------------------------------------------------------

    def take(self, link: _Link, message: Message) -> None:
        """Act on one message of the server."""
        if link is not self._link:
            return
        if isinstance(message, (ForwardedMulticastData, ForwardedUnicastData)):
            self._data(message)
        elif isinstance(message, ForwardedSubscriptionRequest):
            if message.feed.startswith(FENCE_FEEDS):
                if message.feed.startswith(self._fence_name):
                    self._pass_fence(link, message)
            else:
                self._interest(message)
        elif isinstance(message, WireAuthorizationRequest):
            self._asked(message)

    def _data(self, message: ForwardedMulticastData | ForwardedUnicastData) -> None:
        sink = self._sink
        if sink is None:
            return
        pair = (message.feed, message.topic)
        topic = self._topics.get(pair)
        if topic is None:
            return  # unsubscribed meanwhile, or forced upon us by an authorizer
        packets = message.data_packets
        if packets is None and message.feed != ADMIN_FEED:
            if message.user or message.host:
                sink.notice(
                    Notice(
                        "not_entitled",
                        f"a message of {topic!r} had nothing that this client is entitled to, "
                        "or no data at all",
                        topic,
                    )
                )
            else:
                self._spawn(self._tell_apart(pair, topic), "notice")
            return
        parts: tuple[Part, ...] = ()
        payload = b""
        if packets:
            payload = packets[0].data or b""
            if len(packets) > 1 or packets[0].entitlements:
                everyone = self._options.everyone
                parts = tuple(
                    Part(
                        packet.data or b"",
                        frozenset((packet.entitlements or set()) - {everyone}),
                    )
                    for packet in packets
                )
        flag = message.flag
        sink.deliver(
            InFrame(
                topic=topic,
                payload=payload,
                origin=Origin.IMAGE if flag is True else Origin.LIVE,
                time=self._time(),
                content_type=(flag or None) if isinstance(flag, str) else None,
                source=self._source(message.user, message.host),
                parts=parts,
                native=message,
            )
        )

    def _source(self, user: str, host: str) -> Member:
        # The protocol tells user and host of a publisher, not its connection.
        key = (user, host)
        found = self._sources.get(key)
        if found is None:
            found = self._sources.keep(key, Member(f"{user}@{host}", user, host))
        return found

    async def _tell_apart(self, pair: tuple[str, str], topic: str) -> None:
        """Find out what a server's notice means: its bytes are the same for both.

        After a denial or a revocation we are not subscribed; after the end of a publisher we
        are. The feed's listing tells, where we have the role Notify; elsewhere it is empty,
        as it is when nobody is left, and nothing tells the two apart.
        """
        feed, name = pair
        try:
            async with self._viewing(feed) as view:
                await self._confirm()
                while view.working is not None:
                    await asyncio.wait([view.working])
                subscribed = (name, self.client_id) in view.known
        except NotConnected:
            return
        sink = self._sink
        if sink is None:
            return
        if subscribed:
            notice = Notice("source_lost", f"the publisher of {topic!r} went away", topic)
        else:
            notice = Notice("not_entitled", f"this client may not see {topic!r}", topic)
        sink.notice(notice)

    # --- interest ----------------------------------------------------------------------------

    async def watch_notifications(self, watch: Watch) -> None:
        """Tell who is subscribed to what on a feed, then every change."""
        view, parsed = await self._watch(watch)
        for (name, _), member in view.known.items():
            topic = self.topic_of(view.feed, name)
            if self._matches(parsed, topic):
                self._tell(InterestKind.JOINED, topic, member, (watch.id,))
        if self._sink is not None:
            self._sink.interest(
                InterestEvent(InterestKind.SYNCED, watch.filter, watches=(watch.id,))
            )

    async def unwatch_notifications(self, watch: Watch) -> None:
        """Stop telling."""
        self._unwatch(watch)

    async def watch_presence(self, watch: Watch) -> Sequence[Member]:
        """Tell who comes and goes; return who is there."""
        view, _ = await self._watch(watch)
        return self._members(view, watch.filter)

    async def unwatch_presence(self, watch: Watch) -> None:
        """Stop telling."""
        self._unwatch(watch)

    async def members(self, topic: str) -> Sequence[Member]:
        """Return who is subscribed now."""
        feed, _ = self.pair(topic)
        async with self._viewing(feed) as view:
            await self._confirm()
            while view.working is not None:
                await asyncio.wait([view.working])
            if self._views.get(feed) is not view:
                raise self._not_connected()
            return self._members(view, topic)

    def _members(self, view: _FeedView, topic: str) -> list[Member]:
        _, wanted = self.pair(topic)
        return [member for (name, _), member in view.known.items() if name == wanted]

    @staticmethod
    def _matches(parsed: TopicFilter, topic: str) -> bool:
        # On this bus every topic is literal, whatever characters another client put in it.
        return parsed.matches(topic)

    async def _watch(self, watch: Watch) -> tuple[_FeedView, TopicFilter]:
        parsed = parse_filter(watch.filter)
        feed, _ = self.pair(parsed.filter)
        if self._options.feed is None and feed in ("+", "#"):
            raise InvalidFilter(
                f"{watch.filter!r} spans all feeds, and the distributor tells of one at a time",
                topic=watch.filter,
                level=0,
                character=feed,
                hint="name the feed: 'LSE/#'",
                backend=self._name,
            )
        view = self._open_view(feed)
        try:
            await self._listed(view)
            view.watches[watch.id] = (watch, parsed)
        finally:
            view.users -= 1
            self._close_view(view)
        return view, parsed

    def _unwatch(self, watch: Watch) -> None:
        for view in tuple(self._views.values()):
            if view.watches.pop(watch.id, None) is not None:
                self._close_view(view)

    @contextlib.asynccontextmanager
    async def _viewing(self, feed: str) -> AsyncGenerator[_FeedView, None]:
        """Look at a feed for a moment."""
        view = self._open_view(feed)
        try:
            await self._listed(view)
            yield view
        finally:
            view.users -= 1
            self._close_view(view)

    def _open_view(self, feed: str) -> _FeedView:
        if self._link is None:
            raise self._not_connected()
        view = self._views.get(feed)
        if view is None:
            view = self._views[feed] = _FeedView(feed)
            view.working = self._spawn(self._list(view, first=True), "listing")
        view.users += 1
        return view

    def _close_view(self, view: _FeedView) -> None:
        if view.users or view.watches or self._views.get(view.feed) is not view:
            return
        del self._views[view.feed]
        if view.working is not None:
            view.working.cancel()
        if self._link is not None:
            self._link.write(encode_notification_request(view.feed, False))

    async def _listed(self, view: _FeedView) -> None:
        """Return when what exists is known."""
        if view.working is not None:
            await asyncio.wait([view.working])
        if self._views.get(view.feed) is not view or self._link is None:
            raise self._not_connected()

    async def _list(self, view: _FeedView, *, first: bool = False) -> None:
        """Ask for the listing and compare, until no removal leaves a doubt."""
        try:
            view.dirty = True
            while view.dirty:
                view.dirty = False
                if not first:
                    view.muted = True
                    self._send(encode_notification_request(view.feed, False))
                    await self._confirm()
                view.window = {}
                view.muted = False
                first = False
                self._send(encode_notification_request(view.feed, True))
                await self._confirm()
                self._compare(view)
        except NotConnected:
            return
        finally:
            view.working = None

    def _compare(self, view: _FeedView) -> None:
        window, view.window = view.window or {}, None
        for key, member in tuple(view.known.items()):
            if key not in window:
                del view.known[key]
                self._change(view, key[0], member, InterestKind.LEFT)
        for key, (is_add, member) in window.items():
            if not is_add:
                # It may have subscribed twice, and still be there.
                view.dirty = True
                if key not in view.known:
                    continue
            view.counts[key] = None
            if key not in view.known:
                view.known[key] = member
                self._change(view, key[0], member, InterestKind.JOINED)
        view.counts = {key: view.counts.get(key) for key in view.known}

    def _interest(self, message: ForwardedSubscriptionRequest) -> None:
        view = self._views.get(message.feed)
        if view is None or view.muted:
            return
        key = (message.topic, message.client_id)
        member = Member(str(message.client_id), message.user, message.host)
        if view.window is not None:
            view.window[key] = (message.is_add, member)
            return
        if message.is_add:
            if key in view.known:
                count = view.counts.get(key)
                view.counts[key] = None if count is None else count + 1
            else:
                view.known[key] = member
                view.counts[key] = 1
                self._change(view, message.topic, member, InterestKind.JOINED)
        elif key in view.known:
            if view.counts.get(key) == 1:
                del view.known[key], view.counts[key]
                self._change(view, message.topic, member, InterestKind.LEFT)
            else:
                view.dirty = True
                if view.working is None:
                    view.working = self._spawn(self._list(view), "listing")

    def _change(self, view: _FeedView, name: str, member: Member, kind: InterestKind) -> None:
        topic = self.topic_of(view.feed, name)
        watches = tuple(
            identity
            for identity, (_, parsed) in view.watches.items()
            if self._matches(parsed, topic)
        )
        if watches:
            self._tell(kind, topic, member, watches)

    def _tell(
        self, kind: InterestKind, topic: str, member: Member, watches: tuple[int, ...]
    ) -> None:
        if self._sink is not None:
            self._sink.interest(InterestEvent(kind, topic, member, watches=watches))

    # --- authorization -------------------------------------------------------------------------

    async def watch_authorizations(self, filter: str) -> None:
        """Ask the sink about clients that want topics matching *filter*."""
        if self._link is None:
            raise self._not_connected()
        parsed = self._authorizing[filter] = parse_filter(filter)
        for tag, message in tuple(self._questions.items()):
            if parsed.matches(self.topic_of(message.feed, message.topic)):
                del self._questions[tag]
                self._ask(message)

    async def unwatch_authorizations(self, filter: str) -> None:
        """Stop asking; what comes now waits for the next authorizer."""
        self._authorizing.pop(filter, None)

    async def authorize(
        self, request: AuthorizationRequest, entitlements: Entitlements | None
    ) -> None:
        """Answer; a set without any entitlement is a no, unless the option everyone is set.

        `EVERYTHING` is the broker's "no authorization required". Returns when the distributor
        has acted on it.
        """
        client_id, feed, topic = cast("tuple[uuid.UUID, str, str]", request.tag)
        required = entitlements is not EVERYTHING
        held: set[int] | None = None
        if entitlements is not None and not isinstance(entitlements, Everything):
            held = set(entitlements)
            if self._options.everyone is not None:
                held.add(self._options.everyone)
        self._send(encode_authorization_response(client_id, feed, topic, required, held))
        await self._confirm()

    def _asked(self, message: WireAuthorizationRequest) -> None:
        topic = self.topic_of(message.feed, message.topic)
        for handler in self.authorization_handlers:
            self._spawn(self._handle(handler, message), "authorization")
        if any(parsed.matches(topic) for parsed in self._authorizing.values()):
            self._ask(message)
        elif not self.authorization_handlers and len(self._questions) < _QUESTIONS:
            self._questions[message.client_id, message.feed, message.topic] = message

    def _ask(self, message: WireAuthorizationRequest) -> None:
        if self._sink is not None:
            member = Member(str(message.client_id), message.user, message.host)
            tag = (message.client_id, message.feed, message.topic)
            topic = self.topic_of(message.feed, message.topic)
            self._sink.authorization(AuthorizationRequest(member, topic, tag))

    async def _handle(
        self, handler: AuthorizationHandler, message: WireAuthorizationRequest
    ) -> None:
        try:
            await handler(
                message.client_id, message.host, message.user, message.feed, message.topic
            )
        except Exception:
            logger.exception("an authorization handler failed; the client goes on waiting")

    # --- the broker's own words ------------------------------------------------------------------

    def multicast(
        self, feed: str, topic: str, flag: Flag, packets: Sequence[DataPacket] | None
    ) -> None:
        """Publish to every subscriber of (*feed*, *topic*), an image or not."""
        self._send(encode_multicast(feed, topic, flag, packets, self._options.dialect))

    def unicast(
        self,
        client_id: uuid.UUID,
        feed: str,
        topic: str,
        flag: Flag,
        packets: Sequence[DataPacket] | None,
    ) -> None:
        """Send to one subscriber of (*feed*, *topic*)."""
        self._send(encode_unicast(client_id, feed, topic, flag, packets, self._options.dialect))

    def answer(
        self,
        client_id: uuid.UUID,
        feed: str,
        topic: str,
        is_authorization_required: bool,
        entitlements: set[int] | None,
    ) -> None:
        """Answer what a client may see; required without entitlements means nothing."""
        self._send(
            encode_authorization_response(
                client_id, feed, topic, is_authorization_required, entitlements
            )
        )

    # --- helpers -------------------------------------------------------------------------------

    def _send(self, frame: bytes) -> None:
        if self._link is None:
            raise self._not_connected()
        self._link.write(frame)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"pubsub messagebus {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _not_connected(self) -> NotConnected:
        return NotConnected(
            f"no session with {self.context.address}",
            hint="wait until the bus is online",
            backend=self._name,
        )
