"""The README's examples run as they stand, as a device of a broker with TLS on this machine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pubsub_core import Secret
from pubsub_core.config import Config
from pubsub_core.config.options import field_help
from pubsub_losant import AccessKey, DeviceSpec, LosantServer
from pubsub_losant.options import LosantOptions
from tests.servers import Authority

README = Path(__file__).parents[2] / "backends" / "losant" / "README.md"
EXAMPLES = (
    re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    if README.exists()
    else []
)

TABLES = (
    re.findall(r"^```toml\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    if README.exists()
    else []
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not README.exists(), reason="looks at the checkout"),
]

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
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        PRELUDE.format(port=port) + EXAMPLES[number],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "SSL_CERT_FILE": authority.cafile,
            "LOSANT_MQTT_ENDPOINT": "localhost",
            "PYTHONUNBUFFERED": "1",
        },
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def said(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert err.decode() == ""
    assert process.returncode == 0
    return out.decode()


def test_every_example_is_tested() -> None:
    assert len(EXAMPLES) == 7


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
    (text,) = (each for each in TABLES if "[bus.main]" in each)
    file = tmp_path / "pubsub.toml"
    file.write_text(text)
    environ = {"LOSANT_KEY": "the key", "LOSANT_SECRET": "the secret"}
    found = Config.load(file, environ=environ).bus("main")
    assert found.address.host == "575ecf887ae143cd83dc4aa2"
    assert found.options.access_key == Secret("the key")
    assert found.options.access_secret == Secret("the secret")


def test_the_options_table_is_that_of_the_options() -> None:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for option in field_help(LosantOptions):
        default = f"`{option.default}`" if option.default else ""
        rows.append(f"| `{option.name}` | {default} | {option.help} |")
    assert "\n".join(rows) in README.read_text()
