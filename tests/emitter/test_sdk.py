"""The real SDKs against the embedded broker, each in an environment of its own.

PyPI ``emitter-io`` 2.3.0 with an old and a new paho-mqtt over TCP, and npm ``emitter-io`` 1.39.0
over WebSocket. Slow: pip and npm fill the environments. Where Node.js is not installed, it comes
from PyPI as well.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.emitter.support import broker
from tests.emitter.vectors import MASTER_KEY
from tests.node import environment, node_and_npm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

DATA = Path(__file__).parent.parent / "data"
PROGRAM = DATA / "emitter_sdk_program.txt"
NPM_PROGRAM = DATA / "emitter_npm_program.txt"


def _with_node_and_sdk(folder: Path) -> Path:
    """Install npm's SDK in *folder*; return Node.js."""
    node, npm = node_and_npm(folder)
    install = ("install", "--no-audit", "--no-fund", "--ignore-scripts", "emitter-io@1.39.0")
    done = subprocess.run(
        (*npm, *install), cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return node


async def _check(python: Path, program: Path) -> None:
    """Run the program for PyPI's SDK, and check what it saw."""
    async with broker() as server:
        process = await asyncio.create_subprocess_exec(
            python, "-W", "ignore", program, str(server.port), MASTER_KEY,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, (out, err)
    seen: dict[str, list[Any]] = json.loads(out)
    assert seen["messages"] == [
        *(["handler", "sdk/room/", text] for text in (
            "plain", "stored", "retained", "confirmed", "at most once",
        )),
        ["default", "sdk/room/", "stored"],
        ["default", "sdk/room/", "retained"],
        ["default", "shared/", "to the group"],
        ["default", "sdk/room/", "through the link"],
    ]  # fmt: skip
    assert [each["event"] for each in seen["presence"]][:3] == [
        "status",
        "subscribe",
        "unsubscribe",
    ]
    assert seen["presence"][1]["who"]["username"] == "sdk"
    assert [each["status"] for each in seen["keygen"]] == [200, 200, 200]
    assert seen["me"][0]["links"] == {"a0": "sdk/room/"}
    assert seen["keyban"] == [{"status": 200, "banned": True}]
    assert [each["status"] for each in seen["errors"]] == [401]


@pytest.mark.parametrize("paho", ["1.6.1", "2.2.0"])
async def test_the_sdk_of_pypi_works_with_the_broker(paho: str, tmp_path: Path) -> None:
    python = await asyncio.to_thread(
        environment, tmp_path / "sdk", "emitter-io==2.3.0", f"paho-mqtt=={paho}"
    )
    await _check(python, PROGRAM)


async def test_the_same_program_runs_with_the_import_of_this_package(tmp_path: Path) -> None:
    text = PROGRAM.read_text()
    assert text.count("from emitter import Client") == 1
    program = tmp_path / "program.py"
    program.write_text(text.replace("from emitter import", "from pubsub_emitter import"))
    await _check(Path(sys.executable), program)


async def test_the_sdk_of_npm_works_with_the_broker_over_websocket(tmp_path: Path) -> None:
    program = tmp_path / "program.js"
    program.write_text(NPM_PROGRAM.read_text())
    node = await asyncio.to_thread(_with_node_and_sdk, tmp_path)
    async with broker() as server:
        process = await asyncio.create_subprocess_exec(
            node, program, str(server.port), MASTER_KEY,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        )  # fmt: skip
        try:
            async with asyncio.timeout(40):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, (out, err)
    seen: dict[str, list[Any]] = json.loads(out.splitlines()[-1])
    topics = [topic for topic, _ in seen["messages"]]
    assert [text for topic, text in seen["messages"] if topic == "npm/room/"] == [
        "plain", "stored", "stored", "through the link",
    ]  # fmt: skip
    # This SDK hands answers it does not know to the handler of messages.
    assert [topic for topic in topics if topic != "npm/room/"] == [
        "emitter/link/", "emitter/error/",
    ]  # fmt: skip
    assert [each["event"] for each in seen["presence"]][:2] == ["status", "subscribe"]
    assert seen["presence"][1]["who"]["username"] == "npm"
    assert seen["me"][0]["links"] == {"a0": "npm/room/?me=1"}
    assert not seen["errors"]
