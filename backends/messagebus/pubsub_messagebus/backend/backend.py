"""The messagebus as the core sees it: the one place where core words become its own.

The first level of a core topic is the feed, the rest the topic; ``a`` alone is feed ``a`` with
the topic without a name. Options name feeds of several levels, or one feed for everything.

`Session` is one login and its fences, `Interest` knows the subscribers, `Questions` passes on
requests for authorization. Each session has its own three, so nothing of an old one survives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

from pubsub_core import interfaces
from pubsub_core.capabilities import Cap, ConfirmedBy, Support
from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    NotConnected,
    Outcome,
    PublishFailed,
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
from pubsub_messagebus.handlers import AuthorizationHandler
from pubsub_messagebus.options import MessageBusOptions
from pubsub_messagebus.protocol import (
    ADMIN_FEED,
    DataPacket,
    Flag,
    ForwardedMulticastData,
    ForwardedSubscriptionRequest,
    ForwardedUnicastData,
    Message,
    ProtocolError,
    encode_authorization_response,
    encode_multicast,
    encode_subscription_request,
    encode_unicast,
)
from pubsub_messagebus.protocol import AuthorizationRequest as Question

from .authorization import Questions, Tag
from .dial import WANTS_CERTIFICATE, WANTS_TLS, Dialler, tls_error
from .interest import Interest
from .link import Link
from .names import Pair, TopicNames
from .session import Session, not_connected

__all__ = ["MessageBusBackend"]

logger = logging.getLogger("pubsub_messagebus.backend")

_SOURCES = 4096
# Seconds in which the first fence must come back. The original has been seen to take one
# before it reads the first message of a connection (its threads wait for a pool).
_SILENCE = 3.0
_SILENCE_AGAIN = 0.5
_MISSING_RIGHT = (
    "the user lacks the role Subscribe on feeds whose names begin with '__sync__', or the "
    "server wants authorization there; at the original these are feeds that are not listed"
)
# How often a server that took the credentials before may refuse them before we give up.
_REFUSALS = 3


class _Current(NamedTuple):
    """The parts of one session."""

    session: Session
    interest: Interest
    questions: Questions


class MessageBusBackend(Backend):
    """One session with a distributor.

    It is also what `Bus.native` gives: `multicast`, `unicast` and `answer` speak the
    broker's words, and `authorization_handlers` takes handlers of the native client.

    Attributes:
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
        self._dialler = Dialler(context.address, options, context.clock, backend=self._name)
        self._names = TopicNames(options.feed, options.feeds)
        # Whether a fence has come back from this server, and whether one has not.
        self._proven = False
        self._silent = False
        self._refusals = 0
        self._closed = False
        self._current: _Current | None = None
        self._pairs: dict[int, Pair] = {}
        self._topics: dict[tuple[str, str], str] = {}
        self._sources = BoundedCache[tuple[str, str], Member](_SOURCES)
        self.authorization_handlers: list[AuthorizationHandler] = []

    # --- names ---------------------------------------------------------------------------

    def pair(self, topic: str) -> tuple[str, str]:
        """Return feed and topic of a core topic."""
        return self._names.pair(topic)

    def topic_of(self, feed: str, topic: str) -> str:
        """Return the core topic of a feed and a topic."""
        return self._names.core(feed, topic)

    # --- sessions ------------------------------------------------------------------------

    @property
    def endpoint(self) -> interfaces.Endpoint:
        """Where `open` connects to."""
        return self._dialler.endpoint

    @property
    def client_id(self) -> uuid.UUID:
        """Our own identifier in this session; 0 without one."""
        return uuid.UUID(int=0) if self._current is None else self._current.session.client_id

    async def open(self, sink: Sink) -> SessionFacts:
        """Connect, log in, and wait until the first fence comes back."""
        if self._closed:
            raise ConnectError("the backend was closed", backend=self._name, retryable=False)
        self._forget()
        link = await self._dialler.connect(self)
        clock = self.context.clock
        session = Session(link, sink, self.context.address, clock, backend=self._name)
        interest = Interest(session, self._names, backend=self._name)
        questions = Questions(session, self._names, self.authorization_handlers)
        self._current = _Current(session, interest, questions)
        try:
            if self._proven:
                await session.confirm()
            elif not await session.confirm_first(_SILENCE_AGAIN if self._silent else _SILENCE):
                self._go_on_unconfirmed(session)
        except NotConnected:
            self._forget()
            raise self._not_accepted(link) from link.error
        except BaseException:
            self._forget()
            link.fail(ConnectionError("given up"))
            raise
        session.online = True
        self._refusals = 0
        self._proven = session.confirms
        if self._options.keepalive:
            session.spawn(session.keep_alive(self._options.keepalive), "keepalive")
        client_id = str(session.client_id) if session.confirms else ""
        return SessionFacts(client_id=client_id, server="messagebus distributor")

    def _go_on_unconfirmed(self, session: Session) -> None:
        """Work with a server that tells nothing, and say which right is missing.

        It may also have refused the credentials: the original keeps such a connection open
        and says nothing, so the two look the same.
        """
        self._silent = True
        if self._options.keepalive:
            session.link.watch(self._options.keepalive)
        text = f"{self.context.address} confirms nothing: {_MISSING_RIGHT}"
        if self._dialler.logs_in:
            text += "; or it refuses the credentials, which some servers do in silence"
        logger.warning("%s", text)
        session.sink.notice(Notice("unconfirmed", text))

    def _not_accepted(self, link: Link) -> ConnectError:
        address = self.context.address
        # Under TLS 1.3 the server asks for our certificate after the client has begun, so a
        # missing one shows only here; asyncio's server closes before its alert is sent.
        wants = WANTS_CERTIFICATE if self._dialler.endpoint.tls else WANTS_TLS
        logs_in = self._dialler.logs_in
        if isinstance(link.error, ssl.SSLError):
            return tls_error(link.error, address, backend=self._name)
        if isinstance(link.error, ProtocolError):
            return ConnectError(
                f"{address} does not speak the messagebus protocol: {link.error}",
                hint="look at the port and the option dialect",
                backend=self._name,
            )
        if logs_in and not (self._proven and isinstance(link.error, ConnectionResetError)):
            # A server says nothing about credentials; it closes, before anything else. One
            # that took them before may also be going down, so it is asked a few times more:
            # a server that stops is soon gone, and one that refuses goes on refusing. A reset
            # is no refusal but a crash, or a server that has too much to do.
            self._refusals += 1
            refused = not self._proven or self._refusals >= _REFUSALS
            return (AuthenticationFailed if refused else ConnectError)(
                f"{address} closed the connection after the handshake",
                hint="look at user name, password or token, and at the option handshake"
                f"{'; it took them before' if self._proven else ''}{wants}",
                backend=self._name,
            )
        return ConnectError(
            f"{address} closed the connection",
            hint=("" if logs_in else "does the server want a user name?") + wants,
            backend=self._name,
        )

    def ended(self, link: Link) -> None:
        """Learn that a connection is over."""
        session = None if self._current is None else self._current.session
        if session is None or session.link is not link:
            return
        was_online = session.online
        self._forget()
        if was_online:
            error = ConnectError(f"lost {self.context.address}: {link.error}", backend=self._name)
            error.__cause__ = link.error
            session.sink.lost(error)

    def _forget(self) -> Session | None:
        """Leave the current session, and return it; its link is left alone."""
        current, self._current = self._current, None
        self._pairs.clear()
        self._topics.clear()
        if current is None:
            return None
        current.session.end()
        return current.session

    async def drop(self) -> None:
        """End the session as if it had been lost."""
        session = self._forget()
        if session is not None:
            session.link.fail(ConnectionError("dropped"))
            await asyncio.wait([session.link.closed], timeout=1)
            await session.ended()

    async def close(self, *, drain: float) -> None:
        """Close after the transport has sent its buffer."""
        self._closed = True
        session = self._forget()
        if session is not None:
            await session.link.finish(drain)
            await session.ended()

    async def probe(self) -> Mapping[Cap, Support]:
        """Lower the capabilities that this dialect or server lacks."""
        found: dict[Cap, Support] = {}
        if self._options.dialect == "is_image":
            found[Cap.CONTENT_TYPE] = Support.none(
                "the dialect is_image has no content type", "dialect=content_type"
            )
        if self._current is not None and not self._current.session.confirms:
            found[Cap.PING] = found[Cap.PRESENCE] = Support.none(_MISSING_RIGHT)
        return found

    async def ping(self) -> float:
        """Return the seconds of a round trip through the fence."""
        clock = self.context.clock
        began = clock.monotonic()
        await self._session.confirm()
        return clock.monotonic() - began

    @property
    def _session(self) -> Session:
        return self._get.session

    @property
    def _get(self) -> _Current:
        if self._current is None:
            raise not_connected(self.context.address, self._name)
        return self._current

    # --- publishing ------------------------------------------------------------------------

    def try_publish(self, out: OutFrame) -> Receipt | None:
        """Publish at once, unless the transport is full."""
        session = self._session
        if not session.online:
            raise session.not_connected()
        if not session.link.room.is_set():
            return None
        session.link.write(self._frame(out, None))
        return Receipt(out.topic, ConfirmedBy.TRANSPORT)

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish when the transport has room."""
        return await self._publish(out, None)

    async def send_to(self, member: str, out: OutFrame) -> Receipt:
        """Send to one subscriber of the topic; other clients receive nothing."""
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
        session = self._session
        if not session.online:
            raise session.not_connected()
        frame = self._frame(out, target)
        await session.link.room.wait()
        if session.over:
            raise NotConnected(
                f"lost {self.context.address} before the message was sent",
                hint="wait until the bus is online",
                backend=self._name,
            )
        session.link.write(frame)
        return Receipt(out.topic, ConfirmedBy.TRANSPORT)

    def _frame(self, out: OutFrame, target: uuid.UUID | None) -> bytes:
        feed, topic = self._names.pair(out.topic)
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
        """Subscribe; return when the server has acted on it. A refusal is silent."""
        session = self._session
        if want.id not in self._pairs:
            pair = self._names.pair(want.filter)
            self._pairs[want.id] = pair
            self._topics[pair] = want.filter
            session.send(encode_subscription_request(pair.feed, pair.topic, True))
        await session.confirm()
        return 0

    async def unsubscribe(self, want: WireSub) -> None:
        """Unsubscribe; return when the server has acted on it."""
        pair = self._pairs.pop(want.id, None)
        if self._current is None or pair is None:
            return
        session = self._current.session
        self._topics.pop(pair, None)
        session.send(encode_subscription_request(pair.feed, pair.topic, False))
        with contextlib.suppress(NotConnected):
            await session.confirm()

    # --- arrivals ----------------------------------------------------------------------------

    def take(self, link: Link, message: Message) -> None:
        """Act on one message of the server."""
        current = self._current
        if current is None or link is not current.session.link:
            return
        if isinstance(message, (ForwardedMulticastData, ForwardedUnicastData)):
            self._data(current, message)
        elif isinstance(message, ForwardedSubscriptionRequest):
            if not current.session.pass_fence(message):
                current.interest.take(message)
        elif isinstance(message, Question):
            current.questions.take(message)

    def _data(
        self, current: _Current, message: ForwardedMulticastData | ForwardedUnicastData
    ) -> None:
        pair = (message.feed, message.topic)
        topic = self._topics.get(pair)
        if topic is None:
            return  # unsubscribed meanwhile, or a subscription that an authorizer forced
        sink = current.session.sink
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
                current.session.spawn(self._tell_apart(current, pair, topic), "notice")
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

    async def _tell_apart(self, current: _Current, pair: tuple[str, str], topic: str) -> None:
        """Find out which of two things a server's notice means; its bytes are the same for both.

        After a denial or a revocation we are not subscribed; after the end of a publisher we
        are. The feed's listing tells, where we have the role Notify; elsewhere it is empty,
        as it is when nobody is left, and nothing tells the two apart.
        """
        session = current.session
        if not session.confirms:
            text = f"this client may not see {topic!r}, or its publisher went away"
            session.sink.notice(Notice("not_entitled", text, topic))
            return
        try:
            subscribed = await current.interest.is_subscribed(*pair, session.client_id)
        except NotConnected:
            return
        if subscribed:
            notice = Notice("source_lost", f"the publisher of {topic!r} went away", topic)
        else:
            notice = Notice("not_entitled", f"this client may not see {topic!r}", topic)
        session.sink.notice(notice)

    # --- interest ----------------------------------------------------------------------------

    async def watch_notifications(self, watch: Watch) -> None:
        """Tell the subscriptions to a feed, then every change."""
        current = self._get
        sink = current.session.sink
        for topic, member in await current.interest.watch(watch):
            sink.interest(InterestEvent(InterestKind.JOINED, topic, member, watches=(watch.id,)))
        sink.interest(InterestEvent(InterestKind.SYNCED, watch.filter, watches=(watch.id,)))

    async def unwatch_notifications(self, watch: Watch) -> None:
        """Stop telling."""
        if self._current is not None:
            self._current.interest.unwatch(watch)

    async def watch_presence(self, watch: Watch) -> Sequence[Member]:
        """Tell who joins and leaves; return the present members."""
        return [member for _, member in await self._get.interest.watch(watch)]

    async def unwatch_presence(self, watch: Watch) -> None:
        """Stop telling."""
        if self._current is not None:
            self._current.interest.unwatch(watch)

    async def members(self, topic: str) -> Sequence[Member]:
        """Return the present subscribers."""
        return await self._get.interest.members(topic)

    # --- authorization -----------------------------------------------------------------------

    async def watch_authorizations(self, filter: str) -> None:
        """Ask the sink about clients that want topics matching *filter*."""
        self._get.questions.watch(filter)

    async def unwatch_authorizations(self, filter: str) -> None:
        """Stop asking; later requests wait for the next authorizer."""
        if self._current is not None:
            self._current.questions.unwatch(filter)

    async def authorize(
        self, request: AuthorizationRequest, entitlements: Entitlements | None
    ) -> None:
        """Answer; a set without any entitlement is a no, unless the option everyone is set.

        `EVERYTHING` is the broker's "no authorization required". Returns when the distributor
        has acted on it.
        """
        client_id, feed, topic = cast("Tag", request.tag)
        required = entitlements is not EVERYTHING
        held: set[int] | None = None
        if entitlements is not None and not isinstance(entitlements, Everything):
            held = set(entitlements)
            if self._options.everyone is not None:
                held.add(self._options.everyone)
        session = self._session
        session.send(encode_authorization_response(client_id, feed, topic, required, held))
        await session.confirm()

    # --- the broker's own words ------------------------------------------------------------------

    def multicast(
        self, feed: str, topic: str, flag: Flag, packets: Sequence[DataPacket] | None
    ) -> None:
        """Publish to every subscriber of (*feed*, *topic*), an image or not."""
        self._session.send(encode_multicast(feed, topic, flag, packets, self._options.dialect))

    def unicast(
        self,
        client_id: uuid.UUID,
        feed: str,
        topic: str,
        flag: Flag,
        packets: Sequence[DataPacket] | None,
    ) -> None:
        """Send to one subscriber of (*feed*, *topic*)."""
        self._session.send(
            encode_unicast(client_id, feed, topic, flag, packets, self._options.dialect)
        )

    def answer(
        self,
        client_id: uuid.UUID,
        feed: str,
        topic: str,
        is_authorization_required: bool,
        entitlements: set[int] | None,
    ) -> None:
        """Answer what a client may see; required without entitlements is a denial."""
        self._session.send(
            encode_authorization_response(
                client_id, feed, topic, is_authorization_required, entitlements
            )
        )
