"""Mosquitto as a child process, for development and tests.

It listens on loopback and a free port unless told otherwise, and is gone after `stop`, or when
the interpreter ends.

Sources: mosquitto.conf(5) for 2.0. Mosquitto has no port 0, so a free port is chosen here and
another one when it is taken by then.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pubsub_core.errors import BadOption, ConnectError, MissingDependency
from pubsub_core.servers import ServerShell, url_of

from .tls import ServerTLS

__all__ = ["MosquittoServer", "find_mosquitto"]

logger = logging.getLogger("pubsub_mqtt.server")

START_DEADLINE = 10.0
"""Seconds that a server may take until it listens."""

STOP_DEADLINE = 5.0
"""Seconds that a server may take to stop by itself before it is made to."""

PORT_ATTEMPTS = 20
"""How many free ports are tried when others take them between choosing and listening."""


def find_mosquitto() -> str | None:
    """Return the path of the ``mosquitto`` program, or None where it is not installed."""
    # Debian puts it into sbin, which the PATH of a plain user lacks.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("mosquitto", path=path)


class MosquittoServer(ServerShell):
    """Mosquitto in a child process, with a configuration of its own.

    Mosquitto drops to the user ``mosquitto`` when root starts it, who could read none of
    the files here; so the configuration names the user that runs this program.

    Args:
        port: 0 for a free one. It stays the same when the server is started again.
        websockets: Also listen for WebSocket, on `websocket_port`. Mosquitto 2.0 binds that
            listener to every interface whatever *host* is; a warning says so.
        unix: Also listen on the Unix socket `unix_path`.
        tls: Encrypt the TCP and the WebSocket listener.
        users: Passwords by user name. Anonymous clients are refused then.
        acl: Text of an access control file; see mosquitto.conf(5), ``acl_file``.
        persistence: Whether sessions, queued and retained messages survive a stop and a
            `restart`; Mosquitto writes them every second here, and a kill may lose that much.
        extra_config: Lines for the configuration file. They come last, so options of one
            listener go to the TCP one.
        executable: The program; found by itself when None.
    """

    backend: ClassVar[str] = "mqtt"
    scheme: ClassVar[str] = "mqtt"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        websockets: bool = False,
        unix: bool = False,
        tls: ServerTLS | None = None,
        users: Mapping[str, str] | None = None,
        acl: str | None = None,
        persistence: bool = False,
        extra_config: str = "",
        executable: str | None = None,
    ) -> None:
        for name in users or ():
            if not name or any(character in name for character in ":\r\n\0"):
                raise BadOption(f"user name {name!r} cannot stand in a password file")
        super().__init__(host=host, port=port)
        self._websocket_port = 0
        self._websockets = websockets
        self._unix = unix
        self._tls = tls
        self._users = users
        self._acl = acl
        self._persistence = persistence
        self._extra_config = extra_config
        self._executable = executable
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    @property
    def websocket_port(self) -> int:
        """The port of the WebSocket listener, 0 where there is none."""
        return self._websocket_port

    @property
    def unix_path(self) -> str:
        """Path of the Unix socket, or ``""``."""
        return str(self._directory / "socket") if self._unix and self._directory else ""

    @property
    def url(self) -> str:
        """URL to connect to, without credentials."""
        return url_of("mqtts" if self._tls else "mqtt", self.host, self.port)

    @property
    def websocket_url(self) -> str:
        """URL of the WebSocket listener, or ``""``."""
        if not self._websocket_port:
            return ""
        scheme = "wss" if self._tls else "ws"
        return f"{url_of(scheme, self.host, self._websocket_port)}/mqtt"

    @property
    def unix_url(self) -> str:
        """URL of the Unix socket, or ``""``."""
        return f"mqtt+unix://{self.unix_path}" if self.unix_path else ""

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def log(self) -> str:
        """Mosquitto's output since it was started last."""
        if self._directory is None:
            return ""
        with contextlib.suppress(OSError):
            return (self._directory / "log").read_text(errors="replace")
        return ""

    def describe(self) -> Mapping[str, object]:
        """Return the server's name and its further addresses."""
        found: dict[str, object] = {"server": self._version or "mosquitto", "pid": self.pid}
        if self.websocket_url:
            found["websocket_url"] = self.websocket_url
        if self.unix_url:
            found["unix_url"] = self.unix_url
        return found

    @property
    def _version(self) -> str:
        # 1795260287: mosquitto version 2.0.11 running
        for line in self.log.splitlines():
            _, mark, rest = line.partition("mosquitto version ")
            if mark:
                return f"mosquitto {rest.split()[0]}"
        return ""

    async def start(self) -> None:
        """Start the process and return once it listens.

        Raises:
            MissingDependency: Mosquitto is not installed.
            ConnectError: It did not come up; the text holds the end of its log.
        """
        if self.running:
            return
        executable = self._executable or find_mosquitto()
        if executable is None:
            raise MissingDependency(
                "mosquitto is not installed",
                hint="apt-get install mosquitto, or https://mosquitto.org/download",
                backend=self.backend,
            )
        free = self.port == 0
        for attempt in range(PORT_ATTEMPTS):
            if free:
                self.port = _free_port(self.host)
                self._websocket_port = 0
            if self._websockets and not self._websocket_port:
                self._websocket_port = _free_port(self.host)
            try:
                await asyncio.to_thread(self._launch, executable)
                await self._ready()
            except ConnectError:
                await self._end(gentle=False)
                if free and attempt + 1 < PORT_ATTEMPTS and _address_in_use(self.log):
                    continue
                self._forget()
                raise
            except BaseException:
                self._end_now()
                self._forget()
                raise
            break
        if self._websockets:
            logger.warning(
                "the WebSocket listener of %s on port %d is reachable from other machines: "
                "Mosquitto 2.0 binds it to every interface",
                self._version,
                self._websocket_port,
            )

    async def stop(self) -> None:
        """End the process, at once when it does not obey, and remove its files."""
        await self._end(gentle=True)
        self._forget()

    async def kill(self) -> None:
        """End the process without warning (SIGKILL), as a crash would; see `restart`."""
        await self._end(gentle=False)

    async def restart(self) -> None:
        """Stop, and start again on the same port with what was stored."""
        await self._end(gentle=True)
        await self.start()

    def _launch(self, executable: str) -> None:
        if self._directory is None:
            # Unix sockets allow about 100 characters, so the path is kept short.
            self._directory = Path(tempfile.mkdtemp(prefix="pubsub-mqtt-"))
        directory = self._directory
        config = directory / "mosquitto.conf"
        config.touch(mode=0o600)
        config.write_text(self._config(directory))
        if self._users is not None:
            passwords = directory / "passwords"
            passwords.touch(mode=0o600)
            passwords.write_text(
                "".join(f"{name}:{_hash(word)}\n" for name, word in self._users.items())
            )
        if self._acl is not None:
            (directory / "acl").write_text(self._acl)
        # To a file: a pipe that nobody reads would block the server once it is full.
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  the program was found by its name
                [executable, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
            )
        self._process = process
        self._guard = _guard(process.pid, directory)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _clean_up, process, self._guard, directory)

    def _config(self, directory: Path) -> str:
        lines = [f"user {_user_name()}"] if os.geteuid() == 0 else []
        lines += [
            "per_listener_settings false",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "log_type information",
            f"allow_anonymous {'true' if self._users is None else 'false'}",
        ]
        if self._users is not None:
            lines.append(f"password_file {directory / 'passwords'}")
        if self._acl is not None:
            lines.append(f"acl_file {directory / 'acl'}")
        if self._persistence:
            lines += [
                "persistence true",
                f"persistence_location {directory}{os.sep}",
                "autosave_interval 1",
                "autosave_on_changes true",
            ]
        if self._unix:
            lines.append(f"listener 0 {directory / 'socket'}")
        if self._websockets:
            lines.append(f"listener {self._websocket_port} {self.host}")
            lines.append("protocol websockets")
            lines += self._tls_lines()
        lines.append(f"listener {self.port} {self.host}")
        lines += self._tls_lines()
        return "\n".join([*lines, self._extra_config, ""])

    def _tls_lines(self) -> list[str]:
        if self._tls is None:
            return []
        lines = [f"certfile {self._tls.certfile}", f"keyfile {self._tls.keyfile}"]
        if self._tls.cafile is not None:
            lines.append(f"cafile {self._tls.cafile}")
        if self._tls.require_certificate:
            lines.append("require_certificate true")
        return lines

    async def _ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE
        while time.monotonic() < deadline:
            if not self.running:
                raise ConnectError(
                    f"mosquitto ended at once on {self.url}: {_tail(self.log)}",
                    hint="see its log above",
                    backend=self.backend,
                )
            # Another program may listen on the port, so a connection alone proves nothing.
            if " running" in self.log and await _answers(self.host, self.port):
                return
            await asyncio.sleep(0.005)
        raise ConnectError(
            f"mosquitto did not listen on {self.url} within {START_DEADLINE:g} s: "
            f"{_tail(self.log)}",
            hint="see its log above",
            backend=self.backend,
        )

    async def _end(self, *, gentle: bool) -> None:
        process = self._process
        if process is None:
            return
        if gentle and process.poll() is None:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                logger.warning("mosquitto did not stop within %g s", STOP_DEADLINE)
            finally:
                self._end_now()
        else:
            self._end_now()

    def _end_now(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._process = None
        if self._guard is not None:
            _dismiss(self._guard)
            self._guard = None

    def _forget(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


async def _answers(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.transport.abort()
    return True


def _address_in_use(log: str) -> bool:
    # The second is what the WebSocket listener says.
    return "already in use" in log or "Unable to create websockets listener" in log


def _tail(log: str) -> str:
    lines = [line.partition(": ")[2] or line for line in log.splitlines()]
    return " | ".join(lines[-5:]) or "it wrote nothing"


def _user_name() -> str:
    import pwd  # noqa: PLC0415  not on Windows

    return pwd.getpwuid(os.geteuid()).pw_name


def _hash(password: str) -> str:
    """Return a line's second part as mosquitto_passwd of Mosquitto 2.0 writes it."""
    salt, rounds = secrets.token_bytes(12), 101
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds)
    encoded = (base64.b64encode(part).decode() for part in (salt, digest))
    return "$".join(["", "7", str(rounds), *encoded])


def _guard(pid: int, directory: Path) -> subprocess.Popen[bytes]:
    """Start a shell that ends Mosquitto when this process is gone, however it ended.

    Killed, or ended by SIGTERM, an interpreter runs no finalizer. What stays open until then is
    the shell's standard input. The folder in the command line tells Mosquitto from another
    process that may have its id by then.
    """
    script = (
        "read -r _; "
        '{ tr "\\0" " " <"/proc/$0/cmdline" || ps -o args= -p "$0"; } | grep -qF "$1" '
        '&& kill -9 "$0"; rm -rf "$1"'
    )
    return subprocess.Popen(  # noqa: S603  our own script; both arguments are ours
        ["/bin/sh", "-c", script, str(pid), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    guard.kill()
    guard.wait()
    if guard.stdin is not None:
        guard.stdin.close()


def _clean_up(
    process: subprocess.Popen[bytes], guard: subprocess.Popen[bytes], directory: Path
) -> None:
    """End a server whose owner forgot it, or when the interpreter ends."""
    if process.poll() is None:
        process.kill()
    process.wait()
    _dismiss(guard)
    shutil.rmtree(directory, ignore_errors=True)
