"""The base of every backend over MQTT: one connection, whatever its topics mean.

`MQTTBackend` is one of them; backends of services that speak MQTT with rules of their own are
others. Each adds how it publishes, subscribes and receives, and what it can do.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from pubsub_core import interfaces
from pubsub_core.capabilities import Cap, ConfirmedBy
from pubsub_core.errors import ConnectError, NotSupported, PubSubError, SubscribeFailed
from pubsub_core.events import Notice
from pubsub_core.interfaces import Backend, BackendContext, Sink, WireSub
from pubsub_core.keyed import KeyedLocks
from pubsub_core.message import OutFrame, Receipt
from pubsub_core.topics import overlap
from pubsub_mqtt.connection import Connection, Outgoing, Session
from pubsub_mqtt.connection.address import BrokerAddress
from pubsub_mqtt.connection.asyncio_driver import AsyncioDriver
from pubsub_mqtt.errors import as_ours
from pubsub_mqtt.packets import NO_PROPERTIES, Incoming

__all__ = ["ConnectionBackend"]

Error = TypeVar("Error", bound=PubSubError)


class ConnectionBackend(Backend):
    """One session over an MQTT connection.

    What a backend for a service that speaks MQTT adds to `Backend`'s own methods: it overrides
    `received`, and may override `session_ended`. It opens with `dial`, publishes with
    `send_now`, `submit` and `receipt`, and calls `as_ours` and `check_distinct`.

    Attributes:
        name: The backend's name, for errors.
        driver: Carries the session.
        connection: Window, outcomes and counters; outlives sessions.
        broker: Where the connection goes.
        sink: Gets all that arrives; None when nothing shall be delivered any more.
        turns: One at a time for each name.
    """

    def __init__(
        self, context: BackendContext, broker: BrokerAddress, connection: Connection
    ) -> None:
        super().__init__(context)
        self.name = context.info.name
        self.broker = broker
        self.connection = connection
        self.driver = AsyncioDriver(connection)
        self.sink: Sink | None = None
        self.turns = KeyedLocks[str]()
        connection.on_message = self.received
        connection.on_notice = self.notice
        self.driver.on_lost = self._lost
        self._closed = False

    # --- for subclasses -----------------------------------------------------------------

    @abc.abstractmethod
    def received(self, message: Incoming) -> None:
        """Take a message, which comes in wire order. It must not raise."""

    def session_ended(self, error: ConnectError | None) -> ConnectError | None:
        """Called when a session is over, or an attempt at one: drop what belonged to it.

        Args:
            error: Why it ended by itself; None when it was ended from here.

        Returns:
            What the core is told of a session that ended by itself; None to say nothing.
        """
        return error

    async def dial(self, sink: Sink) -> Session:
        """Make one session; messages go to *sink* from now on.

        Raises:
            ConnectError: Nothing is left open.
        """
        if self._closed:
            raise ConnectError("the backend was closed", backend=self.name, retryable=False)
        self.sink = sink
        try:
            return await self.driver.open(self.broker)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """End the session, or the attempt at one; the core is not told."""
        self.sink = None
        self.driver.abort()
        self.session_ended(None)

    def send_now(
        self, out: OutFrame, wire: str, payload: bytes, properties: bytes = NO_PROPERTIES
    ) -> Receipt | None:
        """Hand a QoS 0 message to the operating system, or None where it has to wait.

        Args:
            out: What the core wants published; its retain flag counts.
            wire: The topic as it is sent; errors have that of *out*.
            payload: As it is sent.
            properties: What `publish_properties` made.
        """
        topic = out.topic
        went = self.driver.try_publish(
            wire, payload, retain=out.retain, properties=properties, shown=topic
        )
        if went is None:
            return None
        return Receipt(topic, ConfirmedBy.TRANSPORT if went else ConfirmedBy.NOBODY)

    def submit(
        self, out: OutFrame, wire: str, payload: bytes, properties: bytes = NO_PROPERTIES
    ) -> Outgoing:
        """Begin to publish, in the order of the calls; arguments are those of `send_now`."""
        return self.driver.submit(
            wire,
            payload,
            qos=out.qos,
            retain=out.retain,
            properties=properties,
            shown=out.topic,
        )

    async def receipt(self, sent: Outgoing) -> Receipt:
        """Wait for the outcome of a publish; above QoS 0 a lost session does not end the wait.

        Raises:
            PublishFailed: With its outcome.
        """
        # What `AsyncioDriver.outcome` does, without the price of another coroutine.
        try:
            await sent.tag
        except asyncio.CancelledError:
            self.connection.abandon(sent)
            raise
        if sent.error is not None:
            raise sent.error
        if sent.qos == 0:
            return Receipt(sent.topic, ConfirmedBy.TRANSPORT)
        # 0x10: no matching subscribers (MQTT 5).
        nobody = 0 if sent.reason == 0x10 else None
        return Receipt(sent.topic, ConfirmedBy.BROKER, None, nobody)

    def as_ours(self, error: Error, topic: str) -> Error:
        """Give an error of the connection the topic that the core knows, and return it."""
        return as_ours(error, self.name, topic)

    def check_qos(self, out: OutFrame, why: str) -> None:
        """Refuse quality of service 2, for brokers that do not have it; *why* is theirs.

        Raises:
            NotSupported: The core wants it.
        """
        if out.qos == 2:
            raise NotSupported(
                Cap.ACK,
                why=why,
                hint="publish with qos=1",
                backend=self.name,
                topic=out.topic,
            )

    def check_distinct(
        self,
        want: WireSub,
        others: Iterable[WireSub],
        *,
        meets: Callable[[str, str], bool] = overlap,
        why: str = "",
        hint: str = "use a second bus",
    ) -> None:
        """Refuse a subscription whose messages could not be told from another's.

        A message for a share group comes to the same connection as one for a plain
        subscription and looks the same.

        Args:
            want: The new subscription.
            others: Those that there are; *want* itself may be among them.
            meets: Whether a message can be for both of two filters.
            why: What is missing to tell them apart, as the begin of a clause.
            hint: What to do instead.

        Raises:
            SubscribeFailed: A filter of another group, or of none, meets that of *want*.
        """
        for other in others:
            if other.group == want.group or other.id == want.id:
                continue
            if meets(other.filter, want.filter):
                theirs = f"group {other.group!r}" if other.group else "no group"
                raise SubscribeFailed(
                    f"{want.filter!r} overlaps {other.filter!r}, which is subscribed to with "
                    f"{theirs}: {why}their messages cannot be told apart",
                    hint=hint,
                    backend=self.name,
                    topic=want.filter,
                    retryable=False,
                )

    # --- Backend ------------------------------------------------------------------------

    @property
    def endpoint(self) -> interfaces.Endpoint:
        """Where `open` connects to."""
        where = self.broker
        if where.unix_path:
            return interfaces.Endpoint(where.unix_path, None)
        return interfaces.Endpoint(where.host, where.port, where.tls is not None)

    @property
    def session(self) -> Session | None:
        """The broker's CONNACK, or None without a session."""
        return self.connection.session if self.connection.connected else None

    async def restored(self) -> None:
        """Called after resubscription: release held publishes, those of the last session first."""
        self.connection.release()

    async def drop(self) -> None:
        """End the session as if it had been lost; unanswered publishes wait for the next."""
        self.abort()

    async def close(self, *, drain: float) -> None:
        """Flush, say DISCONNECT, close; see `Backend.close`."""
        self._closed = True
        self.sink = None
        self.driver.resume()
        await self.driver.close(drain=drain)
        self.session_ended(None)

    async def ping(self) -> float:
        """Return the seconds between PINGREQ and PINGRESP."""
        return await self.driver.ping()

    def _lost(self, error: ConnectError) -> None:
        sink = self.sink
        told = self.session_ended(error)
        if sink is not None and told is not None:
            sink.lost(told)

    def notice(self, kind: str, text: str, topic: str) -> None:
        """Tell the core of something that belongs to no call; see `Notice`."""
        if self.sink is not None:
            self.sink.notice(Notice(kind, text, topic))
