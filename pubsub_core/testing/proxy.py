"""A TCP proxy that breaks connections on demand, the ways networks do.

Put it between a client and a server, let traffic flow, then cut, freeze, delay or dribble it.
Every fault is immediate, lasts until it is taken back, and holds for present and future
connections alike. Bytes are counted on both sides, so that a test can wait for "the client
has sent its PUBLISH" instead of sleeping.

Each direction of a connection is a queue with a clock, and no task: nothing of the proxy can
be left behind. Bytes that arrive are taken at once, up to `HELD` bytes while it cannot go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from enum import StrEnum
from types import TracebackType
from typing import Self, cast

__all__ = ["Direction", "FaultProxy"]

HELD = 1024 * 1024
"""Bytes that wait in one direction of one connection before the sender is slowed down."""

_LINGER_RESET = struct.pack("ii", 1, 0)


class Direction(StrEnum):
    """Which way a fault holds."""

    UP = "up"
    """From the client to the server."""
    DOWN = "down"
    """From the server to the client."""
    BOTH = "both"


class _Faults:
    """What is wrong with one direction at the moment."""

    __slots__ = ("budget", "delay", "dribble", "lose", "stall")

    def __init__(self) -> None:
        self.lose = False
        self.stall = False
        self.delay = 0.0
        self.dribble: tuple[int, float] | None = None
        self.budget: int | None = None


class _State:
    """What the proxy and its links share."""

    def __init__(self) -> None:
        self.links: set[_Link] = set()
        self.faults = {Direction.UP: _Faults(), Direction.DOWN: _Faults()}
        self.taken = {Direction.UP: 0, Direction.DOWN: 0}
        self.passed = {Direction.UP: 0, Direction.DOWN: 0}
        self.lost = {Direction.UP: 0, Direction.DOWN: 0}
        self.budget_once = True

    def end_budgets(self) -> None:
        for direction, faults in self.faults.items():
            faults.budget = None
            for link in self.links:
                link.lane(direction).budget = None

    def spent(self) -> None:
        if self.budget_once:
            self.end_budgets()


class FaultProxy:
    """Listen on a free loopback port and pass everything on to *host*:*port*.

    Use it as an asynchronous context manager, or call `start` and `stop`. All methods belong
    to the event loop that started it.

    Attributes:
        accepted: Connections so far.
        taken: Bytes that the proxy got, by direction.
        passed: Bytes that it passed on, by direction.
        lost: Bytes that black holes swallowed, by direction.
    """

    def __init__(
        self, host: str, port: int, *, listen_host: str = "127.0.0.1", listen_port: int = 0
    ) -> None:
        self._target = (host, port)
        self._listen_host = listen_host
        self._listen_port = listen_port
        self._listener: socket.socket | None = None
        self._refusing = False
        self._state = _State()
        self._opening: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self.taken = self._state.taken
        self.passed = self._state.passed
        self.lost = self._state.lost

    # --- life --------------------------------------------------------------------------

    @property
    def host(self) -> str:
        """Where it listens."""
        return self._listen_host

    @property
    def port(self) -> int:
        """The port it listens on, known once it was started."""
        return self._listen_port

    @property
    def connections(self) -> int:
        """How many connections pass through it now."""
        return len(self._state.links)

    async def start(self) -> None:
        """Listen. Started again after `stop` it has the same port."""
        if self._listener is None:
            self._listen(refusing=False)

    async def stop(self) -> None:
        """Stop listening and cut what is left; returns within a second."""
        self._stop_listening()
        for task in list(self._opening):
            task.cancel()
        if self._opening:
            await asyncio.wait(self._opening)
        await self.cut()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    # --- faults ------------------------------------------------------------------------

    async def cut(self, *, reset: bool = True) -> int:
        """End every connection, and return how many there were.

        Args:
            reset: With RST, as a crash or a firewall does; else with FIN, as a server that
                goes away in good order. What was still held is dropped in both cases.
        """
        links = list(self._state.links)
        for link in links:
            link.cut(reset=reset)
        if links:
            # A peer that does not read keeps a transport from closing in good order.
            await asyncio.wait([link.closed for link in links], timeout=1.0)
        for link in links:
            link.cut(reset=True)
        return len(links)

    def refuse(self, on: bool = True) -> None:
        """Refuse new connections (ECONNREFUSED), or take them again. The port stays ours."""
        if self._listener is not None and on is not self._refusing:
            self._stop_listening()
            self._listen(refusing=on)

    def blackhole(self, on: bool = True, direction: Direction = Direction.BOTH) -> None:
        """Swallow every byte, every end of a connection too, so that links look alive.

        Taken back, it resets the connections that lost something: their streams have holes.
        """
        for faults in self._of(direction):
            faults.lose = on
        if not on:
            for link in [link for link in self._state.links if link.damaged(direction)]:
                link.cut(reset=True)

    def stall(self, on: bool = True, direction: Direction = Direction.BOTH) -> None:
        """Hold everything back, and deliver it when taken back: a network that recovers."""
        for faults in self._of(direction):
            faults.stall = on
        self._pump()

    def delay(self, seconds: float, direction: Direction = Direction.BOTH) -> None:
        """Deliver everything that much later, in order; 0 for at once."""
        for faults in self._of(direction):
            faults.delay = seconds

    def dribble(self, size: int, interval: float, direction: Direction = Direction.BOTH) -> None:
        """Deliver *size* bytes every *interval* seconds; a size of 0 ends it."""
        for faults in self._of(direction):
            faults.dribble = (size, interval) if size else None
        self._pump()

    def drop_after(
        self, count: int, direction: Direction = Direction.UP, *, once: bool = True
    ) -> None:
        """Pass on exactly *count* more bytes per connection, then reset it.

        Args:
            count: Bytes, from now on.
            direction: One way, not both.
            once: End the fault with the first connection that it reset.
        """
        if direction is Direction.BOTH:
            raise ValueError("drop_after counts one direction; choose UP or DOWN")
        self._state.budget_once = once
        self._state.faults[direction].budget = count
        for link in self._state.links:
            link.lane(direction).budget = count

    def heal(self) -> None:
        """Take every fault back."""
        self.refuse(False)
        self.delay(0.0)
        self.dribble(0, 0.0)
        self._state.end_budgets()
        self.stall(False)
        self.blackhole(False)

    # --- within ------------------------------------------------------------------------

    def _of(self, direction: Direction) -> list[_Faults]:
        if direction is Direction.BOTH:
            return list(self._state.faults.values())
        return [self._state.faults[direction]]

    def _pump(self) -> None:
        for link in list(self._state.links):
            link.lane(Direction.UP).pump()
            link.lane(Direction.DOWN).pump()

    def _listen(self, *, refusing: bool) -> None:
        family = socket.AF_INET6 if ":" in self._listen_host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((self._listen_host, self._listen_port))
            self._listen_port = listener.getsockname()[1]
            # Bound without listening, the socket refuses, and keeps the port from others as
            # soon as it no longer allows sharing.
            if refusing:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            else:
                listener.listen(128)
                asyncio.get_running_loop().add_reader(listener, self._accept)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._refusing = refusing

    def _stop_listening(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the client has gone already
            return
        connection.setblocking(False)
        self.accepted += 1
        task = asyncio.get_running_loop().create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        link = _Link(self._state)
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: link.client, connection)
        except BaseException:
            connection.close()
            raise
        self._state.links.add(link)
        try:
            await loop.create_connection(lambda: link.server, *self._target)
        except OSError:  # the server is down: what the client sees is a reset
            link.cut(reset=True)
        except BaseException:
            link.cut(reset=True)
            raise


class _Side(asyncio.Protocol):
    """One of the two sockets of a link."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self.transport: asyncio.Transport | None = None
        self.gone = False
        self.incoming: _Lane
        """What this socket receives."""
        self.outgoing: _Lane
        """What this socket sends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._link.ended:
            self.end(reset=True)
        else:
            self.incoming.throttle()
            self.outgoing.pump()

    def data_received(self, data: bytes) -> None:
        self.incoming.feed(data)

    def eof_received(self) -> bool:
        self.incoming.feed(_END)
        return True  # the other direction may go on

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        if exc is not None:
            self.incoming.feed(_RESET)
        elif not self._link.ended:
            self.incoming.feed(_END)
        self._link.side_lost()

    def pause_writing(self) -> None:
        self.outgoing.blocked = True
        self.outgoing.throttle()

    def resume_writing(self) -> None:
        self.outgoing.blocked = False
        # Not at once: asyncio calls this in the middle of sending, and a transport that is closed,
        # or breaks, in here tells its end twice (CPython 3.11: "Exception in callback").
        asyncio.get_running_loop().call_soon(self.outgoing.pump)

    def end(self, *, reset: bool) -> None:
        if self.transport is None or self.gone:
            return
        if reset:
            connection = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # closed by now
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            self.transport.abort()
        else:
            self.transport.close()


class _Lane:
    """One direction of one connection: what was taken and not yet passed on."""

    def __init__(
        self, state: _State, link: _Link, direction: Direction, source: _Side, sink: _Side
    ) -> None:
        self._state = state
        self._link = link
        self._direction = direction
        self._source = source
        self._sink = sink
        self._faults = state.faults[direction]
        self._queue: deque[tuple[float, bytes | _Mark]] = deque()
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._dribbling = False
        self.budget = self._faults.budget
        self.blocked = False
        self.damaged = False
        self.ended = False

    def feed(self, item: bytes | _Mark) -> None:
        if self._link.ended:
            return
        size = len(item) if isinstance(item, bytes) else 0
        self._state.taken[self._direction] += size
        if self._faults.lose:
            self._state.lost[self._direction] += size
            self.damaged = True
            return
        due = asyncio.get_running_loop().time() + self._faults.delay
        self._queue.append((due, item))
        self._size += size
        self.pump()

    def pump(self) -> None:
        """Pass on what may go on now, and plan the rest."""
        self._stop_timer(unless_dribbling=self._faults.dribble is not None)
        loop = asyncio.get_running_loop()
        while self._queue and self._sink.transport is not None and not self._link.ended:
            if self._faults.stall or self.blocked:
                break
            due, item = self._queue[0]
            if due > loop.time():
                self._timer = self._timer or loop.call_at(due, self._tick)
                break
            if self._faults.dribble is not None and isinstance(item, bytes):
                if self._timer is None:
                    size, interval = self._faults.dribble
                    self._dribbling = True
                    self._timer = loop.call_later(interval, self._tick)
                    self._write(self._take(size))
                break
            self._queue.popleft()
            if isinstance(item, bytes):
                self._size -= len(item)
                self._write(item)
            else:
                self._mark(item)
        self.throttle()

    def throttle(self) -> None:
        """Slow the sender down while too much is held, or let it go on."""
        transport = self._source.transport
        if transport is None or self._source.gone or transport.is_closing():
            return
        if self._size > HELD:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def close(self) -> None:
        self._stop_timer(unless_dribbling=False)
        self._queue.clear()
        self._size = 0

    def _tick(self) -> None:
        self._timer = None
        self._dribbling = False
        self.pump()

    def _stop_timer(self, *, unless_dribbling: bool) -> None:
        if self._timer is not None and not (self._dribbling and unless_dribbling):
            self._timer.cancel()
            self._timer = None
            self._dribbling = False

    def _take(self, size: int) -> bytes:
        due, item = self._queue.popleft()
        assert isinstance(item, bytes)
        head, rest = item[:size], item[size:]
        if rest:
            self._queue.appendleft((due, rest))
        self._size -= len(head)
        return head

    def _write(self, data: bytes) -> None:
        spent = False
        if self.budget is not None:
            data, spent = data[: self.budget], len(data) >= self.budget
            self.budget -= len(data)
        self._state.passed[self._direction] += len(data)
        transport = self._sink.transport
        if data and transport is not None and not self._sink.gone:
            transport.write(data)
        if spent:
            self._link.cut(reset=True)
            self._state.spent()

    def _mark(self, mark: _Mark) -> None:
        if mark is _RESET:
            self._link.cut(reset=True)
            return
        if self.ended:
            return
        self.ended = True
        transport = self._sink.transport
        if transport is not None and not self._sink.gone and transport.can_write_eof():
            with contextlib.suppress(OSError):
                transport.write_eof()
        self._link.side_ended()


class _Mark(StrEnum):
    """What can travel besides bytes."""

    END = "end"
    RESET = "reset"


_END = _Mark.END
_RESET = _Mark.RESET


class _Link:
    """One connection through the proxy."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self.ended = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.client = _Side(self)
        self.server = _Side(self)
        up = _Lane(state, self, Direction.UP, self.client, self.server)
        down = _Lane(state, self, Direction.DOWN, self.server, self.client)
        self.client.incoming = self.server.outgoing = up
        self.server.incoming = self.client.outgoing = down
        self._lanes = {Direction.UP: up, Direction.DOWN: down}

    def lane(self, direction: Direction) -> _Lane:
        return self._lanes[direction]

    def damaged(self, direction: Direction) -> bool:
        if direction is Direction.BOTH:
            return any(lane.damaged for lane in self._lanes.values())
        return self._lanes[direction].damaged

    def cut(self, *, reset: bool) -> None:
        self.ended = True
        for lane in self._lanes.values():
            lane.close()
        self.client.end(reset=reset)
        self.server.end(reset=reset)
        self.side_lost()

    def side_ended(self) -> None:
        """Close both sockets once both directions have come to their end."""
        if all(lane.ended for lane in self._lanes.values()):
            self.cut(reset=False)

    def side_lost(self) -> None:
        """Forget the link once both sockets are gone."""
        sides = (self.client, self.server)
        if self.ended and all(side.gone or side.transport is None for side in sides):
            self._state.links.discard(self)
            if not self.closed.done():
                self.closed.set_result(None)
