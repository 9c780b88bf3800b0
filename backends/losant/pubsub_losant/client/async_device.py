"""The device for programs with an event loop: `Device`, with ``await``.

    async with AsyncDevice(device_id, key, secret) as device:
        await device.send_state({"temperature": 21.5})
        async for command in device.commands():
            ...

Rules, events and arguments are those of `Device`; both are made from one core.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from pubsub_core.errors import ConnectError, NotConnected, PublishFailed, WrongLoop
from pubsub_losant.errors import LosantConnectError, LosantError
from pubsub_losant.times import TimeLike
from pubsub_losant.topics import (
    check_device_id,
    command_topic,
    encode_hello,
    state_topic,
)
from pubsub_mqtt.connection.asyncio_driver import AsyncioDriver

from .device_base import DeviceCore
from .link import limit_unacknowledged
from .observers import Observer, Observers, PeripheralCore

__all__ = ["AsyncDevice", "AsyncGateway", "AsyncPeripheral"]

T = TypeVar("T")

_KEPT: Final = 1000
_DRAIN: Final = 1.0


class _Feed(Generic[T]):
    """A queue of arrivals that are not read yet; the oldest goes when it is full."""

    def __init__(self, count_dropped: Callable[[], None], check_loop: Callable[[], None]) -> None:
        self._check_loop = check_loop
        self._items: deque[T] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._count_dropped = count_dropped
        self._ended = False
        self._error: BaseException | None = None

    def begin(self) -> None:
        self._ended = False
        self._error = None

    def push(self, item: T) -> None:
        if len(self._items) == _KEPT:
            self._items.popleft()
            self._count_dropped()
        self._items.append(item)
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        self._check_loop()
        # An item leaves only when it is returned, so a cancelled wait loses none.
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        return self._items.popleft()


class AsyncDevice(DeviceCore):
    """One device of the platform, for asyncio.

    While it is connected all calls belong to one event loop: in another they raise `WrongLoop`.
    Observers are called in the loop; one that is a coroutine function becomes a task.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: AsyncioDriver | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()  # what waits for the guard need wait no longer
        self._draining = False
        self._tasks: set[asyncio.Future[Any]] = set()
        self._commands: dict[str, _Feed[dict[str, Any]]] = {}
        self._messages: _Feed[tuple[str, bytes]] = _Feed(self._count_dropped, self._check_loop)
        self._commands[self._device_id] = _Feed(self._count_dropped, self._check_loop)

    def _over(self) -> None:
        super()._over()
        self._ended.set()

    def _count_dropped(self) -> None:
        self.stats["unread_dropped"] += 1

    def _check_loop(self) -> None:
        """Refuse the use from another event loop, which would be one from another thread."""
        if self._active and asyncio.get_running_loop() is not self._loop:
            raise WrongLoop(
                f"device {self._device_id} is connected in another event loop",
                hint="hand the call to that loop with asyncio.run_coroutine_threadsafe, or use "
                "Device, which any thread may call",
                backend="losant",
            )

    # --- connection ----------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect, and return when commands are subscribed; nothing while connected.

        A broker that is too busy (CONNACK 3) is tried again; bound the patience with
        `asyncio.timeout`. Cancelling it leaves nothing open.

        Raises:
            OSError: The dial failed; with ``retry_first=True`` it is tried again instead.
            LosantAuthError: Credentials were refused.
            LosantTLSError: The broker's certificate was refused.
            LosantConnectError: The WebSocket was refused, or `close` came in between.
            WrongLoop: It is connected in another event loop.
        """
        self._check_loop()
        if self._active:
            return
        loop = self._loop = asyncio.get_running_loop()
        self._open()
        self._ended = asyncio.Event()
        ready = self._ready = loop.create_future()
        try:
            if self._secure:
                self._secure_with(await asyncio.to_thread(self._tls.build))
            if not ready.done():
                for feed in self._feeds():
                    feed.begin()
                driver = self._driver = AsyncioDriver(self._connection)
                driver.on_lost = self._on_lost
                self._task = loop.create_task(self._keep_session(driver, ready))
            await ready
        except BaseException:
            await self._abandon()
            raise
        finally:
            self._ready = None

    async def close(self, *, drain: float = _DRAIN) -> None:
        """End the connection in good order; nothing if there is none.

        Messages on their way at QoS 1 get *drain* seconds to be acknowledged. Iterators of
        `commands` and `messages` end when they are empty.

        Raises:
            WrongLoop: It is connected in another event loop.
        """
        self._check_loop()
        if not self._active:
            return
        ready = self._ready
        if ready is not None and not ready.done():
            ready.set_exception(LosantConnectError("the device was closed while it connected"))
        driver = self._driver
        self._over()
        self._events.clear()
        try:
            if driver is not None:
                await driver.close(drain=drain)
        finally:
            await self._abandon()
            self._end_feeds(None)
            self._fire("close", self._device_id, ())
            if self._tasks:
                await asyncio.wait(set(self._tasks) - _own_task(), timeout=drain or None)
        self._raise_observer_error()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _abandon(self) -> None:
        """Drop the connection and the task that keeps it."""
        self._over()
        driver, self._driver = self._driver, None
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if driver is not None:
            driver.abort()
            driver.connection.fail_pending()
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task])

    async def _keep_session(self, driver: AsyncioDriver, ready: asyncio.Future[None]) -> None:
        """Open one session after another, until it is closed or hopeless."""
        dialled = False
        try:
            while self._active:
                await self._one_session(driver, ready, first=not dialled)
                dialled = True
                if self._retry_at is not None:
                    await asyncio.sleep(max(self._retry_at - time.monotonic(), 0.0))
        except Exception as exc:
            self._over()
            self._end_feeds(exc)
            if not ready.done():
                ready.set_exception(exc)
            raise

    async def _one_session(
        self, driver: AsyncioDriver, ready: asyncio.Future[None], *, first: bool
    ) -> None:
        """Open a session and return when it is over, or could not be had."""
        gone = self._gone = asyncio.get_running_loop().create_future()
        generation = self._connection.generation
        failure: BaseException | None = None
        try:
            await driver.open(self._endpoint, timeout=self._connect_timeout)
        except ConnectError as error:
            if self._connection.generation == generation:  # CONNECT was never sent
                failure = self._dial_failure(_cause(error), first=first)
            else:
                self._lost(error)
        else:
            sock = self._connection.socket
            if sock is not None:
                limit_unacknowledged(sock.fileno(), 2.0 * self._keep_alive)
                self._began()
                self._arm()
                await gone
        fatal, self._fatal = self._fatal, None
        if fatal is not None:
            driver.connection.fail_pending()
            self._end_feeds(fatal)
        failure = fatal or failure
        if failure is not None and not ready.done():
            ready.set_exception(failure)

    def _on_lost(self, error: ConnectError) -> None:
        self._lost(error)
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def _arm(self) -> None:
        """Do what is due, and come back for the next such thing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._due(time.monotonic()) if self._online else None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(due, self._arm)

    def _feeds(self) -> list[_Feed[Any]]:
        return [*self._commands.values(), self._messages]

    def _end_feeds(self, error: BaseException | None) -> None:
        for feed in self._feeds():
            feed.end(error)

    # --- receiving -----------------------------------------------------------------------

    def commands(self) -> AsyncIterator[dict[str, Any]]:
        """Iterate over the commands as they arrive; it ends when the device is closed.

        The newest 1000 unread ones are kept. Several iterators share them.

        Raises:
            LosantError: The end of all attempts to connect, out of the iteration.
        """
        return self._commands[self._device_id]

    def messages(self) -> AsyncIterator[tuple[str, bytes]]:
        """Iterate over topics and payloads of messages from `subscribe`; see `commands`."""
        return self._messages

    def _emit(self, name: str, *args: Any, device_id: str = "") -> None:
        super()._emit(name, *args, device_id=device_id)
        if not self._draining:
            self._draining = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._draining = False
        while self._events:
            name, device_id, args = self._events.popleft()
            if name == "command":
                feed = self._commands.get(device_id)
                if feed is not None:
                    feed.push(args[0])
            elif name == "message":
                self._messages.push((args[0], args[1]))
            elif name == "connect" and self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
            self._fire(name, device_id, args)
        self._raise_observer_error()

    def _run(self, observer: Observer, *args: Any) -> None:
        result = observer(*args)
        if inspect.isawaitable(result):
            task = asyncio.ensure_future(_finish(result))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._failed("a coroutine", error)
            self._raise_observer_error()

    def _raise_observer_error(self) -> None:
        error, self._observer_error = self._observer_error, None
        if error is not None and self._raise_observer_errors:
            # Nobody waits here: it goes where an asyncio program looks for such errors.
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"an observer of {self!r} failed", "exception": error}
            )

    # --- sending -------------------------------------------------------------------------

    async def send_state(
        self,
        state: Mapping[str, Any],
        time_like: TimeLike = None,
        *,
        flow_version: str | None = None,
        meta: Any = None,
    ) -> bool:
        """Send one state; return whether it was accepted for sending, or is kept.

        At QoS 1 it returns when the broker has acknowledged, in this session or a later one.
        Arguments and errors are those of `Device.send_state`.
        """
        texts = self._encode([(state, time_like)], flow_version, meta)
        return await self._deliver(self._topic, self._checked(texts[0].encode()), texts)

    async def send_states(self, states: Iterable[tuple[Mapping[str, Any], TimeLike]]) -> bool:
        """Send several states with their times as one message; see `send_state`."""
        texts = self._encode(states)
        return await self._deliver(self._topic, self._join(texts), texts)

    async def send_hello(
        self,
        bundle: str = "nullVersion",
        *,
        service: str = "embeddedWorkflowAgent",
        version: str = "1.0.0",
        compiler_options: Mapping[str, Any] | None = None,
    ) -> bool:
        """Announce the versions of an edge or embedded agent; other devices are cut off."""
        payload = encode_hello(
            bundle, service=service, version=version, compiler_options=compiler_options
        )
        return await self._deliver(self._hello_topic(), payload)

    async def publish(self, topic: str, payload: bytes | str, *, qos: int | None = None) -> bool:
        """Publish to a topic of your own, where the access key allows it.

        Raises:
            ValueError: A topic of the platform, a wildcard, or more than 256 KiB.
        """
        data = self._custom_payload(topic, payload, qos)
        return await self._deliver(topic, data, qos=qos)

    async def subscribe(self, topic: str) -> None:
        """Receive messages to a topic of your own in `messages`, also after a reconnect.

        State and command topics of other devices in the key's scope are allowed as well.

        Raises:
            LosantError: The platform refused it.
            ValueError: The platform has no such topic.
        """
        self._readable(topic)
        self._check_loop()
        if topic not in self._custom:
            self._custom[topic] = None
            await self._subscribed(topic)

    async def unsubscribe(self, topic: str) -> None:
        """Stop getting it; nothing if it was not subscribed."""
        self._check_loop()
        if topic in self._custom:
            del self._custom[topic]
            self._drop(topic)

    async def _subscribed(self, topic: str) -> None:
        """Return when the broker answered; at once while there is no session."""
        waiter: asyncio.Future[LosantError | None] = asyncio.get_running_loop().create_future()

        def answered(error: LosantError | None) -> None:
            if not waiter.done():
                waiter.set_result(error)

        self._want(topic, answered)
        error = await waiter
        # A session that ended meanwhile is no refusal: the next one subscribes again.
        if error is not None and not isinstance(error, LosantConnectError):
            raise error

    async def _deliver(
        self, topic: str, payload: bytes, texts: list[str] | None = None, qos: int | None = None
    ) -> bool:
        """Send, keep or refuse; *texts* are the states in it, where it holds any."""
        if not self._active:
            return False
        self._check_loop()
        if texts is not None and (self._backlog or not self._online):
            return self._keep(topic, texts)
        if not self._online:
            return False
        delay = self._admit(topic)
        if delay is None:
            return False
        if delay:
            ended = self._ended
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await ended.wait()
            if ended.is_set():
                return False
            if not self._online:
                return texts is not None and self._keep(topic, texts)
        driver = self._driver
        level = self._qos if qos is None else qos
        if driver is None or not self._has_room(level):
            return False
        try:
            if level:
                self._sent(topic)
                await driver.publish(topic, payload, qos=level)
            elif self._write(topic, payload, level):
                await driver.drain()
            else:
                return False
        except (NotConnected, PublishFailed):
            return False
        return True


def _own_task() -> set[Any]:
    task = asyncio.current_task()
    return set() if task is None else {task}


async def _finish(result: Awaitable[Any]) -> Any:
    return await result


def _cause(error: ConnectError) -> BaseException:
    """Return the error of the system, or the error itself."""
    cause = error.__cause__
    if isinstance(cause, TimeoutError) and not cause.args:
        return TimeoutError(str(error.args[0]))
    return cause if isinstance(cause, OSError) else error


class AsyncPeripheral(PeripheralCore):
    """A device without a connection of its own, behind an `AsyncGateway`, which makes it."""

    def __init__(
        self,
        device_id: str,
        observers: Observers,
        commands: AsyncIterator[dict[str, Any]],
        send: Callable[[str, list[tuple[Mapping[str, Any], TimeLike]], bool], Awaitable[bool]],
    ) -> None:
        super().__init__(device_id, observers)
        self._commands = commands
        self._send = send

    async def send_state(self, state: Mapping[str, Any], time_like: TimeLike = None) -> bool:
        """Send one state of this device; see `Device.send_state`."""
        return await self._send(self.device_id, [(state, time_like)], False)

    async def send_states(self, states: Iterable[tuple[Mapping[str, Any], TimeLike]]) -> bool:
        """Send several states as one message; see `Device.send_states`."""
        return await self._send(self.device_id, list(states), True)

    def commands(self) -> AsyncIterator[dict[str, Any]]:
        """Iterate over the commands for this device; see `AsyncDevice.commands`."""
        return self._commands


class AsyncGateway(AsyncDevice):
    """A device that also speaks for peripherals, over its one connection."""

    def _prepare(self) -> None:
        super()._prepare()
        self._peripherals: dict[str, AsyncPeripheral] = {}

    async def add_peripheral(self, device_id: str) -> AsyncPeripheral:
        """Return the peripheral of that id, its commands subscribed if connected.

        The same id gives the same object.

        Raises:
            LosantError: The platform refused to subscribe to its commands.
            ValueError: No device id, or the gateway's own.
        """
        check_device_id(device_id)
        if device_id == self._device_id:
            raise ValueError("a gateway is not its own peripheral")
        self._check_loop()
        found = self._peripherals.get(device_id)
        if found is not None:
            return found
        observers = Observers(strict=self._strict)
        feed = self._commands[device_id] = _Feed(self._count_dropped, self._check_loop)
        made = AsyncPeripheral(device_id, observers, feed, self._speak)
        self._peripherals[device_id] = made
        self._subjects[device_id] = (made, observers)
        topic = command_topic(device_id)
        self._routes[topic] = device_id
        await self._subscribed(topic)
        return made

    async def remove_peripheral(self, device_id: str) -> None:
        """Receive its commands no more; nothing if it is not there."""
        self._check_loop()
        if self._peripherals.pop(device_id, None) is None:
            return
        del self._subjects[device_id]
        self._commands.pop(device_id).end()
        topic = command_topic(device_id)
        del self._routes[topic]
        self._drop(topic)

    @property
    def peripherals(self) -> tuple[AsyncPeripheral, ...]:
        """Those that were added, in order."""
        return tuple(self._peripherals.values())

    async def _speak(
        self, device_id: str, states: list[tuple[Mapping[str, Any], TimeLike]], several: bool
    ) -> bool:
        if device_id not in self._peripherals:
            return False
        texts = self._encode(states)
        payload = self._join(texts) if several else self._checked(texts[0].encode())
        return await self._deliver(state_topic(device_id), payload, texts)
