"""amqtt's broker inside this process: ``pip install`` alone brings it.

Sources: amqtt 0.12 ``broker.py``. Its own listeners never drop a client that does not say
CONNECT, and on Python 3.12 its shutdown waits for such a client without end; therefore
`AmqttServer` owns the sockets and hands each connection over through amqtt's ``external``
listener.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pubsub_core.errors import MissingDependency
from pubsub_core.servers import ServerShell

__all__ = ["AMQTT_INSTALL", "AMQTT_LIMITS", "AmqttServer"]

logger = logging.getLogger("pubsub_mqtt.server")

STOP_DEADLINE = 5.0
"""Seconds that a server may take to stop by itself before it is made to."""

CONNECT_DEADLINE = 10.0
"""Seconds that a client of `AmqttServer` may take to complete CONNECT."""

AMQTT_INSTALL = "pip install 'pubsub-core[mqtt-server]'"

AMQTT_LIMITS = (
    "MQTT 3.1.1 only",
    "no shared subscriptions",
    "keep alive is not enforced",
    "unacknowledged messages are not redelivered",
    "messages may be delivered with a higher quality of service than published",
    "retained messages reach clients that did not subscribe to them",
    "nothing is stored",
)
"""Limitations of amqtt 0.12's broker, to be read before judging anything by it."""


class AmqttServer(ServerShell):
    """amqtt's broker inside this process: ``pip install`` alone brings it.

    Clients need no credentials. It is slow and forgives much; see `AMQTT_LIMITS`, which are
    logged at the start. Use it to look around, not to judge delivery by.
    """

    backend: ClassVar[str] = "mqtt"
    scheme: ClassVar[str] = "mqtt"

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(host=host, port=port)
        self._broker: Any = None  # amqtt has no types
        self._reader_adapter: Any = None
        self._writer_adapter: Any = None
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    def describe(self) -> Mapping[str, object]:
        """Return the server's name and its limitations."""
        return {"server": _amqtt_version(), "limits": list(AMQTT_LIMITS)}

    async def start(self) -> None:
        """Listen.

        Raises:
            MissingDependency: amqtt is not installed.
            ConnectError: The port is taken.
        """
        if self._server is not None:
            return
        try:
            imported = await asyncio.to_thread(_import_amqtt)
        except ImportError as exc:
            raise MissingDependency(
                "amqtt is not installed", hint=AMQTT_INSTALL, backend=self.backend
            ) from exc
        broker_class, self._reader_adapter, self._writer_adapter = imported
        broker = broker_class(
            {
                "listeners": {"default": {"type": "external"}},
                "plugins": {
                    "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
                },
            }
        )
        await broker.start()
        try:
            server = await asyncio.start_server(self._accept, self.host, self.port)
        except OSError as exc:
            await broker.shutdown()
            raise self.cannot_listen(exc) from exc
        self._broker = broker
        self._server = server
        self.port = server.sockets[0].getsockname()[1]
        limits = "; ".join(AMQTT_LIMITS)
        logger.warning("%s on %s has its limits: %s", _amqtt_version(), self.url, limits)

    async def stop(self) -> None:
        """Stop listening, end every connection, and return within a few seconds."""
        server, self._server = self._server, None
        broker, self._broker = self._broker, None
        if server is not None:
            server.close()
        if broker is not None:
            try:
                async with asyncio.timeout(STOP_DEADLINE):
                    await broker.shutdown()
            except Exception:
                logger.debug("amqtt's broker did not stop by itself", exc_info=True)
        # amqtt closes only the connections of clients that completed CONNECT.
        tasks = list(self._clients)
        for task, writer in list(self._clients.items()):
            writer.transport.abort()
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_DEADLINE)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        broker = self._broker
        if broker is None or task is None:
            writer.transport.abort()
            return
        self._clients[task] = writer
        adapter = self._writer_adapter(writer)
        answered = False
        plain_write = adapter.write

        def write(data: bytes) -> None:
            nonlocal answered
            answered = True
            plain_write(data)

        def give_up() -> None:
            if not answered:
                writer.transport.abort()

        adapter.write = write  # amqtt offers no hook for this
        deadline = asyncio.get_running_loop().call_later(CONNECT_DEADLINE, give_up)
        try:
            await broker.external_connected(self._reader_adapter(reader), adapter, "default")
        except asyncio.CancelledError:
            # The only one who cancels is stop(); a cancelled task would make asyncio's
            # stream callback log an error.
            pass
        except Exception:
            logger.debug("amqtt's broker gave up on a connection", exc_info=True)
        finally:
            deadline.cancel()
            self._clients.pop(task, None)
            writer.transport.abort()


def _import_amqtt() -> tuple[Any, Any, Any]:
    # Optional, and half a second of imports; without types, hence Any.
    broker: Any = importlib.import_module("amqtt.broker")
    adapters: Any = importlib.import_module("amqtt.adapters")
    return broker.Broker, adapters.StreamReaderAdapter, adapters.StreamWriterAdapter


def _amqtt_version() -> str:
    try:
        return f"amqtt {importlib.metadata.version('amqtt')}"
    except importlib.metadata.PackageNotFoundError:
        return "amqtt"
