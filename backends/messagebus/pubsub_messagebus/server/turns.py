"""Whose turn it is when more is to be done than can be done at once."""

from __future__ import annotations

import asyncio
import collections
from typing import Final, Protocol

__all__ = ["TURN", "Taker", "Turns"]

TURN: Final = 0.005
"""Seconds in which one connection's burst may keep the others waiting."""

# While bursts wait: seconds for the messages that just arrived on a connection, and then for
# the bursts together.
_SHORT_TURN = 0.0005
_ROUND = 0.02
# Messages are acted upon even if their sender has gone. So connections would pile up that come
# faster than their bursts can be worked off, each with up to 256 KiB that were read. With so
# many waiting, no more are taken.
_CROWD = 200


class Taker(Protocol):
    """A connection, as `Turns` sees it."""

    def proceed(self) -> None:
        """Act on more of the burst."""

    def end(self, *, abort: bool = False, fault: bool = False) -> None:
        """Leave the broker and close."""


class Turns:
    """Shares the event loop between connections.

    Every connection acts on messages when they arrive. Messages that take longer than a turn
    are a burst, whose rest waits here for the next turn; so a client that sends little never
    waits behind all that send much. Ends of connections wait here as well, because each has
    to be told to others.
    """

    def __init__(self) -> None:
        self._bursts = collections.deque[Taker]()
        self._endings = collections.deque[tuple[Taker, bool]]()
        self._scheduled = False

    @property
    def waiting(self) -> bool:
        """Whether bursts wait."""
        return bool(self._bursts)

    @property
    def first(self) -> float:
        """Seconds that a connection may spend on messages that have just arrived."""
        return _SHORT_TURN if self._bursts else TURN

    @property
    def full(self) -> bool:
        """Whether so many wait that a new connection would make it worse."""
        return len(self._bursts) >= _CROWD

    def again(self, connection: Taker) -> None:
        """Let a connection go on with its burst after the others had a turn."""
        self._bursts.append(connection)
        self._schedule()

    def end(self, connection: Taker, *, fault: bool) -> None:
        """End a lost or slow connection soon."""
        self._endings.append((connection, fault))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        self._scheduled = False
        clock = asyncio.get_running_loop().time
        until = clock() + _ROUND
        # Each once, and at least one, however little time is left.
        for number in range(len(self._bursts)):
            if number and clock() > until:
                break
            self._bursts.popleft().proceed()
        for number in range(len(self._endings)):
            if number and clock() > until:
                break
            connection, fault = self._endings.popleft()
            connection.end(abort=True, fault=fault)
        if self._bursts or self._endings:
            self._schedule()
