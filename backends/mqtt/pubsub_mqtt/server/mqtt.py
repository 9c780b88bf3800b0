"""The broker that ``pubsub serve mqtt`` starts.

Good brokers for plain MQTT exist, so none is written here: Mosquitto where it is installed, and
amqtt's inside this process where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pubsub_core.errors import MissingDependency
from pubsub_core.servers import ServerShell

from .amqtt import AMQTT_INSTALL, AmqttServer
from .mosquitto import MosquittoServer, find_mosquitto

__all__ = ["MQTTServer"]


class MQTTServer(ServerShell):
    """Mosquitto where it is installed, else amqtt; ``pubsub serve mqtt`` starts one."""

    backend: ClassVar[str] = "mqtt"
    scheme: ClassVar[str] = "mqtt"

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(host=host, port=port)
        self._server: MosquittoServer | AmqttServer = (
            MosquittoServer(host=host, port=port)
            if find_mosquitto() is not None
            else AmqttServer(host=host, port=port)
        )

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._server.running

    def describe(self) -> Mapping[str, object]:
        """Return which server it is, and its limitations."""
        return self._server.describe()

    async def start(self) -> None:
        """Listen.

        Raises:
            MissingDependency: Neither Mosquitto nor amqtt is installed.
        """
        try:
            await self._server.start()
            self.port = self._server.port
        except MissingDependency as exc:
            raise MissingDependency(
                "neither mosquitto nor amqtt is installed",
                hint=f"apt-get install mosquitto, or {AMQTT_INSTALL}",
                backend=self.backend,
            ) from exc

    async def stop(self) -> None:
        """Stop in any state."""
        await self._server.stop()

    async def restart(self) -> None:
        """Stop, and start again on the same port."""
        await self._server.restart()
