"""The Losant platform for development and tests, inside this process.

`LosantServer` takes devices and access keys from its arguments or a file, and without either
makes one device and a key for it; they are in `LosantServer.describe`, so that ``pubsub serve
losant`` prints them. The rules are `LosantDialect`'s; here are the listeners, and the switches for
tests.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from pubsub_core.errors import BadOption
from pubsub_losant.commands import ABSENT
from pubsub_mqtt.server.endpoint import EndpointServer
from pubsub_mqtt.server.tls import ServerTLS

from .access import CONNECTABLE, AccessKey, DeviceSpec, Registry
from .broker import OPERATOR, IntakeError, LosantDialect, Rejection, StateHook
from .config import ApplicationConfig
from .state_intake import Value
from .storage import Command, State, Storage
from .throttle import Rules, Throttle

__all__ = ["LosantServer"]


class LosantServer(EndpointServer):
    """A broker that behaves as the platform's; loopback and a free port unless told otherwise.

    MQTT and WebSocket share its port.

    >>> import asyncio
    >>> async def demo() -> int:
    ...     async with LosantServer() as server:
    ...         return await server.send_command(server.device_id, "start")
    >>> asyncio.run(demo())  # no device is connected
    0

    Args:
        port: 0 for a free one; it stays the same when the server is started again.
        config: Path of a TOML or JSON file; see `ApplicationConfig`. Arguments win over it.
        devices: Devices by id.
        keys: Access keys. A key for everything is made when neither these nor *config* has any.
        store: Path of a file that keeps states and histories, and the credentials made here.
            Without it they are gone when the server stops.
        strict: Refuse as the platform does: QoS 2, RETAIN, persistent sessions, payloads
            over 256 KiB. On unless *config* says otherwise.
        throttle: Limit messages and ban devices, as the platform does. Off unless *config* says
            otherwise.
        one_connection: End a device's connection when it connects again, as the platform does.
            Switched off, several clients can be the same device.
        ws_port: One more port, for those who want WebSocket by itself; 0 for a free one.
        tls_port: A port for TLS, with the other ports not encrypted; without it a certificate
            encrypts every port.
        certfile: PEM file of a certificate.
        keyfile: PEM file of its key.
        rules: Limits of the throttle.
        clock: Unix seconds.
    """

    backend: ClassVar[str] = "losant"
    scheme: ClassVar[str] = "losant"
    tls_scheme: ClassVar[str] = "losant"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        config: str | Path | None = None,
        devices: Mapping[str, DeviceSpec] | None = None,
        keys: Iterable[AccessKey] | None = None,
        store: str | Path | None = None,
        strict: bool | None = None,
        throttle: bool | None = None,
        one_connection: bool | None = None,
        ws_port: int | None = None,
        tls_port: int | None = None,
        certfile: str | None = None,
        keyfile: str | None = None,
        max_clients: int = 10_000,
        rules: Rules | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        tls = ServerTLS.pair(certfile, keyfile, backend="losant", needed=tls_port is not None)
        told = ApplicationConfig() if config is None else ApplicationConfig.load(config)
        devices = told.devices if devices is None else devices
        keys = told.keys if keys is None else list(keys)
        if keys is not None and not devices:
            raise BadOption(
                "there are access keys, but no devices",
                option="devices",
                hint="give the devices that connect with them",
                backend="losant",
            )
        if not all(isinstance(key, AccessKey) for key in keys or ()):  # pyright: ignore[reportUnnecessaryIsInstance] # a command line gives text
            raise BadOption(
                "keys are access keys, which a command line cannot say",
                option="keys",
                hint="write them in a file, and give it as config",
                backend="losant",
            )
        if any(key.key == OPERATOR for key in keys or ()):
            raise BadOption(
                f"an access key may not be named {OPERATOR!r}, which is the broker's own",
                option="keys",
                hint="choose another name",
                backend="losant",
            )
        self._storage = Storage(store)
        self._made_device = not devices
        self._made_key = keys is None
        self._device_id = ""
        self._access_key = ""
        self._access_secret = ""
        self._operator_secret = secrets.token_urlsafe(24)
        self._losant = LosantDialect(
            Registry(devices, keys or ()),
            self._storage,
            strict=_first(strict, told.strict, True),
            throttle=Throttle(rules) if _first(throttle, told.throttle, False) else None,
            one_connection=_first(one_connection, told.one_connection, True),
            operator_secret=self._operator_secret,
            clock=clock,
        )
        main_tls = tls if tls_port is None else None
        super().__init__(
            self._losant,
            host=host,
            port=port,
            tls=main_tls,
            max_clients=max_clients,
            store=self._storage,
        )
        self._ws = self._listener(ws_port, main_tls)
        self._secure = self._listener(tls_port, tls)
        self._introduce({})

    def _listener(self, port: int | None, tls: ServerTLS | None) -> EndpointServer | None:
        if port is None:
            return None
        other = EndpointServer(
            self._losant, host=self.host, port=port, tls=tls, max_clients=self.max_clients
        )
        other.stats = self.stats
        return other

    @property
    def _others(self) -> list[EndpointServer]:
        return [each for each in (self._ws, self._secure) if each is not None]

    # --- facts --------------------------------------------------------------------------

    @property
    def device_id(self) -> str:
        """A device that can connect; the one made here when none were given."""
        return self._device_id

    @property
    def access_key(self) -> str:
        """The access key made here, or ``""`` when keys were given."""
        return self._access_key

    @property
    def access_secret(self) -> str:
        """Its secret."""
        return self._access_secret

    @property
    def registry(self) -> Registry:
        """Devices and keys; may be changed while it runs."""
        return self._losant.registry

    @property
    def storage(self) -> Storage:
        """The stored states and histories."""
        return self._storage

    @property
    def ws_port(self) -> int:
        """The port for WebSocket alone, or 0; it is known once it was started."""
        return self._ws.port if self._ws is not None else 0

    @property
    def tls_port(self) -> int:
        """The port for TLS, or 0; it is known once it was started."""
        if self.tls is not None:
            return self.port
        return self._secure.port if self._secure is not None else 0

    @property
    def url(self) -> str:
        """URL to connect to, with device id; with key and secret when they were made here."""
        return self.url_for(self._device_id, self._access_key, self._access_secret)

    def url_for(self, device_id: str, key: str = "", secret: str = "") -> str:
        """Return the URL with which a device connects; the password in it is the secret."""
        user = f"{quote(key, safe='')}:{quote(secret, safe='')}@" if key else ""
        query = f"endpoint={quote(_reachable(self.host), safe=':')}"
        if self.tls is None:
            query += "&secure=false"
        return f"losant://{user}{quote(device_id, safe='')}:{self.port}?{query}"

    def client_url(self) -> str:
        """Return the URL for one more client, and make a device for it.

        A device has one connection: two clients with one `url` would end each other's.
        """
        made = secrets.token_hex(12)
        self.registry.devices[made] = DeviceSpec()
        return self.url_for(made, self._access_key, self._access_secret)

    @property
    def operator_url(self) -> str:
        """URL with which ``pubsub pub`` and ``pubsub sub`` reach any topic, from this machine."""
        host = _reachable(self.host)
        host = f"[{host}]" if ":" in host else host
        scheme = "mqtt" if self.tls is None else "mqtts"
        user = f"{OPERATOR}:{self._operator_secret}"
        return f"{scheme}://{user}@{host}:{self.port}?protocol=3.1.1"

    def describe(self) -> Mapping[str, object]:
        """Return credentials that were made here, how to operate it, and how it stores.

        Keys that somebody gave are secrets of theirs, and are not repeated.
        """
        found: dict[str, object] = {"device_id": self._device_id}
        if self._made_key:
            found["access_key"] = self._access_key
            found["access_secret"] = self._access_secret
        if not self._made_device:
            found["devices"] = len(self.registry.devices)
        found["operator_url"] = self.operator_url
        if self.ws_port:
            found["ws_port"] = self.ws_port
        if self.tls_port:
            found["tls_port"] = self.tls_port
        found["strict"] = self._losant.strict
        found["throttle"] = self._losant.throttle is not None
        return {**found, **super().describe()}

    # --- starting and stopping ------------------------------------------------------------

    async def opened(self) -> None:
        """Take the credentials of the file, or have the file remember ours."""
        self._introduce({name: self._storage.fact(name) for name in ("device_id", "key", "secret")})
        self._losant.stopping = False

    async def start(self) -> None:
        """Listen, on every port; see `EndpointServer.start`."""
        if self.running:
            return
        await super().start()
        try:
            for other in self._others:
                await other.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop; states stored in memory are gone."""
        self._losant.stopping = True
        for other in self._others:
            await other.stop()
        await super().stop()

    def _introduce(self, known: Mapping[str, str]) -> None:
        """Make the device and the key where none were given; the store may know them already."""
        registry = self.registry
        if self._made_device:
            registry.devices.pop(self._device_id, None)
            self._device_id = known.get("device_id") or self._device_id or secrets.token_hex(12)
            registry.devices[self._device_id] = DeviceSpec()
        else:
            self._device_id = next(
                (name for name, device in registry.devices.items() if device.cls in CONNECTABLE),
                "",
            )
        if self._made_key:
            registry.keys.pop(self._access_key, None)
            self._access_key = known.get("key") or self._access_key or str(uuid.uuid4())
            self._access_secret = (
                known.get("secret") or self._access_secret or secrets.token_hex(32)
            )
            registry.keys[self._access_key] = AccessKey(
                self._access_key, self._access_secret, filter_type="all"
            )
        if known:
            if self._made_device:
                self._storage.set_fact("device_id", self._device_id)
            if self._made_key:
                self._storage.set_fact("key", self._access_key)
                self._storage.set_fact("secret", self._access_secret)

    # --- commands, states and histories ---------------------------------------------------

    async def send_command(
        self,
        device_id: str,
        name: str,
        payload: Any = ABSENT,
        time: datetime | float | None = None,
    ) -> int:
        """Send a command; return how many connections got it. See `LosantDialect.send_command`.

        Raises:
            ValueError: There is no such device, or the command does not fit.
        """
        return self._losant.send_command(device_id, name, payload, time)

    def publish(self, topic: str, payload: bytes) -> int:
        """Send a message to the subscribers of a topic; return how many connections got it."""
        return self._losant.deliver(topic, payload)

    def states(
        self, device_id: str, *, since: int | None = None, until: int | None = None
    ) -> list[State]:
        """Return the states of a device, oldest first; both ends in milliseconds, inclusive."""
        return self._storage.states(device_id, since=since, until=until)

    def last_state(self, device_id: str) -> dict[str, tuple[Value, int]]:
        """Return the newest value of each attribute, with its milliseconds since 1970."""
        return self._storage.last_values(device_id)

    def command_history(self, device_id: str) -> list[Command]:
        """Return the commands that were sent to a device, oldest first."""
        return self._storage.commands(device_id)

    def connection_log(self, device_id: str) -> list[dict[str, Any]]:
        """Return when a device came and why it went, newest first, as the platform shows it."""
        return self._storage.connections(device_id)

    @property
    def on_state(self) -> list[StateHook]:
        """Functions that are called with a device id and each state that was stored."""
        return self._losant.on_state

    @property
    def rejections(self) -> deque[Rejection]:
        """The newest connections that came to nothing, oldest first."""
        return self._losant.rejections

    @property
    def errors(self) -> deque[IntakeError]:
        """The newest states, or parts of them, that were not kept, oldest first."""
        return self._losant.errors

    @property
    def throttled(self) -> int:
        """How many messages to devices were dropped because of their limits."""
        return self._losant.throttled

    # --- for tests ------------------------------------------------------------------------

    def is_connected(self, device_id: str) -> bool:
        """Whether a device is connected."""
        return self._losant.is_connected(device_id)

    async def wait_connected(
        self, device_id: str, timeout: float = 5.0, *, subscribed: bool = False
    ) -> None:
        """Return once a device is connected, and with *subscribed* to its commands as well.

        Raises:
            OperationTimeout: It is not within *timeout* seconds.
        """
        losant = self._losant
        if subscribed:
            topic = f"losant/{device_id}/command"
            await losant.until(
                lambda: losant.is_subscribed(device_id, topic),
                timeout,
                f"device {device_id} subscribes to its commands",
            )
        else:
            await losant.until(
                lambda: losant.is_connected(device_id), timeout, f"device {device_id} connects"
            )

    async def wait_disconnected(self, device_id: str, timeout: float = 5.0) -> None:
        """Return once a device is not connected.

        Raises:
            OperationTimeout: It still is after *timeout* seconds.
        """
        await self._losant.until(
            lambda: not self._losant.is_connected(device_id),
            timeout,
            f"device {device_id} goes away",
        )

    async def wait_state(self, device_id: str, n: int = 1, timeout: float = 5.0) -> list[State]:
        """Return the states of a device once at least *n* were stored, oldest first.

        There may be fewer than *n*: those of the same millisecond are one.

        Raises:
            OperationTimeout: They are not within *timeout* seconds.
        """
        storage = self._storage
        await self._losant.until(
            lambda: storage.taken(device_id) >= n, timeout, f"{n} states of device {device_id}"
        )
        return storage.states(device_id)

    def disconnect(
        self, device_id: str, reason: str = "Disconnected by operator", *, abrupt: bool = True
    ) -> int:
        """End the connections of a device; return how many there were.

        Args:
            device_id: Whose connections.
            reason: For the connection log.
            abrupt: Drop the connection at once; else queued messages are sent before.
        """
        clients = self._losant.clients(device_id)
        for client in clients:
            self._losant.operator_disconnects(client, reason)
        if abrupt:
            for server in (self, *self._others):
                for link in list(server.links):
                    if link.client in clients:
                        link.end(reason)
        return len(clients)

    def pause(self) -> None:
        """Fall silent: nothing is answered and nothing closed until `resume`."""
        super().pause()
        for other in self._others:
            other.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        super().resume()
        for other in self._others:
            other.resume()

    def refuse_next(self, code: int = 3) -> None:
        """Answer the next CONNECT with that return code; may be called several times."""
        self._losant.refuse_next(code)


def _first(*values: bool | None) -> bool:
    return next(value for value in values if value is not None)


def _reachable(host: str) -> str:
    """Return an address to connect to for one to listen on."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  recognised, not bound
