"""The README's examples run as they stand, as a device of a broker with TLS on this machine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pubsub_core import Secret
from pubsub_core.config import Config
from pubsub_losant import AccessKey, DeviceSpec, LosantServer
from tests.readme import Document, running, said
from tests.servers import Authority

README = Document("backends/losant/README.md")

pytestmark = [pytest.mark.slow, README.needed]

DEVICES = {
    "my-device-id": DeviceSpec(),
    "my-gateway-id": DeviceSpec("gateway"),
    "my-door-id": DeviceSpec("peripheral", gateway_id="my-gateway-id"),
    "my-window-id": DeviceSpec("floating"),
}

# The platform's port is below 1024, where no test may listen; everything else is as documented.
PRELUDE = (
    "import pubsub_losant.client.device_base as _; _._PORTS = dict.fromkeys(_._PORTS, {port})\n"
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("readme-ca"), "readme")


@asynccontextmanager
async def platform(authority: Authority) -> AsyncIterator[LosantServer]:
    own = authority.issue("localhost")
    server = LosantServer(
        devices=DEVICES,
        keys=[AccessKey("my-access-key", "my-access-secret")],
        certfile=own.certfile,
        keyfile=own.keyfile,
    )
    async with server:
        yield server


@asynccontextmanager
async def example(
    number: int, authority: Authority, port: int = 0
) -> AsyncIterator[asyncio.subprocess.Process]:
    program = PRELUDE.format(port=port) + README.blocks("python")[number]
    environment = {"SSL_CERT_FILE": authority.cafile, "LOSANT_MQTT_ENDPOINT": "localhost"}
    async with running(program, environment) as process:
        yield process


def test_every_example_is_tested() -> None:
    assert len(README.blocks("python")) == 7


async def test_the_sensor_loop(authority: Authority) -> None:
    async with platform(authority) as server, example(0, authority, server.port) as process:
        (state,) = await server.wait_state("my-device-id", timeout=20)
        assert state.data == {"temperature": 21.5}
        process.send_signal(signal.SIGINT)
        assert await said(process) == ""
        assert server.connection_log("my-device-id")[0]["disconnectReason"] == "Client Disconnected"


async def test_the_command_handler(authority: Authority) -> None:
    async with platform(authority) as server, example(1, authority, server.port) as process:
        await server.wait_connected("my-device-id", timeout=20, subscribed=True)
        await server.send_command("my-device-id", "blink", {"times": 3})
        await server.send_command("my-device-id", "stop")
        assert await said(process) == "connected\nblink {'times': 3}\nstop None\n"


async def test_the_asyncio_form(authority: Authority) -> None:
    async with platform(authority) as server, example(2, authority, server.port) as process:
        await server.wait_connected("my-device-id", timeout=20, subscribed=True)
        await server.send_command("my-device-id", "stop", 1)
        assert await said(process) == "stop 1\n"
        assert server.last_state("my-device-id")["temperature"][0] == 21.5


async def test_the_gateway(authority: Authority) -> None:
    async with platform(authority) as server, example(3, authority, server.port) as process:
        for name in ("my-door-id", "my-window-id"):
            async with asyncio.timeout(20):
                while not await server.send_command(name, "open"):
                    await asyncio.sleep(0.02)
            (state,) = await server.wait_state(name)
            assert state.data == {"open": True}
        await server.send_command("my-gateway-id", "stop")
        assert await said(process) == "my-door-id open\nmy-window-id open\n"


@pytest.mark.parametrize("number", [4, 5], ids=["test without the cloud", "changed import"])
async def test_the_others(number: int, authority: Authority) -> None:
    async with example(number, authority) as process:
        assert await said(process) == ""


async def test_one_program_for_any_broker(authority: Authority) -> None:
    async with example(6, authority) as process:
        assert await said(process) == "True\n"


def test_the_file_for_one_program(tmp_path: Path) -> None:
    file = tmp_path / "pubsub.toml"
    file.write_text(README.block("toml", "[bus.main]"))
    environ = {"LOSANT_KEY": "the key", "LOSANT_SECRET": "the secret"}
    found = Config.load(file, environ=environ).bus("main")
    assert found.address.host == "575ecf887ae143cd83dc4aa2"
    assert found.options.access_key == Secret("the key")
    assert found.options.access_secret == Secret("the secret")
