"""`MQTTClient`: MQTT for asyncio on its own, with the names of amqtt's client.

A program written for amqtt's ``MQTTClient`` runs after its imports are changed, and it does
not lose what amqtt loses: subscriptions come back after a reconnect, a cancelled
`MQTTClient.deliver_message` takes no message with it, a dead peer is noticed, every wait has a
deadline, and a message is acknowledged when it is handed over and not when it is queued.

The connection is `pubsub_mqtt.connection`'s; here are the life of the client, the queue of
received messages, and the translation to amqtt's objects and errors. Used on its own the client
reconnects and restores by itself; a bus does that for its backend.

Source of the names: amqtt 0.12 ``client.py``; ``ClientException`` and ``ConnectException`` are
those of its documentation and of HBMQTT before it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from pubsub_core import errors as core
from pubsub_core.clock import Clock, SystemClock
from pubsub_core.config.options import build, parse_url
from pubsub_core.errors import NotConnected, OperationTimeout, Outcome, PublishFailed, PubSubError
from pubsub_core.interfaces import Address
from pubsub_core.keyed import BoundedCache
from pubsub_core.pacing import Backoff
from pubsub_core.topics import parse_filter, split_shared, validate_filter, validate_topic
from pubsub_mqtt.connection import Connection, Outgoing, Subscribe
from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings, broker_address
from pubsub_mqtt.connection.asyncio_driver import AsyncioDriver
from pubsub_mqtt.connection.session_data import random_client_id, settings_of
from pubsub_mqtt.errors import as_ours, subscribe_error
from pubsub_mqtt.options import NAME, MQTTOptions
from pubsub_mqtt.packets import Incoming

from .config import ClientConfig
from .messages import IncomingApplicationMessage, OutgoingApplicationMessage
from .session import ConnectedState, Handler, Session, State

__all__ = [
    "QOS_0",
    "QOS_1",
    "QOS_2",
    "AMQTTError",
    "ClientError",
    "ClientException",
    "ConnectError",
    "ConnectException",
    "MQTTClient",
    "MQTTError",
    "ProtocolHandlerError",
]

logger = logging.getLogger("pubsub_mqtt.client")

T = TypeVar("T")

QOS_0: Final = 0
QOS_1: Final = 1
QOS_2: Final = 2

FILTERS_AT_ONCE = 100
"""Filters in one SUBSCRIBE when subscriptions are restored."""

DEFAULTS_CACHED = 4096
"""Topics whose publish defaults are remembered."""

FIRST_DELAY = 0.5
"""Bound of the first random delay before reconnecting, in seconds."""

HEALTHY_AFTER = 10.0
"""A session of that many seconds makes the delays start over."""

ClientError = PubSubError
"""Base of everything that the client raises."""

# amqtt has these beside ClientError, not below it. Here each of them catches everything, since
# what one of them catches there is another of them in the next release.
AMQTTError = MQTTError = ProtocolHandlerError = ClientError


class ConnectError(core.ConnectError):
    """There is no connection; the cause says why, by its type too.

    Attributes:
        return_code: Code of the CONNACK that refused, or None.
    """

    code = "connect"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        return_code: int | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, hint=hint, backend=NAME, retryable=retryable)
        self.return_code = return_code


ClientException = ClientError
ConnectException = ConnectError


class _State(StrEnum):
    NEW = "new"
    CONNECTING = "connecting"
    ONLINE = "online"
    RECONNECTING = "reconnecting"
    FAILED = "failed"
    CLOSED = "closed"


class _Turn:
    """A publish that waits for a connection."""

    __slots__ = ("size", "woken")

    def __init__(self, size: int) -> None:
        self.size = size
        self.woken = asyncio.Event()


class MQTTClient:
    """A client of one broker.

    Args:
        client_id: Identifier at the broker; a random one when None.
        config: A dictionary with amqtt's keys, or a `ClientConfig`.
        clock: For tests; delays between attempts are waited for on it.

    Use it from one event loop. `connect` first; then iterate over the client, or call
    `deliver_message`, and publish from as many tasks as you like. `disconnect` ends it, and
    so does leaving ``async with``.

    Attributes:
        config: The checked configuration.
        client_id: Identifier at the broker.
        dropped: Publishes that ``offline="drop"`` dropped.
        refused: Filters that the broker accepted once and refused after a reconnect, with
            the broker's code.
        session: What amqtt calls the session; None before the first `connect`.

    Raises:
        BadOption: The configuration has an unknown key or a bad value.
    """

    def __init__(
        self,
        client_id: str | None = None,
        config: ClientConfig | Mapping[str, Any] | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.config = config if isinstance(config, ClientConfig) else ClientConfig.from_dict(config)
        self.client_id = random_client_id() if client_id is None else client_id
        self.dropped = 0
        self.refused: dict[str, int] = {}
        self.session: Session | None = None
        self._clock = clock if clock is not None else SystemClock()
        self._state = _State.NEW
        self._error: ConnectError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broker = BrokerAddress()
        self._driver: AsyncioDriver | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._backoff = Backoff(FIRST_DELAY, self.config.reconnect_max_interval)
        self._outage_began: float | None = None
        self._online_since = 0.0
        self._session_present = False
        self._subscriptions: dict[str, int] = {}
        self._changes: set[asyncio.Future[None]] = set()
        self._under_way: set[Outgoing] = set()
        self._offline: deque[_Turn] = deque()
        self._offline_bytes = 0
        # Names of amqtt, for its tests.
        self._handler: Handler | None = None
        self._connected_state: ConnectedState | None = None
        # Received and not handed over, each with its packet id and its session's number.
        self._inbox: deque[tuple[Incoming, int | None, int]] = deque()
        self._receivers: deque[asyncio.Future[None]] = deque()
        self._paused = False
        self._defaults = BoundedCache[str, tuple[int, bool]](DEFAULTS_CACHED)

    # --- what is known -----------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether there is a session with the broker now."""
        return self._state is _State.ONLINE

    @property
    def session_present(self) -> bool:
        """Whether the broker continued an earlier session when it accepted us last."""
        return self._session_present

    @property
    def subscriptions(self) -> Mapping[str, int]:
        """Filters that are subscribed to, with the quality of service asked for."""
        return dict(self._subscriptions)

    @property
    def waiting(self) -> int:
        """Received messages that nobody took yet."""
        return len(self._inbox)

    # --- connecting --------------------------------------------------------------------

    async def connect(
        self,
        uri: str | None = None,
        cleansession: bool | None = None,
        cafile: str | Path | None = None,
        capath: str | Path | None = None,
        cadata: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
    ) -> int:
        """Connect and return CONNACK's code, which is 0.

        Args:
            uri: ``mqtt://``, ``tcp://``, ``mqtts://``, ``ssl://``, ``ws://`` or ``wss://`` with
                host, optional port, user and password; or ``mqtt+unix:///path``. Its query may
                hold options of `pubsub_mqtt.options.MQTTOptions`, e.g. ``?keepalive=30``.
            cleansession: False continues the session of this client id, and leaves one.
            cafile: PEM file of trusted authorities.
            capath: Folder of hashed authority files.
            cadata: Trusted authorities as PEM text.
            additional_headers: For the WebSocket request.

        Raises:
            ConnectError: With the code where the broker refused.
            ClientError: An argument does not fit, or the client is connected already.
        """
        self._bind()
        if self._state in (_State.CONNECTING, _State.ONLINE, _State.RECONNECTING):
            raise ClientError(
                f"the client is {self._state} already", hint="disconnect() first", backend=NAME
            )
        self._state = _State.CONNECTING
        try:
            options = self.config.options(
                client_id=self.client_id,
                cleansession=cleansession,
                cafile=cafile,
                capath=capath,
                cadata=cadata,
                headers=additional_headers,
            )
            where = uri if uri is not None else self.config.where.uri
            await self._prepare(where, options)
        except BaseException:
            self._state = _State.CLOSED
            raise
        retries = self.config.reconnect_retries if self.config.auto_reconnect else 0
        await self._first(0 if retries is None else retries)
        return 0

    async def reconnect(self, cleansession: bool | None = None) -> int:
        """Connect again as `connect` did last, and return 0; at once when connected.

        Attempts are repeated as ``reconnect_retries`` says, without end when it says nothing.

        Args:
            cleansession: Instead of what was given before.

        Raises:
            ConnectError: The attempts failed, or one failed in a way that no other would mend.
            ClientError: The client never was connected.
        """
        self._bind()
        while self._state in (_State.CONNECTING, _State.RECONNECTING):
            await self._change()
        if self._state is _State.ONLINE:
            return 0
        if self._driver is None:
            raise ClientError("nothing to reconnect to", hint="connect() first", backend=NAME)
        if cleansession is not None:
            connection = self._driver.connection
            connection.settings = dataclasses.replace(connection.settings, clean_start=cleansession)
        self._state = _State.CONNECTING
        retries = self.config.reconnect_retries
        await self._first(-1 if retries is None else retries)
        return 0

    async def disconnect(self, *, drain: float = 10.0) -> None:
        """Say goodbye and end everything. Idempotent; raises nothing for a dead link.

        Args:
            drain: Seconds that publishes under way may take to be confirmed.
        """
        if self._state in (_State.NEW, _State.CLOSED):
            return
        self._bind()
        self._state = _State.CLOSED
        task, self._renewing = self._renewing, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._wake_everybody()
        if self._driver is not None:
            await self._driver.close(drain=drain)

    async def cancel_tasks(self) -> None:
        """Cancel every `deliver_message` that waits, and every iteration."""
        while self._receivers:
            self._receivers.popleft().cancel()

    def _abandon(self) -> None:
        """End the connection as a crash would, without a word and for good."""
        self._state = _State.CLOSED
        if self._renewing is not None:
            self._renewing.cancel()
        if self._driver is not None:
            self._driver.abort()
            self._driver.connection.fail_pending()
        self._wake_everybody()

    @property
    def _disconnect_task(self) -> asyncio.Task[None] | None:
        """What brings a lost connection back, under its name at amqtt."""
        return self._renewing

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.disconnect()

    async def ping(self) -> float:
        """Send PINGREQ and return the seconds that its answer took.

        Raises:
            NotConnected: The connection ended meanwhile.
            TimeoutError: The broker did not answer in time.
        """
        self._bind()
        async with self._deadline("no answer to PINGREQ"):
            driver = await self._online("ping")
            return await driver.ping()

    # --- publishing --------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        message: bytes | bytearray | memoryview,
        qos: int | None = None,
        retain: bool | None = None,
        ack_timeout: float | None = None,
    ) -> OutgoingApplicationMessage:
        """Publish and return once it is as confirmed as *qos* promises.

        Calls may overlap; they go out in their order. Without a connection they do what the
        option ``offline`` says. A message above QoS 0 that was sent when the connection ended is
        sent again in the next one.

        Args:
            topic: Without wildcards.
            message: Bytes, also none.
            qos: 0, 1 or 2; the configuration's for this topic when None.
            retain: Keep it as the topic's last value; the configuration's when None.
            ack_timeout: Seconds instead of the option ``request_timeout``.

        Raises:
            PublishTimeout: In time neither sent nor confirmed; ``outcome`` says which.
            PublishFailed: With its ``outcome``.
            NotConnected: There is none and ``offline`` is ``raise``.
            InvalidTopic: The topic cannot be published to.
        """
        if isinstance(message, str):  # the commonest mistake; everything else fails below
            raise TypeError("message is text; encode it, for instance with .encode()")
        data = bytes(memoryview(message))
        validate_topic(topic)
        if qos is not None and qos not in (0, 1, 2):
            raise ClientError(f"qos is {qos}", hint="use 0, 1 or 2", backend=NAME)
        default_qos, default_retain = self._defaults_of(topic)
        qos = default_qos if qos is None else qos
        retain = default_retain if retain is None else retain
        self._bind()
        timeout = self.config.request_timeout if ack_timeout is None else ack_timeout
        attempts: list[Outgoing] = []
        try:
            async with asyncio.timeout(timeout):
                out = await self._publish(topic, data, qos, retain, attempts)
        except PublishFailed:
            raise
        except TimeoutError as exc:
            raise _late(topic, timeout, attempts) from exc
        sent = OutgoingApplicationMessage(
            out.packet_id or None if out is not None else None, topic, qos, data, retain
        )
        if qos == 1:
            sent.acknowledged("puback")
        elif qos == 2:
            sent.acknowledged("pubrec", "pubrel", "pubcomp")
        return sent

    async def _publish(
        self, topic: str, data: bytes, qos: int, retain: bool, attempts: list[Outgoing]
    ) -> Outgoing | None:
        """Publish in this connection or a later one; None when it was dropped."""
        while True:
            driver = await self._turn(topic, len(data))
            if driver is None:
                self.dropped += 1
                return None
            try:
                return await self._send(driver.connection, topic, data, qos, retain, attempts)
            except NotConnected:
                if self.config.offline != "buffer":
                    raise
            except PublishFailed as exc:
                waits = exc.outcome is Outcome.NOT_SENT and exc.retryable is True
                if not waits or self.config.offline != "buffer":
                    raise
            await asyncio.sleep(0)

    async def _send(
        self,
        connection: Connection,
        topic: str,
        data: bytes,
        qos: int,
        retain: bool,
        attempts: list[Outgoing],
    ) -> Outgoing:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def finished(_: Outgoing) -> None:
            if not done.done():
                done.set_result(None)

        out = connection.publish(topic, data, qos=qos, retain=retain, on_done=finished)
        attempts.append(out)
        self._under_way.add(out)
        try:
            await done
        except asyncio.CancelledError:
            connection.abandon(out)
            raise
        finally:
            self._under_way.discard(out)
        if out.error is not None:
            raise out.error
        return out

    def _defaults_of(self, topic: str) -> tuple[int, bool]:
        """Return quality of service and retain flag for a publish that does not say."""
        found = self._defaults.get(topic)
        if found is None:
            qos, retain = self.config.default_qos, self.config.default_retain
            matching = [text for text in self.config.topics if parse_filter(text).matches(topic)]
            for text in sorted(matching, key=lambda text: (text == topic, len(text))):
                settings = self.config.topics[text]
                qos = qos if settings.qos is None else settings.qos
                retain = retain if settings.retain is None else settings.retain
            found = self._defaults.keep(topic, (qos, retain))
        return found

    async def _turn(self, topic: str, size: int) -> AsyncioDriver | None:
        """Return the driver when it is this publish's turn, or None to drop the message."""
        if self._state is _State.ONLINE and not self._offline:
            return self._driver
        if self._state not in _COMING:
            raise self._why_not("publish")
        if self._state is not _State.ONLINE:
            if self.config.offline == "drop":
                return None
            if self.config.offline == "raise":
                raise self._why_not("publish")
        count, total = len(self._offline), self._offline_bytes + size
        if count >= self.config.offline_messages or total > self.config.offline_bytes:
            raise core.Overflow(
                f"{count} messages of {self._offline_bytes} bytes wait for a connection",
                hint="publish more slowly, or raise offline_messages and offline_bytes",
                backend=NAME,
                topic=topic,
            )
        turn = _Turn(size)
        self._offline.append(turn)
        self._offline_bytes += size
        try:
            # Woken one by one, so that they go out in the order of their calls.
            while self._state is not _State.ONLINE or self._offline[0] is not turn:
                if self._state not in _COMING:
                    raise self._why_not("publish")
                turn.woken.clear()
                await turn.woken.wait()
        finally:
            self._offline.remove(turn)
            self._offline_bytes -= size
            self._next_turn()
        return self._driver

    def _next_turn(self) -> None:
        if self._offline and self._state is _State.ONLINE:
            self._offline[0].woken.set()

    # --- subscribing -------------------------------------------------------------------

    async def subscribe(self, topics: Sequence[tuple[str, int]]) -> list[int]:
        """Subscribe and return what the broker granted, one code for each filter.

        The subscriptions come back after a reconnect by themselves. Without a connection this
        waits for the next one.

        Args:
            topics: Filters with the highest quality of service wanted; a filter may be
                ``$share/GROUP/FILTER`` where the broker has share groups.

        Raises:
            SubscribeFailed: The broker refused a filter, with the option ``subscribe_errors``.
                Without it the code, 0x80 or above, is returned and a warning logged. Either way
                the others of the call hold.
            InvalidFilter: A filter is not valid. Nothing was sent.
            TimeoutError: The broker did not answer in time.
        """
        wants = [(name, qos) for name, qos in topics]
        for name, qos in wants:
            validate_filter(split_shared(name)[1])
            if qos not in (0, 1, 2):
                raise ClientError(f"qos of {name!r} is {qos}", hint="use 0, 1 or 2", backend=NAME)
        if not wants:
            raise ClientError("no filter", hint="give (filter, qos) pairs", backend=NAME)
        self._bind()
        async with self._deadline("no answer to SUBSCRIBE"):
            codes = await self._until_answered("subscribe", lambda driver: self._ask(driver, wants))
        refused: dict[str, int] = {}
        for (name, qos), code in zip(wants, codes, strict=True):
            if code < 0x80:
                self._subscriptions[name] = qos
                self.refused.pop(name, None)
            else:
                refused[name] = code
        if refused:
            error = _refusal(refused)
            if self.config.subscribe_errors:
                raise error
            logger.warning("%s", error)
        return list(codes)

    async def unsubscribe(self, topics: Sequence[str]) -> None:
        """Drop subscriptions and return once the broker confirmed.

        Raises:
            TimeoutError: The broker did not answer in time.
        """
        names = list(topics)
        if not names:
            raise ClientError("no filter", hint="give filters", backend=NAME)
        for name in names:
            validate_filter(split_shared(name)[1])
        # Forgotten at once: a reconnect under way must not bring them back.
        for name in names:
            self._subscriptions.pop(name, None)
        self._bind()
        async with self._deadline("no answer to UNSUBSCRIBE"):
            await self._until_answered("unsubscribe", lambda driver: driver.unsubscribe(*names))

    async def _ask(self, driver: AsyncioDriver, wants: Sequence[tuple[str, int]]) -> Sequence[int]:
        try:
            request = await driver.subscribe(*(Subscribe(name, qos) for name, qos in wants))
        except asyncio.CancelledError:
            # The broker may grant what nobody knows of.
            strange = [name for name, _ in wants if name not in self._subscriptions]
            if strange and driver.connection.connected:
                driver.connection.unsubscribe(strange, lambda request: None)
            raise
        return request.codes

    async def _until_answered(
        self, what: str, ask: Callable[[AsyncioDriver], Coroutine[Any, Any, T]]
    ) -> T:
        """Ask the broker, again after each reconnect."""
        while True:
            driver = await self._online(what)
            try:
                return await ask(driver)
            except NotConnected:
                await asyncio.sleep(0)

    # --- receiving ---------------------------------------------------------------------

    async def deliver_message(
        self, timeout_duration: float | None = None
    ) -> IncomingApplicationMessage:
        """Return the next message, and acknowledge it by that.

        Cancelling takes no message. Several tasks may wait; each message goes to one.
        Reconnecting is waited for.

        Args:
            timeout_duration: Seconds to wait at most; without end when None.

        Raises:
            TimeoutError: None came in time.
            ConnectError: The connection was lost for good, and everything received is taken.
            ClientError: The client is not connected, or was disconnected meanwhile.
        """
        self._bind()
        if timeout_duration is None:
            return await self._next_message()
        try:
            async with asyncio.timeout(timeout_duration):
                return await self._next_message()
        except TimeoutError as exc:
            raise TimeoutError(f"no message within {timeout_duration:g} s") from exc

    def messages(self) -> AsyncIterator[IncomingApplicationMessage]:
        """Iterate over the messages; the same as iterating over the client."""
        return aiter(self)

    def __aiter__(self) -> AsyncIterator[IncomingApplicationMessage]:
        return self

    async def __anext__(self) -> IncomingApplicationMessage:
        """Return the next message; `disconnect` ends the iteration."""
        self._bind()
        try:
            return await self._next_message()
        except ClientError:
            if self._state is _State.CLOSED:
                raise StopAsyncIteration from None
            raise

    async def _next_message(self) -> IncomingApplicationMessage:
        while not self._inbox:
            if self._state in (_State.NEW, _State.FAILED, _State.CLOSED):
                raise self._why_not("receive")
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._receivers.append(waiter)
            try:
                await waiter
            except BaseException:
                if waiter in self._receivers:
                    self._receivers.remove(waiter)
                elif self._inbox:
                    self._wake_receiver()  # it was woken for a message that it cannot take
                raise
        # Nothing is awaited from here on, so that a message taken is a message returned.
        message, packet_id, _ = self._inbox.popleft()
        if self._inbox:
            self._wake_receiver()
        return self._handed_over(message, packet_id)

    def _handed_over(self, message: Incoming, packet_id: int | None) -> IncomingApplicationMessage:
        taken = IncomingApplicationMessage(
            packet_id,
            message.topic,
            message.qos,
            message.payload,
            message.retain,
            duplicate=message.duplicate,
        )
        driver = self._driver
        if driver is None:
            return taken
        if message.qos:
            driver.connection.settle(message.serial)
            taken.acknowledged("puback" if message.qos == 1 else "pubrec")
        if self._paused and len(self._inbox) <= self.config.incoming_messages // 2:
            self._paused = False
            driver.resume()
        return taken

    def _arrived(self, message: Incoming) -> None:
        driver = self._driver
        if driver is None:
            return
        connection = driver.connection
        packet_id = connection.packet_id_of(message.serial)
        self._inbox.append((message, packet_id, connection.generation))
        self._wake_receiver()
        if not self._paused and len(self._inbox) >= self.config.incoming_messages:
            self._paused = True
            driver.pause()

    def _wake_receiver(self) -> None:
        while self._receivers:
            waiter = self._receivers.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    # --- the life of the client --------------------------------------------------------

    async def _prepare(self, uri: str | None, options: MQTTOptions) -> None:
        """Make connection and driver from what `connect` was given."""
        address, options = _address(uri, options)
        if options.client_id is not None:
            self.client_id = options.client_id
        broker = broker_address(address, options)
        tls = broker.tls
        if tls is not None and not self.config.check_hostname and self.config.verify_cert:
            try:
                context = await asyncio.to_thread(_context_for_any_host, tls)
            except core.TLSProblem as exc:
                raise as_ours(exc, NAME) from exc.__cause__
            broker = dataclasses.replace(broker, tls=TLSSettings(context=context))
        self._broker = broker
        connection = Connection(settings_of(address, options), backend=NAME)
        connection.on_message = self._arrived
        connection.on_notice = lambda kind, text, topic: logger.warning("%s", text)
        self._driver = AsyncioDriver(connection)
        self._driver.on_lost = self._lost
        self._handler = Handler(self._under_way, self._abandon)
        self.session = Session(
            connection,
            broker,
            state=self._session_state,
            under_way=self._under_way,
            waiting=lambda: sum(1 for message, *_ in self._inbox if message.qos),
        )
        self._connected_state = ConnectedState(self.session)
        self._backoff.reset()

    def _session_state(self) -> State:
        if self._state is _State.ONLINE:
            return "connected"
        driver = self._driver
        return "disconnected" if driver and driver.connection.stats.sessions else "new"

    async def _first(self, retries: int) -> None:
        """Make a session now; negative *retries* have no end."""
        self._error = None
        began = self._clock.monotonic()
        failures = 0
        try:
            while True:
                try:
                    await self._attempt()
                except core.ConnectError as exc:
                    failures += 1
                    if exc.retryable is False or 0 <= retries < failures:
                        raise
                    logger.info("not connected: %s", exc)
                    await self._clock.sleep(self._backoff.next(self._clock.monotonic() - began))
                else:
                    return
        except core.ConnectError as exc:
            error = _native(exc)
            self._fail(error)
            raise error from exc
        except BaseException:
            self._state = _State.CLOSED
            self._wake_everybody()
            raise

    async def _attempt(self) -> None:
        driver = self._driven()
        connection = driver.connection
        self._paused = False  # a new session begins with the flow on
        session = await driver.open(self._broker, timeout=self.config.connection_timeout)
        try:
            self._session_present = session.present
            self.client_id = session.client_id
            if session.present:
                self._forget_what_comes_again(connection.generation)
            if not session.present:
                await self._restore(driver)
        except NotConnected as exc:
            driver.abort()
            raise core.ConnectError("the connection ended at once", backend=NAME) from exc
        except BaseException:
            driver.abort()
            raise
        self._state = _State.ONLINE
        self._online_since = self._clock.monotonic()
        connection.release()
        self._wake_changes()
        self._next_turn()

    def _forget_what_comes_again(self, generation: int) -> None:
        """Drop received messages that the broker sends again, since nobody acknowledged them.

        At QoS 2 it is the broker's copy that is dropped, by its packet id. What the new
        session brought already stays: it may have come together with CONNACK.
        """
        self._inbox = deque(
            item for item in self._inbox if item[0].qos != 1 or item[2] == generation
        )

    async def _restore(self, driver: AsyncioDriver) -> None:
        """Subscribe again to everything; what is refused now is told and forgotten."""
        wants = list(self._subscriptions.items())
        for start in range(0, len(wants), FILTERS_AT_ONCE):
            some = wants[start : start + FILTERS_AT_ONCE]
            try:
                async with asyncio.timeout(self.config.connection_timeout):
                    codes = await self._ask(driver, some)
            except TimeoutError as exc:
                raise core.ConnectTimeout(
                    "the broker did not answer SUBSCRIBE", backend=NAME
                ) from exc
            for (name, _), code in zip(some, codes, strict=True):
                if code >= 0x80:
                    self._subscriptions.pop(name, None)
                    self.refused[name] = code
                    logger.error("%s", subscribe_error(code, filter=name, backend=NAME))

    def _lost(self, error: core.ConnectError) -> None:
        if self._state is not _State.ONLINE:
            return  # an attempt under way, which fails by itself, or the end
        logger.info("the connection was lost: %s", error)
        now = self._clock.monotonic()
        if self._outage_began is None or now - self._online_since >= HEALTHY_AFTER:
            # Sessions that end young belong to one outage, or its delays would never grow.
            self._backoff.reset()
            self._outage_began = now
        if not self.config.auto_reconnect or error.retryable is False:
            self._fail(_native(error))
            return
        self._state = _State.RECONNECTING
        self._renewing = asyncio.get_running_loop().create_task(
            self._renew(), name="pubsub-mqtt-reconnect"
        )

    async def _renew(self) -> None:
        retries = self.config.reconnect_retries
        began = self._clock.monotonic() if self._outage_began is None else self._outage_began
        failures = 0
        try:
            while True:
                await self._clock.sleep(self._backoff.next(self._clock.monotonic() - began))
                try:
                    await self._attempt()
                except core.ConnectError as exc:
                    failures += 1
                    logger.info("not reconnected: %s", exc)
                    if exc.retryable is False or (retries is not None and 0 <= retries < failures):
                        self._fail(_native(exc))
                        return
                else:
                    return
        except Exception as exc:
            # Whoever waits would wait for ever for a task that is no more.
            logger.exception("reconnecting failed unexpectedly")
            self._fail(ConnectError(f"reconnecting failed: {type(exc).__name__}", retryable=False))
        finally:
            if self._renewing is asyncio.current_task():
                self._renewing = None

    def _fail(self, error: ConnectError) -> None:
        self._state = _State.FAILED
        self._error = error
        if self._driver is not None:
            self._driver.connection.fail_pending()
        self._wake_everybody()

    # --- waiting -----------------------------------------------------------------------

    def _bind(self) -> None:
        """Refuse a second event loop; a client that ended may go to another one."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and self._state in _COMING:
                raise core.WrongLoop(
                    "this client belongs to another event loop",
                    hint="make one client for each loop",
                    backend=NAME,
                )
            self._loop = loop

    async def _online(self, what: str) -> AsyncioDriver:
        """Return the driver once there is a session."""
        while self._state is not _State.ONLINE:
            if self._state not in _COMING:
                raise self._why_not(what)
            await self._change()
        return self._driven()

    def _driven(self) -> AsyncioDriver:
        if self._driver is None:
            raise self._why_not("go on")
        return self._driver

    async def _change(self) -> None:
        """Wait until the state changes."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.add(waiter)
        try:
            await waiter
        finally:
            self._changes.discard(waiter)

    def _wake_changes(self) -> None:
        for waiter in self._changes:
            if not waiter.done():
                waiter.set_result(None)

    def _wake_everybody(self) -> None:
        self._wake_changes()
        for turn in self._offline:
            turn.woken.set()
        while self._receivers:
            self._wake_receiver()

    def _why_not(self, what: str) -> PubSubError:
        match self._state:
            case _State.FAILED if self._error is not None:
                error = ConnectError(
                    self._error.message,
                    hint=self._error.hint,
                    return_code=self._error.return_code,
                    retryable=self._error.retryable,
                )
                error.__cause__ = self._error.__cause__
                return error
            case _State.CLOSED:
                text, hint = "the client was disconnected", "connect() or reconnect() again"
            case _State.NEW:
                text, hint = "the client is not connected", "connect() first"
            case _:
                text, hint = "there is no connection at the moment", "set offline='buffer' to wait"
        return NotConnected(f"cannot {what}: {text}", hint=hint, backend=NAME)

    @asynccontextmanager
    async def _deadline(self, text: str) -> AsyncGenerator[None]:
        seconds = self.config.request_timeout
        try:
            async with asyncio.timeout(seconds):
                yield
        except OperationTimeout:
            raise
        except TimeoutError as exc:
            raise OperationTimeout(
                f"{text} within {seconds:g} s",
                hint="raise request_timeout if the broker is that slow",
                backend=NAME,
            ) from exc


_COMING = (_State.CONNECTING, _State.ONLINE, _State.RECONNECTING)
"""States in which there is a connection, or one is on its way."""


# --- translation -----------------------------------------------------------------------


def _native(error: core.ConnectError) -> ConnectError:
    """Return amqtt's kind of error, with the original as its cause."""
    if isinstance(error, ConnectError):
        return error
    reason: object = getattr(error, "reason", None)
    native = ConnectError(
        error.message,
        hint=error.hint,
        return_code=reason if isinstance(reason, int) else None,
        retryable=error.retryable,
    )
    native.__cause__ = error
    return native


def _late(topic: str, seconds: float, attempts: Sequence[Outgoing]) -> core.PublishTimeout:
    sent = any(out.packet_id or not out.done for out in attempts)
    return core.PublishTimeout(
        f"the message for {topic!r} was not {'confirmed' if sent else 'sent'} within {seconds:g} s",
        outcome=Outcome.UNKNOWN if sent else Outcome.NOT_SENT,
        hint="it may have arrived" if sent else "publish it again when connected",
        backend=NAME,
        topic=topic,
    )


def _refusal(refused: Mapping[str, int]) -> core.SubscribeFailed:
    """Return one error for the filters that a SUBACK refused."""
    (name, code), *others = refused.items()
    error = subscribe_error(code, filter=name, backend=NAME)
    if others:
        names = ", ".join(repr(name) for name in refused)
        error = type(error)(
            f"the broker refused the subscriptions to {names}",
            reason=code,
            hint=error.hint,
            backend=NAME,
            topic=name,
            retryable=error.retryable,
        )
    return error


def _address(uri: str | None, options: MQTTOptions) -> tuple[Address, MQTTOptions]:
    """Split a URI, and let the options of its query win."""
    if not uri:
        raise ClientError(
            "Missing connection parameter 'uri'", hint="give connect() a URI", backend=NAME
        )
    address, query = parse_url(uri)
    if query:
        asked = build(MQTTOptions, query, where="uri", backend=NAME)
        options = dataclasses.replace(options, **{name: getattr(asked, name) for name in query})
    return address, options


def _context_for_any_host(tls: TLSSettings) -> ssl.SSLContext:
    logger.warning(
        "check_hostname is off: whoever has a certificate of a trusted authority can be the broker"
    )
    context = tls.build()
    context.check_hostname = False
    return context
