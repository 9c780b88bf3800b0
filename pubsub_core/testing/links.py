"""Ways to a broker that can be interrupted."""

from __future__ import annotations

from typing import Protocol

from pubsub_core.bus import Bus
from pubsub_core.events import Status
from pubsub_core.memory import Space
from pubsub_core.memory.backend import MemoryBackend

from .proxy import Direction, FaultProxy
from .terms import Need

__all__ = ["Link", "MemoryLink", "ProxyLink"]


class Link(Protocol):
    """A way to the broker that can be interrupted."""

    @property
    def port(self) -> int | None:
        """Port to connect to instead of the server's; None to use the server's."""
        ...

    @property
    def swallowed(self) -> int:
        """Bytes to the broker that were lost while it was frozen."""
        ...

    async def open(self) -> None:
        """Make it ready."""
        ...

    def attach(self, bus: Bus) -> None:
        """Learn of a bus that goes through the link."""
        ...

    async def cut(self) -> None:
        """End every session that uses the link, without a goodbye. New ones are possible."""
        ...

    async def down(self) -> None:
        """End every session, and let none come up until `up`."""
        ...

    async def up(self) -> None:
        """Let sessions come up again."""
        ...

    async def freeze(self) -> None:
        """Pass nothing on in either direction, and close nothing."""
        ...

    async def thaw(self) -> None:
        """Pass everything on again; frozen bytes are lost, and the old connections with them."""
        ...

    async def close(self) -> None:
        """Give it up."""
        ...


class ProxyLink:
    """A `FaultProxy` in front of the server."""

    def __init__(self, host: str, port: int) -> None:
        self.proxy = FaultProxy(host, port)

    @property
    def port(self) -> int | None:
        """Port of the proxy."""
        return self.proxy.port

    @property
    def swallowed(self) -> int:
        """Bytes to the broker that the black hole took."""
        return self.proxy.lost[Direction.UP]

    async def open(self) -> None:
        """Start the proxy."""
        await self.proxy.start()

    def attach(self, bus: Bus) -> None:
        """Do nothing: the connections pass through the proxy."""

    async def cut(self) -> None:
        """Close every connection."""
        await self.proxy.cut()

    async def down(self) -> None:
        """Refuse new connections, and close those there are."""
        self.proxy.refuse(True)
        await self.proxy.cut()

    async def up(self) -> None:
        """Accept connections again."""
        self.proxy.refuse(False)

    async def freeze(self) -> None:
        """Swallow everything, both ways."""
        self.proxy.blackhole(True)

    async def thaw(self) -> None:
        """Pass everything on again."""
        self.proxy.blackhole(False)

    async def close(self) -> None:
        """Stop the proxy."""
        await self.proxy.stop()


class _HasWord(Protocol):
    """A trial, as far as a space needs one."""

    word: str


class MemoryLink:
    """The counterpart of a proxy for ``memory://``, where only sessions can be cut."""

    def __init__(self, trial: _HasWord) -> None:
        self._space = Space.named(trial.word)
        self._buses: list[Bus] = []

    @property
    def swallowed(self) -> int:
        """There is nothing to swallow."""
        return 0

    @property
    def port(self) -> int | None:
        """There is none."""
        return None

    async def open(self) -> None:
        """Let sessions come up."""
        self._space.refuse(False)

    def attach(self, bus: Bus) -> None:
        """Remember the bus, whose session is to be cut."""
        self._buses.append(bus)

    async def cut(self) -> None:
        """End the sessions."""
        for bus in self._buses:
            if bus.status is Status.ONLINE:
                bus.native(MemoryBackend).cut(ConnectionResetError("the test cut the session"))

    async def down(self) -> None:
        """End the sessions, and refuse new ones in the whole space."""
        self._space.refuse(True)
        await self.cut()

    async def up(self) -> None:
        """Accept sessions again."""
        self._space.refuse(False)

    async def freeze(self) -> None:
        """Refuse: there is nothing that could fall silent."""
        raise NotImplementedError(Need.WIRE.value)

    async def thaw(self) -> None:
        """Refuse: there is nothing that could fall silent."""
        raise NotImplementedError(Need.WIRE.value)

    async def close(self) -> None:
        """Accept sessions again."""
        self._space.refuse(False)
