"""The servers that tests and ``pubsub serve mqtt`` start."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from pubsub_core.errors import BadOption, ConnectError, MissingDependency
from pubsub_core.interfaces import DevServer
from pubsub_mqtt.server import AmqttServer, MosquittoServer, MQTTServer, ServerTLS, mosquitto
from tests.conftest import PASSWORD
from tests.servers import Authority, Certificate, eventually

CONNECT = bytes.fromhex("100d00044d5154540402003c000161")
"""CONNECT of the client ``a``, clean session, keep alive 60."""

CLOSED = (ConnectionResetError, asyncio.IncompleteReadError)
"""What reading raises once the other side is gone, with or without RST."""


async def exchange(host: str, port: int, data: bytes, size: int) -> bytes:
    """Send *data* and return the next *size* bytes."""
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(data)
            return await reader.readexactly(size)
        finally:
            writer.close()
            await writer.wait_closed()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def connack(client: paho.Client, connect: Callable[[], object]) -> int:
    """Connect with paho's own loop and return CONNACK's code."""
    codes: list[int] = []
    client.on_connect = lambda _c, _u, _f, code, _p: codes.append(code.value)
    connect()
    deadline = time.monotonic() + 5
    while not codes and time.monotonic() < deadline:
        client.loop(0.05)
    client.disconnect()
    client.loop(0.05)
    return codes[0]


def pahos(**options: object) -> paho.Client:
    return paho.Client(CallbackAPIVersion.VERSION2, **options)  # type: ignore[arg-type]  # a test helper


class TestMosquitto:
    async def test_listens_on_a_free_port_of_loopback(self, mosquitto: MosquittoServer) -> None:
        assert mosquitto.port > 0
        assert mosquitto.url == f"mqtt://127.0.0.1:{mosquitto.port}"
        assert await exchange("127.0.0.1", mosquitto.port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_describes_itself(self, mosquitto: MosquittoServer) -> None:
        found = mosquitto.describe()
        assert str(found["server"]).startswith("mosquitto ")
        assert found["websocket_url"] == f"ws://127.0.0.1:{mosquitto.websocket_port}/mqtt"
        assert found["unix_url"] == f"mqtt+unix://{mosquitto.unix_path}"

    async def test_unix_socket(self, mosquitto: MosquittoServer) -> None:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_unix_connection(mosquitto.unix_path)
            writer.write(CONNECT)
            assert await reader.readexactly(4) == b"\x20\x02\x00\x00"
            writer.close()
            await writer.wait_closed()

    def test_websocket(self, mosquitto: MosquittoServer) -> None:
        client = pahos(transport="websockets")
        port = mosquitto.websocket_port
        assert connack(client, lambda: client.connect("127.0.0.1", port)) == 0

    def test_tls(self, mosquitto_tls: MosquittoServer, authority: Authority) -> None:
        client = pahos()
        client.tls_set(authority.cafile)
        assert mosquitto_tls.url.startswith("mqtts://")
        assert connack(client, lambda: client.connect("127.0.0.1", mosquitto_tls.port)) == 0

    def test_client_certificates(
        self,
        mosquitto_client_certificates: MosquittoServer,
        authority: Authority,
        client_certificate: Certificate,
    ) -> None:
        client = pahos()
        client.tls_set(authority.cafile, client_certificate.certfile, client_certificate.keyfile)
        port = mosquitto_client_certificates.port
        assert connack(client, lambda: client.connect("127.0.0.1", port)) == 0

    @pytest.mark.parametrize(("password", "code"), [(PASSWORD, 0), ("wrong", 135)])
    def test_users(self, mosquitto_users: MosquittoServer, password: str, code: int) -> None:
        client = pahos()
        client.username_pw_set("alice", password)
        port = mosquitto_users.port
        assert connack(client, lambda: client.connect("127.0.0.1", port)) == code

    def test_users_shut_out_anonymous_clients(self, mosquitto_users: MosquittoServer) -> None:
        client = pahos()
        port = mosquitto_users.port
        assert connack(client, lambda: client.connect("127.0.0.1", port)) == 135

    def test_user_names_that_would_break_the_password_file_are_refused(self) -> None:
        with pytest.raises(BadOption, match="a:b"):
            MosquittoServer(users={"a:b": "x"})

    async def test_stop_ends_the_process_and_removes_the_files(
        self, mosquitto_installed: None
    ) -> None:
        server = MosquittoServer(unix=True)
        await server.start()
        pid, folder = server.pid, Path(server.unix_path).parent
        assert pid is not None
        assert alive(pid)
        await server.stop()
        await server.stop()
        assert not alive(pid)
        assert not folder.exists()
        assert not server.running

    async def test_restart_keeps_the_port(self, mosquitto_own: MosquittoServer) -> None:
        port, pid = mosquitto_own.port, mosquitto_own.pid
        await mosquitto_own.restart()
        assert mosquitto_own.port == port
        assert mosquitto_own.pid not in (None, pid)
        assert await exchange("127.0.0.1", port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_restart_after_a_kill(self, mosquitto_own: MosquittoServer) -> None:
        port = mosquitto_own.port
        await mosquitto_own.kill()
        assert not mosquitto_own.running
        with pytest.raises(ConnectionRefusedError):
            await exchange("127.0.0.1", port, CONNECT, 4)
        await mosquitto_own.restart()
        assert await exchange("127.0.0.1", port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_persistence_survives_a_restart(self, mosquitto_own: MosquittoServer) -> None:
        retained = bytes.fromhex("3106 0003 612f62 78".replace(" ", ""))
        subscribe = bytes.fromhex("8208 0001 0003 612f62 00".replace(" ", ""))
        # DISCONNECT makes the broker end the connection once it has read all.
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", mosquitto_own.port)
            writer.write(CONNECT + retained + b"\xe0\x00")
            await reader.read()
            writer.close()
            await writer.wait_closed()
        await mosquitto_own.restart()
        answer = await exchange("127.0.0.1", mosquitto_own.port, CONNECT + subscribe, 4 + 5 + 8)
        assert answer == b"\x20\x02\x00\x00" + b"\x90\x03\x00\x01\x00" + retained

    async def test_a_failed_start_quotes_the_log(self, mosquitto_installed: None) -> None:
        server = MosquittoServer(extra_config="no_such_option 1")
        with pytest.raises(ConnectError, match="no_such_option"):
            await server.start()
        assert not server.running
        assert server.describe()["pid"] is None

    async def test_a_taken_port_is_an_error_when_it_was_asked_for(
        self, mosquitto_installed: None
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            server = MosquittoServer(port=taken.getsockname()[1])
            with pytest.raises(ConnectError, match="already in use"):
                await server.start()

    async def test_a_taken_port_is_passed_over_when_any_would_do(
        self, mosquitto_installed: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free_port = mosquitto._free_port
        with socket.create_server(("127.0.0.1", 0)) as taken:
            offers = iter([taken.getsockname()[1]])
            monkeypatch.setattr(
                mosquitto, "_free_port", lambda host: next(offers, None) or free_port(host)
            )
            async with MosquittoServer() as server:
                assert server.port != taken.getsockname()[1]
                assert await exchange("127.0.0.1", server.port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_a_missing_program_is_a_typed_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mosquitto, "find_mosquitto", lambda: None)
        with pytest.raises(MissingDependency, match="apt-get install mosquitto"):
            await MosquittoServer().start()

    async def test_a_missing_certificate_is_quoted(self, mosquitto_installed: None) -> None:
        server = MosquittoServer(tls=ServerTLS("/none.crt", "/none.key"))
        with pytest.raises(ConnectError, match=r"none\.crt"):
            await server.start()

    @pytest.mark.parametrize("how", ["it ends", "SIGTERM", "SIGKILL"])
    @pytest.mark.slow
    async def test_leaves_no_process_when_its_interpreter_ends(
        self, mosquitto_installed: None, how: str
    ) -> None:
        program = (
            "import asyncio\n"
            "from pubsub_mqtt.server import MosquittoServer\n"
            "server = MosquittoServer(unix=True)\n"
            "asyncio.run(server.start())\n"
            "print(server.pid, server.unix_path, flush=True)\n"
            "input()\n"
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        assert child.stdout is not None
        async with asyncio.timeout(20):
            pid, path = (await child.stdout.readline()).split()
            assert alive(int(pid))
            if how == "SIGTERM":
                child.terminate()
            elif how == "SIGKILL":
                child.kill()
            await child.communicate(b"\n" if how == "it ends" else None)
        await eventually(lambda: not alive(int(pid)), what="the process is gone")
        folder = Path(path.decode()).parent
        await eventually(lambda: not folder.exists(), what="the folder is gone")

    async def test_is_stopped_at_once_when_it_does_not_obey(
        self, mosquitto_own: MosquittoServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mosquitto, "STOP_DEADLINE", 0.1)
        pid = mosquitto_own.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(5):
            await mosquitto_own.stop()
        assert not alive(pid)


class TestAmqtt:
    async def test_answers_on_a_free_port_of_loopback(self, amqtt_server: AmqttServer) -> None:
        assert amqtt_server.url == f"mqtt://127.0.0.1:{amqtt_server.port}"
        assert await exchange("127.0.0.1", amqtt_server.port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_tells_its_limits_at_the_start(self, caplog: pytest.LogCaptureFixture) -> None:
        pytest.importorskip("amqtt")
        with caplog.at_level(logging.WARNING, "pubsub_mqtt.server"):
            async with AmqttServer() as server:
                limits = server.describe()["limits"]
        said = [record.getMessage() for record in caplog.records]
        assert len([text for text in said if "no shared subscriptions" in text]) == 1
        assert isinstance(limits, list)
        assert "no shared subscriptions" in limits

    async def test_stops_with_a_client_that_never_said_connect(self) -> None:
        pytest.importorskip("amqtt")
        server = AmqttServer()
        await server.start()
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            await eventually(lambda: server._clients, what="the server has seen the client")
            await server.stop()
            with pytest.raises(CLOSED):
                await reader.readexactly(1)
            writer.transport.abort()
        assert not server.running

    async def test_drops_a_client_that_never_says_connect(
        self, amqtt_server: AmqttServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pubsub_mqtt.server.amqtt.CONNECT_DEADLINE", 0.05)
        with pytest.raises(CLOSED):
            await exchange("127.0.0.1", amqtt_server.port, CONNECT[:5], 1)

    async def test_restarts_on_the_same_port(self, amqtt_server: AmqttServer) -> None:
        port = amqtt_server.port
        await amqtt_server.restart()
        assert amqtt_server.port == port
        assert await exchange("127.0.0.1", port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_a_taken_port_is_a_typed_error(self) -> None:
        pytest.importorskip("amqtt")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            server = AmqttServer(port=taken.getsockname()[1])
            with pytest.raises(ConnectError, match="another port"):
                await server.start()
        await server.stop()

    async def test_without_amqtt_it_names_the_install_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "amqtt.broker", None)
        with pytest.raises(MissingDependency, match=r"pubsub-core\[mqtt-server\]"):
            await AmqttServer().start()


class TestMQTTServer:
    def test_is_a_development_server(self) -> None:
        server: DevServer = MQTTServer()
        assert (server.host, MQTTServer.backend) == ("127.0.0.1", "mqtt")

    async def test_is_mosquitto_where_it_is_installed(self, mosquitto_installed: None) -> None:
        async with MQTTServer() as server:
            assert str(server.describe()["server"]).startswith("mosquitto")
            assert await exchange(server.host, server.port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_is_amqtt_where_mosquitto_is_missing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("amqtt")
        monkeypatch.setattr("pubsub_mqtt.server.mqtt.find_mosquitto", lambda: None)
        async with MQTTServer() as server:
            assert str(server.describe()["server"]).startswith("amqtt")
            assert await exchange(server.host, server.port, CONNECT, 4) == b"\x20\x02\x00\x00"

    async def test_with_neither_it_names_both_install_lines(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pubsub_mqtt.server.mqtt.find_mosquitto", lambda: None)
        monkeypatch.setitem(sys.modules, "amqtt.broker", None)
        with pytest.raises(MissingDependency, match="apt-get install mosquitto, or pip install"):
            await MQTTServer().start()

    async def test_stop_before_start_does_nothing(self) -> None:
        await MQTTServer().stop()


pytestmark = pytest.mark.usefixtures("no_leaks")
