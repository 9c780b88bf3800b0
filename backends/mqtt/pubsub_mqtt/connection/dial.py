"""Making a connection: name, TCP, TLS and WebSocket, written once and driven three ways.

`dial_steps` does everything but wait. It is a generator that yields what must happen before
it can go on: an event loop waits without blocking (`asyncio_driver.dial`), a thread just waits
(`dial_blocking`), and a program that polls does both between other work, for which `advance`
leaves only the waits.

Sources: RFC 8305 (Happy Eyeballs), of which the order of addresses is left to the system.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from .address import BrokerAddress, WebSocketTarget
from .transport import BufferedSocket, WebSocket

__all__ = ["Call", "Dial", "Wait", "advance", "dial_blocking", "dial_steps", "wait_ready"]

T = TypeVar("T")

_IN_PROGRESS: Final = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY, errno.EINTR)
_STAGGER: Final = 0.25
"""Seconds before the next address is tried beside those that have not answered."""


@dataclass(frozen=True, slots=True)
class Call:
    """Something that blocks: resolve a name, read certificates. Send its result."""

    work: Callable[[], Any]


class Wait(NamedTuple):
    """Wait until one of these descriptors is ready. Send those that are, none when time is up.

    Attributes:
        reads: Descriptors that have input, or the end of it.
        writes: Descriptors that take output, or whose connection was made or refused.
        until: Of `time.monotonic`; None for no limit.
    """

    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    until: float | None = None


_Steps: TypeAlias = Generator[Call | Wait, Any, T]
Dial: TypeAlias = Generator[Call | Wait, Any, BufferedSocket]
"""A dial under way; it returns the socket. Closing it closes what was opened."""


def dial_steps(broker: BrokerAddress, timeout: float | None = None) -> Dial:
    """Connect step by step, TLS and WebSocket handshake included.

    Args:
        broker: Where to, and how.
        timeout: Seconds for all of it from the first step on; None leaves that to the driver.

    Raises:
        OSError: As the operating system says; `TimeoutError` when time is up.
        ConnectError: TLS settings or the WebSocket handshake are at fault.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    context = None
    if broker.tls is not None:
        # Before anything is opened: files that cannot be read need no connection.
        build = broker.tls.build
        context = build() if broker.tls.context else (yield from _call(build))
    sock = yield from _connect(broker, deadline)
    try:
        if not broker.unix_path:
            broker.prepare(sock)
        if context is not None:
            sock = context.wrap_socket(
                sock, server_hostname=broker.host or None, do_handshake_on_connect=False
            )
            yield from _handshake(sock, broker, deadline)
        plain = BufferedSocket(sock, corks=broker.corks)
        if broker.websocket is None:
            return plain
        framing = yield from _call(lambda: _framing(broker))  # imports wsproto, once
        plain.write(framing.request())
        while not plain.flush():
            yield from _ready(broker, deadline, writes=(sock.fileno(),))
        early = b""
        while not framing.open:
            yield from _ready(broker, deadline, reads=(sock.fileno(),))
            if chunk := plain.fill():
                early, _ = framing.receive(chunk)
        return BufferedSocket(sock, framing=framing, early=early)
    except BaseException:  # GeneratorExit is how a driver gives up
        sock.close()
        raise


def _framing(broker: BrokerAddress) -> WebSocket:
    target = broker.websocket or WebSocketTarget()
    secure = broker.tls is not None
    return WebSocket(target.path, target.headers, broker.host, broker.port, secure=secure)


def _call(work: Callable[[], T]) -> _Steps[T]:
    result: T = yield Call(work)
    return result


def _ready(
    broker: BrokerAddress,
    deadline: float | None,
    *,
    reads: tuple[int, ...] = (),
    writes: tuple[int, ...] = (),
    until: float | None = None,
) -> _Steps[Collection[int]]:
    """Wait, for the deadline or *until* at most; return which are ready."""
    moments = [moment for moment in (deadline, until) if moment is not None]
    found: Collection[int] = yield Wait(reads, writes, min(moments, default=None))
    if not found and deadline is not None and time.monotonic() >= deadline:
        raise TimeoutError(f"{broker} did not answer in time")
    return found


def _connect(broker: BrokerAddress, deadline: float | None) -> _Steps[socket.socket]:
    if broker.unix_path:
        return (yield from _race(broker, [(socket.AF_UNIX, broker.unix_path)], deadline))
    flags = socket.AI_NUMERICHOST if broker.literal else 0

    def resolve() -> list[tuple[int, Any]]:
        found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM, flags=flags)
        return [(int(family), address) for family, _, _, _, address in found]

    addresses = resolve() if broker.literal else (yield from _call(resolve))
    return (yield from _race(broker, addresses, deadline))


def _race(
    broker: BrokerAddress, addresses: Sequence[tuple[int, Any]], deadline: float | None
) -> _Steps[socket.socket]:
    """Connect to the address that answers first, each starting a little after the last.

    One after the other, each with a share of the time, was tried for devices: a broken IPv6
    route then cost half of the timeout; here it costs 250 ms.
    """
    waiting = deque(enumerate(addresses))
    pending: dict[int, tuple[int, socket.socket]] = {}
    failures: dict[int, OSError] = {}
    try:
        while waiting or pending:
            if waiting:
                number, (family, address) = waiting.popleft()
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                code = sock.connect_ex(address)
                if not code:
                    return sock
                if code not in _IN_PROGRESS or family == socket.AF_UNIX:
                    # A Unix socket whose backlog is full says EAGAIN, and is not connecting.
                    sock.close()
                    failures[number] = _os_error(code)
                    continue
                pending[sock.fileno()] = number, sock
            until = time.monotonic() + _STAGGER if waiting else None
            ready = yield from _ready(broker, deadline, writes=tuple(pending), until=until)
            for descriptor in ready:
                number, sock = pending.pop(descriptor)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return sock
                sock.close()
                failures[number] = _os_error(code)
    finally:
        for _, sock in pending.values():
            sock.close()
    # The first address is what the system prefers, so its failure says most.
    raise failures[min(failures)] if failures else OSError(f"{broker.host} has no address")


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))  # becomes ConnectionRefusedError …


def _handshake(sock: ssl.SSLSocket, broker: BrokerAddress, deadline: float | None) -> _Steps[None]:
    while True:
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            yield from _ready(broker, deadline, reads=(sock.fileno(),))
        except ssl.SSLWantWriteError:
            yield from _ready(broker, deadline, writes=(sock.fileno(),))
        else:
            return


# --- drivers ----------------------------------------------------------------------------


def advance(steps: Dial, ready: Collection[int] | None = None) -> Wait:
    """Go on to the next wait, with what blocks done in this thread.

    Args:
        steps: What `dial_steps` returned.
        ready: The descriptors that are ready; None to begin.

    Raises:
        StopIteration: It is done; the value is the socket.
        OSError, ConnectError: As `dial_steps`; nothing is left open.
    """
    try:
        step = steps.send(ready)
        while isinstance(step, Call):
            step = steps.send(step.work())
    except BaseException:
        steps.close()  # where the work failed the generator does not know of it
        raise
    return step


def wait_ready(wait: Wait) -> list[int]:
    """Wait in this thread; return the descriptors that are ready."""
    with selectors.DefaultSelector() as selector:
        for descriptor in wait.reads:
            selector.register(descriptor, selectors.EVENT_READ)
        for descriptor in wait.writes:
            selector.register(descriptor, selectors.EVENT_WRITE)
        timeout = None if wait.until is None else max(wait.until - time.monotonic(), 0.0)
        return [key.fd for key, _ in selector.select(timeout)]


def dial_blocking(broker: BrokerAddress, timeout: float) -> BufferedSocket:
    """Connect in the calling thread; see `dial_steps`."""
    steps = dial_steps(broker, timeout)
    try:
        wait = advance(steps)
        while True:
            wait = advance(steps, wait_ready(wait))
    except StopIteration as done:
        sock: BufferedSocket = done.value
        return sock
    finally:
        steps.close()
