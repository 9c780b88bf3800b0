"""How clients are told the host of a peer."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ipaddress
import socket

__all__ = ["PeerNames"]

_KEPT = 1024
_DEADLINE = 2.0


class PeerNames:
    """Names of addresses: this machine's for loopback, the address itself for others.

    Args:
        resolve: Ask the name service for those of others. The original always does, and blocks
            everybody meanwhile; here only the peer's own login waits, for two seconds at most.
    """

    def __init__(self, *, resolve: bool = False) -> None:
        self._resolve = resolve
        self._own = socket.gethostname()
        self._found = collections.OrderedDict[str, str]()

    def known(self, address: str) -> str:
        """Return the name that is known without asking."""
        try:
            local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        except ValueError:
            local = False
        return self._own if local else self._found.get(address, address)

    async def ask(self, address: str) -> str:
        """Return the name, after asking the name service where that is wanted."""
        name = self.known(address)
        if not self._resolve or name != address:
            return name
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_DEADLINE):
                name = (await asyncio.get_running_loop().getnameinfo((address, 0)))[0]
        self._found[address] = name
        while len(self._found) > _KEPT:
            self._found.popitem(last=False)
        return name
