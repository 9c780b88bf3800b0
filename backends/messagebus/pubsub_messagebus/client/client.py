"""A messagebus client with the interface of ``jetblack-messagebus-python3`` 3.0.1.

`Client` is for subclasses; `CallbackClient`, in the module beside, takes handlers. Unlike the
package's, it ends when the connection does, closes its socket, loses nothing that was queued
before `stop`, writes while a handler runs, and never writes part of a message. It can also
reconnect, learn its own id (`Client.sync`) and drop data that still comes after an unsubscribe.

Three tasks do the work: one decodes, one calls handlers, one after the other, and one writes
the queue. Handlers may call anything here.

Sources: the package's public interface, 3.0.1 and 4.1.1; its faults were measured.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID

from pubsub_messagebus.authentication import Authenticator
from pubsub_messagebus.io import DataReader, DataWriter
from pubsub_messagebus.protocol import (
    ADMIN_FEED,
    HEARTBEAT_TOPIC,
    AuthorizationRequest,
    DataPacket,
    Decoder,
    Dialect,
    Fence,
    ForwardedMulticastData,
    ForwardedSubscriptionRequest,
    ForwardedUnicastData,
    Message,
    ProtocolError,
    WireLimits,
    encode_authorization_response,
    encode_multicast,
    encode_notification_request,
    encode_subscription_request,
    encode_unicast,
)
from pubsub_messagebus.sockets import Acknowledger

__all__ = ["Client"]

logger = logging.getLogger("pubsub_messagebus.client")

_HIGH = 1024 * 1024
_LOW = 256 * 1024
_AT_ONCE = 256 * 1024
_CHUNK = 256 * 1024


class Client(abc.ABC):
    """One connection to a distributor. Make it with `create`, then call `start` once.

    Attributes:
        reader: The stream that is read; kept for authenticators.
        client_id: Our own identifier, once `sync` has learnt it.
    """

    def __init__(
        self,
        reader: DataReader,
        writer: DataWriter,
        authenticator: Authenticator | None,
        monitor_heartbeat: bool,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._authenticator = authenticator
        self._monitor_heartbeat = monitor_heartbeat
        self._dialect: Dialect = "is_image"
        self._limits = WireLimits()
        self._filter_unsubscribed = True
        self._handler_errors: Literal["raise", "log"] = "raise"
        self._stop_timeout = 5.0
        self._read_ahead = 1000
        self._on_heartbeat: Callable[[], Awaitable[None]] | None = None
        self._reconnect = False
        self._reconnect_max = 30.0
        self._again: Callable[[], Awaitable[tuple[DataReader, DataWriter]]] | None = None
        self._started = False
        self._closed = False
        self._online = False
        self._stopping = asyncio.Event()
        self._error: BaseException | None = None
        # Frames to write. Control frames are marked: a reconnect drops them, since it restores
        # the subscriptions that they ask for.
        self._out: deque[tuple[bytes, bool]] = deque()
        self._out_bytes = 0
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._finishing = False
        self._inbox: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._read_all = False
        self._subscriptions: dict[tuple[str, str], int] = {}
        self._notifications: dict[str, None] = {}
        self._fence = Fence()
        self._fences: deque[asyncio.Future[UUID]] = deque()
        self._runner: asyncio.Task[None] | None = None
        self.client_id: UUID | None = None

    @classmethod
    async def create(
        cls,
        host: str,
        port: int,
        *,
        authenticator: Authenticator | None = None,
        ssl: SSLContext | None = None,
        monitor_heartbeat: bool = False,
        dialect: Dialect = "is_image",
        connect_timeout: float | None = None,
        max_message_bytes: int | None = None,
        filter_unsubscribed: bool = True,
        handler_errors: Literal["raise", "log"] = "raise",
        stop_timeout: float = 5.0,
        read_ahead: int = 1000,
        on_heartbeat: Callable[[], Awaitable[None]] | None = None,
        reconnect: bool = False,
        reconnect_max: float = 30.0,
    ) -> Self:
        """Connect. Nothing is sent before `start`.

        Args:
            host: Where the distributor is.
            port: 9091 for servers up to 4.0, 9001 since.
            authenticator: Says who we are; None says nothing.
            ssl: Made with ``Purpose.SERVER_AUTH``, the default.
            monitor_heartbeat: Subscribe to the server's sign of life.
            dialect: ``content_type`` for servers from 6.0.0-alpha.6; then the argument
                *is_image* of everything here is a content type.
            connect_timeout: Seconds; None waits as long as the system does.
            max_message_bytes: The longest message that is accepted.
            filter_unsubscribed: Drop data of topics that were unsubscribed, which servers up to
                6.0 go on sending.
            handler_errors: ``log`` goes on after an exception of a handler; ``raise`` ends
                `start` with it.
            stop_timeout: Seconds that `stop` may take to write the queue.
            read_ahead: Messages that may wait for handlers before reading pauses.
            on_heartbeat: Receives heartbeats instead of the data handlers.
            reconnect: Connect again when the connection is lost, and restore subscriptions
                and notifications; publishers see a new client then.
            reconnect_max: Seconds up to which the random delay before that grows.

        Raises:
            ValueError: *ssl* is a context for servers.
        """
        if ssl is not None and ssl.protocol == PROTOCOL_TLS_SERVER:
            raise ValueError(
                "this SSLContext is for servers and cannot dial; "
                "make it with ssl.create_default_context(ssl.Purpose.SERVER_AUTH)"
            )

        async def dial() -> tuple[DataReader, DataWriter]:
            async with asyncio.timeout(connect_timeout):
                reader, writer = await asyncio.open_connection(host, port, ssl=ssl)
            return DataReader(reader), DataWriter(writer)

        reader, writer = await dial()
        try:
            self = cls(reader, writer, authenticator, monitor_heartbeat)
        except BaseException:
            writer.writer.close()
            raise
        self._dialect = dialect
        if max_message_bytes is not None:
            self._limits = WireLimits(
                data=min(max_message_bytes, 0xFFFFFF), message=max_message_bytes
            )
        self._filter_unsubscribed = filter_unsubscribed
        self._handler_errors = handler_errors
        self._stop_timeout = stop_timeout
        self._read_ahead = read_ahead
        self._on_heartbeat = on_heartbeat
        self._reconnect = reconnect
        self._reconnect_max = reconnect_max
        self._again = dial
        return self

    # --- life ------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether `start` is running on a live connection."""
        return self._online

    @property
    def error(self) -> BaseException | None:
        """Why the connection ended, or None while it has not or when `stop` ended it."""
        return self._error

    async def start(self) -> None:
        """Send the queue, call handlers; return when the connection ends.

        Raises:
            Exception: A handler raised it; everything is closed.
        """
        if self._started:
            raise RuntimeError("start() was called before; a client is for one use")
        self._started = True
        faulted = True
        try:
            if self._stopping.is_set():
                faulted = False
                return
            if self._monitor_heartbeat:
                self._change(ADMIN_FEED, HEARTBEAT_TOPIC, 1)
            faulted = await self._run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._closed = True
            self._online = False
            self._room.set()
            self._fail_fences()
            try:
                await self._close_socket()
            finally:
                await self.on_closed(faulted)

    def stop(self) -> None:
        """Let `start` write the queue, close the connection and return."""
        self._stopping.set()

    async def aclose(self) -> None:
        """Stop, and return when everything is closed."""
        self.stop()
        runner, self._runner = self._runner, None
        if runner is not None:
            await asyncio.wait([runner])
            if not runner.cancelled() and runner.exception() is not None:
                logger.debug("the client had ended with %r", runner.exception())
        elif not self._started:
            self._started = self._closed = True
            await self._close_socket()

    async def __aenter__(self) -> Self:
        """Run `start` in a task of its own."""
        if not self._started:
            self._runner = asyncio.create_task(self.start(), name="messagebus client")
            await asyncio.sleep(0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        runner = self._runner
        await self.aclose()
        if error is None and runner is not None and not runner.cancelled():
            runner.result()

    # --- requests ----------------------------------------------------------------------------

    async def publish(
        self,
        feed: str,
        topic: str,
        is_image: Any,
        data_packets: Sequence[DataPacket] | None,
    ) -> None:
        """Send to every subscriber of (*feed*, *topic*).

        Waits while much is unsent. On a feed that needs authorization, no packets at all stop
        servers up to 5.1.1.

        Raises:
            ValueError, TypeError: It cannot be sent; nothing was.
            ConnectionError: The client has ended.
        """
        await self._send(encode_multicast(feed, topic, is_image, data_packets, self._dialect))

    async def send(
        self,
        client_id: UUID,
        feed: str,
        topic: str,
        is_image: Any,
        data_packets: Sequence[DataPacket] | None,
    ) -> None:
        """Send to one client, which must be subscribed to (*feed*, *topic*)."""
        await self._send(
            encode_unicast(client_id, feed, topic, is_image, data_packets, self._dialect)
        )

    async def authorize(
        self,
        client_id: UUID,
        feed: str,
        topic: str,
        is_authorization_required: bool,
        entitlements: set[int] | None,
    ) -> None:
        """Answer what a client may see; required without entitlements is a denial."""
        await self._send(
            encode_authorization_response(
                client_id, feed, topic, is_authorization_required, entitlements
            )
        )

    async def add_subscription(self, feed: str, topic: str) -> None:
        """Subscribe; each add needs a remove."""
        self._change(feed, topic, 1)
        await self._pressure()

    async def remove_subscription(self, feed: str, topic: str) -> None:
        """Take one subscription away."""
        self._change(feed, topic, -1)
        await self._pressure()

    async def add_notification(self, feed: str) -> None:
        """Start being told who subscribes to *feed*."""
        self._queue(encode_notification_request(feed, True), control=True)
        self._notifications[feed] = None
        await self._pressure()

    async def remove_notification(self, feed: str) -> None:
        """Stop being told."""
        self._queue(encode_notification_request(feed, False), control=True)
        self._notifications.pop(feed, None)
        await self._pressure()

    async def sync(self) -> UUID:
        """Return when the server has acted on everything sent before; give our own id.

        It proves that login succeeded. Our own server grants it to everybody who is logged
        in; others want the role Subscribe on a feed whose name begins with ``__sync__``. Give
        it a deadline: a server that refuses says nothing.

        Raises:
            ConnectionError: The connection ended before.
        """
        waiting: asyncio.Future[UUID] = asyncio.get_running_loop().create_future()
        self._queue(self._fence.ask(), control=True)
        # A caller that gives up leaves its place: fences come back in order.
        self._fences.append(waiting)
        self._taken.set()
        return await waiting

    # --- arrivals, for subclasses ---------------------------------------------------------------

    @abc.abstractmethod
    async def on_authorization(
        self, client_id: UUID, host: str, user: str, feed: str, topic: str
    ) -> None:
        """Called when a client waits for authorization."""

    @abc.abstractmethod
    async def on_data(
        self,
        user: str,
        host: str,
        feed: str,
        topic: str,
        data_packets: list[DataPacket] | None,
        is_image: Any,
    ) -> None:
        """Called with data; user and host are empty in a notice of the server."""

    @abc.abstractmethod
    async def on_forwarded_subscription_request(
        self, client_id: UUID, user: str, host: str, feed: str, topic: str, is_add: bool
    ) -> None:
        """Called when somebody subscribes or unsubscribes."""

    # Not abstract, so that subclasses written for 3.x can still be made.
    async def on_closed(self, is_faulted: bool) -> None:  # noqa: B027 - see above
        """Called once at the end; faulted is every end but that of `stop`."""

    # --- sending ---------------------------------------------------------------------------

    def _queue(self, frame: bytes, *, control: bool = False) -> None:
        if self._closed:
            raise ConnectionError("the client has ended") from self._error
        if self._finishing:
            return  # a handler that was running when `stop` was called
        self._out.append((frame, control))
        self._out_bytes += len(frame)
        if self._out_bytes > _HIGH and self._started:
            self._room.clear()
        self._more.set()

    async def _send(self, frame: bytes) -> None:
        self._queue(frame)
        if not self._room.is_set():
            await self._pressure()

    async def _pressure(self) -> None:
        if not self._room.is_set() and self._started:
            await self._room.wait()

    def _change(self, feed: str, topic: str, by: int) -> None:
        self._queue(encode_subscription_request(feed, topic, by > 0), control=True)
        key = (feed, topic)
        if by > 0:
            self._subscriptions[key] = self._subscriptions.get(key, 0) + 1
        elif self._subscriptions.get(key, 0) > 0:
            # A zero stays, as the mark of data to drop.
            self._subscriptions[key] -= 1

    # --- the tasks -------------------------------------------------------------------------

    async def _run(self) -> bool:
        """Run one connection after the other; return whether it ended by itself."""
        attempt = 0
        while True:
            began = asyncio.get_running_loop().time()
            lost = await self._use_connection()
            if lost is None:
                self._error = None
                return False
            self._error = lost
            self._online = False
            self._fail_fences()
            if not self._reconnect or self._again is None or isinstance(lost, ProtocolError):
                return True
            if asyncio.get_running_loop().time() - began > self._reconnect_max:
                attempt = 0
            await self._close_socket()
            while True:
                delay = random.uniform(0, min(self._reconnect_max, 0.2 * 2 ** min(attempt, 16)))  # noqa: S311 - jitter
                attempt += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stopping.wait()
                if self._stopping.is_set():
                    return False
                try:
                    self._reader, self._writer = await self._again()
                except (OSError, TimeoutError) as error:
                    self._error = error
                    logger.info("connecting again failed: %s", error)
                    continue
                break
            self._restore()

    def _restore(self) -> None:
        """Queue all subscriptions, before the data that waits."""
        waiting = [entry for entry in self._out if not entry[1]]
        restored = [(encode_notification_request(feed, True), True) for feed in self._notifications]
        for (feed, topic), count in self._subscriptions.items():
            restored += [(encode_subscription_request(feed, topic, True), True)] * count
        self._out = deque([*restored, *waiting])
        self._out_bytes = sum(len(frame) for frame, _ in self._out)
        self._inbox.clear()
        self._more.set()

    async def _use_connection(self) -> BaseException | None:
        """Use one connection; return why it was lost, or None when `stop` was called."""
        self._read_all = self._finishing = False
        stopping = asyncio.create_task(self._stopping.wait(), name="messagebus stop")
        tasks: list[asyncio.Task[Any]] = [stopping]
        try:
            if self._authenticator is not None:
                try:
                    await self._authenticator.authenticate(self._reader, self._writer)
                except (OSError, EOFError) as error:
                    return error
            self._online = True
            reading = asyncio.create_task(self._read(), name="messagebus reader")
            writing = asyncio.create_task(self._write(), name="messagebus writer")
            handling = asyncio.create_task(self._handle(), name="messagebus handlers")
            tasks += [reading, writing, handling]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if handling.done() and not stopping.done():
                handling.result()  # raises a handler's exception
            lost: BaseException | None = None
            if not stopping.done():
                # Lost; messages that had arrived still reach their handlers.
                for task in (reading, writing):
                    if task.done() and lost is None:
                        lost = task.result()
                self._read_all = True
                self._arrived.set()
                await asyncio.wait([handling], timeout=self._stop_timeout)
            else:
                self._finishing = True
                self._more.set()
                self._arrived.set()
                await asyncio.wait([writing, handling], timeout=self._stop_timeout)
            if handling.done():
                handling.result()
            return lost
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> BaseException:
        """Decode until the connection ends; return why."""
        decoder = Decoder("client", dialect=self._dialect, limits=self._limits)
        stream = self._reader.reader
        acknowledger = Acknowledger(self._writer.writer.get_extra_info("socket"))
        try:
            while data := await stream.read(_CHUNK):
                decoder.feed(data)
                while (message := decoder.next_message()) is not None:
                    if self._answers_fence(message):
                        continue
                    self._inbox.append(message)
                    if len(self._inbox) > self._read_ahead and not self._fences:
                        self._arrived.set()
                        await self._until_taken()
                self._arrived.set()
                acknowledger.arrived(len(data), inside=decoder.inside)
            decoder.eof()
            decoder.next_message()
            return ConnectionError("the server closed the connection")
        except (OSError, EOFError, ProtocolError) as error:
            return error

    async def _until_taken(self) -> None:
        # While somebody waits for `sync`, its answer must be found behind whatever waits.
        while len(self._inbox) > self._read_ahead // 2 and not self._fences:
            self._taken.clear()
            await self._taken.wait()

    def _answers_fence(self, message: Message) -> bool:
        """Whether it is for `sync` and nobody else."""
        if not isinstance(message, ForwardedSubscriptionRequest) or not self._fence.owns(message):
            return False
        frames = self._fence.take(message)
        if frames is not None:
            self._queue(frames, control=True)
            self.client_id = message.client_id
            waiting = self._fences.popleft() if self._fences else None
            if waiting is not None and not waiting.done():
                waiting.set_result(message.client_id)
        return True

    async def _handle(self) -> None:
        """Call handlers, one message after the other."""
        inbox = self._inbox
        while True:
            while inbox:
                message = inbox.popleft()
                if len(inbox) == self._read_ahead // 2:
                    self._taken.set()
                try:
                    await self._dispatch(message)
                except Exception:
                    if self._handler_errors == "raise":
                        raise
                    logger.exception("a handler failed")
                if self._finishing:
                    return
            self._taken.set()
            if self._read_all or self._finishing:
                return
            self._arrived.clear()
            await self._arrived.wait()

    async def _dispatch(self, message: Message) -> None:
        if isinstance(message, (ForwardedMulticastData, ForwardedUnicastData)):
            # Here and not on arrival: messages that waited meanwhile are unwanted as well.
            if (
                self._filter_unsubscribed
                and self._subscriptions.get((message.feed, message.topic), 1) <= 0
            ):
                return
            if (
                self._on_heartbeat is not None
                and message.feed == ADMIN_FEED
                and message.topic == HEARTBEAT_TOPIC
            ):
                await self._on_heartbeat()
                return
            await self.on_data(
                message.user,
                message.host,
                message.feed,
                message.topic,
                message.data_packets,
                message.flag,
            )
        elif isinstance(message, ForwardedSubscriptionRequest):
            await self.on_forwarded_subscription_request(
                message.client_id,
                message.user,
                message.host,
                message.feed,
                message.topic,
                message.is_add,
            )
        elif isinstance(message, AuthorizationRequest):
            await self.on_authorization(
                message.client_id, message.host, message.user, message.feed, message.topic
            )

    async def _write(self) -> BaseException | None:
        """Write the queue, whole messages only; return why that is not possible."""
        stream = self._writer.writer
        out = self._out
        try:
            while True:
                while out:
                    batch: list[bytes] = []
                    size = 0
                    while out and size < _AT_ONCE:
                        frame, _ = out.popleft()
                        size += len(frame)
                        batch.append(frame)
                    self._out_bytes -= size
                    if self._out_bytes <= _LOW:
                        self._room.set()
                    # One call, so that the transport holds all of it or nothing.
                    stream.write(b"".join(batch))
                    await stream.drain()
                if self._finishing:
                    return None
                self._more.clear()
                await self._more.wait()
        except (OSError, EOFError) as error:
            return error

    async def _close_socket(self) -> None:
        """Close after the transport has sent its buffer, within the time for stopping."""
        stream = self._writer.writer
        stream.close()
        try:
            async with asyncio.timeout(self._stop_timeout):
                await stream.wait_closed()
        except TimeoutError:
            stream.transport.abort()
        except OSError:
            return

    def _fail_fences(self) -> None:
        # The next connection has a fence of its own.
        fences, self._fences = self._fences, deque()
        self._fence = Fence()
        for waiting in fences:
            if not waiting.done():
                waiting.set_exception(ConnectionError("the connection ended"))
