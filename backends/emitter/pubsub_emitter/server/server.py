"""An Emitter broker for development and tests, inside this process.

MQTT, WebSocket and HTTP share one port. Without a license a new one is made, and with it a master
key to make channel keys with; both are in `EmitterServer.describe`, so that ``pubsub serve
emitter`` prints them. Real keys of a real license work here, and keys made here work there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pubsub_core.errors import BadOption
from pubsub_emitter.keys import License
from pubsub_emitter.options import read_license
from pubsub_mqtt.server.endpoint import EndpointServer
from pubsub_mqtt.server.tls import ServerTLS

from .broker import EmitterDialect, Matcher
from .storage import Storage

__all__ = ["EmitterServer"]


class EmitterServer(EndpointServer):
    """An Emitter broker; loopback and a free port unless told otherwise.

    >>> import asyncio
    >>> async def demo() -> str:
    ...     async with EmitterServer() as server:
    ...         return server.make_key("demo/#/", "rw")
    >>> len(asyncio.run(demo()))
    32

    Args:
        port: 0 for a free one; it stays the same when the server is started again.
        license: Text of a license of any version; a new one is made when None, or the one that
            *store* remembers.
        store: Path of a file that keeps stored messages and bans. Without it they are gone when
            the server stops. Messages that were acknowledged as stored survive a crash.
        matcher: ``emitter``, where a subscription also gets everything below its channel, or
            ``mqtt``.
        will_on_disconnect: Publish a will after a DISCONNECT, too, as the Go broker does.
        certfile: PEM file of a certificate; every connection is encrypted then.
        keyfile: PEM file of its key.
    """

    backend: ClassVar[str] = "emitter"
    scheme: ClassVar[str] = "emitter"
    tls_scheme: ClassVar[str] = "emitters"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        license: str | None = None,
        store: str | Path | None = None,
        matcher: Matcher = "emitter",
        will_on_disconnect: bool = True,
        certfile: str | None = None,
        keyfile: str | None = None,
        max_clients: int = 10_000,
    ) -> None:
        tls = ServerTLS.pair(certfile, keyfile, backend="emitter")
        if matcher not in ("emitter", "mqtt"):
            raise BadOption(
                f"no matching rule {matcher!r}",
                option="matcher",
                hint="use emitter or mqtt",
                backend="emitter",
            )
        self._given = None if license is None else read_license(license)
        self._storage = Storage(store)
        self._emitter = EmitterDialect(
            self._given or License.generate(),
            self._storage,
            matcher=matcher,
            will_on_disconnect=will_on_disconnect,
        )
        super().__init__(
            self._emitter,
            host=host,
            port=port,
            tls=tls,
            max_clients=max_clients,
            store=self._storage,
        )
        self._master_key = ""

    @property
    def license(self) -> str:
        """The text of the license: the broker's secret."""
        return self._emitter.license.text

    @property
    def master_key(self) -> str:
        """A key that can make and ban other keys."""
        if not self._master_key:
            self._master_key = self._emitter.license.make_master_key()
        return self._master_key

    def client_url(self) -> str:
        """Return a URL to connect with that may make every key: for demonstrations and tests."""
        return f"{self.url}?master_key={self.master_key}"

    @property
    def storage(self) -> Storage:
        """The stored messages and bans."""
        return self._storage

    def make_key(self, channel: str, permissions: str, *, ttl: int = 0) -> str:
        """Return a key for *channel*; see `License.make_key`."""
        return self._emitter.license.make_key(channel, permissions, ttl=ttl)

    def describe(self) -> Mapping[str, object]:
        """Return the license and a master key, which are secrets, and how it matches and stores."""
        return {
            "license": self.license,
            "master_key": self.master_key,
            "matcher": self._emitter.matcher,
            **super().describe(),
        }

    async def opened(self) -> None:
        """Take the license of the file, or have the file remember ours."""
        storage = self._storage
        if storage.path is None:
            return
        if self._given is None and storage.license:
            self._emitter.license = read_license(storage.license)
            self._master_key = ""
        elif storage.license != self.license:
            await storage.remember_license(self.license)
