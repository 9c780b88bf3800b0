"""A messagebus client that calls handlers, as `CallbackClient` of the package does."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from pubsub_messagebus.authentication import Authenticator
from pubsub_messagebus.handlers import (
    AuthorizationHandler,
    ClosedHandler,
    DataHandler,
    NotificationHandler,
)
from pubsub_messagebus.io import DataReader, DataWriter
from pubsub_messagebus.protocol import DataPacket

from .client import Client

__all__ = ["CallbackClient"]


class CallbackClient(Client):
    """A client whose messages go to lists of coroutine functions.

    The lists are live: append to them and remove from them at any time; the change counts
    from the next message. Handlers run one after the other.
    """

    def __init__(
        self,
        reader: DataReader,
        writer: DataWriter,
        authenticator: Authenticator | None,
        monitor_heartbeat: bool,
    ) -> None:
        super().__init__(reader, writer, authenticator, monitor_heartbeat)
        self._authorization_handlers: list[AuthorizationHandler] = []
        self._data_handlers: list[DataHandler] = []
        self._notification_handlers: list[NotificationHandler] = []
        self._closed_handlers: list[ClosedHandler] = []

    @property
    def authorization_handlers(self) -> list[AuthorizationHandler]:
        """Called when a client waits for authorization."""
        return self._authorization_handlers

    @property
    def data_handlers(self) -> list[DataHandler]:
        """Called with data."""
        return self._data_handlers

    @property
    def notification_handlers(self) -> list[NotificationHandler]:
        """Called when somebody subscribes or unsubscribes."""
        return self._notification_handlers

    @property
    def closed_handlers(self) -> list[ClosedHandler]:
        """Called once at the end."""
        return self._closed_handlers

    async def on_authorization(
        self, client_id: UUID, host: str, user: str, feed: str, topic: str
    ) -> None:
        """Call the handlers."""
        for handler in tuple(self._authorization_handlers):
            await handler(client_id, host, user, feed, topic)

    async def on_data(
        self,
        user: str,
        host: str,
        feed: str,
        topic: str,
        data_packets: list[DataPacket] | None,
        is_image: Any,
    ) -> None:
        """Call the handlers."""
        for handler in tuple(self._data_handlers):
            await handler(user, host, feed, topic, data_packets, is_image)

    async def on_forwarded_subscription_request(
        self, client_id: UUID, user: str, host: str, feed: str, topic: str, is_add: bool
    ) -> None:
        """Call the handlers."""
        for handler in tuple(self._notification_handlers):
            await handler(client_id, user, host, feed, topic, is_add)

    async def on_closed(self, is_faulted: bool) -> None:
        """Call the handlers."""
        for handler in tuple(self._closed_handlers):
            await handler(is_faulted)
