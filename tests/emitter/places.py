"""Emitter brokers for tests of clients: one in this process, or a real one that is given."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from typing import Any, Self
from urllib.parse import urlsplit

from pubsub_emitter import Client
from pubsub_mqtt.server.endpoint import EndpointServer

__all__ = ["Place", "Running", "real"]


_BUS_SCHEMES = {
    "tcp": "emitter",
    "mqtt": "emitter",
    "ssl": "emitters",
    "mqtts": "emitters",
    "ws": "emitter+ws",
    "wss": "emitter+wss",
}


class Running:
    """A server in a loop of its own thread, for a client that blocks."""

    def __init__(self, server: EndpointServer) -> None:
        self.server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.do(self.server.start())
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    @property
    def url(self) -> str:
        return self.server.url

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


class Place:
    """Where a broker is, and channels there that no other test uses.

    Attributes:
        master: A master key of the broker.
        patience: Seconds to wait for what happens soon. The Go broker writes once a second
            at the latest, and takes a minute to see some bans.
    """

    def __init__(self, url: str, master: str, *, patience: float = 5.0) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or ""
        self.port = parts.port or 0
        self.secure = parts.scheme in ("emitters", "mqtts", "ssl", "wss")
        self.master = master
        self.patience = patience
        self.root = f"t{uuid.uuid4().hex[:12]}"
        self._keys: dict[tuple[str, str], str] = {}

    def at(self, name: str) -> str:
        """Return a channel of this test."""
        return f"{self.root}/{name}"

    @property
    def prompt(self) -> bool:
        """Whether bans, and that they are lifted, hold at once."""
        return self.patience < 60

    def bus_url(self, user: str) -> str:
        """Return the URL for a bus whose user has that name."""
        parts = urlsplit(self.url)
        scheme = _BUS_SCHEMES.get(parts.scheme, parts.scheme)
        return f"{scheme}://{user}@{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def key(self) -> str:
        """A key for all channels of this test."""
        return self.made(f"{self.root}/#/", "rwslp")

    @property
    def wide(self) -> str:
        """A key for all channels, those of share groups included."""
        return self.made("#/", "rwslp")

    def made(self, channel: str, permissions: str) -> str:
        """Return a key that the broker has made."""
        found = self._keys.get((channel, permissions))
        if found is None:
            client = Client()
            client.connect(self.url)
            try:
                found = client.keygen(self.master, channel, permissions).result()
            finally:
                client.disconnect()
            self._keys[channel, permissions] = found
        return found


def real() -> Place | str:
    """Return the real broker that the environment names, or why there is none."""
    url = os.environ.get("PUBSUB_EMITTER_URL")
    master = os.environ.get("PUBSUB_EMITTER_MASTER_KEY")
    if not url or not master:
        return "PUBSUB_EMITTER_URL and PUBSUB_EMITTER_MASTER_KEY name no Emitter server"
    return Place(url, master, patience=75.0)
