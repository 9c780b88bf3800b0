"""MQTT as the core sees it: the one place where core words become MQTT's.

A core topic is an MQTT topic as it is. A share group is ``$share/group/filter``, headers
are user properties, a ttl is a message expiry, `WireSub.id` is the subscription identifier.

Sources: MQTT 5.0 sections 3.3.2.3, 3.8.3.1 and 4.8.2; MQTT 3.1.1 sections 3.3.1.3, 3.3.5.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace

from pubsub_core.capabilities import Cap, Guarantees, Limits, Redelivery, Support
from pubsub_core.errors import (
    InvalidFilter,
    NotConnected,
    NotSupported,
    PublishFailed,
)
from pubsub_core.interfaces import BackendContext, SessionFacts, Sink, WireSub
from pubsub_core.keyed import BoundedCache
from pubsub_core.message import NO_HEADERS, Headers, InFrame, Origin, OutFrame, Receipt, Verdict
from pubsub_core.trie import HandlerTrie
from pubsub_mqtt.connection import Connection, Subscribe
from pubsub_mqtt.connection.address import broker_address
from pubsub_mqtt.connection.session_data import settings_of
from pubsub_mqtt.options import NAME, MQTTOptions, TopicDefaults
from pubsub_mqtt.packets import NO_PROPERTIES, Incoming, publish_properties

from .connection_backend import ConnectionBackend

__all__ = ["MQTTBackend"]

logger = logging.getLogger("pubsub_mqtt")

_MAX_IDENTIFIER = 268_435_455
_CACHED_DEFAULTS = 1024
_LONGEST_GROUP = 1000

# MQTT 5.0 section 1.5.4: a receiver may close the connection over these; Mosquitto does.
_DISCOURAGED = "".join(
    map(
        chr,
        (
            *range(0x01, 0x20),
            *range(0x7F, 0xA0),
            *range(0xFDD0, 0xFDF0),
            *(plane << 16 | last for plane in range(17) for last in (0xFFFE, 0xFFFF)),
        ),
    )
)


class _Capture:
    """Retained messages of one topic, caught for `MQTTBackend.last`."""

    def __init__(self, identifier: int) -> None:
        self.identifier = identifier
        self.messages: list[Incoming] = []


class MQTTBackend(ConnectionBackend):
    """One session with any MQTT broker.

    It is also what `Bus.native` gives: `driver` and `connection` are open to those who need
    MQTT's own words.

    Attributes:
        driver: Carries the session.
        connection: Window, outcomes and counters; outlives sessions.
    """

    def __init__(self, context: BackendContext) -> None:
        options = context.options
        if not isinstance(options, MQTTOptions):
            raise TypeError(f"options are a {type(options).__name__}, not MQTTOptions")
        super().__init__(
            context,
            broker_address(context.address, options),
            Connection(
                settings_of(context.address, options),
                backend=NAME,
                clock=context.clock.monotonic,
            ),
        )
        self._options = options
        self._time = context.clock.time
        self._v5 = False
        self._identifiers = False
        self._settles = True
        # The broker may still hold subscriptions of an earlier process, whose identifiers
        # must not be taken for ours: ours begin at a random multiple of 1024.
        self._base = 0 if options.clean_start else (1 + secrets.randbelow(200_000)) * 1024
        self._highest = 0
        self._current: dict[int, WireSub] = {}
        self._known: set[int] = set()
        self._order = itertools.count(1)
        self._repeated: dict[int, int] = {}
        self._captures: dict[str, _Capture] = {}
        self._captured = 0
        self._defaults: HandlerTrie[tuple[str, TopicDefaults]] | None = None
        self._defaults_cache = BoundedCache[str, tuple[int | None, bool | None]](_CACHED_DEFAULTS)
        if options.topics or options.default_retain:
            self.topic_defaults = self._topic_defaults
        if options.topics:
            self._defaults = HandlerTrie("mqtt")
            for pattern, defaults in options.topics.items():
                self._defaults.add(pattern, (pattern, defaults))

    # --- sessions ---------------------------------------------------------------------

    async def open(self, sink: Sink) -> SessionFacts:
        """Make one session; see `Backend.open`. The core sets the deadline."""
        self._current.clear()
        self._captures.clear()
        session = await self.dial(sink)
        self._v5 = session.version == 5
        self._identifiers = session.identifiers
        self._choose_settling()
        return SessionFacts(
            resumed=session.present,
            client_id=session.client_id,
            server="MQTT 5" if self._v5 else "MQTT 3.1.1",
        )

    def pause(self) -> bool:
        """Deliver nothing more; see `Connection.pause`."""
        self.driver.pause()
        return True

    def resume(self) -> None:
        """Deliver again."""
        self.driver.resume()

    async def probe(self) -> Mapping[Cap, Support]:
        """Lower what the protocol version, the broker or the options do not allow."""
        session = self.session
        if session is None:
            return {}
        found: dict[Cap, Support] = {}
        if session.version == 4:
            remedy = "use a broker with MQTT 5 and protocol='auto'"
            missing = {
                Cap.TTL: "MQTT 3.1.1 has no message expiry",
                Cap.HEADERS: "MQTT 3.1.1 has no user properties",
                Cap.CONTENT_TYPE: "MQTT 3.1.1 has no content type",
                Cap.ECHO_CONTROL: "MQTT 3.1.1 has no no-local subscriptions",
                Cap.REFUSAL_VISIBLE: "an MQTT 3.1.1 broker cannot say that it refused a publish",
            }
            for cap, why in missing.items():
                found[cap] = Support.none(why, remedy)
            found[Cap.GROUPS] = self._shared_311()
        else:
            if session.shared is False:
                found[Cap.GROUPS] = Support.none("the broker has no shared subscriptions")
            if not session.wildcards:
                found[Cap.WILDCARDS] = Support.none("the broker takes exact topics only")
            if not session.retain:
                found[Cap.RETAINED] = Support.none("the broker keeps no retained messages")
        if not self._persistent:
            why = "the session ends with the connection"
            remedy = "set client_id and clean_start=false, or session_expiry with MQTT 5"
            found[Cap.PERSISTENT_SESSION] = Support.none(why, remedy)
            found[Cap.REDELIVERY] = Support.none(why, remedy)
        return found

    def _shared_311(self) -> Support:
        match self._options.shared_subscriptions:
            case True:
                return Support.native("shared_subscriptions=true says so")
            case False:
                return Support.none("shared_subscriptions=false says so")
            case None:
                return Support.unknown(
                    "an MQTT 3.1.1 broker does not tell; one without takes such a "
                    "subscription and delivers nothing",
                    "set shared_subscriptions, or use MQTT 5",
                )

    @property
    def _persistent(self) -> bool:
        session = self.session
        if session is None or session.version == 4:
            return not self._options.clean_start
        return session.expiry > 0

    @property
    def limits(self) -> Limits:
        """The declared limits, or less where the broker's longest packet is shorter."""
        limits = self.context.info.limits
        if self._options.strict_utf8:
            limits = replace(limits, forbidden_characters=_DISCOURAGED)
        session = self.session
        if session is None or limits.max_payload is None:
            return limits
        # Header, topic length, packet id, properties; the topic's length is checked later.
        most = max(session.max_packet_size - 10, 0)
        if most >= limits.max_payload:
            return limits
        return replace(limits, max_payload=most)

    @property
    def guarantees(self) -> Guarantees:
        """The declared ones; a persistent session adds redelivery after a reconnect."""
        guarantees = self.context.info.guarantees
        if self._persistent:
            return replace(guarantees, redelivery=Redelivery.AFTER_RECONNECT)
        return guarantees

    # --- publishing -------------------------------------------------------------------

    def _topic_defaults(self, topic: str) -> tuple[int | None, bool | None]:
        """Return quality of service and retain flag that the options set for *topic*.

        An exact topic wins over filters, among those the longest; None where the options
        say nothing.
        """
        retain: bool | None = True if self._options.default_retain else None
        if self._defaults is None:
            return None, retain
        cached = self._defaults_cache.get(topic)
        if cached is None:
            matching = sorted(
                self._defaults.match(topic), key=lambda item: (item[0] == topic, len(item[0]))
            )
            qos: int | None = None
            for _, defaults in matching:
                qos = qos if defaults.qos is None else defaults.qos
                retain = retain if defaults.retain is None else defaults.retain
            cached = self._defaults_cache.keep(topic, (qos, retain))
        return cached

    def _properties(self, out: OutFrame) -> bytes:
        if out.ttl is None and out.content_type is None and not out.headers:
            return NO_PROPERTIES
        if not self._v5:
            if out.headers or out.ttl is not None:
                raise NotSupported(
                    Cap.HEADERS if out.headers else Cap.TTL,
                    why="MQTT 3.1.1 carries a topic and a payload and nothing else",
                    backend=self.name,
                    topic=out.topic,
                )
            return NO_PROPERTIES
        try:
            return publish_properties(
                expiry=out.ttl, content_type=out.content_type, user=out.headers.pairs
            )
        except PublishFailed as exc:
            self.as_ours(exc, out.topic)
            raise

    def try_publish(self, out: OutFrame) -> Receipt | None:
        """Hand a QoS 0 message to the operating system without waiting, if that is possible."""
        if out.qos:
            return None
        return self.send_now(out, out.topic, out.payload, self._properties(out))

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish; above QoS 0 a lost session does not end the wait, closing does."""
        sent = self.submit(out, out.topic, out.payload, self._properties(out))
        return await self.receipt(sent)

    # --- subscribing ------------------------------------------------------------------

    async def subscribe(self, want: WireSub) -> int:
        """Subscribe; see `Backend.subscribe`.

        Retained messages come with the first subscription of a filter and with one that
        the broker had lost, not when only the quality of service changes.
        """
        wire = self._wire_filter(want)
        async with self.turns.of(wire):
            if not self._identifiers:
                self.check_distinct(
                    want,
                    self._current.values(),
                    why="without subscription identifiers ",
                    hint="use a broker with MQTT 5, or a second bus",
                )
            before = self._current.get(want.id)
            self._current[want.id] = want
            self._choose_settling()
            try:
                granted = await self._subscribe(want, retained=want.id not in self._known)
            except BaseException:
                if before is None:
                    self._current.pop(want.id, None)
                else:
                    self._current[want.id] = before
                raise
            self._known.add(want.id)
            return granted

    async def repeat_retained(self, want: WireSub) -> None:
        """Subscribe once more, which makes the broker send retained messages again.

        Of several calls that wait for each other, one asks the broker for all.
        """
        if want.group is not None:
            return
        asked = next(self._order)
        async with self.turns.of(want.filter):
            if want.id not in self._current or self._repeated.get(want.id, 0) > asked:
                return
            began = next(self._order)
            await self._subscribe(want, retained=True)
            self._repeated[want.id] = began

    async def _subscribe(self, want: WireSub, *, retained: bool) -> int:
        if not want.echo and not self._v5:
            raise NotSupported(
                Cap.ECHO_CONTROL,
                why="MQTT 3.1.1 has no no-local subscriptions",
                backend=self.name,
                topic=want.filter,
            )
        self._highest = max(self._highest, want.id)
        request = await self.driver.subscribe(
            Subscribe(
                self._wire_filter(want),
                want.qos,
                # No-local is a protocol error for a shared subscription (3.8.3.1).
                no_local=not want.echo and want.group is None,
                retain_handling=0 if retained else 1,
                identifier=self._base + want.id if self._identifiers else 0,
            )
        )
        refused = self.connection.refusal(request)
        if refused is not None:
            raise self.as_ours(refused, want.filter)
        return request.codes[0]

    async def unsubscribe(self, want: WireSub) -> None:
        """Drop a subscription; see `Backend.unsubscribe`."""
        wire = self._wire_filter(want)
        async with self.turns.of(wire):
            self._known.discard(want.id)
            self._repeated.pop(want.id, None)
            self._current.pop(want.id, None)
            self._choose_settling()
            await self.driver.unsubscribe(wire)

    def _wire_filter(self, want: WireSub) -> str:
        group = want.group
        if group is None:
            return want.filter
        # Brokers hang up over control characters and surrogates, as over those in topics.
        if (
            not group
            or not group.isprintable()
            or not {"/", "+", "#"}.isdisjoint(group)
            or len(group) > _LONGEST_GROUP
        ):
            raise InvalidFilter(
                f"{group[:100]!r} cannot name a share group",
                topic=want.filter,
                reason="group",
                hint=f"use 1 to {_LONGEST_GROUP} printable characters without / + #",
                backend=self.name,
            )
        return f"$share/{group}/{want.filter}"

    # --- receiving --------------------------------------------------------------------

    def _choose_settling(self) -> None:
        """Decide whether messages wait for `settle`, or are acknowledged on arrival.

        A message that waits occupies a place in the broker's window (20 at Mosquitto), so
        one handler that takes its time would stop every other subscription. That price is
        paid where it buys something: where a handler acknowledges by hand, or where the
        session survives, so that what was not acknowledged comes again.
        """
        self._settles = self._persistent or any(want.manual_ack for want in self._current.values())

    def received(self, message: Incoming) -> None:
        """Deliver a message, unless it came for `last` alone."""
        sink = self.sink
        if sink is None:
            return
        if message.serial and not self._settles:
            self.connection.settle(message.serial)
        properties = message.properties
        if properties is None:
            if self._captures and message.retain and self._capture(message, ()):
                return
            sink.deliver(
                InFrame(
                    topic=message.topic,
                    payload=message.payload,
                    origin=Origin.RETAINED if message.retain else Origin.LIVE,
                    qos=message.qos,
                    time=self._time(),
                    redelivered=message.duplicate,
                    tag=(message.serial or None) if self._settles else None,
                    native=message,
                )
            )
            return
        identifiers = properties.subscriptions
        if self._base:
            # A number that we never gave is an earlier process's: the core matches the topic.
            ours = tuple(each - self._base for each in identifiers)
            identifiers = ours if all(0 < each <= self._highest for each in ours) else ()
        if self._captures and self._capture(message, properties.subscriptions):
            return
        sink.deliver(self._frame(message, identifiers))

    def settle(self, tag: object, verdict: Verdict) -> None:
        """Acknowledge a frame: PUBACK at QoS 1, PUBREC at QoS 2.

        REJECT says so with a reason code under MQTT 5; the broker forgets it either way.
        """
        if isinstance(tag, int) and verdict is not Verdict.NACK:
            self.connection.settle(tag, refuse=verdict is Verdict.REJECT)

    # --- the retained message of a topic ------------------------------------------------

    async def last(self, topic: str) -> InFrame | None:
        """Return the retained message of *topic*, or None.

        The broker gives it to a new subscription: one is made for the exact topic (or the
        existing one is made again), and a ping behind it tells when everything that the
        broker had to give has come. Other subscriptions notice nothing of it.

        At a broker without subscription identifiers, a copy for a wildcard subscription
        that is being made at the very same time cannot be told from ours; one of the two
        is returned here and the other delivered.
        """
        async with self.turns.of(topic):
            existing = next(
                (
                    sub
                    for sub in self._current.values()
                    if sub.group is None and sub.filter == topic
                ),
                None,
            )
            self._captured = self._captured % 1000 + 1
            if not self._identifiers:
                identifier = 0
            elif existing is None:
                identifier = _MAX_IDENTIFIER - self._captured
            else:
                identifier = self._base + existing.id
            capture = self._captures[topic] = _Capture(identifier)
            try:
                if existing is not None:
                    await self._subscribe(existing, retained=True)
                    await self.driver.ping()
                else:
                    await self._ask_last(topic, identifier)
            finally:
                self._captures.pop(topic, None)
                found = self._take_captured(capture)
        if found is None:
            return None
        if found.serial:
            self.connection.settle(found.serial)
        return self._frame(found)

    async def _ask_last(self, topic: str, identifier: int) -> None:
        subscribed = False
        try:
            request = await self.driver.subscribe(Subscribe(topic, 0, identifier=identifier))
            refused = self.connection.refusal(request)
            if refused is not None:
                raise refused
            subscribed = True
            await self.driver.ping()
            subscribed = False
            await self.driver.unsubscribe(topic)
        except asyncio.CancelledError:
            # Not waited for: a cancelled task must not wait, and must not leave it behind.
            with contextlib.suppress(NotConnected):
                self.connection.unsubscribe([topic], lambda request: None)
            raise
        except BaseException:
            if subscribed:
                with contextlib.suppress(NotConnected):
                    self.connection.unsubscribe([topic], lambda request: None)
            raise

    def _capture(self, message: Incoming, identifiers: tuple[int, ...]) -> bool:
        """Keep a message that is there because of `last`; return whether it is only that."""
        capture = self._captures.get(message.topic)
        if capture is None:
            return False
        if capture.identifier:
            if capture.identifier not in identifiers:
                return False
            if not message.retain:
                # A live copy for the subscription of `last`, if it is a separate one.
                ours = capture.identifier > _MAX_IDENTIFIER - 1001
                if ours and message.serial:
                    self.connection.settle(message.serial)
                return ours
        elif not message.retain:
            return False
        capture.messages.append(message)
        return True

    def _take_captured(self, capture: _Capture) -> Incoming | None:
        """Return the newest captured message; deliver the others, which were for others."""
        if not capture.messages:
            return None
        *others, found = capture.messages
        if self.sink is not None and not capture.identifier:
            for message in others:
                self.sink.deliver(self._frame(message))
        return found

    def _frame(self, message: Incoming, identifiers: tuple[int, ...] = ()) -> InFrame:
        properties = message.properties
        user = properties.user if properties is not None else ()
        return InFrame(
            topic=message.topic,
            payload=message.payload,
            origin=Origin.RETAINED if message.retain else Origin.LIVE,
            qos=message.qos,
            time=self._time(),
            headers=Headers(user) if user else NO_HEADERS,
            content_type=properties.content_type if properties is not None else None,
            expires_in=properties.expiry if properties is not None else None,
            redelivered=message.duplicate,
            subscriptions=identifiers or None,
            tag=(message.serial or None) if self._settles else None,
            native=message,
        )
