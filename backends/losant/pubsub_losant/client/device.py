"""The client of a program without an event loop: the API of ``losant-mqtt`` 1.2.1, repaired.

A program written for that package runs with its import line changed:

    from pubsub_losant import Device

It creates no thread. Observers are called in the thread that calls `Device.loop` or the
blocking `Device.connect` (and ``close`` in the one that calls `Device.close`); every method
may be called from any thread.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from pubsub_core.errors import ConnectError
from pubsub_losant.errors import LosantError
from pubsub_losant.times import TimeLike
from pubsub_losant.topics import (
    check_device_id,
    command_topic,
    encode_hello,
    state_topic,
)
from pubsub_mqtt.connection import Session
from pubsub_mqtt.connection.dial import Dial, Wait, advance, dial_steps
from pubsub_mqtt.connection.transport import BufferedSocket

from .device_base import DeviceCore
from .link import limit_unacknowledged
from .observers import Observers, PeripheralCore

__all__ = ["Device", "Gateway", "Peripheral"]

_LINGER: Final = 0.5
_LONG: Final = 3600.0
_BURST: Final = 0.001
"""Seconds between two messages that belong to one burst."""


class _Bell:
    """Wakes a thread that polls."""

    def __init__(self) -> None:
        self.reads = self._writes = -1
        self.reads, self._writes = os.pipe()
        os.set_blocking(self.reads, False)
        os.set_blocking(self._writes, False)

    def ring(self) -> None:
        with suppress(BlockingIOError):  # it rings already
            os.write(self._writes, b"\0")

    def quiet(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.reads, 512)

    def close(self) -> None:
        """Close it; idempotent."""
        for each in (self.reads, self._writes):
            if each >= 0:
                os.close(each)
        self.reads = self._writes = -1

    def __del__(self) -> None:
        self.close()  # of a device that was never closed


class Device(DeviceCore):
    """One device of the platform: it sends states and receives commands.

    `connect` and call `loop` again and again, or let the blocking `connect` do that. A lost
    connection comes back by itself in both.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._lock = threading.RLock()  # the connection and every rule
        self._turns = threading.RLock()  # one thread at a time runs the loop
        self._bell: _Bell | None = None
        self._polls = False  # a turn waits, and would send what it is rung for
        self._awaits_room = False  # it will send anyway: there is room, or it was rung
        self._pushed_at = 0.0
        self._ended = threading.Event()  # what waits for the guard need wait no longer
        self._busy = 0  # turns under way in the thread that holds `_turns`
        self._blocking = False
        self._running = False
        self._closing = False
        self._calling: int | None = None
        self._epoch = 0
        self._steps: Dial | None = None
        self._wait: Wait | None = None
        self._accept_by = 0.0

    # --- connection ----------------------------------------------------------------------

    def connect(self, blocking: bool = True) -> None:
        """Connect, and either return or run the loop here until `close` or a fatal error.

        Returns at once while connecting or connected. With ``blocking=False`` the link is
        there when it returns; the session follows in `loop`.

        Raises:
            OSError: The dial failed; with ``retry_first=True`` it is tried again instead.
            LosantTLSError: The broker's certificate was refused.
            LosantConnectError: The WebSocket was refused.
            LosantAuthError: Blocking only: credentials were refused, now or later.
        """
        fresh = False
        with self._lock:
            if self._active:
                # An observer's error can have ended a blocking call; this goes on with it.
                if not (blocking and self._blocking and not self._running):
                    return
            else:
                context = self._tls.build() if self._secure else None
                self._open()
                self._ended = threading.Event()
                self._secure_with(context)
                self._epoch += 1
                self._blocking = blocking
                self._closing = False
                self._connection.on_lost = self._on_lost
                self._connection.on_session = self._on_session
                self._bell = self._bell or _Bell()  # an earlier turn may still poll it
                self._steps = self._begin_dial()
                fresh = True
            epoch = self._epoch
        try:
            if fresh:
                self._first_dial(epoch)
        except BaseException:
            with self._lock:
                if epoch == self._epoch:
                    self._over()
                    self._connection.end()
                    self._stop()
            raise
        if not blocking:
            return
        self._running = True
        try:
            while self._active and epoch == self._epoch:
                self._turn(_LONG)
            self._raise_fatal()
        finally:
            self._running = False

    def close(self) -> None:
        """End the connection in good order; nothing if there is none.

        ``close`` is told in this thread, before it returns. In an observer everything of
        this happens after the observer returned.
        """
        with self._lock:
            if not self._active:
                return
            if self._calling == threading.get_ident():
                self._closing = True
                self._online = False
                self._ended.set()
                return
            self._shut_down()
        self._tell_close()

    def loop(self, timeout: float = 1) -> None:
        """Do what is due, waiting up to *timeout* seconds for it: read, write, reconnect.

        Only resolving a name can take longer. Does nothing when there is no connection.

        Raises:
            LosantError: The blocking `connect` runs the loop already; or, once, what has ended
                all attempts: `LosantAuthError`, `LosantTLSError`, `LosantConnectError`.
        """
        if self._active and self._blocking:
            raise LosantError("Connection in blocking mode, don't call loop")
        self._turn(max(timeout, 0.0))
        self._raise_fatal()

    def _raise_fatal(self) -> None:
        with self._lock:
            error, self._fatal = self._fatal, None
        if error is not None:
            raise error

    # --- sending -------------------------------------------------------------------------

    def send_state(
        self,
        state: Mapping[str, Any],
        time_like: TimeLike = None,
        *,
        flow_version: str | None = None,
        meta: Any = None,
    ) -> bool:
        """Send one state; return whether it was accepted for sending, or is kept.

        Args:
            state: Names and values of attributes.
            time_like: None for now; a `datetime` (UTC when it has no zone), what
                `time.gmtime` and its like return, or a number or text as the platform
                reads it.
            flow_version: Version of the workflow that shall take it.
            meta: Any JSON value that travels beside it.

        Raises:
            TypeError: Not a mapping, no time, or a value without a form in JSON.
            ValueError: NaN or infinity, a time before 1970, or more than 256 KiB.
        """
        texts = self._encode([(state, time_like)], flow_version, meta)
        return self._deliver(self._topic, self._checked(texts[0].encode()), texts)

    def send_states(self, states: Iterable[tuple[Mapping[str, Any], TimeLike]]) -> bool:
        """Send several states with their times as one message; see `send_state`."""
        texts = self._encode(states)
        return self._deliver(self._topic, self._join(texts), texts)

    def send_hello(
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
        return self._deliver(self._hello_topic(), payload)

    def publish(self, topic: str, payload: bytes | str, *, qos: int | None = None) -> bool:
        """Publish to a topic of your own, where the access key allows it.

        Raises:
            ValueError: A topic of the platform, a wildcard, or more than 256 KiB.
        """
        data = self._custom_payload(topic, payload, qos)
        return self._deliver(topic, data, qos=qos)

    def subscribe(self, topic: str) -> None:
        """Receive messages to a topic of your own, as ``message`` events.

        It comes back after a reconnect. State and command topics of other devices in the
        key's scope are allowed as well. A refusal is an ``error`` event.
        """
        self._readable(topic)
        with self._lock:
            if topic not in self._custom:
                self._custom[topic] = None
                self._want(topic)
                self._push()

    def unsubscribe(self, topic: str) -> None:
        """Stop getting it; nothing if it was not subscribed."""
        with self._lock:
            if topic in self._custom:
                del self._custom[topic]
                self._drop(topic)
                self._push()

    def _deliver(
        self, topic: str, payload: bytes, texts: list[str] | None = None, qos: int | None = None
    ) -> bool:
        """Send, keep or refuse; *texts* are the states in it, where it holds any."""
        level = self._qos if qos is None else qos
        with self._lock:
            if not self._online or (self._backlog and texts is not None):
                return texts is not None and self._accepting and self._keep(topic, texts)
            delay = self._admit(topic)
            if not delay:
                if delay is None:
                    self._ring()
                    return False
                sent = self._write(topic, payload, level)
                self._push()
                return sent and self._online
            epoch, ended = self._epoch, self._ended
            self._ring()
        ended.wait(delay)
        with self._lock:
            if epoch != self._epoch or not self._accepting:
                return False
            if not self._online:
                return texts is not None and self._keep(topic, texts)
            sent = self._write(topic, payload, level)
            self._push()
            return sent and self._online

    def _over(self) -> None:
        super()._over()
        self._ended.set()

    @property
    def _accepting(self) -> bool:
        return self._active and not self._closing

    def _push(self) -> None:
        """Write as much as the system takes; the loop's thread writes the rest."""
        if self._awaits_room:
            return  # it sends this as well, and more at once
        before, self._pushed_at = self._pushed_at, time.monotonic()
        if self._polls and self._pushed_at - before < _BURST and self._bell is not None:
            # Many in a row: one call to the system for some of them instead of one for each.
            self._awaits_room = True
            self._bell.ring()
            return
        if not self._connection.flush() or not self._online:
            self._ring()

    def _ring(self) -> None:
        # Also for a turn that does not poll yet: it has decided what to wait for, and for how
        # long, before this happened.
        if self._busy and self._bell is not None:
            self._bell.ring()

    # --- the loop ------------------------------------------------------------------------

    def _begin_dial(self) -> Dial:
        return dial_steps(self._endpoint, self._connect_timeout)

    def _first_dial(self, epoch: int) -> None:
        """Dial until there is a link, or it was closed meanwhile."""
        while True:
            with self._lock:
                if epoch != self._epoch or self._steps is None:
                    return
            with self._turn_taken():
                failure = self._step(_LONG, epoch, first=True)
            if failure is not None:
                raise failure

    @contextmanager
    def _turn_taken(self, timeout: float = -1) -> Generator[bool, None, None]:
        """Be the one thread that runs the loop; tell whether that came true in time."""
        if not self._turns.acquire(timeout=timeout):
            yield False
            return
        try:
            with self._lock:
                self._busy += 1
            yield True
        finally:
            with self._lock:
                self._busy -= 1
                if not self._active:
                    self._stop()
            self._turns.release()

    def _step(self, timeout: float, epoch: int, *, first: bool) -> BaseException | None:
        """Go on dialling for up to *timeout* seconds; return why it failed, if that counts."""
        with self._lock:
            steps, wait = self._steps, self._wait
            if steps is None or epoch != self._epoch:
                return None
        end = time.monotonic() + timeout
        try:
            if wait is None:
                wait = advance(steps)  # resolves the name, outside of any lock
            while True:
                now = time.monotonic()
                until = end if wait.until is None else min(end, wait.until)
                interest = dict.fromkeys(wait.reads, select.POLLIN)
                interest |= dict.fromkeys(wait.writes, select.POLLOUT)
                ready = self._poll(interest, until - now)
                now = time.monotonic()
                if epoch != self._epoch:
                    steps.close()
                    return None
                if ready or (wait.until is not None and now >= wait.until):
                    wait = advance(steps, ready)
                elif now >= end:
                    with self._lock:
                        if epoch == self._epoch:
                            self._wait = wait
                            return None
        except StopIteration as done:
            sock: BufferedSocket = done.value
            with self._lock:
                if epoch != self._epoch:
                    sock.close()
                    return None
                self._steps = self._wait = None
                limit_unacknowledged(sock.fileno(), 2.0 * self._keep_alive)
                self._accept_by = time.monotonic() + self._connect_timeout
                self._connection.begin(sock, where=str(self._endpoint))
                self._connection.flush()
            return None
        except (OSError, ConnectError) as exc:
            with self._lock:
                if epoch != self._epoch:
                    return None
                self._steps = self._wait = None
                failure = self._dial_failure(exc, first=first)
            return failure if first else None
        except BaseException:
            steps.close()
            with self._lock:
                if self._steps is steps:  # an interrupt: the next turn dials again
                    self._steps = self._wait = None
                    self._retry_at = time.monotonic()
            raise

    def _poll(self, interest: Mapping[int, int], timeout: float) -> list[int]:
        """Wait for descriptors, each with its mask, or the bell; return those that are ready."""
        poll = select.poll()
        with self._lock:
            bell = self._bell
            if bell is None:
                return []
            self._polls = self._online
            self._awaits_room = self._online and any(
                mask & select.POLLOUT for mask in interest.values()
            )
        poll.register(bell.reads, select.POLLIN)
        for descriptor, mask in interest.items():
            poll.register(descriptor, mask)
        try:
            found = poll.poll(max(timeout, 0.0) * 1000)
        finally:
            with self._lock:
                self._polls = self._awaits_room = False
        ready: list[int] = []
        for each, _ in found:
            if each == bell.reads:
                bell.quiet()
            else:
                ready.append(each)
        return ready

    def _turn(self, timeout: float) -> None:
        """Report events, wait once, act, report again."""
        with self._turn_taken(min(timeout, threading.TIMEOUT_MAX)) as ours:
            if not ours:
                return  # another thread does it
            if self._dispatch():
                timeout = 0.0
            with self._lock:
                if not self._active:
                    return
                epoch = self._epoch
                now = time.monotonic()
                if self._retry_at is not None and now >= self._retry_at:
                    self._retry_at = None
                    self._steps = self._begin_dial()
                dialling = self._steps is not None
                interest, due = ({}, 0.0) if dialling else self._interest(now)
            if dialling:
                self._step(timeout, epoch, first=False)
            else:
                ready = self._poll(interest, min(timeout, due))
                with self._lock:
                    if epoch == self._epoch and self._active:
                        self._act(ready=bool(ready))
            self._dispatch()

    def _interest(self, now: float) -> tuple[dict[int, int], float]:
        """Return descriptors to wait for, and the longest time."""
        sock = self._connection.socket
        if sock is None:
            return {}, _LONG if self._retry_at is None else self._retry_at - now
        due = [_LONG]
        if self._connection.connecting:
            due.append(self._accept_by - now)
        timers = (self._connection.tick(), self._due(now))
        due.extend(each for each in timers if each is not None)
        self._connection.flush()
        sock = self._connection.socket
        if sock is None or self._events or sock.pending():
            return {}, 0.0
        mask = select.POLLIN | (select.POLLOUT if self._connection.wants_write else 0)
        return {sock.fileno(): mask}, min(due)

    def _act(self, *, ready: bool) -> None:
        connection = self._connection
        sock = connection.socket
        if sock is None:
            return
        if ready or sock.pending():
            connection.feed()
        if connection.wants_write:
            connection.flush()
        if connection.connecting and time.monotonic() >= self._accept_by:
            connection.end(self._silent())
            return
        connection.tick()
        self._due(time.monotonic())
        if connection.wants_write:
            connection.flush()

    def _on_session(self, session: Session) -> None:
        self._began(session)

    def _on_lost(self, error: ConnectError) -> None:
        self._lost(error)

    # --- telling -------------------------------------------------------------------------

    def _dispatch(self) -> bool:
        """Call the observers of each event, in order; return whether there was any."""
        told = False
        before, self._calling = self._calling, threading.get_ident()
        try:
            while self._events:
                try:
                    name, device_id, args = self._events.popleft()
                except IndexError:  # another thread closed the device
                    break
                told = True
                self._fire(name, device_id, args)
                if self._closing:
                    break
                self._raise_observer_error()
        finally:
            self._calling = before
        if self._closing and before is None:
            with self._lock:
                closes = self._active and self._closing
                if closes:
                    self._shut_down()
            if closes:
                self._tell_close()
        return told

    def _raise_observer_error(self) -> None:
        error, self._observer_error = self._observer_error, None
        if error is not None and self._raise_observer_errors:
            raise error

    def _tell_close(self) -> None:
        self._fire("close", self._device_id, ())
        self._raise_observer_error()

    def _shut_down(self) -> None:
        """Say DISCONNECT if there is a session, and close everything; with the lock held."""
        connection = self._connection
        self._over()
        self._closing = False
        self._epoch += 1
        self._events.clear()
        if connection.connected:
            connection.disconnect()
            self._goodbye()
        connection.end()
        connection.fail_pending()
        self._stop()

    def _goodbye(self) -> None:
        """Send queued bytes and the end of the stream, and let the broker close first.

        Closing a socket with unread input resets the connection, and the broker could lose
        what was sent last.
        """
        connection = self._connection
        deadline = time.monotonic() + _LINGER
        while not connection.flush() and (left := deadline - time.monotonic()) > 0:
            sock = connection.socket
            if sock is None:
                return
            _wait_for(sock, select.POLLOUT, left)
        sock = connection.socket
        if sock is None:
            return
        sock.finish()
        while not sock.ended() and (left := deadline - time.monotonic()) > 0:
            _wait_for(sock, select.POLLIN, left)

    def _stop(self) -> None:
        """Release the resources of a closed device; a thread in a turn does it when it leaves."""
        if self._busy:
            self._ring()
            return
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()
        steps, self._steps, self._wait = self._steps, None, None
        if steps is not None:
            steps.close()


def _wait_for(sock: BufferedSocket, mask: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(sock.fileno(), mask)
    poll.poll(max(seconds, 0.0) * 1000)


class Peripheral(PeripheralCore):
    """A device without a connection of its own, behind a `Gateway`, which makes it.

    Observers get it as their first argument. It knows the events ``command``, and its
    gateway's ``connect``, ``reconnect`` and ``close``.
    """

    def __init__(
        self,
        device_id: str,
        observers: Observers,
        send: Callable[[str, list[tuple[Mapping[str, Any], TimeLike]], bool], bool],
    ) -> None:
        super().__init__(device_id, observers)
        self._send = send

    def send_state(self, state: Mapping[str, Any], time_like: TimeLike = None) -> bool:
        """Send one state of this device; see `Device.send_state`."""
        return self._send(self.device_id, [(state, time_like)], False)

    def send_states(self, states: Iterable[tuple[Mapping[str, Any], TimeLike]]) -> bool:
        """Send several states as one message; see `Device.send_states`."""
        return self._send(self.device_id, list(states), True)


class Gateway(Device):
    """A device that also speaks for peripherals, over its one connection."""

    def _prepare(self) -> None:
        super()._prepare()
        self._peripherals: dict[str, Peripheral] = {}

    def add_peripheral(self, device_id: str) -> Peripheral:
        """Return the peripheral of that id; its commands are subscribed at once if connected.

        The same id gives the same object.

        Raises:
            ValueError: No device id, or the gateway's own.
        """
        check_device_id(device_id)
        if device_id == self._device_id:
            raise ValueError("a gateway is not its own peripheral")
        with self._lock:
            found = self._peripherals.get(device_id)
            if found is not None:
                return found
            observers = Observers(strict=self._strict)
            made = self._peripherals[device_id] = Peripheral(device_id, observers, self._speak)
            self._subjects[device_id] = (made, observers)
            topic = command_topic(device_id)
            self._routes[topic] = device_id
            self._want(topic)
            self._push()
            return made

    def remove_peripheral(self, device_id: str) -> None:
        """Receive its commands no more; nothing if it is not there."""
        with self._lock:
            if self._peripherals.pop(device_id, None) is None:
                return
            del self._subjects[device_id]
            topic = command_topic(device_id)
            del self._routes[topic]
            self._drop(topic)
            self._push()

    @property
    def peripherals(self) -> tuple[Peripheral, ...]:
        """Those that were added, in order."""
        return tuple(self._peripherals.values())

    def _speak(
        self, device_id: str, states: list[tuple[Mapping[str, Any], TimeLike]], several: bool
    ) -> bool:
        if device_id not in self._peripherals:
            return False
        texts = self._encode(states)
        payload = self._join(texts) if several else self._checked(texts[0].encode())
        return self._deliver(state_topic(device_id), payload, texts)
