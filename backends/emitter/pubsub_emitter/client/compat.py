"""The API of ``emitter-io`` 1.x: `connect` and `Emitter`.

Its README promised a module-level ``connect(options)``, which no release had; here it is. What
was a defect is repaired: `Emitter.connect` keeps the handlers that `Emitter.on` was given
before, does not write into the caller's dictionary, and returns the emitter.

Source: emitter-io 1.3.0, ``emitter/__init__.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from .arguments import Payload
from .client import Client
from .reply import Reply

__all__ = ["Emitter", "connect"]

logger = logging.getLogger("pubsub_emitter")

_EVENTS = ("connect", "disconnect", "message", "keygen", "presence", "me", "error", "link")


class Emitter:
    """A connection, with the names of 1.x. `client` is the one underneath."""

    def __init__(self) -> None:
        self.client = Client()

    def connect(self, options: Mapping[str, Any] | None = None) -> Emitter:
        """Connect, and return itself.

        *options* may have ``host``, ``secure`` (True), ``port`` (443, or 8080 where *secure* is
        False), ``keepalive`` (30) and ``username``.
        """
        given = dict(options or {})
        secure = bool(given.get("secure", True))
        self.client.connect(
            str(given.get("host", "api.emitter.io")),
            int(given.get("port", 443 if secure else 8080)),
            secure,
            int(given.get("keepalive", 30)),
            given.get("username"),
        )
        return self

    def disconnect(self) -> None:
        """End the connection."""
        self.client.disconnect()

    def on(self, event: str, callback: Callable[..., Any]) -> None:
        """Have *callback* called at an event; an earlier one is replaced.

        Events are ``connect`` and ``disconnect`` (no argument), ``message`` (an
        `EmitterMessage`), and ``keygen``, ``presence``, ``me``, ``link`` and ``error`` (a
        dictionary).
        """
        if event not in _EVENTS:
            logger.warning("there is no event %r; use one of %s", event, ", ".join(_EVENTS))
            return
        setattr(self.client, f"on_{event}", callback)

    def publish(
        self,
        key: str,
        channel: str,
        message: Payload,
        ttl: int | None = None,
        me: bool = True,
    ) -> Reply[None]:
        """Publish; *ttl* stores the message, *me* False leaves this connection out."""
        return self.client.publish(key, channel, message, _options(ttl, me=me))

    def subscribe(self, key: str, channel: str, last: int | None = None) -> Reply[None]:
        """Subscribe; *last* replays that many stored messages."""
        options = None if last is None else {"last": last}
        return self.client.subscribe(key, channel, options=options)

    def unsubscribe(self, key: str, channel: str) -> Reply[None]:
        """Unsubscribe."""
        return self.client.unsubscribe(key, channel)

    def presence(self, key: str, channel: str) -> Reply[dict[str, Any]]:
        """Ask who is subscribed."""
        return self.client.presence(key, channel, status=True)

    def keygen(self, key: str, channel: str, permissions: str = "", ttl: int = 0) -> Reply[str]:
        """Have a key made. 1.x could not say for what; without *permissions* it is useless."""
        return self.client.keygen(key, channel, permissions, ttl)

    def link(
        self,
        key: str,
        channel: str,
        name: str,
        private: bool,
        subscribe: bool,
        ttl: int | None = None,
        me: bool = True,
    ) -> Reply[dict[str, Any]]:
        """Give a channel a short name. Brokers ignore *private*."""
        if private:
            logger.warning("brokers make no private links any more; use keygen with an 'e' key")
        return self.client.link(key, channel, name, subscribe, _options(ttl, me=me))

    def publishWithLink(self, link: str, message: Payload) -> Reply[None]:  # noqa: N802
        """Publish through a link."""
        return self.client.publish_with_link(link, message)

    def me(self) -> Reply[dict[str, Any]]:
        """Ask for the id of this connection and its links."""
        return self.client.me()

    def loop(self, timeout: float = 1.0) -> None:
        """Do what is due."""
        self.client.loop(timeout)

    def loopForever(self) -> None:  # noqa: N802  the SDK's name
        """Run until `disconnect` is called."""
        self.client.loop_forever()

    def loopStart(self) -> None:  # noqa: N802  the SDK's name
        """Run the loop in a thread."""
        self.client.loop_start()

    def loopStop(self) -> None:  # noqa: N802  the SDK's name
        """Stop that thread."""
        self.client.loop_stop()


def connect(options: Mapping[str, Any] | None = None) -> Emitter:
    """Return a connected `Emitter`."""
    return Emitter().connect(options)


def _options(ttl: int | None, *, me: bool) -> dict[str, int]:
    found = {} if ttl is None else {"ttl": ttl}
    return found | {"me": int(me)}
