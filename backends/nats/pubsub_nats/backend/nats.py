"""NATS as the core sees it: the one place where core words become the server's."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from pubsub_core.capabilities import Cap, ConfirmedBy, Limits, Support
from pubsub_core.errors import (
    BadOption,
    ConnectError,
    LimitReached,
    NotConnected,
    Outcome,
    PublishFailed,
)
from pubsub_core.events import Notice
from pubsub_core.interfaces import (
    Backend,
    BackendContext,
    Endpoint,
    SessionFacts,
    Sink,
    WireSub,
)
from pubsub_core.message import NO_HEADERS, Headers, InFrame, OutFrame, Receipt
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
from pubsub_nats.options import DEFAULT_PORT, HostPort, NatsOptions, host_port
from pubsub_nats.protocol import Msg, encode_pub
from pubsub_nats.subjects import Subjects

from .connection import Connection, Denied, LimitExceeded, Lost, Unsent
from .dial import Dialer

__all__ = ["NatsBackend"]

logger = logging.getLogger("pubsub_nats")

_TLS = frozenset({"nats+tls", "nats+wss"})
_WEBSOCKET = frozenset({"nats+ws", "nats+wss"})
_PORTS = {"nats+ws": 80, "nats+wss": 443}
_BROKER = ConfirmedBy.BROKER
_NO_HEADERS = "this server, or its configuration, carries no headers"


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
        self._servers = [self._home, *map(host_port, options.servers)]
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
        self.session = secrets.token_urlsafe(12)
        self.unmapped = 0

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
        self._learn_servers(info.get("connect_urls"))
        return SessionFacts(
            client_id=f"{info.get('server_id', '')}-{info.get('client_id', 0)}",
            server=f"nats-server {printable(str(info.get('version', '')))}",
        )

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
        """Add what the cluster tells of its other servers, in random order."""
        if not isinstance(urls, list) or self._dialer.websocket:
            return
        found: list[HostPort] = []
        for url in urls:  # pyright: ignore[reportUnknownVariableType] # JSON of a peer
            try:
                server = host_port(str(url))  # pyright: ignore[reportUnknownArgumentType]
            except ValueError:
                continue
            if server not in self._servers:
                found.append(server)
        random.shuffle(found)
        self._servers.extend(found)

    def told(self, info: Mapping[str, Any]) -> None:
        """Take over what the server allows from now on."""
        limit = info.get("max_payload")
        self._max_payload = limit if isinstance(limit, int) else 0

    def ended(self, connection: Connection) -> None:
        """Learn that a connection is over."""
        if connection is not self._connection:
            return
        sink = self._sink
        self._forget()
        if sink is not None:
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
        return connection

    async def drop(self) -> None:
        """End the session as if it had been lost."""
        await self.close(drain=0.0)

    async def close(self, *, drain: float) -> None:
        """End the session, after the server has acted upon what was sent."""
        connection = self._connection
        if connection is None:
            return
        # What comes now is for nobody, but publishes still hear of their PONG.
        self._sink = None
        try:
            await connection.close(drain)
        finally:
            if self._connection is connection:
                self._forget()

    async def probe(self) -> Mapping[Cap, Support]:
        """Lower what needs headers where the server carries none."""
        if self._connection is None or self._connection.info.get("headers") is True:
            return {}
        missing = Support.none(_NO_HEADERS, "nats-server 2.2 or later, without no_header_support")
        return dict.fromkeys((Cap.HEADERS, Cap.CONTENT_TYPE, Cap.TTL, Cap.ECHO_CONTROL), missing)

    @property
    def limits(self) -> Limits:
        """The declared limits, with what this server allows."""
        declared = self.context.info.limits
        if not self._max_payload:
            return declared
        return dataclasses.replace(declared, max_payload=self._max_payload)

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
        """Learn that a publish was refused; the PONG behind it tells the publisher."""

    # --- subscribing -----------------------------------------------------------------------

    async def subscribe(self, want: WireSub) -> int:
        """Subscribe; return when the server has."""
        connection = self._online()
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
        for sid in _sids(want):
            if self._subs.pop(sid, None) is not None:
                connection.unsubscribe(sid)
        try:
            await connection.ping()
        except Lost:
            return  # with the connection the subscription is gone

    # --- what arrives ------------------------------------------------------------------------

    def message(self, message: Msg) -> None:
        """Hand one message over."""
        sub, sink = self._subs.get(message.sid), self._sink
        if sub is None or sink is None:
            return  # unsubscribed meanwhile
        topic = self._subjects.topic(message.subject)
        if topic is None:
            self._unmapped(message, sink)
        elif not message.header:
            sink.deliver(
                InFrame(
                    topic=topic, payload=message.payload, time=self._time(), subscriptions=sub.ids
                )
            )
        else:
            frame = self._with_headers(message, topic, sub)
            if frame is not None:
                sink.deliver(frame)

    def _with_headers(self, message: Msg, topic: str, sub: _Sub) -> InFrame | None:
        block = parse_block(message.header)
        if not sub.want.echo and block.get(FROM) == self.session:
            return None
        now = self._time()
        expires = _expiry(block.get(EXPIRES))
        if expires is not None and expires <= now:
            return None
        pairs = user_pairs(block.pairs)
        return InFrame(
            topic=topic,
            payload=message.payload,
            time=now,
            headers=Headers(pairs) if pairs else NO_HEADERS,
            content_type=block.get(CONTENT_TYPE),
            expires_in=None if expires is None else expires - now,
            subscriptions=sub.ids,
        )

    def _unmapped(self, message: Msg, sink: Sink) -> None:
        self.unmapped += 1
        first = message.subject.removeprefix(self._subjects.prefix.encode())
        # Inboxes and the server's own traffic; whoever listens to "#" hears them all.
        if self._noticed or first.startswith((b"$", b"_INBOX.", b"_R_.", b"_GR_.")):
            return
        self._noticed = True
        subject = printable(message.subject.decode("utf-8", "backslashreplace"))
        text = f"messages on {subject!r}, which is no topic, were dropped; `unmapped` counts them"
        logger.warning("bus %r: %s", self.context.bus, text)
        sink.notice(Notice("unmapped", text))

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


def _expiry(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return None
