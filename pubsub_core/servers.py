"""What embedded servers have in common: an address, a URL, ``async with``, and a restart.

For authors of backends. `pubsub_core.interfaces.DevServer` is what the command line and the
contract suite ask of a server; `ServerShell` is most of it, written once::

    class AcmeServer(ServerShell):
        backend = "acme"
        scheme = "acme"

        async def start(self) -> None:
            try:
                self._server = await asyncio.start_server(self._serve, self.host, self.port)
            except OSError as exc:
                raise self.cannot_listen(exc) from exc
            self.port = self._server.sockets[0].getsockname()[1]
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import TracebackType
from typing import ClassVar, Self

from .errors import ConnectError

__all__ = ["ServerShell", "url_of"]


def url_of(scheme: str, host: str, port: int) -> str:
    """Return the URL of a listener; an IPv6 address gets its brackets."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class ServerShell(abc.ABC):
    """An embedded server; loopback and a free port unless told otherwise.

    `start` sets `port` where it was 0, so that the next `start` takes the same one.

    Args:
        host: Address to listen on.
        port: 0 for a free one.

    Attributes:
        backend: Name of the backend that speaks to it.
        scheme: Of its URL.
        host: As it was given.
        port: Known once it was started.
    """

    backend: ClassVar[str]
    scheme: ClassVar[str]

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        """URL to connect to, without credentials."""
        return url_of(self.scheme, self.host, self.port)

    @property
    @abc.abstractmethod
    def running(self) -> bool:
        """Whether it listens."""

    def describe(self) -> Mapping[str, object]:
        """Return what to know about the server beside its address."""
        return {}

    @abc.abstractmethod
    async def start(self) -> None:
        """Listen; afterwards `url` and `port` are known. Nothing happens while it is running.

        Raises:
            ConnectError: The port is taken, or the address is not this machine's.
        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """Stop in any state; returns within a few seconds."""

    async def restart(self) -> None:
        """Stop, and start again on the same port."""
        await self.stop()
        await self.start()

    def cannot_listen(
        self, error: OSError, *, host: str | None = None, port: int | None = None
    ) -> ConnectError:
        """Return the error for a listener that the system refused.

        Args:
            error: What the system said.
            host: Where it is not `host`.
            port: Where it is not `port`.
        """
        host = self.host if host is None else host
        port = self.port if port is None else port
        return ConnectError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="choose another port, or 0 for a free one",
            backend=self.backend,
        )

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
