"""The vendor's clients against the embedded broker, each in an environment of its own.

PyPI ``losant-mqtt`` 1.2.1, which needs paho-mqtt below 2 and a setuptools with ``pkg_resources``,
over TCP and WebSocket, plain and TLS; and npm ``losant-mqtt``, or npm ``mqtt`` sending what it
sends where the registry does not have it. Slow: pip and npm fill the environments.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_losant import LosantServer
from pubsub_losant.server.storage import State
from tests.losant.application import DEVICES, GATEWAY, PERIPHERAL, A, broker
from tests.node import environment, node_and_npm
from tests.servers import Authority

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("no_leaks")]

DATA = Path(__file__).parent.parent / "data"
REQUIREMENTS = ("losant-mqtt==1.2.1", "paho-mqtt<2", "setuptools<81")


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )


async def seen_by(*command: str | Path, folder: Path) -> dict[str, Any]:
    """Run a program; return the object it prints last."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder
    )
    try:
        async with asyncio.timeout(90):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 0, (out, err)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def reasons(server: LosantServer) -> list[str]:
    """Return why the device went each time, newest first."""
    log = server.connection_log(A)
    return [each["disconnectReason"] for each in log if not each["connected"]]


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[LosantServer]:
    """A broker that does what a state asks for: a command, or to be dropped."""
    async with broker(**options) as server:
        loop = asyncio.get_running_loop()
        sending: set[asyncio.Task[int]] = set()

        def asked(device_id: str, state: State) -> None:
            match state.data.get("ask"):
                case "command":
                    payload = {"one": [2, 3]}
                    task = loop.create_task(server.send_command(device_id, "start", payload))
                    sending.add(task)
                    task.add_done_callback(sending.discard)
                case "drop":
                    loop.call_soon(server.disconnect, device_id)
                case _:
                    pass

        server.on_state.append(asked)
        yield server


async def test_the_package_of_pypi_works_with_the_broker(
    tmp_path: Path, authority: Authority
) -> None:
    python = await asyncio.to_thread(environment, tmp_path / "sdk", *REQUIREMENTS)
    certificate = authority.issue("losant sdk")
    async with serving(
        tls_port=0, certfile=certificate.certfile, keyfile=certificate.keyfile
    ) as server:
        ports = str(server.port), str(server.tls_port)
        seen = await seen_by(
            python, "-W", "ignore", DATA / "losant_sdk_program.txt",
            *ports, authority.cafile, A, "kA", "secret of kA", folder=tmp_path,
        )  # fmt: skip
        assert seen.pop("wrong secret") == "Invalid Losant credentials - error code 5"
        assert len(seen) == 4
        for events, commands in seen.values():
            assert events == ["connect", "reconnect", "close"]
            assert [each[:2] for each in commands] == [["start", {"one": [2, 3]}]] * 2
            assert all(each[2].endswith("+00:00") for each in commands)
        last = server.last_state(A)
        assert {name: value for name, (value, _) in last.items() if name != "n"} == {
            "temperature": 21.5, "text": "é", "on": True, "ask": "command",
        }  # fmt: skip
        assert not server.errors
        await server.wait_disconnected(A)
        assert reasons(server) == ["Client Disconnected", "Disconnected by operator"] * 4
        assert server.rejections[-1].code == 5


async def test_the_package_of_npm_or_its_stand_in_works_with_the_broker(tmp_path: Path) -> None:
    node, npm = await asyncio.to_thread(node_and_npm, tmp_path)
    install = (*npm, "install", "--no-audit", "--no-fund", "--ignore-scripts")
    done = await asyncio.to_thread(run, *install, "losant-mqtt", folder=tmp_path)
    if done.returncode:
        assert "E404" in done.stderr, done.stderr
        done = await asyncio.to_thread(run, *install, "mqtt@4.3.8", folder=tmp_path)
        assert done.returncode == 0, done.stderr
    program = tmp_path / "program.js"
    program.write_text((DATA / "losant_npm_program.txt").read_text())
    assert DEVICES[PERIPHERAL].gateway_id == GATEWAY
    async with serving() as server:
        seen = await seen_by(
            node, program, str(server.port), A, GATEWAY, PERIPHERAL, "kA", "secret of kA",
            folder=tmp_path,
        )  # fmt: skip
        for transport in ("tcp", "ws"):
            events, name, payload, again = seen[transport]
            assert events == ["connect", "close", "reconnect", "connect"]
            assert (name, payload, again) == ("start", {"one": [2, 3]}, "start")
        assert seen["peripheral"] == "start"
        assert seen["refused"] == 5
        assert server.last_state(A)["text"][0] == "é"
        assert server.last_state(PERIPHERAL)["ask"][0] == "command"
        assert not server.errors
        await server.wait_disconnected(A)
        assert reasons(server) == ["Client Disconnected", "Disconnected by operator"] * 2
