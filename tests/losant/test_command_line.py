"""A broker in a process of its own, and commands from the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_mqtt.server.endpoint.packets import Connect, Publish, SubAck, Subscribe
from tests.mqtt.server.endpoint.wire import Wire

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

PUBSUB = (sys.executable, "-m", "pubsub_core.cli")

TOML = """
[devices.press]
attributes = { speed = "number" }

[[keys]]
key = "AK"
secret = "SEC"
"""


@contextlib.asynccontextmanager
async def serving(*options: str) -> AsyncIterator[dict[str, Any]]:
    """Run ``pubsub serve losant``; yield what it says, and stop it with a signal."""
    process = await asyncio.create_subprocess_exec(
        *PUBSUB, "serve", "losant", "--json", *options,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            line = await process.stdout.readline()
        if not line:
            raise AssertionError((await process.communicate())[1].decode())
        yield json.loads(line)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            await process.communicate()
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def pubsub(*arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *PUBSUB, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return process.returncode, (out + err).decode()


async def test_a_command_from_the_command_line_reaches_the_device() -> None:
    async with serving() as told:
        device_id, operator = told["device_id"], told["operator_url"]
        assert told["backend"] == "losant"
        connect = Connect(device_id, told["access_key"], told["access_secret"].encode(), 15)
        topic = f"losant/{device_id}/command"
        async with Wire.connected(told["port"], connect) as device:
            await device.send(Subscribe(1, ((topic, 0),)))
            assert await device.next() == SubAck(1, (0,))
            code, said = await pubsub("pub", operator, topic, '{"name": "go", "payload": [1]}')
            assert code == 0, said
            packet = await device.next()
            assert isinstance(packet, Publish)
            found = json.loads(packet.payload)
            assert (found["name"], found["payload"]) == ("go", [1])
            assert list(found) == ["name", "payload", "time"]
            code, said = await pubsub("pub", operator, topic, "no command")
            assert code, said
            wrong = operator.replace("operator:", "operator:x")
            code, said = await pubsub("pub", wrong, topic, '{"name": "go"}')
            assert code, said
            assert "operator:x" not in said


async def test_a_file_of_devices_and_a_store(tmp_path: Path) -> None:
    (tmp_path / "plant.toml").write_text(TOML)
    options = "--config", str(tmp_path / "plant.toml"), "--store", str(tmp_path / "plant.db")
    connect = Connect("press", "AK", b"SEC", 15)
    for _ in range(2):
        async with serving(*options) as told:
            assert "SEC" not in str(told)
            assert told["devices"] == 1
            async with Wire.connected(told["port"], connect) as device:
                await device.send(
                    Publish("losant/press/state", b'{"data":{"speed":"3"}}', 1, packet_id=1)
                )
                await device.next()
